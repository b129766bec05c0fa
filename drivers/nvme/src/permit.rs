//! Permits for the slots of a queue: taken at once or waited for in order.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    task::{Context, Poll},
};

use vfio_uring::reactor::TaskRef;

/// A counting semaphore for one thread, first come first served.
#[derive(Debug)]
pub(crate) struct Permits {
    free: Cell<usize>,
    /// Whether anybody waits: looked at instead of the list on the hot path.
    contended: Cell<bool>,
    waiting: RefCell<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    list: VecDeque<Waiter>,
    next: u64,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    granted: bool,
    task: TaskRef,
}

/// A place in the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

impl Permits {
    pub(crate) fn new(count: usize) -> Self {
        Self { free: Cell::new(count), contended: Cell::new(false), waiting: RefCell::default() }
    }

    /// Takes a permit if one is free and nobody waits for it.
    #[inline]
    pub(crate) fn try_take(&self) -> bool {
        let free = self.free.get();
        if free == 0 || self.contended.get() {
            return false;
        }
        self.free.set(free - 1);
        true
    }

    /// Takes a permit, or takes or keeps a place in the line.
    pub(crate) fn poll_take(&self, ticket: &mut Option<Ticket>, cx: &Context<'_>) -> Poll<()> {
        if ticket.is_none() && self.try_take() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        match *ticket {
            None => {
                waiting.next += 1;
                let number = waiting.next;
                *ticket = Some(Ticket(number));
                waiting.list.push_back(Waiter { ticket: number, granted: false, task: TaskRef::current(cx) });
                self.contended.set(true);
                Poll::Pending
            }
            Some(Ticket(number)) => {
                let Some(at) = waiting.list.iter().position(|waiter| waiter.ticket == number) else { return Poll::Pending };
                if waiting.list[at].granted {
                    waiting.list.remove(at);
                    self.contended.set(!waiting.list.is_empty());
                    *ticket = None;
                    return Poll::Ready(());
                }
                waiting.list[at].task = TaskRef::current(cx);
                Poll::Pending
            }
        }
    }

    /// Leaves the line; a permit that was granted meanwhile goes to the next.
    pub(crate) fn leave(&self, ticket: Ticket) {
        let mut waiting = self.waiting.borrow_mut();
        let Some(at) = waiting.list.iter().position(|waiter| waiter.ticket == ticket.0) else { return };
        let granted = waiting.list.remove(at).is_some_and(|waiter| waiter.granted);
        self.contended.set(!waiting.list.is_empty());
        drop(waiting);
        if granted {
            self.give_back();
        }
    }

    /// Gives a permit back, to the first in the line if there is one.
    #[inline]
    pub(crate) fn give_back(&self) {
        if self.contended.get() && self.grant() {
            return;
        }
        self.free.set(self.free.get() + 1);
    }

    fn grant(&self) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        let Some(waiter) = waiting.list.iter_mut().find(|waiter| !waiter.granted) else { return false };
        waiter.granted = true;
        waiter.task.wake();
        true
    }

    /// Wakes all who wait: the queue has ended, and each is to see it.
    pub(crate) fn wake_all(&self) {
        self.waiting.borrow_mut().list.iter_mut().for_each(|waiter| waiter.task.wake());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn first_come_first_served() {
        let cx = Context::from_waker(Waker::noop());
        let permits = Permits::new(1);
        assert!(permits.try_take() && !permits.try_take());
        let (mut a, mut b, mut c) = (None, None, None);
        assert!(permits.poll_take(&mut a, &cx).is_pending());
        assert!(permits.poll_take(&mut b, &cx).is_pending());
        permits.give_back();
        assert!(!permits.try_take(), "a newcomer does not overtake");
        assert!(permits.poll_take(&mut c, &cx).is_pending());
        assert!(permits.poll_take(&mut b, &cx).is_pending());
        permits.leave(a.unwrap());
        assert!(permits.poll_take(&mut b, &cx).is_ready(), "the permit of who left goes on");
        permits.give_back();
        assert!(permits.poll_take(&mut c, &cx).is_ready());
        permits.give_back();
        assert!(permits.try_take());
    }
}
