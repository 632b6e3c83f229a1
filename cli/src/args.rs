//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use ferry_oci::fast::Fast;
use ferry_oci::pages::daemon;
use ferry_oci::pages::rounds::OnDiverge;
use ferry_oci::pages::store::Limits;
use ferry_oci::pages::tracker::Kind;

use crate::migrate::memory::Wishes;
use crate::migrate::{self, Options, guard};
use crate::network::address::Cidr;
use crate::transport::{Destination, unix};
use crate::wire::messages::ContainerdAddress;
use crate::{agent, checkpoint, doctor, inspect, pages, predump, status};

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
        /// Where to: `ssh://[user@]host[:port]`, or `unix:///path` where `ferry agent --listen` waits
        #[arg(long)]
        to: String,
        /// The address that the clients use, with its prefix length; it moves along
        #[arg(long, value_name = "ADDRESS/PREFIX")]
        ip: Option<Cidr>,
        /// How the memory moves
        #[arg(long, value_enum, default_value_t = Mode::Auto)]
        mode: Mode,
        /// The pause to aim at, milliseconds
        #[arg(long, value_name = "MS", default_value_t = 30,
            value_parser = clap::value_parser!(u64).range(1..))]
        downtime_target: u64,
        /// Most rounds of pre-copy
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
        /// Most bytes per second while the container runs, as 100M or 1G
        #[arg(long, value_name = "BYTES", value_parser = size)]
        bandwidth: Option<u64>,
        /// What to do when memory changes faster than it can be copied: stop, throttle or fail
        #[arg(long, default_value = "stop")]
        on_diverge: OnDiverge,
        /// How writes are noted: write-protect or none; found out if not given
        #[arg(long, value_parser = tracker)]
        tracker: Option<Kind>,
        /// A fast path not to take, to find a fault; may be given several times
        #[arg(long, value_name = "NAME", value_parser = fast_path)]
        no_fast: Vec<Fast>,
        /// Show the plan, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Command that starts ferry on the other host, over ssh
        #[arg(long, default_value = "ferry")]
        remote_ferry: String,
    },
    /// Make an image of a running container, or a file
    ///
    /// The image has its memory, its changed files and its settings, and stays in containerd. The
    /// container stands still for the dump alone. Prints the name of the image.
    ///
    /// With --export a file is made, which podman can restore and checkpointctl reads; an image besides
    /// only if REF is given.
    Checkpoint {
        /// Container id
        container: String,
        /// Name of the image, if not one made of the container's and the time
        #[arg(value_name = "REF")]
        name: Option<String>,
        /// End the container when the checkpoint is complete. Its TCP clients stay connected until it
        /// is restored, for an hour at most
        #[arg(long)]
        exit: bool,
        /// Keep unix sockets whose other end is outside the container
        #[arg(long)]
        external_unix_sockets: bool,
        /// Write the archive FILE as `podman container checkpoint --export` does; a file of that name is
        /// replaced once the new one is complete, as podman replaces it
        #[arg(long, short, value_name = "FILE")]
        export: Option<PathBuf>,
        /// What the file is packed with
        #[arg(long, short, value_enum, requires = "export", default_value = "zstd")]
        compress: checkpoint::Compression,
    },
    /// Write down the memory of a running container, for the next checkpoint to build on
    ///
    /// The first one writes all memory, each further one what has changed since. A checkpoint then
    /// stands still only for what has changed since the last one. Prints the folder.
    Predump {
        /// Container id
        container: String,
        /// Where to put them, each in a folder of its own. Without it they are gone when the container
        /// ends, and checkpoints do not need them
        #[arg(long)]
        folder: Option<PathBuf>,
        /// Forget them, and track memory no more
        #[arg(long, conflicts_with = "folder")]
        end: bool,
    },
    /// Bring a container back from a checkpoint
    ///
    /// A container that is here is restored as its record says; any other is made from the checkpoint.
    ///
    /// FILE is an archive of `ferry checkpoint --export` or of `podman container checkpoint --export`, of a
    /// container whose image is here.
    Restore {
        /// Name of the checkpoint's image, or path of its archive
        #[arg(value_name = "REF|FILE")]
        name: String,
        /// Id of the container, if not that of the one that was checkpointed
        #[arg(long)]
        id: Option<String>,
        /// The address that the clients use, with its prefix length, to be brought to this host
        #[arg(long, value_name = "ADDRESS/PREFIX")]
        ip: Option<Cidr>,
        /// What the checkpoint of a container that is not here may ask of this host; may be given
        /// several times
        #[arg(long, value_enum, value_name = "WHAT")]
        allow: Vec<checkpoint::Allowed>,
    },
    /// Remove a checkpoint and let its TCP clients go
    Discard {
        /// Name of the checkpoint's image, or id of a lock on connections
        #[arg(value_name = "REF")]
        name: String,
    },
    /// Copy an image or a checkpoint to another host, without a registry
    ///
    /// Only what is missing there goes.
    Push {
        /// Name of the image
        #[arg(value_name = "REF")]
        name: String,
        /// Where to: `ssh://[user@]host[:port]`, or `unix:///path` where `ferry agent --listen` waits
        #[arg(long)]
        to: String,
        /// Command that starts ferry on the other host, over ssh
        #[arg(long, default_value = "ferry")]
        remote_ferry: String,
    },
    /// Show what is in a checkpoint: processes, memory, files, sockets, mounts
    Inspect {
        /// Name of its image in containerd, or path of its archive or folder
        #[arg(value_name = "REF|FILE|DIR")]
        what: String,
    },
    /// Say what this host, or a container on it, cannot do, and what helps
    ///
    /// Exit code 0: nothing that matters; 1: warnings; 2: blockers; 3: it could not look.
    Doctor {
        /// Container id
        container: Option<String>,
    },
    /// List migrations that were decided and not finished, and memory kept for a next attempt
    Status,
    /// Forget memory that a failed migration has left here for the next attempt
    #[command(group(clap::ArgGroup::new("which").required(true).args(["container", "all"])))]
    Drop {
        /// Container id
        container: Option<String>,
        /// Of all containers
        #[arg(long)]
        all: bool,
    },
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
    /// Keep a page store and serve it (started by `ferry agent`)
    #[command(hide = true)]
    Pages {
        /// Its folder
        #[arg(long)]
        dir: PathBuf,
    },
    /// Give a throttled container its CPU time back once the standard input ends (started by
    /// `ferry migrate`)
    #[command(hide = true)]
    QuotaGuard {
        /// Where the quota is written down
        #[arg(long)]
        folder: PathBuf,
        /// Pid of the container's init
        #[arg(long)]
        init: u32,
    },
    /// Serve migrations that come to this host. Over ssh `ferry migrate` starts it by itself
    #[command(group(clap::ArgGroup::new("stream").required(true).args(["stdio", "listen"])))]
    Agent {
        /// Speak on standard input and output, with one driver
        #[arg(long)]
        stdio: bool,
        /// Wait for drivers at a socket, `unix:///path`: for `--to` of the same URL, on the same
        /// machine
        #[arg(long, value_name = "URL")]
        listen: Option<unix::Address>,
    },
}

/// How the memory moves, as given.
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
    /// Does the work of a helper that has one thread only, if that was asked for.
    pub(crate) fn help(&self) -> Option<Result<()>> {
        match &self.command {
            Command::Pages { dir } => {
                let kept = daemon::keeper_main(dir, Limits::default());
                Some(kept.context("page store"))
            }
            Command::QuotaGuard { folder, init } => Some(guard::guard_main(folder, *init)),
            _ => None,
        }
    }

    /// Whether a container is to be moved.
    pub(crate) fn moves(&self) -> bool {
        matches!(self.command, Command::Migrate { .. })
    }

    /// Does what was asked; with what code the process is to end.
    ///
    /// # Errors
    /// With the text that the operator gets.
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let containerd = ContainerdAddress {
            socket: self.address.trim_start_matches("unix://").to_owned(),
            namespace: self.namespace,
        };
        let done = match self.command {
            Command::Doctor { container } => {
                return Ok(doctor::run(&containerd, container, self.json).await);
            }
            Command::Agent { listen: Some(address), .. } => {
                agent::listen::listen(&address, self.verbose).await
            }
            Command::Agent { .. } => agent::serve().await,
            Command::Inspect { what } => inspect::run(&containerd, what, self.json).await,
            Command::Status => status::show(self.json),
            Command::Drop { container, all: _ } => {
                pages::drop(&containerd.namespace, container.as_deref())
            }
            Command::Recover { container, thaw, end: _ } => {
                migrate::settle::recover(&containerd, &container, thaw).await
            }
            Command::Checkpoint {
                container,
                name,
                exit,
                external_unix_sockets,
                export,
                compress,
            } => {
                let json = self.json;
                let export = export.map(|file| checkpoint::ExportWish { file, compress });
                checkpoint::create(checkpoint::CreateOptions {
                    container,
                    name,
                    export,
                    exit,
                    external_unix_sockets,
                    containerd,
                    json,
                })
                .await
            }
            Command::Predump { container, end: true, .. } => {
                predump::end(&containerd, &container).await
            }
            Command::Predump { container, folder, .. } => {
                predump::run(&containerd, &container, folder.as_deref(), self.json).await
            }
            Command::Restore { name, id, ip, allow: allowed } => {
                let json = self.json;
                let options =
                    checkpoint::RestoreOptions { name, id, ip, allowed, containerd, json };
                checkpoint::restore(options).await
            }
            Command::Discard { name } => checkpoint::discard(&containerd, &name).await,
            Command::Push { name, to, remote_ferry } => {
                let to = to.parse().map_err(|e| anyhow::anyhow!("--to: {e}"))?;
                let agent = format!("{remote_ferry} agent --stdio");
                checkpoint::push(&containerd, &name, &to, &agent, self.json).await
            }
            Command::Pages { .. } | Command::QuotaGuard { .. } => Ok(()),
            Command::Migrate {
                container,
                to,
                ip,
                mode,
                downtime_target,
                rounds,
                bandwidth,
                on_diverge,
                tracker,
                no_fast,
                dry_run,
                remote_ferry,
            } => {
                let mode = match mode {
                    Mode::Stop => migrate::Mode::Stop,
                    Mode::Pre => migrate::Mode::Pre,
                    Mode::Auto => migrate::Mode::Auto,
                    Mode::Post | Mode::Hybrid => {
                        let name = mode.to_possible_value().map(|v| v.get_name().to_owned());
                        bail!(
                            "--mode {} is not there yet: use --mode auto",
                            name.unwrap_or_default()
                        );
                    }
                };
                let memory = Wishes {
                    bandwidth,
                    downtime_target: Duration::from_millis(downtime_target),
                    rounds,
                    on_diverge,
                    tracker,
                };
                let destination: Destination =
                    to.parse().map_err(|e| anyhow::anyhow!("--to: {e}"))?;
                let agent = format!("{remote_ferry} agent --stdio");
                let json = self.json;
                let to = (to, destination);
                let options = Options {
                    container,
                    to,
                    ip,
                    agent,
                    containerd,
                    mode,
                    memory,
                    no_fast,
                    dry_run,
                    json,
                };
                migrate::run(options).await
            }
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// `100M`: bytes, with K, M or G for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.trim_end_matches(['K', 'M', 'G']) {
        digits if text.len() - digits.len() <= 1 => (digits, &text[digits.len()..]),
        _ => return Err("one unit at most: K, M or G".to_owned()),
    };
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => 0,
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no number of bytes"))?;
    match number.checked_mul(1 << shift) {
        Some(0) | None => Err(format!("{text:?} is out of range")),
        Some(bytes) => Ok(bytes),
    }
}

fn tracker(name: &str) -> Result<Kind, String> {
    match name {
        "write-protect" => Ok(Kind::WriteProtect),
        "none" => Ok(Kind::None),
        // The bits are read and cleared in two steps, and what is written in between is lost: the
        // container would have to stand still for each round.
        "soft-dirty" => Err("soft-dirty bits need a container that stands still in every round: \
             use --mode stop"
            .to_owned()),
        _ => Err("it is write-protect or none".to_owned()),
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
    fn sizes_have_units() {
        assert_eq!(super::size("100M"), Ok(100 << 20));
        assert_eq!(super::size("7"), Ok(7));
        for bad in ["", "M", "1KM", "0", "-1", "99999999999G", "1T"] {
            assert!(super::size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        super::Args::command().debug_assert();
    }
}
