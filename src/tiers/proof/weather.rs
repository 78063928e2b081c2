//! A bucket whose answers take time, fail and break off.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;

use crate::chance::seeded::Dice;
use crate::object::{Checksum, Representation, Validator};
use crate::remote::memory::MemoryRemote;
use crate::remote::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead};
use crate::semantics::RangeSpec;

/// Bytes of a frame: blocks and frames do not coincide.
const FRAME: usize = 3000;

/// What may befall one answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Blow {
    /// Instead of it.
    Fail(RemoteErrorKind),
    /// The body breaks after so many bytes.
    Reset(u64),
    /// The body stands still after so many bytes, until the driver's patience is over.
    Stall(u64),
    /// It comes late.
    Late(Duration),
}

/// How the weather is made.
#[derive(Debug)]
enum Forecast {
    /// These blows, one for each answer, then none.
    Listed(VecDeque<Blow>),
    /// A blow for so many answers in a hundred, and a delay for each, by dice.
    Drawn { percent: u64, dice: Dice },
}

pub(super) struct Weather {
    bucket: MemoryRemote,
    forecast: Mutex<Forecast>,
    outage: Mutex<Option<RemoteErrorKind>>,
    struck: Arc<AtomicU64>,
    calls: AtomicU64,
    sent: Arc<AtomicU64>,
}

impl Weather {
    pub(super) fn over(bucket: MemoryRemote) -> Self {
        Self {
            bucket,
            forecast: Mutex::new(Forecast::Listed(VecDeque::new())),
            outage: Mutex::default(),
            struck: Arc::default(),
            calls: AtomicU64::new(0),
            sent: Arc::default(),
        }
    }

    pub(super) fn bucket(&self) -> &MemoryRemote {
        &self.bucket
    }

    pub(super) fn strike(&self, blow: Blow) {
        match &mut *self.forecast.lock() {
            Forecast::Listed(blows) => blows.push_back(blow),
            Forecast::Drawn { .. } => panic!("the weather is drawn"),
        }
    }

    pub(super) fn draw(&self, percent: u64, seed: u64) {
        *self.forecast.lock() = Forecast::Drawn {
            percent,
            dice: Dice::new(seed),
        };
    }

    pub(super) fn outage(&self, kind: Option<RemoteErrorKind>) {
        *self.outage.lock() = kind;
    }

    /// No more blows, no outage.
    pub(super) fn clear(&self) {
        *self.forecast.lock() = Forecast::Listed(VecDeque::new());
        self.outage(None);
    }

    /// Whether there may be trouble for what is asked from now on.
    pub(super) fn is_fair(&self) -> bool {
        let calm = match &*self.forecast.lock() {
            Forecast::Listed(blows) => blows.is_empty(),
            Forecast::Drawn { percent, .. } => *percent == 0,
        };
        calm && self.outage.lock().is_none()
    }

    pub(super) fn is_out(&self) -> bool {
        self.outage.lock().is_some()
    }

    /// Answers that something befell so far.
    pub(super) fn struck(&self) -> u64 {
        self.struck.load(Ordering::Relaxed)
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Bytes of bodies so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// What befalls the next answer, and how long it takes.
    fn next(&self) -> (Option<Blow>, Duration) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match &mut *self.forecast.lock() {
            Forecast::Listed(blows) => (blows.pop_front(), Duration::from_millis(10)),
            Forecast::Drawn { percent, dice } => {
                let delay = Duration::from_millis(5 + dice.below(60));
                let blow = dice.percent(*percent).then(|| match dice.below(6) {
                    0 => Blow::Fail(RemoteErrorKind::Unavailable),
                    1 => Blow::Fail(RemoteErrorKind::Throttled {
                        retry_after: dice.percent(50).then(|| Duration::from_millis(300)),
                    }),
                    2 => Blow::Late(Duration::from_millis(500 + dice.below(2000))),
                    3 => Blow::Stall(dice.below(16 << 10)),
                    _ => Blow::Reset(dice.below(16 << 10)),
                });
                (blow, delay)
            }
        }
    }

    /// Waits for the head of an answer. What befalls its body is returned.
    async fn head(&self, op: &'static str) -> Result<Option<Blow>, RemoteError> {
        let (blow, delay) = self.next();
        tokio::time::sleep(delay).await;
        let outage = self.outage.lock().clone();
        if let Some(kind) = outage {
            self.struck.fetch_add(1, Ordering::Relaxed);
            return Err(RemoteError::new(kind, op, "an outage"));
        }
        let Some(blow) = blow else { return Ok(None) };
        self.struck.fetch_add(1, Ordering::Relaxed);
        match blow {
            Blow::Fail(kind) => Err(RemoteError::new(kind, op, "bad weather")),
            Blow::Late(delay) => {
                tokio::time::sleep(delay).await;
                Ok(None)
            }
            body => Ok(Some(body)),
        }
    }

    fn body(&self, read: RemoteRead, blow: Option<Blow>) -> RemoteRead {
        let body = Body {
            inner: read.body,
            rest: Bytes::new(),
            passed: 0,
            blow,
            sent: Arc::clone(&self.sent),
            struck: Arc::clone(&self.struck),
        };
        let body = stream::unfold(Some(body), |body| async move {
            let mut body = body?;
            match body.frame().await? {
                Ok(frame) => Some((Ok(frame), Some(body))),
                Err(error) => Some((Err(error), None)),
            }
        });
        RemoteRead {
            body: body.boxed(),
            ..read
        }
    }
}

struct Body {
    inner: BoxStream<'static, Result<Bytes, RemoteError>>,
    rest: Bytes,
    passed: u64,
    blow: Option<Blow>,
    sent: Arc<AtomicU64>,
    struck: Arc<AtomicU64>,
}

impl Body {
    async fn frame(&mut self) -> Option<Result<Bytes, RemoteError>> {
        if self.rest.is_empty() {
            self.rest = match self.inner.next().await? {
                Ok(frame) => frame,
                Err(error) => return Some(Err(error)),
            };
        }
        // A frame takes a moment, so that others come in between.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let until = match self.blow {
            Some(Blow::Reset(at) | Blow::Stall(at)) => at,
            _ => u64::MAX,
        };
        if self.passed >= until {
            // From the moment when others can tell.
            self.struck.fetch_add(1, Ordering::Relaxed);
            let kind = if matches!(self.blow, Some(Blow::Stall(_))) {
                tokio::time::sleep(Duration::from_secs(6)).await;
                self.struck.fetch_add(1, Ordering::Relaxed);
                RemoteErrorKind::Timeout
            } else {
                RemoteErrorKind::Unavailable
            };
            return Some(Err(RemoteError::new(kind, "read", "bad weather")));
        }
        let most = usize::try_from(until - self.passed).unwrap_or(usize::MAX);
        let frame = self.rest.split_to(self.rest.len().min(FRAME).min(most));
        self.passed += frame.len() as u64;
        self.sent.fetch_add(frame.len() as u64, Ordering::Relaxed);
        Some(Ok(frame))
    }
}

impl Remote for Weather {
    fn store(&self) -> &Arc<str> {
        self.bucket.store()
    }

    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>> {
        async move {
            // Of a body, which a HEAD has not, nothing can break.
            self.head("stat").await?;
            self.bucket.stat(key, pin).await
        }
        .boxed()
    }

    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<Checksum>, RemoteError>> {
        async move {
            self.head("checksums").await?;
            self.bucket.checksums(guard).await
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>> {
        async move {
            let blow = self.head("read").await?;
            let read = self.bucket.read(guard, want).await?;
            Ok(self.body(read, blow))
        }
        .boxed()
    }

    fn read_current<'a>(
        &'a self,
        key: &'a str,
        want: Option<RangeSpec>,
        unless: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Current, RemoteError>> {
        async move {
            let blow = self.head("read_current").await?;
            match self.bucket.read_current(key, want, unless).await? {
                Current::Read(read) => Ok(Current::Read(self.body(read, blow))),
                not_modified @ Current::NotModified { .. } => Ok(not_modified),
            }
        }
        .boxed()
    }
}
