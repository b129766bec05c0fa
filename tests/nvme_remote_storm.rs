//! A seeded storm around the NVMe driver's handle for other threads: foreign wakes, dropped futures and a reactor that ends, at every
//! stage of a command's life. `VFIO_URING_SEED` repeats a run.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use futures::{executor::block_on, future::LocalBoxFuture};
use vfio_uring::dma::DmaBuf;
use vfio_uring_models::nvme;
use vfio_uring_nvme::{Error, RemoteIo, RemoteRunner, Result};

mod remote;
use remote::*;

fn seed() -> u64 {
    let seed = std::env::var("VFIO_URING_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("VFIO_URING_SEED={seed}");
    seed
}

/// Wakers of callers and of the runner that others wake at any time: before, during and long after what they wait for.
#[derive(Clone, Default)]
struct Nuisance {
    wakers: Arc<Mutex<Vec<Waker>>>,
    over: Arc<AtomicBool>,
}

impl Nuisance {
    fn add(&self, rng: &mut fastrand::Rng, waker: &Waker) {
        let mut wakers = self.wakers.lock().unwrap();
        if wakers.len() < 64 {
            wakers.push(waker.clone());
        } else {
            wakers[rng.usize(0..64)] = waker.clone();
        }
    }

    fn run(&self, mut rng: fastrand::Rng) {
        while !self.over.load(Ordering::Relaxed) {
            let waker = rng.choice(&*self.wakers.lock().unwrap()).cloned();
            if let Some(waker) = waker {
                waker.wake();
            }
            pause(&mut rng);
        }
    }
}

/// Nothing, some steps, the rest of a time slice, or some time.
fn pause(rng: &mut fastrand::Rng) {
    match rng.u32(0..16) {
        0..8 => {}
        8..13 => (0..rng.u32(0..2000)).for_each(|_| std::hint::spin_loop()),
        13..15 => thread::yield_now(),
        _ => thread::sleep(Duration::from_micros(rng.u64(0..100))),
    }
}

/// Tells a waker's own wake from those of others.
struct Flag(AtomicBool, Thread);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
        self.1.unpark();
    }
}

/// Polls with another waker each time, now and then without being woken, and possibly not to the end.
fn drive(mut io: RemoteIo, rng: &mut fastrand::Rng, nuisance: &Nuisance) -> Option<(Result<()>, DmaBuf)> {
    let (start, mut drop_after) = (Instant::now(), rng.bool().then(|| rng.u32(0..4)));
    loop {
        if drop_after == Some(0) {
            return None;
        }
        drop_after = drop_after.map(|polls| polls - 1);
        let flag = Arc::new(Flag(AtomicBool::new(false), thread::current()));
        let waker = Waker::from(flag.clone());
        if rng.u32(0..8) == 0 {
            nuisance.add(rng, &waker);
        }
        if let Poll::Ready(output) = Pin::new(&mut io).poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        pause(rng);
        // Only the last waker counts. A poll without a wake is one too many, which does no harm.
        let patient = drop_after.is_none() && rng.u32(0..4) != 0;
        while patient && !flag.0.load(Ordering::Acquire) {
            thread::park_timeout(Duration::from_secs(1));
            assert!(start.elapsed() < LIMIT / 2, "a wake was lost");
        }
    }
}

#[test]
fn foreign_wakes_at_every_stage() {
    storm(true);
}

/// Without the wakes of others: they would make up for one that is lost.
#[test]
fn no_wake_is_lost_at_any_stage() {
    storm(false);
}

fn storm(with_nuisance: bool) {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 4000;
    bounded(move || {
        let server = nvme::spawn(disk(64 * MIB)).unwrap();
        let (seed, nuisance) = (seed(), Nuisance::default());
        let runners = nuisance.clone();
        let run = move |runner: RemoteRunner| -> LocalBoxFuture<'static, ()> {
            let mut rng = fastrand::Rng::with_seed(seed);
            Box::pin(async move {
                let mut run = pin!(runner.run());
                poll_fn(|cx| {
                    if rng.u32(0..8) == 0 {
                        runners.add(&mut rng, cx.waker());
                    }
                    run.as_mut().poll(cx)
                })
                .await;
            })
        };
        // Fewer permits than callers, and fewer slots than permits.
        let owner = Setup { depth: 2, capacity: 3, run: Box::new(run), ..Setup::default() }.start(&server);
        let ends = [const { AtomicU64::new(0) }; 2];
        thread::scope(|scope| {
            let storm = with_nuisance.then(|| scope.spawn(|| nuisance.run(fastrand::Rng::with_seed(seed ^ 0xffff))));
            threads(THREADS, |thread| {
                let mut rng = fastrand::Rng::with_seed(seed << 8 | thread);
                for round in 0..ROUNDS {
                    let lba = thread * ROUNDS + round % 1000;
                    let mut buf = owner.pool.alloc(BLOCK).unwrap();
                    fill(&mut buf, round);
                    // A dropped one may or may not be executed, at any later time: its block is used again 1000 rounds later.
                    let written = drive(owner.remote.write(lba, buf), &mut rng, &nuisance);
                    ends[usize::from(written.is_some())].fetch_add(1, Ordering::Relaxed);
                    let Some((result, buf)) = written else { continue };
                    result.unwrap();
                    let Some((result, buf)) = drive(owner.remote.read(lba, buf), &mut rng, &nuisance) else { continue };
                    result.unwrap();
                    assert!(is_filled(&buf, round), "seed {seed}, thread {thread}, round {round}");
                }
            });
            nuisance.over.store(true, Ordering::Relaxed);
            storm.into_iter().for_each(|storm| storm.join().unwrap());
        });
        let [dropped, done] = ends.map(AtomicU64::into_inner);
        assert!(dropped > ROUNDS && done > ROUNDS, "{dropped} dropped, {done} done");
        ended_in_order(owner);
    });
}

/// The reactor goes at any moment, under load.
#[test]
fn a_reactor_that_ends_under_load() {
    bounded(|| {
        let server = nvme::spawn(disk(16 * MIB)).unwrap();
        let mut rng = fastrand::Rng::with_seed(seed());
        for round in 0..30 {
            let Owner { remote, pool, quit, thread } = Setup { depth: 4, capacity: 8, ..Setup::default() }.start(&server);
            let after = Duration::from_micros(rng.u64(0..3000));
            thread::scope(|scope| {
                for caller in 0..12 {
                    let (remote, pool) = (&remote, &pool);
                    scope.spawn(move || {
                        let mut buf = pool.alloc(if caller == 0 { 1 << 20 } else { BLOCK }).unwrap();
                        loop {
                            let (result, back) = block_on(remote.read(caller, buf));
                            match result {
                                Ok(()) => buf = back,
                                Err(Error::NoRunner) => return,
                                Err(error) => panic!("round {round}: {error}"),
                            }
                        }
                    });
                }
                thread::sleep(after);
                drop(quit);
            });
            assert!(thread.join().unwrap().is_none());
            let stats = pool.stats();
            assert!(stats.free + stats.quarantined == stats.bytes, "{stats:?}");
        }
    });
}
