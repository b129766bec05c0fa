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
    spec::{CqeTail, Status},
};

/// Looks at the queue between two looks at the clock while the reactor spins.
const CLOCK_INTERVAL: u32 = 4096;

impl Poller for QueuePair {
    #[inline]
    fn poll(&self) -> bool {
        self.ring_sq();
        let stream = self.stream.task.take();
        let found = if stream.is_none() {
            self.drain(|index, slot, status| self.list(index, slot, status)) != 0
        } else if self.has_completion() {
            // The stream's task takes them itself, and spares them the list.
            let mut stream = stream;
            stream.wake();
            true
        } else {
            self.stream.task.set(stream);
            false
        };
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
        if self.outstanding() == 0 || self.dead.get() { Standby::Idle } else { Standby::Polled }
    }
}

impl QueuePair {
    #[inline]
    fn ring_sq(&self) {
        let (tail, rung) = (self.sq_tail.get(), self.sq_rung.get());
        if tail != rung && !self.dead.get() {
            let new = self.unpublished();
            self.in_flight.set(self.in_flight.get().wrapping_add(new));
            self.sq_rung.set(tail);
            self.sq_doorbell.write(tail);
        }
    }

    /// Commands that the doorbell has not told of.
    #[inline]
    fn unpublished(&self) -> u32 {
        let (tail, rung) = (self.sq_tail.get(), self.sq_rung.get());
        if tail >= rung { tail - rung } else { tail + self.entries - rung }
    }

    /// Commands that were submitted and are not done. The sum is exact also when a controller completes what it was not told of
    /// yet, which makes the first part wrap.
    #[inline]
    pub(crate) fn outstanding(&self) -> u32 {
        self.in_flight.get().wrapping_add(self.unpublished())
    }

    fn ring_cq(&self) {
        if self.cq_taken.take() != 0 && !self.dead.get() {
            self.cq_doorbell.write(self.cq_head.get());
        }
    }

    /// Whether there is a completion to take.
    #[inline]
    fn has_completion(&self) -> bool {
        let word = self.rings.cq.load_u64(self.cq_head.get() as usize, CqeTail::OFFSET);
        matches!(word, Ok(word) if (CqeTail(word).status_and_phase() ^ self.phase.get()) & 1 == 0) && !self.dead.get()
    }

    /// Takes the completions that are there; those of streamed commands go to `streamed`, with their slots. How many there were.
    #[inline(always)]
    pub(crate) fn drain(&self, mut streamed: impl FnMut(u16, &Slot, Status)) -> u32 {
        if self.dead.get() {
            return 0;
        }
        let mut taken = 0;
        // Where the queue is read is kept in it all the time: what is called meanwhile may panic, or come here again. A controller
        // that completes without end runs out of commands, and is found out by that.
        loop {
            let head = self.cq_head.get();
            let Ok(word) = self.rings.cq.load_u64(head as usize, CqeTail::OFFSET) else { break };
            let tail = CqeTail(word);
            if (tail.status_and_phase() ^ self.phase.get()) & 1 != 0 {
                break;
            }
            self.cq_head.set(head + 1);
            if head + 1 == self.entries {
                self.cq_head.set(0);
                self.phase.set(self.phase.get() ^ 1);
            }
            taken += 1;
            let index = tail.masked_cid(self.index_mask);
            let slot = self.slots.get(index).filter(|slot| slot.key.get() == tail.key());
            let Some(slot) = slot else {
                self.break_rule(tail);
                break;
            };
            // The next command of the slot has another key.
            slot.key.set(tail.key().wrapping_add(self.key_step));
            if slot.state.get() == State::Streamed {
                streamed(index as u16, slot, tail.status());
            } else if !self.complete(index as u16, slot, tail, head as usize) {
                break;
            }
        }
        if taken != 0 {
            self.in_flight.set(self.in_flight.get().wrapping_sub(taken));
            self.cq_taken.set(self.cq_taken.get() + taken);
            // The queue has room for more than all slots, so the controller need not hear of every batch at once.
            if self.cq_taken.get() * 4 >= self.entries {
                self.ring_cq();
            }
        }
        taken
    }

    /// Ends a command that was not streamed. False: it was not outstanding, and the queue has ended.
    #[inline]
    fn complete(&self, index: u16, slot: &Slot, tail: CqeTail, at: usize) -> bool {
        match slot.state.get() {
            State::Waiting => {
                slot.status.set(tail.status());
                slot.state.set(State::Done);
                slot.task.take().wake();
                true
            }
            _ => self.complete_aside(index, slot, tail, at),
        }
    }

    #[cold]
    fn complete_aside(&self, index: u16, slot: &Slot, tail: CqeTail, at: usize) -> bool {
        match slot.state.get() {
            State::Command => {
                slot.result.set(self.rings.cq.get(at).map_or(0, |cqe| cqe.result()));
                slot.status.set(tail.status());
                slot.state.set(State::Done);
                slot.task.take().wake();
            }
            State::Part | State::Orphaned => {
                if let Some(parent) = slot.parent.take() {
                    parent.finish(tail.status());
                }
                // If there is a buffer, nobody waits for it any more, and the controller is done with it.
                drop(slot.buf.take());
                self.free_slot(index);
            }
            _ => {
                self.break_rule(tail);
                return false;
            }
        }
        true
    }

    /// Keeps a streamed command that is done until the stream's task looks.
    #[inline]
    fn list(&self, index: u16, slot: &Slot, status: Status) {
        slot.status.set(status);
        slot.state.set(State::Listed);
        let listed = self.stream.listed.get();
        // The list is as long as the slots, each of which is in it once.
        if let Some(place) = self.stream.list.get(listed) {
            place.set(index);
            self.stream.listed.set(listed + 1);
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
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            slot.task.take().wake();
            if let Some(parent) = slot.parent.take() {
                parent.wake();
                slot.parent.set(Some(parent));
            }
        }
        self.stream.task.take().wake();
        self.line.close();
    }

    /// Ends the queue when its device is gone or a command takes too long.
    fn look_at_clock(&self, now: Instant) {
        if self.dead.get() || self.outstanding() == 0 {
            return;
        }
        if let Some(error) = self.device.as_ref().and_then(|device| device.is_gone()) {
            return self.end(error.into());
        }
        if now < self.next_tick.get() {
            return;
        }
        self.next_tick.set(now + self.timeout / u32::from(TICKS) + Duration::from_micros(1));
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            let age = if slot.aged.replace(slot.cid()) == slot.cid() { slot.age.get() + 1 } else { 0 };
            slot.age.set(age);
            if age > TICKS {
                let what = format!("command {:#06x} of queue {}", slot.cid(), self.id);
                return self.end(vfio_uring::Error::Timeout { what, after: self.timeout }.into());
            }
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
