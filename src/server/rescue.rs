//! What is sent in the place of a file that fails in the middle of a response (P10).
//!
//! By then hyper has been told how long the body is, holds a chunk for the extent, and has dropped
//! the body that the chunk came from. So the rescue happens below hyper: [`SendfileIo`](super::io::SendfileIo)
//! reports what goes out in the extent's place as if it had been the extent, and hyper's count stays
//! right. The client sees a pause.
//!
//! ```text
//!            the file ends early, a read fails                the page-in hangs
//!                          │                                         │
//!                          ▼                                         │
//!   the segment is reported unreadable, so the tier                  │
//!   drops it and fetches its bytes into a new file                   │
//!                          │                                         │
//!              Again: through the disk ──── fails or hangs too ──▶ PastDisk: S3's bytes, from memory
//!                          │                                         │
//!                          └──────── S3 refuses, or has changed ─────┴──▶ the connection is cut (P3)
//! ```
//!
//! A file is never trusted a third time within one extent, so a rescue ends.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Buf;

use super::body::{BodyObserver, Delivery, poll_checked};
use super::io::to_usize;
use crate::payload::{ChunkSource, Payload, Way};
use crate::semantics::ByteRange;

/// The rest of one extent, brought from elsewhere. There is at most one a connection: the extent
/// stands in front of all that is queued.
pub(super) struct Rescue {
    source: Box<dyn ChunkSource>,
    delivery: Arc<Delivery<dyn BodyObserver>>,
    way: Way,
    /// What is still owed of the extent, as a range of the revision.
    rest: ByteRange,
    /// The front of `rest`, as far as the source gave it.
    payload: Option<Payload>,
}

impl Rescue {
    /// A rescue of `rest`; `None` where the body has nothing to turn to.
    pub(super) fn begin(
        delivery: Arc<Delivery<dyn BodyObserver>>,
        rest: ByteRange,
        way: Way,
    ) -> Option<Self> {
        Some(Self {
            source: delivery.rescue(way)?,
            delivery,
            way,
            rest,
            payload: None,
        })
    }

    /// Where in the revision the next byte lies.
    pub(super) fn at(&self) -> u64 {
        self.rest.start()
    }

    /// What to send next. The body is told of an error before the caller is.
    pub(super) fn poll_payload(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Payload>> {
        if self.payload.is_none() {
            match ready!(poll_checked(self.source.as_mut(), cx, self.rest)) {
                Ok(payload) => self.payload = Some(payload),
                Err(error) => {
                    self.delivery.fail(error);
                    return Poll::Ready(Err(io::Error::other(
                        "a file failed while it was sent, and its bytes cannot be had elsewhere",
                    )));
                }
            }
        }
        let payload = self.payload.clone().expect("it was there or has just come");
        Poll::Ready(Ok(payload))
    }

    /// `sent` bytes of the payload went out. `false`: that was the last of the extent.
    pub(super) fn sent(&mut self, sent: u64) -> bool {
        let left = match &mut self.payload {
            Some(Payload::File(extent)) => {
                extent.advance(sent);
                extent.len()
            }
            Some(Payload::Memory(bytes)) => {
                self.delivery.replaced(sent);
                bytes.advance(to_usize(sent));
                bytes.len() as u64
            }
            None => 0,
        };
        if left == 0 {
            self.payload = None;
        }
        match self.rest.from_offset(self.rest.start() + sent) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// The file that came in the first one's place failed as well. `false`: there is nothing left to
    /// try.
    pub(super) fn go_past_the_disk(&mut self) -> bool {
        if self.way == Way::PastDisk {
            return false;
        }
        let Some(source) = self.delivery.rescue(Way::PastDisk) else {
            return false;
        };
        self.source = source;
        self.way = Way::PastDisk;
        self.payload = None;
        true
    }
}
