//! A whole replica: configuration in, two listeners out.
//!
//! ```text
//!  both listeners ─▶ probe the remotes ─▶ open the cache directory ─▶ accept ─▶ ready
//!     ▲                                      ▲ asked for
//!     └─ the service manager's, ─────────────┴─ the running process's, or our own
//!  a line and an exit code at the first that fails; nothing is left half-started
//! ```
//!
//! A replica ends by a signal ([`Replica::drain`]) or because another process has taken over
//! ([`handover`], [`Replica::leave`]).
//!
//! A remote that cannot be reached is a warning: what the disk holds can be served without it (P5). One that
//! answers «no such bucket» or denies us is a mistake in the configuration, and better found now.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{self, TryStreamExt as _};
use rustix::process::Resource;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use super::accept::{Acceptor, ConnInfo, DrainReport, Ending, Limits};
use super::admin::{self, Admin, Control, PurgeRefused, Readiness, ScrubRefused};
use super::body::ResponseBody;
use super::handler::Handler;
use super::handover::{self, Addresses, Estate, Predecessor, Refusal};
use super::io::Timeouts;
use super::page_in::PageIn;
use super::systemd::{self, Inherited};
use crate::audit::Auditor;
use crate::causes::one_line;
use crate::config::{Config, MountConfig};
use crate::disk::{DiskError, DiskTier, Purged, ScrubReport};
use crate::fill::{FillSettings, Filler};
use crate::mount::{ForbiddenAs, Mount, Mounts, PathError};
use crate::remote::s3::{CredentialSource, InvalidS3Settings, S3Remote, S3Settings, Transport};
use crate::remote::{RemoteError, RemoteErrorKind};
use crate::seldom::Outage;
use crate::semantics::RangeSpec;
use crate::telemetry::Metrics;
use crate::tiers::{TierSettings, Tiers};

/// How long a start waits for the remotes' answers to its probes. An S3 in the same region answers in a
/// fifth of it; a replica is to be ready within a second whatever S3 does (P11), and however many mounts there are.
const PROBE: Duration = Duration::from_millis(700);

/// Mounts that are probed at a time: each may need a connection of its own, and most are to the same few servers.
const PROBES: usize = 64;

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
    /// The process that has the cache directory does not hand it over.
    #[error(
        "the cache directory {} is in use by another process (pid {pid}), which does not hand it over: {reason}; \
         stop it or give this one a directory of its own", dir.display()
    )]
    NotHandedOver {
        /// The directory.
        dir: PathBuf,
        /// The process that has it.
        pid: i32,
        /// Why not.
        reason: String,
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
            Self::Disk(DiskError::Locked { .. }) | Self::NotHandedOver { .. } => 75,
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
    data_ending: Ending,
    admin_ending: Ending,
    data_task: JoinHandle<DrainReport>,
    admin_task: JoinHandle<DrainReport>,
    /// Waits for a successor; its pid.
    handover: Option<JoinHandle<i32>>,
    took_over: bool,
    tiers: Arc<Tiers>,
    filler: Arc<Filler>,
    auditor: Auditor,
    disk: Arc<DiskTier>,
    drain_grace: Duration,
}

impl Replica {
    /// Starts a replica on listeners of its own or of the process that it takes over from. `credentials` is
    /// [`CredentialSource::Chain`] but for an S3 of our own.
    pub async fn start(
        config: &Config,
        credentials: &CredentialSource,
    ) -> Result<Self, StartError> {
        Self::start_on(config, credentials, Inherited::default()).await
    }

    /// Starts a replica; what is `inherited` goes before any other listener.
    pub async fn start_on(
        config: &Config,
        credentials: &CredentialSource,
        inherited: Inherited,
    ) -> Result<Self, StartError> {
        let (mut predecessor, [data, admin]) = both_listeners(config, inherited).await?;
        // The SDK's futures are large, and nest so deep that the compiler gives up on one that holds them.
        let mounts = Box::pin(open_mounts(config, credentials)).await?;
        let mounts = Arc::new(Mounts::new(mounts));
        let without_writer = Instant::now();
        if let Some(predecessor) = &mut predecessor {
            predecessor
                .release()
                .await
                .map_err(|refusal| not_handed_over(config, refusal))?;
        }
        let disk = open_disk(config, predecessor.is_some()).await?;
        let without_writer = without_writer.elapsed();
        let metrics = Metrics::default();
        let (filler, tiers) = engine(config, &disk, &metrics);
        let auditor = Auditor::start(
            Arc::clone(&disk),
            Arc::clone(&filler),
            Arc::clone(&mounts),
            metrics.clone(),
        );
        let (readiness, is_ready) = watch::channel(Readiness::Ready);
        let operator = Operator {
            readiness: is_ready,
            metrics: metrics.clone(),
            disk: Arc::clone(&disk),
            tiers: Arc::clone(&tiers),
            mounts: Arc::clone(&mounts),
        };
        let handler = Arc::new(Handler::new(mounts, Arc::clone(&tiers), metrics.clone()));
        let data_address = data.local_addr()?;
        let admin_address = admin.local_addr()?;
        let page_in = PageIn::new()?;
        let (data_ending, admin_ending) = (Ending::default(), Ending::default());
        let estate = Estate {
            dir: config.cache.dir.clone(),
            configured: configured(config),
            bound: Addresses {
                data: data_address,
                admin: admin_address,
            },
            data: data.as_fd().try_clone_to_owned()?,
            admin: admin.as_fd().try_clone_to_owned()?,
            endings: [data_ending.clone(), admin_ending.clone()],
            disk: Arc::clone(&disk),
            filler: Arc::clone(&filler),
            metrics: metrics.clone(),
        };
        let acceptor = Acceptor::new(data, handler, limits(config), page_in.clone());
        let admin_acceptor =
            Acceptor::new(admin, Arc::new(Admin(operator)), admin::limits(), page_in);
        let drain_timeout = config.server.drain_timeout;
        let took_over = predecessor.is_some();
        if let Some(predecessor) = predecessor {
            let pid = predecessor.pid;
            if let Err(withdrawn) = predecessor.ready().await {
                close(&disk).await;
                return Err(not_handed_over(config, withdrawn));
            }
            metrics.took_over(without_writer);
            tracing::info!(
                pid,
                without_writer_ms = without_writer.as_millis(),
                "took over from a running process"
            );
        }
        Ok(Self {
            data: data_address,
            admin: admin_address,
            readiness,
            data_task: tokio::spawn(acceptor.run(data_ending.clone(), drain_timeout)),
            admin_task: tokio::spawn(admin_acceptor.run(admin_ending.clone(), ADMIN_DRAIN)),
            data_ending,
            admin_ending,
            handover: handover::listen(&config.cache.dir)
                .map(|socket| tokio::spawn(handover::to_successor(estate, socket))),
            took_over,
            tiers,
            filler,
            auditor,
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
    /// load balancers can look elsewhere and clients hear that their connections end, then running responses end
    /// within the drain timeout, and what was written is made durable. Dropping the future stops waiting, not draining.
    pub async fn drain(mut self, grace: bool) -> DrainReport {
        if grace {
            // First: who learns of it from `/readyz` and asks has been answered like that.
            self.data_ending.announce();
        }
        self.readiness.send_replace(Readiness::Draining);
        if let Some(handover) = self.handover.take() {
            // It holds the listeners too.
            handover.abort();
            // Whether it was just done is all the same: the process ends either way.
            let _ = handover.await;
        }
        let mut report = None;
        if grace {
            tokio::time::sleep(self.drain_grace).await;
            self.data_ending.stop_accepting();
            // Those that were taken last may not have come to their first request yet.
            let linger = self.drain_grace.min(LONGEST_LINGER);
            report = tokio::time::timeout(linger, &mut self.data_task).await.ok();
        }
        self.data_ending.close_idle();
        let report = match report {
            Some(report) => report,
            None => (&mut self.data_task).await,
        };
        self.end(report).await
    }

    /// The pid of the process that has taken over, once one has. Cancel safe.
    pub async fn superseded(&mut self) -> i32 {
        let successor = match &mut self.handover {
            Some(handover) => handover.await.ok(),
            None => None,
        };
        self.handover = None;
        match successor {
            Some(pid) => pid,
            // Nobody can take over, or ever will: a panic there has been reported.
            None => std::future::pending().await,
        }
    }

    /// Ends what is left of a replica that is [superseded](Self::superseded): every connection may send one more
    /// request, running responses end, both within the drain timeout. `/readyz` says what the address is:
    /// ready. Dropping the future stops waiting, not draining.
    pub async fn leave(mut self) -> DrainReport {
        let report = (&mut self.data_task).await;
        self.end(report).await
    }

    async fn end(self, report: Result<DrainReport, JoinError>) -> DrainReport {
        self.filler.shutdown().await;
        self.auditor.shutdown().await;
        close(&self.disk).await;
        self.admin_ending.close_idle();
        // A panic there has been reported by the runtime already.
        let _ = self.admin_task.await;
        report.unwrap_or(DrainReport {
            finished: 0,
            cut: 0,
        })
    }
}

/// How long idle connections are left alone at most after the last one was taken.
const LONGEST_LINGER: Duration = Duration::from_secs(1);

/// How long running answers of the admin listener may take at the end.
const ADMIN_DRAIN: Duration = Duration::from_secs(1);

/// Announces a replica and waits for what ends it: a signal, or another process that takes over. SIGHUP starts
/// one, from the same command line.
pub async fn run_until_ended(mut replica: Replica) -> ExitCode {
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
    systemd::ready(replica.took_over.then(std::process::id));
    let mut successor = None;
    loop {
        tokio::select! {
            signal = signals.next() => {
                if signal == Received::Hangup {
                    if successor.is_none() {
                        systemd::reloading();
                        successor = start_successor();
                    }
                    continue;
                }
                systemd::stopping();
                tracing::info!("draining; a second signal ends at once");
                let with_grace = signal == Received::Terminate;
                return ended(replica.drain(with_grace), signals.end()).await;
            }
            pid = replica.superseded() => {
                tracing::info!(
                    successor = pid,
                    "draining what is left; a signal closes idle connections, a second one ends at once"
                );
                let ending = replica.data_ending.clone();
                let two_signals = async {
                    signals.end().await;
                    ending.close_idle();
                    signals.end().await;
                };
                return ended(replica.leave(), two_signals).await;
            }
            status = exited(&mut successor) => {
                tracing::error!(status, "the process that was to take over ended; carrying on");
                systemd::ready(None);
            }
        }
    }
}

async fn ended(drained: impl Future<Output = DrainReport>, signal: impl Future) -> ExitCode {
    tokio::select! {
        report = drained => {
            tracing::info!(finished = report.finished, cut = report.cut, "drained");
            ExitCode::SUCCESS
        }
        _ = signal => ExitCode::from(130),
    }
}

/// Starts this very command line anew; the process finds us by our cache directory. `None`, logged: it cannot be.
fn start_successor() -> Option<Child> {
    let mut words = std::env::args_os();
    // As it was called: what this process runs may have been replaced by a newer program there.
    let program = words.next()?;
    match Command::new(&program)
        .args(words)
        .stdin(Stdio::null())
        .spawn()
    {
        Ok(child) => {
            tracing::info!(pid = child.id(), "started a process to take over");
            Some(child)
        }
        Err(error) => {
            tracing::error!(program = %program.display(), %error, "cannot start a process to take over; carrying on");
            systemd::ready(None);
            None
        }
    }
}

/// How the child ended; never where there is none. Cancel safe.
async fn exited(child: &mut Option<Child>) -> String {
    let status = match child {
        Some(running) => running.wait().await,
        None => std::future::pending().await,
    };
    *child = None;
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Received {
    /// SIGTERM, from a service manager with load balancers around.
    Terminate,
    /// SIGINT, from a keyboard.
    Interrupt,
    /// SIGHUP, for a restart that nobody notices.
    Hangup,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received::Terminate,
            _ = self.interrupt.recv() => Received::Interrupt,
            _ = self.hangup.recv() => Received::Hangup,
        }
    }

    /// The next one that ends the process.
    async fn end(&mut self) {
        while self.next().await == Received::Hangup {}
    }
}

fn configured(config: &Config) -> Addresses {
    Addresses {
        data: config.server.listen,
        admin: config.server.admin,
    }
}

fn not_handed_over(config: &Config, Refusal { pid, reason }: Refusal) -> StartError {
    StartError::NotHandedOver {
        dir: config.cache.dir.clone(),
        pid,
        reason,
    }
}

/// Data and admin: what is inherited, else what a running process passes, else our own.
async fn both_listeners(
    config: &Config,
    inherited: Inherited,
) -> Result<(Option<Predecessor>, [TcpListener; 2]), StartError> {
    let configured = configured(config);
    let found = Predecessor::find(&config.cache.dir, configured)
        .await
        .map_err(|refusal| not_handed_over(config, refusal))?;
    let (predecessor, [data, admin]) = match found {
        Some((predecessor, listeners)) => (Some(predecessor), listeners.map(Some)),
        None => (None, [None, None]),
    };
    let data = inherited.data.or(data);
    let data = listener("server.listen", configured.data, data).await?;
    let admin = inherited.admin.or(admin);
    let admin = listener("server.admin", configured.admin, admin).await?;
    Ok((predecessor, [data, admin]))
}

fn engine(config: &Config, disk: &Arc<DiskTier>, metrics: &Metrics) -> (Arc<Filler>, Arc<Tiers>) {
    let part_size = NonZeroU64::new(config.cache.part_size).unwrap_or(NonZeroU64::MIN);
    let filler = Filler::new(
        Arc::clone(disk),
        FillSettings {
            part_size,
            budget: config.cache.fill_budget,
        },
        metrics.clone(),
    );
    let tiers = Tiers::new(
        Arc::clone(disk),
        Arc::clone(&filler),
        TierSettings {
            fan_out: config.cache.fan_out,
            part_size: part_size.get(),
        },
    );
    (filler, tiers)
}

/// Of the data listener, as far as the limit on open files allows.
fn limits(config: &Config) -> Limits {
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
    Limits {
        max_connections,
        max_head: config.server.header_max_bytes,
        timeouts: Timeouts {
            header: config.server.header_timeout,
            idle: config.server.idle_timeout,
            progress: config.server.progress_timeout,
            min_rate: config.server.min_rate,
        },
    }
}

/// `passed` if there is one, else one of our own.
async fn listener(
    key: &'static str,
    address: SocketAddr,
    passed: Option<std::net::TcpListener>,
) -> Result<TcpListener, StartError> {
    let listener = match passed {
        Some(listener) => listener
            .set_nonblocking(true)
            .and_then(|()| TcpListener::from_std(listener)),
        None => TcpListener::bind(address).await,
    };
    listener.map_err(|source| StartError::Bind {
        key,
        address,
        source,
    })
}

/// `released`: the directory was another process's until now, and if that was killed, its lock goes a moment after
/// its sockets.
async fn open_disk(config: &Config, released: bool) -> Result<Arc<DiskTier>, StartError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let disk_config = config.cache.disk();
        let opened = tokio::task::spawn_blocking(move || DiskTier::open(disk_config))
            .await
            .map_err(io::Error::other)?;
        match opened {
            Err(DiskError::Locked { .. }) if released && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// How long the lock of a process that is gone may outlive it.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

async fn close(disk: &DiskTier) {
    if let Err(error) = disk.close().await {
        tracing::warn!(
            error = one_line(&error),
            "the cache directory was not closed in order; the next start verifies it"
        );
    }
}

/// Connects and probes all of them, the probes within the time that one has.
async fn open_mounts(
    config: &Config,
    credentials: &CredentialSource,
) -> Result<Vec<Mount>, StartError> {
    let transport = Transport::default();
    let mut mounts = Vec::with_capacity(config.mounts.len());
    for mount in &config.mounts {
        mounts.push(open_mount(&transport, mount, credentials).await?);
    }
    let deadline = tokio::time::Instant::now() + PROBE;
    stream::iter(config.mounts.iter().zip(&mounts).map(Ok))
        .try_for_each_concurrent(PROBES, |(config, mount)| probe(config, mount, deadline))
        .await?;
    Ok(mounts)
}

async fn open_mount(
    transport: &Transport,
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
    let remote = S3Remote::connect_over(transport, settings)
        .await
        .map_err(|source| StartError::Settings {
            path: config.path.clone(),
            source,
        })?;
    Ok(Mount {
        path: config.path.clone(),
        prefix: config.prefix.clone(),
        remote: Arc::new(remote),
        fresh_for: config.fresh_for,
        stale_if_error: config.stale_if_error,
        forbidden: config.forbidden,
        retries: config.retries,
        verify: config.verify,
        outage: Outage::default(),
    })
}

/// Finds mistakes in the configuration; an S3 that cannot be reached is none.
async fn probe(
    config: &MountConfig,
    mount: &Mount,
    deadline: tokio::time::Instant,
) -> Result<(), StartError> {
    let refuse = |error: RemoteError, advice| StartError::Mount {
        path: config.path.clone(),
        error: Box::new(error),
        advice,
    };
    let key = mount.key(PROBE_KEY);
    let want = Some(RangeSpec::Closed { first: 0, last: 0 });
    let probe = mount.remote.read_current(key.key(), want, None);
    match tokio::time::timeout_at(deadline, probe).await {
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
    Ok(())
}

fn warn_unreachable(config: &MountConfig, error: &RemoteError) {
    tracing::warn!(
        mount = config.path,
        error = one_line(error),
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

    fn trouble(&self) -> Option<String> {
        self.disk.trouble()
    }

    fn metrics(&self) -> String {
        self.metrics.encode(Some(&self.disk.stats()))
    }

    async fn scrub(&self) -> Result<ScrubReport, ScrubRefused> {
        match self.disk.scrub().await {
            Ok(Some(report)) => Ok(report),
            Ok(None) => Err(ScrubRefused::UnderWay),
            Err(error) => Err(ScrubRefused::Failed(error.to_string())),
        }
    }

    async fn purge(&self, path: String) -> Result<Purged, PurgeRefused> {
        let (named, every) = match path.strip_suffix('*') {
            Some(prefix) => (prefix, true),
            None => (path.as_str(), false),
        };
        let resolved = if every {
            self.mounts.resolve_all(named)
        } else {
            self.mounts.resolve(named).map(|one| vec![one])
        };
        let resolved = resolved.map_err(|error| match error {
            PathError::Unknown => PurgeRefused::NoMount(path.clone()),
            PathError::Relative
            | PathError::Malformed
            | PathError::DotSegment
            | PathError::Blank
            | PathError::TooLong => PurgeRefused::Malformed(error.to_string()),
        })?;
        let mut all = Purged::default();
        for (mount, key) in resolved {
            let purged = self.tiers.purge(mount, &key, every).await;
            let purged = purged.map_err(|error| PurgeRefused::Failed(error.to_string()))?;
            all.revisions += purged.revisions;
            all.bytes += purged.bytes;
        }
        Ok(all)
    }
}

impl super::accept::Handler for Handler {
    fn handle(
        &self,
        request: http::Request<hyper::body::Incoming>,
        conn: &ConnInfo,
    ) -> impl Future<Output = http::Response<ResponseBody>> + Send {
        Self::handle(self, request, &conn.queue)
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
