//! Objects in memory, with versions where wanted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Content, Deleted, Label, ListQuery, Listed, Listing, Metadata, Object, PutOptions, PutResult,
    StoreError, WriteCondition, paginate,
};

pub(super) struct MemoryStore {
    versioned: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Oldest version first. No list is empty.
    buckets: BTreeMap<String, BTreeMap<String, Vec<Version>>>,
    versions: u64,
}

struct Version {
    /// `None` where the bucket has no versions.
    id: Option<String>,
    content: Stored,
}

enum Stored {
    Object { metadata: Metadata, bytes: Bytes },
    DeleteMarker,
}

impl Version {
    fn named(&self, id: &str) -> bool {
        self.id.as_deref().unwrap_or("null") == id
    }

    fn metadata(&self) -> Option<&Metadata> {
        match &self.content {
            Stored::Object { metadata, .. } => Some(metadata),
            Stored::DeleteMarker => None,
        }
    }
}

impl State {
    fn bucket(&mut self, name: &str) -> Result<&mut BTreeMap<String, Vec<Version>>, StoreError> {
        self.buckets.get_mut(name).ok_or(StoreError::NoSuchBucket)
    }

    /// Opaque to clients, and as long as S3's.
    fn next_version(&mut self) -> String {
        self.versions += 1;
        format!("v{:031x}", self.versions)
    }
}

impl MemoryStore {
    pub(super) fn new(buckets: Vec<String>, versioned: bool) -> Self {
        let buckets = buckets
            .into_iter()
            .map(|name| (name, BTreeMap::new()))
            .collect();
        Self {
            versioned,
            state: Mutex::new(State {
                buckets,
                versions: 0,
            }),
        }
    }

    pub(super) fn buckets(&self) -> Vec<String> {
        self.state.lock().buckets.keys().cloned().collect()
    }

    pub(super) fn create_bucket(&self, name: &str) {
        self.state
            .lock()
            .buckets
            .entry(name.to_owned())
            .or_default();
    }

    pub(super) fn read(
        &self,
        bucket: &str,
        key: &str,
        version: Option<&str>,
    ) -> Result<Object, StoreError> {
        let mut state = self.state.lock();
        let versions = state
            .bucket(bucket)?
            .get(key)
            .map_or(&[][..], Vec::as_slice);
        let found = match version {
            None => versions
                .last()
                .ok_or(StoreError::NoSuchKey { marker: None })?,
            Some(id) => versions
                .iter()
                .find(|candidate| candidate.named(id))
                .ok_or(StoreError::NoSuchVersion)?,
        };
        match &found.content {
            Stored::Object { metadata, bytes } => Ok(Object {
                metadata: metadata.clone(),
                content: Content::Memory(bytes.clone()),
            }),
            Stored::DeleteMarker if version.is_some() => Err(StoreError::DeleteMarker),
            Stored::DeleteMarker => Err(StoreError::NoSuchKey {
                marker: found.id.clone(),
            }),
        }
    }

    pub(super) fn put(
        &self,
        bucket: &str,
        key: &str,
        bytes: Bytes,
        label: Label,
        options: PutOptions,
        condition: &WriteCondition,
    ) -> Result<PutResult, StoreError> {
        let mut state = self.state.lock();
        let id = self.versioned.then(|| state.next_version());
        let versions = state.bucket(bucket)?.entry(key.to_owned()).or_default();
        let current = versions.last().and_then(Version::metadata);
        if let Err(error) = condition.check(current.map(|metadata| metadata.etag.as_str())) {
            if versions.is_empty() {
                state.bucket(bucket)?.remove(key);
            }
            return Err(error);
        }
        let Label { etag, checksum } = label;
        let metadata = Metadata {
            etag: etag.clone(),
            size: bytes.len() as u64,
            last_modified: options.last_modified.unwrap_or_else(SystemTime::now),
            version_id: id.clone(),
            options: Arc::new(options),
            checksum,
        };
        if !self.versioned {
            versions.clear();
        }
        versions.push(Version {
            id: id.clone(),
            content: Stored::Object { metadata, bytes },
        });
        Ok(PutResult {
            etag,
            version_id: id,
        })
    }

    pub(super) fn delete(
        &self,
        bucket: &str,
        key: &str,
        version: Option<&str>,
    ) -> Result<Deleted, StoreError> {
        let mut state = self.state.lock();
        let marker = (self.versioned && version.is_none()).then(|| state.next_version());
        let objects = state.bucket(bucket)?;
        if let Some(id) = marker {
            objects.entry(key.to_owned()).or_default().push(Version {
                id: Some(id.clone()),
                content: Stored::DeleteMarker,
            });
            return Ok(Deleted {
                version_id: Some(id),
                delete_marker: true,
            });
        }
        // Deleting what is not there succeeds, as on S3.
        let Some(versions) = objects.get_mut(key) else {
            return Ok(Deleted::default());
        };
        let mut deleted = Deleted::default();
        versions.retain(|candidate| {
            let gone = candidate.named(version.unwrap_or("null"));
            if gone {
                deleted.version_id.clone_from(&candidate.id);
                deleted.delete_marker = candidate.metadata().is_none();
            }
            !gone
        });
        if versions.is_empty() {
            objects.remove(key);
        }
        Ok(deleted)
    }

    pub(super) fn list(&self, bucket: &str, query: &ListQuery) -> Result<Listing, StoreError> {
        let mut state = self.state.lock();
        let objects = state.bucket(bucket)?;
        let newest = |key: &str| {
            objects
                .get(key)
                .and_then(|versions| versions.last()?.metadata())
        };
        let page = paginate(
            objects
                .keys()
                .map(String::as_str)
                .filter(|key| newest(key).is_some()),
            query,
        );
        let listed = page.keys.into_iter().filter_map(|key| {
            let metadata = newest(&key)?;
            Some(Listed {
                size: metadata.size,
                last_modified: metadata.last_modified,
                etag: Some(metadata.etag.clone()),
                key,
            })
        });
        Ok(Listing {
            objects: listed.collect(),
            prefixes: page.prefixes,
            next: page.next,
        })
    }
}
