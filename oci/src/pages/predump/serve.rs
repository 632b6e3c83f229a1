//! The process that tracks a container's writes from one pre-dump to the next.
//!
//! It is the shim's own program, started by the shim under the name [`NAME`]: a process that waits for
//! tracees by ptrace must not be the one that collects the container's exits. It reads an order from
//! each line of its standard input, and answers by a line. When the input ends it ends too, and with
//! it all tracking.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{PreDumpError, PreDumps, Report};
use crate::criu::{Hiding, find_library};

/// Name under which the program is run; its argument is the pid of init.
pub const NAME: &str = "ferry-predump";

/// What it is told to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// [`PreDumps::round`].
    Round {
        /// Folder that it makes.
        folder: PathBuf,
    },
    /// [`PreDumps::frozen`].
    Frozen {
        /// Folder of the dump.
        images: PathBuf,
        /// Folder of the orders for CRIU, which is made.
        hide: PathBuf,
    },
    /// [`PreDumps::finish`].
    Finish {
        /// Folder of the dump.
        images: PathBuf,
    },
}

/// What it answers: or why not, in words.
pub type Answer = Result<Report, String>;

/// Does what it is told, until its standard input ends.
///
/// # Errors
/// When it cannot track, read or answer.
pub fn serve() -> io::Result<()> {
    let init = std::env::args().nth(1).and_then(|pid| pid.parse().ok());
    let init = init.ok_or_else(|| io::Error::other("the pid of init is missing"))?;
    let mut dumps: Option<PreDumps> = None;
    for line in io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?)?;
        let answer: Answer = obey(&mut dumps, init, order).map_err(|error| describe(&error));
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &answer)?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

fn obey(dumps: &mut Option<PreDumps>, init: u32, order: Order) -> Result<Report, PreDumpError> {
    let dumps = match dumps {
        Some(dumps) => dumps,
        None => dumps.insert(PreDumps::attach(init)?),
    };
    match order {
        Order::Round { folder } => dumps.round(&folder),
        Order::Frozen { images, hide } => {
            let library = find_library().ok_or(PreDumpError::Order(
                "the library that hides memory is not installed beside the shim",
            ))?;
            dumps.frozen(&images, &Hiding::join(&hide, &library))
        }
        Order::Finish { images } => dumps.finish(&images).map(|()| Report::default()),
    }
}

/// The error with its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_answers_are_lines() {
        let order = Order::Frozen { images: "/a b".into(), hide: "/c\n".into() };
        let text = serde_json::to_string(&order).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(serde_json::from_str::<Order>(&text).unwrap(), order);
        let answer: Answer = Err("no\nway".into());
        let text = serde_json::to_string(&answer).unwrap();
        assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), answer);
    }
}
