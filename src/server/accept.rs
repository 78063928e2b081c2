//! The accept loop: how many connections there may be, and how they end.
//!
//! A connection is served once it has one of `max_connections` places. One waits for that here, the
//! others in the kernel's backlog rather than being refused: a downloader that opens too many
//! connections is slowed down, and neither memory nor a file descriptor is spent on saying no.
//!
//! A place is for who asks for something. While clients wait, the connections that have owed us a
//! request for longest are closed (ADR 15): first those that never sent a whole one, as a flood's do,
//! then those kept alive between requests. One that is being answered never gives way, and one that
//! is quick to ask neither. The same is done when descriptors run out.
//!
//! ```text
//!  accepting ──► accepting, every response ──► draining ──► idle connections ──► report
//!     │          is its connection's last        │           are closed
//!     │ accept failed                            │ a running response ends and closes;
//!     ▼                                          ▼ at the drain timeout the rest is cut
//!  back off 10 ms … 1 s when we are out of something (descriptors, memory)
//! ```
//!
//! An [`Ending`] takes these steps. They are apart because a client that keeps a connection open may send its next
//! request at the very moment we close it, and HTTP/1.1 has no answer to that (RFC 9112 §9.5). One that was told
//! `Connection: close` with its last response does not; so the longer idle connections are left alone, the fewer
//! requests run into a close.
//!
//! A connection ends with its answer read, as far as that is in our hands: see
//! `SendfileIo::linger`.
//!
//! What ends a connection is nearly always the client's doing (reset, timeout, a request that does
//! not parse; hyper answers these with 400 or 431 itself, without a body), so it is logged at debug. A
//! response cut short is the business of its body's observer.

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use futures::FutureExt;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::body::ResponseBody;
use super::io::{Cut, Expecting, SendQueue, SendfileIo, SharedIo, Standing, Timeouts};
use super::page_in::PageIn;
use super::unsent;
use crate::seldom::Seldom;

/// What answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Dropped when the connection fails or is cut meanwhile.
    ///
    /// With half-closed connections allowed, a client that goes away while this runs is noticed
    /// only when the answer is written.
    fn handle(
        &self,
        request: Request<Incoming>,
        conn: &ConnInfo,
    ) -> impl Future<Output = Response<ResponseBody>> + Send;

    /// The number of connections changed by one. For a gauge.
    fn connections(&self, _delta: i64) {}

    /// So many connections that owed us a request were asked to make room. For a counter.
    fn displaced(&self, _count: usize) {}

    /// Accepting a connection failed for a reason of ours. For a counter.
    fn accept_failed(&self) {}
}

/// What a handler may know of the connection a request came by.
#[derive(Clone, Debug)]
pub struct ConnInfo {
    /// The client's address.
    pub peer: SocketAddr,
    /// What a body that goes to this connection must be built with.
    pub queue: SendQueue,
}

/// What a listener allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time. More wait in the listen queue while idle ones are closed for them.
    pub max_connections: usize,
    /// Most bytes of a request's head; at least 8192. Beyond it hyper answers 431.
    pub max_head: usize,
    /// How long a connection may be waited for.
    pub timeouts: Timeouts,
}

/// How a listener's connections ended when it was drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainReport {
    /// Closed by themselves after the drain began: idle ones, and those whose response ended in
    /// time.
    pub finished: usize,
    /// Cut at the timeout.
    pub cut: usize,
}

/// How a listener comes to its end: each step is taken once, in this order, and none can be taken back. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    last_responses: Arc<AtomicBool>,
    no_more: CancellationToken,
    idle: CancellationToken,
}

impl Ending {
    /// Every response from now on says `Connection: close` (RFC 9112 §9.6). Connections are still taken.
    pub fn announce(&self) {
        self.last_responses.store(true, Ordering::Relaxed);
    }

    /// No connection is taken any more; the drain timeout begins.
    pub fn stop_accepting(&self) {
        self.announce();
        self.no_more.cancel();
    }

    /// Connections without a response under way are closed.
    pub fn close_idle(&self) {
        self.stop_accepting();
        self.idle.cancel();
    }

    pub(super) fn is_announced(&self) -> bool {
        self.last_responses.load(Ordering::Relaxed)
    }
}

/// A listener and everything needed to serve its connections.
pub struct Acceptor<H> {
    listener: TcpListener,
    handler: Arc<H>,
    limits: Limits,
    page_in: PageIn,
    http: http1::Builder,
}

impl<H: Handler> Acceptor<H> {
    /// Serves `listener`'s connections with `handler`, once [`run`](Self::run).
    ///
    /// # Panics
    /// If `limits.max_head` is less than 8192.
    pub fn new(listener: TcpListener, handler: Arc<H>, limits: Limits, page_in: PageIn) -> Self {
        if let Err(error) = unsent::prepare(&listener) {
            tracing::warn!(%error, "a client that stalls may cost the kernel more memory: what waits in its socket is not limited");
        }
        let mut http = http1::Builder::new();
        http
            // SendfileIo depends on both: see there.
            .writev(true)
            .pipeline_flush(false)
            // Whoever shuts down its sending side after the request still gets the answer.
            .half_close(true)
            // The number of fields is left at hyper's default of 100, which costs no allocation.
            .max_buf_size(limits.max_head)
            // SendfileIo has timeouts of its own, which tell idle connections from slow heads;
            // hyper's one covers both together.
            .header_read_timeout(None);
        Self {
            listener,
            handler,
            limits,
            page_in,
            http,
        }
    }

    /// Accepts until `ending` says to stop, then closes the listener and drains for at most
    /// `drain_timeout`.
    ///
    /// Dropping the future closes the listener and leaves the connections to themselves.
    pub async fn run(self, ending: Ending, drain_timeout: Duration) -> DrainReport {
        let Self {
            listener,
            handler,
            limits,
            page_in,
            http,
        } = self;
        let serving = Arc::new(Serving {
            handler: Arc::clone(&handler),
            page_in,
            unsent: unsent::Pool::of_this_machine(),
            http,
            timeouts: limits.timeouts,
            guests: Guests::default(),
            ending: ending.clone(),
            finished: AtomicUsize::new(0),
            cut: AtomicUsize::new(0),
        });
        let connections = TaskTracker::new();
        let cut = CancellationToken::new();
        let mut places = Places::new(limits.max_connections);
        let mut backoff = Backoff::default();
        let make_room = || handler.displaced(serving.guests.displace(limits.max_connections));
        let out_of_something = || {
            handler.accept_failed();
            make_room();
        };
        loop {
            let accepting = accept(&listener, &mut backoff, out_of_something);
            let Some((tcp, peer)) = ending.no_more.run_until_cancelled(accepting).await else {
                break;
            };
            // Without one only when the drain begins while this client waits. It was accepted, so it
            // is served: one more than the limit.
            let place = ending
                .no_more
                .run_until_cancelled(places.take(make_room))
                .await;
            let connection = Arc::clone(&serving).serve(tcp, peer, cut.clone(), place);
            let span = tracing::info_span!("connection", client.addr = %peer);
            connections.spawn(connection.instrument(span));
        }
        drop(listener);

        connections.close();
        let dismissing = async {
            ending.idle.cancelled().await;
            serving.guests.dismiss_all();
            connections.wait().await;
        };
        let drained = async {
            tokio::select! {
                () = connections.wait() => {}
                () = dismissing => {}
            }
        };
        if tokio::time::timeout(drain_timeout, drained).await.is_err() {
            ending.close_idle();
            serving.guests.dismiss_all();
            cut.cancel();
            connections.wait().await;
        }
        DrainReport {
            finished: serving.finished.load(Ordering::Relaxed),
            cut: serving.cut.load(Ordering::Relaxed),
        }
    }
}

/// What all connections of a listener share.
struct Serving<H> {
    handler: Arc<H>,
    page_in: PageIn,
    unsent: unsent::Pool,
    http: http1::Builder,
    timeouts: Timeouts,
    guests: Guests,
    ending: Ending,
    /// Connections that saw the drain begin and ended by themselves.
    finished: AtomicUsize,
    /// Connections that were cut at its end.
    cut: AtomicUsize,
}

impl<H: Handler> Serving<H> {
    /// Serves one connection to its end, at the latest when it is `cut`; `_place` is free again then.
    async fn serve(
        self: Arc<Self>,
        tcp: TcpStream,
        peer: SocketAddr,
        cut: CancellationToken,
        _place: Option<OwnedSemaphorePermit>,
    ) {
        let _open = Open::new(&*self.handler);
        if let Err(error) = tcp.set_nodelay(true) {
            tracing::debug!(%error, "the client was gone before its connection was set up");
            return;
        }
        let info = ConnInfo {
            peer,
            queue: SendQueue::default(),
        };
        let io = SharedIo::new(SendfileIo::new(
            tcp,
            info.queue.clone(),
            self.page_in.clone(),
            &self.unsent,
            self.timeouts,
            self.ending.clone(),
        ));
        let _present = self.guests.enter(&info.queue);
        if self.ending.idle.is_cancelled() {
            // It may have come too late to be dismissed with the others.
            info.queue.dismiss();
        }
        // Whether the latest request has content, which nobody has read to its end.
        let content = AtomicBool::new(false);
        // Borrowed, not shared: requests touch no reference count that all workers share.
        let (handler, conn, has_content) = (&*self.handler, &info, &content);
        let ending = &self.ending;
        let service = service_fn(move |request: Request<Incoming>| {
            has_content.store(!request.body().is_end_stream(), Ordering::Relaxed);
            let version = request.version();
            // Not an async block, which would hold the handler's future twice.
            handler.handle(request, conn).map(move |mut response| {
                if ending.is_announced() {
                    // hyper closes the connection behind it.
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                if version == Version::HTTP_10 && response.headers().contains_key(CONNECTION) {
                    // It says `close`, here and nowhere else. To a later version's answer hyper adds that the connection is
                    // kept, for who asked for that; but who is told both is told that it ends (RFC 9112 §9.3).
                    *response.version_mut() = version;
                }
                Ok::<_, Infallible>(response)
            })
        });
        let mut connection = self.http.serve_connection(io.clone(), service);

        // Not a token: it would be locked at every turn of the connection.
        let mut served = poll_fn(|cx| {
            if info.queue.poll_dismissed(cx).is_ready() {
                return Poll::Ready(None);
            }
            ready!(io.poll_repetitions(cx));
            Pin::new(&mut connection).poll(cx).map(Some)
        })
        .await;
        if served.is_none() {
            // Idle, it closes at once, in the middle of a head too; else the answer is the last one.
            Pin::new(&mut connection).graceful_shutdown();
            served = if info.queue.standing().is_in_head() {
                // hyper would wait for the rest of a first head.
                Some(Ok(()))
            } else {
                // In this order: at the timeout, idle ones are closed and not cut.
                tokio::select! {
                    biased;
                    served = &mut connection => Some(served),
                    () = cut.cancelled() => None,
                }
            };
        }
        if self.ending.no_more.is_cancelled() {
            let ended = if served.is_some() {
                &self.finished
            } else {
                &self.cut
            };
            ended.fetch_add(1, Ordering::Relaxed);
        }
        let more_expected = match served {
            Some(Ok(())) => content.load(Ordering::Relaxed),
            Some(Err(error)) => {
                let cause = error.source().map(ToString::to_string);
                tracing::debug!(%error, cause, "connection ended early");
                if !error.is_parse() {
                    return;
                }
                true
            }
            None => {
                // Before the connection is dropped, so that its body's observer can tell.
                info.queue.set_cut(Cut::Drained);
                return;
            }
        };
        drop(connection);
        let io = io.into_inner().expect("hyper's is gone");
        let lingering = io.linger(more_expected);
        // Cut or done, it is over.
        let _ = cut.run_until_cancelled(lingering).await;
    }
}

/// The connections there are, so that some can be asked to make room.
#[derive(Default)]
struct Guests {
    next: AtomicU64,
    present: Mutex<HashMap<u64, SendQueue>>,
}

impl Guests {
    /// How long a connection may owe us a request before it may have to make room: many round trips, so that who
    /// has just come or just been answered can ask.
    const GRACE: Duration = Duration::from_secs(1);

    /// Counts a connection as present until the guard is dropped.
    fn enter(&self, queue: &SendQueue) -> Present<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.present.lock().insert(id, queue.clone());
        Present { guests: self, id }
    }

    /// Asks all of them to leave.
    fn dismiss_all(&self) {
        for queue in self.present.lock().values() {
            queue.dismiss();
        }
    }

    /// Asks those to leave who have owed us a request for longest, those first who never sent a whole one. Returns how
    /// many were asked: up to one in 64 of `limit`, so that a flood does not make us look at all connections for
    /// each new one.
    fn displace(&self, limit: usize) -> usize {
        let now = Instant::now();
        let present = self.present.lock();
        let mut idle: Vec<_> = present
            .values()
            .filter(|queue| !queue.is_dismissed())
            .filter_map(|queue| match queue.standing() {
                Standing::Idle { since, expecting } if now - since >= Self::GRACE => {
                    Some((expecting == Expecting::Next, since, queue))
                }
                Standing::Idle { .. } | Standing::Busy => None,
            })
            .collect();
        idle.sort_unstable_by_key(|(known, since, _)| (*known, *since));
        idle.truncate(limit.div_ceil(64));
        for (_, _, queue) in &idle {
            queue.dismiss();
        }
        idle.len()
    }
}

struct Present<'a> {
    guests: &'a Guests,
    id: u64,
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.guests.present.lock().remove(&self.id);
    }
}

/// Keeps the handler's gauge of connections.
struct Open<'a, H: Handler>(&'a H);

impl<'a, H: Handler> Open<'a, H> {
    fn new(handler: &'a H) -> Self {
        handler.connections(1);
        Self(handler)
    }
}

impl<H: Handler> Drop for Open<'_, H> {
    fn drop(&mut self) {
        self.0.connections(-1);
    }
}

/// The connection limit.
struct Places {
    free: Arc<Semaphore>,
    limit: usize,
    crowded: Seldom,
}

impl Places {
    /// Who was not idle for long enough may be by then.
    const LOOK_AGAIN: Duration = Duration::from_millis(100);

    fn new(limit: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(limit)),
            limit,
            crowded: Seldom::default(),
        }
    }

    /// Waits for a free place, calling `make_room` now and then. Cancel safe.
    async fn take(&mut self, make_room: impl Fn()) -> OwnedSemaphorePermit {
        if let Ok(place) = Arc::clone(&self.free).try_acquire_owned() {
            return place;
        }
        if let Some(waited) = self.crowded.happened() {
            tracing::warn!(
                limit = self.limit,
                waited,
                "all connections are taken (server.max_connections); idle ones are closed, further clients wait in the \
                 backlog: so many had to since this was said last, and it is said once a minute"
            );
        }
        loop {
            make_room();
            let free = Arc::clone(&self.free).acquire_owned();
            if let Ok(place) = tokio::time::timeout(Self::LOOK_AGAIN, free).await {
                return place.expect("the semaphore is never closed");
            }
        }
    }
}

/// Accepts a connection, however often that fails, and tells `out_of_something` of each failure that is ours. Cancel
/// safe.
async fn accept(
    listener: &TcpListener,
    backoff: &mut Backoff,
    out_of_something: impl Fn(),
) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => {
                backoff.recovered();
                return accepted;
            }
            Err(error) if is_peers(&error) => {
                tracing::debug!(%error, "a client was gone before it was accepted");
            }
            Err(error) => {
                out_of_something();
                backoff.wait(&error).await;
            }
        }
    }
}

/// Whether an error of accept is that client's trouble, not ours.
fn is_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Waits between failed accepts: out of descriptors, `accept` fails at once and for as long as the
/// client stays in the backlog, and a loop that retries at once takes a whole core.
#[derive(Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(1);

    async fn wait(&mut self, error: &io::Error) {
        if self.failures == 0 {
            tracing::error!(
                %error,
                "accepting connections fails; retrying (if descriptors ran out, raise `ulimit -n`)"
            );
        }
        tokio::time::sleep(self.next()).await;
    }

    fn next(&mut self) -> Duration {
        let wait = Self::FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(Self::LONGEST);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    fn recovered(&mut self) {
        if self.failures > 0 {
            tracing::info!(failures = self.failures, "connections are accepted again");
            self.failures = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_from_10_ms_to_1_s_and_starts_over_after_success() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..9).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.recovered();
        assert_eq!(backoff.next(), Backoff::FIRST);
    }
}
