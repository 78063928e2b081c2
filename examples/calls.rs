//! The system calls of a warm range and nothing else: what the kernel alone costs of what `pinrange` does, for benchmarks.
//!
//! ```text
//! cargo run --release --example calls -- LISTEN FILE [apart | corked | nginx]
//! ```
//!
//! One thread with an epoll answers every request from the one file. On a connection the calls are those of `src/server/io.rs`, in its
//! order and of its sizes: a read; then a short range copied from the page cache and written with its head, a longer one by
//! `sendfile`, its head waiting for it in the socket, a long one by `sendfile` a slice at a time, its head ahead of it; before each
//! `sendfile` the page cache is asked for its last byte. Heads are as long as pinrange's; of a request nothing is read but the
//! digits of its range. Only one call is missing: how much the client has not acknowledged, when the socket is full.
//!
//! `apart` sends every range as the long ones are, `corked` has every head wait for its `sendfile`. `nginx` makes nginx's
//! calls: a head, then `sendfile`, without a question before it or a limit to what waits in the socket.

use std::error::Error;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use pinrange::server::io::{BURST, COPIED, JOINED, SLICE};
use pinrange::server::unsent::{MOST, UNSENT};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

/// nginx's `sendfile_max_chunk`.
const NGINX_SLICE: u64 = 2 << 20;

/// What events call the listener; connections are numbered.
const LISTENER: u64 = u64::MAX;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// By the length of the range.
    Pinrange,
    Apart,
    Corked,
    Nginx,
}

/// Fields of no meaning here, for their length.
const FIELDS: &str = "accept-ranges: bytes\r\n\
    etag: \"a2f30291814d3ac76ef0987b9523ff15-0\"\r\n\
    last-modified: Sat, 21 Nov 2026 12:00:00 GMT\r\n\
    content-type: binary/octet-stream\r\n\
    cache-status: pinrange; hit; detail=disk\r\n\
    via: 1.1 pinrange\r\n\
    server-timing: disk;dur=0.000\r\n\
    date: Sat, 21 Nov 2026 12:00:00 GMT\r\n\
    x-request-id: 0123456789abcdef\r\n";

struct Calls {
    file: File,
    size: u64,
    way: Way,
}

struct Connection {
    tcp: TcpStream,
    /// It was found full once, and holds more since.
    is_wide: bool,
    /// What is left to send of the range.
    at: u64,
    end: u64,
}

/// How a connection's turn ended.
enum Turn {
    /// With what the socket had or took.
    Over,
    /// It could go on, but others go first.
    Spent,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, file, way @ ..] = arguments.as_slice() else {
        return Err("LISTEN FILE [apart | corked | nginx]".into());
    };
    let way = match way.first().map(String::as_str) {
        None => Way::Pinrange,
        Some("apart") => Way::Apart,
        Some("corked") => Way::Corked,
        Some("nginx") => Way::Nginx,
        Some(other) => return Err(format!("there is no way called {other}").into()),
    };
    let file = File::open(file)?;
    let size = file.metadata()?.len();
    let listener = TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    // As many as may come at once.
    rustix::net::listen(&listener, 4096)?;
    if way != Way::Nginx {
        socket2::SockRef::from(&listener).set_tcp_notsent_lowat(UNSENT)?;
    }
    Calls { file, size, way }.serve(&listener)?;
    Ok(())
}

impl Calls {
    fn serve(&self, listener: &TcpListener) -> io::Result<()> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(LISTENER);
        epoll::add(&epoll, listener, data, epoll::EventFlags::IN)?;
        let mut connections: Vec<Option<Connection>> = Vec::new();
        let mut events = Vec::with_capacity(1024);
        let mut waiting: Vec<u64> = Vec::new();
        loop {
            let at_once = (!waiting.is_empty()).then(Timespec::default);
            events.clear();
            let wait = || epoll::wait(&epoll, spare_capacity(&mut events), at_once.as_ref());
            rustix::io::retry_on_intr(wait)?;
            let ready = events.iter().map(|event: &epoll::Event| event.data.u64());
            for number in std::mem::take(&mut waiting).into_iter().chain(ready) {
                if number == LISTENER {
                    accept(listener, &epoll, &mut connections)?;
                    continue;
                }
                let place = &mut connections[usize::try_from(number).expect("an index")];
                match place.as_mut().map(|connection| self.turn(connection)) {
                    None | Some(Ok(Turn::Over)) => {}
                    Some(Ok(Turn::Spent)) => waiting.push(number),
                    // The client has left.
                    Some(Err(_)) => *place = None,
                }
            }
        }
    }

    fn turn(&self, connection: &mut Connection) -> io::Result<Turn> {
        let mut asked = false;
        if connection.at == connection.end {
            let mut request = [0; 8192];
            let read = match rustix::net::recv(&connection.tcp, &mut request, RecvFlags::empty()) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((read, _)) => read,
                Err(Errno::AGAIN) => return Ok(Turn::Over),
                Err(error) => return Err(error.into()),
            };
            asked = self.begin(connection, &request[..read])?;
        }
        let Connection {
            tcp,
            is_wide,
            at,
            end,
        } = connection;
        let is_nginx = self.way == Way::Nginx;
        let mut burst = 0;
        while at < end {
            if burst >= BURST {
                return Ok(Turn::Spent);
            }
            let slice = (*end - *at).min(if is_nginx { NGINX_SLICE } else { SLICE });
            if !is_nginx && !std::mem::take(&mut asked) {
                self.is_resident(*at + slice - 1, &mut [0]);
            }
            let slice = usize::try_from(slice).expect("a slice at most");
            match rustix::fs::sendfile(&*tcp, &self.file, Some(at), slice) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(sent) => burst += sent as u64,
                Err(Errno::AGAIN) if !is_nginx && !*is_wide => {
                    socket2::SockRef::from(&*tcp).set_tcp_notsent_lowat(UNSENT + MOST)?;
                    *is_wide = true;
                }
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Turn::Over)
    }

    /// Writes the head and what is copied of the range. Whether the page cache was asked for the rest.
    fn begin(&self, connection: &mut Connection, request: &[u8]) -> io::Result<bool> {
        let Connection { tcp, at, end, .. } = connection;
        let range = range(request);
        (*at, *end) = range.unwrap_or((0, self.size));
        let head = self.head(range, *end - *at);
        if request.starts_with(b"HEAD ") {
            *at = *end;
        }
        let len = *end - *at;
        let ours = self.way == Way::Pinrange;
        let mut copy = [0; COPIED];
        let copy = &mut copy[..usize::try_from(len).unwrap_or(COPIED).min(COPIED)];
        if ours && len == copy.len() as u64 && self.is_resident(*at, copy) {
            let sent = rustix::io::writev(&*tcp, &[IoSlice::new(&head), IoSlice::new(copy)])?;
            *at += sent.checked_sub(head.len()).expect("room for a head") as u64;
            return Ok(false);
        }
        let may_wait = self.way == Way::Corked || ours && len <= JOINED;
        let waits = may_wait && len > 0 && self.is_resident(*end - 1, &mut [0]);
        let head = [IoSlice::new(&head)];
        let sent = if waits {
            let nothing = &mut SendAncillaryBuffer::default();
            rustix::net::sendmsg(&*tcp, &head, nothing, SendFlags::MORE)?
        } else {
            rustix::io::writev(&*tcp, &head)?
        };
        assert_eq!(sent, head[0].len(), "room for a head");
        Ok(waits)
    }

    /// Fills `bytes` from the page cache, if it has them.
    fn is_resident(&self, at: u64, bytes: &mut [u8]) -> bool {
        let wanted = bytes.len();
        let slices = &mut [IoSliceMut::new(bytes)];
        rustix::io::preadv2(&self.file, slices, at, ReadWriteFlags::NOWAIT) == Ok(wanted)
    }

    fn head(&self, range: Option<(u64, u64)>, length: u64) -> Vec<u8> {
        let mut head = Vec::with_capacity(512);
        let status = range.map_or("200 OK", |_| "206 Partial Content");
        write!(
            head,
            "HTTP/1.1 {status}\r\n{FIELDS}content-length: {length}\r\n"
        )
        .expect("memory");
        if let Some((start, end)) = range {
            let (last, size) = (end - 1, self.size);
            write!(head, "content-range: bytes {start}-{last}/{size}\r\n").expect("memory");
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}

fn accept(
    listener: &TcpListener,
    epoll: &OwnedFd,
    connections: &mut Vec<Option<Connection>>,
) -> io::Result<()> {
    use epoll::EventFlags;
    loop {
        let tcp = match listener.accept() {
            Ok((tcp, _)) => tcp,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        tcp.set_nonblocking(true)?;
        tcp.set_nodelay(true)?;
        let data = epoll::EventData::new_u64(connections.len() as u64);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(epoll, &tcp, data, flags)?;
        connections.push(Some(Connection {
            tcp,
            is_wide: false,
            at: 0,
            end: 0,
        }));
    }
}

/// From the first byte asked for to the one behind the last.
fn range(request: &[u8]) -> Option<(u64, u64)> {
    let found = memchr::memmem::find(request, b"bytes=")?;
    let (start, rest) = digits(&request[found + b"bytes=".len()..]);
    let (last, _) = digits(rest.strip_prefix(b"-")?);
    Some((start, last + 1))
}

fn digits(text: &[u8]) -> (u64, &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit());
    let (digits, rest) = text.split_at(end.unwrap_or(text.len()));
    let value = |number, digit: &u8| 10 * number + u64::from(digit - b'0');
    (digits.iter().fold(0, value), rest)
}
