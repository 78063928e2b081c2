//! pinrange serves big snapshot files out of S3 from a fleet of replicas.
//!
//! A client downloads a file in many byte ranges, each pinned by `If-Match` to one revision, and gets exactly
//! that revision's bytes or a clean refusal, whatever replica answers and whatever happens to the object meanwhile.
//!
//! **The warm path.** [`server::accept`] takes a connection, hyper parses a request, [`server::handler`] finds
//! mount and key and asks [`tiers`]. The disk tier knows the pinned revision, [`semantics`] evaluates
//! conditions and ranges, coverage mints an extent of a segment file, [`server::respond`] chooses the
//! status, and [`server::io`] sends the head and then the extent by sendfile. Nothing is written, nobody is
//! asked, no payload byte beyond 4 KiB is copied. A request that repeats the last one of its connection for another range is
//! answered below hyper, by the same look-up (`server::again`): most requests of a download in pieces.
//!
//! **The cold path.** What coverage lacks is joined in [`fill`]: one guarded GET of at most a part per missing stretch,
//! shared by all who want it, through [`origin`], which mends what asking again can mend, and [`remote`]. Its bytes go into the sparse segment file first; every response,
//! the first one too, sends behind the write cursor. The status line waits for the first byte. So there is one data path:
//! S3 → pwrite → page cache → sendfile.
//!
//! **Five minutes.** [`tiers`] (the decision) → [`semantics::precondition`] (the rule) →
//! [`server::respond`] (the answer). Everything else is how.
//!
//! Layers, each importing only what stands below it (`tests/architecture.rs` holds them to it):
//!
//! ```text
//!  cli        get, demo, serve, check, verify
//!  server     listeners, sendfile, handler, respond
//!  config     flags, environment, file, checked once
//!  tiers      disk, then remote; labels; the reader of one response
//!  audit      whole objects against the remote's checksums
//!  fill       one interval map of flights per revision
//!  origin     retries, hedges, stalls, resumes: patience with the remote
//!  mount · payload · telemetry · strict_s3
//!  disk · remote
//!  object     keys, validators, revisions
//!  semantics  RFC 9110, pure (and chance, causes, seldom)
//! ```

pub mod audit;
mod causes;
mod chance;
pub mod cli;
pub mod config;
pub mod disk;
pub mod fill;
pub mod mount;
pub mod object;
pub mod origin;
pub mod payload;
pub mod remote;
pub mod seldom;
pub mod semantics;
pub mod server;
pub mod strict_s3;
pub mod telemetry;
pub mod tiers;
