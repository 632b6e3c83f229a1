//! The shim's log: containerd reads a FIFO in the bundle and copies it to its own log.

use anyhow::{Context as _, Result};
use containerd_shim::logger::FifoLogger;
use log::LevelFilter;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

/// The FIFO, in the bundle.
const FIFO: &str = "log";

/// Logs to containerd from now on. Opened for reading too and never waited for: a containerd that is
/// away or hangs must not hold up a container. What it does not take is lost.
pub(super) fn init(debug: bool) -> Result<()> {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(FIFO)
        .context("open the log")?;
    log::set_boxed_logger(Box::new(FifoLogger::with_file(fifo))).context("set the log up")?;
    // Nobody reads what is printed.
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    Ok(())
}
