//! A namespace as a file of fixed size: bytes at any position, through the I/O traits of `futures` and tokio.

#[cfg(feature = "tokio")]
mod tokio;

use std::{
    fmt,
    io::{self, ErrorKind, SeekFrom},
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{
    future::LocalBoxFuture,
    io::{AsyncBufRead, AsyncRead, AsyncSeek, AsyncWrite},
};
use vfio_uring::dma::{DmaBuf, Pool};

use crate::{Error, Result, namespace::Namespace};

/// A namespace as a file of a fixed size, `blocks * block_size` bytes: [`AsyncRead`], [`AsyncBufRead`], [`AsyncWrite`] and
/// [`AsyncSeek`] of `futures`, and with the feature `tokio` of this crate tokio's, too. Positions count bytes and need not be
/// those of blocks.
///
/// **As a file.** A read at the end or beyond gives 0 bytes. A write that passes the end writes what fits; one at the end or
/// beyond fails with [`ErrorKind::StorageFull`]. A seek may go beyond the end; one before byte 0, or beyond 2^64 - 1, fails with
/// [`ErrorKind::InvalidInput`].
///
/// **What is buffered when.** One DMA buffer holds one range of the namespace.
/// - Reads fill it: in whole when they go on where the last one ended, else with the blocks that were asked for. Reads of what
///   it holds send no command. Where reading ahead fails, the block that was asked for is read alone.
/// - Writes go into it while they touch what it holds, in place or at its end. It is written back when a read or write needs
///   another range, at [`flush`](futures::AsyncWriteExt::flush) and at [`close`](futures::AsyncWriteExt::close), in one transfer
///   from the first block that was changed to the last. A block that was written in part is read first, where the rest of it is
///   not in the buffer: at most one block at each end of a sequence of writes.
/// - `flush` writes back, and then sends a Flush command if anything was written since the last one. `close` is a flush.
///
/// **Dropping the view loses what was not flushed**, as with a [`BufWriter`](std::io::BufWriter): no command can be awaited there.
///
/// The view takes the range that it holds for its own: what others write there, it does not see before its buffer moves or
/// [`NamespaceIo::discard`], and it may write the blocks between two changed ones with what it knows of them.
///
/// **Errors** are [`io::Error`]s with the driver's [`Error`] as their source. After one, the view is as before: the position has
/// not moved, and what was not written back is still there; the next flush, or the next access to another range, tries again.
/// [`NamespaceIo::discard`] gives it up. When the queue has ended, all that needs a command fails.
///
/// **Dropped futures.** A command under way belongs to the view, not to the future that asked for it: a read or write that is
/// dropped has moved nothing, and the next call goes on from there.
///
/// ```no_run
/// # async fn label(ns: vfio_uring_nvme::Namespace, pool: vfio_uring::dma::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// use futures::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
/// use std::io::SeekFrom;
///
/// let mut disk = ns.io(&pool, 256 << 10)?;
/// disk.seek(SeekFrom::Start(1000)).await?;
/// disk.write_all(b"between two blocks").await?;
/// disk.flush().await?;
///
/// disk.seek(SeekFrom::Current(-7)).await?;
/// let mut word = [0; 6];
/// disk.read_exact(&mut word).await?;
/// println!("{}", String::from_utf8_lossy(&word));
/// # Ok(()) }
/// ```
pub struct NamespaceIo {
    ns: Namespace,
    /// Of the namespace, in bytes.
    size: u64,
    /// Of a block.
    block: usize,
    /// Bytes of the buffer that are used: whole blocks.
    capacity: usize,
    position: u64,
    /// Where the buffer's first byte is in the namespace: the start of a block.
    base: u64,
    /// Bytes from `base` on that the buffer holds. They end inside of a block only where a write ended, so that `dirty` ends there.
    filled: usize,
    /// From the first byte of the buffer that was changed to the last.
    dirty: Range<usize>,
    /// A copy of what was written to a block while the rest of it is read.
    partial: Vec<u8>,
    /// Whether the next read is likely to want what follows.
    sequential: bool,
    /// Whether there were writes since the last Flush command.
    unflushed: bool,
    /// Here unless a transfer has it.
    buf: Option<DmaBuf>,
    under_way: Option<UnderWay>,
    /// Why the buffer did not come back.
    ended: Option<Error>,
}

/// A command of the view. It outlives the future that asked for it.
struct UnderWay {
    job: Job,
    future: LocalBoxFuture<'static, (Result<()>, Option<DmaBuf>)>,
}

#[derive(Clone, Copy)]
enum Job {
    /// Reads bytes from `base` on.
    Load(usize),
    /// Reads the block of which only the start was written.
    Complete,
    /// Writes the buffer up to here.
    WriteBack(usize),
    Flush,
}

/// What was under way failed.
struct Failed {
    job: Job,
    error: Error,
}

impl Namespace {
    /// The namespace as a file, with a buffer of `buffer_bytes` from `pool`, rounded up to whole blocks. 128 KiB to 1 MiB are
    /// good for sequential access.
    ///
    /// # Errors
    /// As of [`Pool::alloc`] and [`NamespaceIo::new`].
    pub fn io(&self, pool: &Pool, buffer_bytes: usize) -> Result<NamespaceIo> {
        // Where it overflows, the pool refuses the length as it is.
        let bytes = buffer_bytes.checked_next_multiple_of(self.block_size()).unwrap_or(buffer_bytes);
        NamespaceIo::new(self.clone(), pool.alloc(bytes)?)
    }
}

impl NamespaceIo {
    /// The view at position 0, with a buffer of a pool of the namespace's device. The whole blocks of its length are used.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for a buffer that is shorter than a block or of another device;
    /// [`vfio_uring::Error::Unsupported`] for a namespace whose bytes 64 bits can't count.
    pub fn new(ns: Namespace, buf: DmaBuf) -> Result<Self> {
        let block = ns.block_size();
        let Some(size) = ns.blocks().checked_mul(block as u64) else {
            let what = format!("a namespace of {} blocks of {block} bytes has more bytes than 64 bits count", ns.blocks());
            return Err(vfio_uring::Error::Unsupported { what }.into());
        };
        let capacity = buf.len() / block * block;
        if capacity == 0 {
            return Err(Error::invalid(format!(
                "a buffer of {} bytes: the view needs at least a block, {block}",
                buf.len()
            )));
        }
        ns.check_space(&buf)?;
        Ok(Self {
            ns,
            size,
            block,
            capacity,
            position: 0,
            base: 0,
            filled: 0,
            dirty: 0..0,
            partial: Vec::new(),
            sequential: true,
            unflushed: false,
            buf: Some(buf),
            under_way: None,
            ended: None,
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// Bytes of the namespace.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the next read or write starts.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether there is something that only a flush makes durable.
    pub fn is_dirty(&self) -> bool {
        self.unflushed || !self.dirty.is_empty()
    }

    /// Forgets what is buffered: writes that were not written back are lost, and the next read is of the namespace. It waits
    /// for the command under way, if there is one, and stays where it is.
    pub async fn discard(&mut self) {
        // Its error is of something that is forgotten now.
        drop(std::future::poll_fn(|cx| self.poll_under_way(cx)).await);
        (self.filled, self.dirty) = (0, 0..0);
    }

    /// Bytes of the buffer at the position, after reading them if there are none; of 0 bytes, it is the end. `want` is how many
    /// the caller has room for.
    fn poll_buffered(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<&[u8]>> {
        loop {
            let settled = ready!(self.poll_under_way(cx));
            self.check_ended()?;
            if self.position >= self.size || want == 0 {
                return Poll::Ready(Ok(&[]));
            }
            if let Some(at) = self.place(self.position).filter(|&at| at < self.filled) {
                let end = self.filled;
                return Poll::Ready(Ok(&self.bytes()[at..end]));
            }
            self.relevant(settled)?;
            if self.dirty.is_empty() {
                self.start_load(want);
            } else {
                self.start_write_back();
            }
        }
    }

    /// Moves over bytes that [`NamespaceIo::poll_buffered`] gave.
    fn advance(&mut self, bytes: usize) {
        let rest = (self.base + self.filled as u64).saturating_sub(self.position);
        self.position += rest.min(bytes as u64);
    }

    fn poll_copy_in(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let settled = ready!(self.poll_under_way(cx));
            self.check_ended()?;
            if data.is_empty() {
                return Poll::Ready(Ok(0));
            }
            if self.position >= self.size {
                let what = format!("a write at byte {}: the namespace has {}", self.position, self.size);
                return Poll::Ready(Err(io::Error::new(ErrorKind::StorageFull, what)));
            }
            if let Some(at) = self.place(self.position).filter(|&at| at < self.capacity) {
                let room = (self.capacity - at).min(usize::try_from(self.size - self.position).unwrap_or(usize::MAX));
                let len = data.len().min(room);
                self.bytes()[at..at + len].copy_from_slice(&data[..len]);
                self.filled = self.filled.max(at + len);
                self.dirty = match self.dirty.is_empty() {
                    true => at..at + len,
                    false => self.dirty.start.min(at)..self.dirty.end.max(at + len),
                };
                self.position += len as u64;
                return Poll::Ready(Ok(len));
            }
            self.relevant(settled)?;
            if !self.dirty.is_empty() {
                self.start_write_back();
            } else if self.position.is_multiple_of(self.block as u64) {
                (self.base, self.filled) = (self.position, 0);
            } else {
                // Of its first block, the part before the position is needed.
                self.sequential = false;
                self.start_load(1);
            }
        }
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let settled = ready!(self.poll_under_way(cx));
            self.check_ended()?;
            if let Err(Failed { job: Job::Complete | Job::WriteBack(_) | Job::Flush, error }) = settled {
                return Poll::Ready(Err(error.into()));
            }
            if !self.dirty.is_empty() {
                self.start_write_back();
            } else if self.unflushed {
                let ns = self.ns.clone();
                let future = Box::pin(async move { (ns.flush().await, None) });
                self.under_way = Some(UnderWay { job: Job::Flush, future });
            } else {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn move_to(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (to, what) = match to {
            SeekFrom::Start(position) => (Some(position), 0),
            SeekFrom::Current(by) => (self.position.checked_add_signed(by), by),
            SeekFrom::End(by) => (self.size.checked_add_signed(by), by),
        };
        let Some(to) = to else {
            let (position, size) = (self.position, self.size);
            let what = format!("a seek by {what} from byte {position} of {size} leaves the positions from 0 to 2^64 - 1");
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        };
        // What the buffer holds is read there, and then what follows.
        if to != self.position && self.place(to).is_none() {
            self.sequential = false;
        }
        self.position = to;
        Ok(to)
    }

    /// Where a position is in what the buffer holds, or right behind it.
    fn place(&self, position: u64) -> Option<usize> {
        let at = position.checked_sub(self.base)?;
        (at <= self.filled as u64).then_some(at as usize)
    }

    /// The buffer, while no command has it.
    fn bytes(&mut self) -> &mut [u8] {
        self.buf.as_deref_mut().unwrap_or_default()
    }

    /// The error of a command that a read or write asked for: of an earlier one elsewhere, which was dropped, it is none of its.
    fn relevant(&self, settled: Result<(), Failed>) -> io::Result<()> {
        match settled {
            Err(Failed { job: Job::Load(_), .. }) if self.base != self.block_of(self.position) => Ok(()),
            Err(Failed { job: Job::Flush, .. }) | Ok(()) => Ok(()),
            Err(Failed { error, .. }) => Err(error.into()),
        }
    }

    fn check_ended(&self) -> io::Result<()> {
        self.ended.clone().map_or(Ok(()), |error| Err(error.into()))
    }

    /// The start of a position's block.
    fn block_of(&self, position: u64) -> u64 {
        position - position % self.block as u64
    }

    /// Waits for the command under way, if there is one.
    fn poll_under_way(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        while let Some(under_way) = &mut self.under_way {
            let (result, buf) = ready!(under_way.future.as_mut().poll(cx));
            let job = under_way.job;
            self.under_way = None;
            if !matches!(job, Job::Flush) {
                let returned = buf.and_then(|mut buf| buf.set_len(self.capacity).is_ok().then_some(buf));
                if returned.is_none() {
                    (self.filled, self.dirty) = (0, 0..0);
                    self.ended = Some(result.clone().err().unwrap_or_else(|| Error::invalid("the view's buffer is gone")));
                }
                self.buf = returned;
            }
            match (job, result) {
                (Job::Load(len), Err(Error::Status(_))) if len > self.block => {
                    // What was read ahead may have a bad block; what was asked for need not.
                    self.start_transfer(Job::Load(self.block), self.block);
                }
                (job, Err(error)) => {
                    self.restore_partial(job);
                    return Poll::Ready(Err(Failed { job, error }));
                }
                (job, Ok(())) => {
                    self.restore_partial(job);
                    match job {
                        Job::Load(len) => (self.filled, self.sequential) = (len, true),
                        Job::Complete => self.filled = self.block,
                        Job::WriteBack(len) if len < self.dirty.end => self.dirty.start = len,
                        Job::WriteBack(_) => self.dirty = 0..0,
                        Job::Flush => self.unflushed = false,
                    }
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Puts what was written over what was read, or over what a failed command left.
    fn restore_partial(&mut self, job: Job) {
        if let (Job::Complete, Some(buf)) = (job, &mut self.buf) {
            buf[..self.partial.len()].copy_from_slice(&self.partial);
        }
    }

    /// Reads from the position's block on.
    fn start_load(&mut self, want: usize) {
        self.base = self.block_of(self.position);
        self.filled = 0;
        let before = (self.position - self.base) as usize;
        let len = if self.sequential { self.capacity } else { before.saturating_add(want).min(self.capacity) };
        let len = (len as u64).min(self.size - self.base) as usize;
        let len = len.next_multiple_of(self.block);
        self.start_transfer(Job::Load(len), len);
    }

    /// The next step in writing back.
    fn start_write_back(&mut self) {
        // A command takes the buffer from its start.
        let clean = self.dirty.start / self.block * self.block;
        if clean > 0 {
            let filled = self.filled;
            self.bytes().copy_within(clean..filled, 0);
            self.base += clean as u64;
            self.filled -= clean;
            self.dirty = self.dirty.start - clean..self.dirty.end - clean;
        }
        let whole = self.filled / self.block * self.block;
        if whole == 0 {
            let filled = self.filled;
            let mut partial = std::mem::take(&mut self.partial);
            partial.clear();
            partial.extend_from_slice(&self.bytes()[..filled]);
            self.partial = partial;
            self.start_transfer(Job::Complete, self.block);
        } else {
            let len = self.dirty.end.next_multiple_of(self.block).min(whole);
            self.unflushed = true;
            self.start_transfer(Job::WriteBack(len), len);
        }
    }

    fn start_transfer(&mut self, job: Job, len: usize) {
        let Some(mut buf) = self.buf.take() else { return };
        let (ns, lba) = (self.ns.clone(), self.base / self.block as u64);
        let future = Box::pin(async move {
            if let Err(error) = buf.set_len(len) {
                return (Err(error.into()), Some(buf));
            }
            let (result, buf) = match job {
                Job::WriteBack(_) => ns.write(lba, buf).await,
                _ => ns.read(lba, buf).await,
            };
            (result, Some(buf))
        });
        self.under_way = Some(UnderWay { job, future });
    }
}

impl fmt::Debug for NamespaceIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buffered = self.base..self.base + self.filled as u64;
        f.debug_struct("NamespaceIo")
            .field("ns", &self.ns)
            .field("position", &self.position)
            .field("buffered", &buffered)
            .field("dirty", &self.is_dirty())
            .finish_non_exhaustive()
    }
}

impl AsyncRead for NamespaceIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let bytes = ready!(self.poll_buffered(cx, buf.len()))?;
        let len = bytes.len().min(buf.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        self.advance(len);
        Poll::Ready(Ok(len))
    }
}

impl AsyncBufRead for NamespaceIo {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        self.get_mut().poll_buffered(cx, 1)
    }

    fn consume(mut self: Pin<&mut Self>, amt: usize) {
        self.advance(amt);
    }
}

impl AsyncWrite for NamespaceIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_copy_in(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_out(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_out(cx)
    }
}

impl AsyncSeek for NamespaceIo {
    fn poll_seek(mut self: Pin<&mut Self>, _: &mut Context<'_>, pos: SeekFrom) -> Poll<io::Result<u64>> {
        Poll::Ready(self.move_to(pos))
    }
}
