//! The mapped parts of a device's memory.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use crate::{Error, Result, dma::SharedMemory};

/// A mapping, and what it is mapped from.
struct Area {
    memory: Weak<SharedMemory>,
    file: Arc<OwnedFd>,
    offset: u64,
    away: bool,
}

/// All mappings of a device.
#[derive(Default)]
pub(super) struct Areas(Vec<Area>);

impl Areas {
    pub(super) fn add(&mut self, memory: &Arc<SharedMemory>, file: &Arc<OwnedFd>, offset: u64) {
        self.0.retain(|area| area.memory.strong_count() != 0);
        self.0.push(Area { memory: Arc::downgrade(memory), file: file.clone(), offset, away: false });
    }

    /// Keeps no file open any more.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// Takes all mappings away, or gives them back. Each is tried; the first error is given, and what failed is tried again the next
    /// time.
    pub(super) fn settle(&mut self, away: bool) -> Result<()> {
        let mut result: Result<(), Error> = Ok(());
        for area in self.0.iter_mut().filter(|area| area.away != away) {
            let Some(memory) = area.memory.upgrade() else { continue };
            let done = if away { memory.withdraw() } else { memory.restore(area.file.as_fd(), area.offset) };
            area.away ^= done.is_ok();
            result = result.and(done);
        }
        result
    }
}
