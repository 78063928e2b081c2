//! The configuration: three raw layers, merged, then checked once.
//!
//! [`Config::load`] reads flags, environment and file into the same shape (`raw`), lays them over
//! each other (flag > environment > file > default) and turns the result into typed values
//! (`check`). Behind it nothing parses text again. Sizes, durations and percentages have one
//! spelling each (`units`).
//!
//! A configuration that is wrong is refused whole, with every problem found and the place of each: file,
//! line and column, or the variable, or the flag. Nothing is opened, resolved or created here, so
//! `pinrange check` may do the same anywhere.
//!
//! Credentials are no part of the configuration. They come from the standard AWS chain, an endpoint
//! that contains some is refused, and a message never repeats an endpoint.

mod check;
mod raw;
mod units;

use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::disk::{DiskConfig, MinFree};
pub use crate::mount::ForbiddenAs;
use crate::telemetry::{LOG_VARIABLE, LogFormat, parse_filter};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Loopback: whoever reaches the data port can read the mounts, so reaching it is opted into.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// Loopback, and never to be published: `POST /purge` asks for no credentials.
pub const DEFAULT_ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);

/// Enough for the part that a slow client has under way. With [`DEFAULT_DRAIN_GRACE`] it is 32 s: less than the
/// 90 s that systemd waits before it kills, more than the 30 s of Kubernetes, which needs
/// `terminationGracePeriodSeconds: 40`.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Two periods of a load balancer's usual one-second health check: it has looked elsewhere before the
/// listener closes. Only SIGTERM waits; Ctrl-C does not.
pub const DEFAULT_DRAIN_GRACE: Duration = Duration::from_secs(2);

/// Each open response may hold two descriptors, its socket and a segment file: 10000 of them fit the
/// 20000 or more that service managers grant, and a smaller `RLIMIT_NOFILE` lowers it
/// ([`ServerConfig::connections_within`]).
pub const DEFAULT_MAX_CONNECTIONS: usize = 10_000;

/// A request head is one or two packets. Ten seconds survive several retransmissions, and end the
/// connections that trickle a head to hold a slot.
pub const DEFAULT_HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// As much as `HAProxy` takes: room for a long `If-Match` list and a proxy's cookies. With what else a connection
/// costs it stays below 32 KiB even where somebody fills it.
pub const DEFAULT_HEADER_MAX_BYTES: usize = 16 << 10;

/// Longer than the 60 s after which the usual load balancers drop an idle connection, so that the
/// balancer closes first and never sends a request into our close.
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// A client that has taken no byte for a minute is gone or stalled, as nginx's `send_timeout` judges
/// it.
pub const DEFAULT_PROGRESS_TIMEOUT: Duration = Duration::from_mins(1);

/// Bytes a second. Sixteen connections over a GPRS link get twice as much each; below it 100 MB would take more than
/// a day.
pub const DEFAULT_MIN_RATE: u64 = KIB;

/// Where the file system hierarchy puts state that outlives a restart.
pub const DEFAULT_CACHE_DIR: &str = "/var/lib/pinrange";

/// A few big snapshots, and it fits the smallest disks sold for such hosts. `min_free` protects those
/// that are smaller.
pub const DEFAULT_CAPACITY: u64 = 100 * GIB;

/// What file systems want to stay quick (ext4 keeps the same share for root).
pub const DEFAULT_MIN_FREE: MinFree = MinFree::Percent(5.0);

/// The unit of the coverage record: 1 TiB takes four million blocks, half a MiB as a bitmap; smaller
/// ones cost more bookkeeping, larger ones read more from S3 than small ranges need.
pub const DEFAULT_BLOCK_SIZE: u64 = 256 * KIB;

/// S3 takes 30 to 200 ms to its first byte and then gives about 90 MB/s a stream: a part of 8 MiB
/// takes as long again. AWS recommends 8 to 16 MiB; of the smaller ones twice as many are under way for the same room.
pub const DEFAULT_PART_SIZE: u64 = 8 * MIB;

/// Thirty-two parts under way: at 90 MB/s a stream, and 30 ms before each, they bring 2 GB/s.
pub const DEFAULT_FILL_BUDGET: u64 = 256 * MIB;

/// About 1 GB/s to one client at 30 ms to the first byte, 700 MB/s at 100 ms, and half of the default `fill_budget`: a
/// single wide download never keeps the others waiting.
pub const DEFAULT_FAN_OUT: usize = 16;

/// The default capacity in two hours, and a terabyte within the day for which a verified segment is trusted; of one SSD's
/// throughput not one hundredth, of a hard disk's a tenth.
pub const DEFAULT_SCRUB_RATE: u64 = 16 * MIB;

/// Two seconds behind S3 at most, for a question every two seconds instead of one per request.
pub const DEFAULT_FRESH_FOR: Duration = Duration::from_secs(2);

/// Most S3 incidents and credential rotations are over in minutes; for longer, an old answer would
/// mislead more than a refusal.
pub const DEFAULT_STALE_IF_ERROR: Duration = Duration::from_mins(5);

/// A lost SYN is sent again after 1 s: three seconds let the first repetition succeed and leave time
/// to try another address.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// S3 gives its first byte in 30 to 200 ms; fifty times the slow end is a failure, not a delay.
pub const DEFAULT_FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(10);

/// A stream at 90 MB/s that is silent for ten seconds has lost its connection.
pub const DEFAULT_STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Eight more after the first: where S3 fails three requests of ten, one in fifty thousand is not mended. What an
/// overloaded S3 is spared is decided by the replica's budget of retries (ADR 10), not by this.
pub const DEFAULT_RETRIES: u32 = 8;

/// Yes: a HEAD per object that was fetched whole is little beside its GETs, and nothing else can tell that what
/// arrived is what was uploaded.
pub const DEFAULT_VERIFY: bool = true;

/// What the command line may override. See `pinrange serve --help`.
#[derive(Clone, Debug, Default, clap::Args)]
#[expect(
    clippy::doc_markdown,
    reason = "these comments are the help, and terminals show no markdown"
)]
pub struct Flags {
    /// Address for clients; port 0 picks a free one [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR", help_heading = "Addresses")]
    pub listen: Option<String>,
    /// Address for health, metrics and purge; keep it private [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR", help_heading = "Addresses")]
    pub admin: Option<String>,

    /// Directory of the disk tier, made if missing [default: /var/lib/pinrange]
    #[arg(long, value_name = "DIR", help_heading = "Disk tier")]
    pub cache_dir: Option<String>,
    /// Most bytes the disk tier may take, such as 500GB or 1.5TiB [default: 100GiB]
    #[arg(long, value_name = "SIZE", help_heading = "Disk tier")]
    pub capacity: Option<String>,

    /// Bucket to serve
    #[arg(long, value_name = "NAME", help_heading = MOUNT_HEADING)]
    pub bucket: Option<String>,
    /// URL path of the mount [default: /]
    #[arg(long, value_name = "PATH", requires = "bucket", help_heading = MOUNT_HEADING)]
    pub mount: Option<String>,
    /// Prepended to every key
    #[arg(long, value_name = "PREFIX", requires = "bucket", help_heading = MOUNT_HEADING)]
    pub prefix: Option<String>,
    /// S3 endpoint, such as http://127.0.0.1:3900; leave out for AWS
    #[arg(long, value_name = "URL", requires = "bucket", help_heading = MOUNT_HEADING)]
    pub endpoint: Option<String>,
    /// Region [default: what the AWS environment or profile says]
    #[arg(long, value_name = "NAME", requires = "bucket", help_heading = MOUNT_HEADING)]
    pub region: Option<String>,
    /// Put the bucket into the path, not the host name [default: true with --endpoint]
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true,
        requires = "bucket",
        help_heading = MOUNT_HEADING
    )]
    pub path_style: Option<String>,
    /// Serve the files under DIR through an embedded S3, on loopback, to try pinrange out
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with = "bucket",
        help_heading = "Trying it out"
    )]
    pub dev: Option<PathBuf>,

    /// Log lines for people or for machines: text or json [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Log")]
    pub log_format: Option<String>,
}

const MOUNT_HEADING: &str = "One mount (replaces those of file and environment)";

/// A checked configuration. It serializes as the file that would give it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Listeners, limits on clients, log.
    pub server: ServerConfig,
    /// Disk tier and fills.
    pub cache: CacheConfig,
    /// At least one, of distinct paths; none when `dev` is set.
    #[serde(rename = "mount")]
    pub mounts: Vec<MountConfig>,
    /// Serve the files under this directory through an embedded S3. Whoever starts that adds its one mount
    /// (see [`MountConfig::new`]). `listen` is on loopback.
    #[serde(skip)]
    pub dev: Option<PathBuf>,
}

/// `[server]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServerConfig {
    /// The data listener. Port 0: any free one.
    pub listen: SocketAddr,
    /// The admin listener. Port 0: any free one.
    pub admin: SocketAddr,
    /// How long responses under way may take to end after that.
    #[serde(serialize_with = "duration")]
    pub drain_timeout: Duration,
    /// How long after SIGTERM `/readyz` says 503 while connections are still taken.
    #[serde(serialize_with = "duration")]
    pub drain_grace: Duration,
    /// Log lines for people or for machines.
    pub log_format: LogFormat,
    /// Threads of the runtime; `None`: one per core.
    #[serde(serialize_with = "auto")]
    pub worker_threads: Option<NonZeroUsize>,
    /// Connections of the data listener; more wait in the listen queue while idle ones are closed for them.
    /// See [`ServerConfig::connections_within`].
    pub max_connections: usize,
    /// How long a client may take over a request head.
    #[serde(serialize_with = "duration")]
    pub header_timeout: Duration,
    /// Most bytes of a request head.
    #[serde(serialize_with = "size_usize")]
    pub header_max_bytes: usize,
    /// How long a connection may wait for its next request.
    #[serde(serialize_with = "duration")]
    pub idle_timeout: Duration,
    /// How far a client may be behind `min_rate`, and so how long it may take no byte, before it is cut.
    #[serde(serialize_with = "duration")]
    pub progress_timeout: Duration,
    /// Bytes a second that a client has to take of a response; 0: any byte is enough.
    #[serde(serialize_with = "size")]
    pub min_rate: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: DEFAULT_LISTEN,
            admin: DEFAULT_ADMIN,
            drain_timeout: DEFAULT_DRAIN_TIMEOUT,
            drain_grace: DEFAULT_DRAIN_GRACE,
            log_format: LogFormat::default(),
            worker_threads: None,
            max_connections: DEFAULT_MAX_CONNECTIONS,
            header_timeout: DEFAULT_HEADER_TIMEOUT,
            header_max_bytes: DEFAULT_HEADER_MAX_BYTES,
            idle_timeout: DEFAULT_IDLE_TIMEOUT,
            progress_timeout: DEFAULT_PROGRESS_TIMEOUT,
            min_rate: DEFAULT_MIN_RATE,
        }
    }
}

impl ServerConfig {
    /// `max_connections`, lowered to what `nofile` (the soft `RLIMIT_NOFILE`) leaves: two descriptors a
    /// connection, and 256, or a quarter if that is less, kept back for the catalog, the listeners and the
    /// connections to S3.
    pub fn connections_within(&self, nofile: u64) -> usize {
        let kept_back = 256.min(nofile / 4);
        let affordable = usize::try_from((nofile - kept_back) / 2).unwrap_or(usize::MAX);
        self.max_connections.min(affordable).max(1)
    }
}

/// `[cache]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CacheConfig {
    /// The disk tier's directory; made if it is missing.
    pub dir: PathBuf,
    /// Most bytes that segments may take, unlinked but open ones included.
    #[serde(serialize_with = "size")]
    pub capacity: u64,
    /// How much of the file system to leave free.
    #[serde(serialize_with = "min_free")]
    pub min_free: MinFree,
    /// Unit of coverage in bytes: a power of two, 4 KiB to 4 MiB.
    #[serde(serialize_with = "size")]
    pub block_size: u64,
    /// Most bytes that one S3 GET asks for: a multiple of `block_size`, at most a quarter of `capacity`.
    #[serde(serialize_with = "size")]
    pub part_size: u64,
    /// Bytes of S3 reads under way, over all fills; at least `part_size`.
    #[serde(serialize_with = "size")]
    pub fill_budget: u64,
    /// Parallel S3 reads for one response.
    pub fan_out: usize,
    /// Bytes per second that the scrubber may read; 0: it does not run.
    #[serde(serialize_with = "size")]
    pub scrub_rate: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from(DEFAULT_CACHE_DIR),
            capacity: DEFAULT_CAPACITY,
            min_free: DEFAULT_MIN_FREE,
            block_size: DEFAULT_BLOCK_SIZE,
            part_size: DEFAULT_PART_SIZE,
            fill_budget: DEFAULT_FILL_BUDGET,
            fan_out: DEFAULT_FAN_OUT,
            scrub_rate: DEFAULT_SCRUB_RATE,
        }
    }
}

impl CacheConfig {
    /// The disk tier's share of it.
    pub fn disk(&self) -> DiskConfig {
        DiskConfig {
            dir: self.dir.clone(),
            capacity: self.capacity,
            min_free: self.min_free,
            block_size: self.block_size,
            scrub_rate: self.scrub_rate,
        }
    }
}

/// One `[[mount]]`: a URL path bound to a bucket.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MountConfig {
    /// `/`, or whole segments without a slash at the end: `/a/b`.
    pub path: String,
    /// The bucket's name, or an access point's ARN.
    pub bucket: String,
    /// Prepended to every key, as it is.
    pub prefix: String,
    /// `http://` or `https://`, a host, maybe a path; no slash at the end. `None`: what the AWS chain says
    /// (`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, profile), else AWS itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// `None`: what the AWS chain says (`AWS_REGION`, profile); for an endpoint without any, `us-east-1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The bucket stands in the path, not in the host name.
    pub path_style: bool,
    /// How far an unpinned answer may be behind S3.
    #[serde(serialize_with = "duration")]
    pub fresh_for: Duration,
    /// How long what is held may answer while S3 cannot be reached.
    #[serde(serialize_with = "duration")]
    pub stale_if_error: Duration,
    /// What a 403 of S3 means.
    pub forbidden: ForbiddenAs,
    /// To an open connection, TLS included.
    #[serde(serialize_with = "duration")]
    pub connect_timeout: Duration,
    /// From the request to the head of the response.
    #[serde(serialize_with = "duration")]
    pub first_byte_timeout: Duration,
    /// Between two reads of a body.
    #[serde(serialize_with = "duration")]
    pub stall_timeout: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// Compare revisions that are wholly held with the checksum that S3 has of the object. It costs a HEAD each.
    pub verify: bool,
}

impl MountConfig {
    /// A mount with every default. `path` and `bucket` are not checked.
    pub fn new(path: impl Into<String>, bucket: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            bucket: bucket.into(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: false,
            fresh_for: DEFAULT_FRESH_FOR,
            stale_if_error: DEFAULT_STALE_IF_ERROR,
            forbidden: ForbiddenAs::default(),
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            first_byte_timeout: DEFAULT_FIRST_BYTE_TIMEOUT,
            stall_timeout: DEFAULT_STALL_TIMEOUT,
            retries: DEFAULT_RETRIES,
            verify: DEFAULT_VERIFY,
        }
    }
}

/// Why a configuration was refused: every problem that was found, at least one.
///
/// `Display` has one line for each.
#[derive(Debug)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

impl ConfigError {
    /// In the order of the configuration.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// What is wrong; what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// Where a problem is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: the layers, and their absence"
)]
pub enum Place {
    /// A place in the file.
    Line {
        /// As it was given.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
    },
    /// The file as a whole.
    File {
        /// As it was given.
        file: PathBuf,
    },
    /// An environment variable.
    Variable {
        /// Its name.
        variable: String,
    },
    /// A flag.
    Flag {
        /// With its dashes.
        flag: &'static str,
    },
    /// No layer says it.
    Nowhere {},
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line, column } => write!(f, "{}:{line}:{column}", file.display()),
            Self::File { file } => write!(f, "{}", file.display()),
            Self::Variable { variable } => f.write_str(variable),
            Self::Flag { flag } => f.write_str(flag),
            Self::Nowhere {} => f.write_str("configuration"),
        }
    }
}

/// The file's path and text, to name lines by; both empty where there is no file.
struct Source {
    path: Option<PathBuf>,
    text: String,
}

impl Source {
    fn at(&self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        match &self.path {
            Some(file) => Place::Line {
                file: file.clone(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
            },
            None => Place::Nowhere {},
        }
    }

    fn whole(&self) -> Place {
        match &self.path {
            Some(file) => Place::File { file: file.clone() },
            None => Place::Nowhere {},
        }
    }
}

impl Config {
    /// Every default, and these mounts, unchecked: what `demo` and tests start from.
    pub fn with_mounts(mounts: Vec<MountConfig>) -> Self {
        Self {
            server: ServerConfig::default(),
            cache: CacheConfig::default(),
            mounts,
            dev: None,
        }
    }

    /// Merges and checks. `variables` is the whole environment; what is not ours is skipped.
    ///
    /// Reads `file` and nothing else.
    ///
    /// # Errors
    /// [`ConfigError`], with all that is wrong in every layer; TOML that cannot be read hides only
    /// what comes behind it.
    pub fn load(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        flags: &Flags,
    ) -> Result<Self, ConfigError> {
        let source = Source {
            path: file.map(Path::to_path_buf),
            text: match file {
                Some(path) => std::fs::read_to_string(path).map_err(|error| ConfigError {
                    problems: vec![Problem {
                        place: Place::File {
                            file: path.to_path_buf(),
                        },
                        message: format!(
                            "cannot be read: {error}; --config or PINRANGE_CONFIG names the file"
                        ),
                    }],
                })?,
                None => String::new(),
            },
        };
        let variables: Vec<_> = variables.into_iter().collect();
        let home = check::cache_home(&variables);
        let mut problems = Vec::new();
        if let Some((_, filter)) = variables.iter().find(|(name, _)| name == LOG_VARIABLE)
            && !filter.is_empty()
            && let Err(message) = parse_filter(&filter.to_string_lossy())
        {
            problems.push(Problem {
                place: Place::Variable {
                    variable: LOG_VARIABLE.to_owned(),
                },
                message,
            });
        }
        let mut raw =
            raw::RawConfig::from_toml(&source.text, &source).map_err(|problem| ConfigError {
                problems: vec![problem],
            })?;
        raw.overlay_env(variables, &mut problems);
        raw.overlay_flags(flags);
        check::check(raw, flags.dev.clone(), home, &source, problems)
    }
}

fn duration<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&units::format_duration(*value))
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serialize_with asks for"
)]
fn size<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&units::format_size(*value))
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serialize_with asks for"
)]
fn size_usize<S: Serializer>(value: &usize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&units::format_size(*value as u64))
}

fn min_free<S: Serializer>(value: &MinFree, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&units::format_min_free(*value))
}

#[expect(
    clippy::ref_option,
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serialize_with asks for"
)]
fn auto<S: Serializer>(value: &Option<NonZeroUsize>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(threads) => threads.serialize(serializer),
        None => serializer.serialize_str("auto"),
    }
}
