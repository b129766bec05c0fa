//! The way of a request from its caller, on any thread, to the runner: a permit or a place in the line for one, the queue of
//! requests, and the bell that wakes the runner once for all that comes in while it is awake.
//!
//! A permit is had from the entry of a request until its command is done. With a permit, publishing can't fail: the queue has a
//! place for each. Without one the request itself waits in the line, so that it goes on also while nobody polls its caller.

#[cfg(vfio_uring_loom)]
use loom::{
    future::AtomicWaker,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
};
#[cfg(not(vfio_uring_loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
};
use std::{collections::BTreeMap, sync::PoisonError, task::Waker};

#[cfg(not(vfio_uring_loom))]
use crossbeam::queue::ArrayQueue;
#[cfg(not(vfio_uring_loom))]
use futures::task::AtomicWaker;

/// In the place of the number of free permits: somebody is in the line, and gets the next.
const CONTENDED: usize = usize::MAX;

/// The runner is awake, or was rung for: it looks once more before it rests.
const AWAKE: u8 = 1;
/// There is no runner any more.
const CLOSED: u8 = 2;
/// There are no callers any more.
const DESERTED: u8 = 4;

pub(crate) struct Gate<T> {
    permits: AtomicUsize,
    line: Mutex<Line<T>>,
    requests: ArrayQueue<T>,
    /// A bit for each of the runner's commands that was woken.
    woken: Box<[AtomicU64]>,
    bell: AtomicU8,
    runner: AtomicWaker,
}

struct Line<T> {
    waiting: BTreeMap<u64, T>,
    next: u64,
    closed: bool,
}

/// A place in the line.
#[derive(Debug)]
pub(crate) struct Ticket(u64);

/// What the runner is to do when it has looked at everything.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// Look again: something came in meanwhile.
    Busy,
    /// Pend; the bell wakes it.
    Asleep,
    /// Pend until the last command is done: no further one will come.
    Deserted,
}

impl<T> Gate<T> {
    /// A gate with `capacity` permits, which is not 0.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            permits: AtomicUsize::new(capacity),
            line: Mutex::new(Line { waiting: BTreeMap::new(), next: 0, closed: false }),
            requests: ArrayQueue::new(capacity),
            woken: (0..capacity.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            bell: AtomicU8::new(AWAKE),
            runner: AtomicWaker::new(),
        }
    }

    /// Permits that nobody has.
    pub(crate) fn free(&self) -> usize {
        match self.permits.load(Ordering::Relaxed) {
            CONTENDED => 0,
            free => free,
        }
    }

    // The callers' side.

    /// Passes a request on, or puts it in the line: the place in it. Once there is no runner, the request is dropped.
    pub(crate) fn enter(&self, request: T) -> Option<Ticket> {
        let take = |free: usize| (free != CONTENDED && free != 0).then(|| free - 1);
        if self.permits.fetch_update(Ordering::AcqRel, Ordering::Relaxed, take).is_ok() {
            self.publish(request);
            return None;
        }
        self.enter_line(request)
    }

    #[cold]
    fn enter_line(&self, request: T) -> Option<Ticket> {
        let mut line = self.lock();
        if line.closed {
            return None;
        }
        // A permit may have come back since. `CONTENDED` is set and reset under the lock only.
        let take_or_mark = |free: usize| match free {
            CONTENDED => None,
            0 => Some(CONTENDED),
            free => Some(free - 1),
        };
        if let Ok(1..) = self.permits.fetch_update(Ordering::AcqRel, Ordering::Relaxed, take_or_mark) {
            drop(line);
            self.publish(request);
            return None;
        }
        let number = line.next;
        line.next += 1;
        line.waiting.insert(number, request);
        Some(Ticket(number))
    }

    /// Leaves the line: the request, if it still was there.
    pub(crate) fn leave(&self, ticket: Ticket) -> Option<T> {
        let mut line = self.lock();
        let request = line.waiting.remove(&ticket.0)?;
        self.unmark(&line);
        Some(request)
    }

    /// For who has a permit.
    fn publish(&self, request: T) {
        // There is a place for each permit.
        let _ = self.requests.push(request);
        if !self.ring() {
            // Its last look at the queue may have been before the push.
            self.drain();
        }
    }

    /// All callers are gone.
    pub(crate) fn desert(&self) {
        if self.bell.fetch_or(DESERTED | AWAKE, Ordering::AcqRel) & AWAKE == 0 {
            self.runner.wake();
        }
    }

    // The bell. Whoever publishes something sets `AWAKE` afterwards, and the runner clears it before its last look. Both are
    // exchanges of one word, so that one of them is first: then the runner sees what was published, or the other one that it has
    // to be woken.

    /// Has the runner look at what was published. False: there is none any more.
    fn ring(&self) -> bool {
        let before = self.bell.fetch_or(AWAKE, Ordering::AcqRel);
        if before & AWAKE == 0 {
            self.runner.wake();
        }
        before & CLOSED == 0
    }

    /// Marks a command of the runner as woken.
    pub(crate) fn wake(&self, index: usize) {
        if let Some(word) = self.woken.get(index / 64) {
            word.fetch_or(1 << (index % 64), Ordering::Release);
            self.ring();
        }
    }

    // The runner's side.

    /// The next request, in the order in which they got their permits.
    pub(crate) fn next(&self) -> Option<T> {
        self.requests.pop()
    }

    /// Takes the marks of commands that were woken; `each` gets their indices.
    pub(crate) fn take_woken(&self, mut each: impl FnMut(usize)) {
        for (i, word) in self.woken.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::Acquire);
            while bits != 0 {
                each(i * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    /// A request is done: its permit goes to the first in the line, whose request is the last of the queue now.
    pub(crate) fn done(&self) {
        let give = |free: usize| (free != CONTENDED).then(|| free + 1);
        if self.permits.fetch_update(Ordering::AcqRel, Ordering::Relaxed, give).is_err() {
            self.done_in_line();
        }
    }

    #[cold]
    fn done_in_line(&self) {
        let mut line = self.lock();
        match line.waiting.pop_first() {
            Some((_, request)) => {
                self.unmark(&line);
                // As in `publish`; the caller looks at the queue before it rests.
                let _ = self.requests.push(request);
            }
            // The line was left meanwhile.
            None if !line.closed => {
                self.permits.fetch_add(1, Ordering::AcqRel);
            }
            None => {}
        }
    }

    /// Ends the contention when nobody is in the line any more.
    fn unmark(&self, line: &Line<T>) {
        if line.waiting.is_empty() {
            self.permits.store(0, Ordering::Release);
        }
    }

    /// To be called when there is nothing left to do; whether there really is not.
    pub(crate) fn rest(&self, waker: &Waker) -> Rest {
        #[cfg(not(vfio_uring_loom))]
        self.runner.register(waker);
        #[cfg(vfio_uring_loom)]
        self.runner.register_by_ref(waker);
        let before = self.bell.fetch_and(!AWAKE, Ordering::AcqRel);
        if !self.requests.is_empty() || self.woken.iter().any(|word| word.load(Ordering::Relaxed) != 0) {
            self.bell.fetch_or(AWAKE, Ordering::AcqRel);
            return Rest::Busy;
        }
        if before & DESERTED == 0 { Rest::Asleep } else { Rest::Deserted }
    }

    /// There is no runner any more: what waits is dropped, and so is all that comes in later.
    pub(crate) fn close(&self) {
        self.bell.fetch_or(CLOSED | AWAKE, Ordering::AcqRel);
        let waiting = {
            let mut line = self.lock();
            line.closed = true;
            std::mem::take(&mut line.waiting)
        };
        // Outside of the lock: dropping a request wakes its caller.
        drop(waiting);
        self.drain();
        #[cfg(not(vfio_uring_loom))]
        drop(self.runner.take());
        #[cfg(vfio_uring_loom)]
        drop(self.runner.take_waker());
    }

    fn drain(&self) {
        while let Some(request) = self.requests.pop() {
            drop(request);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line<T>> {
        // No code under the lock panics midway through a change.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Crossbeam's queue knows nothing of loom.
#[cfg(vfio_uring_loom)]
struct ArrayQueue<T>(Mutex<std::collections::VecDeque<T>>, usize);

#[cfg(vfio_uring_loom)]
impl<T> ArrayQueue<T> {
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(Default::default()), capacity)
    }

    fn push(&self, value: T) -> Result<(), T> {
        let mut list = self.0.lock().unwrap();
        assert!(list.len() < self.1, "there is a place for each permit");
        list.push_back(value);
        Ok(())
    }

    fn pop(&self) -> Option<T> {
        self.0.lock().unwrap().pop_front()
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap().is_empty()
    }
}

#[cfg(all(test, vfio_uring_loom))]
mod loom_tests {
    use std::task::Poll;

    use loom::{future::block_on, sync::Arc, thread};

    use super::*;

    /// A request that counts its end.
    struct Request(Arc<AtomicUsize>);

    impl Drop for Request {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn model(body: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(body);
    }

    /// Runs until the callers are gone; each command takes a wake, which another thread sends.
    async fn run(gate: Arc<Gate<Request>>) -> usize {
        let (mut done, mut active) = (0, None);
        std::future::poll_fn(move |cx| {
            let mut woken = false;
            gate.take_woken(|index| woken |= index == 0);
            if woken && active.take().is_some() {
                done += 1;
                gate.done();
            }
            if active.is_none()
                && let Some(request) = gate.next()
            {
                active = Some(request);
                gate.wake(0);
            }
            match gate.rest(cx.waker()) {
                Rest::Deserted if active.is_none() => return Poll::Ready(done),
                Rest::Busy => cx.waker().wake_by_ref(),
                _ => {}
            }
            Poll::Pending
        })
        .await
    }

    /// One permit, two callers on threads of their own: one may have to wait in the line, the runner may sleep at any point. Every
    /// request is run, and all permits are back.
    #[test]
    fn no_request_is_lost() {
        model(|| {
            let gate = Arc::new(Gate::new(1));
            let (ends, left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(2)));
            let callers: Vec<_> = (0..2)
                .map(|_| {
                    let (gate, ends, left) = (gate.clone(), ends.clone(), left.clone());
                    thread::spawn(move || {
                        gate.enter(Request(ends));
                        if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                            gate.desert();
                        }
                    })
                })
                .collect();
            assert_eq!(block_on(run(gate.clone())), 2);
            callers.into_iter().for_each(|caller| caller.join().unwrap());
            assert_eq!((ends.load(Ordering::Acquire), gate.free()), (2, 1));
        });
    }

    /// A caller leaves the line while the runner gives the permit on: the request is run or comes back, and the permit is free.
    #[test]
    fn a_permit_outlives_who_leaves_the_line() {
        model(|| {
            let gate = Arc::new(Gate::new(1));
            let ends = Arc::new(AtomicUsize::new(0));
            assert!(gate.enter(Request(ends.clone())).is_none());
            let caller = {
                let (gate, ends) = (gate.clone(), ends.clone());
                thread::spawn(move || gate.enter(Request(ends)).is_some_and(|ticket| gate.leave(ticket).is_some()))
            };
            drop(gate.next());
            gate.done();
            let left = caller.join().unwrap();
            if !left {
                drop(gate.next().expect("it has the permit"));
                gate.done();
            }
            assert!(gate.next().is_none());
            assert_eq!((ends.load(Ordering::Acquire), gate.free()), (2, 1));
        });
    }

    /// The runner goes while callers enter, with a permit or into the line: each request is dropped, which is its answer.
    #[test]
    fn nobody_waits_for_a_runner_that_is_gone() {
        model(|| {
            let gate = Arc::new(Gate::new(1));
            let ends = Arc::new(AtomicUsize::new(0));
            let callers: Vec<_> = (0..2)
                .map(|_| {
                    let (gate, ends) = (gate.clone(), ends.clone());
                    thread::spawn(move || drop(gate.enter(Request(ends))))
                })
                .collect();
            gate.close();
            callers.into_iter().for_each(|caller| caller.join().unwrap());
            assert_eq!(ends.load(Ordering::Acquire), 2);
        });
    }

    /// Two foreign wakes of commands while the runner goes to sleep: both are seen.
    #[test]
    fn no_wake_is_lost() {
        model(|| {
            let gate = Arc::new(Gate::<Request>::new(2));
            let wakers: Vec<_> = (0..2)
                .map(|index| {
                    let gate = gate.clone();
                    thread::spawn(move || gate.wake(index))
                })
                .collect();
            let mut seen = 0;
            block_on(std::future::poll_fn(|cx| {
                gate.take_woken(|_| seen += 1);
                if seen == 2 {
                    return Poll::Ready(());
                }
                if gate.rest(cx.waker()) == Rest::Busy {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }));
            wakers.into_iter().for_each(|waker| waker.join().unwrap());
        });
    }
}
