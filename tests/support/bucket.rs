//! A bucket of some S3 server, as the conformance suite wants it.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::{ByteStream, DateTime, DateTimeFormat};
use aws_smithy_http_client::tls;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use pinrange::remote::Remote;
use pinrange::remote::conformance::Fixture;
use pinrange::remote::s3::{CredentialSource, S3Remote, S3Settings};

/// Where a server is and how to sign for it.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) endpoint: String,
    pub(crate) region: String,
    pub(crate) bucket: String,
    pub(crate) key_id: String,
    pub(crate) secret: String,
}

impl Access {
    /// The settings that reach this bucket; timeouts are the defaults.
    pub(crate) fn settings(&self) -> S3Settings {
        S3Settings {
            endpoint: Some(self.endpoint.clone()),
            region: Some(self.region.clone()),
            path_style: true,
            credentials: CredentialSource::Fixed {
                access_key_id: self.key_id.clone(),
                secret_access_key: self.secret.clone(),
            },
            ..S3Settings::new(&self.bucket)
        }
    }

    /// A plain SDK client: what writes objects, since the remote only reads.
    pub(crate) fn client(&self) -> Client {
        let ring = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(ring)
            .build_https();
        let (id, secret) = (&self.key_id, &self.secret);
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&self.endpoint)
            .region(Region::new(self.region.clone()))
            .credentials_provider(Credentials::new(id, secret, None, None, "test"))
            .force_path_style(true)
            .http_client(http);
        Client::from_conf(config.build())
    }
}

/// A bucket under test: written by the plain SDK, read by [`S3Remote`].
pub(crate) struct Bucket {
    pub(crate) remote: S3Remote,
    pub(crate) client: Client,
    name: String,
    versioned: bool,
}

impl Bucket {
    pub(crate) async fn open(access: &Access, versioned: bool) -> Self {
        Self {
            remote: S3Remote::connect(access.settings())
                .await
                .expect("the settings are sound"),
            client: access.client(),
            name: access.bucket.clone(),
            versioned,
        }
    }
}

impl Fixture for Bucket {
    fn remote(&self) -> &dyn Remote {
        &self.remote
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        bytes: Bytes,
        headers: &'a [(&'a str, &'a str)],
    ) -> BoxFuture<'a, ()> {
        async move {
            let body = ByteStream::from(bytes);
            let mut put = self
                .client
                .put_object()
                .bucket(&self.name)
                .key(key)
                .body(body);
            for &(name, value) in headers {
                put = match name {
                    "cache-control" => put.cache_control(value),
                    "content-disposition" => put.content_disposition(value),
                    "content-encoding" => put.content_encoding(value),
                    "content-language" => put.content_language(value),
                    "content-type" => put.content_type(value),
                    "expires" => put.expires(
                        DateTime::from_str(value, DateTimeFormat::HttpDate).expect("an HTTP date"),
                    ),
                    _ => {
                        let name = name.strip_prefix("x-amz-meta-").expect("a field of S3's");
                        put.metadata(name, value)
                    }
                };
            }
            put.send()
                .await
                .unwrap_or_else(|error| panic!("PUT {key:?}: {error:?}"));
        }
        .boxed()
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, ()> {
        async move {
            let delete = self
                .client
                .delete_object()
                .bucket(&self.name)
                .key(key)
                .send();
            delete
                .await
                .unwrap_or_else(|error| panic!("DELETE {key:?}: {error:?}"));
        }
        .boxed()
    }

    fn versioned(&self) -> bool {
        self.versioned
    }
}
