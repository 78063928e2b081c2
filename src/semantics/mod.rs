//! RFC 9110 as pure functions: entity tags, ranges and preconditions.
//!
//! Nothing in here does I/O, knows S3 or names a status code. [`etag`] and [`range`] turn field
//! values into types that cannot be misused; [`precondition::evaluate`] takes a request and the
//! metadata of a representation and says, totally, what the answer is.

pub mod etag;
pub mod precondition;
pub mod range;

pub use etag::{EntityTag, EntityTagList};
pub use precondition::{RepresentationMetadata, RequestHead, Verdict, evaluate};
pub use range::{ByteRange, RangeSpec};
