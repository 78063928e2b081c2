//! Bits that flip on the disk, and what finds them.

use super::offline::OfflineTier;
use super::*;
use crate::object::{Checksum, ChecksumAlgorithm};

/// How long what the scrubber's thread does is waited for; nothing takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Inverts a bit in the middle of block `block` of the only file.
fn flip(path: &Path, block: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let at = block * BLOCK + BLOCK / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn only_file(dir: &Path) -> PathBuf {
    let files = segment_files(dir);
    assert_eq!(files.len(), 1);
    files[0].clone()
}

fn sql(dir: &Path, statements: &str) {
    let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
    catalog.execute_batch(statements).unwrap();
}

async fn scrub(tier: &DiskTier) -> ScrubReport {
    tier.scrub().await.unwrap().expect("no other pass")
}

/// What is there is right, and `missing` bytes are not there.
async fn assert_right_or_missing(held: &HeldRevision, name: &str, size: u64, missing: u64) {
    let expected = body(name, size);
    let mut absent = 0;
    for start in (0..size).step_by(BLOCK as usize) {
        let block = range(start, (start + BLOCK).min(size));
        match read(held, block).await {
            Some(bytes) => assert_eq!(bytes, expected[start as usize..][..bytes.len()]),
            None => absent += block.len(),
        }
    }
    assert_eq!(absent, missing);
}

#[tokio::test]
async fn a_scrub_finds_what_rotted_since_a_clean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", 2 * SEGMENT + 100).await;
    assert_eq!(scrub(&tier).await.corrupt_blocks, 0);
    tier.close().await.unwrap();
    let rotten = segment_files(dir.path());
    let rotten = rotten
        .iter()
        .find(|path| fs::metadata(path).unwrap().len() == SEGMENT)
        .unwrap();
    flip(rotten, 1);
    flip(rotten, 3);

    let tier = open(dir.path());
    let used = tier.stats().used_bytes;
    let found = scrub(&tier).await;
    let bytes = 2 * SEGMENT + 100;
    assert_eq!(
        found,
        ScrubReport {
            segments: 3,
            bytes,
            corrupt_blocks: 2,
            dropped_segments: 1,
            skipped_segments: 0,
        }
    );
    let stats = tier.stats();
    assert_eq!(
        (
            stats.scrubbed_bytes,
            stats.scrubbed_segments,
            stats.corrupt_blocks,
            stats.quarantines
        ),
        (bytes, 3, 2, 1)
    );
    assert_eq!(stats.used_bytes, used - SEGMENT);
    assert!(!rotten.exists());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    assert_right_or_missing(&held, "x", bytes, SEGMENT).await;
    // What is fetched again is whole, and goes into a new file.
    let gap = held.first_missing(range(0, bytes)).unwrap();
    write(&tier, &held, "x", gap).await;
    assert_holds(&held, "x", range(0, bytes)).await;
    assert_eq!(scrub(&tier).await.dropped_segments, 0);
}

#[tokio::test]
async fn rot_below_what_is_being_sent_takes_the_file_away_and_leaves_it_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    let Step::Present(extent) = held.step(range(0, SEGMENT)) else {
        panic!("it was just written");
    };
    tier.flush().await.unwrap();
    flip(&only_file(dir.path()), 2);
    let before = bytes_of(&extent);
    // Written moments ago, which the clock need not tell apart from now.
    sql(dir.path(), "UPDATE segments SET verified = 0");
    assert_eq!(scrub(&tier).await.dropped_segments, 1);
    assert_eq!(bytes_of(&extent), before, "never rewritten");
    assert!(segment_files(dir.path()).is_empty());
    assert!(matches!(held.step(range(0, 1)), Step::Missing(_)));
    assert_eq!(tier.stats().used_bytes, SEGMENT, "somebody has it open");
    drop(extent);
    assert_eq!(tier.stats().used_bytes, 0);
}

#[tokio::test]
async fn a_file_that_is_gone_or_short_is_found_too() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    // All in one run: after another start the sweep looks for files that are gone as well, and may be first.
    put(&tier, "gone", SEGMENT).await;
    tier.flush().await.unwrap();
    let gone = only_file(dir.path());
    put(&tier, "short", SEGMENT).await;
    tier.flush().await.unwrap();
    let short = segment_files(dir.path())
        .into_iter()
        .find(|file| *file != gone)
        .unwrap();
    fs::remove_file(gone).unwrap();
    let short = OpenOptions::new().write(true).open(short).unwrap();
    short.set_len(SEGMENT - 1).unwrap();
    // Written moments ago, which the clock need not tell apart from now.
    sql(dir.path(), "UPDATE segments SET verified = 0");

    let found = scrub(&tier).await;
    assert_eq!((found.dropped_segments, found.corrupt_blocks), (2, 0));
    assert_eq!(tier.stats().used_bytes, 0);
    assert_eq!(rows(dir.path(), "segments"), 0);
}

/// The thread begins with what was verified longest ago, goes on where the last run stopped, and leaves what
/// was verified today alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_thread_verifies_what_is_due_and_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "old", SEGMENT).await;
    tier.close().await.unwrap();
    let old = only_file(dir.path());
    sql(dir.path(), "UPDATE segments SET verified = 1000");
    let tier = open(dir.path());
    put(&tier, "new", SEGMENT).await;
    tier.close().await.unwrap();
    for file in segment_files(dir.path()) {
        flip(&file, 0);
    }

    let scrubbing = || {
        let config = DiskConfig {
            scrub_rate: 1 << 30,
            ..config(dir.path())
        };
        DiskTier::open(config).unwrap()
    };
    let tier = scrubbing();
    let deadline = Instant::now() + PATIENCE;
    while old.exists() {
        assert!(Instant::now() < deadline, "{:?}", tier.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let new = only_file(dir.path());
    tier.close().await.unwrap();
    assert!(new.exists(), "it was written today");
    assert_eq!(tier.stats().corrupt_blocks, 1);

    // It looks, and leaves it alone.
    let tier = scrubbing();
    while tier.stats().oldest_verified.is_zero() {
        assert!(Instant::now() < deadline, "it does not look");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tier.close().await.unwrap();
    assert_eq!(tier.stats().scrubbed_bytes, 0);

    // A day later, as it were, its turn comes; and a right one is stamped.
    flip(&new, 0);
    sql(dir.path(), "UPDATE segments SET verified = 1000");
    let tier = scrubbing();
    while tier.stats().scrubbed_segments == 0 {
        assert!(Instant::now() < deadline, "{:?}", tier.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tier.close().await.unwrap();
    let tier = scrubbing();
    tier.scrub().await.unwrap();
    assert!(tier.stats().oldest_verified < Duration::from_hours(1));
    tier.close().await.unwrap();
    assert!(new.exists());
}

#[tokio::test]
async fn a_rate_of_zero_reads_nothing_and_still_scrubs_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    tier.close().await.unwrap();
    sql(dir.path(), "UPDATE segments SET verified = 1000");
    let tier = open(dir.path());
    // By then the thread has looked, as it does first of all.
    scrub(&tier).await;
    assert_eq!(tier.stats().scrubbed_segments, 1);
}

#[tokio::test]
async fn what_the_scrubber_verified_after_a_crash_is_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    let copy = crash_copy(dir.path());
    let tier = open(copy.path());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    scrub(&tier).await;
    // Were it read now, it would be dropped.
    flip(&only_file(copy.path()), 0);
    held.open_at(0).await;
    assert!(matches!(held.step(range(0, 1)), Step::Present(_)));
    // Neither is it by the next run, but for the crash between.
    tier.close().await.unwrap();
    let tier = open(copy.path());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    held.open_at(0).await;
    assert!(matches!(held.step(range(0, 1)), Step::Present(_)));
    drop((held, tier));
    let tier = open(crash_copy(copy.path()).path());
    assert_eq!(tier.stats().quarantines, 0);
}

#[tokio::test]
async fn a_row_that_says_something_else_than_was_written_serves_nothing() {
    for damage in [
        // Another place in the revision, a hole as a block, another revision's bytes, another length.
        "UPDATE segments SET idx = 1 - idx WHERE revision = 1 AND idx IN (0, 1)",
        "UPDATE segments SET bits = x'0F00000000000000' WHERE revision = 2",
        "UPDATE segments SET revision = 3 - revision WHERE idx = 0",
        "UPDATE revisions SET size = size + 1",
        "UPDATE revisions SET key = CASE id WHEN 1 THEN 'y' ELSE 'x' END, validator = '\"b\"'",
        "UPDATE segments SET run = run + 1",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tier = open(dir.path());
        put(&tier, "x", 2 * SEGMENT).await;
        let held = admit(&tier, "y", SEGMENT).await;
        write(&tier, &held, "y", range(0, BLOCK)).await;
        tier.close().await.unwrap();
        sql(dir.path(), damage);

        let tier = open(dir.path());
        for (name, tag) in [("x", "a"), ("y", "a"), ("x", "b"), ("y", "b")] {
            let Some(held) = tier.load(&revision(name, tag)).await else {
                continue;
            };
            let size = held.representation().size;
            let expected = body(name, size);
            for start in (0..size).step_by(BLOCK as usize) {
                let block = range(start, (start + BLOCK).min(size));
                if let Some(bytes) = read(&held, block).await {
                    assert_eq!(tag, "a", "{damage}: {name} has no such revision");
                    assert!(expected[start as usize..].starts_with(&bytes), "{damage}");
                }
            }
        }
        let found = scrub(&tier).await;
        assert!(found.dropped_segments > 0, "{damage}: {found:?}");
        assert_eq!(scrub(&tier).await.dropped_segments, 0, "{damage}");
    }
}

#[tokio::test]
async fn the_catalog_of_an_earlier_version_works_on() {
    let dir = tempfile::tempdir().unwrap();
    let size = SEGMENT + 100;
    let tier = open(dir.path());
    put(&tier, "x", size).await;
    tier.close().await.unwrap();
    to_version_1(dir.path());

    let tier = open(dir.path());
    let held = tier.load(&revision("x", "a")).await.unwrap();
    assert_holds(&held, "x", range(0, size)).await;
    let found = scrub(&tier).await;
    assert_eq!((found.segments, found.dropped_segments), (2, 0));
    // No CRC64 was kept, so the bytes are read for it.
    for algorithm in ChecksumAlgorithm::ALL {
        assert_eq!(
            tier.checksum_of(&revision("x", "a"), algorithm)
                .await
                .unwrap(),
            Computed::Checksum(Checksum::of(algorithm, &body("x", size)))
        );
    }
    tier.close().await.unwrap();
    let whole = segment_files(dir.path())
        .into_iter()
        .find(|path| fs::metadata(path).unwrap().len() == SEGMENT);
    flip(&whole.unwrap(), 0);
    let tier = open(dir.path());
    assert_eq!(scrub(&tier).await.corrupt_blocks, 1);
}

#[tokio::test]
async fn the_checksum_of_a_whole_is_that_of_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let size = 3 * SEGMENT + BLOCK + 100;
    let tier = open(dir.path());
    let held = admit(&tier, "x", size).await;
    // Out of order, over two runs, so that a segment has two files.
    write(&tier, &held, "x", range(SEGMENT, SEGMENT + 2 * BLOCK)).await;
    write(&tier, &held, "x", range(2 * SEGMENT, size)).await;
    tier.flush().await.unwrap();
    let named = revision("x", "a");
    let of = async |tier: &DiskTier, algorithm| tier.checksum_of(&named, algorithm).await.unwrap();
    assert_eq!(
        of(&tier, ChecksumAlgorithm::Sha1).await,
        Computed::Incomplete
    );
    tier.close().await.unwrap();
    drop((held, tier));
    let tier = open(dir.path());
    let held = tier.load(&named).await.unwrap();
    write(&tier, &held, "x", range(0, SEGMENT)).await;
    write(&tier, &held, "x", range(SEGMENT + 2 * BLOCK, 2 * SEGMENT)).await;
    tier.flush().await.unwrap();
    for algorithm in ChecksumAlgorithm::ALL {
        let expected = Checksum::of(algorithm, &body("x", size));
        assert_eq!(of(&tier, algorithm).await, Computed::Checksum(expected));
    }

    tier.set_whole(&named, Whole::None).await.unwrap();
    assert_eq!(tier.whole(&named).await.unwrap(), Some(Whole::None));
    let whole = Whole::Is(Checksum::of(ChecksumAlgorithm::Sha256, b"x"));
    tier.set_whole(&named, whole.clone()).await.unwrap();
    tier.close().await.unwrap();
    let tier = open(dir.path());
    assert_eq!(tier.whole(&named).await.unwrap(), Some(whole));

    let dropped = tier.drop_revision(&named).await.unwrap();
    let taken = size.next_multiple_of(BLOCK);
    assert_eq!((dropped.revisions, dropped.bytes), (1, taken));
    assert_eq!(tier.stats().used_bytes, 0);
    assert!(tier.load(&named).await.is_none());
    assert!(segment_files(dir.path()).is_empty());
    assert_eq!(
        of(&tier, ChecksumAlgorithm::Crc32c).await,
        Computed::Incomplete
    );
}

#[tokio::test]
async fn two_files_that_contradict_each_other_have_no_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let held = put(&tier, "x", SEGMENT).await;
    tier.flush().await.unwrap();
    // A second copy of a block, of other bytes: as if S3 had sent two things under one validator.
    let reservation = tier.reserve(BLOCK).await.unwrap();
    let mut writer = held.writer(range(0, BLOCK), reservation);
    writer
        .write(vec![Bytes::from(vec![9; BLOCK as usize])])
        .await
        .unwrap();
    drop(writer);
    tier.flush().await.unwrap();
    let computed = tier
        .checksum_of(&revision("x", "a"), ChecksumAlgorithm::Crc64Nvme)
        .await;
    assert_eq!(computed.unwrap(), Computed::Contradiction);
}

#[tokio::test]
async fn a_revision_is_announced_when_all_of_it_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let mut completions = tier.completions().unwrap();
    assert!(tier.completions().is_none());
    let held = admit(&tier, "x", 2 * SEGMENT).await;
    write(&tier, &held, "x", range(SEGMENT, 2 * SEGMENT)).await;
    tier.flush().await.unwrap();
    assert!(completions.try_recv().is_err(), "half of it");
    write(&tier, &held, "x", range(0, SEGMENT)).await;
    tier.flush().await.unwrap();
    assert_eq!(completions.try_recv().unwrap(), revision("x", "a"));
    assert!(completions.try_recv().is_err(), "once");
    // What nobody could compare is offered again when the scrubber comes by.
    sql(dir.path(), "UPDATE segments SET verified = 0");
    scrub(&tier).await;
    assert_eq!(completions.try_recv().unwrap(), revision("x", "a"));
    tier.set_whole(&revision("x", "a"), Whole::None)
        .await
        .unwrap();
    sql(dir.path(), "UPDATE segments SET verified = 0");
    scrub(&tier).await;
    assert!(completions.try_recv().is_err());
}

#[tokio::test]
async fn an_offline_check_finds_the_same_and_changes_nothing_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "good", SEGMENT).await;
    put(&tier, "bad", SEGMENT).await;
    put(&tier, "other", SEGMENT).await;
    tier.flush().await.unwrap();
    let sum = |name: &str| Checksum::of(ChecksumAlgorithm::Crc64Nvme, &body(name, SEGMENT));
    for (name, said) in [("good", "good"), ("other", "good")] {
        let whole = Whole::Is(sum(said));
        tier.set_whole(&revision(name, "a"), whole).await.unwrap();
    }
    assert!(matches!(
        OfflineTier::open(dir.path()),
        Err(DiskError::Locked { .. })
    ));
    tier.close().await.unwrap();
    drop(tier);
    let of_bad = segment_files(dir.path())
        .into_iter()
        .find(|path| fs::read(path).unwrap() == body("bad", SEGMENT))
        .unwrap();
    flip(&of_bad, 1);

    for repair in [false, false, true] {
        let mut offline = OfflineTier::open(dir.path()).unwrap();
        assert_eq!(offline.totals().unwrap(), (3, 3 * SEGMENT));
        let mut read = 0;
        let found = offline.verify(repair, |bytes| read += bytes).unwrap();
        assert_eq!((found.segments, found.bytes), (3, 3 * SEGMENT));
        assert_eq!(read, found.bytes);
        assert_eq!((found.corrupt_blocks, found.whole_objects), (1, 2));
        let bad: Vec<_> = found
            .bad
            .iter()
            .map(|bad| (bad.key.as_str(), bad.file.as_deref()))
            .collect();
        assert_eq!(bad, [("bad", Some(of_bad.as_path())), ("other", None)]);
    }
    let mut offline = OfflineTier::open(dir.path()).unwrap();
    let found = offline.verify(false, |_| {}).unwrap();
    assert!(found.is_clean(), "{found:?}");
    assert_eq!((found.segments, segment_files(dir.path()).len()), (1, 1));
    drop(offline);
    let tier = open(dir.path());
    assert_eq!(tier.stats().used_bytes, SEGMENT);
    let held = tier.load(&revision("good", "a")).await.unwrap();
    assert_holds(&held, "good", range(0, SEGMENT)).await;
}

#[test]
fn there_may_be_nothing_to_check() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        OfflineTier::open(dir.path()),
        Err(DiskError::Io { op: "open", .. })
    ));
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
}
