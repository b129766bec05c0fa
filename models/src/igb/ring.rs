//! The registers of the queues, and the rings that they describe.
//!
//! The registers are in memory that clients may map. What a client stores there is looked at now and then: the tail whenever it
//! matters, the rest every few rounds. What it writes by a message takes effect before the reply.

use std::{io, os::fd::OwnedFd, sync::Arc};

use vfio_uring::dma::{HugePages, SharedMemory};

use super::spec::{DESCRIPTOR, QUEUE_STRIDE, QUEUES, RX_QUEUES, RX_QUEUES_OLD, TX_QUEUES, TX_QUEUES_OLD, dctl, queue};
use crate::device::Mappable;

/// The registers of receive queues, of transmit queues, and what is between and behind them, in whole pages of up to 16 KiB.
const AREA: u64 = 0x4000;
/// Descriptors of a ring at most.
const MAX_SIZE: u32 = 0x1_0000 / DESCRIPTOR as u32;

/// Which queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Rx,
    Tx,
}

/// The registers of the queues.
#[derive(Debug)]
pub(super) struct Area {
    pub memory: Arc<SharedMemory>,
    fd: Arc<OwnedFd>,
    mapped: bool,
}

impl Area {
    pub fn new(mapped: bool) -> io::Result<Self> {
        let page = rustix::param::page_size() as u64;
        let other = |error: vfio_uring::Error| io::Error::other(error.to_string());
        // A mapping starts at a page; with pages of 64 KiB there is none.
        let whole_pages = RX_QUEUES.is_multiple_of(page) && AREA.is_multiple_of(page);
        let start = if whole_pages { RX_QUEUES } else { 0 };
        let len = (start + AREA).next_multiple_of(page);
        let (fd, whole) = SharedMemory::create("igb-queues", len as usize, HugePages::No).map_err(other)?;
        drop(whole);
        let memory = SharedMemory::map(&fd, start, AREA as usize, true).map_err(other)?;
        let mapped = mapped && whole_pages;
        Ok(Self { memory: Arc::new(memory), fd: Arc::new(fd), mapped })
    }

    pub fn mappable(&self) -> Option<Mappable> {
        self.mapped.then(|| Mappable { offset: RX_QUEUES, size: AREA, fd: self.fd.clone(), memory: self.memory.clone() })
    }

    /// Where an offset in BAR0 is in the area, when it is there.
    pub fn place(offset: u64) -> Option<u64> {
        let old = |base: u64| {
            let at = offset.checked_sub(base).filter(|&at| at < 0x400 && at & 0xff < QUEUE_STRIDE)?;
            Some((at >> 8) * QUEUE_STRIDE + (at & 0xff))
        };
        match offset {
            RX_QUEUES_OLD..0x2c00 => old(RX_QUEUES_OLD),
            TX_QUEUES_OLD..0x3c00 => old(TX_QUEUES_OLD).map(|at| at + TX_QUEUES - RX_QUEUES),
            _ => offset.checked_sub(RX_QUEUES).filter(|&at| at < AREA),
        }
    }

    /// Where a register of a queue is in the area.
    #[inline]
    pub fn at(kind: Kind, index: usize, register: u64) -> u64 {
        let base = if kind == Kind::Rx { 0 } else { TX_QUEUES - RX_QUEUES };
        base + (index % QUEUES) as u64 * QUEUE_STRIDE + register
    }

    #[inline]
    pub fn load(&self, place: u64) -> u32 {
        self.memory.load_u32(place).unwrap_or(0)
    }

    #[inline]
    pub fn store(&self, place: u64, value: u32) {
        let stored = self.memory.store_u32(place, value);
        debug_assert!(stored.is_ok(), "the place is in the area");
    }

    /// A write by a message: bits that do not exist are not kept.
    pub fn write(&self, place: u64, value: u32) {
        let mask = match place % QUEUE_STRIDE {
            queue::BAL => !0x7f,
            queue::LEN => 0x000f_ff80,
            queue::HEAD | queue::TAIL => 0xffff,
            queue::DCTL => !dctl::SWFLSH,
            _ => !0,
        };
        self.store(place, value & mask);
    }

    /// Initial registers: the first queues are enabled, for software that knows of no others.
    pub fn reset(&self) {
        let cleared = self.memory.fill(0, AREA as usize, 0);
        debug_assert!(cleared.is_ok(), "the area is as long as its memory");
        for kind in [Kind::Rx, Kind::Tx] {
            for index in 0..QUEUES {
                let enable = if index == 0 { dctl::ENABLE } else { 0 };
                self.store(Self::at(kind, index, queue::DCTL), enable | 1 << 16);
                if kind == Kind::Rx {
                    self.store(Self::at(kind, index, queue::SRRCTL), 0x400);
                }
            }
        }
    }
}

/// A ring as its registers described it when it was enabled.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ring {
    pub on: bool,
    /// Its memory is not there; it is left alone until it is enabled anew.
    pub halted: bool,
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    /// SRRCTL of a receive queue.
    pub control: u32,
}

impl Ring {
    /// Looks at its registers; true when it was turned on or off, or is another one now.
    pub fn sync(&mut self, area: &Area, kind: Kind, index: usize, unit: bool) -> bool {
        let load = |register| area.load(Area::at(kind, index, register));
        let base = u64::from(load(queue::BAH)) << 32 | u64::from(load(queue::BAL) & !0x7f);
        let size = (load(queue::LEN) & 0x000f_ff80) / DESCRIPTOR as u32;
        let control = if kind == Kind::Rx { load(queue::SRRCTL) } else { 0 };
        let fits = (8..=MAX_SIZE).contains(&size) && base.checked_add(u64::from(size) * DESCRIPTOR).is_some();
        let on = unit && fits && load(queue::DCTL) & dctl::ENABLE != 0;
        if on == self.on && (!on || (base, size, control) == (self.base, self.size, self.control)) {
            return false;
        }
        let head = load(queue::HEAD);
        let head = if head < size { head } else { 0 };
        *self = Self { on, halted: false, base, size, head, tail: head, control };
        true
    }

    /// Takes the tail; one outside of the ring is not taken.
    #[inline]
    pub fn look(&mut self, area: &Area, kind: Kind, index: usize) {
        let tail = area.load(Area::at(kind, index, queue::TAIL));
        if tail < self.size {
            self.tail = tail;
        }
    }

    /// Descriptors between head and tail.
    #[inline]
    pub fn available(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.size - self.head + self.tail }
    }

    /// Where a descriptor is.
    #[inline]
    pub fn descriptor(&self, index: u32) -> u64 {
        self.base.wrapping_add(u64::from(index) * DESCRIPTOR)
    }

    #[inline]
    pub fn after(&self, index: u32) -> u32 {
        if index + 1 >= self.size { 0 } else { index + 1 }
    }
}
