//! Keeps disk reads off the runtime's workers: what is not in the page cache is brought there
//! first.
//!
//! sendfile from a page that has to be read from the disk blocks its thread for as long as the disk
//! takes, and with it every connection of that worker. So [`SendfileIo`](super::io::SendfileIo)
//! asks before each call whether the bytes are there (`is_resident`, one system call of less than
//! a microsecond) and if not, lets `load` read them on threads of its own.
//!
//! Loading is advice that a stretch will be needed, and a byte here and there to wait for it. A kernel keeps longest what was
//! read more than once, so the sendfile that follows has to be the first that reads all of it: else one pass over a large file
//! drives out what others read all the time (ADR 25).
//!
//! The threads are [nicer](NICER) than the others of the process, and thus than the workers, from which they would take the core, where
//! they share one, as soon as the disk has answered: building the page cache costs more than sending from it.
//!
//! A disk that dies does not always fail its reads; it may leave them hanging for minutes. Nobody waits
//! for that longer than [`PATIENCE`]: the load [hangs](Hangs), and the response goes on past the
//! disk. The read itself cannot be called off. It keeps its place, so that a dead disk takes
//! [`CONCURRENT_LOADS`] threads at most; while all places are kept so, whoever waits
//! for one gives up as well.

use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::io::to_usize;
use crate::disk::{FileExtent, LEAST_STEP};

/// Loads at a time, and threads for them: enough to keep one SSD busy.
const CONCURRENT_LOADS: usize = 32;

/// How far beyond a load the kernel is told to read on: the disk reads it while the socket takes
/// what was loaded.
const READ_AHEAD: u64 = 2 << 20;

/// How much nicer (nice(2)) the threads are than the others: a tenth of their share of a core that is full, which is more than 200 MiB/s of
/// loads. So readers of what is not in the page cache are slower there, and do not starve.
const NICER: i32 = 10;

/// The longest piece of advice. The kernel cuts longer ones to the longest request of the device or its read-ahead, whichever
/// is more, and there are devices with 128 KiB for both.
const ADVICE: u64 = 128 << 10;

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
struct KernelPages;

/// Reads stretches of files into the page cache, on threads of its own. Cheap to clone; one per
/// process.
#[derive(Clone)]
pub struct PageIn(Arc<Shared>);

struct Shared {
    pages: Box<dyn Pages>,
    patience: Duration,
    permits: Arc<Semaphore>,
    threads: Threads,
    loads: AtomicU64,
    /// Reads that have ended.
    ended: AtomicU64,
    /// A load hung, and none has ended since.
    reported: AtomicBool,
}

/// Threads for loads, of which none runs anything else: who has become nicer needs a privilege to become as before.
struct Threads(Option<Runtime>);

impl Threads {
    /// They start when they are needed, and stay: a burst of loads is seldom the last. The first one starts here, and where no thread
    /// can be had it panics as the start of workers does; when there is one, loads wait for it.
    fn new() -> io::Result<Self> {
        let threads = Builder::new_current_thread()
            .thread_name("page-in")
            .max_blocking_threads(CONCURRENT_LOADS)
            .thread_keep_alive(Duration::MAX)
            .on_thread_start(|| {
                // Where it is forbidden, loads get in the way of workers as any thread does.
                let _ = rustix::process::nice(NICER);
            })
            .build()?;
        drop(threads.spawn_blocking(|| ()));
        Ok(Self(Some(threads)))
    }

    /// Runs `work` on one of them.
    fn run(&self, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let threads = self.0.as_ref().expect("taken by drop alone");
        threads.spawn_blocking(work)
    }
}

impl Drop for Threads {
    /// Without waiting for a read that hangs.
    fn drop(&mut self) {
        if let Some(threads) = self.0.take() {
            threads.shutdown_background();
        }
    }
}

impl PageIn {
    /// Over the kernel's pages.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    ///
    /// # Panics
    /// When it has no threads left.
    pub fn new() -> io::Result<Self> {
        Self::over(KernelPages, PATIENCE)
    }

    /// Over other pages than the kernel's, for the tests of the server.
    ///
    /// # Errors
    /// As [`PageIn::new`].
    ///
    /// # Panics
    /// As [`PageIn::new`].
    #[doc(hidden)]
    pub fn over(pages: impl Pages, patience: Duration) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            threads: Threads::new()?,
            pages: Box::new(pages),
            patience,
            permits: Arc::new(Semaphore::new(CONCURRENT_LOADS)),
            loads: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            reported: AtomicBool::new(false),
        })))
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
            let load = shared.threads.run(move || {
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
        let start = extent.offset();
        let ahead = start + extent.len().min(len + READ_AHEAD);
        // All of it before any is waited for: disks do many things at a time.
        for offset in (start..ahead).step_by(to_usize(ADVICE)) {
            let piece = NonZeroU64::new(ADVICE.min(ahead - offset));
            // Advice: where it fails, reads are merely later.
            let _ = rustix::fs::fadvise(file, offset, piece, Advice::WillNeed);
        }
        let end = start + len;
        let mut offset = start;
        while offset < end {
            // Written at once, and so mostly in one place of the disk, seldom in two: its first and its last byte tell.
            let next = end.min((offset / LEAST_STEP + 1) * LEAST_STEP);
            let wait_for = |at| retry_on_intr(|| rustix::io::pread(file, &mut [0_u8; 1][..], at));
            if wait_for(offset) != Ok(1) || wait_for(next - 1) != Ok(1) {
                break;
            }
            offset = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Says how nice the thread is that reads.
    struct Asked(Sender<i32>);

    fn niceness() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    impl Pages for Asked {
        fn is_resident(&self, _: &FileExtent, _: u64) -> bool {
            false
        }

        fn copy_resident(&self, _: &FileExtent, _: &mut [u8]) -> bool {
            false
        }

        fn read(&self, _: &FileExtent, _: u64) {
            self.0.send(niceness()).unwrap();
        }
    }

    #[tokio::test]
    async fn loads_give_way_and_nobody_else_does() {
        let (asked, answer) = channel();
        let page_in = PageIn::over(Asked(asked), PATIENCE).unwrap();
        let extent = FileExtent::from_file(tempfile::tempfile().unwrap(), 0, 1);
        page_in.load(extent, 1).await.unwrap();
        let own = niceness();
        assert_eq!(answer.recv().unwrap(), (own + NICER).min(19));
        let other = tokio::task::spawn_blocking(niceness).await.unwrap();
        assert_eq!(other, own);
    }

    fn is_there(file: &File, offset: u64) -> Result<usize, Errno> {
        let mut byte = [0_u8; 1];
        let slices = &mut [IoSliceMut::new(&mut byte)];
        rustix::io::preadv2(file, slices, offset, ReadWriteFlags::NOWAIT)
    }

    #[tokio::test]
    async fn what_was_loaded_is_there() {
        const SIZE: u64 = 12 << 20;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; to_usize(SIZE)], 0).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if is_there(&file, 0) != Err(Errno::AGAIN) {
            // tmpfs, or a file system that cannot tell.
            eprintln!("not tested: the page cache could not be emptied");
            return;
        }
        let page_in = PageIn::new().unwrap();
        let (start, len) = (LEAST_STEP + 5_000, (8 << 20) + 3);
        let extent = FileExtent::from_file(file.try_clone().unwrap(), start, len);
        page_in.load(extent, len).await.unwrap();
        // What came last first. A piece in three places of the disk may come in any order.
        let pages = (start..start + len).rev().step_by(4096);
        let missing = pages.filter(|&offset| is_there(&file, offset) != Ok(1));
        let missing = missing.count();
        assert!(missing < 20, "{missing} of 2049 pages are missing");
        // A file that is shorter than its extent: whoever sends it finds out.
        let extent = FileExtent::from_file(file, SIZE - 100, 5_000_000);
        page_in.load(extent, 5_000_000).await.unwrap();
    }
}
