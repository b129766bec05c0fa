//! Queue pairs as the NIC sees them: their registers, and turning them on and off. A virtual function has fewer of them, in
//! another place.

use std::{sync::Arc, time::Duration};

use vfio_uring::{
    device::{Interrupt, Posted},
    dma::Pool,
};

use crate::{
    Options, QueueSeed, Result,
    counters::Counters,
    queue::{Plan, Vector},
    regs::Regs,
    shared::{Doorbell, Relay, Shared},
    spec::{self, EIMS, dctl, queue, srrctl},
};

/// Registers that each queue pair writes: RDT, TDT, EIMS.
const DOORBELLS: usize = 3;

/// Where a function has the registers of its queues.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    rx: u64,
    tx: u64,
    stride: u64,
}

/// The physical function.
pub(crate) const PF: Layout = Layout { rx: spec::RX_QUEUES, tx: spec::TX_QUEUES, stride: spec::QUEUE_STRIDE };
/// A virtual function.
pub(crate) const VF: Layout = Layout { rx: spec::VF_RX_QUEUES, tx: spec::VF_TX_QUEUES, stride: spec::VF_QUEUE_STRIDE };

/// The queue pairs of a function, and the doorbells that threads can't ring by themselves.
pub(crate) struct Rings {
    pub(crate) seeds: Vec<QueueSeed>,
    pub(crate) relay: Arc<Relay>,
    pub(crate) relayed: Vec<Posted<u32>>,
}

impl Layout {
    /// A register of a receive queue.
    pub(crate) fn rx(self, index: u16, register: u64) -> u64 {
        self.rx + u64::from(index) * self.stride + register
    }

    /// A register of a transmit queue.
    pub(crate) fn tx(self, index: u16, register: u64) -> u64 {
        self.tx + u64::from(index) * self.stride + register
    }

    /// Makes the queue pairs; each has the interrupt vector of its own number, if there are any.
    pub(crate) fn seeds(
        self,
        regs: &Regs,
        options: &Options,
        memory: &Pool,
        vectors: &[Interrupt],
        shared: &Arc<Shared>,
        counters: &[Arc<Counters>],
    ) -> Result<Rings> {
        let relay = Relay::new(DOORBELLS * usize::from(options.queues));
        let doorbell = |register: u64, index: usize| match regs.0.register::<u32>(register) {
            Ok(register) => Doorbell::Mapped(register),
            Err(_) => Doorbell::Relayed(relay.clone(), index),
        };
        let (mut seeds, mut relayed) = (Vec::new(), Vec::new());
        for index in 0..options.queues {
            let at = DOORBELLS * usize::from(index);
            let tails = [self.rx(index, queue::TAIL), self.tx(index, queue::TAIL), EIMS];
            for register in tails {
                relayed.push(regs.0.posted::<u32>(register)?);
            }
            let vector = vectors.get(usize::from(index)).map(|vector| Vector {
                fd: vector.fd().clone(),
                enable: doorbell(EIMS, at + 2),
                bit: 1 << index,
            });
            seeds.push(QueueSeed::new(Plan {
                index,
                memory,
                rx_ring: options.rx_ring,
                tx_ring: options.tx_ring,
                buffers: options.buffers,
                buffer_len: options.buffer_len,
                // With a VLAN tag, without CRC.
                max_len: options.max_frame,
                rx_doorbell: doorbell(tails[0], at),
                tx_doorbell: doorbell(tails[1], at + 1),
                vector,
                shared: shared.clone(),
                counters: counters.get(usize::from(index)).cloned().unwrap_or_default(),
            })?);
        }
        Ok(Rings { seeds, relay, relayed })
    }

    /// Turns a queue pair on.
    pub(crate) async fn enable(self, regs: &Regs, seed: &QueueSeed, options: &Options) -> Result<()> {
        let (rx, tx) = seed.iovas();
        let index = seed.index();
        let drop = if options.flow_control { 0 } else { srrctl::DROP_EN };
        let srrctl = (options.buffer_len / 1024) as u32 | srrctl::ADVANCED | drop;
        regs.write(self.rx(index, queue::SRRCTL), srrctl).await?;
        for (register, iova, entries, thresholds) in [
            (Self::rx as fn(Self, u16, u64) -> u64, rx, options.rx_ring, dctl::RX_THRESHOLDS),
            (Self::tx, tx, options.tx_ring, dctl::TX_THRESHOLDS),
        ] {
            let register = |offset| register(self, index, offset);
            regs.write(register(queue::BAL), iova as u32).await?;
            regs.write(register(queue::BAH), (iova >> 32) as u32).await?;
            regs.write(register(queue::LEN), u32::from(entries) * 16).await?;
            regs.write(register(queue::HEAD), 0).await?;
            regs.write(register(queue::TAIL), 0).await?;
            let control = register(queue::DCTL);
            regs.write(control, dctl::ENABLE | thresholds).await?;
            let on = |value: u32| value & dctl::ENABLE != 0;
            regs.wait_for(control, options.timeout, "ready (its queue is on)", on).await?;
        }
        Ok(())
    }

    /// Turns the queues off, and waits for the NIC to confirm.
    pub(crate) async fn disable(self, regs: &Regs, queues: u16, within: Duration) -> Result<()> {
        let off = |value: u32| value & dctl::ENABLE == 0;
        for index in 0..queues {
            for control in [self.rx(index, queue::DCTL), self.tx(index, queue::DCTL)] {
                regs.write(control, 0).await?;
                regs.wait_for(control, within, "idle (its queue is off)", off).await?;
            }
        }
        Ok(())
    }
}
