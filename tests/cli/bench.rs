//! `vfio-uring bench` with the software controller in its process.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::support::{Process, run};

#[test]
fn a_table_for_people() {
    let ended = run("bench --runtime 0.3 --size 8m");
    let table = &ended.expect_success().stdout;
    for part in ["software controller", "randread", "IOPS", "p99.9", "errors 0"] {
        assert!(table.contains(part), "{part} in {table}");
    }
    assert_eq!(ended.stderr, "");
}

#[test]
fn one_json_object_for_programs() {
    let ended = run("bench --runtime 0.3 --size 8m --bs 8k --iodepth 16 --output-format json");
    let json = ended.expect_success().json();
    assert_eq!(ended.stdout.lines().count(), 1);
    assert!(ended.stderr.contains("software controller"), "{}", ended.stderr);
    assert_eq!(json["rw"], "randread");
    assert_eq!(json["bs"], 8192);
    assert_eq!(json["iodepth"], 16);
    assert_eq!(json["errors"], 0);
    assert_eq!(json["device"], "embedded");
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {json}"));
    assert!(number(&json["iops"]) > 0.0);
    assert!((number(&json["bw_bytes"]) - 8192.0 * number(&json["iops"])).abs() < 8192.0);
    let latency = &json["lat_ns"];
    let order = ["min", "p50", "p99", "p999", "max"].map(|name| number(&latency[name]));
    assert!(order.is_sorted() && order[0] > 0.0, "{latency}");
    assert!((order[0]..=order[4]).contains(&number(&latency["mean"])), "{latency}");
}

#[test]
fn what_is_read_is_what_was_written() {
    for rw in ["read", "write", "randread", "randwrite", "randrw"] {
        for form in ["--mode stream", "--mode future --numjobs 2", "--numjobs 3 --bs 16k --iodepth 8"] {
            let ended = run(&format!("bench --rw {rw} {form} --verify --runtime 0.2 --size 6m --output-format json"));
            let json = ended.expect_success().json();
            assert_eq!(json["verify"]["mismatches"], 0, "{json}");
            assert_eq!(json["errors"], 0, "{json}");
            assert!(json["verify"]["checked"].as_u64().unwrap() > 0, "{json}");
        }
    }
}

#[test]
fn transfers_above_the_limit_are_split() {
    let line = "bench --rw randrw --verify --bs 4m --size 16m --iodepth 2 --runtime 0.2";
    let json = run(&format!("{line} --output-format json")).expect_success().json();
    assert_eq!(json["mode"], "future");
    assert_eq!(json["verify"]["mismatches"], 0, "{json}");
    run(&format!("{line} --mode stream")).expect_failure(1, "--mode future");
}

#[test]
fn waiting_in_each_way() {
    for idle in ["spin", "park", "hybrid"] {
        for interrupts in ["", "--interrupts"] {
            let json =
                run(&format!("bench --idle {idle} {interrupts} --iodepth 1 --runtime 0.2 --size 1m --output-format json"));
            assert!(json.expect_success().json()["ios"].as_u64().unwrap() > 0);
        }
    }
}

#[test]
fn what_the_controller_can_not_do_is_status_1() {
    run("bench --nsid 7").expect_failure(1, "--nsid 7");
    run("bench --numjobs 256 --iodepth 1").expect_failure(1, "I/O queues");
}

#[test]
fn ctrl_c_ends_with_what_was_measured() {
    let process = Process::start(&["bench", "--runtime", "1000", "--size", "1m"]);
    process.line();
    std::thread::sleep(Duration::from_millis(700));
    let start = Instant::now();
    process.signal(Signal::INT);
    let ended = process.end();
    assert_eq!(ended.status, Some(130), "{ended:?}");
    assert!(ended.stdout.contains("interrupted") && ended.stdout.contains("errors 0"), "{ended:?}");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn nobody_listens() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vfio-uring"))
        .args(["bench", "--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
