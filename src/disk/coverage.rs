//! Which blocks of a segment file are present, and where blocks lie. Pure: no I/O, no locks.
//!
//! A [`Geometry`] cuts a revision into segments and these into blocks; [`Coverage`] is one bit per
//! block of one segment file. Offsets are bytes of the revision; block numbers count from the
//! start of their segment.

/// How one revision is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of the revision.
    pub(super) size: u64,
    /// Bytes of a block; a power of two.
    pub(super) block_size: u64,
    /// Bytes of a segment; a multiple of `block_size`.
    pub(super) segment_size: u64,
}

impl Geometry {
    /// Whether a revision can be cut up so; one read from a damaged catalog need not be.
    pub(super) fn is_sound(&self) -> bool {
        self.block_size.is_power_of_two()
            && self.segment_size > 0
            && self.segment_size.is_multiple_of(self.block_size)
            && u32::try_from(self.segment_size / self.block_size).is_ok()
    }

    /// The segment that `offset` lies in.
    pub(super) fn segment_of(&self, offset: u64) -> u64 {
        offset / self.segment_size
    }

    /// The block of its segment that `offset` lies in.
    pub(super) fn block_of(&self, offset: u64) -> u32 {
        narrow(offset % self.segment_size / self.block_size)
    }

    /// Where segment `idx` starts.
    pub(super) fn segment_start(&self, idx: u64) -> u64 {
        idx.saturating_mul(self.segment_size)
    }

    /// Where segment `idx` ends; the last one ends with the revision.
    pub(super) fn segment_end(&self, idx: u64) -> u64 {
        self.segment_start(idx)
            .saturating_add(self.segment_size)
            .min(self.size)
    }

    /// Blocks of segment `idx`, 0 if it begins beyond the end.
    pub(super) fn blocks_in(&self, idx: u64) -> u32 {
        let bytes = self
            .segment_end(idx)
            .saturating_sub(self.segment_start(idx));
        narrow(bytes.div_ceil(self.block_size))
    }

    /// Bytes that a stretch counts, of whole blocks but for the revision's end: what it takes on disk.
    pub(super) fn taken(&self, bytes: u64) -> u64 {
        taken(self.block_size, bytes)
    }

    /// How many of the bytes that a file of segment `idx` counts can be sent.
    pub(super) fn content(&self, idx: u64, taken: u64) -> u64 {
        let is_last = self.segment_end(idx) == self.size;
        // Recorded before the end of a file counted as a whole block, or without the revision's end.
        let is_exact = !is_last || !taken.is_multiple_of(self.taken(1));
        if is_exact {
            taken
        } else {
            taken.saturating_sub(self.taken(self.size) - self.size)
        }
    }

    /// Where the first `blocks` blocks of segment `idx` end.
    pub(super) fn blocks_end(&self, idx: u64, blocks: u32) -> u64 {
        let start = self.segment_start(idx);
        start
            .saturating_add(u64::from(blocks) * self.block_size)
            .min(self.segment_end(idx))
    }
}

/// The least that a file system gives a file with bytes in it, on nearly all of them.
const LEAST: u64 = 4096;

/// What `bytes` of a file take on disk, in blocks of `block_size` (which only tests have smaller than a file system's).
pub(super) fn taken(block_size: u64, bytes: u64) -> u64 {
    let least = LEAST.min(block_size);
    bytes.checked_next_multiple_of(least).unwrap_or(bytes)
}

/// Block counts fit, because a segment is at most 64 MiB or one block.
fn narrow(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("a segment has fewer than 2^32 blocks")
}

/// One bit per block of one segment file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Coverage {
    words: Box<[u64]>,
    blocks: u32,
    present: u32,
}

impl Coverage {
    /// Nothing is present.
    pub(super) fn empty(blocks: u32) -> Self {
        Self {
            words: vec![0; blocks.div_ceil(64) as usize].into(),
            blocks,
            present: 0,
        }
    }

    /// As [`Coverage::to_bytes`] wrote it. `None` for bytes that do not describe `blocks` blocks.
    pub(super) fn from_bytes(blocks: u32, bytes: &[u8]) -> Option<Self> {
        let mut coverage = Self::empty(blocks);
        if bytes.len() != coverage.words.len() * 8 {
            return None;
        }
        for (word, chunk) in coverage.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        let tail = blocks % 64;
        if tail != 0 && coverage.words.last().is_some_and(|last| last >> tail != 0) {
            return None;
        }
        coverage.present = coverage.words.iter().map(|word| word.count_ones()).sum();
        Some(coverage)
    }

    /// Little-endian words, the first block in the lowest bit.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// Whether `block` is present; a block beyond the end is not.
    pub(super) fn contains(&self, block: u32) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] & (1 << (block % 64)) != 0
    }

    /// Marks `block` present.
    pub(super) fn insert(&mut self, block: u32) {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        if !self.contains(block) {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
            self.present += 1;
        }
    }

    /// Marks `block` absent.
    pub(super) fn remove(&mut self, block: u32) {
        if self.contains(block) {
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
            self.present -= 1;
        }
    }

    /// How many blocks it speaks of, present or absent.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether no block is present.
    pub(super) fn is_empty(&self) -> bool {
        self.present == 0
    }

    /// The highest present block.
    pub(super) fn highest(&self) -> Option<u32> {
        self.iter().next_back()
    }

    /// The present blocks, ascending.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = u32> + '_ {
        (0..self.blocks).filter(|block| self.contains(*block))
    }

    /// The first block from `from` on that is absent; the number of blocks if there is none.
    pub(super) fn first_absent(&self, from: u32) -> u32 {
        if self.present == self.blocks {
            return self.blocks;
        }
        self.scan(from, |word| !word)
    }

    /// The first block from `from` on that is present; the number of blocks if there is none.
    pub(super) fn first_present(&self, from: u32) -> u32 {
        if self.present == 0 {
            return self.blocks;
        }
        self.scan(from, |word| word)
    }

    /// The first set bit of `view` from `from` on, a word at a time.
    fn scan(&self, from: u32, view: impl Fn(u64) -> u64) -> u32 {
        if from >= self.blocks {
            return self.blocks;
        }
        let mut mask = u64::MAX << (from % 64);
        for index in (from / 64)..self.blocks.div_ceil(64) {
            let found = view(self.words[index as usize]) & mask;
            if found != 0 {
                return (index * 64 + found.trailing_zeros()).min(self.blocks);
            }
            mask = u64::MAX;
        }
        self.blocks
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(flags: &[bool], from: usize, wanted: bool) -> u32 {
        let found = flags.iter().skip(from).position(|flag| *flag == wanted);
        u32::try_from(found.map_or(flags.len(), |distance| from + distance)).unwrap()
    }

    proptest! {
        /// Bits against a `Vec<bool>`, through inserts, removals and a round trip over bytes.
        #[test]
        fn coverage_is_a_vector_of_flags(
            blocks in 1_u32..300,
            steps in prop::collection::vec((any::<u32>(), any::<bool>()), 0..200),
        ) {
            let mut flags = vec![false; blocks as usize];
            let mut coverage = Coverage::empty(blocks);
            for (block, set) in steps {
                let block = block % blocks;
                flags[block as usize] = set;
                if set { coverage.insert(block) } else { coverage.remove(block) }
            }
            let coverage = Coverage::from_bytes(blocks, &coverage.to_bytes()).unwrap();
            for from in 0..=blocks {
                prop_assert_eq!(
                    coverage.contains(from),
                    flags.get(from as usize).copied().unwrap_or(false)
                );
                prop_assert_eq!(coverage.first_absent(from), naive(&flags, from as usize, false));
                prop_assert_eq!(coverage.first_present(from), naive(&flags, from as usize, true));
            }
            prop_assert_eq!(coverage.is_empty(), !flags.contains(&true));
            prop_assert_eq!(
                coverage.highest().map(|block| block as usize),
                flags.iter().rposition(|flag| *flag)
            );
        }

        /// Every byte lies in exactly one block, and blocks tile the revision.
        #[test]
        fn geometry_tiles_the_revision(
            size in 1_u64..5000, block_bits in 0_u32..6, per_segment in 1_u64..8,
        ) {
            let block_size = 1_u64 << block_bits;
            let g = Geometry { size, block_size, segment_size: block_size * per_segment };
            let mut offset = 0;
            while offset < size {
                let idx = g.segment_of(offset);
                let block = g.block_of(offset);
                prop_assert!(block < g.blocks_in(idx));
                prop_assert_eq!(g.segment_start(idx) + u64::from(block) * block_size, offset);
                offset = g.blocks_end(idx, block + 1);
            }
            prop_assert_eq!(offset, size);
            prop_assert_eq!(g.blocks_in(g.segment_of(size - 1) + 1), 0);
        }
    }

    #[test]
    fn stray_bits_and_wrong_lengths_are_refused() {
        assert!(Coverage::from_bytes(3, &[0; 16]).is_none());
        assert!(Coverage::from_bytes(3, &[0b1000, 0, 0, 0, 0, 0, 0, 0]).is_none());
        assert!(Coverage::from_bytes(3, &[0b0111, 0, 0, 0, 0, 0, 0, 0]).is_some());
    }
}
