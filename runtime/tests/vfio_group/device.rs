//! What a device says of itself, its regions, its resets and its features.

use std::{
    io::ErrorKind,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use vfio_uring::{
    Error,
    device::index,
    transport::vfio::{DependentId, FeatureOp},
};

use super::{PAGE, enable, nvme, read, region, set_command, sysfs_number, tested};

/// `VFIO_DEVICE_FLAGS_*`.
const FLAG_RESET: u32 = 1;
const FLAG_PCI: u32 = 2;
/// Registers of NVMe, of BAR 0.
const VERSION: u64 = 0x08;
const CONTROLLER_CONFIG: u64 = 0x14;
const ADMIN_QUEUES: u64 = 0x24;

#[test]
fn a_device_is_described() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    let info = device.info().unwrap();
    eprintln!("{}: {info:?}", nvme.bdf);
    assert_eq!(info.flags & (FLAG_RESET | FLAG_PCI), FLAG_RESET | FLAG_PCI);
    assert!(info.regions >= 9 && info.irqs >= 5);
    for index in 0..info.regions {
        eprintln!("  region {index}: {:x?}", device.region_info(index).unwrap());
    }
    for index in 0..info.irqs {
        eprintln!("  interrupt index {index}: {:?}", device.irq_info(index).unwrap());
    }
    assert!(device.region_info(index::VGA).unwrap().is_none() && device.region_info(1000).unwrap().is_none());
    assert_eq!(device.irq_info(1000).unwrap().count, 0);

    let config = region(&device, index::CONFIG);
    assert_eq!(u64::from(u16::from_le_bytes(read(&device, &config, 0))), sysfs_number(&nvme.bdf, "vendor"));
    assert_eq!(u64::from(u16::from_le_bytes(read(&device, &config, 2))), sysfs_number(&nvme.bdf, "device"));
    let bar = region(&device, index::BAR0);
    assert!(bar.msix_mappable && bar.areas.len() == 1 && bar.areas[0].size == bar.size, "{bar:?}");
}

#[test]
fn registers_are_read_in_both_ways() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    let bar = region(&device, index::BAR0);
    enable(&device);
    let mapped = device.map(bar.offset, bar.size as usize, true).unwrap();
    let version = u32::from_le_bytes(read(&device, &bar, VERSION));
    assert!(version >= 0x1_0000 && version != u32::MAX, "{version:#x}");
    assert_eq!(mapped.load_u32(VERSION).unwrap(), version);
    device.write_at(bar.offset + ADMIN_QUEUES, &0x001f_001fu32.to_le_bytes()).unwrap();
    assert_eq!(mapped.load_u32(ADMIN_QUEUES).unwrap(), 0x001f_001f);

    let beyond = |offset, len| device.read_at(offset, &mut vec![0; len]).unwrap_err();
    for error in [beyond(bar.offset + bar.size, 4), beyond(bar.offset + bar.size - 4, 8), beyond(1 << 50, 4)] {
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    let config = region(&device, index::CONFIG);
    let error = beyond(config.offset + config.size, 1);
    assert!(matches!(&error, Error::Invalid { what } if what.contains("configuration space")), "{error}");
    let error = device.map(config.offset, PAGE as usize, false).unwrap_err();
    assert!(error.to_string().contains("can't be mapped"), "{error}");

    set_command(&device, 0);
    let error = beyond(bar.offset, 4);
    assert!(matches!(&error, Error::Io { what, .. } if what.contains("COMMAND.MEM")), "{error}");
    set_command(&device, 2);
    assert_eq!(mapped.load_u32(VERSION).unwrap(), version);
}

#[test]
fn a_reset_ends_what_the_controller_does() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    let bar = region(&device, index::BAR0);
    enable(&device);
    device.write_at(bar.offset + CONTROLLER_CONFIG, &0x0046_0000u32.to_le_bytes()).unwrap();
    let start = Instant::now();
    device.reset().unwrap();
    eprintln!("reset in {:?}", start.elapsed());
    assert_eq!(read::<4>(&device, &bar, CONTROLLER_CONFIG), [0; 4]);
    // Memory decoding is on again.
    assert_ne!(read::<4>(&device, &bar, VERSION), [0xff; 4]);
}

#[test]
fn a_device_without_a_reset_says_so() {
    let Some(edu) = tested("VFIO_URING_TEST_EDU") else { return };
    let (_container, device) = edu.open();
    assert_eq!(device.info().unwrap().flags & FLAG_RESET, 0);
    let error = device.reset().unwrap_err();
    assert!(matches!(&error, Error::Unsupported { what } if what.contains("hot reset")), "{error}");
    let error = device.hot_reset_info().unwrap_err();
    assert!(matches!(&error, Error::Unsupported { .. }), "{error}");
    // No PCI Express, so no error interrupt; from Linux 7.3 on it is there all the same.
    assert!(device.irq_info(3).unwrap().count <= 1);
}

#[test]
fn a_hot_reset_wants_the_groups_that_it_affects() {
    let Some(nvme) = nvme() else { return };
    let (container, device) = nvme.open();
    let affected = device.hot_reset_info().unwrap();
    eprintln!("a hot reset affects {affected:x?}");
    let here = affected.iter().find(|device| device.to_string() == nvme.bdf).expect("the device itself");
    assert_eq!(here.id, DependentId::Group(nvme.group));

    let error = device.hot_reset(&[]).unwrap_err();
    assert!(error.to_string().contains("by the groups given"), "{error}");
    let error = device.hot_reset(&[device.as_fd()]).unwrap_err();
    assert!(error.to_string().contains("by the groups given"), "{error}");
    let groups = container.groups();
    let fds: Vec<_> = groups.iter().map(|(_, group)| group.as_fd()).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    let start = Instant::now();
    loop {
        match device.hot_reset(&fds) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            result => break result.unwrap(),
        }
    }
    eprintln!("hot reset in {:?}", start.elapsed());
}

#[test]
fn features_are_there_or_not() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    let bar = region(&device, index::BAR0);
    enable(&device);
    for feature in 0..14 {
        let found = [FeatureOp::Get, FeatureOp::Set].map(|op| device.probe(feature, op).unwrap());
        eprintln!("feature {feature}: get {}, set {}", found[0], found[1]);
    }
    assert!(!device.probe(999, FeatureOp::Get).unwrap());
    // The token of a function without virtual ones.
    let error = device.set_vf_token(&"14d63f20-8445-11ea-8900-1f9ce7d5650d".parse().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    if device.probe(3, FeatureOp::Set).unwrap() {
        device.low_power_entry().unwrap();
        let error = device.low_power_entry().unwrap_err();
        assert!(error.to_string().contains("already"), "{error}");
        // A read wakes it.
        assert_ne!(read::<4>(&device, &bar, VERSION), [0xff; 4]);
        device.low_power_exit().unwrap();
    }
    let mapped = device.map(bar.offset, bar.size as usize, false).unwrap();
    assert_ne!(mapped.load_u32(VERSION).unwrap(), u32::MAX);
}
