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
    queue::{NONE, QueuePair, Slot, State, TICKS},
    spec::CqeTail,
};

/// Looks at the queue between two looks at the clock while the reactor spins.
const CLOCK_INTERVAL: u32 = 4096;

impl Poller for QueuePair {
    #[inline]
    fn poll(&self) -> bool {
        self.ring_sq();
        let found = self.drain();
        if self.stream.listed.get() != 0 {
            self.stream.task.take().wake();
        }
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
        // A controller that completes without end runs out of commands, and is found out by that.
        loop {
            let Ok(word) = rings.cq.load_u64(head as usize, CqeTail::OFFSET) else { break };
            let tail = CqeTail(word);
            if tail.phase() != phase || self.dead.get() {
                break;
            }
            self.complete(tail, head);
            head += 1;
            if head == self.entries {
                head = 0;
                phase = !phase;
            }
            taken += 1;
        }
        if taken == 0 {
            return false;
        }
        self.cq_head.set(head);
        self.phase.set(phase);
        self.in_flight.set(self.in_flight.get().saturating_sub(taken));
        self.cq_taken.set(self.cq_taken.get() + taken);
        // The queue has room for more than all slots, so the controller need not hear of every batch at once.
        if self.cq_taken.get() * 4 >= self.entries {
            self.ring_cq();
        }
        true
    }

    /// Ends the command that the completion at `head` names.
    #[inline]
    fn complete(&self, tail: CqeTail, head: u32) {
        let cid = tail.cid();
        let index = cid & self.index_mask;
        let Some(slot) = self.slots.get(usize::from(index)).filter(|slot| slot.cid.get() == cid) else {
            return self.break_rule(tail);
        };
        if tail.sq_id() != self.id || u32::from(tail.sq_head()) >= self.entries {
            return self.break_rule(tail);
        }
        // The next command of the slot has another identifier.
        slot.cid.set(cid.wrapping_add(self.index_mask + 1));
        slot.status.set(tail.status());
        match slot.state.get() {
            State::Waiting => {
                slot.state.set(State::Done);
                slot.task.take().wake();
            }
            State::Streamed => {
                slot.state.set(State::Listed);
                let stream = &self.stream;
                let listed = stream.listed.get();
                // As long as the slots: each is in it once.
                if let Some(place) = stream.list.get(listed) {
                    place.set(index);
                    stream.listed.set(listed + 1);
                }
            }
            _ => self.complete_aside(index, tail, head),
        }
    }

    #[cold]
    fn complete_aside(&self, index: u16, tail: CqeTail, head: u32) {
        let (slot, extra) = (self.slot(index), &self.extras[usize::from(index)]);
        match slot.state.get() {
            State::Command => {
                let cqe = self.rings.as_ref().and_then(|rings| rings.cq.get(head as usize).ok());
                extra.result.set(cqe.map_or(0, |cqe| cqe.result()));
                slot.state.set(State::Done);
                slot.task.take().wake();
            }
            State::Part | State::Orphaned => {
                if let Some(parent) = extra.parent.take() {
                    parent.finish(tail.status());
                }
                // If there is a buffer, nobody waits for it any more, and the controller is done with it.
                drop(slot.buf.take());
                self.free_slot(index);
            }
            _ => self.break_rule(tail),
        }
    }

    /// Ends the queue, as its completion can't be.
    #[cold]
    fn break_rule(&self, tail: CqeTail) {
        let (cid, sq, head) = (tail.cid(), tail.sq_id(), tail.sq_head());
        let what = format!(
            "queue {} got a completion for command {cid:#06x} of submission queue {sq} at head {head}, which is not outstanding",
            self.id
        );
        self.end(vfio_uring::Error::fault(what).into());
    }

    /// Ends the queue: every pending command ends with `error`, and its memory stays where it is until the controller is
    /// quiesced.
    pub(crate) fn end(&self, error: Error) {
        if self.dead.replace(true) {
            return;
        }
        tracing::warn!(queue = self.id, %error, "an NVMe queue has ended");
        *self.ended.borrow_mut() = Some(Arc::new(error));
        self.free.set(NONE);
        for (slot, extra) in self.slots.iter().zip(&self.extras).filter(|(slot, _)| slot.state.get().in_flight()) {
            slot.task.take().wake();
            if let Some(parent) = extra.parent.take() {
                parent.wake();
                extra.parent.set(Some(parent));
            }
        }
        self.stream.task.take().wake();
        self.line.wake_all();
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
        self.next_tick.set(now + self.timeout / u32::from(TICKS) + Duration::from_micros(1));
        let ticks = self.ticks.get().wrapping_add(1);
        self.ticks.set(ticks);
        let late = |slot: &&Slot| slot.state.get().in_flight() && ticks.wrapping_sub(slot.tick.get()) > TICKS + 1;
        if let Some(slot) = self.slots.iter().find(late) {
            let what = format!("command {:#06x} of queue {}", slot.cid.get(), self.id);
            self.end(vfio_uring::Error::Timeout { what, after: self.timeout }.into());
        }
    }

    /// The controller is proven to be done with all memory of the queue: what its commands own is freed.
    pub(crate) fn quiesce(self: &Rc<Self>) {
        self.end(Error::controller("was shut down"));
        self.quiesced.set(true);
        for slot in self.slots.iter().filter(|slot| slot.state.get() == State::Orphaned) {
            drop(slot.buf.take());
        }
    }
}
