//! Checksums of whole objects, as S3 stores them beside an object.
//!
//! What S3 has depends on who uploaded: CRC64NVME unless the uploader brought another one. Only
//! checksums of the *full object* are kept here. A composite one (a checksum over the checksums of
//! the parts, written with `-N` behind it) says nothing of bytes that were not cut up in the same way.
//!
//! CRC64NVME and CRC32C of a whole follow from those of its stretches ([`Combined`]), so they cost
//! no reading. The others do not, or are not kept per stretch: they are computed over the bytes
//! ([`ChecksumHasher`]).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use crc_fast::{CrcAlgorithm, Digest};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// How a checksum is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(clippy::exhaustive_enums, reason = "closed: those that S3 has")]
pub enum ChecksumAlgorithm {
    /// CRC-64/NVME, what S3 computes itself.
    Crc64Nvme,
    /// CRC-32/ISCSI.
    Crc32c,
    /// CRC-32/ISO-HDLC, that of zip and Ethernet.
    Crc32,
    /// SHA-256.
    Sha256,
    /// SHA-1.
    Sha1,
}

impl ChecksumAlgorithm {
    /// All of them, the cheapest to check first.
    pub const ALL: [Self; 5] = [
        Self::Crc64Nvme,
        Self::Crc32c,
        Self::Crc32,
        Self::Sha256,
        Self::Sha1,
    ];

    /// As S3 writes it: `CRC64NVME`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crc64Nvme => "CRC64NVME",
            Self::Crc32c => "CRC32C",
            Self::Crc32 => "CRC32",
            Self::Sha256 => "SHA256",
            Self::Sha1 => "SHA1",
        }
    }

    /// The response field that carries it: `x-amz-checksum-crc64nvme`.
    pub fn field(self) -> &'static str {
        match self {
            Self::Crc64Nvme => "x-amz-checksum-crc64nvme",
            Self::Crc32c => "x-amz-checksum-crc32c",
            Self::Crc32 => "x-amz-checksum-crc32",
            Self::Sha256 => "x-amz-checksum-sha256",
            Self::Sha1 => "x-amz-checksum-sha1",
        }
    }

    /// Whether that of a whole follows from those of its stretches, as far as these are kept.
    pub fn combines(self) -> bool {
        matches!(self, Self::Crc64Nvme | Self::Crc32c)
    }

    /// Bytes of a value.
    fn len(self) -> usize {
        match self {
            Self::Crc64Nvme => 8,
            Self::Crc32c | Self::Crc32 => 4,
            Self::Sha256 => 32,
            Self::Sha1 => 20,
        }
    }

    fn crc(self) -> Option<CrcAlgorithm> {
        match self {
            Self::Crc64Nvme => Some(CrcAlgorithm::Crc64Nvme),
            Self::Crc32c => Some(CrcAlgorithm::Crc32Iscsi),
            Self::Crc32 => Some(CrcAlgorithm::Crc32IsoHdlc),
            Self::Sha256 | Self::Sha1 => None,
        }
    }

    /// A CRC as S3 writes it: its bytes, the highest first.
    fn of_crc(self, crc: u64) -> Checksum {
        Checksum {
            algorithm: self,
            value: crc.to_be_bytes()[8 - self.len()..].into(),
        }
    }
}

/// The checksum of a whole object. Its text is `CRC64NVME:` and the value in base64.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Checksum {
    algorithm: ChecksumAlgorithm,
    value: Box<[u8]>,
}

impl Checksum {
    /// Takes the value as S3 writes it. `None`: that is none of the full object by this algorithm
    /// (a composite one has `-N` behind it).
    pub fn from_base64(algorithm: ChecksumAlgorithm, value: &str) -> Option<Self> {
        let value = BASE64_STANDARD.decode(value).ok()?;
        (value.len() == algorithm.len()).then(|| Self {
            algorithm,
            value: value.into(),
        })
    }

    /// Of these bytes.
    pub fn of(algorithm: ChecksumAlgorithm, bytes: &[u8]) -> Self {
        let mut hasher = ChecksumHasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// How it is computed.
    pub fn algorithm(&self) -> ChecksumAlgorithm {
        self.algorithm
    }

    /// Its bytes, the highest first.
    pub fn value(&self) -> &[u8] {
        &self.value
    }

    /// Its value as S3 writes it.
    pub fn to_base64(&self) -> String {
        BASE64_STANDARD.encode(&self.value)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.to_base64())
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no [`Checksum`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a checksum")]
pub struct InvalidChecksum(pub String);

impl FromStr for Checksum {
    type Err = InvalidChecksum;

    fn from_str(text: &str) -> Result<Self, InvalidChecksum> {
        text.split_once(':')
            .and_then(|(name, value)| {
                let algorithm = ChecksumAlgorithm::ALL
                    .into_iter()
                    .find(|algorithm| algorithm.name() == name)?;
                Self::from_base64(algorithm, value)
            })
            .ok_or_else(|| InvalidChecksum(text.to_owned()))
    }
}

/// Computes a [`Checksum`] over bytes as they come.
pub struct ChecksumHasher(State);

enum State {
    Crc(ChecksumAlgorithm, Box<Digest>),
    Sha256(Box<Sha256>),
    Sha1(Box<Sha1>),
}

impl ChecksumHasher {
    /// Over no bytes yet.
    pub fn new(algorithm: ChecksumAlgorithm) -> Self {
        Self(match (algorithm, algorithm.crc()) {
            (_, Some(crc)) => State::Crc(algorithm, Box::new(Digest::new(crc))),
            (ChecksumAlgorithm::Sha1, None) => State::Sha1(Box::default()),
            (_, None) => State::Sha256(Box::default()),
        })
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Crc(_, digest) => digest.update(bytes),
            State::Sha256(hasher) => hasher.update(bytes),
            State::Sha1(hasher) => hasher.update(bytes),
        }
    }

    /// The checksum of all that was taken.
    pub fn finish(self) -> Checksum {
        match self.0 {
            State::Crc(algorithm, digest) => algorithm.of_crc(digest.finalize()),
            State::Sha256(hasher) => Checksum {
                algorithm: ChecksumAlgorithm::Sha256,
                value: hasher.finalize().as_slice().into(),
            },
            State::Sha1(hasher) => Checksum {
                algorithm: ChecksumAlgorithm::Sha1,
                value: hasher.finalize().as_slice().into(),
            },
        }
    }
}

/// The CRC of a whole out of those of its stretches, given in order.
///
/// Appending `n` bytes to a message multiplies its CRC, a polynomial, by `x` to the power of `8n`: a matrix over the
/// CRC's bits that depends on `n` alone. That of the usual length is made once, after which a stretch costs some fifty
/// nanoseconds instead of a hundred microseconds or more; a terabyte has four million blocks of 256 KiB.
pub struct Combined {
    algorithm: ChecksumAlgorithm,
    crc_algorithm: CrcAlgorithm,
    usual: u64,
    /// What each bit of a CRC becomes; empty until needed.
    appends_usual: Vec<u64>,
    /// `None`: no stretch yet.
    crc: Option<u64>,
}

impl Combined {
    /// Of stretches most of which have `usual` bytes. `None` for a checksum that does not combine.
    pub fn new(algorithm: ChecksumAlgorithm, usual: u64) -> Option<Self> {
        let crc_algorithm = algorithm.crc().filter(|_| algorithm.combines())?;
        Some(Self {
            algorithm,
            crc_algorithm,
            usual,
            appends_usual: Vec::new(),
            crc: None,
        })
    }

    /// Appends a stretch of `len` bytes with this CRC.
    pub fn append(&mut self, crc: u64, len: u64) {
        let Some(whole) = self.crc else {
            self.crc = Some(crc);
            return;
        };
        self.crc = Some(if len == self.usual {
            self.appended_usual(whole) ^ crc
        } else {
            crc_fast::checksum_combine(self.crc_algorithm, whole, crc, len)
        });
    }

    fn appended_usual(&mut self, crc: u64) -> u64 {
        if self.appends_usual.is_empty() {
            // For both algorithms the initial value and the final one cancel out, so combining is linear. They are
            // reflected: the highest bit is the lowest power, and each bit below is the one above times x.
            let bits = self.algorithm.len() * 8;
            let one = 1 << (bits - 1);
            let first = crc_fast::checksum_combine(self.crc_algorithm, one, 0, self.usual);
            let polynomial = self.polynomial();
            let times_x = |column: &u64| {
                let overflow = if column & 1 == 1 { polynomial } else { 0 };
                Some((column >> 1) ^ overflow)
            };
            let columns = std::iter::successors(Some(first), times_x).take(bits);
            self.appends_usual = columns.collect();
            self.appends_usual.reverse();
        }
        self.appends_usual
            .iter()
            .enumerate()
            .filter(|(bit, _)| crc >> bit & 1 == 1)
            .fold(0, |sum, (_, column)| sum ^ column)
    }

    /// What the algorithm divides by, reflected.
    fn polynomial(&self) -> u64 {
        match self.algorithm {
            ChecksumAlgorithm::Crc64Nvme => 0x9a6c_9329_ac4b_c9b5,
            _ => 0x82f6_3b78,
        }
    }

    /// The checksum of all stretches together.
    pub fn finish(self) -> Checksum {
        let empty = || Digest::new(self.crc_algorithm).finalize();
        self.algorithm.of_crc(self.crc.unwrap_or_else(empty))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The check values of the catalogue of CRCs and of FIPS 180, as S3 would write them.
    #[test]
    fn values_are_those_that_everybody_computes() {
        for (algorithm, text) in [
            (ChecksumAlgorithm::Crc64Nvme, "CRC64NVME:rosUhgp5mIg="),
            (ChecksumAlgorithm::Crc32c, "CRC32C:4waSgw=="),
            (ChecksumAlgorithm::Crc32, "CRC32:y/Q5Jg=="),
        ] {
            let checksum = Checksum::of(algorithm, b"123456789");
            assert_eq!(checksum.to_string(), text);
            assert_eq!(text.parse(), Ok(checksum));
        }
        assert_eq!(
            Checksum::of(ChecksumAlgorithm::Sha1, b"abc").to_base64(),
            "qZk+NkcGgWq6PiVxeFDCbJzQ2J0="
        );
        assert_eq!(
            Checksum::of(ChecksumAlgorithm::Sha256, b"abc").to_base64(),
            "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
        );
    }

    #[test]
    fn a_composite_checksum_is_none_of_the_object() {
        assert_eq!(
            Checksum::from_base64(ChecksumAlgorithm::Crc32c, "4waSgw==-3"),
            None
        );
        assert_eq!(
            Checksum::from_base64(ChecksumAlgorithm::Crc32, "rosUhgp5mIg="),
            None,
            "of another length"
        );
        assert!("MD5:AAAA".parse::<Checksum>().is_err());
    }

    proptest! {
        /// However the bytes are cut, the whole has the checksum of the whole.
        #[test]
        fn stretches_combine_to_the_whole(
            bytes in prop::collection::vec(any::<u8>(), 0..4000), usual in 1_usize..600,
            odd in 0_usize..600,
        ) {
            for algorithm in ChecksumAlgorithm::ALL.into_iter().filter(|a| a.combines()) {
                let mut combined = Combined::new(algorithm, usual as u64).unwrap();
                let (head, rest) = bytes.split_at(odd.min(bytes.len()));
                for stretch in head.chunks(usual.max(1)).chain(rest.chunks(usual)) {
                    let crc = crc_fast::checksum(algorithm.crc().unwrap(), stretch);
                    combined.append(crc, stretch.len() as u64);
                }
                prop_assert_eq!(combined.finish(), Checksum::of(algorithm, &bytes));
            }
        }
    }
}
