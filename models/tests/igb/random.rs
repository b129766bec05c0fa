//! Writes of anything anywhere: nothing panics, nothing hangs, and a reset always leads back to a NIC that works.

use proptest::prelude::*;
use vfio_uring_models::{
    device::{Device, region},
    igb::{Wire, spec::*},
};

use crate::support::*;

/// Offsets that are mostly registers.
fn offset() -> impl Strategy<Value = u64> {
    const KNOWN: [u64; 36] = [
        CTRL, STATUS, EECD, EERD, CTRL_EXT, MDIC, VET, ICR, ICS, IMS, IMC, IAM, GPIE, EICS, EIMS, EIMC, EIAC, EIAM, EICR,
        EITR, IVAR, IVAR_MISC, RCTL, TCTL, RXCSUM, RLPML, MTA, RAL, RAH, RAL16, VFTA, MRQC, RETA, RSSRK, SWSM, SW_FW_SYNC,
    ];
    prop_oneof![
        4 => proptest::sample::select(&KNOWN[..]),
        4 => (0..4u64, 0..16u64).prop_map(|(queue, register)| RX_QUEUES + queue * QUEUE_STRIDE + register * 4),
        4 => (0..4u64, 0..16u64).prop_map(|(queue, register)| TX_QUEUES + queue * QUEUE_STRIDE + register * 4),
        1 => (0..0x8000u64).prop_map(|dword| dword * 4),
    ]
}

/// Values that are mostly small, or addresses, or single bits.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0..256u32,
        (0..32u32).prop_map(|bit| 1 << bit),
        Just(!0),
        (0..0x1000u32).prop_map(|page| page * 0x1000)
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Set(u64, u32),
    Get(u64),
    Mapped(u64, u32),
    Config(u64, u32),
    Odd(u32, u64, usize),
    /// A descriptor in the ring of a queue, and its tail.
    Send(usize, u64, u64),
    Receive(u64),
    Bytes(u64, Vec<u8>),
    Service,
    Link(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![8 => BASE..BASE + MEMORY, 1 => any::<u64>()];
    let high = (any::<u32>(), prop_oneof![0..3000u32, any::<u32>()], 0..5u32).prop_map(|(last, command, kind)| {
        let command = match kind {
            0 => command,
            1 => command & 0xff0f_ffff | tx::DEXT | tx::DTYP_CONTEXT << tx::DTYP_SHIFT,
            2 => command & 0xffff | tx::EOP | tx::RS,
            _ => command & 0xe80f_3fff | tx::DEXT | tx::EOP | tx::DTYP_DATA << tx::DTYP_SHIFT,
        };
        u64::from(last) << 32 | u64::from(command)
    });
    prop_oneof![
        6 => (offset(), value()).prop_map(|(offset, value)| Step::Set(offset, value)),
        2 => offset().prop_map(Step::Get),
        1 => (0..0x1000u64, value()).prop_map(|(dword, value)| Step::Mapped(dword * 4, value)),
        1 => (0..0x400u64, value()).prop_map(|(dword, value)| Step::Config(dword * 4, value)),
        1 => (0..9u32, 0..0x2_0000u64, 0..64usize).prop_map(|(index, offset, len)| Step::Odd(index, offset, len)),
        8 => (0..3usize, address.clone(), high).prop_map(|(queue, low, high)| Step::Send(queue, low, high)),
        2 => address.clone().prop_map(Step::Receive),
        2 => (BASE..BASE + MEMORY - 64, proptest::collection::vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Step::Bytes(at, bytes)),
        8 => Just(Step::Service),
        1 => any::<bool>().prop_map(Step::Link),
    ]
}

fn run(a: &mut Driver, b: &mut Driver, step: Step) {
    match step {
        Step::Set(offset, value) => a.set(offset, value),
        Step::Get(offset) => drop(a.get(offset)),
        Step::Mapped(at, value) => a.nic.region(0).mappable.unwrap().memory.store_u32(at, value).unwrap(),
        Step::Config(at, value) => {
            a.nic.write(region::CONFIG, at, &value.to_le_bytes(), &mut a.memory).unwrap();
        }
        Step::Odd(index, offset, len) => {
            let size = a.nic.region(index).size;
            if offset + len as u64 <= size {
                let mut bytes = vec![0xa5; len];
                let _ = a.nic.read(index, offset, &mut bytes, &mut a.memory);
                let _ = a.nic.write(index, offset, &bytes, &mut a.memory);
            }
        }
        Step::Send(queue, low, high) => {
            a.push(queue, low, high);
            a.ring(queue);
        }
        Step::Receive(address) => {
            let ring = a.rx[0];
            a.put_descriptor(&ring, ring.tail, address, 0);
            a.rx[0].tail = (ring.tail + 1) % ring.size;
            a.set(RX_QUEUES + queue::TAIL, a.rx[0].tail);
            b.send(0, &frame([0xff; 6], MAC_B, 60 + address as usize % 9000, 1));
        }
        Step::Bytes(at, bytes) => a.put(at, &bytes),
        Step::Service => {
            a.nic.service(&mut a.memory);
            b.nic.service(&mut b.memory);
            let _ = a.nic.rest();
        }
        Step::Link(up) => a.handle.set_link(up),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn anything(steps in proptest::collection::vec(step(), 1..400), direct: bool) {
        let (wire_a, wire_b) = Wire::peers(16).unwrap();
        let (mut a, mut b) = (Driver::with(config(MAC_A, wire_a), direct), Driver::new(config(MAC_B, wire_b)));
        let ready = |a: &mut Driver, b: &mut Driver| {
            for driver in [a, b] {
                driver.up();
                driver.rx_queue(0, 32);
                (0..3).for_each(|queue| driver.tx_queue(queue, 32));
            }
        };
        ready(&mut a, &mut b);
        for step in steps {
            run(&mut a, &mut b, step);
        }
        settle(&mut a, &mut b);
        // A reset leads back to where all began.
        a.handle.set_link(true);
        for driver in [&mut a, &mut b] {
            driver.nic.reset(&mut driver.memory);
        }
        settle(&mut a, &mut b);
        ready(&mut a, &mut b);
        settle(&mut a, &mut b);
        for back in [false, true] {
            let (one, other, to) = if back { (&mut b, &mut a, MAC_A) } else { (&mut a, &mut b, MAC_B) };
            let sent = frame(to, [2, 0, 0, 0, 0, 1], 777, 7);
            one.send(0, &sent);
            settle(one, other);
            prop_assert_eq!(other.receive(0).map(|got| got.bytes), Some(sent));
        }
    }
}
