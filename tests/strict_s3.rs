//! The embedded S3 as clients see it: the AWS SDK, and raw sockets where the bytes on the wire matter.
#![expect(clippy::unwrap_used, reason = "the helpers are tests too")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use aws_sdk_s3::config::{BehaviorVersion, Credentials as SdkCredentials, Region};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use pinrange::strict_s3::{
    Credentials, Effect, Fault, Mutation, Op, Options, PutOptions, StrictS3,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const KEY: &str = "dir/file.bin";
const MD5_OF_HELLO: &str = "\"5d41402abc4b2a76b9719d911017c592\"";

async fn start() -> StrictS3 {
    StrictS3::start(Options::memory(["bkt"])).await.unwrap()
}

fn put(server: &StrictS3, bytes: &[u8]) -> String {
    server
        .put("bkt", KEY, bytes.to_vec(), PutOptions::default())
        .unwrap()
        .etag
}

fn sdk(server: &StrictS3, secret: &str) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(server.endpoint())
        .force_path_style(true)
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .credentials_provider(SdkCredentials::new("key", secret, None, None, "test"))
        .retry_config(aws_sdk_s3::config::retry::RetryConfig::disabled())
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

/// Bytes that are not found at two places in the same order.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// A response as it came over the wire, and how the connection ended.
struct Raw {
    status: u16,
    fields: HashMap<String, String>,
    body: Vec<u8>,
    end: Result<(), ErrorKind>,
}

impl Raw {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends one request and reads until the connection ends, however it does.
async fn raw(server: &StrictS3, method: &str, path: &str, fields: &[(&str, &str)]) -> Raw {
    raw_with_body(server, method, path, fields, b"").await
}

async fn raw_with_body(
    server: &StrictS3,
    method: &str,
    path: &str,
    fields: &[(&str, &str)],
    body: &[u8],
) -> Raw {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for (name, value) in fields {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if !body.is_empty() {
        let _ = write!(head, "content-length: {}\r\n", body.len());
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    read_raw(&mut stream).await
}

async fn read_raw(stream: &mut TcpStream) -> Raw {
    let mut received = Vec::new();
    let mut chunk = vec![0; 65536];
    let end = loop {
        match stream.read(&mut chunk).await {
            Ok(0) => break Ok(()),
            Ok(n) => received.extend_from_slice(&chunk[..n]),
            Err(error) => break Err(error.kind()),
        }
    };
    let Some(split) = received.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Raw {
            status: 0,
            fields: HashMap::new(),
            body: received,
            end,
        };
    };
    let head = String::from_utf8(received[..split].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let fields = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    Raw {
        status,
        fields,
        body: received[split + 4..].to_vec(),
        end,
    }
}

async fn get(server: &StrictS3, fields: &[(&str, &str)]) -> Raw {
    raw(server, "GET", &format!("/bkt/{KEY}"), fields).await
}

#[tokio::test]
async fn a_read_has_s3s_headers() {
    let server = start().await;
    let options = PutOptions {
        content_type: Some("text/plain".to_owned()),
        content_encoding: Some("gzip".to_owned()),
        content_language: Some("de".to_owned()),
        content_disposition: Some("attachment".to_owned()),
        cache_control: Some("max-age=5".to_owned()),
        expires: Some("Thu, 01 Jan 2099 00:00:00 GMT".to_owned()),
        metadata: [("color".to_owned(), "red".to_owned())].into(),
        last_modified: Some(std::time::UNIX_EPOCH + Duration::from_secs(784_111_777)),
        etag: None,
    };
    server.put("bkt", KEY, "hello", options).unwrap();
    for method in ["GET", "HEAD"] {
        let answer = raw(&server, method, &format!("/bkt/{KEY}"), &[]).await;
        assert_eq!(answer.status, 200);
        for (name, value) in [
            ("etag", MD5_OF_HELLO),
            ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("content-length", "5"),
            ("content-type", "text/plain"),
            ("content-encoding", "gzip"),
            ("content-language", "de"),
            ("content-disposition", "attachment"),
            ("cache-control", "max-age=5"),
            ("expires", "Thu, 01 Jan 2099 00:00:00 GMT"),
            ("x-amz-meta-color", "red"),
            ("accept-ranges", "bytes"),
        ] {
            assert_eq!(answer.field(name), Some(value), "{method} {name}");
        }
        assert_eq!(answer.text(), if method == "GET" { "hello" } else { "" });
    }
}

#[tokio::test]
async fn conditions_are_enforced() {
    let server = start().await;
    let etag = put(&server, b"hello");
    assert_eq!(etag, MD5_OF_HELLO);

    assert_eq!(get(&server, &[("if-match", &etag)]).await.status, 200);
    let failed = get(&server, &[("if-match", "\"other\"")]).await;
    assert_eq!(failed.status, 412);
    assert!(
        failed.text().contains("<Code>PreconditionFailed</Code>"),
        "{}",
        failed.text()
    );
    assert!(
        failed.text().contains("<Condition>If-Match</Condition>"),
        "{}",
        failed.text()
    );
    assert_eq!(
        get(&server, &[("if-match", &format!("W/{etag}"))])
            .await
            .status,
        412
    );
    assert_eq!(
        get(&server, &[("if-match", &format!("\"x\", {etag}"))])
            .await
            .status,
        200
    );
    assert_eq!(
        raw(&server, "HEAD", "/bkt/dir/file.bin", &[("if-match", "x")])
            .await
            .status,
        412
    );

    let unmodified = get(&server, &[("if-none-match", &etag)]).await;
    assert_eq!((unmodified.status, unmodified.body.len()), (304, 0));
    assert_eq!(unmodified.field("etag"), Some(etag.as_str()));

    let absent = raw(&server, "GET", "/bkt/absent", &[("if-match", &etag)]).await;
    assert_eq!(absent.status, 404);
    assert!(
        absent.text().contains("<Code>NoSuchKey</Code>"),
        "{}",
        absent.text()
    );
    let no_bucket = raw(&server, "GET", "/nobucket/k", &[]).await;
    assert_eq!(no_bucket.status, 404);
    assert!(
        no_bucket.text().contains("<Code>NoSuchBucket</Code>"),
        "{}",
        no_bucket.text()
    );
}

#[tokio::test]
async fn ranges_are_answered_as_on_s3() {
    let server = start().await;
    put(&server, b"0123456789");
    for (range, content_range, body) in [
        ("bytes=2-4", "bytes 2-4/10", "234"),
        ("bytes=7-", "bytes 7-9/10", "789"),
        ("bytes=-2", "bytes 8-9/10", "89"),
        ("bytes=-99", "bytes 0-9/10", "0123456789"),
        ("bytes=5-99", "bytes 5-9/10", "56789"),
    ] {
        let answer = get(&server, &[("range", range)]).await;
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(answer.field("content-range"), Some(content_range));
        assert_eq!(
            answer.field("content-length"),
            Some(body.len().to_string().as_str())
        );
        assert_eq!(answer.text(), body);
    }
    for ignored in ["bytes=0-1,4-5", "bytes=4-2", "chars=0-1"] {
        let answer = get(&server, &[("range", ignored)]).await;
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "0123456789"),
            "{ignored}"
        );
    }
    let head = raw(
        &server,
        "HEAD",
        "/bkt/dir/file.bin",
        &[("range", "bytes=2-4")],
    )
    .await;
    assert_eq!(
        (head.status, head.field("content-range")),
        (206, Some("bytes 2-4/10"))
    );
    let beyond = get(&server, &[("range", "bytes=10-")]).await;
    assert_eq!(beyond.status, 416);
    assert_eq!(beyond.field("content-range"), Some("bytes */10"));
    assert!(
        beyond.text().contains("<Code>InvalidRange</Code>"),
        "{}",
        beyond.text()
    );
    assert!(
        beyond
            .text()
            .contains("<ActualObjectSize>10</ActualObjectSize>")
    );

    put(&server, b"");
    let empty = get(&server, &[("range", "bytes=0-0")]).await;
    assert_eq!(
        (empty.status, empty.field("content-range")),
        (416, Some("bytes */0"))
    );
    let whole = get(&server, &[]).await;
    assert_eq!(
        (whole.status, whole.field("content-length")),
        (200, Some("0"))
    );
}

#[tokio::test]
async fn the_sdk_reads_writes_and_deletes() {
    let server = start().await;
    let client = sdk(&server, "any secret will do");
    let body = pattern(300_000);
    // The SDK uploads this in signed chunks with a checksum behind them.
    let stored = client
        .put_object()
        .bucket("bkt")
        .key(KEY)
        .content_type("text/x-pattern")
        .metadata("color", "red")
        .body(ByteStream::from(body.clone()))
        .send()
        .await
        .unwrap();
    let etag = stored.e_tag().unwrap().to_owned();

    let got = client
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .if_match(&etag)
        .send()
        .await
        .unwrap();
    assert_eq!(got.e_tag(), Some(etag.as_str()));
    assert_eq!(got.content_type(), Some("text/x-pattern"));
    assert_eq!(got.metadata().unwrap()["color"], "red");
    assert_eq!(got.body.collect().await.unwrap().to_vec(), body);

    let refused = client
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .if_match("\"x\"")
        .send()
        .await;
    assert_eq!(refused.unwrap_err().code(), Some("PreconditionFailed"));

    let again = client
        .put_object()
        .bucket("bkt")
        .key(KEY)
        .if_none_match("*")
        .send()
        .await;
    assert_eq!(again.unwrap_err().code(), Some("PreconditionFailed"));

    client
        .delete_object()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await
        .unwrap();
    let gone = client
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Some("NoSuchKey"));
}

#[tokio::test]
async fn the_sdk_lists_objects_and_buckets() {
    let server = start().await;
    let client = sdk(&server, "s");
    let etag = put(&server, &pattern(300_000));
    for key in ["dir/a", "dir/sub/b", "z"] {
        client
            .put_object()
            .bucket("bkt")
            .key(key)
            .send()
            .await
            .unwrap();
    }
    let page = client
        .list_objects_v2()
        .bucket("bkt")
        .delimiter("/")
        .prefix("dir/")
        .max_keys(2);
    let first = page.clone().send().await.unwrap();
    let names: Vec<_> = first
        .contents()
        .iter()
        .filter_map(|object| object.key())
        .collect();
    assert_eq!(names, ["dir/a", "dir/file.bin"]);
    assert_eq!(first.contents()[1].size(), Some(300_000));
    assert_eq!(first.contents()[1].e_tag(), Some(etag.as_str()));
    let token = first.next_continuation_token().unwrap();
    let second = page.continuation_token(token).send().await.unwrap();
    assert_eq!(second.common_prefixes()[0].prefix(), Some("dir/sub/"));
    assert_eq!(second.is_truncated(), Some(false));

    let owned = client
        .create_bucket()
        .bucket("bkt")
        .send()
        .await
        .unwrap_err();
    assert_eq!(owned.code(), Some("BucketAlreadyOwnedByYou"));
    client.create_bucket().bucket("fresh").send().await.unwrap();
    client.head_bucket().bucket("fresh").send().await.unwrap();
    client.head_bucket().bucket("bkt").send().await.unwrap();
    client
        .get_bucket_location()
        .bucket("bkt")
        .send()
        .await
        .unwrap();
    let buckets = client.list_buckets().send().await.unwrap();
    assert_eq!(buckets.buckets()[0].name(), Some("bkt"));
}

#[tokio::test]
async fn signatures_are_checked_where_there_are_credentials() {
    let credentials = Credentials {
        access_key: "key".to_owned(),
        secret_key: "secret".to_owned(),
    };
    assert!(
        !format!("{credentials:?}").contains("secret\""),
        "{credentials:?}"
    );
    let options = Options {
        credentials: Some(credentials),
        ..Options::memory(["bkt"])
    };
    let server = StrictS3::start(options).await.unwrap();
    put(&server, b"hello");

    let right = sdk(&server, "secret");
    let body = ByteStream::from_static(b"hello");
    right
        .put_object()
        .bucket("bkt")
        .key("k")
        .body(body)
        .send()
        .await
        .unwrap();
    let got = right
        .get_object()
        .bucket("bkt")
        .key("k")
        .range("bytes=1-2")
        .send()
        .await
        .unwrap();
    assert_eq!(got.body.collect().await.unwrap().to_vec(), b"el");

    let wrong = sdk(&server, "wrong")
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await;
    assert_eq!(wrong.unwrap_err().code(), Some("SignatureDoesNotMatch"));
    let anonymous = get(&server, &[]).await;
    assert_eq!(anonymous.status, 403);
    assert!(
        anonymous.text().contains("<Code>AccessDenied</Code>"),
        "{}",
        anonymous.text()
    );
}

#[tokio::test]
async fn multipart_uploads_have_s3s_etag() {
    let server = start().await;
    let client = sdk(&server, "s");
    let created = client
        .create_multipart_upload()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await
        .unwrap();
    let id = created.upload_id().unwrap();
    let body = pattern(5 * 1024 * 1024 + 17);
    let mut parts = Vec::new();
    for (number, bytes) in (1..).zip([&body[..5 * 1024 * 1024], &body[5 * 1024 * 1024..]]) {
        let part = client
            .upload_part()
            .bucket("bkt")
            .key(KEY)
            .upload_id(id)
            .part_number(number)
            .body(ByteStream::from(bytes.to_vec()))
            .send()
            .await
            .unwrap();
        let etag = part.e_tag().unwrap();
        parts.push(
            CompletedPart::builder()
                .part_number(number)
                .e_tag(etag)
                .build(),
        );
    }
    let complete = |parts: Vec<CompletedPart>| {
        let upload = CompletedMultipartUpload::builder()
            .set_parts(Some(parts))
            .build();
        client
            .complete_multipart_upload()
            .bucket("bkt")
            .key(KEY)
            .upload_id(id)
            .multipart_upload(upload)
            .send()
    };
    let reversed = complete(parts.iter().rev().cloned().collect()).await;
    assert_eq!(reversed.unwrap_err().code(), Some("InvalidPartOrder"));
    let missing = CompletedPart::builder()
        .part_number(3)
        .e_tag("\"x\"")
        .build();
    assert_eq!(
        complete(vec![missing]).await.unwrap_err().code(),
        Some("InvalidPart")
    );
    let etag = complete(parts).await.unwrap().e_tag().unwrap().to_owned();
    assert!(etag.ends_with("-2\""), "{etag}");

    let got = client
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await
        .unwrap();
    assert_eq!(got.e_tag(), Some(etag.as_str()));
    assert_eq!(got.body.collect().await.unwrap().to_vec(), body);

    let aborted = client
        .create_multipart_upload()
        .bucket("bkt")
        .key("k")
        .send()
        .await
        .unwrap();
    let id = aborted.upload_id().unwrap();
    let abort = client
        .abort_multipart_upload()
        .bucket("bkt")
        .key("k")
        .upload_id(id);
    abort.clone().send().await.unwrap();
    assert_eq!(abort.send().await.unwrap_err().code(), Some("NoSuchUpload"));
}

#[tokio::test]
async fn versions_outlive_overwrites_and_deletes() {
    let server = StrictS3::start(Options::versioned(["bkt"])).await.unwrap();
    let old = server
        .put("bkt", KEY, "old", PutOptions::default())
        .unwrap()
        .version_id
        .unwrap();
    let new = server
        .put("bkt", KEY, "new", PutOptions::default())
        .unwrap()
        .version_id
        .unwrap();
    let version = |id: &str| format!("/bkt/{KEY}?versionId={id}");

    let current = get(&server, &[]).await;
    assert_eq!(
        (current.text(), current.field("x-amz-version-id")),
        ("new".into(), Some(&*new))
    );
    let earlier = raw(&server, "GET", &version(&old), &[]).await;
    assert_eq!(
        (earlier.text(), earlier.field("x-amz-version-id")),
        ("old".into(), Some(&*old))
    );
    let head = raw(&server, "HEAD", &version(&old), &[]).await;
    assert_eq!(
        (head.status, head.field("x-amz-version-id")),
        (200, Some(&*old))
    );
    let absent = raw(&server, "GET", &version("v1"), &[]).await;
    assert_eq!(absent.status, 404);
    assert!(
        absent.text().contains("<Code>NoSuchVersion</Code>"),
        "{}",
        absent.text()
    );

    let deleted = raw(&server, "DELETE", &format!("/bkt/{KEY}"), &[]).await;
    let marker = deleted.field("x-amz-version-id").unwrap().to_owned();
    assert_eq!(deleted.field("x-amz-delete-marker"), Some("true"));
    let gone = get(&server, &[]).await;
    assert_eq!(
        (gone.status, gone.field("x-amz-delete-marker")),
        (404, Some("true"))
    );
    assert_eq!(
        raw(&server, "GET", &version(&marker), &[]).await.status,
        405
    );
    assert_eq!(raw(&server, "GET", &version(&old), &[]).await.text(), "old");
    assert_eq!(
        raw(&server, "DELETE", &version(&marker), &[]).await.status,
        204
    );
    assert_eq!(get(&server, &[]).await.text(), "new");
}

#[tokio::test]
async fn the_log_counts_what_was_asked_and_sent() {
    let server = start().await;
    let etag = put(&server, &pattern(200_000));
    get(&server, &[]).await;
    get(&server, &[("if-match", &etag), ("range", "bytes=100-299")]).await;
    get(&server, &[("if-match", "*")]).await;
    raw(&server, "GET", &format!("/bkt/{KEY}?versionId=null"), &[]).await;
    raw(&server, "HEAD", &format!("/bkt/{KEY}"), &[]).await;
    get(&server, &[("if-match", "\"x\"")]).await;

    let stats = server.stats();
    assert_eq!((stats.requests, stats.gets, stats.heads), (6, 5, 1));
    assert_eq!(stats.unguarded_gets, 2);
    assert_eq!(stats.body_bytes_sent, 3 * 200_000 + 200);

    server
        .wait_for_log(|log| log.iter().all(|entry| entry.finished))
        .await;
    let log = server.take_log();
    assert_eq!(
        log.iter().map(|entry| entry.sequence).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6]
    );
    assert_eq!(
        (log[1].op, log[1].bucket.as_str(), log[1].key.as_str()),
        (Op::Get, "bkt", KEY)
    );
    assert_eq!(log[1].range.as_deref(), Some("bytes=100-299"));
    assert_eq!(log[1].if_match.as_deref(), Some(etag.as_str()));
    assert_eq!((log[1].status, log[1].body_bytes), (Some(206), 200));
    assert_eq!(log[3].version_id.as_deref(), Some("null"));
    let guarded: Vec<_> = log.iter().map(|entry| entry.guarded).collect();
    assert_eq!(guarded, [false, true, false, true, false, true]);
    assert_eq!((log[4].method.as_str(), log[4].body_bytes), ("HEAD", 0));
    assert_eq!(log[5].status, Some(412));
    assert_eq!((server.log().len(), server.stats().requests), (0, 0));
}

#[tokio::test]
async fn the_log_is_a_ring() {
    let options = Options {
        log_capacity: 2,
        ..Options::memory(["bkt"])
    };
    let server = StrictS3::start(options).await.unwrap();
    for _ in 0..5 {
        get(&server, &[]).await;
    }
    let kept: Vec<_> = server.log().iter().map(|entry| entry.sequence).collect();
    assert_eq!(kept, [4, 5]);
    assert_eq!(server.stats().requests, 5);
}

#[tokio::test]
async fn a_reset_comes_after_exactly_the_promised_bytes() {
    let server = start().await;
    let body = pattern(4 * 1024 * 1024);
    put(&server, &body);
    for bytes in [0, 1, 70_000, 3_000_000] {
        server.script(
            Fault::new(Effect::ResetAfter { bytes })
                .on(Op::Get)
                .key(KEY),
        );
        let answer = get(&server, &[]).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.field("content-length"), Some("4194304"));
        assert_eq!(answer.body.len() as u64, bytes);
        assert!(body.starts_with(&answer.body));
        assert_eq!(answer.end, Err(ErrorKind::ConnectionReset), "after {bytes}");
    }
    let entry = server.log().pop().unwrap();
    assert_eq!(
        (entry.body_bytes, entry.faults),
        (3_000_000, vec!["reset-after"])
    );
    assert_eq!(get(&server, &[]).await.body, body, "a fault is used up");
}

#[tokio::test]
async fn a_reset_waits_for_a_client_that_reads_late() {
    let server = start().await;
    // More than the sockets' buffers hold at first.
    let body = pattern(16 * 1024 * 1024);
    put(&server, &body);
    server.script(Fault::new(Effect::ResetAfter { bytes: 12_000_000 }));
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = format!("GET /bkt/{KEY} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    server
        .wait_for_log(|log| log.iter().any(|entry| entry.body_bytes > 0))
        .await;
    let answer = read_raw(&mut stream).await;
    assert_eq!(answer.body.len(), 12_000_000);
    assert_eq!(answer.end, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_reset_of_an_empty_object_and_of_a_head_comes_after_the_head() {
    let server = start().await;
    put(&server, b"");
    for method in ["GET", "HEAD"] {
        server.script(Fault::new(Effect::ResetAfter { bytes: 0 }));
        let answer = raw(&server, method, &format!("/bkt/{KEY}"), &[]).await;
        assert_eq!(
            (answer.status, answer.end),
            (200, Err(ErrorKind::ConnectionReset))
        );
    }
}

#[tokio::test]
async fn a_short_body_ends_with_a_plain_close() {
    let server = start().await;
    put(&server, &pattern(100_000));
    server.script(Fault::new(Effect::CloseAfter { bytes: 50_000 }));
    let answer = get(&server, &[]).await;
    assert_eq!(answer.field("content-length"), Some("100000"));
    assert_eq!((answer.body.len(), answer.end), (50_000, Ok(())));
}

#[tokio::test]
async fn heads_lie_as_scripted() {
    let server = start().await;
    let etag = put(&server, b"0123456789");
    let range = ("range", "bytes=2-5");

    server.script(Fault::new(Effect::WrongContentRange));
    let answer = get(&server, &[range]).await;
    assert_eq!(answer.field("content-range"), Some("bytes 3-6/10"));
    assert_eq!((answer.status, answer.text().as_str()), (206, "2345"));

    server.script(Fault::new(Effect::WrongETag));
    let answer = get(&server, &[("if-match", &etag)]).await;
    assert_eq!(answer.status, 200);
    assert_ne!(answer.field("etag"), Some(etag.as_str()));

    server.script(Fault::new(Effect::ShortContentLength { missing: 1 }));
    let answer = get(&server, &[range]).await;
    assert_eq!(answer.field("content-range"), Some("bytes 2-5/10"));
    assert_eq!(answer.field("content-length"), Some("3"));
    assert_eq!((answer.text().as_str(), answer.end), ("234", Ok(())));

    server.script(Fault::new(Effect::IgnoreRange));
    let answer = get(&server, &[range]).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "0123456789"));
    assert_eq!(answer.field("content-range"), None);

    server.script(Fault::new(Effect::IgnoreIfMatch));
    let answer = get(&server, &[("if-match", "\"x\""), range]).await;
    assert_eq!((answer.status, answer.text().as_str()), (206, "2345"));
}

#[tokio::test]
async fn refusals_are_s3s() {
    let server = start().await;
    put(&server, b"hello");
    server.script(Fault::new(Effect::SlowDown {
        retry_after: Some(7),
    }));
    server.script(Fault::new(Effect::InternalError).nth(2));
    server.script(Fault::new(Effect::AccessDenied).nth(3));
    let slow = get(&server, &[]).await;
    assert_eq!((slow.status, slow.field("retry-after")), (503, Some("7")));
    assert!(
        slow.text().contains("<Code>SlowDown</Code>"),
        "{}",
        slow.text()
    );
    let failed = get(&server, &[]).await;
    assert_eq!(failed.status, 500);
    assert!(
        failed.text().contains("<Code>InternalError</Code>"),
        "{}",
        failed.text()
    );
    let denied = sdk(&server, "s")
        .get_object()
        .bucket("bkt")
        .key(KEY)
        .send()
        .await
        .unwrap_err();
    assert_eq!(denied.code(), Some("AccessDenied"));
    assert_eq!(get(&server, &[]).await.status, 200);
}

#[tokio::test]
async fn a_stalled_body_goes_on_when_it_is_released() {
    let server = start().await;
    put(&server, &pattern(100_000));
    server.script(Fault::new(Effect::StallAfter {
        bytes: 10_000,
        duration: None,
    }));
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request =
        format!("GET /bkt/{KEY} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    server
        .wait_for_log(|log| log.iter().any(|entry| entry.body_bytes == 10_000))
        .await;
    let mut received = Vec::new();
    let until_silent = async {
        loop {
            assert_ne!(
                stream.read_buf(&mut received).await.unwrap(),
                0,
                "not closed"
            );
        }
    };
    let silence = Duration::from_millis(100);
    tokio::time::timeout(silence, until_silent)
        .await
        .unwrap_err();
    assert!(received.ends_with(&pattern(100_000)[..10_000]));
    let entry = &server.log()[0];
    assert_eq!((entry.body_bytes, entry.finished), (10_000, false));
    server.release_stalls();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, &pattern(100_000)[10_000..]);
}

#[tokio::test]
async fn timed_stalls_delays_and_the_first_byte_delay_take_their_time() {
    let server = start().await;
    put(&server, b"hello");
    let hundred = Duration::from_millis(100);
    let effects = [
        Effect::StallAfter {
            bytes: 2,
            duration: Some(hundred),
        },
        Effect::Delay(hundred),
    ];
    for effect in effects {
        server.script(Fault::new(effect));
        let begun = Instant::now();
        assert_eq!(get(&server, &[]).await.text(), "hello");
        assert!(begun.elapsed() >= hundred);
    }
    server.set_first_byte_delay(hundred);
    let begun = Instant::now();
    assert_eq!(get(&server, &[]).await.text(), "hello");
    assert!(begun.elapsed() >= hundred);
}

#[tokio::test]
async fn bodies_keep_to_the_pace() {
    let server = start().await;
    put(&server, &pattern(200_000));
    server.set_bytes_per_second_per_connection(NonZeroU64::new(1_000_000));
    let begun = Instant::now();
    assert_eq!(get(&server, &[]).await.body.len(), 200_000);
    let took = begun.elapsed();
    assert!(
        (Duration::from_millis(180)..Duration::from_secs(2)).contains(&took),
        "{took:?}"
    );
}

#[tokio::test]
async fn objects_change_between_any_two_requests() {
    let server = start().await;
    let first = put(&server, b"first");
    let swap = |bytes: &'static str| Mutation::Put {
        bucket: "bkt".to_owned(),
        key: KEY.to_owned(),
        bytes: Bytes::from_static(bytes.as_bytes()),
        options: PutOptions::default(),
    };
    server.script(Fault::new(Effect::After(swap("second"))).on(Op::Get));
    assert_eq!(get(&server, &[("if-match", &first)]).await.text(), "first");
    assert_eq!(get(&server, &[("if-match", &first)]).await.status, 412);

    server.script(Fault::new(Effect::Before(swap("third"))));
    assert_eq!(get(&server, &[]).await.text(), "third");

    let swap = swap("hooked");
    server.on_request(Some(Box::new(move |request| {
        if request.range.is_some() {
            vec![Effect::Before(swap.clone())]
        } else {
            Vec::new()
        }
    })));
    assert_eq!(get(&server, &[]).await.text(), "third");
    assert_eq!(get(&server, &[("range", "bytes=0-2")]).await.text(), "hoo");
    server.on_request(None);

    let delete = Mutation::Delete {
        bucket: "bkt".to_owned(),
        key: KEY.to_owned(),
    };
    server.script(Fault::new(Effect::Before(delete)));
    assert_eq!(get(&server, &[]).await.status, 404);

    let impossible = Mutation::Delete {
        bucket: "nobucket".to_owned(),
        key: KEY.to_owned(),
    };
    server.script(Fault::new(Effect::Before(impossible)));
    assert_eq!(
        get(&server, &[]).await.status,
        500,
        "an impossible script is not silent"
    );
}

#[tokio::test]
async fn an_outage_resets_and_refuses_until_it_is_over() {
    let server = start().await;
    put(&server, &pattern(1_000_000));
    server.script(Fault::new(Effect::StallAfter {
        bytes: 1000,
        duration: None,
    }));
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = format!("GET /bkt/{KEY} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    server
        .wait_for_log(|log| log.iter().any(|entry| entry.body_bytes == 1000))
        .await;

    server.stop_accepting().await;
    assert_eq!(
        read_raw(&mut stream).await.end,
        Err(ErrorKind::ConnectionReset)
    );
    let refused = TcpStream::connect(server.address()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

    let endpoint = server.endpoint();
    server.resume().await.unwrap();
    assert_eq!(server.endpoint(), endpoint);
    assert_eq!(get(&server, &[]).await.body.len(), 1_000_000);

    server.script(Fault::new(Effect::Outage));
    assert_eq!(get(&server, &[]).await.end, Err(ErrorKind::ConnectionReset));
    server.resume().await.unwrap();
    assert_eq!(get(&server, &[]).await.status, 200);

    let address = server.address();
    server.shutdown().await;
    let refused = TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

mod directory {
    use super::*;

    async fn serve(root: &std::path::Path) -> StrictS3 {
        StrictS3::start(Options::directory("bkt", root))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn files_are_objects_and_their_etag_follows_their_content() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        let file = root.path().join(KEY);
        std::fs::write(&file, "hello").unwrap();
        let server = serve(root.path()).await;

        let answer = get(&server, &[]).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
        assert_eq!(answer.field("etag"), Some(MD5_OF_HELLO));
        let part = get(
            &server,
            &[("if-match", MD5_OF_HELLO), ("range", "bytes=-2")],
        )
        .await;
        assert_eq!((part.status, part.text().as_str()), (206, "lo"));

        // In place, at once, the same size: only a clock tick apart.
        std::fs::write(&file, "HELLO").unwrap();
        assert_eq!(
            get(&server, &[("if-match", MD5_OF_HELLO)]).await.status,
            412
        );
        assert_eq!(get(&server, &[]).await.text(), "HELLO");
        std::fs::write(&file, "hello").unwrap();
        assert_eq!(get(&server, &[]).await.field("etag"), Some(MD5_OF_HELLO));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(get(&server, &[]).await.status, 404);
    }

    #[tokio::test]
    async fn the_etag_of_a_large_file_follows_every_write() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        let file = root.path().join(KEY);
        let mut body = pattern(17 * 1024 * 1024);
        let server = serve(root.path()).await;
        let mut seen = std::collections::HashSet::new();
        for change in 0..5 {
            body[1000] = change;
            std::fs::write(&file, &body).unwrap();
            let answer = raw(&server, "HEAD", &format!("/bkt/{KEY}"), &[]).await;
            assert!(
                seen.insert(answer.field("etag").unwrap().to_owned()),
                "{seen:?}"
            );
        }
        assert!(seen.iter().all(|etag| etag.ends_with("-0\"")), "{seen:?}");
        assert_eq!(get(&server, &[]).await.body, body);
    }

    #[tokio::test]
    async fn a_file_that_changes_while_it_is_sent_cuts_the_body() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        let file = root.path().join(KEY);
        let old = pattern(4 * 1024 * 1024);
        std::fs::write(&file, &old).unwrap();
        let server = serve(root.path()).await;
        server.script(Fault::new(Effect::StallAfter {
            bytes: 300_000,
            duration: None,
        }));
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let request = format!("GET /bkt/{KEY} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        server
            .wait_for_log(|log| log.iter().any(|entry| entry.body_bytes == 300_000))
            .await;
        std::fs::write(&file, vec![0; old.len()]).unwrap();
        server.release_stalls();
        let answer = read_raw(&mut stream).await;
        assert!(answer.body.len() < old.len(), "the body was cut");
        assert!(old.starts_with(&answer.body), "nothing new was mixed in");
    }

    #[tokio::test]
    async fn a_file_that_is_replaced_while_it_is_sent_is_sent_to_its_end() {
        let root = tempfile::tempdir().unwrap();
        let server = serve(root.path()).await;
        let client = sdk(&server, "s");
        let old = pattern(4 * 1024 * 1024);
        let store = |body: Vec<u8>| {
            client
                .put_object()
                .bucket("bkt")
                .key(KEY)
                .body(ByteStream::from(body))
                .send()
        };
        let etag = store(old.clone())
            .await
            .unwrap()
            .e_tag()
            .unwrap()
            .to_owned();
        server.script(
            Fault::new(Effect::StallAfter {
                bytes: 300_000,
                duration: None,
            })
            .on(Op::Get),
        );
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let request =
            format!("GET /bkt/{KEY} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        server
            .wait_for_log(|log| log.iter().any(|entry| entry.body_bytes == 300_000))
            .await;
        store(vec![0; old.len()]).await.unwrap();
        server.release_stalls();
        let answer = read_raw(&mut stream).await;
        assert_eq!(answer.field("etag"), Some(etag.as_str()));
        assert_eq!(answer.body, old);
        assert_eq!(get(&server, &[]).await.body, vec![0; old.len()]);
    }

    #[tokio::test]
    async fn no_key_leads_out_of_the_directory() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "secret").unwrap();
        let root = outside.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("inside"), "inside").unwrap();
        symlink("../secret", root.join("link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("inside", root.join("good")).unwrap();
        symlink(outside.path().join("secret"), root.join("absolute")).unwrap();
        let server = serve(&root).await;
        for key in [
            "link",
            "up/secret",
            "absolute",
            "../secret",
            "%2e%2e/secret",
            "/inside",
            "./inside",
        ] {
            let answer = raw(&server, "GET", &format!("/bkt/{key}"), &[]).await;
            assert_eq!(answer.status, 404, "{key}: {}", answer.text());
        }
        assert_eq!(raw(&server, "GET", "/bkt/good", &[]).await.text(), "inside");
        for key in [
            "up/new",
            "../new",
            "a/../../new",
            "a//b",
            ".pinrange-s3/x",
            "new/",
        ] {
            let answer = raw_with_body(&server, "PUT", &format!("/bkt/{key}"), &[], b"x").await;
            assert_eq!(answer.status, 400, "{key}: {}", answer.text());
        }
        assert_eq!(
            raw(&server, "DELETE", "/bkt/up/secret", &[]).await.status,
            204
        );
        assert!(outside.path().join("secret").exists());
        assert!(!outside.path().join("new").exists());

        let listed = raw(&server, "GET", "/bkt?list-type=2", &[]).await.text();
        assert!(listed.contains("<Key>good</Key>") && listed.contains("<Key>inside</Key>"));
        assert!(
            !listed.contains("link") && !listed.contains("absolute"),
            "{listed}"
        );
    }

    #[tokio::test]
    async fn uploads_become_files_and_leave_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let server = serve(root.path()).await;
        let client = sdk(&server, "s");
        let body = pattern(5 * 1024 * 1024 + 3);
        let created = client
            .create_multipart_upload()
            .bucket("bkt")
            .key(KEY)
            .send()
            .await
            .unwrap();
        let id = created.upload_id().unwrap();
        let mut parts = Vec::new();
        for (number, bytes) in (1..).zip([&body[..5 * 1024 * 1024], &body[5 * 1024 * 1024..]]) {
            let part = client.upload_part().bucket("bkt").key(KEY).upload_id(id);
            let part = part
                .part_number(number)
                .body(ByteStream::from(bytes.to_vec()));
            let part = part.send().await.unwrap();
            let etag = part.e_tag().unwrap();
            parts.push(
                CompletedPart::builder()
                    .part_number(number)
                    .e_tag(etag)
                    .build(),
            );
        }
        let upload = CompletedMultipartUpload::builder()
            .set_parts(Some(parts))
            .build();
        let complete = client
            .complete_multipart_upload()
            .bucket("bkt")
            .key(KEY)
            .upload_id(id);
        let etag = complete.multipart_upload(upload).send().await.unwrap();
        assert_eq!(std::fs::read(root.path().join(KEY)).unwrap(), body);
        let head = client
            .head_object()
            .bucket("bkt")
            .key(KEY)
            .send()
            .await
            .unwrap();
        assert_eq!(head.e_tag(), etag.e_tag());

        let again = client
            .put_object()
            .bucket("bkt")
            .key(KEY)
            .if_none_match("*")
            .send()
            .await;
        assert_eq!(again.unwrap_err().code(), Some("PreconditionFailed"));
        client
            .put_object()
            .bucket("bkt")
            .key(KEY)
            .if_match(etag.e_tag().unwrap())
            .send()
            .await
            .unwrap();
        let stale = client
            .put_object()
            .bucket("bkt")
            .key(KEY)
            .if_match("\"x\"")
            .send()
            .await;
        assert_eq!(stale.unwrap_err().code(), Some("PreconditionFailed"));
        let folded = client
            .list_objects_v2()
            .bucket("bkt")
            .delimiter("/")
            .send()
            .await
            .unwrap();
        assert_eq!(folded.common_prefixes()[0].prefix(), Some("dir/"));
        client
            .delete_object()
            .bucket("bkt")
            .key(KEY)
            .send()
            .await
            .unwrap();

        server.shutdown().await;
        let left: Vec<_> = std::fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["dir"], "directories stay, nothing else does");
    }
}

/// What a whole read says of the checksum: algorithm, value, type.
async fn told(server: &StrictS3, key: &str) -> Vec<(String, String)> {
    let mode = [("x-amz-checksum-mode", "ENABLED")];
    let head = raw(server, "HEAD", &format!("/bkt/{key}"), &mode).await;
    assert_eq!(head.status, 200);
    let mut told: Vec<_> = head
        .fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.strip_prefix("x-amz-checksum-")?.to_owned(), value)))
        .collect();
    told.sort();
    told
}

fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs.map(|(a, b)| (a.to_owned(), b.to_owned())).into()
}

/// The values are those that the catalogue of CRCs and `sha256sum` have for `123456789`.
#[tokio::test]
async fn checksums_are_stored_compared_and_told_of_whole_objects() {
    let server = start().await;
    let crc64 = pairs([("crc64nvme", "rosUhgp5mIg="), ("type", "FULL_OBJECT")]);
    server
        .put("bkt", "within", &b"123456789"[..], PutOptions::default())
        .unwrap();
    assert_eq!(told(&server, "within").await, crc64);
    let plain = raw_with_body(&server, "PUT", "/bkt/plain", &[], b"123456789").await;
    assert_eq!(plain.status, 200);
    assert_eq!(told(&server, "plain").await, crc64);

    let right = [("x-amz-checksum-crc32c", "4waSgw==")];
    let put = raw_with_body(&server, "PUT", "/bkt/crc32c", &right, b"123456789").await;
    assert_eq!(put.status, 200, "{}", put.text());
    assert_eq!(
        told(&server, "crc32c").await,
        pairs([("crc32c", "4waSgw=="), ("type", "FULL_OBJECT")]),
        "that of the uploader in place of S3's own"
    );
    let put = raw_with_body(&server, "PUT", "/bkt/wrong", &right, b"123456780").await;
    assert_eq!(put.status, 400);
    assert!(put.text().contains("BadDigest"), "{}", put.text());
    assert_eq!(raw(&server, "HEAD", "/bkt/wrong", &[]).await.status, 404);

    // Not unasked, and not for a range.
    let mode = ("x-amz-checksum-mode", "ENABLED");
    let whole = raw(&server, "GET", "/bkt/plain", &[mode]).await;
    assert_eq!(
        whole.field("x-amz-checksum-crc64nvme"),
        Some("rosUhgp5mIg=")
    );
    for fields in [&[][..], &[mode, ("range", "bytes=0-3")]] {
        let answer = raw(&server, "GET", "/bkt/plain", fields).await;
        assert_eq!(answer.field("x-amz-checksum-crc64nvme"), None, "{fields:?}");
    }

    // As an SDK sends it, in front of the body or behind it.
    let put = sdk(&server, "any").put_object().bucket("bkt").key("sdk");
    put.checksum_algorithm(ChecksumAlgorithm::Sha256)
        .body(ByteStream::from_static(b"123456789"))
        .send()
        .await
        .unwrap();
    assert_eq!(
        told(&server, "sdk").await,
        pairs([
            ("sha256", "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU="),
            ("type", "FULL_OBJECT")
        ])
    );
}

#[tokio::test]
async fn an_object_of_parts_has_a_checksum_of_its_parts_or_of_the_whole() {
    let server = start().await;
    let client = sdk(&server, "any");
    let parts = [pattern(5 << 20), b"123456789".to_vec()];
    let whole = parts.concat();
    for (algorithm, kind) in [
        (None, "FULL_OBJECT"),
        (Some(ChecksumAlgorithm::Crc64Nvme), "FULL_OBJECT"),
        (Some(ChecksumAlgorithm::Crc32C), "COMPOSITE"),
        (Some(ChecksumAlgorithm::Sha256), "COMPOSITE"),
    ] {
        let upload = client
            .create_multipart_upload()
            .bucket("bkt")
            .key("parts")
            .set_checksum_algorithm(algorithm.clone())
            .send()
            .await
            .unwrap();
        let id = upload.upload_id().unwrap();
        let mut done = CompletedMultipartUpload::builder();
        for (number, bytes) in (1..).zip(&parts) {
            let part = client
                .upload_part()
                .bucket("bkt")
                .key("parts")
                .upload_id(id)
                .part_number(number)
                .body(bytes.clone().into())
                .send()
                .await
                .unwrap();
            let part = CompletedPart::builder()
                .part_number(number)
                .e_tag(part.e_tag().unwrap());
            done = done.parts(part.build());
        }
        client
            .complete_multipart_upload()
            .bucket("bkt")
            .key("parts")
            .upload_id(id)
            .multipart_upload(done.build())
            .send()
            .await
            .unwrap();
        let told = told(&server, "parts").await;
        assert_eq!(
            told[1],
            ("type".to_owned(), kind.to_owned()),
            "{algorithm:?}"
        );
        let (name, value) = &told[0];
        if kind == "FULL_OBJECT" {
            assert_eq!(name, "crc64nvme");
            let sum = crc_fast::crc64_nvme(&whole).to_be_bytes();
            assert_eq!(*value, BASE64_STANDARD.encode(sum));
        } else {
            assert!(value.ends_with("=-2"), "{value}");
        }
    }
}

#[tokio::test]
async fn a_byte_is_flipped_on_its_way() {
    let server = start().await;
    put(&server, b"hello");
    server.script(Fault::new(Effect::FlipByte { at: 1 }).on(Op::Get));
    let path = format!("/bkt/{KEY}");
    assert_eq!(raw(&server, "GET", &path, &[]).await.body, b"h\x9allo");
    assert_eq!(raw(&server, "GET", &path, &[]).await.body, b"hello");
}
