//! A machine of files, for tests.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::sysfs::Pci;

pub(crate) const NVME: &str = "0000:01:00.0";
pub(crate) const NIC: &str = "0000:02:00.0";
/// In the group of the NIC.
pub(crate) const NIC1: &str = "0000:02:00.1";
/// Without a driver.
pub(crate) const EDU: &str = "0000:00:05.0";

/// The folder of the machine, with an NVMe disk, a NIC of two functions and a device without a driver.
pub(crate) struct Fake {
    dir: TempDir,
    pub pci: Pci,
}

impl Fake {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pci = Pci::at(dir.path());
        let fake = Self { dir, pci };
        for driver in ["vfio-pci", "nvme", "igb", "pcieport"] {
            fake.file(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        fake.file("sys/bus/pci/drivers_probe", "");
        fake.file("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n");
        fake.file("proc/self/mountinfo", "22 27 0:21 / /proc rw,relatime - proc proc rw\n");
        for node in ["vfio/vfio", "iommu"] {
            fake.file(&format!("dev/{node}"), "");
        }
        fake.device(NVME, 0x010802, 12, Some("nvme"));
        fake.device(NIC, 0x020000, 13, Some("igb"));
        fake.device(NIC1, 0x020000, 13, Some("igb"));
        fake.device(EDU, 0x00ff00, 5, None);
        fake.object(NVME, "nvme/nvme0", "nvme");
        fake.block(&Self::under(NVME, "nvme/nvme0/nvme0n1"), "259:0");
        fake.block(&Self::under(NVME, "nvme/nvme0/nvme0n1/nvme0n1p1"), "259:1");
        fake.object(NIC, "net/eth0", "net");
        fake.file("sys/class/net/eth0/flags", "0x1002\n");
        fake.file("sys/class/net/eth0/operstate", "down\n");
        fake
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A link, whose target is relative to the root.
    pub fn link(&self, at: &str, target: &str) {
        let at = self.path(at);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&at);
        symlink(self.path(target), at).unwrap();
    }

    /// A folder of a device, where the kernel really has it.
    pub fn under(bdf: &str, path: &str) -> String {
        format!("sys/devices/pci0000:00/{bdf}/{path}")
    }

    pub fn attribute(&self, bdf: &str, name: &str, text: &str) {
        self.file(&Self::under(bdf, name), text);
    }

    pub fn device(&self, bdf: &str, class: u32, group: u32, driver: Option<&str>) {
        let at = format!("sys/devices/pci0000:00/{bdf}");
        let attributes = [
            ("vendor", "0x8086\n"),
            ("device", "0x10c9\n"),
            ("subsystem_vendor", "0x1af4\n"),
            ("subsystem_device", "0x1100\n"),
            ("revision", "0x02\n"),
            ("driver_override", "(null)\n"),
            ("numa_node", "-1\n"),
            ("modalias", "pci:v00008086d000010C9sv00001AF4sd00001100bc02sc00i00\n"),
            ("class", &format!("{class:#08x}\n")),
        ];
        for (name, text) in attributes {
            self.attribute(bdf, name, text);
        }
        self.link(&format!("sys/bus/pci/devices/{bdf}"), &at);
        let groups = format!("sys/kernel/iommu_groups/{group}");
        self.link(&format!("{at}/iommu_group"), &groups);
        self.link(&format!("{at}/iommu"), "sys/devices/virtual/iommu/dmar0");
        self.link(&format!("{groups}/devices/{bdf}"), &at);
        self.file(&format!("{groups}/reserved_regions"), "0x00000000fee00000 0x00000000feefffff msi\n");
        self.drive(bdf, driver);
    }

    /// Binds a device to a driver, as the kernel would show it.
    pub fn drive(&self, bdf: &str, driver: Option<&str>) {
        let link = Self::under(bdf, "driver");
        let _ = fs::remove_file(self.path(&link));
        let _ = fs::remove_dir_all(self.path(&Self::under(bdf, "vfio-dev")));
        if let Some(driver) = driver {
            self.link(&link, &format!("sys/bus/pci/drivers/{driver}"));
        }
        if driver == Some("vfio-pci") {
            self.attribute(bdf, "vfio-dev/vfio3/dev", "511:3\n");
            self.file("dev/vfio/devices/vfio3", "");
            for group in [5, 12, 13] {
                self.file(&format!("dev/vfio/{group}"), "");
            }
        }
    }

    /// An object of a class that belongs to a device.
    pub fn object(&self, bdf: &str, path: &str, class: &str) {
        let at = Self::under(bdf, path);
        fs::create_dir_all(self.path(&at)).unwrap();
        self.link(&format!("sys/class/{class}/{}", Path::new(path).file_name().unwrap().display()), &at);
    }

    /// A block device.
    pub fn block(&self, at: &str, dev: &str) {
        self.file(&format!("{at}/dev"), &format!("{dev}\n"));
        let name = Path::new(at).file_name().unwrap().display();
        self.link(&format!("sys/class/block/{name}"), at);
        self.file(&format!("dev/{name}"), "");
    }
}
