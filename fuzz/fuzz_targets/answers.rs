//! What comes back from the remote and from the catalog.

use http::{HeaderName, HeaderValue};
use pinrange::remote::s3::fuzzing::{Made, head};
use pinrange::semantics::RangeSpec;

/// Compiled a second time: nobody else's business.
#[path = "../../src/disk"]
mod disk {
    #[allow(dead_code, reason = "the geometry is the tests' in there")]
    mod coverage;

    /// Bits as they are stored, against one flag for each block.
    pub(super) fn coverage(blocks: u32, stored: &[u8]) {
        let Some(read) = coverage::Coverage::from_bytes(blocks, stored) else {
            let words = blocks.div_ceil(64) as usize;
            let stray = (blocks..).take(64).any(|block| {
                stored
                    .get(block as usize / 8)
                    .is_some_and(|byte| byte & 1 << (block % 8) != 0)
            });
            assert!(stored.len() != words * 8 || stray, "refused for no reason");
            return;
        };
        assert_eq!(read.to_bytes(), stored);
        let flags: Vec<bool> = (0..blocks as usize)
            .map(|block| stored[block / 8] & 1 << (block % 8) != 0)
            .collect();
        let first = |from: usize, wanted: bool| {
            let found = flags.iter().skip(from).position(|flag| *flag == wanted);
            found.map_or(flags.len(), |distance| from + distance)
        };
        for from in 0..=flags.len() {
            let at = u32::try_from(from).expect("few blocks");
            assert_eq!(read.contains(at), flags.get(from) == Some(&true));
            assert_eq!(read.first_absent(at) as usize, first(from, false));
            assert_eq!(read.first_present(at) as usize, first(from, true));
        }
        let present: Vec<_> = read.iter().map(|block| block as usize).collect();
        let set = |block: &usize| flags[*block];
        assert_eq!(present, (0..flags.len()).filter(set).collect::<Vec<_>>());
        assert_eq!(read.is_empty(), present.is_empty());
    }
}

pub(crate) fn run(mut data: &[u8]) {
    if crate::byte(&mut data) % 4 == 0 {
        let blocks = u32::from(crate::byte(&mut data)) * 2;
        return disk::coverage(blocks, data);
    }
    response(data);
}

/// Whatever S3 says: what is taken for bytes of an object is the range that was asked for.
fn response(mut data: &[u8]) {
    const STATUS: [u16; 8] = [206, 206, 200, 304, 403, 404, 416, 503];
    let status = STATUS[usize::from(crate::byte(&mut data) & 7)];
    let (shape, first, more) = (
        crate::byte(&mut data),
        crate::number(&mut data),
        crate::number(&mut data),
    );
    let want = match shape % 4 {
        0 => None,
        1 => Some(RangeSpec::From(first)),
        2 => Some(RangeSpec::Suffix(more)),
        _ => Some(RangeSpec::Closed {
            first,
            last: first.saturating_add(more),
        }),
    };
    let text = String::from_utf8_lossy(data);
    let fields: Vec<_> = text
        .split('\n')
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        // What an HTTP client lets through.
        .filter(|(name, value)| {
            HeaderName::from_bytes(name.as_bytes()).is_ok() && HeaderValue::from_str(value).is_ok()
        })
        .collect();
    let field = |name: &str| {
        let mut found = fields.iter().filter(|(there, _)| there == name);
        (
            found.next().map(|(_, value)| value.as_str()),
            found.next().is_some(),
        )
    };
    let made = head(status, fields.clone(), want);
    if let Made::Part(representation, range) = &made {
        assert_eq!(status, 206);
        assert!(range.end() <= representation.size);
        assert_eq!(
            want.and_then(|want| want.resolve(representation.size)),
            Some(*range)
        );
        let (said, twice) = field("content-range");
        let written = format!(
            "bytes {}-{}/{}",
            range.start(),
            range.last(),
            representation.size
        );
        // Leading zeros are digits.
        let numbers = |text: &str| -> Vec<u128> {
            text.split(|c: char| !c.is_ascii_digit())
                .filter_map(|digits| digits.parse().ok())
                .collect()
        };
        assert_eq!(numbers(said.unwrap_or("")), numbers(&written), "{said:?}");
        assert!(!twice, "two of them");
        if let (Some(length), _) = field("content-length") {
            assert_eq!(length.parse(), Ok(range.len()));
        }
    }
    if let Made::Whole(representation, range) = &made {
        assert_eq!(status, 200);
        assert_eq!(range.map_or(0, |range| range.len()), representation.size);
    }
    if let Made::Part(representation, _) | Made::Whole(representation, _) = &made {
        let tag = representation.validator.as_field_value();
        let (said, twice) = field("etag");
        assert!(!twice && said == Some(tag), "{tag} of {said:?}");
        for (_, value) in &representation.headers {
            assert!(
                !value.contains(['\r', '\n', '\0']),
                "{value:?} would end the field"
            );
        }
    }
}
