//! What a container cannot do. Pure: facts in, findings out.

use super::container::Processes;
use super::host::{Host, SYS_ADMIN, SYS_RESOURCE};
use super::locks::Lock;
use super::{Findings, Severity};
use crate::describe::checks;
use crate::describe::container::ContainerFacts;

/// What stands in the way of a move, and of every checkpoint as well.
const ALWAYS: [&str; 4] = ["runtime", "io-uring", "migrating", "stopped"];

/// Files without a name that CRIU can dump; `io_uring` is told by its own name.
const DUMPABLE: [&str; 8] =
    ["eventfd", "eventpoll", "fanotify", "inotify", "io_uring", "pidfd", "signalfd", "timerfd"];
/// A map can be dumped, a program cannot.
const BPF_MAP: &str = "bpf-map";

/// All of it.
pub(super) fn all(
    container: &ContainerFacts,
    processes: &Processes,
    host: &Host,
    found: &mut Findings,
) {
    of_a_move(container, found);
    files(processes, found);
    lost(processes, found);
    sockets(processes, found);
    left_in_its_network(container, processes, host, found);
    state(container, processes, host, found);
}

/// What a move is refused for.
fn of_a_move(container: &ContainerFacts, found: &mut Findings) {
    for blocker in checks::of_container(container) {
        let is_created = blocker.name == "status" && container.status != "paused";
        let severity = if ALWAYS.contains(&blocker.name) || is_created {
            Severity::Blocker
        } else {
            Severity::Warning
        };
        let what = match severity {
            Severity::Blocker => blocker.what,
            _ => format!("cannot be moved: {}", blocker.what),
        };
        found.add(severity, blocker.name, what, &blocker.cure);
    }
}

fn files(processes: &Processes, found: &mut Findings) {
    for (pid, name) in &processes.anonymous {
        if !DUMPABLE.contains(&name.as_str()) && name != BPF_MAP {
            let what = format!("process {pid} has a {name} open, which criu cannot dump");
            found.block("file-kind", what, "have the program close it");
        }
    }
    for (pid, path) in &processes.devices {
        let what = format!("process {pid} has the device {path} open");
        found.block(
            "device",
            what,
            "have the program close it: what a device knows cannot be dumped",
        );
    }
    for (pid, path) in &processes.host_files {
        let what = format!("process {pid} has a file of the host open: {path}");
        let cure =
            "let its output go to containerd (FIFOs or --log-uri), not to a file it inherits";
        found.block("host-file", what, cure);
    }
    for pid in &processes.inotify_on_overlay {
        let what = format!("process {pid} watches files of the root file system (inotify)");
        let cure = "watch files on a tmpfs or a bind mount: of an overlay's criu finds only / itself and those in \
                    few folders, like /etc and /var/log, and dumps no other watch";
        found.warn("inotify-overlay", what, cure);
    }
    for pid in &processes.locks {
        let what = format!("process {pid} has locked files");
        let cure =
            "ask for them to be kept (file_locks in the Task API's options), or end the locks";
        found.warn("file-locks", what, cure);
    }
}

/// What a checkpoint or a move loses, and everything else goes on.
fn lost(processes: &Processes, found: &mut Findings) {
    for (pid, fd) in &processes.semaphores {
        let what = format!(
            "process {pid} has an eventfd (number {fd}) that is a semaphore, and comes back as a plain one"
        );
        let cure = "open it without EFD_SEMAPHORE, or anew after a restore";
        found.warn("eventfd-semaphore", what, cure);
    }
    for (pid, fd) in &processes.unread_timers {
        let what = format!(
            "process {pid} has not read a periodic timerfd (number {fd}) that went off, which will not again \
             once it is restored"
        );
        found.warn("timerfd-unread", what, "have the program read it, or set it again");
    }
    for unread in &processes.unread {
        let what = format!(
            "process {} has not read the datagrams of a UDP socket (number {}, {} bytes), which are lost",
            unread.pid, unread.fd, unread.bytes
        );
        found.warn("udp-unread", what, "have the program read them, or their sender repeat them");
    }
}

/// AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET.
const FAMILIES: [u16; 5] = [1, 2, 10, 16, 17];
/// Of the inet families: TCP, UDP and UDP-Lite.
const PROTOCOLS: [u32; 3] = [6, 17, 136];
const MPTCP: u32 = 262;
/// IPPROTO_RAW, and those that programs open raw sockets for: ICMP and ICMPv6.
const RAW: [u32; 3] = [255, 1, 58];

fn sockets(processes: &Processes, found: &mut Findings) {
    for socket in &processes.sockets {
        let (pid, fd) = (socket.pid, socket.fd);
        let is_inet = matches!(socket.family, 2 | 10);
        if !FAMILIES.contains(&socket.family) {
            let what =
                format!("process {pid} has a socket (number {fd}) of family {}", socket.family);
            found.block("socket-family", what, "have the program close it: criu does not know it");
        } else if is_inet && socket.protocol == MPTCP {
            let what = format!("process {pid} has an MPTCP socket (number {fd})");
            let cure = "turn it off: GODEBUG=multipathtcp=0 for Go, or sysctl net.mptcp.enabled=0";
            found.block("mptcp", what, cure);
        } else if is_inet
            && !PROTOCOLS.contains(&socket.protocol)
            && !RAW.contains(&socket.protocol)
        {
            let what =
                format!("process {pid} has a socket (number {fd}) of protocol {}", socket.protocol);
            found.block(
                "socket-protocol",
                what,
                "have the program close it: criu does not know it",
            );
        }
        if is_inet && RAW.contains(&socket.protocol) || socket.family == 17 {
            let what = format!("process {pid} has a raw socket (number {fd})");
            found.warn("raw-socket", what, "end it: it cannot be moved from the host's network");
        }
    }
    for socket in &processes.outside {
        let name = if socket.name.is_empty() { "without a name" } else { &socket.name };
        let what = format!(
            "process {} is connected to a unix socket outside ({name}, number {})",
            socket.pid, socket.fd
        );
        let cure = "close it, or have its peer in the container: only datagram sockets can be left open \
                    (external_unix_sockets in the Task API's options)";
        found.block("external-unix", what, cure);
    }
}

fn left_in_its_network(
    container: &ContainerFacts,
    processes: &Processes,
    host: &Host,
    found: &mut Findings,
) {
    for table in &processes.criu_tables {
        let what = format!("table {table} of criu silences the network of {}", container.id);
        let cure = format!("nft delete table inet {table} in there, if no criu runs");
        found.block("criu-rules", what, &cure);
    }
    // A namespace with a name has been looked into with the host.
    let is_told = |lock: &&Lock| host.locks.iter().any(|told| told.id == lock.id);
    for lock in processes.checkpoint_locks.iter().filter(|lock| !is_told(lock)) {
        lock.tell(found);
    }
}

fn state(container: &ContainerFacts, processes: &Processes, host: &Host, found: &mut Findings) {
    for (pid, tracer) in &processes.traced {
        let what = format!("process {pid} is traced by {tracer}");
        found.block(
            "traced",
            what,
            "end the debugger: a process has one tracer, and criu has to be it",
        );
    }
    if let Some(user) = processes.users.iter().find(|user| **user != 0)
        && host.lacks(SYS_RESOURCE)
    {
        let what = format!("processes are user {user}'s, and criu may not read their limits here");
        found.block("limits", what, "run containerd and ferry with CAP_SYS_RESOURCE");
    }
    // Where it is in the way it has been told.
    for pid in processes.stopped.iter().filter(|_| container.stopped.is_none()) {
        let what = format!("process {pid} is stopped by a signal: its parent may wait for it");
        found.warn("stopped", what, &format!("let it go on: kill -CONT {pid}"));
    }
    if !processes.seccomp.is_empty() && (host.seccomp || host.lacks(SYS_ADMIN)) {
        let what = format!("{} has seccomp filters, which criu may not suspend here", container.id);
        found.block("seccomp-suspend", what, "run ferry with CAP_SYS_ADMIN and without a filter");
    }
    for profile in &processes.profiles {
        let what = format!("{} is confined by {profile}", container.id);
        found.note("lsm-profile", what, "load the same profile wherever it is restored");
    }
    if container.memory.usage.carried.hugetlb > 0 {
        let mib = container.memory.usage.carried.hugetlb >> 20;
        let what = format!("{mib} MiB of huge pages are dumped by criu in the pause");
        found.note(
            "hugetlb",
            what,
            "none needed; as many huge pages have to be free at the destination",
        );
    }
}
