//! DMA memory: IOVA ranges, address spaces, buffers and pools.
//!
//! An [`AddressSpace`] maps memory at the device; a [`Pool`] cuts a mapping into owned [`DmaBuf`]s, which travel by value through
//! a command; queue memory that the device sees all the time is a [`DmaShared`] or, as an array of entries, a [`DmaRing`].
//!
//! A buffer becomes `bytes::Bytes` without a copy, and takes a copy of any `bytes::Buf`. With the feature `tokio-uring` it is a
//! buffer of tokio-uring's: files and sockets are read straight into DMA memory.
//!
//! Memory and addresses are freed against proof: a buffer returns to its pool when its owner drops it, which a command's slot
//! does on completion; a mapping's addresses are used again only after the device has confirmed the unmap. What can't be proven
//! is leaked, and counted.
//!
//! Memory of the caller's is mapped by [`AddressSpace::map_pages`]; several devices share a space by
//! [`Options::space`](crate::device::Options::space).
//!
//! ```
//! # futures::executor::block_on(async {
//! use vfio_uring::dma::{AddressSpace, Backend, HugePages, IovaRange, Pool};
//!
//! let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: (1 << 39) - 1 }], 4096, 64);
//! let pool = Pool::new(&space, 1 << 20, HugePages::No).await?;
//! let mut buf = pool.alloc(512)?;
//! buf.fill(0x5a);
//!
//! // The device sees the same bytes at the buffer's address.
//! let mut seen = [0; 512];
//! space.read(buf.iova(), &mut seen)?;
//! assert_eq!(seen, [0x5a; 512]);
//! # Ok::<_, vfio_uring::Error>(()) }).unwrap();
//! ```

pub mod access;
mod attempt;
mod backend;
pub mod buf;
mod bytes;
pub mod conflict;
pub mod foreign;
mod gate;
#[cfg(feature = "tokio-uring")]
mod iobuf;
pub mod iova;
pub mod mapping;
pub mod peers;
pub mod pool;
pub mod refused;
pub mod ring;
pub mod shared;
pub mod space;
pub mod stats;
pub(crate) mod vacate;

pub use access::Access;
pub use backend::Backend;
pub use buf::DmaBuf;
pub use conflict::{conflicts, overlaps};
pub use foreign::Page;
pub use iova::{IovaAllocator, IovaRange};
pub use mapping::Mapping;
pub use peers::Peers;
pub use pool::{Pool, PoolStats};
pub use refused::MapRefused;
pub use ring::{DmaEntries, DmaEntry, DmaRing, DmaShared};
pub use shared::{AccessError, HugePages, OutOfBounds, SharedMemory};
pub use space::{AddressSpace, WeakAddressSpace};
pub use stats::{MappingInfo, SpaceStats};

#[cfg(test)]
mod tests;
