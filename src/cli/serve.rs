//! `pinrange serve`: one replica, in front of the configured buckets or, with `--dev`, of a directory.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use super::demo::own_credentials;
use super::{EX_CANTCREAT, EX_CONFIG, with_advice};
use crate::config::{Config, MountConfig};
use crate::remote::s3::CredentialSource;
use crate::server::replica::{Replica, run_until_ended};
use crate::server::systemd::Inherited;
use crate::strict_s3::{Options, StrictS3};

/// Bucket name of `--dev`.
const DEV_BUCKET: &str = "dev";

/// Runs a replica until SIGTERM or SIGINT, a second of which ends it at once, or until another process has taken over.
///
/// To be called before there are threads, for the sake of the environment.
pub fn run(config: Config) -> impl Future<Output = ExitCode> {
    let inherited = Inherited::from_environment(config.server.listen, config.server.admin);
    serve(config, inherited)
}

async fn serve(mut config: Config, inherited: Result<Inherited, String>) -> ExitCode {
    let inherited = match inherited {
        Ok(inherited) => inherited,
        Err(problem) => {
            eprintln!("pinrange: {problem}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    let dev = match config.dev.clone() {
        None => None,
        Some(dir) => match start_dev(&mut config, &dir).await {
            Ok(s3) => Some(s3),
            Err(error) => {
                eprintln!(
                    "pinrange: cannot serve the directory {}: {error}",
                    dir.display()
                );
                return ExitCode::from(EX_CANTCREAT);
            }
        },
    };
    let credentials = if dev.is_some() {
        own_credentials()
    } else {
        CredentialSource::Chain
    };
    let replica = match Replica::start_on(&config, &credentials, inherited).await {
        Ok(replica) => replica,
        Err(error) => {
            eprintln!("pinrange: {}", with_advice(&error));
            return ExitCode::from(error.exit_code());
        }
    };
    if let Some(s3) = &dev {
        let endpoint = s3.endpoint();
        // Whoever does not read it does not need it.
        let _ = writeln!(
            io::stderr(),
            "the directory is the bucket {DEV_BUCKET} at {endpoint} (any credentials), to write to:\n  \
             AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x aws --endpoint-url {endpoint} s3 cp FILE s3://{DEV_BUCKET}/FILE"
        );
    }
    let code = run_until_ended(replica).await;
    if let Some(s3) = dev {
        s3.shutdown().await;
    }
    code
}

async fn start_dev(config: &mut Config, dir: &Path) -> io::Result<StrictS3> {
    let s3 = StrictS3::start(Options::directory(DEV_BUCKET, dir)).await?;
    let mut mount = MountConfig::new("/", DEV_BUCKET);
    mount.endpoint = Some(s3.endpoint());
    mount.region = Some("us-east-1".to_owned());
    mount.path_style = true;
    config.mounts = vec![mount];
    Ok(s3)
}
