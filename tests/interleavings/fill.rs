//! The interval map of flights (`src/fill/flights.rs`) among readers, flights, purges.
//!
//! A flight here is a thread, a disk is a set of blocks of one byte, and each block knows how often it was fetched.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shuttle::future::block_on;
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::sync::{Condvar, Mutex as Waitable};
use shuttle::thread;

use crate::Check;
use crate::flights::{Flights, Gaps, InFlight, Span, unless_called_off};

pub(crate) const CHECKS: &[Check] = &[
    (
        "each_block_leaves_the_remote_once",
        each_block_leaves_the_remote_once,
        1,
    ),
    (
        "nobody_follows_a_flight_that_gave_up",
        nobody_follows_a_flight_that_gave_up,
        1,
    ),
    (
        "who_hears_of_the_end_does_not_meet_it_again",
        who_hears_of_the_end_does_not_meet_it_again,
        1,
    ),
    (
        "nothing_of_a_called_off_flight_is_kept",
        nothing_of_a_called_off_flight_is_kept,
        1,
    ),
    (
        "what_was_asked_for_before_a_purge_is_not_adopted",
        what_was_asked_for_before_a_purge_is_not_adopted,
        1,
    ),
    (
        "a_called_off_flight_leaves_its_successor_alone",
        a_called_off_flight_leaves_its_successor_alone,
        1,
    ),
    (
        "a_read_is_adopted_beside_no_other_flight",
        a_read_is_adopted_beside_no_other_flight,
        1,
    ),
];

const REVISION: u8 = 7;
const BLOCKS: u64 = 5;
/// Blocks that one flight fetches at most.
const PART: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    UnderWay,
    Done,
    Failed,
}

struct Flight {
    span: Span,
    /// What it writes: the era of the map when it was launched, where a check says nothing else.
    mark: u64,
    followers: AtomicUsize,
    called_off: AtomicBool,
    phase: Waitable<Phase>,
    changed: Condvar,
}

impl Flight {
    fn tell(&self, phase: Phase) {
        *self.phase.lock().unwrap() = phase;
        self.changed.notify_all();
    }
}

impl InFlight for Flight {
    type Follow = Follow;

    fn span(&self) -> Span {
        self.span
    }

    fn follow(self: &Arc<Self>, collapsed: bool) -> Follow {
        self.followers.fetch_add(1, Ordering::SeqCst);
        Follow {
            flight: Arc::clone(self),
            collapsed,
        }
    }

    fn is_followed(&self) -> bool {
        self.followers.load(Ordering::SeqCst) > 0
    }

    fn call_off(&self) {
        self.called_off.store(true, Ordering::SeqCst);
    }
}

struct Follow {
    flight: Arc<Flight>,
    collapsed: bool,
}

impl Follow {
    /// Waits for the end of the flight.
    fn end(&self) -> Phase {
        let phase = self.flight.phase.lock().unwrap();
        *self
            .flight
            .changed
            .wait_while(phase, |phase| *phase == Phase::UnderWay)
            .unwrap()
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        self.flight.followers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a flight does once it was launched.
type Work = fn(&Arc<World>, &Arc<Flight>);

struct World {
    flights: Flights<u8, Flight>,
    /// What is on disk, and the mark of the flight that brought it.
    disk: Mutex<BTreeMap<u64, u64>>,
    /// How often, by block and mark of the flight.
    fetched: Mutex<BTreeMap<(u64, u64), usize>>,
    tasks: Mutex<Vec<thread::JoinHandle<()>>>,
    work: Work,
}

struct Wanted {
    on_disk: Vec<u64>,
    end: u64,
}

impl Gaps for Wanted {
    fn end(&self) -> u64 {
        self.end
    }

    fn first_from(&self, offset: u64) -> Option<Span> {
        let absent = |block: &u64| !self.on_disk.contains(block);
        let start = (offset..self.end).find(absent)?;
        let end = (start..self.end)
            .find(|block| !absent(block))
            .unwrap_or(self.end);
        Some(Span { start, end })
    }

    fn part(&self, gap: Span) -> Span {
        Span {
            start: gap.start,
            end: gap.end.min(gap.start + PART),
        }
    }
}

impl World {
    fn new(work: Work) -> Arc<Self> {
        Arc::new(Self {
            flights: Flights::default(),
            disk: Mutex::default(),
            fetched: Mutex::default(),
            tasks: Mutex::default(),
            work,
        })
    }

    fn launch(self: &Arc<Self>, span: Span) -> Arc<Flight> {
        self.launch_with(span, self.flights.era())
    }

    fn launch_with(self: &Arc<Self>, span: Span, mark: u64) -> Arc<Flight> {
        let flight = Arc::new(Flight {
            span,
            mark,
            followers: AtomicUsize::new(0),
            called_off: AtomicBool::new(false),
            phase: Waitable::new(Phase::UnderWay),
            changed: Condvar::new(),
        });
        let (world, task) = (Arc::clone(self), Arc::clone(&flight));
        let task = thread::spawn(move || (world.work)(&world, &task));
        self.tasks.lock().push(task);
        flight
    }

    fn join(self: &Arc<Self>, start: u64, end: u64) -> Vec<Follow> {
        let gaps = || Wanted {
            on_disk: self.disk.lock().keys().copied().collect(),
            end,
        };
        self.flights
            .join(&REVISION, start, usize::MAX, gaps, |span| self.launch(span))
    }

    /// Joins until nothing of the stretch is missing.
    fn read(self: &Arc<Self>, start: u64, end: u64) {
        loop {
            let follows = self.join(start, end);
            if follows.is_empty() {
                return;
            }
            for follow in follows {
                follow.end();
            }
        }
    }

    /// Waits for all flights, those that are launched meanwhile too.
    fn landed(&self) {
        loop {
            let Some(task) = self.tasks.lock().pop() else {
                return;
            };
            task.join().unwrap();
        }
    }

    fn purge(&self) {
        self.flights.call_off(|_| true);
        self.disk.lock().clear();
    }
}

fn fetch(world: &Arc<World>, flight: &Arc<Flight>) {
    for block in flight.span.start..flight.span.end {
        *world
            .fetched
            .lock()
            .entry((block, flight.mark))
            .or_default() += 1;
        world.disk.lock().insert(block, flight.mark);
    }
    world
        .flights
        .finish(&REVISION, flight, || flight.tell(Phase::Done));
}

/// P8: staggered readers, each block fetched once.
fn each_block_leaves_the_remote_once() {
    let world = World::new(fetch);
    let readers = [(0, 3), (2, BLOCKS), (1, 4)].map(|(start, end)| {
        let world = Arc::clone(&world);
        thread::spawn(move || world.read(start, end))
    });
    for reader in readers {
        reader.join().unwrap();
    }
    world.landed();
    let fetched: Vec<_> = world.fetched.lock().values().copied().collect();
    assert_eq!(fetched, [1; 5], "each of the {BLOCKS} blocks once");
}

/// One reader leaves at once, the other stays: whoever follows hears of an end.
fn nobody_follows_a_flight_that_gave_up() {
    fn work(world: &Arc<World>, flight: &Arc<Flight>) {
        // It gives up without a word, for nobody is there to hear it.
        if !world.flights.withdraw(&REVISION, flight) {
            fetch(world, flight);
        }
    }
    let world = World::new(work);
    let stayer = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.read(0, PART))
    };
    drop(world.join(0, PART));
    stayer.join().unwrap();
    world.landed();
    assert_eq!(world.disk.lock().len() as u64, PART);
}

/// A flight failed: those who followed it join again, and are not given it once more.
fn who_hears_of_the_end_does_not_meet_it_again() {
    fn fail(world: &Arc<World>, flight: &Arc<Flight>) {
        world
            .flights
            .finish(&REVISION, flight, || flight.tell(Phase::Failed));
    }
    let world = World::new(fail);
    let readers = [(); 2].map(|()| {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let first = world.join(0, 1).remove(0);
            assert_eq!(first.end(), Phase::Failed);
            let second = world.join(0, 1).remove(0);
            assert!(
                !Arc::ptr_eq(&first.flight, &second.flight),
                "the same failure twice"
            );
            second.end();
        })
    });
    for reader in readers {
        reader.join().unwrap();
    }
    world.landed();
}

/// As a fill admits: a purge may overtake it, and then it is undone.
fn admit(world: &Arc<World>, flight: &Arc<Flight>) {
    let admitted = block_on(unless_called_off(
        || flight.called_off.load(Ordering::SeqCst),
        async {
            world.disk.lock().insert(flight.span.start, flight.mark);
            Ok::<_, ()>(())
        },
        async {
            world.disk.lock().clear();
            Ok(())
        },
    ));
    let phase = match admitted {
        Ok(Some(())) => Phase::Done,
        _ => Phase::Failed,
    };
    world
        .flights
        .finish(&REVISION, flight, || flight.tell(phase));
}

/// A purge overtakes an admission.
fn nothing_of_a_called_off_flight_is_kept() {
    let world = World::new(admit);
    let reader = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let follow = world.join(0, 1).remove(0);
            follow.end()
        })
    };
    world.purge();
    reader.join().unwrap();
    world.landed();
    let now = world.flights.era();
    assert!(
        world.disk.lock().values().all(|era| *era == now),
        "kept from before the purge"
    );
}

/// A self-labelling read was sent, then came a purge: its answer fills nothing.
fn what_was_asked_for_before_a_purge_is_not_adopted() {
    let world = World::new(admit);
    let object = Arc::new(AtomicUsize::new(1));
    let asker = {
        let (world, object) = (Arc::clone(&world), Arc::clone(&object));
        thread::spawn(move || {
            let era = world.flights.era();
            let answer = object.load(Ordering::SeqCst) as u64;
            let span = Span { start: 0, end: 1 };
            let launch = |span| world.launch_with(span, answer);
            world.flights.adopt(&REVISION, span, era, || false, launch)
        })
    };
    // What must not be served any more is taken back, then purged.
    object.store(2, Ordering::SeqCst);
    world.purge();
    drop(asker.join().unwrap());
    world.landed();
    assert!(
        world.disk.lock().values().all(|answer| *answer == 2),
        "kept what was purged"
    );
}

/// A flight that was called off ends late; the one that took its place stays in the map.
fn a_called_off_flight_leaves_its_successor_alone() {
    fn work(world: &Arc<World>, flight: &Arc<Flight>) {
        if flight.called_off.load(Ordering::SeqCst) {
            world
                .flights
                .finish(&REVISION, flight, || flight.tell(Phase::Failed));
        } else {
            fetch(world, flight);
        }
    }
    let world = World::new(work);
    let readers = [(); 2].map(|()| {
        let world = Arc::clone(&world);
        thread::spawn(move || world.read(0, 1))
    });
    world.flights.call_off(|_| true);
    world.read(0, 1);
    for reader in readers {
        reader.join().unwrap();
    }
    world.landed();
    let often = world.fetched.lock().values().copied().max();
    assert!(often <= Some(1), "fetched {often:?} times since the purge");
}

/// The body of a self-labelling read fills the disk unless somebody fetches the same bytes.
fn a_read_is_adopted_beside_no_other_flight() {
    let world = World::new(fetch);
    let reader = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.read(0, 3))
    };
    let span = Span { start: 1, end: 3 };
    let on_disk = || (span.start..span.end).any(|block| world.disk.lock().contains_key(&block));
    let era = world.flights.era();
    let adopted = world
        .flights
        .adopt(&REVISION, span, era, on_disk, |span| world.launch(span));
    if let Some(follow) = adopted {
        assert!(!follow.collapsed);
        follow.end();
    }
    reader.join().unwrap();
    world.landed();
    let fetched: Vec<_> = world.fetched.lock().values().copied().collect();
    assert_eq!(fetched, [1; 3]);
}
