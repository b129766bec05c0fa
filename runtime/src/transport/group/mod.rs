//! The older way to a device of the kernel: its IOMMU group, in a container with type 1 page tables.
//!
//! A [`Container`] is an address space of the IOMMU: memory is mapped there once for all groups in it. The kernel gives out a
//! group only as a whole: each of its devices is bound to a vfio driver, or to none.
//!
//! ```no_run
//! use vfio_uring::transport::group::Container;
//!
//! // /sys/bus/pci/devices/0000:01:00.0/iommu_group leads to .../iommu_groups/5
//! let container = Container::new()?;
//! container.add_group(5, false)?;
//! let device = container.device("0000:01:00.0", None)?;
//! println!("{:?}, allowed addresses {:x?}", device.info()?, container.info()?.ranges);
//! # Ok::<(), vfio_uring::Error>(())
//! ```
//!
//! Every function here is one or a few system calls, and may block: opening a device resets it, mapping pins each page.
//!
//! Source: `include/uapi/linux/vfio.h`, `drivers/vfio/{group,container,vfio_iommu_type1}.c`.

mod nodes;
mod type1;

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

pub use nodes::GroupFd;
pub use type1::{Migration, Type1Info};

use self::nodes::{ContainerFd, Iommu, Nodes};
use super::vfio::{DeviceFd, VfToken};
use crate::{Error, Result, dma::IovaRange};

/// Groups, and the memory that is mapped for them. A handle: clones are the same container.
///
/// The groups stay with this process until the container is dropped and all of their devices are closed; what is mapped stays
/// mapped as long.
#[derive(Debug, Clone)]
pub struct Container(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    nodes: Nodes,
    fd: ContainerFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    groups: BTreeMap<u32, GroupFd>,
    /// What translates; `None` without a group.
    iommu: Option<Iommu>,
    /// Mappings that fit in all: what was free before the first.
    max_mappings: Option<u32>,
}

impl Container {
    /// An empty container.
    ///
    /// # Errors
    /// [`Error::NotReady`] where VFIO is missing or the caller has no permission, [`Error::Unsupported`] for an interface of
    /// another version, else [`Error::Io`].
    pub fn new() -> Result<Self> {
        Self::at("/dev/vfio", "/sys")
    }

    /// An empty container, with VFIO's nodes in the directory `dev` and sysfs at `sys`: in a sandbox that has them elsewhere.
    ///
    /// # Errors
    /// As for [`Container::new`].
    pub fn at(dev: impl AsRef<Path>, sys: impl AsRef<Path>) -> Result<Self> {
        let nodes = Nodes::new(dev.as_ref(), sys.as_ref());
        let fd = nodes.open_container()?;
        Ok(Self(Arc::new(Inner { nodes, fd, state: Mutex::default() })))
    }

    /// Takes an IOMMU group into the container; one that is in it already stays. The first makes the IOMMU ready. Each may narrow
    /// the allowed addresses: ask [`Container::info`] again.
    ///
    /// `noiommu` asks for a group without an IOMMU (`noiommu-N`), whose device does DMA to any memory of the machine, unchecked.
    /// Nothing can be mapped for it: it needs memory that does not move, and physical addresses.
    ///
    /// # Errors
    /// The container is as before then.
    /// - [`Error::NotReady`]: the group is not there or may not be opened, has no IOMMU and was not asked for as such, or the
    ///   kernel lacks a module; with the remedy.
    /// - [`Error::InUse`]: another process has the group, or a kernel driver has one of its devices; those are named.
    /// - [`Error::Conflict`]: the group comes late, and reserves addresses that are mapped, or has an IOMMU that does not reach
    ///   them. What [`Container::reserved`] says, held against the live mappings, tells which.
    /// - [`Error::Invalid`]: groups with and without an IOMMU do not go together.
    /// - [`Error::Io`]: anything else.
    pub fn add_group(&self, group: u32, noiommu: bool) -> Result<()> {
        let Inner { nodes, fd, .. } = &*self.0;
        let wanted = if noiommu { Iommu::None } else { Iommu::Type1 };
        let mut state = self.state();
        match state.iommu {
            Some(iommu) if iommu != wanted => {
                return Err(Error::invalid(format!(
                    "group {group}: groups with and without an IOMMU can't be in one container; use one for each kind"
                )));
            }
            _ if state.groups.contains_key(&group) => return Ok(()),
            _ => {}
        }
        let opened = nodes.open_group(group, noiommu)?;
        nodes.check_viable(&opened)?;
        let first = state.iommu.is_none();
        opened.set_container(fd).map_err(|errno| nodes.set_container_failed(group, errno, first))?;
        if first {
            // The group leaves the container again when it is dropped.
            fd.set_iommu(wanted)?;
            state.iommu = Some(wanted);
            state.max_mappings = match wanted {
                Iommu::Type1 => fd.info().ok().and_then(|info| info.dma_available),
                Iommu::None => None,
            };
        }
        state.groups.insert(group, opened);
        Ok(())
    }

    /// The addresses that nothing may be mapped at while a group is in a container, in it or not, as sysfs has them. Those that
    /// only the firmware wants before a driver comes are not among them.
    ///
    /// # Errors
    /// [`Error::Io`] when sysfs does not know the group.
    pub fn reserved(&self, group: u32) -> Result<Vec<IovaRange>> {
        self.0.nodes.reserved(group)
    }

    /// Gives a group back. The allowed addresses may be more afterwards.
    ///
    /// With the last group everything that was mapped is gone, without a word to those who mapped it. Whether that is so is what
    /// is returned.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a group that is not in the container, [`Error::InUse`] while one of its devices is open or mapped,
    /// else [`Error::Io`]. It stays then.
    pub fn remove_group(&self, group: u32) -> Result<bool> {
        let mut state = self.state();
        let Some(opened) = state.groups.get(&group) else {
            return Err(Error::invalid(format!("group {group} is not in the container")));
        };
        opened.unset_container().map_err(|errno| match errno {
            Errno::BUSY => Error::InUse {
                what: format!(
                    "group {group} can't leave its container: its devices are open; unmap their BARs and close them"
                ),
            },
            errno => Error::io(format!("taking group {group} out of its container"), errno),
        })?;
        state.groups.remove(&group);
        let empty = state.groups.is_empty();
        if empty {
            (state.iommu, state.max_mappings) = (None, None);
        }
        Ok(empty)
    }

    /// The groups of the container, by number: a [hot reset](DeviceFd::hot_reset) wants those of all devices that it affects.
    /// A handle of a group keeps it from other processes, also after it was removed.
    pub fn groups(&self) -> Vec<(u32, GroupFd)> {
        self.state().groups.iter().map(|(&number, group)| (number, group.clone())).collect()
    }

    /// Opens a device of one of the groups, by the name that it has in sysfs. It resets the device where that can be done.
    ///
    /// A virtual function whose physical function is bound to vfio-pci wants the token that was set there.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a device of none of the groups, a token that is wrong, missing, or not wanted; [`Error::InUse`],
    /// else [`Error::Io`].
    pub fn device(&self, name: &str, token: Option<&VfToken>) -> Result<DeviceFd> {
        let groups = self.groups();
        for (_, group) in &groups {
            match group.device(name, token)? {
                Some(device) => return Ok(device),
                None => continue,
            }
        }
        let numbers: Vec<_> = groups.iter().map(|(number, _)| number.to_string()).collect();
        Err(Error::invalid(format!(
            "{name} is not a device of vfio in the groups of this container ({}); bind it to vfio-pci, and add the group that \
             /sys/bus/pci/devices/{name}/iommu_group names",
            if numbers.is_empty() { "none".into() } else { numbers.join(", ") }
        )))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

/// Makes a descriptor of the number that an ioctl returned.
fn owned(fd: i32) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel made this descriptor for us just now; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests;
