//! Sending: the ring, context descriptors, and buffers that come back.
//!
//! The NIC is asked to report some descriptors only: the last of each turn, and one in every few. What is before a reported one
//! is done, too.

mod any;
mod queue;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    task::Context,
};

use vfio_uring::{dma::DmaRing, reactor::TaskRef};

pub use self::queue::{TxQueue, TxToken};
use crate::{
    SendError,
    counters::Counters,
    packet::{Node, Packet},
    pool::{self, Local},
    shared::{Doorbell, Remains},
    spec::{MAX_FRAME, tx},
};

/// Of a descriptor with a whole packet, without its length.
const PLAIN: u64 = tx::DATA | tx::DEXT | tx::IFCS | tx::EOP;
/// An Ethernet header.
const MIN_LEN: usize = 14;
/// Without CRC and VLAN tag.
const MAX_LEN: usize = MAX_FRAME - 4;
/// Buffers of a packet at most.
const MAX_SEGMENTS: usize = 16;
/// Descriptors of a packet at most.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS + 1;
/// One in so many descriptors is reported.
const REPORT: usize = 32;

/// A transmit ring.
pub(crate) struct TxRing {
    /// There is one until the queue goes.
    ring: Option<DmaRing<[u64; 2]>>,
    slots: RefCell<Box<[Option<Box<Node>>]>>,
    mask: usize,
    /// The next descriptor to write.
    tail: Cell<usize>,
    /// Up to where the NIC was told.
    rung: Cell<usize>,
    /// The oldest descriptor that is not known to be done.
    oldest: Cell<usize>,
    /// Descriptors that can be written; one always stays free.
    free: Cell<usize>,
    /// Of the free ones, those that tokens have.
    reserved: Cell<usize>,
    /// Descriptors that will be reported, in order.
    reports: RefCell<VecDeque<usize>>,
    /// What was written last: the second half of a packet's last descriptor.
    last: Cell<u64>,
    /// The context that the NIC has.
    context: Cell<[u64; 2]>,
    space_id: u64,
    doorbell: Doorbell,
    local: Rc<Local>,
    counters: Arc<Counters>,
    dead: Cell<bool>,
    released: Cell<bool>,
    /// Descriptors that a task waits for to be free.
    wanted: Cell<usize>,
    task: Cell<TaskRef>,
}

impl TxRing {
    pub(crate) fn new(
        ring: DmaRing<[u64; 2]>,
        size: usize,
        space_id: u64,
        doorbell: Doorbell,
        local: Rc<Local>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            ring: Some(ring),
            slots: RefCell::new((0..size).map(|_| None).collect()),
            mask: size.saturating_sub(1),
            tail: Cell::new(0),
            rung: Cell::new(0),
            oldest: Cell::new(0),
            free: Cell::new(size.saturating_sub(1)),
            reserved: Cell::new(0),
            reports: RefCell::new(VecDeque::with_capacity(size)),
            last: Cell::new(0),
            context: Cell::new([0; 2]),
            space_id,
            doorbell,
            local,
            counters,
            dead: Cell::new(false),
            released: Cell::new(false),
            wanted: Cell::new(0),
            task: Cell::default(),
        }
    }

    /// Whether a packet is as most are: it needs one descriptor.
    #[inline(always)]
    fn is_simple(&self, node: &Node) -> bool {
        node.is_plain() && (node.len as usize).wrapping_sub(MIN_LEN) <= MAX_LEN - MIN_LEN && node.space_id == self.space_id
    }

    fn report(&self, at: usize) {
        self.reports.borrow_mut().push_back(at);
    }

    /// Sends what has room, from the front of `packets`; how many are gone.
    #[inline]
    fn send_batch(&self, packets: &mut Vec<Packet>) -> usize {
        let Some(ring) = self.ring.as_ref().filter(|_| !self.dead.get()) else { return 0 };
        if self.available() < packets.len() {
            self.reclaim(&mut pool::give);
        }
        let mut room = self.available();
        let (mut gone, mut sent, mut bytes) = (0, 0, 0);
        let before = room;
        let mut tail = self.tail.get();
        while let Some(rest) = packets.get_mut(gone..).filter(|rest| !rest.is_empty()) {
            // Up to a descriptor that is to be reported, or around the end of the ring.
            let run = rest.len().min(room).min(REPORT - tail % REPORT).min(self.mask + 1 - tail);
            let (done, len) =
                self.put_run(ring, tail, &mut self.slots.borrow_mut(), rest.get_mut(..run).unwrap_or_default());
            (gone, sent, room, bytes) = (gone + done, sent + done, room - done, bytes + len);
            tail = (tail + done) & self.mask;
            self.tail.set(tail);
            if done != 0 && tail.is_multiple_of(REPORT) {
                self.report_last(ring, tail);
            }
            if done == run && run != 0 {
                continue;
            }
            match self.put_aside(ring, packets.get_mut(gone), room) {
                Some((0, _)) => {}
                Some((used, len)) => (room, bytes, sent) = (room - used, bytes + len, sent + 1),
                None => break,
            }
            tail = self.tail.get();
            gone += 1;
        }
        self.free.set(self.free.get() - (before - room));
        self.counters.sent(sent as u64, bytes as u64);
        // Nothing is left in them.
        packets.drain(..gone).for_each(std::mem::forget);
        gone
    }

    /// Writes packets that are as most are into the descriptors from `at` on; how many, and their bytes.
    #[inline(never)]
    fn put_run(
        &self,
        ring: &DmaRing<[u64; 2]>,
        at: usize,
        slots: &mut [Option<Box<Node>>],
        packets: &mut [Packet],
    ) -> (usize, usize) {
        let range = at..at + packets.len();
        let (Ok(entries), Some(slots)) = (ring.entries(range.clone()), slots.get_mut(range)) else { return (0, 0) };
        let (mut done, mut bytes, mut last) = (0, 0, self.last.get());
        for ((packet, slot), entry) in packets.iter_mut().zip(slots).zip(entries) {
            let Some(node) = packet.0.as_deref().filter(|node| self.is_simple(node)) else { break };
            let len = u64::from(node.len);
            last = PLAIN | len | len << tx::PAYLEN_SHIFT;
            let iova = node.iova;
            // It had none.
            std::mem::forget(std::mem::replace(slot, packet.0.take()));
            entry.store::<0>(iova);
            entry.store::<1>(last);
            bytes += len;
            done += 1;
        }
        self.last.set(last);
        (done, bytes as usize)
    }

    /// Has the last descriptor before `tail` be reported.
    fn report_last(&self, ring: &DmaRing<[u64; 2]>, tail: usize) {
        let (last, word) = (tail.wrapping_sub(1) & self.mask, self.last.get() | tx::RS);
        let _ = ring.set_words(last, [(1, word.to_le())]);
        self.last.set(word);
        self.report(last);
    }

    fn send(&self, mut packet: Packet) -> Result<(), SendError> {
        let (Some(node), Some(ring)) = (&packet.0, &self.ring) else { return Ok(()) };
        let needed = match self.needs(node) {
            Ok(needed) => needed,
            Err(why) => return Err(SendError::Invalid { packet, why }),
        };
        if self.available() < needed {
            self.reclaim(&mut pool::give);
            if self.available() < needed {
                return Err(SendError::Full(packet));
            }
        }
        if let Some(node) = packet.0.take() {
            let (used, bytes) = self.put(ring, node);
            self.free.set(self.free.get() - used);
            self.counters.sent(1, bytes as u64);
        }
        Ok(())
    }

    #[inline]
    fn available(&self) -> usize {
        self.free.get().saturating_sub(self.reserved.get())
    }

    /// Takes back the buffers that the NIC is done with; whether there were some.
    #[inline]
    fn reclaim(&self, take: &mut dyn FnMut(Box<Node>)) -> bool {
        let mut found = false;
        while let Some(last) = self.next_done() {
            found = true;
            let mut at = self.oldest.get();
            loop {
                let node = self.slots.borrow_mut().get_mut(at).and_then(Option::take);
                if let Some(node) = node {
                    take(node);
                }
                self.free.set(self.free.get() + 1);
                let was = at;
                at = (at + 1) & self.mask;
                if was == last {
                    break;
                }
            }
            self.oldest.set(at);
        }
        found
    }

    /// The next descriptor that was to be reported and is done.
    #[inline]
    fn next_done(&self) -> Option<usize> {
        let mut reports = self.reports.borrow_mut();
        let last = *reports.front()?;
        let status = self.ring.as_ref()?.load_u64(last, 8).ok()?;
        if status & tx::DD == 0 {
            return None;
        }
        reports.pop_front()
    }

    /// Takes the buffers back that are done, to their pools.
    #[inline]
    fn reclaim_home(&self) -> bool {
        let mut found = false;
        while let Some(last) = self.next_done() {
            found = true;
            let from = self.oldest.get();
            let count = (last.wrapping_sub(from) & self.mask) + 1;
            self.bring_home(from, count);
            self.oldest.set((last + 1) & self.mask);
            self.free.set(self.free.get() + count);
        }
        found
    }

    /// Has the buffers of `count` descriptors go home.
    fn bring_home(&self, from: usize, count: usize) {
        if count == 1 {
            let node = self.slots.borrow_mut().get_mut(from).and_then(Option::take);
            match node {
                Some(node) if self.local.is_home_of(&node) => self.local.stack().borrow_mut().push(Some(node)),
                node => node.into_iter().for_each(pool::give),
            }
            return;
        }
        // Around the end of the ring, in two parts.
        let mut slots = self.slots.borrow_mut();
        let first = count.min(slots.len().saturating_sub(from));
        for part in [from..from + first, 0..count - first] {
            let mut part = slots.get_mut(part).unwrap_or_default();
            while let Some(slot) = part.first_mut() {
                let home = match slot.as_deref() {
                    Some(node) if self.local.is_home_of(node) => Some(self.local.clone()),
                    node => node.and_then(pool::local_of),
                };
                let Some(local) = home else {
                    slot.take().into_iter().for_each(pool::give);
                    part = part.split_first_mut().map_or(&mut [], |(_, rest)| rest);
                    continue;
                };
                // Its neighbours mostly have the same home.
                let is_other = |slot: &Option<Box<Node>>| !slot.as_deref().is_some_and(|node| local.is_home_of(node));
                let same = part.iter().position(is_other).unwrap_or(part.len());
                let Some((same, rest)) = part.split_at_mut_checked(same.max(1)) else { break };
                local.stack().borrow_mut().extend(same.iter_mut().map(Option::take));
                part = rest;
            }
        }
    }

    #[inline]
    pub(crate) fn ring_doorbell(&self) {
        let tail = self.tail.get();
        if tail == self.rung.get() || self.dead.get() {
            return;
        }
        let Some(ring) = &self.ring else { return };
        self.rung.set(tail);
        if self.last.get() & tx::RS == 0 {
            self.report_last(ring, tail);
        }
        self.doorbell.write(tail as u32);
    }

    /// A turn of the reactor. True: something was found.
    #[inline]
    pub(crate) fn poll(&self) -> bool {
        self.ring_doorbell();
        let found = !self.dead.get() && self.reclaim_home();
        let wanted = self.wanted.get();
        if wanted != 0 && self.available() >= wanted {
            self.wake();
        }
        found
    }

    /// Whether the NIC has packets that it is not known to have sent.
    pub(crate) fn is_busy(&self) -> bool {
        self.oldest.get() != self.tail.get()
    }

    /// Whether the next report is there.
    pub(crate) fn is_ready(&self) -> bool {
        let reports = self.reports.borrow();
        let (Some(&last), Some(ring)) = (reports.front(), &self.ring) else { return false };
        matches!(ring.load_u64(last, 8), Ok(word) if word & tx::DD != 0)
    }

    fn wake(&self) {
        self.wanted.set(0);
        self.task.take().wake();
    }

    fn poll_room(&self, wanted: usize, cx: &Context<'_>) -> bool {
        if self.available() < wanted {
            self.reclaim_home();
        }
        if self.available() >= wanted {
            return true;
        }
        self.wanted.set(wanted);
        self.task.set(TaskRef::current(cx));
        false
    }

    /// Nothing more is sent.
    pub(crate) fn end(&self) {
        self.dead.set(true);
        self.wake();
    }

    /// See the receive ring.
    pub(crate) fn release(&self) {
        if !self.released.replace(true) {
            self.ring.iter().for_each(|ring| ring.shared().release());
            self.slots.take().into_iter().flatten().for_each(pool::give);
        }
    }

    /// See the receive ring.
    pub(crate) fn remains(&mut self) -> Option<Remains> {
        let ring = self.ring.take()?;
        if self.released.get() {
            return None;
        }
        let nodes = self.slots.take().into_iter().flatten().collect();
        Some(Remains { ring, nodes })
    }
}
