//! One request after another through the tiers, where purges, overwrites and labels come in between.

use http::HeaderMap;
use pinrange::mount::{ForbiddenAs, Mount};
use pinrange::payload::{BodyError, ChunkSource, Payload};
use pinrange::seldom::Outage;
use pinrange::semantics::precondition::Method;
use pinrange::semantics::{RequestHead, Verdict};
use pinrange::tiers::{Get, Opened, Refusal, TierSettings, Tiers};

use super::*;

/// A sixteenth of the capacity, so that each part has a segment file of its own.
const SEGMENT: u64 = PART;

struct Replica {
    remote: Arc<FaultRemote<MemoryRemote>>,
    mount: Arc<Mount>,
    dir: Arc<TempDir>,
    disk: Arc<DiskTier>,
    filler: Arc<Filler>,
    tiers: Arc<Tiers>,
}

impl Replica {
    fn new(fresh_for: Duration) -> Self {
        Self::with(fresh_for, MinFree::Bytes(0))
    }

    fn with(fresh_for: Duration, min_free: MinFree) -> Self {
        let remote = Arc::new(FaultRemote::new(MemoryRemote::new()));
        let mount = Arc::new(Mount {
            path: "/m".to_owned(),
            prefix: String::new(),
            remote: Arc::clone(&remote) as Arc<dyn Remote>,
            fresh_for,
            stale_if_error: Duration::from_mins(5),
            forbidden: ForbiddenAs::default(),
            retries: 1,
            verify: false,
            outage: Outage::default(),
        });
        Self::over(remote, mount, Arc::new(TempDir::new().unwrap()), min_free)
    }

    fn over(
        remote: Arc<FaultRemote<MemoryRemote>>,
        mount: Arc<Mount>,
        dir: Arc<TempDir>,
        min_free: MinFree,
    ) -> Self {
        let disk = DiskTier::open(DiskConfig {
            dir: dir.path().join("cache"),
            capacity: 16 * SEGMENT,
            min_free,
            block_size: BLOCK,
            scrub_rate: 0,
        })
        .unwrap();
        let settings = FillSettings {
            part_size: NonZeroU64::new(PART).unwrap(),
            budget: 8 * PART,
        };
        let filler = Filler::new(Arc::clone(&disk), settings, Metrics::default());
        let settings = TierSettings {
            fan_out: 2,
            part_size: PART,
        };
        let tiers = Tiers::new(Arc::clone(&disk), Arc::clone(&filler), settings);
        Self {
            remote,
            mount,
            dir,
            disk,
            filler,
            tiers,
        }
    }

    async fn restart(self) -> Self {
        self.filler.shutdown().await;
        self.disk.close().await.unwrap();
        let Self {
            remote, mount, dir, ..
        } = self;
        Self::over(remote, mount, dir, MinFree::Bytes(0))
    }

    /// Stores an object and returns its tag.
    fn put(&self, object: &Bytes) -> String {
        let stored = self.remote.inner().put("key", object.clone(), &[]);
        stored.validator.as_field_value().to_owned()
    }

    async fn open(&self, if_match: Option<&str>) -> Result<Opened, Refusal> {
        let mut fields = HeaderMap::new();
        if let Some(tags) = if_match {
            fields.insert(http::header::IF_MATCH, tags.parse().unwrap());
        }
        let head = RequestHead::from_headers(Method::Get, &fields).unwrap();
        let get = Get {
            mount: &self.mount,
            key: "key",
            head: &head,
            no_cache: false,
            started: std::time::Instant::now(),
        };
        soon(self.tiers.open(&get)).await
    }

    async fn whole(&self, if_match: Option<&str>) -> Vec<u8> {
        let mut opened = self.open(if_match).await.unwrap();
        assert!(matches!(opened.verdict, Verdict::Full));
        rest(&mut opened, 0).await.unwrap()
    }
}

async fn chunk(opened: &mut Opened, start: u64) -> Result<Vec<u8>, BodyError> {
    let wanted = range(start, opened.representation.size);
    let reader = opened.reader.as_mut().expect("the answer has a body");
    let payload = soon(std::future::poll_fn(|cx| reader.poll_chunk(cx, wanted))).await?;
    Ok(match payload {
        Payload::File(extent) => read(&extent),
        Payload::Memory(bytes) => bytes.to_vec(),
    })
}

async fn rest(opened: &mut Opened, start: u64) -> Result<Vec<u8>, BodyError> {
    let mut sent = Vec::new();
    while start + (sent.len() as u64) < opened.representation.size {
        let at = start + sent.len() as u64;
        sent.extend(chunk(opened, at).await?);
    }
    Ok(sent)
}

#[tokio::test]
async fn a_purge_does_not_cut_what_the_remote_still_has() {
    let replica = Replica::new(Duration::from_secs(2));
    let object = bytes(3, 4 * PART + 5);
    let pin = replica.put(&object);
    let gate = Gate::new();
    // When the purge comes, a part is held, and one is asked for and not answered.
    replica.remote.on(Op::Read, 3, Effect::Hold(gate.clone()));
    let purge = async {
        gate.reached().await;
        let purged = replica.tiers.purge(&replica.mount, "key", false).await;
        assert_eq!(purged.unwrap().revisions, 1);
        gate.open();
    };
    let (sent, ()) = soon(async { tokio::join!(replica.whole(Some(&pin)), purge) }).await;
    assert!(sent == object);
    // What was fetched after the purge is kept like anything else: at least the part that waited.
    let before = replica.remote.yielded();
    assert!(replica.whole(Some(&pin)).await == object);
    let again = replica.remote.yielded() - before;
    assert!(
        again <= 3 * PART + 5,
        "{again} bytes: the part that came after the purge was not kept"
    );
}

/// Without a byte there is no flight that a purge could call off.
#[tokio::test]
async fn an_empty_object_that_is_purged_while_it_is_asked_for_is_not_held() {
    for pinned in [false, true] {
        let replica = Replica::new(Duration::ZERO);
        let pin = replica.put(&Bytes::new());
        let pin = pinned.then_some(pin.as_str());
        let (op, nth) = if pinned {
            (Op::Stat, 1)
        } else {
            (Op::ReadCurrent, 2)
        };
        let gate = Gate::new();
        replica.remote.on(op, nth, Effect::Hold(gate.clone()));
        let purge = async {
            gate.reached().await;
            let purged = replica.tiers.purge(&replica.mount, "key", false).await;
            assert_eq!(purged.unwrap().revisions, 0);
            gate.open();
        };
        let (opened, ()) = soon(async { tokio::join!(replica.open(pin), purge) }).await;
        assert!(!opened.unwrap().trace.stored, "pinned: {pinned}");
        assert_eq!(
            replica.disk.stats().revisions_in_memory,
            0,
            "pinned: {pinned}"
        );
        assert!(
            replica.open(pin).await.unwrap().trace.stored,
            "pinned: {pinned}"
        );
        assert_eq!(
            replica.disk.stats().revisions_in_memory,
            1,
            "pinned: {pinned}"
        );
    }
}

#[tokio::test]
async fn an_empty_object_is_not_written_to_a_disk_that_takes_nothing() {
    let replica = Replica::new(Duration::ZERO);
    let pin = replica.put(&Bytes::new());
    replica.disk.refuse_writes();
    for pin in [None, Some(pin.as_str())] {
        let opened = replica.open(pin).await.unwrap();
        assert!(matches!(opened.verdict, Verdict::Full) && !opened.trace.stored);
    }
    assert_eq!(replica.disk.stats().revisions_in_memory, 0);
}

#[tokio::test]
async fn what_the_disk_has_is_not_fetched_for_a_new_label() {
    let replica = Replica::new(Duration::ZERO);
    let (old, new) = (bytes(4, 2 * PART), bytes(5, 3 * PART));
    replica.put(&old);
    assert!(replica.whole(None).await == old);
    let pin = replica.put(&new);
    assert!(replica.whole(Some(&pin)).await == new);
    let replica = replica.restart().await;
    let before = replica.remote.yielded();
    assert!(replica.whole(None).await == new);
    assert_eq!(
        replica.remote.yielded(),
        before,
        "only the label had to be asked for"
    );
}

#[tokio::test]
async fn what_arrives_while_the_label_is_asked_for_is_not_fetched_twice() {
    let replica = Replica::new(Duration::from_secs(2));
    let object = bytes(6, PART);
    let pin = replica.put(&object);
    let gate = Gate::new();
    replica
        .remote
        .on(Op::ReadCurrent, 1, Effect::Hold(gate.clone()));
    let pinned = async {
        gate.reached().await;
        let sent = replica.whole(Some(&pin)).await;
        gate.open();
        sent
    };
    let (unpinned, pinned) =
        Box::pin(soon(async { tokio::join!(replica.whole(None), pinned) })).await;
    assert!(unpinned == object && pinned == object);
    assert_eq!(replica.remote.yielded(), PART);
}

#[tokio::test]
async fn no_label_of_another_request_loses_a_pin() {
    let replica = Replica::new(Duration::from_mins(10));
    replica.put(&bytes(7, BLOCK));
    replica.whole(None).await;
    let new = bytes(8, BLOCK);
    let listed = format!("\"elsewhere\", {}", replica.put(&new));
    assert!(
        replica.whole(Some(&listed)).await == new,
        "uploaded after the label was asked for"
    );
    // And none is lost while nobody can be asked, however long ago the label was.
    replica.remote.outage(Some(RemoteErrorKind::Unavailable));
    let lost = replica.open(Some("\"a\", \"b\"")).await;
    assert!(matches!(lost, Err(Refusal::Unavailable { .. })));
    assert!(replica.whole(None).await == new, "the label is fresh");
    replica.remote.outage(None);
    let lost = replica.open(Some("\"a\", \"b\"")).await.unwrap();
    assert!(matches!(lost.verdict, Verdict::PreconditionFailed));
}

#[tokio::test]
async fn past_the_disk_patience_lasts_as_long_as_there_is_progress() {
    let replica = Replica::with(Duration::from_secs(2), MinFree::Percent(100.0));
    let object = bytes(9, 6 * PART);
    let pin = replica.put(&object);
    for nth in 1..=5 {
        let cut = Effect::Cut {
            after: PART,
            kind: RemoteErrorKind::Unavailable,
        };
        replica.remote.on(Op::Read, nth, cut);
    }
    assert!(replica.whole(Some(&pin)).await == object);
    assert_eq!(replica.remote.count(Op::Read), 6);
    // Without progress it ends: one retry here.
    replica.remote.on(
        Op::Read,
        7,
        Effect::Cut {
            after: 1,
            kind: RemoteErrorKind::Unavailable,
        },
    );
    for nth in 8..=9 {
        let cut = Effect::Cut {
            after: 0,
            kind: RemoteErrorKind::Unavailable,
        };
        replica.remote.on(Op::Read, nth, cut);
    }
    let mut opened = replica.open(Some(&pin)).await.unwrap();
    assert!(rest(&mut opened, 0).await.is_err());
    assert_eq!(
        replica.remote.count(Op::Read),
        8,
        "as many as the mount allows"
    );
}

#[tokio::test]
async fn a_disk_that_fails_midway_fails_no_response() {
    let replica = Replica::new(Duration::from_secs(2));
    let object = bytes(10, 4 * PART + 5);
    let pin = replica.put(&object);
    // The body has begun, out of the one segment file that is there; no other can be made.
    let (first, second) = (Gate::new(), Gate::new());
    let stall = Effect::Stall {
        at: BLOCK,
        gate: first.clone(),
    };
    replica.remote.on(Op::Read, 1, stall);
    replica.remote.on(Op::Read, 2, Effect::Hold(second.clone()));
    let mut opened = replica.open(Some(&pin)).await.unwrap();
    soon(second.reached()).await;
    let segments = replica.dir.path().join("cache").join("segments");
    // Not the whole directory: the tier would notice, and begin with another one.
    for shard in 0..=255 {
        let shard = segments.join(format!("{shard:02x}"));
        std::fs::rename(&shard, shard.with_extension("gone")).unwrap();
        std::fs::write(&shard, "no directory").unwrap();
    }
    second.open();
    first.open();
    let sent = rest(&mut opened, 0).await;
    assert!(sent.expect("cut by the disk") == object);
    let revision = Revision {
        key: replica.mount.key("key"),
        validator: opened.representation.validator.clone(),
    };
    let held = replica.filler.arrived(&revision).unwrap();
    let size = object.len() as u64;
    assert_eq!(
        held.first_missing(range(0, size)),
        Some(range(PART, size)),
        "the disk took no more"
    );
}

#[tokio::test]
async fn parts_that_are_there_do_not_keep_the_next_from_being_read() {
    let replica = Replica::new(Duration::from_secs(2));
    let object = bytes(11, 9 * PART);
    let pin = replica.put(&object);
    let gate = Gate::new();
    let stall = Effect::Stall {
        at: BLOCK,
        gate: gate.clone(),
    };
    replica.remote.on(Op::Read, 1, stall);
    let mut opened = replica.open(Some(&pin)).await.unwrap();
    // The client waits for the rest of the first part. Two reads go on at a time, up to four parts from where it is.
    let revision = Revision {
        key: replica.mount.key("key"),
        validator: opened.representation.validator.clone(),
    };
    let held = replica.filler.arrived(&revision).unwrap();
    soon(async {
        while held.first_missing(range(PART, 4 * PART)).is_some() {
            assert!(object.starts_with(&chunk(&mut opened, 0).await.unwrap()));
            settle().await;
        }
    })
    .await;
    for _ in 0..10 {
        chunk(&mut opened, 0).await.unwrap();
        settle().await;
    }
    assert_eq!(
        replica.remote.count(Op::Read),
        4,
        "further than that is not read ahead"
    );
    gate.open();
    assert!(rest(&mut opened, 0).await.unwrap() == object);
    assert_eq!(replica.remote.yielded(), 9 * PART);
}

/// Time passes by the clock that nobody can set.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn what_may_answer_in_an_outage_grows_old_by_a_clock_that_does_not_jump() {
    let replica = Replica::new(Duration::from_secs(2));
    let object = bytes(12, BLOCK);
    replica.put(&object);
    assert!(replica.whole(None).await == object);
    replica.remote.outage(Some(RemoteErrorKind::Unavailable));
    pass(Duration::from_mins(4)).await;
    let opened = replica.open(None).await.unwrap();
    assert!(opened.trace.stale);
    pass(Duration::from_mins(2)).await;
    let refusal = replica.open(None).await.err();
    assert!(
        matches!(refusal, Some(Refusal::Unavailable { .. })),
        "{refusal:?}"
    );
}

#[tokio::test]
async fn a_confirmation_is_written_down_well_within_the_time_it_counts_for() {
    let Replica { remote, mount, .. } = Replica::new(Duration::from_secs(2));
    let dir = Arc::new(TempDir::new().unwrap());
    let mount = Arc::new(Mount {
        path: mount.path.clone(),
        prefix: mount.prefix.clone(),
        remote: Arc::clone(&mount.remote),
        stale_if_error: Duration::from_secs(20),
        outage: Outage::default(),
        ..*mount
    });
    let replica = Replica::over(remote, mount, dir, MinFree::Bytes(0));
    let object = bytes(14, BLOCK);
    replica.put(&object);
    assert!(replica.whole(None).await == object);
    replica.disk.flush().await.unwrap();
    let catalog = replica.dir.path().join("cache/catalog.sqlite");
    let catalog = rusqlite::Connection::open(catalog).unwrap();
    let older = "UPDATE objects SET checked_at = checked_at - 3600000";
    assert_eq!(catalog.execute(older, []), Ok(1));
    drop(catalog);

    pass(Duration::from_secs(6)).await;
    assert!(replica.whole(None).await == object);
    let replica = replica.restart().await;
    replica.remote.outage(Some(RemoteErrorKind::Unavailable));
    assert!(replica.open(None).await.unwrap().trace.stale);
}

#[tokio::test]
async fn a_wall_clock_that_was_put_back_lets_nothing_answer_for_ever() {
    for (put_back, answers) in [(3, true), (3600, false)] {
        let replica = Replica::new(Duration::from_secs(2));
        let object = bytes(13, BLOCK);
        replica.put(&object);
        assert!(replica.whole(None).await == object);
        replica.remote.outage(Some(RemoteErrorKind::Unavailable));
        let Replica {
            remote,
            mount,
            dir,
            disk,
            ..
        } = replica;
        disk.close().await.unwrap();
        let catalog = rusqlite::Connection::open(dir.path().join("cache/catalog.sqlite")).unwrap();
        let later = "UPDATE objects SET checked_at = checked_at + 1000 * ?1";
        assert_eq!(catalog.execute(later, [put_back]), Ok(1));
        drop(catalog);
        let replica = Replica::over(remote, mount, dir, MinFree::Bytes(0));
        let stale = replica.open(None).await.map(|opened| opened.trace.stale);
        assert_eq!(stale.is_ok(), answers, "{put_back}");
        // What is young enough grows older from here on, whatever the wall clock says.
        pass(Duration::from_mins(6)).await;
        assert!(replica.open(None).await.is_err(), "{put_back}");
    }
}
