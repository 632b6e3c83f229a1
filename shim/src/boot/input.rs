//! What containerd tells `start`: `BootstrapParams` on standard input (from 2.3), or flags, environment
//! and the runtime options on standard input.

use super::answer::Form;
use crate::options::TaskOptions;
use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim::Flags;
use containerd_shim::bootstrap::{BootstrapParams, LogLevel};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{Enum, Message};
use std::io::{IsTerminal, Read};

/// More than that is not read, as in containerd's own shim.
const LIMIT: u64 = 10 << 20;

/// The environment, as far as it matters.
#[derive(Debug, Default)]
pub(super) struct Environment {
    /// `TTRPC_ADDRESS`.
    pub(super) ttrpc_address: String,
    /// `GRPC_ADDRESS`.
    pub(super) grpc_address: String,
    /// `MAX_SHIM_VERSION`.
    pub(super) max_version: Option<String>,
}

impl Environment {
    /// That of this process.
    pub(super) fn read() -> Self {
        let of = |name: &str| std::env::var(name).ok();
        Self {
            ttrpc_address: of("TTRPC_ADDRESS").unwrap_or_default(),
            grpc_address: of("GRPC_ADDRESS").unwrap_or_default(),
            max_version: of("MAX_SHIM_VERSION"),
        }
    }
}

/// A shim that is asked for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) id: String,
    pub(super) namespace: String,
    /// containerd's gRPC address.
    pub(super) grpc_address: String,
    /// containerd's ttrpc address, for events.
    pub(super) ttrpc_address: String,
    pub(super) debug: bool,
    /// Where containerd wants the socket, if it says so.
    pub(super) socket_dir: Option<String>,
    /// The runtime options.
    pub(super) options: TaskOptions,
    pub(super) form: Form,
}

/// Standard input, unless that is a person's terminal.
pub(super) fn read() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(LIMIT).read_to_end(&mut input).context("read standard input")?;
    }
    Ok(input)
}

/// Understands either way of asking.
pub(super) fn parse(input: &[u8], flags: &Flags, env: Environment) -> Result<Request> {
    let request = match bootstrap(input, flags)? {
        Some(params) => of_bootstrap(params, flags),
        None => of_flags(input, flags, env)?,
    };
    ensure!(!request.id.is_empty(), "no -id is given: containerd runs this program");
    ensure!(!request.namespace.is_empty(), "no -namespace is given: containerd runs this program");
    // The shim itself has nobody to tell.
    ensure!(!request.ttrpc_address.is_empty(), "containerd's ttrpc address is not given");
    Ok(request)
}

/// `BootstrapParams`, if that is what was sent. Runtime options decode as such too, their type as the
/// id and their value as the namespace: nothing else is set then.
fn bootstrap(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    let matches = |flag: &str, param: &str| flag.is_empty() || flag == param;
    let own =
        matches(&flags.id, &params.instance_id) && matches(&flags.namespace, &params.namespace);
    let named_alone = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    match (params == named_alone, own) {
        (true, _) => Ok(None),
        (false, true) => Ok(Some(params)),
        (false, false) => bail!(
            "standard input is for {}/{}, the flags for {}/{}",
            params.namespace,
            params.instance_id,
            flags.namespace,
            flags.id
        ),
    }
}

fn of_bootstrap(params: BootstrapParams, flags: &Flags) -> Request {
    let extensions: Vec<_> = params
        .extensions
        .into_iter()
        .filter_map(|extension| extension.value.into_option())
        .collect();
    Request {
        id: params.instance_id,
        namespace: params.namespace,
        grpc_address: params.containerd_grpc_address,
        ttrpc_address: params.containerd_ttrpc_address,
        debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
        socket_dir: params.socket_dir.filter(|folder| !folder.is_empty()),
        options: options(&extensions),
        form: Form::Protobuf,
    }
}

fn of_flags(input: &[u8], flags: &Flags, env: Environment) -> Result<Request> {
    let sent = Any::parse_from_bytes(input).context("decode the options on standard input")?;
    let grpc_address = match flags.address.as_str() {
        "" => env.grpc_address,
        address => address.to_string(),
    };
    Ok(Request {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        grpc_address,
        ttrpc_address: env.ttrpc_address,
        debug: flags.debug,
        socket_dir: None,
        options: options(&[sent]),
        form: Form::before_bootstrap(env.max_version.as_deref()),
    })
}

/// Options that cannot be read are none of start's business: Create refuses them by name.
fn options(sent: &[Any]) -> TaskOptions {
    let read = |any| TaskOptions::decode(Some(any)).ok();
    sent.iter().find_map(read).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::bootstrap::Extension;
    use containerd_shim::protos::protobuf::EnumOrUnknown;
    use containerd_shim::protos::shim::oci::Options;

    fn flags() -> Flags {
        Flags {
            id: "c".into(),
            namespace: "ns".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn env() -> Environment {
        Environment {
            ttrpc_address: "/run/c.sock.ttrpc".into(),
            grpc_address: "/run/other.sock".into(),
            max_version: Some("2".into()),
        }
    }

    fn any() -> Any {
        let options = Options { shim_cgroup: "/shims".into(), ..Default::default() };
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c".into(),
            namespace: "ns".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_TRACE),
            containerd_ttrpc_address: "/t".into(),
            containerd_grpc_address: "/g".into(),
            socket_dir: Some("/run/s".into()),
            extensions: vec![Extension { value: Some(any()).into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn nothing_or_options_on_standard_input_is_the_old_way() {
        let request = parse(&[], &flags(), env()).unwrap();
        assert_eq!(request.form, Form::Json(2));
        assert_eq!(request.grpc_address, "/run/c.sock");
        assert_eq!(request.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!((request.debug, request.options), (false, TaskOptions::default()));
        let request = parse(&any().write_to_bytes().unwrap(), &flags(), env()).unwrap();
        assert_eq!(request.options.shim_cgroup, "/shims");
        assert_eq!(request.form, Form::Json(2));
        let env = Environment { max_version: None, ..env() };
        assert_eq!(parse(&[], &flags(), env).unwrap().form, Form::Address);
    }

    #[test]
    fn bootstrap_params_say_everything() {
        let input = params().write_to_bytes().unwrap();
        for flags in [flags(), Flags::default()] {
            let request = parse(&input, &flags, Environment::default()).unwrap();
            assert_eq!(request.form, Form::Protobuf);
            assert_eq!((request.id.as_str(), request.namespace.as_str()), ("c", "ns"));
            assert_eq!((request.grpc_address.as_str(), request.debug), ("/g", true));
            assert_eq!(request.socket_dir.as_deref(), Some("/run/s"));
            assert_eq!(request.options.shim_cgroup, "/shims");
        }
    }

    #[test]
    fn what_is_for_another_shim_or_lacks_an_address_is_refused() {
        let input = params().write_to_bytes().unwrap();
        let other = Flags { id: "other".into(), ..flags() };
        assert!(parse(&input, &other, env()).is_err());
        assert!(parse(&[], &flags(), Environment::default()).is_err());
        assert!(parse(&[], &Flags::default(), env()).is_err());
        assert!(parse(&[0xff; 20], &flags(), env()).is_err());
    }

    #[test]
    fn no_input_makes_it_panic() {
        let mut seed = 7u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        let good = [params().write_to_bytes().unwrap(), any().write_to_bytes().unwrap()];
        for round in 0..20_000 {
            let mut input = good[round % 2].clone();
            for _ in 0..random() % 8 {
                let at = random() % input.len();
                input[at] = random() as u8;
            }
            input.truncate(random() % (input.len() + 1));
            let _ = parse(&input, &flags(), env());
        }
    }
}
