//! A driver of the crudest kind, with memory of its own, in one thread with its NIC.

use std::{collections::HashMap, sync::Arc};

use vfio_uring::dma::{HugePages, SharedMemory};
use vfio_uring_models::{
    device::{Device, Host, Unmapped},
    igb::{Cause, Config, Counters, Handle, Nic, Wire, spec::*},
};

pub const BASE: u64 = 0x1_0000_0000;
pub const MEMORY: u64 = 32 << 20;
/// Rings, one after the other; buffers of each ring; what a test is free to use.
const RINGS: u64 = BASE;
const RX_BUFFERS: u64 = BASE + 0x40_0000;
const TX_BUFFERS: u64 = BASE + 0xc0_0000;
pub const DATA: u64 = BASE + 0x180_0000;
pub const BUFFER: u64 = 2048;

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

/// Client memory at [`BASE`]. `direct`: lends windows.
pub struct Memory {
    pub memory: Arc<SharedMemory>,
    pub direct: bool,
    pub signals: HashMap<u16, u32>,
    pub messages: u32,
}

impl Memory {
    fn new(direct: bool) -> Self {
        let (_fd, memory) = SharedMemory::create("client", MEMORY as usize, HugePages::No).unwrap();
        Self { memory: Arc::new(memory), direct, signals: HashMap::new(), messages: 0 }
    }

    pub fn taken(&mut self, vector: u16) -> u32 {
        self.signals.remove(&vector).unwrap_or(0)
    }
}

impl Host for Memory {
    fn read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped> {
        self.memory.read(iova.checked_sub(BASE).ok_or(Unmapped)?, to).map_err(|_| Unmapped)
    }

    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped> {
        self.memory.write(iova.checked_sub(BASE).ok_or(Unmapped)?, from).map_err(|_| Unmapped)
    }

    fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)> {
        let offset = iova.checked_sub(BASE).filter(|_| self.direct)?;
        (offset.checked_add(len as u64)? <= MEMORY).then_some((&*self.memory, offset))
    }

    fn signal(&mut self, vector: u16) {
        *self.signals.entry(vector).or_default() += 1;
    }

    fn signal_msi(&mut self) {
        self.messages += 1;
    }
}

/// A ring as the driver sees it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ring {
    pub base: u64,
    pub size: u32,
    /// Next to be given to the NIC, and next to be looked at.
    pub tail: u32,
    pub next: u32,
    pub legacy: bool,
}

/// A packet as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub bytes: Vec<u8>,
    pub descriptors: u32,
    /// Of the last descriptor.
    pub info: u32,
    pub hash: u32,
    pub status: u32,
    pub vlan: u16,
}

pub struct Driver {
    pub nic: Nic,
    pub memory: Memory,
    pub handle: Handle,
    pub rx: [Ring; QUEUES],
    pub tx: [Ring; QUEUES],
}

pub fn config(mac: [u8; 6], wire: Wire) -> Config {
    Config { mac, ..Config::default() }.with_wire(wire)
}

/// Two drivers with a cable between their NICs; brought up, a queue pair each.
pub fn two() -> (Driver, Driver) {
    let (a, b) = Wire::peers(64).unwrap();
    let (mut a, mut b) = (Driver::new(config(MAC_A, a)), Driver::with(config(MAC_B, b), false));
    for driver in [&mut a, &mut b] {
        driver.up();
        driver.rx_queue(0, 64);
        driver.tx_queue(0, 64);
    }
    a.nic.service(&mut a.memory);
    (a, b)
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed).collect()
}

/// A frame of `len` bytes with an Ethernet type that nobody knows.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = [&to[..], &from[..], &[0x88, 0xb5]].concat();
    bytes.extend(pattern(len - 14, seed));
    bytes
}

impl Driver {
    pub fn new(config: Config) -> Self {
        Self::with(config, true)
    }

    pub fn with(config: Config, direct: bool) -> Self {
        let nic = Nic::new(config).unwrap();
        let handle = nic.handle();
        Self { nic, memory: Memory::new(direct), handle, rx: Default::default(), tx: Default::default() }
    }

    pub fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.nic.read(0, offset, &mut bytes, &mut self.memory).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        self.nic.write(0, offset, &value.to_le_bytes(), &mut self.memory).unwrap();
    }

    /// Receiver and transmitter on: long packets, CRC stripped, broadcasts, checksums and RSS hash in descriptors.
    pub fn up(&mut self) {
        let control = self.get(CTRL);
        self.set(CTRL, control | ctrl::SLU | ctrl::RFCE | ctrl::TFCE);
        self.set(RXCSUM, rxcsum::IPOFL | rxcsum::TUOFL | rxcsum::PCSD);
        self.set(RCTL, rctl::EN | rctl::LPE | rctl::BAM | rctl::SECRC);
        self.set(TCTL, tctl::EN | tctl::PSP);
    }

    fn registers(rx: bool, queue: usize) -> u64 {
        (if rx { RX_QUEUES } else { TX_QUEUES }) + queue as u64 * QUEUE_STRIDE
    }

    pub fn queue_register(&mut self, rx: bool, queue: usize, register: u64) -> u32 {
        self.get(Self::registers(rx, queue) + register)
    }

    fn queue(&mut self, rx: bool, queue: usize, size: u32, control: u32) -> Ring {
        let at = Self::registers(rx, queue);
        let base = RINGS + (queue as u64 + if rx { 0 } else { 16 }) * 0x1_0000;
        self.memory.memory.fill(base - BASE, size as usize * 16, 0).unwrap();
        for (register, value) in [
            (queue::DCTL, 0),
            (queue::BAL, base as u32),
            (queue::BAH, (base >> 32) as u32),
            (queue::LEN, size * 16),
            (queue::HEAD, 0),
            (queue::TAIL, 0),
        ] {
            self.set(at + register, value);
        }
        if rx {
            self.set(at + queue::SRRCTL, control);
        }
        self.set(at + queue::DCTL, dctl::ENABLE);
        Ring { base, size, ..Ring::default() }
    }

    /// A receive queue with advanced descriptors and buffers of 2 KiB, all but one of which are given to the NIC.
    pub fn rx_queue(&mut self, queue: usize, size: u32) {
        self.rx_queue_with(queue, size, 2 | 1 << srrctl::DESCTYPE_SHIFT);
    }

    pub fn rx_queue_with(&mut self, queue: usize, size: u32, control: u32) {
        self.rx[queue] = self.queue(true, queue, size, control);
        self.rx[queue].legacy = control >> srrctl::DESCTYPE_SHIFT & 7 == 0;
        self.give(queue, size - 1);
    }

    pub fn tx_queue(&mut self, queue: usize, size: u32) {
        self.tx[queue] = self.queue(false, queue, size, 0);
    }

    /// Gives buffers to the NIC.
    pub fn give(&mut self, queue: usize, count: u32) {
        let mut ring = self.rx[queue];
        for _ in 0..count {
            let buffer = RX_BUFFERS + (queue as u64 * 0x100 + u64::from(ring.tail % 256)) * BUFFER;
            self.put_descriptor(&ring, ring.tail, buffer, 0);
            ring.tail = (ring.tail + 1) % ring.size;
        }
        self.rx[queue] = ring;
        self.set(Self::registers(true, queue) + queue::TAIL, ring.tail);
    }

    pub fn put_descriptor(&self, ring: &Ring, index: u32, low: u64, high: u64) {
        self.memory.memory.write_obj(ring.base - BASE + u64::from(index) * 16, &[low.to_le(), high.to_le()]).unwrap();
    }

    pub fn descriptor(&self, ring: &Ring, index: u32) -> [u64; 2] {
        self.memory.memory.read_obj::<[u64; 2]>(ring.base - BASE + u64::from(index) * 16).unwrap().map(u64::from_le)
    }

    /// The next packet of a queue, whose buffers are given back.
    pub fn receive(&mut self, queue: usize) -> Option<Received> {
        let mut received = Received { bytes: Vec::new(), descriptors: 0, info: 0, hash: 0, status: 0, vlan: 0 };
        loop {
            let ring = self.rx[queue];
            let [low, high] = self.descriptor(&ring, ring.next);
            // The low byte of the status has the same place in advanced descriptors, another in legacy ones.
            let (status, len) = if ring.legacy {
                ((high >> 32) as u32 & 0xff | ((high >> 45) as u32 & 7) << 29, high as u16)
            } else {
                (high as u32, (high >> 32) as u16)
            };
            if status & rx_status::DD == 0 {
                assert_eq!(received.descriptors, 0, "a packet without an end");
                return None;
            }
            let buffer = RX_BUFFERS + (queue as u64 * 0x100 + u64::from(ring.next % 256)) * BUFFER;
            received.bytes.extend(self.bytes(buffer, len.into()));
            received.descriptors += 1;
            self.rx[queue].next = (ring.next + 1) % ring.size;
            if status & rx_status::EOP != 0 {
                (received.info, received.hash) = (low as u32, (low >> 32) as u32);
                (received.status, received.vlan) = (status, (high >> 48) as u16);
                self.give(queue, received.descriptors);
                return Some(received);
            }
        }
    }

    /// Where the buffer of a descriptor of ours for sending is: 12 KiB for each.
    pub fn tx_buffer(&self, index: u32) -> u64 {
        TX_BUFFERS + u64::from(index % 256) * 0x3000
    }

    /// Puts a descriptor of any kind into a ring.
    pub fn push(&mut self, queue: usize, low: u64, high: u64) {
        let ring = self.tx[queue];
        self.put_descriptor(&ring, ring.tail, low, high);
        self.tx[queue].tail = (ring.tail + 1) % ring.size;
    }

    /// Tells the NIC.
    pub fn ring(&mut self, queue: usize) {
        let tail = self.tx[queue].tail;
        self.set(Self::registers(false, queue) + queue::TAIL, tail);
    }

    /// Puts a packet into a ring, in one advanced descriptor. `last`: options and context index.
    pub fn push_packet(&mut self, queue: usize, bytes: &[u8], command: u32, last: u32) {
        let at = self.tx_buffer(self.tx[queue].tail);
        self.put(at, bytes);
        let command = command | bytes.len() as u32 | tx::DTYP_DATA << tx::DTYP_SHIFT | tx::DEXT | tx::EOP | tx::RS;
        self.push(queue, at, u64::from(last) << 32 | u64::from(command));
    }

    /// Sends a packet as it is.
    pub fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.push_packet(queue, bytes, 0, (bytes.len() as u32) << 14);
        self.ring(queue);
    }

    /// Puts a context into a ring: VLAN tag, header lengths, kind, MSS.
    pub fn push_context(&mut self, queue: usize, vlan: u16, lengths: [u32; 3], kind: u32, mss: u16) {
        let [mac, ip, l4] = lengths;
        let low = u64::from(u32::from(vlan) << 16 | mac << 9 | ip);
        let kind = kind | tx::DTYP_CONTEXT << tx::DTYP_SHIFT | tx::DEXT;
        self.push(queue, low, u64::from(u32::from(mss) << 16 | l4 << 8) << 32 | u64::from(kind));
    }

    pub fn put(&self, iova: u64, bytes: &[u8]) {
        self.memory.memory.write(iova - BASE, bytes).unwrap();
    }

    pub fn bytes(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory.read(iova - BASE, &mut bytes).unwrap();
        bytes
    }

    /// Lets the NIC work until it finds nothing more.
    pub fn service(&mut self) -> usize {
        let (mut all, mut idle) = (0, 0);
        for _ in 0..100_000 {
            match self.nic.service(&mut self.memory) {
                // What changes rarely is looked at now and then.
                0 if idle == 64 => return all,
                0 => idle += 1,
                work => (all, idle) = (all + work, 0),
            }
        }
        panic!("the NIC always finds something");
    }

    pub fn counters(&self) -> Counters {
        self.handle.counters()
    }

    pub fn dropped(&self, cause: Cause) -> u64 {
        self.counters().dropped(cause)
    }

    /// Whether the last descriptor before the tail was reported as done.
    pub fn is_done(&self, queue: usize) -> bool {
        let ring = self.tx[queue];
        self.descriptor(&ring, (ring.tail + ring.size - 1) % ring.size)[1] >> 32 & 1 != 0
    }
}

/// Both NICs work until neither finds anything.
pub fn settle(a: &mut Driver, b: &mut Driver) {
    for _ in 0..1000 {
        if a.service() + b.service() == 0 {
            return;
        }
    }
    panic!("the NICs never come to rest");
}
