//! How long the disk is waited for, and what happens when that was too long.
//!
//! A disk that dies does not always say so: a `pwrite`, an `fdatasync` or a commit may hang for minutes, and what
//! hangs cannot be called off. So everything that may block and that a request waits for
//! runs on the blocking pool through [`Watch::run`], which gives up on it after a [limit](Limits) and lets the caller go
//! past the disk ([`DiskError::Hangs`]). The operation goes on, and as long as one is *overdue*:
//!
//! * no new one is begun: callers hear [`DiskError::Hangs`] at once. So a dead disk takes no more threads than were
//!   busy when it died, never more than [`AT_ONCE`], and of each request only the first few wait in vain;
//! * the tier counts as degraded.
//!
//! When the last overdue operation ends, whatever its result, the episode is over. Nothing has to be reset.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::DiskError;
#[cfg(test)]
use super::inline;

/// Operations on the blocking pool at a time. The pool has 512 threads, which look-ups of names need too.
const AT_ONCE: usize = 128;

/// How long each kind of operation may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A query or a small commit of the catalog. It takes less than a millisecond, or tens of them beside a busy
    /// disk; a client is waiting for its first byte.
    pub(super) catalog: Duration,
    /// Making a file, writing a few hundred KiB into the page cache, making room. The kernel makes writers
    /// wait for a slow disk, but never for 200 ms at a time; followers of the fill are waiting.
    pub(super) write: Duration,
    /// Opening a segment: after an unclean stop all of it is read, 64 MiB at most.
    pub(super) open: Duration,
    /// `fdatasync` of up to a batch, a checkpoint, a purge: nobody's bytes wait for them.
    pub(super) sync: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            catalog: Duration::from_secs(5),
            write: Duration::from_secs(5),
            open: Duration::from_secs(10),
            sync: Duration::from_secs(30),
        }
    }
}

/// Knows what the disk is busy with.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) limits: Limits,
    permits: Arc<Semaphore>,
    under_way: Mutex<UnderWay>,
}

#[derive(Debug, Default)]
struct UnderWay {
    begun: u64,
    operations: BTreeMap<u64, Operation>,
    reported: bool,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    what: &'static str,
    due: Instant,
}

/// An operation under way; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    watch: Arc<Watch>,
    number: u64,
}

impl Watch {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            under_way: Mutex::default(),
        })
    }

    /// Tells of an operation that runs on a thread of its own.
    pub(super) fn begin(self: &Arc<Self>, what: &'static str, limit: Duration) -> Ticket {
        let mut under_way = self.under_way.lock();
        under_way.begun += 1;
        let number = under_way.begun;
        let due = Instant::now() + limit;
        under_way.operations.insert(number, Operation { what, due });
        Ticket {
            watch: Arc::clone(self),
            number,
        }
    }

    /// How many operations are under way.
    #[cfg(test)]
    pub(super) fn busy(&self) -> usize {
        self.under_way.lock().operations.len()
    }

    /// What is taking longer than it may. Says so in the log, once an episode.
    pub(super) fn overdue(&self) -> Option<&'static str> {
        let now = Instant::now();
        let mut under_way = self.under_way.lock();
        let late = under_way.operations.values().find(|one| one.due <= now)?;
        let what = late.what;
        if !std::mem::replace(&mut under_way.reported, true) {
            tracing::error!(
                operation = what,
                "the cache disk hangs: going past it until it answers; check the kernel log and the drive"
            );
        }
        Some(what)
    }

    /// Runs `work` off the runtime's workers, for at most `limit` as far as the caller is concerned.
    ///
    /// Cancelling does not stop work that has begun.
    ///
    /// # Errors
    /// [`DiskError::Hangs`], or the work's own.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        limit: Duration,
        work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        #[cfg(test)]
        if inline::is_on() {
            // Others have their turn before and after, as they would have.
            tokio::task::yield_now().await;
            let done = work();
            tokio::task::yield_now().await;
            return done;
        }
        if self.overdue().is_some() {
            return Err(DiskError::Hangs { what });
        }
        let in_turn = async {
            let permit = Arc::clone(&self.permits).acquire_owned().await;
            let ticket = self.begin(what, limit);
            let task = tokio::task::spawn_blocking(move || {
                let result = work();
                drop((ticket, permit));
                result
            });
            match task.await {
                Ok(result) => result,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => Err(DiskError::Catalog("the runtime is shutting down".into())),
                },
            }
        };
        if let Some(result) = within(limit, in_turn).await {
            return result;
        }
        // For the log.
        let _ = self.overdue();
        Err(DiskError::Hangs { what })
    }
}

/// What `future` yields, unless that takes longer than `limit`.
pub(super) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    #[cfg(test)]
    if inline::is_on() {
        return Some(future.await);
    }
    tokio::time::timeout(limit, future).await.ok()
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut under_way = self.watch.under_way.lock();
        under_way.operations.remove(&self.number);
        if under_way.reported && under_way.operations.values().all(|one| one.due > now) {
            under_way.reported = false;
            tracing::info!("the cache disk answers again");
        }
    }
}
