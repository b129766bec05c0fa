//! What a fault is, whatever queue it came by.

use std::fmt;

use bitflags::bitflags;

bitflags! {
    /// What an access wanted to do (`IOMMU_FAULT_PERM_*`, `IOMMU_PGFAULT_PERM_*`: the same bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Permissions: u32 {
        /// Read.
        const READ = 1;
        /// Write.
        const WRITE = 2;
        /// Execute.
        const EXEC = 4;
        /// In privileged mode.
        const PRIVILEGED = 8;
    }
}

/// Why an access could not be translated (`enum iommu_fault_reason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not known.
    Unknown,
    /// The PASID table could not be read.
    PasidFetch,
    /// The PASID's entry is wrong.
    BadPasidEntry,
    /// The PASID is out of range or off.
    PasidInvalid,
    /// An external abort during a table walk.
    WalkAbort,
    /// A page table's entry could not be read: nothing is mapped there.
    PteFetch,
    /// The mapping does not allow the access.
    Permission,
    /// An access flag fault.
    Access,
    /// The address is out of range.
    AddressOutOfRange,
    /// One that is newer than this library.
    Other(u32),
}

impl Reason {
    /// By its number.
    pub fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Unknown,
            1 => Self::PasidFetch,
            2 => Self::BadPasidEntry,
            3 => Self::PasidInvalid,
            4 => Self::WalkAbort,
            5 => Self::PteFetch,
            6 => Self::Permission,
            7 => Self::Access,
            8 => Self::AddressOutOfRange,
            other => Self::Other(other),
        }
    }

    /// Its number.
    pub fn code(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::PasidFetch => 1,
            Self::BadPasidEntry => 2,
            Self::PasidInvalid => 3,
            Self::WalkAbort => 4,
            Self::PteFetch => 5,
            Self::Permission => 6,
            Self::Access => 7,
            Self::AddressOutOfRange => 8,
            Self::Other(code) => code,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "for a reason that is not known",
            Self::PasidFetch => "the PASID table can't be read",
            Self::BadPasidEntry => "the PASID's entry is wrong",
            Self::PasidInvalid => "the PASID is not valid",
            Self::WalkAbort => "the table walk was aborted",
            Self::PteFetch => "nothing is mapped there",
            Self::Permission => "the mapping does not permit it",
            Self::Access => "an access flag fault",
            Self::AddressOutOfRange => "the address is out of range",
            Self::Other(code) => return write!(f, "reason {code}"),
        })
    }
}

/// An access that failed. It can't be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unrecoverable {
    /// Why.
    pub reason: Reason,
    /// The process address space, if the access had one.
    pub pasid: Option<u32>,
    /// What it wanted to do.
    pub permissions: Permissions,
    /// The I/O virtual address, if it is known.
    pub address: Option<u64>,
    /// The address of the table entry that could not be read, if it is known.
    pub fetch_address: Option<u64>,
}

/// A page that the device asks for. It waits for the answer of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// The process address space, if the request has one.
    pub pasid: Option<u32>,
    /// The page request group index of PCI Express.
    pub group_index: u32,
    /// What the device wants to do there.
    pub permissions: Permissions,
    /// The I/O virtual address.
    pub address: u64,
    /// Bytes it is about to use from there on: a hint, 0 when there is none.
    pub length: u32,
    /// The device's private data, if it sent some.
    pub private_data: Option<[u64; 2]>,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An access that failed.
    Unrecoverable(Unrecoverable),
    /// A page that is asked for.
    PageRequest(PageRequest),
}

/// Faults that there was no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// So many.
    Count(u64),
    /// The queue was full, and its form has no count: some perhaps.
    Perhaps,
}

/// What a group of page requests is answered by. Each queue makes its own; one of another queue is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupId {
    /// Of the queue, by the number that it got when it was opened.
    pub(crate) queue: u64,
    /// In the queue.
    pub(crate) key: u64,
}

/// Faults that belong together: one that failed, or the page requests up to the one that is marked as the last of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultGroup {
    /// Faults that were lost directly before these.
    pub lost: Option<Lost>,
    /// The device, by its number in the iommufd context; 0 where the queue belongs to one device.
    pub device_id: u32,
    /// The faults, in the order of their arrival. Empty when only a loss is told of.
    pub faults: Vec<Fault>,
    /// What to answer by; `None` when nobody waits for an answer.
    pub id: Option<GroupId>,
}

/// The answer to a group of page requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The pages are there: the device tries again.
    Success,
    /// The pages can't be had: the access fails.
    Invalid,
    /// The whole device can't be served. An iommufd queue can't say so and refuses it.
    Failure,
}

impl Answer {
    /// Its number (`enum iommu_page_response_code`; of an iommufd queue the first two are the same).
    pub fn code(self) -> u32 {
        match self {
            Self::Success => 0,
            Self::Invalid => 1,
            Self::Failure => 2,
        }
    }
}
