//! NVMe while its device is taken away, on whatever device there is (see `device/mod.rs`): in the midst of its I/O it is reset, its memory
//! is switched off, or it vanishes. Every command ends in time and with the right error, all memory is free again, and the
//! controller comes up again on the same handle.

mod device;

use std::{cell::Cell, env, fs, path::Path, process::Command, rc::Rc, thread, time::Duration};

use device::{Rig, fill, is_filled, run};
use vfio_uring::{
    Error as Runtime,
    device::{Device, Options as DeviceOptions, RemovalPolicy, State},
    dma::{HugePages, Pool},
    reactor::{Idle, JoinHandle, sleep, spawn, timeout, yield_now},
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
                let ns = queue.namespace(1).unwrap();
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

async fn io(ns: Namespace, pool: Pool, page: u64, done: Rc<Cell<u64>>) -> Error {
    let lba = page * (PAGE / ns.block_size()) as u64;
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

/// The device that QEMU calls `plug`, in the guest: opened, with its address and a short time of grace.
async fn plug() -> Option<(Device, String)> {
    let Ok(bdf) = env::var("VFIO_URING_TEST_PLUG") else {
        println!("VFIO_URING_TEST_PLUG names no device to take away");
        return None;
    };
    // After it was plugged in or unbound, nobody has it, or the kernel's driver.
    assert!(Command::new("/bin/sh").args(["-c", &format!(". /etc/profile; vfio {bdf}")]).status().unwrap().success());
    let removal = RemovalPolicy { grace: Some(Duration::from_millis(500)) };
    let options = DeviceOptions { removal, ..DeviceOptions::default() };
    Some((Device::open_with(&device::address(&bdf), options).await.unwrap(), bdf))
}

/// Waits for a file, or for its end.
async fn until(there: bool, path: &str) {
    timeout(SOON, async {
        while Path::new(path).exists() != there {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{path}: there is {there} expected"));
}

fn is_gone(error: &Error) -> bool {
    matches!(cause(error), Error::Runtime(error) if matches!(**error, Runtime::Gone { .. }))
}

/// Nobody lets go of anything; the queues end when the device is taken away, and all that they had is free.
async fn taken_away(device: Device, take: impl FnOnce() + Send + 'static) {
    let nvme = Controller::new(&device, Options::default()).await.unwrap();
    let mut load = Load::start(&nvme).await;
    load.flow().await;
    let taker = thread::spawn(take);
    load.end(is_gone).await;
    timeout(SOON, device.gone()).await.expect("it is gone");
    while !device.is_stopped() {
        sleep(Duration::from_millis(10)).await;
    }
    nvme.reset().await.expect("nothing is left to do");
    load.all_is_back();
    assert!(is_gone(&Controller::new(&device, Options::default()).await.unwrap_err()));
    drop(nvme);
    nothing_is_left(&device).await;
    while !taker.is_finished() {
        sleep(Duration::from_millis(10)).await;
    }
    taker.join().unwrap();
}

#[test]
fn unbound_in_the_midst_of_io() {
    run(Idle::Park, async {
        let Some((device, bdf)) = plug().await else { return };
        let driver = format!("/sys/bus/pci/devices/{bdf}/driver");
        taken_away(device, move || fs::write(format!("{driver}/unbind"), bdf).unwrap()).await;
        let (device, _) = plug().await.unwrap();
        Controller::new(&device, Options::default()).await.unwrap().shutdown().await.unwrap();
    });
}

#[test]
fn unplugged_in_the_midst_of_io() {
    run(Idle::Hybrid, async {
        let Some((device, bdf)) = plug().await else { return };
        let host = |verb| assert!(Command::new("/bin/host").args([verb, "plug"]).status().unwrap().success(), "{verb}");
        taken_away(device, move || host("device_del")).await;
        let folder = format!("/sys/bus/pci/devices/{bdf}");
        until(false, &folder).await;
        host("device_add");
        until(true, &folder).await;
    });
}
