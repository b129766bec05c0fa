//! A PCI device as an async resource: regions, registers, interrupts, reset, and the memory that it sees.
//!
//! ```no_run
//! use futures::StreamExt;
//! use vfio_uring::{device::{Device, Irq}, reactor::Reactor};
//!
//! # fn main() -> vfio_uring::Result<()> {
//! Reactor::new()?.block_on(async {
//!     let device = Device::open(&"vfio-user:/run/device.sock".parse()?).await?;
//!     let ids = device.config().ids().await?;
//!     device.set_bus_master(true).await?;
//!     let mut interrupts = device.interrupts(Irq::MsiX, 0, 1).await?;
//!     let status: u32 = device.bar(0)?.read(0x1c).await?;
//!     println!("{:04x}:{:04x} has status {status:#x}", ids.vendor, ids.device);
//!     if let Some(interrupt) = interrupts[0].next().await {
//!         interrupt?;
//!     }
//!     Ok(())
//! })
//! # }
//! ```

mod address;
mod bar;
mod config;
mod effects;
mod events;
pub(crate) mod gate;
mod hot_reset;
mod interrupt;
mod open;
mod power;
mod region;
mod removal;
mod reset;

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::BTreeSet,
    fmt,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

pub use address::Address;
pub use bar::{Bar, Posted};
pub use config::ConfigSpace;
pub use events::{Event, Events, RemovalPolicy};
pub use gate::{State, StateChange, StateChanges};
pub use interrupt::{Interrupt, Irq};
pub use power::{PowerState, Wakeup};
pub use region::{Region, index};

pub use crate::transport::user::protocol::{Area, IrqInfo};
use crate::{
    Error, Result,
    dma::{AddressSpace, IovaRange},
    pci,
    reactor::{self, JoinHandle, timeout},
    transport::{
        Transport,
        cdev::Bound,
        iommufd::Ioas,
        user::{client::Connection, protocol::DeviceInfo as ProtocolInfo},
        vfio::{DeviceFd, VfToken},
    },
};
use effects::Places;
use events::Board;
use gate::{Access, Gate};
use open::{Opened, Seat, Way};
use region::RegionState;

/// `VFIO_DEVICE_FLAGS_RESET`.
const FLAG_RESET: u32 = 1;
/// `VFIO_DEVICE_FLAGS_PCI`.
const FLAG_PCI: u32 = 2;
/// [`Options::deadline`]s that opening a device may take in all.
const OPEN_DEADLINES: u32 = 4;

/// How to open a device.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long an answer of a vfio-user server may take from the sending of its command; 5 s by default. A reset or an unmap may
    /// take twice that, and opening the device four times.
    pub deadline: Duration,
    /// Commands to a vfio-user server in flight at a time. `None`, the default: one, unless the server confirms that it takes
    /// more.
    pub max_outstanding: Option<usize>,
    /// The I/O virtual addresses that memory for the device may get. By default 48 bits without the first page and the window of
    /// message-signalled interrupts at 0xfee00000. What the kernel says of its devices and IOMMU narrows them further.
    pub iova_ranges: Vec<IovaRange>,
    /// The address space of another device, to share: memory that is mapped there is mapped for both. Devices of the kernel, opened
    /// in the same way, or vfio-user devices.
    ///
    /// A device joins if it can take all that is mapped already, and [`Error::Conflict`] names what is in the way; the limits of
    /// all hold for the space as long as their devices are open. Memory that a device was given is out of its hands only when the
    /// device is stopped (a driver's shutdown, a reset): a buffer that one has not given back must not go to another.
    pub space: Option<AddressSpace>,
    /// The token of a virtual function whose physical function has set one.
    pub vf_token: Option<VfToken>,
    /// Opens a device without an IOMMU, by its group: it can then write to any memory of the machine, and no memory can be
    /// mapped for it.
    pub no_iommu: bool,
    /// What happens when the kernel asks the device back, to unbind or unplug it: the application has 5 s by default.
    pub removal: RemovalPolicy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(5),
            max_outstanding: None,
            iova_ranges: vec![
                IovaRange { start: 0x1000, last: 0xfedf_ffff },
                IovaRange { start: 0xfef0_0000, last: (1 << 48) - 1 },
            ],
            space: None,
            vf_token: None,
            no_iommu: false,
            removal: RemovalPolicy::default(),
        }
    }
}

/// What a device says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Whether it is a PCI device.
    pub pci: bool,
    /// Whether it can be reset.
    pub reset: bool,
    /// Number of regions, see [`index`].
    pub regions: u32,
    /// Number of interrupt indices, see [`Irq`].
    pub irqs: u32,
}

/// The order is that of closing: mappings of BARs first, for they keep the device open; then the device.
pub(crate) struct Inner {
    address: Address,
    info: DeviceInfo,
    irqs: Vec<IrqInfo>,
    /// Vectors that an [`Interrupt`] has.
    vectors: RefCell<BTreeSet<(u32, u32)>>,
    /// Whether somebody reads the fault queue.
    faults_claimed: Cell<bool>,
    regions: Vec<RegionState>,
    gate: Arc<Gate>,
    transport: Transport,
    /// `None` once the device is closed.
    seat: RefCell<Option<Seat>>,
    board: Rc<Board>,
    dma: AddressSpace,
    /// What of configuration space the gate has to know, once it was looked for.
    places: OnceCell<Places>,
    /// Those that wait for the device to wake.
    wakeups: RefCell<Vec<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.gate.close_for_good();
        self.end_wakeups();
    }
}

/// An open device: a handle, whose clones are the same device. It belongs to the reactor that it was opened on.
///
/// Regions, BARs and interrupts keep the device too; it is closed when the last of them is dropped. A device of the kernel is reset
/// then, which may hold this thread for 100 ms, and stays bound to this process while a [`Register`](crate::mmio::Register) of it is
/// left, for that is a mapping of its BAR.
#[derive(Clone)]
pub struct Device {
    inner: Rc<Inner>,
}

/// The right to read a device's fault queue.
pub(crate) struct FaultClaim(Rc<Inner>);

impl Drop for FaultClaim {
    fn drop(&mut self) {
        self.0.faults_claimed.set(false);
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("address", &self.inner.address).finish_non_exhaustive()
    }
}

impl Device {
    /// Opens the device at `address`. The kernel resets its devices when they are opened, which takes 100 ms and more, on a thread of
    /// its own.
    ///
    /// It spawns tasks on the current reactor: one that frees DMA memory and, for a vfio-user server, the runner of the connection.
    /// They end with the device.
    ///
    /// # Errors
    /// [`Error::NoReactor`] outside of a reactor, [`Error::Io`] when nothing is at the address.
    /// - Of the kernel's VFIO: [`Error::NotReady`] with what is missing and the remedy, [`Error::InUse`] with who has the device,
    ///   [`Error::Conflict`] when it can't join the address space of the options.
    /// - Of a vfio-user server: what [`Connection::connect`] gives when it misbehaves.
    pub async fn open(address: &Address) -> Result<Self> {
        Self::open_with(address, Options::default()).await
    }

    /// [`Device::open`] with options.
    ///
    /// # Errors
    /// As for [`Device::open`].
    pub async fn open_with(address: &Address, options: Options) -> Result<Self> {
        if !reactor::is_running() {
            return Err(Error::NoReactor { what: "a device" });
        }
        let limit = options.deadline.saturating_mul(OPEN_DEADLINES);
        let opened = timeout(limit, Self::open_inner(address, &options)).await;
        opened.unwrap_or_else(|_| Err(Error::Timeout { what: format!("opening {address}"), after: limit }))
    }

    async fn open_inner(address: &Address, options: &Options) -> Result<Self> {
        let opened = match address {
            Address::User(path) => open::user(path, options).await?,
            Address::Pci(bdf) => open::kernel(*bdf, Way::Best, options).await?,
            Address::Group(bdf) => open::kernel(*bdf, Way::Group, options).await?,
            Address::Cdev(bdf) => open::kernel(*bdf, Way::Cdev, options).await?,
        };
        let Opened { regions, gate, transport, seat, dma, info, irqs, signals } = opened;
        let (address, vectors, faults_claimed, board) =
            (address.clone(), RefCell::default(), Cell::default(), Rc::default());
        let (seat, places, wakeups) = (RefCell::new(Some(seat)), Default::default(), Default::default());
        let inner = Rc::new(Inner {
            address,
            info,
            irqs,
            vectors,
            faults_claimed,
            regions,
            gate,
            transport,
            seat,
            board,
            dma,
            places,
            wakeups,
        });
        if let Some(signals) = signals {
            let (gate, board) = (inner.gate.clone(), inner.board.clone());
            reactor::spawn(events::watch(Rc::downgrade(&inner), gate, board, signals, options.removal));
        }
        Ok(Self { inner })
    }

    /// Where the device is.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// What the device says of itself.
    pub fn info(&self) -> DeviceInfo {
        self.inner.info
    }

    /// The connection to a vfio-user server, for what has no method here.
    pub fn connection(&self) -> Option<&Rc<Connection>> {
        match &self.inner.transport {
            Transport::User(connection) => Some(connection),
            Transport::Group(_) | Transport::Cdev(_) => None,
        }
    }

    /// The descriptor of a device of the kernel, for what has no method here. Its functions are system calls that may wait, for a
    /// reset above all: a reactor has them run on another thread.
    pub fn descriptor(&self) -> Option<&DeviceFd> {
        match &self.inner.transport {
            Transport::User(_) => None,
            Transport::Group(attached) | Transport::Cdev(attached) => Some(attached.device()),
        }
    }

    /// The device and its address space, where it is opened by its cdev.
    pub(crate) fn cdev(&self) -> Option<(Arc<Bound>, Ioas)> {
        self.inner.seat.borrow().as_ref()?.cdev()
    }

    /// The memory that the device sees.
    pub fn dma(&self) -> &AddressSpace {
        &self.inner.dma
    }

    /// Why the device is gone, if it is. Cheap while it is not.
    #[inline]
    pub fn is_gone(&self) -> Option<Error> {
        self.inner.transport.cause()
    }

    /// Waits until the device is gone: its server has ended, or broke the protocol, or missed a deadline; or it was taken away.
    pub async fn gone(&self) -> Error {
        self.inner.transport.until_gone().await
    }

    /// A region, by its index ([`index`]).
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device has none of this index.
    pub fn region(&self, index: u32) -> Result<Region> {
        match self.inner.regions.get(index as usize) {
            Some(state) if state.info.size != 0 => Ok(Region::new(self.inner.clone(), index)),
            _ => Err(Error::Unsupported { what: format!("region {index} ({}): it has none", region::name(index)) }),
        }
    }

    /// A base address register's region, `n` from 0 to 5, mapped as far as the device allows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device has none of this number, [`Error::DeviceFault`] when what it gives to map can't be
    /// mapped.
    pub fn bar(&self, n: u32) -> Result<Bar> {
        if n > index::BAR5 {
            return Err(Error::invalid(format!("BAR {n}: a PCI device has 0 to 5")));
        }
        Bar::new(self.region(n)?)
    }

    /// Configuration space.
    pub fn config(&self) -> ConfigSpace {
        ConfigSpace::new(Region::new(self.inner.clone(), index::CONFIG))
    }

    /// What the device has of an interrupt index; a count of 0 where it has none.
    pub fn irq(&self, irq: Irq) -> IrqInfo {
        self.inner.irqs.get(irq as usize).copied().unwrap_or_default()
    }

    /// Has `count` vectors from `start` on signalled to eventfds of our own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device does not have these vectors, [`Error::Invalid`] when another [`Interrupt`] has one
    /// of them, [`Error::Refused`] when it says no; none of them is
    /// left on then.
    pub async fn interrupts(&self, irq: Irq, start: u32, count: u32) -> Result<Vec<Interrupt>> {
        interrupt::assign(&self.inner, irq as u32, start, count).await
    }

    /// What the device has of each interrupt index: those of [`Irq`], then those that only some devices have.
    pub fn irqs(&self) -> &[IrqInfo] {
        &self.inner.irqs
    }

    /// As [`Device::interrupts`], of an index that only some devices have: see [`Device::irqs`].
    ///
    /// # Errors
    /// As for [`Device::interrupts`].
    pub async fn specific_interrupts(&self, index: u32, start: u32, count: u32) -> Result<Vec<Interrupt>> {
        interrupt::assign(&self.inner, index, start, count).await
    }

    /// The regions that the device has, by ascending index.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        (0..).zip(&self.inner.regions).filter(|(_, state)| state.info.size != 0).map(|(index, _)| self.handle(index))
    }

    fn handle(&self, index: u32) -> Region {
        Region::new(self.inner.clone(), index)
    }

    /// Takes the device's fault queue for one reader.
    pub(crate) fn claim_faults(&self) -> Result<FaultClaim> {
        if self.inner.faults_claimed.replace(true) {
            let what = format!("the fault queue of {} has a reader: close or drop that first", self.inner.address);
            return Err(Error::InUse { what });
        }
        Ok(FaultClaim(self.inner.clone()))
    }

    /// Unmasks an INTx interrupt: it is masked each time that it fires.
    ///
    /// # Errors
    /// [`Error::Refused`] when the device says no.
    pub async fn unmask(&self, irq: Irq) -> Result<()> {
        let _inside = self.inner.gate.enter(Access::Control)?;
        self.inner.transport.unmask_irqs(irq as u32, 0, 1).await
    }

    /// Lets the device master the bus (do DMA, send MSIs) and decode its memory, or takes the former from it.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] when the bit does not go off: nothing proves then that the device has stopped.
    pub async fn set_bus_master(&self, on: bool) -> Result<()> {
        let config = self.config();
        let command: u16 = config.read(pci::offset::COMMAND).await?;
        let bits = pci::COMMAND_BUS_MASTER | if on { pci::COMMAND_MEMORY } else { 0 };
        let wanted = if on { command | bits } else { command & !bits };
        config.write(pci::offset::COMMAND, wanted).await?;
        if !on && config.read::<u16>(pci::offset::COMMAND).await? & pci::COMMAND_BUS_MASTER != 0 {
            return Err(Error::fault("its bus-master bit can't be cleared"));
        }
        Ok(())
    }
}
