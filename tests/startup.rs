//! How the built program starts, refuses to start, and ends.
//!
//! A refusal is one line on stderr that says what to do, a documented exit code (README), and nothing left behind: no
//! listener, no lock, no file that was not there.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

mod support;

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::io::{BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pinrange::strict_s3::{Credentials, Effect, Fault, Options, PutOptions, StrictS3};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Signal;

use support::http::{self, Random};
use support::process::{self, Serving, pinrange, replica, run, serve};

/// An address that nobody listens on, as far as one can know.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// Runs what must not start: exit code `code`, one line on stderr with all of `words`, nothing on stdout.
#[track_caller]
fn refused(command: &mut Command, code: i32, words: &[&str]) {
    let output = run(command);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(output.stdout, b"", "{text}");
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

async fn s3() -> StrictS3 {
    let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
    s3.put(
        "bucket",
        "object",
        &b"the object"[..],
        PutOptions::default(),
    )
    .unwrap();
    s3
}

fn config(dir: &Path, text: &str) -> Command {
    let file = dir.join("pinrange.toml");
    fs::write(&file, text).unwrap();
    let mut command = pinrange();
    command
        .args(["serve", "--config"])
        .arg(file)
        .env("PINRANGE_CACHE__DIR", dir.join("cache"));
    command
}

#[test]
fn a_wrong_file_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let listen = free_address();
    let mount = "[[mount]]\npath = \"/m\"\nbucket = \"bucket\"\n";
    let server = format!("[server]\nlisten = \"{listen}\"\n");
    for (text, words) in [
        (
            format!("{server}lisen = 1\n{mount}"),
            &["pinrange.toml:3:1:", "lisen"][..],
        ),
        (
            format!("{server}[cache]\ncapacity = \"5 apples\"\n{mount}"),
            &["pinrange.toml:4:12:", "cache.capacity", "5 apples"],
        ),
        (
            format!("{server}[[mount]]\npath = \"/m\"\n"),
            &["pinrange.toml:3:", "bucket"],
        ),
        (
            format!("{server}[[mount]]\npath = \"/m\"\nbucket = \"b--use1-az4--x-s3\"\n"),
            &["pinrange.toml:5:10:", "mount \"/m\"", "directory bucket"],
        ),
        (server.clone(), &["pinrange.toml:", "there is no mount"]),
        (format!("{server}{mount}x"), &["pinrange.toml:6:"]),
    ] {
        refused(&mut config(dir.path(), &text), 78, words);
        let file = dir.path().join("pinrange.toml");
        let mut check = pinrange();
        refused(check.args(["check", "--config"]).arg(file), 2, words);
    }
    assert!(!dir.path().join("cache").exists());
    assert!(TcpStream::connect(listen).is_err());
}

/// `command`, started by a shell that does `first` before.
fn after(first: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
        .args(["-c", &format!("{first} exec \"$0\" \"$@\"")])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null());
    shell
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_open_files_are_refused_with_advice() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let command = |args: &[&str]| {
        let configured = serve(&s3.endpoint(), dir.path());
        let mut command = pinrange();
        let variables = configured.get_envs();
        command.envs(variables.filter_map(|(name, value)| Some((name, value?))));
        command.args(args);
        command
    };
    let (file, url) = (
        dir.path().join("file"),
        format!("{}/bucket/object", s3.endpoint()),
    );
    let get = ["get", "-o", file.to_str().unwrap(), &url];
    for args in [&["serve"][..], &["demo"], &get, &["verify"]] {
        for limit in [5, 6, 7, 8, 12, 16, 20, 64, 190] {
            let mut limited = after(&format!("ulimit -n {limit};"), &command(args));
            refused(&mut limited, 71, &["cannot open 192 files", "ulimit -n"]);
        }
    }
    assert!(!dir.path().join("cache").exists() && !file.exists());

    // The soft limit is for the sake of programs that call `select`.
    let mut limited = after("ulimit -S -n 16;", &command(&["serve"]));
    let serving = Serving::start(&mut limited);
    assert_eq!(http::get(serving.data, "/m/object", "").body, b"the object");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inherited_socket_that_does_not_listen_is_refused() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let passed = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$";
    let mut command = after(passed, &serve(&s3.endpoint(), dir.path()));
    command.env("LISTEN_FDNAMES", "data").stdin(socket);
    let mut process = process::Running::start(command.stdout(Stdio::null()));
    let code = process.wait().code();
    let text = process.stderr();
    assert_eq!((code, text.lines().count()), (Some(78), 1), "{text}");
    assert!(
        text.contains("\"data\"") && text.contains("does not listen"),
        "{text}"
    );
    assert!(!dir.path().join("cache").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_missing_is_refused() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let mut command = serve(&s3.endpoint(), dir.path());
    command.env("PINRANGE_MOUNT__0__BUCKET", "nowhere");
    refused(&mut command, 78, &["mount /m", "correct bucket"]);
    // The directory was opened and closed in order: neither a lock nor a suspicion is left.
    let serving = replica(&s3, dir.path());
    let log = serving.process.stderr();
    assert!(!log.contains("did not end orderly"), "{log}");
}

/// Once, and not by the SDK as well, unless somebody asks for that.
#[tokio::test(flavor = "multi_thread")]
async fn what_s3_does_wrong_is_logged_by_us() {
    for (filter, by_the_sdk) in [
        ("", false),
        ("warn", false),
        ("warn,aws_smithy_runtime=error", true),
    ] {
        let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
        let mut command = serve(&s3.endpoint(), dir.path());
        let mut serving = Serving::start(command.env("PINRANGE_LOG", filter));
        s3.script(Fault::new(Effect::InternalError).times(u64::MAX));
        assert_eq!(http::get(serving.data, "/m/object", "").status, 503);
        serving.process.signal(Signal::TERM);
        serving.process.wait();
        let log = serving.process.stderr();
        let ours = log.matches("the remote could not answer").count();
        assert_eq!(ours, 1, "{filter:?}: {log}");
        assert_eq!(log.contains(" ERROR "), by_the_sdk, "{filter:?}: {log}");
        assert_eq!(log.contains("aws_smithy"), by_the_sdk, "{filter:?}: {log}");
    }
}

/// It is a line when it begins, and one a minute as long as it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_no_line_for_each_request() {
    for (filter, each) in [("info", false), ("debug", true)] {
        let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
        let mut command = serve(&s3.endpoint(), dir.path());
        command
            .env("PINRANGE_LOG", filter)
            .env("PINRANGE_MOUNT__0__RETRIES", "0");
        let mut serving = Serving::start(&mut command);
        s3.script(Fault::new(Effect::InternalError).times(u64::MAX));
        let began = Instant::now();
        for number in 0..30 {
            let path = format!("/m/{number}");
            assert_eq!(http::get(serving.data, &path, "").status, 503);
        }
        let at_most = 1 + began.elapsed().as_secs() / 60;
        serving.process.signal(Signal::TERM);
        serving.process.wait();
        let log = serving.process.stderr();
        let lines = log
            .lines()
            .filter(|line| line.contains("the remote could not answer"));
        let (warnings, others): (Vec<_>, Vec<_>) = lines.partition(|line| line.contains(" WARN "));
        assert!(
            !warnings.is_empty() && warnings.len() as u64 <= at_most,
            "{log}"
        );
        for field in ["mount=\"/m\"", "status=503", "requests=1", "error="] {
            assert!(warnings[0].contains(field), "{field}: {log}");
        }
        let each_has_one = warnings.len() + others.len() == 30;
        assert_eq!(each_has_one, each, "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_are_wrong_are_refused() {
    let mut options = Options::memory(["bucket"]);
    options.credentials = Some(Credentials {
        access_key: "right".to_owned(),
        secret_key: "also right".to_owned(),
    });
    let s3 = StrictS3::start(options).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (id, secret) in [("right", "hunter2"), ("unknown", "also right")] {
        let mut command = serve(&s3.endpoint(), dir.path());
        command
            .env("AWS_ACCESS_KEY_ID", id)
            .env("AWS_SECRET_ACCESS_KEY", secret);
        let output = run(&mut command);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("correct") && text.contains("credentials"),
            "{text}"
        );
        assert!(!text.contains("hunter2"), "a secret in the log: {text}");
    }
    let mut command = serve(&s3.endpoint(), dir.path());
    command
        .env("AWS_ACCESS_KEY_ID", "right")
        .env("AWS_SECRET_ACCESS_KEY", "also right");
    let serving = Serving::start(&mut command);
    assert_eq!(http::get(serving.data, "/m/none", "").status, 404);
}

/// What S3 says of a missing key, and so of the probe's, to whoever may not list the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn being_denied_is_refused_unless_it_means_missing() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    s3.script(Fault::new(Effect::AccessDenied));
    let mut command = serve(&s3.endpoint(), dir.path());
    refused(&mut command, 77, &["mount /m", "forbidden = \"404\""]);

    s3.script(Fault::new(Effect::AccessDenied));
    command.env("PINRANGE_MOUNT__0__FORBIDDEN", "404");
    let serving = Serving::start(&mut command);
    assert_eq!(http::get(serving.data, "/m/object", "").status, 200);
    let log = serving.process.stderr();
    assert!(!log.contains(" WARN "), "{log}");
}

#[test]
fn credentials_that_are_missing_are_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://{}", free_address());
    let mut command = serve(&endpoint, dir.path());
    command
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY");
    let output = run(&mut command);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("credentials"), "{text}");
}

/// What the disk holds is served without S3 (P5), so an S3 that is down must not keep a replica from starting.
#[tokio::test(flavor = "multi_thread")]
async fn an_s3_that_cannot_be_reached_is_a_warning() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let before = replica(&s3, dir.path());
    let answer = http::get(before.data, "/m/object", "");
    let pin = format!("If-Match: {}\r\n", answer.field("etag"));
    assert_eq!(before.stop().code(), Some(0));

    s3.stop_accepting().await;
    let during = replica(&s3, dir.path());
    during.process.wait_for("cannot be used right now");
    assert_eq!(http::get(during.admin, "/readyz", "").status, 200);
    let held = http::get(during.data, "/m/object", &pin);
    assert_eq!((held.status, &held.body[..]), (200, &b"the object"[..]));
    let lost = http::get(during.data, "/m/other", "");
    assert_eq!(lost.status, 503);
    assert_ne!(lost.field("retry-after"), "");
    s3.resume().await.unwrap();
    assert_eq!(http::get(during.data, "/m/other", "").status, 404);
}

/// Nor does one that takes connections and says nothing.
#[test]
fn a_silent_s3_does_not_hold_up_a_start() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let serving = Serving::start(&mut serve(&endpoint, dir.path()));
    serving.process.wait_for("has not answered yet");
    assert_eq!(http::get(serving.admin, "/readyz", "").status, 200);
    // What is said of one that was waited for, until `first_byte_timeout`.
    let log = serving.process.stderr();
    assert!(!log.contains("cannot be used right now"), "{log}");
}

/// They share connections and credentials: a thousand mounts are no stampede on S3 or on whoever gives credentials.
#[tokio::test(flavor = "multi_thread")]
async fn many_mounts_of_one_server_ask_for_credentials_once_and_share_connections() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    // So that a probe of each is under way before the first is answered.
    s3.set_first_byte_delay(Duration::from_millis(20));
    let asked = dir.path().join("asked");
    let profile = dir.path().join("profile");
    let answer = r#"{"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "secret"}"#;
    let program = dir.path().join("credentials");
    let script = format!(
        "#!/bin/sh\necho once >> {}\necho '{answer}'\n",
        asked.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let process = format!("[default]\ncredential_process = {}\n", program.display());
    fs::write(&profile, process).unwrap();

    let mut command = serve(&s3.endpoint(), dir.path());
    command
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .env("AWS_CONFIG_FILE", profile);
    for number in 1..200 {
        let key = |name| format!("PINRANGE_MOUNT__{number}__{name}");
        command
            .env(key("PATH"), format!("/m{number}"))
            .env(key("BUCKET"), "bucket")
            .env(key("ENDPOINT"), s3.endpoint())
            .env(key("REGION"), "us-east-1")
            .env(key("PATH_STYLE"), "true");
    }
    let serving = Serving::start(&mut command);
    let probes = s3.take_log();
    let connections: HashSet<_> = probes.iter().map(|entry| entry.connection).collect();
    assert!(connections.len() <= 64, "{} of them", connections.len());
    assert_eq!(http::get(serving.data, "/m199/object", "").status, 200);
    assert_eq!(fs::read_to_string(asked).unwrap(), "once\n");
    assert_eq!(serving.stop().code(), Some(0));
}

/// Nobody can make a directory below a file, not even root.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_directory_that_cannot_be_used_is_refused() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for cache in [file.join("cache"), "/proc/cache".into()] {
        let mut command = serve(&s3.endpoint(), dir.path());
        command.env("PINRANGE_CACHE__DIR", &cache);
        refused(
            &mut command,
            73,
            &["make the directory", cache.to_str().unwrap()],
        );
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_refused() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let other = free_address();
    for (listen, admin, key) in [
        (address.clone(), other.to_string(), "server.listen"),
        (other.to_string(), address.clone(), "server.admin"),
    ] {
        let mut command = serve(&s3.endpoint(), dir.path());
        command
            .env("PINRANGE_SERVER__LISTEN", &listen)
            .env("PINRANGE_SERVER__ADMIN", &admin);
        refused(&mut command, 69, &[&address, key, "choose another address"]);
    }
    assert!(
        !dir.path().join("cache").exists(),
        "it was opened too early"
    );
    assert!(TcpStream::connect(other).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_directory_in_use_is_refused() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let first = replica(&s3, dir.path());
    let pid = format!("pid {}", first.process.pid());
    refused(
        &mut serve(&s3.endpoint(), dir.path()),
        75,
        &[&pid, "a directory of its own"],
    );
    assert_eq!(http::get(first.data, "/m/object", "").status, 200);
    assert_eq!(first.stop().code(), Some(0));
    // It is free again.
    assert_eq!(replica(&s3, dir.path()).stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_cannot_be_used_is_set_aside() {
    type Harm = fn(&Path);
    let s3 = s3().await;
    let newer = |file: &Path| {
        let catalog = rusqlite::Connection::open(file).unwrap();
        catalog.pragma_update(None, "user_version", 999).unwrap();
    };
    let corrupt = |file: &Path| {
        let len = usize::try_from(fs::metadata(file).unwrap().len()).unwrap();
        fs::write(file, Random(3).bytes(len)).unwrap();
    };
    let harms = [("newer", newer as Harm), ("corrupt", corrupt)];
    for (name, harm) in harms {
        let dir = tempfile::tempdir().unwrap();
        let before = replica(&s3, dir.path());
        assert_eq!(http::get(before.data, "/m/object", "").status, 200);
        assert_eq!(before.stop().code(), Some(0));
        let catalog = fs::read_dir(dir.path().join("cache"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| {
                path.file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .starts_with("catalog")
            })
            .unwrap();
        harm(&catalog);
        s3.clear_log();

        let after = replica(&s3, dir.path());
        after.process.wait_for(" WARN ");
        let log = after.process.stderr();
        assert!(log.contains(name), "{name}: {log}");
        let answer = http::get(after.data, "/m/object", "");
        assert_eq!((answer.status, &answer.body[..]), (200, &b"the object"[..]));
        assert!(s3.stats().gets > 0, "{name}: nothing of it is trusted");
        assert_eq!(after.stop().code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_port_is_warned_about() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let mut command = serve(&s3.endpoint(), dir.path());
    command
        .env("PINRANGE_SERVER__LISTEN", "0.0.0.0:0")
        .env("PINRANGE_SERVER__ADMIN", "0.0.0.0:0");
    let serving = Serving::start(&mut command);
    for warning in ["can read", "can purge"] {
        serving
            .process
            .wait_for(&format!("whoever reaches this port {warning}"));
    }

    let dir = tempfile::tempdir().unwrap();
    let serving = replica(&s3, dir.path());
    let log = serving.process.stderr();
    assert!(!log.contains("whoever reaches"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains() {
    let s3 = s3().await;
    let object = Random(4).bytes(4 << 20);
    s3.put("bucket", "big", object.clone(), PutOptions::default())
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(&s3.endpoint(), dir.path());
    command.env("PINRANGE_SERVER__DRAIN_GRACE", "2s");
    let mut serving = Serving::start(&mut command);
    // A body that is under way for as long as we like.
    s3.set_bytes_per_second_per_connection(NonZeroU64::new(1 << 20));
    let mut running = http::connect(serving.data);
    write!(running, "GET /m/big HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let mut first = [0; 1];
    running.read_exact(&mut first).unwrap();
    let idle = http::connect(serving.data);

    serving.process.signal(Signal::TERM);
    serving.process.wait_for("draining");
    // Within the grace, load balancers see it while new connections are still served.
    while http::get(serving.admin, "/readyz", "").status != 503 {}
    assert_eq!(http::get(serving.admin, "/healthz", "").status, 200);
    assert_eq!(http::get(serving.data, "/m/object", "").status, 200);
    // An idle connection is closed, so the grace is over and the listener closes too.
    assert_eq!(BufReader::new(idle).read(&mut [0; 1]).unwrap(), 0);
    while TcpStream::connect(serving.data).is_ok() {}
    assert!(!serving.process.has_ended());

    s3.set_bytes_per_second_per_connection(None);
    let mut rest = BufReader::new((&first[..]).chain(running));
    let answer = http::read(&mut rest, false).unwrap().unwrap();
    assert!(answer.body == object, "the running body was not finished");
    assert_eq!(serving.process.wait().code(), Some(0));

    // It was made durable: the next start has it without S3.
    s3.clear_log();
    let after = replica(&s3, dir.path());
    s3.clear_log();
    let pin = format!("If-Match: {}\r\n", answer.field("etag"));
    assert!(http::get(after.data, "/m/big", &pin).body == object);
    assert_eq!(s3.stats().requests, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let s3 = s3().await;
    let object = Random(5).bytes(8 << 20);
    s3.put("bucket", "big", object, PutOptions::default())
        .unwrap();
    s3.set_bytes_per_second_per_connection(NonZeroU64::new(64 << 10));
    let dir = tempfile::tempdir().unwrap();
    let mut serving = replica(&s3, dir.path());
    let mut running = http::connect(serving.data);
    write!(running, "GET /m/big HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    running.read_exact(&mut [0; 1]).unwrap();

    serving.process.signal(Signal::TERM);
    serving.process.wait_for("draining");
    assert!(!serving.process.has_ended());
    serving.process.signal(Signal::INT);
    assert_eq!(serving.process.wait().code(), Some(130));
    let mut rest = Vec::new();
    // Reset or closed; in no case whole.
    let _ = running.read_to_end(&mut rest);
    assert!(rest.len() < 8 << 20);
    // A lock that a process held is gone with it, and the directory can be used.
    s3.set_bytes_per_second_per_connection(None);
    let after = replica(&s3, dir.path());
    assert_eq!(http::get(after.data, "/m/big", "").status, 200);
}

#[test]
fn a_directory_is_served_for_trying_it_out() {
    let Some(curl) = process::find("curl") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("files");
    fs::create_dir(&files).unwrap();
    let dev = |files: &Path| {
        let mut command = pinrange();
        command
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
                "--dev",
            ])
            .arg(files)
            .env("XDG_CACHE_HOME", dir.path().join("home"));
        command
    };
    let start = || Serving::start(&mut dev(&files));
    let serving = start();
    let curl = |args: &[&str]| {
        let output = run(Command::new(&curl)
            .args(["-sS", "-f", "-m", "20"])
            .args(args));
        let said = stderr(&output).to_owned();
        (output.status.code(), output.stdout, said)
    };

    fs::write(files.join("new"), "written to the directory").unwrap();
    let (code, body, said) = curl(&[&serving.url("/new")]);
    assert_eq!(
        (code, &body[..]),
        (Some(0), &b"written to the directory"[..]),
        "{said}"
    );
    let (code, body, said) = curl(&["-r", "0-6", &serving.url("/new")]);
    assert_eq!((code, &body[..]), (Some(0), &b"written"[..]), "{said}");
    let (code, _, _) = curl(&[&serving.url("/missing")]);
    assert_eq!(code, Some(22));

    // Through the S3 port, where it says that it is.
    serving.process.wait_for("s3://dev/FILE");
    let log = serving.process.stderr();
    let endpoint = log
        .split_whitespace()
        .find(|word| word.starts_with("http://127.0.0.1:"))
        .unwrap();
    let source = dir.path().join("source");
    fs::write(&source, "written to its S3").unwrap();
    let source = source.to_str().unwrap();
    let (code, _, said) = curl(&["-T", source, &format!("{endpoint}/dev/sub/uploaded")]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        fs::read(files.join("sub/uploaded")).unwrap(),
        b"written to its S3"
    );
    let (code, body, said) = curl(&[&serving.url("/sub/uploaded")]);
    assert_eq!(
        (code, &body[..]),
        (Some(0), &b"written to its S3"[..]),
        "{said}"
    );
    let log = serving.process.stderr();
    assert!(!log.contains("ERROR"), "{log}");
    assert_eq!(serving.stop().code(), Some(0));

    let output = run(&mut dev(&dir.path().join("none")));
    assert_eq!(output.status.code(), Some(73), "{}", stderr(&output));
    assert!(stderr(&output).contains("none"), "{}", stderr(&output));
}

/// A log collector that dies must not take the replica with it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_to_read_what_it_says() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let address = free_address();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = serve(&s3.endpoint(), dir.path())
        .env("PINRANGE_SERVER__LISTEN", address.to_string())
        .stdout(writer.try_clone().unwrap())
        .stderr(writer)
        .spawn()
        .unwrap();
    let began = Instant::now();
    // It cannot say that it is ready.
    while TcpStream::connect(address).is_err() && began.elapsed() < process::PATIENCE {
        assert_eq!(child.try_wait().unwrap(), None);
        std::thread::sleep(Duration::from_millis(5));
    }
    let answers: Vec<_> = (0..3)
        .map(|_| std::panic::catch_unwind(|| http::get(address, "/m/object", "").status))
        .collect();
    let alive = child.try_wait().unwrap().is_none();
    // Before anything is asserted, so that it does not outlive the test.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(alive);
    for answer in answers {
        assert_eq!(answer.unwrap(), 200);
    }
}

/// The least there is to show, so that it is quick; the default takes longer than a test should.
#[test]
fn the_demo_shows_what_it_promises() {
    let output = run(pinrange().args(["demo", "--size", "32"]));
    let (said, log) = (
        String::from_utf8(output.stdout.clone()).unwrap(),
        stderr(&output),
    );
    assert_eq!(output.status.code(), Some(0), "{said}{log}");
    assert!(said.contains("every byte was right"), "{said}");
    assert!(!log.contains("ERROR"), "{log}");
}

/// A log driver that hangs, a terminal that is paused: 64 KiB fit into the pipe.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_holds_nothing_up() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let (log, unread) = std::io::pipe().unwrap();
    let mut serving = Serving::start_logging_to(&mut serve(&s3.endpoint(), dir.path()), unread);
    let mut client = BufReader::new(http::connect(serving.data));
    let (mut asked, mut dropped) = (0, 0);
    while dropped == 0_u64 {
        for _ in 0..100 {
            let request = b"GET /m/object HTTP/1.1\r\nHost: test\r\n\r\n";
            client.get_mut().write_all(request).unwrap();
            let answer = http::read(&mut client, false).unwrap().unwrap();
            assert_eq!(answer.status, 200);
        }
        asked += 100;
        assert!(asked <= 20_000, "the log holds more than it should");
        let metrics = http::get(serving.admin, "/metrics", "").body;
        let metrics = String::from_utf8(metrics).unwrap();
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("pinrange_log_lines_dropped_total "));
        dropped = line.unwrap().parse().unwrap();
    }
    assert!(asked > 8_000, "a line was dropped while there was room");
    serving.process.signal(Signal::TERM);
    assert!(serving.process.wait_alone().success());
    drop(log);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_json_says_what_the_remote_said() {
    let (s3, dir) = (s3().await, tempfile::tempdir().unwrap());
    let mut command = serve(&s3.endpoint(), dir.path());
    let serving = Serving::start(command.env("PINRANGE_SERVER__LOG_FORMAT", "json"));
    s3.script(Fault::new(Effect::AccessDenied).times(u64::MAX));
    assert_eq!(http::get(serving.data, "/m/object", "").status, 502);
    serving.process.wait_for("the remote could not answer");
    let log = serving.process.stderr();
    let line = log
        .lines()
        .find(|line| line.contains("the remote could not answer"));
    let line: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
    let error = line["error"].as_str().unwrap();
    assert!(error.contains("S3 answered 403"), "{error}");
}
