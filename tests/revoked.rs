//! NVMe while its device is taken away, on whatever device there is (see `device/mod.rs`): in the midst of its I/O it is reset, its memory
//! is switched off, or it vanishes. Every command ends in time and with the right error, all memory is free again, and the
//! controller comes up again on the same handle.

mod device;

use std::{cell::Cell, rc::Rc, time::Duration};

use device::{Rig, fill, is_filled, run};
use vfio_uring::{
    Error as Runtime,
    device::{Device, State},
    dma::{HugePages, Pool},
    reactor::{Idle, JoinHandle, spawn, timeout, yield_now},
};
use vfio_uring_nvme::{Controller, Error, Namespace, Options};

const PAGE: usize = 4096;
/// Commands outstanding on each of the two queues.
const DEPTH: usize = 16;
/// Within this all commands have to end.
const SOON: Duration = Duration::from_secs(20);

/// I/O on two queues, one of which is polled, until it fails.
struct Load {
    tasks: Vec<JoinHandle<Error>>,
    done: Rc<Cell<u64>>,
    pool: Pool,
}

impl Load {
    async fn start(nvme: &Controller) -> Self {
        let done = Rc::new(Cell::new(0));
        // Each has two buffers, so that the pool has room for all at any time.
        let pool = Pool::new(nvme.device().dma(), 2 * DEPTH * PAGE, HugePages::No).await.unwrap();
        let queues = [nvme.create_queue(DEPTH).await.unwrap(), nvme.create_interrupt_queue(DEPTH).await.unwrap()];
        let mut tasks = Vec::new();
        for (number, queue) in (0..).zip(&queues) {
            for lane in 0..DEPTH as u64 {
                let ns = queue.namespace(2).unwrap();
                tasks.push(spawn(io(ns, pool.clone(), 64 + number * DEPTH as u64 + lane, done.clone())));
            }
        }
        Self { tasks, done, pool }
    }

    /// Waits until it is well under way.
    async fn flow(&self) {
        let until = self.done.get() + 4 * DEPTH as u64;
        while self.done.get() < until {
            yield_now().await;
        }
    }

    /// Waits for the end of all, which is for the reason that `right` knows.
    async fn end(&mut self, right: impl Fn(&Error) -> bool) {
        let end = async {
            for task in self.tasks.drain(..) {
                let error = task.await.unwrap();
                assert!(right(&error), "{error}");
            }
        };
        timeout(SOON, end).await.expect("every command ends");
    }

    /// All buffers are free again.
    fn all_is_back(self) {
        let stats = self.pool.stats();
        assert_eq!((stats.free, stats.quarantined), (stats.bytes, 0), "all buffers are back");
    }
}

/// What ended a queue.
fn cause(error: &Error) -> &Error {
    match error {
        Error::Ended(error) => cause(error),
        error => error,
    }
}

/// Whether the memory of the registers was not there.
fn is_unavailable(error: &Error) -> bool {
    matches!(cause(error), Error::Runtime(error) if matches!(**error, Runtime::MmioUnavailable { .. } | Runtime::Unavailable { .. }))
}

async fn io(ns: Namespace, pool: Pool, lba: u64, done: Rc<Cell<u64>>) -> Error {
    let mut buf = pool.alloc(PAGE).unwrap();
    loop {
        fill(&mut buf, lba);
        let (written, back) = ns.write(lba, buf).await;
        if let Err(error) = written {
            return error;
        }
        let (read, back) = ns.read(lba, back).await;
        if let Err(error) = read {
            return error;
        }
        assert!(is_filled(&back, lba));
        buf = back;
        done.set(done.get() + 1);
    }
}

/// Nothing is left of a controller but what was there before.
async fn nothing_is_left(device: &Device) {
    while device.dma().stats().retired > 0 {
        device.dma().reclaim().await;
    }
    let stats = device.dma().stats();
    assert_eq!((stats.mappings, stats.leaked, stats.quarantined), (0, 0, 0), "{stats:?}");
}

#[test]
fn reset_in_the_midst_of_io() {
    for idle in [Idle::Park, Idle::Hybrid] {
        run(idle, async {
            let rig = Rig::open().await;
            for _ in 0..5 {
                let generation = rig.device.generation();
                let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
                let mut load = Load::start(&nvme).await;
                load.flow().await;
                rig.device.reset().await.unwrap();
                assert_eq!((rig.device.state(), rig.device.generation()), (State::Live, generation + 1));
                load.end(|error| matches!(cause(error), Error::Reset)).await;
                load.all_is_back();
                nvme.shutdown().await.expect("nothing is left to do");
                nothing_is_left(&rig.device).await;
            }
        });
    }
}

#[test]
fn memory_off_in_the_midst_of_io() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        for _ in 0..5 {
            let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
            let mut load = Load::start(&nvme).await;
            load.flow().await;
            rig.device.set_memory(false).await.unwrap();
            assert_eq!(rig.device.state(), State::Unavailable);
            load.end(is_unavailable).await;
            assert!(nvme.reset().await.is_err(), "it can't be reached");
            rig.device.set_memory(true).await.unwrap();
            assert_eq!(rig.device.state(), State::Live);
            // It has noticed nothing, and has to be told to stop before its memory is free.
            nvme.reset().await.unwrap();
            load.all_is_back();
            drop(nvme);
            nothing_is_left(&rig.device).await;
        }
    });
}
