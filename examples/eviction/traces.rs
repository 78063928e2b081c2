//! Seeded traces: the same reads every time, on every machine.
//!
//! A trace is what a number of parallel downloads do, each reading its object from the start to the end through a window of
//! some chunks in any order, and all of them taking turns at random.

use std::collections::VecDeque;

use crate::sim::{CHUNK, CHUNKS, Name, SEGMENT};

/// One read of a chunk.
#[derive(Clone, Copy)]
pub(crate) struct Read {
    pub(crate) name: Name,
    pub(crate) chunk: u64,
    /// By a scan, which nobody expects to hit.
    pub(crate) scan: bool,
}

/// A trace for a cache of so many bytes, and what it is.
pub(crate) struct Trace {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) make: fn(u64) -> Vec<Read>,
}

pub(crate) const TRACES: [Trace; 7] = [
    Trace {
        name: "zipf",
        what: "2000 objects of 64 MiB to 4 GiB, popularity Zipf 0.9, 8 downloads at a time",
        make: |capacity| zipf(capacity, false),
    },
    Trace {
        name: "zipf+scans",
        what: "the same; every 400th download reads 1.5 times the capacity that nobody wants again",
        make: |capacity| zipf(capacity, true),
    },
    Trace {
        name: "loop 1.1",
        what: "one object of 1.1 times the capacity, 20 times from start to end",
        make: |capacity| looped(capacity, 11),
    },
    Trace {
        name: "loop 2",
        what: "one object of twice the capacity, 20 times from start to end",
        make: |capacity| looped(capacity, 20),
    },
    Trace {
        name: "zipf, then loop 2",
        what: "a loop over twice the capacity that begins when the cache is full of something else",
        make: |capacity| {
            let mut trace = zipf(capacity, false);
            trace.truncate(index(capacity / CHUNK * 8));
            trace.extend(looped(capacity, 20));
            trace
        },
    },
    Trace {
        name: "CI fleet",
        what: "16 clients download the newest of 12 kinds of snapshot (5 % of the capacity each), which are replaced now and \
               then; one download in three is a backup that reads the old ones",
        make: fleet,
    },
    Trace {
        name: "drift",
        what: "as zipf, but what is popular changes with every 40th download",
        make: drift,
    },
];

/// `SplitMix64`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "53 bits are as many as it holds"
    )]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, index(self.below(last as u64 + 1)));
        }
    }
}

/// Ranks from 0 on, the n-th as likely as `1 / n^exponent`.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(ranks: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let mut bounds: Vec<f64> = (1..=ranks)
            .map(|rank| {
                sum += f64::from(rank).powf(-exponent);
                sum
            })
            .collect();
        for bound in &mut bounds {
            *bound /= sum;
        }
        Self(bounds)
    }

    fn pick(&self, random: &mut Random) -> usize {
        let at = random.unit();
        self.0
            .partition_point(|bound| *bound < at)
            .min(self.0.len() - 1)
    }
}

/// One download under way.
struct Download {
    object: u64,
    /// Chunks.
    length: u64,
    at: u64,
    /// Chunks asked for at once.
    window: u64,
    scan: bool,
}

impl Download {
    fn new(object: u64, segments: u64) -> Self {
        Self {
            object,
            length: segments * CHUNKS,
            at: 0,
            window: 16,
            scan: false,
        }
    }
}

/// `clients` downloads at a time until `next` has no more, or the trace has `limit` reads.
fn run(
    random: &mut Random,
    clients: usize,
    limit: usize,
    mut next: impl FnMut(&mut Random) -> Option<Download>,
) -> Vec<Read> {
    let mut trace = Vec::new();
    let mut active: Vec<Download> = Vec::new();
    loop {
        while active.len() < clients
            && let Some(download) = next(random)
        {
            active.push(download);
        }
        if active.is_empty() || trace.len() >= limit {
            return trace;
        }
        let turn = index(random.below(active.len() as u64));
        let download = &mut active[turn];
        let end = download.length.min(download.at + download.window);
        let mut chunks: Vec<u64> = (download.at..end).collect();
        random.shuffle(&mut chunks);
        trace.extend(chunks.into_iter().map(|chunk| Read {
            name: (download.object << 16) | (chunk / CHUNKS),
            chunk: chunk % CHUNKS,
            scan: download.scan,
        }));
        download.at = end;
        if end == download.length {
            active.swap_remove(turn);
        }
    }
}

/// Segments of each object: about log-normal, 8 in the middle.
fn sizes(random: &mut Random, objects: usize) -> Vec<u64> {
    (0..objects)
        .map(|_| {
            let normal = (0..6).map(|_| random.unit()).sum::<f64>() - 3.0;
            let size = 8.0 * (normal * 1.2).exp();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and 300"
            )]
            let size = size as u64;
            size.clamp(1, 64)
        })
        .collect()
}

fn zipf(capacity: u64, scans: bool) -> Vec<Read> {
    let mut random = Random(1);
    let sizes = sizes(&mut random, 2000);
    let mut objects: Vec<usize> = (0..sizes.len()).collect();
    random.shuffle(&mut objects);
    let popular = Zipf::new(2000, 0.9);
    let mut count = 0;
    run(
        &mut random,
        8,
        index(capacity / CHUNK * 40),
        move |random| {
            count += 1;
            if scans && count % 400 == 200 {
                return Some(Download {
                    window: 64,
                    scan: true,
                    ..Download::new(100_000 + count, capacity / SEGMENT * 3 / 2)
                });
            }
            let object = objects[popular.pick(random)];
            Some(Download::new(object as u64, sizes[object]))
        },
    )
}

fn looped(capacity: u64, tenths: u64) -> Vec<Read> {
    let segments = capacity / SEGMENT * tenths / 10;
    let mut laps = 0;
    run(&mut Random(2), 1, usize::MAX, move |_| {
        laps += 1;
        (laps <= 20).then(|| Download {
            window: 32,
            ..Download::new(1 << 32, segments)
        })
    })
}

fn fleet(capacity: u64) -> Vec<Read> {
    const KINDS: u32 = 12;
    let segments = (capacity / SEGMENT / 20).max(1);
    let object = |kind: u64, revision: u64| (1 << 32) | (kind << 20) | revision;
    let popular = Zipf::new(KINDS, 0.7);
    let mut newest = [0_u64; KINDS as usize];
    let mut backup = VecDeque::new();
    let mut count = 0;
    run(
        &mut Random(3),
        16,
        index(capacity / CHUNK * 60),
        move |random| {
            count += 1;
            if count % 25 == 0 {
                newest[index(random.below(u64::from(KINDS)))] += 1;
            }
            if count % 3 == 0 {
                if backup.is_empty() {
                    let revisions = newest.iter().zip(0..);
                    backup = revisions
                        .flat_map(|(newest, kind)| (0..*newest).map(move |old| object(kind, old)))
                        .collect();
                }
                if let Some(old) = backup.pop_front() {
                    return Some(Download {
                        window: 32,
                        scan: true,
                        ..Download::new(old, segments)
                    });
                }
            }
            let kind = popular.pick(random);
            Some(Download::new(object(kind as u64, newest[kind]), segments))
        },
    )
}

fn drift(capacity: u64) -> Vec<Read> {
    let mut random = Random(5);
    let sizes = sizes(&mut random, 4000);
    let popular = Zipf::new(400, 1.0);
    let mut count = 0;
    run(
        &mut random,
        8,
        index(capacity / CHUNK * 40),
        move |random| {
            count += 1;
            let object = if random.below(10) == 0 {
                index(random.below(4000))
            } else {
                (popular.pick(random) * 7919 + count / 40) % 4000
            };
            Some(Download::new(object as u64, sizes[object]))
        },
    )
}

fn index(count: u64) -> usize {
    usize::try_from(count).expect("fits in memory")
}
