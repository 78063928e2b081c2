//! What an earlier run left over is found and reclaimed, once after each start. (The thread first evicts what is held
//! beyond a capacity that was lowered: [`Shared::shrink`].)
//!
//! A crash parts what belongs together (ADR 8): a file whose row was not committed or is gone, a row whose file is
//! gone, a revision without a byte. None of these is ever served, but files take room that nobody counts and rows count
//! room that nobody takes. So a thread lists the directory and the catalog side by side, a shard at a time:
//!
//! ```text
//!  segments/00: 0012… 0034…      0078…      catalog: 0012… 0056… 0078…
//!                     └ no row: unlinked                   └ no file: deleted, its bytes given back
//! ```
//!
//! Names of this run are passed over: theirs are being made. Names of earlier runs only ever go, which makes a look without
//! any lock good enough: directory first, rows second, so that whatever goes in between loses its row before its file
//! and is not taken for a row without one. The thread works half of the time at most, reads by a connection of
//! its own, and takes the catalog's lock only to delete: requests do not wait for it.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::catalog::{Reader, SegmentId};
use super::failpoint::Step;
use super::tier::Shared;
use super::{DiskError, Swept};

/// Rows looked at in one go.
const ROWS: u32 = 256;

/// Work after which the thread rests for as long as it took, so that it has half of a core at most.
const WORK: Duration = Duration::from_millis(2);

/// The longest rest: an orderly end waits for it.
const REST: Duration = Duration::from_millis(20);

/// Counters of the sweep.
#[derive(Default)]
pub(super) struct SweptSoFar {
    files: AtomicU64,
    bytes: AtomicU64,
    rows: AtomicU64,
    revisions: AtomicU64,
    ended: AtomicBool,
}

impl SweptSoFar {
    pub(super) fn so_far(&self) -> Swept {
        Swept {
            files: self.files.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
            revisions: self.revisions.load(Ordering::Relaxed),
        }
    }

    pub(super) fn is_going_on(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }
}

/// The thread's work, until all is swept or the tier is closed. Revisions above `last_revision` are this run's.
pub(super) fn run(shared: &Shared, reader: &Reader, last_revision: i64) {
    let mut pace = Pace(Instant::now());
    let swept = files(shared, reader, &mut pace)
        .and_then(|missing| rows(shared, reader, &missing, &mut pace))
        .and_then(|()| revisions(shared, reader, last_revision, &mut pace));
    shared.swept.ended.store(true, Ordering::Release);
    let Swept {
        files,
        bytes,
        rows,
        revisions,
    } = shared.swept.so_far();
    if files + rows + revisions > 0 {
        tracing::info!(
            files,
            bytes,
            rows,
            revisions,
            "removed what an earlier run left over: files without a row, rows without a file, revisions without a byte"
        );
    }
    if let Err(error) = swept
        && !shared.is_over()
    {
        tracing::warn!(%error, "could not remove all that an earlier run left over; the next start tries again");
    }
}

/// Unlinks files that no row names. Returns those that rows name and that are gone.
fn files(shared: &Shared, reader: &Reader, pace: &mut Pace) -> Result<HashSet<u128>, DiskError> {
    let mut missing = HashSet::new();
    for shard in 0..=u8::MAX {
        if shared.is_over() {
            break;
        }
        let first = u128::from(shard) << 120;
        let last = first | (u128::MAX >> 8);
        let mut files = list(shared, &shared.shard_path(first))?;
        files.sort_unstable();
        let mut rows = reader.files(first, last)?;
        rows.retain(|row| !shared.is_of_this_run(*row));
        let (mut files, mut rows) = (files.into_iter().peekable(), rows.into_iter().peekable());
        let mut unknown = Vec::new();
        loop {
            let order = match (files.peek(), rows.peek()) {
                (Some(file), Some(row)) => file.cmp(row),
                (Some(_), None) => Less,
                (None, Some(_)) => Greater,
                (None, None) => break,
            };
            match order {
                Less => unknown.extend(files.next()),
                Greater => missing.extend(rows.next()),
                Equal => {
                    files.next();
                    rows.next();
                }
            }
        }
        for file in unknown {
            if shared.is_over() {
                break;
            }
            // Sparse: what it takes is not its length.
            let bytes =
                fs::metadata(shared.segment_path(file)).map_or(0, |file| file.blocks() * 512);
            if shared.unlink(file) {
                shared.swept.files.fetch_add(1, Ordering::Relaxed);
                shared.swept.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        pace.rest();
    }
    Ok(missing)
}

/// Segment files of earlier runs.
fn list(shared: &Shared, dir: &Path) -> Result<Vec<u128>, DiskError> {
    let entries = fs::read_dir(dir).map_err(|error| DiskError::io("list", dir, error))?;
    let mut files = Vec::new();
    for entry in entries {
        let name = entry
            .map_err(|error| DiskError::io("list", dir, error))?
            .file_name();
        let hex = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        let incarnation = hex.and_then(|hex| u128::from_str_radix(hex, 16).ok());
        files.extend(incarnation.filter(|incarnation| !shared.is_of_this_run(*incarnation)));
    }
    Ok(files)
}

/// Takes out the rows of files that are gone.
fn rows(
    shared: &Shared,
    reader: &Reader,
    missing: &HashSet<u128>,
    pace: &mut Pace,
) -> Result<(), DiskError> {
    let mut after = None;
    while !missing.is_empty() && !shared.is_over() {
        let rows = reader.segments(after, ROWS)?;
        let Some(last) = rows.last() else {
            break;
        };
        after = Some(*last);
        for id in rows {
            if missing.contains(&id.incarnation) && take_out(shared, &id)? {
                shared.swept.rows.fetch_add(1, Ordering::Relaxed);
            }
        }
        pace.rest();
    }
    Ok(())
}

/// Whether there was such a row without a file.
fn take_out(shared: &Shared, id: &SegmentId) -> Result<bool, DiskError> {
    // Nobody loads, evicts or quarantines meanwhile.
    let mut db = shared.catalog.lock()?;
    let path = shared.segment_path(id.incarnation);
    if path
        .try_exists()
        .map_err(|error| DiskError::io("look for", &path, error))?
    {
        return Ok(false);
    }
    let revision = db.revision(id.revision)?;
    let Some(bytes) = db.delete_segment(id)? else {
        return Ok(false);
    };
    shared.reached(Step::RowSwept);
    let held = revision.and_then(|revision| shared.in_memory(&revision));
    let known = held.filter(|held| held.id == id.revision).and_then(|held| {
        let mut state = held.state.lock();
        let (key, _) = state
            .files_mut(id.idx)
            .find(|(_, segment)| segment.incarnation == id.incarnation)?;
        let key = *key;
        state.segments.remove(&key)
    });
    match known {
        Some(segment) => segment.charge.unlink(),
        None => shared.room.release(bytes),
    }
    Ok(true)
}

/// Takes out revisions of which no byte is held. An empty object is held without one, so nothing ever evicts it: of those
/// there may be as many as memory knows revisions, and the ones that were admitted first go. (In a run it is memory that says
/// which go: what it forgets and no byte of which is held is taken out.)
fn revisions(
    shared: &Shared,
    reader: &Reader,
    last_revision: i64,
    pace: &mut Pace,
) -> Result<(), DiskError> {
    let mut up_to = last_revision;
    let mut empty_left = shared.revisions_in_memory();
    while !shared.is_over() {
        let Some(mut searched) = reader.without_bytes(up_to, ROWS)? else {
            break;
        };
        up_to = searched.first - 1;
        let kept = searched.empty.len().min(empty_left);
        empty_left -= kept;
        searched.bare.extend(searched.empty.drain(kept..));
        if !searched.bare.is_empty() {
            let mut db = shared.catalog.lock()?;
            // The lock keeps an admission from bringing one back between this look and the commit, which passes over
            // those that got a segment meanwhile.
            let gone: Vec<i64> = searched
                .bare
                .into_iter()
                .filter(|(_, revision)| shared.in_memory(revision).is_none())
                .map(|(id, _)| id)
                .collect();
            db.evict(&[], &[], &gone)?;
            shared
                .swept
                .revisions
                .fetch_add(gone.len() as u64, Ordering::Relaxed);
        }
        pace.rest();
    }
    Ok(())
}

/// Since when the thread has been at work.
struct Pace(Instant);

impl Pace {
    fn rest(&mut self) {
        let worked = self.0.elapsed();
        if worked >= WORK {
            std::thread::sleep(worked.min(REST));
            self.0 = Instant::now();
        }
    }
}
