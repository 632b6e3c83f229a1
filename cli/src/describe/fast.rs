//! Which fast paths a migration takes, and why not the others. Pure: facts in, list out.

use ferry_oci::fast::Fast;
use serde::Serialize;

use super::container::{ContainerFacts, Network};
use super::host::HostFacts;

/// What is said of one fast path in the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Choice {
    /// Which.
    pub(crate) name: Fast,
    /// Why it is not taken; `None` when it is.
    pub(crate) off: Option<String>,
}

/// What the choice rests on.
pub(crate) struct Facts<'a> {
    pub(crate) source: &'a HostFacts,
    pub(crate) destination: &'a HostFacts,
    pub(crate) container: &'a ContainerFacts,
    /// Memory is copied before the freeze.
    pub(crate) copies_memory: bool,
    /// An address moves.
    pub(crate) moves_address: bool,
    /// What the operator does not want.
    pub(crate) refused: &'a [Fast],
}

/// Every fast path, taken or not.
pub(crate) fn choose(facts: &Facts<'_>) -> Vec<Choice> {
    Fast::ALL.into_iter().map(|name| Choice { name, off: why_not(name, facts) }).collect()
}

/// The names of those that are taken.
pub(crate) fn taken(choices: &[Choice]) -> Vec<Fast> {
    choices.iter().filter(|choice| choice.off.is_none()).map(|choice| choice.name).collect()
}

fn why_not(fast: Fast, facts: &Facts<'_>) -> Option<String> {
    if facts.refused.contains(&fast) {
        return Some("turned off by --no-fast".to_owned());
    }
    // They are given to a dump that is started early, or need what runc has written for it.
    let held = matches!(
        fast,
        Fast::HeldRestore | Fast::Log | Fast::Cgroups | Fast::Hide | Fast::Tmpfs | Fast::Tar
    );
    if held && facts.refused.contains(&Fast::HeldDump) {
        return Some(format!("needs {}", Fast::HeldDump.name()));
    }
    // What is packed for it crosses with the order to prepare it.
    if fast == Fast::Tmpfs && facts.refused.contains(&Fast::HeldRestore) {
        return Some(format!("needs {}", Fast::HeldRestore.name()));
    }
    // CRIU's id names its lock, and is in its log.
    if fast == Fast::Log && facts.refused.contains(&Fast::Lock) {
        return Some(format!("needs {}", Fast::Lock.name()));
    }
    let criu_locks =
        !facts.moves_address && !matches!(facts.container.network, Network::Path { .. });
    let missing =
        |what: &str| Some(format!("{what} is not installed on {}", facts.source.hostname));
    match fast {
        Fast::HeldDump
        | Fast::HeldRestore
        | Fast::Freezer
        | Fast::Images
        | Fast::Warm
        | Fast::Tmpfs => None,
        Fast::Awake => {
            [facts.source, facts.destination].into_iter().find(|h| !h.awake).map(|host| {
                format!(
                    "{} has no /dev/cpu_dma_latency, which keeps processors awake",
                    host.hostname
                )
            })
        }
        Fast::Breakpoints => [facts.source, facts.destination]
            .into_iter()
            .find(|h| !h.breakpoints)
            .map(|host| format!("the kernel of {} has no performance events", host.hostname)),
        Fast::Log | Fast::Lock => {
            criu_locks.then(|| "no address moves: CRIU locks the connections".to_owned())
        }
        Fast::Queue => (!facts.moves_address).then(|| "no address moves".to_owned()),
        Fast::Cgroups => cgroups(facts),
        Fast::Hide | Fast::Patch if !facts.copies_memory => {
            Some("memory crosses in the pause, by the dump".to_owned())
        }
        Fast::Hide if !facts.source.hide_library => missing("libferry_hide.so"),
        // Of the destination's it is enough to know that the real one is there.
        Fast::Tar if !facts.source.fast_tar => missing("ferry-tar"),
        Fast::Hide | Fast::Patch | Fast::Tar => None,
        Fast::Netns => match facts.container.network {
            // There it is anyhow.
            Network::Host | Network::Path { .. } => None,
            Network::Loopback | Network::Devices(_) => {
                Some("the container's network namespace has no path".to_owned())
            }
        },
    }
}

fn cgroups(facts: &Facts<'_>) -> Option<String> {
    if let Some(first) = facts.container.own_cgroups.first() {
        return Some(format!("the container has made cgroups of its own: {first}"));
    }
    let old = |host: &HostFacts| {
        let version = host.runc.as_deref()?;
        let mut parts = version.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
        let known = (parts.next()?, parts.next()?);
        (known < (1, 2)).then(|| format!("runc {version} on {} is older than 1.2", host.hostname))
    };
    old(facts.source).or_else(|| old(facts.destination))
}

#[cfg(test)]
mod tests {
    use super::super::container::Names;
    use super::super::samples::{container, host};
    use super::*;

    fn off(container: &ContainerFacts, runc: &str, refused: &[Fast]) -> Vec<(Fast, String)> {
        let source = host("a");
        let mut destination = host("b");
        destination.runc = Some(runc.to_owned());
        let facts = Facts {
            source: &source,
            destination: &destination,
            container,
            copies_memory: true,
            moves_address: true,
            refused,
        };
        choose(&facts).into_iter().filter_map(|choice| Some((choice.name, choice.off?))).collect()
    }

    #[test]
    fn all_are_taken_where_nothing_is_in_the_way() {
        assert_eq!(off(&container(), "1.3.6+ds1", &[]), []);
        let (a, b, container) = (host("a"), host("b"), container());
        let facts = Facts {
            source: &a,
            destination: &b,
            container: &container,
            copies_memory: true,
            moves_address: true,
            refused: &[],
        };
        assert_eq!(taken(&choose(&facts)), Fast::ALL);
        let without = Facts { copies_memory: false, moves_address: false, ..facts };
        let off = choose(&without).into_iter().filter(|choice| choice.off.is_some());
        let off: Vec<_> = off.map(|choice| choice.name).collect();
        assert_eq!(off, [Fast::Lock, Fast::Queue, Fast::Patch, Fast::Log, Fast::Hide]);
    }

    #[test]
    fn one_that_is_refused_is_off_with_those_that_need_it() {
        let names = |refused: &[Fast]| {
            let off = off(&container(), "1.3.6", refused);
            off.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(&[Fast::Cgroups]), [Fast::Cgroups]);
        assert_eq!(names(&[Fast::HeldRestore]), [Fast::HeldRestore, Fast::Tmpfs]);
        assert_eq!(
            names(&[Fast::HeldDump]),
            [
                Fast::HeldDump,
                Fast::HeldRestore,
                Fast::Log,
                Fast::Cgroups,
                Fast::Hide,
                Fast::Tmpfs,
                Fast::Tar
            ]
        );
    }

    #[test]
    fn a_network_namespace_can_be_entered_only_if_it_is_there_before_the_container() {
        let mut private = container();
        private.network = Network::Loopback;
        assert_eq!(off(&private, "1.3.6", &[])[0].0, Fast::Netns);
        let path = "/run/netns/x".to_owned();
        private.network = Network::Path { path, names: Names::Its };
        assert_eq!(off(&private, "1.3.6", &[]), []);
    }

    #[test]
    fn cgroups_that_runc_would_not_make_are_left_to_criu() {
        let mut with_own = container();
        with_own.own_cgroups = vec!["/sys/fs/cgroup/cpu/default/x/inner".into()];
        assert_eq!(off(&with_own, "1.3.6", &[])[0].0, Fast::Cgroups);
        assert!(off(&container(), "1.1.15", &[])[0].1.contains("1.1.15 on b"));
    }
}
