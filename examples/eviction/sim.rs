//! A cache simulated: reads of chunks of segments, and policies that choose what goes.
//!
//! Geometry as in the tier: segments of 64 MiB, which may be held in part. The unit of reading is a chunk of
//! 4 MiB, as a parallel downloader asks for it. [`Pinrange`] drives the tier's own policy, code and all; the others are what it is
//! compared with. `tests/eviction.rs` holds both against thresholds, and [`Pinrange`] against the tier itself.

use std::collections::{BTreeMap, HashMap, VecDeque};

use pinrange::disk::policy::{Head, Policy, Queue, Round, Standing, Verdict};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const CHUNK: u64 = 4 * MIB;
/// Chunks of a segment.
pub(crate) const CHUNKS: u64 = 16;
pub(crate) const SEGMENT: u64 = CHUNK * CHUNKS;

/// Which segment of which object.
pub(crate) type Name = u64;

/// A cache of one policy.
pub(crate) trait Cache {
    /// Reads a chunk; fetches it if it is not there. Returns whether it was.
    fn read(&mut self, name: Name, chunk: u64) -> bool;
}

/// Makes a cache of so many bytes.
pub(crate) type Make = fn(u64) -> Box<dyn Cache>;

/// The policies, the tier's last.
pub(crate) const POLICIES: [(&str, Make); 5] = [
    ("FIFO", |capacity| Box::new(Ordered::new(capacity, false))),
    ("LRU", |capacity| Box::new(Ordered::new(capacity, true))),
    ("W-TinyLFU", |capacity| Box::new(TinyLfu::new(capacity))),
    ("S3-FIFO by touches", |capacity| {
        Box::new(Pinrange::new(capacity, Counting::Touches))
    }),
    ("pinrange", |capacity| {
        Box::new(Pinrange::new(capacity, Counting::Bytes))
    }),
];

/// FIFO and LRU.
struct Ordered {
    capacity: u64,
    lru: bool,
    used: u64,
    now: u64,
    /// Chunks held, as bits, and the place in `order`.
    held: HashMap<Name, (u64, u64)>,
    order: BTreeMap<u64, Name>,
}

impl Ordered {
    fn new(capacity: u64, lru: bool) -> Self {
        Self {
            capacity,
            lru,
            used: 0,
            now: 0,
            held: HashMap::new(),
            order: BTreeMap::new(),
        }
    }
}

impl Cache for Ordered {
    fn read(&mut self, name: Name, chunk: u64) -> bool {
        self.now += 1;
        let (chunks, place) = self.held.entry(name).or_insert((0, self.now));
        if self.lru {
            self.order.remove(place);
            *place = self.now;
        }
        self.order.insert(*place, name);
        let hit = add(chunks, chunk);
        self.used += if hit { 0 } else { CHUNK };
        while self.used > self.capacity {
            let (_, name) = self.order.pop_first().expect("something is held");
            let (chunks, _) = self.held.remove(&name).expect("what is ordered is held");
            self.used -= bytes(chunks);
        }
        hit
    }
}

/// What counts as being read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counting {
    /// Bytes sent, as the tier does it.
    Bytes,
    /// Every read of a chunk, as caches of small objects do it.
    Touches,
}

/// The tier's policy over two lists.
pub(crate) struct Pinrange {
    capacity: u64,
    counting: Counting,
    policy: Policy,
    standing: Standing,
    held: HashMap<Name, Held>,
    queues: [VecDeque<Name>; 2],
}

struct Held {
    chunks: u64,
    served: u64,
    touches: u64,
    queue: Queue,
}

impl Pinrange {
    pub(crate) fn new(capacity: u64, counting: Counting) -> Self {
        Self {
            capacity,
            counting,
            policy: Policy::new(capacity, Standing::default()),
            standing: Standing::default(),
            held: HashMap::new(),
            queues: Default::default(),
        }
    }

    fn standing_of(&mut self, queue: Queue) -> &mut u64 {
        match queue {
            Queue::Small => &mut self.standing.small,
            Queue::Main => &mut self.standing.main,
        }
    }

    fn make_room(&mut self, wanted: u64) {
        let mut round = Round::default();
        while self.standing.small + self.standing.main + wanted > self.capacity {
            self.policy.update(self.standing);
            let queue = round.turn(&self.policy).expect("nothing is in use");
            let name = self.queues[queue as usize]
                .pop_front()
                .expect("the queue has bytes");
            let held = self.held.get_mut(&name).expect("what is queued is held");
            let bytes = bytes(held.chunks);
            let served = match self.counting {
                Counting::Bytes => held.served,
                Counting::Touches => held.touches * bytes,
            };
            let head = Head {
                name,
                bytes,
                content: bytes,
                served,
                in_use: false,
            };
            let verdict = round.judge(&mut self.policy, queue, head);
            *self.standing_of(queue) -= bytes;
            match verdict {
                Verdict::Evict => {
                    self.held.remove(&name);
                }
                Verdict::Move { to, served } => {
                    let held = self.held.get_mut(&name).expect("it was there above");
                    held.queue = to;
                    held.served = served;
                    held.touches = served / bytes;
                    *self.standing_of(to) += bytes;
                    self.queues[to as usize].push_back(name);
                }
            }
        }
    }

    /// Chunks held of a segment, as bits.
    pub(crate) fn chunks(&self, name: Name) -> u64 {
        self.held.get(&name).map_or(0, |held| held.chunks)
    }
}

impl Cache for Pinrange {
    fn read(&mut self, name: Name, chunk: u64) -> bool {
        let hit = (self.chunks(name) >> chunk) & 1 == 1;
        if !hit {
            self.make_room(CHUNK);
            // The chunk is on its way.
            let Standing { small, main } = self.standing;
            let small = small + CHUNK;
            self.policy.update(Standing { small, main });
        }
        let held = self.held.entry(name).or_insert_with(|| {
            let queue = self.policy.admit(name);
            self.queues[queue as usize].push_back(name);
            Held {
                chunks: 0,
                served: 0,
                touches: 0,
                queue,
            }
        });
        held.chunks |= 1 << chunk;
        held.served += CHUNK;
        held.touches += 1;
        let queue = held.queue;
        if !hit {
            *self.standing_of(queue) += CHUNK;
        }
        hit
    }
}

/// W-TinyLFU: a window of a hundredth, a segmented LRU behind it, and entry to that only for what was read more
/// than what it would displace. Frequencies are exact where the paper has a sketch, and a pass over a segment counts as 1.
struct TinyLfu {
    capacity: u64,
    now: u64,
    held: HashMap<Name, Lfu>,
    /// Window, probation, protected.
    order: [BTreeMap<u64, Name>; 3],
    bytes: [u64; 3],
    /// In chunks read.
    frequency: HashMap<Name, u64>,
    read: u64,
}

struct Lfu {
    chunks: u64,
    part: usize,
    place: u64,
}

impl TinyLfu {
    const WINDOW: usize = 0;
    const PROBATION: usize = 1;
    const PROTECTED: usize = 2;

    fn new(capacity: u64) -> Self {
        Self {
            capacity,
            now: 0,
            held: HashMap::new(),
            order: Default::default(),
            bytes: [0; 3],
            frequency: HashMap::new(),
            read: 0,
        }
    }

    fn shift(&mut self, name: Name, to: usize) {
        self.now += 1;
        let held = self.held.get_mut(&name).expect("it is held");
        let bytes = bytes(held.chunks);
        self.order[held.part].remove(&held.place);
        self.bytes[held.part] -= bytes;
        (held.part, held.place) = (to, self.now);
        self.order[to].insert(self.now, name);
        self.bytes[to] += bytes;
    }

    fn evict(&mut self, name: Name) {
        let held = self.held.remove(&name).expect("it is held");
        self.order[held.part].remove(&held.place);
        self.bytes[held.part] -= bytes(held.chunks);
    }

    fn oldest(&self, part: usize) -> Option<Name> {
        self.order[part].values().next().copied()
    }

    fn frequency(&self, name: Name) -> u64 {
        self.frequency.get(&name).copied().unwrap_or(0)
    }

    fn shrink(&mut self) {
        let window = self.capacity / 100;
        let main = self.capacity - window;
        while self.bytes[Self::PROTECTED] > main / 5 * 4 {
            let oldest = self.oldest(Self::PROTECTED).expect("it has bytes");
            self.shift(oldest, Self::PROBATION);
        }
        while self.bytes[Self::WINDOW] > window {
            let candidate = self.oldest(Self::WINDOW).expect("it has bytes");
            if self.bytes[Self::PROBATION] + self.bytes[Self::PROTECTED] + SEGMENT <= main {
                self.shift(candidate, Self::PROBATION);
                continue;
            }
            let victim = self
                .oldest(Self::PROBATION)
                .or_else(|| self.oldest(Self::PROTECTED));
            match victim {
                // Half a segment more: less is noise of a pass under way.
                Some(victim) if self.frequency(candidate) > self.frequency(victim) + CHUNKS / 2 => {
                    self.evict(victim);
                    self.shift(candidate, Self::PROBATION);
                }
                _ => self.evict(candidate),
            }
        }
    }
}

impl Cache for TinyLfu {
    fn read(&mut self, name: Name, chunk: u64) -> bool {
        *self.frequency.entry(name).or_default() += 1;
        self.read += CHUNK;
        if self.read > 10 * self.capacity {
            self.read = 0;
            self.frequency.retain(|_, count| {
                *count /= 2;
                *count > 0
            });
        }
        self.now += 1;
        let now = self.now;
        let held = self.held.entry(name).or_insert_with(|| {
            self.order[Self::WINDOW].insert(now, name);
            Lfu {
                chunks: 0,
                part: Self::WINDOW,
                place: now,
            }
        });
        let part = held.part;
        let hit = add(&mut held.chunks, chunk);
        self.bytes[part] += if hit { 0 } else { CHUNK };
        let promoted = hit && part == Self::PROBATION;
        self.shift(name, if promoted { Self::PROTECTED } else { part });
        self.shrink();
        hit
    }
}

fn add(chunks: &mut u64, chunk: u64) -> bool {
    let hit = (*chunks >> chunk) & 1 == 1;
    *chunks |= 1 << chunk;
    hit
}

fn bytes(chunks: u64) -> u64 {
    u64::from(chunks.count_ones()) * CHUNK
}
