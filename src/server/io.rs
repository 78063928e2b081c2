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
//! - `TCP_NODELAY` is on, so that nothing waits for the client's acknowledgement.
//!
//! What stands in front of an extent, mostly the response's head, goes out in the way that is cheapest for the extent's
//! length (ADR 18):
//!
//! ```text
//!   up to 4 KiB, in the page cache     preadv2 into a buffer on the stack ─▶ one writev of head and payload
//!   up to 64 KiB, in the page cache    sendmsg(head, MSG_MORE) ─▶ sendfile: one segment less, one wake-up of the client
//!   longer, or on the disk             writev(head) at once ─▶ sendfile, a slice at a time
//! ```
//!
//! Time is limited here too, because only here it shows who is being waited for. The timers are
//! started by the first wait, so a request that never waits never touches one:
//!
//! ```text
//!             wait for a byte                      bytes, head not complete
//!   (start) ─► Idle: idle_timeout ── first byte ──► Head: header_timeout
//!                 ▲                                        │ head complete: hyper stops reading
//!                 └── any byte of a response goes out ─────┘ and waits for the handler
//!                     (to Head, where hyper has the beginning of another one already)
//!
//!   a write waits for the client: it may be progress_timeout behind `min_rate` (see `Credit`)
//! ```
//!
//! How far a client is shows only in steps as long as we wait for a socket to take more: the kernel says so once a good
//! part of what it holds is gone, most of a MiB on a fast connection, and a client that reads 10 KB/s would seem stalled
//! for more than a minute. So before a client is given up, the kernel is asked what it holds still ([`unacknowledged`]).
//!
//! A head that repeats the last one for another range does not get as far as hyper: see [`again`](super::again). While
//! nothing else comes, hyper is not even polled, so the connection's task and hyper share this side of it ([`SharedIo`]).
//!
//! A file that ends early, cannot be read or hangs does not end the response either: see
//! [`rescue`](super::rescue).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use hyper::rt::ReadBufCursor;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::accept::Ending;
use super::again::{Again, Answer, Heads};
use super::body::{BodyObserver, Delivery};
use super::outq::unacknowledged;
use super::page_in::{Hangs, PageIn};
use super::rescue::Rescue;
use super::unsent::{Loan, Pool};
use crate::disk::FileExtent;
use crate::payload::{Payload, Way};
use crate::semantics::ByteRange;

/// Most bytes that one sendfile call is asked for: some 0.2 ms of a worker thread.
pub const SLICE: u64 = 1 << 20;

/// The longest extent that is copied: one that costs less than the sendfile it saves. At twice the length it does not.
pub const COPIED: usize = 4 << 10;

/// The longest extent that what stands in front of it waits for in the socket. From 96 KiB on it costs more than it
/// saves (ADR 18).
pub const JOINED: u64 = 64 << 10;

/// Most slices that are written together with a copied extent: a head, and the ends of answers before it.
const FEW: usize = 4;

/// Most bytes that are sent before other tasks get their turn, however fast the client takes them.
/// Tokio's own budget counts calls, and 128 slices would be thirty times as much.
pub const BURST: u64 = 4 << 20;

/// How often in a `progress` timeout that passes without the socket taking anything the kernel is asked what the client has
/// acknowledged. Each look is a timer and a system call.
const LOOKS: u32 = 4;

/// How long a client may take over what it still sends when its connection is to end: more than the round trip
/// that tells it of the end.
const LINGER: Duration = Duration::from_secs(2);

/// Most of that which is taken. Nothing that has a reason to be sent here is longer.
const LINGER_BYTES: usize = 1 << 20;

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
    /// While we have bytes to send: how far a client may be behind `min_rate`. One that takes nothing is cut after
    /// this time, or a quarter of it later where its kernel took something at the beginning.
    pub progress: Duration,
    /// Bytes a second that a client has to take, on average over the time we wait for it. 0: any byte is progress
    /// enough.
    pub min_rate: u64,
}

/// Why a connection was cut by us, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: a metric label")]
pub enum Cut {
    /// The client was the progress timeout behind the minimum rate.
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
    standing: Mutex<Standing>,
    dismissed: AtomicBool,
    task: AtomicWaker,
    cut: OnceLock<Cut>,
    repeats: AtomicU64,
    again: Mutex<Option<(u64, Arc<dyn Again>)>>,
    by_sendfile: AtomicU64,
    by_write: AtomicU64,
    copied: AtomicU64,
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

    /// Asks the connection to end: at once if nothing is under way on it, else with its answer.
    pub(super) fn dismiss(&self) {
        self.0.dismissed.store(true, Ordering::Release);
        self.0.task.wake();
    }

    /// Whether it has been asked to end.
    pub(super) fn is_dismissed(&self) -> bool {
        self.0.dismissed.load(Ordering::Acquire)
    }

    /// `Ready` once it is asked to end. For the connection's own task.
    pub(super) fn poll_dismissed(&self, cx: &Context<'_>) -> Poll<()> {
        // Registered before the look, so that it is seen or the task is woken.
        self.0.task.register(cx.waker());
        if self.is_dismissed() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Who is waiting for whom.
    pub(super) fn standing(&self) -> Standing {
        *self.0.standing.lock()
    }

    fn stand(&self, standing: Standing) {
        *self.0.standing.lock() = standing;
    }

    /// The head that hyper is given now is its `number`th, and the last one again but for the digits of its range; `None`: it
    /// is another.
    pub(super) fn repeats(&self, number: Option<u64>) {
        self.0
            .repeats
            .store(number.unwrap_or_default(), Ordering::Relaxed);
    }

    /// What [`repeats`](Self::repeats) was told of the request that is being handled: the number to [`arm`](Self::arm) with.
    pub(super) fn repeated(&self) -> Option<u64> {
        let number = self.0.repeats.load(Ordering::Relaxed);
        (number > 0).then_some(number)
    }

    /// The answer to the `number`th head is out, all of it; `again` repeats it.
    pub(super) fn arm(&self, number: u64, again: Arc<dyn Again>) {
        *self.0.again.lock() = Some((number, again));
    }

    /// What repeats the answer to the `number`th head, if that is out.
    pub(super) fn take_again(&self, number: u64) -> Option<Arc<dyn Again>> {
        let armed = self.0.again.lock().take();
        armed
            .filter(|(of, _)| *of == number)
            .map(|(_, again)| again)
    }

    /// Bytes of files that left this connection through write, because their extents were short.
    pub fn copied(&self) -> u64 {
        self.0.copied.load(Ordering::Relaxed)
    }

    /// Bytes that left this connection through sendfile: payload only.
    pub fn sent_by_sendfile(&self) -> u64 {
        self.0.by_sendfile.load(Ordering::Relaxed)
    }

    /// Bytes that left this connection through write: response heads, payload from memory, and what was
    /// [copied](Self::copied).
    pub fn sent_by_write(&self) -> u64 {
        self.0.by_write.load(Ordering::Relaxed)
    }
}

/// A limit on waiting that costs nothing until there is something to wait for, and little where waits are many and short:
/// while the timer goes off no later than a wait is to end, it is left alone, and set anew when it has gone off.
///
/// To be polled by one task only, whose waker the timer has then.
#[derive(Debug, Default)]
struct Patience {
    wait: Option<Wait>,
    /// When the timer wakes the task, if it is to.
    alarm: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    since: Instant,
    deadline: Instant,
}

impl Patience {
    /// `Ready` when `limit` has passed since the first call after [`Patience::stop`].
    fn poll_exhausted(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let begins = self.wait.is_none();
        let Wait { since, deadline } = *self.wait.get_or_insert_with(|| {
            let since = Instant::now();
            let deadline = since + limit;
            Wait { since, deadline }
        });
        if begins
            && let Some(alarm) = self.alarm
            && since < alarm
            && alarm <= deadline
        {
            return Poll::Pending;
        }
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if begins {
            timer.as_mut().reset(deadline);
        }
        while timer.as_mut().poll(cx).is_ready() {
            self.alarm = None;
            if timer.deadline() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
        self.alarm = Some(timer.deadline());
        Poll::Pending
    }

    /// Since when something is waited for.
    fn since(&self) -> Option<Instant> {
        self.wait.map(|wait| wait.since)
    }

    /// What was waited for happened; returns since when it was waited for. The timer is left in the
    /// wheel: it wakes the task for nothing, once in the time that a wait may take.
    fn stop(&mut self) -> Option<Instant> {
        self.wait.take().map(|wait| wait.since)
    }
}

/// Patience with a client that has to take bytes: waiting for it uses it up, the bytes it takes renew
/// it.
///
/// A client begins `progress` ahead. Each second that we wait takes one second off, each byte gives
/// back `1 / min_rate` seconds, and never is it further ahead than at the beginning. So who takes
/// `min_rate` on average is never cut, however unevenly it does so within `progress`; who takes a
/// byte now and then to be spared is cut nearly as soon as who takes none. Time in which nobody waits
/// for the client (S3 or the disk is asked) does not count.
///
/// A byte counts as taken when the socket takes it, and in a long wait, in which it takes none, when we see that the client
/// acknowledged it; never twice. We look [`LOOKS`] times in a `progress`: bytes that were acknowledged right behind one look
/// renew a credit that is older by then, so who takes nothing any more is cut after `progress` and a part of it at the latest.
#[derive(Debug)]
struct Credit {
    left: Duration,
    wait: Patience,
    /// Bytes that the client had not acknowledged when it was last looked.
    unacknowledged: u64,
    /// Bytes that counted when they were acknowledged: as many more that the socket takes do not count.
    ahead: u64,
}

impl Credit {
    fn new(timeouts: &Timeouts) -> Self {
        Self {
            left: timeouts.progress,
            wait: Patience::default(),
            unacknowledged: 0,
            ahead: 0,
        }
    }

    /// The socket takes nothing at the moment. `Ready` when that has used up the credit, although `unacknowledged`
    /// bytes left to acknowledge were looked at.
    fn poll_exhausted(
        &mut self,
        cx: &mut Context<'_>,
        timeouts: &Timeouts,
        unacknowledged: impl Fn() -> u64,
    ) -> Poll<()> {
        if self.wait.since().is_none() {
            self.unacknowledged = unacknowledged();
        }
        loop {
            let until_a_look = self.left.min(timeouts.progress / LOOKS);
            ready!(self.wait.poll_exhausted(cx, until_a_look));
            let before = std::mem::replace(&mut self.unacknowledged, unacknowledged());
            let taken = before.saturating_sub(self.unacknowledged);
            self.pause();
            self.add(taken, timeouts);
            self.ahead += taken;
            if self.left.is_zero() {
                return Poll::Ready(());
            }
        }
    }

    /// The client would take something: it is not the one that is waited for.
    fn pause(&mut self) {
        if let Some(since) = self.wait.stop() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
    }

    /// The socket took `sent` bytes.
    fn renew(&mut self, sent: usize, timeouts: &Timeouts) {
        self.pause();
        let sent = sent as u64;
        let counted = self.ahead.min(sent);
        self.ahead -= counted;
        self.add(sent - counted, timeouts);
    }

    fn add(&mut self, taken: u64, timeouts: &Timeouts) {
        if taken > 0 && self.left < timeouts.progress {
            // More than a u64 of nanoseconds is more than any timeout.
            let worth = taken
                .saturating_mul(1_000_000_000)
                .checked_div(timeouts.min_rate)
                .map_or(timeouts.progress, Duration::from_nanos);
            self.left = timeouts.progress.min(self.left + worth);
        }
    }
}

/// What the next byte from the client will belong to, as far as timeouts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expecting {
    /// The first request.
    First,
    /// Another request.
    Next,
    /// A head that has begun.
    RestOfHead,
}

/// Who is waiting for whom on a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Standing {
    /// We owe an answer, or bytes of one.
    #[default]
    Busy,
    /// The client owes us a request.
    Idle {
        since: Instant,
        expecting: Expecting,
    },
}

impl Standing {
    /// The client owes us the rest of a head.
    pub(super) fn is_in_head(self) -> bool {
        matches!(
            self,
            Self::Idle {
                expecting: Expecting::RestOfHead,
                ..
            }
        )
    }
}

/// The socket's side of a data connection. See the [module](self) for how it works.
pub struct SendfileIo {
    tcp: TcpStream,
    queue: SendQueue,
    page_in: PageIn,
    /// What the socket may hold more than others.
    loan: Loan,
    /// A stretch at the front of the queue that is being read into the page cache.
    loading: Option<BoxFuture<'static, Result<(), Hangs>>>,
    /// What is sent in the place of the extent at the front of the queue, since its file failed.
    rescue: Option<Box<Rescue>>,
    timeouts: Timeouts,
    expecting: Expecting,
    /// What the queue says: [`Standing::Idle`].
    is_idle: bool,
    read_wait: Patience,
    credit: Credit,
    /// Bytes sent since the last wait or yield.
    burst: u64,
    /// What stands in front of the next extent was written because that extent is in the page cache.
    probed: bool,
    heads: Heads,
    /// What hyper does not know of and is being written.
    answer: Option<Answer>,
    /// What was read for hyper before it asked, or what came of reading.
    read_ahead: Option<io::Result<Vec<u8>>>,
    ending: Ending,
}

impl SendfileIo {
    /// Wraps an accepted socket; `TCP_NODELAY` is the caller's business. Bodies sent through it
    /// must be built with the same `queue`.
    pub(super) fn new(
        tcp: TcpStream,
        queue: SendQueue,
        page_in: PageIn,
        unsent: &Pool,
        timeouts: Timeouts,
        ending: Ending,
    ) -> Self {
        Self {
            tcp,
            queue,
            page_in,
            loan: unsent.loan(),
            loading: None,
            rescue: None,
            timeouts,
            expecting: Expecting::First,
            is_idle: false,
            read_wait: Patience::default(),
            credit: Credit::new(&timeouts),
            burst: 0,
            probed: false,
            heads: Heads::default(),
            answer: None,
            read_ahead: None,
            ending,
        }
    }

    /// Ends a connection whose sending side is shut down, so that the client gets what was sent.
    ///
    /// A socket that is closed while it holds unread bytes is reset, and a reset lets the client's
    /// kernel throw away an answer that nobody has read yet (RFC 9112 §9.6). So what the client still
    /// sends is taken and dropped first, until it has nothing more, for [`LINGER`] and up to
    /// [`LINGER_BYTES`]. Nothing is waited for unless more is `expected`, or the client's kernel has not acknowledged all of
    /// the answer.
    ///
    /// Dropping the future closes at once.
    pub(super) async fn linger(self, expected: bool) {
        let tcp = self.tcp;
        // The end counts as one.
        let expected = expected || unacknowledged(&tcp) > 1;
        let drained = async {
            let (mut left, mut expected) = (LINGER_BYTES, expected);
            loop {
                match drop_some(&tcp) {
                    Ok(1..) if left == 0 => return,
                    Ok(read @ 1..) => (left, expected) = (left.saturating_sub(read), true),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && expected => {
                        if tcp.readable().await.is_err() {
                            return;
                        }
                    }
                    Ok(0) | Err(_) => return,
                }
            }
        };
        // However it ended, it is closed now.
        let _ = tokio::time::timeout(LINGER, drained).await;
    }

    /// Bytes went out: the client is alive, and if it was sending a head, that was complete. It may have begun another behind
    /// it, which hyper has already.
    fn wrote(&mut self, sent: usize) {
        self.burst += sent as u64;
        self.credit.renew(sent, &self.timeouts);
        self.read_wait.stop();
        self.expecting = if self.heads.end_in_head() {
            Expecting::RestOfHead
        } else {
            Expecting::Next
        };
        self.busy();
    }

    fn busy(&mut self) {
        if std::mem::take(&mut self.is_idle) {
            self.queue.stand(Standing::Busy);
        }
    }

    /// The socket takes nothing. `Ready` with the error that ends the connection once the client is
    /// too far behind.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.burst = 0;
        let unacknowledged = || unacknowledged(&self.tcp);
        ready!(
            self.credit
                .poll_exhausted(cx, &self.timeouts, unacknowledged)
        );
        self.queue.set_cut(Cut::Stalled);
        // A reset, once it is closed: else the kernel would keep what is in the socket for minutes, for a client that does
        // not take it. Where that fails, it does.
        let _ = self.tcp.set_zero_linger();
        Poll::Ready(timed_out("the client takes too few bytes"))
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
        self.wrote_memory(sent);
        Poll::Ready(Ok(sent))
    }

    fn wrote_memory(&mut self, sent: usize) {
        self.queue
            .0
            .by_write
            .fetch_add(sent as u64, Ordering::Relaxed);
        self.wrote(sent);
    }

    /// Writes what an extent stands behind, and with it the extent where that is short; the rest of one that is cut
    /// through goes by sendfile.
    fn poll_write_before(
        &mut self,
        cx: &mut Context<'_>,
        memory: &[IoSlice<'_>],
        extent: &FileExtent,
    ) -> Poll<io::Result<usize>> {
        let len = extent.len();
        if to_usize(len) <= COPIED && memory.len() <= FEW {
            self.poll_write_together(cx, memory, extent)
        } else if len <= JOINED && self.page_in.is_resident(extent, len) {
            self.poll_write_corked(cx, memory)
        } else {
            self.poll_write_memory(cx, memory)
        }
    }

    /// One write of `memory` and a short extent. Only of `memory` where the extent cannot be had at once: its head
    /// need not wait for the disk, and what is wrong with a file shows in sendfile as well.
    fn poll_write_together(
        &mut self,
        cx: &mut Context<'_>,
        memory: &[IoSlice<'_>],
        extent: &FileExtent,
    ) -> Poll<io::Result<usize>> {
        let mut copy = [0; COPIED];
        let copy = &mut copy[..to_usize(extent.len())];
        if !self.page_in.copy_resident(extent, copy) {
            return self.poll_write_memory(cx, memory);
        }
        let mut slices = [IoSlice::new(copy); FEW + 1];
        slices[..memory.len()].copy_from_slice(memory);
        let sent = ready!(self.poll_write_memory(cx, &slices[..=memory.len()]))?;
        let before: usize = memory.iter().map(|slice| slice.len()).sum();
        self.queue
            .0
            .copied
            .fetch_add(sent.saturating_sub(before) as u64, Ordering::Relaxed);
        Poll::Ready(Ok(sent))
    }

    /// Leaves `memory` in the socket for the sendfile that follows at once (`MSG_MORE`). Should that be held up after
    /// all, the kernel sends it after 200 ms.
    fn poll_write_corked(
        &mut self,
        cx: &mut Context<'_>,
        memory: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let Poll::Ready(writable) = self.tcp.poll_write_ready(cx) else {
                return self.poll_stalled(cx).map(Err);
            };
            writable?;
            let result = self.tcp.try_io(Interest::WRITABLE, || {
                let nothing = &mut SendAncillaryBuffer::default();
                rustix::net::sendmsg(&self.tcp, memory, nothing, SendFlags::MORE)
                    .map_err(io::Error::from)
            });
            match result {
                Ok(sent) => {
                    self.probed = true;
                    self.wrote_memory(sent);
                    return Poll::Ready(Ok(sent));
                }
                // As in `poll_send_file`.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Writes an answer that hyper does not know of to its end.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(mut answer) = self.answer.take() else {
            return Poll::Ready(Ok(()));
        };
        while answer.has_remaining() {
            let head = answer.first_ref().chunk();
            let written = match answer.last_ref().extent() {
                // Its extent needs no marker: it is known what is in front.
                Some(extent) if !head.is_empty() => {
                    self.poll_write_before(cx, &[IoSlice::new(head)], extent)
                }
                _ => {
                    let mut slices = [IoSlice::new(&[]); 2];
                    let filled = answer.chunks_vectored(&mut slices);
                    self.poll_write_slices(cx, &slices[..filled])
                }
            };
            match written {
                Poll::Ready(Ok(sent)) => answer.advance(sent),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.answer = Some(answer);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes memory up to the first marker, or from the extent that stands for it.
    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // Taken on every pass, sent or not: the next pass offers anew, advanced by what went out.
        let offered = self.queue.take();
        // Only up to the first marker: what stands behind it must not overtake the file.
        let memory = slices.iter().take_while(|slice| !is_marker(slice)).count();
        if memory > 0 || slices.is_empty() {
            let memory = &slices[..memory];
            return match offered {
                Some(offered) => self.poll_write_before(cx, memory, &offered.extent),
                None => self.poll_write_memory(cx, memory),
            };
        }
        match offered {
            Some(offered) => self.poll_send_offered(cx, &offered),
            None => Poll::Ready(Err(io::Error::other(
                "a file chunk was built with another connection's send queue",
            ))),
        }
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
        // A moment ago only: not after waiting for the client.
        let mut probed = std::mem::take(&mut self.probed);
        loop {
            if self.burst >= BURST {
                self.burst = 0;
                return poll_after_others(cx);
            }
            // Loading first: while it runs it is the disk that is waited for, not the client.
            if let Some(loading) = &mut self.loading {
                let loaded = ready!(loading.poll_unpin(cx));
                self.loading = None;
                if let Err(Hangs) = loaded {
                    return Poll::Ready(Err(Failed::Hangs));
                }
                probed = true;
            }
            let Poll::Ready(writable) = self.tcp.poll_write_ready(cx) else {
                return self
                    .poll_stalled(cx)
                    .map(|error| Err(Failed::Socket(error)));
            };
            writable.map_err(Failed::Socket)?;
            // What was just loaded is not asked about again, so that a page cache under pressure
            // cannot keep us here.
            if !probed && !self.page_in.is_resident(extent, len) {
                self.credit.pause();
                self.loading = Some(self.page_in.load(extent.clone(), len));
                continue;
            }
            let send = || {
                let mut offset = extent.offset();
                let file = extent.file().file();
                rustix::fs::sendfile(&self.tcp, file, Some(&mut offset), to_usize(len))
            };
            let result = self.tcp.try_io(Interest::WRITABLE, || {
                let sent = match send() {
                    Err(Errno::AGAIN) if self.loan.extend(&self.tcp) => send(),
                    sent => sent,
                };
                sent.map_err(io::Error::from)
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

    /// Reads from the client, and answers by itself what is only a repetition. `give` gets what is hyper's business, at most
    /// `room` bytes; nothing: the client has ended its side.
    fn poll_read_from_client(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
        give: impl FnOnce(&[u8]),
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_answer(cx))?;
            // Requests are small: copying one from the stack is cheaper than zeroing hyper's buffer for
            // it.
            let mut stack = [MaybeUninit::<u8>::uninit(); 8192];
            let room = stack.len().min(room);
            let mut read = ReadBuf::uninit(&mut stack[..room]);
            let Poll::Ready(result) = Pin::new(&mut self.tcp).poll_read(cx, &mut read) else {
                break;
            };
            result?;
            let bytes = read.filled();
            let begins = self.expecting != Expecting::RestOfHead;
            if begins && !bytes.is_empty() {
                self.expecting = Expecting::RestOfHead;
                self.read_wait.stop();
            }
            self.busy();
            if self.ending.is_announced() {
                // Its last response says so, and hyper has to know of it. Nothing is repeated after that.
                self.queue.repeats(None);
            } else {
                self.answer = self.heads.answer(bytes, begins, &self.queue);
            }
            if self.answer.is_none() {
                self.heads.are_for_hyper();
                give(bytes);
                return Poll::Ready(Ok(()));
            }
        }
        let (limit, what) = match self.expecting {
            Expecting::First | Expecting::Next => (self.timeouts.idle, "no request came"),
            Expecting::RestOfHead => (self.timeouts.header, "the request's head did not end"),
        };
        let waited = self.read_wait.poll_exhausted(cx, limit);
        if let Some(since) = self.read_wait.since() {
            let expecting = self.expecting;
            self.is_idle = true;
            self.queue.stand(Standing::Idle { since, expecting });
        }
        waited.map(|()| Err(timed_out(what)))
    }
}

/// A connection as its task and hyper share it, and as hyper sees it. Nobody ever waits for the lock.
#[derive(Clone)]
pub(super) struct SharedIo(Arc<Mutex<SendfileIo>>);

impl SharedIo {
    pub(super) fn new(io: SendfileIo) -> Self {
        Self(Arc::new(Mutex::new(io)))
    }

    /// Goes on while all that comes are repetitions. `Ready`: hyper has to look. `Pending`: it need not be polled, for it
    /// waits for a head, and would find out that there is none in a KiB and a half of its own (ADR 27).
    pub(super) fn poll_repetitions(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut io = self.0.lock();
        if !io.heads.are_repeated() || io.read_ahead.is_some() {
            return Poll::Ready(());
        }
        let mut bytes = Vec::new();
        let read = ready!(io.poll_read_from_client(cx, usize::MAX, |read| bytes = read.to_vec()));
        io.read_ahead = Some(read.map(|()| bytes));
        Poll::Ready(())
    }

    /// `None`: it is shared still.
    pub(super) fn into_inner(self) -> Option<SendfileIo> {
        Arc::into_inner(self.0).map(Mutex::into_inner)
    }
}

impl hyper::rt::Read for SharedIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut io = self.0.lock();
        let room = buf.remaining();
        let Some(read) = io.read_ahead.take() else {
            return io.poll_read_from_client(cx, room, |bytes| buf.put_slice(bytes));
        };
        let mut bytes = read?;
        let rest = bytes.split_off(room.min(bytes.len()));
        buf.put_slice(&bytes);
        if !rest.is_empty() {
            io.read_ahead = Some(Ok(rest));
        }
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for SharedIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write_memory(cx, &[IoSlice::new(buf)])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write_slices(cx, slices)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut io = self.0.lock();
        ready!(io.poll_answer(cx))?;
        Pin::new(&mut io.tcp).poll_shutdown(cx)
    }
}

/// Not in `linger`, where its array would be a part of every connection's task.
fn drop_some(tcp: &TcpStream) -> io::Result<usize> {
    tcp.try_read(&mut [0; 8192])
}

/// Pending, until the runtime has looked at its sockets again and those that have something to do had their turn. A wake-up
/// alone would have it come back to us before it looks.
fn poll_after_others<T>(cx: &mut Context<'_>) -> Poll<T> {
    let mut turn = std::pin::pin!(tokio::task::yield_now());
    let first = turn.as_mut().poll(cx);
    debug_assert!(first.is_pending(), "a turn is given up by the first poll");
    Poll::Pending
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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    const TIMEOUTS: Timeouts = Timeouts {
        header: Duration::ZERO,
        idle: Duration::ZERO,
        progress: Duration::from_mins(1),
        min_rate: 1000,
    };

    /// Waits for `seconds`, then the client takes `bytes`; the seconds that are left then.
    fn after(credit: &mut Credit, seconds: u64, bytes: usize) -> u64 {
        let deadline = Instant::now();
        let since = deadline.checked_sub(Duration::from_secs(seconds)).unwrap();
        credit.wait.wait = Some(Wait { since, deadline });
        credit.renew(bytes, &TIMEOUTS);
        // The test itself takes a moment.
        (credit.left + Duration::from_millis(500)).as_secs()
    }

    #[test]
    fn a_byte_now_and_then_renews_no_patience_and_the_minimum_rate_does() {
        let mut credit = Credit::new(&TIMEOUTS);
        assert_eq!(after(&mut credit, 40, 1), 20);
        assert_eq!(after(&mut credit, 15, 1), 5);
        assert_eq!(after(&mut credit, 4, 30_000), 31, "thirty seconds' worth");
        assert_eq!(
            after(&mut credit, 31, 31_000),
            31,
            "as fast as it has to be"
        );
        assert_eq!(after(&mut credit, 59, 10 << 20), 60, "never further ahead");
        assert_eq!(after(&mut credit, 61, 0), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_client_acknowledges_in_a_long_wait_counts_once() {
        let mut credit = Credit::new(&TIMEOUTS);
        let begun = Instant::now();
        // It takes the minimum for two minutes, without the socket taking anything, and then nothing any more.
        let unacknowledged = || {
            let taken = begun.elapsed().as_secs().min(120) * TIMEOUTS.min_rate;
            1_000_000 - taken
        };
        std::future::poll_fn(|cx| credit.poll_exhausted(cx, &TIMEOUTS, unacknowledged)).await;
        let waited = begun.elapsed().as_secs();
        assert!((178..=182).contains(&waited), "cut after {waited} s");

        credit.renew(100_000, &TIMEOUTS);
        assert_eq!(credit.left, Duration::ZERO, "they counted already");
        credit.renew(30_000, &TIMEOUTS);
        assert_eq!(credit.left.as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_clients_kernel_takes_at_first_does_not_double_the_wait() {
        let mut credit = Credit::new(&TIMEOUTS);
        let begun = Instant::now();
        let unacknowledged = || {
            if begun.elapsed() < Duration::from_secs(1) {
                1_000_000
            } else {
                0
            }
        };
        std::future::poll_fn(|cx| credit.poll_exhausted(cx, &TIMEOUTS, unacknowledged)).await;
        let waited = begun.elapsed().as_secs();
        assert!((60..=76).contains(&waited), "cut after {waited} s");
    }

    /// How long `patience` lasts in a wait that begins now.
    async fn lasts(patience: &mut Patience, limit: Duration) -> Duration {
        let begun = Instant::now();
        let exhausted = std::future::poll_fn(|cx| patience.poll_exhausted(cx, limit));
        let in_time = tokio::time::timeout(10 * limit, exhausted);
        in_time.await.expect("the timer went off");
        patience.stop();
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_lasts_as_long_as_it_may_whatever_was_waited_for_before_it() {
        let (long, short) = (Duration::from_mins(1), Duration::from_secs(7));
        let mut patience = Patience::default();
        for pause in [1_u64, 25, 33, 59, 60, 61, 200] {
            // A few that end in time. The timer is on its way from the first one.
            for _ in 0..3 {
                let waiting = lasts(&mut patience, long);
                let ended = tokio::time::timeout(Duration::from_secs(pause.min(50)), waiting);
                assert!(ended.await.is_err());
                patience.stop();
            }
            tokio::time::advance(Duration::from_secs(pause)).await;
            for limit in [short, long, short] {
                let lasted = lasts(&mut patience, limit).await;
                let late = lasted.checked_sub(limit).expect("not too early");
                assert!(late < Duration::from_millis(5), "{limit:?}: {lasted:?}");
            }
        }
    }

    /// What hyper reads at a time.
    async fn read(io: &mut SharedIo) -> Vec<u8> {
        let mut bytes = [0; 1024];
        let mut bytes = hyper::rt::ReadBuf::new(&mut bytes);
        std::future::poll_fn(|cx| {
            hyper::rt::Read::poll_read(Pin::new(&mut *io), cx, bytes.unfilled())
        })
        .await
        .unwrap();
        bytes.filled().to_vec()
    }

    /// A client, and the other side of its connection.
    async fn connection(queue: &SendQueue, ending: &Ending) -> (TcpStream, SharedIo) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (server, _) = listener.accept().await.unwrap();
        let timeouts = Timeouts {
            idle: Duration::from_mins(1),
            ..TIMEOUTS
        };
        let io = SendfileIo::new(
            server,
            queue.clone(),
            PageIn::new().unwrap(),
            &Pool::of_this_machine(),
            timeouts,
            ending.clone(),
        );
        (client.unwrap(), SharedIo::new(io))
    }

    #[tokio::test]
    async fn no_answer_is_to_be_repeated_once_the_last_one_is_announced() {
        const HEAD: &[u8] = b"GET /a HTTP/1.1\r\nHost: b\r\nRange: bytes=10-20\r\n\r\n";
        let (queue, ending) = (SendQueue::default(), Ending::default());
        let (client, mut io) = connection(&queue, &ending).await;
        for (announced, repeated) in [(false, None), (false, Some(2)), (true, None)] {
            if announced {
                ending.announce();
            }
            client.writable().await.unwrap();
            client.try_write(HEAD).unwrap();
            assert_eq!(read(&mut io).await, HEAD);
            assert_eq!(queue.repeated(), repeated);
            io.0.lock().wrote(1);
        }
    }

    #[tokio::test]
    async fn hyper_gets_what_was_read_ahead_of_it_whole_and_in_order() {
        let (client, mut io) = connection(&SendQueue::default(), &Ending::default()).await;
        // More than one read of hyper's takes.
        let ahead: Vec<u8> = (0..5000_u32).map(|at| (at % 251) as u8).collect();
        io.0.lock().read_ahead = Some(Ok(ahead.clone()));
        client.try_write(b"behind it").unwrap();
        let mut got = Vec::new();
        while got.len() < ahead.len() {
            got.extend(read(&mut io).await);
        }
        assert!(got == ahead);
        assert_eq!(read(&mut io).await, b"behind it");
        io.0.lock().read_ahead = Some(Ok(Vec::new()));
        assert_eq!(read(&mut io).await, b"", "the client has ended its side");
        io.0.lock().read_ahead = Some(Err(timed_out("no request came")));
        let mut bytes = [0; 8];
        let mut bytes = hyper::rt::ReadBuf::new(&mut bytes);
        let failed = std::future::poll_fn(|cx| {
            hyper::rt::Read::poll_read(Pin::new(&mut io), cx, bytes.unfilled())
        });
        assert_eq!(failed.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn who_lets_others_go_first_has_the_sockets_looked_at() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_io()
            // As the program's: turns alone do not make it look.
            .event_interval(8192)
            .build()
            .unwrap();
        let turns = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let client = TcpStream::connect(address).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            let answered = tokio::spawn(async move { server.read_u8().await.unwrap() });
            // It waits now.
            tokio::task::yield_now().await;
            client.try_write(b"x").unwrap();
            for turn in 0..100 {
                let mut gave_way = false;
                std::future::poll_fn(|cx| {
                    if std::mem::replace(&mut gave_way, true) {
                        return Poll::Ready(());
                    }
                    poll_after_others(cx)
                })
                .await;
                if answered.is_finished() {
                    return turn;
                }
            }
            panic!("a socket with something to read waited for a hundred turns");
        };
        let turns = runtime.block_on(runtime.spawn(turns)).unwrap();
        assert!(turns < 10, "it waited for {turns} turns");
    }

    #[test]
    fn without_a_minimum_rate_any_byte_is_enough() {
        let mut credit = Credit::new(&TIMEOUTS);
        credit.left = Duration::from_secs(1);
        credit.renew(
            1,
            &Timeouts {
                min_rate: 0,
                ..TIMEOUTS
            },
        );
        assert_eq!(credit.left, TIMEOUTS.progress);
    }
}
