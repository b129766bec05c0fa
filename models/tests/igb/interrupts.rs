//! Causes, masks, vectors and moderation.

use std::time::{Duration, Instant};

use vfio_uring_models::{device::Device, igb::spec::*};

use crate::support::*;

/// As Linux sets MSI-X up: vector 0 for other causes, 1 for receiving, 2 for sending on queue 0; 3 for both on queue 9.
fn vectors(driver: &mut Driver) {
    // The link has come up.
    assert_eq!(driver.get(ICR), icr::LSC);
    driver.set(GPIE, gpie::MULTIPLE_MSIX | 1 << 31 | gpie::EIAME | gpie::NSICR);
    driver.set(IVAR_MISC, 0x80 << 8);
    driver.set(IVAR, 0x8281);
    driver.set(IVAR + 4, 0x8383 << 16);
    driver.set(EIAC, 0x0f);
    driver.set(EIAM, 0x0f);
    driver.set(EIMS, 0x0f);
    driver.set(IMS, icr::LSC);
}

#[test]
fn each_queue_has_its_vector() {
    let (mut a, mut b) = two();
    vectors(&mut a);
    vectors(&mut b);
    b.tx_queue(9, 16);
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!([0, 1, 2, 3].map(|vector| a.memory.taken(vector)), [0, 0, 1, 0]);
    assert_eq!([0, 1, 2, 3].map(|vector| b.memory.taken(vector)), [0, 1, 0, 0]);
    assert_eq!((b.get(EICR), b.get(EIMS)), (0, 0x0d), "cleared and masked by itself");
    // Masked: it stays until it is enabled.
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.memory.taken(1), 0);
    b.set(EIMS, 2);
    assert_eq!(b.memory.taken(1), 1);
    b.set(EIMS, 2);
    assert_eq!(b.memory.taken(1), 0);
    b.send(9, &frame(MAC_A, MAC_B, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.memory.taken(3), 1);
    assert_eq!((b.counters().interrupts, b.get(0x4100)), (3, 3), "IAC");
    // Only what asks for a report is reported.
    let ring = a.tx[0].tail;
    a.set(EIMS, 4);
    a.memory.signals.clear();
    a.push(0, a.tx_buffer(ring), u64::from(60 | tx::DTYP_DATA << tx::DTYP_SHIFT | tx::DEXT | tx::EOP));
    a.ring(0);
    settle(&mut a, &mut b);
    assert_eq!(a.memory.taken(2), 0);
}

#[test]
fn other_causes() {
    let (mut a, mut b) = two();
    vectors(&mut a);
    a.set(ICS, icr::LSC);
    assert_eq!(a.memory.taken(0), 1);
    assert_eq!((a.get(ICR) & icr::LSC, a.get(ICR)), (icr::LSC, 0));
    a.set(EIMS, 1);
    assert_eq!(a.memory.taken(0), 0, "nothing new");
    b.handle.set_link(false);
    settle(&mut a, &mut b);
    settle(&mut a, &mut b);
    assert_eq!(a.memory.taken(0), 1);
    assert_eq!(a.get(0xc0) & icr::LSC, icr::LSC, "by its old place, too");
    // Not masked, not reported; reported when the mask goes.
    a.set(EIMS, 1);
    a.set(IMC, icr::LSC);
    a.set(ICS, icr::LSC);
    assert_eq!(a.memory.taken(0), 0);
    a.set(IMS, icr::LSC);
    assert_eq!(a.memory.taken(0), 1);
    // Software causes of vectors.
    a.set(EICS, 0b110);
    assert_eq!([1, 2].map(|vector| a.memory.taken(vector)), [1, 1]);
    a.set(EICS, !0);
    assert_eq!(a.memory.taken(3), 1);
    assert_eq!(a.get(EICR) >> 25, 0, "there are 25");
}

#[test]
fn without_automatic_clearing() {
    let (mut a, mut b) = two();
    vectors(&mut b);
    b.set(EIAC, 0);
    b.set(EIAM, 0);
    for expected in [1, 1] {
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
        settle(&mut a, &mut b);
        assert_eq!(b.memory.taken(1), expected);
    }
    assert_eq!((b.get(EIMS) & 2, b.get(EICR)), (2, 2));
    assert_eq!(b.get(EICR), 0, "a read clears");
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    b.set(EICR, 2);
    assert_eq!(b.get(EICR), 0, "a write of ones clears");
}

#[test]
fn one_message() {
    let (mut a, mut b) = two();
    b.set(IMS, icr::RXDW | icr::TXDW | icr::LSC);
    b.set(IAM, icr::RXDW | icr::TXDW);
    b.set(CTRL_EXT, ctrl_ext::IAME);
    b.memory.messages = 0;
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!((b.memory.messages, b.memory.signals.len()), (1, 0));
    let cause = b.get(ICR);
    assert_eq!(cause & (icr::INTA | icr::RXDW), icr::INTA | icr::RXDW);
    assert_eq!(b.get(IMS), icr::LSC, "masked by reading the cause");
    assert_eq!(b.get(ICR), 0);
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.memory.messages, 1);
    b.set(IMS, icr::RXDW);
    assert_eq!(b.memory.messages, 2);
    // A cause that is not asserted stays when it is read, until nothing is enabled.
    b.get(ICR);
    b.set(IMS, icr::LSC);
    b.set(ICS, icr::TXDW);
    assert_eq!((b.get(ICR), b.get(ICR)), (icr::TXDW, icr::TXDW));
    b.set(ICR, icr::TXDW);
    assert_eq!(b.get(ICR), 0);
}

#[test]
fn moderation() {
    let (mut a, mut b) = two();
    vectors(&mut b);
    b.set(EIAM, 0);
    // 8 ms between two.
    b.set(EITR + 4, 8000 << 2 | 1 << 31);
    assert_eq!(b.get(EITR + 4), (8000 << 2) & 0x7fff_ffff);
    let start = Instant::now();
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.memory.taken(1), 1);
    let mut count = 0;
    while count < 3 {
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
        settle(&mut a, &mut b);
        b.receive(0).unwrap();
        count += b.memory.taken(1);
        assert!(start.elapsed() < Duration::from_secs(60), "interrupts that never come");
    }
    assert!(start.elapsed() >= Duration::from_millis(24), "too often");
    // One that waits is not forgotten, and the server is told how long it may sleep.
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    if b.memory.taken(1) == 0 {
        assert!(b.nic.rest().at_most.is_some_and(|time| time <= Duration::from_millis(8)));
        while b.memory.taken(1) == 0 {
            b.service();
            assert!(start.elapsed() < Duration::from_secs(60), "an interrupt that never comes");
        }
    }
    // A write without bit 31 ends the wait.
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    b.set(EITR + 4, 0);
    b.memory.taken(1);
    a.send(0, &frame(MAC_B, MAC_A, 60, 1));
    settle(&mut a, &mut b);
    assert_eq!(b.memory.taken(1), 1);
}

#[test]
fn the_head_is_written_back() {
    let (mut a, mut b) = two();
    a.put(DATA, &[0xff; 4]);
    a.set(TX_QUEUES + queue::WBAL, DATA as u32 | 1);
    a.set(TX_QUEUES + queue::WBAH, (DATA >> 32) as u32);
    for i in 1..=3u32 {
        a.send(0, &frame(MAC_B, MAC_A, 60, 1));
        settle(&mut a, &mut b);
        assert_eq!(a.bytes(DATA, 4), i.to_le_bytes());
    }
}
