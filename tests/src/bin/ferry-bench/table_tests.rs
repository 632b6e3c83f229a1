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
    let cells = rows[0].cells();
    assert_eq!(cells[2..10], ["3", "1", "2", "800.0", "900.0", "900.0", "900.0", "801.0"]);
    assert_eq!(rows[0].steps(), "dump 400.0");
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
    let table: Vec<_> = text.lines().take_while(|line| !line.is_empty()).collect();
    assert_eq!(table.len(), 5);
    assert!(table.iter().all(|line| line.matches('|').count() == 16), "{text}");
    assert!(text.contains("hack/bench migrate"));
}
