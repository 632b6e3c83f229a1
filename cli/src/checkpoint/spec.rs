//! What a checkpoint from elsewhere may ask of this host. A container whose record is here is restored
//! with that; of an image's spec nothing is taken that names the host, unless it is allowed by hand.

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

/// What may be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Allowed {
    /// Files and folders of the host
    Mounts,
    /// Devices of the host
    Devices,
    /// Capabilities that a container does not have by default
    Capabilities,
    /// Namespaces of the host or of others, its network too
    Namespaces,
    /// Programs that run on the host
    Hooks,
    /// Everything
    All,
}

/// Capabilities that containerd gives by default.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
/// All of them, in the kernel's order.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];
/// File systems that show nothing of the host's files.
const OWN_FILE_SYSTEMS: [&str; 7] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Those of them that must not be written.
const READ_ONLY: [&str; 3] = ["sysfs", "cgroup", "cgroup2"];
/// What must be hidden of it, and what must not be written.
pub(super) const MASKED: [&str; 4] =
    ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"];
pub(super) const PROTECTED: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Files of the host that containers see by default.
const HOST_FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
/// Namespaces that a container has of its own.
const NAMESPACES: [&str; 5] = ["pid", "ipc", "uts", "mount", "network"];
/// Character devices that every container has; none: every minor number.
const DEVICES: [(i64, Option<i64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];
/// The one annotation that is taken.
const OPEN_TCP: &str = "io.ferry.open-tcp";

/// Something of the host that a checkpoint asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Want {
    /// What has to be allowed for it.
    pub(super) kind: Allowed,
    /// In words.
    pub(super) what: String,
}

/// A spec with the fields that the OCI has, of the types that they have, and no others: runc would take a
/// field in any case of letters, and nobody would have looked at it.
///
/// # Errors
/// When it is none.
pub(super) fn canonical(bytes: &[u8]) -> Result<Value> {
    let spec: Spec = serde_json::from_slice(bytes).context("decode the checkpoint's spec")?;
    ensure!(spec.linux().is_some(), "the checkpoint's spec is not one for Linux");
    serde_json::to_value(&spec).context("write the spec")
}

/// Refuses a spec that asks for more than is allowed.
///
/// # Errors
/// With all that it asks for.
pub(super) fn check(spec: &Value, allowed: &[Allowed]) -> Result<()> {
    refuse(wants(spec), allowed)
}

/// Refuses what is not allowed.
///
/// # Errors
/// With all of it.
pub(super) fn refuse(wants: Vec<Want>, allowed: &[Allowed]) -> Result<()> {
    let refused: Vec<Want> = wants
        .into_iter()
        .filter(|want| !allowed.contains(&want.kind) && !allowed.contains(&Allowed::All))
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    let mut kinds: Vec<_> = refused.iter().map(|want| want.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let names = kinds.iter().filter_map(ValueEnum::to_possible_value);
    let flags: Vec<_> = names.map(|value| format!("--allow {}", value.get_name())).collect();
    let list: Vec<_> = refused.into_iter().map(|want| want.what).collect();
    bail!(
        "the checkpoint asks for {}: if you trust who made it, give {}",
        list.join(", "),
        flags.join(" ")
    )
}

/// Refuses processes that have capabilities, a bit for each, which the container of `spec` has not.
///
/// # Errors
/// With their names.
pub(super) fn check_capabilities(spec: &Value, bits: u64, allowed: &[Allowed]) -> Result<()> {
    if allowed.contains(&Allowed::Capabilities) || allowed.contains(&Allowed::All) {
        return Ok(());
    }
    let sets = spec["process"]["capabilities"].as_object();
    let given: Vec<&str> =
        sets.into_iter().flat_map(|sets| sets.values()).flat_map(list).map(text).collect();
    let has = |number: usize| bits & 1 << number != 0;
    let more: Vec<_> = (0..64)
        .filter(|number| has(*number))
        .map(|number| CAPABILITIES.get(number).map_or("one that is unknown", |name| *name))
        .filter(|name| !given.contains(name))
        .collect();
    if more.is_empty() {
        return Ok(());
    }
    bail!(
        "processes in the checkpoint have capabilities that the container has not ({}): if you trust who \
         made it, give --allow capabilities",
        more.join(", ")
    )
}

/// The spec as container `id` of `namespace` gets it: nothing in it leads to where it came from.
pub(super) fn localize(spec: &mut Value, namespace: &str, id: &str) {
    spec["root"]["path"] = json!("rootfs");
    if let Some(linux) = spec.get_mut("linux") {
        linux["cgroupsPath"] = json!(format!("/{namespace}/{id}"));
    }
    let kept = spec["annotations"].get(OPEN_TCP).cloned();
    match kept {
        Some(value) => spec["annotations"] = json!({ OPEN_TCP: value }),
        None => drop(spec.as_object_mut().and_then(|spec| spec.remove("annotations"))),
    }
}

/// The network namespace that a spec gives by path, if it does.
pub(super) fn given_network(spec: &Value) -> Option<&str> {
    let mut networks = list(&spec["linux"]["namespaces"]).filter(|n| n["type"] == "network");
    networks.next().map(|network| text(&network["path"])).filter(|path| !path.is_empty())
}

fn wants(spec: &Value) -> Vec<Want> {
    let mut found = Vec::new();
    mounts(spec, &mut found);
    devices(spec, &mut found);
    capabilities(spec, &mut found);
    namespaces(spec, &mut found);
    hooks(spec, &mut found);
    found
}

pub(super) fn want(found: &mut Vec<Want>, kind: Allowed, what: String) {
    let want = Want { kind, what };
    if !found.contains(&want) {
        found.push(want);
    }
}

pub(super) fn list(value: &Value) -> std::slice::Iter<'_, Value> {
    value.as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn mounts(spec: &Value, found: &mut Vec<Want>) {
    for mount in list(&spec["mounts"]) {
        let has = |name: &str| list(&mount["options"]).any(|option| option == name);
        // The last one counts.
        let mut access =
            list(&mount["options"]).map(text).filter(|option| ["ro", "rw"].contains(option));
        let read_only = access.next_back() == Some("ro");
        let (kind, source) = (text(&mount["type"]), text(&mount["source"]));
        let bind = kind == "bind" || has("bind") || has("rbind");
        if bind && HOST_FILES.contains(&source) && read_only {
            continue;
        }
        let own = !bind && OWN_FILE_SYSTEMS.contains(&kind);
        // Another one would be neither masked nor protected.
        let second = kind == "proc" && text(&mount["destination"]) != "/proc";
        if !own || second || READ_ONLY.contains(&kind) && !read_only {
            let what = format!("the mount of {source} ({kind}) at {}", text(&mount["destination"]));
            want(found, Allowed::Mounts, what);
        }
    }
    let propagation = text(&spec["linux"]["rootfsPropagation"]);
    if propagation.contains("shared") {
        want(found, Allowed::Mounts, format!("{propagation} mounts"));
    }
    for (key, paths) in [("maskedPaths", &MASKED[..]), ("readonlyPaths", &PROTECTED[..])] {
        for path in
            paths.iter().filter(|path| !list(&spec["linux"][key]).any(|there| there == *path))
        {
            want(found, Allowed::Mounts, format!("an open {path}"));
        }
    }
}

fn devices(spec: &Value, found: &mut Vec<Want>) {
    for device in list(&spec["linux"]["devices"]) {
        want(found, Allowed::Devices, format!("the device {}", text(&device["path"])));
    }
    for rule in list(&spec["linux"]["resources"]["devices"]) {
        let number = |key: &str| rule[key].as_i64();
        let default = |(major, minor): &(i64, Option<i64>)| {
            text(&rule["type"]) == "c"
                && number("major") == Some(*major)
                && (minor.is_none() || number("minor") == *minor)
        };
        // To make a device does not give access to it.
        let harmless = rule["allow"] != true || text(&rule["access"]) == "m";
        if !harmless && !DEVICES.iter().any(default) {
            let part =
                |key| number(key).filter(|n| *n >= 0).map_or("*".to_owned(), |n| n.to_string());
            let what =
                format!("devices {} {}:{}", text(&rule["type"]), part("major"), part("minor"));
            want(found, Allowed::Devices, what);
        }
    }
}

fn capabilities(spec: &Value, found: &mut Vec<Want>) {
    for set in
        spec["process"]["capabilities"].as_object().into_iter().flat_map(|sets| sets.values())
    {
        for name in list(set).map(text).filter(|name| !DEFAULT_CAPABILITIES.contains(name)) {
            want(found, Allowed::Capabilities, name.to_owned());
        }
    }
}

fn namespaces(spec: &Value, found: &mut Vec<Want>) {
    let all = &spec["linux"]["namespaces"];
    for namespace in list(all) {
        let path = text(&namespace["path"]);
        if !path.is_empty() {
            let what = format!("the {} namespace {path}", text(&namespace["type"]));
            want(found, Allowed::Namespaces, what);
        }
    }
    for kind in NAMESPACES {
        if !list(all).any(|namespace| namespace["type"] == kind) {
            want(found, Allowed::Namespaces, format!("the host's {kind} namespace"));
        }
    }
}

fn hooks(spec: &Value, found: &mut Vec<Want>) {
    for hook in spec["hooks"].as_object().into_iter().flat_map(|groups| groups.values()) {
        for hook in list(hook) {
            want(found, Allowed::Hooks, format!("the hook {}", text(&hook["path"])));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `ctr run` makes it, shortened.
    fn harmless() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0},
                        "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL"]}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
                 "options": ["rbind", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                               {"type": "network"}],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 136, "access": "rwm"},
                    {"allow": true, "type": "b", "access": "m"},
                ]},
                "maskedPaths": MASKED,
                "readonlyPaths": PROTECTED,
            },
        })
    }

    #[test]
    fn what_every_container_has_needs_no_word() {
        assert_eq!(wants(&harmless()), []);
        check(&harmless(), &[]).unwrap();
    }

    #[test]
    fn what_names_the_host_is_refused_and_can_be_allowed() {
        let change = |path: &str, value: Value| {
            let mut spec = harmless();
            match spec.pointer_mut(path).unwrap() {
                Value::Array(list) => list.push(value),
                other => *other = value,
            }
            spec
        };
        let bind = |source: &str, options: Value| {
            let mount =
                json!({"destination": "/x", "type": "bind", "source": source, "options": options});
            change("/mounts", mount)
        };
        let device = json!({"allow": true, "access": "rwm"});
        let disk = json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"});
        let joined = json!({"type": "network", "path": "/proc/1/ns/net"});
        let hook = json!({"prestart": [{"path": "/bin/evil"}]});
        let mut hooked = harmless();
        hooked["hooks"] = hook;
        let mut masks = harmless();
        masks["linux"]["maskedPaths"] = json!([]);
        let mut shared = harmless();
        shared["linux"]["rootfsPropagation"] = json!("rshared");
        let mut host = harmless();
        host["linux"]["namespaces"].as_array_mut().unwrap().pop();
        for (kind, spec, part) in [
            (Allowed::Mounts, bind("/", json!(["rbind", "ro"])), "the mount of /"),
            (Allowed::Mounts, bind("/etc/hosts", json!(["rbind"])), "/etc/hosts"),
            (Allowed::Mounts, masks, "an open /proc/kcore"),
            (Allowed::Mounts, shared, "rshared"),
            (Allowed::Mounts, bind("/etc/hosts", json!(["rbind", "ro", "rw"])), "/etc/hosts"),
            (
                Allowed::Mounts,
                change("/mounts", json!({"destination": "/p", "type": "proc", "source": "proc"})),
                "at /p",
            ),
            (Allowed::Devices, change("/linux/resources/devices", device), "devices"),
            (Allowed::Devices, change("/linux/resources/devices", disk), "devices b 8:0"),
            (
                Allowed::Capabilities,
                change("/process/capabilities/bounding", json!("CAP_SYS_ADMIN")),
                "CAP_SYS_ADMIN",
            ),
            (Allowed::Namespaces, change("/linux/namespaces", joined), "/proc/1/ns/net"),
            (Allowed::Namespaces, host, "the host's network namespace"),
            (Allowed::Hooks, hooked, "/bin/evil"),
        ] {
            let error = check(&spec, &[]).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("--allow"), "{error}");
            check(&spec, &[kind]).unwrap();
            check(&spec, &[Allowed::All]).unwrap();
            let others = [
                Allowed::Mounts,
                Allowed::Devices,
                Allowed::Capabilities,
                Allowed::Namespaces,
                Allowed::Hooks,
            ];
            let others: Vec<_> = others.into_iter().filter(|other| *other != kind).collect();
            assert!(check(&spec, &others).is_err(), "{part}");
        }
    }

    #[test]
    fn fields_that_only_look_like_those_of_a_spec_are_not_passed_on() {
        let mut spec = harmless();
        spec["Hooks"] = json!({"prestart": [{"path": "/bin/evil"}]});
        spec["linux"]["cgroupspath"] = json!("/system.slice");
        let canonical = canonical(spec.to_string().as_bytes()).unwrap();
        assert!(!canonical.to_string().contains("evil"), "{canonical}");
        assert!(!canonical.to_string().contains("system.slice"), "{canonical}");
        check(&canonical, &[]).unwrap();
        for bad in ["[]", "{}", r#"{"ociVersion":"1.1.0","linux":7}"#, r#"{"ociVersion":"1.1.0"}"#]
        {
            assert!(super::canonical(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn processes_have_no_more_than_their_container() {
        let spec = harmless();
        check_capabilities(&spec, 1 << 0 | 1 << 5, &[]).unwrap();
        let error = check_capabilities(&spec, 1 << 0 | 1 << 21, &[]).unwrap_err().to_string();
        assert!(error.contains("(CAP_SYS_ADMIN)"), "{error}");
        assert!(check_capabilities(&spec, 1 << 63, &[Allowed::Mounts]).is_err());
        check_capabilities(&spec, 1 << 21, &[Allowed::Capabilities]).unwrap();
        assert_eq!(CAPABILITIES[40], "CAP_CHECKPOINT_RESTORE");
        assert!(DEFAULT_CAPABILITIES.iter().all(|name| CAPABILITIES.contains(name)));
    }

    #[test]
    fn a_spec_leads_nowhere_it_came_from() {
        let mut spec = harmless();
        spec["root"]["path"] = json!("/var/lib/elsewhere");
        spec["linux"]["cgroupsPath"] = json!("/system.slice");
        spec["annotations"] = json!({"org.criu.config": "/tmp/evil", OPEN_TCP: "false"});
        localize(&mut spec, "default", "redis");
        assert_eq!(spec["root"]["path"], "rootfs");
        assert_eq!(spec["linux"]["cgroupsPath"], "/default/redis");
        assert_eq!(spec["annotations"], json!({OPEN_TCP: "false"}));
        spec["annotations"] = json!({"org.criu.config": "/tmp/evil"});
        localize(&mut spec, "default", "redis");
        assert!(spec.get("annotations").is_none());
    }
}
