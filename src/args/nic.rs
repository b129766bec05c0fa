//! The command line of `nic`.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use vfio_uring::device::Address;

use super::{Format, IdleMode, address, seconds};
use crate::failure::{Failure, Result};

/// Packets that a queue pair has buffers for beside its ring.
const MAX_BATCH: u16 = 512;

#[derive(Debug, Args)]
pub struct Nic {
    #[command(subcommand)]
    pub command: NicCommand,
}

#[derive(Debug, Subcommand)]
pub enum NicCommand {
    /// Measure packets per second, and what a packet costs the driver
    Bench(NicBench),
    /// Bring a NIC up and show its address, its link, its features and its statistics
    Info(NicInfo),
    /// Count the instructions of a thread between packets; for `bench`
    #[command(hide = true)]
    Count(NicCount),
}

const BENCH_HELP: &str = "\
rx takes packets and drops them; tx sends packets that are made once; forward changes the addresses of what the first device
receives and sends it by the second, or by the first if there is no second.

Without --device the NICs are software in threads of this process, with a packet generator or a sink at the end of the cable.
A device that is given by --device is reset and sends what it is told to: mind who is at the other end of its cable.

Instructions and cycles are those of the driver's thread in user space, by the processor's counters. Where these are not to be
had, as in most virtual machines, the thread is single-stepped through some batches after the measurement, and cycles are its
CPU time at the clock rate that /proc/cpuinfo tells; the result says which.

Examples:
  vfio-uring nic bench --mode forward
  vfio-uring nic bench --mode rx --size 1518 --queues 4 --runtime 5
  vfio-uring nic bench --mode forward --device 0000:01:00.0 --device 0000:01:00.1 --json | jq .mpps";

/// What `nic bench` is to do.
#[derive(Debug, Args)]
#[command(after_help = BENCH_HELP)]
pub struct NicBench {
    /// What the driver does
    #[arg(long, value_enum, default_value_t = NicMode::Forward)]
    pub mode: NicMode,
    /// Bytes of a frame, with the 4 of its CRC
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u16).range(64..=9728))]
    pub size: u16,
    /// Queue pairs of each NIC; one thread drives them all
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub queues: u16,
    /// Packets taken or sent at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_BATCH)))]
    pub batch: u16,
    /// Seconds to measure
    #[arg(long, visible_alias = "seconds", value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    pub runtime: Duration,
    /// The device, and for forward a second one: vfio-user:PATH, or 0000:01:00.0 for one that vfio-pci has (with group: or cdev:
    /// before it, by that way of the kernel's VFIO) [default: software NICs, in this process]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub device: Vec<Address>,
    /// How the driver waits: polling all the time, asleep, or polling while that pays
    #[arg(long, value_enum, default_value_t = IdleMode::Hybrid)]
    pub idle: IdleMode,
    /// Keep the driver on one core, and the software NICs on another
    #[arg(long)]
    pub pin: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NicMode {
    Rx,
    Tx,
    Forward,
}

impl NicMode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
            Self::Forward => "forward",
        }
    }
}

/// What `nic info` is to show.
#[derive(Debug, Args)]
#[command(
    after_help = "The NIC is reset and brought up for the answer, and stopped after: don't ask while a driver uses it."
)]
pub struct NicInfo {
    /// The device: vfio-user:PATH, or 0000:01:00.0 for one that vfio-pci has (with group: or cdev: before it, by that way of the
    /// kernel's VFIO) [default: a software NIC, in this process]
    #[arg(value_name = "ADDRESS", value_parser = address)]
    pub device: Option<Address>,
    #[command(flatten)]
    pub output: Output,
}

/// Which thread of which process, and where it counts.
#[derive(Debug, Args)]
pub struct NicCount {
    pub process: i32,
    pub thread: i32,
    pub counter: u64,
    pub packets: u64,
}

/// Form of an answer.
#[derive(Debug, Args)]
pub struct Output {
    /// Form of the answer
    #[arg(long, value_enum, default_value_t = Format::Human)]
    output_format: Format,
    /// The same as --output-format json
    #[arg(long, conflicts_with = "output_format")]
    json: bool,
}

impl Output {
    pub fn format(&self) -> Format {
        if self.json { Format::Json } else { self.output_format }
    }
}

impl NicBench {
    /// Checks what can be checked without the device.
    pub fn check(&self) -> Result<()> {
        let most = if self.mode == NicMode::Forward { 2 } else { 1 };
        if self.device.len() > most {
            return Err(Failure::Usage(format!("--device: --mode {} takes {most} at most", self.mode.name())));
        }
        Ok(())
    }
}
