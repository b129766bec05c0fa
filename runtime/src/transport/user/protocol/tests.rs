use proptest::prelude::*;

use super::*;
use crate::transport::user::wire::{CapHeader, SparseMmap, flags};

const PAGE: u64 = 4096;

fn region(flags: u32, size: u64, offset: u64, areas: &[(u64, u64)]) -> Vec<u8> {
    let len = if areas.is_empty() { 32 } else { 48 + areas.len() as u32 * 16 };
    let info = wire::RegionInfo {
        argsz: len.into(),
        flags: flags.into(),
        index: 2.into(),
        cap_offset: if areas.is_empty() { 0 } else { 32 }.into(),
        size: size.into(),
        offset: offset.into(),
    };
    let mut payload = info.as_bytes().to_vec();
    if !areas.is_empty() {
        payload.extend(CapHeader { id: 1.into(), version: 1.into(), next: 0.into() }.as_bytes());
        payload.extend(SparseMmap { nr_areas: (areas.len() as u32).into(), reserved: 0.into() }.as_bytes());
    }
    for (offset, size) in areas {
        payload.extend(SparseArea { offset: (*offset).into(), size: (*size).into() }.as_bytes());
    }
    payload
}

fn areas(payload: &[u8]) -> Result<Vec<(u64, u64)>, String> {
    match parse_region_info(payload, 2, REGION_INFO_ARGSZ, PAGE) {
        Ok(RegionReply::Complete(info)) => Ok(info.areas.iter().map(|area| (area.offset, area.size)).collect()),
        Ok(other) => Err(format!("{other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn type_and_msix_capabilities() {
    let mut payload = region(15, 0x4000, 0, &[(0, 0x1000)]);
    payload[36..40].copy_from_slice(&64u32.to_le_bytes());
    payload.extend(CapHeader { id: 2.into(), version: 1.into(), next: 80.into() }.as_bytes());
    payload.extend(wire::RegionType { kind: 0x8000_8086.into(), subtype: 1.into() }.as_bytes());
    payload.extend(CapHeader { id: 3.into(), version: 1.into(), next: 0.into() }.as_bytes());
    let Ok(RegionReply::Complete(info)) = parse_region_info(&payload, 2, REGION_INFO_ARGSZ, PAGE) else { panic!() };
    assert_eq!((info.type_, info.msix_mappable), (Some((0x8000_8086, 1)), true));
    assert_eq!(info.areas, [Area { offset: 0, size: 0x1000 }]);
    // The last capability is a type without room for it.
    payload[80] = 2;
    let error = parse_region_info(&payload, 2, REGION_INFO_ARGSZ, PAGE).unwrap_err();
    assert!(error.to_string().contains("region 2: its type is cut off"), "{error}");
}

#[test]
fn versions_of_fault_queues() {
    let mut payload = region(15, 0x4000, 0, &[(0, 0x1000)]);
    payload[36..40].copy_from_slice(&64u32.to_le_bytes());
    payload.extend(CapHeader { id: wire::CAP_FAULT.into(), version: 1.into(), next: 80.into() }.as_bytes());
    payload.extend([2u32.to_le_bytes(), [0; 4]].concat());
    payload.extend(CapHeader { id: wire::CAP_FAULT_RESPONSE.into(), version: 1.into(), next: 0.into() }.as_bytes());
    let versions = |payload: &[u8]| match parse_region_info(payload, 2, REGION_INFO_ARGSZ, PAGE) {
        Ok(RegionReply::Complete(info)) => (info.fault_version, info.response_version),
        other => panic!("{other:?}"),
    };
    // One that is cut off is none of ours.
    assert_eq!(versions(&payload), (Some(2), None));
    payload.extend(7u32.to_le_bytes());
    assert_eq!(versions(&payload), (Some(2), Some(7)));
}

#[test]
fn an_interrupt_may_have_a_type() {
    let info = |flags: u32| wire::IrqInfo { argsz: 36.into(), flags: flags.into(), index: 5.into(), count: 1.into() };
    let mut payload = info(1 | IRQ_FLAG_CAPS).as_bytes().to_vec();
    // What says that it has capabilities, and has no room for them, has none.
    assert_eq!(parse_irq_info(&payload, 5).unwrap(), IrqInfo { flags: 0x11, count: 1, type_: None });
    payload.extend(20u32.to_le_bytes());
    assert!(parse_irq_info(&payload, 5).is_err(), "beyond the reply");
    payload.extend(CapHeader { id: wire::CAP_IRQ_TYPE.into(), version: 1.into(), next: 0.into() }.as_bytes());
    let error = parse_irq_info(&payload, 5).unwrap_err().to_string();
    assert!(error.contains("interrupt index 5: its type is cut off"), "{error}");
    payload.extend(wire::RegionType { kind: 1.into(), subtype: 2.into() }.as_bytes());
    assert_eq!(parse_irq_info(&payload, 5).unwrap().type_, Some((1, 2)));
    payload[16] = 19;
    assert!(parse_irq_info(&payload, 5).is_err(), "inside of the structure");
    assert!(parse_irq_info(&payload, 6).is_err());
    payload[4] = 1;
    assert_eq!(parse_irq_info(&payload, 5).unwrap().type_, None);
}

#[test]
fn vectors_that_may_be_added() {
    assert!(IrqInfo { flags: 1, count: 65, type_: None }.is_resizable());
    assert!(!IrqInfo { flags: 9, count: 1, type_: None }.is_resizable());
}

#[test]
fn areas_are_inside_apart_and_at_pages() {
    assert_eq!(areas(&region(7, 0x800, 0, &[])), Ok(vec![(0, 0x800)]));
    assert_eq!(areas(&region(3, 0x800, 0, &[])), Ok(vec![]));
    assert_eq!(areas(&region(7, 0, 0, &[])), Ok(vec![]));
    // Without the flags that go with them the areas don't count.
    assert_eq!(areas(&region(11, 0x4000, 0, &[(0, 0x1000)])), Ok(vec![]));
    assert_eq!(areas(&region(7, 0x4000, 0, &[(0, 0x1000)])), Ok(vec![(0, 0x4000)]));
    let sparse = |offset, list: &[(u64, u64)]| areas(&region(15, 0x4000, offset, list));
    assert_eq!(sparse(0, &[(0x2000, 0x1000), (0, 0x1000), (5, 0)]), Ok(vec![(0, 0x1000), (0x2000, 0x1000)]));
    assert_eq!(sparse(0x800, &[(0x800, 0x100)]), Ok(vec![(0x800, 0x100)]));
    for (offset, list, part) in [
        (0, &[(0x4000, 1)][..], "outside"),
        (0, &[(u64::MAX, 2)], "outside"),
        (0, &[(0, 0x2000), (0x1000, 0x1000)], "overlaps"),
        (0, &[(0x800, 0x100)], "page"),
        (u64::MAX, &[(0x1000, 0x100)], "page"),
        (0, &[(0, 1); 65], "65 sparse areas"),
    ] {
        assert!(sparse(offset, list).is_err_and(|error| error.contains(part)), "{part}");
    }
}

#[test]
fn commands_of_the_server() {
    let write = Header::command(0, command::DMA_WRITE, 20);
    let access = |count: u64| DmaAccess { address: 9.into(), count: count.into() };
    let payload = [access(4).as_bytes(), b"data"].concat();
    assert_eq!(parse_command(&write, &payload, 0), Served::Write { iova: 9, data: b"data" });
    assert_eq!(parse_command(&write, &payload, 1), Served::Refuse(libc::EINVAL as u32));
    assert_eq!(parse_command(&write, &payload[..19], 0), Served::Refuse(libc::EINVAL as u32));
    assert_eq!(parse_command(&write, access(u64::MAX).as_bytes(), 0), Served::Refuse(libc::E2BIG as u32));
    let read = Header::command(0, command::DMA_READ, 16);
    assert_eq!(parse_command(&read, access(1 << 20).as_bytes(), 0), Served::Read { iova: 9, count: 1 << 20 });
    assert_eq!(parse_command(&read, &payload, 0), Served::Refuse(libc::EINVAL as u32));
    assert!(accept_command(&Header::command(0, command::DMA_WRITE, 16 + (1 << 20))).is_ok());
    assert!(accept_command(&Header::command(0, command::DMA_WRITE, 17 + (1 << 20))).is_err());
}

#[test]
fn unmaps_that_were_of_something_else() {
    let echo = wire::DmaUnmap { argsz: 24.into(), flags: 0.into(), address: 0x1000.into(), size: 0x1000.into() };
    assert!(parse_dma_unmap(&[], 0x1000, 0x1000).is_ok() && parse_dma_unmap(echo.as_bytes(), 0x1000, 0x1000).is_ok());
    assert!(parse_dma_unmap(echo.as_bytes(), 0x1000, 0x2000).is_err());
    assert!(parse_dma_unmap(&[0; 23], 0, 0).is_err());
}

proptest! {
    #[test]
    fn nothing_panics_and_what_is_accepted_is_sane(
        payload in proptest::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0..200),
        number in 0u16..18,
        fds in 0usize..3,
    ) {
        let _ = parse_device_info(&payload);
        let _ = parse_irq_info(&payload, 0);
        let _ = parse_dma_unmap(&payload, 0, 0);
        let asked = RegionAccess::default();
        let _ = parse_region_access(&payload, &asked, command::REGION_READ);
        if let Ok(limits) = negotiate(&payload, 64) {
            prop_assert!(limits.max_data_xfer >= 8 && limits.page_size.is_power_of_two());
            prop_assert!((1..=64).contains(&limits.max_outstanding));
        }
        if let Ok((header, rest)) = Header::read_from_prefix(&payload) {
            let expect = Expect::between(number, 4, 32, 1);
            if let Ok(Accepted::Payload(len)) = accept_reply(&header, &expect, fds) {
                prop_assert!((4..=32).contains(&len) && fds <= 1 && header.flags.get() & flags::TYPE_MASK == 1);
            }
            let _ = accept_command(&header);
            let header = Header { command: number.into(), ..header };
            let _ = parse_command(&header, rest, fds);
        }
    }

    #[test]
    fn chains_of_any_bytes(
        flags in 0u32..16,
        size in prop_oneof![Just(0u64), Just(0x4000), any::<u64>()],
        cap_offset in 0u32..80,
        tail in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(16), Just(32), any::<u8>()], 0..128),
    ) {
        let mut payload = region(flags, size, 0, &[]);
        payload[12..16].copy_from_slice(&cap_offset.to_le_bytes());
        payload.extend(tail);
        if let Ok(RegionReply::Complete(info)) = parse_region_info(&payload, 2, REGION_INFO_ARGSZ, PAGE) {
            let mut end = 0;
            for area in &info.areas {
                prop_assert!(area.offset >= end && area.size != 0 && area.size <= info.size - area.offset);
                end = area.offset + area.size;
            }
        }
    }
}
