//! Whatever is done to a replica, in whatever order, no answer contradicts a model of ten lines.
//!
//! The model knows what each key was at, and since when; what each revision holds; and whether anything was wrong with
//! the remote while a request was under way. From that follows what may be answered ([`Model::judge`]): each byte is
//! its label's (P1), 412 and 404 only where the remote has another revision or none and could be asked (P4), 503 only
//! in trouble, nothing older than `fresh_for` (P6), nothing that was purged, no more on disk than the capacity, and when the trouble is over,
//! everything answers.
//!
//! `PINRANGE_MODEL_CASES` says how many cases are tried; a failing one is shrunk, and remembered in
//! `proptest-regressions`.

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::Config;

use super::weather::Blow;
use super::*;

const KEYS: [&str; 2] = ["a", "b"];
const CASES: u32 = 120;

/// Which revisions a request names.
#[derive(Clone, Debug)]
enum Pins {
    Nothing,
    Current,
    /// Any that ever was, of any key.
    Some(Index),
    Two(Index, Index),
    Unknown,
    AndUnknown(Index),
    Any,
}

#[derive(Clone, Debug)]
enum Want {
    Whole,
    Closed(u64, u64),
    From(u64),
    Suffix(u64),
    Several(u64, u64),
}

#[derive(Clone, Debug)]
struct Asking {
    key: usize,
    head: bool,
    pins: Pins,
    unless_current: bool,
    want: Want,
    no_cache: bool,
    leaves_after: Option<usize>,
}

#[derive(Clone, Debug)]
enum Op {
    Put {
        key: usize,
        seed: u64,
        size: u64,
    },
    PutAgain {
        key: usize,
        which: Index,
    },
    Delete {
        key: usize,
    },
    Ask(Asking),
    /// After all that is under way has come to its end.
    AskInPeace(Asking),
    Together {
        asks: Vec<Asking>,
        meanwhile: Box<Option<Self>>,
        after: u64,
    },
    Purge {
        key: usize,
        every: bool,
    },
    Strike(Vec<Blow>),
    Outage(Option<RemoteErrorKind>),
    Flush,
    Wait(u64),
    /// The process ends with what was not recorded, and files rot before the next start.
    Crash {
        rot: Vec<u64>,
    },
    Restart,
}

fn key() -> impl Strategy<Value = usize> {
    0..KEYS.len()
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0),
        2 => 1..=2_u64,
        4 => 1..=4 * BLOCK,
        2 => (1..=14_u64).prop_map(|blocks| blocks * BLOCK),
        3 => 1..=5 * PART,
    ]
}

fn wants() -> impl Strategy<Value = Want> {
    let offset = || prop_oneof![3 => 0..4 * PART, 2 => (0..20_u64).prop_map(|block| block * BLOCK)];
    prop_oneof![
        4 => Just(Want::Whole),
        4 => (offset(), 0..2 * PART).prop_map(|(first, more)| Want::Closed(first, first + more)),
        1 => offset().prop_map(Want::From),
        1 => (0..2 * PART).prop_map(Want::Suffix),
        1 => (offset(), offset()).prop_map(|(one, other)| Want::Several(one, other)),
    ]
}

fn pins() -> impl Strategy<Value = Pins> {
    let index = any::<Index>;
    prop_oneof![
        3 => Just(Pins::Nothing),
        6 => Just(Pins::Current),
        4 => index().prop_map(Pins::Some),
        1 => (index(), index()).prop_map(|(one, other)| Pins::Two(one, other)),
        1 => Just(Pins::Unknown),
        1 => index().prop_map(Pins::AndUnknown),
        1 => Just(Pins::Any),
    ]
}

fn asking() -> impl Strategy<Value = Asking> {
    (
        key(),
        prop::bool::weighted(0.1),
        pins(),
        prop::bool::weighted(0.1),
        wants(),
        prop::bool::weighted(0.1),
        prop::option::weighted(0.15, 0..4_usize),
    )
        .prop_map(
            |(key, head, pins, unless_current, want, no_cache, leaves_after)| Asking {
                key,
                head,
                pins,
                unless_current,
                want,
                no_cache,
                leaves_after,
            },
        )
}

fn troubles() -> impl Strategy<Value = RemoteErrorKind> {
    select(vec![
        RemoteErrorKind::Unavailable,
        RemoteErrorKind::Timeout,
        RemoteErrorKind::Throttled { retry_after: None },
        RemoteErrorKind::Throttled {
            retry_after: Some(Duration::from_secs(3)),
        },
        // The driver's word for a wrong range, a wrong tag, a 200 for a range.
        RemoteErrorKind::Protocol,
        RemoteErrorKind::Forbidden,
        RemoteErrorKind::Archived,
    ])
}

fn blows() -> impl Strategy<Value = Blow> {
    prop_oneof![
        2 => troubles().prop_map(Blow::Fail),
        3 => (0..20_000_u64).prop_map(Blow::Reset),
        1 => (0..20_000_u64).prop_map(Blow::Stall),
        1 => (1..4000_u64).prop_map(|ms| Blow::Late(Duration::from_millis(ms))),
    ]
}

fn changes() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (key(), 0..6_u64, sizes()).prop_map(|(key, seed, size)| Op::Put { key, seed, size }),
        1 => (key(), any::<Index>()).prop_map(|(key, which)| Op::PutAgain { key, which }),
        1 => key().prop_map(|key| Op::Delete { key }),
        1 => (key(), prop::bool::weighted(0.2)).prop_map(|(key, every)| Op::Purge { key, every }),
        2 => prop::collection::vec(blows(), 1..4).prop_map(Op::Strike),
        1 => prop::option::of(troubles()).prop_map(Op::Outage),
        1 => Just(Op::Flush),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => changes(),
        8 => asking().prop_map(Op::Ask),
        4 => asking().prop_map(Op::AskInPeace),
        5 => (prop::collection::vec(asking(), 2..5), prop::option::of(changes()), 0..60_u64)
            .prop_map(|(asks, meanwhile, after)| Op::Together {
                asks,
                meanwhile: Box::new(meanwhile),
                after,
            }),
        1 => Just(Op::Outage(None)),
        1 => Just(Op::Flush),
        1 => (0..5000_u64).prop_map(Op::Wait),
        1 => prop::collection::vec(any::<u64>(), 0..4).prop_map(|rot| Op::Crash { rot }),
        1 => Just(Op::Restart),
    ]
}

/// What was true when a request came.
struct Moment {
    at: Instant,
    fair: bool,
    out: bool,
    struck: u64,
    /// Segments that went, for want of room or because they were bad.
    gone: u64,
    purged: HashSet<(&'static str, String)>,
}

struct Model {
    world: World,
    /// Tags of all revisions there ever were.
    tags: Vec<String>,
    /// Segment files may be wrong in ways that nobody noticed yet.
    rotten: bool,
    /// Tags by key that only the disk had when it was purged.
    purged: Mutex<HashSet<(&'static str, String)>>,
    /// Blows when last looked, and since when it is no more.
    struck: Mutex<(u64, Option<Instant>)>,
}

impl Model {
    fn ask(&self, asking: &Asking) -> Ask {
        let key = KEYS[asking.key];
        let some = |index: &Index| match self.tags.len() {
            0 => "\"none\"".to_owned(),
            len => self.tags[index.index(len)].clone(),
        };
        let current = || {
            let current = self.world.current(key);
            current.map_or_else(
                || "\"none\"".to_owned(),
                |now| now.as_field_value().to_owned(),
            )
        };
        let if_match = match &asking.pins {
            Pins::Nothing => None,
            Pins::Current => Some(current()),
            Pins::Some(index) => Some(some(index)),
            Pins::Two(one, other) => Some(format!("{}, {}", some(one), some(other))),
            Pins::Unknown => Some("\"unknown\"".to_owned()),
            Pins::AndUnknown(index) => Some(format!("\"unknown\", {}", some(index))),
            Pins::Any => Some("*".to_owned()),
        };
        let range = match asking.want {
            Want::Whole => None,
            Want::Closed(first, last) => Some(format!("bytes={first}-{last}")),
            Want::From(first) => Some(format!("bytes={first}-")),
            Want::Suffix(length) => Some(format!("bytes=-{length}")),
            Want::Several(one, other) => {
                Some(format!("bytes={one}-{},{other}-{}", one + 9, other + 5000))
            }
        };
        Ask {
            key,
            method: if asking.head {
                Method::Head
            } else {
                Method::Get
            },
            if_match,
            if_none_match: asking.unless_current.then(current),
            range,
            no_cache: asking.no_cache,
            leaves_after: asking.leaves_after,
        }
    }

    fn moment(&self, replica: &Replica) -> Moment {
        let (now, blows) = (Instant::now(), self.world.weather.struck());
        let mut struck = self.struck.lock();
        if struck.0 != blows {
            *struck = (blows, Some(now));
        }
        // A remote that asked to be left alone is.
        let over = |since: Instant| now.duration_since(since) > ALONE;
        Moment {
            at: now,
            fair: self.world.weather.is_fair() && struck.1.is_none_or(over),
            out: self.world.weather.is_out(),
            struck: self.world.weather.struck(),
            gone: gone(replica),
            purged: self.purged.lock().clone(),
        }
    }

    /// Whether the request may be answered with this revision.
    fn judge_label(
        &self,
        ask: &Ask,
        validator: &Validator,
        asked: &Moment,
        trouble: bool,
    ) -> Result<(), String> {
        if let Some(tags) = ask.if_match.as_deref().filter(|tags| *tags != "*") {
            let named = tags
                .split(", ")
                .any(|tag| tag == validator.as_field_value());
            return named
                .then_some(())
                .ok_or_else(|| format!("{validator:?} is not what was asked for"));
        }
        // In an outage what was last known may answer (P6).
        let since = match (ask.no_cache, trouble) {
            (true, _) => Some(asked.at),
            (false, false) => asked.at.checked_sub(FRESH_FOR),
            (false, true) => None,
        };
        let may = self.world.currents(ask.key, since);
        may.contains(&Some(validator.clone()))
            .then_some(())
            .ok_or_else(|| format!("{validator:?} is old (P6); may: {may:?}"))
    }

    /// Whether the answer is one that may be given.
    #[expect(clippy::too_many_lines, reason = "one table")]
    fn judge(
        &self,
        replica: &Replica,
        ask: &Ask,
        answer: &Answer,
        asked: &Moment,
    ) -> Result<(), String> {
        let world = &self.world;
        world.check_body(ask, answer)?;
        let trouble = !asked.fair || world.weather.struck() > asked.struck;
        let out = asked.out && world.weather.is_out();
        let since = |earlier: Duration| world.currents(ask.key, asked.at.checked_sub(earlier));
        let now = since(Duration::ZERO);
        let changed = now.len() > 1;
        let pinned = ask.if_match.as_deref().filter(|tags| *tags != "*");
        let names = |tags: &str, validator: &Validator| {
            tags.split(", ")
                .any(|tag| tag == validator.as_field_value())
        };
        let demand = |holds: bool, what: &str| {
            holds
                .then_some(())
                .ok_or_else(|| format!("{what}; current: {now:?}"))
        };
        match answer {
            Answer::Body {
                validator,
                verdict,
                parts,
                cut,
                ..
            } => {
                // What only the disk had, and has no more, nobody can send.
                let lost = gone(replica) > asked.gone && !now.contains(&Some(validator.clone()));
                demand(!cut || trouble || changed || lost, "cut without trouble")?;
                self.judge_label(ask, validator, asked, trouble)?;
                let name = (ask.key, validator.as_field_value().to_owned());
                let back = now.contains(&Some(validator.clone()));
                demand(
                    back || !asked.purged.contains(&name),
                    "served what was purged",
                )?;
                let size = world
                    .written(validator)
                    .map_or(0, |object| object.len() as u64);
                let right = match (&verdict, naive(ask.range.as_deref(), size)) {
                    (Verdict::Full, None) => true,
                    (Verdict::Partial(_), Some(span)) => parts
                        .first()
                        .is_some_and(|(range, _)| (range.start(), range.end()) == span),
                    // Several, coalesced or not: `check_body` has compared each.
                    (Verdict::Full | Verdict::Partial(_), _) => {
                        ask.range.as_ref().is_some_and(|range| range.contains(','))
                    }
                    _ => false,
                };
                demand(right, "another range than was asked for")
            }
            Answer::Head { validator, verdict } => match verdict {
                Verdict::PreconditionFailed => {
                    let tags = pinned.ok_or("412 to no condition")?;
                    demand(!out, "412 in an outage (P4)")?;
                    demand(!names(tags, validator), "412, and it is the one (P4)")?;
                    demand(
                        now.contains(&Some(validator.clone())),
                        "412 by a label of before the request (P4)",
                    )
                }
                Verdict::NotModified => {
                    let tags = ask.if_none_match.as_deref().ok_or("304 to no condition")?;
                    demand(names(tags, validator), "304, and it was modified")?;
                    self.judge_label(ask, validator, asked, trouble)
                }
                Verdict::Full | Verdict::Partial(_) | Verdict::Unsatisfiable => {
                    self.judge_label(ask, validator, asked, trouble)?;
                    let size = world
                        .written(validator)
                        .map_or(0, |object| object.len() as u64);
                    let bodiless = ask.method == Method::Head || size == 0;
                    let beyond =
                        naive(ask.range.as_deref(), size).is_some_and(|(from, to)| from >= to);
                    let several = ask.range.as_ref().is_some_and(|range| range.contains(','));
                    demand(
                        bodiless || beyond || several,
                        "no body, and there are bytes",
                    )
                }
            },
            Answer::Refused(refusal) => match refusal {
                Refusal::PinLost { .. } => {
                    let pinned = pinned.ok_or("a pin was lost that nobody gave")?;
                    demand(!out, "412 in an outage (P4)")?;
                    demand(
                        now.iter().flatten().any(|now| !names(pinned, now)),
                        "412, and the pinned revision was there all along (P4)",
                    )
                }
                Refusal::NotFound { .. } => {
                    let label = ask.if_match.is_none() && !ask.no_cache;
                    let window = if label { FRESH_FOR } else { Duration::ZERO };
                    demand(
                        since(window).contains(&None),
                        "404, and it was there all along",
                    )?;
                    demand(!out || label, "404 in an outage (P4)")
                }
                Refusal::Unavailable { .. }
                | Refusal::TimedOut { .. }
                | Refusal::BadGateway { .. } => demand(trouble, "5xx without trouble"),
            },
        }
    }
}

/// Start and end of what one range asks for of so many bytes, clamped; empty where it lies beyond. `None`: no range, or
/// several.
fn naive(range: Option<&str>, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range?.strip_prefix("bytes=")?.split_once('-')?;
    let number = |digits: &str| digits.parse::<u64>().ok();
    match (first, last) {
        ("", length) => Some((size.saturating_sub(number(length)?), size)),
        (first, "") => Some((number(first)?.min(size), size)),
        (first, last) => {
            let end = number(last)?.saturating_add(1).min(size);
            Some((number(first)?.min(end), end))
        }
    }
}

fn gone(replica: &Replica) -> u64 {
    let stats = replica.disk.stats();
    stats.evictions + stats.quarantines
}

/// How a life of the replica ends.
enum End<'a> {
    Crash(&'a [u64]),
    Close,
}

impl Model {
    fn new() -> Self {
        Self {
            world: World::new(),
            tags: Vec::new(),
            rotten: false,
            purged: Mutex::default(),
            struck: Mutex::default(),
        }
    }

    fn run(mut self, ops: &[Op]) -> Result<(), String> {
        crate::chance::seeded::by(1);
        let mut rest = ops.iter();
        loop {
            let runtime = runtime();
            let replica = self.world.start();
            let end = runtime.block_on(self.live(&replica, &mut rest))?;
            match end {
                None => {
                    runtime.block_on(self.in_the_end(&replica))?;
                    runtime.block_on(replica.close());
                    return Ok(());
                }
                Some(End::Close) => {
                    runtime.block_on(replica.close());
                    drop(runtime);
                }
                Some(End::Crash(rot)) => {
                    drop(runtime);
                    replica.crash();
                    self.world.rot(rot);
                    self.rotten |= !rot.is_empty();
                }
            }
            self.world.clock_stops();
            self.struck.lock().1 = None;
        }
    }

    async fn live<'a>(
        &mut self,
        replica: &Replica,
        ops: &mut std::slice::Iter<'a, Op>,
    ) -> Result<Option<End<'a>>, String> {
        for op in ops {
            // Nothing that one caused and the other saw has the same time stamp.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let done = match op {
                Op::Crash { rot } => return Ok(Some(End::Crash(rot))),
                Op::Restart => return Ok(Some(End::Close)),
                Op::Ask(asking) => self.answered(replica, asking).await,
                Op::AskInPeace(asking) => {
                    tokio::time::sleep(PEACE).await;
                    self.answered_in_peace(replica, asking).await
                }
                Op::Together {
                    asks,
                    meanwhile,
                    after,
                } => {
                    let asked = self.moment(replica);
                    let asks: Vec<_> = asks.iter().map(|asking| self.ask(asking)).collect();
                    let answers = asks.iter().map(|ask| self.world.ask(replica, ask));
                    let mut tags = Vec::new();
                    let change = async {
                        tokio::time::sleep(Duration::from_millis(*after)).await;
                        if let Some(op) = &**meanwhile {
                            tags = self.change(replica, op).await;
                        }
                    };
                    let (answers, ()) = tokio::join!(futures::future::join_all(answers), change);
                    let judged = asks
                        .iter()
                        .zip(&answers)
                        .map(|(ask, answer)| {
                            (ask, answer, self.judge(replica, ask, answer, &asked))
                        })
                        .find(|(_, _, judged)| judged.is_err());
                    let judged = judged.map_or(Ok(()), |(ask, answer, why)| {
                        why.map_err(|why| format!("{ask:?} was answered {answer:?}: {why}"))
                    });
                    self.tags.extend(tags);
                    judged
                }
                Op::Wait(ms) => {
                    tokio::time::sleep(Duration::from_millis(*ms)).await;
                    Ok(())
                }
                change => {
                    let tags = self.change(replica, change).await;
                    self.tags.extend(tags);
                    Ok(())
                }
            };
            let stats = replica.disk.stats();
            done.map_err(|why| format!("at {op:?}: {why}"))?;
            if stats.used_bytes > CAPACITY {
                return Err(format!("after {op:?}: {} bytes on disk", stats.used_bytes));
            }
        }
        Ok(None)
    }

    /// Does what needs no answer; returns the tags of new revisions.
    async fn change(&self, replica: &Replica, op: &Op) -> Vec<String> {
        let world = &self.world;
        let mut tags = Vec::new();
        let mut put = |key: usize, object: &Bytes| {
            let tag = world.put(KEYS[key], object).as_field_value().to_owned();
            self.purged.lock().remove(&(KEYS[key], tag.clone()));
            tags.push(tag);
        };
        match op {
            Op::Put { key, seed, size } => put(*key, &object(*seed, *size)),
            Op::PutAgain { key, which } => {
                if !self.tags.is_empty() {
                    let tag = which.get(&self.tags);
                    let object = world.written.lock().get(tag.as_str()).cloned();
                    put(*key, &object.unwrap());
                }
            }
            Op::Delete { key } => world.delete(KEYS[*key]),
            Op::Purge { key, every } => {
                let purged = replica.tiers.purge(&world.mount, KEYS[*key], *every).await;
                purged.unwrap();
                let current = world.current(KEYS[*key]);
                let current = current.as_ref().map(Validator::as_field_value);
                let others = self.tags.iter().filter(|tag| Some(tag.as_str()) != current);
                let others = others.map(|tag| (KEYS[*key], tag.clone()));
                self.purged.lock().extend(others);
            }
            Op::Strike(blows) => blows
                .iter()
                .cloned()
                .for_each(|blow| world.weather.strike(blow)),
            Op::Outage(kind) => world.weather.outage(kind.clone()),
            Op::Flush => replica.disk.flush().await.unwrap(),
            other => panic!("{other:?} is no change"),
        }
        tags
    }

    async fn answered(&self, replica: &Replica, asking: &Asking) -> Result<(), String> {
        let ask = self.ask(asking);
        let asked = self.moment(replica);
        let answer = self.world.ask(replica, &ask).await;
        self.judge(replica, &ask, &answer, &asked)
            .map_err(|why| format!("{ask:?} was answered {answer:?}: {why}"))
    }

    /// P5: what the disk holds of a pinned revision is served whatever the remote does, and it is not asked.
    async fn answered_in_peace(&self, replica: &Replica, asking: &Asking) -> Result<(), String> {
        let ask = self.ask(asking);
        let held = ask.if_match.as_deref().and_then(|tag| {
            let validator = Validator::from_etag_field(tag).ok()?;
            let revision = Revision {
                key: self.world.mount.key(ask.key),
                validator,
            };
            match replica.disk.lookup(&revision) {
                Lookup::Held(held) => Some(held),
                Lookup::Unknown => None,
            }
        });
        let whole = held.is_some_and(|held| {
            let size = held.representation().size;
            let (start, end) = naive(ask.range.as_deref(), size).unwrap_or((0, size));
            ByteRange::from_bounds(start, end)
                .is_some_and(|range| held.first_missing(range).is_none())
        });
        let calls = self.world.weather.calls();
        self.answered(replica, asking).await?;
        let asked = self.world.weather.calls() - calls;
        if whole && ask.method == Method::Get && !ask.no_cache && !self.rotten && asked > 0 {
            return Err(format!("{ask:?} is on disk, and the remote was asked (P5)"));
        }
        Ok(())
    }

    /// When the trouble is over, everything answers.
    async fn in_the_end(&mut self, replica: &Replica) -> Result<(), String> {
        self.world.weather.clear();
        tokio::time::sleep(PEACE).await;
        for key in 0..KEYS.len() {
            for pins in [Pins::Current, Pins::Nothing, Pins::Any] {
                let asking = Asking {
                    key,
                    head: false,
                    pins,
                    unless_current: false,
                    want: Want::Whole,
                    no_cache: false,
                    leaves_after: None,
                };
                self.answered(replica, &asking)
                    .await
                    .map_err(|why| format!("in the end: {why}"))?;
            }
        }
        Ok(())
    }
}

/// Longer than a blow asks to be left alone for.
const ALONE: Duration = Duration::from_secs(5);

/// Longer than anything that is under way can take, and than the remote asks to be left alone for.
const PEACE: Duration = Duration::from_mins(2);

proptest! {
    #![proptest_config(Config {
        cases: std::env::var("PINRANGE_MODEL_CASES").map_or(CASES, |cases| cases.parse().unwrap()),
        max_shrink_iters: 4000,
        ..Config::default()
    })]

    #[test]
    fn no_answer_contradicts_the_model(ops in prop::collection::vec(ops(), 1..40)) {
        if let Err(why) = Model::new().run(&ops) {
            prop_assert!(false, "{why}");
        }
    }
}
