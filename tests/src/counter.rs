//! A client that counts by one connection: each answer has to come before the next question is asked.

use anyhow::{Context, Result, ensure};

use crate::ctr::until;
use crate::{Host, Job};

/// Asks, with {} for the count, and prints the number in each answer.
const SCRIPT: &str = "import socket, sys
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))
server.settimeout(0.1)
# Asks every second whether the other end is there, also while it waits for an answer.
for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 100)):
    server.setsockopt(socket.IPPROTO_TCP, option, value)
server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
count = 0
while True:
    count += 1
    server.sendall(sys.argv[3].replace('{}', str(count)).encode() + b'\\r\\n')
    answer = b''
    while not answer.endswith(b'\\n'):
        try:
            part = server.recv(64)
            assert part, 'the server has ended'
            answer += part
        except TimeoutError:
            pass
    print(answer.decode().strip().lstrip(':'), flush=True)
";

/// The client.
pub struct Counter(Job);

impl Counter {
    /// Starts it on `client`, and waits until it counts. `question` is a line, with {} for the count; the
    /// answer has to be the count, after a colon or not.
    ///
    /// # Errors
    /// When it is not answered.
    pub fn start(client: &Host, server: &Host, port: u16, question: &str) -> Result<Self> {
        Self::start_at(client, &server.address().to_string(), port, question)
    }

    /// [`Self::start`] with any address of the server.
    ///
    /// # Errors
    /// When it is not answered.
    pub fn start_at(client: &Host, to: &str, port: u16, question: &str) -> Result<Self> {
        let script = client.root().join("tmp/counter.py");
        std::fs::write(script, SCRIPT).context("write the client")?;
        let job =
            client.spawn(&format!("exec python3 /tmp/counter.py {to} {port} '{question}'"))?;
        let mut counter = Self(job);
        counter.goes_on()?;
        Ok(counter)
    }

    /// Waits until it has counted on, and looks at all that it has counted.
    ///
    /// # Errors
    /// When it has ended, does not count, or an answer was lost or came twice.
    pub fn goes_on(&mut self) -> Result<()> {
        let before = self.counted()?;
        until("the client goes on", || {
            ensure!(!self.has_ended()?, "the client has ended: {}", self.stderr());
            Ok(self.counted()? > before + 20)
        })
    }

    /// Whether it has ended: its connection was lost.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.0.ended()
    }

    /// What it says of its end.
    pub fn stderr(&self) -> String {
        self.0.stderr()
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(self) -> Result<()> {
        self.0.stop().map(drop)
    }

    fn counted(&self) -> Result<usize> {
        // The last line may be on its way.
        let text = self.0.stdout();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.enumerate().try_fold(0, |_, (n, line)| {
            ensure!(line.trim() == (n + 1).to_string(), "answer {} is {line:?}", n + 1);
            Ok(n + 1)
        })
    }
}
