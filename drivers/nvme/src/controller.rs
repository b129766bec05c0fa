//! The controller: bring-up, identification, queues, shutdown. Every step has a deadline.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Bar, Device, Interrupt, Irq},
    dma::{HugePages, Pool},
    reactor::{PollerGuard, register_poller, sleep},
};

use crate::{
    Error, Result,
    identify::{self, ControllerInfo},
    namespace::{Namespace, NamespaceInfo},
    queue::{MAX_SLOTS, MAX_TRANSFER, Parts, QueuePair},
    spec::{Cap, Sqe, admin, cc, csts, register},
    watch::Watch,
};

/// Slots of the admin queue.
const ADMIN_SLOTS: usize = 31;
/// Longest time between two looks at a register that is to change.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// How to bring a controller up.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long an I/O or admin command may take, 10 s by default. After that the queue ends.
    pub timeout: Duration,
    /// I/O queues to ask the controller for, 64 by default; it may grant fewer.
    pub io_queues: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), io_queues: 64 }
    }
}

/// An NVMe controller that is up. Cloning it is cheap.
///
/// [`Controller::shutdown`] ends it in order. Without that, memory that the controller may still use is given up, not freed,
/// when the last clone goes.
#[derive(Clone)]
pub struct Controller(Rc<Inner>);

struct Inner {
    watch: Watch,
    bar: Bar,
    cap: Cap,
    options: Options,
    info: ControllerInfo,
    namespaces: Rc<[NamespaceInfo]>,
    admin: Rc<QueuePair>,
    _admin_poller: PollerGuard,
    queues: RefCell<Vec<Rc<QueuePair>>>,
    next_queue: Cell<u16>,
}

/// An I/O queue. Cloning it is cheap; it is polled while it or a namespace on it is held.
#[derive(Clone)]
pub struct Queue {
    pair: Rc<QueuePair>,
    _poller: Rc<PollerGuard>,
    namespaces: Rc<[NamespaceInfo]>,
    /// A queue keeps its controller up.
    _controller: Option<Controller>,
}

impl Controller {
    /// Resets the NVMe controller behind `device`, brings it up, and identifies it and its namespaces.
    ///
    /// # Errors
    /// [`Error::Controller`] when it does not do what the specification says, in the time it says; [`Error::Runtime`] from the
    /// device.
    pub async fn new(device: &Device, options: Options) -> Result<Self> {
        let bar = device.bar(0)?;
        device.set_bus_master(true).await?;
        let cap = Cap(bar.read::<u64>(register::CAP).await?);
        if !cap.has_nvm() || cap.min_page_shift() != 12 || cap.max_queue_entries() < 2 {
            let what = format!(
                "has capabilities {:#x}: it needs the NVM command set, pages of 4 KiB, and queues of 2 entries",
                cap.0
            );
            return Err(Error::controller(what));
        }
        disable(&bar, cap).await?;
        let slots = ADMIN_SLOTS.min(cap.max_queue_entries() as usize - 1);
        let parts = parts(device, &bar, cap, 0, slots, 2 * crate::prp::PAGE, &options).await?;
        // What was lost before is not this controller's concern.
        let _ = parts.sq_doorbell.take_error();
        let admin = Rc::new(QueuePair::new(parts)?);
        let (asq, acq) = admin.ring_iovas();
        bar.write::<u32>(register::AQA, (slots as u32) << 16 | slots as u32).await?;
        bar.write::<u64>(register::ASQ, asq).await?;
        bar.write::<u64>(register::ACQ, acq).await?;
        bar.write::<u32>(register::CC, cc::EN | cc::ENTRY_SIZES).await?;
        // From here on: a reset before this did not end what was begun after it.
        let watch = admin.watch.get_or_init(|| Watch::new(device)).clone();
        wait_for(&bar, deadline(cap), "ready (CSTS.RDY = 1)", |status| status & csts::RDY != 0).await?;
        let poller = register_poller(admin.clone());
        let mut namespaces = Vec::new();
        let identified = identify::all(&admin, device, &bar, &mut namespaces).await;
        let mut inner = Inner {
            watch,
            bar,
            cap,
            options,
            info: ControllerInfo::default(),
            namespaces: namespaces.into(),
            admin,
            _admin_poller: poller,
            queues: RefCell::default(),
            next_queue: Cell::new(1),
        };
        if let Err(error) = inner.describe(identified).await {
            // The admin queue is quiesced by the reset, if it can be had; else its memory is given up.
            let _ = inner.reset().await;
            return Err(error);
        }
        Ok(Self(Rc::new(inner)))
    }

    /// What Identify says of the controller.
    pub fn info(&self) -> &ControllerInfo {
        &self.0.info
    }

    /// The active namespaces.
    pub fn namespaces(&self) -> &[NamespaceInfo] {
        &self.0.namespaces
    }

    /// The device behind it.
    pub fn device(&self) -> &Device {
        self.0.watch.device()
    }

    /// Makes an I/O queue on which `depth` commands can be outstanding; fewer, if the controller's queues are shorter. Its
    /// completions are polled for by the reactor of this thread, with naps between the looks when nothing comes for a while.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for a depth of 0 or above [`MAX_SLOTS`], or when all queues are in use; [`Error::Status`]
    /// from the controller.
    pub async fn create_queue(&self, depth: usize) -> Result<Queue> {
        self.make_queue(depth, false).await
    }

    /// [`Controller::create_queue`], with an interrupt: while commands are outstanding and the reactor does not poll (see
    /// [`Idle`](vfio_uring::reactor::Idle)), it sleeps until the controller signals a completion. Each batch of completions costs
    /// the controller that signal, also while they are polled for.
    ///
    /// # Errors
    /// As of [`Controller::create_queue`]; [`vfio_uring::Error::Unsupported`] when the device has neither MSI-X nor MSI, or too few
    /// vectors: queue n has vector n.
    pub async fn create_interrupt_queue(&self, depth: usize) -> Result<Queue> {
        self.make_queue(depth, true).await
    }

    async fn make_queue(&self, depth: usize, interrupt: bool) -> Result<Queue> {
        let inner = &*self.0;
        if !(1..=MAX_SLOTS).contains(&depth) {
            return Err(Error::invalid(format!("a queue depth of {depth}: it can be 1 to {MAX_SLOTS}")));
        }
        let id = inner.next_queue.get();
        if id > inner.info.io_queues {
            return Err(Error::invalid(format!("all {} I/O queues of the controller are in use", inner.info.io_queues)));
        }
        // A number is not used again, also when the queue can't be made.
        inner.next_queue.set(id + 1);
        let slots = depth.min(inner.cap.max_queue_entries() as usize - 1);
        let max_transfer = inner.info.max_transfer;
        let device = inner.watch.device();
        let mut parts = parts(device, &inner.bar, inner.cap, id, slots, max_transfer, &inner.options).await?;
        parts.watch = Some(inner.watch.clone());
        // Interrupts, and the vector.
        let mut cq_flags = 0;
        if interrupt {
            parts.interrupt = Some(vector(device, id.into()).await?);
            cq_flags = u32::from(id) << 16 | 1 << 1;
        }
        let pair = Rc::new(QueuePair::new(parts)?);
        inner.queues.borrow_mut().push(pair.clone());
        let (sq, cq) = pair.ring_iovas();
        let size_and_id = (slots as u32) << 16 | u32::from(id);
        let create = |opcode: u8, iova: u64, dword11: u32| Sqe::new(opcode, 0).prps(iova, 0).dwords10(size_and_id, dword11);
        // Physically contiguous; the submission queue is served by the completion queue of the same number.
        crate::command::run(&inner.admin, create(admin::CREATE_CQ, cq, 1 | cq_flags), None).await.0?;
        crate::command::run(&inner.admin, create(admin::CREATE_SQ, sq, 1 | u32::from(id) << 16), None).await.0?;
        Ok(Queue::new(pair, inner.namespaces.clone(), Some(self.clone())))
    }

    /// Disables the controller at once, and ends its queues: commands that are still pending end with [`Error::Ended`], and all
    /// memory is freed. For one whose queues have ended, before [`Controller::new`] brings it up again on the same device. If the
    /// device was reset meanwhile, nothing is left to do for it.
    ///
    /// # Errors
    /// [`Error::Controller`] when it does not become disabled; its memory is given up then.
    pub async fn reset(&self) -> Result<()> {
        self.0.reset().await
    }

    /// Ends the controller in order: it completes what it works on and makes its cache durable, and is then disabled. Commands
    /// that are still pending end with [`Error::Ended`]. One whose device was reset has nothing to complete.
    ///
    /// # Errors
    /// [`Error::Controller`] when it does not shut down in time; its memory is given up then.
    pub async fn shutdown(self) -> Result<()> {
        let inner = &*self.0;
        if inner.watch.was_reset() || inner.watch.is_proven() {
            return inner.reset().await;
        }
        let config = inner.bar.read::<u32>(register::CC).await?;
        inner.bar.write::<u32>(register::CC, config & !cc::SHN_MASK | cc::SHN_NORMAL).await?;
        let time = Duration::from_micros(inner.info.shutdown_micros.into()).max(Duration::from_secs(10));
        let complete = |status: u32| status & csts::SHST_MASK == csts::SHST_COMPLETE;
        wait_for(&inner.bar, Instant::now() + time, "shut down (CSTS.SHST = 2)", complete).await?;
        inner.reset().await
    }
}

impl Inner {
    /// Disables the controller, unless its device was reset. Confirmed by CSTS.RDY, or by the device, it touches no memory any more.
    async fn reset(&self) -> Result<()> {
        if !self.watch.is_proven() {
            disable(&self.bar, self.cap).await?;
        }
        self.admin.quiesce();
        self.queues.borrow().iter().for_each(|queue| queue.quiesce());
        Ok(())
    }

    /// Completes what is known of the controller.
    async fn describe(&mut self, identified: Result<ControllerInfo>) -> Result<()> {
        self.info = identified?;
        self.info.max_queue_entries = self.cap.max_queue_entries();
        self.info.io_queues = self.negotiate_queues().await?;
        Ok(())
    }

    /// How many I/O queues the controller grants.
    async fn negotiate_queues(&self) -> Result<u16> {
        // Numbers here are less one, and 65535 is not allowed.
        let wanted = u32::from(self.options.io_queues.clamp(1, 65534)) - 1;
        let sqe = Sqe::new(admin::SET_FEATURES, 0).dwords10(admin::FEATURE_QUEUES, wanted << 16 | wanted);
        let granted = crate::command::run(&self.admin, sqe, None).await.0?;
        Ok((granted & 0xffff).min(granted >> 16).min(wanted) as u16 + 1)
    }
}

impl Queue {
    fn new(pair: Rc<QueuePair>, namespaces: Rc<[NamespaceInfo]>, controller: Option<Controller>) -> Self {
        let poller = Rc::new(register_poller(pair.clone()));
        Self { pair, _poller: poller, namespaces, _controller: controller }
    }

    /// A queue that the caller has made the controller's side of: for a controller that somebody else brought up, benchmarks
    /// and fuzzing. `start` is called with the addresses of the submission and the completion queue, before the first command.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for parts that are out of range, [`Error::Runtime`] when the memory is short.
    pub fn from_parts(parts: Parts, namespaces: &[NamespaceInfo], start: impl FnOnce(u64, u64)) -> Result<Self> {
        let pair = Rc::new(QueuePair::new(parts)?);
        let (sq, cq) = pair.ring_iovas();
        start(sq, cq);
        Ok(Self::new(pair, namespaces.into(), None))
    }

    /// The controller is proven to use none of the queue's memory any more: what its commands own is freed with them, instead of
    /// given up. For queues of [`Queue::from_parts`].
    pub fn quiesced(&self) {
        self.pair.quiesce();
    }
    /// A namespace on this queue.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] when there is no such active namespace, [`vfio_uring::Error::Unsupported`] for a format with metadata.
    pub fn namespace(&self, nsid: u32) -> Result<Namespace> {
        let Some(info) = self.namespaces.iter().find(|info| info.nsid == nsid) else {
            let known: Vec<_> = self.namespaces.iter().map(|info| info.nsid.to_string()).collect();
            return Err(Error::invalid(format!("there is no namespace {nsid}; active: {}", known.join(", "))));
        };
        Namespace::new(self.pair.clone(), *info, self.clone())
    }

    /// Commands that can be outstanding at once.
    pub fn depth(&self) -> usize {
        self.pair.slots.len()
    }
}

fn deadline(cap: Cap) -> Instant {
    Instant::now() + Duration::from_millis(cap.timeout_ms())
}

/// An interrupt vector.
async fn vector(device: &Device, number: u32) -> Result<Interrupt> {
    let irq = if device.irq(Irq::MsiX).count != 0 { Irq::MsiX } else { Irq::Msi };
    let mut vectors = device.interrupts(irq, number, 1).await?;
    vectors.pop().ok_or_else(|| Error::controller(format!("gave no {irq:?} vector {number}")))
}

async fn parts(
    device: &Device,
    bar: &Bar,
    cap: Cap,
    id: u16,
    slots: usize,
    max_transfer: usize,
    options: &Options,
) -> Result<Parts> {
    let max_transfer = max_transfer.min(MAX_TRANSFER);
    let memory = Pool::new(device.dma(), Parts::memory(slots, max_transfer), HugePages::No).await?;
    let doorbell = |index: u64| bar.posted::<u32>(register::DOORBELLS + (2 * u64::from(id) + index) * cap.doorbell_stride());
    Ok(Parts {
        id,
        slots,
        memory,
        max_transfer,
        sq_doorbell: doorbell(0)?,
        cq_doorbell: doorbell(1)?,
        timeout: options.timeout,
        watch: None,
        interrupt: None,
    })
}

/// Clears CC.EN and waits for CSTS.RDY to follow.
async fn disable(bar: &Bar, cap: Cap) -> Result<()> {
    let config = bar.read::<u32>(register::CC).await?;
    if config & cc::EN != 0 {
        bar.write::<u32>(register::CC, config & !(cc::EN | cc::SHN_MASK)).await?;
    }
    let until = deadline(cap);
    loop {
        // Fatal status does not matter here: a reset is what clears it.
        let status = bar.read::<u32>(register::CSTS).await?;
        if status == u32::MAX {
            return Err(gone());
        }
        if status & csts::RDY == 0 {
            return Ok(());
        }
        if Instant::now() >= until {
            let after = cap.timeout_ms();
            return Err(Error::controller(format!("did not become disabled (CSTS.RDY = 0) within {after} ms")));
        }
        sleep(LOOK_INTERVAL).await;
    }
}

fn gone() -> Error {
    Error::controller("reads as all ones: it is gone, or its memory space is disabled")
}

/// Waits for CSTS to be what it has to become.
async fn wait_for(bar: &Bar, until: Instant, what: &str, good: impl Fn(u32) -> bool) -> Result<()> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    loop {
        let status = bar.read::<u32>(register::CSTS).await?;
        if status == u32::MAX {
            return Err(gone());
        }
        if status & csts::CFS != 0 {
            return Err(Error::controller(format!("reports a fatal error (CSTS = {status:#x}) and has to be reset")));
        }
        if good(status) {
            return Ok(());
        }
        if Instant::now() >= until {
            let after = start.elapsed().as_millis();
            return Err(Error::controller(format!("did not become {what} within {after} ms: CSTS = {status:#x}")));
        }
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_INTERVAL);
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("info", &self.0.info).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("id", &self.pair.id).field("depth", &self.depth()).finish()
    }
}
