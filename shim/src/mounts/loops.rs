//! Files as block devices.

// Two requests to the loop driver.
#![allow(unsafe_code)]

use super::options::Options;
use crate::error::{Context as _, Error, Result};
use nix::errno::Errno;
use nix::mount::MsFlags;
use rustix::ioctl::{Setter, ioctl};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

const LOOP_CTL_GET_FREE: u32 = 0x4C82;
const LOOP_CONFIGURE: u32 = 0x4C0A;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;
/// Others take free devices too.
const TRIES: usize = 100;

/// A loop device. It goes when neither this nor a mount uses it any more.
pub(super) struct Device {
    pub(super) path: String,
    _open: File,
}

/// `struct loop_config` of linux/loop.h, with its `struct loop_info64`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    /// Device, inode, real device, offset, size limit.
    numbers: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    /// File name, cipher, key.
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// Makes a device of the file `source`.
pub(super) fn attach(source: &str, options: &Options) -> Result<Device> {
    let read_only = options.flags.contains(MsFlags::MS_RDONLY);
    let open = |path: &str| {
        let file = OpenOptions::new().read(true).write(!read_only).open(path);
        file.context(format!("open {path}"))
    };
    let file = open(source)?;
    let flag = |set, flag| if set { flag } else { 0 };
    let flags = AUTOCLEAR | flag(read_only, READ_ONLY) | flag(options.direct, DIRECT_IO);
    let mut names = [0; 160];
    // For people; the last byte stays zero.
    names.iter_mut().zip(source.bytes().take(63)).for_each(|(to, from)| *to = from);
    for _ in 0..TRIES {
        let path = format!("/dev/loop{}", free()?);
        let device = open(&path)?;
        let config = Config {
            fd: file.as_raw_fd().cast_unsigned(),
            block_size: 0,
            numbers: [0; 5],
            number: 0,
            encryption: [0; 2],
            flags,
            names,
            init: [0; 2],
            reserved: [0; 8],
        };
        // SAFETY: the request reads a `struct loop_config`, which `Config` has the layout of.
        match unsafe { ioctl(&device, Setter::<LOOP_CONFIGURE, Config>::new(config)) } {
            Ok(()) => return Ok(Device { path, _open: device }),
            Err(rustix::io::Errno::BUSY) => {}
            Err(err) => return Err(err).context(format!("make {path} a device of {source}")),
        }
    }
    Err(Error::internal(format!("no loop device is free for {source}")))
}

/// The number of a free device.
fn free() -> Result<i32> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control");
    let control = control.context("open /dev/loop-control")?;
    // SAFETY: the request takes no argument and returns a number.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE.into()) };
    Errno::result(number).context("find a free loop device")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_long_as_the_kernels() {
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Config, flags), 60);
    }
}
