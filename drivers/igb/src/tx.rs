//! Sending: the ring, context descriptors, and buffers that come back.
//!
//! The NIC is asked to report some descriptors only: the last of each turn, and one in every few. What is before a reported one
//! is done, too.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Sink;
use vfio_uring::{dma::DmaRing, reactor::TaskRef};

use crate::{
    Buffers, Error, Result, SendError,
    counters::Counters,
    packet::{L4, Node, Packet, TxOffload},
    pool,
    queue::{Owner, Pair},
    shared::{Doorbell, Remains},
    spec::{MAX_FRAME, tx},
};

/// Of a descriptor with a whole packet, without its length.
const PLAIN: u64 = tx::DATA | tx::DEXT | tx::IFCS | tx::EOP;
/// An Ethernet header.
const MIN_LEN: usize = 14;
/// Without CRC and VLAN tag.
const MAX_LEN: usize = MAX_FRAME - 4;
/// With TSO: what an IP packet can have, and headers in front of it.
const MAX_TSO: usize = 65535 + 127;
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

    /// How many descriptors a packet needs, or what is wrong with it.
    #[cold]
    fn needs(&self, node: &Node) -> Result<usize, &'static str> {
        let (mut total, mut segments) = (0usize, 0);
        for node in std::iter::successors(Some(node), |node| node.next.as_deref()) {
            segments += 1;
            total = total.saturating_add(node.len as usize);
            if node.len == 0 || node.len > u16::MAX.into() {
                return Err("one of its buffers has no bytes, or more than 65535");
            }
            if node.space_id != self.space_id {
                return Err("a buffer is not in the NIC's address space: open both devices in the same one");
            }
            if segments > MAX_SEGMENTS {
                return Err("it has more than 16 buffers");
            }
        }
        let tso = node.offload.is_some_and(|offload| offload.tso.is_some());
        if total < MIN_LEN {
            return Err("it has less than 14 bytes");
        }
        if total > if tso { MAX_TSO } else { MAX_LEN } {
            return Err("it is too long: 9724 bytes can be sent, or 65662 in segments");
        }
        let Some(offload) = &node.offload else { return Ok(segments) };
        if offload.l2_len > 127 || offload.l3_len > 511 {
            return Err("its headers are too long: 127 bytes before the IP header, and 511 of it");
        }
        if offload.headers() > total {
            return Err("it is shorter than its headers");
        }
        if offload.tso.is_some_and(|tso| tso.mss == 0 || tso.l4_len < 20 || tso.l4_len > 60) {
            return Err("TSO needs a segment size, and a TCP header of 20 to 60 bytes");
        }
        Ok(segments + usize::from(self.context.get() != context(offload)))
    }

    fn report(&self, at: usize) {
        self.reports.borrow_mut().push_back(at);
    }

    /// Writes any packet; there is room for it. How many descriptors, and bytes.
    #[cold]
    fn put(&self, ring: &DmaRing<[u64; 2]>, first: Box<Node>) -> (usize, usize) {
        let (mut at, mut count) = (self.tail.get(), 0);
        let offload = first.offload;
        let mut command = tx::DATA | tx::DEXT | tx::IFCS;
        let total: usize =
            std::iter::successors(Some(&*first), |node| node.next.as_deref()).map(|node| node.len as usize).sum();
        let mut payload = total;
        if let Some(offload) = &offload {
            let context = context(offload);
            if self.context.get() != context {
                self.context.set(context);
                let _ = ring.set(at, &context.map(u64::to_le));
                (at, count) = ((at + 1) & self.mask, 1);
            }
            if offload.vlan.is_some() {
                command |= tx::VLE;
            }
            if offload.ipv4_checksum || (offload.tso.is_some() && offload.is_ipv4) {
                command |= tx::IXSM;
            }
            if offload.l4_checksum.is_some() || offload.tso.is_some() {
                command |= tx::TXSM;
            }
            if offload.tso.is_some() {
                command |= tx::TSE;
                payload = total.saturating_sub(offload.headers());
            }
        }
        let mut next = Some(first);
        while let Some(mut node) = next {
            next = node.next.take();
            let mut word = command | u64::from(node.len);
            // The first says how long all of it is.
            word |= (std::mem::take(&mut payload) as u64) << tx::PAYLEN_SHIFT;
            if next.is_none() {
                word |= tx::EOP;
                if at & (REPORT - 1) == REPORT - 1 {
                    word |= tx::RS;
                    self.report(at);
                }
            }
            let _ = ring.set_words(at, [(0, node.iova.to_le()), (1, word.to_le())]);
            self.last.set(word);
            if let Some(slot) = self.slots.borrow_mut().get_mut(at) {
                *slot = Some(node);
            }
            (at, count) = ((at + 1) & self.mask, count + 1);
        }
        self.tail.set(at);
        (count, total)
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
            let (done, len) = self.put_run(ring, tail, rest.get_mut(..run).unwrap_or_default());
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
    fn put_run(&self, ring: &DmaRing<[u64; 2]>, at: usize, packets: &mut [Packet]) -> (usize, usize) {
        let range = at..at + packets.len();
        let mut slots = self.slots.borrow_mut();
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

    /// Sends the next packet, of whatever form. How many descriptors that took, 0 if it is dropped, and bytes; `None`: it has no room.
    #[cold]
    fn put_aside(&self, ring: &DmaRing<[u64; 2]>, packet: Option<&mut Packet>, room: usize) -> Option<(usize, usize)> {
        let packet = packet?;
        let Some(node) = packet.0.take() else { return Some((0, 0)) };
        match self.needs(&node) {
            Ok(needed) if needed > room => {
                packet.0 = Some(node);
                None
            }
            Ok(_) => Some(self.put(ring, node)),
            Err(why) => {
                tracing::debug!(why, "a packet can't be sent");
                self.counters.invalid();
                pool::give_chain(Some(node));
                Some((0, 0))
            }
        }
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
        // Around the end of the ring, in two parts.
        let mut slots = self.slots.borrow_mut();
        let first = count.min(slots.len().saturating_sub(from));
        for part in [from..from + first, 0..count - first] {
            let mut part = slots.get_mut(part).unwrap_or_default();
            while let Some(slot) = part.first_mut() {
                let Some(local) = slot.as_deref().and_then(pool::local_of) else {
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

/// A context descriptor (section 7.2.2.3).
fn context(offload: &TxOffload) -> [u64; 2] {
    let low = u64::from(offload.l3_len)
        | u64::from(offload.l2_len) << tx::MACLEN_SHIFT
        | u64::from(offload.vlan.unwrap_or(0)) << tx::VLAN_SHIFT;
    let mut high = tx::CONTEXT | tx::DEXT;
    if offload.is_ipv4 {
        high |= tx::IPV4;
    }
    match (offload.l4_checksum, offload.tso) {
        (_, Some(tso)) => {
            high |= tx::TCP | u64::from(tso.l4_len) << tx::L4LEN_SHIFT | u64::from(tso.mss) << tx::MSS_SHIFT;
        }
        (Some(L4::Tcp), None) => high |= tx::TCP,
        (Some(L4::Sctp), None) => high |= tx::SCTP,
        (Some(L4::Udp) | None, None) => {}
    }
    [low, high]
}

/// A transmit queue: a sink of packets, or [`TxQueue::tx_batch`] for the peak. What was sent in a turn of the reactor the NIC is
/// told of at the turn's end; buffers go home when it has sent them.
pub struct TxQueue {
    pub(crate) pair: Rc<Pair>,
    pub(crate) _owner: Rc<Owner>,
}

impl TxQueue {
    /// Sends packets from the front of `packets`, which are taken out, as far as the ring has room; how many. What can't be sent in its
    /// form is taken out and dropped, and counted as [`tx_invalid`](crate::QueueStatistics::tx_invalid).
    ///
    /// # Errors
    /// What ended the queue; all packets are still there then.
    #[inline]
    pub fn tx_batch(&mut self, packets: &mut Vec<Packet>) -> Result<usize> {
        let gone = self.pair.tx.send_batch(packets);
        if gone == 0 {
            self.pair.alive()?;
        }
        Ok(gone)
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// [`SendError`] with the packet.
    pub fn send(&mut self, packet: Packet) -> Result<(), SendError> {
        match self.pair.alive() {
            Ok(()) => self.pair.tx.send(packet),
            Err(error) => Err(SendError::Ended { packet, error }),
        }
    }

    /// Waits until any packet has room.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn ready(&mut self) -> Result<()> {
        poll_fn(|cx| self.pair.poll_room(MAX_DESCRIPTORS, cx)).await
    }

    /// Waits until the NIC has sent everything. While there is no link, that takes for ever.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn drained(&mut self) -> Result<()> {
        poll_fn(|cx| self.pair.poll_room(self.pair.tx.mask, cx)).await
    }

    /// Reserves room for any packet, and a buffer for one; `None`: there is none now.
    pub fn reserve(&self) -> Option<TxToken<'_>> {
        let ring = &self.pair.tx;
        if self.pair.alive().is_err() {
            return None;
        }
        if ring.available() < MAX_DESCRIPTORS {
            ring.reclaim_home();
        }
        if ring.available() < MAX_DESCRIPTORS {
            return None;
        }
        let packet = self.buffers().alloc()?;
        Some(TxToken { room: Room::new(ring), packet })
    }

    /// Takes back buffers that the NIC is done with, instead of having them go home; up to now. Of a packet in several buffers, each is
    /// a packet.
    pub fn reclaim_into(&mut self, packets: &mut Vec<Packet>) -> usize {
        let before = packets.len();
        self.pair.tx.reclaim(&mut |node| packets.push(Packet(Some(node))));
        packets.len() - before
    }

    /// The queue pair's free buffers.
    pub fn buffers(&self) -> Buffers {
        Buffers(self.pair.local.clone())
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.pair.index
    }
}

impl Pair {
    fn poll_room(&self, wanted: usize, cx: &Context<'_>) -> Poll<Result<()>> {
        match self.alive() {
            Err(error) => Poll::Ready(Err(error)),
            Ok(()) if self.tx.poll_room(wanted, cx) => Poll::Ready(Ok(())),
            Ok(()) => Poll::Pending,
        }
    }
}

impl Sink<Packet> for TxQueue {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.poll_room(MAX_DESCRIPTORS, cx)
    }

    /// A packet that can't be sent in its form is an error, and lost.
    fn start_send(mut self: Pin<&mut Self>, packet: Packet) -> Result<()> {
        self.send(packet).map_err(|error| match error {
            SendError::Ended { error, .. } => error,
            SendError::Full(_) => {
                Error::invalid("the transmit ring is full: a sink has to be ready before a packet is sent")
            }
            SendError::Invalid { why, .. } => Error::invalid(format!("a packet can't be sent: {why}")),
        })
    }

    /// The NIC is told; it need not have sent anything yet.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.tx.ring_doorbell();
        Poll::Ready(self.pair.alive())
    }

    /// Everything is sent.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.poll_room(self.pair.tx.mask, cx)
    }
}

impl std::fmt::Debug for TxQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TxQueue").field("index", &self.pair.index).field("free", &self.pair.tx.free.get()).finish()
    }
}

/// Reserved room in a transmit ring, and a buffer.
pub struct TxToken<'a> {
    room: Room<'a>,
    packet: Packet,
}

/// Room for any packet.
struct Room<'a>(&'a TxRing);

impl<'a> Room<'a> {
    fn new(ring: &'a TxRing) -> Self {
        ring.reserved.set(ring.reserved.get() + MAX_DESCRIPTORS);
        Self(ring)
    }

    fn send(self, packet: Packet) -> Result<(), SendError> {
        let ring = self.0;
        drop(self);
        ring.send(packet)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.0.reserved.set(self.0.reserved.get().saturating_sub(MAX_DESCRIPTORS));
    }
}

impl TxToken<'_> {
    /// Has `f` fill a packet of `len` bytes, and sends it.
    ///
    /// # Errors
    /// [`SendError::Invalid`] for a length that can't be sent; `f` is not called for one beyond the buffer.
    pub fn consume<R>(self, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, SendError> {
        let Self { room, mut packet } = self;
        if packet.set_len(len).is_err() {
            return Err(SendError::Invalid { packet, why: "it is longer than a buffer" });
        }
        let result = f(packet.data_mut());
        room.send(packet)?;
        Ok(result)
    }

    /// [`TxToken::consume`] of a packet of the caller's; the token's buffer is free again.
    ///
    /// # Errors
    /// [`SendError::Invalid`].
    pub fn send(self, packet: Packet) -> Result<(), SendError> {
        self.room.send(packet)
    }

    /// The buffer, with a length of 0.
    pub fn packet_mut(&mut self) -> &mut Packet {
        &mut self.packet
    }
}

impl std::fmt::Debug for TxToken<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TxToken").finish_non_exhaustive()
    }
}
