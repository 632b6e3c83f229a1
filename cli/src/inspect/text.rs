//! A report for people. What comes out of a checkpoint is not trusted with the terminal either.

use std::fmt::Write as _;

use ferry_oci::criu::DumpOptions;
use ferry_oci::criu::images::{Contents, File, Process};

use super::report::Report;
use crate::table::Table;

/// All of it.
pub(super) fn of(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(text, "{:<13}{}", format!("{name}:"), clean(&value));
        }
    };
    let known = |text: &Option<String>| text.clone().unwrap_or_default();
    line(report.kind, report.name.clone());
    line("container", known(&report.container));
    line("of image", known(&report.image));
    line("runtime", known(&report.runtime));
    line("snapshotter", known(&report.snapshotter));
    line("command", report.command.as_ref().map(|words| words.join(" ")).unwrap_or_default());
    line("made", known(&report.created));
    line("by", versions(report));
    line(
        "then",
        match report.exit {
            Some(true) => "the container ended".to_owned(),
            Some(false) => "the container went on".to_owned(),
            None => String::new(),
        },
    );
    line("options", report.options.as_ref().map(options).unwrap_or_default());
    line("statistics", statistics(report));
    if let Some(contents) = &report.contents {
        line("hostname", contents.hostname.clone());
        line("memory", memory(contents));
        line("dump", inventory(contents));
    }
    for part in &report.parts {
        line("part", format!("{} {} {}", part.media_type, size(part.size), part.digest));
    }
    match &report.contents {
        Some(contents) => text + &tables(contents),
        None => text + "\nno processes: it was made without them (ctr: --task)\n",
    }
}

fn versions(report: &Report) -> String {
    let versions = &report.versions;
    let all = [
        ("ferry", &versions.ferry),
        ("criu", &versions.criu),
        ("runc", &versions.runc),
        ("kernel", &versions.kernel),
    ];
    let known = all.iter().filter_map(|(name, version)| Some((name, version.as_ref()?)));
    known.map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ")
}

fn options(options: &DumpOptions) -> String {
    let mut all = Vec::new();
    let connections = if options.tcp_established { "kept" } else { "not kept" };
    all.push(format!("connections {connections}"));
    let switches = [
        (options.file_locks, "file locks"),
        (options.ext_unix_sk, "unix sockets with an end outside"),
        (options.shell_job, "terminal"),
        (options.in_netns, "network namespace given by path"),
    ];
    all.extend(switches.iter().filter(|switch| switch.0).map(|switch| switch.1.to_owned()));
    all.extend(options.empty_ns.iter().map(|name| format!("empty {name} namespace")));
    all.extend(options.manage_cgroups.iter().map(|mode| format!("cgroups {mode}")));
    if let Some(locked) = &options.locked {
        all.push(format!(
            "{} connections locked as {} until {} s after 1970",
            locked.connections.len(),
            locked.id,
            locked.until
        ));
    }
    all.join(", ")
}

fn statistics(report: &Report) -> String {
    let mut all = Vec::new();
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    if let Some(taken) = &report.statistics {
        // One that has ended the container was not followed by a thaw.
        let frozen = taken.frozen_us.filter(|us| *us > 0);
        all.extend(frozen.map(|us| format!("frozen {}", ms(us))));
        all.extend(taken.dump_us.map(|us| format!("dumped in {}", ms(us))));
    }
    if let Some(criu) = report.contents.as_ref().and_then(|contents| contents.statistics) {
        all.push(format!("frozen by criu {}", ms(criu.frozen_us)));
        all.push(format!("memory written in {}", ms(criu.memory_write_us)));
        all.push(format!("{} pages written of {}", criu.pages_written, criu.pages_scanned));
    }
    all.join(", ")
}

fn memory(contents: &Contents) -> String {
    let mut text = format!("{} in pages", size(contents.pages_bytes));
    if contents.tmpfs_bytes > 0 {
        let _ = write!(text, ", {} in small file systems", size(contents.tmpfs_bytes));
    }
    if contents.has_parent {
        text += ", the rest in an earlier dump, which a restore needs too";
    }
    text
}

fn inventory(contents: &Contents) -> String {
    let inventory = &contents.inventory;
    let mut text = format!("format {}, network lock {}", inventory.version, inventory.network_lock);
    if let Some(lsm) = inventory.lsm {
        let _ = write!(text, ", with {lsm}");
    }
    if inventory.tcp_close {
        text += ", connections closed";
    }
    text
}

fn tables(contents: &Contents) -> String {
    let columns = ["PID", "PPID", "STATE", "USER", "THREADS", "MEMORY", "MAPPED", "COMMAND"];
    let mut processes = Table::new(&columns);
    for process in &contents.processes {
        processes.row([
            process.pid.to_string(),
            process.ppid.to_string(),
            process.state.to_owned(),
            format!("{}:{}", process.uid, process.gid),
            process.threads.to_string(),
            size(process.memory.present + process.memory.in_parent + process.memory.lazy),
            size(process.memory.mapped),
            clean(&command(process)),
        ]);
    }
    let mut files = Table::new(&["PID", "FD", "KIND", "WHAT"]);
    for process in &contents.processes {
        for open in &process.files {
            let (kind, what) = file(&open.file);
            let row = [process.pid.to_string(), open.fd.to_string(), kind, clean(&what)];
            files.row(row);
        }
    }
    let mut mounts = Table::new(&["MOUNT", "KIND", "FROM"]);
    for mount in &contents.mounts {
        let from = match (mount.external, mount.root.as_str()) {
            (true, _) => format!("outside: {}", mount.root),
            (false, "/" | "") => mount.source.clone(),
            (false, root) => format!("{} {root}", mount.source),
        };
        mounts.row([clean(&mount.target), clean(&mount.kind), clean(&from)]);
    }
    [processes, files, mounts]
        .iter()
        .filter(|table| !table.is_empty())
        .map(|table| format!("\n{table}"))
        .collect()
}

/// As ps(1) has it: a name in brackets where there is no command line.
fn command(process: &Process) -> String {
    match process.command.as_slice() {
        [] => format!("[{}]", process.name),
        words => words.join(" "),
    }
}

/// Its kind, and what it is.
fn file(file: &File) -> (String, String) {
    let with = |what: &str, state: &str| match state {
        "" => what.to_owned(),
        state => format!("{what} {state}"),
    };
    match file {
        File::File { path, position, access } => {
            ("file".into(), format!("{path} ({access}, at {position})"))
        }
        File::Pipe { pipe, access } => ("pipe".into(), format!("{pipe} ({access})")),
        File::Inet { protocol, local, remote, state: "connected" } => {
            (protocol.clone(), format!("{local} to {remote} connected"))
        }
        File::Inet { protocol, local, state, .. } => {
            (protocol.clone(), with(&local.to_string(), state))
        }
        File::Unix { path, state, inode, peer } => {
            let name = if path.is_empty() { format!("number {inode}") } else { path.clone() };
            let name = if *peer == 0 { name } else { format!("{name} to number {peer}") };
            ("unix".into(), with(&name, state))
        }
        File::Other { what } => ((*what).to_owned(), String::new()),
        File::Unknown => ("unknown".into(), String::new()),
    }
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    let units = [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// Without what a terminal would take for orders.
pub(crate) fn clean(text: &str) -> String {
    let is_plain = |c: char| {
        !c.is_control() && !matches!(c, '\u{200e}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut clean = String::new();
    for c in text.chars() {
        if is_plain(c) { clean.push(c) } else { clean.extend(c.escape_default()) }
    }
    clean
}
