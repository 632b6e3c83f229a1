//! The texts of `/proc/PID/maps` and `/proc/PID/smaps`.

use super::{Area, VmFlags};

/// A line of `maps` or `smaps` that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line not understood: {0:?}")]
pub struct ParseError(String);

pub(super) fn maps(text: &[u8]) -> Result<Vec<Area>, ParseError> {
    lines(text).map(entry).collect()
}

pub(super) fn smaps(text: &[u8]) -> Result<Vec<Area>, ParseError> {
    let mut areas: Vec<Area> = Vec::new();
    for line in lines(text) {
        if is_header(line) {
            areas.push(entry(line)?);
            continue;
        }
        let Some(area) = areas.last_mut() else {
            return Err(error(line));
        };
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            return Err(error(line));
        };
        let (key, value) = (&line[..colon], &line[colon + 1..]);
        match key {
            b"Rss" => area.rss = kilobytes(value).ok_or_else(|| error(line))?,
            b"Pss" => area.pss = kilobytes(value).ok_or_else(|| error(line))?,
            b"SwapPss" => area.swap_pss = kilobytes(value).ok_or_else(|| error(line))?,
            b"Swap" => area.swap = kilobytes(value).ok_or_else(|| error(line))?,
            b"Anonymous" => area.anonymous = kilobytes(value).ok_or_else(|| error(line))?,
            b"Shared_Hugetlb" | b"Private_Hugetlb" => {
                area.hugetlb += kilobytes(value).ok_or_else(|| error(line))?;
            }
            b"VmFlags" => area.flags = VmFlags::parse(value),
            _ => {}
        }
    }
    Ok(areas)
}

/// The lines of `smaps` that `maps` has too.
pub(super) fn headers(smaps: &[u8]) -> Vec<u8> {
    let mut maps = Vec::with_capacity(smaps.len() / 8);
    for line in lines(smaps).filter(|l| is_header(l)) {
        maps.extend_from_slice(line);
        maps.push(b'\n');
    }
    maps
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|b| *b == b'\n').filter(|l| !l.is_empty())
}

/// Addresses are printed in lower case, the names of all other lines begin with a capital.
fn is_header(line: &[u8]) -> bool {
    line.first().is_some_and(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
}

/// `7f0c1000-7f0c3000 rw-p 00000000 00:00 0    [name]`
fn entry(line: &[u8]) -> Result<Area, ParseError> {
    parse_entry(line).ok_or_else(|| error(line))
}

fn parse_entry(line: &[u8]) -> Option<Area> {
    let mut rest = line;
    let (start, end) = split(field(&mut rest), b'-')?;
    let perms = field(&mut rest).try_into().ok()?;
    let offset = number(field(&mut rest), 16)?;
    let (major, minor) = split(field(&mut rest), b':')?;
    let inode = number(field(&mut rest), 10)?;
    let area = Area {
        start: number(start, 16)?,
        end: number(end, 16)?,
        perms,
        offset,
        dev: (number(major, 16)?.try_into().ok()?, number(minor, 16)?.try_into().ok()?),
        inode,
        name: rest.trim_ascii_start().to_vec(),
        flags: VmFlags::default(),
        rss: 0,
        pss: 0,
        swap: 0,
        swap_pss: 0,
        anonymous: 0,
        hugetlb: 0,
    };
    let kind = matches!(area.perms[3], b'p' | b's');
    (kind && area.start < area.end).then_some(area)
}

/// Takes the text up to the next blank, and the blank.
fn field<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
    let (field, behind) = rest.split_at(end);
    *rest = behind.get(1..).unwrap_or_default();
    field
}

fn split(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

fn number(text: &[u8], radix: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| {
        let digit = char::from(*byte).to_digit(radix)?;
        value.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

/// `     132 kB` in bytes.
fn kilobytes(text: &[u8]) -> Option<u64> {
    number(text.trim_ascii().strip_suffix(b" kB")?, 10)?.checked_mul(1024)
}

fn error(line: &[u8]) -> ParseError {
    ParseError(String::from_utf8_lossy(line).into_owned())
}
