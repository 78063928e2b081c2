//! What a read of an object is answered, as S3 decides it: preconditions in the order of RFC 9110 §13.2.2, then
//! `Range`.
//!
//! Deliberately shares no code with [`crate::semantics`], which is what this server helps to test: an error made
//! once would otherwise agree with itself on both sides of the wire.

use std::time::{SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use http::header::{
    HeaderName, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_UNMODIFIED_SINCE, RANGE,
};

/// The answer to a read of an object that exists.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// 200.
    Whole,
    /// 206 with `start..end`, at least one byte.
    Part { start: u64, end: u64 },
    /// 304.
    NotModified,
    /// 412; the field that failed, for the XML body.
    PreconditionFailed(&'static str),
    /// 416.
    Unsatisfiable,
}

/// Judges a read. `etag` is the object's field value, quotes included.
///
/// With `ignore_if_match` or `ignore_range` the field counts as absent (scripted faults).
pub(super) fn judge(
    fields: &HeaderMap,
    etag: &str,
    last_modified: SystemTime,
    size: u64,
    ignore_if_match: bool,
    ignore_range: bool,
) -> Verdict {
    let modified = whole_seconds(last_modified);
    let date = |name: HeaderName| {
        let value = fields.get(name)?.to_str().ok()?;
        httpdate::parse_http_date(value).ok().map(whole_seconds)
    };

    if fields.contains_key(IF_MATCH) && !ignore_if_match {
        if !matches_any(fields, &IF_MATCH, etag, Comparison::Strong) {
            return Verdict::PreconditionFailed("If-Match");
        }
    } else if date(IF_UNMODIFIED_SINCE).is_some_and(|since| modified > since) {
        return Verdict::PreconditionFailed("If-Unmodified-Since");
    }
    if fields.contains_key(IF_NONE_MATCH) {
        if matches_any(fields, &IF_NONE_MATCH, etag, Comparison::Weak) {
            return Verdict::NotModified;
        }
    } else if date(IF_MODIFIED_SINCE).is_some_and(|since| modified <= since) {
        return Verdict::NotModified;
    }

    let range = fields.get(RANGE).filter(|_| !ignore_range);
    match range.and_then(|value| parse_range(value.as_bytes())) {
        None => Verdict::Whole,
        Some(spec) => match spec.within(size) {
            Some((start, end)) => Verdict::Part { start, end },
            None => Verdict::Unsatisfiable,
        },
    }
}

/// HTTP dates have no fraction, so neither may what they are compared with.
fn whole_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Strong,
    Weak,
}

/// Whether any tag of the list (over all lines of the field) matches. S3 takes tags without quotes as well.
fn matches_any(fields: &HeaderMap, name: &HeaderName, etag: &str, how: Comparison) -> bool {
    fields
        .get_all(name)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .any(|line| {
            tags(line).any(|tag| {
                let (weak, tag) = match tag.strip_prefix("W/") {
                    Some(rest) => (true, rest),
                    None => (false, tag),
                };
                tag == "*"
                    || (!(weak && how == Comparison::Strong)
                        && tag.trim_matches('"') == etag.trim_matches('"'))
            })
        })
}

/// Splits a list of entity tags at the commas outside of quotes.
fn tags(line: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    line.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
    .map(str::trim)
    .filter(|tag| !tag.is_empty())
}

#[derive(Debug, PartialEq, Eq)]
enum Spec {
    Closed(u64, u64),
    From(u64),
    Suffix(u64),
}

impl Spec {
    /// `start..end` clamped to an object of `size` bytes; `None` where nothing is left.
    fn within(&self, size: u64) -> Option<(u64, u64)> {
        let (start, end) = match *self {
            Self::Closed(first, last) => (first, last.saturating_add(1).min(size)),
            Self::From(first) => (first, size),
            Self::Suffix(length) => (size.saturating_sub(length), size),
        };
        (start < end).then_some((start, end))
    }
}

/// One `bytes` range. `None` (another unit, bad syntax, or several ranges, which S3 does not do) means the field is
/// ignored.
fn parse_range(value: &[u8]) -> Option<Spec> {
    let value = std::str::from_utf8(value).ok()?;
    let (unit, set) = value.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = set.trim().split_once('-')?;
    match (first, last) {
        ("", last) => Some(Spec::Suffix(number(last)?)),
        (first, "") => Some(Spec::From(number(first)?)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Spec::Closed(first, last))
        }
    }
}

/// Digits only (`u64::from_str` would take a sign); beyond 64 bits saturates.
fn number(digits: &str) -> Option<u64> {
    let valid = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    valid.then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ETAG: &str = "\"abc\"";

    fn modified() -> SystemTime {
        UNIX_EPOCH + Duration::new(1_000_000_000, 500)
    }

    fn date(offset: i64) -> String {
        let seconds = 1_000_000_000_u64.checked_add_signed(offset).unwrap();
        httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    fn verdict(fields: &[(&'static str, &str)], size: u64) -> Verdict {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, value.parse().unwrap());
        }
        judge(&map, ETAG, modified(), size, false, false)
    }

    #[test]
    fn if_match_compares_strongly_over_lists() {
        for passing in ["\"abc\"", "abc", "*", "\"x\", \"abc\"", "\"a,b\",\"abc\""] {
            assert_eq!(
                verdict(&[("if-match", passing)], 9),
                Verdict::Whole,
                "{passing}"
            );
        }
        for failing in ["\"x\"", "W/\"abc\"", "\"x\", W/\"abc\"", "\"abc,\"", ""] {
            assert_eq!(
                verdict(&[("if-match", failing)], 9),
                Verdict::PreconditionFailed("If-Match"),
                "{failing}"
            );
        }
    }

    #[test]
    fn preconditions_come_in_rfc_order() {
        // If-Match silences If-Unmodified-Since, If-None-Match silences If-Modified-Since.
        let (past, now) = (date(-10), date(0));
        assert_eq!(
            verdict(&[("if-unmodified-since", &past)], 9),
            Verdict::PreconditionFailed("If-Unmodified-Since")
        );
        assert_eq!(
            verdict(&[("if-match", "abc"), ("if-unmodified-since", &past)], 9),
            Verdict::Whole
        );
        assert_eq!(
            verdict(&[("if-modified-since", &now)], 9),
            Verdict::NotModified
        );
        assert_eq!(
            verdict(
                &[("if-none-match", "\"x\""), ("if-modified-since", &now)],
                9
            ),
            Verdict::Whole
        );
        assert_eq!(
            verdict(&[("if-none-match", "W/\"abc\"")], 9),
            Verdict::NotModified
        );
        // The first that fails wins, and any of them wins over Range.
        assert_eq!(
            verdict(
                &[
                    ("if-match", "x"),
                    ("if-none-match", "abc"),
                    ("range", "bytes=99-")
                ],
                9
            ),
            Verdict::PreconditionFailed("If-Match")
        );
    }

    #[test]
    fn ranges() {
        let part = |start, end| Verdict::Part { start, end };
        for (range, size, want) in [
            ("bytes=0-0", 10, part(0, 1)),
            ("bytes=2-5", 10, part(2, 6)),
            ("bytes=2-99", 10, part(2, 10)),
            ("bytes=2-99999999999999999999999", 10, part(2, 10)),
            ("bytes=9-", 10, part(9, 10)),
            ("bytes=-3", 10, part(7, 10)),
            ("bytes=-30", 10, part(0, 10)),
            ("bytes=10-", 10, Verdict::Unsatisfiable),
            ("bytes=-0", 10, Verdict::Unsatisfiable),
            ("bytes=0-", 0, Verdict::Unsatisfiable),
            ("bytes=-1", 0, Verdict::Unsatisfiable),
            ("bytes=0-1,4-5", 10, Verdict::Whole),
            ("bytes=5-2", 10, Verdict::Whole),
            ("bytes=+1-2", 10, Verdict::Whole),
            ("lines=0-1", 10, Verdict::Whole),
            ("bytes=", 10, Verdict::Whole),
        ] {
            assert_eq!(
                verdict(&[("range", range)], size),
                want,
                "{range} of {size}"
            );
        }
    }
}
