//! Other people's clients against the built program in front of a strict S3.
//!
//! curl, aria2, wget2 and Python's libraries do what the README says of them: whole files byte for byte, ranges,
//! conditions, resumption, and a clean refusal where the pinned revision is gone.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rustix::process::Signal;
use tempfile::TempDir;

use support::http::{self, Random};
use support::process::{self, Running, Serving, run};

const SIZE: usize = 24 << 20;

struct World {
    s3: StrictS3,
    replica: Serving,
    object: Vec<u8>,
    etag: String,
    dir: TempDir,
}

impl World {
    async fn new() -> Self {
        let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
        let object = Random(11).bytes(SIZE);
        let dir = tempfile::tempdir().unwrap();
        let replica = process::replica(&s3, dir.path());
        let mut world = Self {
            s3,
            replica,
            object,
            etag: String::new(),
            dir,
        };
        world.etag = world.put(&world.object);
        world
    }

    fn put(&self, bytes: &[u8]) -> String {
        let options = PutOptions::default();
        let put = self.s3.put("bucket", "object", bytes.to_vec(), options);
        put.unwrap().etag
    }

    /// Another revision of the same length, and nothing held of the first.
    fn replace(&self) {
        self.put(&Random(12).bytes(SIZE));
        let purge = http::ask(
            self.replica.admin,
            "POST /purge HTTP/1.1\r\nHost: test\r\nContent-Length: 20\r\n\r\n{\"path\":\"/m/object\"}",
        );
        assert_eq!(purge.status, 200, "{purge:?}");
    }

    fn url(&self) -> String {
        self.replica.url("/m/object")
    }

    fn if_match(&self) -> String {
        format!("If-Match: {}", self.etag)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    fn assert_whole(&self, file: &Path) {
        assert!(
            fs::read(file).unwrap() == self.object,
            "{} is not the object",
            file.display()
        );
    }
}

/// A program with its arguments so far, and how it ends.
struct Client(PathBuf);

impl Client {
    /// Standard output; the program has to end with `code`.
    #[track_caller]
    fn run(&self, code: i32, dir: &Path, args: &[&str]) -> Vec<u8> {
        let output = run(Command::new(&self.0).args(args).current_dir(dir));
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {} {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_downloads_ranges_and_resumes() {
    let Some(curl) = process::find("curl").map(Client) else {
        return;
    };
    let world = World::new().await;
    let (dir, url, pin) = (world.dir.path(), world.url(), world.if_match());
    let curl = |code, args: &[&str]| curl.run(code, dir, &[&["-sS", "-f"], args, &[&url]].concat());

    curl(0, &["-o", "whole"]);
    world.assert_whole(&world.file("whole"));
    for (range, start, end) in [
        ("0-0", 0, 1),
        ("1000000-1999999", 1_000_000, 2_000_000),
        ("-5", SIZE - 5, SIZE),
        ("25165823-", SIZE - 1, SIZE),
    ] {
        let body = curl(0, &["-H", &pin, "-r", range]);
        assert!(body == world.object[start..end], "{range}");
    }
    curl(22, &["-r", "25165824-"]); // 416

    let head = String::from_utf8(curl(0, &["-I"])).unwrap();
    for line in [
        "HTTP/1.1 200 OK",
        "accept-ranges: bytes",
        &format!("etag: {}", world.etag),
        "content-length: 25165824",
    ] {
        assert!(head.lines().any(|there| there == line), "no {line}: {head}");
    }

    let several = curl(0, &["-D", "several", "-r", "0-9,100-109,24000000-24000009"]);
    let head = fs::read_to_string(world.file("several")).unwrap();
    let boundary = head
        .split("boundary=")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap();
    let mut rest = &several[..];
    for start in [0, 100, 24_000_000] {
        let part = format!(
            "--{boundary}\r\nContent-Type: binary/octet-stream\r\nContent-Range: bytes {start}-{}/{SIZE}\r\n\r\n",
            start + 9
        );
        rest = rest.strip_prefix(part.as_bytes()).unwrap();
        rest = rest.strip_prefix(&world.object[start..start + 10]).unwrap();
        rest = rest.strip_prefix(b"\r\n").unwrap();
    }
    assert_eq!(rest, format!("--{boundary}--\r\n").as_bytes());

    fs::write(world.file("part"), &world.object[..10_000_000]).unwrap();
    curl(0, &["-C", "-", "-o", "part", "-H", &pin]);
    world.assert_whole(&world.file("part"));
    // What is complete stays as it is: 416 says that there is no more.
    curl(22, &["-C", "-", "-o", "part", "-H", &pin]);
    world.assert_whole(&world.file("part"));

    world.replace();
    fs::write(world.file("part"), &world.object[..10_000_000]).unwrap();
    curl(22, &["-C", "-", "-o", "part", "-H", &pin]); // 412
    let part = fs::read(world.file("part")).unwrap();
    assert!(part == world.object[..10_000_000], "it was added to");
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_asks_on_conditions() {
    let Some(curl) = process::find("curl").map(Client) else {
        return;
    };
    let world = World::new().await;
    let (dir, url) = (world.dir.path(), world.url());
    let status = |args: &[&str]| {
        let all = [
            &["-sS", "-o", "out", "-w", "%{http_code} %{size_download}"],
            args,
            &[&url],
        ];
        String::from_utf8(curl.run(0, dir, &all.concat())).unwrap()
    };
    let whole = format!("200 {SIZE}");
    assert_eq!(status(&["--etag-save", "etag"]), whole);
    world.assert_whole(&world.file("out"));
    assert_eq!(status(&["--etag-compare", "etag"]), "304 0");
    assert_eq!(status(&["-z", "Fri, 01 Jan 2100 00:00:00 GMT"]), "304 0");
    assert_eq!(status(&["-z", "Mon, 01 Jan 2001 00:00:00 GMT"]), whole);
    assert_eq!(
        status(&["-z", "-Mon, 01 Jan 2001 00:00:00 GMT"])
            .split(' ')
            .next(),
        Some("412")
    );
    // Two requests on one connection, the second of them behind an answer without a body.
    let two = [
        "-H",
        &world.if_match(),
        "--etag-compare",
        "etag",
        &url,
        "-o",
        "out",
    ];
    assert_eq!(status(&two), "304 0304 0");
    world.replace();
    assert_eq!(status(&["--etag-compare", "etag"]), whole);
    assert_eq!(
        status(&["-H", &world.if_match()]).split(' ').next(),
        Some("412")
    );
}

const ARIA2: [&str; 8] = [
    "-x16",
    "-s16",
    "-k1M",
    "--no-conf",
    "--file-allocation=none",
    "--max-tries=2",
    "--retry-wait=0",
    "--allow-overwrite=true",
];

#[tokio::test(flavor = "multi_thread")]
async fn aria2_in_16_pinned_parts() {
    let Some(aria2) = process::find("aria2c").map(Client) else {
        return;
    };
    let world = World::new().await;
    let header = format!("--header={}", world.if_match());
    let (dir, url) = (world.dir.path(), world.url());
    world.s3.clear_log();
    aria2.run(
        0,
        dir,
        &[&ARIA2[..], &["-o", "whole", &header, &url]].concat(),
    );
    world.assert_whole(&world.file("whole"));
    let stats = world.s3.stats();
    assert_eq!(
        (stats.unguarded_gets, stats.body_bytes_sent),
        (0, SIZE as u64)
    );

    // Held, it does not matter what S3 has now; then it is not held any more.
    world.put(b"another");
    aria2.run(
        0,
        dir,
        &[&ARIA2[..], &["-o", "held", &header, &url]].concat(),
    );
    world.assert_whole(&world.file("held"));
    world.replace();
    let refused = run(Command::new(&aria2.0)
        .args(ARIA2)
        .args(["-o", "refused", &header, &url])
        .current_dir(dir));
    assert_ne!(refused.status.code(), Some(0));
    let left = fs::metadata(world.file("refused")).map_or(0, |file| file.len());
    assert_eq!(left, 0, "not a byte of another revision");
}

/// Interrupted in the middle, aria2 goes on where it was, with the same pin.
#[tokio::test(flavor = "multi_thread")]
async fn aria2_resumes() {
    let Some(aria2) = process::find("aria2c") else {
        return;
    };
    let world = World::new().await;
    let header = format!("--header={}", world.if_match());
    let url = world.url();
    let start = || {
        let mut command = Command::new(&aria2);
        command
            .args(ARIA2)
            .args(["-c", "-o", "resumed", &header, &url])
            .current_dir(world.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Running::start(&mut command)
    };
    world.s3.clear_log();
    world
        .s3
        .set_bytes_per_second_per_connection(NonZeroU64::new(4 << 20));
    let mut first = start();
    let half = |log: &[pinrange::strict_s3::LogEntry]| {
        log.iter().map(|entry| entry.body_bytes).sum::<u64>() >= SIZE as u64 / 4
    };
    // Bytes do not wake those who wait for the log, so the file is looked at.
    while !half(&world.s3.log()) {
        assert!(!first.has_ended(), "{}", first.stderr());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    first.signal(Signal::INT);
    assert_ne!(first.wait().code(), Some(0));
    assert!(world.file("resumed.aria2").exists(), "{}", first.stderr());

    world.s3.set_bytes_per_second_per_connection(None);
    let mut second = start();
    assert_eq!(second.wait().code(), Some(0), "{}", second.stderr());
    world.assert_whole(&world.file("resumed"));
    assert_eq!(world.s3.stats().unguarded_gets, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn wget2_downloads_and_resumes() {
    let Some(wget2) = process::find("wget2").map(Client) else {
        return;
    };
    let world = World::new().await;
    let (dir, url) = (world.dir.path(), world.url());
    let header = format!("--header={}", world.if_match());
    let common = ["--no-config", "-q", "--tries=1", &header];
    let wget = |code, args: &[&str]| wget2.run(code, dir, &[&common, args, &[&url]].concat());
    wget(0, &["-O", "whole"]);
    world.assert_whole(&world.file("whole"));
    wget(0, &["--chunk-size=1M", "--max-threads=8", "-O", "chunks"]);
    world.assert_whole(&world.file("chunks"));
    fs::write(world.file("object"), &world.object[..7_000_000]).unwrap();
    wget(0, &["-c"]);
    world.assert_whole(&world.file("object"));
    world.replace();
    // Version 1.99 says 0 for a 412 and 8 for others; what counts is that it wrote nothing.
    run(Command::new(&wget2.0)
        .args(common)
        .args(["-O", "refused", &url])
        .current_dir(dir));
    assert!(!world.file("refused").exists());
}

const PYTHON: &str = r#"
import concurrent.futures, hashlib, http.client, sys, urllib.error, urllib.parse, urllib.request
url, etag, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
def digest(data): return hashlib.sha256(data).hexdigest()

with urllib.request.urlopen(url) as answer:
    assert answer.status == 200 and answer.headers["ETag"] == etag, answer.headers
    print("urllib", digest(answer.read()))

def part(start):
    end = min(start + 1000003, size)
    request = urllib.request.Request(url, headers={"If-Match": etag, "Range": f"bytes={start}-{end - 1}"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206 and answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        return answer.read()
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print("parallel", digest(b"".join(pool.map(part, range(0, size, 1000003)))))

try:
    urllib.request.urlopen(urllib.request.Request(url, headers={"If-Match": '"gone"'}))
    raise SystemExit("not refused")
except urllib.error.HTTPError as error:
    assert error.code == 412 and error.headers["Content-Type"] == "application/problem+json", error

# Everything on one connection, answers without a body among it.
where = urllib.parse.urlsplit(url)
connection = http.client.HTTPConnection(where.netloc)
connection.connect()
socket = connection.sock
whole = hashlib.sha256()
for method, fields, status, length in [
    ("HEAD", {}, 200, 0),
    ("GET", {"If-None-Match": etag}, 304, 0),
    ("GET", {"Range": f"bytes={size}-"}, 416, None),
    ("GET", {"If-Match": '"gone"'}, 412, None),
    ("GET", {"If-Range": etag, "Range": "bytes=5-9"}, 206, 5),
    ("GET", {"If-Range": '"gone"', "Range": "bytes=5-9"}, 200, size),
    ("GET", {}, 200, size),
]:
    connection.request(method, where.path, headers=fields)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == status, (method, fields, answer.status)
    assert length is None or len(body) == length, (method, fields, len(body))
    assert connection.sock is socket, (method, fields, "another connection")
print("kept", digest(body))

try:
    import requests
except ImportError:
    sys.exit()
with requests.Session() as session:
    answer = session.get(url, headers={"If-Match": etag}, stream=True)
    print("requests", digest(b"".join(answer.iter_content(65536))))
    answer = session.get(url, headers={"If-Match": '"gone"'})
    assert answer.status_code == 412 and answer.json()["pinned"] == '"gone"', answer.text
    answer = session.get(url, headers={"Range": "bytes=-3"})
    assert answer.status_code == 206 and len(answer.content) == 3
"#;

#[tokio::test(flavor = "multi_thread")]
async fn python_with_its_libraries() {
    let Some(python) = process::find("python3").map(Client) else {
        return;
    };
    let world = World::new().await;
    let size = SIZE.to_string();
    let args = ["-c", PYTHON, &world.url(), &world.etag, &size];
    let said = String::from_utf8(python.run(0, world.dir.path(), &args)).unwrap();
    let right = sha256(&world.object);
    let mut libraries = Vec::new();
    for line in said.lines() {
        let (library, digest) = line.split_once(' ').unwrap();
        assert_eq!(digest, right, "{library}");
        libraries.push(library);
    }
    assert_eq!(libraries[..3], ["urllib", "parallel", "kept"]);
    if libraries.len() == 3 {
        eprintln!("SKIPPED: Python has no requests");
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}
