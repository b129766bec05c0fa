//! Our card, and who is at the other end of its cable.

use std::env;

use futures::StreamExt;
use vfio_uring::{
    device::{Address, Device},
    reactor::sleep,
};
use vfio_uring_igb::{Nic, Options, QueueSeed};

use crate::{linux::Interface, support::Port};

/// Our card, and Linux's.
pub struct Rig {
    pub device: Device,
    pub linux: Interface,
}

/// Names of our card and of Linux's.
pub fn names() -> Option<(String, String)> {
    Some((env::var("VFIO_URING_DEVICE").ok()?, env::var("VFIO_URING_TEST_PEER").ok()?))
}

impl Rig {
    /// `None`: there is no such machine.
    pub async fn open() -> Option<Self> {
        let (ours, theirs) = names()?;
        let transport = env::var("VFIO_URING_TRANSPORT").map_or_else(|_| String::new(), |transport| transport + ":");
        let address: Address = format!("{transport}{ours}").parse().unwrap();
        Some(Self { device: Device::open(&address).await.unwrap(), linux: Interface::of(&theirs) })
    }

    /// Brings our card up; both have a link.
    pub async fn up(&self, options: Options) -> (Nic, Vec<QueueSeed>) {
        let (nic, seeds) = Nic::new(&self.device, options).await.unwrap();
        self.linked(&nic).await;
        (nic, seeds)
    }

    /// Brings our card up with one queue pair.
    pub async fn port(&self, options: Options) -> Port {
        let port = Port::new(&self.device, options).await;
        self.linked(&port.nic).await;
        port
    }

    async fn linked(&self, nic: &Nic) {
        let mut changes = nic.link_changes();
        while !changes.next().await.unwrap().unwrap().up {}
        while !self.linux.has_link() {
            sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}
