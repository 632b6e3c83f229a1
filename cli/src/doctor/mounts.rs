//! A container's mounts, as far as its open files tell something by them.

use std::collections::BTreeSet;

use super::host::field;

/// The container's mounts.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    ids: BTreeSet<u32>,
    /// Device of its root file system, if that is an overlay.
    overlay: Option<u64>,
}

impl Mounts {
    /// Whether the mount `id` is one of them.
    pub(super) fn has(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// Whether an inotify descriptor of that `info` watches something on the overlay.
    pub(super) fn watches_overlay(&self, info: &str) -> bool {
        let watches = info.lines().filter(|line| line.starts_with("inotify "));
        let mut devices = watches.filter_map(|line| {
            let device = line.split_whitespace().find_map(|word| word.strip_prefix("sdev:"))?;
            u64::from_str_radix(device, 16).ok()
        });
        devices.any(|device| Some(device) == self.overlay)
    }
}

/// Of a `/proc/PID/mountinfo`.
pub(super) fn mounts(mountinfo: &str) -> Mounts {
    let mut mounts = Mounts::default();
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let id = fields.next().and_then(|id| id.parse::<u32>().ok());
        mounts.ids.extend(id);
        let device = fields.nth(1).and_then(|device| device.split_once(':'));
        let at = fields.nth(1);
        let is_overlay =
            line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("overlay"));
        if is_overlay && at == Some("/") {
            mounts.overlay = device.and_then(|(major, minor)| {
                // As the kernel has it within itself, and in fdinfo.
                Some(major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?)
            });
        }
    }
    mounts
}

/// Number of the mount that an open file of that `info` is on.
pub(super) fn mount_of(info: &str) -> Option<u32> {
    field(info, "mnt_id:")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_watches_are_read() {
        let text = "600 500 0:52 / / rw - overlay overlay rw,lowerdir=/x\n\
                    601 600 0:60 / /proc rw - proc proc rw\n";
        let mounts = mounts(text);
        assert!(mounts.has(601) && !mounts.has(500));
        let watch = |device: &str| {
            format!("pos:\t0\nmnt_id:\t15\ninotify wd:1 ino:2 sdev:{device} mask:2\n")
        };
        assert!(mounts.watches_overlay(&watch("34")) && !mounts.watches_overlay(&watch("3c")));
        assert_eq!(mount_of(&watch("0")), Some(15));
    }
}
