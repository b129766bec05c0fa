//! What a program keeps of a NIC that a server has: its cable and its counters.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Cause {
    /// Received for another address or VLAN.
    Filtered,
    /// Received with no descriptors for it, in a queue that does not wait for some or has too few in all.
    NoDescriptors,
    /// Received for a queue that is not enabled.
    QueueOff,
    /// Received with less than 60 bytes, or with more than RCTL and RLPML permit.
    Length,
    /// A buffer or a ring of a receive queue is not in mapped memory.
    RxMemory,
    /// Sent with no link, or while nobody receives at the other end.
    NoReceiver,
    /// Sent while the other end had no room, without flow control.
    WireFull,
    /// Sent with no bytes, with fewer than a header has, or with more than a frame can have.
    TxLength,
    /// A buffer or a ring of a transmit queue is not in mapped memory.
    TxMemory,
    /// Sent with a context that says nothing sensible for its packet: header lengths, segment size.
    Context,
    /// The pcap file or the TAP device did not take it.
    Io,
}

impl Cause {
    /// All of them, in the order of [`Counters::drops`].
    pub const ALL: [Self; 11] = [
        Self::Filtered,
        Self::NoDescriptors,
        Self::QueueOff,
        Self::Length,
        Self::RxMemory,
        Self::NoReceiver,
        Self::WireFull,
        Self::TxLength,
        Self::TxMemory,
        Self::Context,
        Self::Io,
    ];

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filtered => "filtered",
            Self::NoDescriptors => "no_descriptors",
            Self::QueueOff => "queue_off",
            Self::Length => "length",
            Self::RxMemory => "rx_memory",
            Self::NoReceiver => "no_receiver",
            Self::WireFull => "wire_full",
            Self::TxLength => "tx_length",
            Self::TxMemory => "tx_memory",
            Self::Context => "context",
            Self::Io => "io",
        }
    }
}

/// What a NIC has done since it was made; resets do not clear it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that were written to client memory.
    pub rx_packets: u64,
    /// Bytes of these, without CRC.
    pub rx_bytes: u64,
    /// Packets that were given to the wire; segments, where TSO made some.
    pub tx_packets: u64,
    /// Bytes of these, without CRC.
    pub tx_bytes: u64,
    /// Interrupts that were signalled.
    pub interrupts: u64,
    /// Dropped packets by cause, as [`Cause::ALL`] has them.
    pub drops: [u64; Cause::ALL.len()],
}

impl Counters {
    /// Packets that were dropped for this cause.
    pub fn dropped(&self, cause: Cause) -> u64 {
        self.drops[cause as usize]
    }

    pub(super) fn drop_one(&mut self, cause: Cause) {
        self.drops[cause as usize] += 1;
    }

    fn values(&self) -> impl Iterator<Item = u64> {
        [self.rx_packets, self.rx_bytes, self.tx_packets, self.tx_bytes, self.interrupts].into_iter().chain(self.drops)
    }
}

#[derive(Debug)]
struct Shared {
    plugged: AtomicBool,
    values: [AtomicU64; 5 + Cause::ALL.len()],
}

/// The cable and the counters of a NIC, from any thread. Clones are the same one.
///
/// ```
/// use vfio_uring_models::igb::{self, Config};
///
/// let config = Config::default();
/// let handle = config.handle.clone();
/// let server = igb::spawn(config)?;
/// handle.set_link(false);
/// assert_eq!(handle.counters().rx_packets, 0);
/// server.stop()?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Default for Handle {
    /// Plugged in.
    fn default() -> Self {
        Self(Arc::new(Shared { plugged: AtomicBool::new(true), values: Default::default() }))
    }
}

impl Handle {
    /// Plugs the cable in, or pulls it. The link is up when it is plugged in and there is something at its other end.
    pub fn set_link(&self, up: bool) {
        self.0.plugged.store(up, Ordering::Relaxed);
    }

    /// Whether the cable is plugged in.
    pub fn link(&self) -> bool {
        self.0.plugged.load(Ordering::Relaxed)
    }

    /// What the NIC has done so far; the values are of about the same time.
    pub fn counters(&self) -> Counters {
        let value = |i: usize| self.0.values[i].load(Ordering::Relaxed);
        Counters {
            rx_packets: value(0),
            rx_bytes: value(1),
            tx_packets: value(2),
            tx_bytes: value(3),
            interrupts: value(4),
            drops: std::array::from_fn(|i| value(5 + i)),
        }
    }

    pub(super) fn publish(&self, counters: &Counters) {
        for (shared, value) in self.0.values.iter().zip(counters.values()) {
            shared.store(value, Ordering::Relaxed);
        }
    }
}
