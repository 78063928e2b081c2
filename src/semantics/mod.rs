//! RFC 9110 as pure functions: entity tags, ranges and preconditions.
//!
//! Nothing in here does I/O, reads a clock, knows S3 or names a status code. [`etag`] and [`range`]
//! turn field values into types that cannot be misused; [`precondition`] gathers them from a
//! request ([`RequestHead::from_headers`]) and says, totally, what the answer is ([`evaluate`]).
//!
//! What a stranger sends falls into three classes, and each parser says which one applies:
//! *refused* (a malformed `If-Match`: a pin is never ignored), *ignored* (a `Range` in an unknown
//! unit or bad syntax, a date that is none), and *a condition that does not hold* (a malformed
//! `If-Range`). The first is an error, the other two lead to an answer that is right, if larger
//! than hoped for.

pub mod etag;
pub mod precondition;
pub mod range;

pub use etag::{EntityTag, EntityTagList, MalformedTag};
pub use precondition::{
    BadRequest, IfRange, Method, RepresentationMetadata, RequestHead, Verdict, evaluate,
};
pub use range::{ByteRange, RangeSet, RangeSpec, Ranges};

/// Optional whitespace (RFC 9110 §5.6.3).
fn is_ows(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// `bytes` without the optional whitespace around it.
fn trim_ows(mut bytes: &[u8]) -> &[u8] {
    while let [first, rest @ ..] = bytes
        && is_ows(*first)
    {
        bytes = rest;
    }
    while let [rest @ .., last] = bytes
        && is_ows(*last)
    {
        bytes = rest;
    }
    bytes
}
