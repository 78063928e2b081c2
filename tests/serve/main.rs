//! The whole replica over real sockets, in front of an S3 that enforces conditions and counts.
//!
//! `docs/PROMISES.md` has the tests elsewhere, the code, and the changes that were seen to make these fail.
//!
//! | promise | test |
//! |---|---|
//! | P1 | `swap_between_any_two_requests`, `a_swap_during_a_wide_download_cuts_it` |
//! | P2 | `requests_of_a_cold_read`, `unguarded_reads_are_counted` |
//! | P3 | `a_reset_before_the_first_byte_is_no_206`, `the_head_waits_for_the_first_missing_stretch` |
//! | P4 | `an_outage_outranks_412_and_404` |
//! | P5 | `a_held_pin_needs_nobody` |
//! | P6 | `unpinned_answers_follow_the_remote`, `stale_if_error_is_marked` |
//! | P8 | `staggered_ranges_leave_the_remote_once` |
//! | P9 | `a_client_that_leaves_hurts_nobody` |
//! | P10 | `a_disk_without_room_fails_nothing`, `a_segment_that_reads_short_is_replaced_within_the_response` |
//! | P11 | `a_restart_keeps_what_was_written` |
//! | P12 | `requests_that_are_refused` |

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod again;
mod faults;
mod lengths;
mod rot;
mod semantics_doc;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http::Method;
use http_body_util::BodyExt;
use pinrange::disk::MinFree;
use pinrange::mount::ForbiddenAs;
use pinrange::strict_s3::{Effect, Fault, Mutation, Op, PutOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use world::{BLOCK, PART, Setup, World, bytes, slice};

fn replace(key: &str, with: &Bytes) -> Mutation {
    Mutation::Put {
        bucket: "bucket".to_owned(),
        key: key.to_owned(),
        bytes: with.clone(),
        options: PutOptions::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_cold_read() {
    let world = World::new().await;
    let small = bytes(1, PART);
    let tag = world.put("small", &small);

    let answer = world.get("/m/small", &[]).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert_eq!(answer.body, small);
    assert_eq!(answer.header("etag"), tag);
    let log = world.s3.take_log();
    assert_eq!(log.len(), 1, "an object of a part is one request: {log:#?}");

    let answer = world
        .get("/m/small", &[("if-match", &tag), ("range", "bytes=5-99")])
        .await;
    assert_eq!(
        (answer.status, answer.body.as_slice()),
        (206, &small[5..100])
    );
    assert_eq!(answer.header("cache-status"), "pinrange; hit; detail=disk");
    assert_eq!(world.s3.stats().requests, 0, "warm");

    let other = bytes(2, 3 * PART);
    let tag = world.put("other", &other);
    let range = format!("bytes={}-{}", PART / 2, PART / 2 + PART - 1);
    let answer = world
        .get("/m/other", &[("if-match", &tag), ("range", &range)])
        .await;
    assert_eq!(answer.status, 206);
    assert_eq!(
        answer.header("cache-status"),
        "pinrange; fwd=miss; fwd-status=206; stored",
        "nobody shared it"
    );
    assert_eq!(answer.body, slice(&other, PART / 2, PART / 2 + PART));
    let log = world.s3.take_log();
    assert_eq!(
        log.len(),
        1,
        "a pinned range of a part, misaligned to parts: {log:#?}"
    );
    assert!(log[0].guarded);
    assert_eq!(log[0].op, Op::Get, "no HEAD precedes it");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_before_the_first_byte() {
    let world = World::new().await;
    let big = bytes(3, 4 * PART);
    let tag = world.put("big", &big);
    for pinned in [false, true] {
        world.purge("/m/*").await;
        world.s3.clear_log();
        // Nothing after the first request gets a byte until we have seen the first one's.
        world.s3.on_request(Some(Box::new(|request| {
            if request.op == Op::Get && request.range.as_deref() != Some("bytes=0-2097151") {
                vec![Effect::StallAfter {
                    bytes: 0,
                    duration: None,
                }]
            } else {
                Vec::new()
            }
        })));
        let headers: &[(&str, &str)] = if pinned { &[("if-match", &tag)] } else { &[] };
        let (status, mut body) = world.begin("/m/big", headers).await;
        assert_eq!(status, 200);
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(first, slice(&big, 0, first.len() as u64));
        assert_eq!(
            world.s3.log()[0].range.as_deref(),
            Some("bytes=0-2097151"),
            "pinned: {pinned}"
        );
        world.s3.on_request(None);
        world.s3.release_stalls();
        let rest = body.collect().await.unwrap().to_bytes();
        assert_eq!(rest, slice(&big, first.len() as u64, 4 * PART));
        let seen = world.s3.stats();
        assert_eq!(seen.unguarded_gets, u64::from(!pinned));
        assert_eq!((seen.gets, seen.heads), (4, 0), "one a part");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unguarded_reads_are_counted() {
    let world = World::new().await;
    let object = bytes(4, 8 * PART + 17);
    let tag = world.put("object", &object);
    let unpinned = join_all((0..8).map(|_| world.get("/m/object", &[]))).await;
    for answer in &unpinned {
        assert_eq!((answer.status, answer.header("etag")), (200, tag.as_str()));
        assert_eq!(answer.body, object);
    }
    let stats = world.s3.stats();
    assert_eq!(
        stats.unguarded_gets, 1,
        "one label for all who came together"
    );
    assert_eq!(stats.body_bytes_sent, object.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn staggered_ranges_leave_the_remote_once() {
    let world = Arc::new(World::new().await);
    let size = 32 * 1024 * 1024 + 12_345;
    let object = bytes(5, size);
    let tag = Arc::new(world.put("object", &object));
    let tasks = (0..64_u64).map(|client| {
        let (world, tag, object) = (Arc::clone(&world), Arc::clone(&tag), object.clone());
        tokio::spawn(async move {
            // Each begins somewhere else and cuts the object differently.
            let step = 700_001 + client * 61_007;
            let mut offset = (client * 523_109) % size;
            for _ in 0..size.div_ceil(step) {
                let end = (offset + step).min(size);
                let range = format!("bytes={offset}-{}", end - 1);
                let answer = world
                    .get(
                        "/m/object",
                        &[("if-match", tag.as_str()), ("range", &range)],
                    )
                    .await;
                assert_eq!((answer.status, answer.cut), (206, false), "{range}");
                assert!(
                    answer.body == slice(&object, offset, end),
                    "{range} has other bytes"
                );
                offset = if end == size { 0 } else { end };
            }
        })
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
    let stats = world.s3.stats();
    assert_eq!(
        stats.body_bytes_sent, size,
        "each byte left the remote once"
    );
    assert_eq!(stats.unguarded_gets, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_pin_needs_nobody() {
    let world = World::new().await;
    let old = bytes(6, PART + 5);
    let pin = world.put("object", &old);
    assert_eq!(world.get("/m/object", &[]).await.status, 200);
    let new = world.put("object", &bytes(7, PART));
    world.s3.clear_log();
    let pinned = [("if-match", pin.as_str()), ("range", "bytes=100-")];
    let answer = world.get("/m/object", &pinned).await;
    assert_eq!((answer.status, answer.header("etag")), (206, pin.as_str()));
    assert_eq!(answer.body, slice(&old, 100, PART + 5));
    assert_ne!(pin, new);

    world.s3.stop_accepting().await;
    let answer = world.get("/m/object", &pinned).await;
    assert_eq!(answer.status, 206);
    assert_eq!(answer.body, slice(&old, 100, PART + 5));
    assert_eq!(world.s3.stats().requests, 0);
    let asked_first = [("if-match", pin.as_str()), ("cache-control", "no-cache")];
    assert_eq!(
        world.get("/m/object", &asked_first).await.status,
        503,
        "no-cache in an outage"
    );
    world.s3.resume().await.unwrap();
    assert_eq!(
        world.get("/m/object", &asked_first).await.status,
        412,
        "no-cache asks first"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_outranks_412_and_404() {
    let world = World::new().await;
    let tag = world.put("object", &bytes(8, PART));
    world.s3.stop_accepting().await;
    for headers in [
        vec![("if-match", "\"elsewhere\"")],
        vec![("if-match", tag.as_str())],
        vec![],
    ] {
        let answer = world.get("/m/object", &headers).await;
        assert_eq!(answer.status, 503, "{headers:?}");
        assert!(!answer.header("retry-after").is_empty());
        assert_eq!(answer.header("content-type"), "application/problem+json");
    }
    assert_eq!(world.get("/m/missing", &[]).await.status, 503);
    world.s3.resume().await.unwrap();
    let lost = world
        .get("/m/object", &[("if-match", "\"elsewhere\"")])
        .await;
    assert_eq!(lost.status, 412);
    let problem: serde_json::Value = serde_json::from_slice(&lost.body).unwrap();
    assert_eq!(
        (&problem["status"], &problem["pinned"]),
        (&412.into(), &"\"elsewhere\"".into())
    );
    assert_eq!(world.get("/m/missing", &[]).await.status, 404);
    assert_eq!(
        world
            .get("/m/missing", &[("if-match", "\"x\"")])
            .await
            .status,
        404
    );
    for (effect, status) in [
        (Effect::InternalError, 503),
        (Effect::AccessDenied, 502),
        (Effect::WrongETag, 502),
        (Effect::WrongContentRange, 502),
        (Effect::IgnoreRange, 502),
        // The last, for S3 is not asked again while it wants to be left alone.
        (
            Effect::SlowDown {
                retry_after: Some(7),
            },
            503,
        ),
    ] {
        world.s3.script(Fault::new(effect.clone()).times(2));
        let answer = world
            .get("/m/object", &[("if-match", &tag), ("range", "bytes=0-9")])
            .await;
        assert_eq!(answer.status, status, "{effect:?}");
        if matches!(effect, Effect::SlowDown { .. }) {
            assert_eq!(
                answer.header("retry-after"),
                "7",
                "S3's own advice is passed on"
            );
        }
        world.s3.clear_faults();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_without_end_is_capped() {
    let world = World::new().await;
    let tag = world.put("object", &bytes(39, PART));
    let retry_after = Some(2_000_000_000);
    world
        .s3
        .script(Fault::new(Effect::SlowDown { retry_after }).times(2));
    let answer = world.get("/m/object", &[("if-match", &tag)]).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "3600"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_before_the_first_byte_is_no_206() {
    let world = World::new().await;
    let tag = world.put("object", &bytes(9, PART));
    for headers in [
        vec![("if-match", tag.as_str()), ("range", "bytes=9-99")],
        vec![],
    ] {
        world.s3.script(
            Fault::new(Effect::ResetAfter { bytes: 0 })
                .on(Op::Get)
                .times(2),
        );
        let answer = world.get("/m/object", &headers).await;
        assert_eq!(answer.status, 503, "{headers:?}");
        world.s3.clear_faults();
    }
    // One reset is mended within the response.
    world
        .s3
        .script(Fault::new(Effect::ResetAfter { bytes: 0 }).on(Op::Get));
    assert_eq!(
        world.get("/m/object", &[("if-match", &tag)]).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_resumed_at_the_exact_offset() {
    let world = World::new().await;
    let object = bytes(10, PART);
    let tag = world.put("object", &object);
    for headers in [vec![("if-match", tag.as_str())], vec![]] {
        world.purge("/m/*").await;
        world.s3.clear_log();
        world
            .s3
            .script(Fault::new(Effect::ResetAfter { bytes: 700_001 }).on(Op::Get));
        let answer = world.get("/m/object", &headers).await;
        assert_eq!((answer.status, answer.cut), (200, false));
        assert_eq!(answer.body, object);
        let log = world.s3.log();
        assert_eq!(log.len(), 2);
        assert_eq!(log[1].range, Some(format!("bytes=700001-{}", PART - 1)));
        assert!(log[1].guarded, "what is resumed is guarded");
    }
    // Replaced meanwhile: cut, never spliced.
    world.purge("/m/*").await;
    world
        .s3
        .script(Fault::new(Effect::ResetAfter { bytes: 700_001 }).on(Op::Get));
    world
        .s3
        .script(Fault::new(Effect::After(replace("object", &bytes(11, PART)))).on(Op::Get));
    let answer = world.get("/m/object", &[("if-match", &tag)]).await;
    assert!(answer.cut);
    assert_eq!(answer.body, object[..answer.body.len()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_waits_for_the_first_missing_stretch() {
    // The disk holds the start, or somebody else's flight is about to bring it.
    for in_flight in [false, true] {
        let world = World::new().await;
        let object = bytes(12, 2 * PART);
        let tag = world.put("object", &object);
        if in_flight {
            world.s3.script(Fault::new(Effect::StallAfter {
                bytes: 1_000,
                duration: None,
            }));
        }
        let start = [("if-match", tag.as_str()), ("range", "bytes=0-99")];
        let first = world.get("/m/object", &start).await;
        assert_eq!(first.status, 206);
        // S3 has another revision by now: 412, not 206 and a cut.
        world.put("object", &bytes(13, 2 * PART));
        let answer = world.get("/m/object", &[("if-match", &tag)]).await;
        assert_eq!(answer.status, 412, "in flight: {in_flight}");
        if !in_flight {
            let held = world.get("/m/object", &start).await;
            assert_eq!((held.status, held.body), (206, object[..100].to_vec()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn swap_between_any_two_requests() {
    let whole = bytes(14, 2 * PART);
    let small = bytes(15, PART);
    for object in [&small, &whole] {
        for pinned in [true, false] {
            for step in 1..=4_u64 {
                for before in [true, false] {
                    swap(object, pinned, step, before).await;
                }
            }
        }
    }
}

async fn swap(object: &Bytes, pinned: bool, step: u64, before: bool) {
    let case = format!(
        "{} bytes, pinned {pinned}, request {step}, before {before}",
        object.len()
    );
    let world = World::new().await;
    let other = bytes(16, object.len() as u64);
    let pin = world.put("object", object);
    let asked = AtomicU64::new(0);
    let (old, new) = (object.clone(), other.clone());
    world.s3.on_request(Some(Box::new(move |_| {
        let nth = asked.fetch_add(1, Ordering::SeqCst) + 1;
        // Replaced at `step`, and replaced back and forth ever after.
        let with = if (nth.wrapping_sub(step)).is_multiple_of(2) {
            &new
        } else {
            &old
        };
        if nth < step {
            Vec::new()
        } else if before {
            vec![Effect::Before(replace("object", with))]
        } else {
            vec![Effect::After(replace("object", with))]
        }
    })));
    let headers: Vec<(&str, &str)> = if pinned {
        vec![("if-match", &pin)]
    } else {
        vec![]
    };
    let answer = world.get("/m/object", &headers).await;
    match answer.status {
        200 => {
            let revision = if answer.header("etag") == pin {
                object
            } else {
                &other
            };
            assert!(
                !pinned || answer.header("etag") == pin,
                "{case}: labelled otherwise"
            );
            assert!(
                answer.body == revision[..answer.body.len()],
                "{case}: mixed"
            );
            if answer.cut {
                assert!(object.len() as u64 > PART, "{case}: one GET, and cut");
            } else {
                assert_eq!(answer.body.len(), object.len(), "{case}: ended short");
            }
        }
        412 => assert!(pinned, "{case}: an unpinned request lost a pin"),
        503 => assert!(!pinned, "{case}: all is reachable"),
        status => panic!("{case}: {status}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_during_a_wide_download_cuts_it() {
    for versioned in [false, true] {
        let world = World::with(Setup {
            versioned,
            ..Setup::default()
        })
        .await;
        let object = bytes(17, 24 * PART);
        let tag = world.put("object", &object);
        world.s3.script(
            Fault::new(Effect::Before(replace("object", &bytes(18, 24 * PART))))
                .on(Op::Get)
                .nth(12),
        );
        let answer = world.get("/m/object", &[("if-match", &tag)]).await;
        assert_eq!(answer.status, 200);
        assert!(answer.body == object[..answer.body.len()], "mixed");
        assert_eq!(
            answer.cut, !versioned,
            "where the bucket has versions nothing is cut"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unpinned_answers_follow_the_remote() {
    let fresh_for = Duration::from_millis(300);
    let world = World::with(Setup {
        fresh_for,
        ..Setup::default()
    })
    .await;
    let old = bytes(19, PART);
    let new = bytes(20, PART);
    let old_tag = world.put("object", &old);
    let label = world.get("/m/object", &[]).await;
    assert_eq!(label.header("etag"), old_tag);
    let new_tag = world.put("object", &new);
    let replaced = std::time::Instant::now();
    loop {
        // However long it takes: what counts is what S3 had when it was sent.
        let sent = replaced.elapsed();
        let answer = world.get("/m/object", &[]).await;
        if answer.header("etag") == new_tag {
            assert_eq!(answer.body, new);
            break;
        }
        assert_eq!(answer.body, old);
        assert!(
            sent <= fresh_for,
            "an unpinned answer is further behind than fresh_for"
        );
    }
    // Unchanged: one conditional request, and the disk answers.
    tokio::time::sleep(fresh_for).await;
    world.s3.clear_log();
    let answer = world.get("/m/object", &[]).await;
    assert_eq!(answer.body, new);
    let log = world.s3.log();
    assert_eq!(log[0].if_none_match.as_deref(), Some(new_tag.as_str()));
    assert_eq!(world.s3.stats().body_bytes_sent, 0);
    // `no-cache` asks S3, however fresh the label is.
    world.put("object", &old);
    assert_eq!(
        world
            .get("/m/object", &[("cache-control", "no-cache")])
            .await
            .header("etag"),
        old_tag
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pin_is_not_handed_out_again() {
    let world = World::with(Setup {
        fresh_for: Duration::from_mins(10),
        ..Setup::default()
    })
    .await;
    let old = world.put("object", &bytes(21, 4 * PART));
    let head = world.ask(Method::HEAD, "/m/object", &[]).await;
    assert_eq!(head.header("etag"), old);
    let new_bytes = bytes(22, 4 * PART);
    let new = world.put("object", &new_bytes);
    assert_eq!(
        world.get("/m/object", &[("if-match", &old)]).await.status,
        412
    );
    let head = world.ask(Method::HEAD, "/m/object", &[]).await;
    assert_eq!(
        head.header("etag"),
        new,
        "the label was believed for ten minutes, were it not for the 412"
    );
    // An unpinned request that runs into a replaced object starts again by itself.
    let newer_bytes = bytes(23, 4 * PART);
    world.put("object", &newer_bytes);
    let answer = world.get("/m/object", &[]).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert!(answer.body == newer_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_if_error_is_marked() {
    let fresh_for = Duration::from_millis(1);
    let world = World::with(Setup {
        fresh_for,
        ..Setup::default()
    })
    .await;
    let object = bytes(24, PART);
    world.put("object", &object);
    assert_eq!(world.get("/m/object", &[]).await.status, 200);
    world.s3.stop_accepting().await;
    let world = world.restart().await;
    let answer = world.get("/m/object", &[]).await;
    assert_eq!(answer.status, 200, "after a restart too");
    assert_eq!(answer.body, object);
    assert_eq!(
        answer.header("cache-status"),
        "pinrange; hit; detail=stale-if-error"
    );
    assert_eq!(
        world
            .get("/m/object", &[("cache-control", "no-cache")])
            .await
            .status,
        503
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_was_written() {
    let world = World::new().await;
    let object = bytes(25, 3 * PART + 1);
    let tag = world.put("object", &object);
    assert_eq!(
        world.get("/m/object", &[("if-match", &tag)]).await.status,
        200
    );
    let world = world.restart().await;
    world.s3.stop_accepting().await;
    let answer = world.get("/m/object", &[("if-match", &tag)]).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert!(answer.body == object);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_hurts_nobody() {
    let world = World::new().await;
    let object = bytes(26, PART);
    let tag = world.put("object", &object);
    world.s3.script(
        Fault::new(Effect::StallAfter {
            bytes: 500_000,
            duration: None,
        })
        .on(Op::Get),
    );
    let pinned = [("if-match", tag.as_str())];
    let (status, mut leaver) = world.begin("/m/object", &pinned).await;
    assert_eq!(status, 200);
    leaver.frame().await.unwrap().unwrap();
    let (_, stayer) = world.begin("/m/object", &pinned).await;
    drop(leaver);
    world.s3.release_stalls();
    assert!(stayer.collect().await.unwrap().to_bytes() == object);
    assert_eq!(world.s3.stats().gets, 1, "the fill went on for who stayed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_client_holds_no_fill() {
    let world = World::new().await;
    let object = bytes(27, 64 * PART);
    let tag = world.put("object", &object);
    let (status, stalled) = world.begin("/m/object", &[("if-match", &tag)]).await;
    assert_eq!(status, 200);
    // The fills run ahead as far as they may, and end.
    world
        .s3
        .wait_for_log(|log| log.len() >= 8 && log.iter().all(|entry| entry.finished))
        .await;
    let sent = world.s3.stats().body_bytes_sent;
    assert!(
        sent <= 20 * PART,
        "{sent} bytes were fetched for a client that reads nothing"
    );
    drop(stalled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_fails_nothing() {
    let full = Setup {
        min_free: MinFree::Percent(100.0),
        ..Setup::default()
    };
    let world = World::with(full).await;
    let object = bytes(28, 3 * PART + 3);
    let tag = world.put("object", &object);
    for headers in [vec![], vec![("if-match", tag.as_str())]] {
        let answer = world.get("/m/object", &headers).await;
        assert_eq!((answer.status, answer.cut), (200, false), "{headers:?}");
        assert!(answer.body == object);
    }
    let ranges = [("if-match", tag.as_str()), ("range", "bytes=-10")];
    let answer = world.get("/m/object", &ranges).await;
    assert_eq!(
        (answer.status, answer.body),
        (206, object[object.len() - 10..].to_vec())
    );
    world.put("object", &bytes(29, PART));
    assert_eq!(
        world.get("/m/object", &[("if-match", &tag)]).await.status,
        412
    );
}

/// Cuts every segment file down to `len` bytes under a running replica; how many there were.
fn truncate_segments(world: &World, len: u64) -> usize {
    let mut truncated = 0;
    for directory in std::fs::read_dir(world.config.cache.dir.join("segments")).unwrap() {
        for file in std::fs::read_dir(directory.unwrap().path()).unwrap() {
            let file = std::fs::File::options()
                .write(true)
                .open(file.unwrap().path())
                .unwrap();
            file.set_len(len).unwrap();
            truncated += 1;
        }
    }
    truncated
}

/// The head promised the whole, and the file ends in the middle: the same response goes on with S3's bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_reads_short_is_replaced_within_the_response() {
    let world = World::new().await;
    let object = bytes(38, 2 * PART);
    let tag = world.put("object", &object);
    let pinned = [("if-match", tag.as_str())];
    assert!(world.get("/m/object", &pinned).await.body == object);
    assert_eq!(truncate_segments(&world, 1_000_000), 1);
    world.s3.clear_log();
    let answer = world.get("/m/object", &pinned).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert_eq!(answer.header("cache-status"), "pinrange; hit; detail=disk");
    assert!(answer.body == object);
    let log = world.s3.take_log();
    assert!(!log.is_empty(), "where else would the bytes come from");
    assert_eq!(world.s3.stats().unguarded_gets, 0);
    let stats = world.replica.disk().stats();
    assert_eq!(stats.quarantines, 1, "the bad file is dropped");
    let metrics = world.metrics().await;
    assert!(metrics.contains("pinrange_rescues_total 1\n"), "{metrics}");

    let requests = world.s3.stats().requests;
    let answer = world
        .get("/m/object", &[pinned[0], ("range", "bytes=1000000-")])
        .await;
    assert!(answer.body == object[1_000_000..]);
    assert_eq!(world.s3.stats().requests, requests, "it is held again");
}

/// P3: bytes of another revision are no replacement.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_reads_short_cuts_the_response_when_the_object_has_changed() {
    let world = World::new().await;
    let object = bytes(39, 2 * PART);
    let tag = world.put("object", &object);
    let pinned = [("if-match", tag.as_str())];
    assert!(world.get("/m/object", &pinned).await.body == object);
    assert_eq!(truncate_segments(&world, 1_000_000), 1);
    world.put("object", &bytes(40, 2 * PART));
    let answer = world.get("/m/object", &pinned).await;
    assert!(answer.cut, "a body is neither padded nor mixed");
    assert!(answer.body == object[..answer.body.len()]);
    let answer = world.get("/m/object", &pinned).await;
    assert_eq!(answer.status, 412, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_forgets_a_held_pin() {
    let world = World::new().await;
    let tag = world.put("dir/object", &bytes(30, PART));
    let pinned = [("if-match", tag.as_str())];
    for what in ["/m/dir/object", "/m/dir/*", "/m/*"] {
        assert_eq!(world.get("/m/dir/object", &pinned).await.status, 200);
        world.s3.stop_accepting().await;
        assert_eq!(
            world.get("/m/dir/object", &pinned).await.status,
            200,
            "held"
        );
        assert_eq!(world.purge(what).await, 200);
        assert_eq!(
            world.get("/m/dir/object", &pinned).await.status,
            503,
            "{what}"
        );
        world.s3.resume().await.unwrap();
    }
    world.s3.delete("bucket", "dir/object").unwrap();
    assert_eq!(world.get("/m/dir/object", &pinned).await.status, 404);
    assert_eq!(world.purge("/elsewhere/x").await, 404);
    assert_eq!(world.purge("/m/../x").await, 400);
    assert_eq!(world.purge("/m/%20").await, 400);
    assert_eq!(world.purge("m/x").await, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_of_a_prefix_reaches_the_mounts_below_it() {
    let world = World::with(Setup {
        nested: true,
        ..Setup::default()
    })
    .await;
    let tag = world.put("nested/object", &bytes(42, PART));
    let pinned = [("if-match", tag.as_str())];
    for what in ["/*", "/m/*", "/m/nest*", "/m/nested/*"] {
        let answer = world.get("/m/nested/object", &pinned).await;
        assert_eq!(answer.status, 200);
        world.s3.stop_accepting().await;
        let held = world.get("/m/nested/object", &pinned).await;
        assert_eq!(held.status, 200, "held");
        assert_eq!(world.purge(what).await, 200, "{what}");
        let gone = world.get("/m/nested/object", &pinned).await;
        assert_eq!(gone.status, 503, "{what}");
        world.s3.resume().await.unwrap();
    }
}

/// RFC 9211 §2.2: `fwd` is of a request that went towards the origin.
#[tokio::test(flavor = "multi_thread")]
async fn a_forward_is_claimed_only_where_there_was_one() {
    const REMEMBERED: &str = "pinrange; hit; detail=remembered";
    let world = World::with(Setup {
        fresh_for: Duration::from_mins(10),
        ..Setup::default()
    })
    .await;
    world.put("empty", &Bytes::new());
    world.put("object", &bytes(43, 10));
    for (method, path, status, first, second) in [
        (
            Method::GET,
            "/m/missing",
            404,
            "pinrange; fwd=miss; fwd-status=404",
            REMEMBERED,
        ),
        (
            Method::GET,
            "/m/empty",
            200,
            "pinrange; fwd=miss; fwd-status=206; stored",
            "pinrange; hit; detail=disk",
        ),
        (
            Method::HEAD,
            "/m/object",
            200,
            "pinrange; fwd=miss; fwd-status=200",
            REMEMBERED,
        ),
    ] {
        let remote = |metrics: String| {
            let line = "pinrange_request_ttfb_seconds_count{tier=\"remote\"} ";
            let count = metrics.lines().find_map(|found| found.strip_prefix(line));
            count.unwrap().parse::<u64>().unwrap()
        };
        for (expected, forwarded) in [(first, true), (second, false)] {
            let before = remote(world.metrics().await);
            world.s3.clear_log();
            let answer = world.ask(method.clone(), path, &[]).await;
            assert_eq!(answer.status, status, "{method} {path}");
            assert_eq!(answer.header("cache-status"), expected, "{method} {path}");
            assert_eq!(!world.s3.log().is_empty(), forwarded, "{method} {path}");
            let counted = remote(world.metrics().await) > before;
            assert_eq!(counted, forwarded, "{method} {path}");
        }
    }
}

/// Sent fields, the status, and the stretch of the object that comes back.
type Case<'a> = (&'a [(&'a str, &'a str)], u16, Option<(u64, u64)>);

#[tokio::test(flavor = "multi_thread")]
async fn ranges_and_conditions_cold_and_warm() {
    let world = World::new().await;
    let object = bytes(31, PART + 1000);
    let size = object.len() as u64;
    let tag = world.put("object", &object);
    world.put("empty", &Bytes::new());
    let weak = format!("W/{tag}");
    let list = format!("\"a\", {tag}");
    let bare = tag.trim_matches('"').to_owned();
    let cases: &[Case] = &[
        (&[], 200, Some((0, size))),
        (&[("range", "bytes=0-")], 206, Some((0, size))),
        (&[("range", "bytes=-5")], 206, Some((size - 5, size))),
        (&[("range", "bytes=-99999999999")], 206, Some((0, size))),
        (&[("range", "bytes=10-99999999999")], 206, Some((10, size))),
        (&[("range", "bytes=99999999999-")], 416, None),
        (&[("range", "bytes=-0")], 416, None),
        (&[("range", "bytes=5-2")], 200, Some((0, size))),
        (&[("range", "lines=5-9")], 200, Some((0, size))),
        (
            &[("if-match", "*"), ("range", "bytes=1-1")],
            206,
            Some((1, 2)),
        ),
        (
            &[("if-match", &list), ("range", "bytes=1-2")],
            206,
            Some((1, 3)),
        ),
        (
            &[("if-match", &bare), ("range", "bytes=1-2")],
            206,
            Some((1, 3)),
        ),
        (&[("if-match", &weak)], 412, None),
        (&[("if-match", "\"a\", \"b\"")], 412, None),
        (&[("if-match", "\"a")], 400, None),
        (
            &[("if-match", &tag), ("range", "bytes=99999999999-")],
            416,
            None,
        ),
        (
            &[("if-match", &tag), ("range", "bytes=-7")],
            206,
            Some((size - 7, size)),
        ),
        (&[("if-none-match", &tag)], 304, None),
        (&[("if-none-match", "\"a\"")], 200, Some((0, size))),
        (&[("if-match", &tag), ("if-none-match", &tag)], 304, None),
        (
            &[("if-range", &tag), ("range", "bytes=3-5")],
            206,
            Some((3, 6)),
        ),
        (
            &[("if-range", "\"a\""), ("range", "bytes=3-5")],
            200,
            Some((0, size)),
        ),
        (
            &[("if-modified-since", "Fri, 01 Jan 2100 00:00:00 GMT")],
            304,
            None,
        ),
        (
            &[("if-unmodified-since", "Mon, 01 Jan 2001 00:00:00 GMT")],
            412,
            None,
        ),
    ];
    for (headers, status, range) in cases {
        for temperature in ["cold", "warm"] {
            if temperature == "cold" {
                world.purge("/m/*").await;
            } else {
                assert_eq!(world.get("/m/object", &[]).await.status, 200);
            }
            let case = format!("{temperature} {headers:?}");
            let answer = world.get("/m/object", headers).await;
            assert_eq!((answer.status, answer.cut), (*status, false), "{case}");
            if let Some((start, end)) = range {
                assert!(
                    answer.body == slice(&object, *start, *end),
                    "{case}: other bytes"
                );
                assert_eq!(answer.header("etag"), tag, "{case}");
                assert_eq!(answer.header("accept-ranges"), "bytes", "{case}");
                let content_range = format!("bytes {start}-{}/{size}", end - 1);
                let expected = if *status == 206 {
                    content_range.as_str()
                } else {
                    ""
                };
                assert_eq!(answer.header("content-range"), expected, "{case}");
            }
            if *status == 416 {
                assert_eq!(
                    answer.header("content-range"),
                    format!("bytes */{size}"),
                    "{case}"
                );
            }
            if *status == 304 {
                assert_eq!(
                    (answer.body.len(), answer.header("etag")),
                    (0, tag.as_str()),
                    "{case}"
                );
                assert_eq!(answer.header("content-length"), "", "{case}");
            }
        }
    }
    for headers in [vec![("range", "bytes=0-0")], vec![("range", "bytes=-1")]] {
        assert_eq!(world.get("/m/empty", &headers).await.status, 416);
    }
    for _ in 0..2 {
        let empty = world.get("/m/empty", &[]).await;
        assert_eq!((empty.status, empty.header("content-length")), (200, "0"));
    }
}

/// Nothing says that an object is empty but an answer without bytes, so the first GET takes two requests: no range fits.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_object_is_held_like_any_other() {
    let world = World::with(Setup {
        fresh_for: Duration::ZERO,
        ..Setup::default()
    })
    .await;
    let options = PutOptions {
        content_type: Some("text/plain".to_owned()),
        last_modified: Some(std::time::SystemTime::now() - Duration::from_hours(1)),
        ..PutOptions::default()
    };
    let put = world.s3.put("bucket", "empty", Bytes::new(), options);
    let tag = put.unwrap().etag;
    let pin = [("if-match", tag.as_str())];
    for (method, pinned, requests) in [
        (Method::GET, true, 2),
        (Method::GET, false, 2),
        (Method::HEAD, true, 1),
        (Method::HEAD, false, 1),
    ] {
        let case = format!("{method} pinned {pinned}");
        assert_eq!(world.purge("/m/*").await, 200);
        world.s3.resume().await.unwrap();
        world.s3.clear_log();
        let fields: &[_] = if pinned { &pin } else { &[] };
        let answer = world.ask(method, "/m/empty", fields).await;
        assert_eq!(
            (answer.status, answer.header("etag")),
            (200, tag.as_str()),
            "{case}"
        );
        assert_eq!(world.s3.stats().requests, requests, "{case}");
        let status = answer.header("cache-status");
        assert!(status.ends_with("; stored"), "{case}: {status}");

        // Whoever asks what is current has it confirmed, once it is known what was.
        let first = if pinned { 2 } else { 1 };
        for requests in [first, 1] {
            world.s3.clear_log();
            let answer = world.get("/m/empty", &[]).await;
            let kind = answer.header("content-type");
            assert_eq!((answer.status, kind), (200, "text/plain"), "{case}");
            assert_eq!(world.s3.stats().requests, requests, "{case}");
        }

        // Whoever names it needs nobody.
        world.s3.stop_accepting().await;
        world.s3.clear_log();
        for (method, more, status) in [
            (Method::GET, vec![], 200),
            (Method::HEAD, vec![], 200),
            (Method::GET, vec![("range", "bytes=0-")], 416),
            (Method::GET, vec![("range", "bytes=-1")], 416),
            (Method::GET, vec![("if-none-match", "*")], 304),
        ] {
            let fields: Vec<_> = pin.into_iter().chain(more).collect();
            let answer = world.ask(method.clone(), "/m/empty", &fields).await;
            let case = format!("{case}, then {method} {fields:?}");
            assert_eq!((answer.status, answer.cut), (status, false), "{case}");
            assert_eq!(
                answer.header("cache-status"),
                "pinrange; hit; detail=disk",
                "{case}"
            );
            let range = if status == 416 { "bytes */0" } else { "" };
            assert_eq!(answer.header("content-range"), range, "{case}");
        }
        let other = world.get("/m/empty", &[("if-match", "\"other\"")]).await;
        assert_eq!(other.status, 503, "{case}: an outage outranks a lost pin");
        assert!(world.s3.log().is_empty(), "{case}");
    }
    // It outlives a restart, and is gone when it is replaced.
    let world = world.restart().await;
    assert_eq!(world.get("/m/empty", &pin).await.status, 200);
    world.s3.resume().await.unwrap();
    world.put("empty", &bytes(44, 10));
    assert_eq!(world.get("/m/empty", &[]).await.body.len(), 10);
    assert_eq!(
        world.get("/m/empty", &pin).await.status,
        200,
        "held, whatever S3 has now"
    );
    assert_eq!(world.purge("/m/empty").await, 200);
    assert_eq!(world.get("/m/empty", &pin).await.status, 412);
}

/// S3 says 403 for all of these, and only one of them can mean that there is no such key.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_denial_means_missing() {
    let world = World::with(Setup {
        fresh_for: Duration::ZERO,
        forbidden: ForbiddenAs::NotFound,
        ..Setup::default()
    })
    .await;
    let tag = world.put("object", &bytes(45, 10));
    for (code, status, says) in [
        ("AccessDenied", 404, "there is no such object"),
        ("InvalidAccessKeyId", 502, "an answer that cannot be used"),
        (
            "SignatureDoesNotMatch",
            502,
            "an answer that cannot be used",
        ),
        ("RequestTimeTooSkewed", 502, "an answer that cannot be used"),
        ("ExpiredToken", 502, "an answer that cannot be used"),
        ("InvalidObjectState", 502, "it has to be restored"),
    ] {
        for method in [Method::GET, Method::HEAD] {
            for fields in [&[][..], &[("if-match", tag.as_str())]] {
                let case = format!("{code}: {method} {fields:?}");
                world.s3.clear_log();
                world
                    .s3
                    .script(Fault::new(Effect::Forbidden { code }).times(2));
                let answer = world.ask(method.clone(), "/m/object", fields).await;
                world.s3.clear_faults();
                assert_eq!(answer.status, status, "{case}");
                // A HEAD's 403 has no code, so that takes a GET more. (An expired token is a 400.)
                let requests = match method {
                    Method::HEAD if code != "ExpiredToken" => 2,
                    _ => 1,
                };
                assert_eq!(world.s3.stats().requests, requests, "{case}");
                if method == Method::GET {
                    let text = String::from_utf8(answer.body).unwrap();
                    assert!(text.contains(says), "{case}: {text}");
                }
            }
        }
    }
    // Denied once, and not when it is asked again: the object is there.
    for fields in [&[][..], &[("if-match", tag.as_str())]] {
        world.s3.script(Fault::new(Effect::AccessDenied));
        let answer = world.ask(Method::HEAD, "/m/object", fields).await;
        assert_eq!(
            (answer.status, answer.header("content-length")),
            (200, "10")
        );
    }
}

/// Where a 403 is no 404, the first is enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_denied_head_is_asked_once_where_that_decides_nothing() {
    let world = World::new().await;
    world.put("object", &bytes(46, 10));
    world.s3.script(Fault::new(Effect::AccessDenied));
    let answer = world.ask(Method::HEAD, "/m/object", &[]).await;
    assert_eq!((answer.status, world.s3.stats().requests), (502, 1));
}

/// The whole answer as it comes, for those that hyper's client refuses.
async fn raw(world: &World, method: &Method, path: &str) -> String {
    let mut tcp = TcpStream::connect(world.replica.data).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// As many as S3 takes: 2 KB of names and values, 8 KB of request head.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_the_user_metadata_passes_through() {
    let world = World::new().await;
    let metadata = (0..450)
        .map(|at| (format!("{at:03}"), "v".to_owned()))
        .collect();
    let options = PutOptions {
        metadata,
        ..PutOptions::default()
    };
    world
        .s3
        .put("bucket", "object", bytes(47, 10), options)
        .unwrap();
    for method in [Method::GET, Method::HEAD] {
        assert_eq!(world.purge("/m/*").await, 200);
        let answer = raw(&world, &method, "/m/object").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{method}: {answer}");
        assert_eq!(answer.matches("\r\nx-amz-meta-").count(), 450, "{method}");
        assert!(
            answer.contains("\r\nx-amz-meta-449: v\r\n"),
            "{method}: {answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_ranges_are_multipart() {
    let world = World::new().await;
    let object = bytes(32, 2 * PART);
    let options = PutOptions {
        content_type: Some("text/x-numbers".to_owned()),
        ..PutOptions::default()
    };
    let put = world.s3.put("bucket", "object", object.clone(), options);
    let tag = put.unwrap().etag;
    let far = 2 * PART - 20;
    let range = format!("bytes=5-9,100-199,150-250,{far}-");
    for temperature in ["cold", "warm"] {
        let answer = world
            .get("/m/object", &[("if-match", &tag), ("range", &range)])
            .await;
        assert_eq!((answer.status, answer.cut), (206, false), "{temperature}");
        let boundary = answer
            .header("content-type")
            .strip_prefix("multipart/byteranges; boundary=")
            .unwrap();
        let mut expected = Vec::new();
        let parts = [("", 5, 10), ("\r\n", 100, 251), ("\r\n", far, 2 * PART)];
        for (lead, start, end) in parts {
            let (last, size) = (end - 1, 2 * PART);
            let head = format!(
                "{lead}--{boundary}\r\nContent-Type: text/x-numbers\r\nContent-Range: bytes {start}-{last}/{size}\r\n\r\n"
            );
            expected.extend_from_slice(head.as_bytes());
            expected.extend_from_slice(slice(&object, start, end));
        }
        expected.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
        let (got, wanted) = [&answer.body, &expected]
            .map(|body| body.escape_ascii().to_string())
            .into();
        assert_eq!(got, wanted, "{temperature}");
    }
    let bomb = (0..100)
        .map(|i| format!("{0}-{0}", i * 10))
        .collect::<Vec<_>>()
        .join(",");
    let answer = world
        .get("/m/object", &[("range", &format!("bytes={bomb}"))])
        .await;
    assert_eq!(answer.status, 416);
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_answer_for_their_gets() {
    let world = World::new().await;
    let object = bytes(33, 2 * PART);
    let tag = world.put("object", &object);
    let pinned = [("if-match", tag.as_str()), ("range", "bytes=0-9")];
    let head = world.ask(Method::HEAD, "/m/object", &pinned).await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, "4194304"),
        "Range is ignored"
    );
    assert_eq!(world.get("/m/object", &pinned).await.status, 206);
    world.put("object", &bytes(34, PART));
    let head = world
        .ask(Method::HEAD, "/m/object", &[("if-match", &tag)])
        .await;
    assert_eq!(head.status, 412, "held in part: S3 is asked");
    assert_eq!(world.ask(Method::HEAD, "/m/missing", &[]).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_pass_through_and_are_renewed() {
    let world = World::with(Setup {
        fresh_for: Duration::ZERO,
        ..Setup::default()
    })
    .await;
    let object = bytes(35, BLOCK);
    let put = |content_type: &str| {
        let options = PutOptions {
            content_type: Some(content_type.to_owned()),
            ..PutOptions::default()
        };
        world
            .s3
            .put("bucket", "object", object.clone(), options)
            .unwrap();
    };
    put("application/x-first");
    let answer = world.get("/m/object", &[]).await;
    assert_eq!(answer.header("content-type"), "application/x-first");
    assert_eq!(answer.header("via"), "1.1 pinrange");
    let mut ids = answer.headers.get_all("x-request-id").iter();
    let id = ids.next().unwrap().to_str().unwrap().to_owned();
    assert!(
        id.len() == 16 && u64::from_str_radix(&id, 16).is_ok(),
        "{id}"
    );
    let again = world.get("/m/object", &[]).await;
    assert_ne!(again.header("x-request-id"), id);
    // Equal bytes, other headers, within the same second.
    put("application/x-second");
    let answer = world.get("/m/object", &[("x-request-id", "mine-7")]).await;
    assert_eq!(answer.header("content-type"), "application/x-second");
    assert_eq!(answer.header("x-request-id"), "mine-7");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_refused() {
    let world = World::new().await;
    world.put("object", &bytes(36, 10));
    let cases = [
        (Method::POST, "/m/object", 405),
        (Method::PUT, "/m/object", 405),
        (Method::DELETE, "/m/object", 405),
        (Method::GET, "/m/object?versionId=1", 400),
        (Method::GET, "/m/object?X-Amz-Signature=1", 400),
        (Method::GET, "/m/object?response-content-type=x", 400),
        (Method::GET, "/m/object?partNumber=1", 400),
        (Method::GET, "/m/object?anything=else", 200),
        (Method::GET, "/m/../object", 400),
        (Method::GET, "/m/%2e%2e/object", 400),
        (Method::GET, "/m/%00", 400),
        (Method::GET, "/m/", 404),
        (Method::GET, "/", 404),
        (Method::GET, "/other/object", 404),
        (Method::GET, "/m%2fobject", 404),
    ];
    for (method, path, status) in cases {
        let answer = world.ask(method.clone(), path, &[]).await;
        assert_eq!(answer.status, status, "{method} {path}");
        if status == 405 {
            assert_eq!(answer.header("allow"), "GET, HEAD");
        }
        if status >= 400 {
            assert_eq!(answer.header("content-type"), "application/problem+json");
            let text = String::from_utf8(answer.body).unwrap();
            assert!(
                !text.contains("bucket") && !text.contains("127.0.0.1"),
                "leaks: {text}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_and_no_key_becomes_a_label() {
    let world = World::new().await;
    let tag = world.put("object", &bytes(37, PART));
    for _ in 0..3 {
        world.get("/m/object", &[("if-match", &tag)]).await;
    }
    let counted = [
        "pinrange_requests_total{verdict=\"full\",tier=\"remote\"} 1\n".to_owned(),
        "pinrange_requests_total{verdict=\"full\",tier=\"disk\"} 2\n".to_owned(),
        format!("pinrange_sent_bytes_total{{tier=\"remote\"}} {PART}\n"),
        format!("pinrange_sent_bytes_total{{tier=\"disk\"}} {}\n", 2 * PART),
        "pinrange_remote_requests_total{op=\"read\",result=\"ok\"} 1\n".to_owned(),
        format!("pinrange_remote_received_bytes_total {PART}\n"),
    ];
    // A client may have all of an answer a moment before that is counted.
    let all_counted = async {
        loop {
            let metrics = world.metrics().await;
            if counted.iter().all(|line| metrics.contains(line)) {
                return;
            }
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(20), all_counted).await;
    let metrics = world.metrics().await;
    assert!(in_time.is_ok(), "{counted:#?} in {metrics}");
    assert!(
        !metrics.contains("object"),
        "a key became a label: {metrics}"
    );
}
