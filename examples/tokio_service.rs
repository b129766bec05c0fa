//! A service on a multi-thread tokio runtime whose tasks share one NVMe queue. A reactor thread owns the queue; the tasks reach it
//! through a handle that is `Send`. Without an argument the device is a software controller in this process:
//! `cargo run --release --example tokio_service [vfio-user:/path/to/socket]`. It OVERWRITES the first blocks.

use std::{
    error::Error,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Address, Device},
    dma::{DmaBuf, HugePages, Pool},
    reactor::Reactor,
};
use vfio_uring_models::nvme;
use vfio_uring_nvme::{Controller, Options, Remote};

const TASKS: u64 = 100;
/// Requests that the queue takes at once; tasks beyond that wait their turn.
const CAPACITY: usize = 64;
/// Blocks that each task has to itself, and how often it writes and reads them.
const BLOCKS: u64 = 16;
const ROUNDS: u64 = 10;

type Failure = Box<dyn Error + Send + Sync>;

/// The reactor thread: it owns the device, the controller and the queue, and serves the handle until nobody has it any more.
fn own(address: &Address, ready: &mpsc::Sender<(String, Remote, Pool)>) -> Result<(), Failure> {
    Reactor::new()?.block_on(async {
        let device = Device::open(address).await?;
        let controller = Controller::new(&device, Options::default()).await?;
        let (remote, runner) = controller.create_queue(CAPACITY).await?.namespace(1)?.remote(CAPACITY)?;
        let pool =
            Pool::new(device.dma(), TASKS as usize * remote.block_size().next_multiple_of(4096), HugePages::No).await?;
        ready.send((controller.info().model.clone(), remote, pool))?;
        runner.run().await;
        Ok(controller.shutdown().await?)
    })
}

/// One of the service's tasks: it writes its blocks and reads them back, over and over. Any tokio worker may run it.
async fn task(number: u64, remote: Remote, mut buf: DmaBuf) -> Result<(u64, Duration), Failure> {
    let (mut verified, mut longest) = (0, Duration::ZERO);
    for round in 0..ROUNDS {
        for lba in number * BLOCKS..(number + 1) * BLOCKS {
            let start = Instant::now();
            let pattern = (round * 31 + lba) as u8;
            buf.fill(pattern);
            // The buffer goes with the request and comes back with the result.
            let (written, back) = remote.write(lba, buf).await;
            written?;
            buf = back;
            buf.fill(!pattern);
            let (read, back) = remote.read(lba, buf).await;
            read?;
            buf = back;
            if buf.iter().any(|&byte| byte != pattern) {
                return Err(format!("block {lba} is not as it was written").into());
            }
            verified += 1;
            longest = longest.max(start.elapsed() / 2);
        }
    }
    remote.flush().await?;
    Ok((verified, longest))
}

/// The service, and what it says of itself.
pub fn serve(address: Address) -> Result<(), Failure> {
    let (ready, receiver) = mpsc::channel();
    let owner = thread::spawn(move || own(&address, &ready));
    let Ok((model, remote, pool)) = receiver.recv() else {
        return owner.join().expect("the reactor thread does not panic");
    };
    println!("a reactor thread owns {model}: {} blocks of {} bytes", remote.blocks(), remote.block_size());

    let runtime = tokio::runtime::Builder::new_multi_thread().build()?;
    let workers = runtime.metrics().num_workers();
    println!(
        "{TASKS} tokio tasks on {workers} worker threads share its queue: {} requests under way at once",
        remote.capacity()
    );
    let start = Instant::now();
    let (mut verified, mut longest) = (0, Duration::ZERO);
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for number in 0..TASKS {
            tasks.push(tokio::spawn(task(number, remote.clone(), pool.alloc(remote.block_size())?)));
        }
        for task in tasks {
            let (blocks, slowest) = task.await??;
            verified += blocks;
            longest = longest.max(slowest);
        }
        Ok::<_, Failure>(())
    })?;
    let (ios, time) = (2 * verified, start.elapsed());
    let rate = ios as f64 / time.as_secs_f64();
    println!("{ios} I/Os in {:.0} ms: {rate:.0} IOPS", time.as_secs_f64() * 1e3);
    println!("{verified} blocks were written, read back and verified; the slowest took {} us an I/O", longest.as_micros());

    // The last handle: its end ends the runner, and with it the reactor thread.
    drop(remote);
    owner.join().expect("the reactor thread does not panic")?;
    println!("the handle is dropped, the controller is shut down");
    Ok(())
}

fn main() -> Result<(), Failure> {
    if let Some(address) = std::env::args().nth(1) {
        return serve(address.parse()?);
    }
    println!("no address: the software controller runs in a thread of this process, its blocks in memory");
    let server = nvme::spawn(Default::default())?;
    serve(server.address().parse()?)
}
