//! Chance, for what must not fall into step, such as back-off, or have the same name. Nothing is right or wrong by what it
//! says.
//!
//! A test that must go the same way twice seeds it for its thread.

/// Between 0 and 1.
#[expect(clippy::cast_precision_loss, reason = "chance need not be exact")]
pub(crate) fn fraction() -> f64 {
    bits() as f64 / u64::MAX as f64
}

/// Any number.
pub(crate) fn bits() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    #[cfg(test)]
    if let Some(seeded) = seeded::draw() {
        return seeded;
    }
    RandomState::new().hash_one(0_u8)
}

#[cfg(test)]
pub(crate) mod seeded {
    //! The same draws, whenever a thread is seeded alike.

    use std::cell::RefCell;

    thread_local! {
        static DICE: RefCell<Option<Dice>> = const { RefCell::new(None) };
    }

    /// From here on this thread draws as `seed` says.
    pub(crate) fn by(seed: u64) {
        DICE.set(Some(Dice::new(seed)));
    }

    /// `None`: this thread is not seeded.
    pub(crate) fn draw() -> Option<u64> {
        DICE.with_borrow_mut(|dice| dice.as_mut().map(Dice::next))
    }

    /// `SplitMix64`: enough for tests, and the same everywhere and for ever.
    #[derive(Clone, Debug)]
    pub(crate) struct Dice(u64);

    impl Dice {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed)
        }

        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        /// A number below `end`, which is far below 2^64: the bias does not matter.
        pub(crate) fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }

        /// Whether it happens that happens `of` times in a hundred.
        pub(crate) fn percent(&mut self, of: u64) -> bool {
            self.below(100) < of
        }
    }
}
