//! Paths and the keys they name, URLs, configuration.

use std::fs;
use std::path::{Component, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use pinrange::config::{Config, Flags};
use pinrange::mount::{ForbiddenAs, Mount, Mounts};
use pinrange::remote::memory::MemoryRemote;
use pinrange::seldom::Outage;

/// The client's, compiled a second time: they are nobody else's business.
#[path = "../../src/cli/get"]
mod get {
    #[allow(dead_code, reason = "of downloads, which are not made here")]
    mod error;
    mod url;

    use http::Uri;

    pub(super) fn parse(text: &str) -> Option<(Uri, bool)> {
        let parsed = url::parse(text).ok()?;
        Some((parsed.uri, parsed.basic.is_some()))
    }

    pub(super) fn redirect(base: &Uri, location: &str) -> Option<Uri> {
        let target = url::resolve(base, location).ok()?;
        // Reflexive, and symmetric but for the move to TLS.
        assert!(url::same_origin(base, base));
        if url::same_origin(base, &target) && base.scheme() == target.scheme() {
            assert!(url::same_origin(&target, base));
        }
        let _ = url::identity(&target);
        Some(target)
    }

    pub(super) fn redact(text: &str) -> String {
        url::redact(text)
    }

    pub(super) fn file_name(uri: &Uri) -> Option<std::path::PathBuf> {
        url::file_name(uri).ok()
    }

    pub(super) fn login(login: &[u8], password: &[u8]) {
        assert!(url::basic(login, password).is_sensitive());
    }
}

pub(crate) fn run(mut data: &[u8]) {
    let kind = crate::byte(&mut data) % 4;
    if kind == 3 {
        return config(data);
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match kind {
        0 => path(text),
        1 => round_trip(text),
        _ => url(text),
    }
}

const PATHS: [&str; 3] = ["/", "/m", "/m/deep er"];
const PREFIX: &str = "inside/";

static MOUNTS: LazyLock<Mounts> = LazyLock::new(|| {
    let remote = Arc::new(MemoryRemote::new());
    let mounts = PATHS.map(|path| Mount {
        path: path.to_owned(),
        prefix: PREFIX.to_owned(),
        remote: remote.clone(),
        fresh_for: Duration::ZERO,
        stale_if_error: Duration::ZERO,
        forbidden: ForbiddenAs::default(),
        retries: 0,
        verify: false,
        outage: Outage::default(),
    });
    Mounts::new(mounts.into())
});

/// Whatever is asked for lies within its mount (P12), and is what the path says byte for byte.
fn path(path: &str) {
    let Ok((mount, key)) = MOUNTS.resolve(path) else {
        return;
    };
    let full = mount.key(&key);
    assert_eq!(full.key(), format!("{PREFIX}{key}"));
    assert!(full.key().len() <= 1024, "longer than S3 takes");
    assert!(!key.is_empty());
    assert!(!key.chars().any(char::is_control));
    assert!(
        key.split('/').all(|part| part != "." && part != ".."),
        "{key:?} may lead elsewhere"
    );
    let below = if mount.path == "/" { "" } else { &mount.path };
    assert_eq!(decoded(path), format!("{below}/{key}").as_bytes());
}

/// Percent-decoding, byte by byte.
fn decoded(path: &str) -> Vec<u8> {
    let mut bytes = path.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(if byte == b'%' {
            let mut digit = || {
                let digit = char::from(bytes.next().expect("two digits follow"));
                digit.to_digit(16).expect("hexadecimal") as u8
            };
            digit() << 4 | digit()
        } else {
            byte
        });
    }
    decoded
}

/// A key, encoded as clients do, is found again.
fn round_trip(key: &str) {
    let encoded = utf8_percent_encode(key, NON_ALPHANUMERIC);
    let named = key.chars().any(char::is_control)
        || key.is_empty()
        || key.len() + PREFIX.len() > 1024
        || key.split('/').any(|part| part == "." || part == "..");
    match MOUNTS.resolve(&format!("/m/{encoded}")) {
        // With an encoded slash it is one segment: no deeper mount can take it.
        Ok((mount, found)) => {
            let whole = if mount.path == "/m" {
                found
            } else {
                panic!("{key:?} was found in {}", mount.path)
            };
            assert_eq!(whole, key);
            assert!(!named);
        }
        Err(error) => {
            let other_mount = key == "deep er";
            assert!(named || other_mount, "{key:?}: {error}");
        }
    }
}

fn url(text: &str) {
    let mut lines = text.split('\n');
    let (url, location) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let _ = get::redact(url);
    get::login(url.as_bytes(), location.as_bytes());
    let Some((base, _)) = get::parse(url) else {
        return;
    };
    let shown = base.to_string();
    let authority = base.authority().expect("checked").as_str();
    assert!(!authority.contains('@'), "credentials stay in {shown}");
    let again = get::parse(&shown).expect("our own writing");
    assert_eq!((again.0, again.1), (base.clone(), false));
    if let Some(name) = get::file_name(&base) {
        let parts: Vec<_> = name.components().collect();
        assert!(
            matches!(parts[..], [Component::Normal(_)]),
            "{shown} is saved elsewhere: {name:?}"
        );
        let name = name.to_string_lossy();
        assert!(!name.starts_with(['.', '-']) && !name.contains(char::is_control));
    }
    if let Some(target) = get::redirect(&base, location) {
        assert!(matches!(target.scheme_str(), Some("http" | "https")));
        assert!(!target.authority().expect("checked").as_str().contains('@'));
    }
}

/// Lines of environment after the first empty line; TOML before it. What is accepted is printed, and reads the same.
fn config(data: &[u8]) {
    static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
        // Where a write costs nothing.
        let shm = PathBuf::from("/dev/shm");
        let temporary = if shm.is_dir() {
            shm
        } else {
            std::env::temp_dir()
        };
        let directory = temporary.join(format!("pinrange-fuzz-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory for temporary files");
        directory.join("pinrange.toml")
    });
    let at = data
        .windows(2)
        .position(|pair| pair == b"\n\n")
        .unwrap_or(data.len());
    let (toml, rest) = data.split_at(at);
    let variables: Vec<_> = String::from_utf8_lossy(rest)
        .lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !name.contains('\0'))
        .map(|(name, value)| (format!("PINRANGE_{name}").into(), value.into()))
        .collect();
    let load = |text: &[u8], variables: Vec<_>| {
        fs::write(&*FILE, text).expect("a temporary file");
        Config::load(Some(&FILE), variables, &Flags::default())
    };
    match load(toml, variables) {
        Err(error) => {
            assert!(!error.problems().is_empty());
            assert!(!error.to_string().is_empty());
        }
        Ok(config) => {
            let printed = toml::to_string(&config).expect("what `pinrange check` prints");
            match load(printed.as_bytes(), Vec::new()) {
                Ok(again) => assert_eq!(config, again),
                Err(error) => panic!("our own writing is refused: {error}\n{printed}"),
            }
        }
    }
}
