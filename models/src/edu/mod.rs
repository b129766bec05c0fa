//! QEMU's device for students (1234:11e8): a register that says who it is, one that computes factorials, interrupts, and a DMA engine
//! with a buffer of one page. Source: `docs/specs/edu.rst` of QEMU.
//!
//! [`Edu`] is a [`Device`] for [`Server`]; [`spawn`] starts one in a thread of its own. With [`Config::faults`] it has a fault queue,
//! which QEMU's has not: a transfer from or to an address that is not mapped is then reported. Interrupts are by MSI only.
//!
//! ```
//! use vfio_uring_models::{edu, faults};
//!
//! let faults = faults::Config::new(faults::Form::Single)?;
//! let handle = faults.handle.clone();
//! let server = edu::spawn(edu::Config { faults: Some(faults), ..edu::Config::default() })?;
//! handle.fault_on(0x1000..=0x1fff);
//! assert_eq!(handle.counters().stored, 0);
//! server.stop()?;
//! # Ok::<(), std::io::Error>(())
//! ```

mod dma;

use std::io;

use rustix::io::Errno;
use vfio_uring::dma::IovaRange;

use self::dma::Dma;
use crate::{
    device::{Device, Host, Kind, NoHost, RegionSpec, Rest, irq, region},
    faults::{self, Unit},
    pci::{CONFIG_SIZE, ConfigSpace, Effect, Identity},
    server::{Running, Server},
};

const IDENTITY: Identity = Identity { vendor: 0x1234, device: 0x11e8, class: 0x00_ff_00, revision: 0x10 };
/// Bytes of BAR0.
const BAR_SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// COMMAND, and its bit for bus mastering.
const COMMAND: u64 = 4;
const BUS_MASTER: u8 = 4;

/// Offsets of registers in BAR0.
pub mod register {
    /// Identification, read-only: 0x010000ed.
    pub const ID: u64 = 0x00;
    /// What is written reads back inverted.
    pub const LIVENESS: u64 = 0x04;
    /// A number, whose factorial (modulo 2^32) replaces it.
    pub const FACTORIAL: u64 = 0x08;
    /// [`COMPUTING`](super::COMPUTING), [`FACTORIAL_INTERRUPT`](super::FACTORIAL_INTERRUPT).
    pub const STATUS: u64 = 0x20;
    /// Why there was an interrupt, read-only.
    pub const INTERRUPT_STATUS: u64 = 0x24;
    /// Bits to set in the interrupt status, with an interrupt.
    pub const RAISE: u64 = 0x60;
    /// Bits to clear in the interrupt status.
    pub const ACKNOWLEDGE: u64 = 0x64;
    /// Where DMA reads from, 64 bits.
    pub const DMA_SOURCE: u64 = 0x80;
    /// Where DMA writes to, 64 bits.
    pub const DMA_DESTINATION: u64 = 0x88;
    /// Bytes of a transfer, 64 bits.
    pub const DMA_COUNT: u64 = 0x90;
    /// 1 start, 2 from the device to memory, 4 interrupt [`DMA_DONE`](super::DMA_DONE) at the end, 64 bits. The start bit stays until then.
    pub const DMA_COMMAND: u64 = 0x98;
}

/// Identification of this version.
pub const ID: u32 = 0x0100_00ed;
/// Of the status: a factorial is computed.
pub const COMPUTING: u32 = 1;
/// Of the status: there will be an interrupt with [`FACTORIAL_DONE`].
pub const FACTORIAL_INTERRUPT: u32 = 0x80;
/// Of the interrupt status: a factorial is there.
pub const FACTORIAL_DONE: u32 = 1;
/// Of the interrupt status: a transfer has ended.
pub const DMA_DONE: u32 = 0x100;
/// Of a DMA command: start.
pub const DMA_START: u64 = 1;
/// Of a DMA command: from the device to memory.
pub const DMA_TO_MEMORY: u64 = 2;
/// Of a DMA command: an interrupt at the end.
pub const DMA_INTERRUPT: u64 = 4;
/// Where DMA sees the device's buffer.
pub const BUFFER: u64 = 0x40000;
/// Bytes of the buffer.
pub const BUFFER_SIZE: u64 = PAGE;

/// How a device is made.
#[derive(Debug, Clone)]
pub struct Config {
    /// The addresses that it can put on the bus; 28 bits by default, as in QEMU. Those that are beyond lose their high bits.
    pub dma_mask: u64,
    /// A fault queue.
    pub faults: Option<faults::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self { dma_mask: (1 << 28) - 1, faults: None }
    }
}

/// Starts a device behind a socket of its own, in a thread of its own.
///
/// # Errors
/// A configuration that is not possible, or a system without memfds, sockets or threads to give.
pub fn spawn(config: Config) -> io::Result<Running> {
    Running::start(server(config)?)
}

/// A server of a device, which tells clients what addresses the device can use.
///
/// # Errors
/// As of [`spawn`].
pub fn server(config: Config) -> io::Result<Server<Edu>> {
    let usable = IovaRange { start: PAGE, last: config.dma_mask };
    Ok(Server::new(Edu::new(config)?)?.iova_ranges([usable]))
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    pci: ConfigSpace,
    faults: Option<Unit>,
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupts: u32,
    dma: Dma,
}

impl Edu {
    /// A device at its initial registers.
    ///
    /// # Errors
    /// A configuration that is not possible, or no memfd to be had.
    pub fn new(config: Config) -> io::Result<Self> {
        if config.dma_mask & config.dma_mask.wrapping_add(1) != 0 || config.dma_mask < 2 * PAGE - 1 {
            let what = "the mask of DMA addresses has its low bits set, 13 at least, and no others";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let pci = ConfigSpace::new(IDENTITY).memory_bar32(0, BAR_SIZE as u32).msi().express();
        let faults = config.faults.map(Unit::new).transpose()?;
        let dma = Dma::new(config.dma_mask);
        Ok(Self { pci, faults, liveness: 0, factorial: 0, status: 0, interrupts: 0, dma })
    }

    fn raise(&mut self, bits: u32, host: &mut impl Host) {
        self.interrupts |= bits;
        if self.interrupts != 0 {
            host.signal_msi();
        }
    }

    /// A register of 4 bytes below 0x80, one of 8 from there on.
    fn register(&self, at: u64) -> u64 {
        match at {
            register::ID => ID.into(),
            register::LIVENESS => self.liveness.into(),
            register::FACTORIAL => self.factorial.into(),
            register::STATUS => self.status.into(),
            register::INTERRUPT_STATUS => self.interrupts.into(),
            register::DMA_SOURCE => self.dma.source,
            register::DMA_DESTINATION => self.dma.destination,
            register::DMA_COUNT => self.dma.count,
            register::DMA_COMMAND => self.dma.command,
            _ => u64::MAX,
        }
    }

    fn set_register(&mut self, at: u64, value: u64, host: &mut impl Host) {
        let low = value as u32;
        match at {
            register::LIVENESS => self.liveness = !low,
            register::FACTORIAL if self.status & COMPUTING == 0 => {
                self.factorial = low;
                self.status |= COMPUTING;
            }
            register::STATUS => self.status = self.status & COMPUTING | low & FACTORIAL_INTERRUPT,
            register::RAISE => self.raise(low, host),
            register::ACKNOWLEDGE => self.interrupts &= !low,
            // A transfer goes on with what it was started with.
            _ if self.dma.is_running() => {}
            register::DMA_SOURCE => self.dma.source = value,
            register::DMA_DESTINATION => self.dma.destination = value,
            register::DMA_COUNT => self.dma.count = value,
            register::DMA_COMMAND => self.dma.start(value),
            _ => {}
        }
    }

    fn is_bus_master(&self) -> bool {
        let mut command = [0];
        self.pci.read(COMMAND, &mut command).is_ok() && command[0] & BUS_MASTER != 0
    }

    fn reset_registers(&mut self) {
        self.pci.reset();
        (self.liveness, self.factorial, self.status, self.interrupts) = (0, 0, 0, 0);
        self.dma.reset();
    }
}

/// Which register an access is to, and how many bytes it is into it.
fn place(offset: u64, len: usize) -> Result<(u64, u32), Errno> {
    match len {
        4 if offset < 0x80 && offset.is_multiple_of(4) => Ok((offset, 0)),
        4 if offset.is_multiple_of(4) => Ok((offset & !7, (offset & 4) as u32)),
        8 if offset >= 0x80 && offset.is_multiple_of(8) => Ok((offset, 0)),
        _ => Err(Errno::INVAL),
    }
}

impl Device for Edu {
    fn region(&self, index: u32) -> RegionSpec {
        let flags = RegionSpec::READ_WRITE;
        match index {
            region::BAR0 => RegionSpec { size: BAR_SIZE, flags, mappable: None, kind: None },
            region::CONFIG => RegionSpec { size: CONFIG_SIZE as u64, flags, mappable: None, kind: None },
            _ => self.faults.as_ref().map(|faults| faults.region(index)).unwrap_or_default(),
        }
    }

    fn irq_vectors(&self, index: u32) -> u32 {
        match index {
            irq::MSI | irq::ERR | irq::REQ => 1,
            index if index >= irq::COUNT && index < self.irqs() => 1,
            _ => 0,
        }
    }

    fn regions(&self) -> u32 {
        self.faults.as_ref().map_or(region::COUNT, Unit::regions)
    }

    fn irqs(&self) -> u32 {
        self.faults.as_ref().map_or(irq::COUNT, Unit::irqs)
    }

    fn irq_kind(&self, index: u32) -> Option<Kind> {
        self.faults.as_ref()?.irq_kind(index)
    }

    fn read(&mut self, index: u32, offset: u64, to: &mut [u8], _host: &mut impl Host) -> Result<(), Errno> {
        match (index, &mut self.faults) {
            (region::CONFIG, _) => self.pci.read(offset, to),
            (region::BAR0, _) => {
                let (at, into) = place(offset, to.len())?;
                let bytes = self.register(at).to_le_bytes();
                to.copy_from_slice(&bytes[into as usize..into as usize + to.len()]);
                Ok(())
            }
            (_, Some(faults)) => faults.read(index, offset, to),
            _ => Err(Errno::INVAL),
        }
    }

    fn write(&mut self, index: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno> {
        match (index, &mut self.faults) {
            (region::CONFIG, _) => {
                if self.pci.write(offset, from)? == Effect::Reset {
                    self.reset(host);
                }
            }
            (region::BAR0, _) => {
                let (at, into) = place(offset, from.len())?;
                let mut bytes = match at {
                    0x80.. => self.register(at).to_le_bytes(),
                    _ => [0; 8],
                };
                bytes[into as usize..into as usize + from.len()].copy_from_slice(from);
                self.set_register(at, u64::from_le_bytes(bytes), host);
            }
            (_, Some(faults)) => faults.write(index, offset, from)?,
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    /// The fault queue is not the device's but its IOMMU's, and stays as it is.
    fn reset(&mut self, _host: &mut impl Host) {
        self.reset_registers();
    }

    fn disconnected(&mut self) {
        self.reset(&mut NoHost);
        if let Some(faults) = &mut self.faults {
            faults.reset();
        }
    }

    fn service(&mut self, host: &mut impl Host) -> usize {
        let mut work = 0;
        if self.status & COMPUTING != 0 {
            self.factorial = (1..=self.factorial)
                .try_fold(1u32, |product, n| Some(product.wrapping_mul(n)).filter(|&p| p != 0))
                .unwrap_or(0);
            self.status &= !COMPUTING;
            work += 1;
            if self.status & FACTORIAL_INTERRUPT != 0 {
                self.raise(FACTORIAL_DONE, host);
            }
        }
        if self.dma.is_ready(self.faults.as_ref()) {
            let may = self.is_bus_master();
            work += 1;
            if self.dma.run(may, self.faults.as_mut(), host) {
                self.raise(DMA_DONE, host);
            }
        }
        if let Some(faults) = &mut self.faults {
            work += faults.service(host);
        }
        work
    }

    fn is_active(&self) -> bool {
        let faults = self.faults.as_ref();
        self.status & COMPUTING != 0 || self.dma.is_ready(faults) || faults.is_some_and(Unit::is_active)
    }

    fn rest(&mut self) -> Rest<'_> {
        Rest { at_most: None, fd: self.faults.as_ref().map(Unit::wake) }
    }
}
