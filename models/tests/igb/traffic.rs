//! Packets from one NIC to the other.

use vfio_uring_models::{
    device::Device,
    igb::{Cause, Wire, spec::*},
};

use crate::support::*;

#[test]
fn packets_of_all_sizes() {
    let (mut a, mut b) = two();
    for (i, len) in [60, 61, 63, 64, 65, 128, 512, 1514, 2047, 2048, 2049, 4096, 6000, 9000, 9724].into_iter().enumerate() {
        for back in [false, true] {
            let (one, other, to) = if back { (&mut b, &mut a, MAC_A) } else { (&mut a, &mut b, MAC_B) };
            let sent = frame(to, [2, 0, 0, 0, 0, 1], len, i as u8);
            one.send(0, &sent);
            one.service();
            assert!(one.is_done(0));
            other.service();
            let got = other.receive(0).expect("a packet");
            assert_eq!(got.bytes, sent);
            assert_eq!(u64::from(got.descriptors), (len as u64).div_ceil(BUFFER));
            assert_eq!(got.status & 0xff, rx_status::DD | rx_status::EOP);
            assert_eq!(other.receive(0), None);
        }
    }
    assert_eq!((a.counters().rx_packets, a.counters().tx_packets), (15, 15));
    assert_eq!(a.counters().drops, [0; Cause::ALL.len()]);
}

#[test]
fn short_packets_are_padded() {
    let (mut a, mut b) = two();
    let sent = frame(MAC_B, MAC_A, 20, 1);
    a.send(0, &sent);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!(got.bytes.len(), 60);
    assert_eq!(got.bytes[..20], sent);
    assert!(got.bytes[20..].iter().all(|&byte| byte == 0));
    // Without padding they do not arrive.
    a.set(TCTL, tctl::EN);
    a.send(0, &sent);
    settle(&mut a, &mut b);
    assert_eq!((b.receive(0), b.dropped(Cause::Length), b.get(0x40a4)), (None, 1, 1));
}

#[test]
fn rings_wrap_and_registers_follow() {
    let (mut a, mut b) = two();
    for queue in [0, 5, 15] {
        a.tx_queue(queue, 8);
    }
    b.rx_queue(0, 8);
    for i in 0..100u32 {
        let queue = [0, 5, 15][(i % 3) as usize];
        let sent = frame(MAC_B, MAC_A, 60 + i as usize * 40, i as u8);
        a.send(queue, &sent);
        settle(&mut a, &mut b);
        assert_eq!(b.receive(0).unwrap().bytes, sent, "{i}");
        assert_eq!(a.queue_register(false, queue, queue::HEAD), a.tx[queue].tail);
        assert_eq!(b.queue_register(true, 0, queue::HEAD), b.rx[0].next);
    }
}

#[test]
fn a_packet_in_several_descriptors() {
    let (mut a, mut b) = two();
    let sent = frame(MAC_B, MAC_A, 5000, 3);
    a.put(DATA, &sent);
    let mut at = 0;
    for (i, len) in [14usize, 1, 985, 0, 2000, 2000].into_iter().enumerate() {
        let end = if i == 5 { tx::EOP | tx::RS } else { 0 };
        let command = len as u32 | tx::DTYP_DATA << tx::DTYP_SHIFT | tx::DEXT | end;
        a.push(0, DATA + at as u64, 5000 << 46 | u64::from(command));
        at += len;
        // One after the other: a packet may be begun before it is there as a whole.
        a.ring(0);
        a.service();
        b.service();
        assert_eq!(b.descriptor(&b.rx[0], 0)[1] & 1 != 0, i == 5);
    }
    assert_eq!(b.receive(0).unwrap().bytes, sent);
    assert!(a.is_done(0));
    assert_eq!(a.descriptor(&a.tx[0], 0)[1] >> 32 & 1, 0, "only what asks for it is reported");
}

#[test]
fn legacy_descriptors() {
    let (mut a, mut b) = two();
    b.rx_queue_with(0, 16, 0);
    b.set(CTRL, ctrl::VME | ctrl::SLU);
    b.set(RXCSUM, rxcsum::TUOFL);
    let sent = frame(MAC_B, MAC_A, 3000, 9);
    a.put(DATA, &sent);
    // The sum from byte 14 on, at byte 20, and a tag.
    let command = 0x1400u32 << 8 | tx::IC | tx::VLE | tx::EOP | tx::RS | 3000;
    a.push(0, DATA, u64::from(0x2123u32 << 16 | 14 << 8) << 32 | u64::from(command));
    a.ring(0);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!((got.bytes.len(), got.descriptors, got.vlan), (3000, 2, 0x2123));
    assert_eq!(got.status & (rx_status::VP | rx_status::IXSM), rx_status::VP | rx_status::IXSM);
    let sum = |bytes: &[u8]| {
        let sum: u32 =
            bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        (folded + (folded >> 16)) as u16
    };
    let mut expected = sent.clone();
    expected[20..22].copy_from_slice(&(!sum(&sent[14..])).to_be_bytes());
    assert_eq!(got.bytes, expected);
    // The packet checksum, of all.
    let [_, high] = b.descriptor(&b.rx[0], 1);
    assert_eq!((high >> 16) as u16, sum(&expected));
    // RCTL has the size of buffers where SRRCTL has none.
    b.set(RCTL, rctl::EN | rctl::LPE | rctl::SECRC | 2 << rctl::BSIZE_SHIFT);
    b.rx_queue_with(0, 16, 0);
    let sent = frame(MAC_B, MAC_A, 1500, 1);
    a.send(0, &sent);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!((got.bytes, got.descriptors), (sent, 3));
}

#[test]
fn the_crc_is_there_where_it_is_not_stripped() {
    let (mut a, mut b) = two();
    b.set(RCTL, rctl::EN | rctl::BAM);
    a.send(0, &[0xff; 60]);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!(got.bytes.len(), 64);
    // The CRC of a frame with its CRC behind it is this, always.
    let residue = !got.bytes.iter().fold(!0u32, |mut crc, &byte| {
        crc ^= u32::from(byte);
        (0..8).for_each(|_| crc = if crc & 1 != 0 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 });
        crc
    });
    assert_eq!(residue, 0x2144_df1c);
}

#[test]
fn filters() {
    let (mut a, mut b) = two();
    let arrives = |a: &mut Driver, b: &mut Driver, to: [u8; 6]| {
        a.send(0, &frame(to, MAC_A, 60, 0));
        settle(a, b);
        b.receive(0).map(|got| got.status & rx_status::PIF != 0)
    };
    const OTHER: [u8; 6] = [2, 9, 9, 9, 9, 9];
    const GROUP: [u8; 6] = [0x01, 0, 0x5e, 0x12, 0x34, 0x56];
    assert_eq!(arrives(&mut a, &mut b, MAC_B), Some(false));
    assert_eq!(arrives(&mut a, &mut b, [0xff; 6]), Some(false));
    assert_eq!(arrives(&mut a, &mut b, OTHER), None);
    assert_eq!(arrives(&mut a, &mut b, GROUP), None);
    assert_eq!(b.dropped(Cause::Filtered), 2);
    // The last of 24 addresses; then without its valid bit.
    b.set(RAL16 + 7 * 8, u32::from_le_bytes([2, 9, 9, 9]));
    b.set(RAL16 + 7 * 8 + 4, 1 << 31 | 0x0909);
    assert_eq!(arrives(&mut a, &mut b, OTHER), Some(false));
    b.set(RAL16 + 7 * 8 + 4, 0x0909);
    assert_eq!(arrives(&mut a, &mut b, OTHER), None);
    // Multicast by the hash of 12 bits at each of its places.
    let control = rctl::EN | rctl::LPE | rctl::SECRC;
    for (offset, shift) in [(0, 4), (1, 3), (2, 2), (3, 0)] {
        let hash = (u32::from(GROUP[4]) >> shift | u32::from(GROUP[5]) << (8 - shift)) & 0xfff;
        b.set(RCTL, control | offset << rctl::MO_SHIFT);
        b.set(MTA + u64::from(hash >> 5) * 4, 1 << (hash & 31));
        assert_eq!(arrives(&mut a, &mut b, GROUP), Some(true), "{offset}");
        b.set(MTA + u64::from(hash >> 5) * 4, 0);
        assert_eq!(arrives(&mut a, &mut b, GROUP), None, "{offset}");
    }
    for (bit, to, not) in [(rctl::UPE, OTHER, GROUP), (rctl::MPE, GROUP, OTHER), (rctl::BAM, [0xff; 6], GROUP)] {
        b.set(RCTL, control | bit);
        assert_eq!(arrives(&mut a, &mut b, to), Some(false));
        assert_eq!(arrives(&mut a, &mut b, not), None);
    }
    assert_eq!(b.get(0x407c), 5, "MPRC: what passed of multicasts");
}

#[test]
fn vlans() {
    let (mut a, mut b) = two();
    let plain = frame(MAC_B, MAC_A, 100, 5);
    let tagged = [&plain[..12], &[0x81, 0, 0x61, 0x23], &plain[12..]].concat();
    let arrives = |a: &mut Driver, b: &mut Driver, bytes: &[u8]| {
        a.send(0, bytes);
        settle(a, b);
        b.receive(0)
    };
    let got = arrives(&mut a, &mut b, &tagged).unwrap();
    assert_eq!((&got.bytes, got.vlan, got.status & rx_status::VP), (&tagged, 0, 0), "not stripped");
    b.set(CTRL, ctrl::SLU | ctrl::VME);
    let got = arrives(&mut a, &mut b, &tagged).unwrap();
    assert_eq!((&got.bytes, got.vlan, got.status & rx_status::VP), (&plain, 0x6123, rx_status::VP));
    assert_eq!(arrives(&mut a, &mut b, &plain).unwrap().status & rx_status::VP, 0);
    // The sender inserts.
    a.push_context(0, 0x2abc, [14, 20, 20], 0, 0);
    a.push_packet(0, &plain, tx::VLE, 0);
    a.ring(0);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!((&got.bytes, got.vlan), (&plain, 0x2abc));
    // The filter knows some.
    b.set(RCTL, rctl::EN | rctl::LPE | rctl::SECRC | rctl::VFE);
    assert_eq!(arrives(&mut a, &mut b, &tagged), None);
    assert!(arrives(&mut a, &mut b, &plain).is_some(), "what has no tag passes");
    b.set(VFTA + 4 * (0x123 >> 5), 1 << (0x123 & 31));
    assert!(arrives(&mut a, &mut b, &tagged).is_some());
    // The largest packet may have a tag too.
    b.set(RCTL, rctl::EN | rctl::SECRC);
    for (len, fits) in [(1514, true), (1515, false)] {
        let plain = frame(MAC_B, MAC_A, len, 1);
        let tagged = [&plain[..12], &[0x81, 0, 0, 1], &plain[12..]].concat();
        assert_eq!(arrives(&mut a, &mut b, &plain).is_some(), fits);
        assert_eq!(arrives(&mut a, &mut b, &tagged).is_some(), fits);
    }
    assert_eq!(b.get(0x40ac), 2, "ROC");
}

#[test]
fn long_packets_end_at_rlpml() {
    let (mut a, mut b) = two();
    b.set(RLPML, 3004);
    for (len, fits) in [(3000, true), (3001, false)] {
        a.send(0, &frame(MAC_B, MAC_A, len, 1));
        settle(&mut a, &mut b);
        assert_eq!(b.receive(0).is_some(), fits);
    }
    assert_eq!(b.dropped(Cause::Length), 1);
}

#[test]
fn statistics_clear_when_read() {
    let (mut a, mut b) = two();
    for (len, to) in [(60, MAC_B), (200, [0xff; 6]), (1514, MAC_B), (9000, MAC_B)] {
        a.send(0, &frame(to, MAC_A, len, 1));
        settle(&mut a, &mut b);
        b.receive(0).unwrap();
    }
    let bytes = 60 + 200 + 1514 + 9000 + 4 * 4;
    // GPRC, BPRC, MPRC, PRC64, PRC255, PRC1522, TPR; then sent.
    for (at, count) in [(0x74, 4), (0x78, 1), (0x7c, 0), (0x5c, 1), (0x64, 1), (0x70, 2), (0xd0, 4)] {
        assert_eq!(b.get(STATISTICS + at), count, "{at:#x}");
        assert_eq!(b.get(STATISTICS + at), 0, "{at:#x}");
    }
    for (at, count) in [(0x80, 4), (0xf4, 1), (0xf0, 0), (0xd8, 1), (0xd4, 4)] {
        assert_eq!(a.get(STATISTICS + at), count, "{at:#x}");
    }
    assert_eq!((b.get(0x4088), b.get(0x4088), b.get(0x408c), b.get(0x4088)), (bytes, bytes, 0, 0), "GORC by its high half");
    assert_eq!(a.get(0x4090), bytes, "GOTC");
}

#[test]
fn no_descriptors() {
    let (a, b) = Wire::peers(32).unwrap();
    let (mut a, mut b) = (Driver::new(config(MAC_A, a)), Driver::new(config(MAC_B, b)));
    for driver in [&mut a, &mut b] {
        driver.up();
        driver.tx_queue(0, 256);
    }
    let drop = 2 | 1 << srrctl::DESCTYPE_SHIFT | srrctl::DROP_EN;
    b.rx_queue_with(0, 16, drop);
    for _ in 0..20 {
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    }
    settle(&mut a, &mut b);
    assert_eq!((b.counters().rx_packets, b.dropped(Cause::NoDescriptors), b.get(0x40a0)), (15, 5, 5));

    // A queue that waits makes the sender wait, with flow control; nothing is lost.
    b.rx_queue(0, 16);
    let before = b.counters().rx_packets;
    for i in 0..200 {
        a.send(0, &frame(MAC_B, MAC_A, 60, i as u8));
    }
    settle(&mut a, &mut b);
    assert_eq!(b.counters().rx_packets - before, 15);
    assert_ne!(a.get(STATUS) & status::TXOFF, 0);
    for i in 0..200 {
        settle(&mut a, &mut b);
        assert_eq!(b.receive(0).unwrap().bytes, frame(MAC_B, MAC_A, 60, i as u8), "{i}");
    }
    settle(&mut a, &mut b);
    assert_eq!(a.get(STATUS) & status::TXOFF, 0);
    assert_eq!(a.counters().drops, [0; Cause::ALL.len()]);

    // Without, the wire drops what is too much.
    a.set(CTRL, ctrl::SLU);
    for _ in 0..100 {
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    }
    settle(&mut a, &mut b);
    let lost = 100 - 32;
    assert_eq!(a.dropped(Cause::WireFull), lost);
    assert_eq!(u64::from(b.get(0x4010)), lost, "MPC");
    // A packet that needs more than a ring has is never waited for.
    b.rx_queue(0, 8);
    settle(&mut a, &mut b);
    while b.receive(0).is_some() {
        settle(&mut a, &mut b);
    }
    b.set(RCTL, rctl::EN | rctl::LPE | rctl::SECRC | 3 << rctl::BSIZE_SHIFT);
    b.rx_queue_with(0, 8, 1 << srrctl::DESCTYPE_SHIFT);
    let before = b.dropped(Cause::NoDescriptors);
    a.send(0, &frame(MAC_B, MAC_A, 2048, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.dropped(Cause::NoDescriptors) - before, 1);
}

#[test]
fn links_go_down_and_up() {
    let (mut a, mut b) = two();
    assert!(a.get(STATUS) & b.get(STATUS) & status::LU != 0);
    // From either end, both see it.
    for pull in [0, 1] {
        [&a.handle, &b.handle][pull].set_link(false);
        settle(&mut a, &mut b);
        settle(&mut a, &mut b);
        assert_eq!((a.get(STATUS) | b.get(STATUS)) & status::LU, 0);
        assert!(a.get(ICR) & b.get(ICR) & icr::LSC != 0);
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
        settle(&mut a, &mut b);
        assert!(a.is_done(0), "nothing hangs");
        assert_eq!((b.receive(0), a.dropped(Cause::NoReceiver)), (None, pull as u64 + 1));
        [&a.handle, &b.handle][pull].set_link(true);
        settle(&mut a, &mut b);
        settle(&mut a, &mut b);
        assert!(a.get(STATUS) & b.get(STATUS) & status::LU != 0);
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
        settle(&mut a, &mut b);
        assert!(b.receive(0).is_some());
    }
    // Nobody looks after the other NIC meanwhile.
    b.handle.set_link(false);
    a.service();
    assert_eq!(a.get(STATUS) & status::LU, 0);
    b.handle.set_link(true);
    settle(&mut a, &mut b);
    settle(&mut a, &mut b);
    // The PHY can be powered down, and a NIC can go away.
    b.set(MDIC, 1 << 26 | 1 << 21 | 0x1940);
    settle(&mut a, &mut b);
    assert_eq!(a.get(STATUS) & status::LU, 0);
    b.set(MDIC, 1 << 26 | 1 << 21 | 0x1140);
    settle(&mut a, &mut b);
    assert_ne!(a.get(STATUS) & status::LU, 0);
    drop(b);
    a.service();
    assert_eq!(a.get(STATUS) & status::LU, 0);
}

#[test]
fn queues_by_the_mapping() {
    let (mut a, mut b) = two();
    let area = a.nic.region(0).mappable.unwrap().memory;
    let sent = frame(MAC_B, MAC_A, 500, 1);
    a.push_packet(0, &sent, 0, 0);
    area.store_u32(TX_QUEUES - RX_QUEUES + queue::TAIL, a.tx[0].tail).unwrap();
    settle(&mut a, &mut b);
    assert_eq!(b.receive(0).unwrap().bytes, sent);
    assert_eq!(area.load_u32(TX_QUEUES - RX_QUEUES + queue::HEAD), Ok(1));
    // A whole queue, set up in the mapping.
    a.tx_queue(7, 64);
    let at = TX_QUEUES - RX_QUEUES + 7 * QUEUE_STRIDE;
    let length = area.load_u32(at + queue::LEN).unwrap();
    a.set(RX_QUEUES + at + queue::DCTL, 0);
    area.store_u32(at + queue::LEN, length).unwrap();
    area.store_u32(at + queue::DCTL, dctl::ENABLE).unwrap();
    a.push_packet(7, &sent, 0, 0);
    area.store_u32(at + queue::TAIL, a.tx[7].tail).unwrap();
    settle(&mut a, &mut b);
    assert_eq!(b.receive(0).unwrap().bytes, sent);
    // A tail that is none is not taken.
    area.store_u32(at + queue::TAIL, 64).unwrap();
    assert_eq!(a.service(), 0);
}
