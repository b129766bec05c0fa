//! Mapping and unmapping memory, and each way in which the kernel refuses.

use std::{fs::File, ptr, thread};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use vfio_uring::{
    Error,
    dma::{HugePages, IovaRange, MapRefused, SharedMemory},
    transport::iommufd::{Access, Ioas},
};

use super::{MSI, PAGE, Page, devices, memory};

/// Maps memory that lives as long as the test.
fn map(ioas: &Ioas, memory: &mut [Page], iova: u64) -> Result<(), Error> {
    // SAFETY: the tests here have no device that does DMA.
    unsafe { ioas.map(memory.as_mut_ptr().cast(), size_of_val(memory) as u64, iova, Access::ReadWrite) }
}

#[track_caller]
fn refused(result: Result<(), Error>) -> MapRefused {
    match result {
        Err(Error::Map { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_refusal_has_its_reason_and_leaves_nothing() {
    let Some(devices) = devices() else { return };
    let (_device, ioas) = devices.attached();
    let mut memory = memory(4);
    let msi = Some(IovaRange { start: MSI.0, last: MSI.1 });
    let ranges = ioas.iova_ranges().unwrap().ranges;
    let aperture = IovaRange { start: ranges[0].start, last: ranges.last().unwrap().last };

    assert_eq!(refused(map(&ioas, &mut memory[..1], MSI.0)), MapRefused::Reserved { region: msi });
    assert_eq!(refused(map(&ioas, &mut memory[..2], MSI.0 - PAGE)), MapRefused::Reserved { region: msi });
    assert_eq!(refused(map(&ioas, &mut memory[..2], MSI.1 + 1 - PAGE)), MapRefused::Reserved { region: msi });
    for iova in [aperture.last - PAGE + 1, aperture.last + 1, 1 << 62] {
        assert_eq!(refused(map(&ioas, &mut memory[..2], iova)), MapRefused::Aperture { allowed: Some(aperture) });
    }
    assert_eq!(refused(map(&ioas, &mut memory[..1], PAGE / 2)), MapRefused::Misaligned { granule: PAGE });

    map(&ioas, &mut memory[..2], 0x10_0000).unwrap();
    for iova in [0x10_0000, 0x10_0000 - PAGE, 0x10_0000 + PAGE] {
        assert_eq!(refused(map(&ioas, &mut memory[2..4], iova)), MapRefused::Overlap);
    }
    // SAFETY: nothing is mapped there, so that nothing will be.
    let nowhere = unsafe { ioas.map(ptr::without_provenance_mut(0x1000), PAGE, 0x20_0000, Access::Read) };
    assert_eq!(refused(nowhere), MapRefused::BadAddress);
    assert_eq!(ioas.unmap_all().unwrap(), 2 * PAGE, "no failure left anything");
}

#[test]
fn the_edges_of_the_ranges_are_usable() {
    let Some(devices) = devices() else { return };
    let (_device, ioas) = devices.attached();
    let mut memory = memory(1);
    for range in ioas.iova_ranges().unwrap().ranges {
        for iova in [range.start, range.last - PAGE + 1] {
            map(&ioas, &mut memory, iova).unwrap();
            assert_eq!(ioas.unmap(iova, PAGE).unwrap(), PAGE);
        }
    }
}

#[test]
fn a_part_is_not_unmapped() {
    let Some(devices) = devices() else { return };
    let (_device, ioas) = devices.attached();
    let mut memory = memory(4);
    let (a, b) = memory.split_at_mut(2);
    map(&ioas, a, 0x10_0000).unwrap();
    for (iova, pages) in [(0x10_0000, 1), (0x10_1000, 1), (0x10_1000, 2)] {
        let error = ioas.unmap(iova, pages * PAGE).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what } if what.contains("cuts a mapping")), "{error}");
    }
    // Nothing is lost: it is there, and goes as a whole.
    assert_eq!(refused(map(&ioas, b, 0x10_0000)), MapRefused::Overlap);
    assert_eq!(ioas.unmap(0x10_0000, 2 * PAGE).unwrap(), 2 * PAGE);
    assert!(ioas.unmap(0x10_0000, 2 * PAGE).is_err(), "nothing is there any more");

    // Two at once; and two with a hole between them, of which the kernel confirms less than was asked for.
    map(&ioas, a, 0x10_0000).unwrap();
    map(&ioas, b, 0x10_2000).unwrap();
    assert_eq!(ioas.unmap(0x10_0000, 4 * PAGE).unwrap(), 4 * PAGE);
    map(&ioas, a, 0x10_0000).unwrap();
    map(&ioas, b, 0x10_3000).unwrap();
    let error = ioas.unmap(0x10_0000, 5 * PAGE).unwrap_err().to_string();
    assert!(error.contains("confirms 0x4000"), "{error}");

    // The kernel removes one after the other: the first is gone when the second is found to stick out.
    map(&ioas, a, 0x10_0000).unwrap();
    map(&ioas, b, 0x10_2000).unwrap();
    assert!(ioas.unmap(0x10_0000, 3 * PAGE).is_err());
    assert!(ioas.unmap(0x10_0000, 2 * PAGE).is_err());
    assert_eq!(ioas.unmap(0x10_2000, 2 * PAGE).unwrap(), 2 * PAGE);
    assert_eq!(ioas.unmap_all().unwrap(), 0);
}

#[test]
fn the_kernel_chooses_an_address() {
    let Some(devices) = devices() else { return };
    let (_device, ioas) = devices.attached();
    let window = IovaRange { start: 0x100_0000, last: 0x100_1fff };
    ioas.allow_iovas(&[window]).unwrap();
    let mut memory = memory(3);
    // SAFETY: no device does DMA here.
    let mut anywhere = |page: usize| unsafe { ioas.map_anywhere((&raw mut memory[page]).cast(), PAGE, Access::Read) };
    let mut got = [anywhere(0).unwrap(), anywhere(1).unwrap()];
    got.sort_unstable();
    assert_eq!(got, [window.start, window.start + PAGE]);
    let error = anywhere(2).unwrap_err();
    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
    ioas.allow_iovas(&[]).unwrap();
    assert_ne!(anywhere(2).unwrap(), 0);
}

#[test]
fn files_are_mapped() {
    let Some(devices) = devices() else { return };
    let (device, ioas) = devices.attached();
    let (fd, memory) = SharedMemory::create("test", 4 * PAGE as usize, HugePages::No).unwrap();
    ioas.map_file(&fd, PAGE, 2 * PAGE, 0x10_0000, Access::ReadWrite).unwrap();
    assert_eq!(refused(ioas.map_file(&fd, 0, PAGE, 0x10_0000, Access::Read)), MapRefused::Overlap);
    let reserved = refused(ioas.map_file(&fd, 0, PAGE, MSI.0, Access::Read));
    assert_eq!(reserved, MapRefused::Reserved { region: Some(IovaRange { start: MSI.0, last: MSI.1 }) });
    for (start, len) in [(0, 5 * PAGE), (4 * PAGE, PAGE), (1 << 62, PAGE)] {
        let error = ioas.map_file(&fd, start, len, 0x20_0000, Access::Read).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what } if what.contains("ends at 0x4000")), "{error}");
    }
    // An attribute of sysfs is a regular file that says it has a page; and one that says nothing of its size.
    for other in ["/sys/kernel/uevent_seqnum", "/dev/zero"] {
        let error = ioas.map_file(File::open(other).unwrap(), 0, PAGE, 0x20_0000, Access::Read).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    // The space holds the file.
    drop((fd, memory));
    device.detach().unwrap();
    device.attach(&ioas).unwrap();
    assert_eq!(ioas.unmap_all().unwrap(), 2 * PAGE);
}

#[test]
fn mappings_are_copied() {
    let Some(devices) = devices() else { return };
    let (device, ioas) = devices.attached();
    let mut memory = memory(2);
    map(&ioas, &mut memory, 0x10_0000).unwrap();
    let other = Ioas::alloc(device.context()).unwrap();
    // SAFETY: no device does DMA here.
    let copy = |source, pages, iova| unsafe { other.copy(&ioas, source, pages * PAGE, iova, Access::ReadWrite) };
    copy(0x10_0000, 2, 0x30_0000).unwrap();
    assert_eq!(refused(copy(0x10_0000, 2, 0x30_0000)), MapRefused::Overlap);
    assert!(matches!(copy(0x10_0000, 3, 0x40_0000), Err(Error::Invalid { .. })));
    ioas.unmap(0x10_0000, 2 * PAGE).unwrap();
    device.attach(&other).unwrap();
    assert_eq!(other.unmap(0x30_0000, 2 * PAGE).unwrap(), 2 * PAGE);
    drop(device);
    let (device, _) = devices.attached();
    let error = device.attach(&other).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("another context")), "{error}");
}

/// As an ordinary user has it: without CAP_IPC_LOCK, and with a limit.
fn with_memlock<T: Send>(limit: u64, body: impl FnOnce() -> T + Send) -> T {
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), maximum: before.maximum }).unwrap();
    // Capabilities are a thread's own.
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::IPC_LOCK);
            set_capabilities(None, sets).unwrap();
            body()
        });
        thread.join()
    });
    setrlimit(Resource::Memlock, before).unwrap();
    result.unwrap()
}

#[test]
fn the_limit_of_locked_memory_is_named() {
    let Some(devices) = devices() else { return };
    let (device, ioas) = devices.attached();
    let (limit, needed) = (64 << 10, 128 << 10);
    let mut memory = memory(needed / PAGE);
    with_memlock(limit, || {
        assert_eq!(refused(map(&ioas, &mut memory, 0x10_0000)), MapRefused::Memlock { limit, needed });
        assert_eq!(ioas.unmap_all().unwrap(), 0);
        // What fits is mapped.
        map(&ioas, &mut memory[..8], 0x10_0000).unwrap();
        assert_eq!(ioas.unmap_all().unwrap(), 8 * PAGE);
        // Without a device nothing is pinned; attaching pins it all.
        device.detach().unwrap();
        map(&ioas, &mut memory, 0x10_0000).unwrap();
        let error = device.attach(&ioas).unwrap_err();
        assert!(matches!(&error, Error::Exhausted { what } if what.contains("RLIMIT_MEMLOCK")), "{error}");
        assert_eq!(ioas.unmap_all().unwrap(), needed);
        device.attach(&ioas).unwrap();
    });
    // With the capability the limit does not hold.
    map(&ioas, &mut memory, 0x10_0000).unwrap();
}
