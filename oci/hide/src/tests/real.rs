//! A real CRIU on a test host: `cargo test -p ferry-hide -- --ignored --nocapture`, after
//! `cargo build -p ferry-tests -p ferry-tar --bins`. It prints what each part brings.

use super::stage::{built, library};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A test host, which ends with this program.
struct Host {
    testbed: Child,
    pid: String,
}

impl Host {
    fn start() -> Self {
        let mut testbed = Command::new(built("testbed"));
        testbed.args(["hold", "--hosts", "1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut testbed = testbed.spawn().expect("build ferry-tests first");
        let mut lines =
            BufReader::new(testbed.stdout.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.starts_with("a ")).expect("a host");
        let pid = line.split_whitespace().last().unwrap().to_owned();
        Self { testbed, pid }
    }

    fn run(&self, script: &str) -> String {
        let mut shell = Command::new("nsenter");
        shell.args(["--all", "--target", &self.pid, "bash", "-ec", script]).stdin(Stdio::null());
        let output = shell.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{script}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    fn install(&self, file: PathBuf) {
        let to = PathBuf::from(format!("/proc/{}/root/tmp", self.pid));
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The end of its input ends it, and it removes everything.
        drop(self.testbed.stdin.take());
        let _ = self.testbed.wait();
    }
}

/// The number after `name=` or `name: `.
fn number(line: &str, name: &str) -> u64 {
    let at = line.find(name).unwrap_or_else(|| panic!("no {name} in {line}")) + name.len();
    let digits: String = line[at..]
        .chars()
        .skip(1)
        .skip_while(|c| *c == ' ')
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

#[test]
#[ignore = "starts a test host and takes a minute"]
fn a_real_dump_takes_the_same_time_at_any_size() {
    let host = Host::start();
    for file in [library(), built("examples/dump"), built("ferry-tar")] {
        host.install(file);
    }
    host.run(
        "ctr run -d --null-io --net-host docker.io/library/redis:latest r redis-server \
         --protected-mode no --save '' --enable-debug-command yes; \
         until redis-cli ping 2>/dev/null | grep PONG; do sleep 0.1; done",
    );
    let (hide, tar) = ("hide=/tmp/libferry_hide.so", "tar=/tmp/ferry-tar");
    for keys in [60_000, 640_000] {
        host.run(&format!("redis-cli debug populate {keys} key 500"));
        for options in [String::new(), tar.into(), hide.into(), format!("{hide} {tar}")] {
            let dump = format!(
                "rm -rf /tmp/d; /tmp/dump /run/containerd/runc/default r \
                 $(ctr task ls | awk '$1 == \"r\" {{ print $2 }}') /tmp/d {options}"
            );
            let lines: Vec<_> = (0..5).map(|_| host.run(&dump)).collect();
            let mut times: Vec<_> = lines.iter().map(|line| number(line, "dump_us")).collect();
            times.sort_unstable();
            println!("{keys} keys, {options:60} median {} us, {}", times[2], lines[0].trim());
            for line in lines {
                let bytes = number(&line, "bytes");
                if options.contains("hide") {
                    assert!(bytes < 4 << 20, "{line}");
                    assert!(number(&line, "scans_hidden") > 0 && number(&line, "smaps_given") == 1);
                    assert!(number(&line, "errors") == 0, "{line}");
                } else {
                    assert!(bytes > keys * 500, "{line}");
                }
                if options.contains("tar") {
                    assert!(number(&line, "fast") > 0 && number(&line, "real") == 0, "{line}");
                }
            }
            assert_eq!(host.run("redis-cli dbsize").trim(), keys.to_string());
        }
    }
}
