//! Submission queue entries with PRPs and SGLs, doorbells and registers as a hostile driver writes them.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_uring::dma::{HugePages, SharedMemory};
use vfio_uring_models::{
    device::{Device, Host, Unmapped, region},
    nvme::{Config, Controller, NamespaceConfig},
};

/// The client's memory: it starts at this IOVA.
const BASE: u64 = 0x10000;
const PAGES: u64 = 32;
const ENTRIES: u64 = 8;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A command with small numbers in the places that matter.
    Command {
        queue: u8,
        opcode: u8,
        flags: u8,
        nsid: u8,
        prp1: u16,
        prp2: u16,
        dwords: [u8; 4],
        high: u8,
    },
    /// Any entry at all.
    Raw {
        queue: u8,
        entry: [u64; 8],
    },
    /// A list of pages or SGL descriptors in memory.
    List {
        page: u8,
        entries: Vec<(u16, u8)>,
    },
    Doorbell {
        index: u8,
        value: u16,
    },
    Register {
        offset: u8,
        value: u32,
    },
    Service,
}

struct Memory(SharedMemory);

impl Memory {
    fn at(&self, iova: u64, len: usize) -> Option<u64> {
        let offset = iova.checked_sub(BASE)?;
        (offset.checked_add(len as u64)? <= self.0.len() as u64).then_some(offset)
    }
}

impl Host for Memory {
    fn read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped> {
        let at = self.at(iova, to.len()).ok_or(Unmapped)?;
        self.0.read(at, to).map_err(|_| Unmapped)
    }

    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped> {
        let at = self.at(iova, from.len()).ok_or(Unmapped)?;
        self.0.write(at, from).map_err(|_| Unmapped)
    }

    fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)> {
        Some((&self.0, self.at(iova, len)?))
    }

    fn signal(&mut self, _vector: u16) {}
}

fn register(device: &mut Controller, host: &mut Memory, offset: u64, value: u32) {
    let _ = device.write(region::BAR0, offset, &value.to_le_bytes(), host);
}

/// Where the submission queue of a number is: page 2 n, the completion queue in the next.
fn queue_page(queue: u8) -> u64 {
    BASE + u64::from(queue % 3) * 0x2000
}

fuzz_target!(|steps: Vec<Step>| {
    let mut host = Memory(SharedMemory::create("client", (PAGES as usize) << 12, HugePages::No).expect("a memfd").1);
    let namespaces = vec![NamespaceConfig::memory(1 << 18), NamespaceConfig::memory(1 << 18).with_lba_size(4096)];
    let mut device =
        Controller::new(Config { namespaces, max_queues: 4, mdts: 2, ..Config::default() }).expect("a controller");
    let depth = ENTRIES as u32 - 1;
    register(&mut device, &mut host, 0x24, depth << 16 | depth);
    for (offset, page) in [(0x28, queue_page(0)), (0x30, queue_page(0) + 0x1000)] {
        let _ = device.write(region::BAR0, offset, &page.to_le_bytes(), &mut host);
    }
    register(&mut device, &mut host, 0x14, 1 | 6 << 16 | 4 << 20);
    let mut tails = [0u64; 3];
    // I/O queues 1 and 2.
    for id in 1..3u64 {
        let page = queue_page(id as u8);
        submit(
            &mut device,
            &mut host,
            &mut tails,
            0,
            [5, 0, 0, page + 0x1000, 0, u64::from(depth) << 16 | id | 1 << 32, 0, 0],
        );
        submit(
            &mut device,
            &mut host,
            &mut tails,
            0,
            [1, 0, 0, page, 0, u64::from(depth) << 16 | id | (1 | id << 16) << 32, 0, 0],
        );
    }
    for step in steps.iter().take(100) {
        match step {
            Step::Command { queue, opcode, flags, nsid, prp1, prp2, dwords, high } => {
                let address = |value: u16| BASE + (u64::from(value) << 2 & 0x1ffff);
                let [a, b, c, d] = dwords.map(u64::from);
                let entry = [
                    u64::from(*opcode) | u64::from(*flags) << 8 | u64::from(*nsid % 5) << 32,
                    0,
                    0,
                    address(*prp1),
                    address(*prp2),
                    a | b << 32 | u64::from(*high) << 56,
                    c | d << 32,
                    0,
                ];
                submit(&mut device, &mut host, &mut tails, *queue, entry);
            }
            Step::Raw { queue, entry } => submit(&mut device, &mut host, &mut tails, *queue, *entry),
            Step::List { page, entries } => {
                for (i, (value, kind)) in entries.iter().take(256).enumerate() {
                    let at = (u64::from(*page) % PAGES << 12) + i as u64 * 16;
                    let words = [BASE + (u64::from(*value) << 2), u64::from(*value) | u64::from(*kind) << 56];
                    let _ = host.0.write_obj(at, &words);
                }
            }
            Step::Doorbell { index, value } => {
                register(&mut device, &mut host, 0x1000 + u64::from(*index) * 4, (*value).into());
            }
            Step::Register { offset, value } => register(&mut device, &mut host, u64::from(*offset), *value),
            Step::Service => {}
        }
        for _ in 0..4 {
            device.service(&mut host);
        }
    }
});

fn submit(device: &mut Controller, host: &mut Memory, tails: &mut [u64; 3], queue: u8, entry: [u64; 8]) {
    let queue = queue % 3;
    let tail = &mut tails[usize::from(queue)];
    let _ = host.0.write_obj(queue_page(queue) - BASE + *tail * 64, &entry);
    *tail = (*tail + 1) % ENTRIES;
    // Completions are taken at once, as far as the number goes.
    register(device, host, 0x1004 + u64::from(queue) * 8, *tail as u32);
    register(device, host, 0x1000 + u64::from(queue) * 8, *tail as u32);
    device.service(host);
}
