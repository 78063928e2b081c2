//! pinrange: serves big snapshot files out of S3.
#![expect(missing_docs, reason = "skeleton")]
pub mod disk;
pub mod object;
pub mod remote;
pub mod semantics;
pub mod strict_s3;
pub mod telemetry;
