//! What integration tests share: S3 servers to talk to, and buckets to fill.
//!
//! [`garage`] starts a real server, [`wire`] is one that says whatever a test wants it to say, and
//! [`bucket`] fills a bucket of any S3 server for the conformance suite. [`process`] runs the built program and other
//! people's clients, [`http`] speaks to it byte by byte, [`strace`] shows what the kernel sees of it.
#![allow(
    dead_code,
    reason = "each test binary uses a part of this; which, differs, so `expect` cannot hold"
)]

pub(crate) mod bucket;
pub(crate) mod garage;
pub(crate) mod http;
pub(crate) mod process;
pub(crate) mod strace;
pub(crate) mod wire;
