//! The two HTTP listeners.
//!
//! ```text
//!  accept ──► hyper (HTTP/1.1) ──► handler ──► respond ──► ResponseBody ──► SendfileIo ──► socket
//!  limits,     parses, frames        asks        status      pulls chunks     writev,
//!  drain                            the tiers   and fields   from the tiers   sendfile
//! ```
//!
//! - [`accept`]: takes connections up to a limit, serves each in a task of its own, and drains them
//!   on shutdown.
//! - [`io`]: the socket as hyper sees it. File extents go out by sendfile; whoever makes us wait
//!   too long is cut.
//! - [`unsent`]: how much may wait in a socket; `outq`: how much of it the client has not acknowledged.
//! - `again`: a request that repeats the last one for another range, answered without hyper.
//! - [`page_in`]: what is not in the page cache is read off the runtime's workers before it is
//!   sent.
//! - [`handler`]: one request, from its head to the tiers and back.
//! - [`body`]: what a response's body is made of, and how its end is observed.
//! - `rescue`: what is sent in the place of a file that fails in the middle of a response.
//! - [`respond`]: every status code there is.
//! - [`admin`]: health, metrics and purge, on a listener of their own.
//! - [`replica`]: starts and ends all of it. [`handover`] passes it to another process, [`systemd`] speaks to the
//!   service manager.
//!
//! Three rules hold the module together. Whatever fails after the head cuts the connection (P3). No
//! payload byte of a disk hit is copied (P7), so nobody below the handler looks at a body. And no
//! client can hold anything by doing nothing: each wait for a client has a limit (P9, P12).

pub mod accept;
pub mod admin;
mod again;
pub mod body;
pub mod handler;
mod handover;
pub mod io;
mod outq;
pub mod page_in;
pub mod replica;
mod rescue;
pub mod respond;
pub mod systemd;
pub mod unsent;
