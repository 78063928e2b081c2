//! The scrubber: finds bytes that rotted before a client gets them.
//!
//! sendfile never sees what it sends, so rot can only be found ahead of time. One thread reads segments, the one
//! verified longest ago first, past the page cache ([`super::direct`]) and not faster than it may, and compares every
//! block with its checksum. A file with a bad block is dropped whole, as one that could have been sent is never
//! rewritten; what it held is fetched again when asked for.
//!
//! ```text
//!  catalog: oldest `verified` ─▶ read, compare ─▶ right: `verified` = now
//!        ▲                                      └▶ wrong: quarantine
//!        └── waits while all were verified within a day, and after trouble
//! ```
//!
//! The place to go on is the oldest `verified` of all rows, so a restart loses at most the segment under way. What a
//! crash left is verified at its first open whatever the scrubber has got to; what it gets to first needs no more than that.
//!
//! [`DiskTier::scrub`](super::DiskTier::scrub) is one pass over everything, now and as fast as the disk reads.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};

use super::catalog::{ScrubOrder, ScrubRow, millis};
use super::direct::Direct;
use super::sums::Contents;
use super::tier::Shared;
use super::{DiskError, ScrubReport};

/// How long a segment is trusted after it was verified. Disks rot in months; a small cache must not be read all
/// day only because it can be.
const TRUSTED_FOR: Duration = Duration::from_hours(24);

/// How often the scrubber looks for something to do, or tries again after trouble.
const LOOK_EVERY: Duration = Duration::from_mins(1);

/// What the scrubber has done, and what ends it.
#[derive(Default)]
pub(super) struct Scrubber {
    /// Bytes per second that the thread may read; `None`: it only looks.
    rate: Option<NonZeroU64>,
    pub(super) bytes: AtomicU64,
    pub(super) segments: AtomicU64,
    pub(super) corrupt_blocks: AtomicU64,
    /// Milliseconds since 1970 of the oldest verification when last looked; 0: nothing is held, or nothing known.
    oldest: AtomicU64,
    stopped: Mutex<bool>,
    stop: Condvar,
    /// Held during a pass over everything.
    pub(super) pass: Mutex<()>,
}

impl Scrubber {
    /// A scrubber that may read `rate` bytes per second; 0: none on its own.
    pub(super) fn new(rate: u64) -> Self {
        Self {
            rate: NonZeroU64::new(rate),
            ..Self::default()
        }
    }

    /// Before a thread is started anew.
    pub(super) fn resume(&self) {
        *self.stopped.lock() = false;
    }

    /// Ends the thread soon, and a pass.
    pub(super) fn stop(&self) {
        *self.stopped.lock() = true;
        self.stop.notify_all();
    }

    /// `false`: stopped.
    fn sleep_until(&self, when: Instant) -> bool {
        let mut stopped = self.stopped.lock();
        while !*stopped && !self.stop.wait_until(&mut stopped, when).timed_out() {}
        !*stopped
    }

    /// How long ago the segment that waits longest was verified.
    pub(super) fn oldest_age(&self) -> Duration {
        match self.oldest.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            oldest => age(oldest),
        }
    }
}

fn age(millis: u64) -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH + Duration::from_millis(millis))
        .unwrap_or_default()
}

/// Whether a segment verified then is to be verified again. One verified in the future was so by a wrong clock.
fn is_due(verified: u64) -> bool {
    age(verified) >= TRUSTED_FOR
        || SystemTime::now() + LOOK_EVERY < UNIX_EPOCH + Duration::from_millis(verified)
}

/// Spreads reads over time: each pushes the next one off for as long as it is worth.
struct Pace {
    /// Bytes per second.
    rate: NonZeroU64,
    next: Instant,
}

impl Pace {
    fn after(&mut self, bytes: u64) -> Instant {
        // What was not used is not saved up: a pause must not end in a burst.
        self.next = self.next.max(Instant::now())
            + Duration::from_secs(1).mul_f64(f64_of(bytes) / f64_of(self.rate.get()));
        self.next
    }
}

#[expect(clippy::cast_precision_loss, reason = "a pause need not be exact")]
fn f64_of(number: u64) -> f64 {
    number as f64
}

/// What became of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Right,
    /// It was dropped.
    Dropped,
    /// Evicted or purged meanwhile, or we could not look: descriptors or memory used up.
    Unknown,
    Stopped,
}

/// The thread's work, until it is stopped.
pub(super) fn run(shared: &Shared) {
    let scrubber = &shared.scrubber;
    let mut pace = scrubber.rate.map(|rate| Pace {
        rate,
        next: Instant::now(),
    });
    loop {
        let due = match shared.look_for_oldest() {
            Ok(oldest) => oldest.filter(|row| is_due(row.verified)),
            Err(error) => {
                if !*scrubber.stopped.lock() {
                    tracing::warn!(%error, "the scrubber cannot read the catalog; it tries again in a minute");
                }
                None
            }
        };
        let verdict = match (due, &mut pace) {
            (Some(row), Some(pace)) => {
                shared.scrub_segment(&row, |bytes, _| scrubber.sleep_until(pace.after(bytes)))
            }
            _ => Verdict::Unknown,
        };
        let pause = match verdict {
            Verdict::Right => Duration::ZERO,
            // Were the whole disk going, it would not be by one segment after the other in no time.
            Verdict::Dropped => Duration::from_secs(1),
            Verdict::Unknown => LOOK_EVERY,
            Verdict::Stopped => return,
        };
        if !scrubber.sleep_until(Instant::now() + pause) {
            return;
        }
    }
}

impl Shared {
    fn look_for_oldest(&self) -> Result<Option<ScrubRow>, DiskError> {
        let oldest = self.catalog.lock()?.next_to_scrub(ScrubOrder::Oldest)?;
        let verified = oldest.as_ref().map_or(0, |row| row.verified.max(1));
        self.scrubber.oldest.store(verified, Ordering::Relaxed);
        Ok(oldest)
    }

    /// One pass over every segment that was there when it began, as fast as the disk reads. Blocking. `None`: there is a
    /// pass under way.
    pub(super) fn scrub_all(&self) -> Result<Option<ScrubReport>, DiskError> {
        let Some(_one_at_a_time) = self.scrubber.pass.try_lock() else {
            return Ok(None);
        };
        // What was completed has a row from here on.
        self.flush_blocking();
        let began = millis(SystemTime::now());
        let mut report = ScrubReport::default();
        let mut after = None;
        loop {
            let next = self
                .catalog
                .lock()?
                .next_to_scrub(ScrubOrder::After(after))?;
            let Some(row) = next else { break };
            after = Some(row.id);
            // Written, or verified by the thread, since the pass began. Else a busy replica would keep it going for ever.
            if row.sealed && row.verified > began && !is_due(row.verified) {
                continue;
            }
            let verdict = self.scrub_segment(&row, |bytes, right| {
                report.bytes += bytes;
                report.corrupt_blocks += u64::from(!right);
                !*self.scrubber.stopped.lock()
            });
            match verdict {
                Verdict::Right => report.segments += 1,
                Verdict::Dropped => {
                    report.segments += 1;
                    report.dropped_segments += 1;
                }
                Verdict::Unknown => report.skipped_segments += 1,
                Verdict::Stopped => {
                    return Err(DiskError::Catalog("the tier has been closed".into()));
                }
            }
        }
        self.look_for_oldest()?;
        Ok(Some(report))
    }

    /// Reads one segment and settles what it finds. `pause` hears of bytes that were read, and says whether to go on.
    fn scrub_segment(&self, row: &ScrubRow, mut pause: impl FnMut(u64, bool) -> bool) -> Verdict {
        let path = self.segment_path(row.id.incarnation);
        let mut stopped = false;
        let checked = row.check(&path, |len, right| {
            self.scrubber.bytes.fetch_add(len, Ordering::Relaxed);
            if !right {
                self.scrubber.corrupt_blocks.fetch_add(1, Ordering::Relaxed);
            }
            stopped = !pause(len, right);
            !stopped
        });
        if stopped {
            return Verdict::Stopped;
        }
        match checked {
            Ok(None) => {
                self.scrubber.segments.fetch_add(1, Ordering::Relaxed);
                let noted = self.catalog.lock().and_then(|mut db| db.scrubbed(&row.id));
                if let Err(error) = noted {
                    tracing::warn!(%error, "could not record that a segment is as it was written");
                    return Verdict::Unknown;
                }
                self.trust(row);
                let g = row.geometry;
                // Once per revision and pass. Whether all of it is held is for whoever hears of it to find out.
                if row.unaudited && row.id.idx == g.segment_of(g.size.saturating_sub(1)) {
                    self.completed(&row.revision);
                }
                Verdict::Right
            }
            Ok(Some(why)) => {
                self.scrubber.segments.fetch_add(1, Ordering::Relaxed);
                self.quarantine_row(row, &io::Error::new(io::ErrorKind::InvalidData, why))
            }
            // Ours to have too few of, and no fault of the file's.
            Err(error) if is_shortage(&error) => Verdict::Unknown,
            Err(error) => self.quarantine_row(row, &error),
        }
    }

    fn quarantine_row(&self, row: &ScrubRow, why: &io::Error) -> Verdict {
        if self.quarantine_by_name(&row.id, &row.revision, why) {
            Verdict::Dropped
        } else {
            Verdict::Unknown
        }
    }
}

impl ScrubRow {
    /// Reads the segment's blocks from the disk and compares them. `each` hears the length of each and whether it is right,
    /// and says whether to go on. `Some`: what is wrong.
    ///
    /// # Errors
    /// What cannot be read.
    pub(super) fn check(
        &self,
        path: &std::path::Path,
        mut each: impl FnMut(u64, bool) -> bool,
    ) -> io::Result<Option<String>> {
        if !self.sealed {
            return Ok(Some(
                "the catalog's row of it is not as it was written".into(),
            ));
        }
        let Some(covered) = &self.covered else {
            return Ok(Some(
                "the catalog's record of its blocks does not fit it".into(),
            ));
        };
        let Some(sums) = &self.sums else {
            return Ok(Some("it has no checksums".into()));
        };
        let contents = Contents {
            geometry: self.geometry,
            idx: self.id.idx,
            covered,
            sums,
        };
        let mut bad = Vec::new();
        contents.check(&mut Direct::open(path)?, |block, len, right| {
            if !right {
                bad.push(block);
            }
            each(len as u64, right)
        })?;
        Ok(match bad.as_slice() {
            [] => None,
            [block] => Some(format!("block {block} does not have its checksum")),
            [block, others @ ..] => Some(format!(
                "block {block} and {} more do not have their checksums",
                others.len()
            )),
        })
    }
}

/// Whether we lack something that has nothing to do with the file.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    Errno::from_io_error(error)
        .is_some_and(|errno| [Errno::MFILE, Errno::NFILE, Errno::NOMEM].contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_and_nothing_is_saved_up() {
        let start = Instant::now();
        let mut pace = Pace {
            rate: NonZeroU64::new(1 << 20).unwrap(),
            next: start,
        };
        for _ in 0..8 {
            pace.after(256 << 10);
        }
        assert!(pace.next >= start + Duration::from_secs(2));
        pace.next = start.checked_sub(Duration::from_mins(1)).unwrap_or(start);
        let now = Instant::now();
        assert!(pace.after(1 << 20) >= now + Duration::from_secs(1));
    }
}
