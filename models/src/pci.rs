//! Configuration space of a software device: bytes, and which bits of them a client may write.

use rustix::io::Errno;

/// Bytes of configuration space of a PCI Express device.
pub const CONFIG_SIZE: usize = 4096;
/// Bits of the command register that can be written: I/O, memory, bus master, parity, SERR, INTx disable.
const COMMAND_MASK: u16 = 0x0547;
const CAP_PM: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_PCIE: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
/// Offset of the Device Control register in the PCI Express capability; bit 15 starts a function-level reset.
const PCIE_DEVCTL: usize = 8;
const DEVCTL_FLR: u16 = 1 << 15;

/// What identifies a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor and device.
    pub vendor: u16,
    /// Device of the vendor.
    pub device: u16,
    /// Base class, subclass, programming interface, from the top byte down: 0x010802 is NVMe.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// What a write to configuration space asks the device to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing beyond the stored bits.
    None,
    /// A function-level reset.
    Reset,
}

/// Configuration space: a type 0 header with capabilities.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    initial: Box<[u8; CONFIG_SIZE]>,
    bytes: Box<[u8; CONFIG_SIZE]>,
    mask: Box<[u8; CONFIG_SIZE]>,
    next: usize,
    last_link: usize,
    devctl: Option<usize>,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let empty = || Box::new([0; CONFIG_SIZE]);
        let mut space = Self { initial: empty(), bytes: empty(), mask: empty(), next: 0x40, last_link: 0x34, devctl: None };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(0x2c, &identity.vendor.to_le_bytes());
        space.set(0x2e, &identity.device.to_le_bytes());
        space.writable(0x04, &COMMAND_MASK.to_le_bytes());
        space.writable(0x0c, &[0xff]);
        space.writable(0x3c, &[0xff]);
        space
    }

    /// A 64-bit memory BAR of `size` bytes, a power of two; it takes the next index as well.
    pub fn memory_bar64(mut self, index: usize, size: u64) -> Self {
        let at = 0x10 + 4 * index;
        self.set(at, &[0b100]);
        self.writable(at, &(!(size.next_power_of_two() - 1) & !0xf).to_le_bytes());
        self
    }

    /// A 32-bit memory BAR of `size` bytes, a power of two.
    pub fn memory_bar32(mut self, index: usize, size: u32) -> Self {
        let at = 0x10 + 4 * index;
        self.writable(at, &(!(size.next_power_of_two() - 1) & !0xf).to_le_bytes());
        self
    }

    /// Power management, section 7.5.2 of PCI Express 5.0.
    pub fn power_management(mut self) -> Self {
        let at = self.capability(CAP_PM, 8);
        self.set(at + 2, &3u16.to_le_bytes());
        self.set(at + 4, &8u16.to_le_bytes());
        self.writable(at + 4, &3u16.to_le_bytes());
        self
    }

    /// One MSI with a 64-bit address.
    pub fn msi(mut self) -> Self {
        let at = self.capability(CAP_MSI, 14);
        self.set(at + 2, &0x80u16.to_le_bytes());
        // Enable, but no more than one message; address; data.
        self.writable(at + 2, &0x01u16.to_le_bytes());
        self.writable(at + 4, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        self
    }

    /// MSI-X with `vectors` vectors, 1 to 2048; table and pending bits in BAR 0.
    pub fn msix(self, vectors: u16, table: u32, pending: u32) -> Self {
        self.msix_in(0, vectors, table, pending)
    }

    /// MSI-X as [`ConfigSpace::msix`], with table and pending bits in a BAR, 0 to 5.
    pub fn msix_in(mut self, bar: usize, vectors: u16, table: u32, pending: u32) -> Self {
        let bar = bar as u32 & 7;
        let at = self.capability(CAP_MSIX, 12);
        self.set(at + 2, &(vectors.clamp(1, 2048) - 1).to_le_bytes());
        self.set(at + 4, &(table & !7 | bar).to_le_bytes());
        self.set(at + 8, &(pending & !7 | bar).to_le_bytes());
        self.writable(at + 2, &0xc000u16.to_le_bytes());
        self
    }

    /// A PCI Express endpoint with function-level reset.
    pub fn express(mut self) -> Self {
        let at = self.capability(CAP_PCIE, 60);
        self.set(at + 2, &2u16.to_le_bytes());
        self.set(at + 4, &(1u32 << 28 | 1 << 15).to_le_bytes());
        self.writable(at + PCIE_DEVCTL, &0x7fffu16.to_le_bytes());
        // One lane at 2.5 GT/s: a link that is up.
        self.set(at + 12, &0x11u32.to_le_bytes());
        self.set(at + 18, &0x11u16.to_le_bytes());
        self.set(at + 36, &0u32.to_le_bytes());
        self.devctl = Some(at + PCIE_DEVCTL);
        self
    }

    /// Initial values.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial[..]);
    }

    /// Reads any number of bytes.
    ///
    /// # Errors
    /// `EINVAL` beyond the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let from = range(offset, to.len()).and_then(|range| self.bytes.get(range)).ok_or(Errno::INVAL)?;
        to.copy_from_slice(from);
        Ok(())
    }

    /// Writes any number of bytes; bits that are read-only keep their value.
    ///
    /// # Errors
    /// `EINVAL` beyond the end.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<Effect, Errno> {
        let range = range(offset, from.len()).ok_or(Errno::INVAL)?;
        for (at, &new) in range.clone().zip(from) {
            let mask = self.mask[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
        let reset = self.devctl.is_some_and(|devctl| {
            let high = devctl + 1;
            range.contains(&high) && from[high - range.start] & (DEVCTL_FLR >> 8) as u8 != 0
        });
        Ok(if reset { Effect::Reset } else { Effect::None })
    }

    fn capability(&mut self, id: u8, len: usize) -> usize {
        let at = self.next;
        self.set(self.last_link, &[at as u8]);
        self.set(at, &[id]);
        self.set(0x06, &0x10u16.to_le_bytes());
        self.last_link = at + 1;
        self.next = (at + len).next_multiple_of(4);
        at
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.initial[at..at + value.len()].copy_from_slice(value);
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn writable(&mut self, at: usize, mask: &[u8]) {
        self.mask[at..at + mask.len()].copy_from_slice(mask);
    }
}

fn range(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(len)?;
    (end <= CONFIG_SIZE).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity { vendor: 0x1b36, device: 0x10, class: 0x01_08_02, revision: 2 };
        ConfigSpace::new(identity).memory_bar64(0, 0x4000).power_management().msix(65, 0x2000, 0x3000).express()
    }

    fn u32_at(space: &ConfigSpace, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn header_and_bar_size() {
        let mut space = space();
        assert_eq!(u32_at(&space, 0), 0x0010_1b36);
        assert_eq!(u32_at(&space, 8), 0x0108_0202);
        space.write(0x10, &[0xff; 8]).unwrap();
        assert_eq!((u32_at(&space, 0x10), u32_at(&space, 0x14)), (0xffff_c004, 0xffff_ffff));
        space.write(0, &[0xff; 4]).unwrap();
        assert_eq!(u32_at(&space, 0), 0x0010_1b36);
        space.reset();
        assert_eq!(u32_at(&space, 0x10), 4);
    }

    #[test]
    fn capabilities_are_linked_and_flr_is_seen() {
        let mut space = space();
        let mut ids = Vec::new();
        let mut at = u32_at(&space, 0x34) as u8;
        while at != 0 {
            let header = u32_at(&space, at.into());
            ids.push(header as u8);
            if header as u8 == CAP_MSIX {
                assert_eq!(header >> 16 & 0x7ff, 64);
            }
            if header as u8 == CAP_PCIE {
                assert_eq!(space.write(u64::from(at) + 8, &[0, 0x80]), Ok(Effect::Reset));
                assert_eq!(space.write(u64::from(at) + 8, &[0x10, 0x20]), Ok(Effect::None));
            }
            at = (header >> 8) as u8;
        }
        assert_eq!(ids, [CAP_PM, CAP_MSIX, CAP_PCIE]);
    }

    #[test]
    fn the_end_is_the_end() {
        let mut space = space();
        assert!(space.read(4095, &mut [0; 2]).is_err());
        assert!(space.write(u64::MAX, &[0; 2]).is_err());
        assert_eq!(space.read(0, &mut [0; CONFIG_SIZE]), Ok(()));
    }
}
