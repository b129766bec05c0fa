//! Mapping and unmapping memory, and each way in which the kernel refuses.

use std::{fs, ptr, thread};

use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use vfio_uring::{
    Error,
    device::index,
    dma::{Access, IovaRange, MapRefused},
    transport::group::Container,
};

use super::{MSI, PAGE, Page, enable, memory, nvme, region};

/// Maps memory that lives as long as the test.
fn map(container: &Container, memory: &mut [Page], iova: u64) -> Result<(), Error> {
    // SAFETY: the tests here have no device that does DMA.
    unsafe { container.map(memory.as_mut_ptr().cast(), size_of_val(memory) as u64, iova, Access::ReadWrite) }
}

#[track_caller]
fn refused(result: Result<(), Error>) -> MapRefused {
    match result {
        Err(error @ Error::Map { reason, .. }) => {
            eprintln!("  {error}");
            reason
        }
        other => panic!("{other:?}"),
    }
}

/// Mappings that fit besides those that are there.
fn available(container: &Container) -> u32 {
    container.info().unwrap().dma_available.unwrap()
}

#[test]
fn each_refusal_has_its_reason_and_leaves_nothing() {
    let Some(nvme) = nvme() else { return };
    let (container, _device) = nvme.open();
    let info = container.info().unwrap();
    eprintln!("{info:x?}");
    let before = available(&container);
    assert_eq!((info.granule(), Some(before)), (PAGE, container.max_mappings()));
    let ranges = info.ranges.unwrap();
    let mut memory = memory(4);
    let msi = IovaRange { start: MSI.0, last: MSI.1 };
    assert!(container.reserved(nvme.group).unwrap().contains(&msi));
    let aperture = IovaRange { start: ranges[0].start, last: ranges.last().unwrap().last };

    for (pages, iova) in [(1, MSI.0), (2, MSI.0 - PAGE), (2, MSI.1 + 1 - PAGE)] {
        assert_eq!(refused(map(&container, &mut memory[..pages], iova)), MapRefused::Reserved { region: Some(msi) });
    }
    for iova in [aperture.last - PAGE + 1, aperture.last + 1, 1 << 62, 0u64.wrapping_sub(PAGE)] {
        let reason = refused(map(&container, &mut memory[..2], iova));
        assert_eq!(reason, MapRefused::Aperture { allowed: Some(aperture) });
    }
    assert_eq!(refused(map(&container, &mut memory[..1], PAGE / 2)), MapRefused::Misaligned { granule: PAGE });
    assert_eq!(refused(map(&container, &mut [], PAGE)), MapRefused::Misaligned { granule: PAGE });

    map(&container, &mut memory[..2], 0x10_0000).unwrap();
    for iova in [0x10_0000, 0x10_0000 - PAGE, 0x10_0000 + PAGE] {
        assert_eq!(refused(map(&container, &mut memory[2..4], iova)), MapRefused::Overlap);
    }
    // SAFETY: nothing is mapped there, so that nothing will be.
    let nowhere = unsafe { container.map(ptr::without_provenance_mut(0x1000), PAGE, 0x20_0000, Access::Read) };
    assert_eq!(refused(nowhere), MapRefused::BadAddress);
    assert_eq!(available(&container), before - 1, "no failure left anything");
    assert_eq!(container.unmap(0x10_0000, 2 * PAGE).unwrap(), 2 * PAGE);
    assert_eq!(available(&container), before);
}

#[test]
fn the_edges_of_the_ranges_are_usable() {
    let Some(nvme) = nvme() else { return };
    let container = nvme.container();
    let mut memory = memory(1);
    for range in container.info().unwrap().ranges.unwrap() {
        for iova in [range.start, range.last - PAGE + 1] {
            map(&container, &mut memory, iova).unwrap();
            assert_eq!(container.unmap(iova, PAGE).unwrap(), PAGE);
        }
    }
}

#[test]
fn a_part_is_not_unmapped() {
    let Some(nvme) = nvme() else { return };
    let container = nvme.container();
    let mut memory = memory(4);
    let (a, b) = memory.split_at_mut(2);
    let text = |iova, pages| container.unmap(iova, pages * PAGE).unwrap_err().to_string();
    map(&container, a, 0x10_0000).unwrap();
    for (iova, pages) in [(0x10_0000, 1), (0x10_1000, 1), (0x10_1000, 2), (0x10_0000, 0)] {
        assert!(text(iova, pages).contains("Nothing was unmapped"));
    }
    assert_eq!(refused(map(&container, b, 0x10_0000)), MapRefused::Overlap);

    // All or nothing, also of two.
    map(&container, b, 0x10_2000).unwrap();
    assert!(text(0x10_0000, 3).contains("Nothing was unmapped"));
    assert_eq!(container.unmap(0x10_0000, 4 * PAGE).unwrap(), 4 * PAGE);
    assert!(text(0x10_0000, 4).contains("nothing is mapped"));

    // With a hole between them the kernel confirms less than was asked for.
    map(&container, a, 0x10_0000).unwrap();
    map(&container, b, 0x10_3000).unwrap();
    assert!(text(0x10_0000, 5).contains("only 0x4000 bytes"));
    assert!(text(0x10_0000, 5).contains("nothing is mapped"));
}

#[test]
fn a_bar_is_mapped_for_others() {
    let Some(nvme) = nvme() else { return };
    let (container, device) = nvme.open();
    let bar = region(&device, index::BAR0);
    let (len, protection) = (bar.size as usize, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: a new mapping, of which nothing else knows.
    let at = unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, &device, bar.offset) }.unwrap();
    enable(&device);
    // SAFETY: no other device does DMA here.
    unsafe { container.map(at.cast(), bar.size, 0x10_0000, Access::ReadWrite) }.unwrap();
    assert_eq!(container.unmap(0x10_0000, bar.size).unwrap(), bar.size);
    // SAFETY: mapped above, and not used any more.
    unsafe { munmap(at, len) }.unwrap();
}

/// Sets a parameter of the kernel's type 1 for as long as it lives.
struct Limit(String);

impl Limit {
    const PATH: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

    fn set(limit: u32) -> Self {
        let before = fs::read_to_string(Self::PATH).unwrap();
        fs::write(Self::PATH, limit.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        fs::write(Self::PATH, self.0.trim()).unwrap();
    }
}

#[test]
fn the_limit_of_mappings_is_named() {
    let Some(nvme) = nvme() else { return };
    let max = 16;
    let _limit = Limit::set(max);
    let container = nvme.container();
    assert_eq!((available(&container), container.max_mappings()), (max, Some(max)));
    let mut memory = memory(1);
    for n in 1..=u64::from(max) {
        map(&container, &mut memory, n * PAGE).unwrap();
    }
    let free = u64::from(max + 1) * PAGE;
    assert_eq!(refused(map(&container, &mut memory, free)), MapRefused::Limit { max: Some(max) });
    // The kernel tells of an overlap first, and of the limit before it tells of a bad address.
    assert_eq!(refused(map(&container, &mut memory, PAGE)), MapRefused::Overlap);
    assert_eq!(refused(map(&container, &mut memory, MSI.0)), MapRefused::Limit { max: Some(max) });
    container.unmap(PAGE, PAGE).unwrap();
    map(&container, &mut memory, free).unwrap();
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
    let Some(nvme) = nvme() else { return };
    let container = nvme.container();
    let before = available(&container);
    let (limit, needed) = (64 << 10, 128 << 10);
    let mut memory = memory(needed / PAGE);
    with_memlock(limit, || {
        assert_eq!(refused(map(&container, &mut memory, 0x10_0000)), MapRefused::Memlock { limit, needed });
        assert_eq!(available(&container), before);
        // What fits is mapped, and is given back.
        for _ in 0..3 {
            map(&container, &mut memory[..16], 0x10_0000).unwrap();
            assert_eq!(container.unmap(0x10_0000, 16 * PAGE).unwrap(), 16 * PAGE);
        }
    });
    // With the capability the limit does not hold.
    map(&container, &mut memory, 0x10_0000).unwrap();
}
