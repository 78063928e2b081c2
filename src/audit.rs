//! The audit: whether what is wholly held is what was uploaded.
//!
//! A block's own checksum says that it is what arrived. That what arrived is the object, only a checksum of the whole object can
//! say, which S3 has from the upload and tells on a HEAD (not with ranges). So each revision that becomes complete on
//! disk is compared with it, once the responses have what they want: in the background, few at a time, one guarded HEAD
//! per revision for good. What S3 said is kept with the revision; when it becomes complete again after losing a part of
//! itself, it is compared with that, and nobody is asked.
//!
//! ```text
//!  disk: complete ─▶ known from before? ─ yes ─▶ compare
//!                         │ no                     ▲   └─ differs: drop the revision, count, log
//!                         └─▶ HEAD, If-Match ──────┘
//!                               ├ no checksum of the full object, or the object is gone: remembered
//!                               └ trouble: asked again a few times, then when the scrubber comes by
//! ```
//!
//! A revision that does not have its checksum is dropped whatever the reason; if it is fetched and found wrong over and over,
//! S3 contradicts itself, which the log then says each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::causes::one_line;
use crate::disk::{Computed, DiskError, DiskTier, Whole};
use crate::fill::Filler;
use crate::mount::{Mount, Mounts};
use crate::object::{Checksum, ChecksumAlgorithm, Revision};
use crate::remote::{Guard, RemoteError, RemoteErrorKind};
use crate::telemetry::Metrics;

/// Audits at a time. Nearly all of one is the wait for a HEAD: some 100 a second are done so.
const AT_A_TIME: usize = 8;

/// How long to wait before a HEAD that failed is made again, each time. Nobody waits for an audit.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(25),
];

/// Audits revisions as they become complete, until it is stopped.
pub struct Auditor {
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What came of one audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It has the checksum.
    Match,
    /// It has not, and was dropped.
    Mismatch,
    /// The remote has no checksum of the full object.
    None,
    /// The remote has the object no longer, or another revision of it.
    Gone,
    /// We could not find out.
    Failed,
}

impl Outcome {
    /// For metrics.
    fn label(self) -> &'static str {
        match self {
            Self::Match => "match",
            Self::Mismatch => "mismatch",
            Self::None => "none",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

/// What an audit needs.
struct Desk {
    disk: Arc<DiskTier>,
    filler: Arc<Filler>,
    mounts: Arc<Mounts>,
    metrics: Metrics,
}

impl Auditor {
    /// Begins to audit what becomes complete in `disk` and belongs to a mount that wants it (`verify`). Has to be
    /// called within a runtime, once for a tier.
    pub fn start(
        disk: Arc<DiskTier>,
        filler: Arc<Filler>,
        mounts: Arc<Mounts>,
        metrics: Metrics,
    ) -> Self {
        let auditor = Self {
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        if let Some(completions) = disk.completions() {
            let desk = Desk {
                disk,
                filler,
                mounts,
                metrics,
            };
            let stop = auditor.stop.clone();
            auditor.tasks.spawn(async move {
                // An audit that is dropped leaves the revision as it was: the scrubber offers it again.
                let _ = stop.run_until_cancelled(desk.work(completions)).await;
            });
        }
        auditor
    }

    /// Drops the audits under way and waits until they are gone.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Desk {
    async fn work(&self, completions: mpsc::Receiver<Revision>) {
        let completions = stream::unfold(completions, |mut completions| async move {
            let revision = completions.recv().await?;
            Some((revision, completions))
        });
        completions
            .for_each_concurrent(AT_A_TIME, |revision| async move {
                let Some(mount) = self.mount(&revision) else {
                    return;
                };
                match self.audit(mount, &revision).await {
                    Ok(Some(outcome)) => self.metrics.audited(outcome.label()),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(
                            error = one_line(&error), key = ?revision.key,
                            "could not compare an object with its checksum; the scrubber comes back to it"
                        );
                        self.metrics.audited(Outcome::Failed.label());
                    }
                }
            })
            .await;
    }

    /// Which mount to ask for it; several may share a bucket.
    fn mount(&self, revision: &Revision) -> Option<&Arc<Mount>> {
        self.mounts
            .iter()
            .find(|mount| mount.verify && **mount.remote.store() == *revision.key.store())
    }

    /// `None`: it is not wholly held, or no longer.
    async fn audit(
        &self,
        mount: &Mount,
        revision: &Revision,
    ) -> Result<Option<Outcome>, DiskError> {
        // Costs no reading, and no HEAD for what was evicted meanwhile.
        match self
            .disk
            .checksum_of(revision, ChecksumAlgorithm::Crc32c)
            .await?
        {
            Computed::Incomplete => return Ok(None),
            Computed::Contradiction => {
                self.drop_revision(revision, "two of its files hold different bytes")
                    .await?;
                return Ok(Some(Outcome::Mismatch));
            }
            Computed::Checksum(_) => {}
        }
        let said = match self.disk.whole(revision).await? {
            Some(Whole::None) => return Ok(None),
            Some(Whole::Is(checksum)) => vec![checksum],
            None => match self.ask(mount, revision).await {
                Ok(checksums) => checksums,
                Err(RemoteErrorKind::Mismatch | RemoteErrorKind::Absent) => {
                    self.disk.set_whole(revision, Whole::None).await?;
                    return Ok(Some(Outcome::Gone));
                }
                Err(_) => return Ok(Some(Outcome::Failed)),
            },
        };
        let Some(said) = cheapest(&said) else {
            self.disk.set_whole(revision, Whole::None).await?;
            return Ok(Some(Outcome::None));
        };
        match self.disk.checksum_of(revision, said.algorithm()).await? {
            Computed::Incomplete => Ok(None),
            Computed::Checksum(ours) if ours == *said => {
                self.disk
                    .set_whole(revision, Whole::Is(said.clone()))
                    .await?;
                tracing::debug!(key = ?revision.key, checksum = %said, "the whole object has its checksum");
                Ok(Some(Outcome::Match))
            }
            Computed::Checksum(ours) => {
                let why = format!("what is held has {ours}, and S3 says {said}");
                self.drop_revision(revision, &why).await?;
                Ok(Some(Outcome::Mismatch))
            }
            Computed::Contradiction => {
                self.drop_revision(revision, "two of its files hold different bytes")
                    .await?;
                Ok(Some(Outcome::Mismatch))
            }
        }
    }

    async fn drop_revision(&self, revision: &Revision, why: &str) -> Result<(), DiskError> {
        tracing::error!(
            key = ?revision.key, validator = ?revision.validator, reason = why,
            "the bytes held are not those that were uploaded: dropped them, to be fetched again when asked for; if this \
             repeats, what S3 sends and the checksum it has contradict each other (mount key `verify`)"
        );
        self.filler.forget(|candidate| candidate == revision);
        self.disk.drop_revision(revision).await.map(|_| ())
    }

    /// The checksums that the remote has of the full object.
    async fn ask(
        &self,
        mount: &Mount,
        revision: &Revision,
    ) -> Result<Vec<Checksum>, RemoteErrorKind> {
        let known = self.disk.load(revision).await;
        let known = known.map(|held| held.representation());
        let guard = Guard {
            key: revision.key.key().into(),
            validator: revision.validator.clone(),
            version_id: known.as_ref().and_then(|known| known.version_id.clone()),
            size: known.as_ref().map(|known| known.size),
        };
        let mut pauses = PAUSES.into_iter();
        loop {
            let asked = Instant::now();
            let answer = mount.remote.checksums(&guard).await;
            let label = answer
                .as_ref()
                .map_or_else(|error| error.kind.label(), |_| "ok");
            self.metrics
                .remote_request("checksums", label, asked.elapsed());
            let error = match answer {
                Ok(checksums) => return Ok(checksums),
                Err(error) => error,
            };
            tracing::debug!(error = one_line(&error), key = ?revision.key, "asked for checksums");
            let pause = pauses.next().filter(|_| error.kind.is_retryable());
            match pause {
                Some(pause) => tokio::time::sleep(pause.max(asked_for(&error))).await,
                None => return Err(error.kind),
            }
        }
    }
}

/// The one to compare with: all are of the same bytes, and some cost a reading of them.
fn cheapest(checksums: &[Checksum]) -> Option<&Checksum> {
    checksums.iter().min_by_key(|checksum| checksum.algorithm())
}

fn asked_for(error: &RemoteError) -> Duration {
    match error.kind {
        RemoteErrorKind::Throttled { retry_after } => retry_after.unwrap_or_default(),
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use bytes::Bytes;
    use tempfile::TempDir;

    use super::*;
    use crate::disk::{DiskConfig, MinFree};
    use crate::fill::FillSettings;
    use crate::mount::ForbiddenAs;
    use crate::object::{ObjectKey, Representation};
    use crate::remote::Remote as _;
    use crate::remote::fault::{Effect, FaultRemote, Gate, Op};
    use crate::remote::memory::MemoryRemote;
    use crate::seldom::Outage;
    use crate::semantics::ByteRange;

    const SIZE: usize = 20_000;

    struct World {
        memory: MemoryRemote,
        remote: Arc<FaultRemote<MemoryRemote>>,
        desk: Desk,
        _dir: TempDir,
    }

    impl World {
        fn new(verify: bool) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let disk = DiskTier::open(DiskConfig {
                dir: dir.path().to_owned(),
                capacity: 1 << 30,
                min_free: MinFree::Bytes(0),
                block_size: 4096,
                scrub_rate: 0,
            })
            .unwrap();
            let memory = MemoryRemote::versioned();
            let remote = Arc::new(FaultRemote::new(memory.clone()));
            let metrics = Metrics::default();
            let settings = FillSettings {
                part_size: NonZeroU64::new(1 << 20).unwrap(),
                budget: 1 << 20,
            };
            let mount = Mount {
                path: "/".to_owned(),
                prefix: String::new(),
                remote: Arc::clone(&remote) as _,
                fresh_for: Duration::ZERO,
                stale_if_error: Duration::ZERO,
                forbidden: ForbiddenAs::BadGateway,
                retries: 0,
                verify,
                outage: Outage::default(),
            };
            let desk = Desk {
                filler: Filler::new(Arc::clone(&disk), settings, metrics.clone()),
                disk,
                mounts: Arc::new(Mounts::new(vec![mount])),
                metrics,
            };
            Self {
                memory,
                remote,
                desk,
                _dir: dir,
            }
        }

        fn bytes(seed: u8) -> Bytes {
            (0..SIZE).map(|at| at.to_le_bytes()[0] ^ seed).collect()
        }

        fn put(&self, key: &str) -> Representation {
            self.memory.put(key, Self::bytes(7), &[])
        }

        /// `bytes` are held as those of `representation`.
        async fn hold(&self, key: &str, representation: &Representation, bytes: Bytes) -> Revision {
            let key = ObjectKey::new(Arc::clone(self.remote.store()), key);
            let disk = &self.desk.disk;
            let held = disk.admit(&key, representation).await.unwrap();
            let whole = ByteRange::whole(SIZE as u64).unwrap();
            let reservation = disk.reserve(whole.len()).await.unwrap();
            let mut writer = held.writer(whole, reservation);
            writer.write(vec![bytes]).await.unwrap();
            disk.flush().await.unwrap();
            held.revision().clone()
        }

        /// Audits what has become complete, and returns how many HEADs that took.
        async fn audit(&self, revision: &Revision) -> usize {
            let before = self.remote.count(Op::Checksums);
            let (send, completions) = mpsc::channel(1);
            send.try_send(revision.clone()).unwrap();
            drop(send);
            self.desk.work(completions).await;
            self.remote.count(Op::Checksums) - before
        }

        async fn is_held(&self, revision: &Revision) -> bool {
            self.desk.disk.load(revision).await.is_some()
        }

        fn counted(&self, outcome: Outcome, times: u32) -> bool {
            let label = outcome.label();
            let line = format!("pinrange_audits_total{{outcome=\"{label}\"}} {times}\n");
            self.desk.metrics.encode(None).contains(&line)
        }
    }

    #[tokio::test]
    async fn any_checksum_that_the_remote_has_is_compared_and_remembered() {
        let world = World::new(true);
        for algorithm in ChecksumAlgorithm::ALL {
            for (right, of) in [(true, 7), (false, 8)] {
                let key = format!("{algorithm:?} {right}");
                let representation = world.put(&key);
                let said = Checksum::of(algorithm, &World::bytes(of));
                world.memory.set_checksums(&key, vec![said.clone()]);
                let revision = world.hold(&key, &representation, World::bytes(7)).await;
                assert_eq!(world.audit(&revision).await, 1);
                assert_eq!(world.is_held(&revision).await, right, "{key}");
                if right {
                    let known = world.desk.disk.whole(&revision).await.unwrap();
                    assert_eq!(known, Some(Whole::Is(said)));
                    assert_eq!(world.audit(&revision).await, 0, "asked twice");
                }
            }
        }
        assert!(world.counted(Outcome::Match, 10) && world.counted(Outcome::Mismatch, 5));
    }

    /// What was fetched again after a part was lost is compared with what S3 said before.
    #[tokio::test]
    async fn what_was_once_compared_is_compared_again_without_asking() {
        let world = World::new(true);
        let representation = world.put("k");
        let revision = world.hold("k", &representation, World::bytes(8)).await;
        let said = Checksum::of(ChecksumAlgorithm::Crc64Nvme, &World::bytes(7));
        let disk = &world.desk.disk;
        disk.set_whole(&revision, Whole::Is(said)).await.unwrap();
        assert_eq!(world.audit(&revision).await, 0);
        assert!(world.counted(Outcome::Mismatch, 1) && !world.is_held(&revision).await);
    }

    #[tokio::test]
    async fn what_cannot_be_compared_is_kept_and_not_asked_for_again() {
        let world = World::new(true);
        let first = world.put("none");
        world.memory.set_checksums("none", Vec::new());
        let none = world.hold("none", &first, World::bytes(7)).await;
        assert_eq!(world.audit(&none).await, 1);
        assert!(world.counted(Outcome::None, 1));

        let second = world.put("gone");
        let gone = world.hold("gone", &second, World::bytes(7)).await;
        world.memory.delete("gone");
        world
            .memory
            .delete_version("gone", second.version_id.as_deref().unwrap());
        assert_eq!(world.audit(&gone).await, 1);
        assert!(world.counted(Outcome::Gone, 1));
        for revision in [&none, &gone] {
            assert!(world.is_held(revision).await);
            assert_eq!(world.audit(revision).await, 0);
        }

        let third = world.put("denied");
        let denied = world.hold("denied", &third, World::bytes(7)).await;
        let nth = world.remote.count(Op::Checksums) + 1;
        let refusal = Effect::Fail(RemoteErrorKind::Forbidden);
        world.remote.on(Op::Checksums, nth, refusal);
        assert_eq!(world.audit(&denied).await, 1);
        assert!(world.counted(Outcome::Failed, 1) && world.is_held(&denied).await);
        assert_eq!(world.audit(&denied).await, 1, "it may be allowed by now");
        assert!(world.counted(Outcome::Match, 1));
    }

    /// Another process writes the tier by the time S3 has answered: there is nothing to record, and nothing has failed.
    #[tokio::test]
    async fn a_tier_that_was_handed_over_meanwhile_is_no_failure() {
        let world = World::new(true);
        let representation = world.put("k");
        let revision = world.hold("k", &representation, World::bytes(7)).await;
        let gate = Gate::new();
        world
            .remote
            .on(Op::Checksums, 1, Effect::Hold(gate.clone()));
        let hand_over = async {
            gate.reached().await;
            world.desk.disk.release().await.unwrap();
            gate.open();
        };
        let (asked, ()) = tokio::join!(world.audit(&revision), hand_over);
        assert_eq!(asked, 1);
        assert!(world.counted(Outcome::Match, 1) && world.counted(Outcome::Failed, 0));
        assert_eq!(world.desk.disk.whole(&revision).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_replaced_version_is_compared_with_its_own_checksum() {
        let world = World::new(true);
        let representation = world.put("k");
        let revision = world.hold("k", &representation, World::bytes(7)).await;
        world.memory.put("k", "other", &[]);
        assert_eq!(world.audit(&revision).await, 1);
        assert!(world.counted(Outcome::Match, 1));
    }

    #[tokio::test]
    async fn only_whole_revisions_of_mounts_that_verify_are_asked_for() {
        let world = World::new(false);
        let representation = world.put("k");
        let revision = world.hold("k", &representation, World::bytes(8)).await;
        assert_eq!(world.audit(&revision).await, 0);
        assert!(world.is_held(&revision).await);

        let world = World::new(true);
        let key = ObjectKey::new(Arc::clone(world.remote.store()), "k");
        let held = world.desk.disk.admit(&key, &representation).await.unwrap();
        assert_eq!(world.audit(held.revision()).await, 0, "not a block is held");
    }
}
