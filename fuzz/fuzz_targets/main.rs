//! Fuzz targets. `scripts/fuzz.sh` builds this program with coverage and runs each target for a while;
//! `PINRANGE_FUZZ` names the one that a process runs.
//!
//! * `fields`: what a client sends in `If-Match`, `Range` and the like, against readings of the RFC that are naive.
//! * `names`: paths, URLs, configuration.
//! * `answers`: what the remote answers, and what the catalog gives back.
//! * `request`: raw bytes to a listener, over a socket.
//!
//! Beyond not panicking, each target compares: with a second implementation that is slow and plain, with the
//! slice of the object, or with itself after a round trip.

#![no_main]

mod answers;
mod fields;
mod names;
mod request;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<fn(&[u8])> =
    LazyLock::new(|| match std::env::var("PINRANGE_FUZZ").as_deref() {
        Ok("fields") => fields::run,
        Ok("names") => names::run,
        Ok("answers") => answers::run,
        Ok("request") => request::run,
        other => panic!("PINRANGE_FUZZ is {other:?}, not fields, names, answers or request"),
    });

fuzz_target!(|data: &[u8]| TARGET(data));

/// Takes one byte off the front; 0 where there is none.
fn byte(data: &mut &[u8]) -> u8 {
    let Some((first, rest)) = data.split_first() else {
        return 0;
    };
    *data = rest;
    *first
}

/// Takes a number off the front: few bytes, but of any magnitude.
fn number(data: &mut &[u8]) -> u64 {
    let shape = byte(data);
    let mut number = u64::from(byte(data)) | u64::from(byte(data)) << 8;
    number <<= shape & 63;
    if shape & 64 != 0 {
        number = number.wrapping_sub(1);
    }
    number
}

/// The lines of what is left.
fn lines(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    data.split(|byte| *byte == b'\n')
}
