//! What was asked and what was sent: the request log and its counters.
//!
//! An entry appears when the request's head has been read and is completed while it is answered, so a request that
//! is stalled, or whose connection was cut, can be seen as it is. Every change wakes those who wait in
//! [`RequestLog::changed`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::faults::{Op, RequestInfo};

/// One request, as far as it has been answered when the log was read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogEntry {
    /// Counts all requests from 1, in the order their heads were read.
    pub sequence: u64,
    /// Which connection it came on; counts from 1.
    pub connection: u64,
    /// What it asks for.
    pub op: Op,
    /// `GET`, `HEAD`, …
    pub method: String,
    /// Percent-decoded; empty where the request names none.
    pub bucket: String,
    /// Percent-decoded; empty where the request names none.
    pub key: String,
    /// `Range`, verbatim.
    pub range: Option<String>,
    /// `If-Match`, verbatim.
    pub if_match: Option<String>,
    /// `If-None-Match`, verbatim.
    pub if_none_match: Option<String>,
    /// The `versionId` asked for.
    pub version_id: Option<String>,
    /// Whether it can only be answered with one revision's bytes: it has `If-Match` (other than `*`) or `versionId`.
    pub guarded: bool,
    /// The status that was sent; `None` while there is none, for ever where the connection was cut before.
    pub status: Option<u16>,
    /// Bytes of body handed to the socket so far.
    pub body_bytes: u64,
    /// Whether the response is over: sent, cut, or abandoned by the client.
    pub finished: bool,
    /// The labels of the scripted faults that were applied ([`super::Effect::label`]).
    pub faults: Vec<&'static str>,
}

/// Totals since the start or the last [`super::StrictS3::clear_log`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Requests of any kind.
    pub requests: u64,
    /// Object GETs.
    pub gets: u64,
    /// Object HEADs.
    pub heads: u64,
    /// Object GETs with neither `If-Match` (other than `*`) nor `versionId`.
    pub unguarded_gets: u64,
    /// Bytes of objects handed to sockets: bodies of object GETs answered 200 or 206.
    pub body_bytes_sent: u64,
}

pub(super) struct RequestLog {
    capacity: usize,
    state: Mutex<State>,
    sequence: AtomicU64,
    body_bytes_sent: AtomicU64,
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    entries: VecDeque<Arc<Record>>,
    stats: Stats,
}

/// The live side of a [`LogEntry`]. Dropping it means the response is over.
pub(super) struct RecordHandle {
    log: Arc<RequestLog>,
    record: Arc<Record>,
}

struct Record {
    entry: Mutex<LogEntry>,
    /// Apart from the rest because it changes with every chunk.
    body_bytes: AtomicU64,
}

impl RequestLog {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            state: Mutex::default(),
            sequence: AtomicU64::new(0),
            body_bytes_sent: AtomicU64::new(0),
            changes: watch::channel(()).0,
        }
    }

    pub(super) fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn begin(self: &Arc<Self>, request: &RequestInfo) -> RecordHandle {
        let record = Arc::new(Record {
            entry: Mutex::new(LogEntry {
                sequence: request.sequence,
                connection: request.connection,
                op: request.op,
                method: request.method.clone(),
                bucket: request.bucket.clone(),
                key: request.key.clone(),
                range: request.range.clone(),
                if_match: request.if_match.clone(),
                if_none_match: request.if_none_match.clone(),
                version_id: request.version_id.clone(),
                guarded: request.guarded(),
                status: None,
                body_bytes: 0,
                finished: false,
                faults: Vec::new(),
            }),
            body_bytes: AtomicU64::new(0),
        });
        {
            let mut state = self.state.lock();
            if state.entries.len() >= self.capacity {
                state.entries.pop_front();
            }
            state.entries.push_back(Arc::clone(&record));
            state.stats.requests += 1;
            state.stats.gets += u64::from(request.op == Op::Get);
            state.stats.heads += u64::from(request.op == Op::Head);
            state.stats.unguarded_gets += u64::from(request.op == Op::Get && !request.guarded());
        }
        self.changes.send_replace(());
        RecordHandle {
            log: Arc::clone(self),
            record,
        }
    }

    pub(super) fn snapshot(&self) -> Vec<LogEntry> {
        self.state
            .lock()
            .entries
            .iter()
            .map(|record| record.snapshot())
            .collect()
    }

    pub(super) fn stats(&self) -> Stats {
        let body_bytes_sent = self.body_bytes_sent.load(Ordering::Relaxed);
        Stats {
            body_bytes_sent,
            ..self.state.lock().stats
        }
    }

    pub(super) fn take(&self) -> Vec<LogEntry> {
        let mut state = self.state.lock();
        state.stats = Stats::default();
        self.body_bytes_sent.store(0, Ordering::Relaxed);
        state
            .entries
            .drain(..)
            .map(|record| record.snapshot())
            .collect()
    }

    /// Marks the present as seen; [`watch::Receiver::changed`] then waits for what comes after.
    pub(super) fn changed(&self) -> watch::Receiver<()> {
        let mut receiver = self.changes.subscribe();
        receiver.mark_unchanged();
        receiver
    }
}

impl Record {
    fn snapshot(&self) -> LogEntry {
        let body_bytes = self.body_bytes.load(Ordering::Relaxed);
        LogEntry {
            body_bytes,
            ..self.entry.lock().clone()
        }
    }
}

impl RecordHandle {
    pub(super) fn fault(&self, label: &'static str) {
        self.record.entry.lock().faults.push(label);
    }

    pub(super) fn answered(&self, status: u16) {
        self.record.entry.lock().status = Some(status);
        self.log.changes.send_replace(());
    }

    /// `object`: whether the bytes are an object's, not those of an error or a listing.
    pub(super) fn sent(&self, bytes: u64, object: bool) {
        self.record.body_bytes.fetch_add(bytes, Ordering::Relaxed);
        if object {
            self.log.body_bytes_sent.fetch_add(bytes, Ordering::Relaxed);
        }
        self.log.changes.send_replace(());
    }
}

impl Drop for RecordHandle {
    fn drop(&mut self) {
        self.record.entry.lock().finished = true;
        self.log.changes.send_replace(());
    }
}
