//! How a device is reached: through a vfio-user server's socket, or the kernel's VFIO by its group or its own character device.

pub mod cdev;
pub mod group;
pub mod iommufd;
pub mod user;
pub mod vfio;

use std::{os::fd::OwnedFd, pin::Pin, rc::Rc, sync::Arc, task::Context, task::Poll};

use user::{client::Connection, link::UntilGone};
use vfio::Attached;

use crate::{Error, Result, device::gate::Ended};

/// An open device, by the way it is reached.
#[derive(Clone)]
pub(crate) enum Transport {
    User(Rc<Connection>),
    Group(Rc<Attached>),
    Cdev(Rc<Attached>),
}

/// A place in a region: the server knows regions by index, the kernel by their offset in the descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) region: u32,
    /// Where the region is in the descriptor.
    pub(crate) base: u64,
    /// In the region.
    pub(crate) offset: u64,
}

impl Transport {
    /// Reads all of `to`.
    pub(crate) async fn read(&self, at: Place, to: &mut [u8]) -> Result<()> {
        match self {
            Self::User(connection) => connection.region_read(at.region, at.offset, to).await,
            Self::Group(attached) | Self::Cdev(attached) => attached.read(at, to).await,
        }
    }

    /// Writes all of `from`.
    pub(crate) async fn write(&self, at: Place, from: &[u8]) -> Result<()> {
        match self {
            Self::User(connection) => connection.region_write(at.region, at.offset, from).await,
            Self::Group(attached) | Self::Cdev(attached) => attached.write(at, from).await,
        }
    }

    /// Has `eventfds` signalled for the vectors from `start` on.
    pub(crate) async fn set_irqs(&self, index: u32, start: u32, eventfds: &[Arc<OwnedFd>]) -> Result<()> {
        match self {
            Self::User(connection) => connection.set_irqs(index, start, eventfds).await,
            Self::Group(attached) | Self::Cdev(attached) => attached.set_irqs(index, start, eventfds).await,
        }
    }

    /// Has a vector's eventfd not signalled any more. Not waited for.
    pub(crate) fn unset_irq(&self, index: u32, vector: u32) {
        match self {
            Self::User(connection) => connection.unset_irqs(index, vector, 1),
            Self::Group(attached) | Self::Cdev(attached) => attached.unset_irq(index, vector),
        }
    }

    pub(crate) async fn unmask_irqs(&self, index: u32, start: u32, count: u32) -> Result<()> {
        match self {
            Self::User(connection) => connection.unmask_irqs(index, start, count).await,
            Self::Group(attached) | Self::Cdev(attached) => attached.unmask_irqs(index, start, count).await,
        }
    }

    pub(crate) fn is_kernel(&self) -> bool {
        !matches!(self, Self::User(_))
    }

    /// Why the device is gone, if it is.
    pub(crate) fn cause(&self) -> Option<Error> {
        match self {
            Self::User(connection) => connection.cause(),
            Self::Group(attached) | Self::Cdev(attached) => attached.gate().cause(),
        }
    }

    pub(crate) fn until_gone(&self) -> Gone {
        match self {
            Self::User(connection) => Gone::User(connection.until_gone()),
            Self::Group(attached) | Self::Cdev(attached) => Gone::Kernel(Ended::new(attached.gate())),
        }
    }
}

/// Ends when the device is gone, with the cause.
#[derive(Debug)]
pub(crate) enum Gone {
    User(UntilGone),
    Kernel(Ended),
}

impl Future for Gone {
    type Output = Error;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Error> {
        match self.get_mut() {
            Self::User(gone) => Pin::new(gone).poll(cx),
            Self::Kernel(ended) => Pin::new(ended).poll(cx),
        }
    }
}
