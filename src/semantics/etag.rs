//! Entity tags (RFC 9110 §8.8.3) and the lists of them in `If-Match` and `If-None-Match` (§13.1.1,
//! §13.1.2).
//!
//! An [`EntityTag`] cannot be compared with `==`: the caller says [`EntityTag::strong_eq`] or
//! [`EntityTag::weak_eq`], since taking the wrong one is how a weak tag slips through `If-Match`.
//!
//! [`EntityTagList::parse`] takes all lines of a field, as §5.3 joins them, and either understands
//! every element or returns [`MalformedTag`]. It never drops an element it could not read, because
//! a pin that is skipped is a pin that does not hold. What it accepts:
//!
//! - `"abc"`, `W/"abc"`, with any visible ASCII but `"` and any `obs-text` (bytes 80–FF) inside, so
//!   a comma there is no separator. A space inside is malformed, as in the grammar.
//! - Lists with optional whitespace and empty elements (§5.6.1.2), up to [`MAX_TAGS`] tags.
//! - `*`, which must be the only element.
//! - **One unquoted tag** of letters, digits and `-`, which must be the only element and counts as
//!   strong. S3 accepts it, tools print tags without quotes, and people paste them. The rule holds
//!   in `If-Match`, `If-None-Match` and `If-Range` alike: such a word can mean only one tag, is
//!   neither `*` nor a date, and reading it costs a wrong guess nothing (a 412, or a full answer),
//!   whereas ignoring it in `If-None-Match` or `If-Range` would send a terabyte again.
//!
//! An empty list is malformed here, though the grammar allows it: it names no revision, so it is
//! a pin whose tag got lost (an unset variable in a script), and "the pin is empty" helps more than 412.
//!
//! Guarded by: `parse_of_format_is_identity`, `no_element_is_ever_dropped`, `parsers_never_panic`,
//! `comparison_table_of_rfc_9110_8_8_3_2`.

use std::fmt;

use super::{is_ows, trim_ows};

/// Most tags that one list may hold. Real clients send one, and caches one per stored variant; the
/// bound keeps a header's worth of tags from turning into as many allocations.
pub const MAX_TAGS: usize = 128;

/// An entity tag, read where it stands: in a field or a validator. No `PartialEq`: callers choose
/// [`EntityTag::strong_eq`] or [`EntityTag::weak_eq`].
#[derive(Clone, Copy)]
pub struct EntityTag<'a> {
    weak: bool,
    opaque: &'a [u8],
}

impl<'a> EntityTag<'a> {
    /// A strong tag with this opaque part (without quotes), which consists of `etagc` (RFC 9110
    /// §8.8.3): no control character, space, `"` or DEL.
    pub fn strong(opaque: &'a [u8]) -> Self {
        debug_assert!(
            opaque.iter().copied().all(is_etagc),
            "not an opaque-tag: {opaque:?}"
        );
        Self {
            weak: false,
            opaque,
        }
    }

    /// Reads a field value that is exactly one quoted tag, as in `ETag`. Whitespace around it is
    /// allowed, the unquoted form is not.
    ///
    /// # Errors
    /// [`MalformedTag`] says what is wrong.
    pub fn parse(value: &'a [u8]) -> Result<Self, MalformedTag> {
        let value = trim_ows(value);
        let fault = |fault| MalformedTag { element: 1, fault };
        if value.is_empty() {
            return Err(fault(TagFault::Empty));
        }
        let (tag, rest) = take_quoted(value).map_err(fault)?;
        if rest.is_empty() {
            Ok(tag)
        } else {
            Err(fault(TagFault::Trailing))
        }
    }

    /// The unquoted form that requests may use (module docs).
    pub(super) fn from_unquoted(word: &'a [u8]) -> Option<Self> {
        let understood = !word.is_empty()
            && word
                .iter()
                .all(|&byte| byte.is_ascii_alphanumeric() || byte == b'-');
        understood.then(|| Self::strong(word))
    }

    /// Whether it starts with `W/`.
    pub fn is_weak(self) -> bool {
        self.weak
    }

    /// What stands between the quotes.
    pub fn opaque(self) -> &'a [u8] {
        self.opaque
    }

    /// RFC 9110 §8.8.3.2: both strong and the same.
    pub fn strong_eq(self, other: EntityTag<'_>) -> bool {
        !self.weak && !other.weak && self.opaque == other.opaque
    }

    /// RFC 9110 §8.8.3.2: the same opaque part.
    pub fn weak_eq(self, other: EntityTag<'_>) -> bool {
        self.opaque == other.opaque
    }

    /// As it stands in a field, quotes included. Bytes, not text: `obs-text` need not be UTF-8.
    pub fn to_field_value(self) -> Vec<u8> {
        let prefix: &[u8] = if self.weak { b"W/\"" } else { b"\"" };
        [prefix, self.opaque, b"\""].concat()
    }
}

impl fmt::Debug for EntityTag<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.to_field_value()))
    }
}

/// The value of `If-Match` or `If-None-Match`.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §13.1.1")]
pub enum EntityTagList<'a> {
    /// `*`
    Any,
    /// One tag, as nearly all clients send it.
    Tag(EntityTag<'a>),
    /// Two tags or more.
    Tags(Vec<EntityTag<'a>>),
}

impl<'a> EntityTagList<'a> {
    /// Reads a field from the values of all its lines, in order (module docs: what is accepted).
    ///
    /// # Errors
    /// [`MalformedTag`] for the first element that cannot be understood, and for a field without
    /// any element.
    pub fn parse(lines: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, MalformedTag> {
        /// What the elements so far amount to.
        enum Seen<'a> {
            Nothing,
            Star,
            Unquoted(EntityTag<'a>),
            Quoted(EntityTag<'a>),
            Several(Vec<EntityTag<'a>>),
        }
        let mut seen = Seen::Nothing;
        let mut element = 0;
        for line in lines {
            let mut rest = skip_separators(line);
            while !rest.is_empty() {
                element += 1;
                let fault = |fault| MalformedTag { element, fault };
                let (item, after) = take_element(rest).map_err(fault)?;
                seen = match (seen, item) {
                    (Seen::Nothing, Element::Star) => Seen::Star,
                    (Seen::Nothing, Element::Unquoted(tag)) => Seen::Unquoted(tag),
                    (Seen::Nothing, Element::Quoted(tag)) => Seen::Quoted(tag),
                    (Seen::Quoted(first), Element::Quoted(tag)) => Seen::Several(vec![first, tag]),
                    (Seen::Several(mut tags), Element::Quoted(tag)) if tags.len() < MAX_TAGS => {
                        tags.push(tag);
                        Seen::Several(tags)
                    }
                    (Seen::Several(_), Element::Quoted(_)) => return Err(fault(TagFault::TooMany)),
                    (Seen::Star, _) | (_, Element::Star) => {
                        return Err(fault(TagFault::StarInList));
                    }
                    // The first one is to blame: alone it would have been fine.
                    (Seen::Unquoted(_), _) => {
                        return Err(MalformedTag {
                            element: 1,
                            fault: TagFault::Unquoted,
                        });
                    }
                    (Seen::Quoted(_) | Seen::Several(_), Element::Unquoted(_)) => {
                        return Err(fault(TagFault::Unquoted));
                    }
                };
                rest = skip_separators(after);
            }
        }
        match seen {
            Seen::Nothing => Err(MalformedTag {
                element: 1,
                fault: TagFault::Empty,
            }),
            Seen::Star => Ok(Self::Any),
            Seen::Unquoted(tag) | Seen::Quoted(tag) => Ok(Self::Tag(tag)),
            Seen::Several(tags) => Ok(Self::Tags(tags)),
        }
    }

    /// Its tags; of `*`, none.
    pub fn tags(&self) -> &[EntityTag<'a>] {
        match self {
            Self::Any => &[],
            Self::Tag(tag) => std::slice::from_ref(tag),
            Self::Tags(tags) => tags,
        }
    }

    /// Whether a tag of the list is [`EntityTag::strong_eq`] to `current`. `*` is, to any
    /// representation that exists.
    pub fn strong_matches(&self, current: EntityTag<'_>) -> bool {
        matches!(self, Self::Any) || self.tags().iter().any(|tag| tag.strong_eq(current))
    }

    /// Whether a tag of the list is [`EntityTag::weak_eq`] to `current`. `*` is, to any
    /// representation that exists.
    pub fn weak_matches(&self, current: EntityTag<'_>) -> bool {
        matches!(self, Self::Any) || self.tags().iter().any(|tag| tag.weak_eq(current))
    }
}

/// A field that should hold entity tags holds something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entity tag {element} {fault}")]
pub struct MalformedTag {
    /// Which element of the list, counted from 1 over all lines, empty ones left out.
    pub element: usize,
    /// What is wrong with it.
    pub fault: TagFault,
}

/// What is wrong with an entity tag. The text completes "entity tag 2 …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TagFault {
    /// No element at all.
    #[error(
        "is missing: the field is empty. Send a tag as the ETag field shows it, or leave the field out"
    )]
    Empty,
    /// More than [`MAX_TAGS`].
    #[error("is one too many: a list may hold {MAX_TAGS}")]
    TooMany,
    /// No quotes where they are needed.
    #[error(
        "is not in double quotes: send it as the ETag field shows it, as in \"abc\" (only a tag of letters, digits and '-' that stands alone may go without)"
    )]
    Unquoted,
    /// `w/"…"`.
    #[error("starts with 'w/': the mark of a weak tag is an upper-case 'W/'")]
    LowerCaseWeak,
    /// No closing quote.
    #[error("has no closing double quote")]
    Unterminated,
    /// A byte that cannot stand in a tag.
    #[error("holds the byte 0x{0:02x}, which cannot stand in an entity tag")]
    ForbiddenByte(u8),
    /// Something between the closing quote and the next comma.
    #[error("goes on after its closing double quote: separate tags with commas")]
    Trailing,
    /// `*` among tags.
    #[error("stands in a list with '*', which must be the only element")]
    StarInList,
}

enum Element<'a> {
    Star,
    Unquoted(EntityTag<'a>),
    Quoted(EntityTag<'a>),
}

/// RFC 9110 §8.8.3: `etagc = %x21 / %x23-7E / obs-text`.
fn is_etagc(byte: u8) -> bool {
    matches!(byte, 0x21 | 0x23..=0x7e | 0x80..)
}

/// Commas and whitespace before an element. Since empty elements are allowed, how many does not
/// matter.
fn skip_separators(mut bytes: &[u8]) -> &[u8] {
    while let [first, rest @ ..] = bytes
        && (is_ows(*first) || *first == b',')
    {
        bytes = rest;
    }
    bytes
}

/// The element at the start of `bytes` (not empty, no separator), and what follows it: nothing, or
/// a comma first.
fn take_element(bytes: &[u8]) -> Result<(Element<'_>, &[u8]), TagFault> {
    if let [b'"', ..] | [b'W' | b'w', b'/', b'"', ..] = bytes {
        let (tag, after) = take_quoted(bytes)?;
        let after = trim_ows(after);
        return match after.first() {
            None | Some(b',') => Ok((Element::Quoted(tag), after)),
            Some(_) => Err(TagFault::Trailing),
        };
    }
    let end = bytes
        .iter()
        .position(|&byte| byte == b',')
        .unwrap_or(bytes.len());
    let (word, after) = bytes.split_at(end);
    let word = trim_ows(word);
    if word == b"*" {
        return Ok((Element::Star, after));
    }
    match EntityTag::from_unquoted(word) {
        Some(tag) => Ok((Element::Unquoted(tag), after)),
        None => Err(TagFault::Unquoted),
    }
}

/// The quoted tag at the start of `bytes`, and what follows the closing quote.
fn take_quoted(bytes: &[u8]) -> Result<(EntityTag<'_>, &[u8]), TagFault> {
    let (weak, quoted) = match bytes {
        [b'W', b'/', rest @ ..] => (true, rest),
        [b'w', b'/', b'"', ..] => return Err(TagFault::LowerCaseWeak),
        _ => (false, bytes),
    };
    let [b'"', inner @ ..] = quoted else {
        return Err(TagFault::Unquoted);
    };
    match inner.iter().position(|&byte| !is_etagc(byte)) {
        Some(end) if inner[end] == b'"' => Ok((
            EntityTag {
                weak,
                opaque: &inner[..end],
            },
            &inner[end + 1..],
        )),
        Some(end) => Err(TagFault::ForbiddenByte(inner[end])),
        None => Err(TagFault::Unterminated),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a list was understood as, in a form that can be compared.
    fn parse(lines: &[&[u8]]) -> Result<Vec<Vec<u8>>, (usize, TagFault)> {
        match EntityTagList::parse(lines.iter().copied()) {
            Ok(EntityTagList::Any) => Ok(vec![b"*".to_vec()]),
            Ok(list) => {
                let tags = list.tags().iter().copied();
                Ok(tags.map(EntityTag::to_field_value).collect())
            }
            Err(MalformedTag { element, fault }) => Err((element, fault)),
        }
    }

    fn tag(field: &str) -> EntityTag<'_> {
        EntityTag::parse(field.as_bytes()).unwrap()
    }

    #[test]
    fn comparison_table_of_rfc_9110_8_8_3_2() {
        let rows = [
            (r#"W/"1""#, r#"W/"1""#, false, true),
            (r#"W/"1""#, r#"W/"2""#, false, false),
            (r#"W/"1""#, r#""1""#, false, true),
            (r#""1""#, r#""1""#, true, true),
        ];
        for (a, b, strong, weak) in rows {
            let (a, b) = (tag(a), tag(b));
            assert_eq!(a.strong_eq(b), strong, "{a:?} {b:?}");
            assert_eq!(b.strong_eq(a), strong, "{b:?} {a:?}");
            assert_eq!(a.weak_eq(b), weak, "{a:?} {b:?}");
            assert_eq!(b.weak_eq(a), weak, "{b:?} {a:?}");
        }
    }

    #[test]
    fn lists_that_are_understood() {
        type Lines<'a> = &'a [&'a [u8]];
        let rows: &[(Lines<'_>, Lines<'_>)] = &[
            // The examples of RFC 9110 §8.8.3, §13.1.1 and §13.1.2.
            (&[br#""xyzzy""#], &[br#""xyzzy""#]),
            (&[br#"W/"xyzzy""#], &[br#"W/"xyzzy""#]),
            (&[br#""""#], &[br#""""#]),
            (
                &[br#""xyzzy", "r2d2xxxx", "c3piozzzz""#],
                &[br#""xyzzy""#, br#""r2d2xxxx""#, br#""c3piozzzz""#],
            ),
            (
                &[br#"W/"xyzzy", W/"r2d2xxxx""#],
                &[br#"W/"xyzzy""#, br#"W/"r2d2xxxx""#],
            ),
            (&[b"*"], &[b"*"]),
            // §8.8.3: commas, backslashes and obs-text are etagc; there is no escape.
            (&[br#""a,b", "c\""#], &[br#""a,b""#, br#""c\""#]),
            (&[b"\"\x80\xff\""], &[b"\"\x80\xff\""]),
            // §5.6.1.2: empty elements; §5.6.3: optional whitespace.
            (&[b",, \t\"a\" ,\t, W/\"b\",,"], &[br#""a""#, br#"W/"b""#]),
            (&[br#""a","b""#], &[br#""a""#, br#""b""#]),
            (&[b" * "], &[b"*"]),
            // §5.3: lines are one list.
            (
                &[br#""a""#, b"", br#""b", "c""#],
                &[br#""a""#, br#""b""#, br#""c""#],
            ),
            // S3's unquoted form, whatever the method of upload.
            (&[b"abc123-5"], &[br#""abc123-5""#]),
            (
                &[b" 9e107d9d372bb6826bd81d3542a419d6 ,"],
                &[br#""9e107d9d372bb6826bd81d3542a419d6""#],
            ),
            (&[b"W"], &[br#""W""#]),
        ];
        for (lines, tags) in rows {
            let tags = tags.iter().map(|tag| tag.to_vec()).collect();
            assert_eq!(parse(lines), Ok(tags), "{lines:?}");
        }
        assert!(
            matches!(EntityTagList::parse([&b"abc"[..]]), Ok(EntityTagList::Tag(tag)) if !tag.is_weak())
        );
    }

    #[test]
    fn lists_that_are_malformed() {
        let rows: &[(&[&[u8]], usize, TagFault)] = &[
            (&[], 1, TagFault::Empty),
            (&[b""], 1, TagFault::Empty),
            (&[b" ,\t,"], 1, TagFault::Empty),
            (&[b"abc_1"], 1, TagFault::Unquoted),
            (&[b"abc def"], 1, TagFault::Unquoted),
            (&[b"'abc'"], 1, TagFault::Unquoted),
            (&[b"W/abc"], 1, TagFault::Unquoted),
            (&[br#"abc""#], 1, TagFault::Unquoted),
            (&[br#"W /"abc""#], 1, TagFault::Unquoted),
            (&[b"\xe2\x80\x9cabc\xe2\x80\x9d"], 1, TagFault::Unquoted),
            (&[br#"abc, "def""#], 1, TagFault::Unquoted),
            (&[br#""def", abc"#], 2, TagFault::Unquoted),
            (&[b"abc, def"], 1, TagFault::Unquoted),
            (&[b"abc", b"def"], 1, TagFault::Unquoted),
            (&[br#"w/"abc""#], 1, TagFault::LowerCaseWeak),
            (&[br#""abc"#], 1, TagFault::Unterminated),
            (&[br#"""#], 1, TagFault::Unterminated),
            (&[br#"W/""#], 1, TagFault::Unterminated),
            (&[br#""a", "b"#, br#"c""#], 2, TagFault::Unterminated),
            (&[br#""a b""#], 1, TagFault::ForbiddenByte(b' ')),
            (&[b"\"a\x7f\""], 1, TagFault::ForbiddenByte(0x7f)),
            (&[b"\"a\0\""], 1, TagFault::ForbiddenByte(0)),
            (&[br#""a" "b""#], 1, TagFault::Trailing),
            (&[br#""a"-gzip"#], 1, TagFault::Trailing),
            (&[br#""a"#, br#""b""#], 1, TagFault::Unterminated),
            (&[br#"*, "a""#], 2, TagFault::StarInList),
            (&[br#""a", *"#], 2, TagFault::StarInList),
            (&[b"*, *"], 2, TagFault::StarInList),
            (&[b"*", b"*"], 2, TagFault::StarInList),
            (&[b"abc, *"], 2, TagFault::StarInList),
        ];
        for &(lines, element, fault) in rows {
            assert_eq!(parse(lines), Err((element, fault)), "{lines:?}");
        }
    }

    #[test]
    fn a_list_holds_at_most_max_tags() {
        let list = |n: usize| vec!["\"a\""; n].join(",");
        assert_eq!(
            parse(&[list(MAX_TAGS).as_bytes()]).map(|tags| tags.len()),
            Ok(MAX_TAGS)
        );
        let over = (MAX_TAGS + 1, TagFault::TooMany);
        assert_eq!(parse(&[list(MAX_TAGS + 1).as_bytes()]), Err(over));
        // Neither lines nor empty elements get around the bound.
        let line = list(MAX_TAGS / 2);
        assert_eq!(
            parse(&[line.as_bytes(), b",,", line.as_bytes(), b"\"b\""]),
            Err(over)
        );
    }

    #[test]
    fn single_tags_are_quoted_and_alone() {
        assert!(tag(" W/\"a\"\t").is_weak());
        for (value, fault) in [
            (&b""[..], TagFault::Empty),
            (b"abc", TagFault::Unquoted),
            (b"*", TagFault::Unquoted),
            (br#""a","b""#, TagFault::Trailing),
            (br#""a","#, TagFault::Trailing),
            (br#"w/"a""#, TagFault::LowerCaseWeak),
        ] {
            assert_eq!(
                EntityTag::parse(value).unwrap_err(),
                MalformedTag { element: 1, fault },
                "{value:?}"
            );
        }
    }

    #[test]
    fn faults_read_as_sentences() {
        let error = EntityTagList::parse([&br#""a", "b"#[..]]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "entity tag 2 has no closing double quote"
        );
    }

    /// Whether it is weak, and what is between its quotes.
    fn any_tag() -> impl Strategy<Value = (bool, Vec<u8>)> {
        let etagc = prop_oneof![Just(0x21u8), 0x23..=0x7eu8, 0x80..=0xffu8];
        (any::<bool>(), prop::collection::vec(etagc, 0..8))
    }

    /// Bytes that are likely to be nearly a list.
    fn likely_bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            8 => prop::sample::select(b"\"\"\"W/w,, \t*ab-".to_vec()),
            1 => any::<u8>(),
        ];
        prop::collection::vec(byte, 0..24)
    }

    proptest! {
        #[test]
        fn parse_of_format_is_identity(
            lines in prop::collection::vec(prop::collection::vec(any_tag(), 0..4), 1..4),
        ) {
            let tags = |line: &[(bool, Vec<u8>)]| -> Vec<Vec<u8>> {
                line.iter()
                    .map(|(weak, opaque)| EntityTag { weak: *weak, opaque }.to_field_value())
                    .collect()
            };
            let formatted: Vec<Vec<u8>> = lines
                .iter()
                .map(|line| tags(line).join(&b", "[..]))
                .collect();
            let formatted: Vec<&[u8]> = formatted.iter().map(Vec::as_slice).collect();
            let flat: Vec<Vec<u8>> = lines.iter().flat_map(|line| tags(line)).collect();
            let expected = if flat.is_empty() { Err((1, TagFault::Empty)) } else { Ok(flat) };
            prop_assert_eq!(parse(&formatted), expected);
            for (weak, opaque) in lines.iter().flatten() {
                let field = EntityTag { weak: *weak, opaque }.to_field_value();
                let again = EntityTag::parse(&field).unwrap();
                prop_assert!(again.weak == *weak && again.opaque == opaque);
            }
        }

        /// Where a list is understood, every byte of it outside separators is in a tag: what the
        /// tags format to, with the separators taken out of both, is what was sent.
        #[test]
        fn no_element_is_ever_dropped(value in likely_bytes()) {
            if let Ok(tags) = parse(&[&value]) {
                let essence = |bytes: &[u8]| -> Vec<u8> {
                    bytes.iter().copied().filter(|byte| !b", \t\"".contains(byte)).collect()
                };
                prop_assert_eq!(essence(&tags.concat()), essence(&value));
                let quotes = |bytes: &[u8]| bytes.split(|&byte| byte == b'"').count() - 1;
                prop_assert!(quotes(&value) == 0 || quotes(&value) == 2 * tags.len());
            }
        }

        #[test]
        fn parsers_never_panic(
            lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..32), 0..3),
            likely in likely_bytes(),
        ) {
            for value in lines.iter().chain([&likely]) {
                let _ = EntityTag::parse(value);
                let _ = EntityTag::from_unquoted(value);
            }
            let _ = parse(&lines.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let _ = parse(&[&likely]);
        }
    }
}
