//! Checksums of the complete representation: which one a response promises, and whether the bytes
//! keep the promise.
//!
//! Only fields that speak of the *whole* object count. `Repr-Digest` (RFC 9530 §3) always does, on
//! a 206 too. S3's `x-amz-checksum-*` speak of the object only where
//! `x-amz-checksum-type` is `FULL_OBJECT`: a composite value (`…-N`) is a checksum of part
//! checksums, and on a 206 whose range happens to be one part it is that part's. Without the type,
//! a plain value counts where the response carries the whole object. `ETag` is never taken for an
//! MD5: for multipart and encrypted objects it is not one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use crc_fast::CrcAlgorithm;
use http::HeaderMap;
use sha2::Digest;
use tokio::sync::watch;

/// How much is read back and hashed at a time: large enough to amortise the call, small enough to stay in L2.
const BLOCK: usize = 256 << 10;

/// The algorithms that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
    Crc64Nvme,
    Crc32c,
    Crc32,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha-256",
            Self::Sha512 => "sha-512",
            Self::Crc64Nvme => "crc64nvme",
            Self::Crc32c => "crc32c",
            Self::Crc32 => "crc32",
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
            Self::Crc64Nvme => 8,
            Self::Crc32c | Self::Crc32 => 4,
        }
    }
}

/// The checksum that the server promised for the complete object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    algorithm: Algorithm,
    value: Vec<u8>,
}

impl Expected {
    /// The strongest checksum of the complete object among a response's fields; of the two SHA-2 the one that
    /// processors have instructions for. `whole`: the response's body is the complete object. A value that
    /// does not decode to the algorithm's length promises nothing and is passed over.
    pub(super) fn from_headers(headers: &HeaderMap, whole: bool) -> Option<Self> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let digests: Vec<&str> = headers
            .get_all("repr-digest")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|list| list.split(','))
            .filter_map(|member| member.split(';').next())
            .map(str::trim)
            .collect();
        let repr = |name: &str| {
            digests.iter().find_map(|member| {
                let (key, value) = member.split_once('=')?;
                let value = value.strip_prefix(':')?.strip_suffix(':')?;
                key.eq_ignore_ascii_case(name).then_some(value)
            })
        };
        let full_object = match text("x-amz-checksum-type") {
            Some(kind) => kind.eq_ignore_ascii_case("FULL_OBJECT"),
            None => whole,
        };
        let amz = |name: &str| full_object.then(|| text(name)).flatten();
        [
            (Algorithm::Sha256, repr("sha-256")),
            (Algorithm::Sha512, repr("sha-512")),
            (Algorithm::Sha256, amz("x-amz-checksum-sha256")),
            (Algorithm::Crc64Nvme, amz("x-amz-checksum-crc64nvme")),
            (Algorithm::Crc32c, amz("x-amz-checksum-crc32c")),
            (Algorithm::Crc32, amz("x-amz-checksum-crc32")),
        ]
        .into_iter()
        .find_map(|(algorithm, value)| {
            let value = BASE64_STANDARD.decode(value?).ok()?;
            (value.len() == algorithm.len()).then_some(Self { algorithm, value })
        })
    }

    /// A hasher that has seen nothing yet.
    pub(super) fn hasher(&self) -> Hasher {
        Hasher {
            expected: self.clone(),
            state: match self.algorithm {
                Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
                Algorithm::Sha512 => State::Sha512(sha2::Sha512::new()),
                Algorithm::Crc64Nvme => crc(CrcAlgorithm::Crc64Nvme),
                Algorithm::Crc32c => crc(CrcAlgorithm::Crc32Iscsi),
                Algorithm::Crc32 => crc(CrcAlgorithm::Crc32IsoHdlc),
            },
        }
    }
}

fn crc(algorithm: CrcAlgorithm) -> State {
    State::Crc(crc_fast::Digest::new(algorithm))
}

enum State {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
    Crc(crc_fast::Digest),
}

/// Takes the object's bytes in order and says in the end whether they are the promised ones.
pub(super) struct Hasher {
    expected: Expected,
    state: State,
}

impl Hasher {
    /// The next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::Sha256(digest) => digest.update(bytes),
            State::Sha512(digest) => digest.update(bytes),
            State::Crc(digest) => digest.update(bytes),
        }
    }

    /// The algorithm's name where the bytes keep the promise.
    ///
    /// # Errors
    /// What was promised and what was found, for the user.
    pub(super) fn finish(self) -> Result<&'static str, String> {
        let name = self.expected.algorithm.name();
        let found = match self.state {
            State::Sha256(digest) => digest.finalize().to_vec(),
            State::Sha512(digest) => digest.finalize().to_vec(),
            // A CRC-32 is the low half of what crc-fast returns; both travel big-endian.
            State::Crc(digest) => {
                digest.finalize().to_be_bytes()[8 - self.expected.algorithm.len()..].to_vec()
            }
        };
        if found == self.expected.value {
            Ok(name)
        } else {
            Err(format!(
                "the server promises {name} {}, the bytes have {}",
                BASE64_STANDARD.encode(&self.expected.value),
                BASE64_STANDARD.encode(&found)
            ))
        }
    }
}

/// Hashes `file` behind the download: up to `ready`, the length of the prefix that is complete, until that
/// is `size`. Reading back what was written (page cache, mostly) rather than what was received checks the
/// positional writes too, and overlaps with the network.
///
/// Dropping the future leaves at most one read of the prefix running, which harms nobody.
///
/// # Errors
/// Reading failed, or `ready` ended before the file was complete.
pub(super) async fn follow(
    expected: Expected,
    file: Arc<File>,
    size: u64,
    mut ready: watch::Receiver<u64>,
) -> io::Result<Result<&'static str, String>> {
    let mut hasher = expected.hasher();
    let mut at = 0;
    while at < size {
        let until = *ready
            .wait_for(|until| *until > at)
            .await
            .map_err(io::Error::other)?;
        let source = Arc::clone(&file);
        hasher = tokio::task::spawn_blocking(move || hash_range(hasher, &source, at, until))
            .await
            .map_err(io::Error::other)??;
        at = until;
    }
    Ok(hasher.finish())
}

fn hash_range(mut hasher: Hasher, file: &File, mut at: u64, until: u64) -> io::Result<Hasher> {
    let mut block = vec![0; BLOCK];
    while at < until {
        let want = usize::try_from(until - at).map_or(BLOCK, |left| left.min(BLOCK));
        file.read_exact_at(&mut block[..want], at)?;
        hasher.update(&block[..want]);
        at += want as u64;
    }
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_str(value).unwrap(),
                )
            })
            .collect()
    }

    fn verdict(fields: &[(&'static str, &str)], whole: bool, body: &[u8]) -> Option<bool> {
        let mut hasher = Expected::from_headers(&headers(fields), whole)?.hasher();
        hasher.update(body);
        Some(hasher.finish().is_ok())
    }

    /// The check values of the CRC catalogue and of FIPS 180-2, so that a wrong polynomial or byte order fails.
    #[test]
    fn known_answers() {
        let check = b"123456789";
        for (field, value) in [
            ("x-amz-checksum-crc32", "y/Q5Jg=="),
            ("x-amz-checksum-crc32c", "4waSgw=="),
            ("x-amz-checksum-crc64nvme", "rosUhgp5mIg="),
        ] {
            assert_eq!(
                verdict(&[(field, value)], true, check),
                Some(true),
                "{field}"
            );
            assert_eq!(
                verdict(&[(field, value)], true, b"12345678_"),
                Some(false),
                "{field}"
            );
        }
        let sha256 = "sha-256=:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=:";
        assert_eq!(
            verdict(&[("repr-digest", sha256)], false, b"abc"),
            Some(true)
        );
        let sha512 = "sha-512=:3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw==:";
        assert_eq!(
            verdict(&[("repr-digest", sha512)], false, b"abc"),
            Some(true)
        );
    }

    #[test]
    fn only_what_speaks_of_the_whole_object_counts() {
        let crc = ("x-amz-checksum-crc32", "y/Q5Jg==");
        let composite = ("x-amz-checksum-crc32", "y/Q5Jg==-3");
        let check = b"123456789";
        assert_eq!(
            verdict(&[crc], false, check),
            None,
            "on a 206 it may be a part's"
        );
        assert_eq!(verdict(&[composite], true, check), None);
        let full = ("x-amz-checksum-type", "FULL_OBJECT");
        assert_eq!(verdict(&[crc, full], false, check), Some(true));
        assert_eq!(
            verdict(&[crc, ("x-amz-checksum-type", "COMPOSITE")], true, check),
            None
        );
        assert_eq!(
            verdict(
                &[("etag", "\"25f9e794323b453885f5181f1b624d0b\"")],
                true,
                check
            ),
            None
        );
    }

    #[test]
    fn the_dictionary_may_hold_other_members_and_parameters() {
        let field = "unixsum=:MA==:, SHA-256=:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=:;x=1";
        assert_eq!(
            verdict(&[("repr-digest", field)], false, b"abc"),
            Some(true)
        );
        assert_eq!(
            verdict(&[("repr-digest", "sha-256=:AAAA:")], false, b"abc"),
            None
        );
    }
}
