//! The same request again, for another range: how most requests of a chunked download are answered without being read
//! a second time.
//!
//! Who downloads a file in pieces sends the same head over and over on a connection, and nothing differs but the digits of
//! its `Range`. Two thirds of what a warm answer costs outside the kernel is reading that head and writing one that differs
//! as little (ADR 23). So [`Heads`] watches the bytes on their way to hyper:
//!
//! ```text
//!   a head, whole ──▶ another than the last ──▶ hyper                                  remembered
//!                     the last but for the digits ──▶ hyper ──▶ Handler: may be repeated ──▶ Again, armed when
//!                                       │                                               its answer is out
//!                                       └ and an Again is armed ──▶ Again::answer ──▶ socket
//! ```
//!
//! An [`Again`] looks up what the handler would: the revision, its labels, the extent. Whatever it finds changed is left
//! to hyper and the handler, as is all that is not the plainest case. So nothing is decided here; what was decided a moment
//! ago is found to hold still.
//!
//! hyper is not to notice, nor is it polled. It waits for a head meanwhile, with nothing read and nothing to write:
//!
//! - *Nothing read*: as long as all that it was given were whole heads, one in each read. After anything else (a head in two
//!   reads, two heads in one) the connection is hyper's alone, until hyper asks for more where a head has ended: it does so
//!   only when nothing that it holds is a whole head, and then it holds nothing.
//! - *Nothing to write*: only the answer to the last head that it was given arms an [`Again`], and when the socket has
//!   all of that.

use std::fmt;
use std::io::Cursor;
use std::ops::Range;
use std::sync::Arc;

use bytes::buf::Chain;

use super::body::Chunk;
use super::io::SendQueue;

/// The longest head that is remembered, for every connection has one.
const LONGEST: usize = 2048;

/// Repeats an answer for another range.
pub(super) trait Again: Send + Sync {
    /// The answer to the same request for bytes `first` to `last`, or `None` where it may be anything but a 206 of one file:
    /// then the request has to be read.
    fn answer(&self, first: u64, last: u64, queue: &SendQueue) -> Option<Answer>;
}

impl fmt::Debug for dyn Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Again")
    }
}

/// A head and what follows it, to be written as hyper would.
pub(super) type Answer = Chain<Cursor<Vec<u8>>, Chunk>;

/// Where in a head the bytes end that hyper was given. Content is none, but the connection ends with the answer to that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    /// Behind a whole one: what begins here is another, or an empty line, which says nothing (RFC 9112 §2.2).
    #[default]
    Behind,
    /// At the beginning of one of its lines.
    OfLine,
    /// Behind the CR of a line that may be empty.
    OfCr,
    /// In a line.
    InLine,
}

impl End {
    fn after(self, bytes: &[u8]) -> Self {
        bytes.iter().fold(self, |end, byte| match (end, byte) {
            (Self::Behind | Self::OfLine, b'\r') => Self::OfCr,
            (Self::InLine, b'\n') => Self::OfLine,
            (_, b'\n') => Self::Behind,
            _ => Self::InLine,
        })
    }
}

/// The heads of a connection, on their way to hyper.
#[derive(Default)]
pub(super) struct Heads {
    /// The last one, if it may be sent again.
    last: Option<Pattern>,
    /// Repeats the answer to it.
    again: Option<Arc<dyn Again>>,
    /// How many hyper was given.
    given: u64,
    /// hyper was given something else: what it holds cannot be told but for this.
    mixed: bool,
    /// Where what it was given ends.
    end: End,
}

impl Heads {
    /// What `bytes`, read from the client, are answered with; `None`: [they are for hyper](Self::are_for_hyper). `begins`: no head was
    /// under way before them.
    pub(super) fn answer(
        &mut self,
        bytes: &[u8],
        begins: bool,
        queue: &SendQueue,
    ) -> Option<Answer> {
        if self.mixed && self.end != End::Behind {
            self.end = self.end.after(bytes);
            return None;
        }
        // It was given whole heads, and has taken them all: it asks for the next.
        self.mixed = false;
        if bytes.is_empty() {
            return None;
        }
        let range = self.last.as_ref().and_then(|last| last.range_in(bytes));
        if let Some((first, last)) = range {
            if self.again.is_none() {
                self.again = queue.take_again(self.given);
            }
            let again = self.again.as_ref();
            let answer = again.and_then(|again| again.answer(first, last, queue));
            if answer.is_some() {
                return answer;
            }
        } else {
            let pattern = Pattern::of(bytes).filter(|_| begins);
            if pattern.is_none() {
                self.mixed = true;
                self.end = self.end.after(bytes);
            }
            self.last = pattern.flatten();
        }
        self.given += 1;
        queue.repeats(range.is_some().then_some(self.given));
        None
    }

    /// All since some head were answered without hyper, which has nothing to do then.
    pub(super) fn are_repeated(&self) -> bool {
        self.again.is_some()
    }

    /// hyper is given the last one, or whatever it is, and has to be polled until that is answered.
    pub(super) fn are_for_hyper(&mut self) {
        self.again = None;
    }

    /// What hyper was given ends in the middle of a head.
    pub(super) fn end_in_head(&self) -> bool {
        self.end != End::Behind
    }
}

/// A head, and where the digits of its range stand.
struct Pattern {
    head: Box<[u8]>,
    digits: Range<usize>,
}

impl Pattern {
    /// The pattern of `bytes`, if they are one head from its first byte to its last, its end being the first line that
    /// lenient readers take for empty. `Some(None)`: a head without a range, with more than one, or too long.
    #[expect(
        clippy::option_option,
        reason = "no head, or one that is not remembered"
    )]
    fn of(bytes: &[u8]) -> Option<Option<Self>> {
        const NAME: &[u8] = b"range:";
        let mut digits = None;
        let mut fields = 0;
        let mut start = 0;
        for newline in memchr::memchr_iter(b'\n', bytes) {
            let line = &bytes[start..newline];
            if line.is_empty() || line == b"\r" {
                if start == 0 {
                    return None;
                }
                let is_plain = fields == 1 && bytes.len() <= LONGEST;
                let pattern = digits.filter(|_| is_plain).map(|digits| Self {
                    head: bytes.into(),
                    digits,
                });
                return (newline + 1 == bytes.len()).then_some(pattern);
            }
            if let Some((name, value)) = line.split_at_checked(NAME.len())
                && name.eq_ignore_ascii_case(NAME)
            {
                fields += 1;
                let set = value.trim_ascii();
                digits = set.strip_prefix(b"bytes=").and_then(|range| {
                    read_digits(range)?;
                    let end = start + NAME.len() + value.trim_ascii_end().len();
                    Some(end - range.len()..end)
                });
            }
            start = newline + 1;
        }
        None
    }

    /// The range that `head` asks for, if it is this one but for the digits.
    fn range_in(&self, head: &[u8]) -> Option<(u64, u64)> {
        let rest = head.strip_prefix(&self.head[..self.digits.start])?;
        let digits = rest.strip_suffix(&self.head[self.digits.end..])?;
        read_digits(digits)
    }
}

/// `FIRST-LAST`, and nothing else.
fn read_digits(digits: &[u8]) -> Option<(u64, u64)> {
    let dash = digits.iter().position(|byte| *byte == b'-')?;
    let number = |digits: &[u8]| {
        // The longest that cannot overflow.
        if !(1..=19).contains(&digits.len()) {
            return None;
        }
        digits.iter().try_fold(0, |number: u64, digit| {
            digit
                .is_ascii_digit()
                .then(|| number * 10 + u64::from(digit - b'0'))
        })
    };
    Some((number(&digits[..dash])?, number(&digits[dash + 1..])?))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    const HEAD: &[u8] = b"GET /a HTTP/1.1\r\nHost: b\r\nRange: bytes=10-20\r\nX: y\r\n\r\n";

    fn pattern(head: &[u8]) -> Option<Pattern> {
        Pattern::of(head).expect("one head")
    }

    #[test]
    fn heads_that_differ_in_the_digits_are_the_same() {
        let seen = pattern(HEAD).unwrap();
        assert_eq!(&HEAD[seen.digits.clone()], b"10-20");
        let with = |range: &str| {
            let head = String::from_utf8(HEAD.to_vec()).unwrap();
            seen.range_in(head.replace("10-20", range).as_bytes())
        };
        assert_eq!(with("10-20"), Some((10, 20)));
        assert_eq!(
            with("0-9999999999999999999"),
            Some((0, 9_999_999_999_999_999_999))
        );
        for other in [
            "",
            "-",
            "1-",
            "-1",
            "1-2,3-4",
            "a-2",
            "1 -2",
            "+1-2",
            "1-2\r\nX: z",
            "0-99999999999999999999",
        ] {
            assert_eq!(with(other), None, "{other:?}");
        }
        for changed in 0..HEAD.len() {
            if seen.digits.contains(&changed) {
                continue;
            }
            let mut head = HEAD.to_vec();
            head[changed] ^= 1;
            assert_eq!(seen.range_in(&head), None, "{changed}");
        }
        assert_eq!(seen.range_in(&HEAD[..HEAD.len() - 1]), None);
        assert_eq!(seen.range_in(&[HEAD, b" "].concat()), None);
    }

    #[test]
    fn only_one_plain_range_is_remembered() {
        for (fields, remembered) in [
            ("Range: bytes=1-2", true),
            ("rAnGe:bytes=1-2\t ", true),
            ("Range: bytes=1-2\r\nIf-Range: bytes=3-4", true),
            ("Range: bytes=1-", false),
            ("Range: bytes=-1", false),
            ("Range: bytes=1-2,4-5", false),
            ("Range: bytes = 1-2", false),
            ("Range: bytes=1-2\r\nRange: bytes=1-2", false),
            ("Range: bytes=1-2\r\nRange: x", false),
            ("Range: x\r\nRange: bytes=1-2", false),
            ("X-Range: bytes=1-2", false),
            ("Host: a", false),
        ] {
            let head = format!("GET /a HTTP/1.1\r\n{fields}\r\n\r\n");
            assert_eq!(pattern(head.as_bytes()).is_some(), remembered, "{fields}");
        }
        let long = format!(
            "GET /{} HTTP/1.1\r\nRange: bytes=1-2\r\n\r\n",
            "a".repeat(LONGEST)
        );
        assert!(pattern(long.as_bytes()).is_none());
    }

    /// Answers nothing and counts how often it is asked to.
    #[derive(Default)]
    struct Asked(AtomicUsize);

    impl Again for Asked {
        fn answer(&self, first: u64, last: u64, _: &SendQueue) -> Option<Answer> {
            assert_eq!((first, last), (10, 20));
            self.0.fetch_add(1, Ordering::Relaxed);
            None
        }
    }

    #[test]
    fn only_the_answer_to_the_last_head_is_repeated() {
        let queue = SendQueue::default();
        let mut heads = Heads::default();
        let asked = Arc::new(Asked::default());
        let give = |heads: &mut Heads, bytes: &[u8]| {
            assert!(heads.answer(bytes, true, &queue).is_none());
            heads.are_for_hyper();
            asked.0.load(Ordering::Relaxed)
        };
        let arm = |number| queue.arm(number, Arc::clone(&asked) as Arc<dyn Again>);

        give(&mut heads, HEAD);
        assert_eq!(queue.repeated(), None);
        give(&mut heads, HEAD);
        assert_eq!(queue.repeated(), Some(2));
        arm(2);
        assert_eq!(give(&mut heads, HEAD), 1);
        assert_eq!(queue.repeated(), Some(3), "it was read after all");
        arm(2);
        assert_eq!(give(&mut heads, HEAD), 1, "of the one before the last");
        assert_eq!(queue.repeated(), Some(4));
        arm(4);
        give(&mut heads, b"GET /b HTTP/1.1\r\n\r\n");
        assert_eq!(queue.repeated(), None);
        give(&mut heads, HEAD);
        assert_eq!(give(&mut heads, HEAD), 1, "there was another since");
        assert_eq!(queue.repeated(), Some(7));
        arm(7);
        // What comes behind the beginning of a head is no head.
        heads.answer(b"GET /b HTTP/1.1\r\nX: ", true, &queue);
        assert_eq!(give(&mut heads, HEAD), 1);
        arm(8);
        assert_eq!(queue.repeated(), None);
        // That one ended where a head ends, so hyper has nothing left of it.
        arm(8);
        assert_eq!(give(&mut heads, HEAD), 1, "it is the first again");
        assert_eq!(queue.repeated(), None);
        give(&mut heads, HEAD);
        assert_eq!(queue.repeated(), Some(10));
        arm(10);
        assert_eq!(give(&mut heads, HEAD), 2);
        for (reads, comes_back) in [
            (&[&[HEAD, HEAD].concat()[..]][..], true),
            (&[b"\r\n"], true),
            (&[&HEAD[..7], &HEAD[7..]], true),
            (&[&HEAD[..7]], false),
            (&[&HEAD[..HEAD.len() - 1]], false),
            (&[b"content"], false),
        ] {
            let mut heads = Heads::default();
            for read in reads {
                give(&mut heads, read);
            }
            give(&mut heads, HEAD);
            give(&mut heads, HEAD);
            assert_eq!(queue.repeated().is_some(), comes_back, "{reads:?}");
        }
    }

    /// What heads are made of, and what they are not.
    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop::sample::select(vec![
            "GET /a HTTP/1.1",
            "Host: b",
            "Range: bytes=1-2",
            " ",
            ":",
            "\r\n",
            "\r\n",
            "\n",
            "\r",
            "\r\n\r\n",
            "\n\n",
            "x",
        ]);
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
    }

    /// What the parser that hyper uses waits for the rest of, behind all the heads that are whole; `None`: it takes them for
    /// none.
    fn rest_of_head(mut bytes: &[u8]) -> Option<&[u8]> {
        loop {
            while let [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] = bytes {
                bytes = rest;
            }
            let mut fields = [httparse::EMPTY_HEADER; 16];
            match httparse::Request::new(&mut fields).parse(bytes) {
                Ok(httparse::Status::Complete(length)) => bytes = &bytes[length..],
                Ok(httparse::Status::Partial) => return Some(bytes),
                Err(_) => return None,
            }
        }
    }

    #[test]
    fn a_head_that_has_begun_behind_another_is_noticed() {
        let queue = SendQueue::default();
        for (reads, in_head) in [
            (&[HEAD][..], false),
            (&[HEAD, HEAD], false),
            (&[b"GET /b HT"], true),
            (&[b"GET /b HT", b"TP/1.1\r\n"], true),
            (&[b"GET /b HT", b"TP/1.1\r\n", b"\r\n"], false),
            (&[&[HEAD, HEAD].concat()], false),
            (&[&[HEAD, b"G"].concat()], true),
            (&[HEAD, &[HEAD, b"G"].concat()], true),
            (&[&[HEAD, b"G"].concat(), &HEAD[1..]], false),
            // Some send one too many.
            (&[&[HEAD, b"\r\n"].concat()], false),
            (&[&[HEAD, b"\r"].concat(), b"\n"], false),
        ] {
            let mut heads = Heads::default();
            let mut begins = true;
            for bytes in reads {
                heads.answer(bytes, begins, &queue);
                begins = !heads.end_in_head();
            }
            assert_eq!(heads.end_in_head(), in_head, "{reads:?}");
        }
    }

    proptest! {
        #[test]
        fn hyper_waits_for_the_rest_of_a_head_where_one_is_said_to_have_begun(
            bytes in pieces(),
            split in any::<prop::sample::Index>(),
        ) {
            let (first, second) = bytes.split_at(split.index(bytes.len() + 1));
            let end = End::default().after(first).after(second);
            if let Some(rest) = rest_of_head(&bytes) {
                prop_assert_eq!(end != End::Behind, !rest.is_empty(), "{:?}", rest);
            }
        }

        /// The parser that hyper uses leaves nothing of what is taken for one head, and waits for nothing.
        #[test]
        fn one_head_is_one_to_hyper(bytes in pieces()) {
            let mut fields = [httparse::EMPTY_HEADER; 16];
            let parsed = httparse::Request::new(&mut fields).parse(&bytes);
            if Pattern::of(&bytes).is_some() {
                match parsed {
                    Ok(httparse::Status::Complete(length)) => prop_assert_eq!(length, bytes.len()),
                    Ok(httparse::Status::Partial) => prop_assert!(false, "it waits for more"),
                    // The connection ends.
                    Err(_) => {}
                }
            }
        }
    }
}
