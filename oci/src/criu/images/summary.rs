//! How a checkpoint was made, and what that took.

use super::super::ImageError;
use super::super::decode::{bare_records, fields, records};
use serde::Serialize;

pub(super) const INVENTORY_MAGIC: u32 = 0x5831_3116;
const STATS_MAGIC: u32 = 0x5709_3306;
const UTSNS_MAGIC: u32 = 0x5447_3203;

/// How a checkpoint was dumped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// Version of the images' format: 2 since CRIU 1.8.
    pub version: u32,
    /// `selinux` or `apparmor`, if one of them was in force; a restore needs it too.
    pub lsm: Option<&'static str>,
    /// TCP connections were closed, not kept.
    pub tcp_close: bool,
    /// CRIU's id of the dump, which names its firewall table.
    pub run_id: String,
    /// How CRIU silenced connections: a restore takes the same way.
    pub network_lock: &'static str,
}

impl Inventory {
    pub(super) fn parse(image: &[u8]) -> Result<Self, ImageError> {
        let mut records = bare_records(image, INVENTORY_MAGIC)?;
        let record = records.next().ok_or(ImageError::Format("an empty inventory"))??;
        let mut inventory = Self { network_lock: "iptables", ..Self::default() };
        for field in fields(record) {
            let field = field?;
            match field.number {
                1 => inventory.version = field.number32(),
                6 => {
                    inventory.lsm = match field.value {
                        1 => Some("selinux"),
                        2 => Some("apparmor"),
                        _ => None,
                    }
                }
                10 => inventory.tcp_close = field.value != 0,
                11 => {
                    inventory.network_lock = match field.value {
                        0 => "iptables",
                        1 => "nftables",
                        2 => "skip",
                        _ => "unknown",
                    }
                }
                13 => inventory.run_id = field.text(),
                _ => {}
            }
        }
        Ok(inventory)
    }
}

/// What a dump took, as CRIU has measured it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Until all tasks stood still, microseconds.
    pub freezing_us: u64,
    /// How long they did, microseconds.
    pub frozen_us: u64,
    /// Taking the memory, microseconds.
    pub memory_dump_us: u64,
    /// Writing it, microseconds.
    pub memory_write_us: u64,
    /// Pages that were looked at.
    pub pages_scanned: u64,
    /// Pages that an earlier dump has.
    pub pages_in_parent: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages left to a page daemon.
    pub pages_lazy: u64,
    /// Pages of shared memory written.
    pub shared_pages_written: u64,
}

impl Statistics {
    /// `None` for those of a restore.
    pub(super) fn parse(image: &[u8]) -> Result<Option<Self>, ImageError> {
        let mut records = records(image, STATS_MAGIC)?;
        let record = records.next().ok_or(ImageError::Format("empty statistics"))??;
        let mut found = None;
        for field in fields(record) {
            let field = field?;
            if field.number != 1 {
                continue;
            }
            let statistics = found.get_or_insert_with(Self::default);
            for field in fields(field.message()) {
                let field = field?;
                let place = match field.number {
                    1 => &mut statistics.freezing_us,
                    2 => &mut statistics.frozen_us,
                    3 => &mut statistics.memory_dump_us,
                    4 => &mut statistics.memory_write_us,
                    5 => &mut statistics.pages_scanned,
                    6 => &mut statistics.pages_in_parent,
                    7 => &mut statistics.pages_written,
                    9 => &mut statistics.pages_lazy,
                    14 => &mut statistics.shared_pages_written,
                    _ => continue,
                };
                *place = field.value;
            }
        }
        Ok(found)
    }
}

/// What a container calls itself.
pub(super) fn hostname(image: &[u8]) -> Result<String, ImageError> {
    let mut name = String::new();
    for record in records(image, UTSNS_MAGIC)? {
        for field in fields(record?) {
            let field = field?;
            if field.number == 1 {
                name = field.text();
            }
        }
    }
    Ok(name)
}
