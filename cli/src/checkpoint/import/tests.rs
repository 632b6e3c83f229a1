use std::fs;
use std::io::Write;

use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::*;

/// An archive in a file: names with their kind and content.
fn archive(entries: &[(&str, EntryType, &[u8])]) -> tempfile::NamedTempFile {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o600);
        header.set_size(content.len() as u64);
        // A builder would refuse some.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&builder.into_inner().unwrap()).unwrap();
    file
}

const FILE: EntryType = EntryType::Regular;

/// What becomes of it, and the folder in which that happened.
fn unpack(entries: &[(&str, EntryType, &[u8])]) -> (Result<Import>, tempfile::TempDir) {
    let place = tempfile::tempdir().unwrap();
    let (images, folder) = (place.path().join("images"), place.path().join("archive"));
    fs::create_dir(&images).and_then(|()| fs::create_dir(&folder)).unwrap();
    (Import::unpack(archive(entries).path(), &images, &folder), place)
}

fn good() -> Vec<(&'static str, EntryType, &'static [u8])> {
    vec![
        ("artifacts", EntryType::Directory, b""),
        ("config.dump", FILE, br#"{"id":"0a","name":"box","rootfsImageName":"busybox"}"#),
        ("spec.dump", FILE, br#"{"hostname":"h","mounts":[]}"#),
        ("deleted.files", FILE, br#"["/etc/passwd","/a/b/c"]"#),
        ("checkpoint", EntryType::Directory, b""),
        ("checkpoint/inventory.img", FILE, b"inventory"),
        ("ctr.log", FILE, b"not of interest"),
    ]
}

#[test]
fn what_is_known_is_unpacked_and_nothing_else() {
    let (import, place) = unpack(&good());
    let import = import.unwrap();
    assert_eq!(import.id().as_deref(), Some("box"));
    assert_eq!(import.deleted, ["etc/passwd", "a/b/c"]);
    let names = |folder: &str| {
        let names = fs::read_dir(place.path().join(folder)).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("images"), ["inventory.img"]);
    assert_eq!(names("archive"), ["config.dump", "deleted.files", "spec.dump"]);
}

#[test]
fn what_leads_out_or_is_not_whole_is_refused() {
    let without = |name: &str| good().into_iter().filter(|e| e.0 != name).collect::<Vec<_>>();
    let with = |entry: (&'static str, EntryType, &'static [u8])| {
        let mut all = without(entry.0);
        all.push(entry);
        all
    };
    for (entries, why) in [
        (without("config.dump"), "config.dump is missing"),
        (without("spec.dump"), "spec.dump is missing"),
        (without("checkpoint/inventory.img"), "inventory.img is missing"),
        (with(("../evil", FILE, b"")), "leads out"),
        (with(("/etc/evil", FILE, b"")), "leads out"),
        (with(("checkpoint/../../evil", FILE, b"")), "leads out"),
        (with(("checkpoint/a/b", FILE, b"")), "no name of an image"),
        (with(("checkpoint/x.img", EntryType::Symlink, b"")), "is a link"),
        (with(("rootfs-diff.tar", EntryType::Symlink, b"")), "is a link"),
        (with(("checkpoint/x.img", EntryType::Link, b"")), "is a link"),
        (with(("checkpoint/x.img", EntryType::Fifo, b"")), "neither a file"),
        (with(("checkpoint/parent", EntryType::Symlink, b"")), "--with-previous"),
        (with(("deleted.files", FILE, br#"["/../etc"]"#)), "leads out"),
        (with(("deleted.files", FILE, br#"["/"]"#)), "leads out"),
        (with(("ferry.json", FILE, br#"{"version":9}"#)), "version 9"),
        (with(("config.dump", FILE, br#"{"namedVolumes":[{}]}"#)), "has volumes"),
        ([good(), good()].concat(), "exists"),
    ] {
        let (import, place) = unpack(&entries);
        let error = import.map(drop).unwrap_err();
        assert!(format!("{error:#}").contains(why), "{why}: {error:#}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "{why}");
    }
}

#[test]
fn mounts_of_podman_are_replaced_and_others_stay() {
    let mount = |target: &str, source: &str| json!({"destination": target, "type": "bind", "source": source, "options": ["bind"]});
    let podmans = "/var/lib/containers/storage/overlay-containers/0a/userdata";
    let others = [
        mount("/etc/hosts", "/srv/hosts"),
        mount("/data", &format!("{podmans}/hosts")),
        mount("/etc/hostname", &format!("{podmans}/hosts")),
    ];
    let mut spec = json!({"hostname": "h", "mounts": others});
    assert_eq!(mounts::take_out(&mut spec), Vec::<&str>::new());
    assert_eq!(spec["mounts"], json!(others));
    let own = ["/etc/hosts", "/dev/shm"]
        .map(|target| mount(target, &format!("{podmans}/{}", target.rsplit('/').next().unwrap())));
    let mut spec = json!({"hostname": "h", "mounts": own});
    let taken = mounts::take_out(&mut spec);
    assert_eq!(taken, ["/etc/hosts", "/dev/shm"]);
    assert_eq!(spec["mounts"].as_array().unwrap().len(), 1);
    assert_eq!(spec["mounts"][0]["type"], "tmpfs");
    let files = mounts::files(&taken, &spec);
    assert_eq!(files.len(), 1);
    assert!(String::from_utf8_lossy(&files[0].1).contains("127.0.0.1 h\n"), "{files:?}");
    // Where podman has taken it out, it comes back for those who have it.
    let mut spec = json!({"mounts": []});
    mounts::put_in(&mut spec, &["/run".to_owned()]);
    assert_eq!(spec["mounts"], json!([]));
    for _ in 0..2 {
        mounts::put_in(&mut spec, &["/dev/shm".to_owned()]);
        assert_eq!(spec["mounts"].as_array().map(Vec::len), Some(1));
    }
    // Ours come back under their name.
    let mut spec = json!({"mounts": [mount("/dev/shm/", "shm")]});
    mounts::put_in(&mut spec, &["/dev/shm".to_owned()]);
    assert_eq!(spec["mounts"], json!([mount("/dev/shm", "shm")]));
    // A name that would add lines is not taken.
    let evil = json!({"hostname": "h\n1.2.3.4 bank"});
    assert!(!String::from_utf8_lossy(&mounts::files(&taken, &evil)[0].1).contains("bank"));
}

#[test]
fn a_layer_has_whiteouts_before_files_and_then_what_has_changed() {
    let (import, place) = unpack(&good());
    let mut import = import.unwrap();
    import.files = vec![("/etc/hosts".to_owned(), b"hosts".to_vec())];
    let names = |import: &Import| {
        let mut bytes = Vec::new();
        import.write_layer(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names = archive.entries().unwrap();
        names
            .map(|entry| String::from_utf8(entry.unwrap().path_bytes().into_owned()).unwrap())
            .collect::<Vec<_>>()
    };
    let ours = ["etc/.wh.passwd", "a/b/.wh.c", "etc/hosts"];
    assert_eq!(names(&import), ours);
    let changed = archive(&[("log", FILE, b"1\n")]);
    fs::copy(changed.path(), place.path().join("archive/rootfs-diff.tar")).unwrap();
    assert_eq!(names(&import), [&ours[..], &["log"]].concat());
}

#[test]
fn a_layer_that_unpacks_to_more_than_there_is_room_for_is_refused() {
    let (import, place) = unpack(&good());
    let mut import = import.unwrap();
    let zeros = vec![0; 1 << 20];
    let changed = fs::read(archive(&[("log", FILE, &zeros)]).path()).unwrap();
    let gzip = {
        let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        to.write_all(&changed).unwrap();
        to.finish().unwrap()
    };
    let zstd = zstd::encode_all(changed.as_slice(), 3).unwrap();
    let whole = changed.len() as u64;
    for packed in [changed, gzip, zstd] {
        fs::write(place.path().join("archive/rootfs-diff.tar"), packed).unwrap();
        import.room = whole;
        import.write_layer(&mut std::io::sink()).unwrap();
        import.room = whole - 1;
        let error = import.write_layer(&mut std::io::sink()).unwrap_err();
        assert!(error.to_string().contains("more than there is room for"), "{error}");
    }
}

#[test]
fn memory_of_an_archive_is_not_written_more_often_than_there_is_room_for() {
    let place = tempfile::tempdir().unwrap();
    let shm = place.path().join("shm");
    fs::write(&shm, [0; 1000]).unwrap();
    let images = place.path().join("images");
    fs::create_dir(&images).unwrap();
    // Two file systems in memory at the same place.
    let mut image = [0x5456_4319u32.to_le_bytes(), 0x5556_3928u32.to_le_bytes()].concat();
    for device in [7, 8] {
        // Kind, device, root, target, that it is external and by which key.
        let start = [8, 5, 24, device];
        let record =
            [&start, &b"\x32\x01/\x3a\x09./dev/shm\x68\x01\x92\x01\x08/dev/shm"[..]].concat();
        image.extend((record.len() as u32).to_le_bytes());
        image.extend(record);
    }
    let change = |room: u64| {
        fs::write(images.join("mountpoints-1.img"), &image).unwrap();
        let _ = fs::remove_file(images.join("tmpfs-dev-7.tar.gz.img"));
        let _ = fs::remove_file(images.join("tmpfs-dev-8.tar.gz.img"));
        let mut room = room;
        mounts::change(&images, &["/dev/shm"], &shm, &mut room).map(|_| room)
    };
    assert_eq!(change(2500).unwrap(), 500);
    let error = change(1999).unwrap_err();
    assert!(format!("{error:#}").contains("room"), "{error:#}");
}
