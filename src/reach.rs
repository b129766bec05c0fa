//! What memory a device can be given: I/O virtual addresses, and how much may be locked.

use std::fmt::{self, Write};

use serde::Serialize;
use vfio_uring::{
    device::{Address, Device},
    pci::{Memlock, sysfs::Pci},
};

/// What of the I/O address space a device has.
#[derive(Serialize)]
pub struct Reach {
    /// Addresses that mappings may have, first and last of each range.
    allowed: Vec<(u64, u64)>,
    /// Those that its IOMMU group reserves, with the kernel's word for them.
    reserved: Vec<(u64, u64, String)>,
    /// What may be locked, for devices of the kernel.
    memlock: Option<String>,
}

impl Reach {
    pub fn of(device: &Device) -> Self {
        let allowed = device.dma().allowed().iter().map(|range| (range.start, range.last)).collect();
        let Some(bdf) = (match device.address() {
            Address::Pci(bdf) | Address::Group(bdf) | Address::Cdev(bdf) => Some(*bdf),
            _ => None,
        }) else {
            return Self { allowed, reserved: Vec::new(), memlock: None };
        };
        let group = Pci::system().device(bdf).ok().and_then(|device| device.group);
        let regions = group.into_iter().flat_map(|group| group.reserved);
        let reserved = regions.map(|region| (region.start, region.last, region.kind)).collect();
        Self { allowed, reserved, memlock: Some(Memlock::current().to_string()) }
    }

    pub fn write_human(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "I/O virtual addresses")?;
        for (start, last) in &self.allowed {
            writeln!(text, "  allowed    {start:#x} to {last:#x}")?;
        }
        for (start, last, kind) in &self.reserved {
            writeln!(text, "  reserved   {start:#x} to {last:#x} ({kind})")?;
        }
        self.memlock.iter().try_for_each(|memlock| writeln!(text, "  {memlock}"))
    }
}
