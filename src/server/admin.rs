//! The admin listener: health, metrics and purge.
//!
//! | | |
//! |---|---|
//! | `GET /healthz` | the process is alive |
//! | `GET /readyz` | requests are served: 503 while starting or draining. The first line is `ready`, `starting` or `draining`; a second one, `degraded: …`, says what is wrong with the cache disk, past which requests are served |
//! | `GET /metrics` | `OpenMetrics`, or the text format from before it for those whose `Accept` prefers that |
//! | `POST /purge` | `{"path": "/mount/key"}`, or a prefix that ends in `*`: forgets every held revision |
//! | `POST /scrub` | compares everything that is held with its checksums now, answers when it is done |
//!
//! It is a second [`Acceptor`](super::accept::Acceptor) with limits of its own ([`limits`]), so a
//! flooded data listener cannot keep a probe from being answered. Errors are JSON objects with one
//! member, `error`.
//!
//! It has no authentication: it listens on loopback unless told otherwise, and whoever reaches the
//! port may purge. Web pages in an operator's browser reach it too, so requests that change
//! something are refused when they bear an `Origin` field, as browsers send with every cross-site
//! POST and `curl` never does.

use std::future::Future;
use std::time::Duration;

use http::header::{ACCEPT, ORIGIN};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;

use super::accept::{ConnInfo, Handler, Limits};
use super::body::ResponseBody;
use super::io::Timeouts;
use super::respond::{self, AdminStatus as Status};
use crate::disk::{Purged, ScrubReport};
use crate::telemetry::Metrics;

/// Most bytes of a purge request's body: S3's longest key, escaped in the worst way, and room for
/// the rest.
const MAX_PURGE_BODY: usize = 16 << 10;

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// How far the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: /readyz has an answer for each"
)]
pub enum Readiness {
    /// Not serving yet.
    Starting,
    /// Serving.
    Ready,
    /// Serving what was begun; load balancers should look elsewhere.
    Draining,
}

/// What the admin listener shows and does.
pub trait Control: Send + Sync + 'static {
    /// How far the process is.
    fn readiness(&self) -> Readiness;

    /// What is wrong with the cache disk; requests are served all the same.
    fn trouble(&self) -> Option<String>;

    /// All metrics, as [`Metrics::encode`] writes them.
    fn metrics(&self) -> String;

    /// Forgets every held revision of the key at `path`, or of every key below it if it ends in
    /// `*`. The path is as a client writes it: percent-encoded, with the mount.
    fn purge(&self, path: String) -> impl Future<Output = Result<Purged, PurgeRefused>> + Send;

    /// Compares everything that is held with its checksums.
    fn scrub(&self) -> impl Future<Output = Result<ScrubReport, ScrubRefused>> + Send;
}

/// Why there was no pass of the scrubber, or no whole one.
#[derive(Debug, thiserror::Error)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: each has exactly one status"
)]
pub enum ScrubRefused {
    /// One is enough.
    #[error("a scrub is under way; wait until it is done")]
    UnderWay,
    /// The disk tier failed; says how.
    #[error("{0}")]
    Failed(String),
}

/// Why nothing, or not everything, was purged.
#[derive(Debug, thiserror::Error)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: each has exactly one status"
)]
pub enum PurgeRefused {
    /// The path is not one a client could ask for; says why.
    #[error("{0}")]
    Malformed(String),
    /// Nothing is mounted there.
    #[error("nothing is mounted at {0}")]
    NoMount(String),
    /// The disk tier failed; says where and how.
    #[error("{0}")]
    Failed(String),
}

/// What the admin listener allows: a handful of probes, scrapers and operators.
pub fn limits() -> Limits {
    Limits {
        max_connections: 64,
        max_head: 8 << 10,
        timeouts: Timeouts {
            header: Duration::from_secs(5),
            // Longer than the usual scrape interval of 15 s to 60 s, so that scrapers keep their
            // connection.
            idle: Duration::from_secs(75),
            progress: Duration::from_secs(10),
            // Pages of some KiB: who has not taken one by then has not for its speed.
            min_rate: 1 << 10,
        },
    }
}

/// The handler of the admin listener.
#[derive(Debug)]
pub struct Admin<C>(pub C);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PurgeRequest {
    path: String,
}

impl<C: Control> Handler for Admin<C> {
    async fn handle(&self, request: Request<Incoming>, _: &ConnInfo) -> Response<ResponseBody> {
        let Self(control) = self;
        let get = matches!(*request.method(), Method::GET | Method::HEAD);
        match request.uri().path() {
            "/healthz" if get => respond::admin(Status::Ok, TEXT, "ok\n"),
            "/readyz" if get => match control.readiness() {
                Readiness::Ready => {
                    let trouble = control.trouble();
                    let degraded = trouble.map(|what| format!("degraded: {what}\n"));
                    let body = format!("ready\n{}", degraded.unwrap_or_default());
                    respond::admin(Status::Ok, TEXT, body)
                }
                Readiness::Starting => respond::admin(Status::Unready, TEXT, "starting\n"),
                Readiness::Draining => respond::admin(Status::Unready, TEXT, "draining\n"),
            },
            "/metrics" if get => metrics(request.headers(), control.metrics()),
            "/healthz" | "/readyz" | "/metrics" => {
                refuse(Status::Allow("GET, HEAD"), "this page can only be read")
            }
            "/purge" if request.method() == Method::POST => match purge(control, request).await {
                Ok(purged) => {
                    let done = json!({ "revisions": purged.revisions, "bytes": purged.bytes });
                    respond::admin(Status::Ok, JSON, format!("{done}\n"))
                }
                Err((status, error)) => refuse(status, &error),
            },
            "/purge" => refuse(Status::Allow("POST"), "purge with POST"),
            "/scrub" if request.method() == Method::POST => scrub(control, &request).await,
            "/scrub" => refuse(Status::Allow("POST"), "scrub with POST"),
            _ => refuse(
                Status::NotFound,
                "no such page; there are /healthz, /readyz, /metrics, /purge and /scrub",
            ),
        }
    }
}

/// In the format that the scraper prefers, `OpenMetrics` where it does not care.
fn metrics(fields: &HeaderMap, open_metrics: String) -> Response<ResponseBody> {
    let open = weight(
        fields,
        ["application/openmetrics-text", "application/*", "*/*"],
    );
    let text = weight(fields, ["text/plain", "text/*", "*/*"]);
    if text > open {
        let text = Metrics::as_text(&open_metrics);
        respond::admin(Status::Ok, Metrics::TEXT_TYPE, text)
    } else {
        respond::admin(Status::Ok, Metrics::CONTENT_TYPE, open_metrics)
    }
}

/// What `Accept` gives the first of the `names` that it has (RFC 9110 §12.5.1): a name goes before the wildcards that
/// would match it. Parameters other than the weight are not looked at; a weight that cannot be read is none.
fn weight(fields: &HeaderMap, names: [&str; 3]) -> f32 {
    let accepted: Vec<(&str, f32)> = fields
        .get_all(ACCEPT)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','))
        .map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let said = parts.find_map(|part| part.strip_prefix(['q', 'Q'])?.strip_prefix('='));
            let weight = said.map_or(1.0, |said| said.parse().unwrap_or(0.0));
            (name, weight)
        })
        .collect();
    let of = |name: &str| {
        let named = accepted
            .iter()
            .filter(|(range, _)| range.eq_ignore_ascii_case(name));
        named.map(|(_, weight)| *weight).reduce(f32::max)
    };
    names.into_iter().find_map(of).unwrap_or(0.0)
}

async fn purge<C: Control>(
    control: &C,
    request: Request<Incoming>,
) -> Result<Purged, (Status, String)> {
    if request.headers().contains_key(ORIGIN) {
        let error = "web pages may not purge: the request has an Origin field";
        return Err((Status::CrossOrigin, error.to_owned()));
    }
    let body = match Limited::new(request.into_body(), MAX_PURGE_BODY)
        .collect()
        .await
    {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return Err((
                Status::TooLarge,
                format!("more than {MAX_PURGE_BODY} bytes"),
            ));
        }
        Err(error) => return Err((Status::Malformed, format!("the body ended early: {error}"))),
    };
    let PurgeRequest { path } = serde_json::from_slice(&body).map_err(|error| {
        let error =
            format!(r#"expected {{"path": "/mount/key"}} or a prefix ending in *: {error}"#);
        (Status::Malformed, error)
    })?;
    control.purge(path).await.map_err(|refused| {
        let status = match refused {
            PurgeRefused::Malformed(_) => Status::Malformed,
            PurgeRefused::NoMount(_) => Status::NotFound,
            PurgeRefused::Failed(_) => Status::Failed,
        };
        (status, refused.to_string())
    })
}

async fn scrub<C: Control>(control: &C, request: &Request<Incoming>) -> Response<ResponseBody> {
    if request.headers().contains_key(ORIGIN) {
        let error = "web pages may not scrub: the request has an Origin field";
        return refuse(Status::CrossOrigin, error);
    }
    match control.scrub().await {
        Ok(report) => {
            let found = json!({
                "segments": report.segments,
                "bytes": report.bytes,
                "corrupt_blocks": report.corrupt_blocks,
                "dropped_segments": report.dropped_segments,
                "skipped_segments": report.skipped_segments,
            });
            respond::admin(Status::Ok, JSON, format!("{found}\n"))
        }
        Err(refused) => {
            let status = match refused {
                ScrubRefused::UnderWay => Status::UnderWay,
                ScrubRefused::Failed(_) => Status::Failed,
            };
            refuse(status, &refused.to_string())
        }
    }
}

fn refuse(status: Status, error: &str) -> Response<ResponseBody> {
    respond::admin(status, JSON, format!("{}\n", json!({ "error": error })))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::super::accept::{Acceptor, Ending};
    use super::super::page_in::PageIn;
    use super::*;

    struct Fake {
        readiness: Mutex<Readiness>,
        trouble: Mutex<Option<String>>,
        purged: Mutex<Vec<String>>,
        scrubbing: Mutex<bool>,
    }

    impl Control for Arc<Fake> {
        fn readiness(&self) -> Readiness {
            *self.readiness.lock()
        }

        fn trouble(&self) -> Option<String> {
            self.trouble.lock().clone()
        }

        fn metrics(&self) -> String {
            let text = "# HELP pinrange_up Up.\n# TYPE pinrange_up gauge\npinrange_up 1\n# EOF\n";
            text.to_owned()
        }

        async fn purge(&self, path: String) -> Result<Purged, PurgeRefused> {
            self.purged.lock().push(path.clone());
            match path.as_str() {
                "/nowhere/key" => Err(PurgeRefused::NoMount(path)),
                "/mount/%zz" => Err(PurgeRefused::Malformed("bad percent-encoding".to_owned())),
                "/mount/broken" => Err(PurgeRefused::Failed("unlink: EIO".to_owned())),
                _ => Ok(Purged {
                    revisions: 2,
                    bytes: 512,
                }),
            }
        }

        async fn scrub(&self) -> Result<ScrubReport, ScrubRefused> {
            if *self.scrubbing.lock() {
                return Err(ScrubRefused::UnderWay);
            }
            Ok(ScrubReport {
                segments: 3,
                corrupt_blocks: 1,
                ..ScrubReport::default()
            })
        }
    }

    struct Server {
        fake: Arc<Fake>,
        addr: std::net::SocketAddr,
    }

    impl Server {
        async fn start() -> Self {
            let readiness = Mutex::new(Readiness::Ready);
            let fake = Arc::new(Fake {
                readiness,
                trouble: Mutex::default(),
                purged: Mutex::default(),
                scrubbing: Mutex::default(),
            });
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let handler = Arc::new(Admin(Arc::clone(&fake)));
            let acceptor = Acceptor::new(listener, handler, limits(), PageIn::new().unwrap());
            tokio::spawn(acceptor.run(Ending::default(), Duration::ZERO));
            Self { fake, addr }
        }

        /// Sends `head` (no final blank line) and `body`; returns the status and the whole answer.
        async fn ask(&self, head: &str, body: &str) -> (String, String) {
            let mut tcp = TcpStream::connect(self.addr).await.unwrap();
            let len = body.len();
            let request = format!(
                "{head}\r\nHost: admin\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
            );
            tcp.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            tcp.read_to_string(&mut answer).await.unwrap();
            (answer["HTTP/1.1 ".len()..][..3].to_owned(), answer)
        }

        async fn purge(&self, body: &str) -> (String, String) {
            self.ask("POST /purge HTTP/1.1", body).await
        }
    }

    #[tokio::test]
    async fn readyz_is_503_while_starting_and_draining_and_healthz_never() {
        let server = Server::start().await;
        for (readiness, status) in [
            (Readiness::Starting, "503"),
            (Readiness::Ready, "200"),
            (Readiness::Draining, "503"),
        ] {
            *server.fake.readiness.lock() = readiness;
            assert_eq!(server.ask("GET /readyz HTTP/1.1", "").await.0, status);
            assert_eq!(server.ask("GET /healthz HTTP/1.1", "").await.0, "200");
        }
    }

    #[tokio::test]
    async fn readyz_names_what_is_wrong_with_the_disk_and_is_200_all_the_same() {
        let server = Server::start().await;
        let (_, answer) = server.ask("GET /readyz HTTP/1.1", "").await;
        assert!(answer.ends_with("\r\n\r\nready\n"), "{answer}");
        *server.fake.trouble.lock() = Some("the cache disk hangs".to_owned());
        let (status, answer) = server.ask("GET /readyz HTTP/1.1", "").await;
        assert_eq!(status, "200");
        assert!(
            answer.ends_with("\r\n\r\nready\ndegraded: the cache disk hangs\n"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn metrics_are_prometheus_text() {
        let (status, answer) = Server::start().await.ask("GET /metrics HTTP/1.1", "").await;
        assert_eq!(status, "200");
        assert!(
            answer.contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{answer}"
        );
        assert!(answer.ends_with("\npinrange_up 1\n# EOF\n"), "{answer}");
    }

    #[tokio::test]
    async fn scrapers_get_the_format_that_they_prefer() {
        let server = Server::start().await;
        for (accept, open) in [
            ("*/*", true),
            ("", true),
            ("application/json", true),
            // Prometheus.
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                 application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                true,
            ),
            ("application/openmetrics-text, text/plain", true),
            // Its agents and others, some of them configured to it.
            ("text/plain;version=0.0.4;q=1,*/*;q=0.1", false),
            ("text/plain", false),
            ("Text/Plain; charset=utf-8", false),
            ("application/openmetrics-text;q=0.2, text/*;q=0.5", false),
            ("application/openmetrics-text;q=0, */*", false),
            ("text/plain;q=2x, application/*;q=0.1", true),
        ] {
            let head = format!("GET /metrics HTTP/1.1\r\nAccept: {accept}");
            let (status, answer) = server.ask(&head, "").await;
            assert_eq!(status, "200");
            let kind = if open {
                "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"
            } else {
                "content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
            };
            assert!(answer.contains(kind), "{accept}: {answer}");
            assert_eq!(
                answer.ends_with("\npinrange_up 1\n# EOF\n"),
                open,
                "{accept}: {answer}"
            );
            assert_eq!(
                answer.ends_with("\npinrange_up 1\n"),
                !open,
                "{accept}: {answer}"
            );
        }
    }

    #[tokio::test]
    async fn purge_answers_with_what_was_removed() {
        let server = Server::start().await;
        let (status, answer) = server.purge(r#"{"path": "/mount/a*"}"#).await;
        assert_eq!(status, "200");
        assert!(
            answer.ends_with("{\"bytes\":512,\"revisions\":2}\n"),
            "{answer}"
        );
        assert_eq!(*server.fake.purged.lock(), ["/mount/a*"]);
    }

    #[tokio::test]
    async fn purge_says_what_is_wrong_with_a_request() {
        let server = Server::start().await;
        let long = format!(r#"{{"path": "{}"}}"#, "x".repeat(MAX_PURGE_BODY));
        for (body, status, says) in [
            (
                r#"{"path": "/nowhere/key"}"#,
                "404",
                "nothing is mounted at /nowhere/key",
            ),
            (r#"{"path": "/mount/%zz"}"#, "400", "bad percent-encoding"),
            (r#"{"path": "/mount/broken"}"#, "500", "unlink: EIO"),
            (
                r#"{"path": "/mount/a", "recursive": true}"#,
                "400",
                "unknown field `recursive`",
            ),
            ("/mount/a", "400", "expected {\\\"path\\\""),
            ("", "400", "expected"),
            (&long, "413", "more than 16384 bytes"),
        ] {
            let (got, answer) = server.purge(body).await;
            assert_eq!(got, status, "{answer}");
            assert!(
                answer.contains("content-type: application/json"),
                "{answer}"
            );
            assert!(answer.contains(says), "{answer}");
        }
    }

    #[tokio::test]
    async fn a_web_page_cannot_purge() {
        let server = Server::start().await;
        let head = "POST /purge HTTP/1.1\r\nOrigin: http://evil.example";
        assert_eq!(server.ask(head, r#"{"path": "/mount/*"}"#).await.0, "403");
        assert!(server.fake.purged.lock().is_empty());
    }

    #[tokio::test]
    async fn scrub_answers_with_what_was_found_and_one_is_enough() {
        let server = Server::start().await;
        let (status, answer) = server.ask("POST /scrub HTTP/1.1", "").await;
        assert_eq!(status, "200");
        assert!(
            answer.contains("\"segments\":3") && answer.contains("\"corrupt_blocks\":1"),
            "{answer}"
        );
        *server.fake.scrubbing.lock() = true;
        assert_eq!(server.ask("POST /scrub HTTP/1.1", "").await.0, "409");
        let head = "POST /scrub HTTP/1.1\r\nOrigin: http://evil.example";
        assert_eq!(server.ask(head, "").await.0, "403");
        assert_eq!(server.ask("GET /scrub HTTP/1.1", "").await.0, "405");
    }

    #[tokio::test]
    async fn other_methods_and_pages_are_refused() {
        let server = Server::start().await;
        let (status, answer) = server.ask("DELETE /metrics HTTP/1.1", "").await;
        assert_eq!(status, "405");
        assert!(answer.contains("allow: GET, HEAD\r\n"), "{answer}");
        let (status, answer) = server.ask("GET /purge HTTP/1.1", "").await;
        assert_eq!(status, "405");
        assert!(answer.contains("allow: POST\r\n"), "{answer}");
        assert_eq!(server.ask("GET /metricz HTTP/1.1", "").await.0, "404");
        let (status, answer) = server.ask("HEAD /healthz HTTP/1.1", "").await;
        assert_eq!(status, "200");
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    }
}
