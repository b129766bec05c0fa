//! Request numbers and structures of the kernel's interface (`include/uapi/linux/vfio.h`).
//!
//! Structures are in the order of bytes of the host, which is little-endian wherever this crate runs: the parsers of vfio-user
//! do for the kernel too.

use vfio_bindings::bindings::vfio as bindings;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::ioctl::request;

const _: () = assert!(cfg!(target_endian = "little"), "the structures of VFIO are read as little-endian");

/// Requests of a container.
pub(crate) mod container {
    use super::request;

    pub(crate) const GET_API_VERSION: u32 = request(0x64);
    pub(crate) const CHECK_EXTENSION: u32 = request(0x65);
    pub(crate) const SET_IOMMU: u32 = request(0x66);
    pub(crate) const IOMMU_GET_INFO: u32 = request(0x70);
    pub(crate) const IOMMU_MAP_DMA: u32 = request(0x71);
    pub(crate) const IOMMU_UNMAP_DMA: u32 = request(0x72);
}

/// Requests of a group.
pub(crate) mod group {
    use super::request;

    pub(crate) const GET_STATUS: u32 = request(0x67);
    pub(crate) const SET_CONTAINER: u32 = request(0x68);
    pub(crate) const UNSET_CONTAINER: u32 = request(0x69);
    pub(crate) const GET_DEVICE_FD: u32 = request(0x6a);
}

/// Requests of a device.
pub(crate) mod device {
    use super::request;

    pub(crate) const GET_INFO: u32 = request(0x6b);
    pub(crate) const GET_REGION_INFO: u32 = request(0x6c);
    pub(crate) const GET_IRQ_INFO: u32 = request(0x6d);
    pub(crate) const SET_IRQS: u32 = request(0x6e);
    pub(crate) const RESET: u32 = request(0x6f);
    pub(crate) const GET_PCI_HOT_RESET_INFO: u32 = request(0x70);
    pub(crate) const PCI_HOT_RESET: u32 = request(0x71);
    pub(crate) const FEATURE: u32 = request(0x75);
}

macro_rules! kernel_struct {
    ($(#[$meta:meta])* $name:ident [$size:literal] { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(crate) struct $name { $($(#[$fmeta])* pub(crate) $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

kernel_struct! {
    /// `struct vfio_iommu_type1_info`.
    Type1Header [24] {
        argsz: U32,
        /// `VFIO_IOMMU_INFO_*`: PGSIZES 1, CAPS 2.
        flags: U32,
        page_sizes: U64,
        cap_offset: U32,
        reserved: U32,
    }
}
kernel_struct! {
    /// `struct vfio_iommu_type1_info_cap_iova_range` after its header, before the ranges.
    IovaRanges [8] {
        count: U32,
        reserved: U32,
    }
}
kernel_struct! {
    /// `struct vfio_iova_range`; the end is inclusive.
    IovaPair [16] {
        start: U64,
        end: U64,
    }
}
kernel_struct! {
    /// `struct vfio_iommu_type1_info_cap_migration` after its header.
    MigrationCap [24] {
        flags: U32,
        /// The bitmaps that follow are 8-byte aligned.
        reserved: U32,
        page_sizes: U64,
        max_dirty_bitmap: U64,
    }
}
kernel_struct! {
    /// `struct vfio_pci_hot_reset_info` before its devices, and `struct vfio_pci_hot_reset` before its groups.
    HotReset [12] {
        argsz: U32,
        flags: U32,
        count: U32,
    }
}
kernel_struct! {
    /// `struct vfio_pci_dependent_device`.
    Dependent [8] {
        /// A group, or a device id, as the flags say.
        id: U32,
        segment: U16,
        bus: u8,
        devfn: u8,
    }
}
kernel_struct! {
    /// `struct vfio_device_feature` before its data.
    FeatureHeader [8] {
        argsz: U32,
        flags: U32,
    }
}
kernel_struct! {
    /// `struct vfio_device_low_power_entry_with_wakeup`.
    Wakeup [8] {
        eventfd: U32,
        reserved: U32,
    }
}

// What the parsers shared with vfio-user and the structures above take for granted.
const _: () = {
    assert!(size_of::<bindings::vfio_info_cap_header>() == 8);
    assert!(size_of::<bindings::vfio_group_status>() == 8);
    assert!(size_of::<bindings::vfio_device_info>() == 24);
    assert!(size_of::<bindings::vfio_region_info>() == 32);
    assert!(size_of::<bindings::vfio_irq_info>() == 16);
    assert!(size_of::<bindings::vfio_irq_set>() == 20);
    assert!(size_of::<bindings::vfio_iommu_type1_info>() == 24);
    assert!(size_of::<bindings::vfio_iommu_type1_info_cap_iova_range>() == 16);
    assert!(size_of::<bindings::vfio_iommu_type1_info_cap_migration>() == 32);
    assert!(size_of::<bindings::vfio_iommu_type1_info_dma_avail>() == 12);
    assert!(size_of::<bindings::vfio_iommu_type1_dma_map>() == 32);
    assert!(size_of::<bindings::vfio_iommu_type1_dma_unmap>() == 24);
    assert!(size_of::<bindings::vfio_pci_dependent_device>() == 8);
    assert!(size_of::<bindings::vfio_device_feature>() == 8);
};
