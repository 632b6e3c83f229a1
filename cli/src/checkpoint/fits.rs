//! Whether a checkpoint's processes can run here at all: a program does not ask again what its processor can
//! do, and would be killed after the restore.

use anyhow::{Result, ensure};

use super::format::Summary;
use crate::describe::checks::version;
use crate::describe::host::Machine;

/// Refuses a checkpoint that `here`, with its version of `criu`, cannot run. What the checkpoint does not say is
/// not asked for.
///
/// # Errors
/// With what is missing, and what helps.
pub(super) fn check(summary: &Summary, here: &Machine, criu: Option<&str>) -> Result<()> {
    ensure!(
        summary.arch.is_empty() || summary.arch == here.arch,
        "it was made on {}, and this host is {}: restore it on one of the same architecture",
        summary.arch,
        here.arch
    );
    let missing: Vec<_> =
        summary.cpu_flags.difference(&here.cpu_flags).map(String::as_str).collect();
    ensure!(
        missing.is_empty(),
        "this host's processor lacks {}, which its programs may use: restore it where the processor can do \
         what that of {} can",
        missing.join(" "),
        summary.hostname
    );
    if let Some(criu) = criu {
        ensure!(
            version(criu) >= version(&summary.criu),
            "criu {criu} cannot read images of criu {}: install that version or a newer one",
            summary.criu
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_lacks_is_named_with_its_cure() {
        let flags = ["avx".to_owned()];
        let here = Machine { arch: "x86_64".into(), cpu_flags: flags.into(), ..Default::default() };
        let fits = Summary {
            arch: here.arch.clone(),
            cpu_flags: here.cpu_flags.clone(),
            criu: "4.2".into(),
            ..Default::default()
        };
        let check = |summary: &Summary| check(summary, &here, Some("4.2.1"));
        assert!(check(&fits).is_ok() && check(&Summary::default()).is_ok());
        let refusal = |change: fn(&mut Summary)| {
            let mut summary = fits.clone();
            change(&mut summary);
            check(&summary).unwrap_err().to_string()
        };
        let processor = refusal(|s| s.cpu_flags.extend(["amx_tile".to_owned()]));
        assert!(processor.contains("lacks amx_tile"), "{processor}");
        assert!(refusal(|s| s.arch = "riscv64".into()).contains("made on riscv64"));
        assert!(refusal(|s| s.criu = "99.1".into()).contains("images of criu 99.1"));
    }
}
