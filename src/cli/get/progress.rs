//! What the user sees while bytes arrive: a bar on a terminal, lines for a log, JSON for a program.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use serde_json::json;

use super::{GetError, Summary};

/// How messages look.
enum Style {
    Bar(ProgressBar),
    Plain,
    Json,
}

/// Where a download reports to. Standard error, or for `--json` whatever the caller gives. Counting a
/// frame is two atomic additions.
pub(super) struct Console {
    style: Style,
    events: Mutex<Box<dyn Write + Send>>,
    /// The first event that could not be written.
    lost: Mutex<Option<io::Error>>,
    received: AtomicU64,
    total: AtomicU64,
}

impl Console {
    /// `events` gets one JSON object a line if `json`, otherwise the human's lines.
    pub(super) fn new(json: bool, events: Box<dyn Write + Send>) -> Self {
        let style = if json {
            Style::Json
        } else if io::stderr().is_terminal() {
            Style::Bar(ProgressBar::hidden())
        } else {
            Style::Plain
        };
        Self {
            style,
            events: Mutex::new(events),
            lost: Mutex::default(),
            received: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    /// A revision's download begins: of `total` bytes, where that is known, `held` are there already.
    pub(super) fn begin(&self, total: Option<u64>, held: u64) {
        self.total.store(total.unwrap_or(0), Ordering::Relaxed);
        self.received.store(held, Ordering::Relaxed);
        if let Style::Bar(bar) = &self.style {
            let style = total.map_or(
                "{spinner} {bytes} {binary_bytes_per_sec} {elapsed}",
                |_| "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
            );
            bar.set_style(ProgressStyle::with_template(style).expect("the templates are constant"));
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(held);
            bar.reset_eta();
            bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        }
    }

    /// `bytes` more have arrived.
    pub(super) fn advance(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        if let Style::Bar(bar) = &self.style {
            bar.inc(bytes);
        }
    }

    /// About once a second, for those who cannot see a bar move.
    pub(super) fn tick(&self) {
        if matches!(self.style, Style::Json) {
            let total = self.total.load(Ordering::Relaxed);
            self.line(&json!({
                "event": "progress",
                "received": self.received.load(Ordering::Relaxed),
                "total": (total > 0).then_some(total),
            }));
        }
    }

    /// Something that the user should know and that is no failure (yet): `kind` is for programs.
    pub(super) fn note(&self, kind: &str, message: &str) {
        match &self.style {
            Style::Bar(bar) => bar.suspend(|| self.line(&format_args!("pinrange: {message}"))),
            Style::Plain => self.line(&format_args!("pinrange: {message}")),
            Style::Json => self.line(&json!({"event": kind, "message": message})),
        }
    }

    /// The end of a download that succeeded.
    pub(super) fn done(&self, summary: &Summary) {
        self.clear();
        if matches!(self.style, Style::Json) {
            self.line(&json!({
                "event": "done",
                "file": summary.file.as_ref().map(|file| file.to_string_lossy()),
                "bytes": summary.bytes,
                "resumed": summary.resumed,
                "etag": summary.etag,
                "verified": summary.verified,
                "restarts": summary.restarts,
                "seconds": summary.elapsed.as_secs_f64(),
            }));
            return;
        }
        let speed = rate(summary.bytes - summary.resumed, summary.elapsed);
        let name = summary
            .file
            .as_ref()
            .map_or_else(|| "standard output".into(), |f| f.to_string_lossy());
        self.line(&format_args!(
            "{name}: {} in {:.1} s ({}/s){}, {}",
            HumanBytes(summary.bytes),
            summary.elapsed.as_secs_f64(),
            HumanBytes(speed),
            if summary.resumed > 0 {
                format!(", of which {} were there", HumanBytes(summary.resumed))
            } else {
                String::new()
            },
            summary.verified.map_or_else(
                || "the server sent no checksum".to_owned(),
                |name| format!("{name} verified")
            ),
        ));
    }

    /// The end of one that failed. The human's line goes to standard error, whoever reads the JSON.
    pub(super) fn failed(&self, code: u8, message: &str) {
        self.clear();
        if matches!(self.style, Style::Json) {
            self.line(&json!({"event": "error", "code": code, "message": message}));
        }
    }

    fn clear(&self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }

    /// Why a program that reads the events has not had all of them. One that went away wanted no more.
    pub(super) fn lost(&self) -> Option<GetError> {
        let is_read = matches!(self.style, Style::Json);
        let source = self.lost.lock().take().filter(|_| is_read)?;
        (source.kind() != io::ErrorKind::BrokenPipe).then(|| GetError::Output {
            path: "the events (--json)".into(),
            source,
            advice: "the download itself is complete",
        })
    }

    /// Messages that cannot be written are no reason to stop the download.
    fn line(&self, line: &dyn std::fmt::Display) {
        let mut events = self.events.lock();
        if let Err(error) = writeln!(events, "{line}").and_then(|()| events.flush()) {
            self.lost.lock().get_or_insert(error);
        }
    }
}

fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let millis = elapsed.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / millis).unwrap_or(u64::MAX)
}
