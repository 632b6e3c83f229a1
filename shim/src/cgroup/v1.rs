//! What a container uses, on cgroup v1.

use std::collections::HashMap;
use std::path::Path;

use containerd_shim::protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use containerd_shim::protos::protobuf::MessageField;
use ferry_oci::hierarchies::Member;

use super::files::{self, KeyValues, number};

/// The name of the message.
pub(super) const TYPE: &str = "io.containerd.cgroups.v1.Metrics";

/// Nanoseconds of one tick of `cpuacct.stat`: the kernel shows 100 of them a second, everywhere.
const TICK: u64 = 10_000_000;

/// Everything there is.
pub(super) fn metrics(members: &[Member]) -> Metrics {
    let folder = |controller: &str| {
        let member = members.iter().find(|member| member.has(controller));
        member.map(|member| member.folder.as_path())
    };
    Metrics {
        hugetlb: folder("hugetlb").map(hugetlb).unwrap_or_default(),
        pids: folder("pids").and_then(pids).into(),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(folder("cpuacct").map(usage).unwrap_or_default()),
            throttling: MessageField::some(folder("cpu").map(throttling).unwrap_or_default()),
            ..Default::default()
        }),
        memory: folder("memory").and_then(memory).into(),
        blkio: folder("blkio").map(blkio).into(),
        rdma: folder("rdma").map(rdma).into(),
        memory_oom_control: folder("memory").and_then(oom_control).into(),
        ..Default::default()
    }
}

fn pids(folder: &Path) -> Option<PidsStat> {
    Some(PidsStat {
        current: number(&folder.join("pids.current"), 0)?,
        // 0 stands for no limit.
        limit: number(&folder.join("pids.max"), 0)?,
        ..Default::default()
    })
}

fn usage(folder: &Path) -> CPUUsage {
    let stat = KeyValues::read(&folder.join("cpuacct.stat")).unwrap_or_default();
    let per_cpu = files::read(&folder.join("cpuacct.usage_percpu")).unwrap_or_default();
    CPUUsage {
        total: number(&folder.join("cpuacct.usage"), 0).unwrap_or_default(),
        user: stat.get("user").saturating_mul(TICK),
        kernel: stat.get("system").saturating_mul(TICK),
        per_cpu: per_cpu.split_whitespace().filter_map(|cpu| cpu.parse().ok()).collect(),
        ..Default::default()
    }
}

fn throttling(folder: &Path) -> Throttle {
    let stat = KeyValues::read(&folder.join("cpu.stat")).unwrap_or_default();
    Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Default::default()
    }
}

fn memory(folder: &Path) -> Option<MemoryStat> {
    let stat = KeyValues::read(&folder.join("memory.stat"))?;
    let get = |name| stat.get(name);
    let entry = |module| MessageField::some(entry(folder, module));
    Some(MemoryStat {
        cache: get("cache"),
        rss: get("rss"),
        rss_huge: get("rss_huge"),
        mapped_file: get("mapped_file"),
        dirty: get("dirty"),
        writeback: get("writeback"),
        pg_pg_in: get("pgpgin"),
        pg_pg_out: get("pgpgout"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: get("hierarchical_memory_limit"),
        hierarchical_swap_limit: get("hierarchical_memsw_limit"),
        total_cache: get("total_cache"),
        total_rss: get("total_rss"),
        total_rss_huge: get("total_rss_huge"),
        total_mapped_file: get("total_mapped_file"),
        total_dirty: get("total_dirty"),
        total_writeback: get("total_writeback"),
        total_pg_pg_in: get("total_pgpgin"),
        total_pg_pg_out: get("total_pgpgout"),
        total_pg_fault: get("total_pgfault"),
        total_pg_maj_fault: get("total_pgmajfault"),
        total_inactive_anon: get("total_inactive_anon"),
        total_active_anon: get("total_active_anon"),
        total_inactive_file: get("total_inactive_file"),
        total_active_file: get("total_active_file"),
        total_unevictable: get("total_unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
        ..Default::default()
    })
}

fn entry(folder: &Path, module: &str) -> MemoryEntry {
    let get = |name| number(&folder.join(format!("{module}.{name}")), 0).unwrap_or_default();
    MemoryEntry {
        usage: get("usage_in_bytes"),
        max: get("max_usage_in_bytes"),
        failcnt: get("failcnt"),
        limit: get("limit_in_bytes"),
        ..Default::default()
    }
}

fn oom_control(folder: &Path) -> Option<MemoryOomControl> {
    let control = KeyValues::read(&folder.join("memory.oom_control"))?;
    Some(MemoryOomControl {
        oom_kill_disable: control.get("oom_kill_disable"),
        under_oom: control.get("under_oom"),
        oom_kill: control.get("oom_kill"),
        ..Default::default()
    })
}

/// What the scheduler of a device counts, or else what throttling does: not every device has such a
/// scheduler, nor does every kernel.
fn blkio(folder: &Path) -> BlkIOStat {
    let names = device_names(&files::read(Path::new("/proc/partitions")).unwrap_or_default());
    let read = |file: &str| {
        let text = files::read(&folder.join(format!("blkio.{file}"))).unwrap_or_default();
        text.lines().filter_map(|line| blkio_entry(line, &names)).collect::<Vec<_>>()
    };
    let stat = BlkIOStat {
        sectors_recursive: read("sectors_recursive"),
        io_service_bytes_recursive: read("io_service_bytes_recursive"),
        io_serviced_recursive: read("io_serviced_recursive"),
        io_queued_recursive: read("io_queued_recursive"),
        io_service_time_recursive: read("io_service_time_recursive"),
        io_wait_time_recursive: read("io_wait_time_recursive"),
        io_merged_recursive: read("io_merged_recursive"),
        io_time_recursive: read("time_recursive"),
        ..Default::default()
    };
    if stat != BlkIOStat::default() {
        return stat;
    }
    BlkIOStat {
        io_serviced_recursive: read("throttle.io_serviced"),
        io_service_bytes_recursive: read("throttle.io_service_bytes"),
        ..Default::default()
    }
}

/// `8:0 Read 4096`, or without an operation; the sum of all devices is left out.
fn blkio_entry(line: &str, names: &HashMap<(u64, u64), String>) -> Option<BlkIOEntry> {
    let mut fields = line.split_whitespace();
    let (major, minor) = files::device(fields.next()?)?;
    let (op, value) = match (fields.next()?, fields.next()) {
        (op, Some(value)) => (op, value),
        (value, None) => ("", value),
    };
    Some(BlkIOEntry {
        op: op.to_string(),
        device: names.get(&(major, minor)).cloned().unwrap_or_default(),
        major,
        minor,
        value: value.parse().ok()?,
        ..Default::default()
    })
}

/// Devices of `/proc/partitions` by their numbers.
fn device_names(partitions: &str) -> HashMap<(u64, u64), String> {
    let device = |line: &str| {
        let mut fields = line.split_whitespace();
        let number = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((number, format!("/dev/{}", fields.nth(1)?)))
    };
    partitions.lines().filter_map(device).collect()
}

fn rdma(folder: &Path) -> RdmaStat {
    let read = |file| {
        let text = files::read(&folder.join(file)).unwrap_or_default();
        let entries = text.lines().filter_map(files::rdma);
        entries
            .map(|(device, hca_handles, hca_objects)| RdmaEntry {
                device,
                hca_handles,
                hca_objects,
                ..Default::default()
            })
            .collect()
    };
    RdmaStat { current: read("rdma.current"), limit: read("rdma.max"), ..Default::default() }
}

fn hugetlb(folder: &Path) -> Vec<HugetlbStat> {
    let stat = |pagesize: String| {
        let get = |name| number(&folder.join(format!("hugetlb.{pagesize}.{name}")), 0);
        Some(HugetlbStat {
            usage: get("usage_in_bytes")?,
            max: get("max_usage_in_bytes")?,
            failcnt: get("failcnt")?,
            pagesize: pagesize.clone(),
            ..Default::default()
        })
    };
    files::huge_page_sizes().into_iter().filter_map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn members(root: &Path, controllers: &[&str]) -> Vec<Member> {
        let member = |name: &&str| Member {
            controllers: vec![name.to_string()],
            folder: root.join(name),
            mounted: root.join(name),
            unified: false,
        };
        controllers.iter().map(member).collect()
    }

    /// Metrics of a container that has these files.
    fn metrics_of(files: &[(&str, &str)]) -> Metrics {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        metrics(&members(root.path(), &["cpu", "cpuacct", "memory", "pids", "blkio", "rdma"]))
    }

    #[test]
    fn cpu_time_is_in_nanoseconds() {
        let metrics = metrics_of(&[
            ("cpuacct/cpuacct.stat", "user 12\nsystem 3\n"),
            ("cpuacct/cpuacct.usage", "155000000\n"),
            ("cpuacct/cpuacct.usage_percpu", "100000000 55000000 \n"),
            ("cpu/cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 70000\n"),
        ]);
        let usage = &metrics.cpu.usage;
        assert_eq!((usage.total, usage.user, usage.kernel), (155_000_000, 120_000_000, 30_000_000));
        assert_eq!(usage.per_cpu, [100_000_000, 55_000_000]);
        let throttling = &metrics.cpu.throttling;
        assert_eq!((throttling.periods, throttling.throttled_periods), (9, 4));
        assert_eq!(throttling.throttled_time, 70_000);
    }

    #[test]
    fn memory_with_swap_and_the_kernels_share() {
        let metrics = metrics_of(&[
            ("memory/memory.stat", "cache 1\nrss 2\ntotal_inactive_file 3\npgpgin 4\n"),
            ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n"),
            ("memory/memory.usage_in_bytes", "4096\n"),
            ("memory/memory.limit_in_bytes", "8192\n"),
            ("memory/memory.memsw.usage_in_bytes", "5000\n"),
            ("memory/memory.kmem.failcnt", "6\n"),
            ("memory/memory.kmem.tcp.max_usage_in_bytes", "7\n"),
        ]);
        let memory = &metrics.memory;
        assert_eq!((memory.cache, memory.rss, memory.total_inactive_file), (1, 2, 3));
        assert_eq!(memory.pg_pg_in, 4);
        assert_eq!((memory.usage.usage, memory.usage.limit), (4096, 8192));
        assert_eq!((memory.swap.usage, memory.kernel.failcnt, memory.kernel_tcp.max), (5000, 6, 7));
        let oom = &metrics.memory_oom_control;
        assert_eq!((oom.under_oom, oom.oom_kill), (1, 2));
    }

    #[test]
    fn no_limit_of_processes_is_zero() {
        let metrics = metrics_of(&[("pids/pids.current", "3\n"), ("pids/pids.max", "max\n")]);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
    }

    #[test]
    fn a_schedulers_count_wins_over_that_of_throttling() {
        let throttle = ("blkio/blkio.throttle.io_serviced", "8:0 Read 5\n8:0 Total 5\nTotal 5\n");
        let metrics = metrics_of(&[throttle]);
        let served: Vec<_> = metrics.blkio.io_serviced_recursive.iter().collect();
        assert_eq!(served.len(), 2, "{served:?}");
        assert_eq!((served[0].op.as_str(), served[0].value, served[0].major), ("Read", 5, 8));
        let scheduler = ("blkio/blkio.sectors_recursive", "8:0 16\n");
        let metrics = metrics_of(&[throttle, scheduler]);
        assert!(metrics.blkio.io_serviced_recursive.is_empty());
        assert_eq!(metrics.blkio.sectors_recursive[0].value, 16);
    }

    #[test]
    fn devices_have_their_names() {
        let partitions =
            "major minor  #blocks  name\n\n   8        0  500 sda\n 259 1 7 nvme0n1p1\n";
        let names = device_names(partitions);
        assert_eq!(names[&(8, 0)], "/dev/sda");
        assert_eq!(blkio_entry("259:1 Write 4", &names).unwrap().device, "/dev/nvme0n1p1");
    }

    #[test]
    fn controllers_that_are_missing_are_left_out() {
        let metrics = metrics(&[]);
        assert!(metrics.memory.is_none() && metrics.pids.is_none() && metrics.blkio.is_none());
        // Clients read through these without asking.
        assert!(metrics.cpu.usage.is_some() && metrics.cpu.throttling.is_some());
    }
}
