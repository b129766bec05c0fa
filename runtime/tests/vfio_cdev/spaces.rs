//! Address spaces and page tables: their ranges, what is attached to them, and what keeps them.

use vfio_uring::{
    Error,
    dma::{IovaRange, overlaps},
    transport::{
        cdev::Pasid,
        iommufd::{Access, Hwpt, HwptFlags, Ioas, IommufdFd, Memlock},
    },
};

use super::{MSI, PAGE, devices, memory};

const ALL: IovaRange = IovaRange { start: 0, last: u64::MAX };

#[test]
fn attaching_narrows_the_ranges_and_detaching_widens_them() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    let ioas = Ioas::alloc(&context).unwrap();
    let before = ioas.iova_ranges().unwrap();
    assert_eq!(before.ranges, [ALL]);
    let device = devices.bind(&context);
    assert_eq!(ioas.iova_ranges().unwrap(), before, "binding changes nothing");
    let table = device.attach(&ioas).unwrap();
    assert!(table != 0 && table != ioas.id());
    let attached = ioas.iova_ranges().unwrap();
    assert_eq!(attached.alignment, PAGE);
    assert_eq!(attached.ranges[0], IovaRange { start: 0, last: MSI.0 - 1 });
    assert_eq!(attached.ranges[1].start, MSI.1 + 1);
    assert!(attached.ranges[1].last < u64::MAX);
    device.detach().unwrap();
    device.detach().unwrap();
    assert_eq!(ioas.iova_ranges().unwrap().ranges, [ALL]);
}

#[test]
fn what_is_mapped_or_promised_keeps_a_device_out() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    let device = devices.bind(&context);
    let ioas = Ioas::alloc(&context).unwrap();
    let attach = || match device.attach(&ioas) {
        Err(Error::Conflict { device, mapping: None, reserved: None }) => assert!(device.contains(&devices.bdf)),
        other => panic!("{other:?}"),
    };
    // A promise.
    ioas.allow_iovas(&[IovaRange { start: 0, last: 0xffff_ffff }]).unwrap();
    attach();
    ioas.allow_iovas(&[IovaRange { start: 0, last: MSI.0 - 1 }]).unwrap();
    device.attach(&ioas).unwrap();
    let error = ioas.allow_iovas(&[IovaRange { start: 0, last: MSI.0 }]).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("0xfee00000")), "{error}");
    device.detach().unwrap();
    // A mapping.
    ioas.allow_iovas(&[]).unwrap();
    let mut memory = memory(1);
    // SAFETY: no device does DMA here.
    unsafe { ioas.map((&raw mut memory[0]).cast(), PAGE, MSI.0, Access::Read) }.unwrap();
    attach();
    let (mapping, msi) = (IovaRange { start: MSI.0, last: MSI.0 + PAGE - 1 }, IovaRange { start: MSI.0, last: MSI.1 });
    assert_eq!(device.reserved(), [msi]);
    assert_eq!(overlaps([mapping].into_iter(), device.reserved()), Some((mapping, msi)));
    ioas.unmap(MSI.0, PAGE).unwrap();
    device.attach(&ioas).unwrap();

    for bad in [[(5, 5), (10, 20)], [(5, 1), (10, 20)], [(5, 12), (10, 20)]] {
        let bad = bad.map(|(start, last)| IovaRange { start, last });
        assert!(matches!(ioas.allow_iovas(&bad), Err(Error::Invalid { .. })));
    }
}

#[test]
fn a_device_is_switched_over() {
    let Some(devices) = devices() else { return };
    let (device, first) = devices.attached();
    let second = Ioas::alloc(device.context()).unwrap();
    let failed = first.destroy().unwrap_err();
    assert!(failed.error.to_string().contains("detach"), "{failed}");
    let first = failed.object;
    device.attach(&second).unwrap();
    assert_eq!(first.iova_ranges().unwrap().ranges, [ALL]);
    assert_ne!(second.iova_ranges().unwrap().ranges, [ALL]);
    first.destroy().unwrap();
    // A switch that fails leaves the device where it was.
    let third = Ioas::alloc(device.context()).unwrap();
    third.allow_iovas(&[ALL]).unwrap();
    assert!(matches!(device.attach(&third), Err(Error::Conflict { .. })));
    assert_ne!(second.iova_ranges().unwrap().ranges, [ALL]);
    third.destroy().unwrap();
}

#[test]
fn page_tables_of_our_own() {
    let Some(devices) = devices() else { return };
    let (device, ioas) = devices.attached();
    device.detach().unwrap();
    let table = Hwpt::alloc(device.device_id(), &ioas, HwptFlags::empty(), None).unwrap();
    device.attach_hwpt(&table).unwrap();
    let failed = table.destroy().unwrap_err();
    assert!(failed.error.to_string().contains("detach"), "{failed}");
    let table = failed.object;
    let pasid = device.attach_pasid(Pasid::new(1).unwrap(), &table).unwrap_err();
    assert!(matches!(pasid, Error::Invalid { .. } | Error::Unsupported { .. }), "{pasid}");
    device.detach().unwrap();
    table.destroy().unwrap();
    for (device_id, fault) in [(ioas.id(), None), (device.device_id(), Some(u32::MAX))] {
        let error = Hwpt::alloc(device_id, &ioas, HwptFlags::empty(), fault).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. } | Error::Unsupported { .. }), "{error}");
    }
    ioas.destroy().unwrap();
}

#[test]
fn options() {
    let Some(devices) = devices() else { return };
    let context = IommufdFd::open().unwrap();
    assert_eq!(context.memlock().unwrap(), Memlock::User);
    context.set_memlock(Memlock::Process).unwrap();
    assert_eq!(context.memlock().unwrap(), Memlock::Process);
    let ioas = Ioas::alloc(&context).unwrap();
    let error = context.set_memlock(Memlock::User).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(ioas.huge_pages().unwrap());
    ioas.set_huge_pages(false).unwrap();
    assert!(!ioas.huge_pages().unwrap());
    let device = devices.bind(&context);
    device.attach(&ioas).unwrap();
    let mut memory = memory(1);
    // SAFETY: no device does DMA here.
    unsafe { ioas.map((&raw mut memory[0]).cast(), PAGE, PAGE, Access::Read) }.unwrap();
    ioas.set_huge_pages(true).unwrap();
    let error = ioas.set_huge_pages(false).unwrap_err();
    assert!(error.to_string().contains("before memory is mapped"), "{error}");
}

#[test]
fn two_devices_share_a_space() {
    let Some(devices) = devices() else { return };
    let Ok(other) = std::env::var("VFIO_URING_TEST_BDF2") else { return };
    let (device, ioas) = devices.attached();
    let other = vfio_uring::transport::cdev::Unbound::find(&other).unwrap().bind(device.context(), None).unwrap();
    let narrowed = ioas.iova_ranges().unwrap();
    other.attach(&ioas).unwrap();
    let mut memory = memory(1);
    // SAFETY: no device does DMA here.
    unsafe { ioas.map((&raw mut memory[0]).cast(), PAGE, PAGE, Access::ReadWrite) }.unwrap();
    drop(device);
    assert_eq!(ioas.iova_ranges().unwrap(), narrowed, "the other one still has the same regions");
    assert!(ioas.clone().destroy().is_err(), "another handle is left");
    assert_eq!(ioas.unmap(PAGE, PAGE).unwrap(), PAGE);
    drop(other);
    ioas.destroy().unwrap();
}
