//! The file while it is not complete: `FILE.pinrange-part` for the bytes, `FILE.pinrange-state` for which of them count.
//!
//! The part file has the object's full length from the start, and the room for it where the file system can promise
//! that: a disk that is too small says so before the download.
//! Every byte is written to its place. Which stretches have been written is kept in memory as [`Extents`] and, about
//! once a second, in the state file, in an order that a crash cannot turn around: data, `fdatasync`, new state beside
//! the old one, rename. So a state never vouches for bytes that are not on the disk. The other way round, before the
//! part file is emptied for another revision, the state that vouched for the old bytes is durably gone.
//!
//! Whoever works on the part file holds an exclusive lock on it (`flock`), until the [`Part`] is dropped: a commit that still
//! runs on another thread holds it too, and keeps others out until it ends.

use std::fs::{self, File, TryLockError};
use std::io::{self, IoSlice};
use std::os::unix::fs::{MetadataExt, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::Uri;
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::client::{Pin, Sink};
use super::error::GetError;
use super::url;
use crate::object::Validator;
use crate::semantics::ByteRange;

/// Frames are gathered up to this much before they are written: a write of this size costs far more than its system
/// call, and eight connections then hold 4 MiB.
const BATCH: usize = 512 << 10;
/// Most bytes of one write. Longer ones have the kernel make folios of 128 KiB and more, and a virtual machine that gives
/// such free blocks back to its host has to fetch every page of them: half of a download's CPU time (ADR 24).
const STEP: u64 = 64 << 10;
/// `IOV_MAX` is 1024; small frames from a slow connection should not wait for the whole batch anyway.
const BATCH_FRAMES: usize = 256;
/// What the state file's first field has to be.
const VERSION: u32 = 1;
const RESUME: &str = "once that is mended, run the same command again to resume";

/// Sorted, disjoint, non-adjacent stretches of the object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Extents(Vec<(u64, u64)>);

impl Extents {
    /// Adds a stretch, whether or not parts of it are there already.
    pub(super) fn insert(&mut self, mut start: u64, mut end: u64) {
        let from = self.0.partition_point(|&(_, e)| e < start);
        let to = self.0.partition_point(|&(s, _)| s <= end);
        if let Some(&(s, _)) = self.0[from..to].first() {
            start = start.min(s);
        }
        if let Some(&(_, e)) = self.0[from..to].last() {
            end = end.max(e);
        }
        self.0.splice(from..to, [(start, end)]);
    }

    /// Bytes in all.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// Up to where nothing is missing.
    fn prefix(&self) -> u64 {
        self.0
            .first()
            .filter(|(start, _)| *start == 0)
            .map_or(0, |(_, end)| *end)
    }

    /// What is missing of an object of `size` bytes, in pieces of at most `chunk` bytes, in order. Lazy, because a server
    /// can claim any size.
    pub(super) fn missing(&self, size: u64, chunk: u64) -> impl Iterator<Item = ByteRange> + use<> {
        let starts = std::iter::once(0).chain(self.0.iter().map(|(_, end)| *end));
        let ends = self
            .0
            .iter()
            .map(|(start, _)| *start)
            .chain(std::iter::once(size));
        let gaps: Vec<_> = starts.zip(ends).collect();
        gaps.into_iter()
            .flat_map(move |(start, end)| pieces(start, end, chunk))
    }

    /// What a file says need not be so.
    fn is_sane(&self, size: u64) -> bool {
        self.0
            .iter()
            .all(|(start, end)| start < end && *end <= size)
            && self.0.windows(2).all(|pair| pair[0].1 < pair[1].0)
    }
}

/// `start..end` in pieces of at most `chunk` bytes.
pub(super) fn pieces(start: u64, end: u64, chunk: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = start;
    std::iter::from_fn(move || {
        let piece = ByteRange::from_bounds(at, at.saturating_add(chunk).min(end))?;
        at = piece.end();
        Some(piece)
    })
}

/// The state file.
#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    /// For people: without query and credentials.
    url: String,
    /// [`url::identity`].
    identity: String,
    etag: String,
    size: u64,
    done: Extents,
}

/// The part file of one download, locked.
pub(super) struct Part {
    target: PathBuf,
    path: PathBuf,
    state: PathBuf,
    url: String,
    identity: String,
    file: Arc<File>,
    held: Mutex<Held>,
    prefix: watch::Sender<u64>,
    /// Held while a state is being saved or removed: a save that was under way when its download stopped must neither
    /// outlive the removal nor overtake the next save.
    saving: Mutex<()>,
}

impl Drop for Part {
    fn drop(&mut self) {
        // Not left to the last descriptor: a verification that is being given up has one, and so has every process between
        // its fork and its exec.
        let _ = self.file.unlock();
    }
}

/// Of which revision the part file holds what. Together under one lock, so that no state can vouch for one
/// revision with another's bytes.
#[derive(Default)]
struct Held {
    pin: Option<Pin>,
    extents: Extents,
    /// For inspection by the user.
    kept: bool,
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Part {
    /// Opens or creates and locks the part file of `target`, whatever it holds.
    ///
    /// # Errors
    /// [`GetError::Create`], above all when another download has the lock.
    pub(super) fn open(target: PathBuf, origin: &Uri) -> Result<Self, GetError> {
        let path = beside(&target, ".pinrange-part");
        let failed = |why: String| GetError::Create {
            path: path.clone(),
            why,
        };
        let file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|error| failed(error.to_string()))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(failed(
                        "another download into the same file is under way".into(),
                    ));
                }
                Err(TryLockError::Error(error)) => return Err(failed(error.to_string())),
            }
            // Between open and lock, the one who had it may have renamed it into place: then what we hold is
            // a finished file, not a part.
            let mine = file.metadata().map_err(|error| failed(error.to_string()))?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (mine.dev(), mine.ino()) => break file,
                Ok(there) if !there.is_file() => {
                    return Err(failed("it is no regular file".into()));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error.to_string())),
            }
        };
        // Before the first byte: who must not read the old file must not read the new one either, complete or not.
        if let Ok(old) = fs::metadata(&target)
            && old.is_file()
        {
            keep_mode(&file, old.mode() & 0o777).map_err(|error| {
                failed(format!(
                    "it cannot have the mode of {}: {error}",
                    target.display()
                ))
            })?;
        }
        Ok(Self {
            state: beside(&target, ".pinrange-state"),
            path,
            target,
            url: url::redact(&origin.to_string()),
            identity: url::identity(origin),
            file: Arc::new(file),
            held: Mutex::default(),
            prefix: watch::Sender::new(0),
            saving: Mutex::new(()),
        })
    }

    /// What an earlier run left: its pin. Nothing (and then nothing counts) if it was after another URL,
    /// or the state does not fit the part file.
    pub(super) fn resume(&self) -> Option<Pin> {
        let text = fs::read(&self.state).ok()?;
        let state: State = serde_json::from_slice(&text).ok()?;
        let fits = state.version == VERSION
            && state.identity == self.identity
            && state.done.is_sane(state.size)
            && self
                .file
                .metadata()
                .is_ok_and(|meta| meta.len() == state.size);
        let etag = Validator::from_etag_field(&state.etag)
            .ok()
            .filter(|_| fits)?;
        let pin = Pin {
            etag,
            size: state.size,
        };
        self.prefix.send_replace(state.done.prefix());
        *self.held.lock() = Held {
            pin: Some(pin.clone()),
            extents: state.done,
            kept: false,
        };
        Some(pin)
    }

    /// Makes the file an empty one for the revision `pin`, or for bytes that have none, and makes sure
    /// first that no state vouches for what was in it. The caller has ended every task that writes to it.
    pub(super) fn reset(&self, pin: Option<&Pin>) -> Result<(), GetError> {
        let empty = || {
            self.forget_state()?;
            self.file.set_len(0)?;
            pin.map_or(Ok(()), |pin| allocate(&self.file, pin.size))
        };
        empty().map_err(|error| self.cannot_write(error))?;
        self.held.lock().pin = pin.cloned();
        Ok(())
    }

    /// From here on there is nothing to save, until [`Part::reset`].
    fn forget_state(&self) -> io::Result<()> {
        let _saving = self.saving.lock();
        *self.held.lock() = Held::default();
        self.prefix.send_replace(0);
        remove(&beside(&self.state, ".new"))?;
        if remove(&self.state)? {
            self.sync_directory()
        } else {
            Ok(())
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        let directory = self
            .target
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty());
        File::open(directory.unwrap_or_else(|| Path::new(".")))?.sync_all()
    }

    /// The part file's name, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether no later run could make use of the part file: nothing was written, or without a pin. Bytes kept
    /// for inspection ([`Part::distrust`]) have no pin any more, but a reader.
    pub(super) fn is_worthless(&self) -> bool {
        let held = self.held.lock();
        !held.kept && (held.pin.is_none() || held.extents.len() == 0)
    }

    /// A copy of what has been written.
    pub(super) fn written(&self) -> Extents {
        self.held.lock().extents.clone()
    }

    /// Follows the length of the complete prefix.
    pub(super) fn prefix(&self) -> watch::Receiver<u64> {
        self.prefix.subscribe()
    }

    /// The bytes, for reading back.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Writes frames to their place. On the calling thread: the page cache takes them in microseconds, and a caller
    /// that is cancelled at an await then leaves no write behind that could hit the next revision's bytes. Where
    /// the disk is the bottleneck the kernel makes writers wait, which holds up this download's
    /// own connections and nobody else's.
    fn write(&self, at: u64, frames: &[Bytes]) -> Result<(), GetError> {
        let mut slices: Vec<IoSlice<'_>> = frames.iter().map(|frame| IoSlice::new(frame)).collect();
        let mut left = slices.as_mut_slice();
        let mut end = at;
        while !left.is_empty() {
            // To the next multiple, for folios are aligned.
            let step = first_bytes(left, STEP - end % STEP);
            let written = match rustix::io::pwritev(&*self.file, &step, end) {
                Ok(0) => return Err(self.cannot_write(io::ErrorKind::WriteZero.into())),
                Ok(written) => written,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(self.cannot_write(error.into())),
            };
            end += written as u64;
            IoSlice::advance_slices(&mut left, written);
        }
        let mut held = self.held.lock();
        held.extents.insert(at, end);
        let prefix = held.extents.prefix();
        self.prefix
            .send_if_modified(|known| std::mem::replace(known, prefix) != prefix);
        Ok(())
    }

    /// Makes what has been written so far survive a crash. Runs on a blocking thread; once begun it
    /// ends, whether or not the future is dropped, and the lock is held until then.
    pub(super) async fn commit(self: Arc<Self>) -> Result<(), GetError> {
        blocking(move || self.commit_now()).await
    }

    /// [`Part::commit`] on the calling thread, which waits for the disk.
    pub(super) fn commit_now(&self) -> Result<(), GetError> {
        let _saving = self.saving.lock();
        // Taken before the sync: all of it is on the disk afterwards.
        let state = {
            let held = self.held.lock();
            let Some(pin) = &held.pin else { return Ok(()) };
            State {
                version: VERSION,
                url: self.url.clone(),
                identity: self.identity.clone(),
                etag: pin.etag.as_field_value().to_owned(),
                size: pin.size,
                done: held.extents.clone(),
            }
        };
        let text = serde_json::to_vec(&state).expect("strings and numbers serialise");
        let fresh = beside(&self.state, ".new");
        let save = || {
            self.file.sync_data()?;
            let mut file = File::create(&fresh)?;
            io::Write::write_all(&mut file, &text)?;
            file.sync_data()?;
            fs::rename(&fresh, &self.state)
        };
        save().map_err(|error| self.cannot_write(error))
    }

    /// The file is complete and right: makes it durable, gives it its name, and cleans up. Once begun it ends, whether or
    /// not the future is dropped.
    pub(super) async fn publish(self: Arc<Self>) -> Result<(), GetError> {
        blocking(move || self.publish_now()).await
    }

    fn publish_now(&self) -> Result<(), GetError> {
        // A state without a part vouches for nothing, a part without a state is fetched again: so this order.
        let publish = || {
            self.file.sync_all()?;
            fs::rename(&self.path, &self.target)?;
            self.forget_state()?;
            self.sync_directory()
        };
        publish().map_err(|error| self.cannot_write(error))
    }

    /// The bytes turned out wrong: they stay for inspection, and the next run begins anew.
    pub(super) fn distrust(&self) -> Result<&Path, GetError> {
        self.forget_state()
            .map_err(|error| self.cannot_write(error))?;
        self.held.lock().kept = true;
        Ok(&self.path)
    }

    /// Nothing was written: leaves no trace.
    pub(super) fn discard(&self) {
        // Whatever does not go away now is harmless, and the user is about to read of a better reason.
        let _kept = self
            .forget_state()
            .and_then(|()| fs::remove_file(&self.path));
    }

    /// Reading back for the checksum failed.
    pub(super) fn cannot_read(&self, source: &io::Error) -> GetError {
        let why = format!("reading it back: {source}");
        self.cannot_write(io::Error::new(source.kind(), why))
    }

    fn cannot_write(&self, source: io::Error) -> GetError {
        GetError::Output {
            path: self.path.clone(),
            source,
            advice: RESUME,
        }
    }
}

/// The first `len` bytes of the slices, or all there are.
fn first_bytes<'a>(slices: &'a [IoSlice<'_>], len: u64) -> Vec<IoSlice<'a>> {
    let mut room = usize::try_from(len).unwrap_or(usize::MAX);
    let mut first = Vec::new();
    for slice in slices {
        let bytes = &slice[..slice.len().min(room)];
        first.push(IoSlice::new(bytes));
        room -= bytes.len();
        if room == 0 {
            break;
        }
    }
    first
}

fn keep_mode(file: &File, mode: u32) -> io::Result<()> {
    if file.metadata()?.mode() & 0o777 == mode {
        return Ok(());
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
}

/// Gives an empty file its length, and where it can be had the room for it.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    let promised =
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size));
    match promised {
        // Like NFS before 4.2, ZFS and much of what is in user space.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size),
        promised => Ok(promised?),
    }
}

/// Whether it was there.
fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// One task's way into the part file: gathers frames, uncopied, into writes that are worth a system call.
pub(super) struct PartSink {
    part: Arc<Part>,
    batch: Vec<Bytes>,
    at: u64,
    len: usize,
}

impl PartSink {
    pub(super) fn new(part: Arc<Part>) -> Self {
        Self {
            part,
            batch: Vec::new(),
            at: 0,
            len: 0,
        }
    }
}

impl Sink for PartSink {
    fn put(&mut self, at: u64, bytes: Bytes) -> Result<(), GetError> {
        if self.batch.is_empty() {
            self.at = at;
        }
        debug_assert_eq!(
            self.at + self.len as u64,
            at,
            "a stretch is put in order, and flushed at its end"
        );
        self.len += bytes.len();
        self.batch.push(bytes);
        if self.len >= BATCH || self.batch.len() >= BATCH_FRAMES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), GetError> {
        if self.len > 0 {
            self.part.write(self.at, &self.batch)?;
        }
        self.batch.clear();
        self.len = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a bitmap: whatever is inserted, in whatever order, `missing` is the rest, in order and in pieces.
        #[test]
        fn extents_are_a_set_of_bytes(stretches in prop::collection::vec((0usize..64, 1usize..16), 0..12), chunk in 1u64..20) {
            let mut extents = Extents::default();
            let mut there = [false; 80];
            for (start, len) in stretches {
                extents.insert(start as u64, (start + len) as u64);
                there[start..start + len].fill(true);
            }
            prop_assert!(extents.is_sane(80));
            prop_assert_eq!(extents.len(), there.iter().filter(|b| **b).count() as u64);
            prop_assert_eq!(extents.prefix(), there.iter().take_while(|b| **b).count() as u64);
            let missing: Vec<ByteRange> = extents.missing(80, chunk).collect();
            prop_assert!(missing.iter().all(|piece| piece.len() <= chunk));
            let bytes: Vec<u64> = missing.iter().flat_map(|piece| piece.start()..piece.end()).collect();
            let want: Vec<u64> = (0u64..).zip(there).filter(|(_, there)| !there).map(|(at, _)| at).collect();
            prop_assert_eq!(bytes, want);
        }
    }

    fn part(directory: &Path) -> Result<Part, GetError> {
        Part::open(directory.join("f"), &"http://h/f".parse().unwrap())
    }

    #[test]
    fn who_still_reads_the_file_does_not_keep_the_next_download_out() {
        let directory = tempfile::tempdir().unwrap();
        let first = part(directory.path()).unwrap();
        let reader = first.file();
        assert!(part(directory.path()).is_err(), "it is locked");
        drop(first);
        part(directory.path()).unwrap();
        drop(reader);
    }

    fn pin() -> Pin {
        Pin {
            etag: Validator::from_etag_field("\"a\"").unwrap(),
            size: 10,
        }
    }

    #[test]
    fn one_download_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let first = part(directory.path()).unwrap();
        assert!(matches!(
            part(directory.path()),
            Err(GetError::Create { .. })
        ));
        first.reset(Some(&pin())).unwrap();
        first.publish_now().unwrap();
        let second = part(directory.path()).unwrap();
        assert_ne!(
            first.file.metadata().unwrap().ino(),
            second.file.metadata().unwrap().ino()
        );
    }

    #[test]
    fn a_state_that_does_not_fit_vouches_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let save = || {
            let part = part(directory.path()).unwrap();
            part.reset(Some(&pin())).unwrap();
            part.write(0, &[Bytes::from_static(b"abc")]).unwrap();
            part.commit_now().unwrap();
        };
        save();
        let again = part(directory.path()).unwrap();
        assert_eq!(again.resume(), Some(pin()));
        assert_eq!(again.written(), Extents(vec![(0, 3)]));
        drop(again);

        let other = Part::open(directory.path().join("f"), &"http://h/g".parse().unwrap()).unwrap();
        assert_eq!(other.resume(), None, "another URL");
        drop(other);

        let state = directory.path().join("f.pinrange-state");
        let text = fs::read_to_string(&state).unwrap();
        for (from, to) in [
            ("[[0,3]]", "[[0,30]]"),
            ("[[0,3]]", "[[3,0]]"),
            ("\"version\":1", "\"version\":2"),
            ("}", ""),
        ] {
            fs::write(&state, text.replace(from, to)).unwrap();
            assert_eq!(part(directory.path()).unwrap().resume(), None, "{to}");
        }
        save();
        part(directory.path()).unwrap().file.set_len(9).unwrap();
        assert_eq!(
            part(directory.path()).unwrap().resume(),
            None,
            "another length"
        );
    }

    #[test]
    fn the_room_is_taken_before_the_download() {
        let directory = tempfile::tempdir().unwrap();
        let part = part(directory.path()).unwrap();
        let size = 1 << 20;
        let pin = Pin { size, ..pin() };
        part.reset(Some(&pin)).unwrap();
        let room = |file: &File| file.metadata().unwrap().blocks() * 512;
        // As far as this file system goes.
        let other = File::create(directory.path().join("other")).unwrap();
        let promised = rustix::fs::fallocate(&other, FallocateFlags::empty(), 0, size);
        assert_eq!(room(&part.file), room(&other));
        assert_eq!(promised.is_ok(), room(&part.file) >= size);
        assert_eq!(part.file.metadata().unwrap().len(), size);

        let endless = Pin {
            size: u64::MAX >> 2,
            ..pin
        };
        assert!(part.reset(Some(&endless)).is_err());
        assert!(part.is_worthless());
    }

    #[test]
    fn the_state_is_gone_before_the_bytes_are() {
        let directory = tempfile::tempdir().unwrap();
        let part = part(directory.path()).unwrap();
        part.reset(Some(&pin())).unwrap();
        part.write(0, &[Bytes::from_static(b"0123456789")]).unwrap();
        part.commit_now().unwrap();
        part.reset(Some(&pin())).unwrap();
        assert!(!directory.path().join("f.pinrange-state").exists());
        assert_eq!(part.written(), Extents::default());
        assert_eq!(fs::read(&part.path).unwrap(), [0; 10]);
    }
}
