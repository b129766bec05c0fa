//! The gate of a device: who may access it at present, and how many do.
//!
//! While a device is reset or changes its power state, the kernel holds a lock of it, and whoever accesses the device sleeps until
//! that is over: 100 ms and more, where no signal reaches. The gate has accesses fail at once instead.
//!
//! Accesses by message or system call enter the gate and leave it, which is one atomic instruction each. Whoever closes the gate
//! waits for those inside. Accesses to mapped registers are loads and stores that know nothing of a gate, and they pay nothing:
//! while the gate is closed the mappings themselves are gone. [`SharedMemory::withdraw`] replaces each in place, in one step, by
//! one that raises SIGBUS; the fixup of [`mmio`](crate::mmio) makes all ones of that, and a latched fault. Replacing waits for page
//! faults that are under way, and for all processors to forget the old pages: after it, no access of ours is in the kernel. The
//! memory is mapped back, in place, before the device is live again. For a device that is gone it never is, which also lets the
//! kernel's device go while registers of it are still held.

mod areas;
mod closed;
mod wait;

use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
};

use slab::Slab;

use crate::{Error, Result, dma::SharedMemory, pci::Bdf, transport::group::GroupFd};

use areas::Areas;
pub(crate) use closed::{Closed, Outcome, Reset};
pub(crate) use wait::Ended;
pub use wait::{StateChange, StateChanges};

/// What can be done with a device at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Everything.
    Live,
    /// It is being reset: every access fails at once.
    Resetting,
    /// Its memory does not answer: its memory decoding is off, it sleeps, or it could not be mapped again. Configuration space does
    /// answer, so that this can be changed.
    Unavailable,
    /// Nothing, for ever.
    Gone,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Resetting => "resetting",
            Self::Unavailable => "unavailable",
            Self::Gone => "gone",
        })
    }
}

/// Why a device is not live: bits of the gate's word.
pub(crate) mod why {
    pub(crate) const GONE: u64 = 1 << 0;
    pub(crate) const RESETTING: u64 = 1 << 1;
    /// Its power or its decoding of memory is about to change.
    pub(crate) const CHANGING: u64 = 1 << 2;
    pub(crate) const MEMORY_OFF: u64 = 1 << 3;
    /// In D3hot.
    pub(crate) const SLEEPING: u64 = 1 << 4;
    /// The kernel may let it sleep.
    pub(crate) const LOW_POWER: u64 = 1 << 5;
    /// A mapping did not come back.
    pub(crate) const UNMAPPED: u64 = 1 << 6;

    pub(super) const UNAVAILABLE: u64 = CHANGING | MEMORY_OFF | SLEEPING | LOW_POWER | UNMAPPED;
    /// Somebody waits for those inside.
    pub(super) const CLOSED: u64 = RESETTING | CHANGING;
}

/// One access inside, in the word.
const ONE: u64 = 1 << 32;

/// What is accessed by messages or system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// The device's memory.
    Memory,
    /// Configuration space, interrupts, and what the kernel or server keeps for the device.
    Control,
}

impl Access {
    /// What it fails for. In low power the kernel wakes the device for it, and it needs no mapping.
    const fn refused_for(self) -> u64 {
        match self {
            Self::Memory => why::GONE | why::CLOSED | why::MEMORY_OFF | why::SLEEPING,
            Self::Control => why::GONE | why::RESETTING,
        }
    }
}

/// See the [module](self).
#[repr(C, align(64))]
pub(crate) struct Gate {
    /// Accesses inside above bit 32, [`why`] below.
    word: AtomicU64,
    /// Resets that the device went through.
    generation: AtomicU64,
    /// The last of them that is known to have taken place.
    confirmed: AtomicU64,
    id: u64,
    name: Arc<str>,
    bdf: Option<Bdf>,
    /// For what the mappings are taken away.
    away: u64,
    waiting: Mutex<Slab<Waker>>,
    areas: Mutex<Areas>,
    group: Mutex<Option<GroupFd>>,
    cause: OnceLock<Error>,
    /// One reset or change of power at a time.
    turn: Arc<futures::lock::Mutex<()>>,
}

/// The gates of all devices of the kernel that this process has open.
static OPEN: Mutex<Vec<Weak<Gate>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.word.load(Ordering::Relaxed);
        f.debug_struct("Gate").field("device", &self.name).field("state", &state_of(word)).finish_non_exhaustive()
    }
}

impl Gate {
    /// The gate of a vfio-user device. Its server knows nothing of our mappings, so they also go while its memory is switched off.
    pub(crate) fn of_user(name: &str) -> Arc<Self> {
        Arc::new(Self::new(name, None, why::GONE | why::CLOSED | why::MEMORY_OFF | why::SLEEPING))
    }

    /// The gate of a device of the kernel, which is found by its address from now on.
    pub(crate) fn of_kernel(bdf: Bdf, group: Option<GroupFd>) -> Arc<Self> {
        let mut gate = Self::new(&bdf.to_string(), Some(bdf), why::GONE | why::CLOSED);
        gate.group = Mutex::new(group);
        // Opened a second time, it is as it was.
        let lasting = why::MEMORY_OFF | why::SLEEPING | why::LOW_POWER;
        let now = Self::at(bdf).iter().fold(0, |now, other| now | other.word.load(Ordering::SeqCst) & lasting);
        gate.word = AtomicU64::new(now);
        let gate = Arc::new(gate);
        let mut open = lock(&OPEN);
        open.retain(|gate| gate.strong_count() != 0);
        open.push(Arc::downgrade(&gate));
        gate
    }

    fn new(name: &str, bdf: Option<Bdf>, away: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            word: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            bdf,
            away,
            waiting: Mutex::default(),
            areas: Mutex::default(),
            group: Mutex::default(),
            cause: OnceLock::new(),
            turn: Arc::default(),
        }
    }

    /// The gates of the device at an address: of each time that this process has it open.
    pub(crate) fn at(bdf: Bdf) -> Vec<Arc<Self>> {
        let open = lock(&OPEN);
        open.iter().filter_map(Weak::upgrade).filter(|gate| gate.bdf == Some(bdf) && !gate.is_gone()).collect()
    }

    /// All gates of the same device: of each time that this process has it open.
    pub(crate) fn family(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let mut family = self.bdf.map(Self::at).unwrap_or_default();
        family.push(self.clone());
        family
    }

    /// A group, if a device was opened by it.
    pub(crate) fn of_group(number: u32) -> Option<GroupFd> {
        let open = lock(&OPEN);
        let mut groups = open.iter().filter_map(Weak::upgrade).filter_map(|gate| lock(&gate.group).clone());
        groups.find(|group| group.number() == number)
    }

    pub(crate) fn has(&self, why: u64) -> bool {
        self.word.load(Ordering::Acquire) & why != 0
    }

    #[inline]
    pub(crate) fn is_gone(&self) -> bool {
        self.word.load(Ordering::Relaxed) & why::GONE != 0
    }

    pub(crate) fn state(&self) -> State {
        state_of(self.word.load(Ordering::Acquire))
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Acquire)
    }

    /// Why the device is gone, if it is.
    pub(crate) fn cause(&self) -> Option<Error> {
        if self.is_gone() { Some(self.cause.get().cloned().unwrap_or_else(unknown)) } else { None }
    }

    /// Goes in, if that is possible now; out when what is given is dropped.
    #[inline]
    pub(crate) fn enter(&self, access: Access) -> Result<Inside<'_>> {
        // Those that are refused are never counted: who waits for those inside must not wait for them as well.
        let go = |word: u64| (word & access.refused_for() == 0).then_some(word + ONE);
        match self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, go) {
            Ok(_) => Ok(Inside(self)),
            Err(word) => Err(self.refusal(word)),
        }
    }

    /// Why an access is refused.
    #[cold]
    fn refusal(&self, word: u64) -> Error {
        let reason = match word {
            _ if word & why::GONE != 0 => {
                return match self.cause.get().cloned().unwrap_or_else(unknown) {
                    gone @ Error::Gone { .. } => gone,
                    cause => Error::Gone { reason: cause.to_string().into() },
                };
            }
            _ if word & why::RESETTING != 0 => "it is being reset; wait until its state is live again",
            _ if word & why::CHANGING != 0 => {
                "its power or its memory decoding is being changed; wait until its state is live again"
            }
            _ if word & why::SLEEPING != 0 => "it sleeps in D3hot; wake it with set_power(D0), or reset it",
            _ if word & why::MEMORY_OFF != 0 => "its memory decoding (COMMAND.MEM) is off; switch it on with set_memory",
            _ if word & why::LOW_POWER != 0 => "it is in low power; end that with exit_low_power",
            _ => "its registers could not be mapped again; reset it, or open it again",
        };
        Error::Unavailable { state: state_of(word), reason }
    }

    /// Waits until the device is live.
    pub(crate) async fn live(self: &Arc<Self>) -> Result<()> {
        wait::live(self).await
    }

    /// Something that kept the device from being live is over.
    pub(crate) fn lift(&self, why: u64) {
        self.word.fetch_and(!why, Ordering::SeqCst);
        self.wake();
    }

    /// The device is gone, for ever: its mappings too. For a device of the kernel not on the reactor's thread: taking a mapping away
    /// waits for the page faults in it, which may wait for a reset by another process.
    pub(crate) fn end(&self, cause: Error) {
        let _ = self.cause.set(cause);
        if self.word.fetch_or(why::GONE, Ordering::SeqCst) & why::GONE == 0 {
            if let Err(error) = self.settle(0) {
                tracing::warn!(device = &*self.name, %error, "a mapping of a device that is gone could not be taken away");
            }
            self.wake();
        }
    }

    /// The device is closed, here: nothing of it is kept open by those who still look at the gate. Mappings stay with their owners.
    pub(crate) fn close_for_good(&self) {
        let _ = self.cause.set(Error::Gone { reason: "it was closed".into() });
        self.word.fetch_or(why::GONE, Ordering::SeqCst);
        lock(&self.areas).forget();
        lock(&self.group).take();
        self.wake();
    }

    /// Maps a part of the device's memory, which the gate takes away while that can't be accessed. `file` at `offset` is what is
    /// mapped.
    pub(crate) fn map(
        &self,
        file: &Arc<OwnedFd>,
        offset: u64,
        map: impl FnOnce() -> Result<SharedMemory>,
    ) -> Result<Arc<SharedMemory>> {
        let mut areas = lock(&self.areas);
        let memory = Arc::new(map()?);
        areas.add(&memory, file, offset);
        areas.settle(self.word.load(Ordering::SeqCst) & self.away != 0)?;
        Ok(memory)
    }

    /// Takes the mappings away or back, whichever fits the state without `lifted`.
    fn settle(&self, lifted: u64) -> Result<()> {
        let mut areas = lock(&self.areas);
        let away = self.word.load(Ordering::SeqCst) & !lifted & self.away != 0;
        areas.settle(away)
    }

    /// Wakes whoever waits for a state, or for those inside.
    fn wake(&self) {
        let wakers: Vec<_> = lock(&self.waiting).iter().map(|(_, waker)| waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }
}

fn state_of(word: u64) -> State {
    match word {
        _ if word & why::GONE != 0 => State::Gone,
        _ if word & why::RESETTING != 0 => State::Resetting,
        _ if word & why::UNAVAILABLE != 0 => State::Unavailable,
        _ => State::Live,
    }
}

fn unknown() -> Error {
    Error::Gone { reason: "it was given up".into() }
}

/// An access that is inside.
pub(crate) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        let word = self.0.word.fetch_sub(ONE, Ordering::SeqCst);
        if word >> 32 == 1 && word & why::CLOSED != 0 {
            self.0.wake();
        }
    }
}

#[cfg(test)]
mod tests;
