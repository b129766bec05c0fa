//! What the benchmarks share: a queue pair, a device that is serviced inline on the same thread, and the floor, which is the
//! same I/O loop written by hand, without futures, on the same queue memory.

#[allow(dead_code, reason = "each bench uses a part of it")]
pub mod forward;

use std::{
    cell::Cell,
    future::Future,
    hint::black_box,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use vfio_uring::{
    device::Posted,
    dma::{AddressSpace, Backend, DmaBuf, DmaRing, HugePages, IovaRange, Pool, SharedMemory},
    mmio::Register,
    reactor::{Poller, Reactor, Standby},
};
use vfio_uring_nvme::{
    CommandStream, Completion, Io, Namespace, NamespaceInfo, Parts, Queue,
    spec::{Cqe, CqeTail, Sqe, Status, nvm},
};

pub const BLOCK: usize = 4096;
pub const BLOCKS: u64 = 1 << 20;

/// Doorbells in memory that two sides share.
#[derive(Clone)]
pub struct Doorbells(Arc<SharedMemory>);

impl Doorbells {
    pub fn new() -> Self {
        Self(Arc::new(SharedMemory::create("doorbells", 4096, HugePages::No).expect("a memfd").1))
    }

    pub fn register(&self, index: u64) -> Register<u32> {
        Register::new(&self.0, index * 4).expect("inside of the page")
    }
}

/// A device that completes every command at once when it is serviced. Its cost is not the client's.
pub struct InlineDevice {
    memory: SharedMemory,
    base: u64,
    sq: Cell<u64>,
    cq: Cell<u64>,
    entries: u32,
    sq_tail: Register<u32>,
    sq_head: Cell<u32>,
    cq_tail: Cell<u32>,
    phase: Cell<bool>,
}

impl InlineDevice {
    /// Serves the queues of `depth` slots in `space`, whose one mapping is the queue's memory.
    pub fn new(space: &AddressSpace, depth: usize, doorbells: &Doorbells) -> Self {
        let mapping = space.mappings().into_iter().next().expect("the queue's memory");
        Self {
            memory: SharedMemory::map(mapping.fd.expect("memory of ours"), 0, mapping.len, true).expect("a second mapping"),
            base: mapping.iova,
            sq: Cell::new(0),
            cq: Cell::new(0),
            entries: depth as u32 + 1,
            sq_tail: doorbells.register(0),
            sq_head: Cell::new(0),
            cq_tail: Cell::new(0),
            phase: Cell::new(true),
        }
    }

    pub fn start(&self, sq: u64, cq: u64) {
        self.sq.set(sq - self.base);
        self.cq.set(cq - self.base);
    }

    /// Completes what was submitted; how many commands that were.
    #[inline(never)]
    pub fn device_service(&self) -> u32 {
        let tail = self.sq_tail.read_before_dma();
        let mut served = 0;
        while self.sq_head.get() != tail {
            let head = self.sq_head.get();
            let sqe: Sqe = self.memory.read_obj(self.sq.get() + u64::from(head) * 64).expect("inside");
            let next = (head + 1) % self.entries;
            self.sq_head.set(next);
            let slot = self.cq_tail.get();
            let at = self.cq.get() + u64::from(slot) * 16;
            let cqe = Cqe::new(0, next as u16, 1, sqe.cid(), self.phase.get(), Status(0));
            self.memory.write_obj(at, &cqe).expect("inside");
            self.cq_tail.set((slot + 1) % self.entries);
            if slot + 1 == self.entries {
                self.phase.set(!self.phase.get());
            }
            served += 1;
        }
        served
    }
}

impl Poller for InlineDevice {
    fn poll(&self) -> bool {
        self.device_service() != 0
    }

    fn standby(&self) -> Standby {
        Standby::Idle
    }
}

/// A queue of ours with its inline device, and a buffer for each slot.
pub struct Rig {
    pub namespace: Namespace,
    pub device: Rc<InlineDevice>,
    pub bufs: Vec<DmaBuf>,
    _queue: Queue,
}

pub fn space() -> AddressSpace {
    AddressSpace::new(Backend::Null, &[IovaRange { start: 0x1000, last: (1 << 47) - 1 }], 4096, 64)
}

impl Rig {
    /// Inside of a reactor.
    pub async fn new(depth: usize) -> Self {
        let space = space();
        let max_transfer = 128 << 10;
        let memory = Pool::new(&space, Parts::memory(depth, max_transfer), HugePages::No).await.expect("memory");
        let doorbells = Doorbells::new();
        let device = Rc::new(InlineDevice::new(&space, depth, &doorbells));
        let parts = Parts {
            id: 1,
            slots: depth,
            memory,
            max_transfer,
            sq_doorbell: Posted::from(doorbells.register(0)),
            cq_doorbell: Posted::from(doorbells.register(1)),
            timeout: Duration::from_secs(10),
            watch: None,
            interrupt: None,
        };
        let info = NamespaceInfo { nsid: 1, blocks: BLOCKS, block_size: BLOCK as u32, metadata: 0 };
        let queue = Queue::from_parts(parts, &[info], |sq, cq| device.start(sq, cq)).expect("a queue");
        let data = Pool::new(&space, depth * BLOCK, HugePages::No).await.expect("memory");
        let bufs = (0..depth).map(|_| data.alloc(BLOCK).expect("a buffer")).collect();
        Self { namespace: queue.namespace(1).expect("namespace 1"), device, bufs, _queue: queue }
    }
}

/// Cheap block numbers, the same for every contestant.
pub struct Lbas(u64);

impl Lbas {
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 & (BLOCKS - 1)
    }
}

/// The floor: the loop that one would write by hand for this one purpose.
pub struct Floor {
    sq: DmaRing<Sqe>,
    cq: DmaRing<Cqe>,
    sq_doorbell: Register<u32>,
    cq_doorbell: Register<u32>,
    pub device: InlineDevice,
    bufs: Vec<DmaBuf>,
    tail: usize,
    head: usize,
    phase: bool,
    depth: usize,
}

impl Floor {
    pub fn new(depth: usize) -> Self {
        let space = space();
        let pool = |bytes| futures::executor::block_on(Pool::new(&space, bytes, HugePages::No)).expect("memory");
        let memory = pool(Parts::memory(depth, BLOCK));
        let doorbells = Doorbells::new();
        let device = InlineDevice::new(&space, depth, &doorbells);
        let ring = |bytes: usize| memory.alloc(bytes).expect("ring").into_shared();
        let sq = DmaRing::new(ring((depth + 1) * 64)).expect("ring");
        let cq = DmaRing::<Cqe>::new(ring((depth + 1) * 16)).expect("ring");
        device.start(sq.iova(), cq.iova());
        let data = pool(depth * BLOCK);
        Self {
            sq,
            cq,
            sq_doorbell: doorbells.register(0),
            cq_doorbell: doorbells.register(1),
            device,
            bufs: (0..depth).map(|_| data.alloc(BLOCK).expect("a buffer")).collect(),
            tail: 0,
            head: 0,
            phase: true,
            depth,
        }
    }

    /// `count` I/Os, at most `depth` at once.
    #[inline(never)]
    pub fn run(&mut self, count: u64) {
        let mut lbas = Lbas::new();
        let entries = self.depth + 1;
        let first = count.min(self.depth as u64);
        (0..first as u16).for_each(|cid| self.submit(cid, lbas.next()));
        let (mut submitted, mut completed) = (first, 0);
        while completed < count {
            self.sq_doorbell.write_after_dma(self.tail as u32);
            self.device.device_service();
            let mut taken = false;
            loop {
                let tail = CqeTail(self.cq.load_u64(self.head, CqeTail::OFFSET).expect("inside"));
                if tail.phase() != self.phase {
                    break;
                }
                assert!(tail.status().is_ok());
                self.head += 1;
                if self.head == entries {
                    self.head = 0;
                    self.phase = !self.phase;
                }
                completed += 1;
                taken = true;
                // The command's slot and buffer go out again.
                if submitted < count {
                    submitted += 1;
                    self.submit(black_box(tail.cid()), lbas.next());
                }
            }
            if taken {
                self.cq_doorbell.write(self.head as u32);
            }
        }
    }

    #[inline(always)]
    fn submit(&mut self, cid: u16, lba: u64) {
        let sqe = Sqe::new(nvm::READ, 1)
            .prps(self.bufs[usize::from(cid)].iova(), 0)
            .dwords10(lba as u32, (lba >> 32) as u32)
            .with_cid(cid);
        self.sq.set(self.tail, &sqe).expect("inside");
        self.tail = if self.tail == self.depth { 0 } else { self.tail + 1 };
    }
}

/// `count` reads by the completion stream. `SPLIT` gives the submission a name that callgrind can tell apart.
pub async fn stream<const SPLIT: bool>(rig: &mut Rig, count: u64) {
    let stream = rig.namespace.stream().expect("the only stream");
    let mut lbas = Lbas::new();
    let (mut submitted, mut completed, mut failed) = (0, 0, 0);
    let mut idle = std::mem::take(&mut rig.bufs);
    while submitted < count
        && let Some(buf) = idle.pop()
    {
        submitted += 1;
        submit(&stream, lbas.next(), buf);
    }
    while completed < count {
        // A buffer goes out again as soon as it is back.
        let each = |completion: Completion| {
            failed += u32::from(!completion.status.is_ok());
            if submitted == count {
                return idle.push(completion.buf);
            }
            submitted += 1;
            let lba = lbas.next();
            if SPLIT { first_poll_of_stream(&stream, lba, completion.buf) } else { submit(&stream, lba, completion.buf) }
        };
        completed += stream.take(each) as u64;
        stream.ready().await.expect("the queue lives");
    }
    assert_eq!(failed, 0);
    rig.bufs = idle;
}

#[inline]
fn submit(stream: &CommandStream, lba: u64, buf: DmaBuf) {
    stream.submit_read(lba, buf).expect("a free slot");
}

#[inline(never)]
fn first_poll_of_stream(stream: &CommandStream, lba: u64, buf: DmaBuf) {
    submit(stream, lba, buf);
}

/// `count` reads (rounded down to the same number for each task) by a future each, from one task for each slot.
pub async fn futures<const SPLIT: bool>(rig: &mut Rig, count: u64) {
    let bufs = std::mem::take(&mut rig.bufs);
    let each = count / bufs.len() as u64;
    let tasks: Vec<_> = bufs
        .into_iter()
        .map(|mut buf| {
            let ns = rig.namespace.clone();
            vfio_uring::reactor::spawn(async move {
                let mut lbas = Lbas::new();
                for _ in 0..each {
                    let io = ns.read(lbas.next(), buf);
                    let (result, back) = if SPLIT { FirstPoll(io, false).await } else { io.await };
                    result.expect("a read");
                    buf = back;
                }
                buf
            })
        })
        .collect();
    for task in tasks {
        rig.bufs.push(task.await.expect("the task ran to its end"));
    }
}

/// Gives the submission a name that callgrind can tell apart.
struct FirstPoll<'a>(Io<'a>, bool);

impl<'a> Future for FirstPoll<'a> {
    type Output = <Io<'a> as Future>::Output;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if std::mem::replace(&mut this.1, true) { Pin::new(&mut this.0).poll(cx) } else { first_poll(&mut this.0, cx) }
    }
}

#[inline(never)]
fn first_poll<'a>(io: &mut Io<'a>, cx: &mut Context<'_>) -> Poll<<Io<'a> as Future>::Output> {
    Pin::new(io).poll(cx)
}

pub fn reactor() -> Reactor {
    Reactor::new().expect("a reactor")
}
