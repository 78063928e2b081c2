//! What a client has not acknowledged yet, as its socket tells (`SIOCOUTQ`, tcp(7)).
//!
//! The crate's only unsafe block: no library that we know of has this request behind a safe function, and it is the only
//! one that tells how far a client is without costing fast ones anything (ADR 22).

#![expect(
    unsafe_code,
    reason = "an ioctl's argument is whatever its number says"
)]

use std::ffi::c_int;

use rustix::ioctl::{Getter, Opcode, ioctl};
use tokio::net::TcpStream;

/// Of asm-generic/ioctls.h, where it is called `TIOCOUTQ`: not of MIPS, PowerPC and SPARC.
const SIOCOUTQ: Opcode = 0x5411;
const _: () = assert!(
    !cfg!(any(
        target_arch = "mips64",
        target_arch = "powerpc64",
        target_arch = "sparc64"
    )),
    "look up the number of SIOCOUTQ in asm/ioctls.h"
);

/// Bytes that the socket took and the client's kernel did not acknowledge, on their way or not. 0 where there is no saying.
pub(super) fn unacknowledged(socket: &TcpStream) -> u64 {
    // SAFETY: the kernel writes one int to where the argument points, for any kind of socket or none, and `Getter` lends
    // the place of one (tcp_ioctl in net/ipv4/tcp.c, tty_ioctl for terminals).
    let queued = unsafe { ioctl(socket, Getter::<SIOCOUTQ, c_int>::new()) };
    queued.map_or(0, |bytes| u64::try_from(bytes).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_a_client_has_no_room_for_is_unacknowledged_until_it_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (server, _) = listener.accept().await.unwrap();
        assert_eq!(unacknowledged(&server), 0);

        let mut sent = 0;
        let chunk = vec![0; 1 << 16];
        while let Ok(taken) = server.try_write(&chunk) {
            sent += taken;
        }
        let waiting = unacknowledged(&server);
        assert!(waiting > 0 && waiting <= sent as u64, "{waiting} of {sent}");

        let mut rest = vec![0; sent];
        client.read_exact(&mut rest).await.unwrap();
        // Answered only when all that came before it is acknowledged.
        client.write_all(b"x").await.unwrap();
        server.readable().await.unwrap();
        assert_eq!(unacknowledged(&server), 0);
    }
}
