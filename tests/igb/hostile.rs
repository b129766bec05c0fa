//! A NIC that writes what it likes into the rings.

use std::sync::Arc;

use vfio_uring::{
    dma::{AddressSpace, Backend, HugePages, IovaRange, Pool, SharedMemory},
    mmio::Register,
    reactor::{Idle, Reactor, yield_now},
};
use vfio_uring_igb::{Packet, Parts, Proof, QueueSeed, RxQueue, TxOffload, TxQueue, spec::rx, spec::tx};

use crate::support::run;

const RING: u16 = 32;
const BUFFERS: usize = 40;
const BUFFER: usize = 2048;

struct Rig {
    rx: RxQueue,
    tx: TxQueue,
    proof: Proof,
    memory: SharedMemory,
    pool: Pool,
    rx_ring: u64,
    tx_ring: u64,
    doorbells: Arc<SharedMemory>,
}

async fn rig() -> Rig {
    let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0x1000, last: u64::MAX >> 16 }], 4096, 64);
    let pool = Pool::new(&space, Parts::memory(RING, RING, BUFFERS, BUFFER), HugePages::No).await.unwrap();
    let mapping = space.mappings().remove(0);
    let memory = SharedMemory::map(mapping.fd.unwrap(), 0, mapping.len, true).unwrap();
    let doorbells = Arc::new(SharedMemory::create("doorbells", 4096, HugePages::No).unwrap().1);
    let parts = Parts {
        memory: pool.clone(),
        rx_ring: RING,
        tx_ring: RING,
        buffers: BUFFERS,
        buffer_len: BUFFER,
        max_len: 9000,
        rx_doorbell: Register::new(&doorbells, 0).unwrap(),
        tx_doorbell: Register::new(&doorbells, 4).unwrap(),
    };
    let (seed, proof) = QueueSeed::from_parts(parts).unwrap();
    let (rx_ring, tx_ring) = (seed.iovas().0 - mapping.iova, seed.iovas().1 - mapping.iova);
    let (rx, tx) = seed.start().unwrap();
    Rig { rx, tx, proof, memory, pool, rx_ring, tx_ring, doorbells }
}

impl Rig {
    fn write(&self, at: u16, status: u64, len: u64) {
        self.memory.store_u64(self.rx_ring + u64::from(at % RING) * 16 + 8, status | len << rx::LEN_SHIFT).unwrap();
    }

    fn take(&mut self) -> Vec<usize> {
        let mut packets: Vec<Packet> = Vec::new();
        self.rx.rx_batch(&mut packets, 1000).unwrap();
        // All of it can be read.
        packets.iter().map(|packet| packet.segments().map(|bytes| bytes.iter().filter(|_| true).count()).sum()).collect()
    }
}

#[test]
fn descriptors_that_make_no_sense() {
    run(Idle::Hybrid, async {
        let mut rig = rig().await;
        let whole = rx::DD | rx::EOP;
        // Beyond the buffer, nothing, an error; then a good one.
        for (at, status, len) in
            [(0, whole, 2049), (1, whole, 0xffff), (2, whole, 0), (3, whole | rx::RXE, 60), (4, whole, 60)]
        {
            rig.write(at, status, len);
        }
        assert_eq!(rig.take(), [60]);
        // Out of order: what is not next is not looked at.
        rig.write(7, whole, 70);
        rig.write(6, whole, 66);
        assert_eq!(rig.take(), [0usize; 0]);
        rig.write(5, whole, 65);
        assert_eq!(rig.take(), [65, 66, 70]);
        // Two buffers, then one of which the second part is too long.
        rig.write(8, rx::DD, 2048);
        assert_eq!(rig.take(), [0usize; 0]);
        rig.write(9, whole, 100);
        rig.write(10, rx::DD, 2048);
        rig.write(11, rx::DD, 4000);
        rig.write(12, rx::DD, 10);
        rig.write(13, whole, 10);
        rig.write(14, whole, 99);
        assert_eq!(rig.take(), [2148, 99]);
        yield_now().await;
        assert_eq!(rig.doorbells.load_u32(0).unwrap(), 14);
        rig.proof.quiesced();
        drop((rig.rx, rig.tx));
        yield_now().await;
        assert_eq!((rig.pool.stats().free, rig.pool.stats().quarantined), (rig.pool.stats().bytes, 0));
    });
}

#[test]
fn a_packet_without_an_end() {
    run(Idle::Hybrid, async {
        let mut rig = rig().await;
        for round in 0..10u16 {
            for at in 0..RING {
                rig.write(round.wrapping_mul(RING) + at, rx::DD, 2048);
            }
            assert_eq!(rig.take(), [0usize; 0], "round {round}");
            yield_now().await;
        }
        // Nothing was kept of it: all buffers are in the ring or free.
        assert_eq!(rig.tx.buffers().available(), BUFFERS);
        rig.write(0, rx::DD | rx::EOP, 60);
        rig.write(1, rx::DD | rx::EOP, 61);
        assert_eq!(rig.take(), [61]);
        // Pieces of a byte: no more of them than the longest packet has buffers.
        for at in 2..12 {
            rig.write(at, rx::DD, 1);
        }
        rig.write(12, rx::DD | rx::EOP, 1);
        assert_eq!(rig.take(), [0usize; 0]);
    });
}

#[test]
fn odd_packets_among_plain_ones_are_forwarded() {
    run(Idle::Hybrid, async {
        let mut rig = rig().await;
        let (mut next, mut seen, mut part, mut packets) = (0u16, 0, 0, Vec::new());
        for round in 0..1000u16 {
            // One is in two buffers and one is bad, at changing places, also around the ends of the rings.
            let whole = rx::DD | rx::EOP;
            let count = 5 + round % 9;
            let (chained, bad) = (round % count, (round / 3) % count);
            let mut expected = Vec::new();
            for i in 0..count {
                let (status, len) = match i {
                    _ if i == bad => (whole, 0),
                    _ if i == chained => (rx::DD, 2048),
                    _ => (whole, 60 + u64::from(i)),
                };
                rig.write(next + i, status, len);
                part += len as usize;
                if status == whole {
                    expected.extend((len != 0).then_some(part));
                    part = 0;
                }
            }
            next += count;
            let max = usize::from(1 + round % 16);
            for _ in 0..count {
                rig.rx.rx_batch(&mut packets, max).unwrap();
            }
            // A tag for some, which takes a descriptor more when it changes.
            for packet in packets.iter_mut().skip(2).step_by(3) {
                packet.set_offload(Some(TxOffload::vlan(round % 2)));
            }
            let lens: Vec<usize> = packets.iter().map(Packet::len).collect();
            assert_eq!(lens, expected, "round {round}");
            let before = packets.len();
            let gone = rig.tx.tx_batch(&mut packets).unwrap();
            assert_eq!(packets.iter().map(Packet::len).collect::<Vec<_>>(), lens[gone..]);
            assert_eq!(gone, before, "all have room");
            seen += gone;
            yield_now().await;
            // All is sent.
            for at in 0..u64::from(RING) {
                let word = rig.memory.load_u64(rig.tx_ring + at * 16 + 8).unwrap();
                rig.memory.store_u64(rig.tx_ring + at * 16 + 8, word | tx::DD).unwrap();
            }
            yield_now().await;
            assert_eq!(BUFFERS - rig.tx.buffers().available(), part / 2048, "round {round}");
        }
        assert!(seen > 5000, "{seen}");
    });
}

#[test]
fn one_that_never_stops_does_not_keep_us() {
    let reactor = Reactor::new().unwrap();
    let mut rig = reactor.block_on(rig());
    // Descriptors are done again as soon as they are given: from another thread, without a pause.
    let memory = Arc::new(rig.memory);
    let (writer, at) = (memory.clone(), rig.rx_ring);
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            for i in 0..u64::from(RING) {
                writer.store_u64(at + i * 16 + 8, rx::DD | rx::EOP | (60 + i) << rx::LEN_SHIFT).unwrap();
            }
        }
    });
    reactor.block_on(async {
        for _ in 0..1000 {
            let mut packets = Vec::new();
            let taken = rig.rx.rx_batch(&mut packets, usize::MAX).unwrap();
            assert!(taken <= RING.into());
            assert!(packets.iter().all(|packet| (60..60 + usize::from(RING)).contains(&packet.len())));
            yield_now().await;
        }
    });
    drop(stop);
    thread.join().unwrap();
}
