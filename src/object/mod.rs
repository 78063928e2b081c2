//! What is served: keys, validators, revisions and representations.
//!
//! A [`Validator`] is the remote's opaque name for one revision's bytes. An [`EntityTag`] is the
//! client's. They are different types on purpose, and this is the only module that turns one into
//! the other (ADR 4): an S3 validator reaches a client only through [`Validator::entity_tag`], and
//! a pin becomes a guard only through [`Validator::from_pin`].

mod checksum;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{ETAG, HeaderName, HeaderValue, LAST_MODIFIED};
use smallvec::SmallVec;

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
        match value.as_bytes() {
            [b'"', inner @ .., b'"'] if inner.iter().all(|b| matches!(b, 0x21 | 0x23..=0x7e)) => {
                Ok(Self(value.into()))
            }
            _ => Err(InvalidValidator(value.to_owned())),
        }
    }

    /// The revision a pin asks for. `None` for a weak tag, which names no bytes, and for one that
    /// no remote can have sent (see [`Validator::from_etag_field`]).
    pub fn from_pin(tag: EntityTag<'_>) -> Option<Self> {
        if tag.is_weak() {
            return None;
        }
        let mut field = SmallVec::<[u8; 64]>::new();
        field.push(b'"');
        field.extend_from_slice(tag.opaque());
        field.push(b'"');
        Self::from_etag_field(std::str::from_utf8(&field).ok()?).ok()
    }

    /// The strong entity tag that clients see.
    pub fn entity_tag(&self) -> EntityTag<'_> {
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

/// What every answer says of a representation: `ETag`, `Last-Modified` and what is passed through, ready to be sent. Cheap to
/// clone.
pub type Fields = Arc<[(HeaderName, HeaderValue)]>;

/// From 1970 to the end of what an HTTP date can say.
const YEAR_9999: Duration = Duration::from_hours(70_380_768);

impl Representation {
    /// What preconditions and ranges are evaluated against.
    pub fn metadata(&self) -> RepresentationMetadata<'_> {
        RepresentationMetadata {
            etag: self.validator.entity_tag(),
            last_modified: self.last_modified,
            size: self.size,
        }
    }

    /// Its header fields. What a remote sent that cannot stand in one is left out.
    ///
    /// # Panics
    /// Never: validators and dates are visible ASCII.
    pub fn fields(&self) -> Fields {
        let text = |value: &str| HeaderValue::from_str(value).expect("visible ASCII");
        let etag = (ETAG, text(self.validator.as_field_value()));
        // httpdate panics outside the years it can write; a remote may send anything.
        let modified = self.last_modified.filter(|date| {
            date.duration_since(UNIX_EPOCH)
                .is_ok_and(|since| since < YEAR_9999)
        });
        let modified = modified.map(|date| (LAST_MODIFIED, text(&httpdate::fmt_http_date(date))));
        let passed_through = self.headers.iter().filter_map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
            Some((name, HeaderValue::from_bytes(value.as_bytes()).ok()?))
        });
        [etag]
            .into_iter()
            .chain(modified)
            .chain(passed_through)
            .collect()
    }
}
