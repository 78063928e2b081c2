//! What a response's payload is made of, between the tiers that find bytes and the server that
//! sends them.
//!
//! The tiers' reader implements [`ChunkSource`]; the server pulls from it, one chunk at a time and
//! only as fast as the client takes them. A chunk is either a stretch of a file, which reaches the
//! socket by sendfile without passing through user space, or bytes in memory, for responses that go
//! past the disk. Neither side has to know the other.
//!
//! A file can fail while it is being sent, long after the source that named it is gone. So a source
//! leaves a [`Rescue`] behind: whoever sends asks it for the same bytes again (P10).

use std::error::Error;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use crate::disk::FileExtent;
use crate::semantics::ByteRange;

/// Where a response's payload comes from.
///
/// Dropping it abandons whatever it waits for; the response is over then.
pub trait ChunkSource: Send {
    /// The next chunk: the first bytes of `range`, at least one and at most `range.len()`.
    ///
    /// The caller asks again with what is left of the range, so ranges come in the order of the
    /// response and without gaps within one of them. Not called again after an error.
    ///
    /// # Errors
    /// [`BodyError`] when the bytes cannot be had any more. The connection is cut (P3).
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        range: ByteRange,
    ) -> Poll<Result<Payload, BodyError>>;

    /// What to turn to when a file that this source named cannot be read to its end. `None`: the
    /// response is cut then. Asked for once, before the first chunk.
    fn rescue(&self) -> Option<Arc<dyn Rescue>> {
        None
    }
}

/// Brings bytes of a revision again that a file did not give up. It outlives the source it came from,
/// and holds nothing but the means: no descriptor, no fill, no buffer.
pub trait Rescue: Send + Sync {
    /// A fresh source, of which any stretch of the same revision may be asked.
    fn source(self: Arc<Self>, way: Way) -> Box<dyn ChunkSource>;
}

/// Where a [`Rescue`] looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: with the disk or without it"
)]
pub enum Way {
    /// Through the disk once more: the file that failed has been reported, so its bytes are fetched
    /// into another one.
    Again,
    /// Past the disk: it hangs, or another of its files failed too.
    PastDisk,
}

/// Some bytes of a revision.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed: the two ways to a socket")]
pub enum Payload {
    /// A stretch of a segment file.
    File(FileExtent),
    /// Bytes in memory.
    Memory(Bytes),
}

impl Payload {
    /// Bytes in it.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty payload is an error, not a case"
    )]
    pub fn len(&self) -> u64 {
        match self {
            Self::File(extent) => extent.len(),
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }
}

/// Why a payload cannot be continued. `Display` is one level; the chain is in `source()`.
#[derive(Debug, thiserror::Error)]
#[error("the payload cannot be continued ({reason})")]
pub struct BodyError {
    /// A word from a small fixed set, for the metric `aborted{reason}`.
    pub reason: &'static str,
    /// What happened.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl BodyError {
    /// An error with its cause.
    pub fn new(reason: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            reason,
            source: source.into(),
        }
    }
}
