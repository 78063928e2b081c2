//! Preconditions (RFC 9110 §13). (skeleton)
use std::time::SystemTime;

use super::{ByteRange, EntityTag, EntityTagList, RangeSpec};

/// The methods that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: other methods are refused before")]
pub enum Method {
    /// GET
    Get,
    /// HEAD
    Head,
}

/// `If-Range`
#[derive(Clone)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §13.1.5")]
pub enum IfRange {
    /// A tag.
    Tag(EntityTag),
    /// An exact date.
    Date(SystemTime),
}

/// The part of a request that decides what is answered. Fields are already parsed.
#[derive(Clone)]
pub struct RequestHead {
    /// GET or HEAD.
    pub method: Method,
    /// `If-Match`
    pub if_match: Option<EntityTagList>,
    /// `If-None-Match`
    pub if_none_match: Option<EntityTagList>,
    /// `If-Modified-Since`
    pub if_modified_since: Option<SystemTime>,
    /// `If-Unmodified-Since`
    pub if_unmodified_since: Option<SystemTime>,
    /// `If-Range`
    pub if_range: Option<IfRange>,
    /// `Range`, where it is a valid `bytes` range set; not empty.
    pub range: Option<Vec<RangeSpec>>,
}

/// What is asked about.
#[derive(Clone)]
pub struct RepresentationMetadata {
    /// Strong.
    pub etag: EntityTag,
    /// Whole seconds.
    pub last_modified: Option<SystemTime>,
    /// Complete length.
    pub size: u64,
}

/// What the answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: each has exactly one status")]
pub enum Verdict {
    /// Everything: 200.
    Full,
    /// One or many ranges, sorted as asked and coalesced: 206.
    Partial(Vec<ByteRange>),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
    /// 416.
    Unsatisfiable,
}

/// Total and pure: preconditions in the order of RFC 9110 §13.2.2, then `Range`.
pub fn evaluate(_request: &RequestHead, _representation: &RepresentationMetadata) -> Verdict {
    todo!()
}
