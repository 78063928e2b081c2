//! Whole objects against the checksums that S3 has of them.

use std::time::Duration;

use pinrange::strict_s3::{Effect, Fault, LogEntry, Op};

use super::world::{BLOCK, PART, Setup, World, bytes, slice};

/// Nothing here takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(30);

async fn verifying() -> World {
    World::with(Setup {
        verify: true,
        ..Setup::default()
    })
    .await
}

fn heads(log: &[LogEntry]) -> usize {
    log.iter().filter(|entry| entry.op == Op::Head).count()
}

/// Waits until so many audits have come to `outcome`. A metric has no event to wait for.
async fn audited(world: &World, outcome: &str, times: u32) {
    let line = format!("pinrange_audits_total{{outcome=\"{outcome}\"}} {times}\n");
    let waited = tokio::time::timeout(PATIENCE, async {
        while !world.metrics().await.contains(&line) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "no {line}: {}", world.metrics().await);
}

/// One HEAD for a revision, once all of it is held, whatever becomes of its parts later.
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_object_costs_one_head() {
    let world = verifying().await;
    let object = bytes(40, 3 * PART + BLOCK + 17);
    let tag = world.put("object", &object);
    let range = format!("bytes=0-{}", PART - 1);
    let pinned = [("if-match", tag.as_str()), ("range", range.as_str())];
    assert_eq!(world.get("/m/object", &pinned).await.status, 206);
    world.replica.disk().flush().await.unwrap();
    assert_eq!(heads(&world.s3.take_log()), 0, "a part of it is no object");

    assert_eq!(world.get("/m/object", &[]).await.body, object);
    audited(&world, "match", 1).await;
    let log = world.s3.take_log();
    assert_eq!(heads(&log), 1, "{log:#?}");
    let head = log.iter().find(|entry| entry.op == Op::Head).unwrap();
    assert!(head.guarded, "{head:?}");

    // Warm, and after a restart: nothing is asked.
    let world = world.restart().await;
    assert_eq!(
        world.get("/m/object", &[("if-match", &tag)]).await.body,
        object
    );
    assert_eq!(world.s3.stats().requests, 0);
}

/// A byte that changed between S3 and us: whoever was served meanwhile has it, but nobody after.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_was_uploaded_is_dropped() {
    let world = verifying().await;
    let object = bytes(42, 2 * PART);
    let tag = world.put("object", &object);
    world
        .s3
        .script(Fault::new(Effect::FlipByte { at: 4711 }).on(Op::Get).nth(2));
    let answer = world.get("/m/object", &[]).await;
    assert_ne!(answer.body, object, "the fault did not happen");
    audited(&world, "mismatch", 1).await;

    world.s3.clear_log();
    let answer = world.get("/m/object", &[("if-match", &tag)]).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert_eq!(answer.body, object);
    audited(&world, "match", 1).await;
    let log = world.s3.log();
    let gets = log.iter().filter(|entry| entry.op == Op::Get).count();
    assert_eq!((gets, heads(&log)), (2, 1), "all of it again: {log:#?}");
}

/// What was replaced meanwhile cannot be compared, and is served all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_object_is_not_compared_with_its_successor() {
    let world = verifying().await;
    let object = bytes(43, PART);
    let tag = world.put("object", &object);
    let other = super::replace("object", &bytes(44, PART));
    world
        .s3
        .script(Fault::new(Effect::Before(other)).on(Op::Head));
    assert_eq!(world.get("/m/object", &[]).await.body, object);
    audited(&world, "gone", 1).await;
    world.s3.clear_log();
    let answer = world
        .get("/m/object", &[("if-match", &tag), ("range", "bytes=5-99")])
        .await;
    assert_eq!(answer.body, slice(&object, 5, 100));
    assert_eq!(world.s3.stats().requests, 0);
}

/// Trouble with the HEAD is nobody's trouble: it is made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_fails_is_made_again() {
    let world = verifying().await;
    let object = bytes(45, PART);
    world.put("object", &object);
    world
        .s3
        .script(Fault::new(Effect::SlowDown { retry_after: None }).on(Op::Head));
    assert_eq!(world.get("/m/object", &[]).await.body, object);
    audited(&world, "match", 1).await;
    assert_eq!(heads(&world.s3.log()), 2);
}
