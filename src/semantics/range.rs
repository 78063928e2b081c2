//! Byte ranges (RFC 9110 §14). (skeleton)
use std::num::NonZeroU64;

/// One range as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §14.1.2")]
pub enum RangeSpec {
    /// `first-last`, both inclusive; `first <= last`.
    Closed {
        /// First byte.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// `first-`
    From(u64),
    /// `-length`
    Suffix(u64),
}

/// A satisfiable stretch of a representation: at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: NonZeroU64,
}
