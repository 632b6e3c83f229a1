//! The processes.

use super::super::decode::{fields, records};
use super::super::{ImageError, Pagemap};
use super::files::{self, OpenFile, Table};
use super::memory::{Memory, Mm, words};
use super::{CORE_MAGIC, MOST_FILE_BYTES, ReadError, Source, Span, image, must};
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};

const PSTREE_MAGIC: u32 = 0x5027_3030;
pub(super) const IDS_MAGIC: u32 = 0x5443_2030;
/// Bytes of all command lines together, for the rest there are only names.
const MOST_COMMANDS: usize = 16 << 20;

/// A process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its number in its container.
    pub pid: u32,
    /// Its parent's.
    pub ppid: u32,
    /// Its process group.
    pub pgid: u32,
    /// Its session.
    pub sid: u32,
    /// How many threads it has.
    pub threads: usize,
    /// `running`, `stopped`, `zombie` or `unknown`.
    pub state: &'static str,
    /// Its short name.
    pub name: String,
    /// Its command line; empty if that is not in the images.
    pub command: Vec<String>,
    /// Its program's file.
    pub exe: String,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// `strict` or `filter`, if its system calls are restricted.
    pub seccomp: Option<&'static str>,
    /// Its profile of AppArmor or label of SELinux, if it has one.
    pub lsm_profile: String,
    /// Its memory.
    pub memory: Memory,
    /// Its open files.
    pub files: Vec<OpenFile>,
}

/// The tree, without what other images say.
pub(super) fn tree(image: &[u8]) -> Result<Vec<Process>, ImageError> {
    let mut tree = Vec::new();
    let mut pids = HashSet::new();
    for record in records(image, PSTREE_MAGIC)? {
        let mut process = Process { state: "unknown", ..Process::default() };
        for field in fields(record?) {
            let field = field?;
            match field.number {
                1 => process.pid = field.number32(),
                2 => process.ppid = field.number32(),
                3 => process.pgid = field.number32(),
                4 => process.sid = field.number32(),
                5 => {
                    let mut threads = Vec::new();
                    field.numbers(&mut threads)?;
                    process.threads += threads.len();
                }
                _ => {}
            }
        }
        if !pids.insert(process.pid) {
            return Err(ImageError::Format("a process is there twice"));
        }
        tree.push(process);
    }
    Ok(tree)
}

/// Completes the processes of `tree`.
pub(super) fn read(
    source: &mut dyn Source,
    mut tree: Vec<Process>,
    table: &Table,
) -> Result<Vec<Process>, ReadError> {
    let mut commands = Commands::default();
    let mut room = MOST_FILE_BYTES;
    for (index, process) in tree.iter_mut().enumerate() {
        let pid = process.pid;
        let ids = must(source, &format!("core-{pid}.img"), |image| core(image, process))?;
        // A process that has ended has neither memory nor files.
        if let Some(mm) = image(source, &format!("mm-{pid}.img"), Mm::parse)? {
            let pagemap = image(source, &format!("pagemap-{pid}.img"), Pagemap::parse)?;
            let pagemap = pagemap.unwrap_or_default();
            process.memory = mm.memory(&pagemap);
            process.exe = table.name(mm.exe);
            commands.add(index, mm.command(&pagemap));
        }
        let ids = image(source, &format!("ids-{pid}.img"), ids_image)?.unwrap_or(ids);
        let name = format!("fdinfo-{}.img", if ids == 0 { pid } else { ids });
        let open = image(source, &name, |image| files::open(image, table, &mut room))?;
        process.files = open.unwrap_or_default();
    }
    let read = source.pages(&commands.spans);
    let parts = read.map_err(|err| ReadError::Io("the pages images".to_owned(), err))?;
    for (index, bytes) in commands.join(parts) {
        tree[index].command = words(&bytes);
    }
    Ok(tree)
}

/// Where the command lines are.
#[derive(Default)]
struct Commands {
    spans: Vec<Span>,
    /// For each span, the process in the tree.
    of: Vec<usize>,
    bytes: usize,
}

impl Commands {
    fn add(&mut self, index: usize, spans: Vec<Span>) {
        let bytes: usize = spans.iter().map(|span| span.length).sum();
        if self.bytes + bytes > MOST_COMMANDS {
            return;
        }
        self.bytes += bytes;
        self.of.extend(std::iter::repeat_n(index, spans.len()));
        self.spans.extend(spans);
    }

    /// The bytes of each process, of those of which all parts were found.
    fn join(&self, parts: Vec<Vec<u8>>) -> BTreeMap<usize, Vec<u8>> {
        let mut all: BTreeMap<usize, Option<Vec<u8>>> = BTreeMap::new();
        for ((index, span), part) in self.of.iter().zip(&self.spans).zip(parts) {
            let bytes = all.entry(*index).or_insert_with(|| Some(Vec::new()));
            if part.len() == span.length {
                bytes.iter_mut().for_each(|bytes| bytes.extend(&part));
            } else {
                *bytes = None;
            }
        }
        all.into_iter().filter_map(|(index, bytes)| Some((index, bytes?))).collect()
    }
}

/// Reads a core image into `process`; the number of its open files.
fn core(image: &[u8], process: &mut Process) -> Result<u32, ImageError> {
    let mut records = records(image, CORE_MAGIC)?;
    let record = records.next().ok_or(ImageError::Format("an empty core image"))??;
    let mut ids = 0;
    for field in fields(record) {
        let field = field?;
        match field.number {
            3 => task(field.message(), process)?,
            4 => ids = files_id(field.message())?,
            5 => thread(field.message(), process)?,
            _ => {}
        }
    }
    Ok(ids)
}

fn task(message: &[u8], process: &mut Process) -> Result<(), ImageError> {
    for field in fields(message) {
        let field = field?;
        match field.number {
            1 => {
                process.state = match field.value {
                    1 => "running",
                    2 | 6 => "zombie",
                    3 => "stopped",
                    _ => "unknown",
                }
            }
            6 => process.name = field.text(),
            11 => process.seccomp = process.seccomp.or(seccomp(field.value)),
            _ => {}
        }
    }
    Ok(())
}

fn thread(message: &[u8], process: &mut Process) -> Result<(), ImageError> {
    for field in fields(message) {
        let field = field?;
        match field.number {
            10 => {
                for field in fields(field.message()) {
                    let field = field?;
                    match field.number {
                        1 => process.uid = field.number32(),
                        2 => process.gid = field.number32(),
                        15 => process.lsm_profile = field.text(),
                        _ => {}
                    }
                }
            }
            11 => process.seccomp = seccomp(field.value),
            _ => {}
        }
    }
    Ok(())
}

fn seccomp(mode: u64) -> Option<&'static str> {
    match mode {
        1 => Some("strict"),
        2 => Some("filter"),
        _ => None,
    }
}

fn ids_image(image: &[u8]) -> Result<u32, ImageError> {
    let mut records = records(image, IDS_MAGIC)?;
    files_id(records.next().ok_or(ImageError::Format("an empty ids image"))??)
}

fn files_id(message: &[u8]) -> Result<u32, ImageError> {
    let mut id = 0;
    for field in fields(message) {
        let field = field?;
        if field.number == 2 {
            id = field.number32();
        }
    }
    Ok(id)
}
