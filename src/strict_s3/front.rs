//! Between the socket and the S3 service: records every request and carries out what is scripted for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, HeaderValue, IF_MATCH,
    IF_NONE_MATCH, RANGE, RETRY_AFTER,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body::Frame;
use http_body_util::{BodyDataStream, StreamBody};
use hyper::body::Incoming;
use parking_lot::Mutex;
use s3s::service::S3Service;
use s3s::{Body, HttpError, HttpResponse, S3Error, S3ErrorCode, StdError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::chunked;
use super::faults::{Effect, Hook, Mutation, Op, Plan, Refusal, RequestInfo, Script};
use super::log::RequestLog;
use super::service::Target;
use super::store::{Store, StoreError};
use super::wire::{Connection, Delivery, Pace, ResponseBody};

const CONTENT_SHA256: HeaderName = HeaderName::from_static("x-amz-content-sha256");
const DECODED_LENGTH: HeaderName = HeaderName::from_static("x-amz-decoded-content-length");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-amz-request-id");

/// Query parameters of presigned URLs, versions 4 and 2.
const SIGNATURE_PARAMETERS: [&str; 3] = ["AWSAccessKeyId", "Signature", "Expires"];

/// What all connections and the handle share.
pub(super) struct Front {
    pub(super) s3: S3Service,
    pub(super) store: Arc<Store>,
    pub(super) log: Arc<RequestLog>,
    pub(super) script: Mutex<Script>,
    pub(super) hook: Mutex<Option<Arc<Hook>>>,
    pub(super) pace: Arc<Pace>,
    /// Nanoseconds.
    pub(super) first_byte_delay: AtomicU64,
    pub(super) release: watch::Sender<()>,
    /// Cancelled when the listener closes and all connections are reset; a new one for every time it opens.
    pub(super) outage: Mutex<CancellationToken>,
    /// Whether signatures are checked.
    pub(super) authenticated: bool,
}

impl Front {
    /// Answers one request. Dropping the future (the client left) stops at once; mutations made stay made.
    pub(super) async fn answer(
        self: Arc<Self>,
        connection: Arc<Connection>,
        request: Request<Incoming>,
    ) -> Result<Response<ResponseBody>, StdError> {
        let info = self.describe(&connection, &request);
        let record = self.log.begin(&info);
        let mut effects = self.script.lock().effects(&info);
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            effects.extend(hook(&info));
        }
        for label in effects.iter().map(Effect::label) {
            record.fault(label);
        }
        let plan = Plan::new(effects);
        // Taken now, so that a release cannot slip in between this and the stall.
        let release = self.release.subscribe();

        let delay =
            plan.delay + Duration::from_nanos(self.first_byte_delay.load(Ordering::Relaxed));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if plan.outage {
            self.outage.lock().cancel();
            return Err("a scripted outage".into());
        }
        let mut response = match self.respond(request, &plan).await {
            Ok(response) => response,
            Err(error) => scripting_error(&error)?,
        };

        let object = info.op == Op::Get
            && matches!(
                response.status(),
                StatusCode::OK | StatusCode::PARTIAL_CONTENT
            );
        let limit = misreport(response.headers_mut(), &plan)?;
        let id = HeaderValue::from_str(&format!("{:016X}", info.sequence))?;
        response.headers_mut().insert(REQUEST_ID, id);
        if info.method == Method::HEAD.as_str() {
            *response.body_mut() = Body::empty();
        }
        record.answered(response.status().as_u16());
        let delivery = Delivery {
            plan: plan.body,
            limit,
            release,
            pace: Arc::clone(&self.pace),
            connection,
            record,
            object,
        };
        Ok(response.map(|body| ResponseBody::new(body, delivery)))
    }

    fn describe(&self, connection: &Connection, request: &Request<Incoming>) -> RequestInfo {
        let target = Target::of(request.method(), request.uri());
        let field = |name: HeaderName| {
            let value = request.headers().get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        RequestInfo {
            sequence: self.log.next_sequence(),
            connection: connection.number,
            op: target.op,
            method: request.method().to_string(),
            range: field(RANGE),
            if_match: field(IF_MATCH),
            if_none_match: field(IF_NONE_MATCH),
            version_id: target.parameter("versionId").map(str::to_owned),
            bucket: target.bucket,
            key: target.key,
        }
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        plan: &Plan,
    ) -> Result<HttpResponse, RespondError> {
        self.mutate(&plan.before)?;
        let response = if let Some(refusal) = plan.refusal {
            refuse(refusal)?
        } else {
            let mut request = if self.authenticated {
                request.map(Body::from)
            } else {
                unsign(request)
            };
            request.extensions_mut().insert(plan.ignore);
            self.s3.call(request).await?
        };
        self.mutate(&plan.after)?;
        Ok(response)
    }

    fn mutate(&self, mutations: &[Mutation]) -> Result<(), StoreError> {
        for mutation in mutations {
            match mutation {
                Mutation::Put {
                    bucket,
                    key,
                    bytes,
                    options,
                } => {
                    self.store
                        .put_now(bucket, key, bytes.clone(), options.clone())?;
                }
                Mutation::Delete { bucket, key } => {
                    self.store.delete_now(bucket, key)?;
                }
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum RespondError {
    #[error("a scripted mutation is impossible")]
    Mutation(#[from] StoreError),
    #[error("the service failed: {0:?}")]
    Service(HttpError),
    #[error("the answer cannot be written")]
    Answer(#[from] S3Error),
}

impl From<HttpError> for RespondError {
    fn from(error: HttpError) -> Self {
        Self::Service(error)
    }
}

/// A script that cannot be carried out must not look like a passing test.
fn scripting_error(error: &RespondError) -> Result<HttpResponse, StdError> {
    tracing::error!(?error, "a request could not be answered as scripted");
    let error = S3Error::with_message(S3ErrorCode::InternalError, error.to_string());
    Ok(error.to_http_response()?)
}

fn refuse(refusal: Refusal) -> Result<HttpResponse, S3Error> {
    let (code, message, retry_after) = match refusal {
        Refusal::SlowDown { retry_after } => (
            S3ErrorCode::SlowDown,
            "Please reduce your request rate.",
            retry_after,
        ),
        Refusal::InternalError => (
            S3ErrorCode::InternalError,
            "We encountered an internal error. Please try again.",
            None,
        ),
        Refusal::Forbidden { code } => {
            let known = S3ErrorCode::from_bytes(code.as_bytes());
            (
                known.unwrap_or(S3ErrorCode::AccessDenied),
                "Access Denied",
                None,
            )
        }
    };
    let mut response = S3Error::with_message(code, message).to_http_response()?;
    if let Some(seconds) = retry_after {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    Ok(response)
}

/// Makes the head lie as scripted. Yields where the body shall end.
fn misreport(fields: &mut HeaderMap, plan: &Plan) -> Result<u64, StdError> {
    if plan.wrong_etag && fields.contains_key(ETAG) {
        fields.insert(
            ETAG,
            HeaderValue::from_static("\"00000000000000000000000000000000\""),
        );
    }
    if plan.wrong_content_range
        && let Some(value) = fields.get(CONTENT_RANGE)
        && let Some(shifted) = value.to_str().ok().and_then(shifted)
    {
        fields.insert(CONTENT_RANGE, HeaderValue::from_str(&shifted)?);
    }
    let length = fields
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    match length {
        Some(length) if plan.missing > 0 => {
            let limit: u64 = u64::saturating_sub(length, plan.missing);
            fields.insert(CONTENT_LENGTH, HeaderValue::from(limit));
            Ok(limit)
        }
        _ => Ok(u64::MAX),
    }
}

/// `bytes 0-9/20` as `bytes 1-10/20`.
fn shifted(content_range: &str) -> Option<String> {
    let (range, size) = content_range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some(format!("bytes {}-{}/{size}", first + 1, last + 1))
}

/// Makes a signed request an anonymous one: without credentials to check against, `s3s` would refuse it.
fn unsign(request: Request<Incoming>) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    parts.headers.remove(AUTHORIZATION);
    if let Some(query) = parts.uri.query() {
        let unsigned = |pair: &&str| {
            let name = pair.split('=').next().unwrap_or_default();
            !name.starts_with("X-Amz-") && !SIGNATURE_PARAMETERS.contains(&name)
        };
        let query = query
            .split('&')
            .filter(unsigned)
            .collect::<Vec<_>>()
            .join("&");
        let path = parts.uri.path();
        let target = if query.is_empty() {
            path.to_owned()
        } else {
            format!("{path}?{query}")
        };
        if let Ok(uri) = Uri::try_from(target) {
            parts.uri = uri;
        }
    }
    let chunked = parts
        .headers
        .remove(CONTENT_SHA256)
        .is_some_and(|value| value.as_bytes().starts_with(b"STREAMING-"));
    let body = if chunked {
        if let Some(length) = parts.headers.remove(DECODED_LENGTH) {
            parts.headers.insert(CONTENT_LENGTH, length);
        }
        let encoded = BodyDataStream::new(body).map(|chunk| chunk.map_err(StdError::from));
        let decoded = chunked::decode(encoded).map(|chunk| chunk.map(Frame::data));
        Body::http_body_unsync(StreamBody::new(decoded))
    } else {
        Body::from(body)
    };
    Request::from_parts(parts, body)
}
