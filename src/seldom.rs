//! Log lines for what happens many times a second: one when it begins, and now and then how often it was.
//!
//! At ten thousand requests a second, a line for each that a remote fails is a flood in which nobody finds the first one. So
//! an [`Outage`] is a line when it begins, one a minute as long as it goes on, and one when it is over. The lines of single
//! requests are there at `debug`, and the metrics count them all.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What is worth a line now and then.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    said: Option<Instant>,
    unsaid: u64,
}

impl Seldom {
    const AGAIN: Duration = Duration::from_mins(1);

    /// How often it happened since it was said last, this time included, if it is to be said now.
    pub(crate) fn happened(&mut self) -> Option<u64> {
        self.unsaid += 1;
        let now = Instant::now();
        let is_due = self.said.is_none_or(|said| now - said >= Self::AGAIN);
        is_due.then(|| {
            self.said = Some(now);
            std::mem::take(&mut self.unsaid)
        })
    }
}

/// Why a remote could not answer, as far as that concerns more than one object. One of them must not hide another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: what one trouble has in common"
)]
pub enum Reason {
    /// It fails, is silent or out of reach.
    Unavailable,
    /// It denies the read, perhaps of some objects only.
    Denied,
    /// The bucket is missing or the credentials are wrong.
    Misconfigured,
}

/// Whether a remote is in trouble, for the log. Begins untroubled.
#[derive(Debug, Default)]
pub struct Outage(Mutex<[Option<Trouble>; 3]>);

#[derive(Debug)]
struct Trouble {
    began: Instant,
    /// The last failure.
    latest: Instant,
    failed: u64,
    said: Seldom,
}

/// An outage that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Over {
    /// Requests that failed.
    pub(crate) failed: u64,
    /// From the first that failed to the last.
    pub(crate) lasted: Duration,
}

impl Outage {
    /// How long nothing must have failed for the outage to be over: a remote that fails one request in three is in
    /// trouble, not in a thousand troubles.
    const CALM: Duration = Duration::from_secs(10);

    /// A request failed. `Some`: log that, for so many requests since the last line of this reason, this one included.
    pub(crate) fn failed(&self, reason: Reason) -> Option<u64> {
        let now = Instant::now();
        let mut troubles = self.0.lock();
        let trouble = troubles[reason as usize].get_or_insert_with(|| Trouble {
            began: now,
            latest: now,
            failed: 0,
            said: Seldom::default(),
        });
        trouble.latest = now;
        trouble.failed += 1;
        trouble.said.happened()
    }

    /// The remote answered a request. The first that is over: log that.
    pub(crate) fn answered(&self) -> Option<Over> {
        let is_over = |trouble: &mut Trouble| trouble.latest.elapsed() >= Self::CALM;
        let mut troubles = self.0.lock();
        let over = troubles.iter_mut().find_map(|one| one.take_if(is_over))?;
        Some(Over {
            failed: over.failed,
            lasted: over.latest - over.began,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_often_is_said_once_a_minute_and_how_often_it_was() {
        let mut seldom = Seldom::default();
        let mut said = Vec::new();
        for _ in 0..250 {
            said.extend(seldom.happened());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(said, [1, 60, 60, 60, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_said_when_it_begins_once_a_minute_and_when_it_is_over() {
        let outage = Outage::default();
        assert_eq!(outage.answered(), None, "there was none");
        let second = Duration::from_secs(1);
        let mut said = Vec::new();
        for _ in 0..150 {
            said.extend(outage.failed(Reason::Unavailable));
            // Some get through.
            assert_eq!(outage.answered(), None, "it goes on");
            tokio::time::advance(second).await;
        }
        assert_eq!(said, [1, 60, 60]);
        tokio::time::advance(8 * second).await;
        assert_eq!(outage.answered(), None, "it has only just failed somebody");
        tokio::time::advance(second).await;
        let over = Over {
            failed: 150,
            lasted: 149 * second,
        };
        assert_eq!(outage.answered(), Some(over));
        assert_eq!(outage.answered(), None, "it was said");
        assert_eq!(outage.failed(Reason::Unavailable), Some(1), "another one");
        // Nobody asked meanwhile.
        tokio::time::advance(600 * second).await;
        assert_eq!(outage.failed(Reason::Unavailable), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn one_reason_hides_no_other() {
        let outage = Outage::default();
        for reason in [Reason::Denied, Reason::Unavailable, Reason::Misconfigured] {
            assert_eq!(outage.failed(reason), Some(1), "{reason:?}");
            assert_eq!(outage.failed(reason), None, "{reason:?}");
        }
        tokio::time::advance(Outage::CALM).await;
        for _ in 0..3 {
            assert_eq!(outage.answered().map(|over| over.failed), Some(2));
        }
        assert_eq!(outage.answered(), None);
    }
}
