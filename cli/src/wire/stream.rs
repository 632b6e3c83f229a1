//! Streams of data frames as plain `Read` and `Write`, for code that runs on a blocking thread.

use std::io::{self, Read, Write};

use tokio::sync::mpsc;

use super::codec::MAX_DATA;

/// Chunks under way between the two sides of a channel.
const DEPTH: usize = 8;

/// Collects what is written into chunks of at most one data frame.
pub(crate) struct ChunkWriter {
    buffer: Vec<u8>,
    to: mpsc::Sender<Vec<u8>>,
}

/// A writer, and the chunks it produces.
pub(crate) fn writer() -> (ChunkWriter, mpsc::Receiver<Vec<u8>>) {
    let (to, chunks) = mpsc::channel(DEPTH);
    (ChunkWriter { buffer: Vec::new(), to }, chunks)
}

impl ChunkWriter {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::take(&mut self.buffer);
        self.to.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = MAX_DATA as usize - self.buffer.len();
        let taken = bytes.len().min(room);
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == MAX_DATA as usize {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// Reads chunks one after the other; their end is the end of the stream.
pub(crate) struct ChunkReader {
    chunk: io::Cursor<Vec<u8>>,
    from: mpsc::Receiver<Vec<u8>>,
}

/// Where to put chunks, and a reader of them.
pub(crate) fn reader() -> (mpsc::Sender<Vec<u8>>, ChunkReader) {
    let (to, from) = mpsc::channel(DEPTH);
    (to, ChunkReader { chunk: io::Cursor::default(), from })
}

impl Read for ChunkReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.chunk.read(into)?;
            if count > 0 || into.is_empty() {
                return Ok(count);
            }
            match self.from.blocking_recv() {
                Some(next) => self.chunk = io::Cursor::new(next),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_cross_unchanged_in_frames_of_legal_size() {
        let data: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
        let (mut writer, mut chunks) = writer();
        let (to, mut from) = reader();
        let sent = data.clone();
        let writing = tokio::task::spawn_blocking(move || {
            writer.write_all(&sent).unwrap();
            writer.flush().unwrap();
        });
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            from.read_to_end(&mut all).unwrap();
            all
        });
        while let Some(chunk) = chunks.recv().await {
            assert!(chunk.len() <= MAX_DATA as usize);
            to.send(chunk).await.unwrap();
        }
        drop(to);
        writing.await.unwrap();
        assert_eq!(reading.await.unwrap(), data);
    }
}
