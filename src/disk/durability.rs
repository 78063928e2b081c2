//! The one thread that makes things durable, and the queue in front of it.
//!
//! Order is what counts (ADR 8): the data of a block is synced, and for a new file its directory,
//! *before* its coverage is committed. Everything else that is written behind the requests' backs
//! (headers, what was served, what was current) rides along in the same transaction. A batch ends
//! [`BATCH_TIME`] after its first entry or at [`BATCH_BYTES`], whichever comes first, or when
//! somebody waits for it.
//!
//! What cannot be synced or recorded is not kept: after a failed `fdatasync` the kernel may have
//! dropped the pages, and a file without a row would never be found for eviction.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::catalog::{Batch, Checkpointer, Commit, SegmentCommit, SegmentId};
use super::extent::SegmentFile;
use super::failpoint::Step;
use super::held::{HeldRevision, SegmentKey};
use super::sums::BlockSum;
use super::tier::Shared;
use super::{CurrentRecord, DiskError};
use crate::object::{ObjectKey, Representation, Revision};

/// How long a completed block waits at most: what a crash loses is what was fetched in this time.
const BATCH_TIME: Duration = Duration::from_millis(200);

/// Completed bytes that end a batch early: an `fdatasync` then has bounded work.
const BATCH_BYTES: u64 = 64 << 20;

/// Keys whose change of `current` waits to be written. More come only if the disk hangs; they are
/// dropped then, and cost `stale_if_error` its memory.
const MAX_PENDING_CURRENT: usize = 64 << 10;

/// The two system calls that make data durable; tests put a gate in front.
pub(super) trait Syncer: Send + Sync {
    /// `fdatasync`.
    fn data(&self, file: &File) -> io::Result<()>;
    /// Makes names in the directory durable.
    fn directory(&self, path: &Path) -> io::Result<()>;
}

/// The kernel's.
pub(super) struct KernelSync;

impl Syncer for KernelSync {
    fn data(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// A block whose bytes are all in the page cache.
pub(super) struct CompletedBlock {
    pub(super) held: Arc<HeldRevision>,
    pub(super) key: SegmentKey,
    /// Held so that it is neither closed nor evicted before it is synced.
    pub(super) file: Arc<SegmentFile>,
    pub(super) block: u32,
    pub(super) sum: BlockSum,
    pub(super) len: u64,
}

/// A change of what is current; `None`: the key is absent.
pub(super) struct Pending(pub(super) Option<CurrentRecord>);

/// What waits for the durability thread.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    wake: Condvar,
}

/// What became current; `None`: the key is absent. The number tells a newer change of the same key.
type Changes = HashMap<ObjectKey, (u64, Option<CurrentRecord>)>;

#[derive(Default)]
struct QueueState {
    work: Work,
    /// When the first entry came; `None`: there is none.
    since: Option<Instant>,
    bytes: u64,
    closed: bool,
    /// Stays here until committed, so that reads see it.
    current: Changes,
    changes: u64,
}

#[derive(Default)]
struct Work {
    blocks: Vec<CompletedBlock>,
    grown: Vec<(Arc<HeldRevision>, SegmentKey)>,
    representations: HashMap<i64, Arc<Representation>>,
    verified: Vec<SegmentId>,
    served: Vec<(SegmentId, u64)>,
    forgotten: Vec<(i64, Revision)>,
    unlink: Vec<u128>,
    flushes: Vec<oneshot::Sender<Result<(), DiskError>>>,
}

impl Queue {
    pub(super) fn completed(&self, block: CompletedBlock) {
        self.push(|state| {
            state.bytes += block.len;
            state.work.blocks.push(block);
        });
    }

    /// The file has bytes that no completed block accounts for.
    pub(super) fn grown(&self, held: Arc<HeldRevision>, key: SegmentKey) {
        self.push(|state| state.work.grown.push((held, key)));
    }

    pub(super) fn update(&self, revision: i64, representation: Arc<Representation>) {
        self.push(|state| {
            state.work.representations.insert(revision, representation);
        });
    }

    pub(super) fn verified(&self, id: SegmentId) {
        self.push(|state| state.work.verified.push(id));
    }

    /// Memory forgot a revision; `bare` if no byte of it was held.
    pub(super) fn forgotten(&self, served: Vec<(SegmentId, u64)>, bare: Option<(i64, Revision)>) {
        self.push(|state| {
            state.work.served.extend(served);
            state.work.forgotten.extend(bare);
        });
    }

    /// A file that never had a row is not wanted any more.
    pub(super) fn unlink(&self, incarnation: u128) {
        self.push(|state| state.work.unlink.push(incarnation));
    }

    pub(super) fn set_current(&self, key: &ObjectKey, record: Option<CurrentRecord>) {
        self.push(|state| {
            if state.current.len() < MAX_PENDING_CURRENT || state.current.contains_key(key) {
                state.changes += 1;
                state.current.insert(key.clone(), (state.changes, record));
            }
        });
    }

    /// What was set and is not committed yet.
    pub(super) fn pending_current(&self, key: &ObjectKey) -> Option<Pending> {
        let state = self.state.lock();
        state
            .current
            .get(key)
            .map(|(_, record)| Pending(record.clone()))
    }

    /// Drops `changes`, but not where there was another change of the same key since.
    fn drop_changes(&self, changes: &Changes) {
        self.state.lock().current.retain(|key, (number, _)| {
            changes
                .get(key)
                .is_none_or(|(dropped, _)| dropped != number)
        });
    }

    /// To be called under the catalog's lock, so that no commit is between reading and removing.
    pub(super) fn forget_current(&self, purged: impl Fn(&ObjectKey) -> bool) {
        self.state.lock().current.retain(|key, _| !purged(key));
    }

    /// `done` hears when all that was queued before is durable; it is dropped if the tier closed.
    pub(super) fn flush(&self, done: oneshot::Sender<Result<(), DiskError>>) {
        self.push(|state| state.work.flushes.push(done));
    }

    /// The thread ends after what is queued; nothing more is taken.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.wake.notify_one();
    }

    /// Takes entries again, once the thread has ended and another one is about to be started.
    pub(super) fn reopen(&self) {
        let mut state = self.state.lock();
        // What was set to be current meanwhile would be older than what the other process learned.
        *state = QueueState::default();
    }

    fn push(&self, add: impl FnOnce(&mut QueueState)) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        let first = state.since.is_none();
        if first {
            state.since = Some(Instant::now());
        }
        add(&mut state);
        if first || state.is_urgent() {
            drop(state);
            self.wake.notify_one();
        }
    }

    /// The next batch; `None`: closed, and all is done.
    fn next(&self) -> Option<Work> {
        let mut state = self.state.lock();
        while !state.is_urgent() {
            match state.since {
                None if state.closed => return None,
                None => self.wake.wait(&mut state),
                Some(since) => {
                    if self
                        .wake
                        .wait_until(&mut state, since + BATCH_TIME)
                        .timed_out()
                    {
                        break;
                    }
                }
            }
        }
        state.since = None;
        state.bytes = 0;
        Some(std::mem::take(&mut state.work))
    }

    /// Nobody will do what is queued.
    #[cfg(test)]
    pub(super) fn lose(&self) {
        self.state.lock().closed = true;
        drop(self.take());
    }

    #[cfg(test)]
    fn take(&self) -> Work {
        let mut state = self.state.lock();
        state.since = None;
        state.bytes = 0;
        std::mem::take(&mut state.work)
    }
}

impl QueueState {
    fn is_urgent(&self) -> bool {
        let waited_for = self.closed || !self.work.flushes.is_empty();
        self.bytes >= BATCH_BYTES || (waited_for && self.since.is_some())
    }
}

/// The thread's work, until the queue is closed.
pub(super) fn run(shared: &Arc<Shared>, checkpointer: &Checkpointer) {
    // Whoever waits must hear of it if this thread panics.
    let _close = CloseOnExit(&shared.queue);
    while let Some(mut work) = shared.queue.next() {
        let flushes = std::mem::take(&mut work.flushes);
        let commit = if flushes.is_empty() {
            Commit::Ordered
        } else {
            Commit::Durable
        };
        // While it is overdue no more is taken on that would have to wait here too.
        let _busy = shared
            .watch
            .begin("make segments durable", shared.watch.limits.sync);
        let settled = settle(shared, work, commit);
        if settled.is_ok() {
            shared.reached(Step::Recorded);
        }
        if checkpointer.is_due() {
            shared.reached(Step::Checkpointing);
            checkpointer.run();
            shared.reached(Step::Checkpointed);
        }
        if let Err(error) = &settled {
            tracing::error!(%error, "could not record what is on disk; dropped it");
        }
        for done in flushes {
            let told = match &settled {
                Ok(()) => Ok(()),
                Err(error) => Err(DiskError::Catalog(error.to_string())),
            };
            // Nobody waits any more: fine.
            let _ = done.send(told);
        }
    }
}

/// The thread's work, done by whoever waits for it.
#[cfg(test)]
pub(super) fn settle_now(shared: &Shared) {
    let mut work = shared.queue.take();
    let flushes = std::mem::take(&mut work.flushes);
    let settled = settle(shared, work, Commit::Durable);
    for done in flushes {
        let told = settled
            .as_ref()
            .copied()
            .map_err(|error| DiskError::Catalog(error.to_string()));
        let _ = done.send(told);
    }
}

struct CloseOnExit<'a>(&'a Queue);

impl Drop for CloseOnExit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        state.work = Work::default();
    }
}

/// One segment file's share of a batch.
struct Grown {
    held: Arc<HeldRevision>,
    key: SegmentKey,
    /// With new blocks.
    file: Option<Arc<SegmentFile>>,
    covered: Vec<(u32, BlockSum)>,
}

/// Syncs, then commits.
fn settle(shared: &Shared, work: Work, commit: Commit) -> Result<(), DiskError> {
    for incarnation in work.unlink {
        shared.unlink(incarnation);
    }
    let mut grown = by_file(work.blocks, work.grown);
    sync(shared, &mut grown);
    let mut batch = Batch {
        served: work.served,
        verified: work.verified,
        representations: work.representations.into_iter().collect(),
        ..Batch::default()
    };
    let mut recorded = Vec::new();
    let result = shared.catalog.lock().and_then(|mut db| {
        // All under the catalog's lock, so that no purge, eviction or admission is in between.
        for grown in &grown {
            if let Some(segment) = grown.describe() {
                recorded.push((grown, segment.served));
                batch.segments.push(segment);
            }
        }
        let forgotten = work.forgotten.into_iter();
        batch.forgotten = forgotten
            .filter(|(_, revision)| !shared.is_in_memory(revision))
            .map(|(id, _)| id)
            .collect();
        let changes = shared.queue.state.lock().current.clone();
        let current = changes.iter();
        batch.current = current
            .map(|(key, (_, record))| (key.clone(), record.clone()))
            .collect();
        let result = db.commit(&batch, commit);
        shared.note_standing(&db);
        // Failed ones too: they are write-behind, and must not pile up.
        shared.queue.drop_changes(&changes);
        result
    });
    match &result {
        Ok(()) => {
            shared.unrecorded.over();
            let mut grew: HashMap<i64, &HeldRevision> = HashMap::new();
            for (grown, served) in recorded {
                grown.recorded(served);
                grew.insert(grown.held.id, &grown.held);
            }
            for held in grew.into_values().filter(|held| held.is_complete()) {
                shared.completed(held.revision());
            }
        }
        Err(error) => {
            let error = io::Error::other(error.to_string());
            // What is written now could not be recorded either, and would be fetched in vain.
            shared.unrecorded.note("record in", &shared.dir, &error);
            for grown in grown.iter().filter(|grown| grown.file.is_some()) {
                shared.quarantine(&grown.held, grown.key, &error);
            }
        }
    }
    result
}

fn by_file(
    blocks: Vec<CompletedBlock>,
    touched: Vec<(Arc<HeldRevision>, SegmentKey)>,
) -> Vec<Grown> {
    let mut files: HashMap<(i64, SegmentKey), Grown> = HashMap::new();
    let entry = |held: Arc<HeldRevision>, key| Grown {
        held,
        key,
        file: None,
        covered: Vec::new(),
    };
    for block in blocks {
        let grown = files
            .entry((block.held.id, block.key))
            .or_insert_with(|| entry(block.held, block.key));
        grown.file = Some(block.file);
        grown.covered.push((block.block, block.sum));
    }
    for (held, key) in touched {
        files
            .entry((held.id, key))
            .or_insert_with(|| entry(held, key));
    }
    files.into_values().collect()
}

/// Data, then directories of new files. What fails is quarantined and leaves the batch.
fn sync(shared: &Shared, grown: &mut Vec<Grown>) {
    grown.retain(|grown| {
        let Some(file) = &grown.file else { return true };
        if grown.held.is_doomed() {
            return false;
        }
        match shared.sync.data(file.file()) {
            Ok(()) => {
                shared.reached(Step::DataSynced);
                true
            }
            Err(error) => {
                grown.give_up(shared, "fdatasync", &error);
                false
            }
        }
    });
    let mut synced: HashSet<PathBuf> = HashSet::new();
    grown.retain(|grown| {
        let Some(directory) = grown.unrecorded_in(shared) else {
            return true;
        };
        if synced.contains(&directory) {
            return true;
        }
        match shared.sync.directory(&directory) {
            Ok(()) => {
                shared.reached(Step::DirectorySynced);
                synced.insert(directory)
            }
            Err(error) => {
                grown.give_up(shared, "fsync", &error);
                false
            }
        }
    });
}

impl Grown {
    /// The segment as it is to be recorded; `None`: it was taken away meanwhile.
    fn describe(&self) -> Option<SegmentCommit> {
        let state = self.held.state.lock();
        let segment = state.segments.get(&self.key)?;
        Some(SegmentCommit {
            id: self.held.segment_id(self.key, segment),
            blocks: self.held.geometry.blocks_in(self.key.idx),
            bytes: segment.charge.bytes(),
            queue: segment.queue,
            place: segment.place,
            served: segment.charge.served(),
            covered: self.covered.clone(),
        })
    }

    fn recorded(&self, served: u64) {
        if let Some(segment) = self.held.state.lock().segments.get_mut(&self.key) {
            // Without a new block there may be no row yet.
            segment.recorded |= self.file.is_some();
            segment.stored_served = served;
        }
    }

    /// The directory that has to be synced because the file is new in it.
    fn unrecorded_in(&self, shared: &Shared) -> Option<PathBuf> {
        self.file.as_ref()?;
        let state = self.held.state.lock();
        let segment = state
            .segments
            .get(&self.key)
            .filter(|segment| !segment.recorded)?;
        Some(shared.shard_path(segment.incarnation))
    }

    fn give_up(&self, shared: &Shared, op: &'static str, error: &io::Error) {
        let incarnation = self
            .held
            .state
            .lock()
            .segments
            .get(&self.key)
            .map(|segment| segment.incarnation);
        if let Some(incarnation) = incarnation {
            shared
                .trouble
                .note(op, &shared.segment_path(incarnation), error);
            shared.quarantine(&self.held, self.key, error);
        }
    }
}
