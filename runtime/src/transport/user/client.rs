//! Placeholder of the vfio-user client's connection: it has just what the address space asks of it.

use std::{os::fd::OwnedFd, sync::Arc};

use crate::{Error, Result};

/// A connection to a vfio-user server.
#[derive(Debug)]
pub struct Connection(());

impl Connection {
    /// Maps `len` bytes at `offset` of `fd` at `iova`, for the device to read and write.
    ///
    /// # Errors
    /// Always [`Error::Unsupported`].
    pub async fn dma_map(&self, _iova: u64, _len: u64, _fd: &Arc<OwnedFd>, _offset: u64) -> Result<()> {
        Err(Error::Unsupported { what: "DMA_MAP".into() })
    }

    /// Takes a mapping back.
    ///
    /// # Errors
    /// Always [`Error::Unsupported`].
    pub async fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<()> {
        Err(Error::Unsupported { what: "DMA_UNMAP".into() })
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        false
    }
}
