//! What the tier takes of the disk: bytes, files, and the catalog's log.

use super::super::catalog::{Catalog, LOG_MOVED_FROM, LONGEST_LOG};
use super::super::whole::Whole;
use super::*;

fn log_of(dir: &Path) -> u64 {
    fs::metadata(dir.join("catalog.sqlite-wal")).map_or(0, |log| log.len())
}

/// Nobody moves the log beside the commits, as if they came too fast for that.
#[test]
fn commits_bound_the_catalogs_log_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, _start) = Catalog::open(dir.path(), &KernelSync).unwrap();
    let mut db = catalog.lock().unwrap();
    let mut longest = 0;
    for count in 0..2000 {
        let name = key(&format!("object {count}"));
        let (stored, _) = db
            .admit(&name, &representation("a", 8), SEGMENT, BLOCK, false)
            .unwrap();
        db.set_whole(stored.id, &Whole::None).unwrap();
        longest = longest.max(log_of(dir.path()));
    }
    assert!(longest > LOG_MOVED_FROM, "{longest}: this tests nothing");
    assert!(longest < LONGEST_LOG, "{longest}");
}

/// Less room than the log may take is none: what the cache holds gives way, once the catalog cannot be written.
#[tokio::test]
async fn a_disk_that_cannot_take_the_longest_log_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let available = Arc::new(AtomicU64::new(u64::MAX));
    let left = Arc::clone(&available);
    let seams = Seams {
        file_system: Box::new(move |_| {
            Ok(Space {
                total: 1 << 40,
                available: left.load(Ordering::Relaxed),
                files: u64::MAX,
            })
        }),
        ..Seams::default()
    };
    let tier = DiskTier::open_with(config(dir.path()), seams).unwrap();
    for (room, full) in [(LONGEST_LOG, false), (LONGEST_LOG - 1, true)] {
        available.store(room, Ordering::Relaxed);
        assert_eq!(tier.shared.is_full(), full, "{room}");
    }
}

/// Admissions, batches, checksums of wholes, passes of the scrubber, evictions: whatever commits, and beside whom.
#[tokio::test(flavor = "multi_thread")]
async fn the_catalogs_log_stays_short_under_thousands_of_small_objects() {
    for (scrub, verify) in [(false, false), (true, true)] {
        let dir = tempfile::tempdir().unwrap();
        let tier = DiskTier::open(DiskConfig {
            capacity: 500 * BLOCK,
            scrub_rate: if scrub { 1 << 30 } else { 0 },
            ..config(dir.path())
        })
        .unwrap();
        let mut longest = 0;
        for count in 0..1500 {
            let name = format!("object {count}");
            put(&tier, &name, 8).await;
            if verify {
                let whole = Whole::None;
                tier.set_whole(&revision(&name, "a"), whole).await.unwrap();
            }
            if scrub && count % 500 == 499 {
                tier.scrub().await.unwrap().unwrap();
            }
            longest = longest.max(log_of(dir.path()));
        }
        assert!(longest < LONGEST_LOG, "{longest} {scrub} {verify}");
    }
}

/// One transaction may be as long as it likes, and its place in the log is given back.
#[tokio::test]
async fn the_log_of_a_long_transaction_is_cut_again() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for count in 0..40 {
        // Headers of a page each.
        let mut long = representation("a", 8);
        long.headers = vec![("x-amz-meta-long".into(), "x".repeat(8000).into())];
        tier.admit(&key(&format!("long {count}")), &long)
            .await
            .unwrap();
    }
    let all = PurgeTarget::Prefix {
        store: "store".into(),
        prefix: String::new(),
    };
    tier.purge(all).await.unwrap();
    assert!(log_of(dir.path()) > LOG_MOVED_FROM, "this tests nothing");
    let small = Arc::new(representation("a", 8));
    // The first batch has it moved, the next commit begins it anew.
    until("the log is cut", || {
        tier.set_current(&key("small"), Some(&small));
        log_of(dir.path()) <= LOG_MOVED_FROM
    })
    .await;
}

/// A file system on which `most` files can be made, ours and `others`.
fn with_files(dir: &Path, most: u64, others: &Arc<AtomicU64>) -> Seams {
    let (ours, others) = (dir.to_owned(), Arc::clone(others));
    Seams {
        file_system: Box::new(move |_| {
            let taken = segment_files(&ours).len() as u64 + others.load(Ordering::Acquire);
            Ok(Space {
                total: 1 << 40,
                available: 1 << 39,
                files: most.saturating_sub(taken),
            })
        }),
        ..Seams::default()
    }
}

#[tokio::test]
async fn a_file_system_without_inodes_is_a_full_disk_like_any_other() {
    const MOST: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let others = Arc::new(AtomicU64::new(0));
    let seams = with_files(dir.path(), MOST, &others);
    let config = DiskConfig {
        capacity: 1 << 30,
        ..config(dir.path())
    };
    let tier = DiskTier::open_with(config, seams).unwrap();
    for count in 0..200 {
        put(&tier, &format!("object {count}"), 8).await;
        let files = segment_files(dir.path()).len() as u64;
        assert!(files < MOST, "{files} after {count}");
    }
    assert!(tier.stats().evictions > 100);
    assert!(!tier.stats().degraded, "{:?}", tier.trouble());

    // Others take them all: what is ours goes, and then there is nothing to be done.
    others.store(MOST, Ordering::Release);
    *tier.shared().free_space.lock() = None;
    assert!(matches!(tier.reserve(1).await, Err(DiskError::NoRoom)));
    assert_eq!(segment_files(dir.path()).len(), 0);
    let trouble = tier.trouble().unwrap();
    assert!(trouble.contains("inodes too few are free"), "{trouble}");
    // And they give them back, which shows without a request.
    others.store(0, Ordering::Release);
    until("it is well", || !tier.stats().degraded).await;
    put(&tier, "again", 8).await;
}

/// The kernel has the last word: the look at the file system was too old, or it does not count its files.
#[tokio::test]
async fn a_file_that_could_not_be_made_for_want_of_inodes_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let others = Arc::new(AtomicU64::new(1000));
    let tier =
        DiskTier::open_with(config(dir.path()), with_files(dir.path(), 1000, &others)).unwrap();
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let told = tier.shared().not_made(full());
    assert_eq!(told.kind(), io::ErrorKind::StorageFull);
    assert!(told.to_string().contains("inode"), "{told}");
    others.store(10, Ordering::Release);
    let told = tier.shared().not_made(full());
    assert!(!told.to_string().contains("inode"), "{told}");
}

/// While writes are refused no reservation makes room, so the look after trouble does: with files as with the catalog.
#[tokio::test]
async fn a_disk_full_of_our_files_gets_well_though_writes_are_refused() {
    for with_catalog in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let others = Arc::new(AtomicU64::new(0));
        let tier = DiskTier::open_with(
            DiskConfig {
                capacity: 1 << 30,
                ..config(dir.path())
            },
            with_files(dir.path(), 100, &others),
        )
        .unwrap();
        for count in 0..30 {
            put(&tier, &format!("object {count}"), 8).await;
        }
        tier.flush().await.unwrap();
        others.store(60, Ordering::Release);
        let shared = tier.shared();
        let full = shared.not_made(io::ErrorKind::StorageFull.into());
        if with_catalog {
            shared.unrecorded.note("record in", dir.path(), &full);
        } else {
            shared.trouble.note("create", dir.path(), &full);
        }
        until("room was made", || segment_files(dir.path()).is_empty()).await;
        others.store(0, Ordering::Release);
        until("it is well", || !tier.stats().degraded).await;
    }
}

#[tokio::test]
async fn a_lowered_capacity_is_applied_without_a_fill() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for count in 0..16 {
        put(&tier, &format!("object {count}"), SEGMENT).await;
    }
    assert_eq!(tier.stats().used_bytes, CAPACITY);
    tier.close().await.unwrap();

    let capacity = 5 * SEGMENT;
    let tier = DiskTier::open(DiskConfig {
        capacity,
        ..config(dir.path())
    })
    .unwrap();
    wait_for_sweep(&tier);
    assert_eq!(tier.stats().used_bytes, capacity);
    assert_eq!(segment_files(dir.path()).len(), 5);
    assert_eq!(rows(dir.path(), "segments"), 5);
    // What came last is still there.
    assert!(tier.load(&revision("object 15", "a")).await.is_some());
}

#[tokio::test]
async fn bytes_in_blocks_of_another_size_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", 3 * BLOCK).await;
    tier.close().await.unwrap();
    let count = |block_size| {
        let reader = Catalog::reader(dir.path()).unwrap();
        reader.bytes_in_other_blocks(block_size).unwrap()
    };
    assert_eq!(count(BLOCK), 0);
    assert_eq!(count(2 * BLOCK), 3 * BLOCK);
}

/// A file takes whole blocks of the file system, however little is in it.
#[tokio::test]
async fn small_objects_count_what_they_take() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for count in 0..10 {
        put(&tier, &format!("object {count}"), 8).await;
    }
    assert_eq!(tier.stats().used_bytes, 10 * BLOCK);
    tier.close().await.unwrap();
    let tier = open(dir.path());
    assert_eq!(tier.stats().used_bytes, 10 * BLOCK);
    for count in 10..200 {
        put(&tier, &format!("object {count}"), 8).await;
        let files = segment_files(dir.path()).len() as u64;
        assert!(files <= CAPACITY / BLOCK, "{files} after {count}");
    }
    let taken: u64 = segment_files(dir.path())
        .iter()
        .map(|file| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512)
        .sum();
    assert!(taken <= CAPACITY, "{taken}");
}

/// Eviction counts a read of all that there is as a visit, not of what it takes.
#[tokio::test]
async fn a_small_object_that_is_read_again_outlives_those_that_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    // Past the beginning, where everything is let into main.
    for count in 0..64 {
        put(&tier, &format!("first {count}"), 8).await;
    }
    let hot = put(&tier, "hot", 8).await;
    for _ in 0..3 {
        assert_holds(&hot, "hot", range(0, 8)).await;
    }
    for count in 0..300 {
        put(&tier, &format!("scan {count}"), 8).await;
    }
    assert_eq!(hot.first_missing(range(0, 8)), None);
}
