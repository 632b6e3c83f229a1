//! What a container uses, on cgroup v2.

use std::path::Path;

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use containerd_shim::protos::protobuf::MessageField;

use super::files::{self, KeyValues};

/// The name of the message.
pub(super) const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Everything there is. Controllers that the cgroup does not have count zero.
pub(super) fn metrics(folder: &Path) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number(folder, "pids.current"),
            limit: number(folder, "pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(folder)),
        memory: MessageField::some(memory(folder)),
        memory_events: memory_events(folder).into(),
        io: MessageField::some(IOStat {
            usage: io(&files::read(&folder.join("io.stat")).unwrap_or_default()),
            psi: psi(folder, "io.pressure"),
            ..Default::default()
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma(folder, "rdma.current"),
            limit: rdma(folder, "rdma.max"),
            ..Default::default()
        }),
        hugetlb: files::huge_page_sizes().iter().map(|size| hugetlb(folder, size)).collect(),
        ..Default::default()
    }
}

/// A file with one number; no limit is the greatest there is.
fn number(folder: &Path, file: &str) -> u64 {
    files::number(&folder.join(file), u64::MAX).unwrap_or_default()
}

fn cpu(folder: &Path) -> CPUStat {
    let stat = KeyValues::read(&folder.join("cpu.stat")).unwrap_or_default();
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: psi(folder, "cpu.pressure"),
        ..Default::default()
    }
}

fn memory(folder: &Path) -> MemoryStat {
    let Some(stat) = KeyValues::read(&folder.join("memory.stat")) else {
        return MemoryStat::default();
    };
    let get = |name| stat.get(name);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault"),
        workingset_activate: get("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: number(folder, "memory.current"),
        usage_limit: number(folder, "memory.max"),
        max_usage: number(folder, "memory.peak"),
        swap_usage: number(folder, "memory.swap.current"),
        swap_limit: number(folder, "memory.swap.max"),
        swap_max_usage: number(folder, "memory.swap.peak"),
        psi: psi(folder, "memory.pressure"),
        ..Default::default()
    }
}

fn memory_events(folder: &Path) -> Option<MemoryEvents> {
    let events = KeyValues::read(&folder.join("memory.events"))?;
    (!events.is_empty()).then(|| MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..Default::default()
    })
}

/// Lines like `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut fields = line.split_whitespace();
        let (major, minor) = files::device(fields.next()?)?;
        let mut entry = IOEntry { major, minor, ..Default::default() };
        for (name, value) in fields.filter_map(|field| field.split_once('=')) {
            let value = value.parse().unwrap_or_default();
            match name {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// How long tasks have waited. A kernel without pressure has no such file, or refuses to read it.
fn psi(folder: &Path, file: &str) -> MessageField<PSIStats> {
    files::read(&folder.join(file)).map(|text| parse_psi(&text)).into()
}

/// Lines like `some avg10=0.00 avg60=1.50 avg300=0.25 total=1234`.
fn parse_psi(text: &str) -> PSIStats {
    let mut stats = PSIStats::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let kind = fields.next();
        let mut data = PSIData::default();
        for (name, value) in fields.filter_map(|field| field.split_once('=')) {
            match name {
                "avg10" => data.avg10 = value.parse().unwrap_or_default(),
                "avg60" => data.avg60 = value.parse().unwrap_or_default(),
                "avg300" => data.avg300 = value.parse().unwrap_or_default(),
                "total" => data.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        match kind {
            Some("some") => stats.some = MessageField::some(data),
            Some("full") => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    stats
}

fn rdma(folder: &Path, file: &str) -> Vec<RdmaEntry> {
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
}

fn hugetlb(folder: &Path, size: &str) -> HugeTlbStat {
    let events = KeyValues::read(&folder.join(format!("hugetlb.{size}.events")));
    HugeTlbStat {
        current: number(folder, &format!("hugetlb.{size}.current")),
        max: number(folder, &format!("hugetlb.{size}.max")),
        pagesize: size.to_string(),
        failcnt: events.unwrap_or_default().get("max"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics_of(files: &[(&str, &str)]) -> Metrics {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        metrics(folder.path())
    }

    #[test]
    fn processes_and_cpu_time() {
        let metrics = metrics_of(&[
            ("pids.current", "2\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 1\nnr_bursts 5\n",
            ),
        ]);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (2, u64::MAX));
        let cpu = &metrics.cpu;
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (30, 20, 10));
        assert_eq!((cpu.nr_throttled, cpu.nr_bursts), (1, 5));
        assert!(cpu.psi.is_none());
    }

    #[test]
    fn memory_its_limits_and_its_events() {
        let metrics = metrics_of(&[
            ("memory.stat", "anon 1\nfile 2\ninactive_file 3\nthp_collapse_alloc 4\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "8192\n"),
            ("memory.peak", "5000\n"),
            ("memory.swap.max", "max\n"),
            ("memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"),
        ]);
        let memory = &metrics.memory;
        assert_eq!((memory.anon, memory.file, memory.inactive_file), (1, 2, 3));
        assert_eq!((memory.usage, memory.usage_limit, memory.max_usage), (4096, 8192, 5000));
        assert_eq!((memory.swap_limit, memory.thp_collapse_alloc), (u64::MAX, 4));
        let events = &metrics.memory_events;
        assert_eq!((events.max, events.oom, events.oom_kill), (7, 2, 1));
    }

    #[test]
    fn devices_one_entry_each() {
        let text = "8:0 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0\n8:16 \nbroken\n";
        let metrics = metrics_of(&[("io.stat", text)]);
        let usage = &metrics.io.usage;
        assert_eq!(usage.len(), 2, "{usage:?}");
        assert_eq!((usage[0].rbytes, usage[0].wbytes), (4096, 1));
        assert_eq!((usage[0].rios, usage[0].wios, usage[1].minor), (2, 3, 16));
    }

    #[test]
    fn pressure_where_the_kernel_has_it() {
        let text = "some avg10=0.50 avg60=1.50 avg300=0.25 total=1234\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        let metrics = metrics_of(&[("memory.pressure", text), ("memory.stat", "anon 1\n")]);
        let psi = &metrics.memory.psi;
        assert_eq!((psi.some.avg10, psi.some.avg60, psi.some.avg300), (0.5, 1.5, 0.25));
        assert_eq!((psi.some.total, psi.full.total), (1234, 5));
    }

    #[test]
    fn controllers_that_are_missing_count_zero() {
        let metrics = metrics_of(&[]);
        assert!(metrics.cpu.is_some() && metrics.memory.is_some() && metrics.pids.is_some());
        assert!(metrics.memory_events.is_none());
    }
}
