//! The framing of CRIU's images, and the protobuf messages in them.
//!
//! ```text
//! u32 magic of images, u32 magic of the kind, then per record: u32 length, message
//! message: fields of  varint(number << 3 | kind), value
//! ```
//! Only numbers and bytes are needed, so no message types are generated.

use super::ImageError;

const IMAGE_MAGIC: u32 = 0x5456_4319;
/// In place of it in what CRIU writes for itself: its statistics.
const SERVICE_MAGIC: u32 = 0x5510_5940;

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field<'a> {
    /// Its number.
    pub(super) number: u64,
    /// Its value, if it is a number.
    pub(super) value: u64,
    /// Its value, if it is a string, bytes or a message.
    pub(super) bytes: Option<&'a [u8]>,
    /// Its value is a number of fixed length.
    fixed: bool,
}

impl Field<'_> {
    /// A number of 32 bits, with or without a sign.
    pub(super) fn number32(&self) -> u32 {
        self.value as u32
    }

    /// A text. What is not UTF-8 in it is replaced.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(self.message()).into_owned()
    }

    /// Bytes, or a message within the message.
    pub(super) fn message(&self) -> &[u8] {
        self.bytes.unwrap_or_default()
    }

    /// Adds the numbers of a repeated field to `all`: one, or several packed together.
    pub(super) fn numbers(&self, all: &mut Vec<u32>) -> Result<(), ImageError> {
        let Some(mut packed) = self.bytes else {
            all.push(self.number32());
            return Ok(());
        };
        while !packed.is_empty() {
            let number = varint(&mut packed).ok_or(ImageError::Format("a list that is not one"))?;
            all.push(number as u32);
        }
        Ok(())
    }
}

/// The records of an image of the kind `magic`.
pub(super) fn records(
    mut image: &[u8],
    magic: u32,
) -> Result<impl Iterator<Item = Result<&[u8], ImageError>>, ImageError> {
    let of = u32_le(&mut image);
    if of != Some(IMAGE_MAGIC) && of != Some(SERVICE_MAGIC) {
        return Err(ImageError::Format("it is of another kind"));
    }
    bare_records(image, magic)
}

/// As [`records`], of an image without the magic of images: the inventory.
pub(super) fn bare_records(
    mut image: &[u8],
    magic: u32,
) -> Result<impl Iterator<Item = Result<&[u8], ImageError>>, ImageError> {
    if u32_le(&mut image) != Some(magic) {
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
    Some(Field { number: key >> 3, value, bytes, fixed: matches!(key & 7, 1 | 5) })
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

/// An image of the kind `magic`.
pub(super) fn image(magic: u32, records: &[Vec<u8>]) -> Vec<u8> {
    let mut image = [IMAGE_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
    for record in records {
        image.extend((record.len() as u32).to_le_bytes());
        image.extend(record);
    }
    image
}

/// The other way.
pub(super) mod encode {
    use super::Field;

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value > 0x7f {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    }

    /// A field as it was read.
    pub(in super::super) fn field(field: &Field) -> Vec<u8> {
        let key = |kind| varint(field.number << 3 | kind);
        match field.bytes {
            None => [key(0), varint(field.value)].concat(),
            Some(value) if field.fixed => {
                [&key(if value.len() == 8 { 1 } else { 5 }), value].concat()
            }
            Some(value) => [&key(2), &varint(value.len() as u64), value].concat(),
        }
    }

    /// A field that is a number.
    pub(in super::super) fn number(field: u64, value: u64) -> Vec<u8> {
        [varint(field << 3), varint(value)].concat()
    }

    /// A field that is a text, bytes or a message.
    pub(in super::super) fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
        [&varint(field << 3 | 2), &varint(value.len() as u64), value].concat()
    }

    /// A message of `fields`.
    #[cfg(test)]
    pub(in super::super) fn message(fields: &[Vec<u8>]) -> Vec<u8> {
        fields.concat()
    }
}
