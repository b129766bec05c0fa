//! A queue pair: slots that own what the controller may touch, and submission without a doorbell.
//!
//! A command lives in a slot from its submission to its completion. The slot owns the command's buffer, so that a dropped
//! future only orphans the slot. The reactor's poller (`poll.rs`) rings one doorbell a turn for all that was submitted, and
//! drains the completion queue.

use std::{
    cell::{Cell, OnceCell, RefCell},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Interrupt, Posted},
    dma::{DmaBuf, DmaRing, Pool},
    reactor::TaskRef,
};

use crate::{
    Error, Result,
    large::Parent,
    line::{Line, Ticket},
    prp,
    spec::{Cqe, Sqe, Status},
    watch::Watch,
};

/// Ticks of the queue's clock that a command may take: its timeout is divided into so many.
pub(crate) const TICKS: u8 = 8;
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
    /// Tells when the device is gone, was reset or lost a doorbell: that ends the queue. The queues of a controller share it.
    pub watch: Option<Watch>,
    /// What the controller signals for completions, if it does: a reactor that would sleep then waits for it, instead of looking
    /// at the queue now and then.
    pub interrupt: Option<Interrupt>,
}

impl Parts {
    /// Bytes of DMA memory that a queue of `slots` slots takes.
    pub fn memory(slots: usize, max_transfer: usize) -> usize {
        let ring = |entry: usize| ((slots + 1) * entry).next_multiple_of(prp::PAGE);
        let lists = if max_transfer > 2 * prp::PAGE { slots * prp::PAGE } else { 0 };
        ring(size_of::<Sqe>()) + ring(size_of::<Cqe>()) + lists
    }
}

/// What a slot's command is doing. Those that the controller may be working on come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) enum State {
    /// Submitted; its future waits.
    Waiting,
    /// Submitted through the completion stream.
    Streamed,
    /// Submitted; its future waits for the result, too.
    Command,
    /// Submitted; a part of a larger transfer.
    Part,
    /// Submitted; its future is gone.
    Orphaned,
    /// Completed; its future has not looked yet.
    Done,
    /// Completed, in the list of the completion stream.
    Listed,
    Free,
}

impl State {
    /// Whether the controller may still use the command's memory.
    #[inline]
    pub(crate) fn in_flight(self) -> bool {
        self <= Self::Orphaned
    }
}

/// A slot, in one cache line.
#[repr(align(64))]
pub(crate) struct Slot {
    /// The command's buffer.
    pub(crate) buf: Cell<Option<DmaBuf>>,
    pub(crate) task: Cell<TaskRef>,
    /// The transfer that the command is a part of, and whose buffer it uses.
    pub(crate) parent: Cell<Option<Rc<Parent>>>,
    /// What the completion of the slot's command names: the queue below; above, its identifier, which is the slot's index with
    /// a generation.
    pub(crate) key: Cell<u32>,
    /// Dword 0 of the completion.
    pub(crate) result: Cell<u32>,
    /// The next free slot.
    pub(crate) next: Cell<u16>,
    pub(crate) status: Cell<Status>,
    pub(crate) state: Cell<State>,
    /// Ticks of the queue's clock that the command has seen.
    pub(crate) age: Cell<u8>,
}

const _: () = assert!(size_of::<Slot>() == 64);

/// No slot.
pub(crate) const NONE: u16 = u16::MAX;

impl Slot {
    /// The identifier of the slot's command.
    #[inline]
    pub(crate) fn cid(&self) -> u16 {
        (self.key.get() >> 16) as u16
    }

    /// Gives the slot, which has none, the command's buffer.
    #[inline]
    pub(crate) fn put(&self, buf: DmaBuf) {
        // Without a look at the `None` that was there.
        std::mem::forget(self.buf.replace(Some(buf)));
    }

    /// Notes who waits for the command; nobody does so far.
    #[inline(always)]
    pub(crate) fn first_wait(&self, cx: &Context<'_>) {
        // As for the buffer.
        std::mem::forget(self.task.replace(TaskRef::current(cx)));
    }

    /// How the command ended.
    #[inline]
    pub(crate) fn outcome(&self) -> Result<()> {
        let status = self.status.get();
        if status.is_ok() { Ok(()) } else { Err(Error::Status(status)) }
    }
}

/// The completion stream of a queue.
pub(crate) struct StreamState {
    /// Slots of commands whose completion was taken while the stream's task was not waiting, in order: `listed` from `first` on.
    pub(crate) list: Box<[Cell<u16>]>,
    pub(crate) first: Cell<usize>,
    pub(crate) listed: Cell<usize>,
    /// Whether `task` waits for a completion.
    pub(crate) waiting: Cell<bool>,
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
    pub(crate) rings: Rings,
    pub(crate) slots: Box<[Slot]>,
    /// Mask of a slot's index in a command identifier.
    pub(crate) index_mask: u64,
    /// What makes a slot's key that of its next command.
    pub(crate) key_step: u32,
    pub(crate) entries: u32,
    /// The first free slot; [`NONE`] also once the queue has ended.
    pub(crate) free: Cell<u16>,
    /// Commands that the controller was told of, less those that are done.
    pub(crate) in_flight: Cell<u32>,
    pub(crate) line: Line,
    pub(crate) sq_doorbell: Posted<u32>,
    pub(crate) cq_doorbell: Posted<u32>,
    pub(crate) sq_tail: Cell<u32>,
    pub(crate) sq_rung: Cell<u32>,
    pub(crate) cq_head: Cell<u32>,
    /// Completions taken since the completion queue's doorbell was rung; not taken off `in_flight` yet.
    pub(crate) cq_taken: Cell<u32>,
    /// The phase tag of new completions.
    pub(crate) phase: Cell<u16>,
    pub(crate) max_transfer: usize,
    pub(crate) space_id: u64,
    pub(crate) stream: StreamState,
    pub(crate) looks: Cell<u32>,
    pub(crate) next_tick: Cell<Instant>,
    pub(crate) timeout: Duration,
    /// Set once the controller was told of the queue: only a reset after that proves that it has forgotten it.
    pub(crate) watch: OnceCell<Watch>,
    /// [`Watch::lost`] when the queue was made.
    pub(crate) lost_before: u32,
    pub(crate) interrupt: RefCell<Option<Interrupt>>,
    pub(crate) dead: Cell<bool>,
    pub(crate) ended: RefCell<Option<Arc<Error>>>,
    /// The controller is proven not to touch the queue's memory, nor that of its commands, any more.
    pub(crate) quiesced: Cell<bool>,
}

impl QueuePair {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let Parts { id, slots: count, memory, max_transfer, sq_doorbell, cq_doorbell, timeout, watch, interrupt } = parts;
        if !(1..=MAX_SLOTS).contains(&count) {
            return Err(Error::invalid(format!("a queue of {count} slots: it can have 1 to {MAX_SLOTS}")));
        }
        if max_transfer == 0 || max_transfer > MAX_TRANSFER || !max_transfer.is_multiple_of(prp::PAGE) {
            return Err(Error::invalid(format!(
                "a transfer limit of {max_transfer} bytes: whole pages up to {MAX_TRANSFER}"
            )));
        }
        let entries = count + 1;
        let sq = DmaRing::new(memory.alloc(entries * size_of::<Sqe>())?.into_shared())?;
        let cq = DmaRing::<Cqe>::new(memory.alloc(entries * size_of::<Cqe>())?.into_shared())?;
        sq.clear();
        cq.clear();
        let lists = match max_transfer > 2 * prp::PAGE {
            true => Some(DmaRing::new(memory.alloc(count * prp::PAGE)?.into_shared())?),
            false => None,
        };
        let slot = |index: usize| Slot {
            buf: Cell::default(),
            task: Cell::default(),
            parent: Cell::default(),
            key: Cell::new((index as u32) << 16 | u32::from(id)),
            result: Cell::new(0),
            next: Cell::new(if index + 1 < count { index as u16 + 1 } else { NONE }),
            status: Cell::new(Status(0)),
            state: Cell::new(State::Free),
            age: Cell::new(0),
        };
        Ok(Self {
            id,
            rings: Rings { sq, cq, lists },
            slots: (0..count).map(slot).collect(),
            index_mask: count.next_power_of_two() as u64 - 1,
            key_step: (count.next_power_of_two() as u32) << 16,
            entries: entries as u32,
            free: Cell::new(0),
            in_flight: Cell::new(0),
            line: Line::default(),
            sq_doorbell,
            cq_doorbell,
            sq_tail: Cell::new(0),
            sq_rung: Cell::new(0),
            cq_head: Cell::new(0),
            cq_taken: Cell::new(0),
            phase: Cell::new(1),
            max_transfer,
            space_id: memory.space_id(),
            stream: StreamState {
                list: (0..count).map(|_| Cell::new(NONE)).collect(),
                first: Cell::new(0),
                listed: Cell::new(0),
                waiting: Cell::new(false),
                task: Cell::default(),
                taken: Cell::new(false),
            },
            looks: Cell::new(0),
            next_tick: Cell::new(Instant::now()),
            timeout,
            lost_before: watch.as_ref().map_or(0, Watch::lost),
            watch: watch.map_or_else(OnceCell::new, OnceCell::from),
            interrupt: RefCell::new(interrupt),
            dead: Cell::new(false),
            ended: RefCell::new(None),
            quiesced: Cell::new(false),
        })
    }

    /// Where the controller finds the submission and the completion queue.
    pub(crate) fn ring_iovas(&self) -> (u64, u64) {
        (self.rings.sq.iova(), self.rings.cq.iova())
    }

    /// Why the queue has ended.
    #[cold]
    pub(crate) fn end_error(&self) -> Error {
        match &*self.ended.borrow() {
            Some(error) => Error::Ended(error.clone()),
            None => Error::controller("is shut down"),
        }
    }

    /// Takes a free slot, if there is one. The line is joined when there is none.
    #[inline]
    pub(crate) fn take_slot(&self) -> Option<(u16, &Slot)> {
        let index = self.free.get();
        let slot = self.slots.get(usize::from(index))?;
        self.free.set(slot.next.get());
        Some((index, slot))
    }

    /// Waits in the line for a slot.
    pub(crate) fn poll_slot(&self, ticket: &mut Option<Ticket>, cx: &Context<'_>) -> Poll<u16> {
        if ticket.is_none()
            && let Some((index, _)) = self.take_slot()
        {
            return Poll::Ready(index);
        }
        self.line.poll(ticket, cx)
    }

    /// Leaves the line.
    pub(crate) fn leave_line(&self, ticket: &mut Option<Ticket>) {
        if let Some(index) = ticket.take().and_then(|ticket| self.line.leave(ticket)) {
            self.free_slot(index);
        }
    }

    /// PRP1 and PRP2 of a command in slot `index`.
    #[inline]
    pub(crate) fn prps(&self, index: u16, iova: u64, len: usize) -> (u64, u64) {
        prp::prps(iova, len, index, self.rings.lists.as_ref())
    }

    /// Submits the command of a slot that was taken; the doorbell follows at the end of the turn. The rings have more entries
    /// than there are slots, so there is room.
    #[inline(always)]
    pub(crate) fn start(&self, slot: &Slot, sqe: Sqe, state: State) {
        slot.state.set(state);
        let tail = self.sq_tail.get();
        // The tail is always below the number of entries. What is 0 in every command is so in the ring from the start.
        let _ = self.rings.sq.set_words(tail as usize, sqe.with_key(slot.key.get()).words());
        self.sq_tail.set(if tail + 1 == self.entries { 0 } else { tail + 1 });
    }

    /// Notes who waits for a slot's command.
    #[inline]
    pub(crate) fn wait(&self, index: u16, cx: &Context<'_>) {
        self.slots[usize::from(index)].task.set(TaskRef::current(cx));
    }

    /// The slot of a command.
    #[inline]
    pub(crate) fn slot(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }

    #[inline]
    pub(crate) fn free_slot(&self, index: u16) {
        self.free_this(index, self.slot(index));
    }

    #[inline(always)]
    pub(crate) fn free_this(&self, index: u16, slot: &Slot) {
        slot.state.set(State::Free);
        if self.line.is_contended() {
            return self.line.give(index);
        }
        slot.next.set(self.free.replace(index));
    }

    /// The future of a slot's command is gone.
    pub(crate) fn orphan(&self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        match slot.state.get() {
            State::Done => {
                drop(slot.buf.take());
                self.free_slot(index);
            }
            State::Waiting | State::Command => {
                slot.state.set(State::Orphaned);
                slot.task.take();
            }
            _ => {}
        }
    }

    /// What the caller of a command gets back whose queue has ended: its buffer if the controller is proven to be done with it, else
    /// what stands in for it.
    pub(crate) fn stand_in(&self, index: u16) -> Option<DmaBuf> {
        let slot = &self.slots[usize::from(index)];
        let buf = slot.buf.take();
        if self.quiesced.get() {
            return buf;
        }
        let stand_in = buf.as_ref().map(DmaBuf::stand_in);
        slot.buf.set(buf);
        stand_in
    }
}

impl Drop for QueuePair {
    /// Without a proof that the controller is done with it, memory is given up, not freed.
    fn drop(&mut self) {
        if self.quiesced.get() || self.watch.get().is_some_and(Watch::is_proven) {
            let Rings { sq, cq, lists } = &self.rings;
            sq.shared().release();
            cq.shared().release();
            lists.iter().for_each(|lists| lists.shared().release());
            return;
        }
        for slot in self.slots.iter().filter(|slot| slot.state.get().in_flight()) {
            if let Some(buf) = slot.buf.take() {
                buf.quarantine();
            }
            if let Some(parent) = slot.parent.take() {
                parent.quarantine();
            }
        }
    }
}
