//! A queue pair: slots that own what the controller may touch, and submission without a doorbell.
//!
//! A command lives in a slot from its submission to its completion. The slot owns the command's buffer, so that a dropped
//! future only orphans the slot. The reactor's poller (`poll.rs`) rings one doorbell a turn for all that was submitted, and
//! drains the completion queue.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    task::Context,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Device, Posted},
    dma::{DmaBuf, DmaRing, Pool},
    reactor::TaskRef,
};

use crate::{
    Error, Result,
    large::Parent,
    permit::Permits,
    prp,
    spec::{Cqe, Sqe, Status},
};

/// Ticks of the queue's clock that a command may take: its timeout is divided into so many.
pub(crate) const TICKS: u32 = 8;
/// Most slots of a queue: it leaves 4 bits of a command identifier for the generation.
pub const MAX_SLOTS: usize = 4095;
/// Largest transfer of one command: what one page of PRPs names.
pub const MAX_TRANSFER: usize = prp::PAGE * prp::PAGE / 8;

/// What a queue pair is made of.
pub struct Parts {
    /// Queue identifier, 0 for the admin queue.
    pub id: u16,
    /// Commands that can be outstanding at once, 1 to [`MAX_SLOTS`]; the rings have one entry more.
    pub slots: usize,
    /// Memory for the rings and the PRP lists, [`Parts::memory`] bytes.
    pub memory: Pool,
    /// Bytes of the largest transfer of one command: whole pages, at most [`MAX_TRANSFER`].
    pub max_transfer: usize,
    /// The submission queue's tail doorbell.
    pub sq_doorbell: Posted<u32>,
    /// The completion queue's head doorbell.
    pub cq_doorbell: Posted<u32>,
    /// How long a command may take.
    pub timeout: Duration,
    /// Tells when the device is gone.
    pub device: Option<Device>,
}

impl Parts {
    /// Bytes of DMA memory that a queue of `slots` slots takes.
    pub fn memory(slots: usize, max_transfer: usize) -> usize {
        let ring = |entry: usize| ((slots + 1) * entry).next_multiple_of(prp::PAGE);
        let lists = if max_transfer > 2 * prp::PAGE { slots * prp::PAGE } else { 0 };
        ring(size_of::<Sqe>()) + ring(size_of::<Cqe>()) + lists
    }
}

/// What a slot's command is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Submitted; its future waits.
    Waiting,
    /// Completed; its future has not looked yet.
    Done,
    /// Submitted; its future is gone.
    Orphaned,
    /// Submitted through the completion stream.
    Streamed,
    /// Completed, in the list of the completion stream.
    Listed,
    /// Submitted; a part of a larger transfer.
    Part,
}

impl State {
    /// Whether the controller may still use the command's memory.
    pub(crate) fn in_flight(self) -> bool {
        matches!(self, Self::Waiting | Self::Orphaned | Self::Streamed | Self::Part)
    }
}

/// What a slot keeps for its command.
#[derive(Default)]
pub(crate) enum Owned {
    #[default]
    Nothing,
    Buffer(DmaBuf),
    Part(Rc<Parent>),
}

pub(crate) struct Slot {
    pub(crate) state: Cell<State>,
    /// The identifier of the slot's command: its index below, a generation above.
    pub(crate) cid: Cell<u16>,
    /// The next free slot, or the next one in the stream's list.
    pub(crate) next: Cell<u16>,
    pub(crate) status: Cell<Status>,
    pub(crate) result: Cell<u32>,
    /// The queue's tick at the submission.
    pub(crate) tick: Cell<u32>,
    pub(crate) task: Cell<TaskRef>,
    pub(crate) owned: Cell<Owned>,
}

/// No slot.
pub(crate) const NONE: u16 = u16::MAX;

/// How a command ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) status: Status,
    /// Dword 0 of the completion.
    pub(crate) result: u32,
}

impl Outcome {
    pub(crate) fn into_result(self) -> Result<u32> {
        if self.status.is_ok() { Ok(self.result) } else { Err(Error::Status(self.status)) }
    }
}

/// Completed commands of the completion stream, in order, linked through their slots.
pub(crate) struct StreamList {
    pub(crate) head: Cell<u16>,
    pub(crate) tail: Cell<u16>,
    pub(crate) in_flight: Cell<u32>,
    pub(crate) task: Cell<TaskRef>,
    pub(crate) taken: Cell<bool>,
}

/// The DMA memory that the controller sees.
pub(crate) struct Rings {
    pub(crate) sq: DmaRing<Sqe>,
    pub(crate) cq: DmaRing<Cqe>,
    lists: Option<DmaRing<u64>>,
}

pub(crate) struct QueuePair {
    pub(crate) id: u16,
    /// Taken when the queue is dropped.
    pub(crate) rings: Option<Rings>,
    pub(crate) slots: Box<[Slot]>,
    /// Mask of a slot's index in a command identifier.
    pub(crate) index_mask: u16,
    pub(crate) entries: u32,
    free: Cell<u16>,
    pub(crate) in_flight: Cell<u32>,
    pub(crate) permits: Permits,
    pub(crate) sq_doorbell: Posted<u32>,
    pub(crate) cq_doorbell: Posted<u32>,
    pub(crate) sq_tail: Cell<u32>,
    pub(crate) sq_rung: Cell<u32>,
    pub(crate) cq_head: Cell<u32>,
    /// Completions taken since the completion queue's doorbell was rung.
    pub(crate) cq_taken: Cell<u32>,
    pub(crate) phase: Cell<u32>,
    pub(crate) max_transfer: usize,
    pub(crate) space_id: u64,
    pub(crate) stream: StreamList,
    pub(crate) looks: Cell<u32>,
    pub(crate) ticks: Cell<u32>,
    pub(crate) next_tick: Cell<Instant>,
    pub(crate) timeout: Duration,
    pub(crate) device: Option<Device>,
    pub(crate) dead: Cell<bool>,
    pub(crate) ended: RefCell<Option<Arc<Error>>>,
    /// The controller is proven not to touch the queue's memory, nor that of its commands, any more.
    pub(crate) quiesced: Cell<bool>,
}

impl QueuePair {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let Parts { id, slots: count, memory, max_transfer, sq_doorbell, cq_doorbell, timeout, device } = parts;
        if !(1..=MAX_SLOTS).contains(&count) {
            return Err(Error::Invalid(format!("a queue of {count} slots: it can have 1 to {MAX_SLOTS}")));
        }
        if max_transfer == 0 || max_transfer > MAX_TRANSFER || !max_transfer.is_multiple_of(prp::PAGE) {
            return Err(Error::Invalid(format!(
                "a transfer limit of {max_transfer} bytes: whole pages up to {MAX_TRANSFER}"
            )));
        }
        let entries = count + 1;
        let sq = DmaRing::new(memory.alloc(entries * size_of::<Sqe>())?.into_shared())?;
        let cq = DmaRing::<Cqe>::new(memory.alloc(entries * size_of::<Cqe>())?.into_shared())?;
        cq.clear();
        let lists = match max_transfer > 2 * prp::PAGE {
            true => Some(DmaRing::new(memory.alloc(count * prp::PAGE)?.into_shared())?),
            false => None,
        };
        let slot = |index: usize| Slot {
            state: Cell::new(State::Free),
            cid: Cell::new(index as u16),
            next: Cell::new(if index + 1 < count { index as u16 + 1 } else { NONE }),
            status: Cell::new(Status(0)),
            result: Cell::new(0),
            tick: Cell::new(0),
            task: Cell::default(),
            owned: Cell::default(),
        };
        Ok(Self {
            id,
            rings: Some(Rings { sq, cq, lists }),
            slots: (0..count).map(slot).collect(),
            index_mask: (count.next_power_of_two() - 1) as u16,
            entries: entries as u32,
            free: Cell::new(0),
            in_flight: Cell::new(0),
            permits: Permits::new(count),
            sq_doorbell,
            cq_doorbell,
            sq_tail: Cell::new(0),
            sq_rung: Cell::new(0),
            cq_head: Cell::new(0),
            cq_taken: Cell::new(0),
            phase: Cell::new(1),
            max_transfer,
            space_id: memory.space_id(),
            stream: StreamList {
                head: Cell::new(NONE),
                tail: Cell::new(NONE),
                in_flight: Cell::new(0),
                task: Cell::default(),
                taken: Cell::new(false),
            },
            looks: Cell::new(0),
            ticks: Cell::new(0),
            next_tick: Cell::new(Instant::now()),
            timeout,
            device,
            dead: Cell::new(false),
            ended: RefCell::new(None),
            quiesced: Cell::new(false),
        })
    }

    /// Where the controller finds the submission and the completion queue.
    pub(crate) fn ring_iovas(&self) -> (u64, u64) {
        self.rings.as_ref().map_or((0, 0), |rings| (rings.sq.iova(), rings.cq.iova()))
    }

    /// Why the queue has ended.
    #[cold]
    pub(crate) fn end_error(&self) -> Error {
        match &*self.ended.borrow() {
            Some(error) => Error::Ended(error.clone()),
            None => Error::Controller("is shut down".into()),
        }
    }

    /// Submits a command on `len` bytes at `iova`; the doorbell follows at the end of the turn. The caller holds a permit, so a
    /// slot is free. Gives the slot's index.
    #[inline]
    pub(crate) fn start(&self, mut sqe: Sqe, iova: u64, len: usize, state: State, owned: Owned) -> u16 {
        let index = self.free.get();
        let slot = &self.slots[usize::from(index)];
        self.free.set(slot.next.get());
        let cid = slot.cid.get().wrapping_add(self.index_mask + 1);
        slot.cid.set(cid);
        slot.state.set(state);
        slot.tick.set(self.ticks.get());
        slot.owned.set(owned);
        if let Some(rings) = &self.rings {
            if len != 0 {
                let (prp1, prp2) = prp::prps(iova, len, rings.lists.as_ref(), index);
                sqe.prp1 = prp1.into();
                sqe.prp2 = prp2.into();
            }
            sqe.cdw0 = (sqe.cdw0.get() | u32::from(cid) << 16).into();
            let tail = self.sq_tail.get();
            // The tail is always below the number of entries.
            let _ = rings.sq.set(tail as usize, &sqe);
            self.sq_tail.set(if tail + 1 == self.entries { 0 } else { tail + 1 });
        }
        self.in_flight.set(self.in_flight.get() + 1);
        index
    }

    /// Notes who waits for a slot's command.
    #[inline]
    pub(crate) fn wait(&self, index: u16, cx: &Context<'_>) {
        self.slots[usize::from(index)].task.set(TaskRef::current(cx));
    }

    /// Takes the outcome of a command that is done, and frees its slot.
    #[inline]
    pub(crate) fn take_done(&self, index: u16) -> Option<(Outcome, Owned)> {
        let slot = &self.slots[usize::from(index)];
        if slot.state.get() != State::Done {
            return None;
        }
        let outcome = Outcome { status: slot.status.get(), result: slot.result.get() };
        let owned = slot.owned.take();
        self.free_slot(index);
        Some((outcome, owned))
    }

    #[inline]
    pub(crate) fn free_slot(&self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        slot.state.set(State::Free);
        slot.next.set(self.free.replace(index));
        self.permits.give_back();
    }

    /// The future of a slot's command is gone.
    pub(crate) fn orphan(&self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        match slot.state.get() {
            State::Done => drop(self.take_done(index)),
            State::Waiting => {
                slot.state.set(State::Orphaned);
                slot.task.take();
            }
            _ => {}
        }
    }

    /// What stands in for the buffer of a command that the controller may still be working on.
    pub(crate) fn stand_in(&self, index: u16) -> Option<DmaBuf> {
        let slot = &self.slots[usize::from(index)];
        let owned = slot.owned.take();
        let stand_in = match &owned {
            Owned::Buffer(buf) => Some(buf.stand_in()),
            Owned::Part(_) | Owned::Nothing => None,
        };
        slot.owned.set(owned);
        stand_in
    }
}

impl Drop for QueuePair {
    /// Without a proof that the controller is done with it, memory is given up, not freed.
    fn drop(&mut self) {
        if self.quiesced.get() {
            return;
        }
        if let Some(rings) = self.rings.take() {
            rings.sq.quarantine();
            rings.cq.quarantine();
            if let Some(lists) = rings.lists {
                lists.quarantine();
            }
        }
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            match slot.owned.take() {
                Owned::Buffer(buf) => buf.quarantine(),
                Owned::Part(parent) => parent.quarantine(),
                Owned::Nothing => {}
            }
        }
    }
}
