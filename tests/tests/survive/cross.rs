//! From one host to the other.

use std::process::Command;

use anyhow::{Context, Result};
use ferry_tests::by_hand::ByHand;

use crate::bed::PLACE;
use crate::container::{Container, Gone, images};

/// Checkpoints the container with exit, brings its images and what has changed of its root file
/// system to the host `to`, and restores it there.
pub(crate) fn cross(container: Container, to: &'static ByHand<'static>) -> Result<Container> {
    let gone = container.checkpoint()?;
    for folder in [images(&gone.id), format!("{PLACE}/{}", gone.id)] {
        carry(gone.hand, to, &folder).with_context(|| format!("carry {folder}"))?;
    }
    Gone { hand: to, ..gone }.restore()
}

/// Moves a folder to the same place on another host.
fn carry(from: &ByHand<'_>, to: &ByHand<'_>, folder: &str) -> Result<()> {
    to.host.run(&format!("rm -rf {folder}"))?;
    // With what an overlay marks its files with.
    let done = Command::new("cp")
        .args(["--archive", "--preserve=all"])
        .args([from.path(folder), to.path(folder)])
        .output()
        .context("copy it")?;
    anyhow::ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    from.host.run(&format!("rm -rf {folder}")).map(drop)
}
