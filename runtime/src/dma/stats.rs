//! What an address space holds.

use std::{os::fd::OwnedFd, sync::Arc};

/// What an address space holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpaceStats {
    /// Mappings that the device has, or may have: each counts against the limit.
    pub mappings: usize,
    /// Mappings without an owner whose unmap is still to be confirmed.
    pub retired: usize,
    /// Mappings whose unmap failed: their memory and addresses are kept as long as the space.
    pub leaked: usize,
    /// Bytes of those.
    pub leaked_bytes: u64,
    /// Attempts to map of which nobody knows whether they succeeded: their addresses are kept as long as the space.
    pub quarantined: usize,
    /// Bytes of address space of those.
    pub quarantined_bytes: u64,
    /// Mappings of the caller's memory that the kernel may still have: that memory is never freed.
    pub forgotten: usize,
    /// Bytes of those.
    pub forgotten_bytes: u64,
}

/// A mapping as a device in the same process needs it.
#[derive(Debug, Clone)]
pub struct MappingInfo {
    /// Where the device sees it.
    pub iova: u64,
    /// Bytes.
    pub len: usize,
    /// The memory, from the file's start. `None`: memory of the caller.
    pub fd: Option<Arc<OwnedFd>>,
}
