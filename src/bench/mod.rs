//! `vfio-uring bench`.

mod job;
mod report;
mod run;
mod verify;
mod work;

use std::{process::ExitCode, rc::Rc};

use vfio_uring::{
    device::{Address, Device},
    dma::{DmaBuf, HugePages, Pool},
    reactor::{Reactor, timeout},
};
use vfio_uring_nvme::{Controller, NamespaceInfo, Options};

use crate::{
    args::{Bench, Format, Mode, Rw},
    embedded::Embedded,
    failure::{Failure, Result, print, print_aside},
    open::open,
    pin,
    signals::{INTERRUPTED, Interrupted},
};
use job::{Job, Stop, TurnClock};
use report::Report;
pub use report::bytes;
use run::{PATIENCE, Run};
use verify::Pattern;
use work::{Ledger, Range, Work};

/// Runs the benchmark and prints its result.
pub fn run(args: &Bench) -> Result<ExitCode> {
    args.check()?;
    let interrupted = Interrupted::watch()?;
    let cores = if args.pin { Some(pin::two_cores()?) } else { None };
    let embedded = match &args.device {
        Some(_) => None,
        None => Some(Embedded::start(args.size, cores.map(|(_, other)| other))?),
    };
    if let Some((core, _)) = cores {
        core.take()?;
    }
    if embedded.is_some() {
        say(args, "no --device: the software controller runs in a thread of this process, its blocks in memory")?;
    }
    let address = match (&args.device, &embedded) {
        (Some(address), _) => address.clone(),
        (None, Some(embedded)) => embedded.address().clone(),
        (None, None) => return Err(Failure::new("there is no device")),
    };
    let reactor = Reactor::builder().idle(args.idle.into()).build()?;
    let report = reactor.block_on(session(args, &address, &interrupted));
    drop(reactor);
    let stopped = embedded.map_or(Ok(()), Embedded::stop);
    let report = report?;
    print(&match args.output_format {
        Format::Human => format!("\n{}", report.human()),
        Format::Json => report.json(),
    })?;
    if let Some(complaint) = report.complaint() {
        return Err(Failure::Failed(complaint));
    }
    stopped?;
    Ok(if report.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// A remark: on stdout, or beside it when that is for programs.
fn say(args: &Bench, text: &str) -> Result<()> {
    match args.output_format {
        Format::Human => print(&format!("{text}\n")),
        Format::Json => {
            print_aside(text);
            Ok(())
        }
    }
}

/// Opens the device, measures, and shuts it down.
async fn session(args: &Bench, address: &Address, interrupted: &Interrupted) -> Result<Report> {
    let device = open(address).await?;
    let options = Options { timeout: args.io_timeout, ..Options::default() };
    let controller = Controller::new(&device, options).await?;
    match measure(args, &device, &controller, interrupted).await {
        Ok(report) => {
            controller.shutdown().await?;
            Ok(report)
        }
        Err(failure) => {
            // A device that failed may fail at this, too: what is told is why the run did.
            let _ = timeout(PATIENCE, controller.shutdown()).await;
            Err(failure)
        }
    }
}

/// Checks what depends on the device; the form of I/O.
fn check(args: &Bench, controller: &Controller, ns: &NamespaceInfo) -> Result<Mode> {
    let refuse = |text: String| Err(Failure::Failed(text));
    let (info, block) = (controller.info(), u64::from(ns.block_size));
    if !args.bs.is_multiple_of(block) {
        return refuse(format!(
            "--bs {}: namespace {} has blocks of {block} bytes, and it has to be a multiple",
            args.bs, ns.nsid
        ));
    }
    if args.size > ns.blocks.saturating_mul(block) {
        return refuse(format!("--size {}: namespace {} has {} bytes", args.size, ns.nsid, ns.blocks.saturating_mul(block)));
    }
    if args.numjobs > info.io_queues {
        return refuse(format!("--numjobs {}: the controller grants {} I/O queues", args.numjobs, info.io_queues));
    }
    if u32::from(args.iodepth) > info.max_queue_entries - 1 {
        let most = info.max_queue_entries - 1;
        return refuse(format!("--iodepth {}: the controller's queues take {most} commands", args.iodepth));
    }
    let splits = args.bs > info.max_transfer as u64;
    match args.mode {
        Some(Mode::Stream) if splits => refuse(format!(
            "--bs {}: one command of this controller carries {} bytes, and --mode stream does not split; --mode future does",
            args.bs, info.max_transfer
        )),
        Some(mode) => Ok(mode),
        None => Ok(if splits { Mode::Future } else { Mode::Stream }),
    }
}

/// Makes the queues and runs the jobs.
async fn measure(args: &Bench, device: &Device, controller: &Controller, interrupted: &Interrupted) -> Result<Report> {
    let nsid = args.nsid;
    let Some(&ns) = controller.namespaces().iter().find(|ns| ns.nsid == nsid) else {
        let known: Vec<_> = controller.namespaces().iter().map(|ns| ns.nsid.to_string()).collect();
        return Err(Failure::Failed(format!("--nsid {nsid}: the controller's namespaces are: {}", known.join(", "))));
    };
    let mode = check(args, controller, &ns)?;
    let stop = Rc::new(Stop::default());
    let (clock, _ticking) = TurnClock::new();
    let unit_blocks = args.bs / u64::from(ns.block_size);
    let units = args.size / u64::from(args.numjobs) / args.bs;
    let mut jobs = Vec::new();
    for index in 0..u64::from(args.numjobs) {
        let depth = args.iodepth.into();
        let queue = match args.interrupts {
            true => controller.create_interrupt_queue(depth).await?,
            false => controller.create_queue(depth).await?,
        };
        let range = Range { first_lba: index * units * unit_blocks, unit_blocks, units };
        let pattern = Pattern { seed: args.seed, block_size: ns.block_size as usize };
        let ledger = args.verify.then(|| Ledger::new(pattern, units));
        let work = Work::new(range, args.seed.wrapping_add(index), ledger);
        let buffers = buffers(args, device, index).await?;
        jobs.push(Job::new(queue.namespace(nsid)?, mode, work, buffers, &clock, &stop)?);
    }
    if args.writes_before() {
        let size = bytes(args.size as f64);
        say(args, &format!("the first {size} of namespace {nsid} are overwritten once before the run"))?;
    }
    let mut measured = Run { args, jobs: &jobs, clock: &clock, stop: &stop, interrupted }.all().await?;
    let (total, read, write) = report::rates(&mut measured.recorder, args.bs, measured.elapsed);
    Ok(Report {
        device: args.device.as_ref().map_or_else(|| "embedded".into(), Address::to_string),
        embedded: args.device.is_none(),
        model: controller.info().model.clone(),
        nsid,
        block_size: ns.block_size,
        rw: args.rw.name(),
        rwmixread: (args.rw == Rw::Randrw).then_some(args.read_percent()),
        bs: args.bs,
        iodepth: args.iodepth,
        numjobs: args.numjobs,
        size: args.size,
        mode: mode.name(),
        idle: args.idle.name(),
        interrupts: args.interrupts,
        pinned: args.pin,
        runtime_ms: measured.elapsed.as_millis() as u64,
        interrupted: interrupted.is_set(),
        total,
        read,
        write,
        errors: measured.errors.values().sum(),
        error_kinds: measured.errors,
        verify: measured.verified,
    })
}

/// Data buffers of a job, with something in them that is not all zeroes.
async fn buffers(args: &Bench, device: &Device, index: u64) -> Result<Vec<DmaBuf>> {
    let len = args.bs as usize;
    let depth = usize::from(args.iodepth);
    let pool = Pool::new(device.dma(), len.next_multiple_of(4096) * depth, HugePages::No).await?;
    let mut rng = fastrand::Rng::with_seed(args.seed ^ index);
    let mut buffers = Vec::new();
    for _ in 0..depth {
        let mut buf = pool.alloc(len)?;
        rng.fill(&mut buf);
        buffers.push(buf);
    }
    Ok(buffers)
}
