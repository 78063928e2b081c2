//! The command line: one subcommand a module.
//!
//! [`Cli`] is only parsed here; each subcommand's `run` does the work and says how the process ends.
//! Exit codes follow `sysexits.h` where it has one, because service managers and scripts act on
//! them: [`EX_USAGE`] for a wrong command line and [`EX_CONFIG`] for a wrong configuration are not cured
//! by a restart (`RestartPreventExitStatus=64 78`).

pub mod check;
pub mod demo;
pub mod get;
pub mod serve;
pub mod verify;

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use rustix::io::Errno;
use rustix::process::Resource;
use tokio::runtime::{Builder, Runtime};

use crate::causes::one_line;
use crate::config::{Config, ConfigError, Flags};

/// The command line was wrong (`sysexits.h`).
pub const EX_USAGE: u8 = 64;

/// What was to be read is not as it was written (`sysexits.h`).
pub const EX_DATAERR: u8 = 65;

/// There is nothing to read (`sysexits.h`).
pub const EX_NOINPUT: u8 = 66;

/// Another process has the cache directory (`sysexits.h`).
pub const EX_TEMPFAIL: u8 = 75;

/// The cache or output directory cannot be used (`sysexits.h`).
pub const EX_CANTCREAT: u8 = 73;

/// The process could not get what it needs from the system (`sysexits.h`).
pub const EX_OSERR: u8 = 71;

/// The configuration was wrong (`sysexits.h`).
pub const EX_CONFIG: u8 = 78;

/// Serves big snapshot files out of S3.
///
/// Byte ranges pinned by If-Match come from disk, or from S3 by a GET guarded by the same ETag: a
/// client gets exactly the revision it pinned, or a clean refusal.
#[derive(Debug, Parser)]
#[command(
    name = "pinrange",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done; 64 the command line is wrong; 78 the configuration is wrong (check: 2)."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
#[expect(
    clippy::doc_markdown,
    reason = "these comments are the help, and terminals show no markdown"
)]
#[expect(clippy::exhaustive_enums, reason = "closed: main dispatches every one")]
pub enum Command {
    /// Show the whole story on an embedded S3: nothing to configure, under a minute
    Demo(demo::DemoArgs),
    /// Download a file in parallel, pinned, resuming and verifying
    Get(Box<get::GetArgs>),
    /// Run a replica
    ///
    /// A setting is taken from a flag, else from its environment variable, else from the file, else
    /// it has its default. Every key of the file can be set by a variable: PINRANGE_SERVER__LISTEN,
    /// PINRANGE_CACHE__PART_SIZE, PINRANGE_MOUNT__0__BUCKET. The commented example,
    /// deploy/pinrange.example.toml, has them all.
    ///
    /// Credentials for S3 come from the standard AWS chain: AWS_ACCESS_KEY_ID and
    /// AWS_SECRET_ACCESS_KEY, a profile, or the role of the instance, pod or task. PINRANGE_LOG
    /// filters the log: info, debug, pinrange=debug,warn. What the AWS SDK says is in it only where it
    /// is named: info,aws_config=debug,aws_smithy_runtime=debug.
    Serve(Box<ServeArgs>),
    /// Validate a configuration without opening a connection or touching the cache directory
    ///
    /// Reads the file and the PINRANGE_… variables. Prints the whole configuration, defaults
    /// included, and exits 0; or prints what is wrong as FILE:LINE:COL, one problem a line, and
    /// exits 2.
    Check(check::CheckArgs),
    /// Read everything in the cache directory and compare it with its checksums
    ///
    /// For a replica that is stopped: the directory is locked while it is read. A running one scrubs
    /// by itself, and at once on POST /scrub of its admin listener. Nothing is changed without
    /// --repair, which drops what is bad, so that it is fetched again. No connection is opened.
    ///
    /// Exit codes: 0 everything is as it was written, or what was not is dropped (--repair); 65
    /// something is not; 66 there is no cache; 75 a replica has the directory; 78 the configuration
    /// is wrong.
    Verify(verify::VerifyArgs),
}

/// Where the configuration file is.
#[derive(Args, Clone, Debug, Default)]
#[expect(
    clippy::doc_markdown,
    reason = "these comments are the help, and terminals show no markdown"
)]
pub struct ConfigFile {
    /// Configuration file [default: what PINRANGE_CONFIG names, else none]
    #[arg(
        long = "config",
        value_name = "FILE",
        env = "PINRANGE_CONFIG",
        hide_env = true
    )]
    pub path: Option<PathBuf>,
}

/// Arguments of `pinrange serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// The file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// What goes before it.
    #[command(flatten)]
    pub flags: Flags,
}

impl ServeArgs {
    /// The configuration that these flags, this process's environment and the file give.
    pub fn config(&self) -> Result<Config, ConfigError> {
        Config::load(self.file.path.as_deref(), std::env::vars_os(), &self.flags)
    }
}

/// Most tasks that a thread runs before it looks at its sockets again, while there are any that can run: all connections
/// that had something to do, so that each gets its turn before those who were served ask for more. With tokio's 61 the
/// others waited in a queue that is looked at now and then: p99 was 160 ms with 1,000 connections instead of 25
/// (docs/PERFORMANCE.md). What sends for long lets the sockets be looked at by itself.
const TURNS: u32 = 8192;

/// Files that every command can count on being able to open. A replica begins with 25; the demo, which is two of them, an S3
/// and a client, gets to 125.
const DESCRIPTORS: usize = 192;

/// Raises the soft limit on open files to the hard one, as servers do: the soft one is low for the sake of
/// programs that call `select`, which this one never does. Then makes sure of [`DESCRIPTORS`]: what fails for want of one
/// later, fails anywhere, and some of it is not ours to report.
///
/// # Errors
/// What the user reads.
fn descriptors() -> Result<(), String> {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where that is not allowed, the soft limit may be enough.
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
    let enough: io::Result<Vec<_>> = (0..DESCRIPTORS)
        .map(|_| io::stderr().as_fd().try_clone_to_owned())
        .collect();
    enough.map(drop).map_err(|error| {
        let error = with_advice(&error);
        format!("cannot open {DESCRIPTORS} files, which is what it takes to run: {error}")
    })
}

/// What commands run on: `threads` of them, or one a CPU.
///
/// # Errors
/// What the user reads when the system has no threads or open files left.
pub fn runtime(threads: Option<NonZeroUsize>) -> Result<Runtime, String> {
    descriptors()?;
    let mut builder = Builder::new_multi_thread();
    threads.map(|threads| builder.worker_threads(threads.get()));
    let built = builder.enable_all().event_interval(TURNS).build();
    built.map_err(|error| format!("cannot start threads: {}", with_advice(&error)))
}

/// An error and its causes on one line, and what to do where it is for the number of open files, which no message of the
/// system says.
fn with_advice(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = one_line(error);
    let mut cause = Some(error);
    while let Some(error) = cause {
        let errno = error.downcast_ref().and_then(io::Error::raw_os_error);
        if errno == Some(Errno::MFILE.raw_os_error()) {
            line.push_str("; raise the limit on open files (ulimit -n, LimitNOFILE=)");
            break;
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Poll;

    use super::*;
    use crate::server::replica::StartError;

    /// In turns of the only thread: as many connections as have something to do get theirs before a socket's news is heard.
    #[test]
    fn all_who_can_run_have_a_turn_before_the_sockets_are_looked_at() {
        let turns = async {
            let (mut here, there) = UnixStream::pair().unwrap();
            there.set_nonblocking(true).unwrap();
            let there = tokio::net::UnixStream::from_std(there).unwrap();
            let heard = Arc::new(AtomicBool::new(false));
            let to_tell = Arc::clone(&heard);
            tokio::spawn(async move {
                there.readable().await.unwrap();
                to_tell.store(true, Ordering::Relaxed);
            });
            let mut turns = 0;
            std::future::poll_fn(|context| {
                if turns == 10 {
                    here.write_all(b"news").unwrap();
                }
                if heard.load(Ordering::Relaxed) {
                    return Poll::Ready(turns);
                }
                turns += 1;
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await
        };
        let runtime = runtime(NonZeroUsize::new(1)).unwrap();
        let turns = runtime.block_on(runtime.spawn(turns)).unwrap();
        assert!((TURNS / 2..2 * TURNS).contains(&turns), "{turns} turns");
    }

    #[test]
    fn too_few_open_files_come_with_advice() {
        let line = |errno: Errno| {
            let alone = with_advice(&io::Error::from(errno));
            let below = with_advice(&StartError::Bind {
                key: "server.listen",
                address: ([127, 0, 0, 1], 0).into(),
                source: errno.into(),
            });
            [alone, below].map(|line| line.matches("; raise the limit on open files").count())
        };
        assert_eq!(line(Errno::MFILE), [1, 1]);
        assert_eq!(line(Errno::ACCESS), [0, 0]);
    }
}
