//! Options of overlays, as containerd's snapshotters write them.

use std::path::{Path, PathBuf};

/// The option with the layers.
pub const LOWER: &str = "lowerdir=";
/// The kernel takes one page of options; from here on they are shortened.
const LONG: usize = 4096 - 512;

/// Makes the layers in `options` relative to the folder that is returned, if they are too long
/// otherwise and have one in common.
pub fn shorten(options: &mut [String]) -> Option<PathBuf> {
    if options.iter().map(String::len).sum::<usize>() < LONG {
        return None;
    }
    let list = options.iter_mut().find(|option| option.starts_with(LOWER))?;
    let folder = common(list).filter(|_| list.contains(':'))?;
    *list = below(list, &folder, "");
    Some(folder)
}

/// The deepest folder that all layers lie in, if it is not the root.
pub fn common(list: &str) -> Option<PathBuf> {
    let mut layers = list.strip_prefix(LOWER)?.split(':').map(Path::new);
    let first = layers.next()?.parent()?;
    let folder = layers.try_fold(first, |folder, layer| {
        folder.ancestors().find(|folder| layer != *folder && layer.starts_with(folder))
    })?;
    (folder.is_absolute() && folder != Path::new("/")).then(|| folder.to_owned())
}

/// `list` with `start` in the place of `folder`.
pub fn below(list: &str, folder: &Path, start: &str) -> String {
    let layers = list.trim_start_matches(LOWER).split(':').map(|layer| {
        let layer = Path::new(layer).strip_prefix(folder).unwrap_or(Path::new(layer));
        format!("{start}{}", layer.display())
    });
    format!("{LOWER}{}", layers.collect::<Vec<_>>().join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_in_common_ends_at_a_name() {
        let of = |list: &str| common(list).map(|folder| folder.display().to_string());
        assert_eq!(of("lowerdir=/s/10/fs:/s/12/fs").as_deref(), Some("/s"));
        assert_eq!(of("lowerdir=/s/10/fs").as_deref(), Some("/s/10"));
        assert_eq!(of("lowerdir=/s/1:/s/1/fs").as_deref(), Some("/s"));
        assert_eq!(of("lowerdir=/a/fs:/b/fs"), None);
        assert_eq!(of("upperdir=/a/fs"), None);
    }

    #[test]
    fn only_long_lists_are_shortened() {
        let options = |layers: usize| {
            let layers: Vec<_> = (0..layers).map(|n| format!("/snapshots/{n}/fs")).collect();
            vec!["workdir=/w".to_string(), format!("lowerdir={}", layers.join(":"))]
        };
        let mut short = options(3);
        assert_eq!(shorten(&mut short), None);
        assert_eq!(short, options(3));
        let mut long = options(300);
        assert_eq!(shorten(&mut long).unwrap(), Path::new("/snapshots"));
        assert!(long[1].starts_with("lowerdir=0/fs:1/fs:"), "{}", long[1]);
        assert_eq!(long[0], "workdir=/w");
    }

    #[test]
    fn layers_are_seen_through_another_folder() {
        let list = below("lowerdir=/s/10/fs:/s/12/fs", Path::new("/s"), "/b/shifted/");
        assert_eq!(list, "lowerdir=/b/shifted/10/fs:/b/shifted/12/fs");
    }
}
