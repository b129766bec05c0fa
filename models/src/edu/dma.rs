//! The DMA engine.

use vfio_uring::fault::Reason;

use super::{BUFFER, BUFFER_SIZE, DMA_INTERRUPT, DMA_START, DMA_TO_MEMORY, PAGE};
use crate::{device::Host, faults::Unit};

/// A page request is answered so.
const SUCCESS: u32 = 0;

#[derive(Debug)]
pub(super) struct Dma {
    pub source: u64,
    pub destination: u64,
    pub count: u64,
    pub command: u64,
    mask: u64,
    buffer: Box<[u8; BUFFER_SIZE as usize]>,
    /// The group of page requests that is waited for.
    waits: Option<u32>,
}

/// Why a part of a transfer failed.
struct Failed {
    iova: u64,
    reason: Reason,
}

impl Dma {
    pub fn new(mask: u64) -> Self {
        let buffer = Box::new([0; BUFFER_SIZE as usize]);
        Self { source: 0, destination: 0, count: 0, command: 0, mask, buffer, waits: None }
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.mask);
    }

    pub fn start(&mut self, command: u64) {
        self.command = command & (DMA_START | DMA_TO_MEMORY | DMA_INTERRUPT);
    }

    pub fn is_running(&self) -> bool {
        self.command & DMA_START != 0
    }

    /// Whether [`Dma::run`] gets further.
    pub fn is_ready(&self, faults: Option<&Unit>) -> bool {
        self.is_running() && self.waits.is_none_or(|group| faults.is_some_and(|faults| faults.answer(group).is_some()))
    }

    /// Transfers; whether an interrupt is due.
    pub fn run(&mut self, may: bool, faults: Option<&mut Unit>, host: &mut impl Host) -> bool {
        let answered = self.waits.take().and_then(|group| faults.as_ref()?.answer(group));
        if may && answered.is_none_or(|code| code == SUCCESS) && !self.transfer(faults, host) {
            return false;
        }
        self.command &= !DMA_START;
        self.command & DMA_INTERRUPT != 0
    }

    /// Whether it has ended, well or not.
    fn transfer(&mut self, faults: Option<&mut Unit>, host: &mut impl Host) -> bool {
        let to_memory = self.command & DMA_TO_MEMORY != 0;
        let (own, iova) = if to_memory { (self.source, self.destination) } else { (self.destination, self.source) };
        let inside = own.checked_sub(BUFFER).filter(|at| *at <= BUFFER_SIZE && self.count <= BUFFER_SIZE - at);
        let Some(at) = inside else {
            tracing::debug!(own, self.count, "a transfer beyond the buffer");
            return true;
        };
        let range = at as usize..(at + self.count) as usize;
        let mut failed = Vec::new();
        let mut iova = iova & self.mask;
        let mut left = &mut self.buffer[range];
        while !left.is_empty() {
            let len = left.len().min((PAGE - iova % PAGE) as usize);
            let (part, rest) = left.split_at_mut(len);
            let forbidden = faults.as_ref().is_some_and(|faults| faults.forbids(iova, len));
            let moved = match (forbidden, to_memory) {
                (true, _) => Err(Reason::Permission),
                (false, true) => host.write(iova, part).map_err(|_| Reason::PteFetch),
                (false, false) => host.read(iova, part).map_err(|_| Reason::PteFetch),
            };
            if let Err(reason) = moved {
                failed.push(Failed { iova, reason });
            }
            left = rest;
            iova = (iova + len as u64) & self.mask;
        }
        match (failed.first(), faults) {
            (Some(_), Some(faults)) if faults.asks() => {
                let pages: Vec<u64> = failed.iter().map(|failed| failed.iova & !(PAGE - 1)).collect();
                self.waits = Some(faults.request(&pages, to_memory));
                false
            }
            (Some(first), Some(faults)) => {
                faults.access(first.iova, to_memory, first.reason);
                true
            }
            _ => true,
        }
    }
}
