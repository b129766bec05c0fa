//! Faults of the IOMMU, as a stream.
//!
//! A fault that the IOMMU can't resolve, or a page that a device asks for (PRI, SMMU stall), reaches user space by one of several
//! queues. All of them give [`FaultGroup`]s, and page requests are answered with [`Answer`]s.

pub mod iommufd;
mod record;
pub mod veventq;

use std::sync::atomic::{AtomicU64, Ordering};

pub use record::{Answer, Fault, FaultGroup, GroupId, Lost, PageRequest, Permissions, Reason, Unrecoverable};

/// A number that no other queue has, for [`GroupId`].
fn next_queue() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
