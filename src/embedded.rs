//! The software controller in a thread of this process.

use vfio_uring::device::Address;

use crate::failure::{Failure, Result};

/// The software controller, running.
pub struct Embedded(Address);

impl Embedded {
    /// Starts it with a namespace of at least `size` bytes in memory.
    pub fn start(size: u64) -> Result<Self> {
        let _ = size;
        Err(Failure::new("not there yet"))
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.0
    }

    /// Stops it and waits for its thread.
    pub fn stop(self) -> Result<()> {
        Ok(())
    }
}
