//! Any other command as a future: those of the admin queue, and flush.

use std::{future::poll_fn, rc::Rc, task::Poll};

use vfio_uring::{dma::DmaBuf, reactor::TaskRef};

use crate::{
    Result,
    line::Ticket,
    queue::{QueuePair, State},
    spec::Sqe,
};

/// What a command under way has to undo when its future is dropped.
struct Pending<'a> {
    queue: &'a QueuePair,
    ticket: Option<Ticket>,
    index: Option<u16>,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.queue.leave_line(&mut self.ticket);
        if let Some(index) = self.index {
            self.queue.orphan(index);
        }
    }
}

/// Runs a command whose data, if it has any, is `buf`. Gives dword 0 of its completion, and the buffer unless the controller
/// ended with the command under way.
pub(crate) async fn run(queue: &Rc<QueuePair>, sqe: Sqe, mut buf: Option<DmaBuf>) -> (Result<u32>, Option<DmaBuf>) {
    let mut pending = Pending { queue, ticket: None, index: None };
    poll_fn(|cx| {
        if let Some(index) = pending.index {
            let slot = queue.slot(index);
            if slot.state.get() == State::Done {
                pending.index = None;
                let result = slot.result.get();
                let (outcome, buf) = (slot.outcome().map(|()| result), slot.buf.take());
                queue.free_slot(index);
                return Poll::Ready((outcome, buf));
            }
            if queue.dead.get() {
                return Poll::Ready((Err(queue.end_error()), None));
            }
            queue.wait(index, cx);
            return Poll::Pending;
        }
        if queue.dead.get() {
            return Poll::Ready((Err(queue.end_error()), buf.take()));
        }
        let Poll::Ready(index) = queue.poll_slot(&mut pending.ticket, cx) else { return Poll::Pending };
        let (prp1, prp2) = buf.as_ref().map_or((0, 0), |buf| queue.prps(index, buf.iova(), buf.len()));
        let sqe = if buf.is_some() { sqe.prps(prp1, prp2) } else { sqe };
        let slot = queue.slot(index);
        queue.start(slot, sqe, State::Command);
        slot.buf.set(buf.take());
        slot.task.set(TaskRef::current(cx));
        pending.index = Some(index);
        Poll::Pending
    })
    .await
}
