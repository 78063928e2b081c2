//! The tier's account of bytes and descriptors.
//!
//! One number, `used`, counts everything the capacity must hold: bytes in segment files, bytes of
//! unlinked files that somebody still has open, and room promised to writers. A [`Reservation`]
//! turns into a [`Charge`] block by block without touching `used`, so the sum cannot drift. A
//! charge belongs to a file on disk, not to whoever knows it: it is given back only when the file
//! has been unlinked *and* its last holder let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// The account, shared by everything that can hold bytes.
#[derive(Debug)]
pub(super) struct Room {
    capacity: u64,
    used: AtomicU64,
    reserved: AtomicU64,
    /// Bytes that only the catalog knows of: no charge stands for them.
    stored: AtomicU64,
    open_files: AtomicUsize,
}

impl Room {
    /// An account that `used` bytes already count against.
    pub(super) fn new(capacity: u64, used: u64) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            used: AtomicU64::new(used),
            reserved: AtomicU64::new(0),
            stored: AtomicU64::new(used),
            open_files: AtomicUsize::new(0),
        })
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Promised, but not yet in a file: the file system's free bytes do not show it.
    pub(super) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Acquire)
    }

    /// Segment files open in this process, whoever holds them.
    pub(super) fn open_files(&self) -> usize {
        self.open_files.load(Ordering::Acquire)
    }

    pub(super) fn file_opened(&self) {
        self.open_files.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn file_closed(&self) {
        self.open_files.fetch_sub(1, Ordering::AcqRel);
    }

    /// Bytes that would have to go before `bytes` fit into the capacity.
    pub(super) fn shortfall(&self, bytes: u64) -> u64 {
        self.used()
            .saturating_add(bytes)
            .saturating_sub(self.capacity)
    }

    /// Promises `bytes` if they fit.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= self.capacity)
            })
            .ok()?;
        self.reserved.fetch_add(bytes, Ordering::AcqRel);
        Some(Reservation {
            room: Arc::clone(self),
            bytes,
        })
    }

    /// The sum of segment files was `before` when another process took them over, and is `after` now.
    pub(super) fn recount(&self, before: u64, after: u64) {
        // Never below what is still open here: `before` is part of `used`.
        self.used.fetch_add(after, Ordering::AcqRel);
        self.used.fetch_sub(before, Ordering::AcqRel);
        self.stored.fetch_add(after, Ordering::AcqRel);
        self.stored.fetch_sub(before, Ordering::AcqRel);
    }

    /// The file that held these bytes is gone; only the catalog knew of it.
    pub(super) fn release(&self, bytes: u64) {
        self.stored.fetch_sub(bytes, Ordering::AcqRel);
        self.give_back(bytes);
    }

    /// Another catalog is in use, which knows of this many bytes. No revision of the one before is in memory any more;
    /// what is open still counts.
    pub(super) fn restock(&self, bytes: u64) {
        let before = self.stored.swap(bytes, Ordering::AcqRel);
        self.used.fetch_add(bytes, Ordering::AcqRel);
        self.used.fetch_sub(before, Ordering::AcqRel);
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// Room for bytes; given back when dropped, as far as it was not used.
#[derive(Debug)]
pub struct Reservation {
    room: Arc<Room>,
    bytes: u64,
}

impl Reservation {
    /// Bytes that are left of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Turns `bytes` of it into bytes of a file. `false`: it does not hold as many.
    pub(super) fn spend(&mut self, charge: &Charge, bytes: u64) -> bool {
        if bytes > self.bytes {
            return false;
        }
        self.bytes -= bytes;
        self.room.reserved.fetch_sub(bytes, Ordering::AcqRel);
        charge.bytes.fetch_add(bytes, Ordering::AcqRel);
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.room.reserved.fetch_sub(self.bytes, Ordering::AcqRel);
        self.room.give_back(self.bytes);
    }
}

/// The bytes of one segment file.
#[derive(Debug)]
pub(super) struct Charge {
    room: Arc<Room>,
    bytes: AtomicU64,
    served: AtomicU64,
    unlinked: AtomicBool,
}

impl Charge {
    /// For a file whose `bytes` the account already knows, and of which `served` bytes were sent.
    pub(super) fn new(room: &Arc<Room>, bytes: u64, served: u64) -> Arc<Self> {
        room.stored.fetch_sub(bytes, Ordering::AcqRel);
        Arc::new(Self {
            room: Arc::clone(room),
            bytes: AtomicU64::new(bytes),
            served: AtomicU64::new(served),
            unlinked: AtomicBool::new(false),
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Bytes sent from the file, as [`super::policy`] counts them.
    pub(super) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// All that a hit costs the policy.
    pub(super) fn serve(&self, bytes: u64) {
        self.served.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What is sent meanwhile may get lost; it is a hint.
    pub(super) fn set_served(&self, bytes: u64) {
        self.served.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// The file is (about to be) unlinked: the last holder gives its bytes back.
    pub(super) fn unlink(&self) {
        self.unlinked.store(true, Ordering::Release);
    }

    /// The file is gone, but not its row, which says `bytes`: as many count until the row goes, and no more.
    pub(super) fn leave_to_row(&self, bytes: u64) {
        let charged = self.bytes.swap(bytes, Ordering::AcqRel);
        self.room.give_back(charged.saturating_sub(bytes));
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        if *self.unlinked.get_mut() {
            self.room.give_back(bytes);
        } else {
            self.room.stored.fetch_add(bytes, Ordering::AcqRel);
        }
    }
}
