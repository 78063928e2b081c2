//! The catalog: what is on disk, in SQLite.
//!
//! `objects` remembers what was current for a key; `revisions` names the bytes;
//! `segments` says which blocks of which file hold them; `checksums` has two CRCs per block and is
//! apart so that the first touch of a revision reads only bits. `meta` holds the sum of all
//! segments' bytes, and that of those in the main queue, kept by triggers, so that a start reads two rows however
//! much is held.
//!
//! The two queues of [`super::policy`] are an index over `segments`: `queue` is 0 for small, 1 for main, and `place`
//! gives the order in it. `ghosts` has the policy's memory from an orderly end to the next start.
//!
//! There is one connection behind one lock, and [`super::tier`] holds that lock from a read of the
//! catalog until memory agrees with it. That is what makes loads, admissions, evictions and purges
//! take turns; nothing on the warm path needs it.
//!
//! What is said of bytes can rot like the bytes. So a row of `segments` bears a *seal*, a CRC over all
//! of it that decides which bytes are served for what: one that does not fit its seal is not found (ADR 13).
//!
//! Durability (ADR 8): WAL, `synchronous=NORMAL`. A power loss keeps a *prefix* of the
//! transactions. Purges, flushes and the orderly shutdown commit with `synchronous=FULL`.

mod file;
mod rows;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension, Transaction, params};

#[cfg(test)]
pub(super) use self::file::LOG_MOVED_FROM;
pub(super) use self::file::{Checkpointer, FILE, LONGEST_LOG};
use self::file::{
    DAMAGED, MIGRATIONS, Refused, catalog_error, connect, connect_to_read, failed, is_damage, mark,
    second, set_aside,
};
pub(super) use self::rows::millis;
use self::rows::{
    blob, commit_segment, delete_segment, find, geometry_at, incarnation, insert_revision,
    last_revision, meta, next_to_scrub, number, prefix_end, record_served, representation,
    revision_at, set_current, signed, stamp_verified, sums, unsigned, update_representation,
};
use super::coverage::{Coverage, Geometry};
use super::durability::Syncer;
use super::failpoint::{self, Step};
use super::policy::Queue;
use super::revive::{Identity, identity, useless};
use super::sums::{BlockSum, SegmentSums};
use super::{CurrentRecord, DiskError, PurgeTarget, Whole};
use crate::object::{ObjectKey, Representation, Revision};

/// Most rows of `objects`. They are small (about 300 bytes) and worth something only while the
/// remote is down; beyond this the ones not asked about for longest go.
const MAX_OBJECTS: i64 = 1_000_000;

/// One segment file as the catalog knows it.
#[derive(Clone, Debug)]
pub(super) struct StoredSegment {
    pub(super) idx: u64,
    pub(super) incarnation: u128,
    /// The run that wrote or last verified it.
    pub(super) run: i64,
    pub(super) bits: Vec<u8>,
    pub(super) bytes: u64,
    pub(super) served: u64,
}

/// One revision as the catalog knows it.
#[derive(Debug)]
pub(super) struct StoredRevision {
    pub(super) id: i64,
    pub(super) representation: Representation,
    pub(super) segment_size: u64,
    pub(super) block_size: u64,
    pub(super) segments: Vec<StoredSegment>,
}

impl StoredRevision {
    /// No byte of it is held, of those that it has.
    pub(super) fn is_bare(&self) -> bool {
        self.segments.is_empty() && self.representation.size > 0
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            size: self.representation.size,
            block_size: self.block_size,
            segment_size: self.segment_size,
        }
    }
}

/// A stretch of `revisions` that was searched for some of which no byte is held.
#[derive(Debug)]
pub(super) struct Searched {
    /// The id to go on before.
    pub(super) first: i64,
    /// Of which there are bytes to be held.
    pub(super) bare: Vec<(i64, Revision)>,
    /// Of which there are none, newest first.
    pub(super) empty: Vec<(i64, Revision)>,
}

/// Names a row of `segments`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SegmentId {
    pub(super) revision: i64,
    pub(super) idx: u64,
    pub(super) incarnation: u128,
}

/// A row that may be evicted.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) id: SegmentId,
    pub(super) revision: Revision,
    pub(super) bytes: u64,
    /// Those of them that can be sent.
    pub(super) content: u64,
    pub(super) place: u64,
    pub(super) served: u64,
}

/// A row's way to the end of a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) id: SegmentId,
    pub(super) queue: Queue,
    pub(super) place: u64,
    pub(super) served: u64,
}

/// What became true of one segment file: its new blocks are synced.
#[derive(Debug)]
pub(super) struct SegmentCommit {
    pub(super) id: SegmentId,
    /// Blocks of the segment.
    pub(super) blocks: u32,
    pub(super) bytes: u64,
    /// Where it begins; a row that is there stays where it is.
    pub(super) queue: Queue,
    pub(super) place: u64,
    pub(super) served: u64,
    pub(super) covered: Vec<(u32, BlockSum)>,
}

/// One write-behind transaction.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) segments: Vec<SegmentCommit>,
    /// Bytes served of segments that memory forgets.
    pub(super) served: Vec<(SegmentId, u64)>,
    /// Segments whose checksums were verified by this run.
    pub(super) verified: Vec<SegmentId>,
    pub(super) representations: Vec<(i64, Arc<Representation>)>,
    pub(super) current: Vec<(ObjectKey, Option<CurrentRecord>)>,
    /// Revisions that memory forgot: not kept if no byte of them is.
    pub(super) forgotten: Vec<i64>,
}

/// A segment as it is to be verified.
#[derive(Debug)]
pub(super) struct ScrubRow {
    pub(super) id: SegmentId,
    pub(super) revision: Revision,
    pub(super) geometry: Geometry,
    /// `None`: they do not fit the geometry.
    pub(super) covered: Option<Coverage>,
    /// `None`: there are none.
    pub(super) sums: Option<SegmentSums>,
    /// Whether the row is as it was written.
    pub(super) sealed: bool,
    /// Milliseconds since 1970.
    pub(super) verified: u64,
    /// Nothing is known yet of the checksum of the whole revision.
    pub(super) unaudited: bool,
}

/// In which order segments are verified.
#[derive(Clone, Copy, Debug)]
pub(super) enum ScrubOrder {
    /// The one that was verified longest ago.
    Oldest,
    /// The one after this, in the order of their names; `None`: the first.
    After(Option<SegmentId>),
}

/// What only memory knows at the end of a run.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Bytes served of each segment.
    pub(super) served: Vec<(SegmentId, u64)>,
    /// See [`super::policy::Policy::save`].
    pub(super) ghosts: Vec<u8>,
}

/// What a purge deleted.
#[derive(Debug, Default)]
pub(super) struct Deleted {
    /// Every revision up to this id that matches is gone, in the catalog or not.
    pub(super) up_to: i64,
    pub(super) revisions: u64,
    /// Incarnation and bytes.
    pub(super) segments: Vec<(u128, u64)>,
}

/// What a start needs to know.
#[derive(Debug)]
pub(super) struct Start {
    /// Number of this run.
    pub(super) run: i64,
    /// Segments recorded by this run or an earlier one must be verified before they are served.
    pub(super) suspect_run: i64,
    /// Bytes in segment files.
    pub(super) bytes: u64,
    /// Those of them that stand in the main queue.
    pub(super) main_bytes: u64,
    /// The last place in either queue.
    pub(super) last_place: u64,
    /// Revisions up to this id are older than this run.
    pub(super) last_revision: i64,
    /// The unit of coverage of the newest revision; `None`: there is none.
    pub(super) last_block_size: Option<u64>,
    /// What the policy remembered at the last orderly end; nothing after another.
    pub(super) ghosts: Vec<u8>,
}

/// The lock around the one connection; closed for good by [`Catalog::close`].
pub(super) struct Catalog {
    db: Mutex<Option<Db>>,
    /// The file, for as long as it is open.
    file: Mutex<Option<Identity>>,
}

/// The open catalog.
pub(super) struct Db {
    connection: Connection,
    run: i64,
    dir: PathBuf,
}

impl Catalog {
    /// None: whoever asks is told that the tier is closed.
    pub(super) fn absent() -> Self {
        Self {
            db: Mutex::new(None),
            file: Mutex::new(None),
        }
    }

    /// Puts another one in the place of this absent one.
    pub(super) fn replace(&self, mut other: Self) {
        let mut slot = self.db.lock();
        *self.file.lock() = other.file.get_mut().take();
        *slot = other.db.get_mut().take();
    }

    /// Closes it as it is, and touches nothing in the directory: its name may lead to another file by now.
    pub(super) fn abandon(&self) {
        let mut slot = self.db.lock();
        *self.file.lock() = None;
        if let Some(db) = slot.take() {
            // Else the last connection removes the log, by its name.
            let kept = db
                .connection
                .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
            if let Err(error) = kept {
                tracing::warn!(%error, "could not keep the log of a catalog that is given up");
            }
        }
    }

    /// Has the next [`Catalog::open`] set it aside.
    pub(super) fn distrust(dir: &Path, reason: &str, sync: &dyn Syncer) -> Result<(), DiskError> {
        mark(dir, reason, sync).map_err(|error| DiskError::io("write", &dir.join(DAMAGED), error))
    }

    /// Whether it will.
    pub(super) fn is_marked(dir: &Path) -> bool {
        dir.join(DAMAGED).exists()
    }

    /// The file that is open.
    pub(super) fn identity(&self) -> std::io::Result<Identity> {
        self.file
            .lock()
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Opens `dir`'s catalog and begins a run. A catalog that is damaged or newer than this
    /// program is set aside, and an empty one begun: a cache that starts cold beats one that does not.
    pub(super) fn open(dir: &Path, sync: &dyn Syncer) -> Result<(Self, Start), DiskError> {
        let path = dir.join(FILE);
        let damaged = dir.join(DAMAGED);
        if Self::is_marked(dir) {
            let reason = fs::read_to_string(&damaged).unwrap_or_default();
            set_aside(dir, "corrupt", reason.trim(), sync)?;
        }
        let files = ["", "-wal", "-shm"].map(|suffix| dir.join(format!("{FILE}{suffix}")));
        if let Some(reason) = useless(files.iter().map(PathBuf::as_path)) {
            set_aside(dir, "unusable", &reason, sync)?;
        }
        let connect = || connect(dir);
        let opened = match connect() {
            Ok(connection) => Ok(connection),
            Err(Refused::Newer(version)) => {
                let reason = format!(
                    "it has schema version {version}, and this program knows {} at most",
                    MIGRATIONS.len()
                );
                set_aside(dir, "newer", &reason, sync)?;
                connect()
            }
            Err(Refused::Sqlite(error)) if is_damage(&error) => {
                set_aside(dir, "corrupt", &error.to_string(), sync)?;
                connect()
            }
            refused => refused,
        };
        let connection = opened.map_err(|refused| match refused {
            Refused::Newer(version) => DiskError::Catalog(format!(
                "{} has schema version {version} right after it was made",
                path.display()
            )),
            Refused::Sqlite(error) => DiskError::Catalog(format!("{}: {error}", path.display())),
        })?;
        let mut db = Db {
            connection,
            run: 0,
            dir: dir.to_owned(),
        };
        let start = db.begin_run()?;
        db.run = start.run;
        failpoint::reached(dir, Step::RunBegun);
        let file = identity(fs::metadata(&path))
            .map_err(|error| DiskError::io("look at", &path, error))?;
        Ok((
            Self {
                db: Mutex::new(Some(db)),
                file: Mutex::new(Some(file)),
            },
            start,
        ))
    }

    /// A second connection, for checkpoints: they sync, and must not hold the lock meanwhile.
    pub(super) fn checkpointer(dir: &Path) -> Result<Checkpointer, DiskError> {
        Ok(Checkpointer {
            connection: second(dir)?,
            log: dir.join(format!("{FILE}-wal")),
        })
    }

    /// A connection of its own for the sweep, which reads the whole catalog and must not hold the lock meanwhile.
    pub(super) fn reader(dir: &Path) -> Result<Reader, DiskError> {
        Ok(Reader {
            connection: second(dir)?,
            dir: dir.to_owned(),
        })
    }

    /// Takes the lock. Blocks while others use the catalog, so never on a runtime's worker.
    pub(super) fn lock(&self) -> Result<MappedMutexGuard<'_, Db>, DiskError> {
        MutexGuard::try_map(self.db.lock(), Option::as_mut)
            .map_err(|_| DiskError::Catalog("the tier has been closed".into()))
    }

    /// [`close`](Self::close), but what it holds can still be looked up, read-only: another process may write it now.
    /// Returns the bytes that it counted in segment files.
    pub(super) fn release(&self, dir: &Path, left: &Left) -> Result<u64, DiskError> {
        // Until the reader is there, so that nobody finds neither.
        let mut slot = self.db.lock();
        let reader = connect_to_read(&dir.join(FILE)).map_err(|error| catalog_error(&error));
        if let Some(db) = slot.take() {
            db.end(left)?;
        }
        let reader = slot.insert(Db {
            connection: reader?,
            run: 0,
            dir: dir.to_owned(),
        });
        reader
            .read(|connection| meta(connection, "bytes"))
            .map(unsigned)
    }

    /// Begins a run of its own again after [`release`](Self::release), as [`open`](Self::open) does.
    pub(super) fn reopen(&self, dir: &Path, sync: &dyn Syncer) -> Result<Start, DiskError> {
        let (opened, start) = Self::open(dir, sync)?;
        self.replace(opened);
        Ok(start)
    }

    /// Ends a connection that [`release`](Self::release) left for reading.
    pub(super) fn stop_reading(&self) {
        *self.db.lock() = None;
    }

    /// The orderly end: records what is `left`, marks the run clean and makes it all durable.
    pub(super) fn close(&self, left: &Left) -> Result<(), DiskError> {
        match self.db.lock().take() {
            Some(db) => db.end(left),
            None => Ok(()),
        }
    }
}

/// How a transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Commit {
    /// Atomic and ordered; a power loss may take it back (together with all later ones).
    Ordered,
    /// On stable storage when the call returns.
    Durable,
}

impl Db {
    /// The last transaction of a run.
    fn end(mut self, left: &Left) -> Result<(), DiskError> {
        self.write(Commit::Durable, |tx| {
            record_served(tx, &left.served)?;
            tx.execute("INSERT INTO ghosts (saved) VALUES (?1)", [&left.ghosts])?;
            tx.execute("UPDATE meta SET value = 1 WHERE name = 'clean'", [])?;
            Ok(())
        })
    }

    /// Opens `dir`'s catalog without beginning a run, and without setting it aside whatever its state.
    pub(super) fn open_as_it_is(dir: &Path) -> Result<Self, DiskError> {
        let path = dir.join(FILE);
        let connection = connect(dir).map_err(|refused| {
            let what = match refused {
                Refused::Newer(version) => {
                    format!("it has schema version {version}, which is newer than this program")
                }
                Refused::Sqlite(error) => error.to_string(),
            };
            DiskError::Catalog(format!(
                "{}: {what}; the next start sets it aside and begins an empty cache",
                path.display()
            ))
        })?;
        let mut db = Self {
            connection,
            run: 0,
            dir: dir.to_owned(),
        };
        db.run = db.read(|connection| meta(connection, "run"))?;
        Ok(db)
    }

    /// What SQLite finds wrong with its file. Reads all of it.
    pub(super) fn damage(&self) -> Result<Option<String>, DiskError> {
        let checked = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0));
        match checked {
            Ok(verdict) if verdict == "ok" => Ok(None),
            Ok(verdict) => Ok(Some(verdict)),
            Err(error) if is_damage(&error) => Ok(Some(error.to_string())),
            Err(error) => Err(catalog_error(&error)),
        }
    }

    /// The next start sets the catalog aside.
    pub(super) fn condemn(&self) -> Result<(), DiskError> {
        let damaged = self.dir.join(DAMAGED);
        fs::write(&damaged, "found damaged by a check\n")
            .map_err(|error| DiskError::io("write", &damaged, error))
    }

    fn begin_run(&mut self) -> Result<Start, DiskError> {
        self.write(Commit::Ordered, |tx| {
            if meta(tx, "clean")? == 0 {
                tx.execute(
                    "UPDATE meta SET value = (SELECT value FROM meta WHERE name = 'run')
                     WHERE name = 'suspect_run'",
                    [],
                )?;
            }
            tx.execute("UPDATE meta SET value = value + 1 WHERE name = 'run'", [])?;
            tx.execute("UPDATE meta SET value = 0 WHERE name = 'clean'", [])?;
            // Each of the two is one step in the index.
            let last_place: i64 = tx.query_row(
                "SELECT max(
                    (SELECT coalesce(max(place), 0) FROM segments WHERE queue = 0),
                    (SELECT coalesce(max(place), 0) FROM segments WHERE queue = 1))",
                [],
                |row| row.get(0),
            )?;
            let ghosts: Option<Vec<u8>> = tx
                .query_row("SELECT saved FROM ghosts", [], |row| row.get(0))
                .optional()?;
            // They are true at this moment only.
            tx.execute("DELETE FROM ghosts", [])?;
            Ok(Start {
                run: meta(tx, "run")?,
                suspect_run: meta(tx, "suspect_run")?,
                bytes: unsigned(meta(tx, "bytes")?),
                main_bytes: unsigned(meta(tx, "main_bytes")?),
                last_place: unsigned(last_place),
                last_revision: last_revision(tx)?,
                last_block_size: tx
                    .query_row(
                        "SELECT block_size FROM revisions ORDER BY id DESC LIMIT 1",
                        [],
                        |row| row.get(0).map(unsigned),
                    )
                    .optional()?,
                ghosts: ghosts.unwrap_or_default(),
            })
        })
    }

    /// One transaction.
    fn write<T>(
        &mut self,
        commit: Commit,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, DiskError> {
        let result = (|| {
            if commit == Commit::Durable {
                self.connection.pragma_update(None, "synchronous", "FULL")?;
            }
            let tx = self.connection.transaction()?;
            let value = work(&tx)?;
            if commit == Commit::Durable {
                // A commit without a change writes no frame and syncs nothing.
                tx.execute("UPDATE meta SET value = value + 1 WHERE name = 'syncs'", [])?;
            }
            tx.commit()?;
            Ok(value)
        })();
        if commit == Commit::Durable {
            // Cannot fail outside a transaction; were it to, commits would only be slower.
            let _ = self.connection.pragma_update(None, "synchronous", "NORMAL");
            failpoint::reached(&self.dir, Step::LogSynced);
        }
        result.map_err(|error| self.failed(&error))
    }

    fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, DiskError> {
        work(&self.connection).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &rusqlite::Error) -> DiskError {
        failed(&self.dir, error)
    }

    /// The revision and its segments.
    pub(super) fn find(&self, revision: &Revision) -> Result<Option<StoredRevision>, DiskError> {
        self.read(|connection| find(connection, revision))
    }

    /// Records the revision, or the newest headers of the one that is there, and returns it. A
    /// stored one that was cut up differently, or has another size and no bytes, is replaced; its segments are in
    /// the second value, to be unlinked. `replace`: memory knows that it has no bytes.
    ///
    /// # Errors
    /// [`DiskError::TwoLengths`]: it has another size, and bytes.
    pub(super) fn admit(
        &mut self,
        key: &ObjectKey,
        representation: &Representation,
        segment_size: u64,
        block_size: u64,
        replace: bool,
    ) -> Result<(StoredRevision, Vec<(u128, u64)>), DiskError> {
        let revision = Revision {
            key: key.clone(),
            validator: representation.validator.clone(),
        };
        self.write(Commit::Ordered, |tx| {
            let mut replaced = Vec::new();
            if let Some(mut stored) = find(tx, &revision)? {
                if stored.block_size == block_size
                    && stored.representation.size == representation.size
                    && stored.geometry().is_sound()
                {
                    if stored.representation != *representation {
                        update_representation(tx, stored.id, representation)?;
                        stored.representation = representation.clone();
                    }
                    return Ok(Ok((stored, replaced)));
                }
                let held = stored.representation.size;
                if !replace
                    && stored.block_size == block_size
                    && held != representation.size
                    && !stored.is_bare()
                {
                    return Ok(Err(held));
                }
                replaced.extend(
                    stored
                        .segments
                        .iter()
                        .map(|seg| (seg.incarnation, seg.bytes)),
                );
                tx.execute("DELETE FROM revisions WHERE id = ?1", [stored.id])?;
            }
            let stored = insert_revision(tx, key, representation, segment_size, block_size)?;
            Ok(Ok((stored, replaced)))
        })?
        .map_err(|held| DiskError::TwoLengths {
            held,
            given: representation.size,
        })
    }

    /// One write-behind transaction. Whatever belongs to a revision that has been purged is dropped.
    pub(super) fn commit(&mut self, batch: &Batch, commit: Commit) -> Result<(), DiskError> {
        let run = self.run;
        self.write(commit, |tx| {
            for segment in &batch.segments {
                commit_segment(tx, segment, run)?;
            }
            record_served(tx, &batch.served)?;
            for id in &batch.verified {
                stamp_verified(tx, id, run)?;
            }
            for (id, representation) in &batch.representations {
                update_representation(tx, *id, representation)?;
            }
            for (key, record) in &batch.current {
                set_current(tx, key, record.as_ref())?;
            }
            for id in &batch.forgotten {
                tx.prepare_cached(
                    "DELETE FROM revisions WHERE id = ?1
                     AND NOT EXISTS (SELECT 1 FROM segments WHERE revision = ?1)",
                )?
                .execute([id])?;
            }
            let excess = meta(tx, "objects")? - MAX_OBJECTS;
            if excess > 0 {
                tx.execute(
                    "DELETE FROM objects WHERE (store, key) IN
                        (SELECT store, key FROM objects ORDER BY checked_at LIMIT ?1)",
                    [excess],
                )?;
            }
            Ok(())
        })
    }

    /// What was current for `key`.
    pub(super) fn current(&self, key: &ObjectKey) -> Result<Option<CurrentRecord>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT validator, size, last_modified, version_id, headers, checked_at
                     FROM objects WHERE store = ?1 AND key = ?2",
                )?
                .query_row(params![key.store(), key.key()], |row| {
                    Ok(CurrentRecord {
                        representation: Arc::new(representation(row, 0)?),
                        checked_at: UNIX_EPOCH + Duration::from_millis(unsigned(row.get(5)?)),
                    })
                })
                .optional()
        })
    }

    /// Bytes in the main queue.
    pub(super) fn main_bytes(&self) -> Result<u64, DiskError> {
        self.read(|connection| Ok(unsigned(meta(connection, "main_bytes")?)))
    }

    /// The first `limit` rows of a queue from `place` on.
    pub(super) fn heads(
        &self,
        queue: Queue,
        place: u64,
        limit: u32,
    ) -> Result<Vec<Candidate>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT s.revision, s.idx, s.incarnation, s.bytes, s.served,
                        r.store, r.key, r.validator, s.place, r.size, r.segment_size, r.block_size
                     FROM segments s JOIN revisions r ON r.id = s.revision
                     WHERE s.queue = ?1 AND s.place >= ?2 ORDER BY s.place LIMIT ?3",
                )?
                .query_map(params![number(queue), signed(place), limit], |row| {
                    let id = SegmentId {
                        revision: row.get(0)?,
                        idx: unsigned(row.get(1)?),
                        incarnation: incarnation(row, 2)?,
                    };
                    let geometry = geometry_at(row, 9)?;
                    let bytes = unsigned(row.get(3)?);
                    Ok(Candidate {
                        id,
                        bytes,
                        content: geometry.content(id.idx, bytes),
                        served: unsigned(row.get(4)?),
                        place: unsigned(row.get(8)?),
                        revision: revision_at(row, 5)?,
                    })
                })?
                .collect()
        })
    }

    /// Deletes the rows of `victims`, and puts `moved` where they stand now. A revision
    /// in `forgettable` goes too if nothing is left of it, and with it what it was current for.
    pub(super) fn evict(
        &mut self,
        victims: &[SegmentId],
        moved: &[Moved],
        forgettable: &[i64],
    ) -> Result<(), DiskError> {
        self.write(Commit::Ordered, |tx| {
            for moved in moved {
                tx.prepare_cached(
                    "UPDATE segments SET queue = ?4, place = ?5, served = ?6
                     WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3",
                )?
                .execute(params![
                    moved.id.revision,
                    signed(moved.id.idx),
                    blob(moved.id.incarnation),
                    number(moved.queue),
                    signed(moved.place),
                    signed(moved.served),
                ])?;
            }
            for id in victims {
                delete_segment(tx, id)?;
            }
            for id in forgettable {
                tx.prepare_cached(
                    "DELETE FROM objects WHERE (store, key, validator) IN
                        (SELECT store, key, validator FROM revisions WHERE id = ?1)
                     AND NOT EXISTS (SELECT 1 FROM segments WHERE revision = ?1)",
                )?
                .execute([id])?;
                tx.prepare_cached(
                    "DELETE FROM revisions WHERE id = ?1
                     AND NOT EXISTS (SELECT 1 FROM segments WHERE revision = ?1)",
                )?
                .execute([id])?;
            }
            Ok(())
        })
    }

    /// Deletes one row: its file is bad or gone. Returns the bytes that it counted; `None`: there is no such row.
    pub(super) fn delete_segment(&mut self, id: &SegmentId) -> Result<Option<u64>, DiskError> {
        self.write(Commit::Ordered, |tx| delete_segment(tx, id))
    }

    /// What the segment's row says of its bytes; `None`: it has none.
    pub(super) fn segment_bytes(&self, id: &SegmentId) -> Result<Option<u64>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT bytes FROM segments WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3",
                )?
                .query_row(
                    params![id.revision, signed(id.idx), blob(id.incarnation)],
                    |row| row.get(0).map(unsigned),
                )
                .optional()
        })
    }

    /// Which revision has this id.
    pub(super) fn revision(&self, id: i64) -> Result<Option<Revision>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT store, key, validator FROM revisions WHERE id = ?1")?
                .query_row([id], |row| revision_at(row, 0))
                .optional()
        })
    }

    /// Deletes what `target` names, durably.
    pub(super) fn purge(&mut self, target: &PurgeTarget) -> Result<Deleted, DiskError> {
        // One form for both: keys from `first` on, before `end`. A key is the range that ends
        // before its least successor, itself followed by a NUL.
        let (store, first, end) = match target {
            PurgeTarget::Key(key) => (key.store(), key.key(), Some(format!("{}\0", key.key()))),
            PurgeTarget::Prefix { store, prefix } => {
                (store.as_ref(), prefix.as_str(), prefix_end(prefix))
            }
        };
        self.write(Commit::Durable, |tx| {
            let range = params![store, first, end];
            let mut deleted = Deleted {
                up_to: last_revision(tx)?,
                ..Deleted::default()
            };
            let mut statement = tx.prepare(
                "SELECT s.incarnation, s.bytes FROM revisions r
                 JOIN segments s ON s.revision = r.id
                 WHERE r.store = ?1 AND r.key >= ?2 AND (?3 IS NULL OR r.key < ?3)",
            )?;
            let mut rows = statement.query(range)?;
            while let Some(row) = rows.next()? {
                deleted
                    .segments
                    .push((incarnation(row, 0)?, unsigned(row.get(1)?)));
            }
            let revisions = tx.execute(
                "DELETE FROM revisions
                 WHERE store = ?1 AND key >= ?2 AND (?3 IS NULL OR key < ?3)",
                range,
            )?;
            deleted.revisions = revisions as u64;
            tx.execute(
                "DELETE FROM objects
                 WHERE store = ?1 AND key >= ?2 AND (?3 IS NULL OR key < ?3)",
                range,
            )?;
            Ok(deleted)
        })
    }

    /// The checksums of a file's blocks.
    pub(super) fn sums(&self, incarnation: u128) -> Result<Option<SegmentSums>, DiskError> {
        self.read(|connection| sums(connection, incarnation))
    }

    /// The next segment to verify.
    pub(super) fn next_to_scrub(&self, order: ScrubOrder) -> Result<Option<ScrubRow>, DiskError> {
        self.read(|connection| next_to_scrub(connection, order))
    }

    /// Every block of the segment is on the disk as it was written.
    pub(super) fn scrubbed(&mut self, id: &SegmentId) -> Result<(), DiskError> {
        let run = self.run;
        self.write(Commit::Ordered, |tx| stamp_verified(tx, id, run))
    }

    /// Segments, and the bytes in them. Looks at every row.
    pub(super) fn totals(&self) -> Result<(u64, u64), DiskError> {
        self.read(|connection| {
            connection.query_row(
                "SELECT count(*), coalesce(sum(bytes), 0) FROM segments",
                [],
                |row| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?))),
            )
        })
    }

    /// What is known of the checksum of the whole revision; `None`: not compared yet.
    pub(super) fn whole(&self, revision: i64) -> Result<Option<Whole>, DiskError> {
        self.read(|connection| {
            let whole: Option<Option<String>> = connection
                .prepare_cached("SELECT whole FROM revisions WHERE id = ?1")?
                .query_row([revision], |row| row.get(0))
                .optional()?;
            // One that cannot be read is asked for again.
            Ok(whole.flatten().and_then(|text| Whole::from_text(&text)))
        })
    }

    /// Records what is known of the checksum of the whole revision.
    pub(super) fn set_whole(&mut self, revision: i64, whole: &Whole) -> Result<(), DiskError> {
        self.write(Commit::Ordered, |tx| {
            tx.prepare_cached("UPDATE revisions SET whole = ?2 WHERE id = ?1")?
                .execute(params![revision, whole.to_text()])?;
            Ok(())
        })
    }

    /// The first revision after the one of this id of which the checksum of the whole is known.
    pub(super) fn next_with_whole(&self, after: i64) -> Result<Option<(i64, Revision)>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT id, store, key, validator FROM revisions
                     WHERE id > ?1 AND whole IS NOT NULL AND whole <> 'none' ORDER BY id LIMIT 1",
                )?
                .query_row([after], |row| Ok((row.get(0)?, revision_at(row, 1)?)))
                .optional()
        })
    }

    /// Deletes one revision, durably: its bytes are not what they are said to be. Returns its files and their bytes.
    pub(super) fn delete_revision(&mut self, revision: i64) -> Result<Vec<(u128, u64)>, DiskError> {
        self.write(Commit::Durable, |tx| {
            let files = tx
                .prepare_cached("SELECT incarnation, bytes FROM segments WHERE revision = ?1")?
                .query_map([revision], |row| {
                    Ok((incarnation(row, 0)?, unsigned(row.get(1)?)))
                })?
                .collect::<rusqlite::Result<_>>()?;
            tx.execute("DELETE FROM revisions WHERE id = ?1", [revision])?;
            Ok(files)
        })
    }
}

/// Looks through the whole catalog in stretches, beside everybody else: what it says may have changed since.
pub(super) struct Reader {
    connection: Connection,
    dir: PathBuf,
}

impl Reader {
    /// The files from `first` to `last` that rows name, ascending.
    pub(super) fn files(&self, first: u128, last: u128) -> Result<Vec<u128>, DiskError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT incarnation FROM checksums WHERE incarnation BETWEEN ?1 AND ?2
                     ORDER BY incarnation",
                )?
                .query_map([blob(first), blob(last)], |row| incarnation(row, 0))?
                .collect()
        })
    }

    /// Up to `limit` rows of `segments` after `after`, in some order; none: there are no more.
    pub(super) fn segments(
        &self,
        after: Option<SegmentId>,
        limit: u32,
    ) -> Result<Vec<SegmentId>, DiskError> {
        self.read(|connection| {
            let (revision, idx, file) =
                after.map_or((0, 0, 0), |id| (id.revision, id.idx, id.incarnation));
            connection
                .prepare_cached(
                    "SELECT revision, idx, incarnation FROM segments
                     WHERE (revision, idx, incarnation) > (?1, ?2, ?3)
                     ORDER BY revision, idx, incarnation LIMIT ?4",
                )?
                .query_map(params![revision, signed(idx), blob(file), limit], |row| {
                    Ok(SegmentId {
                        revision: row.get(0)?,
                        idx: unsigned(row.get(1)?),
                        incarnation: incarnation(row, 2)?,
                    })
                })?
                .collect()
        })
    }

    /// Looks at the last `limit` revisions up to `up_to` for some of which no byte is held. `None`: no revisions are left.
    pub(super) fn without_bytes(
        &self,
        up_to: i64,
        limit: u32,
    ) -> Result<Option<Searched>, DiskError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT NOT EXISTS (SELECT 1 FROM segments WHERE revision = id), size > 0,
                    id, store, key, validator
                 FROM revisions WHERE id <= ?1 ORDER BY id DESC LIMIT ?2",
            )?;
            let mut rows = statement.query(params![up_to, limit])?;
            let (mut first, mut bare, mut empty) = (None, Vec::new(), Vec::new());
            while let Some(row) = rows.next()? {
                let id = row.get(2)?;
                first = Some(id);
                if row.get(0)? {
                    let found = if row.get(1)? { &mut bare } else { &mut empty };
                    found.push((id, revision_at(row, 3)?));
                }
            }
            Ok(first.map(|first| Searched { first, bare, empty }))
        })
    }

    /// Bytes that are held in blocks of another size. Looks at every row.
    pub(super) fn bytes_in_other_blocks(&self, block_size: u64) -> Result<u64, DiskError> {
        self.read(|connection| {
            connection.query_row(
                "SELECT coalesce(sum(s.bytes), 0) FROM revisions r
                 JOIN segments s ON s.revision = r.id WHERE r.block_size <> ?1",
                [signed(block_size)],
                |row| row.get(0).map(unsigned),
            )
        })
    }

    fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, DiskError> {
        work(&self.connection).map_err(|error| failed(&self.dir, &error))
    }
}
