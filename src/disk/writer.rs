//! Writing: bytes in order into segment files.
//!
//! A [`BlockWriter`] walks its range once. On entering a segment it claims the blocks it will
//! write in a file of this run where nobody has touched them, or makes a new file; so each block of
//! a file is written by one writer, once. At each block's start it spends reservation, at its end
//! the block is covered in memory and queued for the durability thread.
//!
//! The kernel keeps what one write brings to an aligned stretch in one piece, a large folio, and each warm read pays for
//! every piece that it touches. So bytes are written in whole steps, however they came: what does not fill one is put
//! aside until more comes, or until [`BlockWriter::flush`] ends the wait. Writers are many and memory is not, so only some put
//! aside up to a whole step, and the others up to a [`LEAST_STEP`].
//!
//! Its [`WriterView`] lets others send up to the cursor, in the middle of a block too: those bytes are in the
//! page cache and will not change. A block that the writer leaves unfinished stays claimed: it can
//! never be completed in that file, and whoever fetches it again gets another one.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::DiskError;
use super::coverage::Coverage;
use super::durability::CompletedBlock;
use super::extent::{FileExtent, SegmentFile};
use super::failpoint::Step;
use super::held::{HeldRevision, Segment, SegmentKey};
use super::room::{Charge, Reservation};
use super::sums::SumDigest;
use super::watch::Watch;
use crate::semantics::ByteRange;

/// Bytes of one write where nothing speaks against it. More are not worth their wait, and hold the inode's lock against
/// senders where the file system has one (XFS): 1 MiB stalled sendfile by 2.4 ms (p99).
pub(super) const LONGEST_STEP: u64 = 256 << 10;

/// Bytes of one write at least, where so many come in time.
pub const LEAST_STEP: u64 = 64 << 10;

/// How many writers may put aside more than a [`LEAST_STEP`] at a time: 16 MiB in all.
pub(super) const LONG_STEPS: usize = 64;

/// How long the writes of a tier are, and what its writers share for it.
pub(super) struct Steps {
    longest: u64,
    /// Leave to put aside more than a least step.
    leave: Arc<Semaphore>,
}

impl Steps {
    /// `longest`: a multiple of [`LEAST_STEP`].
    pub(super) fn new(longest: u64) -> Self {
        Self {
            longest,
            leave: Arc::new(Semaphore::new(LONG_STEPS)),
        }
    }

    #[cfg(test)]
    pub(super) fn has_leave_for(&self) -> usize {
        self.leave.available_permits()
    }
}

/// The longest step that this machine takes as cheaply as shorter ones.
///
/// A virtual machine may give its free memory back to the host in blocks (free page reporting). What is as large as such a block
/// is always made of memory that has to be fetched back first, page by page, which takes several times the CPU of the write.
pub(super) fn longest_step() -> u64 {
    let order = fs::read_to_string("/sys/module/page_reporting/parameters/page_reporting_order");
    longest_below(order.ok().as_deref(), rustix::param::page_size() as u64)
}

/// `order`: of the blocks that the kernel gives back, as it says it; beyond all reason where it gives none.
fn longest_below(order: Option<&str>, page_size: u64) -> u64 {
    order
        .and_then(|order| order.trim().parse::<u32>().ok())
        .and_then(|order| 1_u64.checked_shl(order)?.checked_mul(page_size))
        .map_or(LONGEST_STEP, |block| {
            (block / 2).clamp(LEAST_STEP, LONGEST_STEP)
        })
}

/// Bytes of one turn on a thread that may block: a fraction of a millisecond, after which those who follow hear of
/// them.
pub(super) const PULL: u64 = 512 << 10;

/// Writes a stretch in order; makes its first file with the first bytes. Dropping it keeps the completed blocks; a started
/// block is not kept.
pub struct BlockWriter {
    /// `None` while a write is under way, and for good if its future was dropped.
    cursor: Option<Cursor>,
    view: Arc<WriterView>,
    watch: Arc<Watch>,
}

impl BlockWriter {
    pub(super) fn new(held: Arc<HeldRevision>, range: ByteRange, reservation: Reservation) -> Self {
        let g = held.geometry;
        let aligned = |offset: u64| offset.is_multiple_of(g.block_size);
        assert!(
            aligned(range.start()),
            "a writer starts in the middle of a block: {range:?}"
        );
        assert!(
            range.end() == g.size || (aligned(range.end()) && range.end() < g.size),
            "a writer ends in the middle of a block or beyond the end: {range:?} of {}",
            g.size
        );
        let watch = Arc::clone(&held.shared.watch);
        let view = Arc::new(WriterView {
            start: range.start(),
            cursor: AtomicU64::new(range.start()),
            pieces: Mutex::default(),
        });
        Self {
            cursor: Some(Cursor {
                held,
                at: range.start(),
                end: range.end(),
                aside: Vec::new(),
                aside_since: Instant::now(),
                long_step: None,
                reservation,
                digest: SumDigest::default(),
                segment: None,
                view: Arc::clone(&view),
            }),
            view,
            watch,
        }
    }

    /// Appends what `next` takes from `source`, until it has nothing more or [`PULL`] bytes are taken, and gives
    /// `source` back. It is asked on the thread that writes, off the runtime's workers, so it may read sockets, but must
    /// not wait. The cursor moves as the bytes reach the page cache. Blocks completed on the way are covered in memory
    /// at once and committed later (data synced first). The first bytes are written as they come; of later ones the
    /// last may be [held back](Self::holds_back_since).
    ///
    /// Cancelling leaves bytes to be written or not, and the writer fit only to be dropped.
    ///
    /// # Errors
    /// [`DiskError::NoRoom`] when the reservation is used up or the file was dropped as bad,
    /// [`DiskError::Purged`], [`DiskError::Io`], or [`DiskError::Hangs`] when the disk does not take them in
    /// time; what hangs may still be written. The cursor tells what was written all the same; the writer
    /// is fit only to be dropped, and `source` is lost.
    ///
    /// # Panics
    /// If `source` reaches beyond the range, or after a call that was cancelled or failed.
    pub async fn pull<S: Send + 'static>(
        &mut self,
        mut source: S,
        next: fn(&mut S) -> Option<Bytes>,
    ) -> Result<S, DiskError> {
        self.run(move |cursor| {
            if cursor.segment.is_none() && cursor.at < cursor.end {
                // Before a byte is taken: where the disk takes no new file, nothing is lost but the source.
                cursor.enter()?;
            }
            let until = cursor.at + PULL;
            while cursor.at < until
                && let Some(bytes) = next(&mut source)
            {
                cursor.write(&bytes)?;
            }
            Ok(source)
        })
        .await
    }

    /// Since when bytes wait for those that follow them, to be written together: less than 256 KiB. `None`: none wait.
    pub fn holds_back_since(&self) -> Option<Instant> {
        let cursor = self.cursor.as_ref()?;
        (!cursor.aside.is_empty()).then_some(cursor.aside_since)
    }

    /// Writes what is held back, up to a multiple of [`LEAST_STEP`] if it reaches one. The rest of it waits
    /// [from now on](Self::holds_back_since).
    ///
    /// # Errors
    /// As [`BlockWriter::pull`].
    ///
    /// # Panics
    /// As there.
    pub async fn flush(&mut self) -> Result<(), DiskError> {
        self.run(|cursor| {
            if !cursor.aside.is_empty() {
                cursor.step(&[])?;
                cursor.aside_since = Instant::now();
            }
            Ok(())
        })
        .await
    }

    /// Appends bytes that are there already, as [`BlockWriter::pull`] does, and holds nothing back.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub async fn write(&mut self, chunks: Vec<Bytes>) -> Result<(), DiskError> {
        let mut chunks = VecDeque::from(chunks);
        while !chunks.is_empty() {
            chunks = self.pull(chunks, VecDeque::pop_front).await?;
        }
        while self.holds_back_since().is_some() {
            self.flush().await?;
        }
        Ok(())
    }

    /// Has `work` done on a thread that may block.
    async fn run<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Cursor) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        let mut cursor = self
            .cursor
            .take()
            .expect("the last write completed, as the contract demands");
        let limit = self.watch.limits.write;
        let written = self.watch.run("write to a segment", limit, move || {
            let result = work(&mut cursor)?;
            Ok((cursor, result))
        });
        let (cursor, result) = written.await?;
        self.cursor = Some(cursor);
        Ok(result)
    }

    /// A shared view for those who send behind the cursor.
    pub fn view(&self) -> Arc<WriterView> {
        Arc::clone(&self.view)
    }
}

/// What a writer has written so far, readable by anyone; outlives the writer.
pub struct WriterView {
    start: u64,
    cursor: AtomicU64,
    /// Ascending. Keeps the files from being evicted.
    pieces: Mutex<Vec<Piece>>,
}

/// The writer's stretch of one segment file.
struct Piece {
    end: u64,
    /// Where the segment starts in the revision.
    base: u64,
    file: Arc<SegmentFile>,
}

impl WriterView {
    /// Offset (in the revision) up to which bytes can be sent.
    pub fn cursor(&self) -> u64 {
        self.cursor.load(Ordering::Acquire)
    }

    /// The longest extent at the start of `range` that is behind the cursor, within one segment.
    pub fn extent(&self, range: ByteRange) -> Option<FileExtent> {
        let (start, cursor) = (range.start(), self.cursor());
        if start < self.start || start >= cursor {
            return None;
        }
        let pieces = self.pieces.lock();
        let piece = &pieces[pieces.partition_point(|piece| piece.end <= start)];
        let end = range.end().min(cursor).min(piece.end);
        Some(FileExtent::new(
            Arc::clone(&piece.file),
            start - piece.base,
            end - start,
        ))
    }
}

/// The writing half: lives on the blocking pool while a write is under way.
struct Cursor {
    held: Arc<HeldRevision>,
    /// Up to where it is written.
    at: u64,
    end: u64,
    /// What was taken beyond it: less than up to the end of the step. A copy, so that no buffer is kept for it.
    aside: Vec<u8>,
    /// When the first of that was.
    aside_since: Instant,
    /// Leave to put aside up to a whole step.
    long_step: Option<OwnedSemaphorePermit>,
    reservation: Reservation,
    /// Over the bytes of the block under way.
    digest: SumDigest,
    /// The segment that `at` lies in, once entered.
    segment: Option<Entered>,
    view: Arc<WriterView>,
}

/// A block of the revision, in bytes of it.
struct Block {
    index: u32,
    start: u64,
    end: u64,
}

struct Entered {
    key: SegmentKey,
    incarnation: u128,
    file: Arc<SegmentFile>,
    /// Where the writer leaves it.
    end: u64,
}

impl Cursor {
    /// Writes whole steps, and puts aside what is over.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), DiskError> {
        while !bytes.is_empty() {
            let reached = self.at + self.aside.len() as u64;
            assert!(reached < self.end, "more bytes than the writer's range");
            if self.segment.is_none() {
                self.enter()?;
            }
            // Somebody may be waiting for the first ones.
            let is_first = self.at == self.view.start;
            if !is_first && !self.fill_a_step(bytes.len() as u64) {
                if self.aside.is_empty() {
                    self.aside_since = Instant::now();
                }
                self.aside.reserve_exact(bytes.len());
                self.aside.extend_from_slice(bytes);
                break;
            }
            let written = self.step(bytes)?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// The block that `at` lies in. A segment has been entered.
    fn block(&self) -> Block {
        let g = self.held.geometry;
        let segment = self.segment.as_ref().expect("entered");
        let index = g.block_of(self.at);
        Block {
            index,
            start: g.blocks_end(segment.key.idx, index),
            end: g.blocks_end(segment.key.idx, index + 1),
        }
    }

    /// Whether what was put aside and so many bytes `more` are enough for a write. If they are not, there is leave to put them
    /// aside.
    fn fill_a_step(&mut self, more: u64) -> bool {
        let reached = self.at + self.aside.len() as u64 + more;
        let steps = &self.held.shared.steps;
        if reached >= self.step_end(steps.longest) {
            return true;
        }
        if self.long_step.is_none() {
            self.long_step = Arc::clone(&steps.leave).try_acquire_owned().ok();
        }
        self.long_step.is_none() && reached >= self.step_end(LEAST_STEP)
    }

    /// The next multiple of `step`, since the kernel makes large folios only where they are aligned, or the block's end.
    fn step_end(&self, step: u64) -> u64 {
        (self.at - self.at % step + step).min(self.block().end)
    }

    /// One write, of what was put aside and what of `bytes` belongs to the same step: the whole of it, else whole least steps of
    /// it, else what there is. Returns how much of `bytes` that was.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, DiskError> {
        let block = self.block();
        let held = Arc::clone(&self.held);
        let segment = self.segment.as_ref().expect("entered");
        if self.at == block.start
            && !self.reservation.spend(
                segment.file.charge(),
                held.geometry.taken(block.end - block.start),
            )
        {
            return Err(DiskError::NoRoom);
        }
        let reached = self.at + (self.aside.len() + bytes.len()) as u64;
        let longest = self.step_end(held.shared.steps.longest);
        let end = match reached - reached % LEAST_STEP {
            _ if reached >= longest => longest,
            least if least > self.at => least,
            _ => reached,
        };
        let len = usize::try_from(end - self.at).expect("a step");
        let aside = &self.aside[..self.aside.len().min(len)];
        let bytes = &bytes[..len - aside.len()];
        let slices = [IoSlice::new(aside), IoSlice::new(bytes)];
        let offset = self.at - held.geometry.segment_start(segment.key.idx);
        let written = loop {
            match rustix::io::pwritev(segment.file.file(), &slices, offset) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                other => break other.map_err(io::Error::from),
            }
        };
        let written = written.map_err(|error| {
            let path = held.shared.segment_path(segment.incarnation);
            held.shared.trouble.note("write", &path, &error);
            DiskError::io("write", &path, error)
        })?;
        held.shared.reached(Step::BytesWritten);
        held.shared.trouble.over();
        let from_aside = written.min(self.aside.len());
        let taken = written - from_aside;
        self.digest.update(&self.aside[..from_aside]);
        self.digest.update(&bytes[..taken]);
        if from_aside == self.aside.len() {
            // Its memory too: flights may be hundreds.
            self.aside = Vec::new();
            self.long_step = None;
        } else {
            self.aside.drain(..from_aside);
        }
        self.at += written as u64;
        self.view.cursor.store(self.at, Ordering::Release);
        if self.at == block.end {
            self.complete(block.index, block.end - block.start)?;
        }
        Ok(taken)
    }

    /// Finds or makes the file for the segment that `at` lies in, and claims the blocks.
    fn enter(&mut self) -> Result<(), DiskError> {
        let held = &self.held;
        let g = held.geometry;
        let idx = g.segment_of(self.at);
        let end = self.end.min(g.segment_end(idx));
        let blocks = g.block_of(self.at)..=g.block_of(end - 1);
        let _creating = held.creating.lock();
        let mut entered = None;
        {
            let mut state = held.state.lock();
            if held.is_doomed() {
                return Err(DiskError::Purged);
            }
            for (key, segment) in state.files_mut(idx) {
                if let (Some(claimed), Some(file)) = (&mut segment.claimed, &segment.file)
                    && claimed.first_present(*blocks.start()) > *blocks.end()
                {
                    blocks.clone().for_each(|block| claimed.insert(block));
                    segment.writers += 1;
                    entered = Some(Entered {
                        key: *key,
                        incarnation: segment.incarnation,
                        file: Arc::clone(file),
                        end,
                    });
                    break;
                }
            }
        }
        let entered = if let Some(entered) = entered {
            entered
        } else {
            let mut claimed = Coverage::empty(g.blocks_in(idx));
            blocks.for_each(|block| claimed.insert(block));
            create(held, idx, claimed, end)?
        };
        self.view.pieces.lock().push(Piece {
            end,
            base: g.segment_start(idx),
            file: Arc::clone(&entered.file),
        });
        self.segment = Some(entered);
        Ok(())
    }

    /// The block is whole: covers it, and has it made durable.
    fn complete(&mut self, block: u32, len: u64) -> Result<(), DiskError> {
        let sum = self.digest.finish_reset();
        let segment = self.segment.as_ref().expect("the block lies in it");
        {
            let mut state = self.held.state.lock();
            let Some(covered) = state.segments.get_mut(&segment.key) else {
                // Taken away under us.
                return Err(if self.held.is_doomed() {
                    DiskError::Purged
                } else {
                    DiskError::NoRoom
                });
            };
            covered.coverage.insert(block);
            covered.last_used = self.held.shared.tick();
        }
        self.held.shared.queue.completed(CompletedBlock {
            held: Arc::clone(&self.held),
            key: segment.key,
            file: Arc::clone(&segment.file),
            block,
            sum,
            len,
        });
        if self.at == segment.end {
            self.leave();
        }
        Ok(())
    }

    /// Gives up the claim on blocks that were not begun, and the file if nothing is in it.
    fn leave(&mut self) {
        let Some(entered) = self.segment.take() else {
            return;
        };
        let g = self.held.geometry;
        let begun = self.at.next_multiple_of(g.block_size);
        let queue = &self.held.shared.queue;
        let mut state = self.held.state.lock();
        let Some(segment) = state.segments.get_mut(&entered.key) else {
            return;
        };
        segment.writers -= 1;
        if let Some(claimed) = &mut segment.claimed
            && begun < entered.end
        {
            (g.block_of(begun)..=g.block_of(entered.end - 1))
                .for_each(|block| claimed.remove(block));
        }
        if segment.coverage.is_empty() && segment.writers == 0 {
            segment.charge.unlink();
            state.segments.remove(&entered.key);
            drop(state);
            queue.unlink(entered.incarnation);
        } else if self.at < entered.end && !self.at.is_multiple_of(g.block_size) {
            drop(state);
            // The bytes of the block that was begun stay in the file.
            queue.grown(Arc::clone(&self.held), entered.key);
        }
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Makes a segment file and adds it to the revision.
fn create(
    held: &HeldRevision,
    idx: u64,
    claimed: Coverage,
    end: u64,
) -> Result<Entered, DiskError> {
    let shared = &held.shared;
    shared.close_idle_files();
    let incarnation = shared.new_incarnation()?;
    let path = shared.segment_path(incarnation);
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
    };
    let opened = match open() {
        Err(error) if shared.mend_shard(&path, &error) => open(),
        opened => opened,
    };
    let file = opened.map_err(|error| {
        let error = shared.not_made(error);
        shared.trouble.note("create", &path, &error);
        DiskError::io("create", &path, error)
    })?;
    shared.files_made.fetch_add(1, Ordering::Relaxed);
    shared.reached(Step::FileCreated);
    let charge = Charge::new(&shared.room, 0, 0);
    let file = SegmentFile::new(file, Arc::clone(&charge));
    let segment = Segment::new(
        incarnation,
        Arc::clone(&file),
        charge,
        claimed,
        shared.admitted_to(held.revision(), idx),
        shared.tick(),
    );
    let mut state = held.state.lock();
    if held.is_doomed() {
        drop(state);
        shared.unlink(incarnation);
        return Err(DiskError::Purged);
    }
    let key = state.add(idx, segment);
    Ok(Entered {
        key,
        incarnation,
        file,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_stay_below_what_the_kernel_gives_back_to_a_host() {
        const PAGE: u64 = 4 << 10;
        for (order, longest) in [
            (None, LONGEST_STEP),
            // No host takes any back; two ways to say it.
            (Some("4294967295\n"), LONGEST_STEP),
            (Some("-1\n"), LONGEST_STEP),
            (Some("9\n"), LONGEST_STEP),
            (Some("7\n"), LONGEST_STEP),
            (Some("6\n"), 128 << 10),
            (Some("5\n"), LEAST_STEP),
            (Some("0\n"), LEAST_STEP),
            (Some("x"), LONGEST_STEP),
        ] {
            assert_eq!(longest_below(order, PAGE), longest, "{order:?}");
        }
        assert_eq!(longest_below(Some("5"), 16 * PAGE), LONGEST_STEP);
    }
}
