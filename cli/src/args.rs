//! The command line.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use ferry_oci::fast::Fast;

use crate::migrate::{self, Options};
use crate::network::address::Cidr;
use crate::transport::ssh::Destination;
use crate::wire::messages::ContainerdAddress;
use crate::{agent, status};

/// Moves running containers between containerd hosts while their clients stay connected.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, about)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    /// containerd namespace, on both hosts
    #[arg(long, short, global = true, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Path of containerd's socket, on both hosts
    #[arg(
        long,
        global = true,
        env = "CONTAINERD_ADDRESS",
        default_value = "/run/containerd/containerd.sock"
    )]
    address: String,
    /// Print JSON on standard output, and no progress
    #[arg(long, global = true)]
    json: bool,
    /// Tell more on standard error
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a running container to another host
    ///
    /// Until the commit, any failure leaves the container running here. When this command was
    /// killed after the commit, run it again: it settles who has the container.
    Migrate {
        /// Container id
        container: String,
        /// Where to: `ssh://[user@]host[:port]`
        #[arg(long)]
        to: String,
        /// The address that the clients use, with its prefix length; it moves along
        #[arg(long, value_name = "ADDRESS/PREFIX")]
        ip: Option<Cidr>,
        /// How the memory moves
        #[arg(long, value_enum, default_value_t = Mode::Stop)]
        mode: Mode,
        /// A fast path not to take, to find a fault; may be given several times
        #[arg(long, value_name = "NAME", value_parser = fast_path)]
        no_fast: Vec<Fast>,
        /// Show the plan, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Command that starts ferry on the other host
        #[arg(long, default_value = "ferry")]
        remote_ferry: String,
    },
    /// List migrations that were decided and not finished
    Status,
    /// Decide by hand what becomes of a container that is frozen here, when its destination cannot
    /// be asked any more
    #[command(group(clap::ArgGroup::new("what").required(true).args(["thaw", "end"])))]
    Recover {
        /// Container id
        container: String,
        /// Let it run here. Only when it does not run at the destination!
        #[arg(long)]
        thaw: bool,
        /// End it here: it runs at the destination
        #[arg(long)]
        end: bool,
    },
    /// Serve a migration's destination (started by `ferry migrate` over ssh)
    #[command(hide = true)]
    Agent {
        /// Speak on standard input and output
        #[arg(long, required = true)]
        stdio: bool,
    },
}

/// How the memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Freeze, copy all, restore
    Stop,
    /// Copy while it runs, then stop
    Pre,
    /// Restore first, then copy
    Post,
    /// Pre-copy, then post-copy
    Hybrid,
    /// Pre-copy until it converges, then stop
    Auto,
}

impl Args {
    /// Does what was asked.
    ///
    /// # Errors
    /// With the text that the operator gets.
    pub(crate) async fn run(self) -> Result<()> {
        let containerd = ContainerdAddress {
            socket: self.address.trim_start_matches("unix://").to_owned(),
            namespace: self.namespace,
        };
        match self.command {
            Command::Agent { .. } => agent::serve().await,
            Command::Status => status::show(self.json),
            Command::Recover { container, thaw, end: _ } => {
                migrate::settle::recover(&containerd, &container, thaw).await
            }
            Command::Migrate { container, to, ip, mode, no_fast, dry_run, remote_ferry } => {
                if mode != Mode::Stop {
                    let name = mode.to_possible_value().map(|v| v.get_name().to_owned());
                    bail!("--mode {} is not there yet: use --mode stop", name.unwrap_or_default());
                }
                let destination: Destination =
                    to.parse().map_err(|e| anyhow::anyhow!("--to: {e}"))?;
                let agent = format!("{remote_ferry} agent --stdio");
                let json = self.json;
                let to = (to, destination);
                let options =
                    Options { container, to, ip, agent, containerd, no_fast, dry_run, json };
                migrate::run(options).await
            }
        }
    }
}

fn fast_path(name: &str) -> Result<Fast, String> {
    Fast::of(name).ok_or_else(|| {
        let names: Vec<_> = Fast::ALL.iter().map(|fast| fast.name()).collect();
        format!("there is no fast path of that name, but {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Args::command().debug_assert();
    }
}
