//! The `aws-chunked` content encoding of uploads.
//!
//! `s3s` decodes it while it checks signatures. A server without credentials checks none, so it decodes here, and
//! passes over chunk signatures and trailers.

use bytes::{Buf as _, Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt};
use s3s::StdError;

/// No chunk header or trailer line is longer.
const MAX_LINE: usize = 4096;

struct Decoder<S> {
    encoded: S,
    buffer: BytesMut,
    /// Bytes left of the chunk; its line end comes after them.
    chunk: Option<u64>,
}

/// The payload of an `aws-chunked` body.
///
/// # Errors
/// Yields an error where the encoding is broken or ends before its last, empty chunk.
pub(super) fn decode<S>(encoded: S) -> impl Stream<Item = Result<Bytes, StdError>> + Send
where
    S: Stream<Item = Result<Bytes, StdError>> + Send + Unpin,
{
    let decoder = Decoder {
        encoded,
        buffer: BytesMut::new(),
        chunk: None,
    };
    stream::try_unfold(decoder, |mut decoder| async move {
        let data = decoder.next().await?;
        Ok(data.map(|data| (data, decoder)))
    })
}

impl<S: Stream<Item = Result<Bytes, StdError>> + Send + Unpin> Decoder<S> {
    async fn next(&mut self) -> Result<Option<Bytes>, StdError> {
        let left = if let Some(left) = self.chunk {
            left
        } else {
            let header = self.line().await?;
            let size = header
                .split(|byte| *byte == b';')
                .next()
                .unwrap_or_default();
            u64::from_str_radix(std::str::from_utf8(size)?.trim(), 16)?
        };
        if left == 0 {
            while !self.line().await?.is_empty() {}
            return Ok(None);
        }
        if self.buffer.is_empty() {
            self.fill().await?;
        }
        let take = usize::try_from(left).map_or(self.buffer.len(), |l| l.min(self.buffer.len()));
        let data = self.buffer.split_to(take).freeze();
        let left = left - take as u64;
        self.chunk = (left > 0).then_some(left);
        if left == 0 && !self.line().await?.is_empty() {
            return Err("a chunk of the body is longer than it says".into());
        }
        Ok(Some(data))
    }

    /// Up to the next CRLF, which is taken too.
    async fn line(&mut self) -> Result<Bytes, StdError> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.buffer.split_to(end).freeze();
                self.buffer.advance(2);
                return Ok(line);
            }
            if self.buffer.len() > MAX_LINE {
                return Err("a chunk header of the body is too long".into());
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), StdError> {
        let more = self
            .encoded
            .next()
            .await
            .ok_or("the body ends within a chunk")??;
        self.buffer.extend_from_slice(&more);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    async fn decoded(encoded: &[u8], piece: usize) -> Result<Vec<u8>, StdError> {
        let pieces: Vec<_> = encoded
            .chunks(piece)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let chunks: Vec<Bytes> = decode(stream::iter(pieces)).try_collect().await?;
        Ok(chunks.concat())
    }

    #[tokio::test]
    async fn chunks_are_joined_however_they_arrive() {
        let encoded = b"5;chunk-signature=abc\r\nhello\r\n7\r\n\r\nworld\r\n0\r\nx-amz-checksum-crc32:AA==\r\n\r\n";
        for piece in [1, 2, 7, encoded.len()] {
            assert_eq!(decoded(encoded, piece).await.unwrap(), b"hello\r\nworld");
        }
    }

    #[tokio::test]
    async fn broken_encodings_are_errors() {
        for encoded in [
            &b"5\r\nhel"[..],
            b"5\r\nhello\r\n",
            b"5\r\nhelloo\r\n0\r\n\r\n",
            b"x\r\n",
        ] {
            assert!(
                decoded(encoded, 3).await.is_err(),
                "{}",
                encoded.escape_ascii()
            );
        }
    }
}
