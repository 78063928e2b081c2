//! pinrange: serves big snapshot files out of S3.
#![expect(missing_docs, reason = "skeleton")]
pub mod disk;
pub mod fill;
pub mod mount;
pub mod payload;
pub mod tiers;
pub mod object;
pub mod remote;
pub mod semantics;
pub mod telemetry;
