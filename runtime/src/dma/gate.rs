//! Many that map and unmap, or one that joins: a device that joins a space sees all of its mappings, and none that changes.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};

/// Held open by those who change mappings; closed by the device that joins. One device at a time may close it.
#[derive(Debug, Default)]
pub(super) struct Gate {
    inside: Cell<usize>,
    closed: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl Gate {
    /// Waits while the gate is closed. Nobody may enter twice: it would wait for itself.
    pub(super) async fn enter(&self) -> Inside<'_> {
        poll_fn(|cx| match self.closed.get() {
            false => Poll::Ready(()),
            true => self.wait(cx.waker()),
        })
        .await;
        self.inside.set(self.inside.get() + 1);
        Inside(self)
    }

    /// Lets nobody in any more, and waits for those who are.
    pub(super) async fn close(&self) -> Closed<'_> {
        self.closed.set(true);
        let closed = Closed(self);
        poll_fn(|cx| match self.inside.get() {
            0 => Poll::Ready(()),
            _ => self.wait(cx.waker()),
        })
        .await;
        closed
    }

    fn wait(&self, waker: &Waker) -> Poll<()> {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|known| known.will_wake(waker)) {
            waiting.push(waker.clone());
        }
        Poll::Pending
    }

    fn wake(&self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }
}

#[must_use]
pub(super) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get() - 1);
        if self.0.inside.get() == 0 {
            self.0.wake();
        }
    }
}

#[must_use]
pub(super) struct Closed<'a>(&'a Gate);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    #[test]
    fn many_or_one() {
        let gate = Gate::default();
        let (one, two) = (gate.enter().now_or_never().unwrap(), gate.enter().now_or_never().unwrap());
        let mut close = pin!(gate.close());
        assert!(close.as_mut().now_or_never().is_none());
        assert!(gate.enter().now_or_never().is_none(), "it has been closed");
        drop((one, two));
        let closed = close.now_or_never().unwrap();
        assert!(gate.enter().now_or_never().is_none());
        drop(closed);
        let inside = gate.enter().now_or_never().unwrap();
        // Given up, it is open again.
        assert!(gate.close().now_or_never().is_none());
        assert!(gate.enter().now_or_never().is_some());
        drop(inside);
    }
}
