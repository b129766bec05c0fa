//! The command line: what can be said, and what can be refused before a device is opened.

mod nic;
mod serve;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use vfio_uring::{
    device::Address,
    pci::{Bdf, sysfs::Pci},
    reactor::Idle,
};

pub use self::{
    nic::{Nic, NicBench, NicCommand, NicCount, NicInfo, NicMode},
    serve::{FaultsArg, Mac, Model, Serve, ServeEdu, ServeIgb, ServeNvme, WireArg},
};
use crate::failure::{Failure, Result};

/// Most commands that can be outstanding on a queue.
const MAX_IODEPTH: u16 = vfio_uring_nvme::MAX_SLOTS as u16;
/// Most queues.
const MAX_NUMJOBS: u16 = 256;
/// Largest transfer.
const MAX_BS: u64 = 64 << 20;
/// Bytes of data buffers at most: they are all in flight at once.
const MAX_BUFFERS: u64 = 4 << 30;
/// Blocks of `--bs` that `--verify` keeps track of, 4 bytes each.
const MAX_VERIFIED: u64 = 1 << 28;

const EXAMPLES: &str = "\
Examples:
  vfio-uring bench                                      4 KiB random reads from a software controller
  vfio-uring bench --rw randrw --verify --runtime 2     reads and writes, data compared
  vfio-uring nic bench --mode forward                   packets from one software NIC to another
  vfio-uring serve nvme --socket /tmp/nvme.sock --size 1g
  vfio-uring serve igb --socket /tmp/nic.sock --wire tap:tap0
  vfio-uring serve edu --socket /tmp/edu.sock --faults single-region
  vfio-uring bench --device vfio-user:/tmp/nvme.sock --bs 128k --rw read
  vfio-uring info vfio-user:/tmp/nvme.sock
  vfio-uring list                                       the PCI devices, and what is missing to use each
  vfio-uring bind 0000:01:00.0 --dry-run                what giving a device to VFIO would do

Exit status: 0 done, 1 failed (also I/O errors and mismatches), 2 wrong usage, 130 interrupted.";

/// Userspace PCI drivers: benchmark, serve and inspect devices
#[derive(Debug, Parser)]
#[command(name = "vfio-uring", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure I/O per second and latency of an NVMe controller
    Bench(Bench),
    /// Measure and inspect network adapters
    Nic(Nic),
    /// Run a software device that vfio-user clients attach to
    Serve(Serve),
    /// Show a device's regions, interrupts, capabilities, and what its controller says of itself
    Info(Info),
    /// Show the PCI devices of this machine, and what is missing to use each
    List(List),
    /// Give a PCI device to VFIO
    Bind(Bind),
    /// Give a PCI device back to the kernel's own driver
    Unbind(Unbind),
}

const BENCH_HELP: &str = "\
Sizes take the suffixes k, m, g and t (powers of 1024).

Without --device the software NVMe controller is started in a thread of this process, and the range is written once before
the run, so that reads come from memory that is there. A device given by --device is written only by a --rw that writes, by
--verify and by --precondition: these OVERWRITE the first --size bytes of its namespace.

Examples:
  vfio-uring bench --rw randrw --rwmixread 70 --iodepth 32 --runtime 10
  vfio-uring bench --iodepth 1 --output-format json | jq .lat_ns
  vfio-uring bench --device vfio-user:/tmp/nvme.sock --numjobs 4";

/// What `bench` is to do: fio's words where fio has them.
#[derive(Debug, Args)]
#[command(after_help = BENCH_HELP)]
pub struct Bench {
    /// Pattern
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    pub rw: Rw,
    /// Percentage of reads, for randrw [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: Option<u8>,
    /// Bytes of an I/O, a multiple of the namespace's block size
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size)]
    pub bs: u64,
    /// I/Os outstanding on each queue
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_IODEPTH)))]
    pub iodepth: u16,
    /// I/O queues, each with an equal part of the range; one thread drives them all
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_NUMJOBS)))]
    pub numjobs: u16,
    /// Seconds to measure
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub runtime: Duration,
    /// Bytes from the namespace's start that are used
    #[arg(long, default_value = "64m", value_parser = size)]
    pub size: u64,
    /// The device: vfio-user:PATH, or 0000:01:00.0 for one that vfio-pci has (with group: or cdev: before it, by that way of the
    /// kernel's VFIO) [default: the software controller, in this process]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub device: Option<Address>,
    /// Namespace
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub nsid: u32,
    /// Write data that can be checked, and check what is read; overwrites the range
    #[arg(long)]
    pub verify: bool,
    /// Write the range once before the run, also on a device given by --device
    #[arg(long)]
    pub precondition: bool,
    /// Form of the driver: batches of completions, or a future for each I/O [default: stream, if one command can carry --bs]
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// How the driver waits: polling all the time, asleep, or polling while that pays
    #[arg(long, value_enum, default_value_t = IdleMode::Hybrid)]
    pub idle: IdleMode,
    /// Have the controller signal completions, so that a driver that does not poll sleeps until then; see --idle
    #[arg(long)]
    pub interrupts: bool,
    /// Keep the driver, and the software controller if it is in this process, on a core each
    #[arg(long)]
    pub pin: bool,
    /// Seconds that one I/O may take
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub io_timeout: Duration,
    /// Seed of the random blocks and of the data that --verify writes
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Form of the result
    #[arg(long, value_enum, default_value_t = Format::Human)]
    pub output_format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rw {
    Read,
    Write,
    Randread,
    Randwrite,
    Randrw,
}

impl Rw {
    /// Whether blocks are taken in random order.
    pub fn random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }

    /// Whether it writes at all.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Randread)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Randrw => "randrw",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Stream,
    Future,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Future => "future",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IdleMode {
    Spin,
    Park,
    Hybrid,
}

impl IdleMode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Spin => "spin",
            Self::Park => "park",
            Self::Hybrid => "hybrid",
        }
    }
}

impl From<IdleMode> for Idle {
    fn from(mode: IdleMode) -> Self {
        match mode {
            IdleMode::Spin => Self::Spin,
            IdleMode::Park => Self::Park,
            IdleMode::Hybrid => Self::Hybrid,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Human,
    Json,
}

/// What `info` is to show.
#[derive(Debug, Args)]
#[command(after_help = "An NVMe controller is reset and identified for its part of the answer, and shut down after: don't \
                        ask while a driver uses it.")]
pub struct Info {
    /// The device: vfio-user:PATH, or 0000:01:00.0 for one that vfio-pci has (with group: or cdev: before it, by that way of the
    /// kernel's VFIO)
    #[arg(value_name = "ADDRESS", value_parser = address)]
    pub device: Address,
    /// Form of the answer
    #[arg(long, value_enum, default_value_t = Format::Human)]
    pub output_format: Format,
}

const LIST_HELP: &str = "\
A device is used by its group (container and type1) or by its own character device (cdev and iommufd); the status names the ways
that are ready, or what is missing. With an address, each missing thing is a sentence with its remedy.

Examples:
  vfio-uring list
  vfio-uring list 0000:01:00.0
  vfio-uring list --output-format json | jq '.[] | select(.ready != [])'";

#[derive(Debug, Args)]
#[command(after_help = LIST_HELP)]
pub struct List {
    /// One device, in detail
    #[arg(value_name = "BDF", value_parser = bdf)]
    pub device: Option<Bdf>,
    /// Bridges too
    #[arg(long, conflicts_with = "device")]
    pub all: bool,
    /// Form of the answer
    #[arg(long, value_enum, default_value_t = Format::Human)]
    pub output_format: Format,
    #[command(flatten)]
    pub machine: Machine,
}

const BIND_HELP: &str = "\
Only this device is concerned (driver_override). Refused are a disk that is mounted, swap or claimed, also by a volume on top, a
network interface that is up, a device that a program uses through VFIO, and one with virtual functions enabled. If the driver
does not take the device, everything is undone.

Examples:
  vfio-uring bind 0000:01:00.0 --dry-run
  sudo vfio-uring bind 0000:01:00.0";

#[derive(Debug, Args)]
#[command(after_help = BIND_HELP)]
pub struct Bind {
    /// The device
    #[arg(value_name = "BDF", value_parser = bdf)]
    pub device: Bdf,
    /// Its new driver
    #[arg(long, value_name = "NAME", default_value = "vfio-pci")]
    pub driver: String,
    /// Only print what would be done
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The kernel chooses the driver, as at boot. A device that a program uses through VFIO is left alone."
)]
pub struct Unbind {
    /// The device
    #[arg(value_name = "BDF", value_parser = bdf)]
    pub device: Bdf,
    /// Only print what would be done
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub machine: Machine,
}

/// The machine whose devices are meant.
#[derive(Debug, Args)]
pub struct Machine {
    /// The folder with its sys, dev and proc
    #[arg(long, value_name = "PATH", default_value = "/", hide = true)]
    root: PathBuf,
}

impl Machine {
    pub fn pci(&self) -> Pci {
        Pci::at(&self.root)
    }
}

impl Bench {
    /// Percentage of reads in a mix.
    pub fn read_percent(&self) -> u8 {
        self.rwmixread.unwrap_or(50)
    }

    /// Whether the range is written before the run.
    pub fn writes_before(&self) -> bool {
        self.verify || self.precondition || self.device.is_none()
    }

    /// Checks what can be checked without the device.
    pub fn check(&self) -> Result<()> {
        let usage = |text: String| Err(Failure::Usage(text));
        let (bs, jobs) = (self.bs, u64::from(self.numjobs));
        if self.rwmixread.is_some() && self.rw != Rw::Randrw {
            return usage(format!("--rwmixread is for --rw randrw, not {}", self.rw.name()));
        }
        if !bs.is_multiple_of(512) || bs > MAX_BS {
            return usage(format!("--bs {bs}: a multiple of 512 (or the device's block size) from 512 to {MAX_BS}"));
        }
        let buffers = bs * u64::from(self.iodepth) * jobs;
        if buffers > MAX_BUFFERS {
            return usage(format!(
                "--bs x --iodepth x --numjobs is {buffers} bytes of buffers: the limit is {MAX_BUFFERS}; lower one of them"
            ));
        }
        if self.size / jobs < bs {
            return usage(format!(
                "--size {}: it has to hold --bs for each of --numjobs, {} bytes at least",
                self.size,
                bs * jobs
            ));
        }
        let units = self.size / jobs / bs;
        if self.verify && units < u64::from(self.iodepth) {
            let least = bs * jobs * u64::from(self.iodepth);
            return usage(format!(
                "--size {}: with --verify it has to hold --bs x --iodepth x --numjobs, {least} bytes at least",
                self.size
            ));
        }
        if self.verify && self.size / bs > MAX_VERIFIED {
            return usage(format!("--size {}: --verify keeps track of {MAX_VERIFIED} blocks of --bs at most", self.size));
        }
        Ok(())
    }
}

/// A number of bytes with an optional suffix; not 0.
fn size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("a size is a number with k, m, g or t after it, as 4k".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "a size is a whole number with k, m, g or t after it, as 4k")?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("a size is not 0".into()),
        Some(size) if size <= i64::MAX as u64 => Ok(size),
        _ => Err("it is above the largest size, 2^63 - 1".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let limits = "a number of seconds from 0.01 to 1000000, fractions allowed";
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(limits.into()),
    }
}

fn address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|error| reason(error, "; write 0000:01:00.0 or vfio-user:/path/to/socket"))
}

fn bdf(text: &str) -> Result<Bdf, String> {
    text.parse().map_err(|error| reason(error, ""))
}

/// What is wrong with an address, which itself is in clap's part of the line.
fn reason(error: vfio_uring::Error, remedy: &str) -> String {
    match error {
        vfio_uring::Error::Address { reason, .. } => format!("{reason}{remedy}"),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("4KiB", 4096), ("1m", 1 << 20), ("2G", 2 << 30), ("1t", 1 << 40)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "k", "-1", "4x", "1.5m", "99999999999t", "18446744073709551615", "4 k", "٣"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["", "0", "-1", "nan", "inf", "1e300", "abc"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn combinations() {
        let parse = |line: &str| {
            let words = ["vfio-uring", "bench"].into_iter().chain(line.split_whitespace());
            match Arguments::try_parse_from(words).expect(line).command {
                Command::Bench(bench) => bench.check(),
                other => panic!("{other:?}"),
            }
        };
        for good in ["", "--rw randrw --rwmixread 0", "--bs 1m --size 1m --iodepth 1", "--verify --size 512k --iodepth 128"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "--rwmixread 50",
            "--bs 1000",
            "--bs 128m --size 1g",
            "--bs 64m --size 1g --iodepth 4095",
            "--size 4k --numjobs 2",
            "--verify --size 256k --iodepth 128",
            "--verify --size 1t --bs 512",
        ] {
            assert!(matches!(parse(bad), Err(Failure::Usage(_))), "{bad}");
        }
    }
}
