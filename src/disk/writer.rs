//! Writing: bytes in order into segment files.
//!
//! A [`BlockWriter`] walks its range once. On entering a segment it claims the blocks it will
//! write in a file of this run where nobody has touched them, or makes a new file; so each block of
//! a file is written by one writer, once. At each block's start it spends reservation, at its end
//! the block is covered in memory and queued for the durability thread.
//!
//! Its [`WriterView`] lets others send up to the cursor, in the middle of a block too: those bytes are in the
//! page cache and will not change. A block that the writer leaves unfinished stays claimed: it can
//! never be completed in that file, and whoever fetches it again gets another one.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;

use super::DiskError;
use super::coverage::Coverage;
use super::durability::CompletedBlock;
use super::extent::{FileExtent, SegmentFile};
use super::failpoint::Step;
use super::held::{HeldRevision, SegmentKey, State};
use super::room::{Charge, Reservation};
use super::sums::SumDigest;
use super::watch::Watch;
use crate::semantics::ByteRange;

/// Bytes of one `pwritev`. A large one holds the inode's lock against senders: 1 MiB stalled
/// sendfile by 2.4 ms (p99), 64 KiB by 0.09 ms.
const WRITE_STEP: usize = 64 << 10;

/// Slices of one `pwritev`; far below `IOV_MAX`, and enough for frames of 1 KiB.
const WRITE_SLICES: usize = 64;

/// Writes a stretch in order. Dropping it keeps the completed blocks; a started block is not kept.
pub struct BlockWriter {
    /// `None` while a write is under way, and for good if its future was dropped.
    cursor: Option<Cursor>,
    view: Arc<WriterView>,
    watch: Arc<Watch>,
}

impl BlockWriter {
    pub(super) async fn begin(
        held: Arc<HeldRevision>,
        range: ByteRange,
        reservation: Reservation,
    ) -> Result<Self, DiskError> {
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
        let mut cursor = Cursor {
            held,
            at: range.start(),
            end: range.end(),
            reservation,
            digest: SumDigest::default(),
            segment: None,
            view: Arc::clone(&view),
        };
        // Now, so that a disk that takes no new file is known before the remote is asked.
        let limit = watch.limits.write;
        let entered = watch.run("make a segment file", limit, move || {
            cursor.enter().map(|()| cursor)
        });
        Ok(Self {
            cursor: Some(entered.await?),
            view,
            watch,
        })
    }

    /// Appends; the cursor moves as the bytes reach the page cache (`pwritev` off the runtime's
    /// workers). Blocks completed on the way are covered in memory at once and committed later
    /// (data synced first).
    ///
    /// Cancelling leaves the chunks to be written or not, and the writer fit only to be dropped.
    ///
    /// # Errors
    /// [`DiskError::NoRoom`] when the reservation is used up or the file was dropped as bad,
    /// [`DiskError::Purged`], [`DiskError::Io`], or [`DiskError::Hangs`] when the disk does not take them in
    /// time; what hangs may still be written. The cursor tells what was written all the same; the writer
    /// is fit only to be dropped.
    ///
    /// # Panics
    /// If the chunks reach beyond the range, or after a call that was cancelled or failed.
    pub async fn write(&mut self, chunks: Vec<Bytes>) -> Result<(), DiskError> {
        let mut cursor = self
            .cursor
            .take()
            .expect("the last write completed, as the contract demands");
        let limit = self.watch.limits.write;
        let written = self.watch.run("write to a segment", limit, move || {
            cursor.write(chunks).map(|()| cursor)
        });
        self.cursor = Some(written.await?);
        Ok(())
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
    at: u64,
    end: u64,
    reservation: Reservation,
    /// Over the bytes of the block under way.
    digest: SumDigest,
    /// The segment that `at` lies in, once entered.
    segment: Option<Entered>,
    view: Arc<WriterView>,
}

struct Entered {
    key: SegmentKey,
    incarnation: u128,
    file: Arc<SegmentFile>,
    /// Where the writer leaves it.
    end: u64,
}

impl Cursor {
    fn write(&mut self, chunks: Vec<Bytes>) -> Result<(), DiskError> {
        let mut chunks: VecDeque<Bytes> = chunks
            .into_iter()
            .filter(|chunk| !chunk.is_empty())
            .collect();
        while !chunks.is_empty() {
            assert!(self.at < self.end, "more bytes than the writer's range");
            self.step(&mut chunks)?;
        }
        Ok(())
    }

    /// One `pwritev`, within one block.
    fn step(&mut self, chunks: &mut VecDeque<Bytes>) -> Result<(), DiskError> {
        if self.segment.is_none() {
            self.enter()?;
        }
        let held = Arc::clone(&self.held);
        let g = held.geometry;
        let segment = self.segment.as_ref().expect("entered above");
        let block = g.block_of(self.at);
        let block_start = g.blocks_end(segment.key.idx, block);
        let block_end = g.blocks_end(segment.key.idx, block + 1);
        if self.at == block_start
            && !self
                .reservation
                .spend(segment.file.charge(), block_end - block_start)
        {
            return Err(DiskError::NoRoom);
        }
        let left = usize::try_from(block_end - self.at).unwrap_or(usize::MAX);
        let mut room = left.min(WRITE_STEP);
        let mut slices = Vec::with_capacity(chunks.len().min(WRITE_SLICES));
        for chunk in chunks.iter().take(WRITE_SLICES) {
            let slice = &chunk[..chunk.len().min(room)];
            room -= slice.len();
            slices.push(IoSlice::new(slice));
            if room == 0 {
                break;
            }
        }
        let offset = self.at - g.segment_start(segment.key.idx);
        let written = loop {
            match rustix::io::pwritev(segment.file.file(), &slices, offset) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                other => break other.map_err(io::Error::from),
            }
        };
        drop(slices);
        let written = written.map_err(|error| {
            let path = held.shared.segment_path(segment.incarnation);
            held.shared.trouble.note("write", &path, &error);
            DiskError::io("write", &path, error)
        })?;
        held.shared.reached(Step::BytesWritten);
        held.shared.trouble.over();
        let mut left = written;
        while left > 0 {
            let chunk = chunks
                .front_mut()
                .expect("no more was written than was given");
            let n = left.min(chunk.len());
            self.digest.update(&chunk[..n]);
            chunk.advance(n);
            left -= n;
            if chunk.is_empty() {
                chunks.pop_front();
            }
        }
        self.at += written as u64;
        self.view.cursor.store(self.at, Ordering::Release);
        if self.at == block_end {
            self.complete(block, block_end - block_start)
        } else {
            Ok(())
        }
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
        shared.trouble.note("create", &path, &error);
        DiskError::io("create", &path, error)
    })?;
    shared.reached(Step::FileCreated);
    let charge = Charge::new(&shared.room, 0, 0);
    let file = SegmentFile::new(file, Arc::clone(&charge));
    let segment = State::new_segment(
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
