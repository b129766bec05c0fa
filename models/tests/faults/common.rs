//! An edu device with a fault queue, and a client of it.

use std::{future::Future, time::Duration};

use futures::StreamExt;
use vfio_uring::{
    Error, Result,
    device::Device,
    fault::{Fault, FaultGroup, FaultQueue, Lost, Notify, Options, Unrecoverable},
    reactor::{Reactor, sleep, timeout},
};
use vfio_uring_models::{
    edu::{self, register},
    faults::{self, Config, Form, Handle},
    server::Running,
};

/// However slow the machine is.
pub const DEADLINE: Duration = Duration::from_secs(60);
pub const FORMS: [Form; 2] = [Form::TwoRegion, Form::Single];

pub struct Rig {
    pub device: Device,
    pub handle: Handle,
    _server: Running,
}

pub fn config(form: Form) -> Config {
    faults::Config::new(form).unwrap()
}

pub fn polled() -> Options {
    Options { notify: Notify::Poll(Duration::from_millis(1)), ..Options::default() }
}

pub fn run<F: Future>(test: F) -> F::Output {
    Reactor::new().unwrap().block_on(async { timeout(DEADLINE, test).await.expect("the test took too long") })
}

impl Rig {
    pub async fn new(config: Config) -> Self {
        let handle = config.handle.clone();
        let server = edu::spawn(edu::Config { faults: Some(config), ..edu::Config::default() }).unwrap();
        let device = Device::open(&server.address().parse().unwrap()).await.unwrap();
        device.set_bus_master(true).await.unwrap();
        Self { device, handle, _server: server }
    }

    pub async fn open(&self, options: Options) -> Result<FaultQueue> {
        FaultQueue::open(&self.device, options).await
    }

    /// Moves the first bytes of the device's buffer to an address, and waits until that has ended.
    pub async fn dma_to(&self, iova: u64, len: u64) {
        self.start(iova, len).await;
        self.ended().await;
    }

    pub async fn start(&self, iova: u64, len: u64) {
        let bar = self.device.region(0).unwrap();
        bar.write_u64(register::DMA_SOURCE, edu::BUFFER).await.unwrap();
        bar.write_u64(register::DMA_DESTINATION, iova).await.unwrap();
        bar.write_u64(register::DMA_COUNT, len).await.unwrap();
        bar.write_u64(register::DMA_COMMAND, edu::DMA_START | edu::DMA_TO_MEMORY).await.unwrap();
    }

    pub async fn ended(&self) {
        let bar = self.device.region(0).unwrap();
        while bar.read_u64(register::DMA_COMMAND).await.unwrap() & edu::DMA_START != 0 {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the device has stored or lost so many records.
    pub async fn raised(&self, count: u64) {
        loop {
            let counters = self.handle.counters();
            if counters.stored + counters.lost + counters.unheard >= count {
                return;
            }
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// The next group.
pub async fn next(queue: &mut FaultQueue) -> FaultGroup {
    queue.next().await.expect("the queue has ended").expect("the queue has failed")
}

/// The error that ends the queue.
pub async fn failure(queue: &mut FaultQueue) -> Error {
    loop {
        match queue.next().await.expect("the queue has ended without an error") {
            Ok(_) => {}
            Err(error) => {
                assert!(queue.next().await.is_none(), "an error is the end");
                return error;
            }
        }
    }
}

pub fn unrecoverable(group: &FaultGroup) -> Unrecoverable {
    match group.faults[..] {
        [Fault::Unrecoverable(fault)] => fault,
        _ => panic!("{group:?}"),
    }
}

/// The number of a fault of a storm.
pub fn number(group: &FaultGroup) -> u64 {
    unrecoverable(group).address.unwrap() >> 12
}

pub fn count(lost: Option<Lost>) -> u64 {
    match lost {
        None => 0,
        Some(Lost::Count(lost)) => lost,
        Some(Lost::Perhaps) => panic!("they are counted"),
    }
}
