//! What ends a NIC from outside: its device is gone, was reset, or does not answer any more.

use std::{pin::pin, rc::Rc, sync::Arc, time::Duration};

use futures::{
    FutureExt, StreamExt,
    future::{Either, select},
};
use vfio_uring::{
    device::{Bar, Device, Posted, State},
    reactor::timeout,
};

use crate::{Error, Result, link, shared::Shared, spec::STATUS};

/// Time between two looks for doorbells that found no device.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A device, as a NIC watches it from its start on.
pub(crate) struct Watch {
    device: Device,
    /// The device's generation at the start: a device that was reset has another.
    generation: u64,
    /// Tells of lost stores to any register of the mapping.
    lost: Posted<u32>,
}

impl Watch {
    pub(crate) fn new(device: &Device, bar: &Bar) -> Result<Self> {
        let (device, generation) = (device.clone(), device.generation());
        let lost = bar.posted::<u32>(STATUS)?;
        // What was lost before is not this NIC's concern.
        let _ = lost.take_error();
        Ok(Self { device, generation, lost })
    }

    /// Ends the queues and the link's changes when the device does, or when `keep` fails, which looks at registers; and frees the queues'
    /// memory when it is proven that the device does not use it any more. Over when nothing more can happen.
    pub(crate) async fn run(self, shared: Arc<Shared>, link: Rc<link::Watch>, keep: impl Future<Output = Result<()>>) {
        let end = |error: Error| {
            link.end(error.clone());
            shared.end(error);
        };
        let mut keep = pin!(keep.fuse());
        let mut changes = self.device.state_changes();
        loop {
            match self.look() {
                Look::Well => {}
                Look::Ended(error) => end(error),
                Look::Over(error) => {
                    end(error);
                    if self.is_proven() || is_stopped(&self.device).await {
                        shared.quiesce();
                    }
                    return;
                }
            }
            let change = pin!(timeout(LOOK_INTERVAL, changes.next()));
            if let Either::Left((Err(error), _)) = select(keep.as_mut(), change).await
                && matches!(self.look(), Look::Well)
                && self.device.state() == State::Live
            {
                // Nobody here has switched it off: it was done behind our back.
                end(error);
            }
        }
    }

    /// Whether the device was reset since.
    fn was_reset(&self) -> bool {
        self.device.generation() != self.generation
    }

    /// [`Error::Reset`] if it was.
    pub(crate) fn not_reset(&self) -> Result<()> {
        if self.was_reset() { Err(Error::Reset) } else { Ok(()) }
    }

    /// Whether it is proven that the device was reset since: it does nothing any more that it was told to do.
    fn is_proven(&self) -> bool {
        self.device.confirmed_generation() > self.generation
    }

    fn look(&self) -> Look {
        if let Some(error) = self.device.is_gone() {
            return Look::Over(error.into());
        }
        let state = self.device.state();
        if state == State::Resetting {
            // What it makes of the NIC is known at its end.
            return Look::Well;
        }
        if self.was_reset() {
            return if self.is_proven() { Look::Over(Error::Reset) } else { Look::Ended(Error::Reset) };
        }
        if state == State::Unavailable {
            let reason = "its memory was switched off, or it sleeps: stop the NIC when it is live again";
            return Look::Ended(vfio_uring::Error::Unavailable { state, reason }.into());
        }
        self.lost.take_error().map_or(Look::Well, |error| Look::Ended(error.into()))
    }
}

/// Whether a device is gone and is proven to have stopped. Waits for it to be closed.
pub(crate) async fn is_stopped(device: &Device) -> bool {
    if device.is_gone().is_none() {
        return false;
    }
    device.close().await;
    device.is_stopped()
}

/// What became of the device.
enum Look {
    Well,
    /// The NIC can't go on.
    Ended(Error),
    /// Nor can anything more happen: the device is gone, or proven not to use the NIC's memory any more.
    Over(Error),
}
