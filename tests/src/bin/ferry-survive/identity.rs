//! Who a process is, and what it may do.

use std::fs;

use crate::files::scratch;
use crate::signals::status;
use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const UMASK: i64 = 95;
const GETPRIORITY: i64 = 140;
const SETRESUID: i64 = 117;
const SETRESGID: i64 = 119;
const SETGROUPS: i64 = 116;
const CAPSET: i64 = 126;
const PR_SET_KEEPCAPS: i32 = 8;
const PR_SET_NAME: i32 = 15;
const PR_SET_SECCOMP: i32 = 22;
const PR_CAPBSET_DROP: i32 = 24;
const PR_GET_SECUREBITS: i32 = 27;
const PR_SET_NO_NEW_PRIVS: i32 = 38;
const CAP_CHOWN: u32 = 0;
const CAP_KILL: u32 = 5;
const CAP_NET_RAW: u64 = 13;
/// An error that no call gives by itself.
const ERROR: i32 = 77;

fn address<T>(of: &T) -> i64 {
    std::ptr::from_ref(of).expose_provenance().cast_signed() as i64
}

/// Variables, command line, program, name, folder, root and mask.
pub(crate) fn environment(turn: &mut Turn) -> Done {
    fs::create_dir_all(scratch("folder")?)?;
    std::env::set_current_dir(scratch("folder")?)?;
    sys::call(UMASK, [0o27, 0, 0, 0, 0])?;
    sys::control(PR_SET_NAME, c"a survivor".as_ptr().expose_provenance() as u64)?;
    let all = || -> Result<Vec<Vec<u8>>, Wrong> {
        let text = |name: &str| fs::read(format!("/proc/self/{name}"));
        let link = |name: &str| {
            fs::read_link(format!("/proc/self/{name}"))
                .map(|l| l.into_os_string().into_encoded_bytes())
        };
        let host = fs::read("/proc/sys/kernel/hostname")?;
        let found = [
            text("environ")?,
            text("cmdline")?,
            text("comm")?,
            host,
            link("exe")?,
            link("cwd")?,
            link("root")?,
        ];
        Ok(found.into_iter().chain([status(&["Umask"])?.concat().into_bytes()]).collect())
    };
    let (was, variables) = (all()?, std::env::vars().collect::<Vec<_>>());
    holds("it has variables", variables.iter().any(|(name, _)| name == "SURVIVE"))?;
    if turn.pass()? {
        sys::call(UMASK, [0o22, 0, 0, 0, 0])?;
    }
    let text = |all: Vec<Vec<u8>>| -> Vec<String> {
        all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    };
    same("what the kernel says", text(all()?), text(was))?;
    same("the variables", std::env::vars().collect(), variables)
}

/// Further groups alone.
pub(crate) fn groups(turn: &mut Turn) -> Done {
    let groups: [u32; 4] = [5, 44, 3000, 3001];
    sys::call(SETGROUPS, [3, address(&groups), 0, 0, 0]).at("set the groups")?;
    let was = status(&["Groups"])?;
    holds("groups are set", was.concat().contains("5 44 3000"))?;
    if turn.pass()? {
        sys::call(SETGROUPS, [4, address(&groups), 0, 0, 0])?;
    }
    same("the groups", status(&["Groups"])?, was)
}

/// Real, effective and saved ids that differ, and groups.
pub(crate) fn user(turn: &mut Turn) -> Done {
    let groups: [u32; 3] = [5, 44, 3000];
    sys::call(SETGROUPS, [3, address(&groups), 0, 0, 0]).at("set the groups")?;
    sys::call(SETRESGID, [1010, 1011, 1012, 0, 0]).at("set the group")?;
    sys::call(SETRESUID, [1000, 1001, 1002, 0, 0]).at("set the user")?;
    let ids = || status(&["Uid", "Gid", "Groups"]);
    let was = ids()?;
    holds("ids are set", was[0].starts_with("Uid:\t1000\t1001\t1002"))?;
    if turn.pass()? {
        sys::call(SETRESUID, [-1, 1000, -1, 0, 0])?;
    }
    same("the ids", ids()?, was)
}

/// Sets that differ from each other, one that can never be had again, and what goes with them.
pub(crate) fn capabilities(turn: &mut Turn) -> Done {
    let set = |drop: u32| -> Result<(), Wrong> {
        let lines = status(&["CapInh", "CapPrm"])?;
        let permitted = lines.last().and_then(|line| line.split('\t').nth(1));
        let permitted = permitted.and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or(0);
        let (effective, inheritable) = (permitted & !u64::from(drop), 1 << CAP_KILL);
        let words = |set: u64, n: u32| (set >> (n * 32)) as u32;
        let sets = [0, 1].map(|n| [effective, permitted, inheritable].map(|set| words(set, n)));
        let header = [0x2008_0522_u32, 0];
        sys::call(CAPSET, [address(&header), address(&sets), 0, 0, 0]).at("set them")?;
        Ok(())
    };
    sys::control(PR_CAPBSET_DROP, CAP_NET_RAW).at("drop one for ever")?;
    sys::control(PR_SET_KEEPCAPS, 1)?;
    set(1 << CAP_CHOWN)?;
    let all = || -> Result<_, Wrong> {
        let lines = status(&["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"])?;
        Ok((lines, sys::control(PR_GET_SECUREBITS, 0)?))
    };
    let was = all()?;
    holds("the sets differ", was.0[1].split('\t').nth(1) != was.0[2].split('\t').nth(1))?;
    if turn.pass()? {
        set(1 << CAP_CHOWN | 1 << CAP_KILL)?;
    }
    same("the sets", all()?, was)
}

/// Has a call answer with an error of its own.
fn install(call: i64) -> Done {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const REFUSE: u32 = 0x0005_0000;
    // sock_filter: code, two ways to jump, a number.
    let step = |code: u16, no: u8, number: u32| -> u64 {
        u64::from(code) | u64::from(no) << 24 | u64::from(number) << 32
    };
    let filter = [
        step(LOAD, 0, 0),
        step(EQUAL, 1, call as u32),
        step(RETURN, 0, REFUSE | ERROR as u32),
        step(RETURN, 0, ALLOW),
    ];
    // sock_fprog.
    let program = [filter.len() as u64, address(&filter) as u64];
    sys::control(PR_SET_NO_NEW_PRIVS, 1)?;
    const PRCTL: i64 = 157;
    let arguments = [PR_SET_SECCOMP.into(), 2, address(&program), 0, 0];
    sys::call(PRCTL, arguments).at("install a filter")?;
    Ok(())
}

pub(crate) fn seccomp(turn: &mut Turn) -> Done {
    install(GETPRIORITY)?;
    let lines = || status(&["Seccomp", "Seccomp_filters", "NoNewPrivs"]);
    let was = lines()?;
    if turn.pass()? {
        install(GETPRIORITY + 1)?;
    }
    same("the filters", lines()?, was)?;
    let err = sys::call(GETPRIORITY, [0; 5]).err().and_then(|err| err.raw_os_error());
    same("the error of a filtered call", err, Some(ERROR))
}
