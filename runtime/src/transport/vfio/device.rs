//! A device's descriptor, and what is asked of it.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

/// A device that the kernel lets us use. Container and device requests share their numbers, so that the type of the descriptor is
/// the only guard (`include/uapi/linux/vfio.h`).
///
/// A handle: clones are the same descriptor, and the device is bound to this process until the last one, and the last mapping of
/// a BAR, is gone.
#[derive(Debug, Clone)]
pub struct DeviceFd(Arc<OwnedFd>);

impl DeviceFd {
    /// Takes a descriptor that a group or a bound cdev gave.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// The descriptor, for operations of the ring.
    pub fn shared(&self) -> &Arc<OwnedFd> {
        &self.0
    }
}

impl AsFd for DeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
