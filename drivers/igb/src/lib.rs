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
//!
//! # Virtual functions (SR-IOV)
//!
//! An 82576 can be lent out in parts: the kernel's driver, `igb`, keeps the physical function, and [`Vf`] drives a virtual one, with
//! the same queues and packets. To have one at `0000:03:10.0`, as root:
//!
//! ```text
//! echo 0 > /sys/bus/pci/devices/0000:03:00.0/sriov_drivers_autoprobe   # else igbvf takes them
//! echo 1 > /sys/bus/pci/devices/0000:03:00.0/sriov_numvfs
//! ip link set eth0 vf 0 mac 02:00:00:00:00:01                          # else the driver makes an address up
//! ip link set eth0 up
//! vfio-uring bind 0000:03:10.0
//! ```
//!
//! `readlink /sys/bus/pci/devices/0000:03:00.0/virtfn0` tells where the first one is. It needs an IOMMU, as any device; no token,
//! as the physical function is the kernel's.
//!
//! ```no_run
//! use vfio_uring::{device::Device, reactor::Reactor};
//! use vfio_uring_igb::{Vf, VfOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! Reactor::new()?.block_on(async {
//!     let device = Device::open(&"0000:03:10.0".parse()?).await?;
//!     let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await?;
//!     println!("{:02x?} is {}", vf.mac(), vf.link().await?);
//!     let (mut rx, _tx) = seeds.remove(0).start()?;
//!     println!("{} bytes", rx.recv().await?.len());
//!     vf.stop().await?;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! MAC addresses, groups, VLANs and frames of more than 1518 bytes are for the physical function's driver to grant: it may refuse
//! ([`Error::Refused`]). When its interface goes down, or it is reset, the queues of its virtual functions end with
//! [`Error::PfReset`]; they are stopped then, and brought up again when the interface is up.

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
mod rings;
mod rx;
mod shared;
#[cfg(feature = "smoltcp")]
pub mod smoltcp;
pub mod spec;
mod statistics;
mod tx;
mod vf;
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
pub use vf::{Vf, VfOptions, VfStatistics};
