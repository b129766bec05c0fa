//! A completion queue that a hostile controller writes: any entry, anywhere, at any time, beside commands of every form.

#![no_main]

use std::{pin::pin, sync::Arc, task::Poll, time::Duration};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_uring::{
    device::Posted,
    dma::{AddressSpace, Backend, HugePages, IovaRange, Pool, SharedMemory},
    mmio::Register,
    reactor::{Reactor, spawn, yield_now},
};
use vfio_uring_nvme::{
    NamespaceInfo, Parts, Queue,
    spec::{Cqe, Status},
};

const SLOTS: usize = 5;

#[derive(Arbitrary, Debug)]
enum Step {
    Read {
        lba: u8,
        pages: u8,
    },
    DroppedRead,
    Stream {
        lba: u8,
    },
    TakeStream,
    Turn,
    /// A completion at the place that is next, with the right phase when `phase` says so.
    Complete {
        cid: u16,
        sq: bool,
        head: u8,
        phase: bool,
        status: u16,
    },
    /// A completion of the command that was submitted last but `back`.
    CompleteTruly {
        back: u8,
        status: u16,
    },
    Write {
        at: u8,
        words: [u64; 2],
    },
}

thread_local! {
    static REACTOR: Reactor = Reactor::new().expect("a reactor");
}

fuzz_target!(|steps: Vec<Step>| {
    REACTOR.with(|reactor| reactor.block_on(run(&steps[..steps.len().min(200)])));
});

async fn run(steps: &[Step]) {
    let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0x1000, last: u64::MAX >> 16 }], 4096, 64);
    let memory = Pool::new(&space, Parts::memory(SLOTS, 16384), HugePages::No).await.expect("memory");
    let mapping = space.mappings().remove(0);
    let device = SharedMemory::map(mapping.fd.expect("memory of ours"), 0, mapping.len, true).expect("a mapping");
    let doorbells = Arc::new(SharedMemory::create("doorbells", 4096, HugePages::No).expect("a memfd").1);
    let doorbell = |offset| Posted::from(Register::<u32>::new(&doorbells, offset).expect("inside"));
    let parts = Parts {
        id: 1,
        slots: SLOTS,
        memory,
        max_transfer: 16384,
        sq_doorbell: doorbell(0),
        cq_doorbell: doorbell(4),
        timeout: Duration::from_secs(3600),
        watch: None,
        interrupt: None,
    };
    let info = NamespaceInfo { nsid: 1, blocks: 200, block_size: 4096, metadata: 0 };
    let (mut sq, mut cq) = (0, 0);
    let queue =
        Queue::from_parts(parts, &[info], |sq_iova, cq_iova| (sq, cq) = (sq_iova - mapping.iova, cq_iova - mapping.iova))
            .expect("a queue");
    let ns = queue.namespace(1).expect("namespace 1");
    let data = Pool::new(&space, 64 * 4096, HugePages::No).await.expect("memory");
    let stream = ns.stream().expect("the only stream");
    let mut tasks = Vec::new();
    let (mut head, mut phase) = (0u64, true);
    let entries = SLOTS as u64 + 1;
    for step in steps {
        match *step {
            Step::Read { lba, pages } => {
                let Ok(buf) = data.alloc(4096 * (1 + usize::from(pages % 9))) else { continue };
                let ns = ns.clone();
                tasks.push(spawn(async move { ns.read(lba.into(), buf).await.1 }));
            }
            Step::DroppedRead => {
                let Ok(buf) = data.alloc(4096) else { continue };
                let mut read = pin!(ns.read(0, buf));
                std::future::poll_fn(|cx| {
                    let _ = read.as_mut().poll(cx);
                    Poll::Ready(())
                })
                .await;
            }
            Step::Stream { lba } => {
                let Ok(buf) = data.alloc(4096) else { continue };
                let _ = stream.submit_read(lba.into(), buf);
            }
            Step::TakeStream => {
                let mut next = pin!(stream.next_batch(drop));
                std::future::poll_fn(|cx| {
                    let _ = next.as_mut().poll(cx);
                    Poll::Ready(())
                })
                .await;
            }
            Step::Turn => yield_now().await,
            Step::Complete { cid, sq, head: at, phase: right, status } => {
                let cqe = Cqe::new(0, at.into(), u16::from(!sq), cid, right == phase, Status(status & 0x7fff));
                device.write_obj(cq + head * 16, &cqe).expect("inside");
                advance(&mut head, &mut phase, entries);
            }
            Step::CompleteTruly { back, status } => {
                let tail = u64::from(doorbells.load_u32(0).expect("inside"));
                let at = (tail + entries - 1 - u64::from(back) % entries) % entries;
                let cid = (device.load_u64(sq + at * 64).expect("inside") >> 16) as u16;
                let cqe = Cqe::new(0, 0, 1, cid, phase, Status(status & 0x7fff));
                device.write_obj(cq + head * 16, &cqe).expect("inside");
                advance(&mut head, &mut phase, entries);
            }
            Step::Write { at, words } => {
                device.write_obj(cq + u64::from(at) % entries * 16, &words).expect("inside");
            }
        }
    }
    yield_now().await;
    // No memory of a command that may be under way is handed out: nothing that can be had now overlaps.
    let before = data.stats();
    assert!(before.free + before.quarantined <= before.bytes);
    drop(stream);
    drop((ns, queue));
    for task in tasks {
        task.abort();
        drop(task);
    }
}

fn advance(head: &mut u64, phase: &mut bool, entries: u64) {
    *head += 1;
    if *head == entries {
        *head = 0;
        *phase = !*phase;
    }
}
