//! Interleavings of threads over the locks of the program, tried by the thousand.
//!
//! The modules under test are compiled a second time here, with other locks: what they call `parking_lot` is
//! [shuttle](https://docs.rs/shuttle)'s, whose scheduler decides at every lock who goes on. A schedule is drawn at random
//! from a seed, and by PCT, which finds bugs that need few but exact switches. A failure prints its schedule,
//! which `PINRANGE_SCHEDULE` takes to replay it; `PINRANGE_SCHEDULES` is how many each check tries.
//!
//! A thread that is left waiting for ever is a failure as well: shuttle reports the deadlock. Atomics are the real ones:
//! between two locks a thread is not interrupted.
//!
//! ```text
//! cargo test --test interleavings            all checks
//! cargo test --test interleavings NAME       those whose name has NAME in it
//! ```
#![expect(clippy::unwrap_used, reason = "a check fails by panicking")]
#![expect(
    clippy::allow_attributes,
    reason = "what is unused here changes with the program, which is linted elsewhere"
)]

// What the modules below call `parking_lot` is this crate's root.
extern crate self as parking_lot;

#[path = "../../src/causes.rs"]
#[allow(
    dead_code,
    unused_imports,
    clippy::all,
    clippy::pedantic,
    reason = "looked at in the program"
)]
mod causes;
#[path = "../../src/chance.rs"]
#[allow(dead_code, reason = "the program draws more")]
mod chance;
mod fill;
mod segments;

/// The whole tier, without threads of its own (`disk::inline`), and what it imports. Their own tests come along, but do
/// not run here.
#[path = "../../src/disk/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "as in the program"
)]
#[allow(
    unfulfilled_lint_expectations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "looked at in the program"
)]
mod disk;
#[path = "../../src/object/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "as in the program"
)]
#[allow(
    unfulfilled_lint_expectations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "looked at in the program"
)]
mod object;
#[path = "../../src/semantics/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "as in the program"
)]
#[allow(
    unfulfilled_lint_expectations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "looked at in the program"
)]
mod semantics;

/// Of `src/fill.rs`, what needs no runtime.
#[path = "../../src/fill/flights.rs"]
#[expect(unreachable_pub, reason = "public in the program")]
mod flights;

use std::time::{Duration, Instant};

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};
pub use shuttle_parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

/// Schedules of each kind that a check tries where nobody says otherwise: some seconds in all.
const SCHEDULES: usize = 2_000;

/// PCT's depth: how many exact switches a bug may need.
const DEPTH: usize = 3;

/// Name, the check, and how many times longer than the fastest it takes.
type Check = (&'static str, fn(), usize);

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let schedules = std::env::var("PINRANGE_SCHEDULES").map_or(SCHEDULES, |number| {
        number.parse().expect("a number of schedules")
    });
    let replay = std::env::var("PINRANGE_SCHEDULE").ok();
    for (name, check, cost) in [fill::CHECKS, segments::CHECKS].concat() {
        if filter.as_ref().is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        if let Some(schedule) = &replay {
            shuttle::replay(check, schedule);
        } else {
            run(RandomScheduler::new(schedules / cost), check);
            run(PctScheduler::new(DEPTH, schedules / cost), check);
        }
        println!("{name}: ok");
    }
}

fn run(scheduler: impl Scheduler + 'static, check: fn()) {
    let mut config = Config::new();
    // SQLite goes deep.
    config.stack_size = 1 << 20;
    Runner::new(scheduler, config).run(check);
}

/// Only the durability thread waits on one, and it is not there.
#[derive(Default)]
struct Condvar;

#[allow(dead_code, reason = "as far as the program and its tests need it")]
#[expect(clippy::unused_self, reason = "the real one needs it")]
impl Condvar {
    fn new() -> Self {
        Self
    }

    fn notify_one(&self) {}

    fn notify_all(&self) {}

    fn wait<T: ?Sized>(&self, _guard: &mut MutexGuard<'_, T>) {
        unreachable!("nothing waits here")
    }

    fn wait_while<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, _: impl FnMut(&mut T) -> bool) {
        self.wait(guard);
    }

    fn wait_for<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) -> TimedOut {
        self.wait(guard);
        TimedOut
    }

    fn wait_until<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> TimedOut {
        self.wait(guard);
        TimedOut
    }
}

struct TimedOut;

#[expect(clippy::unused_self, reason = "the real one needs it")]
impl TimedOut {
    fn timed_out(&self) -> bool {
        true
    }
}
