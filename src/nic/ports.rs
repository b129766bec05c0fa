//! The NICs: software in this process, or devices.

use std::{
    io,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Address, Device, Options as DeviceOptions},
    dma::AddressSpace,
    reactor::sleep,
};
use vfio_uring_igb::{Nic, Options, QueueSeed};
use vfio_uring_models::{
    igb::{self, Cause, Config, Handle, Wire},
    server::{Running, Server},
};

use crate::{
    args::NicMode,
    failure::{Failure, Result},
    open::open_with,
    pin::Core,
};

/// Vendor and devices that the driver is for: the 82576's kinds.
const INTEL: u16 = 0x8086;
const KINDS: [u16; 8] = [0x10c9, 0x10e6, 0x10e7, 0x10e8, 0x150a, 0x150d, 0x1518, 0x1526];
/// Flows of the generator: enough for each queue to get some.
const FLOWS: usize = 256;
/// How long a device may take to answer: the driver's thread is slow while it is single-stepped.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a link may take.
const LINK: Duration = Duration::from_secs(5);

/// A software NIC, running.
pub struct Software {
    server: Running,
    handle: Handle,
    address: Address,
}

impl Software {
    fn start(wire: Wire, core: Option<Core>) -> Result<Self> {
        let failed = |error: io::Error| Failure::new(format!("starting the software NIC: {error}"));
        let config = Config::default().with_wire(wire);
        let handle = config.handle.clone();
        let server = Server::new(igb::Nic::new(config).map_err(failed)?).map_err(failed)?;
        let server = Running::start_on(server, core.map(Core::number)).map_err(failed)?;
        let address = server.address().parse()?;
        Ok(Self { server, handle, address })
    }

    /// One that nothing is connected to but a sink.
    pub fn idle() -> Result<Self> {
        Self::start(Wire::Sink, None)
    }

    /// Those that a mode needs, for frames of `size` bytes without CRC.
    pub fn of(mode: NicMode, size: usize, core: Option<Core>) -> Result<Vec<Self>> {
        let generator = || Wire::generator(size, FLOWS, 0).map_err(|error| Failure::new(error.to_string()));
        match mode {
            NicMode::Rx => Ok(vec![Self::start(generator()?, core)?]),
            NicMode::Tx => Ok(vec![Self::start(Wire::Sink, core)?]),
            NicMode::Forward => Ok(vec![Self::start(generator()?, core)?, Self::start(Wire::Sink, core)?]),
        }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What it dropped so far, by cause.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let counters = self.handle.counters();
        Cause::ALL.iter().map(|&cause| (cause.name(), counters.dropped(cause))).collect()
    }

    /// Stops it and waits for its thread.
    pub fn stop(self) -> Result<()> {
        self.server.stop().map_err(|error| Failure::new(format!("the software NIC: {error}")))
    }
}

/// Opens a device, refuses one that is not for the driver, and brings it up.
pub async fn bring_up(
    address: &Address,
    space: Option<AddressSpace>,
    options: Options,
) -> Result<(Device, Nic, Vec<QueueSeed>)> {
    let device = open_with(address, DeviceOptions { space, deadline: ANSWER, ..DeviceOptions::default() }).await?;
    let ids = device.config().ids().await?;
    if ids.vendor != INTEL || !KINDS.contains(&ids.device) {
        return Err(Failure::new(format!(
            "{address} is {:04x}:{:04x}, and the driver is for the 82576, as 8086:10c9; vfio-uring list shows what there is",
            ids.vendor, ids.device
        )));
    }
    let (nic, seeds) = Nic::new(&device, options).await?;
    Ok((device, nic, seeds))
}

/// Waits for the link, for a time; whether it is up.
pub async fn linked(nic: &Nic, limit: Duration) -> Result<bool> {
    let start = Instant::now();
    while !nic.link().await?.up {
        if start.elapsed() > limit {
            return Ok(false);
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(true)
}

/// Waits for the link that a benchmark needs.
pub async fn with_link(nic: &Nic, address: &Address) -> Result<()> {
    match linked(nic, LINK).await? {
        true => Ok(()),
        false => Err(Failure::new(format!("{address} has no link after {} s: is its cable plugged in?", LINK.as_secs()))),
    }
}
