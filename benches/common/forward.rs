//! Forwarding: packets from a receive ring to a transmit ring, with a NIC that is serviced inline on the same thread, and the floor,
//! which is the same loop written by hand for this one purpose, with all that is known to make it short.

use std::{cell::Cell, hint::black_box, rc::Rc};

use vfio_uring::{
    dma::{DmaBuf, DmaRing, HugePages, Pool, SharedMemory},
    mmio::Register,
    reactor::{Poller, Standby, register_poller, yield_now},
};
use vfio_uring_igb::{
    Packet, Parts, QueueSeed, RxQueue, TxQueue,
    spec::{rx, tx},
};

use super::{Doorbells, space};

pub const RING: u16 = 512;
const BUFFERS: usize = 1024;
const BUFFER: usize = 2048;
const LEN: u64 = 60;
/// The byte of each packet that is changed, as a program does that looks at them.
const TOUCHED: usize = 48;

/// A NIC that receives `batch` packets each time that it is serviced, and sends at once. Its cost is not the driver's.
pub struct InlineNic {
    memory: SharedMemory,
    base: u64,
    rings: Cell<(u64, u64)>,
    batch: u32,
    rx_tail: Register<u32>,
    tx_tail: Register<u32>,
    rx_head: Cell<u32>,
    tx_head: Cell<u32>,
}

impl InlineNic {
    fn new(space: &vfio_uring::dma::AddressSpace, doorbells: &Doorbells, batch: u32) -> Self {
        let mapping = space.mappings().into_iter().next().expect("the queue's memory");
        let (rx_tail, tx_tail) = (doorbells.register(0), doorbells.register(1));
        rx_tail.write(u32::from(RING) - 1);
        Self {
            memory: SharedMemory::map(mapping.fd.expect("memory of ours"), 0, mapping.len, true).expect("a second mapping"),
            base: mapping.iova,
            rings: Cell::default(),
            batch,
            rx_tail,
            tx_tail,
            rx_head: Cell::new(0),
            tx_head: Cell::new(0),
        }
    }

    fn start(&self, (rx, tx): (u64, u64)) {
        self.rings.set((rx - self.base, tx - self.base));
    }

    /// Receives and sends.
    #[inline(never)]
    pub fn device_service(&self) -> bool {
        let (rx_ring, tx_ring) = self.rings.get();
        let after = |index: u32| (index + 1) % u32::from(RING);
        let end = self.tx_tail.read_before_dma();
        while self.tx_head.get() != end {
            let at = tx_ring + u64::from(self.tx_head.get()) * 16 + 8;
            let word = self.memory.load_u64(at).expect("inside");
            if word & tx::RS != 0 {
                self.memory.store_u64(at, word | tx::DD).expect("inside");
            }
            self.tx_head.set(after(self.tx_head.get()));
        }
        let end = self.rx_tail.read_before_dma();
        let mut count = 0;
        while self.rx_head.get() != end && count < self.batch {
            let at = rx_ring + u64::from(self.rx_head.get()) * 16;
            self.memory.store_u64(at, 0x1234_5678_0000_0117).expect("inside");
            self.memory.store_u64(at + 8, rx::DD | rx::EOP | LEN << rx::LEN_SHIFT).expect("inside");
            self.rx_head.set(after(self.rx_head.get()));
            count += 1;
        }
        count != 0
    }
}

impl Poller for InlineNic {
    fn poll(&self) -> bool {
        self.device_service()
    }

    fn standby(&self) -> Standby {
        Standby::Polled
    }
}

/// A queue pair of ours with its inline NIC. Inside of a reactor.
pub struct ForwardRig {
    rx: RxQueue,
    tx: TxQueue,
    nic: Rc<InlineNic>,
    batch: usize,
}

impl ForwardRig {
    pub async fn new(batch: usize) -> Self {
        let space = space();
        let memory = Pool::new(&space, Parts::memory(RING, RING, BUFFERS, BUFFER), HugePages::No).await.expect("memory");
        let doorbells = Doorbells::new();
        let nic = Rc::new(InlineNic::new(&space, &doorbells, batch as u32));
        let parts = Parts {
            memory,
            rx_ring: RING,
            tx_ring: RING,
            buffers: BUFFERS,
            buffer_len: BUFFER,
            max_len: 1518,
            rx_doorbell: doorbells.register(0),
            tx_doorbell: doorbells.register(1),
        };
        let (seed, _proof) = QueueSeed::from_parts(parts).expect("a queue");
        nic.start(seed.iovas());
        let (rx, tx) = seed.start().expect("a reactor");
        Self { rx, tx, nic, batch }
    }

    /// Forwards `count` packets.
    pub async fn run(&mut self, count: u64) {
        let _nic = register_poller(self.nic.clone());
        let mut packets: Vec<Packet> = Vec::with_capacity(self.batch);
        let mut done = 0;
        while done < count {
            self.rx.rx_batch(&mut packets, self.batch).expect("the queue lives");
            for packet in &mut packets {
                if let Some(byte) = packet.data_mut().get_mut(TOUCHED) {
                    *byte = byte.wrapping_add(1);
                }
            }
            done += self.tx.tx_batch(&mut packets).expect("the queue lives") as u64;
            yield_now().await;
        }
    }
}

/// The floor.
pub struct ForwardFloor {
    rx: DmaRing<[u64; 2]>,
    tx: DmaRing<[u64; 2]>,
    rx_tail: Register<u32>,
    tx_tail: Register<u32>,
    rx_bufs: Vec<DmaBuf>,
    tx_bufs: Vec<Option<DmaBuf>>,
    free: Vec<DmaBuf>,
    nic: InlineNic,
    rx_next: usize,
    tx_next: usize,
    tx_done: usize,
    batch: usize,
}

impl ForwardFloor {
    pub fn new(batch: usize) -> Self {
        let space = space();
        let bytes = Parts::memory(RING, RING, BUFFERS, BUFFER);
        let memory = futures::executor::block_on(Pool::new(&space, bytes, HugePages::No)).expect("memory");
        let doorbells = Doorbells::new();
        let nic = InlineNic::new(&space, &doorbells, batch as u32);
        let ring = || {
            let ring = DmaRing::new(memory.alloc(usize::from(RING) * 16).expect("a ring").into_shared()).expect("a ring");
            ring.clear();
            ring
        };
        let (rx, tx) = (ring(), ring());
        nic.start((rx.iova(), tx.iova()));
        let buf = || memory.alloc(BUFFER).expect("a buffer");
        let rx_bufs: Vec<_> = (0..RING).map(|_| buf()).collect();
        for (index, buf) in rx_bufs.iter().enumerate() {
            rx.set(index, &[buf.iova(), 0]).expect("inside");
        }
        Self {
            rx,
            tx,
            rx_tail: doorbells.register(0),
            tx_tail: doorbells.register(1),
            rx_bufs,
            tx_bufs: (0..RING).map(|_| None).collect(),
            free: (0..BUFFERS).map(|_| buf()).collect(),
            nic,
            rx_next: 0,
            tx_next: 0,
            tx_done: 0,
            batch,
        }
    }

    /// Forwards `count` packets.
    #[inline(never)]
    pub fn run(&mut self, count: u64) {
        const MASK: usize = RING as usize - 1;
        const PLAIN: u64 = tx::DATA | tx::DEXT | tx::IFCS | tx::EOP;
        let Self { rx, tx, rx_tail, tx_tail, rx_bufs, tx_bufs, free, nic, batch, .. } = self;
        let (mut rx_next, mut tx_next, mut tx_done) = (self.rx_next, self.tx_next, self.tx_done);
        let mut packets: Vec<DmaBuf> = Vec::with_capacity(*batch);
        let mut done = 0;
        while done < count {
            nic.device_service();
            // Fresh buffers change places with packets.
            let most = (*batch).min(usize::from(RING) - rx_next).min(free.len());
            packets.extend(free.drain(free.len() - most..));
            let range = rx_next..rx_next + most;
            let mut taken = 0;
            for ((packet, slot), entry) in
                packets.iter_mut().zip(&mut rx_bufs[range.clone()]).zip(rx.entries(range).expect("inside"))
            {
                let status = entry.load::<1>();
                if status & rx::DD == 0 {
                    break;
                }
                let len = (status >> rx::LEN_SHIFT) as usize & 0xffff;
                if status & (rx::EOP | rx::RXE) != rx::EOP || len == 0 || len > BUFFER {
                    panic!("a packet of another kind");
                }
                // What a forwarder may want to know of the packet.
                black_box(entry.load::<0>());
                entry.store::<0>(packet.iova());
                entry.store::<1>(0);
                std::mem::swap(packet, slot);
                packet.set_len(len).expect("it fits");
                taken += 1;
            }
            free.extend(packets.drain(taken..));
            rx_next = (rx_next + taken) & MASK;
            for packet in &mut packets {
                if let Some(byte) = packet.get_mut(TOUCHED) {
                    *byte = byte.wrapping_add(1);
                }
            }
            let last = packets.len().wrapping_sub(1);
            for (index, packet) in packets.drain(..).enumerate() {
                let len = packet.len() as u64;
                let report = if index == last { tx::RS } else { 0 };
                let word = PLAIN | report | len | len << tx::PAYLEN_SHIFT;
                let entry = tx.entry(tx_next).expect("inside");
                entry.store::<0>(packet.iova());
                entry.store::<1>(word);
                tx_bufs[tx_next] = Some(packet);
                tx_next = (tx_next + 1) & MASK;
                done += 1;
            }
            rx_tail.write_after_dma((rx_next.wrapping_sub(1) & MASK) as u32);
            tx_tail.write_after_dma(tx_next as u32);
            // All of the batch is sent when its last packet is.
            let before = tx_next.wrapping_sub(1) & MASK;
            nic.device_service();
            if tx.load_u64(before, 8).expect("inside") & tx::DD != 0 {
                let end = if tx_next > tx_done { tx_next } else { usize::from(RING) };
                free.extend(tx_bufs[tx_done..end].iter_mut().filter_map(Option::take));
                tx_done = end & MASK;
            }
        }
        (self.rx_next, self.tx_next, self.tx_done) = (rx_next, tx_next, tx_done);
    }
}
