//! The bytes of an archive, whatever it is packed with.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::{Stream, bad};

/// The largest window that a compressed archive may ask for, as a power of two. 8 MB is what zstd itself
/// takes without being told otherwise, but for its highest levels.
const LARGEST_WINDOW: u32 = 27;

/// The bytes of the file `path`, uncompressed.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn open(path: &Path) -> io::Result<Box<dyn Stream>> {
    uncompressed(File::open(path)?)
}

/// The bytes of `raw`, uncompressed with what its first bytes say.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn uncompressed(
    mut raw: impl Read + Seek + Send + 'static,
) -> io::Result<Box<dyn Stream>> {
    let mut first = Vec::new();
    (&mut raw).take(4).read_to_end(&mut first)?;
    raw.seek(SeekFrom::Start(0))?;
    let raw = BufReader::with_capacity(1 << 16, raw);
    Ok(match first.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(Packed(flate2::bufread::MultiGzDecoder::new(raw))),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
            decoder.window_log_max(LARGEST_WINDOW)?;
            Box::new(Packed(decoder))
        }
        _ => Box::new(raw),
    })
}

/// A plain archive that comes in order.
pub(crate) fn through(from: impl Read + Send + 'static) -> Box<dyn Stream> {
    Box::new(Packed(from))
}

impl<R: Read + Seek + Send> Stream for BufReader<R> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let far = || bad("the archive ends early: copy it again");
        self.seek_relative(i64::try_from(bytes).map_err(|_| far())?)
    }
}

/// A stream that has to be read to be passed over.
struct Packed<R>(R);

impl<R: Read> Read for Packed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read + Send> Stream for Packed<R> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        io::copy(&mut (&mut self.0).take(bytes), &mut io::sink()).map(drop)
    }
}
