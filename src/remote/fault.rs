//! A remote that fails on request, for tests of what stands above a [`Remote`].
//!
//! [`FaultRemote`] wraps any driver, logs every call and carries out a script: at the *n*th call of
//! an operation an [`Effect`] happens. What a test has to wait for is an event, never a time: a
//! [`Gate`] says when it was reached and lets pass when it is opened, and [`FaultRemote::called`]
//! waits for a call.
//!
//! ```
//! # use pinrange::remote::fault::{Effect, FaultRemote, Gate, Op};
//! # use pinrange::remote::{RemoteErrorKind, memory::MemoryRemote};
//! let memory = MemoryRemote::new();
//! let remote = FaultRemote::new(memory.clone());
//! // The first guarded read breaks after 100 bytes; the second finds the object replaced.
//! remote.on(Op::Read, 1, Effect::Cut { after: 100, kind: RemoteErrorKind::Unavailable });
//! remote.on(Op::Read, 2, Effect::run(move || { memory.put("key", "other", &[]); }));
//! // Reads that label themselves stop at byte 10 until the gate is opened.
//! let gate = Gate::new();
//! remote.on(Op::ReadCurrent, 1, Effect::Stall { at: 10, gate: gate.clone() });
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead};
use crate::object::{Checksum, Representation, Validator};
use crate::semantics::RangeSpec;

/// Which method of [`Remote`] was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "closed: the methods of the trait")]
pub enum Op {
    /// [`Remote::stat`]
    Stat,
    /// [`Remote::read`]
    Read,
    /// [`Remote::read_current`]
    ReadCurrent,
    /// [`Remote::checksums`]
    Checksums,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Stat => "stat",
            Self::Read => "read",
            Self::ReadCurrent => "read_current",
            Self::Checksums => "checksums",
        }
    }
}

/// What happens to a call. Several for one call happen in the order they were scripted.
#[non_exhaustive]
pub enum Effect {
    /// The call fails; the remote below never sees it.
    Fail(RemoteErrorKind),
    /// The call waits at the gate before the remote below sees it.
    Hold(Gate),
    /// The call waits before the remote below sees it.
    Delay(Duration),
    /// Runs before the remote below sees the call. See [`Effect::run`].
    Run(Box<dyn FnOnce() + Send>),
    /// The body fails after this many bytes. A shorter body is left alone.
    Cut {
        /// Bytes handed on before.
        after: u64,
        /// How it fails.
        kind: RemoteErrorKind,
    },
    /// The body waits at the gate after this many bytes. A shorter body is left alone.
    Stall {
        /// Bytes handed on before.
        at: u64,
        /// Where it waits.
        gate: Gate,
    },
}

impl Effect {
    /// Runs `hook` before the call, to replace the object for instance.
    pub fn run(hook: impl FnOnce() + Send + 'static) -> Self {
        Self::Run(Box::new(hook))
    }
}

/// A place where calls or bodies wait. Shared by cloning.
#[derive(Clone, Debug)]
pub struct Gate {
    reached: watch::Sender<bool>,
    open: watch::Sender<bool>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self {
            reached: watch::Sender::new(false),
            open: watch::Sender::new(false),
        }
    }

    /// Waits until something waits at the gate, or did.
    pub async fn reached(&self) {
        until(&self.reached, |&reached| reached).await;
    }

    /// Lets pass whatever waits and whatever comes.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    async fn pass(&self) {
        self.reached.send_replace(true);
        until(&self.open, |&open| open).await;
    }
}

async fn until<T: Send + Sync>(
    sender: &watch::Sender<T>,
    condition: impl FnMut(&T) -> bool + Send,
) {
    let seen = sender.subscribe().wait_for(condition).await.is_ok();
    assert!(seen, "the sender is borrowed and so alive");
}

/// A call as it was made.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which method.
    pub op: Op,
    /// The key.
    pub key: String,
    /// The guard of a [`Remote::read`] or [`Remote::checksums`].
    pub guard: Option<Guard>,
    /// The pin of a [`Remote::stat`], what a [`Remote::read_current`] was not to send again.
    pub validator: Option<Validator>,
    /// The range, where one was asked for.
    pub want: Option<RangeSpec>,
    yielded: Arc<AtomicU64>,
}

impl Call {
    /// Bytes of its body that were handed on so far.
    pub fn yielded(&self) -> u64 {
        self.yielded.load(Ordering::SeqCst)
    }
}

/// A [`Remote`] that logs its calls and fails as scripted.
pub struct FaultRemote<R> {
    inner: R,
    script: Mutex<Vec<(Op, usize, Effect)>>,
    outage: Mutex<Option<RemoteErrorKind>>,
    calls: watch::Sender<Vec<Call>>,
}

impl<R: Remote> FaultRemote<R> {
    /// Wraps `inner`; until something is scripted it only watches.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            script: Mutex::default(),
            outage: Mutex::default(),
            calls: watch::Sender::default(),
        }
    }

    /// The remote below.
    pub fn inner(&self) -> &R {
        &self.inner
    }

    /// Scripts `effect` for the `nth` call of `op`, counted from 1 since the beginning.
    ///
    /// # Panics
    /// When that call has been made already.
    pub fn on(&self, op: Op, nth: usize, effect: Effect) {
        let made = self.count(op);
        assert!(
            nth > made,
            "call {nth} of {op:?} was made already: there were {made}"
        );
        self.script.lock().push((op, nth, effect));
    }

    /// From now on every call fails with `kind`, until `None`. Bodies under way go on.
    pub fn outage(&self, kind: Option<RemoteErrorKind>) {
        *self.outage.lock() = kind;
    }

    /// Every call so far, in the order they were made.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.borrow().clone()
    }

    /// How often `op` was called.
    pub fn count(&self, op: Op) -> usize {
        self.calls
            .borrow()
            .iter()
            .filter(|call| call.op == op)
            .count()
    }

    /// Waits until `op` has been called `n` times.
    pub async fn called(&self, op: Op, n: usize) {
        until(&self.calls, |calls| {
            calls.iter().filter(|call| call.op == op).count() >= n
        })
        .await;
    }

    /// Bytes of all bodies that were handed on so far: what left the remote.
    pub fn yielded(&self) -> u64 {
        self.calls.borrow().iter().map(Call::yielded).sum()
    }

    /// Logs the call, does what is scripted for it before the remote below sees it, and returns
    /// what is scripted for its body.
    async fn enter(&self, call: Call) -> Result<Meter, RemoteError> {
        let (op, yielded) = (call.op, Arc::clone(&call.yielded));
        // Counted and scripted under one lock, so that of two calls each has its own number.
        let effects: Vec<Effect> = {
            let mut script = self.script.lock();
            self.calls.send_modify(|calls| calls.push(call));
            let nth = self.count(op);
            script
                .extract_if(.., |line| (line.0, line.1) == (op, nth))
                .map(|line| line.2)
                .collect()
        };
        let mut marks = Vec::new();
        for effect in effects {
            match effect {
                Effect::Fail(kind) => return Err(scripted(op, kind)),
                Effect::Hold(gate) => gate.pass().await,
                Effect::Delay(delay) => tokio::time::sleep(delay).await,
                Effect::Run(hook) => hook(),
                Effect::Cut { after, kind } => marks.push((after, Mark::Cut(scripted(op, kind)))),
                Effect::Stall { at, gate } => marks.push((at, Mark::Stall(gate))),
            }
        }
        if let Some(kind) = self.outage.lock().clone() {
            return Err(scripted(op, kind));
        }
        marks.sort_by_key(|&(offset, _)| offset);
        Ok(Meter {
            marks: marks.into(),
            yielded,
        })
    }
}

fn scripted(op: Op, kind: RemoteErrorKind) -> RemoteError {
    RemoteError::new(kind, op.name(), "scripted by a test")
}

/// What happens within a body, by offset.
struct Meter {
    marks: VecDeque<(u64, Mark)>,
    yielded: Arc<AtomicU64>,
}

enum Mark {
    Cut(RemoteError),
    Stall(Gate),
}

struct Body {
    inner: BoxStream<'static, Result<Bytes, RemoteError>>,
    /// What is left of the frame that reaches beyond a mark.
    rest: Bytes,
    meter: Meter,
}

impl Meter {
    fn wrap(self, read: RemoteRead) -> RemoteRead {
        let body = Body {
            inner: read.body,
            rest: Bytes::new(),
            meter: self,
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

impl Body {
    async fn frame(&mut self) -> Option<Result<Bytes, RemoteError>> {
        if self.rest.is_empty() {
            self.rest = match self.inner.next().await? {
                Ok(frame) => frame,
                Err(error) => return Some(Err(error)),
            };
        }
        let offset = self.meter.yielded.load(Ordering::SeqCst);
        while let Some((at, mark)) = self.meter.marks.pop_front() {
            if at > offset {
                self.meter.marks.push_front((at, mark));
                break;
            }
            match mark {
                Mark::Cut(error) => return Some(Err(error)),
                Mark::Stall(gate) => gate.pass().await,
            }
        }
        let room = self
            .meter
            .marks
            .front()
            .map_or(u64::MAX, |&(at, _)| at - offset);
        let len = usize::try_from(room)
            .unwrap_or(usize::MAX)
            .min(self.rest.len());
        let frame = self.rest.split_to(len);
        self.meter.yielded.fetch_add(len as u64, Ordering::SeqCst);
        Some(Ok(frame))
    }
}

impl<R: Remote> Remote for FaultRemote<R> {
    fn store(&self) -> &Arc<str> {
        self.inner.store()
    }

    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>> {
        async move {
            self.enter(Call {
                op: Op::Stat,
                key: key.to_owned(),
                guard: None,
                validator: pin.cloned(),
                want: None,
                yielded: Arc::default(),
            })
            .await?;
            self.inner.stat(key, pin).await
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>> {
        async move {
            let call = Call {
                op: Op::Read,
                key: guard.key.as_ref().to_owned(),
                guard: Some(guard.clone()),
                validator: None,
                want: Some(want),
                yielded: Arc::default(),
            };
            let meter = self.enter(call).await?;
            Ok(meter.wrap(self.inner.read(guard, want).await?))
        }
        .boxed()
    }

    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<Checksum>, RemoteError>> {
        async move {
            self.enter(Call {
                op: Op::Checksums,
                key: guard.key.as_ref().to_owned(),
                guard: Some(guard.clone()),
                validator: None,
                want: None,
                yielded: Arc::default(),
            })
            .await?;
            self.inner.checksums(guard).await
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
            let call = Call {
                op: Op::ReadCurrent,
                key: key.to_owned(),
                guard: None,
                validator: unless.cloned(),
                want,
                yielded: Arc::default(),
            };
            let meter = self.enter(call).await?;
            Ok(match self.inner.read_current(key, want, unless).await? {
                Current::Read(read) => Current::Read(meter.wrap(read)),
                unmodified @ Current::NotModified { .. } => unmodified,
            })
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;
    use crate::remote::conformance::{self, Fixture};
    use crate::remote::memory::MemoryRemote;

    struct Watched(FaultRemote<MemoryRemote>);

    impl Fixture for Watched {
        fn remote(&self) -> &dyn Remote {
            &self.0
        }

        fn put<'a>(
            &'a self,
            key: &'a str,
            bytes: Bytes,
            headers: &'a [(&'a str, &'a str)],
        ) -> BoxFuture<'a, ()> {
            async move {
                self.0.inner().put(key, bytes, headers);
            }
            .boxed()
        }

        fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, ()> {
            async move { self.0.inner().delete(key) }.boxed()
        }

        fn versioned(&self) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn conforms_while_nothing_is_scripted() {
        let fixture = Watched(FaultRemote::new(MemoryRemote::versioned()));
        conformance::run(&fixture).await;
        assert!(fixture.0.count(Op::ReadCurrent) > 0 && fixture.0.yielded() > 5 * 1024 * 1024);
    }

    async fn whole(remote: &FaultRemote<MemoryRemote>) -> Result<Vec<u8>, RemoteError> {
        let Current::Read(read) = remote.read_current("k", None, None).await? else {
            panic!("304 to no condition");
        };
        read.body
            .try_collect::<Vec<Bytes>>()
            .await
            .map(|frames| frames.concat())
    }

    fn with_object(bytes: &'static [u8]) -> FaultRemote<MemoryRemote> {
        let memory = MemoryRemote::new();
        memory.put("k", bytes, &[]);
        FaultRemote::new(memory)
    }

    #[tokio::test]
    async fn fails_the_nth_call_only() {
        let remote = with_object(b"bytes");
        remote.on(Op::ReadCurrent, 2, Effect::Fail(RemoteErrorKind::Timeout));
        assert_eq!(whole(&remote).await.unwrap(), b"bytes");
        assert_eq!(
            whole(&remote).await.unwrap_err().kind,
            RemoteErrorKind::Timeout
        );
        assert_eq!(whole(&remote).await.unwrap(), b"bytes");
        assert_eq!((remote.count(Op::ReadCurrent), remote.yielded()), (3, 10));
    }

    #[tokio::test]
    async fn an_outage_ends() {
        let remote = with_object(b"bytes");
        remote.outage(Some(RemoteErrorKind::Unavailable));
        assert_eq!(
            whole(&remote).await.unwrap_err().kind,
            RemoteErrorKind::Unavailable
        );
        assert!(remote.stat("k", None).await.is_err());
        remote.outage(None);
        assert!(remote.stat("k", None).await.is_ok());
    }

    #[tokio::test]
    async fn cuts_at_the_exact_byte() {
        let remote = with_object(b"0123456789");
        let cut = Effect::Cut {
            after: 4,
            kind: RemoteErrorKind::Unavailable,
        };
        remote.on(Op::ReadCurrent, 1, cut);
        let Current::Read(mut read) = remote.read_current("k", None, None).await.unwrap() else {
            panic!("304 to no condition");
        };
        assert_eq!(read.body.try_next().await.unwrap().unwrap(), "0123");
        let error = read.body.try_next().await.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Unavailable);
        assert!(read.body.next().await.is_none(), "nothing follows an error");
        assert_eq!(remote.yielded(), 4);
    }

    #[tokio::test]
    async fn a_body_stalls_until_its_gate_opens() {
        let remote = with_object(b"0123456789");
        let gate = Gate::new();
        remote.on(
            Op::ReadCurrent,
            1,
            Effect::Stall {
                at: 7,
                gate: gate.clone(),
            },
        );
        let opener = async {
            gate.reached().await;
            assert_eq!(remote.yielded(), 7);
            gate.open();
        };
        let (bytes, ()) = tokio::join!(whole(&remote), opener);
        assert_eq!(bytes.unwrap(), b"0123456789");
    }

    #[tokio::test]
    async fn a_held_call_sees_what_happened_meanwhile() {
        let remote = with_object(b"old");
        let gate = Gate::new();
        remote.on(Op::ReadCurrent, 1, Effect::Hold(gate.clone()));
        let replacer = async {
            remote.called(Op::ReadCurrent, 1).await;
            gate.reached().await;
            remote.inner().put("k", "new", &[]);
            gate.open();
        };
        let (bytes, ()) = tokio::join!(whole(&remote), replacer);
        assert_eq!(bytes.unwrap(), b"new");
    }

    #[tokio::test]
    async fn hooks_run_before_the_call() {
        let remote = with_object(b"old");
        let memory = remote.inner().clone();
        let guard = {
            let stat = remote.stat("k", None).await.unwrap();
            Guard {
                key: "k".into(),
                validator: stat.validator,
                version_id: None,
                size: None,
            }
        };
        remote.on(
            Op::Read,
            1,
            Effect::run(move || drop(memory.put("k", "new", &[]))),
        );
        let error = remote.read(&guard, RangeSpec::From(0)).await.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Mismatch);
        let call = &remote.calls()[1];
        assert_eq!(
            (call.op, call.key.as_str(), call.want),
            (Op::Read, "k", Some(RangeSpec::From(0)))
        );
        assert_eq!(call.guard.as_ref().unwrap().validator, guard.validator);
    }

    #[tokio::test]
    async fn a_delayed_call_takes_its_time() {
        let remote = with_object(b"bytes");
        let (start, delay) = (std::time::Instant::now(), Duration::from_millis(20));
        remote.on(Op::Stat, 1, Effect::Delay(delay));
        remote.stat("k", None).await.unwrap();
        assert!(start.elapsed() >= delay);
    }
}
