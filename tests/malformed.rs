//! Two thousand requests that nobody should send, on raw sockets.
//!
//! Each is made from a seed that a failure names, and is followed by the end of the client's stream. Whatever comes
//! back has to be whole HTTP answers and then the end, soon, and none of them 5xx; what is labelled with the object's
//! ETag has to be the object. A case whose first request has sound framing is followed by a good request on the same
//! connection: either its answer is the second one and right, or the connection was closed before it; never is a part of
//! the first taken for a request (request smuggling). And nobody ever asks S3 for a key outside the mount (P12).
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::fmt::Write as _;
use std::io::{self, BufReader, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Options, PutOptions, StrictS3};

use support::http::{self, Answer, Random};
use support::process;

const CASES: u64 = 2000;
const SIZE: usize = 20_000;

/// What all cases are about.
struct World {
    replica: SocketAddr,
    object: Vec<u8>,
    etag: String,
    answered: AtomicUsize,
    followed: AtomicUsize,
}

struct Case {
    bytes: Vec<u8>,
    /// Whether the first request is a HEAD, whose answer has no body.
    head: bool,
    /// The framing is sound and a good request stands behind it.
    followed: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_a_stranger_sends_hurts() {
    let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
    let mut random = Random(7);
    let object = random.bytes(SIZE);
    let put = |key: &str, bytes: Vec<u8>| {
        let put = s3.put("bucket", key, bytes, PutOptions::default());
        put.unwrap().etag
    };
    let etag = put("inside/object", object.clone());
    put("object", random.bytes(100));
    put("secret", random.bytes(100));
    let dir = tempfile::tempdir().unwrap();
    let mut command = process::serve(&s3.endpoint(), dir.path());
    command
        .env("PINRANGE_MOUNT__0__PREFIX", "inside/")
        // A head is judged by what has come when the client's stream ends, not by the time.
        .env("PINRANGE_LOG", "warn");
    let mut serving = process::Serving::start(&mut command);
    s3.clear_log();

    let world = World {
        replica: serving.data,
        object,
        etag,
        answered: AtomicUsize::new(0),
        followed: AtomicUsize::new(0),
    };
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed) as u64;
                    if seed >= CASES {
                        break;
                    }
                    check(&world, seed);
                }
            });
        }
    });

    assert!(!serving.process.has_ended());
    good(&world, &http::get(world.replica, "/m/object", &pin(&world)));
    let log = serving.process.stderr();
    assert!(!log.contains("panicked"), "{log}");
    for entry in s3.log() {
        assert_eq!(entry.bucket, "bucket", "{entry:?}");
        let inside = entry.key.strip_prefix("inside/");
        let inside = inside.unwrap_or_else(|| panic!("outside the mount: {entry:?}"));
        let dots = inside.split('/').any(|part| part == "." || part == "..");
        assert!(!dots, "{entry:?}");
    }
    // The cases are worth something only if most are understood.
    let answered = world.answered.into_inner();
    let followed = world.followed.into_inner();
    assert!(answered > 1000, "only {answered} answers");
    assert!(followed > 300, "only {followed} followed on");
    // Nothing is left of them: the one connection is this question's own, to the other listener.
    // A connection that was closed on the last answer may take the server a moment to notice.
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        let metrics = String::from_utf8(http::get(serving.admin, "/metrics", "").body).unwrap();
        let gauges = ["pinrange_open_responses 0\n", "pinrange_fills 0\n"];
        if gauges.iter().all(|gauge| metrics.contains(gauge)) {
            break;
        }
        assert!(Instant::now() < patience, "not {gauges:?}: {metrics}");
    }
    assert_eq!(serving.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_one_host() {
    let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
    let put = s3.put("bucket", "object", vec![7; 9], PutOptions::default());
    put.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let serving = process::replica(&s3, dir.path());
    for (request, status) in [
        ("GET /m/object HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        ("GET /m/object HTTP/1.1\r\nHost:\r\n\r\n", 200),
        ("GET /m/object HTTP/1.1\r\n\r\n", 400),
        ("GET /m/object HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        ("GET /m/object HTTP/1.0\r\n\r\n", 200),
        ("GET /m/object HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    ] {
        let answer = http::ask(serving.data, request);
        assert_eq!(answer.status, status, "{request:?}");
    }
    for (host, status) in [
        (&b"a.example:8080"[..], 200),
        (b"127.0.0.1:", 200),
        (b"[::1]:8080", 200),
        (b"[fe80::1%25eth0]", 200),
        (b"x_y~z!$&'()*+,;=%20", 200),
        (b"a b", 400),
        (b"user@a", 400),
        (b"a/b@c", 400),
        (b"a/b", 400),
        (b"a?b", 400),
        (b"http://a", 400),
        (b"a:b", 400),
        (b"x:y:z", 400),
        (b"a:1:2", 400),
        (b"::1", 400),
        (b"[::1", 400),
        (b"::1]", 400),
        (b"[]", 400),
        (b"[[::1]]", 400),
        (b"[::1]x", 400),
        (b"[::1/64]", 400),
        (b"x\x80", 400),
        (b"x\\y", 400),
    ] {
        for version in ["1.0", "1.1"] {
            let mut request = format!("GET /m/object HTTP/{version}\r\nHost: ").into_bytes();
            request.extend_from_slice(host);
            request.extend_from_slice(b"\r\n\r\n");
            let answer = http::ask(serving.data, &request);
            assert_eq!(answer.status, status, "{}", request.escape_ascii());
        }
    }
}

fn pin(world: &World) -> String {
    format!("If-Match: {}\r\nRange: bytes=100-163\r\n", world.etag)
}

fn good(world: &World, answer: &Answer) {
    assert_eq!(answer.status, 206, "{answer:?}");
    assert_eq!(answer.body, world.object[100..164]);
}

fn check(world: &World, seed: u64) {
    let case = case(world, &mut Random(seed));
    // Long names and fields are dull.
    let shown: Vec<_> = case.bytes.chunk_by(|a, b| a == b).collect();
    let shown: Vec<u8> = shown
        .iter()
        .flat_map(|run| run.iter().take(3))
        .copied()
        .collect();
    let shown = shown.escape_ascii();
    let answers = exchange(world.replica, &case)
        .unwrap_or_else(|error| panic!("seed {seed}: {error}\n{shown}"));
    world.answered.fetch_add(answers.len(), Ordering::Relaxed);
    for answer in &answers {
        let status = answer.status;
        assert!(
            status < 500,
            "seed {seed}: {status} {:?}\n{shown}",
            answer.fields
        );
        if status == 200 && !answer.body.is_empty() {
            assert!(
                answer.body == world.object,
                "seed {seed}: other bytes\n{shown}"
            );
        }
        let range = answer.field("content-range");
        if status == 206 && !range.is_empty() {
            let right = slice(&world.object, range);
            assert!(
                Some(&answer.body[..]) == right,
                "seed {seed}: other bytes\n{shown}"
            );
        }
    }
    if case.followed {
        match &answers[..] {
            [_, last] => {
                good(world, last);
                world.followed.fetch_add(1, Ordering::Relaxed);
            }
            [only] => assert_eq!(
                only.field("connection"),
                "close",
                "seed {seed}: closed without a word: {only:?}\n{shown}"
            ),
            answers => panic!("seed {seed}: {} answers\n{shown}", answers.len()),
        }
    }
}

/// What a `Content-Range` names.
fn slice<'a>(object: &'a [u8], range: &str) -> Option<&'a [u8]> {
    let (range, size) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let whole: usize = size.parse().ok()?;
    (whole == object.len()).then_some(())?;
    object.get(first.parse().ok()?..=last.parse().ok()?)
}

/// Everything that comes back until the end of the stream.
fn exchange(address: SocketAddr, case: &Case) -> io::Result<Vec<Answer>> {
    let mut stream = http::connect(address);
    // It may have been answered and closed before all was sent.
    let sent = stream
        .write_all(&case.bytes)
        .and_then(|()| stream.shutdown(Shutdown::Write));
    let mut stream = BufReader::new(stream);
    let mut answers = Vec::new();
    let mut head = case.head;
    loop {
        match http::read(&mut stream, head) {
            Ok(Some(answer)) => answers.push(answer),
            Ok(None) => return Ok(answers),
            // What the kernel makes of a close while bytes of ours are unread.
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionReset
                    || (sent.is_err() && error.kind() == io::ErrorKind::UnexpectedEof) =>
            {
                return Ok(answers);
            }
            Err(error) => return Err(error),
        }
        head = false;
    }
}

fn case(world: &World, random: &mut Random) -> Case {
    match random.below(8) {
        0 => Case {
            bytes: garbage(random),
            head: false,
            followed: false,
        },
        1 => truncated(world, random),
        2 => smuggling(random),
        _ => {
            let (mut bytes, head, sound) = odd_request(world, random);
            let followed = sound && random.below(4) > 0;
            if followed {
                let good = format!(
                    "GET /m/object HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{}\r\n",
                    pin(world)
                );
                bytes.extend_from_slice(good.as_bytes());
            }
            Case {
                bytes,
                head,
                followed,
            }
        }
    }
}

fn garbage(random: &mut Random) -> Vec<u8> {
    let len = random.below(3000) + 1;
    match random.below(6) {
        0 => b"GET /m/object\r\n\r\n".to_vec(),
        1 => b"GET /m/object HTTP/2.0\r\n\r\n".to_vec(),
        2 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        // The head of a TLS handshake.
        3 => [
            &b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"[..],
            &random.bytes(len),
        ]
        .concat(),
        4 => vec![*random.one_of(b"\r\n \0GH:"); len],
        _ => random.bytes(len),
    }
}

fn truncated(world: &World, random: &mut Random) -> Case {
    let (mut bytes, head, _) = odd_request(world, random);
    bytes.truncate(random.below(bytes.len()));
    Case {
        bytes,
        head,
        followed: false,
    }
}

/// Requests whose framing two servers may read differently, around one that must never be taken for a request.
fn smuggling(random: &mut Random) -> Case {
    let inner = "GET /m/secret HTTP/1.1\r\nHost: test\r\n\r\n";
    let length = inner.len();
    let framing = match random.below(12) {
        0 => format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"),
        1 => format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
        2 => format!("Content-Length: {length}\r\nContent-Length: 0\r\n"),
        3 => format!("Content-Length: 0, {length}\r\n"),
        4 => format!("Content-Length: +{length}\r\n"),
        5 => "Content-Length: -1\r\n".to_owned(),
        6 => "Content-Length: 99999999999999999999999\r\n".to_owned(),
        7 => "Transfer-Encoding: chunked, identity\r\n".to_owned(),
        8 => "Transfer-Encoding: \x0bchunked\r\n".to_owned(),
        9 => "Transfer-Encoding: xchunked\r\n".to_owned(),
        10 => "Transfer-Encoding : chunked\r\n".to_owned(),
        _ => format!("Content-Length: {length}\r\n Transfer-Encoding: chunked\r\n"),
    };
    let method = *random.one_of(&["GET", "POST", "PUT"]);
    let body = match random.below(3) {
        0 => inner.to_owned(),
        1 => format!("0\r\n\r\n{inner}"),
        _ => format!("{length:x}\r\n{inner}\r\n0\r\n\r\n"),
    };
    Case {
        bytes: format!("{method} /m/object HTTP/1.1\r\nHost: test\r\n{framing}\r\n{body}")
            .into_bytes(),
        head: false,
        followed: false,
    }
}

/// A request that is wrong in some way, whether it is a HEAD, and whether its framing leaves no doubt where it ends
/// and says nothing against another one behind it.
fn odd_request(world: &World, random: &mut Random) -> (Vec<u8>, bool, bool) {
    let mut sound = true;
    let method = match random.below(8) {
        0 => {
            let odd = [
                "POST",
                "PUT",
                "DELETE",
                "OPTIONS",
                "TRACE",
                "PATCH",
                "PROPFIND",
                "get",
                "G",
                "!#$%",
                "GETGETGETGETGETGETGETGETGETGETGETGETGET",
            ];
            (*random.one_of(&odd)).to_owned()
        }
        1 => "HEAD".to_owned(),
        2 if random.below(2) == 0 => {
            sound = false;
            (*random.one_of(&["", "GE T", "CONNECT", "G\u{e9}T", "GET\t"])).to_owned()
        }
        _ => "GET".to_owned(),
    };
    let (target, target_is_sound) = target(random);
    sound &= target_is_sound;
    let version = match random.below(12) {
        0 => {
            sound = false;
            *random.one_of(&["HTTP/1.0", "HTTP/0.9", "HTTP/1.2", "HTTP/3", "http/1.1", ""])
        }
        _ => "HTTP/1.1",
    };
    let mut head = Vec::new();
    write!(head, "{method} ").unwrap();
    head.extend_from_slice(&target);
    write!(head, " {version}\r\nHost: test\r\n").unwrap();
    for _ in 0..random.below(4) {
        let (field, field_is_sound) = field(world, random);
        sound &= field_is_sound;
        head.extend_from_slice(&field);
        head.extend_from_slice(b"\r\n");
    }
    match random.below(8) {
        0 => {
            let body = random.below(200);
            write!(head, "Content-Length: {body}\r\n\r\n").unwrap();
            // Whatever it holds, it is no request.
            let inner = b"GET /m/secret HTTP/1.1\r\nHost: test\r\n\r\n";
            head.extend(inner.iter().cycle().take(body));
        }
        1 => head.extend_from_slice(
            b"Transfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n3;x=y\r\nabc\r\n0\r\nTrailer: x\r\n\r\n",
        ),
        2 => head.extend_from_slice(b"Expect: 100-continue\r\n\r\n"),
        _ => head.extend_from_slice(b"\r\n"),
    }
    (head, method == "HEAD", sound)
}

fn target(random: &mut Random) -> (Vec<u8>, bool) {
    let sound = |text: &str| (text.as_bytes().to_vec(), true);
    match random.below(12) {
        0 => {
            // Each a part of what names no object here, or the object in an odd way.
            let parts = [
                "m",
                "object",
                "secret",
                "..",
                ".",
                "%2e%2e",
                "%2E.",
                "%2f",
                "%2F..%2f",
                "%00",
                "%",
                "%4",
                "%zz",
                "",
                "%5c..",
                "%0d%0a",
                "%ff%fe",
                "%c0%ae%c0%ae",
                "%e2%80%ae",
                ";x=1",
                "~",
                "a%20b",
                "+",
                ":",
                "@",
                "inside",
                "%2e%2e%2fobject",
            ];
            let mut path = String::new();
            for _ in 0..=random.below(7) {
                write!(path, "/{}", random.one_of(&parts)).unwrap();
            }
            sound(&path)
        }
        1 => sound(random.one_of::<&str>(&[
            "/m/../secret",
            "/m/%2e%2e/secret",
            "/m/%2e%2e%2fsecret",
            "/m/..%2fsecret",
            "/m%2fobject",
            "/m//object",
            "//m/object",
            "/m/",
            "/m",
            "/",
            "/.pinrange-probe",
        ])),
        // Longer than S3's keys are; longer than a URI may be.
        2 => sound(&format!("/m/{}", "n".repeat(1000 + random.below(4000)))),
        3 => sound(&format!("/m/{}", "%41".repeat(300 + random.below(1000)))),
        4 => sound(random.one_of::<&str>(&[
            "http://test/m/object",
            "http://127.0.0.1:1/m/object",
            "https://user:password@elsewhere.invalid/m/object",
            "http://elsewhere.invalid",
            "ftp://elsewhere.invalid/m/object",
        ])),
        5 => {
            let odd = [
                "*",
                "elsewhere.invalid:443",
                "m/object",
                "http://",
                "/m/o#f",
                "?x",
                "http:///m/object",
            ];
            (random.one_of(&odd).as_bytes().to_vec(), false)
        }
        6 => {
            // Not UTF-8, control characters, spaces: some the parser lets through.
            let mut path = b"/m/".to_vec();
            for _ in 0..=random.below(20) {
                path.push(*random.one_of(b"\xff\xfe\x80\xc3\x28\x01\x7f \"<>\\^`{|}object"));
            }
            (path, false)
        }
        7 => sound(random.one_of::<&str>(&[
            "/m/object?versionId=1",
            "/m/object?X-Amz-Signature=%00",
            "/m/object?%76ersionId=1",
            "/m/object?&&==&%",
            "/m/object?partNumber",
            "/m/object?a=b?c=d",
        ])),
        _ => sound("/m/object"),
    }
}

const ODD_RANGES: [&str; 24] = [
    "bytes=",
    "bytes",
    "bytes=-",
    "bytes=--1",
    "bytes=5-2",
    "bytes=a-b",
    "bytes=0-0,",
    "bytes= 0 - 5",
    "bytes=0x0-0x5",
    "bytes=18446744073709551615-",
    "bytes=-18446744073709551616",
    "bytes=0-99999999999999999999999",
    "bytes=-0",
    "bytes=20000-",
    "lines=1-2",
    "bytes=0-1;q=1",
    "=0-1",
    "BYTES=0-9",
    "bytes=1-2-3",
    "bytes=+1-5",
    "bytes=19999-19999",
    "bytes=-1",
    "none",
    "bytes=\t0-5",
];

const ODD_TAGS: [&str; 18] = [
    "\"",
    "\"\"",
    "W/\"x\"",
    "w/\"x\"",
    "W/",
    "*, \"x\"",
    "\"a\" \"b\"",
    "\"a\",,\"b\"",
    "",
    ",",
    "'x'",
    "\"x",
    "x\"",
    "**",
    "\"\\\"\"",
    "\"a b\"",
    "abc",
    "*",
];

fn field(world: &World, random: &mut Random) -> (Vec<u8>, bool) {
    let text = match random.below(11) {
        0 => format!("Range: {}", random.one_of(&ODD_RANGES)),
        1 => {
            let many: Vec<_> = (0..random.below(200))
                .map(|_| format!("{}-{}", random.below(30_000), random.below(30_000)))
                .collect();
            format!("Range: bytes={}", many.join(","))
        }
        2 => format!("If-Match: {}", random.one_of(&ODD_TAGS)),
        3 => format!("If-Match: {}", world.etag),
        4 => format!("If-None-Match: {}", random.one_of(&ODD_TAGS)),
        5 => format!("If-Range: {}", random.one_of(&ODD_TAGS)),
        6 => format!(
            "{}: {}",
            random.one_of(&["If-Modified-Since", "If-Unmodified-Since", "If-Range"]),
            random.one_of(&[
                "yesterday",
                "0",
                "-1",
                "Thu, 01 Jan 1970 00:00:00 GMT",
                "Mon, 99 Foo 9999 99:99:99 GMT",
                "Fri, 31 Dec 9999 23:59:59 GMT",
                "Sun Nov  6 08:49:37 1994",
                ""
            ])
        ),
        7 => {
            let times = random.below(120);
            let mut many = String::from("X-Many: 0");
            for index in 0..times {
                write!(many, "\r\nX-Many: {index}").unwrap();
            }
            // More fields than hyper takes are refused with 431.
            return (many.into_bytes(), times < 60);
        }
        8 => {
            let huge = format!("X-Huge: {}", "h".repeat(random.below(60_000)));
            let sound = huge.len() < 8000;
            return (huge.into_bytes(), sound);
        }
        9 => {
            let odd: [&[u8]; 8] = [
                b"No-Colon",
                b": no name",
                b"X Space: 1",
                b"X-Ctl: \x01",
                b"X-Nul: \0",
                b"X-High: \xff\xfe",
                b" folded",
                b"X-Bare: a\nX-More: b",
            ];
            return (random.one_of(&odd).to_vec(), false);
        }
        _ => (*random.one_of(&[
            "X-Request-Id: <script>",
            "traceparent: 00-zz-zz-00",
            "Cache-Control: no-cache, no-store, \u{ff}",
            "Cache-Control: max-age=99999999999999999999",
            "Host: other",
            "Accept-Encoding: gzip;q=nan",
            "TE: trailers",
            "Upgrade: websocket",
            "Upgrade: h2c",
        ]))
        .to_owned(),
    };
    (text.into_bytes(), true)
}
