//! Faults as drivers and users meet them: the example, and an NVMe controller that can't reach a buffer.

use std::time::Duration;

use futures::StreamExt;
use vfio_uring::{
    device::Device,
    dma::{HugePages, Pool},
    fault::{Fault, FaultQueue, Reason},
    reactor::{Reactor, timeout},
};
use vfio_uring_models::{
    faults::{Config, Faulty, Form, Unit},
    nvme,
    server::{Running, Server},
};
use vfio_uring_nvme::Controller;

#[path = "../examples/fault_queue.rs"]
#[expect(dead_code, reason = "its main function")]
mod fault_queue;

#[test]
fn the_example_works() {
    for form in [Form::TwoRegion, Form::Single] {
        fault_queue::run(form).unwrap();
    }
}

async fn a_buffer_that_can_not_be_reached(form: Form) {
    let unit = Unit::new(Config::new(form).unwrap()).unwrap();
    let handle = unit.handle();
    let controller = nvme::Controller::new(Default::default()).unwrap();
    let server = Running::start(Server::new(Faulty::new(controller, unit)).unwrap()).unwrap();
    let device = Device::open(&server.address().parse().unwrap()).await.unwrap();
    let mut faults = FaultQueue::open(&device, Default::default()).await.unwrap();
    let controller = Controller::new(&device, Default::default()).await.unwrap();
    let ns = controller.create_interrupt_queue(8).await.unwrap().namespace(1).unwrap();
    let pool = Pool::new(device.dma(), 1 << 16, HugePages::No).await.unwrap();
    let buf = pool.alloc(4096).unwrap();
    let iova = buf.iova();
    handle.fault_on(iova..=iova + 4095);
    let (read, buf) = ns.read(0, buf).await;
    // The driver knows that it failed, the fault queue knows why.
    read.unwrap_err();
    let group = faults.next().await.unwrap().unwrap();
    let [Fault::Unrecoverable(fault)] = group.faults[..] else { panic!("{group:?}") };
    assert_eq!((fault.address, fault.reason), (Some(iova), Reason::Permission));
    handle.fault_on_none();
    let (read, _buf) = ns.read(0, buf).await;
    read.unwrap();
    controller.shutdown().await.unwrap();
    assert_eq!((faults.stats().faults, handle.counters().stored), (1, 1));
    faults.close().await.unwrap();
}

#[test]
fn a_fault_says_why_a_read_failed() {
    for form in [Form::TwoRegion, Form::Single] {
        let test = timeout(Duration::from_secs(60), a_buffer_that_can_not_be_reached(form));
        Reactor::new().unwrap().block_on(test).expect("the test took too long");
    }
}
