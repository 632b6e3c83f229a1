//! What the processes of a checkpoint may do. CRIU gives them that back, whatever the container's spec says.

use super::super::ImageError;
use super::super::decode::{Field, fields, records};
use super::{CORE_MAGIC, ReadError, Source, must};

/// Sets of capabilities in a message of credentials: inheritable, permitted, effective, bounding, ambient.
const SETS: [u64; 5] = [9, 10, 11, 12, 19];

/// All capabilities that any thread has in any set, a bit for each.
///
/// # Errors
/// When an image is not what it should be.
pub fn capabilities(source: &mut dyn Source) -> Result<u64, ReadError> {
    let is_core = |name: &String| name.starts_with("core-") && name.ends_with(".img");
    let mut all = 0;
    let names = source.names();
    // Where there are none in the core image, CRIU takes those of an image of their own.
    if let Some(name) = names.iter().find(|name| name.starts_with("creds-")) {
        let apart = ImageError::Format("credentials apart from their process");
        return Err(ReadError::Image(name.clone(), apart));
    }
    for name in names.into_iter().filter(is_core) {
        all |= must(source, &name, of_core)?;
    }
    Ok(all)
}

fn of_core(image: &[u8]) -> Result<u64, ImageError> {
    let mut all = 0;
    for record in records(image, CORE_MAGIC)? {
        let threads = inner(record?, 5)?;
        // One that has ended has none.
        let [thread] = threads[..] else {
            if threads.is_empty() {
                continue;
            }
            return Err(ImageError::Format("a thread is there twice"));
        };
        let [credentials] = inner(thread, 10)?[..] else {
            return Err(ImageError::Format("a thread without its credentials"));
        };
        all |= of_credentials(credentials)?;
    }
    Ok(all)
}

/// The messages in the fields `number` of a message.
fn inner(message: &[u8], number: u64) -> Result<Vec<&[u8]>, ImageError> {
    let mut found = Vec::new();
    for field in fields(message) {
        let field: Field<'_> = field?;
        if field.number == number {
            found.extend(field.bytes);
        }
    }
    Ok(found)
}

fn of_credentials(message: &[u8]) -> Result<u64, ImageError> {
    let mut all = 0;
    for set in SETS {
        let mut words = Vec::new();
        for field in fields(message) {
            let field = field?;
            if field.number == set {
                field.numbers(&mut words)?;
            }
        }
        if words.len() > 2 {
            return Err(ImageError::Format("more capabilities than there are"));
        }
        let low = words.first().copied().unwrap_or_default();
        let high = words.get(1).copied().unwrap_or_default();
        all |= u64::from(low) | u64::from(high) << 32;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_counts_and_has_two_words() {
        // Effective: one by one. Bounding: packed. And a number that is no set.
        let message = [11 << 3, 1, 11 << 3, 2, 12 << 3 | 2, 2, 4, 1, 13 << 3, 127];
        assert_eq!(of_credentials(&message).unwrap(), 0x3_0000_0005);
        assert_eq!(of_credentials(&[]).unwrap(), 0);
        assert!(of_credentials(&[12 << 3 | 2, 9, 1]).is_err());
        assert!(of_credentials(&[12 << 3 | 2, 3, 0, 0, 1]).is_err());
    }
}
