//! Preconditions (RFC 9110 §13): what a GET or HEAD is answered with, given what it asks about.
//!
//! [`RequestHead::from_headers`] gathers the fields that matter, [`evaluate`] applies them in the
//! order of §13.2.2:
//!
//! 1. `If-Match` by strong comparison; does not hold: 412.
//! 2. `If-Unmodified-Since`, only without `If-Match`; does not hold: 412.
//! 3. `If-None-Match` by weak comparison; does not hold: 304.
//! 4. `If-Modified-Since`, only without `If-None-Match`; does not hold: 304.
//! 5. `Range` on GET, if `If-Range` is absent or holds: 206 or 416. Else 200.
//!
//! The representation exists: 404 and 5xx win over every precondition (§13.2.1) and are the
//! caller's to say, and so `*` holds in `If-Match` and does not in `If-None-Match`.
//!
//! # What becomes of a field that cannot be understood
//!
//! | field | malformed, or repeated though it is no list | because |
//! |---|---|---|
//! | `If-Match` | [`BadRequest`] | a pin is never ignored. Several lines are one list (§5.3) |
//! | `If-Unmodified-Since` | ignored | §13.1.4 says MUST |
//! | `If-None-Match` | ignored, and `If-Modified-Since` with it | it only saves bytes, the full answer is right; the date stays out since the tags were to overrule it (§13.1.3) |
//! | `If-Modified-Since` | ignored | §13.1.3 says MUST |
//! | `If-Range` | does not hold, so `Range` is ignored | a resumed download must not take bytes on a guess |
//! | `Range` | ignored | §14.2. Two lines joined by §5.3 are bad syntax, and are treated so |
//!
//! # A date in `If-Range`
//!
//! It holds if it equals `Last-Modified` to the second; neither an earlier nor a later one does
//! (§13.1.5). That section wants the date to be a strong validator as well, which §8.8.2.2 grants
//! to a server that knows the object did not change twice within that second. Whoever sits in front
//! of S3 cannot know it: `Last-Modified` has whole seconds and two PUTs fit into one. Refusing every
//! date would be the letter of it, and would restart each download of a client that knows dates
//! only. We take the date, because nothing that follows the RFC can be misled by it: all our answers
//! carry a strong `ETag`, so a client that has one must not send the date (§13.1.5), and the 206
//! carries the tag of the revision that its bytes are of, so a client that must not combine parts of
//! different validators (§15.3.7.3) sees the difference. Who wants certainty sends the tag.
//!
//! Guarded by: `every_combination_agrees_with_the_rfcs_steps`, `a_malformed_pin_is_never_ignored`,
//! `what_cannot_be_understood`, `dates_are_compared_in_whole_seconds`,
//! `any_request_gets_an_answer`.

use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{
    HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    IF_UNMODIFIED_SINCE, RANGE,
};

use super::etag::MalformedTag;
use super::range::{RangeSet, Ranges, parse_range, resolve_all};
use super::{EntityTag, EntityTagList, trim_ows};

/// The methods that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: other methods are refused before"
)]
pub enum Method {
    /// GET
    Get,
    /// HEAD
    Head,
}

/// `If-Range`
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §13.1.5")]
pub enum IfRange<'a> {
    /// A tag. It may be weak, and then never holds.
    Tag(EntityTag<'a>),
    /// An exact date.
    Date(SystemTime),
}

impl<'a> IfRange<'a> {
    /// Reads the field: one tag, quoted or of the one unquoted form (see [`super::etag`]), or a
    /// date. `None`: it is neither, and must count as a condition that does not hold.
    pub fn parse(value: &'a [u8]) -> Option<Self> {
        // An unquoted tag has neither space nor comma, a date has: they cannot be mistaken.
        EntityTag::parse(value)
            .ok()
            .or_else(|| EntityTag::from_unquoted(trim_ows(value)))
            .map(Self::Tag)
            .or_else(|| parse_http_date(value).map(Self::Date))
    }

    fn holds(&self, representation: &RepresentationMetadata<'_>) -> bool {
        match self {
            Self::Tag(tag) => tag.strong_eq(representation.etag),
            Self::Date(date) => representation
                .last_modified
                .is_some_and(|modified| whole_seconds(modified) == whole_seconds(*date)),
        }
    }
}

/// The part of a request that decides what is answered. Fields are already parsed; tags stay where they stand.
#[derive(Clone, Debug)]
pub struct RequestHead<'a> {
    /// GET or HEAD.
    pub method: Method,
    /// `If-Match`
    pub if_match: Option<EntityTagList<'a>>,
    /// `If-None-Match`
    pub if_none_match: Option<EntityTagList<'a>>,
    /// `If-Modified-Since`
    pub if_modified_since: Option<SystemTime>,
    /// `If-Unmodified-Since`
    pub if_unmodified_since: Option<SystemTime>,
    /// `If-Range`
    pub if_range: Option<IfRange<'a>>,
    /// `Range`, where it is a valid `bytes` range set; not empty.
    pub range: Option<RangeSet>,
}

/// The request asks for something that must not be guessed: `If-Match` is malformed. The message is
/// meant for the client (400).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("If-Match: {0}")]
pub struct BadRequest(pub MalformedTag);

impl<'a> RequestHead<'a> {
    /// Gathers the fields of a request. What becomes of one that cannot be understood stands in the
    /// [module docs](self).
    ///
    /// # Errors
    /// [`BadRequest`] if there is an `If-Match` that cannot be understood to the last element.
    pub fn from_headers(method: Method, headers: &'a HeaderMap) -> Result<Self, BadRequest> {
        // One pass: a request has fewer fields than there are names to look up.
        let mut fields = Fields::default();
        for (name, value) in headers {
            match *name {
                IF_MATCH => fields.if_match = true,
                IF_NONE_MATCH => fields.if_none_match = true,
                IF_MODIFIED_SINCE => fields.if_modified_since.add(value),
                IF_UNMODIFIED_SINCE => fields.if_unmodified_since.add(value),
                IF_RANGE => fields.if_range.add(value),
                RANGE => fields.range.add(value),
                _ => {}
            }
        }
        let if_match = fields
            .if_match
            .then(|| tag_list(headers, &IF_MATCH))
            .transpose()
            .map_err(BadRequest)?;

        let mut if_modified_since = fields.if_modified_since.sole().and_then(parse_http_date);
        let if_none_match = match fields
            .if_none_match
            .then(|| tag_list(headers, &IF_NONE_MATCH))
        {
            Some(Err(MalformedTag { .. })) => {
                if_modified_since = None;
                None
            }
            Some(Ok(tags)) => Some(tags),
            None => None,
        };

        let if_range = fields.if_range.sole().and_then(IfRange::parse);
        let mut range = fields.range.sole().and_then(parse_range);
        if if_range.is_none() && !matches!(fields.if_range, Lines::None) {
            range = None;
        }

        Ok(Self {
            method,
            if_match,
            if_none_match,
            if_modified_since,
            if_unmodified_since: fields.if_unmodified_since.sole().and_then(parse_http_date),
            if_range,
            range,
        })
    }

    /// The revision the request is pinned to: the one tag of an `If-Match` that holds exactly one,
    /// and a strong one. `None` for no `If-Match`, `*`, a list, and a weak tag, which names no bytes.
    pub fn single_pin(&self) -> Option<EntityTag<'a>> {
        match self.if_match {
            Some(EntityTagList::Tag(tag)) if !tag.is_weak() => Some(tag),
            Some(EntityTagList::Any | EntityTagList::Tag(_) | EntityTagList::Tags(_)) | None => {
                None
            }
        }
    }
}

/// What is asked about.
#[derive(Clone, Copy, Debug)]
pub struct RepresentationMetadata<'a> {
    /// Strong.
    pub etag: EntityTag<'a>,
    /// Whole seconds; a fraction is cut off, as `Last-Modified` cannot say it.
    pub last_modified: Option<SystemTime>,
    /// Complete length.
    pub size: u64,
}

/// What the answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: each has exactly one status"
)]
pub enum Verdict {
    /// Everything: 200.
    Full,
    /// One or many ranges, in the order they were asked for and coalesced: 206. At least one, at
    /// most [`MAX_PARTS`](super::range::MAX_PARTS), disjoint.
    Partial(Ranges),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
    /// 416.
    Unsatisfiable,
}

/// Total and pure: preconditions in the order of RFC 9110 §13.2.2, then `Range`. The numbers are
/// that section's steps.
pub fn evaluate(request: &RequestHead<'_>, representation: &RepresentationMetadata<'_>) -> Verdict {
    // Where S3 gave no modification date, conditions on it are ignored (§13.1.3, §13.1.4).
    let modified_after = |date: SystemTime| {
        representation
            .last_modified
            .is_some_and(|modified| whole_seconds(modified) > whole_seconds(date))
    };

    if let Some(tags) = &request.if_match {
        // 1
        if !tags.strong_matches(representation.etag) {
            return Verdict::PreconditionFailed;
        }
    } else if request.if_unmodified_since.is_some_and(modified_after) {
        // 2
        return Verdict::PreconditionFailed;
    }

    if let Some(tags) = &request.if_none_match {
        // 3
        if tags.weak_matches(representation.etag) {
            return Verdict::NotModified;
        }
    } else if let Some(date) = request.if_modified_since
        && representation.last_modified.is_some()
        && !modified_after(date)
    {
        // 4
        return Verdict::NotModified;
    }

    // 5, with §14.2: Range is defined for GET only, and so is If-Range (§13.1.5).
    let Some(specs) = &request.range else {
        return Verdict::Full;
    };
    let applies = match request.method {
        Method::Get => request
            .if_range
            .as_ref()
            .is_none_or(|cond| cond.holds(representation)),
        Method::Head => false,
    };
    if !applies {
        return Verdict::Full;
    }
    resolve_all(specs, representation.size).map_or(Verdict::Unsatisfiable, Verdict::Partial)
}

/// Reads an HTTP-date in any of its three forms (RFC 9110 §5.6.7). `None`: it is none, which for
/// every field that holds one means that the field is ignored.
pub fn parse_http_date(value: &[u8]) -> Option<SystemTime> {
    httpdate::parse_http_date(std::str::from_utf8(value).ok()?).ok()
}

/// Seconds since 1970, the resolution of HTTP. No HTTP-date lies before.
fn whole_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The fields of a request that matter, as they are met.
#[derive(Default)]
struct Fields<'a> {
    if_match: bool,
    if_none_match: bool,
    if_modified_since: Lines<'a>,
    if_unmodified_since: Lines<'a>,
    if_range: Lines<'a>,
    range: Lines<'a>,
}

/// The lines of a field that must not be repeated.
#[derive(Default)]
enum Lines<'a> {
    #[default]
    None,
    One(&'a [u8]),
    Several,
}

impl<'a> Lines<'a> {
    fn add(&mut self, value: &'a HeaderValue) {
        *self = match self {
            Self::None => Self::One(value.as_bytes()),
            Self::One(_) | Self::Several => Self::Several,
        };
    }

    /// `None`: absent, or repeated.
    fn sole(&self) -> Option<&'a [u8]> {
        match self {
            Self::One(value) => Some(value),
            Self::None | Self::Several => None,
        }
    }
}

/// The list that all lines of a field make up.
fn tag_list<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<EntityTagList<'a>, MalformedTag> {
    EntityTagList::parse(headers.get_all(name).iter().map(HeaderValue::as_bytes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use smallvec::smallvec;

    use super::super::ByteRange;
    use super::super::etag::TagFault;
    use super::*;

    const OLDER: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const MODIFIED: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const NEWER: &str = "Sun, 06 Nov 1994 08:49:38 GMT";

    fn date(text: &str) -> SystemTime {
        parse_http_date(text.as_bytes()).unwrap()
    }

    /// 100 bytes, `"now"`, modified at [`MODIFIED`].
    fn representation() -> RepresentationMetadata<'static> {
        RepresentationMetadata {
            etag: EntityTag::strong(b"now"),
            last_modified: Some(date(MODIFIED)),
            size: 100,
        }
    }

    fn headers(fields: &[(HeaderName, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    fn get(fields: &[(HeaderName, &str)]) -> Verdict {
        let fields: Vec<_> = fields
            .iter()
            .map(|(n, v)| (n.clone(), v.as_bytes()))
            .collect();
        let headers = headers(&fields);
        let request = RequestHead::from_headers(Method::Get, &headers).unwrap();
        evaluate(&request, &representation())
    }

    fn partial(start: u64, end: u64) -> Verdict {
        Verdict::Partial(smallvec![ByteRange::from_bounds(start, end).unwrap()])
    }

    /// RFC 9110 §13.2.2, step by step and field by field as it is printed, over the truth of each
    /// condition. `None`: the field is absent, or is one of those that must be ignored.
    fn steps_of_13_2_2(
        get: bool,
        if_match: Option<bool>,
        if_unmodified_since: Option<bool>,
        if_none_match: Option<bool>,
        if_modified_since: Option<bool>,
        range: Option<Verdict>,
        if_range: Option<bool>,
    ) -> Verdict {
        let mut step = 1;
        loop {
            step = match step {
                1 => match if_match {
                    Some(true) => 3,
                    Some(false) => return Verdict::PreconditionFailed,
                    None => 2,
                },
                2 => match if_unmodified_since {
                    Some(true) | None => 3,
                    Some(false) => return Verdict::PreconditionFailed,
                },
                3 => match if_none_match {
                    Some(true) => 5,
                    Some(false) => return Verdict::NotModified,
                    None => 4,
                },
                4 => match if_modified_since {
                    Some(true) | None => 5,
                    Some(false) => return Verdict::NotModified,
                },
                _ => match (get, range, if_range) {
                    (true, Some(applied), Some(true) | None) => return applied,
                    _ => return Verdict::Full,
                },
            }
        }
    }

    /// Every row, and the field left out.
    fn absent_or<T: Clone>(rows: &[(&'static str, T)]) -> Vec<Option<(&'static str, T)>> {
        std::iter::once(None)
            .chain(rows.iter().cloned().map(Some))
            .collect()
    }

    #[test]
    fn every_combination_agrees_with_the_rfcs_steps() {
        // Each value with the truth of its condition, from §13.1.1 to §13.1.5.
        let if_match: &[(&str, bool)] = &[
            ("*", true),
            (r#""now""#, true),
            (r#""then", W/"x", "now""#, true),
            ("now", true),
            (r#"W/"now""#, false),
            (r#""then""#, false),
        ];
        let if_none_match: &[(&str, bool)] = &[
            ("*", false),
            (r#""now""#, false),
            (r#"W/"now""#, false),
            ("now", false),
            (r#""then", W/"x""#, true),
        ];
        let if_unmodified_since = &[(OLDER, false), (MODIFIED, true), (NEWER, true)];
        let if_modified_since = &[(OLDER, true), (MODIFIED, false), (NEWER, false)];
        let if_range: &[(&str, bool)] = &[
            (r#""now""#, true),
            ("now", true),
            (r#"W/"now""#, false),
            (r#""then""#, false),
            (MODIFIED, true),
            (OLDER, false),
            (NEWER, false),
            ("*", false),
            (r#""now", "now""#, false),
            ("garbled words", false),
        ];
        let range = &[
            ("bytes=10-19", partial(10, 20)),
            ("bytes=100-", Verdict::Unsatisfiable),
        ];

        let mut seen = 0;
        for im in absent_or(if_match) {
            for ius in absent_or(if_unmodified_since) {
                for inm in absent_or(if_none_match) {
                    for ims in absent_or(if_modified_since) {
                        for ir in absent_or(if_range) {
                            for r in absent_or(range) {
                                let fields: Vec<(HeaderName, &[u8])> = [
                                    (IF_MATCH, im.map(|row| row.0)),
                                    (IF_UNMODIFIED_SINCE, ius.map(|row| row.0)),
                                    (IF_NONE_MATCH, inm.map(|row| row.0)),
                                    (IF_MODIFIED_SINCE, ims.map(|row| row.0)),
                                    (IF_RANGE, ir.map(|row| row.0)),
                                    (RANGE, r.as_ref().map(|row| row.0)),
                                ]
                                .into_iter()
                                .filter_map(|(name, value)| Some((name, value?.as_bytes())))
                                .collect();
                                for method in [Method::Get, Method::Head] {
                                    let expected = steps_of_13_2_2(
                                        method == Method::Get,
                                        im.map(|row| row.1),
                                        ius.map(|row| row.1),
                                        inm.map(|row| row.1),
                                        ims.map(|row| row.1),
                                        r.as_ref().map(|row| row.1.clone()),
                                        ir.map(|row| row.1),
                                    );
                                    let headers = headers(&fields);
                                    let request =
                                        RequestHead::from_headers(method, &headers).unwrap();
                                    let verdict = evaluate(&request, &representation());
                                    assert_eq!(verdict, expected, "{request:?}");
                                    seen += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(seen, 7 * 4 * 6 * 4 * 11 * 3 * 2);
    }

    #[test]
    fn without_a_modification_date_conditions_on_it_are_ignored() {
        let undated = RepresentationMetadata {
            last_modified: None,
            ..representation()
        };
        for (name, expected) in [
            (IF_UNMODIFIED_SINCE, partial(0, 10)),
            (IF_MODIFIED_SINCE, partial(0, 10)),
            // Not ignored: it cannot hold (§13.1.5).
            (IF_RANGE, Verdict::Full),
        ] {
            for date in [OLDER, NEWER] {
                let fields = [(name.clone(), date.as_bytes()), (RANGE, &b"bytes=0-9"[..])];
                let headers = headers(&fields);
                let request = RequestHead::from_headers(Method::Get, &headers).unwrap();
                assert_eq!(evaluate(&request, &undated), expected, "{name}: {date}");
            }
        }
    }

    #[test]
    fn a_malformed_pin_is_never_ignored() {
        for (lines, element, fault) in [
            (&[""][..], 1, TagFault::Empty),
            (&[r#""now"#], 1, TagFault::Unterminated),
            (&[r#""now", then"#], 2, TagFault::Unquoted),
            (&["*", r#""now""#], 2, TagFault::StarInList),
            (&["a_b"], 1, TagFault::Unquoted),
        ] {
            let fields: Vec<_> = lines
                .iter()
                .map(|line| (IF_MATCH, line.as_bytes()))
                .collect();
            for method in [Method::Get, Method::Head] {
                let error = RequestHead::from_headers(method, &headers(&fields)).unwrap_err();
                assert_eq!(
                    error,
                    BadRequest(MalformedTag { element, fault }),
                    "{lines:?}"
                );
            }
        }
        let error = RequestHead::from_headers(Method::Get, &headers(&[(IF_MATCH, b"\"a\", \"b")]))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "If-Match: entity tag 2 has no closing double quote"
        );
    }

    #[test]
    fn several_lines_of_a_list_are_one_list() {
        let then_now = |name: HeaderName| get(&[(name.clone(), r#""then""#), (name, r#""now""#)]);
        assert_eq!(then_now(IF_MATCH), Verdict::Full);
        assert_eq!(then_now(IF_NONE_MATCH), Verdict::NotModified);
    }

    #[test]
    fn what_cannot_be_understood() {
        // If-None-Match goes, and takes If-Modified-Since along.
        assert_eq!(get(&[(IF_NONE_MATCH, r#""now"#)]), Verdict::Full);
        assert_eq!(get(&[(IF_NONE_MATCH, "")]), Verdict::Full);
        assert_eq!(
            get(&[(IF_NONE_MATCH, r#""now"#), (IF_MODIFIED_SINCE, NEWER)]),
            Verdict::Full
        );
        // Dates: none, a list in one line, and repeated (§13.1.3, §13.1.4).
        let list = format!("{OLDER}, {OLDER}");
        for name in [IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE] {
            for value in ["", "yesterday", "1994-11-06T08:49:37Z", r#""now""#, &list] {
                assert_eq!(
                    get(&[(name.clone(), value)]),
                    Verdict::Full,
                    "{name}: {value}"
                );
            }
        }
        assert_eq!(
            get(&[(IF_UNMODIFIED_SINCE, OLDER), (IF_UNMODIFIED_SINCE, OLDER)]),
            Verdict::Full
        );
        assert_eq!(
            get(&[(IF_MODIFIED_SINCE, NEWER), (IF_MODIFIED_SINCE, NEWER)]),
            Verdict::Full
        );
        // If-Range does not hold; without Range it means nothing.
        let range = (RANGE, "bytes=0-9");
        assert_eq!(get(&[range.clone(), (IF_RANGE, "")]), Verdict::Full);
        assert_eq!(get(&[range.clone(), (IF_RANGE, r#""now"#)]), Verdict::Full);
        assert_eq!(
            get(&[
                range.clone(),
                (IF_RANGE, r#""now""#),
                (IF_RANGE, r#""now""#)
            ]),
            Verdict::Full
        );
        assert_eq!(get(&[(IF_RANGE, r#""then""#)]), Verdict::Full);
        // Range.
        assert_eq!(get(&[(RANGE, "lines=0-9")]), Verdict::Full);
        assert_eq!(get(&[(RANGE, "bytes=5-2")]), Verdict::Full);
        assert_eq!(get(&[range.clone(), range]), Verdict::Full);
    }

    #[test]
    fn dates_are_compared_in_whole_seconds() {
        let written = RepresentationMetadata {
            last_modified: Some(date(MODIFIED) + Duration::from_millis(999)),
            ..representation()
        };
        for (name, expected) in [
            (IF_MODIFIED_SINCE, Verdict::NotModified),
            (IF_UNMODIFIED_SINCE, partial(0, 10)),
            (IF_RANGE, partial(0, 10)),
        ] {
            let fields = [
                (name.clone(), MODIFIED.as_bytes()),
                (RANGE, &b"bytes=0-9"[..]),
            ];
            let headers = headers(&fields);
            let request = RequestHead::from_headers(Method::Get, &headers).unwrap();
            assert_eq!(evaluate(&request, &written), expected, "{name}");
        }
    }

    #[test]
    fn all_three_forms_of_http_dates_are_read() {
        // §5.6.7
        for form in [
            MODIFIED,
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(
                date(form),
                UNIX_EPOCH + Duration::from_secs(784_111_777),
                "{form}"
            );
            assert!(
                matches!(IfRange::parse(form.as_bytes()), Some(IfRange::Date(at)) if at == date(form))
            );
        }
        assert_eq!(
            parse_http_date(b"Mon, 06 Nov 1994 08:49:37 GMT"),
            None,
            "it was a Sunday"
        );
        assert_eq!(parse_http_date(b"Sun, 06 Nov 1994 08:49:37 CET"), None);
        assert_eq!(parse_http_date(b"\xff"), None);
    }

    #[test]
    fn only_one_strong_tag_is_a_pin() {
        for (value, pin) in [
            (r#""now""#, Some("now")),
            ("now", Some("now")),
            (r#",, "now","#, Some("now")),
            (r#"W/"now""#, None),
            (r#""now", "then""#, None),
            ("*", None),
        ] {
            let headers = headers(&[(IF_MATCH, value.as_bytes())]);
            let request = RequestHead::from_headers(Method::Get, &headers).unwrap();
            let found = request.single_pin().map(EntityTag::opaque);
            assert_eq!(found, pin.map(str::as_bytes), "{value}");
        }
        assert!(
            RequestHead::from_headers(Method::Get, &headers(&[]))
                .unwrap()
                .single_pin()
                .is_none()
        );
    }

    proptest! {
        #[test]
        fn any_request_gets_an_answer(
            lines in prop::collection::vec(
                (
                    prop::sample::select(vec![
                        IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE, IF_RANGE, RANGE,
                    ]),
                    prop_oneof![
                        prop::collection::vec(any::<u8>(), 0..32),
                        "(bytes=|W/|\"now\"|\\*|[-0-9]{1,9}|, ){0,4}".prop_map(String::into_bytes),
                    ],
                ),
                0..6,
            ),
            size in any::<u64>(),
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.append(name, value);
                }
            }
            let representation = RepresentationMetadata { size, ..representation() };
            for method in [Method::Get, Method::Head] {
                let Ok(request) = RequestHead::from_headers(method, &headers) else {
                    prop_assert!(headers.contains_key(IF_MATCH));
                    continue;
                };
                prop_assert_eq!(request.if_match.is_some(), headers.contains_key(IF_MATCH));
                if let Verdict::Partial(parts) = evaluate(&request, &representation) {
                    prop_assert_eq!(method, Method::Get);
                    prop_assert!(!parts.is_empty());
                    prop_assert!(parts.iter().all(|part| part.end() <= size));
                }
            }
        }
    }
}
