//! What the S3 driver makes of responses that a well-behaved server never sends, and of those that
//! only some do; and what it sends.

mod support;

use std::collections::HashSet;
use std::error::Error as _;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use pinrange::object::Validator;
use pinrange::remote::conformance::{self, Fixture as _};
use pinrange::remote::s3::{S3Remote, S3Settings};
use pinrange::remote::{
    Current, Guard, Remote as _, RemoteError, RemoteErrorKind, RemoteRead, TRACEPARENT,
};
use pinrange::semantics::RangeSpec;

use pinrange::strict_s3::{Credentials, Effect, Fault, Options, StrictS3};
use support::bucket::{Access, Bucket};
use support::wire::{Step, Wire};

const TEN: RangeSpec = RangeSpec::Closed { first: 0, last: 9 };

/// What the scripted object's first ten bytes should come as; `{}` for what a case changes.
const GOOD: &str = "HTTP/1.1 206 Partial Content\r\nETag: \"a\"\r\nContent-Range: bytes 0-9/100\r\n\
                    Content-Length: 10\r\n\r\n0123456789";

fn guard() -> Guard {
    Guard {
        key: "key".into(),
        validator: Validator::from_etag_field("\"a\"").expect("a strong tag"),
        version_id: None,
        size: None,
    }
}

fn versioned() -> Guard {
    Guard {
        version_id: Some("v1".into()),
        ..guard()
    }
}

fn response(status: &str, fields: &str, body: &str) -> Vec<Step> {
    let len = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {len}\r\n\r\n");
    vec![Step::send(head + body)]
}

fn s3_error(status: &str, fields: &str, code: &str) -> Vec<Step> {
    let body = format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code>\
         <Message>No such key: AKIDSCRIPTEDTEST</Message></Error>"
    );
    response(status, fields, &body)
}

async fn connect(wire: &Wire) -> S3Remote {
    let settings = S3Settings {
        first_byte_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(200),
        ..wire.access().settings()
    };
    let remote = S3Remote::connect(settings).await;
    remote.expect("the settings are sound")
}

/// A guarded read of ten bytes from a server with one script.
async fn read(guard: &Guard, script: Vec<Step>) -> Result<RemoteRead, RemoteError> {
    let wire = Wire::start(vec![script]).await;
    let result = connect(&wire).await.read(guard, TEN).await;
    assert_eq!(wire.requests().len(), 1, "no method retries");
    result
}

async fn kind_of(script: Vec<Step>) -> RemoteErrorKind {
    let error = read(&guard(), script).await;
    error.expect_err("a refusal").kind
}

async fn collect(read: RemoteRead) -> Result<Vec<u8>, RemoteError> {
    let frames: Vec<Bytes> = read.body.try_collect().await?;
    Ok(frames.concat())
}

/// Every byte that comes before the body's end or error, and how it ends.
async fn drain(read: RemoteRead) -> (Vec<u8>, Option<RemoteErrorKind>) {
    let (mut bytes, mut body) = (Vec::new(), read.body);
    while let Some(frame) = body.next().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(&frame),
            Err(error) => {
                assert!(body.next().await.is_none(), "nothing follows an error");
                return (bytes, Some(error.kind));
            }
        }
    }
    (bytes, None)
}

/// A server that enforces what others may forget, and that counts.
async fn strict(options: Options) -> (StrictS3, Access) {
    let credentials = Credentials {
        access_key: "test-key".to_owned(),
        secret_key: "test-secret".to_owned(),
    };
    let options = Options {
        credentials: Some(credentials.clone()),
        ..options
    };
    let server = StrictS3::start(options).await.expect("a port on loopback");
    let access = Access {
        endpoint: server.endpoint(),
        region: "us-east-1".to_owned(),
        bucket: "snapshots".to_owned(),
        key_id: credentials.access_key,
        secret: credentials.secret_key,
    };
    (server, access)
}

async fn conforms_over(options: Options, versioned: bool) {
    let (_server, access) = strict(options).await;
    conformance::run(&Bucket::open(&access, versioned).await).await;
}

#[tokio::test]
async fn conforms() {
    conforms_over(Options::memory(["snapshots"]), false).await;
}

#[tokio::test]
async fn conforms_with_versions() {
    conforms_over(Options::versioned(["snapshots"]), true).await;
}

#[tokio::test]
async fn a_guarded_read_is_one_guarded_request() {
    const READS: u64 = 20;
    let (server, access) = strict(Options::memory(["snapshots"])).await;
    let bucket = Bucket::open(&access, false).await;
    bucket.put("key", vec![7; 100_000].into(), &[]).await;
    let stat = bucket.remote.stat("key", None).await.unwrap();
    let guard = Guard {
        validator: stat.validator,
        ..guard()
    };
    server.clear_log();
    for _ in 0..READS {
        let read = bucket.remote.read(&guard, RangeSpec::From(1)).await;
        assert_eq!(collect(read.unwrap()).await.unwrap().len(), 99_999);
    }
    let stats = server.stats();
    assert_eq!((stats.requests, stats.unguarded_gets), (READS, 0));
    let connections: HashSet<u64> = server.log().iter().map(|entry| entry.connection).collect();
    assert!(
        connections.len() < 10,
        "connections are kept: {connections:?}"
    );

    let read = bucket.remote.read_current("key", None, None).await.unwrap();
    assert!(matches!(read, Current::Read(_)));
    assert_eq!(
        server.stats().unguarded_gets,
        1,
        "a read that labels itself has no guard"
    );
}

/// The same lies and cuts as below, from a server that tells the truth otherwise.
#[tokio::test]
async fn faults_of_a_real_exchange_are_told_apart() {
    use RemoteErrorKind as Kind;
    let (server, access) = strict(Options::memory(["snapshots"])).await;
    let bucket = Bucket::open(&access, false).await;
    bucket.put("key", vec![7; 1000].into(), &[]).await;
    let settings = S3Settings {
        stall_timeout: Duration::from_millis(200),
        ..access.settings()
    };
    let remote = S3Remote::connect(settings).await.unwrap();
    let stat = remote.stat("key", None).await.unwrap();
    let right = Guard {
        validator: stat.validator,
        ..guard()
    };
    let wrong = guard();
    let retry_after = Some(Duration::from_secs(3));
    let want = RangeSpec::Closed {
        first: 100,
        last: 899,
    };
    for (guard, effect, kind) in [
        (&right, Effect::WrongContentRange, Kind::Protocol),
        (&right, Effect::WrongETag, Kind::Protocol),
        (&right, Effect::IgnoreRange, Kind::Protocol),
        (&wrong, Effect::IgnoreIfMatch, Kind::Protocol),
        (
            &right,
            Effect::ShortContentLength { missing: 1 },
            Kind::Protocol,
        ),
        (&right, Effect::ResetAfter { bytes: 10 }, Kind::Unavailable),
        (&right, Effect::CloseAfter { bytes: 799 }, Kind::Unavailable),
        (
            &right,
            Effect::StallAfter {
                bytes: 10,
                duration: None,
            },
            Kind::Timeout,
        ),
        (
            &right,
            Effect::SlowDown {
                retry_after: Some(3),
            },
            Kind::Throttled { retry_after },
        ),
        (&right, Effect::InternalError, Kind::Unavailable),
        (&right, Effect::AccessDenied, Kind::Forbidden),
    ] {
        let what = effect.label();
        server.script(Fault::new(effect));
        let end = match remote.read(guard, want).await {
            Err(error) => Some(error.kind),
            Ok(read) => drain(read).await.1,
        };
        assert_eq!(end, Some(kind), "{what}");
        server.release_stalls();
    }
    // Nothing of that sticks.
    assert!(
        collect(remote.read(&right, want).await.unwrap())
            .await
            .is_ok()
    );
}

/// What a guarded read sends.
async fn request_of_a_read() -> String {
    let wire = Wire::start(vec![vec![Step::send(GOOD)]]).await;
    let read = connect(&wire).await.read(&guard(), TEN).await;
    let body = collect(read.expect("a head")).await;
    assert_eq!(body.expect("a whole body"), b"0123456789");
    wire.requests().remove(0)
}

#[tokio::test]
async fn asks_for_exactly_the_guarded_range() {
    let request = request_of_a_read().await;
    assert!(request.starts_with("get /secret-bucket/key"), "{request}");
    assert!(request.contains("\r\nif-match: \"a\"\r\n"), "{request}");
    assert!(request.contains("\r\nrange: bytes=0-9\r\n"), "{request}");
    assert!(
        !request.contains("x-amz-checksum-mode"),
        "checksums come too late: {request}"
    );
}

/// S3's logs name us, and no GET pays for what the SDK would tell of itself.
#[tokio::test]
async fn names_itself_and_nothing_of_the_sdk() {
    let request = request_of_a_read().await;
    let agent = concat!(
        "\r\nuser-agent: pinrange/",
        env!("CARGO_PKG_VERSION"),
        "\r\n"
    );
    assert!(request.contains(agent), "{request}");
    assert_eq!(request.matches("user-agent").count(), 1, "{request}");
    assert!(!request.contains("amz-sdk"), "{request}");
}

#[tokio::test]
async fn passes_the_trace_on() {
    let wire = Wire::start(vec![vec![Step::send(GOOD)]]).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let remote = connect(&wire).await;
    let guard = guard();
    let read = TRACEPARENT.scope(Some(trace.into()), remote.read(&guard, TEN));
    assert_eq!(collect(read.await.unwrap()).await.unwrap(), b"0123456789");
    let request = &wire.requests()[0];
    assert!(
        request.contains(&format!("\r\ntraceparent: {trace}\r\n")),
        "{request}"
    );
}

/// P1: whatever does not fit is refused before a byte of it is handed on.
#[tokio::test]
async fn a_head_that_lies_is_a_protocol_error() {
    for (what, from, to) in [
        ("200 for a range", "206 Partial Content", "200 OK"),
        ("204 for a range", "206 Partial Content", "204 No Content"),
        ("another start", "bytes 0-9/", "bytes 1-10/"),
        ("another end", "bytes 0-9/", "bytes 0-8/"),
        (
            "cut short by a total that it contradicts",
            "0-9/100",
            "0-9/9",
        ),
        ("unknown complete length", "0-9/100", "0-9/*"),
        ("another unit", "bytes 0-9", "items 0-9"),
        ("nonsense", "0-9/100", "0x9"),
        ("signed numbers", "0-9/100", "+0-9/100"),
        ("no Content-Range", "Content-Range: bytes 0-9/100\r\n", ""),
        (
            "two Content-Ranges",
            "Content-Length",
            "Content-Range: bytes 0-9/100\r\nContent-Length",
        ),
        ("another ETag", "\"a\"", "\"b\""),
        ("a weak ETag", "\"a\"", "W/\"a\""),
        ("an unquoted ETag", "\"a\"", "a"),
        ("no ETag", "ETag: \"a\"\r\n", ""),
        ("two ETags", "ETag: \"a\"", "ETag: \"a\"\r\nETag: \"b\""),
        ("a longer body", "Length: 10\r\n\r\n", "Length: 11\r\n\r\n+"),
        ("a shorter body", "Length: 10\r\n\r\n0", "Length: 9\r\n\r\n"),
        (
            "multipart",
            "Content-Range: bytes 0-9/100",
            "Content-Type: multipart/byteranges",
        ),
    ] {
        let lie = GOOD.replacen(from, to, 1);
        assert_ne!(lie, GOOD, "{what}");
        assert_eq!(
            kind_of(vec![Step::send(lie)]).await,
            RemoteErrorKind::Protocol,
            "{what}"
        );
    }
}

#[tokio::test]
async fn a_changed_complete_length_is_a_protocol_error() {
    let known = Guard {
        size: Some(100),
        ..guard()
    };
    assert!(read(&known, vec![Step::send(GOOD)]).await.is_ok());
    let other = Guard {
        size: Some(99),
        ..guard()
    };
    let error = read(&other, vec![Step::send(GOOD)]).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol);
}

#[tokio::test]
async fn a_label_that_is_missing_or_weak_is_refused() {
    for etag in ["", "ETag: W/\"a\"\r\n"] {
        let wire = Wire::start(vec![response("200 OK", etag, "bytes")]).await;
        let error = connect(&wire)
            .await
            .read_current("key", None, None)
            .await
            .unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Protocol, "{etag:?}");
    }
}

#[tokio::test]
async fn a_206_for_a_whole_object_is_a_protocol_error() {
    let wire = Wire::start(vec![vec![Step::send(GOOD)]]).await;
    let error = connect(&wire)
        .await
        .read_current("key", None, None)
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol);
}

/// P3 rests on this: a body never ends cleanly short.
#[tokio::test]
async fn a_body_cut_short_fails_after_the_bytes_that_came() {
    let half = GOOD.strip_suffix("56789").unwrap();
    for (what, steps, kind) in [
        (
            "closed",
            vec![Step::send(half)],
            RemoteErrorKind::Unavailable,
        ),
        (
            "reset",
            vec![Step::send(half), Step::Reset],
            RemoteErrorKind::Unavailable,
        ),
        (
            "silent",
            vec![Step::send(half), Step::Stall],
            RemoteErrorKind::Timeout,
        ),
    ] {
        let wire = Wire::start(vec![steps]).await;
        let read = connect(&wire).await.read(&guard(), TEN).await.unwrap();
        let (bytes, end) = drain(read).await;
        assert_eq!(end, Some(kind), "{what}");
        // A reset may overtake what was sent before it; what comes is a prefix all the same.
        assert!(b"01234".starts_with(&bytes), "{what}: {bytes:?}");
        assert!(what == "reset" || bytes.len() == 5, "{what}: {bytes:?}");
    }
}

#[tokio::test]
async fn a_chunked_body_is_counted() {
    let head = GOOD.split_once("Content-Length").unwrap().0.to_owned();
    let head = head + "Transfer-Encoding: chunked\r\n\r\n";
    for (chunks, expected) in [
        ("a\r\n0123456789\r\n0\r\n\r\n", None),
        (
            "9\r\n012345678\r\n0\r\n\r\n",
            Some(RemoteErrorKind::Unavailable),
        ),
        (
            "b\r\n0123456789+\r\n0\r\n\r\n",
            Some(RemoteErrorKind::Protocol),
        ),
        (
            "a\r\n0123456789\r\n1\r\n+\r\n0\r\n\r\n",
            Some(RemoteErrorKind::Protocol),
        ),
    ] {
        let wire = Wire::start(vec![vec![Step::send(head.clone() + chunks)]]).await;
        let read = connect(&wire).await.read(&guard(), TEN).await.unwrap();
        let (bytes, end) = drain(read).await;
        assert_eq!(end, expected, "{chunks:?}");
        assert!(b"0123456789".starts_with(&bytes), "{chunks:?}: {bytes:?}");
        assert!(end.is_some() || bytes.len() == 10, "{chunks:?}: {bytes:?}");
    }
}

#[tokio::test]
async fn silence_before_the_head_is_a_timeout() {
    for steps in [
        vec![Step::Stall],
        vec![Step::send("HTTP/1.1 206 Partial"), Step::Stall],
    ] {
        let wire = Wire::start(vec![steps]).await;
        let settings = S3Settings {
            first_byte_timeout: Duration::from_millis(200),
            ..wire.access().settings()
        };
        let remote = S3Remote::connect(settings).await.unwrap();
        let error = remote.read(&guard(), TEN).await.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Timeout);
    }
}

/// The head of an error has come, its body does not: the status is not waited out for ever.
#[tokio::test]
async fn an_error_that_never_ends_is_bounded() {
    let head = "HTTP/1.1 403 Forbidden\r\nContent-Length: 1000000000\r\n\r\n";
    let wire = Wire::start(vec![vec![Step::send(head), Step::Stall]]).await;
    let settings = S3Settings {
        first_byte_timeout: Duration::from_millis(200),
        ..wire.access().settings()
    };
    let remote = S3Remote::connect(settings).await.unwrap();
    let error = remote.read(&guard(), TEN).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout);

    // Megabytes of it are not read, and the status still says what it says.
    let steps = vec![
        Step::send(head),
        Step::send("x".repeat(1 << 20)),
        Step::Stall,
    ];
    assert_eq!(kind_of(steps).await, RemoteErrorKind::Forbidden);
}

#[tokio::test]
async fn a_server_that_is_away_is_unavailable() {
    let access = Wire::start(Vec::new()).await.access();
    // The listener is gone with the server, or goes with its runtime's next turn.
    tokio::task::yield_now().await;
    let remote = S3Remote::connect(access.settings()).await.unwrap();
    let error = remote.read(&guard(), TEN).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unavailable);
    assert!(error.source().is_some(), "the log wants to know why");
    for steps in [vec![], vec![Step::Reset]] {
        assert_eq!(kind_of(steps).await, RemoteErrorKind::Unavailable);
    }
}

#[tokio::test]
async fn what_is_not_http_is_a_protocol_error() {
    let many = "X-Field: x\r\n".repeat(600);
    for (head, says) in [
        ("SSH-2.0-OpenSSH_9.2\r\n".to_owned(), "not HTTP"),
        (
            GOOD.replacen("ETag", &format!("{many}ETag"), 1),
            "user metadata",
        ),
    ] {
        let error = read(&guard(), vec![Step::send(head)]).await;
        let error = error.expect_err("a refusal");
        assert_eq!(error.kind, RemoteErrorKind::Protocol);
        assert!(error.detail.contains(says), "{error}");
    }
}

#[tokio::test]
async fn classifies_by_status_and_code() {
    use RemoteErrorKind as Kind;
    let throttled = |seconds| Kind::Throttled {
        retry_after: Some(Duration::from_secs(seconds)),
    };
    for (status, fields, code, kind) in [
        (
            "412 Precondition Failed",
            "",
            "PreconditionFailed",
            Kind::Mismatch,
        ),
        ("404 Not Found", "", "NoSuchKey", Kind::Absent),
        ("404 Not Found", "", "NoSuchBucket", Kind::Misconfigured),
        ("403 Forbidden", "", "AccessDenied", Kind::Forbidden),
        ("403 Forbidden", "", "InvalidObjectState", Kind::Archived),
        (
            "403 Forbidden",
            "",
            "SignatureDoesNotMatch",
            Kind::Misconfigured,
        ),
        (
            "403 Forbidden",
            "",
            "InvalidAccessKeyId",
            Kind::Misconfigured,
        ),
        (
            "403 Forbidden",
            "",
            "RequestTimeTooSkewed",
            Kind::Misconfigured,
        ),
        ("400 Bad Request", "", "ExpiredToken", Kind::Misconfigured),
        (
            "400 Bad Request",
            "",
            "AuthorizationHeaderMalformed",
            Kind::Misconfigured,
        ),
        ("400 Bad Request", "", "RequestTimeout", Kind::Timeout),
        (
            "301 Moved Permanently",
            "x-amz-bucket-region: eu-west-1\r\n",
            "PermanentRedirect",
            Kind::Misconfigured,
        ),
        (
            "503 Slow Down",
            "Retry-After: 7\r\n",
            "SlowDown",
            throttled(7),
        ),
        (
            "503 Service Unavailable",
            "",
            "ServiceUnavailable",
            Kind::Throttled { retry_after: None },
        ),
        (
            "429 Too Many Requests",
            "Retry-After: 1\r\n",
            "TooManyRequests",
            throttled(1),
        ),
        (
            "500 Internal Server Error",
            "",
            "InternalError",
            Kind::Unavailable,
        ),
        ("502 Bad Gateway", "", "", Kind::Unavailable),
        ("504 Gateway Timeout", "", "", Kind::Unavailable),
        (
            "416 Range Not Satisfiable",
            "Content-Range: bytes */7\r\n",
            "InvalidRange",
            Kind::Unsatisfiable { size: Some(7) },
        ),
        (
            "416 Range Not Satisfiable",
            "",
            "InvalidRange",
            Kind::Unsatisfiable { size: None },
        ),
        ("304 Not Modified", "", "", Kind::Protocol),
        ("418 I'm a teapot", "", "", Kind::Protocol),
    ] {
        assert_eq!(
            kind_of(s3_error(status, fields, code)).await,
            kind,
            "{status} {code}"
        );
    }
}

#[tokio::test]
async fn classifies_without_a_body() {
    use RemoteErrorKind as Kind;
    for (status, kind) in [
        ("412 Precondition Failed", Kind::Mismatch),
        ("403 Forbidden", Kind::Forbidden),
        (
            "503 Service Unavailable",
            Kind::Throttled { retry_after: None },
        ),
        // The default page of an ingress whose S3 is away must not read as "deleted".
        ("404 Not Found", Kind::Protocol),
    ] {
        assert_eq!(kind_of(response(status, "", "")).await, kind, "{status}");
    }
    for (status, kind) in [
        ("404 Not Found", Kind::Absent),
        ("412 Precondition Failed", Kind::Mismatch),
        ("403 Forbidden", Kind::Forbidden),
        ("400 Bad Request", Kind::Misconfigured),
    ] {
        let head = format!("HTTP/1.1 {status}\r\n\r\n");
        let wire = Wire::start(vec![vec![Step::send(head)]]).await;
        let pin = &guard().validator;
        let error = connect(&wire).await.stat("key", Some(pin)).await;
        assert_eq!(error.unwrap_err().kind, kind, "HEAD {status}");
    }
}

#[tokio::test]
async fn a_412_to_no_condition_is_nonsense() {
    let refused = || response("412 Precondition Failed", "", "");
    let wire = Wire::start(vec![refused(), refused(), refused(), refused()]).await;
    let remote = connect(&wire).await;
    let stat = remote.stat("key", None).await.unwrap_err();
    assert_eq!(stat.kind, RemoteErrorKind::Protocol, "HEAD");
    let other = &guard().validator;
    for (want, unless) in [
        (Some(RangeSpec::From(0)), None),
        (None, None),
        (Some(RangeSpec::From(0)), Some(other)),
    ] {
        let read = remote.read_current("key", want, unless).await;
        let kind = read.map(|_| ()).unwrap_err().kind;
        assert_eq!(kind, RemoteErrorKind::Protocol, "{want:?} {unless:?}");
    }
}

#[tokio::test]
async fn a_416_names_the_size_in_its_body() {
    let body = "<Error><Code>InvalidRange</Code><ActualObjectSize>42</ActualObjectSize></Error>";
    let kind = kind_of(response("416 Range Not Satisfiable", "", body)).await;
    assert_eq!(kind, RemoteErrorKind::Unsatisfiable { size: Some(42) });
}

#[tokio::test]
async fn a_redirect_says_which_region_to_set() {
    let fields = "x-amz-bucket-region: eu-west-1\r\nLocation: http://127.0.0.1:1/\r\n";
    let error = read(&guard(), s3_error("301 Moved", fields, "PermanentRedirect")).await;
    assert!(error.unwrap_err().detail.contains("eu-west-1"));
}

#[tokio::test]
async fn a_304_answers_only_the_validator_that_was_sent() {
    let sent = guard().validator;
    let date = "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n";
    for (fields, is_answer) in [
        ("", true),
        ("ETag: \"a\"\r\n", true),
        (date, true),
        ("ETag: \"b\"\r\n", false),
        ("ETag: W/\"a\"\r\n", false),
    ] {
        let head = format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n");
        let wire = Wire::start(vec![vec![Step::send(head)]]).await;
        match connect(&wire)
            .await
            .read_current("key", Some(TEN), Some(&sent))
            .await
        {
            Ok(Current::NotModified { last_modified }) => {
                assert!(is_answer, "{fields:?}");
                assert_eq!(last_modified.is_some(), fields == date);
            }
            Ok(Current::Read(read)) => panic!("{fields:?}: {read:?}"),
            Err(error) => {
                assert!(!is_answer, "{fields:?}: {error:?}");
                assert_eq!(error.kind, RemoteErrorKind::Protocol);
            }
        }
        assert!(wire.requests()[0].contains("\r\nif-none-match: \"a\"\r\n"));
    }
}

#[tokio::test]
async fn a_version_that_is_gone_does_not_hide_the_object() {
    for (status, code) in [
        ("404 Not Found", "NoSuchVersion"),
        ("400 Bad Request", "InvalidArgument"),
        ("405 Method Not Allowed", "MethodNotAllowed"),
    ] {
        let wire = Wire::start(vec![s3_error(status, "", code), vec![Step::send(GOOD)]]).await;
        let read = connect(&wire).await.read(&versioned(), TEN).await.unwrap();
        assert_eq!(collect(read).await.unwrap(), b"0123456789");
        let requests = wire.requests();
        assert!(requests[0].contains("versionid=v1"), "{}", requests[0]);
        assert!(!requests[1].contains("versionid"), "{}", requests[1]);
        assert!(
            requests
                .iter()
                .all(|request| request.contains("\r\nif-match: \"a\"\r\n"))
        );
    }
}

#[tokio::test]
async fn versions_that_are_denied_are_not_asked_for_again() {
    let good = || vec![Step::send(GOOD)];
    let denied = s3_error("403 Forbidden", "", "AccessDenied");
    let wire = Wire::start(vec![denied, good(), good()]).await;
    let remote = connect(&wire).await;
    for _ in 0..2 {
        collect(remote.read(&versioned(), TEN).await.unwrap())
            .await
            .unwrap();
    }
    let asked = |request: &String| request.contains("versionid");
    assert_eq!(
        wire.requests().iter().map(asked).collect::<Vec<_>>(),
        [true, false, false]
    );
}

#[tokio::test]
async fn the_null_version_is_no_version() {
    let null = GOOD.replace("ETag", "x-amz-version-id: null\r\nETag");
    let read_null = read(&guard(), vec![Step::send(null)]).await.unwrap();
    assert_eq!(read_null.representation.version_id, None);
    let named = GOOD.replace("ETag", "x-amz-version-id: v7\r\nETag");
    let read_named = read(&guard(), vec![Step::send(named)]).await.unwrap();
    assert_eq!(read_named.representation.version_id.as_deref(), Some("v7"));
    let wire = Wire::start(vec![vec![Step::send(GOOD)]]).await;
    let null = Guard {
        version_id: Some("null".into()),
        ..guard()
    };
    connect(&wire).await.read(&null, TEN).await.unwrap();
    assert!(!wire.requests()[0].contains("versionid"));
}

#[tokio::test]
async fn metadata_is_text_and_bounded() {
    let mut fields = b"Content-Type: text/plain\r\nContent-Language: \xff\xfe\r\n\
        Content-Disposition: attachment; filename=\xc3\xa9\r\n\
        Last-Modified: yesterday\r\nExpires: 0\r\nX-Other: dropped\r\n"
        .to_vec();
    for index in 0..40 {
        let value = "v".repeat(500);
        fields.extend_from_slice(format!("x-amz-meta-{index:03}: {value}\r\n").as_bytes());
    }
    let (line, rest) = GOOD.split_once("\r\n").unwrap();
    let answer = [line.as_bytes(), b"\r\n", &fields, rest.as_bytes()].concat();
    let read = read(&guard(), vec![Step::Send(answer)]).await.unwrap();
    let (meta, plain): (Vec<_>, Vec<_>) = read
        .representation
        .headers
        .iter()
        .partition(|(name, _)| name.starts_with("x-amz-meta-"));
    let plain: Vec<_> = plain
        .iter()
        .map(|(name, value)| (&**name, &**value))
        .collect();
    assert_eq!(plain, [("content-type", "text/plain"), ("expires", "0")]);
    let size: usize = meta
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    assert!(
        (7 * 1024 + 512..=8 * 1024).contains(&size),
        "{size} bytes of user metadata"
    );
    assert_eq!(read.representation.last_modified, None);
}

/// Neither what a client may see nor what is logged names a credential; the first names no place
/// either.
#[tokio::test]
async fn errors_leak_nothing() {
    for (status, code) in [
        ("403 Forbidden", "InvalidAccessKeyId"),
        ("403 Forbidden", "AccessDenied"),
        ("404 Not Found", "NoSuchBucket"),
        ("500 Internal Server Error", "InternalError"),
    ] {
        let wire = Wire::start(vec![s3_error(status, "", code)]).await;
        let error = connect(&wire).await.read(&guard(), TEN).await.unwrap_err();
        let logged = format!("{error} {error:?} {}", error.source().unwrap());
        for secret in ["AKIDSCRIPTEDTEST", "very-secret-key", "Signature="] {
            assert!(!logged.contains(secret), "{secret} in {logged}");
        }
        assert!(logged.contains(code), "the log names S3's code: {logged}");
        for place in ["secret-bucket", "127.0.0.1"] {
            assert!(!error.detail.contains(place), "{place} in {}", error.detail);
        }
    }
}

/// A server whose accept queue is full drops what arrives: the handshake never completes.
#[tokio::test]
async fn a_connection_that_does_not_come_about_is_a_timeout() {
    use socket2::{Domain, Socket, Type};

    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    listener.bind(&loopback.into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let queued = std::net::TcpStream::connect(address).unwrap();

    let wire = Wire::start(Vec::new()).await;
    let settings = S3Settings {
        endpoint: Some(format!("http://{address}")),
        connect_timeout: Duration::from_millis(200),
        first_byte_timeout: Duration::from_mins(1),
        ..wire.access().settings()
    };
    let remote = S3Remote::connect(settings).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(30), remote.read(&guard(), TEN)).await;
    let error = read.expect("connect_timeout is shorter").unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout);
    drop(queued);
}

/// Credentials are looked for when the first request needs them, in the environment first; the
/// environment is the process's, so a child has it.
#[test]
fn takes_credentials_from_the_standard_chain() {
    let child = |credentials: &[(&str, &str)]| {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_with_an_environment_of_its_own",
                "--ignored",
            ])
            .env_clear()
            .env(
                CHILD,
                if credentials.is_empty() {
                    "none"
                } else {
                    "some"
                },
            )
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .envs(credentials.iter().copied())
            .output()
            .unwrap();
        let (out, err) = (status.stdout, status.stderr);
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&out),
            String::from_utf8_lossy(&err)
        );
        assert!(
            status.status.success() && said.contains("1 passed"),
            "{said}"
        );
    };
    child(&[]);
    child(&[
        ("AWS_ACCESS_KEY_ID", "FROMENVIRONMENT"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
    ]);
}

/// Tells the child which of its two halves to run.
const CHILD: &str = "PINRANGE_TEST_CREDENTIALS";

#[tokio::test]
#[ignore = "run by takes_credentials_from_the_standard_chain"]
async fn child_with_an_environment_of_its_own() {
    let wire = Wire::start(vec![vec![Step::send(GOOD)]]).await;
    let settings = S3Settings {
        endpoint: Some(wire.access().endpoint),
        path_style: true,
        ..S3Settings::new("bucket")
    };
    let remote = S3Remote::connect(settings)
        .await
        .expect("missing credentials are no failure");
    let result = remote.read(&guard(), TEN).await;
    match std::env::var(CHILD).as_deref() {
        Ok("none") => {
            let error = result.unwrap_err();
            assert_eq!(error.kind, RemoteErrorKind::Misconfigured);
            assert!(error.detail.contains("AWS_ACCESS_KEY_ID"), "{error}");
            assert!(wire.requests().is_empty(), "nothing is sent unsigned");
        }
        Ok("some") => {
            result.unwrap();
            let request = &wire.requests()[0];
            assert!(request.contains("credential=fromenvironment/"), "{request}");
            assert!(request.contains("/us-east-1/s3/"), "{request}");
        }
        other => panic!("not run by its parent: {other:?}"),
    }
}

/// The checksums that a driver takes from a HEAD with these fields.
async fn checksums(fields: &str) -> Result<Vec<String>, RemoteError> {
    let head = format!("HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 9\r\n{fields}\r\n");
    let wire = Wire::start(vec![vec![Step::send(head)]]).await;
    let told = connect(&wire).await.checksums(&guard()).await;
    let requests = wire.requests();
    assert_eq!(requests.len(), 1);
    let request = &requests[0];
    for part in ["head /", "if-match: \"a\"", "x-amz-checksum-mode: enabled"] {
        assert!(request.contains(part), "no {part} in {request}");
    }
    told.map(|told| told.iter().map(ToString::to_string).collect())
}

#[tokio::test]
async fn checksums_of_the_full_object_are_told_from_others() {
    let crc64 = "x-amz-checksum-crc64nvme: rosUhgp5mIg=\r\n";
    let crc32c = "x-amz-checksum-crc32c: 4waSgw==\r\n";
    let full = "x-amz-checksum-type: FULL_OBJECT\r\n";
    let told = async |fields: String| checksums(&fields).await.expect("a good answer");
    assert_eq!(
        told(format!("{crc64}{full}")).await,
        ["CRC64NVME:rosUhgp5mIg="]
    );
    assert_eq!(
        told(format!("{crc32c}{crc64}")).await,
        ["CRC64NVME:rosUhgp5mIg=", "CRC32C:4waSgw=="],
        "without a type, in one piece"
    );
    let none: [&str; 0] = [];
    assert_eq!(told(String::new()).await, none);
    for fields in [
        "x-amz-checksum-crc32c: 4waSgw==-2\r\n".to_owned(),
        format!("{crc32c}x-amz-checksum-type: COMPOSITE\r\n"),
        format!("x-amz-checksum-crc32c: nonsense\r\n{full}"),
        format!("x-amz-checksum-crc32: rosUhgp5mIg=\r\n{full}"),
    ] {
        assert_eq!(told(fields.clone()).await, none, "{fields}");
    }

    let parts = format!("HTTP/1.1 200 OK\r\nETag: \"a-2\"\r\nContent-Length: 9\r\n{crc32c}\r\n");
    let wire = Wire::start(vec![vec![Step::send(parts)]]).await;
    let of_parts = Guard {
        validator: Validator::from_etag_field("\"a-2\"").expect("a strong tag"),
        ..guard()
    };
    let told = connect(&wire).await.checksums(&of_parts).await;
    assert!(
        told.expect("a good answer").is_empty(),
        "of an unknown type, in parts"
    );

    let other = "HTTP/1.1 200 OK\r\nETag: \"b\"\r\nContent-Length: 9\r\n\r\n";
    let wire = Wire::start(vec![vec![Step::send(other)]]).await;
    let error = connect(&wire).await.checksums(&guard()).await;
    assert_eq!(
        error.expect_err("another revision").kind,
        RemoteErrorKind::Protocol
    );
}

#[tokio::test]
async fn checksums_of_a_version_that_is_gone_are_asked_without_it() {
    let good = "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 9\r\n\
                x-amz-checksum-crc32c: 4waSgw==\r\n\r\n";
    let gone = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    let wire = Wire::start(vec![vec![Step::send(gone)], vec![Step::send(good)]]).await;
    let told = connect(&wire).await.checksums(&versioned()).await;
    assert_eq!(told.expect("a good answer").len(), 1);
    let requests = wire.requests();
    assert_eq!(requests.len(), 2, "{requests:#?}");
    assert!(requests[0].contains("versionid=v1"), "{requests:#?}");
    assert!(!requests[1].contains("versionid"), "{requests:#?}");
}
