//! On the line between runc and CRIU: sees every step, holds some, answers some itself.
//!
//! ```text
//!   runc <───────── line ─────────> CRIU
//!     post-restore  ──────────────────    passed to runc at once, runc's answer held: by then all
//!                                         of runc's own work is done
//!     post-dump           held ───────    every image is complete; not passed on before the end
//!     network-*, pre-*, ...     ──────    answered here: runc does nothing at them, and waking it
//!                                         costs a millisecond
//! ```
//! A line that breaks, because the shim ends, fails the restore, and ends a dump with the tasks
//! as they were.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ferry_oci::criu::rpc::{self, Changes, FromCriu};
use ferry_oci::criu::wrapper;
use ferry_oci::{hierarchies, paths};
use log::{debug, warn};
use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt, sockopt,
};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::{Context as _, Error, Result};

/// The longest message that is passed on: runc's request lists every mount.
const MAX_MESSAGE: usize = 256 << 10;

/// Steps at which runc has nothing to do for the containers it runs.
const ANSWERED_HERE: [&str; 8] = [
    "pre-dump",
    "network-lock",
    "network-unlock",
    "query-ext-files",
    "pre-restore",
    "post-setup-namespaces",
    "pre-resume",
    "post-resume",
];

/// How far CRIU has come.
#[derive(Debug, Clone, Default)]
struct Progress {
    /// Its version, which runc asks for first.
    version: Option<String>,
    /// Pid of the last one.
    pid: Option<i32>,
    /// It is held: at post-dump, or at post-restore with the pid of the restored init.
    held: Option<i32>,
    /// The restored tasks run.
    resumed: bool,
    /// It has said how it ended, or the line is gone.
    ended: Option<bool>,
}

/// A relay that waits for runc to start CRIU.
pub(crate) struct Relay {
    listener: UnixListener,
    socket: PathBuf,
    /// For the front of runc's `PATH`.
    folder: PathBuf,
    criu: PathBuf,
    images: PathBuf,
    work: PathBuf,
}

/// A relay at work; ends with its owner.
pub(crate) struct Line {
    progress: watch::Receiver<Progress>,
    decision: watch::Sender<Option<bool>>,
    task: JoinHandle<()>,
    socket: PathBuf,
}

impl Relay {
    /// Listens for a CRIU that works on these folders.
    pub(crate) fn listen(images: &Path, work: &Path) -> Result<Self> {
        let folder = &work.join("bin");
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-criu-{count}.sock", std::process::id());
        // Not in the bundle: a socket's path has 108 bytes at most.
        let socket = Path::new(paths::SOCKETS).join(name);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let criu = wrapper::find(&path, folder)
            .ok_or_else(|| Error::failed_precondition("there is no criu in PATH"))?;
        // By the process, which is there even when the file has been replaced.
        let own = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
        wrapper::prepare(folder, &own).context("make the folder for runc's PATH")?;
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).context("listen for CRIU")?;
        let (images, work) = (images.to_owned(), work.to_owned());
        Ok(Self { listener, socket, folder: folder.to_owned(), criu, images, work })
    }

    /// The folder that comes first in runc's `PATH`.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What runc's environment needs.
    pub(crate) fn env(&self, preload: Option<&Path>) -> Vec<(&'static str, PathBuf)> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.folder.clone()).chain(std::env::split_paths(&path));
        let joined = std::env::join_paths(folders).unwrap_or(path);
        let mut env = vec![
            ("PATH", joined.into()),
            (wrapper::ENV_RELAY, self.socket.clone()),
            (wrapper::ENV_CRIU, self.criu.clone()),
            (wrapper::ENV_IMAGES, self.images.clone()),
            (wrapper::ENV_WORK, self.work.clone()),
        ];
        env.extend(preload.map(|library| (wrapper::ENV_PRELOAD, library.to_owned())));
        env
    }

    /// Serves the CRIUs that runc starts: those it asks for their version, and the one that works.
    /// `private_network`: CRIU makes a network namespace, whose loopback device has to come up.
    /// `log_level`: how much it logs, if not all.
    pub(crate) fn start(self, private_network: bool, log_level: Option<u8>) -> Line {
        let (sender, progress) = watch::channel(Progress::default());
        let (decision, decided) = watch::channel(None);
        let socket = self.socket.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = self.listener.accept().await {
                // It becomes CRIU.
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                sender.send_modify(|p| p.pid = pid);
                let ends = match take_ends(&stream).await {
                    Ok(ends) => ends,
                    Err(err) => {
                        warn!("take CRIU's line: {err}");
                        continue;
                    }
                };
                let talk = Talk {
                    runc: ends.0,
                    criu: ends.1,
                    progress: sender.clone(),
                    decided: decided.clone(),
                    private_network,
                    log_level,
                    init: None,
                    answer: None,
                };
                talk.run().await;
            }
        });
        Line { progress, decision, task, socket }
    }
}

impl Line {
    /// Waits until CRIU is held; the restored init's pid, or 0 for a dump. `None` when it ends
    /// before.
    pub(crate) async fn held(&self) -> Option<i32> {
        let mut progress = self.progress.clone();
        let seen = progress.wait_for(|p| p.held.is_some() || p.ended == Some(false)).await.ok()?;
        seen.held
    }

    /// Waits until CRIU's first process has ended. The tasks that it has made may keep the line open, and
    /// wait for it.
    pub(crate) async fn gone(&self) {
        let mut progress = self.progress.clone();
        let pid = progress.wait_for(|p| p.pid.is_some()).await.ok().and_then(|p| p.pid);
        match pid.and_then(Pid::from_raw).map(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK)) {
            Some(Err(Errno::SRCH)) => return,
            Some(Ok(process)) => {
                // Ready once the process has ended.
                if let Ok(process) = register(process)
                    && process.readable().await.is_ok()
                {
                    return;
                }
            }
            _ => {}
        }
        // It cannot be watched: the line tells, later.
        std::future::pending().await
    }

    /// Waits until the restored tasks run; false when they never will.
    pub(crate) async fn resumed(&self) -> bool {
        let mut progress = self.progress.clone();
        let seen = progress.wait_for(|p| p.resumed || p.ended.is_some()).await;
        seen.is_ok_and(|p| p.resumed || p.ended == Some(true))
    }

    /// The version of CRIU, if it was asked for it.
    pub(crate) fn version(&self) -> Option<String> {
        self.progress.borrow().version.clone()
    }

    /// Reads ahead the code of CRIU: most of it runs for the first time in the pause.
    pub(crate) fn read_ahead(&self) {
        let pid = self.progress.borrow().pid;
        tokio::task::spawn_blocking(move || ferry_oci::warm::processes(pid));
    }

    /// Lets go what is held, or what comes to be.
    pub(crate) fn go(&self) {
        let _ = self.decision.send(Some(true));
    }

    /// Fails what is held, or what comes to be.
    pub(crate) fn refuse(&self) {
        let _ = self.decision.send(Some(false));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// One conversation between runc and one CRIU.
struct Talk {
    runc: AsyncFd<OwnedFd>,
    criu: AsyncFd<OwnedFd>,
    progress: watch::Sender<Progress>,
    decided: watch::Receiver<Option<bool>>,
    private_network: bool,
    log_level: Option<u8>,
    /// Pid of the init being restored.
    init: Option<i32>,
    /// What CRIU is to be sent once it is let go.
    answer: Option<Answer>,
}

/// What is held back.
enum Answer {
    /// A notify of CRIU's that runc has not seen.
    ForRunc(Message),
    /// runc is still at work on it.
    Awaited,
    /// runc's answer.
    ForCriu(Message),
}

struct Message {
    bytes: Vec<u8>,
    rights: Vec<OwnedFd>,
}

impl Message {
    fn plain(bytes: Vec<u8>) -> Self {
        Self { bytes, rights: Vec::new() }
    }
}

impl Talk {
    async fn run(mut self) {
        let mut spoken = None;
        let end = loop {
            let holding = matches!(self.answer, Some(Answer::ForRunc(_) | Answer::ForCriu(_)));
            let step = tokio::select! {
                message = receive(&self.criu) => match message {
                    Ok(Some(message)) => self.heard_criu(message, &mut spoken).await,
                    Ok(None) => break Ok(()),
                    Err(err) => Err(err),
                },
                message = receive(&self.runc) => match message {
                    Ok(Some(message)) => self.heard_runc(message).await,
                    Ok(None) => break Ok(()),
                    Err(err) => Err(err),
                },
                go = decision(&mut self.decided), if holding => self.decide(go).await,
            };
            if let Err(err) = step {
                break Err(err);
            }
        };
        if let Err(err) = end {
            debug!("the line to CRIU: {err}");
        }
        // A question for CRIU's version ends like this too, before anything was held.
        if self.progress.borrow().held.is_some() || spoken == Some(false) {
            self.progress.send_modify(|p| {
                p.ended.get_or_insert(spoken.unwrap_or(false));
            });
        }
    }

    async fn heard_criu(&mut self, message: Message, spoken: &mut Option<bool>) -> io::Result<()> {
        match rpc::parse(&message.bytes) {
            Some(FromCriu::Notify { script, pid }) => self.step(message, &script, pid).await,
            Some(FromCriu::Answer { success, version }) => {
                if version.is_some() {
                    self.progress.send_modify(|p| p.version = version);
                }
                *spoken = Some(success);
                send(&self.runc, &message).await
            }
            None => send(&self.runc, &message).await,
        }
    }

    async fn step(&mut self, message: Message, script: &str, pid: Option<i32>) -> io::Result<()> {
        self.init = pid.or(self.init);
        match script {
            "post-dump" => {
                self.answer = Some(Answer::ForRunc(message));
                self.progress.send_modify(|p| p.held = Some(0));
                Ok(())
            }
            "post-restore" => {
                self.answer = Some(Answer::Awaited);
                send(&self.runc, &message).await?;
                // Everything is back. CRIU is let go once runc has answered too.
                let pid = self.init.unwrap_or_default();
                self.progress.send_modify(|p| p.held = Some(pid));
                Ok(())
            }
            script if ANSWERED_HERE.contains(&script) => {
                let ready = match (script, self.init) {
                    ("post-setup-namespaces", Some(pid)) if self.private_network => {
                        loopback_up(pid).await
                    }
                    _ => true,
                };
                send(&self.criu, &Message::plain(rpc::answer(ready))).await?;
                if script == "post-resume" {
                    self.progress.send_modify(|p| p.resumed = true);
                }
                Ok(())
            }
            _ => send(&self.runc, &message).await,
        }
    }

    async fn heard_runc(&mut self, message: Message) -> io::Result<()> {
        if matches!(self.answer, Some(Answer::Awaited)) {
            self.answer = Some(Answer::ForCriu(message));
            return Ok(());
        }
        let changes = Changes {
            images_fd: wrapper::IMAGES_FD,
            work_fd: wrapper::WORK_FD,
            log_level: self.log_level,
        };
        match rpc::amend(&message.bytes, changes) {
            Some(bytes) => {
                let bytes = self.own_cgroups(&bytes).unwrap_or(bytes);
                send(&self.criu, &Message { bytes, ..message }).await
            }
            None => send(&self.criu, &message).await,
        }
    }

    /// Has the container see its own cgroups, of v1: runc names those of itself, and has put CRIU into the
    /// container's by now. `None` when this is no restore.
    fn own_cgroups(&self, request: &[u8]) -> Option<Vec<u8>> {
        let pid = self.progress.borrow().pid?;
        let members = hierarchies::of(pid.cast_unsigned()).ok()?;
        rpc::redirect(request, |from| {
            let own = hierarchies::of_same_hierarchy(&members, Path::new(from))?;
            Some(own.to_str()?.to_owned())
        })
    }

    async fn decide(&mut self, go: bool) -> io::Result<()> {
        match self.answer.take() {
            Some(Answer::ForRunc(message)) if go => send(&self.runc, &message).await,
            Some(Answer::ForCriu(message)) if go => send(&self.criu, &message).await,
            Some(_) => send(&self.criu, &Message::plain(rpc::answer(false))).await,
            None => Ok(()),
        }
    }
}

/// Waits for the owner to decide; never, when it is gone.
async fn decision(decided: &mut watch::Receiver<Option<bool>>) -> bool {
    match decided.wait_for(Option::is_some).await {
        Ok(decision) => decision.unwrap_or_default(),
        Err(_) => false,
    }
}

async fn loopback_up(pid: i32) -> bool {
    let up = tokio::task::spawn_blocking(move || ferry_oci::netns::loopback_up(pid)).await;
    match up {
        Ok(Ok(())) => true,
        failed => {
            warn!("bring up the loopback device of the restored container: {failed:?}");
            false
        }
    }
}

/// The two sockets that the wrapper sends: runc's end, and ours of CRIU's line.
async fn take_ends(stream: &UnixStream) -> io::Result<(AsyncFd<OwnedFd>, AsyncFd<OwnedFd>)> {
    let rights = loop {
        stream.readable().await?;
        let taken =
            stream.try_io(tokio::io::Interest::READABLE, || read_message(stream.as_raw_fd(), 1));
        match taken {
            Ok(Some(message)) => break message.rights,
            Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => return Err(err),
        }
    };
    let [runc, criu] = <[OwnedFd; 2]>::try_from(rights)
        .map_err(|_| io::Error::other("the wrapper did not send two sockets"))?;
    Ok((line(runc)?, line(criu)?))
}

fn line(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    // A request may be longer than a socket's usual buffer; the kernel caps it.
    let _ = setsockopt(&fd, sockopt::SndBuf, &MAX_MESSAGE);
    register(fd)
}

#[allow(unsafe_code)]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and stays the same one as long as it is registered.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

async fn receive(from: &AsyncFd<OwnedFd>) -> io::Result<Option<Message>> {
    from.async_io(tokio::io::Interest::READABLE, |fd| read_message(fd.as_raw_fd(), MAX_MESSAGE))
        .await
}

fn read_message(fd: i32, limit: usize) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; limit];
    let mut space = cmsg_space!([i32; 16]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags)?;
    let (length, truncated) = (received.bytes, received.flags.contains(MsgFlags::MSG_TRUNC));
    let mut rights = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            rights.extend(fds.into_iter().map(own));
        }
    }
    if truncated {
        return Err(io::Error::other("a message is longer than 256 KiB"));
    }
    if length == 0 {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(Message { bytes, rights }))
}

#[allow(unsafe_code)]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it for this process, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

async fn send(to: &AsyncFd<OwnedFd>, message: &Message) -> io::Result<()> {
    let fds: Vec<i32> = message.rights.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    to.async_io(tokio::io::Interest::WRITABLE, |fd| {
        let parts = [IoSlice::new(&message.bytes)];
        Ok(sendmsg::<()>(fd.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?)
    })
    .await?;
    Ok(())
}
