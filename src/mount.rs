//! Mounts: which remote, and which key there, a request path names.
//!
//! A mount is a URL path prefix bound to a remote. The longest match on whole path segments wins. A path is
//! split at its raw slashes first and each segment is percent-decoded by itself, so that `%2F` never
//! moves a mount's boundary (P12); then the rest is the key.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::{PercentDecode, percent_decode_str};
use serde::Serialize;

use crate::causes::one_line;
use crate::object::ObjectKey;
use crate::remote::Remote;
use crate::seldom::{Outage, Over, Reason};

/// S3's limit on a key, in bytes.
const LONGEST_KEY: usize = 1024;

/// What to make of S3's 403 on a read. S3 says so for a *missing* key to whoever may not list the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(clippy::exhaustive_enums, reason = "closed: the two readings of a 403")]
pub enum ForbiddenAs {
    /// Our credentials may not read it: 502, so that nobody takes an outage of access for a deletion.
    #[default]
    #[serde(rename = "502")]
    BadGateway,
    /// The key is missing: 404, for buckets that we may read but not list.
    #[serde(rename = "404")]
    NotFound,
}

/// A URL path prefix bound to a remote.
pub struct Mount {
    /// `/` or `/segment[/segment…]`, as configured.
    pub path: String,
    /// Prepended to every key.
    pub prefix: String,
    /// Where the objects are.
    pub remote: Arc<dyn Remote>,
    /// How far an unpinned answer may be behind the remote (P6).
    pub fresh_for: Duration,
    /// How long what is held may answer unpinned requests while the remote cannot be reached (P6).
    pub stale_if_error: Duration,
    /// What to make of a 403.
    pub forbidden: ForbiddenAs,
    /// Attempts after the first, for errors that a retry may mend.
    pub retries: u32,
    /// Whether revisions that are wholly held are compared with the checksum that the remote has of the object.
    pub verify: bool,
    /// Whether the remote is in trouble, for the log.
    pub outage: Outage,
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mount")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Mount {
    /// Logs that the remote could not answer a request, and why; `status`: what the client was told, `None` where what is
    /// held was enough for it. Seldom, however many requests there are: see [`seldom`](crate::seldom).
    pub fn log_failure(&self, reason: Reason, error: &dyn Error, status: Option<u16>) {
        let mount = self.path.as_str();
        match self.outage.failed(reason) {
            Some(requests) => {
                let error = one_line(error);
                tracing::warn!(
                    mount,
                    error,
                    status,
                    requests,
                    "the remote could not answer"
                );
            }
            None => {
                tracing::debug!(
                    mount,
                    error = one_line(error),
                    status,
                    "the remote could not answer"
                );
            }
        }
    }

    /// The remote answered a request: logs that an outage is over, if it is.
    pub fn log_answer(&self) {
        while let Some(Over { failed, lasted }) = self.outage.answered() {
            let lasted_s = lasted.as_secs();
            let mount = self.path.as_str();
            tracing::info!(mount, failed, lasted_s, "the remote answers again");
        }
    }

    /// The object that `rest` (decoded) names below this mount.
    pub fn key(&self, rest: &str) -> ObjectKey {
        let store = Arc::clone(self.remote.store());
        if self.prefix.is_empty() {
            ObjectKey::new(store, rest)
        } else {
            ObjectKey::new(store, [self.prefix.as_str(), rest].concat())
        }
    }
}

/// Why a path names no object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(clippy::exhaustive_enums, reason = "closed: each has one answer")]
pub enum PathError {
    /// No mount matches, or nothing stands behind the mount's path.
    #[error("no mount serves this path")]
    Unknown,
    /// Does not begin with a slash.
    #[error("the path does not begin with a slash")]
    Relative,
    /// Not UTF-8 once decoded, or with a control character.
    #[error("the path is not percent-encoded UTF-8 without control characters")]
    Malformed,
    /// A `.` or `..` segment: some server on the way may resolve it, and name a key outside the mount.
    #[error("the path has a \".\" or \"..\" segment")]
    DotSegment,
    /// White space and nothing else: the AWS SDK takes such a key for none, so S3 cannot be asked for it.
    #[error("a key of nothing but white space cannot be asked for")]
    Blank,
    /// Longer than S3 allows.
    #[error("the key is longer than {LONGEST_KEY} bytes")]
    TooLong,
}

/// A mount, and a decoded key or what keys begin with, without the mount's prefix.
pub type Named<'mounts, 'path> = (&'mounts Arc<Mount>, Cow<'path, str>);

/// The mounts of a replica.
#[derive(Debug)]
pub struct Mounts {
    /// In the order of their segments, so that a look-up takes a few steps however many there are.
    mounts: Vec<(Vec<String>, Arc<Mount>)>,
}

impl Mounts {
    /// A table of `mounts`, whose paths must differ.
    pub fn new(mounts: Vec<Mount>) -> Self {
        let mut mounts: Vec<_> = mounts
            .into_iter()
            .map(|mount| {
                (
                    segments(&mount.path).map(str::to_owned).collect::<Vec<_>>(),
                    Arc::new(mount),
                )
            })
            .collect();
        mounts.sort_by(|(one, _), (other, _)| one.cmp(other));
        Self { mounts }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Mount>> {
        self.mounts.iter().map(|(_, mount)| mount)
    }

    /// The mount and the decoded key (without the mount's prefix) that the path of a request target names.
    pub fn resolve<'a>(&self, path: &'a str) -> Result<Named<'_, 'a>, PathError> {
        let (mount, key) = self.resolve_prefix(path)?;
        if key.is_empty() {
            Err(PathError::Unknown)
        } else if key.trim_start().is_empty() && mount.prefix.trim_start().is_empty() {
            Err(PathError::Blank)
        } else {
            Ok((mount, key))
        }
    }

    /// Every mount of which the keys' paths begin with `path`, and what those keys begin with: the mount that `path` leads
    /// into, and those that are mounted below it.
    pub fn resolve_all<'a>(&self, path: &'a str) -> Result<Vec<Named<'_, 'a>>, PathError> {
        let mut all = match self.resolve_prefix(path) {
            Ok(one) => vec![one],
            Err(PathError::Unknown) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut asked: Vec<_> = path.split('/').skip(1).map(percent_decode_str).collect();
        let begun = Cow::from(asked.pop().ok_or(PathError::Relative)?);
        let is_below = |mounted: &[String]| {
            let same =
                |(here, there): (&String, &PercentDecode<'_>)| here.bytes().eq(there.clone());
            mounted.len() > asked.len()
                && mounted[asked.len()].as_bytes().starts_with(&begun)
                && mounted.iter().zip(&asked).all(same)
        };
        let below = self.mounts.iter().filter(|(mounted, _)| is_below(mounted));
        all.extend(below.map(|(_, mount)| (mount, Cow::Borrowed(""))));
        if all.is_empty() {
            return Err(PathError::Unknown);
        }
        Ok(all)
    }

    /// As [`Mounts::resolve`], but a path that ends at the mount names every key of it.
    fn resolve_prefix<'a>(&self, path: &'a str) -> Result<(&Arc<Mount>, Cow<'a, str>), PathError> {
        let path = path.strip_prefix('/').ok_or(PathError::Relative)?;
        let decoded = decode(path)?;
        if decoded.chars().any(char::is_control) {
            return Err(PathError::Malformed);
        }
        // Decoded slashes count here too: what S3 is sent has no trace of how it was written.
        if decoded.split('/').any(|part| part == "." || part == "..") {
            return Err(PathError::DotSegment);
        }
        let (mount, rest) = self.find(path).ok_or(PathError::Unknown)?;
        let key = match decoded {
            Cow::Borrowed(_) => Cow::Borrowed(rest),
            Cow::Owned(_) => decode(rest)?,
        };
        if mount.prefix.len() + key.len() > LONGEST_KEY {
            return Err(PathError::TooLong);
        }
        Ok((mount, key))
    }

    /// The mount whose path is the longest that `path` begins with, and what follows that and a slash. Neither is decoded,
    /// nor begins with a slash.
    fn find<'a>(&self, path: &'a str) -> Option<(&Arc<Mount>, &'a str)> {
        let (mut among, mut rest, mut found) = (&self.mounts[..], path, None);
        for depth in 0.. {
            // One that ends here stands before those that go on.
            let (segments, mount) = among.first()?;
            if segments.len() == depth {
                found = Some((mount, rest));
            }
            let Some((there, behind)) = rest.split_once('/') else {
                break;
            };
            let there = percent_decode_str(there);
            let first = among.partition_point(|(segments, _)| {
                let here = segments.get(depth);
                here.is_none_or(|here| here.bytes().lt(there.clone()))
            });
            among = &among[first..];
            let end =
                among.partition_point(|(segments, _)| segments[depth].bytes().eq(there.clone()));
            among = &among[..end];
            if among.is_empty() {
                break;
            }
            rest = behind;
        }
        found
    }
}

fn decode(text: &str) -> Result<Cow<'_, str>, PathError> {
    if !is_percent_encoded(text) {
        return Err(PathError::Malformed);
    }
    percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| PathError::Malformed)
}

/// Whether every `%` begins an escape.
fn is_percent_encoded(text: &str) -> bool {
    text.split('%').skip(1).all(|escaped| {
        escaped.len() >= 2
            && escaped
                .bytes()
                .take(2)
                .all(|digit| digit.is_ascii_hexdigit())
    })
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::remote::memory::MemoryRemote;

    fn mounts(paths: &[&str]) -> Mounts {
        Mounts::new(
            paths
                .iter()
                .map(|path| Mount {
                    path: (*path).to_owned(),
                    prefix: "p/".to_owned(),
                    remote: Arc::new(MemoryRemote::new()),
                    fresh_for: Duration::from_secs(2),
                    stale_if_error: Duration::from_mins(5),
                    forbidden: ForbiddenAs::BadGateway,
                    retries: 0,
                    verify: false,
                    outage: Outage::default(),
                })
                .collect(),
        )
    }

    fn resolve(mounts: &Mounts, path: &str) -> Result<(String, String), PathError> {
        mounts
            .resolve(path)
            .map(|(mount, key)| (mount.path.clone(), key.into_owned()))
    }

    #[test]
    fn the_longest_match_on_whole_segments_wins() {
        let mounts = mounts(&["/a", "/a/b", "/"]);
        let ok = |mount: &str, key: &str| Ok((mount.to_owned(), key.to_owned()));
        assert_eq!(resolve(&mounts, "/a/b/c"), ok("/a/b", "c"));
        assert_eq!(resolve(&mounts, "/a/bc"), ok("/a", "bc"));
        assert_eq!(resolve(&mounts, "/ab/c"), ok("/", "ab/c"));
        assert_eq!(resolve(&mounts, "/a/x%20y"), ok("/a", "x y"));
        assert_eq!(
            resolve(&mounts, "/%61/x"),
            ok("/a", "x"),
            "an equivalent spelling"
        );
        assert_eq!(
            resolve(&mounts, "/%61/b/x%2Fy%20z"),
            ok("/a/b", "x/y z"),
            "mount and key"
        );
        assert_eq!(
            resolve(&mounts, "/a%2Fb/x"),
            ok("/", "a/b/x"),
            "%2F moves no boundary"
        );
        assert_eq!(
            resolve(&mounts, "/a//x/"),
            ok("/a", "/x/"),
            "empty segments are part of the key"
        );
    }

    #[test]
    fn a_prefix_names_the_mounts_below_it_too() {
        let mounts = mounts(&["/a", "/a/x", "/a/xy/z", "/b"]);
        let all = |path: &str| {
            let mut all: Vec<_> = mounts
                .resolve_all(path)?
                .into_iter()
                .map(|(mount, key)| (mount.path.clone(), key.into_owned()))
                .collect();
            all.sort();
            Ok(all)
        };
        let ok = |all: &[(&str, &str)]| {
            Ok(all
                .iter()
                .map(|(mount, key)| ((*mount).to_owned(), (*key).to_owned()))
                .collect())
        };
        assert_eq!(all("/a/"), ok(&[("/a", ""), ("/a/x", ""), ("/a/xy/z", "")]));
        assert_eq!(
            all("/a/x"),
            ok(&[("/a", "x"), ("/a/x", ""), ("/a/xy/z", "")])
        );
        assert_eq!(all("/a/xy"), ok(&[("/a", "xy"), ("/a/xy/z", "")]));
        assert_eq!(all("/%61/x/"), ok(&[("/a/x", "")]));
        assert_eq!(all("/a/xy/"), ok(&[("/a", "xy/"), ("/a/xy/z", "")]));
        assert_eq!(
            all("/a%2fx"),
            Err(PathError::Unknown),
            "%2F moves no boundary"
        );
        assert_eq!(all("/a/xyz/"), ok(&[("/a", "xyz/")]));
        assert_eq!(
            all("/b"),
            ok(&[("/b", "")]),
            "nothing is mounted at the root"
        );
        assert_eq!(all("/c"), Err(PathError::Unknown));
        assert_eq!(all("/a/../"), Err(PathError::DotSegment));
        assert_eq!(all(""), Err(PathError::Relative));
    }

    #[test]
    fn a_key_of_white_space_names_nothing() {
        let mut blank = mounts(&["/a"]);
        for path in ["/a/%20", "/a/%C2%A0%20", "/a/%E2%80%A8"] {
            assert!(
                resolve(&blank, path).is_ok(),
                "the prefix is a part of the key"
            );
        }
        Arc::get_mut(&mut blank.mounts[0].1).unwrap().prefix.clear();
        for path in ["/a/%20", "/a/%C2%A0%20", "/a/%E2%80%A8"] {
            assert_eq!(resolve(&blank, path), Err(PathError::Blank), "{path}");
        }
        assert!(resolve(&blank, "/a/%20x").is_ok());
        assert!(blank.resolve_all("/a/%20").is_ok(), "others begin with it");
    }

    #[test]
    fn nothing_names_a_key_outside_its_mount() {
        let mounts = mounts(&["/a"]);
        for path in [
            "/a/..",
            "/a/../b",
            "/a/%2e%2e/b",
            "/a/x%2f..%2fy",
            "/a/.",
            "/a/%2E/x",
        ] {
            assert_eq!(resolve(&mounts, path), Err(PathError::DotSegment), "{path}");
        }
        assert_eq!(
            resolve(&mounts, "/a%2fb"),
            Err(PathError::Unknown),
            "%2F moves no boundary"
        );
        assert_eq!(resolve(&mounts, "/a/%00"), Err(PathError::Malformed));
        assert_eq!(resolve(&mounts, "/a/%ff"), Err(PathError::Malformed));
        assert_eq!(resolve(&mounts, "/a/x%"), Err(PathError::Malformed));
        assert_eq!(resolve(&mounts, "/a/x%2"), Err(PathError::Malformed));
        assert_eq!(resolve(&mounts, "/a/x%zz"), Err(PathError::Malformed));
        assert_eq!(resolve(&mounts, "/a"), Err(PathError::Unknown));
        assert_eq!(resolve(&mounts, "/a/"), Err(PathError::Unknown));
        assert_eq!(resolve(&mounts, "*"), Err(PathError::Relative));
        assert_eq!(resolve(&mounts, "a/x"), Err(PathError::Relative));
        let long = format!("/a/{}", "k".repeat(1023));
        assert_eq!(
            resolve(&mounts, &long),
            Err(PathError::TooLong),
            "the prefix counts"
        );
    }

    proptest! {
        /// However many mounts there are: the one that a look at all of them finds.
        #[test]
        fn a_look_up_finds_what_a_look_at_all_of_them_finds(
            paths in prop::collection::hash_set(prop::collection::vec("[ab]{1,2}", 0..4), 0..20),
            asked in prop::collection::vec("[ab]{1,2}", 1..6),
        ) {
            let paths: Vec<_> = paths.iter().map(|path| format!("/{}", path.join("/"))).collect();
            let of: Vec<_> = paths.iter().map(String::as_str).collect();
            let asked = format!("/{}", asked.join("/"));
            let leads = |path: &&&str| **path == "/" || asked.starts_with(&format!("{path}/"));
            let longest = of.iter().filter(leads).max_by_key(|path| path.len());
            let found = resolve(&mounts(&of), &asked).map(|(path, _)| path);
            prop_assert_eq!(found.ok(), longest.map(|path| (*path).to_owned()));
        }
    }
}
