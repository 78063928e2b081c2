//! An S3 that gives one `ETag` to two objects, which their lengths betray.
//!
//! Whose bytes they are cannot be told, and a client that downloads in pieces is not to get some of each: what is held stays
//! and answers where nobody has to be asked, and whoever has to ask hears that S3 makes no sense.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use pinrange::strict_s3::PutOptions;

use super::world::{Answer, BLOCK, Setup, World, bytes};

/// A world whose `/m/object` is `before`, asked for as `fields` say, and then `after`, under the same tag.
async fn replaced(fields: &[(&str, &str)], before: &Bytes, after: &Bytes) -> (World, String) {
    let setup = Setup {
        fresh_for: Duration::ZERO,
        ..Setup::default()
    };
    let world = World::with(setup).await;
    let tag = world.put("object", before);
    let answer = world.get("/m/object", fields).await;
    assert!(matches!(answer.status, 200 | 206), "{answer:?}");
    put_as(&world, &tag, after);
    (world, tag)
}

fn put_as(world: &World, tag: &str, bytes: &Bytes) {
    let options = PutOptions {
        etag: Some(tag.to_owned()),
        ..PutOptions::default()
    };
    let put = world.s3.put("bucket", "object", bytes.clone(), options);
    assert_eq!(put.unwrap().etag, tag);
}

fn is_refusal(answer: &Answer, method: &Method, what: &str) {
    assert_eq!(answer.status, 502, "{what}: {answer:?}");
    assert!(!answer.cut, "{what}");
    assert_eq!(
        answer.header("content-type"),
        "application/problem+json",
        "{what}"
    );
    if *method == Method::GET {
        let problem: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(problem["status"], 502, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_names_two_objects_is_answered_with_neither() {
    // From the first block, from behind the end of the shorter one, and all of it.
    let near = format!("bytes={}-{}", BLOCK, BLOCK + 9);
    let far = format!("bytes={}-{}", 3 * BLOCK, 3 * BLOCK + 9);
    let cases: &[(Method, &[(&str, &str)])] = &[
        (Method::GET, &[("range", &far)]),
        (Method::GET, &[("range", &near)]),
        (Method::GET, &[("range", "bytes=-9")]),
        (Method::GET, &[("range", "bytes=0-9,-9")]),
        (Method::GET, &[]),
        (Method::HEAD, &[]),
        (Method::GET, &[("if-match", "*")]),
        (Method::GET, &[("if-none-match", "TAG")]),
        (
            Method::GET,
            &[
                ("if-match", "TAG"),
                ("cache-control", "no-cache"),
                ("range", "bytes=0-9"),
            ],
        ),
        (
            Method::HEAD,
            &[("if-match", "TAG"), ("cache-control", "no-cache")],
        ),
    ];
    for (first, len, other) in [
        ("bytes=0-9", 4, 2),
        ("bytes=0-9", 2, 4),
        ("bytes=0-", 4, 2),
        ("bytes=0-", 2, 4),
        ("bytes=0-", 2, 0),
    ] {
        let (before, after) = (bytes(1, len * BLOCK), bytes(2, other * BLOCK));
        for (method, fields) in cases {
            // Anew for each: what the one learnt is not to help the next.
            let (world, tag) = replaced(&[("range", first)], &before, &after).await;
            let fields: Vec<_> = fields
                .iter()
                .map(|(name, value)| (*name, if *value == "TAG" { &tag } else { *value }))
                .collect();
            let what = format!("{first} of {len}, then {other}: {method} {fields:?}");
            for _ in 0..2 {
                let answer = world.ask(method.clone(), "/m/object", &fields).await;
                is_refusal(&answer, method, &what);
            }

            // What is held answers for itself, as before (P5).
            let gets = world.s3.stats().gets;
            let pinned = [("if-match", tag.as_str()), ("range", "bytes=0-9")];
            let answer = world.get("/m/object", &pinned).await;
            assert_eq!(
                (answer.status, &answer.body[..]),
                (206, &before[..10]),
                "{what}"
            );
            assert_eq!(world.s3.stats().gets, gets, "{what}");
            // What is not held of it can be had of nobody.
            if first == "bytes=0-9" && len == 4 {
                let pinned = [("if-match", tag.as_str()), ("range", far.as_str())];
                let answer = world.get("/m/object", &pinned).await;
                is_refusal(&answer, &Method::GET, &what);
            }

            // Until somebody says which it is to be.
            assert_eq!(world.purge("/m/object").await, 200);
            let answer = world.get("/m/object", &[]).await;
            assert!(answer.status == 200 && answer.body == after, "{what}");
        }
    }
}

/// S3 takes it back: there is no trace of the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_names_the_first_object_again_is_answered_again() {
    let (before, after) = (bytes(1, 4 * BLOCK), bytes(2, 2 * BLOCK));
    let (world, tag) = replaced(&[("range", "bytes=0-9")], &before, &after).await;
    assert_eq!(world.get("/m/object", &[]).await.status, 502);
    put_as(&world, &tag, &before);
    let answer = world.get("/m/object", &[]).await;
    assert!(answer.status == 200 && answer.body == before);
}

/// The other object comes after a label has told of the first, of which nothing is held: what is held then is of the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_label_of_one_object_does_not_speak_for_another() {
    for (len, other) in [(4, 2), (2, 4)] {
        let (before, after) = (bytes(1, len * BLOCK), bytes(2, other * BLOCK));
        let setup = Setup {
            fresh_for: Duration::from_hours(1),
            ..Setup::default()
        };
        let world = World::with(setup).await;
        let tag = world.put("object", &before);
        let answer = world.ask(Method::HEAD, "/m/object", &[]).await;
        assert_eq!(answer.header("content-length"), before.len().to_string());
        put_as(&world, &tag, &after);
        let pinned = [("if-match", tag.as_str()), ("range", "bytes=0-9")];
        let answer = world.get("/m/object", &pinned).await;
        assert_eq!((answer.status, &answer.body[..]), (206, &after[..10]));

        for method in [Method::GET, Method::HEAD] {
            let answer = world.ask(method.clone(), "/m/object", &[]).await;
            is_refusal(&answer, &method, &format!("{len}, then {other}"));
        }
    }
}
