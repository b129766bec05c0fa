//! Virtual IOMMUs, as far as queues of their events need them.

use std::{os::fd::OwnedFd, sync::Arc};

use iommufd_bindings as abi;
use rustix::io::Errno;

use super::{
    DestroyError, Hwpt, Kind, Object,
    fault::{Closed, take_fd},
};
use crate::{Error, Result};

const _: () = assert!(size_of::<abi::iommu_viommu_alloc>() == 40);
const _: () = assert!(size_of::<abi::iommu_vdevice_alloc>() == 24);
const _: () = assert!(size_of::<abi::iommu_veventq_alloc>() == 32);

/// Events that a queue may hold at most (`VEVENTQ_MAX_DEPTH` is 2^19).
const MAX_DEPTH: u32 = 1 << 19;

/// A part of an IOMMU for one virtual machine (`IOMMU_VIOMMU_ALLOC`, Linux 6.13). A handle: clones are the same.
#[derive(Debug, Clone)]
pub struct Viommu(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    object: Object,
    /// In the kernel it holds its parent, which must not go first.
    parent: Hwpt,
}

impl Viommu {
    /// Makes one over the IOMMU of the device. `parent` was made with [`HwptFlags::NEST_PARENT`](super::HwptFlags::NEST_PARENT);
    /// `number` is the kernel's for the IOMMU's kind (`enum iommu_viommu_type`: 1 is ARM's SMMUv3).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where this IOMMU or kernel can't, [`Error::Invalid`] for a table that is no parent, else
    /// [`Error::Io`].
    pub fn alloc(device_id: u32, parent: Hwpt, number: u32) -> Result<Self> {
        let context = parent.ioas().context().clone();
        let mut arg = abi::iommu_viommu_alloc {
            type_: number,
            dev_id: device_id,
            hwpt_id: parent.id(),
            data_uptr: 0,
            ..Default::default()
        };
        context
            .call(abi::IOMMUFD_CMD_VIOMMU_ALLOC, &mut arg)
            .map_err(|errno| refused(format!("a virtual IOMMU of type {number:#x}"), "6.13", errno))?;
        let object = Object { context, id: arg.out_viommu_id, kind: Kind::Viommu };
        Ok(Self(Arc::new(Inner { object, parent })))
    }

    /// Its id in the context.
    pub fn id(&self) -> u32 {
        self.0.object.id
    }

    /// The page table under it.
    pub fn parent(&self) -> &Hwpt {
        &self.0.parent
    }

    /// Names a device by the number that it has in the virtual machine, as its events will.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a device of another IOMMU, or a number that is taken; else [`Error::Io`].
    pub fn add_device(&self, device_id: u32, virtual_id: u64) -> Result<Vdevice> {
        let mut arg =
            abi::iommu_vdevice_alloc { viommu_id: self.id(), dev_id: device_id, virt_id: virtual_id, ..Default::default() };
        let context = &self.0.object.context;
        context
            .call(abi::IOMMUFD_CMD_VDEVICE_ALLOC, &mut arg)
            .map_err(|errno| refused(format!("device {virtual_id:#x} of a virtual IOMMU"), "6.13", errno))?;
        let object = Object { context: context.clone(), id: arg.out_vdevice_id, kind: Kind::Vdevice };
        Ok(Vdevice { object, _viommu: self.clone() })
    }
}

/// A device of a virtual IOMMU. It is so until it is dropped.
#[derive(Debug)]
pub struct Vdevice {
    object: Object,
    _viommu: Viommu,
}

impl Vdevice {
    /// Its id in the context.
    pub fn id(&self) -> u32 {
        self.object.id
    }

    /// Takes the device out.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses: it comes back with it.
    pub fn destroy(self) -> Result<(), DestroyError<Self>> {
        match self.object.destroy() {
            Ok(()) => {
                self.object.forget();
                Ok(())
            }
            Err(error) => Err(DestroyError { error, object: self }),
        }
    }
}

/// The kernel's queue of a virtual IOMMU's events (`IOMMU_VEVENTQ_ALLOC`, Linux 6.15).
/// [`VirtualEvents`](crate::fault::veventq::VirtualEvents) is the stream over it.
#[derive(Debug)]
pub struct VeventObject {
    /// Before the object, which can't be destroyed while it is open.
    fd: Arc<OwnedFd>,
    object: Object,
    viommu: Viommu,
}

impl VeventObject {
    /// Makes the queue of `viommu` for one type of events, which holds up to `depth` of them, 1 to 2^19.
    ///
    /// # Errors
    /// [`Error::InUse`] when there is one of this type already, [`Error::Invalid`] for the depth, [`Error::Unsupported`] where
    /// the virtual IOMMU has no such events or the kernel is older, else [`Error::Io`].
    pub fn alloc(viommu: &Viommu, number: u32, depth: u32) -> Result<Self> {
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(Error::invalid(format!("a queue of {depth} events: 1 to {MAX_DEPTH} are possible")));
        }
        let mut arg =
            abi::iommu_veventq_alloc { viommu_id: viommu.id(), type_: number, veventq_depth: depth, ..Default::default() };
        let context = &viommu.0.object.context;
        let what = || format!("a queue of events of type {number:#x}");
        context.call(abi::IOMMUFD_CMD_VEVENTQ_ALLOC, &mut arg).map_err(|errno| match errno {
            Errno::EXIST => {
                Error::InUse { what: format!("{}: this virtual IOMMU has one already; close that first", what()) }
            }
            errno => refused(what(), "6.15", errno),
        })?;
        let object = Object { context: context.clone(), id: arg.out_veventq_id, kind: Kind::Vevents };
        let fd = Arc::new(take_fd(arg.out_veventq_fd, "a queue of events")?);
        Ok(Self { fd, object, viommu: viommu.clone() })
    }

    /// Its id in the context.
    pub fn id(&self) -> u32 {
        self.object.id
    }

    /// The descriptor that events are read from, which never waits.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Closes the descriptor, see [`FaultObject::close_fd`](super::FaultObject::close_fd). The virtual IOMMU is to be held until
    /// the rest is destroyed.
    pub(crate) fn close_fd(self) -> (Closed, Viommu) {
        (Closed::new(self.object), self.viommu)
    }
}

fn refused(what: String, since: &str, errno: Errno) -> Error {
    match errno {
        Errno::NOTTY => Error::Unsupported { what: format!("{what}, which needs Linux {since}") },
        Errno::OPNOTSUPP => Error::Unsupported { what: format!("{what}: this IOMMU can't, or not this type") },
        Errno::INVAL => Error::invalid(format!(
            "{what}: the page table is no parent of nested ones, or the device is behind another IOMMU"
        )),
        Errno::EXIST => Error::invalid(format!("{what}: the device, or the number, is taken already")),
        Errno::NOENT => Error::invalid(format!("{what}: an object is not of this context, or gone")),
        errno => Error::io(what, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_is_wrong() {
        for (errno, part) in [
            (Errno::NOTTY, "needs Linux 6.13"),
            (Errno::OPNOTSUPP, "can't"),
            (Errno::INVAL, "no parent"),
            (Errno::EXIST, "taken"),
            (Errno::NOENT, "gone"),
            (Errno::NOMEM, "x: "),
        ] {
            let text = refused("x".into(), "6.13", errno).to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
