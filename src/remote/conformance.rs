//! What every [`Remote`] must do, as one suite.
//!
//! [`run`] goes through the cases of this module in order; each works on keys of its own, says what
//! it expects in its panic message, and leaves its objects behind. A driver's test gives it a
//! [`Fixture`] over an empty bucket:
//!
//! ```ignore
//! #[tokio::test]
//! async fn conforms() {
//!     conformance::run(&MyFixture::start().await).await;
//! }
//! ```
//!
//! It is public, as such suites are elsewhere, so that a driver outside this crate can prove
//! itself.

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, join_all};
use futures::{StreamExt as _, TryStreamExt as _};

use super::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead};
use crate::object::{Checksum, Representation, Validator};
use crate::semantics::RangeSpec;

/// A bucket that the suite may fill.
///
/// Equal bytes put twice must get equal validators, as they do in S3 for objects put in one piece.
pub trait Fixture: Send + Sync {
    /// The driver under test.
    fn remote(&self) -> &dyn Remote;

    /// Creates or overwrites an object. `headers` are among those of [`Representation::headers`].
    /// Panics on failure; done means that the next read sees it.
    fn put<'a>(
        &'a self,
        key: &'a str,
        bytes: Bytes,
        headers: &'a [(&'a str, &'a str)],
    ) -> BoxFuture<'a, ()>;

    /// Deletes the current object. Panics on failure.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, ()>;

    /// Whether the bucket keeps versions.
    fn versioned(&self) -> bool {
        false
    }
}

/// Runs every case.
///
/// # Panics
/// When the remote does not do what [`Remote`] promises.
pub async fn run(fixture: &dyn Fixture) {
    reads_what_was_put(fixture).await;
    clamps_ranges(fixture).await;
    refuses_ranges_beyond_the_end(fixture).await;
    answers_for_empty_objects(fixture).await;
    says_absent(fixture).await;
    labels_itself(fixture).await;
    stat_honours_the_pin(fixture).await;
    guards_against_overwrites(fixture).await;
    keeps_the_validator_of_equal_bytes(fixture).await;
    notices_a_changed_size(fixture).await;
    passes_metadata_on(fixture).await;
    takes_any_key(fixture).await;
    delivers_large_bodies(fixture).await;
    serves_many_at_once(fixture).await;
    survives_abandoned_bodies(fixture).await;
    reads_by_version(fixture).await;
    outlives_a_vanished_version(fixture).await;
    tells_checksums_of_the_whole(fixture).await;
}

async fn reads_what_was_put(fixture: &dyn Fixture) {
    let (key, bytes) = ("reads-what-was-put", pattern(1, 1000));
    let guard = put(fixture, key, &bytes).await;
    for (want, expected) in [
        (RangeSpec::Closed { first: 0, last: 0 }, 0..1),
        (
            RangeSpec::Closed {
                first: 999,
                last: 999,
            },
            999..1000,
        ),
        (
            RangeSpec::Closed {
                first: 17,
                last: 499,
            },
            17..500,
        ),
        (
            RangeSpec::Closed {
                first: 0,
                last: 999,
            },
            0..1000,
        ),
        (RangeSpec::From(0), 0..1000),
        (RangeSpec::From(999), 999..1000),
        (RangeSpec::Suffix(1), 999..1000),
        (RangeSpec::Suffix(300), 700..1000),
    ] {
        let read = fixture.remote().read(&guard, want).await;
        let read = read.unwrap_or_else(|error| panic!("guarded {want:?}: {error:?}"));
        assert_eq!(
            read.representation.validator, guard.validator,
            "guarded {want:?}: validator"
        );
        assert_eq!(
            read.representation.size, 1000,
            "guarded {want:?}: complete length"
        );
        expect_body(read, &bytes, expected.clone(), &format!("guarded {want:?}")).await;

        let read = current(fixture, key, Some(want)).await;
        assert_eq!(
            read.representation.validator, guard.validator,
            "unguarded {want:?}: validator"
        );
        expect_body(read, &bytes, expected, &format!("unguarded {want:?}")).await;
    }
}

async fn clamps_ranges(fixture: &dyn Fixture) {
    let (key, bytes) = ("clamps-ranges", pattern(2, 100));
    let guard = put(fixture, key, &bytes).await;
    for (want, expected) in [
        (
            RangeSpec::Closed {
                first: 90,
                last: 100,
            },
            90..100,
        ),
        (
            RangeSpec::Closed {
                first: 99,
                last: u64::MAX,
            },
            99..100,
        ),
        (
            RangeSpec::Closed {
                first: 0,
                last: 1 << 40,
            },
            0..100,
        ),
        (RangeSpec::Suffix(100), 0..100),
        (RangeSpec::Suffix(101), 0..100),
        (RangeSpec::Suffix(u64::MAX), 0..100),
    ] {
        let read = fixture.remote().read(&guard, want).await;
        let read = read.unwrap_or_else(|error| panic!("guarded {want:?}: {error:?}"));
        expect_body(read, &bytes, expected.clone(), &format!("guarded {want:?}")).await;
        let read = current(fixture, key, Some(want)).await;
        expect_body(read, &bytes, expected, &format!("unguarded {want:?}")).await;
    }
}

async fn refuses_ranges_beyond_the_end(fixture: &dyn Fixture) {
    let key = "refuses-ranges-beyond-the-end";
    let guard = put(fixture, key, &pattern(3, 100)).await;
    let other = Guard {
        validator: other_validator(),
        version_id: None,
        ..guard.clone()
    };
    for want in [
        RangeSpec::Closed {
            first: 100,
            last: 100,
        },
        RangeSpec::Closed {
            first: 1 << 40,
            last: u64::MAX,
        },
        RangeSpec::From(100),
        RangeSpec::From(u64::MAX),
        RangeSpec::Suffix(0),
    ] {
        let what = format!("{want:?} of 100 bytes");
        expect_unsatisfiable(fixture.remote().read(&guard, want).await, 100, &what);
        expect_unsatisfiable(
            fixture.remote().read_current(key, Some(want), None).await,
            100,
            &what,
        );
    }
    // RFC 9110 §13.2.2: preconditions come before the range.
    let wrong = fixture.remote().read(&other, RangeSpec::From(100)).await;
    expect_kind(
        wrong,
        &RemoteErrorKind::Mismatch,
        "a failed guard and a range beyond the end",
    );
}

async fn answers_for_empty_objects(fixture: &dyn Fixture) {
    let key = "answers-for-empty-objects";
    let guard = put(fixture, key, &Bytes::new()).await;
    assert_eq!(guard.size, Some(0), "size of an empty object");
    let read = current(fixture, key, None).await;
    assert_eq!(read.range, None, "range of an empty object");
    assert_eq!(
        read.representation.validator, guard.validator,
        "label of an empty object"
    );
    assert!(collect(read.body).await.expect("an empty body").is_empty());
    for want in [
        RangeSpec::Closed { first: 0, last: 0 },
        RangeSpec::From(0),
        RangeSpec::From(1),
        RangeSpec::Suffix(5),
    ] {
        let what = format!("{want:?} of an empty object");
        expect_unsatisfiable(fixture.remote().read(&guard, want).await, 0, &what);
        expect_unsatisfiable(
            fixture.remote().read_current(key, Some(want), None).await,
            0,
            &what,
        );
    }
}

async fn says_absent(fixture: &dyn Fixture) {
    let (remote, key, want) = (fixture.remote(), "says-absent", RangeSpec::From(0));
    let long = "k".repeat(1025);
    for key in [key, "", &long] {
        let guard = guard(key, &other_validator());
        expect_kind(
            remote.stat(key, None).await,
            &RemoteErrorKind::Absent,
            "stat",
        );
        let pinned = remote.stat(key, Some(&guard.validator)).await;
        expect_kind(pinned, &RemoteErrorKind::Absent, "stat with a pin");
        expect_kind(
            remote.read(&guard, want).await,
            &RemoteErrorKind::Absent,
            "read",
        );
        let read = remote.read_current(key, None, None).await;
        expect_kind(read, &RemoteErrorKind::Absent, "read_current");
        let read = remote
            .read_current(key, Some(want), Some(&guard.validator))
            .await;
        expect_kind(
            read,
            &RemoteErrorKind::Absent,
            "read_current with a validator",
        );
    }
    let guard = Guard {
        version_id: None,
        ..put(fixture, key, &pattern(4, 10)).await
    };
    fixture.delete(key).await;
    expect_kind(
        remote.stat(key, None).await,
        &RemoteErrorKind::Absent,
        "stat after delete",
    );
    expect_kind(
        remote.read(&guard, want).await,
        &RemoteErrorKind::Absent,
        "read after delete",
    );
}

async fn labels_itself(fixture: &dyn Fixture) {
    let (remote, key) = (fixture.remote(), "labels-itself");
    let first = put(fixture, key, &pattern(5, 100)).await;
    let unless = |validator| remote.read_current(key, Some(RangeSpec::From(0)), Some(validator));

    match unless(&first.validator).await.expect("a conditional read") {
        Current::NotModified { .. } => {}
        Current::Read(read) => panic!("unmodified, but got {read:?}"),
    }
    match remote
        .read_current(key, None, Some(&first.validator))
        .await
        .expect("a whole read")
    {
        Current::NotModified { .. } => {}
        Current::Read(read) => panic!("unmodified, but got {read:?}"),
    }

    let bytes = pattern(6, 120);
    let second = put(fixture, key, &bytes).await;
    assert_ne!(
        first.validator, second.validator,
        "other bytes, other validator"
    );
    let Current::Read(read) = unless(&first.validator).await.expect("a conditional read") else {
        panic!("the object was replaced and is said to be unmodified");
    };
    assert_eq!(
        read.representation.validator, second.validator,
        "the label is the new one"
    );
    expect_body(
        read,
        &bytes,
        0..120,
        "conditional read of a replaced object",
    )
    .await;

    let read = current(fixture, key, None).await;
    assert_eq!(
        read.representation.validator, second.validator,
        "the label of a whole read"
    );
    expect_body(read, &bytes, 0..120, "whole read").await;
}

async fn stat_honours_the_pin(fixture: &dyn Fixture) {
    let (remote, key) = (fixture.remote(), "stat-honours-the-pin");
    let guard = put(fixture, key, &pattern(7, 77)).await;
    let pinned = remote
        .stat(key, Some(&guard.validator))
        .await
        .expect("stat with the right pin");
    assert_eq!((pinned.validator, pinned.size), (guard.validator, 77));
    let wrong = remote.stat(key, Some(&other_validator())).await;
    expect_kind(wrong, &RemoteErrorKind::Mismatch, "stat with a wrong pin");
}

async fn guards_against_overwrites(fixture: &dyn Fixture) {
    let (remote, key) = (fixture.remote(), "guards-against-overwrites");
    let old = Guard {
        version_id: None,
        ..put(fixture, key, &pattern(8, 5000)).await
    };
    let bytes = pattern(9, 5000);
    let new = put(fixture, key, &bytes).await;
    for want in [
        RangeSpec::Closed {
            first: 10,
            last: 19,
        },
        RangeSpec::From(0),
        RangeSpec::Suffix(9),
    ] {
        let read = remote.read(&old, want).await;
        expect_kind(
            read,
            &RemoteErrorKind::Mismatch,
            &format!("overwritten, {want:?}"),
        );
    }
    let read = remote
        .read(&new, RangeSpec::From(0))
        .await
        .expect("the new revision");
    expect_body(read, &bytes, 0..5000, "the new revision").await;
}

async fn keeps_the_validator_of_equal_bytes(fixture: &dyn Fixture) {
    let (key, bytes) = ("keeps-the-validator-of-equal-bytes", pattern(10, 300));
    fixture
        .put(key, bytes.clone(), &[("content-type", "text/plain")])
        .await;
    let first = guard_of(fixture, key).await;
    fixture
        .put(key, bytes.clone(), &[("content-type", "text/html")])
        .await;
    let guard = Guard {
        version_id: None,
        ..first
    };
    let read = fixture.remote().read(&guard, RangeSpec::From(0)).await;
    let read = read.expect("the old validator reads equal bytes uploaded again");
    assert_eq!(
        header(&read.representation, "content-type"),
        Some("text/html"),
        "the new field"
    );
    expect_body(read, &bytes, 0..300, "equal bytes uploaded again").await;
}

async fn notices_a_changed_size(fixture: &dyn Fixture) {
    let guard = put(fixture, "notices-a-changed-size", &pattern(11, 100)).await;
    let wrong = Guard {
        size: Some(101),
        ..guard
    };
    let read = fixture
        .remote()
        .read(&wrong, RangeSpec::Closed { first: 0, last: 9 })
        .await;
    expect_kind(
        read,
        &RemoteErrorKind::Protocol,
        "another complete length under one validator",
    );
}

async fn passes_metadata_on(fixture: &dyn Fixture) {
    let fields = [
        ("cache-control", "max-age=60, public"),
        ("content-disposition", "attachment; filename=\"a b.bin\""),
        ("content-encoding", "zstd"),
        ("content-language", "de"),
        ("content-type", "application/x-git-packed-objects"),
        ("expires", "Thu, 01 Dec 2033 16:00:00 GMT"),
        ("x-amz-meta-commit", "0123abc"),
        ("x-amz-meta-made-by", "ci / nightly"),
    ];
    let (key, bytes) = ("passes-metadata-on", pattern(12, 50));
    fixture.put(key, bytes.clone(), &fields).await;
    let stat = fixture.remote().stat(key, None).await.expect("stat");
    let read = current(fixture, key, Some(RangeSpec::Closed { first: 0, last: 9 })).await;
    let guard = guard_for(key, &stat);
    let guarded = fixture
        .remote()
        .read(&guard, RangeSpec::Suffix(1))
        .await
        .expect("guarded read");
    for (op, representation) in [
        ("stat", &stat),
        ("read_current", &read.representation),
        ("read", &guarded.representation),
    ] {
        for (name, value) in fields {
            assert_eq!(header(representation, name), Some(value), "{op}: {name}");
        }
        assert!(
            representation.last_modified.is_some(),
            "{op}: last-modified"
        );
        assert_eq!(representation, &stat, "{op} and stat agree");
    }
}

async fn takes_any_key(fixture: &dyn Fixture) {
    let keys = [
        "keys/plain",
        "keys/with space",
        "keys/plus+plus",
        "keys/per%20cent%",
        "keys/ümläut/東京/🦀",
        "keys//double//slash",
        "keys/trailing/",
        "/keys/leading",
        "keys/a?versionId=b&c=d#e",
        "keys/quote\"'`<>\\^{|}",
        "keys/colon:semi;at@eq=,dollar$!*()~",
        "keys/dots/../up/./here",
    ];
    for (seed, key) in (20..).zip(keys) {
        let bytes = pattern(seed, 40);
        let guard = put(fixture, key, &bytes).await;
        let read = fixture.remote().read(&guard, RangeSpec::From(0)).await;
        let read = read.unwrap_or_else(|error| panic!("key {key:?}: {error:?}"));
        expect_body(read, &bytes, 0..40, &format!("key {key:?}")).await;
    }
    // Once more, when all are there: no two may be one object.
    for (seed, key) in (20..).zip(keys) {
        let read = current(fixture, key, None).await;
        expect_body(
            read,
            &pattern(seed, 40),
            0..40,
            &format!("key {key:?} among all"),
        )
        .await;
    }
}

async fn delivers_large_bodies(fixture: &dyn Fixture) {
    let len = 5 * 1024 * 1024 + 17;
    let (key, bytes) = ("delivers-large-bodies", pattern(40, len));
    let guard = put(fixture, key, &bytes).await;
    let read = current(fixture, key, None).await;
    expect_body(read, &bytes, 0..len, "a large whole").await;
    let want = RangeSpec::Closed {
        first: 1_000_003,
        last: 4_999_998,
    };
    let read = fixture
        .remote()
        .read(&guard, want)
        .await
        .expect("a large range");
    expect_body(read, &bytes, 1_000_003..4_999_999, "a large range").await;
}

async fn serves_many_at_once(fixture: &dyn Fixture) {
    const READS: usize = 64;
    const EACH: usize = 10_000;
    let (key, bytes) = ("serves-many-at-once", pattern(41, READS * EACH));
    let guard = put(fixture, key, &bytes).await;
    let (guard, bytes) = (&guard, &bytes);
    join_all((0..READS).map(|index| async move {
        let (first, end) = (index * EACH, (index + 1) * EACH);
        let want = RangeSpec::Closed {
            first: first as u64,
            last: end as u64 - 1,
        };
        let read = fixture
            .remote()
            .read(guard, want)
            .await
            .expect("one of many reads");
        expect_body(read, bytes, first..end, "one of many reads").await;
    }))
    .await;
}

async fn survives_abandoned_bodies(fixture: &dyn Fixture) {
    let len = 2 * 1024 * 1024;
    let (key, bytes) = ("survives-abandoned-bodies", pattern(42, len));
    let guard = put(fixture, key, &bytes).await;
    for _ in 0..3 {
        let mut read = fixture
            .remote()
            .read(&guard, RangeSpec::From(0))
            .await
            .expect("a read");
        read.body
            .next()
            .await
            .expect("a first frame")
            .expect("a first frame");
        drop(read);
        let want = RangeSpec::Closed { first: 5, last: 14 };
        let read = fixture
            .remote()
            .read(&guard, want)
            .await
            .expect("a read after a dropped one");
        expect_body(read, &bytes, 5..15, "a read after a dropped one").await;
    }
}

async fn reads_by_version(fixture: &dyn Fixture) {
    let key = "reads-by-version";
    let bytes = pattern(43, 400);
    let old = put(fixture, key, &bytes).await;
    assert_eq!(
        old.version_id.is_some(),
        fixture.versioned(),
        "version id where there are versions"
    );
    if !fixture.versioned() {
        return;
    }
    let read = current(fixture, key, Some(RangeSpec::From(0))).await;
    assert_eq!(
        read.representation.version_id, old.version_id,
        "read and stat name one version"
    );
    drop(read);

    fixture.put(key, pattern(44, 500), &[]).await;
    let want = RangeSpec::Closed {
        first: 100,
        last: 299,
    };
    let read = fixture
        .remote()
        .read(&old, want)
        .await
        .expect("an overwritten version by its id");
    expect_body(read, &bytes, 100..300, "an overwritten version by its id").await;

    fixture.delete(key).await;
    let read = fixture
        .remote()
        .read(&old, want)
        .await
        .expect("a deleted object's version");
    expect_body(read, &bytes, 100..300, "a deleted object's version").await;

    let wrong = Guard {
        validator: other_validator(),
        ..old
    };
    let read = fixture.remote().read(&wrong, want).await;
    expect_kind(
        read,
        &RemoteErrorKind::Mismatch,
        "If-Match is sent with a version id",
    );
}

/// A version id that names nothing, because a lifecycle rule removed it or versions were never on,
/// must not hide an object that is at the guarded revision.
async fn outlives_a_vanished_version(fixture: &dyn Fixture) {
    let (key, bytes) = ("outlives-a-vanished-version", pattern(45, 60));
    let guard = put(fixture, key, &bytes).await;
    let gone = Guard {
        version_id: Some("3HL4kqtJvjVBH40Nrjfkd".into()),
        ..guard
    };
    let read = fixture.remote().read(&gone, RangeSpec::From(0)).await;
    expect_body(
        read.expect("the current revision"),
        &bytes,
        0..60,
        "a vanished version",
    )
    .await;

    let other = Guard {
        validator: other_validator(),
        ..gone
    };
    let read = fixture.remote().read(&other, RangeSpec::From(0)).await;
    expect_kind(
        read,
        &RemoteErrorKind::Mismatch,
        "a vanished version of another revision",
    );
    fixture.delete(key).await;
    let read = fixture.remote().read(&other, RangeSpec::From(0)).await;
    expect_kind(
        read,
        &RemoteErrorKind::Absent,
        "a vanished version of a deleted object",
    );
}

/// `len` bytes that differ between seeds and whose every 4-byte stretch tells its offset.
/// A remote may have none, but those it has are of all bytes of the guarded revision.
async fn tells_checksums_of_the_whole(fixture: &dyn Fixture) {
    let (remote, key) = (fixture.remote(), "tells-checksums-of-the-whole");
    let bytes = pattern(17, 100_000);
    let guard = put(fixture, key, &bytes).await;
    let checksums = remote.checksums(&guard).await;
    for checksum in checksums.unwrap_or_else(|error| panic!("checksums: {error:?}")) {
        assert_eq!(checksum, Checksum::of(checksum.algorithm(), &bytes));
    }
    let other = Guard {
        validator: other_validator(),
        version_id: None,
        ..guard.clone()
    };
    expect_kind(
        remote.checksums(&other).await,
        &RemoteErrorKind::Mismatch,
        "checksums with a wrong guard",
    );
    fixture.delete(key).await;
    let gone = Guard {
        version_id: None,
        ..guard
    };
    expect_kind(
        remote.checksums(&gone).await,
        &RemoteErrorKind::Absent,
        "checksums after delete",
    );
}

fn pattern(seed: u32, len: usize) -> Bytes {
    let words = (0u32..).map(|index| index.wrapping_mul(2_654_435_761).wrapping_add(seed));
    words.flat_map(u32::to_be_bytes).take(len).collect()
}

fn other_validator() -> Validator {
    Validator::from_etag_field("\"0000000000000000000000000000beef\"").expect("a strong tag")
}

fn guard(key: &str, validator: &Validator) -> Guard {
    Guard {
        key: key.into(),
        validator: validator.clone(),
        version_id: None,
        size: None,
    }
}

fn guard_for(key: &str, representation: &Representation) -> Guard {
    Guard {
        version_id: representation.version_id.clone(),
        size: Some(representation.size),
        ..guard(key, &representation.validator)
    }
}

async fn guard_of(fixture: &dyn Fixture, key: &str) -> Guard {
    let stat = fixture.remote().stat(key, None).await;
    guard_for(
        key,
        &stat.unwrap_or_else(|error| panic!("stat of {key:?}: {error:?}")),
    )
}

async fn put(fixture: &dyn Fixture, key: &str, bytes: &Bytes) -> Guard {
    fixture.put(key, bytes.clone(), &[]).await;
    let guard = guard_of(fixture, key).await;
    assert_eq!(
        guard.size,
        Some(bytes.len() as u64),
        "stat's size of {key:?}"
    );
    guard
}

async fn current(fixture: &dyn Fixture, key: &str, want: Option<RangeSpec>) -> RemoteRead {
    match fixture.remote().read_current(key, want, None).await {
        Ok(Current::Read(read)) => read,
        Ok(Current::NotModified { .. }) => panic!("{key:?} {want:?}: 304 to no condition"),
        Err(error) => panic!("{key:?} {want:?}: {error:?}"),
    }
}

async fn collect(
    body: futures::stream::BoxStream<'static, Result<Bytes, RemoteError>>,
) -> Result<Bytes, RemoteError> {
    let mut joined = BytesMut::new();
    let mut body = body;
    while let Some(frame) = body.try_next().await? {
        joined.extend_from_slice(&frame);
    }
    Ok(joined.freeze())
}

async fn expect_body(read: RemoteRead, object: &Bytes, range: std::ops::Range<usize>, what: &str) {
    let named = read.range.unwrap_or_else(|| panic!("{what}: no range"));
    assert_eq!(
        named.start()..named.end(),
        range.start as u64..range.end as u64,
        "{what}: range"
    );
    let body = collect(read.body)
        .await
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert_eq!(body.len(), range.len(), "{what}: length of the body");
    // Not assert_eq: a failure would print megabytes.
    assert!(body == object.slice(range), "{what}: wrong bytes");
}

fn expect_kind<T: std::fmt::Debug>(
    result: Result<T, RemoteError>,
    kind: &RemoteErrorKind,
    what: &str,
) {
    match result {
        Err(error) => assert_eq!(&error.kind, kind, "{what}: {error:?}"),
        Ok(answer) => panic!("{what}: expected {kind:?}, got {answer:?}"),
    }
}

/// Unsatisfiable; where the response named the complete length, it is `size`.
fn expect_unsatisfiable<T: std::fmt::Debug>(result: Result<T, RemoteError>, size: u64, what: &str) {
    match result {
        Err(RemoteError {
            kind: RemoteErrorKind::Unsatisfiable { size: named },
            ..
        }) => assert!(
            named.is_none_or(|named| named == size),
            "{what}: size {named:?}"
        ),
        Err(error) => panic!("{what}: {error:?}"),
        Ok(answer) => panic!("{what}: expected a refusal, got {answer:?}"),
    }
}

fn header<'a>(representation: &'a Representation, name: &str) -> Option<&'a str> {
    let mut fields = representation.headers.iter();
    fields.find_map(|(field, value)| (&**field == name).then_some(&**value))
}
