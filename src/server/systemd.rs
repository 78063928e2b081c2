//! What a service manager gives us and wants to know: listening sockets, and when we are ready.
//!
//! Both are systemd's protocols, which others speak too (`sd_listen_fds(3)`, `sd_notify(3)`), and both are chosen by
//! variables that the manager sets, so there is nothing to configure. Without them nothing happens here.
//!
//! A socket that the manager holds stays open while no process runs: connections wait in its queue and are
//! served after the restart.

use std::io;
use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use sd_notify::NotifyState;

/// Listening sockets that were opened before this process began.
#[derive(Debug, Default)]
pub struct Inherited {
    pub(super) data: Option<TcpListener>,
    pub(super) admin: Option<TcpListener>,
}

impl Inherited {
    /// What the service manager passed (`LISTEN_FDS`). A socket named `data` or `admin` (`FileDescriptorName=`) is
    /// that listener; any other is the one that is configured with its address, else the first that is
    /// still missing.
    ///
    /// To be called once, before there are threads: the variables are taken out of the environment.
    ///
    /// # Errors
    /// A line that says which descriptor cannot be used, and why.
    pub fn from_environment(listen: SocketAddr, admin: SocketAddr) -> Result<Self, String> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut passed = ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..passed.len() {
            let name = names.next().unwrap_or_default().to_owned();
            let socket = passed
                .take_tcp_listener(index)
                .and_then(|socket| socket.ok_or_else(|| io::ErrorKind::NotFound.into()))
                .and_then(listening)
                .and_then(|socket| Ok((socket.local_addr()?, socket)))
                .map_err(|error| {
                    format!(
                        "socket {index} ({name:?}) of the service manager cannot be used: {error}"
                    )
                })?;
            sockets.push((name, socket));
        }
        Self::assign(sockets, listen, admin)
    }

    fn assign(
        sockets: Vec<(String, (SocketAddr, TcpListener))>,
        listen: SocketAddr,
        admin: SocketAddr,
    ) -> Result<Self, String> {
        let mut inherited = Self::default();
        let (named, others): (Vec<_>, Vec<_>) = sockets
            .into_iter()
            .partition(|(name, _)| name == "data" || name == "admin");
        let (known, others): (Vec<_>, Vec<_>) = others
            .into_iter()
            .partition(|(_, (address, _))| *address == listen || *address == admin);
        let named = named.into_iter().map(|(name, it)| (name == "admin", it));
        let known = known.into_iter().map(|(_, it)| (it.0 == admin, it));
        let given = named.chain(known).map(|(admin, it)| (Some(admin), it));
        let others = others.into_iter().map(|(_, it)| (None, it));
        for (is_admin, (address, socket)) in given.chain(others) {
            let is_admin = is_admin.unwrap_or_else(|| inherited.data.is_some());
            let slot = if is_admin {
                &mut inherited.admin
            } else {
                &mut inherited.data
            };
            if slot.replace(socket).is_some() {
                let which = if is_admin { "admin" } else { "data" };
                return Err(format!(
                    "the service manager passes more than one socket for the {which} listener, {address} the last of them: \
                     name them data and admin (FileDescriptorName=)"
                ));
            }
        }
        Ok(inherited)
    }
}

/// A socket that does not listen would refuse every `accept`, for ever.
fn listening(socket: TcpListener) -> io::Result<TcpListener> {
    if rustix::net::sockopt::socket_acceptconn(&socket)? {
        return Ok(socket);
    }
    Err(io::Error::other(
        "it does not listen: pass one that does, as a socket unit with ListenStream= and Accept=no has it",
    ))
}

/// Requests are answered. `main_pid`: this process has taken over and is the service now.
pub(super) fn ready(main_pid: Option<u32>) {
    match main_pid {
        Some(pid) => notify(&[NotifyState::MainPid(pid), NotifyState::Ready]),
        None => notify(&[NotifyState::Ready]),
    }
}

/// Another process is being started that is to take over; [`ready`] ends it.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// The drain has begun.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager (NOTIFY_SOCKET) could not be told: {state:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Given = (String, (SocketAddr, TcpListener));

    fn socket(name: &str) -> Given {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        (name.to_owned(), (socket.local_addr().unwrap(), socket))
    }

    fn address(slot: Option<TcpListener>) -> Option<SocketAddr> {
        slot.map(|socket| socket.local_addr().unwrap())
    }

    fn any() -> SocketAddr {
        "192.0.2.1:1".parse().unwrap()
    }

    #[test]
    fn names_go_before_addresses_and_addresses_before_order() {
        // Listed first and configured as the data listener, but named.
        let (admin, data) = (socket("admin"), socket("data"));
        let (at_admin, at_data) = (admin.1.0, data.1.0);
        let given = Inherited::assign(vec![admin, data], at_admin, at_data).unwrap();
        assert_eq!(address(given.data), Some(at_data));
        assert_eq!(address(given.admin), Some(at_admin));

        let (first, second) = (socket("pinrange.socket"), socket("pinrange.socket"));
        let (at_first, at_second) = (first.1.0, second.1.0);
        let given = Inherited::assign(vec![first, second], at_second, at_first).unwrap();
        assert_eq!(address(given.data), Some(at_second));
        assert_eq!(address(given.admin), Some(at_first));

        let (first, second) = (socket("unknown"), socket(""));
        let (at_first, at_second) = (first.1.0, second.1.0);
        let given = Inherited::assign(vec![first, second], any(), any()).unwrap();
        assert_eq!(address(given.data), Some(at_first));
        assert_eq!(address(given.admin), Some(at_second));

        let only = socket("unknown");
        let at_only = only.1.0;
        let given = Inherited::assign(vec![only], any(), any()).unwrap();
        assert_eq!(address(given.data), Some(at_only));
        assert!(given.admin.is_none());
    }

    #[test]
    fn a_socket_too_many_is_refused() {
        for names in [["data", "data", ""], ["", "", ""]] {
            let sockets = names.map(socket).into();
            let refused = Inherited::assign(sockets, any(), any()).unwrap_err();
            assert!(refused.contains("FileDescriptorName"), "{refused}");
        }
    }
}
