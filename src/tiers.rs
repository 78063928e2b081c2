//! The decision: which tier answers, and what a mismatch means.
//!
//! ```text
//!            ┌ pinned to one tag ─▶ disk holds it over the range? ──yes──▶ disk, nobody is asked (P5)
//!  request ──┤                                │ no
//!            │                                ▼
//!            │                       guarded read / HEAD ─────▶ settle ─▶ 206, 412, 404, 503, …
//!            │
//!            └ anything else ──────▶ what is current? fresh: known │ stale: ask, once for all who wait
//!                                             │
//!                                             ▼
//!                                    evaluate, then as if pinned to it;
//!                                    a mismatch now means «ask again», not 412
//! ```
//!
//! [`settle`] is the table of DESIGN.md §3 as a pure function: an outage outranks 412 and 404 (P4).
//! [`Tiers::open`] walks it. What it returns has had its hold-back (P3): the first bytes are there, and
//! where the disk holds the start but not all, the remote has answered for the first missing
//! stretch. The bytes themselves come through a [`Reader`].
//!
//! **Cancellation.** Dropping [`Tiers::open`]'s future or a [`Reader`] stops nothing that others
//! share: fills are detached, a label that is being asked for is asked again by the next in line.
#![expect(
    clippy::similar_names,
    reason = "a request's head, and what is held: the words for them"
)]

mod current;
mod reader;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;

use crate::disk::{DiskError, DiskTier, FileExtent, HeldRevision, Lookup, PurgeTarget, Purged};
use crate::fill::{FillError, FillSource, Filler, Follow, Span};
use crate::mount::{ForbiddenAs, Mount};
use crate::object::{Fields, ObjectKey, Representation, Revision, Validator};
use crate::origin::Origin;
use crate::payload::Rescue;
use crate::remote::{self, Current, RemoteError, RemoteErrorKind};
use crate::semantics::precondition::Method;
use crate::semantics::{
    ByteRange, EntityTagList, RangeSpec, Ranges, RequestHead, Verdict, evaluate,
};

use current::Keys;
use reader::Means;
pub use reader::Reader;

/// What the disk has of the bytes that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: input of a total function")]
pub enum OnDisk {
    /// All of them, under the pinned validator.
    Whole,
    /// Part of them or nothing.
    Lacking,
}

/// What the remote says of the pinned revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed: input of a total function")]
pub enum RemoteSays {
    /// It has not been asked.
    Unasked,
    /// It holds that revision.
    Same,
    /// It holds another.
    Other,
    /// It holds none.
    Absent,
    /// It cannot be reached, throttles or fails, after retries.
    Down,
    /// It does not answer in time.
    Slow,
    /// Its answer contradicts itself or us.
    Lies,
    /// It denies us the read.
    Denied,
    /// It has it, in an archive that has to restore it before anybody can read it.
    Archived,
    /// The bucket is missing or the credentials are wrong.
    Misconfigured,
}

impl RemoteSays {
    fn of(kind: &RemoteErrorKind) -> Self {
        match kind {
            RemoteErrorKind::Mismatch => Self::Other,
            RemoteErrorKind::Absent => Self::Absent,
            RemoteErrorKind::Throttled { .. } | RemoteErrorKind::Unavailable => Self::Down,
            RemoteErrorKind::Timeout => Self::Slow,
            // Unsatisfiable is taken care of where a range is asked for; here it contradicts us.
            RemoteErrorKind::Protocol | RemoteErrorKind::Unsatisfiable { .. } => Self::Lies,
            RemoteErrorKind::Forbidden => Self::Denied,
            RemoteErrorKind::Archived => Self::Archived,
            RemoteErrorKind::Misconfigured => Self::Misconfigured,
        }
    }
}

/// What to do for a pinned request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: output of a total function"
)]
pub enum Outcome {
    /// Serve what the disk holds.
    FromDisk,
    /// Ask the remote, then settle again.
    AskRemote,
    /// Serve, fetching what the disk lacks.
    Serve,
    /// 412.
    PinLost,
    /// 404.
    NotFound,
    /// 503.
    Unavailable,
    /// 504.
    TimedOut,
    /// 502.
    BadGateway,
}

/// The table of DESIGN.md §3. `ask_first`: the request said `no-cache`, so the disk alone may not
/// answer, not even during an outage.
pub fn settle(disk: OnDisk, remote: RemoteSays, ask_first: bool, denied: ForbiddenAs) -> Outcome {
    match remote {
        RemoteSays::Unasked if disk == OnDisk::Whole && !ask_first => Outcome::FromDisk,
        RemoteSays::Unasked => Outcome::AskRemote,
        RemoteSays::Same => Outcome::Serve,
        RemoteSays::Other => Outcome::PinLost,
        RemoteSays::Absent => Outcome::NotFound,
        RemoteSays::Down => Outcome::Unavailable,
        RemoteSays::Slow => Outcome::TimedOut,
        RemoteSays::Lies | RemoteSays::Archived | RemoteSays::Misconfigured => Outcome::BadGateway,
        RemoteSays::Denied => match denied {
            ForbiddenAs::BadGateway => Outcome::BadGateway,
            ForbiddenAs::NotFound => Outcome::NotFound,
        },
    }
}

/// A request that is not answered with the object.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: respond gives each a status"
)]
pub enum Refusal {
    /// No tier holds the pinned revision, and every tier could be asked.
    PinLost {
        /// What is current, where that is known.
        current: Option<Validator>,
    },
    /// The remote says there is no such object.
    NotFound {
        /// It was asked on behalf of this request; `false`: it said so less than `fresh_for` ago.
        asked: bool,
    },
    /// An outage: come back.
    Unavailable {
        /// When.
        retry_after: Duration,
        /// For the log.
        cause: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The remote did not answer in time.
    TimedOut {
        /// For the log.
        cause: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The remote lies or denies us.
    BadGateway {
        /// Which of the two, and how.
        says: RemoteSays,
        /// For the log.
        cause: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// What became of a request on its way through the tiers, for `Cache-Status`, `Server-Timing`, the
/// log and the metrics.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, each a parameter of a field"
)]
pub struct Trace {
    /// Why the remote was asked; `None`: a hit.
    pub forwarded: Option<Forwarded>,
    /// Waited for what other requests had asked the remote for.
    pub shared: bool,
    /// Asked the remote for something itself.
    pub own: bool,
    /// What was fetched goes to the disk.
    pub stored: bool,
    /// Answered from what is held because the remote could not be asked.
    pub stale: bool,
    /// The remote said that what is held is still current.
    pub confirmed: bool,
    /// The label is fresh and nothing is held under it. Where the answer has no body, as to a HEAD, the
    /// label is all that it takes.
    pub remembered: bool,
    /// Waited for the byte budget of the fills.
    pub queued: Duration,
    /// Waited for the remote, until its first byte.
    pub remote: Duration,
    /// Spent in the disk tier.
    pub disk: Duration,
}

impl Trace {
    /// RFC 9211 `collapsed`: all the fetching was shared with others.
    pub fn is_collapsed(&self) -> bool {
        self.shared && !self.own
    }

    fn joined(&mut self, follow: &Follow) {
        if follow.collapsed {
            self.shared = true;
        } else {
            self.own = true;
        }
        self.queued = self.queued.max(follow.queued());
    }
}

/// RFC 9211 `fwd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: RFC 9211 §2.2, as far as it is used"
)]
pub enum Forwarded {
    /// Nothing of it was held.
    Miss,
    /// Part of it was held.
    Partial,
    /// What was held had to be revalidated.
    Stale,
    /// The request asked for it (`no-cache`).
    Request,
}

/// A request that can be answered with the object.
pub struct Opened {
    /// What is answered with.
    pub representation: Arc<Representation>,
    /// The header fields that say what it is.
    pub fields: Fields,
    /// What [`evaluate`] said: decides the status.
    pub verdict: Verdict,
    /// Where a body's bytes come from; `None` where there is no body.
    pub reader: Option<Reader>,
    /// How it came about.
    pub trace: Trace,
}

/// A pinned range that the disk answered from one file, to answer others of the same revision by.
pub struct Warm {
    means: Arc<Means>,
    representation: Arc<Representation>,
    /// The header fields of the revision.
    pub fields: Fields,
}

impl Warm {
    /// Length of the object in bytes.
    pub fn size(&self) -> u64 {
        self.representation.size
    }

    /// Whether the same requests can be answered by it: of an object that both are of.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.representation, &other.representation)
            && Arc::ptr_eq(&self.fields, &other.fields)
    }

    /// What to turn to where a file fails.
    pub fn rescue(&self) -> Arc<dyn Rescue> {
        Arc::clone(&self.means) as Arc<dyn Rescue>
    }
}

impl Opened {
    /// To answer further ranges by with [`Tiers::again`]; `None` unless this is one range, and the disk has it in one open
    /// file.
    pub fn warm(&self) -> Option<Warm> {
        let Verdict::Partial(_) = self.verdict else {
            return None;
        };
        Some(Warm {
            means: Arc::clone(self.reader.as_ref()?.means_of_whole()?),
            representation: Arc::clone(&self.representation),
            fields: Arc::clone(&self.fields),
        })
    }
}

/// One request for one object.
pub struct Get<'a> {
    /// Which mount.
    pub mount: &'a Arc<Mount>,
    /// The decoded key, without the mount's prefix.
    pub key: &'a str,
    /// Method, conditions, ranges.
    pub head: &'a RequestHead<'a>,
    /// `Cache-Control: no-cache`: ask the remote first.
    pub no_cache: bool,
    /// When it came.
    pub started: Instant,
}

/// How the tiers behave.
#[derive(Clone, Copy, Debug)]
pub struct TierSettings {
    /// Parallel reads that one response keeps going.
    pub fan_out: usize,
    /// Bytes: the most one GET asks for.
    pub part_size: u64,
}

/// Disk, then remote. One per replica.
pub struct Tiers {
    disk: Arc<DiskTier>,
    filler: Arc<Filler>,
    settings: TierSettings,
    keys: Keys,
}

/// The object of a request: what every step below needs.
struct Target<'a> {
    key: ObjectKey,
    get: &'a Get<'a>,
}

impl Target<'_> {
    fn source(&self, validator: Validator, known: Option<Arc<Representation>>) -> FillSource {
        FillSource {
            revision: Revision {
                key: self.key.clone(),
                validator,
            },
            remote: Arc::clone(&self.get.mount.remote),
            known,
            retries: self.get.mount.retries,
        }
    }

    fn revision(&self, representation: &Representation) -> Revision {
        Revision {
            key: self.key.clone(),
            validator: representation.validator.clone(),
        }
    }
}

/// The most of the remote's `Retry-After` that is passed on: a typing error there is not to send clients away for years.
const LONGEST_RETRY_AFTER: Duration = Duration::from_hours(1);

/// How often an unpinned request starts again because the object changed between the label and the bytes.
const RELABELS: usize = 5;

impl Tiers {
    /// Tiers over these parts.
    pub fn new(disk: Arc<DiskTier>, filler: Arc<Filler>, settings: TierSettings) -> Arc<Self> {
        Arc::new(Self {
            disk,
            filler,
            settings,
            keys: Keys::default(),
        })
    }

    /// Answers one request, as far as its first byte.
    pub async fn open(self: &Arc<Self>, get: &Get<'_>) -> Result<Opened, Refusal> {
        let target = Target {
            key: get.mount.key(get.key),
            get,
        };
        if let Some(pin) = get.head.single_pin().and_then(Validator::from_pin) {
            return self.open_pinned(&target, pin).await;
        }
        if let Some(opened) = Box::pin(self.open_listed(&target)).await {
            return Ok(opened);
        }
        let mut relabels = 0;
        loop {
            // Boxed, as all that a warm request has no need of: it is not to carry the size.
            let current = Box::pin(self.current(&target)).await?;
            let label = current.representation.validator.clone();
            let verdict = evaluate(get.head, &current.representation.metadata());
            let served = self.serve(
                &target,
                current.representation,
                verdict,
                current.held,
                current.trace,
            );
            match Box::pin(served).await {
                Ok(opened) => return Ok(opened),
                Err(error) => {
                    if let Some(RemoteErrorKind::Mismatch) = error.remote_kind() {
                        // It was replaced between the label and the bytes.
                        self.keys.distrust(&target.key, &label);
                        relabels += 1;
                        if relabels < RELABELS {
                            continue;
                        }
                        return Err(Refusal::Unavailable {
                            retry_after: Duration::from_secs(1),
                            cause: Arc::new(error),
                        });
                    }
                    return Err(self.refuse(&target, error));
                }
            }
        }
    }

    /// What [`open`](Self::open) would answer with, were the request that [`Warm`] comes from made again for bytes `first` to
    /// `last`: the request's conditions hold of the same representation as they held before. `None`: it may be something
    /// else. Memory only, no I/O.
    pub fn again(&self, warm: &Warm, first: u64, last: u64) -> Option<(ByteRange, FileExtent)> {
        let Lookup::Held(held) = self.disk.lookup(&warm.means.source.revision) else {
            return None;
        };
        if !held.is_described_by(&warm.representation, &warm.fields) {
            return None;
        }
        let asked = RangeSpec::Closed { first, last };
        let range = asked.resolve(warm.representation.size)?;
        Some((range, held.extent(range)?))
    }

    /// A pin to one revision. Nothing is ever asked that the disk can answer.
    async fn open_pinned(&self, target: &Target<'_>, pin: Validator) -> Result<Opened, Refusal> {
        let head = target.get.head;
        let source = target.source(pin, None);
        let held = self.held(&source.revision).await;
        let mut trace = Trace {
            disk: target.get.started.elapsed(),
            ..Trace::default()
        };

        if let Some(held) = &held {
            let (representation, fields) = held.described();
            let verdict = evaluate(head, &representation.metadata());
            let ranges = wanted(&verdict, representation.size, head.method);
            // One look finds most answers: one range, all of it in one open file.
            let extent = match ranges[..] {
                [range] => held.extent(range),
                _ => None,
            };
            let on_disk = if extent.is_some() || covers(held, &verdict, &ranges, head.method) {
                OnDisk::Whole
            } else {
                trace.forwarded = Some(Forwarded::Partial);
                OnDisk::Lacking
            };
            let outcome = settle(
                on_disk,
                RemoteSays::Unasked,
                target.get.no_cache,
                target.get.mount.forbidden,
            );
            if outcome == Outcome::FromDisk {
                let held = Some(Arc::clone(held));
                let Some(extent) = extent else {
                    let served = self.serve(target, representation, verdict, held, trace);
                    return Box::pin(served)
                        .await
                        .map_err(|error| self.refuse(target, error));
                };
                let source = FillSource {
                    known: Some(Arc::clone(&representation)),
                    ..source
                };
                let filler = Arc::clone(&self.filler);
                return Ok(Opened {
                    representation,
                    fields,
                    verdict,
                    reader: Some(Reader::whole(filler, self.settings, source, held, extent)),
                    trace,
                });
            }
        }

        if target.get.no_cache {
            trace.forwarded = Some(Forwarded::Request);
        } else if trace.forwarded.is_none() {
            trace.forwarded = Some(Forwarded::Miss);
        }
        let asked = Box::pin(self.ask_pinned(target, &source, held, &mut trace)).await;
        let answer = match asked {
            Ok((representation, held)) => {
                let verdict = evaluate(head, &representation.metadata());
                let served = self.serve(target, representation, verdict, held, trace);
                Box::pin(served).await
            }
            Err(error) => Err(error),
        };
        answer.map_err(|error| self.refuse(target, error))
    }

    /// Learns from the remote what a pinned request needs before it can be evaluated: with HEAD or
    /// `no-cache` whether the revision is (still) there, else the revision's metadata, by the first
    /// guarded read itself.
    async fn ask_pinned(
        &self,
        target: &Target<'_>,
        source: &FillSource,
        held: Option<Arc<HeldRevision>>,
        trace: &mut Trace,
    ) -> Result<(Arc<Representation>, Option<Arc<HeldRevision>>), OpenError> {
        let started = Instant::now();
        let era = self.filler.era();
        let head = target.get.head;
        let result = match held {
            Some(held) if head.method == Method::Get && !target.get.no_cache => {
                // `serve` reads what is missing, guarded.
                Ok((held.representation(), Some(held)))
            }
            held if head.method == Method::Head || held.is_some() => {
                let representation =
                    Arc::new(self.stat_pinned(target, source, held.as_deref()).await?);
                if let Some(held) = &held {
                    renew(held, &representation)?;
                }
                Ok((representation, held))
            }
            _ => self.first_guarded_read(target, source, trace).await,
        };
        trace.remote += started.elapsed();
        match result {
            Ok((representation, None)) => {
                let held = self.hold_empty(target, &representation, era, trace).await;
                Ok((representation, held))
            }
            result => result,
        }
    }

    /// What the remote said in `era` is held if there are no bytes to it. All others are held with their first bytes.
    async fn hold_empty(
        &self,
        target: &Target<'_>,
        representation: &Arc<Representation>,
        era: u64,
        trace: &mut Trace,
    ) -> Option<Arc<HeldRevision>> {
        if representation.size > 0 {
            return None;
        }
        let held = self
            .filler
            .hold_empty(&target.key, representation, era)
            .await;
        trace.stored |= held.is_some();
        held
    }

    async fn stat_pinned(
        &self,
        target: &Target<'_>,
        source: &FillSource,
        held: Option<&HeldRevision>,
    ) -> Result<Representation, OpenError> {
        let pin = &source.revision.validator;
        let known = held.map(HeldRevision::representation);
        if let Some(known) = known.filter(|known| known.version_id.is_some() && known.size > 0) {
            // HEAD asks for the current version; what a GET could deliver is the one we know.
            let guard = FillSource {
                known: Some(known),
                ..source.clone()
            }
            .guard();
            let want = RangeSpec::Closed { first: 0, last: 0 };
            let read = self.origin(target).read(&guard, want).await?;
            return Ok(read.representation);
        }
        Ok(self.stat(target, Some(pin)).await?)
    }

    /// HEAD of the current revision, or with `pin` of that one. Where a 403 means that the key is missing, a GET of one byte has
    /// to say so too: S3's answer to a HEAD has no body that could tell a key that is missing from credentials that are wrong.
    async fn stat(
        &self,
        target: &Target<'_>,
        pin: Option<&Validator>,
    ) -> Result<Representation, RemoteError> {
        let (origin, key) = (self.origin(target), target.key.key());
        let error = match origin.stat(key, pin).await {
            Err(error) if error.kind == RemoteErrorKind::Forbidden => error,
            answer => return answer,
        };
        if target.get.mount.forbidden != ForbiddenAs::NotFound {
            return Err(error);
        }
        let want = RangeSpec::Closed { first: 0, last: 0 };
        match pin {
            Some(pin) => {
                let guard = target.source(pin.clone(), None).guard();
                Ok(origin.read(&guard, want).await?.representation)
            }
            None => match origin.read_current(key, Some(want), None).await? {
                Current::Read(read) => Ok(read.representation),
                Current::NotModified { .. } => Err(error),
            },
        }
    }

    /// The first read of a revision of which nothing is known but its validator. It is a fill like any
    /// other; its answer says how long the object is.
    async fn first_guarded_read(
        &self,
        target: &Target<'_>,
        source: &FillSource,
        trace: &mut Trace,
    ) -> Result<(Arc<Representation>, Option<Arc<HeldRevision>>), OpenError> {
        trace.stored = true;
        let answered = match self.first_want(target.get.head) {
            FirstWant::Span(span) => {
                let mut follows = self.filler.join(source, None, span, 1);
                match follows.first_mut() {
                    Some(follow) => {
                        trace.joined(follow);
                        follow.answered().await.map(|answered| answered.held)
                    }
                    None => return self.known_or_gone(source).await,
                }
            }
            FirstWant::Suffix(length) => {
                let guard = source.guard();
                let want = RangeSpec::Suffix(length);
                let state = self.keys.of(&target.key);
                let _turn = state.turn().await;
                if let Some(held) = self.held(&source.revision).await {
                    return Ok((held.representation(), Some(held)));
                }
                let era = self.filler.era();
                trace.own = true;
                match self.origin(target).read(&guard, want).await {
                    Ok(read) => {
                        let known = Arc::new(read.representation.clone());
                        let source = FillSource {
                            known: Some(Arc::clone(&known)),
                            ..source.clone()
                        };
                        let follow = self.filler.adopt(&source, read, era);
                        let held = match follow {
                            Some(mut follow) => follow.answered().await.ok(),
                            None => None,
                        };
                        return Ok((known, held.map(|answered| answered.held)));
                    }
                    Err(error) => Err(FillError::Remote(error)),
                }
            }
        };
        match answered {
            Ok(held) => Ok((held.representation(), Some(held))),
            Err(FillError::Remote(error))
                if matches!(error.kind, RemoteErrorKind::Unsatisfiable { .. }) =>
            {
                // The range begins beyond the end. Only metadata is needed to say so properly.
                let stat = Arc::new(self.stat_pinned(target, source, None).await?);
                trace.stored = false;
                Ok((stat, None))
            }
            Err(FillError::Disk(_)) => {
                trace.stored = false;
                // The disk is of no help; one request more for the metadata, then past it.
                let stat = self.stat_pinned(target, source, None).await?;
                Ok((Arc::new(stat), None))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn known_or_gone(
        &self,
        source: &FillSource,
    ) -> Result<(Arc<Representation>, Option<Arc<HeldRevision>>), OpenError> {
        let held = self
            .held(&source.revision)
            .await
            .ok_or(FillError::Stopped)?;
        Ok((held.representation(), Some(held)))
    }

    /// `If-Match` with several tags: a held one that covers the range answers without asking
    /// anybody. Else the request is judged by what is current.
    async fn open_listed(&self, target: &Target<'_>) -> Option<Opened> {
        let tags = target.get.head.if_match.as_ref()?.tags();
        if target.get.no_cache {
            return None;
        }
        for pin in tags.iter().copied().filter_map(Validator::from_pin) {
            let revision = Revision {
                key: target.key.clone(),
                validator: pin,
            };
            let Some(held) = self.held(&revision).await else {
                continue;
            };
            let representation = held.representation();
            let verdict = evaluate(target.get.head, &representation.metadata());
            let method = target.get.head.method;
            let ranges = wanted(&verdict, representation.size, method);
            if covers(&held, &verdict, &ranges, method)
                && let Ok(opened) = self
                    .serve(
                        target,
                        representation,
                        verdict,
                        Some(held),
                        Trace::default(),
                    )
                    .await
            {
                return Some(opened);
            }
        }
        None
    }

    /// Gets the first bytes of what the request is to be answered with.
    async fn serve(
        &self,
        target: &Target<'_>,
        representation: Arc<Representation>,
        verdict: Verdict,
        held: Option<Arc<HeldRevision>>,
        mut trace: Trace,
    ) -> Result<Opened, OpenError> {
        if let Some(held) = &held {
            check_length(held, &representation)?;
        }
        let ranges = wanted(&verdict, representation.size, target.get.head.method);
        let fields = representation.fields();
        let reader = if ranges.is_empty() {
            None
        } else {
            let source = target.source(
                representation.validator.clone(),
                Some(Arc::clone(&representation)),
            );
            let mut reader = Reader::new(Arc::clone(&self.filler), self.settings, source, held);
            let hold_back = tracing::debug_span!("hold_back");
            reader
                .prepare(&ranges, &mut trace)
                .instrument(hold_back)
                .await?;
            Some(reader)
        };
        Ok(Opened {
            representation,
            fields,
            verdict,
            reader,
            trace,
        })
    }

    /// Where the first read of an unknown representation begins, and how much it asks for.
    fn first_want(&self, head: &RequestHead<'_>) -> FirstWant {
        let block = self.disk.block_size();
        let part = self.settings.part_size;
        let whole = |start: u64| {
            let start = start - start % block;
            FirstWant::Span(Span {
                start,
                end: start.saturating_add(part),
            })
        };
        let first = head.range.as_ref().and_then(|ranges| ranges.first());
        let bounded = match first {
            None => whole(0),
            Some(RangeSpec::From(first)) => whole((*first).min(FARTHEST)),
            Some(RangeSpec::Closed { first, last }) => {
                let first = (*first).min(FARTHEST);
                let end = last.saturating_add(1).clamp(first + 1, FARTHEST + block);
                FirstWant::Span(self.filler.part_at(Span { start: first, end }))
            }
            // A block more, so that the block in which the suffix begins comes whole.
            Some(RangeSpec::Suffix(length)) => {
                FirstWant::Suffix((*length).clamp(1, part).saturating_add(block - 1))
            }
        };
        match bounded {
            // Whether there will be a body hangs on the answer: a block is enough to judge by.
            FirstWant::Span(span) if head.is_undecided() => FirstWant::Span(Span {
                start: span.start,
                end: span.end.min(span.start + block),
            }),
            bounded => bounded,
        }
    }

    /// The revision, if the disk tier knows it.
    async fn held(&self, revision: &Revision) -> Option<Arc<HeldRevision>> {
        match self.disk.lookup(revision) {
            Lookup::Held(held) => Some(held),
            Lookup::Unknown => Box::pin(self.disk.load(revision)).await,
        }
    }

    /// The way to the target's remote.
    fn origin(&self, target: &Target<'_>) -> Origin {
        let mount = target.get.mount;
        self.filler.origins().origin(&mount.remote, mount.retries)
    }

    /// What the client is told, and what we learn from it.
    fn refuse(&self, target: &Target<'_>, error: OpenError) -> Refusal {
        let remote = match error.remote_kind() {
            Some(kind) => RemoteSays::of(kind),
            None => RemoteSays::Down,
        };
        let retry_after = match error.remote_kind() {
            Some(RemoteErrorKind::Throttled {
                retry_after: Some(wait),
            }) => (*wait).min(LONGEST_RETRY_AFTER),
            _ => Duration::from_secs(1),
        };
        let denied = target.get.mount.forbidden;
        match settle(OnDisk::Lacking, remote, true, denied) {
            Outcome::PinLost => {
                let pin = target.get.head.single_pin().and_then(Validator::from_pin);
                if let Some(pin) = &pin {
                    self.keys.distrust(&target.key, pin);
                }
                let current = self
                    .keys
                    .believed(&target.key)
                    .filter(|now| Some(now) != pin.as_ref());
                Refusal::PinLost { current }
            }
            Outcome::NotFound => {
                if remote == RemoteSays::Absent {
                    self.keys.distrust_all(&target.key);
                }
                Refusal::NotFound { asked: true }
            }
            Outcome::TimedOut => Refusal::TimedOut {
                cause: Arc::new(error),
            },
            Outcome::BadGateway => Refusal::BadGateway {
                says: remote,
                cause: Arc::new(error),
            },
            Outcome::Unavailable | Outcome::FromDisk | Outcome::AskRemote | Outcome::Serve => {
                Refusal::Unavailable {
                    retry_after,
                    cause: Arc::new(error),
                }
            }
        }
    }

    /// Forgets every revision of a key, or of all keys below a prefix (`every`): gone from memory,
    /// from the disk and from fills under way when this returns.
    pub async fn purge(&self, mount: &Mount, key: &str, every: bool) -> Result<Purged, DiskError> {
        let named = mount.key(key);
        let matches = |candidate: &ObjectKey| {
            if every {
                candidate.store() == named.store() && candidate.key().starts_with(named.key())
            } else {
                *candidate == named
            }
        };
        self.keys.forget(matches);
        self.filler.forget(|revision| matches(&revision.key));
        let target = if every {
            PurgeTarget::Prefix {
                store: Arc::clone(mount.remote.store()),
                prefix: named.key().to_owned(),
            }
        } else {
            PurgeTarget::Key(named.clone())
        };
        self.disk.purge(target).await
    }
}

/// No object is longer (S3: 50 TB), and offsets below it never overflow.
const FARTHEST: u64 = 1 << 62;

enum FirstWant {
    Span(Span),
    Suffix(u64),
}

/// What stands in the way of an answer, before it is a [`Refusal`].
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("the remote was asked")]
    Remote(#[from] RemoteError),
    #[error("a fill was joined")]
    Fill(#[from] FillError),
    /// Somebody asked for all who waited.
    #[error("the remote was asked by another request")]
    Shared(#[source] Arc<Self>),
}

impl OpenError {
    fn remote_kind(&self) -> Option<&RemoteErrorKind> {
        match self {
            Self::Remote(error) | Self::Fill(FillError::Remote(error)) => Some(&error.kind),
            Self::Fill(FillError::Disk(_) | FillError::Stopped) => None,
            Self::Shared(error) => error.remote_kind(),
        }
    }
}

/// Gives what is held the fields that the remote sent last.
fn renew(held: &HeldRevision, representation: &Arc<Representation>) -> Result<(), RemoteError> {
    check_length(held, representation)?;
    held.update_representation(Arc::clone(representation));
    Ok(())
}

/// Whether what is held can be bytes of what the remote speaks of. Where the same validator names an object of another length,
/// neither is answered with but where nobody has to be asked: whoever got bytes of one is not to get bytes of the other
/// under the same name (P1).
fn check_length(held: &HeldRevision, representation: &Representation) -> Result<(), RemoteError> {
    let validator = &representation.validator;
    remote::check_length("read", validator, Some(held.size()), representation.size)
}

/// The bytes a response's body has; empty where it has none.
fn wanted(verdict: &Verdict, size: u64, method: Method) -> Ranges {
    match (method, verdict) {
        (Method::Get, Verdict::Full) => ByteRange::whole(size).into_iter().collect(),
        (Method::Get, Verdict::Partial(ranges)) => ranges.clone(),
        (Method::Head, _)
        | (_, Verdict::NotModified | Verdict::PreconditionFailed | Verdict::Unsatisfiable) => {
            Ranges::new()
        }
    }
}

/// Whether the disk alone can give the answer, whose body has these ranges. A HEAD speaks for the GET it stands for.
fn covers(held: &HeldRevision, verdict: &Verdict, ranges: &[ByteRange], method: Method) -> bool {
    let is_held = |range: ByteRange| held.first_missing(range).is_none();
    match (method, verdict) {
        (Method::Head, Verdict::Full) => {
            ByteRange::whole(held.representation().size).is_none_or(is_held)
        }
        _ => ranges.iter().copied().all(is_held),
    }
}

impl RequestHead<'_> {
    /// Whether the answer may turn out to have no body once the representation is known.
    fn is_undecided(&self) -> bool {
        let listed = match &self.if_match {
            Some(EntityTagList::Tags(_)) => true,
            Some(EntityTagList::Tag(tag)) => tag.is_weak(),
            Some(EntityTagList::Any) | None => false,
        };
        listed
            || self.if_none_match.is_some()
            || self.if_modified_since.is_some()
            || self.if_unmodified_since.is_some()
    }
}

#[cfg(test)]
mod proof;

#[cfg(test)]
mod tests {
    use super::*;

    /// What is out there, by itself: the truth that `settle` sees only through its inputs.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum S3 {
        HasPinned,
        HasOther,
        HasNothing,
        Unreachable,
        Silent,
        Contradicts,
        Denies,
        HasArchived,
        NoBucket,
    }

    const WORLDS: [S3; 9] = [
        S3::HasPinned,
        S3::HasOther,
        S3::HasNothing,
        S3::Unreachable,
        S3::Silent,
        S3::Contradicts,
        S3::Denies,
        S3::HasArchived,
        S3::NoBucket,
    ];

    fn ask(world: S3) -> RemoteSays {
        match world {
            S3::HasPinned => RemoteSays::Same,
            S3::HasOther => RemoteSays::Other,
            S3::HasNothing => RemoteSays::Absent,
            S3::Unreachable => RemoteSays::Down,
            S3::Silent => RemoteSays::Slow,
            S3::Contradicts => RemoteSays::Lies,
            S3::Denies => RemoteSays::Denied,
            S3::HasArchived => RemoteSays::Archived,
            S3::NoBucket => RemoteSays::Misconfigured,
        }
    }

    /// Walks the decision as `open` does. Also says whether S3 was asked.
    fn walk(disk: OnDisk, world: S3, ask_first: bool, denied: ForbiddenAs) -> (Outcome, bool) {
        match settle(disk, RemoteSays::Unasked, ask_first, denied) {
            Outcome::AskRemote => (settle(disk, ask(world), ask_first, denied), true),
            outcome => (outcome, false),
        }
    }

    /// DESIGN.md §3, «what a pinned GET gets», row by row.
    fn table(disk: OnDisk, world: S3, ask_first: bool, denied: ForbiddenAs) -> Outcome {
        if disk == OnDisk::Whole && !ask_first {
            return Outcome::FromDisk;
        }
        match (world, denied) {
            (S3::HasPinned, _) => Outcome::Serve,
            (S3::HasOther, _) => Outcome::PinLost,
            (S3::HasNothing, _) | (S3::Denies, ForbiddenAs::NotFound) => Outcome::NotFound,
            (S3::Unreachable, _) => Outcome::Unavailable,
            (S3::Silent, _) => Outcome::TimedOut,
            (S3::Contradicts | S3::HasArchived | S3::NoBucket, _)
            | (S3::Denies, ForbiddenAs::BadGateway) => Outcome::BadGateway,
        }
    }

    #[test]
    fn settle_is_the_table() {
        for disk in [OnDisk::Whole, OnDisk::Lacking] {
            for world in WORLDS {
                for ask_first in [false, true] {
                    for denied in [ForbiddenAs::BadGateway, ForbiddenAs::NotFound] {
                        let (outcome, asked) = walk(disk, world, ask_first, denied);
                        let case = format!("{disk:?} {world:?} {ask_first} {denied:?}");
                        assert_eq!(outcome, table(disk, world, ask_first, denied), "{case}");
                        // P5: nobody is asked for what the disk has.
                        assert_eq!(asked, disk == OnDisk::Lacking || ask_first, "{case}");
                        // P4: a pin is lost only where S3 said so.
                        if outcome == Outcome::PinLost {
                            assert_eq!(world, S3::HasOther, "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_outage_is_never_a_lost_pin() {
        for kind in [
            RemoteErrorKind::Throttled { retry_after: None },
            RemoteErrorKind::Unavailable,
            RemoteErrorKind::Timeout,
            RemoteErrorKind::Protocol,
            RemoteErrorKind::Misconfigured,
        ] {
            let says = RemoteSays::of(&kind);
            let outcome = settle(OnDisk::Lacking, says, false, ForbiddenAs::NotFound);
            assert!(
                matches!(
                    outcome,
                    Outcome::Unavailable | Outcome::TimedOut | Outcome::BadGateway
                ),
                "{kind:?} became {outcome:?}"
            );
        }
    }
}
