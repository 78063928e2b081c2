//! Bits that flip in the cache directory of the built program, by the thousand.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rustix::process::Signal;

use support::http::{self, Random};
use support::process::{PATIENCE, Serving, pinrange, run, serve};

/// Together 64 MiB; one that ends in the middle of a block, one that is a single segment.
const LARGE: [(&str, usize); 4] = [
    ("large", (40 << 20) + 12_345),
    ("medium", 16 << 20),
    ("small", 7 << 20),
    ("tiny", 777),
];

/// The same, a quarter as large.
const SMALL: [(&str, usize); 4] = [
    ("large", (10 << 20) + 12_345),
    ("medium", 4 << 20),
    ("small", 2 << 20),
    ("tiny", 777),
];

/// A sixteenth of the capacity.
const SEGMENT: u64 = 8 << 20;

const FLIPS: usize = 10_000;

struct Object {
    key: &'static str,
    bytes: Vec<u8>,
    etag: String,
}

struct Bucket {
    s3: StrictS3,
    objects: Vec<Object>,
    dir: tempfile::TempDir,
}

impl Bucket {
    async fn of(objects: [(&'static str, usize); 4]) -> Self {
        let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
        let mut random = Random(13);
        let objects = objects.map(|(key, len)| {
            let bytes = random.bytes(len);
            let put = s3.put("bucket", key, bytes.clone(), PutOptions::default());
            Object {
                key,
                bytes,
                etag: put.unwrap().etag,
            }
        });
        Self {
            s3,
            objects: objects.into(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn serve(&self) -> Serving {
        let mut command = serve(&self.s3.endpoint(), self.dir.path());
        command
            .env("PINRANGE_CACHE__CAPACITY", "128MiB")
            .env("PINRANGE_CACHE__PART_SIZE", "4MiB");
        Serving::start(&mut command)
    }

    /// Reads every object, pinned, and compares every byte.
    fn read_everything(&self, serving: &Serving) {
        for object in &self.objects {
            let pin = format!("If-Match: {}\r\n", object.etag);
            let answer = http::get(serving.data, &format!("/m/{}", object.key), &pin);
            assert_eq!(answer.status, 200, "{}", object.key);
            assert!(
                answer.body == object.bytes,
                "{} corrupt bytes of {} served",
                wrong_bytes(&answer.body, &object.bytes),
                object.key
            );
        }
    }

    /// All of it durable on the disk of a replica that runs.
    fn filled(&self) -> Serving {
        let serving = self.serve();
        self.read_everything(&serving);
        // It begins by making what was completed durable.
        assert_eq!(scrub(&serving)["corrupt_blocks"], 0);
        serving
    }

    fn segment_files(&self) -> Vec<PathBuf> {
        let shards = fs::read_dir(self.dir.path().join("cache/segments")).unwrap();
        let mut files: Vec<_> = shards
            .flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap())
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        files
    }
}

/// Inverts `flips` bits, each anywhere in the files.
fn flip(flips: usize, files: &[PathBuf]) {
    let mut random = Random(flips as u64);
    let files: Vec<_> = files
        .iter()
        .map(|path| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            (
                file.unwrap(),
                usize::try_from(path.metadata().unwrap().len()).unwrap(),
            )
        })
        .collect();
    let total = files.iter().map(|(_, len)| len).sum();
    for _ in 0..flips {
        let mut at = random.below(total);
        for (file, len) in &files {
            if at < *len {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at as u64).unwrap();
                byte[0] ^= 1 << random.below(8);
                file.write_all_at(&byte, at as u64).unwrap();
                break;
            }
            at -= len;
        }
    }
}

fn wrong_bytes(got: &[u8], expected: &[u8]) -> usize {
    let differ = got.iter().zip(expected).filter(|(a, b)| a != b).count();
    differ + got.len().abs_diff(expected.len())
}

fn scrub(serving: &Serving) -> serde_json::Value {
    let request = "POST /scrub HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n";
    let answer = http::ask(serving.admin, request);
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_slice(&answer.body).unwrap()
}

/// A scrub that finds the catalog itself damaged says so, and there is another one soon.
fn scrub_until_well(serving: &Serving) {
    let request = "POST /scrub HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n";
    let deadline = Instant::now() + PATIENCE;
    while http::ask(serving.admin, request).status != 200 {
        assert!(Instant::now() < deadline, "the catalog stays damaged");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_flips_below_a_killed_replica_serve_nothing_wrong() {
    let bucket = Bucket::of(LARGE).await;
    let mut killed = bucket.filled();
    killed.process.signal(Signal::KILL);
    killed.process.wait();
    let files = bucket.segment_files();
    flip(FLIPS, &files);
    bucket.s3.clear_log();
    let serving = bucket.serve();
    bucket.read_everything(&serving);
    // It was found, and not by luck: what was read came from S3 again.
    assert!(bucket.s3.stats().body_bytes_sent > 60 << 20);
    // A busy disk may have been passed by instead of looked at.
    scrub(&serving);
    // The flips may have missed the object of 777 bytes and the last segment of the large one.
    for file in &files {
        let left = file.metadata().map_or(0, |file| file.len());
        assert!(left <= 12_345, "{left} bytes of {}", file.display());
    }
    bucket.s3.clear_log();
    bucket.read_everything(&serving);
    assert_eq!(bucket.s3.stats().body_bytes_sent, 0, "and was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_flips_after_a_clean_stop_are_found_by_one_scrub() {
    let bucket = Bucket::of(LARGE).await;
    assert!(bucket.filled().stop().success());
    flip(FLIPS, &bucket.segment_files());
    let serving = bucket.serve();
    let found = scrub(&serving);
    assert!(found["corrupt_blocks"].as_u64().unwrap() > 200, "{found}");
    bucket.read_everything(&serving);
    // While it runs, with all of it in the page cache.
    scrub(&serving);
    flip(FLIPS, &bucket.segment_files());
    let found = scrub(&serving);
    assert!(found["corrupt_blocks"].as_u64().unwrap() > 200, "{found}");
    bucket.read_everything(&serving);
    serving.process.wait_for("cannot be trusted");
}

/// Only the file with a wrong bit goes.
#[tokio::test(flavor = "multi_thread")]
async fn one_flip_costs_one_segment() {
    let bucket = Bucket::of(SMALL).await;
    assert!(bucket.filled().stop().success());
    let files = bucket.segment_files();
    let whole: Vec<_> = files
        .iter()
        .filter(|file| file.metadata().unwrap().len() == SEGMENT)
        .cloned()
        .collect();
    flip(1, &whole[..1]);
    let serving = bucket.serve();
    let found = scrub(&serving);
    assert_eq!(
        (&found["corrupt_blocks"], &found["dropped_segments"]),
        (&1.into(), &1.into())
    );
    bucket.s3.clear_log();
    bucket.read_everything(&serving);
    assert_eq!(bucket.s3.stats().body_bytes_sent, SEGMENT);
}

/// What is said of bytes rots as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotten_catalog_serves_nothing_wrong() {
    let bucket = Bucket::of(SMALL).await;
    bucket.filled().stop();
    let catalog = bucket.dir.path().join("cache/catalog.sqlite");
    for flips in [1, 3, 10, 30, 100, 300] {
        flip(flips, std::slice::from_ref(&catalog));
        let mut serving = bucket.serve();
        bucket.read_everything(&serving);
        scrub_until_well(&serving);
        if flips % 2 == 0 {
            assert!(serving.stop().success());
        } else {
            serving.process.signal(Signal::KILL);
            serving.process.wait();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_and_repairs() {
    let bucket = Bucket::of(SMALL).await;
    let verify = |args: &[&str]| {
        let mut command = pinrange();
        command
            .arg("verify")
            .args(args)
            .env("PINRANGE_CACHE__DIR", bucket.dir.path().join("cache"))
            .env("PINRANGE_MOUNT__0__PATH", "/m")
            .env("PINRANGE_MOUNT__0__BUCKET", "bucket");
        let output = run(&mut command);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        (output.status.code().unwrap(), stdout, stderr)
    };
    let (code, stdout, stderr) = verify(&[]);
    assert_eq!((code, stdout.as_str()), (66, ""), "{stderr}");
    assert_eq!(stderr.lines().count(), 1);
    assert!(!bucket.dir.path().join("cache").exists());

    let serving = bucket.filled();
    let (code, _, stderr) = verify(&[]);
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("in use by another process"), "{stderr}");
    assert!(serving.stop().success());

    let (code, stdout, _) = verify(&[]);
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("all as it was written"), "{stdout}");

    flip(5, &bucket.segment_files()[..1]);
    let (code, stdout, stderr) = verify(&["--json"]);
    assert_eq!((code, stderr.as_str()), (65, ""));
    let found: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&found["clean"], &found["repaired"]),
        (&false.into(), &false.into())
    );
    assert_eq!(found["bad"].as_array().unwrap().len(), 1);
    assert!(SMALL.iter().any(|(key, _)| *key == found["bad"][0]["key"]));
    let (code, stdout, _) = verify(&[]);
    assert_eq!(code, 65, "nothing was changed");
    assert!(stdout.contains("run with --repair"), "{stdout}");

    let (code, stdout, _) = verify(&["--repair"]);
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("does not have its checksum") || stdout.contains("do not have their"));
    assert_eq!(verify(&[]).0, 0);
    let serving = bucket.serve();
    bucket.read_everything(&serving);
    assert!(serving.stop().success());

    // A catalog that cannot be read is data, too.
    fs::write(bucket.dir.path().join("cache/catalog.sqlite"), [7; 8192]).unwrap();
    let (code, stdout, stderr) = verify(&["--repair"]);
    assert_eq!((code, stdout.as_str()), (65, ""), "{stderr}");
    assert!(stderr.contains("catalog"), "{stderr}");
    bucket.read_everything(&bucket.serve());
}
