//! How much may wait in a client's socket without being on its way (`TCP_NOTSENT_LOWAT`, tcp(7)).
//!
//! The more there is, the more of a long response goes out without us: the kernel sends on as the client acknowledges, and wakes nobody.
//! But it is the kernel's memory, lent to all sockets together (`tcp_mem`), and a client that stalls keeps it. So every
//! socket has [`UNSENT`], and one that is found full asks for more out of a [`Pool`] that is small against what the kernel has:
//!
//! ```text
//!   listener ──▶ UNSENT ──▶ full for the first time ──▶ and a 64th of what the pool has left, up to MOST ──▶ closed: given back
//! ```
//!
//! Few connections get all that is of use, hundreds get less and less, and stalled ones together never more than the pool (P9,
//! ADR 22).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};

/// Bytes that every socket may hold; it is writable again when half of them are left. So a stalled client costs the
/// kernel no more than this beyond its window, and one of many that share a network gets a MiB in one go.
pub const UNSENT: u32 = 1 << 20;

/// Most bytes lent to a socket: with them it holds what the kernel lets a socket grow to (`tcp_wmem`).
pub const MOST: u32 = 3 << 20;

/// Fewer are not worth the call.
const LEAST: u64 = 256 << 10;

/// The part of what the pool has left that a socket gets at most.
const SHARE: u64 = 64;

/// One part in so many is lent out of `tcp_mem`'s first threshold, below which the kernel does not care who has how much.
const PART: u64 = 4;

/// Sets what all connections of a listener inherit: [`UNSENT`].
///
/// # Errors
/// The system's, which does not happen on Linux.
pub(super) fn prepare(listener: &TcpListener) -> io::Result<()> {
    SockRef::from(listener).set_tcp_notsent_lowat(UNSENT)
}

/// What sockets may hold beyond [`UNSENT`], all together. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Pool(Arc<AtomicU64>);

impl Pool {
    /// A [`PART`] of what the kernel lends to TCP without a care.
    pub(super) fn of_this_machine() -> Self {
        let limits = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_mem").ok();
        let limit = limits.as_deref().and_then(first_threshold);
        Self::of(limit.unwrap_or_else(default_threshold) / PART)
    }

    fn of(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// Nothing yet, for a socket.
    pub(super) fn loan(&self) -> Loan {
        Loan {
            pool: self.clone(),
            bytes: 0,
        }
    }
}

/// Bytes, of `tcp_mem`: three thresholds, in pages.
fn first_threshold(limits: &str) -> Option<u64> {
    let pages: u64 = limits.split_whitespace().next()?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// What the kernel makes of its memory (`tcp_init_mem` in net/ipv4/tcp.c): it shows `tcp_mem` in its first network namespace
/// only, and containers have others.
fn default_threshold() -> u64 {
    let memory = rustix::system::sysinfo();
    memory.totalram * u64::from(memory.mem_unit) / 64 * 3
}

/// What a socket has of the pool. Dropping it gives that back: the socket is to be closed then.
#[derive(Debug)]
pub(super) struct Loan {
    pool: Pool,
    bytes: u64,
}

impl Loan {
    /// Lets a socket hold more that has been found full. `false`: it does already, or there is nothing to lend.
    pub(super) fn extend(&mut self, socket: &TcpStream) -> bool {
        let share = |left: u64| (left / SHARE).min(u64::from(MOST));
        if self.bytes > 0 {
            return false;
        }
        let lent = self
            .pool
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                let bytes = share(left);
                (bytes >= LEAST).then(|| left - bytes)
            });
        let Ok(left) = lent else {
            return false;
        };
        self.bytes = share(left);
        let bytes = u32::try_from(self.bytes).expect("at most MOST");
        SockRef::from(socket)
            .set_tcp_notsent_lowat(UNSENT + bytes)
            .is_ok()
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.pool.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_threshold_counts_and_is_guessed_where_it_is_not_shown() {
        let page = rustix::param::page_size() as u64;
        let limits = first_threshold("287901\t383870\t575802\n");
        assert_eq!(limits, Some(287_901 * page));
        for odd in ["", "none", "-1 2 3", "18446744073709551615 1 1"] {
            assert_eq!(first_threshold(odd), None, "{odd:?}");
        }
        assert!(default_threshold() > 0);
    }

    #[tokio::test]
    async fn sockets_get_less_and_less_never_more_than_there_is_and_give_it_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        prepare(&listener).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (_client, accepted) = tokio::join!(client, listener.accept());
        let (socket, _) = accepted.unwrap();
        let allowed = || SockRef::from(&socket).tcp_notsent_lowat().unwrap();
        assert_eq!(allowed(), UNSENT, "inherited");

        let all = 256 << 20;
        let pool = Pool::of(all);
        let (mut loans, mut last) = (Vec::new(), u32::MAX);
        loop {
            let mut loan = pool.loan();
            if !loan.extend(&socket) {
                break;
            }
            assert!(!loan.extend(&socket), "once for a socket");
            assert!(allowed() <= last, "more than the one before");
            last = allowed();
            assert_eq!(u64::from(last), u64::from(UNSENT) + loan.bytes);
            loans.push(loan);
        }
        assert!(loans.iter().all(|loan| loan.bytes >= LEAST), "too little");
        let lent: u64 = loans.iter().map(|loan| loan.bytes).sum();
        assert!(lent < all && lent > all / 2, "{lent}");
        assert_eq!(loans[0].bytes, u64::from(MOST));

        drop(loans);
        let mut loan = pool.loan();
        assert!(loan.extend(&socket));
        assert_eq!(loan.bytes, u64::from(MOST), "all was given back");
    }
}
