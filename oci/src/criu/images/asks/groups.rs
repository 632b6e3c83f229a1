//! Control groups: whether tasks are in any but the container's own.

use super::super::super::ImageError;
use super::super::super::decode::{fields, records};
use super::text;

const CGROUP_MAGIC: u32 = 0x5938_3330;

/// A folder of a hierarchy: the hierarchy's names, the folder's.
type Own = (Vec<String>, String);

/// What is in other groups than the one that runc puts in its place, in words.
pub(super) fn parse(image: &[u8]) -> Result<Option<String>, ImageError> {
    let Some(record) = records(image, CGROUP_MAGIC)?.next() else { return Ok(None) };
    let record = record?;
    let mut own: Vec<Own> = Vec::new();
    for field in fields(record) {
        let field = field?;
        if field.number == 2 {
            let (names, folders, nested) = controller(field.message())?;
            if nested {
                return Ok(Some(format!("control groups below its own ({})", names.join(","))));
            }
            own.extend(folders.into_iter().map(|folder| (names.clone(), folder)));
        }
    }
    if let Some((_, folder)) = own.iter().find(|(_, folder)| !is_plain(folder)) {
        return Ok(Some(format!("the control group {folder:?}")));
    }
    for field in fields(record) {
        let field = field?;
        if field.number != 1 {
            continue;
        }
        for member in fields(field.message()) {
            let member = member?;
            if member.number == 2
                && let Some(path) = elsewhere(member.message(), &own)?
            {
                return Ok(Some(format!("processes in the control group {path:?}")));
            }
        }
    }
    Ok(None)
}

/// A path below the root that stays below it. CRIU writes it without the first slash.
fn is_plain(folder: &str) -> bool {
    !folder.is_empty() && folder.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// Names of a hierarchy and its folders; whether there are folders in them.
fn controller(message: &[u8]) -> Result<(Vec<String>, Vec<String>, bool), ImageError> {
    let (mut names, mut folders, mut nested) = (Vec::new(), Vec::new(), false);
    for field in fields(message) {
        let field = field?;
        match field.number {
            1 => names.push(text(&field)?),
            2 => {
                let mut folder = String::new();
                for part in fields(field.message()) {
                    let part = part?;
                    match part.number {
                        1 => folder = text(&part)?,
                        2 => nested = true,
                        _ => {}
                    }
                }
                folders.push(folder);
            }
            _ => {}
        }
    }
    Ok((names, folders, nested))
}

/// The path of a member, if that is no folder of `own`.
fn elsewhere(message: &[u8], own: &[Own]) -> Result<Option<String>, ImageError> {
    let (mut name, mut path, mut prefix) = (String::new(), String::new(), 0);
    for field in fields(message) {
        let field = field?;
        match field.number {
            1 => name = text(&field)?,
            2 => path = text(&field)?,
            3 => prefix = field.number32(),
            _ => {}
        }
    }
    let folder = path.strip_prefix('/');
    // Hierarchies of several controllers have them all in the member's name.
    let has = |names: &[String]| name.split(',').all(|name| names.iter().any(|n| n == name));
    let known = own.iter().any(|(names, own)| has(names) && folder == Some(own));
    // With a namespace of its own, so much of the path is in front of its root.
    let whole = prefix == 0 || prefix as usize == path.len();
    Ok((!known || !whole).then_some(path))
}
