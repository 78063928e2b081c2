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

impl RangeSpec {
    /// Applies the spec to a representation of `size` bytes, clamping (RFC 9110 §14.1.2). `None`: unsatisfiable.
    pub fn resolve(self, size: u64) -> Option<ByteRange> {
        match self {
            Self::Closed { first, last } => ByteRange::from_bounds(first, last.saturating_add(1).min(size)),
            Self::From(first) => ByteRange::from_bounds(first, size),
            Self::Suffix(length) => ByteRange::from_bounds(size.saturating_sub(length), size),
        }
    }
}

impl ByteRange {
    /// `start..end`, where that holds at least one byte. Within the crate: outside it only [`RangeSpec::resolve`] mints.
    pub(crate) fn from_bounds(start: u64, end: u64) -> Option<Self> {
        NonZeroU64::new(end.checked_sub(start)?).map(|len| Self { start, len })
    }
    /// Every byte of a representation of `size` bytes.
    pub fn whole(size: u64) -> Option<Self> {
        Self::from_bounds(0, size)
    }
    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }
    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.len.get()
    }
    /// Last byte, inclusive, as HTTP writes it.
    pub fn last(self) -> u64 {
        self.end() - 1
    }
    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty by construction")]
    pub fn len(self) -> u64 {
        self.len.get()
    }
    /// The overlap of two ranges.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.start.max(other.start), self.end().min(other.end()))
    }
    /// The part of it from `offset` on.
    pub fn from_offset(self, offset: u64) -> Option<Self> {
        Self::from_bounds(self.start.max(offset), self.end())
    }
    /// At most its first `len` bytes.
    #[must_use]
    pub fn take(self, len: NonZeroU64) -> Self {
        Self { start: self.start, len: self.len.min(len) }
    }
    /// Grown to multiples of `block` on both sides, the end not beyond `size`.
    #[must_use]
    pub fn align_outward(self, block: NonZeroU64, size: u64) -> Self {
        let start = self.start - self.start % block;
        let end = self.end().next_multiple_of(block.get()).min(size).max(self.end());
        Self { start, len: NonZeroU64::new(end - start).unwrap_or(self.len) }
    }
    /// The closed form to ask a remote for.
    pub fn spec(self) -> RangeSpec {
        RangeSpec::Closed { first: self.start, last: self.last() }
    }
}
