//! Restarts that nobody notices: a hundred of them lose no request.
//!
//! Clients here are strict: they repeat nothing, and take every end of a connection that was not announced, every refusal
//! and every wrong byte for a failure. `PINRANGE_RESTARTS=100 cargo test --test restart under_load` is the long way.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::fs;
use std::io::{self, BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use serde_json::{Value, json};

use support::http::{self, Answer, Random};
use support::process::{PATIENCE, Serving, pinrange, run, serve};

const MIB: usize = 1 << 20;

/// How often a test restarts. More by hand.
fn restarts() -> usize {
    std::env::var("PINRANGE_RESTARTS").map_or(8, |count| count.parse().unwrap())
}

/// An address that nobody listens on, as far as one can know: who takes over has to name the port.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

struct World {
    s3: StrictS3,
    dir: tempfile::TempDir,
    data: SocketAddr,
    admin: SocketAddr,
}

impl World {
    async fn new() -> Self {
        Self {
            s3: StrictS3::start(Options::memory(["bucket"])).await.unwrap(),
            dir: tempfile::tempdir().unwrap(),
            data: free_address(),
            admin: free_address(),
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        self.s3
            .put("bucket", key, bytes.to_vec(), PutOptions::default())
            .unwrap();
    }

    /// Every process that is started so is the same replica.
    fn command(&self) -> Command {
        let mut command = serve(&self.s3.endpoint(), self.dir.path());
        command
            .env("PINRANGE_SERVER__LISTEN", self.data.to_string())
            .env("PINRANGE_SERVER__ADMIN", self.admin.to_string())
            .env("PINRANGE_CACHE__PART_SIZE", "1MiB")
            .env("PINRANGE_SERVER__WORKER_THREADS", "2");
        command
    }

    fn start(&self) -> Serving {
        Serving::start(&mut self.command())
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("cache/handover.sock")
    }

    /// A metric of whoever answers on the admin listener.
    fn metric(&self, name: &str) -> String {
        let answer = http::get(self.admin, "/metrics", "");
        let text = String::from_utf8(answer.body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .trim()
            .to_owned()
    }

    fn handovers_failed(&self) -> usize {
        self.metric("pinrange_handovers_failed_total ")
            .parse()
            .unwrap()
    }
}

// === load ===

#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    connections: AtomicU64,
    bytes: AtomicU64,
}

/// Clients that ask for ranges until they are told to stop, or until something is wrong.
struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

/// A key, its pin and its bytes.
type Object = (String, String, Vec<u8>);

impl Load {
    fn start(data: SocketAddr, objects: &Arc<Vec<Object>>) -> Self {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let clients = (0..6)
            .map(|number| {
                let (stop, tally, objects) =
                    (Arc::clone(&stop), Arc::clone(&tally), Arc::clone(objects));
                std::thread::spawn(move || {
                    let mut client = Client {
                        data,
                        random: Random(number),
                        stream: None,
                        tally,
                    };
                    while !stop.load(Ordering::Relaxed) {
                        // Half of them keep their connections, and think before they use them again.
                        if number % 2 == 0 {
                            client.stream = None;
                        } else {
                            let pause = client.random.below(20) as u64;
                            std::thread::sleep(Duration::from_millis(pause));
                        }
                        client.ask(&objects)?;
                    }
                    Ok(())
                })
            })
            .collect();
        Self {
            stop,
            tally,
            clients,
        }
    }

    fn requests(&self) -> u64 {
        self.tally.requests.load(Ordering::Relaxed)
    }

    /// Waits until so many requests more were answered, or one was not.
    fn go_on(&self, requests: u64) {
        let (until, began) = (self.requests() + requests, Instant::now());
        while self.requests() < until && self.clients.iter().all(|client| !client.is_finished()) {
            assert!(began.elapsed() < PATIENCE, "no answers");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn finish(self, how: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let failed: Vec<_> = self
            .clients
            .into_iter()
            .filter_map(|client| client.join().unwrap().err())
            .collect();
        let Tally {
            requests,
            connections,
            bytes,
        } = &*self.tally;
        eprintln!(
            "{how}: {requests:?} requests on {connections:?} connections, {bytes:?} bytes verified, {} failed",
            failed.len()
        );
        assert!(failed.is_empty(), "{failed:#?}");
        assert!(requests.load(Ordering::Relaxed) > 100);
    }
}

/// A client that asks for the same again and again, as most of a download in pieces is asked for, and rests between two
/// requests until another process has taken over.
struct Resting {
    rests: mpsc::Receiver<()>,
    /// Dropped: it ends.
    taken_over: mpsc::Sender<()>,
    client: JoinHandle<Result<(), String>>,
}

impl Resting {
    fn start(data: SocketAddr, objects: &Arc<Vec<Object>>) -> Self {
        let (rest, rests) = mpsc::channel();
        let (taken_over, go_on) = mpsc::channel();
        let objects = Arc::clone(objects);
        let client = std::thread::spawn(move || {
            let mut client = Client {
                data,
                random: Random(0),
                stream: None,
                tally: Arc::default(),
            };
            loop {
                for turn in 0..4 {
                    client.ask_for(&objects[0], 1000 * turn, 1000 * turn + 499)?;
                }
                if rest.send(()).is_err() || go_on.recv().is_err() {
                    return Ok(());
                }
                client.ask_for(&objects[0], 0, 499)?;
                if client.stream.is_some() {
                    return Err("a connection was not told that it ends".to_owned());
                }
            }
        });
        Self {
            rests,
            taken_over,
            client,
        }
    }

    /// Waits until it rests.
    fn rests(&self) {
        // One that has failed says why when it is joined.
        let _failed = self.rests.recv_timeout(PATIENCE);
    }

    fn finish(self) {
        drop(self.taken_over);
        self.client.join().unwrap().unwrap();
    }
}

struct Client {
    data: SocketAddr,
    random: Random,
    stream: Option<BufReader<TcpStream>>,
    tally: Arc<Tally>,
}

impl Client {
    fn ask(&mut self, objects: &[Object]) -> Result<(), String> {
        let object = self.random.one_of(objects);
        let first = self.random.below(object.2.len());
        let last = (first + self.random.below(MIB / 2)).min(object.2.len() - 1);
        self.ask_for(object, first, last)
    }

    fn ask_for(&mut self, object: &Object, first: usize, last: usize) -> Result<(), String> {
        let (key, pin, bytes) = object;
        let wait = if self.stream.is_some() { "kept" } else { "new" };
        let failed = |what: &dyn std::fmt::Display| {
            format!("{key} {first}-{last} on a {wait} connection: {what}")
        };
        let mut stream = if let Some(stream) = self.stream.take() {
            stream
        } else {
            let stream = TcpStream::connect(self.data).map_err(|error| failed(&error))?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
            self.tally.connections.fetch_add(1, Ordering::Relaxed);
            BufReader::new(stream)
        };
        let request = format!(
            "GET /m/{key} HTTP/1.1\r\nHost: test\r\nIf-Match: {pin}\r\nRange: bytes={first}-{last}\r\n\r\n"
        );
        stream
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|error| failed(&error))?;
        let answer = http::read(&mut stream, false)
            .map_err(|error| failed(&error))?
            .ok_or_else(|| failed(&"closed before an answer"))?;
        if answer.status != 206 {
            return Err(failed(&format_args!("{answer:?}")));
        }
        if answer.body != bytes[first..=last] {
            return Err(failed(&"wrong bytes"));
        }
        if answer.field("connection") != "close" {
            self.stream = Some(stream);
        }
        self.tally.requests.fetch_add(1, Ordering::Relaxed);
        let len = answer.body.len() as u64;
        self.tally.bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

/// Objects of which half fit into the cache of [`crowded`]: it fills and evicts all the time.
fn objects(world: &World) -> Arc<Vec<Object>> {
    let objects = (0..4).map(|number| {
        let (key, bytes) = (format!("object-{number}"), Random(number).bytes(4 * MIB));
        world.put(&key, &bytes);
        (key, bytes)
    });
    let objects: Vec<_> = objects.collect();
    let serving = world.start();
    let pinned = objects.into_iter().map(|(key, bytes)| {
        let answer = http::ask(
            serving.data,
            format!("HEAD /m/{key} HTTP/1.1\r\nHost: test\r\n\r\n"),
        );
        (key, answer.field("etag").to_owned(), bytes)
    });
    let pinned = Arc::new(pinned.collect());
    assert_eq!(serving.stop().code(), Some(0));
    pinned
}

fn crowded(command: &mut Command) -> &mut Command {
    command.env("PINRANGE_CACHE__CAPACITY", "8MiB")
}

/// A whole object, read slowly over several restarts.
fn slow_download(data: SocketAddr, object: &Object) -> JoinHandle<()> {
    let (key, _, bytes) = object.clone();
    let mut stream = http::connect(data);
    std::thread::spawn(move || {
        write!(stream, "GET /m/{key} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        let mut stream = BufReader::with_capacity(64 << 10, stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).unwrap();
        }
        let mut got = vec![0; bytes.len()];
        for stretch in got.chunks_mut(32 << 10) {
            stream.read_exact(stretch).unwrap();
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(got == bytes, "wrong bytes");
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_under_load_fails_no_request() {
    let world = World::new().await;
    let objects = objects(&world);
    let mut now = Serving::start(crowded(&mut world.command()));
    let load = Load::start(world.data, &objects);
    let resting = Resting::start(world.data, &objects);
    let mut repeated = 0;
    let mut left = Vec::new();
    let mut slow = Vec::new();
    let mut longest: f64 = 0.0;
    for turn in 0..restarts() {
        load.go_on(40);
        if turn % 4 == 0 {
            slow.push(slow_download(world.data, &objects[turn % objects.len()]));
        }
        resting.rests();
        let repeats = world.metric("pinrange_repeated_requests_total ");
        repeated += repeats.parse::<u64>().unwrap();
        let next = Serving::start(crowded(&mut world.command()));
        // It may be gone, which `finish` tells.
        let _gone = resting.taken_over.send(());
        let gap = world.metric("pinrange_takeover_without_writer_seconds ");
        longest = longest.max(gap.parse().unwrap());
        left.push(std::mem::replace(&mut now, next));
    }
    load.go_on(40);
    load.finish("hand-over");
    resting.finish();
    assert!(repeated > 0, "no request was repeated before a hand-over");
    eprintln!("longest time without a writer: {longest} s");
    for slow in slow {
        slow.join().unwrap();
    }
    for mut old in left {
        // By itself, and before the drain timeout: nothing is left to it.
        let status = old.process.wait();
        let log = old.process.stderr();
        assert_eq!(status.code(), Some(0), "{log}");
        for wrong in [" ERROR ", "not closed in order", "did not end orderly"] {
            assert!(!log.contains(wrong), "{log}");
        }
    }
    assert_eq!(world.handovers_failed(), 0);
    assert_eq!(now.stop().code(), Some(0));
}

/// What systemd does with a socket unit: the test holds the listening socket, and one process after the other gets it
/// as its third descriptor.
fn activated(command: &mut Command, socket: &TcpListener, name: &str) -> Serving {
    let mut shell = Command::new("sh");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let socket = OwnedFd::from(socket.try_clone().unwrap());
    let script = r#"LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" serve 3<&0 </dev/null"#;
    shell
        .args(["-c", script])
        .arg(command.get_program())
        .env("LISTEN_FDNAMES", name)
        .stdin(Stdio::from(socket));
    Serving::start(&mut shell)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_an_inherited_socket_under_load_fails_no_request() {
    let world = World::new().await;
    let objects = objects(&world);
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let data = socket.local_addr().unwrap();
    let mut command = world.command();
    // Long enough for every client to hear that its connection ends.
    crowded(&mut command).env("PINRANGE_SERVER__DRAIN_GRACE", "300ms");
    let mut now = activated(&mut command, &socket, "data");
    assert_eq!(now.data, data);
    let load = Load::start(data, &objects);
    for _ in 0..restarts() {
        load.go_on(40);
        let log = now.process.stderr();
        assert_eq!(now.stop().code(), Some(0), "{log}");
        now = activated(&mut command, &socket, "data");
    }
    load.go_on(40);
    load.finish("stop and start");
    assert_eq!(now.stop().code(), Some(0));
}

// === one side of the conversation, played by the test ===

fn say(stream: &mut UnixStream, message: &Value) {
    stream.write_all(format!("{message}\n").as_bytes()).unwrap();
}

/// Descriptors that come with it are closed.
fn hear(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    assert!(stream.read_line(&mut line).unwrap() > 0, "hung up");
    serde_json::from_str(&line).unwrap()
}

struct Peer(BufReader<UnixStream>);

impl Peer {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, message: &Value) {
        say(self.0.get_mut(), message);
    }

    fn hear(&mut self) -> Value {
        hear(&mut self.0)
    }

    /// `None`: it hung up.
    fn hears_nothing(&mut self) -> bool {
        self.0.read_line(&mut String::new()).unwrap_or(0) == 0
    }

    fn hello(&mut self, world: &World, version: u64) -> Value {
        let addresses = json!({"data": world.data, "admin": world.admin});
        self.say(&json!({"hello": {"version": version, "addresses": addresses}}));
        self.hear()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_dies_on_its_way_is_not_missed() {
    let world = World::new().await;
    world.put("held", b"held bytes");
    world.put("new", b"new bytes");
    let serving = world.start();
    let held = http::get(world.data, "/m/held", "");
    let pin = format!("If-Match: {}\r\n", held.field("etag"));

    // Before it asked for anything.
    let mut peer = Peer::new(UnixStream::connect(world.socket()).unwrap());
    assert_eq!(peer.hello(&world, 1), "listeners");
    drop(peer);
    serving.process.wait_for("went away");
    assert_eq!(world.handovers_failed(), 0);

    let mut peer = Peer::new(UnixStream::connect(world.socket()).unwrap());
    assert_eq!(peer.hello(&world, 1), "listeners");
    peer.say(&json!("release"));
    assert_eq!(peer.hear(), "released");
    // Nobody writes, and yet what is held is known, to the catalog: with S3 down, and the rest without being stored.
    world.s3.stop_accepting().await;
    let answer = http::get(world.data, "/m/held", &pin);
    assert_eq!((answer.status, &answer.body[..]), (200, &b"held bytes"[..]));
    world.s3.resume().await.unwrap();
    for _ in 0..2 {
        let answer = http::get(world.data, "/m/new", "");
        assert_eq!((answer.status, &answer.body[..]), (200, &b"new bytes"[..]));
        let status = answer.field("cache-status");
        assert!(!status.contains("stored"), "{status}");
    }
    // A purge has nobody to do it.
    let purge =
        "POST /purge HTTP/1.1\r\nHost: test\r\nContent-Length: 19\r\n\r\n{\"path\": \"/m/held\"}";
    assert_eq!(http::ask(world.admin, purge).status, 500);
    drop(peer);
    serving.process.wait_for("is written again");
    assert_eq!(world.handovers_failed(), 1);
    let answer = http::get(world.data, "/m/new", "");
    let pin_new = format!("If-Match: {}\r\n", answer.field("etag"));
    let purged = http::ask(world.admin, purge);
    assert_eq!(purged.status, 200);
    assert!(purged.body.starts_with(b"{\"bytes\":4096"), "{purged:?}");
    assert_eq!(serving.stop().code(), Some(0));

    // What was fetched after that was stored, durably, and the purge too.
    let serving = world.start();
    world.s3.stop_accepting().await;
    let answer = http::get(world.data, "/m/new", &pin_new);
    assert_eq!((answer.status, &answer.body[..]), (200, &b"new bytes"[..]));
    assert_eq!(http::get(world.data, "/m/held", &pin).status, 503);
    let log = serving.process.stderr();
    assert!(!log.contains("did not end orderly"), "{log}");
}

/// At every step before the last, one of them with the directory's lock, which outlives its connection.
#[tokio::test(flavor = "multi_thread")]
async fn successors_that_die_under_load_cost_no_request() {
    let world = World::new().await;
    let objects = objects(&world);
    let serving = Serving::start(crowded(&mut world.command()));
    let load = Load::start(world.data, &objects);
    let mut failed = 0;
    for turn in 0..restarts() {
        load.go_on(20);
        let mut peer = Peer::new(UnixStream::connect(world.socket()).unwrap());
        assert_eq!(peer.hello(&world, 1), "listeners");
        if turn % 3 == 0 {
            continue;
        }
        failed += 1;
        peer.say(&json!("release"));
        assert_eq!(peer.hear(), "released");
        let lock = fs::File::open(world.dir.path().join("cache/lock")).unwrap();
        if turn % 3 == 1 {
            let exclusively = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            rustix::fs::flock(&lock, exclusively).unwrap();
        }
        load.go_on(20);
        drop(peer);
        load.go_on(10);
        drop(lock);
        while world.handovers_failed() < failed {}
        assert!(load.clients.iter().all(|client| !client.is_finished()));
    }
    load.go_on(20);
    load.finish("successors that died");
    // Whoever is in charge can still be replaced.
    let next = Serving::start(crowded(&mut world.command()));
    serving.process.wait_for("handed over");
    let log = serving.process.stderr();
    for wrong in [
        " ERROR pinrange::disk",
        "did not end orderly",
        "not closed in order",
    ] {
        assert!(!log.contains(wrong), "{log}");
    }
    assert_eq!(next.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_fit_is_refused_and_says_why() {
    let world = World::new().await;
    let serving = world.start();
    let pid = serving.process.pid();

    // Another version of this program.
    let mut peer = Peer::new(UnixStream::connect(world.socket()).unwrap());
    let reason = peer.hello(&world, 2)["refused"]["reason"].clone();
    assert_eq!(reason, "it speaks version 1 of the hand-over, and not 2");
    assert!(peer.hears_nothing());
    // Noise.
    let mut peer = Peer::new(UnixStream::connect(world.socket()).unwrap());
    peer.say(&json!(["GET / HTTP/1.1"]));
    assert!(peer.hears_nothing());

    // Another replica, which has the directory by mistake.
    let mut command = world.command();
    let output = run(command.env("PINRANGE_SERVER__LISTEN", free_address().to_string()));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(75), "{text}");
    for word in [
        &format!("pid {pid}"),
        "and not on",
        &world.data.to_string(),
        "a directory of its own",
    ] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    assert_eq!(http::get(world.admin, "/readyz", "").status, 200);
    drop(serving);

    // The other way round: what runs there is of another version.
    fs::remove_file(world.socket()).unwrap();
    let predecessor = UnixListener::bind(world.socket()).unwrap();
    let refusing = std::thread::spawn(move || {
        let mut peer = Peer::new(predecessor.accept().unwrap().0);
        assert_eq!(peer.hear()["hello"]["version"], 1);
        peer.say(&json!({"refused": {"reason": "too old", "since": 2}}));
    });
    let output = run(&mut world.command());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(75), "{text}");
    assert!(text.contains("too old; stop it"), "{text}");
    refusing.join().unwrap();
}

/// A predecessor that passes two listeners and then does as `end` says.
fn predecessor(
    world: &World,
    end: impl FnOnce(Peer) + Send + 'static,
) -> (JoinHandle<()>, [TcpListener; 2]) {
    fs::create_dir_all(world.dir.path().join("cache")).unwrap();
    // What another one left there is nobody's.
    let _ = fs::remove_file(world.socket());
    let socket = UnixListener::bind(world.socket()).unwrap();
    let listeners = [world.data, world.admin].map(|address| TcpListener::bind(address).unwrap());
    let passed = [0, 1].map(|which: usize| listeners[which].try_clone().unwrap());
    let thread = std::thread::spawn(move || {
        let mut peer = Peer::new(socket.accept().unwrap().0);
        assert_eq!(peer.hear()["hello"]["version"], 1);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [passed[0].as_fd(), passed[1].as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let line = [IoSlice::new(b"\"listeners\"\n")];
        sendmsg(peer.0.get_ref(), &line, &mut control, SendFlags::empty()).unwrap();
        assert_eq!(peer.hear(), "release");
        end(peer);
    });
    (thread, listeners)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predecessor_that_dies_is_succeeded_all_the_same() {
    let world = World::new().await;
    world.put("object", b"bytes");
    // Before it released, and after.
    let ends: [fn(Peer); 2] = [
        |peer| drop(peer),
        |mut peer| {
            peer.say(&json!("released"));
            assert_eq!(peer.hear(), "ready");
        },
    ];
    for end in ends {
        let (thread, listeners) = predecessor(&world, end);
        let serving = world.start();
        thread.join().unwrap();
        drop(listeners);
        // On the sockets that were passed: nobody else has them now.
        assert_eq!((serving.data, serving.admin), (world.data, world.admin));
        assert_eq!(http::get(world.data, "/m/object", "").status, 200);
        assert_eq!(serving.stop().code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_took_too_long_gives_up() {
    let world = World::new().await;
    let (thread, listeners) = predecessor(&world, |mut peer| {
        peer.say(&json!("released"));
        assert_eq!(peer.hear(), "ready");
        peer.say(&json!("withdrawn"));
        assert!(peer.hears_nothing(), "it did not give up");
    });
    let output = run(&mut world.command());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(75), &b""[..]),
        "{text}"
    );
    assert!(text.contains("it took too long"), "{text}");
    thread.join().unwrap();
    // It left the directory in order.
    drop(listeners);
    let log = world.start().process.stderr();
    assert!(!log.contains("did not end orderly"), "{log}");
}

// === what the one that leaves does ===

fn exchange(stream: &mut BufReader<TcpStream>, key: &str, fields: &str) -> io::Result<Answer> {
    write!(
        stream.get_mut(),
        "GET /m/{key} HTTP/1.1\r\nHost: test\r\n{fields}\r\n"
    )?;
    http::read(stream, false)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Names of the files below `dir` that a process could write to, but for the catalog's: SQLite keeps descriptors of closed
/// connections for as long as another one of the process holds a lock on the file.
fn writable(pid: u32, dir: &Path) -> Vec<String> {
    let process = Path::new("/proc").join(pid.to_string());
    let mut names = Vec::new();
    for entry in fs::read_dir(process.join("fd")).unwrap() {
        let fd = entry.unwrap().file_name();
        // Closed meanwhile: not writable.
        let Ok(target) = fs::read_link(process.join("fd").join(&fd)) else {
            continue;
        };
        let info = fs::read_to_string(process.join("fdinfo").join(&fd)).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap_or("0").trim(), 8).unwrap();
        let name = target.to_string_lossy().into_owned();
        if target.starts_with(dir) && flags & 3 != 0 && !name.contains("catalog.sqlite") {
            names.push(name);
        }
    }
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn the_one_that_leaves_answers_once_more_reads_only_and_knows_of_a_purge() {
    let world = World::new().await;
    world.put("held", b"held bytes");
    world.put("purged", b"purged bytes");
    let mut old = world.start();
    let mut kept = [(); 3].map(|()| BufReader::new(http::connect(world.data)));
    let [first, second, third] = &mut kept;
    let held = exchange(first, "held", "").unwrap();
    let pin = format!("If-Match: {}\r\n", held.field("etag"));
    let purged = exchange(second, "purged", "").unwrap();
    let pin_purged = format!("If-Match: {}\r\n", purged.field("etag"));
    assert_eq!(held.field("connection"), "");

    let new = world.start();
    old.process.wait_for("handed over");
    // New connections are the successor's, and nothing says that the address is going away.
    assert_eq!(http::get(world.admin, "/readyz", "").status, 200);
    let purge =
        "POST /purge HTTP/1.1\r\nHost: test\r\nContent-Length: 21\r\n\r\n{\"path\": \"/m/purged\"}";
    assert_eq!(http::ask(world.admin, purge).status, 200);
    world.put("other", b"other bytes");
    assert!(!old.process.has_ended(), "it left its connections alone");
    assert_eq!(writable(old.process.pid(), world.dir.path()), [""; 0]);

    // From what the successor has on disk.
    world.s3.stop_accepting().await;
    let answer = exchange(first, "held", &pin).unwrap();
    assert_eq!((answer.status, &answer.body[..]), (200, &b"held bytes"[..]));
    assert_eq!(answer.field("connection"), "close");
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    assert_eq!(exchange(second, "purged", &pin_purged).unwrap().status, 503);
    world.s3.resume().await.unwrap();
    assert!(!old.process.has_ended(), "one connection is left");
    // Past the disk.
    let answer = exchange(third, "other", "").unwrap();
    assert_eq!(
        (answer.status, &answer.body[..]),
        (200, &b"other bytes"[..])
    );
    assert!(
        !answer.field("cache-status").contains("stored"),
        "{answer:?}"
    );
    assert_eq!(old.process.wait().code(), Some(0));
    assert!(
        !old.process.stderr().contains(" ERROR "),
        "{}",
        old.process.stderr()
    );
    assert_eq!(new.stop().code(), Some(0));
}

/// SIGTERM without a successor: clients hear of it while there is time.
#[tokio::test(flavor = "multi_thread")]
async fn responses_of_the_grace_are_the_last_of_their_connections() {
    let world = World::new().await;
    world.put("object", b"bytes");
    let mut command = world.command();
    // As long as it takes: the second signal ends it.
    command.env("PINRANGE_SERVER__DRAIN_GRACE", "1h");
    let mut serving = Serving::start(&mut command);
    let mut kept = BufReader::new(http::connect(world.data));
    let answer = exchange(&mut kept, "object", "").unwrap();
    assert_eq!(answer.field("connection"), "");
    serving.process.signal(Signal::TERM);
    serving.process.wait_for("draining");
    while http::get(world.admin, "/readyz", "").status == 200 {}
    for mut stream in [kept, BufReader::new(http::connect(world.data))] {
        let answer = exchange(&mut stream, "object", "").unwrap();
        assert_eq!((answer.status, answer.field("connection")), (200, "close"));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    serving.process.signal(Signal::TERM);
    assert_eq!(serving.process.wait().code(), Some(130));
}

/// What is under way when the directory is asked for: a fill that does not come to its end in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_takes_too_long_goes_on_past_the_disk() {
    let world = World::new().await;
    let bytes = Random(11).bytes(MIB);
    world.put("slow", &bytes);
    let mut old = world.start();
    let rate = std::num::NonZeroU64::new(16 << 10);
    world.s3.set_bytes_per_second_per_connection(rate);
    let mut stream = BufReader::new(http::connect(world.data));
    write!(
        stream.get_mut(),
        "GET /m/slow HTTP/1.1\r\nHost: test\r\n\r\n"
    )
    .unwrap();
    assert!(!stream.fill_buf().unwrap().is_empty());

    let new = world.start();
    world.s3.set_bytes_per_second_per_connection(None);
    let answer = http::read(&mut stream, false).unwrap().unwrap();
    assert!(answer.body == bytes);
    drop(stream);
    assert_eq!(old.process.wait().code(), Some(0));
    assert!(http::get(world.data, "/m/slow", "").body == bytes);
    assert_eq!(new.stop().code(), Some(0));
}

// === the service manager ===

/// Where a service manager would listen.
struct Manager {
    socket: UnixDatagram,
    path: std::path::PathBuf,
}

impl Manager {
    fn new(dir: &Path) -> Self {
        let path = dir.join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path }
    }

    fn hears(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let len = self.socket.recv(&mut buffer).unwrap();
        let text = std::str::from_utf8(&buffer[..len]).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

/// The process that owns the cache directory: it is not the test's child, and must not outlive it either.
struct Owner(std::path::PathBuf);

impl Owner {
    fn pid(&self) -> String {
        fs::read_to_string(&self.0)
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    fn signal(&self, signal: Signal) {
        let Ok(lock) = fs::File::open(&self.0) else {
            return;
        };
        let exclusively = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        // Whoever wrote its pid there holds the lock, or is gone.
        if rustix::fs::flock(&lock, exclusively).is_err() {
            let pid = self
                .pid()
                .parse()
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            rustix::process::kill_process(pid.unwrap(), signal).unwrap();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_replaces_the_process_and_the_service_manager_follows() {
    let world = World::new().await;
    world.put("object", b"bytes");
    let manager = Manager::new(world.dir.path());
    let config = world.dir.path().join("pinrange.toml");
    fs::write(&config, "").unwrap();
    let owner = Owner(world.dir.path().join("cache/lock"));
    let mut command = world.command();
    command
        .env("NOTIFY_SOCKET", &manager.path)
        .arg("--config")
        .arg(&config);
    let mut old = Serving::start(&mut command);
    assert_eq!(manager.hears(), ["READY=1"]);

    // A successor that cannot start changes nothing.
    fs::write(&config, "wrong = 1\n").unwrap();
    old.process.signal(Signal::HUP);
    let said = manager.hears();
    assert_eq!(said[0], "RELOADING=1");
    assert!(said[1].starts_with("MONOTONIC_USEC="), "{said:?}");
    assert_eq!(manager.hears(), ["READY=1"]);
    old.process.wait_for("carrying on");
    assert_eq!(http::get(world.data, "/m/object", "").status, 200);

    fs::write(&config, "").unwrap();
    old.process.signal(Signal::HUP);
    assert_eq!(manager.hears()[0], "RELOADING=1");
    let said = manager.hears();
    let pid = said[0].strip_prefix("MAINPID=").unwrap().to_owned();
    assert_eq!(said[1], "READY=1");
    assert_eq!(old.process.wait_alone().code(), Some(0));
    assert_ne!(pid, old.process.pid().to_string());
    assert_eq!(http::get(world.data, "/m/object", "").status, 200);

    // It is the service now, though not our child any more: the directory says whose it is.
    assert_eq!(owner.pid(), pid);
    owner.signal(Signal::TERM);
    assert_eq!(manager.hears(), ["STOPPING=1"]);
    let began = Instant::now();
    while TcpStream::connect(world.data).is_ok() {
        assert!(began.elapsed() < PATIENCE, "it did not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// With systemd's own tool, both sockets, and names.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_passes_both_sockets_by_name() {
    let Some(activate) = support::process::find_optional("systemd-socket-activate") else {
        return;
    };
    let world = World::new().await;
    world.put("object", b"bytes");
    // Configured are other addresses, which go unused.
    let [data, admin] = [free_address(), free_address()];
    let mut command = Command::new(activate);
    for (name, value) in world.command().get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
        .args([
            "--listen",
            &admin.to_string(),
            "--listen",
            &data.to_string(),
        ])
        .arg("--fdname=admin:data");
    for (name, _) in world
        .command()
        .get_envs()
        .filter(|(_, value)| value.is_some())
    {
        command.arg("--setenv").arg(name);
    }
    command.arg(pinrange().get_program()).arg("serve");
    // It starts the program at the first connection.
    let first = std::thread::spawn(move || {
        let began = Instant::now();
        while TcpStream::connect(data).is_err() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let serving = Serving::start(&mut command);
    first.join().unwrap();
    assert_eq!((serving.data, serving.admin), (data, admin));
    assert_eq!(http::get(data, "/m/object", "").status, 200);
    assert_eq!(http::get(admin, "/readyz", "").status, 200);
    assert!(TcpStream::connect(world.data).is_err());
    assert_eq!(serving.stop().code(), Some(0));
}

/// What was held is not served any more, and whoever changed the setting is told so.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_block_size_is_told_at_the_start() {
    let world = World::new().await;
    world.put("object", &vec![7; 300_000]);
    let serving = world.start();
    assert_eq!(http::get(serving.data, "/m/object", "").status, 200);
    assert_eq!(serving.stop().code(), Some(0));
    let mut command = world.command();
    command.env("PINRANGE_CACHE__BLOCK_SIZE", "128KiB");
    let serving = Serving::start(&mut command);
    let told = "cache.block_size was changed";
    serving.process.wait_for(told);
    let log = serving.process.stderr();
    let line = log.lines().find(|line| line.contains(told)).unwrap();
    // 300,000 in whole blocks of 4 KiB.
    for said in ["bytes=303104", "before=262144", "now=131072"] {
        assert!(line.contains(said), "{line}");
    }
    assert_eq!(serving.stop().code(), Some(0));
}
