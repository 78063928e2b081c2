//! HTTP/1.1 as it is on the wire: requests are bytes, answers are read without a library's leniency.

use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpStream};

use super::process::PATIENCE;

/// One answer. `body` is complete: an answer cut short is an error.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A field's value, or nothing; `name` in lower case.
    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields
            .iter()
            .find(|(field, _)| field == name)
            .map_or("", |(_, value)| value)
    }
}

/// A connection that fails rather than waits for ever.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the listener is there");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    stream
}

/// The answer to one request on a connection of its own.
pub(crate) fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    let request = request.as_ref();
    let mut stream = connect(address);
    stream.write_all(request).expect("send");
    read(&mut BufReader::new(stream), request.starts_with(b"HEAD "))
        .expect("an answer")
        .expect("not the end")
}

/// `GET path` with `fields`, each ending in CRLF.
pub(crate) fn get(address: SocketAddr, path: &str, fields: &str) -> Answer {
    ask(
        address,
        format!("GET {path} HTTP/1.1\r\nHost: test\r\n{fields}\r\n"),
    )
}

/// The next answer; `None` at the end of the stream. 1xx are skipped.
pub(crate) fn read(stream: &mut impl BufRead, to_head: bool) -> io::Result<Option<Answer>> {
    loop {
        let Some(answer) = read_one(stream, to_head)? else {
            return Ok(None);
        };
        if answer.status >= 200 {
            return Ok(Some(answer));
        }
    }
}

fn read_one(stream: &mut impl BufRead, to_head: bool) -> io::Result<Option<Answer>> {
    let Some(line) = read_line(stream)? else {
        return Ok(None);
    };
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let status = line
        .strip_prefix("HTTP/1.1 ")
        .or_else(|| line.strip_prefix("HTTP/1.0 "))
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| bad(format!("no status line: {line:?}")))?;
    let mut fields = Vec::new();
    loop {
        let line = read_line(stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line
            .split_once(':')
            .ok_or_else(|| bad(format!("no field: {line:?}")))?;
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut answer = Answer {
        status,
        fields,
        body: Vec::new(),
    };
    if !answer.field("transfer-encoding").is_empty() {
        return Err(bad("every answer's length is known before".to_owned()));
    }
    if !to_head && status >= 200 && status != 204 && status != 304 {
        let length = answer
            .field("content-length")
            .parse()
            .map_err(|_| bad(format!("no length: {answer:?}")))?;
        answer.body.resize(length, 0);
        stream.read_exact(&mut answer.body)?;
    }
    Ok(Some(answer))
}

fn read_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if stream.take(64 << 10).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let line = line
        .strip_suffix(b"\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a line without its end"))?;
    Ok(Some(String::from_utf8_lossy(line).into_owned()))
}

/// splitmix64: one seed, one sequence.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// Less than `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("it is less than a usize")
    }

    pub(crate) fn one_of<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Bytes of which no two stretches are alike.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
