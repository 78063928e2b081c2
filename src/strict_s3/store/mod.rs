//! Where the objects are: in memory, or in a directory of the user's files.
//!
//! A write has two steps. A body is first received whole into a [`Payload`] (memory, or a temporary file), whose MD5
//! is taken on the way; it then becomes visible at once, under the store's lock and only if its condition still
//! holds. Parts of multipart uploads are payloads too, so [`Uploads`] serves both stores. A read yields an
//! [`Object`]: metadata and content of one and the same revision, which later writes do not change.

mod directory;
mod memory;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt};
use md5::{Digest, Md5};
use parking_lot::Mutex;

use super::checksums::{Announced, StoredChecksum};
use crate::object::{Checksum, ChecksumAlgorithm};

use self::directory::{DirectoryStore, OpenFile, TemporaryFile};
use self::memory::MemoryStore;

/// Memory bodies are handed out in pieces of this size, so that counters and cuts see progress.
const MEMORY_CHUNK: usize = 64 * 1024;

/// S3's least size for every part but the last.
const MIN_PART_SIZE: u64 = 5 * 1024 * 1024;

/// The headers an object is stored with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "filled in by callers with `..Default::default()`"
)]
pub struct PutOptions {
    /// `Content-Type`; `binary/octet-stream` where absent, as on S3.
    pub content_type: Option<String>,
    /// `Content-Encoding`
    pub content_encoding: Option<String>,
    /// `Content-Language`
    pub content_language: Option<String>,
    /// `Content-Disposition`
    pub content_disposition: Option<String>,
    /// `Cache-Control`
    pub cache_control: Option<String>,
    /// `Expires`, an HTTP date.
    pub expires: Option<String>,
    /// `x-amz-meta-*`, without that prefix.
    pub metadata: BTreeMap<String, String>,
    /// `Last-Modified`, down to the second; now where absent.
    pub last_modified: Option<SystemTime>,
    /// `ETag`, quotes included, as of a server that has given it to other bytes before; the MD5 of the bytes where absent, as on
    /// S3. Only for what is put from within.
    pub etag: Option<String>,
}

/// What a write made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PutResult {
    /// The `ETag` field value, quotes included.
    pub etag: String,
    /// The new version, where the bucket has versions.
    pub version_id: Option<String>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such bucket.
    #[error("there is no such bucket")]
    NoSuchBucket,
    /// There is such a bucket already.
    #[error("there is such a bucket already, and it is yours")]
    BucketExists,
    /// There is no such object, or its newest version is a delete marker.
    #[error("there is no such object")]
    NoSuchKey {
        /// The delete marker's version.
        marker: Option<String>,
    },
    /// There is no such version.
    #[error("there is no such version")]
    NoSuchVersion,
    /// The version asked for is a delete marker.
    #[error("the version is a delete marker")]
    DeleteMarker,
    /// The condition of a write does not hold; its field.
    #[error("{0} does not hold")]
    PreconditionFailed(&'static str),
    /// There is no such multipart upload.
    #[error("there is no such multipart upload")]
    NoSuchUpload,
    /// A part that was named was not uploaded, or has another ETag.
    #[error("part {0} was not uploaded with that ETag")]
    InvalidPart(i32),
    /// The parts were not named in ascending order.
    #[error("the parts are not in ascending order")]
    InvalidPartOrder,
    /// A part other than the last has less than 5 MiB.
    #[error("part {0} is smaller than 5 MiB and not the last")]
    EntityTooSmall(i32),
    /// The body does not have the MD5 or the checksum that was announced.
    #[error("the body's MD5 or checksum is not the announced one")]
    BadDigest,
    /// The key cannot be a file below the directory.
    #[error("the key {0:?} cannot be a file of the directory")]
    InvalidKey(String),
    /// The operation makes no sense for a directory of files.
    #[error("a directory of files cannot do that: {0}")]
    Unsupported(&'static str),
    /// The file changes faster than it can be read.
    #[error("the file is being written")]
    Busy,
    /// The request's body broke off.
    #[error("the body could not be received")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The file system failed.
    #[error("the file system failed")]
    Io(#[from] io::Error),
}

/// One revision's metadata.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    /// Field value, quotes included.
    pub(super) etag: String,
    pub(super) size: u64,
    pub(super) last_modified: SystemTime,
    pub(super) version_id: Option<String>,
    pub(super) options: Arc<PutOptions>,
    /// Absent for files of a directory, which would have to be read for one.
    pub(super) checksum: Option<StoredChecksum>,
}

/// One revision: its metadata and its bytes.
pub(super) struct Object {
    pub(super) metadata: Metadata,
    content: Content,
}

enum Content {
    Memory(Bytes),
    File(OpenFile),
}

impl Object {
    /// The bytes `start..end`. Ends with an error where they cannot be had of this revision any more.
    pub(super) fn read(self, start: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        match self.content {
            Content::File(file) => file.read(start, end),
            Content::Memory(bytes) => {
                let offset = |at: u64| usize::try_from(at).expect("an offset into memory");
                let mut rest = bytes.slice(offset(start)..offset(end));
                stream::iter(std::iter::from_fn(move || {
                    let piece = rest.split_to(rest.len().min(MEMORY_CHUNK));
                    (!piece.is_empty()).then_some(Ok(piece))
                }))
                .boxed()
            }
        }
    }
}

/// A body received whole that no key names yet.
pub(super) struct Payload {
    content: PayloadContent,
    size: u64,
    md5: [u8; 16],
}

enum PayloadContent {
    Memory(Bytes),
    File(TemporaryFile),
}

impl Payload {
    fn in_memory(bytes: Bytes) -> Self {
        Self {
            size: bytes.len() as u64,
            md5: Md5::digest(&bytes).into(),
            content: PayloadContent::Memory(bytes),
        }
    }

    pub(super) fn md5(&self) -> &[u8; 16] {
        &self.md5
    }

    /// Its checksum. `None`: it is not in memory.
    pub(super) fn checksum(&self, algorithm: ChecksumAlgorithm) -> Option<Checksum> {
        match &self.content {
            PayloadContent::Memory(bytes) => Some(Checksum::of(algorithm, bytes)),
            PayloadContent::File(_) => None,
        }
    }

    /// The ETag of this payload alone.
    pub(super) fn etag(&self) -> String {
        format!("\"{}\"", hex(&self.md5))
    }
}

/// What has to hold for a write to become visible.
#[derive(Clone, Debug, Default)]
pub(super) struct WriteCondition {
    /// `If-Match`: an ETag without quotes.
    pub(super) if_match: Option<String>,
    /// `If-None-Match: *`
    pub(super) absent: bool,
}

impl WriteCondition {
    /// Judges it for the ETag of what is there.
    fn check(&self, current: Option<&str>) -> Result<(), StoreError> {
        if self.absent && current.is_some() {
            return Err(StoreError::PreconditionFailed("If-None-Match"));
        }
        match (&self.if_match, current) {
            (Some(_), None) => Err(StoreError::NoSuchKey { marker: None }),
            (Some(tag), Some(etag)) if tag != etag.trim_matches('"') => {
                Err(StoreError::PreconditionFailed("If-Match"))
            }
            _ => Ok(()),
        }
    }
}

/// What a DELETE did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Deleted {
    pub(super) version_id: Option<String>,
    pub(super) delete_marker: bool,
}

/// One object of a listing.
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) size: u64,
    pub(super) last_modified: SystemTime,
    /// Absent where it is not known without reading the file.
    pub(super) etag: Option<String>,
}

/// Which part of a listing is asked for.
pub(super) struct ListQuery {
    pub(super) prefix: String,
    pub(super) delimiter: Option<String>,
    /// Only what sorts behind it.
    pub(super) after: String,
    pub(super) max: usize,
}

/// One page of names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Page {
    keys: Vec<String>,
    prefixes: Vec<String>,
    next: Option<String>,
}

/// One page of a listing.
pub(super) struct Listing {
    pub(super) objects: Vec<Listed>,
    pub(super) prefixes: Vec<String>,
    /// `after` of the next page.
    pub(super) next: Option<String>,
}

/// Where the objects are.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the two there are; callers choose, they do not match"
)]
pub enum Backing {
    /// In memory.
    Memory {
        /// Names of the buckets, which are empty at first.
        buckets: Vec<String>,
        /// Whether the buckets keep versions.
        versioned: bool,
    },
    /// The files below a directory: the key is the path from there. Any program may change them at any time.
    ///
    /// No key leads out of the directory, be it by `..` or by a symbolic link. A file carries no headers, so
    /// `Content-Type` and `x-amz-meta-*` of a PUT are not kept. The ETag follows the content: for files of up to
    /// 16 MiB it is the MD5 of the content (what S3 would say), taken once and kept for as long as device, inode, mtime,
    /// ctime and size stay. For larger ones it is the MD5 of just these five, with a `-0` behind it so that no client
    /// takes it for one of the content: reading 100 GB before the first byte can be sent would be worse, and no program
    /// can write to a file and leave its ctime. A file changed less than a clock tick ago is not labelled before
    /// the tick is over (two changes in one tick look alike); one that changes all the time is answered 503. What this
    /// cannot see is a program that writes through a shared memory mapping it dirtied before.
    Directory {
        /// The bucket's name.
        bucket: String,
        /// The directory, which must exist.
        root: PathBuf,
    },
}

/// The store behind a server.
pub(super) struct Store {
    kind: Kind,
    uploads: Uploads,
}

enum Kind {
    Memory(MemoryStore),
    Directory(Arc<DirectoryStore>),
}

impl Store {
    pub(super) fn open(backing: Backing) -> io::Result<Self> {
        let names = match &backing {
            Backing::Memory { buckets, .. } => buckets.as_slice(),
            Backing::Directory { bucket, .. } => std::slice::from_ref(bucket),
        };
        if let Some(bad) = names
            .iter()
            .find(|name| !s3s::path::check_bucket_name(name))
        {
            // `s3s` would answer every request for it with 400.
            let message = format!(
                "{bad:?} is no bucket name: it takes 3 to 63 lower-case letters, digits, dots and hyphens"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let kind = match backing {
            Backing::Memory { buckets, versioned } => {
                Kind::Memory(MemoryStore::new(buckets, versioned))
            }
            Backing::Directory { bucket, root } => {
                Kind::Directory(Arc::new(DirectoryStore::open(bucket, &root)?))
            }
        };
        Ok(Self {
            kind,
            uploads: Uploads::default(),
        })
    }

    pub(super) fn buckets(&self) -> Vec<String> {
        match &self.kind {
            Kind::Memory(store) => store.buckets(),
            Kind::Directory(store) => vec![store.bucket().to_owned()],
        }
    }

    pub(super) fn check_bucket(&self, bucket: &str) -> Result<(), StoreError> {
        let known = self.buckets().iter().any(|name| name == bucket);
        known.then_some(()).ok_or(StoreError::NoSuchBucket)
    }

    /// Makes an empty bucket; one that exists stays as it is.
    ///
    /// # Errors
    /// [`StoreError::BucketExists`], and [`StoreError::Unsupported`] for a directory.
    pub(super) fn create_bucket(&self, bucket: &str) -> Result<(), StoreError> {
        match &self.kind {
            _ if self.check_bucket(bucket).is_ok() => Err(StoreError::BucketExists),
            Kind::Memory(store) => {
                store.create_bucket(bucket);
                Ok(())
            }
            Kind::Directory(_) => Err(StoreError::Unsupported("have a second bucket")),
        }
    }

    pub(super) async fn read(
        &self,
        bucket: &str,
        key: &str,
        version: Option<&str>,
    ) -> Result<Object, StoreError> {
        match &self.kind {
            Kind::Memory(store) => store.read(bucket, key, version),
            Kind::Directory(store) => {
                self.check_bucket(bucket)?;
                if version.is_some_and(|version| version != "null") {
                    return Err(StoreError::NoSuchVersion);
                }
                let key = key.to_owned();
                blocking(store, move |store| store.read(&key)).await
            }
        }
    }

    /// Takes a body in. Dropping the future forgets what has been received.
    pub(super) async fn receive<E>(
        &self,
        mut body: impl futures::Stream<Item = Result<Bytes, E>> + Unpin + Send,
    ) -> Result<Payload, StoreError>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut hasher = Md5::new();
        let mut size = 0;
        let mut memory = BytesMut::new();
        let mut file = match &self.kind {
            Kind::Memory(_) => None,
            Kind::Directory(store) => Some(blocking(store, DirectoryStore::temporary).await?),
        };
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| StoreError::Body(error.into()))?;
            hasher.update(&chunk);
            size += chunk.len() as u64;
            match file.take() {
                None => memory.extend_from_slice(&chunk),
                Some(open) => file = Some(open.append(chunk).await?),
            }
        }
        let content = match file {
            None => PayloadContent::Memory(memory.freeze()),
            Some(file) => PayloadContent::File(file),
        };
        Ok(Payload {
            content,
            size,
            md5: hasher.finalize().into(),
        })
    }

    /// Makes a payload the newest revision of an object, if it has the checksum it came with.
    pub(super) async fn commit(
        &self,
        bucket: &str,
        key: &str,
        payload: Payload,
        announced: &Announced,
        options: PutOptions,
        condition: WriteCondition,
    ) -> Result<PutResult, StoreError> {
        let label = Label {
            etag: payload.etag(),
            checksum: checked(&payload, announced)?
                .as_ref()
                .map(StoredChecksum::full),
        };
        self.commit_as(bucket, key, payload, label, options, condition)
            .await
    }

    async fn commit_as(
        &self,
        bucket: &str,
        key: &str,
        payload: Payload,
        label: Label,
        options: PutOptions,
        condition: WriteCondition,
    ) -> Result<PutResult, StoreError> {
        match (&self.kind, payload.content) {
            (Kind::Memory(store), PayloadContent::Memory(bytes)) => {
                store.put(bucket, key, bytes, label, options, &condition)
            }
            (Kind::Directory(store), PayloadContent::File(file)) => {
                self.check_bucket(bucket)?;
                let key = key.to_owned();
                let etag = blocking(store, move |store| store.put(&key, file, &condition)).await?;
                Ok(PutResult {
                    etag,
                    version_id: None,
                })
            }
            _ => unreachable!("a store commits the payloads that it received"),
        }
    }

    /// Puts an object at once, without a request.
    pub(super) fn put_now(
        &self,
        bucket: &str,
        key: &str,
        bytes: Bytes,
        options: PutOptions,
    ) -> Result<PutResult, StoreError> {
        let Kind::Memory(store) = &self.kind else {
            return Err(StoreError::Unsupported(
                "put from within; write the file instead",
            ));
        };
        let payload = Payload::in_memory(bytes.clone());
        let checksum = payload.checksum(ChecksumAlgorithm::Crc64Nvme);
        let label = Label {
            etag: options.etag.clone().unwrap_or_else(|| payload.etag()),
            checksum: checksum.as_ref().map(StoredChecksum::full),
        };
        store.put(
            bucket,
            key,
            bytes,
            label,
            options,
            &WriteCondition::default(),
        )
    }

    /// Deletes an object at once, without a request.
    pub(super) fn delete_now(&self, bucket: &str, key: &str) -> Result<Deleted, StoreError> {
        let Kind::Memory(store) = &self.kind else {
            return Err(StoreError::Unsupported(
                "delete from within; remove the file instead",
            ));
        };
        store.delete(bucket, key, None)
    }

    pub(super) async fn delete(
        &self,
        bucket: &str,
        key: &str,
        version: Option<&str>,
    ) -> Result<Deleted, StoreError> {
        match &self.kind {
            Kind::Memory(store) => store.delete(bucket, key, version),
            Kind::Directory(store) => {
                self.check_bucket(bucket)?;
                let key = key.to_owned();
                blocking(store, move |store| store.delete(&key)).await?;
                Ok(Deleted::default())
            }
        }
    }

    pub(super) async fn list(&self, bucket: &str, query: ListQuery) -> Result<Listing, StoreError> {
        match &self.kind {
            Kind::Memory(store) => store.list(bucket, &query),
            Kind::Directory(store) => {
                self.check_bucket(bucket)?;
                blocking(store, move |store| store.list(&query)).await
            }
        }
    }

    pub(super) fn create_upload(
        &self,
        bucket: &str,
        key: &str,
        announced: Announced,
        options: PutOptions,
    ) -> Result<String, StoreError> {
        self.check_bucket(bucket)?;
        Ok(self.uploads.create(bucket, key, announced, options))
    }

    /// Keeps a part; a part of the same number is replaced. Yields its ETag.
    pub(super) fn add_part(
        &self,
        upload: &UploadName<'_>,
        number: i32,
        payload: Payload,
        announced: &Announced,
    ) -> Result<String, StoreError> {
        checked(&payload, announced)?;
        self.uploads.add(upload, number, payload)
    }

    /// Joins the named parts (number, ETag without quotes) into an object. An upload whose parts fit is over then,
    /// whatever becomes of the write.
    pub(super) async fn complete_upload(
        &self,
        upload: &UploadName<'_>,
        parts: &[(i32, Option<String>)],
        condition: WriteCondition,
    ) -> Result<PutResult, StoreError> {
        let (payloads, announced, options) = self.uploads.take(upload, parts)?;
        let mut digests = Md5::new();
        for payload in &payloads {
            digests.update(payload.md5);
        }
        let digest: [u8; 16] = digests.finalize().into();
        let etag = format!("\"{}-{}\"", hex(&digest), payloads.len());
        let algorithm = announced.algorithm;
        let of_parts: Option<Vec<Checksum>> = payloads
            .iter()
            .map(|payload| payload.checksum(algorithm))
            .collect();
        let joined = join(payloads).await?;
        let checksum = if announced.composite {
            of_parts.map(|parts| StoredChecksum::composite(algorithm, parts.iter()))
        } else {
            let checksum = joined.checksum(algorithm);
            checksum.as_ref().map(StoredChecksum::full)
        };
        let label = Label { etag, checksum };
        self.commit_as(upload.bucket, upload.key, joined, label, options, condition)
            .await
    }

    pub(super) fn abort_upload(&self, upload: &UploadName<'_>) -> Result<(), StoreError> {
        self.uploads.abort(upload)
    }
}

/// Runs file system work of a store off the runtime's workers. It runs to its end even if the future is dropped.
async fn blocking<T: Send + 'static>(
    store: &Arc<DirectoryStore>,
    work: impl FnOnce(&Arc<DirectoryStore>) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let store = Arc::clone(store);
    tokio::task::spawn_blocking(move || work(&store))
        .await
        .map_err(io::Error::other)?
}

/// What an object is labelled with, besides its headers.
struct Label {
    /// Quotes included.
    etag: String,
    checksum: Option<StoredChecksum>,
}

/// The payload's checksum, compared with the one that came with it. `None`: it is not in memory.
fn checked(payload: &Payload, announced: &Announced) -> Result<Option<Checksum>, StoreError> {
    let checksum = payload.checksum(announced.algorithm);
    match &checksum {
        Some(checksum) if !announced.fits(checksum) => Err(StoreError::BadDigest),
        _ => Ok(checksum),
    }
}

/// One payload out of many, in order. Its MD5 is the first one's and means nothing.
async fn join(payloads: Vec<Payload>) -> Result<Payload, StoreError> {
    let size = payloads.iter().map(|payload| payload.size).sum();
    let mut memory = BytesMut::new();
    let mut files = Vec::new();
    let mut md5 = None;
    for payload in payloads {
        md5.get_or_insert(payload.md5);
        match payload.content {
            PayloadContent::Memory(bytes) => memory.extend_from_slice(&bytes),
            PayloadContent::File(file) => files.push(file),
        }
    }
    let content = if files.is_empty() {
        PayloadContent::Memory(memory.freeze())
    } else {
        PayloadContent::File(TemporaryFile::join(files).await?)
    };
    Ok(Payload {
        content,
        size,
        md5: md5.unwrap_or_default(),
    })
}

/// A multipart upload as requests name it: all three have to fit.
pub(super) struct UploadName<'a> {
    pub(super) bucket: &'a str,
    pub(super) key: &'a str,
    pub(super) id: &'a str,
}

/// The multipart uploads under way.
#[derive(Default)]
struct Uploads {
    state: Mutex<UploadsState>,
}

#[derive(Default)]
struct UploadsState {
    created: u64,
    open: HashMap<String, Upload>,
}

struct Upload {
    bucket: String,
    key: String,
    announced: Announced,
    options: PutOptions,
    parts: BTreeMap<i32, Payload>,
}

impl UploadsState {
    fn named(&mut self, name: &UploadName<'_>) -> Result<&mut Upload, StoreError> {
        self.open
            .get_mut(name.id)
            .filter(|upload| upload.bucket == name.bucket && upload.key == name.key)
            .ok_or(StoreError::NoSuchUpload)
    }
}

impl Uploads {
    fn create(&self, bucket: &str, key: &str, announced: Announced, options: PutOptions) -> String {
        let mut state = self.state.lock();
        state.created += 1;
        let id = format!("upload-{}", state.created);
        let upload = Upload {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            announced,
            options,
            parts: BTreeMap::new(),
        };
        state.open.insert(id.clone(), upload);
        id
    }

    fn add(&self, name: &UploadName<'_>, number: i32, part: Payload) -> Result<String, StoreError> {
        let etag = part.etag();
        self.state.lock().named(name)?.parts.insert(number, part);
        Ok(etag)
    }

    fn take(
        &self,
        name: &UploadName<'_>,
        parts: &[(i32, Option<String>)],
    ) -> Result<(Vec<Payload>, Announced, PutOptions), StoreError> {
        let mut state = self.state.lock();
        let upload = state.named(name)?;
        if !parts.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err(StoreError::InvalidPartOrder);
        }
        for (position, (number, etag)) in parts.iter().enumerate() {
            let part = upload
                .parts
                .get(number)
                .ok_or(StoreError::InvalidPart(*number))?;
            if etag.as_ref().is_some_and(|etag| *etag != hex(&part.md5)) {
                return Err(StoreError::InvalidPart(*number));
            }
            if part.size < MIN_PART_SIZE && position + 1 < parts.len() {
                return Err(StoreError::EntityTooSmall(*number));
            }
        }
        if parts.is_empty() {
            return Err(StoreError::InvalidPart(1));
        }
        let mut upload = state.open.remove(name.id).ok_or(StoreError::NoSuchUpload)?;
        let payloads = parts
            .iter()
            .filter_map(|(number, _)| upload.parts.remove(number))
            .collect();
        Ok((payloads, upload.announced, upload.options))
    }

    fn abort(&self, name: &UploadName<'_>) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        state.named(name)?;
        state.open.remove(name.id);
        Ok(())
    }
}

/// Picks a page out of all keys, which come sorted.
fn paginate<'a>(keys: impl Iterator<Item = &'a str>, query: &ListQuery) -> Page {
    let mut page = Page::default();
    let mut last = None;
    for key in keys {
        let Some(rest) = key.strip_prefix(query.prefix.as_str()) else {
            continue;
        };
        let folded = query
            .delimiter
            .as_deref()
            .filter(|delimiter| !delimiter.is_empty())
            .and_then(|delimiter| {
                let at = rest.find(delimiter)?;
                Some(&key[..query.prefix.len() + at + delimiter.len()])
            });
        let name = folded.unwrap_or(key);
        if name <= query.after.as_str() || last == Some(name) {
            continue;
        }
        if page.keys.len() + page.prefixes.len() == query.max {
            page.next = last.map(str::to_owned);
            break;
        }
        match folded {
            Some(prefix) => page.prefixes.push(prefix.to_owned()),
            None => page.keys.push(key.to_owned()),
        }
        last = Some(name);
    }
    page
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(delimiter: Option<&str>, prefix: &str, after: &str, max: usize) -> Page {
        let keys = ["a", "b/1", "b/2", "b/c/3", "d", "e/"];
        let query = ListQuery {
            prefix: prefix.to_owned(),
            delimiter: delimiter.map(str::to_owned),
            after: after.to_owned(),
            max,
        };
        paginate(keys.into_iter(), &query)
    }

    #[test]
    fn a_delimiter_folds_keys_and_pages_go_on_behind_a_folded_one() {
        let first = page(Some("/"), "", "", 2);
        assert_eq!(
            (first.keys, first.prefixes),
            (vec!["a".to_owned()], vec!["b/".to_owned()])
        );
        assert_eq!(first.next.as_deref(), Some("b/"));
        let second = page(Some("/"), "", "b/", 2);
        assert_eq!(
            (second.keys, second.prefixes),
            (vec!["d".to_owned()], vec!["e/".to_owned()])
        );
        assert_eq!(second.next, None);
    }

    #[test]
    fn prefixes_and_pages_without_a_delimiter() {
        let first = page(None, "b/", "", 2);
        assert_eq!(first.keys, ["b/1", "b/2"]);
        assert_eq!(first.next.as_deref(), Some("b/2"));
        assert_eq!(page(None, "b/", "b/2", 2).keys, ["b/c/3"]);
        assert_eq!(page(None, "", "", 0), Page::default());
    }
}
