//! Clients that misbehave on purpose, each against a running replica, on raw sockets.
//!
//! `tests/malformed.rs` throws thousands of odd requests and asks that nothing breaks. Here every attack has its name and
//! its one right answer: requests whose end two servers may see in two places, names that point elsewhere, sets of ranges
//! that cost more than they ask for, pipelines that nobody reads, and more connections than there are places.
//! One is S3's.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rustix::process::Signal;

use support::http::{self, Answer};
use support::process;

/// A replica in front of `object` (the alphabet, a hundred times) and of `secret`.
struct World {
    s3: StrictS3,
    serving: process::Serving,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        Self::with(&[]).await
    }

    async fn with(variables: &[(&str, &str)]) -> Self {
        let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
        for (key, bytes) in [("object", alphabet()), ("secret", b"secret".to_vec())] {
            s3.put("bucket", key, bytes, PutOptions::default()).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let mut command = process::serve(&s3.endpoint(), dir.path());
        command.envs(variables.iter().copied());
        let serving = process::Serving::start(&mut command);
        s3.clear_log();
        Self {
            s3,
            serving,
            _dir: dir,
        }
    }

    fn address(&self) -> SocketAddr {
        self.serving.data
    }

    /// Whether S3 was ever asked for what only a smuggled request names.
    fn was_asked_for_the_secret(&self) -> bool {
        self.s3.log().iter().any(|entry| entry.key == "secret")
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = String::from_utf8(http::get(self.serving.admin, "/metrics", "").body);
        let metrics = metrics.unwrap();
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("no {name}"))
            .parse()
            .unwrap()
    }
}

fn alphabet() -> Vec<u8> {
    (b'a'..=b'z').cycle().take(2600).collect()
}

/// Sends `bytes` and the end of the stream; all that comes back to its end.
fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<Answer> {
    let mut stream = http::connect(address);
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut stream = BufReader::new(stream);
    let mut answers = Vec::new();
    while let Some(answer) = http::read(&mut stream, bytes.starts_with(b"HEAD ")).unwrap() {
        answers.push(answer);
    }
    answers
}

/// Requests after which a smuggled one stands, and the status that the first must get, as the last of its connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_end_is_in_doubt_is_the_last_of_its_connection() {
    const INNER: &str = "GET /m/secret HTTP/1.1\r\nHost: test\r\n\r\n";
    let world = World::start().await;
    let chunked = |fields: &str| format!("{fields}\r\n0\r\n\r\n{INNER}");
    let length = INNER.len();
    let cases = [
        // Chunked: nobody who asks for an object sends that.
        (400, chunked("Transfer-Encoding: chunked\r\n")),
        (
            400,
            chunked("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"),
        ),
        (
            400,
            chunked("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n"),
        ),
        (400, chunked("Transfer-Encoding: gzip, chunked\r\n")),
        (
            400,
            chunked("Transfer-Encoding: Chunked\r\nTransfer-Encoding: chunked\r\n"),
        ),
        (
            400,
            format!("Transfer-Encoding: chunked\r\n\r\n0;x=\n\r\n\r\n{INNER}"),
        ),
        (
            400,
            format!("Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{INNER}\r\n0\r\n\r\n"),
        ),
        // What is not quite chunked.
        (400, chunked("Transfer-Encoding: identity\r\n")),
        (400, chunked("Transfer-Encoding: xchunked\r\n")),
        (400, chunked("Transfer-Encoding: chunked, identity\r\n")),
        (400, chunked("Transfer-Encoding: \x0bchunked\r\n")),
        (400, chunked("Transfer-Encoding : chunked\r\n")),
        (400, chunked("Transfer\\-Encoding: chunked\r\n")),
        (400, chunked("X: y\r\n Transfer-Encoding: chunked\r\n")),
        (400, chunked("X: y\rTransfer-Encoding: chunked\r\n")),
        // Lengths.
        (
            400,
            format!("Content-Length: 0\r\nContent-Length: {length}\r\n\r\n{INNER}"),
        ),
        (
            200,
            format!("Content-Length: {length}\r\nContent-Length: {length}\r\n\r\n{INNER}"),
        ),
        (
            400,
            format!("Content-Length: {length}, {length}\r\n\r\n{INNER}"),
        ),
        (400, format!("Content-Length: +{length}\r\n\r\n{INNER}")),
        (400, format!("Content-Length: -1\r\n\r\n{INNER}")),
        (400, format!("Content-Length: 0x2\r\n\r\n{INNER}")),
        (400, format!("Content-Length: \r\n\r\n{INNER}")),
        (
            400,
            format!("Content-Length: 99999999999999999999999\r\n\r\n{INNER}"),
        ),
        (400, format!("Content-Length : {length}\r\n\r\n{INNER}")),
        (
            400,
            format!("Content-Length: {length}\r\n folded: 1\r\n\r\n{INNER}"),
        ),
        // Sound, and nobody reads it.
        (200, format!("Content-Length: {length}\r\n\r\n{INNER}")),
        (
            200,
            format!("Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n{INNER}"),
        ),
    ];
    for method in ["GET", "HEAD"] {
        for (status, rest) in &cases {
            let request = format!("{method} /m/object HTTP/1.1\r\nHost: test\r\n{rest}");
            let answers = exchange(world.address(), request.as_bytes());
            let [answer] = &answers[..] else {
                panic!("{} answers: {request:?} {answers:?}", answers.len());
            };
            assert_eq!(answer.status, *status, "{request:?}");
            assert_eq!(answer.field("connection"), "close", "{request:?}");
        }
    }
    assert!(!world.was_asked_for_the_secret());
}

/// RFC 9112 §9.3: who is told that the connection ends is not told that it stays as well.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_client_is_told_one_thing_of_its_connection() {
    let world = World::start().await;
    for (fields, said) in [
        ("", ""),
        ("Connection: close\r\n", ""),
        ("Connection: keep-alive\r\n", "keep-alive"),
        ("Connection: keep-alive\r\nContent-Length: 1\r\n", "close"),
        ("Content-Length: 1\r\n", "close"),
    ] {
        let request = format!("GET /m/object HTTP/1.0\r\n{fields}\r\nx");
        let mut stream = BufReader::new(http::connect(world.address()));
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let answer = http::read(&mut stream, false).unwrap().unwrap();
        assert_eq!(answer.status, 200, "{fields:?}");
        assert_eq!(answer.field("connection"), said, "{fields:?}");
        if said != "keep-alive" {
            assert!(http::read(&mut stream, false).unwrap().is_none());
        }
    }
}

/// What names the object, what names nothing, and what is refused.
#[tokio::test(flavor = "multi_thread")]
async fn every_target_has_one_meaning() {
    let world = World::start().await;
    let long = format!("/m/{}", "n".repeat(1025));
    let longer = format!("/m/{}", "n".repeat(4096));
    let endless = format!("/m/{}", "n".repeat(20_000));
    for (target, status) in [
        ("/m/object", 200),
        ("/m/%6fbject", 200),
        ("/m/object?", 200),
        ("/m/object?x=%zz#", 200),
        // The host of an absolute target is nobody to be contacted.
        ("http://elsewhere.invalid/m/object", 200),
        ("http://127.0.0.1:1/m/object", 200),
        ("ftp://user:password@elsewhere.invalid/m/object", 200),
        // Other keys than the object's.
        ("/m//object", 404),
        ("/m/object/", 404),
        ("/m/object;v=1", 404),
        ("/m/object%3f", 404),
        ("/m/object%23", 404),
        ("/m/object%20", 404),
        ("/m/x%2fobject", 404),
        ("/m/%5c..%5csecret", 404),
        ("/m/%c3%a9", 404),
        // No keys.
        ("//m/object", 404),
        ("/m%2fobject", 404),
        ("/M/object", 404),
        ("/m/", 404),
        ("/m", 404),
        ("/", 404),
        // Not to be resolved by us, and not by whoever else is on the way.
        ("/m/../m/object", 400),
        ("/m/./object", 400),
        ("/m/%2e%2e/m/object", 400),
        ("/m/%2E./m/object", 400),
        ("/m/..%2fm%2fobject", 400),
        ("/m/x%2f..%2fobject", 400),
        ("/../m/object", 400),
        // Not text.
        ("/m/object%00", 400),
        ("/m/%00/object", 400),
        ("/m/%0d%0aobject", 400),
        ("/m/%7f", 400),
        ("/m/%ff", 400),
        ("/m/%c0%ae%c0%ae/m/object", 400),
        ("/m/%e0%80%ae", 400),
        ("/m/%ed%a0%80", 400),
        ("/m/%", 400),
        ("/m/%4", 400),
        ("/m/%zz", 400),
        ("/m/%u002e", 400),
        // No key that S3 could be asked for.
        ("/m/%20", 400),
        ("/m/%C2%A0%20", 400),
        ("/m/%E2%80%A8", 400),
        // Not of this form.
        ("*", 400),
        ("elsewhere.invalid:443", 400),
        ("m/object", 400),
        ("?x", 400),
        ("", 400),
        // Too long for a key, and for a head.
        (&long, 400),
        (&longer, 400),
        (&endless, 431),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: test\r\n\r\n");
        let answers = exchange(world.address(), request.as_bytes());
        let target = &target[..target.len().min(60)];
        let [answer] = &answers[..] else {
            panic!("{} answers to {target:?}", answers.len());
        };
        assert_eq!(answer.status, status, "{target:?}");
        if status == 200 {
            assert_eq!(answer.body, alphabet(), "{target:?}");
        }
    }
    for raw in [
        &b"\xff\xfe"[..],
        b"\xc0\xae",
        b"a b",
        b"a\tb",
        b"a\0b",
        b"a\x7fb",
    ] {
        let request = [b"GET /m/", raw, b" HTTP/1.1\r\nHost: test\r\n\r\n"].concat();
        let answers = exchange(world.address(), &request);
        assert_eq!(answers.len(), 1, "{}", raw.escape_ascii());
        assert_eq!(answers[0].status, 400, "{}", raw.escape_ascii());
    }
    assert!(!world.was_asked_for_the_secret());
}

/// Other protocols, other methods, and heads that are too much.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_talked_into_another_protocol_or_a_huge_head() {
    let world = World::start().await;
    let upgrade = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    let fields = |count: usize| "X: y\r\n".repeat(count);
    let get = |fields: &str| format!("GET /m/object HTTP/1.1\r\nHost: test\r\n{fields}\r\n");
    for (request, status) in [
        (get(&format!("{upgrade}Upgrade: h2c\r\n")), 200),
        (get("Connection: Upgrade\r\nUpgrade: websocket\r\n"), 200),
        (get("Expect: 100-continue\r\n"), 200),
        ("OPTIONS * HTTP/1.1\r\nHost: test\r\n\r\n".to_owned(), 405),
        (
            "CONNECT elsewhere.invalid:443 HTTP/1.1\r\nHost: test\r\n\r\n".to_owned(),
            405,
        ),
        (
            "TRACE /m/object HTTP/1.1\r\nHost: test\r\n\r\n".to_owned(),
            405,
        ),
        (
            "GET /m/object HTTP/1.1 \r\nHost: test\r\n\r\n".to_owned(),
            400,
        ),
        ("GET /m/object\r\n\r\n".to_owned(), 400),
        (get(&fields(98)), 200),
        (get(&fields(200)), 431),
        (get(&format!("X: {}\r\n", "y".repeat(15_000))), 200),
        (get(&format!("X: {}\r\n", "y".repeat(17_000))), 431),
        (get(&format!("X: {}\r\n", "y".repeat(1 << 20))), 431),
    ] {
        let mut stream = http::connect(world.address());
        stream.write_all(request.as_bytes()).unwrap();
        let answer = http::read(&mut BufReader::new(stream), false);
        let shown = &request[..request.len().min(200)];
        assert_eq!(answer.unwrap().unwrap().status, status, "{shown:?}");
    }
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let answers = exchange(world.address(), preface);
    assert!(
        answers.iter().all(|answer| answer.status == 400),
        "{answers:?}"
    );
}

/// What many ranges cost is bounded, in the answer and in what is read for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_of_ranges_is_worth_no_more_than_the_object() {
    let world = World::start().await;
    let get = |ranges: &str| {
        http::get(
            world.address(),
            "/m/object",
            &format!("Range: bytes={ranges}\r\n"),
        )
    };
    let every_other = |count: usize| {
        let ranges: Vec<_> = (0..count).map(|n| format!("{0}-{0}", 2 * n)).collect();
        ranges.join(",")
    };
    let answer = get(&every_other(64));
    assert_eq!(answer.status, 206);
    assert!(answer.body.len() < 64 * 200, "{}", answer.body.len());
    for too_many in [65, 256, 1000] {
        assert_eq!(get(&every_other(too_many)).status, 416, "{too_many}");
    }
    // As many as a head holds, all over each other: together they are the object once, or too many to look at.
    let all = vec!["0-"; 200].join(",");
    let answer = get(&all);
    assert_eq!((answer.status, answer.body.len()), (206, 2600));
    assert_eq!(get(&vec!["0-"; 3000].join(",")).status, 416);
    let shifted: Vec<_> = (0..200).map(|n| format!("{n}-{}", 2400 + n)).collect();
    let answer = get(&shifted.join(","));
    assert_eq!((answer.status, answer.body.len()), (206, 2600));
    assert_eq!(answer.field("content-range"), "bytes 0-2599/2600");
}

/// Pipelined requests whose answers nobody reads are not worked ahead.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_nobody_reads_costs_no_memory() {
    const REQUESTS: usize = 20_000;
    let world = World::start().await;
    let address = world.address();
    assert_eq!(http::get(address, "/m/object", "").status, 200);
    let before = world.serving.process.resident();
    let mut stream = http::connect(address);
    let mut sender = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let some = "HEAD /m/object HTTP/1.1\r\nHost: test\r\n\r\n".repeat(100);
        for _ in 0..REQUESTS / 100 {
            sender.write_all(some.as_bytes()).unwrap();
        }
    });
    // Until it works on none of them any more, because its answers go nowhere.
    let mut answered = 0;
    let stuck = loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = world.metric("pinrange_request_duration_seconds_count{tier=\"disk\"}");
        if now == answered {
            break now;
        }
        answered = now;
    };
    assert!(
        stuck < REQUESTS as u64,
        "the sockets take all: nothing was tried"
    );
    // An answer's head is some 500 bytes: all of them would be 10 MB.
    let grown = world.serving.process.resident().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes for {stuck} unread answers");
    // Others are served meanwhile.
    assert_eq!(http::get(address, "/m/object", "").status, 200);

    let mut reader = BufReader::new(&mut stream);
    for number in 0..REQUESTS {
        let answer = http::read(&mut reader, true).unwrap();
        assert_eq!(answer.unwrap().status, 200, "answer {number}");
    }
    sender.join().unwrap();
}

/// More connections than places: silent ones give way, the admin listener never notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_silent_connections_keeps_nobody_out() {
    let world = World::with(&[("PINRANGE_SERVER__MAX_CONNECTIONS", "8")]).await;
    let flood: Vec<TcpStream> = (0..60).map(|_| http::connect(world.address())).collect();
    let began = Instant::now();
    let answer = http::get(world.address(), "/m/object", "");
    assert_eq!(answer.body, alphabet());
    let waited = began.elapsed();
    assert!(world.metric("pinrange_connections_displaced_total") > 0);
    assert!(world.metric("pinrange_connections") <= 8);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(http::get(world.serving.admin, path, "").status, 200);
    }
    // Not by luck: those that went were told so, and it was before their timeout of 75 s.
    let closed = flood.iter().filter(|stream| {
        stream.set_nonblocking(true).unwrap();
        matches!((&mut &**stream).read(&mut [0]), Ok(0))
    });
    assert!(closed.count() > 0);
    assert!(waited < Duration::from_mins(1), "{waited:?}");
}

/// The limits on a client's time, from the configuration to the socket.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_ask_or_does_not_finish_asking_is_closed() {
    let world = World::with(&[
        ("PINRANGE_SERVER__HEADER_TIMEOUT", "1s"),
        ("PINRANGE_SERVER__IDLE_TIMEOUT", "1s"),
    ])
    .await;
    let silent = http::connect(world.address());
    let mut half = http::connect(world.address());
    half.write_all(b"GET /m/object HTTP/1.1\r\nHo").unwrap();
    let mut asked = http::connect(world.address());
    asked
        .write_all(b"HEAD /m/object HTTP/1.1\r\nHost: test\r\n\r\n")
        .unwrap();
    assert!(
        http::read(&mut BufReader::new(&asked), true)
            .unwrap()
            .is_some()
    );
    for mut stream in [silent, half, asked] {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "{}", rest.escape_ascii());
    }
}

/// Half a head behind a whole one has reached us with that: it is not waited for as long as one that has not begun.
#[tokio::test(flavor = "multi_thread")]
async fn who_begins_a_head_behind_another_has_to_finish_it_too() {
    let world = World::with(&[
        ("PINRANGE_SERVER__HEADER_TIMEOUT", "1s"),
        ("PINRANGE_SERVER__IDLE_TIMEOUT", "1h"),
    ])
    .await;
    let whole = "HEAD /m/object HTTP/1.1\r\nHost: test\r\n\r\n";
    for wholes in [1, 3] {
        let mut stream = BufReader::new(http::connect(world.address()));
        let some = format!("{}GET /m/obj", whole.repeat(wholes));
        stream.get_mut().write_all(some.as_bytes()).unwrap();
        for _ in 0..wholes {
            let answer = http::read(&mut stream, true).unwrap();
            assert_eq!(answer.unwrap().status, 200);
        }
        // An end, and not the error that too long a wait for it is.
        let end = http::read(&mut stream, false).unwrap();
        assert!(end.is_none(), "{end:?}");
    }
}

/// S3 gives one `ETag` to two objects: an answer that says whose fault it is, and for each a line that says what it did.
#[tokio::test(flavor = "multi_thread")]
async fn an_s3_that_gives_one_tag_to_two_objects_is_told_of() {
    let mut world = World::with(&[("PINRANGE_MOUNT__0__FRESH_FOR", "0s")]).await;
    let answer = http::get(world.address(), "/m/object", "");
    assert_eq!(answer.body, alphabet());
    let options = PutOptions {
        etag: Some(answer.field("etag").to_owned()),
        ..PutOptions::default()
    };
    world
        .s3
        .put("bucket", "object", "another", options)
        .unwrap();
    for range in ["", "Range: bytes=2000-\r\n"] {
        let answer = http::get(world.address(), "/m/object", range);
        assert_eq!(answer.status, 502);
        assert_eq!(answer.field("content-type"), "application/problem+json");
    }
    world.serving.process.signal(Signal::TERM);
    world.serving.process.wait();
    let log = world.serving.process.stderr();
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("has 7 bytes, and said 2600 before"))
        .collect();
    assert_eq!(told.len(), 2, "{log}");
    let all = |what: &str| told.iter().all(|line| line.contains(what));
    assert!(all("path=\"/m/object\"") && all("purge the key"), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// Places that are taken again and again are no reason for a line each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_comes_and_goes_is_told_of_once() {
    let mut world = World::with(&[("PINRANGE_SERVER__MAX_CONNECTIONS", "1")]).await;
    let ask = || {
        let mut stream = BufReader::new(http::connect(world.address()));
        let request = b"HEAD /m/object HTTP/1.1\r\nHost: test\r\n\r\n";
        stream.get_mut().write_all(request).unwrap();
        let answer = http::read(&mut stream, true).unwrap();
        assert_eq!(answer.unwrap().status, 200);
        stream
    };
    for _ in 0..2 {
        // The second has to wait until the first is taken for idle; the first of the next time has not.
        let first = ask();
        let second = ask();
        drop(first);
        let mut second = second.into_inner();
        second.shutdown(Shutdown::Write).unwrap();
        second.read_to_end(&mut Vec::new()).unwrap();
    }
    world.serving.process.signal(Signal::TERM);
    world.serving.process.wait();
    let log = world.serving.process.stderr();
    assert_eq!(log.matches("all connections are taken").count(), 1, "{log}");
    assert!(log.contains("limit=1 waited=1"), "{log}");
}
