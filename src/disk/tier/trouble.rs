//! What is known of a disk that says no: since when, what failed, and whether writes are refused for a while (ADR 11).

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long writes are refused after the disk failed one.
const DEGRADED_FOR: Duration = Duration::from_secs(5);

/// Disk trouble: refuses writes for a while after one failed, and logs once until one works again.
#[derive(Default)]
pub(in crate::disk) struct Trouble {
    since: Mutex<Option<(Instant, String)>>,
    reported: AtomicBool,
}

impl Trouble {
    /// A file operation failed.
    pub(in crate::disk) fn note(&self, op: &'static str, path: &Path, error: &io::Error) {
        let what = format!("could not {op} {}: {error}", path.display());
        *self.since.lock() = Some((Instant::now(), what));
        if !self.reported.swap(true, Ordering::AcqRel) {
            tracing::error!(
                op, path = %path.display(), %error,
                "the cache disk is in trouble: going past it, and trying again every few seconds; \
                 check free space, free inodes and the kernel log"
            );
        }
    }

    /// A write worked.
    pub(in crate::disk) fn over(&self) {
        if self.reported.load(Ordering::Relaxed) && self.reported.swap(false, Ordering::AcqRel) {
            *self.since.lock() = None;
            tracing::info!("the cache disk takes writes again");
        }
    }

    pub(super) fn refuses_writes(&self) -> bool {
        self.reported.load(Ordering::Acquire)
            && self
                .since
                .lock()
                .as_ref()
                .is_some_and(|(since, _)| since.elapsed() < DEGRADED_FOR)
    }

    /// Something failed, and has not been tried for a while.
    pub(in crate::disk) fn is_due(&self) -> bool {
        let since = self.since.lock();
        since
            .as_ref()
            .is_some_and(|(since, _)| since.elapsed() >= DEGRADED_FOR)
    }

    /// What failed last, until something works.
    pub(super) fn what(&self) -> Option<String> {
        let since = self.since.lock();
        since.as_ref().map(|(_, what)| what.clone())
    }
}
