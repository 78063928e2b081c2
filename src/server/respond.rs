//! From an outcome to a response: the only place that names a status code.
//!
//! Every outcome is matched without a wildcard, so a new one cannot ship without a status. An outage is
//! logged here, once, with its cause; what the client reads of it names no bucket, endpoint or credential.

#![deny(clippy::wildcard_enum_match_arm)]

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    EXPIRES, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, RETRY_AFTER,
};
use http::{Response, StatusCode};

use super::body::{BodyObserver, Part, ResponseBody};
use super::io::SendQueue;
use crate::mount::PathError;
use crate::object::{Representation, Validator};
use crate::semantics::precondition::Method;
use crate::semantics::{ByteRange, Verdict};
use crate::tiers::{Forwarded, Opened, Refusal, Trace};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// From 1970 to the end of what an HTTP date can say.
const YEAR_9999: Duration = Duration::from_hours(70_380_768);

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
        verdict,
        reader,
        trace,
    } = opened;
    let size = representation.size;
    let mut parts = VecDeque::new();
    let mut headers = HeaderMap::with_capacity(16);
    let status = match &verdict {
        Verdict::Full => {
            describe(&mut headers, &representation);
            headers.insert(CONTENT_LENGTH, size.into());
            parts.extend(ByteRange::whole(size).map(Part::Range));
            StatusCode::OK
        }
        Verdict::Partial(ranges) => {
            describe(&mut headers, &representation);
            if let [range] = ranges[..] {
                headers.insert(CONTENT_RANGE, content_range(range, size));
                headers.insert(CONTENT_LENGTH, range.len().into());
                parts.push_back(Part::Range(range));
            } else {
                parts = multipart(&mut headers, ranges, size);
            }
            StatusCode::PARTIAL_CONTENT
        }
        Verdict::NotModified => {
            validators(&mut headers, &representation);
            for (name, value) in pass_through(&representation) {
                if name == CACHE_CONTROL || name == EXPIRES {
                    headers.insert(name, value);
                }
            }
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
            validators(response.headers_mut(), &representation);
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

/// The answer to a request that the tiers refuse, `pin` being the one tag it was pinned to.
pub fn refused(refusal: &Refusal, pin: Option<&Validator>) -> Response<ResponseBody> {
    let (status, detail, cause, status_seen) = match refusal {
        Refusal::PinLost { current } => {
            let mut response = precondition_failed(current.as_ref(), pin);
            forwarded_field(&mut response, Some(StatusCode::PRECONDITION_FAILED));
            return response;
        }
        Refusal::NotFound => {
            let mut response = problem(StatusCode::NOT_FOUND, "there is no such object", &[]);
            forwarded_field(&mut response, Some(StatusCode::NOT_FOUND));
            return response;
        }
        Refusal::Unavailable { cause, .. } => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the storage behind this server cannot be reached right now; try again",
            cause,
            None,
        ),
        Refusal::TimedOut { cause } => (
            StatusCode::GATEWAY_TIMEOUT,
            "the storage behind this server did not answer in time",
            cause,
            None,
        ),
        Refusal::BadGateway { cause } => (
            StatusCode::BAD_GATEWAY,
            "the storage behind this server gave an answer that cannot be used",
            cause,
            None,
        ),
    };
    tracing::warn!(
        error = &**cause as &(dyn std::error::Error + 'static),
        status = status.as_u16(),
        "the remote could not answer"
    );
    let mut response = problem(status, detail, &[]);
    forwarded_field(&mut response, status_seen);
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
                PathError::Malformed | PathError::DotSegment | PathError::TooLong => {
                    StatusCode::BAD_REQUEST
                }
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

fn validators(headers: &mut HeaderMap, representation: &Representation) {
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(ETAG, ascii(representation.validator.as_field_value()));
    // httpdate panics outside the years it can write; a remote may send anything.
    if let Some(date) = representation.last_modified.filter(|date| {
        date.duration_since(UNIX_EPOCH)
            .is_ok_and(|since| since < YEAR_9999)
    }) {
        headers.insert(LAST_MODIFIED, ascii(&httpdate::fmt_http_date(date)));
    }
}

fn describe(headers: &mut HeaderMap, representation: &Representation) {
    validators(headers, representation);
    headers.extend(pass_through(representation));
}

fn pass_through(
    representation: &Representation,
) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    representation.headers.iter().filter_map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    })
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
        head.extend_from_slice(content_range(*range, size).as_bytes());
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

fn content_range(range: ByteRange, size: u64) -> HeaderValue {
    ascii(&format!("bytes {}-{}/{size}", range.start(), range.last()))
}

/// `Cache-Status` (RFC 9211) and `Server-Timing`.
fn trace_fields(headers: &mut HeaderMap, trace: &Trace, method: Method) {
    let mut status = String::from("pinrange");
    if trace.stale {
        status.push_str("; hit; detail=stale-if-error");
    } else if let Some(why) = trace.forwarded {
        let why = match why {
            Forwarded::Miss => "miss",
            Forwarded::Partial => "partial",
            Forwarded::Stale => "stale",
            Forwarded::Request => "request",
        };
        let seen = match method {
            _ if trace.confirmed => StatusCode::NOT_MODIFIED,
            Method::Head => StatusCode::OK,
            Method::Get => StatusCode::PARTIAL_CONTENT,
        };
        status.push_str("; fwd=");
        status.push_str(why);
        status.push_str("; fwd-status=");
        status.push_str(seen.as_str());
        if trace.stored {
            status.push_str("; stored");
        }
        if trace.is_collapsed() {
            status.push_str("; collapsed");
        }
    } else {
        status.push_str("; hit; detail=disk");
    }
    headers.insert(CACHE_STATUS, ascii(&status));

    let mut timing = String::with_capacity(64);
    for (name, duration) in [
        ("disk", trace.disk),
        ("remote", trace.remote),
        ("queue", trace.queued),
    ] {
        if !duration.is_zero() {
            let separator = if timing.is_empty() { "" } else { ", " };
            let milliseconds = duration.as_secs_f64() * 1e3;
            let _infallible = write!(timing, "{separator}{name};dur={milliseconds:.3}");
        }
    }
    if !timing.is_empty() {
        headers.insert(SERVER_TIMING, ascii(&timing));
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
