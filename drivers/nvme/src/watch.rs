//! What ends the queues of a controller from outside: its device is gone, was reset, or lost a doorbell.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use vfio_uring::{
    device::{Device, Posted, State},
    mmio::Value,
};

use crate::Error;

/// A device, as the queues of one controller watch it. Clones are the same: stores that are lost are counted by the mapping, which
/// all doorbells share, and told of once, so that the queue that asks has to tell the others.
#[derive(Debug, Clone)]
pub struct Watch(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Device,
    /// The device's generation at the start: a device that was reset has another.
    generation: u64,
    /// How often doorbells were found to be lost.
    lost: Cell<u32>,
    /// Why the last was lost.
    error: RefCell<Option<vfio_uring::Error>>,
}

/// What has happened to the device, which ends its queues.
pub(crate) struct End {
    pub(crate) error: Error,
    /// Whether it is proven that the device does no DMA any more that it was told to do.
    pub(crate) proven: bool,
}

impl Watch {
    /// Watches a device from here on.
    pub fn new(device: &Device) -> Self {
        let (device, generation) = (device.clone(), device.generation());
        Self(Rc::new(Inner { device, generation, lost: Cell::new(0), error: RefCell::default() }))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether the device was reset since.
    #[inline]
    pub(crate) fn was_reset(&self) -> bool {
        self.0.device.generation() != self.0.generation
    }

    /// Whether it is proven that the device does nothing any more that it was told to do, since it was reset or closed.
    pub(crate) fn is_proven(&self) -> bool {
        self.0.device.confirmed_generation() > self.0.generation || self.0.device.is_stopped()
    }

    /// How often doorbells were found to be lost.
    #[inline]
    pub(crate) fn lost(&self) -> u32 {
        self.0.lost.get()
    }

    /// What ends a queue with these doorbells; `before` is [`Watch::lost`] when it was made.
    #[inline]
    pub(crate) fn look<T: Value>(&self, doorbells: [&Posted<T>; 2], before: u32) -> Option<End> {
        let device = &self.0.device;
        let end = |error| Some(End { error, proven: self.is_proven() });
        if self.was_reset() {
            return end(Error::Reset);
        }
        if let Some(error) = doorbells.iter().find_map(|doorbell| doorbell.take_error()) {
            self.0.lost.set(self.lost().wrapping_add(1));
            self.0.error.replace(Some(error));
        }
        if let Some(error) = device.is_gone() {
            return end(error.into());
        }
        // What a reset makes of the queue is known at its end.
        if self.lost() != before && device.state() != State::Resetting {
            return self.0.error.borrow().clone().and_then(|error| end(error.into()));
        }
        None
    }
}
