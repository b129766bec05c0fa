//! Groups, containers and type 1 of the kernel on real (emulated) devices.
//!
//! `VFIO_URING_TEST_BDF` names a PCI function that is bound to vfio-pci, which the tests take over, one after the other: an NVMe
//! controller. `VFIO_URING_TEST_BDF2` names a second one, of another IOMMU group; `VFIO_URING_TEST_EDU` QEMU's edu device, whose
//! DMA is tried; `VFIO_URING_TEST_PF` a function that can have virtual ones, which vfio-pci makes (`vfio_pci.enable_sriov=1`);
//! `VFIO_URING_TEST_NOIOMMU` one of a machine without IOMMU (`vfio.enable_unsafe_noiommu_mode=1`). A test whose device is not named passes without doing anything, and says so.

mod device;
mod dma;
mod groups;
mod irqs;
mod mapping;
mod user;

#[path = "../vfio_common/mod.rs"]
mod common;

use std::{fs, sync::MutexGuard};

use common::{MSI, PAGE, Page, memory, named};
use vfio_uring::{
    device::index,
    transport::{
        group::Container,
        vfio::{DeviceFd, RegionInfo, VfToken},
    },
};

/// A device, held by one test at a time.
struct Tested {
    bdf: String,
    group: u32,
    _turn: MutexGuard<'static, ()>,
}

/// The device that the variable names.
fn tested(variable: &str) -> Option<Tested> {
    let (bdf, _turn) = named(variable)?;
    Some(Tested { group: group_of(&bdf), bdf, _turn })
}

fn nvme() -> Option<Tested> {
    tested("VFIO_URING_TEST_BDF")
}

fn group_of(bdf: &str) -> u32 {
    let link = fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group")).expect("an IOMMU group");
    link.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// A number that sysfs has of a device, in hexadecimal.
fn sysfs_number(bdf: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/sys/bus/pci/devices/{bdf}/{name}")).unwrap();
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
}

impl Tested {
    /// A container with the device's group.
    fn container(&self) -> Container {
        let container = Container::new().unwrap();
        container.add_group(self.group, false).unwrap();
        container
    }

    fn open(&self) -> (Container, DeviceFd) {
        self.open_with(None)
    }

    fn open_with(&self, token: Option<&VfToken>) -> (Container, DeviceFd) {
        let container = self.container();
        let device = container.device(&self.bdf, token).unwrap();
        (container, device)
    }
}

fn region(device: &DeviceFd, index: u32) -> RegionInfo {
    device.region_info(index).unwrap().expect("the region")
}

fn read<const N: usize>(device: &DeviceFd, region: &RegionInfo, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_at(region.offset + offset, &mut bytes).unwrap();
    bytes
}

/// Switches on memory decoding and bus mastering.
fn enable(device: &DeviceFd) {
    set_command(device, 6);
}

fn set_command(device: &DeviceFd, command: u16) {
    device.write_at(region(device, index::CONFIG).offset + 4, &command.to_le_bytes()).unwrap();
}
