//! The built program is killed, again and again, and must lose nothing that was durable and serve no wrong byte (P11).
//!
//! What a power loss would leave is judged image by image in `src/disk/tests/crash.rs`; here are the process and its
//! system calls: the kernel keeps what a killed process wrote, so what counts is the order in which it asked for it to be kept.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Effect, Options, PutOptions, StrictS3};
use rustix::process::Signal;

use support::http::{self, Random};
use support::process::{self, Serving, serve};
use support::strace::{self, Call};

const BLOCK: usize = 64 << 10;

/// Of each key, some revision of it.
const SIZES: [(&str, usize); 4] = [
    ("small", 20_000),
    ("odd", 5 * BLOCK + 1),
    ("middle", 16 * BLOCK),
    // More than a segment.
    ("large", 100 * BLOCK),
];

fn command(s3: &StrictS3, dir: &Path) -> Command {
    let mut command = serve(&s3.endpoint(), dir);
    command
        .env("PINRANGE_CACHE__BLOCK_SIZE", "64KiB")
        // Segments of 4 MiB.
        .env("PINRANGE_CACHE__CAPACITY", "64MiB");
    command
}

async fn s3() -> StrictS3 {
    StrictS3::start(Options::memory(["bucket"])).await.unwrap()
}

fn kill(serving: &mut Serving) {
    serving.process.signal(Signal::KILL);
    serving.process.wait();
}

fn purge(admin: SocketAddr, path: &str) {
    let body = format!("{{\"path\": \"{path}\"}}");
    let length = body.len();
    let head = format!("POST /purge HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n");
    assert_eq!(http::ask(admin, &(head + &body)).status, 200);
}

fn metric(serving: &Serving, name: &str) -> u64 {
    let answer = http::get(serving.admin, "/metrics", "");
    let text = String::from_utf8(answer.body).unwrap();
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// One revision that was put.
struct Put {
    key: &'static str,
    etag: String,
    bytes: Vec<u8>,
    /// Blocks that some start found on disk: every later one has to.
    durable: BTreeSet<usize>,
    /// Blocks that clients received in the run that was killed.
    received: BTreeSet<usize>,
    /// Purged after another one took its place: never to be seen again.
    purged: bool,
}

impl Put {
    fn blocks(&self) -> usize {
        self.bytes.len().div_ceil(BLOCK)
    }
}

/// All that was put, by `ETag`; and what each key has now.
#[derive(Default)]
struct World {
    puts: HashMap<String, Put>,
    current: BTreeMap<&'static str, String>,
}

impl World {
    fn put(&mut self, s3: &StrictS3, random: &mut Random, key: &'static str, size: usize) {
        let bytes = random.bytes(size - random.clone().below(size / 4));
        let put = s3.put("bucket", key, bytes.clone(), PutOptions::default());
        let etag = put.unwrap().etag;
        self.current.insert(key, etag.clone());
        let put = Put {
            key,
            etag: etag.clone(),
            bytes,
            durable: BTreeSet::new(),
            received: BTreeSet::new(),
            purged: false,
        };
        self.puts.insert(etag, put);
    }
}

/// What came of one GET: as much of its body as did.
struct Got {
    status: u16,
    etag: String,
    /// Where the body begins in the object.
    start: usize,
    body: Vec<u8>,
    whole: bool,
}

/// `None`: not even a head came.
fn get(address: SocketAddr, path: &str, fields: &str) -> Option<Got> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(process::PATIENCE)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{fields}\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    // A connection that breaks ends it, and what came before is judged.
    let _ = stream.read_to_end(&mut answer);
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let body = answer.split_off(end);
    let head = String::from_utf8(answer).unwrap().to_ascii_lowercase();
    let field = |name: &str| {
        head.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .unwrap_or_default()
            .to_owned()
    };
    let start = field("content-range")
        .strip_prefix("bytes ")
        .and_then(|range| range.split('-').next()?.parse().ok());
    Some(Got {
        status: head.get(9..12)?.parse().ok()?,
        etag: field("etag"),
        start: start.unwrap_or(0),
        whole: field("content-length").parse() == Ok(body.len()),
        body,
    })
}

/// Reads ranges, pinned and not, until told to stop; every byte is compared with the revision that the answer names.
fn load(
    address: SocketAddr,
    world: &RwLock<World>,
    mut random: Random,
    killed: &AtomicBool,
    verified: &AtomicU64,
    received: &Mutex<Vec<(String, usize)>>,
) {
    while !killed.load(Ordering::Acquire) {
        let (key, pin, size) = {
            let world = world.read().unwrap();
            let (key, size) = *random.one_of(&SIZES);
            (key, world.current[key].clone(), size)
        };
        let first = random.below(size);
        let mut fields = format!("Range: bytes={first}-{}\r\n", first + random.below(1 << 20));
        if random.below(4) > 0 {
            write!(fields, "If-Match: {pin}\r\n").unwrap();
        }
        let got = get(address, &format!("/m/{key}"), &fields);
        let alive = !killed.load(Ordering::Acquire);
        let Some(got) = got else {
            assert!(!alive, "no answer from a replica that was not killed");
            continue;
        };
        // A range beyond the end of a revision that is shorter than most, or a pin of one that was replaced.
        if alive && matches!(got.status, 412 | 416) {
            continue;
        }
        if got.status != 206 {
            assert!(!alive, "{} from a replica that was not killed", got.status);
            continue;
        }
        assert!(got.whole || !alive, "a body was cut");
        let world = world.read().unwrap();
        let put = &world.puts[&got.etag];
        let end = got.start + got.body.len();
        assert!(
            put.key == key && put.bytes.get(got.start..end) == Some(&got.body),
            "bytes {}-{end} of {key} are not those of {}",
            got.start,
            got.etag
        );
        verified.fetch_add(got.body.len() as u64, Ordering::Relaxed);
        let blocks = got.start.div_ceil(BLOCK)..if end == put.bytes.len() {
            put.blocks()
        } else {
            end / BLOCK
        };
        let blocks = blocks.map(|block| (got.etag.clone(), block));
        received.lock().unwrap().extend(blocks);
    }
}

/// What of `put` the disk holds, read and compared block by block, with an S3 that gives nothing.
fn held(address: SocketAddr, put: &Put, verified: &AtomicU64) -> BTreeSet<usize> {
    let mut held = BTreeSet::new();
    for block in 0..put.blocks() {
        let first = block * BLOCK;
        let last = (first + BLOCK).min(put.bytes.len()) - 1;
        let fields = format!("If-Match: {}\r\nRange: bytes={first}-{last}\r\n", put.etag);
        let answer = http::get(address, &format!("/m/{}", put.key), &fields);
        if answer.status != 206 {
            continue;
        }
        assert_eq!(answer.field("cache-status"), "pinrange; hit; detail=disk");
        assert!(answer.body == put.bytes[first..=last], "wrong bytes");
        verified.fetch_add(answer.body.len() as u64, Ordering::Relaxed);
        held.insert(block);
    }
    held
}

/// `PINRANGE_KILLS` says how often; what is printed at the end is for whoever runs it for long.
#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_it_serves_no_wrong_byte_and_keeps_what_was_durable() {
    let kills = std::env::var("PINRANGE_KILLS").map_or(15, |kills| kills.parse().unwrap());
    let s3 = s3().await;
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(11);
    let world = RwLock::new(World::default());
    for (key, size) in SIZES {
        world.write().unwrap().put(&s3, &mut random, key, size);
    }
    let verified = AtomicU64::new(0);
    let (mut ready, mut kept, mut lost, mut requested) = (Vec::new(), 0, 0, 0_u64);
    let mut swept = 0;
    for round in 0..=kills {
        let began = Instant::now();
        let mut serving = Serving::start(&mut command(&s3, dir.path()));
        ready.push(began.elapsed());

        // What it has is right, and all that some start before this one had.
        s3.clear_log();
        s3.on_request(Some(Box::new(|_| vec![Effect::AccessDenied])));
        for put in world.write().unwrap().puts.values_mut() {
            let held = held(serving.data, put, &verified);
            if put.purged {
                assert_eq!(held, BTreeSet::new(), "round {round}: purged, and back");
                continue;
            }
            let gone: Vec<_> = put.durable.difference(&held).collect();
            assert!(
                gone.is_empty(),
                "round {round}: lost {gone:?} of {}",
                put.key
            );
            kept += put.received.intersection(&held).count();
            lost += put.received.difference(&held).count();
            put.durable = held;
            put.received.clear();
        }
        assert_eq!(s3.stats().body_bytes_sent, 0);
        s3.on_request(None);
        assert_eq!(metric(&serving, "pinrange_disk_quarantines_total"), 0);
        swept += metric(&serving, "pinrange_disk_swept_files_total");
        if round == kills {
            assert_eq!(serving.stop().code(), Some(0));
            break;
        }

        // The key of the round is replaced, and what it had before is purged.
        let (key, size) = SIZES[round % SIZES.len()];
        {
            let mut world = world.write().unwrap();
            world.put(&s3, &mut random, key, size);
            purge(serving.admin, &format!("/m/{key}"));
            let current = world.current[key].clone();
            for put in world.puts.values_mut() {
                if put.key == key && put.etag != current {
                    put.purged = true;
                    put.durable.clear();
                }
            }
            // Those of earlier rounds have been seen to be gone.
            world.puts.retain(|_, put| !put.purged || put.key == key);
        }
        let killed = AtomicBool::new(false);
        let received = Mutex::new(Vec::new());
        let pause = Duration::from_millis(50 + random.next() % 500);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let random = Random(random.next());
                let (world, killed) = (&world, &killed);
                let (verified, received) = (&verified, &received);
                let address = serving.data;
                scope.spawn(move || load(address, world, random, killed, verified, received));
            }
            // The moment of the kill is what the loop is about.
            std::thread::sleep(pause);
            // Before, so that whoever sees a broken connection sees this.
            killed.store(true, Ordering::Release);
            kill(&mut serving);
        });
        requested += s3.stats().body_bytes_sent;
        for (etag, block) in received.into_inner().unwrap() {
            if let Some(put) = world.write().unwrap().puts.get_mut(&etag)
                && !put.purged
            {
                put.received.insert(block);
            }
        }
    }
    ready.sort_unstable();
    println!(
        "{kills} kills: {} MiB verified, 0 wrong; S3 sent {} MiB; of blocks that clients had received {kept} kept and {lost} lost; \
         {swept} leftover files swept; ready after {:?} (median), {:?} (most)",
        verified.into_inner() >> 20,
        requested >> 20,
        ready[ready.len() / 2],
        ready.last().unwrap(),
    );
    assert!(
        kept > 0,
        "nothing was durable in time: the loop showed nothing"
    );
}

/// The order that makes a power loss harmless, as the kernel sees it: a file's data and its name are synced before anything
/// that names it goes into the catalog's log.
#[tokio::test(flavor = "multi_thread")]
async fn data_and_name_are_synced_before_the_catalog_speaks_of_them() {
    let Some(tracer) = process::find("strace") else {
        return;
    };
    let s3 = s3().await;
    let dir = tempfile::tempdir().unwrap();
    // One block each, so that all of a file is written before it is spoken of.
    let objects: BTreeMap<_, _> = (0..12)
        .map(|number| (format!("one-{number}"), Random(number).bytes(50_000)))
        .collect();
    for (key, bytes) in &objects {
        s3.put("bucket", key, bytes.clone(), PutOptions::default())
            .unwrap();
    }
    let mut serving = Serving::start(&mut command(&s3, dir.path()));
    let trace = dir.path().join("trace");
    let mut tracer = strace::attach(&tracer, serving.process.pid(), 4096, &trace);
    for (key, bytes) in &objects {
        assert!(http::get(serving.data, &format!("/m/{key}"), "").body == *bytes);
    }
    // Durable before it is answered, and before a file goes.
    purge(serving.admin, "/m/one-0");
    serving.process.signal(Signal::TERM);
    assert_eq!(serving.process.wait().code(), Some(0));
    tracer.wait();

    let calls = strace::calls(&String::from_utf8_lossy(&fs::read(&trace).unwrap()));
    let of = |names: &'static [&str], path: &str| -> Vec<&Call> {
        let file = format!("{path}>");
        calls
            .iter()
            .filter(|call| names.contains(&call.name.as_str()) && call.argument(0).ends_with(&file))
            .collect()
    };
    let log = of(&["write", "pwrite64"], "catalog.sqlite-wal");
    let asked = calls
        .iter()
        .find(|call| call.arguments.contains("POST /purge"))
        .unwrap();
    let unlinked: Vec<_> = calls
        .iter()
        .filter(|call| call.name.starts_with("unlink") && call.arguments.contains(".seg"))
        .collect();
    assert_eq!(unlinked.len(), 1, "{unlinked:?}");
    assert!(
        of(&["fdatasync", "fsync"], "catalog.sqlite-wal")
            .iter()
            .any(|call| call.made > asked.returned && call.returned < unlinked[0].made),
        "a purge was not synced before its file went"
    );
    let files = segment_files(dir.path());
    assert_eq!(files.len(), objects.len() - 1);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let path = file.to_str().unwrap();
        let mut in_catalog = String::new();
        for byte in 0..name.len() / 2 {
            in_catalog.push_str("\\x");
            in_catalog.push_str(&name[2 * byte..2 * byte + 2]);
        }
        let made = calls
            .iter()
            .find(|call| call.name.starts_with("open") && call.arguments.contains(path))
            .unwrap();
        let written = of(
            &["pwritev", "pwritev2", "pwrite64", "writev", "write"],
            path,
        );
        let bytes: u64 = written.iter().filter_map(|call| call.bytes()).sum();
        assert_eq!(bytes, 50_000, "{written:?}");
        let last = written.iter().map(|call| call.returned).max().unwrap();
        let spoken = log
            .iter()
            .filter(|call| call.arguments.contains(&in_catalog))
            .map(|call| call.made)
            .min()
            .unwrap();
        let between = |from: usize| {
            move |call: &&Call| call.made > from && call.returned < spoken && call.result == "0"
        };
        assert!(
            of(&["fdatasync", "fsync"], path)
                .into_iter()
                .any(|call| between(last)(&call)),
            "{name} was not synced between its last write and the row about it"
        );
        let shard = file.parent().unwrap().to_str().unwrap();
        assert!(
            of(&["fsync"], shard)
                .into_iter()
                .any(|call| between(made.returned)(&call)),
            "the name {name} was not synced before the row about it"
        );
    }
}

fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let shards = fs::read_dir(dir.join("cache/segments")).unwrap();
    shards
        .flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .collect()
}

/// Files without rows, rows without files, revisions without bytes, a catalog that was set aside: all of it goes, is counted,
/// and what is whole stays.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_over_is_reclaimed_and_counted() {
    let s3 = s3().await;
    let dir = tempfile::tempdir().unwrap();
    let mut pins = HashMap::new();
    for (key, len) in [("whole", 300_000), ("parted", 200_000)] {
        let bytes = Random(len as u64).bytes(len);
        let put = s3.put("bucket", key, bytes.clone(), PutOptions::default());
        pins.insert(key, (put.unwrap().etag, bytes));
    }
    let read = |serving: &Serving, key: &str| {
        let (etag, bytes) = &pins[key];
        let answer = http::get(
            serving.data,
            &format!("/m/{key}"),
            &format!("If-Match: {etag}\r\n"),
        );
        assert!(answer.body == *bytes, "{key}: {answer:?}");
    };
    let serving = Serving::start(&mut command(&s3, dir.path()));
    read(&serving, "parted");
    assert_eq!(serving.stop().code(), Some(0));
    for file in segment_files(dir.path()) {
        fs::remove_file(file).unwrap();
    }
    let serving = Serving::start(&mut command(&s3, dir.path()));
    serving
        .process
        .wait_for("removed what an earlier run left over");
    assert_eq!(metric(&serving, "pinrange_disk_swept_rows_total"), 1);
    assert_eq!(metric(&serving, "pinrange_disk_swept_revisions_total"), 1);
    assert_eq!(metric(&serving, "pinrange_disk_used_bytes"), 0);
    read(&serving, "whole");
    assert_eq!(serving.stop().code(), Some(0));

    let leftover = dir
        .path()
        .join(format!("cache/segments/5a/5a{}.seg", "0f".repeat(15)));
    let sparse = fs::File::create(&leftover).unwrap();
    sparse.set_len(1 << 30).unwrap();
    (&sparse).write_all(&[1; 8192]).unwrap();
    sparse.sync_all().unwrap();
    let mut serving = Serving::start(&mut command(&s3, dir.path()));
    serving
        .process
        .wait_for("removed what an earlier run left over");
    assert!(!leftover.exists());
    assert_eq!(metric(&serving, "pinrange_disk_swept_files_total"), 1);
    let bytes = metric(&serving, "pinrange_disk_swept_bytes_total");
    assert!((8192..1 << 20).contains(&bytes), "{bytes}: it is sparse");
    assert_eq!(metric(&serving, "pinrange_disk_swept_rows_total"), 0);
    // In whole blocks of 4 KiB.
    assert_eq!(metric(&serving, "pinrange_disk_used_bytes"), 303_104);
    s3.clear_log();
    read(&serving, "whole");
    assert_eq!(s3.stats().requests, 0);
    kill(&mut serving);

    // Of catalogs that were set aside, one is kept.
    for _ in 0..2 {
        let catalog = dir.path().join("cache/catalog.sqlite");
        fs::write(&catalog, Random(3).bytes(20_000)).unwrap();
        // It has every page that counts.
        fs::remove_file(catalog.with_file_name("catalog.sqlite-wal")).unwrap();
        let mut serving = Serving::start(&mut command(&s3, dir.path()));
        serving.process.wait_for("set it aside");
        read(&serving, "whole");
        kill(&mut serving);
    }
    let names = fs::read_dir(dir.path().join("cache")).unwrap();
    let names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let aside = names.iter().filter(|name| {
        name.contains("corrupt") && !name.contains("-wal") && !name.contains("-shm")
    });
    assert_eq!(aside.count(), 1, "{names:?}");
    assert!(
        !names.iter().any(|name| name == "catalog.damaged"),
        "{names:?}"
    );
}
