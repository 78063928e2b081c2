//! `-o -`: the same pinned, parallel download, handed out in order.
//!
//! Up to N chunks are under way at a time. The first of them is written out as it arrives, the others wait in
//! memory, and a new one begins only when the first has left: so N × chunk size is the most that is
//! held, however slow the reader is. Bytes that have left cannot be taken back, so a revision that is replaced
//! after that ends the download; before that it starts over as usual.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::client::{Cut, Frames, Opening, Patience, Pin, Sink, Stop, Whole};
use super::error::GetError;
use super::part::blocking;
use super::verify::{Expected, Hasher};
use super::{Download, Summary};
use crate::semantics::ByteRange;

/// Hands a chunk's bytes to whoever writes them out. Unbounded, since a chunk is.
struct ChannelSink(mpsc::UnboundedSender<Bytes>);

impl Sink for ChannelSink {
    fn put(&mut self, _at: u64, bytes: Bytes) -> Result<(), GetError> {
        // A receiver that is gone means that the download has ended, and this task with it.
        let _ended = self.0.send(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), GetError> {
        Ok(())
    }
}

/// How many frames are written at once: enough for the hop to another thread to cost little where frames are small, few
/// enough for large ones to be freed soon.
const BATCH_FRAMES: usize = 16;

/// The reader's side: what has left, and its checksum.
struct Output<'a> {
    stream: Arc<Mutex<Stream>>,
    name: &'a Path,
    /// What a reader may have seen.
    written: u64,
}

struct Stream {
    writer: Box<dyn Write + Send>,
    hasher: Option<Hasher>,
}

impl Stream {
    /// Uncopied, in as few system calls as they take.
    fn write(&mut self, frames: &[Bytes]) -> io::Result<()> {
        if let Some(hasher) = &mut self.hasher {
            for frame in &frames {
                hasher.update(frame);
            }
        }
        let mut slices: Vec<IoSlice<'_>> = frames.iter().map(|frame| IoSlice::new(frame)).collect();
        let mut left = slices.as_mut_slice();
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match self.writer.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Output<'_> {
    /// On a blocking thread, for as long as the reader takes. Dropping the future abandons the thread, whose bytes
    /// may still leave.
    async fn write(&mut self, frames: Vec<Bytes>) -> Result<(), GetError> {
        self.written += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
        let stream = Arc::clone(&self.stream);
        let written = blocking(move || stream.lock().write(&frames)).await;
        written.map_err(|error| self.failed(error))
    }

    async fn flush(&self) -> Result<(), GetError> {
        let stream = Arc::clone(&self.stream);
        let flushed = blocking(move || stream.lock().writer.flush()).await;
        flushed.map_err(|error| self.failed(error))
    }

    /// From here on the bytes are those of a revision with this checksum.
    fn expect(&self, expected: Option<Expected>) {
        self.stream.lock().hasher = expected.map(|expected| expected.hasher());
    }

    fn failed(&self, source: io::Error) -> GetError {
        let advice = "a stream cannot be resumed, use -o FILE for that";
        GetError::Output {
            path: self.name.to_owned(),
            source,
            advice,
        }
    }
}

impl Download<'_> {
    /// Streams one revision to `writer`, which messages call `name`.
    pub(super) async fn to_stream(
        &self,
        writer: Box<dyn Write + Send>,
        name: &Path,
    ) -> Result<Summary, GetError> {
        let stream = Stream {
            writer,
            hasher: None,
        };
        let mut output = Output {
            stream: Arc::new(Mutex::new(stream)),
            name,
            written: 0,
        };
        let mut restarts = 0;
        loop {
            let result = tokio::select! {
                result = self.one_stream(&mut output) => result,
                () = self.cancel.cancelled() => Err(GetError::Interrupted(format!(
                    "{} bytes had left; a stream cannot be resumed, use -o FILE for that",
                    output.written
                )).into()),
            };
            match result {
                Ok(summary) => {
                    return Ok(Summary {
                        restarts,
                        ..summary
                    });
                }
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Replaced(now)) if output.written > 0 => {
                    return Err(GetError::KeptChanging(format!(
                        "{}: the object was replaced (now {now}) after {} bytes of it had left, which cannot \
                         be taken back; run the same command again",
                        self.client.name(),
                        output.written
                    )));
                }
                Err(Stop::Replaced(now)) => self.restart(&mut restarts, &now)?,
            }
        }
    }

    async fn one_stream(&self, output: &mut Output<'_>) -> Result<Summary, Stop> {
        match self.client.open(self.first_chunk(), None).await? {
            Opening::Pinned {
                pin,
                first,
                body,
                expected,
            } => {
                self.pinned_stream(output, pin, (first, body), expected)
                    .await
            }
            Opening::Whole(whole) => self.whole_stream(output, whole).await,
        }
    }

    async fn pinned_stream(
        &self,
        output: &mut Output<'_>,
        pin: Pin,
        first: (ByteRange, Frames),
        expected: Option<Expected>,
    ) -> Result<Summary, Stop> {
        self.console.begin(Some(pin.size), 0);
        output.expect(expected);
        let mut rest = super::part::pieces(first.0.end(), pin.size, self.args.chunk_size);
        let mut window = VecDeque::from([self.chunk(&pin, first.0, Some(first.1))]);
        loop {
            while window.len() < usize::from(self.args.connections)
                && let Some(range) = rest.next()
            {
                window.push_back(self.chunk(&pin, range, None));
            }
            let Some((mut frames, task)) = window.pop_front() else {
                break;
            };
            loop {
                let mut batch = Vec::with_capacity(BATCH_FRAMES);
                if frames.recv_many(&mut batch, BATCH_FRAMES).await == 0 {
                    break;
                }
                output.write(batch).await?;
            }
            task.await
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        }
        let verified = self.end_stream(output).await?;
        Ok(self.summary(
            pin.size,
            0,
            Some(pin.etag.as_field_value().to_owned()),
            verified,
        ))
    }

    fn chunk(
        &self,
        pin: &Pin,
        range: ByteRange,
        opened: Option<Frames>,
    ) -> (
        mpsc::UnboundedReceiver<Bytes>,
        AbortOnDropHandle<Result<(), Stop>>,
    ) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let client = Arc::clone(&self.client);
        let pin = pin.clone();
        let task = tokio::spawn(async move {
            client
                .stretch(&pin, range, opened, &mut ChannelSink(sender))
                .await
        });
        (receiver, AbortOnDropHandle::new(task))
    }

    async fn whole_stream(&self, output: &mut Output<'_>, whole: Whole) -> Result<Summary, Stop> {
        let mut patience = Patience::default();
        let mut whole = whole;
        loop {
            self.console.begin(whole.length, 0);
            output.expect(whole.expected.take());
            let what = loop {
                match whole.body.next().await {
                    Ok(Some(bytes)) => {
                        self.console.advance(bytes.len() as u64);
                        output.write(vec![bytes]).await?;
                    }
                    Ok(None) => {
                        let verified = self.end_stream(output).await?;
                        return Ok(self.summary(output.written, 0, whole.etag, verified));
                    }
                    Err(Cut::TooLong) => return Err(self.client.too_long().into()),
                    Err(Cut::Passing(what)) => break what,
                }
            };
            if output.written > 0 {
                return Err(GetError::Unavailable(format!(
                    "{}: {what}, after {} bytes had left in a single stream, which cannot be taken \
                     back; run the same command again",
                    self.client.name(),
                    output.written
                ))
                .into());
            }
            whole = self.client.whole_again(&mut patience, what).await?;
        }
    }

    async fn end_stream(&self, output: &mut Output<'_>) -> Result<Option<&'static str>, GetError> {
        output.flush().await?;
        let hasher = output.stream.lock().hasher.take();
        let verdict = hasher.map(Hasher::finish).transpose();
        verdict.map_err(|what| {
            GetError::Data(format!(
                "{}: {what}; do not use the bytes that were written",
                self.client.name()
            ))
        })
    }
}
