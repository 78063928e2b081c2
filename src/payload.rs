//! placeholder
use std::task::{Context, Poll};
use bytes::Bytes;
use crate::disk::FileExtent;
use crate::semantics::ByteRange;

/// What a source hands over.
pub enum Payload { File(FileExtent), Memory(Bytes) }

/// Why.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct BodyError { pub reason: &'static str, #[source] pub source: Box<dyn std::error::Error + Send + Sync> }

pub trait ChunkSource: Send {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, range: ByteRange) -> Poll<Result<Payload, BodyError>>;
}
