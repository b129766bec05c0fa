//! Closing a device whose handles are still held: because it is asked for, or because the kernel wants the device back.
//!
//! The kernel has an unbind or unplug wait until nothing refers to the open device: no descriptor, no mapping of a BAR. So each of
//! them is replaced in place: mappings by one that raises SIGBUS, the descriptor by one that refuses everything. Whoever holds
//! them has handles of a device that is gone.

use std::rc::Rc;

use blocking::unblock;

use super::{Device, Inner, index, open::Seat};
use crate::{
    Error, pci,
    reactor::{self, timeout},
    transport::{Transport, vfio::DeviceFd},
};

/// For all unmaps together. What is not unmapped then is so when the device is closed.
const UNMAP: std::time::Duration = std::time::Duration::from_secs(10);

impl Device {
    /// Closes the device, whoever still holds handles of it: they find it [gone](Error::Gone). It is stopped, its memory is
    /// unmapped if it has no other device, its interrupts end, its registers give all ones.
    ///
    /// Where the last handle can be dropped instead, that does the same, on this thread. What [`Device::descriptor`] gave is closed
    /// too; a mapping that was made by [`DeviceFd::map`] keeps the device open, since nobody knows of it.
    ///
    /// If the future is dropped, closing goes on.
    pub async fn close(&self) {
        let closing = reactor::spawn(give_up(self.inner.clone(), Error::Gone { reason: "it was closed".into() }));
        // It ends early only with the reactor, and all its devices.
        let _ = closing.await;
    }

    /// Whether the device is closed, by [`Device::close`] or since it was asked back, and was stopped by that: it does no DMA any
    /// more, whatever it was told to do, and what it was given can be freed. Not known of the device behind a server that is gone.
    pub fn is_stopped(&self) -> bool {
        self.inner.board.is_stopped()
    }
}

impl Inner {
    /// What an access failed with that was under way when the device was taken away: that it is gone, and not that its descriptor
    /// is closed.
    pub(super) fn explain(&self, error: Error) -> Error {
        match &self.transport {
            Transport::User(_) => error,
            Transport::Group(_) | Transport::Cdev(_) => self.gate.cause().unwrap_or(error),
        }
    }
}

/// Takes the device from all who hold it.
pub(super) async fn give_up(device: Rc<Inner>, cause: Error) {
    if !device.board.begin_closing() {
        return device.board.until_closed().await;
    }
    device.end_wakeups();
    match &device.transport {
        Transport::User(connection) => connection.close(cause),
        Transport::Group(attached) | Transport::Cdev(attached) => {
            let config = device.regions.get(index::CONFIG as usize).map(|region| region.info.offset);
            let (fd, gate, reset) = (attached.device().clone(), device.gate.clone(), device.info.reset);
            let stopped = unblock(move || {
                // Nobody accesses the device any more, and then it is made to stop.
                gate.end(cause);
                gate.close_for_good();
                stop(&fd, config, reset)
            })
            .await;
            if stopped {
                device.board.set_stopped();
            }
            let seat = device.seat.take();
            if let Some(Seat::Kernel(seat)) = &seat
                && seat.is_last()
                && timeout(UNMAP, device.dma.vacate()).await.is_err()
            {
                tracing::warn!(device = %device.address, "memory is not unmapped yet; closing the device does that");
            }
            let fd = attached.device().clone();
            match unblock(move || fd.retire()).await {
                // The kernel has stopped it.
                Ok(()) => device.board.set_stopped(),
                Err(error) => {
                    tracing::warn!(device = %device.address, %error, "the device stays open until its last handle is dropped");
                }
            }
            if let Some(Seat::Kernel(seat)) = seat {
                seat.leave().await;
            }
        }
    }
    device.board.set_closed();
}

/// Ends the device's DMA: its bus mastering is switched off, or else it is reset. Whether that is confirmed; what can't be stopped is
/// still kept from memory by the IOMMU.
fn stop(device: &DeviceFd, config: Option<u64>, reset: bool) -> bool {
    let switch_off = |at: u64| {
        let mut command = [0; 2];
        device.read_at(at, &mut command)?;
        let off = u16::from_le_bytes(command) & !pci::COMMAND_BUS_MASTER;
        device.write_at(at, &off.to_le_bytes())?;
        device.read_at(at, &mut command)?;
        match u16::from_le_bytes(command) & pci::COMMAND_BUS_MASTER {
            0 => Ok(()),
            _ => Err(Error::fault("its bus-master bit can't be cleared")),
        }
    };
    let stopped = config.map(|config| switch_off(config + pci::offset::COMMAND));
    if let Some(Ok(())) = stopped {
        return true;
    }
    let result = if reset { device.reset() } else { Err(Error::Unsupported { what: "a reset".into() }) };
    if let Err(error) = &result {
        tracing::warn!(%error, "a device that is closed could not be stopped before; is it unplugged?");
    }
    result.is_ok()
}
