//! The catalog's file: its schema, connections to it, its log, and what becomes of one that cannot be used.
//!
//! A catalog that is damaged, newer than this program or not permitted is set aside under another name, together with its
//! log, and an empty one begun: a cache that starts cold beats one that does not. Without its log it would be an older state of
//! itself, in which what was purged is still there; hence the mark before and after (ADR 8).

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::Catalog;
use super::rows::{meta, millis, signed};
use crate::disk::DiskError;
use crate::disk::durability::{KernelSync, Syncer};
use crate::disk::failpoint::{self, Step};

/// Migrations in order; `user_version` is how many were applied. Append only.
pub(super) const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta (name, value) VALUES
    ('bytes', 0), ('objects', 0), ('run', 0), ('suspect_run', 0), ('clean', 1), ('syncs', 0);

CREATE TABLE objects (
    store TEXT NOT NULL, key TEXT NOT NULL, validator TEXT NOT NULL, size INTEGER NOT NULL,
    last_modified INTEGER, version_id TEXT, headers TEXT NOT NULL, checked_at INTEGER NOT NULL,
    PRIMARY KEY (store, key)
) WITHOUT ROWID;
CREATE INDEX objects_by_age ON objects (checked_at);

CREATE TABLE revisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    store TEXT NOT NULL, key TEXT NOT NULL, validator TEXT NOT NULL, size INTEGER NOT NULL,
    last_modified INTEGER, version_id TEXT, headers TEXT NOT NULL,
    segment_size INTEGER NOT NULL, block_size INTEGER NOT NULL,
    UNIQUE (store, key, validator)
);

CREATE TABLE segments (
    revision INTEGER NOT NULL, idx INTEGER NOT NULL, incarnation BLOB NOT NULL,
    run INTEGER NOT NULL, bits BLOB NOT NULL, bytes INTEGER NOT NULL, last_used INTEGER NOT NULL,
    PRIMARY KEY (revision, idx, incarnation)
) WITHOUT ROWID;
CREATE INDEX segments_by_age ON segments (last_used);

CREATE TABLE checksums (incarnation BLOB PRIMARY KEY, crcs BLOB NOT NULL);

CREATE TRIGGER segments_insert AFTER INSERT ON segments BEGIN
    UPDATE meta SET value = value + new.bytes WHERE name = 'bytes';
END;
CREATE TRIGGER segments_update AFTER UPDATE OF bytes ON segments BEGIN
    UPDATE meta SET value = value + new.bytes - old.bytes WHERE name = 'bytes';
END;
CREATE TRIGGER segments_delete AFTER DELETE ON segments BEGIN
    UPDATE meta SET value = value - old.bytes WHERE name = 'bytes';
    DELETE FROM checksums WHERE incarnation = old.incarnation;
END;
CREATE TRIGGER revisions_delete AFTER DELETE ON revisions BEGIN
    DELETE FROM segments WHERE revision = old.id;
END;
CREATE TRIGGER objects_insert AFTER INSERT ON objects BEGIN
    UPDATE meta SET value = value + 1 WHERE name = 'objects';
END;
CREATE TRIGGER objects_delete AFTER DELETE ON objects BEGIN
    UPDATE meta SET value = value - 1 WHERE name = 'objects';
END;
", "
-- Milliseconds since 1970 at which the whole file was last compared with its checksums, or was begun.
ALTER TABLE segments ADD COLUMN verified INTEGER NOT NULL DEFAULT 0;
CREATE INDEX segments_by_verified ON segments (verified);
-- See `seal`; NULL: recorded by an earlier version.
ALTER TABLE segments ADD COLUMN seal INTEGER;
ALTER TABLE checksums ADD COLUMN crc64s BLOB;
-- The whole object's checksum that the remote said and the bytes had, or 'none': it has none. NULL: not compared yet.
ALTER TABLE revisions ADD COLUMN whole TEXT;
", "
-- Two queues instead of one order of last use: what was least recently used goes first, as before.
DROP INDEX segments_by_age;
ALTER TABLE segments RENAME COLUMN last_used TO place;
ALTER TABLE segments ADD COLUMN queue INTEGER NOT NULL DEFAULT 0;
ALTER TABLE segments ADD COLUMN served INTEGER NOT NULL DEFAULT 0;
CREATE INDEX segments_by_place ON segments (queue, place);
CREATE TABLE ghosts (saved BLOB NOT NULL);

INSERT INTO meta (name, value) VALUES ('main_bytes', 0);
CREATE TRIGGER segments_insert_main AFTER INSERT ON segments WHEN new.queue = 1 BEGIN
    UPDATE meta SET value = value + new.bytes WHERE name = 'main_bytes';
END;
CREATE TRIGGER segments_update_main AFTER UPDATE OF bytes, queue ON segments
WHEN new.queue = 1 OR old.queue = 1 BEGIN
    UPDATE meta SET value = value + new.bytes * new.queue - old.bytes * old.queue
        WHERE name = 'main_bytes';
END;
CREATE TRIGGER segments_delete_main AFTER DELETE ON segments WHEN old.queue = 1 BEGIN
    UPDATE meta SET value = value - old.bytes WHERE name = 'main_bytes';
END;
"];

/// Bytes of the log from which the durability thread moves it into the database, beside everybody else. The file
/// keeps as many when the log begins anew. What is left is what a start has to read.
pub(in crate::disk) const LOG_MOVED_FROM: u64 = if cfg!(test) { 64 << 10 } else { 2 << 20 };

/// Pages of the log, of 4 KiB, from which a commit moves it itself before the catalog's lock is given up. Moving beside
/// commits never ends while they keep coming: SQLite begins a log anew only once all of it has been moved, and
/// each commit meanwhile adds to it. Most of it has been moved by then, so this one is short.
const LOG_PAGES: u32 = 2048;

/// The longest that the log gets, in bytes: what makes a commit move it, and the transaction that was one too many, which
/// has some hundred pages at most. Each page has a head of 24 bytes there.
pub(in crate::disk) const LONGEST_LOG: u64 = (LOG_PAGES as u64 + 512) * (4096 + 24);

/// How long a connection waits for another one of this process. Only a checkpoint can be in the way, and briefly.
const BUSY: Duration = Duration::from_secs(5);

pub(in crate::disk) const FILE: &str = "catalog.sqlite";

/// What follows its name when it was set aside.
const ASIDE: [&str; 3] = [".corrupt-", ".newer-", ".unusable-"];

/// What SQLite keeps beside it.
const LOGS: [&str; 2] = ["-wal", "-shm"];

/// Its presence says that a query found the catalog damaged: the next start sets it aside.
pub(super) const DAMAGED: &str = "catalog.damaged";

pub(super) enum Refused {
    Newer(i64),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Refused {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// Opens and migrates.
pub(super) fn connect(dir: &Path) -> Result<Connection, Refused> {
    let mut connection = Connection::open(dir.join(FILE))?;
    connection.busy_timeout(BUSY)?;
    connection.set_prepared_statement_cache_capacity(64);
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let applied = usize::try_from(version).map_err(|_| Refused::Newer(version))?;
    if applied > MIGRATIONS.len() {
        return Err(Refused::Newer(version));
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "wal_autocheckpoint", LOG_PAGES)?;
    // Down to which the file is cut when the log begins anew.
    connection.pragma_update(None, "journal_size_limit", signed(LOG_MOVED_FROM))?;
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(applied) {
        let tx = connection.transaction()?;
        tx.execute_batch(migration)?;
        tx.pragma_update(None, "user_version", signed(index as u64 + 1))?;
        tx.commit()?;
        failpoint::reached(dir, Step::Migrated);
    }
    // Touches each table that a start needs, so that damage there shows now.
    meta(&connection, "bytes")?;
    Ok(connection)
}

/// A connection beside the first. It must not be the one that removes the log, which SQLite does by its name: the
/// directory may be another one by then.
pub(super) fn second(dir: &Path) -> Result<Connection, DiskError> {
    let open = || {
        let connection = Connection::open(dir.join(FILE))?;
        connection.busy_timeout(BUSY)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        Ok(connection)
    };
    open().map_err(|error| catalog_error(&error))
}

/// For a process that may look, while another one writes.
pub(super) fn connect_to_read(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    // Reads something, so that a catalog that cannot be read is noticed now.
    meta(&connection, "bytes")?;
    Ok(connection)
}

/// Moves committed pages from the log into the database, beside readers and writers.
pub(in crate::disk) struct Checkpointer {
    pub(super) connection: Connection,
    pub(super) log: PathBuf,
}

impl Checkpointer {
    /// To be asked after each batch. What wrote the log does not matter: admissions, checksums of wholes and the scrubber
    /// commit beside the batches.
    pub(in crate::disk) fn is_due(&self) -> bool {
        fs::metadata(&self.log).is_ok_and(|log| log.len() > LOG_MOVED_FROM)
    }

    /// Moves pages. A failure only lets the log grow: the next time tries again.
    pub(in crate::disk) fn run(&self) {
        let moved = self
            .connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(error) = moved {
            tracing::warn!(%error, "could not checkpoint the catalog; its log grows until this works");
        }
    }
}

/// Renames the catalog and its log out of the way, and removes what was set aside before. Marked before and unmarked after, all of it synced:
/// a database without its log would be an older state of it, in which what was purged is still there.
pub(super) fn set_aside(
    dir: &Path,
    why: &str,
    reason: &str,
    sync: &dyn Syncer,
) -> Result<(), DiskError> {
    let damaged = dir.join(DAMAGED);
    let failed = |op, path: &Path| {
        let path = path.to_owned();
        move |error| DiskError::io(op, &path, error)
    };
    mark(dir, reason, sync).map_err(failed("write", &damaged))?;
    failpoint::reached(dir, Step::Marked);
    remove_set_aside(dir)?;
    let stamp = millis(SystemTime::now());
    let aside = format!("{FILE}.{why}-{stamp}");
    tracing::warn!(
        catalog = %dir.join(FILE).display(), set_aside_as = %aside, reason,
        "cannot use the catalog: set it aside and start with an empty cache"
    );
    for suffix in LOGS.into_iter().chain([""]) {
        let from = dir.join(format!("{FILE}{suffix}"));
        match fs::rename(&from, dir.join(format!("{aside}{suffix}"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(DiskError::io("rename", &from, error));
            }
            _ => failpoint::reached(dir, Step::SetAside),
        }
    }
    sync.directory(dir).map_err(failed("sync", dir))?;
    fs::remove_file(&damaged).map_err(failed("unlink", &damaged))?;
    failpoint::reached(dir, Step::Unmarked);
    sync.directory(dir).map_err(failed("sync", dir))
}

/// One catalog set aside is for whoever wants to know what happened; a hundred are a full disk.
fn remove_set_aside(dir: &Path) -> Result<(), DiskError> {
    let failed = |error| DiskError::io("list", dir, error);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let is_one = name.to_str().is_some_and(|name| {
            name.strip_prefix(FILE)
                .is_some_and(|rest| ASIDE.iter().any(|why| rest.starts_with(why)))
        });
        let path = dir.join(name);
        // Somebody made a directory in the catalog's place, and may want what is in it.
        if is_one && !path.is_dir() {
            fs::remove_file(&path).map_err(|error| DiskError::io("unlink", &path, error))?;
        }
    }
    Ok(())
}

/// Has the next start set the catalog aside.
pub(super) fn mark(dir: &Path, reason: &str, sync: &dyn Syncer) -> std::io::Result<()> {
    let mut file = File::create(dir.join(DAMAGED))?;
    file.write_all(reason.as_bytes())?;
    sync.data(&file)?;
    sync.directory(dir)
}

/// What to tell of an error, once the next start has been told of damage.
pub(super) fn failed(dir: &Path, error: &rusqlite::Error) -> DiskError {
    if is_damage(error)
        && !Catalog::is_marked(dir)
        && mark(
            dir,
            &format!("a query found it damaged: {error}"),
            &KernelSync,
        )
        .is_ok()
    {
        tracing::error!(
            %error,
            "the catalog is damaged: in a moment it will be set aside, and an empty one begun"
        );
    }
    catalog_error(error)
}

pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    ) || matches!(
        error,
        // A table, row or value that our schema cannot lack.
        rusqlite::Error::QueryReturnedNoRows
            | rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::Utf8Error(..)
            | rusqlite::Error::InvalidColumnType(..)
    )
}

pub(super) fn catalog_error(error: &rusqlite::Error) -> DiskError {
    DiskError::Catalog(error.to_string())
}
