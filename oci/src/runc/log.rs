//! runc's JSON log.

use serde::Deserialize;
use std::fs;
use std::path::Path;

/// Why there is no error to be read from a log.
#[derive(Debug, thiserror::Error)]
#[error("read runc's log")]
pub struct LogError(#[from] std::io::Error);

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The last error that runc wrote to `log`, without its line break. `None` if it wrote none.
pub fn last_error(log: &Path) -> Result<Option<String>, LogError> {
    Ok(parse(&String::from_utf8_lossy(&fs::read(log)?)))
}

fn parse(log: &str) -> Option<String> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .filter(|line| matches!(line.level.as_str(), "error" | "fatal"))
        .map(|line| line.msg.trim().to_string())
        .rfind(|msg| !msg.is_empty())
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
        assert_eq!(parse("not json\n"), None);
    }

    #[test]
    fn a_missing_log_is_an_error() {
        assert!(last_error(Path::new("/nonexistent/log.json")).is_err());
    }
}
