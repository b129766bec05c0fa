//! Receiving: the ring, and what is taken from it.
//!
//! Each descriptor that the NIC has written is copied once and checked. One that makes no sense is dropped and counted, with all
//! of its packet; its buffer is used again.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use vfio_uring::{dma::DmaRing, reactor::TaskRef};

use crate::{
    Result,
    counters::{Counters, Drop},
    packet::{Node, Packet},
    pool::{self, Local, Stack},
    queue::{Owner, Pair},
    shared::{Doorbell, Remains},
    spec::rx,
};

/// What `info` of the status word says whether a packet is as most are.
const REGULAR: u64 = rx::EOP | rx::RXE;

/// A receive ring: there is a buffer in every descriptor, all but one of which the NIC has.
pub(crate) struct RxRing {
    /// There is one until the queue goes.
    ring: Option<DmaRing<[u64; 2]>>,
    slots: RefCell<Vec<Box<Node>>>,
    mask: usize,
    /// The next descriptor that the NIC writes.
    next: Cell<usize>,
    /// Up to where the NIC was told of buffers.
    rung: Cell<usize>,
    doorbell: Doorbell,
    local: Rc<Local>,
    counters: Arc<Counters>,
    buffer_len: usize,
    /// Bytes of a packet at most.
    max_len: usize,
    /// The buffers of a packet whose end is not there yet.
    partial: RefCell<Vec<Box<Node>>>,
    partial_len: Cell<usize>,
    /// There is such a packet, or the rest of one is dropped.
    irregular: Cell<bool>,
    /// The rest of the packet is dropped.
    skipping: Cell<bool>,
    /// A packet is there but no buffer to take its place.
    starved: Cell<bool>,
    dead: Cell<bool>,
    released: Cell<bool>,
    waiting: Cell<bool>,
    task: Cell<TaskRef>,
}

/// What a receive ring is made of.
pub(crate) struct RxParts {
    pub(crate) ring: DmaRing<[u64; 2]>,
    /// As many as the ring has descriptors, which is a power of two.
    pub(crate) nodes: Vec<Box<Node>>,
    pub(crate) doorbell: Doorbell,
    pub(crate) buffer_len: usize,
    pub(crate) max_len: usize,
}

impl RxParts {
    /// Puts the buffers into the descriptors.
    pub(crate) fn fill(&self) {
        for (index, node) in self.nodes.iter().enumerate() {
            let _ = self.ring.set(index, &[node.iova.to_le(), 0]);
        }
    }
}

impl RxRing {
    pub(crate) fn new(parts: RxParts, local: Rc<Local>, counters: Arc<Counters>) -> Self {
        let RxParts { ring, nodes, doorbell, buffer_len, max_len } = parts;
        let size = nodes.len();
        // The one before the first is the last that the NIC has: it was told so when it was brought up.
        Self {
            ring: Some(ring),
            slots: RefCell::new(nodes),
            mask: size.saturating_sub(1),
            next: Cell::new(0),
            rung: Cell::new(0),
            doorbell,
            local,
            counters,
            buffer_len,
            max_len,
            partial: RefCell::new(Vec::with_capacity(max_len.div_ceil(buffer_len) + 1)),
            partial_len: Cell::new(0),
            irregular: Cell::new(false),
            skipping: Cell::new(false),
            starved: Cell::new(false),
            dead: Cell::new(false),
            released: Cell::new(false),
            waiting: Cell::new(false),
            task: Cell::default(),
        }
    }

    /// Whether the NIC has written the next descriptor.
    #[inline]
    fn has_descriptor(&self) -> bool {
        let Some(ring) = &self.ring else { return false };
        matches!(ring.load_u64(self.next.get(), 8), Ok(word) if word & rx::DD != 0)
    }

    /// Whether a packet, or a part of one, can be taken.
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.has_descriptor() && !self.dead.get() && (!self.starved.get() || self.local.has_some())
    }

    /// How many of the `most` descriptors from `at` on the NIC seems to have written.
    #[inline]
    fn written(ring: &DmaRing<[u64; 2]>, at: usize, most: usize) -> usize {
        let Ok(mut entries) = ring.entries(at..at + most) else { return 0 };
        // A look at the last is enough when there is a lot.
        match ring.load_u64(at + most - 1, 8) {
            Ok(word) if word & rx::DD != 0 => most,
            _ => entries.position(|entry| entry.load::<1>() & rx::DD == 0).unwrap_or(most),
        }
    }

    /// Takes up to `max` packets that are there, and puts fresh buffers in their place.
    #[inline]
    fn take(&self, out: &mut Vec<Packet>, max: usize) -> usize {
        let Some(ring) = self.ring.as_ref().filter(|_| !self.dead.get()) else { return 0 };
        let (mut stack, mut slots) = (self.local.stack().borrow_mut(), self.slots.borrow_mut());
        let (mut at, mut bytes, before) = (self.next.get(), 0, out.len());
        // A NIC that writes descriptors which it was not given does not keep us here.
        let (size, mut left) = (slots.len(), max.min(slots.len()));
        let mut regular = !self.irregular.get();
        while left != 0 {
            let most = Self::written(ring, at, if regular { left.min(size - at) } else { 1 });
            if most == 0 {
                break;
            }
            if stack.is_empty() && !self.local.refill(&mut stack) {
                self.starve();
                break;
            }
            if !regular || most == 1 {
                let Some(slot) = slots.get_mut(at) else { break };
                let Some(packet) = self.take_one(ring, at, slot, &mut stack) else { break };
                bytes += packet.as_ref().map_or(0, Packet::len);
                out.extend(packet);
                (at, left) = ((at + 1) & self.mask, left - 1);
                // It may have been the first part of a packet.
                regular &= !self.irregular.get();
                continue;
            }
            // Fresh buffers go to the caller's list, where each changes places with a packet.
            let (first, count) = (out.len(), most.min(stack.len()));
            let keep = stack.len() - count;
            out.extend(stack.drain(keep..).map(Packet));
            let (taken, len) = self.exchange(ring, at, &mut slots, out.get_mut(first..).unwrap_or_default());
            bytes += len;
            (at, left) = ((at + taken) & self.mask, left - taken);
            if taken != count {
                stack.extend(out.drain(first + taken..).map(|mut packet| packet.0.take()));
                regular = false;
            }
        }
        self.next.set(at);
        let taken = out.len() - before;
        self.counters.received(taken as u64, bytes as u64);
        taken
    }

    /// Puts the buffers of `fresh` into the descriptors from `at` on and has the packets from there in their place, up to one that is
    /// not as most are. How many, and their bytes.
    #[inline(never)]
    fn exchange(
        &self,
        ring: &DmaRing<[u64; 2]>,
        at: usize,
        slots: &mut [Box<Node>],
        fresh: &mut [Packet],
    ) -> (usize, usize) {
        let range = at..at + fresh.len();
        let (Ok(entries), Some(slots)) = (ring.entries(range.clone()), slots.get_mut(range)) else { return (0, 0) };
        let (buffer_len, mut taken, mut bytes) = (self.buffer_len, 0, 0);
        for ((packet, slot), entry) in fresh.iter_mut().zip(slots).zip(entries) {
            let status = entry.load::<1>();
            let len = (status >> rx::LEN_SHIFT) as usize & 0xffff;
            if status & (rx::DD | REGULAR) != rx::DD | rx::EOP || len.wrapping_sub(1) >= buffer_len {
                break;
            }
            let info = entry.load::<0>();
            let Some(fresh) = packet.0.take() else { break };
            let iova = fresh.iova;
            let mut node = std::mem::replace(slot, fresh);
            node.len = len as u32;
            node.info = [info, status];
            node.offload = None;
            // It has none: nothing is to be dropped.
            std::mem::forget(packet.0.replace(node));
            entry.store::<0>(iova);
            entry.store::<1>(0);
            bytes += len;
            taken += 1;
        }
        (taken, bytes)
    }

    /// Takes one descriptor, of whatever form; `None`: there is none. The packet, when it is complete.
    #[inline(never)]
    fn take_one(
        &self,
        ring: &DmaRing<[u64; 2]>,
        at: usize,
        slot: &mut Box<Node>,
        stack: &mut Stack,
    ) -> Option<Option<Packet>> {
        let entry = ring.entry(at).ok()?;
        let status = entry.load::<1>();
        if status & rx::DD == 0 {
            return None;
        }
        let fresh = stack.pop().flatten()?;
        let info = entry.load::<0>();
        entry.store::<0>(fresh.iova);
        entry.store::<1>(0);
        let mut node = std::mem::replace(slot, fresh);
        let len = (status >> rx::LEN_SHIFT) as usize & 0xffff;
        node.len = len as u32;
        node.info = [info, status];
        node.offload = None;
        if status & REGULAR == rx::EOP && len.wrapping_sub(1) < self.buffer_len && !self.irregular.get() {
            return Some(Some(Packet(Some(node))));
        }
        Some(self.assemble(node, len, status, stack))
    }

    /// A descriptor that may not be a whole packet of its own. The packet, when it is complete.
    fn assemble(&self, node: Box<Node>, len: usize, status: u64, stack: &mut Stack) -> Option<Packet> {
        let ends = status & rx::EOP != 0;
        let mut partial = self.partial.borrow_mut();
        let whole = self.partial_len.get() + len;
        let most = self.max_len.div_ceil(self.buffer_len);
        let problem = if self.skipping.get() {
            None
        } else if status & rx::RXE != 0 {
            Some(Drop::Device)
        } else if len == 0 || len > self.buffer_len {
            Some(Drop::Descriptor)
        } else if whole > self.max_len || partial.len() >= most {
            Some(Drop::TooLong)
        } else {
            partial.push(node);
            self.partial_len.set(whole);
            self.irregular.set(!ends);
            if !ends {
                return None;
            }
            self.partial_len.set(0);
            // The first has what the last descriptor says of the packet.
            let info = partial.last().map_or([0; 2], |node| node.info);
            let mut chain = None;
            while let Some(mut node) = partial.pop() {
                node.next = chain;
                chain = Some(node);
            }
            if let Some(first) = chain.as_deref_mut() {
                first.info = info;
            }
            return Some(Packet(chain));
        };
        if let Some(problem) = problem {
            self.counters.dropped(problem);
        }
        self.partial_len.set(0);
        self.skipping.set(!ends);
        self.irregular.set(!ends);
        stack.push(Some(node));
        stack.extend(partial.drain(..).map(Some));
        None
    }

    #[cold]
    fn starve(&self) {
        if !self.starved.replace(true) {
            self.counters.starved();
        }
    }

    /// Tells the NIC of new buffers.
    #[inline]
    pub(crate) fn ring_doorbell(&self) {
        let next = self.next.get();
        if next != self.rung.get() && !self.dead.get() {
            self.rung.set(next);
            // One stays ours, so that full and empty are not the same.
            self.doorbell.write((next.wrapping_sub(1) & self.mask) as u32);
        }
    }

    /// A turn of the reactor. True: something was found.
    #[inline]
    pub(crate) fn poll(&self) -> bool {
        self.ring_doorbell();
        if !self.waiting.get() {
            return false;
        }
        let found = self.is_ready();
        if found {
            self.starved.set(false);
            self.wake();
        }
        found
    }

    fn wake(&self) {
        self.waiting.set(false);
        self.task.take().wake();
    }

    /// Whether a task waits for packets.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.get()
    }

    /// Whether what is missing is a buffer, which no interrupt tells of.
    pub(crate) fn is_starved(&self) -> bool {
        self.starved.get()
    }

    fn poll_ready(&self, cx: &Context<'_>) -> bool {
        if self.is_ready() {
            self.starved.set(false);
            return true;
        }
        self.waiting.set(true);
        self.task.set(TaskRef::current(cx));
        false
    }

    /// Nothing more is taken.
    pub(crate) fn end(&self) {
        self.dead.set(true);
        self.wake();
    }

    /// The NIC is proven not to touch the ring nor its buffers any more: they go back.
    pub(crate) fn release(&self) {
        if !self.released.replace(true) {
            self.ring.iter().for_each(|ring| ring.shared().release());
            self.slots.take().into_iter().for_each(pool::give);
            self.partial.take().into_iter().for_each(pool::give);
        }
    }

    /// What the NIC may still use; `None`: nothing.
    pub(crate) fn remains(&mut self) -> Option<Remains> {
        let ring = self.ring.take()?;
        if self.released.get() {
            return None;
        }
        self.partial.take().into_iter().for_each(pool::give);
        let nodes = self.slots.take();
        Some(Remains { ring, nodes })
    }
}

/// A receive queue: a stream of packets, which ends after the error that ended the queue; or [`RxQueue::rx_batch`] for the peak.
///
/// The NIC gets fresh buffers as packets are taken. When there are none, since all are held as packets, nothing is taken: the ring
/// fills up and the NIC drops and counts what comes. It goes on when packets are dropped.
pub struct RxQueue {
    pub(crate) pair: Rc<Pair>,
    pub(crate) batch: Vec<Packet>,
    pub(crate) ended: bool,
    pub(crate) _owner: Rc<Owner>,
}

impl RxQueue {
    /// Takes packets that are there, from up to `max` descriptors, without waiting; how many.
    ///
    /// # Errors
    /// What ended the queue.
    #[inline]
    pub fn rx_batch(&mut self, packets: &mut Vec<Packet>, max: usize) -> Result<usize> {
        let taken = self.pair.rx.take(packets, max);
        if taken == 0 {
            self.pair.alive()?;
        }
        Ok(taken)
    }

    /// Waits until there is something to take. After this there may still be no packet, when what was there had to be dropped.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn ready(&mut self) -> Result<()> {
        let pair = &self.pair;
        poll_fn(|cx| match pair.alive() {
            Err(error) => Poll::Ready(Err(error)),
            Ok(()) if pair.rx.poll_ready(cx) => Poll::Ready(Ok(())),
            Ok(()) => Poll::Pending,
        })
        .await
    }

    /// The next packet.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn recv(&mut self) -> Result<Packet> {
        loop {
            if let Some(token) = self.try_recv()? {
                return Ok(token.into_packet());
            }
            self.ready().await?;
        }
    }

    /// A token for the next packet, if there is one.
    ///
    /// # Errors
    /// What ended the queue.
    pub fn try_recv(&mut self) -> Result<Option<RxToken>> {
        let mut batch = std::mem::take(&mut self.batch);
        let taken = self.rx_batch(&mut batch, 1);
        let packet = batch.pop();
        self.batch = batch;
        taken?;
        Ok(packet.map(RxToken))
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.pair.index
    }
}

impl Stream for RxQueue {
    type Item = Result<Packet>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        loop {
            match self.try_recv() {
                Ok(Some(token)) => return Poll::Ready(Some(Ok(token.into_packet()))),
                Ok(None) if self.pair.rx.poll_ready(cx) => {}
                Ok(None) => return Poll::Pending,
                Err(error) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }
}

impl std::fmt::Debug for RxQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RxQueue").field("index", &self.pair.index).finish_non_exhaustive()
    }
}

impl std::ops::Drop for RxQueue {
    fn drop(&mut self) {
        // What waits for packets does not wait any more.
        self.pair.rx.waiting.set(false);
        drop(self.pair.rx.task.take());
    }
}

/// A received packet that nobody has looked at.
#[derive(Debug)]
pub struct RxToken(Packet);

impl RxToken {
    /// Lends the first buffer's data to `f`, and gives the buffer back afterwards.
    pub fn consume<R>(self, f: impl FnOnce(&[u8]) -> R) -> R {
        f(self.0.data())
    }

    /// The packet itself.
    pub fn into_packet(self) -> Packet {
        self.0
    }
}
