//! Statements within one transaction, and how rows are read and written.
//!
//! What is said of bytes can rot like the bytes, so a row of `segments` bears a [seal](Named::seal).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crc_fast::{CrcAlgorithm, Digest};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{ScrubOrder, ScrubRow, SegmentCommit, SegmentId, StoredRevision, StoredSegment};
use crate::disk::CurrentRecord;
use crate::disk::coverage::{Coverage, Geometry};
use crate::disk::policy::Queue;
use crate::disk::sums::SegmentSums;
use crate::object::{ObjectKey, Representation, Revision, Validator};

pub(super) fn meta(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT value FROM meta WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
}

/// As the column `queue` has it.
pub(super) fn number(queue: Queue) -> i64 {
    match queue {
        Queue::Small => 0,
        Queue::Main => 1,
    }
}

/// The highest id ever given; ids are not reused (`AUTOINCREMENT`).
pub(super) fn last_revision(connection: &Connection) -> rusqlite::Result<i64> {
    let last: Option<i64> = connection
        .query_row(
            "SELECT seq FROM sqlite_sequence WHERE name = 'revisions'",
            [],
            |row| row.get(0),
        )
        .optional()?;
    Ok(last.unwrap_or(0))
}

pub(super) fn find(
    connection: &Connection,
    revision: &Revision,
) -> rusqlite::Result<Option<StoredRevision>> {
    let stored = connection
        .prepare_cached(
            "SELECT validator, size, last_modified, version_id, headers, id, segment_size, block_size
             FROM revisions WHERE store = ?1 AND key = ?2 AND validator = ?3",
        )?
        .query_row(
            params![
                revision.key.store(),
                revision.key.key(),
                revision.validator.as_field_value()
            ],
            |row| {
                Ok(StoredRevision {
                    representation: representation(row, 0)?,
                    id: row.get(5)?,
                    segment_size: unsigned(row.get(6)?),
                    block_size: unsigned(row.get(7)?),
                    segments: Vec::new(),
                })
            },
        )
        .optional()?;
    let Some(mut stored) = stored else {
        return Ok(None);
    };
    let named = Named {
        revision,
        geometry: stored.geometry(),
    };
    let rows: Vec<(StoredSegment, Option<i64>)> = connection
        .prepare_cached(
            "SELECT idx, incarnation, run, bits, bytes, served, seal FROM segments
             WHERE revision = ?1 ORDER BY idx",
        )?
        .query_map([stored.id], |row| {
            let segment = StoredSegment {
                idx: unsigned(row.get(0)?),
                incarnation: incarnation(row, 1)?,
                run: row.get(2)?,
                bits: row.get(3)?,
                bytes: unsigned(row.get(4)?),
                served: unsigned(row.get(5)?),
            };
            Ok((segment, row.get(6)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    for (row, sealed) in rows {
        let expected = named.seal(row.idx, row.incarnation, row.run, &row.bits);
        if sealed.is_none_or(|seal| seal == expected) {
            stored.segments.push(row);
        } else {
            // The scrubber removes it; until then it is not found.
            tracing::error!(
                key = ?revision.key, file = format_args!("{:032x}.seg", row.incarnation),
                "the catalog's row of a segment is not as it was written: its bytes are fetched again"
            );
        }
    }
    Ok(Some(stored))
}

/// What the seal of a segment says of its revision: everything that decides for which request, and where in its
/// answer, the bytes are sent.
struct Named<'a> {
    revision: &'a Revision,
    geometry: Geometry,
}

impl Named<'_> {
    /// A CRC over the row as it should be.
    fn seal(&self, idx: u64, incarnation: u128, run: i64, bits: &[u8]) -> i64 {
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        let key = &self.revision.key;
        for text in [
            key.store(),
            key.key(),
            self.revision.validator.as_field_value(),
        ] {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        }
        let g = self.geometry;
        for number in [g.size, g.segment_size, g.block_size, idx] {
            digest.update(&number.to_le_bytes());
        }
        digest.update(&incarnation.to_le_bytes());
        digest.update(&run.to_le_bytes());
        digest.update(bits);
        digest.finalize().cast_signed()
    }
}

pub(super) fn sums(
    connection: &Connection,
    incarnation: u128,
) -> rusqlite::Result<Option<SegmentSums>> {
    connection
        .prepare_cached("SELECT crcs, crc64s FROM checksums WHERE incarnation = ?1")?
        .query_row(params![blob(incarnation)], |row| {
            let (crc32c, crc64): (Vec<u8>, Option<Vec<u8>>) = (row.get(0)?, row.get(1)?);
            Ok(SegmentSums::from_bytes(&crc32c, crc64.as_deref()))
        })
        .optional()
}

pub(super) fn next_to_scrub(
    connection: &Connection,
    order: ScrubOrder,
) -> rusqlite::Result<Option<ScrubRow>> {
    const COLUMNS: &str = "SELECT s.revision, s.idx, s.incarnation, s.run, s.bits, s.bytes,
            s.verified, s.seal, r.store, r.key, r.validator, r.size, r.segment_size, r.block_size,
            r.whole IS NULL
        FROM segments s JOIN revisions r ON r.id = s.revision";
    let from_row = |row: &Row<'_>| {
        let id = SegmentId {
            revision: row.get(0)?,
            idx: unsigned(row.get(1)?),
            incarnation: incarnation(row, 2)?,
        };
        let (run, bits): (i64, Vec<u8>) = (row.get(3)?, row.get(4)?);
        let revision = revision_at(row, 8)?;
        let geometry = geometry_at(row, 11)?;
        let named = Named {
            revision: &revision,
            geometry,
        };
        let expected = named.seal(id.idx, id.incarnation, run, &bits);
        let sealed = row
            .get::<_, Option<i64>>(7)?
            .is_none_or(|seal| seal == expected);
        let sound = sealed && geometry.is_sound();
        Ok(ScrubRow {
            covered: if sound {
                Coverage::from_bytes(geometry.blocks_in(id.idx), &bits)
            } else {
                None
            },
            id,
            revision,
            geometry,
            sums: None,
            sealed: sound,
            verified: unsigned(row.get(6)?),
            unaudited: row.get(14)?,
        })
    };
    let found = match order {
        ScrubOrder::Oldest => connection
            .prepare_cached(&format!("{COLUMNS} ORDER BY s.verified LIMIT 1"))?
            .query_row([], from_row),
        ScrubOrder::After(None) => connection
            .prepare_cached(&format!(
                "{COLUMNS} ORDER BY s.revision, s.idx, s.incarnation LIMIT 1"
            ))?
            .query_row([], from_row),
        ScrubOrder::After(Some(id)) => connection
            .prepare_cached(&format!(
                "{COLUMNS} WHERE (s.revision, s.idx, s.incarnation) > (?1, ?2, ?3)
                 ORDER BY s.revision, s.idx, s.incarnation LIMIT 1"
            ))?
            .query_row(
                params![id.revision, signed(id.idx), blob(id.incarnation)],
                from_row,
            ),
    };
    let Some(mut row) = found.optional()? else {
        return Ok(None);
    };
    row.sums = sums(connection, row.id.incarnation)?;
    Ok(Some(row))
}

/// Stamps a segment that was compared with its checksums: by the present run, now. One whose row is not as
/// it was written is left as it is.
pub(super) fn stamp_verified(
    tx: &Transaction<'_>,
    id: &SegmentId,
    run: i64,
) -> rusqlite::Result<()> {
    let name = params![id.revision, signed(id.idx), blob(id.incarnation)];
    let found = tx
        .prepare_cached(
            "SELECT s.run, s.bits, s.seal, r.store, r.key, r.validator, r.size, r.segment_size,
                r.block_size
             FROM segments s JOIN revisions r ON r.id = s.revision
             WHERE s.revision = ?1 AND s.idx = ?2 AND s.incarnation = ?3",
        )?
        .query_row(name, |row| {
            let revision = revision_at(row, 3)?;
            let named = Named {
                revision: &revision,
                geometry: geometry_at(row, 6)?,
            };
            let bits: Vec<u8> = row.get(1)?;
            let before = named.seal(id.idx, id.incarnation, row.get(0)?, &bits);
            let sealed: Option<i64> = row.get(2)?;
            let now = named.seal(id.idx, id.incarnation, run, &bits);
            Ok(sealed.is_none_or(|seal| seal == before).then_some(now))
        })
        .optional()?;
    if let Some(seal) = found.flatten() {
        tx.prepare_cached(
            "UPDATE segments SET run = ?4, seal = ?5, verified = ?6
             WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3",
        )?
        .execute(params![
            id.revision,
            signed(id.idx),
            blob(id.incarnation),
            run,
            seal,
            signed(millis(SystemTime::now())),
        ])?;
    }
    Ok(())
}

pub(super) fn commit_segment(
    tx: &Transaction<'_>,
    commit: &SegmentCommit,
    run: i64,
) -> rusqlite::Result<()> {
    let id = &commit.id;
    let revision = tx
        .prepare_cached(
            "SELECT store, key, validator, size, segment_size, block_size
             FROM revisions WHERE id = ?1",
        )?
        .query_row([id.revision], |row| {
            Ok((revision_at(row, 0)?, geometry_at(row, 3)?))
        })
        .optional()?;
    let Some((revision, geometry)) = revision else {
        return Ok(());
    };
    let stored: Option<Vec<u8>> = tx
        .prepare_cached(
            "SELECT bits FROM segments WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3",
        )?
        .query_row(
            params![id.revision, signed(id.idx), blob(id.incarnation)],
            |row| row.get(0),
        )
        .optional()?;
    if stored.is_none() && commit.covered.is_empty() {
        return Ok(());
    }
    let mut coverage = stored
        .and_then(|bits| Coverage::from_bytes(commit.blocks, &bits))
        .unwrap_or_else(|| Coverage::empty(commit.blocks));
    let mut sums = sums(tx, id.incarnation)?.unwrap_or_default();
    sums.record(commit.blocks, &commit.covered);
    for (block, _) in &commit.covered {
        coverage.insert(*block);
    }
    let bits = coverage.to_bytes();
    let named = Named {
        revision: &revision,
        geometry,
    };
    let seal = named.seal(id.idx, id.incarnation, run, &bits);
    tx.prepare_cached(
        "INSERT INTO segments
            (revision, idx, incarnation, run, bits, bytes, queue, place, served, seal, verified)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT DO UPDATE SET
            run = excluded.run, bits = excluded.bits, bytes = excluded.bytes,
            served = excluded.served, seal = excluded.seal",
    )?
    .execute(params![
        id.revision,
        signed(id.idx),
        blob(id.incarnation),
        run,
        bits,
        signed(commit.bytes),
        number(commit.queue),
        signed(commit.place),
        signed(commit.served),
        seal,
        signed(millis(SystemTime::now())),
    ])?;
    let (crc32c, crc64) = sums.to_bytes();
    tx.prepare_cached(
        "INSERT INTO checksums (incarnation, crcs, crc64s) VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET crcs = excluded.crcs, crc64s = excluded.crc64s",
    )?
    .execute(params![blob(id.incarnation), crc32c, crc64])?;
    Ok(())
}

pub(super) fn record_served(
    tx: &Transaction<'_>,
    served: &[(SegmentId, u64)],
) -> rusqlite::Result<()> {
    for (id, served) in served {
        tx.prepare_cached(
            "UPDATE segments SET served = ?4
             WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3",
        )?
        .execute(params![
            id.revision,
            signed(id.idx),
            blob(id.incarnation),
            signed(*served)
        ])?;
    }
    Ok(())
}

pub(super) fn delete_segment(
    tx: &Transaction<'_>,
    id: &SegmentId,
) -> rusqlite::Result<Option<u64>> {
    tx.prepare_cached(
        "DELETE FROM segments WHERE revision = ?1 AND idx = ?2 AND incarnation = ?3
         RETURNING bytes",
    )?
    .query_row(
        params![id.revision, signed(id.idx), blob(id.incarnation)],
        |row| row.get(0).map(unsigned),
    )
    .optional()
}

/// Adds a revision of which nothing is held yet.
pub(super) fn insert_revision(
    tx: &Transaction<'_>,
    key: &ObjectKey,
    representation: &Representation,
    segment_size: u64,
    block_size: u64,
) -> rusqlite::Result<StoredRevision> {
    tx.prepare_cached(
        "INSERT INTO revisions (store, key, validator, size, last_modified, version_id,
            headers, segment_size, block_size)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        key.store(),
        key.key(),
        representation.validator.as_field_value(),
        signed(representation.size),
        representation.last_modified.map(seconds),
        representation.version_id.as_deref(),
        headers_to_json(representation),
        signed(segment_size),
        signed(block_size),
    ])?;
    Ok(StoredRevision {
        id: tx.last_insert_rowid(),
        representation: representation.clone(),
        segment_size,
        block_size,
        segments: Vec::new(),
    })
}

pub(super) fn update_representation(
    tx: &Transaction<'_>,
    id: i64,
    representation: &Representation,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE revisions SET last_modified = ?2, version_id = ?3, headers = ?4 WHERE id = ?1",
    )?
    .execute(params![
        id,
        representation.last_modified.map(seconds),
        representation.version_id.as_deref(),
        headers_to_json(representation),
    ])?;
    Ok(())
}

pub(super) fn set_current(
    tx: &Transaction<'_>,
    key: &ObjectKey,
    record: Option<&CurrentRecord>,
) -> rusqlite::Result<()> {
    let Some(record) = record else {
        tx.prepare_cached("DELETE FROM objects WHERE store = ?1 AND key = ?2")?
            .execute(params![key.store(), key.key()])?;
        return Ok(());
    };
    let representation = &record.representation;
    tx.prepare_cached(
        "INSERT INTO objects (store, key, validator, size, last_modified, version_id, headers,
            checked_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT DO UPDATE SET
            validator = excluded.validator, size = excluded.size,
            last_modified = excluded.last_modified, version_id = excluded.version_id,
            headers = excluded.headers, checked_at = excluded.checked_at",
    )?
    .execute(params![
        key.store(),
        key.key(),
        representation.validator.as_field_value(),
        signed(representation.size),
        representation.last_modified.map(seconds),
        representation.version_id.as_deref(),
        headers_to_json(representation),
        signed(millis(record.checked_at)),
    ])?;
    Ok(())
}

/// Validator, size, `last_modified`, `version_id` and headers, from column `at` on.
pub(super) fn representation(row: &Row<'_>, at: usize) -> rusqlite::Result<Representation> {
    let last_modified: Option<i64> = row.get(at + 2)?;
    let version_id: Option<String> = row.get(at + 3)?;
    let headers: String = row.get(at + 4)?;
    Ok(Representation {
        validator: validator(row, at)?,
        size: unsigned(row.get(at + 1)?),
        last_modified: last_modified.map(|at| UNIX_EPOCH + Duration::from_secs(unsigned(at))),
        version_id: version_id.map(Into::into),
        headers: serde_json::from_str(&headers).map_err(|error| conversion(at + 4, error))?,
    })
}

fn validator(row: &Row<'_>, at: usize) -> rusqlite::Result<Validator> {
    let value: String = row.get(at)?;
    Validator::from_etag_field(&value).map_err(|error| conversion(at, error))
}

/// Store, key and validator, from column `at` on.
pub(super) fn revision_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Revision> {
    Ok(Revision {
        key: ObjectKey::new(row.get::<_, String>(at)?, row.get::<_, String>(at + 1)?),
        validator: validator(row, at + 2)?,
    })
}

/// Size, bytes of a segment and of a block, from column `at` on.
pub(super) fn geometry_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Geometry> {
    Ok(Geometry {
        size: unsigned(row.get(at)?),
        segment_size: unsigned(row.get(at + 1)?),
        block_size: unsigned(row.get(at + 2)?),
    })
}

pub(super) fn incarnation(row: &Row<'_>, at: usize) -> rusqlite::Result<u128> {
    row.get(at).map(u128::from_be_bytes)
}

fn conversion(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into())
}

fn headers_to_json(representation: &Representation) -> String {
    serde_json::to_string(&representation.headers).expect("pairs of strings are valid JSON")
}

pub(super) fn blob(incarnation: u128) -> [u8; 16] {
    incarnation.to_be_bytes()
}

/// Before the epoch counts as the epoch: S3 began in 2006.
fn seconds(time: SystemTime) -> i64 {
    signed(
        time.duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    )
}

/// Milliseconds since 1970.
pub(in crate::disk) fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// SQLite's integers are signed. Nothing we store comes near the limit.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// The least string above every string that starts with `prefix`; `None`: there is none. UTF-8
/// sorts by scalar value, as SQLite compares it.
pub(super) fn prefix_end(prefix: &str) -> Option<String> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            other => char::from_u32(other as u32 + 1),
        };
        if let Some(next) = next {
            end.push(next);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A purge by prefix is a range over the index: exactly the keys that start so.
        #[test]
        fn prefix_end_bounds_exactly_the_prefix(
            prefix in "[ab\u{d7ff}\u{10ffff}]{0,3}",
            key in "[ab\u{d7ff}\u{e000}\u{10ffff}]{0,5}",
        ) {
            let end = prefix_end(&prefix);
            let inside = key >= prefix && end.is_none_or(|end| key < end);
            prop_assert_eq!(inside, key.starts_with(&prefix));
        }
    }
}
