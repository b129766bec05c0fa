//! Accesses to memory that can vanish: device memory whose decoding is switched off, a file that its owner truncates.
//!
//! Each is one instruction with an entry in the fixup table. When it faults, [`signal`](super::signal) counts that for the mapping
//! and goes on after it: a load gives all ones, a store is skipped. In assembly, so that no Rust access races the other side's.

use std::{arch::asm, mem::MaybeUninit};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Value, fixup::guarded};

pub(super) const GUARDED: bool = true;

/// Memory was not there; what was loaded is all ones, what was to be stored is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vanished;

/// What the handler makes of a register that an entry names as its mark. It is never the address of a value.
const MARK: u64 = 1;

/// Loads a value; all ones when it is not there.
///
/// # Safety
/// `at` is aligned and inside of a mapping that is guarded.
#[inline(always)]
pub(crate) unsafe fn load<T: Value>(at: *const T) -> T {
    // SAFETY: the caller's promise.
    unsafe { load_at::<T, 0>(at) }
}

/// Loads the `INDEX`th value from `at` on, in one instruction.
///
/// # Safety
/// As of [`load`], for the value.
#[inline(always)]
unsafe fn load_at<T: Value, const INDEX: usize>(at: *const T) -> T {
    let value: u64;
    macro_rules! load {
        ($instruction:literal) => {
            asm!(
                guarded!($instruction, ".Lguard_{value}", _),
                value = lateout(reg) value,
                at = in(reg) at,
                offset = const INDEX * size_of::<T>(),
                options(nostack, preserves_flags, readonly)
            )
        };
    }
    // SAFETY: the caller's promise. The device may do anything on a load, but not to memory that Rust knows.
    unsafe {
        match T::SIZE {
            1 => load!("movzx {value:e}, byte ptr [{at} + {offset}]"),
            2 => load!("movzx {value:e}, word ptr [{at} + {offset}]"),
            4 => load!("mov {value:e}, dword ptr [{at} + {offset}]"),
            _ => load!("mov {value}, qword ptr [{at} + {offset}]"),
        }
    }
    T::truncate(value).swap_le()
}

/// Loads a value, or says that it is not there. One compare and branch more than [`load`].
///
/// # Safety
/// As of [`load`].
#[inline(always)]
pub(crate) unsafe fn try_load<T: Value>(at: *const T) -> Result<T, Vanished> {
    let value: u64;
    let after: u64;
    macro_rules! load {
        ($instruction:literal) => {
            asm!(
                guarded!($instruction, ".Lguard_{value}", ".Lguard_{at}"),
                value = out(reg) value,
                at = inout(reg) at => after,
                options(nostack, preserves_flags, readonly)
            )
        };
    }
    // SAFETY: as in `load`.
    unsafe {
        match T::SIZE {
            1 => load!("movzx {value:e}, byte ptr [{at}]"),
            2 => load!("movzx {value:e}, word ptr [{at}]"),
            4 => load!("mov {value:e}, dword ptr [{at}]"),
            _ => load!("mov {value}, qword ptr [{at}]"),
        }
    }
    // All 64 bits are ones only after a fault, or for a `u64` that is so.
    if value == u64::MAX && is_mark(after) { Err(Vanished) } else { Ok(T::truncate(value).swap_le()) }
}

#[cold]
fn is_mark(register: u64) -> bool {
    register == MARK
}

/// Stores a value; it is lost when the memory is not there.
///
/// # Safety
/// As of [`load`], and the mapping is writable.
#[inline(always)]
pub(crate) unsafe fn store<T: Value>(at: *mut T, value: T) {
    let value: u64 = value.swap_le().into();
    // With the width of the value, so that no register has to be extended.
    macro_rules! store {
        ($instruction:literal, $class:ident, $ty:ty) => {
            asm!(guarded!($instruction, _, _), value = in($class) value as $ty, at = in(reg) at, options(nostack, preserves_flags))
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match T::SIZE {
            1 => store!("mov byte ptr [{at}], {value}", reg_byte, u8),
            2 => store!("mov word ptr [{at}], {value:x}", reg, u16),
            4 => store!("mov dword ptr [{at}], {value:e}", reg, u32),
            _ => store!("mov qword ptr [{at}], {value}", reg, u64),
        }
    }
}

/// Stores a value, or says that it is lost.
///
/// # Safety
/// As of [`store`].
#[inline(always)]
pub(crate) unsafe fn try_store<T: Value>(at: *mut T, value: T) -> Result<(), Vanished> {
    let value: u64 = value.swap_le().into();
    let after: u64;
    macro_rules! store {
        ($instruction:literal, $class:ident, $ty:ty) => {
            asm!(
                guarded!($instruction, _, ".Lguard_{at}"),
                value = in($class) value as $ty,
                at = inout(reg) at => after,
                options(nostack, preserves_flags)
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match T::SIZE {
            1 => store!("mov byte ptr [{at}], {value}", reg_byte, u8),
            2 => store!("mov word ptr [{at}], {value:x}", reg, u16),
            4 => store!("mov dword ptr [{at}], {value:e}", reg, u32),
            _ => store!("mov qword ptr [{at}], {value}", reg, u64),
        }
    }
    if after == MARK { Err(Vanished) } else { Ok(()) }
}

/// Loads the `INDEX`th `u64` from `at` on; `fault` becomes 1 when it is not there, if `CHECKED`.
///
/// # Safety
/// As of [`load`], for the word.
#[inline(always)]
unsafe fn load_word<const CHECKED: bool, const INDEX: usize>(at: *const u64, fault: &mut u64) -> u64 {
    let word: u64;
    if CHECKED {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                guarded!("mov {word}, qword ptr [{at} + {offset}]", ".Lguard_{word}", ".Lguard_{fault}"),
                word = lateout(reg) word,
                at = in(reg) at,
                offset = const INDEX * 8,
                fault = inout(reg) *fault,
                options(nostack, preserves_flags, readonly)
            );
        }
    } else {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                guarded!("mov {word}, qword ptr [{at} + {offset}]", ".Lguard_{word}", _),
                word = lateout(reg) word,
                at = in(reg) at,
                offset = const INDEX * 8,
                options(nostack, preserves_flags, readonly)
            );
        }
    }
    word
}

/// Stores the `INDEX`th `u64` from `at` on; `fault` becomes 1 when it is lost, if `CHECKED`.
///
/// # Safety
/// As of [`store`], for the word.
#[inline(always)]
unsafe fn store_word<const CHECKED: bool, const INDEX: usize>(at: *mut u64, word: u64, fault: &mut u64) {
    if CHECKED {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                guarded!("mov qword ptr [{at} + {offset}], {word}", _, ".Lguard_{fault}"),
                word = in(reg) word,
                at = in(reg) at,
                offset = const INDEX * 8,
                fault = inout(reg) *fault,
                options(nostack, preserves_flags)
            );
        }
    } else {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                guarded!("mov qword ptr [{at} + {offset}], {word}", _, _),
                word = in(reg) word,
                at = in(reg) at,
                offset = const INDEX * 8,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Does something for each number below 16, as a constant.
macro_rules! each {
    ($index:ident => $body:expr) => {
        each!(@ $index => $body; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $index:ident => $body:expr; $($number:literal)*) => {
        $({
            const $index: usize = $number;
            $body
        })*
    };
}

/// Bytes that are accessed as `u64`s at most.
const IN_WORDS: usize = 16 * 8;

/// Whether a `T` at `at` is accessed as `u64`s: `rep movsb` costs more than a few of them to start.
#[inline(always)]
fn in_words<T>(at: *const u8) -> bool {
    size_of::<T>().is_multiple_of(8) && size_of::<T>() <= IN_WORDS && at as usize & 7 == 0
}

/// Loads a value that may change under the load, and whether all of it was there, if `CHECKED`. What is torn is the value, not the
/// program.
///
/// # Safety
/// `from` is inside of a mapping that is guarded, with all of `T`.
#[inline(always)]
unsafe fn load_value<const CHECKED: bool, T: FromBytes>(from: *const u8) -> (T, bool) {
    let mut value = MaybeUninit::<T>::uninit();
    let to = value.as_mut_ptr().cast::<u8>();
    let whole = if in_words::<T>(from) {
        let mut fault = 0;
        each!(I => if I < size_of::<T>() / 8 {
            // SAFETY: within `T` on both sides; `from` is aligned, the value may not be.
            unsafe { to.cast::<u64>().add(I).write_unaligned(load_word::<CHECKED, I>(from.cast(), &mut fault)) };
        });
        fault == 0
    } else {
        // SAFETY: both sides are valid for the size of `T`, and a local overlaps nothing.
        match unsafe { copy(from, to, size_of::<T>()) } {
            Ok(()) => true,
            Err(Vanished) => {
                // SAFETY: `to` is valid for the size of `T`.
                unsafe { to.write_bytes(0xff, size_of::<T>()) };
                false
            }
        }
    };
    // SAFETY: all of its bytes are written, and any bytes are a `T` by `FromBytes`.
    (unsafe { value.assume_init() }, whole)
}

/// Loads a value; what is not there is all ones.
///
/// # Safety
/// `from` is inside of a mapping that is guarded, with all of `T`.
#[inline(always)]
pub(crate) unsafe fn load_obj<T: FromBytes>(from: *const u8) -> T {
    // SAFETY: the caller's promise.
    unsafe { load_value::<false, T>(from) }.0
}

/// Loads a value, or says that some of it is not there.
///
/// # Safety
/// As of [`load_obj`].
#[inline(always)]
pub(crate) unsafe fn try_load_obj<T: FromBytes>(from: *const u8) -> Result<T, Vanished> {
    // SAFETY: the caller's promise.
    let (value, whole) = unsafe { load_value::<true, T>(from) };
    if whole { Ok(value) } else { Err(Vanished) }
}

/// Stores a value where somebody else may look at any time, and whether all of it was stored, if `CHECKED`.
///
/// # Safety
/// As of [`store_obj`].
#[inline(always)]
unsafe fn store_value<const CHECKED: bool, T: IntoBytes + Immutable>(to: *mut u8, value: &T) -> bool {
    let from = value.as_bytes().as_ptr();
    if in_words::<T>(to) {
        let mut fault = 0;
        each!(I => if I < size_of::<T>() / 8 {
            // SAFETY: within `T` on both sides; `to` is aligned, the value may not be. A `T` has no padding by `IntoBytes`.
            unsafe { store_word::<CHECKED, I>(to.cast(), from.cast::<u64>().add(I).read_unaligned(), &mut fault) };
        });
        fault == 0
    } else {
        // SAFETY: both sides are valid for the size of `T`; a value of ours overlaps no such memory.
        unsafe { copy(from, to, size_of::<T>()) }.is_ok()
    }
}

/// Stores a value; what is not there is lost.
///
/// # Safety
/// `to` is inside of a writable mapping that is guarded, with all of `T`.
#[inline(always)]
pub(crate) unsafe fn store_obj<T: IntoBytes + Immutable>(to: *mut u8, value: &T) {
    // SAFETY: the caller's promise.
    unsafe { store_value::<false, T>(to, value) };
}

/// Stores a value, or says that some of it is lost.
///
/// # Safety
/// As of [`store_obj`].
#[inline(always)]
pub(crate) unsafe fn try_store_obj<T: IntoBytes + Immutable>(to: *mut u8, value: &T) -> Result<(), Vanished> {
    // SAFETY: the caller's promise.
    if unsafe { store_value::<true, T>(to, value) } { Ok(()) } else { Err(Vanished) }
}

/// Loads the `number`th value from `at` on. Where the compiler knows the number, it is one instruction.
///
/// # Safety
/// As of [`load`], for the value.
#[inline(always)]
pub(crate) unsafe fn load_nth<T: Value>(at: *const T, number: usize) -> T {
    each!(I => if number == I {
        // SAFETY: the caller's promise.
        return unsafe { load_at::<T, I>(at) };
    });
    // SAFETY: the caller's promise.
    unsafe { load(at.add(number)) }
}

/// Stores the `number`th `u64` from `at` on. Where the compiler knows the number, it is one instruction.
///
/// # Safety
/// As of [`store`], for the word.
#[inline(always)]
pub(crate) unsafe fn store_nth(at: *mut u64, number: usize, word: u64) {
    each!(I => if number == I {
        // SAFETY: the caller's promise.
        return unsafe { store_word::<false, I>(at, word, &mut 0) };
    });
    // SAFETY: the caller's promise.
    unsafe { store(at.add(number), word) }
}

/// Copies `len` bytes of which one side may change under the copy, or vanish. Then a part is copied.
///
/// # Safety
/// Both pointers are valid for `len` bytes, or inside of a mapping that is guarded, and the ranges don't overlap.
#[inline]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), Vanished> {
    let rest: usize;
    // SAFETY: the caller's promise; it touches just these bytes, and the direction flag is clear by the ABI.
    unsafe {
        asm!(
            guarded!("rep movsb", _, _),
            inout("rcx") len => rest,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    if rest == 0 { Ok(()) } else { Err(Vanished) }
}

/// Sets `len` bytes to `byte`; a part, when memory is not there.
///
/// # Safety
/// As of [`copy`].
#[inline]
pub(crate) unsafe fn fill(to: *mut u8, len: usize, byte: u8) -> Result<(), Vanished> {
    let rest: usize;
    // SAFETY: as in `copy`.
    unsafe {
        asm!(
            guarded!("rep stosb", _, _),
            inout("rcx") len => rest,
            inout("rdi") to => _,
            in("al") byte,
            options(nostack, preserves_flags)
        );
    }
    if rest == 0 { Ok(()) } else { Err(Vanished) }
}
