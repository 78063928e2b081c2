//! The power goes at every step, and whatever is left is opened again.
//!
//! A [`Recorder`] stands where the kernel is asked to make things durable, and knows by that what is. At each
//! [`Step`] it takes an [`Image`]: the files as they are, the files as they were last synced under the names whose directory was,
//! and the catalog with its log. From one image come many *leavings*:
//!
//! * `kill -9`: everything as it is.
//! * Power loss: only what was synced; the log cut after any commit since its last sync, or in the middle of one; the
//!   files unlinked since then gone, or back.
//!
//! Of each leaving the catalog must not say a word that the files do not bear out ([`Leaving::judge_rows`], which reads it by
//! itself: the tier would save a wrong order by its checksums), and the tier must open it, serve no wrong byte, hold what was
//! promised and not what was purged ([`Leaving::judge_tier`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;

use super::super::coverage::Coverage;
use super::super::failpoint::{Step as Point, Watch};
use super::*;

/// Every step that can be reached without a catalog that has to be set aside.
const POINTS: &[Point] = &[
    Point::Migrated,
    Point::RunBegun,
    Point::Admitted,
    Point::FileCreated,
    Point::BytesWritten,
    Point::DataSynced,
    Point::DirectorySynced,
    Point::Recorded,
    Point::LogSynced,
    Point::Checkpointing,
    Point::Checkpointed,
    Point::Evicted,
    Point::Purged,
    Point::Quarantined,
    Point::RowSwept,
    Point::Unlinked,
    Point::Closed,
];

type Files = BTreeMap<String, Arc<[u8]>>;

/// Knows what a crash would leave of a directory.
struct Recorder {
    dir: PathBuf,
    state: Mutex<Recorded>,
    /// A checkpoint writes to both the log and the database: no image is taken meanwhile.
    checkpointing: Mutex<bool>,
    checkpointed: Condvar,
    taken: Condvar,
}

#[derive(Default)]
struct Recorded {
    /// Contents at the last sync, by name.
    synced: Files,
    /// Names that a sync of their directory made durable, if they were unlinked since too.
    named: BTreeSet<String>,
    /// The log's generation, and its bytes that are durable.
    log: (u64, usize),
    /// Descriptors of the catalog, by inode: closing one would drop SQLite's locks, which are the process's.
    descriptors: HashMap<u64, File>,
    /// What has to be served from here on, and what must not.
    promised: BTreeMap<&'static str, ByteRange>,
    purged: BTreeSet<&'static str>,
    /// Segment files that the test took away.
    lost: BTreeSet<String>,
    images: Vec<Image>,
}

/// All that is to be known of one moment.
struct Image {
    point: Point,
    /// Segment files as they are.
    live: Files,
    /// As they were synced, under names that were.
    durable: Files,
    database: Arc<[u8]>,
    log: Vec<u8>,
    /// Bytes of the log that are durable.
    log_durable: usize,
    promised: BTreeMap<&'static str, ByteRange>,
    purged: BTreeSet<&'static str>,
    lost: BTreeSet<String>,
}

impl Recorder {
    /// Opens a tier on `dir` that is watched from its first step on.
    fn open(dir: &Path) -> (Arc<Self>, Watch, Arc<DiskTier>) {
        let recorder = Arc::new(Self {
            dir: dir.to_owned(),
            state: Mutex::default(),
            checkpointing: Mutex::new(false),
            checkpointed: Condvar::new(),
            taken: Condvar::new(),
        });
        let (watch, tier) = recorder.reopen();
        (recorder, watch, tier)
    }

    fn reopen(self: &Arc<Self>) -> (Watch, Arc<DiskTier>) {
        let me = Arc::clone(self);
        let watch = Watch::new(&self.dir, move |point| me.reached(point));
        let seams = Seams {
            sync: Box::new(Recording(Arc::clone(self))),
            ..Seams::default()
        };
        let tier = DiskTier::open_with(config(&self.dir), seams).unwrap();
        wait_for_sweep(&tier);
        (watch, tier)
    }

    fn promise(&self, name: &'static str, stretch: ByteRange) {
        let mut state = self.state.lock();
        state.promised.insert(name, stretch);
        state.purged.remove(name);
    }

    /// Before anything is done that may lose it.
    fn take_back(&self, name: &'static str) {
        self.state.lock().promised.remove(name);
    }

    fn purged(&self, name: &'static str) {
        self.state.lock().purged.insert(name);
    }

    /// Waits until the durability thread has committed of itself since there were `seen` images.
    fn wait_until_recorded(&self, seen: usize) {
        let mut state = self.state.lock();
        self.taken.wait_while(&mut state, |state| {
            state.images[seen..]
                .iter()
                .all(|image| image.point != Point::Recorded)
        });
    }

    fn take_images(&self) -> Vec<Image> {
        std::mem::take(&mut self.state.lock().images)
    }

    /// Takes an image, and keeps others from one while a checkpoint is under way: until what it made durable is known, for
    /// the database has that already. One between the two would be of no crash: all of the log moved, and some of it lost.
    fn reached(&self, point: Point) {
        let mut checkpointing = self.checkpointing.lock();
        if point != Point::Checkpointed {
            self.checkpointed
                .wait_while(&mut checkpointing, |checkpointing| *checkpointing);
        }
        self.image(point);
        *checkpointing = point == Point::Checkpointing;
        self.checkpointed.notify_all();
    }

    /// To be called with `checkpointing` locked.
    fn image(&self, point: Point) {
        // From here on nothing can be synced, and so nothing be committed that needed a sync which is not in this image.
        let mut state = self.state.lock();
        let durable = state.named.iter().map(|name| {
            let bytes = state.synced.get(name).cloned();
            // A name without data: an empty file.
            (name.clone(), bytes.unwrap_or_default())
        });
        let durable = durable.collect();
        let live = segment_files(&self.dir).into_iter().filter_map(|path| {
            let bytes = fs::read(&path).ok()?;
            Some((name_of(&path), bytes.into()))
        });
        let live = live.collect();
        let database = state.read(&self.dir.join("catalog.sqlite"));
        let log = state.read(&self.dir.join("catalog.sqlite-wal"));
        // What a commit with a sync or a checkpoint made durable is known to be once it is over.
        if matches!(point, Point::LogSynced | Point::Checkpointed) {
            state.log = (generation(&log), commits(&log).last().copied().unwrap_or(0));
        }
        let log_durable = if state.log.0 == generation(&log) {
            state.log.1
        } else {
            0
        };
        let image = Image {
            point,
            live,
            durable,
            database: database.into(),
            log,
            log_durable,
            promised: state.promised.clone(),
            purged: state.purged.clone(),
            lost: state.lost.clone(),
        };
        state.images.push(image);
        self.taken.notify_all();
    }
}

impl Recorded {
    fn read(&mut self, path: &Path) -> Vec<u8> {
        let Ok(metadata) = fs::metadata(path) else {
            return Vec::new();
        };
        let file = self
            .descriptors
            .entry(metadata.ino())
            .or_insert_with(|| File::open(path).unwrap());
        let mut bytes = vec![0; metadata.len() as usize];
        let mut read = 0;
        while let Ok(n @ 1..) = file.read_at(&mut bytes[read..], read as u64) {
            read += n;
        }
        bytes.truncate(read);
        bytes
    }
}

/// Remembers instead of syncing.
struct Recording(Arc<Recorder>);

impl Syncer for Recording {
    fn data(&self, file: &File) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let mut bytes = vec![0; file.metadata()?.len() as usize];
        file.read_exact_at(&mut bytes, 0)?;
        let mut state = self.0.state.lock();
        state.synced.insert(name_of(&path), bytes.into());
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.state.lock();
        for entry in fs::read_dir(path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "seg") {
                state.named.insert(name_of(&path));
            }
        }
        Ok(())
    }
}

/// SQLite's integers are signed; ours are not negative.
fn number(row: &rusqlite::Row<'_>, column: usize) -> u64 {
    u64::try_from(row.get::<_, i64>(column).unwrap()).unwrap()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// The salt of the log, which is another one after each time it begins anew.
fn generation(log: &[u8]) -> u64 {
    log.get(16..24)
        .map_or(0, |salt| u64::from_be_bytes(salt.try_into().unwrap()))
}

/// Where the log's commits end. <https://sqlite.org/fileformat2.html#walformat>
fn commits(log: &[u8]) -> Vec<usize> {
    let Some(page) = log.get(8..12) else {
        return Vec::new();
    };
    let frame = 24 + u32::from_be_bytes(page.try_into().unwrap()) as usize;
    let mut ends = Vec::new();
    let mut at = 32;
    while let Some(header) = log.get(at..at + 24)
        && header[8..16] == log[16..24]
        && log.len() >= at + frame
    {
        at += frame;
        // A frame that ends a transaction says how large the database is after it.
        if header[4..8] != [0; 4] {
            ends.push(at);
        }
    }
    ends
}

/// What one crash leaves.
struct Leaving<'a> {
    what: String,
    image: &'a Image,
    files: Files,
    log: &'a [u8],
    /// Files that rows may have lost.
    lost: BTreeSet<String>,
}

impl Image {
    fn leavings(&self) -> Vec<Leaving<'_>> {
        let mut leavings = vec![Leaving {
            what: format!("kill -9 at {:?}", self.point),
            image: self,
            files: self.live.clone(),
            log: &self.log,
            lost: self.lost.clone(),
        }];
        let mut cuts: BTreeSet<usize> = commits(&self.log).into_iter().collect();
        let end = cuts.last().copied().unwrap_or(0);
        // In the middle of the last.
        cuts.extend(end.checked_sub(1000));
        cuts.insert(self.log_durable);
        for cut in cuts.range(self.log_durable..) {
            let gone: BTreeSet<String> = self
                .durable
                .keys()
                .filter(|name| !self.live.contains_key(*name))
                .cloned()
                .collect();
            let mut kept = self.durable.clone();
            kept.retain(|name, _| !gone.contains(name));
            for (what, files, lost) in [
                ("back", self.durable.clone(), BTreeSet::new()),
                ("gone", kept, gone),
            ] {
                leavings.push(Leaving {
                    what: format!(
                        "power loss at {:?}, {cut} of {end} bytes of the log, what was unlinked is {what}",
                        self.point
                    ),
                    image: self,
                    files,
                    log: &self.log[..*cut],
                    lost,
                });
            }
        }
        leavings
    }
}

impl Leaving<'_> {
    /// The same leaving is judged once.
    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.files, self.log, &self.image.database).hash(&mut hasher);
        (&self.lost, &self.image.purged).hash(&mut hasher);
        for (name, stretch) in &self.image.promised {
            (name, stretch.start(), stretch.end()).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn lay_out(&self) -> TempDir {
        let dir = in_memory();
        fs::write(dir.path().join("catalog.sqlite"), &self.image.database).unwrap();
        fs::write(dir.path().join("catalog.sqlite-wal"), self.log).unwrap();
        for (name, bytes) in &self.files {
            let shard = dir.path().join("segments").join(&name[..2]);
            fs::create_dir_all(&shard).unwrap();
            fs::write(shard.join(name), bytes).unwrap();
        }
        dir
    }

    /// Every row's file is there, and every covered block of it has the bytes of the row's revision.
    fn judge_rows(&self, dir: &Path) {
        let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
        let tables: i64 = catalog
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .unwrap();
        if tables == 0 {
            return;
        }
        let mut rows = catalog
            .prepare(
                "SELECT s.incarnation, s.idx, s.bits, r.key, r.size, c.crcs
                 FROM segments s LEFT JOIN revisions r ON r.id = s.revision
                 LEFT JOIN checksums c ON c.incarnation = s.incarnation",
            )
            .unwrap();
        let mut rows = rows.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let incarnation = u128::from_be_bytes(row.get(0).unwrap());
            let idx = number(row, 1);
            let bits: Vec<u8> = row.get(2).unwrap();
            let key: String = row.get(3).unwrap();
            let size = number(row, 4);
            let crcs: Vec<u8> = row.get(5).unwrap();
            let name = format!("{incarnation:032x}.seg");
            if self.lost.contains(&name) {
                continue;
            }
            let file = self.files.get(&name);
            let file =
                file.unwrap_or_else(|| panic!("{}: {name} of {key} is not there", self.what));
            let start = idx * SEGMENT;
            let blocks = (size - start).min(SEGMENT).div_ceil(BLOCK);
            let expected = body(&key, size);
            for block in Coverage::from_bytes(blocks as u32, &bits).unwrap().iter() {
                let from = u64::from(block) * BLOCK;
                let to = (from + BLOCK).min(size - start);
                let expected = &expected[(start + from) as usize..(start + to) as usize];
                assert!(
                    file.get(from as usize..to as usize) == Some(expected),
                    "{}: block {block} of {key}'s segment {idx} was recorded before its data",
                    self.what
                );
                let crc = &crcs[4 * block as usize..][..4];
                assert_eq!(crc, crc_fast::crc32_iscsi(expected).to_le_bytes());
            }
        }
    }

    async fn judge_tier(&self, dir: &Path) {
        let tier = unsynced(dir);
        wait_for_sweep(&tier);
        let what = &self.what;
        for name in NAMES {
            let held = tier.load(&revision(name, "a")).await;
            let Some(held) = held else {
                assert!(
                    !self.image.promised.contains_key(name),
                    "{what}: {name} was lost"
                );
                continue;
            };
            assert!(
                !self.image.purged.contains(name),
                "{what}: {name} was purged"
            );
            let size = held.representation().size;
            let expected = body(name, size);
            for block in 0..size.div_ceil(BLOCK) {
                let stretch = range(block * BLOCK, ((block + 1) * BLOCK).min(size));
                match read(&held, stretch).await {
                    Some(bytes) => assert!(
                        bytes == expected[stretch.start() as usize..stretch.end() as usize],
                        "{what}: wrong bytes in block {block} of {name}"
                    ),
                    None => assert!(
                        self.image.promised.get(name).is_none_or(|promised| {
                            promised.end() <= stretch.start() || stretch.end() <= promised.start()
                        }),
                        "{what}: block {block} of {name} was lost"
                    ),
                }
            }
        }
        assert_eq!(tier.stats().quarantines, 0, "{what}");
        let swept = tier.stats().swept;
        assert!(
            swept.rows as usize <= self.lost.len(),
            "{what}: {swept:?} of {:?}",
            self.lost
        );
        tier.close().await.unwrap();

        // Catalog, directory and account agree.
        let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
        let mut rows = catalog
            .prepare("SELECT incarnation, bytes FROM segments ORDER BY incarnation")
            .unwrap();
        let rows: Vec<(String, u64)> = rows
            .query_map([], |row| {
                let name = format!("{:032x}.seg", u128::from_be_bytes(row.get(0)?));
                Ok((name, number(row, 1)))
            })
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let files: BTreeSet<String> = segment_files(dir)
            .iter()
            .map(|path| name_of(path))
            .collect();
        let named: BTreeSet<String> = rows.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(named, files, "{what}");
        let bytes: u64 = rows.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(tier.stats().used_bytes, bytes, "{what}");
    }
}

/// A directory that costs no disk its time, where there is such a thing.
fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// For images, which nobody takes the power from.
fn unsynced(dir: &Path) -> Arc<DiskTier> {
    let seams = Seams {
        sync: Box::new(Unsynced),
        ..Seams::default()
    };
    DiskTier::open_with(config(dir), seams).unwrap()
}

struct Unsynced;

impl Syncer for Unsynced {
    fn data(&self, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Judges every leaving of every image once. Returns at which points there were images, and how many leavings.
async fn judge(images: &[Image]) -> (HashSet<Point>, usize) {
    let mut judged = HashSet::new();
    for image in images {
        for leaving in image.leavings() {
            if !judged.insert(leaving.hash()) {
                continue;
            }
            let dir = leaving.lay_out();
            leaving.judge_rows(dir.path());
            leaving.judge_tier(dir.path()).await;
        }
    }
    let points = images.iter().map(|image| image.point).collect();
    (points, judged.len())
}

const NAMES: [&str; 6] = ["grown", "shared", "evicted", "purged", "bad", "late"];

#[tokio::test]
async fn whenever_the_power_goes_no_row_is_without_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let (recorder, watch, tier) = Recorder::open(dir.path());

    // A segment that grows batch by batch, and a block that is left unfinished.
    let grown = admit(&tier, "grown", 2 * SEGMENT).await;
    for block in 0..3 {
        let stretch = range(block * BLOCK, (block + 1) * BLOCK);
        write(&tier, &grown, "grown", stretch).await;
        tier.flush().await.unwrap();
        recorder.promise("grown", range(0, stretch.end()));
    }
    let reservation = tier.reserve(SEGMENT).await.unwrap();
    let mut writer = grown.writer(range(SEGMENT, 2 * SEGMENT), reservation);
    let bytes = body("grown", 2 * SEGMENT);
    let begun = Bytes::copy_from_slice(&bytes[SEGMENT as usize..(SEGMENT + BLOCK + 100) as usize]);
    writer.write(vec![begun]).await.unwrap();
    drop(writer);
    // Commits that nobody asked for: a power loss may take them back, the last ones first.
    for (name, size) in [("shared", SEGMENT + 100), ("late", BLOCK)] {
        let seen = recorder.state.lock().images.len();
        put(&tier, name, size).await;
        recorder.wait_until_recorded(seen);
    }
    tier.flush().await.unwrap();
    recorder.promise("shared", range(0, SEGMENT + 100));

    // All of it goes for others, then comes back in part.
    put(&tier, "evicted", 2 * SEGMENT).await;
    tier.flush().await.unwrap();
    recorder.promise("evicted", range(0, 2 * SEGMENT));
    for name in ["grown", "shared", "evicted"] {
        recorder.take_back(name);
    }
    drop(grown);
    drop(tier.reserve(CAPACITY).await.unwrap());
    assert!(tier.stats().evictions > 0);
    put(&tier, "evicted", SEGMENT).await;

    // What is purged stays away, until it is fetched again.
    put(&tier, "purged", SEGMENT).await;
    tier.flush().await.unwrap();
    recorder.promise("purged", range(0, SEGMENT));
    recorder.take_back("purged");
    tier.purge(PurgeTarget::Key(key("purged"))).await.unwrap();
    recorder.purged("purged");
    put(&tier, "late", BLOCK).await;
    tier.flush().await.unwrap();
    recorder.promise("late", range(0, BLOCK));

    // A file that could not be read, and is fetched again.
    let bad = put(&tier, "bad", SEGMENT).await;
    tier.flush().await.unwrap();
    let Step::Present(extent) = bad.step(range(0, BLOCK)) else {
        panic!()
    };
    extent.file().report_unreadable();
    drop(extent);
    assert_eq!(read(&bad, range(0, BLOCK)).await, None);
    write(&tier, &bad, "bad", range(0, SEGMENT)).await;
    tier.flush().await.unwrap();
    recorder.promise("bad", range(0, SEGMENT));
    for block in 0..5 {
        tier.purge(PurgeTarget::Key(key("grown"))).await.unwrap();
        put(&tier, "grown", BLOCK * (2 + block)).await;
        tier.flush().await.unwrap();
    }
    drop(bad);
    tier.close().await.unwrap();
    drop((watch, tier));

    // A start that finds a row without a file and a file without a row.
    let files: HashSet<_> = segment_files(dir.path()).into_iter().collect();
    recorder.take_back("late");
    let late = body("late", BLOCK);
    let file = files.iter().find(|file| fs::read(file).unwrap() == late);
    recorder.state.lock().lost.insert(name_of(file.unwrap()));
    fs::remove_file(file.unwrap()).unwrap();
    let (watch, tier) = recorder.reopen();
    assert_eq!(tier.stats().swept.rows, 1);
    put(&tier, "late", SEGMENT).await;
    tier.flush().await.unwrap();
    recorder.promise("late", range(0, SEGMENT));
    tier.close().await.unwrap();
    drop((watch, tier));

    let images = recorder.take_images();
    let (points, leavings) = judge(&images).await;
    println!("{} images, {leavings} leavings", images.len());
    let missing: Vec<_> = POINTS
        .iter()
        .filter(|point| !points.contains(point))
        .collect();
    assert!(missing.is_empty(), "never reached: {missing:?}");
}

/// A directory as a crash may leave it while a catalog is being set aside: each file with its content, or names as they were
/// when the directory was last synced.
struct SideFiles {
    dir: PathBuf,
    state: Mutex<SideState>,
}

#[derive(Default)]
struct SideState {
    /// Files at the last sync of the directory.
    synced: BTreeMap<String, Vec<u8>>,
    images: Vec<(String, BTreeMap<String, Vec<u8>>)>,
}

impl SideFiles {
    fn read(&self) -> BTreeMap<String, Vec<u8>> {
        fs::read_dir(&self.dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| (name_of(&path), fs::read(path).unwrap()))
            .collect()
    }
}

struct SyncingSideFiles(Arc<SideFiles>);

impl Syncer for SyncingSideFiles {
    fn data(&self, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        if path == self.0.dir {
            self.0.state.lock().synced = self.0.read();
        }
        Ok(())
    }
}

/// What was purged is in the database, and its purge in the log: wherever the power goes while the two are
/// set aside, they must never be used one without the other.
#[tokio::test]
async fn a_catalog_that_is_set_aside_never_comes_back_without_its_log() {
    let origin = tempfile::tempdir().unwrap();
    let tier = open(origin.path());
    put(&tier, "purged", SEGMENT).await;
    tier.close().await.unwrap();
    let tier = open(origin.path());
    tier.purge(PurgeTarget::Key(key("purged"))).await.unwrap();
    let purged = crash_copy(origin.path());
    tier.close().await.unwrap();
    let log = fs::read(purged.path().join("catalog.sqlite-wal")).unwrap();
    assert!(!commits(&log).is_empty());
    let newer = |dir: &Path| {
        let catalog = Connection::open(dir.join("catalog.sqlite")).unwrap();
        catalog
            .pragma_update(None, "wal_autocheckpoint", 0)
            .unwrap();
        catalog.pragma_update(None, "user_version", 1000).unwrap();
        // As a crash leaves it: with its log.
        crash_copy(dir)
    };
    let damaged = |dir: &Path| {
        let left = crash_copy(dir);
        fs::write(left.path().join("catalog.damaged"), "found by a query").unwrap();
        left
    };
    for spoil in [&newer as &dyn Fn(&Path) -> TempDir, &damaged] {
        let left = spoil(crash_copy(purged.path()).path());
        let old: i64 = {
            // What would be served if the log were lost.
            let copy = tempfile::tempdir().unwrap();
            let database = copy.path().join("catalog.sqlite");
            fs::copy(left.path().join("catalog.sqlite"), &database).unwrap();
            rows(copy.path(), "revisions")
        };
        assert_eq!(old, 1);
        let side = Arc::new(SideFiles {
            dir: left.path().to_owned(),
            state: Mutex::default(),
        });
        side.state.lock().synced = side.read();
        let me = Arc::clone(&side);
        let watch = Watch::new(left.path(), move |point| {
            let live = me.read();
            let mut state = me.state.lock();
            let synced = state.synced.clone();
            // A journal keeps what was done since the last sync in its order, or loses it; without one, any of it is kept.
            for kept in 0..8 {
                let mut files = synced.clone();
                let names = ["catalog.sqlite", "catalog.sqlite-wal", "catalog.damaged"];
                let gone = names
                    .iter()
                    .enumerate()
                    .filter(|(bit, name)| kept & 1 << bit != 0 && !live.contains_key(**name));
                for (_, name) in gone {
                    files.remove(*name);
                }
                state
                    .images
                    .push((format!("{point:?}, kept {kept:03b}"), files));
            }
            state.images.push((format!("{point:?}, all kept"), live));
        });
        let seams = Seams {
            sync: Box::new(SyncingSideFiles(Arc::clone(&side))),
            ..Seams::default()
        };
        let tier = DiskTier::open_with(config(left.path()), seams).unwrap();
        assert!(tier.load(&revision("purged", "a")).await.is_none());
        tier.close().await.unwrap();
        drop(watch);
        let images = std::mem::take(&mut side.state.lock().images);
        for point in ["Marked", "SetAside", "Unmarked"] {
            assert!(images.iter().any(|(what, _)| what.starts_with(point)));
        }
        let mut seen = HashSet::new();
        for (what, files) in images {
            if !seen.insert(files.clone()) {
                continue;
            }
            let image = in_memory();
            for (name, bytes) in &files {
                fs::write(image.path().join(name), bytes).unwrap();
            }
            let tier = unsynced(image.path());
            let held = tier.load(&revision("purged", "a")).await;
            assert!(held.is_none(), "{what}: an older state of it was used");
            let held = put(&tier, "late", SEGMENT).await;
            assert_holds(&held, "late", range(0, SEGMENT)).await;
            tier.close().await.unwrap();
            assert!(!image.path().join("catalog.damaged").exists(), "{what}");
        }
    }
}
