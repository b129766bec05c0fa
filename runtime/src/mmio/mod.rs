//! Registers in mapped device memory.
//!
//! An access is one load or store of the register's width, little-endian, never split, merged or repeated, as a volatile one is. The
//! accesses of one thread stay in order among themselves; their order against DMA memory is explicit:
//! [`Register::write_after_dma`] and [`Register::read_before_dma`].
//!
//! # Memory that vanishes
//!
//! Device memory answers with SIGBUS while the device's memory decoding is off or the device sleeps, and so does a file's memory
//! after somebody has truncated the file. An access of this crate survives that: a load gives all ones, a store is skipped, and
//! the mapping counts it ([`Faults`]). The next access may succeed: the mapping heals by itself.
//!
//! While this process resets a device or changes its power, the same is so by intent: the memory of its mappings is taken away first,
//! since an access would sleep in the kernel for as long as that takes, and given back in the same place afterwards.
//! [`Device::state`](crate::device::Device::state) says what goes on.
//!
//! - [`Register::read`] and [`Register::write`] cost what a volatile access costs, and say nothing.
//! - [`Register::try_read`] costs a compare and a branch more and gives [`MmioUnavailable`]. [`Register::try_write`] is for places
//!   that are not hot.
//! - [`Register::take_faults`] tells of skipped stores later, when there is time.
//!
//! For this the first mapping installs a process-wide handler of SIGBUS. Faults that are not of this crate's accesses go to the
//! handler that was there before, or end the process as they would without it. A handler that is installed later has to pass on
//! what is not its own. A thread that blocks SIGBUS is not helped: the kernel ends the process then.
//!
//! This is so on x86-64. On other architectures ([`GUARDED`]) device memory is not mapped: registers are accessed by system calls
//! or messages.

use std::{fmt, ptr::NonNull, sync::Arc};

use crate::{Error, Result, dma::SharedMemory};

#[cfg_attr(not(target_arch = "x86_64"), path = "unguarded.rs")]
pub(crate) mod access;
#[cfg(target_arch = "x86_64")]
mod fixup;
pub(crate) mod guard;
#[cfg(target_arch = "x86_64")]
mod signal;

pub use guard::Faults;

/// Whether accesses survive memory that vanishes, on this architecture. Where they don't, device memory is not mapped, and shared
/// memory has to be sealed against shrinking.
pub const GUARDED: bool = access::GUARDED;

/// The memory of a register was not there when it was accessed; the next access may succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the register at {offset:#x} of its mapping does not answer: the device's memory is switched off, it sleeps, or it is reset; try again later"
)]
pub struct MmioUnavailable {
    /// Offset of the register in its mapping.
    pub offset: u64,
}

mod sealed {
    pub trait Sealed {}
}

/// An unsigned integer of a register's width.
pub trait Value: sealed::Sealed + Copy + Send + Sync + fmt::Debug + fmt::LowerHex + PartialEq + Into<u64> + 'static {
    /// Bytes.
    const SIZE: usize;
    /// The value as the device's little-endian bytes are in a register of this machine, and back.
    #[doc(hidden)]
    fn swap_le(self) -> Self;
    /// The low bits of `value`.
    #[doc(hidden)]
    fn truncate(value: u64) -> Self;
}

macro_rules! value {
    ($($ty:ty)*) => {$(
        impl sealed::Sealed for $ty {}
        impl Value for $ty {
            const SIZE: usize = size_of::<$ty>();
            #[inline]
            fn swap_le(self) -> Self {
                self.to_le()
            }
            #[inline]
            fn truncate(value: u64) -> Self {
                value as $ty
            }
        }
    )*};
}

value!(u8 u16 u32 u64);

/// Makes all stores to DMA memory visible to the device before any later store to a register.
#[inline(always)]
fn dma_write_barrier() {
    // The outer-shareable domain has the devices in it; x86 keeps stores in order, so that the compiler is all to hold back.
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier.
    unsafe {
        std::arch::asm!("dmb oshst", options(nostack, preserves_flags))
    };
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Keeps loads of DMA memory after the register load before it.
#[inline(always)]
fn dma_read_barrier() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier.
    unsafe {
        std::arch::asm!("dmb oshld", options(nostack, preserves_flags))
    };
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// A register of a mapped BAR. It keeps the mapping alive, not the device. While the device is reset, and after it is
/// [gone](crate::device::State::Gone), the mapping has no memory: writes go nowhere, and reads give all ones.
pub struct Register<T> {
    at: NonNull<T>,
    memory: Arc<SharedMemory>,
}

// SAFETY: the pointer is into `memory`, which may be used from every thread; all accesses are single instructions.
unsafe impl<T: Value> Send for Register<T> {}
// SAFETY: as above.
unsafe impl<T: Value> Sync for Register<T> {}

impl<T> Clone for Register<T> {
    fn clone(&self) -> Self {
        Self { at: self.at, memory: self.memory.clone() }
    }
}

impl<T> fmt::Debug for Register<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Register").field(&self.at).finish()
    }
}

impl<T> Register<T> {
    /// Where it is in its mapping, in bytes.
    pub fn offset(&self) -> u64 {
        (self.at.as_ptr() as usize - self.memory.as_ptr().as_ptr() as usize) as u64
    }

    /// The faults of the whole mapping since they were taken last, by whomever.
    pub fn take_faults(&self) -> Option<Faults> {
        self.memory.take_faults()
    }
}

impl<T: Value> Register<T> {
    /// The register at `offset` of mapped memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not aligned to its size, or not inside of the writable mapping.
    pub fn new(memory: &Arc<SharedMemory>, offset: u64) -> Result<Self> {
        let inside = offset.checked_add(T::SIZE as u64).is_some_and(|end| end <= memory.len() as u64);
        if !inside || !offset.is_multiple_of(T::SIZE as u64) || !memory.is_writable() {
            return Err(Error::invalid(format!(
                "a register of {} bytes at {offset:#x} is misaligned or outside of the writable mapping of {:#x} bytes",
                T::SIZE,
                memory.len()
            )));
        }
        // SAFETY: inside of the mapping, as was just checked.
        let at = unsafe { memory.as_ptr().add(offset as usize) }.cast();
        Ok(Self { at, memory: memory.clone() })
    }

    /// Loads the register; all ones when its memory is not there, which is counted.
    #[inline]
    pub fn read(&self) -> T {
        // SAFETY: `new` checked place and alignment (a mapping starts at a page), and the mapping lives as long as `memory`.
        unsafe { access::load(self.at.as_ptr()) }
    }

    /// Loads the register.
    ///
    /// # Errors
    /// [`MmioUnavailable`] when its memory is not there.
    #[inline]
    pub fn try_read(&self) -> Result<T, MmioUnavailable> {
        // SAFETY: as in `read`.
        unsafe { access::try_load(self.at.as_ptr()) }.map_err(|_| self.unavailable())
    }

    /// Stores to the register; skipped and counted when its memory is not there.
    #[inline]
    pub fn write(&self, value: T) {
        // SAFETY: as in `read`, and `new` checked that the mapping is writable.
        unsafe { access::store(self.at.as_ptr(), value) }
    }

    /// Stores to the register after all that this thread stored to DMA memory before.
    ///
    /// # Errors
    /// [`MmioUnavailable`] when its memory is not there. That a store did not fault does not mean that the device took it.
    #[inline]
    pub fn try_write(&self, value: T) -> Result<(), MmioUnavailable> {
        dma_write_barrier();
        // SAFETY: as in `write`.
        unsafe { access::try_store(self.at.as_ptr(), value) }.map_err(|_| self.unavailable())
    }

    #[cold]
    fn unavailable(&self) -> MmioUnavailable {
        MmioUnavailable { offset: self.offset() }
    }

    /// Stores to the register after all that this thread stored to DMA memory before: a doorbell.
    #[inline]
    pub fn write_after_dma(&self, value: T) {
        dma_write_barrier();
        self.write(value);
    }

    /// Loads the register before all that this thread loads from DMA memory after.
    #[inline]
    pub fn read_before_dma(&self) -> T {
        let value = self.read();
        dma_read_barrier();
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::HugePages;

    #[test]
    fn registers_of_every_width() {
        let (fd, memory) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
        let memory = Arc::new(memory);
        Register::<u64>::new(&memory, 8).unwrap().write(0x1122_3344_5566_7788);
        assert_eq!(Register::<u32>::new(&memory, 12).unwrap().read(), 0x1122_3344);
        assert_eq!(Register::<u16>::new(&memory, 8).unwrap().read_before_dma(), 0x7788);
        Register::<u8>::new(&memory, 15).unwrap().write_after_dma(0xff);
        assert_eq!(Register::<u64>::new(&memory, 8).unwrap().read(), 0xff22_3344_5566_7788);
        let last = Register::<u32>::new(&memory, 4092).unwrap();
        drop(memory);
        last.write(7);
        assert_eq!(last.read(), 7);
        let read_only = Arc::new(SharedMemory::map(&fd, 0, 4096, false).unwrap());
        assert!(Register::<u32>::new(&read_only, 0).is_err());
    }

    #[test]
    fn misplaced_registers_are_refused() {
        let memory = Arc::new(SharedMemory::create("test", 4096, HugePages::No).unwrap().1);
        for offset in [2, 4094, 4096, u64::MAX, u64::MAX - 3] {
            assert!(Register::<u32>::new(&memory, offset).is_err(), "{offset:#x}");
        }
    }
}
