//! From a PCI device to its character device.

use std::path::PathBuf;

use crate::{
    Error, Result,
    dma::IovaRange,
    pci::sysfs::{Obstacle, PciDevice},
};

/// What sysfs tells of a device that can be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) node: PathBuf,
    /// Its major and minor number.
    pub(super) dev: (u32, u32),
    /// Addresses that no memory may be mapped at while it is attached.
    pub(super) reserved: Vec<IovaRange>,
}

pub(super) fn find(device: &PciDevice) -> Result<Found> {
    let bdf = device.bdf;
    let missing = |obstacle: Obstacle| Err(Error::NotReady { what: obstacle.to_string() });
    let Some(vfio) = &device.vfio else {
        return missing(Obstacle::NotBound { bdf, driver: device.driver.clone() });
    };
    let Some(group) = device.group.as_ref().filter(|group| !group.no_iommu) else {
        return missing(Obstacle::NoIommu { bdf });
    };
    let Some(dev) = vfio.dev else {
        return missing(Obstacle::NoCdevSupport);
    };
    let node = PathBuf::from("/dev/vfio/devices").join(&vfio.name);
    let reserved = group.reserved.iter().filter(|region| !region.relaxable());
    let reserved = reserved.map(|region| IovaRange { start: region.start, last: region.last }).collect();
    Ok(Found { node, dev, reserved })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fake::{EDU, Fake, NVME};

    fn find_in(fake: &Fake, bdf: &str) -> Result<Found> {
        find(&fake.pci.device(bdf.parse()?)?)
    }

    #[test]
    fn the_node_its_numbers_and_what_it_reserves() {
        let fake = Fake::new();
        fake.drive(NVME, Some("vfio-pci"));
        let regions = "0x0000000000001000 0x0000000000001fff direct-relaxable\n0x00000000fee00000 0x00000000feefffff msi\n";
        fake.file("sys/kernel/iommu_groups/12/reserved_regions", regions);
        let found = Found {
            node: "/dev/vfio/devices/vfio3".into(),
            dev: (511, 3),
            reserved: vec![IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff }],
        };
        assert_eq!(find_in(&fake, NVME).unwrap(), found);
    }

    #[test]
    fn what_is_missing_is_said() {
        let fake = Fake::new();
        let says = |bdf, part: &str| {
            let error = find_in(&fake, bdf).unwrap_err();
            assert!(matches!(error, Error::NotReady { .. }) && error.to_string().contains(part), "{error}");
        };
        says(NVME, "bound to the kernel's driver nvme: vfio-uring bind 0000:01:00.0");
        says(EDU, "has no driver: vfio-uring bind");
        fake.drive(NVME, Some("vfio-pci"));
        std::fs::remove_file(fake.path(&Fake::under(NVME, "vfio-dev/vfio3/dev"))).unwrap();
        says(NVME, "VFIO_DEVICE_CDEV");
        std::fs::remove_file(fake.path(&Fake::under(NVME, "iommu_group"))).unwrap();
        says(NVME, "no IOMMU");
        assert!(find_in(&fake, "0000:77:00.0").unwrap_err().to_string().contains("no PCI device"));
        assert!(matches!(find_in(&fake, "../0000:01:00.0"), Err(Error::Address { .. })));
    }
}
