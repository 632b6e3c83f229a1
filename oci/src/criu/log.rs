//! CRIU's own log: which line is the first error, and what helps against it.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

/// Lines of the log's end that are kept.
const TAIL: usize = 12;

/// What CRIU's log says about a failed run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// The first line that is an error, without its time stamp. Later ones mostly follow from it.
    pub first_error: Option<String>,
    /// The last lines.
    pub tail: Vec<String>,
    /// What to do about it, where that is known.
    pub cure: Option<&'static str>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.first_error {
            Some(line) => write!(f, "criu: {line}")?,
            None => match self.tail.last() {
                Some(line) => write!(f, "criu wrote no error, its last line: {line}")?,
                None => write!(f, "criu wrote no log")?,
            },
        }
        match self.cure {
            Some(cure) => write!(f, " ({cure})"),
            None => Ok(()),
        }
    }
}

/// Reads `log`, CRIU's dump.log or restore.log.
pub fn failure(log: &Path) -> io::Result<Failure> {
    Ok(parse(BufReader::new(File::open(log)?)))
}

/// CRIU's ids of the run that wrote `log`: one of them names the run's nftables table. Asked through its
/// RPC, CRIU says one as it starts, and another for the request.
pub fn run_ids(log: &Path) -> io::Result<Vec<String>> {
    let lines = BufReader::new(File::open(log)?).lines().map_while(Result::ok);
    Ok(lines.take(50).filter_map(|line| find_run_id(&line)).collect())
}

/// The version of the CRIU that wrote `log`.
pub fn version(log: &Path) -> io::Result<Option<String>> {
    let lines = BufReader::new(File::open(log)?).lines().map_while(Result::ok);
    Ok(lines.take(50).find_map(|line| find_version(&line)))
}

fn find_version(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("Version: ")?;
    rest.split_whitespace().next().map(str::to_string)
}

fn find_run_id(line: &str) -> Option<String> {
    let (_, id) = line.split_once("CRIU run id = ")?;
    let id = id.trim();
    let valid = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    valid.then(|| id.to_string())
}

fn parse(log: impl BufRead) -> Failure {
    let mut failure = Failure::default();
    let mut tail = VecDeque::with_capacity(TAIL);
    // Not `lines()`: a name that is not UTF-8 must not end the reading.
    for line in log.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        if failure.first_error.is_none()
            && let Some(error) = as_error(&line)
        {
            failure.cure = cure(error);
            failure.first_error = Some(error.to_string());
        }
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    failure.tail = tail.into();
    failure
}

/// The text of an error line: `(00.123456) pid: Error (file.c:12): text`.
fn as_error(line: &str) -> Option<&str> {
    let at = line.find("Error (")?;
    // Only time stamp and pid may stand before it.
    let prefix = line[..at].trim_end();
    let is_prefix = prefix.is_empty() || prefix.ends_with(')') || prefix.ends_with(':');
    let harmless = HARMLESS.iter().any(|text| line.contains(text));
    (is_prefix && !harmless).then(|| &line[at..])
}

/// Errors after which CRIU goes on as if nothing had been.
const HARMLESS: &[&str] = &["rlimit: Can't setup RLIMIT_NOFILE"];

/// Known errors and what helps.
const CURES: &[(&str, &str)] = &[
    ("Can't get 1:16 opt", "this CRIU is too old for the kernel: 4.2 or newer is needed"),
    ("Unexpected rt vDSO area bounds", "this CRIU is too old for the kernel"),
    ("ELF header magic mismatch", "the images are from a newer CRIU: use the same version"),
    ("Can't bind inet socket back", "the container's address is missing on this host"),
    ("In-flight connection", "a connection was being opened: try again"),
    ("Connected TCP socket", "established connections need --tcp-established"),
    ("External socket is used", "a unix socket is connected to a process outside"),
    ("[userfaultfd]", "the program uses userfaultfd, which CRIU cannot dump"),
    ("anon_inode:[io_uring]", "the program uses io_uring, which CRIU cannot dump"),
    // Since Linux 6.7 its descriptor cannot be passed on.
    ("send_fds failed (-22)", "the program uses io_uring, which CRIU cannot dump"),
    ("Some file locks are hold", "the program holds file locks: they need file_locks"),
    ("Can't lookup mount", "the container's files must lie on a real disk, not on an overlay"),
    ("Found dead task", "a task ended during the dump: try again"),
    ("is not a leader of its session", "a process outside leads the session"),
    ("Pid file", "the bundle has a pid file already"),
    ("already exists", "a pid of the container is taken in its namespace"),
];

fn cure(error: &str) -> Option<&'static str> {
    CURES.iter().find(|(text, _)| error.contains(text)).map(|(_, cure)| *cure)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
(00.000001) Version: 4.2
(00.000002) CRIU run id = 5d2a-76
(00.000002) CRIU run id = 5d2a-77
(00.000003) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self
(00.010000) 12: Dumping an Error (not one)
(00.020000) Error (criu/sk-inet.c:204): inet: Connected TCP socket, consider using option
(00.030000) Error (criu/cr-dump.c:2111): Dumping FAILED.
";

    #[test]
    fn the_first_error_is_found_with_its_cure() {
        let failure = parse(LOG.as_bytes());
        let error = failure.first_error.as_deref().unwrap();
        assert!(error.starts_with("Error (criu/sk-inet.c:204)"), "{error}");
        assert!(failure.cure.unwrap().contains("tcp-established"));
        assert_eq!(failure.tail.len(), 7);
        assert!(failure.to_string().starts_with("criu: Error (criu/sk-inet.c"));
    }

    #[test]
    fn bytes_that_are_not_text_do_not_hide_the_error() {
        let log = b"(00.1) \xff\xfe\n(00.2) 7: Error (a.c:1): boom\n";
        assert_eq!(parse(&log[..]).first_error.as_deref(), Some("Error (a.c:1): boom"));
    }

    #[test]
    fn a_log_without_an_error_gives_its_last_line() {
        let failure = parse("(00.1) fine\n".as_bytes());
        assert_eq!(failure.to_string(), "criu wrote no error, its last line: (00.1) fine");
        assert_eq!(parse(&b""[..]).to_string(), "criu wrote no log");
    }

    #[test]
    fn only_a_plain_run_id_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("log"), LOG).unwrap();
        assert_eq!(run_ids(&dir.path().join("log")).unwrap(), ["5d2a-76", "5d2a-77"]);
        assert_eq!(find_run_id("CRIU run id = x; rm -rf /"), None);
        assert_eq!(find_run_id("nothing"), None);
        assert_eq!(LOG.lines().find_map(find_version).as_deref(), Some("4.2"));
    }
}
