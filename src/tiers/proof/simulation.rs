//! A replica among clients, writers, an operator and bad weather, all drawn from one seed: the same seed is the same
//! run, event by event.
//!
//! Every event is an entry of the trace, with its virtual time: who asked for what and what came of it, byte for byte
//! (as a checksum), what was uploaded, purged, flushed, when the process ended and how many requests the remote saw. A
//! failure names its seed; `PINRANGE_SIMULATE=SEED` runs that one and prints the trace, and
//! `PINRANGE_SIMULATIONS=COUNT` runs more seeds than the few of every build.

#![expect(clippy::future_not_send, reason = "all is on one thread")]

use std::cell::RefCell;
use std::fmt::Write as _;

use futures::future::join_all;

use super::*;
use crate::chance::seeded::{self, Dice};

const KEYS: [&str; 3] = ["a", "b", "c"];
const CLIENTS: u64 = 12;
/// Requests of one client in one life of the replica.
const REQUESTS: u64 = 8;
const LIVES: u64 = 3;
const SEEDS: u64 = 6;

/// What happened, in order.
#[derive(Default)]
struct Trace(RefCell<String>);

impl Trace {
    fn note(&self, event: &str) {
        let now = Instant::now();
        let mut trace = self.0.borrow_mut();
        START.with(|start| {
            let at = now.duration_since(start.get().unwrap_or(now));
            writeln!(trace, "{:>9} {event}", at.as_micros()).unwrap();
        });
    }

    fn digest(&self) -> u64 {
        let trace = self.0.borrow();
        // FNV-1a: the same on every machine.
        trace.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
    }
}

thread_local! {
    static START: std::cell::Cell<Option<Instant>> = const { std::cell::Cell::new(None) };
}

struct Simulation {
    world: World,
    trace: Trace,
    dice: RefCell<Dice>,
}

impl Simulation {
    fn below(&self, end: u64) -> u64 {
        self.dice.borrow_mut().below(end)
    }

    fn percent(&self, of: u64) -> bool {
        self.dice.borrow_mut().percent(of)
    }

    fn key(&self) -> &'static str {
        KEYS[usize::try_from(self.below(KEYS.len() as u64)).unwrap()]
    }

    async fn pause(&self, most: u64) {
        tokio::time::sleep(Duration::from_micros(1 + self.below(most * 1000))).await;
    }

    fn put(&self, key: &'static str) {
        let (seed, size) = (self.below(1000), self.below(5 * PART));
        let validator = self.world.put(key, &object(seed, size));
        self.trace
            .note(&format!("put {key} {validator:?} of {size}"));
    }

    /// A download as real clients make it: one revision, many ranges, in whatever order.
    async fn client(&self, replica: &Replica, name: u64) -> Result<(), String> {
        for _ in 0..REQUESTS {
            self.pause(400).await;
            let key = self.key();
            let pin = self.world.current(key).filter(|_| self.percent(70));
            let range = self.percent(80).then(|| {
                let first = self.below(4 * PART);
                format!("bytes={first}-{}", first + self.below(2 * PART))
            });
            let ask = Ask {
                key,
                method: Method::Get,
                if_match: pin.map(|pin| pin.as_field_value().to_owned()),
                if_none_match: None,
                range,
                no_cache: self.percent(5),
                leaves_after: self
                    .percent(15)
                    .then(|| usize::try_from(self.below(4)).unwrap()),
            };
            let answer = self.world.ask(replica, &ask).await;
            let crc = match &answer {
                Answer::Body { parts, .. } => parts
                    .iter()
                    .map(|(_, body)| crc_fast::crc32_iscsi(body))
                    .fold(0, u32::wrapping_add),
                _ => 0,
            };
            let answered = match &answer {
                // The chain below it is prose.
                Answer::Refused(Refusal::PinLost { current }) => format!("412 {current:?}"),
                Answer::Refused(Refusal::NotFound { .. }) => "404".to_owned(),
                Answer::Refused(Refusal::Unavailable { .. }) => "503".to_owned(),
                Answer::Refused(Refusal::TimedOut { .. }) => "504".to_owned(),
                Answer::Refused(Refusal::BadGateway { .. }) => "502".to_owned(),
                given => format!("{given:?}"),
            };
            self.trace.note(&format!(
                "client {name}: {key} {:?} {:?}: {answered} {crc:08x}",
                ask.if_match, ask.range
            ));
            self.world.check_body(&ask, &answer)?;
        }
        Ok(())
    }

    async fn writer(&self) {
        for _ in 0..4 {
            self.pause(900).await;
            let key = self.key();
            if self.percent(10) {
                self.world.delete(key);
                self.trace.note(&format!("delete {key}"));
            } else {
                self.put(key);
            }
        }
    }

    async fn operator(&self, replica: &Replica) {
        for _ in 0..4 {
            self.pause(800).await;
            match self.below(4) {
                0 => {
                    let key = self.key();
                    let purged = replica.tiers.purge(&self.world.mount, key, false).await;
                    self.trace
                        .note(&format!("purge {key}: {:?}", purged.unwrap()));
                }
                1 => {
                    self.world
                        .weather
                        .outage(Some(RemoteErrorKind::Unavailable));
                    self.trace.note("outage");
                    self.pause(500).await;
                    self.world.weather.outage(None);
                    self.trace.note("outage over");
                }
                _ => {
                    replica.disk.flush().await.unwrap();
                    self.trace.note("flush");
                }
            }
        }
    }

    async fn live(&self, replica: &Replica) -> Result<(), String> {
        let clients = (0..CLIENTS).map(|name| self.client(replica, name));
        let (clients, (), ()) =
            tokio::join!(join_all(clients), self.writer(), self.operator(replica));
        clients.into_iter().collect::<Result<(), String>>()?;
        let (stats, weather) = (replica.disk.stats(), &self.world.weather);
        if stats.used_bytes > CAPACITY {
            return Err(format!("{} bytes on disk", stats.used_bytes));
        }
        self.trace.note(&format!(
            "remote: {} calls, {} bytes, {} blows; disk: {} bytes, {} evictions, {} open",
            weather.calls(),
            weather.sent(),
            weather.struck(),
            stats.used_bytes,
            stats.evictions,
            stats.open_files,
        ));
        Ok(())
    }
}

/// One run, whole. The trace, if nothing was wrong.
fn simulate(seed: u64) -> Result<Trace, String> {
    seeded::by(seed);
    let simulation = Simulation {
        world: World::new(),
        trace: Trace::default(),
        dice: RefCell::new(Dice::new(seed)),
    };
    simulation.world.weather.draw(15, !seed);
    for life in 0..LIVES {
        let runtime = runtime();
        let replica = runtime.block_on(async {
            START.set(Some(Instant::now()));
            if life == 0 {
                for key in KEYS {
                    simulation.put(key);
                }
            }
            simulation.world.start()
        });
        let lived = runtime.block_on(simulation.live(&replica));
        lived.map_err(|why| format!("{why}\n{}", simulation.trace.0.borrow()))?;
        let crashes = simulation.percent(50);
        runtime.block_on(async {
            simulation
                .trace
                .note(if crashes { "crash" } else { "close" });
        });
        if crashes {
            drop(runtime);
            replica.crash();
            simulation.world.rot(&[simulation.below(u64::MAX)]);
        } else {
            runtime.block_on(replica.close());
        }
        simulation.world.clock_stops();
    }
    Ok(simulation.trace)
}

fn simulated(seed: u64) -> Trace {
    simulate(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"))
}

#[test]
fn a_seed_is_a_run() {
    if let Ok(seed) = std::env::var("PINRANGE_SIMULATE") {
        let trace = simulated(seed.parse().unwrap());
        println!("{}digest {:016x}", trace.0.borrow(), trace.digest());
        return;
    }
    let seeds = std::env::var("PINRANGE_SIMULATIONS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let mut digests = std::collections::HashSet::new();
    for seed in 0..seeds {
        let (once, twice) = (simulated(seed), simulated(seed));
        let events = once.0.borrow().lines().count();
        assert!(events > 100, "seed {seed}: only {events} events");
        let differs = std::iter::zip(once.0.borrow().lines(), twice.0.borrow().lines())
            .find(|(one, other)| one != other)
            .map(|(one, other)| format!("{one}\n{other}"));
        assert_eq!(differs, None, "seed {seed} does not replay");
        assert_eq!(once.digest(), twice.digest(), "seed {seed} does not replay");
        digests.insert(once.digest());
    }
    assert_eq!(digests.len() as u64, seeds, "two seeds are one run");
}
