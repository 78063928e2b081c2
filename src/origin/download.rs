//! A stretch of one revision, whatever happens to the connections it comes over.
//!
//! A body that resets, ends short or stalls is resumed at the exact offset, under the guard of the first
//! request, on another connection. That the object changed meanwhile ends it.
//!
//! **Stalls.** A body has to bring a window of [`WINDOW`] bytes in the time that windows of this store take, times
//! some; so a body that drips is found out like one that is silent, and is kept where no retry is left. Only time spent waiting for the remote
//! counts: while our disk or the client is slow, no clock runs.

use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use futures::stream::{self, BoxStream, Fuse};
use tokio::time::Instant;

use super::{LONGEST_PAUSE_MIDWAY, Origin, Patience, Store, Wanted};
use crate::object::Representation;
use crate::remote::{Guard, RemoteError, RemoteErrorKind, RemoteRead};
use crate::semantics::RangeSpec;

/// Progress is measured in windows of this many bytes: some frames, and the least that makes an attempt worth its
/// request.
const WINDOW: u64 = 64 * 1024;

/// No window is given up before this. S3 sends one in under a millisecond; what is lost in a network is sent again
/// three times within it, and a client hardly takes it for more than a pause.
pub(super) const SHORTEST_STALL: Duration = Duration::from_secs(2);
/// Nor is any waited for longer, however slow the others were: clients wait about as long themselves.
const LONGEST_STALL: Duration = Duration::from_secs(30);

impl Store {
    /// The time a window may take: four times what nine of ten take here.
    pub(super) fn stall_limit(&self) -> Duration {
        let slow = self.window.lock().quantile(900);
        (slow * 4).clamp(SHORTEST_STALL, LONGEST_STALL)
    }
}

impl Origin {
    /// Begins to read `start..end` of the guarded revision; returns once the remote has answered. `end` may lie beyond
    /// the end of the object while its size is unknown.
    ///
    /// # Errors
    /// As [`Remote::read`](crate::remote::Remote::read), after retries; the last error where it is not `wanted` any more.
    pub async fn download(
        &self,
        guard: Guard,
        start: u64,
        end: u64,
        wanted: Wanted<'_>,
    ) -> Result<Download, RemoteError> {
        let mut patience = self.patience();
        let read = self
            .read_patiently(&guard, closed(start, end), &mut patience, wanted)
            .await?;
        Ok(Download::new(
            self.clone(),
            guard,
            read,
            start,
            end,
            patience,
        ))
    }

    /// Goes on from `start` to `end` with a read that has been answered. What its body holds before `start` is dropped.
    pub fn adopt(&self, guard: Guard, read: RemoteRead, start: u64, end: u64) -> Download {
        Download::new(self.clone(), guard, read, start, end, self.patience())
    }
}

fn closed(start: u64, end: u64) -> RangeSpec {
    RangeSpec::Closed {
        first: start,
        last: end - 1,
    }
}

/// A read under way.
pub struct Download {
    origin: Origin,
    guard: Guard,
    representation: Representation,
    /// What comes next.
    at: u64,
    end: u64,
    /// Bytes to come that lie before `at`.
    skip: u64,
    body: Fuse<BoxStream<'static, Result<Bytes, RemoteError>>>,
    /// What came while it was waited for.
    first: Option<Bytes>,
    /// Whether the body had nothing when it was asked last.
    is_dry: bool,
    /// What broke the body behind the bytes that were handed on last.
    broken: Option<Trouble>,
    /// Bytes that this connection has brought.
    brought: u64,
    /// Bytes of the window under way, and how long they were waited for.
    window: u64,
    waited: Duration,
    /// Whether the body before this one was given up as stalled and no window has come since.
    stalled: bool,
    patience: Patience,
}

struct Trouble {
    /// Label of the metric.
    reason: &'static str,
    error: RemoteError,
    /// Whether the budget has been asked for the retry already.
    paid: bool,
}

impl Download {
    fn new(
        origin: Origin,
        mut guard: Guard,
        read: RemoteRead,
        start: u64,
        end: u64,
        patience: Patience,
    ) -> Self {
        // Whatever follows is asked for as what has been answered.
        guard.version_id.clone_from(&read.representation.version_id);
        guard.size = Some(read.representation.size);
        Self {
            origin,
            guard,
            at: start,
            end: end.min(read.representation.size),
            skip: read
                .range
                .map_or(0, |range| start.saturating_sub(range.start())),
            representation: read.representation,
            body: read.body.fuse(),
            first: None,
            is_dry: false,
            broken: None,
            brought: 0,
            window: 0,
            waited: Duration::ZERO,
            stalled: false,
            patience,
        }
    }

    /// What the remote said of the revision.
    pub fn representation(&self) -> &Representation {
        &self.representation
    }

    /// Waits until [`Download::at_hand`] may have something. `false`: everything has been handed on.
    /// Dropping the future loses a retry that is under way.
    ///
    /// # Errors
    /// What ended it before its end: an error that asking again did not mend, or [`RemoteErrorKind::Mismatch`] where the
    /// object is at another revision by now. The last error where it is not `wanted` any more.
    pub async fn ready(&mut self, wanted: Wanted<'_>) -> Result<bool, RemoteError> {
        while self.at < self.end && self.first.is_none() {
            if let Some(trouble) = self.broken.take() {
                self.resume(trouble, wanted).await?;
            }
            if !self.is_dry {
                break;
            }
            let limit = self.origin.store.stall_limit();
            let asked = Instant::now();
            let next = self.body.next();
            let next = tokio::time::timeout(limit.saturating_sub(self.waited), next).await;
            self.waited += asked.elapsed();
            self.is_dry = false;
            match next {
                Err(_elapsed) => self.stall(limit),
                Ok(frame) => self.first = self.take(frame),
            }
        }
        Ok(self.at < self.end || self.first.is_some())
    }

    /// The next bytes, if they can be had without waiting. Never none at all: `None` is to be followed by
    /// [`Download::ready`]. May be called on a thread that may block.
    pub fn at_hand(&mut self) -> Option<Bytes> {
        if let Some(bytes) = self.first.take() {
            return Some(bytes);
        }
        while self.at < self.end && self.broken.is_none() {
            // Who waits says so there.
            let mut cx = Context::from_waker(Waker::noop());
            let Poll::Ready(frame) = self.body.poll_next_unpin(&mut cx) else {
                self.is_dry = true;
                return None;
            };
            let bytes = self.take(frame);
            if bytes.is_some() {
                return bytes;
            }
        }
        None
    }

    /// The next bytes: those that are there at once, in at most `most` frames, none empty. No frame at all: everything
    /// has been handed on.
    ///
    /// # Errors
    /// As [`Download::ready`].
    pub async fn frames(
        &mut self,
        most: usize,
        wanted: Wanted<'_>,
    ) -> Result<Vec<Bytes>, RemoteError> {
        while self.ready(wanted).await? {
            let frames: Vec<_> = std::iter::from_fn(|| self.at_hand()).take(most).collect();
            if !frames.is_empty() {
                return Ok(frames);
            }
        }
        Ok(Vec::new())
    }

    /// What of a frame is to be handed on. What ends the body is kept for [`Download::ready`].
    fn take(&mut self, frame: Option<Result<Bytes, RemoteError>>) -> Option<Bytes> {
        let mut bytes = match frame {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => {
                self.broken = Some(Trouble {
                    reason: error.kind.label(),
                    error,
                    paid: false,
                });
                return None;
            }
            None => {
                self.broken = Some(Trouble {
                    reason: "short",
                    error: RemoteError::new(
                        RemoteErrorKind::Unavailable,
                        "read",
                        "the body ended before its range did",
                    ),
                    paid: false,
                });
                return None;
            }
        };
        let received = bytes.len() as u64;
        self.origin.origins.metrics.remote_bytes(received);
        self.brought += received;
        self.window += received;
        if self.window >= WINDOW {
            self.origin.store.window.lock().record(self.waited);
            self.stalled = false;
            self.begin_window();
        }
        let drop_now = self.skip.min(received);
        bytes.advance(usize::try_from(drop_now).expect("at most the frame's length"));
        self.skip -= drop_now;
        self.at += bytes.len() as u64;
        (!bytes.is_empty()).then_some(bytes)
    }

    fn begin_window(&mut self) {
        self.window = 0;
        self.waited = Duration::ZERO;
    }

    /// A window took longer than its limit. Gives the body up, unless it brings something and there is no other to be had: where all
    /// are slow, as on a full uplink, a slow one is better than none.
    ///
    /// One that stalls says nothing of the store; a second in a row does, as does one that is kept, and is counted as a window
    /// that took so long: else nothing would ever be learnt of a link on which every window takes longer.
    fn stall(&mut self, limit: Duration) {
        self.origin.origins.metrics.stall();
        // Silent bodies and those that have paid for the next one are judged with all other trouble.
        let on_budget = self.window > 0 && self.brought < WINDOW;
        let paid = on_budget && self.patience.left > 0 && self.origin.origins.retries.withdraw();
        let is_kept = on_budget && !paid;
        if self.stalled || is_kept {
            self.origin.store.window.lock().record(limit);
        }
        if is_kept {
            self.begin_window();
            return;
        }
        self.stalled = true;
        let detail = format!(
            "{} bytes in {limit:?} with {} bytes to come: slower than others from this store",
            self.window,
            self.end - self.at
        );
        self.broken = Some(Trouble {
            reason: "stall",
            error: RemoteError::new(RemoteErrorKind::Timeout, "read", detail),
            paid,
        });
    }

    /// Asks for the rest, by another connection.
    async fn resume(&mut self, trouble: Trouble, wanted: Wanted<'_>) -> Result<(), RemoteError> {
        let Trouble {
            reason,
            error,
            paid,
        } = trouble;
        self.body = stream::empty().boxed().fuse();
        let (guard, rest) = (&self.guard, closed(self.at, self.end));
        if !wanted() {
            return Err(error);
        }
        // Patience and the budget are for standing still: a connection that brought a window was worth its
        // request, and has paid for the next.
        let progress = self.brought >= WINDOW;
        if progress {
            self.patience = self.origin.patience();
        }
        if self.brought > 0 {
            self.patience.longest = LONGEST_PAUSE_MIDWAY;
        }
        let paid = paid || progress;
        self.patience.spend(&self.origin, error, paid).await?;
        let read = self
            .origin
            .read_patiently(guard, rest, &mut self.patience, wanted)
            .await?;
        self.origin.origins.metrics.resumed(reason);
        self.body = read.body.fuse();
        self.is_dry = false;
        self.brought = 0;
        self.begin_window();
        self.skip = 0;
        Ok(())
    }
}
