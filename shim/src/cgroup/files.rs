//! Reading cgroup files. One that is missing, or whose cgroup has just been removed, has no values.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// The whole file.
pub(super) fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// A file that holds one number. "max" is `max`; what is negative, as in "no limit", is 0.
pub(super) fn number(path: &Path, max: u64) -> Option<u64> {
    read(path).map(|text| parse(text.trim(), max))
}

fn parse(text: &str, max: u64) -> u64 {
    if text == "max" { max } else { text.parse().unwrap_or_default() }
}

/// A file of lines with a name and a number each.
#[derive(Debug, Default)]
pub(super) struct KeyValues(HashMap<String, u64>);

impl KeyValues {
    /// Reads `path`; none if it is not there.
    pub(super) fn read(path: &Path) -> Option<Self> {
        read(path).map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let pair = |line: &str| {
            let (name, value) = line.split_once([' ', '\t'])?;
            Some((name.to_string(), parse(value.trim(), u64::MAX)))
        };
        Self(text.lines().filter_map(pair).collect())
    }

    /// The value of `name`; 0 if the kernel does not know it.
    pub(super) fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `MAJOR:MINOR` of a device.
pub(super) fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// One line of `rdma.current` or `rdma.max`: `mlx4_0 hca_handle=2 hca_object=max`.
pub(super) fn rdma(line: &str) -> Option<(String, u32, u32)> {
    let mut fields = line.split_whitespace();
    let device = fields.next()?.to_string();
    let (mut handles, mut objects) = (0, 0);
    for field in fields {
        match field.split_once('=')? {
            ("hca_handle", value) => handles = parse(value, u32::MAX.into()) as u32,
            ("hca_object", value) => objects = parse(value, u32::MAX.into()) as u32,
            _ => {}
        }
    }
    Some((device, handles, objects))
}

/// The sizes of huge pages that this kernel has, as they stand in the names of cgroup files.
pub(super) fn huge_page_sizes() -> Vec<String> {
    let folder = fs::read_dir("/sys/kernel/mm/hugepages");
    let names = folder.into_iter().flatten().flatten();
    let mut names: Vec<_> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names.iter().filter_map(|name| huge_page_size(name)).collect()
}

fn huge_page_size(name: &str) -> Option<String> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kib {
        0..1024 => format!("{kib}KB"),
        1024..1_048_576 => format!("{}MB", kib >> 10),
        _ => format!("{}GB", kib >> 20),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_limits_and_missing_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let of = |text: &str, max| {
            fs::write(&path, text).unwrap();
            number(&path, max)
        };
        assert_eq!(of("4096\n", 0), Some(4096));
        assert_eq!(of("max\n", 0), Some(0));
        assert_eq!(of("max\n", u64::MAX), Some(u64::MAX));
        assert_eq!(of("-1\n", 7), Some(0));
        assert_eq!(number(&dir.path().join("missing"), 0), None);
    }

    #[test]
    fn lines_of_names_and_numbers() {
        let stat = KeyValues::parse("anon 12\nfile\t34\nbroken\nswap max\n");
        assert_eq!((stat.get("anon"), stat.get("file")), (12, 34));
        assert_eq!((stat.get("swap"), stat.get("broken")), (u64::MAX, 0));
        assert!(KeyValues::parse("").is_empty());
    }

    #[test]
    fn devices_and_rdma_lines() {
        assert_eq!(device("8:16"), Some((8, 16)));
        assert_eq!(device("Total"), None);
        let line = "mlx4_0 hca_handle=2 hca_object=max";
        assert_eq!(rdma(line), Some(("mlx4_0".into(), 2, u32::MAX)));
        assert_eq!(rdma(""), None);
    }

    #[test]
    fn sizes_of_huge_pages_are_named_as_in_cgroup_files() {
        assert_eq!(huge_page_size("hugepages-2048kB").as_deref(), Some("2MB"));
        assert_eq!(huge_page_size("hugepages-1048576kB").as_deref(), Some("1GB"));
        assert_eq!(huge_page_size("hugepages-64kB").as_deref(), Some("64KB"));
        assert_eq!(huge_page_size("other"), None);
    }
}
