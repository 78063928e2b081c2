//! The disk tier: sparse segment files per revision, and the durable record of what is in them.
//!
//! A revision's bytes are cut into *segments* of a fixed stretch, each in a file of its own, and
//! these into *blocks*, the unit of coverage. A file is named by a random number, its
//! incarnation, that is never used twice. Three rules carry everything else:
//!
//! 1. A block of a file is written once. No file that could ever be sent is punched, truncated or
//!    rewritten: sendfile leaves the page in the socket's queue, so whoever changes the page
//!    changes what the client gets. Eviction and repair unlink whole files; what is fetched again
//!    goes into a new one. So a segment may have several files, each with part of its blocks.
//! 2. A [`FileExtent`], the right to send, is minted only where the bytes are known to be: by
//!    coverage or behind a writer's cursor. It keeps the descriptor open, and needs nothing else.
//! 3. Coverage is committed only after the data was synced, and what the last process left behind
//!    without an orderly end is verified against checksums before it is served (ADR 8).
//!
//! Who does what:
//!
//! ```text
//!  tier.rs        DiskTier: open, lookup, load, admit, reserve, purge, close
//!    ├ tier/evict.rs    room: what goes, and when there is enough
//!    ├ tier/trouble.rs  what failed, and whether writes are refused for a while
//!    ├ held.rs      HeldRevision: which blocks of one revision lie where   (the warm path)
//!    │   ├ coverage.rs  bits and geometry, pure
//!    │   └ extent.rs    SegmentFile, FileExtent
//!    ├ writer.rs    BlockWriter, WriterView: bytes in order into segment files
//!    ├ durability.rs  the one thread that syncs data, then commits coverage
//!    ├ scrub.rs     the thread that looks for rot
//!    │   ├ sums.rs      checksums of blocks
//!    │   └ direct.rs    reads past the page cache
//!    ├ whole.rs     checksums of whole revisions
//!    ├ sweep.rs     the thread that reclaims what an earlier run left over
//!    ├ catalog.rs   SQLite
//!    │   ├ file.rs      its schema and its file: opened, or set aside
//!    │   └ rows.rs      statements, and rows sealed against rot
//!    ├ policy.rs    which segment goes, pure
//!    ├ room.rs      the account of bytes: Reservation → Charge
//!    ├ watch.rs     how long the disk is waited for
//!    ├ revive.rs    a directory that vanished or broke: let go of, and opened again
//!    ├ failpoint.rs the steps at which tests take the power away
//!    └ inline.rs    blocking work done in place, for tests on one thread
//!  offline.rs     the same checks on the directory of a replica that does not run
//! ```
//!
//! **Warm:** [`DiskTier::lookup`] → [`HeldRevision::step`] → [`FileExtent`]: two short locks, no
//! I/O, nothing written. **Cold:** [`DiskTier::reserve`] → [`HeldRevision::writer`] →
//! [`BlockWriter::write`]; followers send what [`WriterView::extent`] gives them, and each
//! completed block is covered in memory at once and durable a moment later.
//!
//! Locks, in the order they may be taken: evictor → catalog → map of revisions → state of one
//! revision → policy, queue of the durability thread. The catalog's lock is held from a read of the catalog until memory agrees with
//! it, so there is one [`HeldRevision`] per revision and what was purged cannot come back.

mod catalog;
mod coverage;
mod direct;
mod durability;
mod extent;
mod failpoint;
mod held;
#[cfg(test)]
pub(crate) mod inline;
pub mod offline;
pub mod policy;
mod revive;
mod room;
mod scrub;
mod sums;
mod sweep;
#[cfg(test)]
mod tests;
mod tier;
mod watch;
mod whole;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use extent::{FileExtent, SegmentFile};
pub use held::{HeldRevision, Step};
pub use room::Reservation;
pub use tier::DiskTier;
pub use whole::Whole;
pub use writer::{BlockWriter, LEAST_STEP, WriterView};

use crate::object::{Checksum, ObjectKey, Representation};

/// Settings of the tier, checked by `config`.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The cache directory; made if it is missing.
    pub dir: PathBuf,
    /// Most bytes that segments may take, unlinked but open ones included, the end of each rounded up to 4 KiB. What an earlier
    /// run held beyond it is evicted after the start.
    pub capacity: u64,
    /// Bytes of the file system to leave free.
    pub min_free: MinFree,
    /// Unit of coverage in bytes; a power of two. Revisions stored with another one are not found,
    /// and make room when their turn comes, since nobody reads them. The start logs how many bytes that are.
    pub block_size: u64,
    /// Bytes per second that the scrubber may read; 0: it does not run.
    pub scrub_rate: u64,
}

/// How much of the file system to leave free.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "closed: the two ways to say it")]
pub enum MinFree {
    /// Bytes.
    Bytes(u64),
    /// Percent of the file system's size.
    Percent(f64),
}

/// Why the tier could not be opened (message says what to do) or an operation failed.
#[derive(Debug, thiserror::Error)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: callers choose between waiting and going past the disk"
)]
pub enum DiskError {
    /// Another process holds the directory.
    #[error(
        "the cache directory {dir} is in use by another process (pid {pid}); stop it or give this one a directory of its own"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Holder's pid as it wrote it.
        pid: String,
    },
    /// No room even after eviction, or the disk is in trouble: go past it.
    #[error("no room on the disk tier")]
    NoRoom,
    /// Something is held under the validator, and of an object of another length: it stays, and nothing else is held under it.
    #[error("what is held under the validator is of an object of {held} bytes, and not of {given}")]
    TwoLengths {
        /// Length in bytes of the object that is held.
        held: u64,
        /// Length in bytes of the one that was to be.
        given: u64,
    },
    /// The revision was purged meanwhile: nothing more is written of it. Go past the disk.
    #[error("the revision was purged from the disk tier")]
    Purged,
    /// I/O error.
    #[error("could not {op} {path}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Catalog error.
    #[error("catalog: {0}")]
    Catalog(String),
    /// The disk does not answer in time: go past it. What was begun goes on.
    #[error("the cache disk hangs: could not {what} in time")]
    Hangs {
        /// What was being done.
        what: &'static str,
    },
}

impl DiskError {
    fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            op,
            path: path.to_owned(),
            source,
        }
    }
}

/// What memory knows of a revision.
#[expect(clippy::exhaustive_enums, reason = "closed: memory knows or does not")]
pub enum Lookup {
    /// Held, wholly or in part.
    Held(Arc<HeldRevision>),
    /// Memory does not know; the catalog may: call [`DiskTier::load`].
    Unknown,
}

/// The last known current revision of a key.
#[derive(Clone, Debug)]
pub struct CurrentRecord {
    /// What was current.
    pub representation: Arc<Representation>,
    /// When the remote last said so.
    pub checked_at: SystemTime,
}

/// What to purge.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: the two forms of POST /purge"
)]
pub enum PurgeTarget {
    /// One key, every revision.
    Key(ObjectKey),
    /// Every key of the store that starts so.
    Prefix {
        /// Store identity.
        store: Arc<str>,
        /// Key prefix.
        prefix: String,
    },
}

impl PurgeTarget {
    fn matches(&self, key: &ObjectKey) -> bool {
        match self {
            Self::Key(target) => target == key,
            Self::Prefix { store, prefix } => {
                key.store() == store.as_ref() && key.key().starts_with(prefix)
            }
        }
    }
}

/// What a purge removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Revisions forgotten.
    pub revisions: u64,
    /// Bytes unlinked.
    pub bytes: u64,
}

/// What earlier runs left over, and this one reclaimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Segment files that no row named.
    pub files: u64,
    /// Bytes that they took on disk.
    pub bytes: u64,
    /// Rows of segments whose file was gone.
    pub rows: u64,
    /// Revisions of which no byte was held, and empty ones beyond those that may be.
    pub revisions: u64,
}

/// A snapshot of the tier's counters for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskStats {
    /// Bytes that count against the capacity: present, reserved, unlinked but open; in whole blocks of 4 KiB.
    pub used_bytes: u64,
    /// The capacity.
    pub capacity_bytes: u64,
    /// Segments evicted since the start.
    pub evictions: u64,
    /// Bytes in the small queue of [`policy`] or on their way there: read once so far.
    pub small_bytes: u64,
    /// Bytes in the main queue of [`policy`]: read again.
    pub main_bytes: u64,
    /// Bytes evicted from the small queue since the start.
    pub evicted_small_bytes: u64,
    /// Bytes evicted from the main queue since the start.
    pub evicted_main_bytes: u64,
    /// Segments fetched again since the start while the policy still knew their names.
    pub ghost_hits: u64,
    /// Segments dropped since the start because their file was gone, short or corrupt, or could
    /// not be synced.
    pub quarantines: u64,
    /// What was reclaimed since the start of what earlier runs left over.
    pub swept: Swept,
    /// Whether leftovers are still being looked for.
    pub sweeping: bool,
    /// Revisions known to memory.
    pub revisions_in_memory: u64,
    /// Segment files open, those that responses hold included.
    pub open_files: u64,
    /// Whether writes are being refused for now, or nothing can be read either (disk trouble).
    pub degraded: bool,
    /// Whether the directory is not in use at all: it could not be opened, or went away.
    pub out: bool,
    /// Bytes that were read to be compared with their checksums since the start.
    pub scrubbed_bytes: u64,
    /// Segments of which every block was compared since the start.
    pub scrubbed_segments: u64,
    /// Blocks that did not have their checksum, since the start.
    pub corrupt_blocks: u64,
    /// How long ago the held segment that waits longest was verified; 0 where nothing is held. Looked up once a
    /// minute at least.
    pub oldest_verified: Duration,
}

/// The checksum of a whole revision, as its files have it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: callers tell them apart")]
pub enum Computed {
    /// Not every block is held.
    Incomplete,
    /// Two files hold different bytes of one block: whatever the checksum, one of them is wrong.
    Contradiction,
    /// This.
    Checksum(Checksum),
}

/// What a pass of the scrubber found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Segments that were looked at.
    pub segments: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Blocks that did not have their checksum.
    pub corrupt_blocks: u64,
    /// Segments dropped: a block was corrupt, or the file was gone, short or unreadable.
    pub dropped_segments: u64,
    /// Segments that went while they were looked at, or could not be for want of descriptors.
    pub skipped_segments: u64,
}
