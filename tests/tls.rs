//! S3 over TLS, as the program reads it: the SDK above, the transport of our own below, and between them and the
//! server a certificate of a private CA that `SSL_CERT_FILE` names.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinrange::strict_s3::{Effect, Fault, Options, PutOptions, StrictS3};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_util::task::AbortOnDropHandle;

use support::http::{self, Answer, Random};
use support::process::{Serving, serve};

const MIB: usize = 1 << 20;
const PART: usize = MIB;

/// TLS in front of a plain S3.
struct Tls {
    address: SocketAddr,
    /// Connections whose handshake succeeded.
    connections: Arc<AtomicUsize>,
    ca: PathBuf,
    _task: AbortOnDropHandle<()>,
}

impl Tls {
    /// The certificate of its CA is put into `dir`.
    async fn start(s3: &StrictS3, dir: &Path) -> Self {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, ca_pem).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["127.0.0.1".to_owned()])
            .and_then(|server| server.signed_by(&key, &Issuer::new(ca, &ca_key)))
            .unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, behind) = (Arc::clone(&connections), s3.address());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, count) = (acceptor.clone(), Arc::clone(&count));
                tokio::spawn(async move {
                    // Who does not trust it leaves.
                    let Ok(mut near) = acceptor.accept(stream).await else {
                        return;
                    };
                    count.fetch_add(1, Ordering::SeqCst);
                    let mut far = TcpStream::connect(behind).await.unwrap();
                    // A reset of the one ends the other without TLS's own farewell.
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self {
            address,
            connections,
            ca: ca_file,
            _task: AbortOnDropHandle::new(task),
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// A replica in front of it that trusts what is in `ca`.
    async fn replica(&self, ca: &Path, dir: &Path) -> Serving {
        let mut command = serve(&format!("https://{}", self.address), dir);
        command
            .env("SSL_CERT_FILE", ca)
            .env_remove("SSL_CERT_DIR")
            .env("PINRANGE_CACHE__PART_SIZE", PART.to_string());
        blocking(move || Serving::start(&mut command)).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn get(data: SocketAddr, path: &'static str, fields: String) -> Answer {
    blocking(move || http::get(data, path, &fields)).await
}

async fn s3() -> StrictS3 {
    StrictS3::start(Options::memory(["bucket"])).await.unwrap()
}

/// Puts an object of random bytes; gives them and its `ETag`.
fn put(s3: &StrictS3, key: &str, size: usize) -> (Arc<[u8]>, String) {
    let mut random = Random(size as u64);
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.next().to_le_bytes())
        .take(size.div_ceil(8))
        .flatten()
        .take(size)
        .collect();
    let stored = s3.put("bucket", key, bytes.clone(), PutOptions::default());
    (bytes.into(), stored.unwrap().etag)
}

fn range(start: usize, end: usize, etag: &str) -> String {
    let last = end - 1;
    format!("Range: bytes={start}-{last}\r\nIf-Match: {etag}\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_right_and_connections_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let s3 = s3().await;
    let tls = Tls::start(&s3, dir.path()).await;
    let (whole, _) = put(&s3, "whole", 10 * PART + 12_345);
    let (wide, etag) = put(&s3, "wide", 8 * PART + 1);
    let serving = tls.replica(&tls.ca, dir.path()).await;
    let data = serving.data;
    let unguarded = s3.stats().unguarded_gets;

    let answer = get(data, "/m/whole", String::new()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.body == *whole);

    let mut clients = tokio::task::JoinSet::new();
    for seed in 0..24 {
        let mut random = Random(seed);
        let start = random.below(wide.len() - 1);
        let end = start + 1 + random.below(wide.len() - start - 1);
        let (wide, fields) = (Arc::clone(&wide), range(start, end, &etag));
        clients.spawn(async move {
            let answer = get(data, "/m/wide", fields).await;
            assert_eq!(answer.status, 206, "{start}..{end}");
            assert!(answer.body == wide[start..end], "{start}..{end}");
        });
    }
    clients.join_all().await;

    // One after the other, each a GET of its own: those from before serve for all, as long as the machine is not so
    // slow that they are closed as idle.
    let (many, etag) = put(&s3, "many", 20 * PART);
    let (connections, requests) = (tls.connections(), s3.stats().requests);
    for start in (0..many.len()).step_by(PART) {
        let answer = get(data, "/m/many", range(start, start + PART, &etag)).await;
        assert!(answer.body == many[start..start + PART], "{start}");
    }
    assert_eq!(s3.stats().requests, requests + 20);
    let made = tls.connections() - connections;
    assert!(made <= 5, "{made} connections for 20 requests");
    let unguarded = s3.stats().unguarded_gets - unguarded;
    assert_eq!(unguarded, 1, "for the whole, unpinned");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_cut_is_resumed_with_or_without_a_farewell() {
    let dir = tempfile::tempdir().unwrap();
    let s3 = s3().await;
    let tls = Tls::start(&s3, dir.path()).await;
    let (bytes, etag) = put(&s3, "cut", 2 * PART);
    let serving = tls.replica(&tls.ca, dir.path()).await;
    let cuts = [
        Effect::ResetAfter { bytes: 300_001 },
        Effect::CloseAfter { bytes: 300_001 },
    ];
    let unguarded = s3.stats().unguarded_gets;
    for (number, cut) in cuts.into_iter().enumerate() {
        let (start, requests) = (number * PART, s3.stats().requests);
        s3.script(Fault::new(cut.clone()));
        let fields = range(start, start + PART, &etag);
        let answer = get(serving.data, "/m/cut", fields).await;
        assert_eq!(answer.status, 206, "{cut:?}");
        assert!(answer.body == bytes[start..start + PART], "{cut:?}");
        assert_eq!(s3.stats().requests, requests + 2, "{cut:?}");
    }
    assert_eq!(s3.stats().unguarded_gets, unguarded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_refused_and_the_log_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let s3 = s3().await;
    let tls = Tls::start(&s3, dir.path()).await;
    let stranger = Tls::start(&s3, other.path()).await;
    let (_, etag) = put(&s3, "key", 1000);
    let serving = tls.replica(&stranger.ca, dir.path()).await;
    let answer = get(serving.data, "/m/key", range(0, 1000, &etag)).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    let why = "the server's certificate is not trusted";
    serving.process.wait_for(why);
    assert_eq!(tls.connections(), 0);
    assert_eq!(s3.stats().requests, 0);
}
