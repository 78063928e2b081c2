//! The tiers, whole, against a model (`model`), and as a simulation that replays (`simulation`).
//!
//! Both run a [`World`]: one replica over a real disk tier, in front of a bucket in memory whose answers have
//! [`weather`]. Everything is on one thread and in paused time: the disk tier does its blocking work inline
//! (`disk::inline`), chance is seeded (`chance::seeded`). What is left out: sockets, sendfile, HTTP/1.1, SQLite's
//! own threads (there are none), and reorderings that only several threads bring, for which there are the tests over sockets and
//! `tests/interleavings`.

mod model;
mod simulation;
mod weather;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{self, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::time::Instant;

use super::*;
use crate::disk::{DiskConfig, MinFree, inline};
use crate::fill::FillSettings;
use crate::payload::{ChunkSource, Payload};
use crate::remote::Remote;
use crate::remote::memory::MemoryRemote;
use crate::seldom::Outage;
use crate::telemetry::Metrics;
use weather::Weather;

const BLOCK: u64 = 4 << 10;
const PART: u64 = 16 << 10;
/// 16 segments of two blocks.
const CAPACITY: u64 = 16 * 2 * BLOCK;
const FRESH_FOR: Duration = Duration::from_secs(2);

/// What a key came to be at, and when.
type Change = (Option<Instant>, Option<Validator>);

/// A replica and what it stands in front of.
struct World {
    dir: TempDir,
    weather: Arc<Weather>,
    mount: Arc<Mount>,
    /// What every revision that ever was holds, by tag.
    written: Mutex<HashMap<Box<str>, Bytes>>,
    /// What each key was at since when, in order. An instant of another life is long ago.
    history: Mutex<BTreeMap<&'static str, Vec<Change>>>,
}

/// One life of the replica.
struct Replica {
    disk: Arc<DiskTier>,
    filler: Arc<Filler>,
    tiers: Arc<Tiers>,
}

/// A request, and how patient its client is.
#[derive(Clone, Debug)]
struct Ask {
    key: &'static str,
    method: Method,
    if_match: Option<String>,
    if_none_match: Option<String>,
    range: Option<String>,
    no_cache: bool,
    /// Leaves after so many chunks.
    leaves_after: Option<usize>,
}

/// What came of it.
enum Answer {
    Head {
        validator: Validator,
        verdict: Verdict,
    },
    Body {
        validator: Validator,
        verdict: Verdict,
        /// One for each range.
        parts: Vec<(ByteRange, Vec<u8>)>,
        cut: bool,
        left: bool,
    },
    Refused(Refusal),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head { validator, verdict } => write!(f, "{verdict:?} of {validator:?}"),
            Self::Body {
                validator,
                parts,
                cut,
                left,
                ..
            } => {
                let lens: Vec<_> = parts
                    .iter()
                    .map(|(range, body)| (range, body.len()))
                    .collect();
                write!(f, "{lens:?} of {validator:?}, cut: {cut}, left: {left}")
            }
            Self::Refused(refusal) => refusal.fmt(f),
        }
    }
}

impl World {
    fn new() -> Self {
        // Nothing here needs to outlive the machine.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            TempDir::new_in(shm)
        } else {
            TempDir::new()
        };
        let weather = Arc::new(Weather::over(MemoryRemote::new()));
        let mount = Mount {
            path: "/m".to_owned(),
            prefix: String::new(),
            remote: Arc::clone(&weather) as Arc<dyn Remote>,
            fresh_for: FRESH_FOR,
            stale_if_error: Duration::from_mins(5),
            forbidden: ForbiddenAs::default(),
            retries: 2,
            verify: false,
            outage: Outage::default(),
        };
        Self {
            dir: dir.unwrap(),
            weather,
            mount: Arc::new(mount),
            written: Mutex::default(),
            history: Mutex::default(),
        }
    }

    fn start(&self) -> Replica {
        let disk = inline::open(DiskConfig {
            dir: self.dir.path().join("cache"),
            capacity: CAPACITY,
            min_free: MinFree::Bytes(0),
            block_size: BLOCK,
            scrub_rate: 0,
        })
        .unwrap();
        let settings = FillSettings {
            part_size: NonZeroU64::new(PART).unwrap(),
            budget: 3 * PART,
        };
        let metrics = Metrics::default();
        let filler = Filler::new(Arc::clone(&disk), settings, metrics);
        let settings = TierSettings {
            fan_out: 2,
            part_size: PART,
        };
        let tiers = Tiers::new(Arc::clone(&disk), Arc::clone(&filler), settings);
        Replica {
            disk,
            filler,
            tiers,
        }
    }

    fn put(&self, key: &'static str, object: &Bytes) -> Validator {
        let stored = self.weather.bucket().put(key, object.clone(), &[]);
        let tag = stored.validator.as_field_value().into();
        self.written.lock().insert(tag, object.clone());
        self.turned(key, Some(stored.validator.clone()));
        stored.validator
    }

    fn delete(&self, key: &'static str) {
        self.weather.bucket().delete(key);
        self.turned(key, None);
    }

    fn turned(&self, key: &'static str, now: Option<Validator>) {
        let mut history = self.history.lock();
        let changes = history.entry(key).or_default();
        changes.push((Some(Instant::now()), now));
    }

    /// What the key is at.
    fn current(&self, key: &'static str) -> Option<Validator> {
        let history = self.history.lock();
        history.get(key)?.last()?.1.clone()
    }

    /// What the key was at, at one time or another since `since`.
    fn currents(&self, key: &'static str, since: Option<Instant>) -> Vec<Option<Validator>> {
        let history = self.history.lock();
        let Some(changes) = history.get(key) else {
            return vec![None];
        };
        let mut found = Vec::new();
        for (at, validator) in changes.iter().rev() {
            found.push(validator.clone());
            if since.is_some() && *at < since {
                return found;
            }
        }
        found.push(None);
        found
    }

    /// The clock of the next life has nothing to do with this one's.
    fn clock_stops(&self) {
        for changes in self.history.lock().values_mut() {
            for (at, _) in changes {
                *at = None;
            }
        }
    }

    fn written(&self, validator: &Validator) -> Option<Bytes> {
        self.written.lock().get(validator.as_field_value()).cloned()
    }

    /// Turns bits of segment files over; `choice` says which.
    fn rot(&self, flips: &[u64]) {
        let mut files = Vec::new();
        for shard in fs::read_dir(self.dir.path().join("cache/segments")).unwrap() {
            let entries = fs::read_dir(shard.unwrap().path()).unwrap();
            files.extend(entries.map(|entry| -> PathBuf { entry.unwrap().path() }));
        }
        files.sort();
        for flip in flips {
            let Some(count) = NonZeroU64::new(files.len() as u64) else {
                return;
            };
            let path = &files[usize::try_from(*flip % count).unwrap()];
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap();
            let Some(len) = NonZeroU64::new(file.metadata().unwrap().len()) else {
                continue;
            };
            let at = (flip >> 8) % len;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            byte[0] ^= 1 << (flip % 8);
            file.write_all_at(&byte, at).unwrap();
        }
    }

    async fn ask(&self, replica: &Replica, ask: &Ask) -> Answer {
        let mut fields = HeaderMap::new();
        let conditions = [
            (header::IF_MATCH, &ask.if_match),
            (header::IF_NONE_MATCH, &ask.if_none_match),
            (header::RANGE, &ask.range),
        ];
        for (name, value) in conditions {
            if let Some(value) = value {
                fields.insert(name, HeaderValue::from_str(value).unwrap());
            }
        }
        let head = RequestHead::from_headers(ask.method, &fields).unwrap();
        let get = Get {
            mount: &self.mount,
            key: ask.key,
            head: &head,
            no_cache: ask.no_cache,
            started: std::time::Instant::now(),
        };
        let opened = match replica.tiers.open(&get).await {
            Ok(opened) => opened,
            Err(refusal) => return Answer::Refused(refusal),
        };
        let Opened {
            representation,
            verdict,
            reader,
            ..
        } = opened;
        let validator = representation.validator.clone();
        let Some(mut reader) = reader else {
            return Answer::Head { validator, verdict };
        };
        let ranges = wanted(&verdict, representation.size, ask.method);
        let mut parts: Vec<(ByteRange, Vec<u8>)> = Vec::new();
        let (mut cut, mut left, mut chunks) = (false, false, 0);
        'body: for range in ranges {
            parts.push((range, Vec::new()));
            let body = &mut parts.last_mut().unwrap().1;
            while let Some(rest) = range.from_offset(range.start() + body.len() as u64) {
                if ask.leaves_after == Some(chunks) {
                    left = true;
                    break 'body;
                }
                chunks += 1;
                match std::future::poll_fn(|cx| reader.poll_chunk(cx, rest)).await {
                    Ok(Payload::Memory(bytes)) => body.extend(bytes),
                    Ok(Payload::File(extent)) => {
                        let mut bytes = vec![0; usize::try_from(extent.len()).unwrap()];
                        let file = extent.file().file();
                        file.read_exact_at(&mut bytes, extent.offset()).unwrap();
                        body.extend(bytes);
                    }
                    Err(_) => {
                        cut = true;
                        break 'body;
                    }
                }
            }
        }
        Answer::Body {
            validator,
            verdict,
            parts,
            cut,
            left,
        }
    }

    /// P1 and P3, whatever else was going on: each byte is that of the revision in the label, and a body that
    /// was not cut is whole.
    fn check_body(&self, ask: &Ask, answer: &Answer) -> Result<(), String> {
        let Answer::Body {
            validator,
            verdict,
            parts,
            cut,
            left,
        } = answer
        else {
            return Ok(());
        };
        let Some(object) = self.written(validator) else {
            return Err(format!("a label that nobody wrote: {validator:?}"));
        };
        let ended = *cut || *left;
        for (nth, (range, body)) in parts.iter().enumerate() {
            let start = usize::try_from(range.start()).unwrap();
            let whole = object.get(start..usize::try_from(range.end()).unwrap());
            let Some(whole) = whole else {
                return Err(format!("{range:?} of an object of {} bytes", object.len()));
            };
            let last = nth + 1 == parts.len();
            if !whole.starts_with(body) || (body.len() < whole.len() && !(ended && last)) {
                return Err(format!(
                    "{range:?} of {validator:?}: {} bytes, not those of the revision",
                    body.len()
                ));
            }
        }
        let ranges = wanted(verdict, object.len() as u64, ask.method);
        if !ended && parts.len() != ranges.len() {
            return Err(format!("{} parts instead of {}", parts.len(), ranges.len()));
        }
        Ok(())
    }
}

impl Replica {
    /// Drops everything as the end of the process would; what ran on the runtime goes with it.
    fn crash(self) {
        self.disk.crash();
    }

    async fn close(self) {
        self.filler.shutdown().await;
        self.disk.close().await.unwrap();
    }
}

/// The bytes of revision `seed`: equal seeds are equal bytes, and no two blocks are alike.
fn object(seed: u64, len: u64) -> Bytes {
    let mut dice = crate::chance::seeded::Dice::new(seed);
    let words = std::iter::repeat_with(|| dice.below(u64::MAX).to_le_bytes());
    words
        .flatten()
        .take(usize::try_from(len).unwrap())
        .collect()
}

/// One thread, and time that passes when everybody waits for it.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}
