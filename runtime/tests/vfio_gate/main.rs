//! The gate of devices of the kernel: resets, memory decoding and power under the load of mapped accesses.
//!
//! `VFIO_URING_TEST_GATE` names PCI functions that are bound to vfio-pci, with commas between: NVMe controllers, of which the last two
//! may share a slot; `VFIO_URING_TEST_IGB` a network card of the kind 82576, whose interrupts are tried. `VFIO_URING_TRANSPORT` says
//! `group` or `cdev`. Without them the tests pass without doing anything, and say so.

use std::{
    env, fs,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use vfio_uring::{
    Error,
    device::{Device, Irq, Options, PowerState, State, StateChange},
    mmio::Register,
    reactor::{Reactor, sleep, spawn, timeout},
};

/// Registers of NVMe, of BAR 0: one that never changes, and one that a reset clears.
const VERSION: u64 = 0x08;
const CONTROL: u64 = 0x14;
/// Entries of control have 64 and 16 bytes; the controller stays off.
const ENTRIES: u32 = 0x0046_0000;
const THREADS: usize = 4;

/// Runs a test with the names of the devices; they are one test's at a time.
fn run(test: impl AsyncFnOnce(&[String])) {
    static TURN: Mutex<()> = Mutex::new(());
    let Ok(devices) = env::var("VFIO_URING_TEST_GATE") else { return eprintln!("skipped: VFIO_URING_TEST_GATE is not set") };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let devices: Vec<_> = devices.split(',').map(String::from).collect();
    let limited = async { timeout(Duration::from_secs(100), test(&devices)).await.expect("no hang") };
    Reactor::new().unwrap().block_on(limited);
}

async fn open_in(name: &str, options: Options) -> Device {
    let transport = env::var("VFIO_URING_TRANSPORT").expect("a transport");
    let device = Device::open_with(&format!("{transport}:{name}").parse().unwrap(), options).await.expect("the device");
    device.set_bus_master(true).await.unwrap();
    device
}

async fn open(name: &str) -> Device {
    open_in(name, Options::default()).await
}

fn register(device: &Device, offset: u64) -> Register<u32> {
    device.bar(0).unwrap().register(offset).unwrap()
}

fn now(device: &Device) -> (State, u64) {
    (device.state(), device.generation())
}

/// What the threads saw.
#[derive(Default)]
struct Seen {
    right: [AtomicUsize; THREADS],
    missing: [AtomicUsize; THREADS],
    stop: AtomicBool,
}

/// Four threads that access the registers of a device until this is dropped; each must find the right value or nothing.
struct Load {
    seen: Arc<Seen>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn on(device: &Device) -> Self {
        let (version, control) = (register(device, VERSION), register(device, CONTROL));
        let value = version.try_read().unwrap();
        assert!(value >= 0x1_0000 && value != u32::MAX, "{value:#x}");
        let seen = Arc::<Seen>::default();
        let work = |at: usize| {
            let (version, control, seen) = (version.clone(), control.clone(), seen.clone());
            thread::spawn(move || {
                while !seen.stop.load(Ordering::Relaxed) {
                    match version.try_read() {
                        Ok(read) => {
                            assert_eq!(read, value);
                            seen.right[at].fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => {
                            seen.missing[at].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    control.write(ENTRIES);
                    assert!(matches!(control.read(), 0 | ENTRIES | u32::MAX));
                }
            })
        };
        Self { threads: (0..THREADS).map(work).collect(), seen }
    }

    fn right(&self) -> [usize; THREADS] {
        std::array::from_fn(|at| self.seen.right[at].load(Ordering::Relaxed))
    }

    fn missing(&self) -> [usize; THREADS] {
        std::array::from_fn(|at| self.seen.missing[at].load(Ordering::Relaxed))
    }

    /// Waits until each thread has found the register.
    async fn works(&self) {
        let before = self.right();
        while grown(before, self.right()) < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until each thread has found nothing.
    async fn fails(&self) {
        let before = self.missing();
        while grown(before, self.missing()) < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// How many accesses of the thread with the fewest found nothing during `change`.
    async fn during(&self, change: impl Future<Output = vfio_uring::Result<()>>) -> usize {
        let before = self.missing();
        change.await.unwrap();
        grown(before, self.missing())
    }

    fn end(mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("each access is right or finds nothing");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
    }
}

fn grown(before: [usize; THREADS], now: [usize; THREADS]) -> usize {
    now.iter().zip(before).map(|(now, before)| now - before).min().unwrap_or(0)
}

#[test]
fn memory_goes_and_comes_under_load() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let load = Load::on(&device);
        let bar = device.bar(0).unwrap();
        for _ in 0..20 {
            load.works().await;
            device.set_memory(false).await.unwrap();
            assert_eq!(now(&device), (State::Unavailable, 0));
            load.fails().await;
            let error = bar.read::<u32>(VERSION).await.unwrap_err();
            assert!(matches!(error, Error::MmioUnavailable { bar: 0, offset: VERSION }), "{error}");
            let error = bar.region().read_u32(VERSION).await.unwrap_err();
            assert!(matches!(error, Error::Unavailable { state: State::Unavailable, .. }), "{error}");
            assert_ne!(device.config().read::<u16>(0).await.unwrap(), u16::MAX);
            device.set_memory(true).await.unwrap();
            assert_eq!(now(&device), (State::Live, 0));
        }
        load.works().await;
        load.end();
    });
}

/// The threads go on, with accesses that find nothing, for as long as the kernel resets the device.
#[test]
fn resets_do_not_hold_accesses() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let load = Load::on(&device);
        let mut changes = device.state_changes();
        for generation in [1, 2, 3] {
            load.works().await;
            let accesses = load.during(device.reset()).await;
            println!("each thread had at least {accesses} accesses during a reset");
            assert!(accesses >= 1, "it waited");
            assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, generation), generation));
            assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation }));
        }
        for generation in [4, 5] {
            load.works().await;
            let accesses = load.during(device.function_reset()).await;
            println!("each thread had at least {accesses} accesses during a function-level reset");
            assert!(accesses >= 1, "it waited");
            assert_eq!((now(&device), device.confirmed_generation()), ((State::Live, generation), 3));
        }
        load.works().await;
        load.end();
    });
}

/// What the device was told is forgotten, and its configuration space is as before.
#[test]
fn each_reset_is_one() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let (control, config) = (register(&device, CONTROL), device.config());
        let before = config.read::<u16>(4).await.unwrap();
        assert_eq!(before & 6, 6);
        for way in 0..3 {
            control.try_write(ENTRIES).unwrap();
            assert_eq!(control.try_read(), Ok(ENTRIES));
            match way {
                0 => device.reset().await.unwrap(),
                1 => device.function_reset().await.unwrap(),
                _ => device.hot_reset().await.unwrap(),
            }
            assert_eq!((control.try_read(), config.read::<u16>(4).await.unwrap()), (Ok(0), before), "{way}");
        }
        // Given up at once or midway, a reset leaves a device that works.
        for pause in [0, 1, 20] {
            let resetting = spawn({
                let device = device.clone();
                async move { device.reset().await }
            });
            sleep(Duration::from_millis(pause)).await;
            resetting.abort();
            device.live().await.unwrap();
            assert_eq!(control.try_read(), Ok(0));
        }
    });
}

#[test]
fn a_slot_is_reset_with_all_its_devices() {
    run(async |devices| {
        let device = open(devices.last().unwrap()).await;
        let affected = device.hot_reset_info().await.unwrap();
        println!("a hot reset affects {affected:?}");
        let mut all = vec![device.clone()];
        for other in &devices[..devices.len() - 1] {
            if affected.iter().any(|device| &device.to_string() == other) {
                all.push(open_in(other, Options { space: Some(device.dma().clone()), ..Options::default() }).await);
            }
        }
        assert_eq!(all.len(), affected.len());
        let loads: Vec<_> = all.iter().map(Load::on).collect();
        let mut changes: Vec<_> = all.iter().map(Device::state_changes).collect();
        for generation in [1, 2] {
            for load in &loads {
                load.works().await;
            }
            let before: Vec<_> = loads.iter().map(Load::missing).collect();
            device.hot_reset().await.unwrap();
            for ((load, before), device) in loads.iter().zip(before).zip(&all) {
                let accesses = grown(before, load.missing());
                println!("{}: each thread had at least {accesses} accesses during a hot reset", device.address());
                assert!(accesses >= 1, "it waited");
                assert_eq!((now(device), device.confirmed_generation()), ((State::Live, generation), generation));
            }
            for changes in &mut changes {
                assert_eq!(changes.next().await, Some(StateChange { state: State::Live, generation }));
            }
        }
        for load in loads {
            load.works().await;
            load.end();
        }
    });
}

/// Registers of the 82576: message-signalled interrupts of its own, the mask, and the one that sets causes.
const GPIE: u64 = 0x1514;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;

/// The kernel restores the vectors, and the eventfds are still bound.
#[test]
fn interrupts_outlive_a_reset() {
    let Ok(card) = env::var("VFIO_URING_TEST_IGB") else { return eprintln!("skipped: VFIO_URING_TEST_IGB is not set") };
    run(async |_| {
        let device = open(&card).await;
        let bar = device.bar(0).unwrap();
        let mut interrupts = device.interrupts(Irq::MsiX, 0, 1).await.unwrap();
        for generation in 0..3 {
            assert_eq!(now(&device), (State::Live, generation));
            bar.write::<u32>(GPIE, 0x10).await.unwrap();
            bar.write::<u32>(EIMS, 1).await.unwrap();
            let count = async {
                bar.write::<u32>(EICS, 1).await.unwrap();
                interrupts[0].take_count().await.unwrap()
            };
            assert!(timeout(Duration::from_secs(20), count).await.expect("an interrupt") >= 1);
            match generation {
                0 => device.reset().await.unwrap(),
                _ => device.function_reset().await.unwrap(),
            }
        }
        assert!(interrupts.remove(0).next().now_or_never().is_none());
    });
}

#[test]
fn it_sleeps_and_wakes() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let (version, bar) = (register(&device, VERSION), device.bar(0).unwrap());
        let value = version.try_read().unwrap();
        device.set_power(PowerState::D3Hot).await.unwrap();
        assert_eq!((device.state(), device.power().await.unwrap()), (State::Unavailable, PowerState::D3Hot));
        assert!(version.try_read().is_err() && bar.region().read_u32(VERSION).await.is_err());
        device.set_power(PowerState::D0).await.unwrap();
        assert_eq!((device.state(), version.try_read()), (State::Live, Ok(value)));
        println!("generation {} after D3hot", device.generation());
        device.set_power(PowerState::D3Hot).await.unwrap();
        device.reset().await.unwrap();
        assert_eq!((device.state(), version.try_read()), (State::Live, Ok(value)));
        assert_eq!(device.power().await.unwrap(), PowerState::D0);
    });
}

#[test]
fn low_power() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let (version, bar) = (register(&device, VERSION), device.bar(0).unwrap());
        let value = version.try_read().unwrap();
        let load = Load::on(&device);
        for _ in 0..3 {
            load.works().await;
            match device.enter_low_power().await {
                Err(Error::Unsupported { what }) => return println!("no low power: {what}"),
                entered => entered.unwrap(),
            }
            assert_eq!(device.state(), State::Unavailable);
            // Its mapping does not answer; a system call wakes it.
            load.fails().await;
            assert!(version.try_read().is_err());
            assert_eq!(bar.region().read_u32(VERSION).await.unwrap(), value);
            assert!(version.try_read().is_err());
            assert!(device.enter_low_power().await.is_err());
            assert_eq!(device.state(), State::Unavailable);
            device.exit_low_power().await.unwrap();
            assert_eq!((now(&device), version.try_read()), ((State::Live, 0), Ok(value)));
        }
        load.works().await;
        load.end();
    });
}

#[test]
fn a_wakeup_is_told() {
    run(async |devices| {
        let device = open(&devices[0]).await;
        let version = register(&device, VERSION);
        let value = version.try_read().unwrap();
        let woken = match device.enter_low_power_until_woken().await {
            Err(Error::Unsupported { what }) => return println!("no low power: {what}"),
            woken => woken.unwrap(),
        };
        assert_eq!(device.state(), State::Unavailable);
        assert!(version.try_read().is_err());
        let status = format!("/sys/bus/pci/devices/{}/power/runtime_status", devices[0]);
        let asleep = async {
            while fs::read_to_string(&status).unwrap().trim() != "suspended" {
                sleep(Duration::from_millis(10)).await;
            }
        };
        match timeout(Duration::from_secs(5), asleep).await {
            Ok(()) => {
                assert_eq!(device.config().region().read_u16(0).await.unwrap(), 0x1b36);
                timeout(Duration::from_secs(20), woken).await.expect("a wakeup").unwrap();
                assert_eq!((device.state(), version.try_read()), (State::Live, Ok(value)));
            }
            Err(_) => {
                println!("the device does not fall asleep: {}", fs::read_to_string(&status).unwrap().trim());
                device.exit_low_power().await.unwrap();
                assert!(woken.await.is_err());
            }
        }
        assert_eq!((device.state(), version.try_read()), (State::Live, Ok(value)));
    });
}
