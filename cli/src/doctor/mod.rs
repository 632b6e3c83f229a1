//! `ferry doctor`: what this host, or a container on it, cannot do, and what helps. Only looks.
//!
//! ```text
//!   host.rs       facts of this host      ── host_checks.rs      ─┐
//!   container.rs  facts of the container  ── container_checks.rs ─┼─▶ findings, the worst decides the code
//!   describe/     facts and blockers of a move                   ─┘
//! ```
//! Checks are pure. Exit code: 0 nothing that matters, 1 warnings, 2 blockers, 3 it could not look.

mod container;
mod container_checks;
mod host;
mod host_checks;
mod locks;
mod losses;
mod mounts;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::containerd::Containerd;
use crate::wire::messages::ContainerdAddress;
use host::Host;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    /// Good to know.
    Note,
    /// Something is not possible, or goes wrong at times.
    Warning,
    /// No checkpoint, restore or move as it is.
    Blocker,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// Its name, for scripts.
    name: &'static str,
    severity: Severity,
    /// What is the matter.
    what: String,
    /// What to do about it.
    cure: String,
}

/// Findings on their way.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, severity: Severity, name: &'static str, what: String, cure: &str) {
        self.0.push(Finding { name, severity, what, cure: cure.to_owned() });
    }

    fn note(&mut self, name: &'static str, what: impl Into<String>, cure: &str) {
        self.add(Severity::Note, name, what.into(), cure);
    }

    fn warn(&mut self, name: &'static str, what: impl Into<String>, cure: &str) {
        self.add(Severity::Warning, name, what.into(), cure);
    }

    fn block(&mut self, name: &'static str, what: impl Into<String>, cure: &str) {
        self.add(Severity::Blocker, name, what.into(), cure);
    }
}

/// All that is said.
#[derive(Serialize)]
struct Report {
    host: String,
    container: Option<String>,
    /// The worst there is.
    worst: Option<Severity>,
    findings: Vec<Finding>,
}

/// Prints what is found; the exit code says how bad that is.
pub(crate) async fn run(
    address: &ContainerdAddress,
    container: Option<String>,
    json: bool,
) -> ExitCode {
    match examine(address, container).await.and_then(|report| {
        let text = if json { serde_json::to_string_pretty(&report)? + "\n" } else { text(&report) };
        print!("{text}");
        Ok(report.worst)
    }) {
        Ok(None | Some(Severity::Note)) => ExitCode::SUCCESS,
        Ok(Some(Severity::Warning)) => ExitCode::from(1),
        Ok(Some(Severity::Blocker)) => ExitCode::from(2),
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::from(3)
        }
    }
}

async fn examine(address: &ContainerdAddress, container: Option<String>) -> Result<Report> {
    let containerd = Containerd::connect(&address.socket, &address.namespace).await;
    let version = match &containerd {
        Ok(containerd) => containerd.version().await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let socket = address.socket.clone();
    let host = tokio::task::spawn_blocking(move || Host::gather(version, &socket)).await?;
    let mut findings = Findings::default();
    host_checks::all(&host, &mut findings);
    if let Some(id) = &container {
        container::examine(&containerd?, address, id, &host, &mut findings).await?;
    }
    let Findings(mut findings) = findings;
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok(Report {
        host: host.base.hostname,
        container,
        worst: findings.iter().map(|finding| finding.severity).max(),
        findings,
    })
}

/// For a person.
fn text(report: &Report) -> String {
    let mut text = format!("host {}", report.host);
    if let Some(container) = &report.container {
        let _ = write!(text, ", container {container}");
    }
    text.push('\n');
    for (severity, title) in [
        (Severity::Blocker, "blockers"),
        (Severity::Warning, "warnings"),
        (Severity::Note, "good to know"),
    ] {
        let these = || report.findings.iter().filter(move |f| f.severity == severity);
        if these().next().is_some() {
            let _ = writeln!(text, "{title}:");
        }
        for finding in these() {
            let what = crate::inspect::clean(&finding.what);
            let _ = writeln!(text, "  {}: {what}\n      cure: {}", finding.name, finding.cure);
        }
    }
    if report.worst.is_none_or(|worst| worst == Severity::Note) {
        text += "nothing stands in the way\n";
    }
    text
}
