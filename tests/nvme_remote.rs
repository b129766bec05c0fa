//! The NVMe driver's handle for other threads, on the software controller: many callers and executors, errors, order and bound, and
//! everything that may end before its callers.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use futures::{executor::block_on, future::join_all};
use vfio_uring_models::nvme::{self, Faults};
use vfio_uring_nvme::{Error, RemoteRunner};

mod remote;
use remote::*;

#[path = "../examples/tokio_service.rs"]
#[expect(dead_code, reason = "its main function")]
mod tokio_service;

#[test]
fn the_example_works() {
    bounded(|| {
        let server = nvme::spawn(Default::default()).unwrap();
        tokio_service::serve(server.address().parse().unwrap()).unwrap();
    });
}

#[test]
fn eight_threads_of_ten_thousand_verified_ios() {
    const IOS: u64 = 10_000;
    const RANGE: u64 = 200;
    bounded(|| {
        let server = nvme::spawn(disk(64 * MIB)).unwrap();
        let owner = Setup::default().start(&server);
        let verified = AtomicU64::new(0);
        threads(8, |thread| {
            let remote = owner.remote.clone();
            let mut buf = owner.pool.alloc(BLOCK).unwrap();
            // Each range is written and read back, with another pattern a round.
            for round in 0..IOS / RANGE {
                let seed = |lba: u64| round * remote.blocks() + lba;
                for lba in thread * RANGE..(thread + 1) * RANGE {
                    fill(&mut buf, seed(lba));
                    let (result, back) = block_on(remote.write(lba, buf));
                    result.unwrap();
                    buf = back;
                }
                for lba in thread * RANGE..(thread + 1) * RANGE {
                    buf.fill(0);
                    let (result, back) = block_on(remote.read(lba, buf));
                    result.unwrap();
                    assert!(is_filled(&back, seed(lba)), "block {lba} in round {round}");
                    buf = back;
                }
                verified.fetch_add(RANGE, Ordering::Relaxed);
            }
        });
        assert_eq!(verified.into_inner(), 8 * IOS);
        ended_in_order(owner);
    });
}

#[test]
fn a_hundred_tasks_of_a_multi_thread_tokio_runtime() {
    bounded(|| {
        let server = nvme::spawn(disk(64 * MIB)).unwrap();
        let owner = Setup { capacity: 32, ..Setup::default() }.start(&server);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).build().unwrap();
        runtime.block_on(async {
            let tasks: Vec<_> = (0..100)
                .map(|task| {
                    let (remote, mut buf) = (owner.remote.clone(), owner.pool.alloc(BLOCK).unwrap());
                    tokio::spawn(async move {
                        for round in 0..50 {
                            let lba = task * 50 + round;
                            fill(&mut buf, lba);
                            let (result, mut back) = remote.write(lba, buf).await;
                            result.unwrap();
                            back.fill(0);
                            let (result, back) = remote.read(lba, back).await;
                            result.unwrap();
                            assert!(is_filled(&back, lba));
                            buf = back;
                        }
                        remote.flush().await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
        });
        ended_in_order(owner);
    });
}

#[test]
fn wrong_requests_and_errors_of_the_controller_come_back() {
    bounded(|| {
        let server = nvme::spawn(with_faults(disk(16 * MIB), Faults { error_lba: Some(8), ..Faults::default() })).unwrap();
        let owner = Setup::default().start(&server);
        let (remote, pool) = (&owner.remote, &owner.pool);
        assert_eq!((remote.blocks(), remote.block_size()), (16 * MIB / BLOCK as u64, BLOCK));
        assert_eq!((remote.capacity(), remote.available()), (64, 64));
        let (result, buf) = block_on(remote.read(8, pool.alloc(BLOCK).unwrap()));
        assert!(matches!(result, Err(Error::Status(_))) && buf.len() == BLOCK, "{result:?}");
        drop(buf);
        let (result, buf) = block_on(remote.write(0, pool.alloc(100).unwrap()));
        assert!(result.unwrap_err().to_string().contains("multiple of the block size") && buf.len() == 100);
        let (result, _) = block_on(remote.read(remote.blocks(), pool.alloc(BLOCK).unwrap()));
        assert!(result.unwrap_err().to_string().contains("beyond the namespace's end"));
        drop(buf);
        // More than one command carries.
        let mut large = pool.alloc(4 << 20).unwrap();
        fill(&mut large, 7);
        let (result, mut large) = block_on(remote.write(100, large));
        result.unwrap();
        large.fill(0);
        block_on(remote.flush()).unwrap();
        let (result, large) = block_on(remote.read(100, large));
        result.unwrap();
        assert!(is_filled(&large, 7));
        drop(large);
        ended_in_order(owner);
    });
}

/// Calls `each` when it is woken.
struct OnWake<F>(F);

impl<F: Fn() + Send + Sync> Wake for OnWake<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
}

#[test]
fn callers_are_served_in_order() {
    const CALLERS: usize = 200;
    bounded(|| {
        for capacity in [1, 2] {
            let server = nvme::spawn(disk(16 * MIB)).unwrap();
            let owner = Setup { capacity, ..Setup::default() }.start(&server);
            let served = Arc::new(Mutex::new(Vec::new()));
            let mut waiting = Vec::new();
            for caller in 0..CALLERS {
                let on_wake = {
                    let served = served.clone();
                    Waker::from(Arc::new(OnWake(move || served.lock().unwrap().push(caller))))
                };
                let mut io = owner.remote.read(caller as u64, owner.pool.alloc(BLOCK).unwrap());
                match Pin::new(&mut io).poll(&mut Context::from_waker(&on_wake)) {
                    Poll::Ready((result, _)) => {
                        result.unwrap();
                        on_wake.wake();
                    }
                    // Who leaves the line, or its request, is in nobody's way.
                    Poll::Pending if caller % 3 == 2 => drop(io),
                    Poll::Pending => waiting.push((caller, io)),
                }
            }
            let callers: Vec<usize> = waiting.iter().map(|(caller, _)| *caller).collect();
            wait_until(|| callers.iter().all(|caller| served.lock().unwrap().contains(caller)));
            for (_, mut io) in waiting {
                assert!(matches!(poll_once(&mut io), Poll::Ready((Ok(()), _))));
            }
            let served = served.lock().unwrap();
            // When somebody is served, only those with the other permits may be left of those before.
            let mut left: Vec<_> = served.clone();
            left.sort_unstable();
            for caller in served.iter() {
                let before = left.iter().position(|other| other == caller).unwrap();
                assert!(before < capacity, "caller {caller} was served before {before} others: {served:?}");
                left.remove(before);
            }
            drop(served);
            ended_in_order(owner);
        }
    });
}

/// With two requests that don't end, nobody else gets on, though the device would serve them; the rest is up to the timeout.
#[test]
fn at_most_capacity_requests_are_under_way() {
    bounded(|| {
        let server = nvme::spawn(with_faults(disk(16 * MIB), stall())).unwrap();
        let owner = Setup { capacity: 2, timeout: Duration::from_secs(5), ..Setup::default() }.start(&server);
        let read = |lba| owner.remote.read(lba, owner.pool.alloc(BLOCK).unwrap());
        let mut stuck = [read(64), read(64)];
        let mut others: Vec<_> = (0..10).map(read).collect();
        assert!(stuck.iter_mut().chain(&mut others).all(|io| poll_once(io).is_pending()));
        assert_eq!(owner.remote.available(), 0);
        thread::sleep(Duration::from_millis(300));
        assert!(others.iter_mut().all(|io| poll_once(io).is_pending()), "they wait for a permit");
        // Those who leave give no permit back that they don't have.
        drop(others.split_off(5));
        assert_eq!(owner.remote.available(), 0);
        for (i, (result, buf)) in block_on(join_all(stuck.into_iter().chain(others))).into_iter().enumerate() {
            assert!(matches!(result, Err(Error::Ended(_))), "{result:?}");
            assert_eq!(buf.is_empty(), i < 2, "only what was under way stays with the controller");
        }
        assert_eq!(owner.remote.available(), 2);
        ended_in_order(owner);
    });
}

#[test]
fn a_handle_dropped_with_commands_in_flight() {
    bounded(|| {
        let server = nvme::spawn(disk(16 * MIB)).unwrap();
        for keep in [true, false] {
            let Owner { remote, pool, quit, thread } = Setup { capacity: 8, ..Setup::default() }.start(&server);
            let mut ios: Vec<_> = (0..30).map(|lba| remote.read(lba, pool.alloc(BLOCK).unwrap())).collect();
            ios.retain_mut(|io| poll_once(io).is_pending());
            drop(remote);
            if keep {
                // Its futures keep the runner running.
                block_on(join_all(ios)).into_iter().for_each(|(result, _)| result.unwrap());
            } else {
                // What nobody waits for is skipped, or runs to its end.
                drop(ios);
            }
            thread.join().unwrap().expect("the runner ends with the last future").unwrap();
            drop(quit);
            assert_eq!((pool.stats().free, pool.stats().quarantined), (pool.stats().bytes, 0));
        }
    });
}

#[test]
fn a_runner_that_never_runs_answers() {
    bounded(|| {
        let server = nvme::spawn(disk(16 * MIB)).unwrap();
        let owner =
            Setup { capacity: 2, run: Box::new(|runner| Box::pin(never(runner))), ..Setup::default() }.start(&server);
        let Owner { remote, pool, quit, thread } = owner;
        let mut ios: Vec<_> = (0..6).map(|lba| remote.read(lba, pool.alloc(BLOCK).unwrap())).collect();
        assert!(ios.iter_mut().all(|io| poll_once(io).is_pending()));
        drop(quit);
        for (result, buf) in block_on(join_all(ios)) {
            assert!(matches!(result, Err(Error::NoRunner)) && buf.len() == BLOCK, "{result:?}");
        }
        assert!(thread.join().unwrap().is_none());
        let (result, _) = block_on(remote.write(0, pool.alloc(BLOCK).unwrap()));
        assert!(result.unwrap_err().to_string().contains("runner of the remote handle is gone"));
        assert!(matches!(block_on(remote.flush()), Err(Error::NoRunner)));
    });
}

async fn never(runner: RemoteRunner) {
    std::future::pending::<()>().await;
    drop(runner);
}

/// Callers in every stage when the reactor goes: in the line, queued, under way. What the controller may still write stays away
/// from everybody.
#[test]
fn a_reactor_that_ends_before_its_handles() {
    bounded(|| {
        let server = nvme::spawn(with_faults(disk(16 * MIB), stall())).unwrap();
        let owner = Setup { depth: 4, capacity: 8, ..Setup::default() }.start(&server);
        let Owner { remote, pool, quit, thread } = owner;
        let waiting = AtomicU64::new(0);
        thread::scope(|scope| {
            let callers: Vec<_> = (0..16)
                .map(|_| {
                    scope.spawn(|| {
                        let mut io = remote.read(64, pool.alloc(BLOCK).unwrap());
                        assert!(poll_once(&mut io).is_pending());
                        waiting.fetch_add(1, Ordering::AcqRel);
                        block_on(io)
                    })
                })
                .collect();
            wait_until(|| waiting.load(Ordering::Acquire) == 16);
            // Most of the time, four are under way by now.
            thread::sleep(Duration::from_millis(100));
            drop(quit);
            let mut kept = 0;
            for caller in callers {
                let (result, buf) = caller.join().unwrap();
                assert!(matches!(result, Err(Error::NoRunner)), "{result:?}");
                kept += u64::from(buf.is_empty());
            }
            assert!(thread.join().unwrap().is_none());
            assert!(kept <= 4, "{kept} can't have been under way");
            let stats = pool.stats();
            assert_eq!((stats.quarantined, stats.free), (kept * BLOCK as u64, stats.bytes - kept * BLOCK as u64));
        });
        let (result, buf) = block_on(remote.read(0, pool.alloc(BLOCK).unwrap()));
        assert!(matches!(result, Err(Error::NoRunner)) && buf.len() == BLOCK);
    });
}

#[test]
fn a_server_killed_under_load() {
    bounded(|| {
        let server = nvme::spawn(disk(16 * MIB)).unwrap();
        let Owner { remote, pool, quit, thread } = Setup { capacity: 8, ..Setup::default() }.start(&server);
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            server.stop().unwrap();
        });
        threads(16, |caller| {
            let mut buf = pool.alloc(if caller == 0 { 1 << 20 } else { BLOCK }).unwrap();
            loop {
                let (result, back) = block_on(remote.read(caller, buf));
                buf = back;
                if let Err(error) = result {
                    assert!(matches!(error, Error::Ended(_)), "{error}");
                    break;
                }
            }
            // Later ones fail at once, with their buffer.
            let (result, buf) = block_on(remote.read(caller, pool.alloc(BLOCK).unwrap()));
            assert!(matches!(result, Err(Error::Ended(_))) && buf.len() == BLOCK);
        });
        killer.join().unwrap();
        drop(remote);
        assert!(thread.join().unwrap().expect("the runner ends with the last handle").is_err());
        drop(quit);
    });
}
