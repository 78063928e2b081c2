//! Entity tags, ranges, conditions.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{
    HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    IF_UNMODIFIED_SINCE, RANGE,
};
use pinrange::semantics::precondition::Method;
use pinrange::semantics::range::{parse_range, resolve_all};
use pinrange::semantics::{
    ByteRange, EntityTag, EntityTagList, IfRange, RangeSpec, RepresentationMetadata, RequestHead,
    Verdict, evaluate,
};

const FIELDS: [HeaderName; 6] = [
    IF_MATCH,
    IF_NONE_MATCH,
    IF_MODIFIED_SINCE,
    IF_UNMODIFIED_SINCE,
    IF_RANGE,
    RANGE,
];

/// A request a line: the first byte says which field the rest is.
pub(crate) fn run(mut data: &[u8]) {
    let method = if crate::byte(&mut data) & 3 == 0 {
        Method::Head
    } else {
        Method::Get
    };
    let size = crate::number(&mut data);
    let modified = crate::number(&mut data) % 4_000_000_000;
    let metadata = RepresentationMetadata {
        etag: EntityTag::strong(b"a"),
        last_modified: (modified % 5 != 0).then(|| UNIX_EPOCH + Duration::from_secs(modified)),
        size,
    };
    let mut fields = HeaderMap::new();
    for line in crate::lines(data) {
        let Some((which, value)) = line.split_first() else {
            continue;
        };
        tag(value);
        ranges(value, size);
        if let Ok(value) = HeaderValue::from_bytes(value) {
            fields.append(FIELDS[usize::from(*which) % FIELDS.len()].clone(), value);
        }
    }
    let Ok(head) = RequestHead::from_headers(method, &fields) else {
        // Only a pin is refused.
        assert!(fields.contains_key(IF_MATCH));
        return;
    };
    assert_eq!(
        fields.contains_key(IF_MATCH),
        head.if_match.is_some(),
        "a pin was ignored"
    );
    let verdict = evaluate(&head, &metadata);
    assert_eq!(verdict, naive(&head, &metadata), "{head:?} {metadata:?}");
}

/// A tag, written and read again, is the same.
fn tag(value: &[u8]) {
    if let Ok(tag) = EntityTag::parse(value) {
        let written = tag.to_field_value();
        let again = EntityTag::parse(&written).expect("our own writing");
        assert_eq!(tag.is_weak(), again.is_weak());
        assert!(tag.weak_eq(again));
        assert_eq!(tag.strong_eq(again), !tag.is_weak());
    }
    if let Ok(list) = EntityTagList::parse([value])
        && !list.tags().is_empty()
    {
        let tags = list.tags();
        let written: Vec<_> = tags.iter().map(|tag| tag.to_field_value()).collect();
        let written = written.join(&b", "[..]);
        let again = EntityTagList::parse([&written[..]]).expect("our own writing");
        assert_eq!(tags.len(), again.tags().len());
        assert!(std::iter::zip(tags, again.tags()).all(|(tag, again)| tag.weak_eq(*again)));
    }
}

/// What is asked for, in whole numbers without end: `first..end`.
fn naive_bounds(spec: RangeSpec, size: u64) -> Option<(u128, u128)> {
    let size = u128::from(size);
    let (start, end) = match spec {
        RangeSpec::Closed { first, last } => (u128::from(first), (u128::from(last) + 1).min(size)),
        RangeSpec::From(first) => (u128::from(first), size),
        RangeSpec::Suffix(length) => (size - u128::from(length).min(size), size),
    };
    (start < end).then_some((start, end))
}

fn ranges(value: &[u8], size: u64) {
    let Some(specs) = parse_range(value) else {
        return;
    };
    for spec in &specs {
        let resolved = spec.resolve(size);
        let bounds = resolved.map(|range| (u128::from(range.start()), u128::from(range.end())));
        assert_eq!(bounds, naive_bounds(*spec, size), "{spec:?} of {size}");
    }
    let written: Vec<String> = specs.iter().map(ToString::to_string).collect();
    let again = parse_range(format!("bytes={}", written.join(",")).as_bytes());
    assert_eq!(again.as_ref(), Some(&specs), "our own writing");
    let Some(parts) = resolve_all(&specs, size) else {
        return;
    };
    // Every byte that was asked for, no other, none twice, in at most 64 parts.
    assert!(!parts.is_empty() && parts.len() <= 64);
    let total: u128 = parts.iter().map(|part| u128::from(part.len())).sum();
    assert!(total <= u128::from(size), "more than the object");
    let holds = |at: u128| {
        let within =
            |part: &&ByteRange| u128::from(part.start()) <= at && at < u128::from(part.end());
        parts.iter().filter(within).count()
    };
    for (start, end) in specs.iter().filter_map(|spec| naive_bounds(*spec, size)) {
        assert_eq!((holds(start), holds(end - 1)), (1, 1));
    }
    for part in &parts {
        let asked = specs
            .iter()
            .filter_map(|spec| naive_bounds(*spec, size))
            .any(|(start, _)| start == u128::from(part.start()));
        assert!(asked, "{part:?} begins where nothing was asked for");
    }
}

/// RFC 9110 §13.2.2, as it is written there.
fn naive(head: &RequestHead<'_>, metadata: &RepresentationMetadata<'_>) -> Verdict {
    let later = |date: SystemTime| -> Option<bool> {
        let seconds = |time: SystemTime| {
            time.duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs())
        };
        Some(seconds(metadata.last_modified?) > seconds(date))
    };
    let etag = &metadata.etag;
    let found = |list: &EntityTagList<'_>, strongly: bool| {
        matches!(list, EntityTagList::Any)
            || list.tags().iter().any(|tag| {
                tag.opaque() == etag.opaque() && !(strongly && (tag.is_weak() || etag.is_weak()))
            })
    };
    match (&head.if_match, head.if_unmodified_since) {
        (Some(list), _) if !found(list, true) => return Verdict::PreconditionFailed,
        (None, Some(date)) if later(date) == Some(true) => return Verdict::PreconditionFailed,
        _ => {}
    }
    match (&head.if_none_match, head.if_modified_since) {
        (Some(list), _) if found(list, false) => return Verdict::NotModified,
        (None, Some(date)) if later(date) == Some(false) => return Verdict::NotModified,
        _ => {}
    }
    let (Method::Get, Some(specs)) = (head.method, &head.range) else {
        return Verdict::Full;
    };
    let unchanged = match &head.if_range {
        None => true,
        Some(IfRange::Tag(tag)) => {
            !tag.is_weak() && !etag.is_weak() && tag.opaque() == etag.opaque()
        }
        // In whole seconds, neither later nor earlier.
        Some(IfRange::Date(date)) => {
            let written = httpdate::fmt_http_date(*date);
            metadata.last_modified.map(httpdate::fmt_http_date) == Some(written)
        }
    };
    if !unchanged {
        return Verdict::Full;
    }
    match resolve_all(specs, metadata.size) {
        Some(parts) => Verdict::Partial(parts),
        None => Verdict::Unsatisfiable,
    }
}
