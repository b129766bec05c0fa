//! Threads on cores of their own.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::failure::{Failure, Result};

/// A core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Core(usize);

/// Two different cores that this process may use.
pub fn two_cores() -> Result<(Core, Core)> {
    let allowed =
        sched_getaffinity(None).map_err(|errno| Failure::new(format!("--pin: reading the allowed cores: {errno}")))?;
    let mut cores = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).map(Core);
    match (cores.next(), cores.next()) {
        (Some(one), Some(other)) => Ok((one, other)),
        _ => Err(Failure::new("--pin: this process may use one core only")),
    }
}

impl Core {
    /// Its number.
    pub fn number(self) -> usize {
        self.0
    }

    /// Keeps this thread on the core.
    pub fn take(self) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(self.0);
        sched_setaffinity(None, &set)
            .map_err(|errno| Failure::new(format!("--pin: core {} can't be taken: {errno}", self.0)))
    }
}
