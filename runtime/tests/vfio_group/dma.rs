//! The DMA of QEMU's edu device (`docs/specs/edu.rst` of QEMU) through what is mapped here.

use std::{
    thread,
    time::{Duration, Instant},
};

use vfio_uring::{dma::Access, transport::vfio::DeviceFd};

use super::{PAGE, enable, memory, tested};

/// Registers of BAR 0, which is the first region.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const DMA: u64 = 0x98;
/// The device's own memory, in its own addresses.
const BUFFER: u64 = 0x4_0000;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;

/// Copies 256 bytes, within the device's time.
fn transfer(device: &DeviceFd, from: u64, to: u64, direction: u64) {
    for (register, value) in [(SOURCE, from), (TARGET, to), (COUNT, 256), (DMA, START | direction)] {
        device.write_at(register, &value.to_le_bytes()).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut state = [0; 8];
        device.read_at(DMA, &mut state).unwrap();
        if u64::from_le_bytes(state) & START == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "the device does not finish");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_device_reaches_what_is_mapped_and_nothing_else() {
    let Some(edu) = tested("VFIO_URING_TEST_EDU") else { return };
    let (container, device) = edu.open();
    enable(&device);
    // Its DMA reaches 28 bits.
    let (source, target) = (0x100_0000, 0x200_0000);
    let mut memory = memory(2);
    let from: *mut u8 = (&raw mut memory[0]).cast();
    // SAFETY: both pages lie in the memory.
    let to = unsafe { from.add(PAGE as usize) };
    let look = |at: *mut u8| {
        // SAFETY: the page lives, and the device is not at work.
        unsafe { at.read_volatile() }
    };
    // SAFETY: as above.
    let put = |at: *mut u8, value| unsafe { at.write_volatile(value) };
    put(from, 0x5a);
    // SAFETY: only `look` and `put` touch the memory as long as it is mapped.
    unsafe { container.map(from, PAGE, source, Access::Read) }.unwrap();
    // SAFETY: as above.
    unsafe { container.map(to, PAGE, target, Access::ReadWrite) }.unwrap();
    transfer(&device, source, BUFFER, 0);
    transfer(&device, BUFFER, target, TO_MEMORY);
    assert_eq!(look(to), 0x5a);

    // What may only be read is not written.
    put(from, 0xa5);
    transfer(&device, BUFFER, source, TO_MEMORY);
    assert_eq!(look(from), 0xa5);

    // Nor is what was unmapped.
    transfer(&device, source, BUFFER, 0);
    assert_eq!(container.unmap(target, PAGE).unwrap(), PAGE);
    transfer(&device, BUFFER, target, TO_MEMORY);
    assert_eq!(look(to), 0x5a);
    // SAFETY: as above.
    unsafe { container.map(to, PAGE, target, Access::ReadWrite) }.unwrap();
    transfer(&device, BUFFER, target, TO_MEMORY);
    assert_eq!(look(to), 0xa5);
}
