//! From an eventfd to a task, as an interrupt comes: a thread writes the event and waits for the answer, which the contender's task
//! writes as soon as it runs. Both wakes are in the numbers, for all alike; the second is a blocking read.
//!
//! `--rounds N` and `--wakes N` (per block) make it shorter or longer; `--only WORD...` takes those contenders whose name has a word.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    pin::pin,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use compio::io::AsyncRead;
use futures::StreamExt;
use rustix::event::{EventfdFlags, epoll, eventfd};
use tokio::io::{Interest, unix::AsyncFd};
use vfio_uring::reactor::{Guest, Idle, Reactor, op::poll_multishot};
use vfio_uring_peers::{HEADS, arg, compare, cores, is_chosen, pin as pin_to, verdict};

/// A contender: its name, whether its eventfd blocks, and the body of its thread.
type Contender = (&'static str, EventfdFlags, fn(End));

const BLOCKING: EventfdFlags = EventfdFlags::CLOEXEC;
const NONBLOCK: EventfdFlags = EventfdFlags::CLOEXEC.union(EventfdFlags::NONBLOCK);

/// The first one is the reference.
const CONTENDERS: [Contender; 15] = [
    ("epoll + read", BLOCKING, epoll_read),
    ("io_uring multishot poll, never read", BLOCKING, bare_ring),
    ("vfio-uring, park", NONBLOCK, |end| native(end, Idle::Park)),
    ("vfio-uring, hybrid", NONBLOCK, |end| native(end, Idle::Hybrid)),
    ("vfio-uring in tokio, park", NONBLOCK, |end| current_thread().block_on(guest(end, Idle::Park))),
    ("vfio-uring in tokio, hybrid", NONBLOCK, |end| current_thread().block_on(guest(end, Idle::Hybrid))),
    ("vfio-uring in tokio-uring, park", NONBLOCK, |end| tokio_uring::start(guest(end, Idle::Park))),
    ("vfio-uring in tokio-uring, hybrid", NONBLOCK, |end| tokio_uring::start(guest(end, Idle::Hybrid))),
    ("tokio AsyncFd, read", NONBLOCK, |end| current_thread().block_on(async_fd_read(end))),
    ("tokio AsyncFd, never read", NONBLOCK, |end| current_thread().block_on(async_fd_ready(end))),
    ("tokio-uring read_at", BLOCKING, |end| tokio_uring::start(tokio_uring_read(end))),
    ("tokio AsyncFd in tokio-uring, never read", NONBLOCK, |end| tokio_uring::start(async_fd_ready(end))),
    ("monoio read_at", BLOCKING, monoio_read),
    ("compio AsyncFd, read", BLOCKING, |end| compio_runtime().block_on(compio_read(end))),
    ("compio PollFd, read", NONBLOCK, |end| compio_runtime().block_on(compio_poll(end))),
];
/// Contenders of ours, and the ratios they are to stay below on one core.
const BARS: [(usize, f64); 3] = [(2, 0.95), (4, 1.2), (6, 1.2)];

/// Wakes at the beginning of a block that are not timed.
const WARM_UP: u64 = 10;

fn main() {
    let (rounds, wakes) = (arg("--rounds", 512), arg("--wakes", 100) as u64);
    let cores = cores();
    let chosen = |index: &usize| *index == 0 || is_chosen(CONTENDERS[*index].0);
    let chosen: Vec<usize> = (0..CONTENDERS.len()).filter(chosen).collect();
    let peers: Vec<Peer> = chosen.iter().map(|&index| Peer::start(&CONTENDERS[index])).collect();
    let_others_sleep();
    println!("eventfd to task and back: ns, and ratio to {} (paired median and quartiles)\n", CONTENDERS[0].0);
    // Sleeping cores wake slowly, and no bar hangs on them.
    for (form, core, rounds) in
        [("one core", Some(cores[0]), rounds), ("two cores", cores.get(1).copied(), rounds.div_ceil(8))]
    {
        let Some(core) = core else {
            println!("{form}: skipped, this process has but one");
            continue;
        };
        pin_to(cores[0]);
        let summaries = compare(peers.len(), rounds, wakes, |which| peers[which].block(core, wakes));
        println!("{:<42}{HEADS}", format!("{form}, {rounds} rounds of {wakes} wakes"));
        for (peer, summary) in peers.iter().zip(&summaries) {
            println!("{:<42}{summary}", peer.name);
        }
        println!();
        for (index, bar) in BARS {
            if let Some(at) = chosen.iter().position(|&chosen| chosen == index)
                && form == "one core"
            {
                let ratio = summaries[at].ratio[1];
                println!("{}: {ratio:.3}, at most {bar}: {}\n", peers[at].name, verdict(ratio <= bar));
            }
        }
    }
    peers.into_iter().for_each(Peer::join);
}

/// Keeps this thread from taking the core as soon as an answer is written: an interrupt finds a task that sleeps, and so shall the
/// events here. Without that, the next event is there before a contender has looked for it.
fn let_others_sleep() {
    // SAFETY: the call reads a parameter of its type.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &libc::sched_param { sched_priority: 0 }) };
    assert_eq!(result, 0, "every thread may become a batch one");
}

/// A number of wakes, to be answered from a core.
struct Job {
    core: usize,
    wakes: u64,
}

/// The producer's side of a contender.
struct Peer {
    name: &'static str,
    event: Arc<OwnedFd>,
    answer: Arc<OwnedFd>,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

impl Peer {
    fn start(&(name, flags, body): &Contender) -> Self {
        let event = Arc::new(eventfd(0, flags).expect("an eventfd"));
        let answer = Arc::new(eventfd(0, BLOCKING).expect("an eventfd"));
        let (jobs, inbox) = mpsc::channel();
        let end = End { event: event.clone(), answer: answer.clone(), jobs: inbox };
        let thread = thread::Builder::new().name(name.into()).spawn(move || body(end)).expect("a thread");
        Self { name, event, answer, jobs, thread }
    }

    /// The time that `wakes` round trips took.
    fn block(&self, core: usize, wakes: u64) -> Duration {
        self.jobs.send(Job { core, wakes: WARM_UP + wakes }).unwrap_or_else(|_| panic!("{} has ended", self.name));
        (0..WARM_UP).for_each(|_| self.round_trip());
        let start = Instant::now();
        (0..wakes).for_each(|_| self.round_trip());
        start.elapsed()
    }

    fn round_trip(&self) {
        signal(&self.event);
        assert_eq!(take(&self.answer), 1, "{} took one event for two", self.name);
    }

    fn join(self) {
        drop(self.jobs);
        self.thread.join().unwrap_or_else(|_| panic!("{} has failed", self.name));
    }
}

/// The contender's side.
struct End {
    event: Arc<OwnedFd>,
    answer: Arc<OwnedFd>,
    jobs: Receiver<Job>,
}

impl End {
    /// Answers the events that `wait` waits for. Between jobs the thread blocks here, whatever else it runs.
    async fn serve(&self, mut wait: impl AsyncFnMut()) {
        while let Ok(job) = self.jobs.recv() {
            pin_to(job.core);
            for _ in 0..job.wakes {
                wait().await;
                signal(&self.answer);
            }
        }
    }

    fn file(&self) -> std::fs::File {
        self.event.try_clone().expect("a second descriptor").into()
    }
}

fn signal(fd: &impl AsFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).expect("a counter far from full");
}

fn take(fd: &impl AsFd) -> u64 {
    try_take(fd).expect("a counter")
}

fn try_take(fd: &impl AsFd) -> io::Result<u64> {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count)?;
    Ok(u64::from_ne_bytes(count))
}

/// Polls a future that never waits for another: what has no executor blocks where it would.
fn at_once(future: impl Future<Output = ()>) {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(pin!(future).poll(&mut cx).is_ready());
}

fn epoll_read(end: End) {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll");
    epoll::add(&poll, &end.event, epoll::EventData::new_u64(0), epoll::EventFlags::IN).expect("an eventfd");
    let mut events = Vec::with_capacity(8);
    at_once(end.serve(async || {
        events.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None).expect("an event");
        take(&end.event);
    }));
}

fn bare_ring(end: End) {
    let ring = io_uring::IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8);
    let mut ring: io_uring::IoUring = ring.expect("a ring with DEFER_TASKRUN, which Linux has from 6.1 on");
    let target = io_uring::types::Fd(end.event.as_raw_fd());
    let mut armed = false;
    at_once(end.serve(async || {
        if !armed {
            let entry = io_uring::opcode::PollAdd::new(target, libc::POLLIN as u32).multi(true).build();
            // SAFETY: a poll points to nothing.
            unsafe { ring.submission().push(&entry) }.expect("an empty queue");
        }
        ring.submit_and_wait(1).expect("a wait");
        armed = ring.completion().all(|event| io_uring::cqueue::more(event.flags()));
    }));
}

fn native(end: End, idle: Idle) {
    let reactor = Reactor::builder().idle(idle).build().expect("a reactor");
    reactor.block_on(ours(&end));
}

async fn guest(end: End, idle: Idle) {
    let mut guest = Reactor::builder().idle(idle).guest().expect("a guest");
    Guest::run(&mut guest, ours(&end)).await.expect("a tokio runtime");
}

async fn ours(end: &End) {
    let mut events = poll_multishot(&end.event, libc::POLLIN as u32);
    end.serve(async || _ = events.next().await.expect("no end").expect("an event")).await;
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn async_fd(end: &End) -> AsyncFd<Arc<OwnedFd>> {
    // SAFETY: an owned descriptor is the same and open for as long as it lives.
    unsafe { AsyncFd::register_with_interest(end.event.clone(), Interest::READABLE) }.expect("an event loop")
}

/// As tokio's documentation has it: readiness is cleared when a read would block.
async fn async_fd_read(end: End) {
    let fd = async_fd(&end);
    end.serve(async || {
        loop {
            let mut ready = fd.readable().await.expect("an event loop");
            if let Ok(count) = ready.try_io(|fd| try_take(fd.get_ref())) {
                count.expect("a counter");
                return;
            }
        }
    })
    .await;
}

async fn async_fd_ready(end: End) {
    let fd = async_fd(&end);
    end.serve(async || fd.readable().await.expect("an event loop").clear_ready()).await;
}

async fn tokio_uring_read(end: End) {
    let file = tokio_uring::fs::File::from_std(end.file());
    let mut buf = Some(Vec::with_capacity(8));
    end.serve(async || {
        let (result, back) = file.read_at(buf.take().expect("a buffer"), 0).await;
        assert_eq!(result.expect("a read"), 8);
        buf = Some(back);
    })
    .await;
}

fn monoio_read(end: End) {
    let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build().expect("a runtime");
    runtime.block_on(async {
        let file = monoio::fs::File::from_std(end.file()).expect("a file");
        let mut buf = Some(Vec::with_capacity(8));
        end.serve(async || {
            let (result, back) = file.read_at(buf.take().expect("a buffer"), 0).await;
            assert_eq!(result.expect("a read"), 8);
            buf = Some(back);
        })
        .await;
    });
}

fn compio_runtime() -> compio::runtime::Runtime {
    compio::runtime::Runtime::new().expect("a runtime")
}

async fn compio_read(end: End) {
    let mut fd = compio::runtime::fd::AsyncFd::new(end.file()).expect("a descriptor");
    let mut buf = Some(Vec::with_capacity(8));
    end.serve(async || {
        let compio::buf::BufResult(result, mut back) = fd.read(buf.take().expect("a buffer")).await;
        assert_eq!(result.expect("a read"), 8);
        back.clear();
        buf = Some(back);
    })
    .await;
}

async fn compio_poll(end: End) {
    let fd = compio::runtime::fd::PollFd::new(end.file()).expect("a descriptor");
    end.serve(async || {
        fd.read_ready().await.expect("an event");
        take(&end.event);
    })
    .await;
}
