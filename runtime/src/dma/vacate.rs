//! Memory of a space whose last device of the kernel is taken away.

use super::{AddressSpace, mapping::Region, space::Inner};
use crate::{Error, Result};

/// A device of the kernel is in the space as long as this lives.
#[derive(Debug)]
pub(crate) struct Presence(AddressSpace);

impl Presence {
    pub(crate) fn new(space: &AddressSpace) -> Self {
        let devices = &space.inner().devices;
        devices.set(devices.get() + 1);
        Self(space.clone())
    }

    pub(crate) fn space(&self) -> &AddressSpace {
        &self.0
    }

    /// Whether no other device is in the space.
    pub(crate) fn is_last(&self) -> bool {
        self.0.inner().devices.get() == 1
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let devices = &self.0.inner().devices;
        devices.set(devices.get() - 1);
    }
}

impl AddressSpace {
    /// Unmaps everything, also what has an owner: they keep their memory, which no device has any more. The space takes no mappings
    /// and no devices from now on. Nothing is done if another device has joined.
    ///
    /// What can't be unmapped stays as it is: it is tried once more when its owner drops it, and leaked and counted then.
    pub(crate) async fn vacate(&self) {
        let inner = self.inner();
        let _joining = self.attaching().await;
        if inner.devices.get() > 1 {
            return;
        }
        inner.vacated.set(true);
        let _turn = inner.reclaiming.lock().await;
        for region in inner.regions().into_iter().filter(|region| region.is_mapped()) {
            match inner.backend.unmap(&region).await {
                Ok(()) => {
                    region.set_pinned(false);
                    region.set_mapped(false);
                }
                Err(error) => tracing::warn!(iova = region.iova, bytes = region.len(), %error, "an unmap failed"),
            }
        }
    }

    /// The kernel has dropped all mappings of the space, with the last group: also what could not be unmapped.
    pub(crate) fn emptied(&self) {
        let inner = self.inner();
        inner.vacated.set(true);
        inner.emptied.set(true);
        inner.regions().iter().for_each(|region| region.set_pinned(false));
        for region in inner.leaked.take() {
            inner.release(region.iova, region.len());
        }
    }

    /// Whether the space takes a device.
    ///
    /// # Errors
    /// [`Error::Gone`] when the last device was taken from it.
    pub(crate) fn check_alive(&self) -> Result<()> {
        self.inner().check_alive()
    }
}

impl Inner {
    /// Whether a device may have a region that was mapped.
    pub(super) fn has(&self, region: &Region) -> bool {
        region.is_mapped() && !self.emptied.get()
    }

    pub(super) fn check_alive(&self) -> Result<()> {
        if self.vacated.get() {
            let reason = "its address space was given up with it; open the device anew, in a space of its own";
            return Err(Error::Gone { reason: reason.into() });
        }
        Ok(())
    }
}
