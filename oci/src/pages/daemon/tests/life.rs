//! A store from its beginning to its end, and what it refuses.

use std::os::unix::fs::PermissionsExt;

use super::super::Meta;
use super::*;

#[test]
fn an_aborted_restore_leaves_the_store_whole_for_the_next() {
    let mut rig = Rig::ready(&[3]);
    rig.client.fill().expect("fill");
    let mut first = rig.task(3, "read 0 100;say there;wait;hang-up");
    first.hear("there");
    let status = rig.wait_for("filling", |status| status.filled > 0);
    assert_eq!(status.state, State::Restoring);
    first.go();
    first.right();
    let status = rig.wait_for("the abort", |status| status.state == State::Receiving);
    assert_eq!((status.tasks, status.pages_left), (0, 0));
    let mut store = rig.open();
    assert_eq!(store.verify().expect("verify"), 0);
    assert_eq!(store.pages(), status.pages);
    store.write(3, task::BASE, &[0; PAGE as usize]).expect("it takes pages again");
    rig.client.listen(&rig.socket).expect("listen again");
    store.complete().expect("complete");
    rig.client.fill().expect("fill");
    rig.task(3, "marker;check").right();
    rig.end();
}

#[test]
fn a_restore_can_be_aborted_by_request_until_it_is_over() {
    let rig = Rig::ready(&[3]);
    let mut task = rig.task(3, "read 0 9;say there;wait");
    task.hear("there");
    rig.client.abort_restore().expect("abort");
    assert_eq!(rig.status().state, State::Receiving);
    drop(task);
    rig.get_ready(&[3]);
    rig.client.hold_fill().expect("hold");
    let mut task = rig.task(3, "marker;say over;wait;check");
    task.hear("over");
    rig.wait_for("the end of the restore", |status| status.state == State::Running);
    for refused in [rig.client.abort_restore(), rig.client.drop_store()] {
        let error = refused.expect_err("tasks run").to_string();
        assert_eq!(error, "page daemon refused: the restore is over: its tasks would find zeros");
    }
    task.go();
    task.right();
}

#[test]
fn a_store_nobody_uses_ends_after_its_time_and_not_while_it_is_written() {
    let mut rig =
        Rig::with(&Limits { disk: 0, expiry: Duration::from_millis(300), ..Limits::default() });
    let store = rig.open();
    std::thread::sleep(Duration::from_millis(600));
    assert!(rig.status().writer);
    drop(store);
    rig.end();
}

#[test]
fn a_store_can_be_dropped() {
    let mut rig = Rig::ready(&[3]);
    rig.client.drop_store().expect("drop");
    rig.end();
}

#[test]
fn there_is_one_writer_and_another_after_it() {
    let rig = Rig::new();
    let mut store = rig.open();
    store.write(1, 0, &[7; PAGE as usize]).expect("write");
    let second = || Client::connect(&rig.dir).expect("connect").open_store("redis", "migration-2");
    let error = second().expect_err("a second writer").to_string();
    assert_eq!(error, "page daemon refused: the store has a writer already");
    let error = rig.client.complete().expect_err("not the writer").to_string();
    assert_eq!(error, "page daemon refused: the store has a writer that is not you");
    drop(store);
    rig.wait_for("the writer's end", |status| !status.writer);
    let mut store = second().expect("the next writer");
    assert_eq!((store.pages(), store.verify().expect("verify")), (1, 0));
    assert_eq!(rig.status().migration, "migration-2");
}

#[test]
fn the_folder_says_what_it_holds_and_is_for_root_alone() {
    let rig = Rig::new();
    let made = Meta::read(&rig.dir).expect("description");
    assert!(made.expires.is_some_and(|expires| expires > made.created));
    let mut store = rig.open();
    rig.write(&mut store, &[3]);
    let meta = Meta::read(&rig.dir).expect("description");
    assert_eq!((meta.container.as_str(), meta.migration.as_str()), ("redis", "migration-1"));
    assert_eq!((meta.expires, meta.keeper), (None, rig.keeper.id()));
    drop(store);
    rig.wait_for("the writer's end", |status| !status.writer);
    let list = Meta::list(rig.dir.parent().expect("parent")).expect("list");
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].0, rig.dir);
    assert!(list[0].1.bytes >= 1000 * PAGE && list[0].1.expires.is_some(), "{list:?}");
    for (path, mode) in [(rig.dir.clone(), 0o700), (rig.dir.join("control.sock"), 0o600)] {
        assert_eq!(path.metadata().expect("metadata").permissions().mode() & 0o777, mode);
    }
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    use super::super::protocol;
    use nix::sys::socket::{MsgFlags, recv, send};
    use std::os::fd::AsRawFd;
    let rig = Rig::ready(&[3]);
    let before = rig.status();
    let long = vec![b'x'; 20 << 10];
    let bad: [&[u8]; 6] = [
        b"x",
        b"\x01\0\0\0",
        b"\x01\0\0\0{",
        b"\x01\0\0\0\"explode\"",
        b"\x02\0\0\0\"drop\"",
        &long,
    ];
    for request in bad {
        let fd = protocol::connect(&rig.dir.join("control.sock")).expect("connect");
        send(fd.as_raw_fd(), request, MsgFlags::empty()).expect("send");
        let mut answer = [0; 200];
        let n = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).expect("answer");
        assert!(String::from_utf8_lossy(&answer[..n]).contains("not a request of version 1"));
        assert_eq!(recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()), Ok(0), "closed");
    }
    assert_eq!(rig.status(), before);
}

#[test]
fn a_restore_that_talks_nonsense_is_aborted() {
    for nonsense in [&b"\0\0\0\0"[..], b"abc", b"\x05\0\0\0x"] {
        let rig = Rig::ready(&[3]);
        let mut socket = std::os::unix::net::UnixStream::connect(&rig.socket).expect("connect");
        rig.wait_for("the restore", |status| status.state == State::Restoring);
        socket.write_all(nonsense).expect("write");
        rig.wait_for("the abort", |status| status.state == State::Receiving);
    }
}

#[test]
fn memory_is_given_back_as_it_is_filled() {
    let rig = Rig::ready(&[3]);
    rig.client.hold_fill().expect("hold");
    let mut task = rig.task(3, "marker;say over;wait;check;say checked;wait");
    task.hear("over");
    task.go();
    task.hear("checked");
    // By faults alone all chunks are done: nothing of the store's memory may be left.
    let files = || {
        std::fs::read_dir(format!("/proc/{}/fd", rig.keeper.id())).into_iter().flatten().flatten()
    };
    let blocks = || {
        use std::os::unix::fs::MetadataExt;
        files()
            .filter(|fd| {
                std::fs::read_link(fd.path())
                    .is_ok_and(|link| link.to_string_lossy().contains("ferry-pages"))
            })
            .filter_map(|fd| Some(std::fs::metadata(fd.path()).ok()?.blocks()))
            .sum::<u64>()
    };
    let start = Instant::now();
    while blocks() > 0 {
        assert!(start.elapsed() < PATIENCE, "{} blocks are left", blocks());
        std::thread::sleep(Duration::from_millis(5));
    }
    task.go();
    task.right();
}
