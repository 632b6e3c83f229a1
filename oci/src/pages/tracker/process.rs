//! What `/proc` says of a process, as far as the tracker asks.
#![allow(unsafe_code)] // kcmp(2) has no safe wrapper.

use std::fs;
use std::io;

/// What tells one memory of a process from another: where the kernel has laid out its program. An exec
/// changes it, unless addresses are not randomised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Image {
    code: u64,
    stack: u64,
    brk: u64,
}

/// What is read in every round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    /// Process number in the innermost namespace.
    pub(super) space: u32,
    /// Memory locked by mlock(2), KB.
    pub(super) locked: u64,
    pub(super) image: Image,
}

impl Facts {
    pub(super) fn read(pid: i32) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let (space, locked) = parse_status(&status).ok_or_else(|| not_understood("status"))?;
        let stat = fs::read(format!("/proc/{pid}/stat"))?;
        let image = parse_stat(&stat).ok_or_else(|| not_understood("stat"))?;
        Ok(Self { space, locked, image })
    }
}

fn not_understood(file: &str) -> io::Error {
    io::Error::other(format!("{file} not understood"))
}

fn parse_status(text: &str) -> Option<(u32, u64)> {
    let value = |name: &str| text.lines().find_map(|l| l.strip_prefix(name));
    let space = value("NSpid:")?.split_whitespace().last()?.parse().ok()?;
    // A process that is ending has no memory.
    let locked = match value("VmLck:") {
        Some(text) => text.split_whitespace().next()?.parse().ok()?,
        None => 0,
    };
    Some((space, locked))
}

fn parse_stat(text: &[u8]) -> Option<Image> {
    // The name, in parentheses, may hold anything.
    let behind = text.iter().rposition(|b| *b == b')')? + 1;
    let fields: Vec<&str> =
        std::str::from_utf8(&text[behind..]).ok()?.split_ascii_whitespace().collect();
    // proc_pid_stat(5) counts from 1, and the first field here is the third.
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some(Image { code: field(26)?, stack: field(28)?, brk: field(47)? })
}

/// Whether two processes have the same memory (`CLONE_VM`: between vfork(2) and exec(2), mostly).
pub(super) fn same_memory(a: i32, b: i32) -> bool {
    /// `KCMP_VM`.
    const VM: libc::c_int = 1;
    // SAFETY: the call takes numbers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, VM, 0, 0) };
    order == 0
}

/// Whether the kernel or a device may write into pages of the process behind the page tables' back:
/// reads that bypass the page cache do.
pub(super) fn reads_directly(pid: i32) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
        return false;
    };
    entries.flatten().any(|entry| fs::read_to_string(entry.path()).is_ok_and(|t| is_direct(&t)))
}

fn is_direct(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|l| l.strip_prefix("flags:"));
    let direct = flags
        .and_then(|f| i32::from_str_radix(f.trim(), 8).ok())
        .is_some_and(|flags| flags & libc::O_DIRECT != 0);
    direct || fdinfo.contains("SqThread:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_number_and_the_locked_memory_are_read() {
        let text = "Name:\tx\nNSpid:\t812\t17\t1\nVmLck:\t      64 kB\n";
        assert_eq!(parse_status(text), Some((1, 64)));
        assert_eq!(parse_status("NSpid:\t5\n"), Some((5, 0)));
        assert_eq!(parse_status("Name:\tx\n"), None);
    }

    #[test]
    fn a_name_with_parentheses_and_blanks_is_no_obstacle() {
        let mut fields: Vec<String> = (3..60).map(|n| n.to_string()).collect();
        fields[0] = "S".into();
        let text = format!("12 (a) b (c)) {}", fields.join(" "));
        let image = parse_stat(text.as_bytes());
        assert_eq!(image, Some(Image { code: 26, stack: 28, brk: 47 }));
    }

    #[test]
    fn direct_reads_are_seen_by_the_flags_of_a_descriptor() {
        let flags = libc::O_DIRECT | libc::O_RDWR;
        assert!(is_direct(&format!("pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t1\n")));
        assert!(!is_direct("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"));
        assert!(is_direct("pos:\t0\nflags:\t02000002\nSqThread:\t-1\n"));
    }

    #[test]
    fn a_process_has_its_own_memory_and_no_other() {
        let me = std::process::id().cast_signed();
        assert!(same_memory(me, me));
        assert!(!same_memory(me, 1));
        let facts = Facts::read(me).unwrap();
        assert_eq!(Facts::read(me).unwrap().image, facts.image);
        assert_ne!(Facts::read(1).map(|f| f.image).ok(), Some(facts.image));
    }
}
