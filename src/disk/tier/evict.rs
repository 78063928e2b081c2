//! Making room: what goes when the capacity or the file system is full, and when there is enough.
//!
//! ```text
//!  reserve ─▶ make_room ─▶ short of bytes or files? ── no ──▶ reserved
//!                 ▲              │ yes
//!                 │              ▼
//!                 └────────── evict: heads of the queues ─▶ policy judges ─▶ moved, or rows deleted, then files unlinked
//! ```
//!
//! Two limits bind: `capacity`, of which [`Room`](crate::disk::room::Room) keeps account, and what the file system has left
//! beyond `min_free`, which is asked for once in [`FREE_SPACE_FOR`]; our own bytes are added up meanwhile. Which segment goes
//! is for [`policy`] to say; here its verdicts become one transaction of the catalog (ADR 12). Rows go before files (ADR 8).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Shared, Space};
use crate::disk::catalog::{Candidate, Db, Moved, SegmentId, Start};
use crate::disk::failpoint::Step;
use crate::disk::held::{HeldRevision, Segment, SegmentKey};
use crate::disk::policy::{self, Policy, Round, Standing, Verdict};
use crate::disk::room::Reservation;
use crate::disk::{DiskError, MinFree};
use crate::object::Revision;

/// How long a look at the file system's free space is good for; bytes of our own are added up meanwhile.
const FREE_SPACE_FOR: Duration = Duration::from_secs(1);

/// Files (inodes) that the file system is to be able to take, beyond those of writers: the catalog's, and somebody else's.
const FILES_KEPT: u64 = 64;

/// Segments that a start evicts in one go, for want of capacity.
const SHRINK_STEP: u64 = 16;

/// Rows of a queue that eviction reads in one go.
const HEADS: u32 = 64;

/// Segments that one transaction of eviction moves or deletes at most: first touches wait for it.
const PLAN: usize = 256;

/// A look at what the file system has left.
#[derive(Clone, Copy)]
pub(in crate::disk) struct FreeSpace {
    at: Instant,
    /// What the file system had left beyond `min_free` and what was promised to writers; below 0
    /// where others filled it.
    pub(in crate::disk) spare: i128,
    /// The account at that time.
    used: u64,
    /// Files that could be made beyond [`FILES_KEPT`]; below 0 where there were not as many.
    pub(in crate::disk) files: i128,
    /// [`Shared::files_made`] at that time.
    made: i64,
}

impl Shared {
    pub(in crate::disk) fn make_room(&self, bytes: u64) -> Result<Reservation, DiskError> {
        let _one_at_a_time = self.evictor.lock();
        let look = self.look_at_free_space()?;
        let mut flushed = false;
        loop {
            let spare = self.spare_since(look);
            let missing = u64::try_from(i128::from(bytes) - spare).unwrap_or(0);
            let short = Wanted {
                bytes: self.room.shortfall(bytes).max(missing),
                files: u64::try_from(1 - self.files_since(look)).unwrap_or(0),
            };
            if short.is_met_by(0, 0) {
                if let Some(reservation) = self.room.reserve(bytes) {
                    self.crowded.over();
                    return Ok(reservation);
                }
                continue;
            }
            let evicted = self.evict(short, flushed).inspect_err(|error| {
                let error = io::Error::other(error.to_string());
                self.unrecorded.note("evict in", &self.dir, &error);
            });
            if evicted? > 0 {
                continue;
            }
            if flushed {
                let too_few = match (missing, short.files) {
                    (0, 0) => None,
                    (0, files) => Some(format!("{files} inodes too few are free (df -i)")),
                    (bytes, _) => Some(format!(
                        "{bytes} bytes too few are free beyond cache.min_free"
                    )),
                };
                if let Some(too_few) = too_few {
                    let full = io::Error::other(format!(
                        "{too_few}, and nothing of ours is left to evict"
                    ));
                    self.crowded.note("make room in", &self.dir, &full);
                }
                return Err(DiskError::NoRoom);
            }
            // What was completed a moment ago has no row yet, and can go once it has. It may well be what should go.
            self.flush_blocking();
            flushed = true;
        }
    }

    /// Evicts what is held beyond the capacity, which was more in an earlier run, in steps. What is being sent stays
    /// until the next fill wants room.
    pub(super) fn shrink(&self) {
        let mut freed = 0;
        while !self.is_over() {
            let excess = self.room.shortfall(0).min(self.segment_size * SHRINK_STEP);
            if excess == 0 {
                break;
            }
            let _one_at_a_time = self.evictor.lock();
            let wanted = Wanted {
                bytes: excess,
                files: 0,
            };
            match self.evict(wanted, true) {
                Ok(0) => break,
                Ok(bytes) => freed += bytes,
                Err(error) => {
                    tracing::warn!(%error, "could not evict what is held beyond cache.capacity; the next fill tries again");
                    break;
                }
            }
        }
        if freed > 0 {
            tracing::info!(
                bytes = freed,
                capacity = self.room.capacity(),
                "more was held than cache.capacity allows: evicted the rest"
            );
        }
    }

    /// Unlinks the segments that the policy chooses until as much is free as is `wanted` or nothing more can go. Returns the
    /// bytes freed. `settled`: what is held is in the catalog by now, so that a queue that shows nothing has nothing.
    fn evict(&self, wanted: Wanted, settled: bool) -> Result<u64, DiskError> {
        let began = self.tick();
        let mut round = Round::default();
        let (mut freed, mut gone) = (0, 0);
        while !wanted.is_met_by(freed, gone) {
            let mut db = self.catalog.lock()?;
            self.note_standing(&db);
            let mut plan = Eviction::default();
            let mut queues = Queues::new(&db);
            while !wanted.is_met_by(freed, gone + plan.files()) && plan.len() < PLAN {
                let Some(queue) = round.turn(&self.policy.lock()) else {
                    break;
                };
                match queues.next(queue)? {
                    Some(row) => freed += self.judge(&mut round, began, queue, &row, &mut plan),
                    None if settled && plan.len() == 0 => round.pass_over(queue),
                    None => break,
                }
            }
            if plan.len() == 0 {
                break;
            }
            let victims = self.commit(&mut plan, &mut db)?;
            self.reached(Step::Evicted);
            // The rows are gone, and nobody else knows the files: no lock is needed to unlink them.
            drop(db);
            gone += victims;
            self.evictions.fetch_add(victims, Ordering::Relaxed);
            for (count, bytes) in self.evicted_bytes.iter().zip(plan.bytes) {
                count.fetch_add(bytes, Ordering::Relaxed);
            }
            let stored = plan.stored_files();
            let known = plan
                .known
                .into_iter()
                .map(|(_, _, segment)| segment)
                .collect();
            self.unlink_all(known, &stored);
        }
        Ok(freed)
    }

    /// Deletes the rows of what is to go, and puts back into memory what was taken out if that fails. Returns how many
    /// segments go.
    fn commit(&self, plan: &mut Eviction, db: &mut Db) -> Result<u64, DiskError> {
        let victims = plan.victims();
        let mut committed = db.evict(&victims, &plan.moved, &plan.forgettable);
        if committed.is_err() && self.is_full() {
            // Not even the catalog's log finds room, and perhaps nobody else ever makes some. So the files go before
            // their rows; a row without a file serves nothing.
            plan.close_files();
            for victim in &victims {
                // What cannot be unlinked is noted, and makes no room.
                let _ = self.try_unlink(victim.incarnation);
            }
            committed = db.evict(&victims, &plan.moved, &plan.forgettable);
        }
        if let Err(error) = committed {
            plan.put_back();
            return Err(error);
        }
        Ok(victims.len() as u64)
    }

    /// Has the policy judge the head of a queue, and plans accordingly. Returns the bytes that will be free.
    /// Who is in use and has been moved since the search `began` is not moved again: that would look like others.
    fn judge(
        &self,
        round: &mut Round,
        began: u64,
        queue: policy::Queue,
        row: &Candidate,
        plan: &mut Eviction,
    ) -> u64 {
        let held = self.in_memory(&row.revision);
        let mut state = held.as_ref().map(|held| held.state.lock());
        // Memory may have given it up (see `HeldRevision::open_at`).
        let found = state.as_mut().and_then(|state| {
            state
                .files_mut(row.id.idx)
                .find(|(_, segment)| segment.incarnation == row.id.incarnation)
        });
        let head = policy::Head {
            name: segment_name(&row.revision, row.id.idx),
            bytes: row.bytes,
            content: row.content,
            served: found
                .as_ref()
                .map_or(row.served, |(_, segment)| segment.charge.served()),
            in_use: found.as_ref().is_some_and(|(_, segment)| segment.in_use()),
        };
        if head.in_use && row.place > began {
            return 0;
        }
        let verdict = round.judge(&mut self.policy.lock(), queue, head);
        if let Verdict::Move { to, served } = verdict {
            if let Some((_, segment)) = found {
                segment.charge.set_served(served);
                segment.stored_served = served;
            }
            plan.moved.push(Moved {
                id: row.id,
                queue: to,
                place: self.tick(),
                served,
            });
            return 0;
        }
        let key = found.map(|(key, _)| *key);
        let segment = key.and_then(|key| state.as_mut()?.segments.remove(&key));
        drop(state);
        let bytes = match (held, key, segment) {
            (Some(held), Some(key), Some(segment)) => {
                let bytes = segment.charge.bytes();
                plan.known.push((held, key, segment));
                bytes
            }
            (held, ..) => {
                if held.is_none() {
                    plan.forgettable.push(row.id.revision);
                }
                plan.stored.push((row.id, row.bytes));
                row.bytes
            }
        };
        plan.bytes[queue as usize] += bytes;
        bytes
    }

    /// The queue that a new file of this segment begins in.
    pub(in crate::disk) fn admitted_to(&self, revision: &Revision, idx: u64) -> policy::Queue {
        let mut policy = self.policy.lock();
        let main = policy.standing().main;
        policy.update(self.standing(main));
        policy.admit(segment_name(revision, idx))
    }

    /// Tells the policy what is held, after the catalog changed.
    pub(in crate::disk) fn note_standing(&self, db: &Db) {
        // Whoever works with the catalog next hears of its trouble.
        if let Ok(main) = db.main_bytes() {
            self.policy.lock().update(self.standing(main));
        }
    }

    /// Whatever is not in main is in the small queue or on its way there: the catalog does not know of what was fetched
    /// in the last moment, and in a small cache that is a good part.
    fn standing(&self, main: u64) -> Standing {
        Standing {
            small: self.room.used().saturating_sub(main),
            main,
        }
    }

    /// Whether `bytes` may still be written, from a look not long ago. `false`: look again.
    pub(super) fn has_recent_spare(&self, bytes: u64) -> bool {
        let look = *self.free_space.lock();
        look.is_some_and(|look| {
            look.at.elapsed() < FREE_SPACE_FOR
                && self.spare_since(look) >= i128::from(bytes)
                && self.files_since(look) > 0
        })
    }

    /// Files that may still be made.
    fn files_since(&self, look: FreeSpace) -> i128 {
        look.files + i128::from(look.made) - i128::from(self.files_made.load(Ordering::Relaxed))
    }

    /// What we wrote or promised since the look is gone; what we unlinked has come back.
    fn spare_since(&self, look: FreeSpace) -> i128 {
        look.spare + i128::from(look.used) - i128::from(self.room.used())
    }

    pub(in crate::disk) fn look_at_free_space(&self) -> Result<FreeSpace, DiskError> {
        let used = self.room.used();
        let reserved = self.room.reserved();
        let made = self.files_made.load(Ordering::Relaxed);
        let Space {
            total,
            available,
            files,
        } = (self.file_system)(&self.dir)
            .map_err(|error| DiskError::io("statvfs", &self.dir, error))?;
        let min_free = match self.min_free {
            MinFree::Bytes(bytes) => bytes,
            MinFree::Percent(percent) => percent_of(total, percent),
        };
        let spare = i128::from(available) - i128::from(min_free) - i128::from(reserved);
        let look = FreeSpace {
            at: Instant::now(),
            spare,
            used,
            files: i128::from(files) - i128::from(FILES_KEPT),
            made,
        };
        *self.free_space.lock() = Some(look);
        Ok(look)
    }

    /// What the kernel means where it will not make a file.
    pub(in crate::disk) fn not_made(&self, error: io::Error) -> io::Error {
        if error.kind() != io::ErrorKind::StorageFull {
            return error;
        }
        // The next reservation looks for itself.
        *self.free_space.lock() = None;
        match (self.file_system)(&self.dir) {
            Ok(Space { files: 0, .. }) => io::Error::new(
                io::ErrorKind::StorageFull,
                "the file system has no inode left for another file (df -i)",
            ),
            _ => error,
        }
    }
}

/// What eviction is to free.
#[derive(Clone, Copy)]
struct Wanted {
    bytes: u64,
    files: u64,
}

impl Wanted {
    fn is_met_by(self, bytes: u64, files: u64) -> bool {
        bytes >= self.bytes && files >= self.files
    }
}

/// What one round of eviction decided.
#[derive(Default)]
struct Eviction {
    /// Taken out of memory; their charges know the bytes.
    known: Vec<(Arc<HeldRevision>, SegmentKey, Segment)>,
    /// Only in the catalog.
    stored: Vec<(SegmentId, u64)>,
    moved: Vec<Moved>,
    forgettable: Vec<i64>,
    /// Bytes that go, by queue.
    bytes: [u64; 2],
}

impl Eviction {
    fn victims(&self) -> Vec<SegmentId> {
        let known = self
            .known
            .iter()
            .map(|(held, key, segment)| held.segment_id(*key, segment));
        known.chain(self.stored.iter().map(|(id, _)| *id)).collect()
    }

    /// Nobody sends from them, and a file that is open takes its room even without a name.
    fn close_files(&mut self) {
        for (_, _, segment) in &mut self.known {
            segment.claimed = None;
            segment.file = None;
        }
    }

    fn put_back(&mut self) {
        for (held, key, segment) in self.known.drain(..) {
            held.state.lock().segments.insert(key, segment);
        }
    }

    fn len(&self) -> usize {
        self.known.len() + self.stored.len() + self.moved.len()
    }

    /// Files that go.
    fn files(&self) -> u64 {
        (self.known.len() + self.stored.len()) as u64
    }

    fn stored_files(&self) -> Vec<(u128, u64)> {
        self.stored
            .iter()
            .map(|(id, bytes)| (id.incarnation, *bytes))
            .collect()
    }
}

/// The queues in the catalog, walked from their heads. What is moved to the end meanwhile gets there by the commit, and
/// is not met by this walk.
struct Queues<'a> {
    db: &'a Db,
    read: [std::vec::IntoIter<Candidate>; 2],
    places: [u64; 2],
}

impl<'a> Queues<'a> {
    fn new(db: &'a Db) -> Self {
        Self {
            db,
            read: Default::default(),
            places: [0; 2],
        }
    }

    fn next(&mut self, queue: policy::Queue) -> Result<Option<Candidate>, DiskError> {
        let (read, place) = (
            &mut self.read[queue as usize],
            &mut self.places[queue as usize],
        );
        if read.as_slice().is_empty() {
            *read = self.db.heads(queue, *place, HEADS)?.into_iter();
        }
        let next = read.next();
        if let Some(row) = &next {
            *place = row.place + 1;
        }
        Ok(next)
    }
}

/// What the policy knows a segment by: the same after a restart, and when its revision has been forgotten meanwhile.
fn segment_name(revision: &Revision, idx: u64) -> u64 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    for part in [
        revision.key.store(),
        revision.key.key(),
        revision.validator.as_field_value(),
    ] {
        digest.update(part.as_bytes());
        digest.update(&[0]);
    }
    digest.update(&idx.to_le_bytes());
    digest.finalize()
}

/// The policy as the last run left it.
pub(super) fn policy_of(capacity: u64, start: &Start) -> Policy {
    let standing = Standing {
        small: start.bytes.saturating_sub(start.main_bytes),
        main: start.main_bytes,
    };
    let mut policy = Policy::new(capacity, standing);
    policy.restore(&start.ghosts);
    policy
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of a file system need not be exact; negative percentages become 0"
)]
fn percent_of(total: u64, percent: f64) -> u64 {
    (total as f64 * percent / 100.0) as u64
}
