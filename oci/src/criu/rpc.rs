//! The few messages between CRIU and whoever drives it that ferry has to understand.
//!
//! CRIU tells its client of each step by a *notify* and goes on when it is answered. That makes
//! every step a place where it can be held, and tells to the microsecond where it is. The messages
//! are protobuf (CRIU's `images/rpc.proto`); everything not named here is passed on unread.

use protobuf::{CodedInputStream, CodedOutputStream};

/// `criu_req_type` of a notify.
const NOTIFY: u64 = 6;

/// A message of CRIU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromCriu {
    /// It has come to a step, and waits for the answer.
    Notify {
        /// Name of the step: `post-dump`, `post-restore`, ...
        script: String,
        /// Pid of the restored init in CRIU's pid namespace, at the steps that have it.
        pid: Option<i32>,
    },
    /// It has done what it was asked for, or failed.
    Answer {
        /// Whether it was done.
        success: bool,
        /// Its version, if it was asked for that.
        version: Option<String>,
    },
}

/// Reads one message; `None` when it is none that CRIU sends.
pub fn parse(message: &[u8]) -> Option<FromCriu> {
    let mut input = CodedInputStream::from_bytes(message);
    let (mut kind, mut success, mut notify, mut version) = (None, false, None, None);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            // type
            0x08 => kind = Some(input.read_raw_varint64().ok()?),
            // success
            0x10 => success = input.read_raw_varint64().ok()? != 0,
            // notify
            0x2a => notify = Some(input.read_bytes().ok()?),
            // version
            0x52 => version = Some(numbers(&input.read_bytes().ok()?)?),
            other => skip(&mut input, other)?,
        }
    }
    if kind? != NOTIFY {
        return Some(FromCriu::Answer { success, version });
    }
    let notify = notify?;
    let mut input = CodedInputStream::from_bytes(&notify);
    let (mut script, mut pid) = (String::new(), None);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            0x0a => script = input.read_string().ok()?,
            0x10 => pid = i32::try_from(input.read_raw_varint64().ok()?).ok(),
            other => skip(&mut input, other)?,
        }
    }
    Some(FromCriu::Notify { script, pid })
}

/// `4.2.1` of a version that has the numbers 1 (major), 2 (minor) and 4 (sublevel).
fn numbers(version: &[u8]) -> Option<String> {
    let mut input = CodedInputStream::from_bytes(version);
    let (mut major, mut minor, mut sub) = (0, 0, None);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            0x08 => major = input.read_raw_varint64().ok()?,
            0x10 => minor = input.read_raw_varint64().ok()?,
            0x20 => sub = Some(input.read_raw_varint64().ok()?),
            other => skip(&mut input, other)?,
        }
    }
    let sub = sub.map(|sub| format!(".{sub}")).unwrap_or_default();
    Some(format!("{major}.{minor}{sub}"))
}

/// What ferry changes in a request to CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changes {
    /// Descriptor of the folder of images.
    pub images_fd: u8,
    /// Descriptor of the work folder.
    pub work_fd: u8,
    /// How much CRIU logs, if not what its client wants: [`QUIET`].
    pub log_level: Option<u8>,
}

/// CRIU's log level for errors and warnings. runc asks for everything, which takes two lines of log
/// for each system call.
pub const QUIET: u8 = 2;

/// Has CRIU look for its folders at other descriptors than its client named: it looks among those
/// of whoever made its socket. `None` when `request` is not one to dump or restore.
///
/// A message that stands twice in another is merged, and the later one wins: what is to be changed
/// is appended.
pub fn amend(request: &[u8], changes: Changes) -> Option<Vec<u8>> {
    // type = DUMP, RESTORE, PRE_DUMP
    let [0x08, 1 | 2 | 4, ..] = request else { return None };
    // images_dir_fd = 1, work_dir_fd = 17, as varints of two bytes
    let (images, work) = (varint(changes.images_fd), varint(changes.work_fd));
    let mut opts = vec![0x08, images[0], images[1], 0x88, 0x01, work[0], work[1]];
    // log_level = 9
    opts.extend(changes.log_level.into_iter().flat_map(|level| [0x48, level]));
    let mut amended = request.to_vec();
    // opts = 2
    amended.extend([0x12, opts.len() as u8]);
    amended.extend(opts);
    Some(amended)
}

/// Has a restore take its external mounts from elsewhere: `to` is given where the client would have each
/// from. `None` when `request` is not one to restore.
pub fn redirect(request: &[u8], to: impl Fn(&str) -> Option<String>) -> Option<Vec<u8>> {
    // type = RESTORE
    let [0x08, 2, ..] = request else { return None };
    // opts = 2, ext_mnt = 23, val = 2
    replace(request, 2, &|opts| {
        replace(opts, 23, &|mount| {
            replace(mount, 2, &|from| to(std::str::from_utf8(from).ok()?).map(String::into_bytes))
        })
    })
}

/// `message` with the texts, bytes or messages of field `number` replaced by what `new` says, if it does.
fn replace(message: &[u8], number: u32, new: &dyn Fn(&[u8]) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut replaced = Vec::with_capacity(message.len());
    let mut at = 0;
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        let changed = match tag == number << 3 | 2 {
            true => new(&input.read_bytes().ok()?),
            false => {
                skip(&mut input, tag)?;
                None
            }
        };
        let end = usize::try_from(input.pos()).ok()?;
        match changed {
            None => replaced.extend_from_slice(&message[at..end]),
            Some(bytes) => {
                let mut output = CodedOutputStream::vec(&mut replaced);
                output.write_bytes(number, &bytes).ok()?;
                output.flush().ok()?;
            }
        }
        at = end;
    }
    Some(replaced)
}

fn varint(value: u8) -> [u8; 2] {
    [value | 0x80, value >> 7]
}

/// The answer to a notify. CRIU fails what it is doing when `success` is false.
pub fn answer(success: bool) -> Vec<u8> {
    // type = NOTIFY, notify_success
    vec![0x08, NOTIFY as u8, 0x18, u8::from(success)]
}

fn skip(input: &mut CodedInputStream<'_>, tag: u32) -> Option<()> {
    match tag & 7 {
        0 => input.read_raw_varint64().map(drop).ok(),
        1 => input.read_fixed64().map(drop).ok(),
        2 => input.read_bytes().map(drop).ok(),
        5 => input.read_fixed32().map(drop).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notify(script: &str, pid: Option<u8>) -> Vec<u8> {
        let mut inner = vec![0x0a, script.len() as u8];
        inner.extend_from_slice(script.as_bytes());
        inner.extend(pid.into_iter().flat_map(|pid| [0x10, pid]));
        let mut message = vec![0x08, 6, 0x10, 1, 0x2a, inner.len() as u8];
        message.extend(inner);
        message
    }

    #[test]
    fn a_notify_tells_its_step_and_the_pid_if_it_has_one() {
        let step = |script: &str, pid| FromCriu::Notify { script: script.to_owned(), pid };
        assert_eq!(parse(&notify("post-dump", None)), Some(step("post-dump", None)));
        assert_eq!(parse(&notify("post-restore", Some(42))), Some(step("post-restore", Some(42))));
    }

    #[test]
    fn an_answer_tells_whether_it_was_done() {
        // A restore that has succeeded, with the pid of its init.
        let done = [0x08, 2, 0x10, 1, 0x22, 2, 0x08, 42];
        let answer = |success| Some(FromCriu::Answer { success, version: None });
        assert_eq!(parse(&done), answer(true));
        // A dump that has failed, with errno and text.
        let failed = [0x08, 1, 0x10, 0, 0x38, 22, 0x4a, 2, b'n', b'o'];
        assert_eq!(parse(&failed), answer(false));
        // Version 4.2.1 of that name.
        let version = [0x08, 10, 0x10, 1, 0x52, 9, 0x08, 4, 0x10, 2, 0x1a, 1, b'g', 0x20, 1];
        let text = Some("4.2.1".to_owned());
        assert_eq!(parse(&version), Some(FromCriu::Answer { success: true, version: text }));
    }

    #[test]
    fn what_is_no_message_is_none() {
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0x08]), None);
        assert_eq!(parse(&[0x10, 1]), None);
        assert_eq!(parse(&[0x08, 6, 0x10, 1]), None);
        let whole = notify("post-dump", None);
        for cut in 1..whole.len() {
            assert!(!matches!(parse(&whole[..cut]), Some(FromCriu::Notify { .. })), "{cut}");
        }
    }

    #[test]
    fn the_last_word_on_the_folders_is_ours() {
        let request = [0x08, 1, 0x12, 2, 0x08, 7];
        let changes = Changes { images_fd: 201, work_fd: 3, log_level: None };
        let amended = amend(&request, changes).unwrap();
        assert_eq!(amended[..6], request);
        assert_eq!(amended[6..], [0x12, 7, 0x08, 0xc9, 0x01, 0x88, 0x01, 0x83, 0x00]);
        let quiet = amend(&request, Changes { log_level: Some(QUIET), ..changes }).unwrap();
        assert_eq!(quiet[6..], [0x12, 9, 0x08, 0xc9, 0x01, 0x88, 0x01, 0x83, 0x00, 0x48, 2]);
        // A question for the version.
        assert_eq!(amend(&[0x08, 10], changes), None);
        assert_eq!(amend(&[], changes), None);
    }

    #[test]
    fn mounts_are_redirected_and_nothing_else_is_touched() {
        let mount = |key: &str, val: &str| {
            let mut mount = vec![0x0a, key.len() as u8];
            mount.extend_from_slice(key.as_bytes());
            mount.extend([0x12, val.len() as u8]);
            mount.extend_from_slice(val.as_bytes());
            [vec![0xba, 0x01, mount.len() as u8], mount].concat()
        };
        let request = |kind: u8, mounts: &[Vec<u8>]| {
            // images_dir_fd, a text that looks the same, and a number behind.
            let opts =
                [vec![0x08, 7, 0x12, 2, b'/', b'a'], mounts.concat(), vec![0x48, 4]].concat();
            [vec![0x08, kind, 0x12, opts.len() as u8], opts, vec![0x18, 1]].concat()
        };
        let before = [mount("/x", "/a"), mount("/y", "/other")];
        let to = |from: &str| (from == "/a").then(|| "/a/longer".to_owned());
        let after = [mount("/x", "/a/longer"), mount("/y", "/other")];
        assert_eq!(redirect(&request(2, &before), to), Some(request(2, &after)));
        assert_eq!(redirect(&request(2, &before), |_| None), Some(request(2, &before)));
        assert_eq!(redirect(&request(1, &before), to), None, "a dump");
        let whole = request(2, &before);
        assert_eq!(redirect(&whole[..whole.len() - 3], to), None);
    }

    #[test]
    fn an_answer_is_the_message_that_criu_reads() {
        assert_eq!(answer(true), [0x08, 6, 0x18, 1]);
        assert_eq!(answer(false), [0x08, 6, 0x18, 0]);
    }
}
