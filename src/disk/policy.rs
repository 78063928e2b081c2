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
    /// Bytes of segments in use that were seen since something else was.
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
        self.passed_over = Standing::default();
        let visits = visits(head).min(MOST_VISITS);
        let verdict = match queue {
            Queue::Small if visits > 0 || std::mem::take(&mut policy.vacancy) => Verdict::Move {
                to: Queue::Main,
                served: visits.max(1) * head.bytes,
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
                        served: visits * head.bytes,
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
        }
        verdict
    }
}

/// Visits after the first, to the nearest whole one.
fn visits(head: Head) -> u64 {
    let bytes = head.bytes.max(1);
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
        self.now = ghosts.iter().map(|[_, age]| *age).max().unwrap_or(0);
        let now = self.now;
        for [name, age] in ghosts {
            self.insert(*name, now - age);
        }
    }
}
