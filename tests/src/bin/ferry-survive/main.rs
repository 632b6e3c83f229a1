//! ferry-survive: a workload of one item that must survive a checkpoint, and that looks at itself.
//!
//! ```text
//! ferry-survive ITEM           sets the item up, waits for the question, and looks whether it is as
//!                              it was; see `turn` for how it is asked
//! ferry-survive ITEM nothing   the same with nothing in between: must answer ok
//! ferry-survive ITEM change    the same, and the item changes a little itself: must answer wrong
//! ferry-survive now FILE       writes what the clocks say, see `clocks`
//! ```
//!
//! The first runs the other two before it begins, so that each look is shown to be able to fail in
//! the very place where it is used.
//!
//! It uses nothing but the standard library, so that `rustc` alone builds it, statically.

mod clocks;
mod descriptors;
mod files;
mod identity;
mod inet;
mod limits;
mod mappings;
mod pipes;
mod processes;
mod signals;
mod storage;
mod sys;
mod sysv;
mod terminals;
mod timers;
mod turn;
mod unix;
mod watches;

use std::process::{Command, ExitCode, Stdio};

use turn::{Done, Turn, Wrong, say};

/// Sets up, lets the moment pass, and looks.
type Item = fn(&mut Turn) -> Done;

const ITEMS: &[(&str, Item)] = &[
    ("process_tree", processes::tree),
    ("threads", processes::threads),
    ("anonymous_memory", mappings::anonymous),
    ("shared_memory", mappings::shared),
    ("file_mapped_memory", mappings::of_files),
    ("open_files", files::open),
    ("deleted_files", files::deleted),
    ("appended_files", files::appended),
    ("file_locks", files::locks),
    ("pipes", pipes::pipe),
    ("fifos", pipes::fifo),
    ("unix_sockets", unix::named),
    ("unix_pairs", unix::pairs),
    ("unix_descriptors_in_flight", unix::descriptors),
    ("tcp_established", inet::established),
    ("tcp_listening", inet::listening),
    ("tcp_half_closed", inet::half_closed),
    ("udp", inet::udp),
    ("udp_queue", inet::udp_queue),
    ("sysv_shared_memory", sysv::shared_memory),
    ("sysv_semaphores", sysv::semaphores),
    ("sysv_messages", sysv::messages),
    ("posix_shared_memory", mappings::posix),
    ("alarm", timers::alarm),
    ("interval_timers", timers::intervals),
    ("posix_timers", timers::posix),
    ("timerfd", timers::descriptors),
    ("timerfd_expired", timers::expired),
    ("eventfd", descriptors::events),
    ("eventfd_semaphore", descriptors::semaphore),
    ("signalfd", descriptors::signals),
    ("epoll", descriptors::poll),
    ("inotify_tmpfs", watches::tmpfs),
    ("inotify_bind", watches::bind),
    ("inotify_root", watches::root),
    ("pending_signals", signals::pending),
    ("signal_handlers", signals::handlers),
    ("terminal", terminals::own),
    ("terminal_pair", terminals::pair),
    ("clocks", clocks::go_on),
    ("clocks_in_execs", clocks::in_others),
    ("environment", identity::environment),
    ("groups", identity::groups),
    ("user_and_groups", identity::user),
    ("capabilities", identity::capabilities),
    ("seccomp_filter", identity::seccomp),
    ("rlimits", limits::rlimits),
    ("scheduling", limits::scheduling),
    ("cgroup_limits", limits::cgroups),
    ("cgroup_files", limits::cgroup_files),
    ("dev_shm", storage::shm),
    ("tmpfs", storage::tmpfs),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["now", file] => match clocks::tell(file) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        [name] => match item(name) {
            Some(item) => hold(name, item),
            None => usage(),
        },
        [name, how @ ("nothing" | "change")] => match item(name) {
            Some(item) => {
                let mut turn = if how == "change" { Turn::Change } else { Turn::Nothing };
                println!("{}", answer(item(&mut turn)));
                ExitCode::SUCCESS
            }
            None => usage(),
        },
        _ => usage(),
    }
}

fn item(name: &str) -> Option<Item> {
    ITEMS.iter().find(|(known, _)| *known == name).map(|(_, item)| *item)
}

fn usage() -> ExitCode {
    eprintln!("ferry-survive: say an item, and maybe nothing or change; or now and a file");
    for (name, _) in ITEMS {
        eprintln!("  {name}");
    }
    ExitCode::FAILURE
}

/// The item with a checkpoint in between; stays for whoever looks at it from outside.
fn hold(name: &str, item: Item) -> ExitCode {
    let controls = ["nothing", "change"].map(|how| format!("{how} {}\n", control(name, how)));
    let mut turn = Turn::Checkpoint { controls: Some(controls.concat()), passed: false };
    let done = item(&mut turn);
    // What goes wrong before the moment is heard by who waits for it.
    let passed = matches!(turn, Turn::Checkpoint { passed: true, .. });
    if say(if passed { "answer" } else { "ready" }, &answer(done)).is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        std::thread::park();
    }
}

/// Answer of a control, a process of its own.
fn control(name: &str, how: &str) -> String {
    match Command::new("/proc/self/exe").args([name, how]).stdin(Stdio::inherit()).output() {
        Ok(done) => {
            let text = String::from_utf8_lossy(&done.stdout);
            text.lines().last().map_or_else(|| format!("nothing: {:?}", done), str::to_owned)
        }
        Err(err) => err.to_string(),
    }
}

fn answer(done: Done) -> String {
    match done {
        Ok(()) => "ok".to_owned(),
        Err(Wrong(what)) => format!("wrong: {}", what.replace('\n', " ")),
    }
}
