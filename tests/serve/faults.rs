//! An S3 that fails, and clients that are not to notice.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use pinrange::config::DEFAULT_RETRIES;
use pinrange::strict_s3::{Effect, Fault, LogEntry, Op, RequestInfo};

use super::world::{Answer, PART, Setup, World, bytes, slice};

async fn patient() -> World {
    World::with(Setup {
        retries: DEFAULT_RETRIES,
        ..Setup::default()
    })
    .await
}

/// Of ten answers three fail: a reset or an end within the body, a stall, a 503, a 500. By the number of the
/// request, so that a run can be repeated.
fn three_in_ten(sequence: u64, seed: u64) -> Vec<Effect> {
    let mut z = (sequence ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 31;
    let at = (z >> 8) % 400_000;
    let effect = match z % 100 {
        0..8 => Effect::ResetAfter { bytes: at },
        8..14 => Effect::CloseAfter { bytes: at },
        14..18 => Effect::StallAfter {
            bytes: at,
            duration: None,
        },
        18..25 => Effect::SlowDown { retry_after: None },
        25..30 => Effect::InternalError,
        _ => return Vec::new(),
    };
    vec![effect]
}

/// Whether a body of an object of `size` bytes was not sent to its end.
fn ends_short(entry: &LogEntry, size: usize) -> bool {
    let range = entry.range.as_deref().and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?))
    });
    let answered = range.filter(|_| entry.status == Some(206));
    answered.is_some_and(|(first, last)| entry.body_bytes < (last + 1).min(size as u64) - first)
}

struct Object {
    path: String,
    tag: String,
    bytes: Bytes,
}

impl Object {
    fn check(&self, answer: &Answer, start: u64, end: u64, what: &str) {
        let path = &self.path;
        assert!(
            matches!(answer.status, 200 | 206),
            "{what} {path} {start}..{end}: {} {}",
            answer.status,
            String::from_utf8_lossy(&answer.body)
        );
        assert!(!answer.cut, "{what} {path} {start}..{end} was cut");
        assert!(
            answer.body == slice(&self.bytes, start, end),
            "{what} {path}"
        );
    }

    /// In ranges that fit no part, out of order, pinned.
    async fn download(&self, world: &World, step: u64, what: &str) {
        let size = self.bytes.len() as u64;
        let mut starts: Vec<_> = (0..size.div_ceil(step)).map(|nth| nth * step).collect();
        starts.reverse();
        join_all(starts.into_iter().map(async |start| {
            let end = (start + step).min(size);
            let range = format!("bytes={start}-{}", end - 1);
            let headers = [("if-match", self.tag.as_str()), ("range", range.as_str())];
            let answer = world.get(&self.path, &headers).await;
            self.check(&answer, start, end, what);
        }))
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_faults_in_ten_answers_reach_no_client() {
    let world = patient().await;
    let object = |key: String, seed, size| {
        let bytes = bytes(seed, size);
        let tag = world.put(&key, &bytes);
        Object {
            path: format!("/m/{key}"),
            tag,
            bytes,
        }
    };
    let small: Vec<_> = (0..96)
        .map(|n| object(format!("small-{n}"), 100 + n, 400_000 + 1_000 * n))
        .collect();
    let wide: Vec<_> = (0..3)
        .map(|n| object(format!("wide-{n}"), 200 + n, 4 * PART + n))
        .collect();
    let unique: usize = small
        .iter()
        .chain(&wide)
        .map(|object| object.bytes.len())
        .sum();
    world.s3.clear_log();
    let hook = |request: &RequestInfo| three_in_ten(request.sequence, 11);
    world.s3.on_request(Some(Box::new(hook)));

    // Cold, by sixteen clients at a time: pinned ranges, and whole objects without a pin.
    let next = AtomicUsize::new(0);
    let clients = (0..16).map(async |_| {
        while let Some(object) = small.get(next.fetch_add(1, Ordering::Relaxed)) {
            if object.bytes.len() % 2_000 == 0 {
                let answer = world.get(&object.path, &[]).await;
                object.check(&answer, 0, object.bytes.len() as u64, "unpinned");
            } else {
                object.download(&world, 150_001, "cold").await;
            }
        }
    });
    // Wide, by two clients each: one in one response, one in many.
    let whole = wide.iter().map(async |object| {
        let answer = world
            .get(&object.path, &[("if-match", object.tag.as_str())])
            .await;
        object.check(&answer, 0, object.bytes.len() as u64, "wide");
    });
    let ranges = wide
        .iter()
        .map(async |object| object.download(&world, 700_001, "wide").await);
    tokio::join!(join_all(clients), join_all(whole), join_all(ranges));

    let log = world.s3.log();
    let failed = log.iter().filter(|entry| !entry.faults.is_empty()).count();
    assert!(
        failed * 5 >= log.len() && failed > 20,
        "{failed} of {} answers failed",
        log.len()
    );
    let kinds: HashSet<_> = log.iter().flat_map(|entry| &entry.faults).collect();
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    // What stalls or breaks is left behind with its connection.
    let size = |key: &str| {
        let mut objects = small.iter().chain(&wide);
        let object = objects.find(|object| object.path[3..] == *key);
        object.expect("it was asked for").bytes.len()
    };
    for broken in log
        .iter()
        .filter(|entry| ends_short(entry, size(&entry.key)))
    {
        let again = log.iter().find(|later| {
            later.sequence > broken.sequence && later.connection == broken.connection
        });
        assert!(again.is_none(), "{broken:?}, then {again:?}");
    }
    let sent = world.s3.stats().body_bytes_sent;
    println!(
        "{failed} of {} answers failed; S3 sent {sent} bytes for {unique}",
        log.len()
    );
    assert!(
        sent * 100 <= unique as u64 * 105,
        "S3 sent {sent} bytes for {unique}"
    );

    // Warm: nobody is asked.
    world.s3.clear_log();
    for object in &wide {
        object.download(&world, 700_001, "warm").await;
    }
    assert_eq!(world.s3.stats().gets, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_s3_is_no_storm_of_ours() {
    const CLIENTS: u64 = 300;
    /// What may be tried again before the budget is empty.
    const BURST: u64 = 100;
    let world = patient().await;
    let tag = world.put("object", &bytes(41, PART));
    world.s3.clear_log();
    world
        .s3
        .script(Fault::new(Effect::InternalError).times(u64::MAX));
    let clients = (0..CLIENTS).map(async |n| {
        let path = format!("/m/key-{n}");
        world.get(&path, &[("if-match", "\"pin\"")]).await
    });
    for answer in join_all(clients).await {
        assert_eq!(answer.status, 503);
        assert!(!answer.header("retry-after").is_empty());
    }
    let asked = world.s3.stats().requests;
    assert!(
        (CLIENTS..=CLIENTS + BURST).contains(&asked),
        "{asked} requests for {CLIENTS} clients"
    );
    world.s3.clear_faults();
    let answer = world.get("/m/object", &[("if-match", &tag)]).await;
    assert_eq!(answer.status, 200, "what is over is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_is_left_alone_for_as_long_as_it_asks() {
    let world = World::with(Setup {
        fresh_for: Duration::ZERO,
        retries: DEFAULT_RETRIES,
        ..Setup::default()
    })
    .await;
    let (held, cold) = (bytes(42, 1_000), bytes(43, 1_000));
    let (held_tag, cold_tag) = (world.put("held", &held), world.put("cold", &cold));
    assert_eq!(world.get("/m/held", &[]).await.status, 200);
    world.s3.clear_log();
    let retry_after = Some(30);
    world
        .s3
        .script(Fault::new(Effect::SlowDown { retry_after }));
    let first = world.get("/m/cold", &[("if-match", &cold_tag)]).await;
    assert_eq!((first.status, first.header("retry-after")), (503, "30"));
    for (path, tag) in [("/m/cold", cold_tag.as_str()), ("/m/other", "\"x\"")] {
        let answer = world.get(path, &[("if-match", tag)]).await;
        assert_eq!(answer.status, 503);
        let rest: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=30).contains(&rest), "{rest}");
    }
    // What is held is served meanwhile, pinned and, marked, unpinned.
    let pinned = world.get("/m/held", &[("if-match", &held_tag)]).await;
    assert!(pinned.status == 200 && pinned.body == held);
    let unpinned = world.get("/m/held", &[]).await;
    assert!(unpinned.status == 200 && unpinned.body == held);
    assert!(unpinned.header("cache-status").contains("stale"));
    assert_eq!(world.s3.stats().requests, 1, "and S3 was left alone");
    let metrics = world.metrics().await;
    assert!(metrics.contains("pinrange_remotes_silent 1\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_head_is_answered_by_another_request() {
    let world = World::new().await;
    world.s3.set_first_byte_delay(Duration::from_millis(20));
    let object = bytes(44, 1_000);
    let read = async |key: String| {
        let tag = world.put(&key, &object);
        let answer = world.get(&format!("/m/{key}"), &[("if-match", &tag)]).await;
        assert!(answer.status == 200 && answer.body == object);
    };
    // What is usual has to be known first, and some reads pay for one more.
    for batch in 0..10 {
        join_all((0..16).map(|n| read(format!("usual-{batch}-{n}")))).await;
    }
    // Longer than the time after which it would be given up and tried again.
    let late = Effect::Delay(Duration::from_mins(10));
    world.s3.script(Fault::new(late).on(Op::Get).key("late"));
    let mut answered = std::pin::pin!(read("late".to_owned()));
    let mut others = 0;
    while tokio::time::timeout(Duration::from_millis(1), &mut answered)
        .await
        .is_err()
    {
        others += 1;
        read(format!("other-{others}")).await;
    }
    let gets: Vec<_> = world
        .s3
        .log()
        .into_iter()
        .filter(|entry| entry.key == "late")
        .collect();
    assert!(gets.len() == 2 && gets.iter().all(|get| get.guarded));
    let metrics = world.metrics().await;
    assert!(
        metrics.contains("result=\"called_off\"}") && !metrics.contains("result=\"timeout\"}"),
        "{metrics}"
    );
}
