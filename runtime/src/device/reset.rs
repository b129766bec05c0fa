//! The device's state, and resets.

use std::sync::Arc;

use blocking::unblock;

use super::{
    Device, Inner, State, StateChanges,
    gate::{Closed, Outcome, Reset, why},
};
use crate::{
    Error, Result, reactor,
    transport::{
        Transport,
        vfio::{Attached, DeviceFd},
    },
};

/// Device states that a reset ends: it wakes the device.
const RESET_CLEARS: u64 = why::SLEEPING;

impl Device {
    /// What can be done with the device at present. One load of memory.
    ///
    /// The state follows what is done through this process's handles of the device, and configuration writes among it. Another
    /// process that has the device as well, and a request on the bare [descriptor](Device::descriptor) or
    /// [connection](Device::connection), pass the gate by.
    #[inline]
    pub fn state(&self) -> State {
        self.inner.gate.state()
    }

    /// How many resets the device went through since it was opened. Whoever finds another number than before knows that the device
    /// has forgotten its queues, and all that was written to its registers.
    ///
    /// A reset through configuration space (a function-level reset, or the way out of D3hot) counts too, although the kernel does
    /// not say whether the device did it. That the device does no DMA of before is proven by [`Device::confirmed_generation`].
    #[inline]
    pub fn generation(&self) -> u64 {
        self.inner.gate.generation()
    }

    /// The [generation](Device::generation) that the last reset began of which the kernel or the server said that it was done; 0
    /// before the first. What the device was told in an earlier generation it has forgotten: it does no DMA for it any more.
    pub fn confirmed_generation(&self) -> u64 {
        self.inner.gate.confirmed()
    }

    /// The changes of the state from now on.
    pub fn state_changes(&self) -> StateChanges {
        StateChanges::new(&self.inner.gate)
    }

    /// Waits until the device is live.
    ///
    /// # Errors
    /// The error that ended the device, when it is gone.
    pub async fn live(&self) -> Result<()> {
        self.inner.gate.live().await
    }

    /// Resets the device. What it knew of queues is lost; DMA mappings stay. Meanwhile it is [`State::Resetting`], and afterwards its
    /// [generation](Device::generation) is one higher.
    ///
    /// A device of the kernel has its configuration space as before, COMMAND and MSI-X included, so that interrupts go on without
    /// being asked for again: their eventfds stay. It is awake. Of a vfio-user device it depends on the server.
    ///
    /// If the future is dropped, the reset goes on, and the state changes when it is over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device has no reset, [`Error::Refused`] or [`Error::Io`] when it failed, [`Error::Reset`]
    /// when it was reset, and its registers could not be mapped again.
    pub async fn reset(&self) -> Result<()> {
        if !self.inner.info.reset {
            return Err(Error::Unsupported { what: "a reset".into() });
        }
        let closed = self.inner.close(why::RESETTING).await?;
        match &self.inner.transport {
            Transport::User(connection) => {
                let connection = connection.clone();
                meanwhile(closed, async move { was_reset(connection.reset().await) }).await
            }
            Transport::Group(attached) | Transport::Cdev(attached) => {
                elsewhere(attached, closed, |device| was_reset(device.reset())).await
            }
        }
    }
}

impl Inner {
    /// Closes the gates of the device: of each time that this process has it open.
    pub(super) async fn close(&self, flag: u64) -> Result<Closed> {
        Closed::close(&self.gate, self.gate.family(), flag).await
    }
}

/// What the result of a reset says of the device.
pub(super) fn was_reset(result: Result<()>) -> (Outcome, Result<()>) {
    let outcome = match result {
        Ok(()) => Outcome { reset: Some(Reset::Confirmed), set: 0, clear: RESET_CLEARS },
        Err(_) => Outcome::default(),
    };
    (outcome, result)
}

/// Does something by messages while the gates are closed: in a task of its own, so that they open when it is over, and not when
/// nobody waits for it any more.
pub(super) async fn meanwhile<T: 'static>(
    closed: Closed,
    job: impl Future<Output = (Outcome, Result<T>)> + 'static,
) -> Result<T> {
    let task = reactor::spawn(async move {
        closed.withdraw();
        let (outcome, result) = job.await;
        finish(closed, outcome, result)
    });
    task.await.unwrap_or_else(|_| Err(Error::Gone { reason: "its reactor has ended".into() }))
}

/// Does something by system calls while the gates are closed, on another thread, which opens them.
pub(super) async fn elsewhere<T: Send + 'static>(
    attached: &Attached,
    closed: Closed,
    job: impl FnOnce(&DeviceFd) -> (Outcome, Result<T>) + Send + 'static,
) -> Result<T> {
    let device = attached.device().clone();
    unblock(move || {
        closed.withdraw();
        let (outcome, result) = job(&device);
        finish(closed, outcome, result)
    })
    .await
}

/// Opens the gates. The job's own error goes first.
fn finish<T>(closed: Closed, outcome: Outcome, result: Result<T>) -> Result<T> {
    let failed: Result<(), Vec<(Arc<str>, Error)>> = closed.finish(outcome);
    let value = result?;
    failed.map_err(|failed| Error::Reset { failed })?;
    Ok(value)
}
