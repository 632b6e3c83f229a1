//! The pauses as a picture: a bar from the median to the 95th percentile, a line from the smallest
//! to the greatest, on a logarithmic scale.

use std::fmt::Write;

use crate::record::Setting;
use crate::table::Row;
use crate::ways::Way;

const WIDTH: f64 = 900.0;
/// Left of it are the names.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 870.0;
const TOP: f64 = 50.0;
const LINE: f64 = 24.0;
/// The scale, milliseconds.
const SCALE: [f64; 2] = [5.0, 100_000.0];
const TICKS: [(f64, &str); 6] = [
    (10.0, "10 ms"),
    (20.0, "20"),
    (100.0, "100"),
    (1000.0, "1 s"),
    (10_000.0, "10 s"),
    (100_000.0, "100 s"),
];

/// The picture.
pub(crate) fn draw(rows: &[Row], setting: &Setting) -> String {
    let height = TOP + LINE * (rows.len() as f64 + 2.5);
    let bottom = TOP + LINE * rows.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">Pause of a move: median to p95, smallest to \
         greatest</text>\n"
    );
    for (ms, name) in TICKS {
        let x = place(ms);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\n\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>",
            bottom + 16.0
        );
    }
    for (n, row) in rows.iter().enumerate() {
        let y = TOP + LINE * (n as f64 + 0.5);
        let [cell, way] = row.names;
        let label = escape(&format!("{cell} {way}"));
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>",
            LEFT - 8.0,
            y + 4.0
        );
        let Some(pause) = row.pause else { continue };
        let [min, p50, p95, max] = [pause.min, pause.p50, pause.p95, pause.max].map(place);
        let color = if Way::is_rival(way) { "#c44" } else { "#38a" };
        let _ = writeln!(
            svg,
            "<line x1=\"{min:.1}\" x2=\"{max:.1}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{color}\"/>\n\
             <rect x=\"{p50:.1}\" y=\"{}\" width=\"{:.1}\" height=\"12\" fill=\"{color}\"/>\n\
             <text x=\"{:.1}\" y=\"{}\">{:.1}</text>",
            y - 6.0,
            (p95 - p50).max(2.0),
            max.max(p95) + 6.0,
            y + 4.0,
            pause.p50
        );
    }
    let note = escape(&format!("{}; {}", setting.command, setting.machine));
    let _ = writeln!(
        svg,
        "<text x=\"8\" y=\"{}\" font-size=\"9\" fill=\"#555\">{note}</text>\n</svg>",
        height - 10.0
    );
    svg
}

/// Where so many milliseconds stand.
fn place(ms: f64) -> f64 {
    let [low, high] = SCALE.map(f64::ln);
    LEFT + (ms.clamp(SCALE[0], SCALE[1]).ln() - low) / (high - low) * (RIGHT - LEFT)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Move;

    #[test]
    fn longer_pauses_stand_further_to_the_right_inside_the_picture() {
        assert!(place(20.0) < place(21.0));
        assert_eq!((place(0.0), place(1e9)), (LEFT, RIGHT));
    }

    #[test]
    fn every_row_is_drawn_and_text_cannot_end_an_element() {
        let moves =
            [20.0, 900.0].map(|ms| Move { cell: "c", pause_ms: Some(ms), ..Move::default() });
        let setting = Setting { machine: "<m>".into(), command: "a & b".into(), load: "".into() };
        let svg = draw(&Row::all(&moves), &setting);
        assert_eq!(svg.matches("height=\"12\"").count(), 1);
        assert!(svg.contains("a &amp; b; &lt;m&gt;"));
        assert!(svg.trim_end().ends_with("</svg>"));
    }
}
