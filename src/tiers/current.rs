//! What is current: labels, their age, and the one question that is asked at a time per key.
//!
//! A label says which revision a key was at when the remote last said so, or that it was absent. It is
//! fresh for `fresh_for` after the moment the question was *sent*, so an unpinned answer is never
//! further behind than that (P6). When it is not fresh, one request asks (a GET that brings its
//! first bytes along, `If-None-Match` where something is held) and the others wait for its label, or
//! for its failure: an outage is found out once, not by each in turn. A request that its label would refuse
//! (412, or 404 to a pin) asks first, however fresh the label is (P4).
//!
//! A guarded read that fails takes the trust from the label it relied on ([`Keys::distrust`]), so that no client
//! is handed a dead pin twice.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::MutexGuard;
use tokio::time::Instant;

use super::{FirstWant, Forwarded, OpenError, Refusal, Target, Tiers, Trace, renew};
use crate::disk::HeldRevision;
use crate::object::{ObjectKey, Representation, Validator};
use crate::remote::{Current, RemoteErrorKind, RemoteRead};
use crate::seldom::Reason;
use crate::semantics::precondition::Method;
use crate::semantics::{RangeSpec, RequestHead, Verdict, evaluate};

/// Keys whose label is kept in memory. A label costs some hundred bytes, so this is some 20 MiB at
/// the most, whatever strangers ask for (P12); a key that fell out is looked up in the catalog.
const LABELS: NonZeroUsize = NonZeroUsize::new(65_536).expect("not zero");

/// How often an unchanged label is written to the catalog again, or four times in `stale_if_error` where that is shorter:
/// it only has to be right within that after a restart, and a disk hit writes nothing (P7).
const PERSIST_EVERY: Duration = Duration::from_mins(1);

/// A `Last-Modified` this much in the past when it was seen names one upload: it counts whole seconds, and the
/// remote's clock may differ a little from ours.
const SETTLED: Duration = Duration::from_secs(5);

/// What the remote last said of a key.
#[derive(Clone, Debug)]
pub(super) enum Label {
    Present(Arc<Representation>),
    Absent,
}

impl Label {
    /// Whether it would turn down a request that names revisions or a date to be unmodified since.
    fn refuses(&self, head: &RequestHead<'_>) -> bool {
        match self {
            Self::Present(representation) => matches!(
                evaluate(head, &representation.metadata()),
                Verdict::PreconditionFailed
            ),
            Self::Absent => head.if_match.is_some(),
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    /// The label and when it was asked for. `None` as the moment: not to be trusted any more.
    label: Option<(Label, Option<Instant>)>,
    /// When the remote last said so.
    confirmed: Option<Confirmed>,
    persisted: Option<Instant>,
    failed: Option<(Instant, Arc<OpenError>)>,
}

/// When a label was last confirmed. Its age is that of a clock that does not jump, from when this process first heard of it.
#[derive(Clone, Copy, Debug)]
struct Confirmed {
    /// By the wall clock, which outlives a restart.
    at: SystemTime,
    /// How old it was when it was noted.
    age: Duration,
    noted: Instant,
}

impl Confirmed {
    fn now() -> Self {
        Self {
            at: SystemTime::now(),
            age: Duration::ZERO,
            noted: Instant::now(),
        }
    }

    /// What an earlier run wrote down at `at`, by the wall clock. Where that was put back meanwhile, it counts for as old as
    /// it now lies ahead: a step of seconds matters little, and nothing stays young for as long as the clock is behind.
    fn recalled(at: SystemTime, now: SystemTime) -> Self {
        Self {
            at,
            age: now
                .duration_since(at)
                .unwrap_or_else(|ahead| ahead.duration()),
            noted: Instant::now(),
        }
    }

    fn age(&self) -> Duration {
        self.age.saturating_add(self.noted.elapsed())
    }
}

/// One key's label.
#[derive(Debug, Default)]
pub(super) struct KeyState {
    turn: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
}

impl KeyState {
    /// Waits until nobody else asks the remote for this key's label. Cancel safe.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    fn fresh(&self, asked_after: Instant) -> Option<Label> {
        match &self.known.lock().label {
            Some((label, Some(asked))) if *asked >= asked_after => Some(label.clone()),
            _ => None,
        }
    }

    /// A label that would refuse the request counts only if it was asked for on its account: a client that
    /// names a revision uploaded a moment ago is not told that it is lost (P4).
    fn usable(
        &self,
        head: &RequestHead<'_>,
        asked_after: Instant,
        arrived: Instant,
    ) -> Option<Label> {
        self.fresh(asked_after)
            .filter(|label| !label.refuses(head))
            .or_else(|| self.fresh(arrived))
    }

    fn failure_since(&self, arrived: Instant) -> Option<Arc<OpenError>> {
        let known = self.known.lock();
        known
            .failed
            .as_ref()
            .filter(|(when, _)| *when >= arrived)
            .map(|(_, why)| Arc::clone(why))
    }
}

/// The labels of all keys. Bounded; a short lock, never across an await.
pub(super) struct Keys(Mutex<LruCache<ObjectKey, Arc<KeyState>>>);

impl Default for Keys {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(LABELS)))
    }
}

impl Keys {
    pub(super) fn of(&self, key: &ObjectKey) -> Arc<KeyState> {
        let mut keys = self.0.lock();
        if let Some(state) = keys.get(key) {
            return Arc::clone(state);
        }
        let state = Arc::new(KeyState::default());
        keys.put(key.clone(), Arc::clone(&state));
        state
    }

    /// The revision that the key is believed to be at.
    pub(super) fn believed(&self, key: &ObjectKey) -> Option<Validator> {
        let state = self.0.lock().peek(key).map(Arc::clone)?;
        let known = state.known.lock();
        match &known.label {
            Some((Label::Present(representation), Some(_))) => {
                Some(representation.validator.clone())
            }
            _ => None,
        }
    }

    /// The remote no longer has `validator`: a label that says so is asked for again.
    pub(super) fn distrust(&self, key: &ObjectKey, validator: &Validator) {
        if let Some(state) = self.0.lock().peek(key)
            && let Some((Label::Present(representation), trusted)) = &mut state.known.lock().label
            && representation.validator == *validator
        {
            *trusted = None;
        }
    }

    /// The key is gone at the remote: whatever the label says is asked for again.
    pub(super) fn distrust_all(&self, key: &ObjectKey) {
        if let Some(state) = self.0.lock().peek(key)
            && let Some((Label::Present(_), trusted)) = &mut state.known.lock().label
        {
            *trusted = None;
        }
    }

    /// Forgets the labels of the keys that `matches` says.
    pub(super) fn forget(&self, matches: impl Fn(&ObjectKey) -> bool) {
        let mut keys = self.0.lock();
        let doomed: Vec<_> = keys
            .iter()
            .map(|(key, _)| key)
            .filter(|key| matches(key))
            .cloned()
            .collect();
        for key in doomed {
            keys.pop(&key);
        }
    }
}

/// The current revision, as it answers one request.
pub(super) struct CurrentRevision {
    pub(super) representation: Arc<Representation>,
    pub(super) held: Option<Arc<HeldRevision>>,
    pub(super) trace: Trace,
}

impl Tiers {
    /// The current revision of the target: from its label if that is fresh, else from the remote, else,
    /// while the remote cannot be asked, what is held.
    pub(super) async fn current(&self, target: &Target<'_>) -> Result<CurrentRevision, Refusal> {
        let arrived = Instant::now();
        let mount = target.get.mount;
        let state = self.keys.of(&target.key);
        let asked_after = if target.get.no_cache {
            arrived
        } else {
            arrived.checked_sub(mount.fresh_for).unwrap_or(arrived)
        };
        let head = target.get.head;
        if let Some(label) = state.usable(head, asked_after, arrived) {
            return self.by_label(target, label, Trace::default()).await;
        }
        let _turn = state.turn().await;
        let mut trace = Trace {
            shared: true,
            ..Trace::default()
        };
        if let Some(label) = state.usable(head, asked_after, arrived) {
            trace.forwarded = Some(Forwarded::Stale);
            trace.remote = arrived.elapsed();
            return self.by_label(target, label, trace).await;
        }
        if let Some(error) = state.failure_since(arrived) {
            return self.while_unreachable(target, &state, &error, trace).await;
        }
        trace.shared = false;
        trace.own = true;
        let asked = Instant::now();
        match self.ask_current(target, &state, &mut trace).await {
            Ok(current) => {
                trace.remote = asked.elapsed();
                Ok(CurrentRevision { trace, ..current })
            }
            Err(error) => {
                let error = Arc::new(error);
                match error.remote_kind() {
                    Some(RemoteErrorKind::Absent) => {
                        let mut known = state.known.lock();
                        *known = Known {
                            label: Some((Label::Absent, Some(asked))),
                            ..Known::default()
                        };
                        drop(known);
                        self.disk.set_current(&target.key, None);
                    }
                    _ => state.known.lock().failed = Some((Instant::now(), Arc::clone(&error))),
                }
                self.while_unreachable(target, &state, &error, trace).await
            }
        }
    }

    async fn by_label(
        &self,
        target: &Target<'_>,
        label: Label,
        mut trace: Trace,
    ) -> Result<CurrentRevision, Refusal> {
        match label {
            Label::Absent => Err(Refusal::NotFound {
                asked: trace.shared,
            }),
            Label::Present(representation) => {
                let held = self.held(&target.revision(&representation)).await;
                trace.remembered = held.is_none();
                Ok(CurrentRevision {
                    representation,
                    held,
                    trace,
                })
            }
        }
    }

    /// What was last known to be current, and when: from memory, else from the catalog.
    async fn last_label(
        &self,
        target: &Target<'_>,
        state: &KeyState,
    ) -> Option<(Arc<Representation>, Confirmed)> {
        {
            let known = state.known.lock();
            if let (Some((label, _)), Some(confirmed)) = (&known.label, known.confirmed) {
                return match label {
                    Label::Present(representation) => Some((Arc::clone(representation), confirmed)),
                    Label::Absent => None,
                };
            }
        }
        let record = self.disk.last_current(&target.key).await?;
        let confirmed = Confirmed::recalled(record.checked_at, SystemTime::now());
        let mut known = state.known.lock();
        if known.label.is_none() {
            // Not to be asked of the wall clock again. Nobody trusts it.
            let label = Label::Present(Arc::clone(&record.representation));
            known.label = Some((label, None));
            known.confirmed = Some(confirmed);
        }
        Some((record.representation, confirmed))
    }

    /// Asks the remote. The one who asks holds the key's turn.
    async fn ask_current(
        &self,
        target: &Target<'_>,
        state: &KeyState,
        trace: &mut Trace,
    ) -> Result<CurrentRevision, OpenError> {
        let era = self.filler.era();
        let asked = Instant::now();
        let last = self.last_label(target, state).await;
        let held = match &last {
            Some((representation, _)) => self.held(&target.revision(representation)).await,
            None => None,
        };
        trace.forwarded = Some(match (&held, target.get.no_cache) {
            (_, true) => Forwarded::Request,
            (Some(_), false) => Forwarded::Stale,
            (None, false) => Forwarded::Miss,
        });
        let (representation, read) = if target.get.head.method == Method::Head {
            let stat = self.stat(target, None).await?;
            (Arc::new(stat), None)
        } else {
            let unless = held.as_ref().map(|held| held.revision().validator.clone());
            match self.read_label(target, unless.as_ref()).await? {
                Current::Read(read) => (Arc::new(read.representation.clone()), Some(read)),
                Current::NotModified { last_modified } => {
                    let (held, last) = held
                        .as_ref()
                        .zip(last)
                        .expect("If-None-Match is sent for what is held");
                    trace.confirmed = true;
                    (
                        self.confirmed(target, held, last_modified, last.1.at)
                            .await?,
                        None,
                    )
                }
            }
        };

        let mut current_held =
            held.filter(|held| held.revision().validator == representation.validator);
        if current_held.is_none() {
            // It may be one that was held before: its bytes need not be fetched again.
            current_held = self.held(&target.revision(&representation)).await;
        }
        if let Some(held) = &current_held {
            renew(held, &representation)?;
        }
        if let Some(read) = read {
            let source = target.source(
                representation.validator.clone(),
                Some(Arc::clone(&representation)),
            );
            if let Some(mut follow) = self.filler.adopt(&source, read, era) {
                // The hold-back waits for its bytes; a disk that cannot take them is found out there.
                if let Ok(answered) = follow.answered().await {
                    trace.stored = true;
                    current_held = Some(answered.held);
                }
            }
        }
        if current_held.is_none() {
            current_held = self.hold_empty(target, &representation, era, trace).await;
        }
        // What was asked for before a purge is not kept after it.
        if self.filler.era() == era {
            self.remember(target, state, &representation, asked);
        }
        Ok(CurrentRevision {
            representation,
            held: current_held,
            trace: Trace::default(),
        })
    }

    /// The read that labels itself. Its bytes are the beginning of what the request wants.
    async fn read_label(
        &self,
        target: &Target<'_>,
        unless: Option<&Validator>,
    ) -> Result<Current, OpenError> {
        let key = target.key.key();
        let want = self.label_want(target.get.head);
        let origin = self.origin(target);
        let size = match origin.read_current(key, Some(want), unless).await {
            Ok(current) => return Ok(current),
            Err(error) => match error.kind {
                RemoteErrorKind::Unsatisfiable { size } => size,
                _ => return Err(error.into()),
            },
        };
        // Either the object is empty, or the range begins beyond its end.
        if size.is_none_or(|size| size == 0) {
            return Ok(origin.read_current(key, None, unless).await?);
        }
        Ok(Current::Read(RemoteRead {
            representation: self.stat(target, None).await?,
            range: None,
            body: Box::pin(futures::stream::empty()),
        }))
    }

    fn label_want(&self, head: &RequestHead<'_>) -> RangeSpec {
        match self.first_want(head) {
            FirstWant::Span(span) => RangeSpec::Closed {
                first: span.start,
                last: span.end - 1,
            },
            FirstWant::Suffix(length) => RangeSpec::Suffix(length),
        }
    }

    /// The remote said 304. The bytes are the same; the fields that pass through may not be: equal bytes
    /// uploaded again keep the `ETag` and may change them, which `Last-Modified` betrays unless it
    /// was within the same second.
    async fn confirmed(
        &self,
        target: &Target<'_>,
        held: &HeldRevision,
        last_modified: Option<SystemTime>,
        last_confirmed: SystemTime,
    ) -> Result<Arc<Representation>, OpenError> {
        let stored = held.representation();
        if let Some(last_modified) = last_modified
            && Some(last_modified) == stored.last_modified
            && last_confirmed
                .duration_since(last_modified)
                .is_ok_and(|age| age > SETTLED)
        {
            return Ok(stored);
        }
        Ok(Arc::new(self.stat(target, None).await?))
    }

    fn remember(
        &self,
        target: &Target<'_>,
        state: &KeyState,
        representation: &Arc<Representation>,
        asked: Instant,
    ) {
        let mut known = state.known.lock();
        let unchanged = matches!(
            &known.label,
            Some((Label::Present(before), _)) if before.validator == representation.validator
        );
        let every = PERSIST_EVERY.min(target.get.mount.stale_if_error / 4);
        let persist = !unchanged || known.persisted.is_none_or(|last| last.elapsed() > every);
        *known = Known {
            label: Some((Label::Present(Arc::clone(representation)), Some(asked))),
            confirmed: Some(Confirmed::now()),
            persisted: if persist {
                Some(asked)
            } else {
                known.persisted
            },
            failed: None,
        };
        drop(known);
        if persist {
            self.disk.set_current(&target.key, Some(representation));
        }
    }

    /// What is held may answer for a while, marked as stale; then the client is told of the outage.
    async fn while_unreachable(
        &self,
        target: &Target<'_>,
        state: &KeyState,
        error: &Arc<OpenError>,
        mut trace: Trace,
    ) -> Result<CurrentRevision, Refusal> {
        let outage = error
            .remote_kind()
            .is_some_and(RemoteErrorKind::is_retryable);
        if outage
            && !target.get.no_cache
            && let Some((representation, confirmed)) = self.last_label(target, state).await
            && confirmed.age() <= target.get.mount.stale_if_error
            && let Some(held) = self.held(&target.revision(&representation)).await
            // An outage outranks 412 (P4).
            && !Label::Present(Arc::clone(&representation)).refuses(target.get.head)
        {
            trace.stale = true;
            trace.forwarded = Some(Forwarded::Stale);
            target
                .get
                .mount
                .log_failure(Reason::Unavailable, &**error, None);
            return Ok(CurrentRevision {
                representation,
                held: Some(held),
                trace,
            });
        }
        Err(self.refuse(target, OpenError::Shared(Arc::clone(error))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_makes_nothing_young_for_ever() {
        let noon = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
        for (seconds_later, age) in [(0, 0), (90, 90), (-3, 3), (-86_400, 86_400)] {
            let off = Duration::from_secs(i64::unsigned_abs(seconds_later));
            let now = if seconds_later < 0 {
                noon - off
            } else {
                noon + off
            };
            let confirmed = Confirmed::recalled(noon, now);
            assert_eq!(confirmed.age(), Duration::from_secs(age));
            // Whatever the wall clock says from now on.
            tokio::time::advance(Duration::from_secs(100)).await;
            assert_eq!(confirmed.age(), Duration::from_secs(age + 100));
        }
        let confirmed = Confirmed::now();
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(confirmed.age(), Duration::from_secs(100));
    }
}
