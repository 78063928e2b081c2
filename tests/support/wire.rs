//! A server that says, byte for byte, what a test scripted: for lies that no S3 tells.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::bucket::Access;

/// What the server does after a request's head.
#[derive(Clone)]
pub(crate) enum Step {
    Send(Vec<u8>),
    /// Says nothing more, and holds the connection as long as the server lives.
    Stall,
    /// Resets the connection. Without it, the end of the script closes it.
    Reset,
}

impl Step {
    pub(crate) fn send(bytes: impl AsRef<[u8]>) -> Self {
        Self::Send(bytes.as_ref().to_vec())
    }
}

/// Answers the nth request with the nth script, one connection for each.
pub(crate) struct Wire {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Wire {
    pub(crate) async fn start(scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            let mut stalled = Vec::new();
            for script in scripts {
                let (mut stream, _) = listener.accept().await.expect("accept");
                let head = read_head(&mut stream).await;
                log.lock()
                    .expect("no test panics with the lock held")
                    .push(head);
                stalled.extend(play(stream, script).await);
            }
            // Further requests wait until the test ends; one that is not expected fails by timeout.
            std::future::pending::<()>().await;
        });
        Self {
            address,
            requests,
            task,
        }
    }

    pub(crate) fn access(&self) -> Access {
        Access {
            endpoint: format!("http://{}", self.address),
            region: "test-1".to_owned(),
            bucket: "secret-bucket".to_owned(),
            key_id: "AKIDSCRIPTEDTEST".to_owned(),
            secret: "very-secret-key".to_owned(),
        }
    }

    /// The heads of the requests so far, in lower case.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests
            .lock()
            .expect("no test panics with the lock held")
            .clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a request's head"));
    }
    String::from_utf8_lossy(&head).to_lowercase()
}

/// Returns the connection if it is to be held.
async fn play(mut stream: TcpStream, script: Vec<Step>) -> Option<TcpStream> {
    for step in script {
        match step {
            // A client that has seen enough may be gone.
            Step::Send(bytes) => drop(stream.write_all(&bytes).await),
            Step::Stall => return Some(stream),
            Step::Reset => {
                let linger = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                linger.expect("set SO_LINGER");
                return None;
            }
        }
    }
    None
}
