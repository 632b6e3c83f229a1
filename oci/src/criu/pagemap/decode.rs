//! The framing of CRIU's images, and the protobuf messages in them.
//!
//! ```text
//! u32 magic of images, u32 magic of the kind, then per record: u32 length, message
//! message: fields of  varint(number << 3 | kind), value
//! ```
//! Only numbers and bytes are needed, so no message types are generated.

use super::ImageError;

const IMAGE_MAGIC: u32 = 0x5456_4319;

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field<'a> {
    /// Its number.
    pub(super) number: u64,
    /// Its value, if it is a number.
    pub(super) value: u64,
    /// Its value, if it is a string, bytes or a message.
    pub(super) bytes: Option<&'a [u8]>,
}

/// The records of an image of the kind `magic`.
pub(super) fn records(
    mut image: &[u8],
    magic: u32,
) -> Result<impl Iterator<Item = Result<&[u8], ImageError>>, ImageError> {
    if u32_le(&mut image) != Some(IMAGE_MAGIC) || u32_le(&mut image) != Some(magic) {
        return Err(ImageError::Format("it is of another kind"));
    }
    Ok(std::iter::from_fn(move || {
        if image.is_empty() {
            return None;
        }
        let length = u32_le(&mut image);
        let record = length.and_then(|length| image.split_off(..length as usize));
        if record.is_none() {
            image = &[];
        }
        Some(record.ok_or(ImageError::Format("it ends within a record")))
    }))
}

/// The fields of a message.
pub(super) fn fields(mut message: &[u8]) -> impl Iterator<Item = Result<Field<'_>, ImageError>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let field = field(&mut message);
        if field.is_none() {
            message = &[];
        }
        Some(field.ok_or(ImageError::Format("a message that is not one")))
    })
}

fn field<'a>(message: &mut &'a [u8]) -> Option<Field<'a>> {
    let key = varint(message)?;
    let (mut value, mut bytes) = (0, None);
    match key & 7 {
        0 => value = varint(message)?,
        1 => bytes = Some(message.split_off(..8)?),
        2 => {
            let length = usize::try_from(varint(message)?).ok()?;
            bytes = Some(message.split_off(..length)?);
        }
        5 => bytes = Some(message.split_off(..4)?),
        _ => return None,
    }
    Some(Field { number: key >> 3, value, bytes })
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *message.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn u32_le(image: &mut &[u8]) -> Option<u32> {
    image.split_off(..4)?.try_into().map(u32::from_le_bytes).ok()
}
