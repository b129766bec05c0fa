//! Writes a block of an NVMe device and reads it back. Without an argument the device is a software controller in this process:
//! `cargo run --example nvme_read [vfio-user:/path/to/socket]`. It OVERWRITES the first block.

use std::error::Error;

use vfio_uring::{
    device::{Address, Device},
    dma::{HugePages, Pool},
    reactor::Reactor,
};
use vfio_uring_models::nvme;
use vfio_uring_nvme::{Controller, Options};

/// The driver's user: some twenty lines.
pub async fn write_and_read(address: &Address) -> Result<(), Box<dyn Error>> {
    let device = Device::open(address).await?;
    let controller = Controller::new(&device, Options::default()).await?;
    let ns = controller.create_queue(32).await?.namespace(1)?;
    let pool = Pool::new(device.dma(), 1 << 20, HugePages::No).await?;

    // Buffers go with the command and come back with its result.
    let mut buf = pool.alloc(ns.block_size())?;
    buf.fill(0x5a);
    let (written, buf) = ns.write(0, buf).await;
    written?;
    let (one, other) = futures::join!(ns.read(0, pool.alloc(ns.block_size())?), ns.read(1, buf));
    one.0?;
    other.0?;
    assert!(one.1.iter().all(|&byte| byte == 0x5a));

    println!("{}: {} blocks of {} bytes, block 0 is as written", controller.info().model, ns.blocks(), ns.block_size());
    Ok(controller.shutdown().await?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let reactor = Reactor::new()?;
    if let Some(address) = std::env::args().nth(1) {
        return reactor.block_on(write_and_read(&address.parse()?));
    }
    let server = nvme::spawn(Default::default())?;
    reactor.block_on(write_and_read(&server.address().parse()?))
}
