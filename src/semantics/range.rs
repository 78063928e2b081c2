//! Byte ranges (RFC 9110 §14).
//!
//! Three steps, each of which can only go forward:
//!
//! 1. [`parse_range`] reads a `Range` field into [`RangeSpec`]s, what stands on the wire, or says
//!    that the field is to be ignored.
//! 2. [`RangeSpec::resolve`] applies one of them to a size. It is the only way for a caller outside
//!    the crate to get a [`ByteRange`], which therefore always holds at least one byte that exists.
//! 3. [`resolve_all`] does so for a whole set, coalesces, and bounds what one request may cost.
//!
//! The grammar is small and read as it stands in RFC 9110 (ADR 6, ADR 19). What we settled:
//!
//! | sent | meaning |
//! |---|---|
//! | `BYTES=0-9` | the unit's case does not matter (§14.1) |
//! | `bytes=0-9,, 20-29 ,` , `bytes= 0-9` | empty elements and whitespace around elements are skipped (§5.6.1.2) |
//! | `bytes=00-09` | leading zeros are digits like others |
//! | `bytes=0-99999999999999999999` | a last position past 64 bits lies past the end: clamped |
//! | `bytes=99999999999999999999-` | so does a first position: unsatisfiable |
//! | `bytes=-99999999999999999999` | a suffix longer than the object is the whole object (§14.1.2) |
//! | `bytes=-0` | valid, and unsatisfiable (§14.1.2) |
//! | `bytes=5-2`, `bytes=-`, `bytes=0-9,x`, `bytes=`, `bytes =0-9`, `lines=0-9` | the whole field is ignored (§14.2) |
//!
//! On an empty object every range is unsatisfiable, a suffix too. RFC 9110 §14.1.2 would let a
//! non-zero suffix select all zero bytes of it, but a 206 has no way to say "no bytes"; S3 answers
//! 416, and so do we.
//!
//! Guarded by: `ranges_agree_with_a_set_of_positions`, `syntax_agrees_with_a_naive_parser`, `syntax_agrees_with_http_range_header`,
//! `parse_of_format_is_identity`, `parser_never_panics`, `at_most_64_parts`, `at_most_max_specs_are_read`,
//! `arithmetic_holds_at_the_end_of_64_bits`.

use std::fmt;
use std::num::NonZeroU64;

use smallvec::{SmallVec, smallvec};

use super::trim_ows;

/// Most parts of one answer, after coalescing. Each costs a lookup and about 100 bytes of part
/// header; nobody downloads in more.
pub const MAX_PARTS: usize = 64;

/// Most specs of one `Range` field that are looked at. Adjacent ranges may be sent one by one and
/// coalesce, hence more than [`MAX_PARTS`]; a longer set is unsatisfiable as a whole.
pub const MAX_SPECS: usize = 4 * MAX_PARTS;

/// One range as it stands on the wire. `Display` writes it the same way, without the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §14.1.2")]
pub enum RangeSpec {
    /// `first-last`, both inclusive; `first <= last`.
    Closed {
        /// First byte.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// `first-`
    From(u64),
    /// `-length`
    Suffix(u64),
}

/// A satisfiable stretch of a representation: at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: NonZeroU64,
}

/// What a `Range` field holds: mostly one spec, which takes no allocation.
pub type RangeSet = SmallVec<[RangeSpec; 1]>;

/// What is to be sent: mostly one range, which takes no allocation.
pub type Ranges = SmallVec<[ByteRange; 1]>;

/// Reads the value of a `Range` field (RFC 9110 §14.2). `None`: the field is to be ignored, because
/// the unit is not `bytes` or the syntax is bad. Otherwise there is at least one spec.
///
/// Numbers past 64 bits become [`u64::MAX`], which is past the end of any object. Of a set of more
/// than [`MAX_SPECS`] only one spec more than that is read, which is how [`resolve_all`] knows it.
/// What stands behind is not looked at: the set is refused whatever it is.
pub fn parse_range(value: &[u8]) -> Option<RangeSet> {
    let (unit, set) = split_once(trim_ows(value), b'=')?;
    if !unit.eq_ignore_ascii_case(b"bytes") {
        return None;
    }
    let mut specs = RangeSet::new();
    for element in set.split(|byte| *byte == b',') {
        let element = trim_ows(element);
        if element.is_empty() {
            continue;
        }
        specs.push(parse_spec(element)?);
        if specs.len() > MAX_SPECS {
            break;
        }
    }
    (!specs.is_empty()).then_some(specs)
}

/// Reads one `range-spec`.
fn parse_spec(element: &[u8]) -> Option<RangeSpec> {
    let (first, last) = split_once(element, b'-')?;
    let (first, last) = (Number::new(first)?, Number::new(last)?);
    match (first.absent, last.absent) {
        (true, true) => None,
        (true, false) => Some(RangeSpec::Suffix(last.value())),
        (false, true) => Some(RangeSpec::From(first.value())),
        // On the digits as sent: past 64 bits, 9…9-9…8 is still backwards (§14.1.1).
        (false, false) => (!first.exceeds(&last)).then(|| RangeSpec::Closed {
            first: first.value(),
            last: last.value(),
        }),
    }
}

fn split_once(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == separator)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// The digits on one side of a spec's `-`; possibly none.
struct Number<'a> {
    absent: bool,
    /// Without leading zeros, so empty for zero too.
    significant: &'a [u8],
}

impl<'a> Number<'a> {
    /// `None`: holds something else than digits.
    fn new(digits: &'a [u8]) -> Option<Self> {
        let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
        digits.iter().all(u8::is_ascii_digit).then(|| Self {
            absent: digits.is_empty(),
            significant: &digits[zeros..],
        })
    }

    /// By value, whatever its length.
    fn exceeds(&self, other: &Self) -> bool {
        let (a, b) = (self.significant, other.significant);
        (a.len(), a) > (b.len(), b)
    }

    /// Clamped to 64 bits.
    fn value(&self) -> u64 {
        self.significant.iter().fold(0, |value: u64, digit| {
            value
                .saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        })
    }
}

/// Applies a set of specs to a representation of `size` bytes. `None`: unsatisfiable (416).
///
/// Specs that are unsatisfiable by themselves are left out. Ranges that overlap or touch become one
/// (RFC 9110 §15.3.7.2 allows it), which stands where the first of them was asked for; the others
/// keep their order. What is left is disjoint, so it never sums up to more than `size`.
///
/// Unsatisfiable are: a set of which nothing is left, any set on an empty representation, more than
/// [`MAX_PARTS`] ranges after coalescing, and more than [`MAX_SPECS`] before. RFC 9110 §14.2 lets a
/// server reject "many small ranges"; answering with the whole object instead would reward them.
pub fn resolve_all(specs: &[RangeSpec], size: u64) -> Option<Ranges> {
    if let [spec] = specs {
        return spec.resolve(size).map(|range| smallvec![range]);
    }
    if specs.len() > MAX_SPECS {
        return None;
    }
    let mut by_start: Vec<(ByteRange, usize)> = specs
        .iter()
        .enumerate()
        .filter_map(|(mentioned, spec)| Some((spec.resolve(size)?, mentioned)))
        .collect();
    by_start.sort_unstable_by_key(|(range, _)| range.start);

    let mut parts: Vec<(ByteRange, usize)> = Vec::with_capacity(by_start.len());
    for (range, mentioned) in by_start {
        match parts.last_mut() {
            Some((part, first_mentioned)) if range.start <= part.end() => {
                *part = part.hull(range);
                *first_mentioned = mentioned.min(*first_mentioned);
            }
            _ => parts.push((range, mentioned)),
        }
    }
    if parts.is_empty() || parts.len() > MAX_PARTS {
        return None;
    }
    parts.sort_unstable_by_key(|&(_, first_mentioned)| first_mentioned);
    Some(parts.into_iter().map(|(part, _)| part).collect())
}

impl RangeSpec {
    /// Applies the spec to a representation of `size` bytes, clamping (RFC 9110 §14.1.2). `None`:
    /// unsatisfiable.
    pub fn resolve(self, size: u64) -> Option<ByteRange> {
        match self {
            Self::Closed { first, last } => {
                ByteRange::from_bounds(first, last.saturating_add(1).min(size))
            }
            Self::From(first) => ByteRange::from_bounds(first, size),
            Self::Suffix(length) => ByteRange::from_bounds(size.saturating_sub(length), size),
        }
    }
}

impl fmt::Display for RangeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { first, last } => write!(f, "{first}-{last}"),
            Self::From(first) => write!(f, "{first}-"),
            Self::Suffix(length) => write!(f, "-{length}"),
        }
    }
}

impl ByteRange {
    /// `start..end`, where that holds at least one byte. Within the crate: outside it only
    /// [`RangeSpec::resolve`] and [`ByteRange::whole`] mint.
    pub(crate) fn from_bounds(start: u64, end: u64) -> Option<Self> {
        NonZeroU64::new(end.checked_sub(start)?).map(|len| Self { start, len })
    }

    /// Every byte of a representation of `size` bytes. `None`: it is empty.
    pub fn whole(size: u64) -> Option<Self> {
        Self::from_bounds(0, size)
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.len.get()
    }

    /// Last byte, inclusive, as HTTP writes it.
    pub fn last(self) -> u64 {
        self.end() - 1
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty by construction")]
    pub fn len(self) -> u64 {
        self.len.get()
    }

    /// The overlap of two ranges.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.start.max(other.start), self.end().min(other.end()))
    }

    /// The shortest range that holds both.
    fn hull(self, other: Self) -> Self {
        Self::from_bounds(self.start.min(other.start), self.end().max(other.end()))
            .expect("holds self, which is not empty")
    }

    /// The part of it from `offset` on.
    pub fn from_offset(self, offset: u64) -> Option<Self> {
        Self::from_bounds(self.start.max(offset), self.end())
    }

    /// The closed form to ask a remote for.
    pub fn spec(self) -> RangeSpec {
        RangeSpec::Closed {
            first: self.start,
            last: self.last(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use http_range_header::{EndPosition, StartPosition};
    use proptest::prelude::*;

    use super::RangeSpec::{Closed, From, Suffix};
    use super::*;

    /// What becomes of a field.
    #[derive(Debug, PartialEq)]
    enum Outcome {
        Ignored,
        Unsatisfiable,
        /// First and last byte of each part.
        Parts(Vec<(u64, u64)>),
    }
    use Outcome::{Ignored, Parts, Unsatisfiable};

    impl Outcome {
        fn parts(&self) -> Option<usize> {
            match self {
                Parts(parts) => Some(parts.len()),
                Ignored | Unsatisfiable => None,
            }
        }
    }

    fn select(field: &str, size: u64) -> Outcome {
        let Some(specs) = parse_range(field.as_bytes()) else {
            return Ignored;
        };
        resolve_all(&specs, size).map_or(Unsatisfiable, |parts| {
            Parts(
                parts
                    .into_iter()
                    .map(|part| (part.start(), part.last()))
                    .collect(),
            )
        })
    }

    #[test]
    fn examples_of_rfc_9110_14_1_2() {
        // "Assuming a representation of length 10000"
        for (field, expected) in [
            ("bytes=0-499", vec![(0, 499)]),
            ("bytes=500-999", vec![(500, 999)]),
            ("bytes=-500", vec![(9500, 9999)]),
            ("bytes=9500-", vec![(9500, 9999)]),
            ("bytes=0-0,-1", vec![(0, 0), (9999, 9999)]),
            (
                "bytes= 0-999, 4500-5499, -1000",
                vec![(0, 999), (4500, 5499), (9000, 9999)],
            ),
            // "other valid (but not canonical) specifications of the second 500 bytes"
            ("bytes=500-600,601-999", vec![(500, 999)]),
            ("bytes=500-700,601-999", vec![(500, 999)]),
        ] {
            assert_eq!(select(field, 10_000), Parts(expected), "{field}");
        }
    }

    #[test]
    fn what_readers_of_ranges_get_wrong() {
        for (field, size, expected) in [
            ("Bytes=0-9", 100, vec![(0, 9)]),
            ("BYTES=-1", 100, vec![(99, 99)]),
            ("bytes=0-9,,20-29", 100, vec![(0, 9), (20, 29)]),
            ("bytes=,0-9,\t,", 100, vec![(0, 9)]),
            ("bytes=\t 0-9 \t", 100, vec![(0, 9)]),
            ("bytes=0-9 , \t20-29", 100, vec![(0, 9), (20, 29)]),
            ("bytes=00-09", 100, vec![(0, 9)]),
            ("bytes=000000000000000000000000000007-8", 100, vec![(7, 8)]),
            ("bytes=-101", 100, vec![(0, 99)]),
            ("bytes=-18446744073709551616", 100, vec![(0, 99)]),
            ("bytes=-0050", 100, vec![(50, 99)]),
            ("bytes=20-29,0-9,5-24", 100, vec![(0, 29)]),
            ("bytes=0-18446744073709551615", 100, vec![(0, 99)]),
            ("bytes=1-18446744073709551616", 100, vec![(1, 99)]),
            (
                "bytes=1-99999999999999999999999999999999",
                100,
                vec![(1, 99)],
            ),
            ("bytes=200-300,5-6,-0", 100, vec![(5, 6)]),
        ] {
            assert_eq!(select(field, size), Parts(expected), "{field}");
        }
        for (field, size) in [
            ("bytes=-0", 100),
            ("bytes=-000", 100),
            ("bytes=100-", 100),
            ("bytes=100-200", 100),
            ("bytes=18446744073709551616-", u64::MAX),
            ("bytes=18446744073709551616-18446744073709551617", u64::MAX),
            ("bytes=18446744073709551615-", u64::MAX),
            ("bytes=100-,-0", 100),
            ("bytes=0-", 0),
            ("bytes=0-0", 0),
            ("bytes=-5", 0),
        ] {
            assert_eq!(select(field, size), Unsatisfiable, "{field}");
        }
        for field in [
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes= , \t",
            "=0-9",
            "0-9",
            "lines=0-9",
            "bytess=0-9",
            "bytes =0-9",
            "bytes:0-9",
            "bytes=5-2",
            "bytes=0-9,5-2",
            "bytes=18446744073709551617-18446744073709551616",
            "bytes=18446744073709551616-5",
            "bytes=-",
            "bytes=--1",
            "bytes=1--2",
            "bytes=1-2-3",
            "bytes=-1-",
            "bytes=9",
            "bytes=0-9;20-29",
            "bytes=0 -9",
            "bytes=0- 9",
            "bytes=0-9 20-29",
            "bytes=+0-9",
            "bytes=0-+9",
            "bytes=-+9",
            "bytes=0x0-9",
            "bytes=0-9.0",
            "bytes=0-9,x",
            "bytes=0-9,bytes=20-29",
            "bytes=٠-٩",
            "bytes=\u{a0}0-9",
            "bytes=\u{b}0-9",
            "bytes=0-9\n",
            "bytes=*",
        ] {
            assert_eq!(select(field, 100), Ignored, "{field:?}");
        }
        assert_eq!(parse_range(b"bytes=0-9\xff"), None);
    }

    #[test]
    fn parts_stand_where_they_were_first_asked_for() {
        for (field, expected) in [
            ("bytes=80-89,0-9", vec![(80, 89), (0, 9)]),
            // The last spec joins the second part and leaves it where it was.
            (
                "bytes=80-89,40-49,0-9,50-59",
                vec![(80, 89), (40, 59), (0, 9)],
            ),
            // One that bridges takes the earlier place.
            ("bytes=40-49,80-89,0-9,5-45", vec![(0, 49), (80, 89)]),
            // Adjacent becomes one; a gap of one byte does not.
            ("bytes=0-9,10-19,21-29", vec![(0, 19), (21, 29)]),
            ("bytes=0-99,10-19,99-", vec![(0, 99)]),
        ] {
            assert_eq!(select(field, 100), Parts(expected), "{field}");
        }
    }

    /// `0-0,2-2,4-4…`: as many specs as parts.
    fn scattered(n: u64) -> String {
        let specs: Vec<String> = (0..n).map(|i| format!("{0}-{0}", 2 * i)).collect();
        format!("bytes={}", specs.join(","))
    }

    #[test]
    fn at_most_64_parts() {
        assert_eq!(select(&scattered(64), 1000).parts(), Some(64));
        assert_eq!(select(&scattered(65), 1000), Unsatisfiable);
        // It is the parts that count, not the specs …
        assert_eq!(select(&(scattered(65) + ",1-1"), 1000).parts(), Some(64));
        // … nor those beyond the end of the object.
        assert_eq!(select(&scattered(65), 127).parts(), Some(64));
    }

    #[test]
    fn at_most_max_specs_are_read() {
        let repeated = |n: usize| format!("bytes={}", vec!["0-0"; n].join(","));
        assert_eq!(select(&repeated(MAX_SPECS), 100), Parts(vec![(0, 0)]));
        assert_eq!(select(&repeated(MAX_SPECS + 1), 100), Unsatisfiable);
        let specs = parse_range(repeated(100_000).as_bytes()).unwrap();
        assert_eq!(specs.len(), MAX_SPECS + 1);
        // What would be bad syntax is not even read there.
        assert_eq!(
            select(&(repeated(MAX_SPECS + 1) + ",x"), 100),
            Unsatisfiable
        );
        assert_eq!(select(&(repeated(MAX_SPECS) + ",x"), 100), Ignored);
    }

    #[test]
    fn arithmetic_holds_at_the_end_of_64_bits() {
        let whole = ByteRange::whole(u64::MAX).unwrap();
        assert_eq!(
            (whole.start(), whole.end(), whole.last()),
            (0, u64::MAX, u64::MAX - 1)
        );
        assert_eq!(
            Closed {
                first: 0,
                last: u64::MAX
            }
            .resolve(u64::MAX),
            Some(whole)
        );
        assert_eq!(Suffix(u64::MAX).resolve(u64::MAX), Some(whole));
        assert_eq!(From(u64::MAX).resolve(u64::MAX), None);
    }

    fn any_spec(top: u64) -> impl Strategy<Value = RangeSpec> {
        prop_oneof![
            (0..=top, 0..=top).prop_map(|(a, b)| Closed {
                first: a.min(b),
                last: a.max(b)
            }),
            (0..=top).prop_map(From),
            (0..=top).prop_map(Suffix),
        ]
    }

    fn format_set(specs: &[RangeSpec]) -> String {
        let specs: Vec<String> = specs.iter().map(ToString::to_string).collect();
        format!("bytes={}", specs.join(", "))
    }

    /// Whether a spec asks for the byte at `position`, by the words of RFC 9110 §14.1.2.
    fn asks_for(spec: RangeSpec, position: u64, size: u64) -> bool {
        position < size
            && match spec {
                Closed { first, last } => first <= position && position <= last,
                From(first) => first <= position,
                Suffix(length) => size - position <= length,
            }
    }

    /// The grammar of §14.1.1 with the decisions of the module's table, written a second time in
    /// the plainest way there is.
    fn naive_parse(field: &str) -> Option<RangeSet> {
        let field = field.trim_matches([' ', '\t']);
        let equals = field.find('=')?;
        if field[..equals].to_lowercase() != "bytes" {
            return None;
        }
        let number = |text: &str| -> Option<u128> {
            let digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
            digits.then(|| text.parse().unwrap())
        };
        let clamp = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
        let mut specs = Vec::new();
        for element in field[equals + 1..]
            .split(',')
            .map(|e| e.trim_matches([' ', '\t']))
        {
            if element.is_empty() {
                continue;
            }
            let sides: Vec<&str> = element.split('-').collect();
            specs.push(match sides[..] {
                ["", length] => Suffix(clamp(number(length)?)),
                [first, ""] => From(clamp(number(first)?)),
                [first, last] => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return None;
                    }
                    Closed {
                        first: clamp(first),
                        last: clamp(last),
                    }
                }
                _ => return None,
            });
        }
        (!specs.is_empty()).then(|| RangeSet::from_vec(specs))
    }

    /// Fields that are nearly always nearly valid. Numbers stay below 2^128, for the model's sake.
    fn likely_field() -> impl Strategy<Value = String> {
        let number = prop_oneof![
            "[0-9]{0,3}",
            "0{0,3}1844674407370955161[4-7]",
            "[0-9]{18,30}",
        ];
        let element = prop_oneof![
            8 => (number.clone(), number).prop_map(|(a, b)| format!("{a}-{b}")),
            1 => Just(String::new()),
            1 => "[-0-9 +a]{0,4}",
        ];
        let set = prop::collection::vec(("[ \t]{0,2}", element, "[ \t]{0,2}"), 0..5).prop_map(
            |elements| {
                elements
                    .into_iter()
                    .map(|(a, b, c)| a + &b + &c)
                    .collect::<Vec<_>>()
                    .join(",")
            },
        );
        let unit = prop_oneof![8 => "[bB][yY][tT][eE][sS]=", 1 => "[a-z ]{0,6}=?"];
        (unit, set).prop_map(|(unit, set)| unit + &set)
    }

    proptest! {
        #[test]
        fn ranges_agree_with_a_set_of_positions(
            specs in prop::collection::vec(any_spec(48), 1..8),
            size in 0..40u64,
        ) {
            let asked: BTreeSet<u64> = (0..size)
                .filter(|&at| specs.iter().any(|&spec| asks_for(spec, at, size)))
                .collect();
            let parts = resolve_all(&specs, size);
            prop_assert_eq!(parts.is_none(), asked.is_empty());

            let parts = parts.unwrap_or_default();
            let sent: Vec<u64> = parts.iter().flat_map(|part| part.start()..part.end()).collect();
            prop_assert!(sent.len() as u64 <= size);
            // Each byte once, and none that nobody asked for.
            prop_assert_eq!(sent.len(), asked.len());
            prop_assert_eq!(sent.into_iter().collect::<BTreeSet<_>>(), asked.clone());
            // Coalesced: no part begins right behind another's end.
            for part in &parts {
                prop_assert!(part.start() == 0 || !asked.contains(&(part.start() - 1)));
            }
            // In the order of the first spec that asks for any byte of it.
            let first_mention = |part: &ByteRange| {
                specs.iter().position(|&spec| {
                    (part.start()..part.end()).any(|at| asks_for(spec, at, size))
                })
            };
            prop_assert!(parts.is_sorted_by_key(first_mention));
        }

        #[test]
        fn one_spec_resolves_as_a_set_of_one(spec in any_spec(u64::MAX), size in any::<u64>()) {
            let alone = spec.resolve(size);
            prop_assert_eq!(resolve_all(&[spec], size), alone.map(|range| smallvec![range]));
            if let Some(range) = alone {
                prop_assert!(range.end() <= size);
                prop_assert_eq!(range.spec().resolve(size), Some(range));
            }
        }

        #[test]
        fn parse_of_format_is_identity(specs in prop::collection::vec(any_spec(u64::MAX), 1..8)) {
            prop_assert_eq!(parse_range(format_set(&specs).as_bytes()), Some(RangeSet::from_vec(specs)));
        }

        #[test]
        fn syntax_agrees_with_a_naive_parser(field in likely_field()) {
            prop_assert_eq!(parse_range(field.as_bytes()), naive_parse(&field), "{:?}", field);
        }

        /// The parser of tower-http, wherever it accepts a field and RFC 9110 does too.
        #[test]
        fn syntax_agrees_with_http_range_header(field in likely_field()) {
            if let Ok(theirs) = http_range_header::parse_range_header(&field) {
                let theirs = theirs.ranges.iter().map(|range| match (range.start, range.end) {
                    (StartPosition::Index(first), EndPosition::Index(last)) => {
                        (first <= last).then_some(Closed { first, last })
                    }
                    (StartPosition::Index(first), EndPosition::LastByte) => Some(From(first)),
                    (StartPosition::FromLast(length), _) => Some(Suffix(length)),
                });
                let theirs: Option<RangeSet> = theirs.collect();
                prop_assert_eq!(parse_range(field.as_bytes()), theirs, "{:?}", field);
            }
        }

        #[test]
        fn parser_never_panics(
            mut prefix in prop::sample::select(vec![b"".to_vec(), b"bytes=".to_vec()]),
            rest in prop::collection::vec(any::<u8>(), 0..64),
            size in any::<u64>(),
        ) {
            prefix.extend(rest);
            if let Some(specs) = parse_range(&prefix) {
                prop_assert!(!specs.is_empty());
                resolve_all(&specs, size);
            }
        }
    }
}
