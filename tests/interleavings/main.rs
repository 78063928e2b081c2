//! Interleavings of threads over the locks of the program, tried by the thousand.
//!
//! The modules under test are compiled a second time here, with other locks: what they call `parking_lot` is
//! [shuttle](https://docs.rs/shuttle)'s, whose scheduler decides at every lock who goes on. A schedule is drawn at random
//! from a seed, and by PCT, which finds bugs that need few but exact switches. A failure prints its schedule,
//! which `PINRANGE_SCHEDULE` takes to replay it; `PINRANGE_SCHEDULES` is how many each check tries.
//!
//! A thread that is left waiting for ever is a failure as well: shuttle reports the deadlock.
//!
//! ```text
//! cargo test --test interleavings            all checks
//! cargo test --test interleavings NAME       those whose name has NAME in it
//! ```
#![expect(clippy::unwrap_used, reason = "a check fails by panicking")]

extern crate shuttle_parking_lot as parking_lot;

mod fill;

/// Of `src/fill.rs`, what needs no runtime.
#[path = "../../src/fill/flights.rs"]
#[expect(unreachable_pub, reason = "public in the program")]
mod flights;

/// Schedules of each kind that a check tries where nobody says otherwise: a second or two in all.
const SCHEDULES: usize = 2_000;

/// PCT's depth: how many exact switches a bug may need.
const DEPTH: usize = 3;

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let schedules = std::env::var("PINRANGE_SCHEDULES").map_or(SCHEDULES, |number| {
        number.parse().expect("a number of schedules")
    });
    let replay = std::env::var("PINRANGE_SCHEDULE").ok();
    for (name, check) in fill::CHECKS {
        if filter.as_ref().is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        if let Some(schedule) = &replay {
            shuttle::replay(check, schedule);
        } else {
            shuttle::check_random(check, schedules);
            shuttle::check_pct(check, schedules, DEPTH);
        }
        println!("{name}: ok");
    }
}
