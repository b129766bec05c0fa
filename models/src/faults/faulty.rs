//! Any device with a fault queue.

use std::time::Duration;

use rustix::io::Errno;
use vfio_uring::{dma::SharedMemory, fault::Reason};

use super::Unit;
use crate::device::{Device, Host, Kind, RegionSpec, Rest, Unmapped, irq, region};

/// How often the handle is looked at, where the device itself has a descriptor to be woken by.
const LOOK: Duration = Duration::from_millis(10);

/// A device that has no regions and interrupts besides those of every PCI device, and a fault queue for what it does with memory: each
/// of its accesses that fails, or is told to fail, is a fault at the access's first address. It never asks for pages.
///
/// ```
/// use vfio_uring_models::{faults::{Config, Faulty, Form, Unit}, nvme::Controller, server::{Running, Server}};
///
/// let unit = Unit::new(Config::new(Form::Single)?)?;
/// let server = Server::new(Faulty::new(Controller::new(Default::default())?, unit))?;
/// Running::start(server)?.stop()?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Faulty<D> {
    device: D,
    unit: Unit,
}

impl<D: Device> Faulty<D> {
    /// A device and its queue.
    pub fn new(device: D, unit: Unit) -> Self {
        Self { device, unit }
    }
}

/// The client's memory, with faults.
struct FaultyHost<'a, H> {
    host: &'a mut H,
    unit: &'a mut Unit,
}

impl<H: Host> FaultyHost<'_, H> {
    fn access(
        &mut self,
        iova: u64,
        len: usize,
        write: bool,
        access: impl FnOnce(&mut H) -> Result<(), Unmapped>,
    ) -> Result<(), Unmapped> {
        let (result, reason) = match self.unit.forbids(iova, len) {
            true => (Err(Unmapped), Reason::Permission),
            false => (access(self.host), Reason::PteFetch),
        };
        if result.is_err() {
            self.unit.access(iova, write, reason);
        }
        result
    }
}

impl<H: Host> Host for FaultyHost<'_, H> {
    fn read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped> {
        self.access(iova, to.len(), false, |host| host.read(iova, to))
    }

    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped> {
        self.access(iova, from.len(), true, |host| host.write(iova, from))
    }

    fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)> {
        if self.unit.forbids(iova, len) { None } else { self.host.window(iova, len) }
    }

    fn signal(&mut self, vector: u16) {
        self.host.signal(vector);
    }

    fn signal_msi(&mut self) {
        self.host.signal_msi();
    }
}

impl<D: Device> Device for Faulty<D> {
    fn region(&self, index: u32) -> RegionSpec {
        if index < region::COUNT { self.device.region(index) } else { self.unit.region(index) }
    }

    fn irq_vectors(&self, index: u32) -> u32 {
        if index < irq::COUNT { self.device.irq_vectors(index) } else { u32::from(index < self.unit.irqs()) }
    }

    fn regions(&self) -> u32 {
        self.unit.regions()
    }

    fn irqs(&self) -> u32 {
        self.unit.irqs()
    }

    fn irq_kind(&self, index: u32) -> Option<Kind> {
        self.unit.irq_kind(index)
    }

    fn read(&mut self, index: u32, offset: u64, to: &mut [u8], host: &mut impl Host) -> Result<(), Errno> {
        if index < region::COUNT {
            return self.device.read(index, offset, to, &mut FaultyHost { host, unit: &mut self.unit });
        }
        self.unit.read(index, offset, to)
    }

    fn write(&mut self, index: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno> {
        if index < region::COUNT {
            return self.device.write(index, offset, from, &mut FaultyHost { host, unit: &mut self.unit });
        }
        self.unit.write(index, offset, from)
    }

    fn reset(&mut self, host: &mut impl Host) {
        self.device.reset(&mut FaultyHost { host, unit: &mut self.unit });
    }

    fn disconnected(&mut self) {
        self.device.disconnected();
        self.unit.reset();
    }

    fn service(&mut self, host: &mut impl Host) -> usize {
        let work = if self.device.is_active() {
            self.device.service(&mut FaultyHost { host: &mut *host, unit: &mut self.unit })
        } else {
            0
        };
        work + self.unit.service(host)
    }

    fn is_active(&self) -> bool {
        self.device.is_active() || self.unit.is_active()
    }

    fn rest(&mut self) -> Rest<'_> {
        let Rest { at_most, fd } = self.device.rest();
        match fd {
            None => Rest { at_most, fd: Some(self.unit.wake()) },
            fd => Rest { at_most: Some(at_most.map_or(LOOK, |at_most| at_most.min(LOOK))), fd },
        }
    }
}
