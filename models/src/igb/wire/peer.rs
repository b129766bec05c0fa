//! A cable between two NICs of this process: a ring of frames in each direction, and a ring for each to bring them back.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    time::Duration,
};

use rtrb::{Consumer, Producer, RingBuffer};
use rustix::event::{EventfdFlags, eventfd};

use super::{Frame, Room, within};
use crate::{
    device::Rest,
    igb::{Cause, Handle, spec::MAX_FRAME},
};

/// What the other end has to know of an end.
#[derive(Debug)]
struct End {
    /// There is a NIC whose PHY has power.
    up: AtomicBool,
    /// The cable, which may be pulled while nobody looks after the NIC.
    cable: OnceLock<Handle>,
    open: AtomicBool,
    /// It wants the other end to wait when there is no room.
    pause: AtomicBool,
    /// It sleeps and is woken by `wake`.
    asleep: AtomicBool,
    wake: OwnedFd,
    missed: AtomicU64,
}

impl End {
    fn new() -> io::Result<Self> {
        Ok(Self {
            up: AtomicBool::new(true),
            cable: OnceLock::new(),
            open: AtomicBool::new(false),
            pause: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            missed: AtomicU64::new(0),
        })
    }
}

/// One end of a cable; see [`Wire::peers`](super::Wire::peers).
#[derive(Debug)]
pub struct Peer {
    ours: Arc<End>,
    theirs: Arc<End>,
    /// What we send, and its memory when it comes back.
    out: Producer<Frame>,
    back: Consumer<Frame>,
    /// What they send, and how its memory goes back.
    input: Consumer<Frame>,
    give: Producer<Frame>,
    free: Vec<Frame>,
    /// Frames that may still be made.
    unmade: usize,
    /// The other end may want to know of what we did.
    news: bool,
    resting: bool,
}

impl Peer {
    pub(super) fn pair(frames: usize) -> io::Result<(Self, Self)> {
        within("frames on a cable", frames as u64, 1..=65536)?;
        let (a, b) = (Arc::new(End::new()?), Arc::new(End::new()?));
        let (a_out, b_in) = RingBuffer::new(frames);
        let (b_give, a_back) = RingBuffer::new(frames);
        let (b_out, a_in) = RingBuffer::new(frames);
        let (a_give, b_back) = RingBuffer::new(frames);
        let end = |ours: &Arc<End>, theirs: &Arc<End>, out, back, input, give| Self {
            ours: ours.clone(),
            theirs: theirs.clone(),
            out,
            back,
            input,
            give,
            free: Vec::with_capacity(frames),
            unmade: frames,
            news: false,
            resting: false,
        };
        Ok((end(&a, &b, a_out, a_back, a_in, a_give), end(&b, &a, b_out, b_back, b_in, b_give)))
    }

    pub(super) fn attach(&self, cable: Handle) {
        let first = self.ours.cable.set(cable).is_ok();
        debug_assert!(first, "an end belongs to one NIC");
    }

    pub(super) fn link(&self, up: bool) -> bool {
        self.ours.up.store(up, Ordering::Relaxed);
        up && self.theirs.up.load(Ordering::Relaxed) && self.theirs.cable.get().is_none_or(Handle::link)
    }

    pub(super) fn listen(&self, open: bool, pause: bool) {
        self.ours.pause.store(pause, Ordering::Relaxed);
        self.ours.open.store(open, Ordering::Relaxed);
    }

    pub(super) fn missed(&self) -> u64 {
        match self.ours.missed.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.ours.missed.swap(0, Ordering::Relaxed),
        }
    }

    #[inline]
    pub(super) fn receive(&mut self) -> Option<Frame> {
        if self.resting {
            self.wake_up();
        }
        self.input.pop().ok()
    }

    #[inline]
    pub(super) fn done(&mut self, frame: Frame) {
        // There is room for all frames that the other end can make.
        let _ = self.give.push(frame);
        self.news = true;
    }

    #[inline]
    pub(super) fn room(&mut self, pause: bool) -> Room {
        if !self.theirs.open.load(Ordering::Relaxed) {
            return Room::Drop(Cause::NoReceiver);
        }
        // The frame that was used last is in the cache.
        if let Some(frame) = self.free.pop() {
            return Room::Frame(frame);
        }
        if let Ok(mut frame) = self.back.pop() {
            while let Ok(other) = self.back.pop() {
                self.free.push(frame);
                frame = other;
            }
            return Room::Frame(frame);
        }
        if self.unmade > 0 {
            self.unmade -= 1;
            return Room::Frame(Frame::new(MAX_FRAME));
        }
        if pause && self.theirs.pause.load(Ordering::Relaxed) {
            return Room::Wait;
        }
        self.theirs.missed.fetch_add(1, Ordering::Relaxed);
        Room::Drop(Cause::WireFull)
    }

    #[inline]
    pub(super) fn send(&mut self, frame: Frame) -> Result<(), Cause> {
        self.news = true;
        self.out.push(frame).map_err(|_| Cause::WireFull)
    }

    pub(super) fn cancel(&mut self, frame: Frame) {
        self.free.push(frame);
    }

    #[inline]
    pub(super) fn flush(&mut self) {
        if std::mem::take(&mut self.news) {
            // Either they see what we did before they sleep, or we see that they sleep.
            fence(Ordering::SeqCst);
            if self.theirs.asleep.load(Ordering::Relaxed) && self.theirs.asleep.swap(false, Ordering::Relaxed) {
                let _ = rustix::io::write(&self.theirs.wake, &1u64.to_ne_bytes());
            }
        }
    }

    pub(super) fn rest(&mut self, receiving: bool) -> Rest<'_> {
        self.resting = true;
        self.ours.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let at_most = (receiving && !self.input.is_empty()).then_some(Duration::ZERO);
        Rest { at_most, fd: Some(self.ours.wake.as_fd()) }
    }

    #[cold]
    fn wake_up(&mut self) {
        self.resting = false;
        if !self.ours.asleep.swap(false, Ordering::Relaxed) {
            let _ = rustix::io::read(&self.ours.wake, &mut [0; 8]);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.ours.open.store(false, Ordering::Relaxed);
        self.ours.up.store(false, Ordering::Relaxed);
    }
}
