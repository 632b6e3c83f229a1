//! The two calls that CRIU makes, word by word.

use std::ffi::OsString;

/// A call of CRIU's.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Archive what is in the folder to the output.
    Create(OsString),
    /// Make the tree in the folder from the input.
    Extract(OsString),
}

const CREATE: [&str; 10] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
];

const EXTRACT: [&str; 5] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"];

impl Call {
    /// `None` for every other call.
    pub(crate) fn read(arguments: &[OsString]) -> Option<Self> {
        if let Some([folder, what]) = after(arguments, &CREATE)
            && what == "."
        {
            return Some(Self::Create(folder.clone()));
        }
        match after(arguments, &EXTRACT) {
            Some([folder]) => Some(Self::Extract(folder.clone())),
            _ => None,
        }
    }
}

fn after<'a>(arguments: &'a [OsString], words: &[&str]) -> Option<&'a [OsString]> {
    let (first, rest) = arguments.split_at_checked(words.len())?;
    first.iter().zip(words).all(|(argument, word)| argument == word).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Option<Call> {
        Call::read(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn only_the_exact_calls_are_taken() {
        let create = [&CREATE[..], &["/proc/self/fd/0", "."]].concat();
        assert_eq!(read(&create), Some(Call::Create("/proc/self/fd/0".into())));
        let extract = [&EXTRACT[..], &["/mnt/a b"]].concat();
        assert_eq!(read(&extract), Some(Call::Extract("/mnt/a b".into())));
        assert_eq!(read(&[]), None);
        for call in [&create, &extract] {
            for at in 0..call.len() - 1 {
                let mut other = call.clone();
                other.remove(at);
                assert_eq!(read(&other), None, "without word {at}");
                let mut other = call.clone();
                other.insert(at, "--xattrs");
                assert_eq!(read(&other), None, "with one more word at {at}");
            }
            assert_eq!(read(&[call, &["more"][..]].concat()), None);
        }
        assert_eq!(read(&[&CREATE[..], &["/proc/self/fd/0", "./a"]].concat()), None);
    }
}
