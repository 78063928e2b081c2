//! One revision as memory knows it: which blocks lie in which file.
//!
//! All of it stands under one short lock, which is never held across I/O. A segment file goes
//! through these states:
//!
//! ```text
//!            writer                 last commit done,
//!  (new) ──────────▶ open, growing ─────────────────▶ open, growing, recorded
//!                                                        │ closed by the cap on descriptors
//!  (row in the catalog) ──▶ closed, sealed ◀─────────────┘
//!                             │ open_at: length, and after an unclean stop checksums
//!                 open, sealed├──────────▶ quarantined: gone
//! ```
//!
//! A *sealed* file takes no more blocks. A file that anyone else holds (an extent, a writer, the
//! durability thread) is not evicted, for that would not yield room; no other pin is needed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::Reservation;
use super::catalog::{SegmentId, StoredRevision, StoredSegment};
use super::coverage::{Coverage, Geometry};
use super::extent::{FileExtent, SegmentFile};
use super::policy::Queue;
use super::room::Charge;
use super::sums::{Buffered, Contents};
use super::tier::Shared;
use super::watch::within;
use super::writer::BlockWriter;
use crate::object::{Fields, Representation, Revision};
use crate::semantics::ByteRange;

/// A revision the tier knows. There is at most one of each revision at a time that is not doomed.
pub struct HeldRevision {
    pub(super) shared: Arc<Shared>,
    /// Row id; not reused after a purge, so a late commit cannot hit a successor.
    pub(super) id: i64,
    pub(super) geometry: Geometry,
    revision: Revision,
    doomed: AtomicBool,
    /// Recency, for the cap on revisions in memory.
    touched: AtomicU64,
    /// See [`HeldRevision::is_complete`].
    first_gap: AtomicU64,
    pub(super) state: Mutex<State>,
    /// Held by a writer that makes a file, so that parallel writers of one segment share it.
    pub(super) creating: Mutex<()>,
    me: Weak<Self>,
}

/// What the lock of a revision guards.
pub(super) struct State {
    representation: Arc<Representation>,
    /// Those of `representation`: made once, sent with every answer.
    fields: Fields,
    pub(super) segments: BTreeMap<SegmentKey, Segment>,
    next_file: u32,
}

/// Names a file of a revision in memory: several files may hold blocks of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SegmentKey {
    pub(super) idx: u64,
    file: u32,
}

/// One segment file.
pub(super) struct Segment {
    pub(super) incarnation: u128,
    pub(super) coverage: Coverage,
    /// Blocks that some writer of this run has begun, or will. `None`: sealed.
    pub(super) claimed: Option<Coverage>,
    pub(super) writers: u32,
    pub(super) file: Option<Arc<SegmentFile>>,
    pub(super) charge: Arc<Charge>,
    /// Recency, for the cap on open files.
    pub(super) last_used: u64,
    /// Where it is to begin in the catalog, which knows better once it is recorded.
    pub(super) queue: Queue,
    pub(super) place: u64,
    /// The charge's `served` as the catalog has it.
    pub(super) stored_served: u64,
    /// Recorded before an unclean stop, and not verified since.
    suspect: bool,
    /// Has a row in the catalog.
    pub(super) recorded: bool,
}

impl Segment {
    /// A new file of this run, for a writer that has `claimed` these blocks of it.
    pub(super) fn new(
        incarnation: u128,
        file: Arc<SegmentFile>,
        charge: Arc<Charge>,
        claimed: Coverage,
        queue: Queue,
        stamp: u64,
    ) -> Self {
        Self {
            incarnation,
            coverage: Coverage::empty(claimed.blocks()),
            claimed: Some(claimed),
            writers: 1,
            file: Some(file),
            charge,
            last_used: stamp,
            queue,
            place: stamp,
            stored_served: 0,
            suspect: false,
            recorded: false,
        }
    }

    /// The open file, unless a read of it failed: [`HeldRevision::open_at`] then drops the segment.
    fn readable(&self) -> Option<&Arc<SegmentFile>> {
        self.file.as_ref().filter(|file| !file.is_unreadable())
    }

    /// Whether anyone but the tier holds the file.
    pub(super) fn in_use(&self) -> bool {
        self.file
            .as_ref()
            .is_some_and(|file| Arc::strong_count(file) > 1)
    }
}

/// What lies at the start of a range.
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: each is a different way to go on"
)]
pub enum Step {
    /// Send this (at most up to the end of its segment), then ask again for the rest.
    Present(FileExtent),
    /// Present, but the file is not open yet: await [`HeldRevision::open_at`], then ask again.
    Closed,
    /// Not on disk, up to where the next present block (or the range's end) begins. Not
    /// block-aligned: the caller aligns.
    Missing(ByteRange),
}

impl HeldRevision {
    pub(super) fn new(
        shared: &Arc<Shared>,
        revision: Revision,
        stored: StoredRevision,
    ) -> Arc<Self> {
        let geometry = stored.geometry();
        let mut state = State {
            fields: stored.representation.fields(),
            representation: Arc::new(stored.representation),
            segments: BTreeMap::new(),
            next_file: 0,
        };
        for row in stored.segments {
            state.add_stored(shared, geometry, &row);
        }
        Arc::new_cyclic(|me| Self {
            shared: Arc::clone(shared),
            id: stored.id,
            geometry,
            revision,
            doomed: AtomicBool::new(false),
            touched: AtomicU64::new(shared.tick()),
            first_gap: AtomicU64::new(0),
            state: Mutex::new(state),
            creating: Mutex::new(()),
            me: Weak::clone(me),
        })
    }

    /// Which revision.
    pub fn revision(&self) -> &Revision {
        &self.revision
    }

    /// Length of the object in bytes.
    pub fn size(&self) -> u64 {
        self.geometry.size
    }

    /// No byte of it is held, of those that it has.
    pub(super) fn is_bare(&self) -> bool {
        self.geometry.size > 0 && self.state.lock().segments.is_empty()
    }

    /// Its metadata, newest.
    pub fn representation(&self) -> Arc<Representation> {
        Arc::clone(&self.state.lock().representation)
    }

    /// Its metadata, newest, and its header fields.
    pub fn described(&self) -> (Arc<Representation>, Fields) {
        let state = self.state.lock();
        (Arc::clone(&state.representation), Arc::clone(&state.fields))
    }

    /// Whether this is what [`described`](Self::described) returns.
    pub fn is_described_by(&self, representation: &Arc<Representation>, fields: &Fields) -> bool {
        let state = self.state.lock();
        Arc::ptr_eq(&state.representation, representation) && Arc::ptr_eq(&state.fields, fields)
    }

    /// Replaces the stored headers (equal bytes re-uploaded). Write-behind.
    ///
    /// # Panics
    /// If validator or size differ: those are other bytes.
    pub fn update_representation(&self, representation: Arc<Representation>) {
        assert_eq!(
            representation.validator, self.revision.validator,
            "headers of other bytes"
        );
        assert_eq!(
            representation.size, self.geometry.size,
            "equal bytes of another length"
        );
        {
            let mut state = self.state.lock();
            if state.representation == representation {
                return;
            }
            state.fields = representation.fields();
            state.representation = Arc::clone(&representation);
            // Under the lock: another catalog may give the number of a doomed one to another revision.
            if !self.is_doomed() {
                self.shared.queue.update(self.id, representation);
            }
        }
    }

    /// Purged: nothing new may be written or found through it.
    pub fn is_doomed(&self) -> bool {
        self.doomed.load(Ordering::Acquire)
    }

    /// Memory only, no I/O.
    pub fn step(&self, range: ByteRange) -> Step {
        let g = self.geometry;
        let (start, end) = (range.start(), range.end().min(g.size));
        let idx = g.segment_of(start);
        let block = g.block_of(start);
        let mut state = self.state.lock();
        let mut closed = false;
        for (_, segment) in state.files_mut(idx) {
            if !segment.coverage.contains(block) {
                continue;
            }
            segment.last_used = self.shared.tick();
            let Some(file) = segment.readable() else {
                closed = true;
                continue;
            };
            let end = end.min(g.blocks_end(idx, segment.coverage.first_absent(block)));
            return Step::Present(FileExtent::new(
                Arc::clone(file),
                start - g.segment_start(idx),
                end - start,
            ));
        }
        if closed {
            return Step::Closed;
        }
        let end = state
            .next_present(g, start)
            .map_or_else(|| range.end(), |next| next.min(range.end()));
        Step::Missing(ByteRange::from_bounds(start, end).unwrap_or(range))
    }

    /// All of `range`, if it is present in one open file. Memory only, no I/O.
    pub fn extent(&self, range: ByteRange) -> Option<FileExtent> {
        match self.step(range) {
            Step::Present(extent) => (extent.len() == range.len()).then_some(extent),
            Step::Closed | Step::Missing(_) => None,
        }
    }

    /// Opens the segment file that `offset` lies in, off the runtime's workers. If the file is
    /// gone, short, or (after an unclean stop) not what its checksums say, its coverage is dropped
    /// instead: the next step says Missing. Where it cannot be opened for now (descriptors used
    /// up, disk trouble), memory forgets the segment and the file is kept, so that the caller goes
    /// on and a later load finds it again. Where the disk hangs, it stays closed: the next step says so again.
    ///
    /// Dropping the future leaves the work to finish by itself.
    pub async fn open_at(&self, offset: u64) {
        let Some((_, incarnation)) = self.closed_at(offset) else {
            return;
        };
        // One at a time per file: checking a segment twice at once only costs.
        let watch = &self.shared.watch;
        // Whose turn it is may be what hangs.
        if watch.overdue().is_some() {
            return;
        }
        let limit = watch.limits.open;
        let turn = self.shared.opening_turn(incarnation).lock_owned();
        let Some(turn) = within(limit, turn).await else {
            return;
        };
        let me = self.me();
        let opened = watch.run("open a segment file", limit, move || {
            let _turn = turn;
            // Again: someone else may have opened it while we waited.
            if let Some((key, _)) = me.closed_at(offset) {
                me.open(key);
            }
            Ok(())
        });
        // The next step tells what came of it; of a disk that hangs, the watch has told.
        let _ = opened.await;
    }

    /// The first stretch of `range` that is not on disk, up to the next present block.
    pub fn first_missing(&self, range: ByteRange) -> Option<ByteRange> {
        let state = self.state.lock();
        let start = state.first_absent(self.geometry, range)?;
        let end = state.next_present(self.geometry, start);
        ByteRange::from_bounds(
            start,
            end.map_or_else(|| range.end(), |next| next.min(range.end())),
        )
    }

    /// A sequential writer for `range` (block-aligned start; end block-aligned or the object's
    /// end), taking its room from `reservation`. Its files are not evicted while it or a view of
    /// it lives.
    ///
    /// # Panics
    /// If `range` is not aligned so, or reaches beyond the end of the revision.
    pub fn writer(self: &Arc<Self>, range: ByteRange, reservation: Reservation) -> BlockWriter {
        BlockWriter::new(Arc::clone(self), range, reservation)
    }

    pub(super) fn me(&self) -> Arc<Self> {
        self.me.upgrade().expect("whoever calls holds it by an Arc")
    }

    pub(super) fn touch(&self) {
        self.touched.store(self.shared.tick(), Ordering::Relaxed);
    }

    pub(super) fn touched(&self) -> u64 {
        self.touched.load(Ordering::Relaxed)
    }

    pub(super) fn segment_id(&self, key: SegmentKey, segment: &Segment) -> SegmentId {
        SegmentId {
            revision: self.id,
            idx: key.idx,
            incarnation: segment.incarnation,
        }
    }

    /// Nothing is found or written through it from here on. Returns its files, to be unlinked.
    pub(super) fn doom(&self) -> Vec<Segment> {
        let mut state = self.state.lock();
        // Under the lock, so that a writer that adds a file either is seen here or sees this.
        self.doomed.store(true, Ordering::Release);
        let segments = std::mem::take(&mut state.segments);
        segments
            .into_values()
            .inspect(|segment| segment.charge.unlink())
            .collect()
    }

    fn closed_at(&self, offset: u64) -> Option<(SegmentKey, u128)> {
        let idx = self.geometry.segment_of(offset);
        let block = self.geometry.block_of(offset);
        let mut closed = None;
        for (key, segment) in self.state.lock().files_mut(idx) {
            if segment.coverage.contains(block) {
                if segment.readable().is_some() {
                    return None;
                }
                closed.get_or_insert((*key, segment.incarnation));
            }
        }
        closed
    }

    /// Blocking: opens, checks, and either keeps the file or quarantines it.
    fn open(&self, key: SegmentKey) {
        let (id, end, suspect, charge, covered) = {
            let state = self.state.lock();
            let Some(segment) = state.segments.get(&key) else {
                return;
            };
            if segment.file.is_some() {
                // Only one that cannot be read is opened again.
                drop(state);
                let why = io::Error::other("it could not be read while it was sent");
                self.shared.quarantine(self, key, &why);
                return;
            }
            let highest = segment.coverage.highest().unwrap_or(0);
            (
                self.segment_id(key, segment),
                self.geometry.blocks_end(key.idx, highest + 1),
                segment.suspect,
                Arc::clone(&segment.charge),
                segment.coverage.clone(),
            )
        };
        self.shared.close_idle_files();
        let path = self.shared.segment_path(id.incarnation);
        let needed = end - self.geometry.segment_start(key.idx);
        let opened = File::open(&path).and_then(|file| {
            let len = file.metadata()?.len();
            if len < needed {
                let what = format!("it has {len} bytes, and its blocks reach to {needed}");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
            }
            if suspect {
                self.verify(&file, key, id.incarnation, &covered)?;
            }
            Ok(file)
        });
        match opened {
            Ok(file) => {
                let file = SegmentFile::new(file, charge);
                let mut state = self.state.lock();
                if let Some(segment) = state.segments.get_mut(&key) {
                    segment.file = Some(file);
                    segment.suspect = false;
                }
                drop(state);
                if suspect {
                    self.shared.queue.verified(id);
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::UnexpectedEof
                | io::ErrorKind::InvalidData => self.shared.quarantine(self, key, &error),
                _ => {
                    self.state.lock().segments.remove(&key);
                    self.shared.trouble.note("open", &path, &error);
                }
            },
        }
    }

    /// Every covered block against its checksum. Blocking, reads all of them.
    fn verify(
        &self,
        file: &File,
        key: SegmentKey,
        incarnation: u128,
        covered: &Coverage,
    ) -> io::Result<()> {
        let corrupt = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let sums = self
            .shared
            .catalog
            .lock()
            .and_then(|db| db.sums(incarnation))
            .map_err(io::Error::other)?
            .ok_or_else(|| corrupt("it has no checksums".into()))?;
        let contents = Contents {
            geometry: self.geometry,
            idx: key.idx,
            covered,
            sums: &sums,
        };
        let mut bad = None;
        contents.check(&mut Buffered::new(file), |block, _, right| {
            bad = (!right).then_some(block);
            right
        })?;
        match bad {
            None => Ok(()),
            Some(block) => Err(corrupt(format!("block {block} does not have its checksum"))),
        }
    }

    /// Whether every block is on disk, durable or not. Cheap if asked again and again while it fills up in order.
    pub(super) fn is_complete(&self) -> bool {
        let size = self.geometry.size;
        let state = self.state.lock();
        // Where the first gap was when last looked. What was evicted before it shows in the second look.
        let seen = self.first_gap.load(Ordering::Relaxed);
        for from in [seen, 0] {
            let Some(rest) = ByteRange::from_bounds(from, size) else {
                continue;
            };
            if let Some(gap) = state.first_absent(self.geometry, rest) {
                self.first_gap.store(gap, Ordering::Relaxed);
                return false;
            }
        }
        size > 0
    }

    /// The file of this name, if it is still one of this revision's.
    pub(super) fn named(&self, id: &SegmentId) -> Option<SegmentKey> {
        let mut state = self.state.lock();
        state
            .files_mut(id.idx)
            .find(|(_, segment)| segment.incarnation == id.incarnation)
            .map(|(key, _)| *key)
    }

    /// What was recorded of the file is right: its first open need not look again.
    pub(super) fn trust(&self, key: SegmentKey) {
        if let Some(segment) = self.state.lock().segments.get_mut(&key) {
            segment.suspect = false;
        }
    }
}

impl State {
    /// The files that hold blocks of segment `idx`.
    pub(super) fn files_mut(
        &mut self,
        idx: u64,
    ) -> impl Iterator<Item = (&SegmentKey, &mut Segment)> {
        self.segments.range_mut(
            SegmentKey { idx, file: 0 }..=SegmentKey {
                idx,
                file: u32::MAX,
            },
        )
    }

    fn files(&self, idx: u64) -> impl Iterator<Item = (&SegmentKey, &Segment)> {
        self.segments.range(
            SegmentKey { idx, file: 0 }..=SegmentKey {
                idx,
                file: u32::MAX,
            },
        )
    }

    /// Adds a file that a writer just made.
    pub(super) fn add(&mut self, idx: u64, segment: Segment) -> SegmentKey {
        let key = SegmentKey {
            idx,
            file: self.next_file,
        };
        self.next_file += 1;
        self.segments.insert(key, segment);
        key
    }

    /// Adds a file from the catalog. A row that does not fit the geometry holds nothing for us; its
    /// file makes room when its turn comes, since nobody reads it.
    fn add_stored(&mut self, shared: &Shared, geometry: Geometry, row: &StoredSegment) {
        let blocks = geometry.blocks_in(row.idx);
        let Some(coverage) = Coverage::from_bytes(blocks, &row.bits) else {
            return;
        };
        if coverage.is_empty() {
            return;
        }
        let segment = Segment {
            incarnation: row.incarnation,
            coverage,
            claimed: None,
            writers: 0,
            file: None,
            charge: Charge::new(&shared.room, row.bytes, row.served),
            last_used: shared.tick(),
            queue: Queue::Small,
            place: 0,
            stored_served: row.served,
            suspect: row.run <= shared.suspect_run.load(Ordering::Acquire),
            recorded: true,
        };
        self.add(row.idx, segment);
    }

    /// The first offset in `range` that no file covers.
    fn first_absent(&self, g: Geometry, range: ByteRange) -> Option<u64> {
        let mut offset = range.start();
        while offset < range.end().min(g.size) {
            let idx = g.segment_of(offset);
            let mut block = g.block_of(offset);
            // Several files may take turns in one segment.
            while let Some((_, segment)) = self
                .files(idx)
                .find(|(_, segment)| segment.coverage.contains(block))
            {
                block = segment.coverage.first_absent(block);
            }
            let reached = g.blocks_end(idx, block);
            if reached < g.segment_end(idx) {
                offset = offset.max(reached);
                return (offset < range.end()).then_some(offset);
            }
            offset = reached;
        }
        None
    }

    /// Where the first present block after `offset`, which is absent, starts.
    fn next_present(&self, g: Geometry, offset: u64) -> Option<u64> {
        let idx = g.segment_of(offset);
        let block = g.block_of(offset);
        let from = SegmentKey { idx, file: 0 };
        let mut found: Option<(u64, u32)> = None;
        for (key, segment) in self.segments.range(from..) {
            if found.is_some_and(|(idx, _)| key.idx > idx) {
                break;
            }
            let first = segment
                .coverage
                .first_present(if key.idx == idx { block } else { 0 });
            if first < g.blocks_in(key.idx) {
                found = Some(found.map_or((key.idx, first), |seen| seen.min((key.idx, first))));
            }
        }
        found.map(|(idx, block)| g.blocks_end(idx, block))
    }
}
