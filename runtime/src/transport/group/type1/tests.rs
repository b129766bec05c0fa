use proptest::prelude::*;

use super::*;
use crate::transport::user::wire::CapHeader;

/// What a guest's kernel answers for a device behind an emulated VT-d; the capabilities in the order of the kernel.
fn answer() -> Vec<u8> {
    let cap = |id: u16, next: u32| CapHeader { id: id.into(), version: 1.into(), next: next.into() };
    let head = Type1Header {
        argsz: 120.into(),
        flags: 3.into(),
        page_sizes: 0x4020_1000.into(),
        cap_offset: 24.into(),
        reserved: 0.into(),
    };
    let migration =
        MigrationCap { flags: 0.into(), reserved: 0.into(), page_sizes: 4096.into(), max_dirty_bitmap: (1 << 28).into() };
    let pair = |start: u64, end: u64| IovaPair { start: start.into(), end: end.into() };
    let mut answer = [head.as_bytes(), cap(2, 56).as_bytes(), migration.as_bytes(), cap(3, 72).as_bytes()].concat();
    answer.extend([U32::from(65535), U32::from(0)].as_bytes());
    answer.extend(cap(1, 0).as_bytes());
    answer.extend(IovaRanges { count: 2.into(), reserved: 0.into() }.as_bytes());
    answer.extend([pair(0, 0xfedf_ffff), pair(0xfef0_0000, 0xffff_ffff_ffff)].as_bytes());
    answer
}

fn vtd() -> Type1Info {
    parse(&answer()).unwrap()
}

#[test]
fn an_answer_is_read() {
    assert_eq!(answer().len(), 120);
    let range = |start, last| IovaRange { start, last };
    let expected = Type1Info {
        page_sizes: 0x4020_1000,
        ranges: Some(vec![range(0, 0xfedf_ffff), range(0xfef0_0000, 0xffff_ffff_ffff)]),
        dma_available: Some(65535),
        migration: Some(Migration { page_sizes: 4096, max_dirty_bitmap: 1 << 28 }),
    };
    assert_eq!(vtd(), expected);
    assert_eq!(vtd().granule(), 4096);
    // Without capabilities, as of old kernels and of groups that have no IOMMU of their own.
    let mut answer = answer();
    answer[4] = 1;
    let plain = Type1Info { ranges: None, dma_available: None, migration: None, ..expected };
    assert_eq!(parse(&answer).unwrap(), plain);
}

#[test]
fn broken_answers_are_refused() {
    let broken = |at: usize, value: u8, part: &str| {
        let mut answer = answer();
        answer[at] = value;
        let error = parse(&answer).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    broken(0, 121, "it needs 121 bytes");
    broken(4, 2, "no page sizes");
    broken(16, 8, "outside of the reply");
    broken(28, 24, "goes backwards");
    broken(76, 72, "goes backwards");
    broken(80, 3, "3 IOVA ranges");
    broken(83, 255, "IOVA ranges do not fit");
    broken(91, 255, "ends before it starts");
    for len in 0..24 {
        assert!(parse(&answer()[..len]).is_err());
    }
}

proptest! {
    #[test]
    fn any_answer_is_survived(
        changes in prop::collection::vec((0..120usize, any::<u8>()), 0..12), len in 0..=120usize,
    ) {
        let mut answer = answer();
        for (at, value) in changes {
            answer[at] = value;
        }
        answer.truncate(len);
        if let Ok(info) = parse(&answer) {
            prop_assert!(info.granule().is_power_of_two());
            prop_assert!(info.ranges.unwrap_or_default().iter().all(|range| range.start <= range.last));
        }
    }
}

fn refused(errno: Errno, iova: u64, len: u64) -> Error {
    Request { vaddr: 0x7000_0000, len, iova }.refused(errno, Some(&vtd()), Some(65535), Some(65536))
}

#[test]
fn each_errno_has_its_meaning() {
    let msi = Some(IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff });
    let all = Some(IovaRange { start: 0, last: 0xffff_ffff_ffff });
    for (errno, iova, len, expected) in [
        (Errno::EXIST, 0x1000, 0x1000, MapRefused::Overlap),
        (Errno::NOSPC, 0x1000, 0x1000, MapRefused::Limit { max: Some(65535) }),
        (Errno::FAULT, 0x1000, 0x1000, MapRefused::BadAddress),
        (Errno::NOMEM, 0x1000, 0x20000, MapRefused::Memlock { limit: 65536, needed: 0x20000 }),
        (Errno::INVAL, 0xfee0_0000, 0x1000, MapRefused::Reserved { region: msi }),
        (Errno::INVAL, 0xfedf_f000, 0x2000, MapRefused::Reserved { region: msi }),
        (Errno::INVAL, 0xffff_ffff_f000, 0x2000, MapRefused::Aperture { allowed: all }),
        (Errno::OVERFLOW, 0u64.wrapping_sub(4096), 0x2000, MapRefused::Aperture { allowed: all }),
        (Errno::INVAL, 0x1800, 0x1000, MapRefused::Misaligned { granule: 4096 }),
        (Errno::INVAL, 0x1000, 0, MapRefused::Misaligned { granule: 4096 }),
    ] {
        match refused(errno, iova, len) {
            Error::Map { iova: at, len: its, reason } => assert_eq!((at, its, reason), (iova, len, expected)),
            error => panic!("{error}"),
        }
    }
    // Nothing is wrong with the range: it is said as it is.
    assert!(matches!(refused(Errno::INVAL, 0x1000, 0x1000), Error::Io { .. }));
    assert!(matches!(refused(Errno::NOTTY, 0x1000, 0x1000), Error::Unsupported { .. }));
    let request = Request { vaddr: 0, len: 4096, iova: 4096 };
    assert!(matches!(request.refused(Errno::NOMEM, None, None, None), Error::Exhausted { .. }));
    assert!(request.refused(Errno::INVAL, None, None, None).to_string().contains("no group yet"));
    let wraps = Request { vaddr: 0, len: 8192, iova: 0u64.wrapping_sub(4096) }.refused(Errno::OVERFLOW, None, None, None);
    assert!(matches!(wraps, Error::Map { reason: MapRefused::Aperture { allowed: None }, .. }));
    let wraps = Request { vaddr: 0u64.wrapping_sub(4096), len: 8192, iova: 4096 }.refused(Errno::OVERFLOW, None, None, None);
    assert!(matches!(wraps, Error::Map { reason: MapRefused::BadAddress, .. }));
}

#[test]
fn an_unmap_is_believed_only_with_its_size() {
    let text = |result| confirmed(0x1000, 0x2000, result).unwrap_err().to_string();
    assert_eq!(confirmed(0x1000, 0x2000, Ok(0x2000)).unwrap(), 0x2000);
    assert!(text(Ok(0)).contains("nothing is mapped"));
    assert!(text(Ok(0x1000)).contains("only 0x1000 bytes"));
    assert!(text(Ok(0x3000)).contains("unmapped 0x3000"));
    assert!(text(Err(Errno::INVAL)).contains("whole mappings"));
}
