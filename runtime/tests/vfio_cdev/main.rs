//! cdev and iommufd of the kernel on a real (emulated) device.
//!
//! `VFIO_URING_TEST_BDF` names a PCI function that is bound to vfio-pci, which the tests take over, one after the other;
//! `VFIO_URING_TEST_BDF2` a second one of another IOMMU group; `VFIO_URING_TEST_EDU` QEMU's edu device, whose DMA is tried. A
//! test whose device is not named passes without doing anything, and says so.

mod binding;
mod dma;
mod mapping;
mod spaces;
mod user;

#[path = "../vfio_common/mod.rs"]
mod common;

use std::sync::MutexGuard;

use common::{MSI, PAGE, Page, memory, named};
use vfio_uring::transport::{
    cdev::{Bound, Unbound},
    iommufd::{Ioas, IommufdFd},
};

/// The devices, held by one test at a time.
struct Devices {
    bdf: String,
    _turn: MutexGuard<'static, ()>,
}

/// The device that the variable names.
fn devices_of(variable: &str) -> Option<Devices> {
    let (bdf, _turn) = named(variable)?;
    Some(Devices { bdf, _turn })
}

fn devices() -> Option<Devices> {
    devices_of("VFIO_URING_TEST_BDF")
}

impl Devices {
    fn open(&self) -> Unbound {
        Unbound::find(&self.bdf).expect("the device")
    }

    fn bind(&self, context: &IommufdFd) -> Bound {
        self.open().bind(context, None).expect("a bound device")
    }

    /// A device attached to a space of its own.
    fn attached(&self) -> (Bound, Ioas) {
        let context = IommufdFd::open().unwrap();
        let device = self.bind(&context);
        let ioas = Ioas::alloc(&context).unwrap();
        device.attach(&ioas).unwrap();
        (device, ioas)
    }
}
