//! What the kernel sees of a process: strace attached to it, and its lines read.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};

use super::process::Running;

/// Attaches to every thread of `pid`; every system call is in `file` after the tracer's end, with up to `bytes` bytes of
/// each string, in hexadecimal where they are no text.
pub(crate) fn attach(strace: &Path, pid: u32, bytes: u32, file: &Path) -> Running {
    let tracer = Running::start(
        Command::new(strace)
            .args(["-f", "-yy", "-x", "-s", &bytes.to_string(), "-o"])
            .arg(file)
            .args(["-p", &pid.to_string()])
            .stdout(Stdio::null()),
    );
    tracer.wait_for("attached");
    tracer
}

/// One system call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: String,
    pub(crate) result: String,
    /// The line of the trace at which it was made, and the one at which it returned.
    pub(crate) made: usize,
    pub(crate) returned: usize,
}

impl Call {
    /// Up to the first comma; descriptors stand first and have none in them.
    pub(crate) fn argument(&self, index: usize) -> &str {
        self.arguments.split(", ").nth(index).unwrap_or_default()
    }

    /// What the call says it moved; `None` where it failed or moved nothing.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.result.parse().ok()
    }
}

/// strace's lines, those joined again that another thread's stand between; in the order in which the calls returned.
pub(crate) fn calls(trace: &str) -> Vec<Call> {
    let mut begun: HashMap<&str, (usize, String)> = HashMap::new();
    let mut calls = Vec::new();
    for (number, line) in trace.lines().enumerate() {
        let (thread, rest) = line.split_once(' ').expect("a thread and a call");
        let rest = rest.trim_start();
        if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, (number, start.to_owned()));
            continue;
        }
        let (made, whole) = match rest.split_once(" resumed>") {
            Some((_, end)) if rest.starts_with("<... ") => {
                // Begun before strace came.
                let Some((made, start)) = begun.remove(thread) else {
                    continue;
                };
                (made, start + end)
            }
            _ => (number, rest.to_owned()),
        };
        let Some((call, result)) = whole.rsplit_once(" = ") else {
            continue; // A signal or an exit.
        };
        let (name, arguments) = call.split_once('(').expect("a call's arguments");
        calls.push(Call {
            name: name.to_owned(),
            arguments: arguments.trim_end().trim_end_matches(')').to_owned(),
            result: result.split(' ').next().unwrap_or_default().to_owned(),
            made,
            returned: number,
        });
    }
    calls
}
