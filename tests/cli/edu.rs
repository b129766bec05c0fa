//! `vfio-uring serve edu`, as a process.

use rustix::process::Signal;

use crate::support::{Process, run};

#[test]
fn info_shows_the_fault_queue() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("edu.sock").to_str().unwrap().to_owned();
    for (faults, regions, irqs) in [(None, 0, 0), (Some("two-region"), 2, 1), (Some("single-region"), 2, 1)] {
        let mut args = vec!["serve", "edu", "--socket", &socket];
        args.extend(faults.iter().flat_map(|form| ["--faults", form]));
        let process = Process::start(&args);
        assert!(process.line().contains(&socket));
        let json = run(&format!("info vfio-user:{socket} --output-format json")).expect_success().json();
        assert_eq!((&json["pci"]["vendor"], &json["pci"]["device"]), (&0x1234.into(), &0x11e8.into()), "{json}");
        let specific = |list: &str| {
            let list = json[list].as_array().unwrap().iter();
            let own = |name: &str| name.starts_with("region ") || name == "device-specific";
            list.filter(|item| own(item["name"].as_str().unwrap())).count()
        };
        assert_eq!((specific("regions"), specific("irqs")), (regions, irqs), "{json}");
        process.signal(Signal::INT);
        process.end().expect_success();
    }
}
