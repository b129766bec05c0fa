//! What a virtual function counts.

use std::cell::RefCell;

use crate::{QueueStatistics, Result, regs::Regs};

/// VFGPRC, VFGORC, VFGPTC, VFGOTC, VFMPRC: they wrap.
const COUNTERS: [u64; 5] = [0x0f10, 0x0f18, 0x0f14, 0x0f34, 0x0f3c];

/// What a virtual function has counted since it was brought up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VfStatistics {
    /// What the driver counted, of all queues.
    pub queues: QueueStatistics,
    /// Good packets that were received (VFGPRC).
    pub rx_packets: u64,
    /// Bytes of these (VFGORC).
    pub rx_bytes: u64,
    /// Good packets that were sent (VFGPTC).
    pub tx_packets: u64,
    /// Bytes of these (VFGOTC).
    pub tx_bytes: u64,
    /// Of the received ones, multicasts (VFMPRC).
    pub rx_multicast: u64,
}

/// The counters' last values, and the sums.
#[derive(Default)]
pub(super) struct Sums(RefCell<[(u32, u64); COUNTERS.len()]>);

impl Sums {
    /// Counts from now on.
    pub(super) async fn clear(&self, regs: &Regs) -> Result<()> {
        self.collect(regs).await?;
        self.0.borrow_mut().iter_mut().for_each(|(_, sum)| *sum = 0);
        Ok(())
    }

    /// Adds what has come since the last time.
    pub(super) async fn collect(&self, regs: &Regs) -> Result<()> {
        for (index, register) in COUNTERS.into_iter().enumerate() {
            let value = regs.read(register).await?;
            self.add(index, value);
        }
        Ok(())
    }

    fn add(&self, index: usize, value: u32) {
        if let Some((last, sum)) = self.0.borrow_mut().get_mut(index) {
            *sum += u64::from(value.wrapping_sub(*last));
            *last = value;
        }
    }

    pub(super) fn read(&self, queues: QueueStatistics) -> VfStatistics {
        let [rx_packets, rx_bytes, tx_packets, tx_bytes, rx_multicast] = self.0.borrow().map(|(_, sum)| sum);
        VfStatistics { queues, rx_packets, rx_bytes, tx_packets, tx_bytes, rx_multicast }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_wrap_are_summed_up() {
        let sums = Sums::default();
        for value in [0xffff_fff0, 5, 5, 7] {
            sums.add(1, value);
        }
        assert_eq!(sums.read(QueueStatistics::default()).rx_bytes, (1 << 32) + 7);
    }
}
