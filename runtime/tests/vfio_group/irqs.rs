//! Interrupts: eventfds of any number bound to vectors, in any order, and taken back.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::event::{EventfdFlags, eventfd};
use vfio_uring::{Error, device::Irq, transport::vfio::DeviceFd};

use super::{enable, nvme, tested};

const INTX: u32 = Irq::Intx as u32;
const MSI: u32 = Irq::Msi as u32;
const MSI_X: u32 = Irq::MsiX as u32;
const ERROR: u32 = Irq::Error as u32;
const REQUEST: u32 = Irq::Request as u32;

fn events(count: u32) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()).collect()
}

fn borrowed(fds: &[OwnedFd]) -> Vec<Option<BorrowedFd<'_>>> {
    fds.iter().map(|fd| Some(fd.as_fd())).collect()
}

/// How often each was signalled since it was looked at.
fn counts(fds: &[OwnedFd]) -> Vec<u64> {
    let count = |fd| {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    fds.iter().map(count).collect()
}

#[track_caller]
fn refused(result: Result<(), Error>, part: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

fn bind(device: &DeviceFd, index: u32, start: u32, fds: &[OwnedFd]) {
    device.set_irqs_eventfds(index, start, &borrowed(fds)).unwrap();
}

#[test]
fn msi_x_with_large_descriptors() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    enable(&device);
    let info = device.irq_info(MSI_X).unwrap();
    eprintln!("MSI-X: {info:?}");
    assert!(info.count > 1);
    let files: Vec<_> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
    let fds = events(info.count);
    assert!(fds[0].as_raw_fd() > 256, "{files:?}");

    bind(&device, MSI_X, 0, &fds);
    device.trigger(MSI_X, 0, info.count).unwrap();
    assert_eq!(counts(&fds), vec![1; info.count as usize]);
    device.trigger(MSI_X, 1, 1).unwrap();
    device.trigger(MSI_X, 1, 1).unwrap();
    assert_eq!((counts(&fds)[..2]).to_vec(), [0, 2]);

    // One is released, one is bound to another.
    device.set_irqs_eventfds(MSI_X, 0, &[None]).unwrap();
    let other = events(1);
    bind(&device, MSI_X, 1, &other);
    device.trigger(MSI_X, 0, 2).unwrap();
    assert_eq!((counts(&fds)[..2].to_vec(), counts(&other)), (vec![0, 0], vec![1]));

    // Other kinds wait until this one is disabled.
    refused(device.set_irqs_eventfds(INTX, 0, &borrowed(&other)), "disable that first");
    refused(device.set_irqs_eventfds(MSI_X, info.count, &borrowed(&other)), "no such vectors");
    refused(device.mask(MSI_X, 0, 1), "only INTx");
    device.disable_irqs(MSI_X).unwrap();
    refused(device.disable_irqs(MSI_X), "not enabled");
    refused(device.trigger(MSI_X, 0, 1), "not enabled");
    assert_eq!(counts(&fds), vec![0; info.count as usize]);
}

#[test]
fn vectors_are_added_where_that_can_be_done() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    enable(&device);
    let fds = events(3);
    bind(&device, MSI_X, 0, &fds[..1]);
    let more = device.set_irqs_eventfds(MSI_X, 1, &borrowed(&fds[1..]));
    assert_eq!(more.is_ok(), device.irq_info(MSI_X).unwrap().is_resizable(), "{more:?}");
    if more.is_err() {
        device.disable_irqs(MSI_X).unwrap();
        bind(&device, MSI_X, 0, &fds);
    }
    device.trigger(MSI_X, 0, 3).unwrap();
    assert_eq!(counts(&fds), [1, 1, 1]);
}

#[test]
fn msi() {
    let Some(edu) = tested("VFIO_URING_TEST_EDU") else { return };
    let (_container, device) = edu.open();
    enable(&device);
    let info = device.irq_info(MSI).unwrap();
    assert_eq!((info.count, info.is_resizable()), (1, false));
    let fds = events(2);
    refused(device.set_irqs_eventfds(MSI, 0, &borrowed(&fds)), "no such vectors");
    bind(&device, MSI, 0, &fds[..1]);
    device.trigger(MSI, 0, 1).unwrap();
    assert_eq!(counts(&fds), [1, 0]);
    device.disable_irqs(MSI).unwrap();
}

#[test]
fn intx_is_masked_and_unmasked() {
    let Some(edu) = tested("VFIO_URING_TEST_EDU") else { return };
    let (_container, device) = edu.open();
    enable(&device);
    if device.irq_info(INTX).unwrap().count == 0 {
        eprintln!("skipped: no INTx");
        return;
    }
    /// Registers of edu: the value written to the first is what is raised, that written to the second is taken back.
    const RAISE: u64 = 0x60;
    const ACKNOWLEDGE: u64 = 0x64;
    let set = |register, value: u32| device.write_at(register, &value.to_le_bytes()).unwrap();
    let fds = events(3);
    bind(&device, INTX, 0, &fds[..1]);
    set(RAISE, 1);
    assert_eq!(wait(&fds[0]), 1);
    // It is masked, and still asserted: unmasked it fires at once.
    assert_eq!(counts(&fds[..1]), [0]);
    device.unmask(INTX, 0, 1).unwrap();
    assert_eq!(wait(&fds[0]), 1);
    set(ACKNOWLEDGE, 1);
    device.unmask(INTX, 0, 1).unwrap();
    device.mask(INTX, 0, 1).unwrap();
    set(RAISE, 1);
    assert_eq!(counts(&fds[..1]), [0]);

    // An eventfd that unmasks.
    device.unmask_eventfd(INTX, Some(fds[1].as_fd())).unwrap();
    refused(device.unmask_eventfd(INTX, Some(fds[2].as_fd())), "bound already");
    rustix::io::write(&fds[1], &1u64.to_ne_bytes()).unwrap();
    assert_eq!(wait(&fds[0]), 1);
    set(ACKNOWLEDGE, 1);
    device.unmask_eventfd(INTX, None).unwrap();
    refused(device.set_irqs_eventfds(MSI, 0, &borrowed(&fds[..1])), "disable that first");
    device.disable_irqs(INTX).unwrap();
}

#[test]
fn events_of_the_device() {
    let Some(nvme) = nvme() else { return };
    let (_container, device) = nvme.open();
    let fds = events(2);
    for index in [ERROR, REQUEST] {
        assert_eq!(device.irq_info(index).unwrap().count, 1);
        bind(&device, index, 0, &fds[..1]);
        device.trigger(index, 0, 1).unwrap();
        assert_eq!(counts(&fds), [1, 0]);
        refused(device.set_irqs_eventfds(index, 0, &borrowed(&fds)), "no such vectors");
        device.disable_irqs(index).unwrap();
        refused(device.disable_irqs(index), "not enabled");
    }
}

/// The counter, when it is not 0 any more.
fn wait(fd: &OwnedFd) -> u64 {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap();
    counts(std::slice::from_ref(fd))[0]
}
