//! Verifying the directory of a replica that does not run.
//!
//! The same comparisons as the scrubber's and the same checksums of whole objects, against the catalog as it stands.
//! Nothing is changed unless it is to be repaired: no row is stamped, no leftover swept, a damaged catalog is not set aside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::catalog::{Db, ScrubOrder, ScrubRow};
use super::scrub::is_shortage;
use super::tier::lock;
use super::{Computed, DiskError, Whole, whole};
use crate::object::Revision;

/// The directory, locked: no replica can begin to use it.
pub struct OfflineTier {
    dir: PathBuf,
    db: Db,
    _lock: fs::File,
}

/// What is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// The full key of the object it belongs to.
    pub key: String,
    /// The revision.
    pub validator: String,
    /// The segment file; `None`: the revision as a whole.
    pub file: Option<PathBuf>,
    /// What is wrong with it.
    pub reason: String,
}

/// What [`OfflineTier::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Segments looked at.
    pub segments: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Revisions whose recorded checksum of the whole object was compared.
    pub whole_objects: u64,
    /// Blocks that do not have their checksum.
    pub corrupt_blocks: u64,
    /// Segments and whole revisions that are not as they were written.
    pub bad: Vec<Bad>,
    /// What is wrong with the catalog itself.
    pub catalog: Option<String>,
}

impl Findings {
    /// Whether everything is as it was written.
    pub fn is_clean(&self) -> bool {
        self.bad.is_empty() && self.catalog.is_none()
    }
}

impl OfflineTier {
    /// Locks the directory and opens its catalog, migrated but otherwise as it is. Blocking.
    ///
    /// # Errors
    /// [`DiskError::Locked`] while a replica has it, [`DiskError::Io`] where there is no cache or it cannot be read,
    /// [`DiskError::Catalog`] where the catalog cannot be read.
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        let catalog = dir.join(super::catalog::FILE);
        fs::metadata(&catalog).map_err(|error| DiskError::io("open", &catalog, error))?;
        let lock = lock(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            db: Db::open_as_it_is(dir)?,
            _lock: lock,
        })
    }

    /// Segments that are held, and the bytes in them.
    ///
    /// # Errors
    /// [`DiskError::Catalog`]
    pub fn totals(&self) -> Result<(u64, u64), DiskError> {
        self.db.totals()
    }

    /// Compares every block that is held with its checksum and every complete revision with the checksum of the whole
    /// object, where one was recorded. `repair`: drops what is bad, to be fetched again. `progress` hears of
    /// bytes as they are read. Blocking.
    ///
    /// # Errors
    /// [`DiskError::Catalog`], or [`DiskError::Io`] where the process lacks what it needs to look.
    pub fn verify(
        &mut self,
        repair: bool,
        mut progress: impl FnMut(u64),
    ) -> Result<Findings, DiskError> {
        let mut findings = Findings {
            catalog: self.db.damage()?,
            ..Findings::default()
        };
        if findings.catalog.is_some() {
            if repair {
                self.db.condemn()?;
            }
            // What a damaged catalog says of bytes is not worth reading them for.
            return Ok(findings);
        }
        let mut after = None;
        while let Some(row) = self.db.next_to_scrub(ScrubOrder::After(after))? {
            after = Some(row.id);
            let path = self.path(row.id.incarnation);
            findings.segments += 1;
            let checked = row.check(&path, |len, right| {
                findings.bytes += len;
                findings.corrupt_blocks += u64::from(!right);
                progress(len);
                true
            });
            let reason = match checked {
                Ok(None) => continue,
                Ok(Some(reason)) => reason,
                Err(error) if is_shortage(&error) => {
                    return Err(DiskError::io("read", &path, error));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => "it is gone".to_owned(),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    "it is too short".to_owned()
                }
                Err(error) => format!("it cannot be read: {error}"),
            };
            if repair {
                self.drop_segment(&row)?;
            }
            findings.bad.push(Bad {
                file: Some(path),
                ..bad(&row.revision, reason)
            });
        }
        self.verify_whole(repair, &mut findings)?;
        Ok(findings)
    }

    fn verify_whole(&mut self, repair: bool, findings: &mut Findings) -> Result<(), DiskError> {
        let mut after = 0;
        while let Some((id, revision)) = self.db.next_with_whole(after)? {
            after = id;
            let (Some(Whole::Is(recorded)), Some(stored)) =
                (self.db.whole(id)?, self.db.find(&revision)?)
            else {
                continue;
            };
            let sums = |incarnation| self.db.sums(incarnation);
            let path = |incarnation| self.path(incarnation);
            let reason = match whole::checksum(&stored, recorded.algorithm(), sums, path) {
                // A file that cannot be read was named as bad already.
                Ok(Computed::Incomplete) | Err(DiskError::Io { .. }) => continue,
                Ok(Computed::Checksum(checksum)) if checksum == recorded => {
                    findings.whole_objects += 1;
                    continue;
                }
                Ok(Computed::Checksum(checksum)) => {
                    format!("its checksum is {checksum}, and S3 said {recorded}")
                }
                Ok(Computed::Contradiction) => "two files hold different bytes of it".to_owned(),
                Err(error) => return Err(error),
            };
            findings.whole_objects += 1;
            if repair {
                for (incarnation, _) in self.db.delete_revision(id)? {
                    self.unlink(incarnation)?;
                }
            }
            findings.bad.push(bad(&revision, reason));
        }
        Ok(())
    }

    fn drop_segment(&mut self, row: &ScrubRow) -> Result<(), DiskError> {
        self.db.delete_segment(&row.id)?;
        self.unlink(row.id.incarnation)
    }

    fn unlink(&self, incarnation: u128) -> Result<(), DiskError> {
        let path = self.path(incarnation);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(DiskError::io("unlink", &path, error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, incarnation: u128) -> PathBuf {
        super::tier::segment_path(&self.dir, incarnation)
    }
}

fn bad(revision: &Revision, reason: String) -> Bad {
    Bad {
        key: revision.key.key().to_owned(),
        validator: revision.validator.as_field_value().to_owned(),
        file: None,
        reason,
    }
}
