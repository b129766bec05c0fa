//! Numbers and structures of the NVMe base specification 1.4 that the controller uses.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Register offsets in BAR0 (section 3.1).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod register {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

/// Bits of CSTS (section 3.1.6).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod csts {
    pub const RDY: u32 = 1;
    pub const CFS: u32 = 1 << 1;
    pub const SHST: u32 = 3 << 2;
    pub const SHST_COMPLETE: u32 = 2 << 2;
}

/// Fields of CC (section 3.1.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cc(pub u32);

impl Cc {
    /// Enable.
    pub fn enabled(self) -> bool {
        self.0 & 1 != 0
    }

    /// I/O command set; 0 = NVM.
    pub fn command_set(self) -> u32 {
        self.0 >> 4 & 7
    }

    /// Memory page size, as a shift above 4 KiB.
    pub fn page_shift(self) -> u32 {
        self.0 >> 7 & 0xf
    }

    /// Arbitration mechanism; 0 = round robin.
    pub fn arbitration(self) -> u32 {
        self.0 >> 11 & 7
    }

    /// Shutdown notification; 0 = none.
    pub fn shutdown(self) -> u32 {
        self.0 >> 14 & 3
    }

    /// Size of I/O submission queue entries as a power of two; 0 before I/O queues are made.
    pub fn sq_entry_shift(self) -> u32 {
        self.0 >> 16 & 0xf
    }

    /// Size of I/O completion queue entries as a power of two.
    pub fn cq_entry_shift(self) -> u32 {
        self.0 >> 20 & 0xf
    }
}

/// Opcodes of admin commands (section 5).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    /// All that are implemented.
    pub const ALL: [u8; 10] = [
        DELETE_SQ,
        CREATE_SQ,
        GET_LOG_PAGE,
        DELETE_CQ,
        CREATE_CQ,
        IDENTIFY,
        ABORT,
        SET_FEATURES,
        GET_FEATURES,
        ASYNC_EVENT_REQUEST,
    ];
}

/// Opcodes of NVM commands (section 6).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// All that are implemented.
    pub const ALL: [u8; 6] = [FLUSH, WRITE, READ, COMPARE, WRITE_ZEROES, DATASET_MANAGEMENT];
}

/// Every namespace.
pub const NSID_ALL: u32 = u32::MAX;

/// The status field of a completion without its phase: SC in bits 7:0, SCT in 10:8, DNR in 14 (section 4.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

#[expect(missing_docs, reason = "the names are those of the specification")]
impl Status {
    const DNR: u16 = 1 << 14;
    pub const SUCCESS: Self = Self(0);
    pub const INVALID_OPCODE: Self = Self(Self::DNR | 0x01);
    pub const INVALID_FIELD: Self = Self(Self::DNR | 0x02);
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);
    pub const INTERNAL_ERROR: Self = Self(0x06);
    pub const ABORT_REQUESTED: Self = Self(0x07);
    pub const INVALID_NAMESPACE: Self = Self(Self::DNR | 0x0b);
    pub const COMMAND_SEQUENCE: Self = Self(Self::DNR | 0x0c);
    pub const SGL_SEGMENT_INVALID: Self = Self(Self::DNR | 0x0d);
    pub const SGL_COUNT_INVALID: Self = Self(Self::DNR | 0x0e);
    pub const SGL_LENGTH_INVALID: Self = Self(Self::DNR | 0x0f);
    pub const SGL_TYPE_INVALID: Self = Self(Self::DNR | 0x11);
    pub const PRP_OFFSET_INVALID: Self = Self(Self::DNR | 0x13);
    pub const LBA_OUT_OF_RANGE: Self = Self(Self::DNR | 0x80);
    pub const CQ_INVALID: Self = Self(Self::DNR | 0x100);
    pub const QUEUE_ID_INVALID: Self = Self(Self::DNR | 0x101);
    pub const QUEUE_SIZE_INVALID: Self = Self(Self::DNR | 0x102);
    pub const ASYNC_EVENT_LIMIT: Self = Self(Self::DNR | 0x105);
    pub const VECTOR_INVALID: Self = Self(Self::DNR | 0x108);
    pub const LOG_PAGE_INVALID: Self = Self(Self::DNR | 0x109);
    pub const QUEUE_DELETION_INVALID: Self = Self(Self::DNR | 0x10c);
    pub const FEATURE_NOT_SAVEABLE: Self = Self(Self::DNR | 0x10d);
    pub const WRITE_FAULT: Self = Self(0x280);
    pub const READ_ERROR: Self = Self(Self::DNR | 0x281);
    pub const COMPARE_FAILURE: Self = Self(Self::DNR | 0x285);

    /// Whether the command did what it was asked for.
    pub fn is_success(self) -> bool {
        self.0 == 0
    }
}

/// A submission queue entry (section 4.2) as little-endian quadwords.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct Sqe(pub [u64; 8]);
const _: () = assert!(size_of::<Sqe>() == 64);

impl Sqe {
    #[inline]
    fn quad(&self, index: usize) -> u64 {
        u64::from_le(self.0[index])
    }

    /// Opcode.
    #[inline]
    pub fn opcode(&self) -> u8 {
        self.quad(0) as u8
    }

    /// Fused operation; 0 = none.
    #[inline]
    pub fn fuse(&self) -> u8 {
        (self.quad(0) >> 8) as u8 & 3
    }

    /// How the data pointer is to be read: 0 = PRPs, 1 and 2 = SGL.
    #[inline]
    pub fn psdt(&self) -> u8 {
        (self.quad(0) >> 14) as u8 & 3
    }

    /// Command identifier.
    #[inline]
    pub fn cid(&self) -> u16 {
        (self.quad(0) >> 16) as u16
    }

    /// Namespace.
    #[inline]
    pub fn nsid(&self) -> u32 {
        (self.quad(0) >> 32) as u32
    }

    /// PRP 1, or the first half of an SGL descriptor.
    #[inline]
    pub fn prp1(&self) -> u64 {
        self.quad(3)
    }

    /// PRP 2, or the second half of an SGL descriptor.
    #[inline]
    pub fn prp2(&self) -> u64 {
        self.quad(4)
    }

    /// Command dword 10 to 15.
    #[inline]
    pub fn dword(&self, number: usize) -> u32 {
        (self.quad(number / 2) >> (32 * (number & 1))) as u32
    }

    /// Starting LBA of an I/O command.
    #[inline]
    pub fn lba(&self) -> u64 {
        self.quad(5)
    }

    /// Number of logical blocks of an I/O command.
    #[inline]
    pub fn blocks(&self) -> u64 {
        u64::from(self.dword(12) as u16) + 1
    }
}

/// A completion queue entry (section 4.6) before it has its phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Completion {
    /// Command specific.
    pub result: u32,
    /// Head of the submission queue.
    pub sq_head: u16,
    /// Submission queue.
    pub sq_id: u16,
    /// Command identifier.
    pub cid: u16,
    /// See [`Status`].
    pub status: u16,
}

impl Completion {
    /// The entry as stored, low half first; the high half holds the phase.
    #[inline]
    pub fn quads(&self, phase: bool) -> [u64; 2] {
        let status = u64::from(self.status) << 17 | u64::from(phase) << 16 | u64::from(self.cid);
        [self.result.into(), status << 32 | u64::from(self.sq_id) << 16 | u64::from(self.sq_head)]
    }
}
