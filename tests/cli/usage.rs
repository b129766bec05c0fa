//! What can't be done is said in one line.

use crate::support::run;

#[test]
fn wrong_usage_is_status_2() {
    for (line, part) in [
        ("", "bench"),
        ("frob", "frob"),
        ("bench extra", "extra"),
        ("bench --nope", "--nope"),
        ("bench --rw sideways", "randread"),
        ("bench --bs 1000", "multiple of 512"),
        ("bench --bs 0", "not 0"),
        ("bench --bs", "--bs"),
        ("bench --iodepth 0", "1..=4095"),
        ("bench --iodepth 4096", "1..=4095"),
        ("bench --numjobs 0", "1..=256"),
        ("bench --runtime 0", "0.01"),
        ("bench --runtime forever", "seconds"),
        ("bench --size 2k", "--bs"),
        ("bench --size 9999999t", "2^63"),
        ("bench --rwmixread 50", "randrw"),
        ("bench --rw randrw --rwmixread 101", "0..=100"),
        ("bench --verify --size 64k", "--iodepth"),
        ("bench --nsid 0", "nsid"),
        ("bench --device /tmp/socket", "vfio-user:"),
        ("bench --device 0000:01:00", "DOMAIN:BUS:DEVICE.FUNCTION"),
        ("serve", "serve nvme, serve igb or serve edu"),
        ("serve nvme", "--socket"),
        ("serve disk --socket x", "disk"),
        ("serve edu --socket x --faults three-regions", "two-region"),
        ("serve nvme --socket x --lba-size 520", "512 or 4096"),
        ("serve nvme --socket x --size 1000", "multiple"),
        ("info", "ADDRESS"),
        ("info nowhere", "vfio-user:"),
        ("list 0000:01:20.0", "00 to 1f"),
        ("list --all 0000:01:00.0", "--all"),
        ("bind", "BDF"),
        ("bind nvme0", "DOMAIN:BUS:DEVICE.FUNCTION"),
        ("bind vfio-user:/x", "DOMAIN:BUS:DEVICE.FUNCTION"),
        ("unbind", "BDF"),
        ("unbind 01:00.8", "0 to 7"),
    ] {
        let ended = run(line);
        ended.expect_failure(2, part);
        assert_eq!(ended.stdout, "", "{line}");
    }
}

#[test]
fn failures_are_status_1() {
    for (line, part) in [
        ("bench --device vfio-user:/nonexistent/socket", "/nonexistent/socket"),
        ("info vfio-user:/nonexistent/socket", "/nonexistent/socket"),
        ("list --root /nonexistent", "/nonexistent/sys/bus/pci/devices"),
        ("bind --root /nonexistent 01:00.0", "no PCI device 0000:01:00.0"),
        ("unbind --root /nonexistent 01:00.0", "no PCI device 0000:01:00.0"),
        ("serve nvme --socket /nonexistent/socket", "/nonexistent/socket"),
        ("serve nvme --socket /tmp/unused.sock --file /nonexistent/disk", "/nonexistent/disk"),
    ] {
        run(line).expect_failure(1, part);
    }
}

#[test]
fn help_is_there() {
    for (line, part) in [
        ("--help", "Examples:"),
        ("bench --help", "--iodepth"),
        ("serve --help", "nvme"),
        ("serve nvme --help", "--socket"),
        ("serve igb --help", "generator"),
        ("serve edu --help", "single-region"),
        ("info --help", "vfio-user:PATH"),
        ("list --help", "--all"),
        ("bind --help", "--dry-run"),
        ("unbind --help", "--dry-run"),
        ("--version", env!("CARGO_PKG_VERSION")),
    ] {
        let ended = run(line);
        assert!(ended.expect_success().stdout.contains(part), "{ended:?}");
        assert_eq!(ended.stderr, "");
    }
}
