//! Asks the server, and believes nothing that it has not proved.
//!
//! [`Client::open`] learns a revision from the first response that can be pinned; [`Client::stretch`] fetches
//! any stretch of that revision into a [`Sink`], whatever happens on the way. Both turn every answer
//! into one of four: the bytes asked for, [`Trouble::Passing`] (worth another try, bounded by
//! [`Patience`]), [`Trouble::Replaced`] (the pin is gone) or a final [`GetError`]. `judge_pinned` is
//! where a response proves that its body is the stretch that was asked for.
//!
//! Redirects are followed once and the place they led to is remembered for all connections. Such places are
//! often signed and expire, so a 403 from a remembered one sends that request back to the URL that the user
//! gave; a 403 from there is final.

use std::error::Error;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_MATCH, LOCATION, RANGE, RETRY_AFTER,
    TRANSFER_ENCODING, USER_AGENT,
};
use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::error::GetError;
use super::progress::Console;
use super::url;
use super::verify::Expected;
use crate::causes::one_line;
use crate::object::Validator;
use crate::semantics::ByteRange;

/// A TCP and TLS handshake takes longer than this only if nobody answers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a server may think before its status line; a cold object behind a gateway takes seconds.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a body may pause. S3 and nginx close connections that stall for 20 to 60 s themselves.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The first pause between two tries without progress; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Ten tries then take about a minute, which outlasts a restart or a failover.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// A server that wants to be left alone for longer than this is not waited for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// As browsers and RFC 9110 §15.4 have it: more is a loop.
const MAX_REDIRECTS: usize = 10;
/// hyper reads as much as this at once, so that a fast connection costs few system calls and few frames.
const READ_BUFFER: usize = 512 << 10;

/// What all stretches of one download have to agree in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    /// The strong entity tag: sent in `If-Match`, demanded in every answer.
    pub(super) etag: Validator,
    /// The complete length.
    pub(super) size: u64,
}

/// Where the bytes of one stretch go, in order.
pub(super) trait Sink {
    /// Takes the bytes that stand at `at`. Does not wait: see the implementations for why that is right.
    fn put(&mut self, at: u64, bytes: Bytes) -> Result<(), GetError>;
    /// The stretch is complete, or goes on from here on another connection.
    fn flush(&mut self) -> Result<(), GetError>;
}

/// How a download begins.
pub(super) enum Opening {
    /// The server can pin: this is the body of the first stretch, and what it belongs to.
    Pinned {
        pin: Pin,
        first: ByteRange,
        body: Frames,
        expected: Option<Expected>,
    },
    /// It cannot.
    Whole(Whole),
}

/// Everything in one stream, with no promise but its length and perhaps a checksum.
pub(super) struct Whole {
    pub(super) body: Frames,
    pub(super) length: Option<u64>,
    pub(super) etag: Option<String>,
    pub(super) expected: Option<Expected>,
}

/// Why a pinned download stops.
#[derive(Debug)]
pub(super) enum Stop {
    /// The server no longer has the revision; says what it has, as far as that is known.
    Replaced(String),
    /// For good.
    Failed(GetError),
}

impl From<GetError> for Stop {
    fn from(error: GetError) -> Self {
        Self::Failed(error)
    }
}

/// Why one try failed.
#[derive(Debug)]
enum Trouble {
    /// Another try may succeed, after `wait` where the server said so.
    Passing {
        what: String,
        wait: Option<Duration>,
    },
    Replaced(String),
    Final(GetError),
}

impl From<GetError> for Trouble {
    fn from(error: GetError) -> Self {
        Self::Final(error)
    }
}

impl Trouble {
    fn passing(what: impl Into<String>) -> Self {
        Self::Passing {
            what: what.into(),
            wait: None,
        }
    }
}

/// Counts the tries without progress of one stretch.
#[derive(Default)]
pub(super) struct Patience {
    failures: u32,
    /// Bytes came since the last failure: the next try needs no pause.
    progressed: bool,
}

impl Patience {
    fn progress(&mut self) {
        *self = Self {
            progressed: true,
            failures: 0,
        };
    }
}

/// The HTTP side of one download: connections, credentials, retries. Shared by all its tasks.
pub(super) struct Client {
    plain: Pool<HttpConnector, Empty<Bytes>>,
    /// Only made for an `https` URL: reading the system's root certificates takes tens of milliseconds.
    tls: OnceLock<Pool<HttpsConnector<HttpConnector>, Empty<Bytes>>>,
    origin: Uri,
    /// Sent to `origin`'s host alone.
    headers: HeaderMap,
    /// Where redirects led to; `origin` until then.
    target: Mutex<Uri>,
    retries: u32,
    console: Arc<Console>,
}

impl Client {
    /// `headers` may hold credentials: they go to `origin` and nowhere else.
    pub(super) fn new(
        origin: Uri,
        headers: HeaderMap,
        retries: u32,
        console: Arc<Console>,
    ) -> Self {
        Self {
            plain: pool().build(connector()),
            tls: OnceLock::new(),
            target: Mutex::new(origin.clone()),
            origin,
            headers,
            retries,
            console,
        }
    }

    /// The URL for messages.
    pub(super) fn name(&self) -> String {
        url::redact(&self.origin.to_string())
    }

    /// Asks for `first`, pinned if `pin` is given (a resumed download), and learns from the answer what can
    /// be done. Of an object shorter than `first` the body is all of it.
    pub(super) async fn open(&self, first: ByteRange, pin: Option<&Pin>) -> Result<Opening, Stop> {
        let mut patience = Patience::default();
        loop {
            match self.try_open(first, pin).await {
                Ok(opening) => return Ok(opening),
                Err(trouble) => {
                    self.bear(&mut patience, trouble, "the first request")
                        .await?;
                }
            }
        }
    }

    async fn try_open(&self, first: ByteRange, pin: Option<&Pin>) -> Result<Opening, Trouble> {
        let response = self.send(Some(first), pin).await?;
        let headers = response.headers();
        match (response.status(), pin) {
            (StatusCode::PARTIAL_CONTENT, Some(pin)) => {
                self.judge_pinned(headers, first, pin)?;
                let expected = Expected::from_headers(headers, first.len() == pin.size);
                let body = Frames::new(response.into_body(), first);
                Ok(Opening::Pinned {
                    pin: pin.clone(),
                    first,
                    body,
                    expected,
                })
            }
            (StatusCode::PARTIAL_CONTENT, None) => {
                let Some(etag) = strong_etag(headers) else {
                    return self.give_up_the_pin("sends no strong ETag").await;
                };
                let Some(ContentRange {
                    size: Some(size), ..
                }) = ContentRange::of(headers)
                else {
                    return self
                        .give_up_the_pin("does not say how long the object is")
                        .await;
                };
                let pin = Pin { etag, size };
                let Some(first) = ByteRange::whole(size).and_then(|all| all.intersect(first))
                else {
                    return Err(self.lie("sends 206 for an object of no bytes").into());
                };
                self.judge_pinned(headers, first, &pin)?;
                let expected = Expected::from_headers(headers, first.len() == size);
                let body = Frames::new(response.into_body(), first);
                Ok(Opening::Pinned {
                    pin,
                    first,
                    body,
                    expected,
                })
            }
            (StatusCode::OK, _) => {
                if content_length(headers) != Some(0) {
                    self.warn_unpinned("ignores Range");
                }
                Ok(Opening::Whole(self.take_whole(response)))
            }
            // No byte 0: an empty object. What a resumed download asks for, it knows to exist.
            (StatusCode::RANGE_NOT_SATISFIABLE, None) => self.try_whole().await.map(Opening::Whole),
            (_, pin) => Err(self.refused(&response, pin)),
        }
    }

    async fn give_up_the_pin(&self, why: &str) -> Result<Opening, Trouble> {
        self.warn_unpinned(why);
        self.try_whole().await.map(Opening::Whole)
    }

    fn warn_unpinned(&self, why: &str) {
        self.console.note(
            "warning",
            &format!(
                "{}: the server {why}: downloading in one stream, which cannot be pinned to a \
                 revision or resumed",
                self.name()
            ),
        );
    }

    /// After a single stream was cut because of `what`: asks for everything again.
    pub(super) async fn whole_again(
        &self,
        patience: &mut Patience,
        what: String,
    ) -> Result<Whole, Stop> {
        let mut trouble = Trouble::passing(what);
        loop {
            self.bear(patience, trouble, "the single stream").await?;
            match self.try_whole().await {
                Ok(whole) => return Ok(whole),
                Err(again) => trouble = again,
            }
        }
    }

    async fn try_whole(&self) -> Result<Whole, Trouble> {
        let response = self.send(None, None).await?;
        match response.status() {
            StatusCode::OK => Ok(self.take_whole(response)),
            _ => Err(self.refused(&response, None)),
        }
    }

    fn take_whole(&self, response: Response<Incoming>) -> Whole {
        let headers = response.headers();
        let length = content_length(headers);
        if length.is_none() && !headers.contains_key(TRANSFER_ENCODING) {
            self.console.note(
                "warning",
                &format!(
                    "{}: the server does not say where the object ends: if the connection breaks, \
                     nobody can tell",
                    self.name()
                ),
            );
        }
        Whole {
            length,
            etag: only(headers, ETAG).map(str::to_owned),
            expected: Expected::from_headers(headers, true),
            body: Frames {
                body: response.into_body(),
                at: 0,
                end: length,
            },
        }
    }

    /// Fetches `want` of the revision `pin` into `sink`, over as many connections as it takes: a body that is cut
    /// goes on at the exact offset under the same `If-Match`. `opened`: the body of an answer to exactly
    /// this that has been judged already.
    ///
    /// Dropping the future drops the connection; what `sink` was given stays given.
    pub(super) async fn stretch(
        &self,
        pin: &Pin,
        want: ByteRange,
        opened: Option<Frames>,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        let mut patience = Patience::default();
        let mut left = want;
        let mut opened = opened;
        loop {
            let trouble = match self.try_stretch(pin, left, opened.take(), sink).await {
                (_, Ok(())) => return Ok(()),
                (at, Err(trouble)) => {
                    if at > left.start() {
                        patience.progress();
                    }
                    match left.from_offset(at) {
                        Some(rest) => left = rest,
                        // A connection can break behind the last byte; then nothing is missing.
                        None if matches!(trouble, Trouble::Passing { .. }) => return Ok(()),
                        None => {}
                    }
                    trouble
                }
            };
            self.bear(&mut patience, trouble, &format!("byte {}", left.start()))
                .await?;
        }
    }

    /// One try. Says where it ended, since the bytes up to there count.
    async fn try_stretch(
        &self,
        pin: &Pin,
        want: ByteRange,
        opened: Option<Frames>,
        sink: &mut impl Sink,
    ) -> (u64, Result<(), Trouble>) {
        let mut body = match opened {
            Some(body) => body,
            None => match self.pinned(pin, want).await {
                Ok(body) => body,
                Err(trouble) => return (want.start(), Err(trouble)),
            },
        };
        let result = loop {
            let at = body.at;
            match body.next().await {
                Ok(Some(bytes)) => {
                    self.console.advance(bytes.len() as u64);
                    if let Err(error) = sink.put(at, bytes) {
                        return (at, Err(error.into()));
                    }
                }
                Ok(None) => break Ok(()),
                Err(Cut::Passing(what)) => break Err(Trouble::passing(what)),
                Err(Cut::TooLong) => break Err(self.too_long().into()),
            }
        };
        (body.at, sink.flush().map_err(Trouble::from).and(result))
    }

    async fn pinned(&self, pin: &Pin, want: ByteRange) -> Result<Frames, Trouble> {
        let response = self.send(Some(want), Some(pin)).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.refused(&response, Some(pin)));
        }
        self.judge_pinned(response.headers(), want, pin)?;
        Ok(Frames::new(response.into_body(), want))
    }

    /// Whether a 206 is the stretch `want` of the revision `pin`: the tag equal by strong comparison
    /// (RFC 9110 §8.8.3.2), `Content-Range` what was asked for, and as many bytes as that says.
    fn judge_pinned(&self, headers: &HeaderMap, want: ByteRange, pin: &Pin) -> Result<(), Trouble> {
        let asked = format!("bytes {}-{}/{}", want.start(), want.last(), pin.size);
        match strong_etag(headers) {
            Some(etag) if etag == pin.etag => {}
            Some(etag) => return Err(Trouble::Replaced(etag.as_field_value().to_owned())),
            None => {
                let what = format!("answers a request for {asked} with no strong ETag");
                return Err(self.lie(&what).into());
            }
        }
        let range = ContentRange::of(headers);
        if range
            != Some(ContentRange {
                bounds: Some((want.start(), want.last())),
                size: Some(pin.size),
            })
        {
            let got = headers
                .get(CONTENT_RANGE)
                .map_or_else(|| "none".into(), |value| format!("{value:?}"));
            return Err(self
                .lie(&format!(
                    "was asked for {asked} and sends Content-Range {got}"
                ))
                .into());
        }
        match content_length(headers) {
            Some(length) if length != want.len() => Err(Trouble::Final(GetError::Data(format!(
                "{}: the server sends {length} bytes as {asked}; not downloaded",
                self.name()
            )))),
            _ => Ok(()),
        }
    }

    /// Any answer that does not carry what was asked for.
    fn refused(&self, response: &Response<Incoming>, pin: Option<&Pin>) -> Trouble {
        let status = response.status();
        let headers = response.headers();
        match (status, pin) {
            (StatusCode::PRECONDITION_FAILED, Some(_)) => {
                let now = strong_etag(headers);
                let now = now.map_or_else(
                    || "another revision".into(),
                    |e| e.as_field_value().to_owned(),
                );
                return Trouble::Replaced(now);
            }
            // Some servers look at the range first; a shorter object cannot be the pinned one.
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(pin)) => {
                if let Some(size) = ContentRange::of(headers).and_then(|range| range.size)
                    && size != pin.size
                {
                    return Trouble::Replaced(format!("a revision of {size} bytes"));
                }
            }
            (StatusCode::OK, Some(_)) => {
                return self
                    .lie("answers some ranges with 206 and others with 200")
                    .into();
            }
            _ => {}
        }
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => GetError::NotFound {
                url: self.name(),
                status: status.to_string(),
            }
            .into(),
            StatusCode::UNAUTHORIZED => GetError::Denied {
                url: self.name(),
                status: status.to_string(),
                advice: "give credentials with --netrc or -H 'Authorization: …'",
            }
            .into(),
            StatusCode::FORBIDDEN => GetError::Denied {
                url: self.name(),
                status: status.to_string(),
                advice: "check the credentials, or sign the URL again if it has expired",
            }
            .into(),
            StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Trouble::Passing {
                what: status.to_string(),
                wait: retry_after(headers),
            },
            _ => self
                .lie(&format!(
                    "answers {status}, which another try would not change"
                ))
                .into(),
        }
    }

    /// A body that went on behind its end.
    pub(super) fn too_long(&self) -> GetError {
        GetError::Data(format!(
            "{}: the server sends more bytes than it announced",
            self.name()
        ))
    }

    fn lie(&self, what: &str) -> GetError {
        GetError::Protocol(format!(
            "{}: the server {what}; not downloaded",
            self.name()
        ))
    }

    /// Sends one GET to where redirects led to before. Any status but a redirect comes back as a response.
    async fn send(
        &self,
        range: Option<ByteRange>,
        pin: Option<&Pin>,
    ) -> Result<Response<Incoming>, Trouble> {
        let remembered = self.target.lock().clone();
        let known = remembered != self.origin;
        let response = self.follow(remembered, range, pin).await?;
        if response.status() == StatusCode::FORBIDDEN && known {
            return self.follow(self.origin.clone(), range, pin).await;
        }
        Ok(response)
    }

    /// Sends one GET to `target`, and on to where it redirects.
    async fn follow(
        &self,
        mut target: Uri,
        range: Option<ByteRange>,
        pin: Option<&Pin>,
    ) -> Result<Response<Incoming>, Trouble> {
        for _ in 0..=MAX_REDIRECTS {
            let request = self.request(&target, range, pin);
            let pending = if target.scheme() == Some(&Scheme::HTTPS) {
                self.tls()?.request(request)
            } else {
                self.plain.request(request)
            };
            let response = timeout(HEAD_TIMEOUT, pending)
                .await
                .map_err(|_| {
                    Trouble::passing(format!("no answer for {} s", HEAD_TIMEOUT.as_secs()))
                })?
                .map_err(|error| self.broken(&error))?;
            let redirects = [301, 302, 303, 307, 308];
            if !redirects.contains(&response.status().as_u16()) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION);
            let location = location.and_then(|value| std::str::from_utf8(value.as_bytes()).ok());
            let Some(location) = location else {
                return Err(self.lie("redirects without saying where to").into());
            };
            let next = url::resolve(&target, location)?;
            if target.scheme() == Some(&Scheme::HTTPS) && next.scheme() != Some(&Scheme::HTTPS) {
                return Err(self
                    .lie("redirects from https to http, which anyone could read and change")
                    .into());
            }
            self.target.lock().clone_from(&next);
            target = next;
        }
        Err(self
            .lie(&format!("redirects more than {MAX_REDIRECTS} times"))
            .into())
    }

    fn request(
        &self,
        target: &Uri,
        range: Option<ByteRange>,
        pin: Option<&Pin>,
    ) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = target.clone();
        let headers = request.headers_mut();
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("pinrange/", env!("CARGO_PKG_VERSION"))),
        );
        headers.insert(
            "want-repr-digest",
            HeaderValue::from_static("sha-256=10, sha-512=5"),
        );
        // S3 refuses x-amz-* fields that a presigned URL has not signed.
        if !target
            .query()
            .is_some_and(|q| q.to_ascii_lowercase().contains("x-amz-signature="))
        {
            headers.insert("x-amz-checksum-mode", HeaderValue::from_static("ENABLED"));
        }
        if url::same_origin(&self.origin, target) {
            for name in self.headers.keys() {
                headers.remove(name);
                for value in self.headers.get_all(name) {
                    headers.append(name, value.clone());
                }
            }
        }
        // The representation as it is stored: its length and its ranges are what the file gets.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(range) = range {
            let range = format!("bytes={}-{}", range.start(), range.last());
            headers.insert(
                RANGE,
                HeaderValue::from_str(&range).expect("digits are a field value"),
            );
        }
        if let Some(pin) = pin {
            let tag = HeaderValue::from_str(pin.etag.as_field_value());
            headers.insert(IF_MATCH, tag.expect("a validator is visible ASCII"));
        }
        request
    }

    fn tls(&self) -> Result<&Pool<HttpsConnector<HttpConnector>, Empty<Bytes>>, GetError> {
        if let Some(pool) = self.tls.get() {
            return Ok(pool);
        }
        let builder = HttpsConnectorBuilder::new().with_native_roots().map_err(|error| {
            GetError::Unavailable(format!(
                "{}: no root certificates ({error}); install ca-certificates or set SSL_CERT_FILE",
                self.name()
            ))
        })?;
        let connector = builder
            .https_only()
            .enable_http1()
            .wrap_connector(connector());
        Ok(self.tls.get_or_init(|| pool().build(connector)))
    }

    /// A request that got no response. A certificate that is not accepted stays so.
    fn broken(&self, error: &hyper_util::client::legacy::Error) -> Trouble {
        // The outermost message only says at which stage.
        let cause = error.source().unwrap_or(error);
        if is_tls_failure(error) {
            let what = one_line(cause);
            return GetError::Unavailable(format!("{}: no TLS connection: {what}", self.name()))
                .into();
        }
        Trouble::passing(one_line(cause))
    }

    /// Waits until another try makes sense.
    async fn bear(
        &self,
        patience: &mut Patience,
        trouble: Trouble,
        place: &str,
    ) -> Result<(), Stop> {
        let (what, wait) = match trouble {
            Trouble::Final(error) => return Err(error.into()),
            Trouble::Replaced(now) => return Err(Stop::Replaced(now)),
            Trouble::Passing { what, wait } => (what, wait),
        };
        if std::mem::take(&mut patience.progressed) && wait.is_none() {
            return Ok(());
        }
        if patience.failures >= self.retries {
            return Err(self.exhausted(&what, place).into());
        }
        let pause = match wait {
            Some(wait) if wait > MAX_RETRY_AFTER => {
                let what = format!(
                    "{what}, and wants to be left alone for {} s",
                    wait.as_secs()
                );
                return Err(self.exhausted(&what, place).into());
            }
            // All connections are told the same time; they need not come back in the same instant.
            Some(wait) => wait + jitter(FIRST_PAUSE),
            None => {
                let pause = FIRST_PAUSE
                    .saturating_mul(1 << patience.failures.min(16))
                    .min(MAX_PAUSE);
                pause / 2 + jitter(pause / 2)
            }
        };
        patience.failures += 1;
        self.console.note(
            "retry",
            &format!(
                "{}: {place}: {what}; try {} of {} in {:.1} s",
                self.name(),
                patience.failures,
                self.retries,
                pause.as_secs_f64()
            ),
        );
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn exhausted(&self, what: &str, place: &str) -> GetError {
        GetError::Unavailable(format!(
            "{}: {place}: {what}; gave up after {} retries, run the same command again later",
            self.name(),
            self.retries
        ))
    }
}

fn connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector
}

fn pool() -> hyper_util::client::legacy::Builder {
    let mut builder = Pool::builder(TokioExecutor::new());
    builder
        .http1_max_buf_size(READ_BUFFER)
        .pool_timer(TokioTimer::new());
    builder
}

/// rustls reports what the peer did wrong as an `InvalidData` I/O error, which its users wrap in others; and an I/O error's
/// `source` is its content's source, not its content.
fn is_tls_failure(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|io| io.kind() == io::ErrorKind::InvalidData)
        || io
            .and_then(io::Error::get_ref)
            .is_some_and(|inner| is_tls_failure(inner))
        || error.source().is_some_and(is_tls_failure)
}

/// Up to `most`, evenly. Not secret, so the standard library's hash keys are random enough.
fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() >> 32;
    let nanos = (most.as_nanos() * u128::from(random)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// A body that knows which stretch it has to be.
pub(super) struct Frames {
    body: Incoming,
    /// Where the next byte stands.
    pub(super) at: u64,
    /// Where the body has to end, if that is known.
    end: Option<u64>,
}

/// Why a body ended before its end.
pub(super) enum Cut {
    /// The connection broke or stalled.
    Passing(String),
    /// It went on behind its end.
    TooLong,
}

impl Frames {
    fn new(body: Incoming, range: ByteRange) -> Self {
        Self {
            body,
            at: range.start(),
            end: Some(range.end()),
        }
    }

    /// The next bytes as the socket gave them; `None` once the stretch is complete. Trailers are passed over.
    /// Reads up to the end of the message, so that the connection can be used again.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Cut> {
        loop {
            let frame = timeout(STALL_TIMEOUT, self.body.frame())
                .await
                .map_err(|_| {
                    Cut::Passing(format!("nothing came for {} s", STALL_TIMEOUT.as_secs()))
                })?;
            match frame {
                Some(Ok(frame)) => {
                    let Ok(bytes) = frame.into_data() else {
                        continue;
                    };
                    self.at += bytes.len() as u64;
                    if self.end.is_some_and(|end| self.at > end) {
                        self.at -= bytes.len() as u64;
                        return Err(Cut::TooLong);
                    }
                    return Ok(Some(bytes));
                }
                Some(Err(error)) => return Err(Cut::Passing(one_line(&error))),
                None => {
                    return match self.end {
                        Some(end) if self.at < end => Err(Cut::Passing(format!(
                            "the body ended {} bytes early",
                            end - self.at
                        ))),
                        _ => Ok(None),
                    };
                }
            }
        }
    }
}

/// `Content-Range` (RFC 9110 §14.4) of unit `bytes`: the inclusive bounds and the complete length, as
/// far as they are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentRange {
    bounds: Option<(u64, u64)>,
    size: Option<u64>,
}

impl ContentRange {
    /// `None` unless there is exactly one such field, well-formed.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = only(headers, CONTENT_RANGE)?;
        let (unit, rest) = text.split_once(' ')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (bounds, size) = rest.split_once('/')?;
        let size = if size == "*" {
            None
        } else {
            Some(number(size)?)
        };
        let bounds = match bounds.split_once('-') {
            Some((first, last)) => Some((number(first)?, number(last)?)),
            None if bounds == "*" => None,
            None => return None,
        };
        Some(Self { bounds, size })
    }
}

/// `str::parse` takes a sign, RFC 9110 does not.
fn number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

fn only(headers: &HeaderMap, name: http::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

fn strong_etag(headers: &HeaderMap) -> Option<Validator> {
    Validator::from_etag_field(only(headers, ETAG)?).ok()
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    number(only(headers, CONTENT_LENGTH)?)
}

/// `Retry-After` (RFC 9110 §10.2.3): seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = only(headers, RETRY_AFTER)?;
    number(text).map(Duration::from_secs).or_else(|| {
        let date = httpdate::parse_http_date(text).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn with(name: &HeaderName, values: &[&str]) -> HeaderMap {
        values
            .iter()
            .map(|v| (name.clone(), HeaderValue::from_str(v).unwrap()))
            .collect()
    }

    #[test]
    fn a_tls_failure_is_found_however_deep() {
        let tls = io::Error::new(io::ErrorKind::InvalidData, "certificate");
        assert!(is_tls_failure(&io::Error::other(io::Error::other(tls))));
        assert!(!is_tls_failure(&io::Error::other(io::Error::from(
            io::ErrorKind::ConnectionReset
        ))));
    }

    #[test]
    fn content_range_is_read_strictly() {
        let of = |values: &[&str]| {
            ContentRange::of(&with(&CONTENT_RANGE, values)).map(|range| (range.bounds, range.size))
        };
        assert_eq!(of(&["bytes 0-9/10"]), Some((Some((0, 9)), Some(10))));
        assert_eq!(of(&["Bytes 0-9/*"]), Some((Some((0, 9)), None)));
        assert_eq!(of(&["bytes */10"]), Some((None, Some(10))));
        for bad in [
            "bytes 0-9",
            "bytes +0-9/10",
            "bytes 0-/10",
            "items 0-9/10",
            "bytes=0-9/10",
            "bytes 0-9/",
        ] {
            assert_eq!(of(&[bad]), None, "{bad}");
        }
        assert_eq!(of(&["bytes 0-9/10", "bytes 0-9/10"]), None);
        assert_eq!(
            of(&["bytes 0-99999999999999999999/100000000000000000000"]),
            None
        );
    }

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let of = |value: &str| retry_after(&with(&RETRY_AFTER, &[value]));
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let soon = SystemTime::now() + Duration::from_secs(100);
        let wait = of(&httpdate::fmt_http_date(soon)).unwrap();
        assert!((98..=100).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(of("soon"), None);
        assert_eq!(of("-1"), None);
    }

    #[test]
    fn only_one_strong_quoted_tag_pins() {
        let of = |values: &[&str]| strong_etag(&with(&ETAG, values)).is_some();
        assert!(of(&["\"a\""]));
        for bad in [&["W/\"a\""][..], &["a"], &["\"a\"", "\"a\""], &[]] {
            assert!(!of(bad), "{bad:?}");
        }
    }

    #[test]
    fn jitter_stays_within_its_bounds() {
        let most = Duration::from_millis(250);
        let drawn: Vec<_> = (0..64).map(|_| jitter(most)).collect();
        assert!(drawn.iter().all(|d| *d < most));
        assert!(drawn.iter().any(|d| *d != drawn[0]));
    }
}
