//! The fixup table: an entry for each instruction that may access memory which can vanish.
//!
//! Entries are in a section of the program of their own, between symbols that the linker defines, so that an access costs nothing
//! for being listed. The section belongs to a program or shared library: code of this crate that a `dylib` crate holds is listed
//! there, and an access that was inlined into another object is not found from there. Link it statically.

use std::arch::asm;

/// What to do when an instruction faults. Written by [`guarded`].
#[repr(C)]
pub(super) struct Entry {
    /// The instruction, from this field.
    at: i32,
    /// Where it goes on, from this field.
    next: i32,
    /// Index in `gregs` of the register that becomes all ones, or 255.
    pub ones: u8,
    /// Index in `gregs` of the register that becomes 1, or 255.
    pub mark: u8,
    reserved: u16,
}

const _: () = assert!(size_of::<Entry>() == 12);

impl Entry {
    pub fn at(&self) -> usize {
        (&raw const self.at as usize).wrapping_add_signed(self.at as isize)
    }

    pub fn next(&self) -> usize {
        (&raw const self.next as usize).wrapping_add_signed(self.next as isize)
    }
}

/// An instruction with its entry: `guarded!(instruction, ones, mark)`, where the last two are `_` or `.Lguard_{register}`. The symbols
/// give a register's index in `gregs` of the machine context.
macro_rules! guarded {
    ($instruction:literal, _, _) => {
        $crate::mmio::fixup::guarded!($instruction, ".Lguard_none", ".Lguard_none")
    };
    ($instruction:literal, $ones:literal, _) => {
        $crate::mmio::fixup::guarded!($instruction, $ones, ".Lguard_none")
    };
    ($instruction:literal, _, $mark:literal) => {
        $crate::mmio::fixup::guarded!($instruction, ".Lguard_none", $mark)
    };
    ($instruction:literal, $ones:literal, $mark:literal) => {
        concat!(
            "2: ",
            $instruction,
            "\n3:\n",
            ".set .Lguard_r8, 0\n.set .Lguard_r9, 1\n.set .Lguard_r10, 2\n.set .Lguard_r11, 3\n",
            ".set .Lguard_r12, 4\n.set .Lguard_r13, 5\n.set .Lguard_r14, 6\n.set .Lguard_r15, 7\n",
            ".set .Lguard_rdi, 8\n.set .Lguard_rsi, 9\n.set .Lguard_rbp, 10\n.set .Lguard_rbx, 11\n",
            ".set .Lguard_rdx, 12\n.set .Lguard_rax, 13\n.set .Lguard_rcx, 14\n.set .Lguard_none, 255\n",
            ".pushsection vfio_uring_fixups, \"aR?\", @progbits\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - .\n",
            ".byte ",
            $ones,
            "\n",
            ".byte ",
            $mark,
            "\n",
            ".short 0\n",
            ".popsection"
        )
    };
}
pub(super) use guarded;

const _: () = {
    use libc::*;
    let of_symbols = [
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RDI, REG_RSI, REG_RBP, REG_RBX, REG_RDX,
        REG_RAX, REG_RCX,
    ];
    let mut i = 0;
    while i < of_symbols.len() {
        assert!(of_symbols[i] == i as i32);
        i += 1;
    }
};

/// All entries of this program or shared library.
fn table() -> &'static [Entry] {
    let (start, end): (*const Entry, *const Entry);
    // SAFETY: it takes two addresses. The entry of the instruction itself makes sure that there is a table.
    unsafe {
        asm!(
            ".hidden __start_vfio_uring_fixups",
            ".hidden __stop_vfio_uring_fixups",
            guarded!("lea {start}, [rip + __start_vfio_uring_fixups]", _, _),
            "lea {end}, [rip + __stop_vfio_uring_fixups]",
            start = out(reg) start,
            end = out(reg) end,
            options(nomem, nostack, preserves_flags),
        );
    }
    // SAFETY: the section holds nothing but entries, is read-only, and stays as long as this code.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The entry of the instruction at `pc`. For a signal handler.
pub(super) fn find(pc: usize) -> Option<&'static Entry> {
    table().iter().find(|entry| entry.at() == pc)
}
