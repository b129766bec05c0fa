//! Sending: descriptors, and frames made of them (section 7.2).
//!
//! A packet is taken up wherever it was left: in the middle of a descriptor, when the wire has no room or a round is over.

use super::{
    Cause,
    core::Core,
    offload::{self, Context, MAX_HEADER, Segment},
    packet::{put_checksum, sum},
    ring::{Area, Kind, Ring},
    spec::{CTRL, DESCRIPTOR, MAX_FRAME, QUEUES, TCTL, ctrl, queue, tctl, tx},
    wire::{Frame, MIN_FRAME, Room},
};
use crate::device::{Host, Unmapped};

/// What one call of `service` may do for a queue, in bytes that are moved and what else costs as much.
const BUDGET: usize = 1 << 16;
const DESCRIPTOR_COST: usize = 128;
const FRAME_COST: usize = 256;
/// Descriptors that are read at once.
const FETCH: usize = 16;
/// Contexts of a queue.
const CONTEXTS: usize = 2;

/// A data descriptor that is being worked on.
#[derive(Debug, Clone, Copy)]
struct Data {
    iova: u64,
    left: usize,
    command: u32,
    last: u32,
}

/// A packet that is being put together.
#[derive(Debug)]
struct Packet {
    frame: Option<Frame>,
    /// Nothing of it is sent any more.
    dropped: Option<Cause>,
    context: Option<Context>,
    /// VLAN tag to insert.
    tag: Option<u16>,
    ip_checksum: bool,
    l4_checksum: bool,
    /// Where a legacy descriptor wants a checksum, and from where on.
    legacy_checksum: Option<(usize, usize)>,
    segments: Option<Segments>,
}

/// Of a packet that is sent in segments.
#[derive(Debug)]
struct Segments {
    /// Bytes of the headers that have been read.
    header: usize,
    index: u32,
    offset: u32,
}

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
            if let Some(frame) = queue.packet.take().and_then(|packet| packet.frame) {
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
                spent += DESCRIPTOR_COST;
                work += 1;
                if !self.begin(low, high) {
                    self.complete(high as u32, (high >> 32) as u32, host);
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

/// Why no more bytes of a descriptor were taken.
enum Stop {
    /// The wire has no room.
    Wait,
    /// The segment is complete, and this is not the end of the packet.
    Full,
    Drop(Cause),
}

impl Packet {
    fn new(command: u32, last: u32, advanced: bool, contexts: &[Option<Context>; CONTEXTS]) -> Self {
        let segmented = advanced && command & tx::TSE != 0;
        let (ip, l4) = (advanced && last & tx::IXSM != 0, advanced && last & tx::TXSM != 0);
        let context = contexts[(last >> 4 & 7) as usize % CONTEXTS].filter(|_| advanced);
        let missing = match &context {
            None => segmented || ip || l4,
            Some(context) => segmented && !context.can_segment(),
        };
        Self {
            frame: None,
            dropped: missing.then_some(Cause::Context),
            context,
            tag: (advanced && command & tx::VLE != 0).then(|| context.map_or(0, |context| context.vlan)),
            ip_checksum: ip,
            l4_checksum: l4,
            legacy_checksum: None,
            segments: segmented.then_some(Segments { header: 0, index: 0, offset: 0 }),
        }
    }

    /// Takes bytes of a descriptor, to the end of a frame at most; how many.
    fn take(
        &mut self,
        data: &mut Data,
        header: &mut [u8; MAX_HEADER],
        core: &mut Core,
        host: &mut impl Host,
    ) -> Result<usize, Stop> {
        let mut most = MAX_FRAME;
        if let (Some(segments), Some(context)) = (&mut self.segments, &self.context) {
            if segments.header < context.headers() {
                let count = data.left.min(context.headers() - segments.header);
                let to = header.get_mut(segments.header..segments.header + count).ok_or(Stop::Drop(Cause::Context))?;
                host.read(data.iova, to).map_err(|Unmapped| Stop::Drop(Cause::TxMemory))?;
                segments.header += count;
                data.step(count);
                return Ok(count);
            }
            most = context.headers() + context.mss;
        }
        let frame = match &mut self.frame {
            Some(frame) => frame,
            none => {
                let frame = room(core)?;
                let frame = none.insert(frame);
                if let (Some(segments), Some(_)) = (&self.segments, &self.context) {
                    frame.push(&header[..segments.header]);
                }
                frame
            }
        };
        let count = data.left.min(most - frame.len().min(most));
        if count == 0 {
            return Err(if self.segments.is_some() { Stop::Full } else { Stop::Drop(Cause::TxLength) });
        }
        let len = frame.len();
        let to = frame.extend(count).ok_or(Stop::Drop(Cause::TxLength))?;
        if host.read(data.iova, to).is_err() {
            frame.truncate(len);
            return Err(Stop::Drop(Cause::TxMemory));
        }
        data.step(count);
        Ok(count)
    }

    /// The end of the packet.
    fn finish(&mut self, header: &[u8; MAX_HEADER], core: &mut Core) {
        if self.dropped.is_none() && self.frame.is_none() {
            self.dropped = match (&self.segments, &self.context) {
                (Some(segments), Some(context)) if segments.header == context.headers() => match room(core) {
                    // Headers only.
                    Ok(mut frame) => {
                        frame.push(&header[..segments.header]);
                        self.frame = Some(frame);
                        None
                    }
                    Err(Stop::Drop(cause)) => Some(cause),
                    Err(_) => Some(Cause::WireFull),
                },
                (Some(_), _) => Some(Cause::Context),
                (None, _) => Some(Cause::TxLength),
            };
        }
        if let Some(cause) = self.dropped {
            core.counters.drop_one(cause);
            if let Some(frame) = self.frame.take() {
                core.port.cancel(frame);
            }
            return;
        }
        if self.segments.is_some() {
            core.statistics.segmented();
        }
        self.send(true, core);
    }

    /// Sends what was put together: the whole packet, or a segment.
    fn send(&mut self, last: bool, core: &mut Core) {
        let Some(mut frame) = self.frame.take() else { return };
        let sent = match self.complete(&mut frame, last, core) {
            Ok(()) => {
                core.statistics.sent(frame.bytes());
                let len = frame.len() as u64;
                core.port.send(frame).map(|()| len)
            }
            Err(cause) => {
                core.port.cancel(frame);
                Err(cause)
            }
        };
        match sent {
            Ok(len) => {
                core.counters.tx_packets += 1;
                core.counters.tx_bytes += len;
            }
            Err(cause) => core.counters.drop_one(cause),
        }
    }

    /// What the device adds to a frame.
    fn complete(&mut self, frame: &mut Frame, last: bool, core: &Core) -> Result<(), Cause> {
        if let (Some(segments), Some(context)) = (&mut self.segments, &self.context) {
            let Segments { index, offset, .. } = *segments;
            offload::segment(frame.bytes_mut(), context, Segment { index, offset, last });
            segments.index += 1;
            segments.offset += (frame.len() - context.headers()) as u32;
        }
        if let Some(context) = self.context.as_ref().filter(|_| self.ip_checksum || self.l4_checksum) {
            offload::checksums(frame.bytes_mut(), context, self.ip_checksum, self.l4_checksum, self.segments.is_some())?;
        }
        if let Some((at, start)) = self.legacy_checksum {
            let total = sum(frame.bytes().get(start..).ok_or(Cause::Context)?);
            put_checksum(frame.bytes_mut(), at, total, false);
        }
        if frame.len() < 14 {
            return Err(Cause::TxLength);
        }
        if let Some(tag) = self.tag {
            frame.insert_tag(core.registers.vlan_type(), tag);
        }
        if core.registers.get(TCTL) & tctl::PSP != 0 {
            frame.pad(MIN_FRAME);
        }
        Ok(())
    }
}

impl Data {
    fn step(&mut self, count: usize) {
        self.iova = self.iova.wrapping_add(count as u64);
        self.left -= count;
    }
}

fn room(core: &mut Core) -> Result<Frame, Stop> {
    if !core.link {
        return Err(Stop::Drop(Cause::NoReceiver));
    }
    match core.port.room(core.registers.get(CTRL) & ctrl::RFCE != 0) {
        Room::Frame(mut frame) => {
            frame.clear();
            Ok(frame)
        }
        Room::Wait => Err(Stop::Wait),
        Room::Drop(cause) => Err(Stop::Drop(cause)),
    }
}
