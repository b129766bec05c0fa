//! An async driver for Intel's 82576 NIC (`igb`) on the vfio-uring runtime.
//!
//! [`Nic::new`] brings a NIC up and gives a [`QueueSeed`] for each queue pair, which is sent to the thread that is to own it and
//! started there: [`RxQueue`] and [`TxQueue`] share nothing with other cores. Packets are DMA buffers that are moved: a received
//! [`Packet`] is forwarded, kept, or made a `bytes::Bytes` of, without a copy.
//!
//! ```no_run
//! use vfio_uring::{device::Device, reactor::Reactor};
//! use vfio_uring_igb::{Nic, Options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! Reactor::new()?.block_on(async {
//!     let device = Device::open(&"0000:01:00.0".parse()?).await?;
//!     let (nic, mut seeds) = Nic::new(&device, Options::default()).await?;
//!     let (mut rx, mut tx) = seeds.remove(0).start()?;
//!     let mut packets = Vec::with_capacity(32);
//!     for _ in 0..1000 {
//!         rx.ready().await?;
//!         rx.rx_batch(&mut packets, 32)?;
//!         for packet in &mut packets {
//!             // Back to who sent it.
//!             let (to, from) = packet.data_mut()[..12].split_at_mut(6);
//!             to.swap_with_slice(from);
//!         }
//!         tx.tx_batch(&mut packets)?;
//!     }
//!     nic.stop().await?;
//!     Ok(())
//! })
//! # }
//! ```

#![forbid(unsafe_code)]
#![allow(clippy::vec_box, reason = "a buffer's box is the buffer's for its whole life, and moves between lists as one word")]

mod counters;
mod error;
mod link;
mod nic;
mod options;
mod packet;
mod pool;
mod queue;
mod regs;
mod rx;
mod shared;
pub mod spec;
mod statistics;
mod tx;
mod watch;

pub use counters::QueueStatistics;
pub use error::{Error, Result, SendError};
pub use link::{LinkChanges, LinkState};
pub use nic::Nic;
pub use options::{HashTypes, Options, Rss};
pub use packet::{Checksum, Checksums, L4, Packet, RssHash, Tso, TxOffload};
pub use pool::Buffers;
pub use queue::{Parts, Proof, QueueSeed};
pub use rx::{RxQueue, RxToken};
pub use statistics::Statistics;
pub use tx::{TxQueue, TxToken};
