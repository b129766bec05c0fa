//! What becomes of a device, as its listeners hear it.

use futures::{FutureExt, StreamExt};
use vfio_uring::{
    Error,
    device::{Device, Event, State},
    dma::HugePages,
    reactor::spawn,
    transport::user::wire::command,
};

use super::{fake::Fake, open, run};

#[test]
fn the_end_of_the_server_is_told_to_all() {
    run(async {
        // It ends with the first reset.
        let fake = Fake::run(|mut peer| {
            while let Some(message) = peer.recv().filter(|message| message.command() != command::DEVICE_RESET) {
                peer.answer(&message);
            }
        });
        let device = open(&fake).await;
        let (mut one, mut two) = (device.events(), device.events());
        assert_eq!(one.next().now_or_never(), None);
        let waiting = spawn(async move { two.by_ref().collect::<Vec<_>>().await });
        device.reset().await.unwrap_err();
        for events in [one.collect().await, waiting.await.unwrap(), device.events().collect().await] {
            let events: Vec<Event> = events;
            assert_eq!(events.last(), Some(&Event::Gone), "{events:?}");
            assert_eq!(events.iter().filter(|event| **event == Event::Gone).count(), 1, "{events:?}");
        }
    });
}

#[test]
fn a_reset_is_told_with_its_number() {
    run(async {
        let fake = Fake::hooked(|_, _| false);
        let device = open(&fake).await;
        let mut events = device.events();
        for generation in 1..3 {
            let (reset, revoked) = futures::join!(device.reset(), events.next());
            reset.unwrap();
            assert_eq!(revoked, Some(Event::Revoked(State::Resetting)));
            assert_eq!(events.next().await, Some(Event::Restored { generation }));
        }
        // Two that nobody looked at are one, with the number of the second.
        device.reset().await.unwrap();
        device.reset().await.unwrap();
        assert_eq!(events.next().await, Some(Event::Restored { generation: 4 }));
        drop(device);
        assert_eq!((events.next().await, events.next().await), (Some(Event::Gone), None));
    });
}

#[test]
fn a_device_is_closed_under_its_handles() {
    run(async {
        let fake = Fake::hooked(|_, _| false);
        let device: Device = open(&fake).await;
        let (bar, mut events) = (device.bar(0).unwrap(), device.events());
        let memory = device.dma().map(4096, HugePages::No).await.unwrap();
        device.close().await;
        device.close().await;
        assert_eq!((events.next().await, events.next().await), (Some(Event::Gone), None));
        assert!(matches!(bar.read::<u32>(0).await, Err(Error::Gone { .. })));
        assert!(matches!(device.config().ids().await, Err(Error::Gone { .. })));
        assert!(matches!(device.gone().await, Error::Gone { .. }));
        memory.memory().write(0, &[1]).unwrap();
        // The server sees the end of its client: the test ends.
    });
}
