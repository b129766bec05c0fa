//! The gate of a device: accesses by message and by mapping while it is reset, switched off, asleep, gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use vfio_uring::{
    Error,
    device::{Device, PowerState, State, StateChange},
    mmio::GUARDED,
    reactor::{sleep, spawn, yield_now},
    transport::user::wire::{RegionAccess, command},
};
use zerocopy::FromBytes;

use crate::{
    fake::{BAR2_BASE, Fake, Peer},
    open, patient, run,
};

/// The first mapped register of BAR 2, and what it reads.
const REGISTER: u64 = 0x1000;
const VALUE: u32 = 0x5afe_c0de;
/// Capabilities: power management, PCI Express, advanced features.
const PM: usize = 0x50;
const EXPRESS: usize = 0x60;
const FEATURES: usize = 0xa0;

/// Gives the device its capabilities, and something to read.
fn equip(peer: &mut Peer, no_soft_reset: bool) {
    let config = &mut peer.device.config;
    config[4] = 2;
    config[0x41] = PM as u8;
    config[PM..PM + 2].copy_from_slice(&[1, EXPRESS as u8]);
    config[PM + 4] = if no_soft_reset { 8 } else { 0 };
    config[EXPRESS..EXPRESS + 2].copy_from_slice(&[0x10, FEATURES as u8]);
    config[EXPRESS + 7] = 0x10;
    config[FEATURES..FEATURES + 4].copy_from_slice(&[0x13, 0, 6, 2]);
    peer.device.bar0[..4].copy_from_slice(&VALUE.to_le_bytes());
    peer.device.bar2.as_ref().unwrap().1.store_u32(BAR2_BASE + REGISTER, VALUE).unwrap();
}

/// Serves one client, with a pause after each reset.
fn equipped(no_soft_reset: bool, pause: Duration) -> Fake {
    Fake::run(move |mut peer| {
        equip(&mut peer, no_soft_reset);
        while let Some(message) = peer.recv() {
            if message.command() == command::DEVICE_RESET {
                thread::sleep(pause);
            }
            peer.answer(&message);
        }
    })
}

fn now(device: &Device) -> (State, u64) {
    (device.state(), device.generation())
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Accesses by the mapping from four threads, and by messages, during resets: each is right or refused.
#[test]
fn resets_under_load() {
    if !GUARDED {
        return;
    }
    let fake = equipped(true, Duration::from_millis(5));
    let stop = AtomicBool::new(false);
    let (right, missing, refused) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        // Also when this panics.
        let stopping = Stop(&stop);
        run(async {
            let device = open(&fake).await;
            let bar = device.bar(2).unwrap();
            for _ in 0..4 {
                let register = bar.register::<u32>(REGISTER).unwrap();
                let (stop, right, missing) = (&stop, &right, &missing);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        match register.try_read() {
                            Ok(value) => {
                                assert_eq!(value, VALUE);
                                right.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(_) => {
                                assert!(matches!(register.read(), u32::MAX | VALUE));
                                missing.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        register.write(VALUE);
                    }
                });
            }
            let messages = device.bar(0).unwrap();
            let done = Arc::new(AtomicBool::new(false));
            let (until, counted) = (done.clone(), device.clone());
            let reader = spawn(async move {
                let (mut right, mut refused) = (0, 0);
                while !until.load(Ordering::Relaxed) {
                    match messages.read::<u32>(0).await {
                        Ok(value) => {
                            assert_eq!(value, VALUE);
                            right += 1;
                        }
                        Err(Error::Unavailable { state: State::Resetting, .. }) => {
                            refused += 1;
                            counted.live().await.unwrap();
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                (right, refused)
            });
            for generation in 1..=50 {
                let before = right.load(Ordering::Relaxed);
                while right.load(Ordering::Relaxed) < before + 4 {
                    sleep(Duration::from_micros(100)).await;
                }
                device.reset().await.unwrap();
                assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, generation), generation));
                assert_eq!(bar.read::<u32>(REGISTER).await.unwrap(), VALUE);
            }
            done.store(true, Ordering::Relaxed);
            let (read, unavailable) = reader.await.unwrap();
            assert!(read > 0);
            refused.store(unavailable, Ordering::Relaxed);
        });
        drop(stopping);
    });
    println!("{right:?} right, {missing:?} without memory, {refused:?} messages refused");
    assert!(missing.into_inner() > 0 && refused.into_inner() > 0);
}

#[test]
fn a_reset_refuses_at_once() {
    // It tells when it has the reset, and waits for our word.
    let (go, may) = mpsc::channel::<()>();
    let fake = Fake::run(move |mut peer| {
        equip(&mut peer, true);
        while let Some(message) = peer.recv() {
            if message.command() == command::DEVICE_RESET {
                may.recv().unwrap();
            }
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        let mut changes = device.state_changes();
        let (mapped, bar) = (device.bar(2).unwrap(), device.bar(0).unwrap());
        let posted = bar.posted::<u32>(8).unwrap();
        let resetting = spawn({
            let device = device.clone();
            async move { device.reset().await }
        });
        assert_eq!(changes.next().await, Some(StateChange { state: State::Resetting, generation: 0 }));
        // All of these would wait for the server.
        let refused = |error: Error| matches!(error, Error::Unavailable { state: State::Resetting, .. });
        assert!(refused(bar.read::<u32>(0).now_or_never().unwrap().unwrap_err()));
        assert!(refused(bar.write::<u32>(0, 1).now_or_never().unwrap().unwrap_err()));
        assert!(refused(device.config().read::<u32>(0).now_or_never().unwrap().unwrap_err()));
        assert!(refused(device.config().write::<u16>(6, 0).now_or_never().unwrap().unwrap_err()));
        posted.write(9);
        assert!(refused(posted.take_error().unwrap()));
        yield_now().await;
        if GUARDED {
            let error = mapped.read::<u32>(REGISTER).await.unwrap_err();
            assert!(matches!(error, Error::MmioUnavailable { bar: 2, offset: REGISTER }), "{error}");
        }
        go.send(()).unwrap();
        resetting.await.unwrap().unwrap();
        assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation: 1 }));
        assert_eq!(mapped.read::<u32>(REGISTER).await.unwrap(), VALUE);
        // What was posted meanwhile was not written.
        assert_eq!((bar.read::<u32>(8).await.unwrap(), posted.take_error().is_none()), (0, true));
    });
}

#[test]
fn a_reset_that_nobody_waits_for_is_still_a_reset() {
    let (go, may) = mpsc::channel::<()>();
    let fake = Fake::run(move |mut peer| {
        equip(&mut peer, true);
        while let Some(message) = peer.recv() {
            if message.command() == command::DEVICE_RESET {
                may.recv().unwrap();
            }
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        let resetting = spawn({
            let device = device.clone();
            async move { device.reset().await }
        });
        sleep(Duration::from_millis(20)).await;
        resetting.abort();
        sleep(Duration::from_millis(20)).await;
        assert_eq!(now(&device), (State::Resetting, 0));
        go.send(()).unwrap();
        device.live().await.unwrap();
        assert_eq!(now(&device), (State::Live, 1));
        // Given up before anything was sent, it is none.
        assert!(device.reset().now_or_never().is_none());
        let _ = go.send(());
        device.live().await.unwrap();
        assert_eq!(device.bar(0).unwrap().read::<u32>(0).await.unwrap(), VALUE);
    });
}

#[test]
fn a_reset_that_is_refused_changes_nothing() {
    let fake = Fake::hooked(|peer, message| {
        let refuse = message.command() == command::DEVICE_RESET;
        if refuse {
            peer.refuse(message, libc::EIO);
        }
        refuse
    });
    run(async {
        let device = open(&fake).await;
        let register = device.bar(2).unwrap();
        assert!(matches!(device.reset().await, Err(Error::Refused { .. })));
        assert_eq!(now(&device), (State::Live, 0));
        register.read::<u32>(REGISTER).await.unwrap();
    });
}

#[test]
fn configuration_writes_pass_the_gate() {
    let fake = equipped(false, Duration::ZERO);
    run(async {
        let device = open(&fake).await;
        let (bar, mapped) = (device.bar(0).unwrap(), device.bar(2).unwrap());
        let config = device.config();
        let works = async |works: bool, part: &str| {
            let message = bar.read::<u32>(0).await;
            assert_eq!(message.is_ok(), works, "{message:?}");
            if let Err(error) = message {
                assert!(error.to_string().contains(part), "{error}");
            }
            let register = mapped.read::<u32>(REGISTER).await;
            assert_eq!(register.is_ok(), works, "{register:?}");
            // Configuration space answers.
            assert_eq!(config.read::<u16>(0).await.unwrap(), 0x1234);
        };
        works(true, "").await;
        device.set_memory(false).await.unwrap();
        assert_eq!(now(&device), (State::Unavailable, 0));
        works(false, "COMMAND.MEM").await;
        device.set_memory(true).await.unwrap();
        assert_eq!(now(&device), (State::Live, 0));
        works(true, "").await;
        // The raw ways are seen too.
        config.region().write(0, &[0x34, 0x12, 0x78, 0x56, 0, 0, 0x10, 0]).await.unwrap();
        assert_eq!(now(&device), (State::Unavailable, 0));
        device.set_bus_master(true).await.unwrap();
        assert_eq!(now(&device), (State::Live, 0));

        assert_eq!(device.power().await.unwrap(), PowerState::D0);
        device.set_power(PowerState::D3Hot).await.unwrap();
        assert_eq!((now(&device), device.power().await.unwrap()), ((State::Unavailable, 0), PowerState::D3Hot));
        works(false, "D3hot").await;
        // It has no No_Soft_Reset: it comes back reset.
        device.set_power(PowerState::D0).await.unwrap();
        assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, 1), 0));
        works(true, "").await;

        let mut changes = device.state_changes();
        device.function_reset().await.unwrap();
        assert_eq!(now(&device), (State::Live, 2));
        assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation: 2 }));
        config.region().write_u8(EXPRESS as u64 + 9, 0x80).await.unwrap();
        config.write::<u8>(FEATURES as u64 + 4, 1).await.unwrap();
        config.write::<u16>(EXPRESS as u64 + 8, 0x7fff).await.unwrap();
        assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, 4), 0));
        works(true, "").await;

        // Asleep, a reset wakes it.
        device.set_power(PowerState::D3Hot).await.unwrap();
        device.reset().await.unwrap();
        assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, 5), 5));

        assert!(matches!(device.hot_reset().await, Err(Error::Unsupported { .. })));
        assert!(matches!(device.enter_low_power().await, Err(Error::Unsupported { .. })));
    });
}

#[test]
fn power_that_resets_nothing_is_no_reset() {
    let fake = equipped(true, Duration::ZERO);
    run(async {
        let device = open(&fake).await;
        device.set_power(PowerState::D3Hot).await.unwrap();
        device.set_power(PowerState::D0).await.unwrap();
        assert_eq!(now(&device), (State::Live, 0));
    });
}

#[test]
fn what_the_device_does_not_have_is_said() {
    let fake = Fake::hooked(|_, _| false);
    run(async {
        let device = open(&fake).await;
        for result in [device.function_reset().await, device.set_power(PowerState::D0).await, device.power().await.map(drop)]
        {
            assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
        }
        assert_eq!(now(&device), (State::Live, 0));
    });
    // It keeps its memory on, and stays awake, whatever it is told.
    let fake = Fake::run(|mut peer| {
        equip(&mut peer, true);
        while let Some(message) = peer.recv() {
            peer.answer(&message);
            peer.device.config[4] = 2;
            peer.device.config[PM + 4] = 0;
        }
    });
    run(async {
        let device = open(&fake).await;
        device.set_memory(false).await.unwrap();
        assert_eq!(now(&device), (State::Live, 0));
        assert!(matches!(device.set_power(PowerState::D3Hot).await, Err(Error::Unsupported { .. })));
        assert_eq!(now(&device), (State::Live, 0));
    });
}

#[test]
fn gone_is_for_ever() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_WRITE {
            let (access, _) = RegionAccess::read_from_prefix(&message.payload).unwrap();
            if access.region.get() == 0 {
                peer.hang_up();
                return true;
            }
        }
        false
    });
    run(async {
        let device = Device::open_with(&fake.address(), patient()).await.unwrap();
        let bar = device.bar(2).unwrap();
        let register = bar.register::<u32>(REGISTER).unwrap();
        register.write(7);
        assert_eq!(register.read(), 7);
        let mut changes = device.state_changes();
        let error = device.bar(0).unwrap().write::<u32>(0, 1).await.unwrap_err();
        assert!(matches!(error, Error::Gone { .. }), "{error}");
        assert_eq!(changes.next().await, Some(StateChange { state: State::Gone, generation: 0 }));
        assert_eq!(changes.next().await, None);
        assert_eq!(device.state(), State::Gone);
        assert!(matches!(device.live().await, Err(Error::Gone { .. })));
        assert!(matches!(device.reset().await, Err(Error::Gone { .. })));
        assert!(matches!(bar.read::<u32>(REGISTER).await, Err(Error::Gone { .. })));
        register.write(8);
        drop((device, bar));
        assert_eq!((register.read(), register.try_read().is_err()), (u32::MAX, true));
        assert!(register.take_faults().is_some_and(|faults| faults.count >= 3));
    });
}
