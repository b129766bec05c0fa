//! A client of the controller with memory of its own, in one thread: rings a doorbell, lets the controller work, looks.

use std::{collections::HashMap, sync::Arc};

use vfio_uring::dma::{HugePages, SharedMemory};
use vfio_uring_models::{
    device::{Device, Host, Unmapped},
    nvme::{Config, Controller, NamespaceConfig, spec::Sqe},
};

pub const BASE: u64 = 0x1_0000_0000;
pub const MEMORY: u64 = 16 << 20;
/// The admin queues, and what a test is free to use.
pub const ASQ: u64 = BASE;
pub const ACQ: u64 = BASE + 0x1_0000;
pub const DATA: u64 = BASE + 0x10_0000;
pub const ADMIN_DEPTH: u32 = 32;

/// Client memory at [`BASE`]. `direct`: lends windows.
pub struct Memory {
    pub memory: Arc<SharedMemory>,
    pub direct: bool,
    pub signals: HashMap<u16, u32>,
}

impl Memory {
    pub fn new(direct: bool) -> Self {
        let (_fd, memory) = SharedMemory::create("client", MEMORY as usize, HugePages::No).unwrap();
        Self { memory: Arc::new(memory), direct, signals: HashMap::new() }
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
}

/// A completion as it is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cqe {
    pub result: u32,
    pub sq_head: u16,
    pub sq_id: u16,
    pub cid: u16,
    pub status: u16,
}

/// A queue pair as a client sees it; several pairs may have the same completion queue.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    pub sq: u16,
    pub cq: u16,
    pub sq_base: u64,
    pub cq_base: u64,
    pub depth: u32,
    pub tail: u32,
    pub head: u32,
    pub phase: bool,
}

impl Pair {
    pub fn new(sq: u16, cq: u16, sq_base: u64, cq_base: u64, depth: u32) -> Self {
        Self { sq, cq, sq_base, cq_base, depth, tail: 0, head: 0, phase: true }
    }
}

pub struct Client {
    pub controller: Controller,
    pub memory: Memory,
    pub admin: Pair,
    cid: u16,
}

pub fn disk() -> Config {
    let namespaces = vec![NamespaceConfig::memory(64 << 20), NamespaceConfig::memory(1 << 40).with_lba_size(4096)];
    Config { namespaces, mdts: 5, ..Config::default() }
}

pub fn sqe(opcode: u8, nsid: u32, prps: [u64; 2], dwords: [u32; 6]) -> Sqe {
    let pair = |i: usize| u64::from(dwords[i]) | u64::from(dwords[i + 1]) << 32;
    let quads = [u64::from(opcode) | u64::from(nsid) << 32, 0, 0, prps[0], prps[1], pair(0), pair(2), pair(4)];
    Sqe(quads.map(u64::to_le))
}

/// A command with a range of blocks.
pub fn io(opcode: u8, nsid: u32, lba: u64, blocks: u32, prps: [u64; 2]) -> Sqe {
    sqe(opcode, nsid, prps, [lba as u32, (lba >> 32) as u32, blocks - 1, 0, 0, 0])
}

impl Client {
    pub fn new(config: Config) -> Self {
        Self::with_memory(config, Memory::new(true))
    }

    pub fn with_memory(config: Config, memory: Memory) -> Self {
        let controller = Controller::new(config).unwrap();
        Self { controller, memory, admin: Pair::new(0, 0, ASQ, ACQ, ADMIN_DEPTH), cid: 0 }
    }

    /// A client that has enabled its controller.
    pub fn ready(config: Config) -> Self {
        let mut client = Self::new(config);
        client.enable();
        client
    }

    pub fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.controller.read(0, offset, &mut bytes, &mut self.memory).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        self.controller.write(0, offset, &value.to_le_bytes(), &mut self.memory).unwrap();
    }

    pub fn set64(&mut self, offset: u64, value: u64) {
        self.controller.write(0, offset, &value.to_le_bytes(), &mut self.memory).unwrap();
    }

    pub fn enable(&mut self) {
        self.memory.memory.fill(0, 0x2_0000, 0).unwrap();
        self.admin = Pair::new(0, 0, ASQ, ACQ, ADMIN_DEPTH);
        self.set(0x24, (ADMIN_DEPTH - 1) << 16 | (ADMIN_DEPTH - 1));
        self.set64(0x28, ASQ);
        self.set64(0x30, ACQ);
        self.set(0x14, 4 << 20 | 6 << 16 | 1);
        assert_eq!(self.get(0x1c), 1);
    }

    /// Lets the controller work until it finds nothing more.
    pub fn service(&mut self) -> usize {
        let mut all = 0;
        for _ in 0..10_000 {
            match self.controller.service(&mut self.memory) {
                0 => return all,
                work => all += work,
            }
        }
        panic!("the controller always finds something");
    }

    pub fn doorbell(&self, index: u64, value: u32) {
        let area = self.controller.region(0).mappable.unwrap();
        area.memory.store_u32(index * 4, value).unwrap();
    }

    /// Puts a command into a queue, without the doorbell; its identifier.
    pub fn push(&mut self, pair: &mut Pair, mut sqe: Sqe) -> u16 {
        self.cid = self.cid.wrapping_add(1);
        sqe.0[0] = u64::from_le(sqe.0[0]) & !0xffff_0000 | u64::from(self.cid) << 16;
        sqe.0[0] = sqe.0[0].to_le();
        self.memory.memory.write_obj(pair.sq_base - BASE + u64::from(pair.tail) * 64, &sqe).unwrap();
        pair.tail = (pair.tail + 1) % pair.depth;
        self.cid
    }

    pub fn ring(&self, pair: &Pair) {
        self.doorbell(u64::from(pair.sq) * 2, pair.tail);
    }

    /// The next completion, without the doorbell.
    pub fn poll(&self, pair: &mut Pair) -> Option<Cqe> {
        let dwords: [u32; 4] = self.memory.memory.read_obj(pair.cq_base - BASE + u64::from(pair.head) * 16).unwrap();
        let [result, _, head, last] = dwords.map(u32::from_le);
        if (last >> 16 & 1 != 0) != pair.phase {
            return None;
        }
        pair.head = (pair.head + 1) % pair.depth;
        pair.phase ^= pair.head == 0;
        let status = (last >> 17) as u16;
        Some(Cqe { result, sq_head: head as u16, sq_id: (head >> 16) as u16, cid: last as u16, status })
    }

    pub fn consumed(&self, pair: &Pair) {
        self.doorbell(u64::from(pair.cq) * 2 + 1, pair.head);
    }

    /// One command from start to end.
    pub fn run(&mut self, pair: &mut Pair, sqe: Sqe) -> Cqe {
        let cid = self.push(pair, sqe);
        self.ring(pair);
        self.service();
        let cqe = self.poll(pair).expect("a completion");
        assert_eq!((cqe.cid, cqe.sq_id, u32::from(cqe.sq_head)), (cid, pair.sq, pair.tail));
        self.consumed(pair);
        cqe
    }

    pub fn admin(&mut self, sqe: Sqe) -> Cqe {
        let mut pair = self.admin;
        let cqe = self.run(&mut pair, sqe);
        self.admin = pair;
        cqe
    }

    pub fn create_cq(&mut self, id: u16, base: u64, depth: u32, flags: u32) -> u16 {
        self.admin(sqe(5, 0, [base, 0], [(depth - 1) << 16 | u32::from(id), flags, 0, 0, 0, 0])).status
    }

    pub fn create_sq(&mut self, id: u16, base: u64, depth: u32, cq: u16) -> u16 {
        self.admin(sqe(1, 0, [base, 0], [(depth - 1) << 16 | u32::from(id), u32::from(cq) << 16 | 1, 0, 0, 0, 0])).status
    }

    /// A queue pair with interrupts on the vector of its number; queue memory from the identifier.
    pub fn pair(&mut self, id: u16, depth: u32) -> Pair {
        let sq_base = BASE + 0x2_0000 + u64::from(id) * 0x8000;
        let pair = Pair::new(id, id, sq_base, sq_base + 0x4000, depth);
        self.memory.memory.fill(sq_base - BASE, 0x8000, 0).unwrap();
        assert_eq!(self.create_cq(id, pair.cq_base, depth, u32::from(id) << 16 | 3), 0);
        assert_eq!(self.create_sq(id, pair.sq_base, depth, id), 0);
        pair
    }

    pub fn fill(&self, iova: u64, len: usize, seed: u8) -> Vec<u8> {
        let bytes: Vec<u8> = (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed).collect();
        self.put(iova, &bytes);
        bytes
    }

    pub fn put(&self, iova: u64, bytes: &[u8]) {
        self.memory.memory.write(iova - BASE, bytes).unwrap();
    }

    pub fn bytes(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory.read(iova - BASE, &mut bytes).unwrap();
        bytes
    }
}
