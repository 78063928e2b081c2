//! The data path on real sockets: hyper, the send queue and sendfile together, byte for byte.
//!
//! This is the test to run before hyper's version is raised: what `server/io.rs` leans on is not in
//! hyper's documented contract.

#![expect(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use pinrange::disk::FileExtent;
use pinrange::payload::{BodyError, ChunkSource, Payload, Rescue, Way};
use pinrange::semantics::{ByteRange, RangeSpec};
use pinrange::server::accept::{Acceptor, ConnInfo, DrainReport, Ending, Handler, Limits};
use pinrange::server::body::{BodyEnd, BodyObserver, Part, ResponseBody};
use pinrange::server::io::{SendQueue, Timeouts};
use pinrange::server::page_in::{PageIn, Pages};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

/// Not a multiple of anything.
const SIZE: u64 = (9 << 20) + 12_345;

/// Long enough not to be met by a healthy test, short enough to end a sick one.
const PATIENT: Duration = Duration::from_secs(20);

// === the server under test ===

/// How a body is cut into chunks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunks {
    /// One extent a range.
    Whole,
    /// Extents of changing lengths between 1 and some 3000 bytes.
    Small,
    /// As `Small`, every other one from memory.
    Mixed,
    /// The file ends before the range does.
    Truncated,
    /// An error after this many bytes.
    FailsAt(u64),
    /// More bytes than were asked for.
    TooLong,
    /// Nothing until the gate opens.
    Gated,
    /// Bytes in memory, all at once.
    Memory,
}

/// What a file that fails is replaced by: what comes through the disk again, and what comes past it.
struct Spare {
    file: Arc<File>,
    truncated: Arc<File>,
    again: Chunks,
    past_disk: Chunks,
    ways: mpsc::UnboundedSender<Way>,
    gate: watch::Receiver<bool>,
}

impl Rescue for Spare {
    fn source(self: Arc<Self>, way: Way) -> Box<dyn ChunkSource> {
        let _ = self.ways.send(way);
        let chunks = match way {
            Way::Again => self.again,
            Way::PastDisk => self.past_disk,
        };
        Box::new(Source {
            file: Arc::clone(if chunks == Chunks::Truncated {
                &self.truncated
            } else {
                &self.file
            }),
            chunks,
            calls: 0,
            gate: gate(chunks, &self.gate),
            spare: None,
        })
    }
}

fn gate(chunks: Chunks, gate: &watch::Receiver<bool>) -> Option<JoinHandle<()>> {
    let mut gate = gate.clone();
    (chunks == Chunks::Gated)
        .then(|| tokio::spawn(async move { drop(gate.wait_for(|open| *open).await.unwrap()) }))
}

struct Source {
    file: Arc<File>,
    chunks: Chunks,
    calls: u64,
    gate: Option<JoinHandle<()>>,
    spare: Option<Arc<Spare>>,
}

impl Source {
    fn extent(&self, start: u64, len: u64) -> Payload {
        Payload::File(FileExtent::from_file(
            self.file.try_clone().unwrap(),
            start,
            len,
        ))
    }

    fn memory(&self, start: u64, len: u64) -> Payload {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.file.read_exact_at(&mut bytes, start).unwrap();
        Payload::Memory(bytes.into())
    }
}

impl ChunkSource for Source {
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        range: ByteRange,
    ) -> Poll<Result<Payload, BodyError>> {
        self.calls += 1;
        let small = (self.calls * 997 % 3000 + 1).min(range.len());
        Poll::Ready(Ok(match self.chunks {
            Chunks::Whole | Chunks::Truncated => self.extent(range.start(), range.len()),
            Chunks::Small => self.extent(range.start(), small),
            Chunks::Mixed if self.calls.is_multiple_of(2) => self.extent(range.start(), small),
            Chunks::Mixed => self.memory(range.start(), small),
            Chunks::Memory => self.memory(range.start(), range.len()),
            Chunks::FailsAt(offset) if range.start() >= offset => {
                return Poll::Ready(Err(BodyError::new("remote", "the bucket went away")));
            }
            Chunks::FailsAt(offset) => {
                self.extent(range.start(), (offset - range.start()).min(range.len()))
            }
            Chunks::TooLong => self.extent(range.start(), range.len() + 1),
            Chunks::Gated => {
                if let Some(gate) = &mut self.gate {
                    std::task::ready!(std::pin::Pin::new(gate).poll(cx)).unwrap();
                    self.gate = None;
                }
                self.extent(range.start(), range.len())
            }
        }))
    }

    fn rescue(&self) -> Option<Arc<dyn Rescue>> {
        Some(Arc::clone(self.spare.as_ref()?) as Arc<dyn Rescue>)
    }
}

struct Observer(mpsc::UnboundedSender<BodyEnd>);

impl BodyObserver for Observer {
    fn on_end(&mut self, end: BodyEnd) {
        // The test may have seen enough.
        let _ = self.0.send(end);
    }
}

/// Answers `/{kind}/{first}-{last}[,{first}-{last}…]`.
struct Files {
    file: Arc<File>,
    truncated: Arc<File>,
    gate: watch::Receiver<bool>,
    ends: mpsc::UnboundedSender<BodyEnd>,
    queues: mpsc::UnboundedSender<SendQueue>,
    ways: mpsc::UnboundedSender<Way>,
    accept_failures: Arc<AtomicUsize>,
    /// Somebody waits for a place.
    crowded: Arc<Notify>,
}

impl Handler for Files {
    fn accept_failed(&self) {
        self.accept_failures.fetch_add(1, Ordering::Relaxed);
    }

    fn displaced(&self, _: usize) {
        self.crowded.notify_one();
    }

    async fn handle(&self, request: Request<Incoming>, conn: &ConnInfo) -> Response<ResponseBody> {
        let _ = self.queues.send(conn.queue.clone());
        let path = request.uri().path();
        if path == "/ping" {
            return Response::new(ResponseBody::bytes("pong"));
        }
        let (kind, ranges) = path[1..].split_once('/').unwrap();
        let chunks = match kind {
            // The second is a file whose pages do not come, and what is sent in its place.
            "whole" | "hanging" => Chunks::Whole,
            "small" => Chunks::Small,
            "mixed" => Chunks::Mixed,
            // After the first: a file that fails, and what replaces it.
            "truncated" | "again-small" | "again-mixed" | "again-short" | "again-fails"
            | "again-gated" | "neither" => Chunks::Truncated,
            "fails" => Chunks::FailsAt(100_000),
            "too-long" => Chunks::TooLong,
            "gated" => Chunks::Gated,
            _ => panic!("no such kind: {kind}"),
        };
        let (again, past_disk) = match kind {
            "again-small" => (Chunks::Small, Chunks::TooLong),
            "again-mixed" => (Chunks::Mixed, Chunks::TooLong),
            "again-short" => (Chunks::Truncated, Chunks::Memory),
            "again-fails" => (Chunks::FailsAt(400_000), Chunks::TooLong),
            "again-gated" => (Chunks::Gated, Chunks::TooLong),
            "neither" => (Chunks::Truncated, Chunks::Truncated),
            _ => (Chunks::TooLong, Chunks::Memory),
        };
        let spare = Spare {
            file: Arc::clone(&self.file),
            truncated: Arc::clone(&self.truncated),
            again,
            past_disk,
            ways: self.ways.clone(),
            gate: self.gate.clone(),
        };
        let source = Source {
            file: Arc::clone(if chunks == Chunks::Truncated {
                &self.truncated
            } else {
                &self.file
            }),
            chunks,
            calls: 0,
            gate: gate(chunks, &self.gate),
            spare: (kind != "truncated").then(|| Arc::new(spare)),
        };
        let ranges = parse(ranges);
        let mut parts = Vec::new();
        for range in &ranges {
            if ranges.len() > 1 {
                parts.push(Part::Bytes(delimiter(*range)));
            }
            parts.push(Part::Range(*range));
        }
        let observer = Observer(self.ends.clone());
        Response::new(ResponseBody::new(
            parts,
            Box::new(source),
            conn.queue.clone(),
            observer,
        ))
    }
}

fn parse(ranges: &str) -> Vec<ByteRange> {
    let parse = |range: &str| {
        let (first, last) = range.split_once('-').unwrap();
        let spec = RangeSpec::Closed {
            first: first.parse().unwrap(),
            last: last.parse().unwrap(),
        };
        spec.resolve(SIZE).unwrap()
    };
    ranges.split(',').map(parse).collect()
}

fn delimiter(range: ByteRange) -> Bytes {
    format!("--delimiter {}-{}\r\n", range.start(), range.last()).into()
}

struct Server {
    addr: SocketAddr,
    content: Vec<u8>,
    ends: mpsc::UnboundedReceiver<BodyEnd>,
    queues: mpsc::UnboundedReceiver<SendQueue>,
    ways: mpsc::UnboundedReceiver<Way>,
    gate: watch::Sender<bool>,
    page_in: PageIn,
    file: Arc<File>,
    accept_failures: Arc<AtomicUsize>,
    /// Somebody waits for a place.
    crowded: Arc<Notify>,
    ending: Ending,
    running: JoinHandle<DrainReport>,
}

impl Server {
    async fn start() -> Self {
        Self::with(|_| ()).await
    }

    async fn with(adjust: impl FnOnce(&mut Limits)) -> Self {
        Self::over(PageIn::new().unwrap(), adjust).await
    }

    async fn over(page_in: PageIn, adjust: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits {
            max_connections: 100,
            timeouts: Timeouts {
                header: PATIENT,
                idle: PATIENT,
                progress: PATIENT,
                min_rate: 0,
            },
            max_head: 16 << 10,
        };
        adjust(&mut limits);
        // xorshift: no two stretches are alike.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let content: Vec<u8> = (0..SIZE)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_be_bytes()[0]
            })
            .collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let mut truncated = tempfile::tempfile().unwrap();
        truncated.write_all(&content[..300_000]).unwrap();
        let file = Arc::new(file);

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (ends_in, ends) = mpsc::unbounded_channel();
        let (queues_in, queues) = mpsc::unbounded_channel();
        let (ways_in, ways) = mpsc::unbounded_channel();
        let (gate, gate_rx) = watch::channel(false);
        let handler = Files {
            file: Arc::clone(&file),
            truncated: Arc::new(truncated),
            gate: gate_rx,
            ends: ends_in,
            queues: queues_in,
            ways: ways_in,
            accept_failures: Arc::default(),
            crowded: Arc::default(),
        };
        let accept_failures = Arc::clone(&handler.accept_failures);
        let crowded = Arc::clone(&handler.crowded);
        let acceptor = Acceptor::new(listener, Arc::new(handler), limits, page_in.clone());
        let ending = Ending::default();
        let running = tokio::spawn(acceptor.run(ending.clone(), Duration::from_millis(500)));
        Self {
            addr,
            content,
            ends,
            queues,
            ways,
            gate,
            page_in,
            file,
            accept_failures,
            crowded,
            ending,
            running,
        }
    }

    /// A client with a small window.
    async fn connect_narrow(&self) -> Client {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        Client {
            tcp: socket.connect(self.addr).await.unwrap(),
            unread: Vec::new(),
        }
    }

    async fn connect(&self) -> Client {
        Client {
            tcp: TcpStream::connect(self.addr).await.unwrap(),
            unread: Vec::new(),
        }
    }

    /// What a body for these ranges must be.
    fn body(&self, ranges: &str) -> Vec<u8> {
        let ranges = parse(ranges);
        let mut body = Vec::new();
        for range in &ranges {
            if ranges.len() > 1 {
                body.extend_from_slice(&delimiter(*range));
            }
            let bounds =
                usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
            body.extend_from_slice(&self.content[bounds]);
        }
        body
    }

    async fn end(&mut self) -> BodyEnd {
        within(self.ends.recv()).await.unwrap()
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENT, future)
        .await
        .expect("the test hangs")
}

// === the client ===

struct Client {
    tcp: TcpStream,
    unread: Vec<u8>,
}

impl Client {
    async fn send(&mut self, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.tcp.write_all(request.as_bytes()).await.unwrap();
    }

    /// The head, with its end.
    async fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.unread.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = self.unread.drain(..end + 4).collect();
                return String::from_utf8(head).unwrap();
            }
            assert_ne!(
                within(self.tcp.read_buf(&mut self.unread)).await.unwrap(),
                0,
                "no head"
            );
        }
    }

    /// As many bytes of the body as come before the end of the body or of the connection.
    async fn body(&mut self, head: &str) -> Vec<u8> {
        let len = content_length(head);
        while self.unread.len() < len {
            match within(self.tcp.read_buf(&mut self.unread)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let len = len.min(self.unread.len());
        self.unread.drain(..len).collect()
    }

    async fn response(&mut self) -> Vec<u8> {
        let head = self.head().await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        self.body(&head).await
    }

    async fn get(&mut self, path: &str) -> Vec<u8> {
        self.send(path).await;
        self.response().await
    }

    /// Waits until the server has closed the connection.
    async fn closed(&mut self) {
        match within(self.tcp.read_buf(&mut self.unread)).await {
            Ok(0) => {}
            Ok(_) => panic!(
                "unexpected bytes: {:?}",
                String::from_utf8_lossy(&self.unread)
            ),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }
}

fn content_length(head: &str) -> usize {
    let fields = head.to_ascii_lowercase();
    let (_, rest) = fields
        .split_once("content-length: ")
        .expect("every body here has a length");
    rest.split_once("\r\n").unwrap().0.parse().unwrap()
}

/// Not `assert_eq`, which would print megabytes.
#[track_caller]
fn assert_same(got: &[u8], want: &[u8]) {
    let differ = got.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!(differ, None, "first different byte");
    assert_eq!(got.len(), want.len(), "length");
}

// === bytes ===

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_bodies_of_all_kinds_are_byte_exact_and_files_go_by_sendfile() {
    let mut server = Server::start().await;
    let mut client = server.connect().await;
    let requests = [
        ("mixed", "1-2500000"),
        ("whole", "7-8000000"),
        ("small", "0-3000000"),
        ("whole", "5-5"),
        ("whole", "3-70,100000-2000000,90-95,4000000-9000000"),
        ("mixed", "10-20,3000-90000"),
        ("whole", "0-99999999"),
        ("mixed", "0-99999999"),
    ];
    let mut wire = 0;
    for (kind, ranges) in requests {
        client.send(&format!("/{kind}/{ranges}")).await;
    }
    for (_, ranges) in requests {
        let head = client.head().await;
        let body = client.body(&head).await;
        assert_same(&body, &server.body(ranges));
        wire += (head.len() + body.len()) as u64;
    }
    assert!(client.unread.is_empty());

    let mut from_files = 0;
    for (kind, ranges) in requests {
        let end = server.end().await;
        let body = server.body(ranges).len() as u64;
        assert!(end.abort.is_none(), "{end:?}");
        assert_eq!(
            (end.promised, end.from_files + end.from_memory),
            (body, body)
        );
        let delimiters = body - parse(ranges).iter().map(|range| range.len()).sum::<u64>();
        match kind {
            "mixed" => assert!(
                end.from_memory > delimiters && end.from_files > 0,
                "{end:?}"
            ),
            _ => assert_eq!(end.from_memory, delimiters),
        }
        from_files += end.from_files;
    }
    let queue = server.queues.recv().await.unwrap();
    assert!(queue.copied() > 0, "short extents are copied");
    assert_eq!(queue.sent_by_sendfile() + queue.copied(), from_files);
    assert_eq!(queue.sent_by_write(), wire - queue.sent_by_sendfile());
}

/// Around both lengths at which the way changes, one answer after the other and all at once: a client that does not
/// read yet cuts a head and its payload anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_all_short_lengths_are_byte_exact_however_the_socket_cuts_them() {
    let mut server = Server::start().await;
    let lengths = [
        1, 2, 100, 4095, 4096, 4097, 8192, 32767, 32768, 32769, 65536,
    ];
    for length in lengths {
        let mut client = server.connect().await;
        let range = format!("777-{}", 776 + length);
        assert_same(
            &client.get(&format!("/whole/{range}")).await,
            &server.body(&range),
        );
        let end = server.end().await;
        assert_eq!((end.from_files, end.from_memory), (length, 0));
        let queue = server.queues.recv().await.unwrap();
        let copied = if length <= 4096 { length } else { 0 };
        let seen = (queue.copied(), queue.sent_by_sendfile());
        assert_eq!(seen, (copied, length - copied), "{length}");
    }

    let ranges: Vec<_> = lengths[..5]
        .iter()
        .cycle()
        .zip(0..3000)
        .map(|(length, n)| format!("{}-{}", n * 1499, n * 1499 + length - 1))
        .collect();
    let tcp = server.connect_narrow().await.tcp;
    let (read, mut write) = tcp.into_split();
    let mut requests = String::new();
    for range in &ranges {
        write!(
            requests,
            "GET /whole/{range} HTTP/1.1\r\nHost: test\r\n\r\n"
        )
        .unwrap();
    }
    // Beside the reading: the server takes no more requests than it can answer.
    let asking = tokio::spawn(async move {
        write.write_all(requests.as_bytes()).await.unwrap();
        write
    });
    let queue = server.queues.recv().await.unwrap();
    let mut reader = tokio::io::BufReader::new(read);
    for range in &ranges {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(within(reader.read_line(&mut head)).await.unwrap(), 0);
        }
        let mut body = vec![0; content_length(&head)];
        within(reader.read_exact(&mut body)).await.unwrap();
        assert_same(&body, &server.body(range));
    }
    within(asking).await.unwrap();
    assert!(
        queue.sent_by_sendfile() > 0 && queue.copied() > 0,
        "cut-off payload goes on by sendfile: {} copied, {} sent",
        queue.copied(),
        queue.sent_by_sendfile()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_every_byte_and_is_not_cut_while_it_reads() {
    let server = Server::with(|limits| {
        limits.timeouts.progress = Duration::from_millis(500);
    })
    .await;
    let started = Instant::now();
    for kind in ["whole", "mixed"] {
        let mut tcp = server.connect_narrow().await.tcp;
        let request = format!("GET /{kind}/11-99999999 HTTP/1.1\r\nHost: test\r\n\r\n");
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        let mut buf = vec![0; 150_000];
        let mut pauses = 0;
        while got.len() < server.content.len() - 11 {
            let read = within(tcp.read(&mut buf)).await.unwrap();
            assert_ne!(read, 0, "cut after {} bytes", got.len());
            got.extend_from_slice(&buf[..read]);
            // The pause is the test: the client must be slow, but never for as long as the timeout.
            if got.len() / 600_000 > pauses {
                pauses += 1;
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
        }
        let head = got.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        let mut rest = vec![0; server.content.len() - 11 - (got.len() - head)];
        within(tcp.read_exact(&mut rest)).await.unwrap();
        got.extend_from_slice(&rest);
        assert_same(&got[head..], &server.content[11..]);
    }
    assert!(
        started.elapsed() > Duration::from_secs(1),
        "not slow enough to mean anything"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_connections_at_once_do_not_mix() {
    let server = Arc::new(Server::start().await);
    let clients: Vec<_> = (0..16)
        .map(|n: u64| {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let mut client = server.connect().await;
                for round in 0..6 {
                    let first = n * 300_000 + round * 1000;
                    let ranges = format!("{first}-{}", first + 400_000);
                    let kind = ["small", "mixed", "whole"][usize::try_from(n + round).unwrap() % 3];
                    assert_same(
                        &client.get(&format!("/{kind}/{ranges}")).await,
                        &server.body(&ranges),
                    );
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_the_page_cache_is_loaded_first_and_sent_right() {
    let server = Server::start().await;
    let mut byte = [0];
    server.file.sync_all().unwrap();
    rustix::fs::fadvise(&server.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let probe = rustix::io::preadv2(
        &server.file,
        &mut [io::IoSliceMut::new(&mut byte)],
        5_000_000,
        rustix::io::ReadWriteFlags::NOWAIT,
    );
    let mut client = server.connect().await;
    assert_same(&client.get("/whole/0-99999999").await, &server.content);
    if probe == Err(rustix::io::Errno::AGAIN) {
        assert!(server.page_in.loads() > 0);
    } else {
        // tmpfs, or a file system that cannot tell.
        eprintln!("not tested: the page cache could not be emptied ({probe:?})");
    }
    let loads = server.page_in.loads();
    assert_same(&client.get("/whole/0-99999999").await, &server.content);
    assert_eq!(
        server.page_in.loads(),
        loads,
        "what is there is not loaded again"
    );
}

/// A disk of which nothing is in the page cache until it has been read.
#[derive(Clone, Default)]
struct ColdDisk(Arc<AtomicUsize>);

impl Pages for ColdDisk {
    fn is_resident(&self, _: &FileExtent, _: u64) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    fn copy_resident(&self, extent: &FileExtent, buffer: &mut [u8]) -> bool {
        self.is_resident(extent, extent.len())
            && extent
                .file()
                .file()
                .read_exact_at(buffer, extent.offset())
                .is_ok()
    }

    fn read(&self, _: &FileExtent, _: u64) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_ranges_that_are_on_the_disk_alone_are_loaded_off_the_worker_as_well() {
    for (range, copied) in [("5-1004", 1000), ("5-20004", 0)] {
        let disk = ColdDisk::default();
        let page_in = PageIn::over(disk.clone(), PATIENT).unwrap();
        let mut server = Server::over(page_in.clone(), |_| ()).await;
        let mut client = server.connect().await;
        let path = format!("/whole/{range}");
        assert_same(&client.get(&path).await, &server.body(range));
        let queue = server.queues.recv().await.unwrap();
        let length = server.end().await.promised;
        assert_eq!((queue.copied(), queue.sent_by_sendfile()), (0, length));
        assert_same(&client.get(&path).await, &server.body(range));
        // What is there is not waited for. The client may have it before it is counted.
        within(async {
            while queue.copied() + queue.sent_by_sendfile() < 2 * length {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(queue.copied(), copied);
        assert_eq!(page_in.loads(), 1);
        assert_eq!(disk.0.load(Ordering::Relaxed), 1);
    }
}

// === failures after the head ===

#[tokio::test(flavor = "multi_thread")]
async fn failures_after_the_head_cut_the_connection_and_are_observed_once() {
    let mut server = Server::start().await;
    for (path, sent, reason) in [
        ("/truncated/100-999999", 299_900, "file_short"),
        ("/fails/0-999999", 100_000, "remote"),
        ("/too-long/0-999999", 0, "wrong_chunk"),
    ] {
        let mut client = server.connect().await;
        client.send(path).await;
        client.send("/ping").await;
        // Where nothing was sent yet, the head may be lost as well.
        if sent > 0 {
            let head = client.head().await;
            let body = client.body(&head).await;
            assert!(
                body.len() < content_length(&head),
                "{path} ended as if it were whole"
            );
            assert!(body.len() <= sent, "{path} sent more than there was");
        }
        client.unread.clear();
        client.closed().await;

        let end = server.end().await;
        let abort = end.abort.expect("cut short");
        assert_eq!(abort.reason, reason, "{path}");
        assert_eq!(abort.error.is_some(), reason != "file_short");
        assert!(end.from_files <= sent as u64);
        assert!(server.ends.try_recv().is_err(), "observed twice");
    }
}

/// P10: the client of a file that fails while it is sent sees nothing of it, nor do those behind it in the
/// pipeline.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_fails_while_it_is_sent_is_replaced_within_the_response() {
    let mut server = Server::start().await;
    for (kind, ways) in [
        ("again-small", vec![Way::Again]),
        ("again-mixed", vec![Way::Again]),
        ("again-short", vec![Way::Again, Way::PastDisk]),
    ] {
        // The middle one is rescued in the second of its parts; both bodies around it are not.
        let paths = [
            "/small/0-99999".to_owned(),
            format!("/{kind}/299999-1500000,0-9,299000-300100"),
            format!("/{kind}/100-300000"),
            "/mixed/5-123456".to_owned(),
        ];
        let mut client = server.connect().await;
        for path in &paths {
            client.send(path).await;
        }
        let mut wanted = Vec::new();
        for path in &paths {
            let ranges = path.rsplit_once('/').unwrap().1;
            let body = server.body(ranges);
            assert_same(&client.response().await, &body);
            let end = server.end().await;
            assert!(end.abort.is_none(), "{path}: {:?}", end.abort);
            assert_eq!(end.promised, body.len() as u64);
            assert_eq!(end.from_files + end.from_memory, end.promised, "{path}");
            let failures = match path.split(',').count() {
                3 => 2,
                _ => u64::from(path.starts_with(&format!("/{kind}/"))),
            };
            assert_eq!(end.rescues, failures * ways.len() as u64, "{path}");
            for _ in 0..failures {
                wanted.extend(ways.iter().copied());
            }
        }
        let mut seen = Vec::new();
        while let Ok(way) = server.ways.try_recv() {
            seen.push(way);
        }
        assert_eq!(seen, wanted, "{kind}");
        assert_eq!(
            client.get("/ping").await,
            b"pong",
            "the connection is sound"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_waits_holds_the_pipeline_and_one_that_fails_cuts_it() {
    let mut server = Server::start().await;
    let mut client = server.connect().await;
    client.send("/again-gated/0-999999").await;
    client.send("/ping").await;
    let head = client.head().await;
    while client.unread.len() < 300_000 {
        within(client.tcp.read_buf(&mut client.unread))
            .await
            .unwrap();
    }
    assert_eq!(within(server.ways.recv()).await, Some(Way::Again));
    assert_eq!(client.unread.len(), 300_000, "nothing overtakes it");
    server.gate.send_replace(true);
    assert_same(&client.body(&head).await, &server.body("0-999999"));
    assert_eq!(client.response().await, b"pong");
    assert_eq!(server.end().await.rescues, 1);

    for (path, most, reason, error) in [
        ("/again-fails/0-999999", 400_000, "remote", true),
        ("/neither/0-999999", 300_000, "file_short", false),
    ] {
        let mut client = server.connect().await;
        client.send(path).await;
        client.send("/ping").await;
        let head = client.head().await;
        let body = client.body(&head).await;
        assert!(body.len() <= most, "{path}: {}", body.len());
        assert_same(&body, &server.body("0-999999")[..body.len()]);
        client.unread.clear();
        client.closed().await;
        let abort = server.end().await.abort.expect("cut short");
        assert_eq!((abort.reason, abort.error.is_some()), (reason, error));
    }
}

/// A disk whose reads do not end before the test does.
struct HangingDisk(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

impl Pages for HangingDisk {
    fn is_resident(&self, extent: &FileExtent, _: u64) -> bool {
        extent.offset() < 2 << 20
    }

    fn copy_resident(&self, _: &FileExtent, _: &mut [u8]) -> bool {
        false
    }

    fn read(&self, _: &FileExtent, _: u64) {
        // Ends with an error once the sender is gone.
        let _ = self.0.lock().unwrap().recv();
    }
}

/// P10: more clients than there are places for loads, and none waits for the disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_is_passed_by_within_the_response() {
    let (release, hang) = std::sync::mpsc::channel();
    let disk = HangingDisk(std::sync::Mutex::new(hang));
    let page_in = PageIn::over(disk, Duration::from_millis(50)).unwrap();
    let mut server = Server::over(page_in.clone(), |_| ()).await;
    let range = "1000000-5000000";
    let mut clients = Vec::new();
    for _ in 0..40 {
        let mut client = server.connect().await;
        client.send(&format!("/hanging/{range}")).await;
        client.send("/ping").await;
        clients.push(client);
    }
    for mut client in clients {
        assert_same(&client.response().await, &server.body(range));
        assert_eq!(client.response().await, b"pong");
    }
    for _ in 0..40 {
        let end = server.end().await;
        assert!(end.abort.is_none(), "{:?}", end.abort);
        assert_eq!(end.rescues, 1);
        assert_eq!(end.from_files + end.from_memory, end.promised);
        assert!(end.from_files > 0 && end.from_memory > 0, "{end:?}");
    }
    assert!(page_in.loads() <= 32, "a dead disk takes no more threads");
    drop(release);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_cut_at_the_progress_timeout() {
    let progress = Duration::from_millis(300);
    let mut server = Server::with(|limits| limits.timeouts.progress = progress).await;
    let mut client = server.connect().await;
    let started = Instant::now();
    client.send("/whole/0-99999999").await;
    let head = client.head().await;
    let end = server.end().await;
    assert_eq!(end.abort.unwrap().reason, "client_stalled");
    assert!(started.elapsed() >= progress);
    // A reset: what it did not take is not kept for it.
    let error = loop {
        match within(client.tcp.read_buf(&mut client.unread)).await {
            Ok(0) => panic!("an end, as if that were all"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let body = client.unread;
    assert!(body.len() < content_length(&head));
    assert_same(&body, &server.content[..body.len()]);
}

/// One of few connections, so that the kernel can send on without us for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_found_full_may_hold_more() {
    let mut server =
        Server::with(|limits| limits.timeouts.progress = Duration::from_millis(300)).await;
    let mut client = server.connect_narrow().await;
    client.send("/whole/0-99999999").await;
    client.head().await;
    let end = server.end().await;
    assert_eq!(end.abort.unwrap().reason, "client_stalled");
    // Its window is some KiB.
    assert!(end.from_files > 3 << 19, "{} bytes", end.from_files);
    assert!(end.from_files < 5 << 20, "{} bytes", end.from_files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_a_little_now_and_then_is_cut_as_well() {
    let mut server = Server::with(|limits| {
        limits.timeouts.progress = Duration::from_secs(1);
        limits.timeouts.min_rate = 1 << 30;
    })
    .await;
    let mut slow = server.connect_narrow().await;
    slow.send("/whole/0-99999999").await;
    let reader = tokio::spawn(async move {
        let mut buf = vec![0; 32 << 10];
        // A thousandth of the rate, and never for long without a byte. Ends when it is cut.
        while slow.tcp.read(&mut buf).await.is_ok_and(|read| read > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let end = server.end().await;
    assert_eq!(end.abort.unwrap().reason, "client_stalled");
    within(reader).await.unwrap();
}

/// Its window and the socket's buffer hold megabytes, so that few steps of its progress show.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_but_steady_reader_is_not_taken_for_stalled() {
    let mut server = Server::with(|limits| limits.timeouts.progress = Duration::from_secs(2)).await;
    let mut client = server.connect().await;
    client.send("/whole/0-99999999").await;
    let mut buf = vec![0; 16 << 10];
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        within(client.tcp.read_exact(&mut buf)).await.unwrap();
        // A quarter of a MB a second is the test.
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert!(
        server.ends.try_recv().is_err(),
        "cut, or too fast to be tested"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_observed_with_what_it_took() {
    let mut server = Server::start().await;
    let mut client = server.connect().await;
    client.send("/whole/0-99999999").await;
    client.head().await;
    drop(client);
    let end = server.end().await;
    assert_eq!(end.abort.as_ref().unwrap().reason, "client_gone");
    assert!(end.from_files < end.promised, "{end:?}");
}

// === connections ===

#[tokio::test(flavor = "multi_thread")]
async fn a_half_closing_client_gets_its_answer() {
    let server = Server::start().await;
    let mut client = server.connect().await;
    client.send("/mixed/0-5000000").await;
    client.tcp.shutdown().await.unwrap();
    assert_same(&client.response().await, &server.body("0-5000000"));
    client.closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_still_sends_does_not_tear_its_answer_away() {
    let mut server = Server::start().await;
    // So that the end of the answer waits in the server's socket when the server is done with it.
    let mut client = server.connect_narrow().await;
    let head = "GET /whole/0-199999 HTTP/1.1\r\nHost: test\r\nContent-Length: 300000\r\n\r\n";
    let request = [head.as_bytes(), &vec![b'x'; 50_000]].concat();
    client.tcp.write_all(&request).await.unwrap();
    assert!(server.end().await.abort.is_none());
    client.tcp.write_all(&vec![b'x'; 100_000]).await.unwrap();
    assert_same(&client.response().await, &server.body("0-199999"));
    drop(client);

    // More than was announced, behind the last request.
    let mut client = server.connect_narrow().await;
    let last = "GET /whole/0-199999 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    client.tcp.write_all(last.as_bytes()).await.unwrap();
    assert!(server.end().await.abort.is_none());
    // The connection is about to be closed, or is.
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.tcp.write_all(last.as_bytes()).await.unwrap();
    assert_same(&client.response().await, &server.body("0-199999"));
    drop(client);

    // An answer of hyper's own.
    let mut client = server.connect().await;
    let head = format!("GET /ping HTTP/1.1\r\nX: {}", "x".repeat(200_000));
    client.tcp.write_all(head.as_bytes()).await.unwrap();
    assert!(client.head().await.starts_with("HTTP/1.1 431 "));
    client.closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_parse_are_answered_and_large_heads_refused() {
    let server = Server::start().await;
    let long = format!(
        "GET /ping HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n",
        "x".repeat(20_000)
    );
    for (request, status) in [("GET /ping\r\n\r\n", "400"), (&long, "431")] {
        let mut client = server.connect().await;
        client.tcp.write_all(request.as_bytes()).await.unwrap();
        let head = client.head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_is_cut_however_it_drips() {
    let header = Duration::from_millis(300);
    let server = Server::with(|limits| limits.timeouts.header = header).await;
    let client = server.connect().await;
    let (mut read, mut write) = client.tcp.into_split();
    let started = Instant::now();
    let drip = tokio::spawn(async move {
        let head = format!("GET /ping HTTP/1.1\r\nHost: test\r\nX: {}", "x".repeat(400));
        for byte in head.into_bytes() {
            // Dripping is the test. Fails once the server has closed.
            if write.write_all(&[byte]).await.is_err() {
                return "cut";
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        "waited for to its last byte"
    });
    let mut answer = Vec::new();
    // Closed with unread bytes, which the client may see as a reset.
    let _ = within(read.read_to_end(&mut answer)).await;
    assert!(answer.is_empty());
    assert!(started.elapsed() >= header);
    assert_eq!(within(drip).await.unwrap(), "cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_closed_but_a_slow_answer_is_waited_for() {
    let idle = Duration::from_millis(200);
    let server = Server::with(|limits| {
        limits.timeouts.idle = idle;
        limits.timeouts.header = idle;
    })
    .await;
    server.connect().await.closed().await;

    let mut client = server.connect().await;
    client.send("/gated/0-5000").await;
    // Longer than both: neither is the client's to keep while it is we who owe an answer.
    tokio::time::sleep(idle * 3).await;
    // Before the end of the answer, so that it is no later than the beginning of the server's wait.
    let answering = Instant::now();
    server.gate.send(true).unwrap();
    assert_same(&client.response().await, &server.body("0-5000"));
    client.closed().await;
    assert!(answering.elapsed() >= idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_limit_a_connection_waits_for_a_free_place() {
    let server = Server::with(|limits| limits.max_connections = 1).await;
    let mut first = server.connect().await;
    assert_eq!(first.get("/ping").await, b"pong");
    let mut second = server.connect().await;
    second.send("/ping").await;
    let early = tokio::time::timeout(Duration::from_millis(200), second.tcp.readable()).await;
    assert!(early.is_err(), "served beyond the limit");
    drop(first);
    assert_eq!(second.response().await, b"pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_places_run_out_idle_connections_make_room_and_busy_ones_do_not() {
    let server = Server::with(|limits| {
        limits.max_connections = 3;
        // Who is closed is closed for want of a place.
        limits.timeouts.idle = PATIENT * 10;
        limits.timeouts.header = PATIENT * 10;
    })
    .await;
    let mut known = server.connect().await;
    assert_eq!(known.get("/ping").await, b"pong");
    let mut silent = server.connect().await;
    let mut dripping = server.connect().await;
    dripping.tcp.write_all(b"GET /pi").await.unwrap();

    // So long that each of them may have to go.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    // Those go first who never asked for anything, the longest silent one before the others.
    let mut busy = Vec::new();
    for leaves in [&mut silent, &mut dripping, &mut known] {
        let mut client = server.connect().await;
        client.send("/gated/0-5000").await;
        leaves.closed().await;
        client.head().await;
        busy.push(client);
    }

    let mut late = server.connect().await;
    late.send("/ping").await;
    // Longer than an idle connection would have been spared.
    let early = tokio::time::timeout(Duration::from_millis(1500), late.tcp.readable()).await;
    assert!(early.is_err(), "served beyond the limit");
    server.gate.send(true).unwrap();
    for client in &mut busy {
        let body = within(client.tcp.read_buf(&mut client.unread)).await;
        assert!(body.unwrap() > 0, "a busy connection was closed");
    }
    assert_eq!(late.response().await, b"pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_closes_idle_connections_and_finishes_running_bodies() {
    let server = Server::start().await;
    let mut idle = server.connect().await;
    assert_eq!(idle.get("/ping").await, b"pong");
    let mut running = server.connect().await;
    running.send("/gated/0-5000000").await;
    let head = running.head().await;

    server.ending.close_idle();
    idle.closed().await;
    // The listener goes at the same time.
    let refused = async {
        while !TcpStream::connect(server.addr)
            .await
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {}
    };
    within(refused).await;

    server.gate.send(true).unwrap();
    assert_same(&running.body(&head).await, &server.body("0-5000000"));
    running.closed().await;
    let report = within(server.running).await.unwrap();
    assert_eq!(
        report,
        DrainReport {
            finished: 2,
            cut: 0
        }
    );
}

/// It was accepted, and waits for a place when the others are asked to leave.
#[tokio::test(flavor = "multi_thread")]
async fn who_comes_as_connections_are_closed_is_closed_like_them() {
    let server = Server::with(|limits| limits.max_connections = 1).await;
    let mut running = server.connect().await;
    running.send("/gated/0-5000000").await;
    let head = running.head().await;
    let mut late = server.connect().await;
    within(server.crowded.notified()).await;

    server.ending.close_idle();
    late.closed().await;
    server.gate.send(true).unwrap();
    assert_same(&running.body(&head).await, &server.body("0-5000000"));
    running.closed().await;
    let report = within(server.running).await.unwrap();
    assert_eq!(report.cut, 0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_cuts_what_does_not_end_in_time() {
    let mut server = Server::start().await;
    let mut running = server.connect().await;
    running.send("/gated/0-5000000").await;
    let head = running.head().await;
    server.ending.close_idle();
    let end = server.end().await;
    assert_eq!(end.abort.unwrap().reason, "drained");
    assert!(running.body(&head).await.is_empty());
    let report = within(server.running).await.unwrap();
    assert_eq!(
        report,
        DrainReport {
            finished: 0,
            cut: 1
        }
    );
}

/// In a process of its own, since the limit is the process's.
#[test]
fn running_out_of_descriptors_is_survived() {
    const CHILD: &str = "PINRANGE_TEST_FEW_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "running_out_of_descriptors_is_survived"])
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let server = Server::start().await;
        let mut first = server.connect().await;
        assert_eq!(first.get("/ping").await, b"pong");
        let mut waiting = server.connect_unaccepted_with_no_descriptors_left().await;
        waiting.send("/ping").await;
        let early = tokio::time::timeout(Duration::from_millis(100), waiting.tcp.readable()).await;
        assert!(early.is_err(), "accepted without a descriptor");
        // Connections that are open go on being served meanwhile, until one is idle for long enough to
        // leave its descriptor to who waits.
        assert_eq!(first.get("/ping").await, b"pong");
        assert_eq!(waiting.response().await, b"pong");
        first.closed().await;
        let failures = server.accept_failures.load(Ordering::Relaxed);
        assert!(
            (1..100).contains(&failures),
            "{failures}: counted, and no spin"
        );
    });
}

impl Server {
    /// Lowers the limit so that the client's socket is the last descriptor there is.
    async fn connect_unaccepted_with_no_descriptors_left(&self) -> Client {
        let next = std::os::fd::AsRawFd::as_raw_fd(&tempfile::tempfile().unwrap());
        let current = Some(u64::try_from(next).unwrap() + 1);
        let limit = rustix::process::Rlimit {
            current,
            maximum: Some(1024),
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        self.connect().await
    }
}
