//! The `tar` that CRIU calls for each tmpfs of a container, made to start fast.
//!
//! ```text
//! dump      tar --create  ... --directory /proc/self/fd/0 .   > image    tree ─ ustar ─ gzip
//! restore   tar --extract ... --directory MOUNT POINT         < image    gzip ─ ustar ─ tree
//!               │
//!               └─ other options, unusual content, an image of another tar: the real tar
//! ```
//! CRIU calls it inside the pause of a move, four times or more on each side. GNU tar takes 3 to
//! 4 ms for it, most of them to start gzip; this takes well under one. The archive is an ordinary
//! one, in gzip without compression: any tar reads it. Before anything is written, everything has
//! been looked at, so that the real tar can always take over and starts from nothing.
//!
//! The program is small and starts fastest when it is linked statically:
//! `cargo rustc -p ferry-tar --profile release --bin ferry-tar -- -C target-feature=+crt-static`.

mod call;
mod real;
#[cfg(test)]
mod tests;

use call::Call;
use ferry_tar::{Stop, create, extract};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let done = match Call::read(&arguments) {
        Some(Call::Create(folder)) => create(&folder),
        Some(Call::Extract(folder)) => extract(&folder),
        None => Err(Stop::Real),
    };
    match done {
        Ok(()) => {
            real::count("fast");
            ExitCode::SUCCESS
        }
        Err(Stop::Real) => {
            real::count("real");
            eprintln!("ferry-tar: cannot start the real tar: {}", real::exec(&arguments));
            ExitCode::from(2)
        }
        Err(Stop::Failed(what, err)) => {
            eprintln!("ferry-tar: {what}: {err}");
            ExitCode::from(2)
        }
    }
}
