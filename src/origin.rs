//! Patience with the remote: what asking again can mend is mended here, and nowhere else.
//!
//! ```text
//!              S3 said Retry-After?       head late?          body resets, ends short,
//!              wait it out, or refuse     a second GET        stalls or drips
//!                     │                       │                     │
//!   stat ─────────────┤                       │                     │
//!   read_current ─────┼──▶ attempt ──────┐    │                     │
//!   read, download ───┴──▶ attempt ──────┴─ hedged ──▶ Download ── frames ──▶ resumed at the exact
//!                             ▲                                       │        offset, same If-Match
//!                             └── Patience: count, budget, back-off ◀─┘
//! ```
//!
//! [`Origins`] is one per replica and holds the budget of retries, so that an outage of S3 does not
//! become a storm of ours. Below it stands a `Store` per endpoint and bucket, shared by the mounts
//! of one bucket: how long first bytes and stretches of bodies take there, the budget of second GETs, and
//! until when it asked to be left alone. An [`Origin`] is one caller's way to a store, with the retries that
//! its mount allows. Why the numbers are what they are: ADR 10.
//!
//! What is never done: a read without the guard it began with, a byte that did not come from the guarded
//! revision (a changed object ends the [`Download`]), a second GET for a read that labels itself (two answers could
//! be of two revisions) or for a HEAD (nothing waits for its bytes).
//!
//! **Cancellation.** Dropping a future or a [`Download`] abandons its connections and leaves nothing behind.

mod download;
mod observed;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{Either, select};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::causes::one_line;
use crate::chance;
use crate::object::{Representation, Validator};
use crate::remote::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead};
use crate::semantics::RangeSpec;
use crate::telemetry::Metrics;

pub use self::download::Download;
use self::observed::{Bucket, Distribution};

/// Whether an answer is still wanted: asked before anything is tried again.
pub type Wanted<'a> = &'a (dyn Fn() -> bool + Sync);

/// For callers whose future is dropped when nobody wants its answer any more.
pub const ALWAYS: Wanted<'static> = &|| true;

/// S3's own advice begins retries at some tens of milliseconds; a reset costs the client one first byte more.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Beyond a second a client that has no byte yet is better served by 503 and its own clock.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A client that has bytes already would be cut instead: it is let wait, but not as long as clients'
/// own read timeouts (30 s and more), nor so that waiting flights take the fills' budget for long.
const LONGEST_PAUSE_MIDWAY: Duration = Duration::from_secs(10);
/// The longest that a store is left alone for one `Retry-After`; then it is asked again. What one wrong
/// answer can cost is bounded by this.
const LEFT_ALONE: Duration = Duration::from_mins(1);

/// Retries in a row that a replica can make before any answer: enough for a hundred flights that a
/// restart of S3's front end cuts at once.
const RETRY_BURST: u32 = 100;
/// Answers that pay for a retry. Two: what fails less than every third time is mended for ever.
const ANSWERS_PER_RETRY: u32 = 2;

/// Guarded reads that pay for a second GET: 2 % of them.
const READS_PER_HEDGE: u32 = 50;
/// Second GETs that can be saved up: a handful, so that an outage after a good day is not doubled.
const HEDGE_BURST: u32 = 5;
/// A hundredth is not seen in fewer reads than this.
const ENOUGH_READS: u32 = 100;
/// A head that takes less is not waited for long enough to be worth a GET: S3 takes 30 ms at least.
const SHORTEST_HEDGE: Duration = Duration::from_millis(10);

/// The ways to all remotes of a replica.
pub struct Origins {
    metrics: Metrics,
    retries: Bucket,
    /// As many as the configuration names.
    stores: Mutex<HashMap<Arc<str>, Arc<Store>>>,
}

impl Origins {
    /// With a full budget and nothing known of any store.
    pub fn new(metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            metrics,
            retries: Bucket::full(RETRY_BURST, ANSWERS_PER_RETRY),
            stores: Mutex::default(),
        })
    }

    /// The way to `remote`, for a caller who allows so many attempts after the first that makes no progress.
    pub fn origin(self: &Arc<Self>, remote: &Arc<dyn Remote>, retries: u32) -> Origin {
        let mut stores = self.stores.lock();
        let store = stores
            .entry(Arc::clone(remote.store()))
            .or_insert_with(|| Arc::new(Store::new()));
        Origin {
            remote: Arc::clone(remote),
            retries,
            store: Arc::clone(store),
            origins: Arc::clone(self),
        }
    }
}

/// What is known of one bucket of one endpoint. Short locks, never across an await.
struct Store {
    /// How long the heads of guarded reads take.
    first_byte: Mutex<Distribution>,
    /// How long a window of a body takes.
    window: Mutex<Distribution>,
    hedges: Bucket,
    /// Until when `Retry-After` asked for silence.
    silent_until: Mutex<Option<Instant>>,
}

impl Store {
    fn new() -> Self {
        Self {
            first_byte: Mutex::default(),
            window: Mutex::default(),
            hedges: Bucket::empty(HEDGE_BURST, READS_PER_HEDGE),
            silent_until: Mutex::default(),
        }
    }

    /// How much longer the store asked to be left alone.
    fn silence(&self) -> Option<Duration> {
        let rest = (*self.silent_until.lock())?.saturating_duration_since(Instant::now());
        (!rest.is_zero()).then_some(rest)
    }

    /// When a guarded read is late. `None` before enough of them have been seen.
    ///
    /// The 99th percentile, but no more than 2½ times the median: a second GET is for a read that is unlike
    /// the others, and where one in a hundred is, the percentile itself is one of those.
    fn late(&self) -> Option<Duration> {
        let seen = self.first_byte.lock();
        (seen.count() >= ENOUGH_READS).then(|| {
            let median = seen.quantile(500);
            seen.quantile(990).min(median * 5 / 2).max(SHORTEST_HEDGE)
        })
    }
}

/// One caller's way to a remote. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    remote: Arc<dyn Remote>,
    retries: u32,
    store: Arc<Store>,
    origins: Arc<Origins>,
}

impl Origin {
    /// [`Remote::stat`], tried again as the mount and the budget allow.
    pub async fn stat(
        &self,
        key: &str,
        pin: Option<&Validator>,
    ) -> Result<Representation, RemoteError> {
        let call = || self.timed("stat", self.remote.stat(key, pin));
        self.patiently("stat", &mut self.patience(), ALWAYS, call)
            .await
    }

    /// [`Remote::read_current`], tried again as the mount and the budget allow. Its body is not resumed: see
    /// [`Origin::adopt`].
    pub async fn read_current(
        &self,
        key: &str,
        want: Option<RangeSpec>,
        unless: Option<&Validator>,
    ) -> Result<Current, RemoteError> {
        const OP: &str = "read_current";
        let call = || self.timed(OP, self.remote.read_current(key, want, unless));
        self.patiently(OP, &mut self.patience(), ALWAYS, call).await
    }

    /// [`Remote::read`], tried again as the mount and the budget allow, and hedged. Its body is not resumed:
    /// see [`Origin::adopt`].
    pub async fn read(&self, guard: &Guard, want: RangeSpec) -> Result<RemoteRead, RemoteError> {
        self.read_patiently(guard, want, &mut self.patience(), ALWAYS)
            .await
    }

    async fn read_patiently(
        &self,
        guard: &Guard,
        want: RangeSpec,
        patience: &mut Patience,
        wanted: Wanted<'_>,
    ) -> Result<RemoteRead, RemoteError> {
        let call = || self.hedged(guard, want);
        self.patiently("read", patience, wanted, call).await
    }

    fn patience(&self) -> Patience {
        Patience {
            left: self.retries,
            pause: FIRST_PAUSE,
            longest: LONGEST_PAUSE,
        }
    }

    /// Calls until there is an answer, or an error that another call would not mend.
    async fn patiently<T, F>(
        &self,
        op: &'static str,
        patience: &mut Patience,
        wanted: Wanted<'_>,
        mut call: impl FnMut() -> F,
    ) -> Result<T, RemoteError>
    where
        F: Future<Output = Result<T, RemoteError>>,
    {
        loop {
            match self.attempt(op, patience.longest, call()).await {
                Ok(answer) => return Ok(answer),
                Err(error) if wanted() => patience.spend(self, error, false).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// One call, but none while the store asked to be left alone: that is waited out, or where it takes longer
    /// than `longest`, said at once.
    async fn attempt<T>(
        &self,
        op: &'static str,
        longest: Duration,
        call: impl Future<Output = Result<T, RemoteError>>,
    ) -> Result<T, RemoteError> {
        while let Some(rest) = self.store.silence() {
            if rest > longest {
                self.origins.metrics.remote_spared();
                let kind = RemoteErrorKind::Throttled {
                    retry_after: Some(rest),
                };
                let detail = "S3 asked to be left alone for a while; it was not asked";
                return Err(RemoteError::new(kind, op, detail));
            }
            tokio::time::sleep(rest + jittered(FIRST_PAUSE)).await;
        }
        let result = call.await;
        match &result {
            Ok(_) => self.origins.retries.deposit(),
            Err(error) => self.heed(error),
        }
        result
    }

    /// Remembers what a throttling store asked for.
    fn heed(&self, error: &RemoteError) {
        if let RemoteErrorKind::Throttled {
            retry_after: Some(wait),
        } = error.kind
        {
            let until = Instant::now() + wait.min(LEFT_ALONE);
            let mut silent_until = self.store.silent_until.lock();
            let until = silent_until.map_or(until, |before| before.max(until));
            *silent_until = Some(until);
            self.origins
                .metrics
                .remote_silent(self.remote.store(), until);
        }
    }

    /// A guarded read, and a second one where the first is late: the first answer wins, the other
    /// read is dropped.
    async fn hedged(&self, guard: &Guard, want: RangeSpec) -> Result<RemoteRead, RemoteError> {
        const OP: &str = "read";
        let Self { store, origins, .. } = self;
        store.hedges.deposit();
        let started = Instant::now();
        let mut first = pin!(self.timed(OP, self.remote.read(guard, want)));
        if let Some(late) = store.late() {
            let mut wait = late;
            loop {
                match tokio::time::timeout(wait, &mut first).await {
                    Ok(answer) => return self.observed(started, answer),
                    Err(_late) if store.silence().is_none() && store.hedges.withdraw() => break,
                    // Others' reads pay for it while this one waits, so the one that waits longest gets it.
                    Err(_late) => wait = late / 2,
                }
            }
        } else {
            return self.observed(started, first.await);
        }
        origins.metrics.hedge_sent();
        let hedged_at = Instant::now();
        let second = pin!(self.timed(OP, self.remote.read(guard, want)));
        match select(first, second).await {
            // A failure that another call can mend is no answer while another call is under way.
            Either::Left((Err(error), second)) if error.kind.is_retryable() => {
                self.heed(&error);
                self.observed(hedged_at, second.await)
            }
            Either::Left((answer, _second)) => {
                origins
                    .metrics
                    .remote_request(OP, "called_off", hedged_at.elapsed());
                self.observed(started, answer)
            }
            Either::Right((Err(error), first)) if error.kind.is_retryable() => {
                self.heed(&error);
                self.observed(started, first.await)
            }
            Either::Right((answer, _first)) => {
                origins.metrics.hedge_won();
                let waited = started.elapsed();
                origins.metrics.remote_request(OP, "called_off", waited);
                // How long it would have taken is not known, but that it was late is: else the percentile
                // would be that of the quick ones, and ever more reads would be late.
                store.first_byte.lock().record(waited);
                answer
            }
        }
    }

    fn observed<T>(
        &self,
        started: Instant,
        answer: Result<T, RemoteError>,
    ) -> Result<T, RemoteError> {
        if answer.is_ok() {
            self.store.first_byte.lock().record(started.elapsed());
        }
        answer
    }

    /// Counts and times one call of the remote.
    async fn timed<T>(
        &self,
        op: &'static str,
        call: impl Future<Output = Result<T, RemoteError>>,
    ) -> Result<T, RemoteError> {
        let started = Instant::now();
        let result = call.await;
        let label = result
            .as_ref()
            .map_or_else(|error| error.kind.label(), |_| "ok");
        self.origins
            .metrics
            .remote_request(op, label, started.elapsed());
        result
    }
}

/// What is left of one caller's patience.
struct Patience {
    left: u32,
    pause: Duration,
    /// The longest silence that a store may ask for.
    longest: Duration,
}

impl Patience {
    /// Waits before the next attempt, or says that there is none: the error cannot be mended by a retry, the
    /// attempts or the replica's budget are used up, or the store asked to be left alone for too long. `paid`: the
    /// budget is not asked.
    async fn spend(
        &mut self,
        origin: &Origin,
        error: RemoteError,
        paid: bool,
    ) -> Result<(), RemoteError> {
        let silence = origin.store.silence().unwrap_or_default();
        if !error.kind.is_retryable() || self.left == 0 || silence > self.longest {
            return Err(error);
        }
        if !paid && !origin.origins.retries.withdraw() {
            origin.origins.metrics.retry_refused();
            return Err(error);
        }
        self.left -= 1;
        tracing::debug!(error = one_line(&error), left = self.left, "trying again");
        tokio::time::sleep(jittered(self.pause)).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// Between half and the whole of `pause`, so that the flights an outage cut do not return in step.
fn jittered(pause: Duration) -> Duration {
    pause / 2 + (pause / 2).mul_f64(chance::fraction())
}

#[cfg(test)]
mod tests;
