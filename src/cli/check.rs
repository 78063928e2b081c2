//! `pinrange check`: what would `serve` run with, or why would it not?
//!
//! Reads the file and the environment, and nothing else: no connection, no look-up of a name, no look into the cache
//! directory. What it prints is a complete configuration file, defaults included, that `serve` reads
//! back as the same. There are no credentials in it because there are none in a configuration.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::ConfigFile;
use crate::config::{Config, ConfigError, Flags};

/// Exit code of a configuration that is wrong.
const WRONG: u8 = 2;

/// Arguments of `pinrange check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Print JSON: {"valid": true, "config": …} or {"valid": false, "problems": […]}
    #[arg(long)]
    pub json: bool,
}

/// Prints the verdict: the configuration to stdout, or the problems to stderr (with `--json`: all to stdout).
pub fn run(args: &CheckArgs) -> ExitCode {
    let result = Config::load(
        args.file.path.as_deref(),
        std::env::vars_os(),
        &Flags::default(),
    );
    match print(args, &result) {
        Ok(()) if result.is_ok() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::from(WRONG),
        // The reader went away: it has seen what it wanted, but scripts must not take it as valid.
        Err(error) => {
            let _ = writeln!(io::stderr(), "pinrange: cannot print the result: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(args: &CheckArgs, result: &Result<Config, ConfigError>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match result {
        Ok(config) if args.json => {
            writeln!(stdout, "{:#}", json!({ "valid": true, "config": config }))
        }
        Err(error) if args.json => {
            writeln!(
                stdout,
                "{:#}",
                json!({ "valid": false, "problems": error.problems() })
            )
        }
        Ok(config) => {
            let name = args.file.path.as_deref().map_or_else(
                || "the environment".to_owned(),
                |path| path.display().to_string(),
            );
            let toml = toml::to_string(config).map_err(io::Error::other)?;
            write!(
                stdout,
                "# {name}: valid. This is what it comes to:\n\n{toml}"
            )
        }
        Err(error) => writeln!(io::stderr(), "{error}"),
    }
}
