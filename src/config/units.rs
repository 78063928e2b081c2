//! Sizes, durations and percentages as people write them, parsed exactly or not at all.
//!
//! Not `bytesize` and `humantime`: the first saturates on overflow, the second reads `5M` as five
//! months. A cache of the wrong size or a timeout of the wrong length starts without complaint, so
//! whatever could be meant in two ways is refused here, by a sentence that shows how to write it.

use std::fmt::Write as _;
use std::time::Duration;

use crate::disk::MinFree;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Binary units first: [`format_size`] goes through them from the back.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", KIB),
    ("MiB", MIB),
    ("GiB", GIB),
    ("TiB", TIB),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Nanoseconds to the unit, longest first: `1h30m` names its units in this order.
const DURATION_UNITS: [(&str, u128); 5] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
];

/// Far beyond any sensible setting, and near enough that adding it to a clock cannot overflow.
const LONGEST: Duration = Duration::from_hours(365 * 24);

const SIZE_HELP: &str = "write a number and a unit, such as 256KiB, 100GB or 1.5GiB";
const DURATION_HELP: &str = "write a number and a unit, such as 500ms, 2s, 5m or 1h30m";

/// Bytes: a plain integer, or a decimal number and one of `B`, `KiB`, `MiB`, `GiB`, `TiB` (powers of
/// 1024), `KB`, `MB`, `GB`, `TB` (powers of 1000). A fraction of a byte is rounded down.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let refused = || format!("{text:?} is not a size; {SIZE_HELP}");
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return text
            .parse()
            .map_err(|_| format!("{text:?} is more than 2^64 bytes; {SIZE_HELP}"));
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(refused)?;
    let (number, unit) = text.split_at(digits);
    let unit = unit.strip_prefix(' ').unwrap_or(unit);
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(format!(
            "{text:?} is not a size: no unit {unit:?}; use B, KiB, MiB, GiB or TiB (powers of 1024), \
             or KB, MB, GB or TB (powers of 1000)"
        ));
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Nine places are a billionth of a unit: more would be noise, and u128 stays far from overflow.
    if whole.is_empty() || whole.len() > 20 || fraction.is_empty() || fraction.len() > 9 {
        return Err(refused());
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| refused())?);
    let whole: u128 = whole.parse().map_err(|_| refused())?;
    let fraction: u128 = fraction.parse().map_err(|_| refused())?;
    let bytes = (whole * scale + fraction) * u128::from(*factor) / scale;
    u64::try_from(bytes).map_err(|_| format!("{text:?} is more than 2^64 bytes; {SIZE_HELP}"))
}

/// The shortest exact way to write `bytes` that [`parse_size`] reads back.
pub(super) fn format_size(bytes: u64) -> String {
    SIZE_UNITS[..5]
        .iter()
        .rev()
        .find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor))
        .map_or_else(
            || format!("{bytes}B"),
            |(name, factor)| format!("{}{name}", bytes / factor),
        )
}

/// Whole numbers with one of `ms`, `s`, `m`, `h`, `d`, the longer unit first: `1h30m`. `0s` is none.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is not a duration; {DURATION_HELP}");
    if text.is_empty() {
        return Err(refused());
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "{text:?} has no unit; write {text}s for seconds or {text}ms"
        ));
    }
    let mut rest = text;
    let mut nanos = 0_u128;
    let mut units_left = &DURATION_UNITS[..];
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refused)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let number: u64 = number.parse().map_err(|_| refused())?;
        let position = units_left
            .iter()
            .position(|(name, _)| *name == unit)
            .ok_or_else(refused)?;
        nanos += u128::from(number) * units_left[position].1;
        units_left = &units_left[position + 1..];
        rest = tail;
    }
    if nanos > LONGEST.as_nanos() {
        return Err(format!(
            "{text:?} is more than a year (365d); {DURATION_HELP}"
        ));
    }
    u64::try_from(nanos)
        .map(Duration::from_nanos)
        .map_err(|_| refused())
}

/// The shortest exact way to write whole milliseconds that [`parse_duration`] reads back.
pub(super) fn format_duration(duration: Duration) -> String {
    let mut nanos = duration.as_nanos();
    let mut text = String::new();
    for (name, factor) in DURATION_UNITS {
        if nanos >= factor {
            write!(text, "{}{name}", nanos / factor).expect("writing to a String cannot fail");
            nanos %= factor;
        }
    }
    if text.is_empty() {
        "0s".to_owned()
    } else {
        text
    }
}

/// A size, or a percentage below 100 such as `5%` or `2.5%`.
pub(super) fn parse_min_free(text: &str) -> Result<MinFree, String> {
    let Some(number) = text.strip_suffix('%') else {
        return parse_size(text).map(MinFree::Bytes).map_err(|_| {
            format!("{text:?} is neither a percentage nor a size; write it like 5% or 20GiB")
        });
    };
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    match number.parse::<f64>() {
        Ok(percent) if plain && percent < 100.0 => Ok(MinFree::Percent(percent)),
        Ok(percent) if plain && percent >= 100.0 => Err(format!(
            "{text} of the disk left free leaves no room for a cache; write less than 100%, such as 5%"
        )),
        _ => Err(format!(
            "{text:?} is not a percentage; write it like 5% or 2.5%"
        )),
    }
}

/// What [`parse_min_free`] reads back.
pub(super) fn format_min_free(min_free: MinFree) -> String {
    match min_free {
        MinFree::Bytes(bytes) => format_size(bytes),
        MinFree::Percent(percent) => format!("{percent}%"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_exact() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("18446744073709551615", u64::MAX),
            ("0B", 0),
            ("1B", 1),
            ("256KiB", 256 * KIB),
            ("256 KiB", 256 * KIB),
            ("1.5GiB", GIB + GIB / 2),
            ("0.1KB", 100),
            ("100GB", 100_000_000_000),
            ("1TiB", TIB),
            ("1.000000001GB", 1_000_000_001),
            ("1.3KiB", 1331),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            " ",
            "GiB",
            "-1",
            "+1",
            "1e9",
            "1,5GiB",
            ".5GiB",
            "1.GiB",
            "1..5GiB",
            "1 5GiB",
            "1  GiB",
            " 1GiB",
            "1GiB ",
            "0x10",
            "1.5",
            "1_000",
            "1.0000000001GB",
        ] {
            assert!(parse_size(text).is_err(), "{text:?} passed");
        }
        for text in ["5x", "5K", "5k", "5G", "5gib", "5kib", "5Gb", "5PiB"] {
            assert!(
                parse_size(text).unwrap_err().contains("no unit"),
                "{text:?}"
            );
        }
        for text in [
            "18446744073709551616",
            "16777216TiB",
            "99999999999999999999TB",
        ] {
            assert!(parse_size(text).unwrap_err().contains("2^64"), "{text:?}");
        }
    }

    #[test]
    fn durations_are_exact() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("2s", 2_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
            ("1m30s250ms", 90_250),
            ("90s", 90_000),
            ("365d", 31_536_000_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in [
            "",
            " ",
            "s",
            "-1s",
            "1.5s",
            "2 s",
            "2s ",
            "5M",
            "5min",
            "1sec",
            "30m1h",
            "1s1s",
            "1h30",
            "1w",
            "1us",
            "99999999999999999999s",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?} passed");
        }
        assert_eq!(
            parse_duration("30"),
            Err("\"30\" has no unit; write 30s for seconds or 30ms".to_owned())
        );
        assert!(
            parse_duration("366d")
                .unwrap_err()
                .contains("more than a year")
        );
    }

    #[test]
    fn min_free_is_a_share_or_a_size() {
        assert_eq!(parse_min_free("5%"), Ok(MinFree::Percent(5.0)));
        assert_eq!(parse_min_free("2.5%"), Ok(MinFree::Percent(2.5)));
        assert_eq!(parse_min_free("0%"), Ok(MinFree::Percent(0.0)));
        assert_eq!(parse_min_free("20GiB"), Ok(MinFree::Bytes(20 * GIB)));
        for text in [
            "", "%", "-5%", "100%", "5 %", "inf%", "NaN%", "1e1%", "five",
        ] {
            assert!(parse_min_free(text).is_err(), "{text:?} passed");
        }
    }

    proptest! {
        #[test]
        fn a_formatted_size_reads_back(bytes: u64) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn a_formatted_duration_reads_back(millis in 0_u64..=365 * 86_400_000) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = (parse_size(&text), parse_duration(&text), parse_min_free(&text));
        }
    }
}
