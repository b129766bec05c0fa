//! The vfio-user client and the device layer against servers: well-behaved ones of every kind, hostile ones, and the
//! `vfio_user` crate's.

mod events;
mod fake;
mod gate;
mod hostile;
mod interop;
mod normal;
mod shared;

use std::{future::Future, time::Duration};

use vfio_uring::{
    device::{Device, Options},
    reactor::{Reactor, timeout},
};

/// Runs a test; it fails when it takes long.
fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(fake::LIMIT, future).await.expect("no hang") })
}

/// Long enough for a busy machine.
fn patient() -> Options {
    Options { deadline: Duration::from_secs(10), ..Options::default() }
}

/// For servers that stall.
fn impatient() -> Options {
    Options { deadline: Duration::from_millis(500), ..Options::default() }
}

async fn open(fake: &fake::Fake) -> Device {
    Device::open_with(&fake.address(), patient()).await.expect("a device")
}
