//! Interrupts as streams.

use std::{
    fmt,
    future::{Future, poll_fn},
    os::fd::OwnedFd,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use rustix::event::{EventfdFlags, PollFlags, eventfd};

use super::{Inner, gate::Access};
use crate::{
    Error, Result,
    reactor::op::{self, MultishotPoll},
    transport::Gone,
};

/// Interrupt indices of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Irq {
    /// The level interrupt: masked when it fires, [`Device::unmask`](super::Device::unmask) lets it fire again.
    Intx = 0,
    /// MSI.
    Msi = 1,
    /// MSI-X.
    MsiX = 2,
    /// An error of the device or its link. Of a device of the kernel [`Device::events`](super::Device::events) tells it.
    Error = 3,
    /// The device is asked back; as above.
    Request = 4,
}

impl Irq {
    /// Number of these indices; those from here on are of some devices only.
    pub const COUNT: u32 = 5;
}

/// The name of an index, for people.
fn name(index: u32) -> String {
    match [Irq::Intx, Irq::Msi, Irq::MsiX, Irq::Error, Irq::Request].get(index as usize) {
        Some(irq) => format!("{irq:?}"),
        None => format!("device-specific interrupt {index}"),
    }
}

/// An interrupt vector: a stream whose items mean "look at the queue". Several interrupts may make one item, and the first
/// item may tell of an interrupt that was handled before.
///
/// It ends with the error that ended the device. Dropping it takes the vector back.
pub struct Interrupt {
    poll: MultishotPoll,
    gone: Gone,
    ended: bool,
    fd: Arc<OwnedFd>,
    device: Rc<Inner>,
    index: u32,
    vector: u32,
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("irq", &name(self.index)).field("vector", &self.vector).finish_non_exhaustive()
    }
}

impl Interrupt {
    /// Takes the vector for this handle; nobody else can until it is dropped.
    fn new(device: &Rc<Inner>, index: u32, vector: u32, fd: &Arc<OwnedFd>) -> Result<Self> {
        if !device.vectors.borrow_mut().insert((index, vector)) {
            return Err(Error::invalid(format!("{} vector {vector} is taken: drop its Interrupt first", name(index))));
        }
        Ok(Self {
            poll: op::poll_multishot(fd, PollFlags::IN.bits().into()),
            gone: device.transport.until_gone(),
            ended: false,
            fd: fd.clone(),
            device: device.clone(),
            index,
            vector,
        })
    }

    /// The vector's number.
    pub fn vector(&self) -> u32 {
        self.vector
    }

    /// The eventfd that the device signals.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Has the reactor wake up from its sleep at the next interrupt, with no task to wake: for [`Poller::standby`]. `Ready` when there
    /// was one since the last look, so that the queue is to be looked at again.
    ///
    /// # Errors
    /// The error that ended the device.
    ///
    /// [`Poller::standby`]: crate::reactor::Poller::standby
    pub fn poll_idle(&mut self) -> Poll<Result<()>> {
        match self.poll.poll_idle() {
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(Error::io("polling an interrupt's eventfd", error))),
            Poll::Pending => self.device.transport.cause().map_or(Poll::Pending, |cause| Poll::Ready(Err(cause))),
        }
    }

    /// Waits for an interrupt and gives how many there were since this was called last.
    ///
    /// # Errors
    /// The error that ended the device.
    pub async fn take_count(&self) -> Result<u64> {
        let mut count = pin!(op::eventfd_count(&self.fd));
        let mut gone = pin!(self.device.transport.until_gone());
        poll_fn(|cx| match count.as_mut().poll(cx) {
            Poll::Ready(count) => Poll::Ready(count.map_err(|error| Error::io("reading an interrupt's eventfd", error))),
            Poll::Pending => gone.as_mut().poll(cx).map(Err),
        })
        .await
    }
}

impl Stream for Interrupt {
    type Item = Result<()>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match Pin::new(&mut self.poll).poll_next(cx) {
            Poll::Ready(Some(Ok(_))) => return Poll::Ready(Some(Ok(()))),
            Poll::Ready(Some(Err(error))) => {
                self.ended = true;
                return Poll::Ready(Some(Err(Error::io("polling an interrupt's eventfd", error))));
            }
            Poll::Ready(None) => self.ended = true,
            Poll::Pending => {}
        }
        match Pin::new(&mut self.gone).poll(cx) {
            Poll::Ready(cause) => {
                self.ended = true;
                Poll::Ready(Some(Err(cause)))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.device.vectors.borrow_mut().remove(&(self.index, self.vector));
        self.device.transport.unset_irq(self.index, self.vector);
    }
}

pub(super) async fn assign(device: &Rc<Inner>, index: u32, start: u32, count: u32) -> Result<Vec<Interrupt>> {
    let has = device.irqs.get(index as usize).map_or(0, |info| info.count);
    if [Irq::Error as u32, Irq::Request as u32].contains(&index) && device.transport.is_kernel() && has != 0 {
        let name = name(index);
        return Err(Error::invalid(format!("{name} is taken: Device::events() tells of errors and removal requests")));
    }
    if count == 0 || start.checked_add(count).is_none_or(|end| end > has) {
        return Err(Error::Unsupported { what: format!("{} vectors {start}+{count}: it has {has}", name(index)) });
    }
    let mut fds = Vec::new();
    for _ in 0..count {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        fds.push(Arc::new(fd.map_err(|errno| Error::io("making an eventfd for an interrupt; raise ulimit -n", errno))?));
    }
    // From here on a failure, or a dropped future, takes back what was assigned.
    let interrupts = (start..).zip(&fds).map(|(vector, fd)| Interrupt::new(device, index, vector, fd));
    let interrupts = interrupts.collect::<Result<Vec<_>>>()?;
    let _inside = device.gate.enter(Access::Control)?;
    device.transport.set_irqs(index, start, &fds).await.map_err(|error| device.explain(error))?;
    Ok(interrupts)
}
