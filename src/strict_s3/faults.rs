//! Scripted misbehaviour: what to match, and what then happens.
//!
//! A [`Fault`] is an [`Effect`] with a condition. Where a condition is not enough, a [`Hook`] sees every request and
//! returns effects for it. Both end in one `Plan` per request, which the front (`front.rs`) carries out: mutations and
//! delays before the request is answered, changes of the head, then the body's cut or stall (`wire.rs`).

use std::time::Duration;

use bytes::Bytes;

use super::store::PutOptions;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// GET of an object.
    Get,
    /// HEAD of an object.
    Head,
    /// `PutObject` or a step of a multipart upload.
    Put,
    /// `DeleteObject`.
    Delete,
    /// A listing of objects.
    List,
    /// Anything else.
    Other,
}

/// A request as faults and hooks see it, before it is answered.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestInfo {
    /// Counts all requests from 1.
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
}

impl RequestInfo {
    /// Whether it can only be answered with one revision's bytes. `If-Match: *` is no guard.
    pub fn guarded(&self) -> bool {
        self.version_id.is_some()
            || self
                .if_match
                .as_deref()
                .is_some_and(|value| value.trim() != "*")
    }
}

/// A change of the stored objects, made by the server itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "a test has a handful of them")]
pub enum Mutation {
    /// Put an object.
    Put {
        /// Its bucket.
        bucket: String,
        /// Its key.
        key: String,
        /// Its bytes.
        bytes: Bytes,
        /// Its headers.
        options: PutOptions,
    },
    /// Delete an object (a delete marker where the bucket has versions).
    Delete {
        /// Its bucket.
        bucket: String,
        /// Its key.
        key: String,
    },
}

/// What happens to a request that was matched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Effect {
    /// Change the store, then answer: the request sees the change.
    Before(Mutation),
    /// Choose the answer, change the store, then send the answer: the request does not see the change, every later
    /// one does, however soon it comes.
    After(Mutation),
    /// Wait before answering.
    Delay(Duration),
    /// Answer 503 `SlowDown`, with `Retry-After` in seconds where given.
    SlowDown {
        /// Seconds.
        retry_after: Option<u32>,
    },
    /// Answer 500 `InternalError`.
    InternalError,
    /// Answer 403 `AccessDenied`.
    AccessDenied,
    /// Answer 403 with another of S3's codes, as `InvalidObjectState`.
    Forbidden {
        /// The code.
        code: &'static str,
    },
    /// Send the head and this many bytes of the body, wait until the peer's kernel has them, then reset the
    /// connection (RST).
    ResetAfter {
        /// Bytes of the body; 0 is the head alone.
        bytes: u64,
    },
    /// Send the whole head (with its honest `Content-Length`) and this many bytes of the body, then close (FIN).
    CloseAfter {
        /// Bytes of the body.
        bytes: u64,
    },
    /// Send the head and this many bytes of the body, then nothing for a while.
    StallAfter {
        /// Bytes of the body.
        bytes: u64,
        /// How long; `None`: until [`super::StrictS3::release_stalls`].
        duration: Option<Duration>,
    },
    /// Invert a byte of the body, if it is that long.
    FlipByte {
        /// Offset in the body.
        at: u64,
    },
    /// `Content-Range` is shifted by one byte; the body is not.
    WrongContentRange,
    /// `ETag` is another one.
    WrongETag,
    /// `Content-Length` and body have this many bytes less than `Content-Range` says, and end cleanly.
    ShortContentLength {
        /// Bytes too few.
        missing: u64,
    },
    /// Answer 200 with the whole object, as if there were no `Range`.
    IgnoreRange,
    /// Answer as if there were no `If-Match`.
    IgnoreIfMatch,
    /// Begin an outage as [`super::StrictS3::stop_accepting`] does; this request is not answered.
    Outage,
}

impl Effect {
    /// As it stands in [`super::LogEntry::faults`].
    pub fn label(&self) -> &'static str {
        match self {
            Self::Before(_) => "before",
            Self::After(_) => "after",
            Self::Delay(_) => "delay",
            Self::SlowDown { .. } => "slow-down",
            Self::InternalError => "internal-error",
            Self::AccessDenied => "access-denied",
            Self::Forbidden { .. } => "forbidden",
            Self::ResetAfter { .. } => "reset-after",
            Self::CloseAfter { .. } => "close-after",
            Self::StallAfter { .. } => "stall-after",
            Self::FlipByte { .. } => "flip-byte",
            Self::WrongContentRange => "wrong-content-range",
            Self::WrongETag => "wrong-etag",
            Self::ShortContentLength { .. } => "short-content-length",
            Self::IgnoreRange => "ignore-range",
            Self::IgnoreIfMatch => "ignore-if-match",
            Self::Outage => "outage",
        }
    }
}

/// Sees every request before it is answered and returns what shall happen to it.
pub type Hook = Box<dyn Fn(&RequestInfo) -> Vec<Effect> + Send + Sync>;

/// An [`Effect`] and the requests it is for: by default the next one, of any kind, for any key.
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    op: Option<Op>,
    key: Option<String>,
    /// Matching requests that it passes over first.
    skip: u64,
    /// Matching requests that it is for then.
    times: u64,
}

impl Fault {
    /// `effect` for the next request.
    pub fn new(effect: Effect) -> Self {
        Self {
            effect,
            op: None,
            key: None,
            skip: 0,
            times: 1,
        }
    }

    /// Only for requests of this kind.
    #[must_use]
    pub fn on(mut self, op: Op) -> Self {
        self.op = Some(op);
        self
    }

    /// Only for requests for exactly this key.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Only for the `nth` matching request from now on, counted from 1.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        (self.skip, self.times) = (nth.saturating_sub(1), 1);
        self
    }

    /// For the next `times` matching requests.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        (self.skip, self.times) = (0, times);
        self
    }

    fn matches(&self, request: &RequestInfo) -> bool {
        self.op.is_none_or(|op| op == request.op)
            && self.key.as_ref().is_none_or(|key| *key == request.key)
    }
}

/// The faults that wait for their request.
#[derive(Default)]
pub(super) struct Script {
    faults: Vec<Fault>,
}

impl Script {
    pub(super) fn add(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.faults.clear();
    }

    /// The effects for this request, in the order they were scripted. Those that are used up go.
    pub(super) fn effects(&mut self, request: &RequestInfo) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.faults.retain_mut(|fault| {
            if !fault.matches(request) {
                return true;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                return true;
            }
            if fault.times > 0 {
                effects.push(fault.effect.clone());
            }
            fault.times = fault.times.saturating_sub(1);
            fault.times > 0
        });
        effects
    }
}

/// What one request is in for: the sum of its effects.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) before: Vec<Mutation>,
    pub(super) after: Vec<Mutation>,
    pub(super) delay: Duration,
    pub(super) refusal: Option<Refusal>,
    pub(super) ignore: Ignore,
    pub(super) wrong_etag: bool,
    pub(super) wrong_content_range: bool,
    pub(super) missing: u64,
    pub(super) body: BodyPlan,
    pub(super) outage: bool,
}

/// What the store's side shall not see. Travels to it in the request's extensions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ignore {
    pub(super) range: bool,
    pub(super) if_match: bool,
}

/// What happens to the body on its way out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BodyPlan {
    pub(super) cut: Option<(u64, Cut)>,
    pub(super) stall: Option<(u64, Option<Duration>)>,
    pub(super) flip: Option<u64>,
}

/// How a connection ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// RST.
    Reset,
    /// FIN.
    Close,
}

/// An answer that never reaches the store.
#[derive(Clone, Copy, Debug)]
pub(super) enum Refusal {
    SlowDown { retry_after: Option<u32> },
    InternalError,
    Forbidden { code: &'static str },
}

impl Plan {
    /// Later effects of the same kind win, except that mutations and delays add up.
    pub(super) fn new(effects: Vec<Effect>) -> Self {
        let mut plan = Self::default();
        for effect in effects {
            match effect {
                Effect::Before(mutation) => plan.before.push(mutation),
                Effect::After(mutation) => plan.after.push(mutation),
                Effect::Delay(delay) => plan.delay += delay,
                Effect::SlowDown { retry_after } => {
                    plan.refusal = Some(Refusal::SlowDown { retry_after });
                }
                Effect::InternalError => plan.refusal = Some(Refusal::InternalError),
                Effect::AccessDenied => {
                    let code = "AccessDenied";
                    plan.refusal = Some(Refusal::Forbidden { code });
                }
                Effect::Forbidden { code } => plan.refusal = Some(Refusal::Forbidden { code }),
                Effect::ResetAfter { bytes } => plan.body.cut = Some((bytes, Cut::Reset)),
                Effect::CloseAfter { bytes } => plan.body.cut = Some((bytes, Cut::Close)),
                Effect::StallAfter { bytes, duration } => {
                    plan.body.stall = Some((bytes, duration));
                }
                Effect::FlipByte { at } => plan.body.flip = Some(at),
                Effect::WrongContentRange => plan.wrong_content_range = true,
                Effect::WrongETag => plan.wrong_etag = true,
                Effect::ShortContentLength { missing } => plan.missing = missing,
                Effect::IgnoreRange => plan.ignore.range = true,
                Effect::IgnoreIfMatch => plan.ignore.if_match = true,
                Effect::Outage => plan.outage = true,
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(op: Op, key: &str) -> RequestInfo {
        RequestInfo {
            sequence: 1,
            connection: 1,
            op,
            method: "GET".to_owned(),
            bucket: "b".to_owned(),
            key: key.to_owned(),
            range: None,
            if_match: None,
            if_none_match: None,
            version_id: None,
        }
    }

    #[test]
    fn counted_faults_skip_apply_and_go() {
        let mut script = Script::default();
        script.add(
            Fault::new(Effect::InternalError)
                .on(Op::Get)
                .key("k")
                .nth(2),
        );
        script.add(Fault::new(Effect::AccessDenied).times(2));
        let mut hits = |op, key| script.effects(&request(op, key));
        assert_eq!(hits(Op::Head, "k"), [Effect::AccessDenied]);
        assert_eq!(hits(Op::Get, "k"), [Effect::AccessDenied]);
        assert_eq!(hits(Op::Get, "other"), []);
        assert_eq!(hits(Op::Get, "k"), [Effect::InternalError]);
        assert_eq!(hits(Op::Get, "k"), []);
    }

    #[test]
    fn a_star_is_no_guard() {
        let mut star = request(Op::Get, "k");
        star.if_match = Some("*".to_owned());
        assert!(!star.guarded());
        star.if_match = Some("\"x\"".to_owned());
        assert!(star.guarded());
    }
}
