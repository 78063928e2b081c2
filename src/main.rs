//! The `pinrange` program: arguments, log, runtime, exit code.

use std::process::ExitCode;

use clap::Parser;
use pinrange::cli::{self, Cli, Command, ServeArgs};
use pinrange::config::ServerConfig;
use pinrange::telemetry;
use tokio::runtime::{Builder, Runtime};

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
        // Demo(args) => the same as Get
        Command::Serve(args) => serve(&args),
        // Get(args) => runtime.block_on(cli::get::run(args))
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
    match runtime(&config.server) {
        // runtime.block_on(pinrange::server::serve(config))
        Ok(_runtime) => refuse(&"this build has no server", cli::EX_OSERR),
        Err(error) => refuse(&format!("cannot start threads: {error}"), cli::EX_OSERR),
    }
}

fn runtime(config: &ServerConfig) -> std::io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    if let Some(threads) = config.worker_threads {
        builder.worker_threads(threads.get());
    }
    builder.enable_all().build()
}

/// One line a problem, without a prefix: editors and CI recognise `FILE:LINE:COL:` at its start.
fn refuse(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(code)
}
