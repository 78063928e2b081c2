//! `pinrange verify`: is everything in the cache directory as it was written?
//!
//! Works on the directory of a replica that does not run, with no connection to anything: every block against its
//! checksum, and every whole revision against the checksum of the object that S3 once said. Changes nothing, unless `--repair`
//! lets it drop what is bad.

use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use super::{
    ConfigFile, EX_CANTCREAT, EX_CONFIG, EX_DATAERR, EX_NOINPUT, EX_OSERR, EX_TEMPFAIL, descriptors,
};
use crate::causes::one_line;
use crate::config::{Config, Flags};
use crate::disk::DiskError;
use crate::disk::offline::{Findings, OfflineTier};

/// Arguments of `pinrange verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Drop what is bad, so that it is fetched again
    #[arg(long)]
    pub repair: bool,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Verifies and prints what was found: the findings to stdout, why there are none to stderr.
pub fn run(args: &VerifyArgs) -> ExitCode {
    let file = args.file.path.as_deref();
    let config = match Config::load(file, std::env::vars_os(), &Flags::default()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    if let Err(problem) = descriptors() {
        eprintln!("pinrange: {problem}");
        return ExitCode::from(EX_OSERR);
    }
    let findings = match verify(args, &config) {
        Ok(findings) => findings,
        Err(error) => {
            eprintln!("pinrange: {}", one_line(&error));
            return ExitCode::from(match error {
                DiskError::Locked { .. } => EX_TEMPFAIL,
                DiskError::Io { op: "open", .. } => EX_NOINPUT,
                DiskError::Catalog(_) => EX_DATAERR,
                _ => EX_CANTCREAT,
            });
        }
    };
    if let Err(error) = print(args, &findings) {
        // Scripts must not take what nobody could read as clean.
        let _ = writeln!(io::stderr(), "pinrange: cannot print the result: {error}");
        return ExitCode::FAILURE;
    }
    if findings.is_clean() || args.repair {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EX_DATAERR)
    }
}

fn verify(args: &VerifyArgs, config: &Config) -> Result<Findings, DiskError> {
    let mut tier = OfflineTier::open(&config.cache.dir)?;
    let bar = if !args.json && io::stderr().is_terminal() {
        let (_, bytes) = tier.totals()?;
        let style = ProgressStyle::with_template(
            "{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} eta {eta}",
        );
        ProgressBar::new(bytes).with_style(style.expect("the template is sound"))
    } else {
        ProgressBar::hidden()
    };
    let findings = tier.verify(args.repair, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    findings
}

fn print(args: &VerifyArgs, findings: &Findings) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    if args.json {
        let bad: Vec<_> = findings
            .bad
            .iter()
            .map(|bad| {
                json!({
                    "key": bad.key,
                    "etag": bad.validator,
                    "file": bad.file,
                    "reason": bad.reason,
                })
            })
            .collect();
        let found = json!({
            "clean": findings.is_clean(),
            "repaired": args.repair,
            "segments": findings.segments,
            "bytes": findings.bytes,
            "whole_objects": findings.whole_objects,
            "corrupt_blocks": findings.corrupt_blocks,
            "catalog": findings.catalog,
            "bad": bad,
        });
        return writeln!(stdout, "{found:#}");
    }
    if let Some(damage) = &findings.catalog {
        let then = if args.repair {
            "the next start begins an empty cache"
        } else {
            "with --repair the next start begins an empty cache"
        };
        writeln!(stdout, "the catalog is damaged ({damage}); {then}")?;
    }
    for bad in &findings.bad {
        let file = bad
            .file
            .as_ref()
            .map_or_else(String::new, |file| format!("{}: ", file.display()));
        writeln!(
            stdout,
            "{file}{} {}: {}",
            bad.key, bad.validator, bad.reason
        )?;
    }
    let verdict = match (findings.is_clean(), args.repair) {
        (true, _) => "all as it was written",
        (false, true) => "what was bad is dropped, and fetched again when asked for",
        (false, false) => "run with --repair to drop what is bad",
    };
    writeln!(
        stdout,
        "{} segments, {}, {} whole objects; {} corrupt blocks, {} bad: {verdict}",
        findings.segments,
        HumanBytes(findings.bytes),
        findings.whole_objects,
        findings.corrupt_blocks,
        findings.bad.len(),
    )
}
