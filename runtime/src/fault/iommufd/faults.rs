//! A device with a fault queue, and the order in which they part.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use blocking::unblock;
use futures::Stream;

use super::{IommufdFaultQueue, Limits, Responder};
use crate::{
    Error, Result,
    device::Device,
    fault::{Answer, FaultGroup, GroupId},
    transport::{
        cdev::Bound,
        iommufd::{Hwpt, HwptFlags, Ioas},
    },
};

/// A device that is bound to a context of iommufd, as [`Faults`] attaches it. Its functions are called on threads that may wait.
pub trait Attach: Send + Sync + 'static {
    /// What it is called in errors.
    fn name(&self) -> &str;

    /// Its id in the context.
    fn device_id(&self) -> u32;

    /// The address space that it does DMA to.
    fn ioas(&self) -> &Ioas;

    /// Attaches it to a page table of the address space, in place of what it is attached to.
    ///
    /// # Errors
    /// Why not. Nothing has changed then.
    fn attach(&self, table: &Hwpt) -> Result<()>;

    /// Attaches it to the address space itself again, or to nothing. The kernel answers its page requests then.
    ///
    /// # Errors
    /// Why not. Nothing has changed then.
    fn release(&self) -> Result<()>;
}

/// A device of VFIO in its address space.
#[derive(Debug)]
pub struct Cdev {
    bound: Arc<Bound>,
    ioas: Ioas,
}

impl Cdev {
    /// A device that was bound and is [attached](Bound::attach) to `ioas`, or is to be.
    pub fn new(bound: Arc<Bound>, ioas: Ioas) -> Self {
        Self { bound, ioas }
    }
}

impl Attach for Cdev {
    fn name(&self) -> &str {
        self.bound.name()
    }

    fn device_id(&self) -> u32 {
        self.bound.device_id()
    }

    fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    fn attach(&self, table: &Hwpt) -> Result<()> {
        self.bound.attach_hwpt(table)
    }

    fn release(&self) -> Result<()> {
        self.bound.attach(&self.ioas).map(drop)
    }
}

/// The page requests of one device: a stream that ends with its first error. The device does DMA to the same address space as
/// before; what is not mapped there it can ask for now.
///
/// [`Faults::close`] parts them so that no device is left waiting: what was read or is queued is answered with
/// [`Answer::Invalid`], the device goes back to the address space itself, upon which the kernel answers what came meanwhile; then
/// the page table is destroyed, the queue closed, and destroyed. Dropping it does the same, and may hold this thread while the
/// device is being reset.
pub struct Faults<D: Attach = Cdev> {
    /// The order is that of parting.
    queue: Option<IommufdFaultQueue>,
    seat: Option<Seat<D>>,
    _device: Option<Device>,
}

/// A device that is attached to a page table with a queue.
struct Seat<D: Attach> {
    device: Arc<D>,
    table: Option<Hwpt>,
}

impl<D: Attach> fmt::Debug for Faults<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Faults<Cdev> {
    /// Takes the page requests of an open device, which must be one of the kernel by its cdev. It stays open as long as this is.
    ///
    /// # Errors
    /// As for [`Faults::attach`], and [`Error::Unsupported`] for a device that is reached in another way.
    pub async fn of_device(device: &Device, limits: Limits) -> Result<Self> {
        let Some((bound, ioas)) = device.cdev() else {
            return Err(Error::Unsupported {
                what: format!(
                    "page requests through iommufd of {}: open it by its cdev, as cdev:0000:01:00.0",
                    device.address()
                ),
            });
        };
        let mut faults = Self::attach(Cdev::new(bound, ioas), limits).await?;
        faults._device = Some(device.clone());
        Ok(faults)
    }
}

impl<D: Attach> Faults<D> {
    /// Attaches the device to a page table with a queue of its own.
    ///
    /// # Errors
    /// Nothing has changed for the device then.
    /// - [`Error::Unsupported`]: most devices and IOMMUs can't. It takes a function with ATS and PRI (or an SMMU that stalls) which
    ///   is no virtual function with PRI, and an IOMMU driver that takes page requests; and Linux 6.11.
    /// - [`Error::NoReactor`] outside of a reactor.
    /// - Else those of [`Hwpt::alloc`] and [`Bound::attach_hwpt`].
    pub async fn attach(device: D, limits: Limits) -> Result<Self> {
        let queue = IommufdFaultQueue::open(device.ioas().context(), limits)?;
        let id = queue.id();
        let seat = unblock(move || Seat::take(device, id)).await?;
        Ok(Self { queue: Some(queue), seat: Some(seat), _device: None })
    }

    /// [`Responder::respond`].
    ///
    /// # Errors
    /// As there.
    pub fn respond(&self, group: GroupId, answer: Answer) -> Result<()> {
        self.responder()?.respond(group, answer)
    }

    /// A handle that answers groups.
    ///
    /// # Errors
    /// None before it is closed.
    pub fn responder(&self) -> Result<Responder> {
        match &self.queue {
            Some(queue) => Ok(queue.responder()),
            None => Err(Error::invalid("a fault queue that is closed")),
        }
    }

    /// Parts the device and the queue, in the right order, and waits for it.
    ///
    /// # Errors
    /// That of the step that failed. Objects that could not be destroyed then stay in the context until it ends. When it was the
    /// device that could not go back, its page requests wait for ever: reset or close it.
    pub async fn close(mut self) -> Result<()> {
        let (Some(mut queue), Some(mut seat)) = (self.queue.take(), self.seat.take()) else { return Ok(()) };
        queue.answer_all();
        match unblock(move || seat.part()).await {
            Ok(()) => queue.close().await,
            Err(error) => {
                queue.leak();
                Err(error)
            }
        }
    }
}

impl<D: Attach> Stream for Faults<D> {
    type Item = Result<FaultGroup>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.get_mut().queue {
            Some(queue) => Pin::new(queue).poll_next(cx),
            None => Poll::Ready(None),
        }
    }
}

impl<D: Attach> Unpin for Faults<D> {}

impl<D: Attach> Drop for Faults<D> {
    fn drop(&mut self) {
        let (Some(mut queue), Some(mut seat)) = (self.queue.take(), self.seat.take()) else { return };
        queue.answer_all();
        if let Err(error) = seat.part() {
            tracing::warn!(device = seat.device.name(), %error, "a device stays attached to a fault queue that is closed");
            queue.leak();
        }
    }
}

impl<D: Attach> Seat<D> {
    fn take(device: D, fault_id: u32) -> Result<Self> {
        let taken = Hwpt::alloc(device.device_id(), device.ioas(), HwptFlags::empty(), Some(fault_id))
            .and_then(|table| device.attach(&table).map(|()| table));
        match taken {
            Ok(table) => Ok(Self { device: Arc::new(device), table: Some(table) }),
            Err(error) => Err(refused(device.name(), error)),
        }
    }

    /// Gives the device back and destroys the table. Once only, whether it works or not.
    fn part(&mut self) -> Result<()> {
        let Some(table) = self.table.take() else { return Ok(()) };
        if let Err(error) = self.device.release() {
            table.leak();
            return Err(error);
        }
        table.destroy().map_err(|failed| {
            failed.object.leak();
            failed.error
        })
    }
}

/// One that nobody took, since the waiting for it was given up.
impl<D: Attach> Drop for Seat<D> {
    fn drop(&mut self) {
        if let Err(error) = self.part() {
            tracing::warn!(device = self.device.name(), %error, "a device stays attached to a fault queue that is closed");
        }
    }
}

/// The kernel's errnos name neither the device's part in it nor the IOMMU's.
fn refused(name: &str, error: Error) -> Error {
    match error {
        Error::Invalid { .. } | Error::Unsupported { .. } | Error::Gone { .. } => Error::Unsupported {
            what: format!(
                "page requests of {name} through iommufd: that takes a function with ATS and PRI, which is no virtual function, and \
                 an IOMMU whose driver takes page requests; else map memory before the device uses it (the kernel says: {error})"
            ),
        },
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_what_it_takes() {
        let refusals = [
            Error::invalid("x"),
            Error::Unsupported { what: "x".into() },
            Error::Gone { reason: "0000:01:00.0 is being removed".into() },
        ];
        for error in refusals {
            let text = refused("0000:01:00.0", error).to_string();
            assert!(text.contains("ATS and PRI") && text.contains("0000:01:00.0"), "{text}");
        }
        assert!(matches!(refused("x", Error::Exhausted { what: "y".into() }), Error::Exhausted { .. }));
    }
}
