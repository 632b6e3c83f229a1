//! The program against GNU tar: trees there and back, and everything that is handed on.

mod scene;

use scene::{Scene, create, extract, listing, members, must, run_shell, tar};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

/// Everything that is archived fast.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("a/b/c d")).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    fs::write(at.join("a/text"), "hello\n").unwrap();
    fs::write(at.join("a/b/block"), [7; 512]).unwrap();
    fs::write(at.join("a/b/odd"), vec![1; 70_001]).unwrap();
    fs::write(at.join("a/b/c d/new\nline \\ \u{e4}*?"), "x").unwrap();
    fs::write(at.join(format!("a/{}", "n".repeat(100 - "./a/".len()))), "longest").unwrap();
    symlink("text", at.join("a/link")).unwrap();
    symlink("/no/such", at.join("a/dangling")).unwrap();
    symlink("t".repeat(100), at.join("longest")).unwrap();
    run_shell(
        at,
        "mkfifo -m 622 fifo; mknod -m 666 null c 1 3; mknod -m 600 disk b 259 1048575; \
         mknod -m 000 whiteout c 0 0; mkdir -m 1777 sticky; mkdir -m 000 closed; mkdir -m 2755 g; \
         install -m 4755 empty suid; chmod 2711 suid; cp empty none; chmod 0 none; \
         chown 1000:2000 a/text g; chown -h 77:88 a/link; chown 2097151:5 fifo; \
         touch -h -d @1000000000 a/link; touch -d @1 null; touch -d @1600000000.75 a/text; \
         touch -d @0 empty; touch -d @1500000000 a/b a; chown 5:6 .; chmod 1751 .; touch -d @9 .",
    );
}

#[test]
fn a_tree_comes_back_as_it_was() {
    let scene = Scene::new();
    tree(&scene.from);
    must(create(&scene, "fast"));
    must(extract(&scene, "fast"));
    assert_eq!(listing(&scene.to), listing(&scene.from));
    assert_eq!(scene.counts(), "fast\nfast\n");
}

#[test]
fn the_real_tar_reads_our_archives() {
    let scene = Scene::new();
    tree(&scene.from);
    must(create(&scene, "fast"));
    must(extract(&scene, "real"));
    assert_eq!(listing(&scene.to), listing(&scene.from));
}

#[test]
fn archives_of_the_real_tar_are_handed_to_it() {
    let scene = Scene::new();
    tree(&scene.from);
    must(create(&scene, "real"));
    must(extract(&scene, "fast"));
    assert_eq!(listing(&scene.to), listing(&scene.from));
    assert_eq!(scene.counts(), "real\n");
}

#[test]
fn an_empty_folder_is_a_tree_too() {
    let scene = Scene::new();
    must(create(&scene, "fast"));
    must(extract(&scene, "fast"));
    assert_eq!(listing(&scene.to), listing(&scene.from));
    assert_eq!(scene.counts(), "fast\nfast\n");
}

#[test]
fn our_archives_have_the_members_that_the_real_tar_would_give_them() {
    let scene = Scene::new();
    tree(&scene.from);
    let _socket = UnixListener::bind(scene.from.join("socket")).unwrap();
    run_shell(&scene.from, "setfattr -n user.x -v y a/text 2>/dev/null || true");
    must(create(&scene, "real"));
    let theirs = members(&scene);
    must(create(&scene, "fast"));
    assert_eq!(members(&scene), theirs);
    assert_eq!(scene.counts(), "fast\n");
    assert!(!theirs.contains("socket") && theirs.contains("whiteout"));
}

#[test]
fn what_is_mounted_in_the_tree_is_left_out_as_the_real_tar_does() {
    let scene = Scene::new();
    tree(&scene.from);
    fs::create_dir(scene.from.join("mount")).unwrap();
    fs::write(scene.from.join("onto"), "below").unwrap();
    let archive = |how: &str| {
        // The mounts are in a namespace of their own and end with it.
        let call = tar(&scene, how, "create");
        let mut words = vec![call.get_program().to_owned()];
        words.extend(call.get_args().map(Into::into));
        let mut shell = std::process::Command::new("unshare");
        shell.args(["--mount", "sh", "-ec"]).current_dir(&scene.from).arg(
            "mount -t tmpfs none mount; echo x >mount/inner; mount --bind mount/inner onto; \
             mount --bind /dev/zero null; exec \"$@\" <.",
        );
        shell.arg("sh").args(&words).envs(call.get_envs().filter_map(|(k, v)| Some((k, v?))));
        shell.stdout(File::create(&scene.image).unwrap());
        must(shell.output().unwrap());
        // The mounted folder's own time is that of the mount.
        let lines = members(&scene);
        lines.lines().filter(|line| !line.ends_with("/mount/")).collect::<Vec<_>>().join("\n")
    };
    let (theirs, ours) = (archive("real"), archive("fast"));
    let stable = |text: &str| {
        let lines = text.lines().filter(|line| !line.ends_with(" ./onto"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(stable(&ours), stable(&theirs));
    assert_eq!(ours.contains("inner"), theirs.contains("inner"));
    assert_eq!(ours.contains("./onto"), theirs.contains("./onto"));
    assert_eq!(scene.counts(), "fast\n");
}

#[test]
fn unusual_content_is_handed_to_the_real_tar() {
    for (what, script) in [
        ("hard links", "echo x >a; ln a b"),
        ("holes", "truncate -s 1M a; echo x >>a"),
        ("long name", "mkdir $(printf 'n%.0s' $(seq 90)); cd n*; echo x >name_of_some_length"),
        ("long link", "ln -s $(printf 't%.0s' $(seq 101)) a"),
        ("large file", "head -c 9000000 /dev/zero >a"),
        ("large tree", "for i in 1 2 3; do head -c 3000000 /dev/zero >$i; done"),
        ("large owner", "echo x >a; chown 4000000000 a"),
        ("old time", "echo x >a; touch -d 1960-01-01 a"),
        ("deep", "for i in $(seq 70); do mkdir d; cd d; done"),
    ] {
        let scene = Scene::new();
        run_shell(&scene.from, script);
        must(create(&scene, "fast"));
        assert_eq!(scene.counts(), "real\n", "{what}");
        must(extract(&scene, "fast"));
        assert_eq!(scene.counts(), "real\nreal\n", "{what}");
        assert_eq!(listing(&scene.to), listing(&scene.from), "{what}");
    }
}

#[test]
fn other_calls_are_handed_to_the_real_tar() {
    let scene = Scene::new();
    let output = scene.command("fast").arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("GNU tar"));
    assert_eq!(scene.counts(), "real\n");
}

#[test]
fn a_folder_that_is_not_empty_is_handed_to_the_real_tar() {
    let scene = Scene::new();
    fs::write(scene.from.join("file"), "new").unwrap();
    must(create(&scene, "fast"));
    fs::write(scene.to.join("file"), "old and longer").unwrap();
    must(extract(&scene, "fast"));
    assert_eq!(scene.counts(), "fast\nreal\n");
    assert_eq!(fs::read_to_string(scene.to.join("file")).unwrap(), "new");
}

#[test]
fn an_input_that_cannot_be_read_twice_is_handed_on_untouched() {
    let scene = Scene::new();
    tree(&scene.from);
    must(create(&scene, "fast"));
    let mut cat = std::process::Command::new("cat");
    let mut cat = cat.arg(&scene.image).stdout(Stdio::piped()).spawn().unwrap();
    let mut call = tar(&scene, "fast", "extract");
    must(call.stdin(cat.stdout.take().unwrap()).output().unwrap());
    assert!(cat.wait().unwrap().success());
    assert_eq!(scene.counts(), "fast\nreal\n");
    assert_eq!(listing(&scene.to), listing(&scene.from));
}

#[test]
fn a_damaged_archive_fails_and_is_not_half_used_by_us() {
    let scene = Scene::new();
    fs::write(scene.from.join("file"), vec![3; 5000]).unwrap();
    must(create(&scene, "fast"));
    let mut image = fs::read(&scene.image).unwrap();
    image[3000] ^= 1;
    fs::write(&scene.image, image).unwrap();
    assert!(!extract(&scene, "fast").status.success());
    assert_eq!(scene.counts(), "fast\nreal\n");
}

#[test]
fn an_output_that_cannot_be_written_is_a_failure() {
    let scene = Scene::new();
    fs::write(scene.from.join("file"), "x").unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = tar(&scene, "fast", "create").stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn copies_of_this_program_do_not_call_each_other_for_ever() {
    let scene = Scene::new();
    let other = scene.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(scene::program(), other.join("tar")).unwrap();
    let path = format!("{}:{}", scene.bin().display(), other.display());
    let output = scene.command("fast").arg("--version").env("PATH", path).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn access_times_and_the_input_s_place_are_kept() {
    let scene = Scene::new();
    fs::write(scene.from.join("file"), "x").unwrap();
    must(create(&scene, "fast"));
    let file = fs::metadata(&scene.image).unwrap();
    assert_eq!(file.permissions().mode() & 0o7000, 0);
    let packed = fs::read(&scene.image).unwrap();
    // An image may begin anywhere in its file.
    fs::write(&scene.image, [&b"before"[..], &packed].concat()).unwrap();
    let mut input = File::open(&scene.image).unwrap();
    std::io::Seek::seek(&mut input, std::io::SeekFrom::Start(6)).unwrap();
    must(tar(&scene, "fast", "extract").stdin(input).output().unwrap());
    assert_eq!(scene.counts(), "fast\nfast\n");
    let (from, to) = (scene.from.join("file"), scene.to.join("file"));
    assert_eq!(fs::metadata(to).unwrap().mtime(), fs::metadata(from).unwrap().mtime());
}
