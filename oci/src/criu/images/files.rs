//! Open files: what they are, and who has them under which number.

use super::super::ImageError;
use super::super::decode::{fields, records};
use serde::Serialize;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(super) const FILES_MAGIC: u32 = 0x5630_3138;
const FDINFO_MAGIC: u32 = 0x5621_3732;

/// A file that a process has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenFile {
    /// Its number.
    pub fd: u32,
    /// What it is.
    #[serde(flatten)]
    pub file: File,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum File {
    /// A file, folder or device.
    File {
        /// Its path in the container.
        path: String,
        /// Where it is read or written next, bytes.
        position: u64,
        /// `r`, `w` or `rw`.
        access: &'static str,
    },
    /// A pipe.
    Pipe {
        /// Both ends have the same number.
        pipe: u32,
        /// `r` or `w`.
        access: &'static str,
    },
    /// A TCP, UDP or raw socket.
    Inet {
        /// `tcp`, `udp` or another protocol's number.
        protocol: String,
        /// Its own end.
        local: SocketAddr,
        /// Its peer; the port is 0 where there is none.
        remote: SocketAddr,
        /// `listening`, `connected` or empty.
        state: &'static str,
    },
    /// A Unix socket.
    Unix {
        /// Its name; one with `@` before it is in no folder. Empty if it has none.
        path: String,
        /// `listening`, `connected` or empty.
        state: &'static str,
        /// Its number, by which its peer names it.
        inode: u32,
        /// Its peer's number, 0 for none.
        peer: u32,
    },
    /// Another kind.
    Other {
        /// Its name: `fifo`, `eventfd`, `epoll`, `tty`, ...
        what: &'static str,
    },
    /// One that the images do not describe.
    Unknown,
}

impl File {
    /// How much memory one takes.
    fn bytes(&self) -> usize {
        size_of::<OpenFile>()
            + match self {
                Self::File { path, .. } | Self::Unix { path, .. } => path.len(),
                _ => 0,
            }
    }
}

/// All files, by number.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<u32, File>);

impl Table {
    /// Path of file `id`; empty if it has none.
    pub(super) fn name(&self, id: u32) -> String {
        match self.0.get(&id) {
            Some(File::File { path, .. }) => path.clone(),
            _ => String::new(),
        }
    }
}

/// Names of the kinds, by CRIU's number.
const KINDS: [&str; 21] = [
    "unknown",
    "file",
    "pipe",
    "fifo",
    "inet",
    "unix",
    "eventfd",
    "epoll",
    "inotify",
    "signalfd",
    "packet",
    "tty",
    "fanotify",
    "netlink",
    "namespace",
    "tun",
    "external",
    "timerfd",
    "memfd",
    "bpfmap",
    "pidfd",
];

pub(super) fn table(image: &[u8]) -> Result<Table, ImageError> {
    let mut table = Table::default();
    for record in records(image, FILES_MAGIC)? {
        let (mut id, mut kind, mut file) = (0, 0, None);
        for field in fields(record?) {
            let field = field?;
            match field.number {
                1 => kind = usize::try_from(field.value).unwrap_or(usize::MAX),
                2 => id = field.number32(),
                3 => file = Some(regular(field.message())?),
                4 => file = Some(inet(field.message())?),
                16 => file = Some(unix(field.message())?),
                18 => file = Some(pipe(field.message())?),
                _ => {}
            }
        }
        let what = KINDS.get(kind).copied().unwrap_or("unknown");
        table.0.insert(id, file.unwrap_or(File::Other { what }));
    }
    Ok(table)
}

/// Numbers of the namespaces that are open.
pub(super) fn namespaces(image: &[u8]) -> Result<Vec<u32>, ImageError> {
    let mut found = Vec::new();
    for record in records(image, FILES_MAGIC)? {
        for field in fields(record?) {
            let field = field?;
            if field.number != 5 {
                continue;
            }
            let mut id = 0;
            for field in fields(field.message()) {
                let field = field?;
                if field.number == 2 {
                    id = field.number32();
                }
            }
            found.push(id);
        }
    }
    Ok(found)
}

/// The open files of an fdinfo image. What they take, roughly, is subtracted from `room`.
pub(super) fn open(
    image: &[u8],
    table: &Table,
    room: &mut usize,
) -> Result<Vec<OpenFile>, ImageError> {
    let mut files = Vec::new();
    for record in records(image, FDINFO_MAGIC)? {
        let (mut id, mut fd) = (0, 0);
        for field in fields(record?) {
            let field = field?;
            match field.number {
                1 => id = field.number32(),
                4 => fd = field.number32(),
                _ => {}
            }
        }
        let file = table.0.get(&id).unwrap_or(&File::Unknown);
        let left = room.checked_sub(file.bytes());
        *room = left.ok_or(ImageError::Format("more open files than anybody has"))?;
        files.push(OpenFile { fd, file: file.clone() });
    }
    files.sort_by_key(|file| file.fd);
    Ok(files)
}

/// A path that is not longer than the kernel lets one be.
fn short(path: String) -> Result<String, ImageError> {
    if path.len() > 3 * libc::PATH_MAX as usize {
        return Err(ImageError::Format("a path is longer than paths can be"));
    }
    Ok(path)
}

fn access(flags: u32) -> &'static str {
    match flags & 3 {
        0 => "r",
        1 => "w",
        _ => "rw",
    }
}

fn regular(message: &[u8]) -> Result<File, ImageError> {
    let (mut path, mut position, mut flags) = (String::new(), 0, 0);
    for field in fields(message) {
        let field = field?;
        match field.number {
            2 => flags = field.number32(),
            3 => position = field.value,
            6 => path = short(field.text())?,
            _ => {}
        }
    }
    Ok(File::File { path, position, access: access(flags) })
}

fn pipe(message: &[u8]) -> Result<File, ImageError> {
    let (mut pipe, mut flags) = (0, 0);
    for field in fields(message) {
        let field = field?;
        match field.number {
            2 => pipe = field.number32(),
            3 => flags = field.number32(),
            _ => {}
        }
    }
    Ok(File::Pipe { pipe, access: access(flags) })
}

const STREAM: u32 = 1;
const TCP: u32 = 6;
const UDP: u32 = 17;
const ESTABLISHED: u32 = 1;
const CLOSED: u32 = 7;
const LISTENING: u32 = 10;

fn inet(message: &[u8]) -> Result<File, ImageError> {
    let (mut protocol, mut state, mut ports) = (0, 0, (0, 0));
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for field in fields(message) {
        let field = field?;
        match field.number {
            5 => protocol = field.number32(),
            6 => state = field.number32(),
            7 => ports.0 = field.number32(),
            8 => ports.1 = field.number32(),
            11 => field.numbers(&mut own)?,
            12 => field.numbers(&mut peer)?,
            _ => {}
        }
    }
    let state = match (protocol, state) {
        (TCP, LISTENING) => "listening",
        (TCP, CLOSED) => "",
        (TCP, _) | (_, ESTABLISHED) => "connected",
        _ => "",
    };
    let protocol = match protocol {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        other => format!("ip protocol {other}"),
    };
    let (local, remote) = (address(&own, ports.0), address(&peer, ports.1));
    Ok(File::Inet { protocol, local, remote, state })
}

/// An address as the kernel has it, in words of which each has the order of bytes of the network.
fn address(words: &[u32], port: u32) -> SocketAddr {
    let bytes: Vec<u8> = words.iter().take(4).flat_map(|word| word.to_le_bytes()).collect();
    let ip = match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(bytes) => IpAddr::V6(Ipv6Addr::from(bytes)),
        Err(_) => {
            let first = bytes.first_chunk().copied().unwrap_or_default();
            IpAddr::V4(Ipv4Addr::from(first))
        }
    };
    SocketAddr::new(ip, port as u16)
}

fn unix(message: &[u8]) -> Result<File, ImageError> {
    let (mut path, mut kind, mut raw, mut inode, mut peer) = (String::new(), 0, 0, 0, 0);
    for field in fields(message) {
        let field = field?;
        match field.number {
            2 => inode = field.number32(),
            3 => kind = field.number32(),
            4 => raw = field.number32(),
            8 => peer = field.number32(),
            11 => path = short(name(field.message()))?,
            _ => {}
        }
    }
    let state = match raw {
        LISTENING => "listening",
        _ if peer != 0 => "connected",
        // Connected to one that is not in the container.
        ESTABLISHED if kind == STREAM => "connected",
        _ => "",
    };
    Ok(File::Unix { path, state, inode, peer })
}

/// A name that begins with a zero byte is in no folder.
fn name(bytes: &[u8]) -> String {
    let (sign, rest) = match bytes.split_first() {
        Some((0, rest)) => ("@", rest),
        _ => ("", bytes),
    };
    let rest = rest.strip_suffix(&[0]).unwrap_or(rest);
    format!("{sign}{}", String::from_utf8_lossy(rest))
}
