//! `vfio-uring serve` and its clients, as two processes.

use std::{fs, os::unix::net::UnixListener, thread, time::Duration};

use rustix::process::Signal;

use crate::support::{Process, Server, run};

fn bench(server: &Server, options: &str) -> crate::support::Ended {
    run(&format!("bench --device {} --size 4m --runtime 0.2 --output-format json {options}", server.address()))
}

#[test]
fn one_client_after_another() {
    let server = Server::start("--size 16m");
    let json = bench(&server, "").expect_success().json();
    assert_eq!(json["device"], server.address());
    let json = bench(&server, "--rw randrw --verify").expect_success().json();
    assert_eq!(json["verify"]["mismatches"], 0);
    let socket = server.socket();
    server.stop().expect_success();
    assert!(!fs::exists(&socket).unwrap(), "the socket is removed");
}

#[test]
fn a_killed_client_leaves_the_server_serving() {
    let mut server = Server::start("--size 16m");
    for _ in 0..3 {
        let address = server.address();
        let client = Process::start(&["bench", "--device", &address, "--size", "4m", "--rw", "randrw", "--runtime", "1000"]);
        thread::sleep(Duration::from_millis(400));
        client.signal(Signal::KILL);
        assert_eq!(client.end().status, None);
        assert!(server.running().is_running());
    }
    let json = bench(&server, "--rw randrw --verify").expect_success().json();
    assert_eq!(json["verify"]["mismatches"], 0);
    server.stop().expect_success();
}

#[test]
fn a_killed_server_is_reported() {
    let mut server = Server::start("--size 16m");
    let address = server.address();
    let client = Process::start(&["bench", "--device", &address, "--size", "4m", "--runtime", "1000"]);
    thread::sleep(Duration::from_millis(500));
    let process = server.process.take().unwrap();
    process.signal(Signal::KILL);
    process.end();
    client.end().expect_failure(1, "gone");

    // What it left is no obstacle.
    assert!(fs::exists(server.socket()).unwrap());
    server.restart("--size 16m");
    bench(&server, "").expect_success();
}

#[test]
fn a_second_client_at_a_time_is_told_so() {
    let server = Server::start("--size 16m");
    let address = server.address();
    let first = Process::start(&["bench", "--device", &address, "--size", "4m", "--runtime", "1000"]);
    thread::sleep(Duration::from_millis(500));
    bench(&server, "").expect_failure(1, "busy");
    first.signal(Signal::INT);
    let ended = first.end();
    assert_eq!(ended.status, Some(130), "{ended:?}");
    assert!(ended.stdout.contains("errors 0"), "{ended:?}");
    bench(&server, "").expect_success();
}

#[test]
fn info_shows_what_is_served() {
    let server = Server::start("--size 16m --lba-size 4096");
    let ended = run(&format!("info {}", server.address()));
    for part in ["BAR 0", "config", "MSI-X", "NVM Express", "namespace 1: 16 MiB = 4096 blocks of 4096 B"] {
        assert!(ended.expect_success().stdout.contains(part), "{part} in {}", ended.stdout);
    }
    let json = run(&format!("info {} --output-format json", server.address())).expect_success().json();
    assert_eq!(json["pci"]["class"], 0x01_08_02);
    assert_eq!(json["nvme"]["namespaces"][0]["block_size"], 4096);
    assert!(json["regions"].as_array().unwrap().iter().any(|region| region["name"] == "config"), "{json}");
}

#[test]
fn limits_of_the_device_are_told() {
    let server = Server::start("--size 1m --lba-size 4096");
    for (options, part) in [("--bs 512", "blocks of 4096"), ("--size 2m", "1048576 bytes")] {
        let address = server.address();
        run(&format!("bench --device {address} --runtime 0.2 {options}")).expect_failure(1, part);
    }
}

#[test]
fn a_device_is_not_written_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    let options = format!("--size 4m --file {}", file.display());
    let server = Server::start(&options);
    bench(&server, "--rw randread").expect_success();
    assert!(fs::read(&file).unwrap().iter().all(|&byte| byte == 0));
    bench(&server, "--rw randread --verify").expect_success();
    assert_eq!(fs::metadata(&file).unwrap().len(), 4 << 20);
    assert!(fs::read(&file).unwrap().chunks(512).all(|block| block.iter().any(|&byte| byte != 0)));
    server.stop().expect_success();
    // The file has its size now.
    let server = Server::start(&format!("--file {}", file.display()));
    bench(&server, "").expect_success();
}

#[test]
fn sockets_that_are_in_the_way() {
    let server = Server::start("--size 4m");
    let socket = server.socket();
    run(&format!("serve nvme --socket {socket} --size 1m")).expect_failure(1, &socket);
    bench(&server, "").expect_success();

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("precious");
    fs::write(&file, "data").unwrap();
    run(&format!("serve nvme --socket {} --size 1m", file.display())).expect_failure(1, "precious");
    assert_eq!(fs::read(&file).unwrap(), b"data");

    let mut server = Server { process: None, dir: tempfile::tempdir().unwrap() };
    drop(UnixListener::bind(server.socket()).unwrap());
    server.restart("--size 1m");
}

#[test]
fn ctrl_c_ends_a_server_with_a_client() {
    let mut server = Server::start("--size 16m");
    let address = server.address();
    let client = Process::start(&["bench", "--device", &address, "--size", "4m", "--runtime", "1000"]);
    thread::sleep(Duration::from_millis(500));
    let process = server.process.take().unwrap();
    process.signal(Signal::INT);
    process.end().expect_success();
    client.end().expect_failure(1, "gone");
}
