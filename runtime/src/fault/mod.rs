//! Faults of the IOMMU, as a stream.
//!
//! A fault that the IOMMU can't resolve, or a page that a device asks for (PRI, SMMU stall), reaches user space by one of several
//! queues. All of them give [`FaultGroup`]s, and page requests are answered with [`Answer`]s.
//!
//! ```no_run
//! use futures::StreamExt;
//! use vfio_uring::{device::Device, fault::{Answer, FaultQueue, Options}, reactor::Reactor};
//!
//! # fn main() -> vfio_uring::Result<()> {
//! Reactor::new()?.block_on(async {
//!     let device = Device::open(&"vfio-user:/run/device.sock".parse()?).await?;
//!     let mut faults = FaultQueue::open(&device, Options::default()).await?;
//!     while let Some(group) = faults.next().await {
//!         let group = group?;
//!         println!("lost before: {:?}, then: {:?}", group.lost, group.faults);
//!         if let Some(id) = group.id {
//!             faults.respond(id, Answer::Invalid).await?;
//!         }
//!     }
//!     Ok(())
//! })
//! # }
//! ```

pub mod abi;
pub mod assembly;
mod find;
pub mod iommufd;
mod record;
mod region;
mod response;
pub mod ring;
mod steady;
pub mod veventq;

use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;

pub use record::{Answer, Fault, FaultGroup, GroupId, Lost, PageRequest, Permissions, Reason, Unrecoverable};
pub use region::{Form, RegionQueue};

use crate::{Error, Result, device::Device};

/// How a queue is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// When the device signals.
    Interrupt,
    /// Each time that this time has passed, and at once while there are faults.
    Poll(Duration),
}

/// How to open a fault queue.
#[derive(Debug, Clone)]
pub struct Options {
    /// When a queue in regions is looked at; by interrupt, by default.
    pub notify: Notify,
    /// The version of the region queue's interface to agree on; by default the highest that both sides have.
    pub version: Option<u32>,
    /// Groups of page requests that may wait for their last request at a time. More end the stream; 512 by default.
    pub max_open_groups: usize,
    /// Requests of a group; 256 by default. A longer one is answered with [`Answer::Invalid`] and [counted](Stats::refused); through
    /// iommufd it ends the stream.
    pub max_requests: usize,
    /// Groups that may wait for their answer. One that comes when so many wait is answered with [`Answer::Invalid`] and
    /// [counted](Stats::refused); 1024 by default.
    pub max_waiting: usize,
    /// How long the device may take to make room for an answer; 5 s by default.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            notify: Notify::Interrupt,
            version: None,
            max_open_groups: 512,
            max_requests: 256,
            max_waiting: 1024,
            deadline: Duration::from_secs(5),
        }
    }
}

/// What a queue has seen since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Faults that were given to the reader.
    pub faults: u64,
    /// Faults that are known to be lost.
    pub lost: u64,
    /// Times that faults were perhaps lost, where they are not counted.
    pub perhaps: u64,
    /// Groups of page requests that were answered with [`Answer::Invalid`] for the reader, since they were too long or too many.
    pub refused: u64,
}

/// A number that no other queue has, for [`GroupId`].
fn next_queue() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A queue of faults: a stream that ends with its first error. It takes faults out of the device's queue only when it is polled.
///
/// Dropping it answers what was not answered with [`Answer::Invalid`], in a task of the reactor, and gives the interrupt back;
/// [`FaultQueue::close`] does so and waits for it. A reset of the device leaves a queue in regions as it is: it is the IOMMU's.
#[derive(Debug)]
#[non_exhaustive]
pub enum FaultQueue {
    /// In regions of the device.
    Region(RegionQueue),
    /// Through iommufd: page requests only.
    Iommufd {
        /// The device with its queue.
        faults: iommufd::Faults,
        /// Faults that were given to the reader.
        given: u64,
    },
}

impl FaultQueue {
    /// Opens the fault queue that a device has: in its regions or, of a device of the kernel that has none there and was opened by its
    /// cdev, through iommufd.
    ///
    /// # Errors
    /// Through iommufd those of [`iommufd::Faults::of_device`]. In regions
    /// [`Error::Unsupported`] when the device has none, or not with this version or an interrupt; [`Error::InUse`] when it has a
    /// reader; [`Error::Refused`] when the device does not agree; [`Error::DeviceFault`] for a queue that can't be.
    ///
    pub async fn open(device: &Device, options: Options) -> Result<Self> {
        let in_regions = !matches!(find::regions(device), Err(Error::Unsupported { .. }));
        if in_regions || device.cdev().is_none() {
            return RegionQueue::open(device, options).await.map(Self::Region);
        }
        let limits = iommufd::Limits { max_requests: options.max_requests, max_waiting: options.max_waiting };
        Ok(Self::Iommufd { faults: iommufd::Faults::of_device(device, limits).await?, given: 0 })
    }

    /// Answers a group of page requests.
    ///
    /// # Errors
    /// [`Error::Invalid`] when nobody waits for this answer: it is of another queue, or was given before;
    /// else why it could not be given.
    pub async fn respond(&self, group: GroupId, answer: Answer) -> Result<()> {
        match self {
            Self::Region(queue) => queue.respond(group, answer).await,
            Self::Iommufd { faults, .. } => faults.respond(group, answer),
        }
    }

    /// What it has seen so far.
    pub fn stats(&self) -> Stats {
        match self {
            Self::Region(queue) => queue.stats(),
            Self::Iommufd { faults, given } => {
                let refused = faults.responder().map_or(0, |responder| responder.refused());
                Stats { faults: *given, refused, ..Stats::default() }
            }
        }
    }

    /// Answers what was not answered with [`Answer::Invalid`], and gives the interrupt back. Afterwards the device's queue can be
    /// opened again.
    ///
    /// # Errors
    /// Why an answer could not be given.
    pub async fn close(self) -> Result<()> {
        match self {
            Self::Region(queue) => queue.close().await,
            Self::Iommufd { faults, .. } => faults.close().await,
        }
    }
}

impl Stream for FaultQueue {
    type Item = Result<FaultGroup>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.get_mut() {
            Self::Region(queue) => Pin::new(queue).poll_next(cx),
            Self::Iommufd { faults, given } => {
                let group = ready!(Pin::new(faults).poll_next(cx));
                if let Some(Ok(group)) = &group {
                    *given += group.faults.len() as u64;
                }
                Poll::Ready(group)
            }
        }
    }
}

#[cfg(test)]
mod tests;
