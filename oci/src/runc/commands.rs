//! The options of each runc command.

use super::Verb;
use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Collects arguments; conditional ones read as one line each.
#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.push(arg.as_ref().to_owned());
        self
    }

    fn flag(self, set: bool, name: &str) -> Self {
        if set { self.arg(name) } else { self }
    }

    fn option(self, name: &str, value: Option<impl AsRef<OsStr>>) -> Self {
        match value {
            Some(value) => self.arg(name).arg(value),
            None => self,
        }
    }
}

/// Verbs that take nothing but the container's id.
macro_rules! plain {
    ($($(#[$doc:meta])* $verb:ident = $name:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $verb<'a> {
            /// Container.
            pub id: &'a str,
        }

        impl Verb for $verb<'_> {
            fn name(&self) -> &'static str {
                $name
            }

            fn args(&self) -> Vec<OsString> {
                Args::default().arg(self.id).0
            }
        }
    )*};
}

plain! {
    /// `runc start`: runs the process of a created container.
    Start = "start";
    /// `runc state`: prints the container's state as JSON.
    State = "state";
    /// `runc pause`: freezes the container's cgroup.
    Pause = "pause";
    /// `runc resume`: thaws the container's cgroup.
    Resume = "resume";
}

/// `runc create`: sets a container up, its process waits for `start`.
#[derive(Debug, Clone)]
pub struct Create<'a> {
    /// Container.
    pub id: &'a str,
    /// OCI bundle.
    pub bundle: &'a Path,
    /// File that receives the pid of init.
    pub pid_file: &'a Path,
    /// Socket that receives the master of the process's terminal, if it has one.
    pub console_socket: Option<&'a Path>,
    /// Use `MS_MOVE` instead of `pivot_root`.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
}

impl Verb for Create<'_> {
    fn name(&self) -> &'static str {
        "create"
    }

    fn args(&self) -> Vec<OsString> {
        Args::default()
            .option("--bundle", Some(self.bundle))
            .option("--pid-file", Some(self.pid_file))
            .option("--console-socket", self.console_socket)
            .flag(self.no_pivot, "--no-pivot")
            .flag(self.no_new_keyring, "--no-new-keyring")
            .arg(self.id)
            .0
    }
}

/// `runc kill`.
#[derive(Debug, Clone)]
pub struct Kill<'a> {
    /// Container.
    pub id: &'a str,
    /// Signal number.
    pub signal: u32,
    /// All processes of the container instead of init alone.
    pub all: bool,
}

impl Verb for Kill<'_> {
    fn name(&self) -> &'static str {
        "kill"
    }

    fn args(&self) -> Vec<OsString> {
        let signal = self.signal.to_string();
        Args::default().flag(self.all, "--all").arg(self.id).arg(signal).0
    }
}

/// `runc delete`.
#[derive(Debug, Clone)]
pub struct Delete<'a> {
    /// Container.
    pub id: &'a str,
    /// Kill a container that still runs; a container that is not there is no error.
    pub force: bool,
}

impl Verb for Delete<'_> {
    fn name(&self) -> &'static str {
        "delete"
    }

    fn args(&self) -> Vec<OsString> {
        Args::default().flag(self.force, "--force").arg(self.id).0
    }
}

/// `runc exec --detach`.
#[derive(Debug, Clone)]
pub struct Exec<'a> {
    /// Container.
    pub id: &'a str,
    /// File with the OCI `process` object as JSON.
    pub process: &'a Path,
    /// File that receives the pid of the new process.
    pub pid_file: &'a Path,
    /// Socket that receives the master of the process's terminal, if it has one.
    pub console_socket: Option<&'a Path>,
}

impl Verb for Exec<'_> {
    fn name(&self) -> &'static str {
        "exec"
    }

    fn args(&self) -> Vec<OsString> {
        Args::default()
            .option("--process", Some(self.process))
            .arg("--detach")
            .option("--pid-file", Some(self.pid_file))
            .option("--console-socket", self.console_socket)
            .arg(self.id)
            .0
    }
}

/// `runc ps --format json`: prints the pids of the container as a JSON list.
#[derive(Debug, Clone)]
pub struct Ps<'a> {
    /// Container.
    pub id: &'a str,
}

impl Verb for Ps<'_> {
    fn name(&self) -> &'static str {
        "ps"
    }

    fn args(&self) -> Vec<OsString> {
        Args::default().arg("--format").arg("json").arg(self.id).0
    }
}

/// `runc update --resources -`: reads the new limits, JSON as in the OCI spec, from its standard input.
#[derive(Debug, Clone)]
pub struct Update<'a> {
    /// Container.
    pub id: &'a str,
}

impl Verb for Update<'_> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn args(&self) -> Vec<OsString> {
        Args::default().arg("--resources").arg("-").arg(self.id).0
    }
}

/// `runc checkpoint`.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint<'a> {
    /// Container.
    pub id: &'a str,
    /// Folder for the images.
    pub image_path: &'a str,
    /// Folder for CRIU's log and statistics.
    pub work_path: &'a str,
    /// Keep the container after the dump.
    pub leave_running: bool,
    /// Only memory, which a later dump builds on; the container is kept.
    pub pre_dump: bool,
    /// Folder of the dump before, relative to that of the images.
    pub parent_path: Option<&'a str>,
    /// Dump established TCP connections.
    pub tcp_established: bool,
    /// Dump unix sockets whose other end is outside.
    pub ext_unix_sk: bool,
    /// Dump a process that has a terminal.
    pub shell_job: bool,
    /// Dump file locks.
    pub file_locks: bool,
    /// Namespaces (`network`, ...) that are restored empty.
    pub empty_ns: &'a [String],
    /// `soft`, `full`, `strict` or `ignore`.
    pub manage_cgroups: Option<&'a str>,
}

impl Verb for Checkpoint<'_> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn args(&self) -> Vec<OsString> {
        let args = Args::default()
            .option("--image-path", Some(self.image_path))
            .option("--work-path", Some(self.work_path))
            .flag(self.leave_running, "--leave-running")
            .flag(self.pre_dump, "--pre-dump")
            .option("--parent-path", self.parent_path);
        let args = criu_flags(
            args,
            self.tcp_established,
            self.ext_unix_sk,
            self.shell_job,
            self.file_locks,
            self.empty_ns,
            self.manage_cgroups,
        );
        args.arg(self.id).0
    }
}

/// `runc restore --detach`.
#[derive(Debug, Clone, Default)]
pub struct Restore<'a> {
    /// Container.
    pub id: &'a str,
    /// OCI bundle.
    pub bundle: &'a str,
    /// File that receives the pid of init.
    pub pid_file: &'a str,
    /// Socket that receives the master of init's terminal, if it has one.
    pub console_socket: Option<&'a Path>,
    /// Folder with the images.
    pub image_path: &'a str,
    /// Folder for CRIU's log and statistics.
    pub work_path: &'a str,
    /// Use `MS_MOVE` instead of `pivot_root`.
    pub no_pivot: bool,
    /// Leave memory to the page daemon that listens in the work folder.
    pub lazy_pages: bool,
    /// Restore established TCP connections.
    pub tcp_established: bool,
    /// Restore unix sockets whose other end is outside.
    pub ext_unix_sk: bool,
    /// Restore a process that has a terminal.
    pub shell_job: bool,
    /// Restore file locks.
    pub file_locks: bool,
    /// Namespaces (`network`, ...) that are restored empty.
    pub empty_ns: &'a [String],
    /// `soft`, `full`, `strict` or `ignore`.
    pub manage_cgroups: Option<&'a str>,
}

impl Verb for Restore<'_> {
    fn name(&self) -> &'static str {
        "restore"
    }

    fn args(&self) -> Vec<OsString> {
        let args = Args::default()
            .arg("--detach")
            .arg("--no-subreaper")
            .option("--bundle", Some(self.bundle))
            .option("--pid-file", Some(self.pid_file))
            .option("--console-socket", self.console_socket)
            .option("--image-path", Some(self.image_path))
            .option("--work-path", Some(self.work_path))
            .flag(self.no_pivot, "--no-pivot")
            .flag(self.lazy_pages, "--lazy-pages");
        let args = criu_flags(
            args,
            self.tcp_established,
            self.ext_unix_sk,
            self.shell_job,
            self.file_locks,
            self.empty_ns,
            self.manage_cgroups,
        );
        args.arg(self.id).0
    }
}

/// The options that a dump and its restore must agree on.
fn criu_flags(
    args: Args,
    tcp_established: bool,
    ext_unix_sk: bool,
    shell_job: bool,
    file_locks: bool,
    empty_ns: &[String],
    manage_cgroups: Option<&str>,
) -> Args {
    let args = args
        .flag(tcp_established, "--tcp-established")
        .flag(ext_unix_sk, "--ext-unix-sk")
        .flag(shell_job, "--shell-job")
        .flag(file_locks, "--file-locks");
    empty_ns
        .iter()
        .fold(args, |args, namespace| args.option("--empty-ns", Some(namespace)))
        .option("--manage-cgroups-mode", manage_cgroups)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(verb: &dyn Verb) -> String {
        let args: Vec<_> = verb.args().iter().map(|a| a.to_string_lossy().into_owned()).collect();
        format!("{} {}", verb.name(), args.join(" "))
    }

    #[test]
    fn create_takes_bundle_and_pid_file() {
        let mut create = Create {
            id: "a",
            bundle: Path::new("/b"),
            pid_file: Path::new("/b/init.pid"),
            console_socket: None,
            no_pivot: false,
            no_new_keyring: false,
        };
        assert_eq!(line(&create), "create --bundle /b --pid-file /b/init.pid a");
        create.no_pivot = true;
        create.no_new_keyring = true;
        assert_eq!(
            line(&create),
            "create --bundle /b --pid-file /b/init.pid --no-pivot --no-new-keyring a"
        );
        (create.no_pivot, create.no_new_keyring) = (false, false);
        create.console_socket = Some(Path::new("/s"));
        assert_eq!(
            line(&create),
            "create --bundle /b --pid-file /b/init.pid --console-socket /s a"
        );
    }

    #[test]
    fn plain_commands_take_the_id() {
        assert_eq!(line(&Start { id: "a" }), "start a");
        assert_eq!(line(&State { id: "a" }), "state a");
        assert_eq!(line(&Pause { id: "a" }), "pause a");
        assert_eq!(line(&Resume { id: "a" }), "resume a");
        assert_eq!(line(&Ps { id: "a" }), "ps --format json a");
        assert_eq!(line(&Update { id: "a" }), "update --resources - a");
    }

    #[test]
    fn kill_and_delete() {
        assert_eq!(line(&Kill { id: "a", signal: 15, all: false }), "kill a 15");
        assert_eq!(line(&Kill { id: "a", signal: 9, all: true }), "kill --all a 9");
        assert_eq!(line(&Delete { id: "a", force: false }), "delete a");
        assert_eq!(line(&Delete { id: "a", force: true }), "delete --force a");
    }

    #[test]
    fn exec_is_detached() {
        let mut exec = Exec {
            id: "a",
            process: Path::new("/p.json"),
            pid_file: Path::new("/e.pid"),
            console_socket: None,
        };
        assert_eq!(line(&exec), "exec --process /p.json --detach --pid-file /e.pid a");
        exec.console_socket = Some(Path::new("/s"));
        assert_eq!(
            line(&exec),
            "exec --process /p.json --detach --pid-file /e.pid --console-socket /s a"
        );
    }

    #[test]
    fn checkpoint_with_everything() {
        let empty = ["network".to_string()];
        let checkpoint = Checkpoint {
            id: "a",
            image_path: "/i",
            work_path: "/w",
            leave_running: true,
            tcp_established: true,
            ext_unix_sk: true,
            shell_job: true,
            file_locks: true,
            empty_ns: &empty,
            manage_cgroups: Some("ignore"),
            parent_path: None,
            pre_dump: false,
        };
        assert_eq!(
            line(&checkpoint),
            "checkpoint --image-path /i --work-path /w --leave-running --tcp-established \
             --ext-unix-sk --shell-job --file-locks --empty-ns network \
             --manage-cgroups-mode ignore a"
        );
    }

    #[test]
    fn restore_replays_what_the_dump_used() {
        let mut restore = Restore {
            id: "a",
            bundle: "/b",
            pid_file: "/b/init.pid",
            image_path: "/i",
            work_path: "/w",
            tcp_established: true,
            ..Default::default()
        };
        assert_eq!(
            line(&restore),
            "restore --detach --no-subreaper --bundle /b --pid-file /b/init.pid --image-path /i \
             --work-path /w --tcp-established a"
        );
        restore.console_socket = Some(Path::new("/s"));
        assert!(
            line(&restore).contains(" --pid-file /b/init.pid --console-socket /s --image-path")
        );
    }
}
