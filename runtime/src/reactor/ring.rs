//! The ring and its op slots.
//!
//! A slot owns what the kernel may touch (buffer, descriptor, message header) until the completion. Dropping an op's future
//! cancels the op and orphans the slot; what it owns is dropped when the completion arrives, not before.

use std::{cell::RefCell, io, mem, os::fd::AsRawFd, os::fd::OwnedFd, sync::Arc, time::Duration};

use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;

#[cfg(feature = "tokio")]
mod alarm;

use super::{message::Message, task::TaskRef};
use crate::{Error, Result};

/// User data of a cancel request: nobody waits for it.
const CANCEL: u64 = u64::MAX;
/// User data of the poll on the core's eventfd.
const WAKE: u64 = u64::MAX - 1;

/// What an op owns while the kernel may touch it.
#[derive(Debug)]
pub(crate) enum Owned {
    Nothing,
    Buffer(Vec<u8>),
    Counter(Box<u64>),
    Message(Box<Message>),
}

#[derive(Debug)]
enum State {
    /// One completion is to come.
    Pending(TaskRef),
    /// It came.
    Done(i32),
    /// Completions come until one without MORE; the union of the poll events since the last look.
    Multi { events: u32, waker: TaskRef, end: Option<i32> },
    /// The future is gone.
    Orphaned,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
    owned: Owned,
    _fd: Option<Arc<OwnedFd>>,
}

impl Slot {
    /// Ends an op that nobody waits for: descriptors that a receive brought in are closed.
    fn discard(self, result: i32) {
        if let Owned::Message(mut message) = self.owned
            && result >= 0
        {
            drop(message.received(result as usize));
        }
    }
}

/// Names a slot's op: the generation tells a late completion from the slot's next op.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpId {
    index: u32,
    generation: u32,
}

impl OpId {
    fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }
}

/// The outcome of a look at a multishot op.
pub(crate) enum Multi {
    Events(u32),
    Ended(i32),
    Nothing,
}

/// Who enters the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A reactor, which sleeps in it.
    Reactor,
    /// A guest: the ring's descriptor is in the host's event loop. One with DEFER_TASKRUN would never wake that.
    #[cfg(feature = "tokio")]
    Guest,
}

pub(crate) struct Ring {
    ring: IoUring,
    slots: Slab<Slot>,
    generation: u32,
    #[cfg(feature = "tokio")]
    owner: Owner,
    wake_fd: i32,
    #[cfg(feature = "tokio")]
    alarm: alarm::Alarm,
}

impl Ring {
    /// Sets a ring up with the best flags that the kernel takes: DEFER_TASKRUN needs 6.1, COOP_TASKRUN 5.19, EXT_ARG and
    /// multishot poll 5.13.
    pub(crate) fn new(entries: u32, owner: Owner, wake_fd: &OwnedFd) -> Result<Self> {
        let plain = || IoUring::builder().setup_clamp().build(entries);
        let ring = match owner {
            Owner::Reactor => IoUring::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_clamp()
                .build(entries)
                .or_else(|_| IoUring::builder().setup_coop_taskrun().setup_taskrun_flag().setup_clamp().build(entries))
                .or_else(|_| plain()),
            #[cfg(feature = "tokio")]
            Owner::Guest => plain(),
        };
        let ring = ring.map_err(|source| Error::NoIoUring { source: Arc::new(source) })?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            let source = io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old");
            return Err(Error::NoIoUring { source: Arc::new(source) });
        }
        let mut this = Self {
            ring,
            slots: Slab::new(),
            generation: 0,
            #[cfg(feature = "tokio")]
            owner,
            wake_fd: wake_fd.as_raw_fd(),
            #[cfg(feature = "tokio")]
            alarm: alarm::Alarm::default(),
        };
        if owner == Owner::Reactor {
            this.arm_wake();
        }
        Ok(this)
    }

    fn arm_wake(&mut self) {
        let entry = opcode::PollAdd::new(types::Fd(self.wake_fd), libc::POLLIN as u32).multi(true).build().user_data(WAKE);
        // SAFETY: a poll touches no memory, and the core's eventfd lives for ever.
        unsafe { self.push(&entry) };
    }

    /// Queues an SQE, submitting when the queue is full.
    ///
    /// # Safety
    /// What the entry points to stays valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The kernel takes the entries even when it reports that completions have to be reaped first.
            if self.ring.submit().is_err() {
                self.reap();
            }
        }
    }

    /// Starts an op. `entry` gives the SQE for what the slot now owns.
    ///
    /// # Safety
    /// The entry points only to what `owned` owns on the heap, and uses the descriptor `fd`.
    pub(crate) unsafe fn start(
        &mut self,
        fd: Option<Arc<OwnedFd>>,
        owned: Owned,
        multi: bool,
        entry: impl FnOnce(&mut Owned) -> squeue::Entry,
    ) -> OpId {
        self.generation = self.generation.wrapping_add(1) & 0x7fff_ffff;
        let generation = self.generation;
        let state = match multi {
            true => State::Multi { events: 0, waker: TaskRef::none(), end: None },
            false => State::Pending(TaskRef::none()),
        };
        let index = self.slots.insert(Slot { generation, state, owned, _fd: fd });
        let id = OpId { index: index as u32, generation };
        let entry = entry(&mut self.slots[index].owned).user_data(id.user_data());
        // SAFETY: the slot owns what the entry points to until the completion, by the caller's promise.
        unsafe { self.push(&entry) };
        id
    }

    /// Takes the result of a one-shot op, or notes who waits for it.
    pub(crate) fn take(&mut self, id: OpId, waiter: TaskRef) -> Option<(i32, Owned)> {
        let slot = &mut self.slots[id.index as usize];
        match slot.state {
            State::Done(result) => {
                let slot = self.slots.remove(id.index as usize);
                Some((result, slot.owned))
            }
            _ => {
                slot.state = State::Pending(waiter);
                None
            }
        }
    }

    /// Looks at a multishot op; after [`Multi::Ended`] its slot is gone.
    pub(crate) fn look(&mut self, id: OpId, waiter: TaskRef) -> Multi {
        let slot = &mut self.slots[id.index as usize];
        let State::Multi { events, waker, end } = &mut slot.state else { return Multi::Nothing };
        if *events != 0 {
            return Multi::Events(mem::take(events));
        }
        match *end {
            Some(result) => {
                self.slots.remove(id.index as usize);
                Multi::Ended(result)
            }
            None => {
                *waker = waiter;
                Multi::Nothing
            }
        }
    }

    /// The future of `id` is gone: cancels the op; its slot keeps what it owns until the kernel is done with it.
    pub(crate) fn orphan(&mut self, id: OpId) {
        let slot = &mut self.slots[id.index as usize];
        if let State::Done(result) | State::Multi { end: Some(result), .. } = slot.state {
            self.slots.remove(id.index as usize).discard(result);
            return;
        }
        slot.state = State::Orphaned;
        let cancel = opcode::AsyncCancel::new(id.user_data()).build().user_data(CANCEL);
        // SAFETY: a cancel points to nothing.
        unsafe { self.push(&cancel) };
    }

    /// Takes what has completed, and wakes who waits for it. Number of completions.
    pub(crate) fn reap(&mut self) -> usize {
        let mut count = 0;
        let mut rearm = false;
        for cqe in self.ring.completion() {
            count += 1;
            let more = io_uring::cqueue::more(cqe.flags());
            match cqe.user_data() {
                CANCEL => {}
                #[cfg(feature = "tokio")]
                alarm::ALARM => self.alarm.rang(),
                WAKE => rearm |= !more,
                data => complete(&mut self.slots, data, cqe.result(), more),
            }
        }
        if rearm {
            self.arm_wake();
        }
        count
    }

    /// Whether an `enter` or a reap would get anything done.
    #[inline]
    pub(crate) fn wants_service(&mut self) -> bool {
        self.wants_enter() || !self.ring.completion().is_empty()
    }

    #[inline]
    fn wants_enter(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow() || !submission.is_empty()
    }

    /// Submits, lets the kernel run its deferred work, and reaps, without waiting.
    pub(crate) fn turn(&mut self) -> Result<usize> {
        if self.wants_enter() {
            self.enter(None)?;
        }
        Ok(self.reap())
    }

    /// Submits and waits for a completion, at most `limit` (`None`: as long as it takes), then reaps.
    pub(crate) fn park(&mut self, limit: Option<Duration>) -> Result<usize> {
        self.enter(Some(limit))?;
        Ok(self.reap())
    }

    fn enter(&mut self, wait: Option<Option<Duration>>) -> Result<()> {
        let result = match wait {
            None => self.ring.submit(),
            Some(None) => self.ring.submit_and_wait(1),
            Some(Some(limit)) => {
                let limit = types::Timespec::from(limit);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
            }
        };
        match result.map_err(|e| (e.raw_os_error(), e)) {
            // Time is up, a signal came, or completions have to be reaped before more is taken: the caller reaps and goes on.
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => Ok(()),
            Err((_, e)) => Err(Error::io("io_uring_enter", e)),
        }
    }

    fn cancel_all(&mut self) {
        let pending: Vec<OpId> = self
            .slots
            .iter()
            .filter(|(_, slot)| !matches!(slot.state, State::Done(_) | State::Multi { end: Some(_), .. }))
            .map(|(index, slot)| OpId { index: index as u32, generation: slot.generation })
            .collect();
        for id in pending {
            self.orphan(id);
        }
    }
}

fn complete(slots: &mut Slab<Slot>, data: u64, result: i32, more: bool) {
    let index = data as u32 as usize;
    let Some(slot) = slots.get_mut(index).filter(|slot| slot.generation == (data >> 32) as u32) else { return };
    match &mut slot.state {
        State::Pending(waker) => {
            let mut waker = mem::take(waker);
            slot.state = State::Done(result);
            waker.wake();
        }
        State::Multi { events, waker, end } => {
            if result >= 0 {
                *events |= result as u32;
            }
            if !more {
                *end = Some(result);
            }
            waker.wake();
        }
        State::Orphaned if !more => slots.remove(index).discard(result),
        State::Orphaned | State::Done(_) => {}
    }
}

#[cfg(feature = "tokio")]
impl Ring {
    pub(crate) fn is_guest(&self) -> bool {
        self.owner == Owner::Guest
    }

    /// Another descriptor of the ring, for the host's event loop.
    pub(crate) fn duplicate_fd(&self) -> Result<OwnedFd> {
        // SAFETY: the descriptor is open for as long as the ring.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|error| Error::io("duplicating the ring's descriptor", error))
    }

    /// Makes the ring's descriptor ready at once.
    pub(crate) fn ring_bell(&mut self) -> Result<()> {
        // SAFETY: a NOP points to nothing.
        unsafe { self.push(&opcode::Nop::new().build().user_data(CANCEL)) };
        self.enter(None)
    }
}

impl Drop for Ring {
    /// Closing a ring cancels its ops, but in the background: what the kernel may still touch has to outlive that.
    fn drop(&mut self) {
        self.cancel_all();
        for _ in 0..100 {
            self.slots.retain(|_, slot| matches!(slot.state, State::Orphaned));
            if self.slots.is_empty() {
                return;
            }
            if self.park(Some(Duration::from_millis(10))).is_err() {
                break;
            }
        }
        let left = mem::take(&mut self.slots);
        tracing::warn!(ops = left.len(), "the kernel holds on to operations of a closed reactor: their buffers are leaked");
        mem::forget(left);
    }
}

/// A ring that ops and the reactor share on one thread.
pub(crate) type SharedRing = RefCell<Ring>;
