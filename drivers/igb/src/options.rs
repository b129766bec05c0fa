//! How a NIC is brought up.

use std::time::Duration;

use bitflags::bitflags;

use crate::{
    Error, Result,
    spec::{self, MAX_FRAME, QUEUES},
};

/// How to bring a NIC up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Receive queues, and as many transmit queues: 1 to 16; 1 by default.
    pub queues: u16,
    /// Descriptors of a receive ring, a power of two from 32 to 4096; 512 by default. As many buffers are always in it.
    pub rx_ring: u16,
    /// Descriptors of a transmit ring, as [`Options::rx_ring`].
    pub tx_ring: u16,
    /// Buffers of each queue pair beside those in the receive ring: as many packets can be held, or be on their way out, before
    /// receiving stops; 1024 by default.
    pub buffers: usize,
    /// Bytes of a buffer, a multiple of 1024 from 1024 to 16384; 2048 by default. A longer packet takes several. Memory is taken
    /// in units of 4 KiB.
    pub buffer_len: usize,
    /// Bytes of a received frame at most, with its CRC and without a VLAN tag: 1518 (the default) to 9728.
    pub max_frame: usize,
    /// How packets are spread over the queues; without it all go to queue 0.
    pub rss: Option<Rss>,
    /// With an interrupt vector for each queue (MSI-X), which a reactor that would sleep waits for: the time between two
    /// interrupts of a vector at least, up to 8191 µs (EITR). Without it, queues are looked at now and then.
    pub interrupt: Option<Duration>,
    /// Takes VLAN tags out of received packets: [`Packet::vlan`](crate::Packet::vlan) has them.
    pub vlan_strip: bool,
    /// Has the NIC check the IP, TCP and UDP checksums of received packets; true by default.
    pub checksums: bool,
    /// Flow control: the other end is told to pause instead of dropping packets when there are no buffers. A queue that is not
    /// emptied stops all others then.
    pub flow_control: bool,
    /// Receives packets for all addresses.
    pub promiscuous: bool,
    /// How long the NIC may take for a reset or for turning a queue on or off, 1 s by default.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            rx_ring: 512,
            tx_ring: 512,
            buffers: 1024,
            buffer_len: 2048,
            max_frame: 1518,
            rss: Some(Rss::default()),
            interrupt: None,
            vlan_strip: false,
            checksums: true,
            flow_control: false,
            promiscuous: false,
            timeout: Duration::from_secs(1),
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<()> {
        let within = |what: &str, value: usize, range: std::ops::RangeInclusive<usize>| {
            if range.contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(format!("{what} {value}: it can be {} to {}", range.start(), range.end())))
        };
        within("the number of queues", self.queues.into(), 1..=QUEUES.into())?;
        check_ring("rx_ring", self.rx_ring)?;
        check_ring("tx_ring", self.tx_ring)?;
        within("the number of buffers", self.buffers, 1..=1 << 20)?;
        check_buffer_len(self.buffer_len)?;
        within("max_frame", self.max_frame, 1518..=MAX_FRAME)?;
        if let Some(interval) = self.interrupt {
            within("the interrupt interval in microseconds", interval.as_micros() as usize, 0..=8191)?;
        }
        if let Some(table) = self.rss.as_ref().and_then(|rss| rss.table)
            && let Some(queue) = table.iter().find(|&&queue| u16::from(queue) >= self.queues)
        {
            return Err(Error::invalid(format!("the RSS table names queue {queue}, of {} queues", self.queues)));
        }
        Ok(())
    }
}

pub(crate) fn check_ring(what: &str, entries: u16) -> Result<()> {
    if entries.is_power_of_two() && (32..=4096).contains(&entries) {
        return Ok(());
    }
    Err(Error::invalid(format!("{what} {entries}: a power of two from 32 to 4096")))
}

pub(crate) fn check_buffer_len(len: usize) -> Result<()> {
    if len.is_multiple_of(1024) && (1024..=16384).contains(&len) {
        return Ok(());
    }
    Err(Error::invalid(format!("a buffer length of {len}: a multiple of 1024 from 1024 to 16384")))
}

bitflags! {
    /// What RSS hashes; bits as in MRQC.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HashTypes: u32 {
        /// TCP over IPv4: addresses and ports.
        const TCP_IPV4 = 1 << 16;
        /// IPv4: addresses.
        const IPV4 = 1 << 17;
        /// IPv6: addresses.
        const IPV6 = 1 << 20;
        /// TCP over IPv6.
        const TCP_IPV6 = 1 << 21;
        /// UDP over IPv4.
        const UDP_IPV4 = 1 << 22;
        /// UDP over IPv6.
        const UDP_IPV6 = 1 << 23;
    }
}

/// Receive side scaling (section 7.1.2.8).
#[derive(Debug, Clone)]
pub struct Rss {
    /// The secret of the Toeplitz hash.
    pub key: [u8; 40],
    /// The queue for each value of the hash's low 7 bits; `None`, the default: all queues in turn.
    pub table: Option<[u8; 128]>,
    /// What is hashed; the rest goes to queue 0.
    pub types: HashTypes,
}

impl Default for Rss {
    /// The key of the specification's test vectors, all types.
    fn default() -> Self {
        Self {
            key: [
                0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca,
                0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b,
                0xbe, 0xac, 0x01, 0xfa,
            ],
            table: None,
            types: HashTypes::all(),
        }
    }
}

impl Rss {
    pub(crate) fn mrqc(&self) -> u32 {
        spec::MRQC_RSS | self.types.bits()
    }

    /// The table of `queues` queues.
    pub(crate) fn table(&self, queues: u16) -> [u8; 128] {
        self.table.unwrap_or_else(|| std::array::from_fn(|i| (i % usize::from(queues.max(1))) as u8))
    }
}
