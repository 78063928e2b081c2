//! A directory that another tier is let into: what the one that left still knows, and how it comes back.

use super::*;

fn file_of(dir: &Path, bytes: &[u8]) -> PathBuf {
    let mut files = segment_files(dir).into_iter();
    files
        .find(|file| fs::read(file).unwrap() == bytes)
        .expect("a file with these bytes")
}

#[tokio::test]
async fn a_released_tier_reads_what_the_other_one_holds_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let left = open(dir.path());
    let before = put(&left, "first", SEGMENT).await;
    left.refuse_writes();
    assert!(matches!(left.reserve(1).await, Err(DiskError::NoRoom)));
    // What was completed before is recorded, whenever it was.
    left.release().await.unwrap();
    let first = left.load(&revision("first", "a")).await.unwrap();
    assert_holds(&first, "first", range(0, SEGMENT)).await;

    let other = open(dir.path());
    put(&other, "second", SEGMENT).await;
    assert!(left.load(&revision("second", "a")).await.is_none());
    other.flush().await.unwrap();
    let second = left.load(&revision("second", "a")).await.unwrap();
    assert_holds(&second, "second", range(0, SEGMENT)).await;

    // Nothing is remembered, so what is purged there is not found here, while what is being read stays readable.
    assert_eq!(left.stats().revisions_in_memory, 0);
    other.purge(PurgeTarget::Key(key("first"))).await.unwrap();
    assert!(left.load(&revision("first", "a")).await.is_none());
    assert_holds(&before, "first", range(0, SEGMENT)).await;
    let purge = left.purge(PurgeTarget::Key(key("second"))).await;
    assert!(purge.is_err());
    let third = representation("a", SEGMENT);
    assert!(left.admit(&key("third"), &third).await.is_err());

    // A file that looks wrong is for the other one to judge.
    let damaged = put(&other, "damaged", SEGMENT).await;
    other.flush().await.unwrap();
    let file = file_of(dir.path(), &body("damaged", SEGMENT));
    let cut = OpenOptions::new().write(true).open(&file).unwrap();
    cut.set_len(SEGMENT - 1).unwrap();
    let seen = left.load(&revision("damaged", "a")).await.unwrap();
    assert_eq!(read(&seen, range(0, SEGMENT)).await, None);
    assert!(file.exists());
    assert_eq!(left.stats().quarantines, 0);
    cut.set_len(SEGMENT).unwrap();
    drop(damaged);

    left.close().await.unwrap();
    assert!(left.load(&revision("second", "a")).await.is_none());
    assert_eq!(other.stats().quarantines, 0);
    other.close().await.unwrap();
    assert_eq!(rows(dir.path(), "segments"), 2);
}

#[tokio::test]
async fn a_reclaimed_tier_has_what_both_have_written() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "first", SEGMENT).await;
    put(&tier, "gone", SEGMENT).await;
    tier.release().await.unwrap();
    let other = open(dir.path());
    assert!(matches!(
        tier.reclaim().await,
        Err(DiskError::Locked { .. })
    ));
    put(&other, "second", 2 * SEGMENT).await;
    other.purge(PurgeTarget::Key(key("gone"))).await.unwrap();
    put(&other, "third", SEGMENT).await;
    other.flush().await.unwrap();
    // By a request that is still at it when the tier is back.
    let looked_up = tier.load(&revision("third", "a")).await.unwrap();
    other.close().await.unwrap();
    let leftover = dir
        .path()
        .join("segments/ab/ab00000000000000000000000000000f.seg");
    fs::write(&leftover, "lost").unwrap();

    tier.reclaim().await.unwrap();
    wait_for_sweep(&tier);
    assert!(!leftover.exists(), "what the other one left over is swept");
    assert_eq!(tier.stats().used_bytes, 4 * SEGMENT);
    tier.purge(PurgeTarget::Key(key("third"))).await.unwrap();
    assert_eq!(read(&looked_up, range(0, SEGMENT)).await, None);
    assert_eq!(tier.stats().quarantines, 0, "that file is no loss");
    assert_eq!(tier.stats().used_bytes, 3 * SEGMENT);
    for (name, size) in [("first", SEGMENT), ("second", 2 * SEGMENT)] {
        let held = tier.load(&revision(name, "a")).await.unwrap();
        assert_holds(&held, name, range(0, size)).await;
    }
    assert!(tier.load(&revision("gone", "a")).await.is_none());
    assert!(DiskTier::open(config(dir.path())).is_err(), "it is locked");
    let third = put(&tier, "third", SEGMENT).await;
    tier.flush().await.unwrap();
    assert_holds(&third, "third", range(0, SEGMENT)).await;
    // Eviction counts right, and reaches what the other one wrote.
    for name in ["a", "b", "c", "d"] {
        put(&tier, name, 4 * SEGMENT).await;
    }
    assert!(tier.stats().used_bytes <= CAPACITY);
    tier.close().await.unwrap();
    let next = open(dir.path());
    assert_eq!(next.stats().used_bytes, tier.stats().used_bytes);
}

#[tokio::test]
async fn what_the_other_one_left_by_dying_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    put(&tier, "first", SEGMENT).await;
    tier.release().await.unwrap();
    let other = open(dir.path());
    put(&other, "second", SEGMENT).await;
    other.flush().await.unwrap();
    drop(other);
    let file = file_of(dir.path(), &body("second", SEGMENT));
    let flip = OpenOptions::new().write(true).open(&file).unwrap();
    flip.write_all_at(&[!body("second", 1)[0]], 0).unwrap();

    // Its threads hold the lock for a moment.
    while let Err(error) = tier.reclaim().await {
        assert!(matches!(error, DiskError::Locked { .. }), "{error}");
        tokio::task::yield_now().await;
    }
    let second = tier.load(&revision("second", "a")).await.unwrap();
    assert_eq!(read(&second, range(0, SEGMENT)).await, None);
    assert!(!file.exists());
    let first = tier.load(&revision("first", "a")).await.unwrap();
    assert_holds(&first, "first", range(0, SEGMENT)).await;
    assert_eq!(tier.stats().used_bytes, SEGMENT);
}
