//! The root file system of a bundle: mounted as containerd's snapshotters describe it, in the form
//! that containerd itself mounts.
//!
//! ```text
//!   options.rs   flags, data, and what is no option of the kernel
//!   overlay.rs   layers of an overlay seen with other owners
//!   loops.rs     files as devices
//!   idmap.rs     owners shifted for a user namespace
//! ```
//! What containerd's mount manager handles (`mkfs/`, `format/`, `mkdir/`, `X-containerd.*`) is gone
//! before a mount comes here.

mod idmap;
mod loops;
mod options;
mod overlay;

use crate::error::{Context as _, Error, Result};
use crate::reaper::Reaper;
use containerd_shim::protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use options::Options;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

/// Folder in the bundle where layers are seen with shifted owners while they are being mounted.
pub(crate) const SHIFTED: &str = "shifted";
/// How long a helper of a file system in user space may take.
const HELPER: Duration = Duration::from_secs(60);
/// How often, and how many times, a busy mount is tried again.
const BUSY: (Duration, usize) = (Duration::from_millis(50), 50);

/// Mounts `mounts` at the rootfs of `bundle`, one over or in the other. Undone if one of them
/// fails.
pub(crate) async fn mount(mounts: &[Mount], bundle: &Path, reaper: &Arc<Reaper>) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let rootfs = bundle.join("rootfs");
    match std::fs::create_dir(&rootfs) {
        Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(err).context("make the rootfs folder");
        }
        _ => {}
    }
    for mount in mounts {
        if let Err(err) = one(mount, bundle, &rootfs, reaper).await {
            if let Err(err) = umount_async(rootfs.clone()).await {
                log::warn!("undo the root file system: {err}");
            }
            return Err(err.context("mount the root file system"));
        }
    }
    Ok(())
}

async fn one(mount: &Mount, bundle: &Path, rootfs: &Path, reaper: &Arc<Reaper>) -> Result<()> {
    if let Some((program, kind)) = helper(&mount.type_) {
        let target = Target::find(rootfs, &mount.target)?;
        let mut command = Command::new(program);
        command.arg(&mount.source).arg(target.path());
        command.args(mount.options.iter().flat_map(|option| ["-o", option]));
        command.arg("-t").arg(kind);
        let output = reaper.run(command, HELPER).await?;
        return match output.status {
            0 => Ok(()),
            status => {
                let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
                Err(Error::internal(format!("{program}: exit status {status}: {text}")))
            }
        };
    }
    let (mount, rootfs) = (mount.clone(), rootfs.to_owned());
    let shifted = bundle.join(SHIFTED);
    // A thread of its own: for long option lists its directory is changed.
    blocking(move || by_kernel(&mount, &rootfs, &shifted)).await
}

/// The program that mounts a file system in user space, and the file system's own type.
fn helper(kind: &str) -> Option<(&'static str, &str)> {
    let fuse3 = kind.strip_prefix("fuse3.").map(|kind| ("mount.fuse3", kind));
    fuse3.or_else(|| kind.strip_prefix("fuse.").map(|kind| ("mount.fuse", kind)))
}

fn by_kernel(mount: &Mount, rootfs: &Path, shifted: &Path) -> Result<()> {
    if mount.type_.contains('/') {
        let text = format!("type {:?} is one for containerd's mount manager", mount.type_);
        return Err(Error::invalid_argument(text));
    }
    let target = Target::find(rootfs, &mount.target)?;
    let mut options = Options::parse(&mount.options)?;
    let is_overlay = mount.type_ == "overlay";
    let users = options.users.as_ref().map(|(uids, gids)| idmap::user_namespace(uids, gids));
    let users = users.transpose()?;
    // Of an overlay the layers are shifted, what is written has the right owners already.
    let _layers = match &users {
        Some(users) if is_overlay => Some(overlay::shift(&mut options.data, users, shifted)?),
        _ => None,
    };
    if is_overlay && let Some(folder) = ferry_oci::overlay::shorten(&mut options.data) {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).context("unshare the directory")?;
        std::env::set_current_dir(&folder).context(format!("enter {}", folder.display()))?;
    }
    // The device goes with its last user: it is kept until it is mounted.
    let device = options.looped.then(|| loops::attach(&mount.source, &options)).transpose()?;
    let source = device.as_ref().map_or(mount.source.as_str(), |device| device.path.as_str());
    let data = options.data.join(",");
    let text = |text| Some(text).filter(|text: &&str| !text.is_empty());
    if !options.flags.contains(MsFlags::MS_REMOUNT) || !data.is_empty() {
        let at = target.path();
        let done = mount_at(&at, text(source), text(&mount.type_), options.flags, text(&data));
        done.context(format!(
            "{} {:?} at {} with {:?}",
            mount.type_,
            mount.source,
            rootfs.join(mount.target.trim_start_matches('/')).display(),
            mount.options
        ))?;
    }
    // What has been mounted, and no longer what it hides.
    let target = Target::find(rootfs, &mount.target)?;
    let read_only_bind = MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    if options.flags.contains(read_only_bind) {
        let flags = options.flags | MsFlags::MS_REMOUNT | options::locked(&target.path());
        mount_at(&target.path(), None, None, flags, None).context("make a bind mount read-only")?;
    }
    match &users {
        Some(users) if !is_overlay => idmap::shift(&target.path(), &target.path(), users, false),
        _ => Ok(()),
    }
}

fn mount_at(
    at: &Path,
    source: Option<&str>,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> nix::Result<()> {
    nix::mount::mount(source, at, kind, flags, data)
}

/// Where a mount goes. An image may hold links: they are followed as if `rootfs` were the root.
enum Target {
    Root(PathBuf),
    Inside(OwnedFd),
}

impl Target {
    fn find(rootfs: &Path, target: &str) -> Result<Self> {
        let relative = target.trim_matches('/');
        if relative.is_empty() {
            return Ok(Self::Root(rootfs.to_owned()));
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, rootfs, flags | OFlags::DIRECTORY, Mode::empty());
        let root = root.context("open the rootfs")?;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(&root, relative, flags, Mode::empty(), inside);
        Ok(Self::Inside(found.context(format!("find the target {target:?} in the rootfs"))?))
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Root(path) => path.clone(),
            Self::Inside(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into(),
        }
    }
}

/// Unmounts everything at and below `path`, the deepest first. Nothing mounted is no error.
pub(crate) fn umount(path: &Path) -> Result<()> {
    let path = match std::fs::canonicalize(path) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        path => path.context("unmount the root file system")?,
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    for point in points(&mounts, &path) {
        umount_one(&point).context(format!("unmount {}", point.display()))?;
    }
    Ok(())
}

/// All mounts that lie one over the other at `point`.
fn umount_one(point: &Path) -> nix::Result<()> {
    let mut tries = 0;
    loop {
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) if tries < BUSY.1 => {
                tries += 1;
                sleep(BUSY.0);
            }
            Err(err) => return Err(err),
        }
    }
}

/// The mount points at and below `path`, the deepest first.
fn points(mountinfo: &str, path: &Path) -> Vec<PathBuf> {
    let point = |line: &str| line.split(' ').nth(4).map(unescaped);
    let mut points: Vec<_> = mountinfo.lines().filter_map(point).collect();
    points.retain(|point| point.starts_with(path));
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    points.dedup();
    points
}

/// Blanks and the like are written in octal in mountinfo.
fn unescaped(text: &str) -> PathBuf {
    let text = text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
    text.replace("\\134", "\\").into()
}

/// [`umount`] off the runtime's threads.
pub(crate) async fn umount_async(rootfs: PathBuf) -> Result<()> {
    blocking(move || umount(&rootfs)).await
}

/// Detaches the mount that a killed restore leaves in runc's state folder. Removing the folder
/// with the mount in place would delete the container's files.
pub(crate) fn detach_criu_root(state_dir: &Path) -> Result<()> {
    let root = state_dir.join("criu-root");
    loop {
        match umount2(&root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(err) => return Err(err).context("detach criu-root"),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("mount".into())
        .spawn(move || drop(sender.send(work())))
        .context("start a thread")?;
    receiver.await.context("wait for a thread")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_below_the_rootfs() {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("data/etc")).unwrap();
        std::os::unix::fs::symlink("/etc", rootfs.join("link")).unwrap();
        let of = |target: &str| {
            let target = Target::find(&rootfs, target)?;
            Ok::<_, Error>(std::fs::canonicalize(target.path()).unwrap())
        };
        assert_eq!(of("").unwrap(), rootfs);
        assert_eq!(of("/data").unwrap(), rootfs.join("data"));
        assert_eq!(of("../data").unwrap(), rootfs.join("data"));
        assert!(of("link").is_err(), "the image has no /etc");
        std::fs::create_dir(rootfs.join("etc")).unwrap();
        assert_eq!(of("link").unwrap(), rootfs.join("etc"));
    }

    #[test]
    fn mounts_are_undone_from_the_deepest_on() {
        let mountinfo = "\
1 0 8:1 / / rw - ext4 /dev/sda rw
2 1 0:5 / /b/rootfs rw - overlay overlay rw
3 1 0:5 / /b/rootfs rw - overlay overlay rw
4 1 0:6 / /b/rootfs2 rw - tmpfs tmpfs rw
5 2 0:7 / /b/rootfs/with\\040blank/x rw - tmpfs tmpfs rw
6 2 0:7 / /b/rootfs/data rw - tmpfs tmpfs rw
";
        let points = points(mountinfo, Path::new("/b/rootfs"));
        let expected = ["/b/rootfs/with blank/x", "/b/rootfs/data", "/b/rootfs"];
        assert_eq!(points, expected.map(PathBuf::from));
    }

    #[test]
    fn user_space_file_systems_have_helpers() {
        assert_eq!(helper("fuse3.fuse-overlayfs"), Some(("mount.fuse3", "fuse-overlayfs")));
        assert_eq!(helper("fuse.sshfs"), Some(("mount.fuse", "sshfs")));
        assert_eq!(helper("overlay"), None);
    }

    /// Runs `test` with mounts of its own, in a folder on a tmpfs; not at all without privileges.
    fn alone(test: impl FnOnce(&Path) + Send) {
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let alone = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
                let mount = nix::mount::mount::<str, Path, str, str>;
                mount(None, Path::new("/"), None, private, None).unwrap();
                mount(Some("t"), dir.path(), Some("tmpfs"), MsFlags::empty(), None).unwrap();
                std::fs::create_dir(dir.path().join("rootfs")).unwrap();
                test(dir.path());
            });
            alone.join().unwrap();
        });
    }

    fn described(kind: &str, source: &Path, target: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.to_str().unwrap().into(),
            target: target.into(),
            options: options.iter().map(|option| option.to_string()).collect(),
            ..Default::default()
        }
    }

    fn mounted(dir: &Path, mounts: &[Mount]) -> PathBuf {
        let rootfs = dir.join("rootfs");
        for mount in mounts {
            by_kernel(mount, &rootfs, &dir.join(SHIFTED)).unwrap();
        }
        assert!(!dir.join(SHIFTED).exists());
        rootfs
    }

    #[test]
    fn several_mounts_make_one_root() {
        alone(|dir| {
            std::fs::create_dir_all(dir.join("base/data")).unwrap();
            std::fs::create_dir(dir.join("more")).unwrap();
            std::fs::write(dir.join("more/file"), "text").unwrap();
            let base = described("bind", &dir.join("base"), "", &["rbind", "rw"]);
            let more = described("bind", &dir.join("more"), "/data", &["rbind", "ro"]);
            let rootfs = mounted(dir, &[base, more]);
            assert_eq!(std::fs::read_to_string(rootfs.join("data/file")).unwrap(), "text");
            let err = std::fs::write(rootfs.join("data/file"), "").unwrap_err();
            assert_eq!(err.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            std::fs::write(rootfs.join("new"), "").unwrap();
        });
    }

    #[test]
    fn owners_are_shifted_in_binds_and_in_layers() {
        use std::os::unix::fs::MetadataExt;
        alone(|dir| {
            for name in ["layers/1", "layers/2", "upper", "work"] {
                std::fs::create_dir_all(dir.join(name)).unwrap();
            }
            std::fs::write(dir.join("layers/1/file"), "text").unwrap();
            let maps = ["uidmap=0:100000:10", "gidmap=0:200000:10"];
            let owner = |path: PathBuf| {
                let file = path.metadata().unwrap();
                (file.uid(), file.gid())
            };
            let bind =
                described("bind", &dir.join("layers/1"), "", &[&["rbind"], &maps[..]].concat());
            let rootfs = mounted(dir, &[bind]);
            assert_eq!(owner(rootfs.join("file")), (100_000, 200_000));

            let at = dir.display();
            let lower = format!("lowerdir={at}/layers/2:{at}/layers/1");
            let (upper, work) = (format!("upperdir={at}/upper"), format!("workdir={at}/work"));
            let options = [&[lower.as_str(), &upper, &work], &maps[..]].concat();
            let rootfs = mounted(dir, &[described("overlay", Path::new("overlay"), "", &options)]);
            assert_eq!(owner(rootfs.join("file")), (100_000, 200_000));
        });
    }

    #[test]
    fn fifty_layers_with_long_names_are_mounted() {
        alone(|dir| {
            let layers: Vec<_> = (0..50).map(|n| dir.join(format!("layers/{n:060}/fs"))).collect();
            for (n, layer) in layers.iter().enumerate() {
                std::fs::create_dir_all(layer).unwrap();
                std::fs::write(layer.join(format!("file{n}")), "").unwrap();
            }
            // Too long for one page with the folder in front of each.
            let short: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
            let lower = format!("lowerdir={}", short.join(":"));
            let rootfs = mounted(dir, &[described("overlay", Path::new("overlay"), "", &[&lower])]);
            assert!(rootfs.join("file0").exists() && rootfs.join("file49").exists());
        });
    }

    #[test]
    fn a_file_can_be_a_device() {
        alone(|dir| {
            let image = dir.join("image");
            std::fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
            let made = Command::new("mkfs.ext2").arg("-q").arg(&image).output();
            if !made.is_ok_and(|made| made.status.success()) || free_loop().is_err() {
                return;
            }
            let rootfs = mounted(dir, &[described("ext2", &image, "", &["loop"])]);
            assert!(rootfs.join("lost+found").exists());
            // With the mount the device goes.
            umount2(&rootfs, MntFlags::empty()).unwrap();
            let loops = std::fs::read_dir("/sys/block").unwrap().flatten();
            let backed = |entry: std::fs::DirEntry| {
                let file = std::fs::read_to_string(entry.path().join("loop/backing_file"));
                file.is_ok_and(|file| file.trim().ends_with(image.to_str().unwrap()))
            };
            assert!(!loops.into_iter().any(backed));
        });
    }

    fn free_loop() -> std::io::Result<std::fs::File> {
        std::fs::OpenOptions::new().write(true).open("/dev/loop-control")
    }

    #[test]
    fn what_the_mount_manager_should_have_handled_is_refused() {
        let mount = Mount { type_: "format/overlay".into(), ..Default::default() };
        let err = by_kernel(&mount, Path::new("/b/rootfs"), Path::new("/b/s")).unwrap_err();
        assert!(err.to_string().contains("mount manager"), "{err}");
    }
}
