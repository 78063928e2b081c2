//! What the kernel sees of a warm pinned range (P7): strace on the built program.
//!
//! The program is started over a cache that an earlier run has filled and left in order, so that nothing of the cold
//! path is still under way, and is asked once before strace looks, since the first touch may look the key up.

mod support;

use std::io::BufReader;
use std::io::Write as _;

use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use rustix::process::Signal;

use support::http::{self, Random};
use support::process;
use support::strace::{self, Call};

/// More than a socket takes at once, so that the answer waits for its client too, and more than one sendfile may ask
/// for.
const SIZE: usize = 9 << 20;

/// Where the ranges begin: not on a page's bound.
const FIRST: usize = 4321;

/// The request after the one that is looked at: answered with 405, so nobody is asked for it.
const MARK: &str = "OPTIONS /the-end";

/// Calls that make something durable, or prepare to.
const SYNCS: [&str; 5] = ["fsync", "fdatasync", "sync_file_range", "syncfs", "msync"];

/// Calls that bring a file's bytes into the process.
const READS: [&str; 6] = ["read", "readv", "pread64", "preadv", "preadv2", "mmap"];

/// Calls that take bytes out of it.
const WRITES: [&str; 9] = [
    "write", "writev", "pwrite64", "pwritev", "pwritev2", "sendto", "sendmsg", "splice", "vmsplice",
];

/// Calls that change a directory or a file's extent.
const CHANGES: [&str; 8] = [
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "ftruncate",
    "fallocate",
    "mkdir",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_pinned_range_is_one_write_and_sendfile_and_a_short_one_a_read_and_a_write() {
    let Some(tracer) = process::find("strace") else {
        return;
    };
    let s3 = StrictS3::start(Options::memory(["bucket"])).await.unwrap();
    let object = Random(1).bytes(SIZE);
    let put = s3.put("bucket", "object", object.clone(), PutOptions::default());
    let etag = put.unwrap().etag;
    let dir = tempfile::tempdir().unwrap();

    let cold = process::replica(&s3, dir.path());
    assert_eq!(http::get(cold.data, "/m/object", "").body, object);
    assert_eq!(cold.stop().code(), Some(0));

    // Nothing is looked at in the background while strace looks.
    let mut command = process::serve(&s3.endpoint(), dir.path());
    command
        .env("PINRANGE_CACHE__SCRUB_RATE", "0")
        .env("PINRANGE_MOUNT__0__VERIFY", "false");
    let warm = process::Serving::start(&mut command);
    let swept = b"\npinrange_disk_sweeping 0\n";
    while !http::get(warm.admin, "/metrics", "")
        .body
        .windows(swept.len())
        .any(|line| line == swept)
    {}
    s3.clear_log();
    let pin = format!("If-Match: {etag}\r\nRange: bytes=0-0\r\n");
    assert_eq!(http::get(warm.data, "/m/object", &pin).status, 206);
    let ways = [
        (1, Way::Copied),
        (4 << 10, Way::Copied),
        ((4 << 10) + 1, Way::Joined),
        (64 << 10, Way::Joined),
        ((64 << 10) + 1, Way::Sent),
        (SIZE - FIRST, Way::Sent),
    ];
    // The first request of a connection, and one that is answered without being read (ADR 23).
    for ((length, way), before) in ways.into_iter().flat_map(|way| [(way, 0), (way, 2)]) {
        let range = FIRST..FIRST + length;
        let trace = dir.path().join("trace");
        let mut connection = http::connect(warm.data);
        let client = connection.local_addr().unwrap();
        let ranged = |last: usize| {
            format!(
                "GET /m/object HTTP/1.1\r\nHost: test\r\nIf-Match: {etag}\r\nRange: bytes={FIRST}-{last}\r\n\r\n"
            )
        };
        for _ in 0..before {
            write!(connection, "{}", ranged(FIRST)).unwrap();
            let answer = http::read(&mut BufReader::new(&mut connection), false);
            assert_eq!(answer.unwrap().unwrap().status, 206);
        }
        let mut tracer = strace::attach(&tracer, warm.process.pid(), 64, &trace);
        write!(connection, "{}", ranged(range.end - 1)).unwrap();
        let mut answers = BufReader::new(connection);
        let answer = http::read(&mut answers, false).unwrap().unwrap();
        assert_eq!(answer.status, 206);
        assert!(answer.body == object[range], "other bytes");
        // The bytes are here before the call that sent them returns. A further request on the same connection is
        // taken up only after that, and marks the end in the trace.
        let connection = answers.get_mut();
        write!(connection, "{MARK} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        assert!(http::read(&mut answers, false).unwrap().is_some());
        tracer.signal(Signal::INT);
        tracer.wait();
        assert_eq!(s3.stats().requests, 0, "S3 was asked: {:?}", s3.log());

        let mut calls = strace::calls(&std::fs::read_to_string(&trace).unwrap());
        let end = calls.iter().position(|call| call.arguments.contains(MARK));
        calls.truncate(end.expect("the mark is in the trace"));
        let cache = dir.path().join("cache");
        look_at(
            &calls,
            &client.to_string(),
            cache.to_str().unwrap(),
            length,
            way,
        );
    }
    let repeated = format!("\npinrange_repeated_requests_total {}\n", ways.len());
    let metrics = String::from_utf8(http::get(warm.admin, "/metrics", "").body).unwrap();
    assert!(metrics.contains(&repeated), "{metrics}");
    assert_eq!(warm.stop().code(), Some(0));
}

/// How a range reaches the socket (ADR 18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Read, and written in one call with the head.
    Copied,
    /// By sendfile, in one segment with the head.
    Joined,
    /// By sendfile, behind the head.
    Sent,
}

/// Looks at the calls of one answer of `length` bytes to `client`.
fn look_at(calls: &[Call], client: &str, cache: &str, length: usize, way: Way) {
    let socket = format!("->{client}]");
    let to_socket = |call: &&Call| call.argument(0).contains(&socket);
    let sent: u64 = calls
        .iter()
        .filter(|call| call.name == "sendfile")
        .filter(to_socket)
        .inspect(|call| assert!(call.argument(1).contains(cache), "{call:?}"))
        .filter_map(Call::bytes)
        .sum();
    let heads: Vec<_> = calls
        .iter()
        .filter(|call| WRITES.contains(&call.name.as_str()))
        .filter(to_socket)
        .collect();
    assert_eq!(heads.len(), 1, "one write, of the head at least: {heads:?}");
    let written = heads[0].bytes().expect("it worked");
    if way == Way::Copied {
        assert_eq!(sent, 0, "{length} bytes need no sendfile");
        let head = written
            .checked_sub(length as u64)
            .expect("with the payload");
        assert!(head < 2048, "{heads:?}");
    } else {
        assert_eq!(sent, length as u64, "all of the payload goes by sendfile");
        assert!(written < 2048, "{heads:?}");
    }
    let more = heads[0].arguments.contains("MSG_MORE");
    assert_eq!(more, way == Way::Joined, "{heads:?}");

    let from_cache: Vec<_> = calls
        .iter()
        .filter(|call| READS.contains(&call.name.as_str()) && call.arguments.contains(cache))
        .collect();
    let most = if way == Way::Copied { length } else { 1 };
    let at_most = format!("iov_len={most}}}");
    for call in &from_cache {
        let is_probe = call.name == "preadv2"
            && call.arguments.contains(&at_most)
            && call.arguments.contains("RWF_NOWAIT");
        assert!(is_probe, "no byte of a long payload is read: {call:?}");
    }
    if way != Way::Sent {
        assert_eq!(from_cache.len(), 1, "asked for once: {from_cache:?}");
    }
    for call in calls {
        let name = call.name.as_str();
        assert!(!SYNCS.contains(&name), "nothing is synced: {call:?}");
        assert!(
            !CHANGES.contains(&name),
            "nothing is changed on disk: {call:?}"
        );
        let first = call.argument(0);
        if WRITES.contains(&name) {
            assert!(
                !first.contains(cache),
                "the cache is not written to: {call:?}"
            );
        }
    }
}
