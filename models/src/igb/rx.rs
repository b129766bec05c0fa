//! Receiving: filters, queue, descriptors (section 7.1).

use super::{
    Cause,
    core::Core,
    packet::{Headers, Network, SCTP, TCP, UDP, fold, frame_check, sum},
    ring::{Area, Kind, Ring},
    rss::{Hash, Toeplitz},
    spec::{CTRL, MRQC, QUEUES, RCTL, RLPML, RXCSUM, ctrl, icr, mrqc, packet_type, queue, rctl, rx_status, rxcsum, srrctl},
    wire::{Frame, MIN_FRAME},
};
use crate::device::{Host, Unmapped};

/// Packets that one call of `service` takes.
const BATCH: usize = 64;
/// Bytes of a frame without RCTL.LPE at most, without CRC and VLAN tag.
const SHORT_FRAME: usize = 1514;

/// What is known of a packet when it has passed the filters.
#[derive(Debug, Clone, Copy)]
struct Packet {
    queue: usize,
    /// RSS type and packet type.
    info: u32,
    /// RSS hash, or checksum and IP identification.
    hash: u32,
    /// Without DD and EOP.
    status: u32,
    /// Sum of the packet, for legacy descriptors.
    checksum: u16,
    vlan: u16,
}

/// The receive side.
#[derive(Debug)]
pub(super) struct Rx {
    pub rings: [Ring; QUEUES],
    /// A packet that waits for descriptors, and all others with it.
    waiting: Option<(Frame, Packet)>,
    /// The valid receive addresses; `None`: to be looked up.
    addresses: Option<Vec<u64>>,
    toeplitz: Option<Toeplitz>,
}

impl Rx {
    pub fn new() -> Self {
        Self { rings: [Ring::default(); QUEUES], waiting: None, addresses: None, toeplitz: None }
    }

    /// Addresses or keys have changed.
    pub fn forget(&mut self) {
        (self.addresses, self.toeplitz) = (None, None);
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Looks at the registers of the queues.
    pub fn sync(&mut self, core: &mut Core) {
        let on = core.registers.get(RCTL) & rctl::EN != 0;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if ring.sync(&core.area, Kind::Rx, index, on) {
                tracing::debug!(index, ring.on, ring.size, "receive queue");
            }
        }
        if !on {
            self.discard(core);
        }
    }

    /// Drops what has arrived.
    fn discard(&mut self, core: &mut Core) {
        if let Some((frame, _)) = self.waiting.take() {
            core.port.done(frame);
            core.counters.drop_one(Cause::QueueOff);
        }
        while let Some(frame) = core.port.stale() {
            core.port.done(frame);
            core.counters.drop_one(Cause::QueueOff);
        }
    }

    /// Takes packets from the wire; how many.
    #[inline]
    pub fn service(&mut self, core: &mut Core, host: &mut impl Host) -> usize {
        let (mut work, mut written) = (0, 0u32);
        while work < BATCH {
            let (mut frame, packet) = match self.waiting.take() {
                Some((frame, packet)) => (frame, Ok(packet)),
                None => {
                    let Some(mut frame) = core.port.receive() else { break };
                    let packet = self.classify(&mut frame, core);
                    (frame, packet)
                }
            };
            let delivered = match packet {
                Ok(packet) => match self.deliver(&packet, &mut frame, core, host) {
                    Ok(true) => Ok(packet.queue),
                    Ok(false) => {
                        self.waiting = Some((frame, packet));
                        break;
                    }
                    Err(cause) => Err(cause),
                },
                Err(cause) => Err(cause),
            };
            match delivered {
                Ok(queue) => {
                    written |= 1 << queue;
                    core.counters.rx_packets += 1;
                    core.counters.rx_bytes += frame.len() as u64;
                    core.statistics.written(frame.len());
                }
                Err(cause) => self.dropped(cause, core),
            }
            core.port.done(frame);
            work += 1;
        }
        while written != 0 {
            let index = written.trailing_zeros() as usize;
            written &= written - 1;
            core.area.store(Area::at(Kind::Rx, index, queue::HEAD), self.rings[index].head);
            core.interrupts.queue(index, 0);
        }
        work
    }

    #[cold]
    fn dropped(&mut self, cause: Cause, core: &mut Core) {
        core.counters.drop_one(cause);
        if cause == Cause::NoDescriptors {
            core.statistics.no_buffer();
            core.interrupts.cause(icr::RXO);
        }
    }

    /// Filters a packet, strips its tag and chooses its queue.
    fn classify(&mut self, frame: &mut Frame, core: &mut Core) -> Result<Packet, Cause> {
        let registers = &core.registers;
        let control = registers.get(RCTL);
        let tag_type = registers.vlan_type();
        let bytes = frame.bytes();
        let tagged = bytes.len() > 16 && bytes[12..14] == tag_type.to_be_bytes();
        let tag_len = if tagged { 4 } else { 0 };
        let limit =
            if control & rctl::LPE != 0 { (registers.get(RLPML) as usize & 0x3fff).saturating_sub(4) } else { SHORT_FRAME };
        if bytes.len() < MIN_FRAME {
            core.statistics.undersize();
            return Err(Cause::Length);
        }
        if bytes.len() > limit + tag_len {
            core.statistics.oversize();
            return Err(Cause::Length);
        }
        core.statistics.arrived(bytes.len());
        let Some(inexact) = self.admits(bytes, control, core) else { return Err(Cause::Filtered) };
        let registers = &core.registers;
        let mut packet = Packet { queue: 0, info: 0, hash: 0, status: 0, checksum: 0, vlan: 0 };
        if tagged {
            let tag = u16::from_be_bytes([bytes[14], bytes[15]]);
            if control & rctl::VFE != 0 && !registers.vlan_hits(tag) {
                return Err(Cause::Filtered);
            }
            packet.vlan = tag;
        }
        core.statistics.received(bytes);
        if inexact {
            packet.status |= rx_status::PIF;
        }
        if tagged && registers.get(CTRL) & ctrl::VME != 0 {
            packet.status |= rx_status::VP;
            frame.remove_tag();
        } else {
            packet.vlan = 0;
        }
        self.look_inside(frame.bytes(), core, &mut packet);
        Ok(packet)
    }

    /// Whether a packet is for us; `Some(true)`: by a hash only.
    fn admits(&mut self, bytes: &[u8], control: u32, core: &Core) -> Option<bool> {
        let &[a, b, c, d, e, f, ..] = bytes else { return None };
        let address = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        let multicast = a & 1 != 0;
        if address == 0xffff_ffff_ffff {
            return (control & (rctl::BAM | rctl::MPE) != 0).then_some(false);
        }
        if control & if multicast { rctl::MPE } else { rctl::UPE } != 0 {
            return Some(false);
        }
        let addresses = self.addresses.get_or_insert_with(|| core.registers.addresses().collect());
        if addresses.contains(&address) {
            return Some(false);
        }
        (multicast && core.registers.multicast_hash_hits(address)).then_some(true)
    }

    /// Packet type, checksums, hash and queue.
    fn look_inside(&mut self, bytes: &[u8], core: &Core, packet: &mut Packet) {
        let registers = &core.registers;
        let (checks, rss) = (registers.get(RXCSUM), registers.get(MRQC));
        let headers = Headers::of(bytes);
        let mut kind = match headers.network {
            Network::None => 0,
            Network::V4 { options } => packet_type::IPV4 | if options { packet_type::IPV4E } else { 0 },
            Network::V6 { extensions } => packet_type::IPV6 | if extensions { packet_type::IPV6E } else { 0 },
        };
        kind |= match headers.protocol {
            TCP => packet_type::TCP,
            UDP => packet_type::UDP,
            SCTP => packet_type::SCTP,
            _ => 0,
        };
        if checks & rxcsum::IPOFL != 0 && matches!(headers.network, Network::V4 { .. }) {
            packet.status |= rx_status::IPCS;
            if !headers.ip_checksum_fits(bytes) {
                packet.status |= rx_status::IPE;
            }
        }
        if checks & rxcsum::TUOFL != 0
            && let Some(fits) = headers.transport_checksum_fits(bytes)
        {
            packet.status |= rx_status::L4CS | if headers.protocol == UDP { rx_status::UDPCS } else { 0 };
            if !fits {
                packet.status |= rx_status::L4E;
            }
        }
        let mut hash = Hash::default();
        if rss & mrqc::ENABLE_MASK == mrqc::ENABLE_RSS {
            let toeplitz = self.toeplitz.get_or_insert_with(|| Toeplitz::new(&registers.rss_key()));
            hash = toeplitz.of(bytes, &headers, rss);
            if hash.kind != 0 {
                packet.queue = registers.queue_of(hash.value);
            }
        }
        packet.info = kind | hash.kind;
        packet.hash = hash.value;
        if checks & rxcsum::PCSD == 0 {
            let start = (checks & 0xff) as usize;
            packet.checksum = fold(sum(bytes.get(start..).unwrap_or_default()));
            let id =
                if matches!(headers.network, Network::V4 { .. }) { bytes.get(headers.l3 + 4..headers.l3 + 6) } else { None };
            let id = id.map_or(0, |id| u32::from(u16::from_be_bytes([id[0], id[1]])));
            packet.hash = u32::from(packet.checksum) << 16 | id;
        }
    }

    /// Writes a packet into the buffers of its queue; false when it has to wait for some.
    fn deliver(&mut self, packet: &Packet, frame: &mut Frame, core: &Core, host: &mut impl Host) -> Result<bool, Cause> {
        let ring = self.rings.get_mut(packet.queue).filter(|ring| ring.on && !ring.halted).ok_or(Cause::QueueOff)?;
        let control = core.registers.get(RCTL);
        let legacy = match ring.control >> srrctl::DESCTYPE_SHIFT & 7 {
            0 => true,
            // With header split, packets whose headers are not known are not split either.
            1 | 2 => false,
            _ => return Err(Cause::QueueOff),
        };
        let size = match (ring.control & srrctl::BSIZE_MASK) as usize {
            0 => 2048 >> (control >> rctl::BSIZE_SHIFT & 3),
            kib => kib * 1024,
        };
        let check = if control & rctl::SECRC == 0 { frame_check(frame.bytes()) } else { [0; 4] };
        let check = if control & rctl::SECRC == 0 { &check[..] } else { &[] };
        let total = frame.len() + check.len();
        let needed = total.div_ceil(size) as u32;
        if ring.available() < needed {
            ring.look(&core.area, Kind::Rx, packet.queue);
            if ring.available() < needed {
                let never = ring.control & srrctl::DROP_EN != 0 || needed >= ring.size;
                return if never { Err(Cause::NoDescriptors) } else { Ok(false) };
            }
        }
        let len = frame.len();
        // Memory for a frame has room for its CRC: it is where a tag could be.
        frame.push(check);
        let result = write(ring, packet, frame.bytes(), size, legacy, host);
        frame.truncate(len);
        result.map(|()| true)
    }
}

/// Writes the bytes of a packet and its descriptors.
fn write(
    ring: &mut Ring,
    packet: &Packet,
    bytes: &[u8],
    size: usize,
    legacy: bool,
    host: &mut impl Host,
) -> Result<(), Cause> {
    let mut result = Ok(());
    let mut chunks = bytes.chunks(size).peekable();
    while let Some(chunk) = chunks.next() {
        let at = ring.descriptor(ring.head);
        let Ok(address) = read_u64(at, host) else {
            ring.halted = true;
            return Err(Cause::RxMemory);
        };
        let mut status = rx_status::DD;
        if chunks.peek().is_none() {
            status |= rx_status::EOP | packet.status;
        }
        if host.write(address, chunk).is_err() {
            result = Err(Cause::RxMemory);
        }
        if result.is_err() {
            status |= rx_status::RXE;
        }
        let (low, high) = if legacy {
            legacy_descriptor(packet, chunk.len(), status)
        } else {
            let high = u64::from(status) | (chunk.len() as u64) << 32 | u64::from(packet.vlan) << 48;
            (Some(u64::from(packet.hash) << 32 | u64::from(packet.info)), high)
        };
        if write_back(at, low, high, host).is_err() {
            ring.halted = true;
            return Err(Cause::RxMemory);
        }
        ring.head = ring.after(ring.head);
    }
    result
}

/// The second half of a legacy descriptor; its first half stays.
fn legacy_descriptor(packet: &Packet, len: usize, status: u32) -> (Option<u64>, u64) {
    let checked = packet.status & (rx_status::IPCS | rx_status::L4CS) != 0;
    let ignore = if checked { 0 } else { rx_status::IXSM };
    // The errors of TCP, IP and of receiving are bits 5 to 7 of their byte.
    let errors = u64::from(status >> 29) << 5;
    let status = u64::from((status | ignore) & 0xff);
    let high = len as u64 | u64::from(packet.checksum) << 16 | status << 32 | errors << 40 | u64::from(packet.vlan) << 48;
    (None, high)
}

#[inline]
fn read_u64(at: u64, host: &mut impl Host) -> Result<u64, Unmapped> {
    if let Some((memory, offset)) = host.window(at, 8) {
        return memory.load_u64(offset).map_err(|_| Unmapped);
    }
    let mut bytes = [0; 8];
    host.read(at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes a descriptor, the half with DD last.
#[inline]
fn write_back(at: u64, low: Option<u64>, high: u64, host: &mut impl Host) -> Result<(), Unmapped> {
    if let Some((memory, offset)) = host.window(at, 16) {
        if let Some(low) = low {
            memory.store_u64(offset, low).map_err(|_| Unmapped)?;
        }
        return memory.store_u64(offset + 8, high).map_err(|_| Unmapped);
    }
    if let Some(low) = low {
        host.write(at, &low.to_le_bytes())?;
    }
    host.write(at.wrapping_add(8), &high.to_le_bytes())
}
