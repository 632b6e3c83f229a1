//! Clocks: they never go back, and never faster than the time that has gone by for all.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use crate::timers::{CLOCK_BOOTTIME, CLOCK_MONOTONIC, now};
use crate::turn::{Done, FOLDER, In, Turn, Wrong, holds};

const CLOCKS: [(&str, i32); 2] = [("monotonic", CLOCK_MONOTONIC), ("boot", CLOCK_BOOTTIME)];
const HOUR: i64 = 3_600_000_000_000;
/// Both clocks are not read in one moment.
const SLACK: Duration = Duration::from_millis(50);

fn all() -> Result<[i64; 2], Wrong> {
    Ok([now(CLOCK_MONOTONIC)?, now(CLOCK_BOOTTIME)?])
}

/// Of the process itself, after each of several checkpoints.
pub(crate) fn go_on(turn: &mut Turn) -> Done {
    loop {
        let (mut was, begun) = (all()?, SystemTime::now());
        if turn.pass()? {
            was[1] -= HOUR;
        }
        let (is, most) = (all()?, begun.elapsed().unwrap_or_default() + SLACK);
        for (n, (name, _)) in CLOCKS.iter().enumerate() {
            let gone = is[n] - was[n];
            let most = most.as_nanos() as i64;
            holds(
                &format!("the {name} clock has gone on by 0 to {most} ns: {gone}"),
                (0..=most).contains(&gone),
            )?;
        }
        sleep(Duration::from_millis(20));
        let later = all()?;
        holds("both go on", later.iter().zip(is).all(|(later, is)| *later >= is + 20_000_000))?;
        if !turn.goes_on() {
            return Ok(());
        }
    }
}

/// Of a process that comes into the container: what it says lies between what this one says before
/// and after it.
pub(crate) fn in_others(turn: &mut Turn) -> Done {
    loop {
        let was = all()?;
        let spoiled = turn.pass()?;
        let file = format!("{FOLDER}/now");
        if turn.is_control() {
            // In a container somebody else has done that just before he asks.
            Command::new("/proc/self/exe").args(["now", &file]).status()?;
        }
        let text = fs::read_to_string(&file).at("read what the other has said")?;
        fs::remove_file(&file)?;
        let is = all()?;
        for (n, (name, _)) in CLOCKS.iter().enumerate() {
            let said = text.split(' ').nth(n).and_then(|said| said.parse::<i64>().ok());
            let said = said.ok_or_else(|| Wrong(format!("it has said {text}")))?;
            let said = if spoiled { said + HOUR } else { said };
            let (after, before) = (said - was[n], is[n] - said);
            let what = format!("it reads the {name} clock {after} ns after and {before} ns before");
            holds(&what, after >= 0 && before >= 0)?;
        }
        if !turn.goes_on() {
            return Ok(());
        }
    }
}

/// Writes what the clocks say.
pub(crate) fn tell(file: &str) -> Result<(), Wrong> {
    let [monotonic, boot] = all()?;
    fs::write(file, format!("{monotonic} {boot}")).map_err(Wrong::from)
}
