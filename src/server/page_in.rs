//! Keeps disk reads off the runtime's workers: what is not in the page cache is brought there
//! first.
//!
//! sendfile from a page that has to be read from the disk blocks its thread for as long as the disk
//! takes, and with it every connection of that worker. So [`SendfileIo`](super::io::SendfileIo)
//! asks before each call whether the bytes are there (`is_resident`, one system call of less than
//! a microsecond) and if not, lets `load` read them on the blocking pool.
//!
//! Loading is itself a sendfile, into `/dev/null`: it takes the same path through the page cache as
//! the real one, waits until the pages are there, and copies nothing.
//!
//! A disk that dies does not always fail its reads; it may leave them hanging for minutes. Nobody waits
//! for that longer than [`PATIENCE`]: the load [hangs](Hangs), and the response goes on past the
//! disk. The read itself cannot be called off. It keeps its place, so that a dead disk takes
//! [`CONCURRENT_LOADS`] threads of the blocking pool at most; while all places are kept so, whoever waits
//! for one gives up as well.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::io::to_usize;
use crate::disk::FileExtent;

/// Loads at a time: enough to keep one SSD busy, few enough to leave the blocking pool to the disk
/// tier's writes.
const CONCURRENT_LOADS: usize = 32;

/// How far beyond a load the kernel is told to read on: the disk reads it while the socket takes
/// what was loaded.
const READ_AHEAD: u64 = 2 << 20;

/// How long a read of a MiB may take. A disk with a queue of all [`CONCURRENT_LOADS`] and 20 MB/s needs
/// two seconds; a drive that tries to mend a sector, ten and more.
const PATIENCE: Duration = Duration::from_secs(5);

/// A stretch does not come off the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hangs;

/// What is asked of the kernel; tests put a disk that hangs in its place.
#[doc(hidden)]
pub trait Pages: Send + Sync + 'static {
    /// Whether the first `len` bytes of `extent` can probably be sent without reading the disk.
    fn is_resident(&self, extent: &FileExtent, len: u64) -> bool;
    /// Fills `buffer` with the first bytes of `extent` if that needs no reading of the disk. `false`: it
    /// would, or fails.
    fn copy_resident(&self, extent: &FileExtent, buffer: &mut [u8]) -> bool;
    /// Reads the first `len` bytes of `extent` into the page cache. Blocking.
    fn read(&self, extent: &FileExtent, len: u64);
}

/// The kernel's page cache.
struct KernelPages {
    null: File,
}

/// Reads stretches of files into the page cache, on the blocking pool. Cheap to clone; one per
/// process.
#[derive(Clone)]
pub struct PageIn(Arc<Shared>);

struct Shared {
    pages: Box<dyn Pages>,
    patience: Duration,
    permits: Arc<Semaphore>,
    loads: AtomicU64,
    /// Reads that have ended.
    ended: AtomicU64,
    /// A load hung, and none has ended since.
    reported: AtomicBool,
}

impl PageIn {
    /// Opens `/dev/null`.
    ///
    /// # Errors
    /// When there is none.
    pub fn new() -> io::Result<Self> {
        let null = File::options().write(true).open("/dev/null")?;
        Ok(Self::over(KernelPages { null }, PATIENCE))
    }

    /// Over other pages than the kernel's, for the tests of the server.
    #[doc(hidden)]
    pub fn over(pages: impl Pages, patience: Duration) -> Self {
        Self(Arc::new(Shared {
            pages: Box::new(pages),
            patience,
            permits: Arc::new(Semaphore::new(CONCURRENT_LOADS)),
            loads: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            reported: AtomicBool::new(false),
        }))
    }

    /// How many stretches were found missing from the page cache and loaded.
    pub fn loads(&self) -> u64 {
        self.0.loads.load(Ordering::Relaxed)
    }

    /// Whether the first `len` bytes of `extent` can probably be sent without reading the disk.
    pub(super) fn is_resident(&self, extent: &FileExtent, len: u64) -> bool {
        self.0.pages.is_resident(extent, len)
    }

    /// Fills `buffer` with the first bytes of `extent` if that needs no reading of the disk. `false`: it
    /// would, or fails; a sendfile finds out which.
    pub(super) fn copy_resident(&self, extent: &FileExtent, buffer: &mut [u8]) -> bool {
        self.0.pages.copy_resident(extent, buffer)
    }

    /// Reads the first `len` bytes of `extent` into the page cache. Errors are left for the
    /// sendfile that follows, which meets them too. Dropping the future gives up the place in the
    /// queue; a read that has begun ends by itself.
    pub(super) fn load(
        &self,
        extent: FileExtent,
        len: u64,
    ) -> BoxFuture<'static, Result<(), Hangs>> {
        let shared = Arc::clone(&self.0);
        async move {
            let permit = shared.turn().await?;
            shared.loads.fetch_add(1, Ordering::Relaxed);
            let reading = Arc::clone(&shared);
            let load = tokio::task::spawn_blocking(move || {
                reading.pages.read(&extent, len);
                reading.ended.fetch_add(1, Ordering::Relaxed);
                reading.recovered();
                // Held to the end of the read, also when nobody waits for it any more.
                drop(permit);
            });
            match timeout(shared.patience, load).await {
                // An error only when the runtime shuts down or the closure panics; the sendfile that
                // follows blocks then, and is right all the same.
                Ok(_) => Ok(()),
                Err(_elapsed) => Err(shared.hangs()),
            }
        }
        .boxed()
    }
}

impl Shared {
    /// A place among the loads. Waiting for it is no hang as long as others end.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, Hangs> {
        loop {
            let ended = self.ended.load(Ordering::Relaxed);
            let turn = timeout(self.patience, Arc::clone(&self.permits).acquire_owned()).await;
            match turn {
                Ok(permit) => return Ok(permit.expect("the semaphore is never closed")),
                Err(_elapsed) if self.ended.load(Ordering::Relaxed) > ended => {}
                Err(_elapsed) => return Err(self.hangs()),
            }
        }
    }

    fn hangs(&self) -> Hangs {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::error!(
                after = ?self.patience,
                "the cache disk does not deliver what is read from it: responses go on past it; \
                 check the kernel log and the drive"
            );
        }
        Hangs
    }

    fn recovered(&self) {
        if self.reported.load(Ordering::Relaxed) && self.reported.swap(false, Ordering::Relaxed) {
            tracing::info!("the cache disk delivers again");
        }
    }
}

impl Pages for KernelPages {
    /// Looks at the last byte only. A stretch that was read in part lacks its end; one of which the
    /// front alone was reclaimed passes, once per file and pass of the reclaimer, and costs one
    /// blocking read. Says yes where the file system cannot tell, and where there is nothing to
    /// read, which sendfile will find out.
    fn is_resident(&self, extent: &FileExtent, len: u64) -> bool {
        let mut byte = [0_u8; 1];
        let probe = rustix::io::preadv2(
            extent.file().file(),
            &mut [IoSliceMut::new(&mut byte)],
            extent.offset() + len - 1,
            ReadWriteFlags::NOWAIT,
        );
        probe != Err(Errno::AGAIN)
    }

    /// One system call that asks and reads.
    fn copy_resident(&self, extent: &FileExtent, buffer: &mut [u8]) -> bool {
        let wanted = buffer.len();
        let read = rustix::io::preadv2(
            extent.file().file(),
            &mut [IoSliceMut::new(buffer)],
            extent.offset(),
            ReadWriteFlags::NOWAIT,
        );
        read == Ok(wanted)
    }

    fn read(&self, extent: &FileExtent, len: u64) {
        let file = extent.file().file();
        let ahead = NonZeroU64::new(extent.len().min(len + READ_AHEAD));
        // Advice: where it fails, reads are merely later.
        let _ = rustix::fs::fadvise(file, extent.offset(), ahead, Advice::WillNeed);
        let mut offset = extent.offset();
        let end = offset + len;
        while offset < end {
            let left = to_usize(end - offset);
            match rustix::fs::sendfile(&self.null, file, Some(&mut offset), left) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
    }
}
