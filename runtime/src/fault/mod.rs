//! Faults of the IOMMU, as a stream.
//!
//! A fault that the IOMMU can't resolve, or a page that a device asks for (PRI, SMMU stall), reaches user space by one of several
//! queues. All of them give [`FaultGroup`]s, and page requests are answered with [`Answer`]s.

mod record;

pub use record::{Answer, Fault, FaultGroup, GroupId, Lost, PageRequest, Permissions, Reason, Unrecoverable};
