//! The conformance suite and wrong credentials against a real S3 server.

mod support;

use pinrange::remote::s3::S3Remote;
use pinrange::remote::{Remote as _, RemoteErrorKind, conformance};

use support::bucket::{Access, Bucket};
use support::garage::Garage;

#[tokio::test]
async fn conforms() {
    let Some(garage) = Garage::start().await else {
        return;
    };
    conformance::run(&Bucket::open(&garage.access, false).await).await;
}

#[tokio::test]
async fn tells_what_is_misconfigured() {
    let Some(garage) = Garage::start().await else {
        return;
    };
    let right = &garage.access;
    for (what, access) in [
        (
            "bucket",
            Access {
                bucket: "elsewhere".to_owned(),
                ..right.clone()
            },
        ),
        (
            "secret",
            Access {
                secret: "c".repeat(64),
                ..right.clone()
            },
        ),
        (
            "region",
            Access {
                region: "mars-1".to_owned(),
                ..right.clone()
            },
        ),
        (
            "key id",
            Access {
                key_id: format!("GK{}", "d".repeat(24)),
                ..right.clone()
            },
        ),
    ] {
        let remote = S3Remote::connect(access.settings())
            .await
            .expect("the settings are sound");
        let error = remote
            .read_current("key", None, None)
            .await
            .expect_err(what);
        eprintln!("{what}: {error:?}");
        // Garage has one code for every refusal of a signature: AccessDenied.
        let fits = matches!(
            error.kind,
            RemoteErrorKind::Misconfigured | RemoteErrorKind::Forbidden
        );
        assert!(fits, "wrong {what}: {error:?}");
        assert!(
            !format!("{error:?}").contains(&access.key_id),
            "wrong {what}: {error:?}"
        );
    }
}
