//! What a program keeps of a device's fault queue.

use std::{
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};
use vfio_uring::fault::{Fault, Reason, Unrecoverable, abi::Record};

use super::permissions;

/// Answers that are remembered.
const REMEMBERED: usize = 4096;

/// A word of a header, for lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Word {
    /// The version of the two-region form, the tail of the single one.
    First = 0,
    /// Entries of the two-region form, bytes of an entry of the single one.
    Second = 1,
    /// Bytes of an entry of the two-region form, entries of the single one.
    Third = 2,
    /// Where the queue starts.
    Offset = 3,
    /// Where the next record goes to.
    Produced = 4,
    /// Records that were lost.
    Lost = 5,
}

/// What a queue has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records that were stored.
    pub stored: u64,
    /// Records that there was no room for.
    pub lost: u64,
    /// Records that came before there was a version.
    pub unheard: u64,
    /// Answers that were taken.
    pub answers: u64,
}

/// An answer that the client gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenAnswer {
    /// The process address space, if it has one.
    pub pasid: Option<u32>,
    /// The page request group index.
    pub group: u32,
    /// 0 success, 1 invalid, 2 failure.
    pub code: u32,
}

#[derive(Debug, Default)]
struct Knobs {
    faulting: Vec<RangeInclusive<u64>>,
    asks: bool,
    stalled: bool,
    raise: Vec<Record>,
    /// So many more faults, at ascending addresses.
    storm: u64,
    next: u64,
    rewrites: Vec<(u32, Vec<u8>)>,
    words: [Option<u32>; 6],
    counters: Counters,
    answers: Vec<GivenAnswer>,
}

#[derive(Debug)]
struct Shared {
    knobs: Mutex<Knobs>,
    /// There is something for the device to do.
    pending: AtomicBool,
    /// Some addresses are to fail.
    forbids: AtomicBool,
    wake: OwnedFd,
}

/// Makes a device fault, and sees what becomes of that, from any thread. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// One for a new device.
    ///
    /// # Errors
    /// When no eventfd is to be had.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared {
            knobs: Mutex::default(),
            pending: AtomicBool::new(false),
            forbids: AtomicBool::new(false),
            wake,
        })))
    }

    fn knobs(&self) -> MutexGuard<'_, Knobs> {
        self.0.knobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, what: impl FnOnce(&mut Knobs)) {
        what(&mut self.knobs());
        self.0.pending.store(true, Ordering::Release);
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// Accesses to these addresses fail from now on, mapped or not.
    pub fn fault_on(&self, iovas: RangeInclusive<u64>) {
        self.knobs().faulting.push(iovas);
        self.0.forbids.store(true, Ordering::Release);
    }

    /// No address fails but for being unmapped.
    pub fn fault_on_none(&self) {
        self.0.forbids.store(false, Ordering::Release);
        self.knobs().faulting.clear();
    }

    /// Whether the device asks for pages that are missing and waits for the answer, in place of an unrecoverable fault. It needs a
    /// queue of answers.
    pub fn ask_for_pages(&self, on: bool) {
        self.knobs().asks = on;
    }

    /// Has the device take no answers, or go on with it.
    pub fn stall_answers(&self, on: bool) {
        self.ask(|knobs| knobs.stalled = on);
    }

    /// Raises faults.
    pub fn raise(&self, records: impl IntoIterator<Item = Record>) {
        self.ask(|knobs| knobs.raise.extend(records));
    }

    /// Raises `count` unrecoverable faults. Their addresses are those of pages, the number of such a fault, from 0 on, times 4096.
    pub fn storm(&self, count: u64) {
        self.ask(|knobs| knobs.storm += count);
    }

    /// Overwrites an entry of the queue, whatever state it is in.
    pub fn rewrite(&self, slot: u32, bytes: &[u8]) {
        self.ask(|knobs| knobs.rewrites.push((slot, bytes.to_vec())));
    }

    /// Says something else in a word of the header; `None`: the truth again.
    pub fn lie(&self, word: Word, value: Option<u32>) {
        self.knobs().words[word as usize] = value;
    }

    /// What became of all this so far.
    pub fn counters(&self) -> Counters {
        self.knobs().counters
    }

    /// The answers of the client so far, the first 4096 of them.
    pub fn answers(&self) -> Vec<GivenAnswer> {
        self.knobs().answers.clone()
    }

    /// Readable when there is something for the device to do.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    pub(super) fn is_pending(&self) -> bool {
        self.0.pending.load(Ordering::Acquire)
    }

    /// What is to be done: records to store, at most about `most`, and entries to overwrite.
    pub(super) fn take(&self, most: u64) -> (Vec<Record>, Vec<(u32, Vec<u8>)>) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.wake, &mut count);
        let knobs = &mut *self.knobs();
        let mut records = std::mem::take(&mut knobs.raise);
        let storm = knobs.storm.min(most);
        records.extend((knobs.next..knobs.next + storm).map(numbered));
        knobs.next += storm;
        knobs.storm -= storm;
        self.0.pending.store(knobs.storm != 0, Ordering::Release);
        (records, std::mem::take(&mut knobs.rewrites))
    }

    pub(super) fn count(&self, what: impl FnOnce(&mut Counters)) {
        what(&mut self.knobs().counters);
    }

    pub(super) fn answered(&self, answer: GivenAnswer) {
        let mut knobs = self.knobs();
        knobs.counters.answers += 1;
        if knobs.answers.len() < REMEMBERED {
            knobs.answers.push(answer);
        }
    }

    pub(super) fn lies(&self, words: &mut [[u8; 4]; 6]) {
        for (word, lie) in words.iter_mut().zip(&self.knobs().words) {
            if let Some(lie) = lie {
                *word = lie.to_le_bytes();
            }
        }
    }

    pub(super) fn forbids(&self, iova: u64, len: usize) -> bool {
        // Devices ask for each access.
        if !self.0.forbids.load(Ordering::Acquire) {
            return false;
        }
        let last = iova.saturating_add((len as u64).saturating_sub(1));
        self.knobs().faulting.iter().any(|range| *range.start() <= last && iova <= *range.end())
    }

    pub(super) fn asks(&self) -> bool {
        self.knobs().asks
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.knobs().stalled
    }
}

/// A fault of [`Handle::storm`].
fn numbered(number: u64) -> Record {
    let fault = Unrecoverable {
        reason: Reason::PteFetch,
        pasid: None,
        permissions: permissions(true),
        address: Some(number << 12),
        fetch_address: None,
    };
    Record { lost: 0, fault: Fault::Unrecoverable(fault), last: true }
}
