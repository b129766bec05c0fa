//! A client that does anything: nothing panics, nothing hangs, and a reset always leads back to a controller that works.

use vfio_uring_models::{device::Device, nvme::spec::Sqe};

use crate::support::*;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Addresses that are mostly in memory and mostly aligned.
    fn address(&mut self) -> u64 {
        match self.below(12) {
            0 => self.next(),
            1 => BASE + MEMORY - self.below(8192),
            2 => DATA + self.below(0x10_0000),
            3 => u64::MAX - self.below(8192),
            _ => DATA + self.below(256) * 4096,
        }
    }
}

fn command(random: &mut Random, opcodes: &[u8]) -> Sqe {
    let opcode =
        if random.below(10) == 0 { random.next() as u8 } else { opcodes[random.below(opcodes.len() as u64) as usize] };
    let nsid = [0, 1, 1, 2, 2, 3, u32::MAX][random.below(7) as usize];
    let mut dwords =
        std::array::from_fn(|_| if random.below(4) == 0 { random.next() as u32 } else { random.below(80) as u32 });
    if random.below(2) == 0 {
        dwords[0] = (random.below(70) << 16 | random.below(12)) as u32;
        dwords[1] = (random.below(8) << 16 | random.below(4)) as u32;
    }
    let mut prps = [random.address(), random.address()];
    let mut flags = 0;
    if random.below(4) == 0 {
        flags = random.below(4) << 14 | u64::from(random.below(8) == 0) << 8;
        prps[1] = random.below(9000) | [0, 0x20, 0x30, random.below(256)][random.below(4) as usize] << 56;
    }
    let mut sqe = sqe(opcode, nsid, prps, dwords);
    sqe.0[0] |= flags;
    sqe
}

fn lists(random: &mut Random, client: &Client) {
    for page in 0..32 {
        let entries: Vec<u8> = (0..512)
            .flat_map(|i| {
                match i % 2 {
                    1 if page < 16 => random.below(5000) | [0, 0x20, 0x30][random.below(3) as usize] << 56,
                    _ => random.address(),
                }
                .to_le_bytes()
            })
            .collect();
        client.put(DATA + page * 4096, &entries);
    }
}

fn run(seed: u64, direct: bool) {
    let mut random = Random(seed);
    let mut client = Client::with_memory(disk(), Memory::new(direct));
    client.enable();
    let mut pairs = vec![client.pair(1, 16), client.pair(2, 64)];
    for step in 0..4000 {
        if step % 500 == 0 {
            lists(&mut random, &client);
        }
        match random.below(100) {
            0 => {
                let (offset, value) = (random.below(0x1000) * 4, random.next() as u32);
                client.set(offset % 0x4000, value);
            }
            1 => client.doorbell(random.below(12), random.next() as u32),
            2..10 => client.doorbell(random.below(8), random.below(70) as u32),
            10 => {
                client.set([0x14, 0x24, 0x28, 0x2c, 0x30][random.below(5) as usize], random.next() as u32);
            }
            11 => {
                let (offset, value) = (random.below(4092), random.next());
                client.controller.write(7, offset, &value.to_le_bytes()[..4], &mut client.memory).unwrap();
            }
            12 => {
                let mut bytes = vec![0; random.below(64) as usize];
                let offset = random.below(0x4000);
                let _ = client.controller.read(0, offset, &mut bytes, &mut client.memory);
                let _ = client.controller.write(0, offset, &bytes, &mut client.memory);
            }
            13..40 => {
                let mut admin = client.admin;
                let sqe = command(&mut random, &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12]);
                client.push(&mut admin, sqe);
                client.ring(&admin);
                while client.poll(&mut admin).is_some() {}
                client.consumed(&admin);
                client.admin = admin;
            }
            _ => {
                let index = random.below(2) as usize;
                let sqe = command(&mut random, &[0, 1, 2, 5, 8, 9]);
                let pair = &mut pairs[index];
                client.push(pair, sqe);
                client.ring(pair);
                while client.poll(pair).is_some() {}
                client.consumed(pair);
            }
        }
        client.controller.service(&mut client.memory);
        if step % 100 == 99 {
            client.controller.reset(&mut client.memory);
            client.enable();
            pairs = vec![client.pair(1, 16), client.pair(2, 64)];
            assert_eq!(client.run(&mut pairs[0], io(2, 1, 0, 1, [DATA, 0])).status, 0);
        }
    }
}

#[test]
fn a_client_that_does_anything() {
    for seed in 0..6 {
        run(seed, seed % 2 == 0);
    }
}
