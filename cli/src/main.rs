//! `ferry` moves running containers between containerd hosts while their clients stay connected.

mod agent;
mod args;
mod checkpoint;
mod containerd;
mod describe;
mod doctor;
mod inspect;
mod lock;
mod migrate;
mod network;
mod pages;
mod predump;
mod shim;
mod status;
mod table;
mod transport;
mod untar;
mod wire;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let level = if args.verbose { log::LevelFilter::Debug } else { log::LevelFilter::Warn };
    env_logger::Builder::new().filter_level(level).parse_default_env().init();
    // Single-threaded: one of them forks.
    if let Some(helped) = args.help() {
        return match helped {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log::error!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    // The container that is moved, and CRIU, shall not wait for this process.
    if args.moves()
        && let Err(error) = ferry_oci::turns::long()
    {
        log::debug!("take long turns: {error}");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ferry: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(args.run());
    // A thread that still reads standard input must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}
