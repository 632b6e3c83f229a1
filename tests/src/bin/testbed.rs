//! `testbed`: makes, shows, enters and removes a lab that stays. Called by `hack/testbed`.

use std::io::{IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use ferry_tests::layers::Layer;
use ferry_tests::{Lab, base, cache, images, layers, network, sweep, versions};
use nix::fcntl::FlockArg;

/// Prints a line. That nobody reads on, as in `testbed status | head -n1`, is no error.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

#[derive(Parser)]
#[command(about = "Test hosts on this machine")]
struct Arguments {
    /// The lab: several can run side by side
    #[arg(long, global = true, default_value = "ferry")]
    lab: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start the hosts, or install ferry's programs again where they run already
    Up {
        /// How many hosts, called a, b, ... (2, or as many as run already)
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
        hosts: Option<u8>,
        /// A layer over the base system, the uppermost first; several may be named
        #[arg(long = "over", value_name = "LAYER")]
        layers: Vec<String>,
    },
    /// Remove the hosts and all that killed tests left
    Down,
    /// Open a shell on a host (a, b, ... or client), or run a command there
    Shell {
        /// The host
        host: String,
        /// The command and its arguments
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Say what runs
    Status,
    /// Start hosts in a lab of their own, and remove it when the input ends
    Hold {
        /// How many hosts
        #[arg(long, default_value_t = 1)]
        hosts: u8,
    },
    /// Make the base system, the images and layers if they are missing, and say where the first two are
    Prepare {
        /// Layers besides those of the containerd and runc that the environment asks for; one that
        /// cannot be made here is left out
        layers: Vec<String>,
    },
    /// Say why the containerd and runc that the environment asks for cannot be had; nothing if they can
    Missing,
}

fn main() -> ExitCode {
    let Arguments { lab, command } = Arguments::parse();
    let done = match command {
        Action::Up { hosts, layers } => up(&lab, hosts, &layers),
        Action::Down => down(&lab),
        Action::Shell { host, command } => shell(&lab, &host, &command),
        Action::Status => status(&lab),
        Action::Hold { hosts } => hold(hosts),
        Action::Prepare { layers } => prepare(&layers),
        Action::Missing => missing(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("testbed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(names: &[String]) -> Result<()> {
    let images = images::folder()?;
    say!("base {}", base::ensure()?.display());
    say!("images {}", images.display());
    versions::ensure_layers(&asked()?)?;
    for layer in named(names)? {
        match layer.missing() {
            Some(missing) => eprintln!("left out: {missing}"),
            None => drop(layer.ensure()?),
        }
    }
    Ok(())
}

fn missing() -> Result<()> {
    if let Some(missing) = asked()?.iter().find_map(|layer| layer.missing()) {
        say!("{missing}");
    }
    Ok(())
}

/// The layers that the environment asks for.
fn asked() -> Result<Vec<&'static Layer>> {
    let (containerd, runc) = versions::chosen()?;
    Ok(versions::layers_of(containerd, runc))
}

fn named(names: &[String]) -> Result<Vec<&'static Layer>> {
    let find = |name: &String| match layers::ALL.iter().find(|layer| layer.name == name) {
        Some(layer) => Ok(*layer),
        None => {
            let known: Vec<_> = layers::ALL.iter().map(|layer| layer.name).collect();
            bail!("there is no layer {name}; there are {}", known.join(", "))
        }
    };
    names.iter().map(find).collect()
}

fn up(id: &str, hosts: Option<u8>, layers: &[String]) -> Result<()> {
    let _lock = cache::lock("testbed", FlockArg::LockExclusive)?;
    let running = Lab::attach(id)?;
    let is_right = |lab: &Lab| hosts.is_none_or(|n| lab.hosts().len() == usize::from(n));
    let lab = match running.filter(is_right) {
        Some(lab) => lab,
        None => {
            Lab::remove(id)?;
            let mut over = named(layers)?;
            over.extend(asked()?);
            Lab::start_kept(id, hosts.unwrap_or(2), &versions::ensure_layers(&over)?)?
        }
    };
    for program in lab.install_ferry()? {
        say!("installed on every host: {}", program.display());
    }
    show(&lab);
    Ok(())
}

fn down(id: &str) -> Result<()> {
    let _lock = cache::lock("testbed", FlockArg::LockExclusive)?;
    sweep::sweep()?;
    Lab::remove(id)?;
    images::prune()
}

fn status(id: &str) -> Result<()> {
    match Lab::attach(id)? {
        Some(lab) => show(&lab),
        None => say!("no hosts run"),
    }
    for other in sweep::labs()?.into_iter().filter(|other| other != id) {
        say!("another lab is there: {other}");
    }
    Ok(())
}

fn hold(hosts: u8) -> Result<()> {
    let lab = Lab::start(hosts)?;
    say!("{}", lab.id());
    show(&lab);
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

fn show(lab: &Lab) {
    let client = lab.find("client");
    for host in lab.hosts().iter().chain(client) {
        say!("{:<8}{:<16}pid {}", host.name(), host.address(), host.pid());
    }
    say!("floating address for containers: {}/24", network::address(100));
}

fn shell(id: &str, host: &str, command: &[String]) -> Result<()> {
    let Some(lab) = Lab::attach(id)? else { bail!("no hosts run; start them with `up`") };
    let Some(host) = lab.find(host) else { bail!("there is no host {host} in this lab") };
    let mut words: Vec<_> = command.iter().map(String::as_str).collect();
    if words.is_empty() {
        words = vec!["/bin/bash", "-i"];
        if std::io::stdin().is_terminal() {
            // A terminal of the host's own: this machine's has no name there.
            words = vec!["script", "--quiet", "--command", "/bin/bash", "/dev/null"];
        }
    }
    Err(host.command(&words).exec().into())
}
