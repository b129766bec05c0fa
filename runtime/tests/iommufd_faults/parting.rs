//! Queues that are closed while devices wait.

use std::time::Duration;

use rustix::io::Errno;
use vfio_uring::{
    Error,
    fault::{
        Answer,
        iommufd::{Attach, Faults, Limits},
    },
    reactor::sleep,
    transport::iommufd::{FaultObject, Hwpt, HwptFlags},
};

use crate::{
    by_hand,
    mock::{self, Mock, left_in},
    next, on_reactor,
};

fn busy(result: vfio_uring::Result<()>) {
    match result {
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
        other => panic!("{other:?}"),
    }
}

/// The device can be attached again, asks, and is answered.
async fn works_on(mock: &Mock) {
    let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
    mock.ask(0x9000, 9);
    let (group, address, _) = next(&mut faults).await;
    assert_eq!(address, 0x9000);
    faults.respond(group.id.unwrap(), Answer::Success).unwrap();
    faults.close().await.unwrap();
}

#[test]
fn closing_answers_what_was_read_and_what_is_queued() {
    on_reactor(|| async {
        let mock = Mock::new();
        let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
        mock.ask(0x1000, 1);
        let (_, address, _) = next(&mut faults).await;
        assert_eq!(address, 0x1000);
        (0..100).for_each(|number| mock.ask(0x2000, number));
        faults.close().await.unwrap();
        // Nobody takes requests now: the kernel answers.
        mock.ask(0x3000, 3);
        works_on(&mock).await;
        mock.end();
    });
}

#[test]
fn dropping_does_the_same() {
    on_reactor(|| async {
        let mock = Mock::new();
        let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
        mock.ask(0x1000, 1);
        next(&mut faults).await;
        (0..100).for_each(|number| mock.ask(0x2000, number));
        drop(faults);
        works_on(&mock).await;
        mock.end();
    });
}

#[test]
fn a_queue_that_is_dropped_goes_in_a_task() {
    on_reactor(|| async {
        let mock = Mock::new();
        let (mut queue, table) = by_hand(&mock);
        let id = queue.id();
        mock.ask(0x1000, 1);
        next(&mut queue).await;
        mock.release().unwrap();
        table.destroy().unwrap();
        drop(queue);
        let table = |id| Hwpt::alloc(mock.device_id(), mock.ioas(), HwptFlags::empty(), Some(id));
        while table(id).is_ok() {
            sleep(Duration::from_millis(1)).await;
        }
        mock.end();
    });
}

#[test]
fn a_queue_that_is_in_use_is_not_destroyed() {
    on_reactor(|| async {
        let mock = Mock::new();
        let (mut queue, table) = by_hand(&mock);
        let id = queue.id();
        mock.ask(0x1000, 1);
        next(&mut queue).await;
        mock.ask(0x2000, 2);
        busy(queue.close().await);
        // What comes now finds a queue that nobody reads, until the device is detached.
        mock.ask(0x3000, 3);
        let table = table.destroy().unwrap_err().object;
        mock.release().unwrap();
        table.destroy().unwrap();
        mock::destroy(mock.context(), id).unwrap();
        works_on(&mock).await;
        mock.end();
    });
}

#[test]
fn a_descriptor_that_is_closed_without_an_answer() {
    on_reactor(|| async {
        let mock = Mock::new();
        let object = FaultObject::alloc(mock.context()).unwrap();
        let (id, record) = (object.id(), &mut [0; 40]);
        let table = Hwpt::alloc(mock.device_id(), mock.ioas(), HwptFlags::empty(), Some(id)).unwrap();
        mock.attach(&table).unwrap();
        assert_eq!(rustix::io::read(object.fd(), &mut *record), Ok(0), "empty");
        mock.ask(0x1000, 1);
        mock.ask(0x2000, 2);
        assert_eq!(rustix::io::read(object.fd(), &mut *record), Ok(40));
        busy(object.destroy());
        mock.release().unwrap();
        table.destroy().unwrap();
        mock::destroy(mock.context(), id).unwrap();
        works_on(&mock).await;
        mock.end();
    });
}

#[test]
fn the_kernel_answers_when_a_device_is_detached() {
    on_reactor(|| async {
        let mock = Mock::new();
        let object = FaultObject::alloc(mock.context()).unwrap();
        let table = Hwpt::alloc(mock.device_id(), mock.ioas(), HwptFlags::empty(), Some(object.id())).unwrap();
        mock.attach(&table).unwrap();
        mock.ask(0x1000, 1);
        mock.ask(0x2000, 2);
        assert_eq!(rustix::io::read(object.fd(), &mut [0; 80]), Ok(80));
        mock.ask(0x3000, 3);
        mock.release().unwrap();
        assert_eq!(rustix::io::read(object.fd(), &mut [0; 80]), Ok(0), "what was queued is gone");
        assert_eq!(left_in(std::os::fd::AsFd::as_fd(object.fd())), 0, "what was read does not wait any more");
        table.destroy().unwrap();
        object.destroy().unwrap();
        mock.end();
    });
}
