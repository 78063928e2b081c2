//! What is served: keys, validators, revisions and representations.
//!
//! A [`Validator`] is the remote's opaque name for one revision's bytes. An [`EntityTag`] is the
//! client's. They are different types on purpose, and this is the only module that turns one into
//! the other (ADR 4): an S3 validator reaches a client only through [`Validator::entity_tag`], and
//! a pin becomes a guard only through [`Validator::from_pin`].

mod checksum;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

pub use checksum::{Checksum, ChecksumAlgorithm, ChecksumHasher, Combined, InvalidChecksum};

use crate::semantics::{EntityTag, RepresentationMetadata};

/// Names an object for ever: which store it lives in, and its full key there.
///
/// `store` is the identity of endpoint and bucket, so that a mount that is pointed at another bucket never finds
/// bytes of the old one, and two mounts of one bucket share what is held. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    store: Arc<str>,
    key: Arc<str>,
}

impl ObjectKey {
    /// Names the object `key` (the mount's prefix included) of `store`.
    pub fn new(store: impl Into<Arc<str>>, key: impl Into<Arc<str>>) -> Self {
        Self {
            store: store.into(),
            key: key.into(),
        }
    }

    /// The identity of endpoint and bucket.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// The full S3 key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)
    }
}

/// The remote's opaque name for a revision's bytes: for S3 the `ETag` field value, verbatim
/// (quotes included).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Validator(Arc<str>);

/// The remote sent a validator that cannot guard a read: weak, unquoted or with bytes outside
/// RFC 9110 §8.8.3's `etagc`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a strong entity tag")]
pub struct InvalidValidator(pub String);

impl Validator {
    /// Takes the `ETag` field value of a remote's response.
    ///
    /// # Errors
    /// [`InvalidValidator`] unless it is exactly one strong, quoted entity tag of visible ASCII.
    pub fn from_etag_field(value: &str) -> Result<Self, InvalidValidator> {
        let inner = value
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
            .ok_or_else(|| InvalidValidator(value.to_owned()))?;
        if inner
            .bytes()
            .all(|b| b == 0x21 || (0x23..=0x7e).contains(&b))
        {
            Ok(Self(value.into()))
        } else {
            Err(InvalidValidator(value.to_owned()))
        }
    }

    /// The revision a pin asks for. `None` for a weak tag, which names no bytes, and for one that
    /// no remote can have sent (see [`Validator::from_etag_field`]).
    pub fn from_pin(tag: &EntityTag) -> Option<Self> {
        if tag.is_weak() {
            return None;
        }
        let opaque = std::str::from_utf8(tag.opaque()).ok()?;
        Self::from_etag_field(&format!("\"{opaque}\"")).ok()
    }

    /// The strong entity tag that clients see.
    pub fn entity_tag(&self) -> EntityTag {
        EntityTag::strong(&self.0.as_bytes()[1..self.0.len() - 1])
    }

    /// As it stands in the remote's `ETag` and `If-Match` fields.
    pub fn as_field_value(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Validator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key and a validator: names the same bytes for ever.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Revision {
    /// Which object.
    pub key: ObjectKey,
    /// Which of its revisions.
    pub validator: Validator,
}

/// What a remote's response said of one revision, apart from its bytes.
///
/// Everything but `validator` and `size` may change while the bytes stay (a re-upload of equal
/// bytes); the newest is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Representation {
    /// Names the bytes.
    pub validator: Validator,
    /// Complete length in bytes.
    pub size: u64,
    /// S3's `Last-Modified`, whole seconds.
    pub last_modified: Option<SystemTime>,
    /// The bucket's version id for these bytes, where the bucket has versions.
    pub version_id: Option<Arc<str>>,
    /// Fields passed through to clients (lower-case name, value): `content-type`,
    /// `content-encoding`, `content-language`, `content-disposition`, `cache-control`, `expires`,
    /// `x-amz-meta-*`.
    pub headers: Vec<(Box<str>, Box<str>)>,
}

impl Representation {
    /// What preconditions and ranges are evaluated against.
    pub fn metadata(&self) -> RepresentationMetadata {
        RepresentationMetadata {
            etag: self.validator.entity_tag(),
            last_modified: self.last_modified,
            size: self.size,
        }
    }
}
