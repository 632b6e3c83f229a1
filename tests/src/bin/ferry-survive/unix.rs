//! Unix sockets.

#![expect(unsafe_code, reason = "descriptors that are sent")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use crate::files::scratch;
use crate::sys;
use crate::turn::{Done, In, Turn, holds, same};

const UNIX: i32 = 1;
const SEQUENCED: i32 = 5;
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;

unsafe extern "C" {
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, both: *mut c_int) -> c_int;
    fn sendmsg(fd: c_int, message: *const Message, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, message: *mut Message, flags: c_int) -> isize;
}

/// Listeners by path and by abstract name, with a connection and data on its way; a datagram socket.
pub(crate) fn named(turn: &mut Turn) -> Done {
    let path = scratch("socket")?;
    let listener = UnixListener::bind(&path)?;
    let mut client = UnixStream::connect(&path)?;
    let (mut server, _) = listener.accept()?;
    let name = SocketAddr::from_abstract_name(format!("survive-{}", std::process::id()))?;
    let abstracts = UnixListener::bind_addr(&name)?;
    let datagrams = UnixDatagram::bind(scratch("datagrams")?)?;
    let sender = UnixDatagram::unbound()?;
    sender.connect(scratch("datagrams")?)?;
    client.write_all(b"to the server")?;
    server.write_all(b"to the client")?;
    sender.send(b"first")?;
    sender.send(b"second")?;
    if turn.pass()? {
        server.read_exact(&mut [0])?;
        client.write_all(b"?")?;
    }
    for socket in [&mut server, &mut client] {
        let mut data = [0; 13];
        socket.read_exact(&mut data).at("read from a connection")?;
        holds("the data is as it was", data.starts_with(b"to the "))?;
    }
    for expected in ["first", "second"] {
        let mut data = [0; 16];
        let length = datagrams.recv(&mut data)?;
        same("a datagram", &data[..length], expected.as_bytes())?;
    }
    let mut late = UnixStream::connect(&path).at("connect by path")?;
    late.write_all(b"x")?;
    let (mut accepted, _) = listener.accept()?;
    accepted.read_exact(&mut [0])?;
    UnixStream::connect_addr(&name).at("connect by name")?;
    abstracts.accept()?;
    drop(client);
    same("the end of a connection", server.read(&mut [0])?, 0)
}

/// Pairs of streams, datagrams and sequenced packets, with data, and one that is half closed.
pub(crate) fn pairs(turn: &mut Turn) -> Done {
    let (mut a, mut b) = UnixStream::pair()?;
    a.write_all(b"stream")?;
    a.shutdown(std::net::Shutdown::Write)?;
    let (c, d) = UnixDatagram::pair()?;
    c.send(b"one")?;
    c.send(b"three")?;
    let (mut e, mut f) = sequenced()?;
    e.write_all(b"packet")?;
    e.write_all(b"two")?;
    let (mut lonely, gone) = UnixStream::pair()?;
    drop(gone);
    if turn.pass()? {
        d.recv(&mut [0; 8])?;
        c.send(b"another")?;
    }
    let mut text = String::new();
    b.read_to_string(&mut text)?;
    same("the stream", text, "stream".to_owned())?;
    b.write_all(b"back")?;
    let mut back = [0; 4];
    a.read_exact(&mut back)?;
    same("the stream's other way", back, *b"back")?;
    // By the length of what comes: packets have borders.
    let mut data = [0; 16];
    same("datagrams", [d.recv(&mut data)?, d.recv(&mut data)?], [3, 5])?;
    same("packets", [f.read(&mut data)?, f.read(&mut data)?], [6, 3])?;
    same("one whose other end is closed", lonely.read(&mut data)?, 0)
}

fn sequenced() -> std::io::Result<(File, File)> {
    let mut both = [0; 2];
    // SAFETY: room for both.
    sys::check(unsafe { socketpair(UNIX, SEQUENCED, 0, both.as_mut_ptr()) })?;
    Ok((sys::made(both[0])?, sys::made(both[1])?))
}

/// msghdr of sendmsg(2).
#[repr(C)]
struct Message {
    name: *mut c_void,
    name_length: u32,
    parts: *mut [usize; 2],
    count: usize,
    control: *mut Control,
    control_length: usize,
    flags: c_int,
}

/// cmsghdr, and what it carries.
#[repr(C)]
struct Control {
    length: usize,
    level: c_int,
    kind: c_int,
    fd: c_int,
}

fn with_message<T>(byte: &mut u8, control: &mut Control, run: impl FnOnce(&mut Message) -> T) -> T {
    let mut part = [std::ptr::from_mut(byte).expose_provenance(), 1];
    run(&mut Message {
        name: std::ptr::null_mut(),
        name_length: 0,
        parts: &raw mut part,
        count: 1,
        control,
        control_length: size_of::<Control>(),
        flags: 0,
    })
}

/// A descriptor that was sent and not received.
pub(crate) fn descriptors(turn: &mut Turn) -> Done {
    let (a, b) = UnixStream::pair()?;
    let (mut from, to) = std::io::pipe()?;
    let mut control =
        Control { length: 20, level: SOL_SOCKET, kind: SCM_RIGHTS, fd: to.as_raw_fd() };
    // SAFETY: the message and all that it points to live until the call ends.
    let sent = with_message(&mut 9, &mut control, |m| unsafe { sendmsg(a.as_raw_fd(), m, 0) });
    same("what is sent", sent, 1)?;
    drop(to);
    if turn.pass()? {
        (&b).read_exact(&mut [0])?;
        (&a).write_all(&[9])?;
    }
    let (mut byte, mut control) = (0, Control { length: 0, level: 0, kind: 0, fd: -1 });
    // SAFETY: as above.
    let got = with_message(&mut byte, &mut control, |m| unsafe { recvmsg(b.as_raw_fd(), m, 0) });
    same("what is received", (got, byte), (1, 9))?;
    holds("a descriptor comes with it", control.kind == SCM_RIGHTS && control.fd >= 0)?;
    // SAFETY: just received, so nobody else's.
    let mut to = unsafe { File::from_raw_fd(control.fd) };
    to.write_all(b"through it")?;
    drop(to);
    let mut text = String::new();
    from.read_to_string(&mut text)?;
    same("what goes through it", text, "through it".to_owned())
}
