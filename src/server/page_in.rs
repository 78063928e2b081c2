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

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::Semaphore;

use super::io::to_usize;
use crate::disk::FileExtent;

/// Loads at a time: enough to keep one SSD busy, few enough to leave the blocking pool to the disk
/// tier's writes.
const CONCURRENT_LOADS: usize = 32;

/// How far beyond a load the kernel is told to read on: the disk reads it while the socket takes
/// what was loaded.
const READ_AHEAD: u64 = 2 << 20;

/// Reads stretches of files into the page cache, on the blocking pool. Cheap to clone; one per
/// process.
#[derive(Clone, Debug)]
pub struct PageIn(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    null: File,
    permits: Arc<Semaphore>,
    loads: AtomicU64,
}

impl PageIn {
    /// Opens `/dev/null`.
    ///
    /// # Errors
    /// When there is none.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            null: File::options().write(true).open("/dev/null")?,
            permits: Arc::new(Semaphore::new(CONCURRENT_LOADS)),
            loads: AtomicU64::new(0),
        })))
    }

    /// How many stretches were found missing from the page cache and loaded.
    pub fn loads(&self) -> u64 {
        self.0.loads.load(Ordering::Relaxed)
    }

    /// Whether the first `len` bytes of `extent` can probably be sent without reading the disk.
    ///
    /// Looks at the last byte only. A stretch that was read in part lacks its end; one of which the
    /// front alone was reclaimed passes, once per file and pass of the reclaimer, and costs one
    /// blocking read. Says yes where the file system cannot tell, and where there is nothing to
    /// read, which sendfile will find out.
    pub(super) fn is_resident(extent: &FileExtent, len: u64) -> bool {
        let mut byte = [0_u8; 1];
        let probe = rustix::io::preadv2(
            extent.file().file(),
            &mut [IoSliceMut::new(&mut byte)],
            extent.offset() + len - 1,
            ReadWriteFlags::NOWAIT,
        );
        probe != Err(Errno::AGAIN)
    }

    /// Reads the first `len` bytes of `extent` into the page cache. Errors are left for the
    /// sendfile that follows, which meets them too. Dropping the future gives up the place in the
    /// queue; a read that has begun ends by itself.
    pub(super) fn load(&self, extent: FileExtent, len: u64) -> BoxFuture<'static, ()> {
        let shared = Arc::clone(&self.0);
        async move {
            let Ok(permit) = Arc::clone(&shared.permits).acquire_owned().await else {
                return;
            };
            shared.loads.fetch_add(1, Ordering::Relaxed);
            let load = tokio::task::spawn_blocking(move || {
                let file = extent.file().file();
                let ahead = NonZeroU64::new(extent.len().min(len + READ_AHEAD));
                // Advice: where it fails, reads are merely later.
                let _ = rustix::fs::fadvise(file, extent.offset(), ahead, Advice::WillNeed);
                let mut offset = extent.offset();
                let end = offset + len;
                while offset < end {
                    let left = to_usize(end - offset);
                    match rustix::fs::sendfile(&shared.null, file, Some(&mut offset), left) {
                        Ok(1..) | Err(Errno::INTR) => {}
                        Ok(0) | Err(_) => break,
                    }
                }
                // Held to the end of the read, also when nobody waits for it any more.
                drop(permit);
            });
            // Fails only when the runtime shuts down or the closure panics; the sendfile that
            // follows blocks then, and is right all the same.
            let _ = load.await;
        }
        .boxed()
    }
}
