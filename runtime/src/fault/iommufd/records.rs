//! Records of page requests, as the kernel's descriptor gives them.

use iommufd_bindings as abi;

use crate::{
    Error, Result,
    fault::{Fault, PageRequest, Permissions},
};

/// Bytes of a record (`struct iommu_hwpt_pgfault`).
pub const RECORD_SIZE: usize = 40;
/// Bytes of a response (`struct iommu_hwpt_page_response`).
pub const RESPONSE_SIZE: usize = 8;

const _: () = assert!(size_of::<abi::iommu_hwpt_pgfault>() == RECORD_SIZE);
const _: () = assert!(size_of::<abi::iommu_hwpt_page_response>() == RESPONSE_SIZE);

const PASID_VALID: u32 = abi::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_PASID_VALID;
const LAST_PAGE: u32 = abi::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_LAST_PAGE;
/// PCI Express has 20 bits.
const MAX_PASID: u32 = (1 << 20) - 1;

/// A whole group of page requests, as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What the kernel wants to see in the response. It gives a cookie to another group once this one is answered.
    pub cookie: u32,
    /// The device, by its id in the context.
    pub device_id: u32,
    /// Its page requests.
    pub faults: Vec<Fault>,
}

/// Takes apart what one read gave: whole groups, each up to its record with LAST_PAGE.
///
/// # Errors
/// [`Error::DeviceFault`] for what no kernel that this library knows writes: a part of a record or of a group, unknown flags or
/// permissions, reserved bytes in use, PASIDs of more than 20 bits, records of one group that differ in their cookie, device or
/// group index, a cookie that is given twice.
pub fn parse(bytes: &[u8]) -> Result<Vec<Group>> {
    let (records, rest) = bytes.as_chunks::<RECORD_SIZE>();
    if !rest.is_empty() {
        return Err(fault(records.len(), format_args!("{} bytes of {RECORD_SIZE}", rest.len())));
    }
    let mut groups: Vec<Group> = Vec::new();
    // The group that waits for its last request, and its index.
    let mut open: Option<(Group, u32)> = None;
    for (number, record) in records.iter().enumerate() {
        let record = Record::parse(record, number)?;
        let (mut group, index) = match open.take() {
            Some(open) => open,
            None => (
                Group { cookie: record.cookie, device_id: record.device_id, faults: Vec::new() },
                record.request.group_index,
            ),
        };
        let (ours, its) =
            ((group.cookie, group.device_id, index), (record.cookie, record.device_id, record.request.group_index));
        if ours != its {
            return Err(fault(number, format_args!("cookie, device and group index {its:?} in a group that has {ours:?}")));
        }
        group.faults.push(Fault::PageRequest(record.request));
        if record.last {
            groups.push(group);
        } else {
            open = Some((group, index));
        }
    }
    if let Some((group, _)) = open {
        return Err(fault(records.len(), format_args!("nothing where the group with cookie {} should go on", group.cookie)));
    }
    let mut cookies: Vec<_> = groups.iter().map(|group| group.cookie).collect();
    cookies.sort_unstable();
    if let Some(twice) = cookies.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::fault(format!("iommufd gave cookie {} to two groups of page requests", twice[0])));
    }
    Ok(groups)
}

/// The cookies of all records that are there as a whole, right or wrong: to answer them all the same.
pub(super) fn cookies(bytes: &[u8]) -> Vec<u32> {
    let mut cookies: Vec<_> = bytes.as_chunks::<RECORD_SIZE>().0.iter().map(|record| word(record, 36)).collect();
    cookies.sort_unstable();
    cookies.dedup();
    cookies
}

/// A response: its code is 0 for success, 1 for invalid.
pub(super) fn response(cookie: u32, invalid: bool) -> [u8; RESPONSE_SIZE] {
    let code = match invalid {
        true => abi::iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID,
        false => abi::iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS,
    };
    let mut bytes = [0; RESPONSE_SIZE];
    bytes[..4].copy_from_slice(&cookie.to_ne_bytes());
    bytes[4..].copy_from_slice(&code.to_ne_bytes());
    bytes
}

struct Record {
    cookie: u32,
    device_id: u32,
    last: bool,
    request: PageRequest,
}

impl Record {
    fn parse(bytes: &[u8; RECORD_SIZE], number: usize) -> Result<Self> {
        let [flags, device_id, pasid, group_index, permissions, reserved] = [0, 4, 8, 12, 16, 20].map(|at| word(bytes, at));
        let address = u64::from(word(bytes, if cfg!(target_endian = "little") { 28 } else { 24 })) << 32
            | u64::from(word(bytes, if cfg!(target_endian = "little") { 24 } else { 28 }));
        if flags & !(PASID_VALID | LAST_PAGE) != 0 {
            return Err(fault(number, format_args!("unknown flags ({flags:#x})")));
        }
        if reserved != 0 {
            return Err(fault(number, format_args!("reserved bytes in use ({reserved:#x})")));
        }
        let Some(permissions) = Permissions::from_bits(permissions) else {
            return Err(fault(number, format_args!("unknown permissions ({permissions:#x})")));
        };
        let pasid = (flags & PASID_VALID != 0).then_some(pasid);
        if let Some(pasid) = pasid.filter(|pasid| *pasid > MAX_PASID) {
            return Err(fault(number, format_args!("PASID {pasid:#x}, above {MAX_PASID:#x}")));
        }
        let request = PageRequest { pasid, group_index, permissions, address, length: word(bytes, 32), private_data: None };
        Ok(Self { cookie: word(bytes, 36), device_id, last: flags & LAST_PAGE != 0, request })
    }
}

fn word(bytes: &[u8; RECORD_SIZE], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn fault(number: usize, what: std::fmt::Arguments<'_>) -> Error {
    Error::fault(format!("record {number} of iommufd's page requests has {what}; is the kernel newer than this program?"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Words of a record: flags, device, PASID, group index, permissions, reserved, address (2), length, cookie.
    fn bytes(words: [u32; 10]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    const ONE: [u32; 10] = [3, 7, 5, 9, 1, 0, 0x1000, 0, 0x2000, 1];

    fn refused(records: &[[u32; 10]], part: &str) {
        let all: Vec<u8> = records.iter().flat_map(|words| bytes(*words)).collect();
        let error = parse(&all).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    fn with(mut words: [u32; 10], at: usize, word: u32) -> [u32; 10] {
        words[at] = word;
        words
    }

    #[test]
    fn groups_end_with_their_last_page() {
        let first = with(ONE, 0, 0);
        let second = with(with(ONE, 3, 8), 9, 2);
        let all = [bytes(first), bytes(ONE), bytes(second)].concat();
        let groups = parse(&all).unwrap();
        let shape: Vec<_> = groups.iter().map(|group| (group.cookie, group.device_id, group.faults.len())).collect();
        assert_eq!(shape, [(1, 7, 2), (2, 7, 1)]);
        let Fault::PageRequest(request) = groups[0].faults[1] else { panic!() };
        let address = if cfg!(target_endian = "little") { 0x1000 } else { 0x1000 << 32 };
        let permissions = Permissions::READ;
        let (pasid, group_index, length) = (Some(5), 9, 0x2000);
        assert_eq!(request, PageRequest { pasid, group_index, permissions, address, length, private_data: None });
        let Fault::PageRequest(request) = groups[0].faults[0] else { panic!() };
        assert_eq!(request.pasid, None, "its number means nothing without the flag");
        assert!(parse(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_no_kernel_writes_is_refused() {
        refused(&[with(ONE, 0, 6)], "unknown flags (0x6)");
        refused(&[ONE, with(ONE, 5, 1)], "record 1");
        refused(&[with(ONE, 4, 16)], "unknown permissions");
        refused(&[with(ONE, 2, 1 << 20)], "PASID 0x100000");
        refused(&[with(ONE, 0, 0)], "should go on");
        for (at, word) in [(1, 8), (3, 8), (9, 2)] {
            refused(&[with(ONE, 0, 0), with(ONE, at, word)], "in a group that has (1, 7, 9)");
        }
        refused(&[ONE, ONE], "cookie 1 to two groups");
        let error = parse(&bytes(ONE)[..39]).unwrap_err().to_string();
        assert!(error.contains("39 bytes of 40"), "{error}");
        assert_eq!(cookies(&[bytes(ONE), bytes(ONE), vec![0; 39]].concat()), [1]);
    }

    #[test]
    fn responses_are_those_of_the_header() {
        assert_eq!(response(0x0102_0304, true), [0x0102_0304u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat()[..]);
        assert_eq!(response(1, false)[4..], [0; 4]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_whole_groups_or_an_error(
            records in proptest::collection::vec(
                (prop_oneof![0u32..4, any::<u32>()], 0u32..3, 0u32..3, prop_oneof![6 => 0u32..16, 1 => any::<u32>()], 0u32..6),
                0..24,
            ),
            cut in 0usize..40,
        ) {
            let mut all: Vec<u8> = records
                .iter()
                .flat_map(|&(flags, device, index, permissions, cookie)| {
                    bytes([flags, device, 0, index, permissions, 0, 1, 2, 3, cookie])
                })
                .collect();
            all.truncate(all.len() - cut.min(all.len()));
            if let Ok(groups) = parse(&all) {
                let faults: usize = groups.iter().map(|group| group.faults.len()).sum();
                prop_assert_eq!(faults * RECORD_SIZE, all.len());
                prop_assert!(groups.iter().all(|group| !group.faults.is_empty()));
                prop_assert_eq!(cookies(&all).len(), groups.len());
            }
        }
    }
}
