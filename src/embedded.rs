//! The software controller in a thread of this process.

use std::{fs, io};

use vfio_uring::device::Address;
use vfio_uring_models::{
    nvme::{Config, Controller, NamespaceConfig},
    server::{Running, Server},
};

use crate::{
    bench::bytes,
    failure::{Failure, Result},
    pin::Core,
};

/// Sizes of namespaces are multiples of this: whole blocks of any size.
const GRANULE: u64 = 1 << 20;

/// The software controller, running.
pub struct Embedded {
    server: Running,
    address: Address,
}

impl Embedded {
    /// Starts it with a namespace of at least `size` bytes in memory, and on a core if one is given.
    pub fn start(size: u64, core: Option<Core>) -> Result<Self> {
        if let Some(available) = available_memory().filter(|available| size > available / 2) {
            return Err(Failure::Failed(format!(
                "--size {size}: the software controller keeps it in memory, of which {} are available; half of that is the limit",
                bytes(available as f64)
            )));
        }
        let namespaces = vec![NamespaceConfig::memory(size.next_multiple_of(GRANULE))];
        let failed = |error: io::Error| Failure::Failed(format!("starting the software controller: {error}"));
        let controller = Controller::new(Config { namespaces, ..Config::default() }).map_err(failed)?;
        let server = Server::new(controller).map_err(failed)?;
        let server = Running::start_on(server, core.map(Core::number)).map_err(failed)?;
        let address = server.address().parse()?;
        Ok(Self { server, address })
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Stops it and waits for its thread.
    pub fn stop(self) -> Result<()> {
        self.server.stop().map_err(|error| Failure::Failed(format!("the software controller: {error}")))
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
