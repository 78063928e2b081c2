//! The tier itself: which revisions are held, and for how long.
//!
//! [`Shared`] is what everything in the tier hangs on; [`DiskTier`] is the handle that opens and
//! closes it. Memory knows a bounded number of revisions. One that it does not know is looked up in
//! the catalog at its first touch; one that nobody holds is forgotten when there are too many.
//!
//! Load, admission, eviction and purge each hold the catalog's lock from reading or changing rows until
//! memory agrees. So none of them can put back what another one just took away:
//!
//! * A load inserts under the lock it read under, so a purge comes before (the load finds nothing)
//!   or after (the purge dooms what was loaded). `purge_beats_load_and_admit` guards this.
//! * A revision that memory forgets has nothing unrecorded: whoever has something to record holds
//!   the [`HeldRevision`], and one that is held is not forgotten.
//! * Who goes is for [`super::policy`] to say. Its queues are an index of the catalog, so no list of all segments is
//!   needed in memory, at a start least of all. What was served is counted in memory; the catalog hears of it when memory
//!   forgets a segment, when eviction moves it, and at the orderly end, but never because of a hit.

mod evict;
mod trouble;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use tokio::sync::{mpsc, oneshot};

use self::evict::{FreeSpace, policy_of};
use self::trouble::Trouble;
use super::catalog::{
    Catalog, Checkpointer, Left, Reader, ScrubRow, SegmentId, Start, StoredRevision,
};
use super::coverage;
use super::durability::{self, KernelSync, Queue, Syncer};
use super::failpoint::{self, Step};
use super::held::{HeldRevision, Segment, SegmentKey};
#[cfg(test)]
use super::inline;
use super::policy::{Policy, Standing};
use super::revive::{self, Keeper};
use super::room::{Reservation, Room};
use super::scrub::{self, Scrubber};
use super::sweep::{self, SweptSoFar};
use super::watch::{Limits, Watch};
use super::writer::{self, Steps};
use super::{
    Computed, CurrentRecord, DiskConfig, DiskError, DiskStats, Lookup, MinFree, PurgeTarget,
    Purged, ScrubReport, Whole, whole,
};
#[cfg(test)]
use crate::chance;
use crate::object::{ChecksumAlgorithm, ObjectKey, Representation, Revision};

/// Bytes of a segment where the capacity allows it: few enough files for 1 TB (16 thousand), small enough to evict in steps.
const SEGMENT_SIZE: u64 = 64 << 20;

/// Segments that should at least fit into the capacity, so that eviction stays fine-grained.
const MIN_SEGMENTS: u64 = 16;

/// Revisions that memory knows at most, unless more are in use at once. About 1 KiB each.
const REVISIONS_IN_MEMORY: usize = 16 * 1024;

/// Completed revisions that wait for their checksum to be compared. Beyond that the next completion counts.
const COMPLETIONS: usize = 1024;

/// Files that could not be removed, and are remembered. Each takes 16 bytes here, and mostly 64 MiB there.
const MAX_LEFT_OVER: usize = 64 << 10;

/// The tier.
pub struct DiskTier {
    pub(super) shared: Arc<Shared>,
    pub(super) worker: Mutex<Option<JoinHandle<()>>>,
    pub(super) sweeper: Mutex<Option<JoinHandle<()>>>,
    pub(super) scrub: Mutex<Option<JoinHandle<()>>>,
    completions: Mutex<Option<mpsc::Receiver<Revision>>>,
}

/// What the parts of the tier share.
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    min_free: MinFree,
    pub(super) block_size: u64,
    segment_size: u64,
    pub(super) room: Arc<Room>,
    pub(super) catalog: Catalog,
    pub(super) queue: Queue,
    pub(super) steps: Steps,
    pub(super) sync: Box<dyn Syncer>,
    pub(super) file_system: FileSystem,
    /// With segment files.
    pub(super) trouble: Trouble,
    /// With the catalog: written, but not recorded.
    pub(super) unrecorded: Trouble,
    /// With the file system's free space. Only told of: each reservation looks for itself.
    pub(super) crowded: Trouble,
    pub(super) keeper: Keeper,
    pub(super) watch: Arc<Watch>,
    /// Segments recorded by this run or an earlier one are verified before they are served.
    pub(super) suspect_run: AtomicI64,
    revisions: Mutex<Revisions>,
    /// One eviction at a time, else each would evict for all.
    evictor: Mutex<()>,
    /// Held by the thread that closes idle files.
    closing: Mutex<()>,
    pub(super) policy: Mutex<Policy>,
    pub(super) free_space: Mutex<Option<FreeSpace>>,
    /// Segment files made since the start, without those removed.
    pub(super) files_made: AtomicI64,
    pub(super) clock: AtomicU64,
    pub(super) random: File,
    /// The low half of every incarnation of this run: leftovers of earlier ones are told by it.
    pub(super) run_mark: AtomicU64,
    opening: Vec<Arc<tokio::sync::Mutex<()>>>,
    max_open_files: usize,
    closed: AtomicBool,
    /// Another process may write the directory: here it is at most read. Set under the catalog's lock.
    released: AtomicBool,
    pub(super) lock: Mutex<Option<File>>,
    /// Files that could not be removed.
    pub(super) left_over: Mutex<Vec<u128>>,
    /// What the catalog counted when another process was let in.
    released_bytes: AtomicU64,
    evictions: AtomicU64,
    /// By queue.
    evicted_bytes: [AtomicU64; 2],
    quarantines: AtomicU64,
    pub(super) scrubber: Scrubber,
    completed: mpsc::Sender<Revision>,
    pub(super) swept: SweptSoFar,
}

struct Revisions {
    /// Looked into by every request: so with a hash that is quick and differs from run to run, which is enough, for no name
    /// gets in without an object in the bucket.
    by_name: HashMap<Revision, Arc<HeldRevision>, foldhash::quality::RandomState>,
    limit: usize,
    /// Above this many, memory forgets some.
    trim_above: usize,
}

/// Asks what the file system has that a directory lies in.
pub(super) type FileSystem = Box<dyn Fn(&Path) -> io::Result<Space> + Send + Sync>;

/// What a file system has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    /// Bytes in all.
    pub(super) total: u64,
    /// Bytes that are left to us.
    pub(super) available: u64,
    /// Files that can still be made (free inodes); `u64::MAX`: it does not count them.
    pub(super) files: u64,
}

/// What tests change.
pub(super) struct Seams {
    pub(super) sync: Box<dyn Syncer>,
    pub(super) limits: Limits,
    pub(super) file_system: FileSystem,
    pub(super) revisions_in_memory: usize,
    pub(super) max_open_files: usize,
    /// Bytes of one write, a multiple of [`LEAST_STEP`](super::LEAST_STEP).
    pub(super) longest_step: u64,
}

impl Default for Seams {
    fn default() -> Self {
        // The rest is for connections, the remote and extents under way.
        let quarter = rustix::process::getrlimit(rustix::process::Resource::Nofile)
            .current
            .map_or(1 << 16, |limit| {
                usize::try_from(limit / 4).unwrap_or(1 << 16)
            });
        Self {
            sync: Box::new(KernelSync),
            limits: Limits::default(),
            file_system: Box::new(|dir| {
                let stat = rustix::fs::statvfs(dir)?;
                Ok(Space {
                    total: stat.f_blocks * stat.f_frsize,
                    available: stat.f_bavail * stat.f_frsize,
                    files: if stat.f_files == 0 {
                        u64::MAX
                    } else {
                        stat.f_favail
                    },
                })
            }),
            revisions_in_memory: REVISIONS_IN_MEMORY,
            max_open_files: quarter.clamp(16, 1 << 16),
            longest_step: writer::longest_step(),
        }
    }
}

impl DiskTier {
    /// Opens or makes the tier: lock, catalog (migrated, or set aside if it is damaged or newer).
    /// Files that no row names are removed in the background. Blocking, but for milliseconds
    /// whatever is held.
    ///
    /// A directory that is full, read-only or fails is no error: the tier is [out](DiskTier::trouble) then, and comes
    /// back when the disk does.
    ///
    /// # Errors
    /// [`DiskError::Locked`] if a process has it open; [`DiskError::Io`] if there cannot be such a directory, or it is
    /// not one that we may use.
    ///
    /// # Panics
    /// If `block_size` is not a power of two; `config` has checked it.
    pub fn open(config: DiskConfig) -> Result<Arc<Self>, DiskError> {
        Self::open_with(config, Seams::default())
    }

    pub(super) fn open_with(config: DiskConfig, seams: Seams) -> Result<Arc<Self>, DiskError> {
        assert!(
            config.block_size.is_power_of_two(),
            "block_size {}",
            config.block_size
        );
        let dir = config.dir;
        let random = File::open("/dev/urandom")
            .map_err(|error| DiskError::io("open", Path::new("/dev/urandom"), error))?;
        let (completed, completions) = mpsc::channel(COMPLETIONS);
        let policy = Policy::new(config.capacity, Standing::default());
        let shared = Arc::new(Shared {
            min_free: config.min_free,
            block_size: config.block_size,
            segment_size: segment_size(config.capacity, config.block_size),
            room: Room::new(config.capacity, 0),
            catalog: Catalog::absent(),
            queue: Queue::default(),
            sync: seams.sync,
            file_system: seams.file_system,
            trouble: Trouble::default(),
            unrecorded: Trouble::default(),
            crowded: Trouble::default(),
            keeper: Keeper::default(),
            watch: Watch::new(seams.limits),
            suspect_run: AtomicI64::new(0),
            revisions: Mutex::new(Revisions {
                by_name: HashMap::default(),
                limit: seams.revisions_in_memory,
                trim_above: seams.revisions_in_memory,
            }),
            evictor: Mutex::new(()),
            closing: Mutex::new(()),
            steps: Steps::new(seams.longest_step),
            policy: Mutex::new(policy),
            free_space: Mutex::new(None),
            files_made: AtomicI64::new(0),
            clock: AtomicU64::new(1),
            run_mark: AtomicU64::new(0),
            random,
            opening: (0..64).map(|_| Arc::default()).collect(),
            max_open_files: seams.max_open_files,
            closed: AtomicBool::new(false),
            released: AtomicBool::new(false),
            lock: Mutex::new(None),
            left_over: Mutex::default(),
            released_bytes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            evicted_bytes: Default::default(),
            quarantines: AtomicU64::new(0),
            scrubber: Scrubber::new(config.scrub_rate),
            completed,
            swept: SweptSoFar::default(),
            dir,
        });
        let tier = Arc::new(Self {
            shared,
            worker: Mutex::new(None),
            sweeper: Mutex::new(None),
            scrub: Mutex::new(None),
            completions: Mutex::new(Some(completions)),
        });
        revive::start(&tier)?;
        Ok(tier)
    }

    /// Starts the threads of a run.
    pub(super) fn begin(&self, start: &Start, checkpointer: Checkpointer) -> Result<(), DiskError> {
        if start.suspect_run == start.run - 1 && start.suspect_run > 0 {
            tracing::warn!(
                "the last run did not end orderly: segments it recorded are verified at their first use"
            );
        }
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            #[cfg(test)]
            let work = if inline::is_on() {
                Box::new(|| ())
            } else {
                work
            };
            std::thread::Builder::new()
                .name(name.into())
                .spawn(work)
                .map_err(|error| DiskError::io("start a thread for", &self.shared.dir, error))
        };
        let me = Arc::clone(&self.shared);
        *self.worker.lock() = Some(spawn(
            "disk-durability",
            Box::new(move || durability::run(&me, &checkpointer)),
        )?);
        let last_revision = start.last_revision;
        let me = Arc::clone(&self.shared);
        let other_blocks = start.last_block_size.filter(|size| *size != me.block_size);
        let reader = Catalog::reader(&me.dir)?;
        *self.sweeper.lock() = Some(spawn(
            "disk-sweep",
            Box::new(move || {
                if let Some(before) = other_blocks {
                    me.tell_of_other_blocks(&reader, before);
                }
                me.shrink();
                sweep::run(&me, &reader, last_revision);
            }),
        )?);
        let me = Arc::clone(&self.shared);
        *self.scrub.lock() = Some(spawn("disk-scrub", Box::new(move || scrub::run(&me)))?);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Unit of coverage in bytes.
    pub fn block_size(&self) -> u64 {
        self.shared.block_size
    }

    /// Memory only; never blocks.
    pub fn lookup(&self, revision: &Revision) -> Lookup {
        self.shared
            .lookup(revision)
            .map_or(Lookup::Unknown, Lookup::Held)
    }

    /// Memory, then the catalog (off the runtime's workers). `None`: no byte of it is held, or the
    /// catalog is in trouble (logged). What is not held leaves nothing in memory (P12).
    pub async fn load(&self, revision: &Revision) -> Option<Arc<HeldRevision>> {
        if let Some(held) = self.shared.lookup(revision) {
            return Some(held);
        }
        let (shared, wanted) = (Arc::clone(&self.shared), revision.clone());
        let limit = self.shared.watch.limits.catalog;
        let loaded = self
            .shared
            .watch
            .run("look up a revision", limit, move || shared.load(wanted));
        match loaded.await {
            Ok(held) => held,
            Err(error) => {
                self.shared
                    .unanswered("could not look up a revision: taken as not held", &error);
                None
            }
        }
    }

    /// The held entry for this revision, made if need be; stored headers are replaced by these. One of another
    /// length is replaced if no byte of it is held.
    ///
    /// Cancelling leaves the revision admitted or not.
    ///
    /// # Errors
    /// [`DiskError::TwoLengths`] if bytes of one of another length are held: they stay. [`DiskError::Catalog`] or
    /// [`DiskError::Hangs`]: go past the disk.
    pub async fn admit(
        &self,
        key: &ObjectKey,
        representation: &Representation,
    ) -> Result<Arc<HeldRevision>, DiskError> {
        let revision = Revision {
            key: key.clone(),
            validator: representation.validator.clone(),
        };
        if let Some(held) = self.shared.lookup(&revision)
            && held.geometry.size == representation.size
        {
            held.update_representation(Arc::new(representation.clone()));
            return Ok(held);
        }
        let (shared, representation) = (Arc::clone(&self.shared), representation.clone());
        let limit = self.shared.watch.limits.catalog;
        let admitted = self.shared.watch.run("record a revision", limit, move || {
            shared.admit(revision, &representation)
        });
        admitted.await
    }

    /// What was current when last asked; survives a restart. `None` as well if the catalog is in
    /// trouble (logged).
    pub async fn last_current(&self, key: &ObjectKey) -> Option<CurrentRecord> {
        if let Some(pending) = self.shared.queue.pending_current(key) {
            return pending.0;
        }
        let (shared, wanted) = (Arc::clone(&self.shared), key.clone());
        let limit = self.shared.watch.limits.catalog;
        let found = self
            .shared
            .watch
            .run("look up what was current", limit, move || {
                let db = shared.catalog.lock()?;
                // Under the lock: a purge or a commit may have come in between.
                match shared.queue.pending_current(&wanted) {
                    Some(pending) => Ok(pending.0),
                    None => db.current(&wanted),
                }
            });
        found.await.unwrap_or_else(|error| {
            self.shared
                .unanswered("could not look up what was current", &error);
            None
        })
    }

    /// Write-behind; `None`: the key is absent. Stamped with the time of this call.
    pub fn set_current(&self, key: &ObjectKey, representation: Option<&Arc<Representation>>) {
        let record = representation.map(|representation| CurrentRecord {
            representation: Arc::clone(representation),
            checked_at: SystemTime::now(),
        });
        self.shared.queue.set_current(key, record);
    }

    /// Forgets: gone from memory and catalog, durably, and unlinked when this returns. Writers of
    /// what is purged get [`DiskError::Purged`]; extents under way can be sent to their end.
    ///
    /// Cancelling does not stop it.
    ///
    /// # Errors
    /// [`DiskError::Catalog`]: nothing was purged. [`DiskError::Hangs`]: it may be yet, once the disk answers.
    pub async fn purge(&self, target: PurgeTarget) -> Result<Purged, DiskError> {
        let shared = Arc::clone(&self.shared);
        let limit = self.shared.watch.limits.sync;
        let purged = self
            .shared
            .watch
            .run("purge", limit, move || shared.purge(&target));
        purged.await
    }

    /// Room for `bytes`, evicting segments if need be.
    ///
    /// # Errors
    /// [`DiskError::NoRoom`] if what is in use leaves no room, or the disk is in trouble.
    pub async fn reserve(&self, bytes: u64) -> Result<Reservation, DiskError> {
        let shared = &self.shared;
        if shared.closed.load(Ordering::Acquire)
            || shared.trouble.refuses_writes()
            || shared.unrecorded.refuses_writes()
            || shared.keeper.is_out()
            || shared.watch.overdue().is_some()
            || bytes > shared.room.capacity()
        {
            return Err(DiskError::NoRoom);
        }
        let bytes = coverage::taken(shared.block_size, bytes);
        if shared.has_recent_spare(bytes)
            && let Some(reservation) = shared.room.reserve(bytes)
        {
            return Ok(reservation);
        }
        let shared = Arc::clone(shared);
        let limit = shared.watch.limits.write;
        let watch = Arc::clone(&shared.watch);
        watch
            .run("make room", limit, move || shared.make_room(bytes))
            .await
    }

    /// Waits until every block completed before the call is durable: it survives power loss.
    ///
    /// # Errors
    /// [`DiskError::Catalog`] if coverage could not be committed. Blocks whose data could not be
    /// synced are dropped and logged, and not an error here.
    pub async fn flush(&self) -> Result<(), DiskError> {
        let (done, wait) = oneshot::channel();
        self.shared.flush(done);
        wait.await
            .unwrap_or_else(|_| Err(DiskError::Catalog("the tier has been closed".into())))
    }

    /// Compares every block that is held with its checksum, as fast as the disk reads, and drops the files that have a
    /// wrong one; see [`super::scrub`]. `None`: another such pass is under way.
    ///
    /// Dropping the future does not stop it; [`DiskTier::close`] does.
    ///
    /// # Errors
    /// [`DiskError::Catalog`] if the catalog is in trouble or the tier was closed.
    pub async fn scrub(&self) -> Result<Option<ScrubReport>, DiskError> {
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.scrub_all()).await
    }

    /// Names of revisions every block of which is held, a moment after the last one became durable. Some may be
    /// left out, others come twice. To be taken once: `None` from the second time on.
    pub fn completions(&self) -> Option<mpsc::Receiver<Revision>> {
        self.completions.lock().take()
    }

    /// What is known of the checksum of the whole revision. `None`: it was not compared yet, or it is not held.
    ///
    /// # Errors
    /// [`DiskError::Catalog`]
    pub async fn whole(&self, revision: &Revision) -> Result<Option<Whole>, DiskError> {
        let (shared, revision) = (Arc::clone(&self.shared), revision.clone());
        blocking(move || {
            let db = shared.catalog.lock()?;
            match db.find(&revision)? {
                Some(stored) => db.whole(stored.id),
                None => Ok(None),
            }
        })
        .await
    }

    /// The checksum of the whole revision as it is held: combined from those of its blocks, or, where it does not
    /// combine, computed from what is on the disk.
    ///
    /// Cancelling does not stop it.
    ///
    /// # Errors
    /// [`DiskError::Catalog`], or [`DiskError::Io`] for what could not be read.
    pub async fn checksum_of(
        &self,
        revision: &Revision,
        algorithm: ChecksumAlgorithm,
    ) -> Result<Computed, DiskError> {
        let (shared, revision) = (Arc::clone(&self.shared), revision.clone());
        blocking(move || {
            let stored = shared.catalog.lock()?.find(&revision)?;
            let Some(stored) = stored else {
                return Ok(Computed::Incomplete);
            };
            let sums = |incarnation| shared.catalog.lock()?.sums(incarnation);
            let path = |incarnation| shared.segment_path(incarnation);
            whole::checksum(&stored, algorithm, sums, path)
        })
        .await
    }

    /// Remembers what is known of the checksum of the whole revision. One that is not held is left alone.
    ///
    /// # Errors
    /// [`DiskError::Catalog`]
    pub async fn set_whole(&self, revision: &Revision, whole: Whole) -> Result<(), DiskError> {
        let (shared, revision) = (Arc::clone(&self.shared), revision.clone());
        blocking(move || {
            let mut db = shared.catalog.lock()?;
            if shared.is_released() {
                // The process that writes now compares for itself.
                return Ok(());
            }
            match db.find(&revision)? {
                Some(stored) => db.set_whole(stored.id, &whole),
                None => Ok(()),
            }
        })
        .await
    }

    /// Forgets one revision, durably: its bytes are not those of its validator. As [`DiskTier::purge`] otherwise.
    ///
    /// Cancelling does not stop it.
    ///
    /// # Errors
    /// [`DiskError::Catalog`]: it is still held.
    pub async fn drop_revision(&self, revision: &Revision) -> Result<Purged, DiskError> {
        let (shared, revision) = (Arc::clone(&self.shared), revision.clone());
        blocking(move || shared.drop_revision(&revision)).await
    }

    /// The orderly end: records everything, so that the next start trusts it, and releases the
    /// directory. Reservations are refused from here on; extents can still be sent.
    ///
    /// # Errors
    /// [`DiskError::Catalog`] if that could not be recorded; the next start verifies instead.
    pub async fn close(&self) -> Result<(), DiskError> {
        self.shared.keeper.end();
        self.end(|shared, left| shared.catalog.close(left)).await?;
        self.shared.catalog.stop_reading();
        Ok(())
    }

    /// Reservations are refused from here on; what was reserved before can still be written. The first step of
    /// [`release`](Self::release), so that writers can come to their end before the second.
    pub fn refuse_writes(&self) {
        self.shared.closed.store(true, Ordering::Release);
    }

    /// Closes the tier in order, for another process to write it, and goes on reading: [`load`](Self::load) finds
    /// what the catalog holds at that very moment, whoever recorded it, and nothing is kept in memory, so that what the
    /// other process purges is not found here either. Writers have to be gone before.
    ///
    /// Cancelling does not stop it.
    ///
    /// # Errors
    /// [`DiskError::Catalog`] if it could not be closed in order or cannot be read: it is closed then, and what it
    /// held is not found until [`reclaim`](Self::reclaim).
    pub async fn release(&self) -> Result<(), DiskError> {
        self.end(|shared, left| {
            let bytes = shared.catalog.release(&shared.dir, left)?;
            shared.released_bytes.store(bytes, Ordering::Release);
            Ok(())
        })
        .await
    }

    /// Undoes [`release`](Self::release), when the other process has gone without having taken the tier for good.
    ///
    /// # Errors
    /// As [`open`](Self::open): [`DiskError::Locked`] while the other process lives.
    pub async fn reclaim(self: &Arc<Self>) -> Result<(), DiskError> {
        let me = Arc::clone(self);
        let limit = self.shared.watch.limits.sync;
        let taken_back = self
            .shared
            .watch
            .run("take the catalog back", limit, move || {
                let shared = &me.shared;
                let lock = lock(&shared.dir)?;
                let start = shared.catalog.reopen(&shared.dir, shared.sync.as_ref())?;
                let checkpointer = Catalog::checkpointer(&shared.dir)?;
                shared.take_up(&start);
                let before = shared.released_bytes.load(Ordering::Acquire);
                shared.room.recount(before, start.bytes);
                shared.queue.reopen();
                shared.scrubber.resume();
                *shared.lock.lock() = Some(lock);
                shared.released.store(false, Ordering::Release);
                // First, for the threads end where the tier is closed.
                shared.closed.store(false, Ordering::Release);
                me.begin(&start, checkpointer)
            });
        taken_back.await
    }

    /// Ends the run: threads, memory, the catalog by `close`, the lock.
    async fn end(
        &self,
        close: impl FnOnce(&Shared, &Left) -> Result<(), DiskError> + Send + 'static,
    ) -> Result<(), DiskError> {
        let shared = Arc::clone(&self.shared);
        shared.closed.store(true, Ordering::Release);
        shared.queue.close();
        #[cfg(test)]
        if inline::is_on() {
            durability::settle_now(&shared);
        }
        shared.scrubber.stop();
        let threads = [&self.worker, &self.sweeper, &self.scrub].map(|thread| thread.lock().take());
        // Threads that hang do not end, and the process is not to hang with them.
        let limit = self.shared.watch.limits.sync;
        let watch = Arc::clone(&self.shared.watch);
        let closed = watch.run("close the catalog", limit, move || {
            let _not_opened_now = shared.keeper.pause();
            for thread in threads.into_iter().flatten() {
                if thread.join().is_err() {
                    return Err(DiskError::Catalog(
                        "a thread of the disk tier panicked".into(),
                    ));
                }
            }
            // A pass that somebody asked for ends soon too.
            drop(shared.scrubber.pass.lock());
            let held = {
                // So that a load either put into memory what is taken out here, or sees that it must not.
                let _db = shared.catalog.lock();
                if shared.released.swap(true, Ordering::AcqRel) {
                    return Ok(());
                }
                std::mem::take(&mut shared.revisions.lock().by_name)
            };
            let left = Left {
                served: held.values().flat_map(served_since_recorded).collect(),
                ghosts: shared.policy.lock().save(),
            };
            let closed = close(&shared, &left);
            shared.reached(Step::Closed);
            *shared.lock.lock() = None;
            closed
        });
        closed.await
    }

    /// What is wrong with the disk, for people; `None`: nothing that is known. Requests are served all the same.
    pub fn trouble(&self) -> Option<String> {
        let shared = &self.shared;
        if let Some(why) = shared.keeper.out() {
            return Some(format!("the cache directory is not in use: {why}"));
        }
        if let Some(what) = shared.watch.overdue() {
            return Some(format!("the cache disk hangs: could not {what} in time"));
        }
        [&shared.trouble, &shared.unrecorded, &shared.crowded]
            .into_iter()
            .find_map(Trouble::what)
    }

    /// The process ends here: what waits to be recorded is lost.
    #[cfg(test)]
    pub(crate) fn crash(&self) {
        self.shared.queue.lose();
        *self.shared.lock.lock() = None;
    }

    /// Counters.
    pub fn stats(&self) -> DiskStats {
        let shared = &self.shared;
        let (standing, ghost_hits) = {
            let policy = shared.policy.lock();
            (policy.standing(), policy.ghost_hits())
        };
        let [evicted_small, evicted_main] = &shared.evicted_bytes;
        DiskStats {
            used_bytes: shared.room.used(),
            capacity_bytes: shared.room.capacity(),
            evictions: shared.evictions.load(Ordering::Relaxed),
            small_bytes: standing.small,
            main_bytes: standing.main,
            evicted_small_bytes: evicted_small.load(Ordering::Relaxed),
            evicted_main_bytes: evicted_main.load(Ordering::Relaxed),
            ghost_hits,
            quarantines: shared.quarantines.load(Ordering::Relaxed),
            swept: shared.swept.so_far(),
            sweeping: shared.swept.is_going_on(),
            revisions_in_memory: shared.revisions.lock().by_name.len() as u64,
            open_files: shared.room.open_files() as u64,
            scrubbed_bytes: shared.scrubber.bytes.load(Ordering::Relaxed),
            scrubbed_segments: shared.scrubber.segments.load(Ordering::Relaxed),
            corrupt_blocks: shared.scrubber.corrupt_blocks.load(Ordering::Relaxed),
            oldest_verified: shared.scrubber.oldest_age(),
            degraded: self.trouble().is_some(),
            out: shared.keeper.is_out(),
        }
    }
}

impl Drop for DiskTier {
    /// Without [`DiskTier::close`] this is an unclean stop: the next start verifies.
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.keeper.end();
        self.shared.queue.close();
        self.shared.scrubber.stop();
        // Revisions hold the shared part, and it them.
        let held = std::mem::take(&mut self.shared.revisions.lock().by_name);
        drop(held);
    }
}

impl Shared {
    /// A request goes on without an answer of the catalog. The trouble behind it is reported elsewhere, once; this is
    /// each request's share of it.
    fn unanswered(&self, what: &'static str, error: &DiskError) {
        match error {
            DiskError::Hangs { .. } => tracing::debug!(%error, what),
            _ if self.keeper.is_out() => tracing::debug!(%error, what),
            _ => tracing::error!(%error, what),
        }
    }

    /// Takes up what the catalog says at the start of a run.
    pub(super) fn take_up(&self, start: &Start) {
        self.suspect_run.store(start.suspect_run, Ordering::Release);
        self.clock
            .fetch_max(start.last_place + 1, Ordering::Relaxed);
        *self.policy.lock() = policy_of(self.room.capacity(), start);
    }

    /// The next recency stamp, and place in a queue. Logical, so that a clock that jumps does not reorder eviction.
    pub(super) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn reached(&self, step: Step) {
        failpoint::reached(&self.dir, step);
    }

    /// The tier is closing or closed.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// It is, or its directory went away: what goes on in the background ends.
    pub(super) fn is_over(&self) -> bool {
        self.is_closed() || self.keeper.is_out()
    }

    /// Whether this run made the file.
    pub(super) fn is_of_this_run(&self, incarnation: u128) -> bool {
        incarnation & u128::from(u64::MAX) == u128::from(self.run_mark.load(Ordering::Acquire))
    }

    pub(super) fn shard_path(&self, incarnation: u128) -> PathBuf {
        shard_path(&self.dir, incarnation)
    }

    pub(super) fn segment_path(&self, incarnation: u128) -> PathBuf {
        segment_path(&self.dir, incarnation)
    }

    /// A name that no file had or will have: 64 random bits of its own beside 64 of this run.
    pub(super) fn new_incarnation(&self) -> Result<u128, DiskError> {
        let own = random_u64(&mut &self.random)?;
        Ok(u128::from(own) << 64 | u128::from(self.run_mark.load(Ordering::Acquire)))
    }

    pub(super) fn opening_turn(&self, incarnation: u128) -> Arc<tokio::sync::Mutex<()>> {
        // The high half is random.
        let slot = (incarnation >> 64) % self.opening.len() as u128;
        Arc::clone(&self.opening[usize::try_from(slot).unwrap_or(0)])
    }

    /// Does not count as a touch.
    pub(super) fn in_memory(&self, revision: &Revision) -> Option<Arc<HeldRevision>> {
        self.revisions.lock().by_name.get(revision).cloned()
    }

    fn lookup(&self, revision: &Revision) -> Option<Arc<HeldRevision>> {
        let held = Arc::clone(self.revisions.lock().by_name.get(revision)?);
        held.touch();
        Some(held)
    }

    /// How many revisions memory knows at most, unless more are in use.
    pub(super) fn revisions_in_memory(&self) -> usize {
        self.revisions.lock().limit
    }

    /// Empties memory, and returns what was in it.
    pub(super) fn forget_all(&self) -> Vec<Arc<HeldRevision>> {
        let by_name = std::mem::take(&mut self.revisions.lock().by_name);
        by_name.into_values().collect()
    }

    pub(super) fn is_in_memory(&self, revision: &Revision) -> bool {
        self.revisions.lock().by_name.contains_key(revision)
    }

    fn load(self: &Arc<Self>, revision: Revision) -> Result<Option<Arc<HeldRevision>>, DiskError> {
        let db = self.catalog.lock()?;
        if let Some(held) = self.lookup(&revision) {
            return Ok(Some(held));
        }
        let Some(stored) = db.find(&revision)? else {
            return Ok(None);
        };
        if stored.is_bare() || stored.block_size != self.block_size {
            return Ok(None);
        }
        if self.is_released() {
            // Not kept: the process that writes now may purge it.
            return Ok(Some(HeldRevision::new(self, revision, stored)));
        }
        Ok(Some(self.insert(revision, stored)))
    }

    fn admit(
        self: &Arc<Self>,
        revision: Revision,
        representation: &Representation,
    ) -> Result<Arc<HeldRevision>, DiskError> {
        let mut db = self.catalog.lock()?;
        let known = self.lookup(&revision);
        if let Some(held) = &known
            && held.geometry.size == representation.size
        {
            held.update_representation(Arc::new(representation.clone()));
            return Ok(Arc::clone(held));
        }
        if let Some(other) = &known
            && !other.is_bare()
        {
            return Err(DiskError::TwoLengths {
                held: other.size(),
                given: representation.size,
            });
        }
        let (stored, replaced) = db.admit(
            &revision.key,
            representation,
            self.segment_size,
            self.block_size,
            known.is_some(),
        )?;
        let mut doomed = Vec::new();
        self.reached(Step::Admitted);
        if let Some(other) = known {
            self.revisions.lock().by_name.remove(&revision);
            doomed = other.doom();
        }
        let held = self.insert(revision, stored);
        drop(db);
        self.unlink_all(doomed, &replaced);
        Ok(held)
    }

    /// To be called under the catalog's lock.
    fn insert(self: &Arc<Self>, revision: Revision, stored: StoredRevision) -> Arc<HeldRevision> {
        let held = HeldRevision::new(self, revision.clone(), stored);
        let forgotten = {
            let mut revisions = self.revisions.lock();
            revisions.by_name.insert(revision, Arc::clone(&held));
            revisions.trim()
        };
        for forgotten in forgotten {
            let served = served_since_recorded(&forgotten);
            let bare = forgotten.state.lock().segments.is_empty();
            let id = bare.then(|| (forgotten.id, forgotten.revision().clone()));
            self.queue.forgotten(served, id);
        }
        held
    }

    /// Whether it is what memory has of its revision.
    fn keeps(&self, held: &HeldRevision) -> bool {
        let revisions = self.revisions.lock();
        let known = revisions.by_name.get(held.revision());
        known.is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), held))
    }

    fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    fn purge(&self, target: &PurgeTarget) -> Result<Purged, DiskError> {
        let mut db = self.catalog.lock()?;
        if self.is_released() {
            return Err(DiskError::Catalog(
                "another process is taking the cache directory over: ask again".into(),
            ));
        }
        self.queue.forget_current(|key| target.matches(key));
        let deleted = db.purge(target)?;
        self.reached(Step::Purged);
        // Only after the commit: what failed must not be half purged. Until here the lock kept
        // everyone else from admitting or loading.
        let doomed: Vec<_> = {
            let mut revisions = self.revisions.lock();
            let matching = revisions.by_name.extract_if(|revision, held| {
                held.id <= deleted.up_to && target.matches(&revision.key)
            });
            matching.map(|(_, held)| held).collect()
        };
        let segments: Vec<_> = doomed.iter().flat_map(|held| held.doom()).collect();
        self.note_standing(&db);
        drop(db);
        let bytes = self.unlink_all(segments, &deleted.segments);
        Ok(Purged {
            revisions: deleted.revisions,
            bytes,
        })
    }

    /// Unlinks what memory gave up and what only the catalog knew. Returns the bytes.
    fn unlink_all(&self, known: Vec<Segment>, rows: &[(u128, u64)]) -> u64 {
        let mut bytes = 0;
        let mut done = HashSet::new();
        for segment in known {
            segment.charge.unlink();
            bytes += segment.charge.bytes();
            self.unlink(segment.incarnation);
            done.insert(segment.incarnation);
        }
        for (incarnation, row_bytes) in rows {
            if !done.contains(incarnation) {
                bytes += row_bytes;
                self.unlink(*incarnation);
                self.room.release(*row_bytes);
            }
        }
        bytes
    }

    /// Removes a file whose row is gone, and says whether it was there. One that stays takes room that nobody accounts
    /// for: it is tried again once the disk works, and at the latest swept at the next start.
    pub(super) fn unlink(&self, incarnation: u128) -> bool {
        self.try_unlink(incarnation).unwrap_or_else(|_noted| {
            let mut left = self.left_over.lock();
            if left.len() < MAX_LEFT_OVER {
                left.push(incarnation);
            }
            false
        })
    }

    pub(super) fn try_unlink(&self, incarnation: u128) -> io::Result<bool> {
        let path = self.segment_path(incarnation);
        match fs::remove_file(&path) {
            Ok(()) => {
                self.files_made.fetch_sub(1, Ordering::Relaxed);
                self.reached(Step::Unlinked);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => {
                self.trouble.note("unlink", &path, &error);
                Err(error)
            }
        }
    }

    /// Drops a segment file that cannot be trusted: its row and the file. Blocking.
    pub(super) fn quarantine(&self, held: &HeldRevision, key: SegmentKey, why: &io::Error) {
        // Under the catalog's lock, else eviction might count the same bytes as given back.
        let db = self.catalog.lock();
        let Some(segment) = held.state.lock().segments.remove(&key) else {
            return;
        };
        if self.is_released() || !self.keeps(held) {
            // Evicted or purged by the process that writes now, or did when it was looked up. If it was neither, who
            // knows the file better finds out.
            return;
        }
        let id = held.segment_id(key, &segment);
        self.tell_of_quarantine(&id, held.revision(), segment.charge.bytes(), why);
        let row = db.and_then(|mut db| match db.delete_segment(&id) {
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::error!(%error, "could not take it out of the catalog");
                db.segment_bytes(&id)
            }
        });
        self.reached(Step::Quarantined);
        match row {
            Ok(None) => segment.charge.unlink(),
            // The row stays, finds no file from now on, and gives its bytes back when it is evicted or swept.
            Ok(Some(bytes)) => segment.charge.leave_to_row(bytes),
            Err(_) => {}
        }
        drop(segment);
        self.unlink(id.incarnation);
    }

    fn tell_of_quarantine(&self, id: &SegmentId, revision: &Revision, bytes: u64, why: &io::Error) {
        self.quarantines.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            file = %self.segment_path(id.incarnation).display(),
            key = ?revision.key, validator = ?revision.validator, bytes, reason = %why,
            "dropped a segment file that cannot be trusted; its bytes are fetched again when asked for"
        );
    }

    /// As [`Shared::quarantine`], for a file that memory need not know. `false`: it is gone already, or the catalog is
    /// in trouble.
    pub(super) fn quarantine_by_name(
        &self,
        id: &SegmentId,
        revision: &Revision,
        why: &io::Error,
    ) -> bool {
        let in_memory = || {
            let held = self.in_memory(revision)?;
            Some((held.named(id)?, held))
        };
        if let Some((key, held)) = in_memory() {
            self.quarantine(&held, key, why);
            return true;
        }
        let deleted = self.catalog.lock().and_then(|mut db| {
            // It may have been loaded meanwhile; from here on it cannot be.
            match in_memory() {
                Some(found) => Ok(Err(found)),
                None => db.delete_segment(id).map(Ok),
            }
        });
        match deleted {
            Ok(Ok(Some(bytes))) => {
                self.tell_of_quarantine(id, revision, bytes, why);
                self.unlink(id.incarnation);
                self.room.release(bytes);
                true
            }
            Ok(Ok(None)) => false,
            Ok(Err((key, held))) => {
                self.quarantine(&held, key, why);
                true
            }
            Err(error) => {
                tracing::error!(%error, "could not take a segment that cannot be trusted out of the catalog");
                false
            }
        }
    }

    /// The scrubber found the file as it was written.
    pub(super) fn trust(&self, row: &ScrubRow) {
        if let Some(held) = self.in_memory(&row.revision)
            && let Some(key) = held.named(&row.id)
        {
            held.trust(key);
        }
    }

    /// Every block of the revision is held and durable. Never blocks: whoever compares whole objects may be behind, and
    /// is told of this one when it becomes complete again.
    pub(super) fn completed(&self, revision: &Revision) {
        let _ = self.completed.try_send(revision.clone());
    }

    fn drop_revision(&self, revision: &Revision) -> Result<Purged, DiskError> {
        let mut db = self.catalog.lock()?;
        let Some(stored) = db.find(revision)? else {
            return Ok(Purged::default());
        };
        let files = db.delete_revision(stored.id)?;
        let doomed = self.revisions.lock().by_name.remove(revision);
        let segments = doomed.map(|held| held.doom()).unwrap_or_default();
        drop(db);
        Ok(Purged {
            revisions: 1,
            bytes: self.unlink_all(segments, &files),
        })
    }

    /// Waits until what was completed has a row. Failure shows as what was not recorded.
    pub(super) fn flush_blocking(&self) {
        let (done, wait) = oneshot::channel();
        self.flush(done);
        #[cfg(test)]
        if inline::is_on() {
            return;
        }
        let _ = wait.blocking_recv();
    }

    /// `done` hears when what was queued until now is durable.
    fn flush(&self, done: oneshot::Sender<Result<(), DiskError>>) {
        self.queue.flush(done);
        #[cfg(test)]
        if inline::is_on() {
            durability::settle_now(self);
        }
    }

    /// Says that what is held in blocks of another size is of no use, if there is any.
    fn tell_of_other_blocks(&self, reader: &Reader, before: u64) {
        match reader.bytes_in_other_blocks(self.block_size) {
            Ok(0) => {}
            Ok(bytes) => tracing::warn!(
                bytes,
                before,
                now = self.block_size,
                "cache.block_size was changed: what is held in blocks of another size is not served and is fetched \
                 again; it makes room as it is evicted, or serves again under its own block_size"
            ),
            // Whoever needs the catalog next says what is wrong with it.
            Err(error) => {
                tracing::debug!(%error, "could not count bytes in blocks of another size");
            }
        }
    }

    /// Closes segment files that nobody sends from, the least recently used first, once there are
    /// too many. Blocking: looks at every revision in memory, and then makes room for a while. One thread does so
    /// at a time; others go on meanwhile, so that there may be a few files more than that.
    pub(super) fn close_idle_files(&self) {
        if self.room.open_files() < self.max_open_files {
            return;
        }
        let Some(_one_at_a_time) = self.closing.try_lock() else {
            return;
        };
        let held: Vec<_> = self.revisions.lock().by_name.values().cloned().collect();
        let mut idle = Vec::new();
        for held in &held {
            for (key, segment) in &held.state.lock().segments {
                if segment.file.is_some() && !segment.in_use() && segment.recorded {
                    idle.push((segment.last_used, held, *key));
                }
            }
        }
        idle.sort_unstable_by_key(|(last_used, _, _)| *last_used);
        for (_, held, key) in idle.into_iter().take(self.max_open_files / 4 + 1) {
            let mut state = held.state.lock();
            if let Some(segment) = state.segments.get_mut(&key)
                && !segment.in_use()
            {
                // It is opened for reading from here on.
                segment.claimed = None;
                let file = segment.file.take();
                drop(state);
                drop(file);
            }
        }
    }
}

impl Revisions {
    /// Takes out the revisions used longest ago that nobody holds, once there are too many. They
    /// are returned so that they are dropped outside the lock.
    fn trim(&mut self) -> Vec<Arc<HeldRevision>> {
        if self.by_name.len() <= self.trim_above {
            return Vec::new();
        }
        let mut idle: Vec<_> = self
            .by_name
            .values()
            // An open extent outlives its revision; forgetting it would open its file twice and
            // count its bytes once.
            .filter(|held| {
                Arc::strong_count(held) == 1
                    && !held.state.lock().segments.values().any(Segment::in_use)
            })
            .map(|held| (held.touched(), held.revision().clone()))
            .collect();
        idle.sort_unstable_by_key(|(touched, _)| *touched);
        let excess = self.by_name.len() - self.limit * 3 / 4;
        let forgotten = idle
            .into_iter()
            .take(excess)
            .filter_map(|(_, revision)| self.by_name.remove(&revision))
            .collect();
        // If most are in use, the next look is worth it only after as many more came.
        self.trim_above = self.limit.max(self.by_name.len() + self.limit / 4);
        forgotten
    }
}

/// Segments of it that bytes were sent from since the catalog heard of it.
fn served_since_recorded(held: &Arc<HeldRevision>) -> Vec<(SegmentId, u64)> {
    let state = held.state.lock();
    let recorded = state
        .segments
        .iter()
        .filter(|(_, segment)| segment.recorded);
    recorded
        .map(|(key, segment)| (key, segment, segment.charge.served()))
        .filter(|(_, segment, served)| *served != segment.stored_served)
        .map(|(key, segment, served)| (held.segment_id(*key, segment), served))
        .collect()
}

/// Runs `work` off the runtime's workers, however long it takes: it reads whole files, and nobody's request waits for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(DiskError::Catalog("the runtime is shutting down".into())),
        },
    }
}

fn shard_path(dir: &Path, incarnation: u128) -> PathBuf {
    dir.join("segments")
        .join(format!("{:02x}", incarnation >> 120))
}

/// Where the segment file of this name is in the cache directory `dir`.
pub(super) fn segment_path(dir: &Path, incarnation: u128) -> PathBuf {
    shard_path(dir, incarnation).join(format!("{incarnation:032x}.seg"))
}

fn segment_size(capacity: u64, block_size: u64) -> u64 {
    let share = (capacity / MIN_SEGMENTS).max(1);
    let power = 1_u64 << share.ilog2();
    power.clamp(block_size, SEGMENT_SIZE.max(block_size))
}

/// Exclusive for as long as the file is open, whatever becomes of the process.
pub(super) fn lock(dir: &Path) -> Result<File, DiskError> {
    let path = dir.join("lock");
    let failed = |op| {
        let path = path.clone();
        move |error: io::Error| DiskError::Io {
            op,
            path,
            source: error,
        }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed("open"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).map_err(failed("read"))?;
            return Err(DiskError::Locked {
                dir: dir.to_owned(),
                pid: pid.trim().to_owned(),
            });
        }
        Err(error) => return Err(failed("lock")(error.into())),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(failed("write"))?;
    Ok(file)
}

/// Makes `segments/00` to `segments/ff`, so that a new file needs only its own directory synced.
pub(super) fn make_shards(dir: &Path, sync: &dyn Syncer) -> Result<(), DiskError> {
    let segments = dir.join("segments");
    let shards = (0..=u8::MAX).map(|shard| segments.join(format!("{shard:02x}")));
    for path in std::iter::once(segments.clone()).chain(shards) {
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(DiskError::io("make the directory", &path, error));
            }
            _ => {}
        }
    }
    // Always: the run that made them may have been killed before it got here. It costs nothing where nothing changed.
    for path in [&segments, dir] {
        sync.directory(path)
            .map_err(|error| DiskError::io("sync", path, error))?;
    }
    Ok(())
}

pub(super) fn random_u64(random: &mut impl Read) -> Result<u64, DiskError> {
    #[cfg(test)]
    if let Some(seeded) = chance::seeded::draw() {
        return Ok(seeded);
    }
    let mut bytes = [0; 8];
    random
        .read_exact(&mut bytes)
        .map_err(|error| DiskError::io("read", Path::new("/dev/urandom"), error))?;
    Ok(u64::from_le_bytes(bytes))
}
