//! The client's side of the protocol without its socket: what may be sent, and what a reply must look like.
//!
//! Everything here is a pure function of bytes that the server may have made up: nothing panics on them, and nothing is
//! allocated in a size of their choosing.

use std::io;

use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    self, Capabilities, DEFAULT_MAX_DATA_XFER, DEFAULT_MAX_MSG_FDS, DmaAccess, HEADER_SIZE, Header, MAX_CONTROL_PAYLOAD,
    RegionAccess, SparseArea, command, parse_version,
};
use crate::{
    Error, Result,
    dma::{IovaRange, conflict::joined},
};

/// Descriptors that this client takes in one message.
pub const MAX_FDS_IN: usize = 16;
/// Commands in flight at most, whatever the server confirms.
pub const MAX_OUTSTANDING: usize = 1024;
/// Regions of a device at most.
pub const MAX_REGIONS: u32 = 100;
/// Interrupt indices of a device at most.
pub const MAX_IRQS: u32 = 50;
/// Sparse areas of a region at most.
pub const MAX_AREAS: usize = 64;
/// Ranges of I/O virtual addresses that a server may report.
pub const MAX_IOVA_RANGES: usize = 64;
/// `argsz` of the first GET_REGION_INFO.
pub const REGION_INFO_ARGSZ: u32 = MAX_CONTROL_PAYLOAD as u32;
/// `argsz` of GET_REGION_INFO at most.
const REGION_INFO_ARGSZ_MAX: u32 = 64 << 10;
const MAX_MSG_FDS_OUT: u64 = 64;
const MAX_DMA_MAPS: u64 = 65535;
const BASE_PAGE: u64 = 4096;

/// What was agreed on in VERSION: what the server takes from us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors in one message. 0: it takes none, and reaches DMA memory by DMA_READ and DMA_WRITE.
    pub max_msg_fds: usize,
    /// Bytes of data in one region access.
    pub max_data_xfer: usize,
    /// DMA mappings.
    pub max_dma_maps: usize,
    /// Smallest page of a DMA mapping, in bytes.
    pub page_size: u64,
    /// Commands in flight.
    pub max_outstanding: usize,
    /// The I/O virtual addresses that the device can use. `None`, of servers that don't know of our extension: all.
    pub iova_ranges: Option<Vec<IovaRange>>,
}

impl Default for Limits {
    /// What holds before VERSION is answered.
    fn default() -> Self {
        Self {
            max_msg_fds: DEFAULT_MAX_MSG_FDS as usize,
            max_data_xfer: DEFAULT_MAX_DATA_XFER as usize,
            max_dma_maps: MAX_DMA_MAPS as usize,
            page_size: BASE_PAGE,
            max_outstanding: 1,
            iova_ranges: None,
        }
    }
}

/// What this client proposes in VERSION; `max_outstanding` commands in flight are our own extension.
pub fn proposal(max_outstanding: usize) -> Capabilities {
    Capabilities {
        max_msg_fds: Some(MAX_FDS_IN as u64),
        max_data_xfer_size: Some(DEFAULT_MAX_DATA_XFER),
        max_dma_maps: Some(MAX_DMA_MAPS),
        pgsizes: Some(BASE_PAGE),
        write_multiple: Some(false),
        max_outstanding: Some(max_outstanding as u64),
        iova_ranges: None,
    }
}

/// Reads the reply to VERSION, and takes the smaller of both sides' limits.
///
/// # Errors
/// [`Error::DeviceFault`] for another major version, a minor version above the proposed one, or limits that nothing can be
/// done with.
pub fn negotiate(payload: &[u8], proposed_outstanding: usize) -> Result<Limits> {
    let (version, theirs) = parse_version(payload).map_err(|error| Error::fault(error.to_string()))?;
    let (major, minor) = (version.major.get(), version.minor.get());
    if major != wire::MAJOR || minor > wire::MINOR {
        return Err(Error::fault(format!(
            "it speaks version {major}.{minor} of vfio-user where {}.{} was proposed",
            wire::MAJOR,
            wire::MINOR
        )));
    }
    let data = theirs.max_data_xfer_size.unwrap_or(DEFAULT_MAX_DATA_XFER);
    if data < 8 {
        return Err(Error::fault(format!("max_data_xfer_size {data} does not hold a register of 8 bytes")));
    }
    let pages = theirs.pgsizes.unwrap_or(BASE_PAGE);
    let page = pages & pages.wrapping_neg();
    if page == 0 || page > 1 << 30 {
        return Err(Error::fault(format!("pgsizes {pages:#x} has no page size up to 1 GiB")));
    }
    let outstanding = theirs.max_outstanding.map_or(1, |theirs| theirs.clamp(1, proposed_outstanding.max(1) as u64));
    let page = page.max(BASE_PAGE);
    let iova_ranges = theirs.iova_ranges.map(|ranges| usable(&ranges, page)).transpose()?;
    Ok(Limits {
        max_msg_fds: theirs.max_msg_fds.unwrap_or(DEFAULT_MAX_MSG_FDS).min(MAX_MSG_FDS_OUT) as usize,
        max_data_xfer: data.min(DEFAULT_MAX_DATA_XFER) as usize,
        max_dma_maps: theirs.max_dma_maps.unwrap_or(MAX_DMA_MAPS).min(MAX_DMA_MAPS) as usize,
        page_size: page,
        max_outstanding: outstanding as usize,
        iova_ranges,
    })
}

/// The ranges that a server reports, ascending.
fn usable(ranges: &[[u64; 2]], page: u64) -> Result<Vec<IovaRange>> {
    if !(1..=MAX_IOVA_RANGES).contains(&ranges.len()) {
        return Err(Error::fault(format!("it reports {} iova_ranges; 1 to {MAX_IOVA_RANGES} make sense", ranges.len())));
    }
    let ranges: Vec<_> = ranges.iter().map(|&[start, last]| IovaRange { start, last }).collect();
    for IovaRange { start, last } in &ranges {
        // Whole pages only: what is cut off by them is not usable.
        let first = start.checked_next_multiple_of(page);
        if first.and_then(|first| first.checked_add(page - 1)).is_none_or(|end| end > *last) {
            return Err(Error::fault(format!(
                "its iova_ranges have {start:#x}..={last:#x}, which holds no page of {page} bytes"
            )));
        }
    }
    Ok(joined(&ranges))
}

/// What the reply to a command must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expect {
    /// The command.
    pub command: u16,
    /// Bytes of payload at least.
    pub min: usize,
    /// Bytes of payload at most.
    pub max: usize,
    /// Whether no payload at all will do as well.
    pub or_empty: bool,
    /// Descriptors at most.
    pub fds: usize,
}

impl Expect {
    /// A reply of exactly `size` bytes of payload and no descriptor.
    pub fn exactly(command: u16, size: usize) -> Self {
        Self { command, min: size, max: size, or_empty: false, fds: 0 }
    }

    /// A reply of `min..=max` bytes of payload and at most `fds` descriptors.
    pub fn between(command: u16, min: usize, max: usize, fds: usize) -> Self {
        Self { command, min, max, or_empty: false, fds }
    }
}

/// A reply that may be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// Success, with so many bytes of payload.
    Payload(usize),
    /// The command was refused with this errno.
    Refused(i32),
}

/// Checks the header of a reply against what was asked, and the number of descriptors that came with it.
///
/// # Errors
/// [`Error::DeviceFault`] with the rule that was broken.
pub fn accept_reply(header: &Header, expect: &Expect, fds: usize) -> Result<Accepted> {
    let name = command::name(expect.command);
    if header.command.get() != expect.command {
        return Err(Error::fault(format!("the reply to {name} names command {}", header.command.get())));
    }
    let payload = header.payload_len(expect.max).map_err(|error| Error::fault(format!("reply to {name}: {error}")))?;
    if !header.is_reply() {
        return Err(Error::fault(format!("a command came where the reply to {name} is due")));
    }
    let refused = header.error();
    let max_fds = if refused.is_some() { 0 } else { expect.fds };
    if fds > max_fds {
        return Err(Error::fault(format!("the reply to {name} brought {fds} descriptors, {max_fds} are allowed")));
    }
    match refused {
        Some(errno) => Ok(Accepted::Refused(errno)),
        None if payload < expect.min && !(payload == 0 && expect.or_empty) => {
            Err(Error::fault(format!("the reply to {name} carries {payload} bytes, {} are due", expect.min)))
        }
        None => Ok(Accepted::Payload(payload)),
    }
}

/// The error of a command that the server refused.
pub fn refused(command: u16, errno: i32) -> Error {
    let source = io::Error::from_raw_os_error(errno);
    Error::Refused { command: command::name(command).into(), source: source.into() }
}

fn read<T: FromBytes>(payload: &[u8], command: u16) -> Result<(T, &[u8])> {
    T::read_from_prefix(payload)
        .map_err(|_| Error::fault(format!("the reply to {} is too short: {} bytes", command::name(command), payload.len())))
}

/// DEVICE_GET_INFO's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`: RESET 1, PCI 2.
    pub flags: u32,
    /// Number of regions.
    pub regions: u32,
    /// Number of interrupt indices.
    pub irqs: u32,
}

/// Reads the reply to DEVICE_GET_INFO.
///
/// # Errors
/// [`Error::DeviceFault`] for more than [`MAX_REGIONS`] or [`MAX_IRQS`].
pub fn parse_device_info(payload: &[u8]) -> Result<DeviceInfo> {
    let (info, _) = read::<wire::DeviceInfo>(payload, command::DEVICE_GET_INFO)?;
    let (regions, irqs) = (info.num_regions.get(), info.num_irqs.get());
    if regions > MAX_REGIONS || irqs > MAX_IRQS {
        return Err(Error::fault(format!(
            "the device has {regions} regions and {irqs} interrupt indices; at most {MAX_REGIONS} and {MAX_IRQS} make sense"
        )));
    }
    Ok(DeviceInfo { flags: info.flags.get(), regions, irqs })
}

/// A part of a region that may be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// GET_REGION_INFO's answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`: READ 1, WRITE 2, MMAP 4, CAPS 8.
    pub flags: u32,
    /// Bytes of the region; 0 = the device has none of this index.
    pub size: u64,
    /// Where the region starts in its descriptor, in bytes.
    pub offset: u64,
    /// What may be mapped: the sparse areas, or all of it; nothing without the MMAP flag. Inside of the region, each from a
    /// page boundary of the descriptor, ascending, not overlapping.
    pub areas: Vec<Area>,
    /// Type and subtype of a region that only some devices have; bit 31 of the type: the low half is a PCI vendor.
    pub type_: Option<(u32, u32)>,
    /// Whether the areas may hold the MSI-X table. Interrupts are still set up by commands, not by writes to it.
    pub msix_mappable: bool,
    /// The highest version of the fault queue that the region is, by [`wire::CAP_FAULT`].
    pub fault_version: Option<u32>,
    /// The version of the queue of answers that the region is, by [`wire::CAP_FAULT_RESPONSE`].
    pub response_version: Option<u32>,
}

/// `VFIO_REGION_INFO_FLAG_MMAP`.
pub const REGION_FLAG_MMAP: u32 = 4;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
pub const REGION_FLAG_CAPS: u32 = 8;

/// What a reply to GET_REGION_INFO says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegionReply {
    /// All there is.
    Complete(RegionInfo),
    /// The capabilities did not fit: ask again with this `argsz`.
    Again(u32),
}

/// Reads the reply to GET_REGION_INFO for region `index`, which was asked with `argsz`; `page` is our page size.
///
/// # Errors
/// [`Error::DeviceFault`] for a broken capability chain, or areas that can't be mapped as they are given.
pub fn parse_region_info(payload: &[u8], index: u32, argsz: u32, page: u64) -> Result<RegionReply> {
    let (info, _) = read::<wire::RegionInfo>(payload, command::DEVICE_GET_REGION_INFO)?;
    let fault = |what: String| Error::fault(format!("region {index}: {what}"));
    if info.index.get() != index {
        return Err(fault(format!("the reply describes region {}", info.index.get())));
    }
    let (flags, size, offset) = (info.flags.get(), info.size.get(), info.offset.get());
    let needed = info.argsz.get();
    if flags & REGION_FLAG_CAPS != 0 && needed > argsz {
        if needed > REGION_INFO_ARGSZ_MAX {
            return Err(fault(format!("its capabilities need {needed} bytes, at most {REGION_INFO_ARGSZ_MAX} are taken")));
        }
        return Ok(RegionReply::Again(needed));
    }
    let mut areas = Vec::new();
    if flags & REGION_FLAG_MMAP != 0 && size != 0 {
        areas.push(Area { offset: 0, size });
    }
    let (mut type_, mut msix_mappable) = (None, false);
    let (mut fault_version, mut response_version) = (None, None);
    let first = if flags & REGION_FLAG_CAPS == 0 { 0 } else { info.cap_offset.get() };
    let chain = wire::capabilities(payload, size_of::<wire::RegionInfo>(), first).map_err(|e| fault(e.to_string()))?;
    for (header, body) in chain {
        match header.id.get() {
            wire::CAP_SPARSE_MMAP if flags & REGION_FLAG_MMAP != 0 => {
                let sparse = wire::sparse_areas(body).map_err(|e| fault(e.to_string()))?;
                areas = check_areas(&sparse, size, offset, page).map_err(fault)?;
            }
            wire::CAP_TYPE => {
                let (region, _) =
                    wire::RegionType::read_from_prefix(body).map_err(|_| fault("its type is cut off".into()))?;
                type_ = Some((region.kind.get(), region.subtype.get()));
            }
            wire::CAP_MSIX_MAPPABLE => msix_mappable = true,
            // These were never merged: a kernel may come to mean something else by their numbers.
            wire::CAP_FAULT => fault_version = version(body),
            wire::CAP_FAULT_RESPONSE => response_version = version(body),
            _ => {}
        }
    }
    let info = RegionInfo { flags, size, offset, areas, type_, msix_mappable, fault_version, response_version };
    Ok(RegionReply::Complete(info))
}

/// A capability that is a number.
fn version(body: &[u8]) -> Option<u32> {
    body.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn check_areas(sparse: &[SparseArea], region: u64, base: u64, page: u64) -> Result<Vec<Area>, String> {
    if sparse.len() > MAX_AREAS {
        return Err(format!("{} sparse areas, at most {MAX_AREAS} are taken", sparse.len()));
    }
    let mut areas: Vec<Area> = sparse.iter().map(|a| Area { offset: a.offset.get(), size: a.size.get() }).collect();
    areas.retain(|area| area.size != 0);
    areas.sort_by_key(|area| area.offset);
    let mut end = 0;
    for Area { offset, size } in areas.iter().copied() {
        let last = offset.checked_add(size).filter(|&last| last <= region);
        let Some(last) = last else {
            return Err(format!("sparse area {offset:#x}+{size:#x} is outside of its {region:#x} bytes"));
        };
        if offset < end {
            return Err(format!("sparse area {offset:#x}+{size:#x} overlaps the one before"));
        }
        if !base.checked_add(offset).is_some_and(|at| at.is_multiple_of(page)) {
            return Err(format!("sparse area {offset:#x}+{size:#x} does not start at a page of its descriptor ({base:#x})"));
        }
        end = last;
    }
    Ok(areas)
}

/// GET_IRQ_INFO's answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`: EVENTFD 1, MASKABLE 2, AUTOMASKED 4, NORESIZE 8.
    pub flags: u32,
    /// Number of vectors; 0 = the device has none of this index.
    pub count: u32,
    /// Type and subtype of an index that only some devices have.
    pub type_: Option<(u32, u32)>,
}

/// `VFIO_IRQ_INFO_NORESIZE`.
const IRQ_FLAG_NORESIZE: u32 = 8;
/// `VFIO_IRQ_INFO_FLAG_CAPS` of the nested series.
pub const IRQ_FLAG_CAPS: u32 = 1 << 4;
/// `argsz` of DEVICE_GET_IRQ_INFO for an index that only some devices have.
pub const IRQ_INFO_ARGSZ: u32 = 256;

impl IrqInfo {
    /// Whether vectors may be added while others of the index are in use. Elsewhere all of them are disabled first, and then
    /// enabled anew.
    pub fn is_resizable(&self) -> bool {
        self.flags & IRQ_FLAG_NORESIZE == 0
    }
}

/// Reads the reply to DEVICE_GET_IRQ_INFO for `index`.
///
/// # Errors
/// [`Error::DeviceFault`] when it describes another index, or for a broken capability chain.
pub fn parse_irq_info(payload: &[u8], index: u32) -> Result<IrqInfo> {
    let (info, _) = read::<wire::IrqInfo>(payload, command::DEVICE_GET_IRQ_INFO)?;
    if info.index.get() != index {
        return Err(Error::fault(format!("the reply for interrupt index {index} describes {}", info.index.get())));
    }
    let (flags, count) = (info.flags.get(), info.count.get());
    let mut type_ = None;
    if flags & IRQ_FLAG_CAPS != 0
        && let Ok((extended, _)) = wire::ExtendedIrqInfo::read_from_prefix(payload)
    {
        let fixed = size_of::<wire::ExtendedIrqInfo>();
        let fault = |what: String| Error::fault(format!("interrupt index {index}: {what}"));
        let chain = wire::capabilities(payload, fixed, extended.cap_offset.get()).map_err(|e| fault(e.to_string()))?;
        for (_, body) in chain.iter().filter(|(header, _)| header.id.get() == wire::CAP_IRQ_TYPE) {
            let (kind, _) = wire::RegionType::read_from_prefix(body).map_err(|_| fault("its type is cut off".into()))?;
            type_ = Some((kind.kind.get(), kind.subtype.get()));
        }
    }
    Ok(IrqInfo { flags, count, type_ })
}

/// Checks that the reply to REGION_READ or REGION_WRITE echoes its request, and gives the data.
///
/// # Errors
/// [`Error::DeviceFault`] when it does not.
pub fn parse_region_access<'a>(payload: &'a [u8], asked: &RegionAccess, command: u16) -> Result<&'a [u8]> {
    let (echo, data) = read::<RegionAccess>(payload, command)?;
    if echo != *asked {
        return Err(Error::fault(format!(
            "the reply to {} of {} bytes at {:#x} of region {} is for {} bytes at {:#x} of region {}",
            command::name(command),
            asked.count,
            asked.offset,
            asked.region,
            echo.count,
            echo.offset,
            echo.region
        )));
    }
    Ok(data)
}

/// Checks that the reply to DMA_UNMAP, where it has a payload, names the mapping and its whole size.
///
/// # Errors
/// [`Error::DeviceFault`] when it does not: the server has unmapped something else.
pub fn parse_dma_unmap(payload: &[u8], iova: u64, len: u64) -> Result<()> {
    if payload.is_empty() {
        return Ok(());
    }
    let (echo, _) = read::<wire::DmaUnmap>(payload, command::DMA_UNMAP)?;
    if (echo.address.get(), echo.size.get()) != (iova, len) {
        return Err(Error::fault(format!(
            "DMA_UNMAP of {len:#x} bytes at {iova:#x} was answered for {:#x} bytes at {:#x}",
            echo.size, echo.address
        )));
    }
    Ok(())
}

/// A command of the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Served<'a> {
    /// Read `count` bytes of ours at `iova`.
    Read {
        /// Where.
        iova: u64,
        /// Bytes, at most what we allow.
        count: usize,
    },
    /// Write `data` to our memory at `iova`.
    Write {
        /// Where.
        iova: u64,
        /// What.
        data: &'a [u8],
    },
    /// Answer with this errno.
    Refuse(u32),
}

/// Checks the header of a command of the server, and gives the bytes of its payload.
///
/// # Errors
/// [`Error::DeviceFault`] when it is longer than we said we take.
pub fn accept_command(header: &Header) -> Result<usize> {
    let max = match header.command.get() {
        command::DMA_WRITE => size_of::<DmaAccess>() + DEFAULT_MAX_DATA_XFER as usize,
        _ => MAX_CONTROL_PAYLOAD,
    };
    let name = command::name(header.command.get());
    header.payload_len(max).map_err(|error| Error::fault(format!("the server's command {name}: {error}")))
}

/// Reads a command of the server that brought `fds` descriptors.
pub fn parse_command<'a>(header: &Header, payload: &'a [u8], fds: usize) -> Served<'a> {
    let number = header.command.get();
    if number != command::DMA_READ && number != command::DMA_WRITE {
        return Served::Refuse(libc::ENOSYS as u32);
    }
    let Ok((access, data)) = DmaAccess::read_from_prefix(payload) else { return Served::Refuse(libc::EINVAL as u32) };
    let (iova, count) = (access.address.get(), access.count.get());
    if count > DEFAULT_MAX_DATA_XFER {
        return Served::Refuse(libc::E2BIG as u32);
    }
    let due = if number == command::DMA_WRITE { count } else { 0 };
    if fds != 0 || data.len() as u64 != due {
        return Served::Refuse(libc::EINVAL as u32);
    }
    match number {
        command::DMA_READ => Served::Read { iova, count: count as usize },
        _ => Served::Write { iova, data },
    }
}

/// A whole message: header with `msg_id` 0, and the parts of the payload.
pub fn message(command: u16, fixed: &(impl IntoBytes + zerocopy::Immutable + ?Sized), data: &[u8]) -> Vec<u8> {
    let fixed = fixed.as_bytes();
    let header = Header::command(0, command, fixed.len() + data.len());
    let mut bytes = Vec::with_capacity(HEADER_SIZE + fixed.len() + data.len());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(fixed);
    bytes.extend_from_slice(data);
    bytes
}

#[cfg(test)]
mod tests;
