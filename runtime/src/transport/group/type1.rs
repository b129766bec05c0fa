//! Type 1: what may be mapped, and mapping it.

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use zerocopy::{FromBytes, IntoBytes, little_endian::U32};

use super::{Container, nodes::ContainerFd};
use crate::{
    Error, Result,
    dma::{Access, IovaRange, MapRefused, refused},
    transport::{
        user::wire,
        vfio::{
            abi::{self, IovaPair, IovaRanges, MigrationCap, Type1Header},
            ioctl,
        },
    },
};

/// What the IOMMU of a container can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Type1Info {
    /// Page sizes, a bit for each; the smallest is the unit of mappings.
    pub page_sizes: u64,
    /// Addresses that may be mapped. `None`: all of them.
    pub ranges: Option<Vec<IovaRange>>,
    /// Mappings that still fit, where the kernel says so (Linux 5.10).
    pub dma_available: Option<u32>,
    /// What dirty page tracking can do, where there is such a thing.
    pub migration: Option<Migration>,
}

/// What dirty page tracking of a container can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migration {
    /// Page sizes of its bitmaps, a bit for each.
    pub page_sizes: u64,
    /// Bytes of a bitmap at most.
    pub max_dirty_bitmap: u64,
}

impl Type1Info {
    /// Unit of mappings, in bytes.
    pub fn granule(&self) -> u64 {
        self.page_sizes & self.page_sizes.wrapping_neg()
    }
}

impl Container {
    /// What may be mapped at present. It changes with each group that comes or goes.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for an answer that breaks the rules, [`Error::Unsupported`] for groups without an IOMMU,
    /// [`Error::Io`] without a group.
    pub fn info(&self) -> Result<Type1Info> {
        self.0.fd.info()
    }

    /// Mappings that fit in all (`dma_entry_limit` of the module `vfio_iommu_type1`, when the first group came), where the kernel
    /// says so.
    pub fn max_mappings(&self) -> Option<u32> {
        self.state().max_mappings
    }

    /// Maps `len` bytes of memory at `addr` for the devices of the container, which see them at `iova`. All of them are pinned,
    /// which takes seconds for many GiB. A mapped BAR may be given too: then the devices reach that device.
    ///
    /// # Errors
    /// [`Error::Map`] with the reason, [`Error::Exhausted`] when the kernel has no memory for its tables, [`Error::Unsupported`]
    /// for groups without an IOMMU, else [`Error::Io`]. Nothing is mapped then.
    ///
    /// # Safety
    /// Until the range is unmapped, or the container and all of its devices are gone, devices access the memory as `access` says,
    /// at any time: it stays mapped in this process, and nothing relies on what is in it, as far as devices write.
    pub unsafe fn map(&self, addr: *mut u8, len: u64, iova: u64, access: Access) -> Result<()> {
        let request = Request { vaddr: addr.addr() as u64, len, iova };
        let read = if access.reads() { VFIO_DMA_MAP_FLAG_READ } else { 0 };
        let write = if access.writes() { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let mut map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: read | write,
            vaddr: request.vaddr,
            iova,
            size: len,
        };
        // SAFETY: MAP_DMA reads a `vfio_iommu_type1_dma_map`; that devices may access the memory is the caller's promise.
        unsafe { ioctl::with_struct(self, abi::container::IOMMU_MAP_DMA, &mut map) }.map(drop).map_err(|errno| {
            // Only now, and so that it is what holds at present.
            let info = self.info().ok();
            request.refused(errno, info.as_ref(), self.max_mappings(), refused::memlock_limit())
        })
    }

    /// Unmaps what lies in `len` bytes from `iova`: whole mappings. The bytes that were mapped there, which are `len`. Devices do
    /// not access the memory any more once it returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the range cuts a mapping in two, and nothing is unmapped; or when less than all of it was mapped,
    /// and that is unmapped. [`Error::Unsupported`] for groups without an IOMMU, else [`Error::Io`].
    pub fn unmap(&self, iova: u64, len: u64) -> Result<u64> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            iova,
            size: len,
            ..Default::default()
        };
        // SAFETY: UNMAP_DMA reads and writes a `vfio_iommu_type1_dma_unmap`; without flags no data follow it.
        let result = unsafe { ioctl::with_struct(self, abi::container::IOMMU_UNMAP_DMA, &mut unmap) };
        confirmed(iova, len, result.map(|_| unmap.size))
    }
}

impl ContainerFd {
    pub(super) fn info(&self) -> Result<Type1Info> {
        // SAFETY: IOMMU_GET_INFO takes a `vfio_iommu_type1_info`, which starts with its `argsz`, and writes at most that.
        let answer = unsafe { ioctl::query(self, abi::container::IOMMU_GET_INFO, Type1Header::default().as_bytes()) };
        parse(&answer.map_err(|errno| unusable("reading what the IOMMU can do", errno))?)
    }
}

/// The error of a container in which nothing can be mapped, or of a request for no known reason.
fn unusable(what: &str, errno: Errno) -> Error {
    match errno {
        Errno::NOTTY => Error::Unsupported {
            what: format!(
                "{what}: the container's groups have no IOMMU; use memory that does not move, and its physical addresses"
            ),
        },
        Errno::INVAL => Error::io(format!("{what}; the container has no group yet"), errno),
        errno => Error::io(what, errno),
    }
}

/// Reads the answer to IOMMU_GET_INFO.
fn parse(answer: &[u8]) -> Result<Type1Info> {
    let fault = |what: &str| Error::fault(format!("the kernel's answer about the IOMMU: {what}"));
    let (head, _) = Type1Header::read_from_prefix(answer).map_err(|_| fault("it is too short"))?;
    if head.argsz.get() as usize > answer.len() {
        return Err(fault(&format!("it needs {} bytes, {} are taken", head.argsz, answer.len())));
    }
    let page_sizes = head.page_sizes.get();
    if head.flags.get() & VFIO_IOMMU_INFO_PGSIZES == 0 || page_sizes == 0 {
        return Err(fault("it has no page sizes"));
    }
    let mut info = Type1Info { page_sizes, ranges: None, dma_available: None, migration: None };
    let first = if head.flags.get() & VFIO_IOMMU_INFO_CAPS != 0 { head.cap_offset.get() } else { 0 };
    let chain = wire::capabilities(answer, size_of::<Type1Header>(), first).map_err(|error| fault(&error.to_string()))?;
    for (header, body) in chain {
        match u32::from(header.id.get()) {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => info.ranges = Some(ranges(body).map_err(|what| fault(&what))?),
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                let (available, _) = U32::read_from_prefix(body).map_err(|_| fault("the number of mappings is cut off"))?;
                info.dma_available = Some(available.get());
            }
            VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                let (cap, _) = MigrationCap::read_from_prefix(body).map_err(|_| fault("dirty page tracking is cut off"))?;
                info.migration =
                    Some(Migration { page_sizes: cap.page_sizes.get(), max_dirty_bitmap: cap.max_dirty_bitmap.get() });
            }
            _ => {}
        }
    }
    Ok(info)
}

fn ranges(body: &[u8]) -> Result<Vec<IovaRange>, String> {
    let (head, rest) = IovaRanges::read_from_prefix(body).map_err(|_| "the IOVA ranges are cut off")?;
    let count = head.count.get();
    let (pairs, _) = <[IovaPair]>::ref_from_prefix_with_elems(rest, count as usize)
        .map_err(|_| format!("{count} IOVA ranges do not fit in it"))?;
    let range = |pair: &IovaPair| IovaRange { start: pair.start.get(), last: pair.end.get() };
    let ranges: Vec<_> = pairs.iter().map(range).collect();
    match ranges.iter().find(|range| range.start > range.last) {
        Some(IovaRange { start, last }) => Err(format!("the IOVA range {start:#x}..={last:#x} ends before it starts")),
        None => Ok(ranges),
    }
}

/// A mapping that was asked for.
#[derive(Debug, Clone, Copy)]
struct Request {
    vaddr: u64,
    len: u64,
    iova: u64,
}

impl Request {
    /// The error for `errno`. The kernel tests for an overlap first, then for the limit, then for what is allowed.
    fn refused(self, errno: Errno, info: Option<&Type1Info>, max: Option<u32>, memlock: Option<u64>) -> Error {
        let Self { len, iova, .. } = self;
        let what = format!("mapping {len:#x} bytes at IOVA {iova:#x}");
        let map = |reason| Error::Map { iova, len, reason };
        match errno {
            Errno::EXIST => map(MapRefused::Overlap),
            Errno::NOSPC => map(MapRefused::Limit { max }),
            Errno::FAULT => map(MapRefused::BadAddress),
            Errno::NOMEM => match memlock {
                Some(limit) => map(MapRefused::Memlock { limit, needed: len }),
                None => Error::Exhausted { what: format!("{what}: the kernel has no memory for its page tables; map less") },
            },
            Errno::INVAL | Errno::OVERFLOW => match (self.misplaced(info), info) {
                (Some(reason), _) => map(reason),
                (None, None) => unusable(&what, errno),
                (None, Some(_)) => Error::io(what, errno),
            },
            errno => unusable(&what, errno),
        }
    }

    /// What is wrong with where the mapping is to be.
    fn misplaced(self, info: Option<&Type1Info>) -> Option<MapRefused> {
        let Self { vaddr, len, iova } = self;
        let granule = info.map_or_else(|| rustix::param::page_size() as u64, Type1Info::granule);
        if len == 0 || (vaddr | len | iova) & (granule - 1) != 0 {
            return Some(MapRefused::Misaligned { granule });
        }
        if vaddr.checked_add(len - 1).is_none() {
            return Some(MapRefused::BadAddress);
        }
        let allowed = info.and_then(|info| info.ranges.as_deref());
        let all = [IovaRange { start: 0, last: u64::MAX }];
        let Some(last) = iova.checked_add(len - 1) else {
            let beyond = MapRefused::outside(IovaRange { start: iova, last: u64::MAX }, allowed.unwrap_or_default());
            return beyond.or(Some(MapRefused::Aperture { allowed: None }));
        };
        MapRefused::outside(IovaRange { start: iova, last }, allowed.unwrap_or(&all))
    }
}

/// What became of an unmap.
fn confirmed(iova: u64, len: u64, result: Result<u64, Errno>) -> Result<u64> {
    let what = format!("unmapping {len:#x} bytes at IOVA {iova:#x}");
    match result {
        Ok(size) if size == len => Ok(size),
        Ok(0) => Err(Error::invalid(format!("{what}: nothing is mapped there"))),
        Ok(size) if size < len => {
            Err(Error::invalid(format!("{what}: only {size:#x} bytes were mapped there, which are not mapped any more")))
        }
        Ok(size) => Err(Error::fault(format!("{what}: the kernel unmapped {size:#x} bytes"))),
        Err(Errno::INVAL | Errno::OVERFLOW) => Err(Error::invalid(format!(
            "{what}: it is not made of whole mappings, or not of whole pages; unmap as was mapped. Nothing was unmapped"
        ))),
        Err(errno) => Err(unusable(&what, errno)),
    }
}

#[cfg(test)]
mod tests;
