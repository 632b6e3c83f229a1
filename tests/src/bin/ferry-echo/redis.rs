//! A client of redis: each connection counts in a key of its own, and reads back every number.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::client::{Connection, LOOK, fill};
use crate::frame::wrong;

pub(crate) fn connect(address: &str, number: u32) -> io::Result<Redis> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOOK))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let key = format!("ferry-echo:{}:{}:{number}", std::process::id(), now.as_micros());
    Ok(Redis { stream, key })
}

/// One connection to redis.
pub(crate) struct Redis {
    stream: TcpStream,
    key: String,
}

impl Connection for Redis {
    /// Odd requests set the next number, even ones ask for it.
    fn request(&mut self, n: u64) -> io::Result<()> {
        let value = n.div_ceil(2).to_string();
        let (command, wanted) = match n % 2 {
            1 => (encode(&["SET", &self.key, &value]), "OK"),
            _ => (encode(&["GET", &self.key]), value.as_str()),
        };
        self.stream.write_all(&command)?;
        let answer = self.answer()?;
        if answer != wanted {
            return Err(wrong(&format!("the answer was {answer:?}, not {wanted:?}")));
        }
        Ok(())
    }

    fn local(&self) -> String {
        self.stream.local_addr().map_or_else(|e| e.to_string(), |address| address.to_string())
    }
}

impl Redis {
    /// One answer: a status or a string.
    fn answer(&mut self) -> io::Result<String> {
        let line = self.line()?;
        let Some(length) = line.strip_prefix('$') else {
            return match line.strip_prefix('+') {
                Some(status) => Ok(status.into()),
                None => Err(wrong(&line)),
            };
        };
        let Ok(length) = length.parse::<usize>() else {
            return Ok("nothing".into());
        };
        let mut text = vec![0; length.min(1 << 20) + 2];
        fill(&mut self.stream, &mut text)?;
        text.truncate(text.len() - 2);
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            fill(&mut self.stream, &mut byte)?;
            line.push(byte[0]);
            if line.len() > 1000 {
                return Err(wrong("a line without an end"));
            }
        }
        line.truncate(line.len() - 2);
        Ok(String::from_utf8_lossy(&line).into_owned())
    }
}

fn encode(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len());
    for word in words {
        bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    bytes.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn commands_are_arrays_of_strings() {
        assert_eq!(encode(&["GET", "ab"]), b"*2\r\n$3\r\nGET\r\n$2\r\nab\r\n");
    }
}
