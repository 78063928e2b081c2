//! Open segment files and the stretches of them that may be sent.
//!
//! A [`FileExtent`] is proof: only coverage ([`super::HeldRevision::step`]) and a writer's cursor
//! ([`super::WriterView::extent`]) make one, so a hole cannot be sent. It keeps the descriptor
//! open, which is the whole lease: unlinking the file does not disturb it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::room::{Charge, Room};

/// One segment file, open. Bytes of an unlinked segment go on counting against the capacity until
/// the last holder lets go.
#[derive(Debug)]
pub struct SegmentFile {
    // Before the charge: fields drop in order, and bytes come back only after the close.
    file: File,
    charge: Arc<Charge>,
    unreadable: AtomicBool,
}

impl SegmentFile {
    pub(super) fn new(file: File, charge: Arc<Charge>) -> Arc<Self> {
        charge.room().file_opened();
        Arc::new(Self {
            file,
            charge,
            unreadable: AtomicBool::new(false),
        })
    }

    /// The open descriptor, for sendfile.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A read of it failed, or it ends before what is recorded of it: whoever finds that out says so, and
    /// the tier drops the segment before it is sent from again (P10). Cheap; may be called on a runtime's worker.
    pub fn report_unreadable(&self) {
        self.unreadable.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_unreadable(&self) -> bool {
        self.unreadable.load(Ordering::Relaxed)
    }

    pub(super) fn charge(&self) -> &Charge {
        &self.charge
    }
}

impl Drop for SegmentFile {
    fn drop(&mut self) {
        self.charge.room().file_closed();
    }
}

/// A stretch of a segment file that certainly holds the bytes of its revision. Minted only by
/// coverage and by a writer's cursor, so a hole cannot be sent. Holds the descriptor: the extent
/// outlives eviction.
#[derive(Clone, Debug)]
pub struct FileExtent {
    file: Arc<SegmentFile>,
    offset: u64,
    len: u64,
}

impl FileExtent {
    pub(super) fn new(file: Arc<SegmentFile>, offset: u64, len: u64) -> Self {
        Self { file, offset, len }
    }

    /// A stretch of any file, for the tests of the server, which need no tier.
    /// `tests/architecture.rs` keeps it out of the program.
    #[doc(hidden)]
    pub fn from_file(file: File, offset: u64, len: u64) -> Self {
        let nobodys = Charge::new(&Room::new(0, 0), 0, 0);
        Self {
            file: SegmentFile::new(file, nobodys),
            offset,
            len,
        }
    }

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

    /// Drops the first `n` bytes: they have been sent. That is what the policy of eviction counts.
    ///
    /// # Panics
    /// If the extent is shorter than that: whoever sends counted wrongly.
    pub fn advance(&mut self, n: u64) {
        assert!(
            n <= self.len,
            "advanced by {n} over an extent of {}",
            self.len
        );
        self.file.charge.serve(n);
        self.offset += n;
        self.len -= n;
    }
}
