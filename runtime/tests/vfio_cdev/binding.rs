//! Opening, binding, closing.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    ptr,
};

use rustix::{
    io::{self, Errno},
    mm,
};
use vfio_uring::{
    Error,
    transport::{
        cdev::Unbound,
        iommufd::{Ioas, IommuKind, IommufdFd},
    },
};

use super::{PAGE, devices};

/// A request with an argument of 64 bytes whose first word is `argsz`.
fn raw(fd: impl AsFd, request: u32, argsz: u32) -> Result<i32, Errno> {
    let mut argument = [0u32; 16];
    argument[0] = argsz;
    // SAFETY: no request that is issued here touches more than the 64 bytes.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), argument.as_mut_ptr()) } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
        result => Ok(result),
    }
}

fn map_bar0(fd: impl AsFd) -> Result<*mut libc::c_void, Errno> {
    let prot = mm::ProtFlags::READ;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    unsafe { mm::mmap(ptr::null_mut(), PAGE as usize, prot, mm::MapFlags::SHARED, fd, 0) }
}

#[test]
fn before_bind_the_kernel_refuses_everything() {
    let Some(devices) = devices() else { return };
    let device = devices.open();
    let requests = [
        ("GET_INFO", 0x3b6b, 24),
        ("GET_REGION_INFO", 0x3b6c, 32),
        ("GET_IRQ_INFO", 0x3b6d, 16),
        ("SET_IRQS", 0x3b6e, 20),
        ("RESET", 0x3b6f, 0),
        ("FEATURE", 0x3b75, 8),
        ("ATTACH", 0x3b77, 12),
        ("DETACH", 0x3b78, 8),
    ];
    for (name, request, argsz) in requests {
        assert_eq!(raw(&device, request, argsz), Err(Errno::INVAL), "{name}");
    }
    assert_eq!(io::pread(&device, &mut [0u8; 4], 7 << 40), Err(Errno::INVAL));
    assert_eq!(io::pwrite(&device, &[0u8; 4], 7 << 40), Err(Errno::INVAL));
    assert_eq!(map_bar0(&device), Err(Errno::INVAL));

    // And afterwards not.
    let device = device.bind(&IommufdFd::open().unwrap(), None).unwrap();
    assert_eq!(raw(device.device(), 0x3b6b, 24), Ok(0));
    let mut ids = [0u8; 4];
    assert_eq!(io::pread(device.device(), &mut ids, 7 << 40), Ok(4));
    assert_ne!(ids, [0xff; 4]);
}

#[test]
fn one_binds_and_the_other_gets_its_device_back() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    let first = devices.bind(&context);
    assert_eq!(raw(first.device(), 0x3b76, 16), Err(Errno::INVAL), "it is bound already");
    let failed = devices.open().bind(&context, None).unwrap_err();
    assert!(matches!(failed.error, Error::InUse { .. }), "{failed}");
    let other_context = IommufdFd::open().unwrap();
    let failed = failed.device.bind(&other_context, None).unwrap_err();
    assert!(matches!(failed.error, Error::InUse { .. }), "{failed}");
    drop(first);
    let second = failed.device.bind(&other_context, None).unwrap();
    assert_ne!(second.device_id(), 0);
    assert!(second.name().contains(&devices.bdf));
}

#[test]
fn a_token_that_is_not_needed() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    let token = "14d63f20-8445-11ea-8900-1f9ce7d5650d".parse().unwrap();
    let failed = devices.open().bind(&context, Some(token)).unwrap_err();
    assert!(matches!(failed.error, Error::NotReady { .. }), "{failed}");
    failed.device.bind(&context, None).unwrap();
}

#[test]
fn the_group_and_the_cdev_exclude_each_other() {
    let Some(devices) = devices() else { return };
    let link = fs::read_link(format!("/sys/bus/pci/devices/{}/iommu_group", devices.bdf)).unwrap();
    let node = Path::new("/dev/vfio").join(link.file_name().unwrap());
    let group = File::options().read(true).write(true).open(&node).unwrap();
    let context = IommufdFd::open().unwrap();
    let failed = devices.open().bind(&context, None).unwrap_err();
    assert!(matches!(&failed.error, Error::InUse { what } if what.contains("group")), "{failed}");
    drop(group);
    let _device = failed.device.bind(&context, None).unwrap();
    assert!(File::options().read(true).write(true).open(&node).is_err());
}

#[test]
fn a_mapped_bar_keeps_the_device_bound() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    let device = devices.bind(&context);
    let bar = map_bar0(device.device()).unwrap();
    drop(device);
    let failed = devices.open().bind(&context, None).unwrap_err();
    assert!(matches!(&failed.error, Error::InUse { what } if what.contains("mapping of a BAR")), "{failed}");
    // SAFETY: mapped above, and nothing points there.
    unsafe { mm::munmap(bar, PAGE as usize) }.unwrap();
    failed.device.bind(&context, None).unwrap();
}

#[test]
fn the_context_may_be_closed_early() {
    let Some(devices) = devices() else { return };
    let (device, ioas) = devices.attached();
    assert!(device.context().maps_files(), "the guest's kernel is new enough");
    let info = device.context().hw_info(device.device_id()).unwrap();
    assert_eq!(info.kind, IommuKind::IntelVtd);
    assert!(matches!(device.context().hw_info(ioas.id()), Err(Error::Invalid { .. })));
    drop(device);
    drop(ioas);
    devices.attached();
}

#[test]
fn what_is_no_device_is_not_bound() {
    let Some(_devices) = devices() else { return };
    let failed = Unbound::open("/dev/null").unwrap().bind(&IommufdFd::open().unwrap(), None).unwrap_err();
    assert!(matches!(failed.error, Error::Invalid { .. }), "{failed}");
    assert!(Unbound::find("0000:00:1f.7").unwrap_err().to_string().contains("no PCI device"));
    let not_bound = Unbound::find("0000:00:00.0").unwrap_err().to_string();
    assert!(not_bound.contains("vfio-uring bind 0000:00:00.0"), "{not_bound}");
    let context = IommufdFd::open().unwrap();
    let ioas = Ioas::alloc(&context).unwrap();
    ioas.destroy().unwrap();
}
