//! The queue as a completion stream: submitting gives a token, completions come in batches to one task. It carries the peak.

use std::{future::poll_fn, task::Poll};

use vfio_uring::{dma::DmaBuf, reactor::TaskRef};

use crate::{
    Error, Result,
    namespace::Namespace,
    queue::{Slot, State},
    spec::{Status, nvm},
};

/// A command of a [`CommandStream`]: what [`Completion::token`] will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u16);

impl Token {
    /// A number below [`CommandStream::capacity`], no other command's while this one is under way: an index for the caller's
    /// own table.
    #[inline]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// A command that is done.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// How it ended, as the controller says.
    pub status: Status,
    /// Its buffer.
    pub buf: DmaBuf,
}

impl Completion {
    /// How it ended.
    ///
    /// # Errors
    /// [`Error::Status`].
    #[inline]
    pub fn result(&self) -> Result<()> {
        if self.status.is_ok() { Ok(()) } else { Err(Error::Status(self.status)) }
    }
}

/// A command that was not submitted.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Rejected {
    /// Why; [`Error::Full`] when completions have to be taken first.
    pub error: Error,
    /// The buffer, untouched.
    pub buf: DmaBuf,
}

/// A namespace's queue as a completion stream. Dropping it lets what is under way run to its end.
#[derive(Debug)]
pub struct CommandStream {
    ns: Namespace,
}

impl CommandStream {
    pub(crate) fn new(ns: Namespace) -> Result<Self> {
        if ns.queue.stream.taken.replace(true) {
            return Err(Error::invalid("the queue has a completion stream already"));
        }
        Ok(Self { ns })
    }

    /// Commands that can be under way at once.
    pub fn capacity(&self) -> usize {
        self.ns.queue.slots.len()
    }

    /// Commands under way, or done and not taken yet. It counts them.
    pub fn in_flight(&self) -> usize {
        let streamed = |slot: &&Slot| matches!(slot.state.get(), State::Streamed | State::Listed);
        self.ns.queue.slots.iter().filter(streamed).count()
    }

    /// Submits a read of `buf.len()` bytes from block `lba` on; the doorbell follows at the end of the turn.
    ///
    /// # Errors
    /// [`Rejected`] with the buffer: as for [`Namespace::read`], and for more than one command can carry.
    #[inline(always)]
    pub fn submit_read(&self, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        self.submit(nvm::READ, lba, buf)
    }

    /// Submits a write of `buf` to block `lba` and on.
    ///
    /// # Errors
    /// As of [`CommandStream::submit_read`].
    #[inline(always)]
    pub fn submit_write(&self, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        self.submit(nvm::WRITE, lba, buf)
    }

    #[inline(always)]
    fn submit(&self, opcode: u8, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        let (ns, queue) = (&self.ns, &*self.ns.queue);
        if !ns.fits_command(lba, &buf) {
            return self.submit_aside(opcode, lba, buf);
        }
        let Some((index, slot)) = queue.take_slot() else { return self.submit_aside(opcode, lba, buf) };
        Ok(self.start(index, slot, opcode, lba, buf))
    }

    #[inline(always)]
    fn start(&self, index: u16, slot: &Slot, opcode: u8, lba: u64, buf: DmaBuf) -> Token {
        let (ns, queue) = (&self.ns, &*self.ns.queue);
        let (prp1, prp2) = queue.prps(index, buf.iova(), buf.len());
        queue.start(slot, ns.sqe(opcode, lba, buf.len() >> ns.shift).prps(prp1, prp2), State::Streamed);
        slot.put(buf);
        Token(index)
    }

    /// What the quick test turned away: a transfer that ends close to the namespace's end, or one to be rejected.
    #[cold]
    fn submit_aside(&self, opcode: u8, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        let (ns, queue) = (&self.ns, &*self.ns.queue);
        let checked = ns.check(lba, &buf);
        if checked.is_ok()
            && buf.len() <= ns.part_len
            && let Some((index, slot)) = queue.take_slot()
        {
            return Ok(self.start(index, slot, opcode, lba, buf));
        }
        let error = match checked {
            Err(error) => error,
            Ok(_) if queue.dead.get() => queue.end_error(),
            Ok(_) if buf.len() > self.ns.part_len => {
                let (len, most) = (buf.len(), self.ns.part_len);
                Error::invalid(format!("a transfer of {len} bytes: one command carries {most}, the stream does not split"))
            }
            Ok(_) => Error::Full(queue.slots.len() as u32),
        };
        Err(Rejected { error, buf })
    }

    /// Waits until a command is done, or nothing is under way on the queue.
    ///
    /// # Errors
    /// [`Error::Ended`] when the queue has ended and what was done before is taken; the buffers of what was under way stay with
    /// the controller.
    #[inline]
    pub async fn ready(&self) -> Result<()> {
        poll_fn(|cx| {
            let (queue, stream) = (&*self.ns.queue, &self.ns.queue.stream);
            if stream.listed.get() != 0 {
                return Poll::Ready(Ok(()));
            }
            if queue.dead.get() {
                return Poll::Ready(Err(queue.end_error()));
            }
            if queue.has_completion() || queue.outstanding() == 0 {
                return Poll::Ready(Ok(()));
            }
            stream.task.set(TaskRef::current(cx));
            stream.waiting.set(true);
            Poll::Pending
        })
        .await
    }

    /// Calls `each` for every command that is done, without waiting; how many those were. `each` may submit.
    #[inline(always)]
    pub fn take(&self, mut each: impl FnMut(Completion)) -> usize {
        let queue = &*self.ns.queue;
        let mut count = 0;
        loop {
            let (index, slot, status) = if queue.stream.listed.get() != 0 {
                let index = queue.next_listed();
                let slot = queue.slot(index);
                (index, slot, slot.status.get())
            } else {
                match queue.next_streamed() {
                    Some(streamed) => streamed,
                    None => return count,
                }
            };
            let buf = slot.buf.take();
            queue.free_this(index, slot);
            count += 1;
            if let Some(buf) = buf {
                each(Completion { token: Token(index), status, buf });
            }
        }
    }

    /// [`CommandStream::ready`] and [`CommandStream::take`], until there is something to take; 0 when nothing is under way on the
    /// queue.
    ///
    /// # Errors
    /// As of [`CommandStream::ready`].
    pub async fn next_batch(&self, mut each: impl FnMut(Completion)) -> Result<usize> {
        loop {
            self.ready().await?;
            let count = self.take(&mut each);
            if count != 0 || self.ns.queue.outstanding() == 0 {
                return Ok(count);
            }
        }
    }

    /// [`CommandStream::next_batch`], appending to a list.
    ///
    /// # Errors
    /// As of [`CommandStream::ready`].
    pub async fn completions(&self, to: &mut Vec<Completion>) -> Result<()> {
        self.next_batch(|completion| to.push(completion)).await.map(drop)
    }
}

impl Drop for CommandStream {
    fn drop(&mut self) {
        while self.ns.queue.stream.listed.get() != 0 {
            let index = self.ns.queue.next_listed();
            drop(self.ns.queue.slot(index).buf.take());
            self.ns.queue.free_slot(index);
        }
        let queue = &self.ns.queue;
        for slot in queue.slots.iter().filter(|slot| slot.state.get() == State::Streamed) {
            slot.state.set(State::Orphaned);
        }
        queue.stream.waiting.set(false);
        queue.stream.task.take();
        queue.stream.taken.set(false);
    }
}
