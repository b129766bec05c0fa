//! The NIC as a PCI device.

use std::time::Duration;

use rustix::io::Errno;

use super::{
    LOOK, MSIX_BAR, Nic,
    spec::{BAR_SIZE, MSIX_BAR_SIZE, RCTL, TCTL, VECTORS, rctl, tctl},
};
use crate::{
    device::{Device, Host, RegionSpec, Rest, irq, region},
    pci::{CONFIG_SIZE, Effect},
};

/// The BAR with the MSI-X table, as a region.
const MSIX_REGION: u32 = region::BAR0 + MSIX_BAR as u32;

impl Nic {
    fn dword(&mut self, index: u32, offset: u64) -> u32 {
        if index == region::BAR0 {
            return self.register(offset);
        }
        let bytes = self.msix.get(offset as usize..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    fn set_dword(&mut self, index: u32, offset: u64, value: u32) {
        if index == region::BAR0 {
            return self.set_register(offset, value);
        }
        let table = u64::from(VECTORS) * 16;
        if offset < table
            && let Some(bytes) = self.msix.get_mut(offset as usize..offset as usize + 4)
        {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

impl Device for Nic {
    fn region(&self, index: u32) -> RegionSpec {
        let flags = RegionSpec::READ_WRITE;
        match index {
            region::BAR0 => RegionSpec { size: BAR_SIZE, flags, mappable: self.core.area.mappable(), kind: None },
            MSIX_REGION => RegionSpec { size: MSIX_BAR_SIZE, flags, mappable: None, kind: None },
            region::CONFIG => RegionSpec { size: CONFIG_SIZE as u64, flags, mappable: None, kind: None },
            _ => RegionSpec::default(),
        }
    }

    fn irq_vectors(&self, index: u32) -> u32 {
        match index {
            irq::MSI | irq::ERR | irq::REQ => 1,
            irq::MSIX => VECTORS.into(),
            _ => 0,
        }
    }

    /// BARs are read in whole dwords, or in bytes or words that lie in one.
    fn read(&mut self, index: u32, offset: u64, to: &mut [u8], host: &mut impl Host) -> Result<(), Errno> {
        match index {
            region::CONFIG => return self.pci.read(offset, to),
            region::BAR0 | MSIX_REGION => {}
            _ => return Err(Errno::INVAL),
        }
        if offset.is_multiple_of(4) && to.len().is_multiple_of(4) {
            for (i, bytes) in to.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&self.dword(index, offset + 4 * i as u64).to_le_bytes());
            }
        } else {
            let start = (offset & 3) as usize;
            if start + to.len() > 4 {
                return Err(Errno::INVAL);
            }
            let dword = self.dword(index, offset & !3).to_le_bytes();
            to.copy_from_slice(&dword[start..start + to.len()]);
        }
        self.signal(host);
        Ok(())
    }

    /// BARs are written in one or two dwords.
    fn write(&mut self, index: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno> {
        match index {
            region::CONFIG => {
                if self.pci.write(offset, from)? == Effect::Reset {
                    self.reset(host);
                }
            }
            region::BAR0 | MSIX_REGION if offset.is_multiple_of(4) && matches!(from.len(), 4 | 8) => {
                for (i, bytes) in from.as_chunks::<4>().0.iter().enumerate() {
                    self.set_dword(index, offset + 4 * i as u64, u32::from_le_bytes(*bytes));
                }
                self.signal(host);
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    fn reset(&mut self, _host: &mut impl Host) {
        self.reset_all();
    }

    #[inline]
    fn service(&mut self, host: &mut impl Host) -> usize {
        self.round += 1;
        if self.round >= LOOK {
            self.look();
        }
        let mut work = 0;
        if self.receives() {
            work += self.rx.service(&mut self.core, host);
        }
        if self.core.registers.get(TCTL) & tctl::EN != 0 {
            work += self.tx.service(&mut self.core, host);
        }
        if work != 0 {
            self.core.port.flush();
            self.handle.publish(&self.core.counters);
        }
        self.signal(host);
        work
    }

    fn is_active(&self) -> bool {
        let registers = &self.core.registers;
        registers.get(RCTL) & rctl::EN != 0 || registers.get(TCTL) & tctl::EN != 0 || self.core.interrupts.enabled()
    }

    fn rest(&mut self) -> Rest<'_> {
        // What a client has changed meanwhile is to be seen at once.
        self.round = LOOK;
        let waits: Option<Duration> = self.core.interrupts.waits();
        let receiving = self.receives() && !self.rx.is_waiting();
        let rest = self.core.port.rest(receiving);
        Rest { at_most: rest.at_most.into_iter().chain(waits).min(), ..rest }
    }
}

impl Nic {
    #[inline]
    fn signal(&mut self, host: &mut impl Host) {
        let count = self.core.interrupts.deliver(host);
        if count != 0 {
            self.core.statistics.interrupts(count);
            self.core.counters.interrupts += count;
            self.handle.publish(&self.core.counters);
        }
    }
}
