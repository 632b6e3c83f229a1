//! The loopback device of a container's network namespace.
#![allow(unsafe_code)] // two ioctls on a device's flags

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Brings up the loopback device in the network namespace of process `pid`. CRIU leaves the one it
/// makes down, and connections over it cannot be restored then.
///
/// # Errors
/// When the process is gone or the kernel refuses.
pub fn loopback_up(pid: i32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // A thread of its own: it enters the namespace and ends there.
    let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        up()
    })?;
    thread.join().map_err(|_| io::Error::other("the thread in the network namespace panicked"))?
}

fn up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    // SAFETY: the kernel reads and writes one ifreq.
    call(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) })?;
    // SAFETY: SIOCGIFFLAGS has just filled the flags in.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: the kernel reads one ifreq.
    call(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
}

fn call(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_loopback_device_of_a_new_namespace_comes_up() {
        // Says when it is in its namespace, then prints the device's flags once it is told to.
        let mut child = Command::new("unshare")
            .args([
                "--net",
                "sh",
                "-c",
                "echo; read _; cat /sys/class/net/lo/flags; ip -o link show lo",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        loopback_up(child.id() as i32).unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("LOOPBACK,UP"), "{text}");
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(loopback_up(i32::MAX).is_err());
    }
}
