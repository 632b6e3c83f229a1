//! The log of runc: JSON, one message a line. crun breaks its messages into lines, and others write
//! plain text.

use serde::Deserialize;
use std::fs;
use std::path::Path;

/// Why there is no error to be read from a log.
#[derive(Debug, thiserror::Error)]
#[error("read runc's log")]
pub struct LogError(#[from] std::io::Error);

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The last error that runc wrote to `log`, without its line break; of a log that is not JSON, its
/// end. `None` if it wrote none.
pub fn last_error(log: &Path) -> Result<Option<String>, LogError> {
    Ok(parse(&String::from_utf8_lossy(&fs::read(log)?)))
}

fn parse(log: &str) -> Option<String> {
    serde_json::Deserializer::from_str(log)
        .into_iter::<Message>()
        .map_while(Result::ok)
        .filter(|message| matches!(message.level.as_str(), "error" | "fatal"))
        .map(|message| message.msg.trim().to_string())
        .filter(|msg| !msg.is_empty())
        .last()
        .or_else(|| {
            let plain = !log.trim_start().starts_with('{');
            plain.then(|| tail(log)).flatten()
        })
}

/// How many lines, and bytes of each, say why something failed.
const TAIL: (usize, usize) = (4, 512);

/// The last lines of `text` in one; `None` if there is nothing in it.
pub fn tail(text: &str) -> Option<String> {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(TAIL.0)..).unwrap_or_default();
    let short = |line: &&str| line.chars().take(TAIL.1).collect::<String>();
    let text = last.iter().map(short).collect::<Vec<_>>().join("; ");
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_wins_over_warnings_and_older_errors() {
        let log = concat!(
            r#"{"level":"error","msg":"first","time":"t"}"#,
            "\n",
            r#"{"level":"error","msg":"second \"quoted\"\n","time":"t"}"#,
            "\n",
            r#"{"level":"warning","msg":"third","time":"t"}"#,
            "\n{\"level\":\"err"
        );
        assert_eq!(parse(log).as_deref(), Some("second \"quoted\""));
    }

    #[test]
    fn no_error_is_none() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("\n"), None);
        assert_eq!(parse(r#"{"level":"debug","msg":"x"}"#), None);
    }

    #[test]
    fn a_message_may_be_broken_into_lines() {
        let log =
            "{\n  \"msg\": \"no such cgroup\",\n  \"level\": \"error\",\n  \"time\": \"t\"\n}\n";
        assert_eq!(parse(log).as_deref(), Some("no such cgroup"));
    }

    #[test]
    fn a_plain_log_says_it_at_its_end() {
        assert_eq!(parse("1\n2\n\n3\n4\n5\n").as_deref(), Some("2; 3; 4; 5"));
        assert_eq!(tail(&"x".repeat(2000)).map(|text| text.len()), Some(512));
    }

    #[test]
    fn a_missing_log_is_an_error() {
        assert!(last_error(Path::new("/nonexistent/log.json")).is_err());
    }
}
