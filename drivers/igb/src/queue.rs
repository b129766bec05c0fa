//! A queue pair: made by the NIC, sent to the thread that is to own it, and started there.

use std::{
    cell::{Cell, RefCell},
    os::fd::OwnedFd,
    rc::{Rc, Weak},
    sync::Arc,
    task::Poll,
};

use rustix::event::PollFlags;
use vfio_uring::{
    dma::{DmaRing, Pool},
    mmio::Register,
    reactor::{
        self, JoinHandle, Poller, PollerGuard, Standby, op::MultishotPoll, op::poll_multishot, register_poller, spawn,
    },
};

use crate::{
    Result, RxQueue, TxQueue,
    counters::Counters,
    options::{check_buffer_len, check_ring},
    packet::Node,
    pool::{Home, Local},
    rx::{RxParts, RxRing},
    shared::{Doorbell, Remains, Shared, State},
    tx::TxRing,
};

/// Unit of DMA buffers.
const PAGE: usize = 4096;

/// The interrupt vector of a queue pair.
pub(crate) struct Vector {
    pub(crate) fd: Arc<OwnedFd>,
    /// EIMS, and the vector's bit.
    pub(crate) enable: Doorbell,
    pub(crate) bit: u32,
}

/// A queue pair that is not started: [`QueueSeed::start`] it on the thread whose reactor is to own it. Dropped, its memory is kept
/// until the NIC is stopped.
pub struct QueueSeed {
    inner: Option<Inner>,
}

struct Inner {
    index: u16,
    rx: RxParts,
    tx: DmaRing<[u64; 2]>,
    tx_entries: usize,
    tx_doorbell: Doorbell,
    space_id: u64,
    /// Buffers that are not in the ring.
    nodes: Vec<Box<Node>>,
    home: Arc<Home>,
    counters: Arc<Counters>,
    shared: Arc<Shared>,
    vector: Option<Vector>,
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<QueueSeed>();
    is_send::<crate::Packet>();
};

/// What a queue pair without a NIC of ours is made of: for benchmarks, fuzzing, and NICs that somebody else brought up.
#[derive(Debug)]
pub struct Parts {
    /// Memory for the rings and the buffers: [`Parts::memory`] bytes.
    pub memory: Pool,
    /// As [`Options::rx_ring`](crate::Options::rx_ring).
    pub rx_ring: u16,
    /// As [`Options::tx_ring`](crate::Options::tx_ring).
    pub tx_ring: u16,
    /// As [`Options::buffers`](crate::Options::buffers).
    pub buffers: usize,
    /// As [`Options::buffer_len`](crate::Options::buffer_len).
    pub buffer_len: usize,
    /// Bytes of a received packet at most.
    pub max_len: usize,
    /// RDT.
    pub rx_doorbell: Register<u32>,
    /// TDT.
    pub tx_doorbell: Register<u32>,
}

impl Parts {
    /// Bytes of DMA memory that a queue pair takes.
    pub fn memory(rx_ring: u16, tx_ring: u16, buffers: usize, buffer_len: usize) -> usize {
        let ring = |entries: u16| (usize::from(entries) * 16).next_multiple_of(PAGE);
        ring(rx_ring) + ring(tx_ring) + (usize::from(rx_ring) + buffers) * buffer_len.next_multiple_of(PAGE)
    }
}

/// What [`QueueSeed::new`] takes beside the sizes.
pub(crate) struct Plan<'a> {
    pub(crate) index: u16,
    pub(crate) memory: &'a Pool,
    pub(crate) rx_ring: u16,
    pub(crate) tx_ring: u16,
    pub(crate) buffers: usize,
    pub(crate) buffer_len: usize,
    pub(crate) max_len: usize,
    pub(crate) rx_doorbell: Doorbell,
    pub(crate) tx_doorbell: Doorbell,
    pub(crate) vector: Option<Vector>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) counters: Arc<Counters>,
}

impl QueueSeed {
    pub(crate) fn new(plan: Plan<'_>) -> Result<Self> {
        let Plan { index, memory, rx_ring, tx_ring, buffers, buffer_len, max_len, .. } = plan;
        check_ring("rx_ring", rx_ring)?;
        check_ring("tx_ring", tx_ring)?;
        check_buffer_len(buffer_len)?;
        let ring = |entries: u16| -> Result<DmaRing<[u64; 2]>> {
            let ring = DmaRing::new(memory.alloc(usize::from(entries) * 16)?.into_shared())?;
            ring.clear();
            Ok(ring)
        };
        let (rx, tx) = (ring(rx_ring)?, ring(tx_ring)?);
        let all = usize::from(rx_ring) + buffers;
        let home = Home::new(all);
        let mut nodes = Vec::with_capacity(all);
        for _ in 0..all {
            nodes.push(Box::new(Node::new(memory.alloc(buffer_len)?, Some(home.clone()))));
        }
        let in_ring = nodes.split_off(buffers);
        let rx = RxParts { ring: rx, nodes: in_ring, doorbell: plan.rx_doorbell, buffer_len, max_len };
        rx.fill();
        Ok(Self {
            inner: Some(Inner {
                index,
                rx,
                tx,
                tx_entries: tx_ring.into(),
                tx_doorbell: plan.tx_doorbell,
                space_id: memory.space_id(),
                nodes,
                home,
                counters: plan.counters,
                shared: plan.shared,
                vector: plan.vector,
            }),
        })
    }

    /// A queue pair that the caller has made the NIC's side of. The NIC may use all descriptors of the receive ring but the last.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for parts that are out of range, [`vfio_uring::Error::Exhausted`] when the memory is short.
    pub fn from_parts(parts: Parts) -> Result<(Self, Proof)> {
        let shared = Shared::new(1);
        let seed = Self::new(Plan {
            index: 0,
            memory: &parts.memory,
            rx_ring: parts.rx_ring,
            tx_ring: parts.tx_ring,
            buffers: parts.buffers,
            buffer_len: parts.buffer_len,
            max_len: parts.max_len,
            rx_doorbell: Doorbell::Mapped(parts.rx_doorbell),
            tx_doorbell: Doorbell::Mapped(parts.tx_doorbell),
            vector: None,
            shared: shared.clone(),
            counters: Arc::default(),
        })?;
        Ok((seed, Proof(shared)))
    }

    /// Where the NIC sees the receive ring and the transmit ring.
    pub fn iovas(&self) -> (u64, u64) {
        self.inner.as_ref().map_or((0, 0), |inner| (inner.rx.ring.iova(), inner.tx.iova()))
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.inner.as_ref().map_or(0, |inner| inner.index)
    }

    /// Starts the queues on this thread's reactor, which polls them, or waits for their interrupt, from now on until both are dropped.
    ///
    /// # Errors
    /// [`vfio_uring::Error::NoReactor`] outside of a reactor; [`crate::Error`] that ended the NIC.
    pub fn start(mut self) -> Result<(RxQueue, TxQueue)> {
        if !reactor::is_running() {
            return Err(vfio_uring::Error::NoReactor { what: "a NIC's queue" }.into());
        }
        if let Some(inner) = &self.inner
            && inner.shared.state() != State::Up
        {
            return Err(inner.shared.cause());
        }
        let Some(inner) = self.inner.take() else { return Err(crate::Error::Stopped) };
        let Inner { index, rx, tx, tx_entries, tx_doorbell, space_id, nodes, home, counters, shared, vector } = inner;
        let local = Local::new(home, nodes);
        local.enter();
        let pair = Rc::new(Pair {
            index,
            rx: RxRing::new(rx, local.clone(), counters.clone()),
            tx: TxRing::new(tx, tx_entries, space_id, tx_doorbell, local.clone(), counters),
            local,
            shared,
            vector: vector.map(|Vector { fd, enable, bit }| Armed {
                poll: RefCell::new(poll_multishot(&fd, PollFlags::IN.bits().into())),
                enable,
                bit,
                armed: Cell::new(false),
            }),
            dead: Cell::new(false),
            poller: Cell::new(None),
            watch: Cell::new(None),
        });
        pair.watch.set(Some(spawn(watch(Rc::downgrade(&pair), pair.shared.clone(), index))));
        let polled = Rc::new(Polled(pair.clone()));
        pair.poller.set(Some(register_poller(polled)));
        let owner = Rc::new(Owner(pair.clone()));
        let rx = RxQueue { pair: pair.clone(), batch: Vec::with_capacity(1), ended: false, _owner: owner.clone() };
        Ok((rx, TxQueue { pair, _owner: owner }))
    }
}

impl Drop for QueueSeed {
    fn drop(&mut self) {
        if let Some(Inner { rx, tx, shared, index, home, .. }) = self.inner.take() {
            home.close();
            shared.bury(Remains { ring: rx.ring, nodes: rx.nodes });
            shared.bury(Remains { ring: tx, nodes: Vec::new() });
            shared.leave(index.into());
        }
    }
}

impl std::fmt::Debug for QueueSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueSeed").field("index", &self.index()).finish_non_exhaustive()
    }
}

/// For queues of [`QueueSeed::from_parts`]: the caller's knowledge of the NIC's side.
pub struct Proof(Arc<Shared>);

impl Proof {
    /// The NIC uses no memory of the queues any more: they end, and what they own is freed instead of given up.
    pub fn quiesced(&self) {
        self.0.end(crate::Error::Stopped);
        self.0.quiesce();
    }
}

impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proof").finish_non_exhaustive()
    }
}

/// An interrupt vector on the thread of its queue.
struct Armed {
    poll: RefCell<MultishotPoll>,
    enable: Doorbell,
    bit: u32,
    /// The NIC was told to signal, and has not yet.
    armed: Cell<bool>,
}

/// A queue pair that is started.
pub(crate) struct Pair {
    pub(crate) index: u16,
    pub(crate) rx: RxRing,
    pub(crate) tx: TxRing,
    pub(crate) local: Rc<Local>,
    shared: Arc<Shared>,
    vector: Option<Armed>,
    dead: Cell<bool>,
    poller: Cell<Option<PollerGuard>>,
    watch: Cell<Option<JoinHandle<()>>>,
}

/// Ends a queue pair when both of its queues are dropped.
pub(crate) struct Owner(Rc<Pair>);

impl Drop for Owner {
    fn drop(&mut self) {
        let pair = &self.0;
        pair.end();
        if let Some(watch) = pair.watch.take() {
            watch.abort();
        }
        drop(pair.poller.take());
        pair.local.close();
    }
}

impl Pair {
    /// Why it has ended, if it has.
    #[inline]
    pub(crate) fn alive(&self) -> Result<()> {
        if self.dead.get() { Err(self.shared.cause()) } else { Ok(()) }
    }

    /// Ends with the NIC before a doorbell is rung, which may be another queue's by now. The task that waits for it may run later.
    #[inline]
    fn look(&self) {
        if !self.dead.get() && self.shared.state() != State::Up {
            self.end();
        }
    }

    /// No more doorbells.
    fn end(&self) {
        self.dead.set(true);
        self.rx.end();
        self.tx.end();
        self.shared.leave(self.index.into());
    }

    /// The NIC uses none of its memory any more.
    fn release(&self) {
        self.rx.release();
        self.tx.release();
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if self.shared.state() == State::Quiesced {
            self.release();
        }
        for remains in [self.rx.remains(), self.tx.remains()].into_iter().flatten() {
            self.shared.bury(remains);
        }
    }
}

/// Ends the pair when the NIC does.
async fn watch(pair: Weak<Pair>, shared: Arc<Shared>, index: u16) {
    let mut state = shared.changed(index.into(), State::Up).await;
    let Some(alive) = pair.upgrade() else { return };
    alive.end();
    drop(alive);
    if state == State::Ended {
        state = shared.changed(index.into(), State::Ended).await;
    }
    if state == State::Quiesced
        && let Some(pair) = pair.upgrade()
    {
        pair.release();
    }
}

/// The poller of a pair.
struct Polled(Rc<Pair>);

impl Poller for Polled {
    #[inline]
    fn poll(&self) -> bool {
        self.0.look();
        self.0.tx.poll() | self.0.rx.poll()
    }

    fn standby(&self) -> Standby {
        let pair = &*self.0;
        pair.look();
        pair.rx.ring_doorbell();
        pair.tx.ring_doorbell();
        if pair.dead.get() || !(pair.rx.is_waiting() || pair.tx.is_busy()) {
            return Standby::Idle;
        }
        match &pair.vector {
            Some(vector) if !pair.rx.is_starved() => vector.arm(pair),
            _ => Standby::Polled,
        }
    }
}

impl Armed {
    /// Has the NIC signal: what came before is found by the look after it.
    fn arm(&self, pair: &Pair) -> Standby {
        if !self.armed.replace(true) {
            self.enable.write(self.bit);
        }
        match self.poll.borrow_mut().poll_idle() {
            Poll::Ready(result) => {
                // The NIC has masked it, until it is told again.
                self.armed.set(false);
                if let Err(error) = result {
                    tracing::warn!(%error, "the interrupt of a NIC's queue");
                    return Standby::Polled;
                }
                Standby::Found
            }
            Poll::Pending if pair.rx.is_waiting() && pair.rx.is_ready() || pair.tx.is_ready() => Standby::Found,
            Poll::Pending => Standby::Armed(None),
        }
    }
}
