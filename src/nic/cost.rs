//! What a packet costs the driver's thread.

use std::fs;

use perf_event::{Builder, Counter, events::Hardware};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::steps;
use crate::failure::Result;

/// A figure, and how it was come by.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// `None`: it is not to be had, and `by` says why.
    pub per_packet: Option<f64>,
    pub by: String,
}

/// What a packet costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// CPU time of the driver's thread, of the kernel too.
    pub cpu_ns_per_packet: Option<f64>,
    pub instructions: Figure,
    pub cycles: Figure,
}

/// Counts what the calling thread does from now on.
pub struct Meter {
    cpu_ns: u64,
    counters: Result<[Counter; 2], String>,
}

/// What was counted between two points in time.
pub struct Counted {
    cpu_ns: u64,
    /// Instructions and cycles.
    counters: Result<[u64; 2], String>,
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Why there are none, in words where the system's mislead.
fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::Unsupported => "this machine shows none".into(),
        std::io::ErrorKind::PermissionDenied => "not permitted, see /proc/sys/kernel/perf_event_paranoid".into(),
        _ => error.to_string(),
    }
}

impl Meter {
    pub fn start() -> Self {
        let counter = |event: Hardware| {
            let mut counter = Builder::new(event).build()?;
            counter.enable()?;
            Ok::<_, std::io::Error>(counter)
        };
        let counters = counter(Hardware::INSTRUCTIONS)
            .and_then(|instructions| Ok([instructions, counter(Hardware::CPU_CYCLES)?]))
            .map_err(|error: std::io::Error| format!("no performance counters: {}", reason(&error)));
        Self { cpu_ns: cpu_ns(), counters }
    }

    pub fn stop(self) -> Counted {
        let counters = self.counters.and_then(|[mut instructions, mut cycles]| {
            let read =
                |counter: &mut Counter| counter.read().map_err(|error| format!("reading the performance counters: {error}"));
            Ok([read(&mut instructions)?, read(&mut cycles)?])
        });
        Counted { cpu_ns: cpu_ns() - self.cpu_ns, counters }
    }
}

impl Counted {
    /// For as many packets. What the counters do not tell is found in other ways, while packets go on.
    pub async fn cost(self, packets: u64) -> Cost {
        let each = |value: u64| (packets != 0).then(|| value as f64 / packets as f64);
        let cpu_ns_per_packet = each(self.cpu_ns);
        let (instructions, cycles) = match self.counters {
            Ok([instructions, cycles]) => {
                let figure = |value| Figure { per_packet: each(value), by: "performance counter, user space".into() };
                (figure(instructions), figure(cycles))
            }
            Err(why) => (stepped(&why).await, estimated(cpu_ns_per_packet, &why)),
        };
        Cost { cpu_ns_per_packet, instructions, cycles }
    }
}

async fn stepped(why: &str) -> Figure {
    match steps::of_this_thread().await {
        Ok(stepped) => Figure {
            per_packet: Some(stepped.instructions),
            by: format!("single steps through {} packets, user space, median of batches ({why})", stepped.packets),
        },
        Err(error) => Figure { per_packet: None, by: format!("{why}; {error}") },
    }
}

fn estimated(cpu_ns: Option<f64>, why: &str) -> Figure {
    match clock_mhz() {
        Some(mhz) => Figure {
            per_packet: cpu_ns.map(|ns| ns * mhz / 1e3),
            by: format!("estimate: CPU time at {mhz:.0} MHz, kernel included ({why})"),
        },
        None => Figure { per_packet: None, by: format!("{why}; /proc/cpuinfo tells no clock rate") },
    }
}

/// Of the first core.
fn clock_mhz() -> Option<f64> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("cpu MHz"))?;
    line.trim_start_matches([' ', '\t', ':']).parse().ok()
}
