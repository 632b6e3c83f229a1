//! The destination's rules: the address is silent, and packets for it wait in a queue.
//!
//! ```text
//!            for the address    from the address   ARP
//! new        queued             dropped            dropped
//! open       queued             pass               passes
//! pass       pass               pass               passes     the chains stay
//! remove     -                  -                  -          nothing is left
//! ```
//!
//! Without a reader the kernel drops what comes for a queue. Where it has no queues at all the
//! packets are dropped until [`Hold::open`].

use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::netlink::Socket;
use super::rules::{Script, Verdict};
use super::{Error, run, table};

/// What a packet that has met a rule just before it went may still need to reach the queue.
const LINGER: Duration = Duration::from_millis(20);
/// How long the queues of other migrations are waited for.
const OTHERS: Duration = Duration::from_secs(1);

/// What becomes of packets for the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// They wait in this queue.
    Queued(u16),
    /// They are dropped, and their senders repeat them: the kernel has no queues.
    Dropped,
}

/// The rules of one migration on its destination. They stay when this is dropped, as they must when
/// a process dies: [`super::clear`] removes them.
#[derive(Debug)]
pub struct Hold {
    socket: Socket,
    table: String,
    addresses: Vec<IpAddr>,
    verdict: Verdict,
}

impl Hold {
    /// Silences `addresses` and sends packets for them to `queue`, whose reader must be there
    /// already, or drops them (`None`). Rules of the same migration are replaced.
    ///
    /// # Errors
    /// When the kernel refuses; no rules are there then.
    pub fn new(migration: &str, addresses: &[IpAddr], queue: Option<u16>) -> Result<Self, Error> {
        let what = "silence the address";
        let socket = Socket::open().map_err(|source| Error { what, source })?;
        let table = table(migration);
        let ways = queue.map(|n| [Verdict::Queue(n), Verdict::Target(n)]);
        for verdict in ways.into_iter().flatten().chain([Verdict::Drop]) {
            let script = Script::new(&table).delete().create(addresses);
            match run(&socket, script.silence(addresses, verdict), what) {
                Ok(()) => {
                    return Ok(Self { socket, table, addresses: addresses.to_vec(), verdict });
                }
                Err(error) if verdict == Verdict::Drop => return Err(error),
                // The kernel lacks this way of queueing; a graver reason comes up again.
                Err(error) => log::debug!("{verdict:?}: {}", error.source),
            }
        }
        unreachable!("the last way either works or is an error")
    }

    /// What becomes of packets for the address.
    pub fn how(&self) -> How {
        match self.verdict {
            Verdict::Drop => How::Dropped,
            Verdict::Queue(number) | Verdict::Target(number) => How::Queued(number),
        }
    }

    /// Lets outgoing packets and ARP pass, and packets for the address too if they are not queued.
    /// To be called before the program runs, or it would see its packets refused, and after the
    /// address was announced: from now on this host answers for it.
    ///
    /// # Errors
    /// When the kernel refuses; everything is as before.
    pub fn open(&self) -> Result<(), Error> {
        let script = Script::new(&self.table);
        let script = match self.verdict {
            Verdict::Drop => script.pass(&self.addresses),
            Verdict::Queue(_) | Verdict::Target(_) => script.open(&self.addresses),
        };
        run(&self.socket, script, "open the address")
    }

    /// Lets everything pass. Packets that wait in the queue wait on.
    ///
    /// # Errors
    /// When the kernel refuses; everything is as before.
    pub fn pass(&self) -> Result<(), Error> {
        run(&self.socket, Script::new(&self.table).pass(&self.addresses), "let packets pass")
    }

    /// Removes all rules once no packet waits for one of them. The queue's reader must go on until
    /// this returns. Takes 20 ms, or up to a second while packets of other migrations wait, since
    /// removing a chain drops those.
    ///
    /// # Errors
    /// When the kernel refuses; [`super::clear`] may be tried.
    pub fn remove(self) -> Result<(), Error> {
        self.pass()?;
        sleep(LINGER);
        wait_for_others(OTHERS);
        run(&self.socket, Script::new(&self.table).delete(), "remove the rules of the address")
    }
}

/// Waits until no packet waits in any queue, but no longer than `limit`. Taking a chain away drops
/// those that do.
pub(super) fn wait_for_others(limit: Duration) {
    let start = Instant::now();
    while packets_wait() && start.elapsed() < limit {
        sleep(Duration::from_millis(1));
    }
}

/// Whether packets wait in any queue of this thread's network namespace.
fn packets_wait() -> bool {
    match std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue") {
        Ok(text) => waiting(&text),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                log::debug!("read the queues: {error}");
            }
            false
        }
    }
}

/// The third number of a line counts the packets that wait.
fn waiting(text: &str) -> bool {
    text.lines().any(|line| line.split_whitespace().nth(2).is_some_and(|count| count != "0"))
}

#[cfg(test)]
mod tests {
    use super::waiting;

    #[test]
    fn packets_wait_if_any_queue_has_some() {
        let idle = "    5  31180     0 1     0     0     0        0  1\n";
        assert!(!waiting(""));
        assert!(!waiting(idle));
        assert!(waiting(&format!("{idle}    6  31181     3 1     0     0     0        3  1\n")));
    }
}
