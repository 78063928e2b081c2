//! Fills over a real disk tier and a remote that fails on request: who shares what, and what becomes of a
//! flight when its followers, the remote, the disk, a purge or the server's end come in between.
//!
//! Cancellation, each kind by its test: a follower among others leaves (`one_follower_of_two_leaves`), all leave
//! before the GET (`a_get_that_nobody_wants_is_not_made`), during it (`a_flight_goes_on_without_followers`), and when a
//! retry is due (`nothing_is_retried_for_nobody`); a purge (`a_purge_*`), the server's end
//! (`shutdown_keeps_whole_blocks`), a panic (`a_flight_that_panics_hangs_nobody`).
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod tiers;

use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::join_all;
use pinrange::disk::{DiskConfig, DiskError, DiskTier, FileExtent, MinFree, PurgeTarget, Step};
use pinrange::fill::{FillError, FillSettings, FillSource, Filler, Follow, Span};
use pinrange::object::{ObjectKey, Representation, Revision};
use pinrange::remote::fault::{Effect, FaultRemote, Gate, Op};
use pinrange::remote::memory::MemoryRemote;
use pinrange::remote::{Current, Remote, RemoteErrorKind, RemoteRead};
use pinrange::semantics::{ByteRange, RangeSpec};
use pinrange::telemetry::Metrics;
use tempfile::TempDir;

/// Two frames of the remote in memory.
const BLOCK: u64 = 128 * 1024;
const PART: u64 = 4 * BLOCK;

struct World {
    remote: Arc<FaultRemote<MemoryRemote>>,
    disk: Arc<DiskTier>,
    filler: Arc<Filler>,
    object: Bytes,
    source: FillSource,
    _dir: TempDir,
}

impl World {
    /// An object of `size` bytes, and room in the budget for `parts` of them at a time.
    fn new(size: u64, parts: u64) -> Self {
        Self::with(size, parts * PART, MinFree::Bytes(0))
    }

    fn with(size: u64, budget: u64, min_free: MinFree) -> Self {
        let dir = TempDir::new().unwrap();
        let disk = DiskTier::open(DiskConfig {
            dir: dir.path().join("cache"),
            capacity: 1 << 30,
            min_free,
            block_size: BLOCK,
            scrub_rate: 0,
        })
        .unwrap();
        let settings = FillSettings {
            part_size: NonZeroU64::new(PART).unwrap(),
            budget,
        };
        let filler = Filler::new(Arc::clone(&disk), settings, Metrics::default());
        let object = bytes(1, size);
        let memory = MemoryRemote::new();
        let known = memory.put("key", object.clone(), &[]);
        let remote = Arc::new(FaultRemote::new(memory));
        let source = source(&remote, known);
        Self {
            remote,
            disk,
            filler,
            object,
            source,
            _dir: dir,
        }
    }

    /// As a first pinned request has it: nothing is known but the validator.
    fn unknown(&self) -> FillSource {
        FillSource {
            known: None,
            ..self.source.clone()
        }
    }

    /// As who was told of an object of `size` bytes under the same validator.
    fn of_size(&self, size: u64) -> FillSource {
        let known = self.source.known.as_deref().unwrap();
        FillSource {
            known: Some(Arc::new(Representation {
                size,
                ..known.clone()
            })),
            ..self.source.clone()
        }
    }

    fn join(&self, start: u64, end: u64) -> Vec<Follow> {
        let held = self.filler.arrived(&self.source.revision);
        let want = Span { start, end };
        self.filler
            .join(&self.source, held.as_deref(), want, usize::MAX)
    }

    fn join_one(&self, start: u64, end: u64) -> Follow {
        let mut follows = self.join(start, end);
        assert_eq!(follows.len(), 1);
        follows.remove(0)
    }

    /// What a response would send of the range, from the disk and behind the cursors of `follows`.
    async fn send(&self, mut follows: Vec<Follow>, range: ByteRange) -> Result<Vec<u8>, FillError> {
        let mut sent = Vec::new();
        let mut rest = Some(range);
        while let Some(next) = rest {
            let held = self.filler.arrived(&self.source.revision);
            let extent = match held.map(|held| held.step(next)) {
                Some(Step::Present(extent)) => extent,
                Some(Step::Closed) => panic!("nothing closes files here"),
                Some(Step::Missing(_)) | None => {
                    let follow = follows
                        .iter_mut()
                        .find(|follow| {
                            follow.span().start <= next.start() && next.start() < follow.span().end
                        })
                        .expect("a flight brings what is missing");
                    let Some(extent) = follow.extent(next).await? else {
                        continue;
                    };
                    extent
                }
            };
            sent.extend(read(&extent));
            rest = next.from_offset(next.start() + extent.len());
        }
        Ok(sent)
    }

    async fn fetch(&self, start: u64, end: u64) -> Result<Vec<u8>, FillError> {
        self.send(self.join(start, end), range(start, end)).await
    }

    fn slice(&self, start: u64, end: u64) -> &[u8] {
        &self.object[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]
    }

    fn wants(&self) -> Vec<(u64, u64)> {
        let wants = self.remote.calls().into_iter().map(|call| match call.want {
            Some(RangeSpec::Closed { first, last }) => (first, last),
            other => panic!("fills read closed ranges, not {other:?}"),
        });
        wants.collect()
    }

    async fn purge(&self) {
        self.filler.forget(|_| true);
        let target = PurgeTarget::Key(self.source.revision.key.clone());
        self.disk.purge(target).await.unwrap();
    }

    /// The label with the first part's bytes.
    async fn read_first_part(&self) -> RemoteRead {
        let head = RangeSpec::Closed {
            first: 0,
            last: PART - 1,
        };
        self.read_current(Some(head)).await
    }

    async fn read_current(&self, want: Option<RangeSpec>) -> RemoteRead {
        match self.remote.read_current("key", want, None).await.unwrap() {
            Current::Read(read) => read,
            Current::NotModified { .. } => panic!("304 to no condition"),
        }
    }
}

fn source(remote: &Arc<FaultRemote<MemoryRemote>>, known: Representation) -> FillSource {
    FillSource {
        revision: Revision {
            key: ObjectKey::new(Arc::clone(remote.store()), "key"),
            validator: known.validator.clone(),
        },
        remote: Arc::clone(remote) as Arc<dyn Remote>,
        known: Some(Arc::new(known)),
        retries: 2,
    }
}

fn bytes(seed: u64, len: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words
        .flatten()
        .take(usize::try_from(len).unwrap())
        .collect()
}

fn range(start: u64, end: u64) -> ByteRange {
    let last = end - 1;
    RangeSpec::Closed { first: start, last }
        .resolve(end)
        .unwrap()
}

fn read(extent: &FileExtent) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(extent.len()).unwrap()];
    let file = extent.file().file();
    file.read_exact_at(&mut bytes, extent.offset()).unwrap();
    bytes
}

fn kind(error: &FillError) -> Option<&RemoteErrorKind> {
    match error {
        FillError::Remote(error) => Some(&error.kind),
        FillError::Disk(_) | FillError::Stopped => None,
    }
}

/// A hang is a failure, not a test that never ends.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_mins(1), what)
        .await
        .expect("hangs")
}

/// On the one worker of the test, everything that can go on without the blocking pool does.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn staggered_misaligned_and_overlapping_joins_share_every_byte() {
    let size = 41 * BLOCK + 777;
    let world = Arc::new(World::new(size, 3));
    let clients = (0..24_u64).map(|client| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let step = 3 * BLOCK / 2 + client * 40_009;
            let mut at = client * 219_001 % size;
            for _ in 0..=size / step {
                let end = (at + step).min(size);
                let sent = world.fetch(at, end).await.unwrap();
                assert!(sent == world.slice(at, end), "{at}..{end}");
                at = if end == size { 0 } else { end };
            }
        })
    });
    for client in soon(join_all(clients)).await {
        client.unwrap();
    }
    let world = &world;
    assert_eq!(world.remote.yielded(), size, "each byte once");
    let calls = world.remote.calls();
    assert!(calls.iter().all(|call| call.op == Op::Read), "all guarded");
    assert!(
        world.wants().iter().all(|(first, last)| {
            first.is_multiple_of(BLOCK) && last + 1 - first <= PART + 2 * BLOCK
        }),
        "of at most a part, and aligned"
    );
}

#[tokio::test]
async fn a_misaligned_part_is_one_get_and_wide_wants_are_cut_into_parts() {
    let world = World::new(20 * PART, 20);
    let one = world.join(BLOCK / 2, PART + BLOCK / 2);
    assert_eq!(one.len(), 1);
    assert_eq!(
        one[0].span(),
        Span {
            start: 0,
            end: PART + BLOCK
        }
    );
    let more = world.join(0, 4 * PART);
    assert!(more[0].collapsed && !more[1].collapsed);
    let spans: Vec<_> = more.iter().map(|follow| follow.span().end).collect();
    let cut = [1, 2, 3].map(|parts| parts * PART + BLOCK);
    assert_eq!(spans, [cut[0], cut[1], cut[2], 4 * PART]);
    // What is between two flights is one of its own.
    let far = world.join_one(6 * PART, 7 * PART);
    let between = world.join(4 * PART, 7 * PART);
    let starts: Vec<_> = between.iter().map(|follow| follow.span().start).collect();
    assert_eq!(starts, [4 * PART, 5 * PART, 6 * PART]);
    drop((one, more, far, between));
}

#[tokio::test]
async fn one_follower_of_two_leaves() {
    let world = World::new(PART, 1);
    let gate = Gate::new();
    let stall = Effect::Stall {
        at: BLOCK + 5,
        gate: gate.clone(),
    };
    world.remote.on(Op::Read, 1, stall);
    let mut leaver = world.join_one(0, PART);
    let stayer = world.join(0, PART);
    let seen = soon(leaver.extent(range(0, 10))).await.unwrap().unwrap();
    assert_eq!(read(&seen), world.slice(0, 10));
    gate.reached().await;
    drop(leaver);
    gate.open();
    let sent = soon(world.send(stayer, range(0, PART))).await.unwrap();
    assert!(sent == world.object);
    assert_eq!(world.wants(), [(0, PART - 1)]);
}

#[tokio::test]
async fn a_get_that_nobody_wants_is_not_made() {
    let world = World::new(3 * PART, 1);
    let gate = Gate::new();
    world.remote.on(Op::Read, 1, Effect::Hold(gate.clone()));
    let first = world.join(0, PART);
    soon(gate.reached()).await;
    // The budget is taken: these two wait for it.
    let left = world.join_one(PART, 2 * PART);
    let third = world.join(2 * PART, 3 * PART);
    settle().await;
    drop(left);
    settle().await;
    // It is not even remembered: who comes now is the first to ask.
    let again = world.join_one(PART, 2 * PART);
    assert!(!again.collapsed, "the flight that nobody wants has ended");
    drop(again);
    gate.open();
    soon(world.send(first, range(0, PART))).await.unwrap();
    // Waits are served in order, so the second would have had its turn before the third.
    soon(world.send(third, range(2 * PART, 3 * PART)))
        .await
        .unwrap();
    assert_eq!(world.wants(), [(0, PART - 1), (2 * PART, 3 * PART - 1)]);
    let late = soon(world.fetch(PART, 2 * PART)).await.unwrap();
    assert!(late == world.slice(PART, 2 * PART));
}

#[tokio::test]
async fn a_flight_goes_on_without_followers() {
    let world = World::new(PART, 1);
    let gate = Gate::new();
    let stall = Effect::Stall {
        at: BLOCK,
        gate: gate.clone(),
    };
    world.remote.on(Op::Read, 1, stall);
    drop(world.join_one(0, PART));
    // Dropped before its task ran: nothing was asked for.
    settle().await;
    assert_eq!(world.remote.count(Op::Read), 0);
    let mut follow = world.join_one(0, PART);
    soon(follow.answered()).await.unwrap();
    soon(gate.reached()).await;
    drop(follow);
    settle().await;
    gate.open();
    let sent = soon(world.fetch(0, PART)).await.unwrap();
    assert!(sent == world.object);
    assert_eq!(world.wants(), [(0, PART - 1)], "one GET");
}

#[tokio::test]
async fn nothing_is_retried_for_nobody() {
    let world = World::new(PART, 1);
    let gate = Gate::new();
    let at = 2 * BLOCK + 100;
    let stall = Effect::Stall {
        at,
        gate: gate.clone(),
    };
    world.remote.on(Op::Read, 1, stall);
    let cut = Effect::Cut {
        after: at,
        kind: RemoteErrorKind::Unavailable,
    };
    world.remote.on(Op::Read, 1, cut);
    let mut follow = world.join_one(0, PART);
    soon(follow.answered()).await.unwrap();
    soon(gate.reached()).await;
    drop(follow);
    gate.open();
    // Ends once the permit is back: a flight of the whole budget can begin.
    while !world.join(0, 1).is_empty() {
        tokio::task::yield_now().await;
    }
    let again = world.join_one(0, PART);
    assert!(!again.collapsed, "the flight has ended");
    assert_eq!(
        again.span().start,
        2 * BLOCK,
        "whole blocks stay, a started one does not"
    );
    let sent = soon(world.send(vec![again], range(0, PART))).await;
    assert!(sent.unwrap() == world.object);
    assert_eq!(world.wants(), [(0, PART - 1), (2 * BLOCK, PART - 1)]);
}

#[tokio::test]
async fn the_failure_of_the_first_answer_reaches_all_and_is_not_kept() {
    let world = World::new(PART, 1);
    for failure in [
        RemoteErrorKind::Mismatch,
        RemoteErrorKind::Forbidden,
        RemoteErrorKind::Protocol,
    ] {
        let nth = world.remote.count(Op::Read) + 1;
        let gate = Gate::new();
        world.remote.on(Op::Read, nth, Effect::Hold(gate.clone()));
        world
            .remote
            .on(Op::Read, nth, Effect::Fail(failure.clone()));
        let mut follows: Vec<_> = (0..8).map(|n| world.join_one(n * 1000, PART)).collect();
        gate.open();
        for follow in &mut follows {
            let Err(error) = soon(follow.answered()).await else {
                panic!("{failure:?} was an answer");
            };
            assert_eq!(kind(&error), Some(&failure));
        }
        assert_eq!(world.remote.count(Op::Read), nth);
    }
    assert!(soon(world.fetch(0, PART)).await.unwrap() == world.object);
}

#[tokio::test]
async fn a_reset_is_resumed_at_the_exact_offset_under_the_same_guard() {
    let world = World::new(PART, 1);
    let at = BLOCK + 12_345;
    let cut = |after| Effect::Cut {
        after,
        kind: RemoteErrorKind::Unavailable,
    };
    world.remote.on(Op::Read, 1, cut(at));
    world
        .remote
        .on(Op::Read, 2, Effect::Fail(RemoteErrorKind::Timeout));
    let sent = soon(world.fetch(0, PART)).await.unwrap();
    assert!(sent == world.object);
    assert_eq!(
        world.wants(),
        [(0, PART - 1), (at, PART - 1), (at, PART - 1)]
    );
    for call in world.remote.calls() {
        let guard = call.guard.expect("fills are guarded");
        assert_eq!(guard.validator, world.source.revision.validator);
    }
    assert_eq!(world.remote.yielded(), PART, "no byte twice");

    // Patience is for standing still: two retries are enough for three resets with a block each.
    let world = World::new(PART, 1);
    for nth in 1..=3 {
        world.remote.on(Op::Read, nth, cut(BLOCK));
    }
    assert!(soon(world.fetch(0, PART)).await.unwrap() == world.object);

    // Both used up: what has arrived is kept, what has not is refused.
    let world = World::new(PART, 1);
    world.remote.on(Op::Read, 1, cut(3 * BLOCK));
    world.remote.on(Op::Read, 2, cut(1));
    world.remote.on(Op::Read, 3, cut(1));
    let error = soon(world.fetch(0, PART)).await.unwrap_err();
    assert_eq!(kind(&error), Some(&RemoteErrorKind::Unavailable));
    assert_eq!(world.remote.count(Op::Read), 3);
    let held = world.filler.arrived(&world.source.revision).unwrap();
    let missing = held.first_missing(range(0, PART));
    assert_eq!(missing, Some(range(3 * BLOCK, PART)));
}

#[tokio::test]
async fn a_mismatch_on_resuming_ends_the_flight_and_mixes_nothing() {
    let world = World::new(PART, 1);
    let at = BLOCK + 1;
    let cut = Effect::Cut {
        after: at,
        kind: RemoteErrorKind::Unavailable,
    };
    world.remote.on(Op::Read, 1, cut);
    let bucket = world.remote.inner().clone();
    let other = bytes(2, PART);
    let replaced = other.clone();
    world.remote.on(
        Op::Read,
        2,
        Effect::run(move || {
            bucket.put("key", replaced, &[]);
        }),
    );
    let mut follow = world.join_one(0, PART);
    let mut seen = Vec::new();
    let error = loop {
        let next = range(seen.len() as u64, PART);
        match soon(follow.extent(next)).await {
            Ok(Some(extent)) => seen.extend(read(&extent)),
            Ok(None) => panic!("the flight cannot be whole"),
            Err(error) => break error,
        }
    };
    assert_eq!(kind(&error), Some(&RemoteErrorKind::Mismatch));
    assert!(seen == world.slice(0, seen.len() as u64));
    let held = world.filler.arrived(&world.source.revision).unwrap();
    assert_eq!(held.first_missing(range(0, PART)), Some(range(BLOCK, PART)));
}

/// P1: bytes of an object of another length are none of this one's, whoever fetches or holds them.
#[tokio::test]
async fn one_validator_for_two_lengths_is_a_lie_and_mixes_nothing() {
    for said in [PART - BLOCK, PART + BLOCK] {
        let world = World::new(PART, 2);
        let other = world.of_size(said);
        let all = Span {
            start: 0,
            end: said,
        };
        // One is fetched while the other is asked for.
        let gate = Gate::new();
        let stall = Effect::Stall {
            at: BLOCK,
            gate: gate.clone(),
        };
        world.remote.on(Op::Read, 1, stall);
        let first = world.filler.join(&world.unknown(), None, all, 1);
        soon(gate.reached()).await;
        let mut second = world.filler.join(&other, None, all, 1).remove(0);
        assert!(second.collapsed);
        for error in [
            soon(second.answered()).await.err(),
            soon(second.extent(range(0, 1))).await.err(),
        ] {
            let error = error.expect("these are not its bytes");
            assert_eq!(kind(&error), Some(&RemoteErrorKind::Protocol));
        }
        gate.open();
        let sent = soon(world.send(first, range(0, PART.min(said)))).await;
        assert!(sent.unwrap() == world.slice(0, PART.min(said)));
        drop(second);
        assert!(soon(world.fetch(0, PART)).await.unwrap() == world.object);

        // One is held: who asks for the other has S3 asked, which does not know that.
        let reads = world.remote.count(Op::Read);
        let behind = Span {
            start: said - BLOCK,
            end: said,
        };
        let mut follows = world.filler.join(&other, None, behind, 1);
        let error = soon(follows[0].answered()).await.err();
        let kind = error.as_ref().and_then(kind);
        let refused = matches!(
            kind,
            Some(RemoteErrorKind::Protocol | RemoteErrorKind::Unsatisfiable { .. })
        );
        assert!(refused, "{kind:?}");
        assert_eq!(world.remote.count(Op::Read), reads + 1);
        let held = world.filler.arrived(&world.source.revision).unwrap();
        assert_eq!(held.first_missing(range(0, PART)), None);
    }
}

#[tokio::test]
async fn the_budget_bounds_what_is_fetched_at_a_time() {
    let world = World::new(6 * PART, 2);
    let gates: Vec<_> = (1..=6)
        .map(|nth| {
            let gate = Gate::new();
            let stall = Effect::Stall {
                at: BLOCK,
                gate: gate.clone(),
            };
            world.remote.on(Op::Read, nth, stall);
            gate
        })
        .collect();
    let follows = world.join(0, 6 * PART);
    assert_eq!(follows.len(), 6);
    let sender = world.send(follows, range(0, 6 * PART));
    let opener = async {
        for (done, gate) in gates.iter().enumerate() {
            gate.reached().await;
            if let Some(next) = gates.get(done + 1) {
                next.reached().await;
            }
            settle().await;
            assert_eq!(
                world.remote.count(Op::Read),
                (done + 2).min(6),
                "two of a part at a time"
            );
            gate.open();
        }
    };
    let (sent, ()) = soon(async { tokio::join!(sender, opener) }).await;
    assert!(sent.unwrap() == world.object);
}

#[tokio::test]
async fn a_budget_smaller_than_a_part_still_lets_one_flight_go() {
    let world = World::with(3 * PART + 1, PART / 2, MinFree::Bytes(0));
    let sent = soon(world.fetch(0, 3 * PART + 1)).await.unwrap();
    assert!(sent == world.object);
}

/// However late one looks: what a flight was answered is known after its end as well.
#[tokio::test]
async fn a_flight_that_is_over_still_has_its_answer() {
    let world = World::new(PART, 8);
    let mut follow = world.join_one(0, PART);
    while soon(follow.extent(range(0, PART))).await.unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        soon(follow.answered())
            .await
            .unwrap()
            .held
            .representation()
            .size,
        PART
    );
}

#[tokio::test]
async fn a_labelled_read_is_kept_unless_others_have_its_bytes() {
    let world = World::new(8 * PART, 8);
    let era = world.filler.era();

    let mut adopted = world
        .filler
        .adopt(&world.source, world.read_first_part().await, era)
        .expect("nobody else fetches");
    assert!(soon(adopted.answered()).await.is_ok());
    let sent = soon(world.send(vec![adopted], range(0, PART))).await;
    assert!(sent.unwrap() == world.slice(0, PART));
    assert_eq!(world.remote.count(Op::Read), 0, "its own body was enough");

    let adopt = |read, era| world.filler.adopt(&world.source, read, era).is_some();
    assert!(
        !adopt(world.read_first_part().await, era),
        "the disk has the bytes"
    );
    let under_way = world.join_one(3 * PART + BLOCK, 4 * PART);
    let overlapping = Some(RangeSpec::Closed {
        first: 3 * PART,
        last: 4 * PART - 1,
    });
    assert!(
        !adopt(world.read_current(overlapping).await, era),
        "a flight fetches some of them"
    );
    assert!(
        !adopt(world.read_current(None).await, era),
        "longer than a part"
    );
    let purged_since = world.read_current(overlapping).await;
    drop(under_way);
    world.purge().await;
    assert!(!adopt(purged_since, era), "there was a purge meanwhile");
    let held = world.disk.load(&world.source.revision).await;
    assert!(held.is_none(), "what was purged stays away");
}

#[tokio::test]
async fn the_first_bytes_are_told_of_while_more_are_at_hand() {
    for head_comes_alone in [false, true] {
        let world = World::new(PART, 1);
        let mut read = world.read_first_part().await;
        let (seen, wait) = std::sync::mpsc::channel();
        let mut frames = 0;
        let mut body = read.body.inspect(move |_frame| {
            frames += 1;
            if frames == 2 {
                // All of it is at hand, and the thread that writes is held up here until somebody has the first frame.
                wait.recv_timeout(Duration::from_mins(1)).unwrap();
            }
        });
        let mut is_dry = head_comes_alone;
        read.body = futures::stream::poll_fn(move |cx| {
            if std::mem::take(&mut is_dry) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            body.poll_next_unpin(cx)
        })
        .boxed();
        let era = world.filler.era();
        let mut follow = world.filler.adopt(&world.source, read, era).unwrap();

        let extent = soon(follow.extent(range(0, PART))).await.unwrap().unwrap();
        assert!(extent.len() < PART);
        assert!(self::read(&extent) == world.slice(0, extent.len()));
        seen.send(()).unwrap();
        let sent = soon(world.send(vec![follow], range(0, PART))).await;
        assert!(sent.unwrap() == world.slice(0, PART));
    }
}

#[tokio::test]
async fn what_does_not_fill_a_step_is_told_of_when_the_remote_pauses() {
    let world = World::new(PART, 1);
    let (gate, at) = (Gate::new(), PART / 2 + BLOCK / 2 + 1);
    let stall = Effect::Stall {
        at,
        gate: gate.clone(),
    };
    world.remote.on(Op::Read, 1, stall);
    let follows = world.join(0, PART);
    let sent = soon(world.send(follows, range(0, at))).await.unwrap();
    assert!(sent == world.slice(0, at));
    let reads = world.remote.count(Op::Read);
    assert_eq!(reads, 1, "it was given up before its bytes were told of");
    gate.open();
    let sent = soon(world.fetch(0, PART)).await.unwrap();
    assert!(sent == world.slice(0, PART));
}

/// It never pauses for long, so a wait that begins anew with each frame would never end.
#[tokio::test]
async fn what_does_not_fill_a_step_is_told_of_while_the_remote_drips() {
    let world = World::new(PART, 1);
    let mut read = world.read_first_part().await;
    let (object, dripped) = (world.object.clone(), Arc::new(AtomicUsize::new(0)));
    let drips = Arc::clone(&dripped);
    read.body = futures::stream::unfold(0, move |at| {
        let (frame, drips) = (object.slice(at..at + 100), Arc::clone(&drips));
        async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drips.fetch_add(1, Ordering::Relaxed);
            Some((Ok(frame), at + 100))
        }
    })
    .boxed();
    let era = world.filler.era();
    let follow = world.filler.adopt(&world.source, read, era).unwrap();
    let sent = soon(world.send(vec![follow], range(0, 150))).await.unwrap();
    assert!(sent == world.slice(0, 150));
    // A tenth of what it takes to fill the shortest step.
    let drips = dripped.load(Ordering::Relaxed);
    assert!(drips < 65, "told after {drips} frames");
}

#[tokio::test]
async fn a_labelled_suffix_keeps_its_whole_blocks() {
    let size = 3 * BLOCK + 100;
    let world = World::new(size, 1);
    let read = world
        .read_current(Some(RangeSpec::Suffix(BLOCK + 150)))
        .await;
    let follow = world
        .filler
        .adopt(&world.source, read, world.filler.era())
        .unwrap();
    assert_eq!(
        follow.span(),
        Span {
            start: 2 * BLOCK,
            end: size
        }
    );
    let sent = soon(world.send(vec![follow], range(2 * BLOCK, size))).await;
    assert!(sent.unwrap() == world.slice(2 * BLOCK, size));
}

#[tokio::test]
async fn a_purge_lets_nothing_of_a_flight_be_kept() {
    // Before the answer, within a block, and at a block's end.
    for stall_at in [None, Some(BLOCK + 7), Some(2 * BLOCK)] {
        let world = World::new(PART, 1);
        let gate = Gate::new();
        let effect = match stall_at {
            None => Effect::Hold(gate.clone()),
            Some(at) => Effect::Stall {
                at,
                gate: gate.clone(),
            },
        };
        world.remote.on(Op::Read, 1, effect);
        let follow = world.join_one(0, PART);
        soon(gate.reached()).await;
        settle().await;
        world.purge().await;
        let after = world.join_one(0, PART);
        assert!(!after.collapsed, "a purged flight is not joined");
        drop(after);
        settle().await;
        gate.open();
        let error = soon(world.send(vec![follow], range(0, PART)))
            .await
            .unwrap_err();
        assert!(error.is_purged(), "{stall_at:?}: {error:?}");
        let held = world.disk.load(&world.source.revision).await;
        assert!(held.is_none(), "{stall_at:?}: found after the purge");
        let sent = soon(world.fetch(0, PART)).await.unwrap();
        assert!(sent == world.object, "the next one is kept again");
    }
}

#[tokio::test]
async fn shutdown_keeps_whole_blocks() {
    let world = World::new(PART, 1);
    let gate = Gate::new();
    let stall = Effect::Stall {
        at: 2 * BLOCK + 9,
        gate: gate.clone(),
    };
    world.remote.on(Op::Read, 1, stall);
    let mut follow = world.join_one(0, PART);
    while soon(follow.extent(range(2 * BLOCK, PART)))
        .await
        .unwrap()
        .is_none()
    {}
    let mut queued = world.join_one(0, PART);
    soon(world.filler.shutdown()).await;
    for follow in [&mut follow, &mut queued] {
        let Err(error) = soon(follow.answered()).await else {
            panic!("the flight went on");
        };
        assert!(matches!(error, FillError::Stopped));
    }
    let held = world.filler.arrived(&world.source.revision).unwrap();
    let missing = held.first_missing(range(0, PART));
    assert_eq!(missing, Some(range(2 * BLOCK, PART)));
    let error = soon(world.fetch(0, PART)).await.unwrap_err();
    assert!(
        matches!(error, FillError::Stopped),
        "nothing starts any more"
    );
}

#[tokio::test]
async fn the_size_may_be_learnt_from_the_answer() {
    let world = World::new(BLOCK + 10, 4);
    let want = Span {
        start: 0,
        end: PART,
    };
    let mut follows = world.filler.join(&world.unknown(), None, want, 1);
    assert!(soon(follows[0].answered()).await.is_ok());
    let held = world.filler.arrived(&world.source.revision).unwrap();
    assert_eq!(held.representation().size, BLOCK + 10);
    let sent = soon(world.send(follows, range(0, BLOCK + 10))).await;
    assert!(sent.unwrap() == world.object);
    assert_eq!(world.remote.yielded(), BLOCK + 10);

    // Wholly beyond the end.
    let beyond = Span {
        start: PART,
        end: 2 * PART,
    };
    world.purge().await;
    let mut follows = world.filler.join(&world.unknown(), None, beyond, 1);
    let Err(error) = soon(follows[0].answered()).await else {
        panic!("there are no such bytes");
    };
    let size = Some(BLOCK + 10);
    assert_eq!(kind(&error), Some(&RemoteErrorKind::Unsatisfiable { size }));
}

#[tokio::test]
async fn without_room_nothing_is_asked_for() {
    let world = World::with(PART, 4 * PART, MinFree::Percent(100.0));
    let error = soon(world.fetch(0, PART)).await.unwrap_err();
    assert!(
        matches!(&error, FillError::Disk(why) if matches!(**why, DiskError::NoRoom)),
        "{error:?}"
    );
    assert!(!error.is_purged());
    assert_eq!(world.remote.count(Op::Read), 0);
}

#[tokio::test]
async fn a_flight_that_panics_hangs_nobody() {
    let world = World::new(PART, 1);
    let broken = Effect::run(|| panic!("scripted by a test"));
    world.remote.on(Op::Read, 1, broken);
    let mut follow = world.join_one(0, PART);
    let Err(error) = soon(follow.answered()).await else {
        panic!("no answer came");
    };
    assert!(matches!(error, FillError::Stopped));
    let sent = soon(world.fetch(0, PART)).await.unwrap();
    assert!(sent == world.object, "the next one begins anew");
}
