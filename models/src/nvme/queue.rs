//! Submission and completion queues in client memory.

use vfio_uring::dma::SharedMemory;

use super::spec::{Completion, Sqe};
use crate::device::{Host, Unmapped};

/// Entries that are taken from a submission queue at once.
pub(super) const BATCH: usize = 64;
const SQE: u64 = 64;
const CQE: u64 = 16;

/// What a look at a doorbell gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    Fine,
    /// A value outside of the queue, seen for the first time.
    Invalid,
}

/// A submission queue.
#[derive(Debug)]
pub(super) struct SubmissionQueue {
    pub id: u16,
    pub cq: u16,
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    /// The last invalid value of the doorbell, so that it is reported once.
    refused: u32,
}

impl SubmissionQueue {
    pub fn new(id: u16, cq: u16, base: u64, size: u32) -> Self {
        Self { id, cq, base, size, head: 0, tail: 0, refused: 0 }
    }

    /// Where its doorbell is in the doorbell area.
    #[inline]
    pub fn doorbell(id: u16) -> u64 {
        u64::from(id) * 8
    }

    /// Takes the doorbell's value.
    #[inline]
    pub fn look(&mut self, doorbells: &SharedMemory) -> Look {
        let Ok(tail) = doorbells.load_u32(Self::doorbell(self.id)) else { return Look::Fine };
        if tail == self.tail {
            return Look::Fine;
        }
        if tail >= self.size {
            let new = tail != self.refused;
            self.refused = tail;
            return if new { Look::Invalid } else { Look::Fine };
        }
        self.refused = 0;
        self.tail = tail;
        Look::Fine
    }

    /// Entries that wait.
    #[inline]
    pub fn waiting(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.size - self.head + self.tail }
    }

    /// Copies entries out, up to the end of the ring, and moves the head past them; how many.
    #[inline]
    pub fn fetch(&mut self, most: u32, to: &mut [Sqe], host: &mut impl Host) -> Result<usize, Unmapped> {
        let count = self.waiting().min(most).min(self.size - self.head) as usize;
        let count = count.min(to.len());
        let at = self.base.wrapping_add(u64::from(self.head) * SQE);
        if let Some((memory, offset)) = host.window(at, count * SQE as usize) {
            for (i, sqe) in to.iter_mut().take(count).enumerate() {
                *sqe = Sqe(memory.read_obj(offset + i as u64 * SQE).map_err(|_| Unmapped)?);
            }
        } else {
            for (i, sqe) in to.iter_mut().take(count).enumerate() {
                host.read(at.wrapping_add(i as u64 * SQE), zerocopy::IntoBytes::as_mut_bytes(sqe))?;
            }
        }
        self.head += count as u32;
        if self.head == self.size {
            self.head = 0;
        }
        Ok(count)
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    pub id: u16,
    pub base: u64,
    pub size: u32,
    /// The vector to signal, when interrupts are enabled for the queue.
    pub vector: Option<u16>,
    /// Submission queues that complete here.
    pub users: u32,
    /// Completions were posted that the client is to be told of.
    pub signal: bool,
    head: u32,
    tail: u32,
    phase: bool,
    refused: u32,
}

impl CompletionQueue {
    pub fn new(id: u16, base: u64, size: u32, vector: Option<u16>) -> Self {
        Self { id, base, size, vector, users: 0, signal: false, head: 0, tail: 0, phase: true, refused: 0 }
    }

    #[inline]
    fn used(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.size - self.head + self.tail }
    }

    /// Takes the doorbell's value.
    pub fn look(&mut self, doorbells: &SharedMemory) -> Look {
        let Ok(head) = doorbells.load_u32(u64::from(self.id) * 8 + 4) else { return Look::Fine };
        if head == self.head {
            return Look::Fine;
        }
        let freed = if head >= self.head { head - self.head } else { (self.size + head).wrapping_sub(self.head) };
        if head >= self.size || freed > self.used() {
            let new = head != self.refused;
            self.refused = head;
            return if new { Look::Invalid } else { Look::Fine };
        }
        self.refused = 0;
        self.head = head;
        Look::Fine
    }

    /// Entries that can be written without touching one that the client has not consumed.
    #[inline]
    pub fn room(&self) -> u32 {
        self.size - 1 - self.used()
    }

    /// Writes entries; the caller has looked at [`CompletionQueue::room`].
    #[inline]
    pub fn post(&mut self, completions: &[Completion], host: &mut impl Host) -> Result<(), Unmapped> {
        let mut rest = completions;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min((self.size - self.tail) as usize));
            self.post_run(now, host)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes entries that lie before the end of the ring.
    #[inline]
    fn post_run(&mut self, completions: &[Completion], host: &mut impl Host) -> Result<(), Unmapped> {
        let at = self.base.wrapping_add(u64::from(self.tail) * CQE);
        if let Some((memory, offset)) = host.window(at, completions.len() * CQE as usize) {
            for (i, completion) in completions.iter().enumerate() {
                let offset = offset + i as u64 * CQE;
                let [low, high] = completion.quads(self.phase);
                // The half with the phase comes last, in release order.
                memory.store_u64(offset, low).map_err(|_| Unmapped)?;
                memory.store_u64(offset + 8, high).map_err(|_| Unmapped)?;
            }
        } else {
            for (i, completion) in completions.iter().enumerate() {
                let [low, high] = completion.quads(self.phase);
                let bytes = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
                host.write(at.wrapping_add(i as u64 * CQE), &bytes)?;
            }
        }
        self.tail += completions.len() as u32;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }
}
