//! Mappings and unmaps under way: what becomes of them when whoever waits for them is gone.

use std::sync::Arc;

use super::{
    mapping::{Region, Retired},
    space::Inner,
};

/// A mapping that is being made. Dropped midway, it settles what becomes of its addresses.
pub(super) struct Attempt<'a> {
    pub(super) inner: &'a Inner,
    pub(super) iova: u64,
    pub(super) bytes: u64,
    pub(super) outcome: Outcome,
}

pub(super) enum Outcome {
    /// The device does not have the mapping.
    Absent,
    /// It may have it: its addresses must never be used again. The memory may go, as `Retired::close` explains.
    Unknown,
    /// It has the mapping.
    Mapped,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        match self.outcome {
            Outcome::Absent => self.inner.release(self.iova, self.bytes),
            Outcome::Unknown => {
                self.inner.quarantine(self.bytes);
            }
            Outcome::Mapped => {}
        }
    }
}

/// An unmap on its way. Given up midway, the mapping is retired again: a second unmap is then either confirmed or refused, and
/// a refused one is leaked.
pub(super) struct Unmap<'a> {
    pub(super) retired: &'a Retired,
    pub(super) region: Option<Arc<Region>>,
}

impl Drop for Unmap<'_> {
    fn drop(&mut self) {
        if let Some(region) = self.region.take() {
            self.retired.put_back(region);
        }
    }
}
