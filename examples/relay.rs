//! The least that a server can do that keeps what passes through it: from the origin's socket into a file, from the file
//! into the client's socket. A bound for what `pinrange` can reach cold on a machine, for benchmarks.
//!
//! ```text
//! cargo run --release --example relay -- LISTEN ORIGIN DIRECTORY [memory]
//! ```
//!
//! Each connection has a thread and a connection to the origin, to which requests go as they are. A body is received 128 KiB at a time,
//! written 64 KiB at a time, sent by `sendfile` 512 KiB at a time, and its file synced and thrown away when it is over:
//! pinrange's own sizes, and nothing else of it. No HTTP beyond heads, no check of anything, no checksums, no
//! catalog, no second reader of the same bytes, and no way to do something else while one waits. With `memory` nothing is
//! written: received and sent, the bound of what keeps nothing.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use rustix::io::Errno;
use rustix::net::RecvFlags;

const BUFFER: usize = 128 << 10;
const WRITE: usize = 64 << 10;
const SEND: u64 = 512 << 10;

struct Relay {
    origin: String,
    directory: PathBuf,
    keeps: bool,
    /// To the thread that syncs.
    sync: Sender<File>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, origin, directory, mode @ ..] = arguments.as_slice() else {
        return Err("LISTEN ORIGIN DIRECTORY [memory]".into());
    };
    let (sync, written) = channel::<File>();
    std::thread::spawn(move || {
        for file in written {
            file.sync_data().expect("the disk takes it");
        }
    });
    let relay = Arc::new(Relay {
        origin: origin.clone(),
        directory: directory.into(),
        keeps: mode.is_empty(),
        sync,
    });
    for client in TcpListener::bind(listen)?.incoming() {
        let (relay, client) = (Arc::clone(&relay), client?);
        std::thread::spawn(move || relay.serve(&client));
    }
    Ok(())
}

impl Relay {
    /// Ends with either side.
    fn serve(&self, client: &TcpStream) -> io::Result<()> {
        let origin = TcpStream::connect(&self.origin)?;
        client.set_nodelay(true)?;
        origin.set_nodelay(true)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let (end, _) = head(client, &mut buffer)?;
            let is_head = buffer.starts_with(b"HEAD ");
            (&origin).write_all(&buffer[..end])?;
            let (end, filled) = head(&origin, &mut buffer)?;
            (&*client).write_all(&buffer[..end])?;
            if !is_head {
                let length = content_length(&buffer[..end]);
                buffer.copy_within(end..filled, 0);
                self.body(client, &origin, &mut buffer, filled - end, length)?;
            }
        }
    }

    /// `filled` bytes of the body are in the buffer.
    fn body(
        &self,
        client: &TcpStream,
        origin: &TcpStream,
        buffer: &mut [u8],
        mut filled: usize,
        length: u64,
    ) -> io::Result<()> {
        let file = self
            .keeps
            .then(|| tempfile::tempfile_in(&self.directory))
            .transpose()?;
        let (mut at, mut sent) = (0, 0);
        while at < length {
            let is_dry = fill(origin, buffer, &mut filled, length - at)?;
            let Some(file) = &file else {
                (&*client).write_all(&buffer[..filled])?;
                at += filled as u64;
                filled = 0;
                continue;
            };
            let mut bytes = &buffer[..filled];
            while !bytes.is_empty() {
                let aligned = WRITE - usize::try_from(at).map_or(0, |at| at % WRITE);
                let written = rustix::io::pwrite(file, &bytes[..bytes.len().min(aligned)], at)?;
                bytes = &bytes[written..];
                at += written as u64;
            }
            filled = 0;
            if is_dry || at == length || at - sent >= SEND {
                while sent < at {
                    let most = usize::try_from(at - sent).expect("a few buffers");
                    rustix::fs::sendfile(client, file, Some(&mut sent), most)?;
                }
            }
        }
        if let Some(file) = file {
            self.sync.send(file).expect("the thread that syncs lives");
        }
        Ok(())
    }
}

/// Reads what is there, up to a buffer or `left` bytes; waits only for the first. Whether there was no more.
fn fill(origin: &TcpStream, buffer: &mut [u8], filled: &mut usize, left: u64) -> io::Result<bool> {
    let room = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
    while *filled < room {
        let flags = if *filled == 0 {
            RecvFlags::empty()
        } else {
            RecvFlags::DONTWAIT
        };
        match rustix::net::recv(origin, &mut buffer[*filled..room], flags) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((received, _)) => *filled += received,
            Err(Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Reads a head: where it ends, and how much has been read.
fn head(mut from: &TcpStream, buffer: &mut [u8]) -> io::Result<(usize, usize)> {
    let mut filled = 0;
    loop {
        let received = from.read(&mut buffer[filled..])?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += received;
        let end = buffer[..filled]
            .windows(4)
            .position(|four| four == b"\r\n\r\n");
        if let Some(end) = end {
            return Ok((end + 4, filled));
        }
    }
}

fn content_length(head: &[u8]) -> u64 {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    head.lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
        .unwrap_or(0)
}
