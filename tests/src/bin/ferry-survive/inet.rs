//! TCP and UDP, between two sockets of the item on the container's loopback device.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const HERE: &str = "127.0.0.1:0";
const PATIENCE: Option<Duration> = Some(Duration::from_secs(5));

/// More than one packet, less than the buffers hold.
fn data(seed: usize) -> Vec<u8> {
    (0..50_000).map(|n| sys::byte(seed, n)).collect()
}

/// A listener and both ends of a connection.
fn connection() -> Result<(TcpListener, TcpStream, TcpStream), Wrong> {
    let listener = TcpListener::bind(HERE).at("listen")?;
    let client = TcpStream::connect(listener.local_addr()?).at("connect")?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(PATIENCE)?;
    }
    Ok((listener, client, server))
}

fn comes(from: &mut TcpStream, seed: usize) -> Done {
    let mut found = vec![0; data(seed).len()];
    from.read_exact(&mut found).at("read what was on its way")?;
    holds("the data is as it was", found == data(seed))
}

/// With data in both directions, options, and addresses.
pub(crate) fn established(turn: &mut Turn) -> Done {
    let (_listener, mut client, mut server) = connection()?;
    client.set_nodelay(true)?;
    client.set_ttl(33)?;
    let options =
        |s: &TcpStream| Ok::<_, Wrong>((s.nodelay()?, s.ttl()?, s.local_addr()?, s.peer_addr()?));
    let was = options(&client)?;
    client.write_all(&data(6))?;
    server.write_all(&data(7))?;
    if turn.pass()? {
        server.read_exact(&mut [0])?;
    }
    same("the options and addresses", options(&client)?, was)?;
    comes(&mut server, 6)?;
    comes(&mut client, 7)?;
    client.write_all(&data(8))?;
    comes(&mut server, 8)?;
    drop(client);
    same("the end", server.read(&mut [0])?, 0)
}

pub(crate) fn listening(turn: &mut Turn) -> Done {
    let listener = TcpListener::bind(HERE)?;
    let six = TcpListener::bind("[::1]:0").or_else(|_| TcpListener::bind(HERE))?;
    let was = [listener.local_addr()?, six.local_addr()?];
    // One that the kernel has accepted and the program has not: it would be lost.
    let spoiled = turn.pass()?;
    let address = if spoiled { TcpListener::bind(HERE)?.local_addr()? } else { was[0] };
    same("the addresses", [listener.local_addr()?, six.local_addr()?], was)?;
    for (listener, address) in [(&listener, address), (&six, was[1])] {
        let mut client = TcpStream::connect(address).at("connect")?;
        let (mut server, _) = listener.accept()?;
        client.write_all(b"x")?;
        server.read_exact(&mut [0])?;
    }
    Ok(())
}

/// Each of two connections is closed in one direction, with data before the end that is not read yet.
pub(crate) fn half_closed(turn: &mut Turn) -> Done {
    let (_first, mut client, mut server) = connection()?;
    client.write_all(&data(9))?;
    client.shutdown(Shutdown::Write)?;
    let (_second, mut other_client, mut other_server) = connection()?;
    other_server.write_all(&data(10))?;
    other_server.shutdown(Shutdown::Write)?;
    // The other end has the end too before the moment comes.
    std::thread::sleep(Duration::from_millis(50));
    if turn.pass()? {
        server.shutdown(Shutdown::Write)?;
    }
    for (closed, open, seed) in
        [(&mut client, &mut server, 9), (&mut other_server, &mut other_client, 10)]
    {
        comes(open, seed)?;
        same("the end", open.read(&mut [0])?, 0)?;
        open.write_all(b"still").at("write to one that has ended")?;
        let mut still = [0; 5];
        closed.read_exact(&mut still).at("read the open direction")?;
        same("the open direction", still, *b"still")?;
        holds("the closed direction is closed", closed.write_all(b"x").is_err())?;
    }
    Ok(())
}

fn bound() -> Result<UdpSocket, Wrong> {
    let socket = UdpSocket::bind(HERE).at("bind")?;
    socket.set_read_timeout(PATIENCE)?;
    Ok(socket)
}

/// Bound, connected, with options; datagrams go both ways.
pub(crate) fn udp(turn: &mut Turn) -> Done {
    let (a, b) = (bound()?, bound()?);
    a.connect(b.local_addr()?)?;
    a.set_broadcast(true)?;
    let addresses =
        || Ok::<_, Wrong>((a.local_addr()?, a.peer_addr()?, b.local_addr()?, a.broadcast()?));
    let was = addresses()?;
    if turn.pass()? {
        a.set_broadcast(false)?;
    }
    same("the addresses and options", addresses()?, was)?;
    let mut data = [0; 16];
    a.send(b"there")?;
    let (length, from) = b.recv_from(&mut data)?;
    same("a datagram", (&data[..length], from), (&b"there"[..], was.0))?;
    b.send_to(b"back", from)?;
    same("the answer's length", a.recv(&mut data)?, 4)
}

/// A datagram that nobody has read. UDP may lose it.
pub(crate) fn udp_queue(turn: &mut Turn) -> Done {
    let (a, b) = (bound()?, bound()?);
    a.send_to(b"waits", b.local_addr()?)?;
    let mut data = [0; 16];
    if turn.pass()? {
        b.recv(&mut data)?;
    }
    b.set_read_timeout(Some(Duration::from_millis(500)))?;
    same("the datagram's length", b.recv(&mut data).at("read it")?, 5)
}
