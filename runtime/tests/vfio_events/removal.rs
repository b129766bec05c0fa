//! Unplug, unbind, close.

use std::{fs, sync::Arc, thread};

use vfio_uring::{
    Error,
    device::{Bar, Interrupt, Irq, State},
    dma::{HugePages, Mapping, Page},
    mmio::Register,
    reactor::{sleep, spawn},
};

use super::*;

/// No time at all, for a machine that is not busy.
const SHORT: Duration = Duration::from_millis(500);
/// More than a test takes.
const LONG: Duration = Duration::from_secs(300);
/// The controller's version.
const VERSION: u64 = 8;

/// Everything that may keep a device.
struct Held {
    device: Device,
    bar: Bar,
    register: Register<u32>,
    interrupt: Interrupt,
    memory: Arc<Mapping>,
    pages: Arc<Mapping>,
}

impl Held {
    async fn of(device: Device) -> Self {
        device.set_bus_master(true).await.unwrap();
        let bar = device.bar(0).unwrap();
        let register: Register<u32> = bar.register(VERSION).unwrap();
        assert_ne!(register.read(), u32::MAX);
        let interrupt = device.interrupts(Irq::MsiX, 0, 1).await.unwrap().remove(0);
        let memory = device.dma().map(1 << 20, HugePages::No).await.unwrap();
        let pages = device.dma().map_pages(vec![Page([7; 4096]); 3]).await.unwrap();
        Self { device, bar, register, interrupt, memory, pages }
    }

    /// All of it is of a device that is gone, and nothing is leaked.
    async fn expect_gone(mut self) {
        let Self { device, bar, register, .. } = &self;
        assert_eq!(device.state(), State::Gone);
        assert!(device.is_gone().is_some());
        assert_eq!(register.read(), u32::MAX);
        assert!(matches!(bar.read::<u32>(VERSION).await, Err(Error::Gone { .. })), "{:?}", bar.read::<u32>(VERSION).await);
        assert!(matches!(device.config().ids().await, Err(Error::Gone { .. })));
        assert!(matches!(device.reset().await, Err(Error::Gone { .. })));
        assert!(matches!(device.interrupts(Irq::MsiX, 1, 1).await, Err(Error::Gone { .. })));
        assert!(matches!(device.dma().map(4096, HugePages::No).await, Err(Error::Gone { .. })));
        assert!(device.descriptor().unwrap().info().is_err());
        let ended = timeout(LIMIT, async {
            while let Some(item) = self.interrupt.next().await {
                if item.is_err() {
                    return true;
                }
            }
            false
        });
        assert!(ended.await.unwrap(), "an interrupt ends with the reason");
        // The memory is its owner's, as long as that likes.
        self.memory.memory().write(0, &[1]).unwrap();
        let mut byte = [0];
        self.pages.memory().read(4096, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        let space = self.device.dma().clone();
        drop(self);
        space.reclaim().await;
        let stats = space.stats();
        assert_eq!((stats.mappings, stats.retired, stats.leaked, stats.forgotten), (0, 0, 0, 0), "{stats:?}");
    }
}

fn is_request(event: Option<Event>) -> bool {
    matches!(event, Some(Event::RemovalRequested { deadline: Some(_) }))
}

/// All events up to the end.
async fn to_the_end(events: &mut Events) {
    loop {
        match next(events).await {
            Some(Event::RemovalRequested { .. }) => {}
            event => {
                assert_eq!(event, Some(Event::Gone));
                return;
            }
        }
    }
}

/// The application does nothing, and holds everything; the device goes all the same.
#[test]
fn unplugged_in_spite_of_the_application() {
    let Some(plug) = plug() else { return };
    run(async {
        let held = Held::of(plug.open(SHORT).await).await;
        let mut events = held.device.events();
        assert!(host(&["device_del", "plug"]));
        assert!(is_request(next(&mut events).await));
        let cause = timeout(LIMIT, held.device.gone()).await.expect("the device is gone");
        assert!(cause.to_string().contains("asked it back"), "{cause}");
        to_the_end(&mut events).await;
        assert!(within(|| !plug.plugged_in()), "the unplug hangs");
        held.expect_gone().await;
        plug.plug_in();
        // Nothing is left that keeps the new device from us.
        Held::of(plug.open(SHORT).await).await;
    });
}

/// The application drops what it has, before anybody takes it away.
#[test]
fn unplugged_with_the_applications_consent() {
    let Some(plug) = plug() else { return };
    run(async {
        let held = Held::of(plug.open(LONG).await).await;
        let mut events = held.device.events();
        assert!(host(&["device_del", "plug"]));
        assert!(is_request(next(&mut events).await));
        drop(held);
        assert!(within(|| !plug.plugged_in()), "the unplug hangs");
        to_the_end(&mut events).await;
        plug.plug_in();
    });
}

/// The driver is unbound while registers, configuration space and memory are in use.
#[test]
fn unbound_while_it_is_used() {
    let Some(plug) = plug() else { return };
    run(async {
        let held = Held::of(plug.open(SHORT).await).await;
        let mut events = held.device.events();
        let loads = held.register.clone();
        let reader = thread::spawn(move || {
            let until = Instant::now() + 2 * LIMIT;
            while loads.read() != u32::MAX {
                assert!(Instant::now() < until, "the registers do not go away");
            }
        });
        let device = held.device.clone();
        let accesses = spawn(async move {
            loop {
                if let Err(error) = device.config().ids().await {
                    return error;
                }
            }
        });
        let space = held.device.dma().clone();
        let mappings = spawn(async move {
            loop {
                match space.map(1 << 16, HugePages::No).await {
                    Ok(mapping) => drop(mapping),
                    Err(error) => return error,
                }
            }
        });
        sleep(SHORT).await;
        let (unbind, bdf) = (plug.folder().join("driver/unbind"), plug.bdf.clone());
        let unbound = thread::spawn(move || fs::write(unbind, bdf));
        assert!(is_request(next(&mut events).await));
        to_the_end(&mut events).await;
        assert!(within(|| unbound.is_finished()), "the unbind hangs");
        unbound.join().unwrap().unwrap();
        for ended in [accesses, mappings] {
            let error = timeout(LIMIT, ended).await.expect("it ends").expect("a task's end");
            assert!(matches!(error, Error::Gone { .. }), "{error}");
        }
        reader.join().unwrap();
        held.expect_gone().await;
        plug.bind();
        Held::of(plug.open(SHORT).await).await;
    });
}

/// The application closes the device, while a part of it holds handles; somebody else can have it at once.
#[test]
fn closed_and_opened_again() {
    let Some(plug) = plug() else { return };
    run(async {
        let held = Held::of(plug.open(LONG).await).await;
        let mut events = held.device.events();
        let also = held.device.clone();
        let (one, two) = futures::join!(held.device.close(), also.close());
        let ((), ()) = (one, two);
        assert_eq!(next(&mut events).await, Some(Event::Gone));
        let again = Held::of(plug.open(LONG).await).await;
        held.expect_gone().await;
        assert_ne!(again.register.read(), u32::MAX);
    });
}

/// Of two devices in one address space one is closed: the other works on, with all that is mapped.
#[test]
fn closed_in_a_shared_space() {
    let Some(plug) = plug() else { return };
    let Ok(other) = env::var("VFIO_URING_TEST_AER") else { return };
    run(async {
        let other = Device::open(&address(&other)).await.unwrap();
        let mapping = other.dma().map(1 << 20, HugePages::No).await.unwrap();
        let options = Options { space: Some(other.dma().clone()), ..Options::default() };
        let device = Device::open_with(&address(&plug.bdf), options.clone()).await.unwrap();
        device.close().await;
        let more = other.dma().map(1 << 20, HugePages::No).await.unwrap();
        drop((mapping, more));
        other.dma().reclaim().await;
        assert_eq!(other.dma().stats().leaked, 0);
        // The first is still held; the device can be had again.
        let again = Device::open_with(&address(&plug.bdf), options.clone()).await.unwrap();
        other.close().await;
        again.close().await;
        let refused = Device::open_with(&address(&plug.bdf), options).await;
        assert!(matches!(refused, Err(Error::Gone { .. })), "the space was given up with its last device");
        drop(device);
    });
}
