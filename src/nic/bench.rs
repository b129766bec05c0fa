//! `vfio-uring nic bench`.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use vfio_uring::{
    device::{Address, Device},
    reactor::{JoinHandle, Reactor, sleep, spawn, timeout},
};
use vfio_uring_igb::{Nic, Options, QueueSeed, Statistics};

use super::{
    cost::Meter,
    ports::{Software, bring_up, with_link},
    report::{Report, drops},
    work::{self, PACKETS},
};
use crate::{
    args::{Format, NicBench, NicMode},
    failure::{Failure, Result, print, print_aside},
    pin,
    signals::{INTERRUPTED, Interrupted},
};

/// Between looks for Ctrl-C and at queues that have ended.
const TICK: Duration = Duration::from_millis(50);
/// Before what is measured: rings and caches are filled.
const WARM_UP: Duration = Duration::from_millis(200);
/// How long a NIC may take to stop that failed.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two interrupts at least.
const INTERRUPTS: Duration = Duration::from_micros(20);
/// Bytes of a frame's CRC.
const CRC: usize = 4;

/// Runs the benchmark and prints its result.
pub fn run(args: &NicBench) -> Result<ExitCode> {
    args.check()?;
    let interrupted = Interrupted::watch()?;
    let cores = if args.pin { Some(pin::two_cores()?) } else { None };
    let software = match args.device.is_empty() {
        true => Software::of(args.mode, usize::from(args.size) - CRC, cores.map(|(_, other)| other))?,
        false => Vec::new(),
    };
    if let Some((core, _)) = cores {
        core.take()?;
    }
    if !software.is_empty() {
        let wires = match args.mode {
            NicMode::Rx => "a software NIC in a thread of this process, with a packet generator",
            NicMode::Tx => "a software NIC in a thread of this process, with a sink",
            NicMode::Forward => "software NICs in threads of this process, one with a packet generator, one with a sink",
        };
        let text = format!("no --device: {wires}");
        match args.output.format() {
            Format::Human => print(&format!("{text}\n"))?,
            Format::Json => print_aside(&text),
        }
    }
    let addresses: Vec<Address> = match software.is_empty() {
        true => args.device.clone(),
        false => software.iter().map(|nic| nic.address().clone()).collect(),
    };
    let reactor = Reactor::builder().idle(args.idle.into()).build()?;
    let report = reactor.block_on(session(args, &addresses, &software, &interrupted));
    drop(reactor);
    let stopped = software.into_iter().try_for_each(Software::stop);
    let report = report?;
    print(&match args.output.format() {
        Format::Human => report.human(),
        Format::Json => report.json(),
    })?;
    stopped?;
    Ok(if report.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// A NIC that is up.
struct Port {
    device: Device,
    nic: Nic,
    seeds: Vec<QueueSeed>,
}

/// Brings the NICs up, measures, and stops them.
async fn session(
    args: &NicBench,
    addresses: &[Address],
    software: &[Software],
    interrupted: &Interrupted,
) -> Result<Report> {
    let max_frame = usize::from(args.size).max(1518);
    let options = Options {
        queues: args.queues,
        max_frame,
        // A frame in a buffer.
        buffer_len: max_frame.next_multiple_of(1024).max(2048),
        promiscuous: true,
        // Of use to a driver that sleeps, and for the link; one that has packets to deal with does not ask for any.
        interrupt: Some(INTERRUPTS),
        // A generator waits for buffers, so that it is the driver that is measured.
        flow_control: !software.is_empty(),
        ..Options::default()
    };
    let mut ports: Vec<Port> = Vec::new();
    for address in addresses {
        // What one receives the other sends: the same memory.
        let space = ports.first().map(|port| port.device.dma().clone());
        let (device, nic, seeds) = bring_up(address, space, options.clone()).await?;
        with_link(&nic, address).await?;
        ports.push(Port { device, nic, seeds });
    }
    let tasks = start(args, &mut ports)?;
    let measured = measure(args, &ports, software, &tasks, interrupted).await;
    for task in tasks {
        task.abort();
        let _ = task.await;
    }
    for port in ports {
        match &measured {
            Ok(_) => port.nic.stop().await?,
            // A device that failed may fail at this, too: what is told is why the run did.
            Err(_) => drop(timeout(PATIENCE, port.nic.stop()).await),
        }
    }
    measured
}

type Task = JoinHandle<vfio_uring_igb::Result<()>>;

/// Starts the queues, and a task for each pair.
fn start(args: &NicBench, ports: &mut [Port]) -> Result<Vec<Task>> {
    let (batch, size) = (usize::from(args.batch), usize::from(args.size) - CRC);
    let mut all: Vec<Vec<_>> = Vec::new();
    for port in ports.iter_mut() {
        let queues = port.seeds.drain(..).map(QueueSeed::start);
        all.push(queues.collect::<vfio_uring_igb::Result<_>>()?);
    }
    let macs: Vec<_> = ports.iter().map(|port| port.nic.mac()).collect();
    let (Some(&first), Some(&last)) = (macs.first(), macs.last()) else { return Ok(Vec::new()) };
    let mut all = all.into_iter();
    let (Some(queues), second) = (all.next(), all.next()) else { return Ok(Vec::new()) };
    let mut second = second.map(Vec::into_iter);
    let mut tasks = Vec::new();
    for (rx, tx) in queues {
        tasks.push(match args.mode {
            NicMode::Rx => spawn(work::receive(rx, tx, batch)),
            NicMode::Tx => spawn(work::send(rx, tx, work::frame(first, size), batch)),
            NicMode::Forward => {
                // To all, from the NIC that sends.
                let mut addresses = [0xff; 12];
                addresses[6..].copy_from_slice(&last);
                match second.as_mut().and_then(Iterator::next) {
                    Some((other_rx, other_tx)) => spawn(async move {
                        // Nothing is taken there: what comes to it is dropped by it.
                        let _kept = (tx, other_rx);
                        work::forward(rx, other_tx, addresses, batch).await
                    }),
                    None => spawn(work::forward(rx, tx, addresses, batch)),
                }
            }
        });
    }
    Ok(tasks)
}

/// What was counted at one point in time.
async fn counts(ports: &[Port], software: &[Software]) -> Result<(Vec<Statistics>, BTreeMap<String, u64>)> {
    let mut all = Vec::new();
    for port in ports {
        all.push(port.nic.statistics().await?);
    }
    let dropped = drops(&all, software);
    Ok((all, dropped))
}

/// Lets time pass; whether it was cut short by Ctrl-C.
async fn pass(time: Duration, tasks: &[Task], interrupted: &Interrupted) -> Result<bool> {
    let end = Instant::now() + time;
    while let left = end.saturating_duration_since(Instant::now())
        && left > Duration::ZERO
    {
        if interrupted.is_set() {
            return Ok(true);
        }
        if tasks.iter().any(JoinHandle::is_finished) {
            return Ok(false);
        }
        sleep(left.min(TICK)).await;
    }
    Ok(false)
}

async fn measure(
    args: &NicBench,
    ports: &[Port],
    software: &[Software],
    tasks: &[Task],
    interrupted: &Interrupted,
) -> Result<Report> {
    pass(WARM_UP, tasks, interrupted).await?;
    let (_, before) = counts(ports, software).await?;
    let (start, first, meter) = (Instant::now(), PACKETS.load(Relaxed), Meter::start());
    let cut = pass(args.runtime, tasks, interrupted).await?;
    let (elapsed, packets, counted) = (start.elapsed(), PACKETS.load(Relaxed) - first, meter.stop());
    let (_, after) = counts(ports, software).await?;
    if tasks.iter().any(JoinHandle::is_finished) {
        return Err(Failure::new("a queue has ended during the run: the device failed, or it was reset"));
    }
    let cost = counted.cost(packets).await;
    let dropped = after.into_iter().map(|(cause, count)| {
        let earlier = before.get(&cause).copied().unwrap_or(0);
        (cause, count.saturating_sub(earlier))
    });
    let seconds = elapsed.as_secs_f64();
    let pps = packets as f64 / seconds;
    Ok(Report {
        devices: match software.is_empty() {
            true => args.device.iter().map(Address::to_string).collect(),
            false => vec!["embedded".into(); ports.len()],
        },
        mode: args.mode.name(),
        size: args.size,
        queues: args.queues,
        batch: args.batch,
        idle: args.idle.name(),
        pinned: args.pin,
        runtime_ms: elapsed.as_millis() as u64,
        interrupted: cut,
        packets,
        pps,
        mpps: pps / 1e6,
        bits_per_second: pps * f64::from(args.size) * 8.0,
        cost,
        drops: dropped.collect(),
    })
}
