//! The moment in which the item has to survive, and what is said before and after it.
//!
//! Files in a folder carry the words, since nothing of them is there during a checkpoint:
//!
//! ```text
//! ready    how the two controls went; the item is set up
//! ask      made by the test after the restore; taken away
//! answer   ok, or wrong: what
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Where the files are.
pub(crate) const FOLDER: &str = "/ctl";
const TICK: Duration = Duration::from_millis(10);

/// What is wrong with an item.
pub(crate) struct Wrong(pub(crate) String);

/// Whether an item is as it was.
pub(crate) type Done = Result<(), Wrong>;

impl From<io::Error> for Wrong {
    fn from(err: io::Error) -> Self {
        Self(err.to_string())
    }
}

impl From<String> for Wrong {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Wrong, unless both are the same.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, now: T, was: T) -> Done {
    if now == was { Ok(()) } else { Err(Wrong(format!("{what} is {now:?} and was {was:?}"))) }
}

/// Wrong, unless it holds.
pub(crate) fn holds(what: &str, found: bool) -> Done {
    if found { Ok(()) } else { Err(Wrong(format!("not so: {what}"))) }
}

/// Says what was done when something went wrong.
pub(crate) trait In<T> {
    fn at(self, what: &str) -> Result<T, Wrong>;
}

impl<T, E: Into<Wrong>> In<T> for Result<T, E> {
    fn at(self, what: &str) -> Result<T, Wrong> {
        self.map_err(|err| Wrong(format!("{what}: {}", err.into().0)))
    }
}

/// What comes between the item's beginning and the look at it.
pub(crate) enum Turn {
    /// A checkpoint and a restore. How the controls went, until that has been said.
    Checkpoint { controls: Option<String>, passed: bool },
    /// Nothing.
    Nothing,
    /// A small change by the item itself.
    Change,
}

impl Turn {
    /// Passes the moment. Whether the item has to change something now.
    pub(crate) fn pass(&mut self) -> io::Result<bool> {
        match self {
            Self::Nothing => Ok(false),
            Self::Change => Ok(true),
            Self::Checkpoint { controls, passed } => {
                match controls.take() {
                    Some(controls) => say("ready", &controls)?,
                    None => say("answer", "ok")?,
                }
                *passed = true;
                wait_for_question()?;
                Ok(false)
            }
        }
    }

    /// Whether the item is looked at again and again.
    pub(crate) fn goes_on(&self) -> bool {
        matches!(self, Self::Checkpoint { .. })
    }

    /// Whether this is a control: the processes that the item has started go with it.
    pub(crate) fn is_control(&self) -> bool {
        !self.goes_on()
    }
}

/// Writes a file that is there as a whole or not at all.
pub(crate) fn say(name: &str, text: &str) -> io::Result<()> {
    let new = path(&format!("{name}.new"));
    fs::write(&new, text)?;
    fs::rename(&new, path(name))
}

fn wait_for_question() -> io::Result<()> {
    let ask = path("ask");
    while !ask.exists() {
        sleep(TICK);
    }
    fs::remove_file(ask)
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}
