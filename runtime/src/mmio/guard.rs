//! The mappings whose faults are ours, and what is known of their faults.
//!
//! The signal handler looks a fault's address up while anything else may be going on, also in the thread it interrupts. So ranges
//! are in slots that are never freed, each written under a sequence number: one that changes during the look-up can't be of the
//! mapping that was accessed.

#![cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "there is no handler to look faults up"))]

use std::{
    fmt, ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence},
    },
};

use crate::Result;

/// Slots that are made at once.
const CHUNK: usize = 64;

/// Accesses to a mapping that found no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// How many there were.
    pub count: u64,
    /// Offset of the last in the mapping. A copy counts once, with the first byte that was not there.
    pub last: u64,
}

/// A range, and the latch of its faults.
#[derive(Debug)]
pub(super) struct Slot {
    /// Odd while the range changes.
    version: AtomicUsize,
    start: AtomicUsize,
    /// 0: not in use.
    len: AtomicUsize,
    count: AtomicU64,
    last: AtomicU64,
}

struct Chunk {
    slots: [Slot; CHUNK],
    next: *const Chunk,
}

/// All chunks. They are never freed.
static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(ptr::null_mut());
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }

    /// Sets the range. For the one owner of the slot.
    fn set(&self, start: usize, len: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The offset of an address in the range.
    fn offset(&self, address: usize) -> Option<u64> {
        let version = self.version.load(Ordering::Acquire);
        let (start, len) = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let steady = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        let offset = address.wrapping_sub(start);
        (steady && offset < len).then_some(offset as u64)
    }
}

/// Counts a fault at `address`, if that is in a guarded range. For a signal handler.
pub(super) fn latch(address: usize) -> bool {
    let mut next: *const Chunk = CHUNKS.load(Ordering::Acquire);
    // SAFETY: chunks are published whole and never freed.
    while let Some(chunk) = unsafe { next.as_ref() } {
        for slot in &chunk.slots {
            if let Some(offset) = slot.offset(address) {
                slot.last.store(offset, Ordering::Relaxed);
                slot.count.fetch_add(1, Ordering::Release);
                return true;
            }
        }
        next = chunk.next;
    }
    false
}

/// A guarded range of addresses: an access of ours to it that faults is latched here, and does not end the process.
pub(crate) struct Guard {
    slot: &'static Slot,
}

impl Guard {
    /// Guards a mapping that was made just now. To be dropped before it is unmapped.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when there can be no signal handler.
    pub fn new(start: usize, len: usize) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        super::signal::install()?;
        let slot = take_slot();
        slot.count.store(0, Ordering::Relaxed);
        slot.set(start, len);
        Ok(Self { slot })
    }

    /// The faults since they were taken last.
    pub fn take(&self) -> Option<Faults> {
        // A load, first: the line stays shared.
        if self.slot.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let count = self.slot.count.swap(0, Ordering::Acquire);
        (count != 0).then(|| Faults { count, last: self.slot.last.load(Ordering::Relaxed) })
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("faults", &self.slot.count).finish()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.set(0, 0);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

fn take_slot() -> &'static Slot {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = free.pop() {
        return slot;
    }
    let next = CHUNKS.load(Ordering::Relaxed);
    let chunk: &'static mut Chunk = Box::leak(Box::new(Chunk { slots: [const { Slot::new() }; CHUNK], next }));
    let chunk: &'static Chunk = chunk;
    free.extend(&chunk.slots[1..]);
    // Under the lock, so that no other chunk is lost. The handler only reads.
    CHUNKS.store(ptr::from_ref(chunk).cast_mut(), Ordering::Release);
    &chunk.slots[0]
}
