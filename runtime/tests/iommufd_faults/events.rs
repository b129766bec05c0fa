//! Events of a virtual IOMMU, and those that are lost.

use std::time::Duration;

use futures::StreamExt;
use vfio_uring::{
    Error,
    fault::{
        Lost,
        iommufd::Attach,
        veventq::{EventType, VirtualEvent, VirtualEvents},
    },
    reactor::{sleep, timeout},
    transport::iommufd::{Hwpt, HwptFlags, Viommu},
};

use crate::{
    mock::{self, EVENTS, Mock, VIOMMU},
    on_reactor,
};

/// The number of the device in the virtual machine.
const NUMBER: u32 = 0x99;
const KIND: EventType = EventType::Other { number: EVENTS, data_len: 4 };

fn event(sequence: u32) -> VirtualEvent {
    VirtualEvent::Event { sequence, data: NUMBER.to_ne_bytes().to_vec() }
}

fn lost(count: u64) -> VirtualEvent {
    VirtualEvent::Lost(Lost::Count(count))
}

async fn expect(events: &mut VirtualEvents, all: impl IntoIterator<Item = VirtualEvent>) {
    for expected in all {
        assert_eq!(events.next().await.unwrap().unwrap(), expected);
    }
}

#[test]
fn lost_events_are_counted() {
    on_reactor(|| async {
        let mock = Mock::new();
        let parent = Hwpt::alloc(mock.device_id(), mock.ioas(), HwptFlags::NEST_PARENT, None).unwrap();
        let viommu = Viommu::alloc(mock.device_id(), parent, VIOMMU).unwrap();
        let vdevice = viommu.add_device(mock.device_id(), NUMBER.into()).unwrap();
        let nested = mock.nested(&viommu);
        mock.replace(nested).unwrap();

        let mut events = VirtualEvents::open(&viommu, KIND, 4).unwrap();
        let error = VirtualEvents::open(&viommu, KIND, 4).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        let error = VirtualEvents::open(&viommu, KIND, 0).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        let error = VirtualEvents::open(&viommu, EventType::Other { number: 0, data_len: 4 }, 4).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");

        // Waited for by the ring.
        let later = async {
            sleep(Duration::from_millis(20)).await;
            mock.report(1);
        };
        futures::join!(expect(&mut events, [event(0)]), later);
        // Lost at the end of the queue.
        mock.report(10);
        expect(&mut events, (1..=4).map(event).chain([lost(6)])).await;
        assert!(timeout(Duration::from_millis(20), events.next()).await.is_err());
        mock.report(4);
        expect(&mut events, (11..=14).map(event)).await;
        mock.report(5);
        expect(&mut events, (15..=18).map(event).chain([lost(1)])).await;
        events.close().await.unwrap();

        // Lost in the middle: one read takes 32 events and leaves the mark of the loss, which the next event takes the place of.
        let mut events = VirtualEvents::open(&viommu, KIND, 40).unwrap();
        mock.report(45);
        expect(&mut events, [event(0)]).await;
        mock.report(1);
        expect(&mut events, (1..40).map(event).chain([lost(5), event(45)])).await;
        drop(events);

        // A queue that is dropped goes in a task.
        let again = timeout(Duration::from_secs(5), async {
            loop {
                match VirtualEvents::open(&viommu, KIND, 1) {
                    Ok(events) => break events,
                    Err(Error::InUse { .. }) => sleep(Duration::from_millis(1)).await,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        again.await.unwrap().close().await.unwrap();
        mock.release().unwrap();
        mock::destroy(mock.context(), nested).unwrap();
        vdevice.destroy().unwrap();
        drop(viommu);
        mock.end();
    });
}
