//! The line of those who wait for a slot of a queue: first come, first served.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    task::{Context, Poll},
};

use vfio_uring::reactor::TaskRef;

/// Who waits for a slot. A slot that becomes free is given to the first; while anybody waits, none is free.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Whether anybody waits who was given nothing: looked at instead of the list on the hot path.
    contended: Cell<bool>,
    /// The queue has ended: no slot is free any more.
    closed: Cell<bool>,
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
    given: Option<u16>,
    task: TaskRef,
}

/// A place in the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

impl Line {
    /// Joins the line, or looks whether a slot was given to the place in it.
    pub(crate) fn poll(&self, ticket: &mut Option<Ticket>, cx: &Context<'_>) -> Poll<u16> {
        let mut waiting = self.waiting.borrow_mut();
        let Some(Ticket(number)) = *ticket else {
            waiting.next += 1;
            let number = waiting.next;
            *ticket = Some(Ticket(number));
            waiting.list.push_back(Waiter { ticket: number, given: None, task: TaskRef::current(cx) });
            self.contended.set(true);
            return Poll::Pending;
        };
        let Some(at) = waiting.list.iter().position(|waiter| waiter.ticket == number) else { return Poll::Pending };
        match waiting.list[at].given {
            Some(slot) => {
                waiting.list.remove(at);
                *ticket = None;
                Poll::Ready(slot)
            }
            None => {
                waiting.list[at].task = TaskRef::current(cx);
                Poll::Pending
            }
        }
    }

    /// Leaves the line; gives back a slot that was given meanwhile.
    #[must_use]
    pub(crate) fn leave(&self, ticket: Ticket) -> Option<u16> {
        let mut waiting = self.waiting.borrow_mut();
        let at = waiting.list.iter().position(|waiter| waiter.ticket == ticket.0)?;
        let left = waiting.list.remove(at)?;
        self.set_contended(waiting.list.iter().any(|waiter| waiter.given.is_none()));
        left.given
    }

    fn set_contended(&self, contended: bool) {
        self.contended.set(contended || self.closed.get());
    }

    /// Whether a slot that becomes free is to be given to somebody, or kept back.
    #[inline]
    pub(crate) fn is_contended(&self) -> bool {
        self.contended.get()
    }

    /// Gives a slot to the first who has none; keeps it back once the line is closed.
    #[cold]
    pub(crate) fn give(&self, slot: u16) {
        if self.closed.get() {
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        let mut without = waiting.list.iter_mut().filter(|waiter| waiter.given.is_none());
        if let Some(first) = without.next() {
            first.given = Some(slot);
            first.task.wake();
        }
        let more = without.next().is_some();
        self.set_contended(more);
    }

    /// The queue has ended: no slot is given any more, and all who wait are woken to see it.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.contended.set(true);
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
        let line = Line::default();
        let (mut a, mut b, mut c) = (None, None, None);
        for ticket in [&mut a, &mut b, &mut c] {
            assert!(line.poll(ticket, &cx).is_pending());
        }
        line.give(7);
        assert!(line.is_contended());
        assert!(line.poll(&mut b, &cx).is_pending());
        assert_eq!(line.leave(a.unwrap()), Some(7), "what was given to who left goes back");
        line.give(7);
        assert_eq!(line.poll(&mut b, &cx), Poll::Ready(7));
        assert!(line.is_contended());
        line.give(8);
        assert!(!line.is_contended());
        assert_eq!(line.poll(&mut c, &cx), Poll::Ready(8));
    }
}
