//! The structures and numbers of the NVMe base specification 1.4 that the driver uses.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Offsets of the controller registers in BAR0 (section 3.1).
pub mod register {
    /// Controller capabilities, 64 bits.
    pub const CAP: u64 = 0x00;
    /// Version, 32 bits.
    pub const VS: u64 = 0x08;
    /// Controller configuration, 32 bits.
    pub const CC: u64 = 0x14;
    /// Controller status, 32 bits.
    pub const CSTS: u64 = 0x1c;
    /// Admin queue attributes, 32 bits.
    pub const AQA: u64 = 0x24;
    /// Admin submission queue base address, 64 bits.
    pub const ASQ: u64 = 0x28;
    /// Admin completion queue base address, 64 bits.
    pub const ACQ: u64 = 0x30;
    /// The first doorbell.
    pub const DOORBELLS: u64 = 0x1000;
}

/// CAP, taken apart (section 3.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cap(pub u64);

impl Cap {
    /// Entries that a queue can have, 2 to 65536.
    pub fn max_queue_entries(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }

    /// Milliseconds that a change of CSTS.RDY may take; at least 500.
    pub fn timeout_ms(self) -> u64 {
        ((self.0 >> 24) & 0xff).max(1) * 500
    }

    /// Bytes between doorbells.
    pub fn doorbell_stride(self) -> u64 {
        4 << ((self.0 >> 32) & 0xf)
    }

    /// Whether the NVM command set is there.
    pub fn has_nvm(self) -> bool {
        self.0 >> 37 & 1 != 0
    }

    /// The smallest memory page, as a power of two (12 = 4 KiB).
    pub fn min_page_shift(self) -> u32 {
        12 + ((self.0 >> 48) & 0xf) as u32
    }
}

/// Bits of CC (section 3.1.5).
pub mod cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// Shutdown notification, both bits.
    pub const SHN_MASK: u32 = 3 << 14;
    /// Normal shutdown.
    pub const SHN_NORMAL: u32 = 1 << 14;
    /// Queue entries of 64 and 16 bytes.
    pub const ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;
}

/// Bits of CSTS (section 3.1.6).
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller fatal status.
    pub const CFS: u32 = 2;
    /// Shutdown status, both bits.
    pub const SHST_MASK: u32 = 3 << 2;
    /// Shutdown complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
}

/// Opcodes of admin commands (section 5).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const SET_FEATURES: u8 = 0x09;
    /// Feature: number of queues.
    pub const FEATURE_QUEUES: u32 = 0x07;
    /// Identify: a namespace.
    pub const CNS_NAMESPACE: u32 = 0;
    /// Identify: the controller.
    pub const CNS_CONTROLLER: u32 = 1;
    /// Identify: the list of active namespaces.
    pub const CNS_ACTIVE_LIST: u32 = 2;
}

/// Opcodes of NVM commands (section 6).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
}

/// A submission queue entry (section 4.2), as little-endian quadwords: opcode and command identifier with the namespace,
/// reserved, metadata pointer, PRP 1, PRP 2, and command dwords 10 to 15 in pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct Sqe([u64; 8]);
const _: () = assert!(size_of::<Sqe>() == 64);

impl Sqe {
    /// A command without data.
    #[inline(always)]
    pub fn new(opcode: u8, nsid: u32) -> Self {
        Self([(u64::from(nsid) << 32 | u64::from(opcode)).to_le(), 0, 0, 0, 0, 0, 0, 0])
    }

    /// The quadwords that can be other than 0, with their numbers.
    #[inline(always)]
    pub(crate) fn words(self) -> [(usize, u64); 5] {
        let [command, _, _, prp1, prp2, dwords10, dwords12, _] = self.0;
        [(0, command), (3, prp1), (4, prp2), (5, dwords10), (6, dwords12)]
    }

    /// Sets the data pointer.
    #[inline]
    pub fn prps(mut self, prp1: u64, prp2: u64) -> Self {
        (self.0[3], self.0[4]) = (prp1.to_le(), prp2.to_le());
        self
    }

    /// Sets dwords 10 and 11.
    #[inline]
    pub fn dwords10(mut self, dword10: u32, dword11: u32) -> Self {
        self.0[5] = (u64::from(dword11) << 32 | u64::from(dword10)).to_le();
        self
    }

    /// Sets dword 12.
    #[inline]
    pub fn dword12(mut self, dword12: u32) -> Self {
        self.0[6] = u64::from(dword12).to_le();
        self
    }

    /// Sets the command identifier, which is 0 before.
    #[inline]
    pub fn with_cid(mut self, cid: u16) -> Self {
        self.0[0] |= (u64::from(cid) << 16).to_le();
        self
    }

    /// Sets the command identifier, which is 0 before, from the upper half of a [`CqeTail::key`].
    #[inline]
    pub(crate) fn with_key(mut self, key: u32) -> Self {
        self.0[0] |= u64::from(key & 0xffff_0000).to_le();
        self
    }

    /// The command identifier.
    pub fn cid(&self) -> u16 {
        (u64::from_le(self.0[0]) >> 16) as u16
    }
}

/// A completion queue entry (section 4.6), as little-endian quadwords: the command's result, and the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct Cqe(pub [u64; 2]);
const _: () = assert!(size_of::<Cqe>() == 16);

/// The second quadword of a completion: all of it but the command's result, loaded at once.
#[derive(Debug, Clone, Copy)]
pub struct CqeTail(pub u64);

impl CqeTail {
    /// Its offset in the entry.
    pub const OFFSET: usize = 8;

    /// Where the controller is in the submission queue.
    #[inline]
    pub fn sq_head(self) -> u16 {
        self.0 as u16
    }

    /// The submission queue.
    #[inline]
    pub fn sq_id(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The command identifier.
    #[inline]
    pub fn cid(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// Submission queue and command identifier in one.
    #[inline]
    pub fn key(self) -> u32 {
        (self.0 >> 16) as u32
    }

    /// The command identifier's bits in `mask`, at most 16 of them.
    #[inline]
    pub(crate) fn masked_cid(self, mask: u64) -> usize {
        ((self.0 >> 32) & mask) as usize
    }

    /// The status field with the phase tag in bit 0.
    #[inline]
    pub(crate) fn status_and_phase(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The phase tag.
    #[inline]
    pub fn phase(self) -> bool {
        self.0 >> 48 & 1 != 0
    }

    /// The status.
    #[inline]
    pub fn status(self) -> Status {
        Status((self.0 >> 49) as u16)
    }
}

impl Cqe {
    /// A completion as a controller writes it.
    pub fn new(result: u32, sq_head: u16, sq_id: u16, cid: u16, phase: bool, status: Status) -> Self {
        let word = u64::from(status.0 << 1 | u16::from(phase)) << 48 | u64::from(cid) << 32 | u64::from(sq_id) << 16;
        Self([u64::from(result).to_le(), (word | u64::from(sq_head)).to_le()])
    }

    /// Dword 0: the command's result.
    pub fn result(&self) -> u32 {
        u64::from_le(self.0[0]) as u32
    }
}

/// The fields of Identify Controller that the driver looks at (figure 247).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor and subsystem vendor.
    pub vendor: [U16; 2],
    /// Serial number, ASCII, padded with spaces.
    pub serial: [u8; 20],
    /// Model number.
    pub model: [u8; 40],
    /// Firmware revision.
    pub firmware: [u8; 8],
    reserved1: [u8; 5],
    /// Largest transfer, as a power of two of the smallest page; 0 = no limit.
    pub mdts: u8,
    reserved2: [u8; 10],
    /// RTD3 entry latency in microseconds: how long a shutdown may take.
    pub rtd3e: U32,
    reserved3: [u8; 424],
    /// Number of namespaces (offset 516).
    pub nn: U32,
    reserved4: [u8; 5],
    /// Volatile write cache (offset 525).
    pub vwc: u8,
    reserved5: [u8; 3570],
}
const _: () = assert!(size_of::<IdentifyController>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyController, mdts) == 77);
const _: () = assert!(std::mem::offset_of!(IdentifyController, rtd3e) == 88);
const _: () = assert!(std::mem::offset_of!(IdentifyController, nn) == 516);
const _: () = assert!(std::mem::offset_of!(IdentifyController, vwc) == 525);

/// The fields of Identify Namespace that the driver looks at (figure 245).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size in blocks.
    pub nsze: U64,
    /// Capacity in blocks.
    pub ncap: U64,
    /// Blocks in use.
    pub nuse: U64,
    /// Features.
    pub nsfeat: u8,
    /// Number of LBA formats, less one.
    pub nlbaf: u8,
    /// Format in use, in bits 0-3; metadata at the end of the data in bit 4.
    pub flbas: u8,
    reserved1: [u8; 101],
    /// LBA formats: metadata bytes in bits 0-15, data size as a power of two in bits 16-23.
    pub lbaf: [U32; 16],
    reserved2: [u8; 3904],
}
const _: () = assert!(size_of::<IdentifyNamespace>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);

/// The status of a completed command: bits 1-15 of the completion's last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Whether the command succeeded.
    #[inline]
    pub fn is_ok(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Status code type (0 generic, 1 command specific, 2 media and data integrity).
    pub fn code_type(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// Status code.
    pub fn code(self) -> u8 {
        self.0 as u8
    }

    /// Whether a retry is hopeless.
    pub fn do_not_retry(self) -> bool {
        self.0 >> 14 & 1 != 0
    }

    fn name(self) -> &'static str {
        match (self.code_type(), self.code()) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field in command",
            (0, 0x04) => "data transfer error",
            (0, 0x05) => "aborted by power loss",
            (0, 0x06) => "internal error",
            (0, 0x07) => "abort requested",
            (0, 0x08) => "aborted by deletion of its queue",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x13) => "invalid PRP offset",
            (0, 0x80) => "LBA out of range",
            (0, 0x81) => "capacity exceeded",
            (0, 0x82) => "namespace not ready",
            (1, 0x00) => "completion queue invalid",
            (1, 0x01) => "invalid queue identifier",
            (1, 0x02) => "invalid queue size",
            (1, 0x08) => "invalid interrupt vector",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x85) => "compare failure",
            (2, 0x86) => "access denied",
            _ => "see the specification",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (status code type {}, code {:#04x})", self.name(), self.code_type(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_fields() {
        let cap = Cap(0x0010_0020_1401_03ff);
        assert_eq!(cap.max_queue_entries(), 1024);
        assert_eq!(cap.timeout_ms(), 10_000);
        assert_eq!(cap.doorbell_stride(), 4);
        assert!(cap.has_nvm());
        assert_eq!(cap.min_page_shift(), 12);
        assert_eq!(Cap(0).timeout_ms(), 500);
    }

    #[test]
    fn status_fields() {
        let status = Status(0x4080);
        assert!(!status.is_ok() && status.do_not_retry());
        assert_eq!(status.to_string(), "LBA out of range (status code type 0, code 0x80)");
        assert!(Status(0).is_ok());
    }
}
