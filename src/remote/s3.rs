//! S3 and whatever speaks its protocol: the only user of the AWS SDK.
//!
//! The SDK resolves credentials and signs. What a response *means* is read here, from
//! its raw status and fields, because the SDK's types drop what we need (`GetObjectOutput` has no
//! status; 304 and an empty 412 come as "unhandled") and refuse what we can live with (a malformed
//! `Last-Modified` fails the whole GET). So the connector that we put below the SDK hands the response's head, and a
//! success's body, past the SDK to the call that waits for them; the SDK is left with the status, and the body of
//! an error. The bytes are moved by `wire`, which the SDK's own HTTP client would do with ten times the memory:
//!
//! ```text
//! Remote method → request → SDK (credentials, signature) → connector → wire → Head, and a success's body
//!                                                                          ↘ SDK → an S3 error code
//! Head: success → check_range / check_whole → exact_body → RemoteRead
//!       else    → classify → RemoteError
//! ```
//!
//! A success ends the SDK's call where the connector has its head: the call is dropped, as it is when time is up. What the SDK
//! makes of a success would hold up a cold range's first byte, and nobody reads it. Nor does the SDK tell of itself and its
//! attempts, of which there is one: what costs most before a GET leaves, next to the signature.
//!
//! The SDK's retries, stalled-stream protection and response checksums are off: the caller owns the
//! retry budget, we have our own timeouts, and a checksum that is known at the end of the body
//! comes too late for bytes that were already sent on. Timeouts: the TCP and TLS handshake; the
//! response's head, counted from the call, so that it includes credentials and the handshake;
//! silence within a body.
//!
//! # Versions
//! A guard that knows a version id asks for that version. If S3 refuses (the version was removed by
//! a lifecycle rule, or our policy lacks `s3:GetObjectVersion`), that says nothing of the object,
//! which may well be at the guarded revision: [`Remote::read`] then asks once more, without the id,
//! still with `If-Match`. It and [`Remote::checksums`] are the only methods that can make two requests. Where the second
//! succeeds after a 403, versions are not asked for again.

mod wire;

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{BehaviorVersion, ConfigLoader, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_runtime::invocation_id::InvocationIdInterceptor;
use aws_runtime::request_info::RequestInfoInterceptor;
use aws_runtime::service_clock_skew::ServiceClockSkewInterceptor;
use aws_runtime::user_agent::UserAgentInterceptor;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    AppName, Region, RequestChecksumCalculation, ResponseChecksumValidation, RuntimeComponents,
    SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::builders::GetObjectFluentBuilder;
use aws_sdk_s3::primitives::SdkBody;
use aws_sdk_s3::types::ChecksumMode;
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::interceptors::context::BeforeSerializationInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::{Intercept, disable_interceptor};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::http::Headers;
use aws_smithy_types::config_bag::ConfigBag;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, Stream};
use http::HeaderValue;
use http_body::Body as _;
use http_body_util::{Empty, Limited};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use self::wire::{Wire, WireError};
use super::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead, TRACEPARENT};
use crate::object::{Checksum, ChecksumAlgorithm, Representation, Validator};
use crate::semantics::{ByteRange, RangeSpec};

/// Log directives for the SDK: its credential chain dumps each provider's failure, and its runtime has an error for each answer
/// of S3 that another try may mend (there is no connection of its own that it could close), though what comes of them is
/// in our own [`RemoteError`], which is logged once.
pub const QUIET: &str = "aws_config=off,aws_smithy_runtime=off";

/// Stands in the bucket's access log.
const USER_AGENT: &str = concat!("pinrange/", env!("CARGO_PKG_VERSION"));

/// Longest key that S3 takes, in bytes; a longer one names nothing.
const MAX_KEY: usize = 1024;

/// Most bytes of `x-amz-meta-*` names and values that are passed on. S3 allows 2 KB; others more.
const MAX_USER_METADATA: usize = 8 * 1024;

/// Most bytes of an error response that are read. S3's errors are below 2 KiB.
const MAX_ERROR_BODY: usize = 64 * 1024;

/// How long a start may wait for the instance's region, where nothing else names one.
const IMDS_REGION_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a bucket is and how long to wait for it.
#[derive(Clone, Debug)]
pub struct S3Settings {
    /// The bucket's name, or an access point's ARN.
    pub bucket: String,
    /// Base URL of the store, as `http://127.0.0.1:3900`. `None`: `AWS_ENDPOINT_URL_S3`,
    /// `AWS_ENDPOINT_URL`, the profile's `endpoint_url`, else AWS itself.
    pub endpoint: Option<String>,
    /// `None`: the environment's or the profile's; then `us-east-1` for an endpoint, the instance's
    /// for AWS.
    pub region: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`.
    pub path_style: bool,
    /// Where credentials come from.
    pub credentials: CredentialSource,
    /// For a connection, TLS included.
    pub connect_timeout: Duration,
    /// From the call to the response's head; credentials and connection are included.
    pub first_byte_timeout: Duration,
    /// The longest silence within a body.
    pub stall_timeout: Duration,
}

/// Where credentials come from.
#[derive(Clone)]
#[non_exhaustive]
pub enum CredentialSource {
    /// The standard AWS chain: environment, profile (SSO and processes too), web identity,
    /// container, instance. Asked when the first request needs them and again before they expire.
    Chain,
    /// For an S3 that we started ourselves; never read from a configuration.
    Fixed {
        /// Access key id.
        access_key_id: String,
        /// Its secret.
        secret_access_key: String,
    },
}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chain => "Chain",
            Self::Fixed { .. } => "Fixed { .. }",
        })
    }
}

impl S3Settings {
    /// `bucket` on AWS, with credentials from the standard chain.
    ///
    /// Timeouts: S3 answers within 200 ms when it is well, so 3 s to connect and 10 s to answer or
    /// of silence are trouble, and leave a client that waits 30 s room for a retry.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            endpoint: None,
            region: None,
            path_style: false,
            credentials: CredentialSource::Chain,
            connect_timeout: Duration::from_secs(3),
            first_byte_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
        }
    }
}

/// Settings that name no bucket one could ask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidS3Settings {
    /// The bucket's name is empty or holds what no name can.
    #[error("bucket {0:?} is not a bucket name or an access point's ARN")]
    Bucket(String),
    /// Not `http://host[:port]` or `https://…`. Says nothing of the value, which may hold a
    /// password.
    #[error(
        "the endpoint {0}; it should look like https://s3.example.com or http://127.0.0.1:3900"
    )]
    Endpoint(&'static str),
}

/// One bucket of an S3 server.
pub struct S3Remote {
    store: Arc<str>,
    bucket: String,
    client: Client,
    first_byte_timeout: Duration,
    stall_timeout: Duration,
    /// Set when a GET by version was refused with 403 and the same GET without it succeeded.
    versions_denied: AtomicBool,
}

impl S3Remote {
    /// [`connect_over`](Self::connect_over) a transport of its own.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(settings: S3Settings) -> Result<Self, InvalidS3Settings> {
        Self::connect_over(&Transport::default(), settings).await
    }

    /// Makes a driver; connects to nothing and asks for no credentials, so an S3 that is down or
    /// credentials that are missing show with the first request.
    ///
    /// Only where nothing names a region or an endpoint is the instance metadata service asked for
    /// the region, for at most two seconds.
    ///
    /// # Errors
    /// [`InvalidS3Settings`] when no request could ever be made of `settings`.
    pub async fn connect_over(
        transport: &Transport,
        settings: S3Settings,
    ) -> Result<Self, InvalidS3Settings> {
        check_bucket(&settings.bucket)?;
        let configured = match settings.endpoint.clone() {
            Some(endpoint) => Some(endpoint),
            None => endpoint_from_environment(),
        };
        let shared = transport.sdk_config(&settings, configured.is_some()).await;
        let endpoint = match configured.as_deref().or_else(|| shared.endpoint_url()) {
            Some(endpoint) => Some(checked_endpoint(endpoint)?),
            None => None,
        };
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .http_client(OverWire(Arc::clone(&transport.wire)))
            .force_path_style(settings.path_style)
            .interceptor(OneAttempt)
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        // Set even when there is none, so that the store's identity below names what is asked.
        config.set_endpoint_url(endpoint.clone());
        // A bucket's name on AWS is unique among all regions.
        let store = match &endpoint {
            Some(endpoint) => format!("{endpoint}/{}", settings.bucket),
            None => format!("s3://{}", settings.bucket),
        };
        Ok(Self {
            store: store.into(),
            bucket: settings.bucket,
            client: Client::from_conf(config.build()),
            first_byte_timeout: settings.first_byte_timeout,
            stall_timeout: settings.stall_timeout,
            versions_denied: AtomicBool::new(false),
        })
    }

    fn get(&self, key: &str) -> GetObjectFluentBuilder {
        self.client.get_object().bucket(&self.bucket).key(key)
    }

    /// Waits for the response's head and, for an error, its body. A success's is untouched and unchecked.
    async fn exchange<T, E>(
        &self,
        op: &'static str,
        sent: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    ) -> Result<(Head, wire::Body), Refusal>
    where
        E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
    {
        let past = Past::default();
        let mut sent = pin!(PAST_THE_SDK.scope(Arc::clone(&past), sent));
        // A success is here before the SDK has it, which would only read what we read ourselves, and is dropped then.
        let answered = std::future::poll_fn(|cx| match sent.as_mut().poll(cx) {
            Poll::Pending if past.lock().body.is_some() => Poll::Ready(None),
            polled => polled.map(Some),
        });
        let Ok(result) = tokio::time::timeout(self.first_byte_timeout, answered).await else {
            let detail = format!("no response within {:?}", self.first_byte_timeout);
            return Err(RemoteError::new(RemoteErrorKind::Timeout, op, detail).into());
        };
        let Exchange {
            access_key_id,
            head,
            body,
        } = std::mem::take(&mut *past.lock());
        match (head, body, result) {
            (Some(head), Some(body), None) => Ok((head, body)),
            (Some(head), None, Some(Err(error))) => Err(Refusal::of_response(
                op,
                head,
                access_key_id.as_deref(),
                &error,
            )),
            (_, _, Some(Err(error))) => Err(transport_error(op, error).into()),
            (_, _, None | Some(Ok(_))) => {
                unreachable!("the SDK is dropped before it has an output")
            }
        }
    }

    async fn read_once(
        &self,
        guard: &Guard,
        want: RangeSpec,
        version_id: Option<&str>,
    ) -> Result<RemoteRead, Refusal> {
        const OP: &str = "read";
        let request = self
            .get(&guard.key)
            .if_match(guard.validator.as_field_value())
            .range(range_field(want))
            .set_version_id(version_id.map(str::to_owned));
        let (head, body) = self.exchange(OP, request.send()).await?;
        let (representation, range) = head.check_range(OP, want)?;
        head.check_validator(OP, &representation, &guard.validator)?;
        guard.check_size(OP, representation.size)?;
        let body = exact_body(body, range.len(), self.stall_timeout, OP);
        Ok(RemoteRead {
            representation,
            range: Some(range),
            body,
        })
    }

    async fn read_guarded(
        &self,
        guard: &Guard,
        want: RangeSpec,
    ) -> Result<RemoteRead, RemoteError> {
        const OP: &str = "read";
        check_key(&guard.key, OP)?;
        if want == RangeSpec::Suffix(0) {
            return Err(empty_suffix(OP, guard.size));
        }
        let Some(version_id) = self.version_to_ask_for(guard) else {
            return Ok(self.read_once(guard, want, None).await?);
        };
        let refusal = match self.read_once(guard, want, Some(version_id)).await {
            Ok(read) => return Ok(read),
            Err(refusal) => refusal,
        };
        if !refusal.may_be_of_the_version() {
            return Err(refusal.into());
        }
        let read = self.read_once(guard, want, None).await?;
        if refusal.status() == Some(403) && !self.versions_denied.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "S3 denies reads by version: held revisions will not outlive an overwrite; \
                 allow s3:GetObjectVersion to us to change that"
            );
        }
        Ok(read)
    }

    fn version_to_ask_for<'a>(&self, guard: &'a Guard) -> Option<&'a str> {
        guard
            .version_id
            .as_deref()
            .filter(|id| *id != "null" && !self.versions_denied.load(Ordering::Relaxed))
    }

    async fn checksums_once(
        &self,
        guard: &Guard,
        version_id: Option<&str>,
    ) -> Result<Vec<Checksum>, Refusal> {
        const OP: &str = "checksums";
        let sent = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(guard.key.as_ref())
            .if_match(guard.validator.as_field_value())
            .set_version_id(version_id.map(str::to_owned))
            .checksum_mode(ChecksumMode::Enabled)
            .send();
        let (head, _) = self.exchange(OP, sent).await?;
        let (representation, _) = head.check_whole(OP)?;
        head.check_validator(OP, &representation, &guard.validator)?;
        guard.check_size(OP, representation.size)?;
        Ok(head.checksums(&guard.validator))
    }

    async fn checksums_guarded(&self, guard: &Guard) -> Result<Vec<Checksum>, RemoteError> {
        check_key(&guard.key, "checksums")?;
        if let Some(version_id) = self.version_to_ask_for(guard) {
            match self.checksums_once(guard, Some(version_id)).await {
                // As for a read: that says nothing of the object.
                Err(refusal) if refusal.may_be_of_the_version() => {}
                answer => return Ok(answer?),
            }
        }
        Ok(self.checksums_once(guard, None).await?)
    }

    async fn read_labelled(
        &self,
        key: &str,
        want: Option<RangeSpec>,
        unless: Option<&Validator>,
    ) -> Result<Current, RemoteError> {
        const OP: &str = "read_current";
        check_key(key, OP)?;
        if want == Some(RangeSpec::Suffix(0)) {
            return Err(empty_suffix(OP, None));
        }
        let request = self
            .get(key)
            .set_range(want.map(range_field))
            .set_if_none_match(unless.map(|validator| validator.as_field_value().to_owned()));
        let (head, body) = match (self.exchange(OP, request.send()).await, unless) {
            (Ok(answer), _) => answer,
            (
                Err(Refusal {
                    head: Some(head @ Head { status: 304, .. }),
                    ..
                }),
                Some(unless),
            ) => {
                return head.not_modified(OP, unless);
            }
            (Err(refusal), _) => return Err(refusal.unguarded().into()),
        };
        let (representation, range) = match want {
            Some(want) => {
                let (representation, range) = head.check_range(OP, want)?;
                (representation, Some(range))
            }
            None => head.check_whole(OP)?,
        };
        let len = range.map_or(0, ByteRange::len);
        let body = exact_body(body, len, self.stall_timeout, OP);
        Ok(Current::Read(RemoteRead {
            representation,
            range,
            body,
        }))
    }

    async fn head(
        &self,
        key: &str,
        pin: Option<&Validator>,
    ) -> Result<Representation, RemoteError> {
        const OP: &str = "stat";
        check_key(key, OP)?;
        let sent = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(key)
            .set_if_match(pin.map(|validator| validator.as_field_value().to_owned()))
            .send();
        let (head, _) = match (self.exchange(OP, sent).await, pin) {
            (Err(refusal), None) => return Err(refusal.unguarded().into()),
            (answer, _) => answer?,
        };
        let (representation, _) = head.check_whole(OP)?;
        if let Some(pin) = pin {
            head.check_validator(OP, &representation, pin)?;
        }
        Ok(representation)
    }
}

impl fmt::Debug for S3Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Remote")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

impl Remote for S3Remote {
    fn store(&self) -> &Arc<str> {
        &self.store
    }

    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>> {
        self.head(key, pin).boxed()
    }

    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>> {
        self.read_guarded(guard, want).boxed()
    }

    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<Checksum>, RemoteError>> {
        self.checksums_guarded(guard).boxed()
    }

    fn read_current<'a>(
        &'a self,
        key: &'a str,
        want: Option<RangeSpec>,
        unless: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Current, RemoteError>> {
        self.read_labelled(key, want, unless).boxed()
    }
}

// === settings ===

/// What the buckets of one process share: idle connections to a server, trusted certificates, and the credentials of
/// the standard chain, so that a thousand buckets ask for them as often as one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Transport {
    wire: Arc<Wire>,
    http_client: SharedHttpClient,
    chains: Arc<tokio::sync::Mutex<HashMap<Chain, SdkConfig>>>,
}

/// What the SDK's configuration depends on, where credentials come from the standard chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Chain {
    region: Option<String>,
    has_endpoint: bool,
    connect_timeout: Duration,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            wire: Arc::default(),
            http_client: http_client(),
            chains: Arc::default(),
        }
    }
}

impl Transport {
    async fn sdk_config(&self, settings: &S3Settings, has_endpoint: bool) -> SdkConfig {
        let chain = Chain {
            region: settings.region.clone(),
            has_endpoint,
            connect_timeout: settings.connect_timeout,
        };
        if let CredentialSource::Fixed {
            access_key_id,
            secret_access_key,
        } = &settings.credentials
        {
            let fixed = aws_sdk_s3::config::Credentials::new(
                access_key_id,
                secret_access_key,
                None,
                None,
                "pinrange",
            );
            let loader = self.loader(chain).await.credentials_provider(fixed);
            return loader.load().await;
        }
        let mut chains = self.chains.lock().await;
        if let Some(known) = chains.get(&chain) {
            return known.clone();
        }
        let loaded = self.loader(chain.clone()).await.load().await;
        chains.insert(chain, loaded.clone());
        loaded
    }

    async fn loader(&self, chain: Chain) -> ConfigLoader {
        aws_config::defaults(BehaviorVersion::latest())
            .http_client(self.http_client.clone())
            .app_name(app_name())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(chain.connect_timeout)
                    .build(),
            )
            .region(region(chain.region, chain.has_endpoint).await)
    }
}

/// The SDK's way to the wire.
#[derive(Clone, Debug)]
struct OverWire(Arc<Wire>);

impl HttpClient for OverWire {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(WireConnector {
            wire: Arc::clone(&self.0),
            connect_timeout: settings.connect_timeout(),
        })
    }
}

#[derive(Debug)]
struct WireConnector {
    wire: Arc<Wire>,
    connect_timeout: Option<Duration>,
}

tokio::task_local! {
    /// The exchange that this task waits for: the connector is called by the SDK, within the call of the SDK.
    static PAST_THE_SDK: Past;
}

type Past = Arc<Mutex<Exchange>>;

/// What the SDK would drop, refuse or hide.
#[derive(Debug, Default)]
struct Exchange {
    /// What the request was signed with: servers repeat it in their messages.
    access_key_id: Option<String>,
    head: Option<Head>,
    /// Of a success.
    body: Option<wire::Body>,
}

impl HttpConnector for WireConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (wire, timeout) = (Arc::clone(&self.wire), self.connect_timeout);
        HttpConnectorFuture::new(async move {
            let past = PAST_THE_SDK.with(Arc::clone);
            past.lock().access_key_id = access_key_id(&request);
            let request = request
                .try_into_http1x()
                .map_err(|error| ConnectorError::user(error.into()))?;
            // A GET or HEAD: there is nothing to send but the head.
            let mut request = request.map(|_nothing| Empty::new());
            // No part of the signature, either.
            let agent = HeaderValue::from_static(USER_AGENT);
            request
                .headers_mut()
                .insert(http::header::USER_AGENT, agent);
            if let Ok(Some(trace)) = TRACEPARENT.try_with(Clone::clone) {
                let trace = HeaderValue::try_from(trace.into_string())
                    .map_err(|error| ConnectorError::user(error.into()))?;
                // Behind the signature: proxies on the way put a span of their own there.
                request.headers_mut().insert("traceparent", trace);
            }
            let response = wire.send(request, timeout).await.map_err(connector_error)?;
            let (head, body) = response.into_parts();
            let (body, aside) = if head.status.is_success() {
                (SdkBody::empty(), Some(body))
            } else {
                let body = Limited::new(body, MAX_ERROR_BODY);
                (SdkBody::from_body_1_x(body), None)
            };
            let mut response = HttpResponse::try_from(http::Response::from_parts(head, body))
                .map_err(|error| ConnectorError::other(error.into(), None))?;
            // What the SDK does not see cannot fail its parsers (`Expires: 0`), and it needs none of it.
            let headers = std::mem::take(response.headers_mut());
            let succeeded = aside.is_some();
            {
                let mut past = past.lock();
                past.body = aside;
                past.head = Some(Head {
                    status: response.status().as_u16(),
                    headers,
                });
            }
            if succeeded {
                // The exchange looks for it whenever this waits, and drops this then.
                std::future::pending::<()>().await;
            }
            Ok(response)
        })
    }
}

fn access_key_id(request: &HttpRequest) -> Option<String> {
    let authorization = request.headers().get("authorization")?;
    let (_, credential) = authorization.split_once("Credential=")?;
    let (id, _) = credential.split_once('/')?;
    Some(id.to_owned())
}

fn connector_error(error: WireError) -> ConnectorError {
    match &error {
        WireError::Uri(_) | WireError::Roots(_) => ConnectorError::user(error.into()),
        WireError::ConnectTimeout(_) => ConnectorError::timeout(error.into()),
        WireError::Connect(_) | WireError::Untrusted(_) | WireError::Http(_) => {
            ConnectorError::io(error.into())
        }
    }
}

/// For credentials: the metadata services, STS, SSO.
fn http_client() -> SharedHttpClient {
    // The default TLS context trusts the system's certificates and honours SSL_CERT_FILE.
    aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(
            tls::rustls_provider::CryptoMode::Ring,
        ))
        .build_https()
}

/// Leaves out what the SDK would tell S3 of itself and of its attempts, of which there is one, and how it corrects its clock by a
/// field that it does not see.
#[derive(Debug)]
struct OneAttempt;

impl Intercept for OneAttempt {
    fn name(&self) -> &'static str {
        "OneAttempt"
    }

    fn read_before_execution(
        &self,
        _: &BeforeSerializationInterceptorContextRef<'_>,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        const WHY: &str = "there is one attempt, and nobody reads of it";
        let state = config.interceptor_state();
        state.store_put(disable_interceptor::<InvocationIdInterceptor>(WHY));
        state.store_put(disable_interceptor::<RequestInfoInterceptor>(WHY));
        state.store_put(disable_interceptor::<ServiceClockSkewInterceptor>(WHY));
        state.store_put(disable_interceptor::<UserAgentInterceptor>(WHY));
        Ok(())
    }
}

/// Stands in the `User-Agent` of requests for credentials.
fn app_name() -> AppName {
    AppName::new("pinrange").expect("letters only")
}

async fn region(configured: Option<String>, has_endpoint: bool) -> Region {
    if let Some(region) = configured {
        return Region::new(region);
    }
    let named = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new());
    if let Some(region) = named.region().await {
        return region;
    }
    if !has_endpoint {
        let instance = ImdsRegionProvider::builder().build();
        if let Ok(Some(region)) = tokio::time::timeout(IMDS_REGION_TIMEOUT, instance.region()).await
        {
            return region;
        }
        tracing::warn!("no region is configured; assuming us-east-1. Set the mount's `region`");
    }
    Region::from_static("us-east-1")
}

fn endpoint_from_environment() -> Option<String> {
    let ignored = std::env::var("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS");
    if ignored.is_ok_and(|value| value.eq_ignore_ascii_case("true")) {
        return None;
    }
    std::env::var("AWS_ENDPOINT_URL_S3")
        .ok()
        .filter(|url| !url.is_empty())
}

fn check_bucket(bucket: &str) -> Result<(), InvalidS3Settings> {
    // Colons and slashes stand in ARNs; everything stricter is for the server to say.
    let plausible = |b: u8| b.is_ascii_alphanumeric() || b"-._:/".contains(&b);
    if bucket.is_empty() || !bucket.bytes().all(plausible) {
        return Err(InvalidS3Settings::Bucket(bucket.to_owned()));
    }
    Ok(())
}

/// One spelling per endpoint: scheme and host in lower case, no slash at the end.
fn checked_endpoint(endpoint: &str) -> Result<String, InvalidS3Settings> {
    let invalid = |what| Err(InvalidS3Settings::Endpoint(what));
    let Ok(uri) = endpoint.parse::<http::Uri>() else {
        return invalid("is not a URL");
    };
    let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority())
    else {
        return invalid("is not an http or https URL with a host");
    };
    if authority.as_str().contains('@') {
        return invalid("holds a user name; credentials come from the AWS chain");
    }
    if uri.query().is_some() {
        return invalid("has a query");
    }
    let authority = authority.as_str().to_ascii_lowercase();
    Ok(format!(
        "{scheme}://{authority}{}",
        uri.path().trim_end_matches('/')
    ))
}

fn check_key(key: &str, op: &'static str) -> Result<(), RemoteError> {
    if key.is_empty() || key.len() > MAX_KEY {
        let detail = format!("no key has {} bytes", key.len());
        return Err(RemoteError::new(RemoteErrorKind::Absent, op, detail));
    }
    Ok(())
}

/// Servers disagree on `bytes=-0`, so none is asked.
fn empty_suffix(op: &'static str, size: Option<u64>) -> RemoteError {
    let kind = RemoteErrorKind::Unsatisfiable { size };
    RemoteError::new(kind, op, "a suffix of no bytes is no range")
}

/// No object is near 2⁶³ bytes, and not every server reads numbers beyond, so larger ones are cut
/// to it; the answer is the same.
fn range_field(want: RangeSpec) -> String {
    const MAX: u64 = i64::MAX as u64;
    match want {
        RangeSpec::Closed { first, last } => format!("bytes={}-{}", first.min(MAX), last.min(MAX)),
        RangeSpec::From(first) => format!("bytes={}-", first.min(MAX)),
        RangeSpec::Suffix(length) => format!("bytes=-{}", length.min(MAX)),
    }
}

// === the response's head ===

#[derive(Debug)]
struct Head {
    status: u16,
    headers: Headers,
}

impl Head {
    /// A field that must not have two meanings.
    fn single(&self, op: &'static str, name: &'static str) -> Result<Option<&str>, RemoteError> {
        let mut values = self.headers.get_all_bytes(name);
        let (first, second) = (values.next(), values.next());
        if second.is_some() {
            return Err(protocol(
                op,
                format!("the response has several {name} fields"),
            ));
        }
        first
            .map(std::str::from_utf8)
            .transpose()
            .map_err(|_| protocol(op, format!("the response's {name} is not text")))
    }

    fn content_length(&self, op: &'static str) -> Result<Option<u64>, RemoteError> {
        self.single(op, "content-length")?
            .map(|value| {
                decimal(value)
                    .ok_or_else(|| protocol(op, format!("Content-Length {value:?} is no number")))
            })
            .transpose()
    }

    /// Checks a response to a range: 206, the range that was asked for once it is clamped to the
    /// complete length that the response itself names, and as many bytes of body.
    fn check_range(
        &self,
        op: &'static str,
        want: RangeSpec,
    ) -> Result<(Representation, ByteRange), RemoteError> {
        if self.status != 206 {
            return Err(protocol(op, format!("status {} for a range", self.status)));
        }
        let field = self
            .single(op, "content-range")?
            .ok_or_else(|| protocol(op, "a 206 without Content-Range"))?;
        let (first, last, size) = content_range(field)
            .ok_or_else(|| protocol(op, format!("Content-Range {field:?} names no range")))?;
        if size == 0 {
            // Garage answers a suffix of an empty object with 206 and `bytes
            // 0-18446744073709551615/0`.
            return Err(RemoteError::new(
                RemoteErrorKind::Unsatisfiable { size: Some(0) },
                op,
                "the object is empty",
            ));
        }
        let range = want
            .resolve(size)
            .filter(|range| (range.start(), range.last()) == (first, last))
            .ok_or_else(|| protocol(op, format!("Content-Range {field:?} for {want:?}")))?;
        self.check_length(op, range.len())?;
        Ok((self.representation(op, size)?, range))
    }

    /// Checks a response to a request without a range.
    fn check_whole(
        &self,
        op: &'static str,
    ) -> Result<(Representation, Option<ByteRange>), RemoteError> {
        if self.status != 200 {
            return Err(protocol(
                op,
                format!("status {} for a whole object", self.status),
            ));
        }
        let size = self
            .content_length(op)?
            .ok_or_else(|| protocol(op, "a whole object without Content-Length"))?;
        Ok((self.representation(op, size)?, ByteRange::whole(size)))
    }

    /// Content-Length may be missing behind a proxy that sends chunks; [`exact_body`] counts
    /// anyway.
    fn check_length(&self, op: &'static str, len: u64) -> Result<(), RemoteError> {
        match self.content_length(op)? {
            Some(named) if named != len => Err(protocol(
                op,
                format!("Content-Length {named} for a range of {len} bytes"),
            )),
            Some(_) | None => Ok(()),
        }
    }

    fn check_validator(
        &self,
        op: &'static str,
        representation: &Representation,
        guard: &Validator,
    ) -> Result<(), RemoteError> {
        if representation.validator == *guard {
            return Ok(());
        }
        let (status, got) = (self.status, &representation.validator);
        let detail = format!("status {status} with ETag {got:?} to If-Match {guard:?}");
        Err(protocol(op, detail))
    }

    fn validator(&self, op: &'static str) -> Result<Option<Validator>, RemoteError> {
        self.single(op, "etag")?
            .map(|field| {
                Validator::from_etag_field(field)
                    .map_err(|error| protocol(op, format!("the ETag {error}")))
            })
            .transpose()
    }

    fn representation(&self, op: &'static str, size: u64) -> Result<Representation, RemoteError> {
        let validator = self
            .validator(op)?
            .ok_or_else(|| protocol(op, "the response has no ETag"))?;
        Ok(Representation {
            validator,
            size,
            last_modified: self.last_modified(),
            version_id: self
                .headers
                .get("x-amz-version-id")
                .filter(|id| *id != "null" && is_field_text(id.as_bytes()))
                .map(Arc::from),
            headers: self.passed_on(),
        })
    }

    /// Those of the full object. One that was put together from the parts' checksums is not among them: it is marked as such,
    /// by servers that know the mark; where there is none, an object uploaded in parts (its `ETag` ends in `-N`) has no other.
    fn checksums(&self, validator: &Validator) -> Vec<Checksum> {
        let in_one_piece = || {
            let tag = validator.as_field_value().trim_matches('"');
            let parts = tag.rsplit_once('-').map(|(_, parts)| parts);
            parts.and_then(decimal).is_none()
        };
        let full = self
            .headers
            .get("x-amz-checksum-type")
            .map_or_else(in_one_piece, |kind| kind == "FULL_OBJECT");
        if !full {
            return Vec::new();
        }
        ChecksumAlgorithm::ALL
            .into_iter()
            .filter_map(|algorithm| {
                let value = self.headers.get(algorithm.field())?;
                Checksum::from_base64(algorithm, value.trim())
            })
            .collect()
    }

    fn last_modified(&self) -> Option<SystemTime> {
        self.headers
            .get("last-modified")
            .and_then(|value| httpdate::parse_http_date(value).ok())
    }

    /// The fields of [`Representation::headers`], sorted. Values that are not visible ASCII are
    /// left out, as is user metadata beyond [`MAX_USER_METADATA`].
    fn passed_on(&self) -> Vec<(Box<str>, Box<str>)> {
        const FIELDS: [&str; 6] = [
            "cache-control",
            "content-disposition",
            "content-encoding",
            "content-language",
            "content-type",
            "expires",
        ];
        let is_ours = |name: &str| FIELDS.contains(&name) || name.starts_with("x-amz-meta-");
        let mut fields: Vec<(Box<str>, Box<str>)> = self
            .headers
            .iter()
            .filter(|(name, value)| is_ours(name) && is_field_text(value.as_bytes()))
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        fields.sort();
        let mut room = MAX_USER_METADATA;
        fields.retain(|(name, value)| {
            if !name.starts_with("x-amz-meta-") {
                return true;
            }
            let left = room.checked_sub(name.len() + value.len());
            room = left.unwrap_or(room);
            left.is_some()
        });
        fields
    }

    /// The answer to a 304 for `unless`.
    fn not_modified(&self, op: &'static str, unless: &Validator) -> Result<Current, RemoteError> {
        match self.validator(op)? {
            Some(named) if named != *unless => Err(protocol(
                op,
                format!("status 304 with ETag {named:?} to {unless:?}"),
            )),
            Some(_) | None => Ok(Current::NotModified {
                last_modified: self.last_modified(),
            }),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        let value = self.headers.get("retry-after")?.trim();
        if let Some(seconds) = decimal(value) {
            return Some(Duration::from_secs(seconds));
        }
        let date = httpdate::parse_http_date(value).ok()?;
        Some(
            date.duration_since(SystemTime::now())
                .unwrap_or(Duration::ZERO),
        )
    }
}

/// `bytes 0-99/1000` as (0, 99, 1000).
fn content_range(field: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = field.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((decimal(first)?, decimal(last)?, decimal(size)?))
}

/// Digits only: `u64::from_str` would take a `+`.
fn decimal(digits: &str) -> Option<u64> {
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

fn is_field_text(value: &[u8]) -> bool {
    value
        .iter()
        .all(|&b| b == b'\t' || (0x20..=0x7e).contains(&b))
}

fn protocol(op: &'static str, detail: impl Into<String>) -> RemoteError {
    RemoteError::new(RemoteErrorKind::Protocol, op, detail)
}

// === failures ===

/// A failed exchange and, where there was a response, what a method may still make of it.
struct Refusal {
    head: Option<Head>,
    error: RemoteError,
}

impl From<RemoteError> for Refusal {
    fn from(error: RemoteError) -> Self {
        Self { head: None, error }
    }
}

impl From<Refusal> for RemoteError {
    fn from(refusal: Refusal) -> Self {
        refusal.error
    }
}

impl Refusal {
    fn of_response<E>(
        op: &'static str,
        head: Head,
        access_key_id: Option<&str>,
        error: &SdkError<E, HttpResponse>,
    ) -> Self
    where
        E: ProvideErrorMetadata,
    {
        let meta = error.as_service_error().map(ProvideErrorMetadata::meta);
        let code = meta.and_then(|meta| meta.code());
        let (kind, detail) = if head.status == 416 {
            let body = error
                .raw_response()
                .and_then(|response| response.body().bytes());
            let size = unsatisfied_size(&head, body.unwrap_or_default());
            let detail = "the range starts beyond the end of the object".to_owned();
            (RemoteErrorKind::Unsatisfiable { size }, detail)
        } else {
            classify(op, &head, code)
        };
        let source = S3Error {
            status: head.status,
            code: code.map(printable),
            message: meta
                .and_then(|meta| meta.message())
                .map(|message| match access_key_id {
                    Some(id) if !id.is_empty() => printable(&message.replace(id, "<access key>")),
                    Some(_) | None => printable(message),
                }),
            request_id: head.headers.get("x-amz-request-id").map(printable),
        };
        let error = RemoteError::new(kind, op, detail).with_source(source);
        Self {
            head: Some(head),
            error,
        }
    }

    fn status(&self) -> Option<u16> {
        self.head.as_ref().map(|head| head.status)
    }

    /// The refusal of a request without `If-Match`: no precondition can have failed (RFC 9110 §15.5.13), so a 412 says
    /// nothing of the object, and must not reach a client that set no condition.
    fn unguarded(mut self) -> Self {
        if self.error.kind == RemoteErrorKind::Mismatch {
            self.error.kind = RemoteErrorKind::Protocol;
            self.error.detail = "a 412 to a request without If-Match".into();
        }
        self
    }

    /// Whether the same GET without a version id could succeed: the version is gone (404, or 405
    /// for a delete marker), its id is none of this bucket's (400), or only versions are denied
    /// (403).
    fn may_be_of_the_version(&self) -> bool {
        matches!(self.status(), Some(400 | 403 | 404 | 405))
    }
}

/// What S3 said, for the log.
#[derive(Debug)]
struct S3Error {
    status: u16,
    code: Option<String>,
    message: Option<String>,
    request_id: Option<String>,
}

impl fmt::Display for S3Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3 answered {}", self.status)?;
        if let Some(code) = &self.code {
            write!(f, " {code}")?;
        }
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        if let Some(id) = &self.request_id {
            write!(f, " (request {id})")?;
        }
        Ok(())
    }
}

impl StdError for S3Error {}

/// At most 500 characters, none that could forge a line of the log.
fn printable(text: &str) -> String {
    text.chars()
        .take(500)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// What a status other than 416 means. `code` is S3's, from the body: a HEAD has none.
fn classify(op: &'static str, head: &Head, code: Option<&str>) -> (RemoteErrorKind, String) {
    use RemoteErrorKind as Kind;
    if let Some(hint) = code.and_then(credential_hint) {
        return (Kind::Misconfigured, hint.to_owned());
    }
    match (head.status, code) {
        (412, _) => (
            Kind::Mismatch,
            "the object is at another revision".to_owned(),
        ),
        (404, Some("NoSuchBucket")) => (
            Kind::Misconfigured,
            "there is no such bucket: check the mount's `bucket`".to_owned(),
        ),
        (404, Some("NoSuchKey" | "NoSuchVersion"))
        | (400, Some("KeyTooLongError" | "InvalidURI")) => {
            (Kind::Absent, "there is no such object".to_owned())
        }
        // Without a body a missing bucket cannot be told from a missing key.
        (404, _) if matches!(op, "stat" | "checksums") => {
            (Kind::Absent, "there is no such object".to_owned())
        }
        // The default page of a proxy whose S3 is away must not read as "deleted".
        (404, _) => (
            Kind::Protocol,
            "a 404 that is not S3's: does the endpoint speak S3?".to_owned(),
        ),
        (301 | 302 | 307 | 308, _) => (Kind::Misconfigured, redirect_detail(head)),
        (400, Some("RequestTimeout")) => (Kind::Timeout, "S3 gave up waiting for us".to_owned()),
        (_, Some("SlowDown" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded"))
        | (429 | 503, _) => (
            Kind::Throttled {
                retry_after: head.retry_after(),
            },
            format!("S3 asks us to slow down ({})", head.status),
        ),
        (500..=599, _) => (Kind::Unavailable, format!("S3 failed ({})", head.status)),
        (400 | 401, _) => (
            Kind::Misconfigured,
            format!(
                "S3 refused the request ({}): check region and credentials",
                head.status
            ),
        ),
        (403, Some("InvalidObjectState")) => (
            Kind::Archived,
            "the object is archived: restore it first".to_owned(),
        ),
        (403, _) => (
            Kind::Forbidden,
            "S3 denies access: check the access key and that it may s3:GetObject. Unless it may \
             s3:ListBucket too, S3 says so for keys that do not exist"
                .to_owned(),
        ),
        (status, _) => (Kind::Protocol, format!("unexpected status {status}")),
    }
}

/// What to do about an error code that means that our signature is not accepted.
fn credential_hint(code: &str) -> Option<&'static str> {
    Some(match code {
        "SignatureDoesNotMatch" => {
            "the signature does not match: check the secret access key, the region and any proxy \
             that rewrites requests"
        }
        "InvalidAccessKeyId" => "the access key is unknown to S3: check the AWS credentials",
        "ExpiredToken" | "TokenRefreshRequired" | "RequestExpired" => {
            "the session token has expired: renew the AWS credentials"
        }
        "InvalidToken" | "InvalidSecurity" | "UnrecognizedClientException" => {
            "S3 does not accept the AWS credentials: renew them"
        }
        "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" => {
            "the request was signed for another region: check the mount's `region`"
        }
        "RequestTimeTooSkewed" => "this machine's clock is wrong: S3 refuses signatures",
        "AllAccessDisabled" | "AccountProblem" | "NotSignedUp" => {
            "the AWS account of the bucket is disabled"
        }
        _ => return None,
    })
}

fn redirect_detail(head: &Head) -> String {
    let is_region = |name: &&str| {
        !name.is_empty()
            && name.len() <= 32
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match head.headers.get("x-amz-bucket-region").filter(is_region) {
        Some(region) => {
            format!("the bucket is in another region: set the mount's `region` to {region}")
        }
        None => {
            "S3 redirects us: check the mount's `endpoint`, `region` and `path_style`".to_owned()
        }
    }
}

/// The complete length that a 416 names: in `Content-Range: bytes */N`, or in S3's error.
fn unsatisfied_size(head: &Head, body: &[u8]) -> Option<u64> {
    let field = head
        .headers
        .get("content-range")
        .and_then(|field| field.strip_prefix("bytes */"));
    if let Some(size) = field {
        return decimal(size);
    }
    let body = std::str::from_utf8(body).ok()?;
    let (_, rest) = body.split_once("<ActualObjectSize>")?;
    decimal(rest.split_once('<')?.0)
}

/// A failure without a response: nothing was sent, or nothing came back.
fn transport_error<E>(op: &'static str, error: SdkError<E, HttpResponse>) -> RemoteError
where
    E: StdError + Send + Sync + 'static,
{
    let (kind, detail) = match &error {
        SdkError::TimeoutError(_) => (RemoteErrorKind::Timeout, "S3 did not answer in time"),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => {
            (RemoteErrorKind::Timeout, "could not connect to S3 in time")
        }
        _ => match credentials_error(&error) {
            Some(
                CredentialsError::CredentialsNotLoaded(_)
                | CredentialsError::InvalidConfiguration(_),
            ) => (
                RemoteErrorKind::Misconfigured,
                "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, \
                 or a role (instance, container or web identity)",
            ),
            Some(_) => (
                RemoteErrorKind::Unavailable,
                "the AWS credentials cannot be had just now",
            ),
            None if has_cause(&error, hyper::Error::is_parse_too_large) => (
                RemoteErrorKind::Protocol,
                "the head of S3's response has more fields or bytes than we read: does the object have more user \
                 metadata (x-amz-meta-) than S3 allows?",
            ),
            None if has_cause(&error, hyper::Error::is_parse) => {
                (RemoteErrorKind::Protocol, "the response is not HTTP")
            }
            None => match &error {
                SdkError::ConstructionFailure(_) => {
                    (RemoteErrorKind::Misconfigured, "the request cannot be made")
                }
                SdkError::DispatchFailure(failure) if failure.is_user() => {
                    (RemoteErrorKind::Misconfigured, "the request cannot be sent")
                }
                _ => (RemoteErrorKind::Unavailable, "no response from S3"),
            },
        },
    };
    let error_without_source = RemoteError::new(kind, op, detail);
    match error.into_source() {
        Ok(source) => error_without_source.with_source(source),
        Err(error) => error_without_source.with_source(error.to_string()),
    }
}

fn credentials_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a CredentialsError> {
    chain(error).find_map(|error| error.downcast_ref())
}

fn has_cause(error: &(dyn StdError + 'static), is: impl Fn(&hyper::Error) -> bool) -> bool {
    chain(error).any(|error| error.downcast_ref().is_some_and(&is))
}

fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

// === the body ===

/// A response's body against what its head announced.
struct Body {
    bytes: wire::Body,
    left: u64,
    stall_timeout: Duration,
    /// Since when what is to come has been asked for in vain. Before that nobody waited, however long ago something came
    /// last: a client or a disk that is slow says nothing of the remote.
    asked: Option<Instant>,
    /// Fires no earlier than the time is up; made when the body is waited for first.
    silence: Option<Pin<Box<Sleep>>>,
    is_over: bool,
    op: &'static str,
}

/// Hands on exactly `len` bytes, in the frames they come in, or fails: [`RemoteErrorKind::Timeout`]
/// after silence, [`RemoteErrorKind::Unavailable`] on a reset or an early end,
/// [`RemoteErrorKind::Protocol`] on a byte too many.
fn exact_body(
    bytes: wire::Body,
    len: u64,
    stall_timeout: Duration,
    op: &'static str,
) -> BoxStream<'static, Result<Bytes, RemoteError>> {
    Box::pin(Body {
        bytes,
        left: len,
        stall_timeout,
        asked: None,
        silence: None,
        is_over: false,
        op,
    })
}

impl Stream for Body {
    type Item = Result<Bytes, RemoteError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let item = loop {
            match Pin::new(&mut self.bytes).poll_frame(cx) {
                Poll::Pending => break Err(ready!(self.poll_silence(cx))),
                Poll::Ready(None) if self.left == 0 => {
                    self.is_over = true;
                    return Poll::Ready(None);
                }
                Poll::Ready(None) => break Err(self.cut()),
                Poll::Ready(Some(Err(error))) => break Err(self.cut().with_source(error)),
                Poll::Ready(Some(Ok(frame))) => {
                    // What is no data is a trailer.
                    let Ok(bytes) = frame.into_data() else {
                        continue;
                    };
                    self.asked = None;
                    let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
                        break Err(protocol(
                            self.op,
                            "the body is longer than the range it was sent for",
                        ));
                    };
                    self.left = left;
                    break Ok(bytes);
                }
            }
        };
        self.is_over = item.is_err();
        Poll::Ready(Some(item))
    }
}

impl Body {
    /// Ready when nothing has come for too long.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<RemoteError> {
        let due = *self.asked.get_or_insert_with(Instant::now) + self.stall_timeout;
        let silence = self
            .silence
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        // One timer for the whole body: it is set anew when it fires, not whenever something comes.
        while silence.as_mut().poll(cx).is_ready() {
            if silence.deadline() >= due {
                let (stall, left) = (self.stall_timeout, self.left);
                let detail = format!("no byte for {stall:?} with {left} bytes to come");
                return Poll::Ready(RemoteError::new(RemoteErrorKind::Timeout, self.op, detail));
            }
            silence.as_mut().reset(due);
        }
        Poll::Pending
    }

    fn cut(&self) -> RemoteError {
        let detail = format!("the body ended with {} bytes to come", self.left);
        RemoteError::new(RemoteErrorKind::Unavailable, self.op, detail)
    }
}

/// The way for `fuzz/` to what only a response reaches.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::{Head, Headers, RangeSpec, RemoteErrorKind, classify, unsatisfied_size};
    use crate::object::Representation;
    use crate::semantics::ByteRange;

    /// What the driver makes of the head of a response to `want`.
    #[derive(Debug)]
    #[expect(clippy::exhaustive_enums, reason = "closed: the ways it can go")]
    pub enum Made {
        /// A part.
        Part(Representation, ByteRange),
        /// The whole object.
        Whole(Representation, Option<ByteRange>),
        /// Neither.
        Error(RemoteErrorKind),
    }

    /// `want` `None`: the request had no range.
    pub fn head(status: u16, fields: Vec<(String, String)>, want: Option<RangeSpec>) -> Made {
        let mut headers = Headers::new();
        for (name, value) in fields {
            // What is no field does not get here.
            let _ = headers.try_append(name, value);
        }
        let head = Head { status, headers };
        let made = match want {
            Some(want) => head
                .check_range("read", want)
                .map(|(representation, range)| Made::Part(representation, range)),
            None => head
                .check_whole("read")
                .map(|(representation, range)| Made::Whole(representation, range)),
        };
        let _ = (head.retry_after(), unsatisfied_size(&head, b""));
        let _ = classify("read", &head, head.headers.get("code"));
        made.unwrap_or_else(|error| Made::Error(error.kind))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn connect(change: impl FnOnce(&mut S3Settings)) -> Result<S3Remote, InvalidS3Settings> {
        let mut settings = S3Settings {
            region: Some("test-1".to_owned()),
            credentials: CredentialSource::Fixed {
                access_key_id: "id".to_owned(),
                secret_access_key: "hush".to_owned(),
            },
            ..S3Settings::new("bucket")
        };
        assert!(!format!("{settings:?}").contains("hush"));
        change(&mut settings);
        S3Remote::connect(settings).await
    }

    #[tokio::test]
    async fn one_store_has_one_identity() {
        let store = async |endpoint: &str| {
            let endpoint = endpoint.to_owned();
            connect(|settings| settings.endpoint = Some(endpoint))
                .await
                .unwrap()
                .store()
                .to_string()
        };
        assert_eq!(
            store("http://S3.example:3900/").await,
            "http://s3.example:3900/bucket"
        );
        assert_eq!(
            store("http://s3.example:3900").await,
            "http://s3.example:3900/bucket"
        );
        assert_eq!(
            store("https://s3.example/base/").await,
            "https://s3.example/base/bucket"
        );
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused() {
        for endpoint in [
            "",
            "s3.example.com",
            "s3.example.com:443",
            "ftp://s3.example.com",
            "https://",
            "https://s3.example.com/?region=x",
            "https://user:hush@s3.example.com",
        ] {
            let error = connect(|settings| settings.endpoint = Some(endpoint.to_owned()))
                .await
                .expect_err(endpoint);
            assert!(!error.to_string().contains("hush"), "{error}");
        }
        for bucket in ["", "two words", "a\nb", "b?c"] {
            let error = connect(|settings| settings.bucket = bucket.to_owned()).await;
            assert_eq!(
                error.unwrap_err(),
                InvalidS3Settings::Bucket(bucket.to_owned())
            );
        }
    }

    #[test]
    fn ranges_are_written_as_servers_read_them() {
        for (want, field) in [
            (RangeSpec::Closed { first: 5, last: 9 }, "bytes=5-9"),
            (RangeSpec::From(7), "bytes=7-"),
            (RangeSpec::Suffix(3), "bytes=-3"),
            (RangeSpec::From(u64::MAX), "bytes=9223372036854775807-"),
        ] {
            assert_eq!(range_field(want), field);
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let after = |value: &str| {
            let mut headers = Headers::new();
            headers.insert("retry-after", value.to_owned());
            let head = Head {
                status: 503,
                headers,
            };
            head.retry_after()
        };
        assert_eq!(after("119"), Some(Duration::from_secs(119)));
        assert_eq!(after("soon"), None);
        assert_eq!(after("-1"), None);
        assert_eq!(after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = SystemTime::now() + Duration::from_secs(100);
        let seconds = after(&httpdate::fmt_http_date(soon)).unwrap().as_secs();
        assert!((90..=100).contains(&seconds), "{seconds}");
    }

    /// A client or a disk that is slow must not make the remote look silent.
    #[tokio::test(start_paused = true)]
    async fn silence_is_what_was_waited_for_in_vain() {
        const STALL: Duration = Duration::from_secs(10);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/key", listener.local_addr().unwrap());
        let request = http::Request::get(uri).body(Empty::new()).unwrap();
        let wire = Wire::default();
        let (response, mut server) = tokio::join!(wire.send(request, None), async {
            let (mut server, _) = listener.accept().await.unwrap();
            let head = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 9\r\n\r\none";
            server.write_all(head).await.unwrap();
            server
        });
        let mut body = exact_body(response.unwrap().into_body(), 9, STALL, "read");
        assert_eq!(body.next().await.unwrap().unwrap(), "one");
        // Nobody asks for more for a long time, and then nothing is there yet.
        tokio::time::advance(3 * STALL).await;
        assert!(body.next().now_or_never().is_none());
        tokio::time::advance(STALL / 2).await;
        server.write_all(b"two").await.unwrap();
        let mut came = Vec::new();
        while came.len() < 3 {
            came.extend_from_slice(&body.next().await.unwrap().unwrap());
        }
        assert_eq!(came, b"two");
        let asked = Instant::now();
        let error = body.next().await.unwrap().unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Timeout);
        // To the millisecond that timers are good for: the clock stands still where nobody waits.
        let waited = asked.elapsed();
        assert!(waited >= STALL && waited < STALL + STALL / 2, "{waited:?}");
        assert!(body.next().await.is_none());
    }
}
