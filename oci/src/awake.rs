//! Keeps idle processors from sleeping while a pause lasts.
//!
//! A pause is a chain of processes that wake each other some hundred times. A processor that
//! sleeps takes 50 us and more to be woken, above all in a virtual machine, where it goes back to the
//! hypervisor meanwhile. The kernel's interface for that is a latency that is asked for as long as a
//! file stays open (`Documentation/power/pm_qos_interface.rst`).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// Latency of the processors, microseconds, as a number of four bytes.
const FILE: &str = "/dev/cpu_dma_latency";

/// Processors that stay awake as long as this lives.
#[derive(Debug)]
pub struct Awake {
    _request: File,
}

impl Awake {
    /// From now on idle processors poll. It costs their power; no other process gets less.
    ///
    /// # Errors
    /// When the kernel has no such interface, or another user's rules do not allow it.
    pub fn keep() -> io::Result<Self> {
        let mut request = OpenOptions::new().write(true).open(FILE)?;
        request.write_all(&0_i32.to_ne_bytes())?;
        Ok(Self { _request: request })
    }

    /// Whether [`Awake::keep`] can work here. Asks for nothing.
    pub fn is_possible() -> bool {
        OpenOptions::new().read(true).open(FILE).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_latency_asked_for_is_none_as_long_as_it_lives() {
        // Who reads gets the least latency that anybody has asked for.
        let latency = || {
            let mut bytes = [0; 4];
            File::open(FILE)?.read_exact(&mut bytes)?;
            io::Result::Ok(i32::from_ne_bytes(bytes))
        };
        if !Awake::is_possible() {
            println!("skipped: idle processors stay awake: there is no {FILE} here");
            return;
        }
        let awake = Awake::keep().unwrap();
        assert_eq!(latency().unwrap(), 0);
        drop(awake);
        assert!(latency().unwrap() > 0, "somebody else asks for it too?");
    }
}
