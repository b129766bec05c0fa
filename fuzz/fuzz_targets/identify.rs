//! Identify data as a hostile controller gives it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_uring_nvme::{
    ControllerInfo, MAX_TRANSFER, parse_list, parse_namespace,
    spec::{IdentifyController, IdentifyNamespace},
};
use zerocopy::{FromBytes, FromZeros, IntoBytes, little_endian::U32};

fuzz_target!(|input: (u32, Vec<u8>)| {
    let (after, bytes) = input;
    let mut page = [0u8; 4096];
    let len = bytes.len().min(page.len());
    page[..len].copy_from_slice(&bytes[..len]);
    let mut controller = IdentifyController::new_zeroed();
    controller.as_mut_bytes().copy_from_slice(&page);
    assert!(ControllerInfo::parse(&controller).max_transfer <= MAX_TRANSFER);
    let mut namespace = IdentifyNamespace::new_zeroed();
    namespace.as_mut_bytes().copy_from_slice(&page);
    if let Ok(Some(info)) = parse_namespace(1, &namespace) {
        assert!(info.block_size.is_power_of_two() && info.blocks.checked_mul(info.block_size.into()).is_some());
    }
    let list = <[U32]>::ref_from_bytes(&page).expect("whole words");
    if let Ok(found) = parse_list(after, list) {
        assert!(found.iter().all(|&nsid| nsid > after));
    }
});
