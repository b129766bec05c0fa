//! Page tables of the IOMMU, and what the kernel tells of an IOMMU.

use iommufd_bindings as abi;
use rustix::io::Errno;

use super::{DestroyError, Ioas, IommufdFd, Kind, Object};
use crate::{Error, Result};

const _: () = assert!(size_of::<abi::iommu_hwpt_alloc>() == 48);
const _: () = assert!(size_of::<abi::iommu_hw_info>() == 40);

bitflags::bitflags! {
    /// What a page table is made for.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct HwptFlags: u32 {
        /// Nested page tables may stand on it.
        const NEST_PARENT = abi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT;
        /// It can tell which pages a device wrote.
        const DIRTY_TRACKING = abi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING;
        /// Devices may be attached to it by PASID (Linux 6.15).
        const PASID = abi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
    }
}

/// A page table of the IOMMU that follows an [`Ioas`]. Attaching a device to the address space itself makes the kernel choose or
/// make one; this is for options that such a one never has: PASIDs, page faults, dirty tracking.
///
/// It is destroyed when it is dropped, or by [`Hwpt::destroy`], which says when that can't be.
#[derive(Debug)]
pub struct Hwpt {
    object: Object,
    /// In the kernel it holds the address space, which must not go first.
    ioas: Ioas,
}

impl Hwpt {
    /// Makes one for the IOMMU in front of a bound device, with the mappings of `ioas`. `fault_id` names a fault queue that gets
    /// the page requests of the devices attached to it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what the IOMMU can't do, [`Error::Invalid`] for ids that are not of this context,
    /// [`Error::Exhausted`] without memory, else [`Error::Io`].
    pub fn alloc(device_id: u32, ioas: &Ioas, flags: HwptFlags, fault_id: Option<u32>) -> Result<Self> {
        let fault_flag = match fault_id {
            Some(_) => abi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID,
            None => 0,
        };
        let mut arg = abi::iommu_hwpt_alloc {
            flags: flags.bits() | fault_flag,
            dev_id: device_id,
            pt_id: ioas.id(),
            data_type: abi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE,
            fault_id: fault_id.unwrap_or(0),
            ..Default::default()
        };
        let context = ioas.context();
        context.call(abi::IOMMUFD_CMD_HWPT_ALLOC, &mut arg).map_err(|errno| alloc_failed(errno, flags, fault_id))?;
        let object = Object { context: context.clone(), id: arg.out_hwpt_id, kind: Kind::Hwpt };
        Ok(Self { object, ioas: ioas.clone() })
    }

    /// Its id in the context.
    pub fn id(&self) -> u32 {
        self.object.id
    }

    /// The address space that it follows.
    pub fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    /// Leaves it to the end of its context.
    pub(crate) fn leak(self) {
        self.object.forget();
    }

    /// Destroys it.
    ///
    /// # Errors
    /// [`Error::Io`] with EBUSY while a device is attached: the table comes back with it.
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

fn alloc_failed(errno: Errno, flags: HwptFlags, fault_id: Option<u32>) -> Error {
    let fault = match fault_id {
        Some(id) => format!(" and fault queue {id}"),
        None => String::new(),
    };
    let what = format!("a page table of iommufd with {flags:?}{fault}");
    match errno {
        Errno::OPNOTSUPP if flags.contains(HwptFlags::NEST_PARENT) && fault_id.is_some() => Error::Unsupported {
            what: format!("{what}: a parent of nested tables can't have a fault queue, its children can"),
        },
        Errno::OPNOTSUPP => Error::Unsupported { what: format!("{what}: this IOMMU or kernel can't; leave out flags") },
        Errno::NOENT => Error::invalid(format!(
            "{what}: the device or the fault queue is not of this context, or gone: bind the device first"
        )),
        Errno::INVAL => Error::invalid(format!(
            "{what}: the address space is not of this context, or the IOMMU does not take this combination for this device"
        )),
        Errno::NOMEM => Error::Exhausted {
            what: format!(
                "{what}: out of memory or of locked memory, since all that is mapped gets pinned; raise `ulimit -l`"
            ),
        },
        errno => Error::io(what, errno),
    }
}

/// Whose IOMMU it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IommuKind {
    /// The driver does not say.
    Unknown,
    /// Intel VT-d.
    IntelVtd,
    /// ARM SMMUv3.
    ArmSmmuV3,
    /// NVIDIA's extension of the SMMUv3.
    Tegra241,
    /// AMD.
    Amd,
    /// One that this program does not know: the kernel's number.
    Other(u32),
}

/// What the kernel tells of the IOMMU in front of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HwInfo {
    /// Whose it is.
    pub kind: IommuKind,
    /// Bits of a PASID that the device and the IOMMU can use; 0: no PASIDs.
    pub pasid_bits: u8,
    /// It can tell which pages a device wrote.
    pub dirty_tracking: bool,
}

/// Bits of a PASID in PCI Express.
const MAX_PASID_BITS: u8 = 20;

pub(super) fn hw_info(context: &IommufdFd, device_id: u32) -> Result<HwInfo> {
    let mut arg = abi::iommu_hw_info { dev_id: device_id, ..Default::default() };
    context.call(abi::IOMMUFD_CMD_GET_HW_INFO, &mut arg).map_err(|errno| match errno {
        Errno::NOENT => Error::invalid(format!("no device with id {device_id} is bound to this context of iommufd")),
        Errno::OPNOTSUPP => Error::Unsupported { what: "information about its IOMMU".into() },
        errno => Error::io(format!("information about the IOMMU of device {device_id}"), errno),
    })?;
    // SAFETY: both fields of the union are the same `u32`.
    let kind = unsafe { arg.__bindgen_anon_1.out_data_type };
    decode(kind, arg.out_max_pasid_log2, arg.out_capabilities)
}

fn decode(kind: u32, pasid_bits: u8, capabilities: u64) -> Result<HwInfo> {
    if pasid_bits > MAX_PASID_BITS {
        return Err(Error::fault(format!(
            "the kernel tells of PASIDs of {pasid_bits} bits; PCI Express has {MAX_PASID_BITS}"
        )));
    }
    let kind = match kind {
        abi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE => IommuKind::Unknown,
        abi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD => IommuKind::IntelVtd,
        abi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 => IommuKind::ArmSmmuV3,
        abi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV => IommuKind::Tegra241,
        abi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD => IommuKind::Amd,
        other => IommuKind::Other(other),
    };
    let dirty_tracking = capabilities & u64::from(abi::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING) != 0;
    Ok(HwInfo { kind, pasid_bits, dirty_tracking })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_checked() {
        let info = decode(1, 20, 1).unwrap();
        assert_eq!(info, HwInfo { kind: IommuKind::IntelVtd, pasid_bits: 20, dirty_tracking: true });
        assert_eq!(decode(0, 0, 6).unwrap(), HwInfo { kind: IommuKind::Unknown, pasid_bits: 0, dirty_tracking: false });
        assert_eq!(decode(77, 0, 0).unwrap().kind, IommuKind::Other(77));
        assert!(decode(1, 21, 0).is_err());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let error = |errno, flags, fault| alloc_failed(errno, flags, fault).to_string();
        for (text, part) in [
            (error(Errno::OPNOTSUPP, HwptFlags::NEST_PARENT, Some(3)), "its children can"),
            (error(Errno::OPNOTSUPP, HwptFlags::PASID, None), "leave out flags"),
            (error(Errno::NOENT, HwptFlags::empty(), None), "bind the device"),
            (error(Errno::INVAL, HwptFlags::empty(), None), "combination"),
            (error(Errno::NOMEM, HwptFlags::empty(), None), "ulimit -l"),
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
