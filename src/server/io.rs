//! The data listener's sockets: how file extents get through hyper to sendfile(2).
//!
//! hyper has no sendfile, but with vectored writes it never looks at a body's bytes. It keeps each
//! body chunk in a queue, asks it for slices, hands these to the connection's IO and tells the
//! chunk how many bytes went out. So a file chunk contributes one slice that stands for its extent:
//! a *marker*, recognised by address and never written, and offers the extent itself to the
//! connection's [`SendQueue`]. [`SendfileIo`] writes the memory in front of the first marker; once
//! a marker is in front it sends the offered extent instead, and reports the bytes sent as written.
//! ADR 2 has the measurements.
//!
//! What this leans on, and what breaks without it (`tests/sendfile.rs` guards it):
//!
//! - hyper queues chunks untouched, and asks for slices right before each write. Hence
//!   `writev(true)`, never `pipeline_flush`, and the pinned minor version of hyper. Where hyper
//!   flattens instead, it calls `Buf::chunk`, which panics for a file chunk: a dead connection, not
//!   a wrong body.
//! - A body is never longer than its `Content-Length`, since hyper would cut the marker rather than
//!   the extent. [`ResponseBody`](super::body::ResponseBody) sees to that.
//! - `TCP_NODELAY` is on and no write says `MSG_MORE`: a head that is written at once and a
//!   sendfile after it cost less than half of one corked segment.
//!
//! Time is limited here too, because only here it shows who is being waited for. The timers are
//! started by the first wait, so a request that never waits never touches one:
//!
//! ```text
//!             wait for a byte                      bytes, head not complete
//!   (start) ─► Idle: idle_timeout ── first byte ──► Head: header_timeout
//!                 ▲                                        │ head complete: hyper stops reading
//!                 └── any byte of a response goes out ─────┘ and waits for the handler
//!
//!   a write waits for the client: progress_timeout, anew after every byte it takes
//! ```
//!
//! A file that ends early, cannot be read or hangs does not end the response either: see
//! [`rescue`](super::rescue).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::rt::ReadBufCursor;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::body::{BodyObserver, Delivery};
use super::page_in::{Hangs, PageIn};
use super::rescue::Rescue;
use crate::disk::FileExtent;
use crate::payload::{Payload, Way};
use crate::semantics::ByteRange;

/// Most bytes that one sendfile call is asked for: some 0.2 ms of a worker thread.
const SLICE: u64 = 1 << 20;

/// Most bytes that are sent before other tasks get their turn, however fast the client takes them.
/// Tokio's own budget counts calls, and 128 slices would be thirty times as much.
const BURST: u64 = 4 << 20;

/// Stands in hyper's slice list where a file extent belongs. Not a `const` and not empty: its
/// address is its meaning.
static MARKER: [u8; 1] = [0];

fn is_marker(slice: &IoSlice<'_>) -> bool {
    std::ptr::eq(slice.as_ptr(), MARKER.as_ptr())
}

/// How long a connection may be waited for.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From a request's first byte to the end of its head.
    pub header: Duration,
    /// From accept, or the end of a response, to the first byte of a request.
    pub idle: Duration,
    /// While we have bytes to send and the client's window takes none.
    pub progress: Duration,
}

/// Why a connection was cut by us, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: a metric label")]
pub enum Cut {
    /// The client took no byte for the progress timeout.
    Stalled,
    /// A file ended before its extent did, and there was nothing to turn to.
    FileShort,
    /// Reading a file failed or hung, and there was nothing to turn to.
    FileError,
    /// The drain timeout passed.
    Drained,
}

impl Cut {
    /// A word for metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stalled => "client_stalled",
            Self::FileShort => "file_short",
            Self::FileError => "file_error",
            Self::Drained => "drained",
        }
    }
}

/// What a connection's response bodies and its IO share. Cheap to clone.
///
/// The queue is one place long, because only the extent that hyper will write next matters: slices
/// are asked for anew before each write, in order, and the first file chunk of such a pass takes
/// the place.
#[derive(Clone, Debug, Default)]
pub struct SendQueue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    next: Mutex<Option<Offered>>,
    cut: OnceLock<Cut>,
    by_sendfile: AtomicU64,
    by_write: AtomicU64,
}

/// A file chunk's extent, and what the chunk has for the case that the file fails.
#[derive(Debug)]
struct Offered {
    extent: FileExtent,
    /// Where in the revision the extent begins.
    start: u64,
    /// Weak, for the delivery holds the queue that holds this. The chunk keeps it alive.
    delivery: Weak<Delivery<dyn BodyObserver>>,
}

impl Offered {
    /// `None`: the body has nothing to turn to.
    fn rescue(&self, way: Way) -> Option<Rescue> {
        let rest = ByteRange::from_bounds(self.start, self.start + self.extent.len())?;
        Rescue::begin(self.delivery.upgrade()?, rest, way)
    }
}

/// Why a stretch of a file did not go out.
enum Failed {
    /// The socket failed, or the client did.
    Socket(io::Error),
    /// The file ends before its extent does.
    Short,
    /// The file cannot be read.
    Unreadable(io::Error),
    /// The file does not come off the disk.
    Hangs,
}

impl Failed {
    fn way(&self) -> Option<Way> {
        match self {
            Self::Socket(_) => None,
            Self::Short | Self::Unreadable(_) => Some(Way::Again),
            Self::Hangs => Some(Way::PastDisk),
        }
    }

    /// What ends the connection, and why as far as it is the file's doing.
    fn into_error(self) -> (io::Error, Option<Cut>) {
        match self {
            Self::Socket(error) => (error, None),
            Self::Short => (
                io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "a segment file is shorter than what is recorded of it",
                ),
                Some(Cut::FileShort),
            ),
            Self::Unreadable(error) => (error, Some(Cut::FileError)),
            Self::Hangs => (
                timed_out("a segment file does not come off the disk"),
                Some(Cut::FileError),
            ),
        }
    }
}

impl SendQueue {
    /// Announces a file chunk's extent, the bytes of the revision from `start` on; returns the slice
    /// that must stand for it in the vectored write.
    pub(super) fn offer(
        &self,
        extent: &FileExtent,
        start: u64,
        delivery: &Arc<Delivery<dyn BodyObserver>>,
    ) -> IoSlice<'static> {
        self.0.next.lock().get_or_insert_with(|| Offered {
            extent: extent.clone(),
            start,
            delivery: Arc::downgrade(delivery),
        });
        IoSlice::new(&MARKER)
    }

    fn take(&self) -> Option<Offered> {
        self.0.next.lock().take()
    }

    /// Says why the connection is about to be cut. The first reason stands.
    pub(super) fn set_cut(&self, cut: Cut) {
        // A second reason is a consequence of the first.
        let _ = self.0.cut.set(cut);
    }

    /// Why the connection was cut by us, if it was.
    pub fn cut(&self) -> Option<Cut> {
        self.0.cut.get().copied()
    }

    /// Bytes that left this connection through sendfile: payload only.
    pub fn sent_by_sendfile(&self) -> u64 {
        self.0.by_sendfile.load(Ordering::Relaxed)
    }

    /// Bytes that left this connection through write: response heads, and payload from memory.
    pub fn sent_by_write(&self) -> u64 {
        self.0.by_write.load(Ordering::Relaxed)
    }
}

/// A limit on waiting that costs nothing until there is something to wait for.
#[derive(Debug, Default)]
struct Patience {
    sleep: Option<Pin<Box<Sleep>>>,
    running: bool,
}

impl Patience {
    /// `Ready` when `limit` has passed since the first call after [`Patience::stop`].
    fn poll_exhausted(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        if !self.running {
            self.running = true;
            let deadline = Instant::now() + limit;
            match &mut self.sleep {
                Some(sleep) => sleep.as_mut().reset(deadline),
                None => self.sleep = Some(Box::pin(tokio::time::sleep_until(deadline))),
            }
        }
        self.sleep
            .as_mut()
            .map_or(Poll::Pending, |sleep| sleep.as_mut().poll(cx))
    }

    /// What was waited for happened. The timer is left in the wheel: at worst it wakes the task
    /// once for nothing.
    fn stop(&mut self) {
        self.running = false;
    }
}

/// What the next byte from the client will belong to, as far as timeouts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expecting {
    Request,
    RestOfHead,
}

/// A data connection as hyper sees it. See the [module](self) for how it works.
pub struct SendfileIo {
    tcp: TcpStream,
    queue: SendQueue,
    page_in: PageIn,
    /// A stretch at the front of the queue that is being read into the page cache.
    loading: Option<BoxFuture<'static, Result<(), Hangs>>>,
    /// What is sent in the place of the extent at the front of the queue, since its file failed.
    rescue: Option<Box<Rescue>>,
    timeouts: Timeouts,
    expecting: Expecting,
    read_wait: Patience,
    write_wait: Patience,
    /// Bytes sent since the last wait or yield.
    burst: u64,
}

impl SendfileIo {
    /// Wraps an accepted socket; `TCP_NODELAY` is the caller's business. Bodies sent through it
    /// must be built with the same `queue`.
    pub fn new(tcp: TcpStream, queue: SendQueue, page_in: PageIn, timeouts: Timeouts) -> Self {
        Self {
            tcp,
            queue,
            page_in,
            loading: None,
            rescue: None,
            timeouts,
            expecting: Expecting::Request,
            read_wait: Patience::default(),
            write_wait: Patience::default(),
            burst: 0,
        }
    }

    /// Bytes went out: the client is alive, and if it was sending a head, that was complete.
    fn wrote(&mut self, sent: usize) {
        self.burst += sent as u64;
        self.write_wait.stop();
        self.read_wait.stop();
        self.expecting = Expecting::Request;
    }

    /// The socket takes nothing. `Ready` with the error that ends the connection once it has taken
    /// nothing for too long.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.burst = 0;
        ready!(self.write_wait.poll_exhausted(cx, self.timeouts.progress));
        self.queue.set_cut(Cut::Stalled);
        Poll::Ready(timed_out("the client takes no bytes"))
    }

    fn poll_write_memory(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Poll::Ready(result) = Pin::new(&mut self.tcp).poll_write_vectored(cx, slices) else {
            return self.poll_stalled(cx).map(Err);
        };
        let sent = result?;
        self.queue
            .0
            .by_write
            .fetch_add(sent as u64, Ordering::Relaxed);
        self.wrote(sent);
        Poll::Ready(Ok(sent))
    }

    /// Sends from the extent, or what has to stand in for it.
    fn poll_send_offered(
        &mut self,
        cx: &mut Context<'_>,
        offered: &Offered,
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.rescue.is_some() {
                return self.poll_send_rescue(cx, offered.start);
            }
            let failed = match ready!(self.poll_send_file(cx, &offered.extent)) {
                Ok(sent) => return Poll::Ready(Ok(sent)),
                Err(failed) => failed,
            };
            match failed.way().and_then(|way| offered.rescue(way)) {
                Some(rescue) => self.rescue = Some(Box::new(rescue)),
                None => return Poll::Ready(Err(self.give_up(failed))),
            }
        }
    }

    /// One payload of the rescue, reported as if it were the extent's bytes from `start` on.
    fn poll_send_rescue(&mut self, cx: &mut Context<'_>, start: u64) -> Poll<io::Result<usize>> {
        loop {
            let rescue = self.rescue.as_mut().expect("looked for by the caller");
            debug_assert_eq!(rescue.at(), start, "another extent is in front");
            let sent = match ready!(rescue.poll_payload(cx))? {
                Payload::Memory(bytes) => {
                    Ok(ready!(self.poll_write_memory(cx, &[IoSlice::new(&bytes)]))?)
                }
                Payload::File(extent) => ready!(self.poll_send_file(cx, &extent)),
            };
            let rescue = self.rescue.as_mut().expect("nobody took it");
            match sent {
                Ok(sent) => {
                    if !rescue.sent(sent as u64) {
                        self.rescue = None;
                    }
                    return Poll::Ready(Ok(sent));
                }
                Err(failed) => {
                    if failed.way().is_none() || !rescue.go_past_the_disk() {
                        return Poll::Ready(Err(self.give_up(failed)));
                    }
                }
            }
        }
    }

    fn give_up(&self, failed: Failed) -> io::Error {
        let (error, cut) = failed.into_error();
        if let Some(cut) = cut {
            self.queue.set_cut(cut);
        }
        error
    }

    fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        extent: &FileExtent,
    ) -> Poll<Result<usize, Failed>> {
        let len = extent.len().min(SLICE);
        loop {
            if self.burst >= BURST {
                self.burst = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // Loading first: while it runs it is the disk that is waited for, not the client.
            let loaded = match &mut self.loading {
                Some(loading) => {
                    let loaded = ready!(loading.poll_unpin(cx));
                    self.loading = None;
                    if let Err(Hangs) = loaded {
                        return Poll::Ready(Err(Failed::Hangs));
                    }
                    true
                }
                None => false,
            };
            let Poll::Ready(writable) = self.tcp.poll_write_ready(cx) else {
                return self
                    .poll_stalled(cx)
                    .map(|error| Err(Failed::Socket(error)));
            };
            writable.map_err(Failed::Socket)?;
            // What was just loaded is not asked about again, so that a page cache under pressure
            // cannot keep us here.
            if !loaded && !self.page_in.is_resident(extent, len) {
                self.write_wait.stop();
                self.loading = Some(self.page_in.load(extent.clone(), len));
                continue;
            }
            let result = self.tcp.try_io(Interest::WRITABLE, || {
                let mut offset = extent.offset();
                let file = extent.file().file();
                rustix::fs::sendfile(&self.tcp, file, Some(&mut offset), to_usize(len))
                    .map_err(io::Error::from)
            });
            match result {
                Ok(0) => {
                    extent.file().report_unreadable();
                    return Poll::Ready(Err(Failed::Short));
                }
                Ok(sent) => {
                    self.queue
                        .0
                        .by_sendfile
                        .fetch_add(sent as u64, Ordering::Relaxed);
                    self.wrote(sent);
                    return Poll::Ready(Ok(sent));
                }
                // `try_io` has cleared the readiness, so the next round waits.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_peer_error(&error) => {
                    return Poll::Ready(Err(Failed::Socket(error)));
                }
                Err(error) => {
                    extent.file().report_unreadable();
                    return Poll::Ready(Err(Failed::Unreadable(error)));
                }
            }
        }
    }
}

impl hyper::rt::Read for SendfileIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Requests are small: copying one from the stack is cheaper than zeroing hyper's buffer for
        // it.
        let mut stack = [MaybeUninit::<u8>::uninit(); 8192];
        let room = stack.len().min(buf.remaining());
        let mut read = ReadBuf::uninit(&mut stack[..room]);
        if let Poll::Ready(result) = Pin::new(&mut this.tcp).poll_read(cx, &mut read) {
            result?;
            if this.expecting == Expecting::Request && !read.filled().is_empty() {
                this.expecting = Expecting::RestOfHead;
                this.read_wait.stop();
            }
            buf.put_slice(read.filled());
            return Poll::Ready(Ok(()));
        }
        let (limit, what) = match this.expecting {
            Expecting::Request => (this.timeouts.idle, "no request came"),
            Expecting::RestOfHead => (this.timeouts.header, "the request's head did not end"),
        };
        this.read_wait
            .poll_exhausted(cx, limit)
            .map(|()| Err(timed_out(what)))
    }
}

impl hyper::rt::Write for SendfileIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_memory(cx, &[IoSlice::new(buf)])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Taken on every pass, sent or not: the next pass offers anew, advanced by what went out.
        let offered = this.queue.take();
        // Only up to the first marker: what stands behind it must not overtake the file.
        let memory = slices.iter().take_while(|slice| !is_marker(slice)).count();
        if memory > 0 || slices.is_empty() {
            return this.poll_write_memory(cx, &slices[..memory]);
        }
        match offered {
            Some(offered) => this.poll_send_offered(cx, &offered),
            None => Poll::Ready(Err(io::Error::other(
                "a file chunk was built with another connection's send queue",
            ))),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(cx)
    }
}

fn timed_out(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

/// Whether an error of sendfile speaks of the socket; all others are the file's.
fn is_peer_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    )
}

/// Lengths are 64-bit everywhere; hyper and the system calls count in `usize`.
pub(super) fn to_usize(len: u64) -> usize {
    const { assert!(usize::BITS == 64, "pinrange needs a 64-bit target") };
    usize::try_from(len).expect("asserted to be 64 bits wide")
}
