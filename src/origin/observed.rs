//! What is learnt of a store, and what may be spent on it: a decaying distribution of times, and a
//! bucket of tokens.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets: from 0.1 ms to over two minutes, each a ninth more than the one before. A quantile is
/// read as its bucket's bound, so it is over the truth by at most that.
static BOUNDS: LazyLock<Vec<Duration>> = LazyLock::new(|| {
    std::iter::successors(Some(Duration::from_micros(100)), |bound| {
        Some(bound.mul_f64(1.11))
    })
    .take_while(|bound| *bound < Duration::from_mins(2))
    .chain([Duration::from_mins(2)])
    .collect()
});

/// Whenever twice as many have been seen, all counts are halved: what the last few thousand calls showed
/// counts, and a hundredth of them is more than chance.
const REMEMBERED: u32 = 2_000;

/// Times seen lately, as counts in buckets that grow geometrically: less than a KiB whatever is recorded.
#[derive(Debug)]
pub(super) struct Distribution {
    counts: Vec<u32>,
    total: u32,
}

impl Default for Distribution {
    fn default() -> Self {
        Self {
            counts: vec![0; BOUNDS.len()],
            total: 0,
        }
    }
}

impl Distribution {
    pub(super) fn record(&mut self, time: Duration) {
        let bucket = BOUNDS.partition_point(|bound| *bound < time);
        self.counts[bucket.min(BOUNDS.len() - 1)] += 1;
        self.total += 1;
        if self.total >= 2 * REMEMBERED {
            for count in &mut self.counts {
                *count /= 2;
            }
            self.total = self.counts.iter().sum();
        }
    }

    /// How many are remembered.
    pub(super) fn count(&self) -> u32 {
        self.total
    }

    /// The time that this many thousandths of those remembered do not exceed; zero where there are none.
    pub(super) fn quantile(&self, thousandths: u32) -> Duration {
        let rank = (self.total * thousandths).div_ceil(1_000);
        let mut seen = 0;
        for (count, bound) in self.counts.iter().zip(BOUNDS.iter()) {
            seen += count;
            if seen >= rank && seen > 0 {
                return *bound;
            }
        }
        Duration::ZERO
    }
}

/// Tokens: so many deposits pay for one withdrawal.
#[derive(Debug)]
pub(super) struct Bucket {
    deposits: AtomicU32,
    most: u32,
    price: u32,
}

impl Bucket {
    /// Of at most `burst` withdrawals, each the price of `price` deposits.
    pub(super) fn empty(burst: u32, price: u32) -> Self {
        Self {
            deposits: AtomicU32::new(0),
            most: burst * price,
            price,
        }
    }

    /// The same, full.
    pub(super) fn full(burst: u32, price: u32) -> Self {
        Self {
            deposits: AtomicU32::new(burst * price),
            ..Self::empty(burst, price)
        }
    }

    pub(super) fn deposit(&self) {
        // Fails only where it is full.
        let _ = self.deposits.fetch_update(Relaxed, Relaxed, |held| {
            (held < self.most).then(|| held + 1)
        });
    }

    /// Takes one withdrawal's worth, if it is there.
    pub(super) fn withdraw(&self) -> bool {
        self.deposits
            .fetch_update(Relaxed, Relaxed, |held| held.checked_sub(self.price))
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn quantiles_are_right_within_a_bucket() {
        let mut seen = Distribution::default();
        assert_eq!(seen.quantile(500), Duration::ZERO);
        for time in 1..=1_000 {
            seen.record(MS * time);
        }
        for (thousandths, exact) in [(500, 500), (900, 900), (990, 990), (1_000, 1_000)] {
            let (read, exact) = (seen.quantile(thousandths), MS * exact);
            assert!(
                (exact..=exact.mul_f64(1.12)).contains(&read),
                "{thousandths}: {read:?}"
            );
        }
    }

    #[test]
    fn the_past_fades() {
        let mut seen = Distribution::default();
        for _ in 0..REMEMBERED {
            seen.record(MS * 100);
        }
        for _ in 0..4 * REMEMBERED {
            seen.record(MS);
        }
        assert!(seen.quantile(900) < MS * 2);
        assert!(seen.count() < 2 * REMEMBERED);
        // Beyond all bounds is the last of them.
        for _ in 0..10 * REMEMBERED {
            seen.record(Duration::MAX);
        }
        assert_eq!(seen.quantile(500), Duration::from_mins(2));
    }

    #[test]
    fn deposits_pay_for_withdrawals() {
        let bucket = Bucket::full(2, 3);
        bucket.deposit();
        assert!(bucket.withdraw() && bucket.withdraw() && !bucket.withdraw());
        for affordable in [false, false, true] {
            bucket.deposit();
            assert_eq!(bucket.withdraw(), affordable);
        }
        assert!(!Bucket::empty(2, 3).withdraw());
    }
}
