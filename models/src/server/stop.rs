//! A request to stop, from any thread.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};

/// Asks a server to stop. Clones ask the same server.
#[derive(Debug, Clone)]
pub struct Stop(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    set: AtomicBool,
    wake: OwnedFd,
}

impl Stop {
    /// Nothing asked yet.
    ///
    /// # Errors
    /// When no eventfd is to be had.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inner { set: AtomicBool::new(false), wake })))
    }

    /// Asks the server to stop; it does so within milliseconds.
    pub fn stop(&self) {
        self.0.set.store(true, Ordering::Release);
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// Whether the server was asked.
    pub fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Acquire)
    }

    /// Readable once the server was asked.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}
