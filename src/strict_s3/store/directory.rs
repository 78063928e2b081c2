//! Objects that are the files below a directory. [`super::Backing::Directory`] says what is promised.
//!
//! Every path is resolved by the kernel with `openat2(RESOLVE_BENEATH)`: whatever the key and whatever symbolic links
//! are put in the way meanwhile, nothing outside of the root is opened. A read opens the file once; its [`Stamp`]
//! is compared after every chunk, so bytes of a file that changed under the reader are never sent.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt};
use md5::{Digest, Md5};
use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, fstat, mkdirat, openat2,
    renameat_with, unlinkat,
};
use rustix::io::Errno;

use super::{
    Content, ListQuery, Listed, Listing, Metadata, Object, PutOptions, StoreError, WriteCondition,
    hex, paginate,
};

/// Holds bodies under way; in the root so that they can be renamed into place. No key reaches into it.
const TEMPORARY: &str = ".pinrange-s3";

/// Files of up to this size are labelled by their content.
const LABELLED_BY_CONTENT: u64 = 16 * 1024 * 1024;

/// The kernel stamps files with the time of its last tick, 10 ms ago at most; two changes within a tick look alike.
const TICK: Duration = Duration::from_millis(20);

/// The same where the file system keeps no fractions of a second (FAT keeps even ones only).
const COARSE_TICK: Duration = Duration::from_millis(2100);

/// How often a file that keeps changing is looked at, a tick apart, before giving up.
const PATIENCE: u32 = 25;

const CHUNK: usize = 256 * 1024;

pub(super) struct DirectoryStore {
    bucket: String,
    path: PathBuf,
    root: OwnedFd,
    /// The last ETag that was taken of each (device, inode).
    etags: Mutex<HashMap<(u64, u64), (Stamp, String)>>,
    temporaries: AtomicU64,
    /// Serialises conditions with the writes they are for.
    writing: Mutex<()>,
}

/// Changes whenever the content does, once the tick of the last change is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    modified: (i64, u64),
    changed: (i64, u64),
    size: u64,
    links: u64,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
            size: u64::try_from(stat.st_size).unwrap_or(0),
            links: stat.st_nlink,
        })
    }

    /// Whether every later change will give another stamp. A time in the future was stamped before the clock was set
    /// back, and will not come again by chance.
    fn settled(&self) -> bool {
        let tick = if self.changed.1 == 0 {
            COARSE_TICK
        } else {
            TICK
        };
        let Ok(age) = SystemTime::now().duration_since(time(self.changed)) else {
            return true;
        };
        age > tick
    }

    /// Whether a file of this stamp still has the content it had when it was `earlier`. Removing a name (which
    /// is what renaming another file over it does) touches the ctime but not the content.
    fn same_content(&self, earlier: &Self) -> bool {
        let unlinked = self.links < earlier.links
            && Self {
                changed: earlier.changed,
                links: earlier.links,
                ..*self
            } == *earlier;
        self == earlier || unlinked
    }
}

fn time((seconds, nanoseconds): (i64, u64)) -> SystemTime {
    let fraction = Duration::from_nanos(nanoseconds);
    match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds) + fraction,
        Err(_) => UNIX_EPOCH,
    }
}

impl DirectoryStore {
    pub(super) fn open(bucket: String, path: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            bucket,
            path: path.to_owned(),
            root,
            etags: Mutex::default(),
            temporaries: AtomicU64::new(0),
            writing: Mutex::default(),
        })
    }

    pub(super) fn bucket(&self) -> &str {
        &self.bucket
    }

    pub(super) fn read(&self, key: &str) -> Result<Object, StoreError> {
        let file = self.open_file(key)?;
        let (stamp, etag) = self.label(&file)?;
        let metadata = Metadata {
            etag,
            size: stamp.size,
            last_modified: time(stamp.modified),
            version_id: None,
            options: Arc::new(PutOptions::default()),
            checksum: None,
        };
        let content = Content::File(OpenFile {
            file: Arc::new(file),
            stamp,
        });
        Ok(Object { metadata, content })
    }

    /// Opens a regular file. Never waits, not even for a FIFO.
    fn open_file(&self, key: &str) -> Result<File, StoreError> {
        // A key that cannot be a file is one that is not there.
        let missing = || StoreError::NoSuchKey { marker: None };
        if !is_path(key) {
            return Err(missing());
        }
        let file = match self.beneath(key, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => File::from(file),
            Err(
                Errno::NOENT
                | Errno::NOTDIR
                | Errno::LOOP
                | Errno::XDEV
                | Errno::NAMETOOLONG
                | Errno::INVAL
                | Errno::NXIO,
            ) => return Err(missing()),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        if FileType::from_raw_mode(fstat(&file).map_err(io::Error::from)?.st_mode).is_file() {
            Ok(file)
        } else {
            Err(missing())
        }
    }

    fn beneath(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        loop {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            match openat2(
                &self.root,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            ) {
                // A rename elsewhere in the tree raced with the look-up.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// The file's ETag, and the stamp at which it is that.
    fn label(&self, file: &File) -> Result<(Stamp, String), StoreError> {
        for _ in 0..PATIENCE {
            let stamp = Stamp::of(file)?;
            let identity = (stamp.device, stamp.inode);
            if let Some((known, etag)) = self.etags.lock().get(&identity)
                && *known == stamp
            {
                return Ok((stamp, etag.clone()));
            }
            if stamp.settled() {
                let etag = if stamp.size <= LABELLED_BY_CONTENT {
                    content_tag(file, stamp.size)?
                } else {
                    identity_tag(&stamp)
                };
                if Stamp::of(file)? == stamp {
                    self.etags.lock().insert(identity, (stamp, etag.clone()));
                    return Ok((stamp, etag));
                }
            }
            std::thread::sleep(TICK);
        }
        Err(StoreError::Busy)
    }

    pub(super) fn temporary(self: &Arc<Self>) -> Result<TemporaryFile, StoreError> {
        match mkdirat(&self.root, TEMPORARY, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        loop {
            let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
            let name = format!("{TEMPORARY}/{}-{number}", std::process::id());
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o644);
            match openat2(&self.root, &name, flags, mode, ResolveFlags::BENEATH) {
                // Left behind by a killed process of the same id.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(io::Error::from(error).into()),
                Ok(file) => {
                    return Ok(TemporaryFile {
                        store: Arc::clone(self),
                        file: File::from(file),
                        name: Some(name),
                    });
                }
            }
        }
    }

    /// Renames a received body into place and yields its ETag. `If-None-Match: *` holds against any program,
    /// `If-Match` only against writers through this server.
    pub(super) fn put(
        &self,
        key: &str,
        mut body: TemporaryFile,
        condition: &WriteCondition,
    ) -> Result<String, StoreError> {
        if !is_path(key) {
            return Err(StoreError::InvalidKey(key.to_owned()));
        }
        body.file.sync_all()?;
        let (parent, name) = self.parent(key, true)?;
        {
            let _writing = self.writing.lock();
            if condition.if_match.is_some() {
                let (_, etag) = self.label(&self.open_file(key)?)?;
                condition.check(Some(&etag))?;
            }
            let flags = if condition.absent {
                RenameFlags::NOREPLACE
            } else {
                RenameFlags::empty()
            };
            let temporary = body.name.as_deref().expect("only this takes the name away");
            match renameat_with(&self.root, temporary, &parent, name, flags) {
                Ok(()) => body.name = None,
                Err(Errno::EXIST) => return Err(StoreError::PreconditionFailed("If-None-Match")),
                Err(Errno::ISDIR) => return Err(StoreError::InvalidKey(key.to_owned())),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        rustix::fs::fsync(&parent).map_err(io::Error::from)?;
        Ok(self.label(&body.file)?.1)
    }

    /// Removes the file. That there is none is fine, as on S3. Directories stay.
    pub(super) fn delete(&self, key: &str) -> Result<(), StoreError> {
        if !is_path(key) {
            return Ok(());
        }
        let _writing = self.writing.lock();
        let (parent, name) = match self.parent(key, false) {
            Err(StoreError::InvalidKey(_)) => return Ok(()),
            other => other?,
        };
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// The directory a key's file is in, and its name there.
    fn parent<'a>(&self, key: &'a str, create: bool) -> Result<(OwnedFd, &'a str), StoreError> {
        let (directory, name) = key.rsplit_once('/').unwrap_or((".", key));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = |path: &str| match self.beneath(path, flags) {
            Ok(opened) => Ok(opened),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG) => {
                Err(StoreError::InvalidKey(key.to_owned()))
            }
            Err(error) => Err(io::Error::from(error).into()),
        };
        if create && directory != "." {
            let mut above = open(".")?;
            let ends = directory.match_indices('/').map(|(at, _)| at);
            for end in ends.chain([directory.len()]) {
                let path = &directory[..end];
                let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
                match mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => above = open(path)?,
                    Err(Errno::NAMETOOLONG | Errno::INVAL) => {
                        return Err(StoreError::InvalidKey(key.to_owned()));
                    }
                    Err(error) => return Err(io::Error::from(error).into()),
                }
            }
        }
        Ok((open(directory)?, name))
    }

    /// Walks the part of the tree that the prefix allows. Symbolic links to directories are not followed here (they
    /// may form circles), though keys that lead through them can be read.
    pub(super) fn list(&self, query: &ListQuery) -> Result<Listing, StoreError> {
        let mut keys = BTreeSet::new();
        let mut pending = vec![String::new()];
        while let Some(directory) = pending.pop() {
            let entries = match std::fs::read_dir(self.path.join(&directory)) {
                Ok(entries) => entries,
                // Gone, or closed to us, since its parent was read.
                Err(_) if !directory.is_empty() => continue,
                Err(error) => return Err(error.into()),
            };
            for entry in entries {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let key = format!("{directory}{name}");
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if kind.is_dir() {
                    let below = format!("{key}/");
                    if name != TEMPORARY
                        && (below.starts_with(&query.prefix) || query.prefix.starts_with(&below))
                    {
                        pending.push(below);
                    }
                } else if key.starts_with(&query.prefix)
                    && (kind.is_file() || (kind.is_symlink() && self.open_file(&key).is_ok()))
                {
                    keys.insert(key);
                }
            }
        }
        let page = paginate(keys.iter().map(String::as_str), query);
        let listed = page.keys.into_iter().filter_map(|key| {
            let stamp = Stamp::of(&self.open_file(&key).ok()?).ok()?;
            let known = self.etags.lock().get(&(stamp.device, stamp.inode)).cloned();
            Some(Listed {
                key,
                size: stamp.size,
                last_modified: time(stamp.modified),
                etag: known
                    .filter(|(known, _)| *known == stamp)
                    .map(|(_, etag)| etag),
            })
        });
        Ok(Listing {
            objects: listed.collect(),
            prefixes: page.prefixes,
            next: page.next,
        })
    }
}

impl Drop for DirectoryStore {
    fn drop(&mut self) {
        // Leave the user's directory as it was; where another server still uses it, it is not empty and stays.
        let _ = unlinkat(&self.root, TEMPORARY, AtFlags::REMOVEDIR);
    }
}

/// Whether a key is a relative path that names every directory on its way, and none of ours.
fn is_path(key: &str) -> bool {
    key.split('/')
        .all(|name| !matches!(name, "" | "." | ".." | TEMPORARY))
        && !key.contains('\0')
}

fn content_tag(file: &File, size: u64) -> io::Result<String> {
    let mut hasher = Md5::new();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while offset < size {
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 {
            break; // Truncated meanwhile; its stamp says so too.
        }
        hasher.update(&buffer[..read]);
        offset += read as u64;
    }
    let digest: [u8; 16] = hasher.finalize().into();
    Ok(format!("\"{}\"", hex(&digest)))
}

fn identity_tag(stamp: &Stamp) -> String {
    let mut hasher = Md5::new();
    hasher.update(stamp.device.to_le_bytes());
    hasher.update(stamp.inode.to_le_bytes());
    for (seconds, nanoseconds) in [stamp.modified, stamp.changed] {
        hasher.update(seconds.to_le_bytes());
        hasher.update(nanoseconds.to_le_bytes());
    }
    hasher.update(stamp.size.to_le_bytes());
    let digest: [u8; 16] = hasher.finalize().into();
    format!("\"{}-0\"", hex(&digest))
}

/// A file that was labelled: as long as its stamp holds, its bytes are those of the label.
pub(super) struct OpenFile {
    file: Arc<File>,
    stamp: Stamp,
}

impl OpenFile {
    pub(super) fn read(self, start: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        stream::try_unfold((self, start), move |(this, offset)| async move {
            if offset >= end {
                return Ok(None);
            }
            let (chunk, this) =
                tokio::task::spawn_blocking(move || this.chunk(offset, end)).await??;
            let offset = offset + chunk.len() as u64;
            Ok(Some((chunk, (this, offset))))
        })
        .boxed()
    }

    /// Reads first and looks at the stamp after: a write stamps the file before it changes a byte.
    fn chunk(mut self, offset: u64, end: u64) -> io::Result<(Bytes, Self)> {
        let want = usize::try_from(end - offset).map_or(CHUNK, |left| left.min(CHUNK));
        let mut buffer = BytesMut::zeroed(want);
        let read = self.file.read_at(&mut buffer, offset)?;
        let now = Stamp::of(&self.file)?;
        if read == 0 || !now.same_content(&self.stamp) {
            return Err(io::Error::other("the file changed while it was being sent"));
        }
        self.stamp = now;
        buffer.truncate(read);
        Ok((buffer.freeze(), self))
    }
}

/// A body that is being received. Dropping it removes the file.
pub(super) struct TemporaryFile {
    store: Arc<DirectoryStore>,
    file: File,
    /// Relative to the root; gone once it has been renamed into place.
    name: Option<String>,
}

impl TemporaryFile {
    pub(super) async fn append(mut self, chunk: Bytes) -> io::Result<Self> {
        tokio::task::spawn_blocking(move || {
            self.file.write_all(&chunk)?;
            Ok(self)
        })
        .await?
    }

    /// Appends all the others to the first.
    pub(super) async fn join(files: Vec<Self>) -> Result<Self, StoreError> {
        let joined = tokio::task::spawn_blocking(move || {
            let mut files = files.into_iter();
            let mut whole = files.next().ok_or(StoreError::InvalidPart(1))?;
            for mut part in files {
                io::Seek::rewind(&mut part.file)?;
                io::copy(&mut part.file, &mut whole.file)?;
            }
            Ok(whole)
        });
        joined.await.map_err(io::Error::other)?
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = unlinkat(&self.store.root, name.as_str(), AtFlags::empty());
        }
    }
}
