//! The NIC: bring-up, filters, link, statistics, stop. Every step has a deadline.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use vfio_uring::{
    device::{Device, Interrupt, Irq},
    dma::{HugePages, Pool},
    reactor::{JoinHandle, sleep, spawn},
};

use crate::{
    Error, LinkChanges, LinkState, Options, QueueSeed, QueueStatistics, Result, Rss, Statistics,
    link::{self, Watch},
    queue::Parts,
    regs::Regs,
    rings::{PF, Rings},
    shared::{Relay, Shared, State},
    spec::{
        self, ADDRESS_VALID, ADDRESSES, CTRL, EEMNGCTL, EIAC, EIAM, EIMC, EITR, EITR_SHIFT, GPIE, GPIE_MSIX, ICR, IMC, IMS,
        IVAR, IVAR_MISC, IVAR_VALID, LSC, MRQC, MTA, RAL, RAL16, RCTL, RETA, RLPML, RSSRK, RXCSUM, STATUS, TCTL, ctrl,
        queue, rctl, rxcsum, status, tctl,
    },
    statistics::Sums,
    watch,
};

/// A reset takes 1 ms; before that, registers must not be read (section 4.2.1.6.1).
const RESET_PAUSE: Duration = Duration::from_millis(2);
/// Vectors at the most that queues and the rest share out.
const ALL_VECTORS: u32 = (1 << 25) - 1;

/// A NIC that is up. Cloning it is cheap. It belongs to the reactor that its device was opened on.
///
/// [`Nic::stop`] ends it in order. Without that, its queues end when the last clone goes, and memory that it may still use is given
/// up, not freed.
#[derive(Clone)]
pub struct Nic(Rc<Inner>);

struct Inner {
    device: Device,
    regs: Regs,
    options: Options,
    mac: [u8; 6],
    shared: Arc<Shared>,
    sums: Sums,
    link: Rc<Watch>,
    /// Receive addresses beside the first.
    addresses: RefCell<Vec<[u8; 6]>>,
    memory: Pool,
    tasks: Vec<JoinHandle<()>>,
}

impl Nic {
    /// Resets the 82576 behind `device` and brings it up, with the queues that the options ask for. The NIC receives from now on.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for options that are out of range, [`vfio_uring::Error::Unsupported`] for too few interrupt
    /// vectors, [`Error::Nic`] when it does not do what the datasheet says, in time; [`Error::Runtime`] from the device.
    pub async fn new(device: &Device, options: Options) -> Result<(Self, Vec<QueueSeed>)> {
        options.check()?;
        let regs = Regs(device.bar(0)?);
        let outside = watch::Watch::new(device, &regs.0)?;
        device.set_bus_master(true).await?;
        reset(&regs, options.timeout).await?;
        let shared = Shared::new(options.queues.into());
        let sums = Sums::new(options.queues);
        let bytes = Parts::memory(options.rx_ring, options.tx_ring, options.buffers, options.buffer_len);
        let memory = Pool::new(device.dma(), bytes * usize::from(options.queues), HugePages::No).await?;
        let vectors = match options.interrupt {
            Some(_) => device.interrupts(Irq::MsiX, 0, u32::from(options.queues) + 1).await?,
            None => Vec::new(),
        };
        let Rings { seeds, relay, relayed } = PF.seeds(&regs, &options, &memory, &vectors, &shared, sums.counters())?;
        let mac = address(&regs).await?;
        let mut inner = Inner {
            device: device.clone(),
            regs,
            options,
            mac,
            shared,
            sums,
            link: Rc::default(),
            addresses: RefCell::default(),
            memory,
            tasks: Vec::new(),
        };
        let up = inner.bring_up(&seeds).await;
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

    /// Its MAC address, which came from the EEPROM.
    pub fn mac(&self) -> [u8; 6] {
        self.0.mac
    }

    /// The device behind it.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The options that it was brought up with.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// The DMA memory of its queues: what became of it is in its [`stats`](Pool::stats).
    pub fn memory(&self) -> &Pool {
        &self.0.memory
    }

    /// The link's state now.
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

    /// What the NIC and its queues have counted since it was brought up.
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn statistics(&self) -> Result<Statistics> {
        self.0.sums.read(&self.0.regs).await
    }

    /// What the driver has counted, of each queue: without a look at the NIC.
    pub fn queue_statistics(&self) -> Vec<QueueStatistics> {
        self.0.sums.counters().iter().map(|counters| counters.read()).collect()
    }

    /// Receives packets for all addresses, or only for its own.
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn set_promiscuous(&self, on: bool) -> Result<()> {
        const BITS: u32 = rctl::UPE | rctl::MPE;
        self.0.regs.modify(RCTL, |value| if on { value | BITS } else { value & !BITS }).await
    }

    /// Receives packets for another address, too, of a station or of a group.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Exhausted`] for more than 23 of them; [`Error::Runtime`] from the device.
    pub async fn add_mac(&self, mac: [u8; 6]) -> Result<()> {
        let inner = &*self.0;
        let entry = {
            let mut addresses = inner.addresses.borrow_mut();
            if mac == inner.mac || addresses.contains(&mac) {
                return Ok(());
            }
            // Places of addresses that were taken off are all zero.
            let free = addresses.iter().position(|address| *address == [0; 6]).unwrap_or(addresses.len());
            if free + 1 >= ADDRESSES {
                let what = "all 23 more receive addresses are in use: use set_promiscuous";
                return Err(vfio_uring::Error::Exhausted { what: what.into() }.into());
            }
            match addresses.get_mut(free) {
                Some(place) => *place = mac,
                None => addresses.push(mac),
            }
            free + 1
        };
        set_address(&inner.regs, entry, Some(mac)).await
    }

    /// Takes an address off again that was given to [`Nic::add_mac`].
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn remove_mac(&self, mac: [u8; 6]) -> Result<()> {
        let inner = &*self.0;
        let entry = {
            let mut addresses = inner.addresses.borrow_mut();
            let Some(at) = addresses.iter().position(|address| *address == mac) else { return Ok(()) };
            addresses[at] = [0; 6];
            at + 1
        };
        set_address(&inner.regs, entry, None).await
    }

    /// Receives packets for these groups: by a hash of 12 bits, so that others may come, too.
    ///
    /// # Errors
    /// [`Error::Runtime`] from the device.
    pub async fn set_multicast(&self, groups: &[[u8; 6]]) -> Result<()> {
        let mut table = [0u32; 128];
        for group in groups {
            // Bits 47 to 36 of the address: RCTL.MO is 0 (section 7.1.1.1.1).
            let hash = usize::from(group[4] >> 4) | usize::from(group[5]) << 4;
            table[hash >> 5] |= 1 << (hash & 31);
        }
        for (at, value) in (MTA..).step_by(4).zip(table) {
            self.0.regs.write(at, value).await?;
        }
        Ok(())
    }

    /// Spreads packets over the queues in another way; `None`: all go to queue 0.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for a table with queues that there are not; [`Error::Runtime`] from the device.
    pub async fn set_rss(&self, rss: Option<&Rss>) -> Result<()> {
        let options = Options { rss: rss.cloned(), ..self.0.options.clone() };
        options.check()?;
        write_rss(&self.0.regs, rss, options.queues).await
    }

    /// Stops the NIC in order: its queues end with [`Error::Stopped`], receiving and sending are turned off, and when the NIC has
    /// confirmed that, all buffers that it had go back. For one whose device was reset nothing is left to do but to wait for its
    /// queues; one whose device was unavailable is stopped when it is live again, by a clone if that was tried before.
    ///
    /// # Errors
    /// [`Error::Nic`] when it does not confirm in time, or a queue's thread does not let go: memory is given up then, and the
    /// device must not be brought up again before that queue is dropped.
    pub async fn stop(self) -> Result<()> {
        let inner = &*self.0;
        inner.shared.end(Error::Stopped);
        inner.link.end(Error::Stopped);
        let left = inner.shared.all_left(inner.options.timeout.max(Duration::from_secs(1))).await;
        if inner.shared.state() != State::Quiesced {
            if !watch::is_stopped(&inner.device).await {
                inner.disable().await?;
            }
            inner.shared.quiesce();
        }
        left.map_err(|queue| {
            Error::nic(format!(
                "is stopped, but the thread of queue {queue} has not noticed: drop the queue before the device is used again"
            ))
        })
    }
}

impl Inner {
    async fn bring_up(&self, seeds: &[QueueSeed]) -> Result<()> {
        let (regs, options) = (&self.regs, &self.options);
        self.sums.clear(regs).await?;
        // The PHY negotiates; what it finds is taken over.
        let flow = if options.flow_control { ctrl::RFCE | ctrl::TFCE } else { 0 };
        let vlan = if options.vlan_strip { ctrl::VME } else { 0 };
        const CLEARED: u32 =
            ctrl::FRCSPD | ctrl::FRCDPX | ctrl::RFCE | ctrl::TFCE | ctrl::VME | ctrl::GIO_MASTER_DISABLE | ctrl::RST;
        regs.modify(CTRL, |value| value & !CLEARED | ctrl::SLU | ctrl::FD | flow | vlan).await?;
        if regs.read(STATUS).await? & status::LU == 0 {
            regs.write_phy(0, spec::PHY_NEGOTIATE).await?;
        }
        for entry in 1..ADDRESSES {
            set_address(regs, entry, None).await?;
        }
        for at in (MTA..).step_by(4).take(128) {
            regs.write(at, 0).await?;
        }
        let checks = if options.checksums { rxcsum::IPOFL | rxcsum::TUOFL } else { 0 };
        regs.write(RXCSUM, rxcsum::PCSD | checks).await?;
        write_rss(regs, options.rss.as_ref(), options.queues).await?;
        regs.write(RLPML, (options.max_frame + 4).min(spec::MAX_FRAME) as u32).await?;
        self.write_vectors().await?;
        for seed in seeds {
            PF.enable(regs, seed, options).await?;
        }
        let long = if options.max_frame > 1518 { rctl::LPE } else { 0 };
        let promiscuous = if options.promiscuous { rctl::UPE | rctl::MPE } else { 0 };
        regs.write(TCTL, tctl::EN | tctl::PSP | tctl::COLLISIONS | tctl::RTLC).await?;
        regs.write(RCTL, rctl::EN | rctl::BAM | rctl::SECRC | long | promiscuous).await?;
        // Buffers can only be given to a receiver that is on.
        for seed in seeds {
            regs.write(PF.rx(seed.index(), queue::TAIL), u32::from(options.rx_ring) - 1).await?;
        }
        regs.flush().await
    }

    /// Each queue pair's vector, and one for the rest.
    async fn write_vectors(&self) -> Result<()> {
        let (regs, queues) = (&self.regs, u32::from(self.options.queues));
        let Some(interval) = self.options.interrupt else { return Ok(()) };
        regs.write(GPIE, GPIE_MSIX).await?;
        let mut ivar = [0u32; 8];
        for index in 0..queues {
            let both = (index | IVAR_VALID) * 0x101;
            ivar[index as usize & 7] |= both << if index >= 8 { 16 } else { 0 };
        }
        for (at, value) in (IVAR..).step_by(4).zip(ivar) {
            regs.write(at, value).await?;
        }
        regs.write(IVAR_MISC, (queues | IVAR_VALID) << 8).await?;
        for vector in 0..u64::from(queues) {
            regs.write(EITR + 4 * vector, (interval.as_micros() as u32) << EITR_SHIFT).await?;
        }
        // Each masks itself when it fires, until its queue waits again.
        let all = (2 << queues) - 1;
        regs.write(EIAC, all).await?;
        regs.write(EIAM, all).await?;
        regs.write(IMS, LSC).await
    }

    fn start_tasks(
        &mut self,
        outside: watch::Watch,
        mut vectors: Vec<Interrupt>,
        relay: Arc<Relay>,
        relayed: Vec<vfio_uring::device::Posted<u32>>,
    ) {
        if relayed.iter().any(|register| !register.is_mapped()) {
            self.tasks.push(spawn(relay.run(relayed)));
        }
        let other = vectors.pop().map(|vector| (vector, 1 << self.options.queues));
        let keep = link::keep(self.link.clone(), self.regs.clone(), other);
        let watch = outside.run(self.shared.clone(), self.link.clone(), keep);
        self.tasks.push(spawn(async move {
            // The vectors of the queues are theirs as long as the NIC is.
            let _vectors = vectors;
            watch.await;
        }));
    }

    /// Turns everything off, and waits for the NIC to confirm: after this it uses no memory.
    async fn disable(&self) -> Result<()> {
        let (regs, within) = (&self.regs, self.options.timeout);
        mask(regs).await?;
        regs.modify(RCTL, |value| value & !rctl::EN).await?;
        regs.modify(TCTL, |value| value & !tctl::EN).await?;
        regs.flush().await?;
        PF.disable(regs, self.options.queues, within).await?;
        reset(regs, within).await?;
        self.device.set_bus_master(false).await?;
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.end(Error::Stopped);
        self.link.end(Error::Stopped);
        self.tasks.iter().for_each(JoinHandle::abort);
        if self.shared.state() != State::Quiesced {
            tracing::debug!(address = %self.device.address(), "a NIC was dropped without being stopped");
        }
    }
}

impl std::fmt::Debug for Nic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nic").field("mac", &self.0.mac).field("queues", &self.0.options.queues).finish_non_exhaustive()
    }
}

/// Masks all interrupts and forgets those that are pending.
async fn mask(regs: &Regs) -> Result<()> {
    regs.write(IMC, u32::MAX).await?;
    regs.write(EIMC, ALL_VECTORS).await?;
    regs.read(ICR).await.map(drop)
}

/// Stops requests on the bus, then resets all but the PHY (section 4.2.1.6.1).
async fn reset(regs: &Regs, within: Duration) -> Result<()> {
    mask(regs).await?;
    regs.modify(CTRL, |value| value | ctrl::GIO_MASTER_DISABLE).await?;
    let quiet = |value: u32| value & status::GIO_MASTER_ENABLE == 0;
    if let Err(error) = regs.wait_for(STATUS, within, "quiet on the bus", quiet).await {
        // The reset stops it, too.
        tracing::warn!(%error, "a NIC before its reset");
    }
    regs.modify(CTRL, |value| value | ctrl::RST).await?;
    sleep(RESET_PAUSE).await;
    regs.wait_for(CTRL, within, "reset (CTRL.RST = 0)", |value| value & ctrl::RST == 0).await?;
    // Port 0's bit; the others' are above it.
    let done = |value: u32| value >> 18 & 0xf != 0;
    if let Err(error) = regs.wait_for(EEMNGCTL, within, "configured from its EEPROM", done).await {
        tracing::debug!(%error, "a NIC may have no EEPROM");
    }
    mask(regs).await
}

/// Receive address 0.
async fn address(regs: &Regs) -> Result<[u8; 6]> {
    let (low, high) = (regs.read(RAL).await?, regs.read(RAL + 4).await?);
    let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
    let mac = [a, b, c, d, e, f];
    if mac[0] & 1 != 0 || mac == [0; 6] {
        let shown = mac.map(|byte| format!("{byte:02x}")).join(":");
        return Err(Error::nic(format!("has the MAC address {shown}, which is no station's: its EEPROM is not in order")));
    }
    Ok(mac)
}

/// A receive address.
async fn set_address(regs: &Regs, entry: usize, mac: Option<[u8; 6]>) -> Result<()> {
    let at = if entry < 16 { RAL + 8 * entry as u64 } else { RAL16 + 8 * (entry as u64 - 16) };
    let [a, b, c, d, e, f] = mac.unwrap_or_default();
    let valid = if mac.is_some() { ADDRESS_VALID } else { 0 };
    // Not valid while it is written.
    regs.write(at + 4, 0).await?;
    regs.write(at, u32::from_le_bytes([a, b, c, d])).await?;
    regs.write(at + 4, u32::from_le_bytes([e, f, 0, 0]) | valid).await?;
    regs.flush().await
}

async fn write_rss(regs: &Regs, rss: Option<&Rss>, queues: u16) -> Result<()> {
    let Some(rss) = rss else { return regs.write(MRQC, 0).await };
    for (at, bytes) in (RSSRK..).step_by(4).zip(rss.key.chunks_exact(4)) {
        regs.write(at, bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))).await?;
    }
    for (at, bytes) in (RETA..).step_by(4).zip(rss.table(queues).chunks_exact(4)) {
        regs.write(at, bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))).await?;
    }
    regs.write(MRQC, rss.mrqc()).await
}
