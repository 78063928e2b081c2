//! Eviction: what the policy is worth, that the tier follows it, and that the disk never holds more than it may.
//!
//! The traces and the simulated caches are those of `examples/eviction`, whose numbers docs/EVICTION.md shows.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

#[path = "../examples/eviction/sim.rs"]
mod sim;
mod support;
#[path = "../examples/eviction/traces.rs"]
#[expect(dead_code, reason = "the example uses the rest")]
mod traces;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use pinrange::disk::{DiskConfig, DiskTier, MinFree, Step};
use pinrange::object::{ObjectKey, Representation, Validator};
use pinrange::semantics::RangeSpec;
use pinrange::strict_s3::{Options, PutOptions, StrictS3};

use sim::{CHUNK, Cache as _, Counting, POLICIES, Pinrange};
use support::http;
use support::process::{self, Serving};
use traces::{Random, TRACES};

/// Hit ratios by policy: of all bytes, and of those that no scan read.
fn ratios(trace: &str, capacity: u64) -> HashMap<&'static str, (f64, f64)> {
    let trace = TRACES.iter().find(|known| known.name == trace).unwrap();
    let reads = (trace.make)(capacity);
    let of = |make: sim::Make| {
        let mut cache = make(capacity);
        let mut counts = [[0_u32; 2]; 2];
        for (at, read) in reads.iter().enumerate() {
            let hit = cache.read(read.name, read.chunk);
            if at >= reads.len() / 10 {
                counts[usize::from(read.scan)][usize::from(hit)] += 1;
            }
        }
        let [[miss, hit], [scan_miss, scan_hit]] = counts;
        let all = miss + hit + scan_miss + scan_hit;
        (
            f64::from(hit + scan_hit) / f64::from(all),
            f64::from(hit) / f64::from(miss + hit),
        )
    };
    POLICIES
        .iter()
        .map(|(policy, make)| (*policy, of(*make)))
        .collect()
}

/// Seeded, so these are the same numbers everywhere; the margins are for whoever changes the policy.
#[test]
fn the_policy_beats_lru_where_lru_is_weak_and_counts_a_pass_as_one_visit() {
    let capacity = 16 << 30;
    let scans = ratios("zipf+scans", capacity);
    assert!(scans["pinrange"].0 > scans["LRU"].0 * 1.3, "{scans:?}");
    assert!(scans["pinrange"].0 > scans["FIFO"].0 * 1.4, "{scans:?}");
    assert!(
        scans["pinrange"].0 > scans["S3-FIFO by touches"].0 * 1.3,
        "{scans:?}"
    );
    for (trace, least) in [
        ("loop 1.1", 0.5),
        ("loop 2", 0.4),
        ("zipf, then loop 2", 0.15),
    ] {
        let loops = ratios(trace, capacity);
        assert!(loops["LRU"].0 < 0.05, "{trace}: {loops:?}");
        assert!(loops["pinrange"].0 > least, "{trace}: {loops:?}");
    }
    let fleet = ratios("CI fleet", capacity);
    assert!(fleet["pinrange"].1 > fleet["LRU"].1 + 0.02, "{fleet:?}");
    assert!(
        fleet["pinrange"].1 > fleet["W-TinyLFU"].1 + 0.1,
        "{fleet:?}"
    );
}

const BLOCK: u64 = 4096;

/// What is measured is what runs: the tier and the simulation hit and miss alike, read for read.
#[tokio::test]
async fn the_tier_chooses_as_the_simulation_does() {
    let dir = tempfile::tempdir().unwrap();
    let objects = 128;
    let tier = DiskTier::open(DiskConfig {
        dir: dir.path().to_owned(),
        capacity: objects * BLOCK,
        min_free: MinFree::Bytes(0),
        block_size: BLOCK,
        scrub_rate: 0,
    })
    .unwrap();
    let mut simulated = Pinrange::new(objects * CHUNK, Counting::Bytes);
    let mut random = Random(7);
    let body = Bytes::from(vec![7; usize::try_from(BLOCK).unwrap()]);
    let range = RangeSpec::From(0).resolve(BLOCK).unwrap();
    let (mut hits, mut fetched_again) = (0, 0);
    for read in 0..3000_u64 {
        // Now and then some that nobody wants again; else the square of a fraction: small numbers more often.
        let name = if read % 500 < 100 {
            1000 + read
        } else {
            let fraction = random.below(1000);
            fraction * fraction * 300 / 1_000_000
        };
        let key = ObjectKey::new("store", name.to_string());
        let representation = Representation {
            validator: Validator::from_etag_field("\"a\"").unwrap(),
            size: BLOCK,
            last_modified: None,
            version_id: None,
            headers: Vec::new(),
        };
        let held = tier.admit(&key, &representation).await.unwrap();
        let hit = held.first_missing(range).is_none();
        assert_eq!(hit, simulated.read(name, 0), "read {read}, of {name}");
        if !hit {
            let room = tier.reserve(BLOCK).await.unwrap();
            let mut writer = held.writer(range, room);
            writer.write(vec![body.clone()]).await.unwrap();
            drop(writer);
            // What stands in main is known to the policy when it is in the catalog.
            let ghost_hits = tier.stats().ghost_hits;
            if tier.stats().evictions == 0 || ghost_hits > fetched_again {
                tier.flush().await.unwrap();
                fetched_again = ghost_hits;
            }
        }
        hits += u32::from(hit);
        let mut step = held.step(range);
        if matches!(step, Step::Closed) {
            held.open_at(0).await;
            step = held.step(range);
        }
        let Step::Present(mut extent) = step else {
            panic!("read {read}, of {name}: it was just there")
        };
        extent.advance(BLOCK);
    }
    assert!((1000..2900).contains(&hits), "{hits} hits say little");
    assert!(fetched_again > 20, "{fetched_again} ghosts say little");
    let stats = tier.stats();
    assert!(stats.evicted_main_bytes > 20 * BLOCK, "{stats:?}");
}

fn segment_files(cache: &Path) -> Vec<PathBuf> {
    let shards = fs::read_dir(cache.join("segments")).unwrap();
    shards
        .flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .collect()
}

/// What a file takes, short of what the file system allocated ahead of its writer; 0 if it is gone.
fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len().min(file.blocks() * 512))
}

/// Bytes that certainly lie on disk at the end of the call: files that were there all along only grow, and those that were
/// unlinked while somebody sends from them are open in the process.
fn on_disk(cache: &Path, pid: u32) -> u64 {
    let unlinked = || -> Vec<(PathBuf, PathBuf)> {
        let open = fs::read_dir(format!("/proc/{pid}/fd"));
        let open = open.into_iter().flatten().flatten();
        open.filter_map(|open| Some((open.path(), fs::read_link(open.path()).ok()?)))
            .filter(|(_, target)| target.to_string_lossy().ends_with(".seg (deleted)"))
            .collect()
    };
    let sizes: Vec<(PathBuf, u64)> = segment_files(cache)
        .into_iter()
        .map(|file| (file.clone(), size(&file)))
        .collect();
    let open: Vec<((PathBuf, PathBuf), u64)> = unlinked()
        .into_iter()
        .map(|open| (open.clone(), size(&open.0)))
        .collect();
    let (named, unlinked) = (segment_files(cache), unlinked());
    let named = sizes.iter().filter(|(file, _)| named.contains(file));
    let unlinked = open.iter().filter(|(open, _)| unlinked.contains(open));
    named.map(|(_, size)| size).sum::<u64>() + unlinked.map(|(_, size)| size).sum::<u64>()
}

fn metric(replica: &Serving, name: &str) -> u64 {
    let answer = http::get(replica.admin, "/metrics", "");
    let text = String::from_utf8(answer.body).unwrap();
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("{name} in {text}"))
}

/// Downloads the whole object in four ranges at once, and checks its bytes.
fn download(replica: &Serving, key: &str, expected: &[u8]) {
    let quarter = expected.len() / 4;
    std::thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                let (first, end) = (part * quarter, (part + 1) * quarter);
                let range = format!("Range: bytes={first}-{}\r\n", end - 1);
                let answer = http::get(replica.data, &format!("/m/{key}"), &range);
                assert_eq!(answer.status, 206);
                assert!(answer.body == expected[first..end], "{key}: wrong bytes");
            });
        }
    });
}

/// Demand of 16 times the capacity. One key is read after each object that nobody wants again, one only after as many of these as
/// fill the cache 1.25 times, which least recently used never survives.
///
/// `PINRANGE_TEST_SCALE=4` is 1 GiB on 64 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn hot_keys_stay_and_the_disk_holds_no_more_than_it_may() {
    let scale: usize = std::env::var("PINRANGE_TEST_SCALE").map_or(1, |text| text.parse().unwrap());
    let mib = scale << 20;
    let capacity = 16 * mib as u64;
    let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
    let put = |key: &str, body: &[u8]| {
        s3.put("bucket", key, body.to_vec(), PutOptions::default())
            .unwrap();
    };
    let hot = http::Random(1).bytes(2 * mib);
    let cold = http::Random(2).bytes(4 * mib);
    put("often", &hot);
    put("seldom", &hot);
    let dir = tempfile::tempdir().unwrap();
    let mut command = process::serve(&s3.endpoint(), dir.path());
    command
        .env("PINRANGE_CACHE__CAPACITY", capacity.to_string())
        .env("PINRANGE_CACHE__PART_SIZE", mib.to_string())
        .env("PINRANGE_CACHE__BLOCK_SIZE", "64KiB");
    let replica = Serving::start(&mut command);
    let cache = dir.path().join("cache");
    let (over, is_over) = mpsc::channel::<()>();
    let mut asked = HashMap::from([("often", 0), ("seldom", 0)]);
    std::thread::scope(|scope| {
        let (cache, replica) = (&cache, &replica);
        let watcher = scope.spawn(move || {
            let mut most = 0;
            loop {
                // It ends with the sender, even by a panic; and looks once more then, when all is quiet.
                let last = is_over.recv_timeout(Duration::from_millis(10));
                most = most.max(on_disk(cache, replica.process.pid()));
                let used = metric(replica, "pinrange_disk_used_bytes");
                assert!(used <= capacity, "the account says {used}");
                if last == Err(mpsc::RecvTimeoutError::Disconnected) {
                    return most;
                }
            }
        });
        let over = over;
        for _ in 0..3 {
            download(replica, "often", &hot);
            download(replica, "seldom", &hot);
        }
        s3.clear_log();
        for scan in 0..64 {
            let key = format!("scan-{scan}");
            put(&key, &cold);
            download(replica, &key, &cold);
            s3.delete("bucket", &key).unwrap();
            let mut read = |key| {
                download(replica, key, &hot);
                *asked.get_mut(key).unwrap() += hot.len() as u64;
            };
            read("often");
            if scan % 5 == 4 {
                read("seldom");
            }
        }
        drop(over);
        let most = watcher.join().unwrap();
        assert!(most <= capacity, "{most} bytes on disk");
        assert!(most > capacity / 2, "{most} bytes: the watcher saw nothing");
        eprintln!("at most {most} of {capacity} bytes on disk");
    });
    eprintln!(
        "evicted: small {}, main {}; ghost hits {}",
        metric(
            &replica,
            "pinrange_disk_evicted_bytes_total{queue=\"small\"}"
        ),
        metric(
            &replica,
            "pinrange_disk_evicted_bytes_total{queue=\"main\"}"
        ),
        metric(&replica, "pinrange_disk_ghost_hits_total"),
    );
    for (key, asked) in asked {
        let log = s3.log();
        let entries = log.iter().filter(|entry| entry.key == key);
        let missed: u64 = entries.map(|entry| entry.body_bytes).sum();
        eprintln!("{key}: {asked} bytes asked for, {missed} of them from S3");
        assert!(missed * 20 <= asked, "{key}: {missed} of {asked} from S3");
    }
    assert_eq!(replica.stop().code(), Some(0));
    let bytes: u64 = segment_files(&cache).iter().map(|file| size(file)).sum();
    let catalog = rusqlite::Connection::open(cache.join("catalog.sqlite")).unwrap();
    let meta = |name: &str| -> i64 {
        let value = "SELECT value FROM meta WHERE name = ?1";
        catalog.query_row(value, [name], |row| row.get(0)).unwrap()
    };
    assert_eq!(
        meta("bytes"),
        i64::try_from(bytes).unwrap(),
        "the account over the restart"
    );
    eprintln!("waited {} times for the disk", meta("syncs"));
}
