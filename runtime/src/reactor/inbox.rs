//! Wakes from other threads: an intrusive lock-free stack, and the protocol by which a sleeping reactor hears of them.
//!
//! Nodes live for ever (see [`super::task`]), so a push needs no reference count and can't find a freed node.

#[cfg(vfio_uring_loom)]
use loom::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::ptr;
#[cfg(not(vfio_uring_loom))]
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// A task's place in the inbox.
#[derive(Debug)]
pub(crate) struct Node {
    next: AtomicPtr<Node>,
    queued: AtomicBool,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self { next: AtomicPtr::new(ptr::null_mut()), queued: AtomicBool::new(false) }
    }
}

/// Pushed to from any thread, drained by one.
#[derive(Debug)]
pub(crate) struct Inbox {
    head: AtomicPtr<Node>,
    asleep: AtomicBool,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()), asleep: AtomicBool::new(false) }
    }

    /// Queues `node` unless it is queued already. True: the owner sleeps and the caller has to wake it.
    pub(crate) fn push(&self, node: &'static Node) -> bool {
        // A node that is queued already is drained after this swap, and the drain's swap sees what the caller wrote before.
        if node.queued.swap(true, Ordering::AcqRel) {
            return false;
        }
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            node.next.store(head, Ordering::Relaxed);
            let new = ptr::from_ref(node).cast_mut();
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        // Pairs with `prepare_sleep`: of the two exchanges of `head` one is first, so that either the owner sees the node there,
        // or this thread sees `asleep` here.
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel)
    }

    /// Whether there may be something to drain.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// Announces sleep. False: something came in, don't sleep.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.asleep.swap(true, Ordering::AcqRel);
        let null = ptr::null_mut();
        let empty = self.head.compare_exchange(null, null, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if !empty {
            self.asleep.swap(false, Ordering::AcqRel);
        }
        empty
    }

    /// Ends what [`Inbox::prepare_sleep`] announced.
    pub(crate) fn finish_sleep(&self) {
        self.asleep.swap(false, Ordering::AcqRel);
    }

    /// Takes every queued node; a node may be pushed again as soon as `each` gets it.
    pub(crate) fn drain(&self, mut each: impl FnMut(&'static Node)) {
        let mut at = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        while !at.is_null() {
            // SAFETY: only `&'static Node` are pushed.
            let node: &'static Node = unsafe { &*at };
            at = node.next.load(Ordering::Relaxed);
            node.queued.swap(false, Ordering::AcqRel);
            each(node);
        }
    }
}

#[cfg(all(test, vfio_uring_loom))]
mod loom_tests {
    use super::*;
    use loom::sync::{Arc, atomic::AtomicUsize};

    struct Sleeper {
        inbox: Inbox,
        event: loom::sync::Mutex<bool>,
        signal: loom::sync::Condvar,
        data: AtomicUsize,
    }

    impl Sleeper {
        fn wake(&self, node: &'static Node) {
            self.data.fetch_add(1, Ordering::Relaxed);
            if self.inbox.push(node) {
                *self.event.lock().unwrap() = true;
                self.signal.notify_one();
            }
        }
    }

    /// Two threads wake the same and different tasks while the owner goes to sleep: no wake is lost, nothing deadlocks.
    #[test]
    fn no_wake_is_lost() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let nodes: &'static [Node; 2] = Box::leak(Box::new([Node::new(), Node::new()]));
            let sleeper = Arc::new(Sleeper {
                inbox: Inbox::new(),
                event: loom::sync::Mutex::new(false),
                signal: loom::sync::Condvar::new(),
                data: AtomicUsize::new(0),
            });
            let threads: Vec<_> = (0..2)
                .map(|i| {
                    let sleeper = sleeper.clone();
                    loom::thread::spawn(move || sleeper.wake(&nodes[i % 2]))
                })
                .collect();
            let mut seen = 0;
            while seen < 2 {
                if sleeper.inbox.prepare_sleep() {
                    let mut event = sleeper.event.lock().unwrap();
                    while !*event {
                        event = sleeper.signal.wait(event).unwrap();
                    }
                    *event = false;
                    drop(event);
                    sleeper.inbox.finish_sleep();
                }
                sleeper.inbox.drain(|_| {});
                seen = sleeper.data.load(Ordering::Relaxed);
            }
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    /// A second wake of a queued node is seen by the poll that the first one causes, or queues the node again.
    #[test]
    fn a_wake_during_the_drain_is_seen() {
        loom::model(|| {
            let node: &'static Node = Box::leak(Box::new(Node::new()));
            let shared = Arc::new((Inbox::new(), AtomicUsize::new(0)));
            let other = {
                let shared = shared.clone();
                loom::thread::spawn(move || {
                    shared.1.store(1, Ordering::Relaxed);
                    shared.0.push(node);
                    shared.1.store(2, Ordering::Relaxed);
                    shared.0.push(node);
                })
            };
            let mut last = 0;
            while last != 2 {
                shared.0.drain(|_| last = shared.1.load(Ordering::Relaxed));
                loom::thread::yield_now();
            }
            other.join().unwrap();
        });
    }
}
