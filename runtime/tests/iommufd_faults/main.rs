//! Page requests and events through iommufd, raised by the mock devices of the kernel's own tests (CONFIG_IOMMUFD_TEST).
//!
//! They do nothing outside of the guest, and say so. `VFIO_URING_TEST_BDF` names a real device, which can't ask for pages.

mod events;
mod mock;
mod parting;
mod requests;

use std::{env, future::Future, time::Duration};

use futures::StreamExt;
use vfio_uring::{
    device::Device,
    fault::{
        Fault, FaultGroup,
        iommufd::{Attach, Faults, IommufdFaultQueue, Limits},
    },
    reactor::{Reactor, timeout},
};

/// Runs a test on a reactor, where there are mock devices.
fn on_reactor<F: Future<Output = ()>>(body: impl FnOnce() -> F) {
    let Some(_turn) = mock::turn() else { return };
    let limit = Duration::from_secs(20);
    Reactor::new().unwrap().block_on(async { timeout(limit, body()).await.expect("in time") });
}

/// The next group, which has one request: its address and index.
async fn next<S>(stream: &mut S) -> (FaultGroup, u64, u32)
where
    S: futures::Stream<Item = vfio_uring::Result<FaultGroup>> + Unpin,
{
    let group = stream.next().await.expect("not at its end").unwrap();
    let [Fault::PageRequest(request)] = group.faults[..] else { panic!("{group:?}") };
    (group, request.address, request.group_index)
}

/// Nothing is there to be read.
async fn nothing<S>(stream: &mut S)
where
    S: futures::Stream<Item = vfio_uring::Result<FaultGroup>> + Unpin,
{
    let more = timeout(Duration::from_millis(20), stream.next()).await;
    assert!(more.is_err(), "{more:?}");
}

/// A queue and a table with it, which the mock device is attached to, with all in our own hands.
fn by_hand(mock: &mock::Mock) -> (IommufdFaultQueue, vfio_uring::transport::iommufd::Hwpt) {
    use vfio_uring::transport::iommufd::{Hwpt, HwptFlags};
    let queue = IommufdFaultQueue::open(mock.context(), Limits::default()).unwrap();
    let table = Hwpt::alloc(mock.device_id(), mock.ioas(), HwptFlags::empty(), Some(queue.id())).unwrap();
    mock.attach(&table).unwrap();
    (queue, table)
}

#[test]
fn a_device_that_can_not_ask_for_pages_is_refused_and_works_on() {
    let Ok(bdf) = env::var("VFIO_URING_TEST_BDF") else {
        eprintln!("skipped: VFIO_URING_TEST_BDF is not set");
        return;
    };
    on_reactor(|| async move {
        let device = Device::open(&format!("cdev:{bdf}").parse().unwrap()).await.unwrap();
        for _ in 0..2 {
            let error = Faults::of_device(&device, Limits::default()).await.unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, vfio_uring::Error::Unsupported { .. }) && text.contains("ATS and PRI"), "{text}");
            assert!(text.contains(&bdf), "{text}");
        }
        let ids = device.config().ids().await.unwrap();
        assert_ne!(ids.vendor, 0xffff);
    });
}
