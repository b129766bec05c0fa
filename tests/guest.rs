//! One body of tests in every runtime: our reactor alone, and as a guest of tokio and tokio-uring.

#[path = "support/pattern.rs"]
mod pattern;

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use pattern::{fill, is_filled};
use vfio_uring::{
    device::{Address, Device},
    dma::{HugePages, Pool},
    reactor::{Guest, Idle, Reactor, sleep, spawn, timeout, yield_now},
};
use vfio_uring_models::{
    nvme::{self, Config, Faults, NamespaceConfig},
    server::Running,
};
use vfio_uring_nvme::{Controller, Error, Namespace, Options, Queue};

const TASKS: u64 = 16;
/// Writes, each read back.
const ROUNDS: u64 = 10_000 / TASKS / 2;
const LIMIT: Duration = Duration::from_secs(120);

fn serve(faults: Faults) -> Running {
    let namespaces = vec![NamespaceConfig::memory(16 << 20)];
    nvme::spawn(Config { namespaces, faults, ..Config::default() }).unwrap()
}

async fn bring_up(server: &Running) -> (Controller, Pool) {
    let device = Device::open(&server.address().parse::<Address>().unwrap()).await.unwrap();
    let nvme = Controller::new(&device, Options::default()).await.unwrap();
    let pool = Pool::new(device.dma(), 1 << 20, HugePages::No).await.unwrap();
    (nvme, pool)
}

/// The body: it does not know where it runs.
async fn body() {
    let server = serve(Faults { drop_completion_lba: Some(8), ..Faults::default() });
    let (nvme, pool) = bring_up(&server).await;
    let queues = [nvme.create_queue(8).await.unwrap(), nvme.create_interrupt_queue(8).await.unwrap()];
    for queue in &queues {
        verified(queue, &pool).await;
    }
    dropped(&queues[0].namespace(1).unwrap(), &pool).await;
    nvme.shutdown().await.unwrap();
    killed().await;
}

/// 10 000 I/Os, every block compared.
async fn verified(queue: &Queue, pool: &Pool) {
    let tasks = (0..TASKS).map(|task| {
        let (ns, mut buf) = (queue.namespace(1).unwrap(), pool.alloc(4096).unwrap());
        spawn(async move {
            for round in 0..ROUNDS {
                let unit = task * ROUNDS + round;
                let lba = 64 + unit % 2048 * TASKS % 2048 * 8 + task * 8;
                fill(&mut buf, unit);
                let (written, mut back) = ns.write(lba, buf).await;
                written.unwrap();
                back.fill(0);
                let (read, back) = ns.read(lba, back).await;
                read.unwrap();
                assert!(is_filled(&back, unit), "block {lba}");
                buf = back;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

/// A future that is dropped leaves its buffer with the controller; the queue goes on.
async fn dropped(ns: &Namespace, pool: &Pool) {
    let free = pool.stats().free;
    let mut stuck = Box::pin(ns.read(8, pool.alloc(4096).unwrap()));
    assert!(futures::poll!(&mut stuck).is_pending());
    yield_now().await;
    drop(stuck);
    sleep(Duration::from_millis(20)).await;
    assert_eq!(pool.stats().free, free - 4096, "its completion never comes, so it stays");
    ns.read(16, pool.alloc(4096).unwrap()).await.0.unwrap();
}

/// A server that ends in the middle of it all: every future ends.
async fn killed() {
    let server = serve(Faults { drop_completion_lba: Some(8), ..Faults::default() });
    let (nvme, pool) = bring_up(&server).await;
    for interrupt in [false, true] {
        let queue = match interrupt {
            false => nvme.create_queue(8).await,
            true => nvme.create_interrupt_queue(8).await,
        };
        let (ns, buf) = (queue.unwrap().namespace(1).unwrap(), pool.alloc(4096).unwrap());
        // This one waits for the end of the world.
        let stuck = spawn(async move { ns.read(8, buf).await.0 });
        sleep(Duration::from_millis(5)).await;
        assert!(!stuck.is_finished());
        if interrupt {
            server.stop().unwrap();
            let ended = timeout(Duration::from_secs(30), stuck).await.expect("it ends").unwrap();
            assert!(matches!(ended, Err(Error::Ended(_))), "{ended:?}");
            break;
        }
    }
    assert!(nvme.device().gone().await.to_string().contains("gone"));
}

fn native(idle: Idle) {
    let reactor = Reactor::builder().idle(idle).build().unwrap();
    reactor.block_on(timeout(LIMIT, body())).expect("no hang");
}

/// The body as a guest, while a task of the host wants its turns, too.
async fn as_guest(idle: Idle, ticks: Rc<Cell<u32>>) {
    let mut guest = Reactor::builder().idle(idle).guest().unwrap();
    let before = ticks.get();
    let ran = tokio::time::timeout(LIMIT, guest.run(body())).await.expect("no hang");
    ran.unwrap();
    assert!(ticks.get() > before, "the host's other tasks starve");
}

async fn ticking(ticks: Rc<Cell<u32>>) {
    loop {
        tokio::time::sleep(Duration::from_millis(1)).await;
        ticks.set(ticks.get() + 1);
    }
}

/// Runs `future` in a LocalSet, with a ticking task beside it.
async fn beside_ticks(idle: Idle) {
    let ticks = Rc::new(Cell::new(0));
    let ticker = tokio::task::spawn_local(ticking(ticks.clone()));
    tokio::task::spawn_local(as_guest(idle, ticks)).await.unwrap();
    ticker.abort();
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

const MODES: [Idle; 3] = [Idle::Spin, Idle::Park, Idle::Hybrid];

#[test]
fn natively() {
    MODES.into_iter().for_each(native);
}

#[test]
fn in_tokio_current_thread() {
    for idle in MODES {
        let ticks = Rc::new(Cell::new(0));
        let ticker = ticking(ticks.clone());
        current_thread().block_on(async move {
            tokio::select! {
                () = as_guest(idle, ticks) => {}
                () = ticker => unreachable!("it ticks for ever"),
            }
        });
    }
}

#[test]
fn in_a_local_set_of_a_multi_thread_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for idle in MODES {
        tokio::task::LocalSet::new().block_on(&runtime, beside_ticks(idle));
    }
}

#[test]
fn in_tokio_uring() {
    for idle in MODES {
        tokio_uring::start(beside_ticks(idle));
    }
}

/// tokio-uring submits only when its runtime sleeps: a guest that never does lets it.
#[test]
fn a_spinning_guest_beside_files_of_tokio_uring() {
    tokio_uring::start(async {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&path, [7; 4096]).unwrap();
        let mut guest = Reactor::builder().idle(Idle::Spin).guest().unwrap();
        let reads = async {
            let file = tokio_uring::fs::File::open(&path).await.unwrap();
            for _ in 0..20 {
                let (result, bytes) = file.read_at(vec![0; 4096], 0).await;
                assert!(result.unwrap() == 4096 && bytes == [7; 4096]);
            }
            file.close().await.unwrap();
        };
        tokio::time::timeout(LIMIT, guest.run(reads)).await.expect("no hang").unwrap();
    });
}

/// What wakes a sleeping guest: its host's channels and timers, its own timers, and other threads.
#[test]
fn wakes_of_a_sleeping_guest() {
    current_thread().block_on(async {
        let (to_guest, mut from_host) = tokio::sync::mpsc::channel(1);
        let other = to_guest.clone();
        let thread = std::thread::spawn(move || {
            for i in 0..100 {
                other.blocking_send(i).unwrap();
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let mut guest = Reactor::builder().idle(Idle::Park).guest().unwrap();
        let run = guest.run(async {
            let ours = spawn(async {
                let start = Instant::now();
                for i in 1..20 {
                    sleep(Duration::from_millis(1)).await;
                    assert!(start.elapsed() >= Duration::from_millis(i));
                }
            });
            let mut got = 0;
            while from_host.recv().await.is_some() {
                got += 1;
            }
            ours.await.unwrap();
            got
        });
        let host = async move {
            for i in 0..100 {
                to_guest.send(i).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let both = async { tokio::join!(run, host).0 };
        assert_eq!(tokio::time::timeout(LIMIT, both).await.expect("no hang").unwrap(), 200);
        thread.join().unwrap();
    });
}

/// A run that is dropped, at whatever point, drops its future inside of the reactor; the guest runs another.
#[test]
fn a_dropped_run() {
    let server = serve(Faults::default());
    current_thread().block_on(async {
        let mut guest = Guest::new().unwrap();
        for micros in (0..20_000).step_by(700) {
            let run = guest.run(async {
                let (nvme, pool) = bring_up(&server).await;
                let ns = nvme.create_interrupt_queue(8).await.unwrap().namespace(1).unwrap();
                loop {
                    ns.read(0, pool.alloc(4096).unwrap()).await.0.unwrap();
                }
            });
            let dropped: Result<vfio_uring::Result<()>, _> = tokio::time::timeout(Duration::from_micros(micros), run).await;
            assert!(dropped.is_err());
        }
        let ended = guest.run(async {
            let (nvme, pool) = timeout(LIMIT, bring_up(&server)).await.expect("no hang");
            let ns = nvme.create_queue(8).await.unwrap().namespace(1).unwrap();
            ns.read(0, pool.alloc(4096).unwrap()).await.0.unwrap();
            nvme.shutdown().await.unwrap();
        });
        ended.await.unwrap();
    });
}

#[test]
fn outside_of_a_runtime() {
    let mut guest = Guest::new().unwrap();
    let refused = futures::executor::block_on(guest.run(async {})).unwrap_err();
    assert!(refused.to_string().contains("a guest needs"), "{refused}");
}
