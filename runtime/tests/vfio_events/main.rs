//! Devices of the kernel that are asked back, taken away, closed, and that report errors.
//!
//! They run in the guest of `cargo xtask vm`, whose command `host` plugs and unplugs devices. `VFIO_URING_TEST_PLUG` names a PCI
//! function bound to vfio-pci that QEMU calls `plug`; `VFIO_URING_TEST_AER` another one, with PCI Express's error reporting.
//! `VFIO_URING_TRANSPORT` is `group` or `cdev`. A test whose device is not named passes without doing anything, and says so.

mod errors;
mod removal;

use std::{
    env, fs,
    future::Future,
    path::PathBuf,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use futures::StreamExt;
use vfio_uring::{
    device::{Address, Device, Event, Events, Options, RemovalPolicy},
    reactor::{Reactor, timeout},
};

/// Long enough for everything on a busy machine.
const LIMIT: Duration = Duration::from_secs(40);

/// A device, held by one test at a time.
struct Named {
    bdf: String,
    _turn: MutexGuard<'static, ()>,
}

fn named(variable: &str) -> Option<Named> {
    static TURN: Mutex<()> = Mutex::new(());
    let Ok(bdf) = env::var(variable) else {
        eprintln!("skipped: {variable} is not set");
        return None;
    };
    Some(Named { bdf, _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner) })
}

fn plug() -> Option<Named> {
    let plug = named("VFIO_URING_TEST_PLUG")?;
    plug.bind();
    Some(plug)
}

fn address(bdf: &str) -> Address {
    let way = env::var("VFIO_URING_TRANSPORT").unwrap_or_default();
    match way.as_str() {
        "group" => Address::Group(bdf.parse().unwrap()),
        _ => Address::Cdev(bdf.parse().unwrap()),
    }
}

impl Named {
    fn folder(&self) -> PathBuf {
        PathBuf::from("/sys/bus/pci/devices").join(&self.bdf)
    }

    async fn open(&self, grace: Duration) -> Device {
        let removal = RemovalPolicy { grace: Some(grace) };
        Device::open_with(&address(&self.bdf), Options { removal, ..Options::default() }).await.expect("a device")
    }

    /// Has vfio-pci take the device, if it does not have it.
    fn bind(&self) {
        let driver = self.folder().join("driver");
        if fs::read_link(&driver).is_ok_and(|driver| driver.ends_with("vfio-pci")) {
            return;
        }
        let done = Command::new("/bin/sh").args(["-c", &format!(". /etc/profile; vfio {}", self.bdf)]).status();
        assert!(done.expect("a shell").success());
    }

    fn plugged_in(&self) -> bool {
        self.folder().exists()
    }

    /// Plugs it in again, for the tests that follow.
    fn plug_in(&self) {
        assert!(host(&["device_add", "plug"]));
        let driver = self.folder().join("driver");
        assert!(within(|| driver.exists()), "the device does not come back");
        self.bind();
    }
}

/// Has the host do something to this machine.
fn host(request: &[&str]) -> bool {
    Command::new("/bin/host").args(request).status().expect("the guest's command host").success()
}

/// Whether it comes true in time.
fn within(true_now: impl Fn() -> bool) -> bool {
    let until = Instant::now() + LIMIT;
    while !true_now() {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Runs a test; it fails when it takes long.
fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(3 * LIMIT, future).await.expect("no hang") })
}

/// The next event.
async fn next(events: &mut Events) -> Option<Event> {
    timeout(LIMIT, events.next()).await.expect("an event")
}
