//! From an outcome to a response: the only place that names a status code.
//!
//! Every outcome is matched without a wildcard, so a new one cannot ship without a status. An outage is
//! logged from here, with its cause; what the client reads of it names no bucket, endpoint or credential.

#![deny(clippy::wildcard_enum_match_arm)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG,
    EXPIRES, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, RETRY_AFTER,
};
use http::{Response, StatusCode};

use super::body::{BodyObserver, Part, ResponseBody};
use super::io::SendQueue;
use crate::causes::one_line;
use crate::mount::{Mount, PathError};
use crate::object::{Fields, Validator};
use crate::seldom::Reason;
use crate::semantics::precondition::Method;
use crate::semantics::{ByteRange, Verdict};
use crate::tiers::{Forwarded, Opened, Refusal, RemoteSays, Trace};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// `Cache-Status` where what the remote said less than `fresh_for` ago was enough: nobody was asked (RFC 9211 §2.1).
const REMEMBERED: HeaderValue = HeaderValue::from_static("pinrange; hit; detail=remembered");

/// A request that never reaches the tiers.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed: each has a status below")]
pub enum Rejected {
    /// Neither GET nor HEAD.
    Method,
    /// The path names no object.
    Path(PathError),
    /// A query parameter that means something to S3 and nothing here: ignoring it would lie.
    Query(String),
    /// A malformed field that may not be ignored.
    Field(String),
}

/// The answer to a request that the tiers can answer with the object.
///
/// `observer` hears of the body's end where there is one; else `None` comes back for it and the
/// request is over with its head.
pub fn opened<O: BodyObserver>(
    opened: Opened,
    method: Method,
    queue: &SendQueue,
    observer: O,
) -> (Response<ResponseBody>, Option<O>) {
    let Opened {
        representation,
        fields,
        verdict,
        reader,
        trace,
    } = opened;
    let size = representation.size;
    let mut parts = VecDeque::new();
    let mut headers = HeaderMap::with_capacity(16);
    let status = match &verdict {
        Verdict::Full => {
            describe(&mut headers, &fields);
            headers.insert(CONTENT_LENGTH, size.into());
            parts.extend(ByteRange::whole(size).map(Part::Range));
            StatusCode::OK
        }
        Verdict::Partial(ranges) => {
            describe(&mut headers, &fields);
            if let [range] = ranges[..] {
                headers.insert(CONTENT_RANGE, content_range_of(range, size).value());
                headers.insert(CONTENT_LENGTH, range.len().into());
                parts.push_back(Part::Range(range));
            } else {
                parts = multipart(&mut headers, ranges, size);
            }
            StatusCode::PARTIAL_CONTENT
        }
        Verdict::NotModified => {
            describe_only(
                &mut headers,
                &fields,
                &[ETAG, LAST_MODIFIED, CACHE_CONTROL, EXPIRES],
            );
            StatusCode::NOT_MODIFIED
        }
        Verdict::PreconditionFailed => {
            let mut response = precondition_failed(Some(&representation.validator), None);
            trace_fields(response.headers_mut(), &trace, method);
            return (response, Some(observer));
        }
        Verdict::Unsatisfiable => {
            let mut response = problem(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "no byte of the requested ranges exists, or there are too many of them",
                &[],
            );
            describe_only(response.headers_mut(), &fields, &[ETAG, LAST_MODIFIED]);
            let unsatisfied = format!("bytes */{size}");
            response
                .headers_mut()
                .insert(CONTENT_RANGE, ascii(&unsatisfied));
            trace_fields(response.headers_mut(), &trace, method);
            return (response, Some(observer));
        }
    };
    trace_fields(&mut headers, &trace, method);
    let (body, observer) = match reader {
        Some(reader) => (
            ResponseBody::new(parts, Box::new(reader), queue.clone(), observer),
            None,
        ),
        None => (ResponseBody::empty(), Some(observer)),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    (response, observer)
}

/// What heads have in common that answer a request for one range of the same revision from the disk, as HTTP/1.1 writes it.
pub(super) struct RepeatedHead(Vec<u8>);

impl RepeatedHead {
    /// `more`: the field that the handler adds to all of them.
    pub(super) fn new(fields: &Fields, more: (HeaderName, HeaderValue)) -> Self {
        let mut headers = HeaderMap::new();
        describe(&mut headers, fields);
        headers.insert(CACHE_STATUS, cache_status(&Trace::default(), Method::Get));
        headers.extend([more]);
        let mut head = Line::new();
        head.push("HTTP/1.1 ");
        head.push(&StatusCode::PARTIAL_CONTENT.to_string());
        for (name, value) in &headers {
            head.next_field(name);
            head.push_bytes(value.as_bytes());
        }
        Self(head.0)
    }

    /// The head for this range, to its end. `more`: the field that the handler adds to this one.
    pub(super) fn of(
        &self,
        range: ByteRange,
        size: u64,
        trace: &Trace,
        more: (&HeaderName, &[u8]),
    ) -> Vec<u8> {
        let mut head = Line(Vec::with_capacity(self.0.len() + 256));
        head.push_bytes(&self.0);
        head.next_field(&CONTENT_RANGE);
        content_range(&mut head, range, size);
        head.next_field(&CONTENT_LENGTH);
        head.number(range.len());
        if has_timing(trace) {
            head.next_field(&SERVER_TIMING);
            server_timing(&mut head, trace);
        }
        head.next_field(&DATE);
        head.push_bytes(&date());
        head.next_field(more.0);
        head.push_bytes(more.1);
        head.push("\r\n\r\n");
        head.0
    }
}

/// `Date` (RFC 9110 §6.6.1) of an answer that is made now. Each thread writes it once a second.
fn date() -> [u8; 29] {
    thread_local! {
        static WRITTEN: Cell<Option<(u64, [u8; 29])>> = const { Cell::new(None) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    WRITTEN.with(|written| match written.get() {
        Some((of, date)) if of == second => date,
        _ => {
            let text = httpdate::fmt_http_date(now);
            let date = *text.as_bytes().first_chunk().expect("as long as all dates");
            written.set(Some((second, date)));
            date
        }
    })
}

/// The answer to a request to `mount` that the tiers refuse, `pin` being the one tag it was pinned to.
pub fn refused(
    refusal: &Refusal,
    mount: &Mount,
    pin: Option<&Validator>,
) -> Response<ResponseBody> {
    let (status, detail, cause, reason) = match refusal {
        Refusal::PinLost { current } => {
            let mut response = precondition_failed(current.as_ref(), pin);
            forwarded_field(&mut response, Some(StatusCode::PRECONDITION_FAILED));
            return response;
        }
        Refusal::NotFound { asked } => {
            let mut response = problem(StatusCode::NOT_FOUND, "there is no such object", &[]);
            if *asked {
                forwarded_field(&mut response, Some(StatusCode::NOT_FOUND));
            } else {
                response.headers_mut().insert(CACHE_STATUS, REMEMBERED);
            }
            return response;
        }
        Refusal::Unavailable { cause, .. } => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the storage behind this server cannot be reached right now; try again",
            cause,
            Some(Reason::Unavailable),
        ),
        Refusal::TimedOut { cause } => (
            StatusCode::GATEWAY_TIMEOUT,
            "the storage behind this server did not answer in time",
            cause,
            Some(Reason::Unavailable),
        ),
        Refusal::BadGateway { says, cause } => (
            StatusCode::BAD_GATEWAY,
            if *says == RemoteSays::Archived {
                "the object is archived in the storage behind this server: it has to be restored before it can be read"
            } else {
                "the storage behind this server gave an answer that cannot be used"
            },
            cause,
            match says {
                // Of this object, while others may well be read.
                RemoteSays::Lies | RemoteSays::Archived => None,
                RemoteSays::Denied => Some(Reason::Denied),
                RemoteSays::Misconfigured
                | RemoteSays::Unasked
                | RemoteSays::Same
                | RemoteSays::Other
                | RemoteSays::Absent
                | RemoteSays::Down
                | RemoteSays::Slow => Some(Reason::Misconfigured),
            },
        ),
    };
    if let Some(reason) = reason {
        mount.log_failure(reason, &**cause, Some(status.as_u16()));
    } else {
        let (error, status) = (one_line(&**cause), status.as_u16());
        tracing::warn!(error, status, "the remote could not answer");
    }
    let mut response = problem(status, detail, &[]);
    forwarded_field(&mut response, None);
    if let Refusal::Unavailable { retry_after, .. } = refusal {
        response
            .headers_mut()
            .insert(RETRY_AFTER, seconds(*retry_after).into());
    }
    response
}

/// The answer to a request that never reaches the tiers.
pub fn rejected(rejected: &Rejected) -> Response<ResponseBody> {
    match rejected {
        Rejected::Method => {
            let detail = "only GET and HEAD are served";
            let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, detail, &[]);
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        Rejected::Path(error) => {
            let status = match error {
                PathError::Unknown => StatusCode::NOT_FOUND,
                PathError::Relative
                | PathError::Malformed
                | PathError::DotSegment
                | PathError::Blank
                | PathError::TooLong => StatusCode::BAD_REQUEST,
            };
            problem(status, &error.to_string(), &[])
        }
        Rejected::Query(name) => {
            let detail = format!("the query parameter {name:?} is not supported");
            problem(StatusCode::BAD_REQUEST, &detail, &[])
        }
        Rejected::Field(detail) => problem(StatusCode::BAD_REQUEST, detail, &[]),
    }
}

fn precondition_failed(
    current: Option<&Validator>,
    pin: Option<&Validator>,
) -> Response<ResponseBody> {
    let tags: Vec<_> = [("pinned", pin), ("current", current)]
        .into_iter()
        .filter_map(|(name, tag)| tag.map(|tag| (name, tag.as_field_value())))
        .collect();
    let detail = if pin.is_some() {
        "the pinned revision is not held here and is no longer the current one"
    } else {
        "the current revision does not meet the request's conditions"
    };
    problem(StatusCode::PRECONDITION_FAILED, detail, &tags)
}

/// An RFC 9457 problem document.
fn problem(status: StatusCode, detail: &str, more: &[(&str, &str)]) -> Response<ResponseBody> {
    let mut document = serde_json::json!({
        "type": "about:blank",
        "title": status.canonical_reason().unwrap_or_default(),
        "status": status.as_u16(),
        "detail": detail,
    });
    for (name, value) in more {
        document[*name] = (*value).into();
    }
    let mut response = Response::new(ResponseBody::bytes(document.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    response
}

fn describe(headers: &mut HeaderMap, fields: &[(HeaderName, HeaderValue)]) {
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    for (name, value) in fields {
        headers.insert(name, value.clone());
    }
}

fn describe_only(
    headers: &mut HeaderMap,
    fields: &[(HeaderName, HeaderValue)],
    names: &[HeaderName],
) {
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    for (name, value) in fields.iter().filter(|(name, _)| names.contains(name)) {
        headers.insert(name, value.clone());
    }
}

/// RFC 9110 §14.6. Each part's head stands between bytes of the file, which go by sendfile.
fn multipart(headers: &mut HeaderMap, ranges: &[ByteRange], size: u64) -> VecDeque<Part> {
    let random = RandomState::new();
    let boundary = format!(
        "pinrange-{:016x}{:016x}",
        random.hash_one(0),
        random.hash_one(1)
    );
    let of_part = headers.remove(CONTENT_TYPE);
    let mut parts = VecDeque::with_capacity(2 * ranges.len() + 1);
    let mut length = 0;
    for (index, range) in ranges.iter().enumerate() {
        let mut head = Vec::with_capacity(160);
        head.extend_from_slice(if index == 0 { b"--" } else { b"\r\n--" });
        head.extend_from_slice(boundary.as_bytes());
        if let Some(of_part) = &of_part {
            head.extend_from_slice(b"\r\nContent-Type: ");
            head.extend_from_slice(of_part.as_bytes());
        }
        head.extend_from_slice(b"\r\nContent-Range: ");
        head.extend_from_slice(&content_range_of(*range, size).0);
        head.extend_from_slice(b"\r\n\r\n");
        length += head.len() as u64 + range.len();
        parts.push_back(Part::Bytes(Bytes::from(head)));
        parts.push_back(Part::Range(*range));
    }
    let end = format!("\r\n--{boundary}--\r\n");
    length += end.len() as u64;
    parts.push_back(Part::Bytes(Bytes::from(end)));
    headers.insert(
        CONTENT_TYPE,
        ascii(&format!("multipart/byteranges; boundary={boundary}")),
    );
    headers.insert(CONTENT_LENGTH, length.into());
    parts
}

fn content_range_of(range: ByteRange, size: u64) -> Line {
    let mut line = Line::new();
    content_range(&mut line, range, size);
    line
}

fn content_range(line: &mut Line, range: ByteRange, size: u64) {
    line.push("bytes ");
    line.number(range.start());
    line.push("-");
    line.number(range.last());
    line.push("/");
    line.number(size);
}

/// `Cache-Status` (RFC 9211) and `Server-Timing`.
fn trace_fields(headers: &mut HeaderMap, trace: &Trace, method: Method) {
    headers.insert(CACHE_STATUS, cache_status(trace, method));
    if has_timing(trace) {
        let mut timing = Line::new();
        server_timing(&mut timing, trace);
        headers.insert(SERVER_TIMING, timing.value());
    }
}

fn timings(trace: &Trace) -> impl Iterator<Item = (&'static str, Duration)> {
    let timings = [
        ("disk", trace.disk),
        ("remote", trace.remote),
        ("queue", trace.queued),
    ];
    timings
        .into_iter()
        .filter(|(_, duration)| !duration.is_zero())
}

fn has_timing(trace: &Trace) -> bool {
    timings(trace).next().is_some()
}

fn server_timing(line: &mut Line, trace: &Trace) {
    for (index, (name, duration)) in timings(trace).enumerate() {
        line.push(if index == 0 { "" } else { ", " });
        line.push(name);
        line.push(";dur=");
        line.milliseconds(duration);
    }
}

fn cache_status(trace: &Trace, method: Method) -> HeaderValue {
    if trace.stale {
        return HeaderValue::from_static("pinrange; hit; detail=stale-if-error");
    }
    let Some(why) = trace.forwarded else {
        if trace.remembered {
            return REMEMBERED;
        }
        return HeaderValue::from_static("pinrange; hit; detail=disk");
    };
    let mut status = Line::new();
    status.push("pinrange; fwd=");
    status.push(match why {
        Forwarded::Miss => "miss",
        Forwarded::Partial => "partial",
        Forwarded::Stale => "stale",
        Forwarded::Request => "request",
    });
    let seen = match method {
        _ if trace.confirmed => StatusCode::NOT_MODIFIED,
        Method::Head => StatusCode::OK,
        Method::Get => StatusCode::PARTIAL_CONTENT,
    };
    status.push("; fwd-status=");
    status.push(seen.as_str());
    if trace.stored {
        status.push("; stored");
    }
    if trace.is_collapsed() {
        status.push("; collapsed");
    }
    status.value()
}

/// A field value of numbers and our own words, or a head of such, put together without the formatter of `std`, which
/// takes several times as long.
struct Line(Vec<u8>);

impl Line {
    fn new() -> Self {
        Self(Vec::with_capacity(96))
    }

    fn push(&mut self, text: &str) {
        self.push_bytes(text.as_bytes());
    }

    fn push_bytes(&mut self, text: &[u8]) {
        self.0.extend_from_slice(text);
    }

    /// Ends a head's line and begins that of another field.
    fn next_field(&mut self, name: &HeaderName) {
        self.push("\r\n");
        self.push(name.as_str());
        self.push(": ");
    }

    fn number(&mut self, number: u64) {
        self.push(itoa::Buffer::new().format(number));
    }

    /// To three places: a microsecond.
    fn milliseconds(&mut self, duration: Duration) {
        let micros = (duration.as_nanos() + 500) / 1000;
        self.number(u64::try_from(micros / 1000).unwrap_or(u64::MAX));
        // With a one before them that becomes the point, so that leading zeros stay.
        let point = self.0.len();
        self.number(1000 + u64::try_from(micros % 1000).unwrap_or_default());
        self.0[point] = b'.';
    }

    fn value(self) -> HeaderValue {
        HeaderValue::from_maybe_shared(Bytes::from(self.0))
            .expect("numbers and our own words are visible ASCII")
    }
}

fn forwarded_field(response: &mut Response<ResponseBody>, seen: Option<StatusCode>) {
    let field = match seen {
        Some(seen) => format!("pinrange; fwd=miss; fwd-status={}", seen.as_str()),
        None => "pinrange; fwd=miss; detail=unavailable".to_owned(),
    };
    response.headers_mut().insert(CACHE_STATUS, ascii(&field));
}

/// `Retry-After` in whole seconds, at least one.
fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0 || duration.is_zero())
}

/// A field value out of text that is visible ASCII by construction.
fn ascii(value: &str) -> HeaderValue {
    HeaderValue::from_str(value)
        .expect("validators, dates, numbers and our own words are visible ASCII")
}

// === admin ===

/// The admin listener's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdminStatus {
    /// Here it is.
    Ok,
    /// The request makes no sense.
    Malformed,
    /// A browser sent it on behalf of a web page.
    CrossOrigin,
    /// No such page, or nothing is mounted at the path.
    NotFound,
    /// Only these methods.
    Allow(&'static str),
    /// The request's body is longer than it has any reason to be.
    TooLarge,
    /// Not now: the same is under way.
    UnderWay,
    /// It went wrong on our side.
    Failed,
    /// Not ready: starting or draining.
    Unready,
}

/// An answer of the admin listener.
pub(super) fn admin(
    status: AdminStatus,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::bytes(body));
    *response.status_mut() = match status {
        AdminStatus::Ok => StatusCode::OK,
        AdminStatus::Malformed => StatusCode::BAD_REQUEST,
        AdminStatus::CrossOrigin => StatusCode::FORBIDDEN,
        AdminStatus::NotFound => StatusCode::NOT_FOUND,
        AdminStatus::Allow(_) => StatusCode::METHOD_NOT_ALLOWED,
        AdminStatus::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        AdminStatus::UnderWay => StatusCode::CONFLICT,
        AdminStatus::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        AdminStatus::Unready => StatusCode::SERVICE_UNAVAILABLE,
    };
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let AdminStatus::Allow(methods) = status {
        fields.insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(nanos: u64) -> HeaderValue {
        let mut line = Line::new();
        line.milliseconds(Duration::from_nanos(nanos));
        line.value()
    }

    #[test]
    fn milliseconds_have_three_places() {
        for (nanos, written) in [
            (1, "0.000"),
            (499, "0.000"),
            (500, "0.001"),
            (9_700, "0.010"),
            (999_499, "0.999"),
            (999_500, "1.000"),
            (30_100_000, "30.100"),
            (3_600_000_000_000, "3600000.000"),
        ] {
            assert_eq!(milliseconds(nanos), written, "{nanos} ns");
        }
    }

    #[test]
    fn a_range_at_the_end_of_64_bits_is_written_out() {
        let last = ByteRange::from_bounds(u64::MAX - 1, u64::MAX).unwrap();
        assert_eq!(
            content_range_of(last, u64::MAX).value(),
            "bytes 18446744073709551614-18446744073709551614/18446744073709551615"
        );
    }
}
