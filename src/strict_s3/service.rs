//! The S3 operations, on top of `s3s`, which parses requests, checks signatures and writes XML.
//!
//! Writes, deletes and listings implement [`S3`]. Reads of objects do not: its typed input has room for one entity
//! tag per condition and refuses `Range` values that S3 ignores, so [`S3Route`] takes them with their header fields
//! as they came, after the signature has been checked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::StreamExt as _;
use http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE,
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPIRES, HeaderName, HeaderValue,
    InvalidHeaderValue, LAST_MODIFIED, RANGE,
};
use http::{Extensions, HeaderMap, Method, StatusCode, Uri};
use http_body::Frame;
use http_body_util::StreamBody;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, Bucket, CommonPrefix,
    CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CreateBucketInput,
    CreateBucketOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput,
    DeleteObjectOutput, ETag, ETagCondition, EncodingType, GetBucketLocationInput,
    GetBucketLocationOutput, HeadBucketInput, HeadBucketOutput, ListBucketsInput,
    ListBucketsOutput, ListObjectsInput, ListObjectsOutput, ListObjectsV2Input,
    ListObjectsV2Output, Metadata as UserMetadata, Object as ListedObject, PutObjectInput,
    PutObjectOutput, StreamingBlob, Timestamp, TimestampFormat, UploadPartInput, UploadPartOutput,
};
use s3s::route::S3Route;
use s3s::{Body, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::Credentials;
use super::checksums::{self, Announced};
use super::conditions::{Verdict, judge};
use super::faults::{Ignore, Op};
use super::store::{
    ListQuery, Listed, Listing, Metadata, Payload, PutOptions, Store, StoreError, UploadName,
    WriteCondition,
};

/// S3's most keys on a page.
const MAX_KEYS: usize = 1000;

const PART_NUMBERS: RangeInclusive<i32> = 1..=10_000;

const META_PREFIX: &str = "x-amz-meta-";
const VERSION_ID: HeaderName = HeaderName::from_static("x-amz-version-id");
const DELETE_MARKER: HeaderName = HeaderName::from_static("x-amz-delete-marker");

/// Query parameters that make a GET of an object one of something else.
const SUBRESOURCES: [&str; 7] = [
    "acl",
    "attributes",
    "legal-hold",
    "retention",
    "tagging",
    "torrent",
    "uploadId",
];

/// What `encoding-type=url` leaves as it is.
const LISTING_ENCODE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/');

/// What a request is for, by its line alone.
pub(super) struct Target {
    pub(super) op: Op,
    pub(super) bucket: String,
    pub(super) key: String,
    query: Vec<(String, String)>,
}

impl Target {
    pub(super) fn of(method: &Method, uri: &Uri) -> Self {
        let path = percent_decode_str(uri.path())
            .decode_utf8_lossy()
            .into_owned();
        let path = path.strip_prefix('/').unwrap_or(&path);
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        let query: Vec<_> = uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                (query_text(name), query_text(value))
            })
            .collect();
        let has = |name: &str| query.iter().any(|(n, _)| n == name);
        let plain = !SUBRESOURCES.iter().any(|name| has(name));
        let op = match (method, bucket.is_empty(), key.is_empty()) {
            (&Method::GET, false, false) if plain => Op::Get,
            (&Method::HEAD, false, false) if plain => Op::Head,
            (&Method::PUT | &Method::POST, false, false) => Op::Put,
            (&Method::DELETE, false, false) if plain => Op::Delete,
            (&Method::GET, false, true) if !has("location") => Op::List,
            _ => Op::Other,
        };
        Self {
            op,
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            query,
        }
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }
}

fn query_text(encoded: &str) -> String {
    let spaced = encoded.replace('+', " ");
    percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
}

/// Knows one key.
pub(super) struct OneKey(pub(super) Credentials);

#[async_trait]
impl S3Auth for OneKey {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == self.0.access_key {
            Ok(SecretKey::from(self.0.secret_key.as_str()))
        } else {
            Err(s3_error!(InvalidAccessKeyId))
        }
    }
}

/// Answers requests from a store.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) store: Arc<Store>,
    /// Whether anonymous requests are denied.
    pub(super) authenticated: bool,
}

impl From<StoreError> for S3Error {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        let (code, fields) = match &error {
            StoreError::NoSuchBucket => (S3ErrorCode::NoSuchBucket, HeaderMap::new()),
            StoreError::BucketExists => (S3ErrorCode::BucketAlreadyOwnedByYou, HeaderMap::new()),
            StoreError::NoSuchKey { marker } => {
                let mut fields = HeaderMap::new();
                if let Some(id) = marker
                    .as_deref()
                    .and_then(|id| HeaderValue::from_str(id).ok())
                {
                    fields.insert(DELETE_MARKER, HeaderValue::from_static("true"));
                    fields.insert(VERSION_ID, id);
                }
                (S3ErrorCode::NoSuchKey, fields)
            }
            StoreError::NoSuchVersion => (S3ErrorCode::NoSuchVersion, HeaderMap::new()),
            StoreError::DeleteMarker => {
                let fields = [
                    (DELETE_MARKER, HeaderValue::from_static("true")),
                    (ALLOW, HeaderValue::from_static("DELETE")),
                ];
                (S3ErrorCode::MethodNotAllowed, fields.into_iter().collect())
            }
            StoreError::PreconditionFailed(_) => {
                (S3ErrorCode::PreconditionFailed, HeaderMap::new())
            }
            StoreError::NoSuchUpload => (S3ErrorCode::NoSuchUpload, HeaderMap::new()),
            StoreError::InvalidPart(_) => (S3ErrorCode::InvalidPart, HeaderMap::new()),
            StoreError::InvalidPartOrder => (S3ErrorCode::InvalidPartOrder, HeaderMap::new()),
            StoreError::EntityTooSmall(_) => (S3ErrorCode::EntityTooSmall, HeaderMap::new()),
            StoreError::BadDigest => (S3ErrorCode::BadDigest, HeaderMap::new()),
            StoreError::InvalidKey(_) => (S3ErrorCode::InvalidArgument, HeaderMap::new()),
            StoreError::Unsupported(_) => (S3ErrorCode::NotImplemented, HeaderMap::new()),
            StoreError::Busy => (S3ErrorCode::SlowDown, HeaderMap::new()),
            StoreError::Body(_) => (S3ErrorCode::IncompleteBody, HeaderMap::new()),
            StoreError::Io(_) => (S3ErrorCode::InternalError, HeaderMap::new()),
        };
        let mut answer = Self::with_source(code, Box::new(error));
        answer.set_message(message);
        if !fields.is_empty() {
            answer.set_headers(fields);
        }
        answer
    }
}

// Reads.

#[async_trait]
impl S3Route for Service {
    fn is_match(&self, method: &Method, uri: &Uri, _: &HeaderMap, _: &mut Extensions) -> bool {
        matches!(Target::of(method, uri).op, Op::Get | Op::Head)
    }

    async fn check_access(&self, request: &mut S3Request<Body>) -> S3Result<()> {
        if self.authenticated && request.credentials.is_none() {
            return Err(s3_error!(AccessDenied, "Access Denied"));
        }
        Ok(())
    }

    async fn call(&self, request: S3Request<Body>) -> S3Result<S3Response<Body>> {
        let target = Target::of(&request.method, &request.uri);
        if target.parameter("partNumber").is_some() {
            return Err(s3_error!(
                NotImplemented,
                "reads by partNumber are not implemented"
            ));
        }
        let version = target.parameter("versionId");
        let object = self
            .store
            .read(&target.bucket, &target.key, version)
            .await?;
        let ignore = request
            .extensions
            .get::<Ignore>()
            .copied()
            .unwrap_or_default();
        let metadata = &object.metadata;
        let verdict = judge(
            &request.headers,
            &metadata.etag,
            metadata.last_modified,
            metadata.size,
            ignore.if_match,
            ignore.range,
        );
        let (start, end) = match verdict {
            Verdict::Whole => (0, metadata.size),
            Verdict::Part { start, end } => (start, end),
            Verdict::NotModified => {
                let fields = validators(metadata).map_err(S3Error::internal_error)?;
                return Ok(respond(StatusCode::NOT_MODIFIED, fields, Body::empty()));
            }
            Verdict::PreconditionFailed(condition) => {
                let details = [("Condition", condition.to_owned())];
                return Ok(refuse(
                    &S3ErrorCode::PreconditionFailed,
                    HeaderMap::new(),
                    &details,
                ));
            }
            Verdict::Unsatisfiable => {
                let size = metadata.size.to_string();
                let unsatisfied = format!("bytes */{size}");
                let fields = [(CONTENT_RANGE, field(&unsatisfied)?)]
                    .into_iter()
                    .collect();
                let asked = request
                    .headers
                    .get(RANGE)
                    .and_then(|value| value.to_str().ok());
                let details = [
                    ("RangeRequested", asked.unwrap_or_default().to_owned()),
                    ("ActualObjectSize", size),
                ];
                return Ok(refuse(&S3ErrorCode::InvalidRange, fields, &details));
            }
        };

        let mut fields = representation(metadata).map_err(S3Error::internal_error)?;
        override_fields(&target, &mut fields)?;
        fields.insert(CONTENT_LENGTH, field(&(end - start).to_string())?);
        if let (Verdict::Whole, Some(checksum)) = (&verdict, &metadata.checksum)
            && checksums::is_asked_for(&request.headers)
        {
            checksum
                .write(&mut fields)
                .map_err(S3Error::internal_error)?;
        }
        let status = if let Verdict::Part { .. } = verdict {
            let range = format!("bytes {start}-{}/{}", end - 1, metadata.size);
            fields.insert(CONTENT_RANGE, field(&range)?);
            StatusCode::PARTIAL_CONTENT
        } else {
            StatusCode::OK
        };
        let body = if request.method == Method::HEAD || start == end {
            Body::empty()
        } else {
            let frames = object.read(start, end).map(|chunk| chunk.map(Frame::data));
            Body::http_body_unsync(StreamBody::new(frames))
        };
        Ok(respond(status, fields, body))
    }
}

fn field(value: &str) -> S3Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(S3Error::internal_error)
}

/// What a 304 repeats of a 200.
fn validators(metadata: &Metadata) -> Result<HeaderMap, InvalidHeaderValue> {
    let mut fields = HeaderMap::new();
    fields.insert(ETAG, HeaderValue::from_str(&metadata.etag)?);
    let modified = httpdate::fmt_http_date(metadata.last_modified);
    fields.insert(LAST_MODIFIED, HeaderValue::from_str(&modified)?);
    if let Some(id) = &metadata.version_id {
        fields.insert(VERSION_ID, HeaderValue::from_str(id)?);
    }
    if let Some(value) = &metadata.options.cache_control {
        fields.insert(CACHE_CONTROL, HeaderValue::from_str(value)?);
    }
    Ok(fields)
}

fn representation(metadata: &Metadata) -> Result<HeaderMap, InvalidHeaderValue> {
    let mut fields = validators(metadata)?;
    let options = &*metadata.options;
    fields.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let content_type = options
        .content_type
        .as_deref()
        .unwrap_or("binary/octet-stream");
    fields.insert(CONTENT_TYPE, HeaderValue::from_str(content_type)?);
    for (name, value) in [
        (CONTENT_ENCODING, &options.content_encoding),
        (CONTENT_LANGUAGE, &options.content_language),
        (CONTENT_DISPOSITION, &options.content_disposition),
        (EXPIRES, &options.expires),
    ] {
        if let Some(value) = value {
            fields.insert(name, HeaderValue::from_str(value)?);
        }
    }
    for (name, value) in &options.metadata {
        if let Ok(name) = HeaderName::try_from(format!("{META_PREFIX}{name}")) {
            fields.insert(name, HeaderValue::from_str(value)?);
        }
    }
    Ok(fields)
}

/// `response-content-type=…` and its like.
fn override_fields(target: &Target, fields: &mut HeaderMap) -> S3Result<()> {
    for name in [
        CONTENT_TYPE,
        CONTENT_LANGUAGE,
        EXPIRES,
        CACHE_CONTROL,
        CONTENT_DISPOSITION,
        CONTENT_ENCODING,
    ] {
        if let Some(value) = target.parameter(&format!("response-{name}")) {
            let value = HeaderValue::from_str(value)
                .map_err(|error| s3_error!(error, InvalidArgument, "response-{name}"))?;
            fields.insert(name, value);
        }
    }
    Ok(())
}

fn respond(status: StatusCode, fields: HeaderMap, body: Body) -> S3Response<Body> {
    let mut response = S3Response::with_headers(body, fields);
    response.status = Some(status);
    response
}

/// An error with elements that [`S3Error`] has no room for.
fn refuse(
    code: &S3ErrorCode,
    mut fields: HeaderMap,
    details: &[(&str, String)],
) -> S3Response<Body> {
    let (status, message) = match code {
        S3ErrorCode::InvalidRange => (
            StatusCode::RANGE_NOT_SATISFIABLE,
            "The requested range is not satisfiable",
        ),
        _ => (
            StatusCode::PRECONDITION_FAILED,
            "At least one of the pre-conditions you specified did not hold",
        ),
    };
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{}</Code><Message>{message}</Message>",
        code.as_str()
    );
    for (name, value) in details {
        let value = value
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        let _ = write!(xml, "<{name}>{value}</{name}>");
    }
    xml.push_str("</Error>");
    fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    respond(status, fields, Body::from(xml))
}

// Writes, deletes and listings.

#[async_trait]
impl S3 for Service {
    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        self.store.check_bucket(&input.bucket)?;
        let condition = write_condition(input.if_match, input.if_none_match.as_ref())?;
        let options = options(StoredFields {
            content_type: input.content_type,
            content_encoding: input.content_encoding,
            content_language: input.content_language,
            content_disposition: input.content_disposition,
            cache_control: input.cache_control,
            expires: input.expires,
            metadata: input.metadata,
        })?;
        let payload = self
            .receive(input.body, input.content_md5.as_deref())
            .await?;
        let announced = Announced::of(&request.headers);
        let (bucket, key) = (&input.bucket, &input.key);
        let result = self
            .store
            .commit(bucket, key, payload, &announced, options, condition)
            .await?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(tag(&result.etag)),
            version_id: result.version_id,
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        let options = options(StoredFields {
            content_type: input.content_type,
            content_encoding: input.content_encoding,
            content_language: input.content_language,
            content_disposition: input.content_disposition,
            cache_control: input.cache_control,
            expires: input.expires,
            metadata: input.metadata,
        })?;
        let announced = Announced::of(&request.headers);
        let id = self
            .store
            .create_upload(&input.bucket, &input.key, announced, options)?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        if !PART_NUMBERS.contains(&input.part_number) {
            return Err(s3_error!(
                InvalidArgument,
                "Part number must be from 1 to 10000"
            ));
        }
        let payload = self
            .receive(input.body, input.content_md5.as_deref())
            .await?;
        let upload = UploadName {
            bucket: &input.bucket,
            key: &input.key,
            id: &input.upload_id,
        };
        let announced = Announced::of(&request.headers);
        let etag = self
            .store
            .add_part(&upload, input.part_number, payload, &announced)?;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(tag(&etag)),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let condition = write_condition(input.if_match, input.if_none_match.as_ref())?;
        let parts = input
            .multipart_upload
            .and_then(|upload| upload.parts)
            .unwrap_or_default();
        let parts: Vec<_> = parts
            .into_iter()
            .map(|part| {
                (
                    part.part_number.unwrap_or(0),
                    part.e_tag.map(ETag::into_value),
                )
            })
            .collect();
        let upload = UploadName {
            bucket: &input.bucket,
            key: &input.key,
            id: &input.upload_id,
        };
        let result = self
            .store
            .complete_upload(&upload, &parts, condition)
            .await?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", input.bucket, input.key)),
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(tag(&result.etag)),
            version_id: result.version_id,
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        let upload = UploadName {
            bucket: &input.bucket,
            key: &input.key,
            id: &input.upload_id,
        };
        self.store.abort_upload(&upload)?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        let deleted = self
            .store
            .delete(&input.bucket, &input.key, input.version_id.as_deref())
            .await?;
        Ok(S3Response::new(DeleteObjectOutput {
            delete_marker: deleted.delete_marker.then_some(true),
            version_id: deleted.version_id,
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let after = input
            .continuation_token
            .clone()
            .or_else(|| input.start_after.clone());
        let query = list_query(
            input.prefix.clone(),
            input.delimiter.clone(),
            after,
            input.max_keys,
        );
        let shown = i32::try_from(query.max).ok();
        let listing = self.store.list(&input.bucket, query).await?;
        let encoder = NameEncoder::new(input.encoding_type.as_ref());
        let count = listing.objects.len() + listing.prefixes.len();
        let (contents, common_prefixes, next) = encoder.page(listing);
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix.map(|prefix| encoder.text(prefix)),
            delimiter: input.delimiter.map(|delimiter| encoder.text(delimiter)),
            max_keys: shown,
            key_count: i32::try_from(count).ok(),
            continuation_token: input.continuation_token,
            start_after: input.start_after.map(|after| encoder.text(after)),
            is_truncated: Some(next.is_some()),
            next_continuation_token: next,
            contents: Some(contents),
            common_prefixes: Some(common_prefixes),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }

    async fn list_objects(
        &self,
        request: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = request.input;
        let query = list_query(
            input.prefix.clone(),
            input.delimiter.clone(),
            input.marker.clone(),
            input.max_keys,
        );
        let shown = i32::try_from(query.max).ok();
        let listing = self.store.list(&input.bucket, query).await?;
        let encoder = NameEncoder::new(input.encoding_type.as_ref());
        let (contents, common_prefixes, next) = encoder.page(listing);
        Ok(S3Response::new(ListObjectsOutput {
            name: Some(input.bucket),
            prefix: input.prefix.map(|prefix| encoder.text(prefix)),
            delimiter: input.delimiter.map(|delimiter| encoder.text(delimiter)),
            marker: input.marker.map(|marker| encoder.text(marker)),
            max_keys: shown,
            is_truncated: Some(next.is_some()),
            next_marker: next.map(|next| encoder.text(next)),
            contents: Some(contents),
            common_prefixes: Some(common_prefixes),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }

    /// Some clients ask for the bucket before every upload and are content to hear that they have it.
    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        self.store.create_bucket(&request.input.bucket)?;
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.store.check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn list_buckets(
        &self,
        _: S3Request<ListBucketsInput>,
    ) -> S3Result<S3Response<ListBucketsOutput>> {
        let bucket = |name| Bucket {
            name: Some(name),
            ..Default::default()
        };
        let buckets = self.store.buckets().into_iter().map(bucket).collect();
        Ok(S3Response::new(ListBucketsOutput {
            buckets: Some(buckets),
            ..Default::default()
        }))
    }

    async fn get_bucket_location(
        &self,
        request: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.store.check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }
}

impl Service {
    /// Takes a body in and compares it with `Content-MD5`.
    async fn receive(
        &self,
        body: Option<StreamingBlob>,
        content_md5: Option<&str>,
    ) -> S3Result<Payload> {
        let body = body.unwrap_or_else(|| StreamingBlob::from(Body::empty()));
        let payload = self.store.receive(body).await?;
        if let Some(announced) = content_md5 {
            let announced = BASE64_STANDARD
                .decode(announced)
                .map_err(|error| s3_error!(error, InvalidDigest, "Content-MD5 is no base64"))?;
            if announced != payload.md5() {
                return Err(StoreError::BadDigest.into());
            }
        }
        Ok(payload)
    }
}

fn tag(field_value: &str) -> ETag {
    ETag::Strong(field_value.trim_matches('"').to_owned())
}

/// S3 knows one tag for `If-Match` and `*` for `If-None-Match`, and refuses the rest.
fn write_condition(
    if_match: Option<ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<WriteCondition> {
    let unsupported = || {
        s3_error!(
            NotImplemented,
            "a condition that S3 does not have for writes"
        )
    };
    let if_match = match if_match {
        None => None,
        Some(ETagCondition::ETag(ETag::Strong(tag))) => Some(tag),
        Some(_) => return Err(unsupported()),
    };
    let absent = match if_none_match {
        None => false,
        Some(ETagCondition::Any) => true,
        Some(ETagCondition::ETag(_)) => return Err(unsupported()),
    };
    Ok(WriteCondition { if_match, absent })
}

/// The fields that PUT and multipart uploads have in common.
struct StoredFields {
    content_type: Option<String>,
    content_encoding: Option<String>,
    content_language: Option<String>,
    content_disposition: Option<String>,
    cache_control: Option<String>,
    expires: Option<Timestamp>,
    metadata: Option<UserMetadata>,
}

fn options(fields: StoredFields) -> S3Result<PutOptions> {
    // The encoding of the transfer is not one of the object.
    let content_encoding = fields.content_encoding.and_then(|value| {
        let codings: Vec<_> = value
            .split(',')
            .map(str::trim)
            .filter(|coding| *coding != "aws-chunked")
            .collect();
        (!codings.is_empty()).then(|| codings.join(", "))
    });
    let expires = fields.expires.map(|expires| {
        let mut text = Vec::new();
        expires
            .format(TimestampFormat::HttpDate, &mut text)
            .map_err(S3Error::internal_error)?;
        String::from_utf8(text).map_err(S3Error::internal_error)
    });
    Ok(PutOptions {
        content_type: fields.content_type,
        content_encoding,
        content_language: fields.content_language,
        content_disposition: fields.content_disposition,
        cache_control: fields.cache_control,
        expires: expires.transpose()?,
        metadata: fields
            .metadata
            .unwrap_or_default()
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
        last_modified: None,
        etag: None,
    })
}

fn list_query(
    prefix: Option<String>,
    delimiter: Option<String>,
    after: Option<String>,
    max_keys: Option<i32>,
) -> ListQuery {
    let max = max_keys
        .and_then(|max| usize::try_from(max).ok())
        .unwrap_or(MAX_KEYS);
    ListQuery {
        prefix: prefix.unwrap_or_default(),
        delimiter,
        after: after.unwrap_or_default(),
        max: max.min(MAX_KEYS),
    }
}

/// Writes names into a listing, percent-encoded where the client asked for that.
struct NameEncoder {
    url: bool,
}

impl NameEncoder {
    fn new(encoding: Option<&EncodingType>) -> Self {
        Self {
            url: encoding.is_some_and(|encoding| encoding.as_str() == EncodingType::URL),
        }
    }

    fn text(&self, name: String) -> String {
        if self.url {
            utf8_percent_encode(&name, LISTING_ENCODE).to_string()
        } else {
            name
        }
    }

    fn page(&self, listing: Listing) -> (Vec<ListedObject>, Vec<CommonPrefix>, Option<String>) {
        let object = |listed: Listed| ListedObject {
            key: Some(self.text(listed.key)),
            size: i64::try_from(listed.size).ok(),
            last_modified: Some(listed.last_modified.into()),
            e_tag: listed.etag.as_deref().map(tag),
            ..Default::default()
        };
        let objects = listing.objects.into_iter().map(object).collect();
        let prefix = |prefix| CommonPrefix {
            prefix: Some(self.text(prefix)),
        };
        let prefixes = listing.prefixes.into_iter().map(prefix).collect();
        (objects, prefixes, listing.next)
    }
}
