//! A virtual function (82576 VF): a part of a NIC, with queues of its own, that the driver of the physical function lends. What it
//! may receive and be called it asks that driver for, through a [mailbox].

mod mailbox;
mod options;
mod statistics;

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use futures::StreamExt;
use mailbox::Mailbox;
pub use options::VfOptions;
use statistics::Sums;
pub use statistics::VfStatistics;
use vfio_uring::{
    device::{Device, Interrupt, Irq, Posted},
    dma::{HugePages, Pool},
    reactor::{JoinHandle, sleep, spawn, timeout},
};

use crate::{
    Error, LinkChanges, LinkState, QueueSeed, QueueStatistics, Result,
    counters::Counters,
    link::Watch,
    queue::Parts,
    regs::Regs,
    rings::{self, Rings},
    shared::{Relay, Shared, State},
    spec::{
        CTRL, EIAC, EIAM, EIMC, EIMS, EITR, EITR_SHIFT, IVAR, IVAR_MISC, IVAR_VALID, STATUS, VF_QUEUES, ctrl,
        mailbox::{
            FILTER_ADD, FILTER_CLEAR, INFO_SHIFT, SET_LONGEST, SET_MAC, SET_MULTICAST, SET_PROMISCUOUS, SET_VLAN, WORDS,
        },
        queue,
    },
    watch,
};

/// The reset of a function takes less; before that, registers are left alone.
const RESET_PAUSE: Duration = Duration::from_millis(2);
/// All its vectors.
const VECTORS: u32 = 7;
/// Time between two looks at the mailbox and the link: without an interrupt, and for safety with one.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const SAFETY_INTERVAL: Duration = Duration::from_millis(500);
/// Multicast hashes of a message: two in each word but the first.
const HASHES: usize = (WORDS - 1) * 2;
/// A virtual function that is up. Cloning it is cheap. It belongs to the reactor that its device was opened on.
///
/// When the physical function is reset (its interface goes down, say) the queues are dead: they and [`Vf::link_changes`] end with
/// [`Error::PfReset`], and with [`Error::Reset`] when this function alone was reset ([`Device::reset`]). [`Vf::stop`] it then, and
/// bring it up again.
///
/// [`Vf::stop`] ends it in order. Without that, its queues end when the last clone goes, and memory that it may still use is given
/// up, not freed.
#[derive(Clone)]
pub struct Vf(Rc<Inner>);

struct Inner {
    device: Device,
    regs: Regs,
    mailbox: Rc<Mailbox<Regs>>,
    options: VfOptions,
    mac: Cell<[u8; 6]>,
    shared: Arc<Shared>,
    counters: Vec<Arc<Counters>>,
    sums: Rc<Sums>,
    link: Rc<Watch>,
    stopped: Cell<bool>,
    memory: Pool,
    tasks: Vec<JoinHandle<()>>,
}

impl Vf {
    /// Resets the virtual function behind `device` and brings it up, with the queues that the options ask for. The physical
    /// function has to be up, with a driver. The function receives from now on.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for options that are out of range, [`vfio_uring::Error::Unsupported`] for too few interrupt
    /// vectors, [`Error::Pf`] when the physical function's driver is not there or does not answer in time, [`Error::Refused`] when
    /// it does not grant the MAC address or the longest frame, [`Error::Nic`] when the function does not do what the datasheet
    /// says, in time; [`Error::Runtime`] from the device.
    pub async fn new(device: &Device, options: VfOptions) -> Result<(Self, Vec<QueueSeed>)> {
        let common = options.common()?;
        let regs = Regs(device.bar(0)?);
        let outside = watch::Watch::new(device, &regs.0)?;
        let mailbox = Rc::new(Mailbox::new(regs.clone(), options.timeout));
        reset(&regs, options.timeout).await?;
        mailbox.ready().await?;
        let given = mailbox.reset().await?;
        device.set_bus_master(true).await?;
        let shared = Shared::new(options.queues.into());
        let counters: Vec<Arc<Counters>> = (0..options.queues).map(|_| Arc::default()).collect();
        let bytes = Parts::memory(options.rx_ring, options.tx_ring, options.buffers, options.buffer_len);
        let memory = Pool::new(device.dma(), bytes * usize::from(options.queues), HugePages::No).await?;
        let vectors = match options.interrupt {
            Some(_) => device.interrupts(Irq::MsiX, 0, u32::from(options.queues) + 1).await?,
            None => Vec::new(),
        };
        let Rings { seeds, relay, relayed } = rings::VF.seeds(&regs, &common, &memory, &vectors, &shared, &counters)?;
        let mut inner = Inner {
            device: device.clone(),
            regs,
            mailbox,
            options,
            mac: Cell::new(given.unwrap_or_default()),
            shared,
            counters,
            sums: Rc::default(),
            link: Rc::default(),
            stopped: Cell::new(false),
            memory,
            tasks: Vec::new(),
        };
        let up = inner.bring_up(&seeds, &common, given).await;
        // A reset in the midst of it proves nothing of what was written after.
        if let Err(error) = up.and_then(|()| outside.not_reset()) {
            // Proven to use no memory, if that can be had; else it is given up.
            if inner.disable().await.is_ok() {
                inner.shared.quiesce();
            }
            return Err(error);
        }
        inner.start_tasks(outside, vectors, relay, relayed);
        Ok((Self(Rc::new(inner)), seeds))
    }

    /// Its MAC address: that which the physical function gave, or granted.
    pub fn mac(&self) -> [u8; 6] {
        self.0.mac.get()
    }

    /// The device behind it.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The options that it was brought up with.
    pub fn options(&self) -> &VfOptions {
        &self.0.options
    }

    /// The DMA memory of its queues: what became of it is in its [`stats`](Pool::stats).
    pub fn memory(&self) -> &Pool {
        &self.0.memory
    }

    /// The state now of the link, which all functions of the NIC share.
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn link(&self) -> Result<LinkState> {
        Ok(LinkState::of(self.0.regs.read(STATUS).await?))
    }

    /// The link's states: the present one first, then each new one.
    pub fn link_changes(&self) -> LinkChanges {
        LinkChanges::new(self.0.link.clone())
    }

    /// What the function and its queues have counted since it was brought up.
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn statistics(&self) -> Result<VfStatistics> {
        let inner = &*self.0;
        inner.sums.collect(&inner.regs).await?;
        let mut queues = QueueStatistics::default();
        inner.counters.iter().for_each(|counters| queues += counters.read());
        Ok(inner.sums.read(queues))
    }

    /// What the driver has counted, of each queue: without a look at the function.
    pub fn queue_statistics(&self) -> Vec<QueueStatistics> {
        self.0.counters.iter().map(|counters| counters.read()).collect()
    }

    /// Takes another MAC address.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for an address of a group, [`Error::Refused`] when the physical function's user has set one;
    /// [`Error::Pf`], [`Error::PfReset`] and [`Error::Runtime`] as all that goes through the mailbox.
    pub async fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        self.0.set_mac(mac).await
    }

    /// Receives packets for another address, too. Linux grants that to functions that are trusted
    /// (`ip link set NAME vf N trust on`), and to those whose address it has not set.
    ///
    /// # Errors
    /// As [`Vf::set_mac`]; [`Error::Refused`] also when there are too many of them.
    pub async fn add_mac(&self, mac: [u8; 6]) -> Result<()> {
        options::check_mac(mac)?;
        let what = || format!("{} as one more MAC address", show(mac));
        self.0.ask(&mac_message(FILTER_ADD, mac), what).await
    }

    /// Takes off all that [`Vf::add_mac`] has added.
    ///
    /// # Errors
    /// As [`Vf::set_mac`].
    pub async fn clear_macs(&self) -> Result<()> {
        // Linux wants some address here, too, which it does not look at.
        self.0.ask(&mac_message(FILTER_CLEAR, self.mac()), || "to take MAC addresses off".into()).await
    }

    /// Receives packets for these groups, and for others with the same hash; for none if it is empty.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for more than 30 groups (use [`Vf::set_all_multicast`]); else as [`Vf::set_mac`].
    pub async fn set_multicast(&self, groups: &[[u8; 6]]) -> Result<()> {
        self.0.ask(&multicast_message(groups)?, || format!("{} multicast groups", groups.len())).await
    }

    /// Receives the packets for all groups, or only for those of [`Vf::set_multicast`].
    ///
    /// # Errors
    /// As [`Vf::set_mac`].
    pub async fn set_all_multicast(&self, on: bool) -> Result<()> {
        let info = if on { 2 } else { 0 };
        self.0.ask(&[SET_PROMISCUOUS | info << INFO_SHIFT], || "to receive all multicasts".into()).await
    }

    /// Receives packets with this VLAN's tag, beside those without a tag.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for an identifier above 4095; [`Error::Refused`] when the physical function's user has set a
    /// VLAN, or when there are too many; else as [`Vf::set_mac`].
    pub async fn add_vlan(&self, vlan: u16) -> Result<()> {
        self.0.set_vlan(vlan, true).await
    }

    /// Receives no more packets with this VLAN's tag.
    ///
    /// # Errors
    /// As [`Vf::add_vlan`].
    pub async fn remove_vlan(&self, vlan: u16) -> Result<()> {
        self.0.set_vlan(vlan, false).await
    }

    /// Stops the function in order: its queues end with [`Error::Stopped`], they are turned off, and when the function has
    /// confirmed that, all buffers that it had go back.
    ///
    /// # Errors
    /// [`Error::Nic`] when it does not confirm in time, or a queue's thread does not let go: memory is given up then, and the
    /// device must not be brought up again before that queue is dropped.
    pub async fn stop(self) -> Result<()> {
        let inner = &*self.0;
        if inner.shared.state() == State::Quiesced {
            return Ok(());
        }
        inner.shared.end(Error::Stopped);
        inner.link.end(Error::Stopped);
        let left = inner.shared.all_left(inner.options.timeout.max(Duration::from_secs(1))).await;
        inner.stopped.set(true);
        if !watch::is_stopped(&inner.device).await {
            inner.disable().await?;
        }
        inner.shared.quiesce();
        left.map_err(|queue| {
            Error::nic(format!(
                "is stopped, but the thread of queue {queue} has not noticed: drop the queue before the device is used again"
            ))
        })
    }
}

impl Inner {
    async fn bring_up(&self, seeds: &[QueueSeed], common: &crate::Options, given: Option<[u8; 6]>) -> Result<()> {
        let (regs, options) = (&self.regs, &self.options);
        match (options.mac, given) {
            (Some(mac), given) if given != Some(mac) => self.set_mac(mac).await?,
            (None, None) => self.set_mac(random_mac()).await?,
            _ => {}
        }
        // With the CRC and a VLAN tag.
        let longest = options.max_frame as u32 + 4;
        self.ask(&[SET_LONGEST, longest], || format!("frames of {longest} bytes")).await?;
        self.sums.clear(regs).await?;
        self.write_vectors().await?;
        for seed in seeds {
            rings::VF.enable(regs, seed, common).await?;
        }
        for seed in seeds {
            regs.write(rings::VF.rx(seed.index(), queue::TAIL), u32::from(options.rx_ring) - 1).await?;
        }
        regs.flush().await
    }

    /// Each queue pair's vector, and one for the mailbox.
    async fn write_vectors(&self) -> Result<()> {
        let (regs, queues) = (&self.regs, u32::from(self.options.queues));
        let Some(interval) = self.options.interrupt else { return Ok(()) };
        let pair = |index: u32| if index < queues { (index | IVAR_VALID) * 0x101 } else { 0 };
        regs.write(IVAR, pair(0) | pair(1) << 16).await?;
        regs.write(IVAR_MISC, queues | IVAR_VALID).await?;
        for vector in 0..u64::from(queues) {
            regs.write(EITR + 4 * vector, (interval.as_micros() as u32) << EITR_SHIFT).await?;
        }
        // Each masks itself when it fires, until its queue waits again.
        let all = (2 << queues) - 1;
        regs.write(EIAC, all).await?;
        regs.write(EIAM, all).await
    }

    fn start_tasks(
        &mut self,
        outside: watch::Watch,
        mut vectors: Vec<Interrupt>,
        relay: Arc<Relay>,
        relayed: Vec<Posted<u32>>,
    ) {
        let other = vectors.pop().map(|vector| (vector, 1 << self.options.queues));
        let (link, shared, sums) = (self.link.clone(), self.shared.clone(), self.sums.clone());
        let (regs, mailbox) = (self.regs.clone(), self.mailbox.clone());
        self.tasks.push(spawn(async move {
            // The vectors of the queues are theirs as long as the function is.
            let _vectors = vectors;
            let keep = keep(&regs, &mailbox, &link, &sums, other);
            outside.run(shared, link.clone(), keep).await;
        }));
        if relayed.iter().any(|register| !register.is_mapped()) {
            self.tasks.push(spawn(relay.run(relayed)));
        }
    }

    /// A request that has to be granted.
    async fn ask(&self, message: &[u32], what: impl FnOnce() -> String) -> Result<()> {
        match self.mailbox.request(message).await? {
            true => Ok(()),
            false => Err(Error::refused(what())),
        }
    }

    async fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        options::check_mac(mac)?;
        let what = || format!("the MAC address {}: it was given {}", show(mac), show(self.mac.get()));
        self.ask(&mac_message(0, mac), what).await?;
        self.mac.set(mac);
        Ok(())
    }

    async fn set_vlan(&self, vlan: u16, on: bool) -> Result<()> {
        if vlan > 4095 {
            return Err(Error::invalid(format!("the VLAN {vlan}: it can be 0 to 4095")));
        }
        let message = [SET_VLAN | u32::from(on) << INFO_SHIFT, vlan.into()];
        self.ask(&message, || format!("a change of VLAN {vlan}")).await
    }

    /// Turns everything off, and waits for the function to confirm: after this it uses no memory.
    async fn disable(&self) -> Result<()> {
        let (regs, options) = (&self.regs, &self.options);
        regs.write(EIMC, VECTORS).await?;
        rings::VF.disable(regs, options.queues, options.timeout).await?;
        reset(regs, options.timeout).await?;
        self.device.set_bus_master(false).await?;
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.end(Error::Stopped);
        self.link.end(Error::Stopped);
        self.tasks.iter().for_each(JoinHandle::abort);
        if !self.stopped.get() {
            tracing::debug!(address = %self.device.address(), "a virtual function was dropped without being stopped");
        }
    }
}

impl std::fmt::Debug for Vf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vf").field("mac", &self.mac()).field("queues", &self.0.options.queues).finish_non_exhaustive()
    }
}

/// Resets the queues and vectors of the function; the physical function hears of it.
async fn reset(regs: &Regs, within: Duration) -> Result<()> {
    regs.write(EIMC, VECTORS).await?;
    regs.write(CTRL, ctrl::RST).await?;
    sleep(RESET_PAUSE).await;
    // All that it has: another driver may have used them.
    rings::VF.disable(regs, VF_QUEUES, within).await
}

/// Keeps the link's state and the counters up to date, and looks at the mailbox, until the physical function is reset.
async fn keep(
    regs: &Regs,
    mailbox: &Mailbox<Regs>,
    link: &Watch,
    sums: &Sums,
    mut interrupt: Option<(Interrupt, u32)>,
) -> Result<()> {
    loop {
        if let Some((_, bit)) = &interrupt {
            regs.write(EIMS, *bit).await?;
        }
        mailbox.look().await?;
        link.look(regs).await?;
        // Often enough for counters that wrap.
        sums.collect(regs).await?;
        match &mut interrupt {
            Some((interrupt, _)) => match timeout(SAFETY_INTERVAL, interrupt.next()).await {
                Ok(Some(fired)) => fired?,
                Ok(None) => return Ok(()),
                Err(_) => {}
            },
            None => sleep(LOOK_INTERVAL).await,
        }
    }
}

fn mac_message(info: u32, [a, b, c, d, e, f]: [u8; 6]) -> [u32; 3] {
    [SET_MAC | info << INFO_SHIFT, u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
}

fn multicast_message(groups: &[[u8; 6]]) -> Result<[u32; WORDS]> {
    if groups.len() > HASHES {
        let groups = groups.len();
        return Err(Error::invalid(format!("{groups} multicast groups: up to {HASHES}, or set_all_multicast for all")));
    }
    let mut message = [0; WORDS];
    message[0] = SET_MULTICAST | (groups.len() as u32) << INFO_SHIFT;
    for (index, group) in groups.iter().enumerate() {
        // Bits 47 to 36 of the address, as in the table of the physical function.
        let hash = u32::from(group[4] >> 4) | u32::from(group[5]) << 4;
        message[1 + index / 2] |= hash << (index % 2 * 16);
    }
    Ok(message)
}

/// A station's address that is administered locally.
fn random_mac() -> [u8; 6] {
    let mut mac: [u8; 6] = std::array::from_fn(|_| fastrand::u8(..));
    mac[0] = mac[0] & !1 | 2;
    mac
}

fn show(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_physical_function_reads_them() {
        assert_eq!(mac_message(2, [1, 2, 3, 4, 5, 6]), [0x2_0002, 0x0403_0201, 0x0605]);
        let groups = [[1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0xab, 0xcd], [1, 0, 0, 0, 0xf0, 0xff]];
        let message = multicast_message(&groups).unwrap();
        assert_eq!(message[..4], [0x3_0003, 0x0cda_0010, 0x0fff, 0]);
        assert!(multicast_message(&[[1; 6]; 30]).is_ok() && multicast_message(&[[1; 6]; 31]).is_err());
        assert_eq!(multicast_message(&[]).unwrap(), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn made_up_addresses_are_those_of_stations() {
        for _ in 0..100 {
            let mac = random_mac();
            assert_eq!(mac[0] & 3, 2);
            assert!(options::check_mac(mac).is_ok());
        }
    }
}
