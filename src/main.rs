//! The `pinrange` program: arguments, log, runtime, exit code.

use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Parser;
use pinrange::cli::{self, Cli, Command, ServeArgs};
use pinrange::telemetry::{self, LogFormat};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // To stdout for --help and --version, else to stderr; when that is closed nobody reads it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { cli::EX_USAGE } else { 0 });
        }
    };
    match cli.command {
        Command::Demo(args) => quiet(cli::demo::run(args)),
        Command::Serve(args) => serve(&args),
        Command::Get(args) => quiet(cli::get::run(*args)),
        Command::Check(args) => cli::check::run(&args),
    }
}

fn serve(args: &ServeArgs) -> ExitCode {
    let config = match args.config() {
        Ok(config) => config,
        Err(error) => return refuse(&error, cli::EX_CONFIG),
    };
    let filter = std::env::var(telemetry::LOG_VARIABLE).ok();
    if let Err(error) = telemetry::init(config.server.log_format, filter.as_deref(), "info") {
        return refuse(&error, cli::EX_CONFIG);
    }
    run(config.server.worker_threads, cli::serve::run(config))
}

/// `demo` and `get` speak for themselves; only what goes wrong inside is logged.
fn quiet(command: impl Future<Output = ExitCode>) -> ExitCode {
    let filter = std::env::var(telemetry::LOG_VARIABLE).ok();
    match telemetry::init(LogFormat::Text, filter.as_deref(), "error") {
        Ok(()) => run(None, command),
        Err(error) => refuse(&error, cli::EX_CONFIG),
    }
}

fn run(threads: Option<NonZeroUsize>, command: impl Future<Output = ExitCode>) -> ExitCode {
    let mut builder = Builder::new_multi_thread();
    if let Some(threads) = threads {
        builder.worker_threads(threads.get());
    }
    match builder.enable_all().build() {
        Ok(runtime) => runtime.block_on(command),
        Err(error) => refuse(&format!("cannot start threads: {error}"), cli::EX_OSERR),
    }
}

/// One line a problem, without a prefix: editors and CI recognise `FILE:LINE:COL:` at its start.
fn refuse(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(code)
}
