//! A container's network namespace: running code and programs in it, and its loopback device.
#![allow(unsafe_code)] // two ioctls on a device's flags; a step between fork and exec

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Where network namespaces have names, as ip-netns(8) gives them.
const NAMED: &str = "/run/netns";

/// A network namespace, kept alive by this.
#[derive(Debug)]
pub struct Netns(File);

impl Netns {
    /// What is at `path`. Whether it is a network namespace is found out by who enters it.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    /// The one that process `pid` is in.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Whether both are the same namespace.
    ///
    /// # Errors
    /// When one cannot be looked at.
    pub fn is(&self, other: &Self) -> io::Result<bool> {
        let (one, two) = (self.0.metadata()?, other.0.metadata()?);
        Ok((one.st_dev(), one.st_ino()) == (two.st_dev(), two.st_ino()))
    }

    /// Whether this is the namespace of the calling process: on the host, the host's own.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn is_own(&self) -> io::Result<bool> {
        self.is(&Self::of(std::process::id())?)
    }

    /// Does `work` in it, on a thread of its own: a thread that has entered cannot be had back.
    ///
    /// # Errors
    /// `EINVAL` when it is no network namespace; when the kernel refuses.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let inside = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            io::Result::Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into());
            let thread = thread.spawn_scoped(scope, inside)?;
            let panicked = |_| io::Error::other("the thread in the network namespace panicked");
            thread.join().map_err(panicked)?
        })
    }

    /// Makes `command` start in it. When the namespace cannot be entered, starting fails.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn enter(&self, command: &mut Command) -> io::Result<()> {
        let namespace = self.0.try_clone()?;
        let enter = move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?);
        // SAFETY: between fork and exec it makes one system call, and takes no lock and no memory.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }
}

/// Does `work` in the calling process's network namespace, on the host its own, and in each that has a name: what
/// comes of it, with the paths of the named ones. What cannot be entered is left out, as a file that is left
/// from before a restart.
pub fn everywhere<T: Send>(work: impl Fn() -> T + Sync) -> Vec<(Option<PathBuf>, T)> {
    everywhere_in(Path::new(NAMED), work)
}

fn everywhere_in<T: Send>(named: &Path, work: impl Fn() -> T + Sync) -> Vec<(Option<PathBuf>, T)> {
    let mut done = vec![(None, work())];
    let entries = std::fs::read_dir(named).into_iter().flatten().flatten();
    // Nothing else is opened: that could wait, or do something.
    let mut paths: Vec<_> = entries.map(|e| e.path()).filter(|path| path.is_file()).collect();
    paths.sort();
    let mut seen: Vec<Netns> = Netns::of(std::process::id()).into_iter().collect();
    for path in paths {
        let Ok(netns) = Netns::open(&path) else { continue };
        // It may have several names.
        if seen.iter().any(|other| netns.is(other).unwrap_or(false)) {
            continue;
        }
        if let Ok(result) = netns.run(&work) {
            done.push((Some(path), result));
            seen.push(netns);
        }
    }
    done
}

/// Brings up the loopback device in the network namespace of process `pid`. CRIU leaves the one it
/// makes down, and connections over it cannot be restored then.
///
/// # Errors
/// When the process is gone or the kernel refuses.
pub fn loopback_up(pid: i32) -> io::Result<()> {
    Netns::of(pid.cast_unsigned())?.run(up)?
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
    use std::process::Stdio;

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

    /// A process in a network namespace of its own, until it is dropped.
    struct Elsewhere(std::process::Child);

    impl Elsewhere {
        fn start() -> Self {
            let mut child = Command::new("unshare")
                .args(["--net", "sh", "-c", "echo; read _"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            Self(child)
        }
    }

    impl Drop for Elsewhere {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    #[test]
    fn code_and_programs_run_in_it_and_the_caller_stays_where_it_is() {
        let link = |path: &str| std::fs::read_link(path).unwrap();
        let here = link("/proc/thread-self/ns/net");
        let elsewhere = Elsewhere::start();
        let netns = Netns::of(elsewhere.0.id()).unwrap();
        let there = link(&format!("/proc/{}/ns/net", elsewhere.0.id()));
        assert_ne!(here, there);
        assert_eq!(netns.run(|| link("/proc/thread-self/ns/net")).unwrap(), there);

        let mut command = Command::new("readlink");
        command.arg("/proc/self/ns/net");
        netns.enter(&mut command).unwrap();
        let printed = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(Path::new(printed.trim()), there);
        assert_eq!(link("/proc/thread-self/ns/net"), here);

        assert!(!netns.is_own().unwrap() && netns.is(&netns).unwrap());
        assert!(Netns::of(std::process::id()).unwrap().is_own().unwrap());
    }

    #[test]
    fn each_namespace_is_looked_into_once_and_what_is_none_is_left_out() {
        let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let elsewhere = Elsewhere::start();
        let named = tempfile::tempdir().unwrap();
        let name = |name: &str, target: &str| {
            std::os::unix::fs::symlink(target, named.path().join(name)).unwrap();
        };
        name("host", "/proc/self/ns/net");
        let its = format!("/proc/{}/ns/net", elsewhere.0.id());
        name("x", &its);
        name("x-again", &its);
        name("uts", "/proc/self/ns/uts");
        name("gone", "/proc/self/ns/no-such");
        std::fs::write(named.path().join("left"), "").unwrap();
        std::fs::create_dir(named.path().join("folder")).unwrap();
        let there = std::fs::read_link(&its).unwrap();
        let wanted = [(None, own()), (Some(named.path().join("x")), there)];
        assert_eq!(everywhere_in(named.path(), own), wanted);
        assert_eq!(everywhere_in(&named.path().join("none"), own).len(), 1);
    }

    #[test]
    fn what_is_no_network_namespace_cannot_be_entered() {
        for path in ["/proc/self/ns/uts", "/proc/version"] {
            let netns = Netns::open(Path::new(path)).unwrap();
            let ran = netns.run(|| panic!("it has run"));
            assert_eq!(ran.unwrap_err().raw_os_error(), Some(libc::EINVAL), "{path}");
            let mut command = Command::new("true");
            netns.enter(&mut command).unwrap();
            assert!(command.spawn().is_err(), "{path}");
        }
    }
}
