//! A bucket in process: the reference implementation of [`Remote`].
//!
//! [`MemoryRemote`] behaves as S3 does where S3, Garage and Ceph agree: `ETag` is the quoted MD5 of
//! the bytes, so equal bytes uploaded again keep their validator; a failed `If-Match` comes before
//! an unsatisfiable range; every range on an empty object is unsatisfiable. With versions on
//! ([`MemoryRemote::versioned`]) an overwritten or deleted object stays readable by its id.
//!
//! A body is taken from the object when the read is answered and never looks back, as bytes that
//! already left a real server do not: replacing the object does not touch reads under way.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _};
use md5::{Digest as _, Md5};
use parking_lot::Mutex;

use super::{Current, Guard, Remote, RemoteError, RemoteErrorKind, RemoteRead};
use crate::object::{Checksum, ChecksumAlgorithm, Representation, Validator};
use crate::semantics::{ByteRange, RangeSpec};

/// Bytes of one body frame: objects worth testing have several, and some readers must join two.
const FRAME: usize = 64 * 1024;

/// A bucket in process, for tests of what stands above a [`Remote`]. Shared by cloning.
#[derive(Clone)]
pub struct MemoryRemote {
    store: Arc<str>,
    versioned: bool,
    bucket: Arc<Mutex<Bucket>>,
}

#[derive(Default)]
struct Bucket {
    /// Oldest version first. Without versions at most one.
    objects: HashMap<String, Vec<Version>>,
    /// Numbers version ids and the seconds of `Last-Modified`.
    puts: u64,
}

#[derive(Clone)]
enum Version {
    Object(Stored),
    DeleteMarker,
}

#[derive(Clone)]
struct Stored {
    representation: Representation,
    bytes: Bytes,
    checksums: Vec<Checksum>,
}

impl Default for MemoryRemote {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryRemote {
    /// An empty bucket without versions.
    pub fn new() -> Self {
        Self {
            store: "memory://bucket".into(),
            versioned: false,
            bucket: Arc::default(),
        }
    }

    /// An empty bucket that keeps every version.
    pub fn versioned() -> Self {
        Self {
            versioned: true,
            ..Self::new()
        }
    }

    /// Stores `bytes` under `key` and says what reads will say of them. `headers` are the fields of
    /// [`Representation::headers`].
    ///
    /// `Last-Modified` does not come from the clock but grows by a second with each put, so that no
    /// two puts share one.
    pub fn put(
        &self,
        key: &str,
        bytes: impl Into<Bytes>,
        headers: &[(&str, &str)],
    ) -> Representation {
        let bytes = bytes.into();
        let mut bucket = self.bucket.lock();
        bucket.puts += 1;
        let mut headers: Vec<(Box<str>, Box<str>)> = headers
            .iter()
            .map(|&(name, value)| (name.into(), value.into()))
            .collect();
        headers.sort();
        let representation = Representation {
            validator: md5_validator(&bytes),
            size: bytes.len() as u64,
            last_modified: Some(epoch() + Duration::from_secs(bucket.puts)),
            version_id: self.versioned.then(|| format!("v{}", bucket.puts).into()),
            headers,
        };
        let versions = bucket.objects.entry(key.to_owned()).or_default();
        if !self.versioned {
            versions.clear();
        }
        versions.push(Version::Object(Stored {
            representation: representation.clone(),
            checksums: vec![Checksum::of(ChecksumAlgorithm::Crc64Nvme, &bytes)],
            bytes,
        }));
        representation
    }

    /// From now on these are the checksums stored with the current object, right or wrong. A put stores its CRC64NVME.
    pub fn set_checksums(&self, key: &str, checksums: Vec<Checksum>) {
        let mut bucket = self.bucket.lock();
        let versions = bucket.objects.get_mut(key);
        if let Some(Version::Object(stored)) = versions.and_then(|versions| versions.last_mut()) {
            stored.checksums = checksums;
        }
    }

    /// Deletes the current object; with versions on, the older ones stay readable by id.
    pub fn delete(&self, key: &str) {
        let mut bucket = self.bucket.lock();
        if !self.versioned {
            bucket.objects.remove(key);
        } else if let Some(versions) = bucket.objects.get_mut(key) {
            versions.push(Version::DeleteMarker);
        }
    }

    /// Deletes one version for good, as a lifecycle rule does.
    pub fn delete_version(&self, key: &str, version_id: &str) {
        if let Some(versions) = self.bucket.lock().objects.get_mut(key) {
            versions.retain(|version| match version {
                Version::Object(stored) => {
                    stored.representation.version_id.as_deref() != Some(version_id)
                }
                Version::DeleteMarker => true,
            });
        }
    }

    fn current(&self, key: &str, op: &'static str) -> Result<Stored, RemoteError> {
        match self
            .bucket
            .lock()
            .objects
            .get(key)
            .and_then(|versions| versions.last())
        {
            Some(Version::Object(stored)) => Ok(stored.clone()),
            Some(Version::DeleteMarker) | None => Err(RemoteError::new(
                RemoteErrorKind::Absent,
                op,
                "there is no such object",
            )),
        }
    }

    fn version(&self, key: &str, version_id: &str) -> Option<Stored> {
        self.bucket
            .lock()
            .objects
            .get(key)?
            .iter()
            .find_map(|version| match version {
                Version::Object(stored)
                    if stored.representation.version_id.as_deref() == Some(version_id) =>
                {
                    Some(stored.clone())
                }
                Version::Object(_) | Version::DeleteMarker => None,
            })
    }

    fn guarded(&self, guard: &Guard, op: &'static str) -> Result<Stored, RemoteError> {
        // A version that is gone says nothing of the object: see the same step in `s3`.
        let by_id = guard
            .version_id
            .as_deref()
            .and_then(|id| self.version(&guard.key, id));
        let stored = match by_id {
            Some(stored) => stored,
            None => self.current(&guard.key, op)?,
        };
        stored.check_match(&guard.validator, op)?;
        guard.check_size(op, stored.representation.size)?;
        Ok(stored)
    }
}

impl Stored {
    fn check_match(&self, validator: &Validator, op: &'static str) -> Result<(), RemoteError> {
        if self.representation.validator == *validator {
            return Ok(());
        }
        Err(RemoteError::new(
            RemoteErrorKind::Mismatch,
            op,
            format!(
                "the object is at {:?}, not {validator:?}",
                self.representation.validator
            ),
        ))
    }

    fn read(self, want: Option<RangeSpec>, op: &'static str) -> Result<RemoteRead, RemoteError> {
        let size = self.representation.size;
        let range = match want {
            None => ByteRange::whole(size),
            Some(want) => Some(want.resolve(size).ok_or_else(|| {
                RemoteError::new(
                    RemoteErrorKind::Unsatisfiable { size: Some(size) },
                    op,
                    format!("the range starts beyond the end of the object's {size} bytes"),
                )
            })?),
        };
        let bytes = range.map_or_else(Bytes::new, |range| self.slice(range));
        Ok(RemoteRead {
            representation: self.representation,
            range,
            body: frames(bytes),
        })
    }

    fn slice(&self, range: ByteRange) -> Bytes {
        let index = |offset: u64| usize::try_from(offset).expect("within bytes held in memory");
        self.bytes.slice(index(range.start())..index(range.end()))
    }
}

impl Remote for MemoryRemote {
    fn store(&self) -> &Arc<str> {
        &self.store
    }

    fn stat<'a>(
        &'a self,
        key: &'a str,
        pin: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Representation, RemoteError>> {
        async move {
            const OP: &str = "stat";
            let stored = self.current(key, OP)?;
            if let Some(pin) = pin {
                stored.check_match(pin, OP)?;
            }
            Ok(stored.representation)
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        guard: &'a Guard,
        want: RangeSpec,
    ) -> BoxFuture<'a, Result<RemoteRead, RemoteError>> {
        async move {
            const OP: &str = "read";
            self.guarded(guard, OP)?.read(Some(want), OP)
        }
        .boxed()
    }

    fn checksums<'a>(
        &'a self,
        guard: &'a Guard,
    ) -> BoxFuture<'a, Result<Vec<Checksum>, RemoteError>> {
        async move { Ok(self.guarded(guard, "checksums")?.checksums) }.boxed()
    }

    fn read_current<'a>(
        &'a self,
        key: &'a str,
        want: Option<RangeSpec>,
        unless: Option<&'a Validator>,
    ) -> BoxFuture<'a, Result<Current, RemoteError>> {
        async move {
            const OP: &str = "read_current";
            let stored = self.current(key, OP)?;
            if unless == Some(&stored.representation.validator) {
                let last_modified = stored.representation.last_modified;
                return Ok(Current::NotModified { last_modified });
            }
            stored.read(want, OP).map(Current::Read)
        }
        .boxed()
    }
}

fn frames(mut bytes: Bytes) -> BoxStream<'static, Result<Bytes, RemoteError>> {
    stream::iter(std::iter::from_fn(move || {
        let frame = bytes.split_to(bytes.len().min(FRAME));
        (!frame.is_empty()).then_some(Ok(frame))
    }))
    .boxed()
}

fn md5_validator(bytes: &[u8]) -> Validator {
    let mut field = String::from('"');
    for byte in Md5::digest(bytes) {
        write!(field, "{byte:02x}").expect("writing to a string cannot fail");
    }
    field.push('"');
    Validator::from_etag_field(&field).expect("hexadecimal digits in quotes")
}

/// Any fixed second, here in 2020, that no test mistakes for "never".
fn epoch() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(50 * 365 * 24)
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;
    use crate::remote::conformance::{self, Fixture};

    struct Memory(MemoryRemote);

    impl Fixture for Memory {
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
                self.0.put(key, bytes, headers);
            }
            .boxed()
        }

        fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, ()> {
            async move { self.0.delete(key) }.boxed()
        }

        fn versioned(&self) -> bool {
            self.0.versioned
        }
    }

    #[tokio::test]
    async fn conforms() {
        conformance::run(&Memory(MemoryRemote::new())).await;
    }

    #[tokio::test]
    async fn conforms_with_versions() {
        conformance::run(&Memory(MemoryRemote::versioned())).await;
    }

    #[tokio::test]
    async fn bodies_come_in_several_frames() {
        let remote = MemoryRemote::new();
        remote.put("k", vec![7; 2 * FRAME + 1], &[]);
        let Current::Read(read) = remote.read_current("k", None, None).await.unwrap() else {
            panic!("nothing was sent that could be unmodified");
        };
        let sizes: Vec<usize> = read
            .body
            .map_ok(|frame| frame.len())
            .try_collect()
            .await
            .unwrap();
        assert_eq!(sizes, [FRAME, FRAME, 1]);
    }

    #[tokio::test]
    async fn replacing_an_object_leaves_reads_under_way_alone() {
        let remote = MemoryRemote::new();
        remote.put("k", vec![1; 2 * FRAME], &[]);
        let Current::Read(mut read) = remote.read_current("k", None, None).await.unwrap() else {
            panic!("nothing was sent that could be unmodified");
        };
        read.body.try_next().await.unwrap();
        remote.put("k", vec![2; 2 * FRAME], &[]);
        let rest = read.body.try_next().await.unwrap().unwrap();
        assert!(rest.iter().all(|&byte| byte == 1));
    }

    #[tokio::test]
    async fn a_deleted_version_falls_back_to_the_current_one() {
        let remote = MemoryRemote::versioned();
        let first = remote.put("k", "same", &[]);
        remote.put("k", "same", &[]);
        remote.delete_version("k", first.version_id.as_deref().unwrap());
        let guard = Guard {
            key: "k".into(),
            validator: first.validator,
            version_id: first.version_id,
            size: Some(first.size),
        };
        assert!(remote.read(&guard, RangeSpec::From(0)).await.is_ok());
    }
}
