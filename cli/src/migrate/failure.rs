//! A migration that failed: at which step, why, and where the container runs now.

use std::fmt;

use ferry_cli::phase::Phase;

/// Where the container is after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    /// It runs on the source and never stopped, or was thawed again.
    Source,
    /// It runs on the destination.
    Destination,
    /// Its shim on the source is gone, and it with it.
    Gone,
    /// Frozen on the source, until the destination has been asked.
    InDoubt,
}

/// One failed migration.
#[derive(Debug)]
pub(crate) struct Failure {
    phase: Phase,
    cause: anyhow::Error,
    /// By a deadline or a signal.
    cut: bool,
    whereabouts: Whereabouts,
    /// What could not be undone, and how it will be.
    leftovers: Vec<String>,
}

impl Failure {
    /// A failure in `phase`. Until told otherwise the container runs on the source.
    pub(crate) fn new(phase: Phase, cause: anyhow::Error) -> Self {
        Self { phase, cause, cut: false, whereabouts: Whereabouts::Source, leftovers: Vec::new() }
    }

    /// `phase` took too long.
    pub(crate) fn deadline(phase: Phase) -> Self {
        let seconds = phase.deadline().as_secs();
        let cause = anyhow::anyhow!("not done within its deadline of {seconds} s");
        Self { cut: true, ..Self::new(phase, cause) }
    }

    /// Somebody has asked for its end, by the signal `name`.
    pub(crate) fn interrupted(phase: Phase, name: &str) -> Self {
        let cause = anyhow::anyhow!("interrupted by {name}");
        Self { cut: true, ..Self::new(phase, cause) }
    }

    /// Whether a step was left in the middle, and with it whatever was on its way to the agent.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut
    }

    /// At which step.
    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Says where the container is.
    pub(crate) fn at(mut self, whereabouts: Whereabouts) -> Self {
        self.whereabouts = whereabouts;
        self
    }

    /// Adds something that could not be undone.
    pub(crate) fn leaves(mut self, what: String) -> Self {
        self.leftovers.push(what);
        self
    }

    /// The whole story, for a person.
    pub(crate) fn tell(&self, container: &str, source: &str, destination: &str) -> String {
        let mut text = format!("{}: {:#}", self.phase.name(), self.cause);
        text += &match self.whereabouts {
            Whereabouts::Source if self.phase <= Phase::Plan => "\nnothing has changed".to_owned(),
            Whereabouts::Gone => format!(
                "\n{container} has ended on {source}: its shim is gone, and its processes with it"
            ),
            Whereabouts::Source => format!("\n{container} runs on {source}, its connections alive"),
            Whereabouts::Destination => format!(
                "\n{container} runs on {destination}; run the same command again to remove what \
                 is left of it on {source}"
            ),
            Whereabouts::InDoubt => format!(
                "\n{container} is frozen on {source} until {destination} has been asked what \
                 became of it; run the same command again to settle it"
            ),
        };
        for what in &self.leftovers {
            text += &format!("\n{what}");
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#}", self.phase.name(), self.cause)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_the_step_the_cause_and_where_the_container_is() {
        let failure = Failure::new(Phase::Restore, anyhow::anyhow!("no criu"));
        let text = failure.tell("redis", "a", "b");
        assert!(text.starts_with("restore: no criu\nredis runs on a"), "{text}");
        let failure = Failure::deadline(Phase::Release).at(Whereabouts::InDoubt);
        let text = failure.leaves("x".into()).tell("redis", "a", "b");
        assert!(text.contains("90 s") && text.contains("run the same command again"), "{text}");
        assert!(text.ends_with("\nx"));
    }
}
