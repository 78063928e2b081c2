//! HTTP/1.1 to a store: what a reader of long bodies needs, on sockets of its own.
//!
//! ```text
//!   idle connection, or a new one ─▶ hyper: request out, response's head in ─▶ the socket back from hyper
//!        ▲                                                                         │
//!        └── the body's last byte has been read ◀── Body: socket → buffer → Bytes ─┘
//! ```
//!
//! hyper reads a body ahead of whoever takes it, in buffers that grow to 400 KiB, two of them a connection, and hands each
//! over from a task of its own. With a thousand reads under way that was most of the memory, and a fifth of the CPU
//! time went into waking. So hyper does the heads, where strictness counts, and a body whose length is known is
//! read here: only when somebody asks, into a buffer that is lent for as long as its bytes are in use. Of other bodies
//! (chunked ones: errors, mostly, and what proxies make of S3's) hyper finds the chunks, and what is there of them at once goes into
//! one such buffer, for a chunk may be a few bytes, and each frame is a system call to whoever writes it.
//!
//! A [`Body`] can be polled anywhere, on a thread that may block as well: that is how a fill has the bytes read,
//! checked and written by one thread in one go. Until then it holds a socket and no memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, HOST};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Request, Response, Uri, Version};
use http_body::{Body as _, Frame};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::rt::{Read as _, ReadBuf};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower_service::Service;

/// Idle connections kept to one server: as many as GETs that a wide download has under way at once.
const IDLE_CONNECTIONS: usize = 128;

/// How long an idle connection is kept. S3 closes them after some 20 s; a request on one that is
/// just being closed fails.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// Bytes of a buffer: two steps of the disk's writer, so that a stream that fills it is written in whole ones, and
/// little enough to stay in a core's own cache from `recv` through checksum to `pwrite`.
const BUFFER: usize = 128 << 10;

/// Buffers that are kept while nobody uses them.
const SPARE_BUFFERS: usize = 16;

/// Most fields of a response's head. S3 takes 8 KB of head with a PUT, and so at most 450 fields of user metadata.
const MAX_FIELDS: usize = 512;

type BoxError = Box<dyn StdError + Send + Sync>;
type Socket = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// The URI names no server.
    #[error("{0} names no server")]
    Uri(Uri),
    /// The system's root certificates cannot be read.
    #[error("no root certificates: install ca-certificates or set SSL_CERT_FILE")]
    Roots(#[source] io::Error),
    /// Name, TCP or TLS.
    #[error("no connection")]
    Connect(#[source] BoxError),
    /// TLS, because of who the server says it is.
    #[error(
        "the server's certificate is not trusted: if it comes from a CA of your own, name a file of trusted \
         certificates in SSL_CERT_FILE"
    )]
    Untrusted(#[source] BoxError),
    /// The same, in time.
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    /// The connection broke, or what came is not HTTP.
    #[error("no response")]
    Http(#[source] hyper::Error),
}

/// Connections to any number of servers.
pub(super) struct Wire {
    pool: Arc<Pool>,
    buffers: Arc<Buffers>,
    plain: HttpConnector,
    /// Made for the first `https` server: reading the system's certificates takes tens of milliseconds.
    tls: Mutex<Option<HttpsConnector<HttpConnector>>>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Default for Wire {
    fn default() -> Self {
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_nodelay(true);
        Self {
            pool: Arc::default(),
            buffers: Arc::default(),
            plain,
            tls: Mutex::default(),
        }
    }
}

impl Wire {
    /// Sends a request to the server that its URI names, and returns with the response's head. Dropping the future
    /// abandons the connection, as does dropping the body before its end.
    ///
    /// # Errors
    /// [`WireError`]. Nothing is sent twice.
    pub(super) async fn send(
        &self,
        mut request: Request<Empty<Bytes>>,
        connect_timeout: Option<Duration>,
    ) -> Result<Response<Body>, WireError> {
        let place = Place::of(request.uri())?;
        let host = request.headers_mut().entry(HOST);
        if let http::header::Entry::Vacant(host) = host {
            host.insert(place.host());
        }
        *request.version_mut() = Version::HTTP_11;
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path
            .unwrap_or_else(|| PathAndQuery::from_static("/"))
            .into();
        let socket = match self.pool.take(&place) {
            Some(socket) => socket,
            None => self.connect(&place, connect_timeout).await?,
        };
        let (head, mut incoming, connection) = exchange(socket, request).await?;
        let home = may_stay(head.version, &head.headers).then(|| (Arc::clone(&self.pool), place));
        let body = match (incoming.size_hint().exact(), connection) {
            (Some(length), Some(connection)) => {
                let (socket, rest) = taken_back(connection, &mut incoming)?;
                let mut body = Exact {
                    socket: Some(socket),
                    // A server that says more than it announced is not asked again.
                    home: home.filter(|_| rest.len() as u64 <= length),
                    rest,
                    left: length,
                    is_readable: true,
                    buffers: Arc::clone(&self.buffers),
                };
                body.go_home_at_end();
                Kind::Exact(Box::new(body))
            }
            (_, connection) => Kind::Framed(Box::new(Framed {
                incoming,
                connection,
                home,
                rest: Bytes::new(),
                broken: None,
                buffers: Arc::clone(&self.buffers),
            })),
        };
        Ok(Response::from_parts(head, Body(body)))
    }

    async fn connect(&self, place: &Place, timeout: Option<Duration>) -> Result<Socket, WireError> {
        let uri = place.uri();
        let connecting = async {
            if place.scheme == Scheme::HTTPS {
                connected(self.tls()?, uri).await
            } else {
                let socket = connected(self.plain.clone(), uri).await?;
                Ok(MaybeHttpsStream::Http(socket))
            }
        };
        match timeout {
            None => connecting.await,
            Some(timeout) => tokio::time::timeout(timeout, connecting)
                .await
                .unwrap_or(Err(WireError::ConnectTimeout(timeout))),
        }
    }

    fn tls(&self) -> Result<HttpsConnector<HttpConnector>, WireError> {
        let mut tls = self.tls.lock();
        if let Some(connector) = &*tls {
            return Ok(connector.clone());
        }
        let builder = HttpsConnectorBuilder::new()
            .with_native_roots()
            .map_err(WireError::Roots)?;
        let connector = builder
            .https_only()
            .enable_http1()
            .wrap_connector(self.plain.clone());
        Ok(tls.insert(connector).clone())
    }
}

async fn connected<C>(mut connector: C, uri: Uri) -> Result<C::Response, WireError>
where
    C: Service<Uri>,
    C::Error: Into<BoxError>,
{
    let refused = |error: C::Error| {
        let error = error.into();
        if is_untrusted(&*error) {
            WireError::Untrusted(error)
        } else {
            WireError::Connect(error)
        }
    };
    std::future::poll_fn(|cx| connector.poll_ready(cx))
        .await
        .map_err(refused)?;
    connector.call(uri).await.map_err(refused)
}

/// Whether it was the other side's certificate that TLS failed on.
fn is_untrusted(error: &(dyn StdError + 'static)) -> bool {
    if let Some(rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
        return true;
    }
    // What an `io::Error` wraps is not its source: the source of that is.
    match error.downcast_ref().and_then(io::Error::get_ref) {
        Some(wrapped) => is_untrusted(wrapped),
        None => error.source().is_some_and(is_untrusted),
    }
}

/// hyper's two ends of one. It ends as soon as the first is dropped.
struct Connection {
    _sender: http1::SendRequest<Empty<Bytes>>,
    driver: http1::Connection<Socket, Empty<Bytes>>,
}

type Answer = (http::response::Parts, Incoming, Option<Connection>);

/// A request and the head of its response. The connection is `None` where it has ended.
async fn exchange(socket: Socket, request: Request<Empty<Bytes>>) -> Result<Answer, WireError> {
    let (mut sender, driver) = http1::Builder::new()
        .max_headers(MAX_FIELDS)
        .handshake(socket)
        .await
        .map_err(WireError::Http)?;
    let mut driver = Some(driver);
    let mut answer = pin!(sender.send_request(request));
    let answer = std::future::poll_fn(|cx| {
        // Its first turn hands the request to the connection, a later one takes the answer.
        if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
            return Poll::Ready(answer);
        }
        if let Some(under_way) = &mut driver
            && under_way.poll_without_shutdown(cx).is_ready()
        {
            // It has ended, and the answer says why.
            driver = None;
        }
        answer.as_mut().poll(cx)
    });
    let (head, incoming) = answer.await.map_err(WireError::Http)?.into_parts();
    let connection = driver.map(|driver| Connection {
        _sender: sender,
        driver,
    });
    Ok((head, incoming, connection))
}

/// The socket, and what hyper has read from it behind the response's head.
fn taken_back(
    connection: Connection,
    incoming: &mut Incoming,
) -> Result<(Socket, Bytes), WireError> {
    let mut rest = BytesMut::new();
    // It hands over the first of the body with the head. As it is not driven any more, no more comes after that.
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(frame)) = Pin::new(&mut *incoming).poll_frame(&mut cx) {
        if let Ok(bytes) = frame.map_err(WireError::Http)?.into_data() {
            rest.extend_from_slice(&bytes);
        }
    }
    let parts = connection.driver.into_parts();
    rest.extend_from_slice(&parts.read_buf);
    Ok((parts.io, rest.freeze()))
}

/// Whether the connection can be used again after the response (RFC 9112 section 9.3).
fn may_stay(version: Version, headers: &HeaderMap) -> bool {
    let closes = headers.get_all(CONNECTION).iter().any(|field| {
        field.to_str().is_ok_and(|field| {
            field
                .split(',')
                .any(|option| option.trim().eq_ignore_ascii_case("close"))
        })
    });
    version == Version::HTTP_11 && !closes
}

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    scheme: Scheme,
    authority: Authority,
}

impl Place {
    fn of(uri: &Uri) -> Result<Self, WireError> {
        match (uri.scheme(), uri.authority()) {
            (Some(scheme), Some(authority)) => Ok(Self {
                scheme: scheme.clone(),
                authority: authority.clone(),
            }),
            _ => Err(WireError::Uri(uri.clone())),
        }
    }

    fn uri(&self) -> Uri {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query("/")
            .build()
            .expect("parts of a URI make a URI")
    }

    /// As it was signed: without the scheme's own port.
    fn host(&self) -> HeaderValue {
        let host = self.authority.host();
        let standard = if self.scheme == Scheme::HTTPS {
            443
        } else {
            80
        };
        let host = match self.authority.port_u16() {
            Some(port) if port != standard => format!("{host}:{port}"),
            _ => host.to_owned(),
        };
        HeaderValue::from_str(&host).expect("a URI's host is visible ASCII")
    }
}

// === idle connections ===

#[derive(Default)]
struct Pool(Mutex<Idle>);

#[derive(Default)]
struct Idle {
    /// The oldest first.
    sockets: HashMap<Place, Vec<(Instant, Socket)>>,
    /// Whether a task will look for those that have been idle for too long.
    is_watched: bool,
}

impl Pool {
    /// The one that was used last, of those from which nothing has been heard since.
    fn take(&self, place: &Place) -> Option<Socket> {
        let mut idle = self.0.lock();
        let Entry::Occupied(mut entry) = idle.sockets.entry(place.clone()) else {
            return None;
        };
        while let Some((since, socket)) = entry.get_mut().pop() {
            if since.elapsed() < IDLE_TIMEOUT && is_quiet(&socket) {
                return Some(socket);
            }
        }
        entry.remove();
        None
    }

    fn put(self: &Arc<Self>, place: Place, socket: Socket) {
        let mut idle = self.0.lock();
        let sockets = idle.sockets.entry(place).or_default();
        if sockets.len() == IDLE_CONNECTIONS {
            sockets.remove(0);
        }
        sockets.push((Instant::now(), socket));
        if !idle.is_watched
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            idle.is_watched = true;
            runtime.spawn(Self::watch(Arc::downgrade(self)));
        }
    }

    /// Closes those that have been idle for too long, until there is none.
    async fn watch(pool: std::sync::Weak<Self>) {
        loop {
            tokio::time::sleep(IDLE_TIMEOUT).await;
            let Some(pool) = pool.upgrade() else { return };
            let mut idle = pool.0.lock();
            idle.sockets.retain(|_, sockets| {
                sockets.retain(|(since, _)| since.elapsed() < IDLE_TIMEOUT);
                !sockets.is_empty()
            });
            if idle.sockets.is_empty() {
                idle.is_watched = false;
                return;
            }
        }
    }
}

fn tcp(socket: &Socket) -> &TcpStream {
    match socket {
        MaybeHttpsStream::Http(tcp) => tcp.inner(),
        MaybeHttpsStream::Https(tls) => tls.inner().get_ref().0.inner().inner(),
    }
}

/// Whether the other side has neither closed an idle connection nor said anything on it.
fn is_quiet(socket: &Socket) -> bool {
    matches!(tcp(socket).try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

// === bodies ===

/// A response's body.
///
/// An empty frame says that more can be had without waiting, but has not been read yet: whoever waits for bytes need
/// not be the one that takes them.
pub(super) struct Body(Kind);

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").finish_non_exhaustive()
    }
}

enum Kind {
    Exact(Box<Exact>),
    Framed(Box<Framed>),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let bytes = match &mut self.0 {
            Kind::Exact(body) => {
                ready!(body.poll_bytes(cx)).map(|bytes| bytes.map_err(BoxError::from))
            }
            Kind::Framed(body) => {
                ready!(body.poll_bytes(cx)).map(|bytes| bytes.map_err(BoxError::from))
            }
        };
        Poll::Ready(bytes.map(|bytes| bytes.map(Frame::data)))
    }
}

/// A body of a known length.
struct Exact {
    /// `None` once all has been read.
    socket: Option<Socket>,
    /// Where the socket goes then.
    home: Option<(Arc<Pool>, Place)>,
    /// What came with the head.
    rest: Bytes,
    left: u64,
    /// Until a read has found nothing, a read is tried.
    is_readable: bool,
    buffers: Arc<Buffers>,
}

impl Exact {
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let Some(socket) = &mut self.socket else {
            return Poll::Ready(None);
        };
        if !self.is_readable {
            ready!(tcp(socket).poll_read_ready(cx))?;
            self.is_readable = true;
            return Poll::Ready(Some(Ok(Bytes::new())));
        }
        let mut buffer = self.buffers.lend();
        let room = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.memory.len());
        let came_along = self.rest.split_to(self.rest.len().min(room));
        buffer.memory[..came_along.len()].copy_from_slice(&came_along);
        buffer.len = came_along.len();
        while buffer.len < room {
            let mut into = ReadBuf::new(&mut buffer.memory[buffer.len..room]);
            match Pin::new(&mut *socket).poll_read(cx, into.unfilled()) {
                Poll::Ready(Ok(())) if into.filled().is_empty() => {
                    if buffer.len == 0 {
                        return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
                    }
                    break;
                }
                Poll::Ready(Ok(())) => buffer.len += into.filled().len(),
                // The next turn finds it again, after what came before it.
                Poll::Ready(Err(_)) if buffer.len > 0 => break,
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                Poll::Pending => {
                    self.is_readable = false;
                    break;
                }
            }
        }
        if buffer.len == 0 {
            return Poll::Pending;
        }
        self.left -= buffer.len as u64;
        self.go_home_at_end();
        Poll::Ready(Some(Ok(Bytes::from_owner(buffer))))
    }

    fn go_home_at_end(&mut self) {
        if self.left == 0
            && let (Some(socket), Some((pool, place))) = (self.socket.take(), self.home.take())
        {
            pool.put(place, socket);
        }
    }
}

/// A body of which hyper finds the end.
struct Framed {
    incoming: Incoming,
    /// `None` once it has ended.
    connection: Option<Connection>,
    home: Option<(Arc<Pool>, Place)>,
    /// Of a chunk that is longer than the room that was left.
    rest: Bytes,
    /// What broke the body behind the bytes that were handed on last.
    broken: Option<hyper::Error>,
    buffers: Arc<Buffers>,
}

impl Framed {
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, hyper::Error>>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let mut buffer = self.buffers.lend();
        loop {
            let room = &mut buffer.memory[buffer.len..];
            let chunk = self.rest.split_to(self.rest.len().min(room.len()));
            room[..chunk.len()].copy_from_slice(&chunk);
            buffer.len += chunk.len();
            if buffer.len == BUFFER {
                break;
            }
            match self.poll_chunk(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    // What is no data is a trailer.
                    self.rest = frame.into_data().unwrap_or_default();
                }
                Poll::Ready(Some(Err(error))) if buffer.len == 0 => {
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(Some(Err(error))) => {
                    self.broken = Some(error);
                    break;
                }
                Poll::Ready(None) if buffer.len == 0 => return Poll::Ready(None),
                Poll::Pending if buffer.len == 0 => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(Ok(Bytes::from_owner(buffer))))
    }

    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut frame = Pin::new(&mut self.incoming).poll_frame(cx);
        if frame.is_pending()
            && let Some(connection) = &mut self.connection
        {
            if connection.driver.poll_without_shutdown(cx).is_ready() {
                self.connection = None;
            }
            frame = Pin::new(&mut self.incoming).poll_frame(cx);
        }
        let frame = ready!(frame);
        if frame.is_none()
            && let (Some(connection), Some((pool, place))) =
                (self.connection.take(), self.home.take())
        {
            let parts = connection.driver.into_parts();
            // As above.
            if parts.read_buf.is_empty() {
                pool.put(place, parts.io);
            }
        }
        Poll::Ready(frame)
    }
}

// === buffers ===

/// Buffers that nobody uses at the moment.
#[derive(Default)]
struct Buffers(Mutex<Vec<Box<[u8]>>>);

/// A buffer on loan: it goes back when the last of its bytes is let go of.
struct Buffer {
    memory: Box<[u8]>,
    len: usize,
    home: Arc<Buffers>,
}

impl Buffers {
    fn lend(self: &Arc<Self>) -> Buffer {
        let spare = self.0.lock().pop();
        Buffer {
            memory: spare.unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice()),
            len: 0,
            home: Arc::clone(self),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut spare = self.home.0.lock();
        if spare.len() < SPARE_BUFFERS {
            spare.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    const HEAD: &str = "HTTP/1.1 206 Partial Content\r\nContent-Length: ";

    /// Sends what the test says, after each request's head. How many connections were made is in what it hears.
    struct Server {
        uri: Uri,
        /// The number of the connection, and the request's first line.
        requests: mpsc::UnboundedReceiver<(usize, String)>,
        /// What to send next; `None` closes the connection.
        say: mpsc::UnboundedSender<Option<Vec<u8>>>,
        _task: AbortOnDropHandle<()>,
    }

    impl Server {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let uri = format!("http://{}/key?x=1", listener.local_addr().unwrap());
            let (heard, requests) = mpsc::unbounded_channel();
            let (say, mut said) = mpsc::unbounded_channel::<Option<Vec<u8>>>();
            let task = tokio::spawn(async move {
                for number in 0.. {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    loop {
                        tokio::select! {
                            Some(next) = said.recv() => match next {
                                Some(bytes) => stream.write_all(&bytes).await.unwrap(),
                                None => break,
                            },
                            head = read_head(&mut stream) => match head {
                                Some(line) => heard.send((number, line)).unwrap(),
                                None => break,
                            },
                        }
                    }
                }
            });
            Self {
                uri: uri.parse().unwrap(),
                requests,
                say,
                _task: AbortOnDropHandle::new(task),
            }
        }

        fn say(&self, bytes: impl AsRef<[u8]>) {
            self.say.send(Some(bytes.as_ref().to_vec())).unwrap();
        }

        fn request(&self) -> Request<Empty<Bytes>> {
            Request::get(self.uri.clone()).body(Empty::new()).unwrap()
        }

        /// One request: the number of its connection, and what came. Nothing of the body is sent before the head has
        /// been read, where `apart`.
        async fn get(&mut self, wire: &Wire, answer: &str, apart: &str) -> (usize, Vec<u8>) {
            let request = self.request();
            let exchange = async {
                let (response, number) = tokio::join!(wire.send(request, None), async {
                    let (number, line) = self.requests.recv().await.unwrap();
                    assert_eq!(line, "GET /key?x=1 HTTP/1.1");
                    self.say(answer);
                    number
                });
                let body = response.unwrap().into_body();
                if !apart.is_empty() {
                    self.say(apart);
                }
                (number, body.collect().await.unwrap().to_bytes().to_vec())
            };
            // Bytes that are lost would be waited for without end.
            let patience = Duration::from_secs(30);
            tokio::time::timeout(patience, exchange).await.unwrap()
        }
    }

    /// Byte by byte, so that it can be dropped between two.
    async fn read_head(stream: &mut TcpStream) -> Option<String> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte).await.ok()? == 0 {
                return None;
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        Some(head.lines().next().unwrap().to_owned())
    }

    #[tokio::test]
    async fn a_body_is_whole_wherever_its_head_ends_and_its_connection_is_used_again() {
        let mut server = Server::start().await;
        let wire = Wire::default();
        let together = format!("{HEAD}5\r\n\r\nhello");
        let split = format!("{HEAD}5\r\n\r\nhe");
        let alone = format!("{HEAD}5\r\n\r\n");
        let chunked = "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n";
        for (answer, apart) in [
            (together.as_str(), ""),
            (&split, "llo"),
            (&alone, "hello"),
            (chunked, "2\r\nlo\r\n0\r\n\r\n"),
            (&together, ""),
        ] {
            let (number, body) = server.get(&wire, answer, apart).await;
            assert_eq!(body, b"hello", "{answer}");
            assert_eq!(number, 0, "{answer}: another connection");
        }
        let long = "x".repeat(3 * BUFFER + 1);
        let head = format!("{HEAD}{}\r\n\r\n", long.len());
        let (_, body) = server.get(&wire, &head, &long).await;
        assert!(body == long.as_bytes());
    }

    #[tokio::test]
    async fn a_connection_that_ends_or_says_too_much_is_not_used_again() {
        let mut server = Server::start().await;
        let wire = Wire::default();
        let closing = format!("{HEAD}2\r\nConnection: Close\r\n\r\nhi");
        let too_long = format!("{HEAD}2\r\n\r\nhi, and more");
        let old = "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        let chunked = "HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n";
        let closing_chunks = format!("{chunked}Connection: x, close\r\n\r\n2\r\nhi\r\n0\r\n\r\n");
        let more_chunks = format!("{chunked}\r\n2\r\nhi\r\n0\r\n\r\nand more");
        // Where the body comes apart, hyper has not seen its end.
        let closing_apart = format!("{HEAD}2\r\nConnection: x, CLOSE\r\n\r\n");
        let old_apart = "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n";
        let answers = [
            (closing.as_str(), ""),
            (&too_long, ""),
            (old, ""),
            (&closing_chunks, ""),
            (&more_chunks, ""),
            (&closing_apart, "hi"),
            (old_apart, "hi"),
        ];
        for (expected, (answer, apart)) in answers.into_iter().enumerate() {
            let (number, body) = server.get(&wire, answer, apart).await;
            assert_eq!(
                (number, body.as_slice()),
                (expected, &b"hi"[..]),
                "{answer}"
            );
        }
        let fine = format!("{HEAD}2\r\n\r\nhi");
        assert_eq!(server.get(&wire, &fine, "").await.0, answers.len());
        // It is idle now, and the server closes it.
        let place = Place::of(&server.uri).unwrap();
        server.say.send(None).unwrap();
        loop {
            let readable = {
                let idle = wire.pool.0.lock();
                is_quiet(&idle.sockets[&place][0].1)
            };
            if !readable {
                break;
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(server.get(&wire, &fine, "").await.0, answers.len() + 1);
    }

    #[tokio::test]
    async fn who_waits_for_a_body_holds_no_memory_and_a_cut_is_an_error() {
        let mut server = Server::start().await;
        let wire = Wire::default();
        let request = server.request();
        let (response, ()) = tokio::join!(wire.send(request, None), async {
            server.requests.recv().await.unwrap();
            server.say(format!("{HEAD}6\r\n\r\n"));
        });
        let mut body = response.unwrap().into_body();
        let mut frame = async || body.frame().await.map(|frame| frame.unwrap().into_data());
        server.say("one");
        // It is there, and has not been read.
        while let Some(bytes) = frame().await {
            let bytes = bytes.unwrap();
            if !bytes.is_empty() {
                assert_eq!(bytes, "one");
                assert!(wire.buffers.0.lock().is_empty(), "it is on loan");
                break;
            }
        }
        assert_eq!(wire.buffers.0.lock().len(), 1, "it came back");
        let lent = wire.buffers.0.lock().pop();
        server.say("two");
        assert!(frame().await.unwrap().unwrap().is_empty());
        assert!(
            wire.buffers.0.lock().is_empty(),
            "one was made to wait with"
        );
        wire.buffers.0.lock().extend(lent);
        assert_eq!(frame().await.unwrap().unwrap(), "two");
        assert!(frame().await.is_none());

        let request = server.request();
        let (response, ()) = tokio::join!(wire.send(request, None), async {
            server.requests.recv().await.unwrap();
            server.say(format!("{HEAD}6\r\n\r\none"));
            server.say.send(None).unwrap();
        });
        response.unwrap().into_body().collect().await.unwrap_err();
    }

    #[tokio::test]
    async fn chunks_come_together_and_what_came_before_a_cut_comes_first() {
        let mut server = Server::start().await;
        let wire = Wire::default();
        let head = "HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n";
        let small = "a\r\n0123456789\r\n".repeat(1000);
        let long = format!("{:x}\r\n{}\r\n", 3 * BUFFER + 1, "x".repeat(3 * BUFFER + 1));
        for (chunks, length) in [(&small, 10_000), (&long, 3 * BUFFER + 1)] {
            for is_cut in [false, true] {
                let request = server.request();
                let (response, ()) = tokio::join!(wire.send(request, None), async {
                    server.requests.recv().await.unwrap();
                    server.say(format!("{head}{chunks}"));
                    server
                        .say
                        .send((!is_cut).then(|| b"0\r\n\r\n".to_vec()))
                        .unwrap();
                });
                let mut body = response.unwrap().into_body();
                let (mut frames, mut received, mut end) = (0, 0, Ok(()));
                while let Some(frame) = body.frame().await {
                    match frame {
                        Ok(frame) => received += frame.into_data().unwrap().len(),
                        Err(error) => end = Err(error),
                    }
                    frames += 1;
                }
                assert_eq!(received, length);
                assert_eq!(end.is_err(), is_cut, "{end:?}");
                // hyper reads some KiB at a time, and they may come in pieces.
                assert!(frames < 100, "{frames} frames");
                assert!(!wire.buffers.0.lock().is_empty(), "they came back");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connections_are_few_and_not_kept_for_long() {
        let mut server = Server::start().await;
        let wire = Wire::default();
        let fine = format!("{HEAD}2\r\n\r\nhi");
        let place = Place::of(&server.uri).unwrap();
        let idle = |wire: &Wire| wire.pool.0.lock().sockets.get(&place).map_or(0, Vec::len);
        assert_eq!(server.get(&wire, &fine, "").await.0, 0);
        tokio::time::advance(IDLE_TIMEOUT / 2).await;
        assert_eq!(server.get(&wire, &fine, "").await.0, 0, "it is used again");
        assert_eq!(idle(&wire), 1);
        // It is closed though nobody asks for it.
        tokio::time::sleep(2 * IDLE_TIMEOUT).await;
        assert_eq!(idle(&wire), 0);
        assert_eq!(server.get(&wire, &fine, "").await.0, 1);
        // Nor is it used where nobody has looked for it in time.
        wire.pool.0.lock().sockets.get_mut(&place).unwrap()[0].0 -= IDLE_TIMEOUT;
        assert_eq!(server.get(&wire, &fine, "").await.0, 2);

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for _ in 0..=IDLE_CONNECTIONS {
            let socket = TcpStream::connect(listener.local_addr().unwrap()).await;
            let socket = MaybeHttpsStream::Http(TokioIo::new(socket.unwrap()));
            wire.pool.put(place.clone(), socket);
        }
        assert_eq!(idle(&wire), IDLE_CONNECTIONS);
        let many: Vec<_> = (0..=SPARE_BUFFERS).map(|_| wire.buffers.lend()).collect();
        drop(many);
        assert_eq!(wire.buffers.0.lock().len(), SPARE_BUFFERS);
    }
}
