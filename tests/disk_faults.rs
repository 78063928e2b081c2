//! The built program on a cache disk that fills up, turns read-only, vanishes, hangs or holds rubbish: no request
//! fails that S3 can answer (P10), and the disk is used again once it is well.
//!
//! The disk is a tmpfs in a mount namespace of the replica's own, so nothing here is seen outside of it. That takes root or
//! user namespaces; where there are neither, these tests fail and say so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rusqlite::Connection;
use rustix::process::Signal;
use support::http::{self, Random};
use support::process::{self, PATIENCE, Serving};

/// The disk's size. The capacity is far above it.
const DISK: &str = "32m";

/// More than the disk holds, so that there are misses all along.
const OBJECTS: usize = 12;
const SIZE: usize = 4 << 20;

/// Requests that each state of the disk has to stand, spread over parallel clients.
const REQUESTS: u64 = 60;
const CLIENTS: u64 = 4;

async fn s3() -> Arc<StrictS3> {
    Arc::new(StrictS3::start(Options::memory(["bucket"])).await.unwrap())
}

#[derive(Clone)]
struct Object {
    path: String,
    tag: String,
    bytes: Bytes,
}

fn put(s3: &StrictS3, name: &str, bytes: Bytes) -> Object {
    let tag = s3
        .put("bucket", name, bytes.clone(), PutOptions::default())
        .unwrap()
        .etag;
    Object {
        path: format!("/m/{name}"),
        tag,
        bytes,
    }
}

fn objects(s3: &StrictS3) -> Vec<Object> {
    let mut random = Random(10);
    (0..OBJECTS)
        .map(|n| put(s3, &format!("object{n}"), random.bytes(SIZE).into()))
        .collect()
}

// === a replica with a disk of its own ===

/// A replica whose cache directory is a file system that nobody else sees.
struct Mounted {
    serving: Serving,
    cache: PathBuf,
    user_namespace: bool,
}

impl Mounted {
    /// `options` are those of the tmpfs.
    fn start(s3: &StrictS3, dir: &Path, options: &str) -> Self {
        let cache = dir.join("cache");
        fs::create_dir_all(&cache).unwrap();
        let user_namespace = !rustix::process::geteuid().is_root();
        let unshare = || {
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "--propagation", "private"]);
            if user_namespace {
                unshare.args(["--user", "--map-root-user"]);
            }
            unshare
        };
        let trial = unshare()
            .args(["mount", "-t", "tmpfs", "none"])
            .arg(&cache)
            .output();
        match trial {
            Ok(output) if output.status.success() => {}
            failed => panic!(
                "this test mounts a tmpfs in a mount namespace of its own, and cannot here: run it as root or where \
                 user namespaces are allowed: {failed:?}"
            ),
        }
        let mut serve = process::serve(&s3.endpoint(), dir);
        serve.env("PINRANGE_CACHE__CAPACITY", "1GiB");
        let mut unshare = unshare();
        unshare
            .args([
                "sh",
                "-c",
                "mount -t tmpfs -o \"$1\" none \"$2\" && shift 2 && exec \"$@\"",
                "sh",
            ])
            .arg(options)
            .arg(&cache)
            .arg(serve.get_program())
            .args(serve.get_args())
            .stdin(Stdio::null());
        for (name, value) in serve.get_envs() {
            match value {
                Some(value) => unshare.env(name, value),
                None => unshare.env_remove(name),
            };
        }
        Self {
            serving: Serving::start(&mut unshare),
            cache,
            user_namespace,
        }
    }

    /// The cache directory as the replica sees it.
    fn inside(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.serving.process.pid()));
        root.join(self.cache.strip_prefix("/").unwrap())
    }

    /// Runs `script` beside the replica; `$1` is the cache directory.
    fn run(&self, script: &str) {
        let pid = self.serving.process.pid().to_string();
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &pid, "--mount"]);
        if self.user_namespace {
            nsenter.args(["--user", "--preserve-credentials"]);
        }
        let output = nsenter
            .args(["sh", "-ec", script, "sh"])
            .arg(&self.cache)
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
    }

    /// Takes every byte that is left, again and again; returns how many it has.
    fn fill(&self) -> u64 {
        let path = self.inside().join("ballast");
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        for step in [1 << 20, 64 << 10, 4 << 10] {
            let ballast = vec![7; step];
            while file.write_all(&ballast).is_ok() {}
        }
        file.metadata().unwrap().len()
    }
}

fn readyz(serving: &Serving) -> String {
    let answer = http::get(serving.admin, "/readyz", "");
    assert_eq!(
        answer.status, 200,
        "disk trouble is no reason to be taken out of service"
    );
    String::from_utf8(answer.body).unwrap()
}

fn metric(serving: &Serving, name: &str) -> u64 {
    let text = String::from_utf8(http::get(serving.admin, "/metrics", "").body).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .unwrap()
}

#[track_caller]
fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
/// Until the replica says that all is well, a request is answered from disk, and `/readyz` says nothing else.
fn until_well(serving: &Serving, object: &Object) {
    let deadline = Instant::now() + PATIENCE;
    while readyz(serving) != "ready\n" {
        let log = serving.process.stderr();
        let errors: Vec<_> = log.lines().filter(|line| !line.contains("INFO")).collect();
        assert!(
            Instant::now() < deadline,
            "the disk does not get well: {}{}",
            readyz(serving),
            errors.join("\n")
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    until("hits again", || {
        let answer = http::get(serving.data, &object.path, &pin(object));
        assert_eq!((answer.status, answer.body == object.bytes), (200, true));
        answer.field("cache-status") == "pinrange; hit; detail=disk"
    });
    // Asked again and again: a disk as small as this is full for a moment now and then.
    until("the metrics agree", || {
        metric(serving, "pinrange_disk_degraded") == 0
    });
}

/// Until all that is held is recorded, so that a disk without room is no reason to drop any of it.
fn settle(serving: &Serving) {
    // A scrub begins with that.
    let scrub = "POST /scrub HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(http::ask(serving.admin, scrub).status, 200);
}

fn pin(object: &Object) -> String {
    format!("If-Match: {}\r\n", object.tag)
}

// === load ===

/// Clients that ask for random ranges and believe nothing.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(serving: &Serving, objects: &[Object]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let clients = (0..CLIENTS).map(|client| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            let (objects, address) = (objects.to_vec(), serving.data);
            std::thread::spawn(move || {
                let mut random = Random(client);
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let object = random.one_of(&objects);
                    let start = random.below(object.bytes.len());
                    let end = start + 1 + random.below((object.bytes.len() - start).min(2 << 20));
                    let pin = if random.below(4) == 0 {
                        String::new()
                    } else {
                        pin(object)
                    };
                    let request = format!(
                        "GET {} HTTP/1.1\r\nHost: test\r\n{pin}Range: bytes={start}-{}\r\n\r\n",
                        object.path,
                        end - 1
                    );
                    match ask(address, &request) {
                        Ok(answer)
                            if answer.status == 206 && answer.body == object.bytes[start..end] => {}
                        Ok(answer) => failed.push(format!(
                            "{request:?}: {} {:?}, {} bytes",
                            answer.status,
                            answer.fields,
                            answer.body.len()
                        )),
                        Err(error) => failed.push(format!("{request:?}: {error}")),
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        });
        Self {
            clients: clients.collect(),
            stop,
            answered,
        }
    }

    /// Waits until so many more requests were answered.
    fn wait(&self, requests: u64) {
        let wanted = self.answered.load(Ordering::Relaxed) + requests;
        until("requests are answered", || {
            self.answered.load(Ordering::Relaxed) >= wanted
        });
    }

    /// How many were answered, and what was wrong with some.
    fn end(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let failed = self
            .clients
            .into_iter()
            .flat_map(|client| client.join().unwrap());
        (self.answered.load(Ordering::Relaxed), failed.collect())
    }
}

fn ask(address: std::net::SocketAddr, request: &str) -> io::Result<http::Answer> {
    let mut stream = http::connect(address);
    stream.write_all(request.as_bytes())?;
    http::read(&mut io::BufReader::new(stream), false)?
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

// === the tests ===

#[tokio::test(flavor = "multi_thread")]
async fn a_small_disk_that_is_filled_turned_read_only_emptied_and_hidden_fails_no_request() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let objects = objects(&s3);
    let replica = Mounted::start(&s3, dir.path(), &format!("size={DISK}"));
    let serving = &replica.serving;
    let load = Load::start(serving, &objects);
    load.wait(REQUESTS);
    until_well(serving, &objects[0]);
    assert!(metric(serving, "pinrange_disk_used_bytes") < 32 << 20);

    // Full: somebody else takes all that is left and all that the tier gives up.
    until("it says so", || {
        replica.fill();
        readyz(serving).contains("\ndegraded: ")
    });
    assert_eq!(metric(serving, "pinrange_disk_degraded"), 1);
    replica.fill();
    load.wait(REQUESTS);
    fs::remove_file(replica.inside().join("ballast")).unwrap();
    until_well(serving, &objects[1]);

    // Read-only, for all that is opened from now on.
    // Made elsewhere: in its place, it would be written to before it is read-only.
    replica.run(
        "view=$(mktemp -d) && mount --bind \"$1\" \"$view\" && mount -o remount,bind,ro \"$view\" \
         && mount --move \"$view\" \"$1\" && rmdir \"$view\"",
    );
    until("it says so", || {
        readyz(serving).contains("Read-only file system")
    });
    load.wait(REQUESTS);
    replica.run("umount --lazy \"$1\""); // Files may be open there.
    until_well(serving, &objects[2]);

    // Deleted.
    // Again where a file was made in a directory at that very moment.
    replica.run("until rm -rf \"$1\"/* 2> /dev/null; do :; done");
    load.wait(REQUESTS);
    until("a catalog is there again", || {
        replica.inside().join("catalog.sqlite").exists()
    });
    until_well(serving, &objects[3]);
    serving
        .process
        .wait_for("the cache directory cannot be used any more");

    // Another file system over it, of no use.
    replica.run("mount -t tmpfs -o ro none \"$1\"");
    until("it says so", || metric(serving, "pinrange_disk_out") == 1);
    assert!(
        readyz(serving).contains("the cache directory is not in use"),
        "{}",
        readyz(serving)
    );
    load.wait(REQUESTS);
    replica.run("umount --lazy \"$1\""); // Files may be open there.
    until_well(serving, &objects[4]);
    assert_eq!(metric(serving, "pinrange_disk_out"), 0);

    let (answered, failed) = load.end();
    assert!(
        failed.is_empty(),
        "{} of {answered}: {failed:#?}",
        failed.len()
    );
    assert!(answered >= 5 * REQUESTS);
    let log = serving.process.stderr();
    assert!(!log.contains("panicked"), "{log}");
    assert!(
        log.lines().count() < 200 + usize::try_from(answered).unwrap() * 2,
        "{log}"
    );
    assert_eq!(replica.serving.stop().code(), Some(0));
}

/// Nobody else makes room on a disk that the tier's own files fill, and eviction needs the catalog.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_too_full_for_the_catalog_is_opened_all_the_same() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let objects = objects(&s3);
    let replica = Mounted::start(&s3, dir.path(), &format!("size={DISK}"));
    let serving = &replica.serving;
    for object in &objects[..3] {
        until_well(serving, object);
    }
    settle(serving);
    replica.fill();
    replica.run("mount -t tmpfs -o ro none \"$1\"");
    until("it says so", || metric(serving, "pinrange_disk_out") == 1);
    replica.run("umount --lazy \"$1\""); // Files may be open there.
    serving
        .process
        .wait_for("the disk is too full for the catalog");
    until("it is in use", || metric(serving, "pinrange_disk_out") == 0);
    fs::remove_file(replica.inside().join("ballast")).unwrap();
    until_well(serving, &objects[0]);
    assert_eq!(replica.serving.stop().code(), Some(0));
}

/// What is held makes room, though taking it out of the catalog needs some itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_a_free_byte_gets_well_by_eviction() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let objects = objects(&s3);
    let replica = Mounted::start(&s3, dir.path(), &format!("size={DISK}"));
    let serving = &replica.serving;
    for object in &objects[..5] {
        until_well(serving, object);
    }
    settle(serving);
    replica.fill();
    until_well(serving, &objects[5]);
    assert_eq!(replica.serving.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_starts_past_a_disk_that_cannot_be_used_yet() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let object = put(&s3, "object", Random(1).bytes(SIZE).into());
    let replica = Mounted::start(&s3, dir.path(), "ro");
    let serving = &replica.serving;
    serving.process.wait_for("cannot open the cache directory");
    for _ in 0..2 {
        let answer = http::get(serving.data, &object.path, &pin(&object));
        assert_eq!((answer.status, answer.body == object.bytes), (200, true));
    }
    assert!(readyz(serving).contains("\ndegraded: the cache directory is not in use: "));
    replica.run("mount -o remount,rw \"$1\"");
    until_well(serving, &object);
    assert_eq!(replica.serving.stop().code(), Some(0));
}

/// Whoever opens a pipe hangs, as with a disk that does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_does_not_open_is_passed_by_and_holds_no_exit() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let object = put(&s3, "object", Random(2).bytes(1 << 20).into());
    let serving = process::replica(&s3, dir.path());
    assert_eq!(http::get(serving.data, &object.path, "").body, object.bytes);
    assert_eq!(serving.stop().code(), Some(0));
    for shard in fs::read_dir(dir.path().join("cache/segments")).unwrap() {
        for file in fs::read_dir(shard.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            fs::remove_file(&path).unwrap();
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
                .unwrap();
        }
    }
    let mut serving = process::replica(&s3, dir.path());
    s3.clear_log();
    let answer = http::get(serving.data, &object.path, &pin(&object));
    assert_eq!((answer.status, answer.body == object.bytes), (200, true));
    assert!(readyz(&serving).contains("\ndegraded: the cache disk hangs"));
    assert!(s3.stats().requests > 0);
    assert_eq!(s3.stats().unguarded_gets, 0);
    // P3: not a word of 200 when there is nothing behind it.
    s3.stop_accepting().await;
    assert_eq!(
        http::get(serving.data, &object.path, &pin(&object)).status,
        503
    );
    serving.process.signal(Signal::TERM);
    assert_eq!(serving.process.wait().code(), Some(0));
}

/// What was done to a catalog.
type Harm = (&'static str, fn(&Path));

const HARMS: &[Harm] = &[
    ("garbage", |path| {
        fs::write(path, vec![0x5a; 50_000]).unwrap();
    }),
    ("nothing but its first page", |path| {
        OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(4096)
            .unwrap();
    }),
    ("zeroes in its middle", |path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        assert!(len > 3 * 4096, "{len}");
        file.write_all_at(&vec![0; len - 8192], 4096).unwrap();
    }),
    ("a newer version", |path| {
        Connection::open(path)
            .unwrap()
            .pragma_update(None, "user_version", 1000)
            .unwrap();
    }),
    ("a directory", |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
        fs::write(path.join("file"), "").unwrap();
    }),
    ("not permitted", |path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o0)).unwrap();
    }),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_cannot_be_used_is_set_aside_at_the_start() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let object = put(&s3, "object", Random(3).bytes(1 << 20).into());
    let catalog = dir.path().join("cache/catalog.sqlite");
    let start = || {
        let serve = process::serve(&s3.endpoint(), dir.path());
        // Root may open what it is not permitted to, unless it gives that up.
        let mut command = if rustix::process::geteuid().is_root() {
            let mut setpriv = Command::new("setpriv");
            setpriv.arg("--bounding-set=-dac_override,-dac_read_search");
            setpriv.arg(serve.get_program()).args(serve.get_args());
            for (name, value) in serve.get_envs() {
                match value {
                    Some(value) => setpriv.env(name, value),
                    None => setpriv.env_remove(name),
                };
            }
            setpriv
        } else {
            serve
        };
        Serving::start(&mut command)
    };
    let serving = start();
    assert_eq!(http::get(serving.data, &object.path, "").body, object.bytes);
    assert_eq!(serving.stop().code(), Some(0));
    for (what, harm) in HARMS {
        harm(&catalog);
        let serving = start();
        let answer = http::get(serving.data, &object.path, &pin(&object));
        assert_eq!(
            (answer.status, answer.body == object.bytes),
            (200, true),
            "{what}"
        );
        until_well(&serving, &object);
        serving
            .process
            .wait_for("set it aside and start with an empty cache");
        assert_eq!(serving.stop().code(), Some(0), "{what}");
        let serving = start();
        until_well(&serving, &object);
        let log = serving.process.stderr();
        assert!(!log.contains("set it aside"), "{what}: {log}");
        assert_eq!(serving.stop().code(), Some(0));
    }
    let aside = fs::read_dir(dir.path().join("cache"))
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            let name = name.to_str().unwrap();
            name.starts_with("catalog.sqlite.")
                && !name.ends_with("-wal")
                && !name.ends_with("-shm")
        });
    assert!(aside.count() > 0, "for whoever wants to know what happened");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_breaks_while_it_is_used_is_set_aside_under_load() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let objects = objects(&s3);
    let serving = process::replica(&s3, dir.path());
    for object in &objects {
        assert_eq!(http::get(serving.data, &object.path, "").body, object.bytes);
    }
    assert_eq!(serving.stop().code(), Some(0));
    let serving = process::replica(&s3, dir.path());
    let (_, zeroes) = HARMS[2];
    zeroes(&dir.path().join("cache/catalog.sqlite"));
    let load = Load::start(&serving, &objects);
    serving
        .process
        .wait_for("the cache directory cannot be used any more");
    load.wait(REQUESTS);
    until_well(&serving, &objects[0]);
    let (answered, failed) = load.end();
    assert!(
        failed.is_empty(),
        "{} of {answered}: {failed:#?}",
        failed.len()
    );
    assert_eq!(serving.stop().code(), Some(0));
}
