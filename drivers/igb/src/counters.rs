//! What a queue pair counts. Its thread alone writes, so that a plain store is enough; any thread reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a received packet, or a part of one, was dropped by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    /// A length of 0, or beyond the buffer.
    Descriptor,
    /// More bytes or descriptors than the longest packet has.
    TooLong,
    /// The NIC says so: CRC, symbol, or length error.
    Device,
}

/// Counters of a queue pair.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    rx_bad_descriptor: AtomicU64,
    rx_too_long: AtomicU64,
    rx_device_error: AtomicU64,
    rx_starved: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    tx_invalid: AtomicU64,
}

/// What the driver has counted of a queue, or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatistics {
    /// Packets that were taken.
    pub rx_packets: u64,
    /// Bytes of these.
    pub rx_bytes: u64,
    /// Packets that were dropped since a descriptor says a length of 0 or beyond its buffer.
    pub rx_bad_descriptor: u64,
    /// Packets that were dropped since they have more bytes or descriptors than the longest packet.
    pub rx_too_long: u64,
    /// Packets that were dropped since the NIC reports an error of theirs.
    pub rx_device_error: u64,
    /// How often receiving had to stop for want of buffers. What is dropped then the NIC counts.
    pub rx_starved: u64,
    /// Packets that were given to the NIC.
    pub tx_packets: u64,
    /// Bytes of these.
    pub tx_bytes: u64,
    /// Packets of a batch that were dropped since they can't be sent.
    pub tx_invalid: u64,
}

impl std::ops::AddAssign for QueueStatistics {
    fn add_assign(&mut self, other: Self) {
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.rx_bad_descriptor += other.rx_bad_descriptor;
        self.rx_too_long += other.rx_too_long;
        self.rx_device_error += other.rx_device_error;
        self.rx_starved += other.rx_starved;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.tx_invalid += other.tx_invalid;
    }
}

#[inline]
fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(value), Relaxed);
}

impl Counters {
    #[inline]
    pub(crate) fn received(&self, packets: u64, bytes: u64) {
        if packets != 0 {
            add(&self.rx_packets, packets);
            add(&self.rx_bytes, bytes);
        }
    }

    #[inline]
    pub(crate) fn sent(&self, packets: u64, bytes: u64) {
        add(&self.tx_packets, packets);
        add(&self.tx_bytes, bytes);
    }

    pub(crate) fn dropped(&self, why: Drop) {
        add(
            match why {
                Drop::Descriptor => &self.rx_bad_descriptor,
                Drop::TooLong => &self.rx_too_long,
                Drop::Device => &self.rx_device_error,
            },
            1,
        );
    }

    pub(crate) fn starved(&self) {
        add(&self.rx_starved, 1);
    }

    pub(crate) fn invalid(&self) {
        add(&self.tx_invalid, 1);
    }

    pub(crate) fn read(&self) -> QueueStatistics {
        QueueStatistics {
            rx_packets: self.rx_packets.load(Relaxed),
            rx_bytes: self.rx_bytes.load(Relaxed),
            rx_bad_descriptor: self.rx_bad_descriptor.load(Relaxed),
            rx_too_long: self.rx_too_long.load(Relaxed),
            rx_device_error: self.rx_device_error.load(Relaxed),
            rx_starved: self.rx_starved.load(Relaxed),
            tx_packets: self.tx_packets.load(Relaxed),
            tx_bytes: self.tx_bytes.load(Relaxed),
            tx_invalid: self.tx_invalid.load(Relaxed),
        }
    }
}
