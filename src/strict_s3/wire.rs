//! The last step on the way out: bodies that are paced, counted, stalled and cut, and the socket that cuts.
//!
//! A cut has to be exact: the client gets the promised bytes and then a reset or an end, or a test of resuming proves
//! nothing. A [`ResponseBody`] that reaches its cut arms the [`Connection`] and goes silent. Hyper then flushes, so
//! [`Socket::poll_flush`] is called after the last byte has been written; it waits until the kernel has sent what it
//! was given (a reset throws away what it has not) and fails, upon which hyper drops the socket. Dropping it closes or
//! resets the connection, as it was armed.

use std::future::Future;
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use s3s::StdError;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::faults::{BodyPlan, Cut};
use super::log::RecordHandle;

/// How long a cut waits for a client that does not read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the responses of one connection share.
pub(super) struct Connection {
    pub(super) number: u64,
    armed: Mutex<Option<Cut>>,
    /// When the next piece of body may go out.
    free_at: Mutex<Instant>,
}

impl Connection {
    pub(super) fn new(number: u64) -> Self {
        Self {
            number,
            armed: Mutex::default(),
            free_at: Mutex::new(Instant::now()),
        }
    }

    /// Ends the connection once everything written so far is out.
    pub(super) fn arm(&self, cut: Cut) {
        *self.armed.lock() = Some(cut);
    }
}

/// One accepted connection.
pub(super) struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
    /// Cancelled when all connections shall be reset.
    outage: CancellationToken,
    draining: Option<BoxFuture<'static, io::Result<()>>>,
}

impl Socket {
    pub(super) fn new(
        stream: TcpStream,
        connection: Arc<Connection>,
        outage: CancellationToken,
    ) -> Self {
        Self {
            stream,
            connection,
            outage,
            draining: None,
        }
    }
}

/// Waits until the kernel has sent all that was written to the socket.
///
/// With `TCP_NOTSENT_LOWAT` at one byte a socket is writable only when nothing is left unsent. The duplicate is
/// registered anew because tokio keeps the readiness that the original had before.
fn drained(stream: &TcpStream) -> io::Result<impl Future<Output = io::Result<()>> + use<>> {
    let duplicate = SockRef::from(stream).try_clone()?;
    duplicate.set_tcp_notsent_lowat(1)?;
    let duplicate = TcpStream::from_std(duplicate.into())?;
    Ok(async move {
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, duplicate.writable()).await;
        Ok(())
    })
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.connection.armed.lock().is_none() {
            return Pin::new(&mut this.stream).poll_flush(cx);
        }
        let draining = match &mut this.draining {
            Some(draining) => draining,
            none => none.insert(Box::pin(drained(&this.stream)?)),
        };
        ready!(draining.as_mut().poll(cx))?;
        // The duplicate would keep the connection open.
        this.draining = None;
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "a scripted cut",
        )))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if *self.connection.armed.lock() == Some(Cut::Reset) || self.outage.is_cancelled() {
            // Fails only where the peer was faster.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// How much of a timer's lateness a paced body catches up on.
const LATENESS: Duration = Duration::from_millis(20);

/// How fast bodies leave, changeable at any time.
#[derive(Default)]
pub(super) struct Pace {
    bytes_per_second: Mutex<Option<NonZeroU64>>,
}

impl Pace {
    pub(super) fn set(&self, bytes_per_second: Option<NonZeroU64>) {
        *self.bytes_per_second.lock() = bytes_per_second;
    }

    fn get(&self) -> Option<NonZeroU64> {
        *self.bytes_per_second.lock()
    }
}

/// The body of every response.
pub(super) struct ResponseBody {
    inner: s3s::Body,
    /// Read from `inner`, not yet sent.
    held: Bytes,
    sent: u64,
    /// Where the body ends cleanly, whatever `inner` still has.
    limit: u64,
    plan: BodyPlan,
    waiting: Option<BoxFuture<'static, ()>>,
    release: watch::Receiver<()>,
    pace: Arc<Pace>,
    connection: Arc<Connection>,
    record: RecordHandle,
    object: bool,
}

/// What a [`ResponseBody`] is made of, besides the bytes.
pub(super) struct Delivery {
    pub(super) plan: BodyPlan,
    pub(super) limit: u64,
    pub(super) release: watch::Receiver<()>,
    pub(super) pace: Arc<Pace>,
    pub(super) connection: Arc<Connection>,
    pub(super) record: RecordHandle,
    /// Whether the bytes are an object's.
    pub(super) object: bool,
}

impl ResponseBody {
    pub(super) fn new(inner: s3s::Body, delivery: Delivery) -> Self {
        let Delivery {
            plan,
            limit,
            release,
            pace,
            connection,
            record,
            object,
        } = delivery;
        if let Some((0, cut)) = plan.cut {
            // Hyper never asks an empty body for a frame, and the head goes out before the next flush.
            connection.arm(cut);
        }
        Self {
            inner,
            held: Bytes::new(),
            sent: 0,
            limit,
            plan,
            waiting: None,
            release,
            pace,
            connection,
            record,
            object,
        }
    }

    /// `data`, which goes out next, as it is to arrive.
    fn flipped(&self, data: Bytes) -> Bytes {
        let flip = self.plan.flip.and_then(|at| at.checked_sub(self.sent));
        match flip.map(usize::try_from) {
            Some(Ok(at)) if at < data.len() => {
                let mut data = BytesMut::from(data);
                data[at] = !data[at];
                data.freeze()
            }
            _ => data,
        }
    }

    /// Bytes that may go out before something happens.
    fn allowance(&self) -> u64 {
        let stall = self.plan.stall.map_or(u64::MAX, |(at, _)| at);
        let cut = self.plan.cut.map_or(u64::MAX, |(at, _)| at);
        stall.min(cut).min(self.limit).saturating_sub(self.sent)
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        let this = &mut *self;
        loop {
            if let Some(waiting) = &mut this.waiting {
                ready!(waiting.as_mut().poll(cx));
                this.waiting = None;
            }
            if let Some((at, duration)) = this.plan.stall
                && this.sent >= at
            {
                this.plan.stall = None;
                let mut release = this.release.clone();
                this.waiting = Some(Box::pin(async move {
                    let released = release.changed();
                    match duration {
                        Some(duration) => {
                            let _ = tokio::time::timeout(duration, released).await;
                        }
                        None => {
                            let _ = released.await;
                        }
                    }
                }));
                continue;
            }
            if let Some((at, cut)) = this.plan.cut
                && this.sent >= at
            {
                this.connection.arm(cut);
                // Hyper may have come here behind its flush.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if this.sent >= this.limit {
                return Poll::Ready(None);
            }
            if this.held.is_empty() {
                match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                    None => return Poll::Ready(None),
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => this.held = data,
                        Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                    },
                }
                continue;
            }
            let mut piece = this.allowance().min(this.held.len() as u64);
            if let Some(rate) = this.pace.get() {
                let now = Instant::now();
                let mut free_at = this.connection.free_at.lock();
                if now < *free_at {
                    this.waiting = Some(Box::pin(tokio::time::sleep_until(*free_at)));
                    continue;
                }
                // A hundredth of a second's worth at a time.
                piece = piece.min((rate.get() / 100).max(1));
                let nanoseconds = u128::from(piece) * 1_000_000_000 / u128::from(rate.get());
                let takes = u64::try_from(nanoseconds).unwrap_or(u64::MAX);
                // Timers are late by a millisecond or so, which is longer than a frame takes: what that
                // cost is made good, else the rate would be far below what was asked for.
                let earliest = now.checked_sub(LATENESS).unwrap_or(now);
                *free_at = (*free_at).max(earliest) + Duration::from_nanos(takes);
            }
            let piece = usize::try_from(piece).expect("no more than is held");
            let data = this.held.split_to(piece);
            let data = this.flipped(data);
            this.sent += data.len() as u64;
            this.record.sent(data.len() as u64, this.object);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
