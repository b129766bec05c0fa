//! Transfers above what one command may carry: split into parts that share one buffer.

use std::{
    cell::Cell,
    rc::Rc,
    task::{Context, Poll},
};

use vfio_uring::{dma::DmaBuf, reactor::TaskRef};

use crate::{Error, Result, line::Ticket, namespace::Namespace, queue::State, spec::Status};

/// What the parts of a transfer share: each slot holds a reference until its command is done.
pub(crate) struct Parent {
    buf: Cell<Option<DmaBuf>>,
    outstanding: Cell<u32>,
    /// The first error of a part.
    status: Cell<Status>,
    task: Cell<TaskRef>,
}

impl Parent {
    /// A part is done.
    pub(crate) fn finish(&self, status: Status) {
        if self.status.get().is_ok() {
            self.status.set(status);
        }
        self.outstanding.set(self.outstanding.get() - 1);
        self.wake();
    }

    pub(crate) fn wake(&self) {
        self.task.take().wake();
    }

    /// The controller may still write the buffer, and nothing will tell when it is done.
    pub(crate) fn quarantine(&self) {
        if let Some(buf) = self.buf.take() {
            buf.quarantine();
        }
    }
}

/// A transfer that is split.
pub(crate) struct Large {
    opcode: u8,
    lba: u64,
    iova: u64,
    len: usize,
    /// Bytes that were submitted.
    submitted: usize,
    ticket: Option<Ticket>,
    parent: Rc<Parent>,
    /// Comes back when the buffer can't.
    stand_in: DmaBuf,
}

impl Large {
    pub(crate) fn new(opcode: u8, lba: u64, buf: DmaBuf) -> Self {
        let (iova, len) = (buf.iova(), buf.len());
        let stand_in = buf.stand_in();
        let parent = Parent {
            buf: Cell::new(Some(buf)),
            outstanding: Cell::new(0),
            status: Cell::new(Status(0)),
            task: Cell::default(),
        };
        Self { opcode, lba, iova, len, submitted: 0, ticket: None, parent: Rc::new(parent), stand_in }
    }

    pub(crate) fn poll(&mut self, ns: &Namespace, cx: &Context<'_>) -> Poll<(Result<()>, DmaBuf)> {
        let queue = &*ns.queue;
        if queue.dead.get() {
            self.leave(ns);
            return Poll::Ready((Err(queue.end_error()), self.give_up()));
        }
        while self.submitted < self.len && self.parent.status.get().is_ok() {
            let Poll::Ready(index) = queue.poll_slot(&mut self.ticket, cx) else {
                self.parent.task.set(TaskRef::current(cx));
                return Poll::Pending;
            };
            let len = (self.len - self.submitted).min(ns.part_len);
            let sqe = ns.sqe(self.opcode, self.lba + (self.submitted >> ns.shift) as u64, len >> ns.shift);
            let iova = self.iova + self.submitted as u64;
            self.parent.outstanding.set(self.parent.outstanding.get() + 1);
            let (prp1, prp2) = queue.prps(index, iova, len);
            queue.slot(index).parent.set(Some(self.parent.clone()));
            queue.start(queue.slot(index), sqe.prps(prp1, prp2), State::Part);
            self.submitted += len;
        }
        if self.parent.outstanding.get() != 0 {
            self.parent.task.set(TaskRef::current(cx));
            return Poll::Pending;
        }
        let status = self.parent.status.get();
        let result = if status.is_ok() { Ok(()) } else { Err(Error::Status(status)) };
        Poll::Ready((result, self.parent.buf.take().unwrap_or_else(|| self.stand_in.stand_in())))
    }

    /// The buffer if no part is under way, else what stands in for it.
    pub(crate) fn give_up(&self) -> DmaBuf {
        let buf = if self.parent.outstanding.get() == 0 { self.parent.buf.take() } else { None };
        buf.unwrap_or_else(|| self.stand_in.stand_in())
    }

    /// Leaves the line for a slot.
    pub(crate) fn leave(&mut self, ns: &Namespace) {
        ns.queue.leave_line(&mut self.ticket);
    }
}
