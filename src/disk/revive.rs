//! A cache directory that goes away, and comes back.
//!
//! Somebody deletes it, its file system is unmounted, mounted over or found broken, or its catalog turns out to be
//! damaged: the tier is *out* then. It holds nothing and takes nothing, so every request goes past it, and one
//! thread, the keeper, tries to open the directory again until that works.
//! Nothing of that is a failure of a request (P10).
//!
//! ```text
//!             open ── works ───────────────────────────▶ in ◀───────────────┐
//!              │                                         │                  │
//!              ├── a mistake, or in use: no start        │ vanished,        │ opened:
//!              │                                         │ replaced,        │ lock, shards, catalog,
//!              └── trouble (full, read-only, EIO) ─┐     │ damaged          │ threads
//!                                                  ▼     ▼                  │
//!                                                   out: tried every second ┘
//! ```
//!
//! Whether the directory is still ours is told by its lock and its catalog: the names must lead to the very files that
//! are open here. Going out, revisions in memory are doomed as by a purge, so writers and readers let go
//! of them; what is being sent from open files is sent to its end. Coming back is an ordinary start over what is there,
//! perhaps nothing: another run, whose predecessor did not end orderly.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::fs::FlockOperation;

use super::DiskError;
use super::catalog::{Batch, Catalog, Commit, FILE, LONGEST_LOG};
use super::tier::{DiskTier, Shared, lock, make_shards, random_u64};
use crate::causes::one_line;

/// How often the keeper looks: three calls of `stat` while all is well.
const EVERY: Duration = Duration::from_secs(1);

/// Bytes that the catalog may need: its log, which a start begins anew.
const CATALOG_NEEDS: u64 = LONGEST_LOG;

/// Files that the catalog may need: itself, its log, the index over that, and a mark.
const CATALOG_FILES: u64 = 4;

/// What is written to see whether the disk takes writes.
const PROBE: &str = "probe";

/// Where the keeper sleeps, and what it knows.
#[derive(Default)]
pub(super) struct Keeper {
    state: Mutex<State>,
    wake: Condvar,
    /// Held while the directory is opened or closed.
    at_work: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Why the tier is out.
    out: Option<String>,
    look_now: bool,
    ended: bool,
}

impl Keeper {
    /// Why the tier is out, if it is.
    pub(super) fn out(&self) -> Option<String> {
        self.state.lock().out.clone()
    }

    pub(super) fn is_out(&self) -> bool {
        self.state.lock().out.is_some()
    }

    /// Something is wrong with the directory: not to wait for the next turn.
    fn look_now(&self) {
        self.state.lock().look_now = true;
        self.wake.notify_one();
    }

    /// The thread ends, sooner or later: the disk may hang. Nothing is opened from here on.
    pub(super) fn end(&self) {
        self.state.lock().ended = true;
        self.wake.notify_one();
    }

    /// Waits until the keeper is not at work, and keeps it so.
    pub(super) fn pause(&self) -> MutexGuard<'_, ()> {
        self.at_work.lock()
    }

    /// `false`: the end.
    fn sleep(&self) -> bool {
        let mut state = self.state.lock();
        if !state.look_now && !state.ended {
            self.wake.wait_for(&mut state, EVERY);
        }
        state.look_now = false;
        !state.ended
    }
}

/// The thread's work: no stronger tie to the tier than a look takes.
pub(super) fn run(keeper: &Keeper, tier: &Weak<DiskTier>) {
    while keeper.sleep() {
        let Some(tier) = tier.upgrade() else { return };
        tier.look_after();
    }
}

impl DiskTier {
    /// One look at the directory. Blocking.
    pub(super) fn look_after(&self) {
        let shared = &self.shared;
        let _at_work = shared.keeper.at_work.lock();
        // The tier was closed, or another process has the directory.
        let idle = shared.is_closed() || shared.keeper.state.lock().ended;
        if idle {
            return;
        }
        if !shared.keeper.is_out() {
            let Some(why) = shared.lost() else {
                shared.probe();
                return;
            };
            tracing::error!(
                directory = %shared.dir.display(), reason = why,
                "the cache directory cannot be used any more: going past it, and opening it anew"
            );
            self.go_out(why);
        }
        let come_in = self.come_in();
        if shared.keeper.state.lock().ended {
            // Closed meanwhile, and nothing was there to be closed.
            self.go_out("it was closed".to_owned());
            return;
        }
        match come_in {
            Ok(()) => tracing::info!(
                directory = %shared.dir.display(),
                bytes = shared.room.used(), "the cache directory is in use again"
            ),
            Err(error) => shared.stay_out(&error),
        }
    }

    /// Lets go of the directory: threads, catalog, memory, lock. Writers and readers hear of it as of a purge.
    fn go_out(&self, why: String) {
        let shared = &self.shared;
        shared.keeper.state.lock().out = Some(why);
        shared.queue.close();
        shared.scrubber.stop();
        for thread in [&self.worker, &self.sweeper, &self.scrub].map(|thread| thread.lock().take())
        {
            // A panic in there has been reported by its hook.
            let _ = thread.map(std::thread::JoinHandle::join);
        }
        // From here on nobody gets a revision into memory.
        shared.catalog.abandon();
        for held in shared.forget_all() {
            drop(held.doom());
        }
        *shared.lock.lock() = None;
    }

    /// Opens the directory: lock, shards, catalog (migrated, or set aside if it is damaged or newer), threads.
    /// If that fails on a full disk, some of what is held makes room for it.
    fn come_in(&self) -> Result<(), DiskError> {
        match self.open_directory() {
            Err(_) if self.shared.make_room_to_open() => self.open_directory(),
            opened => opened,
        }
    }

    fn open_directory(&self) -> Result<(), DiskError> {
        let shared = &self.shared;
        let dir = &shared.dir;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| DiskError::io("make the directory", dir, error))?;
        let lock = lock(dir)?;
        make_shards(dir, shared.sync.as_ref())?;
        let sync = shared.sync.as_ref();
        let (catalog, start) = match Catalog::open(dir, sync) {
            // The damage showed when the run was begun, and was marked: it is set aside this time.
            Err(_) if Catalog::is_marked(dir) => Catalog::open(dir, sync)?,
            opened => opened?,
        };
        let checkpointer = Catalog::checkpointer(dir)?;
        let run_mark = random_u64(&mut &shared.random)?;
        shared.run_mark.store(run_mark, Ordering::Release);
        shared.take_up(&start);
        shared.room.restock(start.bytes);
        *shared.free_space.lock() = None;
        *shared.lock.lock() = Some(lock);
        shared.catalog.replace(catalog);
        shared.queue.reopen();
        shared.scrubber.resume();
        // That of the catalog before; a run has been begun in this one.
        shared.unrecorded.over();
        // First, for the threads end where the tier is out.
        shared.keeper.state.lock().out = None;
        self.begin(&start, checkpointer)
    }
}

impl Shared {
    /// Unlinks segment files, whichever come first, until the catalog can be opened: on a disk that our own files
    /// fill nobody else would, and eviction needs the catalog. The rows that name them give their bytes back as
    /// after a crash. `false`: that is not what is wrong, or there is nothing to unlink.
    fn make_room_to_open(&self) -> bool {
        // Not while another process uses them.
        let lock = File::options().write(true).open(self.dir.join("lock"));
        let ours = lock.is_ok_and(|lock| {
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        if !ours || !self.is_full() {
            return false;
        }
        let Ok(shards) = fs::read_dir(self.dir.join("segments")) else {
            return false;
        };
        let files = shards
            .flatten()
            .filter_map(|shard| fs::read_dir(shard.path()).ok());
        let mut unlinked = 0_u64;
        for file in files.flatten().flatten() {
            if !self.is_full() {
                break;
            }
            unlinked += u64::from(fs::remove_file(file.path()).is_ok());
        }
        if unlinked > 0 {
            tracing::warn!(
                directory = %self.dir.display(), files = unlinked,
                "the disk is too full for the catalog: unlinked some of what the cache held"
            );
        }
        unlinked > 0
    }

    /// Whether the catalog may find no room for what it writes.
    pub(super) fn is_full(&self) -> bool {
        (self.file_system)(&self.dir)
            .is_ok_and(|space| space.available < CATALOG_NEEDS || space.files < CATALOG_FILES)
    }

    /// Why what is open here is not what the directory has; `None`: all is well, or nobody can tell.
    fn lost(&self) -> Option<String> {
        if Catalog::is_marked(&self.dir) {
            return Some("its catalog is damaged".to_owned());
        }
        let lock = self.lock.lock();
        let lock = lock.as_ref()?;
        let same = |name: &str, open: io::Result<Identity>| {
            let path = self.dir.join(name);
            match (identity(fs::metadata(&path)), open) {
                (Err(error), _) if is_gone(&error) => Some(format!("{} is gone", path.display())),
                (Ok(there), Ok(here)) if there != here => {
                    Some(format!("{} is another file", path.display()))
                }
                _ => None,
            }
        };
        same("lock", identity(lock.metadata()))
            .or_else(|| same(FILE, self.catalog.identity()))
            .or_else(|| {
                let segments = self.dir.join("segments");
                let gone = fs::metadata(&segments).is_err_and(|error| is_gone(&error));
                gone.then(|| {
                    let why = format!("{} is gone", segments.display());
                    // What the catalog says of files is not true of any. If that cannot be noted, each is found out.
                    let _ = Catalog::distrust(&self.dir, &why, self.sync.as_ref());
                    why
                })
            })
    }

    /// Tries again to remove what could not be removed. Each time: where writes fail because these files
    /// fill the disk, there is no quiet moment to wait for.
    fn clear_away(&self) {
        let mut left_over = std::mem::take(&mut *self.left_over.lock());
        while let Some(file) = left_over.pop() {
            if self.try_unlink(file).is_err() {
                left_over.push(file);
                break;
            }
        }
        self.left_over.lock().append(&mut left_over);
    }

    /// Finds out whether a disk that was in trouble works again, so that nobody has to ask for something first.
    fn probe(&self) {
        self.clear_away();
        if self.trouble.is_due() {
            let _busy = self.watch.begin("write", self.watch.limits.sync);
            // On a disk that our own files fill nobody else makes room, and reservations, which do, are refused. If there
            // is none to be made the write says so.
            let _ = self.make_room(self.block_size);
            let path = self.dir.join(PROBE);
            let written = File::create(&path)
                .and_then(|mut file| {
                    file.write_all(&[0; 4096])?;
                    file.sync_data()
                })
                .and_then(|()| fs::remove_file(&path));
            match written {
                Ok(()) => self.trouble.over(),
                Err(error) => self.trouble.note("write", &path, &self.not_made(error)),
            }
        }
        if self.crowded.is_due()
            && let Ok(look) = self.look_at_free_space()
            && look.spare > i128::from(self.block_size)
            && look.files > 0
        {
            self.crowded.over();
        }
        if self.unrecorded.is_due() {
            let _busy = self.watch.begin("commit", self.watch.limits.sync);
            // As above: the catalog may want room that only eviction makes, and reservations are refused.
            let _ = self.make_room(self.block_size);
            let empty = Batch::default();
            let committed = self
                .catalog
                .lock()
                .and_then(|mut db| db.commit(&empty, Commit::Durable));
            match committed {
                Ok(()) => self.unrecorded.over(),
                Err(error) => {
                    let error = io::Error::other(error.to_string());
                    self.unrecorded.note("record in", &self.dir, &error);
                }
            }
        }
    }

    /// The directory could not be opened. Said once for each reason.
    fn stay_out(&self, error: &DiskError) {
        let why = one_line(error);
        let mut state = self.keeper.state.lock();
        if state.out.as_ref() == Some(&why) {
            return;
        }
        tracing::error!(
            directory = %self.dir.display(), reason = why,
            "cannot open the cache directory: serving past it, and trying again every second; \
             check free space, free inodes, mounts and the kernel log"
        );
        state.out = Some(why);
    }

    /// Makes the directory of a segment file that could not be made for lack of it. `false`: it is not that, or more is
    /// missing than that; the keeper is told.
    pub(super) fn mend_shard(&self, segment: &Path, error: &io::Error) -> bool {
        if error.kind() != io::ErrorKind::NotFound {
            return false;
        }
        let made = segment.parent().map(fs::create_dir);
        match made {
            Some(Ok(())) => true,
            // By another writer, at the same time.
            Some(Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => true,
            _ => {
                self.keeper.look_now();
                false
            }
        }
    }
}

/// Whether a start should not go on with this: nobody has to wait for the disk to get well, but somebody has to correct
/// the configuration.
fn is_mistake(error: &DiskError) -> bool {
    match error {
        DiskError::Locked { .. } => true,
        DiskError::Io { source, .. } => matches!(
            source.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::AlreadyExists
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidFilename
        ),
        DiskError::NoRoom
        | DiskError::TwoLengths { .. }
        | DiskError::Purged
        | DiskError::Catalog(_)
        | DiskError::Hangs { .. } => false,
    }
}

/// Names a file as long as it is open somewhere.
pub(super) type Identity = (u64, u64);

pub(super) fn identity(metadata: io::Result<fs::Metadata>) -> io::Result<Identity> {
    metadata.map(|metadata| (metadata.dev(), metadata.ino()))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Why one of the catalog's files can never be used with this process's rights. Nothing else is looked at: a disk that
/// is full or read-only says so later, and is no reason to begin another catalog.
pub(super) fn useless<'a>(files: impl IntoIterator<Item = &'a Path>) -> Option<String> {
    files.into_iter().find_map(|path| {
        let error = File::options().read(true).write(true).open(path).err()?;
        let never = matches!(
            error.kind(),
            io::ErrorKind::IsADirectory | io::ErrorKind::PermissionDenied
        );
        never.then(|| format!("{}: {error}", path.display()))
    })
}

/// What [`DiskTier::open_with`] begins with.
pub(super) fn start(tier: &Arc<DiskTier>) -> Result<(), DiskError> {
    match tier.come_in() {
        Ok(()) => {}
        Err(error) if is_mistake(&error) => return Err(error),
        Err(error) => tier.shared.stay_out(&error),
    }
    #[cfg(test)]
    if super::inline::is_on() {
        return Ok(());
    }
    let (shared, tier) = (Arc::clone(&tier.shared), Arc::downgrade(tier));
    let dir = shared.dir.clone();
    std::thread::Builder::new()
        .name("disk-keeper".into())
        .spawn(move || run(&shared.keeper, &tier))
        .map(drop)
        .map_err(|error| DiskError::io("start a thread for", &dir, error))
}
