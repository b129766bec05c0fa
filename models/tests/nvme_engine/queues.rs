//! Queues: making and deleting them, wrapping, sharing, and what happens when they are full or their doorbells lie.

use vfio_uring_models::{device::Device, nvme::spec::Sqe};

use crate::support::*;

fn read(lba: u64) -> Sqe {
    io(2, 1, lba, 1, [DATA, 0])
}

#[test]
fn making_and_deleting() {
    let mut client = Client::ready(disk());
    let (cq, sq) = (BASE + 0x8_0000, BASE + 0x9_0000);
    for (id, base, depth, flags, status) in [
        (0, cq, 8, 3, 0x4101),
        (65, cq, 8, 3, 0x4101),
        (1, cq, 1, 3, 0x4102),
        (1, cq, 4097, 3, 0x4102),
        (1, cq, 65536, 3, 0x4102),
        (1, cq, 8, 2, 0x4002),
        (1, cq, 8, 65 << 16 | 3, 0x4108),
        (1, cq, 8, 1, 0),
        (1, cq, 8, 3, 0x4101),
        (2, cq + 8, 8, 3, 0x4013),
        (2, u64::MAX - 0xfff, 4096, 3, 0x4002),
        (64, cq, 4096, 64 << 16 | 3, 0),
    ] {
        assert_eq!(client.create_cq(id, base, depth, flags), status, "cq {id} {base:#x} {depth} {flags:#x}");
    }
    for (id, base, depth, cq, status) in [
        (0, sq, 8, 1, 0x4101),
        (65, sq, 8, 1, 0x4101),
        (1, sq, 1, 1, 0x4102),
        (1, sq, 8, 0, 0x4101),
        (1, sq, 8, 65, 0x4101),
        (1, sq, 8, 2, 0x4100),
        (1, sq + 64, 8, 1, 0x4013),
        (1, sq, 8, 1, 0),
        (1, sq, 8, 1, 0x4101),
    ] {
        assert_eq!(client.create_sq(id, base, depth, cq), status, "sq {id} {base:#x} {depth} {cq}");
    }
    let delete = |client: &mut Client, opcode, id| client.admin(sqe(opcode, 0, [0, 0], [id, 0, 0, 0, 0, 0])).status;
    for (opcode, id, status) in [
        (4, 1, 0x410c),
        (4, 0, 0x4101),
        (0, 0, 0x4101),
        (0, 2, 0x4101),
        (4, 2, 0x4101),
        (0, 1, 0),
        (0, 1, 0x4101),
        (4, 1, 0),
    ] {
        assert_eq!(delete(&mut client, opcode, id), status, "opcode {opcode} queue {id}");
    }
    // Made anew, its doorbells are at zero.
    client.doorbell(2, 5);
    let mut pair = client.pair(1, 8);
    assert_eq!(client.service(), 0);
    assert_eq!(client.run(&mut pair, read(0)).status, 0);
}

#[test]
fn phases_and_heads_wrap() {
    for direct in [true, false] {
        let mut client = Client::with_memory(disk(), Memory::new(direct));
        client.enable();
        let mut pair = client.pair(1, 5);
        for round in 0..33u32 {
            let count = round % 4 + 1;
            let cids: Vec<_> = (0..count).map(|lba| client.push(&mut pair, read(lba.into()))).collect();
            client.ring(&pair);
            assert_eq!(client.service(), count as usize);
            for cid in cids {
                assert_eq!(client.poll(&mut pair).map(|cqe| (cqe.cid, cqe.status)), Some((cid, 0)));
            }
            assert_eq!(client.poll(&mut pair), None);
            client.consumed(&pair);
        }
    }
}

#[test]
fn a_full_completion_queue_holds_commands_back() {
    let mut client = Client::ready(disk());
    let (sq, cq) = (BASE + 0x8_0000, BASE + 0x9_0000);
    assert_eq!(client.create_cq(1, cq, 4, 1), 0);
    assert_eq!(client.create_sq(1, sq, 64, 1), 0);
    let mut submit = Pair::new(1, 1, sq, cq, 64);
    let mut complete = Pair::new(1, 1, sq, cq, 4);
    let cids: Vec<_> = (0..63).map(|lba| client.push(&mut submit, read(lba))).collect();
    client.ring(&submit);
    let mut got = Vec::new();
    while got.len() < cids.len() {
        client.service();
        let before = got.len();
        while let Some(cqe) = client.poll(&mut complete) {
            got.push(cqe.cid);
        }
        assert_eq!(got.len() - before, 3);
        // A head that was not posted yet is refused; so is one outside of the queue.
        client.doorbell(3, (complete.head + 1) % 4);
        assert!(client.service() <= 1);
        client.doorbell(3, 4);
        assert!(client.service() <= 1);
        assert_eq!(client.poll(&mut complete), None);
        client.consumed(&complete);
    }
    assert_eq!(got, cids);
    assert_eq!(client.get(0x1c), 1);
}

#[test]
fn a_head_beyond_what_was_posted_is_refused() {
    let mut client = Client::ready(disk());
    let (sq, cq) = (BASE + 0x8_0000, BASE + 0x9_0000);
    assert_eq!((client.create_cq(1, cq, 4, 1), client.create_sq(1, sq, 16, 1)), (0, 0));
    let (mut submit, mut complete) = (Pair::new(1, 1, sq, cq, 16), Pair::new(1, 1, sq, cq, 4));
    let mut push = |client: &mut Client| {
        for lba in 0..2 {
            client.push(&mut submit, read(lba));
        }
        client.ring(&submit);
    };
    push(&mut client);
    assert_eq!(client.service(), 2);
    client.doorbell(3, 3);
    push(&mut client);
    // Told as an event, and then only the room that is known to be there is used.
    assert_eq!(client.controller.service(&mut client.memory), 1);
    assert_eq!(std::iter::from_fn(|| client.poll(&mut complete)).count(), 2);
    assert_eq!(client.controller.service(&mut client.memory), 1);
    assert_eq!(std::iter::from_fn(|| client.poll(&mut complete)).count(), 1);
    client.consumed(&complete);
    client.service();
    assert!(client.poll(&mut complete).is_some_and(|cqe| cqe.sq_head == 4 && cqe.status == 0));
}

#[test]
fn several_submission_queues_share_a_completion_queue() {
    let mut client = Client::ready(disk());
    let mut one = client.pair(1, 256);
    let mut others: Vec<_> =
        (2..6).map(|id| Pair::new(id, 1, BASE + 0x8_0000 + u64::from(id) * 0x4000, one.cq_base, 256)).collect();
    for pair in &others {
        assert_eq!(client.create_sq(pair.sq, pair.sq_base, 256, 1), 0);
    }
    client.memory.signals.clear();
    for _ in 0..30 {
        for pair in &mut others {
            client.push(pair, read(3));
        }
        client.push(&mut one, read(4));
    }
    for pair in others.iter().chain([&one]) {
        client.ring(pair);
    }
    assert_eq!(client.controller.service(&mut client.memory), 150);
    // One interrupt for all of them.
    assert_eq!(client.memory.signals.get(&1), Some(&1));
    let mut heads = [0; 6];
    while let Some(cqe) = client.poll(&mut one) {
        assert_eq!(cqe.status, 0);
        heads[usize::from(cqe.sq_id)] += 1;
        assert_eq!(cqe.sq_head, heads[usize::from(cqe.sq_id)]);
    }
    assert_eq!(heads, [0, 30, 30, 30, 30, 30]);
}

#[test]
fn a_busy_queue_does_not_starve_the_others() {
    let mut client = Client::ready(disk());
    let mut busy = client.pair(1, 255);
    let mut other = client.pair(2, 8);
    for _ in 0..200 {
        client.push(&mut busy, read(0));
    }
    client.push(&mut other, read(1));
    client.ring(&busy);
    client.ring(&other);
    let work = client.controller.service(&mut client.memory);
    assert!(work < 200);
    assert!(client.poll(&mut other).is_some());
}

#[test]
fn interrupts_only_where_they_were_asked_for() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(3, 8);
    assert_eq!(client.create_cq(4, BASE + 0x8_0000, 8, 4 << 16 | 1), 0);
    assert_eq!(client.create_sq(4, BASE + 0x9_0000, 8, 4), 0);
    let mut silent = Pair::new(4, 4, BASE + 0x9_0000, BASE + 0x8_0000, 8);
    client.memory.signals.clear();
    client.run(&mut pair, read(0));
    client.run(&mut silent, read(0));
    assert_eq!(client.memory.signals.iter().collect::<Vec<_>>(), [(&3, &1)]);
}

#[test]
fn queues_in_memory_that_is_not_there_are_fatal() {
    for direct in [true, false] {
        for (cq, sq) in [(BASE + 0x8_0000, BASE + MEMORY), (BASE + MEMORY, BASE + 0x8_0000), (0, BASE + 0x8_0000)] {
            let mut client = Client::with_memory(disk(), Memory::new(direct));
            client.enable();
            assert_eq!(client.create_cq(1, cq, 8, 3), 0);
            assert_eq!(client.create_sq(1, sq, 8, 1), 0);
            client.doorbell(2, 3);
            client.service();
            assert_eq!(client.get(0x1c), 3);
            client.set(0x14, 0);
            client.enable();
            let mut pair = client.pair(1, 8);
            assert_eq!(client.run(&mut pair, read(0)).status, 0);
        }
    }
}

#[test]
fn all_queues_at_once() {
    let mut client = Client::ready(disk());
    let base = BASE + 0x80_0000;
    let mut pairs = Vec::new();
    for id in 1..=64u16 {
        let at = base + u64::from(id) * 0x2000;
        assert_eq!(client.create_cq(id, at, 16, u32::from(id) << 16 | 3), 0);
        assert_eq!(client.create_sq(id, at + 0x1000, 16, id), 0);
        pairs.push(Pair::new(id, id, at + 0x1000, at, 16));
    }
    for pair in &mut pairs {
        for lba in 0..15 {
            client.push(pair, read(lba));
        }
        client.ring(pair);
    }
    assert_eq!(client.service(), 64 * 15);
    for pair in &mut pairs {
        assert_eq!(std::iter::from_fn(|| client.poll(pair)).filter(|cqe| cqe.status == 0).count(), 15);
    }
}
