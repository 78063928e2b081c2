//! Response bodies: parts in order, pulled from a [`ChunkSource`] as the client takes them.
//!
//! A [`ResponseBody`] knows its length from the start, and is exactly that long or fails: a source
//! that yields too much, nothing, or an error ends in an error from `poll_frame`, at which hyper
//! cuts the connection (P3).
//!
//! hyper drops a body as soon as it has handed over its last chunk, long before the client has the
//! bytes. So what a response really sent is counted by its chunks, and a [`BodyObserver`] hears of
//! the end when the last of body and chunks is gone: once, with the bytes that reached the socket
//! and the reason if some did not.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use super::io::{SendQueue, to_usize};
use crate::disk::FileExtent;
use crate::payload::{BodyError, ChunkSource, Payload, Rescue, Way};
use crate::semantics::ByteRange;

/// A piece of a response's body.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed: what bodies are made of")]
pub enum Part {
    /// These bytes: a multipart delimiter.
    Bytes(Bytes),
    /// The revision's bytes of this range.
    Range(ByteRange),
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Range(range) => range.len(),
        }
    }
}

/// Hears how a body ended. Called from wherever its last piece is dropped, so it must not block.
pub trait BodyObserver: Send + Sync + 'static {
    /// Called exactly once.
    fn on_end(&mut self, end: BodyEnd);
}

/// How a body ended.
#[derive(Debug)]
pub struct BodyEnd {
    /// The body's length as promised in the head.
    pub promised: u64,
    /// Bytes the socket took from files: by sendfile, or as a copy where an extent was short.
    pub from_files: u64,
    /// Bytes the socket took from memory.
    pub from_memory: u64,
    /// How often a file failed while it was sent, and its bytes were brought from elsewhere.
    pub rescues: u64,
    /// Why the rest was not sent. `None`: the socket took all of it.
    pub abort: Option<Abort>,
}

/// Why a body was cut short.
#[derive(Debug)]
pub struct Abort {
    /// A word for the metric `aborted{reason}`: the source's, a [`Cut`](super::io::Cut)'s label, or
    /// `client_gone`.
    pub reason: &'static str,
    /// The source's error, if that was it.
    pub error: Option<BodyError>,
}

/// What a body and its chunks share: alive until the last of them is gone.
pub(super) struct Delivery<O: BodyObserver + ?Sized> {
    queue: SendQueue,
    promised: u64,
    from_files: AtomicU64,
    from_memory: AtomicU64,
    /// Bytes that went out from memory in the place of a file's.
    replaced: AtomicU64,
    rescues: AtomicU64,
    rescue: Option<Arc<dyn Rescue>>,
    failure: Mutex<Option<BodyError>>,
    observer: O,
}

impl<O: BodyObserver> Delivery<O> {
    fn new(
        queue: SendQueue,
        promised: u64,
        rescue: Option<Arc<dyn Rescue>>,
        observer: O,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue,
            promised,
            from_files: AtomicU64::new(0),
            from_memory: AtomicU64::new(0),
            replaced: AtomicU64::new(0),
            rescues: AtomicU64::new(0),
            rescue,
            failure: Mutex::new(None),
            observer,
        })
    }
}

impl<O: BodyObserver + ?Sized> Delivery<O> {
    /// Where to have bytes from that a file did not give up; `None`: nowhere.
    pub(super) fn rescue(&self, way: Way) -> Option<Box<dyn ChunkSource>> {
        let rescue = Arc::clone(self.rescue.as_ref()?);
        self.rescues.fetch_add(1, Ordering::Relaxed);
        Some(rescue.source(way))
    }

    /// The next `sent` bytes that a file chunk is told of went out from memory.
    pub(super) fn replaced(&self, sent: u64) {
        self.replaced.fetch_add(sent, Ordering::Relaxed);
    }

    /// Why the body cannot be continued. The first error stands.
    pub(super) fn fail(&self, error: BodyError) {
        self.failure.lock().get_or_insert(error);
    }
}

impl<O: BodyObserver + ?Sized> Drop for Delivery<O> {
    fn drop(&mut self) {
        let replaced = *self.replaced.get_mut();
        let from_files = self.from_files.get_mut().saturating_sub(replaced);
        let from_memory = *self.from_memory.get_mut() + replaced;
        let abort = match self.failure.get_mut().take() {
            Some(error) => Some(Abort {
                reason: error.reason,
                error: Some(error),
            }),
            None if from_files + from_memory < self.promised => {
                let reason = self
                    .queue
                    .cut()
                    .map_or("client_gone", super::io::Cut::label);
                Some(Abort {
                    reason,
                    error: None,
                })
            }
            None => None,
        };
        let promised = self.promised;
        self.observer.on_end(BodyEnd {
            promised,
            from_files,
            from_memory,
            rescues: *self.rescues.get_mut(),
            abort,
        });
    }
}

/// The body of a response.
///
/// For a response without content (304, or any answer to HEAD) use [`ResponseBody::empty`]: hyper
/// drops the body of such an answer unsent, which an observer would hear as an abort.
#[must_use]
pub struct ResponseBody {
    /// Bytes not handed to hyper yet.
    left: u64,
    content: Content,
}

enum Content {
    Memory(Bytes),
    Parts {
        /// The front is what is sent next, shortened as it goes.
        parts: VecDeque<Part>,
        source: Box<dyn ChunkSource>,
        delivery: Arc<Delivery<dyn BodyObserver>>,
    },
}

impl ResponseBody {
    /// No bytes.
    pub fn empty() -> Self {
        Self::bytes(Bytes::new())
    }

    /// These bytes, unobserved: problem documents, the admin listener's answers.
    pub fn bytes(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            left: bytes.len() as u64,
            content: Content::Memory(bytes),
        }
    }

    /// One range of the source, or several with delimiters between them (RFC 9110 §14.6).
    ///
    /// `queue` is that of the connection the response goes to:
    /// [`ConnInfo::queue`](super::accept::ConnInfo::queue).
    pub fn new(
        parts: impl Into<VecDeque<Part>>,
        source: Box<dyn ChunkSource>,
        queue: SendQueue,
        observer: impl BodyObserver,
    ) -> Self {
        let parts = parts.into();
        let promised = parts.iter().map(Part::len).sum();
        let delivery = Delivery::new(queue, promised, source.rescue(), observer);
        Self {
            left: promised,
            content: Content::Parts {
                parts,
                source,
                delivery,
            },
        }
    }
}

/// What is sent next, taken off the front of `parts`, and where in the revision it begins (a
/// delimiter: nowhere). Not called when nothing is left.
fn poll_payload(
    parts: &mut VecDeque<Part>,
    source: &mut dyn ChunkSource,
    cx: &mut Context<'_>,
) -> Poll<Result<(Payload, u64), BodyError>> {
    let range = loop {
        match parts.front_mut() {
            Some(Part::Range(range)) => break range,
            Some(Part::Bytes(bytes)) => {
                let bytes = std::mem::take(bytes);
                parts.pop_front();
                if !bytes.is_empty() {
                    return Poll::Ready(Ok((Payload::Memory(bytes), 0)));
                }
            }
            None => unreachable!("the parts are as long as what is left"),
        }
    };
    let start = range.start();
    let payload = ready!(poll_checked(source, cx, *range))?;
    match range.from_offset(start + payload.len()) {
        Some(rest) => *range = rest,
        None => drop(parts.pop_front()),
    }
    Poll::Ready(Ok((payload, start)))
}

/// A source's next chunk, held to its contract: hyper counts on the length.
pub(super) fn poll_checked(
    source: &mut dyn ChunkSource,
    cx: &mut Context<'_>,
    range: ByteRange,
) -> Poll<Result<Payload, BodyError>> {
    let payload = ready!(source.poll_chunk(cx, range))?;
    if payload.len() == 0 || payload.len() > range.len() {
        let found = format!("{} bytes for a range of {}", payload.len(), range.len());
        return Poll::Ready(Err(BodyError::new("wrong_chunk", found)));
    }
    Poll::Ready(Ok(payload))
}

impl Body for ResponseBody {
    type Data = Chunk;
    type Error = Aborted;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Chunk>, Aborted>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let chunk = Chunk(match &mut this.content {
            Content::Memory(bytes) => Piece::Memory {
                bytes: std::mem::take(bytes),
                delivery: None,
            },
            Content::Parts {
                parts,
                source,
                delivery,
            } => match ready!(poll_payload(parts, source.as_mut(), cx)) {
                Ok((Payload::File(extent), start)) => Piece::File {
                    extent,
                    start,
                    delivery: Arc::clone(delivery),
                },
                Ok((Payload::Memory(bytes), _)) => Piece::Memory {
                    bytes,
                    delivery: Some(Arc::clone(delivery)),
                },
                Err(error) => {
                    let aborted = Aborted {
                        reason: error.reason,
                    };
                    delivery.fail(error);
                    return Poll::Ready(Some(Err(aborted)));
                }
            },
        });
        this.left -= chunk.remaining() as u64;
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// What hyper is told when a body fails; the observer has the cause.
#[derive(Debug, thiserror::Error)]
#[error("the response was cut short ({reason})")]
pub struct Aborted {
    reason: &'static str,
}

/// A piece of a body on its way through hyper: memory, or a file extent that only
/// [`SendfileIo`](super::io::SendfileIo) can send.
pub struct Chunk(Piece);

impl Chunk {
    /// A whole body: an extent, the bytes of its revision from `start` on.
    pub(super) fn whole_body(
        extent: FileExtent,
        start: u64,
        queue: SendQueue,
        rescue: Arc<dyn Rescue>,
        observer: impl BodyObserver,
    ) -> Self {
        let delivery = Delivery::new(queue, extent.len(), Some(rescue), observer);
        Self(Piece::File {
            extent,
            start,
            delivery,
        })
    }
}

impl Chunk {
    /// What it is of a file.
    pub(super) fn extent(&self) -> Option<&FileExtent> {
        match &self.0 {
            Piece::Memory { .. } => None,
            Piece::File { extent, .. } => Some(extent),
        }
    }
}

enum Piece {
    Memory {
        bytes: Bytes,
        delivery: Option<Arc<Delivery<dyn BodyObserver>>>,
    },
    File {
        extent: FileExtent,
        /// Where in the revision the extent's bytes begin.
        start: u64,
        delivery: Arc<Delivery<dyn BodyObserver>>,
    },
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        match &self.0 {
            Piece::Memory { bytes, .. } => bytes.len(),
            Piece::File { extent, .. } => to_usize(extent.len()),
        }
    }

    /// # Panics
    /// For a file extent, whose bytes are not in memory. An empty slice would be worse: whoever
    /// copies a body by `chunk` would take it for the end and send the next response's head in its
    /// place.
    fn chunk(&self) -> &[u8] {
        match &self.0 {
            Piece::Memory { bytes, .. } => bytes,
            Piece::File { extent, .. } => panic!(
                "{} bytes of a file were asked for in memory: hyper did not use vectored writes",
                extent.len()
            ),
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let Some(slot) = slices.first_mut() else {
            return 0;
        };
        *slot = match &self.0 {
            Piece::Memory { bytes, .. } => IoSlice::new(bytes),
            Piece::File {
                extent,
                start,
                delivery,
            } => delivery.queue.offer(extent, *start, delivery),
        };
        1
    }

    fn advance(&mut self, sent: usize) {
        match &mut self.0 {
            Piece::Memory { bytes, delivery } => {
                bytes.advance(sent);
                if let Some(delivery) = delivery {
                    delivery
                        .from_memory
                        .fetch_add(sent as u64, Ordering::Relaxed);
                }
            }
            Piece::File {
                extent,
                start,
                delivery,
            } => {
                extent.advance(sent as u64);
                *start += sent as u64;
                delivery
                    .from_files
                    .fetch_add(sent as u64, Ordering::Relaxed);
            }
        }
    }
}
