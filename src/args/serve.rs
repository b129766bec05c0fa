//! The command line of `serve`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::size;
use crate::failure::{Failure, Result};

#[derive(Debug, Args)]
pub struct Serve {
    #[command(subcommand)]
    pub model: Model,
}

#[derive(Debug, Subcommand)]
pub enum Model {
    /// An NVMe 1.4 controller with one namespace, in memory or in a file
    Nvme(ServeNvme),
    /// An Intel 82576 network adapter whose cable leads to a TAP interface, to files, to another one, or to a generator
    Igb(ServeIgb),
    /// QEMU's edu device, which computes factorials and copies memory, with a fault queue if wanted
    Edu(ServeEdu),
}

const SERVE_HELP: &str = "\
It runs until Ctrl-C or SIGTERM, serves one client at a time, and takes the next one when a client goes. Blocks in memory
outlive clients, not the server.

Examples:
  vfio-uring serve nvme --socket /tmp/nvme.sock --size 1g
  vfio-uring serve nvme --socket /tmp/nvme.sock --file disk.img --lba-size 4096";

#[derive(Debug, Args)]
#[command(after_help = SERVE_HELP)]
pub struct ServeNvme {
    /// Where to listen; removed at the end
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Bytes of the namespace [default: 1g, or what --file has]
    #[arg(long, value_parser = size)]
    pub size: Option<u64>,
    /// Keep the blocks in this file, which is made if --size is given too
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Bytes of a block: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = lba_size)]
    pub lba_size: u32,
}

const IGB_HELP: &str = "\
It runs until Ctrl-C or SIGTERM, serves one client at a time, and takes the next one when a client goes. Wires:
  sink                    takes all packets, sends none (when nothing is said)
  none                    no cable, so no link
  tap:NAME                a TAP interface, made if need be; needs CAP_NET_ADMIN, or one that belongs to the user
  pcap-in:FILE            receives the packets of a file
  pcap-out:FILE           writes what is sent to a file; with pcap-in, too
  peer:PATH               a second adapter, which is served at this socket, with the next MAC address
  generator[:SIZE[,FLOWS[,COUNT]]]
                          receives UDP packets of SIZE bytes without CRC (60), in FLOWS flows (1), COUNT of them (0: no end)

Examples:
  vfio-uring serve igb --socket /tmp/nic.sock --wire tap:tap0
  vfio-uring serve igb --socket /tmp/a.sock --wire peer:/tmp/b.sock
  vfio-uring serve igb --socket /tmp/nic.sock --wire pcap-in:in.pcap --wire pcap-out:out.pcap";

#[derive(Debug, Args)]
#[command(after_help = IGB_HELP)]
pub struct ServeIgb {
    /// Where to listen; removed at the end
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// MAC address of one station [default: a locally administered one]
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub mac: Option<Mac>,
    /// Where the cable leads to
    #[arg(long, value_name = "WIRE", value_parser = wire)]
    pub wire: Vec<WireArg>,
}

const EDU_HELP: &str = "\
It runs until Ctrl-C or SIGTERM, serves one client at a time, and takes the next one when a client goes. With a fault queue, a copy
from or to an address that the client has not mapped is reported there.

Examples:
  vfio-uring serve edu --socket /tmp/edu.sock
  vfio-uring serve edu --socket /tmp/edu.sock --faults single-region";

#[derive(Debug, Args)]
#[command(after_help = EDU_HELP)]
pub struct ServeEdu {
    /// Where to listen; removed at the end
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The form of its fault queue [default: it has none]
    #[arg(long, value_name = "FORM")]
    pub faults: Option<FaultsArg>,
}

/// The form of a fault queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FaultsArg {
    /// A region for the producer and one for the consumer, who agree on a version
    TwoRegion,
    /// One region, and one for the answers to page requests
    SingleRegion,
}

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Where a NIC's cable leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireArg {
    None,
    Sink,
    Tap(String),
    PcapIn(PathBuf),
    PcapOut(PathBuf),
    Peer(PathBuf),
    Generator { size: usize, flows: usize, count: u64 },
}

impl ServeIgb {
    /// Checks that the wires go together.
    pub fn check(&self) -> Result<()> {
        let together = match &self.wire[..] {
            [] | [_] => true,
            [one, two] => {
                let in_and_out = |a: &WireArg, b: &WireArg| matches!((a, b), (WireArg::PcapIn(_), WireArg::PcapOut(_)));
                in_and_out(one, two) || in_and_out(two, one)
            }
            _ => false,
        };
        if !together {
            return Err(Failure::Usage("--wire: one only, or pcap-in with pcap-out".into()));
        }
        if self.wire.iter().any(|wire| matches!(wire, WireArg::Peer(path) if *path == self.socket)) {
            return Err(Failure::Usage("--wire peer: the second adapter needs a socket of its own".into()));
        }
        Ok(())
    }
}

impl ServeNvme {
    /// Checks what can be checked without the file.
    pub fn check(&self) -> Result<()> {
        match self.size {
            Some(size) if !size.is_multiple_of(self.lba_size.into()) => {
                Err(Failure::Usage(format!("--size {size}: it has to be a multiple of --lba-size, {}", self.lba_size)))
            }
            _ => Ok(()),
        }
    }
}

fn lba_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4k" | "4K" => Ok(4096),
        _ => Err("a block has 512 or 4096 bytes".into()),
    }
}

fn mac(text: &str) -> Result<Mac, String> {
    let wrong = "a MAC address of one station is six bytes as 02:00:00:00:00:01, the first of them even";
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong)?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(wrong.into());
    }
    Ok(Mac(mac))
}

fn wire(text: &str) -> Result<WireArg, String> {
    let (sort, rest) = text.split_once(':').map_or((text, None), |(sort, rest)| (sort, Some(rest)));
    match (sort, rest) {
        ("none", None) => Ok(WireArg::None),
        ("sink", None) => Ok(WireArg::Sink),
        ("tap", Some(name)) if !name.is_empty() => Ok(WireArg::Tap(name.into())),
        ("pcap-in", Some(path)) if !path.is_empty() => Ok(WireArg::PcapIn(path.into())),
        ("pcap-out", Some(path)) if !path.is_empty() => Ok(WireArg::PcapOut(path.into())),
        ("peer", Some(path)) if !path.is_empty() => Ok(WireArg::Peer(path.into())),
        ("generator", rest) => generator(rest.unwrap_or("60")),
        _ => {
            Err("a wire is sink, none, tap:NAME, pcap-in:FILE, pcap-out:FILE, peer:PATH or generator:SIZE,FLOWS,COUNT"
                .into())
        }
    }
}

fn generator(text: &str) -> Result<WireArg, String> {
    let mut numbers = text.split(',').map(|part| part.parse::<u64>());
    let mut next =
        |or| numbers.next().unwrap_or(Ok(or)).map_err(|_| "a generator is generator:SIZE,FLOWS,COUNT: whole numbers");
    let (size, flows, count) = (next(60)?, next(1)?, next(0)?);
    if numbers.next().is_some() || !(60..=9724).contains(&size) || !(1..=4096).contains(&flows) {
        return Err("a generator has packets of 60 to 9724 bytes, in 1 to 4096 flows".into());
    }
    Ok(WireArg::Generator { size: size as usize, flows: flows as usize, count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_stations() {
        assert_eq!(mac("02:00:5e:Aa:00:fF"), Ok(Mac([2, 0, 0x5e, 0xaa, 0, 0xff])));
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            assert!(mac(text).is_err(), "{text}");
        }
    }

    #[test]
    fn wires() {
        assert_eq!(wire("tap:tap0"), Ok(WireArg::Tap("tap0".into())));
        assert_eq!(wire("generator"), Ok(WireArg::Generator { size: 60, flows: 1, count: 0 }));
        assert_eq!(wire("generator:1514,8,100"), Ok(WireArg::Generator { size: 1514, flows: 8, count: 100 }));
        for text in
            ["", "tap", "tap:", "sink:x", "cable", "generator:59", "generator:60,0", "generator:60,1,1,1", "generator:a"]
        {
            assert!(wire(text).is_err(), "{text}");
        }
        let serve = |wires: &[&str]| {
            let wire = wires.iter().map(|text| wire(text).unwrap()).collect();
            ServeIgb { socket: "/s".into(), mac: None, wire }.check().is_ok()
        };
        assert!(serve(&[]) && serve(&["sink"]) && serve(&["pcap-out:b", "pcap-in:a"]) && serve(&["peer:/t"]));
        assert!(!serve(&["sink", "none"]) && !serve(&["pcap-in:a", "pcap-in:b"]) && !serve(&["tap:a", "pcap-in:b"]));
        assert!(!serve(&["peer:/s"]));
    }
}
