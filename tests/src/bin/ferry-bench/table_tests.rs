use super::*;
use crate::client::Seen;

fn moved(cell: &'static str, way: &'static str, pause: Option<f64>) -> Move {
    let seen = |gap| Seen { longest_gap_ms: gap, answers: 1, lost: 1, error: None };
    Move {
        cell,
        way,
        pause_ms: pause,
        steps: pause.map(|ms| vec![("dump".to_owned(), ms / 2.0)]).unwrap_or_default(),
        client: pause.map(|ms| seen(ms + 1.0)),
        error: pause.is_none().then(|| "no room".to_owned()),
        ..Move::default()
    }
}

fn moves() -> Vec<Move> {
    vec![
        moved("one", "hand", Some(900.0)),
        moved("two", "auto", Some(20.0)),
        moved("one", "auto", Some(30.0)),
        moved("one", "hand", None),
        moved("one", "hand", Some(800.0)),
    ]
}

#[test]
fn ways_of_a_cell_stand_side_by_side() {
    let names: Vec<_> = Row::all(&moves()).iter().map(|row| row.names).collect();
    assert_eq!(names, [["one", "hand"], ["one", "auto"], ["two", "auto"]]);
}

#[test]
fn a_failed_move_is_counted_and_is_in_no_figure() {
    let rows = Row::all(&moves());
    let cells = &waits(&rows)[1];
    assert_eq!(cells[2..10], ["3", "1", "2", "800.0", "900.0", "900.0", "900.0", "801.0"]);
    assert_eq!(rows[0].steps(), "dump 400.0");
}

#[test]
fn costs_are_medians_and_the_peak_is_told_in_parts_of_what_is_resident() {
    let moved = |peak, tracked| Move {
        cell: "one",
        way: "auto",
        resident: Some(400_000_000),
        peak_destination: Some(peak),
        throughput: Some(Throughput { offered: 9, baseline: vec![100], tracked: vec![tracked] }),
        ..Move::default()
    };
    let moves = [(480_000_000, 97), (440_000_000, 99), (800_000_000, 98)];
    let moves: Vec<_> = moves.into_iter().map(|(peak, kept)| moved(peak, kept)).collect();
    let costs = costs(&Row::all(&moves));
    assert_eq!(costs[1][7..], ["480.0", "1.20", "2.00", "98.0", "97.0"]);
    assert_eq!(costs[0][7..], ["destination +MB", "of resident", "max", "kept %", "min"]);
}

#[test]
fn columns_stand_below_their_header() {
    let text = plain(&Row::all(&moves()));
    let lines: Vec<_> = text.lines().take(4).collect();
    let end = lines[0].find("pause p50").unwrap() + "pause p50".len();
    assert_eq!(&lines[1][end - 5..end], "800.0");
    assert_eq!(&lines[3][end - 4..end], "20.0");
}

#[test]
fn a_markdown_table_has_as_many_cells_in_every_line() {
    let setting = Setting {
        machine: "kernel".into(),
        command: "hack/bench migrate".into(),
        load: "1".into(),
    };
    let text = markdown(&Row::all(&moves()), &setting);
    let mut tables = text.split("\n\n").filter(|part| part.starts_with('|'));
    for bars in [16, 13, 4] {
        let table: Vec<_> = tables.next().unwrap().lines().collect();
        assert_eq!(table.len(), 5);
        assert!(table.iter().all(|line| line.matches('|').count() == bars), "{text}");
    }
    assert!(text.contains("hack/bench migrate"));
}
