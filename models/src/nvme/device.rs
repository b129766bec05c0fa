//! The controller as a PCI device.

use rustix::io::Errno;

use super::{Controller, Registers};
use crate::{
    device::{Device, Host, RegionSpec, irq, region},
    pci::{CONFIG_SIZE, Effect},
};

impl Controller {
    fn load(&self, offset: u64) -> u32 {
        if let Some(at) = self.bar.doorbell(offset) {
            return self.bar.doorbells.memory.load_u32(at).unwrap_or(0);
        }
        match self.bar.table_range(offset).and_then(|range| self.bar.table.get(range)) {
            Some(bytes) => u32::from_le_bytes(bytes.try_into().unwrap_or_default()),
            None => self.register(offset),
        }
    }

    fn store(&mut self, offset: u64, value: u32) {
        if let Some(at) = self.bar.doorbell(offset) {
            let stored = self.bar.doorbells.memory.store_u32(at, value);
            debug_assert!(stored.is_ok(), "the offset is in the doorbell area");
            return;
        }
        let in_table = offset < self.bar.table_at + u64::from(self.vectors()) * 16;
        match self.bar.table_range(offset).filter(|_| in_table) {
            Some(range) => self.bar.table[range].copy_from_slice(&value.to_le_bytes()),
            None => self.set_register(offset, value),
        }
    }
}

impl Device for Controller {
    fn region(&self, index: u32) -> RegionSpec {
        let flags = RegionSpec::READ_WRITE;
        match index {
            region::BAR0 => {
                RegionSpec { size: self.bar.size, flags, mappable: Some(self.bar.doorbells.clone()), kind: None }
            }
            region::CONFIG => RegionSpec { size: CONFIG_SIZE as u64, flags, mappable: None, kind: None },
            _ => RegionSpec::default(),
        }
    }

    fn irq_vectors(&self, index: u32) -> u32 {
        match index {
            irq::MSIX => self.vectors().into(),
            irq::ERR | irq::REQ => 1,
            _ => 0,
        }
    }

    /// BAR0 is read in whole dwords, or in bytes or words that lie in one; registers of more than 4 bytes from the low dword up.
    fn read(&mut self, index: u32, offset: u64, to: &mut [u8], _host: &mut impl Host) -> Result<(), Errno> {
        match index {
            region::CONFIG => self.pci.read(offset, to),
            region::BAR0 if offset.is_multiple_of(4) && to.len().is_multiple_of(4) => {
                for (i, bytes) in to.chunks_exact_mut(4).enumerate() {
                    bytes.copy_from_slice(&self.load(offset + 4 * i as u64).to_le_bytes());
                }
                Ok(())
            }
            region::BAR0 => {
                let start = (offset & 3) as usize;
                let dword = self.load(offset & !3).to_le_bytes();
                to.copy_from_slice(dword.get(start..start + to.len()).ok_or(Errno::INVAL)?);
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// BAR0 is written in one or two dwords.
    fn write(&mut self, index: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno> {
        match index {
            region::CONFIG => {
                if self.pci.write(offset, from)? == Effect::Reset {
                    self.reset(host);
                }
                Ok(())
            }
            region::BAR0 if offset.is_multiple_of(4) && matches!(from.len(), 4 | 8) => {
                for (i, bytes) in from.chunks_exact(4).enumerate() {
                    self.store(offset + 4 * i as u64, u32::from_le_bytes(bytes.try_into().unwrap_or_default()));
                }
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    fn reset(&mut self, _host: &mut impl Host) {
        self.disable();
        self.registers = Registers::default();
        self.pci.reset();
        self.bar.reset(self.vectors());
    }

    #[inline]
    fn service(&mut self, host: &mut impl Host) -> usize {
        if !self.is_ready() {
            return 0;
        }
        let mut work = self.service_admin(host);
        let mut index = 1;
        while index < self.sqs.len() && self.is_ready() {
            work += self.service_io(index, host);
            index += 1;
        }
        // Once for a queue, however many submission queues complete there.
        while let Some(id) = self.signals.pop() {
            if let Some(Some(cq)) = self.cqs.get_mut(usize::from(id)) {
                cq.signal = false;
                if let Some(vector) = cq.vector {
                    host.signal(vector);
                }
            }
        }
        work
    }

    fn is_active(&self) -> bool {
        self.is_ready()
    }
}
