//! Who is told of mappings: a vfio-user server, or the kernel.

use std::{io, rc::Rc, sync::Arc};

use blocking::unblock;

use super::{
    Access, MapRefused, Peers,
    gate::Inside,
    mapping::{Backing, Region},
};
use crate::{
    Error, Result,
    transport::{group::Container, iommufd::Ioas},
};

/// Who is told of mappings.
#[derive(Clone)]
#[non_exhaustive]
pub enum Backend {
    /// Vfio-user servers: they get the memfd of each mapping.
    User(Rc<Peers>),
    /// The kernel's type 1 IOMMU, for all groups of a container.
    Container(Container),
    /// The kernel's iommufd, for all devices that are attached to an I/O address space.
    Ioas(Ioas),
    /// Nobody: the device runs in this process and finds its memory through [`AddressSpace::mappings`],
    /// [`AddressSpace::read`] and [`AddressSpace::write`]. For tests, benches and fuzzing.
    ///
    /// [`AddressSpace::mappings`]: super::AddressSpace::mappings
    /// [`AddressSpace::read`]: super::AddressSpace::read
    /// [`AddressSpace::write`]: super::AddressSpace::write
    Null,
    #[cfg(test)]
    #[doc(hidden)]
    Script(Rc<super::tests::Script>),
}

/// Why a mapping was not made.
pub(super) struct NotMapped {
    pub(super) error: Error,
    /// Whether no device has it: else one may.
    pub(super) absent: bool,
}

impl Error {
    /// Whether a device said no to a mapping, or was never asked.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            // Something else is there, it says: other addresses may do.
            Self::Refused { source, .. } => source.kind() != io::ErrorKind::AlreadyExists,
            Self::Unsupported { .. } | Self::Invalid { .. } | Self::Exhausted { .. } => true,
            _ => false,
        }
    }
}

impl Backend {
    /// Waits while a device joins; mappings are made and unmade within this.
    pub(super) async fn enter(&self) -> Option<Inside<'_>> {
        match self {
            Self::User(peers) => Some(peers.gate.enter().await),
            _ => None,
        }
    }

    pub(super) async fn map(&self, region: &Arc<Region>) -> Result<(), NotMapped> {
        if let Self::User(peers) = self {
            return peers.map(region).await;
        }
        self.map_alone(region).await.map_err(|error| {
            let absent = match &error {
                Error::Map { reason: MapRefused::Overlap, .. } => false,
                // What the kernel refuses it has not mapped.
                Error::Map { .. } | Error::Io { .. } => self.is_kernel(),
                error => error.is_refusal(),
            };
            NotMapped { error, absent }
        })
    }

    /// The kernel pins every page of a mapping, and may have to wait for that: its calls run on a thread of their own, which holds the
    /// memory until they have returned.
    async fn map_alone(&self, region: &Arc<Region>) -> Result<()> {
        match self {
            Self::Container(container) => {
                let (container, region) = (container.clone(), region.clone());
                unblock(move || {
                    let address = region.memory.as_ptr().as_ptr();
                    // SAFETY: the memory is shared memory, which nothing relies on. It is given back after the unmap; when that can't
                    // be had, what is given back are the addresses in this process, and the kernel keeps the pages that it has pinned.
                    // Memory of the caller is not given back then.
                    unsafe { container.map(address, region.len(), region.iova, Access::ReadWrite) }
                })
                .await
            }
            Self::Ioas(ioas) => {
                let (ioas, region) = (ioas.clone(), region.clone());
                unblock(move || {
                    if let Backing::Memfd(fd) = &region.backing
                        && ioas.context().maps_files()
                    {
                        return ioas.map_file(fd, 0, region.len(), region.iova, Access::ReadWrite);
                    }
                    let address = region.memory.as_ptr().as_ptr();
                    // SAFETY: as above.
                    unsafe { ioas.map(address, region.len(), region.iova, Access::ReadWrite) }
                })
                .await
            }
            Self::User(_) | Self::Null => Ok(()),
            #[cfg(test)]
            Self::Script(script) => script.map(region.iova).await,
        }
    }

    pub(super) async fn unmap(&self, region: &Arc<Region>) -> Result<()> {
        match self {
            Self::User(peers) => peers.unmap(region).await,
            Self::Container(container) => {
                let (container, region) = (container.clone(), region.clone());
                unblock(move || container.unmap(region.iova, region.len())).await.map(drop)
            }
            Self::Ioas(ioas) => {
                let (ioas, region) = (ioas.clone(), region.clone());
                unblock(move || ioas.unmap(region.iova, region.len())).await.map(drop)
            }
            Self::Null => Ok(()),
            #[cfg(test)]
            Self::Script(script) => script.unmap(region.iova).await,
        }
    }

    /// Unmaps memory of the caller when the space is gone, and frees it.
    pub(super) fn unmap_detached(&self, region: Arc<Region>) {
        match self.clone() {
            Self::Container(container) => unblock(move || {
                if container.unmap(region.iova, region.len()).is_ok() {
                    region.set_pinned(false);
                }
            })
            .detach(),
            Self::Ioas(ioas) => unblock(move || {
                if ioas.unmap(region.iova, region.len()).is_ok() {
                    region.set_pinned(false);
                }
            })
            .detach(),
            _ => {}
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::User(peers) => peers.is_gone(),
            Self::Container(_) | Self::Ioas(_) | Self::Null => false,
            #[cfg(test)]
            Self::Script(script) => script.is_gone(),
        }
    }

    /// Whether an error tells that nothing is mapped, and memory that is mapped is pinned.
    pub(super) fn is_kernel(&self) -> bool {
        match self {
            Self::Container(_) | Self::Ioas(_) => true,
            Self::User(_) | Self::Null => false,
            #[cfg(test)]
            Self::Script(script) => script.is_kernel(),
        }
    }
}
