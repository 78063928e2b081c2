//! `pinrange get` against a scripted server that is strict where it is honest, and against a real nginx.
//!
//! [`Origin`] serves one object with strict ranges and `If-Match`; a hook may answer any request otherwise, replace
//! the object, or hold the answer back. It logs what it was asked, so that tests count requests and bytes instead of
//! believing the client.
#![expect(
    clippy::unwrap_used,
    reason = "the lint's exemption for tests does not see a test crate's helpers"
)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use clap::Parser;
use futures::StreamExt;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use pinrange::cli::get::{GetArgs, GetError, Summary, download};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

const CHUNK: u64 = 64 << 10;

// === the scripted server ===

type Answer = Response<BoxBody<Bytes, io::Error>>;
type Hook = dyn Fn(&Ask, &Origin) -> Option<Answer> + Send + Sync;

#[derive(Clone)]
struct Object {
    etag: String,
    bytes: Bytes,
    /// Sent with every answer.
    headers: Vec<(&'static str, String)>,
}

#[derive(Clone, Debug)]
struct Ask {
    /// Counted from 0.
    number: usize,
    method: String,
    path: String,
    headers: HeaderMap,
    /// `Range: bytes=a-b` as `a..b + 1`.
    range: Option<(u64, u64)>,
    at: Instant,
}

impl Ask {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

struct Origin {
    port: u16,
    object: Mutex<Object>,
    hook: Box<Hook>,
    log: Mutex<Vec<Ask>>,
    logged: Notify,
    connections: AtomicUsize,
}

/// Stops accepting when dropped.
struct Running {
    origin: Arc<Origin>,
    _task: AbortOnDropHandle<()>,
}

impl std::ops::Deref for Running {
    type Target = Origin;
    fn deref(&self) -> &Origin {
        &self.origin
    }
}

async fn serve(
    object: Object,
    hook: impl Fn(&Ask, &Origin) -> Option<Answer> + Send + Sync + 'static,
) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = Arc::new(Origin {
        port: listener.local_addr().unwrap().port(),
        object: Mutex::new(object),
        hook: Box::new(hook),
        log: Mutex::default(),
        logged: Notify::new(),
        connections: AtomicUsize::new(0),
    });
    let shared = Arc::clone(&origin);
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            shared.connections.fetch_add(1, Ordering::Relaxed);
            let origin = Arc::clone(&shared);
            connections.spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let answer = origin.answer(&request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                let _cut = connection
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    Running {
        origin,
        _task: AbortOnDropHandle::new(task),
    }
}

impl Origin {
    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn answer(&self, request: &Request<Incoming>) -> Answer {
        let ask = {
            let mut log = self.log.lock().unwrap();
            let range = request.headers().get("range").map(|value| {
                let (a, b) = value.to_str().unwrap()["bytes=".len()..]
                    .split_once('-')
                    .unwrap();
                (a.parse().unwrap(), b.parse::<u64>().unwrap() + 1)
            });
            let ask = Ask {
                number: log.len(),
                method: request.method().to_string(),
                path: request.uri().to_string(),
                headers: request.headers().clone(),
                range,
                at: Instant::now(),
            };
            log.push(ask.clone());
            ask
        };
        self.logged.notify_waiters();
        (self.hook)(&ask, self).unwrap_or_else(|| self.honest(&ask))
    }

    /// RFC 9110 §13 and §14 to the letter, as far as a download needs them.
    fn honest(&self, ask: &Ask) -> Answer {
        let object = self.object.lock().unwrap().clone();
        let size = object.bytes.len() as u64;
        let mut response = Response::builder().header("etag", &object.etag);
        for (name, value) in &object.headers {
            response = response.header(*name, value);
        }
        if ask.header("if-match").is_some_and(|tag| tag != object.etag) {
            return response.status(412).body(empty()).unwrap();
        }
        let Some((start, end)) = ask.range else {
            return response.body(full(object.bytes)).unwrap();
        };
        if start >= size {
            let range = format!("bytes */{size}");
            return response
                .status(416)
                .header("content-range", range)
                .body(empty())
                .unwrap();
        }
        let end = end.min(size);
        response
            .status(206)
            .header("content-range", format!("bytes {start}-{}/{size}", end - 1))
            .body(full(object.bytes.slice(usize(start)..usize(end))))
            .unwrap()
    }

    fn asks(&self) -> Vec<Ask> {
        self.log.lock().unwrap().clone()
    }

    async fn asked(&self, requests: usize) {
        loop {
            let notified = self.logged.notified();
            if self.log.lock().unwrap().len() >= requests {
                return;
            }
            notified.await;
        }
    }
}

fn usize(number: u64) -> usize {
    number.try_into().unwrap()
}

fn full(bytes: impl Into<Bytes>) -> BoxBody<Bytes, io::Error> {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed()
}

fn empty() -> BoxBody<Bytes, io::Error> {
    full(Bytes::new())
}

fn status(code: u16) -> Answer {
    Response::builder().status(code).body(empty()).unwrap()
}

/// `answer` with its body cut after `keep` bytes.
fn cut(answer: Answer, keep: usize) -> Answer {
    let end = async {
        // Lets the server flush what comes before.
        tokio::task::yield_now().await;
        Err(io::Error::other("cut"))
    };
    end_with(answer, keep, futures::stream::once(end))
}

/// `answer` with a body that stops after `keep` bytes and never ends.
fn hang(answer: Answer, keep: usize) -> Answer {
    end_with(answer, keep, futures::stream::pending())
}

fn end_with(
    answer: Answer,
    keep: usize,
    end: impl futures::Stream<Item = io::Result<Frame<Bytes>>> + Send + Sync + 'static,
) -> Answer {
    let (mut head, body) = answer.into_parts();
    let body = futures::executor::block_on(body.collect())
        .unwrap()
        .to_bytes();
    head.headers.insert("content-length", body.len().into());
    let keep = body.slice(..keep.min(body.len()));
    let start = futures::stream::once(async { Ok(Frame::data(keep)) });
    Response::from_parts(head, BodyExt::boxed(StreamBody::new(start.chain(end))))
}

fn honest(_: &Ask, _: &Origin) -> Option<Answer> {
    None
}

/// Bytes that differ at every offset's neighbourhood, and between seeds.
fn content(seed: u64, size: usize) -> Bytes {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = std::iter::repeat_with(|| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    });
    bytes.flatten().take(size).collect()
}

fn object(seed: u64, size: usize) -> Object {
    Object {
        etag: format!("\"rev-{seed}\""),
        bytes: content(seed, size),
        headers: Vec::new(),
    }
}

// === the client's side ===

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    get: GetArgs,
}

fn args<I: IntoIterator<Item = S>, S: Into<String>>(list: I) -> GetArgs {
    let list: Vec<String> = list.into_iter().map(Into::into).collect();
    let mut all = vec!["get", "-c", "4", "--json"];
    if !list.iter().any(|arg| arg == "--chunk-size") {
        all.extend(["--chunk-size", "64K"]);
    }
    all.extend(list.iter().map(String::as_str));
    Cli::try_parse_from(all).unwrap().get
}

#[derive(Clone, Default)]
struct Events(Arc<(Mutex<String>, Notify)>);

impl Write for Events {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .0
            .lock()
            .unwrap()
            .push_str(std::str::from_utf8(bytes).unwrap());
        self.0.1.notify_waiters();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Events {
    fn of(&self, kind: &str) -> Vec<serde_json::Value> {
        let text = self.0.0.lock().unwrap().clone();
        let complete = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        let events = complete.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        events.filter(|event| event["event"] == kind).collect()
    }

    async fn until(&self, enough: impl Fn(&Self) -> bool) {
        loop {
            let notified = self.0.1.notified();
            if enough(self) {
                return;
            }
            notified.await;
        }
    }
}

/// Standard output: remembers, and never makes the writer wait.
#[derive(Clone, Default)]
struct Stdout(Arc<Mutex<Vec<u8>>>);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A directory, the file to download into, and what a run needs.
struct Bench {
    _directory: tempfile::TempDir,
    file: PathBuf,
    events: Events,
    cancel: CancellationToken,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        Self {
            _directory: directory,
            file,
            events: Events::default(),
            cancel: CancellationToken::new(),
        }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.file.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    async fn get(&self, url: &str, more: &[&str]) -> Result<Summary, GetError> {
        let output = self.file.to_str().unwrap();
        let mut list = vec![url, "-o", output];
        list.extend(more);
        let events = Box::new(self.events.clone());
        download(&args(list), Box::new(io::sink()), events, &self.cancel).await
    }

    /// The download's file and nothing else is left.
    fn assert_complete(&self, want: &[u8]) {
        assert!(std::fs::read(&self.file).unwrap() == want, "wrong bytes");
        self.assert_clean();
    }

    fn assert_clean(&self) {
        let names: Vec<_> = std::fs::read_dir(self.file.parent().unwrap())
            .unwrap()
            .collect();
        assert!(names.len() <= 1, "{names:?}");
        assert!(!self.beside(".pinrange-part").exists());
    }
}

fn code(result: &Result<Summary, GetError>) -> u8 {
    result.as_ref().err().map_or(0, GetError::exit_code)
}

// === pinned ===

#[tokio::test(flavor = "multi_thread")]
async fn every_request_after_the_first_is_pinned() {
    let origin = serve(object(1, 1_000_003), honest).await;
    let bench = Bench::new();
    let summary = bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(1, 1_000_003));
    assert_eq!(summary.bytes, 1_000_003);
    assert_eq!(summary.etag.as_deref(), Some("\"rev-1\""));
    assert_eq!(summary.verified, None);

    let asks = origin.asks();
    assert_eq!(asks[0].range, Some((0, CHUNK)));
    assert_eq!(asks[0].header("if-match"), None);
    assert!(
        asks.iter()
            .all(|ask| ask.method == "GET" && ask.range.is_some())
    );
    assert!(
        asks[1..]
            .iter()
            .all(|ask| ask.header("if-match") == Some("\"rev-1\""))
    );
    assert_eq!(asks.len(), 16, "each chunk once");
    let done = &bench.events.of("done")[0];
    assert_eq!(done["bytes"], 1_000_003);
    assert_eq!(done["etag"], "\"rev-1\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_reused() {
    let origin = serve(object(1, 200 * usize(CHUNK)), honest).await;
    let bench = Bench::new();
    bench.get(&origin.url("/f"), &[]).await.unwrap();
    assert_eq!(origin.asks().len(), 200);
    let connections = origin.connections.load(Ordering::Relaxed);
    // The pool may open a connection while another is on its way back.
    assert!(connections <= 8, "{connections} connections for 4 workers");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_size_around_a_chunk() {
    let chunk = usize(CHUNK);
    for size in [0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 4 * chunk - 1] {
        let origin = serve(object(1, size), honest).await;
        let bench = Bench::new();
        let summary = bench.get(&origin.url("/f"), &[]).await.unwrap();
        bench.assert_complete(&content(1, size));
        assert_eq!(summary.bytes, size as u64);
        assert!(bench.events.of("warning").is_empty(), "{size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_replaced_midway_starts_over() {
    let size = 8 * usize(CHUNK);
    let origin = serve(object(1, size), move |ask, origin| {
        if ask.number == 3 {
            *origin.object.lock().unwrap() = object(2, size);
        }
        None
    })
    .await;
    let bench = Bench::new();
    let summary = bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(2, size));
    assert_eq!(summary.restarts, 1);
    assert_eq!(summary.etag.as_deref(), Some("\"rev-2\""));
    assert_eq!(bench.events.of("restart").len(), 1);
}

/// What a server that ignores `If-Match` does, or a cache in front of one.
#[tokio::test(flavor = "multi_thread")]
async fn a_206_of_another_revision_starts_over() {
    let size = 8 * usize(CHUNK);
    let origin = serve(object(1, size), move |ask, origin| {
        if ask.number >= 3 {
            *origin.object.lock().unwrap() = object(2, size);
        }
        let mut ask = ask.clone();
        ask.headers.remove("if-match");
        Some(origin.honest(&ask))
    })
    .await;
    let bench = Bench::new();
    let summary = bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(2, size));
    assert_eq!(summary.restarts, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_keeps_changing_is_given_up() {
    let size = 8 * usize(CHUNK);
    let origin = serve(object(0, size), move |ask, origin| {
        *origin.object.lock().unwrap() = object(ask.number as u64, size);
        None
    })
    .await;
    let bench = Bench::new();
    let result = bench.get(&origin.url("/f"), &["--max-restarts", "2"]).await;
    assert_eq!(code(&result), 75, "{result:?}");
    assert_eq!(bench.events.of("restart").len(), 2);
    assert!(!bench.file.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_body_goes_on_at_the_exact_offset() {
    let size = 4 * usize(CHUNK);
    let origin = serve(object(1, size), |ask, origin| {
        Some(cut(origin.honest(ask), 10_000))
    })
    .await;
    let bench = Bench::new();
    bench
        .get(&origin.url("/f"), &["--retries", "0"])
        .await
        .unwrap();
    bench.assert_complete(&content(1, size));
    let mut asks = origin.asks();
    assert!(
        asks[1..]
            .iter()
            .all(|ask| ask.header("if-match") == Some("\"rev-1\""))
    );
    asks.sort_by_key(|ask| ask.range);
    let starts: Vec<u64> = asks.iter().map(|ask| ask.range.unwrap().0).collect();
    let want: Vec<u64> = (0..4)
        .flat_map(|chunk| (0..7).map(move |cut| chunk * CHUNK + cut * 10_000))
        .collect();
    assert_eq!(starts, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_honoured() {
    let origin = serve(object(1, 2 * usize(CHUNK)), |ask, _| match ask.number {
        0 | 2 => Some(
            Response::builder()
                .status(503)
                .header("retry-after", "0")
                .body(empty())
                .unwrap(),
        ),
        1 => Some(
            Response::builder()
                .status(429)
                .header("retry-after", "1")
                .body(empty())
                .unwrap(),
        ),
        _ => None,
    })
    .await;
    let bench = Bench::new();
    bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(1, 2 * usize(CHUNK)));
    let asks = origin.asks();
    assert!((asks[2].at - asks[1].at).as_secs_f64() >= 1.0);
    assert_eq!(bench.events.of("retry").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_is_given_up_after_the_retries() {
    let origin = serve(object(1, 1), |_, _| Some(status(503))).await;
    let bench = Bench::new();
    let result = bench.get(&origin.url("/f"), &["--retries", "1"]).await;
    assert_eq!(code(&result), 69, "{result:?}");
    assert_eq!(origin.asks().len(), 2);
    bench.assert_clean();

    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let result = bench
        .get(&format!("http://{closed}/f"), &["--retries", "0"])
        .await;
    assert_eq!(code(&result), 69, "{result:?}");

    let origin = serve(object(1, 1), |_, _| {
        Some(
            Response::builder()
                .status(503)
                .header("retry-after", "3600")
                .body(empty())
                .unwrap(),
        )
    })
    .await;
    let result = bench.get(&origin.url("/f"), &[]).await;
    assert_eq!(code(&result), 69, "{result:?}");
    assert_eq!(origin.asks().len(), 1, "an hour is not waited for");
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_are_not_believed() {
    type Lie = fn(&mut Response<BoxBody<Bytes, io::Error>>, &Ask);
    let lies: [(&str, u8, Lie); 7] = [
        ("another range", 76, |answer, ask| {
            let (start, end) = ask.range.unwrap();
            let range = format!("bytes {}-{end}/{}", start + 1, 8 * CHUNK);
            answer
                .headers_mut()
                .insert("content-range", range.parse().unwrap());
        }),
        ("another total", 76, |answer, ask| {
            let (start, end) = ask.range.unwrap();
            let range = format!("bytes {start}-{}/{}", end - 1, 9 * CHUNK);
            answer
                .headers_mut()
                .insert("content-range", range.parse().unwrap());
        }),
        ("no range", 76, |answer, _| {
            answer.headers_mut().remove("content-range");
        }),
        ("a shorter body", 65, |answer, _| {
            *answer.body_mut() = full(vec![0; 100]);
        }),
        ("a longer body", 65, |answer, _| {
            *answer.body_mut() = full(vec![0; usize(CHUNK) + 1]);
        }),
        ("no tag", 76, |answer, _| {
            answer.headers_mut().remove("etag");
        }),
        ("everything", 76, |answer, _| {
            *answer.status_mut() = StatusCode::OK;
        }),
    ];
    for (name, want, lie) in lies {
        let origin = serve(object(1, 8 * usize(CHUNK)), move |ask, origin| {
            let mut answer = origin.honest(ask);
            if ask.number == 5 {
                lie(&mut answer, ask);
            }
            Some(answer)
        })
        .await;
        let bench = Bench::new();
        let result = bench.get(&origin.url("/f"), &[]).await;
        assert_eq!(code(&result), want, "{name}: {result:?}");
        assert!(!bench.file.exists(), "{name}");
    }
}

/// No `Content-Length` to compare: only the count of what came can tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_body_is_counted() {
    for (extra, want) in [(0, 0), (1, 65)] {
        let origin = serve(object(1, 2 * usize(CHUNK)), move |ask, origin| {
            let (head, body) = origin.honest(ask).into_parts();
            let body = futures::executor::block_on(body.collect())
                .unwrap()
                .to_bytes();
            let frames = [body, Bytes::from(vec![0; extra])].map(|bytes| Ok(Frame::data(bytes)));
            let body = BodyExt::boxed(StreamBody::new(futures::stream::iter(frames)));
            Some(Response::from_parts(head, body))
        })
        .await;
        let bench = Bench::new();
        let result = bench.get(&origin.url("/f"), &[]).await;
        assert_eq!(code(&result), want, "{result:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_their_exit_codes() {
    for (answer, want) in [
        (404, 66),
        (410, 66),
        (401, 77),
        (403, 77),
        (304, 76),
        (400, 76),
    ] {
        let origin = serve(object(1, 1), move |_, _| Some(status(answer))).await;
        let bench = Bench::new();
        let result = bench.get(&origin.url("/f"), &[]).await;
        assert_eq!(code(&result), want, "{answer}: {result:?}");
        assert_eq!(origin.asks().len(), 1, "{answer}");
        bench.assert_clean();
        let error = &bench.events.of("error")[0];
        assert_eq!(error["code"], want);
    }
    let bench = Bench::new();
    assert_eq!(code(&bench.get("ftp://h/f", &[]).await), 64);
    let directory = bench.file.parent().unwrap().to_owned();
    std::fs::create_dir(directory.join("file")).unwrap();
    assert_eq!(code(&bench.get("http://127.0.0.1:1/f", &[]).await), 73);
}

// === unpinned ===

#[tokio::test(flavor = "multi_thread")]
async fn without_a_strong_tag_there_is_one_stream_and_a_warning() {
    let size = 4 * usize(CHUNK);
    for etag in [Some("W/\"weak\""), None] {
        let origin = serve(object(1, size), move |ask, origin| {
            let mut answer = origin.honest(ask);
            answer.headers_mut().remove("etag");
            if let Some(etag) = etag {
                answer.headers_mut().insert("etag", etag.parse().unwrap());
            }
            Some(answer)
        })
        .await;
        let bench = Bench::new();
        bench.get(&origin.url("/f"), &[]).await.unwrap();
        bench.assert_complete(&content(1, size));
        assert_eq!(bench.events.of("warning").len(), 1);
        assert_eq!(origin.asks().len(), 2);
        assert_eq!(origin.asks()[1].range, None);
    }
}

fn without_ranges(ask: &Ask, origin: &Origin) -> Answer {
    origin.honest(&Ask {
        range: None,
        ..ask.clone()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_is_asked_once() {
    let size = 4 * usize(CHUNK);
    let origin = serve(object(1, size), |ask, origin| {
        Some(without_ranges(ask, origin))
    })
    .await;
    let bench = Bench::new();
    bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(1, size));
    assert_eq!(origin.asks().len(), 1);
    assert_eq!(bench.events.of("warning").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_single_stream_begins_anew() {
    let size = 4 * usize(CHUNK);
    let origin = serve(object(1, size), move |ask, origin| {
        let answer = without_ranges(ask, origin);
        if ask.number == 0 {
            *origin.object.lock().unwrap() = object(2, size);
            return Some(cut(answer, 100_000));
        }
        Some(answer)
    })
    .await;
    let bench = Bench::new();
    bench.get(&origin.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(2, size));

    let origin = serve(object(1, size), |ask, origin| {
        Some(cut(without_ranges(ask, origin), 100_000))
    })
    .await;
    let bench = Bench::new();
    let result = bench.get(&origin.url("/f"), &["--retries", "1"]).await;
    assert_eq!(code(&result), 69, "{result:?}");
    assert_eq!(origin.asks().len(), 2);
    bench.assert_clean();
}

// === checksums ===

fn sha256(bytes: &[u8]) -> String {
    format!(
        "sha-256=:{}:",
        BASE64_STANDARD.encode(Sha256::digest(bytes))
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_checksum_verifies_and_a_wrong_one_fails() {
    let size = 8 * usize(CHUNK) + 1;
    let bytes = content(1, size);
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes);
    let crc = BASE64_STANDARD.encode(crc.to_be_bytes());
    let cases = [
        (vec![("repr-digest", sha256(&bytes))], Ok(Some("sha-256"))),
        (vec![("repr-digest", sha256(b"other"))], Err(65)),
        (
            vec![
                ("x-amz-checksum-crc64nvme", crc),
                ("x-amz-checksum-type", "FULL_OBJECT".into()),
            ],
            Ok(Some("crc64nvme")),
        ),
        (
            vec![
                ("x-amz-checksum-crc64nvme", BASE64_STANDARD.encode([0; 8])),
                ("x-amz-checksum-type", "FULL_OBJECT".into()),
            ],
            Err(65),
        ),
        (
            vec![(
                "x-amz-checksum-sha256",
                format!("{}-3", BASE64_STANDARD.encode([0; 32])),
            )],
            Ok(None),
        ),
    ];
    for (headers, want) in cases {
        for ranges in [true, false] {
            let object = Object {
                headers: headers.clone(),
                ..object(1, size)
            };
            let origin = serve(object, move |ask, origin| {
                (!ranges).then(|| without_ranges(ask, origin))
            })
            .await;
            let bench = Bench::new();
            let result = bench.get(&origin.url("/f"), &[]).await;
            let got = result
                .as_ref()
                .map(|summary| summary.verified)
                .map_err(GetError::exit_code);
            assert_eq!(got, want, "{headers:?} {ranges}");
            if want.is_ok() {
                bench.assert_complete(&bytes);
            } else {
                assert!(!bench.file.exists());
                assert!(std::fs::read(bench.beside(".pinrange-part")).unwrap() == bytes);
                assert!(!bench.beside(".pinrange-state").exists());
            }

            let stdout = Stdout::default();
            let list = args([&origin.url("/f"), "-o", "-"]);
            let events = Box::new(Events::default());
            let result = download(&list, Box::new(stdout.clone()), events, &bench.cancel).await;
            let got = result
                .as_ref()
                .map(|summary| summary.verified)
                .map_err(GetError::exit_code);
            assert_eq!(got, want, "{headers:?} {ranges}");
            assert!(*stdout.0.lock().unwrap() == bytes);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_wrong_checksum_the_next_run_begins_anew() {
    let size = 4 * usize(CHUNK);
    let digest = ("repr-digest", sha256(&content(1, size)));
    let origin = serve(
        Object {
            headers: vec![digest],
            ..object(1, size)
        },
        |ask, origin| {
            let mut answer = origin.honest(ask);
            if ask.number == 2 {
                *answer.body_mut() = full(vec![0; usize(CHUNK)]);
            }
            Some(answer)
        },
    )
    .await;
    let bench = Bench::new();
    assert_eq!(code(&bench.get(&origin.url("/f"), &[]).await), 65);
    let summary = bench.get(&origin.url("/f"), &[]).await.unwrap();
    assert_eq!(summary.resumed, 0);
    bench.assert_complete(&content(1, size));
}

// === resuming ===

/// A server of which chunks 0 to 5 arrive and 5 KB of each other one, until `open`.
async fn stuck(size: usize, open: Arc<AtomicUsize>) -> Running {
    serve(object(1, size), move |ask, origin| {
        let answer = origin.honest(ask);
        let stuck = open.load(Ordering::Relaxed) == 0 && ask.range.unwrap().0 >= 6 * CHUNK;
        Some(if stuck { hang(answer, 5_000) } else { answer })
    })
    .await
}

fn asked_bytes(asks: &[Ask]) -> u64 {
    asks.iter()
        .map(|ask| ask.range.map_or(u64::MAX, |(start, end)| end - start))
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_download_resumes_from_what_was_saved() {
    let size = 12 * usize(CHUNK);
    let open = Arc::new(AtomicUsize::new(0));
    let origin = stuck(size, Arc::clone(&open)).await;
    let bench = Bench::new();
    let url = origin.url("/f");
    {
        let run = bench.get(&url, &[]);
        tokio::pin!(run);
        // A second tick after all six chunks came follows the save of the first.
        let saved = bench.events.until(|events| {
            let came =
                |e: &&serde_json::Value| e["received"].as_u64().unwrap() >= 6 * CHUNK + 4 * 5_000;
            events.of("progress").iter().filter(came).count() >= 3
        });
        tokio::select! {
            result = &mut run => panic!("{result:?}"),
            () = saved => {}
        }
    }
    let before = origin.asks().len();
    open.store(1, Ordering::Relaxed);
    released(&bench).await;
    let summary = bench.get(&url, &[]).await.unwrap();
    bench.assert_complete(&content(1, size));
    assert_eq!(summary.resumed, 6 * CHUNK);
    let asks = &origin.asks()[before..];
    assert!(
        asks.iter()
            .all(|ask| ask.header("if-match") == Some("\"rev-1\"")),
        "the first too"
    );
    assert_eq!(
        asked_bytes(asks),
        6 * CHUNK,
        "what was saved is not asked for again"
    );
}

/// The lock of a run that was dropped lives until its last save has ended, on another thread.
async fn released(bench: &Bench) {
    let part = std::fs::File::open(bench.beside(".pinrange-part")).unwrap();
    tokio::task::spawn_blocking(move || part.lock().unwrap())
        .await
        .unwrap();
}

/// Interrupts a download of `origin` after its six chunks.
async fn interrupt(bench: &Bench, origin: &Running) -> GetError {
    let url = origin.url("/f");
    let run = bench.get(&url, &[]);
    tokio::pin!(run);
    let came = bench.events.until(|events| {
        let came = |e: &serde_json::Value| e["received"].as_u64().unwrap() >= 6 * CHUNK + 4 * 5_000;
        events.of("progress").iter().any(came)
    });
    tokio::select! {
        result = &mut run => panic!("{result:?}"),
        () = came => bench.cancel.cancel(),
    }
    run.await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_saves_what_came_and_says_how_to_resume() {
    let size = 12 * usize(CHUNK);
    let open = Arc::new(AtomicUsize::new(0));
    let origin = stuck(size, Arc::clone(&open)).await;
    let bench = Bench::new();
    let error = interrupt(&bench, &origin).await;
    assert_eq!(error.exit_code(), 130);
    assert!(
        error
            .to_string()
            .contains("run the same command again to resume"),
        "{error}"
    );

    open.store(1, Ordering::Relaxed);
    let again = Bench {
        cancel: CancellationToken::new(),
        ..bench
    };
    let before = origin.asks().len();
    // Another chunk size, to show that the state is not tied to it.
    let summary = again
        .get(&origin.url("/f"), &["--chunk-size", "100000"])
        .await
        .unwrap();
    again.assert_complete(&content(1, size));
    assert_eq!(summary.resumed, 6 * CHUNK);
    assert_eq!(asked_bytes(&origin.asks()[before..]), 6 * CHUNK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_download_of_a_replaced_object_starts_over() {
    let size = 12 * usize(CHUNK);
    let open = Arc::new(AtomicUsize::new(0));
    let origin = stuck(size, Arc::clone(&open)).await;
    let bench = Bench::new();
    interrupt(&bench, &origin).await;
    open.store(1, Ordering::Relaxed);
    // Shorter, so that bytes of the old one would stick out.
    *origin.object.lock().unwrap() = object(2, size - 100);
    let again = Bench {
        cancel: CancellationToken::new(),
        ..bench
    };
    let before = origin.asks().len();
    let summary = again
        .get(&origin.url("/f"), &["--max-restarts", "0"])
        .await
        .unwrap();
    again.assert_complete(&content(2, size - 100));
    assert_eq!(summary.resumed, 0);
    assert_eq!(origin.asks()[before].header("if-match"), Some("\"rev-1\""));
}

/// Killed between the last byte and the rename: one small pinned request shows that the revision is still current.
#[tokio::test(flavor = "multi_thread")]
async fn a_complete_part_file_is_revalidated_not_refetched() {
    let size = 2 * usize(CHUNK);
    let origin = serve(object(1, size), honest).await;
    let bench = Bench::new();
    let identity = {
        // What an interrupted run writes, to have a state file of this URL.
        let open = Arc::new(AtomicUsize::new(0));
        let stuck = stuck(12 * usize(CHUNK), open).await;
        let other = Bench::new();
        interrupt(&other, &stuck).await;
        std::fs::read_to_string(other.beside(".pinrange-state")).unwrap()
    };
    let mut state: serde_json::Value = serde_json::from_str(&identity).unwrap();
    let url = origin.url("/f");
    state["identity"] = BASE64_STANDARD
        .encode(Sha256::digest(format!("{url}?")))
        .into();
    state["size"] = size.into();
    state["done"] = serde_json::json!([[0, size]]);
    std::fs::write(bench.beside(".pinrange-state"), state.to_string()).unwrap();
    std::fs::write(bench.beside(".pinrange-part"), content(1, size)).unwrap();
    let summary = bench.get(&url, &[]).await.unwrap();
    bench.assert_complete(&content(1, size));
    assert_eq!(summary.resumed, size as u64);
    let asks = origin.asks();
    assert_eq!(asks.len(), 1);
    assert_eq!(asks[0].range, Some((size as u64 - 1, size as u64)));
    assert_eq!(asks[0].header("if-match"), Some("\"rev-1\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_downloads_into_one_file_exclude_each_other() {
    let origin = stuck(12 * usize(CHUNK), Arc::default()).await;
    let bench = Bench::new();
    let url = origin.url("/f");
    let first = bench.get(&url, &[]);
    tokio::pin!(first);
    tokio::select! {
        result = &mut first => panic!("{result:?}"),
        () = origin.asked(5) => {}
    }
    let second = bench.get(&url, &[]).await;
    assert_eq!(code(&second), 73, "{second:?}");
    assert!(
        bench.beside(".pinrange-part").exists(),
        "the first one's part file is not touched"
    );
}

// === standard output ===

#[tokio::test(flavor = "multi_thread")]
async fn standard_output_gets_the_bytes_in_order_through_a_bounded_window() {
    let size = 40 * usize(CHUNK) + 7;
    let stdout = Stdout::default();
    let written = stdout.clone();
    let origin = serve(object(1, size), move |ask, origin| {
        let written = written.0.lock().unwrap().len() as u64;
        let start = ask.range.unwrap().0;
        assert!(
            start <= written + 3 * CHUNK,
            "asked for {start} when {written} had left"
        );
        // Every third chunk comes in two tries.
        Some(match ask.number % 3 {
            0 => cut(origin.honest(ask), 30_000),
            _ => origin.honest(ask),
        })
    })
    .await;
    let list = args([&origin.url("/f"), "-o", "-"]);
    let events = Events::default();
    let cancel = CancellationToken::new();
    let summary = download(&list, Box::new(stdout.clone()), Box::new(events), &cancel)
        .await
        .unwrap();
    assert!(*stdout.0.lock().unwrap() == content(1, size));
    assert_eq!(summary.file, None);
    let asks = origin.asks();
    assert!(
        asks[1..]
            .iter()
            .all(|ask| ask.header("if-match") == Some("\"rev-1\""))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_have_left_cannot_be_taken_back() {
    let size = 40 * usize(CHUNK);
    let origin = serve(object(1, size), move |ask, origin| {
        if ask.number == 20 {
            *origin.object.lock().unwrap() = object(2, size);
        }
        None
    })
    .await;
    let stdout = Stdout::default();
    let list = args([&origin.url("/f"), "-o", "-"]);
    let cancel = CancellationToken::new();
    let result = download(
        &list,
        Box::new(stdout.clone()),
        Box::new(Events::default()),
        &cancel,
    )
    .await;
    assert_eq!(code(&result), 75, "{result:?}");
    let left = stdout.0.lock().unwrap().clone();
    assert!(
        !left.is_empty() && content(1, size).starts_with(&left),
        "only the first revision left"
    );
}

/// A reader that takes nothing until the download has ended, and was interrupted before.
struct Stalled {
    interrupt: CancellationToken,
    ended: std::sync::mpsc::Receiver<()>,
}

impl Write for Stalled {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        self.interrupt.cancel();
        // Nothing is ever sent: it is over when the other side is dropped. Waiting is bounded so that a download
        // that does wait for its reader fails this test instead of hanging.
        let _ = self.ended.recv_timeout(Duration::from_mins(1));
        Err(io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_does_not_wait_for_the_reader() {
    let origin = serve(object(1, 4 * usize(CHUNK)), honest).await;
    let list = args([&origin.url("/f"), "-o", "-"]);
    let cancel = CancellationToken::new();
    let (ending, ended) = std::sync::mpsc::channel::<()>();
    let stalled = Stalled {
        interrupt: cancel.clone(),
        ended,
    };
    let result = download(
        &list,
        Box::new(stalled),
        Box::new(Events::default()),
        &cancel,
    )
    .await;
    drop(ending);
    assert_eq!(code(&result), 130, "{result:?}");
}

/// Takes a few bytes at a time, from one slice or across several, and is interrupted by signals.
#[derive(Clone, Default)]
struct Picky {
    taken: Arc<Mutex<Vec<u8>>>,
    calls: usize,
}

impl Write for Picky {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[io::IoSlice::new(bytes)])
    }
    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.calls += 1;
        if self.calls.is_multiple_of(3) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let most = self.calls * 7919 % 20_000 + 1;
        let bytes: Vec<u8> = slices
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .take(most)
            .collect();
        self.taken.lock().unwrap().extend(&bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_may_take_the_bytes_in_pieces() {
    let size = 10 * usize(CHUNK) + 7;
    let origin = serve(object(1, size), honest).await;
    let list = args([&origin.url("/f"), "-o", "-"]);
    let picky = Picky::default();
    let taken = Arc::clone(&picky.taken);
    let cancel = CancellationToken::new();
    download(&list, Box::new(picky), Box::new(Events::default()), &cancel)
        .await
        .unwrap();
    assert!(*taken.lock().unwrap() == content(1, size));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_written_to_and_not_replaced() {
    use std::os::unix::fs::FileTypeExt;
    let origin = serve(object(1, 4 * usize(CHUNK)), honest).await;
    let list = args([&origin.url("/f"), "-o", "/dev/null"]);
    let cancel = CancellationToken::new();
    let events = Events::default();
    let sink = Box::new(io::sink());
    let summary = download(&list, sink, Box::new(events.clone()), &cancel).await;
    assert_eq!(
        summary.unwrap().file.as_deref(),
        Some(Path::new("/dev/null"))
    );
    assert_eq!(events.of("done")[0]["file"], "/dev/null");
    assert!(
        std::fs::metadata("/dev/null")
            .unwrap()
            .file_type()
            .is_char_device()
    );
}

/// Events go to something that fails so.
struct Failing(io::ErrorKind);

impl Write for Failing {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_cannot_be_written_are_a_failure_unless_nobody_reads_them() {
    let origin = serve(object(1, 4 * usize(CHUNK)), honest).await;
    for (kind, exit) in [
        (io::ErrorKind::StorageFull, 74),
        (io::ErrorKind::BrokenPipe, 0),
    ] {
        let bench = Bench::new();
        let url = origin.url("/f");
        let list = args([&url, "-o", bench.file.to_str().unwrap()]);
        let result = download(
            &list,
            Box::new(io::sink()),
            Box::new(Failing(kind)),
            &bench.cancel,
        )
        .await;
        assert_eq!(code(&result), exit, "{kind}");
        bench.assert_complete(&content(1, 4 * usize(CHUNK)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_replaced_keeps_its_mode() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let origin = serve(object(1, 4 * usize(CHUNK)), honest).await;
    for mode in [0o640, 0o600, 0o664] {
        let bench = Bench::new();
        std::fs::write(&bench.file, "old").unwrap();
        std::fs::set_permissions(&bench.file, std::fs::Permissions::from_mode(mode)).unwrap();
        bench.get(&origin.url("/f"), &[]).await.unwrap();
        bench.assert_complete(&content(1, 4 * usize(CHUNK)));
        let now = std::fs::metadata(&bench.file).unwrap().mode() & 0o777;
        assert_eq!(now, mode, "{now:o}, not {mode:o}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_symbolic_link_stays_one() {
    let origin = serve(object(1, 4 * usize(CHUNK)), honest).await;
    let bench = Bench::new();
    let real = bench.file.with_file_name("real");
    std::fs::write(&real, "old").unwrap();
    std::os::unix::fs::symlink(&real, &bench.file).unwrap();
    bench.get(&origin.url("/f"), &[]).await.unwrap();
    assert!(std::fs::read(&real).unwrap() == content(1, 4 * usize(CHUNK)));
    assert!(bench.file.is_symlink());
}

// === redirects and credentials ===

fn redirect(to: &str) -> Answer {
    Response::builder()
        .status(302)
        .header("location", to)
        .body(empty())
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_to_the_urls_own_host_only() {
    let size = 4 * usize(CHUNK);
    let store = serve(object(1, size), honest).await;
    let to = store.url("/o?X-Amz-Signature=s");
    let front = serve(object(9, 1), move |_, _| Some(redirect(&to))).await;
    let bench = Bench::new();
    let netrc = bench.file.with_file_name("netrc");
    std::fs::write(
        &netrc,
        "# é\nmachine other login no password no\nmachine 127.0.0.1 login me password pä%ss\n",
    )
    .unwrap();
    let flags = [
        "--netrc-file",
        netrc.to_str().unwrap(),
        "-H",
        "Private-Token: t",
        "-H",
        "User-Agent: me",
    ];
    bench.get(&front.url("/f"), &flags).await.unwrap();
    std::fs::remove_file(&netrc).unwrap();
    bench.assert_complete(&content(1, size));

    let basic = format!("Basic {}", BASE64_STANDARD.encode("me:pä%ss"));
    let front = front.asks();
    assert_eq!(front.len(), 1, "the final URL is remembered");
    assert_eq!(front[0].header("authorization"), Some(&*basic));
    assert_eq!(front[0].header("private-token"), Some("t"));
    assert_eq!(front[0].header("user-agent"), Some("me"));
    assert_eq!(front[0].header("x-amz-checksum-mode"), Some("ENABLED"));
    for ask in store.asks() {
        assert_eq!(ask.path, "/o?X-Amz-Signature=s");
        for name in ["authorization", "private-token", "x-amz-checksum-mode"] {
            assert_eq!(ask.header(name), None, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_in_the_url_and_on_the_command_line() {
    let origin = serve(object(1, 1), honest).await;
    let bench = Bench::new();
    let url = origin.url("/f").replace("://", "://me:pw@");
    bench.get(&url, &[]).await.unwrap();
    bench
        .get(&url, &["-H", "authorization: Bearer t"])
        .await
        .unwrap();
    let asks = origin.asks();
    assert_eq!(asks[0].header("authorization"), Some("Basic bWU6cHc="));
    assert_eq!(
        asks[0].header("host"),
        Some(&*format!("127.0.0.1:{}", origin.port))
    );
    assert_eq!(asks[1].header("authorization"), Some("Bearer t"));
    let result = bench
        .get(
            &url.replace("/f", "/?secret"),
            &["--netrc-file", "/nonexistent"],
        )
        .await;
    result.expect("the URL's credentials come first");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_redirect_is_resolved_again() {
    let size = 12 * usize(CHUNK);
    let store = serve(object(1, size), |ask, origin| {
        // Every signature is good for five requests.
        let mut uses: HashMap<String, usize> = HashMap::new();
        for earlier in &origin.asks()[..=ask.number] {
            *uses.entry(earlier.path.clone()).or_default() += 1;
        }
        (uses[&ask.path] > 5).then(|| status(403))
    })
    .await;
    let to = store.url("/o?sig=");
    let front = serve(object(9, 1), move |ask, _| {
        Some(redirect(&format!("{to}{}", ask.number)))
    })
    .await;
    let bench = Bench::new();
    bench.get(&front.url("/f"), &[]).await.unwrap();
    bench.assert_complete(&content(1, size));
    assert!(front.asks().len() >= 3);

    let store = serve(object(1, size), |_, _| Some(status(403))).await;
    let to = store.url("/o");
    let front = serve(object(9, 1), move |_, _| Some(redirect(&to))).await;
    let result = bench.get(&front.url("/f"), &[]).await;
    assert_eq!(code(&result), 77, "{result:?}");
    assert_eq!(
        front.asks().len(),
        1,
        "a place that was just given has not expired"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_end() {
    let origin = serve(object(1, 1), |_, _| Some(redirect("/f"))).await;
    let bench = Bench::new();
    assert_eq!(code(&bench.get(&origin.url("/f"), &[]).await), 76);
    assert_eq!(origin.asks().len(), 11);
}

// === the command line ===

#[test]
fn help_lists_the_exit_codes_and_bad_values_are_refused() {
    let help = <Cli as clap::CommandFactory>::command()
        .render_help()
        .to_string();
    for code in ["64", "65", "66", "69", "73", "74", "75", "76", "77", "130"] {
        assert!(help.contains(&format!("{code}  ")), "{code}\n{help}");
    }
    for bad in [
        &["--chunk-size", "0"][..],
        &["--chunk-size", "16X"],
        &["--chunk-size", "99999999999G"],
        &["-c", "0"],
        &["-H", "Range: bytes=0-1"],
        &["-H", "If-Match: \"a\""],
        &["-H", "no colon"],
    ] {
        let list = ["get", "http://h/f"].iter().chain(bad);
        assert!(Cli::try_parse_from(list).is_err(), "{bad:?}");
    }
}

// === nginx ===

const NGINX: &str = "/usr/sbin/nginx";

struct Nginx(std::process::Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Starts nginx over `root` and returns its port.
fn nginx(root: &Path) -> (Nginx, u16) {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let root_name = root.display();
    let config = format!(
        "daemon off; master_process off; pid {root_name}/pid; error_log {root_name}/error;
         events {{}}
         http {{ access_log off; client_body_temp_path {root_name}/t; proxy_temp_path {root_name}/t;
                 fastcgi_temp_path {root_name}/t; uwsgi_temp_path {root_name}/t; scgi_temp_path {root_name}/t;
                 server {{ listen 127.0.0.1:{port}; root {root_name}/www; }} }}"
    );
    std::fs::write(root.join("conf"), config).unwrap();
    let child = std::process::Command::new(NGINX)
        .args([
            "-p",
            root.to_str().unwrap(),
            "-e",
            root.join("error").to_str().unwrap(),
            "-c",
        ])
        .arg(root.join("conf"))
        .spawn()
        .unwrap();
    (Nginx(child), port)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_nginx() {
    if !Path::new(NGINX).exists() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI has to have nginx at {NGINX}"
        );
        eprintln!("SKIPPED: there is no nginx at {NGINX}");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("www")).unwrap();
    let bytes = content(1, 64 << 20);
    std::fs::write(root.path().join("www/f"), &bytes).unwrap();
    std::fs::write(root.path().join("www/empty"), "").unwrap();
    let (_nginx, port) = nginx(root.path());
    let bench = Bench::new();
    // The retries wait for nginx to listen.
    let url = format!("http://127.0.0.1:{port}/f");
    let summary = bench.get(&url, &["--chunk-size", "4MiB"]).await.unwrap();
    bench.assert_complete(&bytes);
    assert!(summary.etag.unwrap().starts_with('"'));
    assert!(bench.events.of("warning").is_empty());
    bench
        .get(&format!("http://127.0.0.1:{port}/empty"), &[])
        .await
        .unwrap();
    bench.assert_complete(b"");
    assert_eq!(
        code(
            &bench
                .get(&format!("http://127.0.0.1:{port}/none"), &[])
                .await
        ),
        66
    );
}
