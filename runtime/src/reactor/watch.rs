//! Watching a descriptor, an interrupt's eventfd above all: by a multishot poll on the ring or, where the reactor is a guest, by the
//! host's own event loop.

#[cfg(feature = "tokio")]
use std::task::ready;
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use io_uring::{opcode, types};
#[cfg(feature = "tokio")]
use tokio::io::unix::AsyncFd;

use super::{
    Local, current,
    ring::{Multi, OpId, Owned},
    task::{TaskRef, with_waker},
};

/// Events of a descriptor: an item each time that some came since the last one. See [`poll_multishot`].
pub struct MultishotPoll {
    local: Rc<Local>,
    fd: Arc<OwnedFd>,
    events: u32,
    way: Way,
}

enum Way {
    /// Nobody watches yet.
    Unarmed,
    Ring(OpId),
    /// A ring in the host's event loop would cost half as much again as the descriptor itself there.
    #[cfg(feature = "tokio")]
    Host(AsyncFd<Arc<OwnedFd>>),
}

/// Watches `fd` with one multishot POLL_ADD: an item is the poll(2) events since the last item, and means "look at the
/// object". It is edge-like: what was there before is reported once, and nothing need be read to hear of what comes later.
/// The kernel may end it (its completion queue was full, say); it is armed again by itself.
///
/// As a guest of tokio, a watch for POLLIN alone is taken to tokio's own event loop instead, as an `AsyncFd`.
///
/// # Panics
/// Outside of a reactor.
pub fn poll_multishot(fd: &Arc<OwnedFd>, events: u32) -> MultishotPoll {
    MultishotPoll { local: current("a multishot poll"), fd: fd.clone(), events, way: Way::Unarmed }
}

impl MultishotPoll {
    /// Has the reactor wake up from its sleep at the next event, with no task to wake: for [`Poller::standby`]. `Ready` when there
    /// was one since the last look.
    ///
    /// # Errors
    /// That of the kernel; a later call arms it anew.
    ///
    /// [`Poller::standby`]: super::Poller::standby
    pub fn poll_idle(&mut self) -> Poll<io::Result<u32>> {
        let nobody = self.local.nobody;
        with_waker(nobody, |cx| self.poll_event(cx))
    }

    fn arm(&self) -> Way {
        #[cfg(feature = "tokio")]
        if self.local.is_guest() && self.events == libc::POLLIN as u32 {
            // SAFETY: an owned descriptor is the same and open for as long as it lives.
            let fd = unsafe { AsyncFd::register_with_interest(self.fd.clone(), tokio::io::Interest::READABLE) };
            // A descriptor that epoll does not take, or has already, is watched by the ring.
            if let Ok(fd) = fd {
                return Way::Host(fd);
            }
        }
        let target = types::Fd(self.fd.as_raw_fd());
        let entry = |_: &mut Owned| opcode::PollAdd::new(target, self.events).multi(true).build();
        // SAFETY: a poll points to nothing.
        Way::Ring(unsafe { self.local.ring.borrow_mut().start(Some(self.fd.clone()), Owned::Nothing, true, entry) })
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<u32>> {
        loop {
            match &self.way {
                Way::Unarmed => self.way = self.arm(),
                Way::Ring(id) => match self.local.ring.borrow_mut().look(*id, TaskRef::current(cx)) {
                    Multi::Events(events) => return Poll::Ready(Ok(events)),
                    Multi::Nothing => return Poll::Pending,
                    Multi::Ended(result) => {
                        self.way = Way::Unarmed;
                        if result < 0 {
                            return Poll::Ready(Err(io::Error::from_raw_os_error(-result)));
                        }
                    }
                },
                #[cfg(feature = "tokio")]
                Way::Host(fd) => {
                    ready!(fd.poll_read_ready(cx))?.clear_ready();
                    return Poll::Ready(Ok(self.events));
                }
            }
        }
    }
}

impl Stream for MultishotPoll {
    type Item = io::Result<u32>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_event(cx).map(Some)
    }
}

impl Drop for MultishotPoll {
    fn drop(&mut self) {
        if let Way::Ring(id) = self.way {
            self.local.ring.borrow_mut().orphan(id);
        }
    }
}
