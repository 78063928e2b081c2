//! Tracing and metrics: set-up, names, units and labels in one place.
//!
//! [`init`] sets the process's log up; [`Metrics`] is passed down, never global. A family's name ends with
//! its unit (`_seconds`, `_bytes`) and, for a counter, `_total`. Labels are `&'static str` from closed
//! sets, so a stranger cannot make a series: keys, paths and addresses are never labels (P12).
//!
//! What is recorded per request is a handful of atomic adds. The children of the label values in the
//! tables below are made at the start and found by a scan of a short array, without a lock or a hash; this also
//! makes them visible as 0 before the first event, so that `rate()` sees it. Any other label goes
//! through its family's map and works as well.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hash;
use std::io::{BufWriter, IsTerminal};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{
    EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Registry, Unit};
use serde::Serialize;
use tokio::time::Instant;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::disk::DiskStats;
use crate::remote::s3::QUIET;

/// The variable that says what is logged, in the syntax of [`EnvFilter`]: `info`, `pinrange=debug`, …
pub const LOG_VARIABLE: &str = "PINRANGE_LOG";

/// Verdict and tier of the requests that make up nearly all of the traffic.
const REQUESTS: [[&str; 2]; 4] = [
    ["partial", "disk"],
    ["full", "disk"],
    ["partial", "remote"],
    ["full", "remote"],
];

/// Where an answer comes from; `none`: it needed neither.
const TIERS: [[&str; 1]; 4] = [["disk"], ["remote"], ["stale"], ["none"]];

/// Calls of the remote trait that go well.
const REMOTE_REQUESTS: [[&str; 2]; 4] = [
    ["read", "ok"],
    ["read_current", "ok"],
    ["stat", "ok"],
    ["checksums", "ok"],
];

/// Calls of the remote trait.
const REMOTE_OPS: [[&str; 1]; 4] = [["read"], ["read_current"], ["stat"], ["checksums"]];

/// What comparing a whole revision with the remote's checksum can come to.
const AUDITS: [[&str; 1]; 5] = [["match"], ["mismatch"], ["none"], ["gone"], ["failed"]];

/// Lines that wait for whoever reads the log, before more are dropped and counted: a few MiB, some seconds of a busy replica.
const WAITING_LINES: usize = 8192;

/// Lines of this process's log, which there is one of, that were dropped.
static DROPPED_LINES: OnceLock<ErrorCounter> = OnceLock::new();

/// Seconds. A disk hit takes tens of microseconds, S3 30 to 200 ms, a whole snapshot minutes: a
/// factor of about 3 a bucket from 100 µs on, which is as much as the alerts on them need.
const SECONDS: [f64; 14] = [
    0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0,
];

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: for people or for machines"
)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "closed: nothing else can fail")]
pub enum InitError {
    /// [`LOG_VARIABLE`] cannot be read.
    #[error("{LOG_VARIABLE}: {0}")]
    Filter(String),
    /// The process has a log already.
    #[error("the log is set up already")]
    Repeated,
}

/// What [`LOG_VARIABLE`] says, or what is wrong with it and how to write it.
///
/// Libraries that say what we report ourselves are heard only where it names them: to the embedded S3 every missing
/// key is an error, and see [`QUIET`].
pub(crate) fn parse_filter(value: &str) -> Result<EnvFilter, String> {
    let parsed = EnvFilter::try_new(value).and_then(|_sound| {
        // Of two directives for one target the later one counts, whatever it says.
        EnvFilter::try_new(format!("s3s=off,{QUIET},{value}"))
    });
    parsed.map_err(|error| {
        format!(
            "{value:?} is not a log filter ({error}); write it like info or pinrange=debug,warn"
        )
    })
}

/// The process's log. What was logged is written when it is dropped, as far as that can be done within a second.
#[must_use = "the log ends with it"]
#[derive(Debug)]
pub struct Log(#[expect(dead_code, reason = "held to its end")] WorkerGuard);

/// Sends this process's log to stderr, filtered by what [`LOG_VARIABLE`] says or, where it says nothing, by the level
/// `default`, without what libraries say of things that we report ourselves.
///
/// A thread of its own writes it: a pipe whose reader stalls holds up nothing but the log. Beyond [`WAITING_LINES`] lines are
/// dropped and counted (`pinrange_log_lines_dropped_total`).
///
/// # Errors
/// [`InitError`]; nothing is set up then.
pub fn init(format: LogFormat, default: &str) -> Result<Log, InitError> {
    let variable = std::env::var_os(LOG_VARIABLE).filter(|value| !value.is_empty());
    // What is not UTF-8 becomes a filter that cannot be read, and is refused as one.
    let value = variable.map_or_else(
        || default.into(),
        |value| value.to_string_lossy().into_owned(),
    );
    let filter = parse_filter(&value).map_err(InitError::Filter)?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(BufWriter::new(std::io::stderr()));
    let dropped = writer.error_counter();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        // They go to stderr too, by a macro that panics: a log that nobody reads any more must not fail requests.
        .log_internal_errors(false)
        .with_writer(writer);
    let result = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    result.map_err(|_| InitError::Repeated)?;
    DROPPED_LINES.get_or_init(|| dropped);
    Ok(Log(guard))
}

/// The process's metrics. Cheap to clone; clones share their values.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    requests: Children<RequestLabels, Counter>,
    ttfb: Children<TierLabel, Histogram>,
    duration: Children<TierLabel, Histogram>,
    sent: Children<TierLabel, Counter>,
    remote_requests: Children<RemoteLabels, Counter>,
    remote_ttfb: Children<OpLabel, Histogram>,
    remote_received: Counter,
    patience: Patience,
    fills_started: Counter,
    fills_finished: Family<OutcomeLabel, Counter>,
    fills: Gauge,
    followers: Gauge,
    open_responses: Gauge,
    connections: Gauge,
    connections_displaced: Counter,
    accept_failures: Counter,
    aborted: Family<ReasonLabel, Counter>,
    rescues: Counter,
    repeated: Counter,
    handovers_failed: Counter,
    takeover: Gauge<f64, AtomicU64>,
    audits: Children<OutcomeLabel, Counter>,
}

impl Metrics {
    /// What [`Metrics::encode`] writes: `OpenMetrics` text, which Prometheus asks for by default.
    pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

    /// What [`Metrics::as_text`] writes: the format from before `OpenMetrics`.
    pub const TEXT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

    /// What [`Metrics::encode`] wrote, in the format from before `OpenMetrics`, for scrapers that know no other. The samples
    /// are the same; but there a counter's family is named as its samples are, and there are neither units nor an end.
    pub fn as_text(open_metrics: &str) -> String {
        let mut text = String::with_capacity(open_metrics.len());
        let mut help = "";
        for line in open_metrics.split_inclusive('\n') {
            if let Some(of) = line.strip_prefix("# HELP ") {
                // What is helped with is named by the type, a line below.
                help = of;
            } else if let Some((name, kind)) = announced(line) {
                let total = if kind == "counter\n" { "_total" } else { "" };
                let sentence = help.strip_prefix(name).unwrap_or("\n");
                text.extend(["# HELP ", name, total, sentence]);
                text.extend(["# TYPE ", name, total, " ", kind]);
            } else if !line.starts_with('#') {
                text.push_str(line);
            }
        }
        text
    }

    /// One answered request: what it was answered with, the tier its body came from (`none` without
    /// a body), the time from the request's head to the first body byte handed to the connection,
    /// and to the last.
    pub fn request(
        &self,
        verdict: &'static str,
        tier: &'static str,
        ttfb: Duration,
        total: Duration,
    ) {
        self.0.requests.with([verdict, tier], Counter::inc);
        self.0
            .ttfb
            .with([tier], |histogram| histogram.observe(ttfb));
        self.0
            .duration
            .with([tier], |histogram| histogram.observe(total));
    }

    /// Body bytes sent to clients from this tier.
    pub fn sent_bytes(&self, tier: &'static str, bytes: u64) {
        self.0.sent.with([tier], |counter| counter.inc_by(bytes));
    }

    /// One S3 request: `op` is stat, read, `read_current` or checksums; `result` is ok, a `RemoteErrorKind` label, or
    /// `called_off` where another request for the same was answered first; `ttfb` is the time to the response's head, to the
    /// failure, or until it was called off.
    pub fn remote_request(&self, op: &'static str, result: &'static str, ttfb: Duration) {
        self.0.remote_requests.with([op, result], Counter::inc);
        self.0
            .remote_ttfb
            .with([op], |histogram| histogram.observe(ttfb));
    }

    /// Body bytes received from S3.
    pub fn remote_bytes(&self, bytes: u64) {
        self.0.remote_received.inc_by(bytes);
    }

    /// A second GET was sent because the head of the first was late.
    pub fn hedge_sent(&self) {
        self.0.patience.hedges_sent.inc();
    }

    /// The second GET was answered before the first.
    pub fn hedge_won(&self) {
        self.0.patience.hedges_won.inc();
    }

    /// A body of S3 was given up because it was slower than others.
    pub fn stall(&self) {
        self.0.patience.stalls.inc();
    }

    /// A body of S3 was resumed by another request. `reason`: stall, short or a `RemoteErrorKind` label.
    pub fn resumed(&self, reason: &'static str) {
        self.0
            .patience
            .resumes
            .get_or_create(&ReasonLabel([reason]))
            .inc();
    }

    /// A retry was not made because the replica's budget is used up.
    pub fn retry_refused(&self) {
        self.0.patience.retries_refused.inc();
    }

    /// A request was not sent because its store asked to be left alone.
    pub fn remote_spared(&self) {
        self.0.patience.spared.inc();
    }

    /// This store asked to be left alone until then. It is no label: only how many do so is shown.
    pub fn remote_silent(&self, store: &Arc<str>, until: Instant) {
        self.0
            .patience
            .silent
            .lock()
            .insert(Arc::clone(store), until);
    }

    /// A fill began (gauge up).
    pub fn fill_started(&self) {
        self.0.fills_started.inc();
        self.0.fills.inc();
    }

    /// A fill ended (gauge down, counter by outcome).
    pub fn fill_finished(&self, outcome: &'static str) {
        self.0.fills.dec();
        self.0
            .fills_finished
            .get_or_create(&OutcomeLabel([outcome]))
            .inc();
    }

    /// Responses that send behind a fill's cursor, plus or minus one.
    pub fn followers(&self, delta: i64) {
        self.0.followers.inc_by(delta);
    }

    /// Responses whose body is under way, plus or minus one.
    pub fn open_responses(&self, delta: i64) {
        self.0.open_responses.inc_by(delta);
    }

    /// Connections on the data listener, plus or minus one.
    pub fn connections(&self, delta: i64) {
        self.0.connections.inc_by(delta);
    }

    /// Connections of the data listener that owed us a request and were closed to make room.
    pub fn connections_displaced(&self, count: u64) {
        self.0.connections_displaced.inc_by(count);
    }

    /// A connection could not be accepted for want of descriptors or memory; it is tried again.
    pub fn accept_failed(&self) {
        self.0.accept_failures.inc();
    }

    /// A body that was cut after its head.
    pub fn aborted(&self, reason: &'static str) {
        self.0.aborted.get_or_create(&ReasonLabel([reason])).inc();
    }

    /// Files that failed while a body was sent from them, and were replaced within it.
    pub fn rescued(&self, rescues: u64) {
        self.0.rescues.inc_by(rescues);
    }

    /// A request that was answered without being read anew.
    pub fn repeated(&self) {
        self.0.repeated.inc();
    }

    /// Another process was about to take over and did not: this one has the cache directory again.
    pub fn handover_failed(&self) {
        self.0.handovers_failed.inc();
    }

    /// This process has taken over from a running one, and for so long none of the two wrote the disk tier.
    pub fn took_over(&self, without_writer: Duration) {
        self.0.takeover.set(without_writer.as_secs_f64());
    }

    /// A wholly held revision was to be compared with the remote's checksum of the object: match, mismatch (it was
    /// dropped), none (the remote has none), gone (the object is at another revision) or failed (tried again later).
    pub fn audited(&self, outcome: &'static str) {
        self.0.audits.with([outcome], Counter::inc);
    }

    /// Everything, in the format of [`Metrics::CONTENT_TYPE`]. The disk tier counts for itself, so its
    /// numbers are handed in at each scrape; `None`: there is no disk tier (yet).
    #[expect(clippy::missing_panics_doc, reason = "writing to a String cannot fail")]
    pub fn encode(&self, disk: Option<&DiskStats>) -> String {
        let mut text = String::new();
        encode_registry(&mut text, &self.0.registry)
            .and_then(|()| encode_registry(&mut text, &self.looked_up_registry()))
            .and_then(|()| match disk {
                Some(stats) => encode_registry(&mut text, &disk_registry(stats)),
                None => Ok(()),
            })
            .and_then(|()| encode_eof(&mut text))
            .expect("writing to a String cannot fail");
        text
    }

    /// What is looked up when somebody asks.
    fn looked_up_registry(&self) -> Registry {
        let now = Instant::now();
        let silent = self.0.patience.silent.lock();
        let silent = silent.values().filter(|until| **until > now).count();
        let mut registry = Registry::with_prefix("pinrange");
        registry.register(
            "remotes_silent",
            "Stores (endpoint and bucket) that asked by Retry-After to be left alone for now",
            ConstGauge::new(silent as u64),
        );
        let dropped = DROPPED_LINES.get().map_or(0, ErrorCounter::dropped_lines);
        registry.register(
            "log_lines_dropped",
            "Lines of the log that were not written, since nobody took those before them",
            ConstCounter::new(dropped as u64),
        );
        registry
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Inner {
    fn default() -> Self {
        let inner = Self {
            registry: Registry::with_prefix("pinrange"),
            requests: Children::new(&REQUESTS),
            ttfb: Children::new(&TIERS),
            duration: Children::new(&TIERS),
            sent: Children::new(&TIERS),
            remote_requests: Children::new(&REMOTE_REQUESTS),
            remote_ttfb: Children::new(&REMOTE_OPS),
            remote_received: Counter::default(),
            patience: Patience::default(),
            fills_started: Counter::default(),
            fills_finished: Family::default(),
            fills: Gauge::default(),
            followers: Gauge::default(),
            open_responses: Gauge::default(),
            connections: Gauge::default(),
            connections_displaced: Counter::default(),
            accept_failures: Counter::default(),
            aborted: Family::default(),
            rescues: Counter::default(),
            repeated: Counter::default(),
            handovers_failed: Counter::default(),
            takeover: Gauge::default(),
            audits: Children::new(&AUDITS),
        };
        inner.registered()
    }
}

impl Inner {
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        // A gauge, not an info: the classic text format, which some scrapers insist on, has no such type.
        let build = Family::<VersionLabel, Gauge>::default();
        build
            .get_or_create(&VersionLabel([env!("CARGO_PKG_VERSION")]))
            .set(1);
        registry.register("build_info", "Version of the running program", build);
        registry.register(
            "requests",
            "Answered requests by verdict and by the tier the body came from",
            self.requests.family.clone(),
        );
        registry.register_with_unit(
            "request_ttfb",
            "Time from a request's head to the first byte of the body",
            Unit::Seconds,
            self.ttfb.family.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "Time from a request's head to the last byte of the body",
            Unit::Seconds,
            self.duration.family.clone(),
        );
        registry.register_with_unit(
            "sent",
            "Body bytes sent to clients by tier",
            Unit::Bytes,
            self.sent.family.clone(),
        );
        registry.register(
            "open_responses",
            "Responses whose body is under way",
            self.open_responses.clone(),
        );
        registry.register(
            "aborted",
            "Bodies that were cut after their head, by reason",
            self.aborted.clone(),
        );
        registry.register(
            "rescues",
            "Files that failed while they were sent, and whose bytes were brought from elsewhere",
            self.rescues.clone(),
        );
        registry.register(
            "repeated_requests",
            "Of the requests, those that were the last one of their connection but for the range, and answered without being read anew",
            self.repeated.clone(),
        );
        registry.register(
            "handovers_failed",
            "Processes that were about to take over and did not",
            self.handovers_failed.clone(),
        );
        registry.register_with_unit(
            "takeover_without_writer",
            "How long nobody wrote the disk tier while this process took over from a running one; 0: it did not",
            Unit::Seconds,
            self.takeover.clone(),
        );
        registry.register(
            "connections",
            "Open connections of the data listener",
            self.connections.clone(),
        );
        registry.register(
            "connections_displaced",
            "Idle connections that were closed to make room for others",
            self.connections_displaced.clone(),
        );
        registry.register(
            "accept_failures",
            "Connections that could not be accepted at once, for want of descriptors or memory",
            self.accept_failures.clone(),
        );
        registry.register(
            "remote_requests",
            "Requests to S3 by operation and result",
            self.remote_requests.family.clone(),
        );
        registry.register_with_unit(
            "remote_ttfb",
            "Time to the head of a response of S3, or to the failure",
            Unit::Seconds,
            self.remote_ttfb.family.clone(),
        );
        registry.register_with_unit(
            "remote_received",
            "Body bytes received from S3",
            Unit::Bytes,
            self.remote_received.clone(),
        );
        self.patience.register(registry);
        registry.register("fills", "Fills under way", self.fills.clone());
        registry.register("fills_started", "Fills begun", self.fills_started.clone());
        registry.register(
            "fills_finished",
            "Fills ended, by outcome",
            self.fills_finished.clone(),
        );
        registry.register(
            "followers",
            "Responses that send behind the cursor of a fill",
            self.followers.clone(),
        );
        registry.register(
            "audits",
            "Wholly held revisions compared with the checksum that S3 has of them, by outcome",
            self.audits.family.clone(),
        );
        self
    }
}

/// What became of requests to S3 that were late, broken or not wanted there.
#[derive(Default)]
struct Patience {
    hedges_sent: Counter,
    hedges_won: Counter,
    stalls: Counter,
    resumes: Family<ReasonLabel, Counter>,
    retries_refused: Counter,
    spared: Counter,
    /// Until when which store asked to be left alone: as many as the configuration names.
    silent: Mutex<BTreeMap<Arc<str>, Instant>>,
}

impl Patience {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "remote_hedges_sent",
            "Second GETs, sent because the head of the first was late",
            self.hedges_sent.clone(),
        );
        registry.register(
            "remote_hedges_won",
            "Second GETs that were answered before the first",
            self.hedges_won.clone(),
        );
        registry.register(
            "remote_stalls",
            "Bodies of S3 that were given up because they were slower than others",
            self.stalls.clone(),
        );
        registry.register(
            "remote_resumes",
            "Bodies of S3 that were resumed at their offset by another GET, by what broke them",
            self.resumes.clone(),
        );
        registry.register(
            "remote_retries_refused",
            "Retries that were not made because the budget of the replica is used up",
            self.retries_refused.clone(),
        );
        registry.register(
            "remote_spared",
            "Requests that were not sent to S3 because it asked by Retry-After to be left alone",
            self.spared.clone(),
        );
    }
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn disk_registry(stats: &DiskStats) -> Registry {
    let mut registry = Registry::with_prefix("pinrange_disk");
    registry.register_with_unit(
        "used",
        "Bytes that count against the capacity: present, reserved, unlinked but open",
        Unit::Bytes,
        ConstGauge::new(stats.used_bytes),
    );
    registry.register_with_unit(
        "capacity",
        "Most bytes that the disk tier may take",
        Unit::Bytes,
        ConstGauge::new(stats.capacity_bytes),
    );
    registry.register(
        "evictions",
        "Segments evicted",
        ConstCounter::new(stats.evictions),
    );
    let held = Family::<QueueLabel, Gauge<u64, AtomicU64>>::default();
    let evicted = Family::<QueueLabel, Counter>::default();
    for (queue, bytes, gone) in [
        ("small", stats.small_bytes, stats.evicted_small_bytes),
        ("main", stats.main_bytes, stats.evicted_main_bytes),
    ] {
        let label = QueueLabel::from([queue]);
        held.get_or_create(&label).set(bytes);
        evicted.get_or_create(&label).inc_by(gone);
    }
    registry.register_with_unit(
        "queue",
        "Bytes held, by queue: small was read once so far, main again",
        Unit::Bytes,
        held,
    );
    registry.register_with_unit("evicted", "Bytes evicted, by queue", Unit::Bytes, evicted);
    registry.register(
        "ghost_hits",
        "Segments fetched again soon after the small queue let them go: many say that the cache is too small",
        ConstCounter::new(stats.ghost_hits),
    );
    registry.register(
        "quarantines",
        "Segments dropped because their file was gone, short or corrupt, or could not be synced",
        ConstCounter::new(stats.quarantines),
    );
    registry.register(
        "swept_files",
        "Segment files removed because no row named them: an earlier run left them over",
        ConstCounter::new(stats.swept.files),
    );
    registry.register_with_unit(
        "swept",
        "Bytes that the swept files took",
        Unit::Bytes,
        ConstCounter::new(stats.swept.bytes),
    );
    registry.register(
        "swept_rows",
        "Segments taken out of the catalog because an earlier run lost their file",
        ConstCounter::new(stats.swept.rows),
    );
    registry.register(
        "swept_revisions",
        "Revisions taken out of the catalog because an earlier run left no byte of them, or too many empty ones",
        ConstCounter::new(stats.swept.revisions),
    );
    registry.register(
        "sweeping",
        "1 while what an earlier run left over is being looked for",
        ConstGauge::new(u64::from(stats.sweeping)),
    );
    registry.register(
        "open_files",
        "Segment files open, those that responses hold included",
        ConstGauge::new(stats.open_files),
    );
    registry.register(
        "revisions",
        "Revisions known to memory",
        ConstGauge::new(stats.revisions_in_memory),
    );
    registry.register(
        "degraded",
        "1 while the disk is in trouble: writes are refused, or it hangs, or it is out",
        ConstGauge::new(u64::from(stats.degraded)),
    );
    registry.register_with_unit(
        "scrubbed",
        "Bytes read to be compared with their checksums",
        Unit::Bytes,
        ConstCounter::new(stats.scrubbed_bytes),
    );
    registry.register(
        "scrubbed_segments",
        "Segments of which every block was compared with its checksum",
        ConstCounter::new(stats.scrubbed_segments),
    );
    registry.register(
        "corrupt_blocks",
        "Blocks that did not have their checksum; their files were dropped",
        ConstCounter::new(stats.corrupt_blocks),
    );
    registry.register_with_unit(
        "oldest_verified",
        "How long ago the held segment that waits longest was verified",
        Unit::Seconds,
        ConstGauge::new(stats.oldest_verified.as_secs()),
    );
    registry.register(
        "out",
        "1 while the cache directory cannot be used at all",
        ConstGauge::new(u64::from(stats.out)),
    );
    registry
}

/// Label sets: the values, and their names for the encoder.
macro_rules! labels {
    ($($name:ident[$($label:literal),+];)*) => {
        $(
            #[derive(Clone, Debug, PartialEq, Eq, Hash)]
            struct $name([&'static str; [$($label),+].len()]);

            impl From<[&'static str; [$($label),+].len()]> for $name {
                fn from(values: [&'static str; [$($label),+].len()]) -> Self {
                    Self(values)
                }
            }

            impl EncodeLabelSet for $name {
                fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
                    use prometheus_client::encoding::EncodeLabel;
                    for (name, value) in [$($label),+].into_iter().zip(self.0) {
                        (name, value).encode(encoder.encode_label())?;
                    }
                    Ok(())
                }
            }
        )*
    };
}

labels! {
    RequestLabels["verdict", "tier"];
    TierLabel["tier"];
    RemoteLabels["op", "result"];
    OpLabel["op"];
    OutcomeLabel["outcome"];
    ReasonLabel["reason"];
    QueueLabel["queue"];
    VersionLabel["version"];
}

/// Name and type of the family that a line announces, the line's end included.
fn announced(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("# TYPE ")?.split_once(' ')
}

/// A family, and handles to the children that are used most.
struct Children<L, M> {
    family: Family<L, M>,
    hot: Box<[(L, M)]>,
}

impl<L, M> Children<L, M>
where
    L: Clone + Eq + Hash,
    M: Clone + Default,
    fn() -> M: MetricConstructor<M>,
{
    fn new<const N: usize>(hot: &[[&'static str; N]]) -> Self
    where
        L: From<[&'static str; N]>,
    {
        let family = Family::<L, M>::default();
        let hot = hot
            .iter()
            .map(|values| {
                let labels = L::from(*values);
                let child = family.get_or_create_owned(&labels);
                (labels, child)
            })
            .collect();
        Self { family, hot }
    }

    fn with<T>(&self, labels: impl Into<L>, record: impl FnOnce(&M) -> T) -> T {
        let labels = labels.into();
        match self.hot.iter().find(|(hot, _)| *hot == labels) {
            Some((_, child)) => record(child),
            None => record(&self.family.get_or_create(&labels)),
        }
    }
}

/// A histogram of seconds without the mutex of `prometheus-client`'s. A scrape may see an
/// observation's bucket before its sum; the next one sees both.
#[derive(Clone, Debug, Default)]
struct Histogram(Arc<Observations>);

#[derive(Debug, Default)]
struct Observations {
    /// One per bound of [`SECONDS`], and the rest.
    buckets: [AtomicU64; SECONDS.len() + 1],
    /// Enough for five centuries of waiting.
    nanos: AtomicU64,
}

impl Histogram {
    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = SECONDS.partition_point(|bound| *bound < seconds);
        self.0.buckets[bucket].fetch_add(1, Relaxed);
        self.0
            .nanos
            .fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = SECONDS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds
            .zip(self.0.buckets.iter().map(|bucket| bucket.load(Relaxed)))
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_nanos(self.0.nanos.load(Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::disk::Swept;

    /// The samples of an exposition, by series, after checking its form: each family announced by HELP and TYPE once,
    /// its samples right behind them, no series twice, `# EOF` at the end.
    fn parse(text: &str) -> BTreeMap<String, String> {
        let body = text.strip_suffix("# EOF\n").expect("ends with EOF");
        let mut families = BTreeSet::new();
        let mut samples = BTreeMap::new();
        let (mut help, mut family) = ("", "");
        for line in body.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, sentence) = rest.split_once(' ').expect(line);
                assert!(sentence.len() > 3, "{line}");
                assert!(families.insert(name.to_owned()), "announced twice: {line}");
                help = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert_eq!(name, help, "TYPE follows HELP");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                family = name;
            } else if let Some(rest) = line.strip_prefix("# UNIT ") {
                let (name, unit) = rest.split_once(' ').expect(line);
                assert_eq!(name, family);
                assert!(name.ends_with(unit), "{line}");
            } else {
                let (series, value) = line.rsplit_once(' ').expect(line);
                let name = series.split('{').next().unwrap();
                let suffix = name.strip_prefix(family).expect(line);
                assert!(
                    ["", "_total", "_sum", "_count", "_bucket"].contains(&suffix),
                    "{line}"
                );
                assert!(name.starts_with("pinrange_"), "{line}");
                value.parse::<f64>().expect(line);
                assert!(
                    samples
                        .insert(series.to_owned(), value.to_owned())
                        .is_none(),
                    "twice: {line}"
                );
            }
        }
        samples
    }

    fn record_everything(metrics: &Metrics) {
        metrics.request(
            "partial",
            "disk",
            Duration::from_micros(50),
            Duration::from_millis(2),
        );
        metrics.request(
            "precondition_failed",
            "none",
            Duration::ZERO,
            Duration::from_secs(1000),
        );
        metrics.sent_bytes("disk", 4096);
        metrics.remote_request("read", "ok", Duration::from_millis(30));
        metrics.remote_request("read", "timeout", Duration::from_secs(10));
        metrics.remote_bytes(1 << 40);
        metrics.fill_started();
        metrics.fill_started();
        metrics.fill_finished("done");
        metrics.followers(3);
        metrics.followers(-1);
        metrics.open_responses(1);
        metrics.connections(2);
        metrics.aborted("remote");
        metrics.rescued(2);
        metrics.repeated();
        metrics.handover_failed();
        metrics.took_over(Duration::from_millis(250));
    }

    fn disk_stats() -> DiskStats {
        DiskStats {
            used_bytes: 10,
            capacity_bytes: 20,
            evictions: 3,
            small_bytes: 4,
            main_bytes: 8,
            evicted_small_bytes: 9,
            evicted_main_bytes: 11,
            ghost_hits: 12,
            quarantines: 6,
            open_files: 7,
            revisions_in_memory: 5,
            swept: Swept {
                files: 8,
                bytes: 9,
                rows: 11,
                revisions: 12,
            },
            sweeping: true,
            degraded: true,
            out: true,
            ..DiskStats::default()
        }
    }

    /// By the rules of the format: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
    #[test]
    fn the_older_text_format_has_the_same_samples() {
        let metrics = Metrics::default();
        record_everything(&metrics);
        let open = metrics.encode(Some(&disk_stats()));
        let text = Metrics::as_text(&open);
        let samples = |text: &str| {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(samples(&text), samples(&open));
        let (mut helped, mut family, mut kind) = ("", "", "");
        let mut families = 0;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, sentence) = rest.split_once(' ').expect(line);
                assert!(sentence.ends_with('.') && sentence.len() > 3, "{line}");
                helped = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                (family, kind) = rest.split_once(' ').expect(line);
                assert_eq!(family, helped);
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                families += 1;
            } else {
                let name = line.split(['{', ' ']).next().expect(line);
                let suffix = name.strip_prefix(family).expect(line);
                let right = match kind {
                    "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                    _ => suffix.is_empty(),
                };
                assert!(
                    right && name.ends_with("_total") == (kind == "counter"),
                    "{line}"
                );
            }
        }
        assert_eq!(families, open.matches("# TYPE ").count());
        let announced = "# HELP pinrange_sent_bytes_total Body bytes sent to clients by tier.\n\
                         # TYPE pinrange_sent_bytes_total counter\n";
        assert!(text.contains(announced), "{text}");
    }

    #[test]
    fn what_is_recorded_can_be_scraped() {
        let metrics = Metrics::default();
        record_everything(&metrics.clone());
        let samples = parse(&metrics.encode(Some(&disk_stats())));
        for (series, value) in [
            (
                "pinrange_requests_total{verdict=\"partial\",tier=\"disk\"}",
                "1",
            ),
            (
                "pinrange_requests_total{verdict=\"precondition_failed\",tier=\"none\"}",
                "1",
            ),
            (
                "pinrange_requests_total{verdict=\"full\",tier=\"remote\"}",
                "0",
            ),
            (
                "pinrange_request_ttfb_seconds_bucket{le=\"0.0001\",tier=\"disk\"}",
                "1",
            ),
            (
                "pinrange_request_duration_seconds_bucket{le=\"0.001\",tier=\"disk\"}",
                "0",
            ),
            (
                "pinrange_request_duration_seconds_bucket{le=\"0.003\",tier=\"disk\"}",
                "1",
            ),
            (
                "pinrange_request_duration_seconds_bucket{le=\"300.0\",tier=\"none\"}",
                "0",
            ),
            (
                "pinrange_request_duration_seconds_bucket{le=\"+Inf\",tier=\"none\"}",
                "1",
            ),
            (
                "pinrange_request_duration_seconds_count{tier=\"none\"}",
                "1",
            ),
            (
                "pinrange_request_duration_seconds_sum{tier=\"none\"}",
                "1000.0",
            ),
            ("pinrange_sent_bytes_total{tier=\"disk\"}", "4096"),
            (
                "pinrange_remote_requests_total{op=\"read\",result=\"ok\"}",
                "1",
            ),
            (
                "pinrange_remote_requests_total{op=\"read\",result=\"timeout\"}",
                "1",
            ),
            ("pinrange_remote_ttfb_seconds_count{op=\"read\"}", "2"),
            ("pinrange_remote_received_bytes_total", "1099511627776"),
            ("pinrange_fills_started_total", "2"),
            ("pinrange_fills_finished_total{outcome=\"done\"}", "1"),
            ("pinrange_fills", "1"),
            ("pinrange_followers", "2"),
            ("pinrange_open_responses", "1"),
            ("pinrange_connections", "2"),
            ("pinrange_aborted_total{reason=\"remote\"}", "1"),
            ("pinrange_handovers_failed_total", "1"),
            ("pinrange_takeover_without_writer_seconds", "0.25"),
            ("pinrange_disk_used_bytes", "10"),
            ("pinrange_disk_capacity_bytes", "20"),
            ("pinrange_disk_evictions_total", "3"),
            ("pinrange_disk_queue_bytes{queue=\"small\"}", "4"),
            ("pinrange_disk_queue_bytes{queue=\"main\"}", "8"),
            ("pinrange_disk_evicted_bytes_total{queue=\"small\"}", "9"),
            ("pinrange_disk_evicted_bytes_total{queue=\"main\"}", "11"),
            ("pinrange_disk_ghost_hits_total", "12"),
            ("pinrange_disk_quarantines_total", "6"),
            ("pinrange_rescues_total", "2"),
            ("pinrange_repeated_requests_total", "1"),
            ("pinrange_disk_open_files", "7"),
            ("pinrange_disk_swept_files_total", "8"),
            ("pinrange_disk_swept_bytes_total", "9"),
            ("pinrange_disk_swept_rows_total", "11"),
            ("pinrange_disk_swept_revisions_total", "12"),
            ("pinrange_disk_sweeping", "1"),
            ("pinrange_disk_revisions", "5"),
            ("pinrange_disk_degraded", "1"),
            ("pinrange_disk_out", "1"),
            (
                concat!(
                    "pinrange_build_info{version=\"",
                    env!("CARGO_PKG_VERSION"),
                    "\"}"
                ),
                "1",
            ),
        ] {
            assert_eq!(
                samples.get(series).map(String::as_str),
                Some(value),
                "{series} in {samples:#?}"
            );
        }
    }

    #[test]
    fn what_looks_for_rot_can_be_scraped() {
        let metrics = Metrics::default();
        metrics.audited("match");
        let stats = DiskStats {
            scrubbed_bytes: 8,
            scrubbed_segments: 9,
            corrupt_blocks: 11,
            oldest_verified: Duration::from_millis(12_900),
            ..DiskStats::default()
        };
        let samples = parse(&metrics.encode(Some(&stats)));
        for (series, value) in [
            ("pinrange_disk_scrubbed_bytes_total", "8"),
            ("pinrange_disk_scrubbed_segments_total", "9"),
            ("pinrange_disk_corrupt_blocks_total", "11"),
            ("pinrange_disk_oldest_verified_seconds", "12"),
            ("pinrange_audits_total{outcome=\"match\"}", "1"),
            ("pinrange_audits_total{outcome=\"mismatch\"}", "0"),
        ] {
            assert_eq!(samples[series], value, "{series}");
        }
    }

    #[test]
    fn patience_with_the_remote_can_be_scraped() {
        let metrics = Metrics::default();
        metrics.hedge_sent();
        metrics.hedge_won();
        metrics.stall();
        metrics.resumed("stall");
        metrics.retry_refused();
        metrics.remote_spared();
        let (now, minute) = (Instant::now(), Duration::from_mins(1));
        metrics.remote_silent(&"secret-bucket".into(), now + minute);
        metrics.remote_silent(&"other".into(), now);
        let text = metrics.encode(None);
        assert!(!text.contains("secret-bucket"));
        let samples = parse(&text);
        for series in [
            "pinrange_remote_hedges_sent_total",
            "pinrange_remote_hedges_won_total",
            "pinrange_remote_stalls_total",
            "pinrange_remote_resumes_total{reason=\"stall\"}",
            "pinrange_remote_retries_refused_total",
            "pinrange_remote_spared_total",
            "pinrange_remotes_silent",
        ] {
            assert_eq!(samples[series], "1", "{series}");
        }
    }

    #[test]
    fn a_scrape_before_anything_happened_is_well_formed() {
        let samples = parse(&Metrics::default().encode(None));
        assert_eq!(samples["pinrange_fills"], "0");
        assert!(
            !samples
                .keys()
                .any(|series| series.starts_with("pinrange_disk"))
        );
    }

    #[test]
    fn a_bound_belongs_to_its_bucket_and_buckets_add_up() {
        let histogram = Histogram::default();
        for bound in SECONDS {
            histogram.observe(Duration::from_secs_f64(bound));
        }
        let counts: Vec<u64> = histogram
            .0
            .buckets
            .iter()
            .map(|b| b.load(Relaxed))
            .collect();
        assert_eq!(counts[..SECONDS.len()], [1; SECONDS.len()]);
        assert_eq!(counts[SECONDS.len()], 0);
        assert!(SECONDS.is_sorted());
    }

    #[test]
    fn concurrent_records_are_all_counted() {
        let metrics = Metrics::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        record_everything(&metrics);
                    }
                });
            }
        });
        let samples = parse(&metrics.encode(None));
        assert_eq!(
            samples["pinrange_requests_total{verdict=\"partial\",tier=\"disk\"}"],
            "4000"
        );
        assert_eq!(
            samples["pinrange_request_ttfb_seconds_count{tier=\"disk\"}"],
            "4000"
        );
        assert_eq!(samples["pinrange_fills"], "4000");
        assert_eq!(samples["pinrange_followers"], "8000");
    }
}
