//! Checksums of whole revisions.
//!
//! Blocks are right if they are what arrived; whether what arrived is the object, only a checksum of the whole object
//! can tell, which the remote has from whoever uploaded it. Those that combine are put together from the
//! blocks' own without reading a byte; for the others, and for blocks recorded by a version that kept
//! no CRC64NVME, the disk is read.

use std::path::PathBuf;

use super::catalog::{StoredRevision, StoredSegment};
use super::coverage::{Coverage, Geometry};
use super::direct::Direct;
use super::sums::{ReadBlock as _, SegmentSums};
use super::{Computed, DiskError};
use crate::object::{Checksum, ChecksumAlgorithm, ChecksumHasher, Combined};

/// What is known of the checksum of a whole revision.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: there is one or there is none"
)]
pub enum Whole {
    /// The remote has none of the full object.
    None,
    /// The remote said so, and the bytes had it.
    Is(Checksum),
}

impl Whole {
    pub(super) fn to_text(&self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::Is(checksum) => checksum.to_string(),
        }
    }

    pub(super) fn from_text(text: &str) -> Option<Self> {
        match text {
            "none" => Some(Self::None),
            text => text.parse().ok().map(Self::Is),
        }
    }
}

/// One file of a segment.
struct Copy {
    covered: Coverage,
    sums: SegmentSums,
    incarnation: u128,
}

/// The checksum by `algorithm` of `stored`, of whose files `sums` and `path` know more. Blocking.
pub(super) fn checksum(
    stored: &StoredRevision,
    algorithm: ChecksumAlgorithm,
    sums: impl Fn(u128) -> Result<Option<SegmentSums>, DiskError>,
    path: impl Fn(u128) -> PathBuf,
) -> Result<Computed, DiskError> {
    let g = stored.geometry();
    if g.size == 0 || !g.is_sound() {
        return Ok(Computed::Incomplete);
    }
    let copies = |idx| copies(stored, idx, &sums);
    match combine(g, algorithm, copies)? {
        Some(computed) => Ok(computed),
        None => read(g, algorithm, copies, path),
    }
}

/// The files of `stored` that hold blocks of segment `idx`, but those without checksums.
fn copies(
    stored: &StoredRevision,
    idx: u64,
    sums: impl Fn(u128) -> Result<Option<SegmentSums>, DiskError>,
) -> Result<Vec<Copy>, DiskError> {
    let blocks = stored.geometry().blocks_in(idx);
    let mut copies = Vec::new();
    for row in rows_of(&stored.segments, idx) {
        if let Some(covered) = Coverage::from_bytes(blocks, &row.bits)
            && let Some(sums) = sums(row.incarnation)?
        {
            copies.push(Copy {
                covered,
                sums,
                incarnation: row.incarnation,
            });
        }
    }
    Ok(copies)
}

/// From the blocks' checksums, without reading a byte. `None`: they do not combine, or a block has none by `algorithm`.
fn combine(
    g: Geometry,
    algorithm: ChecksumAlgorithm,
    copies: impl Fn(u64) -> Result<Vec<Copy>, DiskError>,
) -> Result<Option<Computed>, DiskError> {
    let mut combined = Combined::new(algorithm, g.block_size);
    for idx in 0..=g.segment_of(g.size - 1) {
        let copies = copies(idx)?;
        for block in 0..g.blocks_in(idx) {
            let mut of_block = copies.iter().filter(|copy| copy.covered.contains(block));
            let Some(first) = of_block.next() else {
                return Ok(Some(Computed::Incomplete));
            };
            // Any of them may be sent.
            let said = |copy: &Copy| copy.sums.get(ChecksumAlgorithm::Crc32c, block);
            if of_block.any(|other| said(other) != said(first)) {
                return Ok(Some(Computed::Contradiction));
            }
            let len = g.blocks_end(idx, block + 1) - g.blocks_end(idx, block);
            combined = combined.and_then(|mut combined| {
                combined.append(first.sums.get(algorithm, block)?, len);
                Some(combined)
            });
        }
    }
    Ok(combined.map(|combined| Computed::Checksum(combined.finish())))
}

/// From what is on the disk.
fn read(
    g: Geometry,
    algorithm: ChecksumAlgorithm,
    copies: impl Fn(u64) -> Result<Vec<Copy>, DiskError>,
    path: impl Fn(u128) -> PathBuf,
) -> Result<Computed, DiskError> {
    let mut hasher = ChecksumHasher::new(algorithm);
    for idx in 0..=g.segment_of(g.size - 1) {
        let base = g.segment_start(idx);
        let copies = copies(idx)?;
        let mut open: Option<(u128, Direct)> = None;
        for block in 0..g.blocks_in(idx) {
            let Some(copy) = copies.iter().find(|copy| copy.covered.contains(block)) else {
                return Ok(Computed::Incomplete);
            };
            let path = path(copy.incarnation);
            let failed = |op| {
                let path = &path;
                move |error| DiskError::io(op, path, error)
            };
            let reader = match &mut open {
                Some((incarnation, reader)) if *incarnation == copy.incarnation => reader,
                slot => {
                    let reader = Direct::open(&path).map_err(failed("open"))?;
                    &mut slot.insert((copy.incarnation, reader)).1
                }
            };
            let (start, end) = (g.blocks_end(idx, block), g.blocks_end(idx, block + 1));
            let len = usize::try_from(end - start).expect("a block fits into memory");
            hasher.update(reader.read(start - base, len).map_err(failed("read"))?);
        }
    }
    Ok(Computed::Checksum(hasher.finish()))
}

/// The rows of segment `idx`; they come ordered by it.
fn rows_of(rows: &[StoredSegment], idx: u64) -> &[StoredSegment] {
    let start = rows.partition_point(|row| row.idx < idx);
    let end = rows.partition_point(|row| row.idx <= idx);
    &rows[start..end]
}
