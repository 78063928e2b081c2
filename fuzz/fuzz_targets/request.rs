//! Raw bytes to a listener: never a 5xx, never a hang, never a byte that is not the object's.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pinrange::disk::{DiskConfig, DiskTier, MinFree};
use pinrange::fill::{FillSettings, Filler};
use pinrange::mount::{ForbiddenAs, Mount, Mounts};
use pinrange::remote::memory::MemoryRemote;
use pinrange::seldom::Outage;
use pinrange::server::accept::{Acceptor, Ending, Limits};
use pinrange::server::handler::Handler;
use pinrange::server::io::Timeouts;
use pinrange::server::page_in::PageIn;
use pinrange::telemetry::Metrics;
use pinrange::tiers::{TierSettings, Tiers};

const BLOCK: u64 = 4096;
const PART: u64 = 4 * BLOCK;

/// Far beyond what any answer takes, also on a machine that does something else.
const HANG: Duration = Duration::from_secs(10);

struct Served {
    address: SocketAddr,
    /// By `ETag`.
    objects: HashMap<String, Vec<u8>>,
}

static SERVED: LazyLock<Served> = LazyLock::new(serve);

fn serve() -> Served {
    let bucket = MemoryRemote::new();
    let mut objects = HashMap::new();
    for (key, size) in [("k", 5 * PART + 77), ("empty", 0), ("dir/a b", 1000)] {
        let bytes: Vec<u8> = (0..size)
            .map(|at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect();
        let stored = bucket.put(key, bytes.clone(), &[("content-type", "a/b")]);
        objects.insert(stored.validator.as_field_value().to_owned(), bytes);
    }
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            let dir = tempfile::tempdir().expect("a directory");
            let disk = DiskTier::open(DiskConfig {
                dir: dir.path().join("cache"),
                capacity: 1 << 24,
                min_free: MinFree::Bytes(0),
                block_size: BLOCK,
                scrub_rate: 0,
            })
            .expect("a disk tier");
            let metrics = Metrics::default();
            let settings = FillSettings {
                part_size: NonZeroU64::new(PART).expect("not zero"),
                budget: 8 * PART,
            };
            let filler = Filler::new(Arc::clone(&disk), settings, metrics.clone());
            let settings = TierSettings {
                fan_out: 2,
                part_size: PART,
            };
            let tiers = Tiers::new(disk, filler, settings);
            let mounts = Mounts::new(vec![Mount {
                path: "/m".to_owned(),
                prefix: String::new(),
                remote: Arc::new(bucket),
                fresh_for: Duration::from_secs(2),
                stale_if_error: Duration::from_secs(300),
                forbidden: ForbiddenAs::default(),
                retries: 0,
                verify: false,
                outage: Outage::default(),
            }]);
            let handler = Handler::new(Arc::new(mounts), tiers, metrics);
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
                .await
                .expect("a port");
            let address = listener.local_addr().expect("bound");
            let limits = Limits {
                max_connections: 64,
                max_head: 16 << 10,
                timeouts: Timeouts {
                    header: Duration::from_secs(5),
                    idle: Duration::from_secs(5),
                    progress: Duration::from_secs(5),
                    min_rate: 0,
                },
            };
            let page_in = PageIn::new().expect("threads");
            tell.send(address).expect("somebody waits");
            Acceptor::new(listener, Arc::new(handler), limits, page_in)
                .run(Ending::default(), Duration::ZERO)
                .await;
        });
    });
    Served {
        address: told.recv().expect("the server starts"),
        objects,
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut socket = TcpStream::connect(SERVED.address).expect("it listens");
    socket.set_nodelay(true).expect("a socket");
    socket.set_read_timeout(Some(HANG)).expect("a timeout");
    // Who is refused early may be gone before all is sent.
    let _ = socket.write_all(data);
    let _ = socket.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("it hangs")
        }
        // Cut, with bytes of ours unread.
        Ok(_) | Err(_) => {}
    }
    // Answers come in the order of the requests; where the first is a HEAD, only its head can be told apart.
    let head_request = data
        .trim_ascii_start()
        .get(..5)
        .is_some_and(|method| method == b"HEAD ");
    let mut rest = &answer[..];
    while let Some(after) = judge(rest, head_request) {
        if head_request {
            return;
        }
        rest = after;
    }
}

/// Judges one answer and returns what follows it; `None` when that cannot be told.
fn judge(answer: &[u8], head_request: bool) -> Option<&[u8]> {
    if answer.is_empty() {
        return None;
    }
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).expect("a head is text");
    let body = &answer[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next().expect("a line");
    let status: u16 = status
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5)?.parse().ok())
        .unwrap_or_else(|| panic!("no status line: {status:?}"));
    assert!(status < 500, "answered {status}:\n{head}");
    let field = |wanted: &str| {
        lines.clone().find_map(|line| {
            let (name, value) = line.split_once(':').expect("fields have a colon");
            name.eq_ignore_ascii_case(wanted).then(|| value.trim())
        })
    };
    let length: Option<usize> =
        field("content-length").map(|length| length.parse().expect("digits"));
    if head_request || matches!(status, 100..=199 | 204 | 304) {
        let next = body.is_empty() || body.starts_with(b"HTTP/1.");
        assert!(!head_request || next, "a body to HEAD");
        return Some(body);
    }
    let length = length?;
    // A later request of a pipeline may be a HEAD: then nothing can be said of what follows.
    let body = body.get(..length)?;
    if body.starts_with(b"HTTP/1.") {
        return None;
    }
    if !matches!(status, 200 | 206) {
        return Some(&answer[end + 4 + length..]);
    }
    let tag = field("etag").expect("a revision is named");
    let object = SERVED.objects.get(tag).expect("one of ours");
    if status == 200 {
        assert_eq!(body, object);
    } else if let Some(range) = field("content-range") {
        let (first, last, size) = range
            .strip_prefix("bytes ")
            .and_then(|range| {
                let (range, size) = range.split_once('/')?;
                let (first, last) = range.split_once('-')?;
                let number = |digits: &str| digits.parse::<usize>().ok();
                Some((number(first)?, number(last)?, number(size)?))
            })
            .expect("a range");
        assert_eq!(size, object.len());
        assert!(body == &object[first..=last], "{range} has other bytes");
    } else {
        let kind = field("content-type").expect("of several parts");
        assert!(kind.starts_with("multipart/byteranges"), "{kind}");
    }
    Some(&answer[end + 4 + length..])
}
