//! The bytes of one response: what the disk holds, then what fills bring, then past the disk.
//!
//! A [`Reader`] is asked for the next chunk at the start of a range and answers with the first
//! of these that has it:
//!
//! 1. an extent that coverage mints: the warm path, which neither awaits nor allocates;
//! 2. an extent behind the cursor of a fill, joined or started for what is missing; as the response
//!    advances, further fills are started ahead of it, never more than `fan_out` at a time,
//!    so a stalled client holds none (P9);
//! 3. where the disk cannot take the bytes, frames of a guarded read of its own (P10).
//!
//! [`Reader::prepare`] is the hold-back (P3): it returns once the response can begin. An error
//! after that cuts the body.
//!
//! What a reader names by an extent may still fail while it is sent, when the reader is long gone. Its
//! [`Means`] stay behind for that: another reader over the same source finds the file reported as
//! unreadable and has it fetched again, or reads past the disk from the start.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{Forwarded, OpenError, TierSettings, Trace};
use crate::disk::{FileExtent, HeldRevision, Step};
use crate::fill::{FillError, FillSource, Filler, Follow, Span};
use crate::origin::{ALWAYS, Download};
use crate::payload::{BodyError, ChunkSource, Payload, Rescue, Way};
use crate::remote::RemoteError;
use crate::semantics::ByteRange;

/// Where a response's bytes come from.
pub struct Reader {
    state: State,
}

enum State {
    Idle(Inner),
    Waiting(BoxFuture<'static, (Inner, Result<Payload, OpenError>)>),
    /// After an error.
    Broken,
}

/// What it takes to read a revision: all that a reader has before it begins.
pub(super) struct Means {
    filler: Arc<Filler>,
    settings: TierSettings,
    pub(super) source: FillSource,
}

struct Inner {
    means: Arc<Means>,
    held: Option<Arc<HeldRevision>>,
    /// The whole response, until its first chunk is asked for.
    first: Option<FileExtent>,
    /// Fills under way at or beyond the position, by position.
    follows: Vec<Follow>,
    /// Everything was on disk when the response began.
    complete: bool,
    /// Boxed: few readers have one, and all are moved about.
    direct: Option<Box<Direct>>,
    /// The disk is not to be asked: a rescue from one that hangs.
    past_disk: bool,
}

/// Flights that end without their bytes turning up on disk, before the disk is passed by: it evicts as
/// fast as it is filled.
const PATIENCE: usize = 3;

impl Reader {
    pub(super) fn new(
        filler: Arc<Filler>,
        settings: TierSettings,
        source: FillSource,
        held: Option<Arc<HeldRevision>>,
    ) -> Self {
        let means = Means {
            filler,
            settings,
            source,
        };
        Self {
            state: State::Idle(Inner::new(Arc::new(means), held, false)),
        }
    }

    /// For a response of one range that the disk holds, in one open file: nothing has to be prepared.
    pub(super) fn whole(
        filler: Arc<Filler>,
        settings: TierSettings,
        source: FillSource,
        held: Option<Arc<HeldRevision>>,
        extent: FileExtent,
    ) -> Self {
        let mut reader = Self::new(filler, settings, source, held);
        if let State::Idle(inner) = &mut reader.state {
            inner.complete = true;
            inner.first = Some(extent);
        }
        reader
    }

    /// What reads the same revision again, where the disk holds all of the response in one open file.
    pub(super) fn means_of_whole(&self) -> Option<&Arc<Means>> {
        match &self.state {
            State::Idle(inner) if inner.first.is_some() => Some(&inner.means),
            State::Idle(_) | State::Waiting(_) | State::Broken => None,
        }
    }

    pub(super) async fn prepare(
        &mut self,
        ranges: &[ByteRange],
        trace: &mut Trace,
    ) -> Result<(), OpenError> {
        match &mut self.state {
            State::Idle(inner) => {
                if inner.is_whole(ranges) {
                    return Ok(());
                }
                // Boxed: a warm request is not to carry the size of a cold one.
                Box::pin(inner.prepare(ranges, trace)).await
            }
            State::Waiting(_) | State::Broken => {
                unreachable!("a reader is prepared before its first chunk")
            }
        }
    }
}

impl ChunkSource for Reader {
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        range: ByteRange,
    ) -> Poll<Result<Payload, BodyError>> {
        loop {
            match std::mem::replace(&mut self.state, State::Broken) {
                State::Idle(mut inner) => {
                    if let Some(payload) = inner.at_hand(range) {
                        self.state = State::Idle(inner);
                        return Poll::Ready(Ok(payload));
                    }
                    self.state = State::Waiting(Box::pin(async move {
                        let result = inner.next(range).await;
                        (inner, result)
                    }));
                }
                State::Waiting(mut future) => {
                    let (inner, result) = match future.as_mut().poll(cx) {
                        Poll::Ready(done) => done,
                        Poll::Pending => {
                            self.state = State::Waiting(future);
                            return Poll::Pending;
                        }
                    };
                    return Poll::Ready(match result {
                        Ok(payload) => {
                            self.state = State::Idle(inner);
                            Ok(payload)
                        }
                        Err(error) => Err(BodyError::new(reason(&error), error)),
                    });
                }
                State::Broken => {
                    return Poll::Ready(Err(BodyError::new("broken", FillError::Stopped)));
                }
            }
        }
    }

    fn rescue(&self) -> Option<Arc<dyn Rescue>> {
        match &self.state {
            State::Idle(inner) => Some(Arc::clone(&inner.means) as Arc<dyn Rescue>),
            State::Waiting(_) | State::Broken => None,
        }
    }
}

impl Rescue for Means {
    fn source(self: Arc<Self>, way: Way) -> Box<dyn ChunkSource> {
        Box::new(Reader {
            state: State::Idle(Inner::new(self, None, way == Way::PastDisk)),
        })
    }
}

/// Why a body was cut, as a metric label.
fn reason(error: &OpenError) -> &'static str {
    match error.remote_kind() {
        Some(kind) => kind.label(),
        None => "fill",
    }
}

impl Inner {
    fn new(means: Arc<Means>, held: Option<Arc<HeldRevision>>, past_disk: bool) -> Self {
        Self {
            means,
            held,
            first: None,
            follows: Vec::new(),
            complete: false,
            direct: None,
            past_disk,
        }
    }

    /// The next chunk if it is on disk and nothing has to be awaited.
    fn at_hand(&mut self, range: ByteRange) -> Option<Payload> {
        if let Some(extent) = self.first.take() {
            return Some(Payload::File(extent));
        }
        let Step::Present(extent) = self.held.as_ref()?.step(range) else {
            return None;
        };
        if !self.complete {
            self.read_ahead(range);
        }
        Some(Payload::File(extent))
    }

    /// Whether the response can begin at once and never has to wait for the remote.
    fn is_whole(&mut self, ranges: &[ByteRange]) -> bool {
        self.complete = match (&self.held, ranges.first()) {
            (Some(held), Some(first)) => {
                matches!(held.step(*first), Step::Present(_))
                    && ranges
                        .iter()
                        .all(|range| held.first_missing(*range).is_none())
            }
            _ => false,
        };
        self.complete
    }

    async fn next(&mut self, range: ByteRange) -> Result<Payload, OpenError> {
        let mut vanished = 0;
        loop {
            if !self.past_disk {
                self.catch_up();
                if let Some(payload) = self.at_hand(range) {
                    return Ok(payload);
                }
                if vanished < PATIENCE && self.opened(range).await {
                    vanished += 1;
                    continue;
                }
            }
            self.complete = false;
            match self
                .direct
                .as_mut()
                .map(|direct| direct.offset.cmp(&range.start()))
            {
                Some(std::cmp::Ordering::Equal) => {
                    if let Some(bytes) = self.direct_chunk(range).await? {
                        return Ok(Payload::Memory(bytes));
                    }
                    self.direct = None;
                }
                Some(std::cmp::Ordering::Less) => self.direct = None,
                Some(std::cmp::Ordering::Greater) | None => {}
            }
            if self.past_disk || vanished >= PATIENCE {
                self.open_direct(self.gap(range)).await?;
                continue;
            }
            self.read_ahead(range);
            let Some(follow) = self
                .follows
                .first_mut()
                .filter(|follow| follow.span().start <= range.start())
            else {
                // Nothing is missing any more, or what the flights brought is gone again; the next turn
                // finds out, and joins from here.
                self.follows.clear();
                vanished += 1;
                continue;
            };
            match follow.extent(range).await {
                Ok(Some(extent)) => {
                    if self.held.is_none() {
                        self.held = Some(follow.answered().await?.held);
                    }
                    self.read_ahead(range);
                    return Ok(Payload::File(extent));
                }
                Ok(None) => {
                    vanished += 1;
                    self.follows.remove(0);
                }
                Err(error) if error.is_purged() => {
                    vanished += 1;
                    self.follows.clear();
                }
                Err(FillError::Disk(_)) => {
                    self.follows.clear();
                    self.open_direct(self.gap(range)).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Finds what has arrived in the tier's memory since, and lets go of what was purged.
    fn catch_up(&mut self) {
        if self.held.as_ref().is_none_or(|held| held.is_doomed()) {
            self.held = self.means.filler.arrived_of(&self.means.source);
        }
    }

    /// Opens the file at the start of `range` if there is one and it is closed, or finds it gone:
    /// then the step says Missing.
    async fn opened(&mut self, range: ByteRange) -> bool {
        let Some(held) = &self.held else {
            return false;
        };
        let closed = matches!(held.step(range), Step::Closed);
        if closed {
            held.open_at(range.start()).await;
        }
        closed
    }

    /// Keeps up to `fan_out` fills going from the start of `range` on, as far as it reaches.
    ///
    /// Fills that are over do not count: the parts of a window that were begun at once end at once, and the remote would
    /// idle while the client catches up. So they are what is bounded, at as much again.
    fn read_ahead(&mut self, range: ByteRange) {
        self.follows
            .retain(|follow| follow.span().end > range.start());
        if self.direct.is_some() {
            return;
        }
        let reached = self
            .follows
            .last()
            .map_or_else(|| range.start(), |follow| follow.span().end);
        let TierSettings {
            fan_out, part_size, ..
        } = self.means.settings;
        let ahead = part_size.saturating_mul(2 * fan_out as u64);
        let end = range.end().min(range.start().saturating_add(ahead));
        if reached >= end {
            return;
        }
        let under_way = self
            .follows
            .iter()
            .filter(|follow| !follow.is_over())
            .count();
        let room = fan_out.saturating_sub(under_way);
        if room == 0 {
            return;
        }
        let want = Span {
            start: reached,
            end,
        };
        self.follows.extend(self.means.filler.join(
            &self.means.source,
            self.held.as_deref(),
            want,
            room,
        ));
    }

    fn gap(&self, range: ByteRange) -> ByteRange {
        match &self.held {
            Some(held) => held.first_missing(range).unwrap_or(range),
            None => range,
        }
    }

    async fn prepare(&mut self, ranges: &[ByteRange], trace: &mut Trace) -> Result<(), OpenError> {
        let Some(first) = ranges.first().copied() else {
            return Ok(());
        };
        let started = Instant::now();
        let heard = trace.own;
        let mut vanished = 0;
        loop {
            self.catch_up();
            if vanished < PATIENCE && self.opened(first).await {
                vanished += 1;
                continue;
            }
            let gap = match &self.held {
                None => Some(first),
                // The disk hangs; it would be said after the head otherwise, and the remote not asked before.
                Some(held) if matches!(held.step(first), Step::Closed) => {
                    return self.hold_back_direct(first, trace, started).await;
                }
                Some(held) => ranges.iter().find_map(|range| held.first_missing(*range)),
            };
            let Some(gap) = gap else {
                self.complete = true;
                trace.disk += started.elapsed();
                return Ok(());
            };
            if trace.forwarded.is_none() {
                trace.forwarded = Some(if gap.start() == first.start() {
                    Forwarded::Miss
                } else {
                    Forwarded::Partial
                });
            }
            if vanished >= PATIENCE {
                return self.hold_back_direct(gap, trace, started).await;
            }
            let within = ranges
                .iter()
                .find_map(|range| {
                    range
                        .intersect(gap)
                        .and_then(|_| range.from_offset(gap.start()))
                })
                .unwrap_or(gap);
            self.follows.clear();
            self.read_ahead(within);
            match self.hold_back(first, gap, within, heard).await {
                Ok(at_hand) => {
                    // Said here and not at the end: a flight may be over before its bytes are looked for.
                    trace.stored |= !self.follows.is_empty();
                    self.follows.iter().for_each(|follow| trace.joined(follow));
                    if at_hand {
                        trace.remote += started.elapsed();
                        return Ok(());
                    }
                    vanished += 1;
                }
                Err(error) if error.is_purged() => vanished += 1,
                Err(FillError::Disk(_)) => {
                    self.follows.clear();
                    return self.hold_back_direct(gap, trace, started).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the remote's answer to the first missing stretch, to all of them where the range is no
    /// longer than a part (so that a response of one GET each for two gaps is not cut between
    /// them), and for the first byte where it is missing. `false`: things changed; look again.
    ///
    /// What others' flights were answered before counts as held: it says nothing of what the remote has now. Unless
    /// the remote has been `heard` on behalf of this request, that takes the answer to a later one.
    async fn hold_back(
        &mut self,
        first: ByteRange,
        gap: ByteRange,
        within: ByteRange,
        heard: bool,
    ) -> Result<bool, FillError> {
        let wide = within.len() > self.means.settings.part_size;
        for follow in &mut self.follows {
            let news = heard || !follow.has_answer();
            let answered = follow.answered().await?;
            self.held.get_or_insert(answered.held);
            if wide && news {
                break;
            }
        }
        match self.follows.first_mut() {
            None => Ok(false),
            Some(_) if gap.start() != first.start() => Ok(true),
            Some(follow) => Ok(follow.extent(gap).await?.is_some()),
        }
    }

    async fn hold_back_direct(
        &mut self,
        gap: ByteRange,
        trace: &mut Trace,
        started: Instant,
    ) -> Result<(), OpenError> {
        self.open_direct(gap).await?;
        trace.remote += started.elapsed();
        Ok(())
    }

    /// Opens a guarded read past the disk and waits for its first frame.
    async fn open_direct(&mut self, gap: ByteRange) -> Result<(), OpenError> {
        let origin = self.means.source.origin(self.means.filler.origins());
        let guard = self.means.source.guard();
        let download = origin
            .download(guard, gap.start(), gap.end(), ALWAYS)
            .await?;
        let mut direct = Direct {
            offset: gap.start(),
            end: gap.end(),
            download,
            ready: Bytes::new(),
        };
        direct.frame().await?;
        self.direct = Some(Box::new(direct));
        Ok(())
    }

    async fn direct_chunk(&mut self, range: ByteRange) -> Result<Option<Bytes>, OpenError> {
        let Some(direct) = &mut self.direct else {
            return Ok(None);
        };
        if direct.offset >= direct.end {
            return Ok(None);
        }
        direct.frame().await?;
        let most = usize::try_from(range.len()).unwrap_or(usize::MAX);
        let chunk = direct.ready.split_to(direct.ready.len().min(most));
        direct.offset += chunk.len() as u64;
        Ok(Some(chunk))
    }
}

/// A guarded read past the disk, for one response.
struct Direct {
    offset: u64,
    end: u64,
    download: Download,
    /// At `offset`: the one frame that is held.
    ready: Bytes,
}

impl Direct {
    /// Makes `ready` not empty, where there is something left.
    async fn frame(&mut self) -> Result<(), RemoteError> {
        if self.ready.is_empty() {
            let mut frames = self.download.frames(1, ALWAYS).await?;
            self.ready = frames.pop().unwrap_or_default();
        }
        Ok(())
    }
}
