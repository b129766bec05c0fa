//! Configuration space: its layout, and the walk of its capability lists.
//!
//! Sources: PCI Local Bus 3.0 section 6, PCI Express Base 5.0 section 7.

use crate::{Error, Result};

/// Offsets in configuration space.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod offset {
    pub const VENDOR_ID: u64 = 0x00;
    pub const DEVICE_ID: u64 = 0x02;
    pub const COMMAND: u64 = 0x04;
    pub const STATUS: u64 = 0x06;
    pub const REVISION: u64 = 0x08;
    pub const CLASS: u64 = 0x09;
    pub const HEADER_TYPE: u64 = 0x0e;
    pub const BAR0: u64 = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: u64 = 0x2c;
    pub const SUBSYSTEM_ID: u64 = 0x2e;
    pub const CAPABILITIES: u64 = 0x34;
    pub const EXTENDED: u64 = 0x100;
}

/// COMMAND: the device decodes its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND: the device may master the bus, that is, do DMA and send MSIs.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// STATUS: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Bytes of configuration space without the extended part.
pub const CONFIG_SIZE: u64 = 256;
/// Bytes of configuration space of PCI Express.
pub const EXTENDED_CONFIG_SIZE: u64 = 4096;

/// Capability ids.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod capability {
    pub const POWER_MANAGEMENT: u16 = 0x01;
    pub const MSI: u16 = 0x05;
    pub const VENDOR: u16 = 0x09;
    pub const EXPRESS: u16 = 0x10;
    pub const MSI_X: u16 = 0x11;
    pub const ADVANCED_FEATURES: u16 = 0x13;

    pub const EXTENDED_AER: u16 = 0x0001;
    pub const EXTENDED_SRIOV: u16 = 0x0010;

    /// The name of a capability, for people.
    pub fn name(id: u16, extended: bool) -> &'static str {
        match (extended, id) {
            (false, POWER_MANAGEMENT) => "power management",
            (false, MSI) => "MSI",
            (false, VENDOR) => "vendor-specific",
            (false, EXPRESS) => "PCI Express",
            (false, MSI_X) => "MSI-X",
            (false, ADVANCED_FEATURES) => "advanced features",
            (true, EXTENDED_AER) => "advanced error reporting",
            (true, 0x0003) => "device serial number",
            (true, 0x000b) => "vendor-specific",
            (true, 0x000e) => "alternative routing-ID",
            (true, 0x000f) => "address translation services",
            (true, EXTENDED_SRIOV) => "SR-IOV",
            (true, 0x0013) => "page request",
            (true, 0x001b) => "PASID",
            _ => "unknown",
        }
    }
}

/// A capability of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciCapability {
    /// See [`capability`].
    pub id: u16,
    /// Version, of extended capabilities; 0 for others.
    pub version: u8,
    /// Offset of its header in configuration space.
    pub offset: u16,
    /// Whether it is in the extended list, which has ids of its own.
    pub extended: bool,
}

/// What a device says that it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device, a number of the vendor's.
    pub device: u16,
    /// Vendor of the board.
    pub subsystem_vendor: u16,
    /// Board, a number of its vendor's.
    pub subsystem: u16,
    /// Class, subclass and programming interface, from high to low byte: 0x010802 is an NVM Express controller.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// The walk of both capability lists, without the reads: it asks for aligned 4-byte registers one by one and is given them.
///
/// A list that loops, leaves its area or is longer than fits in it is refused.
///
/// ```
/// use vfio_uring::pci::CapabilityWalk;
///
/// let mut config = [0u32; 64];
/// config[0x04 / 4] = 1 << 20; // status: has capabilities
/// config[0x34 / 4] = 0x40;
/// config[0x40 / 4] = 0x0011; // MSI-X, the last
/// let mut walk = CapabilityWalk::new(256);
/// while let Some(offset) = walk.wants() {
///     walk.give(config[offset as usize / 4])?;
/// }
/// assert_eq!(walk.found()[0].id, 0x11);
/// # Ok::<(), vfio_uring::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CapabilityWalk {
    extended: bool,
    next: Option<Step>,
    /// A bit for each 4-byte place that was visited.
    visited: [u64; 16],
    found: Vec<PciCapability>,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Status,
    Pointer,
    Standard(u16),
    Extended(u16),
}

impl CapabilityWalk {
    /// A walk of a configuration space of `size` bytes.
    pub fn new(size: u64) -> Self {
        let next = (size >= CONFIG_SIZE).then_some(Step::Status);
        Self { extended: size >= EXTENDED_CONFIG_SIZE, next, visited: [0; 16], found: Vec::new() }
    }

    /// The offset of the 4 bytes that are needed next; `None` at the end.
    pub fn wants(&self) -> Option<u64> {
        self.next.map(|step| match step {
            Step::Status => offset::COMMAND,
            Step::Pointer => offset::CAPABILITIES,
            Step::Standard(at) | Step::Extended(at) => at.into(),
        })
    }

    /// Takes the value of what was asked for.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for a broken list; the walk ends there, and what was found stays.
    pub fn give(&mut self, value: u32) -> Result<()> {
        let Some(step) = self.next.take() else { return Ok(()) };
        match step {
            Step::Status if value >> 16 & u32::from(STATUS_CAPABILITIES) != 0 => self.next = Some(Step::Pointer),
            Step::Status => self.start_extended(),
            Step::Pointer => self.standard(value as u8)?,
            Step::Standard(at) => {
                let id = value & 0xff;
                // All ones: the device does not answer, or the list ends in nothing.
                if id == 0xff {
                    return Err(Error::fault(format!(
                        "no capability is at {at:#x} of configuration space: it reads as ones"
                    )));
                }
                self.found.push(PciCapability { id: id as u16, version: 0, offset: at, extended: false });
                self.standard((value >> 8) as u8)?;
            }
            // An empty list is a header of zeros (or ones, where nothing answers).
            Step::Extended(0x100) if value == 0 || value == u32::MAX => {}
            Step::Extended(at) => {
                let (id, version, next) = (value as u16, (value >> 16 & 0xf) as u8, (value >> 20) as u16 & 0xffc);
                self.found.push(PciCapability { id, version, offset: at, extended: true });
                if next != 0 {
                    self.visit(next, offset::EXTENDED as u16)?;
                    self.next = Some(Step::Extended(next));
                }
            }
        }
        Ok(())
    }

    /// What was found so far, in the order of the lists.
    pub fn found(&self) -> &[PciCapability] {
        &self.found
    }

    /// What was found.
    pub fn into_found(self) -> Vec<PciCapability> {
        self.found
    }

    fn standard(&mut self, pointer: u8) -> Result<()> {
        let at = u16::from(pointer & 0xfc);
        if at == 0 {
            self.start_extended();
            return Ok(());
        }
        self.visit(at, 0x40)?;
        self.next = Some(Step::Standard(at));
        Ok(())
    }

    fn start_extended(&mut self) {
        self.visited[offset::EXTENDED as usize / 256] |= 1;
        self.next = self.extended.then_some(Step::Extended(offset::EXTENDED as u16));
    }

    fn visit(&mut self, at: u16, lowest: u16) -> Result<()> {
        let (word, bit) = (usize::from(at) / 256, u32::from(at) / 4 % 64);
        let Some(visited) = self.visited.get_mut(word).filter(|_| at >= lowest) else {
            return Err(Error::fault(format!("a capability pointer leads to {at:#x} of configuration space")));
        };
        if *visited >> bit & 1 != 0 {
            return Err(Error::fault(format!("the list of capabilities loops at {at:#x} of configuration space")));
        }
        *visited |= 1 << bit;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(config: &[(u16, u32)], size: u64) -> (Vec<(u16, u16)>, Option<Error>) {
        let mut walk = CapabilityWalk::new(size);
        let mut error = None;
        let mut reads = 0;
        while let Some(at) = walk.wants() {
            reads += 1;
            assert!(reads < 2000 && at + 4 <= size && at % 4 == 0);
            let value = config.iter().find(|(offset, _)| u64::from(*offset) == at).map_or(0, |&(_, value)| value);
            error = walk.give(value).err().or(error);
        }
        (walk.found().iter().map(|c| (c.id, c.offset)).collect(), error)
    }

    const HAS: (u16, u32) = (4, 0x0010_0000);

    #[test]
    fn both_lists() {
        let config = [HAS, (0x34, 0xff43), (0x40, 0x6001), (0x60, 0x0011), (0x100, 0x1481_0001), (0x148, 0x0002_0010)];
        let all = [(1, 0x40), (0x11, 0x60), (1, 0x100), (0x10, 0x148)];
        let (found, error) = walk(&config, 4096);
        assert_eq!((found.as_slice(), error.is_none()), (&all[..], true));
        assert_eq!(walk(&config, 256).0, all[..2]);
        assert_eq!(walk(&config[1..], 256).0, []);
        assert_eq!(walk(&config, 64).0, []);
        let (found, error) = walk(&[(0x100, u32::MAX)], 4096);
        assert!(found.is_empty() && error.is_none());
    }

    #[test]
    fn loops_and_strays_end_the_walk() {
        for config in [
            vec![HAS, (0x34, 0x40), (0x40, 0x4001)],
            vec![HAS, (0x34, 0x40), (0x40, 0x5001), (0x50, 0x4005)],
            vec![HAS, (0x34, 0x10)],
            vec![HAS, (0x34, 0x40), (0x40, u32::MAX)],
            vec![(0x100, 0x1001_0001)],
            vec![(0x100, 0x0041_0001)],
            vec![(0x100, 0x2001_0001), (0x200, 0x3001_0001), (0x300, 0x2001_0001)],
        ] {
            assert!(walk(&config, 4096).1.is_some(), "{config:x?}");
        }
        // Every dword points to the next: as long as it can get.
        let mut long: Vec<_> = (0x40..0x100).step_by(4).map(|at| (at, u32::from((at + 4) & 0xff) << 8 | 9)).collect();
        long.extend([HAS, (0x34, 0x40)]);
        assert_eq!(walk(&long, 256).0.len(), 48);
    }
}
