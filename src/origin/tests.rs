//! In virtual time: what takes hours here takes none, and no machine is too slow.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};

use super::*;
use crate::remote::fault::{Effect, FaultRemote, Op};
use crate::remote::memory::MemoryRemote;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const KIB: u64 = 1024;

/// What a read has in store.
#[derive(Clone, Copy)]
struct Course {
    head: Duration,
    /// Bytes of a frame, and how long each takes.
    frame: usize,
    every: Duration,
    /// After so many bytes nothing comes any more.
    silent_after: u64,
}

impl Default for Course {
    fn default() -> Self {
        Self {
            head: Duration::ZERO,
            frame: 16 * 1024,
            every: Duration::ZERO,
            silent_after: u64::MAX,
        }
    }
}

impl Course {
    fn head(head: Duration) -> Self {
        Self {
            head,
            ..Self::default()
        }
    }

    fn pace(frame: usize, every: Duration) -> Self {
        Self {
            frame,
            every,
            ..Self::default()
        }
    }
}

/// A bucket whose `nth` read (from 1) takes the course it is told.
struct Paced {
    memory: MemoryRemote,
    course: Box<dyn Fn(usize) -> Course + Send + Sync>,
    reads: AtomicUsize,
    wants: Mutex<Vec<RangeSpec>>,
    /// Its clones are the reads under way.
    live: Arc<()>,
}

impl Paced {
    fn new(course: impl Fn(usize) -> Course + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            memory: MemoryRemote::new(),
            course: Box::new(course),
            reads: AtomicUsize::new(0),
            wants: Mutex::default(),
            live: Arc::new(()),
        })
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }
}

impl Remote for Paced {
    fn store(&self) -> &Arc<str> {
        self.memory.store()
    }

    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>> {
        self.memory.stat(key, pin)
    }

    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>> {
        async move {
            let nth = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
            self.wants.lock().push(want);
            let live = Arc::clone(&self.live);
            let course = (self.course)(nth);
            tokio::time::sleep(course.head).await;
            let read = self.memory.read(guard, want).await?;
            drop(live);
            Ok(RemoteRead {
                body: paced(read.body, course),
                ..read
            })
        }
        .boxed()
    }

    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<crate::object::Checksum>, RemoteError>> {
        self.memory.checksums(guard)
    }

    fn read_current<'a>(
        &'a self,
        key: &'a str,
        want: Option<RangeSpec>,
        unless: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Current, RemoteError>> {
        self.memory.read_current(key, want, unless)
    }
}

fn paced(
    body: BoxStream<'static, Result<Bytes, RemoteError>>,
    course: Course,
) -> BoxStream<'static, Result<Bytes, RemoteError>> {
    stream::unfold(
        (body, Bytes::new(), 0),
        move |(mut body, mut rest, sent)| async move {
            if rest.is_empty() {
                rest = body.next().await?.expect("memory does not fail");
            }
            if sent >= course.silent_after {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(course.every).await;
            let frame = rest.split_to(rest.len().min(course.frame));
            let sent = sent + frame.len() as u64;
            Some((Ok(frame), (body, rest, sent)))
        },
    )
    .boxed()
}

/// Numbers below `1_000_000`, the same for a seed.
fn random(seed: u64, nth: usize) -> u64 {
    let mut z = seed ^ (nth as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % 1_000_000
}

fn put(memory: &MemoryRemote, size: u64) -> (Bytes, Guard) {
    let object: Bytes = (0..size).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let stored = memory.put("key", object.clone(), &[]);
    let guard = Guard {
        key: "key".into(),
        validator: stored.validator,
        version_id: None,
        size: None,
    };
    (object, guard)
}

fn origin_of<R: Remote>(remote: &Arc<R>, retries: u32) -> Origin {
    let remote = Arc::clone(remote) as Arc<dyn Remote>;
    Origins::new(Metrics::default()).origin(&remote, retries)
}

async fn whole(origin: &Origin, guard: &Guard, size: u64) -> Result<Vec<u8>, RemoteError> {
    let mut download = origin.download(guard.clone(), 0, size, ALWAYS).await?;
    let mut bytes = Vec::new();
    loop {
        let frames = download.frames(16, ALWAYS).await?;
        if frames.is_empty() {
            return Ok(bytes);
        }
        bytes.extend(frames.concat());
    }
}

fn metric(origin: &Origin, name: &str) -> u64 {
    let text = origin.origins.metrics.encode(None);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.map_or(0, |value| value.trim().parse().unwrap())
}

const ONE: RangeSpec = RangeSpec::Closed { first: 0, last: 0 };

/// Reads that one in `1_000_000 / slow` times take two seconds more than 20 to 60 ms: the times they took, sorted,
/// and what was sent.
async fn cold_reads(count: usize, slow: u64, seed: u64) -> (Vec<Duration>, usize, Origin) {
    let remote = Paced::new(move |nth| {
        let late = random(seed, nth) < slow;
        let jitter = u32::try_from(random(!seed, nth) / 25_000).unwrap();
        Course::head(MS * 20 + MS * jitter + if late { 2 * SECOND } else { Duration::ZERO })
    });
    let (_, guard) = put(&remote.memory, 1);
    let origin = origin_of(&remote, 0);
    let mut times = Vec::with_capacity(count);
    for nth in 1..=count {
        let asked = Instant::now();
        origin.read(&guard, ONE).await.unwrap();
        times.push(asked.elapsed());
        if nth == ENOUGH_READS as usize {
            assert_eq!(remote.reads(), nth, "too little was known to be late");
        }
    }
    assert_eq!(Arc::strong_count(&remote.live), 1, "losers were called off");
    times.sort_unstable();
    let reads = remote.reads();
    (times, reads, origin)
}

#[tokio::test(start_paused = true)]
async fn one_late_head_in_a_hundred_is_not_noticed() {
    const READS: usize = 20_000;
    let (healthy, sent, _) = cold_reads(READS / 10, 0, 7).await;
    let healthy_median = healthy[healthy.len() / 2];
    assert!(sent <= healthy.len() * 51 / 50);
    for seed in [1, 2] {
        let (times, sent, origin) = cold_reads(READS, 10_000, seed).await;
        let late = times[READS - READS / 1_000];
        println!("p99.9 {late:?}, healthy median {healthy_median:?}, {sent} requests for {READS}");
        assert!(
            late <= 5 * healthy_median,
            "p99.9 {late:?}, healthy median {healthy_median:?}"
        );
        assert!(sent <= READS * 51 / 50, "{sent} requests for {READS}");
        let hedged = metric(&origin, "pinrange_remote_hedges_sent_total");
        let won = metric(&origin, "pinrange_remote_hedges_won_total");
        assert_eq!(hedged, (sent - READS) as u64);
        assert!(won * 2 > hedged, "{won} of {hedged} were of use");
    }
}

#[tokio::test(start_paused = true)]
async fn many_late_heads_neither_poison_the_trigger_nor_double_the_load() {
    let (_, sent, origin) = cold_reads(5_000, 100_000, 3).await;
    assert!(sent <= 5_000 * 51 / 50, "{sent} requests");
    let late = origin.store.late().unwrap();
    assert!(late < 150 * MS, "{late:?} is one of the late");
}

/// After as many reads of 20 ms as have to be seen; two hedges are paid for.
async fn warm(faults: &Arc<FaultRemote<MemoryRemote>>) -> (Origin, Guard, usize) {
    let (_, guard) = put(faults.inner(), 10);
    let origin = origin_of(faults, 0);
    let warm = usize::try_from(ENOUGH_READS).unwrap();
    for nth in 1..=warm {
        faults.on(Op::Read, nth, Effect::Delay(20 * MS));
        origin.read(&guard, ONE).await.unwrap();
    }
    (origin, guard, warm)
}

#[tokio::test(start_paused = true)]
async fn the_quick_answer_wins_and_the_late_one_is_remembered() {
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (origin, guard, warm) = warm(&faults).await;
    let seen = || origin.store.first_byte.lock().count();
    assert_eq!(seen(), ENOUGH_READS);
    faults.on(Op::Read, warm + 1, Effect::Delay(2 * SECOND));
    let asked = Instant::now();
    origin.read(&guard, ONE).await.unwrap();
    assert!(asked.elapsed() < 30 * MS, "{:?}", asked.elapsed());
    assert_eq!(faults.count(Op::Read), warm + 2);
    let late = origin.store.first_byte.lock().quantile(1_000);
    assert!(seen() == ENOUGH_READS + 1 && late >= 22 * MS);
    // Not while it wants to be left alone.
    faults.on(Op::Read, warm + 3, Effect::Delay(2 * SECOND));
    let late = origin.read(&guard, ONE);
    let silence = async {
        faults.called(Op::Read, warm + 3).await;
        let until = Instant::now() + 5 * SECOND;
        *origin.store.silent_until.lock() = Some(until);
    };
    let (answer, ()) = tokio::join!(late, silence);
    answer.unwrap();
    assert_eq!(faults.count(Op::Read), warm + 3);
}

#[tokio::test(start_paused = true)]
async fn a_hedge_that_fails_changes_nothing() {
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (origin, guard, warm) = warm(&faults).await;
    let slow = || Effect::Delay(SECOND);
    let fail = |kind| Effect::Fail(kind);
    // The hedge fails, then the first answers.
    faults.on(Op::Read, warm + 1, slow());
    faults.on(Op::Read, warm + 2, fail(RemoteErrorKind::Unavailable));
    let asked = Instant::now();
    origin.read(&guard, ONE).await.unwrap();
    assert_eq!(asked.elapsed().as_secs(), 1, "it was waited for");
    // The first fails, then the hedge answers.
    faults.on(Op::Read, warm + 3, Effect::Delay(100 * MS));
    faults.on(Op::Read, warm + 3, fail(RemoteErrorKind::Unavailable));
    faults.on(Op::Read, warm + 4, Effect::Delay(200 * MS));
    origin.read(&guard, ONE).await.unwrap();
    assert_eq!(faults.count(Op::Read), warm + 4);
    // Both of what could be saved up is spent: the next waits.
    faults.on(Op::Read, warm + 5, slow());
    origin.read(&guard, ONE).await.unwrap();
    assert_eq!(faults.count(Op::Read), warm + 5);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_silent_or_drips_is_resumed_elsewhere() {
    let silent = Course {
        silent_after: 48 * KIB,
        ..Course::default()
    };
    // A KiB each 50 ms: never silent for long, and 20 KiB a second.
    let drips = Course::pace(1024, 50 * MS);
    for (course, least) in [(silent, 48 * KIB), (drips, 30 * KIB)] {
        let remote = Paced::new(move |nth| if nth == 1 { course } else { Course::default() });
        let size = 1024 * KIB;
        let (object, guard) = put(&remote.memory, size);
        let origin = origin_of(&remote, 1);
        let asked = Instant::now();
        assert!(whole(&origin, &guard, size).await.unwrap() == object);
        assert!(asked.elapsed() < 3 * SECOND, "{:?}", asked.elapsed());
        assert!(asked.elapsed() >= 2 * SECOND, "given up before the floor");
        let wants = remote.wants.lock().clone();
        let [_, RangeSpec::Closed { first, last }] = wants[..] else {
            panic!("{wants:?}");
        };
        assert!((least..=48 * KIB).contains(&first) && last == size - 1);
        assert_eq!(metric(&origin, "pinrange_remote_stalls_total"), 1);
        let resumed = "pinrange_remote_resumes_total{reason=\"stall\"}";
        assert_eq!(metric(&origin, resumed), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn stalls_do_not_make_for_more_patience_with_stalls() {
    // Of bodies of one window, one in five.
    let remote = Paced::new(|nth| Course {
        silent_after: if nth % 5 == 0 { 0 } else { u64::MAX },
        ..Course::default()
    });
    let (object, guard) = put(&remote.memory, 64 * KIB);
    let origin = origin_of(&remote, 1);
    for _ in 0..200 {
        assert!(whole(&origin, &guard, 64 * KIB).await.unwrap() == object);
    }
    assert!(metric(&origin, "pinrange_remote_stalls_total") >= 40);
    assert_eq!(origin.store.stall_limit(), download::SHORTEST_STALL);
}

#[tokio::test(start_paused = true)]
async fn slow_is_no_stall_where_all_are_slow() {
    // 64 KiB take five seconds, on each connection.
    let remote = Paced::new(|_| Course::pace(4096, SECOND * 5 / 16));
    let size = 1024 * KIB;
    let (object, guard) = put(&remote.memory, size);
    let origin = origin_of(&remote, 8);
    assert!(whole(&origin, &guard, size).await.unwrap() == object);
    assert!(remote.reads() <= 4, "{} GETs", remote.reads());
    // But no window is waited for without end.
    let dead = Paced::new(|_| Course {
        silent_after: 0,
        ..Course::default()
    });
    let (_, guard) = put(&dead.memory, size);
    let origin = origin_of(&dead, 8);
    let asked = Instant::now();
    let error = whole(&origin, &guard, size).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout);
    assert!(asked.elapsed() < 9 * 35 * SECOND, "{:?}", asked.elapsed());
}

/// As on a full uplink: the budget is for a few retries, and not one of them would mend anything.
#[tokio::test(start_paused = true)]
async fn slow_is_kept_where_all_are_slow_and_no_retry_is_left() {
    // 64 KiB take six and a half seconds, on each connection.
    let remote = Paced::new(|_| Course::pace(1000, 100 * MS));
    let size = 200 * KIB;
    let (object, guard) = put(&remote.memory, size);
    let origin = origin_of(&remote, 8);
    let downloads = (0..400).map(|_| whole(&origin, &guard, size));
    for bytes in futures::future::join_all(downloads).await {
        assert!(bytes.unwrap() == object);
    }
    assert!(metric(&origin, "pinrange_remote_stalls_total") > u64::from(RETRY_BURST));
}

#[tokio::test(start_paused = true)]
async fn a_slow_taker_is_no_stall() {
    let remote = Paced::new(|_| Course::pace(4096, 10 * MS));
    let (object, guard) = put(&remote.memory, 100 * KIB);
    let origin = origin_of(&remote, 0);
    let mut download = origin.download(guard, 0, 100 * KIB, ALWAYS).await.unwrap();
    let mut bytes = Vec::new();
    while bytes.len() < object.len() {
        tokio::time::sleep(60 * SECOND).await;
        bytes.extend(download.frames(1, ALWAYS).await.unwrap().concat());
    }
    assert!(bytes == object);
    assert!(download.frames(1, ALWAYS).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_no_storm() {
    const REQUESTS: usize = 1_000;
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (_, guard) = put(faults.inner(), 10);
    let origin = origin_of(&faults, 8);
    faults.outage(Some(RemoteErrorKind::Unavailable));
    for nth in 0..REQUESTS {
        let asked = Instant::now();
        origin.read(&guard, ONE).await.unwrap_err();
        if nth > RETRY_BURST as usize {
            assert_eq!(
                asked.elapsed(),
                Duration::ZERO,
                "the client is told at once"
            );
        }
    }
    let sent = faults.count(Op::Read);
    assert_eq!(sent, REQUESTS + RETRY_BURST as usize);
    // It is the replica's budget: other callers find it empty as well, and answers fill it again.
    let stat = origin.stat("key", None).await;
    assert!(stat.is_err() && faults.count(Op::Stat) == 1);
    faults.outage(None);
    for _ in 0..ANSWERS_PER_RETRY {
        origin.stat("key", None).await.unwrap();
    }
    faults.on(
        Op::Read,
        sent + 1,
        Effect::Fail(RemoteErrorKind::Unavailable),
    );
    origin.read(&guard, ONE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn three_failures_in_ten_are_all_mended() {
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (_, guard) = put(faults.inner(), 10);
    let origin = origin_of(&faults, 8);
    for nth in 1..=4_000 {
        if random(5, nth) < 300_000 {
            let kind = match nth % 2 {
                0 => RemoteErrorKind::Unavailable,
                _ => RemoteErrorKind::Throttled { retry_after: None },
            };
            faults.on(Op::Read, nth, Effect::Fail(kind));
        }
    }
    while faults.count(Op::Read) < 4_000 {
        origin.read(&guard, ONE).await.unwrap();
    }
    assert_eq!(metric(&origin, "pinrange_remote_retries_refused_total"), 0);
}

fn throttled(seconds: f64) -> Effect {
    Effect::Fail(RemoteErrorKind::Throttled {
        retry_after: Some(Duration::from_secs_f64(seconds)),
    })
}

fn told(result: Result<impl std::fmt::Debug, RemoteError>) -> Duration {
    match result.unwrap_err().kind {
        RemoteErrorKind::Throttled {
            retry_after: Some(wait),
        } => wait,
        kind => panic!("{kind:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_asks_for_it_is_left_alone() {
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (_, guard) = put(faults.inner(), 10);
    let origin = origin_of(&faults, 3);
    // For less than a second: waited for, by all who ask.
    faults.on(Op::Read, 1, throttled(0.8));
    let asked = Instant::now();
    let (first, second) = tokio::join!(origin.read(&guard, ONE), async {
        faults.called(Op::Read, 1).await;
        tokio::time::sleep(MS).await;
        origin.stat("key", None).await
    });
    first.unwrap();
    second.unwrap();
    assert!(asked.elapsed() >= 800 * MS);
    assert_eq!((faults.count(Op::Read), faults.count(Op::Stat)), (2, 1));

    // For longer: everybody is told, and nobody asks.
    faults.on(Op::Read, 3, throttled(7.0));
    let asked = Instant::now();
    assert_eq!(told(origin.read(&guard, ONE).await), 7 * SECOND);
    tokio::time::sleep(2 * SECOND).await;
    let rest = told(origin.read(&guard, ONE).await);
    assert!(rest > 4 * SECOND && rest <= 5 * SECOND, "{rest:?}");
    told(origin.stat("key", None).await);
    assert_eq!((faults.count(Op::Read), faults.count(Op::Stat)), (3, 1));
    assert_eq!(metric(&origin, "pinrange_remote_spared_total"), 2);
    assert_eq!(metric(&origin, "pinrange_remotes_silent"), 1);
    tokio::time::sleep_until(asked + 7 * SECOND).await;
    origin.read(&guard, ONE).await.unwrap();
    assert_eq!(metric(&origin, "pinrange_remotes_silent"), 0);

    // For years: the client is told so, but the store is asked again after a minute.
    faults.on(Op::Read, 5, throttled(1e9));
    assert!(told(origin.read(&guard, ONE).await) > 1_000_000 * SECOND);
    assert!(told(origin.read(&guard, ONE).await) <= LEFT_ALONE);
    tokio::time::sleep(LEFT_ALONE).await;
    origin.read(&guard, ONE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn in_the_middle_of_a_body_silence_is_waited_out_for_longer() {
    for (asked_for, mended) in [(8.0, true), (11.0, false)] {
        let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
        let size = 300 * KIB;
        let (object, guard) = put(faults.inner(), size);
        let origin = origin_of(&faults, 3);
        let cut = Effect::Cut {
            after: 100 * KIB,
            kind: RemoteErrorKind::Unavailable,
        };
        faults.on(Op::Read, 1, cut);
        faults.on(Op::Read, 2, throttled(asked_for));
        let asked = Instant::now();
        let bytes = whole(&origin, &guard, size).await;
        assert_eq!(bytes.is_ok(), mended, "{asked_for} s");
        if mended {
            assert!(bytes.unwrap() == object && asked.elapsed() >= 8 * SECOND);
            assert_eq!(faults.yielded(), size, "no byte twice");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_is_not_tried_again() {
    let faults = Arc::new(FaultRemote::new(MemoryRemote::new()));
    let (_, guard) = put(faults.inner(), 300 * KIB);
    let origin = origin_of(&faults, 3);
    let cut = Effect::Cut {
        after: 100 * KIB,
        kind: RemoteErrorKind::Unavailable,
    };
    faults.on(Op::Read, 1, cut);
    let mut download = origin
        .download(guard.clone(), 0, 300 * KIB, ALWAYS)
        .await
        .unwrap();
    while let Ok(frames) = download.frames(16, &|| false).await {
        assert!(!frames.is_empty(), "it went on for nobody");
    }
    faults.on(Op::Read, 2, Effect::Fail(RemoteErrorKind::Unavailable));
    let refused = origin.download(guard, 0, 1, &|| false).await;
    assert!(refused.is_err());
    assert_eq!(faults.count(Op::Read), 2);
}
