//! Userspace PCI drivers as async Rust.
//!
//! A device is an async resource: its interrupts are streams, its regions are read by awaiting, its DMA buffers are owned
//! values. A per-thread io_uring [`reactor`] waits; the data path itself makes no system call.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod device;
pub mod dma;
pub mod error;
pub mod fault;
pub mod mmio;
pub mod pci;
pub mod reactor;
pub mod transport;

pub use error::{Error, Result};
