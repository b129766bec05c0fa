//! Queues of page requests: the kernel's object, its descriptor, and the order in which they go.

use std::{
    os::fd::{FromRawFd, OwnedFd},
    sync::Arc,
};

use iommufd_bindings as abi;
use rustix::io::Errno;

use super::{IommufdFd, Kind, Object};
use crate::{Error, Result};

const _: () = assert!(size_of::<abi::iommu_fault_alloc>() == 16);

/// A queue of the page requests of all devices that are attached to page tables which name it (`IOMMU_FAULT_QUEUE_ALLOC`, Linux
/// 6.11). [`IommufdFaultQueue`](crate::fault::iommufd::IommufdFaultQueue) is the stream over it.
///
/// It can be destroyed once its descriptor is closed and no page table uses it: detach the devices, destroy the tables, then it.
#[derive(Debug)]
pub struct FaultObject {
    /// Before the object, which can't be destroyed while it is open.
    fd: Arc<OwnedFd>,
    object: Object,
}

impl FaultObject {
    /// Makes one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] before Linux 6.11, else [`Error::Io`].
    pub fn alloc(context: &IommufdFd) -> Result<Self> {
        let mut arg = abi::iommu_fault_alloc::default();
        context.call(abi::IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &mut arg).map_err(|errno| match errno {
            Errno::NOTTY | Errno::OPNOTSUPP => {
                Error::Unsupported { what: "page requests through iommufd, which need Linux 6.11".into() }
            }
            errno => Error::io("making a fault queue of iommufd", errno),
        })?;
        let object = Object { context: context.clone(), id: arg.out_fault_id, kind: Kind::Fault };
        let fd = Arc::new(take_fd(arg.out_fault_fd, "a fault queue")?);
        Ok(Self { fd, object })
    }

    /// Its id in the context, for [`Hwpt::alloc`](super::Hwpt::alloc).
    pub fn id(&self) -> u32 {
        self.object.id
    }

    /// The context that it is in.
    pub fn context(&self) -> &IommufdFd {
        &self.object.context
    }

    /// The descriptor: records are read from it and responses written to it. Neither waits.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Closes the descriptor. What is left can be destroyed when no other reference to the open file is left either: an
    /// operation of a ring on it holds one until its cancellation has completed.
    pub(crate) fn close_fd(self) -> Closed {
        Closed::new(self.object)
    }

    /// Closes the descriptor and destroys the queue. The kernel answers what nobody has answered.
    ///
    /// # Errors
    /// [`Error::Io`] with EBUSY while a page table uses it, or another reference to its descriptor is left. Since the descriptor
    /// is closed by then, the object stays until its context ends.
    pub fn destroy(self) -> Result<()> {
        self.close_fd().destroy().map_err(Closed::leak)
    }
}

/// An object whose descriptor was closed: to destroy.
pub(crate) struct Closed(Object);

impl Closed {
    pub(super) fn new(object: Object) -> Self {
        Self(object)
    }

    /// Destroys it; it comes back with the error, to try again while it is EBUSY.
    pub(crate) fn destroy(self) -> Result<(), (Self, Error)> {
        match self.0.destroy() {
            Ok(()) => {
                self.0.forget();
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Leaves it to the end of its context.
    pub(crate) fn forget(self) {
        self.0.forget();
    }

    /// [`Closed::forget`] after a failure.
    pub(crate) fn leak((closed, error): (Self, Error)) -> Error {
        closed.forget();
        error
    }
}

pub(super) fn take_fd(fd: u32, what: &str) -> Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just installed the descriptor in its answer, for us alone.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(_) => Err(Error::fault(format!("the kernel gave {fd:#x} as the descriptor of {what}"))),
    }
}
