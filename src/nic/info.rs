//! `vfio-uring nic info`.

use std::{collections::BTreeMap, fmt::Write, process::ExitCode, time::Duration};

use serde::Serialize;
use vfio_uring::{
    device::{Address, Irq},
    reactor::Reactor,
};
use vfio_uring_igb::{Options, Statistics, spec};

use super::{
    mac,
    ports::{Software, bring_up, linked},
};
use crate::{
    args::{Format, NicInfo},
    failure::{Result, print},
};

/// How long a link may take before it is said to be down.
const LINK: Duration = Duration::from_secs(3);
/// What the driver uses of the NIC.
const FEATURES: [&str; 9] = [
    "receive side scaling",
    "checksums checked",
    "checksums inserted",
    "TCP segmentation",
    "VLAN tags inserted and stripped",
    "jumbo frames",
    "MAC filters",
    "flow control",
    "interrupt moderation",
];

/// What a NIC is.
#[derive(Serialize)]
struct Description {
    device: String,
    mac: String,
    link: Link,
    queues: u16,
    vectors: u32,
    max_frame: usize,
    mac_filters: usize,
    features: [&'static str; 9],
    statistics: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct Link {
    up: bool,
    speed: u32,
    full_duplex: bool,
}

/// Brings a NIC up, shows what it is, and stops it.
pub fn run(args: &NicInfo) -> Result<ExitCode> {
    let software = if args.device.is_none() { Some(Software::idle()?) } else { None };
    let address = args.device.as_ref().or(software.as_ref().map(Software::address));
    if let Some(address) = address {
        let description = Reactor::new()?.block_on(describe(address, software.is_some()))?;
        print(&match args.output.format() {
            Format::Human => description.human(),
            // Plain data always has a form.
            Format::Json => serde_json::to_string(&description).map(|json| json + "\n").unwrap_or_default(),
        })?;
    }
    software.map_or(Ok(()), Software::stop)?;
    Ok(ExitCode::SUCCESS)
}

async fn describe(address: &Address, embedded: bool) -> Result<Description> {
    let (device, nic, seeds) = bring_up(address, None, Options::default()).await?;
    linked(&nic, LINK).await?;
    let link = nic.link().await?;
    let description = Description {
        device: if embedded { "embedded".into() } else { address.to_string() },
        mac: mac(nic.mac()),
        link: Link { up: link.up, speed: link.speed, full_duplex: link.full_duplex },
        queues: spec::QUEUES,
        vectors: device.irq(Irq::MsiX).count,
        max_frame: spec::MAX_FRAME,
        mac_filters: spec::ADDRESSES,
        features: FEATURES,
        statistics: statistics(&nic.statistics().await?),
    };
    drop(seeds);
    nic.stop().await?;
    Ok(description)
}

fn statistics(all: &Statistics) -> BTreeMap<&'static str, u64> {
    BTreeMap::from([
        ("rx_packets", all.rx_packets),
        ("rx_bytes", all.rx_bytes),
        ("rx_broadcast", all.rx_broadcast),
        ("rx_multicast", all.rx_multicast),
        ("rx_crc_errors", all.rx_crc_errors),
        ("rx_errors", all.rx_errors),
        ("rx_missed", all.rx_missed),
        ("rx_no_buffer", all.rx_no_buffer),
        ("rx_queue_dropped", all.rx_queue_dropped),
        ("rx_undersize", all.rx_undersize),
        ("rx_oversize", all.rx_oversize),
        ("tx_packets", all.tx_packets),
        ("tx_bytes", all.tx_bytes),
        ("tx_tso", all.tx_tso),
    ])
}

impl Description {
    fn human(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_human(&mut text);
        text
    }

    fn write_human(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{}: Intel 82576, MAC address {}", self.device, self.mac)?;
        match (self.link.up, self.link.full_duplex) {
            (false, _) => writeln!(text, "link       down")?,
            (true, full) => {
                writeln!(text, "link       up, {} Mb/s, {} duplex", self.link.speed, if full { "full" } else { "half" })?;
            }
        }
        writeln!(
            text,
            "queues     {} to receive, {} to send, {} interrupt vectors",
            self.queues, self.queues, self.vectors
        )?;
        writeln!(text, "frames     up to {} B, {} MAC addresses", self.max_frame, self.mac_filters)?;
        writeln!(text, "features   {}", self.features.join(", "))?;
        writeln!(text, "statistics since it was brought up for this")?;
        self.statistics.iter().try_for_each(|(name, value)| writeln!(text, "  {name:18} {value}"))
    }
}
