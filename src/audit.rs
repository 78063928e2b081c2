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
                    Ok(Some(outcome)) => self.metrics.object_check(outcome.label()),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error, key = ?revision.key,
                            "could not compare an object with its checksum; the scrubber comes back to it"
                        );
                        self.metrics.object_check(Outcome::Failed.label());
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
            tracing::debug!(error = &error as &dyn std::error::Error, key = ?revision.key, "asked for checksums");
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
