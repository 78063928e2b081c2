//! The remote: where revisions come from.
//!
//! [`Remote`] is small on purpose. [`Remote::read`] is always guarded: it names a revision and either
//! yields that revision's bytes or an error, never another's. [`Remote::read_current`] is the one read
//! that labels itself: its bytes belong to the validator that came in the same response (P2).
//! [`s3`] is the driver and the only user of the AWS SDK; [`memory`] is the reference that the
//! conformance suite ([`conformance`]) was first written against; [`fault`] wraps any driver and
//! makes it fail on request.
//!
//! A driver checks a response before a byte of it is handed on: status, validator, the range asked for, the
//! complete length where it is known. What does not fit is [`RemoteErrorKind::Protocol`].

pub mod conformance;
pub mod fault;
pub mod memory;
pub mod s3;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::object::{Checksum, Representation, Validator};
use crate::semantics::{ByteRange, RangeSpec};

tokio::task_local! {
    /// The W3C `traceparent` of the request on whose behalf this task calls a remote; drivers that can
    /// pass it on. A fill carries that of the request that started it.
    pub static TRACEPARENT: Option<Box<str>>;
}

/// Names one revision for a guarded read.
#[derive(Clone, Debug)]
pub struct Guard {
    /// The full key.
    pub key: Arc<str>,
    /// What `If-Match` says.
    pub validator: Validator,
    /// Where the bucket has versions and we know it: asked for by id, so that an overwrite does not
    /// break the read. `If-Match` is sent all the same.
    pub version_id: Option<Arc<str>>,
    /// The complete length, once known; a response that says otherwise is a protocol error.
    pub size: Option<u64>,
}

impl Guard {
    /// Refuses an answer to `op` that speaks of an object of `said` bytes where another length is known.
    ///
    /// # Errors
    /// [`RemoteError::two_lengths`].
    pub fn check_size(&self, op: &'static str, said: u64) -> Result<(), RemoteError> {
        check_length(op, &self.validator, self.size, said)
    }
}

/// Refuses an object of `said` bytes under a validator that is `known` to name one of another length.
///
/// # Errors
/// [`RemoteError::two_lengths`].
pub fn check_length(
    op: &'static str,
    validator: &Validator,
    known: Option<u64>,
    said: u64,
) -> Result<(), RemoteError> {
    match known {
        Some(known) if known != said => Err(RemoteError::two_lengths(op, validator, known, said)),
        Some(_) | None => Ok(()),
    }
}

/// A range read under way: the response's head has been checked, the body has not been read.
pub struct RemoteRead {
    /// What the response said of the revision. For a guarded read its validator is the guard's.
    pub representation: Representation,
    /// What the body holds: the asked-for range clamped to the object. `None`: the object is empty.
    pub range: Option<ByteRange>,
    /// Exactly `range`'s bytes in frames of the driver's size, or an error. A body that ends short
    /// or runs long yields an error, never a clean end. Dropping it abandons the connection.
    ///
    /// A frame may be empty: more can be had without waiting, and whoever is to take it may be another one than who waits
    /// for it, on a thread that may block as well.
    pub body: BoxStream<'static, Result<Bytes, RemoteError>>,
}

impl fmt::Debug for RemoteRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteRead")
            .field("representation", &self.representation)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

/// What a self-labelling read found.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: the two answers a conditional read can have"
)]
pub enum Current {
    /// The object is (still) at the validator that was sent along.
    NotModified {
        /// `Last-Modified` of the 304, where it had one.
        last_modified: Option<std::time::SystemTime>,
    },
    /// The object's current revision, with bytes of it.
    Read(RemoteRead),
}

/// A source of revisions: bucket driver or test double.
///
/// Futures are cancelled by dropping them; nothing is left behind. No method retries: the caller
/// owns the budget. (A guard whose version id is refused may be tried once without it: see [`s3`].)
///
/// A key of no bytes, or of more than S3's 1024, is [`RemoteErrorKind::Absent`]; a suffix of no
/// bytes is [`RemoteErrorKind::Unsatisfiable`]. What else a driver must do, [`conformance`] checks.
pub trait Remote: Send + Sync + 'static {
    /// The store's identity for [`crate::object::ObjectKey`]: endpoint and bucket, no credential.
    fn store(&self) -> &Arc<str>;

    /// Metadata of the current revision (HEAD). With `pin`: of that revision, or
    /// [`RemoteErrorKind::Mismatch`]. Never a label for bytes (P2).
    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>>;

    /// Bytes of the guarded revision. `want` may reach beyond the end of the object; the response is clamped.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Mismatch`] when the object is at another revision,
    /// [`RemoteErrorKind::Unsatisfiable`] when `want` starts beyond its end, else as [`RemoteErrorKind`] says.
    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>>;

    /// The checksums of the whole object that the remote has stored with the guarded revision; often one, none for objects
    /// uploaded in parts with checksums of the parts only. One guarded HEAD, and never a label for bytes (P2).
    ///
    /// # Errors
    /// As [`Remote::read`], but for the range.
    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<Checksum>, RemoteError>>;

    /// Bytes of whatever is current, labelled by the same response. `want` `None`: the whole object,
    /// for objects known to be small or empty. `unless`: answer [`Current::NotModified`] when the object
    /// is at this validator (`If-None-Match`).
    fn read_current<'a>(
        &'a self,
        key: &'a str,
        want: Option<RangeSpec>,
        unless: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Current, RemoteError>>;
}

/// Whose fault a [`RemoteError`] is, for the log and the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "closed: a metric label")]
pub enum Fault {
    /// The request as it was made: it names something that is not there.
    Request,
    /// The remote or the network.
    Remote,
    /// Our configuration or credentials.
    Ours,
}

/// What went wrong between us and the remote. A closed set: each has exactly one answer in
/// `tiers::settle` and a metric label.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: every kind must be given an answer"
)]
pub enum RemoteErrorKind {
    /// The guard failed: the object is at another revision.
    Mismatch,
    /// There is no such object.
    Absent,
    /// The range starts beyond the end of the object, whose complete length this is where the response said it.
    Unsatisfiable {
        /// Complete length in bytes.
        size: Option<u64>,
    },
    /// The remote denied us (403).
    Forbidden,
    /// The object is there and cannot be read: its storage class is an archive's, and it has not been restored.
    Archived,
    /// Not the object but the bucket is missing, or the region or credentials are wrong.
    Misconfigured,
    /// 503 `SlowDown` or 429.
    Throttled {
        /// What `Retry-After` said.
        retry_after: Option<Duration>,
    },
    /// Could not connect, connection reset, 5xx, body cut short.
    Unavailable,
    /// Connect, first-byte or stall timeout.
    Timeout,
    /// The response lies: wrong range, wrong validator, 200 for a range, wrong length.
    Protocol,
}

impl RemoteErrorKind {
    /// Whether the same request may succeed if it is made again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Throttled { .. } | Self::Unavailable | Self::Timeout => true,
            Self::Mismatch
            | Self::Absent
            | Self::Unsatisfiable { .. }
            | Self::Forbidden
            | Self::Archived
            | Self::Misconfigured
            | Self::Protocol => false,
        }
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Mismatch | Self::Absent | Self::Unsatisfiable { .. } => Fault::Request,
            Self::Throttled { .. } | Self::Unavailable | Self::Timeout | Self::Protocol => {
                Fault::Remote
            }
            Self::Forbidden | Self::Archived | Self::Misconfigured => Fault::Ours,
        }
    }

    /// A word for metrics and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Mismatch => "mismatch",
            Self::Absent => "absent",
            Self::Unsatisfiable { .. } => "unsatisfiable",
            Self::Forbidden => "forbidden",
            Self::Archived => "archived",
            Self::Misconfigured => "misconfigured",
            Self::Throttled { .. } => "throttled",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Protocol => "protocol",
        }
    }
}

/// A failed call to a remote. `Display` is one level; the chain is in `source()`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op} failed: {detail}")]
pub struct RemoteError {
    /// What it means.
    pub kind: RemoteErrorKind,
    /// Which call.
    pub op: &'static str,
    /// One sentence for the operator. No credential, no signature.
    pub detail: String,
    /// The driver's error.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl RemoteError {
    /// An error without a cause below it.
    pub fn new(kind: RemoteErrorKind, op: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind,
            op,
            detail: detail.into(),
            source: None,
        }
    }

    /// One validator names objects of two lengths: it is `known` for one, and `said` is the other. Whose bytes they are
    /// cannot be told.
    pub fn two_lengths(op: &'static str, validator: &Validator, known: u64, said: u64) -> Self {
        let detail = format!(
            "S3 says that {validator:?} has {said} bytes, and said {known} before: one ETag for two objects; \
             upload the object again, or purge the key to forget what is held of it"
        );
        Self::new(RemoteErrorKind::Protocol, op, detail)
    }

    /// The same error with what the driver said below it. That goes to the log: no credential.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }
}
