//! A namespace on a queue: reads, writes and flushes, a future each.

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use vfio_uring::dma::DmaBuf;

use crate::{
    Error, Result,
    large::Large,
    permit::Ticket,
    queue::{Owned, QueuePair, State},
    spec::{Sqe, nvm},
    stream::CommandStream,
};

/// What Identify says of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Namespace identifier.
    pub nsid: u32,
    /// Size in blocks.
    pub blocks: u64,
    /// Bytes of data in a block: a power of two from 512.
    pub block_size: u32,
    /// Bytes of metadata of a block.
    pub metadata: u16,
}

/// A namespace, reached through one queue. Cloning it is cheap.
#[derive(Clone)]
pub struct Namespace {
    pub(crate) queue: Rc<QueuePair>,
    pub(crate) info: NamespaceInfo,
    /// log2 of the block size.
    pub(crate) shift: u32,
    /// Bytes of the largest command: whole blocks.
    pub(crate) part_len: usize,
}

impl Namespace {
    pub(crate) fn new(queue: Rc<QueuePair>, info: NamespaceInfo) -> Result<Self> {
        if info.metadata != 0 {
            let what = format!("namespace {} has {} bytes of metadata a block; format it without", info.nsid, info.metadata);
            return Err(Error::Runtime(vfio_uring::Error::Unsupported { what }));
        }
        let shift = info.block_size.trailing_zeros();
        // Commands count blocks in 16 bits.
        let part_len = queue.max_transfer.min(0x10000usize << shift) >> shift << shift;
        if !info.block_size.is_power_of_two() || info.block_size < 512 || part_len == 0 {
            let what = format!(
                "namespace {} has blocks of {} bytes, which the transfer limit of {} bytes does not allow",
                info.nsid, info.block_size, queue.max_transfer
            );
            return Err(Error::Runtime(vfio_uring::Error::Unsupported { what }));
        }
        Ok(Self { queue, info, shift, part_len })
    }

    /// What Identify says of it.
    pub fn info(&self) -> &NamespaceInfo {
        &self.info
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> usize {
        self.info.block_size as usize
    }

    /// Blocks of the namespace.
    pub fn blocks(&self) -> u64 {
        self.info.blocks
    }

    /// Reads `buf.len()` bytes from block `lba` on. More than one command may carry are split.
    ///
    /// The buffer goes with the command and comes back with its result. When the controller ends with the command under way,
    /// the memory stays with it, and an empty buffer comes back. A future that is dropped leaves its command to run on; the
    /// buffer returns to its pool when it is done.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a length that is no multiple of the block size, a range beyond the end, or a buffer of another
    /// device; [`Error::Status`] when the controller says so; [`Error::Ended`] when the queue has ended.
    #[inline]
    pub fn read(&self, lba: u64, buf: DmaBuf) -> Io<'_> {
        Io { ns: self, stage: Stage::Start { opcode: nvm::READ, lba, buf } }
    }

    /// Writes `buf` to block `lba` and on, as [`Namespace::read`] reads.
    #[inline]
    pub fn write(&self, lba: u64, buf: DmaBuf) -> Io<'_> {
        Io { ns: self, stage: Stage::Start { opcode: nvm::WRITE, lba, buf } }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`Error::Status`] and [`Error::Ended`], as for reads.
    pub async fn flush(&self) -> Result<()> {
        let sqe = Sqe { cdw0: u32::from(nvm::FLUSH).into(), nsid: self.info.nsid.into(), ..Sqe::default() };
        crate::command::run(&self.queue, sqe, None).await.0.map(drop)
    }

    /// The queue as a completion stream: a token a command, completions in batches. There is one at a time for a queue.
    ///
    /// # Errors
    /// [`Error::Invalid`] while there is another.
    pub fn stream(&self) -> Result<CommandStream> {
        CommandStream::new(self.clone())
    }

    /// Checks a transfer; its number of blocks.
    #[inline]
    pub(crate) fn check(&self, lba: u64, buf: &DmaBuf) -> Result<u64> {
        let len = buf.len();
        let blocks = (len >> self.shift) as u64;
        let fits = lba <= self.info.blocks && blocks <= self.info.blocks - lba;
        let whole = len & ((1 << self.shift) - 1) == 0;
        if len != 0 && whole && fits && buf.space_id() == self.queue.space_id {
            Ok(blocks)
        } else {
            Err(self.refuse(lba, buf))
        }
    }

    #[cold]
    fn refuse(&self, lba: u64, buf: &DmaBuf) -> Error {
        let (len, size, blocks) = (buf.len(), self.info.block_size, self.info.blocks);
        Error::Invalid(if len == 0 || !len.is_multiple_of(size as usize) {
            format!("a transfer of {len} bytes: it has to be a multiple of the block size, {size} bytes, and not 0")
        } else if buf.space_id() != self.queue.space_id {
            "the buffer is mapped for another device: allocate it from a pool of this device's address space".into()
        } else {
            format!("a transfer of {} blocks at {lba} is beyond the namespace's end at {blocks}", len / size as usize)
        })
    }

    /// The SQE of a read or write, but for its memory.
    #[inline]
    pub(crate) fn sqe(&self, opcode: u8, lba: u64, blocks: usize) -> Sqe {
        Sqe {
            cdw0: u32::from(opcode).into(),
            nsid: self.info.nsid.into(),
            cdw10: (lba as u32).into(),
            cdw11: ((lba >> 32) as u32).into(),
            cdw12: (blocks as u32 - 1).into(),
            ..Sqe::default()
        }
    }
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Namespace").field("queue", &self.queue.id).field("info", &self.info).finish()
    }
}

/// The future of a read or write.
#[must_use = "a command is submitted when it is first polled"]
pub struct Io<'a> {
    ns: &'a Namespace,
    stage: Stage,
}

enum Stage {
    Start {
        opcode: u8,
        lba: u64,
        buf: DmaBuf,
    },
    /// In the line for a slot.
    Queued {
        opcode: u8,
        lba: u64,
        buf: DmaBuf,
        ticket: Option<Ticket>,
    },
    Submitted(u16),
    Large(Box<Large>),
    Over,
}

impl Future for Io<'_> {
    type Output = (Result<()>, DmaBuf);

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Stage::Submitted(index) = self.stage else { return self.poll_start(cx) };
        let queue = &*self.ns.queue;
        match queue.take_done(index) {
            Some((outcome, Owned::Buffer(buf))) => {
                self.stage = Stage::Over;
                Poll::Ready((outcome.into_result().map(drop), buf))
            }
            _ if queue.dead.get() => self.poll_dead(index),
            _ => {
                queue.wait(index, cx);
                Poll::Pending
            }
        }
    }
}

impl Io<'_> {
    #[inline]
    fn poll_start(&mut self, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Start { opcode, lba, buf } => match self.ns.check(lba, &buf) {
                _ if queue.dead.get() => Poll::Ready((Err(queue.end_error()), buf)),
                Err(error) => Poll::Ready((Err(error), buf)),
                Ok(_) if buf.len() > self.ns.part_len => self.poll_large(Box::new(Large::new(opcode, lba, buf)), cx),
                Ok(_) if queue.permits.try_take() => self.submit(opcode, lba, buf, cx),
                Ok(_) => self.poll_queued(opcode, lba, buf, None, cx),
            },
            Stage::Queued { opcode, lba, buf, ticket } => self.poll_queued(opcode, lba, buf, ticket, cx),
            Stage::Large(large) => self.poll_large(large, cx),
            Stage::Submitted(_) | Stage::Over => panic!("a future is not polled after its end"),
        }
    }

    #[inline]
    fn submit(&mut self, opcode: u8, lba: u64, buf: DmaBuf, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        let (iova, len) = (buf.iova(), buf.len());
        let index =
            queue.start(self.ns.sqe(opcode, lba, len >> self.ns.shift), iova, len, State::Waiting, Owned::Buffer(buf));
        queue.wait(index, cx);
        self.stage = Stage::Submitted(index);
        Poll::Pending
    }

    fn poll_queued(
        &mut self,
        opcode: u8,
        lba: u64,
        buf: DmaBuf,
        mut ticket: Option<Ticket>,
        cx: &Context<'_>,
    ) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        if queue.dead.get() {
            if let Some(ticket) = ticket {
                queue.permits.leave(ticket);
            }
            return Poll::Ready((Err(queue.end_error()), buf));
        }
        if queue.permits.poll_take(&mut ticket, cx).is_ready() {
            return self.submit(opcode, lba, buf, cx);
        }
        self.stage = Stage::Queued { opcode, lba, buf, ticket };
        Poll::Pending
    }

    fn poll_large(&mut self, mut large: Box<Large>, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let poll = large.poll(self.ns, cx);
        if poll.is_pending() {
            self.stage = Stage::Large(large);
        }
        poll
    }

    /// The queue has ended with the command under way: its buffer stays in the slot.
    #[cold]
    fn poll_dead(&mut self, index: u16) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        let stand_in = queue.stand_in(index);
        queue.orphan(index);
        self.stage = Stage::Over;
        match stand_in {
            Some(buf) => Poll::Ready((Err(queue.end_error()), buf)),
            None => panic!("a future is not polled after its end"),
        }
    }
}

impl Drop for Io<'_> {
    fn drop(&mut self) {
        match &mut self.stage {
            Stage::Submitted(index) => self.ns.queue.orphan(*index),
            Stage::Queued { ticket: Some(ticket), .. } => self.ns.queue.permits.leave(*ticket),
            Stage::Large(large) => {
                if let Some(ticket) = large.ticket() {
                    self.ns.queue.permits.leave(ticket);
                }
            }
            _ => {}
        }
    }
}
