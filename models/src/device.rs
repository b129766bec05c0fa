//! What a software PCI device is to a server, and what a server is to a device.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::io::Errno;
use vfio_uring::dma::SharedMemory;

/// Region indices as vfio-pci numbers them.
pub mod region {
    /// The first BAR.
    pub const BAR0: u32 = 0;
    /// The expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// Number of regions: six BARs, ROM, configuration space, VGA.
    pub const COUNT: u32 = 9;
}

/// Interrupt indices as vfio-pci numbers them.
pub mod irq {
    /// Pin interrupt.
    pub const INTX: u32 = 0;
    /// Message-signalled interrupts.
    pub const MSI: u32 = 1;
    /// Extended message-signalled interrupts.
    pub const MSIX: u32 = 2;
    /// Device errors.
    pub const ERR: u32 = 3;
    /// The device is asked back.
    pub const REQ: u32 = 4;
    /// Number of indices.
    pub const COUNT: u32 = 5;
}

/// Client memory that is not mapped, not mapped for this direction, that the client has truncated, or failed to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client's memory is not mapped there, not for this direction, or gone")]
pub struct Unmapped;

/// How a device reaches its client's memory and interrupts. Implemented by the server's session, and by tests, benches and fuzzing.
pub trait Host {
    /// Copies from client memory at `iova`.
    ///
    /// # Errors
    /// [`Unmapped`]; a part may have been copied.
    fn read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped>;

    /// Copies to client memory at `iova`.
    ///
    /// # Errors
    /// [`Unmapped`]; a part may have been copied.
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped>;

    /// The mapped memory that holds all of `iova..iova + len`, and where in it, for typed access without a copy through a buffer.
    /// `None`: use [`Host::read`] and [`Host::write`]. It may be gone as soon as it is accessed.
    fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)>;

    /// Signals an MSI-X vector; nothing happens when it is not bound.
    fn signal(&mut self, vector: u16);

    /// Signals the one MSI of a device that has one besides MSI-X; nothing happens when it is not bound.
    fn signal_msi(&mut self) {}

    /// Signals the first vector of an interrupt index that only some devices have; nothing happens when it is not bound.
    fn signal_specific(&mut self, index: u32) {
        let _ = index;
    }
}

/// A host without memory and interrupts: what a device has while no client is connected.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHost;

impl Host for NoHost {
    fn read(&mut self, _iova: u64, _to: &mut [u8]) -> Result<(), Unmapped> {
        Err(Unmapped)
    }

    fn write(&mut self, _iova: u64, _from: &[u8]) -> Result<(), Unmapped> {
        Err(Unmapped)
    }

    fn window(&self, _iova: u64, _len: usize) -> Option<(&SharedMemory, u64)> {
        None
    }

    fn signal(&mut self, _vector: u16) {}
}

/// The part of a region that a client may map.
#[derive(Debug, Clone)]
pub struct Mappable {
    /// Where it starts in the region, and in `fd`.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// Holds the bytes of the region at the region's own offsets.
    pub fd: Arc<OwnedFd>,
    /// The device's own mapping of the area, from its start.
    pub memory: Arc<SharedMemory>,
}

/// What a region is like.
#[derive(Debug, Clone, Default)]
pub struct RegionSpec {
    /// Bytes, 0 = the device has no such region.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_*`: READ 1, WRITE 2.
    pub flags: u32,
    /// The part that may be mapped.
    pub mappable: Option<Mappable>,
    /// What a region from [`region::COUNT`] on is.
    pub kind: Option<Kind>,
}

/// What a region or an interrupt that only some devices have is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Its type.
    pub type_: u32,
    /// Its subtype.
    pub subtype: u32,
    /// A capability that is a number, and its id.
    pub capability: Option<(u16, u32)>,
}

impl RegionSpec {
    /// Readable and writable by messages.
    pub const READ_WRITE: u32 = 3;
}

/// What a server waits for while a device has nothing to do, besides its client.
#[derive(Debug, Default)]
pub struct Rest<'a> {
    /// The longest time until [`Device::service`] is to be called again.
    pub at_most: Option<Duration>,
    /// Readable when there is work.
    pub fd: Option<BorrowedFd<'a>>,
}

/// A software PCI device.
pub trait Device {
    /// The region of an index below [`Device::regions`]; it does not change while a client is connected.
    fn region(&self, index: u32) -> RegionSpec;

    /// Vectors of an interrupt index below [`Device::irqs`].
    fn irq_vectors(&self, index: u32) -> u32;

    /// Number of regions. Those from [`region::COUNT`] on have a [`RegionSpec::kind`].
    fn regions(&self) -> u32 {
        region::COUNT
    }

    /// Number of interrupt indices.
    fn irqs(&self) -> u32 {
        irq::COUNT
    }

    /// What an interrupt index from [`irq::COUNT`] on is, where the client is to be told.
    fn irq_kind(&self, index: u32) -> Option<Kind> {
        let _ = index;
        None
    }

    /// Reads from a region. The bounds were checked against [`Device::region`].
    ///
    /// # Errors
    /// The errno for the client, `EINVAL` for a width or alignment that the device does not take.
    fn read(&mut self, region: u32, offset: u64, to: &mut [u8], host: &mut impl Host) -> Result<(), Errno>;

    /// Writes to a region. The bounds were checked against [`Device::region`].
    ///
    /// # Errors
    /// As for [`Device::read`].
    fn write(&mut self, region: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno>;

    /// Initial registers, doorbells zeroed: on DEVICE_RESET and when the client is gone.
    fn reset(&mut self, host: &mut impl Host);

    /// The client is gone, and all that it set up goes with it. By default a reset.
    fn disconnected(&mut self) {
        self.reset(&mut NoHost);
    }

    /// Polls the doorbells and processes what is there, a bounded batch; gives the units of work that were done.
    fn service(&mut self, host: &mut impl Host) -> usize;

    /// Whether [`Device::service`] may find work: worth polling at a high rate.
    fn is_active(&self) -> bool;

    /// The server is about to sleep: what is to wake it besides its client. By default nothing is.
    fn rest(&mut self) -> Rest<'_> {
        Rest::default()
    }
}
