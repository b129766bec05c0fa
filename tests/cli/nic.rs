//! `vfio-uring nic`, as a process.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::{Process, run};

#[test]
fn a_table_for_people() {
    let ended = run("nic bench --mode forward --batch 4 --runtime 0.2");
    let table = &ended.expect_success().stdout;
    for part in ["one with a packet generator", "forward, frames of 64 B", "Mpps", "instructions a packet", "dropped"] {
        assert!(table.contains(part), "{part} in {table}");
    }
    assert_eq!(ended.stderr, "");
}

#[test]
fn one_json_object_for_programs() {
    for (mode, devices) in [("rx", 1), ("tx", 1), ("forward", 2)] {
        let line = format!("nic bench --mode {mode} --size 300 --queues 2 --batch 4 --runtime 0.2 --json");
        let ended = run(&line);
        let json = ended.expect_success().json();
        assert_eq!((ended.stdout.lines().count(), &json["mode"]), (1, &mode.into()), "{json}");
        assert_eq!((&json["size"], &json["queues"], &json["batch"]), (&300.into(), &2.into(), &4.into()));
        assert_eq!(json["devices"].as_array().map(Vec::len), Some(devices));
        assert!(json["packets"].as_u64().unwrap() > 0, "{json}");
        assert!(json["mpps"].as_f64().unwrap() > 0.0 && json["cpu_ns_per_packet"].as_f64().unwrap() > 0.0, "{json}");
        // Of one kind or another; or it is said why not.
        for figure in ["instructions", "cycles"] {
            let (value, by) = (&json[figure]["per_packet"], json[figure]["by"].as_str().unwrap());
            assert!(value.as_f64().is_some_and(|value| value > 1.0) || value.is_null() && !by.is_empty(), "{json}");
        }
        // The generator waits, and the sink takes everything.
        let drops = json["drops"].as_object().unwrap();
        assert!(drops.contains_key("driver.bad_descriptor") && drops.contains_key("software.no_descriptors"));
        assert!(drops.values().all(|count| count == 0), "{json}");
    }
}

#[test]
fn waiting_in_each_way_and_long_frames() {
    for idle in ["spin", "park", "hybrid"] {
        let json = run(&format!("nic bench --size 9018 --batch 4 --idle {idle} --seconds 0.2 --output-format json"));
        assert!(json.expect_success().json()["packets"].as_u64().unwrap() > 0);
    }
}

#[test]
fn devices_of_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (one, two) = (path("one.sock"), path("two.sock"));
    let servers = [(&one, "generator:1514,8"), (&two, "sink")].map(|(socket, wire)| {
        let process = Process::start(&["serve", "igb", "--socket", socket, "--wire", wire, "--mac", "02:00:00:00:00:0a"]);
        process.line();
        process
    });
    let json = run(&format!("nic info vfio-user:{one} --json")).expect_success().json();
    assert_eq!((&json["mac"], &json["link"]["up"]), (&"02:00:00:00:00:0a".into(), &true.into()), "{json}");
    for (mode, devices) in [
        ("rx", format!("--device vfio-user:{one}")),
        ("forward", format!("--device vfio-user:{one}")),
        ("forward", format!("--device vfio-user:{one} --device vfio-user:{two}")),
        ("tx", format!("--device vfio-user:{two}")),
    ] {
        let json = run(&format!("nic bench --mode {mode} {devices} --batch 4 --runtime 0.2 --size 1518 --json"));
        let json = json.expect_success().json();
        assert!(json["packets"].as_u64().unwrap() > 0, "{json}");
        assert!(json["drops"].as_object().unwrap().contains_key("nic.no_buffer"), "{json}");
    }
    for process in servers {
        process.signal(Signal::TERM);
        process.end().expect_success();
    }
}

#[test]
fn info_of_a_software_nic() {
    let ended = run("nic info");
    for part in ["Intel 82576", "up, 1000 Mb/s, full duplex", "16 to receive", "receive side scaling", "rx_no_buffer"] {
        assert!(ended.expect_success().stdout.contains(part), "{part} in {}", ended.stdout);
    }
    let json = run("nic info --output-format json").expect_success().json();
    assert_eq!((&json["device"], &json["queues"], &json["max_frame"]), (&"embedded".into(), &16.into(), &9728.into()));
    assert_eq!(json["statistics"]["rx_packets"], 0, "{json}");
}

#[test]
fn what_is_refused() {
    for (options, part) in [
        ("bench --size 63", "63"),
        ("bench --queues 17", "17"),
        ("bench --batch 0", "--batch"),
        ("bench --mode sideways", "sideways"),
        ("bench --mode rx --device vfio-user:/a --device vfio-user:/b", "takes 1"),
        ("bench --json --output-format human", "--json"),
        ("info nowhere", "vfio-user:"),
        ("", "nic"),
    ] {
        run(&format!("nic {options}")).expect_failure(2, part);
    }
    run("nic info vfio-user:/nowhere/at/all").expect_failure(1, "/nowhere/at/all");
}

#[test]
fn another_kind_of_device_is_left_alone() {
    let server = crate::support::Server::start("--size 1m");
    let address = server.address();
    for line in [format!("nic info {address}"), format!("nic bench --mode tx --device {address}")] {
        run(&line).expect_failure(1, "the driver is for the 82576");
    }
    server.stop().expect_success();
}

#[test]
fn ctrl_c_ends_with_what_was_measured() {
    let process = Process::start(&["nic", "bench", "--mode", "rx", "--batch", "4", "--runtime", "1000"]);
    process.line();
    std::thread::sleep(Duration::from_millis(700));
    let start = Instant::now();
    process.signal(Signal::INT);
    let ended = process.end();
    assert_eq!(ended.status, Some(130), "{ended:?}");
    assert!(ended.stdout.contains("interrupted") && ended.stdout.contains("Mpps"), "{ended:?}");
    assert!(start.elapsed() < Duration::from_secs(40));
}
