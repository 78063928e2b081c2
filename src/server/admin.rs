//! The admin listener: health, metrics and purge.
//!
//! | | |
//! |---|---|
//! | `GET /healthz` | the process is alive |
//! | `GET /readyz` | requests are served: 503 while starting or draining |
//! | `GET /metrics` | `OpenMetrics`, as Prometheus reads it |
//! | `POST /purge` | `{"path": "/mount/key"}`, or a prefix that ends in `*`: forgets every held revision |
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

use http::header::ORIGIN;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;

use super::accept::{ConnInfo, Handler, Limits};
use super::body::ResponseBody;
use super::io::Timeouts;
use super::respond::{self, AdminStatus as Status};
use crate::disk::Purged;
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

    /// All metrics, as [`Metrics::encode`] writes them.
    fn metrics(&self) -> String;

    /// Forgets every held revision of the key at `path`, or of every key below it if it ends in
    /// `*`. The path is as a client writes it: percent-encoded, with the mount.
    fn purge(&self, path: String) -> impl Future<Output = Result<Purged, PurgeRefused>> + Send;
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
                Readiness::Ready => respond::admin(Status::Ok, TEXT, "ready\n"),
                Readiness::Starting => respond::admin(Status::Unready, TEXT, "starting\n"),
                Readiness::Draining => respond::admin(Status::Unready, TEXT, "draining\n"),
            },
            "/metrics" if get => {
                respond::admin(Status::Ok, Metrics::CONTENT_TYPE, control.metrics())
            }
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
            _ => refuse(
                Status::NotFound,
                "no such page; there are /healthz, /readyz, /metrics and /purge",
            ),
        }
    }
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
        purged: Mutex<Vec<String>>,
    }

    impl Control for Arc<Fake> {
        fn readiness(&self) -> Readiness {
            *self.readiness.lock()
        }

        fn metrics(&self) -> String {
            "pinrange_up 1\n".to_owned()
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
                purged: Mutex::default(),
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
    async fn metrics_are_prometheus_text() {
        let (status, answer) = Server::start().await.ask("GET /metrics HTTP/1.1", "").await;
        assert_eq!(status, "200");
        assert!(
            answer.contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{answer}"
        );
        assert!(answer.ends_with("\r\n\r\npinrange_up 1\n"), "{answer}");
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
