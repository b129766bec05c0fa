//! The same tests on whatever device there is: `VFIO_URING_DEVICE` names an NVMe controller with two namespaces, of blocks of 512 and 4096
//! bytes, whose contents are OVERWRITTEN; `VFIO_URING_DEVICES` has a second controller behind a comma; `VFIO_URING_TRANSPORT`
//! says `group` or `cdev`. Without them the software controller does.

mod device;

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use device::{Rig, fill, is_filled, run};
use vfio_uring::{
    Error,
    device::{Device, Irq, Options as DeviceOptions, State, index},
    dma::{HugePages, MapRefused, Page, Pool, SpaceStats},
    reactor::{Idle, sleep, spawn, yield_now},
};
use vfio_uring_nvme::{Controller, Options, Queue};

const DEPTHS: [usize; 4] = [1, 4, 16, 64];
/// Of each depth and form of waiting: 100 000 in all, half of them writes.
const IOS: u64 = 100_000 / 8;
const PAGE: usize = 4096;

#[test]
fn two_namespaces() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
        let sizes: Vec<_> = nvme.namespaces().iter().map(|ns| (ns.nsid, ns.block_size)).collect();
        assert_eq!(sizes, [(1, 512), (2, 4096)]);
        assert!(!nvme.info().model.is_empty());
        let queue = nvme.create_queue(8).await.unwrap();
        let pool = Pool::new(rig.device.dma(), 1 << 20, HugePages::No).await.unwrap();
        for nsid in [1, 2] {
            let mut buf = pool.alloc(PAGE).unwrap();
            fill(&mut buf, nsid.into());
            queue.namespace(nsid).unwrap().write(0, buf).await.0.unwrap();
        }
        for nsid in [1, 2] {
            let (read, buf) = queue.namespace(nsid).unwrap().read(0, pool.alloc(PAGE).unwrap()).await;
            read.unwrap();
            assert!(is_filled(&buf, nsid.into()), "namespace {nsid} has the other's data");
        }
        // A transfer that takes a list of PRPs, and one that takes several commands.
        for len in [256 << 10, 768 << 10] {
            let ns = queue.namespace(2).unwrap();
            let mut buf = Pool::new(rig.device.dma(), len, HugePages::No).await.unwrap().alloc(len).unwrap();
            fill(&mut buf, len as u64);
            let (written, mut buf) = ns.write(64, buf).await;
            written.unwrap();
            buf.fill(0);
            let (read, buf) = ns.read(64, buf).await;
            read.unwrap();
            assert!(is_filled(&buf, len as u64));
        }
        queue.namespace(1).unwrap().flush().await.unwrap();
        nvme.shutdown().await.unwrap();
    });
}

/// Random blocks are written and read back, at all depths.
async fn verified(nvme: &Controller, interrupt: bool) {
    for depth in DEPTHS {
        let queue = match interrupt {
            true => nvme.create_interrupt_queue(depth).await.unwrap(),
            false => nvme.create_queue(depth).await.unwrap(),
        };
        let pool = Pool::new(nvme.device().dma(), depth * PAGE, HugePages::No).await.unwrap();
        let each = IOS.div_ceil(2 * depth as u64);
        let tasks: Vec<_> = (0..depth as u64).map(|task| spawn(lane(queue.clone(), pool.clone(), task, each))).collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
}

/// A task that has every 64th page of the first 32 MiB of a namespace to itself.
async fn lane(queue: Queue, pool: Pool, task: u64, rounds: u64) {
    let ns = queue.namespace(1 + (task % 2) as u32).unwrap();
    let mut rng = fastrand::Rng::with_seed(task);
    let mut written = vec![None; 128];
    let mut buf = pool.alloc(PAGE).unwrap();
    for round in 0..rounds {
        let slot = rng.usize(..written.len());
        let lba = (slot as u64 * 64 + task) * PAGE as u64 / ns.block_size() as u64;
        let seed = task << 32 | round;
        fill(&mut buf, seed);
        let (result, back) = ns.write(lba, buf).await;
        result.unwrap();
        written[slot] = Some(seed);
        let slot = rng.usize(..written.len());
        let lba = (slot as u64 * 64 + task) * PAGE as u64 / ns.block_size() as u64;
        let (result, back) = ns.read(lba, back).await;
        result.unwrap();
        if let Some(seed) = written[slot] {
            assert!(is_filled(&back, seed), "block {lba} of task {task}");
        }
        buf = back;
    }
}

#[test]
fn verified_polled() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
        verified(&nvme, false).await;
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn verified_by_interrupt() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        assert!(rig.device.irq(Irq::MsiX).count > 4);
        let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
        verified(&nvme, true).await;
        nvme.shutdown().await.unwrap();
    });
}

/// The device is reset under a controller, and brought up again on the same handle. Meanwhile the reactor's other tasks go on.
#[test]
fn reset_and_again() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let pool = Pool::new(rig.device.dma(), 1 << 20, HugePages::No).await.unwrap();
        for round in 0..3u64 {
            let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
            let ns = nvme.create_interrupt_queue(8).await.unwrap().namespace(1).unwrap();
            let mut buf = pool.alloc(PAGE).unwrap();
            fill(&mut buf, round);
            ns.write(round * 8, buf).await.0.unwrap();
            // It is up, and nobody shuts it down: a register that it writes during the reset would hold the thread.
            drop((ns, nvme));
            let turns = Rc::new(Cell::new(0u64));
            let counter = turns.clone();
            let other = spawn(async move {
                loop {
                    counter.set(counter.get() + 1);
                    sleep(Duration::from_millis(1)).await;
                }
            });
            yield_now().await;
            let (before, start) = (turns.get(), Instant::now());
            rig.device.reset().await.unwrap();
            let took = start.elapsed();
            other.abort();
            // A tenth of what it could be: the machine is shared.
            let least = took.as_millis() as u64 / 10;
            assert!(turns.get() - before >= least, "{} turns in {took:?}", turns.get() - before);
            if rig.is_kernel() {
                println!("a reset took {took:?}; another task had {} turns meanwhile", turns.get() - before);
            }
            let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
            let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
            let (read, buf) = ns.read(round * 8, pool.alloc(PAGE).unwrap()).await;
            read.unwrap();
            assert!(is_filled(&buf, round));
            nvme.shutdown().await.unwrap();
        }
    });
}

/// Region reads are right or refused at once while somebody resets the device; the reactor runs on.
#[test]
fn region_reads_during_resets() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let ids = rig.device.config().ids().await.unwrap();
        let device = rig.device.clone();
        let resets = spawn(async move {
            for _ in 0..3 {
                device.reset().await.unwrap();
            }
        });
        let (mut reads, mut refused) = (0, 0);
        while !resets.is_finished() {
            match rig.device.config().ids().await {
                Ok(read) => {
                    assert_eq!(read, ids);
                    reads += 1;
                }
                Err(Error::Unavailable { state, .. }) => {
                    assert_eq!(state, State::Resetting);
                    refused += 1;
                    yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        resets.await.unwrap();
        assert_eq!((rig.device.state(), rig.device.generation()), (State::Live, 3));
        assert_eq!(rig.device.config().ids().await.unwrap(), ids);
        println!("{reads} reads of the identifiers during 3 resets, {refused} refused");
    });
}

/// What a read of four bytes costs by each of the ways to a device of the kernel: told, not judged.
#[test]
fn ways_to_read_a_region() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let Some(descriptor) = rig.device.descriptor() else { return };
        let offset = descriptor.region_info(index::CONFIG).unwrap().unwrap().offset;
        let (config, fd) = (rig.device.config(), descriptor.shared());
        let nonblocking = |on| {
            let flags = rustix::fs::fcntl_getfl(fd).unwrap();
            let new = if on { flags | rustix::fs::OFlags::NONBLOCK } else { flags - rustix::fs::OFlags::NONBLOCK };
            rustix::fs::fcntl_setfl(fd, new).unwrap();
        };
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..500 {
            let start = Instant::now();
            descriptor.read_at(offset, &mut [0; 4]).unwrap();
            times[0].push(start.elapsed());
            let start = Instant::now();
            config.read::<u32>(0).await.unwrap();
            times[1].push(start.elapsed());
            nonblocking(true);
            let start = Instant::now();
            config.read::<u32>(0).await.unwrap();
            times[2].push(start.elapsed());
            nonblocking(false);
        }
        for (way, times) in ["pread", "ring, by a worker", "ring, inline (O_NONBLOCK)"].iter().zip(&mut times) {
            times.sort();
            println!("{way}: median {:?}, 90 % within {:?}", times[times.len() / 2], times[times.len() * 9 / 10]);
        }
    });
}

/// Mappings that can't be: each with its own error, and nothing is left of it.
#[test]
fn mappings_that_are_refused() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        let space = rig.device.dma();
        let kept = space.map_at(0x10_0000, PAGE, HugePages::No).await.unwrap();
        let before = space.stats();
        let refused = |iova, len| async move {
            match space.map_at(iova, len, HugePages::No).await {
                Err(Error::Map { reason, .. }) => reason,
                other => panic!("{iova:#x}+{len:#x}: {other:?}"),
            }
        };
        assert!(matches!(refused(0x10_0000, 3 * PAGE).await, MapRefused::Overlap));
        assert!(matches!(refused(0xf_f000, 2 * PAGE).await, MapRefused::Overlap));
        for iova in [0xfee0_0000, 0xfedf_f000, 0xfeef_f000] {
            let MapRefused::Reserved { region: Some(region) } = refused(iova, 2 * PAGE).await else { panic!("{iova:#x}") };
            assert_eq!((region.start, region.last), (0xfee0_0000, 0xfeef_ffff));
        }
        assert!(matches!(refused(1 << 60, PAGE).await, MapRefused::Aperture { .. }));
        assert!(matches!(refused(!0xfff, 2 * PAGE).await, MapRefused::Aperture { .. }));
        assert!(matches!(refused(0x20_0800, PAGE).await, MapRefused::Misaligned { .. }));
        assert_eq!(space.stats(), before, "something is left");
        assert!(space.allowed().iter().all(|range| range.last < 0xfee0_0000 || range.start > 0xfeef_ffff));
        drop(kept);
        space.map_at(0x10_0000, 3 * PAGE, HugePages::No).await.expect("it is free again");
    });
}

/// Many mappings of mixed sizes come and go; all addresses are free again afterwards.
#[test]
fn mappings_come_and_go() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        let space = rig.device.dma();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut held = Vec::new();
        for _ in 0..2000 {
            if held.len() < 64 && rng.bool() {
                held.push(space.map(rng.usize(1..16 * PAGE), HugePages::No).await.unwrap());
            } else if !held.is_empty() {
                held.swap_remove(rng.usize(..held.len()));
            }
        }
        held.clear();
        while space.stats().retired > 0 {
            space.reclaim().await;
        }
        let stats = space.stats();
        assert_eq!((stats.mappings, stats.leaked, stats.quarantined), (0, 0, 0));
    });
}

/// Memory of the caller is mapped as well, and comes back.
#[test]
fn memory_of_the_caller() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        let space = rig.device.dma();
        for pages in [1, 16, 256] {
            let mapping = space.map_pages((0..pages).map(|_| Page([7; PAGE])).collect()).await.unwrap();
            assert_eq!((mapping.len(), mapping.fd().is_none()), (pages * PAGE, true));
            let mut seen = [0; 16];
            space.read(mapping.iova(), &mut seen).unwrap();
            assert_eq!(seen, [7; 16]);
            drop(mapping);
            while space.stats().retired > 0 {
                space.reclaim().await;
            }
            assert_eq!(space.stats(), SpaceStats::default());
        }
    });
}

/// Interrupts of a device of the kernel: vectors in any order, again after they were dropped, and more than were there at first.
#[test]
fn vectors_come_and_go() {
    run(Idle::Park, async {
        let rig = Rig::open().await;
        let count = rig.device.irq(Irq::MsiX).count;
        let high = rig.device.interrupts(Irq::MsiX, 3, 2).await.unwrap();
        let low = rig.device.interrupts(Irq::MsiX, 0, 1).await.unwrap();
        assert!(rig.device.interrupts(Irq::MsiX, 4, 1).await.is_err(), "vector 4 is taken");
        assert!(rig.device.interrupts(Irq::MsiX, count, 1).await.is_err(), "there is none");
        drop(high);
        let high = rig.device.interrupts(Irq::MsiX, 3, count - 3).await.unwrap();
        drop((high, low));
        if rig.is_kernel() && rig.device.irq(Irq::Intx).count > 0 {
            // They exclude each other: MSI-X is off, now that nobody has a vector.
            drop(rig.device.interrupts(Irq::Intx, 0, 1).await.unwrap());
        }
        if rig.device.irq(Irq::Request).count > 0 {
            let taken = rig.device.interrupts(Irq::Request, 0, 1).await;
            match rig.is_kernel() {
                true => assert!(matches!(taken, Err(Error::Invalid { .. })), "the device's events have it"),
                false => drop(taken.unwrap()),
            }
        }
        let all = rig.device.interrupts(Irq::MsiX, 0, count).await.unwrap();
        assert_eq!(all.len(), count as usize);
    });
}

/// Two controllers that share an address space: what one reads the other writes, from the same memory.
#[test]
fn one_address_space_for_two_devices() {
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let Some(second) = rig.second() else {
            return println!("there is no second device of the kernel");
        };
        let options = DeviceOptions { space: Some(rig.device.dma().clone()), ..DeviceOptions::default() };
        let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
        let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
        let pool = Pool::new(rig.device.dma(), 1 << 20, HugePages::No).await.unwrap();
        let mut buf = pool.alloc(PAGE).unwrap();
        fill(&mut buf, 77);
        let (written, buf) = ns.write(0, buf).await;
        written.unwrap();
        for _ in 0..2 {
            // It comes late, and goes early.
            let other = Device::open_with(&second, options.clone()).await.unwrap();
            let there = Controller::new(&other, Options::default()).await.unwrap();
            let far = there.create_queue(8).await.unwrap().namespace(1).unwrap();
            let (read, buf) = ns.read(0, pool.alloc(PAGE).unwrap()).await;
            read.unwrap();
            let (written, mut buf) = far.write(8, buf).await;
            written.unwrap();
            buf.fill(0);
            let (read, buf) = far.read(8, buf).await;
            read.unwrap();
            assert!(is_filled(&buf, 77));
            there.shutdown().await.unwrap();
        }
        let (read, buf) = ns.read(0, buf).await;
        read.unwrap();
        assert!(is_filled(&buf, 77));
        nvme.shutdown().await.unwrap();
    });
}

/// Writes the file that `VFIO_URING_EXCHANGE` names to the first namespace from its start, or compares it: with what another driver
/// reads, or wrote.
#[test]
fn exchange_with_another_driver() {
    let Ok(exchange) = std::env::var("VFIO_URING_EXCHANGE") else { return };
    let (verb, path) = exchange.split_once(':').expect("write:FILE or compare:FILE");
    let data = std::fs::read(path).unwrap();
    run(Idle::Hybrid, async {
        let rig = Rig::open().await;
        let nvme = Controller::new(&rig.device, Options::default()).await.unwrap();
        let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
        let pool = Pool::new(rig.device.dma(), 1 << 20, HugePages::No).await.unwrap();
        let mut buf = pool.alloc(64 << 10).unwrap();
        for (part, lba) in data.chunks_exact(64 << 10).zip((0..).step_by((64 << 10) / ns.block_size())) {
            if verb == "write" {
                buf.copy_from_slice(part);
                let (written, back) = ns.write(lba, buf).await;
                written.unwrap();
                buf = back;
            } else {
                let (read, back) = ns.read(lba, buf).await;
                read.unwrap();
                assert!(back[..] == *part, "{path} differs at block {lba}");
                buf = back;
            }
        }
        ns.flush().await.unwrap();
        nvme.shutdown().await.unwrap();
    });
}
