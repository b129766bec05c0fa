//! Any other command as a future: those of the admin queue, and flush.

use std::{future::poll_fn, rc::Rc, task::Poll};

use vfio_uring::dma::DmaBuf;

use crate::{
    Result,
    permit::Ticket,
    queue::{Owned, QueuePair, State},
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
        if let Some(ticket) = self.ticket {
            self.queue.permits.leave(ticket);
        }
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
            if let Some((outcome, owned)) = queue.take_done(index) {
                pending.index = None;
                let buf = if let Owned::Buffer(buf) = owned { Some(buf) } else { None };
                return Poll::Ready((outcome.into_result(), buf));
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
        if queue.permits.poll_take(&mut pending.ticket, cx).is_pending() {
            return Poll::Pending;
        }
        let (iova, len) = buf.as_ref().map_or((0, 0), |buf| (buf.iova(), buf.len()));
        let owned = buf.take().map_or(Owned::Nothing, Owned::Buffer);
        let index = queue.start(sqe, iova, len, State::Waiting, owned);
        queue.wait(index, cx);
        pending.index = Some(index);
        Poll::Pending
    })
    .await
}
