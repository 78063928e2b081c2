//! The built program as a process of its own, and other people's programs as its clients.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pinrange::strict_s3::StrictS3;
use rustix::process::{Pid, Signal, kill_process};

/// How long anything here is waited for before the test fails; nothing takes a tenth of it.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// The program, with nothing in its environment that is this test's own or the machine's.
pub(crate) fn pinrange() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pinrange"));
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("PINRANGE_") || name_text.starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        .stdin(Stdio::null());
    command
}

/// `serve` on free ports in front of `endpoint`'s bucket `bucket`, mounted at `/m`, with its cache in `dir`/cache.
/// All by environment, so that a test can set any of it otherwise.
pub(crate) fn serve(endpoint: &str, dir: &Path) -> Command {
    let mut command = pinrange();
    command
        .arg("serve")
        .env("PINRANGE_SERVER__LISTEN", "127.0.0.1:0")
        .env("PINRANGE_SERVER__ADMIN", "127.0.0.1:0")
        .env("PINRANGE_CACHE__DIR", dir.join("cache"))
        .env("PINRANGE_CACHE__MIN_FREE", "1MiB")
        .env("PINRANGE_SERVER__DRAIN_GRACE", "0s")
        .env("PINRANGE_MOUNT__0__PATH", "/m")
        .env("PINRANGE_MOUNT__0__BUCKET", "bucket")
        .env("PINRANGE_MOUNT__0__ENDPOINT", endpoint)
        .env("PINRANGE_MOUNT__0__REGION", "us-east-1")
        .env("PINRANGE_MOUNT__0__PATH_STYLE", "true");
    command
}

/// [`serve`] in front of `s3`, started.
pub(crate) fn replica(s3: &StrictS3, dir: &Path) -> Serving {
    Serving::start(&mut serve(&s3.endpoint(), dir))
}

/// What a process has said on one of its streams so far.
#[derive(Clone, Default)]
struct Said(Arc<(Mutex<String>, Condvar)>);

impl Said {
    fn text(&self) -> String {
        self.0.0.lock().expect("no holder panics").clone()
    }

    fn wait_for(&self, wanted: &str) -> bool {
        let (text, more) = &*self.0;
        let text = text.lock().expect("no holder panics");
        let (text, _) = more
            .wait_timeout_while(text, PATIENCE, |text| !text.contains(wanted))
            .expect("no holder panics");
        text.contains(wanted)
    }
}

/// Collects a stream as it comes, in a thread that ends with the stream.
fn listen(stream: impl std::io::Read + Send + 'static) -> (Said, JoinHandle<()>) {
    let said = Said::default();
    let to = said.clone();
    let listener = std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let (text, more) = &*to.0;
            let mut text = text.lock().expect("no holder panics");
            text.push_str(&String::from_utf8_lossy(&line));
            line.clear();
            more.notify_all();
        }
    });
    (said, listener)
}

/// A child whose stderr is collected; killed when dropped.
pub(crate) struct Running {
    child: Child,
    stderr: Said,
    listener: Option<JoinHandle<()>>,
}

impl Running {
    /// Bytes of memory that it has at the moment.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        1024 * kib
            .and_then(|kib| kib.parse::<u64>().ok())
            .expect("Linux says so")
    }

    /// Starts `command`; its stdout is what the caller made it.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::start_logging_to(command, Stdio::piped())
    }

    /// Starts `command`, and collects what it says if it is to say that to a pipe of ours.
    fn start_logging_to(command: &mut Command, stderr: impl Into<Stdio>) -> Self {
        let mut child = command
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (stderr, listener) = match child.stderr.take() {
            Some(stderr) => {
                let (said, listener) = listen(stderr);
                (said, Some(listener))
            }
            None => (Said::default(), None),
        };
        Self {
            child,
            stderr,
            listener,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a child's pid");
        kill_process(pid, signal).expect("signal a child that has not been waited for");
    }

    /// How it ended; it has to, soon. All that it said is known then.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = self.wait_alone();
        if let Some(listener) = self.listener.take() {
            listener.join().expect("the listener does not panic");
        }
        status
    }

    /// How it ended, though a child of its own may go on and speak in its place.
    pub(crate) fn wait_alone(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("ask for a child's status") {
                return status;
            }
            assert!(Instant::now() < deadline, "no end: {}", self.stderr());
            // std has no wait with a limit.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("ask for a child's status")
            .is_some()
    }

    /// What it has said so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until it has said `wanted` on stderr.
    pub(crate) fn wait_for(&self, wanted: &str) {
        assert!(
            self.stderr.wait_for(wanted),
            "it never said {wanted:?}: {}",
            self.stderr()
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has noticed then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A replica in a process of its own that has said that it is ready.
pub(crate) struct Serving {
    pub(crate) process: Running,
    /// The data listener.
    pub(crate) data: SocketAddr,
    /// The admin listener.
    pub(crate) admin: SocketAddr,
}

impl Serving {
    /// Starts `command` and waits for its line.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::start_logging_to(command, Stdio::piped())
    }

    /// The same, with its log going elsewhere than to the test.
    pub(crate) fn start_logging_to(command: &mut Command, log: impl Into<Stdio>) -> Self {
        let mut process = Running::start_logging_to(command.stdout(Stdio::piped()), log);
        let stdout = process.child.stdout.take().expect("it is piped");
        let (send, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            // What cannot be read or sent is missed by the test.
            let _ = stdout.read_line(&mut line);
            let _ = send.send(line);
            let _ = stdout.read_to_string(&mut String::new());
        });
        let line = line.recv_timeout(PATIENCE).unwrap_or_default();
        let mut addresses = line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("http://")?.parse().ok());
        let (Some(data), Some(admin)) = (addresses.next(), addresses.next()) else {
            panic!("not ready: {line:?}, {:?}", process.stderr());
        };
        Self {
            process,
            data,
            admin,
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.data)
    }

    /// Ends it in order.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.wait()
    }
}

/// Where `program` is. `None`, said on stderr, where it is not installed.
pub(crate) fn find_optional(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

/// Where `program` is. `None`, said on stderr, where it is not installed; in CI that is a failure.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let found = find_optional(program);
    assert!(
        found.is_some() || std::env::var_os("CI").is_none(),
        "{program} is not installed"
    );
    found
}

/// Runs a program to its end, which has to come soon.
pub(crate) fn run(command: &mut Command) -> Output {
    let mut running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut stdout = running.child.stdout.take().expect("it is piped");
    let stdout = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What cannot be read is missed by the test.
        let _ = stdout.read_to_end(&mut bytes);
        bytes
    });
    let status = running.wait();
    Output {
        status,
        stdout: stdout.join().expect("the reader does not panic"),
        stderr: running.stderr().into_bytes(),
    }
}
