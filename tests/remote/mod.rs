//! What the tests of the NVMe driver's handle for other threads share: a reactor thread that owns a queue.

#![allow(dead_code, reason = "each test binary uses a part of it")]

#[path = "../support/pattern.rs"]
mod pattern;

use std::{
    pin::Pin,
    sync::mpsc,
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use futures::{
    channel::oneshot,
    future::{Either, LocalBoxFuture, select},
};
pub use pattern::{fill, is_filled};
use vfio_uring::{
    device::{Address, Device},
    dma::{DmaBuf, HugePages, Pool},
    reactor::{self, Reactor},
};
use vfio_uring_models::{
    nvme::{Config, Faults, NamespaceConfig},
    server::Running,
};
use vfio_uring_nvme::{Controller, Options, Remote, RemoteIo, RemoteRunner, Result};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: usize = 4096;
/// No test takes this long.
pub const LIMIT: Duration = Duration::from_secs(240);

pub fn disk(bytes: u64) -> Config {
    Config { namespaces: vec![NamespaceConfig::memory(bytes).with_lba_size(BLOCK as u32)], ..Config::default() }
}

pub fn with_faults(config: Config, faults: Faults) -> Config {
    Config { faults, ..config }
}

/// Commands that read block 64 never complete.
pub fn stall() -> Faults {
    Faults { drop_completion_lba: Some(64), ..Faults::default() }
}

/// A reactor thread that owns a queue, and runs the handle's runner.
pub struct Owner {
    pub remote: Remote,
    pub pool: Pool,
    /// Ends the reactor, whatever is under way.
    pub quit: oneshot::Sender<()>,
    /// `Some`: the runner came to its end, and so the controller was shut down.
    pub thread: thread::JoinHandle<Option<Result<()>>>,
}

pub type Run = Box<dyn FnOnce(RemoteRunner) -> LocalBoxFuture<'static, ()> + Send>;

pub struct Setup {
    pub depth: usize,
    pub capacity: usize,
    pub timeout: Duration,
    /// What becomes of the runner.
    pub run: Run,
}

impl Default for Setup {
    fn default() -> Self {
        Self { depth: 32, capacity: 64, timeout: Duration::from_secs(20), run: Box::new(|runner| Box::pin(runner.run())) }
    }
}

impl Setup {
    pub fn start(self, server: &Running) -> Owner {
        let address: Address = server.address().parse().unwrap();
        let (sender, receiver) = mpsc::channel();
        let (quit, quitting) = oneshot::channel();
        let thread = thread::spawn(move || {
            let reactor = Reactor::new().unwrap();
            reactor.block_on(async {
                let device = Device::open(&address).await.unwrap();
                let options = Options { timeout: self.timeout, ..Options::default() };
                let controller = Controller::new(&device, options).await.unwrap();
                let ns = controller.create_queue(self.depth).await.unwrap().namespace(1).unwrap();
                let (remote, runner) = ns.remote(self.capacity).unwrap();
                let pool = Pool::new(device.dma(), 16 << 20, HugePages::No).await.unwrap();
                sender.send((remote, pool)).unwrap();
                // Only the reactor's end ends this task then.
                let runner = reactor::spawn((self.run)(runner));
                match select(runner, quitting).await {
                    Either::Left(_) => Some(controller.shutdown().await),
                    Either::Right(_) => None,
                }
            })
        });
        let (remote, pool) = receiver.recv_timeout(LIMIT).unwrap();
        Owner { remote, pool, quit, thread }
    }
}

/// Runs a test's body; a hang fails it.
pub fn bounded(body: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let body = thread::spawn(move || {
        body();
        let _ = sender.send(());
    });
    match receiver.recv_timeout(LIMIT) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        _ => body.join().unwrap(),
    }
}

/// Runs threads, and waits for them all.
pub fn threads(count: u64, body: impl Fn(u64) + Send + Sync) {
    thread::scope(|scope| {
        for i in 0..count {
            let body = &body;
            scope.spawn(move || body(i));
        }
    });
}

pub fn poll_once(io: &mut RemoteIo) -> Poll<(Result<()>, DmaBuf)> {
    Pin::new(io).poll(&mut Context::from_waker(Waker::noop()))
}

/// The runner has come to its end in order, and all memory is back.
pub fn ended_in_order(owner: Owner) {
    let Owner { remote, pool, thread, quit } = owner;
    drop(remote);
    thread.join().unwrap().expect("the runner ends with the last handle").unwrap();
    drop(quit);
    assert_eq!((pool.stats().free, pool.stats().quarantined), (pool.stats().bytes, 0));
}

/// Looks until it is so.
pub fn wait_until(so: impl Fn() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < LIMIT / 2, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}
