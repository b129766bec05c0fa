//! Records of iommufd's two queues, page requests and virtual IOMMUs' events, as no kernel should write them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_uring::fault::{
    iommufd::{self, RECORD_SIZE},
    veventq::{self, HEADER_SIZE, Sequence},
};

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (data_len, bytes) = input;
    if let Ok(groups) = iommufd::parse(&bytes) {
        // Each record is in one group, and each group is answered once.
        let faults: usize = groups.iter().map(|group| group.faults.len()).sum();
        assert_eq!(faults * RECORD_SIZE, bytes.len());
        let mut cookies: Vec<_> = groups.iter().map(|group| group.cookie).collect();
        cookies.sort_unstable();
        cookies.dedup();
        assert_eq!(cookies.len(), groups.len());
    }
    let data_len = usize::from(data_len & 63);
    if let Ok(records) = veventq::parse(&bytes, data_len) {
        let len: usize = records.iter().map(|record| HEADER_SIZE + record.data.map_or(0, <[u8]>::len)).sum();
        assert_eq!(len, bytes.len());
        let mut sequence = Sequence::default();
        for record in &records {
            match sequence.next(record) {
                Ok(lost) => assert!(lost <= i32::MAX as u64),
                Err(_) => return,
            }
        }
    }
});
