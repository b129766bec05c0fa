//! Memory decoding, power states, and resets through configuration space.

use std::{
    fmt,
    future::Future,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use futures::channel::oneshot;
use rustix::event::{EventfdFlags, eventfd};

use super::{
    ConfigSpace, Device, Inner, Region,
    effects::{self, Effects, Places, may_matter},
    gate::{Access, Outcome, Reset, why},
    index,
    reset::{elsewhere, meanwhile},
};
use crate::{
    Error, Result,
    pci::{self, PciCapability, capability},
    reactor::{self, JoinHandle, op},
    transport::{Place, Transport, vfio::DeviceFd},
};

/// A power state of a PCI function (PCI Express Base 5.0, section 5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PowerState {
    /// Fully on.
    D0,
    /// Light sleep, which few devices have.
    D1,
    /// Deeper sleep, which few devices have.
    D2,
    /// Off but for configuration space.
    D3Hot,
}

impl Device {
    /// Resets the function through configuration space (function-level reset): by PCI Express, else by its advanced features.
    /// Meanwhile the device is [resetting](super::State::Resetting).
    ///
    /// [`Device::reset`] is the better one where both exist: of this one the kernel does not say whether it was done, which it is
    /// not while somebody else holds the lock of the device. So the [generation](Device::generation) rises, and
    /// [`Device::confirmed_generation`] does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device that has no such reset; see [`Region::write`](super::Region::write).
    pub async fn function_reset(&self) -> Result<()> {
        let (config, places) = (self.config(), self.inner.places().await?);
        if let Some(control) = places.express {
            let value: u16 = config.read(control).await?;
            return config.write(control, value | effects::EXPRESS_FLR).await;
        }
        match places.features {
            Some(control) => config.write(control, effects::AF_FLR).await,
            None => Err(Error::Unsupported { what: "a function-level reset: it has none".into() }),
        }
    }

    /// Switches the decoding of memory (COMMAND.MEM): without it no BAR answers, and the device is
    /// [unavailable](super::State::Unavailable).
    ///
    /// # Errors
    /// See [`Region::write`](super::Region::write).
    pub async fn set_memory(&self, on: bool) -> Result<()> {
        let config = self.config();
        let command: u16 = config.read(pci::offset::COMMAND).await?;
        let wanted = if on { command | pci::COMMAND_MEMORY } else { command & !pci::COMMAND_MEMORY };
        config.write(pci::offset::COMMAND, wanted).await
    }

    /// The power state that the device is in.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device without power management; see [`Region::read`](super::Region::read).
    pub async fn power(&self) -> Result<PowerState> {
        let control: u16 = self.config().read(self.power_control().await?).await?;
        Ok(match control as u8 & effects::PM_STATE {
            0 => PowerState::D0,
            1 => PowerState::D1,
            2 => PowerState::D2,
            _ => PowerState::D3Hot,
        })
    }

    /// Changes the power state. In D3hot the device is [unavailable](super::State::Unavailable), and it may not send interrupts or
    /// do DMA: stop its queues first. Many devices are reset on their way from there to D0, which the
    /// [generation](Device::generation) counts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device that does not have this state; see [`Region::write`](super::Region::write).
    pub async fn set_power(&self, state: PowerState) -> Result<()> {
        let (config, at) = (self.config(), self.power_control().await?);
        let control: u16 = config.read(at).await?;
        let wanted = control & !u16::from(effects::PM_STATE) | state as u16;
        config.write(at, wanted).await?;
        if self.power().await? != state {
            return Err(Error::Unsupported { what: format!("power state {state:?}: it did not go there") });
        }
        Ok(())
    }

    async fn power_control(&self) -> Result<u64> {
        let power = self.inner.places().await?.power;
        power.ok_or_else(|| Error::Unsupported { what: "power management: it has none".into() })
    }

    /// Lets the kernel have the device sleep as deeply as it can, whenever nothing asks for it: reads and writes by system calls
    /// wake it for as long as they last. Its mapped registers do not answer, and its state is
    /// [unavailable](super::State::Unavailable), until [`Device::exit_low_power`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device, or a kernel, that can't, [`Error::Io`] when it may sleep already.
    pub async fn enter_low_power(&self) -> Result<()> {
        self.low_power(why::LOW_POWER, 0, DeviceFd::low_power_entry).await
    }

    /// As [`Device::enter_low_power`], until the device is woken, by itself or by an access: then it is [live](super::State::Live),
    /// and what is given ends.
    ///
    /// The kernel tells of that only if the device did sleep: it may take a while to fall asleep, and an access before is not told.
    ///
    /// # Errors
    /// As for [`Device::enter_low_power`].
    pub async fn enter_low_power_until_woken(&self) -> Result<Wakeup> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let fd = Arc::new(fd.map_err(|errno| Error::io("making an eventfd for a wakeup; raise ulimit -n", errno))?);
        let (woken, receiver) = oneshot::channel();
        // Before it sleeps: also when this future is dropped midway, its state follows.
        let watch = reactor::spawn(self.watch(fd.clone(), woken));
        self.inner.wakeups.borrow_mut().push(watch);
        let entry = move |device: &DeviceFd| device.low_power_entry_with_wakeup(fd.as_fd());
        let entered = self.low_power(why::LOW_POWER, 0, entry).await;
        if entered.is_err() && !self.inner.gate.has(why::LOW_POWER) {
            self.inner.end_wakeups();
        }
        entered.map(|()| Wakeup(receiver))
    }

    /// Wakes the device, and keeps it awake.
    ///
    /// # Errors
    /// As for [`Device::enter_low_power`].
    pub async fn exit_low_power(&self) -> Result<()> {
        self.low_power(0, why::LOW_POWER, DeviceFd::low_power_exit).await?;
        self.inner.end_wakeups();
        Ok(())
    }

    async fn low_power(
        &self,
        set: u64,
        clear: u64,
        request: impl FnOnce(&DeviceFd) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (Transport::Group(attached) | Transport::Cdev(attached)) = &self.inner.transport else {
            return Err(Error::Unsupported { what: "low power: only devices of the kernel have it".into() });
        };
        let closed = self.inner.close(why::CHANGING).await?;
        let change = move |device: &DeviceFd| {
            let result = request(device);
            let outcome = if result.is_ok() { Outcome { reset: None, set, clear } } else { Outcome::default() };
            (outcome, result)
        };
        elsewhere(attached, closed, change).await
    }

    /// Waits for the wakeup, and has the gate know. It keeps nothing of the device but its gate.
    fn watch(&self, fd: Arc<OwnedFd>, woken: oneshot::Sender<()>) -> impl Future<Output = ()> + 'static {
        let gate = self.inner.gate.clone();
        async move {
            if op::eventfd_count(&fd).await.is_ok() {
                for gate in gate.family() {
                    gate.lift(why::LOW_POWER);
                }
                let _ = woken.send(());
            }
        }
    }
}

/// Ends when the device was woken: from [`Device::enter_low_power_until_woken`].
///
/// Dropped, the device sleeps on, and its state follows all the same.
pub struct Wakeup(oneshot::Receiver<()>);

impl fmt::Debug for Wakeup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wakeup").finish()
    }
}

impl Future for Wakeup {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let ended = || Error::NotReady { what: "no wakeup comes: low power was left before, or the device closed".into() };
        Pin::new(&mut self.0).poll(cx).map_err(|_| ended())
    }
}

impl Inner {
    /// Nobody waits any more for the device to wake.
    pub(super) fn end_wakeups(&self) {
        self.wakeups.take().iter().for_each(JoinHandle::abort);
    }

    /// Where the registers are that the gate has to know of.
    pub(super) async fn places(self: &Rc<Self>) -> Result<Places> {
        if let Some(places) = self.places.get() {
            return Ok(*places);
        }
        let config = ConfigSpace::new(Region::new(self.clone(), index::CONFIG));
        let found = match config.capabilities().await {
            Ok(found) => found,
            // The kernel knows them by a walk of its own, and a server what it does: nothing is known here.
            Err(Error::DeviceFault { what }) => {
                tracing::warn!(
                    what,
                    "the capabilities of a device can't be read; its resets by configuration space go unseen"
                );
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let places = read_places(&config, &found).await?;
        Ok(*self.places.get_or_init(|| places))
    }

    /// Writes to configuration space, through the gate where that does something to the device.
    pub(super) async fn write_config(self: &Rc<Self>, at: Place, bytes: &[u8]) -> Result<()> {
        let effects = match may_matter(at.offset, bytes.len()) {
            true if at.offset.saturating_add(bytes.len() as u64) <= 0x40 => Places::default().effects(at.offset, bytes),
            true => self.places().await?.effects(at.offset, bytes),
            false => Effects::default(),
        };
        let gate = &self.gate;
        let switches = effects.memory.is_some_and(|on| on == gate.has(why::MEMORY_OFF));
        let moves = effects.awake.is_some_and(|awake| awake == gate.has(why::SLEEPING));
        if !(effects.resets || switches || moves) {
            let _inside = gate.enter(Access::Control)?;
            return self.transport.write(at, bytes).await;
        }
        let places = self.places.get().copied().unwrap_or_default();
        let resets = effects.resets || moves && effects.awake == Some(true) && places.waking_resets;
        let closed = self.close(if resets { why::RESETTING } else { why::CHANGING }).await?;
        let plan = Plan {
            memory: switches.then_some(pci::offset::COMMAND),
            power: places.power.filter(|_| moves),
            awake: effects.awake,
            resets,
        };
        let bytes = bytes.to_vec();
        match &self.transport {
            Transport::User(connection) => {
                let connection = connection.clone();
                let write = async move {
                    let written = connection.region_write(at.region, at.offset, &bytes).await;
                    let mut now = [None; 2];
                    for (of, now) in plan.looks_at().into_iter().zip(&mut now).filter(|_| written.is_ok()) {
                        let mut byte = [0];
                        let Some(of) = of else { continue };
                        *now = connection.region_read(at.region, of, &mut byte).await.ok().map(|()| byte[0]);
                    }
                    (plan.outcome(&written, now), written)
                };
                meanwhile(closed, write).await
            }
            Transport::Group(attached) | Transport::Cdev(attached) => {
                let write = move |device: &DeviceFd| {
                    let written = device.write_at(at.base + at.offset, &bytes);
                    let look = |of: u64| {
                        let mut byte = [0];
                        device.read_at(at.base + of, &mut byte).ok().map(|()| byte[0])
                    };
                    let now = plan.looks_at().map(|of| of.filter(|_| written.is_ok()).and_then(look));
                    (plan.outcome(&written, now), written)
                };
                elsewhere(attached, closed, write).await
            }
        }
    }
}

/// A write that the gate is closed for.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Where to see afterwards whether memory is decoded.
    memory: Option<u64>,
    /// Where to see afterwards whether the device sleeps.
    power: Option<u64>,
    awake: Option<bool>,
    resets: bool,
}

impl Plan {
    fn looks_at(&self) -> [Option<u64>; 2] {
        [self.memory, self.power]
    }

    /// What became of it, as COMMAND and PM_CONTROL show afterwards: a device need not do what it is told.
    fn outcome(&self, written: &Result<()>, [command, power]: [Option<u8>; 2]) -> Outcome {
        let mut outcome = Outcome::default();
        let mut now = |why: u64, holds: bool| if holds { outcome.set |= why } else { outcome.clear |= why };
        if let Some(command) = command {
            now(why::MEMORY_OFF, u16::from(command) & pci::COMMAND_MEMORY == 0);
        }
        match power {
            Some(power) => now(why::SLEEPING, power & effects::PM_STATE == effects::PM_STATE),
            // A function-level reset ends in D0.
            None if self.resets && self.awake.is_none() && written.is_ok() => now(why::SLEEPING, false),
            None => {}
        }
        outcome.reset = (self.resets && written.is_ok()).then_some(Reset::Asked);
        outcome
    }
}

/// Finds the registers among the capabilities of a device.
async fn read_places(config: &ConfigSpace, found: &[PciCapability]) -> Result<Places> {
    let mut places = Places::default();
    let size = config.size().min(pci::CONFIG_SIZE);
    // The whole of each is in the first 256 bytes, or it is not one.
    let find = |id: u16, len: u64| {
        let of = found.iter().find(|capability| !capability.extended && capability.id == id);
        of.map(|capability| u64::from(capability.offset)).filter(|at| at + len <= size)
    };
    if let Some(at) = find(capability::POWER_MANAGEMENT, 8) {
        let control: u8 = config.read(at + effects::PM_CONTROL).await?;
        places.power = Some(at + effects::PM_CONTROL);
        places.waking_resets = control & effects::PM_NO_SOFT_RESET == 0;
    }
    if let Some(at) = find(capability::EXPRESS, 12) {
        let has: u32 = config.read(at + effects::EXPRESS_CAPABILITIES).await?;
        places.express = (has & effects::EXPRESS_HAS_FLR != 0).then_some(at + effects::EXPRESS_CONTROL);
    }
    if let Some(at) = find(capability::ADVANCED_FEATURES, 6) {
        let has: u8 = config.read(at + effects::AF_CAPABILITIES).await?;
        places.features = (has & effects::AF_HAS_FLR != 0).then_some(at + effects::AF_CONTROL);
    }
    Ok(places)
}
