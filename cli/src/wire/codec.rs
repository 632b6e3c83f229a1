//! Frames: one byte of kind, four bytes of length (little-endian), payload.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest message, in bytes. A container's spec is the largest thing in one.
const MAX_MESSAGE: u32 = 16 << 20;
/// Largest data frame, in bytes.
pub(crate) const MAX_DATA: u32 = 1 << 20;

const MESSAGE: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;

/// One frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A message as JSON.
    Message(Vec<u8>),
    /// A piece of a stream.
    Data(Vec<u8>),
    /// The end of a stream.
    End,
}

/// Writes one frame. The caller flushes.
///
/// # Errors
/// When the stream is broken or the payload too large for its kind.
pub(crate) async fn write<W: AsyncWrite + Unpin>(to: &mut W, frame: &Frame) -> io::Result<()> {
    let (kind, payload, limit): (u8, &[u8], u32) = match frame {
        Frame::Message(bytes) => (MESSAGE, bytes, MAX_MESSAGE),
        Frame::Data(bytes) => (DATA, bytes, MAX_DATA),
        Frame::End => (END, &[], 0),
    };
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if length > limit {
        return Err(invalid(format!("a frame of {length} bytes is above the limit of {limit}")));
    }
    let mut header = [kind, 0, 0, 0, 0];
    header[1..].copy_from_slice(&length.to_le_bytes());
    to.write_all(&header).await?;
    to.write_all(payload).await
}

/// Reads one frame; `None` at a clean end of the stream.
///
/// # Errors
/// When the stream breaks inside a frame or carries something else.
pub(crate) async fn read<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Option<Frame>> {
    let mut header = [0; 5];
    // The first byte decides between a clean end and a broken frame.
    if from.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[1..]).await?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let limit = match header[0] {
        MESSAGE => MAX_MESSAGE,
        DATA => MAX_DATA,
        END => 0,
        other => {
            return Err(invalid(format!(
                "kind {other} is no frame: is something else printing on the agent's output?"
            )));
        }
    };
    if length > limit {
        return Err(invalid(format!("a frame of {length} bytes is above the limit of {limit}")));
    }
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload).await?;
    Ok(Some(match header[0] {
        MESSAGE => Frame::Message(payload),
        DATA => Frame::Data(payload),
        _ => Frame::End,
    }))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn round(frame: Frame) -> Frame {
        let mut bytes = Vec::new();
        write(&mut bytes, &frame).await.unwrap();
        read(&mut bytes.as_slice()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn frames_read_back_as_written() {
        for frame in [
            || Frame::Message(b"{}".to_vec()),
            || Frame::Data(vec![7; MAX_DATA as usize]),
            || Frame::Data(Vec::new()),
            || Frame::End,
        ] {
            assert_eq!(round(frame()).await, frame());
        }
    }

    #[tokio::test]
    async fn nothing_is_a_clean_end() {
        assert!(read(&mut [].as_slice()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_short_frame_is_an_error() {
        for bytes in [&[DATA, 4][..], &[DATA, 4, 0, 0, 0, 1, 2][..]] {
            let error = read(&mut &*bytes).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn a_bad_kind_names_the_likely_cause() {
        let error = read(&mut b"Welcome to host b".as_slice()).await.unwrap_err();
        assert!(error.to_string().contains("printing on the agent's output"), "{error}");
    }

    #[tokio::test]
    async fn a_length_is_refused_before_it_is_allocated() {
        let error = read(&mut [MESSAGE, 255, 255, 255, 255].as_slice()).await.unwrap_err();
        assert!(error.to_string().contains("above the limit"), "{error}");
        assert!(write(&mut Vec::new(), &Frame::Data(vec![0; 2 << 20])).await.is_err());
    }
}
