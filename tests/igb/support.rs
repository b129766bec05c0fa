//! Two NICs with a cable between them, and what tests on them have in common.
//!
//! `VFIO_URING_DEVICES` names two, with a comma; `VFIO_URING_TRANSPORT` says `group` or `cdev`. Without them software NICs are used.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    env,
    future::Future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use vfio_uring::{
    device::{Address, Device, Options as DeviceOptions},
    reactor::{Idle, Reactor, timeout},
};
use vfio_uring_igb::{Nic, Options, Packet, RxQueue, TxQueue};
use vfio_uring_models::{
    igb::{self, Config, Handle},
    server::Running,
};

/// One test at a time has the devices.
static DEVICES: Mutex<()> = Mutex::new(());

/// Runs a test, within a deadline.
pub fn run<T>(idle: Idle, test: impl Future<Output = T>) -> T {
    let _alone = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let reactor = Reactor::builder().idle(idle).build().unwrap();
    reactor.block_on(async { timeout(Duration::from_secs(150), test).await.expect("no hang") })
}

/// The two devices, and the software behind them.
pub struct Pair {
    addresses: [Address; 2],
    pub servers: Option<(Running, Running)>,
    pub handles: [Handle; 2],
}

impl Pair {
    pub fn new() -> Self {
        Self::with(Config::default(), Config::default())
    }

    /// Software NICs of these configurations, if it is software.
    pub fn with(a: Config, b: Config) -> Self {
        let handles = [a.handle.clone(), b.handle.clone()];
        if let Some(addresses) = real() {
            return Self { addresses, servers: None, handles };
        }
        let (a, b) = igb::pair(a, b).unwrap();
        let addresses = [&a, &b].map(|server| server.address().parse().unwrap());
        Self { addresses, servers: Some((a, b)), handles }
    }

    pub async fn device(&self, index: usize) -> Device {
        Device::open(&self.addresses[index]).await.unwrap()
    }

    /// A device in the address space of another.
    pub async fn joined(&self, index: usize, other: &Device) -> Device {
        let options = DeviceOptions { space: Some(other.dma().clone()), ..DeviceOptions::default() };
        Device::open_with(&self.addresses[index], options).await.unwrap()
    }

    /// Both are brought up, with one queue pair each, and have a link.
    pub async fn up(&self, options: Options) -> (Port, Port) {
        let mut a = Port::new(&self.device(0).await, options.clone()).await;
        let mut b = Port::new(&self.device(1).await, options).await;
        a.linked().await;
        b.linked().await;
        (a, b)
    }
}

/// Whether the devices are real, or those of an emulator.
pub fn is_real() -> bool {
    real().is_some()
}

fn real() -> Option<[Address; 2]> {
    let names = env::var("VFIO_URING_DEVICES").ok()?;
    let (a, b) = names.split_once(',')?;
    let address = |name: &str| match env::var("VFIO_URING_TRANSPORT") {
        Ok(transport) if !name.contains("vfio-user:") => format!("{transport}:{name}").parse().unwrap(),
        _ => name.parse().unwrap(),
    };
    Some([address(a), address(b.split(',').next().unwrap_or(b))])
}

/// A NIC with one queue pair on this thread.
pub struct Port {
    pub nic: Nic,
    pub rx: RxQueue,
    pub tx: TxQueue,
    pub servers: Option<(Running, Running)>,
}

impl Port {
    pub async fn new(device: &Device, options: Options) -> Self {
        let (nic, mut seeds) = Nic::new(device, options).await.unwrap();
        let (rx, tx) = seeds.remove(0).start().unwrap();
        Self { nic, rx, tx, servers: None }
    }

    /// Waits for the link.
    pub async fn linked(&mut self) {
        let mut changes = self.nic.link_changes();
        while !changes.next().await.unwrap().unwrap().up {}
    }

    /// A packet with these bytes, in as many buffers as they take.
    pub fn packet(&self, bytes: &[u8]) -> Option<Packet> {
        let buffers = self.tx.buffers();
        let mut all: Option<Packet> = None;
        for chunk in bytes.chunks(self.nic.options().buffer_len) {
            let mut packet = buffers.alloc()?;
            packet.copy_from(chunk).unwrap();
            match &mut all {
                Some(all) => all.append(packet),
                None => all = Some(packet),
            }
        }
        all
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.tx.ready().await.unwrap();
        let packet = self.packet(bytes).expect("free buffers");
        self.tx.send(packet).unwrap();
    }
}

/// Two NICs on a cable, which are up. The first has the servers.
pub async fn two(options: Options) -> (Port, Port) {
    let mut pair = Pair::new();
    let (mut a, b) = pair.up(options).await;
    a.servers = pair.servers.take();
    (a, b)
}

/// A frame of `len` bytes with an Ethernet type that nobody knows.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[..6].copy_from_slice(&to);
    bytes[6..12].copy_from_slice(&from);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    let word = |i: u64| (seed << 20 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    bytes[14..].chunks_mut(8).zip(0..).for_each(|(to, i)| to.copy_from_slice(&word(i)[..to.len()]));
    bytes
}

/// All bytes of a packet.
pub fn bytes_of(packet: &Packet) -> Vec<u8> {
    packet.segments().flatten().copied().collect()
}
