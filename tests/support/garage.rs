//! A real Garage on loopback, for as long as a [`Garage`] lives.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::bucket::Access;

/// How long a start may take; it takes 0.2 s on a quiet machine.
const READY_WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Garage {
    pub(crate) access: Access,
    process: Child,
    /// Removed after the process is gone: fields drop in order, after [`Garage::drop`].
    _dir: tempfile::TempDir,
}

impl Garage {
    /// Starts a server with one empty bucket. `None`, said on stderr, where there is no binary; in
    /// CI that is a failure.
    pub(crate) async fn start() -> Option<Self> {
        let Some(binary) = find_binary() else {
            let how = "no `garage` on PATH nor in PINRANGE_GARAGE: cargo install garage \
                       --version 2.5.0 --locked --no-default-features --features bundled-libs,sqlite";
            assert!(std::env::var_os("CI").is_none(), "{how}");
            eprintln!("SKIPPED: {how}");
            return None;
        };
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (s3, rpc) = free_ports();
        let access = Access {
            endpoint: format!("http://127.0.0.1:{s3}"),
            region: "garage".to_owned(),
            bucket: "snapshots".to_owned(),
            key_id: format!("GK{}", "a".repeat(24)),
            secret: "b".repeat(64),
        };
        let config = dir.path().join("garage.toml");
        write_private(&config, &configuration(dir.path(), s3, rpc));
        let log = dir.path().join("garage.log");
        let log_file = fs::File::create(&log).expect("create a log file");
        let process = Command::new(binary)
            .arg("-c")
            .arg(&config)
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", &access.key_id)
            .env("GARAGE_DEFAULT_SECRET_KEY", &access.secret)
            .env("GARAGE_DEFAULT_BUCKET", &access.bucket)
            .env("RUST_LOG", "garage=warn")
            .stdin(Stdio::null())
            .stdout(log_file.try_clone().expect("duplicate a descriptor"))
            .stderr(log_file)
            .spawn()
            .expect("start garage");
        let mut garage = Self {
            access,
            process,
            _dir: dir,
        };
        garage.wait_until_ready(&log).await;
        Some(garage)
    }

    async fn wait_until_ready(&mut self, log: &Path) {
        let (client, deadline) = (self.access.client(), Instant::now() + READY_WITHIN);
        loop {
            let listing = client.list_objects_v2().bucket(&self.access.bucket).send();
            let Err(error) = listing.await else { return };
            let exited = self.process.try_wait().expect("ask for a child's status");
            if exited.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(log).unwrap_or_default();
                panic!("garage is not ready ({exited:?}): {error:?}\n{log}");
            }
            // A process that starts gives no event to wait for.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        // It may have exited by itself, which the test has noticed then.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find_binary() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("PINRANGE_GARAGE") {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("garage"))
        .find(|file| file.is_file())
}

/// Two ports that are free now. Another process may take one before Garage does; the start then
/// fails with Garage's log.
fn free_ports() -> (u16, u16) {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let (first, second) = (bind(), bind());
    let port = |listener: &TcpListener| listener.local_addr().expect("it is bound").port();
    (port(&first), port(&second))
}

fn configuration(dir: &Path, s3: u16, rpc: u16) -> String {
    let (dir, secret) = (dir.display(), "c".repeat(64));
    format!(
        r#"metadata_dir = "{dir}/meta"
data_dir = "{dir}/data"
db_engine = "sqlite"
replication_factor = 1
compression_level = "none"
metadata_fsync = false
data_fsync = false
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
rpc_secret = "{secret}"

[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:{s3}"
root_domain = ".s3.localhost"
"#
    )
}

/// Garage refuses a configuration with secrets that others can read.
fn write_private(path: &Path, text: &str) {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.as_mut().expect("create the configuration");
    file.write_all(text.as_bytes())
        .expect("write the configuration");
}
