//! The server: answers TCP and UDP on one port.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use crate::frame::{Frame, HEADER, Header, Seen, wrong};
use crate::{Options, stop};

pub(crate) fn run(options: &Options) -> Result<(), String> {
    let address = (options.bind.as_str(), options.port);
    let listener = TcpListener::bind(address).map_err(|e| format!("listen on {address:?}: {e}"))?;
    let socket = UdpSocket::bind(address).map_err(|e| format!("bind {address:?}: {e}"))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let peer = stream.peer_addr();
                if let Err(e) = serve(stream) {
                    eprintln!("connection of {peer:?}: {e}");
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut seen = HashMap::new();
        loop {
            if let Err(e) = serve_datagram(&socket, &mut seen) {
                eprintln!("datagram: {e}");
            }
        }
    });
    println!("ready");
    while !stop::now() {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Serves one connection until its client is done. Anything unexpected ends it.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut seen = Seen::default();
    loop {
        let mut header = [0; HEADER];
        if stream.read(&mut header[..1])? == 0 {
            return Ok(());
        }
        stream.read_exact(&mut header[1..])?;
        let parsed = Header::decode(&header)?;
        let mut payload = vec![0; parsed.length];
        stream.read_exact(&mut payload)?;
        let frame = parsed.with(&header, payload)?;
        if frame.sequence != seen.count + 1 {
            return Err(wrong(&format!("message {} after {}", frame.sequence, seen.count)));
        }
        seen.add(&frame);
        stream.write_all(&answer(frame, seen))?;
    }
}

/// Answers one datagram. A repeated one is answered again but counts once.
fn serve_datagram(socket: &UdpSocket, peers: &mut HashMap<SocketAddr, Seen>) -> io::Result<()> {
    let mut buffer = [0; 65536];
    let (length, peer) = socket.recv_from(&mut buffer)?;
    let frame = Frame::decode(&buffer[..length])?;
    let seen = peers.entry(peer).or_default();
    if frame.sequence == 1 && seen.count > 1 {
        *seen = Seen::default();
    }
    if frame.sequence == seen.count + 1 {
        seen.add(&frame);
    }
    let answer = answer(frame, *seen);
    socket.send_to(&answer, peer)?;
    Ok(())
}

fn answer(request: Frame, seen: Seen) -> Vec<u8> {
    Frame { count: seen.count, digest: seen.digest, ..request }.encode()
}
