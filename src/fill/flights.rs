//! The interval map: which stretches of which revisions are in flight, and the lock around it.
//!
//! Nothing here awaits, knows the disk or the remote: a flight is a stretch that can be followed. So every
//! interleaving that matters can be walked through, and `tests/interleavings` does.
//!
//! What the lock keeps true:
//!
//! 1. Flights of one revision do not overlap.
//! 2. A flight is followed, and started, only under the lock. It leaves the map under it too: when it is over
//!    (what it brought is covered by then), when nobody follows it ([`Flights::withdraw`] looks and leaves in one step,
//!    so nobody joins a flight that gives up), or when a purge calls it off.
//! 3. What is neither in the map nor on disk is nobody's: the one who finds that starts a flight. Each byte leaves
//!    the remote once (P8).
//! 4. What a purge called off is not kept ([`unless_called_off`]).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// A half-open stretch of a revision whose size may not be known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// One past the last byte; may lie beyond the end of the object while its size is unknown.
    pub end: u64,
}

/// What the map needs to know of a flight. Called under the lock.
pub(super) trait InFlight {
    /// A hold on a flight.
    type Follow;

    /// What it fetches; never changes.
    fn span(&self) -> Span;
    /// One follower more. `collapsed`: it was under way before.
    fn follow(self: &Arc<Self>, collapsed: bool) -> Self::Follow;
    /// Whether anybody holds on to it.
    fn is_followed(&self) -> bool;
    /// A purge came: nothing of it may be kept from now on.
    fn call_off(&self);
}

/// What is missing, as [`Flights::join`] asks for it under the lock.
pub(super) trait Gaps {
    /// Where what is wanted ends, at the latest.
    fn end(&self) -> u64;
    /// The first stretch at or after `offset` that is not on disk, up to the next that is.
    fn first_from(&self, offset: u64) -> Option<Span>;
    /// What one flight is to fetch of a gap: aligned, of a part's length at most.
    fn part(&self, gap: Span) -> Span;
}

type OfRevision<F> = BTreeMap<u64, Arc<F>>;

/// The flights of all revisions.
pub(super) struct Flights<R, F> {
    by_revision: Mutex<HashMap<R, OfRevision<F>>>,
    /// Counts calls of [`Flights::call_off`]; changed under the lock.
    era: AtomicU64,
}

impl<R, F> Default for Flights<R, F> {
    fn default() -> Self {
        Self {
            by_revision: Mutex::default(),
            era: AtomicU64::new(0),
        }
    }
}

impl<R: Hash + Eq + Clone, F: InFlight> Flights<R, F> {
    /// Joins what is in flight from `start` on and starts, by `launch`, what nobody fetches; in order, at most
    /// `most`. `gaps` is called under the lock, for only there it is certain that a flight is
    /// over and covered, or still there.
    pub(super) fn join<G: Gaps>(
        &self,
        revision: &R,
        start: u64,
        most: usize,
        gaps: impl FnOnce() -> G,
        mut launch: impl FnMut(Span) -> Arc<F>,
    ) -> Vec<F::Follow> {
        let mut follows = Vec::new();
        let mut offset = start;
        let mut by_revision = self.by_revision.lock();
        let gaps = gaps();
        let flights = by_revision.entry(revision.clone()).or_default();
        while offset < gaps.end() && follows.len() < most {
            let under_way = flights
                .range(..=offset)
                .next_back()
                .map(|(_, flight)| flight);
            if let Some(flight) = under_way.filter(|flight| flight.span().end > offset) {
                follows.push(flight.follow(true));
                offset = flight.span().end;
                continue;
            }
            let Some(gap) = gaps.first_from(offset) else {
                break;
            };
            if gap.start > offset {
                offset = gap.start;
                continue;
            }
            let next_flight = flights
                .range(offset..)
                .next()
                .map_or(u64::MAX, |(start, _)| *start);
            let span = gaps.part(Span {
                start: offset,
                end: gap.end.min(next_flight),
            });
            let flight = launch(span);
            follows.push(flight.follow(false));
            flights.insert(span.start, flight);
            offset = span.end;
        }
        if flights.is_empty() {
            by_revision.remove(revision);
        }
        follows
    }

    /// Adds a flight over `span`, unless one overlaps it, there was a purge since `era`, or `on_disk` says that
    /// the disk has some of it.
    pub(super) fn adopt(
        &self,
        revision: &R,
        span: Span,
        era: u64,
        on_disk: impl FnOnce() -> bool,
        launch: impl FnOnce(Span) -> Arc<F>,
    ) -> Option<F::Follow> {
        let mut by_revision = self.by_revision.lock();
        let overlaps = by_revision
            .get(revision)
            .and_then(|flights| flights.range(..span.end).next_back())
            .is_some_and(|(_, other)| other.span().end > span.start);
        if overlaps || self.era() != era || on_disk() {
            return None;
        }
        let flight = launch(span);
        let follow = flight.follow(false);
        let flights = by_revision.entry(revision.clone()).or_default();
        flights.insert(span.start, flight);
        Some(follow)
    }

    /// Changes with every purge: what was asked for in one era is not kept in the next.
    pub(super) fn era(&self) -> u64 {
        self.era.load(Ordering::SeqCst)
    }

    /// Takes the flight out of the map if nobody follows it, and says whether it did: then nobody ever
    /// will.
    pub(super) fn withdraw(&self, revision: &R, flight: &Arc<F>) -> bool {
        let mut by_revision = self.by_revision.lock();
        let alone = !flight.is_followed();
        if alone {
            take_out(&mut by_revision, revision, flight);
        }
        alone
    }

    /// Takes out a flight that is over, and only then tells its followers: whoever hears of the end and joins
    /// again is not to meet it.
    pub(super) fn finish(&self, revision: &R, flight: &Arc<F>, tell: impl FnOnce()) {
        take_out(&mut self.by_revision.lock(), revision, flight);
        tell();
    }

    /// Calls off and takes out the flights of the revisions that `matches` says. A new era begins.
    pub(super) fn call_off(&self, matches: impl Fn(&R) -> bool) {
        let mut by_revision = self.by_revision.lock();
        self.era.fetch_add(1, Ordering::SeqCst);
        by_revision.retain(|revision, flights| {
            let called_off = matches(revision);
            if called_off {
                for flight in flights.values() {
                    flight.call_off();
                }
            }
            !called_off
        });
    }
}

/// Unless a purge or the flight itself has done so.
fn take_out<R: Hash + Eq, F: InFlight>(
    by_revision: &mut HashMap<R, OfRevision<F>>,
    revision: &R,
    flight: &Arc<F>,
) {
    if let Some(flights) = by_revision.get_mut(revision) {
        let start = flight.span().start;
        if flights
            .get(&start)
            .is_some_and(|there| Arc::ptr_eq(there, flight))
        {
            flights.remove(&start);
        }
        if flights.is_empty() {
            by_revision.remove(revision);
        }
    }
}

/// Does what a purge may overtake: `None` if it has been called off, before or meanwhile, and then what
/// `deed` did is undone. A purge calls off first and purges then, so a deed that it does not find was either undone here
/// or begun after it.
///
/// Cancelling leaves the deed done or not, and not undone.
///
/// # Errors
/// The deed's, or the undoing's.
pub(super) async fn unless_called_off<T, E>(
    called_off: impl Fn() -> bool,
    deed: impl Future<Output = Result<T, E>>,
    undo: impl Future<Output = Result<(), E>>,
) -> Result<Option<T>, E> {
    if called_off() {
        return Ok(None);
    }
    let done = deed.await?;
    if called_off() {
        undo.await?;
        return Ok(None);
    }
    Ok(Some(done))
}
