//! The reactor: tasks, wakes from other threads, operations and their cancellation.

use std::{
    cell::{Cell, RefCell},
    future::{Future, pending, poll_fn},
    io::Write,
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use futures::{StreamExt, channel::oneshot};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use vfio_uring::reactor::{self, Idle, Poller, Reactor, Standby, op, sleep, spawn, timeout, yield_now};

const IN: u32 = PollFlags::IN.bits() as u32;
const OUT: u32 = PollFlags::OUT.bits() as u32;

fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(Duration::from_secs(60), future).await.expect("no hang") })
}

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn tasks_run_in_order_and_join() {
    run(async {
        let log = Rc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..3)
            .map(|i| {
                let log = log.clone();
                spawn(async move {
                    for round in 0..2 {
                        log.lock().unwrap().push((round, i));
                        yield_now().await;
                    }
                    i * 10
                })
            })
            .collect();
        for (i, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await, Ok(i * 10));
        }
        assert_eq!(*log.lock().unwrap(), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    });
}

#[test]
fn an_aborted_task_drops_its_future() {
    let probe = Rc::new(());
    run(async {
        let held = probe.clone();
        let task = spawn(async move {
            let _held = held;
            pending::<()>().await
        });
        yield_now().await;
        assert_eq!(Rc::strong_count(&probe), 2);
        task.abort();
        assert_eq!(Rc::strong_count(&probe), 1);
        assert!(task.await.is_err());
    });
}

#[test]
fn a_dropped_reactor_drops_its_tasks_and_their_operations() {
    let fd = event();
    let joined = {
        let reactor = Reactor::new().unwrap();
        let fd = fd.clone();
        let mut joined = None;
        reactor.block_on(async {
            joined = Some(spawn(async move { op::eventfd_count(&fd).await.unwrap() }));
            yield_now().await;
        });
        joined.unwrap()
    };
    assert_eq!(Arc::strong_count(&fd), 1, "the slot's reference went with the reactor");
    assert!(run(joined).is_err());
}

#[test]
fn timers_fire_in_order() {
    run(async {
        let log = Rc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = [60, 10, 35]
            .into_iter()
            .map(|ms| {
                let log = log.clone();
                spawn(async move {
                    let start = Instant::now();
                    sleep(Duration::from_millis(ms)).await;
                    assert!(start.elapsed() >= Duration::from_millis(ms));
                    log.lock().unwrap().push(ms);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*log.lock().unwrap(), [10, 35, 60]);
        assert!(timeout(Duration::from_millis(5), pending::<()>()).await.is_err());
    });
}

#[test]
fn files_are_read_and_written_at_offsets() {
    run(async {
        let file: Arc<OwnedFd> = Arc::new(tempfile::tempfile().unwrap().into());
        let (result, _) = op::write_at(&file, b"hello world".to_vec(), 100).await;
        assert_eq!(result.unwrap(), 11);
        let (result, bytes) = op::read_at(&file, vec![0; 64], 106).await;
        assert_eq!(result.unwrap(), 5);
        assert_eq!(&bytes[..5], b"world");
    });
}

#[test]
fn eventfd_counts_and_multishot_polls() {
    run(async {
        let fd = event();
        signal(&fd);
        signal(&fd);
        assert_eq!(op::eventfd_count(&fd).await.unwrap(), 2);
        let mut events = op::poll_multishot(&fd, IN);
        assert!(futures::poll!(events.next()).is_pending());
        for _ in 0..3 {
            let other = fd.clone();
            thread::spawn(move || signal(&other)).join().unwrap();
            // The counter is never read, and each signal is still heard of.
            assert!(events.next().await.unwrap().unwrap() & IN != 0);
        }
        assert_eq!(op::eventfd_count(&fd).await.unwrap(), 3);
        assert_eq!(op::poll(&event(), OUT).await.unwrap() & OUT, OUT);
    });
}

#[test]
fn messages_carry_descriptors() {
    run(async {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b): (Arc<OwnedFd>, Arc<OwnedFd>) = (Arc::new(a.into()), Arc::new(b.into()));
        let file = event();
        signal(&file);
        let (sent, _) = op::send(&a, b"abc".to_vec(), vec![file.clone(), file]).await;
        assert_eq!(sent.unwrap(), 3);
        let (received, bytes) = op::recv(&b, vec![0; 16], 4).await;
        let received = received.unwrap();
        assert_eq!((received.bytes, received.fds.len(), received.fds_truncated), (3, 2, false));
        assert_eq!(&bytes[..3], b"abc");
        let fd = Arc::new(received.fds.into_iter().next().unwrap());
        assert_eq!(op::eventfd_count(&fd).await.unwrap(), 1);
        let (sent, _) = op::send(&a, b"d".to_vec(), vec![event(), event(), event()]).await;
        assert_eq!(sent.unwrap(), 1);
        let received = op::recv(&b, vec![0; 16], 1).await.0.unwrap();
        assert!(received.fds_truncated && received.fds.len() < 3);
        drop(a);
        assert_eq!(op::recv(&b, vec![0; 16], 0).await.0.unwrap().bytes, 0);
    });
}

#[test]
fn dropped_operations_are_cancelled() {
    run(async {
        let (a, b) = UnixStream::pair().unwrap();
        let b: Arc<OwnedFd> = Arc::new(b.into());
        for _ in 0..200 {
            let mut receive = Box::pin(op::recv(&b, vec![0; 4096], 4));
            assert!(futures::poll!(&mut receive).is_pending());
            drop(receive);
        }
        while Arc::strong_count(&b) > 1 {
            sleep(Duration::from_millis(1)).await;
        }
        (&a).write_all(b"still works").unwrap();
        assert_eq!(op::recv(&b, vec![0; 64], 0).await.0.unwrap().bytes, 11);
    });
}

/// Descriptors that came in for a receive whose future is gone are closed.
#[test]
fn descriptors_of_a_dropped_receive_are_closed() {
    run(async {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b): (Arc<OwnedFd>, Arc<OwnedFd>) = (Arc::new(a.into()), Arc::new(b.into()));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut receive = Box::pin(op::recv(&b, vec![0; 64], 4));
        assert!(futures::poll!(&mut receive).is_pending());
        op::send(&a, b"x".to_vec(), vec![Arc::new(writer)]).await.0.unwrap();
        sleep(Duration::from_millis(5)).await;
        drop(receive);
        let reader = Arc::new(reader);
        assert_eq!(op::read_at(&reader, vec![0; 1], u64::MAX).await.0.unwrap(), 0, "no writer is left");
    });
}

#[test]
fn many_operations_at_once() {
    let reactor = Reactor::builder().entries(8).build().unwrap();
    reactor.block_on(async {
        let fds: Vec<_> = (0..300).map(|_| event()).collect();
        let count = |fd: Arc<OwnedFd>| spawn(async move { op::eventfd_count(&fd).await.unwrap() });
        let tasks: Vec<_> = fds.iter().cloned().map(count).collect();
        yield_now().await;
        fds.iter().for_each(|fd| signal(fd));
        for task in tasks {
            assert_eq!(task.await, Ok(1));
        }
    });
}

/// Wakes from many threads at every stage of a task's life: before its poll, during it, after its end, after its reactor.
#[test]
fn foreign_wakes_at_any_time() {
    for idle in [Idle::Hybrid, Idle::Park, Idle::Spin] {
        let wakers: Arc<Mutex<Vec<Waker>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (wakers, stop) = (wakers.clone(), stop.clone());
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let some: Vec<Waker> = wakers.lock().unwrap().iter().take(8).cloned().collect();
                        some.into_iter().for_each(Waker::wake);
                        thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            let reactor = Reactor::builder().idle(idle).build().unwrap();
            reactor.block_on(async {
                for round in 0..200u32 {
                    let (send, receive) = oneshot::channel();
                    let wakers = wakers.clone();
                    let noisy = spawn(async move {
                        let mut polls = 0;
                        poll_fn(|cx| {
                            let mut wakers = wakers.lock().unwrap();
                            wakers.insert(0, cx.waker().clone());
                            wakers.truncate(64);
                            polls += 1;
                            if polls > 3 { Poll::Ready(()) } else { Poll::Pending }
                        })
                        .await;
                    });
                    let sender = thread::spawn(move || {
                        if round % 3 == 0 {
                            thread::sleep(Duration::from_micros(200));
                        }
                        send.send(round).unwrap();
                    });
                    assert_eq!(receive.await, Ok(round), "the one wake that counts is not lost");
                    noisy.await.unwrap();
                    sender.join().unwrap();
                }
            });
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        wakers.lock().unwrap().drain(..).for_each(Waker::wake);
    }
}

#[test]
fn pollers_are_polled_and_unregistered() {
    struct Count(Cell<u32>);
    impl Poller for Count {
        fn poll(&self) -> bool {
            self.0.set(self.0.get() + 1);
            false
        }
        fn standby(&self) -> Standby {
            Standby::Polled
        }
    }
    run(async {
        let count = Rc::new(Count(Cell::new(0)));
        let guard = reactor::register_poller(count.clone());
        yield_now().await;
        yield_now().await;
        let polls = count.0.get();
        assert!(polls > 0);
        sleep(Duration::from_millis(20)).await;
        assert!(count.0.get() > polls + 5, "outstanding work is looked at while the reactor naps");
        drop(guard);
        assert_eq!(Rc::strong_count(&count), 1);
    });
}

/// A poller that finds out, while it is asked about sleeping, that somebody has to be woken.
#[test]
fn a_wake_by_standby_is_not_slept_over() {
    struct Late(RefCell<Option<oneshot::Sender<()>>>);
    impl Poller for Late {
        fn poll(&self) -> bool {
            false
        }
        fn standby(&self) -> Standby {
            if let Some(sender) = self.0.borrow_mut().take() {
                sender.send(()).unwrap();
            }
            Standby::Idle
        }
    }
    run(async {
        let (send, receive) = oneshot::channel();
        let _guard = reactor::register_poller(Rc::new(Late(RefCell::new(Some(send)))));
        timeout(Duration::from_secs(20), receive).await.expect("no sleep").unwrap();
    });
}

#[test]
fn a_panicking_task_leaves_the_reactor_usable() {
    let reactor = Reactor::new().unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        reactor.block_on(async {
            let _other = spawn(async { yield_now().await });
            spawn(async { panic!("a bug in a task") }).await
        })
    }));
    assert!(result.is_err());
    assert_eq!(reactor.block_on(async { spawn(async { 5 }).await }), Ok(5));
}

#[test]
fn a_reactor_may_be_a_thread_local() {
    thread_local! {
        static REACTOR: Reactor = Reactor::new().unwrap();
    }
    let fd = event();
    let held = fd.clone();
    let thread = thread::spawn(move || {
        REACTOR.with(|reactor| {
            reactor.block_on(async {
                spawn(async move { op::eventfd_count(&held).await });
                yield_now().await;
            });
        });
    });
    assert!(thread.join().is_ok());
    assert_eq!(Arc::strong_count(&fd), 1);
}
