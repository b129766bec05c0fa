//! A device is reset, switched off and taken away in the midst of its work, and the program lives on: `cargo run --example
//! survive_reset`. Without an argument the device is a software NVMe controller in this process; with one
//! (`survive_reset 0000:01:00.0`) a real one, whose first megabyte it OVERWRITES.

use std::{cell::Cell, error::Error, rc::Rc};

use vfio_uring::{
    device::{Address, Device},
    dma::{HugePages, Pool},
    reactor::{JoinHandle, Reactor, spawn, yield_now},
};
use vfio_uring_models::{nvme, server::Running};
use vfio_uring_nvme::{self as driver, Controller, Namespace, Options};

/// Tasks, each with a block of its own that it writes and reads in turn.
const TASKS: u64 = 16;

/// Whatever goes wrong ends the example.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The tasks, and how many reads and writes they have done.
struct Work {
    tasks: Vec<JoinHandle<driver::Error>>,
    done: Rc<Cell<u64>>,
}

impl Work {
    /// Starts, and waits until it flows.
    async fn start(controller: &Controller) -> Result<Self> {
        let done = Rc::new(Cell::new(0));
        let queue = controller.create_queue(TASKS as usize).await?;
        let pool = Pool::new(controller.device().dma(), 1 << 20, HugePages::No).await?;
        let mut tasks = Vec::new();
        for block in 0..TASKS {
            tasks.push(spawn(write_and_read(queue.namespace(1)?, pool.clone(), block, done.clone())));
        }
        while done.get() < 1000 {
            yield_now().await;
        }
        println!("  {TASKS} tasks read and write; {} commands are done so far", done.get());
        Ok(Self { tasks, done })
    }

    /// Waits until every task has ended, and shows why the first did.
    async fn end(self) -> Result<()> {
        let mut errors = Vec::new();
        for task in self.tasks {
            errors.push(task.await?);
        }
        println!("  all {} tasks ended, after {} commands: \"{}\"", errors.len(), self.done.get(), errors[0]);
        Ok(())
    }
}

/// Writes and reads until that fails.
async fn write_and_read(ns: Namespace, pool: Pool, block: u64, done: Rc<Cell<u64>>) -> driver::Error {
    let mut buf = match pool.alloc(ns.block_size()) {
        Ok(buf) => buf,
        Err(error) => return error.into(),
    };
    loop {
        buf.fill(block as u8);
        for write in [true, false] {
            let (result, back) = if write { ns.write(block, buf).await } else { ns.read(block, buf).await };
            match result {
                Ok(()) => done.set(done.get() + 1),
                Err(error) => return error,
            }
            buf = back;
        }
        assert!(buf.iter().all(|&byte| byte == block as u8), "block {block} is not as it was written");
    }
}

async fn survive(address: &Address, server: Option<Running>) -> Result<()> {
    let device = Device::open(address).await?;

    println!("1. The device is reset while commands are under way.");
    let controller = Controller::new(&device, Options::default()).await?;
    let work = Work::start(&controller).await?;
    device.reset().await?;
    println!("  the reset is over: the device is {}, in generation {}", device.state(), device.generation());
    work.end().await?;
    println!("  a reset proves that the device does no DMA any more, so their memory is free again");

    println!("2. The same device handle, and the controller is up again.");
    let controller = Controller::new(&device, Options::default()).await?;
    let work = Work::start(&controller).await?;

    println!("3. The memory of its registers is switched off: a store to a doorbell would be a SIGBUS.");
    device.set_memory(false).await?;
    work.end().await?;
    println!("  the device is {}; its memory comes back", device.state());
    device.set_memory(true).await?;
    // It does not know that its queues are lost, so that it has to be stopped before their memory is free.
    controller.reset().await?;
    let controller = Controller::new(&device, Options::default()).await?;
    let work = Work::start(&controller).await?;

    let Some(server) = server else {
        controller.shutdown().await?;
        work.end().await?;
        println!("Unplug the device, or run `vfio-uring unbind` on it, to see it go for good.");
        return Ok(());
    };
    println!("4. The device is taken away: its server ends.");
    server.stop()?;
    work.end().await?;
    println!("  the device is {}; this program is not", device.state());
    Ok(())
}

/// With a software controller in this process.
pub fn run() -> Result<()> {
    let server = nvme::spawn(Default::default())?;
    let address = server.address().parse()?;
    Reactor::new()?.block_on(survive(&address, Some(server)))
}

fn main() -> Result<()> {
    match std::env::args().nth(1) {
        Some(address) => Reactor::new()?.block_on(survive(&address.parse()?, None)),
        None => run(),
    }
}
