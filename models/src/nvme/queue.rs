//! Submission and completion queues in client memory.

use vfio_uring::dma::SharedMemory;

use super::spec::{Completion, Sqe};
use crate::device::{Host, Unmapped};

/// Entries that are taken from a submission queue at once.
pub(super) const BATCH: usize = 32;
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
    pub fn fetch(&mut self, most: u32, to: &mut [Sqe; BATCH], host: &mut impl Host) -> Result<usize, Unmapped> {
        let count = self.waiting().min(most).min(BATCH as u32).min(self.size - self.head) as usize;
        let at = self.base + u64::from(self.head) * SQE;
        if let Some((memory, offset)) = host.window(at, count * SQE as usize) {
            for (i, sqe) in to.iter_mut().take(count).enumerate() {
                *sqe = memory.read_obj(offset + i as u64 * SQE).map_err(|_| Unmapped)?;
            }
        } else {
            for (i, sqe) in to.iter_mut().take(count).enumerate() {
                host.read(at + i as u64 * SQE, zerocopy::IntoBytes::as_mut_bytes(sqe))?;
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
    head: u32,
    tail: u32,
    phase: bool,
    refused: u32,
}

impl CompletionQueue {
    pub fn new(id: u16, base: u64, size: u32, vector: Option<u16>) -> Self {
        Self { id, base, size, vector, users: 0, head: 0, tail: 0, phase: true, refused: 0 }
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

    /// Writes an entry; the caller has looked at [`CompletionQueue::room`].
    #[inline]
    pub fn post(&mut self, completion: &Completion, host: &mut impl Host) -> Result<(), Unmapped> {
        let at = self.base + u64::from(self.tail) * CQE;
        let dwords = completion.dwords(self.phase);
        if let Some((memory, offset)) = host.window(at, CQE as usize) {
            // The dword with the phase comes last, in release order.
            let first = u64::from(dwords[1]) << 32 | u64::from(dwords[0]);
            memory.store_u64(offset, first).map_err(|_| Unmapped)?;
            memory.store_u32(offset + 8, dwords[2]).map_err(|_| Unmapped)?;
            memory.store_u32(offset + 12, dwords[3]).map_err(|_| Unmapped)?;
        } else {
            let mut bytes = [0; CQE as usize];
            for (to, dword) in bytes.chunks_exact_mut(4).zip(dwords) {
                to.copy_from_slice(&dword.to_le_bytes());
            }
            host.write(at, &bytes)?;
        }
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }
}
