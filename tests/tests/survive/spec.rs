//! The bundle of an item's container.

use anyhow::{Context, Result};
use ferry_tests::by_hand::ByHand;
use serde_json::{Value, json};

use crate::bed::PLACE;
use crate::item::Item;

/// What containerd gives a container that asks for nothing.
const CAPABILITIES: [&str; 14] = [
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

/// Writes it.
pub(crate) fn write(hand: &ByHand<'_>, id: &str, item: Item) -> Result<()> {
    let bundle = hand.bundle(id, &["/ferry-survive", item.name])?;
    let config = hand.path(&bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
    let process = &mut spec["process"];
    process["terminal"] = json!(item.terminal);
    process["env"] = json!(["PATH=/bin", "SURVIVE=as it was"]);
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set] = json!(CAPABILITIES);
    }
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.push(json!({
        "destination": "/scratch",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", "size=64m", "mode=1777"],
    }));
    mounts.push(json!({
        "destination": "/bind",
        "type": "bind",
        "source": format!("{PLACE}/{id}/bind"),
        "options": ["rbind", "rw"],
    }));
    if item.limits {
        limit(&mut spec);
    }
    std::fs::write(config, spec.to_string()).context("write the bundle")
}

/// Gives it limits, and has it see its group.
pub(crate) fn limit(spec: &mut Value) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime"],
        }));
    }
    let resources = &mut spec["linux"]["resources"];
    resources["memory"] = json!({ "limit": 128 << 20 });
    resources["pids"] = json!({ "limit": 77 });
    resources["cpu"] = json!({ "shares": 512, "quota": 50_000 });
}
