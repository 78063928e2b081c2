//! A strict S3 server in the process: what the tests, `pinrange demo` and `pinrange serve --dev` read from.
//!
//! Real S3 clients can talk to it (the AWS SDKs, aws-cli, rclone, curl). It is strict where other stand-ins are
//! not: conditions on reads are enforced, so a guard that is missing or ignored is seen to be; every request is
//! recorded with the bytes that were sent for it, and GETs without a guard are counted; and it misbehaves on demand,
//! exactly and repeatably.
//!
//! A request's way through it:
//!
//! 1. `server.rs` accepts the connection and lets hyper parse the request.
//! 2. `front.rs` records it (`log.rs`), asks the script and the hook what shall happen to it (`faults.rs`), and makes
//!    scripted changes of objects.
//! 3. `service.rs` answers it: `s3s` parses it and checks its signature, `conditions.rs` judges the conditions of
//!    reads, `store/` has the objects, in memory or in a directory. Uploads by clients that sign in pieces are
//!    unwrapped by `chunked.rs`.
//!    What they and others are compared with, `checksums.rs` knows.
//! 4. `wire.rs` sends the body, at the pace that is set, up to where it is to stall or to be cut.
//!
//! `s3s` logs every request it refuses as an error, and whole requests at debug level: programs turn its target off.
//!
//! Not implemented, and answered 501: copies, reads by part number, ACLs, tags, encryption, and everything else that
//! the clients named above do not need for whole objects and ranges.

mod checksums;
mod chunked;
mod conditions;
mod faults;
mod front;
mod log;
mod server;
mod service;
mod store;
mod wire;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use s3s::service::S3ServiceBuilder;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use self::faults::{Effect, Fault, Hook, Mutation, Op, RequestInfo};
pub use self::log::{LogEntry, Stats};
pub use self::store::{Backing, PutOptions, PutResult, StoreError};

use self::front::Front;
use self::log::RequestLog;
use self::server::Port;
use self::service::{OneKey, Service};
use self::store::Store;
use self::wire::Pace;

/// How a server is set up.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "changed field by field after a constructor"
)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the objects are.
    pub backing: Backing,
    /// With these, only requests signed with them are answered. Without, any are, signed or not.
    pub credentials: Option<Credentials>,
    /// How long every answer is held back; S3 takes 30 to 200 ms.
    pub first_byte_delay: Duration,
    /// How fast bodies are sent on each connection; S3 gives about 90 MB/s.
    pub bytes_per_second_per_connection: Option<NonZeroU64>,
    /// How many of the latest requests the log keeps.
    pub log_capacity: usize,
}

impl Options {
    /// Unversioned buckets in memory, on a free port of the loopback interface, for anyone, as fast as can be.
    pub fn memory<I>(buckets: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let buckets = buckets.into_iter().map(Into::into).collect();
        Self::new(Backing::Memory {
            buckets,
            versioned: false,
        })
    }

    /// The same with versions.
    pub fn versioned<I>(buckets: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let buckets = buckets.into_iter().map(Into::into).collect();
        Self::new(Backing::Memory {
            buckets,
            versioned: true,
        })
    }

    /// The files below `root` as the objects of one bucket, otherwise as [`Options::memory`].
    pub fn directory(bucket: impl Into<String>, root: impl Into<PathBuf>) -> Self {
        Self::new(Backing::Directory {
            bucket: bucket.into(),
            root: root.into(),
        })
    }

    fn new(backing: Backing) -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            backing,
            credentials: None,
            first_byte_delay: Duration::ZERO,
            bytes_per_second_per_connection: None,
            log_capacity: 100_000,
        }
    }
}

/// An access key. `Debug` does not show the secret.
#[derive(Clone)]
#[expect(clippy::exhaustive_structs, reason = "an access key is these two")]
pub struct Credentials {
    /// The access key's id.
    pub access_key: String,
    /// The secret it signs with.
    pub secret_key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("access_key", &self.access_key)
            .finish_non_exhaustive()
    }
}

/// A running server. Dropping it resets all connections and stops it soon after; [`StrictS3::shutdown`] waits.
pub struct StrictS3 {
    front: Arc<Front>,
    port: Port,
    /// The accept loop; `None` between an outage's begin and end.
    running: Mutex<Option<JoinHandle<()>>>,
}

impl StrictS3 {
    /// Starts to serve. Has to be called within a tokio runtime, which then runs the server.
    ///
    /// # Errors
    /// Where the address cannot be bound, or the directory of [`Backing::Directory`] cannot be opened.
    pub async fn start(options: Options) -> io::Result<Self> {
        let store = Arc::new(Store::open(options.backing)?);
        let authenticated = options.credentials.is_some();
        let service = Service {
            store: Arc::clone(&store),
            authenticated,
        };
        let mut builder = S3ServiceBuilder::new(service.clone());
        builder.set_route(service);
        if let Some(credentials) = options.credentials {
            builder.set_auth(OneKey(credentials));
        }
        let port = Port::reserve(options.listen)?;
        let front = Arc::new(Front {
            s3: builder.build(),
            store,
            log: Arc::new(RequestLog::new(options.log_capacity)),
            script: parking_lot::Mutex::default(),
            hook: parking_lot::Mutex::default(),
            pace: Arc::new(Pace::default()),
            first_byte_delay: AtomicU64::new(0),
            release: watch::channel(()).0,
            outage: parking_lot::Mutex::default(),
            authenticated,
        });
        let server = Self {
            front,
            port,
            running: Mutex::new(None),
        };
        server.set_bytes_per_second_per_connection(options.bytes_per_second_per_connection);
        server.set_first_byte_delay(options.first_byte_delay);
        let listener = server.port.listen()?;
        *server.running.lock().await = Some(server::spawn(listener, Arc::clone(&server.front)));
        Ok(server)
    }

    /// `http://ADDRESS:PORT`, for path-style requests.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Puts an object, without a request.
    ///
    /// # Errors
    /// [`StoreError::NoSuchBucket`], and [`StoreError::Unsupported`] for a directory.
    pub fn put(
        &self,
        bucket: &str,
        key: &str,
        bytes: impl Into<Bytes>,
        options: PutOptions,
    ) -> Result<PutResult, StoreError> {
        self.front.store.put_now(bucket, key, bytes.into(), options)
    }

    /// Deletes an object, without a request. That there is none is fine. With versions it puts a delete marker.
    ///
    /// # Errors
    /// As [`StrictS3::put`].
    pub fn delete(&self, bucket: &str, key: &str) -> Result<(), StoreError> {
        self.front.store.delete_now(bucket, key).map(|_| ())
    }

    /// What was asked, oldest first, as far as the log goes back.
    pub fn log(&self) -> Vec<LogEntry> {
        self.front.log.snapshot()
    }

    /// The log, which is empty afterwards; the counters of [`StrictS3::stats`] are zero. Sequence numbers go on.
    pub fn take_log(&self) -> Vec<LogEntry> {
        self.front.log.take()
    }

    /// Forgets the log and zeroes the counters.
    pub fn clear_log(&self) {
        self.front.log.take();
    }

    /// Totals, whatever the log's capacity.
    pub fn stats(&self) -> Stats {
        self.front.log.stats()
    }

    /// Waits until the log fulfils `condition`, which sees it now and after every change. Has no limit of its own.
    /// Dropping the future forgets it.
    pub async fn wait_for_log(&self, mut condition: impl FnMut(&[LogEntry]) -> bool + Send) {
        let mut changes = self.front.log.changed();
        while !condition(&self.log()) {
            if changes.changed().await.is_err() {
                return; // Cannot be: `front` holds the sender.
            }
        }
    }

    /// Arranges a fault. Faults apply in the order they were scripted, several to one request if they match it.
    pub fn script(&self, fault: Fault) {
        self.front.script.lock().add(fault);
    }

    /// Forgets the faults that have not been used up.
    pub fn clear_faults(&self) {
        self.front.script.lock().clear();
    }

    /// Lets `hook` decide on every request from now on; `None` ends that. Its effects come after the scripted ones.
    pub fn on_request(&self, hook: Option<Hook>) {
        *self.front.hook.lock() = hook.map(Arc::new);
    }

    /// Ends every stall there is ([`Effect::StallAfter`]), also of bodies that have not reached it yet.
    pub fn release_stalls(&self) {
        self.front.release.send_replace(());
    }

    /// As [`Options::bytes_per_second_per_connection`]; bodies under way follow.
    pub fn set_bytes_per_second_per_connection(&self, bytes_per_second: Option<NonZeroU64>) {
        self.front.pace.set(bytes_per_second);
    }

    /// As [`Options::first_byte_delay`], for requests from now on.
    pub fn set_first_byte_delay(&self, delay: Duration) {
        let nanoseconds = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.front
            .first_byte_delay
            .store(nanoseconds, Ordering::Relaxed);
    }

    /// Begins an outage: connections are refused, and those that were open have been reset when this returns.
    /// The port stays reserved. Objects, log and script stay.
    pub async fn stop_accepting(&self) {
        self.front.outage.lock().cancel();
        stopped(&mut *self.running.lock().await).await;
    }

    /// Ends an outage, on the same port. Does nothing where there is none.
    ///
    /// # Errors
    /// Where the kernel does not let us listen again.
    pub async fn resume(&self) -> io::Result<()> {
        let mut running = self.running.lock().await;
        if !self.front.outage.lock().is_cancelled() {
            return Ok(());
        }
        stopped(&mut running).await;
        let listener = self.port.listen()?;
        *self.front.outage.lock() = CancellationToken::new();
        *running = Some(server::spawn(listener, Arc::clone(&self.front)));
        Ok(())
    }

    /// Stops. All connections have been reset when this returns.
    pub async fn shutdown(self) {
        self.stop_accepting().await;
    }
}

/// Waits for the accept loop to end. Where the future is dropped, the next one waits on.
async fn stopped(running: &mut Option<JoinHandle<()>>) {
    if let Some(handle) = running {
        // A panic in there has been reported by the runtime.
        let _ = handle.await;
    }
    *running = None;
}

impl Drop for StrictS3 {
    fn drop(&mut self) {
        self.front.outage.lock().cancel();
    }
}

impl fmt::Debug for StrictS3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StrictS3")
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}
