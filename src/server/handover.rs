//! Handing a replica over: a new process takes the listening sockets and the cache directory of the running one, and
//! no client notices.
//!
//! Whoever owns a cache directory listens on the Unix socket [`SOCKET`] in it. A process that starts and finds
//! somebody there does not bind and lock, but asks:
//!
//! ```text
//!  successor                                     predecessor, which answers requests all the time
//!    hello: version, addresses ───────────────▶  are they mine?
//!                        ◀──────────────────────  listeners, with both descriptors; or: refused
//!    connects to its remotes
//!    release ─────────────────────────────────▶  fills come to their ends or go past the disk, the
//!                        ◀──────────────────────  catalog is closed, the lock let go: released
//!    locks and opens the tier
//!    ready ───────────────────────────────────▶  takes no connection any more, and drains
//!                        ◀──────────────────────  yours
//!    accepts
//! ```
//!
//! The descriptors name the very sockets that the predecessor listens on, so what waits in their queues is never
//! lost, and a connection is served by whoever took it. Between
//! «release» and its end the predecessor reads the tier, the successor's records included, and writes nothing.
//!
//! **What can go wrong.** Up to «yours», the end of the connection tells the predecessor that the successor is gone:
//! it takes the directory back and carries on. One that is alive but does not get there in [`START`] is told so
//! (withdrawn) and has to give up. If the predecessor is gone instead, its lock is free and the successor has the
//! sockets, so it starts as it would have.
//!
//! Messages are lines of JSON, one at a time in each direction. `hello` and `refused` keep their shape for ever, so
//! that two versions which cannot hand over can say so. Both sides insist that the other one is the same user.

use std::fs::{self, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use super::accept::Ending;
use crate::causes::one_line;
use crate::disk::{DiskError, DiskTier};
use crate::fill::Filler;
use crate::telemetry::Metrics;

/// Name of the socket in the cache directory.
const SOCKET: &str = "handover.sock";

/// Of the conversation. A process takes over only from one that speaks the same.
const VERSION: u32 = 1;

/// How long an answer may take that needs no work.
const ANSWER: Duration = Duration::from_secs(5);

/// How long the fills under way may go on once the directory is asked for. A part takes 0.2 s at S3's usual speed.
const SETTLE: Duration = Duration::from_secs(2);

/// How long the predecessor waits for the successor's next step: a start takes less than a second.
const START: Duration = Duration::from_secs(30);

/// How long the successor waits for the directory: [`SETTLE`] and what a slow disk takes to sync a batch.
const RELEASE: Duration = Duration::from_mins(1);

/// Pause between attempts at a lock or a socket that is about to be free.
const AGAIN: Duration = Duration::from_millis(20);

/// Most bytes of a message.
const LONGEST: usize = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Hello(Hello),
    Refused { reason: String },
    Listeners,
    Release,
    Released,
    Ready,
    Yours,
    Withdrawn,
}

#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    addresses: Addresses,
}

/// The two listeners' addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Addresses {
    pub(super) data: SocketAddr,
    pub(super) admin: SocketAddr,
}

/// Why a running process does not hand over, or not any more.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Refusal {
    pub(super) pid: i32,
    pub(super) reason: String,
}

/// The running process, as its successor sees it.
pub(super) struct Predecessor {
    line: Line,
    pub(super) pid: i32,
}

impl Predecessor {
    /// Whoever owns `dir` and listens on `addresses`, and its listeners, data and admin; `None`: nobody does.
    pub(super) async fn find(
        dir: &Path,
        addresses: Addresses,
    ) -> Result<Option<(Self, [TcpListener; 2])>, Refusal> {
        let path = dir.join(SOCKET);
        let deadline = Instant::now() + ANSWER;
        loop {
            let Ok(stream) = UnixStream::connect(&path).await else {
                // Nobody is there, or nobody that we could ask: the lock will tell.
                return Ok(None);
            };
            let (line, pid) = match Line::with_peer(stream) {
                Ok(known) => known,
                Err(error) => {
                    tracing::warn!(%error, socket = %path.display(), "will not take over from whoever listens there");
                    return Ok(None);
                }
            };
            match Self::ask(line, pid, addresses).await {
                Ok(found) => return found.map(Some),
                // It is just ending, has just been taken over by somebody else, or was not in the end.
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    let reason = format!("it does not answer on {}: {error}", path.display());
                    return Err(Refusal { pid, reason });
                }
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn ask(
        mut line: Line,
        pid: i32,
        addresses: Addresses,
    ) -> io::Result<Result<(Self, [TcpListener; 2]), Refusal>> {
        let hello = Hello {
            version: VERSION,
            addresses,
        };
        line.say(&Message::Hello(hello), &[]).await?;
        let (answer, descriptors) = line.hear(ANSWER).await?;
        match answer {
            Message::Listeners => {
                let listeners = <[OwnedFd; 2]>::try_from(descriptors)
                    .map_err(|_| io::Error::other("it sent no two descriptors"))?
                    .map(TcpListener::from);
                Ok(Ok((Self { line, pid }, listeners)))
            }
            Message::Refused { reason } => Ok(Err(Refusal { pid, reason })),
            other => Err(other.out_of_turn()),
        }
    }

    /// Asks for the directory. When this returns, its lock is free, be it because the process has died.
    pub(super) async fn release(&mut self) -> Result<(), Refusal> {
        let answer = match self.line.say(&Message::Release, &[]).await {
            Ok(()) => self.line.hear(RELEASE).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok((Message::Released, _)) => Ok(()),
            Ok((other, _)) => Err(self.refusal(&other.out_of_turn())),
            Err(error) if is_gone(&error) => {
                tracing::warn!(
                    pid = self.pid,
                    "the process to take over from ended on its way"
                );
                Ok(())
            }
            Err(error) => Err(self.refusal(&error)),
        }
    }

    /// Says that nothing is missing but connections. With `Ok`, they are this process's to accept: nobody else does
    /// any more.
    pub(super) async fn ready(mut self) -> Result<(), Refusal> {
        let answer = match self.line.say(&Message::Ready, &[]).await {
            Ok(()) => self.line.hear(ANSWER).await,
            Err(error) => match self.line.hear(ANSWER).await {
                // What it said before it hung up.
                Ok(answer) => Ok(answer),
                Err(_) => Err(error),
            },
        };
        match answer {
            Ok((Message::Yours, _)) => Ok(()),
            Ok((other, _)) => Err(self.refusal(&other.out_of_turn())),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(self.refusal(&error)),
        }
    }

    fn refusal(&self, error: &io::Error) -> Refusal {
        Refusal {
            pid: self.pid,
            reason: error.to_string(),
        }
    }
}

/// What is handed over.
pub(super) struct Estate {
    pub(super) dir: PathBuf,
    /// As configured; a port 0 there is nobody's wish.
    pub(super) configured: Addresses,
    pub(super) bound: Addresses,
    pub(super) data: OwnedFd,
    pub(super) admin: OwnedFd,
    /// Of both listeners.
    pub(super) endings: [Ending; 2],
    pub(super) disk: Arc<DiskTier>,
    pub(super) filler: Arc<Filler>,
    pub(super) metrics: Metrics,
}

/// The socket on which successors are waited for. `None`, with a warning: there can be none.
///
/// To be called by the owner of `dir`: whatever lies there under the socket's name is replaced. Nobody removes it: once its
/// process is gone it refuses connections, as if it were not there.
pub(super) fn listen(dir: &Path) -> Option<UnixListener> {
    let path = dir.join(SOCKET);
    let bound = match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(&path),
    };
    let bound = bound.and_then(|socket| {
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(socket)
    });
    match bound {
        Ok(socket) => Some(socket),
        Err(error) => {
            tracing::warn!(
                socket = %path.display(), %error,
                "cannot be taken over by another process while running; a restart has to stop this one first"
            );
            None
        }
    }
}

/// Waits for a successor and hands over to it; its pid. The listeners are not accepted from any more when this returns.
///
/// Cancel safe between two successors. In the middle of a hand-over, cancelling leaves the successor to find this
/// process gone.
pub(super) async fn to_successor(estate: Estate, mut socket: UnixListener) -> i32 {
    loop {
        let stream = match socket.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot be asked to hand over");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (line, pid) = match Line::with_peer(stream) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "somebody asked to take over");
                continue;
            }
        };
        match estate.offer(line, pid).await {
            Ok(()) => return pid,
            Err(NotTaken::Refused(reason)) => {
                tracing::warn!(
                    pid,
                    reason,
                    "a process that wanted to take over was refused"
                );
            }
            Err(NotTaken::Left(error)) => {
                tracing::info!(pid, %error, "a process that wanted to take over went away");
            }
            Err(NotTaken::Failed(error)) => {
                tracing::error!(pid, %error, "a process was about to take over and did not: taking the cache directory back");
                if let Some(renewed) = estate.take_back().await {
                    socket = renewed;
                }
            }
        }
    }
}

/// Why a process did not become the successor.
enum NotTaken {
    Refused(String),
    /// Before anything was given up.
    Left(io::Error),
    /// After the directory was let go.
    Failed(io::Error),
}

impl Estate {
    async fn offer(&self, mut line: Line, pid: i32) -> Result<(), NotTaken> {
        let reason = match line.hear_hello().await.map_err(NotTaken::Left)? {
            Ok(addresses) if self.is_meant(addresses) => None,
            Ok(addresses) => Some(format!(
                "it listens on {} and {}, and not on {} and {}",
                self.bound.data, self.bound.admin, addresses.data, addresses.admin
            )),
            Err(version) => Some(format!(
                "it speaks version {VERSION} of the hand-over, and not {version}"
            )),
        };
        if let Some(reason) = reason {
            let refused = Message::Refused {
                reason: reason.clone(),
            };
            line.say(&refused, &[]).await.map_err(NotTaken::Left)?;
            return Err(NotTaken::Refused(reason));
        }
        let descriptors = [self.data.as_fd(), self.admin.as_fd()];
        line.say(&Message::Listeners, &descriptors)
            .await
            .map_err(NotTaken::Left)?;
        match line.hear(START).await.map_err(NotTaken::Left)? {
            (Message::Release, _) => {}
            (other, _) => return Err(NotTaken::Left(other.out_of_turn())),
        }
        let began = Instant::now();
        self.release().await;
        self.finish(line).await.map_err(NotTaken::Failed)?;
        tracing::info!(
            pid,
            without_writer_ms = began.elapsed().as_millis(),
            "handed over; the connections of this process are served to their ends"
        );
        Ok(())
    }

    /// Whether these are the addresses that this process serves. A port 0 means any that is free, and so not ours.
    fn is_meant(&self, wanted: Addresses) -> bool {
        let same = |wanted: SocketAddr, bound, configured| {
            wanted.port() != 0 && (wanted == bound || wanted == configured)
        };
        same(wanted.data, self.bound.data, self.configured.data)
            && same(wanted.admin, self.bound.admin, self.configured.admin)
    }

    async fn release(&self) {
        self.disk.refuse_writes();
        self.filler.settle(SETTLE).await;
        if let Err(error) = self.disk.release().await {
            tracing::warn!(
                error = one_line(&error),
                "the cache directory was not closed in order; the successor verifies it, and this process reads it no more"
            );
        }
    }

    /// From «released» on.
    async fn finish(&self, mut line: Line) -> io::Result<()> {
        line.say(&Message::Released, &[]).await?;
        match line.hear(START).await {
            Ok((Message::Ready, _)) => {}
            Ok((other, _)) => return Err(other.out_of_turn()),
            Err(error) => {
                // If it is still there it has to know; if it is not, nobody hears this.
                let _ = line.say(&Message::Withdrawn, &[]).await;
                return Err(error);
            }
        }
        // What is heard of it is final. Until this process has stopped a moment later, both may accept.
        line.say(&Message::Yours, &[]).await?;
        self.endings.iter().for_each(Ending::stop_accepting);
        Ok(())
    }

    /// Owns the directory again, however long that takes: until then this process goes on reading it. Returns the
    /// socket to listen on, as the other process may have put one of its own in its place.
    async fn take_back(&self) -> Option<UnixListener> {
        let mut waited = false;
        loop {
            match self.disk.reclaim().await {
                Ok(()) => {
                    // Before it is said, so that who reads it finds it counted.
                    self.metrics.handover_failed();
                    tracing::info!("the cache directory is written again");
                    return listen(&self.dir);
                }
                Err(DiskError::Locked { .. }) if !waited => waited = true,
                Err(DiskError::Locked { .. }) => {}
                Err(error) => {
                    tracing::error!(
                        error = one_line(&error),
                        "cannot take the cache directory back; trying again"
                    );
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

impl Message {
    fn out_of_turn(self) -> io::Error {
        let what = match self {
            Self::Withdrawn => "it took too long, and the other process carries on".to_owned(),
            other => format!("it said what was not its turn: {other:?}"),
        };
        io::Error::new(io::ErrorKind::InvalidData, what)
    }
}

/// Whether an error says that the other process is no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// One end of the conversation.
struct Line(UnixStream);

impl Line {
    /// With a process of the same user, and its pid.
    fn with_peer(stream: UnixStream) -> io::Result<(Self, i32)> {
        let peer = stream.peer_cred()?;
        let (own, pid) = (rustix::process::geteuid().as_raw(), peer.pid().unwrap_or(0));
        if peer.uid() != own {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "process {pid} belongs to user {}, and this one to {own}",
                    peer.uid()
                ),
            ));
        }
        Ok((Self(stream), pid))
    }

    async fn say(&mut self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(b'\n');
        let (mut sent, mut descriptors) = (0, descriptors);
        while sent < bytes.len() {
            let write = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() {
                    let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
                    assert!(fits, "there is room for both listeners");
                }
                let slices = [IoSlice::new(&bytes[sent..])];
                Ok(sendmsg(
                    &self.0,
                    &slices,
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?)
            };
            sent += self.0.async_io(Interest::WRITABLE, write).await?;
            descriptors = &[];
        }
        Ok(())
    }

    async fn hear(&mut self, patience: Duration) -> io::Result<(Message, Vec<OwnedFd>)> {
        let (line, descriptors) = self.hear_line(patience).await?;
        Ok((serde_json::from_slice(&line)?, descriptors))
    }

    /// The successor's addresses, or the version that it speaks and we do not.
    async fn hear_hello(&mut self) -> io::Result<Result<Addresses, u64>> {
        let (line, _) = self.hear_line(ANSWER).await?;
        let said: serde_json::Value = serde_json::from_slice(&line)?;
        match said["hello"]["version"].as_u64() {
            Some(version) if version != u64::from(VERSION) => Ok(Err(version)),
            _ => match serde_json::from_value(said)? {
                Message::Hello(hello) => Ok(Ok(hello.addresses)),
                other => Err(other.out_of_turn()),
            },
        }
    }

    /// Nobody says two things at once, so nothing is read beyond the line.
    async fn hear_line(&mut self, patience: Duration) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let (mut line, mut descriptors) = (Vec::new(), Vec::new());
        let reading = async {
            while line.last() != Some(&b'\n') {
                let read = || self.receive(&mut line, &mut descriptors);
                if self.0.async_io(Interest::READABLE, read).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if line.len() > LONGEST {
                    return Err(io::Error::other("it said more than anybody would"));
                }
            }
            Ok(())
        };
        tokio::time::timeout(patience, reading).await??;
        Ok((line, descriptors))
    }

    fn receive(&self, line: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut bytes = [0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.0, &mut slices, &mut control, flags)?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                descriptors.extend(passed);
            }
        }
        line.extend_from_slice(&bytes[..received]);
        Ok(received)
    }
}
