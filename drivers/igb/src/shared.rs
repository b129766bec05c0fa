//! What a NIC and its queues share over threads: whether it is up, and memory that nobody may free yet.

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures::task::AtomicWaker;
use vfio_uring::{device::Posted, dma::DmaRing, mmio::Register, reactor::timeout};

use crate::{Error, packet::Node};

/// What became of the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub(crate) enum State {
    Up,
    /// Queues are to leave it alone; it may still write memory.
    Ended,
    /// It is proven to use no memory of its queues any more.
    Quiesced,
}

/// What a NIC knows of a queue pair.
#[derive(Default)]
struct Seat {
    waker: AtomicWaker,
    /// The pair rings no doorbells any more.
    left: AtomicBool,
}

pub(crate) struct Shared {
    state: AtomicU8,
    cause: Mutex<Option<Error>>,
    seats: Box<[Seat]>,
    /// The NIC waits for queues to leave.
    nic: AtomicWaker,
    /// Of queues that were dropped before the NIC was stopped.
    graveyard: Mutex<Vec<Remains>>,
}

/// Memory that the NIC may still use: given up when dropped, unless it is released.
pub(crate) struct Remains {
    pub(crate) ring: DmaRing<[u64; 2]>,
    pub(crate) nodes: Vec<Box<Node>>,
}

impl Remains {
    /// The NIC is proven not to use it any more.
    pub(crate) fn release(mut self) {
        self.ring.shared().release();
        self.nodes.drain(..).for_each(crate::pool::give);
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        self.nodes.drain(..).for_each(|node| node.dma.quarantine());
    }
}

impl Shared {
    pub(crate) fn new(seats: usize) -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(State::Up as u8),
            cause: Mutex::default(),
            seats: (0..seats).map(|_| Seat::default()).collect(),
            nic: AtomicWaker::new(),
            graveyard: Mutex::default(),
        })
    }

    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            0 => State::Up,
            1 => State::Ended,
            _ => State::Quiesced,
        }
    }

    pub(crate) fn cause(&self) -> Error {
        lock(&self.cause).clone().unwrap_or(Error::Stopped)
    }

    /// Has all queues end.
    pub(crate) fn end(&self, cause: Error) {
        lock(&self.cause).get_or_insert(cause);
        self.state.fetch_max(State::Ended as u8, Ordering::SeqCst);
        self.wake();
    }

    /// The NIC uses no memory of its queues any more.
    pub(crate) fn quiesce(&self) {
        let remains = {
            let mut graveyard = lock(&self.graveyard);
            self.state.store(State::Quiesced as u8, Ordering::SeqCst);
            std::mem::take(&mut *graveyard)
        };
        remains.into_iter().for_each(Remains::release);
        self.wake();
    }

    /// Takes over the memory of a queue that goes.
    pub(crate) fn bury(&self, remains: Remains) {
        let mut graveyard = lock(&self.graveyard);
        if self.state() == State::Quiesced {
            drop(graveyard);
            return remains.release();
        }
        graveyard.push(remains);
    }

    fn wake(&self) {
        self.seats.iter().for_each(|seat| seat.waker.wake());
    }

    /// Waits for another state than `than`; for the one task of a queue pair.
    pub(crate) async fn changed(&self, seat: usize, than: State) -> State {
        poll_fn(|cx| {
            let state = self.state();
            if state != than {
                return Poll::Ready(state);
            }
            if let Some(seat) = self.seats.get(seat) {
                seat.waker.register(cx.waker());
            }
            let state = self.state();
            if state != than { Poll::Ready(state) } else { Poll::Pending }
        })
        .await
    }

    /// A queue pair rings no doorbells any more.
    pub(crate) fn leave(&self, seat: usize) {
        if let Some(seat) = self.seats.get(seat) {
            seat.left.store(true, Ordering::SeqCst);
        }
        self.nic.wake();
    }

    /// Waits until all queue pairs have left; the first that has not.
    pub(crate) async fn all_left(&self, within: Duration) -> Result<(), usize> {
        let staying = || self.seats.iter().position(|seat| !seat.left.load(Ordering::SeqCst));
        let left = poll_fn(|cx| {
            self.nic.register(cx.waker());
            if staying().is_none() { Poll::Ready(()) } else { Poll::Pending }
        });
        let _ = timeout(within, left).await;
        staying().map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under the locks panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A register that a queue writes, from whatever thread it is on.
pub(crate) enum Doorbell {
    Mapped(Register<u32>),
    /// Not mapped: the NIC's thread writes it.
    Relayed(Arc<Relay>, usize),
}

impl Doorbell {
    #[inline]
    pub(crate) fn write(&self, value: u32) {
        match self {
            Self::Mapped(register) => register.write_after_dma(value),
            Self::Relayed(relay, index) => relay.post(*index, value),
        }
    }
}

/// Registers that are written by messages, for threads that can't send them.
pub(crate) struct Relay {
    /// The newest values, each with [`Relay::NEW`] until it is written.
    values: Box<[AtomicU64]>,
    waker: AtomicWaker,
}

impl Relay {
    const NEW: u64 = 1 << 32;

    pub(crate) fn new(registers: usize) -> Arc<Self> {
        Arc::new(Self { values: (0..registers).map(|_| AtomicU64::new(0)).collect(), waker: AtomicWaker::new() })
    }

    fn post(&self, index: usize, value: u32) {
        if let Some(place) = self.values.get(index) {
            place.store(u64::from(value) | Self::NEW, Ordering::SeqCst);
            self.waker.wake();
        }
    }

    /// Writes what is posted, for ever.
    pub(crate) async fn run(self: Arc<Self>, registers: Vec<Posted<u32>>) {
        poll_fn(|cx| {
            self.waker.register(cx.waker());
            for (value, register) in self.values.iter().zip(&registers) {
                let value = value.swap(0, Ordering::SeqCst);
                if value & Self::NEW != 0 {
                    register.write(value as u32);
                }
                if let Some(error) = register.take_error() {
                    tracing::warn!(%error, "a doorbell of a NIC");
                }
            }
            Poll::Pending
        })
        .await
    }
}
