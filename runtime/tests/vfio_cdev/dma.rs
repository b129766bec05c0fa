//! The DMA of QEMU's edu device (`docs/specs/edu.rst` of QEMU) through what is mapped here.

use std::{
    thread,
    time::{Duration, Instant},
};

use rustix::io;
use vfio_uring::{
    dma::{HugePages, SharedMemory},
    transport::{iommufd::Access, vfio::DeviceFd},
};

use super::{PAGE, devices_of, memory};

/// Region 7 of vfio-pci.
const CONFIG: u64 = 7 << 40;
/// COMMAND, with memory and bus master on.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;
/// Registers of BAR 0.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const DMA: u64 = 0x98;
/// The device's own memory, in its own addresses.
const BUFFER: u64 = 0x4_0000;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;

fn set(device: &DeviceFd, register: u64, value: u64) {
    assert_eq!(io::pwrite(device, &value.to_le_bytes(), register), Ok(8));
}

/// Copies `len` bytes, within the device's time.
fn transfer(device: &DeviceFd, from: u64, to: u64, len: u64, direction: u64) {
    set(device, SOURCE, from);
    set(device, TARGET, to);
    set(device, COUNT, len);
    set(device, DMA, START | direction);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut state = [0; 8];
        assert_eq!(io::pread(device, &mut state, DMA), Ok(8));
        if u64::from_le_bytes(state) & START == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "the device does not finish");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_device_reaches_what_is_mapped_and_nothing_else() {
    let Some(devices) = devices_of("VFIO_URING_TEST_EDU") else { return };
    let (bound, ioas) = devices.attached();
    let device = bound.device();
    assert_eq!(io::pwrite(device, &MEMORY_AND_MASTER.to_le_bytes(), CONFIG + COMMAND), Ok(2));

    // Its DMA reaches 28 bits.
    let (source, target) = (0x100_0000, 0x200_0000);
    let (fd, from) = SharedMemory::create("test", PAGE as usize, HugePages::No).unwrap();
    from.fill(0, PAGE as usize, 0x5a).unwrap();
    ioas.map_file(&fd, 0, PAGE, source, Access::Read).unwrap();
    let mut to = memory(1);
    let at: *mut u8 = (&raw mut to[0]).cast();
    let look = || {
        // SAFETY: the page lives, and the device is not at work.
        unsafe { at.read_volatile() }
    };
    // SAFETY: only `look` reads the memory as long as it is mapped.
    unsafe { ioas.map(at, PAGE, target, Access::ReadWrite) }.unwrap();
    transfer(device, source, BUFFER, 256, 0);
    transfer(device, BUFFER, target, 256, TO_MEMORY);
    assert_eq!(look(), 0x5a);

    // What may only be read is not written.
    from.fill(0, PAGE as usize, 0xa5).unwrap();
    transfer(device, BUFFER, source, 256, TO_MEMORY);
    let mut got = [0; 1];
    from.read(0, &mut got).unwrap();
    assert_eq!(got, [0xa5]);

    // Nor is what was unmapped, or belongs to a device that was detached.
    transfer(device, source, BUFFER, 256, 0);
    ioas.unmap(target, PAGE).unwrap();
    transfer(device, BUFFER, target, 256, TO_MEMORY);
    assert_eq!(look(), 0x5a);
    // SAFETY: as above.
    unsafe { ioas.map(at, PAGE, target, Access::ReadWrite) }.unwrap();
    bound.detach().unwrap();
    transfer(device, BUFFER, target, 256, TO_MEMORY);
    assert_eq!(look(), 0x5a);
    bound.attach(&ioas).unwrap();
    transfer(device, BUFFER, target, 256, TO_MEMORY);
    assert_eq!(look(), 0xa5);
}
