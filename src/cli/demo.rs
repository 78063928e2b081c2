//! `pinrange demo`: the whole story on an embedded S3, in under a minute, nothing to configure.
//!
//! ```text
//!              ┌─▶ replica A (own cache directory) ─┐
//!  downloader ─┤                                    ├─▶ embedded S3, paced like the real one
//!              └─▶ replica B (own cache directory) ─┘
//! ```
//!
//! 1. cold: every second range from each replica, pinned; each byte leaves S3 once;
//! 2. warm: the same ranges; S3 hears of none of them;
//! 3. held: S3 has another revision by now; the pin is still served, byte for byte;
//! 4. overwritten: a second object is replaced in the middle of `pinrange get`, which is told by 412,
//!    starts over, and ends with exactly the new revision.
//!
//! Every byte is compared with what was put into S3; one wrong byte and the exit code is 65.

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::{Args, Parser as _};
use futures::{StreamExt, TryStreamExt};
use http::Request;
use http::header::{IF_MATCH, RANGE};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio_util::sync::CancellationToken;

use super::get::{self, GetArgs};
use crate::config::{Config, MountConfig};
use crate::remote::s3::CredentialSource;
use crate::server::replica::Replica;
use crate::strict_s3::{Effect, Mutation, Op, Options, PutOptions, StrictS3};

/// Show the whole story on an embedded S3: cold, warm, overwritten; nothing to configure
///
/// Starts an S3 on loopback that is paced like the real one (30 ms to the first byte, 90 MB/s a connection) and two
/// replicas in front of it, downloads a generated snapshot and checks every byte.
#[derive(Args, Clone, Copy, Debug)]
pub struct DemoArgs {
    /// Size of the generated snapshot in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(32..=4096))]
    size: u64,

    /// Leave everything running afterwards, with curl lines to try; Ctrl-C ends it
    #[arg(long)]
    keep: bool,
}

/// A download's unit; also the replicas' part, so that a cold range is one GET.
const CHUNK: u64 = 16 << 20;

/// Ranges under way at a time, over both replicas.
const PARALLEL: usize = 8;

/// S3's first byte takes 30 to 200 ms.
const FIRST_BYTE: Duration = Duration::from_millis(30);

/// One connection to S3 carries about this many bytes a second.
const PACE: NonZeroU64 = NonZeroU64::new(90_000_000).expect("not zero");

/// Runs the demo. 0: every byte was right.
pub async fn run(args: DemoArgs) -> ExitCode {
    match demo(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pinrange: the demo failed: {error:#}");
            ExitCode::from(65)
        }
    }
}

#[derive(clap::Parser)]
struct GetCommand {
    #[command(flatten)]
    get: GetArgs,
}

struct Stage {
    s3: StrictS3,
    replicas: [Replica; 2],
    client: Client<HttpConnector, Empty<Bytes>>,
}

async fn demo(args: DemoArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("pinrange-demo-")
        .tempdir()?;
    let size = args.size << 20;
    println!("generating two revisions of a {} MiB snapshot", args.size);
    let (first, second) = tokio::task::spawn_blocking(move || (random(1, size), random(2, size)))
        .await
        .context("generating the snapshot")?;
    let stage = Stage::set_up(dir.path()).await?;
    let put = |key: &str, bytes: &Bytes| {
        stage
            .s3
            .put(BUCKET, key, bytes.clone(), PutOptions::default())
            .map(|put| put.etag)
    };
    let pin = put("snapshot", &first)?;
    println!(
        "an S3 at {} ({} ms to the first byte, {} MB/s a connection), replicas at {} and {}\n",
        stage.s3.endpoint(),
        FIRST_BYTE.as_millis(),
        PACE.get() / 1_000_000,
        stage.replicas[0].data,
        stage.replicas[1].data,
    );
    println!(
        "{:<44} {:>8} {:>12} {:>12} {:>12}",
        "", "time", "throughput", "S3 requests", "S3 ÷ unique"
    );

    stage
        .row(
            "cold, pinned, over both replicas",
            size,
            stage.across(&pin, &first),
        )
        .await?;
    let warm = stage
        .row("warm, the same ranges", size, stage.across(&pin, &first))
        .await?;
    ensure!(
        warm == 0,
        "S3 was asked {warm} times for what the disks hold"
    );
    put("snapshot", &second)?;
    let held = stage
        .row(
            "the same pin, S3 has another revision now",
            size,
            stage.across(&pin, &first),
        )
        .await?;
    ensure!(
        held == 0,
        "S3 was asked {held} times for a revision that the disks hold"
    );

    put("volatile", &first)?;
    // In the middle of a small snapshot's few reads, too.
    let after = PARALLEL.min(usize::try_from(size / CHUNK)?) / 2;
    stage.replace_after(after, "volatile", &second);
    let file = dir.path().join("volatile");
    let overwritten = stage.get("volatile", &file);
    stage
        .row(
            "pinrange get, object replaced in the middle",
            size,
            overwritten,
        )
        .await?;
    stage.s3.on_request(None);
    let bytes = tokio::fs::read(&file).await?;
    ensure!(bytes == second, "the file is not the new revision");

    println!(
        "\nevery byte was right, after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    if args.keep {
        stage.keep(&pin).await?;
    }
    for replica in stage.replicas {
        replica.drain(false).await;
    }
    stage.s3.shutdown().await;
    Ok(())
}

const BUCKET: &str = "demo";

impl Stage {
    async fn set_up(dir: &Path) -> anyhow::Result<Self> {
        let mut options = Options::memory([BUCKET]);
        options.first_byte_delay = FIRST_BYTE;
        options.bytes_per_second_per_connection = Some(PACE);
        let s3 = StrictS3::start(options)
            .await
            .context("starting the embedded S3")?;
        let a = start_replica(&s3, &dir.join("a")).await?;
        let b = start_replica(&s3, &dir.join("b")).await?;
        s3.clear_log();
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self {
            s3,
            replicas: [a, b],
            client,
        })
    }

    /// Runs a step, prints its row, and says how many requests S3 had.
    async fn row(
        &self,
        name: &str,
        unique: u64,
        step: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<u64> {
        self.s3.clear_log();
        let started = Instant::now();
        step.await.with_context(|| name.to_owned())?;
        let elapsed = started.elapsed().as_secs_f64();
        let stats = self.s3.stats();
        #[expect(clippy::cast_precision_loss, reason = "three digits of it are printed")]
        let (unique, sent) = (unique as f64, stats.body_bytes_sent as f64);
        let throughput = unique / elapsed / 1e6;
        let amplification = sent / unique;
        println!(
            "{name:<44} {elapsed:>6.2} s {throughput:>7.0} MB/s {:>12} {amplification:>12.2}",
            stats.requests
        );
        io::stdout().flush()?;
        Ok(stats.requests)
    }

    /// A pinned download whose ranges go to the replicas in turn; compares every byte.
    async fn across(&self, pin: &str, expected: &Bytes) -> anyhow::Result<()> {
        let size = expected.len() as u64;
        futures::stream::iter((0..size.div_ceil(CHUNK)).map(|index| {
            let replica = &self.replicas[usize::from(index % 2 == 1)];
            async move {
                let start = index * CHUNK;
                let end = (start + CHUNK).min(size);
                let request = Request::get(format!("http://{}/snapshot", replica.data))
                    .header(IF_MATCH, pin)
                    .header(RANGE, format!("bytes={start}-{}", end - 1))
                    .body(Empty::new())?;
                let response = self.client.request(request).await?;
                ensure!(
                    response.status().as_u16() == 206,
                    "the answer was {}",
                    response.status()
                );
                let mut body = response.into_body();
                let mut offset = usize::try_from(start)?;
                while let Some(frame) = body.frame().await {
                    let Ok(bytes) = frame?.into_data() else {
                        continue;
                    };
                    let right = expected.get(offset..offset + bytes.len());
                    ensure!(right == Some(&bytes[..]), "wrong bytes at {offset}");
                    offset += bytes.len();
                }
                ensure!(offset as u64 == end, "the body ended at {offset}");
                Ok(())
            }
        }))
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
    }

    async fn get(&self, key: &str, file: &Path) -> anyhow::Result<()> {
        let url = format!("http://{}/{key}", self.replicas[0].data);
        let file = file
            .to_str()
            .context("the temporary directory is not UTF-8")?;
        let command = GetCommand::try_parse_from(["get", &url, "-o", file])?;
        let events = Box::new(io::stderr());
        let cancel = CancellationToken::new();
        let summary = get::download(&command.get, Box::new(io::sink()), events, &cancel).await?;
        if summary.restarts == 0 {
            bail!("the download was not told that its object was replaced");
        }
        Ok(())
    }

    /// Replaces `key` when S3 has seen `after` reads of it.
    fn replace_after(&self, after: usize, key: &'static str, with: &Bytes) {
        let with = with.clone();
        let seen = AtomicU64::new(0);
        self.s3.on_request(Some(Box::new(move |request| {
            let is_read = request.op == Op::Get && request.key == key;
            if !is_read || seen.fetch_add(1, Ordering::Relaxed) != after as u64 {
                return Vec::new();
            }
            vec![Effect::Before(Mutation::Put {
                bucket: BUCKET.to_owned(),
                key: key.to_owned(),
                bytes: with.clone(),
                options: PutOptions::default(),
            })]
        })));
    }

    async fn keep(&self, pin: &str) -> anyhow::Result<()> {
        let [a, b] = &self.replicas;
        println!("\nstill running; try:\n");
        println!("  curl -sD- -o /dev/null http://{}/snapshot", a.data);
        println!(
            "  curl -sD- -r 0-15 -H 'If-Match: {pin}' http://{}/snapshot",
            a.data
        );
        println!(
            "  curl -sD- -r 0-15 -H 'If-Match: \"gone\"' http://{}/snapshot",
            b.data
        );
        println!("  pinrange get http://{}/snapshot -o /tmp/snapshot", a.data);
        println!("  curl -s http://{}/metrics | grep -v '^#'", a.admin);
        println!(
            "  curl -s -d '{{\"path\": \"/*\"}}' http://{}/purge",
            a.admin
        );
        println!("\nCtrl-C ends it");
        tokio::signal::ctrl_c().await?;
        Ok(())
    }
}

async fn start_replica(s3: &StrictS3, dir: &Path) -> anyhow::Result<Replica> {
    let mut mount = MountConfig::new("/", BUCKET);
    mount.endpoint = Some(s3.endpoint());
    mount.region = Some("us-east-1".to_owned());
    mount.path_style = true;
    let mut config = Config::with_mounts(vec![mount]);
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.server.listen = any;
    config.server.admin = any;
    config.cache.dir = dir.to_owned();
    config.cache.part_size = CHUNK;
    Ok(Replica::start(&config, &own_credentials()).await?)
}

/// The embedded S3 takes any.
pub(super) fn own_credentials() -> CredentialSource {
    CredentialSource::Fixed {
        access_key_id: "pinrange".to_owned(),
        secret_access_key: "pinrange".to_owned(),
    }
}

/// Bytes that do not repeat, so that a misplaced stretch shows.
fn random(seed: u64, len: u64) -> Bytes {
    let len = usize::try_from(len).expect("the size is limited to 4 GiB");
    let mut bytes = Vec::with_capacity(len + 8);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while bytes.len() < len {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}
