//! Packets for an address that is on its way here wait instead of being lost.
//!
//! ```text
//!             packets for the address         the address' own packets
//! start       wait in the kernel's queue      dropped, ARP too
//! open        wait                            pass: the program is about to run
//! release     those that wait go on in        pass
//!             their order, later ones pass
//! finish      pass, nothing is left behind    pass
//! ```
//!
//! A packet that is dropped comes again only when its sender's timer is up, 200 ms or more after
//! it: that would be the pause that a client sees, whatever the real one is. If the reader dies
//! before the release, the kernel drops what waits and what comes, as if there were no queue. After
//! it packets no longer come by the queue.

mod nfqueue;
mod reader;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::time::SystemTime;

use anyhow::{Context, Result};
use ferry_oci::quarantine::{Hold, How};

use nfqueue::{Queue, Verdict};
use reader::Reader;

/// Addresses whose packets are held. Dropping it drops those packets and leaves the rules: the
/// address stays silent until `ferry_oci::quarantine::clear`.
///
/// All of it blocks, [`Held::finish`] for 20 ms or more and the rest for well under a millisecond.
#[derive(Debug)]
pub(crate) struct Held {
    hold: Hold,
    /// None where packets are dropped.
    reader: Option<Reader>,
}

impl Held {
    /// Silences `addresses` for `migration` and holds packets for them, in this thread's network
    /// namespace. Without `queue`, or where the kernel has none, they are dropped; [`Held::how`] tells.
    ///
    /// # Errors
    /// When the kernel refuses the rules; none are there then.
    pub(crate) fn start(migration: &str, addresses: &[IpAddr], queue: bool) -> Result<Self> {
        // A rule without a reader drops, so the reader is there first.
        let reader = match queue.then(|| Queue::take(seed())).transpose() {
            Ok(None) => None,
            Ok(Some(queue)) => {
                let number = queue.number();
                Some((number, Reader::start(queue)?))
            }
            Err(error) => {
                log::debug!("no queue for packets: {error}");
                None
            }
        };
        let number = reader.as_ref().map(|(number, _)| *number);
        let hold = Hold::new(migration, addresses, number)?;
        let queued = matches!(hold.how(), How::Queued(_));
        Ok(Self { hold, reader: reader.map(|(_, reader)| reader).filter(|_| queued) })
    }

    /// What becomes of packets for the addresses.
    pub(crate) fn how(&self) -> How {
        self.hold.how()
    }

    /// How many packets have come by the queue.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.reader.as_ref().map_or(0, Reader::count)
    }

    /// Lets the addresses' own packets and ARP pass. Before the program runs, or it would see them
    /// refused; after the addresses were announced, since from now on this host answers for them.
    ///
    /// # Errors
    /// When the kernel refuses; everything is as before.
    pub(crate) fn open(&self) -> Result<()> {
        Ok(self.hold.open()?)
    }

    /// Lets packets that wait go on, in their order, and then all others pass without the queue.
    /// To be called the moment the sockets are there. Returns how many had waited.
    ///
    /// # Errors
    /// When the kernel refuses; [`Held::finish`] may be tried.
    pub(crate) fn release(&self) -> Result<u64> {
        let count = match &self.reader {
            Some(reader) => reader.decide(Verdict::Accept).context("let held packets through")?,
            None => 0,
        };
        self.hold.pass()?;
        Ok(count)
    }

    /// Drops packets that wait and those that come. The rules stay. Returns how many had waited.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn drop_all(&self) -> Result<u64> {
        match &self.reader {
            Some(reader) => reader.decide(Verdict::Drop).context("drop held packets"),
            None => Ok(0),
        }
    }

    /// Removes all rules and closes the queue, without losing a packet that is on its way through
    /// it. Takes 20 ms, or up to a second while packets of other migrations wait.
    ///
    /// # Errors
    /// When the kernel refuses; `ferry_oci::quarantine::clear` may be tried.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { hold, reader } = self;
        if let Some(reader) = &reader {
            reader.decide(Verdict::Accept).context("let held packets through")?;
        }
        Ok(hold.remove()?)
    }
}

/// Some number: two agents that start at once begin to look for a free queue at different ones.
fn seed() -> u16 {
    let time = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    (time.subsec_nanos() ^ std::process::id()) as u16
}
