//! One request: from its head to the tiers, and from their answer to a response.
//!
//! ```text
//!  Request ─▶ method, path, query, fields ─▶ Tiers::open ─▶ respond ─▶ Response
//!                   │ no                         │ refusal                │ body ends
//!                   └──────▶ respond::rejected   └─▶ respond::refused     └─▶ one line, metrics
//! ```
//!
//! A pinned range that the disk answered may leave a [`WarmRange`] behind, by which the same request for other ranges is
//! answered without coming here (see [`again`](super::again)).

use std::borrow::Cow;
use std::hash::BuildHasher;
use std::io::Cursor;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Buf;
use http::header::{
    CACHE_CONTROL, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, RANGE, TRANSFER_ENCODING,
    VIA,
};
use http::{Request, Response};
use http_body::Body as _;
use parking_lot::Mutex;
use tracing::{Instrument, Span, field};

use super::again::{Again, Answer};
use super::body::{BodyEnd, BodyObserver, Chunk, ResponseBody};
use super::io::{SendQueue, to_usize};
use super::respond::{self, Rejected, RepeatedHead};
use crate::causes::one_line;
use crate::chance;
use crate::mount::{Mount, Mounts};
use crate::object::Validator;
use crate::remote::TRACEPARENT;
use crate::semantics::precondition::Method;
use crate::semantics::{EntityTagList, RequestHead, Verdict};
use crate::telemetry::Metrics;
use crate::tiers::{Get, Opened, Refusal, Tiers, Trace, Warm};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The answers' `Via`.
const THIS_SERVER: HeaderValue = HeaderValue::from_static("1.1 pinrange");
const TRACEPARENT_FIELD: HeaderName = HeaderName::from_static("traceparent");

/// Query parameters that S3 gives a meaning on a read. All else in a query is ignored.
const S3_PARAMETERS: &[&str] = &[
    "acl",
    "attributes",
    "awsaccesskeyid",
    "expires",
    "legal-hold",
    "list-type",
    "location",
    "partnumber",
    "retention",
    "select",
    "signature",
    "tagging",
    "torrent",
    "uploadid",
    "uploads",
    "versionid",
    "versions",
];
const S3_PREFIXES: &[&str] = &["response-", "x-amz-", "x-id"];

/// Answers the requests of the data listener.
pub struct Handler {
    mounts: Arc<Mounts>,
    tiers: Arc<Tiers>,
    metrics: Metrics,
    warm: SharedRanges,
}

impl Handler {
    /// A handler over these mounts.
    pub fn new(mounts: Arc<Mounts>, tiers: Arc<Tiers>, metrics: Metrics) -> Self {
        Self {
            mounts,
            tiers,
            metrics,
            warm: SharedRanges::default(),
        }
    }

    /// What it counts with.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Answers one request. The request's content is not read; where there is some, the connection ends with the
    /// answer and says so (RFC 9112 §9.6).
    pub async fn handle<B: http_body::Body + Send + Sync>(
        &self,
        request: Request<B>,
        queue: &SendQueue,
    ) -> Response<ResponseBody> {
        let started = Instant::now();
        let fields = Fields::of(request.headers());
        let id = Self::request_id(fields.id);
        let span = request_span(
            id.to_str().unwrap_or_default(),
            request.method().as_str(),
            request.uri().path(),
        );
        let mut response = self
            .answer(&request, &fields, started, queue)
            .instrument(span)
            .await;
        response.headers_mut().insert(X_REQUEST_ID, id);
        response.headers_mut().insert(VIA, THIS_SERVER);
        if !request.body().is_end_stream() {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn answer<B: Sync>(
        &self,
        request: &Request<B>,
        fields: &Fields<'_>,
        started: Instant,
        queue: &SendQueue,
    ) -> Response<ResponseBody> {
        let mut end = RequestEnd {
            metrics: self.metrics.clone(),
            span: Span::current(),
            verdict: "rejected",
            tier: "none",
            started,
            first_byte: Duration::ZERO,
            open: false,
            again: None,
        };
        let (mount, key, head) = match self.read(request, fields) {
            Ok(read) => read,
            Err(rejected) => {
                let response = respond::rejected(&rejected);
                end.over(0);
                return response;
            }
        };
        describe(&end.span, request, fields, &head);
        let get = Get {
            mount,
            key: &key,
            head: &head,
            no_cache: fields.no_cache,
            started,
        };
        let opening = self.tiers.open(&get);
        let answer = match fields.trace() {
            Some(trace) => Box::pin(TRACEPARENT.scope(Some(trace.into()), opening)).await,
            None => opening.await,
        };
        match answer {
            Ok(opened) => {
                end.verdict = verdict(&opened);
                end.tier = tier(&opened.trace);
                end.first_byte = started.elapsed();
                end.open = opened.reader.is_some();
                if opened.trace.forwarded.is_some() && !opened.trace.stale {
                    mount.log_answer();
                }
                if end.open {
                    self.metrics.open_responses(1);
                }
                if let Some(number) = queue.repeated()
                    && may_be_repeated(request, fields)
                    && let Some(warm) = opened.warm()
                {
                    end.again = Some(Box::new(Repeatable {
                        again: self.again(warm, request),
                        queue: queue.clone(),
                        number,
                    }));
                }
                let (response, over) = respond::opened(opened, head.method, queue, end);
                if let Some(end) = over {
                    end.over(response.body().size_hint().lower());
                }
                response
            }
            Err(refusal) => {
                let pin = head.single_pin().and_then(Validator::from_pin);
                let response = respond::refused(&refusal, mount, pin.as_ref());
                end.verdict = match refusal {
                    Refusal::PinLost { .. } => "pin_lost",
                    Refusal::NotFound { .. } => "not_found",
                    Refusal::Unavailable { .. } => "unavailable",
                    Refusal::TimedOut { .. } => "timed_out",
                    Refusal::BadGateway { .. } => "bad_gateway",
                };
                end.tier = match refusal {
                    Refusal::NotFound { asked: false } => "none",
                    _ => "remote",
                };
                if let Refusal::PinLost { .. } | Refusal::NotFound { asked: true } = refusal {
                    mount.log_answer();
                }
                end.over(response.body().size_hint().lower());
                response
            }
        }
    }

    /// What the request asks for.
    fn read<'a, B>(
        &'a self,
        request: &'a Request<B>,
        fields: &Fields<'_>,
    ) -> Result<(&'a Arc<Mount>, Cow<'a, str>, RequestHead<'a>), Rejected> {
        let method = match *request.method() {
            http::Method::GET => Method::Get,
            http::Method::HEAD => Method::Head,
            _ => return Err(Rejected::Method),
        };
        // RFC 9112 §3.2: two servers on the way that take different ones would disagree on what was asked for.
        let hosts = fields.hosts;
        if hosts > 1 || (hosts == 0 && request.version() == http::Version::HTTP_11) {
            return Err(Rejected::Field(format!(
                "a request has one Host field, not {hosts}"
            )));
        }
        if fields.bad_host {
            return Err(Rejected::Field("the Host field names no host".to_owned()));
        }
        // RFC 9112 §6.1: with a Content-Length beside it, which hyper hides, two servers on the way may see the end of
        // the request in two places. Nobody needs it to ask for an object.
        if fields.transfer_encoding {
            return Err(Rejected::Field(
                "a request for an object has no Transfer-Encoding".to_owned(),
            ));
        }
        let (mount, key) = self
            .mounts
            .resolve(request.uri().path())
            .map_err(Rejected::Path)?;
        if let Some(query) = request.uri().query() {
            refuse_s3_parameters(query)?;
        }
        let head = RequestHead::from_headers(method, request.headers())
            .map_err(|error| Rejected::Field(error.to_string()))?;
        Ok((mount, key, head))
    }

    /// The client's id if it is sane, else one of ours.
    fn request_id(sent: Option<&HeaderValue>) -> HeaderValue {
        let sane = |id: &&HeaderValue| {
            let id = id.as_bytes();
            (1..=128).contains(&id.len())
                && id
                    .iter()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte))
        };
        sent.filter(sane).cloned().unwrap_or_else(|| {
            let digits = new_id();
            HeaderValue::from_bytes(&digits).expect("hexadecimal digits are a field value")
        })
    }

    fn again<B>(&self, warm: Warm, request: &Request<B>) -> Arc<dyn Again> {
        let path = request.uri().path();
        self.warm.get(path, warm, |warm| WarmRange {
            head: RepeatedHead::new(&warm.fields, (VIA, THIS_SERVER)),
            warm,
            tiers: Arc::clone(&self.tiers),
            metrics: self.metrics.clone(),
            path: path.into(),
        })
    }
}

fn request_span(id: &str, method: &str, path: &str) -> Span {
    tracing::info_span!(
        "request",
        id,
        method,
        path,
        pin = field::Empty,
        range = field::Empty,
        trace = field::Empty,
        verdict = field::Empty,
        tier = field::Empty,
    )
}

/// Sixteen hexadecimal digits, that no two requests of a fleet are likely to have in common.
fn new_id() -> [u8; 16] {
    let mut random = chance::bits();
    [(); 16].map(|()| {
        random = random.rotate_left(4);
        b"0123456789abcdef"[(random & 15) as usize]
    })
}

/// Whether two requests with this head are answered alike but for the range, as far as the answer hangs on neither what
/// the disk holds nor its labels.
fn may_be_repeated<B>(request: &Request<B>, fields: &Fields<'_>) -> bool {
    // An answer to HTTP/1.0 says that it is one. The client's ids go into the log.
    request.version() == http::Version::HTTP_11 && fields.id.is_none() && fields.trace.is_none()
}

/// A pinned range that the disk answered, and what it takes to answer others.
struct WarmRange {
    warm: Warm,
    head: RepeatedHead,
    tiers: Arc<Tiers>,
    metrics: Metrics,
    path: Box<str>,
}

/// Those in use, for connections that ask for the same object: a thousand copies of what does not differ would each have to
/// come from memory at its turn. Paths that meet in a place do not share.
struct SharedRanges {
    hasher: foldhash::quality::RandomState,
    places: [Mutex<Weak<WarmRange>>; 64],
}

impl Default for SharedRanges {
    fn default() -> Self {
        Self {
            hasher: foldhash::quality::RandomState::default(),
            places: std::array::from_fn(|_| Mutex::default()),
        }
    }
}

impl SharedRanges {
    fn get(&self, path: &str, warm: Warm, make: impl FnOnce(Warm) -> WarmRange) -> Arc<WarmRange> {
        let place = self.hasher.hash_one(path) % self.places.len() as u64;
        let mut place = self.places[to_usize(place)].lock();
        let shared = place.upgrade();
        shared
            .filter(|shared| *shared.path == *path && shared.warm.is(&warm))
            .unwrap_or_else(|| {
                let made = Arc::new(make(warm));
                *place = Arc::downgrade(&made);
                made
            })
    }
}

impl Again for WarmRange {
    fn answer(&self, first: u64, last: u64, queue: &SendQueue) -> Option<Answer> {
        let started = Instant::now();
        let (range, extent) = self.tiers.again(&self.warm, first, last)?;
        let trace = Trace {
            disk: started.elapsed(),
            ..Trace::default()
        };
        let id = new_id();
        let span = request_span(
            std::str::from_utf8(&id).unwrap_or_default(),
            http::Method::GET.as_str(),
            &self.path,
        );
        if !span.is_disabled() {
            span.record("pin", "one");
            span.record("range", format!("bytes={first}-{last}"));
        }
        let size = self.warm.size();
        let head = self.head.of(range, size, &trace, (&X_REQUEST_ID, &id));
        self.metrics.repeated();
        self.metrics.open_responses(1);
        let end = RequestEnd {
            metrics: self.metrics.clone(),
            span,
            verdict: "partial",
            tier: "disk",
            started,
            first_byte: trace.disk,
            open: true,
            again: None,
        };
        let body = Chunk::whole_body(
            extent,
            range.start(),
            queue.clone(),
            self.warm.rescue(),
            end,
        );
        Some(Cursor::new(head).chain(body))
    }
}

/// The fields that matter here, gathered in one pass: a request has fewer fields than there are names to look up.
#[derive(Default)]
struct Fields<'a> {
    hosts: usize,
    /// The last `Host` is none.
    bad_host: bool,
    transfer_encoding: bool,
    /// `no-cache` among the `Cache-Control` directives.
    no_cache: bool,
    /// The first `X-Request-Id`.
    id: Option<&'a HeaderValue>,
    /// The first `traceparent`.
    trace: Option<&'a HeaderValue>,
}

impl<'a> Fields<'a> {
    fn trace(&self) -> Option<&'a str> {
        let value = self.trace?.to_str().ok()?;
        is_traceparent(value).then_some(value)
    }

    fn of(headers: &'a HeaderMap) -> Self {
        let mut fields = Self::default();
        for (name, value) in headers {
            if name == HOST {
                fields.hosts += 1;
                fields.bad_host = !is_host(value.as_bytes());
            } else if name == TRANSFER_ENCODING {
                fields.transfer_encoding = true;
            } else if name == CACHE_CONTROL {
                fields.no_cache |= no_cache(value);
            } else if name == X_REQUEST_ID {
                fields.id.get_or_insert(value);
            } else if name == TRACEPARENT_FIELD {
                fields.trace.get_or_insert(value);
            }
        }
        fields
    }
}

/// `host[:port]` as RFC 9112 §3.2 takes it from RFC 3986 §3.2.2, or nothing. What an address in brackets is made of is
/// left to whoever looks for it.
fn is_host(field: &[u8]) -> bool {
    let in_brackets = field.first() == Some(&b'[');
    let host = if in_brackets {
        let end = field.iter().position(|byte| *byte == b']');
        end.map_or(0, |end| end + 1)
    } else {
        let end = field.iter().position(|byte| *byte == b':');
        end.unwrap_or(field.len())
    };
    let (host, port) = field.split_at(host);
    let of_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    let is_sound = match host {
        [b'[', address @ .., b']'] => {
            !address.is_empty() && address.iter().all(|byte| *byte == b':' || of_name(byte))
        }
        name => !in_brackets && name.iter().all(of_name),
    };
    let port = port.strip_prefix(b":").unwrap_or(port);
    is_sound && port.iter().all(u8::is_ascii_digit)
}

fn refuse_s3_parameters(query: &str) -> Result<(), Rejected> {
    for pair in query.split('&') {
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        let decoded = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
        let lower = decoded.to_ascii_lowercase();
        if S3_PARAMETERS.contains(&lower.as_str())
            || S3_PREFIXES.iter().any(|prefix| lower.starts_with(prefix))
        {
            return Err(Rejected::Query(decoded.into_owned()));
        }
    }
    Ok(())
}

fn no_cache(directives: &HeaderValue) -> bool {
    directives
        .as_bytes()
        .split(|byte| *byte == b',')
        .any(|directive| directive.trim_ascii().eq_ignore_ascii_case(b"no-cache"))
}

fn describe<B>(span: &Span, request: &Request<B>, fields: &Fields<'_>, head: &RequestHead<'_>) {
    if span.is_disabled() {
        return;
    }
    let pin = match &head.if_match {
        None => "none",
        Some(EntityTagList::Any) => "any",
        Some(_) if head.single_pin().is_some() => "one",
        Some(EntityTagList::Tag(_) | EntityTagList::Tags(_)) => "list",
    };
    span.record("pin", pin);
    let range = request.headers().get(RANGE);
    if let Some(range) = range.and_then(|range| range.to_str().ok()) {
        span.record("range", range);
    }
    if let Some(trace) = fields.trace() {
        span.record("trace", trace);
    }
}

/// W3C Trace Context §3.2: version, trace id, parent id and flags in lower-case hexadecimal. There is no version `ff`, and
/// ids of zeros only are none.
fn is_traceparent(value: &str) -> bool {
    let lengths = [2, 32, 16, 2];
    let fields: Vec<_> = value.split('-').collect();
    fields.len() == lengths.len()
        && fields[0] != "ff"
        && fields[1..3]
            .iter()
            .all(|id| id.bytes().any(|digit| digit != b'0'))
        && fields.iter().zip(lengths).all(|(field, length)| {
            field.len() == length
                && field
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
}

fn verdict(opened: &Opened) -> &'static str {
    match opened.verdict {
        Verdict::Full => "full",
        Verdict::Partial(_) => "partial",
        Verdict::NotModified => "not_modified",
        Verdict::PreconditionFailed => "precondition_failed",
        Verdict::Unsatisfiable => "unsatisfiable",
    }
}

fn tier(trace: &Trace) -> &'static str {
    if trace.stale {
        "stale"
    } else if trace.forwarded.is_some() {
        "remote"
    } else if trace.remembered {
        "none"
    } else {
        "disk"
    }
}

/// Writes the request's one line and counts it, when its last byte is gone or given up.
struct RequestEnd {
    metrics: Metrics,
    span: Span,
    verdict: &'static str,
    tier: &'static str,
    started: Instant,
    first_byte: Duration,
    /// Counted among the open responses.
    open: bool,
    /// Few have it.
    again: Option<Box<Repeatable>>,
}

/// What repeats an answer, once all of it is out.
struct Repeatable {
    again: Arc<dyn Again>,
    queue: SendQueue,
    /// Of the request, as the queue counts them.
    number: u64,
}

impl RequestEnd {
    fn over(mut self, bytes: u64) {
        self.first_byte = self.started.elapsed();
        self.write(bytes, None);
    }

    fn write(&self, bytes: u64, aborted: Option<&'static str>) {
        let total = self.started.elapsed();
        self.metrics
            .request(self.verdict, self.tier, self.first_byte, total);
        let _in_span = self.span.enter();
        tracing::info!(
            verdict = self.verdict,
            tier = self.tier,
            bytes,
            ttfb_us = u64::try_from(self.first_byte.as_micros()).unwrap_or(u64::MAX),
            total_us = u64::try_from(total.as_micros()).unwrap_or(u64::MAX),
            aborted,
            "request"
        );
    }
}

impl BodyObserver for RequestEnd {
    fn on_end(&mut self, end: BodyEnd) {
        if self.open {
            self.metrics.open_responses(-1);
        }
        let bytes = end.from_files + end.from_memory;
        self.metrics.sent_bytes(self.tier, bytes);
        self.metrics.rescued(end.rescues);
        if let Some(abort) = &end.abort {
            self.metrics.aborted(abort.reason);
            if let Some(error) = &abort.error {
                let _in_span = self.span.enter();
                tracing::warn!(
                    error = one_line(error),
                    "the response was cut after its head"
                );
            }
        }
        if end.abort.is_none()
            && let Some(answer) = self.again.take()
        {
            answer.queue.arm(answer.number, answer.again);
        }
        self.write(bytes, end.abort.map(|abort| abort.reason));
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Empty};

    use super::*;
    use crate::disk::{DiskConfig, MinFree, inline};
    use crate::fill::{FillSettings, Filler};
    use crate::mount::ForbiddenAs;
    use crate::remote::RemoteErrorKind;
    use crate::remote::fault::FaultRemote;
    use crate::remote::memory::MemoryRemote;
    use crate::seldom::{Outage, Reason};
    use crate::tiers::TierSettings;

    /// As the log has it: what is refused begins an outage, and whatever the remote answers ends it.
    #[tokio::test(start_paused = true)]
    async fn an_outage_lasts_until_the_remote_answers() {
        let dir = tempfile::tempdir().unwrap();
        let disk = inline::open(DiskConfig {
            dir: dir.path().to_owned(),
            capacity: 1 << 24,
            min_free: MinFree::Bytes(0),
            block_size: 4096,
            scrub_rate: 0,
        })
        .unwrap();
        let metrics = Metrics::default();
        let part_size = NonZeroU64::new(1 << 16).unwrap();
        let settings = FillSettings {
            part_size,
            budget: 1 << 20,
        };
        let filler = Filler::new(Arc::clone(&disk), settings, metrics.clone());
        let settings = TierSettings {
            fan_out: 1,
            part_size: part_size.get(),
        };
        let memory = MemoryRemote::new();
        memory.put("held", "bytes", &[]);
        memory.put("cold", "bytes", &[]);
        let remote = Arc::new(FaultRemote::new(memory));
        let mount = Mount {
            path: "/m".to_owned(),
            prefix: String::new(),
            remote: Arc::clone(&remote) as _,
            fresh_for: Duration::ZERO,
            stale_if_error: Duration::from_mins(5),
            forbidden: ForbiddenAs::BadGateway,
            retries: 0,
            verify: false,
            outage: Outage::default(),
        };
        let mounts = Arc::new(Mounts::new(vec![mount]));
        let tiers = Tiers::new(disk, filler, settings);
        let handler = Handler::new(Arc::clone(&mounts), tiers, metrics);
        let get = async |path: &str, pin: Option<&str>| {
            let mut request = Request::get(path).header(HOST, "test");
            if let Some(pin) = pin {
                request = request.header(http::header::IF_MATCH, pin);
            }
            let request = request.body(Empty::<Bytes>::new()).unwrap();
            let response = handler.handle(request, &SendQueue::default()).await;
            let status = response.status().as_u16();
            // To its end, so that what can be held is.
            let _cut = response.into_body().collect().await;
            status
        };
        let outage = || &mounts.iter().next().unwrap().outage;

        assert_eq!(get("/m/held", None).await, 200);
        for (failing, told, answered, status) in [
            ("/m/a", 503, ("/m/cold", None), 200),
            ("/m/b", 503, ("/m/none", None), 404),
            ("/m/c", 503, ("/m/cold", Some("\"another\"")), 412),
            // From what is held, which is no answer of the remote.
            ("/m/held", 200, ("/m/held", None), 200),
        ] {
            remote.outage(Some(RemoteErrorKind::Unavailable));
            assert_eq!(get(failing, None).await, told, "{failing}");
            assert_eq!(
                outage().failed(Reason::Unavailable),
                None,
                "{failing} begins one"
            );
            tokio::time::advance(Duration::from_mins(1)).await;
            remote.outage(None);
            assert_eq!(get(answered.0, answered.1).await, status);
            assert_eq!(outage().answered(), None, "{answered:?} ended it");
        }
    }

    #[test]
    fn a_trace_context_has_ids_and_a_version_that_is_one() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let (no_trace, no_parent) = ("0".repeat(32), "0".repeat(16));
        for (value, sound) in [
            (format!("00-{trace}-{parent}-01"), true),
            (format!("00-{trace}-{parent}-00"), true),
            (format!("fe-{trace}-{parent}-00"), true),
            (format!("ff-{trace}-{parent}-01"), false),
            (format!("00-{no_trace}-{parent}-01"), false),
            (format!("00-{trace}-{no_parent}-01"), false),
            (format!("00-{trace}-{parent}"), false),
            (format!("00-{trace}-{parent}-0G"), false),
        ] {
            assert_eq!(is_traceparent(&value), sound, "{value}");
        }
    }
}
