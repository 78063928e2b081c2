//! Checksums of blocks: what a file is compared with, and what those of whole objects are made of.
//!
//! Each block has two. CRC64NVME is what files are verified against, because sixty-four bits leave
//! no room for luck, and what S3 computes itself; CRC32C is what earlier versions kept, and what
//! some uploaders give S3 instead. Both are computed as the bytes arrive.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crc_fast::{CrcAlgorithm, Digest};

use super::coverage::{Coverage, Geometry};
use crate::object::ChecksumAlgorithm;

/// The checksums of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockSum {
    pub(super) crc32c: u32,
    pub(super) crc64: u64,
}

/// Computes a [`BlockSum`] over bytes as they come.
pub(super) struct SumDigest {
    crc32c: Digest,
    crc64: Digest,
}

impl Default for SumDigest {
    fn default() -> Self {
        Self {
            crc32c: Digest::new(CrcAlgorithm::Crc32Iscsi),
            crc64: Digest::new(CrcAlgorithm::Crc64Nvme),
        }
    }
}

impl SumDigest {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.crc32c.update(bytes);
        self.crc64.update(bytes);
    }

    /// The checksums of what was taken; the next bytes begin another block.
    pub(super) fn finish_reset(&mut self) -> BlockSum {
        let crc32c = self.crc32c.finalize_reset();
        BlockSum {
            crc32c: u32::try_from(crc32c).expect("a CRC-32 has 32 bits"),
            crc64: self.crc64.finalize_reset(),
        }
    }
}

/// The checksums of a segment file's blocks, as the catalog has them. Those of absent blocks mean
/// nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SegmentSums {
    pub(super) crc32c: Vec<u32>,
    /// Empty: recorded by a version that kept none.
    pub(super) crc64: Vec<u64>,
}

impl SegmentSums {
    /// From what [`SegmentSums::to_bytes`] made; the second is `None` for rows of older versions.
    pub(super) fn from_bytes(crc32c: &[u8], crc64: Option<&[u8]>) -> Self {
        Self {
            crc32c: crc32c
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes(word.try_into().expect("chunks of four")))
                .collect(),
            crc64: crc64
                .unwrap_or_default()
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight")))
                .collect(),
        }
    }

    /// Little-endian words, a block each.
    pub(super) fn to_bytes(&self) -> (Vec<u8>, Vec<u8>) {
        let crc32c = self.crc32c.iter().flat_map(|crc| crc.to_le_bytes());
        let crc64 = self.crc64.iter().flat_map(|crc| crc.to_le_bytes());
        (crc32c.collect(), crc64.collect())
    }

    /// Records blocks of a file of `blocks`.
    pub(super) fn record(&mut self, blocks: u32, covered: &[(u32, BlockSum)]) {
        self.crc32c.resize(blocks as usize, 0);
        self.crc64.resize(blocks as usize, 0);
        for (block, sum) in covered {
            self.crc32c[*block as usize] = sum.crc32c;
            self.crc64[*block as usize] = sum.crc64;
        }
    }

    /// Whether `bytes` are what was recorded for `block`.
    pub(super) fn matches(&self, block: u32, bytes: &[u8]) -> bool {
        let block = block as usize;
        match (self.crc64.get(block), self.crc32c.get(block)) {
            (Some(crc), _) => *crc == crc_fast::crc64_nvme(bytes),
            (None, Some(crc)) => *crc == crc_fast::crc32_iscsi(bytes),
            (None, None) => false,
        }
    }

    /// The recorded CRC of `block`, for the algorithms that combine. `None`: not recorded.
    pub(super) fn get(&self, algorithm: ChecksumAlgorithm, block: u32) -> Option<u64> {
        let block = block as usize;
        match algorithm {
            ChecksumAlgorithm::Crc64Nvme => self.crc64.get(block).copied(),
            ChecksumAlgorithm::Crc32c => self.crc32c.get(block).copied().map(u64::from),
            ChecksumAlgorithm::Crc32 | ChecksumAlgorithm::Sha256 | ChecksumAlgorithm::Sha1 => None,
        }
    }
}

/// Where the bytes of a file come from.
pub(super) trait ReadBlock {
    /// The `len` bytes from `offset` on.
    fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]>;
}

/// Through the page cache.
pub(super) struct Buffered<'a> {
    file: &'a File,
    buffer: Vec<u8>,
}

impl<'a> Buffered<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self {
            file,
            buffer: Vec::new(),
        }
    }
}

impl ReadBlock for Buffered<'_> {
    fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        self.buffer.resize(len, 0);
        self.file.read_exact_at(&mut self.buffer, offset)?;
        Ok(&self.buffer)
    }
}

/// A segment file, its blocks, and what they should be.
pub(super) struct Contents<'a> {
    pub(super) geometry: Geometry,
    pub(super) idx: u64,
    pub(super) covered: &'a Coverage,
    pub(super) sums: &'a SegmentSums,
}

impl Contents<'_> {
    /// Every covered block against its checksum, in order: `each` hears the block, its bytes in the file and whether
    /// they are right, and says whether to go on.
    ///
    /// # Errors
    /// The first read that fails; a file that is too short is [`io::ErrorKind::UnexpectedEof`].
    pub(super) fn check(
        &self,
        reader: &mut impl ReadBlock,
        mut each: impl FnMut(u32, usize, bool) -> bool,
    ) -> io::Result<()> {
        let g = self.geometry;
        let base = g.segment_start(self.idx);
        for block in self.covered.iter() {
            let start = g.blocks_end(self.idx, block) - base;
            let end = g.blocks_end(self.idx, block + 1) - base;
            let len = usize::try_from(end - start).map_err(io::Error::other)?;
            let right = self.sums.matches(block, reader.read(start, len)?);
            if !each(block, len, right) {
                break;
            }
        }
        Ok(())
    }
}
