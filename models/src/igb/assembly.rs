//! A packet that is put together of descriptors, and the frames that it becomes.

use super::{
    Cause,
    core::Core,
    offload::{self, Context, MAX_HEADER, Segment},
    packet::{put_checksum, sum},
    spec::{CTRL, MAX_FRAME, TCTL, ctrl, tctl, tx},
    wire::{Frame, MIN_FRAME, Room},
};
use crate::device::{Host, Unmapped};

/// Contexts of a queue.
pub(super) const CONTEXTS: usize = 2;

/// A data descriptor that is being worked on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub iova: u64,
    pub left: usize,
    pub command: u32,
    pub last: u32,
}

/// A packet that is being put together.
#[derive(Debug)]
pub(super) struct Packet {
    frame: Option<Frame>,
    /// Nothing of it is sent any more.
    pub dropped: Option<Cause>,
    context: Option<Context>,
    /// VLAN tag to insert.
    pub tag: Option<u16>,
    ip_checksum: bool,
    l4_checksum: bool,
    /// Where a legacy descriptor wants a checksum, and from where on.
    pub legacy_checksum: Option<(usize, usize)>,
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

/// Why no more bytes of a descriptor were taken.
pub(super) enum Stop {
    /// The wire has no room.
    Wait,
    /// The segment is complete, and this is not the end of the packet.
    Full,
    Drop(Cause),
}

impl Packet {
    pub fn new(command: u32, last: u32, advanced: bool, contexts: &[Option<Context>; CONTEXTS]) -> Self {
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
    pub fn take(
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
    pub fn finish(&mut self, header: &[u8; MAX_HEADER], core: &mut Core) {
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
    pub fn send(&mut self, last: bool, core: &mut Core) {
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

    /// Its memory, when it is given up.
    pub fn into_frame(self) -> Option<Frame> {
        self.frame
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

#[inline]
pub(super) fn room(core: &mut Core) -> Result<Frame, Stop> {
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
