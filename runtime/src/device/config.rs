//! Configuration space.

use super::Region;
use crate::{
    Error, Result,
    mmio::Value,
    pci::{CapabilityWalk, PciCapability, PciIds, offset},
};

/// A device's configuration space: 256 bytes, or 4096 of PCI Express. A handle, whose clones are the same.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    region: Region,
}

impl ConfigSpace {
    pub(super) fn new(region: Region) -> Self {
        Self { region }
    }

    /// The region behind it; without bytes when the device has none.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.region.size()
    }

    fn check<T: Value>(&self, offset: u64) -> Result<()> {
        if offset.is_multiple_of(T::SIZE as u64) {
            return Ok(());
        }
        Err(Error::invalid(format!("a field of {} bytes can't be at {offset:#x} of configuration space", T::SIZE)))
    }

    /// Reads a field, in one access of its width.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is misaligned or outside; see [`Region::read`].
    pub async fn read<T: Value>(&self, offset: u64) -> Result<T> {
        self.check::<T>(offset)?;
        self.region.read_value(offset).await
    }

    /// Writes a field, in one access of its width.
    ///
    /// # Errors
    /// See [`ConfigSpace::read`].
    pub async fn write<T: Value>(&self, offset: u64, value: T) -> Result<()> {
        self.check::<T>(offset)?;
        self.region.write_value(offset, value).await
    }

    /// Who made the device, and what it is.
    ///
    /// # Errors
    /// See [`ConfigSpace::read`].
    pub async fn ids(&self) -> Result<PciIds> {
        let id: u32 = self.read(offset::VENDOR_ID).await?;
        let class: u32 = self.read(offset::REVISION).await?;
        let subsystem: u32 = self.read(offset::SUBSYSTEM_VENDOR_ID).await?;
        Ok(PciIds {
            vendor: id as u16,
            device: (id >> 16) as u16,
            subsystem_vendor: subsystem as u16,
            subsystem: (subsystem >> 16) as u16,
            class: class >> 8,
            revision: class as u8,
        })
    }

    /// The capabilities, in the order of the device's lists, the extended ones last.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for a list that loops or leads astray; see [`ConfigSpace::read`].
    pub async fn capabilities(&self) -> Result<Vec<PciCapability>> {
        let mut walk = CapabilityWalk::new(self.size());
        while let Some(offset) = walk.wants() {
            walk.give(self.read(offset).await?)?;
        }
        Ok(walk.into_found())
    }
}
