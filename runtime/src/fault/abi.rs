//! The fault queues in regions, as bytes: what the series "vfio: expose physical DMA faults to user space" put there (v8 for the
//! two-region form, v13 for the single-region form; never merged into Linux), and our own version 2 of both.
//!
//! # Version 2
//! The series drop a fault silently when the queue is full. In version 2, which our software devices offer, the device counts them:
//! the counter [`ProducerHeader::lost`] (or [`SingleHeader::lost`]) follows the 20 bytes of the series' header, and each record
//! has in its word of padding, [`RecordHead::lost`], what that counter was when the record was stored. So a reader knows how many
//! faults are missing, and between which two others they came. The counter wraps.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::{Answer, Fault, PageRequest, Permissions, Reason, Unrecoverable};

/// `VFIO_REGION_TYPE_NESTED` up to v11.
pub const REGION_TYPE: u32 = 2;
/// `VFIO_REGION_TYPE_NESTED` from v12 on.
pub const REGION_TYPE_LATER: u32 = 4;
/// Subtype of the producer's region, and of the single region.
pub const SUBTYPE_QUEUE: u32 = 1;
/// Subtype of the consumer's region of the two-region form.
pub const SUBTYPE_CONSUMER: u32 = 2;
/// Subtype of the queue of answers of the single-region form.
pub const SUBTYPE_RESPONSE: u32 = 2;
/// Index of the interrupt of the two-region form (`VFIO_PCI_DMA_FAULT_IRQ_INDEX`). In the single-region form it may be any that is
/// not smaller, and has a type.
pub const IRQ_INDEX: u32 = 5;
/// Type and subtype of the interrupt of the single-region form (`VFIO_IRQ_TYPE_NESTED`, `VFIO_IRQ_SUBTYPE_DMA_FAULT`).
pub const IRQ_TYPE: (u32, u32) = (1, 1);

/// The version of the series.
pub const VERSION_PLAIN: u32 = 1;
/// Ours, which counts the faults that were lost.
pub const VERSION_COUNTED: u32 = 2;
/// A version that was not agreed on yet.
pub const VERSION_NONE: u32 = u32::MAX;
/// Bytes of a header before version 2.
pub const PLAIN_HEADER: usize = 20;
/// Bytes of the largest record; an entry may be larger.
pub const RECORD: usize = 48;

macro_rules! abi {
    ($(#[$meta:meta])* $name:ident [$size:literal] { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

abi! {
    /// `struct vfio_region_fault_prod`, and our counter.
    ProducerHeader [24] {
        /// The version that was agreed on.
        version: U32,
        /// Entries of the queue.
        nb_entries: U32,
        /// Bytes of an entry.
        entry_size: U32,
        /// Where in the region the queue starts.
        offset: U32,
        /// Where the next record goes to.
        prod: U32,
        /// Version 2: records that there was no room for.
        lost: U32,
    }
}
abi! {
    /// `struct vfio_region_fault_cons`.
    ConsumerHeader [8] {
        /// The version that is agreed on by writing it.
        version: U32,
        /// The record that is read next.
        cons: U32,
    }
}
abi! {
    /// `struct vfio_region_dma_fault`, and our counter.
    SingleHeader [24] {
        /// The record that is read next: the reader writes it.
        tail: U32,
        /// Bytes of an entry.
        entry_size: U32,
        /// Entries of the queue.
        nb_entries: U32,
        /// Where in the region the queue starts.
        offset: U32,
        /// Where the next record goes to.
        head: U32,
        /// Version 2: records that there was no room for.
        lost: U32,
    }
}
abi! {
    /// `struct vfio_region_dma_fault_response`.
    ResponseHeader [20] {
        /// Where the next answer goes to: who answers writes it.
        head: U32,
        /// Bytes of an entry.
        entry_size: U32,
        /// Entries of the queue.
        nb_entries: U32,
        /// Where in the region the queue starts.
        offset: U32,
        /// The answer that is taken next.
        tail: U32,
    }
}
abi! {
    /// `struct iommu_page_response`.
    PageResponse [24] {
        /// Bytes of this structure.
        argsz: U32,
        /// 1.
        version: U32,
        /// [`RESPONSE_PASID_VALID`].
        flags: U32,
        /// The process address space.
        pasid: U32,
        /// The page request group index.
        grpid: U32,
        /// 0 success, 1 invalid, 2 failure.
        code: U32,
    }
}
abi! {
    /// The start of `struct iommu_fault`.
    RecordHead [8] {
        /// 1: an [`UnrecoverableBody`] follows, 2: a [`PageRequestBody`].
        kind: U32,
        /// Padding of the series. Version 2: the header's counter when this record was stored.
        lost: U32,
    }
}
abi! {
    /// `struct iommu_fault_unrecoverable`.
    UnrecoverableBody [32] {
        /// `enum iommu_fault_reason`.
        reason: U32,
        /// PASID 1, address 2, fetch address 4 valid.
        flags: U32,
        /// The process address space.
        pasid: U32,
        /// [`Permissions`].
        perm: U32,
        /// The I/O virtual address.
        addr: U64,
        /// The address of the table entry.
        fetch_addr: U64,
    }
}
abi! {
    /// `struct iommu_fault_page_request`.
    PageRequestBody [40] {
        /// PASID 1, last page 2, private data 4 valid.
        flags: U32,
        /// The process address space.
        pasid: U32,
        /// The page request group index.
        grpid: U32,
        /// [`Permissions`].
        perm: U32,
        /// The I/O virtual address.
        addr: U64,
        /// The device's private data.
        private_data: [U64; 2],
    }
}
const _: () = assert!(size_of::<RecordHead>() + size_of::<PageRequestBody>() == RECORD);

/// Of [`PageResponse::flags`].
pub const RESPONSE_PASID_VALID: u32 = 1;
const UNRECOVERABLE: u32 = 1;
const PAGE_REQUEST: u32 = 2;
const PASID_VALID: u32 = 1;
const ADDRESS_VALID: u32 = 2;
const FETCH_VALID: u32 = 4;
const LAST_PAGE: u32 = 2;
const PRIVATE_DATA: u32 = 4;

/// A record of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Version 2: the header's counter when it was stored.
    pub lost: u32,
    /// The fault.
    pub fault: Fault,
    /// Whether it is the last of its group: of page requests.
    pub last: bool,
}

/// Why an entry is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It has fewer bytes than its record.
    #[error("an entry of {0} bytes does not hold its record")]
    Short(usize),
    /// Its type is not known.
    #[error("a record of type {0}; 1 (unrecoverable) and 2 (page request) are known")]
    Kind(u32),
}

impl Record {
    /// Reads an entry. Unknown flags are ignored.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn parse(entry: &[u8]) -> Result<Self, RecordError> {
        let short = RecordError::Short(entry.len());
        let (head, body) = RecordHead::read_from_prefix(entry).map_err(|_| short)?;
        let lost = head.lost.get();
        let valid = |flags: U32, flag: u32| flags.get() & flag != 0;
        match head.kind.get() {
            UNRECOVERABLE => {
                let (body, _) = UnrecoverableBody::read_from_prefix(body).map_err(|_| short)?;
                let fault = Unrecoverable {
                    reason: Reason::from_code(body.reason.get()),
                    pasid: valid(body.flags, PASID_VALID).then_some(body.pasid.get()),
                    permissions: Permissions::from_bits_retain(body.perm.get()),
                    address: valid(body.flags, ADDRESS_VALID).then_some(body.addr.get()),
                    fetch_address: valid(body.flags, FETCH_VALID).then_some(body.fetch_addr.get()),
                };
                Ok(Self { lost, fault: Fault::Unrecoverable(fault), last: true })
            }
            PAGE_REQUEST => {
                let (body, _) = PageRequestBody::read_from_prefix(body).map_err(|_| short)?;
                let request = PageRequest {
                    pasid: valid(body.flags, PASID_VALID).then_some(body.pasid.get()),
                    group_index: body.grpid.get(),
                    permissions: Permissions::from_bits_retain(body.perm.get()),
                    address: body.addr.get(),
                    length: 0,
                    private_data: valid(body.flags, PRIVATE_DATA).then_some(body.private_data.map(U64::get)),
                };
                Ok(Self { lost, fault: Fault::PageRequest(request), last: valid(body.flags, LAST_PAGE) })
            }
            kind => Err(RecordError::Kind(kind)),
        }
    }

    /// The bytes of an entry, for a device. The length of a page request has no place in it.
    pub fn to_bytes(&self) -> [u8; RECORD] {
        let flag = |valid: bool, flag: u32| if valid { flag } else { 0 };
        let mut bytes = [0; RECORD];
        let (head, body) = bytes.split_at_mut(size_of::<RecordHead>());
        let kind = match &self.fault {
            Fault::Unrecoverable(fault) => {
                let flags = flag(fault.pasid.is_some(), PASID_VALID)
                    | flag(fault.address.is_some(), ADDRESS_VALID)
                    | flag(fault.fetch_address.is_some(), FETCH_VALID);
                let fields = UnrecoverableBody {
                    reason: fault.reason.code().into(),
                    flags: flags.into(),
                    pasid: fault.pasid.unwrap_or(0).into(),
                    perm: fault.permissions.bits().into(),
                    addr: fault.address.unwrap_or(0).into(),
                    fetch_addr: fault.fetch_address.unwrap_or(0).into(),
                };
                body[..size_of_val(&fields)].copy_from_slice(fields.as_bytes());
                UNRECOVERABLE
            }
            Fault::PageRequest(request) => {
                let flags = flag(request.pasid.is_some(), PASID_VALID)
                    | flag(self.last, LAST_PAGE)
                    | flag(request.private_data.is_some(), PRIVATE_DATA);
                let fields = PageRequestBody {
                    flags: flags.into(),
                    pasid: request.pasid.unwrap_or(0).into(),
                    grpid: request.group_index.into(),
                    perm: request.permissions.bits().into(),
                    addr: request.address.into(),
                    private_data: request.private_data.unwrap_or_default().map(U64::new),
                };
                body.copy_from_slice(fields.as_bytes());
                PAGE_REQUEST
            }
        };
        head.copy_from_slice(RecordHead { kind: kind.into(), lost: self.lost.into() }.as_bytes());
        bytes
    }
}

impl PageResponse {
    /// The answer to a group.
    pub fn new(pasid: Option<u32>, group_index: u32, answer: Answer) -> Self {
        Self {
            argsz: (size_of::<Self>() as u32).into(),
            version: 1.into(),
            flags: pasid.map_or(0, |_| RESPONSE_PASID_VALID).into(),
            pasid: pasid.unwrap_or(0).into(),
            grpid: group_index.into(),
            code: answer.code().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_refused(entry in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(record) = Record::parse(&entry) {
                prop_assert!(entry.len() >= 40);
                // What was read says the same when it is written again.
                prop_assert_eq!(Record::parse(&record.to_bytes()), Ok(record));
            }
        }

        #[test]
        fn unrecoverable_faults_come_back(
            (reason, lost) in any::<(u32, u32)>(),
            (pasid, perm) in (any::<Option<u32>>(), any::<u32>()),
            (address, fetch_address) in any::<(Option<u64>, Option<u64>)>(),
        ) {
            let (reason, permissions) = (Reason::from_code(reason), Permissions::from_bits_retain(perm));
            let fault = Fault::Unrecoverable(Unrecoverable { reason, pasid, permissions, address, fetch_address });
            let record = Record { lost, fault, last: true };
            prop_assert_eq!(Record::parse(&record.to_bytes()), Ok(record));
            prop_assert_eq!(Record::parse(&record.to_bytes()[..39]), Err(RecordError::Short(39)));
        }

        #[test]
        fn page_requests_come_back(
            (lost, group_index, address, last) in any::<(u32, u32, u64, bool)>(),
            (pasid, private_data) in any::<(Option<u32>, Option<[u64; 2]>)>(),
        ) {
            let permissions = Permissions::READ;
            let request = PageRequest { pasid, group_index, permissions, address, length: 0, private_data };
            let record = Record { lost, fault: Fault::PageRequest(request), last };
            prop_assert_eq!(Record::parse(&record.to_bytes()), Ok(record));
            prop_assert_eq!(Record::parse(&record.to_bytes()[..47]), Err(RecordError::Short(47)));
        }
    }

    #[test]
    fn the_layout_is_that_of_the_series() {
        let mut entry = [0; RECORD];
        (entry[0], entry[8], entry[12], entry[16], entry[20], entry[24], entry[32]) = (1, 5, 7, 9, 2, 0x10, 0x20);
        let Ok(Record { fault: Fault::Unrecoverable(fault), .. }) = Record::parse(&entry) else { panic!() };
        assert_eq!((fault.reason, fault.pasid, fault.permissions), (Reason::PteFetch, Some(9), Permissions::WRITE));
        assert_eq!((fault.address, fault.fetch_address), (Some(0x10), Some(0x20)));
        (entry[0], entry[8], entry[12], entry[16], entry[20], entry[24], entry[40]) = (2, 7, 3, 4, 1, 0x30, 6);
        let Ok(Record { fault: Fault::PageRequest(request), last: true, .. }) = Record::parse(&entry) else { panic!() };
        assert_eq!((request.pasid, request.group_index, request.address), (Some(3), 4, 0x30));
        assert_eq!(request.private_data, Some([0x20, 6]));
        entry[0] = 3;
        assert_eq!(Record::parse(&entry), Err(RecordError::Kind(3)));
    }
}
