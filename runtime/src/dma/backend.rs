//! Who is told of mappings: a vfio-user server, or the kernel.

use std::{rc::Rc, sync::Arc};

use blocking::unblock;

use super::{Access, mapping::Region};
use crate::{
    Result,
    transport::{group::Container, iommufd::Ioas, user::client::Connection},
};

/// Who is told of mappings.
#[derive(Clone)]
#[non_exhaustive]
pub enum Backend {
    /// A vfio-user server: it gets the memfd of each mapping.
    User(Rc<Connection>),
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

impl Backend {
    /// The kernel pins every page of a mapping, and may have to wait for that: its calls run on a thread of their own, which holds the
    /// memory until they have returned.
    pub(super) async fn map(&self, region: &Arc<Region>) -> Result<()> {
        match self {
            Self::User(connection) => connection.dma_map(region.iova, region.len(), &region.fd, 0).await,
            Self::Container(container) => {
                let (container, region) = (container.clone(), region.clone());
                unblock(move || {
                    let address = region.memory.as_ptr().as_ptr();
                    // SAFETY: the memory is shared memory, which nothing relies on. It is given back after the unmap; when that can't
                    // be had, what is given back are the addresses in this process, and the kernel keeps the pages that it has pinned.
                    unsafe { container.map(address, region.len(), region.iova, Access::ReadWrite) }
                })
                .await
            }
            Self::Ioas(ioas) => {
                let (ioas, region) = (ioas.clone(), region.clone());
                unblock(move || {
                    if ioas.context().maps_files() {
                        return ioas.map_file(&region.fd, 0, region.len(), region.iova, Access::ReadWrite);
                    }
                    let address = region.memory.as_ptr().as_ptr();
                    // SAFETY: as above.
                    unsafe { ioas.map(address, region.len(), region.iova, Access::ReadWrite) }
                })
                .await
            }
            Self::Null => Ok(()),
            #[cfg(test)]
            Self::Script(script) => script.map(region.iova).await,
        }
    }

    pub(super) async fn unmap(&self, region: &Arc<Region>) -> Result<()> {
        match self {
            Self::User(connection) => connection.dma_unmap(region.iova, region.len()).await,
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

    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::User(connection) => connection.is_gone(),
            Self::Container(_) | Self::Ioas(_) | Self::Null => false,
            #[cfg(test)]
            Self::Script(script) => script.is_gone(),
        }
    }

    /// Whether an error tells that nothing is mapped.
    pub(super) fn is_kernel(&self) -> bool {
        matches!(self, Self::Container(_) | Self::Ioas(_))
    }
}
