//! A whole replica: configuration in, two listeners out.
//!
//! ```text
//!  bind both listeners ─▶ open the cache directory ─▶ probe the remotes ─▶ ready
//!        ▲ a line and an exit code at the first that fails; nothing is left half-started
//! ```
//!
//! A remote that cannot be reached is a warning: what the disk holds can be served without it (P5). One that
//! answers «no such bucket» or denies us is a mistake in the configuration, and better found now.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Resource;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::accept::{Acceptor, ConnInfo, DrainReport, Limits};
use super::admin::{self, Admin, Control, PurgeRefused, Readiness};
use super::body::ResponseBody;
use super::handler::Handler;
use super::io::Timeouts;
use super::page_in::PageIn;
use crate::config::{Config, MountConfig};
use crate::disk::{DiskError, DiskTier, Purged};
use crate::fill::{FillSettings, Filler};
use crate::mount::{ForbiddenAs, Mount, Mounts, PathError};
use crate::remote::s3::{CredentialSource, InvalidS3Settings, S3Remote, S3Settings};
use crate::remote::{Remote, RemoteError, RemoteErrorKind};
use crate::semantics::RangeSpec;
use crate::telemetry::Metrics;
use crate::tiers::{TierSettings, Tiers};

/// How long a start waits for the remotes' answer to its probe. An S3 in the same region answers in a
/// fifth of it; a replica is to be ready within a second whatever S3 does (P11).
const PROBE: Duration = Duration::from_millis(700);

/// A key that nobody has. Its read tells a missing bucket from a missing key, as a HEAD would not.
const PROBE_KEY: &str = ".pinrange-probe";

/// What [`DiskError`] does not say; [`DiskError::Locked`] speaks for itself.
const UNUSABLE: &str = "the cache directory (cache.dir, --cache-dir) has to be one that this process can make and write to: ";

/// Why a replica did not start. `Display` says where and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "closed: each has an exit code")]
pub enum StartError {
    /// A listener could not be bound.
    #[error(
        "cannot listen on {address} ({key}): {source}; choose another address or stop what uses it"
    )]
    Bind {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The cache directory cannot be used.
    #[error("{}{_0}", if matches!(_0, DiskError::Locked { .. }) { "" } else { UNUSABLE })]
    Disk(#[from] DiskError),
    /// A remote says that the configuration is wrong.
    #[error("mount {path}: {}; {advice}", error.detail)]
    Mount {
        /// The mount's path.
        path: String,
        /// What the remote said.
        error: Box<RemoteError>,
        /// What to do.
        advice: &'static str,
    },
    /// A mount's settings cannot be used.
    #[error("mount {path}: {source}")]
    Settings {
        /// The mount's path.
        path: String,
        /// Why not.
        source: InvalidS3Settings,
    },
    /// Something that every Linux has is missing.
    #[error("{0}")]
    System(#[from] io::Error),
}

impl StartError {
    /// As `sysexits.h` has it: 69 a port in use, 73 the cache directory, 75 another process in it, 77 denied,
    /// 78 a wrong configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Bind { .. } => 69,
            Self::Disk(DiskError::Locked { .. }) => 75,
            Self::Disk(_) => 73,
            Self::Mount { error, .. } if error.kind == RemoteErrorKind::Forbidden => 77,
            Self::Mount { .. } | Self::Settings { .. } => 78,
            Self::System(_) => 71,
        }
    }
}

/// A running replica. Dropping it leaves it running; [`Replica::drain`] ends it.
pub struct Replica {
    /// Where the data listener is bound.
    pub data: SocketAddr,
    /// Where the admin listener is bound.
    pub admin: SocketAddr,
    readiness: watch::Sender<Readiness>,
    stop_data: CancellationToken,
    stop_admin: CancellationToken,
    data_task: JoinHandle<DrainReport>,
    admin_task: JoinHandle<DrainReport>,
    tiers: Arc<Tiers>,
    filler: Arc<Filler>,
    disk: Arc<DiskTier>,
    drain_grace: Duration,
}

impl Replica {
    /// Starts a replica. `credentials` is [`CredentialSource::Chain`] but for an S3 of our own.
    pub async fn start(
        config: &Config,
        credentials: &CredentialSource,
    ) -> Result<Self, StartError> {
        let data = bind("server.listen", config.server.listen).await?;
        let admin = bind("server.admin", config.server.admin).await?;
        let disk_config = config.cache.disk();
        let disk = tokio::task::spawn_blocking(move || DiskTier::open(disk_config))
            .await
            .map_err(io::Error::other)??;
        let mounts = futures::future::try_join_all(
            config
                .mounts
                .iter()
                .map(|mount| open_mount(mount, credentials)),
        )
        .await;
        let mounts = match mounts {
            Ok(mounts) => Arc::new(Mounts::new(mounts)),
            Err(refused) => {
                // Else the next start would take what is held for the leavings of a crash.
                close(&disk).await;
                return Err(refused);
            }
        };
        let metrics = Metrics::default();
        let part_size = NonZeroU64::new(config.cache.part_size).unwrap_or(NonZeroU64::MIN);
        let filler = Filler::new(
            Arc::clone(&disk),
            FillSettings {
                part_size,
                budget: config.cache.fill_budget,
            },
            metrics.clone(),
        );
        let tiers = Tiers::new(
            Arc::clone(&disk),
            Arc::clone(&filler),
            TierSettings {
                fan_out: config.cache.fan_out,
                part_size: part_size.get(),
            },
        );
        let (readiness, is_ready) = watch::channel(Readiness::Ready);
        let operator = Operator {
            readiness: is_ready,
            metrics: metrics.clone(),
            disk: Arc::clone(&disk),
            tiers: Arc::clone(&tiers),
            mounts: Arc::clone(&mounts),
        };
        let handler = Arc::new(Handler::new(mounts, Arc::clone(&tiers), metrics));
        let data_address = data.local_addr()?;
        let admin_address = admin.local_addr()?;
        let descriptors = rustix::process::getrlimit(Resource::Nofile)
            .current
            .unwrap_or(u64::MAX);
        let max_connections = config.server.connections_within(descriptors);
        // A few less than asked for is what limits look like; half is a mistake.
        if max_connections < config.server.max_connections / 2 {
            tracing::warn!(
                max_connections,
                wanted = config.server.max_connections,
                "the limit on open files ({descriptors}) allows fewer connections; raise it (ulimit -n, LimitNOFILE=)"
            );
        }
        let limits = Limits {
            max_connections,
            max_head: config.server.header_max_bytes,
            timeouts: Timeouts {
                header: config.server.header_timeout,
                idle: config.server.idle_timeout,
                progress: config.server.progress_timeout,
                min_rate: config.server.min_rate,
            },
        };
        let page_in = PageIn::new()?;
        let stop_data = CancellationToken::new();
        let stop_admin = CancellationToken::new();
        let acceptor = Acceptor::new(data, handler, limits, page_in.clone());
        let admin_acceptor =
            Acceptor::new(admin, Arc::new(Admin(operator)), admin::limits(), page_in);
        let drain_timeout = config.server.drain_timeout;
        Ok(Self {
            data: data_address,
            admin: admin_address,
            readiness,
            data_task: tokio::spawn(acceptor.run(stop_data.clone(), drain_timeout)),
            admin_task: tokio::spawn(admin_acceptor.run(stop_admin.clone(), ADMIN_DRAIN)),
            stop_data,
            stop_admin,
            tiers,
            filler,
            disk,
            drain_grace: config.server.drain_grace,
        })
    }

    /// The tiers behind the listeners.
    pub fn tiers(&self) -> &Arc<Tiers> {
        &self.tiers
    }

    /// The disk tier behind the listeners.
    pub fn disk(&self) -> &Arc<DiskTier> {
        &self.disk
    }

    /// Ends the replica: `/readyz` says 503, for `grace` new connections are still taken so that
    /// load balancers can look elsewhere, then running responses end within the drain timeout, and what
    /// was written is made durable. Dropping the future stops waiting, not draining.
    pub async fn drain(self, grace: bool) -> DrainReport {
        self.readiness.send_replace(Readiness::Draining);
        if grace {
            tokio::time::sleep(self.drain_grace).await;
        }
        self.stop_data.cancel();
        let report = self.data_task.await.unwrap_or(DrainReport {
            finished: 0,
            cut: 0,
        });
        self.filler.shutdown().await;
        close(&self.disk).await;
        self.stop_admin.cancel();
        // A panic there has been reported by the runtime already.
        let _ = self.admin_task.await;
        report
    }
}

/// How long running answers of the admin listener may take at the end.
const ADMIN_DRAIN: Duration = Duration::from_secs(1);

/// Announces a replica and waits for the signal that ends it.
pub async fn run_until_signal(replica: Replica) -> ExitCode {
    if !replica.data.ip().is_loopback() {
        tracing::warn!(
            listen = %replica.data,
            "whoever reaches this port can read everything the mounts can read: pinrange asks for no credentials"
        );
    }
    if !replica.admin.ip().is_loopback() {
        tracing::warn!(admin = %replica.admin, "whoever reaches this port can purge the cache");
    }
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("pinrange: cannot listen for signals: {error}");
            return ExitCode::from(71);
        }
    };
    let ready = writeln!(
        io::stdout(),
        "pinrange ready: data http://{} admin http://{}",
        replica.data,
        replica.admin
    );
    if let Err(error) = ready {
        tracing::warn!(%error, "nobody reads on stdout that the replica is ready");
    }
    let terminated = signals.next().await;
    tracing::info!("draining; a second signal ends at once");
    tokio::select! {
        report = replica.drain(terminated) => {
            tracing::info!(finished = report.finished, cut = report.cut, "drained");
            ExitCode::SUCCESS
        }
        _ = signals.next() => ExitCode::from(130),
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// `true`: SIGTERM, from a service manager with load balancers around; `false`: SIGINT, from a keyboard.
    async fn next(&mut self) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => true,
            _ = self.interrupt.recv() => false,
        }
    }
}

async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Bind {
            key,
            address,
            source,
        })
}

async fn close(disk: &DiskTier) {
    if let Err(error) = disk.close().await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the cache directory was not closed in order; the next start verifies it"
        );
    }
}

/// Raises the soft limit on descriptors to the hard one, as servers do: the soft one is low for the sake of
/// programs that call `select`, which this one never does.
pub fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit on open files stays as it is");
    }
}

async fn open_mount(
    config: &MountConfig,
    credentials: &CredentialSource,
) -> Result<Mount, StartError> {
    let settings = S3Settings {
        endpoint: config.endpoint.clone(),
        region: config.region.clone(),
        path_style: config.path_style,
        credentials: credentials.clone(),
        connect_timeout: config.connect_timeout,
        first_byte_timeout: config.first_byte_timeout,
        stall_timeout: config.stall_timeout,
        ..S3Settings::new(config.bucket.clone())
    };
    let refuse = |error: RemoteError, advice| StartError::Mount {
        path: config.path.clone(),
        error: Box::new(error),
        advice,
    };
    let remote = S3Remote::connect(settings)
        .await
        .map_err(|source| StartError::Settings {
            path: config.path.clone(),
            source,
        })?;
    let probe_key = [config.prefix.as_str(), PROBE_KEY].concat();
    let want = Some(RangeSpec::Closed { first: 0, last: 0 });
    let probe = remote.read_current(&probe_key, want, None);
    match tokio::time::timeout(PROBE, probe).await {
        Ok(
            Ok(_)
            | Err(RemoteError {
                kind: RemoteErrorKind::Absent,
                ..
            }),
        ) => {}
        Ok(Err(error)) => match error.kind {
            RemoteErrorKind::Misconfigured => {
                return Err(refuse(error, "correct bucket, region or credentials"));
            }
            RemoteErrorKind::Forbidden if config.forbidden == ForbiddenAs::BadGateway => {
                return Err(refuse(
                    error,
                    "correct the credentials; if they may read but not list the bucket, set forbidden = \"404\"",
                ));
            }
            // The probe's key is missing, and this is how this bucket says so.
            RemoteErrorKind::Forbidden => {}
            _ => warn_unreachable(config, &error),
        },
        Err(_elapsed) => tracing::warn!(
            mount = config.path,
            "the mount's S3 has not answered yet; what is held is served, the rest once it answers"
        ),
    }
    Ok(Mount {
        path: config.path.clone(),
        prefix: config.prefix.clone(),
        remote: Arc::new(remote),
        fresh_for: config.fresh_for,
        stale_if_error: config.stale_if_error,
        forbidden: config.forbidden,
        retries: config.retries,
    })
}

fn warn_unreachable(config: &MountConfig, error: &RemoteError) {
    tracing::warn!(
        mount = config.path,
        error = error as &dyn std::error::Error,
        "the mount's S3 cannot be used right now; what is held is served, the rest once it answers"
    );
}

/// What the admin listener shows and does.
struct Operator {
    readiness: watch::Receiver<Readiness>,
    metrics: Metrics,
    disk: Arc<DiskTier>,
    tiers: Arc<Tiers>,
    mounts: Arc<Mounts>,
}

impl Control for Operator {
    fn readiness(&self) -> Readiness {
        *self.readiness.borrow()
    }

    fn metrics(&self) -> String {
        self.metrics.encode(Some(&self.disk.stats()))
    }

    async fn purge(&self, path: String) -> Result<Purged, PurgeRefused> {
        let (named, every) = match path.strip_suffix('*') {
            Some(prefix) => (prefix, true),
            None => (path.as_str(), false),
        };
        let resolved = if every {
            self.mounts.resolve_prefix(named)
        } else {
            self.mounts.resolve(named)
        };
        let (mount, key) = resolved.map_err(|error| match error {
            PathError::Unknown => PurgeRefused::NoMount(path.clone()),
            PathError::Malformed | PathError::DotSegment | PathError::TooLong => {
                PurgeRefused::Malformed(error.to_string())
            }
        })?;
        self.tiers
            .purge(mount, &key, every)
            .await
            .map_err(|error| PurgeRefused::Failed(error.to_string()))
    }
}

impl super::accept::Handler for Handler {
    async fn handle(
        &self,
        request: http::Request<hyper::body::Incoming>,
        conn: &ConnInfo,
    ) -> http::Response<ResponseBody> {
        Self::handle(self, request, &conn.queue).await
    }

    fn connections(&self, delta: i64) {
        self.metrics().connections(delta);
    }

    fn displaced(&self, count: usize) {
        self.metrics().connections_displaced(count as u64);
    }

    fn accept_failed(&self) {
        self.metrics().accept_failed();
    }
}
