//! The same request again on one connection, for another range: what `server/again.rs` answers below hyper is what
//! hyper and the handler would have answered, and whatever is not the same request is theirs.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pinrange::strict_s3::PutOptions;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

use super::truncate_segments;
use super::world::{BLOCK, PART, World, bytes, slice};

/// Fields that tell one answer from another of the same kind.
const OF_ITS_OWN: [&str; 5] = [
    "content-length",
    "content-range",
    "date",
    "server-timing",
    "x-request-id",
];

struct Connection(BufReader<TcpStream>);

#[derive(Debug, PartialEq)]
struct Answer {
    status: String,
    fields: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    /// What two answers of the same kind share.
    fn kind(&self) -> (&str, Vec<&str>, BTreeMap<&str, &str>) {
        let names = self.fields.keys().map(String::as_str).collect();
        let fields = self.fields.iter();
        let shared = fields
            .filter(|(name, _)| !OF_ITS_OWN.contains(&name.as_str()))
            .map(|(name, value)| (name.as_str(), value.as_str()));
        (&self.status, names, shared.collect())
    }

    /// `kind`, by value; an id of the client's is a field of all.
    fn kind_of_it(&self) -> (String, Vec<String>) {
        let (status, names, _) = self.kind();
        (
            status.to_owned(),
            names.into_iter().map(str::to_owned).collect(),
        )
    }

    /// With a boundary of its own.
    fn is_multipart(&self) -> bool {
        self.status.contains("206") && self.fields["content-type"].starts_with("multipart/")
    }
}

impl Connection {
    async fn new(world: &World) -> Self {
        Self(BufReader::new(
            TcpStream::connect(world.replica.data).await.unwrap(),
        ))
    }

    /// One whose kernel takes little before it is read from.
    async fn narrow(world: &World) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(world.replica.data).await.unwrap();
        Self(BufReader::new(stream))
    }

    async fn send(&mut self, text: impl AsRef<str>) {
        let bytes = text.as_ref().as_bytes();
        self.0.get_mut().write_all(bytes).await.unwrap();
    }

    /// `None`: the connection ended before a head or in its body.
    async fn read(&mut self, to_head: bool) -> Option<Answer> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).await.unwrap_or(0) == 0 {
                return None;
            }
            match line.strip_suffix("\r\n").expect("lines end in CRLF") {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let status = lines.remove(0);
        let mut fields = BTreeMap::new();
        for line in lines {
            let (name, value) = line.split_once(": ").expect("a field");
            let before = fields.insert(name.to_owned(), value.to_owned());
            assert_eq!(before, None, "{name} twice");
        }
        let length = if to_head || status.contains("304") {
            0
        } else {
            fields["content-length"].parse().unwrap()
        };
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.ok()?;
        Some(Answer {
            status,
            fields,
            body,
        })
    }

    async fn ask(&mut self, request: impl AsRef<str>) -> Answer {
        let request = request.as_ref();
        self.send(request).await;
        let to_head = request.starts_with("HEAD");
        self.read(to_head).await.expect("an answer")
    }

    /// Has asked for ranges of `/m/object` until the next one may be answered as they were.
    async fn armed(world: &World, tag: &str) -> Self {
        let mut connection = Self::new(world).await;
        connection.arm(tag).await;
        connection
    }

    /// Its next range is answered as those before it were.
    async fn repeats(&mut self, world: &World, request: &str) -> bool {
        let before = repeated(world).await;
        self.ask(request).await;
        repeated(world).await > before
    }

    /// Is being answered again, with more than the sockets take: all of the `size` bytes of `/m/object`.
    async fn under_way(world: &World, tag: &str, size: u64) -> Self {
        let mut connection = Self::narrow(world).await;
        connection.arm(tag).await;
        let all = ranged(tag, &format!("bytes=0-{}", size - 1));
        connection.send(all).await;
        connection
    }

    async fn arm(&mut self, tag: &str) {
        for _ in 0..2 {
            self.ask(ranged(tag, "bytes=0-0")).await;
        }
    }
}

fn request(fields: &str) -> String {
    format!("GET /m/object HTTP/1.1\r\nHost: test\r\n{fields}\r\n")
}

fn ranged(tag: &str, range: &str) -> String {
    request(&format!("If-Match: {tag}\r\nRange: {range}\r\n"))
}

async fn repeated(world: &World) -> u64 {
    let metrics = world.metrics().await;
    let value = metrics
        .lines()
        .find_map(|line| line.strip_prefix("pinrange_repeated_requests_total "));
    value.expect("it is registered").parse().unwrap()
}

/// A world that holds all of an object of `size` bytes.
async fn holding(seed: u64, size: u64) -> (World, Bytes, String) {
    let world = World::new().await;
    let object = bytes(seed, size);
    let tag = world.put("object", &object);
    assert_eq!(world.get("/m/object", &[]).await.body, object);
    (world, object, tag)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_ranges_are_answered_as_the_first_was() {
    let (world, object, tag) = holding(80, 5 * PART + 77).await;
    world.s3.clear_log();
    let mut connection = Connection::new(&world).await;
    let ranges = [
        (0, 1),
        (5, 4096),
        (BLOCK - 1, 5000),
        (9, 33_000),
        (3, 4 * PART),
        (5 * PART, 77),
    ];
    let mut first = None;
    for (start, length) in ranges {
        let last = start + length - 1;
        let answer = connection
            .ask(ranged(&tag, &format!("bytes={start}-{last}")))
            .await;
        assert!(answer.body == slice(&object, start, start + length));
        let expected = format!("bytes {start}-{last}/{}", object.len());
        assert_eq!(answer.fields["content-range"], expected);
        assert!(answer.fields["server-timing"].starts_with("disk;dur=0."));
        assert_eq!(answer.fields["x-request-id"].len(), 16);
        httpdate::parse_http_date(&answer.fields["date"]).unwrap();
        let first = first.get_or_insert(answer);
        let again = connection
            .ask(ranged(&tag, &format!("bytes={start}-{last}")))
            .await;
        assert_eq!(again.kind(), first.kind());
        assert!(again.body == slice(&object, start, start + length));
        assert_ne!(
            again.fields["x-request-id"], first.fields["x-request-id"],
            "each has its own"
        );
    }
    assert_eq!(repeated(&world).await, 2 * ranges.len() as u64 - 2);
    assert_eq!(world.s3.stats().requests, 0, "{:?}", world.s3.take_log());
    let metrics = world.metrics().await;
    let sent: u64 = ranges.iter().map(|(_, length)| 2 * length).sum();
    for line in [
        "pinrange_requests_total{verdict=\"partial\",tier=\"disk\"} 12\n".to_owned(),
        format!("pinrange_sent_bytes_total{{tier=\"disk\"}} {sent}\n"),
        "pinrange_open_responses 0\n".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
}

/// Each on a connection that has the plain request armed, and on one of its own.
#[tokio::test(flavor = "multi_thread")]
async fn another_request_is_read() {
    let (world, object, tag) = holding(81, 3 * BLOCK).await;
    let size = object.len();
    let pin = format!("If-Match: {tag}\r\n");
    let others = [
        // The range is not the plainest, or is none.
        ranged(&tag, "bytes=5-"),
        ranged(&tag, "bytes=-5"),
        ranged(&tag, "bytes=0-1,4-5"),
        ranged(&tag, "bytes=7-3"),
        ranged(&tag, "bytes=4-3"),
        ranged(&tag, &format!("bytes={size}-{size}")),
        ranged(&tag, "bytes=0-99999999999999999999999999"),
        ranged(&tag, "bytes=+1-5"),
        ranged(&tag, "bytes= 1-5"),
        ranged(&tag, "bytes=1-5 "),
        ranged(&tag, "Bytes=1-5"),
        ranged(&tag, "lines=1-5"),
        ranged(&tag, "bytes=1-5\r\nRange: bytes=1-5"),
        request(&pin),
        // Another pin, another condition.
        ranged("\"0\"", "bytes=1-5"),
        ranged(&format!("{tag}, \"0\""), "bytes=1-5"),
        ranged("*", "bytes=1-5"),
        request("Range: bytes=1-5\r\n"),
        request(&format!(
            "{pin}If-None-Match: {tag}\r\nRange: bytes=1-5\r\n"
        )),
        request(&format!("{pin}If-Range: \"0\"\r\nRange: bytes=1-5\r\n")),
        // Another target, method, version, framing.
        ranged(&tag, "bytes=1-5").replace("/m/object", "/m/absent"),
        ranged(&tag, "bytes=1-5").replace("/m/object", "/m/object?versionId=1"),
        ranged(&tag, "bytes=1-5").replace("GET", "HEAD"),
        ranged(&tag, "bytes=1-5").replace("GET", "POST"),
        ranged(&tag, "bytes=1-5").replace("Host: test\r\n", ""),
        ranged(&tag, "bytes=1-5").replace("Host: test", "Host: a b"),
        request(&format!("{pin}Range: bytes=1-5\r\nX-Request-Id: mine\r\n")),
        request(&format!("{pin}Range: bytes=1-5\r\nConnection: close\r\n")),
    ];
    for other in others {
        let alone = Connection::new(&world).await.ask(&other).await;
        let mut connection = Connection::armed(&world, &tag).await;
        // In the middle, and three times in a row: what is not to be repeated is not.
        connection.ask(ranged(&tag, "bytes=1-5")).await;
        for _ in 0..3 {
            let answer = connection.ask(&other).await;
            if alone.is_multipart() {
                assert!(answer.is_multipart(), "{other}");
                continue;
            }
            assert_eq!(answer.kind(), alone.kind(), "{other}");
            assert_eq!(
                answer.fields.get("content-range"),
                alone.fields.get("content-range")
            );
            assert!(answer.body == alone.body, "{other}");
            if answer.fields.contains_key("connection") {
                break;
            }
        }
        if !alone.fields.contains_key("connection") && !alone.status.contains("400") {
            connection.arm(&tag).await;
            let answer = connection.ask(ranged(&tag, "bytes=1-5")).await;
            assert!(answer.body == object[1..6], "{other}");
        }
    }
}

/// Whatever else two equal heads say, they are answered alike; what goes into the log or names another protocol is read.
#[tokio::test(flavor = "multi_thread")]
async fn what_equal_heads_may_say_besides() {
    let (world, object, tag) = holding(82, 3 * BLOCK).await;
    for (more, short_way) in [
        ("Connection: Keep-Alive", 2),
        ("If-None-Match: \"0\"", 2),
        ("If-Modified-Since: Sat, 01 Jan 2000 00:00:00 GMT", 2),
        (&format!("If-Range: {tag}"), 2),
        ("Expect: 100-continue", 2),
        ("Upgrade: websocket\r\nConnection: upgrade", 2),
        ("Content-Length: 0", 2),
        ("X-Request-Id: mine", 0),
        (
            "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            0,
        ),
        ("Cache-Control: no-cache", 0),
    ] {
        let before = repeated(&world).await;
        let mut connection = Connection::new(&world).await;
        let mut first = None;
        for turn in 0..4 {
            let range = format!("{turn}-{}", turn + 9);
            let fields = format!("If-Match: {tag}\r\n{more}\r\nRange: bytes={range}\r\n");
            let answer = connection.ask(request(&fields)).await;
            assert!(answer.body == object[turn..turn + 10], "{more}");
            let first = first.get_or_insert_with(|| answer.kind_of_it());
            assert_eq!(answer.kind_of_it(), *first, "{more}");
        }
        assert_eq!(repeated(&world).await, before + short_way, "{more}");
    }
    let before = repeated(&world).await;
    // No 206 to begin with.
    for (more, status, length) in [
        (format!("If-None-Match: {tag}"), "304", 0),
        ("If-Range: \"0\"".to_owned(), "200", object.len()),
    ] {
        let mut connection = Connection::new(&world).await;
        for turn in 0..4 {
            let fields = format!("If-Match: {tag}\r\n{more}\r\nRange: bytes={turn}-9\r\n");
            let answer = connection.ask(request(&fields)).await;
            assert!(answer.status.contains(status), "{answer:?}");
            assert_eq!(answer.body.len(), length, "{more}");
        }
    }
    let mut connection = Connection::new(&world).await;
    for _ in 0..4 {
        let old = ranged(&tag, "bytes=1-5\r\nConnection: keep-alive");
        let answer = connection.ask(old.replace("HTTP/1.1", "HTTP/1.0")).await;
        assert!(answer.status.starts_with("HTTP/1.0 206"), "{answer:?}");
    }
    assert_eq!(repeated(&world).await, before);
}

/// However the bytes come, the answers are those to the requests in them.
#[tokio::test(flavor = "multi_thread")]
async fn heads_in_pieces_and_heads_together() {
    let (world, object, tag) = holding(83, 3 * BLOCK).await;
    let plain = |start: u64| ranged(&tag, &format!("bytes={start}-{}", start + 99));
    let right = |answer: &Answer, start: u64| answer.body == slice(&object, start, start + 100);

    // Two in one write: hyper may hold the second when the first is answered.
    let mut connection = Connection::armed(&world, &tag).await;
    connection.send([plain(1), plain(2)].concat()).await;
    for start in [1, 2] {
        assert!(right(&connection.read(false).await.unwrap(), start));
    }
    for start in 3..6 {
        assert!(right(&connection.ask(plain(start)).await, start));
    }
    assert!(connection.repeats(&world, &plain(6)).await, "once more");

    // One and the beginning of a second, whose rest is a request by itself: bytes of a field.
    for odd in [
        plain(7) + "GET /m/absent HTTP/1.1\r\nX-Rest: ",
        // Whoever reads leniently takes the first for whole.
        plain(7).replace("\r\n", "\n") + "GET /m/absent HTTP/1.1\r\nX-Rest: ",
    ] {
        let mut connection = Connection::armed(&world, &tag).await;
        connection.send(&odd).await;
        assert!(right(&connection.read(false).await.unwrap(), 7));
        connection.send(plain(8)).await;
        let answer = connection.read(false).await.unwrap();
        assert!(answer.status.contains("404"), "{answer:?}");
    }

    // Cut anywhere, hyper puts it together.
    let whole = plain(9);
    for at in [1, 4, whole.len() / 2, whole.len() - 2, whole.len() - 1] {
        let mut connection = Connection::armed(&world, &tag).await;
        let before = repeated(&world).await;
        connection.send(&whole[..at]).await;
        // Two segments may be one read.
        tokio::time::sleep(Duration::from_millis(20)).await;
        connection.send(&whole[at..]).await;
        assert!(right(&connection.read(false).await.unwrap(), 9), "at {at}");
        for start in 10..14 {
            assert!(right(&connection.ask(plain(start)).await, start));
        }
        assert!(repeated(&world).await <= before + 5);
        assert!(connection.repeats(&world, &plain(14)).await, "at {at}");
    }
}

/// Each piece is sent when all that was asked for before it is answered, so that it is a read of its own.
#[tokio::test(flavor = "multi_thread")]
async fn wherever_a_stream_of_heads_is_cut_every_answer_is_right_and_the_short_way_is_found_again()
{
    const HEADS: u64 = 40;
    let (world, object, tag) = holding(91, 3 * BLOCK).await;
    let plain = |start: u64| ranged(&tag, &format!("bytes={start}-{}", start + 99));
    for seed in 0..40 {
        let chance = bytes(1000 + seed, 400);
        let mut chance = chance.into_iter();
        let mut below = |bound: usize| usize::from(chance.next().unwrap()) % bound;
        let mut connection = Connection::new(&world).await;
        connection.0.get_mut().set_nodelay(true).unwrap();
        // By their ends in the stream.
        let (mut stream, mut owed) = (String::new(), VecDeque::new());
        for number in 0..HEADS {
            let start = 100 + number;
            let head = if below(8) == 0 {
                plain(start).replace("Host", "host")
            } else {
                plain(start)
            };
            stream.push_str(&head);
            owed.push_back((stream.len(), start));
        }
        let mut sent = 0;
        while sent < stream.len() {
            let whole = owed[below(owed.len().min(3))].0;
            let to = match below(6) {
                0 => sent + 1 + below(whole - sent),
                1 => stream.len().min(whole + below(9)),
                2 => whole,
                _ => owed[0].0,
            };
            connection.send(&stream[sent..to]).await;
            sent = to;
            while let Some((_, start)) = owed.pop_front_if(|(end, _)| *end <= sent) {
                let answer = connection.read(false).await.expect("an answer");
                assert!(answer.body == slice(&object, start, start + 100), "{seed}");
                let range = format!("bytes {start}-{}/{}", start + 99, object.len());
                assert_eq!(answer.fields["content-range"], range, "{seed}");
            }
        }
        connection.arm(&tag).await;
        assert!(connection.repeats(&world, &plain(9)).await, "{seed}");
    }
}

/// The bytes behind a head with content are no request, whatever they look like.
#[tokio::test(flavor = "multi_thread")]
async fn content_is_not_taken_for_a_request() {
    let (world, object, tag) = holding(84, 3 * BLOCK).await;
    let plain = ranged(&tag, "bytes=1-5");
    let with_content = format!("If-Match: {tag}\r\nContent-Length: {}\r\n", plain.len());
    for head in [
        request(&format!("{with_content}Range: bytes=1-5\r\n")),
        request(&with_content),
    ] {
        let mut connection = Connection::armed(&world, &tag).await;
        connection.send(&head).await;
        let answer = connection.read(false).await.unwrap();
        assert_eq!(answer.fields["connection"], "close");
        // It may be closed by now.
        let _ = connection.0.get_mut().write_all(plain.as_bytes()).await;
        assert_eq!(connection.read(false).await, None);
    }
    assert_eq!(world.get("/m/object", &[]).await.body, object);
}

/// More objects than there are places for what connections share, so that some meet in one.
#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_objects_is_repeated_as_itself() {
    let world = World::new().await;
    let mut connections = Vec::new();
    for number in 0..70 {
        let (name, object) = (format!("object-{number}"), bytes(200 + number, 3000));
        let tag = world.put(&name, &object);
        let path = format!("/m/{name}");
        assert_eq!(world.get(&path, &[]).await.body, object);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: test\r\nIf-Match: {tag}\r\nRange: bytes=7-2000\r\n\r\n"
        );
        let both = [Connection::new(&world).await, Connection::new(&world).await];
        connections.push((both, request, tag, object));
    }
    for round in 0..4 {
        for (both, request, tag, object) in &mut connections {
            for connection in both {
                let answer = connection.ask(&*request).await;
                assert_eq!(&answer.fields["etag"], tag);
                assert!(answer.body == object[7..=2000], "round {round}");
            }
        }
    }
    assert_eq!(repeated(&world).await, 2 * 2 * 70);
}

/// What changed since the last answer shows in the next.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_between_two_ranges_shows() {
    let (world, object, tag) = holding(85, 3 * BLOCK).await;
    let plain = ranged(&tag, "bytes=1-5");
    let mut connection = Connection::armed(&world, &tag).await;
    let before = connection.ask(&plain).await;
    assert_eq!(repeated(&world).await, 1);
    let mut other = Connection::armed(&world, &tag).await;
    assert!(other.repeats(&world, &plain).await);

    // Equal bytes under another label.
    let options = PutOptions {
        content_type: Some("text/plain".to_owned()),
        ..PutOptions::default()
    };
    world
        .s3
        .put("bucket", "object", object.clone(), options)
        .unwrap();
    let learnt = world
        .get(
            "/m/object",
            &[("cache-control", "no-cache"), ("range", "bytes=0-0")],
        )
        .await;
    assert_eq!(learnt.header("content-type"), "text/plain");
    let answer = connection.ask(&plain).await;
    assert_ne!(before.fields["content-type"], "text/plain");
    assert_eq!(answer.fields["content-type"], "text/plain");
    assert_eq!(repeated(&world).await, 2, "that one was read");
    connection.ask(&plain).await;
    assert!(connection.repeats(&world, &plain).await);
    let answer = connection.ask(&plain).await;
    assert_eq!(answer.fields["content-type"], "text/plain");
    // It has known nothing but the old label.
    let answer = other.ask(&plain).await;
    assert_eq!(answer.fields["content-type"], "text/plain");

    // Purged, and another object is there.
    world.put("object", &bytes(86, 3 * BLOCK));
    assert!(
        connection.ask(&plain).await.body == object[1..6],
        "it is held"
    );
    assert_eq!(world.purge("/m/object").await, 200);
    let answer = connection.ask(&plain).await;
    assert!(answer.status.contains("412"), "{answer:?}");
}

/// The head promised a range, and the file ends in the middle of it: P10 holds below hyper too.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_fails_is_replaced_within_a_repeated_answer() {
    let (world, object, tag) = holding(87, 2 * PART).await;
    let mut connection = Connection::armed(&world, &tag).await;
    assert_eq!(truncate_segments(&world, 1_000_000), 1);
    let plain = ranged(&tag, "bytes=500000-1999999");
    let answer = connection.ask(&plain).await;
    assert!(answer.body == object[500_000..2_000_000]);
    assert_eq!(repeated(&world).await, 1);
    let metrics = world.metrics().await;
    assert!(metrics.contains("pinrange_rescues_total 1\n"), "{metrics}");
    assert!(connection.ask(&plain).await.body == answer.body);
}

/// Who takes nothing of a repeated answer is cut as from any other.
#[tokio::test(flavor = "multi_thread")]
async fn who_stalls_in_a_repeated_answer_is_cut() {
    let (mut world, _, tag) = holding(88, 8 * PART).await;
    world.config.server.progress_timeout = Duration::from_millis(500);
    let world = world.restart().await;
    let mut connection = Connection::under_way(&world, &tag, 8 * PART).await;
    let cut = "pinrange_aborted_total{reason=\"client_stalled\"} 1\n";
    while !world.metrics().await.contains(cut) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(repeated(&world).await, 1);
    assert!(
        world
            .metrics()
            .await
            .contains("pinrange_open_responses 0\n")
    );
    assert_eq!(connection.read(false).await, None, "it is not whole");
}

/// Draining: answers say that they are the last, and one under way comes to its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_repeated_answers_as_others() {
    let (mut world, object, tag) = holding(89, 8 * PART).await;
    world.config.server.drain_grace = Duration::from_secs(2);
    let world = world.restart().await;
    let mut busy = Connection::under_way(&world, &tag, 8 * PART).await;
    // The head is here, and most of the body is not.
    busy.0.fill_buf().await.unwrap();
    let mut asking = Connection::armed(&world, &tag).await;
    asking.ask(ranged(&tag, "bytes=1-5")).await;
    let mut idle = Connection::armed(&world, &tag).await;
    assert_eq!(repeated(&world).await, 2);

    let draining = tokio::spawn(world.replica.drain(true));
    let told = loop {
        let answer = asking.ask(ranged(&tag, "bytes=1-5")).await;
        if let Some(connection) = answer.fields.get("connection") {
            break connection.clone();
        }
    };
    assert_eq!(told, "close");
    assert_eq!(asking.read(false).await, None);
    // Idle connections are closed now, and to hyper the other one is idle as well.
    assert_eq!(idle.read(false).await, None);
    assert!(!draining.is_finished(), "it waits for the answer");
    let answer = busy.read(false).await.expect("all of it");
    assert!(answer.body == object);
    let report = draining.await.unwrap();
    assert_eq!(report.cut, 0, "{report:?}");
}

/// The last request of a connection that repeated is hyper's, which has to be polled until it is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_request_that_has_to_wait_for_the_remote_is_answered() {
    let (mut world, object, tag) = holding(90, 3 * BLOCK).await;
    world.config.server.drain_grace = Duration::from_secs(2);
    let world = world.restart().await;
    let mut connection = Connection::armed(&world, &tag).await;
    let plain = ranged(&tag, "bytes=1-5");
    assert!(connection.repeats(&world, &plain).await);
    assert_eq!(world.purge("/m/object").await, 200);

    let data = world.replica.data;
    let _draining = tokio::spawn(world.replica.drain(true));
    loop {
        let tcp = TcpStream::connect(data).await.unwrap();
        let mut other = Connection(BufReader::new(tcp));
        let answer = other
            .ask("GET /nowhere HTTP/1.1\r\nHost: test\r\n\r\n")
            .await;
        if answer.fields.contains_key("connection") {
            break;
        }
    }
    let answer = connection.ask(&plain).await;
    assert_eq!(answer.fields["connection"], "close");
    assert!(answer.body == object[1..6], "{}", answer.status);
}

/// The next request is there before the socket has taken the answer to the last.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_under_way_is_not_cut_into() {
    let (world, object, tag) = holding(90, 16 * PART).await;
    // More than the sockets hold.
    let length = 8 * PART;
    let plain = |start: u64| ranged(&tag, &format!("bytes={start}-{}", start + length - 1));
    let mut connection = Connection::narrow(&world).await;
    connection.ask(ranged(&tag, "bytes=0-0")).await;
    connection.send(plain(1)).await;
    for start in 1..6 {
        // This answer has begun, and the request for the next comes meanwhile.
        connection.0.fill_buf().await.unwrap();
        connection.send(plain(start + 1)).await;
        let answer = connection.read(false).await.unwrap();
        assert!(
            answer.body == slice(&object, start, start + length),
            "{start}"
        );
    }
    let answer = connection.read(false).await.unwrap();
    assert!(answer.body == slice(&object, 6, 6 + length));
    assert_eq!(repeated(&world).await, 5);
}
