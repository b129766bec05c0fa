//! The NVMe driver on the software controller, over vfio-user: end to end.

#[path = "support/pattern.rs"]
mod pattern;

use std::{
    future::Future,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use pattern::{fill, is_filled};
use vfio_uring::{
    device::{Address, Device},
    dma::{HugePages, Pool},
    reactor::{Reactor, sleep, spawn, timeout, yield_now},
};
use vfio_uring_models::{
    nvme::{self, Config, Faults, NamespaceConfig},
    server::Running,
};
use vfio_uring_nvme::{Controller, Error, Namespace, Options};

const MIB: u64 = 1 << 20;

fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(Duration::from_secs(60), future).await.expect("no hang") })
}

fn serve(config: Config) -> Running {
    nvme::spawn(config).unwrap()
}

fn disk(bytes: u64, lba_size: u32) -> Config {
    Config { namespaces: vec![NamespaceConfig::memory(bytes).with_lba_size(lba_size)], ..Config::default() }
}

async fn open(server: &Running) -> Device {
    Device::open(&server.address().parse::<Address>().unwrap()).await.unwrap()
}

async fn controller(server: &Running) -> Controller {
    controller_with(server, Options::default()).await
}

async fn controller_with(server: &Running, options: Options) -> Controller {
    Controller::new(&open(server).await, options).await.unwrap()
}

async fn pool(controller: &Controller, bytes: u64) -> Pool {
    Pool::new(controller.device().dma(), bytes as usize, HugePages::No).await.unwrap()
}

#[test]
fn bring_up_identify_and_shut_down() {
    let config = Config {
        namespaces: vec![NamespaceConfig::memory(64 * MIB), NamespaceConfig::memory(32 * MIB).with_lba_size(4096)],
        model: "a model".into(),
        ..Config::default()
    };
    let server = serve(config);
    run(async {
        let nvme = controller(&server).await;
        assert_eq!((nvme.info().model.as_str(), nvme.info().version), ("a model", (1, 4, 0)));
        let sizes: Vec<_> = nvme.namespaces().iter().map(|ns| (ns.nsid, ns.blocks, ns.block_size)).collect();
        assert_eq!(sizes, [(1, 64 * MIB / 512, 512), (2, 32 * MIB / 4096, 4096)]);
        let queue = nvme.create_queue(16).await.unwrap();
        assert!(queue.namespace(3).unwrap_err().to_string().contains("no namespace 3"));
        let ns = queue.namespace(2).unwrap();
        let pool = pool(&nvme, MIB).await;
        let mut buf = pool.alloc(8192).unwrap();
        fill(&mut buf, 1);
        let (result, mut buf) = ns.write(5, buf).await;
        result.unwrap();
        ns.flush().await.unwrap();
        buf.fill(0);
        let (result, buf) = ns.read(5, buf).await;
        result.unwrap();
        assert!(is_filled(&buf, 1));
        nvme.clone().shutdown().await.unwrap();
        let (result, buf) = ns.read(5, buf).await;
        assert!(matches!(result, Err(Error::Ended(_))) && buf.len() == 8192);
    });
    // The same server brings another one up.
    run(async { controller(&server).await.shutdown().await.unwrap() });
}

#[test]
fn eight_tasks_on_one_queue_with_fewer_slots() {
    let server = serve(disk(16 * MIB, 512));
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(3).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        let tasks: Vec<_> = (0..8u64)
            .map(|task| {
                let (ns, mut buf) = (ns.clone(), pool.alloc(4096).unwrap());
                spawn(async move {
                    for round in 0..200 {
                        let lba = (task * 200 + round) * 8;
                        fill(&mut buf, lba);
                        let (result, back) = ns.write(lba, buf).await;
                        result.unwrap();
                        let (result, back) = ns.read(lba, back).await;
                        result.unwrap();
                        assert!(is_filled(&back, lba));
                        buf = back;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn transfers_above_mdts_are_split() {
    let server = serve(Config { mdts: 2, ..disk(64 * MIB, 512) });
    run(async {
        let nvme = controller(&server).await;
        assert_eq!(nvme.info().max_transfer, 16384);
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, 8 * MIB).await;
        for (lba, len) in [(0, 16384), (1, 16384 + 512), (7, 3 * 16384), (100, 2 << 20), (3, 1 << 20)] {
            let mut buf = pool.alloc(len).unwrap();
            fill(&mut buf, lba);
            let (result, mut buf) = ns.write(lba, buf).await;
            result.unwrap();
            buf.fill(0);
            let (result, buf) = ns.read(lba, buf).await;
            result.unwrap();
            assert!(is_filled(&buf, lba), "{len} bytes at {lba}");
        }
        // Dropped half-way, its buffer returns when the last part is done.
        let free = pool.stats().free;
        let mut read = Box::pin(ns.read(0, pool.alloc(4 << 20).unwrap()));
        assert!(futures::poll!(&mut read).is_pending());
        drop(read);
        while pool.stats().free != free {
            yield_now().await;
        }
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn prp_lists_up_to_the_limit() {
    let server = serve(Config { mdts: 8, ..disk(64 * MIB, 4096) });
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, 8 * MIB).await;
        for pages in [1, 2, 3, 16, 255, 256] {
            let mut buf = pool.alloc(pages * 4096).unwrap();
            fill(&mut buf, pages as u64);
            let (result, mut buf) = ns.write(9, buf).await;
            result.unwrap();
            buf.fill(0);
            let (result, buf) = ns.read(9, buf).await;
            result.unwrap();
            assert!(is_filled(&buf, pages as u64), "{pages} pages");
        }
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn wrong_requests_get_clear_errors() {
    let server = serve(disk(MIB, 4096));
    let other = serve(disk(MIB, 4096));
    run(async {
        let nvme = controller(&server).await;
        let queue = nvme.create_queue(4).await.unwrap();
        let ns = queue.namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        let refused = |result: Result<(), Error>, word: &str| {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        };
        let (result, buf) = ns.read(0, pool.alloc(100).unwrap()).await;
        refused(result, "multiple of the block size");
        let mut buf = buf;
        buf.set_len(0).unwrap();
        let (result, _) = ns.read(0, buf).await;
        refused(result, "multiple of the block size");
        refused(ns.read(256, pool.alloc(4096).unwrap()).await.0, "beyond the namespace's end");
        refused(ns.read(255, pool.alloc(8192).unwrap()).await.0, "beyond the namespace's end");
        refused(ns.write(u64::MAX, pool.alloc(4096).unwrap()).await.0, "beyond the namespace's end");
        let there = controller(&other).await;
        let foreign = Pool::new(there.device().dma(), 4096, HugePages::No).await.unwrap();
        refused(ns.read(0, foreign.alloc(4096).unwrap()).await.0, "another device");
        ns.read(255, pool.alloc(4096).unwrap()).await.0.expect("the last block is fine");
        assert!(nvme.create_queue(0).await.is_err() && nvme.create_queue(5000).await.is_err());
        nvme.shutdown().await.unwrap();
        there.shutdown().await.unwrap();
    });
}

#[test]
fn a_sparse_disk_of_a_tebibyte() {
    let server = serve(disk(1 << 40, 512));
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        assert_eq!(ns.blocks(), (1 << 40) / 512);
        for lba in [0, ns.blocks() / 2, ns.blocks() - 8] {
            let mut buf = pool.alloc(4096).unwrap();
            fill(&mut buf, lba);
            let (result, buf) = ns.write(lba, buf).await;
            result.unwrap();
            let (result, buf) = ns.read(lba, buf).await;
            result.unwrap();
            assert!(is_filled(&buf, lba));
        }
        let (result, buf) = ns.read(12345, pool.alloc(4096).unwrap()).await;
        result.unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn two_controllers_on_one_reactor() {
    let servers = [serve(disk(16 * MIB, 512)), serve(disk(16 * MIB, 4096))];
    run(async {
        let mut tasks = Vec::new();
        for (i, server) in servers.iter().enumerate() {
            let nvme = controller(server).await;
            let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
            let pool = pool(&nvme, MIB).await;
            tasks.push(spawn(async move {
                for round in 0..500 {
                    let mut buf = pool.alloc(4096).unwrap();
                    fill(&mut buf, round << 1 | i as u64);
                    let (result, buf) = ns.write(round % 100 * 8, buf).await;
                    result.unwrap();
                    let (result, buf) = ns.read(round % 100 * 8, buf).await;
                    result.unwrap();
                    assert!(is_filled(&buf, round << 1 | i as u64));
                }
                nvme.shutdown().await.unwrap();
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn the_completion_stream() {
    let server = serve(disk(16 * MIB, 4096));
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(32).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        let stream = ns.stream().unwrap();
        assert!(ns.stream().is_err(), "one stream a queue");
        let mut lbas = vec![0; stream.capacity()];
        let mut free: Vec<_> = (0..stream.capacity()).map(|_| pool.alloc(4096).unwrap()).collect();
        for write in [true, false] {
            let (mut next, mut done) = (0, 0);
            while done < 4096 {
                while next < 4096
                    && let Some(mut buf) = free.pop()
                {
                    fill(&mut buf, if write { next } else { 0 });
                    let submitted = if write { stream.submit_write(next, buf) } else { stream.submit_read(next, buf) };
                    lbas[submitted.unwrap().index()] = next;
                    next += 1;
                }
                let mut batch = Vec::new();
                stream.completions(&mut batch).await.unwrap();
                assert!(!batch.is_empty());
                for completion in batch {
                    completion.result().unwrap();
                    assert!(write || is_filled(&completion.buf, lbas[completion.token.index()]));
                    free.push(completion.buf);
                    done += 1;
                }
            }
        }
        assert_eq!(stream.next_batch(drop).await.unwrap(), 0, "nothing is under way");
        // A full queue hands the buffer back; futures and the stream share the slots.
        let tokens: Vec<_> = free.drain(..).map(|buf| stream.submit_read(0, buf).unwrap()).collect();
        let rejected = stream.submit_read(0, pool.alloc(4096).unwrap()).unwrap_err();
        assert!(matches!(rejected.error, Error::Full(32)) && rejected.buf.len() == 4096);
        let reader = ns.clone();
        let read = spawn(async move { reader.read(1, rejected.buf).await.0 });
        let mut taken = 0;
        while taken < tokens.len() {
            taken += stream.next_batch(drop).await.unwrap();
        }
        read.await.unwrap().unwrap();
        nvme.shutdown().await.unwrap();
    });
}

/// The memory of a command whose future is gone is not handed out before its completion, or the proof that none can come.
#[test]
fn a_dropped_future_keeps_its_memory() {
    let faults = Faults { drop_completion_lba: Some(64), ..Faults::default() };
    let server = serve(Config { faults, ..disk(MIB, 512) });
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, 4 * 4096).await;
        let stuck = pool.alloc(4096).unwrap();
        let iova = stuck.iova();
        let mut read = Box::pin(ns.read(64, stuck));
        assert!(futures::poll!(&mut read).is_pending());
        yield_now().await;
        drop(read);
        for _ in 0..50 {
            // All that is left can be had, over and over, and is never that.
            let mut held = Vec::new();
            while let Ok(buf) = pool.alloc(4096) {
                assert_ne!(buf.iova(), iova);
                held.push(buf);
            }
            assert_eq!(held.len(), 3);
            let (result, _) = ns.read(0, held.pop().unwrap()).await;
            result.unwrap();
        }
        // A completed command gives its memory back though its future is gone.
        let mut read = Box::pin(ns.read(0, pool.alloc(4096).unwrap()));
        assert!(futures::poll!(&mut read).is_pending());
        drop(read);
        while pool.stats().free != 3 * 4096 {
            yield_now().await;
        }
        // The confirmed reset is the proof for the other one.
        nvme.shutdown().await.unwrap();
        assert_eq!((pool.stats().free, pool.stats().quarantined), (4 * 4096, 0));
    });
}

#[test]
fn without_proof_memory_is_given_up() {
    let faults = Faults { drop_completion_lba: Some(64), ..Faults::default() };
    let server = serve(Config { faults, ..disk(MIB, 512) });
    run(async {
        let nvme = controller(&server).await;
        let queue = nvme.create_queue(4).await.unwrap();
        let ns = queue.namespace(1).unwrap();
        let pool = pool(&nvme, 4 * 4096).await;
        let mut read = Box::pin(ns.read(64, pool.alloc(4096).unwrap()));
        assert!(futures::poll!(&mut read).is_pending());
        yield_now().await;
        drop(read);
        drop((ns, queue, nvme));
        assert_eq!((pool.stats().free, pool.stats().quarantined), (3 * 4096, 4096));
    });
}

#[test]
fn a_command_that_never_completes_ends_the_queue() {
    let faults = Faults { drop_completion_lba: Some(64), ..Faults::default() };
    let server = serve(Config { faults, ..disk(MIB, 512) });
    run(async {
        let options = Options { timeout: Duration::from_millis(400), ..Options::default() };
        let nvme = controller_with(&server, options).await;
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        let (result, buf) = ns.read(64, pool.alloc(4096).unwrap()).await;
        assert!(matches!(&result, Err(Error::Ended(_))), "{result:?}");
        assert!(result.unwrap_err().to_string().contains("no answer within"));
        assert!(buf.is_empty(), "the memory stays with the command");
        let (result, buf) = ns.read(0, pool.alloc(4096).unwrap()).await;
        assert!(result.is_err() && buf.len() == 4096, "later ones fail at once, with their buffer");
        nvme.shutdown().await.unwrap();
        assert_eq!(pool.stats().quarantined, 0);
    });
}

#[test]
fn errors_of_the_controller_reach_the_caller() {
    let faults = Faults { error_lba: Some(8), bad_cid_lba: Some(16), ..Faults::default() };
    let server = serve(Config { faults, ..disk(MIB, 512) });
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        let (result, buf) = ns.read(8, pool.alloc(512).unwrap()).await;
        assert!(matches!(result, Err(Error::Status(status)) if status.code_type() == 2) && buf.len() == 512);
        ns.read(0, buf).await.0.unwrap();
        // Other commands that are under way end with the queue.
        let both = futures::join!(ns.read(16, pool.alloc(512).unwrap()), ns.read(16, pool.alloc(512).unwrap()));
        for (result, _) in [both.0, both.1] {
            assert!(result.unwrap_err().to_string().contains("broke the protocol"));
        }
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn a_server_killed_under_load() {
    let server = serve(disk(64 * MIB, 4096));
    run(async {
        let nvme = controller(&server).await;
        let queue = nvme.create_queue(64).await.unwrap();
        let (ns, pool) = (queue.namespace(1).unwrap(), pool(&nvme, 4 * MIB).await);
        let load = |ns: Namespace, pool: Pool, i: u64| async move {
            let mut buf = pool.alloc(if i.is_multiple_of(8) { 512 << 10 } else { 4096 }).unwrap();
            for round in 0.. {
                let (result, back) = ns.read((round * 7 + i) % 1000, buf).await;
                if let Err(error) = result {
                    return (round, error);
                }
                buf = back;
            }
            unreachable!()
        };
        let tasks: Vec<_> = (0..48).map(|i| spawn(load(ns.clone(), pool.clone(), i))).collect();
        sleep(Duration::from_millis(50)).await;
        let killer = std::thread::spawn(move || server.stop().unwrap());
        let start = Instant::now();
        for task in tasks {
            let (_, error) = task.await.unwrap();
            assert!(matches!(error, Error::Ended(_)), "{error}");
        }
        assert!(start.elapsed() < Duration::from_secs(20), "every pending I/O ends within a deadline");
        killer.join().unwrap();
        assert!(nvme.create_queue(4).await.is_err());
        assert!(nvme.shutdown().await.is_err());
    });
}

#[test]
fn a_second_client_after_a_killed_first() {
    let server = serve(disk(16 * MIB, 512));
    for round in 0..3 {
        run(async {
            let nvme = controller(&server).await;
            let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
            let pool = pool(&nvme, MIB).await;
            let mut buf = pool.alloc(4096).unwrap();
            fill(&mut buf, round);
            let (result, buf) = ns.write(round * 8, buf).await;
            result.unwrap();
            let (result, _) = ns.read(round * 8, buf).await;
            result.unwrap();
            // Gone without a word, with commands under way.
            let mut read = pin!(ns.read(0, pool.alloc(4096).unwrap()));
            assert!(futures::poll!(read.as_mut()).is_pending());
        });
    }
    run(async {
        let nvme = controller(&server).await;
        let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
        let pool = pool(&nvme, MIB).await;
        for round in 0..3 {
            let (result, buf) = ns.read(round * 8, pool.alloc(4096).unwrap()).await;
            result.unwrap();
            assert!(is_filled(&buf, round), "the disk outlives its clients");
        }
        nvme.shutdown().await.unwrap();
    });
}

#[test]
fn many_queues() {
    let server = serve(disk(16 * MIB, 512));
    run(async {
        let nvme = controller(&server).await;
        assert_eq!(nvme.info().io_queues, 64);
        let mut queues = Vec::new();
        for _ in 0..64 {
            queues.push(nvme.create_queue(2).await.unwrap());
        }
        assert!(nvme.create_queue(2).await.unwrap_err().to_string().contains("in use"));
        let pool = Rc::new(pool(&nvme, MIB).await);
        let tasks: Vec<_> = queues
            .iter()
            .map(|queue| {
                let (ns, pool) = (queue.namespace(1).unwrap(), pool.clone());
                spawn(async move { ns.read(3, pool.alloc(512).unwrap()).await.0 })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        nvme.shutdown().await.unwrap();
    });
}
