//! A region of a fault queue, over resets.

use futures::StreamExt;

use super::region::Area;
use crate::{
    Error, Result,
    device::{Device, Region, State},
    dma::AccessError,
};

/// A region that is waited for while its device is being reset: the queue is the IOMMU's, and stays as it is.
pub(super) struct Steady {
    device: Device,
    pub(super) region: Region,
}

impl Steady {
    pub(super) fn new(device: &Device, region: Region) -> Self {
        Self { device: device.clone(), region }
    }

    pub(super) async fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        loop {
            match self.region.read(offset, to).await {
                Err(Error::Unavailable { state: State::Resetting, .. }) => self.reset_ends().await,
                result => return result,
            }
        }
    }

    pub(super) async fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        loop {
            match self.region.write(offset, from).await {
                Err(Error::Unavailable { state: State::Resetting, .. }) => self.reset_ends().await,
                result => return result,
            }
        }
    }

    pub(super) async fn write_u32(&self, offset: u64, value: u32) -> Result<()> {
        self.write(offset, &value.to_le_bytes()).await
    }

    /// Copies out of the mapped part, where there is one. Mapped memory goes with the device's own while that is away; the messages do
    /// as well.
    pub(super) async fn copy_out(&self, area: Option<&Area>, offset: u64, to: &mut [u8]) -> Result<()> {
        match area.map(|area| area.memory.read(offset - area.start, to)) {
            Some(Ok(())) => Ok(()),
            None | Some(Err(AccessError::Vanished { .. })) => self.read(offset, to).await,
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Copies into the mapped part, in the same way.
    pub(super) async fn copy_in(&self, area: Option<&Area>, offset: u64, from: &[u8]) -> Result<()> {
        match area.map(|area| area.memory.write(offset - area.start, from)) {
            Some(Ok(())) => Ok(()),
            None | Some(Err(AccessError::Vanished { .. })) => self.write(offset, from).await,
            Some(Err(error)) => Err(error.into()),
        }
    }

    async fn reset_ends(&self) {
        let mut changes = self.device.state_changes();
        while self.device.state() == State::Resetting && changes.next().await.is_some() {}
    }
}
