//! Holds memory of one kind and leaves it alone.

use std::sync::Mutex;

use crate::Options;
use crate::kinds::make;
use crate::pattern::{Mark, PAGE};
use crate::server;

pub(crate) fn run(options: &Options) -> Result<(), String> {
    let pages = options.megabytes * (1 << 20) / PAGE;
    let refused = |error| format!("{:?}: {error}", options.kind);
    let mut area = make(options.kind, 1, pages).map_err(refused)?;
    for page in 0..area.pages() {
        area.write(page, Mark::new(1, page as u64 + 1)).map_err(refused)?;
    }
    let area = Mutex::new(area);
    let answer = move |question: &str| {
        let (what, page) = question.split_once(' ').unwrap_or((question, ""));
        match (what, area.lock()) {
            ("check", Ok(area)) => match area.verify() {
                Ok(pages) => format!("ok {pages} pages"),
                Err(wrong) => format!("wrong: {wrong}"),
            },
            ("guard", Ok(mut area)) => match page.parse().map(|page| area.toggle_guard(page)) {
                Ok(Ok(())) => "ok".to_owned(),
                refused => format!("{refused:?}"),
            },
            _ => "say check or guard PAGE".to_owned(),
        }
    };
    server::run(options.port, answer, || false)
}
