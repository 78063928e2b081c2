//! From raw to checked: every value is parsed and every relation between values is tested here, once.
//!
//! The [`Checker`] does not stop at a problem: a value that is wrong is noted and its default goes
//! on in its place, so that one run names everything there is to correct.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use http::Uri;

use super::raw::{Origin, RawCache, RawConfig, RawMount, RawServer, Scalar, Value};
use super::{
    CacheConfig, Config, ConfigError, ForbiddenAs, GIB, KIB, MIB, MountConfig, Place, Problem,
    ServerConfig, Source, units,
};
use crate::disk::MinFree;
use crate::telemetry::LogFormat;

/// Parts that the smallest cache holds. With fewer, a fill would evict what its own followers read.
const MIN_PARTS: u64 = 4;

/// hyper refuses a smaller buffer for a request head.
const MIN_HEADER_BYTES: u64 = 8 * KIB;

/// `$XDG_CACHE_HOME`, or `~/.cache`: where `--dev` keeps its disk tier, which must not ask for root.
pub(super) fn cache_home(variables: &[(OsString, OsString)]) -> Option<PathBuf> {
    let path = |name: &str| {
        let (_, value) = variables.iter().find(|(key, _)| key == name)?;
        Some(PathBuf::from(value)).filter(|path| path.is_absolute())
    };
    path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")))
}

/// `dev`: the directory of `--dev`; `home`: see [`cache_home`]; `problems`: those found before.
pub(super) fn check(
    raw: RawConfig,
    dev: Option<PathBuf>,
    home: Option<PathBuf>,
    source: &Source,
    problems: Vec<Problem>,
) -> Result<Config, ConfigError> {
    let mut checker = Checker {
        source,
        problems,
        misread: Vec::new(),
    };
    let server = checker.server(&raw.server, dev.is_some());
    let cache = checker.cache(&raw.cache, home.filter(|_| dev.is_some()));
    if raw.mount.is_empty() && dev.is_none() {
        checker.problems.push(Problem {
            place: source.whole(),
            message: "there is no mount; add a [[mount]] section with path and bucket, or give --bucket, \
                      or try `pinrange serve --dev DIR` or `pinrange demo`"
                .to_owned(),
        });
    }
    let mut paths = HashMap::new();
    let mut mounts = Vec::with_capacity(raw.mount.len());
    for (index, mount) in raw.mount.into_iter().enumerate() {
        let span = mount.span();
        let missing = |key: &str| {
            if span.is_empty() {
                let variable = format!("PINRANGE_MOUNT__{index}__{}", key.to_ascii_uppercase());
                Place::Variable { variable }
            } else {
                source.at(span.clone())
            }
        };
        mounts.push(checker.mount(mount.get_ref(), missing, &mut paths));
    }
    if checker.problems.is_empty() {
        Ok(Config {
            server,
            cache,
            mounts,
            dev,
        })
    } else {
        Err(ConfigError {
            problems: checker.problems,
        })
    }
}

/// `Checker::read` with the key's name taken from the field.
macro_rules! read {
    ($checker:ident, $section:literal, $raw:ident.$key:ident, $default:expr, $parse:expr) => {
        $checker.read(
            concat!($section, ".", stringify!($key)),
            $raw.$key.as_ref(),
            $default,
            $parse,
        )
    };
}

struct Checker<'a> {
    source: &'a Source,
    problems: Vec<Problem>,
    /// Where values stand that were refused for themselves.
    misread: Vec<Place>,
}

impl Checker<'_> {
    /// The value as `parse` reads it, or `default` where there is none or it is wrong.
    fn read<T>(
        &mut self,
        key: &str,
        value: Option<&Value>,
        default: T,
        parse: impl FnOnce(&Value) -> Result<T, String>,
    ) -> T {
        let Some(value) = value else { return default };
        match parse(value) {
            Ok(read) => read,
            Err(message) => {
                self.refuse(key, value, &message);
                self.misread.push(self.place(value));
                default
            }
        }
    }

    fn refuse(&mut self, key: &str, value: &Value, message: &str) {
        let place = self.place(value);
        // A line holds the key, but a log of the message alone does not.
        let message = match value.origin {
            Origin::File(_) => format!("{key}: {message}"),
            Origin::Variable(_) | Origin::Flag(_) => message.to_owned(),
        };
        self.problems.push(Problem { place, message });
    }

    fn place(&self, value: &Value) -> Place {
        match &value.origin {
            Origin::File(span) => self.source.at(span.clone()),
            Origin::Variable(name) => Place::Variable {
                variable: name.clone(),
            },
            Origin::Flag(flag) => Place::Flag { flag },
        }
    }

    /// Blames a relation between values on the first of `values` that is not a default. The defaults
    /// fit each other, so there is one. Nothing is said where a default stands for one of them that was refused: how that
    /// fits the others shows once it is corrected.
    fn relation(&mut self, values: &[(&str, Option<&Value>)], message: &str) {
        let mut places = values
            .iter()
            .filter_map(|(_, value)| Some(self.place((*value)?)));
        if places.any(|place| self.misread.contains(&place)) {
            return;
        }
        let blamed = values
            .iter()
            .find_map(|(key, value)| Some((*key, (*value)?)));
        if let Some((key, value)) = blamed {
            self.refuse(key, value, message);
        }
    }

    fn server(&mut self, raw: &RawServer, dev: bool) -> ServerConfig {
        let default = ServerConfig::default();
        let server = ServerConfig {
            listen: read!(self, "server", raw.listen, default.listen, address),
            admin: read!(self, "server", raw.admin, default.admin, address),
            drain_grace: read!(
                self,
                "server",
                raw.drain_grace,
                default.drain_grace,
                duration
            ),
            drain_timeout: read!(
                self,
                "server",
                raw.drain_timeout,
                default.drain_timeout,
                duration
            ),
            log_format: read!(
                self,
                "server",
                raw.log_format,
                default.log_format,
                log_format
            ),
            worker_threads: read!(
                self,
                "server",
                raw.worker_threads,
                default.worker_threads,
                worker_threads
            ),
            max_connections: read!(
                self,
                "server",
                raw.max_connections,
                default.max_connections,
                number(1..=1_000_000)
            ),
            header_timeout: read!(
                self,
                "server",
                raw.header_timeout,
                default.header_timeout,
                timeout
            ),
            header_max_bytes: read!(
                self,
                "server",
                raw.header_max_bytes,
                default.header_max_bytes,
                head_size
            ),
            idle_timeout: read!(
                self,
                "server",
                raw.idle_timeout,
                default.idle_timeout,
                timeout
            ),
            progress_timeout: read!(
                self,
                "server",
                raw.progress_timeout,
                default.progress_timeout,
                timeout
            ),
            min_rate: read!(self, "server", raw.min_rate, default.min_rate, rate),
        };
        let (listen, admin) = (server.listen, server.admin);
        let overlap = listen.ip() == admin.ip()
            || listen.is_ipv4() == admin.is_ipv4()
                && (listen.ip().is_unspecified() || admin.ip().is_unspecified());
        if listen.port() == admin.port() && listen.port() != 0 && overlap {
            self.relation(
                &[
                    ("server.admin", raw.admin.as_ref()),
                    ("server.listen", raw.listen.as_ref()),
                ],
                &format!(
                    "listen ({listen}) and admin ({admin}) cannot share a port; give them two"
                ),
            );
        }
        if dev && !listen.ip().is_loopback() {
            self.relation(
                &[("server.listen", raw.listen.as_ref())],
                &format!(
                    "--dev serves on loopback only, not on {}; write 127.0.0.1:{}",
                    listen.ip(),
                    listen.port()
                ),
            );
        }
        server
    }

    /// `home`: in which directory the tier's is by default, where that is not the usual one.
    fn cache(&mut self, raw: &RawCache, home: Option<PathBuf>) -> CacheConfig {
        let default = CacheConfig::default();
        let default_dir = home.map_or(default.dir, |home| home.join("pinrange-dev"));
        let sizes = size(1..=u64::MAX);
        let cache = CacheConfig {
            dir: read!(self, "cache", raw.dir, default_dir, directory),
            capacity: read!(self, "cache", raw.capacity, default.capacity, &sizes),
            min_free: read!(self, "cache", raw.min_free, default.min_free, min_free),
            block_size: read!(
                self,
                "cache",
                raw.block_size,
                default.block_size,
                block_size
            ),
            part_size: read!(
                self,
                "cache",
                raw.part_size,
                default.part_size,
                size(4 * KIB..=GIB)
            ),
            fill_budget: read!(self, "cache", raw.fill_budget, default.fill_budget, &sizes),
            fan_out: read!(self, "cache", raw.fan_out, default.fan_out, number(1..=64)),
            scrub_rate: read!(
                self,
                "cache",
                raw.scrub_rate,
                default.scrub_rate,
                size(0..=u64::MAX)
            ),
        };
        let (block, part) = (cache.block_size, cache.part_size);
        let sizes = [
            ("cache.part_size", raw.part_size.as_ref()),
            ("cache.block_size", raw.block_size.as_ref()),
        ];
        if part % block != 0 {
            self.relation(
                &sizes,
                &format!(
                    "part_size ({}) is not a multiple of block_size ({})",
                    units::format_size(part),
                    units::format_size(block)
                ),
            );
        }
        if cache.capacity / MIN_PARTS < part {
            self.relation(
                &[("cache.capacity", raw.capacity.as_ref()), sizes[0]],
                &format!(
                    "capacity ({}) does not hold {MIN_PARTS} parts of {}; raise capacity to {} or lower part_size",
                    units::format_size(cache.capacity),
                    units::format_size(part),
                    units::format_size(MIN_PARTS * part)
                ),
            );
        }
        if cache.fill_budget < part {
            self.relation(
                &[("cache.fill_budget", raw.fill_budget.as_ref()), sizes[0]],
                &format!(
                    "fill_budget ({}) does not hold one part of {}, so no fill could start; raise fill_budget or lower part_size",
                    units::format_size(cache.fill_budget),
                    units::format_size(part)
                ),
            );
        }
        cache
    }

    /// `missing` says where a key should have been; `paths` has those of the mounts before.
    fn mount(
        &mut self,
        raw: &RawMount,
        missing: impl Fn(&str) -> Place,
        paths: &mut HashMap<String, Place>,
    ) -> MountConfig {
        for (key, value, example) in [
            ("path", &raw.path, "/snapshots"),
            ("bucket", &raw.bucket, "my-bucket"),
        ] {
            if value.is_none() {
                self.problems.push(Problem {
                    place: missing(key),
                    message: format!("this mount has no {key}; add {key} = \"{example}\""),
                });
            }
        }
        let default = MountConfig::new("", "");
        let endpoint = read!(self, "mount", raw.endpoint, None, endpoint);
        let mount = MountConfig {
            path: read!(self, "mount", raw.path, default.path, mount_path),
            bucket: read!(self, "mount", raw.bucket, default.bucket, bucket),
            prefix: read!(self, "mount", raw.prefix, default.prefix, prefix),
            region: read!(self, "mount", raw.region, None, region),
            // Host names for buckets need a wildcard in DNS, which AWS has and few others do.
            path_style: read!(self, "mount", raw.path_style, endpoint.is_some(), boolean),
            endpoint,
            fresh_for: read!(self, "mount", raw.fresh_for, default.fresh_for, duration),
            stale_if_error: read!(
                self,
                "mount",
                raw.stale_if_error,
                default.stale_if_error,
                duration
            ),
            forbidden: read!(self, "mount", raw.forbidden, default.forbidden, forbidden),
            connect_timeout: read!(
                self,
                "mount",
                raw.connect_timeout,
                default.connect_timeout,
                timeout
            ),
            first_byte_timeout: read!(
                self,
                "mount",
                raw.first_byte_timeout,
                default.first_byte_timeout,
                timeout
            ),
            stall_timeout: read!(
                self,
                "mount",
                raw.stall_timeout,
                default.stall_timeout,
                timeout
            ),
            retries: read!(self, "mount", raw.retries, default.retries, number(0..=10)),
            verify: read!(self, "mount", raw.verify, default.verify, boolean),
        };
        if let Some(value) = raw
            .bucket
            .as_ref()
            .filter(|_| is_directory_bucket(&mount.bucket))
        {
            let message = format!(
                "mount {:?}: {:?} is a directory bucket (S3 Express One Zone), which pinrange cannot read; mount a \
                 general purpose bucket",
                mount.path, mount.bucket
            );
            self.refuse("mount.bucket", value, &message);
        }
        if let Some(value) = raw.path.as_ref().filter(|_| !mount.path.is_empty()) {
            let place = self.place(value);
            if let Some(first) = paths.get(&mount.path) {
                let message = format!(
                    "{:?} is mounted already ({first}); give each mount a path of its own",
                    mount.path
                );
                self.refuse("mount.path", value, &message);
            } else {
                paths.insert(mount.path.clone(), place);
            }
        }
        mount
    }
}

impl Value {
    fn text(&self) -> Result<&str, String> {
        match &self.scalar {
            Scalar::Text(text) => Ok(text),
            Scalar::Integer(number) => Err(format!("write it in quotes: \"{number}\"")),
            Scalar::Float(number) => Err(format!("write it in quotes: \"{number}\"")),
            Scalar::Boolean(boolean) => {
                Err(format!("{boolean} is not a string; write it in quotes"))
            }
        }
    }

    /// Whether a text may stand for a number or a boolean: a variable and a flag have nothing else.
    fn is_untyped(&self) -> bool {
        !matches!(self.origin, Origin::File(_))
    }
}

fn number<T: TryFrom<i64> + FromStr + PartialOrd + Display>(
    within: RangeInclusive<T>,
) -> impl FnOnce(&Value) -> Result<T, String> {
    move |value| {
        let refused = |written: &dyn Display| {
            Err(format!(
                "{written} is not a whole number from {} to {}",
                within.start(),
                within.end()
            ))
        };
        let (number, written): (Option<T>, &dyn Display) = match &value.scalar {
            Scalar::Integer(number) => (T::try_from(*number).ok(), number),
            Scalar::Text(text) if value.is_untyped() => (text.parse().ok(), text),
            Scalar::Text(text) => return refused(&format!("{text:?} (in quotes)")),
            Scalar::Float(number) => (None, number),
            Scalar::Boolean(boolean) => (None, boolean),
        };
        match number {
            Some(number) if within.contains(&number) => Ok(number),
            _ => refused(written),
        }
    }
}

fn boolean(value: &Value) -> Result<bool, String> {
    match &value.scalar {
        Scalar::Boolean(boolean) => Ok(*boolean),
        Scalar::Text(text) if value.is_untyped() && text == "true" => Ok(true),
        Scalar::Text(text) if value.is_untyped() && text == "false" => Ok(false),
        Scalar::Text(_) | Scalar::Integer(_) | Scalar::Float(_) => {
            Err("it is neither true nor false; write one of them, without quotes".to_owned())
        }
    }
}

fn worker_threads(value: &Value) -> Result<Option<NonZeroUsize>, String> {
    match &value.scalar {
        Scalar::Text(text) if text == "auto" => Ok(None),
        _ => number(1..=1024)(value)
            .map(NonZeroUsize::new)
            .map_err(|message| format!("{message}, nor \"auto\" for one per core")),
    }
}

fn log_format(value: &Value) -> Result<LogFormat, String> {
    match value.text()? {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("{other:?} is no log format; write text or json")),
    }
}

fn forbidden(value: &Value) -> Result<ForbiddenAs, String> {
    match value.text()? {
        "502" => Ok(ForbiddenAs::BadGateway),
        "404" => Ok(ForbiddenAs::NotFound),
        other => Err(format!(
            "{other:?} is no answer to a 403 of S3; write \"502\", or \"404\" if the credentials may not list the bucket"
        )),
    }
}

fn size(within: RangeInclusive<u64>) -> impl Fn(&Value) -> Result<u64, String> {
    move |value| {
        let bytes = match &value.scalar {
            Scalar::Integer(bytes) => {
                u64::try_from(*bytes).map_err(|_| format!("{bytes} is not a size"))?
            }
            _ => units::parse_size(value.text()?)?,
        };
        if within.contains(&bytes) {
            return Ok(bytes);
        }
        let (least, most) = (units::format_size(*within.start()), *within.end());
        Err(if most == u64::MAX {
            format!(
                "{} is too small; write at least {least}",
                units::format_size(bytes)
            )
        } else {
            format!(
                "{} is out of bounds; write {least} to {}",
                units::format_size(bytes),
                units::format_size(most)
            )
        })
    }
}

/// Bytes a second. More than the most would cut honest clients.
fn rate(value: &Value) -> Result<u64, String> {
    size(0..=MIB)(value)
}

fn head_size(value: &Value) -> Result<usize, String> {
    let bytes = size(MIN_HEADER_BYTES..=MIB)(value)?;
    usize::try_from(bytes).map_err(|_| "it is more than this machine can address".to_owned())
}

fn block_size(value: &Value) -> Result<u64, String> {
    let bytes = size(4 * KIB..=4 * MIB)(value)?;
    if bytes.is_power_of_two() {
        Ok(bytes)
    } else {
        Err(format!(
            "{} is not a power of two; write {} or {}",
            units::format_size(bytes),
            units::format_size(bytes.next_power_of_two() / 2),
            units::format_size(bytes.next_power_of_two())
        ))
    }
}

fn min_free(value: &Value) -> Result<MinFree, String> {
    match &value.scalar {
        Scalar::Integer(_) => size(0..=u64::MAX)(value).map(MinFree::Bytes),
        _ => units::parse_min_free(value.text()?),
    }
}

fn duration(value: &Value) -> Result<Duration, String> {
    match &value.scalar {
        Scalar::Integer(number) => units::parse_duration(&number.to_string()),
        _ => units::parse_duration(value.text()?),
    }
}

/// A duration that something must fit into.
fn timeout(value: &Value) -> Result<Duration, String> {
    let duration = duration(value)?;
    if duration.is_zero() {
        return Err("a timeout of 0 would end everything at once; write at least 1ms".to_owned());
    }
    Ok(duration)
}

fn address(value: &Value) -> Result<SocketAddr, String> {
    let text = value.text()?;
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    Err(match text.rsplit_once(':') {
        Some(("" | "*", port)) if port.parse::<u16>().is_ok() => format!(
            "{text:?} has no address; write 127.0.0.1:{port}, or 0.0.0.0:{port} for every interface"
        ),
        Some((host, port)) if port.parse::<u16>().is_ok() => match host.parse::<IpAddr>() {
            Ok(IpAddr::V6(_)) => format!("write an IPv6 address in brackets: [{host}]:{port}"),
            _ => format!(
                "{host:?} is not an IP address, and host names are not looked up; write one, such as 127.0.0.1:{port}"
            ),
        },
        _ if text.parse::<IpAddr>().is_ok() => {
            format!("{text:?} has no port; write an address and a port, such as 127.0.0.1:8080")
        }
        _ => format!("{text:?} is not an address and a port; write it like 127.0.0.1:8080"),
    })
}

fn directory(value: &Value) -> Result<PathBuf, String> {
    match value.text()? {
        "" => Err("it is empty; write the path of a directory".to_owned()),
        text if text.contains('\0') => {
            Err(format!("{text:?} has a NUL, which no path has; remove it"))
        }
        text => Ok(PathBuf::from(text)),
    }
}

/// A path as the router compares it: percent-decoded, in whole segments. To keep the two spellings of one
/// path from meeting, only characters that RFC 3986 lets stand for themselves are taken.
fn mount_path(value: &Value) -> Result<String, String> {
    let path = value.text()?;
    let Some(segments) = path.strip_prefix('/') else {
        return Err(format!(
            "{path:?} does not start with a slash; write \"/{path}\""
        ));
    };
    if segments.is_empty() {
        return Ok(path.to_owned());
    }
    if let Some(trimmed) = path.strip_suffix('/') {
        let trimmed = trimmed.trim_end_matches('/');
        let trimmed = if trimmed.is_empty() { "/" } else { trimmed };
        return Err(format!("{path:?} ends with a slash; write {trimmed:?}"));
    }
    for segment in segments.split('/') {
        if matches!(segment, "" | "." | "..") {
            return Err(format!(
                "{path:?} has the segment {segment:?}, which no client can ask for; remove it"
            ));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@".contains(c);
        if let Some(odd) = segment.chars().find(|c| !plain(*c)) {
            return Err(format!(
                "{path:?} contains {odd:?}; use letters, digits and -._~!$&'()*+,;=:@"
            ));
        }
    }
    Ok(path.to_owned())
}

/// The rules of AWS for general purpose buckets, or the ARN of an access point.
fn bucket(value: &Value) -> Result<String, String> {
    let name = value.text()?;
    let refused = |why: &str| Err(format!("{name:?} is not a bucket name: {why}"));
    if name.starts_with("arn:") {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/".contains(c);
        return if name.contains(":accesspoint") && name.chars().all(plain) {
            Ok(name.to_owned())
        } else {
            refused("of the ARNs only those of access points are taken; write the bucket's name")
        };
    }
    if name.starts_with("s3://") || name.contains('/') {
        return refused("write the name alone; what follows it belongs into prefix");
    }
    if !(3..=63).contains(&name.len()) {
        return refused("it must have 3 to 63 characters");
    }
    let letter_or_digit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !name
        .chars()
        .all(|c| letter_or_digit(c) || c == '-' || c == '.')
    {
        return refused("use lower-case letters, digits, hyphens and dots");
    }
    if !(name.starts_with(letter_or_digit) && name.ends_with(letter_or_digit)) {
        return refused("it must start and end with a letter or digit");
    }
    if name.contains("..") {
        return refused("two dots must not follow each other");
    }
    if name.parse::<IpAddr>().is_ok() {
        return refused("it is an IP address");
    }
    Ok(name.to_owned())
}

/// Whether the name is that of a bucket of S3 Express One Zone or of an access point to one, which end in what AWS keeps for
/// them. The SDK would ask for a session first, at other hosts, and an `ETag` there says nothing about the bytes: none of that has
/// been tried.
fn is_directory_bucket(bucket: &str) -> bool {
    bucket.ends_with("--x-s3") || bucket.ends_with("--xa-s3") || bucket.contains(":s3express:")
}

/// S3 takes keys of up to 1024 bytes, and the prefix needs company.
fn prefix(value: &Value) -> Result<String, String> {
    let prefix = value.text()?;
    if prefix.len() > 1000 {
        return Err(format!(
            "it has {} bytes; keys of S3 end at 1024",
            prefix.len()
        ));
    }
    if prefix.contains(char::is_control) {
        return Err(format!(
            "{prefix:?} contains a control character; remove it"
        ));
    }
    if prefix.starts_with('/') {
        return Err(format!(
            "{prefix:?} starts with a slash, which S3 would take as part of every key; write {:?}",
            prefix.trim_start_matches('/')
        ));
    }
    Ok(prefix.to_owned())
}

/// Never repeats what it was given: it may hold a password.
fn endpoint(value: &Value) -> Result<Option<String>, String> {
    let refused = |why: &str| Err(format!("{why}; write it like http://127.0.0.1:3900"));
    let text = value.text()?;
    if text.contains('@') {
        return Err(
            "an endpoint holds no credentials; remove them, and set AWS_ACCESS_KEY_ID and \
                    AWS_SECRET_ACCESS_KEY or a profile instead"
                .to_owned(),
        );
    }
    if !(text.starts_with("http://") || text.starts_with("https://")) {
        return refused("it is not an http:// or https:// URL");
    }
    if text.contains(['?', '#']) {
        return refused("an endpoint has no query and no fragment");
    }
    let uri: Uri = match text.parse() {
        Ok(uri) => uri,
        Err(error) => return refused(&format!("it is not a URL ({error})")),
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    if host.is_empty() {
        return refused("it has no host");
    }
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return refused("its port is not a number up to 65535");
    }
    Ok(Some(text.trim_end_matches('/').to_owned()))
}

fn region(value: &Value) -> Result<Option<String>, String> {
    let name = value.text()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(format!(
            "{name:?} is not a region; write it like eu-central-1"
        ));
    }
    Ok(Some(name.to_owned()))
}
