//! The tier without threads of its own, for tests that must go the same way twice.
//!
//! On a thread where this is on, blocking work is done by whoever asks for it, and what waits for the durability
//! thread is done when somebody waits for it ([`DiskTier::flush`](super::DiskTier::flush), want of room, close). What was
//! not, a crash loses. Nothing is synced: there is no power to lose.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::durability::Syncer;
use super::tier::Seams;
use super::{DiskConfig, DiskError, DiskTier};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread does what others would do for the tier.
pub(super) fn is_on() -> bool {
    ON.get()
}

/// Opens a tier that knows few revisions and keeps few files open. From here on this thread does all the work.
pub(crate) fn open(config: DiskConfig) -> Result<Arc<DiskTier>, DiskError> {
    ON.set(true);
    let seams = Seams {
        sync: Box::new(NoPowerToLose),
        revisions_in_memory: 6,
        max_open_files: 12,
        ..Seams::default()
    };
    DiskTier::open_with(config, seams)
}

struct NoPowerToLose;

impl Syncer for NoPowerToLose {
    fn data(&self, _file: &File) -> io::Result<()> {
        Ok(())
    }

    fn directory(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
}
