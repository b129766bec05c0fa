//! Descriptors, addresses and lengths that make no sense.

use vfio_uring_models::{
    device::Device,
    igb::{Cause, spec::*},
};

use crate::support::*;

const NOWHERE: u64 = 0x10;
const COMMAND: u32 = tx::DTYP_DATA << tx::DTYP_SHIFT | tx::DEXT | tx::EOP | tx::RS;

/// Both still work.
fn works(a: &mut Driver, b: &mut Driver) {
    let sent = frame(MAC_B, MAC_A, 100, 0x77);
    a.send(0, &sent);
    settle(a, b);
    assert_eq!(b.receive(0).expect("a packet").bytes, sent);
}

#[test]
fn what_is_sent_from_nowhere() {
    let (mut a, mut b) = two();
    for (address, len) in [(NOWHERE, 60), (u64::MAX - 10, 60), (BASE + MEMORY - 30, 60), (0, 60), (BASE - 1, 2)] {
        let before = a.dropped(Cause::TxMemory);
        a.push(0, address, u64::from(COMMAND | len));
        a.ring(0);
        settle(&mut a, &mut b);
        assert_eq!(a.dropped(Cause::TxMemory), before + 1, "{address:#x}");
        assert!(a.is_done(0), "it is reported all the same");
        assert_eq!(b.receive(0), None);
        works(&mut a, &mut b);
    }
}

#[test]
fn lengths_that_no_packet_has() {
    let (mut a, mut b) = two();
    let kinds = [(0, Cause::TxLength), (13, Cause::TxLength), (9725, Cause::TxLength), (0xffff, Cause::TxLength)];
    for (len, cause) in kinds {
        for command in [COMMAND, tx::EOP | tx::RS] {
            let before = a.dropped(cause);
            a.push(0, DATA, u64::from(command | len));
            a.ring(0);
            settle(&mut a, &mut b);
            assert_eq!(a.dropped(cause), before + 1, "{len}");
            assert!(a.is_done(0));
            works(&mut a, &mut b);
        }
    }
    assert_eq!(a.counters().tx_packets, 8);
}

#[test]
fn a_packet_without_end() {
    let (mut a, mut b) = two();
    for round in 0..20 {
        for _ in 0..60 {
            a.push(0, DATA, u64::from((COMMAND & !tx::EOP) | 9000));
        }
        a.ring(0);
        settle(&mut a, &mut b);
        assert!(a.is_done(0), "{round}");
    }
    assert_eq!(a.counters().tx_packets, 0);
    a.push(0, DATA, u64::from(COMMAND | 60));
    a.ring(0);
    settle(&mut a, &mut b);
    assert_eq!((a.dropped(Cause::TxLength), b.receive(0)), (1, None), "one packet, however long it was");
    works(&mut a, &mut b);
}

#[test]
fn contexts_that_make_no_sense() {
    let (mut a, mut b) = two();
    let bytes = frame(MAC_B, MAC_A, 500, 1);
    let all = tx::IXSM | tx::TXSM;
    let mut send = |a: &mut Driver, context: Option<([u32; 3], u32, u16)>, command: u32, last: u32| {
        if let Some((lengths, kind, mss)) = context {
            a.push_context(0, 0, lengths, kind, mss);
        }
        let before = a.dropped(Cause::Context);
        a.push_packet(0, &bytes, command, last);
        a.ring(0);
        settle(a, &mut b);
        assert_eq!(a.dropped(Cause::Context), before + 1, "{context:?}");
        works(a, &mut b);
    };
    // None given.
    send(&mut a, None, 0, all);
    send(&mut a, None, tx::TSE, 0);
    let tcp = tx::TUCMD_IPV4 | 1 << tx::TUCMD_L4T_SHIFT;
    // Headers beyond the packet.
    send(&mut a, Some(([127, 511, 255], tcp, 0)), 0, all);
    // Segments of nothing, beyond a frame, of headers that are none.
    for (lengths, kind, mss) in [
        ([14, 20, 20], tcp, 0),
        ([14, 20, 20], tcp, 0xffff),
        ([13, 20, 20], tcp, 100),
        ([14, 19, 20], tcp, 100),
        ([14, 20, 19], tcp, 100),
        ([14, 20, 7], tx::TUCMD_IPV4, 100),
        ([14, 20, 20], tx::TUCMD_IPV4 | 2 << tx::TUCMD_L4T_SHIFT, 100),
        ([14, 39, 20], 1 << tx::TUCMD_L4T_SHIFT, 100),
    ] {
        send(&mut a, Some((lengths, kind, mss)), tx::TSE, all);
    }
    // A transport that is reserved; a kind of descriptor that is none.
    send(&mut a, Some(([14, 20, 20], 3 << tx::TUCMD_L4T_SHIFT, 0)), 0, tx::TXSM);
    a.push(0, DATA, u64::from(7 << tx::DTYP_SHIFT | tx::DEXT | tx::EOP | tx::RS | 60));
    let before = a.dropped(Cause::Context);
    a.ring(0);
    settle(&mut a, &mut b);
    assert_eq!(a.dropped(Cause::Context), before + 1);
}

#[test]
fn segments_of_a_byte_are_work_in_small_pieces() {
    let (mut a, mut b) = two();
    b.set(RCTL, 0);
    settle(&mut a, &mut b);
    a.push_context(0, 0, [14, 20, 20], tx::TUCMD_IPV4 | 1 << tx::TUCMD_L4T_SHIFT, 1);
    a.push(0, DATA, u64::from(COMMAND | tx::TSE | 0xffff));
    a.ring(0);
    let mut rounds = 0;
    while !a.is_done(0) {
        assert!(a.nic.service(&mut a.memory) <= 4096);
        rounds += 1;
        assert!(rounds < 100_000);
    }
    // Nobody listens, so the first of them is the last.
    assert_eq!(a.dropped(Cause::NoReceiver), 1);
    b.set(RCTL, rctl::EN | rctl::UPE | rctl::SECRC);
    b.rx_queue_with(0, 64, 2 | 1 << srrctl::DESCTYPE_SHIFT | srrctl::DROP_EN);
    settle(&mut a, &mut b);
    a.push_context(0, 0, [14, 20, 20], tx::TUCMD_IPV4 | 1 << tx::TUCMD_L4T_SHIFT, 1);
    a.push(0, DATA, u64::from(COMMAND | tx::TSE | 0xffff));
    a.ring(0);
    let mut rounds = 0;
    while !a.is_done(0) {
        assert!(a.nic.service(&mut a.memory) <= 1024);
        b.nic.service(&mut b.memory);
        rounds += 1;
        assert!(rounds < 100_000);
    }
    assert_eq!(a.counters().tx_packets, 0xffff - 54);
    assert!(rounds > 100, "{rounds}");
}

#[test]
fn rings_that_are_nowhere_or_none() {
    let (mut a, mut b) = two();
    for (base, len) in
        [(NOWHERE & !0x7f, 1024), (!0x7f, 1024), (BASE + MEMORY, 128), (BASE, 0), (BASE, 0xf_ff80), (BASE, 64)]
    {
        for (rx, driver) in [(false, &mut a), (true, &mut b)] {
            let at = if rx { RX_QUEUES } else { TX_QUEUES };
            for (register, value) in [
                (queue::DCTL, 0),
                (queue::BAL, base as u32),
                (queue::BAH, (base >> 32) as u32),
                (queue::LEN, len),
                (queue::HEAD, 0xffff),
                (queue::DCTL, dctl::ENABLE),
                (queue::TAIL, 5),
            ] {
                driver.set(at + register, value);
            }
        }
        settle(&mut a, &mut b);
        // What arrives has nowhere to go.
        a.tx_queue(0, 16);
        for _ in 0..5 {
            a.send(0, &frame(MAC_B, MAC_A, 60, 1));
            settle(&mut a, &mut b);
        }
        b.rx_queue(0, 16);
        settle(&mut a, &mut b);
        while b.receive(0).is_some() {}
        works(&mut a, &mut b);
    }
    assert!(a.dropped(Cause::TxMemory) > 0 && b.dropped(Cause::RxMemory) + b.dropped(Cause::QueueOff) > 0);
}

#[test]
fn buffers_that_are_nowhere() {
    let (mut a, mut b) = two();
    let ring = b.rx[0];
    b.put_descriptor(&ring, 0, NOWHERE, 0);
    b.put_descriptor(&ring, 2, u64::MAX - 100, 0);
    for i in 0..4 {
        a.send(0, &frame(MAC_B, MAC_A, 200, i));
    }
    settle(&mut a, &mut b);
    assert_eq!(b.dropped(Cause::RxMemory), 2);
    for (index, wrong) in [(0, true), (1, false), (2, true), (3, false)] {
        let [_, high] = b.descriptor(&ring, index);
        assert_eq!(high as u32 & (rx_status::DD | rx_status::EOP), rx_status::DD | rx_status::EOP);
        assert_eq!(high as u32 & rx_status::RXE != 0, wrong);
    }
}

#[test]
fn a_reset_in_mid_flight() {
    for how in 0..4 {
        let (mut a, mut b) = two();
        let sent = frame(MAC_B, MAC_A, 3000, 1);
        a.put(DATA, &sent);
        for round in 0..10 {
            // Half a packet, packets on the wire, and one that waits for descriptors.
            b.rx_queue(0, 8);
            for _ in 0..20 {
                a.send(0, &frame(MAC_B, MAC_A, 60, 1));
            }
            a.push(0, DATA, u64::from(COMMAND & !tx::EOP | 1500));
            a.ring(0);
            a.service();
            b.nic.service(&mut b.memory);
            match how {
                0 => a.set(CTRL, ctrl::RST),
                1 => b.set(CTRL, ctrl::RST),
                2 => a.nic.reset(&mut a.memory),
                _ => (a.set(TCTL, 0), b.set(RCTL, 0)).0,
            }
            a.up();
            b.up();
            a.tx_queue(0, 64);
            settle(&mut a, &mut b);
            b.set(RCTL, 0);
            settle(&mut a, &mut b);
            b.up();
            b.rx_queue(0, 16);
            settle(&mut a, &mut b);
            while b.receive(0).is_some() {}
            a.send(0, &sent);
            settle(&mut a, &mut b);
            assert_eq!(b.receive(0).expect("a packet").bytes, sent, "{how} {round}");
        }
    }
}
