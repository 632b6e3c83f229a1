//! Answers lines on a TCP port.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use crate::sys;

/// Answers until a signal comes or `died` says that there is nothing to answer for.
pub(crate) fn run(
    port: u16,
    answer: impl Fn(&str) -> String + Send + Sync + 'static,
    died: impl Fn() -> bool,
) -> Result<(), String> {
    let listener =
        TcpListener::bind(("0.0.0.0", port)).map_err(|e| format!("listen on {port}: {e}"))?;
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || serve(&stream, &*answer));
        }
    });
    println!("ready");
    while !sys::stopped() {
        if died() {
            return Err("a process has died".to_owned());
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn serve(mut stream: &TcpStream, answer: &dyn Fn(&str) -> String) -> io::Result<()> {
    stream.set_nodelay(true)?;
    for line in BufReader::new(stream).lines() {
        let text = answer(line?.trim()) + "\n";
        stream.write_all(text.as_bytes())?;
    }
    Ok(())
}
