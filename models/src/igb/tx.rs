//! Sending: descriptors, and frames made of them (section 7.2).
//!
//! A packet is taken up wherever it was left: in the middle of a descriptor, when the wire has no room or a round is over.

use super::{
    Cause,
    assembly::{CONTEXTS, Data, Packet, Stop, room},
    core::Core,
    offload::{Context, MAX_HEADER},
    ring::{Area, Kind, Ring},
    spec::{DESCRIPTOR, MAX_FRAME, QUEUES, TCTL, queue, tctl, tx},
    wire::MIN_FRAME,
};
use crate::device::{Host, Unmapped};

/// What one call of `service` may do for a queue, in bytes that are moved and what else costs as much.
const BUDGET: usize = 1 << 16;
const DESCRIPTOR_COST: usize = 128;
const FRAME_COST: usize = 256;
/// Descriptors that are read at once.
const FETCH: usize = 16;

/// Why a queue is left for now.
enum Leave {
    /// Nothing more to do, or enough done.
    Done,
    /// No room on the wire.
    Paused,
}

/// A transmit queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub ring: Ring,
    contexts: [Option<Context>; CONTEXTS],
    fetched: [[u64; 2]; FETCH],
    /// Of the fetched descriptors, those that were worked on, and all.
    next: usize,
    count: usize,
    data: Option<Data>,
    packet: Option<Packet>,
    header: Box<[u8; MAX_HEADER]>,
    /// A descriptor was done that was to be reported.
    report: bool,
}

/// The transmit side.
#[derive(Debug)]
pub(super) struct Tx {
    queues: Vec<Queue>,
    /// Queues that are on.
    on: u32,
    /// Which queue is first this time.
    turn: u32,
    /// The other end has told us to wait.
    pub paused: bool,
}

impl Tx {
    pub fn new() -> Self {
        let queue = || Queue {
            ring: Ring::default(),
            contexts: [None; CONTEXTS],
            fetched: [[0; 2]; FETCH],
            next: 0,
            count: 0,
            data: None,
            packet: None,
            header: Box::new([0; MAX_HEADER]),
            report: false,
        };
        Self { queues: std::iter::repeat_with(queue).take(QUEUES).collect(), on: 0, turn: 0, paused: false }
    }

    /// Looks at the registers of the queues.
    pub fn sync(&mut self, core: &mut Core) {
        let on = core.registers.get(TCTL) & tctl::EN != 0;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if !queue.ring.sync(&core.area, Kind::Tx, index, on) {
                continue;
            }
            tracing::debug!(index, queue.ring.on, queue.ring.size, "transmit queue");
            if let Some(frame) = queue.packet.take().and_then(Packet::into_frame) {
                core.port.cancel(frame);
            }
            (queue.next, queue.count, queue.data, queue.report) = (0, 0, None, false);
            queue.contexts = [None; CONTEXTS];
            self.on = self.on & !(1 << index) | u32::from(queue.ring.on) << index;
        }
        if self.on == 0 {
            self.paused = false;
        }
    }

    /// Sends what is there; how many descriptors and frames that were.
    #[inline]
    pub fn service(&mut self, core: &mut Core, host: &mut impl Host) -> usize {
        let (mut work, mut paused) = (0, false);
        // From this time's first queue on, then those before it.
        for part in [self.on >> self.turn << self.turn, self.on & ((1 << self.turn) - 1)] {
            let mut part = part;
            while part != 0 {
                let index = part.trailing_zeros() as usize;
                part &= part - 1;
                let queue = &mut self.queues[index];
                queue.ring.look(&core.area, Kind::Tx, index);
                if queue.ring.head == queue.ring.tail || queue.ring.halted {
                    continue;
                }
                let (done, leave) = queue.service(core, host);
                work += done;
                paused |= matches!(leave, Leave::Paused);
                queue.publish(index, core, host);
            }
        }
        self.turn = (self.turn + 1) % QUEUES as u32;
        self.paused = paused;
        work
    }
}

impl Queue {
    fn service(&mut self, core: &mut Core, host: &mut impl Host) -> (usize, Leave) {
        let (mut work, mut spent) = (0, 0);
        while spent < BUDGET {
            if self.data.is_none() {
                let [low, high] = match self.fetch(host) {
                    Ok(Some(descriptor)) => descriptor,
                    Ok(None) => return (work, Leave::Done),
                    Err(Unmapped) => {
                        self.ring.halted = true;
                        core.counters.drop_one(Cause::TxMemory);
                        return (work + 1, Leave::Done);
                    }
                };
                let (command, last) = (high as u32, (high >> 32) as u32);
                if self.packet.is_none() && is_plain(command, last) {
                    match send_plain(low, (command & 0xffff) as usize, core, host) {
                        Ok(()) => {}
                        Err(Stop::Drop(cause)) => core.counters.drop_one(cause),
                        Err(_) => return (work, Leave::Paused),
                    }
                    self.complete(command, last, host);
                    spent += DESCRIPTOR_COST + FRAME_COST + (command & 0xffff) as usize;
                    work += 2;
                    continue;
                }
                spent += DESCRIPTOR_COST;
                work += 1;
                if !self.begin(low, high) {
                    self.complete(command, last, host);
                    continue;
                }
            }
            match self.advance(core, host, &mut spent) {
                Ok(frames) => work += frames,
                Err(leave) => return (work, leave),
            }
        }
        (work, Leave::Done)
    }

    /// The next descriptor.
    #[inline]
    fn fetch(&mut self, host: &mut impl Host) -> Result<Option<[u64; 2]>, Unmapped> {
        if self.next == self.count {
            let ring = &self.ring;
            let count = (ring.available().min(ring.size - ring.head) as usize).min(FETCH);
            if count == 0 {
                return Ok(None);
            }
            let at = ring.descriptor(ring.head);
            if let Some((memory, offset)) = host.window(at, count * DESCRIPTOR as usize) {
                for (i, to) in self.fetched.iter_mut().take(count).enumerate() {
                    *to =
                        memory.read_obj::<[u64; 2]>(offset + i as u64 * DESCRIPTOR).map_err(|_| Unmapped)?.map(u64::from_le);
                }
            } else {
                for (i, to) in self.fetched.iter_mut().take(count).enumerate() {
                    let mut bytes = [0; 16];
                    host.read(at.wrapping_add(i as u64 * DESCRIPTOR), &mut bytes)?;
                    let both = u128::from_le_bytes(bytes);
                    *to = [both as u64, (both >> 64) as u64];
                }
            }
            (self.next, self.count) = (0, count);
        }
        Ok(self.fetched.get(self.next).copied())
    }

    /// Starts with a descriptor; false when that was all.
    fn begin(&mut self, low: u64, high: u64) -> bool {
        let (command, last) = (high as u32, (high >> 32) as u32);
        let advanced = command & tx::DEXT != 0;
        let kind = command >> tx::DTYP_SHIFT & 15;
        if advanced && kind == tx::DTYP_CONTEXT {
            self.contexts[(last >> 4 & 7) as usize % CONTEXTS] = Some(Context::parse(low, high));
            return false;
        }
        let packet = self.packet.get_or_insert_with(|| Packet::new(command, last, advanced, &self.contexts));
        if advanced && kind != tx::DTYP_DATA {
            packet.dropped = Some(Cause::Context);
        }
        if !advanced && command & tx::IC != 0 {
            packet.legacy_checksum = Some(((command >> 16 & 0xff) as usize, (last >> 8 & 0xff) as usize));
        }
        self.data = Some(Data { iova: low, left: (command & 0xffff) as usize, command, last });
        true
    }

    /// Goes on with a data descriptor, to the end of a frame or of the descriptor; how many frames were sent.
    fn advance(&mut self, core: &mut Core, host: &mut impl Host, spent: &mut usize) -> Result<usize, Leave> {
        let (Some(data), Some(packet)) = (&mut self.data, &mut self.packet) else { return Ok(0) };
        let mut frames = 0;
        if packet.dropped.is_some() {
            data.left = 0;
        }
        while data.left > 0 {
            if *spent >= BUDGET {
                return Err(Leave::Done);
            }
            match packet.take(data, &mut self.header, core, host) {
                Ok(bytes) => *spent += bytes,
                Err(Stop::Wait) => return Err(Leave::Paused),
                Err(Stop::Full) => {
                    packet.send(false, core);
                    frames += 1;
                    *spent += FRAME_COST;
                }
                Err(Stop::Drop(cause)) => {
                    packet.dropped = Some(cause);
                    data.left = 0;
                }
            }
        }
        let Data { command, last, .. } = *data;
        if command & tx::EOP != 0 {
            if command & (tx::DEXT | tx::VLE) == tx::VLE {
                packet.tag = Some((last >> 16) as u16);
            }
            packet.finish(&self.header, core);
            frames += 1;
            *spent += FRAME_COST;
            self.packet = None;
        }
        self.data = None;
        self.complete(command, last, host);
        Ok(frames)
    }

    /// The descriptor at the head is done.
    fn complete(&mut self, command: u32, last: u32, host: &mut impl Host) {
        if command & tx::RS != 0 {
            self.report = true;
            let at = self.ring.descriptor(self.ring.head) + 12;
            let value = last & !0xf | tx::DD;
            let written = match host.window(at, 4) {
                Some((memory, offset)) => memory.store_u32(offset, value).map_err(|_| Unmapped),
                None => host.write(at, &value.to_le_bytes()),
            };
            self.ring.halted |= written.is_err();
        }
        self.ring.head = self.ring.after(self.ring.head);
        self.next += 1;
    }

    /// Tells the client how far it is.
    fn publish(&mut self, index: usize, core: &mut Core, host: &mut impl Host) {
        let load = |register| core.area.load(Area::at(Kind::Tx, index, register));
        core.area.store(Area::at(Kind::Tx, index, queue::HEAD), self.ring.head);
        if std::mem::take(&mut self.report) {
            let low = load(queue::WBAL);
            if low & 1 != 0 {
                let at = u64::from(load(queue::WBAH)) << 32 | u64::from(low & !3);
                if host.write(at, &self.ring.head.to_le_bytes()).is_err() {
                    tracing::debug!(index, "the head can't be written back: its memory is not mapped");
                }
            }
            core.interrupts.queue(index, 1);
        }
    }
}

/// Whether a descriptor is a whole packet that is sent as it is: most are.
#[inline]
fn is_plain(command: u32, last: u32) -> bool {
    const KIND: u32 = tx::DEXT | 15 << tx::DTYP_SHIFT;
    const LOOKED_AT: u32 = KIND | tx::EOP | tx::VLE | tx::TSE;
    const PLAIN: u32 = tx::DEXT | tx::DTYP_DATA << tx::DTYP_SHIFT | tx::EOP;
    let len = (command & 0xffff) as usize;
    command & LOOKED_AT == PLAIN && last & (tx::IXSM | tx::TXSM) == 0 && (MIN_FRAME..=MAX_FRAME).contains(&len)
}

/// Sends such a packet.
#[inline]
fn send_plain(iova: u64, len: usize, core: &mut Core, host: &mut impl Host) -> Result<(), Stop> {
    let mut frame = room(core)?;
    if frame.extend(len).is_none_or(|to| host.read(iova, to).is_err()) {
        core.port.cancel(frame);
        return Err(Stop::Drop(Cause::TxMemory));
    }
    core.statistics.sent(frame.bytes());
    core.port.send(frame).map_err(Stop::Drop)?;
    core.counters.tx_packets += 1;
    core.counters.tx_bytes += len as u64;
    Ok(())
}
