//! Gzip whose data is stored, not compressed (RFC 1951, 1952), with a mark that it is ours.
//!
//! The mark is an extra field, which every gzip skips.

/// Identification, method, flags (extra field), time, flags, system, and the field itself.
const HEADER: [u8; 18] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 3, 6, 0, b'F', b'y', 2, 0, VERSION, 0];
/// Version of what this program writes and takes for its own.
const VERSION: u8 = 1;
/// Checksum and length.
const TRAILER: usize = 8;
/// Most bytes of a stored block.
const BLOCK: usize = 0xffff;

/// Packs `data`.
pub(crate) fn pack(data: &[u8]) -> Vec<u8> {
    let blocks = data.len() / BLOCK + 1;
    let mut packed = Vec::with_capacity(HEADER.len() + data.len() + blocks * 5 + TRAILER);
    packed.extend(HEADER);
    let mut rest = data;
    loop {
        let (block, more) = rest.split_at(rest.len().min(BLOCK));
        let length = block.len() as u16;
        packed.push(u8::from(more.is_empty()));
        packed.extend(length.to_le_bytes());
        packed.extend((!length).to_le_bytes());
        packed.extend(block);
        rest = more;
        if rest.is_empty() {
            break;
        }
    }
    packed.extend(crc(data).to_le_bytes());
    packed.extend((data.len() as u32).to_le_bytes());
    packed
}

/// Unpacks what [`pack`] made; `None` for all else, and for what is damaged.
pub(crate) fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut rest = packed.strip_prefix(&HEADER)?;
    let mut data = Vec::with_capacity(packed.len());
    loop {
        let &[last, a, b, c, d] = rest.split_off(..5)?.first_chunk()?;
        let length = u16::from_le_bytes([a, b]);
        if last > 1 || length != !u16::from_le_bytes([c, d]) {
            return None;
        }
        data.extend(rest.split_off(..usize::from(length))?);
        if last == 1 {
            break;
        }
    }
    let mut trailer = crc(&data).to_le_bytes().to_vec();
    trailer.extend((data.len() as u32).to_le_bytes());
    (rest == trailer).then_some(data)
}

/// Tables for eight bytes at a time.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { 0xedb8_8320 ^ crc >> 1 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut at = 256;
    while at < 8 * 256 {
        let crc = tables[at / 256 - 1][at % 256];
        tables[at / 256][at % 256] = tables[0][(crc & 0xff) as usize] ^ crc >> 8;
        at += 1;
    }
    tables
}

/// The checksum of gzip.
fn crc(data: &[u8]) -> u32 {
    let mut words = data.chunks_exact(8);
    let mut crc = u32::MAX;
    for word in &mut words {
        let mut next = 0;
        for (at, byte) in word.iter().enumerate() {
            // The first four bytes meet the checksum so far.
            let old = if at < 4 { (crc >> (8 * at)) as u8 } else { 0 };
            next ^= TABLES[7 - at][usize::from(byte ^ old)];
        }
        crc = next;
    }
    for byte in words.remainder() {
        crc = TABLES[0][usize::from(crc as u8 ^ byte)] ^ crc >> 8;
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_gzip() {
        assert_eq!(crc(b""), 0);
        assert_eq!(crc(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc(b"The quick brown fox jumps over the lazy dog"), 0x414f_a339);
    }

    #[test]
    fn what_was_packed_is_unpacked() {
        for length in [0, 1, 512, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 200_001] {
            let data: Vec<u8> = (0..length).map(|at| (at * 7 / 3) as u8).collect();
            assert_eq!(unpack(&pack(&data)).as_ref(), Some(&data), "{length} bytes");
        }
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let packed = pack(&[7; 100]);
        for at in 0..packed.len() {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x40;
            assert_eq!(unpack(&damaged), None, "byte {at}");
            assert_eq!(unpack(&packed[..at]), None, "{at} bytes");
        }
        assert_eq!(unpack(&[&packed[..], b"more"].concat()), None);
    }
}
