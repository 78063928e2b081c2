//! The `pinrange` program: arguments, log, runtime, exit code.

use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Parser;
use pinrange::cli::{self, Cli, Command};
use pinrange::telemetry::{self, LogFormat};

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
        // These two speak for themselves: only what goes wrong inside is logged.
        Command::Demo(args) => run(LogFormat::Text, "error", None, cli::demo::run(args)),
        Command::Get(args) => run(LogFormat::Text, "error", None, cli::get::run(*args)),
        Command::Serve(args) => match args.config() {
            Ok(config) => {
                let (format, threads) = (config.server.log_format, config.server.worker_threads);
                run(format, "info", threads, cli::serve::run(config))
            }
            Err(error) => refuse(&error, cli::EX_CONFIG),
        },
        Command::Check(args) => cli::check::run(&args),
        Command::Verify(args) => cli::verify::run(&args),
    }
}

fn run(
    format: LogFormat,
    filter: &str,
    threads: Option<NonZeroUsize>,
    command: impl Future<Output = ExitCode>,
) -> ExitCode {
    let _log = match telemetry::init(format, filter) {
        Ok(log) => log,
        Err(error) => return refuse(&error, cli::EX_CONFIG),
    };
    let runtime = match cli::runtime(threads) {
        Ok(runtime) => runtime,
        Err(problem) => return refuse(&problem, cli::EX_OSERR),
    };
    let code = runtime.block_on(command);
    runtime.shutdown_background(); // A thread that waits for a dead disk never ends.
    code
}

/// One line a problem, without a prefix: editors and CI recognise `FILE:LINE:COL:` at its start.
fn refuse(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(code)
}
