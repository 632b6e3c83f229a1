//! What the stream names in a request mean.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A parsed stream name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nowhere.
    Null,
    /// A path without a scheme: a FIFO, rarely an existing file.
    Path(PathBuf),
    /// `file://`: a log file, made if missing.
    File(PathBuf),
    /// `binary://` or `binary-v2://`: a log program.
    Program(Program),
}

/// A log program.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    /// The query's keys, each with its first value.
    pub(super) args: Vec<OsString>,
    /// It has to say that it is ready before it closes its pipe.
    pub(super) strict: bool,
}

/// Parses a stream name; a scheme that is not served is named in the refusal.
pub(super) fn parse(name: &str) -> Result<Target> {
    if name.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = name.split_once("://") else {
        return Ok(Target::Path(name.into()));
    };
    let rest = rest.split('#').next().unwrap_or(rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(decode(path));
    if path.is_relative() {
        return Err(Error::invalid_argument(format!("the path in {name:?} is not absolute")));
    }
    match scheme.to_ascii_lowercase().as_str() {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" => Ok(Target::Program(Program { path, args: args(query), strict: false })),
        "binary-v2" => Ok(Target::Program(Program { path, args: args(query), strict: true })),
        _ => Err(Error::unimplemented(format!("streams of scheme {scheme}:// are not supported"))),
    }
}

/// `?a=1&b=2&a=3` is `a 1 b 2`.
fn args(query: &str) -> Vec<OsString> {
    let mut pairs: Vec<(OsString, OsString)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let [key, value] = [key, value].map(|text| decode(&text.replace('+', " ")));
        if !pairs.iter().any(|(known, _)| *known == key) {
            pairs.push((key, value));
        }
    }
    pairs.into_iter().flat_map(|(key, value)| [key, value]).collect()
}

fn decode(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(parse("").unwrap(), Target::Null);
        assert_eq!(parse("/run/f").unwrap(), Target::Path("/run/f".into()));
        assert_eq!(parse("fifo:///run/f").unwrap(), Target::Path("/run/f".into()));
        assert_eq!(parse("file:///a%20b?x=1").unwrap(), Target::File("/a b".into()));
        assert_eq!(parse("file:///a%2").unwrap(), Target::File("/a%2".into()));
    }

    #[test]
    fn other_schemes_are_refused_by_name() {
        let err = parse("ttrpc+unix:///run/x").unwrap_err();
        assert_eq!(err.code(), Code::UNIMPLEMENTED);
        assert!(err.to_string().contains("ttrpc+unix://"), "{err}");
        assert_eq!(parse("file://a/b").unwrap_err().code(), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_log_program_gets_each_key_with_its_first_value() {
        let program = |name: &str| match parse(name).unwrap() {
            Target::Program(program) => program,
            other => panic!("{name} is {other:?}"),
        };
        let nerdctl = program("binary:///usr/bin/nerdctl?_LOGGING=%2Fvar%2Flib%2Fn%2F1935");
        assert_eq!(nerdctl.path, PathBuf::from("/usr/bin/nerdctl"));
        assert_eq!(nerdctl.args, ["_LOGGING", "/var/lib/n/1935"]);
        assert!(!nerdctl.strict && program("binary-v2:///x").strict);
        assert_eq!(
            program("binary:///x?b=1&a=two+words&b=2&flag#end").args,
            ["b", "1", "a", "two words", "flag", ""]
        );
        assert!(program("BINARY:///x?").args.is_empty());
    }
}
