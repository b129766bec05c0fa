//! What was measured, for people and for programs.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies above this are recorded as this.
const MAX_LATENCY_NS: u64 = 3_600_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read = 0,
    Write = 1,
}

/// Latencies of reads and writes.
pub struct Recorder {
    histograms: [Histogram<u64>; 2],
    /// I/Os that took just as long as the one before them: those of one batch mostly did, and are recorded as one.
    run: [(u64, u64); 2],
    counts: [u64; 2],
}

impl Recorder {
    pub fn new() -> Self {
        Self { histograms: [new_histogram(), new_histogram()], run: [(0, 0); 2], counts: [0; 2] }
    }

    #[inline]
    pub fn record(&mut self, direction: Direction, nanos: u64) {
        let index = direction as usize;
        self.counts[index] += 1;
        let (last, count) = &mut self.run[index];
        if *last == nanos {
            *count += 1;
        } else {
            let (last, count) = std::mem::replace(&mut self.run[index], (nanos, 1));
            if count != 0 {
                self.histograms[index].saturating_record_n(last, count);
            }
        }
    }

    /// I/Os recorded.
    pub fn count(&self) -> u64 {
        self.counts[0] + self.counts[1]
    }

    /// Adds another one's.
    pub fn add(&mut self, other: &mut Self) {
        self.flush();
        other.flush();
        for ((mine, theirs), (count, more)) in
            self.histograms.iter_mut().zip(&other.histograms).zip(self.counts.iter_mut().zip(other.counts))
        {
            // Of the same bounds, so nothing is out of range.
            let _ = mine.add(theirs);
            *count += more;
        }
    }

    fn flush(&mut self) {
        for (histogram, run) in self.histograms.iter_mut().zip(&mut self.run) {
            let (last, count) = std::mem::take(run);
            if count != 0 {
                histogram.saturating_record_n(last, count);
            }
        }
    }
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).expect("constant bounds that are in order")
}

/// Latencies in nanoseconds; all 0 when there was no I/O.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    pub min: u64,
    pub mean: u64,
    pub p50: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        Self {
            min: histogram.min(),
            mean: histogram.mean() as u64,
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }
}

/// The rates and latencies of reads, writes or both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rates {
    pub ios: u64,
    pub iops: f64,
    pub bw_bytes: f64,
    pub lat_ns: Latency,
}

impl Rates {
    fn of(ios: u64, histogram: &Histogram<u64>, bs: u64, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        let iops = if seconds > 0.0 { ios as f64 / seconds } else { 0.0 };
        let round = |value: f64| (value * 10.0).round() / 10.0;
        Self { ios, iops: round(iops), bw_bytes: (iops * bs as f64).round(), lat_ns: Latency::of(histogram) }
    }
}

/// What `--verify` found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verified {
    /// Blocks compared.
    pub checked: u64,
    /// Blocks that held something else.
    pub mismatches: u64,
    /// The first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub device: String,
    pub embedded: bool,
    pub model: String,
    pub nsid: u32,
    pub block_size: u32,
    pub rw: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rwmixread: Option<u8>,
    pub bs: u64,
    pub iodepth: u16,
    pub numjobs: u16,
    pub size: u64,
    pub mode: &'static str,
    pub idle: &'static str,
    pub interrupts: bool,
    pub pinned: bool,
    pub runtime_ms: u64,
    pub interrupted: bool,
    #[serde(flatten)]
    pub total: Rates,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<Rates>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<Rates>,
    pub errors: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub error_kinds: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verified>,
}

/// Total, reads and writes.
pub fn rates(recorder: &mut Recorder, bs: u64, elapsed: Duration) -> (Rates, Option<Rates>, Option<Rates>) {
    recorder.flush();
    let [reads, writes] = &recorder.histograms;
    let mut both = reads.clone();
    let _ = both.add(writes);
    let one = |index: usize| {
        let ios = recorder.counts[index];
        (ios != 0).then(|| Rates::of(ios, &recorder.histograms[index], bs, elapsed))
    };
    (Rates::of(recorder.count(), &both, bs, elapsed), one(0), one(1))
}

impl Report {
    /// A table.
    pub fn human(&self) -> String {
        let mut text = String::new();
        let mix = self.rwmixread.map(|percent| format!(" ({percent} % reads)")).unwrap_or_default();
        let seconds = self.runtime_ms as f64 / 1000.0;
        let cut = if self.interrupted { ", interrupted" } else { "" };
        let pinned = if self.pinned { ", pinned" } else { "" };
        let waiting = if self.interrupts { " with interrupts" } else { "" };
        let _ = writeln!(
            text,
            "{} namespace {}, {} in blocks of {} B",
            self.model,
            self.nsid,
            bytes(self.size as f64),
            self.block_size
        );
        let _ = writeln!(
            text,
            "{}{mix}, {} each, {} outstanding on {} queue{}, {}, idle {}{waiting}{pinned}, {seconds:.2} s{cut}\n",
            self.rw,
            bytes(self.bs as f64),
            self.iodepth,
            self.numjobs,
            if self.numjobs == 1 { "" } else { "s" },
            self.mode,
            self.idle
        );
        let _ = writeln!(
            text,
            "{:6} {:>10} {:>13} {:>11} | {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
            "", "IOPS", "bandwidth", "I/Os", "min", "mean", "p50", "p99", "p99.9", "max"
        );
        let both = self.read.is_some() == self.write.is_some();
        let rows = [("read", self.read.as_ref()), ("write", self.write.as_ref()), ("all", both.then_some(&self.total))];
        for (name, rates) in rows {
            let Some(Rates { ios, iops, bw_bytes, lat_ns: lat }) = rates else { continue };
            let _ = write!(text, "{name:6} {:>10} {:>13} {ios:>11} |", count(*iops), format!("{}/s", bytes(*bw_bytes)));
            for nanos in [lat.min, lat.mean, lat.p50, lat.p99, lat.p999, lat.max] {
                let _ = write!(text, " {:>8}", time(nanos));
            }
            text.push('\n');
        }
        let _ = writeln!(text, "\nerrors {}", self.errors);
        for (kind, times) in &self.error_kinds {
            let _ = writeln!(text, "  {times} x {kind}");
        }
        if let Some(verify) = &self.verify {
            let _ = writeln!(text, "verify {} blocks compared, {} mismatches", verify.checked, verify.mismatches);
            if let Some(first) = &verify.first {
                let _ = writeln!(text, "  {first}");
            }
        }
        text
    }

    /// One JSON object in a line.
    pub fn json(&self) -> String {
        // Of strings, numbers and maps with string keys, so it can be written.
        serde_json::to_string(self).map(|json| json + "\n").unwrap_or_default()
    }

    /// What a run that went through has to complain of.
    pub fn complaint(&self) -> Option<String> {
        let mismatches = self.verify.as_ref().map_or(0, |verify| verify.mismatches);
        match (mismatches, self.errors) {
            (0, 0) => None,
            (0, errors) => Some(format!("{errors} I/Os failed")),
            (mismatches, 0) => Some(format!("{mismatches} blocks did not hold what was written")),
            (mismatches, errors) => Some(format!("{mismatches} blocks did not hold what was written, {errors} I/Os failed")),
        }
    }
}

/// Three digits and a unit.
fn scaled(value: f64, step: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut index = 0;
    while value >= step && index + 1 < units.len() {
        value /= step;
        index += 1;
    }
    let digits = if index == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    let text = format!("{value:.digits$}");
    // 4 KiB, not 4.00 KiB.
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if units[index].is_empty() { text.into() } else { format!("{text} {}", units[index]) }
}

/// Bytes, for people.
pub fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// A number, for people.
pub fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M"])
}

fn time(nanos: u64) -> String {
    scaled(nanos as f64, 1000.0, &["ns", "us", "ms", "s"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_three_digits() {
        assert_eq!(bytes(4096.0), "4 KiB");
        assert_eq!(bytes(131072.0), "128 KiB");
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(count(1_234_567.0), "1.23 M");
        assert_eq!(count(100.0), "100");
        assert_eq!(count(98_700.0), "98.7 k");
        assert_eq!(time(950), "950 ns");
        assert_eq!(time(12_345), "12.3 us");
    }

    #[test]
    fn runs_of_like_latencies_are_counted_each() {
        let mut recorder = Recorder::new();
        for nanos in [500, 500, 500, 700, 700, 500] {
            recorder.record(Direction::Read, nanos);
        }
        recorder.record(Direction::Write, u64::MAX);
        recorder.record(Direction::Write, 0);
        let mut sum = Recorder::new();
        sum.add(&mut recorder);
        let (total, read, write) = rates(&mut sum, 4096, Duration::from_secs(2));
        assert_eq!((total.ios, total.iops, total.bw_bytes), (8, 4.0, 16384.0));
        let read = read.unwrap();
        assert_eq!((read.ios, read.lat_ns.min, read.lat_ns.p50), (6, 500, 500));
        assert!(read.lat_ns.max >= 700 && read.lat_ns.max < 702);
        assert!(write.unwrap().lat_ns.max >= MAX_LATENCY_NS);
    }

    #[test]
    fn nothing_measured_is_zero() {
        let (total, read, write) = rates(&mut Recorder::new(), 4096, Duration::ZERO);
        assert_eq!((total.ios, total.iops, total.lat_ns), (0, 0.0, Latency::default()));
        assert!(read.is_none() && write.is_none());
    }
}
