//! The client of the echo server.

use std::io::{self, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::Options;
use crate::client::{Connection, LOOK, fill, is_patient};
use crate::frame::{Frame, HEADER, Header, Seen, wrong};

/// After that a datagram is taken for lost.
const LOST: Duration = Duration::from_millis(200);

pub(crate) fn connect(address: &str, number: u32, options: &Options) -> io::Result<Echo> {
    let wire = if options.udp {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(LOOK))?;
        Wire::Udp(socket)
    } else {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK))?;
        Wire::Tcp(stream)
    };
    Ok(Echo { wire, number, size: options.size, sent: Seen::default(), resent: 0 })
}

enum Wire {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// One connection to the echo server.
pub(crate) struct Echo {
    wire: Wire,
    number: u32,
    size: usize,
    /// What the server must have seen by now.
    sent: Seen,
    resent: u64,
}

impl Connection for Echo {
    fn request(&mut self, n: u64) -> io::Result<()> {
        let request = Frame::request(self.number, n, self.size);
        self.sent.add(&request);
        let answer = match &mut self.wire {
            Wire::Tcp(stream) => exchange(stream, &request)?,
            Wire::Udp(socket) => exchange_datagrams(socket, &request, &mut self.resent)?,
        };
        let (got, wanted) = (answer.sequence, request.sequence);
        if got != wanted {
            return Err(wrong(&format!("answer to request {got} instead of {wanted}")));
        }
        if answer.payload != request.payload {
            return Err(wrong("the answer's payload is another"));
        }
        let seen = Seen { count: answer.count, digest: answer.digest };
        if seen != self.sent {
            let sent = self.sent;
            return Err(wrong(&format!("the server remembers {seen:x?}, it was sent {sent:x?}")));
        }
        Ok(())
    }

    fn local(&self) -> String {
        let address = match &self.wire {
            Wire::Tcp(stream) => stream.local_addr(),
            Wire::Udp(socket) => socket.local_addr(),
        };
        address.map_or_else(|e| e.to_string(), |address| address.to_string())
    }

    fn resent(&self) -> u64 {
        self.resent
    }
}

fn exchange(stream: &mut TcpStream, request: &Frame) -> io::Result<Frame> {
    stream.write_all(&request.encode())?;
    let mut header = [0; HEADER];
    fill(stream, &mut header)?;
    let parsed = Header::decode(&header)?;
    let mut payload = vec![0; parsed.length];
    fill(stream, &mut payload)?;
    parsed.with(&header, payload)
}

/// Sends a datagram until it is answered. Answers to earlier requests, which come when one was
/// sent twice, are passed over; so is that nobody listens for the moment.
fn exchange_datagrams(socket: &UdpSocket, request: &Frame, resent: &mut u64) -> io::Result<Frame> {
    let bytes = request.encode();
    let refused = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    let mut buffer = [0; 65536];
    let mut last: Option<Instant> = None;
    loop {
        if last.is_none_or(|time| time.elapsed() > LOST) {
            *resent += u64::from(last.is_some());
            last = Some(Instant::now());
            match socket.send(&bytes) {
                Err(e) if !refused(&e) => return Err(e),
                _ => {}
            }
        }
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let answer = Frame::decode(&buffer[..length])?;
                if answer.sequence >= request.sequence {
                    return Ok(answer);
                }
            }
            Err(e) if is_patient(&e) => {}
            Err(e) if refused(&e) => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
}
