//! I/O address spaces.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
    thread,
    time::Duration,
};

use iommufd_bindings as abi;
use rustix::{fs, io::Errno};

use super::{
    DestroyError, IommufdFd, Kind, Object, Op,
    refusal::{self, Request},
};
use crate::{
    Error, Result,
    dma::{Access, IovaRange, refused::memlock_limit},
};

const _: () = assert!(size_of::<abi::iommu_ioas_alloc>() == 12);
const _: () = assert!(size_of::<abi::iommu_ioas_map>() == 40);
const _: () = assert!(size_of::<abi::iommu_ioas_copy>() == 40);
const _: () = assert!(size_of::<abi::iommu_ioas_unmap>() == 24);
const _: () = assert!(size_of::<abi::iommu_ioas_iova_ranges>() == 32);
const _: () = assert!(size_of::<abi::iommu_ioas_allow_iovas>() == 24);
const _: () = assert!(size_of::<abi::iommu_iova_range>() == 16);

/// Ranges that are taken from the kernel, or given to it: more than any machine has.
const MAX_RANGES: usize = 4096;
/// Answers of "more ranges than you have room for" before it is an error: they can change under the call.
const RANGE_ATTEMPTS: usize = 8;
/// Tries of an unmap that races another map or unmap, a millisecond apart.
const UNMAP_ATTEMPTS: usize = 20;

/// Addresses that may be mapped, as of now: attaching a device can narrow them, detaching one widen them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    /// In order of address, none overlapping.
    pub ranges: Vec<IovaRange>,
    /// What address and length of a mapping must be multiples of, in bytes, as far as the kernel cares: a power of two. The
    /// methods of [`Ioas`] want whole pages besides.
    pub alignment: u64,
}

/// An I/O address space of a context. A handle: clones are the same space, which is destroyed with the last of them; where that
/// fails, because a device is still attached, a warning is traced and it goes with its context.
///
/// A space that no device is attached to pins nothing: memory mapped there is looked at, charged and pinned when the first one
/// is attached. With one attached, that happens as it is mapped.
#[derive(Debug, Clone)]
pub struct Ioas(Arc<Object>);

impl Ioas {
    /// Makes an empty one.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel has no memory for it.
    pub fn alloc(context: &IommufdFd) -> Result<Self> {
        let mut arg = abi::iommu_ioas_alloc::default();
        let result = context.call(abi::IOMMUFD_CMD_IOAS_ALLOC, &mut arg);
        result.map_err(|errno| Error::io("making an I/O address space of iommufd", errno))?;
        Ok(Self(Arc::new(Object { context: context.clone(), id: arg.out_ioas_id, kind: Kind::Ioas })))
    }

    /// Its id in the context.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// The context that it is in.
    pub fn context(&self) -> &IommufdFd {
        &self.0.context
    }

    /// Destroys it, with all that is mapped.
    ///
    /// # Errors
    /// [`Error::Io`] with EBUSY while a device is attached, a page table or another handle is left: it comes back with it.
    pub fn destroy(self) -> Result<(), DestroyError<Self>> {
        match Arc::try_unwrap(self.0) {
            Ok(object) => match object.destroy() {
                Ok(()) => {
                    object.forget();
                    Ok(())
                }
                Err(error) => Err(DestroyError { error, object: Self(Arc::new(object)) }),
            },
            Err(shared) => {
                let what = format!("destroying the I/O address space with id {}: other handles to it are left", shared.id);
                Err(DestroyError { error: Error::io(what, Errno::BUSY), object: Self(shared) })
            }
        }
    }

    /// Maps `len` bytes of this process's memory at `addr` to `iova`. Address, length and IOVA are multiples of the page size.
    ///
    /// # Errors
    /// [`Error::Map`] with the reason; nothing is mapped then.
    ///
    /// # Safety
    /// Until the range is unmapped (or the space is destroyed), devices attached to the space access the memory as `access`
    /// says, at any time: it stays mapped in this process, and nothing relies on what is in it, as far as devices write.
    pub unsafe fn map(&self, addr: *mut u8, len: u64, iova: u64, access: Access) -> Result<()> {
        // SAFETY: by the caller's promise.
        unsafe { self.map_memory(addr, len, Some(iova), access) }.map(drop)
    }

    /// [`Ioas::map`] at an IOVA that the kernel chooses, and gives back: never 0, and inside of what
    /// [`Ioas::allow_iovas`] allows, if that was called.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when no addresses are free, else as for [`Ioas::map`].
    ///
    /// # Safety
    /// As for [`Ioas::map`].
    pub unsafe fn map_anywhere(&self, addr: *mut u8, len: u64, access: Access) -> Result<u64> {
        // SAFETY: by the caller's promise.
        unsafe { self.map_memory(addr, len, None, access) }
    }

    /// # Safety
    /// As for [`Ioas::map`].
    unsafe fn map_memory(&self, addr: *mut u8, len: u64, iova: Option<u64>, access: Access) -> Result<u64> {
        let request = Request { source: addr.addr() as u64, iova, len, file: false };
        request.check()?;
        let mut arg = abi::iommu_ioas_map {
            flags: access_flags(access) | fixed(iova),
            ioas_id: self.id(),
            user_va: addr.expose_provenance() as u64,
            length: len,
            iova: iova.unwrap_or(0),
            ..Default::default()
        };
        let result = self.0.context.call(abi::IOMMUFD_CMD_IOAS_MAP, &mut arg);
        result.map(|()| arg.iova).map_err(|errno| self.refused(errno, &request))
    }

    /// Maps `len` bytes of a file from `start` on to `iova`, all multiples of the page size. The file is a memfd, or a dma-buf
    /// of a VFIO device's BAR; the space holds it. Prefer it to [`Ioas::map`] for memory that comes from a memfd: the mapping is
    /// bound to the file, not to this process.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no such command ([`IommufdFd::maps_files`] says so first: use [`Ioas::map`])
    /// or does not take this file, [`Error::Invalid`] when the file ends before the range does, else as for [`Ioas::map`].
    pub fn map_file(&self, file: impl AsFd, start: u64, len: u64, iova: u64, access: Access) -> Result<()> {
        let context = &self.0.context;
        if !context.maps_files() {
            return Err(Error::Unsupported {
                what: "mapping a file for DMA, which needs Linux 6.13; map its memory".into(),
            });
        }
        let request = Request { source: start, iova: Some(iova), len, file: true };
        request.check()?;
        let stat = fs::fstat(&file).map_err(|errno| Error::io("fstat of a file to map for DMA", errno))?;
        let end = start.checked_add(len).filter(|&end| end <= i64::MAX as u64);
        let regular = fs::FileType::from_raw_mode(stat.st_mode) == fs::FileType::RegularFile;
        if end.is_none_or(|end| regular && end > stat.st_size as u64) {
            // Without a device attached the kernel would find out when one is.
            return Err(Error::invalid(format!(
                "{len:#x} bytes at {start:#x} of a file to map for DMA: it ends at {:#x}",
                stat.st_size
            )));
        }
        let mut arg = abi::iommu_ioas_map_file {
            flags: access_flags(access) | fixed(Some(iova)),
            ioas_id: self.id(),
            fd: file.as_fd().as_raw_fd(),
            start,
            length: len,
            iova,
            ..Default::default()
        };
        context.call(abi::IOMMUFD_CMD_IOAS_MAP_FILE, &mut arg).map_err(|errno| self.refused(errno, &request))
    }

    /// Maps what `from` has mapped at `source`, `len` bytes, here at `iova`: the pages are shared, and charged once.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `from` has not mapped all of it or is of another context, [`Error::Io`] with EPERM when it may
    /// not be written there but `access` says so, else as for [`Ioas::map`].
    ///
    /// # Safety
    /// As for [`Ioas::map`], for the memory that is mapped there, until *both* mappings are gone.
    pub unsafe fn copy(&self, from: &Ioas, source: u64, len: u64, iova: u64, access: Access) -> Result<()> {
        let request = Request { source, iova: Some(iova), len, file: false };
        request.check()?;
        if !self.context().is(from.context()) {
            return Err(Error::invalid("a mapping can't be copied between contexts of iommufd: map the memory again"));
        }
        let mut arg = abi::iommu_ioas_copy {
            flags: access_flags(access) | fixed(Some(iova)),
            dst_ioas_id: self.id(),
            src_ioas_id: from.id(),
            length: len,
            dst_iova: iova,
            src_iova: source,
            ..Default::default()
        };
        self.0.context.call(abi::IOMMUFD_CMD_IOAS_COPY, &mut arg).map_err(|errno| match errno {
            Errno::NOENT => {
                Error::invalid(format!("copying {len:#x} bytes from IOVA {source:#x}: not all of it is mapped there"))
            }
            Errno::PERM => Error::io(
                format!("copying {len:#x} bytes from IOVA {source:#x} for {access:?}: the memory may only be read"),
                errno,
            ),
            errno => self.refused(errno, &request),
        })
    }

    /// Unmaps one mapping, or several that together are just this range. When it returns, no device reaches the memory through
    /// them. The bytes that the kernel confirmed: `len`.
    ///
    /// # Errors
    /// On any error the addresses and the memory are not free to be used again; and where the range is more than *one* mapping,
    /// some of it may be unmapped already, since the kernel removes one after the other.
    /// - [`Error::Invalid`]: nothing is mapped there, the range cuts a mapping in two, or the kernel unmapped another length.
    /// - [`Error::Io`] with EBUSY: hardware or another map or unmap uses the range, also after many tries.
    pub fn unmap(&self, iova: u64, len: u64) -> Result<u64> {
        refusal::check_range(iova, len)?;
        let mut attempt = 1;
        let result = loop {
            match self.unmap_once(iova, len) {
                Err(Errno::BUSY) if attempt < UNMAP_ATTEMPTS => thread::sleep(Duration::from_millis(1)),
                result => break result,
            }
            attempt += 1;
        };
        confirmed(iova, len, result)
    }

    /// Unmaps everything: how many bytes that was.
    ///
    /// # Errors
    /// [`Error::Io`]; any part may be unmapped then.
    pub fn unmap_all(&self) -> Result<u64> {
        self.unmap_once(0, u64::MAX).map_err(|errno| Error::io("unmapping everything of an I/O address space", errno))
    }

    fn unmap_once(&self, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut arg = abi::iommu_ioas_unmap { ioas_id: self.id(), iova, length, ..Default::default() };
        self.0.context.call(abi::IOMMUFD_CMD_IOAS_UNMAP, &mut arg)?;
        Ok(arg.length)
    }

    /// The addresses that may be mapped, as of now. To be read again after every attach and detach.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] when the kernel's answer makes no sense, [`Error::Io`] when it gives none.
    pub fn iova_ranges(&self) -> Result<Ranges> {
        gather(|room| {
            let mut arg = abi::iommu_ioas_iova_ranges {
                ioas_id: self.id(),
                num_iovas: room.len() as u32,
                allowed_iovas: room.as_mut_ptr().expose_provenance() as u64,
                ..Default::default()
            };
            let result = self.0.context.call(abi::IOMMUFD_CMD_IOAS_IOVA_RANGES, &mut arg);
            Answer { result, count: arg.num_iovas, alignment: arg.out_iova_alignment }
        })
    }

    /// Keeps these addresses usable: a device that would take one of them away can't be attached from now on. The list replaces
    /// the one before, whole or not at all; an empty one lifts the promise.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range of less than two addresses, ranges that overlap, or addresses that are reserved already.
    pub fn allow_iovas(&self, ranges: &[IovaRange]) -> Result<()> {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        if let Some(bad) = sorted.iter().find(|range| range.start >= range.last) {
            return Err(Error::invalid(format!("{bad:#x?} can't be allowed: a range has at least two addresses")));
        }
        if let Some(pair) = sorted.windows(2).find(|pair| pair[1].start <= pair[0].last) {
            return Err(Error::invalid(format!("{:#x?} and {:#x?} can't both be allowed: they overlap", pair[0], pair[1])));
        }
        if sorted.len() > MAX_RANGES {
            return Err(Error::invalid(format!("{} ranges can't be allowed: at most {MAX_RANGES}", sorted.len())));
        }
        let list: Vec<_> =
            sorted.iter().map(|range| abi::iommu_iova_range { start: range.start, last: range.last }).collect();
        let mut arg = abi::iommu_ioas_allow_iovas {
            ioas_id: self.id(),
            num_iovas: list.len() as u32,
            allowed_iovas: list.as_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        self.0.context.call(abi::IOMMUFD_CMD_IOAS_ALLOW_IOVAS, &mut arg).map_err(|errno| {
            // Only the attached devices' regions stand in the way; which, the present ranges show.
            let hole = self.iova_ranges().ok().and_then(|now| crate::dma::conflicts(sorted.iter().copied(), &now.ranges));
            match (errno, hole) {
                (Errno::ADDRINUSE, Some((range, hole))) => Error::invalid(format!(
                    "{range:#x?} can't be allowed: {hole:#x?} of it is not usable with the devices that are attached; leave it out"
                )),
                (Errno::ADDRINUSE, None) => {
                    Error::invalid("a range can't be allowed: the attached devices reserve some of it; read the ranges again")
                }
                (errno, _) => Error::io("allowing IOVA ranges", errno),
            }
        })
    }

    /// Whether pages are joined into larger ones in the IOMMU's page table. On in a new space.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses.
    pub fn huge_pages(&self) -> Result<bool> {
        let value = self.0.context.option(Op::Get, abi::iommufd_option_IOMMU_OPTION_HUGE_PAGES, self.id(), 0);
        value
            .map(|value| value != 0)
            .map_err(|errno| Error::io("reading the huge-page option of an I/O address space", errno))
    }

    /// Whether pages are to be joined into larger ones in the IOMMU's page table, which saves IOTLB misses; off is for measuring.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses, as it does once a device is attached and memory is mapped.
    pub fn set_huge_pages(&self, on: bool) -> Result<()> {
        let value = self.0.context.option(Op::Set, abi::iommufd_option_IOMMU_OPTION_HUGE_PAGES, self.id(), on.into());
        value.map(drop).map_err(|errno| {
            Error::io("joining pages of an I/O address space or not: choose before memory is mapped", errno)
        })
    }

    fn refused(&self, errno: Errno, request: &Request) -> Error {
        // Only these two have more than one meaning that the ranges tell apart.
        let ranges = match errno {
            Errno::INVAL | Errno::OVERFLOW => self.iova_ranges().ok(),
            _ => None,
        };
        refusal::refused(errno, request, ranges.as_ref(), memlock_limit())
    }
}

fn access_flags(access: Access) -> u32 {
    let read = if access.reads() { abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE } else { 0 };
    let write = if access.writes() { abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE } else { 0 };
    read | write
}

fn fixed(iova: Option<u64>) -> u32 {
    match iova {
        Some(_) => abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        None => 0,
    }
}

/// What became of an unmap.
fn confirmed(iova: u64, len: u64, result: Result<u64, Errno>) -> Result<u64> {
    let what = format!("unmapping {len:#x} bytes at IOVA {iova:#x}");
    match result {
        Ok(done) if done == len => Ok(done),
        Ok(done) => Err(Error::invalid(format!("{what}: the kernel confirms {done:#x} bytes, the rest was not mapped"))),
        Err(Errno::NOENT) => Err(Error::invalid(format!(
            "{what}: nothing is mapped there, or the range cuts a mapping: unmap what was mapped, whole"
        ))),
        Err(errno @ Errno::BUSY) => {
            Err(Error::io(format!("{what}: another map or unmap, or a hardware queue, holds it; try again later"), errno))
        }
        Err(errno) => Err(Error::io(what, errno)),
    }
}

/// The kernel's answer to a question for ranges.
struct Answer {
    result: Result<(), Errno>,
    /// Ranges that there are, when it fits or when it does not (EMSGSIZE).
    count: u32,
    alignment: u64,
}

/// Asks with more room until the answer fits, within bounds, and checks it.
fn gather(mut ask: impl FnMut(&mut [abi::iommu_iova_range]) -> Answer) -> Result<Ranges> {
    let mut room = vec![abi::iommu_iova_range::default(); 16];
    for _ in 0..RANGE_ATTEMPTS {
        let answer = ask(&mut room);
        let count = answer.count as usize;
        match answer.result {
            Ok(()) if count <= room.len() => return checked(&room[..count], answer.alignment),
            Err(Errno::MSGSIZE) if count > room.len() && count <= MAX_RANGES => {
                room.resize(count, abi::iommu_iova_range::default());
            }
            Ok(()) | Err(Errno::MSGSIZE) => {
                return Err(Error::fault(format!(
                    "the kernel tells of {count} IOVA ranges, for room of {}; {MAX_RANGES} are taken at most",
                    room.len()
                )));
            }
            Err(errno) => return Err(Error::io("reading the IOVA ranges of an I/O address space", errno)),
        }
    }
    Err(Error::fault(format!("the IOVA ranges changed {RANGE_ATTEMPTS} times while they were read")))
}

fn checked(ranges: &[abi::iommu_iova_range], alignment: u64) -> Result<Ranges> {
    if !alignment.is_power_of_two() {
        return Err(Error::fault(format!("the kernel wants IOVAs aligned to {alignment:#x}, which is no power of two")));
    }
    let ranges: Vec<_> = ranges.iter().map(|range| IovaRange { start: range.start, last: range.last }).collect();
    let bad =
        ranges.iter().any(|range| range.start > range.last) || ranges.windows(2).any(|pair| pair[1].start <= pair[0].last);
    if bad {
        return Err(Error::fault(format!("the kernel's IOVA ranges overlap or are out of order: {ranges:#x?}")));
    }
    Ok(Ranges { ranges, alignment })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> abi::iommu_iova_range {
        abi::iommu_iova_range { start, last }
    }

    /// A kernel with these ranges.
    fn kernel(ranges: Vec<abi::iommu_iova_range>) -> impl FnMut(&mut [abi::iommu_iova_range]) -> Answer {
        move |room| {
            let fits = ranges.len().min(room.len());
            room[..fits].copy_from_slice(&ranges[..fits]);
            let result = if fits < ranges.len() { Err(Errno::MSGSIZE) } else { Ok(()) };
            Answer { result, count: ranges.len() as u32, alignment: 4096 }
        }
    }

    #[test]
    fn many_ranges_are_read_in_two_steps() {
        for count in [0, 1, 16, 17, MAX_RANGES] {
            let ranges: Vec<_> = (0..count as u64).map(|n| range(n << 20, (n << 20) + 0xffff)).collect();
            let got = gather(kernel(ranges)).unwrap();
            assert_eq!((got.ranges.len(), got.alignment), (count, 4096));
        }
    }

    #[test]
    fn answers_that_make_no_sense_are_refused() {
        let many = (0..=MAX_RANGES as u64).map(|n| range(2 * n, 2 * n)).collect();
        assert!(matches!(gather(kernel(many)), Err(Error::DeviceFault { .. })));
        for ranges in [vec![range(2, 1)], vec![range(5, 9), range(9, 10)], vec![range(5, 9), range(1, 2)]] {
            assert!(matches!(gather(kernel(ranges)), Err(Error::DeviceFault { .. })));
        }
        let answer = |result, count, alignment| gather(move |_| Answer { result, count, alignment });
        // More than there was room for, as a success; a size that does not grow; no alignment.
        assert!(matches!(answer(Ok(()), 17, 4096), Err(Error::DeviceFault { .. })));
        assert!(matches!(answer(Err(Errno::MSGSIZE), 16, 4096), Err(Error::DeviceFault { .. })));
        assert!(matches!(answer(Ok(()), 0, 0), Err(Error::DeviceFault { .. })));
        assert!(matches!(answer(Err(Errno::NOENT), 0, 0), Err(Error::Io { .. })));
    }

    #[test]
    fn ranges_that_grow_under_the_call_end() {
        let mut calls = 0;
        let result = gather(|room| {
            calls += 1;
            Answer { result: Err(Errno::MSGSIZE), count: room.len() as u32 + 1, alignment: 1 }
        });
        assert!(result.is_err());
        assert_eq!(calls, RANGE_ATTEMPTS);
    }

    #[test]
    fn an_unmap_counts_only_when_all_of_it_is_confirmed() {
        assert_eq!(confirmed(0x1000, 0x2000, Ok(0x2000)).unwrap(), 0x2000);
        for (result, part) in [
            (Ok(0), "confirms 0x0"),
            (Ok(0x1000), "confirms 0x1000"),
            (Err(Errno::NOENT), "cuts a mapping"),
            (Err(Errno::BUSY), "try again"),
        ] {
            let error = confirmed(0x1000, 0x2000, result).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("IOVA 0x1000"), "{error}");
        }
    }

    #[test]
    fn access_is_seen_from_the_device() {
        assert_eq!([Access::Read, Access::Write, Access::ReadWrite].map(access_flags), [4, 2, 6]);
    }
}
