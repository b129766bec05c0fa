use std::{
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, AtomicUsize},
    thread,
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::join};

use super::*;
use crate::{
    dma::HugePages,
    mmio::{GUARDED, Register},
    reactor::{self, Reactor, sleep, timeout},
};

const LIMIT: Duration = Duration::from_secs(60);

fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(LIMIT, future).await.expect("no hang") })
}

fn close(gate: &Arc<Gate>, flag: u64) -> impl Future<Output = Closed> + use<> {
    let gate = gate.clone();
    async move { Closed::close(&gate, gate.family(), flag).await.unwrap() }
}

/// A page behind a gate.
fn mapped(gate: &Gate) -> (Arc<OwnedFd>, Arc<SharedMemory>) {
    let (fd, ours) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
    ours.store_u32(0, 0x1234).unwrap();
    let fd = Arc::new(fd);
    let memory = gate.map(&fd, 0, || SharedMemory::map(&fd, 0, 4096, true)).unwrap();
    (fd, memory)
}

#[test]
fn the_hot_part_is_one_cache_line() {
    assert_eq!(align_of::<Gate>(), 64);
    assert!(std::mem::offset_of!(Gate, generation) < 64 && std::mem::offset_of!(Gate, word) < 64);
}

#[test]
fn states_follow_their_reasons() {
    let gate = Gate::of_user("x");
    let set = |bits| gate.word.fetch_or(bits, Ordering::SeqCst);
    let reason = |access| gate.enter(access).err().map(|error| error.to_string());
    assert_eq!((gate.state(), reason(Access::Memory)), (State::Live, None));
    set(why::LOW_POWER);
    assert_eq!((gate.state(), reason(Access::Memory)), (State::Unavailable, None));
    set(why::MEMORY_OFF);
    assert!(reason(Access::Memory).is_some_and(|why| why.contains("COMMAND.MEM")));
    set(why::SLEEPING);
    assert!(reason(Access::Memory).is_some_and(|why| why.contains("D3hot")));
    assert_eq!((gate.state(), reason(Access::Control)), (State::Unavailable, None));
    set(why::RESETTING);
    assert_eq!(gate.state(), State::Resetting);
    assert!(reason(Access::Control).is_some_and(|why| why.contains("being reset")));
    gate.end(Error::Timeout { what: "it".into(), after: LIMIT });
    gate.lift(!why::GONE & 0xffff);
    assert_eq!(gate.state(), State::Gone);
    assert!(matches!(gate.cause(), Some(Error::Timeout { .. })));
    assert!(matches!(gate.enter(Access::Control), Err(Error::Gone { .. })));
    assert_eq!(gate.word.load(Ordering::SeqCst) >> 32, 0);
}

#[test]
fn a_reset_waits_for_those_inside() {
    run(async {
        let gate = Gate::of_user("x");
        let inside = gate.enter(Access::Control).unwrap();
        let mut closing = Box::pin(close(&gate, why::RESETTING));
        assert!(closing.as_mut().now_or_never().is_none());
        assert_eq!(gate.state(), State::Resetting);
        assert!(gate.enter(Access::Memory).is_err());
        let closing = reactor::spawn(closing);
        drop(inside);
        let closed = closing.await.unwrap();
        assert_eq!(gate.state(), State::Resetting);
        closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap();
        assert_eq!((gate.state(), gate.generation(), gate.confirmed()), (State::Live, 1, 1));
        let closed = close(&gate, why::RESETTING).await;
        closed.finish(Outcome { reset: Some(Reset::Asked), ..Outcome::default() }).unwrap();
        assert_eq!((gate.generation(), gate.confirmed()), (2, 1));
    });
}

#[test]
fn who_stays_inside_does_not_keep_it_closed() {
    run(async {
        let gate = Gate::of_user("x");
        let inside = gate.enter(Access::Control).unwrap();
        drop(close(&gate, why::RESETTING).await);
        assert_eq!((gate.state(), gate.generation()), (State::Live, 0));
        drop(inside);
    });
}

#[test]
fn what_is_given_up_opens_the_gate() {
    run(async {
        let gate = Gate::of_user("x");
        let inside = gate.enter(Access::Control).unwrap();
        let mut closing = Box::pin(close(&gate, why::CHANGING));
        assert!(closing.as_mut().now_or_never().is_none());
        assert_eq!(gate.state(), State::Unavailable);
        drop(closing);
        assert_eq!(gate.state(), State::Live);
        drop(inside);
        // One reset at a time, and the second goes on when the first was given up.
        let first = close(&gate, why::RESETTING).await;
        let second = reactor::spawn(close(&gate, why::RESETTING));
        sleep(Duration::from_millis(10)).await;
        assert!(!second.is_finished());
        drop(first);
        drop(second.await.unwrap());
        assert_eq!((gate.state(), gate.generation()), (State::Live, 0));
    });
}

#[test]
fn several_are_closed_in_one_order() {
    let gates = [Gate::of_user("a"), Gate::of_user("b"), Gate::of_user("c")];
    thread::scope(|scope| {
        for first in 0..3 {
            let gates = &gates;
            scope.spawn(move || {
                run(async {
                    for _ in 0..200 {
                        let others = (0..3).map(|at| gates[(first + at) % 3].clone()).collect();
                        let closed = Closed::close(&gates[first], others, why::RESETTING).await.unwrap();
                        assert!(gates.iter().all(|gate| gate.state() == State::Resetting));
                        closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap();
                    }
                });
            });
        }
    });
    assert!(gates.iter().all(|gate| gate.generation() == 600 && gate.state() == State::Live));
}

#[test]
fn changes_are_a_stream() {
    run(async {
        let gate = Gate::of_user("x");
        let mut changes = StateChanges::new(&gate);
        assert!(changes.next().now_or_never().is_none());
        let closed = close(&gate, why::RESETTING).await;
        assert_eq!(changes.next().await, Some(StateChange { state: State::Resetting, generation: 0 }));
        let (live, ()) = join(gate.live(), async {
            closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap();
        })
        .await;
        live.unwrap();
        assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation: 1 }));
        // Both of a reset that was over at once are one.
        let closed = close(&gate, why::RESETTING).await;
        closed.finish(Outcome { reset: Some(Reset::Asked), ..Outcome::default() }).unwrap();
        assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation: 2 }));
        let ended = Ended::new(&gate);
        gate.close_for_good();
        assert!(matches!(ended.await, Error::Gone { .. }));
        assert_eq!(changes.next().await, Some(StateChange { state: State::Gone, generation: 2 }));
        assert_eq!(changes.next().await, None);
        assert!(gate.live().await.is_err() && Closed::close(&gate, Vec::new(), why::RESETTING).await.is_err());
        drop(changes);
        assert!(lock(&gate.waiting).is_empty());
    });
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn mappings_go_and_come_under_load() {
    if !GUARDED {
        return;
    }
    let gate = Gate::of_user("x");
    let (_fd, memory) = mapped(&gate);
    let (stop, right, missing) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for at in 1..=4 {
            let (gate, memory, stop, right, missing) = (&gate, &memory, &stop, &right, &missing);
            scope.spawn(move || {
                let (version, mine) =
                    (Register::<u32>::new(memory, 0).unwrap(), Register::<u32>::new(memory, 4 * at).unwrap());
                let mut value = 0;
                while !stop.load(Ordering::Relaxed) {
                    match version.try_read() {
                        Ok(read) => {
                            assert_eq!(read, 0x1234);
                            right.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => {
                            missing.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    // A store that does not fault is done.
                    if mine.try_write(value + 1).is_ok() {
                        value += 1;
                    }
                    if let Ok(read) = mine.try_read() {
                        assert_eq!(read, value);
                    }
                    match gate.enter(Access::Memory) {
                        Ok(_inside) => assert_ne!(gate.state(), State::Gone),
                        Err(error) => {
                            assert!(matches!(error, Error::Unavailable { state: State::Resetting, .. }), "{error}")
                        }
                    }
                }
            });
        }
        // Also when this panics.
        let stop = Stop(&stop);
        let more = async |count: &AtomicUsize| {
            let before = count.load(Ordering::Relaxed);
            while count.load(Ordering::Relaxed) < before + 4 {
                sleep(Duration::from_micros(100)).await;
            }
        };
        run(async {
            for generation in 1..=100 {
                let closed = close(&gate, why::RESETTING).await;
                closed.withdraw();
                // Nobody of those outside of the gate sleeps while it is closed.
                more(&missing).await;
                closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap();
                assert_eq!(gate.generation(), generation);
                more(&right).await;
            }
        });
        drop(stop);
    });
    assert_eq!(memory.load_u32(0), Ok(0x1234));
}

#[test]
fn mappings_of_a_device_that_is_gone_stay_away() {
    if !GUARDED {
        return;
    }
    run(async {
        let gate = Gate::of_user("x");
        let (fd, memory) = mapped(&gate);
        let closed = close(&gate, why::RESETTING).await;
        closed.withdraw();
        gate.end(Error::Gone { reason: "test".into() });
        closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap();
        assert!(memory.load_u32(0).is_err());
        assert_eq!(Register::<u32>::new(&memory, 0).unwrap().read(), u32::MAX);
        assert_eq!(gate.state(), State::Gone);
        let later = gate.map(&fd, 0, || SharedMemory::map(&fd, 0, 4096, true)).unwrap();
        assert!(later.load_u32(0).is_err());
    });
}

#[test]
fn what_can_not_be_mapped_back_is_not_live() {
    if !GUARDED {
        return;
    }
    run(async {
        let gate = Gate::of_user("x");
        let (fd, ours) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
        ours.store_u32(0, 7).unwrap();
        // What is said to be behind the mapping can't be mapped.
        let not_a_file = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
        let memory = gate.map(&not_a_file, 0, || SharedMemory::map(&fd, 0, 4096, true)).unwrap();
        let closed = close(&gate, why::RESETTING).await;
        closed.withdraw();
        let failed = closed.finish(Outcome { reset: Some(Reset::Confirmed), ..Outcome::default() }).unwrap_err();
        assert_eq!(&*failed[0].0, "x");
        assert_eq!((gate.state(), gate.generation()), (State::Unavailable, 1));
        assert!(memory.load_u32(0).is_err());
        assert!(gate.enter(Access::Memory).is_ok());
    });
}
