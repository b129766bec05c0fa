//! The queue's poller: one doorbell a turn, then the completions; now and then, a look at the clock; and before the reactor sleeps,
//! the interrupt, if the queue has one.
//!
//! What the controller writes is copied once and checked. A completion that breaks the rules ends the queue.

use std::{
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::Interrupt,
    reactor::{Poller, Standby},
};

use crate::{
    Error,
    queue::{NONE, QueuePair, Slot, State, TICKS},
    spec::{CqeTail, Status},
    watch::{End, Watch},
};

/// Looks at the queue between two looks at the clock while the reactor spins.
const CLOCK_INTERVAL: u32 = 4096;

impl Poller for QueuePair {
    #[inline]
    fn poll(&self) -> bool {
        self.ring_sq();
        let found = if self.stream.waiting.get() {
            // The stream's task takes them itself, and spares them the list.
            let found = self.has_completion();
            if found {
                self.stream.waiting.set(false);
                self.stream.task.take().wake();
            }
            found
        } else {
            !self.dead.get() && self.drain()
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
        if self.outstanding() == 0 || self.dead.get() {
            return Standby::Idle;
        }
        match &mut *self.interrupt.borrow_mut() {
            Some(interrupt) => self.arm(interrupt),
            None => Standby::Polled,
        }
    }
}

impl QueuePair {
    #[inline]
    fn ring_sq(&self) {
        let (tail, rung) = (self.sq_tail.get(), self.sq_rung.get());
        if tail != rung && !self.dead.get() && !self.is_forgotten() {
            let new = self.unpublished();
            self.in_flight.set(self.in_flight.get().wrapping_add(new));
            self.sq_rung.set(tail);
            self.sq_doorbell.write(tail);
        }
    }

    /// Whether the device was reset: its doorbells may be those of other queues by now. The next look at the clock ends the queue.
    #[inline]
    fn is_forgotten(&self) -> bool {
        self.watch.get().is_some_and(Watch::was_reset)
    }

    /// Commands that the doorbell has not told of.
    #[inline]
    fn unpublished(&self) -> u32 {
        let (tail, rung) = (self.sq_tail.get(), self.sq_rung.get());
        if tail >= rung { tail - rung } else { tail + self.entries - rung }
    }

    /// Commands that were submitted and are not done. It is exact also when a controller completes what it was not told of yet,
    /// which makes a part of it wrap.
    #[inline]
    pub(crate) fn outstanding(&self) -> u32 {
        self.in_flight.get().wrapping_add(self.unpublished()).wrapping_sub(self.cq_taken.get())
    }

    fn ring_cq(&self) {
        let taken = self.cq_taken.take();
        if taken != 0 && !self.dead.get() && !self.is_forgotten() {
            // A controller may complete what it was not told of yet.
            self.in_flight.set(self.in_flight.get().wrapping_sub(taken));
            self.cq_doorbell.write(self.cq_head.get());
        }
    }

    /// Waits for the interrupt: what was there before it was armed is found by the look after it.
    fn arm(&self, interrupt: &mut Interrupt) -> Standby {
        match interrupt.poll_idle() {
            Poll::Ready(Ok(())) => Standby::Found,
            Poll::Ready(Err(error)) => {
                self.end(error.into());
                Standby::Found
            }
            Poll::Pending if self.has_completion() => Standby::Found,
            Poll::Pending => Standby::Armed(Some(self.next_tick.get())),
        }
    }

    /// Whether there is a completion to take.
    #[inline]
    pub(crate) fn has_completion(&self) -> bool {
        let word = self.rings.cq.load_u64(self.cq_head.get() as usize, CqeTail::OFFSET);
        matches!(word, Ok(word) if (CqeTail(word).status_and_phase() ^ self.phase.get()) & 1 == 0) && !self.dead.get()
    }

    /// Takes the completions that are there.
    #[inline]
    fn drain(&self) -> bool {
        let head = (self.cq_head.get(), self.phase.get());
        while let Some((index, slot, status)) = self.next_streamed() {
            self.list(index, slot, status);
        }
        head != (self.cq_head.get(), self.phase.get())
    }

    /// Takes completions up to the next one of a streamed command, with its slot; `None` when no more are there.
    ///
    /// Where the queue is read is kept in it all the time: what the caller does between may panic, or come here again.
    #[inline(always)]
    pub(crate) fn next_streamed(&self) -> Option<(u16, &Slot, Status)> {
        // A controller that completes without end runs out of commands, and is found out by that.
        loop {
            let head = self.cq_head.get();
            let Ok(word) = self.rings.cq.load_u64(head as usize, CqeTail::OFFSET) else { return None };
            let tail = CqeTail(word);
            if (tail.status_and_phase() ^ self.phase.get()) & 1 != 0 {
                self.batch_ends();
                return None;
            }
            self.cq_head.set(head + 1);
            if head + 1 == self.entries {
                self.cq_head.set(0);
                self.phase.set(self.phase.get() ^ 1);
            }
            self.cq_taken.set(self.cq_taken.get() + 1);
            let index = tail.masked_cid(self.index_mask);
            let slot = self.slots.get(index).filter(|slot| slot.key.get() == tail.key());
            let Some(slot) = slot else {
                self.break_rule(tail);
                return None;
            };
            // The next command of the slot has another key.
            slot.key.set(tail.key().wrapping_add(self.key_step));
            slot.age.set(0);
            if slot.state.get() == State::Streamed {
                return Some((index as u16, slot, tail.status()));
            }
            if !self.complete(index as u16, slot, tail, head as usize) {
                return None;
            }
        }
    }

    /// The queue has room for more than all slots, so the controller need not hear of every batch at once.
    #[inline(always)]
    fn batch_ends(&self) {
        if self.cq_taken.get() * 4 >= self.entries {
            self.ring_cq();
        }
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
        let stream = &self.stream;
        let (first, listed) = (stream.first.get(), stream.listed.get());
        // A ring as long as the slots, each of which is in it once.
        let end = first + listed;
        let end = if end < stream.list.len() { end } else { end - stream.list.len() };
        if let Some(place) = stream.list.get(end) {
            place.set(index);
            stream.listed.set(listed + 1);
        }
    }

    /// The first command of the list, which is not empty.
    #[cold]
    pub(crate) fn next_listed(&self) -> u16 {
        let stream = &self.stream;
        let place = stream.first.get();
        stream.listed.set(stream.listed.get() - 1);
        stream.first.set(if place + 1 == stream.list.len() { 0 } else { place + 1 });
        stream.list[place].get()
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
        self.stream.waiting.set(false);
        self.stream.task.take().wake();
        self.line.close();
    }

    /// Ends the queue when its device is gone, was reset or lost a doorbell, or a command takes too long.
    fn look_at_clock(&self, now: Instant) {
        if self.dead.get() && self.quiesced.get() {
            return;
        }
        match self.watch.get().and_then(|watch| watch.look([&self.sq_doorbell, &self.cq_doorbell], self.lost_before)) {
            Some(end) => return self.end_from_outside(end),
            None if self.dead.get() || self.outstanding() == 0 => return,
            None => {}
        }
        if now < self.next_tick.get() {
            return;
        }
        self.next_tick.set(now + self.timeout / u32::from(TICKS) + Duration::from_micros(1));
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            slot.age.set(slot.age.get() + 1);
            if slot.age.get() > TICKS {
                let what = format!("command {:#06x} of queue {}", slot.cid(), self.id);
                return self.end(vfio_uring::Error::Timeout { what, after: self.timeout }.into());
            }
        }
    }

    /// Ends the queue with its device.
    #[cold]
    fn end_from_outside(&self, End { error, proven }: End) {
        // First, so that those that the end wakes get their buffers back.
        self.quiesced.set(proven);
        self.end(error);
        if proven {
            self.drop_orphans();
        }
    }

    /// The controller is proven to be done with all memory of the queue: what its commands own is freed.
    pub(crate) fn quiesce(&self) {
        self.quiesced.set(true);
        self.end(Error::controller("was shut down"));
        self.drop_orphans();
    }

    /// Frees what nobody waits for.
    fn drop_orphans(&self) {
        for slot in self.slots.iter().filter(|slot| slot.state.get() == State::Orphaned) {
            drop(slot.buf.take());
        }
    }
}
