//! The listener and its connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket as RawSocket, Type};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use super::front::Front;
use super::wire::{Connection, Socket};

/// What is left of file descriptors after the last `accept` failed may be more a moment later.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

const BACKLOG: i32 = 1024;

/// A port that is ours also while nobody listens on it.
///
/// A socket that is bound but does not listen refuses connections and keeps the kernel from giving the port to
/// anybody else, but lets us listen with another one as long as both say `SO_REUSEADDR`.
pub(super) struct Port {
    address: SocketAddr,
    _reservation: RawSocket,
}

impl Port {
    pub(super) fn reserve(address: SocketAddr) -> io::Result<Self> {
        let reservation = bind(address)?;
        let address = reservation
            .local_addr()?
            .as_socket()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            address,
            _reservation: reservation,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn listen(&self) -> io::Result<TcpListener> {
        let socket = bind(self.address)?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        TcpListener::from_std(socket.into())
    }
}

fn bind(address: SocketAddr) -> io::Result<RawSocket> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Serves until the front's present outage token is cancelled. When the task has ended, the listener is closed and
/// every connection has been reset.
pub(super) fn spawn(listener: TcpListener, front: Arc<Front>) -> JoinHandle<()> {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(1);

    let outage = front.outage.lock().clone();
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = outage.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            };
            // Fails only where the peer has already gone.
            let _ = stream.set_nodelay(true);
            let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
            let connection = Arc::new(Connection::new(number));
            let socket = Socket::new(stream, Arc::clone(&connection), outage.clone());
            let front = Arc::clone(&front);
            let service = service_fn(move |request| {
                Arc::clone(&front).answer(Arc::clone(&connection), request)
            });
            connections.spawn(async move {
                let served = http1::Builder::new()
                    // Tests keep connections for as long as they like.
                    .header_read_timeout(None)
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection ended early");
                }
            });
        }
        drop(listener);
        // Sockets that are dropped after the token was cancelled reset their connections.
        connections.shutdown().await;
    })
}
