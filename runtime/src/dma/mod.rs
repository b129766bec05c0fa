//! DMA memory: IOVA ranges, address spaces, buffers and pools.

pub mod shared;

pub use shared::{HugePages, SharedMemory};
