//! The device that the tests run on, and what they have in common.

#[path = "../support/pattern.rs"]
mod pattern;

use std::{
    env,
    future::Future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

pub use pattern::{fill, is_filled};
use vfio_uring::{
    device::{Address, Device},
    reactor::{Idle, Reactor, timeout},
};
use vfio_uring_models::{
    nvme::{self, Config, NamespaceConfig},
    server::Running,
};

/// One test at a time has the device.
static DEVICE: Mutex<()> = Mutex::new(());

/// Runs a test, within a deadline.
pub fn run<T>(idle: Idle, test: impl Future<Output = T>) -> T {
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let reactor = Reactor::builder().idle(idle).build().unwrap();
    reactor.block_on(async { timeout(Duration::from_secs(150), test).await.expect("no hang") })
}

pub struct Rig {
    pub device: Device,
    _server: Option<Running>,
}

impl Rig {
    pub async fn open() -> Self {
        if let Ok(name) = env::var("VFIO_URING_DEVICE") {
            let device = Device::open(&address(&name)).await.unwrap();
            return Self { device, _server: None };
        }
        let namespaces = vec![NamespaceConfig::memory(64 << 20), NamespaceConfig::memory(64 << 20).with_lba_size(4096)];
        let server = nvme::spawn(Config { namespaces, ..Config::default() }).unwrap();
        let device = Device::open(&server.address().parse().unwrap()).await.unwrap();
        Self { device, _server: Some(server) }
    }

    #[allow(dead_code, reason = "not for every test")]
    /// Whether the device is one of the kernel's VFIO.
    pub fn is_kernel(&self) -> bool {
        self.device.descriptor().is_some()
    }

    #[allow(dead_code, reason = "not for every test")]
    /// Another NVMe controller, if there is one.
    pub fn second(&self) -> Option<Address> {
        env::var("VFIO_URING_DEVICES").ok()?.split(',').nth(1).map(address)
    }
}

/// A device of the kernel by the way that is tested, or whatever else is named.
pub fn address(name: &str) -> Address {
    match env::var("VFIO_URING_TRANSPORT") {
        Ok(transport) if !name.contains("vfio-user:") => format!("{transport}:{name}").parse().unwrap(),
        _ => name.parse().unwrap(),
    }
}
