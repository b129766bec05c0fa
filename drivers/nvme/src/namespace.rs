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
    controller::Queue,
    large::Large,
    line::Ticket,
    queue::{QueuePair, Slot, State},
    remote::{Remote, RemoteRunner},
    spec::{Sqe, nvm},
    stream::CommandStream,
};

const FOREIGN: &str = "the buffer is mapped for another device: allocate it from a pool of this device's address space";

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
    /// The blocks below this can start any single command.
    safe_end: u64,
    /// The block size less one.
    mask: usize,
    /// Keeps the queue polled and its controller up.
    _handle: Queue,
}

impl Namespace {
    pub(crate) fn new(queue: Rc<QueuePair>, info: NamespaceInfo, handle: Queue) -> Result<Self> {
        if info.metadata != 0 {
            let what = format!("namespace {} has {} bytes of metadata a block; format it without", info.nsid, info.metadata);
            return Err(vfio_uring::Error::Unsupported { what }.into());
        }
        let shift = info.block_size.trailing_zeros();
        // Commands count blocks in 16 bits.
        let part_len = queue.max_transfer.min(0x10000usize << shift) >> shift << shift;
        if !info.block_size.is_power_of_two() || info.block_size < 512 || part_len == 0 {
            let what = format!(
                "namespace {} has blocks of {} bytes, which the transfer limit of {} bytes does not allow",
                info.nsid, info.block_size, queue.max_transfer
            );
            return Err(vfio_uring::Error::Unsupported { what }.into());
        }
        let safe_end = info.blocks.saturating_sub((part_len >> shift) as u64);
        Ok(Self { queue, info, shift, part_len, safe_end, mask: info.block_size as usize - 1, _handle: handle })
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
    /// [`vfio_uring::Error::Invalid`] for a length that is no multiple of the block size, a range beyond the end, or a buffer of another
    /// device; [`Error::Status`] when the controller says so; [`Error::Ended`] when the queue has ended.
    #[inline]
    pub fn read(&self, lba: u64, buf: DmaBuf) -> Io<'_> {
        Io::new(self, nvm::READ, lba, buf)
    }

    /// Writes `buf` to block `lba` and on, as [`Namespace::read`] reads.
    #[inline]
    pub fn write(&self, lba: u64, buf: DmaBuf) -> Io<'_> {
        Io::new(self, nvm::WRITE, lba, buf)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`Error::Status`] and [`Error::Ended`], as for reads.
    pub async fn flush(&self) -> Result<()> {
        let sqe = Sqe::new(nvm::FLUSH, self.info.nsid);
        crate::command::run(&self.queue, sqe, None).await.0.map(drop)
    }

    /// The queue as a completion stream: a token a command, completions in batches. There is one at a time for a queue.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] while there is another.
    pub fn stream(&self) -> Result<CommandStream> {
        CommandStream::new(self.clone())
    }

    /// The namespace for other threads: a handle that is `Send`, and the runner that has to run on this reactor. At most
    /// `capacity` of its requests are under way at once; those above the queue's depth wait in line for its slots.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for a capacity of 0 or above [`MAX_REMOTE`](crate::MAX_REMOTE).
    pub fn remote(&self, capacity: usize) -> Result<(Remote, RemoteRunner)> {
        Remote::new(self.clone(), capacity)
    }

    /// Whether a transfer is right and one command can carry it: the cheap test that nearly all pass. [`Namespace::check`] says
    /// what is wrong with the others, if anything is.
    #[inline(always)]
    pub(crate) fn fits_command(&self, lba: u64, buf: &DmaBuf) -> bool {
        let len = buf.len();
        // Of 0 bytes, the difference is huge.
        if len.wrapping_sub(1) >= self.part_len || len & self.mask != 0 {
            return false;
        }
        if lba >= self.safe_end {
            return false;
        }
        buf.space_id() == self.queue.space_id
    }

    /// Checks a transfer of any length.
    #[cold]
    pub(crate) fn check(&self, lba: u64, buf: &DmaBuf) -> Result<()> {
        let len = buf.len();
        let blocks = (len >> self.shift) as u64;
        let fits = lba <= self.info.blocks && blocks <= self.info.blocks - lba;
        let whole = len & self.mask == 0;
        if len != 0 && whole && fits && buf.space_id() == self.queue.space_id { Ok(()) } else { Err(self.refuse(lba, buf)) }
    }

    /// Refuses a buffer of another device.
    pub(crate) fn check_space(&self, buf: &DmaBuf) -> Result<()> {
        if buf.space_id() == self.queue.space_id { Ok(()) } else { Err(Error::invalid(FOREIGN)) }
    }

    #[cold]
    fn refuse(&self, lba: u64, buf: &DmaBuf) -> Error {
        let (len, size, blocks) = (buf.len(), self.info.block_size, self.info.blocks);
        Error::invalid(if len == 0 || !len.is_multiple_of(size as usize) {
            format!("a transfer of {len} bytes: it has to be a multiple of the block size, {size} bytes, and not 0")
        } else if buf.space_id() != self.queue.space_id {
            FOREIGN.into()
        } else {
            format!("a transfer of {} blocks at {lba} is beyond the namespace's end at {blocks}", len / size as usize)
        })
    }

    /// The SQE of a read or write, but for its memory.
    #[inline(always)]
    pub(crate) fn sqe(&self, opcode: u8, lba: u64, blocks: usize) -> Sqe {
        Sqe::new(opcode, self.info.nsid).dwords10(lba as u32, (lba >> 32) as u32).dword12(blocks as u32 - 1)
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
    lba: u64,
    /// Here until the command is submitted.
    buf: Option<DmaBuf>,
    slow: Option<Box<Slow>>,
    stage: Stage,
    index: u16,
    opcode: u8,
}

#[derive(Clone, Copy)]
enum Stage {
    Start,
    Submitted,
    Slow,
    Over,
}

/// What does not go straight to a slot.
enum Slow {
    /// In the line for one.
    Queued(Option<Ticket>),
    Large(Large),
}

impl Future for Io<'_> {
    type Output = (Result<()>, DmaBuf);

    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let queue = &*this.ns.queue;
        if let Stage::Submitted = this.stage {
            let slot = queue.slot(this.index);
            if slot.state.get() == State::Done
                && let Some(buf) = slot.buf.take()
            {
                this.stage = Stage::Over;
                let outcome = slot.outcome();
                queue.free_this(this.index, slot);
                return Poll::Ready((outcome, buf));
            }
            return this.poll_again(cx);
        }
        if let Stage::Start = this.stage {
            let Some(buf) = this.buf.take() else { over() };
            if this.ns.fits_command(this.lba, &buf)
                && let Some(taken) = queue.take_slot()
            {
                this.submit(taken, buf, cx);
                return Poll::Pending;
            }
            return this.poll_aside(buf, cx);
        }
        this.poll_slow(cx)
    }
}

#[cold]
fn over() -> ! {
    panic!("a future is not polled after its end")
}

impl<'a> Io<'a> {
    #[inline]
    fn new(ns: &'a Namespace, opcode: u8, lba: u64, buf: DmaBuf) -> Self {
        Self { ns, lba, buf: Some(buf), slow: None, stage: Stage::Start, index: 0, opcode }
    }

    /// Submits the command in the slot that was taken.
    #[inline(always)]
    fn submit(&mut self, (index, slot): (u16, &Slot), buf: DmaBuf, cx: &Context<'_>) {
        let queue = &*self.ns.queue;
        let (prp1, prp2) = queue.prps(index, buf.iova(), buf.len());
        let sqe = self.ns.sqe(self.opcode, self.lba, buf.len() >> self.ns.shift).prps(prp1, prp2);
        queue.start(slot, sqe, State::Waiting);
        slot.put(buf);
        slot.first_wait(cx);
        self.index = index;
        self.stage = Stage::Submitted;
    }

    /// The first poll of what can't be submitted at once.
    #[cold]
    fn poll_aside(&mut self, buf: DmaBuf, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        self.stage = Stage::Over;
        if queue.dead.get() {
            return Poll::Ready((Err(queue.end_error()), buf));
        }
        if let Err(error) = self.ns.check(self.lba, &buf) {
            return Poll::Ready((Err(error), buf));
        }
        self.slow = Some(Box::new(if buf.len() > self.ns.part_len {
            Slow::Large(Large::new(self.opcode, self.lba, buf))
        } else {
            // No slot is free, or the transfer ends so close to the namespace's end that the quick test turned it away.
            self.buf = Some(buf);
            Slow::Queued(None)
        }));
        self.stage = Stage::Slow;
        self.poll_slow(cx)
    }

    #[cold]
    fn poll_slow(&mut self, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        let result = match self.slow.as_deref_mut() {
            Some(Slow::Large(large)) => large.poll(self.ns, cx),
            Some(Slow::Queued(ticket)) => {
                if queue.dead.get() {
                    queue.leave_line(ticket);
                    let Some(buf) = self.buf.take() else { over() };
                    Poll::Ready((Err(queue.end_error()), buf))
                } else if let Poll::Ready(index) = queue.poll_slot(ticket, cx) {
                    let Some(buf) = self.buf.take() else { over() };
                    self.slow = None;
                    self.submit((index, queue.slot(index)), buf, cx);
                    return Poll::Pending;
                } else {
                    Poll::Pending
                }
            }
            None => over(),
        };
        if result.is_ready() {
            self.slow = None;
            self.stage = Stage::Over;
        }
        result
    }

    /// The command is still under way. If the queue has ended, its buffer stays in the slot.
    #[cold]
    fn poll_again(&mut self, cx: &Context<'_>) -> Poll<<Self as Future>::Output> {
        let queue = &*self.ns.queue;
        if !queue.dead.get() {
            queue.wait(self.index, cx);
            return Poll::Pending;
        }
        let Some(buf) = queue.stand_in(self.index) else { over() };
        queue.orphan(self.index);
        self.stage = Stage::Over;
        Poll::Ready((Err(queue.end_error()), buf))
    }
}

impl Drop for Io<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if !matches!(self.stage, Stage::Over) {
            self.abandon();
        }
    }
}

impl Io<'_> {
    /// The buffer of a future that is dropped next: the one that it was given if the controller does not have it, else what stands
    /// in for it.
    pub(crate) fn give_up(&mut self) -> Option<DmaBuf> {
        let queue = &*self.ns.queue;
        match (self.stage, self.slow.as_deref_mut()) {
            (Stage::Submitted, _) if queue.slot(self.index).state.get() == State::Done => queue.slot(self.index).buf.take(),
            (Stage::Submitted, _) => queue.stand_in(self.index),
            (Stage::Slow, Some(Slow::Large(large))) => Some(large.give_up()),
            _ => self.buf.take(),
        }
    }

    #[cold]
    fn abandon(&mut self) {
        match self.stage {
            Stage::Submitted => self.ns.queue.orphan(self.index),
            Stage::Slow => match self.slow.as_deref_mut() {
                Some(Slow::Queued(ticket)) => self.ns.queue.leave_line(ticket),
                Some(Slow::Large(large)) => large.leave(self.ns),
                None => {}
            },
            Stage::Start | Stage::Over => {}
        }
    }
}
