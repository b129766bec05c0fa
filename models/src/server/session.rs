//! The server's side of the protocol without its socket: a message goes in, a reply comes out.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::io::Errno;
use vfio_uring::{
    dma::{IovaRange, SharedMemory},
    transport::user::wire::{
        self, CAP_IRQ_TYPE, CAP_SPARSE_MMAP, CAP_TYPE, CapHeader, Capabilities, DEFAULT_MAX_DATA_XFER, DeviceInfo, DmaMap,
        DmaUnmap, ExtendedIrqInfo, Header, IrqInfo, MAX_CONTROL_PAYLOAD, MultiWrite, RegionAccess, RegionInfo, RegionType,
        SetIrqs, SparseArea, SparseMmap, Version, command, parse_version, version_payload,
    },
};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    dma::{DmaTable, MAX_MAPS, PAGE, Piece},
    irqs::Irqs,
};
use crate::device::{Device, Host, Kind, RegionSpec, Unmapped, irq};

/// Descriptors that are taken in one message.
pub const MAX_MSG_FDS: usize = 16;
/// Bytes of data that are taken in one access.
pub const MAX_DATA_XFER: usize = DEFAULT_MAX_DATA_XFER as usize;
/// Payload of a message at most.
pub const MAX_PAYLOAD: usize = MAX_DATA_XFER + MAX_CONTROL_PAYLOAD;
/// Commands of a client that pipelines which may be outstanding, by our own extension.
const MAX_OUTSTANDING: u64 = 64;
/// `VFIO_DEVICE_FLAGS_RESET` and `_PCI`.
const DEVICE_FLAGS: u32 = 1 | 2;
const REGION_MMAP: u32 = 4;
const REGION_CAPS: u32 = 8;
const IRQ_EVENTFD: u32 = 1;
const IRQ_NORESIZE: u32 = 8;
const IRQ_CAPS: u32 = 1 << 4;

/// Reaches memory that the client did not share, by DMA_READ and DMA_WRITE.
pub trait Channel {
    /// Asks for memory.
    ///
    /// # Errors
    /// [`Unmapped`] when the client refuses, does not answer in time, or is gone.
    fn dma_read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped>;

    /// Sends memory.
    ///
    /// # Errors
    /// As for [`Channel::dma_read`].
    fn dma_write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped>;
}

/// No way to ask the client for memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoChannel;

impl Channel for NoChannel {
    fn dma_read(&mut self, _iova: u64, _to: &mut [u8]) -> Result<(), Unmapped> {
        Err(Unmapped)
    }

    fn dma_write(&mut self, _iova: u64, _from: &[u8]) -> Result<(), Unmapped> {
        Err(Unmapped)
    }
}

/// A reply to send.
#[derive(Debug)]
pub struct Reply {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// The descriptor to go with it.
    pub fd: Option<Arc<OwnedFd>>,
}

impl Reply {
    /// The descriptors to go with it.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fd.iter().map(|fd| fd.as_fd()).collect()
    }
}

/// What a command gives when it succeeds.
#[derive(Default)]
struct Answer {
    payload: Vec<u8>,
    fd: Option<Arc<OwnedFd>>,
}

impl From<&[u8]> for Answer {
    fn from(payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), fd: None }
    }
}

/// The state of a connection: what was negotiated, the client's memory and its eventfds.
#[derive(Debug, Default)]
pub struct Session {
    negotiated: bool,
    client_max_data: usize,
    dma: DmaTable,
    irqs: Irqs,
    iova_ranges: Option<Vec<[u64; 2]>>,
}

impl Session {
    /// A connection on which nothing was said.
    pub fn new() -> Self {
        Self { client_max_data: MAX_DATA_XFER, ..Self::default() }
    }

    /// Tells the client, by our own extension, which addresses the device can use.
    pub fn iova_ranges(self, ranges: &[IovaRange]) -> Self {
        let ranges = ranges.iter().map(|range| [range.start, range.last]).collect();
        Self { iova_ranges: Some(ranges), ..self }
    }

    /// Whether VERSION was accepted.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Bytes of data that the client takes in one access.
    pub fn client_max_data(&self) -> usize {
        self.client_max_data
    }

    /// The client's memory and interrupts, for the device.
    pub fn host<'a, C: Channel>(&'a mut self, channel: &'a mut C) -> SessionHost<'a, C> {
        SessionHost { dma: &self.dma, irqs: &self.irqs, channel }
    }

    /// Handles a command; `None` where it wants no reply. A reply of the client's is not for here.
    pub fn handle<D: Device>(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        device: &mut D,
        channel: &mut impl Channel,
    ) -> Option<Reply> {
        let answer = self.answer(header.command.get(), payload, fds, device, channel);
        if header.no_reply() {
            return None;
        }
        Some(match answer {
            Ok(Answer { payload, fd }) => Reply { header: header.reply(payload.len()), payload, fd },
            Err(errno) => {
                let name = command::name(header.command.get());
                tracing::debug!("{name} of the client is refused: {errno}");
                Reply { header: header.error_reply(errno.raw_os_error() as u32), payload: Vec::new(), fd: None }
            }
        })
    }

    fn answer<D: Device>(
        &mut self,
        number: u16,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        device: &mut D,
        channel: &mut impl Channel,
    ) -> Result<Answer, Errno> {
        if number == command::VERSION {
            return self.version(payload, &fds);
        }
        if !self.negotiated {
            return Err(Errno::INVAL);
        }
        match number {
            command::DMA_MAP => {
                let (map, _) = parse::<DmaMap>(payload)?;
                at_least::<DmaMap>(map.argsz.get())?;
                self.dma.map(&map, fds).map(|()| Answer::default())
            }
            command::DMA_UNMAP => {
                let (unmap, _) = parse::<DmaUnmap>(payload)?;
                at_least::<DmaUnmap>(unmap.argsz.get())?;
                self.dma.unmap(&unmap).map(|()| unmap.as_bytes().into())
            }
            command::DEVICE_GET_INFO => device_info(payload, device),
            command::DEVICE_GET_REGION_INFO => region_info(payload, device),
            command::DEVICE_GET_IRQ_INFO => irq_info(payload, device),
            command::DEVICE_SET_IRQS => {
                let (set, data) = parse::<SetIrqs>(payload)?;
                at_least::<SetIrqs>(set.argsz.get())?;
                self.irqs.set(&set, data, fds, device).map(|()| Answer::default())
            }
            command::REGION_READ => self.region_read(payload, device, channel),
            command::REGION_WRITE => {
                let (access, data) = parse::<RegionAccess>(payload)?;
                if access.count.get() as usize != data.len() || data.len() > MAX_DATA_XFER {
                    return Err(Errno::INVAL);
                }
                self.region_write(access.region.get(), access.offset.get(), data, device, channel)?;
                Ok(access.as_bytes().into())
            }
            command::REGION_WRITE_MULTI => self.region_write_multi(payload, device, channel),
            command::DEVICE_RESET => {
                device.reset(&mut self.host(channel));
                Ok(Answer::default())
            }
            _ => Err(Errno::NOTSUP),
        }
    }

    fn version(&mut self, payload: &[u8], fds: &[OwnedFd]) -> Result<Answer, Errno> {
        if self.negotiated || !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        let (version, theirs) = parse_version(payload).map_err(|error| {
            tracing::debug!("{error}");
            Errno::INVAL
        })?;
        // A peer has to take a register at least.
        let max_data = theirs.max_data_xfer_size.unwrap_or(DEFAULT_MAX_DATA_XFER);
        if version.major.get() != wire::MAJOR || max_data < 8 {
            return Err(Errno::INVAL);
        }
        self.client_max_data = max_data.min(MAX_DATA_XFER as u64) as usize;
        self.negotiated = true;
        let ours = Capabilities {
            max_msg_fds: Some(MAX_MSG_FDS as u64),
            max_data_xfer_size: Some(MAX_DATA_XFER as u64),
            max_dma_maps: Some(MAX_MAPS as u64),
            pgsizes: Some(PAGE),
            write_multiple: theirs.write_multiple.filter(|&offered| offered),
            max_outstanding: theirs.max_outstanding.map(|offered| offered.clamp(1, MAX_OUTSTANDING)),
            iova_ranges: self.iova_ranges.clone(),
        };
        // Ours is 0, so it is never above the proposed one.
        const { assert!(wire::MINOR == 0) };
        let version = Version { major: wire::MAJOR.into(), minor: wire::MINOR.into() };
        Ok(version_payload(version, &ours)[..].into())
    }

    fn region_read<D: Device>(
        &mut self,
        payload: &[u8],
        device: &mut D,
        channel: &mut impl Channel,
    ) -> Result<Answer, Errno> {
        let (access, _) = parse::<RegionAccess>(payload)?;
        let (index, offset, count) = (access.region.get(), access.offset.get(), access.count.get() as usize);
        if count > self.client_max_data {
            return Err(Errno::INVAL);
        }
        check(&region_of(device, index)?, offset, count, 1)?;
        let mut reply = vec![0; size_of::<RegionAccess>() + count];
        let (head, data) = reply.split_at_mut(size_of::<RegionAccess>());
        head.copy_from_slice(access.as_bytes());
        if count != 0 {
            device.read(index, offset, data, &mut self.host(channel))?;
        }
        Ok(Answer { payload: reply, fd: None })
    }

    fn region_write<D: Device>(
        &mut self,
        index: u32,
        offset: u64,
        data: &[u8],
        device: &mut D,
        channel: &mut impl Channel,
    ) -> Result<(), Errno> {
        check(&region_of(device, index)?, offset, data.len(), 2)?;
        if data.is_empty() {
            return Ok(());
        }
        device.write(index, offset, data, &mut self.host(channel))
    }

    fn region_write_multi<D: Device>(
        &mut self,
        payload: &[u8],
        device: &mut D,
        channel: &mut impl Channel,
    ) -> Result<Answer, Errno> {
        let (count, rest) = zerocopy::little_endian::U64::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        let writes = <[MultiWrite]>::ref_from_bytes(rest).map_err(|_| Errno::INVAL)?;
        if count.get() != writes.len() as u64 {
            return Err(Errno::INVAL);
        }
        for write in writes {
            let data = write.data.get(..write.count.get() as usize).ok_or(Errno::INVAL)?;
            self.region_write(write.region.get(), write.offset.get(), data, device, channel)?;
        }
        Ok(count.as_bytes().into())
    }
}

fn parse<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}

fn at_least<T>(argsz: u32) -> Result<(), Errno> {
    if argsz as usize >= size_of::<T>() { Ok(()) } else { Err(Errno::INVAL) }
}

fn region_of(device: &impl Device, index: u32) -> Result<RegionSpec, Errno> {
    if index < device.regions() { Ok(device.region(index)) } else { Err(Errno::INVAL) }
}

/// The bounds and permissions of an access.
fn check(spec: &RegionSpec, offset: u64, len: usize, flag: u32) -> Result<(), Errno> {
    let inside = offset <= spec.size && len as u64 <= spec.size - offset;
    if spec.flags & flag != 0 && inside { Ok(()) } else { Err(Errno::INVAL) }
}

fn device_info(payload: &[u8], device: &impl Device) -> Result<Answer, Errno> {
    let (info, _) = parse::<DeviceInfo>(payload)?;
    at_least::<DeviceInfo>(info.argsz.get())?;
    let info = DeviceInfo {
        argsz: (size_of::<DeviceInfo>() as u32).into(),
        flags: DEVICE_FLAGS.into(),
        num_regions: device.regions().into(),
        num_irqs: device.irqs().into(),
    };
    Ok(info.as_bytes().into())
}

/// The capability and the descriptor come when `argsz` has room for all; otherwise it tells how much is needed. The flag CAPS
/// comes with the capability only: QEMU refuses a region whose capabilities are at offset 0, as the kernel says it of those that
/// did not fit (`vfio_user_device_io_get_region_info`).
fn region_info(payload: &[u8], device: &impl Device) -> Result<Answer, Errno> {
    let (request, _) = parse::<RegionInfo>(payload)?;
    at_least::<RegionInfo>(request.argsz.get())?;
    let spec = region_of(device, request.index.get())?;
    let mut capabilities = Vec::new();
    if let Some(area) = &spec.mappable {
        let head = SparseMmap { nr_areas: 1.into(), reserved: 0.into() };
        let area = SparseArea { offset: area.offset.into(), size: area.size.into() };
        capabilities.push((CAP_SPARSE_MMAP, [head.as_bytes(), area.as_bytes()].concat()));
    }
    if let Some(kind) = &spec.kind {
        capabilities.extend(described(CAP_TYPE, kind));
    }
    let capability = chain(size_of::<RegionInfo>(), &capabilities);
    let needed = size_of::<RegionInfo>() + capability.len();
    let whole = request.argsz.get() as usize >= needed;
    let mut extra = if spec.mappable.is_some() { REGION_MMAP } else { 0 };
    if whole && !capability.is_empty() {
        extra |= REGION_CAPS;
    }
    let cap_offset = if extra & REGION_CAPS != 0 { size_of::<RegionInfo>() as u32 } else { 0 };
    let info = RegionInfo {
        argsz: (needed as u32).into(),
        flags: (spec.flags | extra).into(),
        index: request.index,
        cap_offset: cap_offset.into(),
        size: spec.size.into(),
        offset: 0.into(),
    };
    let mut payload = info.as_bytes().to_vec();
    if whole {
        payload.extend(capability);
    }
    Ok(Answer { payload, fd: spec.mappable.filter(|_| whole).map(|area| area.fd) })
}

/// Type and subtype, and the number that goes with them, as capabilities.
fn described(id: u16, kind: &Kind) -> Vec<(u16, Vec<u8>)> {
    let body = RegionType { kind: kind.type_.into(), subtype: kind.subtype.into() };
    let number = kind.capability.map(|(id, number)| (id, number.to_le_bytes().to_vec()));
    [(id, body.as_bytes().to_vec())].into_iter().chain(number).collect()
}

/// A chain of capabilities, `start` bytes after the start of its structure; each is padded to 8 bytes, as the kernel does.
fn chain(start: usize, capabilities: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, (id, body)) in capabilities.iter().enumerate() {
        let len = (size_of::<CapHeader>() + body.len()).next_multiple_of(8);
        let at = bytes.len();
        let next = if i + 1 == capabilities.len() { 0 } else { (start + at + len) as u32 };
        bytes.extend(CapHeader { id: (*id).into(), version: 1.into(), next: next.into() }.as_bytes());
        bytes.extend(body);
        bytes.resize(at + len, 0);
    }
    bytes
}

/// Capabilities come as with [`region_info`].
fn irq_info(payload: &[u8], device: &impl Device) -> Result<Answer, Errno> {
    let (request, _) = parse::<IrqInfo>(payload)?;
    at_least::<IrqInfo>(request.argsz.get())?;
    let index = request.index.get();
    if index >= device.irqs() {
        return Err(Errno::INVAL);
    }
    let count = device.irq_vectors(index);
    let flags = if count == 0 { 0 } else { IRQ_EVENTFD | IRQ_NORESIZE };
    let info = |argsz: usize, flags: u32| IrqInfo {
        argsz: (argsz as u32).into(),
        flags: flags.into(),
        index: request.index,
        count: count.into(),
    };
    let Some(kind) = device.irq_kind(index) else { return Ok(info(size_of::<IrqInfo>(), flags).as_bytes().into()) };
    let start = size_of::<ExtendedIrqInfo>();
    let capabilities = chain(start, &described(CAP_IRQ_TYPE, &kind));
    let needed = start + capabilities.len();
    if (request.argsz.get() as usize) < needed {
        return Ok(info(needed, flags).as_bytes().into());
    }
    let extended = ExtendedIrqInfo { info: info(needed, flags | IRQ_CAPS), cap_offset: (start as u32).into() };
    Ok(extended.as_bytes().iter().copied().chain(capabilities).collect::<Vec<u8>>()[..].into())
}

/// The client as the device sees it.
pub struct SessionHost<'a, C> {
    dma: &'a DmaTable,
    irqs: &'a Irqs,
    channel: &'a mut C,
}

impl<C: Channel> Host for SessionHost<'_, C> {
    #[inline]
    fn read(&mut self, mut iova: u64, mut to: &mut [u8]) -> Result<(), Unmapped> {
        loop {
            let done = match self.dma.piece(iova, to.len(), false).ok_or(Unmapped)? {
                Piece::Mapped { memory, offset, len } => {
                    memory.read(offset, &mut to[..len]).map_err(|_| Unmapped)?;
                    len
                }
                Piece::Messages { len } => {
                    self.channel.dma_read(iova, &mut to[..len])?;
                    len
                }
            };
            if done == to.len() {
                return Ok(());
            }
            to = &mut to[done..];
            iova = iova.checked_add(done as u64).ok_or(Unmapped)?;
        }
    }

    #[inline]
    fn write(&mut self, mut iova: u64, mut from: &[u8]) -> Result<(), Unmapped> {
        loop {
            let done = match self.dma.piece(iova, from.len(), true).ok_or(Unmapped)? {
                Piece::Mapped { memory, offset, len } => {
                    memory.write(offset, &from[..len]).map_err(|_| Unmapped)?;
                    len
                }
                Piece::Messages { len } => {
                    self.channel.dma_write(iova, &from[..len])?;
                    len
                }
            };
            if done == from.len() {
                return Ok(());
            }
            from = &from[done..];
            iova = iova.checked_add(done as u64).ok_or(Unmapped)?;
        }
    }

    #[inline]
    fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)> {
        self.dma.window(iova, len)
    }

    fn signal(&mut self, vector: u16) {
        self.irqs.signal(irq::MSIX, vector.into());
    }

    fn signal_msi(&mut self) {
        self.irqs.signal(irq::MSI, 0);
    }

    fn signal_specific(&mut self, index: u32) {
        self.irqs.signal(index, 0);
    }
}
