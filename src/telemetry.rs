//! Tracing and metrics: names, units and labels in one place. (skeleton)
use std::sync::Arc;
use std::time::Duration;

/// The process's metrics; passed down, never global. Cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics(Arc<()>);

impl Metrics {
    /// One answered request.
    pub fn request(&self, _verdict: &'static str, _tier: &'static str, _ttfb: Duration, _total: Duration) {}
    /// Body bytes sent to clients from this tier.
    pub fn sent_bytes(&self, _tier: &'static str, _bytes: u64) {}
    /// One S3 request: `op` is stat, read or read_current; `result` is ok or a `RemoteErrorKind` label.
    pub fn remote_request(&self, _op: &'static str, _result: &'static str, _ttfb: Duration) {}
    /// Body bytes received from S3.
    pub fn remote_bytes(&self, _bytes: u64) {}
    /// A fill began (gauge up).
    pub fn fill_started(&self) {}
    /// A fill ended (gauge down, counter by outcome).
    pub fn fill_finished(&self, _outcome: &'static str) {}
    /// Responses that send behind a fill's cursor, plus or minus one.
    pub fn followers(&self, _delta: i64) {}
    /// Responses whose body is under way, plus or minus one.
    pub fn open_responses(&self, _delta: i64) {}
    /// Connections on the data listener, plus or minus one.
    pub fn connections(&self, _delta: i64) {}
    /// A body that was cut after its head.
    pub fn aborted(&self, _reason: &'static str) {}
}
