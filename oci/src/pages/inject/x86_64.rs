//! Registers and instructions of x86_64.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::InjectError;
use crate::pages::areas::{parse_maps, read_maps};

/// First parameter of libc's ptrace.
pub(super) type Request = libc::c_uint;

pub(super) const GET_REGISTERS: Request = libc::PTRACE_GETREGS;
pub(super) const SET_REGISTERS: Request = libc::PTRACE_SETREGS;

/// Registers as the kernel hands them out: 27 words in the order of `struct user_regs_struct`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Registers([u64; 27]);

const _: () = assert!(size_of::<Registers>() == size_of::<libc::user_regs_struct>());

const RAX: usize = 10;
const RDI: usize = 14;
/// The number of the system call that the process is in; -1 when it is in none.
const ORIG_RAX: usize = 15;
const RIP: usize = 16;
const CS: usize = 17;

/// Code segment of a 64-bit process.
const USER_CS: u64 = 0x33;

/// `syscall`. The bytes are that instruction wherever they are found.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How much of an area is searched, bytes.
const SEARCH: usize = 2 << 20;

/// System calls that wait for files, and change nothing of the layout of memory.
pub(super) const FILE_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    libc::SYS_io_submit,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_sync,
    libc::SYS_msync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_close,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
];

/// Whether the registers are those of a 64-bit process.
pub(super) fn supported(registers: &Registers) -> bool {
    registers.0[CS] == USER_CS
}

/// Address of the next instruction.
pub(super) fn position(registers: &Registers) -> u64 {
    registers.0[RIP]
}

/// Registers with which the process calls the kernel. In no system call as far as the kernel knows, so
/// that it restarts none.
pub(super) fn call(
    registers: &Registers,
    instruction: u64,
    number: libc::c_long,
    argument: u64,
) -> Registers {
    let mut call = *registers;
    call.0[RIP] = instruction;
    call.0[RAX] = number.cast_unsigned();
    call.0[ORIG_RAX] = u64::MAX;
    call.0[RDI] = argument;
    call
}

/// Number of the system call that was entered.
pub(super) fn number(registers: &Registers) -> libc::c_long {
    registers.0[ORIG_RAX].cast_signed()
}

/// What the system call gave.
pub(super) fn result(registers: &Registers) -> i64 {
    registers.0[RAX].cast_signed()
}

/// Address of an instruction for a system call: in the vdso, which no process changes, or else in
/// any other code.
pub(super) fn instruction(pid: i32) -> Result<u64, InjectError> {
    let mut maps = Vec::new();
    read_maps(pid, &mut maps)
        .map_err(super::gone)
        .map_err(InjectError::io(pid, "read the areas"))?;
    let areas = parse_maps(&maps)
        .map_err(std::io::Error::other)
        .map_err(InjectError::io(pid, "read the areas"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))
        .map_err(super::gone)
        .map_err(InjectError::io(pid, "open the memory"))?;
    let code = |vdso: bool| {
        areas.iter().filter(move |a| {
            a.perms[2] == b'x' && (a.name == b"[vdso]") == vdso && a.name != b"[vsyscall]"
        })
    };
    let mut bytes = Vec::new();
    for area in code(true).chain(code(false)) {
        bytes.resize(SEARCH.min((area.end - area.start) as usize), 0);
        let read = memory.read_at(&mut bytes, area.start).unwrap_or(0);
        if let Some(at) = bytes[..read].windows(SYSCALL.len()).position(|w| w == SYSCALL) {
            return Ok(area.start + at as u64);
        }
    }
    // One that is ending loses its memory first.
    let status = super::Status::read(pid).map_err(InjectError::io(pid, "read the status"))?;
    Err(if status.ending() { InjectError::Gone(pid) } else { InjectError::NoInstruction(pid) })
}
