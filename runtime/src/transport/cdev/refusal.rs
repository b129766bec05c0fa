//! What the kernel's errnos mean for a cdev, and what to do.

use rustix::io::Errno;

use super::Pasid;
use crate::Error;

pub(super) fn open(errno: Errno, name: &str) -> Error {
    match errno {
        Errno::NOENT => Error::NotReady {
            what: format!(
                "{name} is missing: bind the device to vfio-pci, and have udev or devtmpfs make the nodes in /dev"
            ),
        },
        Errno::NXIO => Error::NotReady { what: format!("{name}: no driver serves this node any more; look it up again") },
        Errno::ACCESS | Errno::PERM => Error::NotReady {
            what: format!(
                "{name} may not be opened: it is root's unless a udev rule says otherwise (with no-IOMMU, CAP_SYS_RAWIO)"
            ),
        },
        Errno::NODEV => Error::Gone { reason: format!("{name} is being removed").into() },
        errno => Error::io(format!("opening {name}"), errno),
    }
}

pub(super) fn bind(errno: Errno, name: &str, token: bool) -> Error {
    let in_use = |why: &str| Error::InUse { what: format!("{name} can't be bound: {why}") };
    let not_ready = |why: &str| Error::NotReady { what: format!("{name} can't be bound: {why}") };
    match errno {
        Errno::BUSY => in_use(
            "its IOMMU group is opened through /dev/vfio/GROUP, or a device of the group belongs to another program; end that one",
        ),
        // The type leaves no other argument that could be wrong.
        Errno::INVAL if token => not_ready(
            "another program has bound it, or its driver (or an older kernel) takes no VF tokens, or its DMA is not \
             cache-coherent",
        ),
        Errno::INVAL => {
            in_use("another program has bound it (or a mapping of a BAR keeps it bound), or its DMA is not cache-coherent")
        }
        Errno::ACCESS if token => not_ready("the VF token is not the one that the physical function's user has set"),
        Errno::ACCESS => not_ready("a virtual function needs the VF token that the physical function's user has set"),
        Errno::PERM => not_ready(
            "another device of its IOMMU group has a driver of the kernel (bind that one to vfio-pci too) or belongs to another \
             context, or the platform does not isolate MSIs (iommufd.allow_unsafe_interrupts=1 accepts that)",
        ),
        Errno::BADF | Errno::BADFD => not_ready("the descriptor is not one of iommufd"),
        Errno::NOTTY => {
            Error::invalid(format!("{name} is not the character device of a VFIO device: see /dev/vfio/devices"))
        }
        Errno::AGAIN => Error::io(format!("binding {name}: it could not be locked for its reset; try again"), errno),
        Errno::NODEV => Error::Gone { reason: format!("{name}, or its driver, is being removed").into() },
        errno => Error::io(format!("binding {name}"), errno),
    }
}

pub(super) fn attach(errno: Errno, name: &str, pasid: Option<Pasid>) -> Error {
    let what = match pasid {
        Some(pasid) => format!("attaching PASID {} of {name}", pasid.get()),
        None => format!("attaching {name}"),
    };
    match errno {
        Errno::ADDRINUSE => Error::Conflict { device: name.into(), mapping: None, reserved: None },
        Errno::NOENT => Error::invalid(format!("{what}: the address space or page table is gone")),
        Errno::INVAL if pasid.is_some() => Error::invalid(format!(
            "{what}: this table and the device's own must be made for PASIDs, the number must be in the device's range, and the \
             kernel 6.15 or newer"
        )),
        Errno::INVAL => Error::invalid(format!(
            "{what}: another device of its IOMMU group is attached elsewhere (attach all to the same), or the page table is not for \
             its IOMMU"
        )),
        Errno::OPNOTSUPP => Error::Unsupported { what: format!("{what}: the driver or the IOMMU can't") },
        Errno::FAULT => {
            Error::invalid(format!("{what}: memory that was mapped for DMA is not mapped in the process any more"))
        }
        Errno::NOMEM => Error::Exhausted {
            what: format!(
                "{what}: out of memory, or the memory that is mapped exceeds RLIMIT_MEMLOCK, which all processes of the user share; \
                 raise `ulimit -l`"
            ),
        },
        Errno::BUSY => Error::io(format!("{what}: it or a device of its group is being reset; try again after it"), errno),
        Errno::NODEV => Error::Gone { reason: format!("{name} is being removed").into() },
        errno => Error::io(what, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_errno_has_its_remedy() {
        let pasid = Pasid::new(5).ok();
        for (error, part) in [
            (open(Errno::NOENT, "vfio0"), "bind the device"),
            (open(Errno::ACCESS, "vfio0"), "udev rule"),
            (open(Errno::NODEV, "vfio0"), "removed"),
            (bind(Errno::BUSY, "vfio0", false), "IOMMU group"),
            (bind(Errno::INVAL, "vfio0", false), "another program"),
            (bind(Errno::INVAL, "vfio0", true), "VF tokens"),
            (bind(Errno::ACCESS, "vfio0", false), "needs the VF token"),
            (bind(Errno::ACCESS, "vfio0", true), "is not the one"),
            (bind(Errno::PERM, "vfio0", false), "allow_unsafe_interrupts"),
            (bind(Errno::AGAIN, "vfio0", false), "try again"),
            (attach(Errno::ADDRINUSE, "vfio0", None), "it reserves"),
            (attach(Errno::INVAL, "vfio0", None), "IOMMU group"),
            (attach(Errno::INVAL, "vfio0", pasid), "6.15"),
            (attach(Errno::NOMEM, "vfio0", None), "ulimit -l"),
            (attach(Errno::BUSY, "vfio0", None), "try again"),
            (attach(Errno::OPNOTSUPP, "vfio0", pasid), "PASID 5"),
        ] {
            let text = error.to_string();
            assert!(text.contains(part) && text.contains("vfio0"), "{text}");
        }
    }
}
