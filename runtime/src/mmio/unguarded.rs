//! The accesses of [`mmio`](super) on architectures without a guard: plain volatile ones. Memory that can vanish is not mapped
//! there, so that none of them fails.

use std::mem::MaybeUninit;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Value;

pub(super) const GUARDED: bool = false;

/// Memory was not there. Does not happen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vanished;

/// Loads a value.
///
/// # Safety
/// `at` is aligned and inside of a mapping.
#[inline(always)]
pub(crate) unsafe fn load<T: Value>(at: *const T) -> T {
    // SAFETY: the caller's promise.
    unsafe { at.read_volatile() }.swap_le()
}

/// As [`load`].
///
/// # Safety
/// As of [`load`].
#[inline(always)]
pub(crate) unsafe fn try_load<T: Value>(at: *const T) -> Result<T, Vanished> {
    // SAFETY: the caller's promise.
    Ok(unsafe { load(at) })
}

/// Stores a value.
///
/// # Safety
/// As of [`load`], and the mapping is writable.
#[inline(always)]
pub(crate) unsafe fn store<T: Value>(at: *mut T, value: T) {
    // SAFETY: the caller's promise.
    unsafe { at.write_volatile(value.swap_le()) }
}

/// As [`store`].
///
/// # Safety
/// As of [`store`].
#[inline(always)]
pub(crate) unsafe fn try_store<T: Value>(at: *mut T, value: T) -> Result<(), Vanished> {
    // SAFETY: the caller's promise.
    unsafe { store(at, value) };
    Ok(())
}

/// Whether all of a `T` at `at` is aligned `u64`s, each to be accessed untorn.
#[inline(always)]
fn in_words<T>(at: *const u8) -> bool {
    size_of::<T>().is_multiple_of(8) && at as usize & 7 == 0
}

/// Loads a value that may change under the load: what is torn is the value, not the program.
///
/// # Safety
/// `from` is inside of a mapping, with all of `T`.
#[inline(always)]
pub(crate) unsafe fn load_obj<T: FromBytes>(from: *const u8) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    let to = value.as_mut_ptr().cast::<u8>();
    if in_words::<T>(from) {
        for i in 0..size_of::<T>() / 8 {
            // SAFETY: within `T` on both sides; `from` is aligned, the value may not be.
            unsafe { to.cast::<u64>().add(i).write_unaligned(from.cast::<u64>().add(i).read_volatile()) };
        }
    } else {
        // SAFETY: both sides are valid for the size of `T`, and a local overlaps nothing.
        let _ = unsafe { copy(from, to, size_of::<T>()) };
    }
    // SAFETY: all of its bytes are written, and any bytes are a `T` by `FromBytes`.
    unsafe { value.assume_init() }
}

/// As [`load_obj`].
///
/// # Safety
/// As of [`load_obj`].
#[inline(always)]
pub(crate) unsafe fn try_load_obj<T: FromBytes>(from: *const u8) -> Result<T, Vanished> {
    // SAFETY: the caller's promise.
    Ok(unsafe { load_obj(from) })
}

/// Stores a value where somebody else may look at any time.
///
/// # Safety
/// `to` is inside of a writable mapping, with all of `T`.
#[inline(always)]
pub(crate) unsafe fn store_obj<T: IntoBytes + Immutable>(to: *mut u8, value: &T) {
    let from = value.as_bytes().as_ptr();
    if in_words::<T>(to) {
        for i in 0..size_of::<T>() / 8 {
            // SAFETY: as in `load_obj`, the other way round; a `T` has no padding by `IntoBytes`.
            unsafe { to.cast::<u64>().add(i).write_volatile(from.cast::<u64>().add(i).read_unaligned()) };
        }
    } else {
        // SAFETY: as in `load_obj`.
        let _ = unsafe { copy(from, to, size_of::<T>()) };
    }
}

/// As [`store_obj`].
///
/// # Safety
/// As of [`store_obj`].
#[inline(always)]
pub(crate) unsafe fn try_store_obj<T: IntoBytes + Immutable>(to: *mut u8, value: &T) -> Result<(), Vanished> {
    // SAFETY: the caller's promise.
    unsafe { store_obj(to, value) };
    Ok(())
}

/// Loads the `number`th value from `at` on.
///
/// # Safety
/// As of [`load`], for the value.
#[inline(always)]
pub(crate) unsafe fn load_nth<T: Value>(at: *const T, number: usize) -> T {
    // SAFETY: the caller's promise.
    unsafe { load(at.add(number)) }
}

/// Stores the `number`th `u64` from `at` on.
///
/// # Safety
/// As of [`store`], for the word.
#[inline(always)]
pub(crate) unsafe fn store_nth(at: *mut u64, number: usize, word: u64) {
    // SAFETY: the caller's promise.
    unsafe { store(at.add(number), word) }
}

/// Copies `len` bytes of which one side may change under the copy.
///
/// # Safety
/// Both pointers are valid for `len` bytes and the ranges don't overlap.
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), Vanished> {
    let words = if (from as usize | to as usize).is_multiple_of(8) { len / 8 } else { 0 };
    for i in 0..words {
        // SAFETY: aligned, and within the caller's ranges.
        unsafe { to.cast::<u64>().add(i).write_volatile(from.cast::<u64>().add(i).read_volatile()) };
    }
    for i in words * 8..len {
        // SAFETY: within the caller's ranges.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
    Ok(())
}

/// Sets `len` bytes to `byte`.
///
/// # Safety
/// As of [`copy`].
pub(crate) unsafe fn fill(to: *mut u8, len: usize, byte: u8) -> Result<(), Vanished> {
    for i in 0..len {
        // SAFETY: within the caller's range.
        unsafe { to.add(i).write_volatile(byte) };
    }
    Ok(())
}
