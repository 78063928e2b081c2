//! What a warm request costs before and after the system calls: the pure parts, one by one.
//!
//! ```text
//! cargo bench --bench pure            # figures
//! cargo bench --bench pure -- --test  # once each: does it still run?
//! ```
//!
//! `scripts/instructions.py` counts all of a request together.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::header::{HOST, HeaderMap, HeaderValue, IF_MATCH, RANGE, USER_AGENT};
use pinrange::mount::{ForbiddenAs, Mount, Mounts};
use pinrange::object::{Representation, Validator};
use pinrange::remote::memory::MemoryRemote;
use pinrange::seldom::Outage;
use pinrange::semantics::precondition::Method;
use pinrange::semantics::range::{parse_range, resolve_all};
use pinrange::semantics::{EntityTagList, RequestHead, evaluate};
use pinrange::server::body::{BodyEnd, BodyObserver};
use pinrange::server::io::SendQueue;
use pinrange::server::respond;
use pinrange::tiers::{Opened, Trace};

// The tier keeps it to itself.
#[path = "../src/disk/coverage.rs"]
#[expect(
    dead_code,
    unused_imports,
    reason = "of which the search alone is measured, and its tests do not run here"
)]
mod coverage;

const TAG: &str = "\"9e107d9d372bb6826bd81d3542a419d6-128\"";
const SIZE: u64 = 1 << 40;

fn representation() -> Representation {
    let header = |name: &str, value: &str| (name.into(), value.into());
    Representation {
        validator: Validator::from_etag_field(TAG).unwrap(),
        size: SIZE,
        last_modified: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
        version_id: None,
        headers: vec![
            header("content-type", "application/octet-stream"),
            header("x-amz-meta-origin", "nightly"),
        ],
    }
}

fn request_fields() -> HeaderMap {
    [
        (HOST, "snapshots.example"),
        (USER_AGENT, "bench"),
        (RANGE, "bytes=1099511619584-1099511623679"),
        (IF_MATCH, TAG),
    ]
    .into_iter()
    .map(|(name, value)| (name, HeaderValue::from_static(value)))
    .collect()
}

fn semantics(criterion: &mut Criterion) {
    let many = format!(
        "bytes={}",
        (0..64_u64)
            .map(|part| format!("{}-{}", part << 20, (part << 20) + 4095))
            .collect::<Vec<_>>()
            .join(",")
    );
    let mut group = criterion.benchmark_group("range");
    for (name, field) in [
        ("one", "bytes=1099511619584-1099511623679"),
        ("suffix", "bytes=-4096"),
        ("64 parts", &many),
        ("ignored", "lines=1-2"),
    ] {
        group.bench_with_input(BenchmarkId::new("parse", name), field, |bench, field| {
            bench.iter(|| parse_range(black_box(field.as_bytes())));
        });
        if let Some(specs) = parse_range(field.as_bytes()) {
            group.bench_function(BenchmarkId::new("resolve", name), |bench| {
                bench.iter(|| resolve_all(black_box(&specs), SIZE));
            });
        }
    }
    group.finish();

    let list = vec![TAG; 16].join(", ");
    let mut group = criterion.benchmark_group("if-match");
    for (name, field) in [
        ("one", TAG),
        ("unquoted", "9e107d9d"),
        ("list of 16", &list),
    ] {
        group.bench_with_input(BenchmarkId::new("parse", name), field, |bench, field| {
            bench.iter(|| EntityTagList::parse([black_box(field.as_bytes())]));
        });
    }
    group.finish();

    let fields = request_fields();
    let representation = representation();
    criterion.bench_function("request head", |bench| {
        bench.iter(|| RequestHead::from_headers(Method::Get, black_box(&fields)));
    });
    let head = RequestHead::from_headers(Method::Get, &fields).unwrap();
    criterion.bench_function("preconditions", |bench| {
        bench.iter(|| evaluate(black_box(&head), &black_box(&representation).metadata()));
    });
}

fn paths(criterion: &mut Criterion) {
    let mount = |path: String| Mount {
        path,
        prefix: "prefix/".to_owned(),
        remote: Arc::new(MemoryRemote::new()),
        fresh_for: Duration::from_secs(2),
        stale_if_error: Duration::from_mins(5),
        forbidden: ForbiddenAs::BadGateway,
        retries: 0,
        verify: false,
        outage: Outage::default(),
    };
    let mounts = Mounts::new(vec![mount("/snapshots".to_owned())]);
    let mut group = criterion.benchmark_group("path");
    for (name, path) in [
        ("plain", "/snapshots/2026/11/21/model.safetensors"),
        ("encoded", "/snapshots/2026/mod%C3%A8le%20v2.safetensors"),
    ] {
        group.bench_with_input(BenchmarkId::new("resolve", name), path, |bench, path| {
            bench.iter(|| mounts.resolve(black_box(path)).is_ok());
        });
    }
    group.finish();
}

/// A segment of 64 MiB in blocks of 256 KiB, and one of 64 GiB, to see what a search costs.
fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coverage");
    for blocks in [256_u32, 1 << 18] {
        for (name, every) in [("whole", 1), ("all but the last", 1), ("every other", 2)] {
            let mut coverage = coverage::Coverage::empty(blocks);
            (0..blocks)
                .step_by(every)
                .for_each(|block| coverage.insert(block));
            if name == "all but the last" {
                coverage.remove(blocks - 1);
            }
            group.bench_function(BenchmarkId::new(name, blocks), |bench| {
                bench.iter(|| {
                    let absent = black_box(&coverage).first_absent(black_box(0));
                    (absent, coverage.first_present(absent))
                });
            });
        }
    }
    group.finish();
}

struct Nobody;

impl BodyObserver for Nobody {
    fn on_end(&mut self, _: BodyEnd) {}
}

fn answers(criterion: &mut Criterion) {
    let representation = Arc::new(representation());
    let fields = representation.fields();
    let request = request_fields();
    let head = RequestHead::from_headers(Method::Get, &request).unwrap();
    let queue = SendQueue::default();
    let started = Instant::now();
    criterion.bench_function("fields of a representation", |bench| {
        bench.iter(|| black_box(&representation).fields());
    });
    criterion.bench_function("head of a 206", |bench| {
        bench.iter(|| {
            let opened = Opened {
                representation: Arc::clone(&representation),
                fields: Arc::clone(&fields),
                verdict: evaluate(&head, &representation.metadata()),
                reader: None,
                trace: Trace {
                    disk: started.elapsed(),
                    ..Trace::default()
                },
            };
            respond::opened(opened, Method::Get, &queue, Nobody).0
        });
    });
}

criterion_group!(pure, semantics, paths, planning, answers);
criterion_main!(pure);
