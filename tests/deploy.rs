//! What `deploy/` says is true: each file is read by the program that it is for, where that is installed, and
//! ports, paths, limits and names agree with each other and with the code.
//!
//! HAProxy is more than read: its file runs in front of scripted replicas, because what it repeats, where it sends
//! a range and what it does with a body that breaks off are promises too. In CI a missing HAProxy is a failure.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pinrange::cli::{EX_CONFIG, EX_USAGE};
use pinrange::config::{self, Config, Flags};
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// As long as a process may take to get ready or to say something. Only a broken one takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

fn deployed(name: &str) -> String {
    std::fs::read_to_string(Path::new(ROOT).join("deploy").join(name)).unwrap()
}

/// A program, if it is installed. `required`: in CI it has to be.
fn installed(name: &str, required: bool) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path)
        // Debian keeps haproxy where only root's PATH looks.
        .chain([PathBuf::from("/usr/sbin")])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file());
    if found.is_none() {
        assert!(
            !(required && std::env::var_os("CI").is_some()),
            "{name} is not installed"
        );
        eprintln!("SKIPPED: {name} is not installed");
    }
    found
}

/// The documents of a YAML file, with its merge keys applied.
fn yaml(name: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(&deployed(name))
        .map(|document| {
            let mut value = <serde_yaml_ng::Value as serde::Deserialize>::deserialize(document)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            value.apply_merge().unwrap();
            serde_json::to_value(value).unwrap()
        })
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// What a replica makes of a configuration file and of variables.
fn load(toml: &str, variables: &[(String, String)]) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pinrange.toml");
    std::fs::write(&path, toml).unwrap();
    let variables = variables
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Config::load(Some(&path), variables, &Flags::default())
        .unwrap_or_else(|error| panic!("{error}"))
}

/// How long a replica may take to end.
fn drain(config: &Config) -> Duration {
    config.server.drain_grace + config.server.drain_timeout
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs(text.trim_end_matches('s').parse().unwrap())
}

/// The image's name, as the compose file and the manifest have to call it.
fn image() -> String {
    format!("pinrange:{}", env!("CARGO_PKG_VERSION"))
}

// === the systemd unit ===

/// The value of every line `name=…`.
fn unit(name: &str) -> Vec<String> {
    let found: Vec<_> = deployed("pinrange.service")
        .lines()
        .filter_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix('=')
                .map(str::to_owned)
        })
        .collect();
    assert!(!found.is_empty(), "the unit says nothing about {name}");
    found
}

#[test]
fn systemd_takes_the_unit_and_finds_it_hardened() {
    let Some(analyze) = installed("systemd-analyze", false) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pinrange.service");
    // systemd checks that the program is there.
    let here = deployed("pinrange.service").replace(
        "/usr/local/bin/pinrange ",
        concat!(env!("CARGO_BIN_EXE_pinrange"), " "),
    );
    std::fs::write(&path, here).unwrap();
    let socket = dir.path().join("pinrange.socket");
    std::fs::write(&socket, deployed("pinrange.socket")).unwrap();
    let output = Command::new(&analyze)
        .arg("verify")
        .arg(&socket)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
    // 1.2 when this was written. What is left is a root directory of its own and the network.
    for check in [
        &["verify"] as &[_],
        &["security", "--offline=true", "--threshold=15", "--no-pager"],
    ] {
        let output = Command::new(&analyze)
            .args(check)
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.is_empty(),
            "{check:?}: {said}{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

#[test]
fn the_unit_agrees_with_the_defaults() {
    let config = load(&deployed("pinrange.example.toml"), &[]);
    assert!(seconds(&unit("TimeoutStopSec")[0]) > drain(&config));
    let nofile = unit("LimitNOFILE")[0].parse().unwrap();
    assert_eq!(
        config.server.connections_within(nofile),
        config::DEFAULT_MAX_CONNECTIONS,
        "LimitNOFILE"
    );
    assert_eq!(
        format!("/var/lib/{}", unit("StateDirectory")[0]),
        config::DEFAULT_CACHE_DIR
    );
    assert_eq!(
        unit("RestartPreventExitStatus"),
        [format!("{EX_USAGE} {EX_CONFIG}")]
    );
    // The process that takes over is not the main one when it says that it is now.
    assert_eq!(
        (&unit("Type")[0][..], &unit("NotifyAccess")[0][..]),
        ("notify", "all")
    );
    let mut reload = unit("ExecReload");
    assert_eq!(reload.pop().as_deref(), Some("/bin/kill -HUP $MAINPID"));
    for command in [unit("ExecStartPre"), unit("ExecStart"), reload].concat() {
        let mut words = command.split(' ');
        assert_eq!(words.next(), Some("/usr/local/bin/pinrange"));
        let said = Command::new(env!("CARGO_BIN_EXE_pinrange"))
            .args([words.next().unwrap(), "--help"])
            .output()
            .unwrap();
        assert!(said.status.success(), "{command}");
    }
}

#[test]
fn the_socket_unit_agrees_with_the_defaults() {
    let unit = deployed("pinrange.socket");
    let config = load(&deployed("pinrange.example.toml"), &[]);
    let listen = format!("ListenStream={}", config.server.listen);
    // One name for all sockets of a unit, so it has one socket.
    for line in [&listen, "FileDescriptorName=data"] {
        assert_eq!(
            unit.lines().filter(|found| *found == line).count(),
            1,
            "{line}"
        );
    }
    assert_eq!(unit.matches("\nListen").count(), 1);
}

// === the image ===

/// The arguments of every instruction `name`, with continued lines joined.
fn dockerfile(name: &str) -> Vec<String> {
    let joined = deployed("Dockerfile").replace("\\\n", " ");
    let found: Vec<_> = joined
        .lines()
        .filter_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')
                .map(str::to_owned)
        })
        .collect();
    assert!(!found.is_empty(), "the Dockerfile has no {name}");
    found
}

#[test]
fn the_image_agrees_with_the_defaults() {
    let compiler = env!("CARGO_PKG_RUST_VERSION");
    assert!(dockerfile("FROM")[0].starts_with(&format!("rust:{compiler}-")));
    assert_eq!(dockerfile("VOLUME"), [config::DEFAULT_CACHE_DIR]);
    assert_eq!(dockerfile("STOPSIGNAL"), ["SIGTERM"]);

    // The configuration inside, which its user completes with a mount.
    let run = dockerfile("RUN").concat();
    let (_, rest) = run.split_once("printf '").unwrap();
    let (toml, rest) = rest.split_once("' > ").unwrap();
    assert_eq!(
        dockerfile("ENV"),
        [format!("PINRANGE_CONFIG={}", rest.trim())]
    );
    let mount = [("PATH", "/a"), ("BUCKET", "bucket")]
        .map(|(name, value)| (format!("PINRANGE_MOUNT__0__{name}"), value.to_owned()));
    let config = load(&toml.replace("\\n", "\n"), &mount);
    assert!(config.server.listen.ip().is_unspecified());
    assert_eq!(
        dockerfile("EXPOSE"),
        [config.server.listen.port().to_string()]
    );
    assert_eq!(config.server.admin, config::DEFAULT_ADMIN);
    assert!(
        deployed("Dockerfile").contains(&format!("-t {} .", image())),
        "the image's name"
    );
}

#[test]
fn the_images_health_check_tells_ready_from_draining() {
    let Some(bash) = installed("bash", true) else {
        return;
    };
    let check = dockerfile("HEALTHCHECK").concat();
    let (_, command) = check.split_once("CMD ").unwrap();
    let command: Vec<String> = serde_json::from_str(command).unwrap();
    assert_eq!(command[..2], ["bash", "-c"]);
    let default = format!("/127.0.0.1/{}", config::DEFAULT_ADMIN.port());
    assert!(command[2].contains(&default));

    let replica = Replica::start("1");
    let healthy = || {
        let script = command[2].replace(&default, &format!("/127.0.0.1/{}", replica.port));
        Command::new(&bash)
            .args(["-c", &script])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    };
    assert!(healthy());
    replica.ready(false);
    assert!(!healthy());
}

// === the compose file and the manifest ===

#[test]
fn the_compose_file_holds_together() {
    let [compose] = yaml("compose.yaml").try_into().unwrap();
    let services = compose["services"].as_object().unwrap();
    let garage = &services["garage"];
    let balancer = services["haproxy"]["environment"].as_object().unwrap();
    let cfg = deployed("haproxy.cfg");
    for name in balancer.keys() {
        assert!(
            cfg.contains(&format!("presetenv {name} ")),
            "haproxy.cfg knows no {name}"
        );
    }

    let mut caches = BTreeSet::new();
    for number in 1..=3 {
        let name = format!("replica{number}");
        let replica = &services[&name];
        assert_eq!(text(&replica["image"]), image());
        let environment: Vec<_> = replica["environment"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.clone(), text(value).to_owned()))
            .collect();
        let config = load("", &environment);
        assert!(seconds(text(&replica["stop_grace_period"])) > drain(&config));
        assert_eq!(
            text(&balancer[&format!("PINRANGE_{number}")]),
            format!("{name}:{}", config.server.listen.port())
        );
        assert_eq!(
            text(&balancer[&format!("PINRANGE_{number}_ADMIN_PORT")]),
            config.server.admin.port().to_string()
        );
        assert!(
            config.server.admin.ip().is_unspecified(),
            "HAProxy's checks come from elsewhere"
        );
        let mount = &config.mounts[0];
        assert_eq!(
            mount.bucket,
            text(&garage["environment"]["GARAGE_DEFAULT_BUCKET"])
        );
        assert_eq!(mount.endpoint.as_deref(), Some("http://garage:3900"));
        for (ours, theirs) in [
            ("AWS_ACCESS_KEY_ID", "GARAGE_DEFAULT_ACCESS_KEY"),
            ("AWS_SECRET_ACCESS_KEY", "GARAGE_DEFAULT_SECRET_KEY"),
        ] {
            assert_eq!(replica["environment"][ours], garage["environment"][theirs]);
        }
        let (volume, target) = text(&replica["volumes"][0]).split_once(':').unwrap();
        assert_eq!(Path::new(target), config.cache.dir);
        assert!(compose["volumes"].as_object().unwrap().contains_key(volume));
        assert!(caches.insert(volume.to_owned()), "one process a directory");
    }

    let garage_toml: toml::Table =
        toml::from_str(text(&compose["configs"]["garage"]["content"])).unwrap();
    assert_eq!(
        garage_toml["s3_api"]["api_bind_addr"].as_str(),
        Some("0.0.0.0:3900")
    );
    // Every published port is loopback's: the key stands in the file.
    for (name, service) in services {
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(
                text(port).starts_with("127.0.0.1:"),
                "{name} publishes {port}"
            );
        }
    }
}

#[test]
fn the_manifest_holds_together() {
    let documents = yaml("kubernetes.yaml");
    let find = |kind: &str, name: &str| {
        documents
            .iter()
            .find(|document| document["kind"] == kind && document["metadata"]["name"] == name)
            .unwrap_or_else(|| panic!("no {kind} {name}"))
    };
    let set = &find("StatefulSet", "pinrange")["spec"];
    let pod = &set["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(text(&container["image"]), image());

    let map = find("ConfigMap", "pinrange");
    let config = load(text(&map["data"]["pinrange.toml"]), &[]);
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(Duration::from_secs(grace) > drain(&config));

    // Ports, by the names that probes, services and the policy use.
    let ports: Vec<_> = container["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| (text(&port["name"]), port["containerPort"].as_u64().unwrap()))
        .collect();
    let (listen, admin) = (config.server.listen, config.server.admin);
    assert_eq!(
        ports,
        [
            ("http", u64::from(listen.port())),
            ("admin", u64::from(admin.port()))
        ]
    );
    assert!(
        listen.ip().is_unspecified() && admin.ip().is_unspecified(),
        "probes come to the pod's address"
    );
    for (probe, path) in [
        ("startupProbe", "/readyz"),
        ("readinessProbe", "/readyz"),
        ("livenessProbe", "/healthz"),
    ] {
        let get = &container[probe]["httpGet"];
        assert_eq!((text(&get["path"]), text(&get["port"])), (path, "admin"));
    }
    // Nobody is sent to a pod that has stopped taking connections.
    let readiness = &container["readinessProbe"];
    let noticed = readiness["periodSeconds"].as_u64().unwrap()
        * readiness["failureThreshold"].as_u64().unwrap();
    assert!(Duration::from_secs(noticed) < config.server.drain_grace);

    // Volumes: the cache and the configuration are where the program looks.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mounted = |name: &str| {
        let mount = mounts.iter().find(|mount| mount["name"] == name);
        text(&mount.unwrap()["mountPath"]).to_owned()
    };
    assert_eq!(Path::new(&mounted("cache")), config.cache.dir);
    assert_eq!(container["env"][0]["name"], "PINRANGE_CONFIG");
    assert_eq!(
        text(&container["env"][0]["value"]),
        format!("{}/pinrange.toml", mounted("config"))
    );
    let claim = &set["volumeClaimTemplates"][0];
    assert_eq!(claim["metadata"]["name"], "cache");
    let storage = text(&claim["spec"]["resources"]["requests"]["storage"]);
    let gib: u64 = storage.strip_suffix("Gi").unwrap().parse().unwrap();
    assert!(config.cache.capacity < gib << 30);

    // Everything that selects pods selects these.
    let labels = &set["template"]["metadata"]["labels"];
    for (what, selector) in [
        ("set", &set["selector"]["matchLabels"]),
        ("clients", &find("Service", "pinrange")["spec"]["selector"]),
        (
            "replicas",
            &find("Service", text(&set["serviceName"]))["spec"]["selector"],
        ),
        (
            "budget",
            &find("PodDisruptionBudget", "pinrange")["spec"]["selector"]["matchLabels"],
        ),
        (
            "policy",
            &find("NetworkPolicy", "pinrange")["spec"]["podSelector"]["matchLabels"],
        ),
    ] {
        assert_eq!(selector, labels, "{what}");
    }
}

// === HAProxy ===

/// What a scripted replica does with a data request.
#[derive(Clone, Copy, PartialEq)]
enum Act {
    Serve,
    /// Closes the connection without an answer.
    Close,
    /// 503 with `Retry-After: 7`.
    Refuse,
    /// Ten bytes of the hundred that were announced.
    Short,
    /// Half of the body, and the rest once its replica was told to go on.
    Halves,
}

/// A replica of which only the answers matter. It answers `/readyz` on the same port.
struct Replica {
    port: u16,
    state: Arc<State>,
}

struct State {
    name: &'static str,
    ready: AtomicBool,
    act: Mutex<Act>,
    requests: AtomicUsize,
    go_on: Mutex<Option<Receiver<()>>>,
}

impl Replica {
    fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            name,
            ready: AtomicBool::new(true),
            act: Mutex::new(Act::Serve),
            requests: AtomicUsize::new(0),
            go_on: Mutex::new(None),
        });
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let served = Arc::clone(&served);
                // Whoever resets a connection has seen enough.
                std::thread::spawn(move || served.connection(&stream.unwrap()).ok());
            }
        });
        Self { port, state }
    }

    fn ready(&self, ready: bool) {
        self.state.ready.store(ready, Ordering::SeqCst);
    }

    fn act(&self, act: Act) {
        *self.state.act.lock().unwrap() = act;
    }

    fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }
}

impl State {
    fn connection(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream).lines();
        while let Some(request) = lines.next() {
            let request = request?;
            let mut id = String::new();
            for line in lines.by_ref() {
                let line = line?;
                if line.is_empty() {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("x-request-id: ") {
                    value.clone_into(&mut id);
                }
            }
            let answer = if request.contains(" /readyz ") {
                let status = if self.ready.load(Ordering::SeqCst) {
                    "200 OK"
                } else {
                    "503 Service Unavailable"
                };
                format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")
            } else {
                self.requests.fetch_add(1, Ordering::SeqCst);
                let head = format!(
                    "HTTP/1.1 200 OK\r\nX-Replica: {}\r\nX-Id: {id}\r\nContent-Length: ",
                    self.name
                );
                let act = *self.act.lock().unwrap();
                match act {
                    Act::Serve => format!("{head}2\r\n\r\nok"),
                    Act::Close => return Ok(()),
                    Act::Refuse => "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\n\
                                    Content-Length: 0\r\n\r\n"
                        .to_owned(),
                    Act::Short => {
                        stream.write_all(format!("{head}100\r\n\r\n0123456789").as_bytes())?;
                        return Ok(());
                    }
                    Act::Halves => {
                        stream.write_all(format!("{head}8\r\n\r\nhalf").as_bytes())?;
                        let go_on = self.go_on.lock().unwrap().take().unwrap();
                        go_on.recv().unwrap();
                        "rest".to_owned()
                    }
                }
            };
            stream.write_all(answer.as_bytes())?;
        }
        Ok(())
    }
}

/// HAProxy with our file in front of three scripted replicas.
struct Balancer {
    process: Child,
    port: u16,
    replicas: [Replica; 3],
    log: Receiver<String>,
}

impl Balancer {
    fn start() -> Option<Self> {
        Self::with_data_ports(|replicas| replicas.each_ref().map(|replica| replica.port))
    }

    /// Data requests go to `data_ports`; the checks go to the replicas anyway.
    fn with_data_ports(data_ports: impl FnOnce(&[Replica; 3]) -> [u16; 3]) -> Option<Self> {
        let haproxy = installed("haproxy", true)?;
        let replicas = ["1", "2", "3"].map(Replica::start);
        let (port, stats) = (free_port(), free_port());
        let mut command = Command::new(haproxy);
        for ((number, replica), data) in (1..).zip(&replicas).zip(data_ports(&replicas)) {
            command
                .env(format!("PINRANGE_{number}"), format!("127.0.0.1:{data}"))
                .env(
                    format!("PINRANGE_{number}_ADMIN_PORT"),
                    replica.port.to_string(),
                );
        }
        let mut process = command
            .args(["-db", "-f", "deploy/haproxy.cfg"])
            .current_dir(ROOT)
            .env("PINRANGE_FRONTEND", format!("127.0.0.1:{port}"))
            .env("PINRANGE_STATS", format!("127.0.0.1:{stats}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                // Nobody listens any more once the test is over.
                let _ = sender.send(line);
            }
        });
        let balancer = Self {
            process,
            port,
            replicas,
            log,
        };
        // It does not say when it listens.
        let give_up = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", stats)).is_err() {
            assert!(Instant::now() < give_up, "haproxy does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        let healthy = exchange(stats, "GET /healthz HTTP/1.1\r\nConnection: close");
        assert!(healthy.starts_with("HTTP/1.1 200"), "{healthy}");
        Some(balancer)
    }

    fn get(&self, path: &str, fields: &str) -> String {
        exchange(
            self.port,
            &format!("GET {path} HTTP/1.1\r\nConnection: close\r\n{fields}"),
        )
    }

    /// Who answers for `bytes=first-`.
    fn home(&self, first: u64) -> usize {
        let answer = self.get("/a/big", &format!("Range: bytes={first}-"));
        field(&answer, "x-replica").unwrap().parse().unwrap()
    }

    fn requests(&self) -> usize {
        self.replicas.iter().map(Replica::requests).sum()
    }

    fn await_log(&self, part: &str) {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left).expect(part);
            if line.contains(part) {
                return;
            }
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port that is free now and refuses connections.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Sends a head and reads until the connection ends.
fn exchange(port: u16, head: &str) -> String {
    let mut stream = begin(port, head);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

fn begin(port: u16, head: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{}\r\nHost: a\r\n\r\n", head.trim_end());
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

fn field(answer: &str, name: &str) -> Option<String> {
    answer.lines().find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found
            .eq_ignore_ascii_case(name)
            .then(|| value.trim().to_owned())
    })
}

#[test]
fn each_stretch_of_a_file_has_one_replica_and_all_replicas_have_some() {
    let Some(balancer) = Balancer::start() else {
        return;
    };
    let stretch = 64 << 20;
    let homes: Vec<_> = (0..24).map(|n| balancer.home(n * stretch)).collect();
    for (n, home) in (0..).zip(&homes) {
        assert_eq!(balancer.home((n + 1) * stretch - 1), *home, "stretch {n}");
    }
    for replica in 1..=3 {
        let share = homes.iter().filter(|home| **home == replica).count();
        assert!((3..=13).contains(&share), "{homes:?}");
    }
    // What does not begin at a byte goes where the file's first byte is, and a query is no part of the key.
    for (path, fields) in [
        ("/a/big", ""),
        ("/a/big?x=1", ""),
        ("/a/big", "Range: bytes=-5"),
        ("/a/big", "Range: bytes=99999999999999999999-"),
        ("/a/big", "Range: bytes=7-9,999999999-"),
        ("/a/big", "Range: lines=999999999-"),
        ("/a/big", "Range: Bytes=0-4"),
    ] {
        let answer = balancer.get(path, fields);
        assert_eq!(
            field(&answer, "x-replica"),
            Some(homes[0].to_string()),
            "{path} {fields}"
        );
    }
}

#[test]
fn only_what_was_not_answered_is_asked_again() {
    let Some(balancer) = Balancer::start() else {
        return;
    };
    let home = balancer.home(0);
    let replica = &balancer.replicas[home - 1];

    replica.act(Act::Close);
    assert_ne!(balancer.home(0), home);

    let before = balancer.requests();
    let answer = exchange(
        balancer.port,
        "POST /a/big HTTP/1.1\r\nConnection: close\r\nContent-Length: 0",
    );
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert_eq!(
        field(&answer, "content-type").as_deref(),
        Some("application/problem+json")
    );
    assert_eq!(balancer.requests(), before + 1);

    replica.act(Act::Refuse);
    let answer = balancer.get("/a/big", "");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(field(&answer, "retry-after").as_deref(), Some("7"));
    assert_eq!(balancer.requests(), before + 2);
}

#[test]
fn a_refused_connection_is_another_replicas_work() {
    let Some(balancer) =
        Balancer::with_data_ports(|[_, second, third]| [free_port(), second.port, third.port])
    else {
        return;
    };
    let homes: BTreeSet<_> = (0..12).map(|n| balancer.home(n << 26)).collect();
    assert_eq!(homes, BTreeSet::from([2, 3]));
}

#[test]
fn a_body_that_breaks_off_is_not_completed() {
    let Some(balancer) = Balancer::start() else {
        return;
    };
    for replica in &balancer.replicas {
        replica.act(Act::Short);
    }
    let answer = balancer.get("/a/big", "");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(field(&answer, "content-length").as_deref(), Some("100"));
    assert!(answer.ends_with("\r\n\r\n0123456789"), "{answer}");
    assert_eq!(balancer.requests(), 1);
}

#[test]
fn a_draining_replica_finishes_and_gets_nothing_new() {
    let Some(balancer) = Balancer::start() else {
        return;
    };
    let home = balancer.home(0);
    let replica = &balancer.replicas[home - 1];
    let (go_on, wait) = mpsc::channel();
    *replica.state.go_on.lock().unwrap() = Some(wait);
    replica.act(Act::Halves);
    let mut stream = begin(balancer.port, "GET /a/big HTTP/1.1\r\nConnection: close");
    let mut answer = String::new();
    let mut byte = [0];
    while !answer.ends_with("half") {
        stream.read_exact(&mut byte).unwrap();
        answer.push(char::from(byte[0]));
    }

    replica.ready(false);
    balancer.await_log(&format!("Server replicas/replica{home} is DOWN"));
    let before = replica.requests();
    assert_ne!(balancer.home(0), home);
    assert_eq!(replica.requests(), before);

    go_on.send(()).unwrap();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("halfrest"), "{answer}");
}

#[test]
fn a_request_has_an_id_its_clients_if_there_is_one() {
    let Some(balancer) = Balancer::start() else {
        return;
    };
    let answer = balancer.get("/a/big", "X-Request-Id: mine");
    assert_eq!(field(&answer, "x-id").as_deref(), Some("mine"));
    let made = field(&balancer.get("/a/big", ""), "x-id").unwrap();
    assert_eq!(made.len(), 36, "{made}");
}
