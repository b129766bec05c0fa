//! Class codes in words. Source: PCI Code and ID Assignment Specification, section 1.

/// What a device of `class` is, in words: `class` is class, subclass and programming interface, from high to low byte.
///
/// `None` for what is rare or reserved.
///
/// ```
/// use vfio_uring::pci::class_name;
///
/// assert_eq!(class_name(0x010802), Some("NVMe controller"));
/// assert_eq!(class_name(0x0108ff), Some("non-volatile memory"));
/// assert_eq!(class_name(0xfe0000), None);
/// ```
pub fn class_name(class: u32) -> Option<&'static str> {
    Some(match (class >> 8, class & 0xff) {
        (0x0000..=0x00ff, _) => "unclassified",
        (0x0100, _) => "SCSI controller",
        (0x0101, _) => "IDE controller",
        (0x0104, _) => "RAID controller",
        (0x0106, 0x01) => "AHCI controller",
        (0x0106, _) => "SATA controller",
        (0x0107, _) => "SAS controller",
        (0x0108, 0x02) => "NVMe controller",
        (0x0108, _) => "non-volatile memory",
        (0x0100..=0x01ff, _) => "mass storage",
        (0x0200, _) => "Ethernet controller",
        (0x0207, _) => "InfiniBand controller",
        (0x0200..=0x02ff, _) => "network controller",
        (0x0300, _) => "VGA controller",
        (0x0302, _) => "3D controller",
        (0x0300..=0x03ff, _) => "display controller",
        (0x0403, _) => "audio device",
        (0x0400..=0x04ff, _) => "multimedia device",
        (0x0500..=0x05ff, _) => "memory controller",
        (0x0600, _) => "host bridge",
        (0x0601, _) => "ISA bridge",
        (0x0604, _) => "PCI bridge",
        (0x0600..=0x06ff, _) => "bridge",
        (0x0700, _) => "serial port",
        (0x0700..=0x07ff, _) => "communication controller",
        (0x0806, _) => "IOMMU",
        (0x0800..=0x08ff, _) => "system device",
        (0x0900..=0x09ff, _) => "input device",
        (0x0c03, 0x30) => "xHCI controller",
        (0x0c03, _) => "USB controller",
        (0x0c05, _) => "SMBus controller",
        (0x0c00..=0x0cff, _) => "serial bus controller",
        (0x0d00..=0x0dff, _) => "wireless controller",
        (0x1000..=0x10ff, _) => "encryption controller",
        (0x1100..=0x11ff, _) => "signal processor",
        (0x1200..=0x12ff, _) => "accelerator",
        (0xff00..=0xffff, _) => "unclassified",
        _ => return None,
    })
}
