//! What was measured, for people and for programs.

use std::{collections::BTreeMap, fmt::Write};

use serde::Serialize;
use vfio_uring_igb::Statistics;

use super::{
    cost::{Cost, Figure},
    ports::Software,
};

/// What came out.
#[derive(Debug, Serialize)]
pub struct Report {
    pub devices: Vec<String>,
    pub mode: &'static str,
    pub size: u16,
    pub queues: u16,
    pub batch: u16,
    pub idle: &'static str,
    pub pinned: bool,
    pub runtime_ms: u64,
    pub interrupted: bool,
    pub packets: u64,
    pub pps: f64,
    pub mpps: f64,
    /// Of frames with their CRC, without what is between them.
    pub bits_per_second: f64,
    #[serde(flatten)]
    pub cost: Cost,
    /// By who dropped and why; of all devices.
    pub drops: BTreeMap<String, u64>,
}

/// What was dropped, by cause: by the driver, and by the NICs: as their registers say, or the software does.
pub fn drops(statistics: &[Statistics], software: &[Software]) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let mut add = |cause: String, count: u64| *all.entry(cause).or_default() += count;
    for nic in statistics {
        let driver = &nic.queues;
        for (cause, count) in [
            ("driver.bad_descriptor", driver.rx_bad_descriptor),
            ("driver.too_long", driver.rx_too_long),
            ("driver.device_error", driver.rx_device_error),
            ("driver.tx_invalid", driver.tx_invalid),
        ] {
            add(cause.into(), count);
        }
        // The same again, in fewer words.
        if !software.is_empty() {
            continue;
        }
        for (cause, count) in [
            ("nic.crc_error", nic.rx_crc_errors),
            ("nic.error", nic.rx_errors),
            ("nic.missed", nic.rx_missed),
            ("nic.no_buffer", nic.rx_no_buffer),
            ("nic.queue_full", nic.rx_queue_dropped),
            ("nic.undersize", nic.rx_undersize),
            ("nic.oversize", nic.rx_oversize),
        ] {
            add(cause.into(), count);
        }
    }
    for (cause, count) in software.iter().flat_map(Software::drops) {
        add(format!("software.{cause}"), count);
    }
    all
}

impl Report {
    pub fn json(&self) -> String {
        // Plain data always has a form.
        serde_json::to_string(self).map(|json| json + "\n").unwrap_or_default()
    }

    pub fn human(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_human(&mut text);
        text
    }

    fn write_human(&self, text: &mut String) -> std::fmt::Result {
        let plural = if self.queues == 1 { "" } else { "s" };
        writeln!(
            text,
            "\n{}, frames of {} B, {} queue{plural}, batches of {}, idle {}, {:.2} s{}\n",
            self.mode,
            self.size,
            self.queues,
            self.batch,
            self.idle,
            self.runtime_ms as f64 / 1e3,
            if self.interrupted { ", interrupted" } else { "" }
        )?;
        let (mpps, packets, rate) = (self.mpps, self.packets, self.bits_per_second / 1e9);
        writeln!(text, "{mpps:9.3} Mpps                   {packets} packets, {rate:.2} Gbit/s")?;
        figure(text, "instructions a packet", &self.cost.instructions)?;
        figure(text, "cycles a packet", &self.cost.cycles)?;
        if let Some(ns) = self.cost.cpu_ns_per_packet {
            writeln!(text, "{ns:9.1} ns a packet            CPU time of the driver's thread")?;
        }
        let dropped: Vec<_> = self.drops.iter().filter(|(_, count)| **count != 0).collect();
        writeln!(text, "\ndropped {}", dropped.iter().map(|(_, count)| **count).sum::<u64>())?;
        dropped.iter().try_for_each(|(cause, count)| writeln!(text, "  {cause:24} {count}"))
    }
}

fn figure(text: &mut String, what: &str, figure: &Figure) -> std::fmt::Result {
    match figure.per_packet {
        Some(value) => writeln!(text, "{value:9.1} {what:22} {}", figure.by),
        None => writeln!(text, "        - {what:22} not available: {}", figure.by),
    }
}
