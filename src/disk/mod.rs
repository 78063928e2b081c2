//! The disk tier: sparse segment files per revision, and the durable record of what is in them.
//! (skeleton: bodies are to be written; see the doc comments for what each must do)

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use crate::object::{ObjectKey, Representation, Revision};
use crate::semantics::ByteRange;

/// One segment file, open. Bytes of an unlinked segment go on counting against the capacity until the
/// last holder lets go.
#[derive(Debug)]
pub struct SegmentFile {
    file: File,
}

impl SegmentFile {
    /// The open descriptor, for sendfile.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// A stretch of a segment file that certainly holds the bytes of its revision. Minted only by coverage and by a
/// writer's cursor, so a hole cannot be sent. Holds the descriptor: the extent outlives eviction.
#[derive(Clone, Debug)]
pub struct FileExtent {
    file: Arc<SegmentFile>,
    offset: u64,
    len: u64,
}

impl FileExtent {
    /// The file to send from.
    pub fn file(&self) -> &Arc<SegmentFile> {
        &self.file
    }
    /// Where the extent starts in the file (not in the revision).
    pub fn offset(&self) -> u64 {
        self.offset
    }
    /// Bytes left, at least 1 as minted.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether all of it was consumed by [`FileExtent::advance`].
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Drops the first `n` bytes.
    pub fn advance(&mut self, n: u64) {
        assert!(n <= self.len);
        self.offset += n;
        self.len -= n;
    }
}

/// Settings of the tier, checked by `config`.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The cache directory; made if it is missing.
    pub dir: PathBuf,
    /// Most bytes that segments may take, unlinked but open ones included.
    pub capacity: u64,
    /// Bytes of the file system to leave free.
    pub min_free: MinFree,
    /// Unit of coverage in bytes; a power of two.
    pub block_size: u64,
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

/// The tier.
pub struct DiskTier;

/// Why the tier could not be opened (message says what to do) or an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Another process holds the directory.
    #[error("the cache directory {dir} is in use by another process (pid {pid}); stop it or give this one a directory of its own")]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Holder's pid as it wrote it.
        pid: String,
    },
    /// No room even after eviction, or the disk is in trouble: go past it.
    #[error("no room")]
    NoRoom,
    /// I/O error.
    #[error("{op} {path}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Catalog error.
    #[error("catalog: {0}")]
    Catalog(String),
}

/// What memory knows of a revision.
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

/// What a purge removed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Purged {
    /// Revisions forgotten.
    pub revisions: u64,
    /// Bytes unlinked.
    pub bytes: u64,
}

/// A snapshot of the tier's counters for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskStats {
    /// Bytes that count against the capacity: present, reserved, unlinked but open.
    pub used_bytes: u64,
    /// The capacity.
    pub capacity_bytes: u64,
    /// Segments evicted since the start.
    pub evictions: u64,
    /// Bytes evicted since the start.
    pub evicted_bytes: u64,
    /// Revisions known to memory.
    pub revisions_in_memory: u64,
    /// Whether writes are being refused for now (disk trouble).
    pub degraded: bool,
}

impl DiskTier {
    /// Opens or makes the tier: lock, catalog (migrate), reclaim leftovers in the background. Blocking.
    pub fn open(_config: DiskConfig) -> Result<Arc<Self>, DiskError> {
        todo!()
    }
    /// Unit of coverage.
    pub fn block_size(&self) -> u64 {
        todo!()
    }
    /// Memory only; never blocks.
    pub fn lookup(&self, _revision: &Revision) -> Lookup {
        todo!()
    }
    /// Memory, then the catalog (off the runtime's workers). `None`: not held, or the catalog is in trouble (logged).
    pub async fn load(&self, _revision: &Revision) -> Option<Arc<HeldRevision>> {
        todo!()
    }
    /// The held entry for this revision, made if need be; stored headers replaced by these.
    pub async fn admit(&self, _key: &ObjectKey, _representation: &Representation) -> Result<Arc<HeldRevision>, DiskError> {
        todo!()
    }
    /// What was current when last asked; survives a restart.
    pub async fn last_current(&self, _key: &ObjectKey) -> Option<CurrentRecord> {
        todo!()
    }
    /// Write-behind; `None`: the key is absent.
    pub fn set_current(&self, _key: &ObjectKey, _representation: Option<&Arc<Representation>>) {
        todo!()
    }
    /// Forgets: gone from memory and catalog and unlinked when this returns.
    pub async fn purge(&self, _target: PurgeTarget) -> Result<Purged, DiskError> {
        todo!()
    }
    /// Room for `bytes`, evicting least recently used segments if need be.
    pub async fn reserve(&self, _bytes: u64) -> Result<Reservation, DiskError> {
        todo!()
    }
    /// Waits until every completed block is durable.
    pub async fn flush(&self) -> Result<(), DiskError> {
        todo!()
    }
    /// Counters.
    pub fn stats(&self) -> DiskStats {
        todo!()
    }
}

/// Room for bytes; given back when dropped, as far as it was not used.
#[derive(Debug)]
pub struct Reservation {
    /// Bytes.
    pub bytes: u64,
}

/// A revision the tier knows.
pub struct HeldRevision;

/// What lies at the start of a range.
pub enum Step {
    /// Send this (at most up to the end of its segment), then ask again for the rest.
    Present(FileExtent),
    /// Present, but the file is not open yet: await [`HeldRevision::open_at`], then ask again.
    Closed,
    /// Not on disk, up to where the next present block (or the range's end) begins. Not block-aligned: the caller aligns.
    Missing(ByteRange),
}

impl HeldRevision {
    /// Which revision.
    pub fn revision(&self) -> &Revision {
        todo!()
    }
    /// Its metadata, newest.
    pub fn representation(&self) -> Arc<Representation> {
        todo!()
    }
    /// Replaces the stored headers (equal bytes re-uploaded).
    pub fn update_representation(&self, _representation: Arc<Representation>) {
        todo!()
    }
    /// Purged: nothing new may be written or found through it.
    pub fn is_doomed(&self) -> bool {
        todo!()
    }
    /// Memory only, no I/O; counts as a touch for the LRU.
    pub fn step(&self, _range: ByteRange) -> Step {
        todo!()
    }
    /// Opens the segment file that `offset` lies in, off the runtime's workers. If the file is gone or its size is
    /// wrong, its coverage is dropped instead (next step says Missing).
    pub async fn open_at(&self, _offset: u64) {
        todo!()
    }
    /// The first stretch of `range` that is not on disk.
    pub fn first_missing(&self, _range: ByteRange) -> Option<ByteRange> {
        todo!()
    }
    /// A sequential writer for `range` (block-aligned start; end block-aligned or the object's end), taking its room from
    /// `reservation`. Pins the segments against eviction until dropped.
    pub async fn writer(self: &Arc<Self>, _range: ByteRange, _reservation: Reservation) -> Result<BlockWriter, DiskError> {
        todo!()
    }
}

/// Writes a stretch in order. Dropping it keeps the completed blocks; a started block is not kept.
pub struct BlockWriter;

impl BlockWriter {
    /// Appends; the cursor moves when the bytes are in the page cache (pwrite off the runtime's workers). Blocks completed on the way are covered in memory at
    /// once and committed later (data synced first).
    pub async fn write(&mut self, _chunks: Vec<Bytes>) -> Result<(), DiskError> {
        todo!()
    }
    /// A shared view for those who send behind the cursor.
    pub fn view(&self) -> Arc<WriterView> {
        todo!()
    }
}

/// What a writer has written so far, readable by anyone; outlives the writer.
pub struct WriterView;

impl WriterView {
    /// Offset (in the revision) up to which bytes can be sent.
    pub fn cursor(&self) -> u64 {
        todo!()
    }
    /// The longest extent at the start of `range` that is behind the cursor, within one segment.
    pub fn extent(&self, _range: ByteRange) -> Option<FileExtent> {
        todo!()
    }
}
