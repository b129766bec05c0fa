//! Several software NVMe controllers in one address space: the same buffers for all, and what happens when one does not fit, or goes.

use std::{cell::Cell, future::Future, rc::Rc, time::Duration};

use vfio_uring::{
    Error,
    device::{Address, Device, Options as DeviceOptions},
    dma::{AddressSpace, DmaBuf, HugePages, IovaRange, Page, Pool},
    reactor::{JoinHandle, Reactor, sleep, spawn, timeout},
};
use vfio_uring_models::{
    nvme::{self, Config, NamespaceConfig},
    server::{Running, Server},
};
use vfio_uring_nvme::{Controller, Namespace, Options};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Runs a test, within a deadline.
fn run<T>(test: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(Duration::from_secs(90), test).await.expect("no hang") })
}

fn disk() -> Config {
    Config { namespaces: vec![NamespaceConfig::memory(16 * MIB).with_lba_size(BLOCK as u32)], ..Config::default() }
}

/// A controller that can use these addresses only.
fn reaches(ranges: &[IovaRange]) -> Running {
    let controller = nvme::Controller::new(disk()).unwrap();
    Running::start(Server::new(controller).unwrap().iova_ranges(ranges)).unwrap()
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange { start, last }
}

async fn open(server: &Running, space: Option<&AddressSpace>) -> Result<Device, Error> {
    let address: Address = server.address().parse().unwrap();
    Device::open_with(&address, DeviceOptions { space: space.cloned(), ..DeviceOptions::default() }).await
}

async fn start(device: &Device) -> (Controller, Namespace) {
    let nvme = Controller::new(device, Options::default()).await.unwrap();
    let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
    (nvme, ns)
}

/// Bytes that tell place and seed apart.
fn word(seed: u64, i: usize) -> u64 {
    (seed << 20 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(buf: &mut DmaBuf, seed: u64) {
    buf.as_typed_mut::<u64>().unwrap().iter_mut().enumerate().for_each(|(i, at)| *at = word(seed, i));
}

fn is_filled(buf: &DmaBuf, seed: u64) -> bool {
    buf.as_typed::<u64>().unwrap().iter().enumerate().all(|(i, &at)| at == word(seed, i))
}

async fn write(ns: &Namespace, lba: u64, buf: DmaBuf) -> DmaBuf {
    let (written, buf) = ns.write(lba, buf).await;
    written.unwrap();
    buf
}

async fn read(ns: &Namespace, lba: u64, buf: DmaBuf) -> DmaBuf {
    let (read, buf) = ns.read(lba, buf).await;
    read.unwrap();
    buf
}

/// Writes and reads back, in a task of its own, until it is told to stop; how many rounds it has done.
struct Busy {
    stop: Rc<Cell<bool>>,
    rounds: Rc<Cell<u64>>,
    task: JoinHandle<()>,
}

impl Busy {
    fn start(ns: &Namespace, pool: &Pool) -> Self {
        let (stop, rounds) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
        let (ns, mut buf) = (ns.clone(), pool.alloc(BLOCK).unwrap());
        let (stopped, done) = (stop.clone(), rounds.clone());
        let task = spawn(async move {
            while !stopped.get() {
                let (seed, lba) = (done.get(), 100 + done.get() % 100);
                fill(&mut buf, seed);
                buf = write(&ns, lba, buf).await;
                buf.fill(0);
                buf = read(&ns, lba, buf).await;
                assert!(is_filled(&buf, seed), "round {seed}");
                done.set(seed + 1);
            }
        });
        Self { stop, rounds, task }
    }

    /// Lets it go on for some rounds from now on.
    async fn goes_on(&self) {
        let until = self.rounds.get() + 20;
        while self.rounds.get() < until {
            sleep(Duration::from_millis(1)).await;
        }
    }

    async fn stop(self) {
        self.goes_on().await;
        self.stop.set(true);
        self.task.await.unwrap();
    }
}

#[test]
fn what_one_reads_the_other_writes() {
    let servers = [nvme::spawn(disk()).unwrap(), nvme::spawn(disk()).unwrap()];
    run(async {
        let first = open(&servers[0], None).await.unwrap();
        let (one, here) = start(&first).await;
        // Mapped before the second comes.
        let pool = Pool::new(first.dma(), MIB as usize, HugePages::No).await.unwrap();
        let second = open(&servers[1], Some(first.dma())).await.unwrap();
        assert_eq!(second.dma().id(), first.dma().id());
        let (two, there) = start(&second).await;
        // And after.
        let late = Pool::new(second.dma(), MIB as usize, HugePages::No).await.unwrap();
        for lba in 0..200 {
            let mut buf = if lba % 2 == 0 { pool.alloc(2 * BLOCK) } else { late.alloc(2 * BLOCK) }.unwrap();
            fill(&mut buf, lba);
            buf = write(&here, lba * 2, buf).await;
            buf.fill(0);
            buf = read(&here, lba * 2, buf).await;
            buf = write(&there, 1000 + lba * 2, buf).await;
            buf.fill(0);
            assert!(is_filled(&read(&there, 1000 + lba * 2, buf).await, lba), "block {lba}");
        }
        one.shutdown().await.unwrap();
        drop((here, first));
        // The space goes on with the second.
        let mut buf = pool.alloc(BLOCK).unwrap();
        fill(&mut buf, 7);
        buf = write(&there, 0, buf).await;
        buf.fill(0);
        assert!(is_filled(&read(&there, 0, buf).await, 7));
        two.shutdown().await.unwrap();
    });
}

#[test]
fn one_whose_reserved_region_collides_does_not_join() {
    // Everything but 1 MiB, in which the first has its memory.
    let reserved = range(0x40_0000, 0x4f_ffff);
    let first = nvme::spawn(disk()).unwrap();
    let second = reaches(&[range(0, reserved.start - 1), range(reserved.last + 1, u64::MAX)]);
    run(async {
        let device = open(&first, None).await.unwrap();
        let space = device.dma();
        let (nvme, ns) = start(&device).await;
        let pool = Pool::new(space, MIB as usize, HugePages::No).await.unwrap();
        let held = space.map_at(0x48_0000, 0x2000, HugePages::No).await.unwrap();
        let busy = Busy::start(&ns, &pool);
        busy.goes_on().await;
        let (allowed, stats) = (space.allowed(), space.stats());

        let error = open(&second, Some(space)).await.unwrap_err();
        let Error::Conflict { device: name, mapping, reserved: hole } = &error else { panic!("{error}") };
        assert_eq!((mapping, hole), (&Some(range(0x48_0000, 0x48_1fff)), &Some(reserved)));
        assert_eq!(*name, second.address());
        let text = error.to_string();
        assert!(text.contains(name) && text.contains("0x480000") && text.contains("0x400000"), "{text}");
        // The first is unharmed, and nothing has changed.
        busy.goes_on().await;
        assert_eq!((space.allowed(), space.stats()), (allowed.clone(), stats));
        let also = space.map_at(0x40_0000, 0x1000, HugePages::No).await.unwrap();

        // Without the mappings it joins, and its region is nobody's.
        drop((held, also));
        let joined = open(&second, Some(space)).await.unwrap();
        assert!(space.map_at(0x48_0000, 0x1000, HugePages::No).await.is_err());
        assert!(space.allowed().iter().all(|range| range.last < reserved.start || range.start > reserved.last));
        let (other, far) = start(&joined).await;
        let mut buf = pool.alloc(BLOCK).unwrap();
        fill(&mut buf, 5);
        buf = write(&far, 3, buf).await;
        buf.fill(0);
        assert!(is_filled(&read(&far, 3, buf).await, 5));
        other.shutdown().await.unwrap();
        drop((far, joined));
        assert_eq!(space.allowed(), allowed);
        drop(space.map_at(0x48_0000, 0x1000, HugePages::No).await.unwrap());
        busy.stop().await;
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn a_member_is_killed_and_the_other_goes_on() {
    let (first, second) = (nvme::spawn(disk()).unwrap(), reaches(&[range(0, 0xfff_ffff)]));
    run(async {
        let device = open(&first, None).await.unwrap();
        let space = device.dma();
        let allowed = space.allowed();
        let (nvme, ns) = start(&device).await;
        let pool = Pool::new(space, MIB as usize, HugePages::No).await.unwrap();
        let busy = Busy::start(&ns, &pool);
        let other = open(&second, Some(space)).await.unwrap();
        let (far_nvme, far) = start(&other).await;
        let held = space.map(BLOCK, HugePages::No).await.unwrap();
        let buf = write(&far, 0, pool.alloc(BLOCK).unwrap()).await;
        assert_ne!(space.allowed(), allowed);

        second.stop().unwrap();
        other.gone().await;
        let (result, _) = far.write(0, buf).await;
        assert!(result.is_err());
        busy.goes_on().await;
        assert_eq!(space.allowed(), allowed, "its limits went with it");
        assert!(device.is_gone().is_none());
        // Unmaps are confirmed without it, and mappings made.
        drop(held);
        space.reclaim().await;
        assert_eq!((space.stats().leaked, space.stats().quarantined), (0, 0));
        drop(space.map(BLOCK, HugePages::No).await.unwrap());
        drop((far, far_nvme, other));
        // A third takes its place.
        let third = nvme::spawn(disk()).unwrap();
        let joined = open(&third, Some(space)).await.unwrap();
        let (another, ns) = start(&joined).await;
        write(&ns, 0, pool.alloc(BLOCK).unwrap()).await;
        another.shutdown().await.unwrap();
        busy.stop().await;
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn members_come_and_go_under_load() {
    let servers: Vec<_> = (0..3).map(|_| nvme::spawn(disk()).unwrap()).collect();
    run(async {
        let device = open(&servers[0], None).await.unwrap();
        let space = device.dma();
        let (nvme, ns) = start(&device).await;
        let pool = Pool::new(space, MIB as usize, HugePages::No).await.unwrap();
        let busy = Busy::start(&ns, &pool);
        // Mappings are made and dropped while others join.
        let (stop, mapper) = (Rc::new(Cell::new(false)), space.clone());
        let stopped = stop.clone();
        let churn = spawn(async move {
            let mut held = Vec::new();
            while !stopped.get() {
                held.push(mapper.map(BLOCK, HugePages::No).await.unwrap());
                if held.len() == 8 {
                    held.drain(..4);
                }
            }
        });
        for round in 0..10 {
            let joined = open(&servers[1 + round % 2], Some(space)).await.unwrap();
            let (other, far) = start(&joined).await;
            let mut buf = pool.alloc(BLOCK).unwrap();
            fill(&mut buf, round as u64);
            buf = write(&far, 9, buf).await;
            buf.fill(0);
            assert!(is_filled(&read(&far, 9, buf).await, round as u64));
            other.shutdown().await.unwrap();
        }
        stop.set(true);
        churn.await.unwrap();
        busy.stop().await;
        space.reclaim().await;
        assert_eq!((space.stats().leaked, space.stats().quarantined), (0, 0));
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn memory_of_the_caller_is_mapped_without_a_descriptor() {
    let server = nvme::spawn(disk()).unwrap();
    run(async {
        let device = open(&server, None).await.unwrap();
        let (nvme, _ns) = start(&device).await;
        let mapping = device.dma().map_pages(vec![Page([0x5a; 4096]); 4]).await.unwrap();
        let mapped = device.dma().stats().mappings;
        assert!(mapping.fd().is_none() && mapping.len() == 4 * BLOCK);
        drop(mapping);
        device.dma().reclaim().await;
        assert_eq!((device.dma().stats().mappings, device.dma().stats().leaked), (mapped - 1, 0));
        nvme.shutdown().await.unwrap();
    });
}
