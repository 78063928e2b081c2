//! `-o -`: the same pinned, parallel download, handed out in order.
//!
//! Up to N chunks are under way at a time. The first of them is written out as it arrives, the others wait in
//! memory, and a new one begins only when the first has left: so N × chunk size is the most that is
//! held, however slow the reader is. Bytes that have left cannot be taken back, so a revision that is replaced
//! after that ends the download; before that it starts over as usual.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::client::{Cut, Frames, Opening, Patience, Pin, Sink, Stop, Whole};
use super::error::GetError;
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

/// The reader's side: what has left, and its checksum.
struct Output<'a, W> {
    writer: &'a mut W,
    name: &'a Path,
    written: u64,
    hasher: Option<Hasher>,
}

impl<W: AsyncWrite + Unpin> Output<'_, W> {
    async fn write(&mut self, bytes: &[u8]) -> Result<(), GetError> {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        self.written += bytes.len() as u64;
        self.writer
            .write_all(bytes)
            .await
            .map_err(|error| self.failed(error))
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
    pub(super) async fn to_stream<W>(
        &self,
        writer: &mut W,
        name: &Path,
    ) -> Result<Summary, GetError>
    where
        W: AsyncWrite + Send + Unpin,
    {
        let mut output = Output {
            writer,
            name,
            written: 0,
            hasher: None,
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

    async fn one_stream<W>(&self, output: &mut Output<'_, W>) -> Result<Summary, Stop>
    where
        W: AsyncWrite + Send + Unpin,
    {
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

    async fn pinned_stream<W>(
        &self,
        output: &mut Output<'_, W>,
        pin: Pin,
        first: (ByteRange, Frames),
        expected: Option<Expected>,
    ) -> Result<Summary, Stop>
    where
        W: AsyncWrite + Send + Unpin,
    {
        self.console.begin(Some(pin.size), 0);
        output.hasher = expected.map(|expected| expected.hasher());
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
            while let Some(bytes) = frames.recv().await {
                output.write(&bytes).await?;
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

    async fn whole_stream<W>(
        &self,
        output: &mut Output<'_, W>,
        whole: Whole,
    ) -> Result<Summary, Stop>
    where
        W: AsyncWrite + Send + Unpin,
    {
        let mut patience = Patience::default();
        let mut whole = whole;
        loop {
            self.console.begin(whole.length, 0);
            output.hasher = whole.expected.take().map(|expected| expected.hasher());
            let what = loop {
                match whole.body.next().await {
                    Ok(Some(bytes)) => {
                        self.console.advance(bytes.len() as u64);
                        output.write(&bytes).await?;
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

    async fn end_stream<W>(
        &self,
        output: &mut Output<'_, W>,
    ) -> Result<Option<&'static str>, GetError>
    where
        W: AsyncWrite + Send + Unpin,
    {
        output
            .writer
            .flush()
            .await
            .map_err(|error| output.failed(error))?;
        let verdict = output.hasher.take().map(Hasher::finish).transpose();
        verdict.map_err(|what| {
            GetError::Data(format!(
                "{}: {what}; do not use the bytes that were written",
                self.client.name()
            ))
        })
    }
}
