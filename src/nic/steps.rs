//! Counting the instructions of a thread without a performance counter: another process single-steps it.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::{fs::FileExt, process::CommandExt},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        ptrace,
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rustix::{
    process::{PTracer, getpid, set_ptracer},
    thread::gettid,
};
use vfio_uring::reactor::sleep;

use super::work::PACKETS;
use crate::{
    args::NicCount,
    failure::{Failure, Result, print},
};

/// Packets that are enough: a few batches.
const ENOUGH: u64 = 512;
/// How long a count goes on if it takes long, and how long if there are no packets at all.
const LONG: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(15);
/// How long the process that counts may take for all: it ends by itself. To kill it would leave the thread with its trap set.
const PATIENCE: Duration = Duration::from_secs(60);
/// Steps between looks at the counter of packets.
const LOOK: u64 = 8;
/// Between looks whether the count has ended, each of which is counted, too.
const TICK: Duration = Duration::from_millis(500);

/// What was counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stepped {
    /// A packet, in the median batch: what the reactor does now and then beside is in few of them.
    pub instructions: f64,
    pub packets: u64,
}

/// Has the calling thread counted while its reactor goes on.
///
/// # Errors
/// Why that is not possible, in words.
pub async fn of_this_thread() -> Result<Stepped, String> {
    // Where the kernel restricts tracing to parents (Yama), this permits it; where it does not, it is refused and not needed.
    let _ = set_ptracer(PTracer::Any);
    let counted = run().await;
    let _ = set_ptracer(PTracer::None);
    counted
}

async fn run() -> Result<Stepped, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program's file: {error}"))?;
    let place = std::ptr::from_ref(&PACKETS).addr();
    let ids = [getpid(), gettid()].map(|id| id.as_raw_nonzero().to_string());
    let mut child = Command::new(program)
        .args(["nic", "count"])
        .args(ids)
        .args([place as u64, ENOUGH].map(|number| number.to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C is for this process.
        .process_group(0)
        .spawn()
        .map_err(|error| format!("starting a process that counts: {error}"))?;
    let done = wait(&mut child).await?;
    let text = |pipe: Option<&mut dyn Read>| {
        let mut text = String::new();
        if let Some(pipe) = pipe {
            let _ = pipe.read_to_string(&mut text);
        }
        text
    };
    if !done {
        let said = text(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
        return Err(said.trim().trim_start_matches("vfio-uring: ").to_string());
    }
    let said = text(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
    let numbers = said.trim().split_once(' ');
    let parsed = numbers.and_then(|(instructions, packets)| Some((instructions.parse().ok()?, packets.parse().ok()?)));
    let (instructions, packets) = parsed.ok_or("the process that counts gave no numbers")?;
    Ok(Stepped { instructions, packets })
}

/// Waits for its end; whether it did what it was to.
async fn wait(child: &mut Child) -> Result<bool, String> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.success()),
            Ok(None) => sleep(TICK).await,
            Err(error) => return Err(format!("waiting for the process that counts: {error}")),
        }
    }
    Err(format!("the process that counts has not ended after {} s", PATIENCE.as_secs()))
}

/// The process that counts: prints the instructions, and the packets.
pub fn count(args: &NicCount) -> Result<ExitCode> {
    let Stepped { instructions, packets } =
        step(args).map_err(|error| Failure::new(format!("single-stepping the driver's thread: {error}")))?;
    print(&format!("{instructions} {packets}\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn step(args: &NicCount) -> io::Result<Stepped> {
    let memory = File::open(format!("/proc/{}/mem", args.process))?;
    let packets = || {
        let mut value = [0; 8];
        memory.read_exact_at(&mut value, args.counter).map(|()| u64::from_ne_bytes(value))
    };
    let thread = Pid::from_raw(args.thread);
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)?;
    stopped(thread)?;
    let mut signal = None;
    let counted = batches(thread, &mut signal, args.packets, packets);
    // Whatever happened, it goes on without a trap.
    ptrace::detach(thread, signal)?;
    counted
}

/// Steps the thread, which stands, through batches that have so many `wanted` packets.
fn batches(
    thread: Pid,
    signal: &mut Option<Signal>,
    wanted: u64,
    packets: impl Fn() -> io::Result<u64>,
) -> io::Result<Stepped> {
    let (start, mut last) = (Instant::now(), packets()?);
    // Steps at the end of the last batch, packets since the first, and each batch's cost.
    let (mut since, mut counted, mut batches): (Option<u64>, u64, Vec<f64>) = (None, 0, Vec::new());
    for steps in 1.. {
        ptrace::step(thread, signal.take())?;
        *signal = stopped(thread)?;
        if steps % LOOK != 0 {
            continue;
        }
        if start.elapsed() > LIMIT {
            break;
        }
        let now = packets()?;
        let batch = now.wrapping_sub(std::mem::replace(&mut last, now));
        if batch == 0 {
            continue;
        }
        if let Some(since) = since.replace(steps) {
            batches.push((steps - since) as f64 / batch as f64);
            counted += batch;
        }
        if counted >= wanted || (counted > 0 && start.elapsed() > LONG) {
            break;
        }
    }
    batches.sort_by(f64::total_cmp);
    match batches.get(batches.len() / 2) {
        Some(&instructions) => Ok(Stepped { instructions, packets: counted }),
        None => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no two batches came within {} s", LIMIT.as_secs()))),
    }
}

/// Waits until the thread stands; the signal that it is to get, if that is why.
fn stopped(thread: Pid) -> io::Result<Option<Signal>> {
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP) | WaitStatus::PtraceEvent(..)) => return Ok(None),
            Ok(WaitStatus::Stopped(_, signal)) => return Ok(Some(signal)),
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Err(io::ErrorKind::NotFound.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
