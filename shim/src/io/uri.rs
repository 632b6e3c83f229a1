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
}

/// Parses a stream name; a scheme that is not served is named in the refusal.
pub(super) fn parse(name: &str) -> Result<Target> {
    if name.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = name.split_once("://") else {
        return Ok(Target::Path(name.into()));
    };
    let path = decode(rest.split(['?', '#']).next().unwrap_or(rest));
    if path.is_relative() {
        return Err(Error::invalid_argument(format!("the path in {name:?} is not absolute")));
    }
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        _ => Err(Error::unimplemented(format!("streams of scheme {scheme}:// are not supported"))),
    }
}

fn decode(text: &str) -> PathBuf {
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
    OsString::from_vec(bytes).into()
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
        let err = parse("binary:///usr/bin/logger").unwrap_err();
        assert_eq!(err.code(), Code::UNIMPLEMENTED);
        assert!(err.to_string().contains("binary://"), "{err}");
        assert_eq!(parse("file://a/b").unwrap_err().code(), Code::INVALID_ARGUMENT);
    }
}
