//! `vfio-uring list`, `bind` and `unbind` on a machine of files.

use std::{fs, os::unix::fs::symlink, path::Path};

use tempfile::TempDir;

use crate::support::{Ended, run};

const NVME: &str = "0000:01:00.0";
const EDU: &str = "0000:00:04.0";

/// A machine with an NVMe disk, a device that vfio-pci has, and a bridge.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for driver in ["vfio-pci", "nvme"] {
            machine.file(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        for file in ["sys/bus/pci/drivers_probe", "dev/vfio/vfio", "dev/vfio/4", "dev/vfio/devices/vfio0", "dev/iommu"] {
            machine.file(file, "");
        }
        machine.device("0000:00:01.0", "0x060400", 1, Some("pcieport"));
        machine.device(NVME, "0x010802", 12, Some("nvme"));
        machine.device(EDU, "0x00ff00", 4, Some("vfio-pci"));
        machine.file(&format!("sys/bus/pci/devices/{EDU}/vfio-dev/vfio0/dev"), "511:0\n");
        machine
    }

    fn device(&self, bdf: &str, class: &str, group: u32, driver: Option<&str>) {
        let at = format!("sys/bus/pci/devices/{bdf}");
        let numbers = ["vendor", "device", "subsystem_vendor", "subsystem_device"].map(|name| (name, "0x1b36\n"));
        for (name, text) in
            numbers.into_iter().chain([("class", class), ("revision", "0x02"), ("driver_override", "(null)\n")])
        {
            self.file(&format!("{at}/{name}"), text);
        }
        self.file(&format!("{at}/modalias"), "pci:v00001B36d00000010\n");
        let groups = format!("sys/kernel/iommu_groups/{group}");
        self.link(&format!("{at}/iommu_group"), &groups);
        self.link(&format!("{groups}/devices/{bdf}"), &at);
        self.file(&format!("{groups}/reserved_regions"), "0x00000000fee00000 0x00000000feefffff msi\n");
        if let Some(driver) = driver {
            self.link(&format!("{at}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        }
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, at: &str, target: &str) {
        let at = self.0.path().join(at);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        symlink(self.0.path().join(target), at).unwrap();
    }

    fn text(&self, path: impl AsRef<Path>) -> String {
        fs::read_to_string(self.0.path().join(path)).unwrap()
    }

    fn run(&self, line: &str) -> Ended {
        run(&format!("{line} --root {}", self.0.path().display()))
    }
}

#[test]
fn a_table_for_people() {
    let machine = Machine::new();
    let ended = machine.run("list");
    let lines: Vec<_> = ended.expect_success().stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{ended:?}");
    assert!(lines[0].starts_with("ADDRESS"), "{ended:?}");
    let words: Vec<Vec<_>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[1][..2], [EDU, "1b36:1b36"]);
    assert!(lines[1].ends_with("ready by group, cdev") && words[1].contains(&"vfio0"), "{ended:?}");
    assert_eq!(words[2], [NVME, "1b36:1b36", "NVMe", "controller", "nvme", "12", "-", "-", "bound", "to", "nvme"]);
    assert!(machine.run("list --all").expect_success().stdout.contains("PCI bridge"));
}

#[test]
fn one_device_in_detail() {
    let machine = Machine::new();
    let ended = machine.run(&format!("list {NVME}"));
    for part in ["12, of its own", "0xfee00000 to 0xfeefffff, msi", "RLIMIT_MEMLOCK", "missing   0000:01:00.0 is bound to"] {
        assert!(ended.expect_success().stdout.contains(part), "{part} in {}", ended.stdout);
    }
    let ended = machine.run(&format!("list {EDU}"));
    for part in ["by group  ready", "by cdev   ready", "dev/vfio/devices/vfio0"] {
        assert!(ended.expect_success().stdout.contains(part), "{part} in {}", ended.stdout);
    }
    machine.run("list 09:00.0").expect_failure(1, "no PCI device 0000:09:00.0");
}

#[test]
fn json_for_programs() {
    let machine = Machine::new();
    let json = machine.run("list --output-format json").expect_success().json();
    assert_eq!(json.as_array().unwrap().len(), 2);
    assert_eq!(json[0]["ready"], serde_json::json!(["group", "cdev"]));
    assert_eq!((&json[1]["bdf"], &json[1]["class"]), (&NVME.into(), &0x010802.into()));
    assert_eq!(json[1]["group"]["reserved"][0]["kind"], "msi");
    assert!(json[1]["missing"]["cdev"][0].as_str().unwrap().contains("vfio-uring bind 0000:01:00.0"), "{json}");
    let one = machine.run(&format!("list {EDU} --output-format json")).expect_success().json();
    assert_eq!(one[0]["bdf"], EDU);
}

#[test]
fn a_device_that_can_not_be_read_hides_no_other() {
    let machine = Machine::new();
    machine.file(&format!("sys/bus/pci/devices/{NVME}/vendor"), "junk");
    let ended = machine.run("list");
    ended.expect_failure(1, "vendor: \"junk\" is not");
    assert!(ended.stdout.contains(EDU), "{ended:?}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let machine = Machine::new();
    let root = machine.0.path().display().to_string();
    let ended = machine.run(&format!("bind {NVME} --dry-run"));
    let expected = format!(
        "would write vfio-pci to {root}/sys/bus/pci/devices/{NVME}/driver_override\n\
         would write {NVME} to {root}/sys/bus/pci/drivers/nvme/unbind\n\
         would write {NVME} to {root}/sys/bus/pci/drivers_probe\n\
         would check that {root}/sys/bus/pci/devices/{NVME}/driver leads to vfio-pci\n"
    );
    assert_eq!(ended.expect_success().stdout, expected);
    let ended = machine.run(&format!("unbind {EDU} --dry-run"));
    assert_eq!(ended.expect_success().stdout.lines().count(), 2);
    assert_eq!(machine.text(format!("sys/bus/pci/devices/{NVME}/driver_override")), "(null)\n");
    assert_eq!(machine.text("sys/bus/pci/drivers_probe"), "");
}

#[test]
fn what_is_so_already_is_left_so() {
    let machine = Machine::new();
    for (line, part) in [(format!("bind {EDU}"), "vfio-pci already"), (format!("unbind {NVME}"), "not of VFIO")] {
        for option in ["", "--dry-run"] {
            assert!(machine.run(&format!("{line} {option}")).expect_success().stdout.contains(part));
        }
    }
}

#[test]
fn what_the_kernel_does_not_do_is_undone_and_told() {
    let machine = Machine::new();
    // Nobody binds anything here.
    machine.run(&format!("bind {NVME}")).expect_failure(1, "vfio-pci did not take 0000:01:00.0");
    assert!(machine.text(format!("sys/bus/pci/devices/{NVME}/driver_override")).starts_with('\n'));
    assert_eq!(machine.text("sys/bus/pci/drivers/nvme/unbind"), NVME);
}

#[test]
fn a_mounted_disk_is_refused() {
    let machine = Machine::new();
    let block = format!("sys/bus/pci/devices/{NVME}/nvme/nvme0/nvme0n1");
    machine.file(&format!("{block}/dev"), "259:0\n");
    machine.link("sys/class/block/nvme0n1", &block);
    machine.file("proc/self/mountinfo", "30 1 259:0 / /mnt rw - ext4 /dev/nvme0n1 rw\n");
    for option in ["", "--dry-run"] {
        let ended = machine.run(&format!("bind {NVME} {option}"));
        ended.expect_failure(1, "0000:01:00.0: nvme0n1 is mounted on /mnt; umount /mnt first");
    }
    machine.run(&format!("bind {NVME} --driver uio_pci_generic")).expect_failure(1, "modprobe uio_pci_generic");
}
