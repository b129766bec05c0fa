//! What the NIC and the driver count.

use std::{cell::RefCell, sync::Arc};

use crate::{
    QueueStatistics, Result,
    counters::Counters,
    regs::Regs,
    spec::{QUEUE_STRIDE, RX_QUEUES, queue},
};

/// What a NIC has counted since it was brought up. The NIC's own registers clear when they are read; these are the sums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// What the driver counted, of all queues.
    pub queues: QueueStatistics,
    /// Good packets that were received, filtered ones not among them (GPRC).
    pub rx_packets: u64,
    /// Bytes of these with CRC (GORC).
    pub rx_bytes: u64,
    /// Good packets that were sent (GPTC).
    pub tx_packets: u64,
    /// Bytes of these with CRC (GOTC).
    pub tx_bytes: u64,
    /// Of the received ones, broadcasts (BPRC).
    pub rx_broadcast: u64,
    /// Of the received ones, multicasts (MPRC).
    pub rx_multicast: u64,
    /// Packets with a wrong CRC (CRCERRS).
    pub rx_crc_errors: u64,
    /// Packets with other errors on the wire (ALGNERRC, SYMERRS, RXERRC, RLEC).
    pub rx_errors: u64,
    /// Packets that were dropped as the NIC's own memory was full (MPC).
    pub rx_missed: u64,
    /// Packets that were dropped for want of buffers (RNBC).
    pub rx_no_buffer: u64,
    /// Packets that were dropped for want of buffers as each queue counts them (RQDPC); a NIC may count them here, in
    /// [`Statistics::rx_no_buffer`], or in both.
    pub rx_queue_dropped: u64,
    /// Packets of less than 64 bytes (RUC, RFC).
    pub rx_undersize: u64,
    /// Packets that are longer than [`Options::max_frame`](crate::Options::max_frame) (ROC, RJC).
    pub rx_oversize: u64,
    /// Packets that were sent in segments (TSCTC).
    pub tx_tso: u64,
}

type Field = fn(&mut Statistics) -> &mut u64;

/// Registers (section 8.19) of 32 bits, and what they add to.
const NARROW: [(u64, Field); 16] = [
    (0x4000, |s| &mut s.rx_crc_errors),
    (0x4004, |s| &mut s.rx_errors),
    (0x4008, |s| &mut s.rx_errors),
    (0x400c, |s| &mut s.rx_errors),
    (0x4010, |s| &mut s.rx_missed),
    (0x4040, |s| &mut s.rx_errors),
    (0x4074, |s| &mut s.rx_packets),
    (0x4078, |s| &mut s.rx_broadcast),
    (0x407c, |s| &mut s.rx_multicast),
    (0x4080, |s| &mut s.tx_packets),
    (0x40a0, |s| &mut s.rx_no_buffer),
    (0x40a4, |s| &mut s.rx_undersize),
    (0x40a8, |s| &mut s.rx_undersize),
    (0x40ac, |s| &mut s.rx_oversize),
    (0x40b0, |s| &mut s.rx_oversize),
    (0x40f8, |s| &mut s.tx_tso),
];
/// Registers of 64 bits, the high half of which clears both.
const WIDE: [(u64, Field); 2] = [(0x4088, |s| &mut s.rx_bytes), (0x4090, |s| &mut s.tx_bytes)];

/// The sums so far.
pub(crate) struct Sums {
    sums: RefCell<Statistics>,
    counters: Vec<Arc<Counters>>,
}

impl Sums {
    pub(crate) fn new(queues: u16) -> Self {
        Self { sums: RefCell::default(), counters: (0..queues).map(|_| Arc::default()).collect() }
    }

    pub(crate) fn counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }

    /// Clears the registers.
    pub(crate) async fn clear(&self, regs: &Regs) -> Result<()> {
        self.collect(regs).await?;
        self.sums.take();
        Ok(())
    }

    async fn collect(&self, regs: &Regs) -> Result<()> {
        for (offset, field) in NARROW {
            let value = regs.read(offset).await?;
            *field(&mut self.sums.borrow_mut()) += u64::from(value);
        }
        for (offset, field) in WIDE {
            let low = regs.read(offset).await?;
            let high = regs.read(offset + 4).await?;
            *field(&mut self.sums.borrow_mut()) += u64::from(high) << 32 | u64::from(low);
        }
        for index in 0..self.counters.len() as u64 {
            let at = RX_QUEUES + index * QUEUE_STRIDE + queue::DROPPED;
            let dropped = regs.read(at).await?;
            if dropped != 0 {
                regs.write(at, 0).await?;
                self.sums.borrow_mut().rx_queue_dropped += u64::from(dropped);
            }
        }
        Ok(())
    }

    pub(crate) async fn read(&self, regs: &Regs) -> Result<Statistics> {
        self.collect(regs).await?;
        let mut all = *self.sums.borrow();
        all.queues = self.queues();
        Ok(all)
    }

    pub(crate) fn queues(&self) -> QueueStatistics {
        let mut all = QueueStatistics::default();
        self.counters.iter().for_each(|counters| all += counters.read());
        all
    }
}
