//! The checksums that are stored with objects, and told to whoever asks for them.
//!
//! As S3 has it: an upload brings a checksum of its own choice, which is compared and kept; without one S3 computes CRC64NVME.
//! An object uploaded in parts has one of the full object (CRC64NVME always; CRC32 and CRC32C if asked for), or a composite
//! one: the checksum over the parts' checksums, with the number of parts behind it. Reads tell it with
//! `x-amz-checksum-mode: ENABLED`, but not for ranges.
//!
//! A checksum that the client sends behind the body (as a trailer) is computed and kept, but not compared.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, header::InvalidHeaderValue};

use crate::object::{Checksum, ChecksumAlgorithm, ChecksumHasher};

const MODE: HeaderName = HeaderName::from_static("x-amz-checksum-mode");
const TYPE: HeaderName = HeaderName::from_static("x-amz-checksum-type");

/// A checksum as it is stored with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredChecksum {
    algorithm: ChecksumAlgorithm,
    value: String,
    composite: bool,
}

impl StoredChecksum {
    /// Of the full object.
    pub(super) fn full(checksum: &Checksum) -> Self {
        Self {
            algorithm: checksum.algorithm(),
            value: checksum.to_base64(),
            composite: false,
        }
    }

    /// Out of the parts' checksums.
    pub(super) fn composite<'a>(
        algorithm: ChecksumAlgorithm,
        parts: impl ExactSizeIterator<Item = &'a Checksum>,
    ) -> Self {
        let count = parts.len();
        let mut hasher = ChecksumHasher::new(algorithm);
        parts.for_each(|part| hasher.update(part.value()));
        Self {
            algorithm,
            value: format!("{}-{count}", hasher.finish().to_base64()),
            composite: true,
        }
    }

    /// Adds what a response says of it.
    pub(super) fn write(&self, fields: &mut HeaderMap) -> Result<(), InvalidHeaderValue> {
        let name = HeaderName::from_static(self.algorithm.field());
        fields.insert(name, HeaderValue::from_str(&self.value)?);
        let kind = if self.composite {
            "COMPOSITE"
        } else {
            "FULL_OBJECT"
        };
        fields.insert(TYPE, HeaderValue::from_static(kind));
        Ok(())
    }
}

/// Whether a read asks for it.
pub(super) fn is_asked_for(fields: &HeaderMap) -> bool {
    fields
        .get(MODE)
        .is_some_and(|mode| mode.as_bytes().eq_ignore_ascii_case(b"ENABLED"))
}

/// What an upload says of its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) algorithm: ChecksumAlgorithm,
    /// Its bytes, where they came with the head; empty where they are no base64.
    value: Option<Vec<u8>>,
    /// Whether those of the parts are put together, for an upload in parts.
    pub(super) composite: bool,
}

impl Announced {
    /// From the request's fields.
    pub(super) fn of(fields: &HeaderMap) -> Self {
        let text = |name: &str| fields.get(name).and_then(|value| value.to_str().ok());
        let all = ChecksumAlgorithm::ALL;
        let with_value = all.into_iter().find_map(|algorithm| {
            let value = text(algorithm.field())?;
            Some((algorithm, BASE64_STANDARD.decode(value).unwrap_or_default()))
        });
        let named = || {
            let trailer = text("x-amz-trailer");
            let name =
                text("x-amz-checksum-algorithm").or_else(|| text("x-amz-sdk-checksum-algorithm"));
            all.into_iter().find(|algorithm| {
                trailer.is_some_and(|field| field.eq_ignore_ascii_case(algorithm.field()))
                    || name.is_some_and(|name| name.eq_ignore_ascii_case(algorithm.name()))
            })
        };
        let (algorithm, value) = match with_value {
            Some((algorithm, value)) => (algorithm, Some(value)),
            None => (named().unwrap_or(ChecksumAlgorithm::Crc64Nvme), None),
        };
        let full = match algorithm {
            ChecksumAlgorithm::Crc64Nvme => true,
            ChecksumAlgorithm::Crc32c | ChecksumAlgorithm::Crc32 => {
                text("x-amz-checksum-type").is_some_and(|kind| kind == "FULL_OBJECT")
            }
            ChecksumAlgorithm::Sha256 | ChecksumAlgorithm::Sha1 => false,
        };
        Self {
            algorithm,
            value,
            composite: !full,
        }
    }

    /// Whether the upload has the checksum it came with.
    pub(super) fn fits(&self, checksum: &Checksum) -> bool {
        self.value
            .as_deref()
            .is_none_or(|value| value == checksum.value())
    }
}
