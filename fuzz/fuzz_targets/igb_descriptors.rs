//! Rings of an igb driver that a hostile NIC writes: any descriptor, anywhere, at any time, while packets are received, kept, sent
//! and dropped.

#![no_main]

use std::{collections::VecDeque, sync::Arc};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_uring::{
    dma::{AddressSpace, Backend, HugePages, IovaRange, Pool, SharedMemory},
    mmio::Register,
    reactor::{Reactor, yield_now},
};
use vfio_uring_igb::{L4, Packet, Parts, QueueSeed, SendError, Tso, TxOffload, spec};

const RING: u16 = 32;
const BUFFERS: usize = 12;
const BUFFER: usize = 1024;
const MAX_LEN: usize = 4000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// The next descriptors, in order: status in the low half, length.
    Receive { status: u32, len: u16, vlan: u16, info: u64, times: u8 },
    /// Plain packets, in order.
    ReceivePlain { len: u16, times: u8 },
    WriteRx { at: u8, words: [u64; 2] },
    WriteTx { at: u8, words: [u64; 2] },
    /// Sent: what the driver asked to be told of, and what not.
    Complete { at: u8, times: u8 },
    Take { max: u8 },
    Send { packets: u8 },
    SendOffloaded { l2: u8, l3: u16, mss: u16, l4_len: u8, kind: u8, vlan: u16, parts: u8, len: u16 },
    Reserve { len: u16 },
    Reclaim,
    Keep,
    Drop { count: u8 },
    Turn,
}

thread_local! {
    static REACTOR: Reactor = Reactor::new().expect("a reactor");
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (stopped, steps) = input;
    REACTOR.with(|reactor| reactor.block_on(run(&steps[..steps.len().min(200)], stopped)));
});

async fn run(steps: &[Step], stopped: bool) {
    let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0x1000, last: u64::MAX >> 16 }], 4096, 64);
    let memory = Pool::new(&space, Parts::memory(RING, RING, BUFFERS, BUFFER), HugePages::No).await.expect("memory");
    let mapping = space.mappings().remove(0);
    let device = SharedMemory::map(mapping.fd.expect("memory of ours"), 0, mapping.len, true).expect("a mapping");
    let doorbells = Arc::new(SharedMemory::create("doorbells", 4096, HugePages::No).expect("a memfd").1);
    let doorbell = |offset| Register::<u32>::new(&doorbells, offset).expect("inside");
    let parts = Parts {
        memory: memory.clone(),
        rx_ring: RING,
        tx_ring: RING,
        buffers: BUFFERS,
        buffer_len: BUFFER,
        max_len: MAX_LEN,
        rx_doorbell: doorbell(0),
        tx_doorbell: doorbell(4),
    };
    let (seed, proof) = QueueSeed::from_parts(parts).expect("a queue");
    let (rx_ring, tx_ring) = seed.iovas();
    let (rx_ring, tx_ring) = (rx_ring - mapping.iova, tx_ring - mapping.iova);
    let (mut rx, mut tx) = seed.start().expect("a reactor");
    let write = |ring: u64, at: u64, word: u64, value: u64| {
        device.store_u64(ring + at % u64::from(RING) * 16 + word * 8, value).expect("inside");
    };
    let (mut taken, mut kept) = (Vec::<Packet>::new(), VecDeque::new());
    let mut next = 0;
    for step in steps {
        match *step {
            Step::Receive { status, len, vlan, info, times } => {
                for _ in 0..times % 40 {
                    write(rx_ring, next, 0, info);
                    write(rx_ring, next, 1, u64::from(status) | u64::from(len) << 32 | u64::from(vlan) << 48);
                    next += 1;
                }
            }
            Step::ReceivePlain { len, times } => {
                for _ in 0..times % 40 {
                    let len = u64::from(len) % (BUFFER as u64 + 2);
                    write(rx_ring, next, 1, spec::rx::DD | spec::rx::EOP | len << 32);
                    next += 1;
                }
            }
            Step::WriteRx { at, words } => (0..2).for_each(|i| write(rx_ring, at.into(), i, words[i as usize])),
            Step::WriteTx { at, words } => (0..2).for_each(|i| write(tx_ring, at.into(), i, words[i as usize])),
            Step::Complete { at, times } => {
                for at in (u64::from(at)..).take(usize::from(times % 33)) {
                    write(tx_ring, at, 1, spec::tx::DD);
                }
            }
            Step::Take { max } => {
                let before = taken.len();
                let count = rx.rx_batch(&mut taken, max.into()).expect("the queue lives");
                assert_eq!(taken.len(), before + count);
                taken[before..].iter().for_each(check);
            }
            Step::Send { packets } => {
                let keep = taken.len().saturating_sub(packets.into());
                let mut batch = taken.split_off(keep);
                let before = batch.len();
                let gone = tx.tx_batch(&mut batch).expect("the queue lives");
                assert_eq!(batch.len(), before - gone);
                taken.append(&mut batch);
            }
            Step::SendOffloaded { l2, l3, mss, l4_len, kind, vlan, parts, len } => {
                let mut packet: Option<Packet> = None;
                for _ in 0..=parts % 18 {
                    let Some(mut part) = tx.buffers().alloc() else { break };
                    part.set_len(usize::from(len).min(part.capacity())).expect("inside");
                    match &mut packet {
                        Some(packet) => packet.append(part),
                        None => packet = Some(part),
                    }
                }
                let Some(mut packet) = packet else { continue };
                packet.set_offload((kind & 1 != 0).then_some(TxOffload {
                    l2_len: l2,
                    l3_len: l3,
                    is_ipv4: kind & 2 != 0,
                    ipv4_checksum: kind & 4 != 0,
                    l4_checksum: [None, Some(L4::Tcp), Some(L4::Udp), Some(L4::Sctp)][usize::from(kind >> 3 & 3)],
                    tso: (kind & 32 != 0).then_some(Tso { mss, l4_len }),
                    vlan: (kind & 64 != 0).then_some(vlan),
                }));
                if let Err(error) = tx.send(packet) {
                    assert!(!matches!(error, SendError::Ended { .. }));
                    kept.push_back(error.into_packet());
                }
            }
            Step::Reserve { len } => {
                if let Some(token) = tx.reserve() {
                    let _ = token.consume(len.into(), |bytes| bytes.fill(1));
                }
            }
            Step::Reclaim => {
                tx.reclaim_into(&mut taken);
            }
            Step::Keep => kept.extend(taken.pop()),
            Step::Drop { count } => drop(kept.drain(..kept.len().min(count.into()))),
            Step::Turn => yield_now().await,
        }
    }
    yield_now().await;
    taken.iter().chain(&kept).for_each(check);
    if stopped {
        proof.quiesced();
        yield_now().await;
    }
    // Every buffer is in one place: all that was in none of ours is counted.
    let held: usize = taken.iter().chain(&kept).map(|packet| packet.segments().count()).sum();
    drop((rx, tx, proof));
    yield_now().await;
    let stats = memory.stats();
    assert_eq!(stats.free + stats.quarantined + 4096 * held as u64, stats.bytes);
    assert!(!stopped || stats.quarantined == 0);
    drop((taken, kept));
    let stats = memory.stats();
    assert_eq!(stats.free + stats.quarantined, stats.bytes);
}

/// What can be read of a packet is in its buffers.
fn check(packet: &Packet) {
    let mut bytes = 0;
    for segment in packet.segments() {
        assert!(segment.len() <= BUFFER);
        bytes += segment.iter().fold(0, |count, byte| std::hint::black_box(byte).count_zeros().min(0) as usize + count + 1);
    }
    assert_eq!(bytes, packet.len());
    let _ = (packet.rss(), packet.vlan(), packet.checksums(), packet.packet_type());
}
