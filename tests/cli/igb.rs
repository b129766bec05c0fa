//! `vfio-uring serve igb`, as a process.

use std::fs;

use rustix::process::Signal;

use crate::support::{Process, run};

fn serve(socket: &str, options: &[&str]) -> Process {
    let process = Process::start(&[&["serve", "igb", "--socket", socket], options].concat());
    let line = process.line();
    assert!(line.contains(socket), "{line}");
    process
}

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().into()
}

#[test]
fn info_shows_both_ends_of_a_cable() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (path(&dir, "one.sock"), path(&dir, "two.sock"));
    let process = serve(&one, &["--wire", &format!("peer:{two}"), "--mac", "02:00:00:00:00:0a"]);
    for socket in [&one, &two] {
        let json = run(&format!("info vfio-user:{socket} --output-format json")).expect_success().json();
        assert_eq!((&json["pci"]["vendor"], &json["pci"]["device"]), (&0x8086.into(), &0x10c9.into()), "{json}");
        assert_eq!(json["pci"]["class"], 0x02_00_00);
        let shown = run(&format!("info vfio-user:{socket}"));
        assert!(shown.expect_success().stdout.contains("MSI-X"), "{}", shown.stdout);
    }
    process.signal(Signal::TERM);
    let ended = process.end();
    assert!(ended.expect_success().stdout.contains("02:00:00:00:00:0b"), "{ended:?}");
    assert!(!fs::exists(&one).unwrap() && !fs::exists(&two).unwrap(), "the sockets are removed");
}

#[test]
fn wires_that_can_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (path(&dir, "nic.sock"), path(&dir, "out.pcap"));
    for wire in ["sink", "none", "generator:1514,4", &format!("pcap-out:{file}")] {
        let process = serve(&socket, &["--wire", wire]);
        run(&format!("info vfio-user:{socket}")).expect_success();
        process.signal(Signal::INT);
        process.end().expect_success();
    }
    assert_eq!(fs::read(&file).unwrap().len(), 24, "a header, no packets");
    let both = format!("serve igb --socket {socket} --wire pcap-in:{file}.not --wire pcap-out:{file}");
    run(&both).expect_failure(1, "out.pcap.not");
}

#[test]
fn what_is_refused() {
    for (options, part) in [
        ("", "--socket"),
        ("--socket /s --mac 01:00:00:00:00:00", "MAC"),
        ("--socket /s --wire string", "a wire is"),
        ("--socket /s --wire sink --wire none", "one only"),
        ("--socket /s --wire peer:/s", "socket of its own"),
        ("--socket /s --wire generator:20", "60 to 9724"),
    ] {
        run(&format!("serve igb {options}")).expect_failure(2, part);
    }
    run("serve igb --socket /nowhere/at/all").expect_failure(1, "/nowhere/at/all");
}
