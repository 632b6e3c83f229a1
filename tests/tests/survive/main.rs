//! What must survive a checkpoint that ends the container, and a restore: on the same host, and on
//! another one. Each item is a program that looks at itself (`ferry-survive`), after it has shown in
//! the same container that its look can fail. What came of each is a row of the table that
//! `hack/test` shows at its end.

mod bed;
mod container;
mod ferried;
mod item;
mod journey;
mod spec;

use anyhow::Result;

/// A test for each item, by the workload's name for it.
macro_rules! survive {
    ($($name:ident: $item:expr,)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            journey::all_ways(&$item.called(stringify!($name)))
        }
    )*};
}

use item::Item;

const PLAIN: Item = Item::PLAIN;

survive! {
    process_tree: PLAIN,
    threads: PLAIN,
    anonymous_memory: PLAIN,
    shared_memory: PLAIN,
    file_mapped_memory: PLAIN,
    open_files: PLAIN,
    deleted_files: PLAIN,
    appended_files: PLAIN,
    file_locks: Item { locks: true, ..PLAIN },
    pipes: PLAIN,
    fifos: PLAIN,
    unix_sockets: PLAIN,
    unix_pairs: PLAIN,
    unix_descriptors_in_flight: PLAIN,
    tcp_established: PLAIN,
    tcp_listening: PLAIN,
    tcp_half_closed: PLAIN,
    udp: PLAIN,
    // UDP may lose what was not read, and CRIU does.
    udp_queue: Item { lost: Some("read it: Resource temporarily unavailable"), ..PLAIN },
    sysv_shared_memory: PLAIN,
    sysv_semaphores: PLAIN,
    sysv_messages: PLAIN,
    posix_shared_memory: PLAIN,
    alarm: PLAIN,
    interval_timers: PLAIN,
    posix_timers: PLAIN,
    timerfd: PLAIN,
    // What has gone off is still read once, and then it stands still.
    timerfd_expired: Item { lost: Some("read it once more"), ..PLAIN },
    eventfd: PLAIN,
    // It comes back as a plain counter.
    eventfd_semaphore: Item { lost: Some("the first number is 2"), ..PLAIN },
    signalfd: PLAIN,
    epoll: PLAIN,
    inotify_tmpfs: PLAIN,
    inotify_bind: PLAIN,
    // CRIU can do nothing with the handle of a folder on an overlay.
    inotify_root: Item { lost: Some("criu/fsnotify.c"), ..PLAIN },
    pending_signals: PLAIN,
    signal_handlers: PLAIN,
    terminal: Item { terminal: true, ..PLAIN },
    terminal_pair: PLAIN,
    clocks: Item { hops: 2, ..PLAIN },
    clocks_in_execs: Item { hops: 2, exec: true, ..PLAIN },
    environment: PLAIN,
    groups: PLAIN,
    user_and_groups: Item { other_user: true, ..PLAIN },
    capabilities: PLAIN,
    seccomp_filter: PLAIN,
    rlimits: PLAIN,
    scheduling: PLAIN,
    cgroup_limits: Item { limits: true, ..PLAIN },
    cgroup_files: Item { limits: true, ..PLAIN },
    dev_shm: PLAIN,
    tmpfs: PLAIN,
}
