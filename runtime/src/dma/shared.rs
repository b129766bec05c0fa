//! Memory that somebody else may write at any time: our own memfds that a device sees, and a peer's that we map.
//!
//! No reference to such memory is ever made: it is accessed by instructions that the compiler can't look into. A peer may also
//! truncate its file: all accesses are guarded, as [`mmio`](crate::mmio) explains.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{
        OnceLock,
        atomic::{Ordering, fence},
    },
};

use rustix::{fs, mm};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Error, Result,
    mmio::{
        Faults, GUARDED,
        access::{self, Vanished},
        guard::Guard,
    },
};

/// Page size that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// The base page size: works everywhere.
    #[default]
    No,
    /// 2 MiB pages, from the pool of `vm.nr_hugepages`.
    Size2M,
    /// 1 GiB pages.
    Size1G,
}

impl HugePages {
    /// Bytes of a page; a mapping's length is a multiple of it.
    pub fn page_size(self) -> usize {
        match self {
            Self::No => rustix::param::page_size(),
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// A shared mapping of a file descriptor.
#[derive(Debug)]
pub struct SharedMemory {
    ptr: NonNull<u8>,
    len: usize,
    writable: bool,
    // Before the mapping, so that it ends before it.
    guard: Guard,
    /// `None`: it is somebody else's.
    _mapping: Option<Unmap>,
}

/// Unmaps when dropped.
#[derive(Debug)]
struct Unmap(NonNull<u8>, usize);

// SAFETY: the mapping is plain memory of the process, reachable from every thread; no access of Rust races them.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; concurrent accesses are what this type is for.
unsafe impl Sync for SharedMemory {}

/// An access that does not lie inside of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("access of {len} bytes at {offset:#x} is outside of the memory of {size:#x} bytes, misaligned, or not permitted")]
pub struct OutOfBounds {
    /// Offset of the access.
    pub offset: u64,
    /// Bytes of the access.
    pub len: usize,
    /// Bytes of the memory.
    pub size: usize,
}

impl From<OutOfBounds> for Error {
    fn from(error: OutOfBounds) -> Self {
        Self::invalid(error.to_string())
    }
}

/// Why an access to shared memory failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// It does not lie inside.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// The memory was not there: its owner truncated the file, or there is no memory left for its pages. A part may be copied.
    #[error(
        "the shared memory at {offset:#x}+{len:#x} is gone: its owner truncated the file, or the system has no memory for it"
    )]
    Vanished {
        /// Offset of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
    },
}

impl From<AccessError> for Error {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::OutOfBounds(error) => error.into(),
            AccessError::Vanished { .. } => Self::fault(error.to_string()),
        }
    }
}

fn prot(writable: bool) -> mm::ProtFlags {
    if writable { mm::ProtFlags::READ | mm::ProtFlags::WRITE } else { mm::ProtFlags::READ }
}

#[cold]
fn vanished(offset: u64, len: usize) -> AccessError {
    AccessError::Vanished { offset, len }
}

impl SharedMemory {
    /// Maps `len` bytes at `offset` of `fd`, for reading and, where `writable`, for writing. A file that ends before that is
    /// refused.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range beyond the file or of no bytes, [`Error::Io`] when the kernel refuses. Where accesses are not
    /// guarded ([`GUARDED`]), [`Error::Unsupported`] for a file that may be truncated.
    pub fn map(fd: impl AsFd, offset: u64, len: usize, writable: bool) -> Result<Self> {
        let fd = fd.as_fd();
        let stat = fs::fstat(fd).map_err(|e| Error::io("fstat of shared memory", e))?;
        let end = offset.checked_add(len as u64).filter(|&end| len != 0 && end <= isize::MAX as u64);
        let end = end.ok_or_else(|| Error::invalid(format!("shared memory of {len} bytes at {offset:#x} is no range")))?;
        if fs::FileType::from_raw_mode(stat.st_mode) == fs::FileType::RegularFile && end > stat.st_size as u64 {
            return Err(Error::invalid(format!(
                "shared memory {offset:#x}..{end:#x} is beyond the end of its file ({:#x} bytes)",
                stat.st_size
            )));
        }
        let is_sealed = || fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(fs::SealFlags::SHRINK));
        if !GUARDED && !is_sealed() {
            let what = "sharing memory that its owner may truncate, on this architecture: seal it (F_SEAL_SHRINK)";
            return Err(Error::Unsupported { what: what.into() });
        }
        Self::map_unchecked(fd, offset, len, writable)
    }

    /// Makes a memfd of `len` bytes (a multiple of the page size), sealed against shrinking and growing, and maps it.
    ///
    /// # Errors
    /// [`Error::Io`] with a remedy when memory or hugepages are short.
    pub fn create(name: &str, len: usize, huge: HugePages) -> Result<(OwnedFd, Self)> {
        if len == 0 || !len.is_multiple_of(huge.page_size()) {
            return Err(Error::invalid(format!("{len} bytes is not a multiple of the page size {}", huge.page_size())));
        }
        let flags = fs::MemfdFlags::CLOEXEC | fs::MemfdFlags::ALLOW_SEALING;
        let flags = match huge {
            HugePages::No => flags,
            HugePages::Size2M => flags | fs::MemfdFlags::HUGETLB | fs::MemfdFlags::HUGE_2MB,
            HugePages::Size1G => flags | fs::MemfdFlags::HUGETLB | fs::MemfdFlags::HUGE_1GB,
        };
        let fd = fs::memfd_create(name, flags).map_err(|e| Error::io(format!("memfd_create of {len} bytes"), e))?;
        fs::ftruncate(&fd, len as u64).map_err(|e| Error::io(format!("sizing a memfd to {len} bytes"), e))?;
        let seals = fs::SealFlags::SHRINK | fs::SealFlags::GROW | fs::SealFlags::SEAL;
        fs::fcntl_add_seals(&fd, seals).map_err(|e| Error::io("sealing a memfd", e))?;
        let memory = Self::map_unchecked(fd.as_fd(), 0, len, true).map_err(|error| match huge {
            HugePages::No => error,
            _ => Error::Exhausted {
                what: format!("{len} bytes of hugepages: {error}; raise vm.nr_hugepages or run without hugepages"),
            },
        })?;
        Ok((fd, memory))
    }

    fn map_unchecked(fd: BorrowedFd<'_>, offset: u64, len: usize, writable: bool) -> Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let ptr = unsafe { mm::mmap(std::ptr::null_mut(), len, prot(writable), mm::MapFlags::SHARED, fd, offset) }
            .map_err(|e| Error::io(format!("mapping {len} bytes at {offset:#x}"), e))?;
        // SAFETY: the range was mapped just now. A fork must not share DMA memory with its child.
        let _ = unsafe { mm::madvise(ptr, len, mm::Advice::LinuxDontFork) };
        let ptr = NonNull::new(ptr.cast()).expect("mmap never gives null");
        let mapping = Unmap(ptr, len);
        Ok(Self { ptr, len, writable, guard: Guard::new(ptr.as_ptr() as usize, len)?, _mapping: Some(mapping) })
    }

    /// Takes the memory away from under its users: until [`SharedMemory::restore`] every access finds none, as after the file was
    /// truncated. When it returns no access to what was mapped is under way any more, and none keeps the file open: to replace a
    /// mapping, the kernel waits for the page faults in it and has all processors forget where it led.
    ///
    /// The caller has one thread at a time do this. A failure may leave it in place.
    pub(crate) fn withdraw(&self) -> Result<()> {
        static NOTHING: OnceLock<Result<OwnedFd>> = OnceLock::new();
        let nothing = NOTHING.get_or_init(|| {
            let flags = fs::MemfdFlags::CLOEXEC | fs::MemfdFlags::ALLOW_SEALING;
            let fd = fs::memfd_create("vfio-uring-withdrawn", flags).map_err(|e| Error::io("memfd_create", e))?;
            let seals = fs::SealFlags::SHRINK | fs::SealFlags::GROW | fs::SealFlags::SEAL;
            fs::fcntl_add_seals(&fd, seals).map_err(|e| Error::io("sealing a memfd", e))?;
            Ok(fd)
        });
        self.replace(nothing.as_ref().map_err(Error::clone)?.as_fd(), 0)
    }

    /// Gives back what was withdrawn: `offset` of `fd`, which is what was mapped here at first.
    pub(crate) fn restore(&self, fd: BorrowedFd<'_>, offset: u64) -> Result<()> {
        self.replace(fd, offset)
    }

    fn replace(&self, fd: BorrowedFd<'_>, offset: u64) -> Result<()> {
        let Some(Unmap(ptr, len)) = &self._mapping else {
            return Err(Error::invalid("memory of somebody else can't be withdrawn"));
        };
        let at = ptr.as_ptr().cast();
        // SAFETY: the range is a mapping of ours, whole, which lives as long as `self`; the new one may be accessed in the same ways,
        // and no reference to the memory is ever made. It is replaced in one step: there is no moment without a mapping.
        unsafe { mm::mmap(at, *len, prot(self.writable), mm::MapFlags::SHARED | mm::MapFlags::FIXED, fd, offset) }
            .map_err(|e| Error::io(format!("mapping {len:#x} bytes in place of others"), e))?;
        // SAFETY: the range was mapped just now.
        let _ = unsafe { mm::madvise(at, *len, mm::Advice::LinuxDontFork) };
        Ok(())
    }

    /// Memory of somebody else, who keeps it.
    ///
    /// # Safety
    /// The `len` bytes at `ptr` stay valid for reads and writes by any thread, for as long as the value exists; while it does, no
    /// reference to them is used.
    pub(super) unsafe fn borrowed(ptr: NonNull<u8>, len: usize) -> Result<Self> {
        Ok(Self { ptr, len, writable: true, guard: Guard::new(ptr.as_ptr() as usize, len)?, _mapping: None })
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a mapping has at least a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Start of the mapping, for the owner of a buffer in it.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    #[inline]
    fn at(&self, offset: u64, len: usize, align: usize, write: bool) -> Result<*mut u8, OutOfBounds> {
        let inside = offset <= self.len as u64 && len <= self.len - offset as usize;
        if inside && offset as usize & (align - 1) == 0 && (self.writable || !write) {
            // SAFETY: `offset` is within the mapping.
            Ok(unsafe { self.ptr.as_ptr().add(offset as usize) })
        } else {
            Err(OutOfBounds { offset, len, size: self.len })
        }
    }

    /// The accesses since this was asked last that found no memory. Also the caller was told of those, except by
    /// [`Register`](crate::mmio::Register)s.
    pub fn take_faults(&self) -> Option<Faults> {
        self.guard.take()
    }

    /// Copies `to.len()` bytes at `offset` out of the memory.
    #[inline]
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), AccessError> {
        let from = self.at(offset, to.len(), 1, false)?;
        // SAFETY: both sides are valid for the length; `to` is a slice of ours, so they don't overlap.
        unsafe { access::copy(from, to.as_mut_ptr(), to.len()) }.map_err(|Vanished| vanished(offset, to.len()))
    }

    /// Copies `from` to `offset` of the memory.
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        let to = self.at(offset, from.len(), 1, true)?;
        // SAFETY: as in `read`.
        unsafe { access::copy(from.as_ptr(), to, from.len()) }.map_err(|Vanished| vanished(offset, from.len()))
    }

    /// Fills `len` bytes at `offset` with `byte`.
    pub fn fill(&self, offset: u64, len: usize, byte: u8) -> Result<(), AccessError> {
        let to = self.at(offset, len, 1, true)?;
        // SAFETY: within the range that was checked.
        unsafe { access::fill(to, len, byte) }.map_err(|Vanished| vanished(offset, len))
    }

    /// Copies one value out of the memory: a snapshot that the peer can't change any more.
    #[inline]
    pub fn read_obj<T: FromBytes>(&self, offset: u64) -> Result<T, AccessError> {
        let from = self.at(offset, size_of::<T>(), 1, false)?;
        // SAFETY: valid for the size of `T`.
        unsafe { access::try_load_obj(from) }.map_err(|Vanished| vanished(offset, size_of::<T>()))
    }

    /// Copies one value into the memory.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable>(&self, offset: u64, value: &T) -> Result<(), AccessError> {
        let to = self.at(offset, size_of::<T>(), 1, true)?;
        // SAFETY: valid for the size of `T`.
        unsafe { access::try_store_obj(to, value) }.map_err(|Vanished| vanished(offset, size_of::<T>()))
    }

    /// Loads an aligned little-endian `u32`, with acquire order: what its writer stored before it is seen after it.
    #[inline]
    pub fn load_u32(&self, offset: u64) -> Result<u32, AccessError> {
        let at = self.at(offset, 4, 4, false)?;
        // SAFETY: inside of the mapping and aligned.
        let value = unsafe { access::try_load::<u32>(at.cast()) };
        fence(Ordering::Acquire);
        value.map_err(|Vanished| vanished(offset, 4))
    }

    /// Stores an aligned little-endian `u32`, with release order: what was stored before it is seen by who loads it.
    #[inline]
    pub fn store_u32(&self, offset: u64, value: u32) -> Result<(), AccessError> {
        let at = self.at(offset, 4, 4, true)?;
        fence(Ordering::Release);
        // SAFETY: as in `load_u32`.
        unsafe { access::try_store::<u32>(at.cast(), value) }.map_err(|Vanished| vanished(offset, 4))
    }

    /// [`SharedMemory::load_u32`] for a `u64`.
    #[inline]
    pub fn load_u64(&self, offset: u64) -> Result<u64, AccessError> {
        let at = self.at(offset, 8, 8, false)?;
        // SAFETY: as in `load_u32`.
        let value = unsafe { access::try_load::<u64>(at.cast()) };
        fence(Ordering::Acquire);
        value.map_err(|Vanished| vanished(offset, 8))
    }

    /// [`SharedMemory::store_u32`] for a `u64`.
    #[inline]
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), AccessError> {
        let at = self.at(offset, 8, 8, true)?;
        fence(Ordering::Release);
        // SAFETY: as in `load_u32`.
        unsafe { access::try_store::<u64>(at.cast(), value) }.map_err(|Vanished| vanished(offset, 8))
    }
}

impl Drop for Unmap {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody can hold a pointer into it: accesses borrow it, buffers own it.
        let _ = unsafe { mm::munmap(self.0.as_ptr().cast(), self.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_each_other() {
        let (fd, one) = SharedMemory::create("test", 8192, HugePages::No).unwrap();
        let two = SharedMemory::map(&fd, 4096, 4096, true).unwrap();
        one.write(4096 + 100, b"hello").unwrap();
        let mut got = [0; 5];
        two.read(100, &mut got).unwrap();
        assert_eq!(&got, b"hello");
        two.store_u32(8, 0x1234_5678).unwrap();
        assert_eq!(one.load_u32(4096 + 8), Ok(0x1234_5678));
        assert_eq!(one.read_obj::<[u8; 4]>(4096 + 8), Ok([0x78, 0x56, 0x34, 0x12]));
    }

    #[test]
    fn values_of_any_size_and_place() {
        fn check<const N: usize>(memory: &SharedMemory) {
            let value: [u8; N] = std::array::from_fn(|i| i as u8 + 1);
            for offset in [0, 1, 8, 63, 4096 - N as u64] {
                memory.fill(0, 4096, 0xee).unwrap();
                memory.write_obj(offset, &value).unwrap();
                assert_eq!(memory.read_obj(offset), Ok(value));
                let mut all = [0; 4096];
                memory.read(0, &mut all).unwrap();
                assert_eq!(all.iter().filter(|&&byte| byte == 0xee).count(), 4096 - N);
            }
            assert!(memory.write_obj(4097 - N as u64, &value).is_err());
            assert!(memory.read_obj::<[u8; N]>(4097 - N as u64).is_err());
        }
        let (_fd, memory) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
        check::<1>(&memory);
        check::<4>(&memory);
        check::<12>(&memory);
        check::<16>(&memory);
        check::<64>(&memory);
        check::<128>(&memory);
        check::<192>(&memory);
        memory.write_obj(16, &[1u64, 2]).unwrap();
        assert_eq!(memory.read_obj::<[u64; 2]>(16), Ok([1, 2]));
    }

    #[test]
    fn what_is_withdrawn_comes_back_in_place() {
        if !GUARDED {
            return;
        }
        let (fd, one) = SharedMemory::create("test", 8192, HugePages::No).unwrap();
        let two = SharedMemory::map(&fd, 4096, 4096, true).unwrap();
        one.store_u32(4096, 7).unwrap();
        for _ in 0..3 {
            two.withdraw().unwrap();
            assert_eq!(two.load_u32(0), Err(vanished(0, 4)));
            assert_eq!(two.write(8, &[1; 16]), Err(vanished(8, 16)));
            assert_eq!(one.load_u32(4096), Ok(7));
            two.restore(fd.as_fd(), 4096).unwrap();
            assert_eq!(two.load_u32(0), Ok(7));
        }
        assert!(two.take_faults().is_some());
        two.withdraw().unwrap();
        two.withdraw().unwrap();
    }

    #[test]
    fn what_is_outside_is_refused() {
        let (fd, memory) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
        assert!(memory.read(4095, &mut [0; 2]).is_err());
        assert!(memory.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(memory.load_u32(2).is_err() && memory.load_u32(4096).is_err());
        assert!(SharedMemory::map(&fd, 0, 4097, true).is_err());
        assert!(SharedMemory::map(&fd, u64::MAX, 4096, true).is_err());
        let read_only = SharedMemory::map(&fd, 0, 4096, false).unwrap();
        assert!(read_only.write(0, &[1]).is_err());
    }
}
