//! The queue's poller: one doorbell a turn, then the completions; and, now and then, a look at the clock.
//!
//! What the controller writes is copied once and checked. A completion that breaks the rules ends the queue.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use vfio_uring::reactor::{Poller, Standby};

use crate::{
    Error,
    queue::{NONE, Owned, QueuePair, Slot, State, TICKS},
    spec::{CQE_PHASE_OFFSET, Cqe, Status},
};

/// Looks at the queue between two looks at the clock while the reactor spins.
const CLOCK_INTERVAL: u32 = 4096;

impl Poller for QueuePair {
    #[inline]
    fn poll(&self) -> bool {
        self.ring_sq();
        let found = self.drain();
        let looks = self.looks.get().wrapping_add(1);
        self.looks.set(looks);
        if looks.is_multiple_of(CLOCK_INTERVAL) {
            self.look_at_clock(Instant::now());
        }
        found
    }

    fn standby(&self) -> Standby {
        self.ring_cq();
        self.look_at_clock(Instant::now());
        if self.in_flight.get() == 0 || self.dead.get() { Standby::Idle } else { Standby::Polled }
    }
}

impl QueuePair {
    #[inline]
    fn ring_sq(&self) {
        let tail = self.sq_tail.get();
        if tail != self.sq_rung.get() && !self.dead.get() {
            self.sq_rung.set(tail);
            self.sq_doorbell.write(tail);
        }
    }

    fn ring_cq(&self) {
        if self.cq_taken.take() != 0 && !self.dead.get() {
            self.cq_doorbell.write(self.cq_head.get());
        }
    }

    /// Takes the completions that are there.
    #[inline]
    fn drain(&self) -> bool {
        let Some(rings) = &self.rings else { return false };
        let mut head = self.cq_head.get();
        let mut phase = self.phase.get();
        let mut taken = 0;
        // A controller that completes without end has its commands run out, and is found out by that.
        while !self.dead.get() {
            match rings.cq.load_u32(head as usize, CQE_PHASE_OFFSET) {
                Ok(word) if word >> 16 & 1 == phase => {}
                _ => break,
            }
            let Ok(cqe) = rings.cq.get(head as usize) else { break };
            head += 1;
            if head == self.entries {
                head = 0;
                phase ^= 1;
            }
            taken += 1;
            self.complete(&cqe);
        }
        if taken == 0 {
            return false;
        }
        self.cq_head.set(head);
        self.phase.set(phase);
        self.cq_taken.set(self.cq_taken.get() + taken);
        // The queue has room for more than all slots, so the controller need not hear of every batch at once.
        if self.cq_taken.get() * 4 >= self.entries {
            self.ring_cq();
        }
        true
    }

    /// Ends the command that a completion names.
    #[inline]
    fn complete(&self, cqe: &Cqe) {
        let cid = cqe.cid.get();
        let index = cid & self.index_mask;
        let slot = match self.slots.get(usize::from(index)) {
            Some(slot) if slot.cid.get() == cid && slot.state.get().in_flight() => slot,
            _ => return self.break_rule(format!("completes command {cid:#06x}, which is not outstanding")),
        };
        if cqe.sq_id.get() != self.id || u32::from(cqe.sq_head.get()) >= self.entries {
            let (id, head) = (cqe.sq_id.get(), cqe.sq_head.get());
            return self.break_rule(format!("names submission queue {id} and head {head}, where there is none"));
        }
        self.in_flight.set(self.in_flight.get() - 1);
        let status = Status(cqe.status.get() >> 1);
        match slot.state.get() {
            State::Waiting => {
                slot.status.set(status);
                slot.result.set(cqe.dw0.get());
                slot.state.set(State::Done);
                slot.task.take().wake();
            }
            State::Streamed => self.list(index, slot, status),
            _ => self.complete_aside(index, slot, status),
        }
    }

    /// Puts a completed command into the list of the completion stream.
    #[inline]
    fn list(&self, index: u16, slot: &Slot, status: Status) {
        slot.status.set(status);
        slot.state.set(State::Listed);
        slot.next.set(NONE);
        match self.stream.tail.replace(index) {
            NONE => {
                self.stream.head.set(index);
                self.stream.task.take().wake();
            }
            tail => self.slots[usize::from(tail)].next.set(index),
        }
    }

    fn complete_aside(&self, index: u16, slot: &Slot, status: Status) {
        match slot.owned.take() {
            Owned::Part(parent) => parent.finish(status),
            // Nobody waits for it any more, and the controller is done with the buffer.
            Owned::Buffer(buf) => drop(buf),
            Owned::Nothing => {}
        }
        self.free_slot(index);
    }

    #[cold]
    fn break_rule(&self, what: String) {
        self.end(Error::Runtime(vfio_uring::Error::fault(format!("queue {}: the controller {what}", self.id))));
    }

    /// Ends the queue: every pending command ends with `error`, and its memory stays where it is until the controller is
    /// quiesced.
    pub(crate) fn end(&self, error: Error) {
        if self.dead.replace(true) {
            return;
        }
        tracing::warn!(queue = self.id, %error, "an NVMe queue has ended");
        *self.ended.borrow_mut() = Some(Arc::new(error));
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            slot.task.take().wake();
            if slot.state.get() == State::Part {
                let owned = slot.owned.take();
                if let Owned::Part(parent) = &owned {
                    parent.wake();
                }
                slot.owned.set(owned);
            }
        }
        self.stream.task.take().wake();
        self.permits.wake_all();
    }

    /// Ends the queue when its device is gone or a command takes too long.
    fn look_at_clock(&self, now: Instant) {
        if self.dead.get() || self.in_flight.get() == 0 {
            return;
        }
        if let Some(error) = self.device.as_ref().and_then(|device| device.is_gone()) {
            return self.end(error.into());
        }
        if now < self.next_tick.get() {
            return;
        }
        self.next_tick.set(now + self.timeout / TICKS + Duration::from_micros(1));
        let ticks = self.ticks.get().wrapping_add(1);
        self.ticks.set(ticks);
        let late = |slot: &&Slot| slot.state.get().in_flight() && ticks.wrapping_sub(slot.tick.get()) > TICKS + 1;
        if let Some(slot) = self.slots.iter().find(late) {
            let what = format!("command {:#06x} of queue {}", slot.cid.get(), self.id);
            self.end(Error::Runtime(vfio_uring::Error::Timeout { what, after: self.timeout }));
        }
    }

    /// The controller is proven to be done with all memory of the queue: what its commands own is freed.
    pub(crate) fn quiesce(self: &Rc<Self>) {
        self.end(Error::Controller("was shut down".into()));
        self.quiesced.set(true);
        for slot in self.slots.iter().filter(|slot| slot.state.get() == State::Orphaned) {
            drop(slot.owned.take());
        }
    }
}
