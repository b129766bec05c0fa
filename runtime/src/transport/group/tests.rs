use std::{fs, os::unix::fs::symlink};

use tempfile::{TempDir, tempdir};

use super::*;
use crate::dma::IovaRange;

/// A `/dev/vfio` and a `/sys` of files, which are no containers and groups.
fn machine() -> TempDir {
    let root = tempdir().unwrap();
    let device = |group: u32, bdf: &str, driver: Option<&str>| {
        let device = root.path().join(format!("sys/kernel/iommu_groups/{group}/devices/{bdf}"));
        fs::create_dir_all(&device).unwrap();
        if let Some(driver) = driver {
            symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
        }
    };
    device(7, "0000:01:00.0", Some("vfio-pci"));
    device(7, "0000:01:00.1", Some("snd_hda_intel"));
    device(7, "0000:00:1c.0", Some("pcieport"));
    device(7, "0000:01:00.2", None);
    device(8, "0000:02:00.0", Some("vfio-pci"));
    let regions = "0x00000000000a0000 0x00000000000bffff direct-relaxable\n0x00000000fee00000 0x00000000feefffff msi\nodd\n";
    fs::write(root.path().join("sys/kernel/iommu_groups/8/reserved_regions"), regions).unwrap();
    fs::create_dir(root.path().join("dev")).unwrap();
    root
}

fn nodes(root: &TempDir) -> Nodes {
    Nodes::new(&root.path().join("dev"), &root.path().join("sys"))
}

#[test]
fn what_is_no_container_is_refused() {
    let root = machine();
    let (dev, sys) = (root.path().join("dev"), root.path().join("sys"));
    let missing = Container::at(&dev, &sys).unwrap_err().to_string();
    assert!(missing.contains("modprobe vfio-pci vfio_iommu_type1"), "{missing}");
    fs::write(dev.join("vfio"), "").unwrap();
    let file = Container::at(&dev, &sys).unwrap_err().to_string();
    assert!(file.contains("is not a container of VFIO"), "{file}");
}

#[test]
fn noiommu_is_had_only_by_name() {
    let root = machine();
    let nodes = nodes(&root);
    fs::write(root.path().join("dev/noiommu-3"), "").unwrap();
    fs::write(root.path().join("dev/4"), "").unwrap();
    let error = |group, noiommu| nodes.open_group(group, noiommu).unwrap_err().to_string();
    assert!(error(3, false).contains("group 3 has no IOMMU"));
    assert!(error(4, true).contains("group 4 has an IOMMU"));
    assert!(error(5, false).contains("intel_iommu=on"));
    assert!(error(5, true).contains("enable_unsafe_noiommu_mode=1"));
    assert_eq!(nodes.open_group(3, true).unwrap().number(), 3);
    let file = nodes.open_group(4, false).unwrap();
    assert!(nodes.check_viable(&file).unwrap_err().to_string().contains("not a group of VFIO"));
    for name in ["", "0000:01:00.0 vf_token=x", "a\0b"] {
        assert!(matches!(file.device(name, None), Err(Error::Invalid { .. })), "{name}");
    }
}

#[test]
fn refusals_name_drivers() {
    let root = machine();
    let nodes = nodes(&root);
    let error = |group, errno, first| nodes.set_container_failed(group, errno, first);
    match error(7, Errno::PERM, true) {
        Error::InUse { what } => assert!(what.contains("other drivers than vfio: 0000:01:00.1 (snd_hda_intel); "), "{what}"),
        error => panic!("{error}"),
    }
    assert!(matches!(error(8, Errno::INVAL, false), Error::Conflict { device, .. } if device == "group 8"));
    assert!(matches!(error(8, Errno::INVAL, true), Error::InUse { .. }));
    assert!(matches!(error(8, Errno::PERM, false), Error::NotReady { what } if what.contains("allow_unsafe_interrupts")));
}

#[test]
fn reserved_regions_are_read() {
    let root = machine();
    let msi = IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff };
    assert_eq!(nodes(&root).reserved(8).unwrap(), [msi]);
    assert!(nodes(&root).reserved(9).is_err());
}
