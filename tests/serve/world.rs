//! A strict S3, a replica in front of it, and a client that believes nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pinrange::config::{Config, MountConfig};
use pinrange::disk::MinFree;
use pinrange::mount::ForbiddenAs;
use pinrange::remote::s3::CredentialSource;
use pinrange::server::replica::Replica;
use pinrange::strict_s3::{Options, PutOptions, StrictS3};
use tempfile::TempDir;

pub(crate) const BLOCK: u64 = 256 * 1024;
pub(crate) const PART: u64 = 2 * 1024 * 1024;

/// What a test sets before the replica starts.
pub(crate) struct Setup {
    pub(crate) versioned: bool,
    pub(crate) fresh_for: Duration,
    pub(crate) capacity: u64,
    pub(crate) min_free: MinFree,
    pub(crate) retries: u32,
    /// Whether the bucket is mounted again at `/m/nested`, with the prefix `nested/`.
    pub(crate) nested: bool,
    /// Off, so that requests to S3 can be counted: an audit comes when it comes.
    pub(crate) verify: bool,
    pub(crate) forbidden: ForbiddenAs,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            versioned: false,
            fresh_for: Duration::from_secs(2),
            capacity: 4 << 30,
            min_free: MinFree::Bytes(0),
            retries: 1,
            nested: false,
            verify: false,
            forbidden: ForbiddenAs::BadGateway,
        }
    }
}

pub(crate) struct World {
    pub(crate) s3: Arc<StrictS3>,
    pub(crate) replica: Replica,
    pub(crate) config: Config,
    client: Client<HttpConnector, Empty<Bytes>>,
    _dir: Arc<TempDir>,
}

/// An answer; `body` is what arrived, `cut` whether the connection ended before the body did.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) cut: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

fn credentials() -> CredentialSource {
    CredentialSource::Fixed {
        access_key_id: "test".to_owned(),
        secret_access_key: "test".to_owned(),
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Setup::default()).await
    }

    pub(crate) async fn with(setup: Setup) -> Self {
        let options = if setup.versioned {
            Options::versioned(["bucket"])
        } else {
            Options::memory(["bucket"])
        };
        let s3 = Arc::new(StrictS3::start(options).await.unwrap());
        let dir = Arc::new(TempDir::new().unwrap());
        let mut mount = MountConfig::new("/m", "bucket");
        mount.endpoint = Some(s3.endpoint());
        mount.region = Some("us-east-1".to_owned());
        mount.path_style = true;
        mount.fresh_for = setup.fresh_for;
        mount.retries = setup.retries;
        mount.verify = setup.verify;
        mount.forbidden = setup.forbidden;
        let mut mounts = vec![mount];
        if setup.nested {
            let nested = MountConfig {
                path: "/m/nested".to_owned(),
                prefix: "nested/".to_owned(),
                ..mounts[0].clone()
            };
            mounts.push(nested);
        }
        let mut config = Config::with_mounts(mounts);
        config.server.listen = "127.0.0.1:0".parse().unwrap();
        config.server.admin = "127.0.0.1:0".parse().unwrap();
        config.server.drain_timeout = Duration::from_secs(5);
        config.server.drain_grace = Duration::ZERO;
        config.cache.dir = dir.path().join("cache");
        config.cache.capacity = setup.capacity;
        config.cache.min_free = setup.min_free;
        config.cache.block_size = BLOCK;
        config.cache.part_size = PART;
        let replica = Replica::start(&config, &credentials()).await.unwrap();
        s3.clear_log();
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self {
            s3,
            replica,
            config,
            client,
            _dir: dir,
        }
    }

    /// Stops the replica in order and starts another over the same directory.
    pub(crate) async fn restart(self) -> Self {
        self.replica.drain(false).await;
        let replica = Replica::start(&self.config, &credentials()).await.unwrap();
        self.s3.clear_log();
        Self { replica, ..self }
    }

    /// Puts an object; its `ETag`, quotes included.
    pub(crate) fn put(&self, key: &str, bytes: &Bytes) -> String {
        self.s3
            .put("bucket", key, bytes.clone(), PutOptions::default())
            .unwrap()
            .etag
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.replica.data)
    }

    pub(crate) async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::new()).unwrap();
        let response = self.client.request(request).await.unwrap();
        let (head, mut incoming) = response.into_parts();
        let mut body = Vec::new();
        let mut cut = false;
        while let Some(frame) = incoming.frame().await {
            let Ok(frame) = frame else {
                cut = true;
                break;
            };
            body.extend_from_slice(frame.data_ref().unwrap());
        }
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            cut,
        }
    }

    pub(crate) async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask(Method::GET, path, headers).await
    }

    /// The head of a GET whose body is not read yet.
    pub(crate) async fn begin(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> (StatusCode, hyper::body::Incoming) {
        let mut request = Request::builder().uri(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self
            .client
            .request(request.body(Empty::new()).unwrap())
            .await
            .unwrap();
        (response.status(), response.into_body())
    }

    pub(crate) async fn purge(&self, path: &str) -> u16 {
        let body = http_body_util::Full::new(Bytes::from(format!("{{\"path\":\"{path}\"}}")));
        let client: Client<HttpConnector, http_body_util::Full<Bytes>> =
            Client::builder(TokioExecutor::new()).build_http();
        let uri = format!("http://{}/purge", self.replica.admin);
        let request = Request::post(uri).body(body).unwrap();
        client.request(request).await.unwrap().status().as_u16()
    }

    pub(crate) async fn metrics(&self) -> String {
        let uri = format!("http://{}/metrics", self.replica.admin)
            .parse()
            .unwrap();
        let body = self.client.get(uri).await.unwrap().into_body();
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }
}

/// Bytes of which no two stretches are alike, different for each seed.
pub(crate) fn bytes(seed: u64, len: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(usize::try_from(len).unwrap() + 8);
    while (out.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(usize::try_from(len).unwrap());
    out.into()
}

pub(crate) fn slice(bytes: &Bytes, start: u64, end: u64) -> &[u8] {
    &bytes[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]
}
