//! Which segment goes when room is needed. Pure: no I/O, no clock, no lock.
//!
//! The policy is S3-FIFO (ADR 12). Segments stand in two queues; whoever holds the queues (the catalog for the tier,
//! two lists for the simulation in `examples/eviction`) asks which queue is next, shows the segment at its head,
//! and does what the verdict says:
//!
//! ```text
//!   new ──▶ small, a tenth of the bytes ──read again──▶ main ──┐ read since it stood here last:
//!    │         │ not read again                      ▲  │  ▲  └─┘ once more round, one visit poorer
//!    │         ▼                                     │  │ not
//!    │       gone, its name stays a while (ghost)    │  ▼
//!    └── its name is still known ────────────────────┘ gone
//! ```
//!
//! So what is read once passes through the small queue and leaves main alone, however much it is. Where the
//! paper counts accesses, this counts **bytes sent**: a *visit* is as many bytes as the segment has. A parallel
//! downloader touches a segment of 64 MiB some 4 to 1000 times in one pass, and that is one visit whatever its chunks;
//! the first visit, the one that a segment was fetched for, never counts. And what is worth most per byte of disk stays.
//!
//! Two things are added to the paper's:
//!
//! * While nothing had to go yet, what does not fit into the small queue's tenth begins in main. Else the first
//!   loop over more than the cache would flush all of it.
//! * Every [`CHALLENGE`]th segment that the small queue lets go, the head of main is looked at too, though main's turn
//!   has not come. If nobody read it, it goes instead, and the next segment of the small queue gets its place. So a main
//!   queue full of what nobody wants any more ebbs away, even if nothing is read twice within the ghost's memory.

use std::collections::{HashMap, VecDeque};

/// The small queue's share of the bytes: one in this many.
const SMALL_SHARE: u64 = 10;

/// Most visits that count: a segment that nobody reads any more goes round main this many times.
const MOST_VISITS: u64 = 3;

/// After this many segments of the small queue went, main's oldest is looked at.
const CHALLENGE: u32 = 16;

/// Ghosts remember the last nine tenths of the capacity that the small queue let go, as many bytes as main holds.
const GHOST_TENTHS: u64 = 9;

/// Most ghosts, about 48 bytes each: as many segments of full size are 4 TiB.
const MOST_GHOSTS: usize = 1 << 16;

/// Segments that one round keeps in main for their visits. Past these it takes what it sees: whoever waits for room does not wait for
/// a walk through a million rows.
const PATIENCE: u32 = 1024;

/// One of the two queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: the two queues of the policy"
)]
pub enum Queue {
    /// For what was read for the first time.
    Small,
    /// For what was read again.
    Main,
}

impl Queue {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Small, Self::Main];
}

/// Bytes that stand in each queue, or are on their way into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// In the small queue.
    pub small: u64,
    /// In main.
    pub main: u64,
}

impl Standing {
    /// Bytes in `queue`.
    pub fn of(self, queue: Queue) -> u64 {
        match queue {
            Queue::Small => self.small,
            Queue::Main => self.main,
        }
    }

    fn of_mut(&mut self, queue: Queue) -> &mut u64 {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Main => &mut self.main,
        }
    }
}

/// The segment at the head of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// The same for the same stretch of the same revision for ever; others may share it, at the cost of a worse choice.
    pub name: u64,
    /// Bytes that would be free without it.
    pub bytes: u64,
    /// Bytes that can be sent from it: not more than that.
    pub content: u64,
    /// Bytes sent from it, as the last verdict set it and counted on since.
    pub served: u64,
    /// Somebody has it open, so that letting it go would free nothing.
    pub in_use: bool,
}

/// What becomes of the head of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: what can become of a segment"
)]
pub enum Verdict {
    /// It goes.
    Evict,
    /// It goes to the end of this queue, and `served` is what counts as sent from it so far.
    Move {
        /// Where it stands from now on.
        to: Queue,
        /// Its new count in bytes.
        served: u64,
    },
}

/// What has to be remembered besides the queues.
#[derive(Debug)]
pub struct Policy {
    capacity: u64,
    standing: Standing,
    ghosts: Ghosts,
    ghost_hits: u64,
    /// Something had to go.
    pressed: bool,
    /// Segments that the small queue let go since main was challenged.
    let_go: u32,
    /// Main's oldest lost its place, for the next of the small queue.
    vacancy: bool,
}

impl Policy {
    /// For a cache of `capacity` bytes of which some are taken.
    pub fn new(capacity: u64, standing: Standing) -> Self {
        let held = standing.small + standing.main;
        Self {
            capacity,
            standing,
            ghosts: Ghosts::new(tenths(capacity, GHOST_TENTHS)),
            ghost_hits: 0,
            pressed: held >= tenths(capacity, 9),
            let_go: 0,
            vacancy: false,
        }
    }

    /// Where a new segment begins.
    pub fn admit(&mut self, name: u64) -> Queue {
        if self.ghosts.take(name) {
            self.ghost_hits += 1;
            return Queue::Main;
        }
        if !self.pressed && self.standing.small >= self.capacity / SMALL_SHARE {
            return Queue::Main;
        }
        Queue::Small
    }

    /// What stands in the queues, which grow and shrink without the policy.
    pub fn update(&mut self, standing: Standing) {
        self.standing = standing;
    }

    /// What stood in the queues at the last update, changed by the verdicts since.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// New segments so far whose name was still known.
    pub fn ghost_hits(&self) -> u64 {
        self.ghost_hits
    }

    /// The ghosts, for [`Policy::restore`].
    pub fn save(&self) -> Vec<u8> {
        self.ghosts.save()
    }

    /// Takes over the ghosts of an earlier run. Whatever is no list of ghosts counts as none.
    pub fn restore(&mut self, saved: &[u8]) {
        self.ghosts.restore(saved);
    }
}

/// One search for room.
#[derive(Debug, Default)]
pub struct Round {
    /// Bytes of segments in use that were seen in each queue since something else was.
    passed_over: Standing,
    spared: u32,
}

impl Round {
    /// The queue whose head is to be judged. `None`: all that is left is in use.
    pub fn turn(&self, policy: &Policy) -> Option<Queue> {
        let Standing { small, main } = policy.standing;
        let first = if policy.let_go < CHALLENGE && small > (small + main) / SMALL_SHARE {
            [Queue::Small, Queue::Main]
        } else {
            [Queue::Main, Queue::Small]
        };
        first
            .into_iter()
            .find(|queue| self.passed_over.of(*queue) < policy.standing.of(*queue))
    }

    /// `queue` has bytes, but shows no head: they are on their way, or what can be seen of it has been.
    pub fn pass_over(&mut self, queue: Queue) {
        *self.passed_over.of_mut(queue) = u64::MAX;
    }

    /// What becomes of the head of `queue`, whose [`Round::turn`] it is.
    pub fn judge(&mut self, policy: &mut Policy, queue: Queue, head: Head) -> Verdict {
        policy.pressed = true;
        if head.in_use {
            let passed_over = self.passed_over.of_mut(queue);
            *passed_over = passed_over.saturating_add(head.bytes);
            return Verdict::Move {
                to: queue,
                served: head.served,
            };
        }
        *self.passed_over.of_mut(queue) = 0;
        let visits = visits(head).min(MOST_VISITS);
        let verdict = match queue {
            Queue::Small if visits > 0 || std::mem::take(&mut policy.vacancy) => Verdict::Move {
                to: Queue::Main,
                served: visits.max(1) * head.content,
            },
            Queue::Small => {
                policy.ghosts.add(head.name, head.bytes);
                let Standing { small, main } = policy.standing;
                // Below its share main is in nobody's way.
                if small <= (small + main) / SMALL_SHARE * 2 {
                    policy.let_go += 1;
                }
                Verdict::Evict
            }
            Queue::Main => {
                let challenged = policy.let_go >= CHALLENGE;
                if challenged {
                    policy.let_go = 0;
                }
                if visits > 0 && self.spared < PATIENCE {
                    self.spared += 1;
                    Verdict::Move {
                        to: Queue::Main,
                        served: visits * head.content,
                    }
                } else {
                    policy.vacancy |= challenged;
                    Verdict::Evict
                }
            }
        };
        let standing = &mut policy.standing;
        *standing.of_mut(queue) -= head.bytes.min(standing.of(queue));
        if let Verdict::Move { to, .. } = verdict {
            *standing.of_mut(to) += head.bytes;
            // It is worth a look behind those in use.
            *self.passed_over.of_mut(to) = 0;
        }
        verdict
    }
}

/// Visits after the first, to the nearest whole one.
fn visits(head: Head) -> u64 {
    let bytes = head.content.max(1);
    (head.served.saturating_add(bytes / 2) / bytes).saturating_sub(1)
}

fn tenths(capacity: u64, tenths: u64) -> u64 {
    capacity / 10 * tenths
}

/// Names of what the small queue let go, for as many bytes as it let go since.
#[derive(Debug)]
struct Ghosts {
    /// Bytes.
    memory: u64,
    /// Bytes let go so far: the ghosts' clock.
    now: u64,
    /// When each name was let go last.
    since: HashMap<u64, u64>,
    /// In order. An entry counts only if `since` agrees with it.
    order: VecDeque<(u64, u64)>,
}

impl Ghosts {
    fn new(memory: u64) -> Self {
        Self {
            memory,
            now: 0,
            since: HashMap::new(),
            order: VecDeque::new(),
        }
    }

    fn add(&mut self, name: u64, bytes: u64) {
        self.now += bytes;
        self.insert(name, self.now);
    }

    fn insert(&mut self, name: u64, at: u64) {
        self.since.insert(name, at);
        self.order.push_back((name, at));
        while let Some(&(name, at)) = self.order.front()
            && (self.order.len() > MOST_GHOSTS || self.now - at > self.memory)
        {
            self.order.pop_front();
            if self.since.get(&name) == Some(&at) {
                self.since.remove(&name);
            }
        }
    }

    fn take(&mut self, name: u64) -> bool {
        self.since.remove(&name).is_some()
    }

    /// Name and age in bytes of each, the oldest first.
    fn save(&self) -> Vec<u8> {
        let counts = |(name, at): &&(u64, u64)| self.since.get(name) == Some(at);
        self.order
            .iter()
            .filter(counts)
            .flat_map(|(name, at)| [*name, self.now - at])
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    fn restore(&mut self, saved: &[u8]) {
        let (words, _) = saved.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let (ghosts, _) = words.as_chunks::<2>();
        self.now = self.memory;
        for [name, age] in ghosts {
            if let Some(at) = self.now.checked_sub(*age) {
                self.insert(*name, at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: u64 = 1000;

    fn policy() -> Policy {
        let mut policy = Policy::new(CAPACITY, Standing::default());
        // Something had to go before.
        policy.pressed = true;
        policy
    }

    /// A segment of 10 bytes.
    fn head(name: u64, served: u64) -> Head {
        Head {
            name,
            bytes: 10,
            content: 10,
            served,
            in_use: false,
        }
    }

    fn verdict(queue: Queue, served: u64) -> Verdict {
        let mut policy = policy();
        let (small, main) = (500, 500);
        policy.update(Standing { small, main });
        Round::default().judge(&mut policy, queue, head(1, served))
    }

    #[test]
    fn a_visit_is_as_many_bytes_as_the_segment_has_and_the_first_does_not_count() {
        let to_main = |served| Verdict::Move {
            to: Queue::Main,
            served,
        };
        for (served, small, main) in [
            (0, Verdict::Evict, Verdict::Evict),
            (10, Verdict::Evict, Verdict::Evict),
            (14, Verdict::Evict, Verdict::Evict),
            (15, to_main(10), to_main(10)),
            (24, to_main(10), to_main(10)),
            (25, to_main(20), to_main(20)),
            (40, to_main(30), to_main(30)),
            (10_000, to_main(30), to_main(30)),
            (u64::MAX, to_main(30), to_main(30)),
        ] {
            assert_eq!(verdict(Queue::Small, served), small, "{served}");
            assert_eq!(verdict(Queue::Main, served), main, "{served}");
        }
    }

    #[test]
    fn what_fits_begins_in_main_until_something_had_to_go() {
        let mut policy = Policy::new(CAPACITY, Standing::default());
        assert_eq!(policy.admit(1), Queue::Small);
        let (small, main) = (100, 0);
        policy.update(Standing { small, main });
        assert_eq!(policy.admit(2), Queue::Main);
        Round::default().judge(&mut policy, Queue::Small, head(1, 0));
        policy.update(Standing { small, main });
        assert_eq!(policy.admit(3), Queue::Small);
        let full = Standing {
            small: 100,
            main: 800,
        };
        assert_eq!(Policy::new(CAPACITY, full).admit(4), Queue::Small);
    }

    #[test]
    fn a_ghost_counts_once_and_for_nine_tenths_of_the_capacity() {
        let mut policy = policy();
        let (small, main) = (1000, 0);
        policy.update(Standing { small, main });
        let mut round = Round::default();
        for name in 0..=91 {
            let (small, main) = (1000, 0);
            policy.update(Standing { small, main });
            let verdict = round.judge(&mut policy, Queue::Small, head(name, 0));
            assert_eq!(verdict, Verdict::Evict);
        }
        assert_eq!(policy.admit(0), Queue::Small, "forgotten");
        assert_eq!(policy.admit(1), Queue::Main, "91 were let go with it");
        assert_eq!(policy.admit(1), Queue::Small, "taken");
        assert_eq!(policy.ghost_hits(), 1);

        let mut restored = Policy::new(CAPACITY, Standing::default());
        restored.pressed = true;
        restored.restore(&policy.save());
        assert_eq!(restored.admit(1), Queue::Small);
        assert_eq!(restored.admit(2), Queue::Main);
        assert_eq!(restored.save().len(), 16 * 89);
        // The ages are kept too.
        let verdict = Round::default().judge(&mut restored, Queue::Small, head(500, 0));
        assert_eq!(verdict, Verdict::Evict);
        assert_eq!(restored.admit(2), Queue::Small);
        assert_eq!(restored.admit(3), Queue::Main);
    }

    #[test]
    fn ghosts_are_bounded_and_damage_is_no_ghost() {
        let mut ghosts = Ghosts::new(u64::MAX / 2);
        for name in 0..MOST_GHOSTS as u64 + 10 {
            ghosts.add(name, 1);
        }
        assert_eq!(ghosts.order.len(), MOST_GHOSTS);
        assert_eq!(ghosts.since.len(), MOST_GHOSTS);
        let mut saved = ghosts.save();
        saved.truncate(16 * 7 + 9);
        let mut ghosts = Ghosts::new(10);
        ghosts.restore(&saved);
        assert!(ghosts.since.len() <= 7);
        ghosts.restore(b"?");
        ghosts.restore(&[0xff; 64]);
        ghosts.add(1, 1);
        assert!(ghosts.take(1));
    }

    /// A main queue that nobody reads gives way to what comes, one segment for each 16 let go; one that is read does not.
    #[test]
    fn a_stale_main_ebbs_away() {
        let mut main_evicted = 0;
        let mut promoted = 0;
        let mut policy = policy();
        for name in 0..1700 {
            let (small, main) = (110, 890);
            policy.update(Standing { small, main });
            let mut round = Round::default();
            let queue = round.turn(&policy).unwrap();
            match (queue, round.judge(&mut policy, queue, head(name, 0))) {
                (Queue::Main, Verdict::Evict) => main_evicted += 1,
                (Queue::Small, Verdict::Move { .. }) => promoted += 1,
                _ => {}
            }
        }
        // 16 let go, one of main, one promoted.
        assert_eq!((main_evicted, promoted), (94, 94));
        let (small, main) = (110, 890);
        policy.update(Standing { small, main });
        policy.let_go = CHALLENGE;
        let mut round = Round::default();
        assert_eq!(round.turn(&policy), Some(Queue::Main));
        let spared = round.judge(&mut policy, Queue::Main, head(1, 20));
        assert!(matches!(spared, Verdict::Move { .. }));
        assert!(!policy.vacancy);
        assert_eq!(round.turn(&policy), Some(Queue::Small));
    }

    #[derive(Clone, Debug)]
    struct Segment {
        bytes: u64,
        served: u64,
        in_use: bool,
    }

    fn segments() -> impl Strategy<Value = Vec<Segment>> {
        let segment =
            (1_u64..200, 0_u64..2000, any::<bool>()).prop_map(|(bytes, served, in_use)| Segment {
                bytes,
                served,
                in_use,
            });
        proptest::collection::vec(segment, 0..40)
    }

    proptest! {
        /// A round ends, and finds the room if there is any: whatever stands in the queues.
        #[test]
        fn a_round_ends_when_there_is_room_or_all_is_in_use(
            small in segments(),
            main in segments(),
            wanted in 1_u64..4000,
        ) {
            let mut queues = [small, main].map(VecDeque::from);
            let sum = |queue: &VecDeque<Segment>| queue.iter().map(|segment| segment.bytes).sum();
            let evictable: u64 = queues
                .iter()
                .flatten()
                .filter(|segment| !segment.in_use)
                .map(|segment| segment.bytes)
                .sum();
            let mut policy = policy();
            let [small, main] = &queues;
            policy.update(Standing { small: sum(small), main: sum(main) });
            let mut round = Round::default();
            let mut freed = 0;
            let mut looks = 0;
            while freed < wanted && let Some(queue) = round.turn(&policy) {
                looks += 1;
                // Some laps; more only if all of main is in use while much is promoted.
                prop_assert!(looks < 80 * 40, "it does not end");
                let mut segment = queues[queue as usize].pop_front().expect("it has bytes");
                let head = Head {
                    name: looks,
                    bytes: segment.bytes,
                    content: segment.bytes,
                    served: segment.served,
                    in_use: segment.in_use,
                };
                match round.judge(&mut policy, queue, head) {
                    Verdict::Evict => {
                        prop_assert!(!segment.in_use);
                        freed += segment.bytes;
                    }
                    Verdict::Move { to, served } => {
                        segment.served = served;
                        queues[to as usize].push_back(segment);
                    }
                }
                let [small, main] = &queues;
                let standing = Standing { small: sum(small), main: sum(main) };
                prop_assert_eq!(policy.standing(), standing);
            }
            prop_assert!(freed >= wanted.min(evictable), "{freed} of {evictable}");
        }
    }
}
