//! Architectures whose registers nobody has described here yet: nothing is injected.

use super::InjectError;

pub(super) type Request = libc::c_uint;

pub(super) const GET_REGISTERS: Request = 0;
pub(super) const SET_REGISTERS: Request = 0;

pub(super) const FILE_CALLS: &[libc::c_long] = &[];

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Registers;

pub(super) fn supported(_: &Registers) -> bool {
    false
}

pub(super) fn position(_: &Registers) -> u64 {
    0
}

pub(super) fn call(registers: &Registers, _: u64, _: libc::c_long, _: u64) -> Registers {
    *registers
}

pub(super) fn number(_: &Registers) -> libc::c_long {
    -1
}

pub(super) fn result(_: &Registers) -> i64 {
    -1
}

pub(super) fn instruction(pid: i32) -> Result<u64, InjectError> {
    Err(InjectError::Architecture(pid))
}
