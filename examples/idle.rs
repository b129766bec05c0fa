//! What waiting costs: the CPU time of a driver's thread that waits for an interrupt, alone and as a guest of tokio and tokio-uring.
//! `cargo run --release --example idle [SECONDS]`
//!
//! The device is a software NVMe controller in a thread of its own. One of its reads never completes, so that the driver has
//! something to wait for all the time.

use std::{error::Error, thread, time::Duration};

use nix::sys::resource::{UsageWho, getrusage};
use vfio_uring::{
    device::Device,
    dma::{HugePages, Pool},
    reactor::{Idle, Reactor, sleep, spawn},
};
use vfio_uring_models::nvme::{self, Config, Faults};
use vfio_uring_nvme::{Controller, Options};

/// The block whose read never completes.
const STUCK: u64 = 8;
/// Reads by interrupt before the waiting.
const READS: u64 = 1000;

#[derive(Debug, Clone, Copy)]
enum Host {
    None,
    Tokio,
    TokioUring,
}

/// CPU time of this thread so far, in user space and the kernel.
fn cpu_time() -> Result<Duration, Box<dyn Error>> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let [user, system] = [usage.user_time(), usage.system_time()]
        .map(|time| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000));
    Ok(user + system)
}

/// Reads by interrupt, then waits for one that does not come; the CPU time of the waiting.
async fn wait(time: Duration) -> Result<Duration, Box<dyn Error>> {
    let server = nvme::spawn(Config {
        faults: Faults { drop_completion_lba: Some(STUCK), ..Faults::default() },
        ..Config::default()
    })?;
    let device = Device::open(&server.address().parse()?).await?;
    let controller = Controller::new(&device, Options { timeout: time * 10, ..Options::default() }).await?;
    let ns = controller.create_interrupt_queue(32).await?.namespace(1)?;
    let pool = Pool::new(device.dma(), 1 << 20, HugePages::No).await?;
    let mut buf = pool.alloc(4096)?;
    for _ in 0..READS {
        let (read, back) = ns.read(64, buf).await;
        read?;
        buf = back;
    }
    let stuck = spawn(async move { ns.read(STUCK, buf).await.0 });
    // A spin that has paid up to now takes a moment to end.
    sleep(Duration::from_millis(100)).await;
    let before = cpu_time()?;
    sleep(time).await;
    let used = cpu_time()? - before;
    if stuck.is_finished() {
        return Err("the read that never completes did complete".into());
    }
    controller.shutdown().await?;
    Ok(used)
}

fn run(host: Host, idle: Idle, time: Duration) -> Result<Duration, Box<dyn Error>> {
    let builder = Reactor::builder().idle(idle);
    let guest = builder.clone();
    let as_guest = async { guest.guest()?.run(wait(time)).await? };
    match host {
        Host::None => builder.build()?.block_on(wait(time)),
        Host::Tokio => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(as_guest),
        Host::TokioUring => tokio_uring::start(as_guest),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let seconds: f64 = std::env::args().nth(1).map_or(Ok(5.0), |text| text.parse())?;
    let time = Duration::try_from_secs_f64(seconds)?;
    println!("{READS} reads by interrupt, then {seconds} s of waiting for a read that never completes");
    println!("CPU time of the driver's thread, by getrusage:\n");
    println!("{:12} {:8} {:>10} {:>8}", "reactor", "idle", "CPU time", "of a core");
    for host in [Host::None, Host::Tokio, Host::TokioUring] {
        for idle in [Idle::Park, Idle::Hybrid] {
            // A thread of its own for each: its CPU time is nobody else's.
            let used = thread::spawn(move || run(host, idle, time).map_err(|error| error.to_string()));
            let used = used.join().map_err(|_| "the driver's thread panicked")??;
            let name = match host {
                Host::None => "alone",
                Host::Tokio => "in tokio",
                Host::TokioUring => "tokio-uring",
            };
            let share = 100.0 * used.as_secs_f64() / seconds;
            println!(
                "{name:12} {:8} {:>7.2} ms {share:>7.3} %",
                format!("{idle:?}").to_lowercase(),
                used.as_secs_f64() * 1e3
            );
        }
    }
    Ok(())
}
