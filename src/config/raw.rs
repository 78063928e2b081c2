//! The layers before they are checked: what stands in the file, the environment and the flags.
//!
//! All three are read into the same [`RawConfig`], in which every value is optional and remembers
//! where it came from ([`Origin`]), so that a later complaint can point there. Nothing is judged
//! here but names: an unknown key, section or variable never gets further.

use std::ffi::OsString;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, Visitor};
use toml::Spanned;

use super::{Flags, Place, Problem, Source};

/// Names with this prefix belong to us.
const PREFIX: &str = "PINRANGE_";

/// Where a value was written.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// Bytes of the configuration file.
    File(Range<usize>),
    /// An environment variable.
    Variable(String),
    /// A flag of the command line.
    Flag(&'static str),
}

/// A value as it was written. Flags and variables are always text.
#[derive(Clone, Debug)]
pub(super) enum Scalar {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
}

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) scalar: Scalar,
    pub(super) origin: Origin,
}

impl Value {
    fn variable(name: &str, text: String) -> Self {
        Self {
            scalar: Scalar::Text(text),
            origin: Origin::Variable(name.to_owned()),
        }
    }

    fn flag(name: &'static str, text: String) -> Self {
        Self {
            scalar: Scalar::Text(text),
            origin: Origin::Flag(name),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Scalar>::deserialize(deserializer)?;
        let origin = Origin::File(spanned.span());
        Ok(Self {
            scalar: spanned.into_inner(),
            origin,
        })
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number, true or false")
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(text.to_owned()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar::Integer(number))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar, E> {
                Ok(Scalar::Float(number))
            }

            fn visit_bool<E>(self, boolean: bool) -> Result<Scalar, E> {
                Ok(Scalar::Boolean(boolean))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// A table of the file: its keys are said once, for the file, the environment and the merge.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($key:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name {
            $(pub(super) $key: Option<Value>,)*
        }

        impl $name {
            pub(super) const KEYS: &[&str] = &[$(stringify!($key)),*];

            fn slot(&mut self, key: &str) -> Option<&mut Option<Value>> {
                match key {
                    $(stringify!($key) => Some(&mut self.$key),)*
                    _ => None,
                }
            }
        }
    };
}

section! {
    /// `[server]`
    RawServer {
        listen, admin, drain_timeout, drain_grace, log_format, worker_threads, max_connections,
        header_timeout, header_max_bytes, idle_timeout, progress_timeout, min_rate,
    }
}

section! {
    /// `[cache]`
    RawCache { dir, capacity, min_free, block_size, part_size, fill_budget, fan_out, scrub_rate }
}

section! {
    /// One `[[mount]]`
    RawMount {
        path, bucket, prefix, endpoint, region, path_style, fresh_for, stale_if_error, forbidden,
        connect_timeout, first_byte_timeout, stall_timeout, retries, verify,
    }
}

/// One layer, or several merged.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConfig {
    pub(super) server: RawServer,
    pub(super) cache: RawCache,
    pub(super) mount: Vec<Spanned<RawMount>>,
}

impl RawConfig {
    /// Reads the file's text. The problem is the first one: TOML cannot be read on behind it.
    pub(super) fn from_toml(text: &str, source: &Source) -> Result<Self, Problem> {
        toml::from_str(text).map_err(|error| {
            let message = error.message().replace('\n', "; ");
            let message = match message.strip_prefix("unknown field ") {
                Some(rest) if names_a_secret(rest) => format!(
                    "unknown key {rest}; credentials come from the standard AWS chain only \
                     (environment, profile, instance role), never from this file"
                ),
                Some(rest) => format!("unknown key {rest}; correct its name or remove it"),
                // `[mount]`, where TOML expects `[[mount]]`.
                None if message.contains("map, expected a sequence") => {
                    "mounts are a list; write [[mount]] instead of [mount]".to_owned()
                }
                None => message,
            };
            let place = error
                .span()
                .map_or_else(|| source.whole(), |span| source.at(span));
            Problem { place, message }
        })
    }

    /// Lays the variables over `self`. `PINRANGE_<SECTION>__<KEY>` sets a key and
    /// `PINRANGE_MOUNT__<INDEX>__<KEY>` one of a mount, which are counted from 0 in the file's
    /// order; the next index after the last adds a mount.
    ///
    /// Only a name with a double underscore claims to be ours: Kubernetes puts `PINRANGE_PORT` and
    /// the like into every pod beside a service called `pinrange`. A name that is a key but for the
    /// second underscore is told apart from those and refused too.
    pub(super) fn overlay_env(
        &mut self,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        problems: &mut Vec<Problem>,
    ) {
        let mut ours: Vec<(String, OsString)> = variables
            .into_iter()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        // The environment has no order; a list needs one, and so do reproducible complaints.
        ours.sort_by_key(|(name, _)| (mount_index(name), name.clone()));
        for (name, value) in ours {
            if let Err(message) = self.set_variable(&name, value) {
                problems.push(Problem {
                    place: Place::Variable { variable: name },
                    message,
                });
            }
        }
    }

    fn set_variable(&mut self, name: &str, value: OsString) -> Result<(), String> {
        let lower = name[PREFIX.len()..].to_ascii_lowercase();
        if lower.contains("__") && name.contains(|c: char| c.is_ascii_lowercase()) {
            return Err(format!(
                "write it in upper case: {}",
                name.to_ascii_uppercase()
            ));
        }
        let mut words = lower.split("__");
        let section = words.next().unwrap_or_default();
        let (index, key) = match (words.next(), words.next(), words.next()) {
            (None, ..) => return check_single_underscore(&lower),
            (Some(key), None, _) => (None, key),
            (Some(index), Some(key), None) => (Some(index), key),
            (Some(_), Some(_), Some(_)) => return Err("too many `__` in the name".to_owned()),
        };
        let (keys, slot) = match (section, index) {
            ("server", None) => (RawServer::KEYS, self.server.slot(key)),
            ("cache", None) => (RawCache::KEYS, self.cache.slot(key)),
            ("mount", Some(index)) => (RawMount::KEYS, self.mount_at(index)?.slot(key)),
            ("mount", None) => {
                return Err(format!(
                    "a mount needs its index, counted from 0: {PREFIX}MOUNT__0__{}",
                    key.to_ascii_uppercase()
                ));
            }
            ("server" | "cache", Some(_)) => return Err(format!("[{section}] is not a list")),
            _ => {
                return Err(format!(
                    "no section {section:?}; there are server, cache and mount"
                ));
            }
        };
        let Some(slot) = slot else {
            return Err(format!(
                "no key {key:?} in [{section}]; there are {}",
                keys.join(", ")
            ));
        };
        let text = value
            .into_string()
            .map_err(|_| "its value is not UTF-8; set it to plain text".to_owned())?;
        *slot = Some(Value::variable(name, text));
        Ok(())
    }

    fn mount_at(&mut self, index: &str) -> Result<&mut RawMount, String> {
        let mounts = self.mount.len();
        let index = index
            .parse::<usize>()
            .map_err(|_| format!("{index:?} is not an index; mounts are counted from 0"))?;
        if index > mounts {
            return Err(format!(
                "there is no mount {index}: with {mounts} so far the next one is {mounts}"
            ));
        }
        if index == mounts {
            // No span: whatever is missing in it is named by its variable.
            self.mount.push(Spanned::new(0..0, RawMount::default()));
        }
        Ok(self.mount[index].get_mut())
    }

    /// Lays the flags over `self`. A mount given by flags replaces every other mount.
    pub(super) fn overlay_flags(&mut self, flags: &Flags) {
        for (slot, flag, text) in [
            (&mut self.server.listen, "--listen", &flags.listen),
            (&mut self.server.admin, "--admin", &flags.admin),
            (
                &mut self.server.log_format,
                "--log-format",
                &flags.log_format,
            ),
            (&mut self.cache.dir, "--cache-dir", &flags.cache_dir),
            (&mut self.cache.capacity, "--capacity", &flags.capacity),
        ] {
            if let Some(text) = text {
                *slot = Some(Value::flag(flag, text.clone()));
            }
        }
        if flags.dev.is_some() {
            self.mount.clear();
        }
        if let Some(bucket) = &flags.bucket {
            let value =
                |flag, text: &Option<String>| text.clone().map(|text| Value::flag(flag, text));
            let path = flags.mount.clone().unwrap_or_else(|| "/".to_owned());
            let mount = RawMount {
                path: Some(Value::flag("--mount", path)),
                bucket: Some(Value::flag("--bucket", bucket.clone())),
                prefix: value("--prefix", &flags.prefix),
                endpoint: value("--endpoint", &flags.endpoint),
                region: value("--region", &flags.region),
                path_style: value("--path-style", &flags.path_style),
                ..RawMount::default()
            };
            self.mount = vec![Spanned::new(0..0, mount)];
        }
    }
}

/// Mounts first, in the order of their numbers (10 after 9); everything else after them.
fn mount_index(name: &str) -> usize {
    name[PREFIX.len()..]
        .strip_prefix("MOUNT__")
        .and_then(|rest| rest.split("__").next())
        .and_then(|index| index.parse().ok())
        .unwrap_or(usize::MAX)
}

fn check_single_underscore(lower: &str) -> Result<(), String> {
    for (section, keys) in [("server", RawServer::KEYS), ("cache", RawCache::KEYS)] {
        let key = lower
            .strip_prefix(section)
            .and_then(|rest| rest.strip_prefix('_'));
        if let Some(key) = key.filter(|key| keys.contains(key)) {
            return Err(format!(
                "two underscores stand between section and key: {PREFIX}{}__{}",
                section.to_ascii_uppercase(),
                key.to_ascii_uppercase()
            ));
        }
    }
    Ok(())
}

/// Whether the unknown key, quoted at the start of the message, looks like a credential.
fn names_a_secret(message: &str) -> bool {
    let key = message.split('`').nth(1).unwrap_or_default();
    ["secret", "access_key", "token", "password", "credential"]
        .iter()
        .any(|s| key.contains(s))
}
