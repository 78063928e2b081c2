//! pinrange: serves big snapshot files out of S3.
pub mod cli;
pub mod config;
pub mod disk;
pub mod fill;
pub mod mount;
pub mod payload;
pub mod tiers;
pub mod object;
pub mod remote;
pub mod semantics;
pub mod telemetry;
