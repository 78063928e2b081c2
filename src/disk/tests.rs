//! The tier as its users see it, and what is on disk when the power goes.
#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers, on 64-bit targets"
)]

mod crash;
mod release;

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use rusqlite::Connection;
use tempfile::TempDir;

use super::catalog::Catalog;
use super::durability::{KernelSync, Syncer};
use super::tier::{Seams, Space};
use super::watch::Limits;
use super::writer::{LONG_STEPS, LONGEST_STEP as STEP};
use super::*;
use crate::object::{ObjectKey, Representation, Revision, Validator};
use crate::semantics::ByteRange;

mod rot;
mod space;

const BLOCK: u64 = 4096;
/// 16 segments of 16 KiB, 4 blocks each.
const CAPACITY: u64 = 256 << 10;
const SEGMENT: u64 = 16 << 10;

fn config(dir: &Path) -> DiskConfig {
    DiskConfig {
        dir: dir.to_owned(),
        capacity: CAPACITY,
        min_free: MinFree::Bytes(0),
        block_size: BLOCK,
        scrub_rate: 0,
    }
}

fn open(dir: &Path) -> Arc<DiskTier> {
    DiskTier::open(config(dir)).unwrap()
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("store", name)
}

fn representation(tag: &str, size: u64) -> Representation {
    Representation {
        validator: Validator::from_etag_field(&format!("\"{tag}\"")).unwrap(),
        size,
        last_modified: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
        version_id: Some("v1".into()),
        headers: vec![("content-type".into(), "application/x-git".into())],
    }
}

fn revision(name: &str, tag: &str) -> Revision {
    Revision {
        key: key(name),
        validator: representation(tag, 0).validator,
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::from_bounds(start, end).unwrap()
}

/// Bytes that differ from block to block and from name to name.
fn body(name: &str, size: u64) -> Vec<u8> {
    let seed = name
        .bytes()
        .fold(17_u64, |seed, byte| seed * 31 + u64::from(byte));
    (0..size)
        .map(|at| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

async fn admit(tier: &DiskTier, name: &str, size: u64) -> Arc<HeldRevision> {
    tier.admit(&key(name), &representation("a", size))
        .await
        .unwrap()
}

async fn write(tier: &DiskTier, held: &Arc<HeldRevision>, name: &str, stretch: ByteRange) {
    let bytes = body(name, stretch.end());
    let reservation = tier.reserve(stretch.len()).await.unwrap();
    let mut writer = held.writer(stretch, reservation);
    // Odd frames, so that blocks and frames do not coincide.
    for frames in bytes[stretch.start() as usize..].chunks(5000) {
        let frames = frames.chunks(777).map(Bytes::copy_from_slice).collect();
        writer.write(frames).await.unwrap();
    }
    assert_eq!(writer.view().cursor(), stretch.end());
}

async fn put(tier: &DiskTier, name: &str, size: u64) -> Arc<HeldRevision> {
    let held = admit(tier, name, size).await;
    write(tier, &held, name, range(0, size)).await;
    held
}

fn bytes_of(extent: &FileExtent) -> Vec<u8> {
    let mut bytes = vec![0; extent.len() as usize];
    extent
        .file()
        .file()
        .read_exact_at(&mut bytes, extent.offset())
        .unwrap();
    // As whoever sends does.
    extent.clone().advance(extent.len());
    bytes
}

/// `None`: some of it is missing.
async fn read(held: &HeldRevision, wanted: ByteRange) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = Some(wanted);
    while let Some(next) = rest {
        match held.step(next) {
            Step::Present(extent) => {
                assert!(extent.len() <= next.len());
                bytes.extend(bytes_of(&extent));
                rest = next.from_offset(next.start() + extent.len());
            }
            Step::Closed => held.open_at(next.start()).await,
            Step::Missing(gap) => {
                assert_eq!(gap.start(), next.start());
                return None;
            }
        }
    }
    Some(bytes)
}

async fn assert_holds(held: &HeldRevision, name: &str, stretch: ByteRange) {
    let expected = &body(name, stretch.end())[stretch.start() as usize..];
    assert!(
        read(held, stretch)
            .await
            .is_some_and(|bytes| bytes == expected)
    );
}

fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let shards = fs::read_dir(dir.join("segments")).unwrap();
    shards
        .flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .collect()
}

/// What a power loss right now would leave, except that it may keep more.
fn crash_copy(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["catalog.sqlite", "catalog.sqlite-wal"] {
        if dir.join(name).exists() {
            fs::copy(dir.join(name), copy.path().join(name)).unwrap();
        }
    }
    for shard in 0..=255_u8 {
        fs::create_dir_all(copy.path().join(format!("segments/{shard:02x}"))).unwrap();
    }
    for file in segment_files(dir) {
        fs::copy(&file, copy.path().join(file.strip_prefix(dir).unwrap())).unwrap();
    }
    copy
}

fn rows(dir: &Path, table: &str) -> i64 {
    let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
    catalog
        .query_row(&format!("SELECT count(*) FROM {table}"), [], |row| {
            row.get(0)
        })
        .unwrap()
}

fn wait_for_sweep(tier: &DiskTier) {
    tier.sweeper.lock().take().unwrap().join().unwrap();
}

#[tokio::test]
async fn what_was_written_is_served_and_survives_an_orderly_restart() {
    let dir = tempfile::tempdir().unwrap();
    let size = 3 * SEGMENT + BLOCK + 100;
    let tier = open(dir.path());
    let held = admit(&tier, "x", size).await;
    write(&tier, &held, "x", range(BLOCK, SEGMENT + 2 * BLOCK)).await;
    write(&tier, &held, "x", range(3 * SEGMENT, size)).await;

    assert!(matches!(held.step(range(0, 10)), Step::Missing(gap) if gap == range(0, 10)));
    assert!(matches!(held.step(range(7, size)), Step::Missing(gap) if gap == range(7, BLOCK)));
    assert_eq!(held.first_missing(range(BLOCK, SEGMENT + 2 * BLOCK)), None);
    assert_eq!(
        held.first_missing(range(BLOCK + 1, size)),
        Some(range(SEGMENT + 2 * BLOCK, 3 * SEGMENT))
    );
    assert_holds(&held, "x", range(BLOCK + 5, SEGMENT + 2 * BLOCK - 5)).await;
    assert_holds(&held, "x", range(3 * SEGMENT + 1, size)).await;
    let used = tier.stats().used_bytes;
    // The last block is not whole, but takes as much.
    assert_eq!(used, 7 * BLOCK);
    tier.close().await.unwrap();

    let tier = open(dir.path());
    assert_eq!(tier.stats().used_bytes, used);
    assert!(matches!(tier.lookup(&revision("x", "a")), Lookup::Unknown));
    let held = tier.load(&revision("x", "a")).await.unwrap();
    assert!(
        matches!(tier.lookup(&revision("x", "a")), Lookup::Held(same) if Arc::ptr_eq(&same, &held))
    );
    assert_eq!(*held.representation(), representation("a", size));
    assert_holds(&held, "x", range(BLOCK, SEGMENT + 2 * BLOCK)).await;
    assert_holds(&held, "x", range(3 * SEGMENT, size)).await;
    assert_eq!(held.first_missing(range(0, size)), Some(range(0, BLOCK)));
    // Files of an earlier run are sealed: the rest goes beside them.
    let files = segment_files(dir.path()).len();
    write(&tier, &held, "x", range(0, BLOCK)).await;
    assert_eq!(segment_files(dir.path()).len(), files + 1);
    assert_holds(&held, "x", range(0, SEGMENT + 2 * BLOCK)).await;
}

#[tokio::test]
async fn an_empty_object_is_held_without_a_segment() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    admit(&tier, "empty", 0).await;
    tier.close().await.unwrap();
    let tier = open(dir.path());
    wait_for_sweep(&tier);
    let held = tier.load(&revision("empty", "a")).await.unwrap();
    assert_eq!(held.representation().size, 0);
}

/// Nothing evicts what takes no room, so memory and the next start bound it.
#[tokio::test]
async fn empty_objects_do_not_pile_up_in_the_catalog() {
    const IN_MEMORY: i64 = 8;
    let dir = tempfile::tempdir().unwrap();
    let open_knowing = |revisions: i64| {
        let seams = Seams {
            revisions_in_memory: usize::try_from(revisions).unwrap(),
            ..Seams::default()
        };
        DiskTier::open_with(config(dir.path()), seams).unwrap()
    };
    // In a run, the least recently used.
    let tier = open_knowing(IN_MEMORY);
    for count in 0..100 {
        admit(&tier, &format!("first {count}"), 0).await;
        assert!(tier.load(&revision("first 0", "a")).await.is_some());
    }
    tier.flush().await.unwrap();
    let held = rows(dir.path(), "revisions");
    assert!(held <= IN_MEMORY, "{held}");
    tier.close().await.unwrap();

    // From run to run, those that came first.
    let tier = open_knowing(1000);
    wait_for_sweep(&tier);
    for count in 0..300 {
        admit(&tier, &format!("second {count}"), 0).await;
    }
    put(&tier, "x", BLOCK).await;
    tier.close().await.unwrap();
    let tier = open_knowing(IN_MEMORY);
    wait_for_sweep(&tier);
    assert_eq!(rows(dir.path(), "revisions"), IN_MEMORY + 1);
    for (name, is_held) in [
        ("first 0", false),
        ("second 291", false),
        ("second 292", true),
        ("second 299", true),
        ("x", true),
    ] {
        let held = tier.load(&revision(name, "a")).await;
        assert_eq!(held.is_some(), is_held, "{name}");
    }
}

#[tokio::test]
async fn a_second_open_is_told_who_holds_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let Err(DiskError::Locked { pid, .. }) = DiskTier::open(config(dir.path())) else {
        panic!("opened twice")
    };
    assert_eq!(pid, std::process::id().to_string());
    tier.close().await.unwrap();
    open(dir.path());
}

#[tokio::test]
async fn followers_read_behind_the_cursor_and_a_started_block_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = admit(&tier, "x", 2 * SEGMENT).await;
    let bytes = body("x", 2 * SEGMENT);
    let reservation = tier.reserve(SEGMENT + BLOCK).await.unwrap();
    let mut writer = held.writer(range(SEGMENT - BLOCK, 2 * SEGMENT), reservation);
    let view = writer.view();
    assert!(view.extent(range(SEGMENT - BLOCK, SEGMENT)).is_none());

    let upto = SEGMENT + BLOCK + 100;
    let chunk = Bytes::copy_from_slice(&bytes[(SEGMENT - BLOCK) as usize..upto as usize]);
    writer.write(vec![chunk]).await.unwrap();
    assert_eq!(view.cursor(), upto);
    assert!(
        view.extent(range(SEGMENT - BLOCK - 1, SEGMENT)).is_none(),
        "before the writer"
    );
    assert!(
        view.extent(range(upto, 2 * SEGMENT)).is_none(),
        "before the cursor got there"
    );
    let first = view.extent(range(SEGMENT - 10, 2 * SEGMENT)).unwrap();
    assert_eq!(first.len(), 10, "within one segment");
    let second = view.extent(range(SEGMENT, 2 * SEGMENT)).unwrap();
    assert_eq!(bytes_of(&second), bytes[SEGMENT as usize..upto as usize]);

    drop(writer);
    assert_eq!(
        held.first_missing(range(SEGMENT - BLOCK, 2 * SEGMENT)),
        Some(range(SEGMENT + BLOCK, 2 * SEGMENT))
    );
    // The started block is in its file for good, and counts.
    assert_eq!(tier.stats().used_bytes, 3 * BLOCK);
    let before = segment_files(dir.path()).len();
    write(&tier, &held, "x", range(SEGMENT + BLOCK, 2 * SEGMENT)).await;
    assert_eq!(
        segment_files(dir.path()).len(),
        before + 1,
        "it must not be written over"
    );
    assert_holds(&held, "x", range(SEGMENT - BLOCK, 2 * SEGMENT)).await;
    assert_eq!(bytes_of(&second), bytes[SEGMENT as usize..upto as usize]);

    tier.close().await.unwrap();
    assert_eq!(open(dir.path()).stats().used_bytes, 6 * BLOCK);
}

#[tokio::test]
async fn a_writer_that_wrote_nothing_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = admit(&tier, "x", SEGMENT).await;
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    assert_eq!(tier.stats().used_bytes, SEGMENT);
    let mut writer = held.writer(range(0, SEGMENT), reservation);
    writer
        .write(vec![Bytes::from_static(b"started")])
        .await
        .unwrap();
    drop(writer);
    tier.flush().await.unwrap();
    assert_eq!(tier.stats().used_bytes, 0);
    assert_eq!(segment_files(dir.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_writer_cannot_exceed_its_reservation() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = admit(&tier, "x", SEGMENT).await;
    let reservation = tier.reserve(BLOCK).await.unwrap();
    let mut writer = held.writer(range(0, SEGMENT), reservation);
    let bytes = Bytes::from(body("x", SEGMENT));
    assert!(matches!(
        writer.write(vec![bytes]).await,
        Err(DiskError::NoRoom)
    ));
    assert_eq!(tier.stats().used_bytes, BLOCK);
    assert_eq!(
        held.first_missing(range(0, SEGMENT)),
        Some(range(BLOCK, SEGMENT))
    );
}

/// Parallel fills of one segment share its file, and none writes a block of another.
#[tokio::test(flavor = "multi_thread")]
async fn parallel_writers_share_a_segment() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = admit(&tier, "x", SEGMENT).await;
    let writers = (0..4).map(|block| {
        let (tier, held) = (Arc::clone(&tier), Arc::clone(&held));
        tokio::spawn(async move {
            write(&tier, &held, "x", range(block * BLOCK, (block + 1) * BLOCK)).await;
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(segment_files(dir.path()).len(), 1);
    assert_holds(&held, "x", range(0, SEGMENT)).await;
}

/// Fetches and reads objects of one segment, each once.
async fn scan(tier: &DiskTier, names: std::ops::Range<u32>) {
    for name in names.map(|count| format!("scan {count}")) {
        let held = put(tier, &name, SEGMENT).await;
        assert_holds(&held, &name, range(0, SEGMENT)).await;
        assert!(tier.stats().used_bytes <= CAPACITY);
    }
}

/// What the catalog says stands in main.
fn main_bytes(dir: &Path) -> u64 {
    let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
    let sum = "SELECT coalesce(sum(bytes), 0) FROM segments WHERE queue = 1";
    let sum: i64 = catalog.query_row(sum, [], |row| row.get(0)).unwrap();
    u64::try_from(sum).unwrap()
}

#[tokio::test]
async fn what_is_read_again_outlives_a_scan_of_many_times_the_capacity() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    // From here on what is new begins in the small queue.
    scan(&tier, 100..117).await;
    let hot = ["hot 1", "hot 2", "hot 3"];
    let whole = range(0, SEGMENT);
    for name in hot {
        let held = put(&tier, name, SEGMENT).await;
        for _ in 0..3 {
            assert_holds(&held, name, whole).await;
        }
    }
    scan(&tier, 0..60).await;
    for name in hot {
        let held = tier.load(&revision(name, "a")).await.unwrap();
        assert_holds(&held, name, whole).await;
    }

    tier.flush().await.unwrap();
    let stats = tier.stats();
    let on_disk: u64 = segment_files(dir.path())
        .iter()
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert_eq!(on_disk, stats.used_bytes);
    assert_eq!(stats.small_bytes + stats.main_bytes, stats.used_bytes);
    assert_eq!(main_bytes(dir.path()), stats.main_bytes);
    assert_eq!(
        stats.evicted_small_bytes + stats.evicted_main_bytes,
        stats.evictions * SEGMENT
    );
    assert_eq!(80 * SEGMENT - stats.used_bytes, stats.evictions * SEGMENT);
}

/// A downloader in small chunks, some of which it asks for at once, is one visit.
#[tokio::test]
async fn a_pass_in_small_chunks_is_one_visit() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let chunked = put(&tier, "chunked", 2 * SEGMENT).await;
    for at in (0..2 * SEGMENT).step_by(64) {
        assert_holds(&chunked, "chunked", range(at, at + 64)).await;
    }
    scan(&tier, 0..60).await;
    let whole = range(0, 2 * SEGMENT);
    assert_eq!(chunked.first_missing(whole), Some(whole));
}

/// What was served is written down at the orderly end, and the queue a segment stands in when it gets there.
#[tokio::test]
async fn what_is_hot_stays_hot_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let hot = put(&tier, "hot", 4 * SEGMENT).await;
    tier.flush().await.unwrap();
    for _ in 0..3 {
        assert_holds(&hot, "hot", range(0, 4 * SEGMENT)).await;
    }
    drop(hot);
    tier.close().await.unwrap();
    // Unknown to memory from here on.
    let tier = open(dir.path());
    scan(&tier, 0..24).await;
    tier.flush().await.unwrap();
    let crashed = crash_copy(dir.path());
    for tier in [tier, open(crashed.path())] {
        scan(&tier, 50..74).await;
        let hot = tier.load(&revision("hot", "a")).await.unwrap();
        assert_holds(&hot, "hot", range(0, 4 * SEGMENT)).await;
    }
}

/// Its name outlives it, over a restart too: what is fetched again soon begins in main.
#[tokio::test]
async fn what_is_fetched_again_soon_is_taken_for_hot() {
    let dir = tempfile::tempdir().unwrap();
    let mut tier = open(dir.path());
    scan(&tier, 0..24).await;
    for (again, restart) in [(16, false), (17, true)] {
        if restart {
            tier.close().await.unwrap();
            tier = open(dir.path());
        }
        let name = format!("scan {again}");
        let whole = range(0, SEGMENT);
        let held = admit(&tier, &name, SEGMENT).await;
        assert_eq!(held.first_missing(whole), Some(whole), "{name}");
        drop(held);
        put(&tier, &name, SEGMENT).await;
        tier.flush().await.unwrap();
        assert_eq!(tier.stats().ghost_hits, 1);
        let catalog = Connection::open(dir.path().join("catalog.sqlite")).unwrap();
        let queue = "SELECT queue FROM segments JOIN revisions ON id = revision WHERE key = ?1";
        let queue: i64 = catalog.query_row(queue, [name], |row| row.get(0)).unwrap();
        assert_eq!(queue, 1, "main");
    }
}

/// Makes the catalog what the first version had.
fn to_version_1(dir: &Path) {
    let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
    catalog
        .execute_batch(
            "DROP TRIGGER segments_insert_main; DROP TRIGGER segments_update_main;
             DROP TRIGGER segments_delete_main; DROP INDEX segments_by_place; DROP TABLE ghosts;
             DELETE FROM meta WHERE name = 'main_bytes';
             ALTER TABLE segments DROP COLUMN queue; ALTER TABLE segments DROP COLUMN served;
             ALTER TABLE segments RENAME COLUMN place TO last_used;
             DROP INDEX segments_by_verified; ALTER TABLE segments DROP COLUMN verified;
             ALTER TABLE segments DROP COLUMN seal; ALTER TABLE checksums DROP COLUMN crc64s;
             ALTER TABLE revisions DROP COLUMN whole;
             CREATE INDEX segments_by_age ON segments (last_used); PRAGMA user_version = 1;",
        )
        .unwrap();
}

/// The rows of version 1 had one order, of last use.
#[tokio::test]
async fn a_catalog_of_version_1_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for count in 0..16 {
        put(&tier, &format!("x{count}"), SEGMENT).await;
    }
    tier.close().await.unwrap();
    to_version_1(dir.path());
    let tier = open(dir.path());
    put(&tier, "new", 4 * SEGMENT).await;
    assert_eq!(tier.stats().used_bytes, CAPACITY);
    for count in 0..16 {
        let held = tier.load(&revision(&format!("x{count}"), "a")).await;
        assert_eq!(held.is_some(), count >= 4, "x{count}");
    }
}

#[tokio::test]
async fn what_is_being_sent_is_not_evicted_and_purged_bytes_count_until_they_were_sent() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", CAPACITY).await;
    let Step::Present(extent) = held.step(range(0, SEGMENT)) else {
        panic!()
    };
    let room = tier.reserve(CAPACITY - SEGMENT).await.unwrap();
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert_eq!(
        held.first_missing(range(0, CAPACITY)),
        Some(range(SEGMENT, CAPACITY))
    );
    drop(room);

    let purged = tier.purge(PurgeTarget::Key(key("x"))).await.unwrap();
    assert_eq!(
        purged,
        Purged {
            revisions: 1,
            bytes: SEGMENT
        }
    );
    assert_eq!(segment_files(dir.path()), Vec::<PathBuf>::new());
    assert_eq!(tier.stats().used_bytes, SEGMENT, "unlinked, but open");
    assert!(matches!(
        tier.reserve(CAPACITY).await,
        Err(DiskError::NoRoom)
    ));
    assert_eq!(bytes_of(&extent), body("x", SEGMENT));
    drop(extent);
    assert_eq!(tier.stats().used_bytes, 0);
    tier.reserve(CAPACITY).await.unwrap();
}

#[tokio::test]
async fn a_purge_reaches_what_only_the_catalog_knows_and_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for name in ["dir/a", "dir/b", "dir", "dirt", "other"] {
        put(&tier, name, SEGMENT).await;
        tier.set_current(&key(name), Some(&Arc::new(representation("a", SEGMENT))));
    }
    tier.close().await.unwrap();
    let tier = open(dir.path());
    let known = tier.load(&revision("dir/a", "a")).await.unwrap();
    let target = PurgeTarget::Prefix {
        store: "store".into(),
        prefix: "dir/".into(),
    };
    let purged = tier.purge(target.clone()).await.unwrap();
    assert_eq!(
        purged,
        Purged {
            revisions: 2,
            bytes: 2 * SEGMENT
        }
    );
    assert!(known.is_doomed());
    assert!(matches!(known.step(range(0, 1)), Step::Missing(_)));
    // Without another flush or close: what was purged stays so after a power loss.
    let crashed = crash_copy(dir.path());
    let after = open(crashed.path());
    for tier in [&tier, &after] {
        for name in ["dir/a", "dir/b"] {
            assert!(matches!(tier.lookup(&revision(name, "a")), Lookup::Unknown));
            assert!(tier.load(&revision(name, "a")).await.is_none());
            assert!(tier.last_current(&key(name)).await.is_none());
        }
        for name in ["dir", "dirt", "other"] {
            let held = tier.load(&revision(name, "a")).await.unwrap();
            assert_holds(&held, name, range(0, SEGMENT)).await;
            assert!(tier.last_current(&key(name)).await.is_some());
        }
        assert_eq!(tier.stats().used_bytes, 3 * SEGMENT);
    }
    assert_eq!(tier.purge(target).await.unwrap(), Purged::default());
}

#[tokio::test]
async fn a_writer_pulls_a_turn_at_a_time_and_nothing_where_no_file_can_be_made() {
    const SIZE: u64 = 3 * writer::PULL;
    let dir = tempfile::tempdir().unwrap();
    let roomy = DiskConfig {
        capacity: 64 << 20,
        ..config(dir.path())
    };
    let tier = DiskTier::open(roomy).unwrap();
    let held = admit(&tier, "x", SIZE).await;
    let bytes = Bytes::from(body("x", SIZE));
    // Odd ones, so that a turn ends within a frame's length of where it should.
    let mut frames: VecDeque<Bytes> = bytes
        .chunks(7777)
        .map(|frame| bytes.slice_ref(frame))
        .collect();
    let reservation = tier.reserve(SIZE).await.unwrap();
    let mut writer = held.writer(range(0, SIZE), reservation);
    let view = writer.view();
    while !frames.is_empty() {
        let before = view.cursor();
        frames = writer.pull(frames, VecDeque::pop_front).await.unwrap();
        let turn = view.cursor() - before;
        assert!(turn < writer::PULL + 7777, "{turn} bytes in one turn");
        assert!(turn >= writer::PULL || frames.is_empty(), "{turn} bytes");
    }
    assert_holds(&held, "x", range(0, SIZE)).await;

    let other = admit(&tier, "y", SEGMENT).await;
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    let mut writer = other.writer(range(0, SEGMENT), reservation);
    tier.purge(PurgeTarget::Key(key("y"))).await.unwrap();
    let asked = Arc::new(AtomicBool::new(false));
    let refused = writer
        .pull(Arc::clone(&asked), |asked| {
            asked.store(true, Ordering::SeqCst);
            None
        })
        .await;
    assert!(matches!(refused, Err(DiskError::Purged)));
    assert!(
        !asked.load(Ordering::SeqCst),
        "bytes were taken that have nowhere to go"
    );
}

/// Each block of `steps` steps, whatever the machine.
fn with_long_blocks(dir: &Path, steps: u64) -> Arc<DiskTier> {
    let config = DiskConfig {
        capacity: 64 << 20,
        block_size: steps * STEP,
        ..config(dir)
    };
    let seams = Seams {
        longest_step: STEP,
        ..Seams::default()
    };
    DiskTier::open_with(config, seams).unwrap()
}

/// Writes `size` bytes of "x" in frames from much less than a step to more than one, and expects the cursor at multiples of `step`.
async fn assert_steps(tier: &DiskTier, size: u64, step: u64) {
    let held = admit(tier, "x", size).await;
    let bytes = Bytes::from(body("x", size));
    let reservation = tier.reserve(size).await.unwrap();
    let mut writer = held.writer(range(0, size), reservation);
    let view = writer.view();
    let mut given = 0;
    let mut turn = 0;
    while given < size {
        let len = [100, 7777, LEAST_STEP - 1, STEP - 1, 3 * STEP + 5][turn % 5].min(size - given);
        let frame = bytes.slice(given as usize..(given + len) as usize);
        writer
            .pull(VecDeque::from([frame]), VecDeque::pop_front)
            .await
            .unwrap();
        given += len;
        turn += 1;
        let cursor = view.cursor();
        if turn == 1 || given == size {
            assert_eq!(cursor, given, "the first bytes and the last wait for none");
        } else {
            assert_eq!(cursor, (given - given % step).max(100));
        }
        assert_eq!(writer.holds_back_since().is_some(), cursor < given);
    }
    assert_holds(&held, "x", range(0, size)).await;
}

#[tokio::test]
async fn whole_steps_are_written_however_the_bytes_come() {
    let dir = tempfile::tempdir().unwrap();
    let tier = with_long_blocks(dir.path(), 4);
    assert_steps(&tier, 11 * STEP + 100, STEP).await;
}

/// Thousands of writers must not put aside 256 KiB each.
#[tokio::test]
async fn steps_are_short_where_many_writers_have_put_long_ones_aside() {
    let dir = tempfile::tempdir().unwrap();
    let tier = with_long_blocks(dir.path(), 4);
    let bytes = Bytes::from(vec![0; 200]);
    let mut others = Vec::new();
    for n in 0..LONG_STEPS {
        let held = admit(&tier, &format!("y{n}"), STEP).await;
        let reservation = tier.reserve(STEP).await.unwrap();
        let mut writer = held.writer(range(0, STEP), reservation);
        let frames = VecDeque::from([bytes.slice(..100), bytes.slice(100..200)]);
        writer.pull(frames, VecDeque::pop_front).await.unwrap();
        assert!(writer.holds_back_since().is_some());
        others.push(writer);
    }
    assert_steps(&tier, 11 * STEP + 100, LEAST_STEP).await;
    // One of them is done with its step, and leaves its place; another one ends.
    others[0].flush().await.unwrap();
    others.pop();
    tier.purge(PurgeTarget::Key(key("x"))).await.unwrap();
    assert_steps(&tier, 11 * STEP + 100, STEP).await;
    assert_eq!(tier.shared.steps.has_leave_for(), 2);
}

#[tokio::test]
async fn what_is_held_back_is_written_when_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let tier = with_long_blocks(dir.path(), 2);
    let held = admit(&tier, "x", 2 * STEP).await;
    let bytes = Bytes::from(body("x", 2 * STEP));
    let reservation = tier.reserve(2 * STEP).await.unwrap();
    let mut writer = held.writer(range(0, 2 * STEP), reservation);
    let view = writer.view();
    // Of what is slow, the first flush leaves what begins another least step.
    for (given, held_back, flushed) in [
        (1, false, 1),
        (1000, true, 1000),
        (LEAST_STEP + 10, true, LEAST_STEP),
        (STEP + 10, true, STEP + 10),
    ] {
        let frame = bytes.slice(view.cursor() as usize..given as usize);
        let frames = VecDeque::from([frame]);
        writer.pull(frames, VecDeque::pop_front).await.unwrap();
        assert_eq!(writer.holds_back_since().is_some(), held_back);
        let asked = Instant::now();
        writer.flush().await.unwrap();
        assert_eq!(view.cursor(), flushed);
        let rest_waits_since = writer.holds_back_since();
        assert_eq!(rest_waits_since.is_some(), flushed < given);
        assert!(rest_waits_since.is_none_or(|since| since >= asked));
        writer.flush().await.unwrap();
        assert!(writer.holds_back_since().is_none());
        assert_eq!(view.cursor(), given);
        let extent = view.extent(range(0, given)).unwrap();
        assert!(bytes_of(&extent) == bytes[..given as usize]);
    }
    let rest = bytes.slice(STEP as usize + 10..);
    writer.write(vec![rest]).await.unwrap();
    assert_holds(&held, "x", range(0, 2 * STEP)).await;
}

#[tokio::test]
async fn a_purged_revision_takes_no_more_bytes_and_its_successor_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = admit(&tier, "x", SEGMENT).await;
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    let mut writer = held.writer(range(0, SEGMENT), reservation);
    let bytes = Bytes::from(body("x", SEGMENT));
    writer
        .write(vec![bytes.slice(..2 * BLOCK as usize)])
        .await
        .unwrap();
    tier.set_current(&key("x"), Some(&held.representation()));
    tier.purge(PurgeTarget::Key(key("x"))).await.unwrap();
    assert!(matches!(
        writer.write(vec![bytes.slice(2 * BLOCK as usize..)]).await,
        Err(DiskError::Purged)
    ));
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    let mut late = held.writer(range(0, SEGMENT), reservation);
    assert!(matches!(
        late.write(vec![bytes]).await,
        Err(DiskError::Purged)
    ));
    let successor = admit(&tier, "x", SEGMENT).await;
    assert!(!Arc::ptr_eq(&held, &successor));
    drop(writer);
    tier.flush().await.unwrap();
    assert_eq!(
        successor.first_missing(range(0, SEGMENT)),
        Some(range(0, SEGMENT))
    );
    assert_eq!(
        rows(dir.path(), "segments"),
        0,
        "queued blocks of the doomed one are discarded"
    );
    assert!(tier.last_current(&key("x")).await.is_none());
    assert_eq!(tier.stats().used_bytes, 0);
}

/// Loads and admissions race purges: at the end one revision stands, the catalog agrees with
/// memory, and the account is exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn purge_beats_load_and_admit() {
    let dir = tempfile::tempdir().unwrap();
    let seams = Seams {
        revisions_in_memory: 2,
        ..Seams::default()
    };
    let tier = DiskTier::open_with(config(dir.path()), seams).unwrap();
    let mut tasks = Vec::new();
    for task in 0..4 {
        let tier = Arc::clone(&tier);
        tasks.push(tokio::spawn(async move {
            for round in 0..30 {
                let name = ["x", "y", "z"][(task + round) % 3];
                match task {
                    0 => {
                        tier.purge(PurgeTarget::Key(key(name))).await.unwrap();
                    }
                    1 => {
                        if let Some(held) = tier.load(&revision(name, "a")).await
                            && let Some(bytes) = read(&held, range(0, SEGMENT)).await
                        {
                            assert_eq!(bytes, body(name, SEGMENT));
                        }
                    }
                    _ => {
                        let held = admit(&tier, name, SEGMENT).await;
                        let reservation = tier.reserve(SEGMENT).await.unwrap();
                        let mut writer = held.writer(range(0, SEGMENT), reservation);
                        let written = writer.write(vec![body(name, SEGMENT).into()]).await;
                        assert!(matches!(written, Ok(()) | Err(DiskError::Purged)));
                    }
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    tier.close().await.unwrap();
    // Now that nothing purged waits in the queue with its file open.
    let used = tier.stats().used_bytes;
    let on_disk: u64 = segment_files(dir.path())
        .iter()
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert_eq!(on_disk, used);
    let tier = open(dir.path());
    assert_eq!(tier.stats().used_bytes, used);
    for name in ["x", "y", "z"] {
        if let Some(held) = tier.load(&revision(name, "a")).await {
            assert_holds(&held, name, range(0, SEGMENT)).await;
        }
    }
    let all = PurgeTarget::Prefix {
        store: "store".into(),
        prefix: String::new(),
    };
    tier.purge(all).await.unwrap();
    assert_eq!(tier.stats().used_bytes, 0);
    assert_eq!(segment_files(dir.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn random_pins_leave_nothing_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    for pin in 0..100 {
        assert!(
            tier.load(&revision("x", &format!("random-{pin}")))
                .await
                .is_none()
        );
    }
    assert_eq!(tier.stats().revisions_in_memory, 1);
    assert_eq!(rows(dir.path(), "revisions"), 1);
}

#[tokio::test]
async fn memory_forgets_what_nobody_holds_and_finds_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let seams = Seams {
        revisions_in_memory: 4,
        ..Seams::default()
    };
    let tier = DiskTier::open_with(config(dir.path()), seams).unwrap();
    let kept = put(&tier, "kept", BLOCK).await;
    let extent = {
        let sent = put(&tier, "sent", BLOCK).await;
        let Step::Present(extent) = sent.step(range(0, BLOCK)) else {
            panic!()
        };
        extent
    };
    for count in 0..20 {
        put(&tier, &format!("x{count}"), BLOCK).await;
        admit(&tier, &format!("bare{count}"), BLOCK).await;
        tier.flush().await.unwrap();
    }
    assert!(tier.stats().revisions_in_memory <= 6, "{:?}", tier.stats());
    assert!(
        matches!(tier.lookup(kept.revision()), Lookup::Held(same) if Arc::ptr_eq(&same, &kept))
    );
    assert!(
        matches!(tier.lookup(&revision("sent", "a")), Lookup::Held(_)),
        "its file is in use"
    );
    drop(extent);
    for count in 0..20 {
        let held = tier
            .load(&revision(&format!("x{count}"), "a"))
            .await
            .unwrap();
        assert_holds(&held, &format!("x{count}"), range(0, BLOCK)).await;
    }
    tier.flush().await.unwrap();
    assert!(
        rows(dir.path(), "revisions") < 30,
        "revisions without a byte are forgotten for good"
    );
    assert_eq!(tier.stats().used_bytes, 22 * BLOCK);
}

/// So that nobody's first touch waits for it.
#[tokio::test]
async fn a_sweep_that_has_no_row_to_delete_never_takes_the_catalogs_lock() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", 3 * SEGMENT).await;
    tier.close().await.unwrap();
    drop(tier);
    let tier = open(dir.path());
    wait_for_sweep(&tier);
    let leftover = dir
        .path()
        .join("segments/ab/ab00000000000000000000000000000f.seg");
    fs::write(&leftover, "lost").unwrap();

    let shared = tier.shared();
    let lock = shared.catalog.lock().unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    let sweeper = Arc::clone(&shared);
    let reader = Catalog::reader(dir.path()).unwrap();
    std::thread::spawn(move || {
        sweep::run(&sweeper, &reader, i64::MAX);
        done.send(()).unwrap();
    });
    // It waits for the lock, or does not need it.
    let ended = ended.recv_timeout(Duration::from_secs(30));
    drop(lock);
    ended.unwrap();
    assert!(!leftover.exists());
    assert_eq!(segment_files(dir.path()).len(), 3);
}

#[tokio::test]
async fn idle_files_are_closed_above_the_cap_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let seams = Seams {
        max_open_files: 4,
        ..Seams::default()
    };
    let tier = DiskTier::open_with(config(dir.path()), seams).unwrap();
    let held = admit(&tier, "x", 12 * SEGMENT).await;
    for idx in 0..12 {
        write(&tier, &held, "x", range(idx * SEGMENT, (idx + 1) * SEGMENT)).await;
        tier.flush().await.unwrap();
    }
    assert!(tier.stats().open_files <= 5, "{:?}", tier.stats());
    assert_holds(&held, "x", range(0, 12 * SEGMENT)).await;
    assert!(tier.stats().open_files <= 5, "{:?}", tier.stats());
    assert_eq!(tier.stats().quarantines, 0);
}

#[tokio::test]
async fn after_an_unclean_stop_a_flipped_bit_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "good", SEGMENT).await;
    put(&tier, "bad", 2 * SEGMENT).await;
    put(&tier, "untouched", SEGMENT).await;
    tier.flush().await.unwrap();
    let crashed = crash_copy(dir.path());
    let bad = body("bad", SEGMENT);
    let file = segment_files(crashed.path())
        .into_iter()
        .find(|file| fs::read(file).unwrap() == bad)
        .unwrap();
    let flip = OpenOptions::new().write(true).open(&file).unwrap();
    flip.write_all_at(&[!bad[9000]], 9000).unwrap();

    let tier = open(crashed.path());
    let held = tier.load(&revision("bad", "a")).await.unwrap();
    // The block asked for is good; one beside it is not, so nothing of the file is trusted.
    assert_eq!(read(&held, range(0, 10)).await, None);
    assert!(!file.exists());
    assert_eq!(
        held.first_missing(range(0, 2 * SEGMENT)),
        Some(range(0, SEGMENT))
    );
    assert_holds(&held, "bad", range(SEGMENT, 2 * SEGMENT)).await;
    let good = tier.load(&revision("good", "a")).await.unwrap();
    assert_holds(&good, "good", range(0, SEGMENT)).await;
    assert_eq!(tier.stats().quarantines, 1);
    assert_eq!(tier.stats().used_bytes, 3 * SEGMENT);
    write(&tier, &held, "bad", range(0, SEGMENT)).await;
    assert_holds(&held, "bad", range(0, 2 * SEGMENT)).await;

    // What was verified is remembered, what was never opened stays suspect over a clean run.
    tier.close().await.unwrap();
    let suspects = "SELECT count(*) FROM segments
        WHERE run <= (SELECT value FROM meta WHERE name = 'suspect_run')";
    let catalog = Connection::open(crashed.path().join("catalog.sqlite")).unwrap();
    let count: i64 = catalog.query_row(suspects, [], |row| row.get(0)).unwrap();
    assert_eq!(count, 1);
}

/// What the last clean stop recorded is trusted; finding rot in it is the scrubber's work.
#[tokio::test]
async fn after_a_clean_stop_nothing_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    tier.close().await.unwrap();
    let file = OpenOptions::new()
        .write(true)
        .open(&segment_files(dir.path())[0])
        .unwrap();
    file.write_all_at(&[!body("x", 1)[0]], 0).unwrap();
    let tier = open(dir.path());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    assert!(read(&held, range(0, SEGMENT)).await.is_some());
    assert_eq!(tier.stats().quarantines, 0);
}

#[tokio::test]
async fn a_file_that_is_gone_or_short_drops_its_coverage() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "gone", SEGMENT).await;
    tier.flush().await.unwrap();
    let gone = segment_files(dir.path());
    put(&tier, "short", SEGMENT).await;
    tier.close().await.unwrap();
    for file in segment_files(dir.path()) {
        if gone.contains(&file) {
            fs::remove_file(file).unwrap();
        } else {
            OpenOptions::new()
                .write(true)
                .open(file)
                .unwrap()
                .set_len(SEGMENT - 1)
                .unwrap();
        }
    }
    let tier = open(dir.path());
    for name in ["gone", "short"] {
        let held = tier.load(&revision(name, "a")).await.unwrap();
        assert_eq!(read(&held, range(0, 1)).await, None);
        assert_eq!(
            held.first_missing(range(0, SEGMENT)),
            Some(range(0, SEGMENT))
        );
    }
    assert_eq!(tier.stats().used_bytes, 0);
    assert_eq!(rows(dir.path(), "segments"), 0);
}

/// The power went after the eviction's unlink but before its row was gone, and a file of another
/// incarnation lies there now: the row must not bless it.
#[tokio::test]
async fn a_stale_incarnation_blesses_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    let crashed = crash_copy(dir.path());
    let file = segment_files(crashed.path()).remove(0);
    let mut name = file.file_name().unwrap().to_str().unwrap().to_owned();
    name.replace_range(
        31..32,
        if name.as_bytes()[31] == b'0' {
            "1"
        } else {
            "0"
        },
    );
    let other = file.with_file_name(name);
    fs::rename(&file, &other).unwrap();

    let tier = open(crashed.path());
    // Unless the sweep took it out already.
    if let Some(held) = tier.load(&revision("x", "a")).await {
        assert_eq!(read(&held, range(0, SEGMENT)).await, None);
    }
    wait_for_sweep(&tier);
    assert!(!other.exists(), "no row names it");
    assert_eq!(rows(dir.path(), "segments"), 1);
    assert_eq!(rows(crashed.path(), "segments"), 0);
    assert_eq!(tier.stats().used_bytes, 0);
}

#[tokio::test]
async fn the_sweep_removes_leftovers_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    admit(&tier, "bare", SEGMENT).await;
    tier.close().await.unwrap();
    let leftover = dir
        .path()
        .join("segments/ab/ab00000000000000000000000000000f.seg");
    let foreign = dir.path().join("segments/ab/README");
    fs::write(&leftover, "lost").unwrap();
    fs::write(&foreign, "mine").unwrap();

    let tier = open(dir.path());
    let held = admit(&tier, "y", SEGMENT).await;
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    let mut writer = held.writer(range(0, SEGMENT), reservation);
    writer
        .write(vec![Bytes::from_static(b"begun")])
        .await
        .unwrap();
    wait_for_sweep(&tier);
    assert!(!leftover.exists());
    assert!(foreign.exists());
    // x, what is being written, and the foreign file.
    assert_eq!(segment_files(dir.path()).len(), 3);
    assert_eq!(
        rows(dir.path(), "revisions"),
        2,
        "a revision without a byte is swept"
    );
    drop(writer);
}

fn set_aside(dir: &Path, why: &str) -> bool {
    let names = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    names.into_iter().any(|name| {
        name.to_str()
            .unwrap()
            .starts_with(&format!("catalog.sqlite.{why}-"))
    })
}

#[tokio::test]
async fn a_damaged_or_newer_catalog_is_set_aside() {
    for (why, spoil) in [
        (
            "corrupt",
            (|path| fs::write(path, [7; 9000]).unwrap()) as fn(&Path),
        ),
        ("newer", |path| {
            let catalog = Connection::open(path).unwrap();
            catalog.pragma_update(None, "user_version", 1000).unwrap();
        }),
        ("corrupt", |path| {
            fs::write(path.with_file_name("catalog.damaged"), "found by a query").unwrap();
        }),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tier = open(dir.path());
        put(&tier, "x", SEGMENT).await;
        tier.close().await.unwrap();
        spoil(&dir.path().join("catalog.sqlite"));

        let tier = open(dir.path());
        assert!(set_aside(dir.path(), why));
        assert!(tier.load(&revision("x", "a")).await.is_none());
        wait_for_sweep(&tier);
        assert_eq!(segment_files(dir.path()), Vec::<PathBuf>::new());
        let held = put(&tier, "x", SEGMENT).await;
        assert_holds(&held, "x", range(0, SEGMENT)).await;
        tier.close().await.unwrap();
        let tier = open(dir.path());
        assert!(tier.load(&revision("x", "a")).await.is_some());
    }
}

#[tokio::test]
async fn revisions_of_another_block_size_are_not_found_and_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    put(&tier, "y", SEGMENT).await;
    tier.close().await.unwrap();
    let doubled = DiskConfig {
        block_size: 2 * BLOCK,
        ..config(dir.path())
    };
    let tier = DiskTier::open(doubled).unwrap();
    assert!(tier.load(&revision("x", "a")).await.is_none());
    assert_eq!(tier.stats().used_bytes, 2 * SEGMENT);
    let held = put(&tier, "x", SEGMENT).await;
    assert_holds(&held, "x", range(0, SEGMENT)).await;
    assert_eq!(
        tier.stats().used_bytes,
        2 * SEGMENT,
        "admission replaced it"
    );
    drop(held);
    tier.flush().await.unwrap();
    drop(tier.reserve(CAPACITY).await.unwrap());
    assert_eq!(tier.stats().used_bytes, 0);
}

#[tokio::test]
async fn headers_and_what_was_current_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    let mut changed = representation("a", SEGMENT);
    changed
        .headers
        .push(("cache-control".into(), "no-store".into()));
    changed.last_modified = None;
    assert!(Arc::ptr_eq(
        &held,
        &tier.admit(&key("x"), &changed).await.unwrap()
    ));
    let changed = Arc::new(changed);
    assert_eq!(held.representation(), changed);
    let (described, fields) = held.described();
    assert_eq!(described, changed);
    assert_eq!(fields, changed.fields(), "made anew");
    assert!(fields.iter().all(|(name, _)| name != "last-modified"));
    tier.set_current(&key("x"), Some(&changed));
    tier.set_current(&key("gone"), Some(&changed));
    tier.flush().await.unwrap();
    tier.set_current(&key("gone"), None);
    assert!(
        tier.last_current(&key("gone")).await.is_none(),
        "before it is committed"
    );
    tier.close().await.unwrap();

    let tier = open(dir.path());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    assert_eq!(held.representation(), changed);
    let current = tier.last_current(&key("x")).await.unwrap();
    assert_eq!(current.representation, changed);
    assert!(current.checked_at.elapsed().unwrap() < Duration::from_mins(1));
    assert!(tier.last_current(&key("gone")).await.is_none());
}

#[tokio::test]
async fn one_validator_for_two_lengths_keeps_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    let refuses = async |tier: &DiskTier| {
        let longer = representation("a", 2 * SEGMENT);
        let error = tier.admit(&key("x"), &longer).await.err();
        matches!(error, Some(DiskError::TwoLengths { held: SEGMENT, given }) if given == longer.size)
    };
    assert!(refuses(&tier).await);
    assert!(!held.is_doomed());
    tier.flush().await.unwrap();
    drop(held);
    tier.close().await.unwrap();
    // What only the catalog knows, too.
    let tier = open(dir.path());
    assert!(refuses(&tier).await);
    let held = tier.load(&revision("x", "a")).await.unwrap();
    held.open_at(0).await;
    assert_eq!(held.first_missing(range(0, SEGMENT)), None);
}

#[tokio::test]
async fn one_validator_for_two_lengths_keeps_the_newer_where_nothing_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let bare = admit(&tier, "x", SEGMENT).await;
    let longer = admit(&tier, "x", 2 * SEGMENT).await;
    assert!(bare.is_doomed());
    assert_eq!(longer.size(), 2 * SEGMENT);
    drop((bare, longer));
    tier.close().await.unwrap();
    // What only the catalog knows, too.
    let tier = open(dir.path());
    assert_eq!(admit(&tier, "x", SEGMENT).await.size(), SEGMENT);
}

/// Holds `fdatasync` back until the test opens the gate, and can make it fail.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    fail: AtomicBool,
}

#[derive(Default)]
struct GateState {
    open: bool,
    waiting: bool,
}

struct Gated(Arc<Gate>);

impl Syncer for Gated {
    fn data(&self, file: &File) -> io::Result<()> {
        let mut state = self.0.state.lock();
        state.waiting = true;
        self.0.changed.notify_all();
        self.0.changed.wait_while(&mut state, |state| !state.open);
        if self.0.fail.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(5));
        }
        KernelSync.data(file)
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        KernelSync.directory(path)
    }
}

impl Gate {
    fn wait_until_reached(&self) {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| !state.waiting);
    }

    fn close(&self) {
        self.state.lock().open = false;
    }

    fn open(&self) {
        self.state.lock().open = true;
        self.changed.notify_all();
    }
}

fn gated(dir: &Path) -> (Arc<Gate>, Arc<DiskTier>) {
    gated_within(dir, Limits::default())
}

fn gated_within(dir: &Path, limits: Limits) -> (Arc<Gate>, Arc<DiskTier>) {
    let gate = Arc::new(Gate::default());
    let seams = Seams {
        sync: Box::new(Gated(Arc::clone(&gate))),
        limits,
        ..Seams::default()
    };
    (gate, DiskTier::open_with(config(dir), seams).unwrap())
}

#[tokio::test]
async fn coverage_is_never_committed_before_its_data_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, tier) = gated(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    gate.wait_until_reached();
    assert_holds(&held, "x", range(0, SEGMENT)).await;
    assert_eq!(rows(dir.path(), "segments"), 0);
    let crashed = crash_copy(dir.path());
    gate.open();
    tier.flush().await.unwrap();
    assert_eq!(rows(dir.path(), "segments"), 1);
    assert!(
        open(crashed.path())
            .load(&revision("x", "a"))
            .await
            .is_none()
    );
}

#[tokio::test]
async fn what_cannot_be_synced_is_not_kept_and_writes_are_refused_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, tier) = gated(dir.path());
    gate.fail.store(true, Ordering::Release);
    gate.open();
    let held = put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    assert_eq!(
        held.first_missing(range(0, SEGMENT)),
        Some(range(0, SEGMENT))
    );
    assert_eq!(segment_files(dir.path()), Vec::<PathBuf>::new());
    assert_eq!(rows(dir.path(), "segments"), 0);
    assert!(tier.stats().degraded);
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert_eq!(tier.stats().used_bytes, 0);
}

#[tokio::test]
async fn min_free_is_left_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let greedy = DiskConfig {
        min_free: MinFree::Percent(100.0),
        ..config(dir.path())
    };
    let tier = DiskTier::open(greedy).unwrap();
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
}

/// All that the catalog knows of the small queue is being sent, and the rest of it has no row yet: that is waited for. What is
/// hot does not go in its place.
#[tokio::test]
async fn what_is_hot_does_not_go_instead_of_what_has_no_row_yet() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, tier) = gated(dir.path());
    gate.open();
    let whole = range(0, SEGMENT);
    let hot = put(&tier, "hot", SEGMENT).await;
    for _ in 0..3 {
        assert_holds(&hot, "hot", whole).await;
    }
    let mut sent = Vec::new();
    for count in 0..13 {
        let held = put(&tier, &format!("sent {count}"), SEGMENT).await;
        let Step::Present(extent) = held.step(whole) else {
            panic!("it was just written")
        };
        sent.push(extent);
    }
    tier.flush().await.unwrap();
    gate.close();
    let newest = [
        put(&tier, "new 1", SEGMENT).await,
        put(&tier, "new 2", SEGMENT).await,
    ];
    assert_eq!(tier.stats().used_bytes, CAPACITY);
    let mut reserving = {
        let tier = Arc::clone(&tier);
        tokio::spawn(async move { tier.reserve(SEGMENT).await })
    };
    // On a slow machine it may not have got that far, and the rest of the test says less.
    let early = tokio::time::timeout(Duration::from_millis(300), &mut reserving).await;
    assert!(early.is_err(), "something went that had a row");
    gate.open();
    drop(reserving.await.unwrap().unwrap());
    assert_eq!(hot.first_missing(whole), None);
    let gone = newest
        .iter()
        .filter(|held| held.first_missing(whole).is_some());
    assert_eq!(gone.count(), 1);
}

/// The file system is smaller than the capacity, and others fill it: what is cold makes room for them.
#[tokio::test]
async fn eviction_leaves_min_free_to_others() {
    const TOTAL: u64 = 12 * SEGMENT;
    let dir = tempfile::tempdir().unwrap();
    let others = Arc::new(AtomicU64::new(0));
    let (ours, theirs) = (dir.path().to_owned(), Arc::clone(&others));
    let available = move || {
        let files = segment_files(&ours).into_iter();
        let used: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
        TOTAL - used - theirs.load(Ordering::Acquire)
    };
    let seen = available.clone();
    let seams = Seams {
        file_system: Box::new(move |_| {
            Ok(Space {
                total: TOTAL,
                available: seen(),
                files: u64::MAX,
            })
        }),
        ..Seams::default()
    };
    let config = DiskConfig {
        min_free: MinFree::Percent(25.0),
        ..config(dir.path())
    };
    let tier = DiskTier::open_with(config, seams).unwrap();
    let hot = put(&tier, "hot", 2 * SEGMENT).await;
    for round in 0..5 {
        others.store(round * SEGMENT, Ordering::Release);
        for count in 0..10 {
            put(&tier, &format!("{round} {count}"), SEGMENT).await;
            assert_holds(&hot, "hot", range(0, 2 * SEGMENT)).await;
            // The first writes may find room where others came since the last look.
            assert!(count == 0 || available() >= TOTAL / 4, "{round} {count}");
        }
        assert!(available() < TOTAL / 4 + 2 * SEGMENT, "it uses what it may");
    }
}

#[tokio::test]
async fn a_closed_tier_refuses_and_still_sends() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    tier.close().await.unwrap();
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert!(tier.flush().await.is_err());
    assert!(tier.purge(PurgeTarget::Key(key("x"))).await.is_err());
    assert!(tier.load(&revision("x", "a")).await.is_none());
    assert_holds(&held, "x", range(0, SEGMENT)).await;
}

// === a disk that hangs ===

/// Waits no longer than a healthy operation beside busy tests needs.
fn impatient() -> Limits {
    let limit = Duration::from_secs(1);
    Limits {
        catalog: limit,
        write: limit,
        open: limit,
        // Other tests' disks are busy as well; where it matters, a test says so.
        sync: Duration::from_mins(1),
    }
}

fn open_within(dir: &Path, limits: Limits) -> Arc<DiskTier> {
    let seams = Seams {
        limits,
        ..Seams::default()
    };
    DiskTier::open_with(config(dir), seams).unwrap()
}

/// Asks until `wanted` comes true, which nothing announces.
async fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(30);
    while !wanted() {
        assert!(Instant::now() < patience, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Runs `lock` on a thread of its own, which is to take a lock and call what it is given: that returns once the
/// result of this is dropped.
fn hold(lock: impl FnOnce(&dyn Fn()) + Send + 'static) -> Held {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (locked, is_locked) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        lock(&|| {
            locked.send(()).unwrap();
            // An error once the sender is gone.
            let _ = released.recv();
        });
    });
    is_locked.recv().unwrap();
    Held(Some(release), Some(holder))
}

struct Held(
    Option<std::sync::mpsc::Sender<()>>,
    Option<std::thread::JoinHandle<()>>,
);

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.take());
        if let Some(holder) = self.1.take() {
            holder.join().unwrap();
        }
    }
}

#[tokio::test]
async fn a_write_that_hangs_is_given_up_and_the_episode_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open_within(dir.path(), impatient());
    let held = admit(&tier, "x", 2 * SEGMENT).await;
    let reservation = tier.reserve(2 * SEGMENT).await.unwrap();
    let mut writer = held.writer(range(0, 2 * SEGMENT), reservation);
    let bytes = Bytes::from(body("x", 2 * SEGMENT));
    let first = bytes.slice(..SEGMENT as usize);
    writer.write(vec![first]).await.unwrap();
    tier.flush().await.unwrap();

    // The second segment's file cannot be made.
    let making = Arc::clone(&held);
    let hang = hold(move |until_released| {
        let _creating = making.creating.lock();
        until_released();
    });
    let second = bytes.slice(SEGMENT as usize..SEGMENT as usize + 10);
    let error = writer.write(vec![second]).await.unwrap_err();
    assert!(matches!(error, DiskError::Hangs { .. }), "{error}");
    drop(writer);
    assert!(tier.stats().degraded);
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert!(tier.load(&revision("unknown", "a")).await.is_none());
    let refused = tier.admit(&key("y"), &representation("a", 1)).await;
    assert!(matches!(refused, Err(DiskError::Hangs { .. })));
    assert_holds(&held, "x", range(0, SEGMENT)).await;

    drop(hang);
    until("writes again", || !tier.stats().degraded).await;
    put(&tier, "y", BLOCK).await;
    tier.flush().await.unwrap();
    until("what hung has given its room back", || {
        tier.stats().used_bytes == SEGMENT + BLOCK
    })
    .await;
}

#[tokio::test]
async fn a_catalog_that_hangs_holds_few_threads_and_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open_within(dir.path(), impatient());
    let held = put(&tier, "x", BLOCK).await;
    tier.flush().await.unwrap();
    let shared = tier.shared();
    let hang = hold(move |until_released| {
        let _db = shared.catalog.lock();
        until_released();
    });
    let names: Vec<_> = (0..500).map(|n| revision(&format!("n{n}"), "a")).collect();
    let loads = names.iter().map(|name| tier.load(name));
    let found = futures::future::join_all(loads).await;
    assert!(found.iter().all(Option::is_none));
    assert!(
        tier.shared().watch.busy() <= 128,
        "{}",
        tier.shared().watch.busy()
    );
    assert!(tier.last_current(&key("x")).await.is_none());
    let purge = tier.purge(PurgeTarget::Key(key("x"))).await;
    assert!(matches!(purge, Err(DiskError::Hangs { .. })));
    assert_holds(&held, "x", range(0, BLOCK)).await;

    drop(hang);
    until("the catalog answers", || !tier.stats().degraded).await;
    assert!(tier.load(held.revision()).await.is_some());
    put(&tier, "y", BLOCK).await;
}

#[tokio::test]
async fn a_sync_that_hangs_lets_nothing_pile_up() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        sync: Duration::from_secs(1),
        ..Limits::default()
    };
    let (gate, tier) = gated_within(dir.path(), limits);
    let held = put(&tier, "x", SEGMENT).await;
    gate.wait_until_reached();
    until("it takes too long", || tier.stats().degraded).await;
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert_eq!(tier.stats().used_bytes, SEGMENT);
    assert_holds(&held, "x", range(0, SEGMENT)).await;
    gate.open();
    until("it is through", || !tier.stats().degraded).await;
    put(&tier, "y", SEGMENT).await;
    tier.flush().await.unwrap();
    assert_eq!(rows(dir.path(), "segments"), 2);
}

#[tokio::test]
async fn a_file_that_does_not_open_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", BLOCK).await;
    tier.close().await.unwrap();
    // Whoever opens a pipe waits for its other end.
    let file = segment_files(dir.path()).remove(0);
    fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &file,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let tier = open_within(dir.path(), impatient());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    held.open_at(0).await;
    assert!(matches!(held.step(range(0, 1)), Step::Closed));
    assert!(tier.stats().degraded);
    held.open_at(0).await;
    // The other end: now it opens, and is too short.
    drop(OpenOptions::new().write(true).open(&file).unwrap());
    until("it opens", || !tier.stats().degraded).await;
    assert!(matches!(held.step(range(0, 1)), Step::Missing(_)));
    put(&tier, "x", BLOCK).await;
}

// === a directory that goes away, and comes back ===

fn empty(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            remove(&path);
        } else {
            fs::remove_file(path).unwrap();
        }
    }
}

/// The tier may make a file in it just now.
fn remove(dir: &Path) {
    while let Err(error) = fs::remove_dir_all(dir) {
        assert_eq!(error.kind(), io::ErrorKind::DirectoryNotEmpty);
    }
}

#[tokio::test]
async fn a_directory_that_was_deleted_or_replaced_is_begun_anew() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("cache");
    let tier = open(&dir);
    put(&tier, "forgotten", SEGMENT).await;
    tier.flush().await.unwrap();
    let ways: [fn(&Path); 4] = [
        empty,
        remove,
        |dir| fs::rename(dir, dir.with_file_name("elsewhere")).unwrap(),
        |dir| remove(&dir.join("segments")),
    ];
    for (round, take_away) in ways.into_iter().enumerate() {
        let name = format!("x{round}");
        let held = put(&tier, &name, SEGMENT).await;
        tier.flush().await.unwrap();
        let Step::Present(extent) = held.step(range(0, SEGMENT)) else {
            panic!()
        };
        let reservation = tier.reserve(SEGMENT).await.unwrap();
        let started = admit(&tier, "started", SEGMENT).await;
        let mut writer = started.writer(range(0, SEGMENT), reservation);
        let bytes = Bytes::from(body("started", SEGMENT));
        writer.write(vec![bytes.slice(..100)]).await.unwrap();

        take_away(&dir);
        tier.look_after();
        assert!(!tier.stats().out, "{round}: {:?}", tier.trouble());
        assert!(held.is_doomed());
        assert_eq!(bytes_of(&extent), body(&name, SEGMENT), "sent to its end");
        drop(extent);
        let refused = writer.write(vec![bytes.slice(100..)]).await;
        assert!(matches!(refused, Err(DiskError::Purged)), "{refused:?}");
        drop(writer);
        // A re-upload of equal bytes, told to a revision of the old catalog: the new one numbers its own.
        let late = Representation {
            headers: Vec::new(),
            ..representation("a", SEGMENT)
        };
        held.update_representation(Arc::new(late));
        drop((held, started));

        let again = put(&tier, &name, SEGMENT).await;
        assert_holds(&again, &name, range(0, SEGMENT)).await;
        tier.flush().await.unwrap();
        assert_eq!(tier.stats().used_bytes, SEGMENT, "{round}");
        assert_eq!(segment_files(&dir).len(), 1, "{round}");
        assert_eq!(rows(&dir, "segments"), 1, "{round}");
        let stored = tier.load(&revision(&name, "a")).await.unwrap();
        assert!(!stored.representation().headers.is_empty(), "{round}");
        let second = DiskTier::open(config(&dir)).err();
        assert!(
            matches!(second, Some(DiskError::Locked { .. })),
            "{second:?}"
        );
        tier.look_after();
        assert!(!again.is_doomed(), "all is well");
        tier.purge(PurgeTarget::Key(key(&name))).await.unwrap();
    }
    tier.close().await.unwrap();
    assert_eq!(rows(&dir, "meta WHERE name = 'clean' AND value = 1"), 1);
}

#[tokio::test]
async fn what_a_lost_catalog_knew_is_swept_once_the_directory_is_in_use_again() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    // Again and again: the threads must not take the tier for one that is still out, however soon they start.
    for round in 0..20 {
        put(&tier, "x", SEGMENT).await;
        tier.flush().await.unwrap();
        for name in ["lock", "catalog.sqlite"] {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        tier.look_after();
        assert!(!tier.stats().out, "{round}: {:?}", tier.trouble());
        wait_for_sweep(&tier);
        assert!(segment_files(dir.path()).is_empty(), "{round}");
    }
}

#[tokio::test]
async fn bytes_are_given_back_once_though_a_bad_file_cannot_be_taken_out_of_the_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    let key = *held.state.lock().segments.keys().next().unwrap();
    let writer = Connection::open(dir.path().join("catalog.sqlite")).unwrap();
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    tier.shared()
        .quarantine(&held, key, &io::Error::other("no good"));
    drop((writer, held));
    assert_eq!(tier.stats().quarantines, 1);
    assert!(segment_files(dir.path()).is_empty());
    assert_eq!(tier.stats().used_bytes, SEGMENT, "the row is still there");
    assert_eq!(rows(dir.path(), "segments"), 1);
    for name in ["a", "b", "c", "d"] {
        put(&tier, name, 4 * SEGMENT).await;
    }
    tier.flush().await.unwrap();
    let on_disk: u64 = segment_files(dir.path())
        .iter()
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert_eq!(tier.stats().used_bytes, on_disk);
}

#[tokio::test]
async fn a_single_shard_that_was_deleted_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for shard in 0..=255 {
        fs::remove_dir(dir.path().join(format!("segments/{shard:02x}"))).unwrap();
    }
    let held = put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    assert_holds(&held, "x", range(0, SEGMENT)).await;
    assert_eq!(rows(dir.path(), "segments"), 1);
}

#[tokio::test]
async fn a_catalog_that_is_damaged_while_it_is_used_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for n in 0..200 {
        admit(&tier, &format!("{n}{}", "long".repeat(50)), BLOCK).await;
    }
    let kept = put(&tier, "kept", BLOCK).await;
    tier.close().await.unwrap();
    let tier = open(dir.path());
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join("catalog.sqlite"))
        .unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(&vec![0; (len - 4096) as usize], 4096)
        .unwrap();

    assert!(
        tier.load(kept.revision()).await.is_none(),
        "it cannot be looked up"
    );
    // As by a batch that met the damage.
    let damaged = io::Error::other("database disk image is malformed");
    tier.shared()
        .unrecorded
        .note("record in", dir.path(), &damaged);
    tier.look_after();
    assert!(!tier.stats().out, "{:?}", tier.trouble());
    let aside = fs::read_dir(dir.path()).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str()
            .unwrap()
            .starts_with("catalog.sqlite.corrupt-")
    });
    assert!(aside.count() > 0);
    put(&tier, "x", BLOCK).await;
    tier.flush().await.unwrap();
    tier.look_after();
    assert!(tier.load(&revision("x", "a")).await.is_some());
    tier.close().await.unwrap();
    let tier = open(dir.path());
    assert!(
        tier.load(&revision("x", "a")).await.is_some(),
        "it is sound again"
    );
}

/// Damage in what the start itself reads.
#[tokio::test]
async fn a_catalog_that_cannot_begin_a_run_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).close().await.unwrap();
    let catalog = Connection::open(dir.path().join("catalog.sqlite")).unwrap();
    catalog
        .execute("DELETE FROM meta WHERE name = 'suspect_run'", [])
        .unwrap();
    drop(catalog);
    let tier = open(dir.path());
    assert!(!tier.stats().out, "{:?}", tier.trouble());
    put(&tier, "x", BLOCK).await;
}

#[tokio::test]
async fn a_tier_that_cannot_be_opened_is_out_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    // No mistake of a configuration, but nothing to work with.
    let obstacle = dir.path().join("lock");
    fs::create_dir(&obstacle).unwrap();
    let tier = open(dir.path());
    assert!(tier.stats().out && tier.stats().degraded);
    let trouble = tier.trouble().unwrap();
    assert!(trouble.contains("lock"), "{trouble}");
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert!(tier.load(&revision("x", "a")).await.is_none());
    assert!(tier.last_current(&key("x")).await.is_none());
    assert!(tier.purge(PurgeTarget::Key(key("x"))).await.is_err());
    fs::remove_dir(&obstacle).unwrap();
    until("the keeper opens it", || !tier.stats().out).await;
    assert_eq!(tier.trouble(), None);
    put(&tier, "x", BLOCK).await;
    tier.close().await.unwrap();

    fs::create_dir(dir.path().join("other")).unwrap();
    let other = dir.path().join("other/lock");
    fs::create_dir(&other).unwrap();
    let tier = open(&dir.path().join("other"));
    tier.close().await.unwrap();
    fs::remove_dir(&other).unwrap();
    tier.look_after();
    assert!(tier.stats().out, "what was closed is not opened again");
}

#[tokio::test]
async fn what_could_not_be_unlinked_is_removed_once_that_works() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", BLOCK).await;
    tier.flush().await.unwrap();
    // Nobody can unlink a directory, not even root.
    let file = segment_files(dir.path()).remove(0);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    tier.purge(PurgeTarget::Key(key("x"))).await.unwrap();
    assert!(tier.trouble().unwrap().contains("could not unlink"));
    tier.look_after();
    assert!(file.exists());
    fs::remove_dir(&file).unwrap();
    fs::write(&file, "takes room").unwrap();
    tier.look_after();
    assert!(!file.exists());
}
