//! Fills: detached tasks that read missing blocks of a revision from the remote into the disk tier.
//!
//! One interval map holds, per revision, the stretches that are being fetched right now. A reader
//! that misses bytes calls [`Filler::join`], which under one lock walks the stretch it wants:
//!
//! ```text
//!   want            ├──────────────────────────────────────────┤
//!   on disk              ██████
//!   in flight                      ├──── A ────┤
//!   join returns    ├ B ┤          ├──── A ────┤├───── C ───────┤     (B and C are new)
//! ```
//!
//! so staggered and misaligned requests share every byte (P8, `tests/serve/main.rs::
//! staggered_ranges_leave_the_remote_once`): a flight is never keyed by what somebody asked for. A flight is one
//! guarded GET of at most a part, aligned to blocks. Its bytes go to the segment file first and
//! everybody, the first asker too, sends behind the writer's cursor. No buffer lies between the
//! two, so a stalled client holds neither memory nor a fill (P9).
//!
//! ```text
//!           budget, room          head checked              last byte
//!   Asked ───────────────▶ GET ───────────────▶ Answered ───────────────▶ Done
//!     │                     │  ▲                    │
//!     │                     │  └── broken: If-Match from the cursor on ([`crate::origin`])
//!     └─────────────────────┴───────────────────────┴──────────────▶ Failed
//! ```
//!
//! **Cancellation.** A flight belongs to the server, not to a request: dropping a [`Follow`] never
//! stops a GET. A flight ends at the end of its part, when its retries are used up, when it meets an error
//! that a retry cannot mend, or when nobody follows it any more at one of two moments: while it waits for the
//! budget (a GET that nobody wants is not made), and when a retry would be due. It leaves the map in the
//! same step as it finds itself alone, so whoever comes then starts another one.
//! [`Filler::forget`] (a purge) lets nothing of a flight be kept; its followers join again.
//! [`Filler::settle`] waits for the flights and calls off those that take too long, for a disk that another process
//! is about to write. [`Filler::shutdown`] drops the flights; completed blocks stay. A flight that panics fails.

mod flights;

use std::num::NonZeroU64;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

pub use flights::Span;
use flights::{Flights, Gaps, InFlight, unless_called_off};

use crate::causes::one_line;
use crate::disk::{
    BlockWriter, DiskError, DiskTier, FileExtent, HeldRevision, Lookup, PurgeTarget, Reservation,
    WriterView,
};
use crate::object::{ObjectKey, Representation, Revision};
use crate::origin::{self, Download, Origin, Origins};
use crate::remote::{self, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead, TRACEPARENT};
use crate::semantics::ByteRange;
use crate::telemetry::Metrics;

/// How fills behave.
#[derive(Clone, Copy, Debug)]
pub struct FillSettings {
    /// Bytes: the most one GET asks for, give or take a block at each edge.
    pub part_size: NonZeroU64,
    /// Bytes that all flights together may be fetching.
    pub budget: u64,
}

/// Where a flight reads, and how patient it is.
#[derive(Clone)]
pub struct FillSource {
    /// What is fetched.
    pub revision: Revision,
    /// From where.
    pub remote: Arc<dyn Remote>,
    /// What is known of the revision; `None` before the first answer.
    pub known: Option<Arc<Representation>>,
    /// Attempts after the first that fails in a way a retry can mend.
    pub retries: u32,
}

impl FillSource {
    /// The way there.
    pub fn origin(&self, origins: &Arc<Origins>) -> Origin {
        origins.origin(&self.remote, self.retries)
    }

    /// The guard for a read of this revision: `If-Match` always, the version where it is known.
    pub fn guard(&self) -> Guard {
        Guard {
            key: self.revision.key.key().into(),
            validator: self.revision.validator.clone(),
            version_id: self
                .known
                .as_ref()
                .and_then(|known| known.version_id.clone()),
            size: self.size(),
        }
    }

    fn size(&self) -> Option<u64> {
        self.known.as_ref().map(|known| known.size)
    }
}

/// Why a flight did not deliver.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "closed: readers handle each")]
pub enum FillError {
    /// The remote refused, failed or lied.
    #[error("the remote read failed")]
    Remote(#[source] RemoteError),
    /// The disk cannot take the bytes: go past it with a GET of one's own. But where the key was purged
    /// meanwhile ([`FillError::is_purged`]), join again.
    #[error("the disk tier cannot take the bytes")]
    Disk(#[source] Arc<DiskError>),
    /// The server is stopping, or the fill broke down.
    #[error("the fill was called off")]
    Stopped,
}

impl FillError {
    /// Nothing is wrong with the disk or the remote: a purge called the flight off.
    pub fn is_purged(&self) -> bool {
        matches!(self, Self::Disk(error) if matches!(**error, DiskError::Purged))
    }

    fn purged() -> Self {
        Self::Disk(Arc::new(DiskError::Purged))
    }
}

impl From<ByteRange> for Span {
    fn from(range: ByteRange) -> Self {
        Self {
            start: range.start(),
            end: range.end(),
        }
    }
}

/// How far a flight is. Published through a watch channel; the cursor moves inside
/// [`WriterView`], and each move is announced by a change of the channel.
#[derive(Clone)]
enum Phase {
    Asked,
    Answered(Answered),
    Done(Answered),
    Failed(FillError),
}

/// What is known from the moment the remote's guarded answer has been checked.
#[derive(Clone)]
pub struct Answered {
    /// The revision on disk.
    pub held: Arc<HeldRevision>,
    /// What has been written so far.
    view: Arc<WriterView>,
}

impl Answered {
    /// Refuses what is of another object than the one of `size` bytes.
    fn of_size(&self, size: Option<u64>) -> Result<&Self, FillError> {
        let validator = &self.held.revision().validator;
        remote::check_length("read", validator, size, self.held.size())
            .map_err(FillError::Remote)?;
        Ok(self)
    }
}

struct Flight {
    span: Span,
    /// Its receivers are the followers. They are added only under the lock of the map.
    phase: watch::Sender<Phase>,
    /// Set by a purge: what arrives from now on must not be kept.
    purged: AtomicBool,
    queued: AtomicU64,
    metrics: Metrics,
}

impl InFlight for Flight {
    type Follow = Follow;

    fn span(&self) -> Span {
        self.span
    }

    fn follow(self: &Arc<Self>, collapsed: bool) -> Follow {
        self.metrics.followers(1);
        Follow {
            phase: self.phase.subscribe(),
            flight: Arc::clone(self),
            size: None,
            collapsed,
        }
    }

    fn is_followed(&self) -> bool {
        self.phase.receiver_count() > 0
    }

    fn call_off(&self) {
        self.purged.store(true, Ordering::Release);
    }
}

/// A reader's hold on a flight. Dropping it lets go; the flight goes on to the end of its part.
pub struct Follow {
    flight: Arc<Flight>,
    phase: watch::Receiver<Phase>,
    /// Length of the object that the reader has begun with: another's bytes are none of its. `None`: it takes any.
    size: Option<u64>,
    /// Whether this flight was already under way when it was joined.
    pub collapsed: bool,
}

impl Drop for Follow {
    fn drop(&mut self) {
        self.flight.metrics.followers(-1);
    }
}

impl Follow {
    /// What the flight fetches.
    pub fn span(&self) -> Span {
        self.flight.span
    }

    /// How long the flight waited for the byte budget before its GET.
    pub fn queued(&self) -> Duration {
        Duration::from_micros(self.flight.queued.load(Ordering::Relaxed))
    }

    /// Whether the remote has said something: [`Follow::answered`] returns at once.
    pub fn has_answer(&self) -> bool {
        !matches!(*self.phase.borrow(), Phase::Asked)
    }

    /// Whether nothing more comes of it.
    pub fn is_over(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Done(_) | Phase::Failed(_))
    }

    /// Waits for the remote's guarded answer, which a flight that is done has had as well. Cancel safe.
    pub async fn answered(&mut self) -> Result<Answered, FillError> {
        let phase = self
            .phase
            .wait_for(|phase| !matches!(phase, Phase::Asked))
            .await
            .map_err(|_closed| FillError::Stopped)?;
        match &*phase {
            Phase::Answered(answered) | Phase::Done(answered) => {
                answered.of_size(self.size).cloned()
            }
            Phase::Failed(error) => Err(error.clone()),
            Phase::Asked => unreachable!("that is what was waited for"),
        }
    }

    /// Waits for bytes at the start of `range`, which must lie in the span, and returns those that
    /// are there, up to a segment's end. `None`: the flight is over; coverage has what it
    /// fetched. Cancel safe.
    pub async fn extent(&mut self, range: ByteRange) -> Result<Option<FileExtent>, FillError> {
        loop {
            match &*self.phase.borrow_and_update() {
                Phase::Asked => {}
                Phase::Answered(answered) => {
                    if let Some(extent) = answered.of_size(self.size)?.view.extent(range) {
                        return Ok(Some(extent));
                    }
                }
                Phase::Done(_) => return Ok(None),
                Phase::Failed(error) => return Err(error.clone()),
            }
            self.phase
                .changed()
                .await
                .map_err(|_closed| FillError::Stopped)?;
        }
    }
}

/// What [`Filler::join`] is asked for, against what is on disk.
struct Wanted<'a> {
    filler: &'a Filler,
    held: Option<&'a HeldRevision>,
    end: u64,
    size: u64,
}

impl Gaps for Wanted<'_> {
    fn end(&self) -> u64 {
        self.end
    }

    fn first_from(&self, offset: u64) -> Option<Span> {
        let rest = ByteRange::from_bounds(offset, self.end)?;
        match self.held {
            None => Some(rest.into()),
            Some(held) => held.first_missing(rest).map(Span::from),
        }
    }

    fn part(&self, gap: Span) -> Span {
        let part = self.filler.part_at(gap);
        debug_assert!(
            part.start.is_multiple_of(self.filler.block().get()) && part.start <= gap.start
        );
        Span {
            start: part.start,
            end: part.end.min(self.size),
        }
    }
}

/// Starts fills and hands out follows. One per replica.
pub struct Filler {
    disk: Arc<DiskTier>,
    settings: FillSettings,
    metrics: Metrics,
    origins: Arc<Origins>,
    /// On the cold path only.
    flights: Flights<Revision, Flight>,
    budget: Semaphore,
    stop: CancellationToken,
    running: Mutex<Running>,
}

/// The flights since the last [`Filler::settle`].
#[derive(Clone, Default)]
struct Running {
    tasks: TaskTracker,
    /// Ends them as if the disk took nothing any more.
    call_off: CancellationToken,
}

impl Filler {
    /// A filler over `disk`.
    pub fn new(disk: Arc<DiskTier>, settings: FillSettings, metrics: Metrics) -> Arc<Self> {
        let permits = usize::try_from(settings.budget / PERMIT).unwrap_or(usize::MAX);
        Arc::new(Self {
            disk,
            budget: Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)),
            settings,
            origins: Origins::new(metrics.clone()),
            metrics,
            flights: Flights::default(),
            stop: CancellationToken::new(),
            running: Mutex::default(),
        })
    }

    /// The ways to all remotes of the replica.
    pub fn origins(&self) -> &Arc<Origins> {
        &self.origins
    }

    fn block(&self) -> NonZeroU64 {
        NonZeroU64::new(self.disk.block_size()).expect("a checked configuration has no zero block")
    }

    /// The flights that together bring what `held` misses of `want`, in order; at most `most` of them.
    /// Joins those under way and starts the others. Empty: nothing is missing.
    ///
    /// Without `held` the size may be unknown too; then a look into the tier's memory, under the lock,
    /// tells whether the revision has arrived meanwhile.
    pub fn join(
        self: &Arc<Self>,
        source: &FillSource,
        held: Option<&HeldRevision>,
        want: Span,
        most: usize,
    ) -> Vec<Follow> {
        let size = source.size();
        let held = held.filter(|held| !held.is_doomed());
        let mut arrived = None;
        let mut follows = self.flights.join(
            &source.revision,
            want.start,
            most,
            || {
                if held.is_none() {
                    arrived = self.arrived_of(source);
                }
                let held = held.or(arrived.as_deref());
                let size = size
                    .or_else(|| held.map(HeldRevision::size))
                    .unwrap_or(u64::MAX);
                Wanted {
                    filler: self,
                    held,
                    end: want.end.min(size),
                    size,
                }
            },
            |span| self.launch(source.clone(), span, None),
        );
        for follow in &mut follows {
            follow.size = size;
        }
        follows
    }

    /// The revision, if the tier's memory knows it.
    pub fn arrived(&self, revision: &Revision) -> Option<Arc<HeldRevision>> {
        match self.disk.lookup(revision) {
            Lookup::Held(held) => Some(held),
            Lookup::Unknown => None,
        }
    }

    /// The same, unless it has another length than it is known to have: then one validator names two objects, and a guarded
    /// read will say so.
    pub fn arrived_of(&self, source: &FillSource) -> Option<Arc<HeldRevision>> {
        self.arrived(&source.revision)
            .filter(|held| source.size().is_none_or(|size| held.size() == size))
    }

    /// Changes with every purge: what was asked for in one era is not kept in the next.
    pub fn era(&self) -> u64 {
        self.flights.era()
    }

    /// Follows the body of a read that was sent in `era`, filling the disk with it. `None` when others
    /// are already fetching (some of) the same bytes or the tier's memory knows the disk to have some, when there was a
    /// purge since, or when the body is longer than a part, for its room would be another's:
    /// the body is dropped and the caller joins like anybody else.
    pub fn adopt(
        self: &Arc<Self>,
        source: &FillSource,
        read: RemoteRead,
        era: u64,
    ) -> Option<Follow> {
        let range = read.range?;
        let block = self.block().get();
        if range.len() > self.settings.part_size.get().saturating_add(2 * block) {
            return None;
        }
        // A suffix read begins in the middle of a block; the part before the first whole one is
        // not kept.
        let span = Span {
            start: range.start().next_multiple_of(block),
            end: range.end(),
        };
        if span.start >= span.end {
            return None;
        }
        let on_disk = || {
            self.arrived_of(source).is_some_and(|held| {
                ByteRange::from_bounds(span.start, span.end)
                    .is_some_and(|range| held.first_missing(range) != Some(range))
            })
        };
        self.flights
            .adopt(&source.revision, span, era, on_disk, |span| {
                self.launch(source.clone(), span, Some(read))
            })
    }

    /// Grows a gap to block boundaries and cuts it to a part. A gap that is a part long but
    /// misaligned stays one GET: it may take a block more at each edge.
    pub fn part_at(&self, gap: Span) -> Span {
        let block = self.block().get();
        let start = gap.start - gap.start % block;
        let end = gap.end.checked_next_multiple_of(block).unwrap_or(gap.end);
        let part = self.settings.part_size.get();
        let end = if end - start <= part.saturating_add(2 * block) {
            end
        } else {
            start.saturating_add(part)
        };
        Span { start, end }
    }

    /// Calls off what is being fetched for the keys that `matches` says: followers get an error that
    /// [is a purge's](FillError::is_purged) or the rest of what they follow, nothing of it is found again once the
    /// tier has been purged as well. A new era begins.
    pub fn forget(&self, matches: impl Fn(&Revision) -> bool) {
        self.flights.call_off(matches);
    }

    /// Holds a revision without a byte, which no flight is ever for. `representation` is what the remote said in `era`, in an
    /// answer that named both validator and length: there are no bytes that could be another's (P2). `None`: the disk does not
    /// take it just now, or there was a purge since.
    ///
    /// Cancelling does not stop it.
    pub async fn hold_empty(
        self: &Arc<Self>,
        key: &ObjectKey,
        representation: &Arc<Representation>,
        era: u64,
    ) -> Option<Arc<HeldRevision>> {
        debug_assert_eq!(representation.size, 0);
        let running = self.running.lock().clone();
        let (me, key, representation) = (Arc::clone(self), key.clone(), Arc::clone(representation));
        let work = async move {
            // A disk that takes nothing says so here.
            let _room = me.disk.reserve(0).await?;
            me.admit(&key, &representation, || me.era() != era).await
        };
        // Among the flights, so that whoever waits for these waits for it.
        let held = running.tasks.spawn(async move {
            match running.call_off.run_until_cancelled(work).await {
                Some(Ok(held)) => held,
                Some(Err(error)) => {
                    tracing::debug!(error = one_line(&error), "an empty object is not held");
                    None
                }
                None => None,
            }
        });
        held.await.ok().flatten()
    }

    /// Registers the revision under the validator that came with these bytes (P2). `None`: a purge called it off.
    async fn admit(
        &self,
        key: &ObjectKey,
        representation: &Representation,
        called_off: impl Fn() -> bool,
    ) -> Result<Option<Arc<HeldRevision>>, DiskError> {
        unless_called_off(called_off, self.disk.admit(key, representation), async {
            let target = PurgeTarget::Key(key.clone());
            self.disk.purge(target).await.map(|_purged| ())
        })
        .await
    }

    /// Drops all flights and waits until they are gone. Completed blocks stay.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        let running = self.running.lock().clone();
        running.tasks.close();
        running.tasks.wait().await;
    }

    /// Returns when no flight that was started before the call writes any more: they have `patience` to come to
    /// their ends, then what is left is called off, and its followers go on past the disk. For a disk that refuses
    /// writes from now on ([`DiskTier::refuse_writes`]), so that later flights find that out by themselves.
    ///
    /// Dropping the future stops waiting; what is not called off by then runs on.
    pub async fn settle(&self, patience: Duration) {
        let before = std::mem::take(&mut *self.running.lock());
        before.tasks.close();
        if tokio::time::timeout(patience, before.tasks.wait())
            .await
            .is_err()
        {
            before.call_off.cancel();
            before.tasks.wait().await;
        }
    }

    fn launch(
        self: &Arc<Self>,
        source: FillSource,
        span: Span,
        first: Option<RemoteRead>,
    ) -> Arc<Flight> {
        let flight = Arc::new(Flight {
            span,
            phase: watch::Sender::new(Phase::Asked),
            purged: AtomicBool::new(false),
            queued: AtomicU64::new(0),
            metrics: self.metrics.clone(),
        });
        let running = self.running.lock().clone();
        let task = Task {
            filler: Arc::clone(self),
            source,
            flight: Arc::clone(&flight),
            call_off: running.call_off,
        };
        let fill_span = tracing::debug_span!(
            parent: None, "fill", key = task.source.revision.key.key(), start = span.start, end = span.end
        );
        fill_span.follows_from(tracing::Span::current());
        self.metrics.fill_started();
        let trace = TRACEPARENT.try_with(Clone::clone).ok().flatten();
        let run = TRACEPARENT.scope(trace, task.run(first));
        running.tasks.spawn(run.instrument(fill_span));
        flight
    }

    /// Takes the flight out of the map and tells the followers how it ended.
    fn finish(&self, revision: &Revision, flight: &Arc<Flight>, end: Result<Answered, FillError>) {
        self.metrics.fill_finished(match &end {
            Ok(_) => "done",
            Err(FillError::Remote(error)) => error.kind.label(),
            Err(FillError::Disk(_)) => "disk",
            Err(FillError::Stopped) => "stopped",
        });
        self.flights.finish(revision, flight, || {
            flight.phase.send_replace(match end {
                Ok(answered) => Phase::Done(answered),
                Err(error) => Phase::Failed(error),
            });
        });
    }
}

/// The budget is counted in units of this many bytes, because a semaphore's permits are 32 bits.
const PERMIT: u64 = 64 * 1024;

/// How long bytes that do not fill a step of the writer wait for more: a stream of 13 MB/s fills one in this time, one of 3 MB/s
/// a least step, and who follows a slower one hardly notices.
const HELD_BACK: Duration = Duration::from_millis(20);

/// One flight's work.
struct Task {
    filler: Arc<Filler>,
    source: FillSource,
    flight: Arc<Flight>,
    call_off: CancellationToken,
}

impl Task {
    async fn run(self, first: Option<RemoteRead>) {
        let end = tokio::select! {
            biased;
            () = self.filler.stop.cancelled() => Err(FillError::Stopped),
            () = self.call_off.cancelled() => Err(disk(DiskError::NoRoom)),
            // A flight that stayed in the map for ever would hang all who follow it, now and later.
            // The panic itself has been reported by its hook.
            end = AssertUnwindSafe(self.fetch(first)).catch_unwind() => {
                end.unwrap_or(Err(FillError::Stopped))
            }
        };
        if let Err(error) = &end {
            // The followers log what becomes of their requests; this is the fill's own story.
            tracing::debug!(error = one_line(error), "fill ended early");
        }
        self.filler.finish(&self.source.revision, &self.flight, end);
    }

    async fn fetch(&self, first: Option<RemoteRead>) -> Result<Answered, FillError> {
        let span = self.flight.span;
        let length = span.end - span.start;
        let asked = Instant::now();
        let permits = u32::try_from(length.div_ceil(PERMIT)).unwrap_or(u32::MAX);
        let most = u32::try_from(self.filler.settings.budget / PERMIT)
            .unwrap_or(u32::MAX)
            .max(1);
        let _permit = tokio::select! {
            biased;
            () = self.left_alone() => return Err(FillError::Stopped),
            permit = self.filler.budget.acquire_many(permits.min(most)) => {
                permit.map_err(|_closed| FillError::Stopped)?
            }
        };
        let queued = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.flight.queued.store(queued, Ordering::Relaxed);
        let reservation = self.filler.disk.reserve(length).await.map_err(disk)?;

        let origin = self.source.origin(&self.filler.origins);
        let guard = self.source.guard();
        let wanted = || {
            !self
                .filler
                .flights
                .withdraw(&self.source.revision, &self.flight)
        };
        let download = match first {
            Some(read) => origin.adopt(guard, read, span.start, span.end),
            None => origin
                .download(guard, span.start, span.end, &wanted)
                .await
                .map_err(FillError::Remote)?,
        };
        let representation = download.representation();
        let (answered, mut writer) = self.admit(representation, reservation).await?;
        let mut source = Source {
            download,
            followers: Followers {
                flight: Arc::clone(&self.flight),
                answered: answered.clone(),
                told: None,
            },
        };
        while source.wait(&mut writer, &wanted).await? {
            // The thread that writes reads as well, so no bytes wait in memory for their turn.
            source = writer.pull(source, Source::next).await.map_err(disk)?;
            source.followers.tell();
        }
        Ok(answered)
    }

    /// Returns once nobody follows the flight, and nobody can any more.
    async fn left_alone(&self) {
        loop {
            self.flight.phase.closed().await;
            if self
                .filler
                .flights
                .withdraw(&self.source.revision, &self.flight)
            {
                return;
            }
        }
    }

    /// Registers the revision for a writer.
    async fn admit(
        &self,
        representation: &Representation,
        reservation: Reservation,
    ) -> Result<(Answered, BlockWriter), FillError> {
        let held = self
            .filler
            .admit(&self.source.revision.key, representation, || {
                self.flight.purged.load(Ordering::Acquire)
            })
            .await
            .map_err(|error| match error {
                DiskError::TwoLengths { held, given } => {
                    let validator = &representation.validator;
                    FillError::Remote(RemoteError::two_lengths("read", validator, held, given))
                }
                error => disk(error),
            })?
            .ok_or_else(FillError::purged)?;
        let span = self.flight.span;
        let range = ByteRange::from_bounds(span.start, span.end.min(representation.size))
            .ok_or_else(|| {
                FillError::Remote(RemoteError::new(
                    RemoteErrorKind::Unsatisfiable {
                        size: Some(representation.size),
                    },
                    "read",
                    "the object ends before the range",
                ))
            })?;
        let writer = held.writer(range, reservation);
        let view = writer.view();
        Ok((Answered { held, view }, writer))
    }
}

/// A download on its way to the disk, and who hears of it.
struct Source {
    download: Download,
    followers: Followers,
}

impl Source {
    /// Waits for more. `false`: that was all. What the writer holds back is written when the step it belongs to is not filled
    /// soon, however often a little of it comes.
    async fn wait(
        &mut self,
        writer: &mut BlockWriter,
        wanted: origin::Wanted<'_>,
    ) -> Result<bool, FillError> {
        let mut more = pin!(self.download.ready(wanted));
        while let Some(since) = writer.holds_back_since() {
            let left = HELD_BACK.saturating_sub(since.elapsed());
            if !left.is_zero()
                && let Ok(more) = tokio::time::timeout(left, more.as_mut()).await
            {
                return more.map_err(FillError::Remote);
            }
            writer.flush().await.map_err(disk)?;
            self.followers.tell();
        }
        more.await.map_err(FillError::Remote)
    }

    fn next(&mut self) -> Option<Bytes> {
        // Once before the turn is over: somebody may be waiting for the first byte. Each time would wake the followers more
        // often than they can send.
        if self.followers.have_news_of_the_first_bytes() {
            self.followers.tell();
            // Who has been told may share this core, and would begin when this turn is over.
            std::thread::yield_now();
        }
        self.download.at_hand()
    }
}

/// Who sends what a writer has written.
struct Followers {
    flight: Arc<Flight>,
    answered: Answered,
    /// The cursor that they know of; `None` before they know of the answer.
    told: Option<u64>,
}

impl Followers {
    fn have_news_of_the_first_bytes(&self) -> bool {
        let start = self.flight.span.start;
        self.told.is_none_or(|told| told == start) && self.answered.view.cursor() > start
    }

    /// Tells them how far the writer is.
    fn tell(&mut self) {
        let cursor = self.answered.view.cursor();
        match self.told.replace(cursor) {
            None => {
                let answered = Phase::Answered(self.answered.clone());
                self.flight.phase.send_replace(answered);
            }
            Some(told) if told < cursor => self.flight.phase.send_modify(|_cursor_moved| {}),
            Some(_) => {}
        }
    }
}

fn disk(error: DiskError) -> FillError {
    FillError::Disk(Arc::new(error))
}
