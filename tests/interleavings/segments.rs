//! The disk tier (`src/disk`) among writers, readers, evictions and purges.
//!
//! Whatever comes in between: who may send, sends the revision's bytes; the account never exceeds the capacity; and
//! when everything is purged and let go, nothing is left on disk or in the account.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use shuttle::future::block_on;
use shuttle::thread;
use tempfile::TempDir;

use crate::Check;
use crate::chance::seeded;
use crate::disk::{
    DiskConfig, DiskTier, FileExtent, HeldRevision, MinFree, PurgeTarget, Step, WriterView, inline,
};
use crate::object::{ObjectKey, Representation, Validator};
use crate::semantics::{ByteRange, RangeSpec};

pub(crate) const CHECKS: &[Check] = &[
    (
        "who_reads_beside_a_writer_reads_its_bytes",
        who_reads_beside_a_writer_reads_its_bytes,
        25,
    ),
    (
        "a_purge_leaves_nothing_of_a_writer",
        a_purge_leaves_nothing_of_a_writer,
        25,
    ),
    (
        "what_is_evicted_is_gone_for_all",
        what_is_evicted_is_gone_for_all,
        25,
    ),
    ("a_bad_file_is_dropped_once", a_bad_file_is_dropped_once, 25),
];

const BLOCK: u64 = 4096;
/// Of two blocks.
const SEGMENT: u64 = 2 * BLOCK;
const CAPACITY: u64 = 16 * SEGMENT;

struct Tier {
    disk: Arc<DiskTier>,
    dir: TempDir,
}

impl Tier {
    fn open() -> Self {
        seeded::by(1);
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            TempDir::new_in(shm)
        } else {
            TempDir::new()
        };
        let dir = dir.unwrap();
        let config = DiskConfig {
            dir: dir.path().to_owned(),
            capacity: CAPACITY,
            min_free: MinFree::Bytes(0),
            block_size: BLOCK,
            scrub_rate: 0,
        };
        let disk = inline::open(config).unwrap();
        Self { disk, dir }
    }

    fn admit(&self, name: &str, size: u64) -> Arc<HeldRevision> {
        block_on(self.disk.admit(&key(name), &representation(size))).unwrap()
    }

    /// Everything let go and purged: nothing is left.
    fn is_left_empty(&self) {
        let Self { disk, dir } = self;
        block_on(async {
            disk.flush().await.unwrap();
            for name in ["a", "b"] {
                disk.purge(PurgeTarget::Key(key(name))).await.unwrap();
            }
            disk.flush().await.unwrap();
        });
        let stats = disk.stats();
        assert_eq!(stats.used_bytes, 0, "the account");
        assert_eq!(stats.open_files, 0, "descriptors");
        let shards = fs::read_dir(dir.path().join("segments")).unwrap();
        let files: usize = shards
            .map(|shard| fs::read_dir(shard.unwrap().path()).unwrap().count())
            .sum();
        assert_eq!(files, 0, "files");
        block_on(disk.close()).unwrap();
    }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("store", name)
}

fn representation(size: u64) -> Representation {
    Representation {
        validator: Validator::from_etag_field("\"a\"").unwrap(),
        size,
        last_modified: None,
        version_id: None,
        headers: Vec::new(),
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    let last = end - 1;
    RangeSpec::Closed { first: start, last }
        .resolve(end)
        .unwrap()
}

/// Bytes of the stretch; no two blocks are alike.
fn bytes(start: u64, end: u64) -> Vec<u8> {
    (start..end)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Writes the stretch in odd frames; stops where the tier takes no more. `look` comes after each.
fn write(disk: &DiskTier, held: &Arc<HeldRevision>, start: u64, end: u64, look: impl Fn(u64)) {
    write_watched(disk, held, start, end, |_| {}, look);
}

/// As [`write`]; `watch` gets what others may send behind the cursor.
fn write_watched(
    disk: &DiskTier,
    held: &Arc<HeldRevision>,
    start: u64,
    end: u64,
    watch: impl FnOnce(Arc<WriterView>),
    look: impl Fn(u64),
) {
    block_on(async {
        let Ok(reservation) = disk.reserve(end - start).await else {
            return;
        };
        let mut writer = held.writer(range(start, end), reservation);
        let view = writer.view();
        watch(writer.view());
        let body = Bytes::from(bytes(start, end));
        for frame in body.chunks(3000) {
            if writer.write(vec![body.slice_ref(frame)]).await.is_err() {
                return;
            }
            look(view.cursor());
            if let Some(extent) = view.extent(range(start, view.cursor())) {
                check(&extent, start);
            }
        }
    });
}

/// What may be sent is the revision's.
fn check(extent: &FileExtent, start: u64) {
    let mut sent = vec![0; usize::try_from(extent.len()).unwrap()];
    let file = extent.file().file();
    file.read_exact_at(&mut sent, extent.offset()).unwrap();
    assert!(sent == bytes(start, start + extent.len()), "at {start}");
}

/// Sends what is there of the stretch; whether all of it was.
fn read(held: &HeldRevision, start: u64, end: u64) -> bool {
    let mut at = start;
    let mut closed = 0;
    while at < end {
        match held.step(range(at, end)) {
            Step::Present(extent) => {
                check(&extent, at);
                at += extent.len();
            }
            Step::Closed => {
                closed += 1;
                assert!(closed < 100, "it does not open");
                block_on(held.open_at(at));
            }
            Step::Missing(gap) => {
                assert!(gap.start() == at && gap.end() <= end);
                return false;
            }
        }
    }
    true
}

/// Two writers of the two halves of a segment and of more, one reader, who follows their cursors too. What a writer has
/// told of stays readable.
fn who_reads_beside_a_writer_reads_its_bytes() {
    let tier = Tier::open();
    let size = 3 * BLOCK + 100;
    let held = tier.admit("a", size);
    let views = Arc::new(Mutex::new(Vec::new()));
    let writers = [(0, BLOCK), (BLOCK, size)].map(|(start, end)| {
        let (disk, held) = (Arc::clone(&tier.disk), Arc::clone(&held));
        let views = Arc::clone(&views);
        thread::spawn(move || {
            let watch = |view| views.lock().push((start, view));
            write_watched(&disk, &held, start, end, watch, |cursor| {
                let whole = cursor - cursor % BLOCK;
                let there = whole <= start || read(&held, start, whole);
                assert!(there, "covered, and not there");
            });
        })
    });
    for _ in 0..8 {
        read(&held, 0, size);
        let views: Vec<_> = views.lock().clone();
        for (start, view) in views {
            if let Some(extent) = view.extent(range(start, size)) {
                check(&extent, start);
            }
        }
    }
    for writer in writers {
        writer.join().unwrap();
    }
    assert!(read(&held, 0, size), "all was written");
    assert_eq!(held.first_missing(range(0, size)), None);
    views.lock().clear();
    drop(held);
    tier.is_left_empty();
}

/// A purge comes while a revision is admitted, written and read.
fn a_purge_leaves_nothing_of_a_writer() {
    let tier = Tier::open();
    let size = 2 * SEGMENT;
    let writer = {
        let disk = Arc::clone(&tier.disk);
        thread::spawn(move || {
            let admitted = block_on(disk.admit(&key("a"), &representation(size))).unwrap();
            write(&disk, &admitted, 0, size, |_| {
                read(&admitted, 0, size);
            });
        })
    };
    let flusher = {
        let disk = Arc::clone(&tier.disk);
        thread::spawn(move || block_on(disk.flush()).unwrap())
    };
    block_on(tier.disk.purge(PurgeTarget::Key(key("a")))).unwrap();
    writer.join().unwrap();
    flusher.join().unwrap();
    tier.is_left_empty();
}

/// The tier is full; one makes room, one reads what may have to go, one writes more of it.
fn what_is_evicted_is_gone_for_all() {
    let tier = Tier::open();
    let full = tier.admit("a", CAPACITY);
    write(&tier.disk, &full, 0, CAPACITY - SEGMENT, |_| {});
    block_on(tier.disk.flush()).unwrap();
    let reader = {
        let full = Arc::clone(&full);
        thread::spawn(move || {
            read(&full, 0, SEGMENT);
            read(&full, SEGMENT, 3 * SEGMENT);
        })
    };
    let other = {
        let (disk, full) = (Arc::clone(&tier.disk), Arc::clone(&full));
        thread::spawn(move || write(&disk, &full, CAPACITY - SEGMENT, CAPACITY, |_| {}))
    };
    let held = tier.admit("b", 2 * SEGMENT);
    write(&tier.disk, &held, 0, 2 * SEGMENT, |_| {
        assert!(tier.disk.stats().used_bytes <= CAPACITY);
    });
    reader.join().unwrap();
    other.join().unwrap();
    read(&full, 0, CAPACITY);
    drop((full, held));
    tier.is_left_empty();
}

/// A file turns out to be short when it is opened, by two at once, while it is fetched again.
fn a_bad_file_is_dropped_once() {
    let tier = Tier::open();
    let size = SEGMENT;
    let held = tier.admit("a", size);
    write(&tier.disk, &held, 0, size, |_| {});
    block_on(tier.disk.flush()).unwrap();
    let Step::Present(extent) = held.step(range(0, size)) else {
        panic!("it was written");
    };
    extent.file().report_unreadable();
    drop(extent);
    let opener = {
        let held = Arc::clone(&held);
        thread::spawn(move || block_on(held.open_at(0)))
    };
    let writer = {
        let (disk, held) = (Arc::clone(&tier.disk), Arc::clone(&held));
        thread::spawn(move || {
            if held.first_missing(range(0, size)) == Some(range(0, size)) {
                write(&disk, &held, 0, size, |_| {});
            }
        })
    };
    block_on(held.open_at(BLOCK));
    opener.join().unwrap();
    writer.join().unwrap();
    read(&held, 0, size);
    assert_eq!(tier.disk.stats().quarantines, 1);
    drop(held);
    tier.is_left_empty();
}
