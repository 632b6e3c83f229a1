//! What a client says at its end.

use std::time::Duration;

/// What happened on one connection, or on all of them.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) connections: u32,
    pub(crate) requests: u64,
    pub(crate) errors: Vec<String>,
    pub(crate) longest_gap: Duration,
    pub(crate) resent: u64,
    pub(crate) sockets: Vec<String>,
}

impl Report {
    pub(crate) fn new(connections: u32) -> Self {
        Self { connections, ..Self::default() }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.errors.extend(other.errors);
        self.longest_gap = self.longest_gap.max(other.longest_gap);
        self.resent += other.resent;
        self.sockets.extend(other.sockets);
    }

    /// One line. `reconnects` is always 0: it says so for those who read only this.
    pub(crate) fn json(&self) -> String {
        format!(
            "{{\"connections\":{},\"requests\":{},\"errors\":{},\"longest_gap_ms\":{:.1},\
             \"reconnects\":0,\"resent\":{},\"sockets\":{}}}",
            self.connections,
            self.requests,
            list(&self.errors),
            self.longest_gap.as_secs_f64() * 1000.0,
            self.resent,
            list(&self.sockets),
        )
    }
}

fn list(texts: &[String]) -> String {
    let quoted: Vec<_> = texts.iter().map(|text| quote(text)).collect();
    format!("[{}]", quoted.join(","))
}

fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for char in text.chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            char if char < ' ' => quoted.push_str(&format!("\\u{:04x}", u32::from(char))),
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_json_whatever_the_errors_say() {
        let mut report = Report::new(2);
        report.errors.push("a \"quoted\" \\ line\nand another".into());
        report.longest_gap = Duration::from_micros(1500);
        assert_eq!(
            report.json(),
            r#"{"connections":2,"requests":0,"errors":["a \"quoted\" \\ line\u000aand another"],"longest_gap_ms":1.5,"reconnects":0,"resent":0,"sockets":[]}"#
        );
    }
}
