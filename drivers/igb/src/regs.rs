//! The registers of BAR0.

use std::time::{Duration, Instant};

use vfio_uring::{device::Bar, reactor::sleep};

use crate::{
    Error, Result,
    spec::{self, MDIC, STATUS, SW_FW_SYNC, SWSM, mdic, status},
};

/// Longest time between two looks at a register that is to change.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How long firmware may have the PHY, or the PHY take for an access.
const PHY_TIMEOUT: Duration = Duration::from_millis(200);

/// The registers.
#[derive(Debug, Clone)]
pub(crate) struct Regs(pub(crate) Bar);

impl Regs {
    pub(crate) async fn read(&self, offset: u64) -> Result<u32> {
        Ok(self.0.read::<u32>(offset).await?)
    }

    pub(crate) async fn write(&self, offset: u64, value: u32) -> Result<()> {
        Ok(self.0.write::<u32>(offset, value).await?)
    }

    pub(crate) async fn modify(&self, offset: u64, change: impl FnOnce(u32) -> u32) -> Result<()> {
        let value = self.read(offset).await?;
        self.write(offset, change(value)).await
    }

    /// Has all writes arrive.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.read(STATUS).await.map(drop)
    }

    /// Waits for a register to be as it has to become.
    pub(crate) async fn wait_for(
        &self,
        offset: u64,
        within: Duration,
        what: &str,
        good: impl Fn(u32) -> bool,
    ) -> Result<u32> {
        let until = Instant::now() + within;
        let mut pause = Duration::from_micros(50);
        loop {
            let value = self.read(offset).await?;
            if value == u32::MAX {
                return Err(Error::nic("reads as all ones: it is gone, or its memory space is disabled"));
            }
            if good(value) {
                return Ok(value);
            }
            if Instant::now() >= until {
                return Err(Error::nic(format!(
                    "did not become {what} within {within:?}: the register at {offset:#x} is {value:#x}"
                )));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LOOK_INTERVAL);
        }
    }

    /// Writes a register of the PHY, whose use is agreed on with the firmware and the other port (section 4.7).
    pub(crate) async fn write_phy(&self, register: u32, value: u32) -> Result<()> {
        let port = self.read(STATUS).await? >> status::LAN_ID_SHIFT & 3;
        // PHY 0 and 1 have bits 1 and 2, 2 and 3 have 5 and 6; firmware's are 16 further.
        let bit = if port < 2 { 2 << port } else { 0x20 << (port - 2) };
        self.take_semaphore().await?;
        let busy = self.read(SW_FW_SYNC).await?;
        self.write(SW_FW_SYNC, busy | bit).await?;
        self.modify(SWSM, |value| value & !(spec::SMBI | spec::SWESMBI)).await?;
        let command = value & 0xffff | register << mdic::REGISTER_SHIFT | mdic::INTERNAL_PHY | mdic::WRITE;
        self.write(MDIC, command).await?;
        let done = self.wait_for(MDIC, PHY_TIMEOUT, "done with a PHY access", |value| value & mdic::READY != 0).await;
        self.take_semaphore().await?;
        self.modify(SW_FW_SYNC, |value| value & !bit).await?;
        self.modify(SWSM, |value| value & !(spec::SMBI | spec::SWESMBI)).await?;
        match done? & mdic::ERROR {
            0 => Ok(()),
            _ => Err(Error::nic(format!("refused the write of {value:#x} to register {register} of its PHY"))),
        }
    }

    /// Takes both semaphores. One that a driver left taken that ended is taken from it.
    async fn take_semaphore(&self) -> Result<()> {
        let free = |value: u32| value & spec::SMBI == 0;
        if let Err(error) = self.wait_for(SWSM, PHY_TIMEOUT, "free for software", free).await {
            tracing::debug!(%error, "taking the semaphore of a NIC");
        }
        self.modify(SWSM, |value| value | spec::SWESMBI).await?;
        let taken = |value: u32| value & spec::SWESMBI != 0;
        self.wait_for(SWSM, PHY_TIMEOUT, "free of its firmware", taken).await.map(drop)
    }
}
