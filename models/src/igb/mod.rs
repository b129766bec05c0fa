//! An Intel 82576 gigabit NIC (8086:10c9), as Linux's igb driver, DPDK's and QEMU know it.
//!
//! [`Nic`] is a [`Device`](crate::device::Device) for [`Server`]; [`spawn`] starts one in a thread of its own, [`pair`] two with a
//! cable between them. A [`Wire`] says where the cable leads to: another NIC, a pcap file, a TAP interface, a packet generator.
//! No memory is allocated for a packet.
//!
//! Modelled are 16 receive and 16 transmit queues with legacy and advanced one-buffer descriptors, RSS, MAC and VLAN filters,
//! VLAN tags, checksums, segmentation of TCP and UDP, 25 MSI-X vectors or one MSI with masks and moderation, the EEPROM, the PHY,
//! statistics and flow control. Not modelled are SR-IOV and VMDq, header split (packets arrive unsplit), time stamps, wake-up,
//! IPsec and MACsec, and speeds other than 1000 Mb/s (which is what registers say; packets go as fast as memory is copied).
//!
//! # Doorbells
//! The registers of the queues, from 0xc000 (receive) and 0xe000 (transmit) on, are in memory that a client may map, unless
//! [`Config::mapped_queues`] says no; a tail is then a store, and the NIC polls it. All registers there mean the same mapped or
//! by messages, except *when*: a write by a message has taken effect when its reply comes, one to the mapping some rounds of
//! polling later. A driver therefore sets queues up as it likes, but turns them off by a message: RXDCTL or TXDCTL of the queue,
//! RCTL, TCTL, or a reset (these three are never mapped). After the reply the NIC does not touch the queue's memory any more; that
//! RXDCTL.ENABLE reads as 0 in the mapping does not say this, since it is only what was written. RQDPC reads as 0, since a
//! mapping can't be cleared by reading it: [`Handle::counters`] and RNBC have the numbers. Writes to the registers of queues 0 to
//! 3 at their old places (0x2800, 0x3800), which Linux uses, are always messages.

mod assembly;
mod config;
mod core;
mod device;
mod eeprom;
mod handle;
mod interrupts;
mod offload;
mod packet;
mod phy;
mod ring;
mod rss;
mod rx;
pub mod spec;
mod statistics;
mod tx;
mod wire;

use std::io;

pub use self::{
    config::Config,
    handle::{Cause, Counters, Handle},
    wire::{Generator, Pcap, Peer, Tap, Wire},
};
use self::{
    core::{Core, Registers},
    eeprom::Eeprom,
    interrupts::Interrupts,
    phy::Phy,
    ring::Area,
    rx::Rx,
    spec::{
        BAR_SIZE, CTRL, CTRL_EXT, EECD, EEMNGCTL, EERD, EIAC, EIAM, EICR, EICS, EIMC, EIMS, EITR, FWSM, GPIE, IAM, ICR, ICS,
        IMC, IMS, IVAR, IVAR_MISC, MDIC, MSIX_BAR_SIZE, RCTL, STATUS, SW_FW_SYNC, SWSM, TCTL, VECTORS, ctrl, ctrl_ext, icr,
        rctl, status, tctl,
    },
    statistics::Statistics,
    tx::Tx,
    wire::Port,
};
use crate::{
    pci::{ConfigSpace, Identity},
    server::{Running, Server},
};

const IDENTITY: Identity = Identity { vendor: 0x8086, device: 0x10c9, class: 0x02_00_00, revision: 1 };
/// BAR3 has the MSI-X table, and the pending bits from here on.
const MSIX_BAR: usize = 3;
const PENDING: u32 = 0x2000;
/// Rounds between two looks at what clients change rarely.
const LOOK: u32 = 64;
/// Frames on the cable between two NICs in each direction.
const PAIR_FRAMES: usize = 1024;
/// Bits of EEMNGCTL: configuration of both ports is done.
const CONFIG_DONE: u32 = 3 << 18;
/// Bits of SWSM.
const SMBI: u32 = 1;
const SWESMBI: u32 = 2;

/// Starts a NIC behind a socket of its own, in a thread of its own.
///
/// # Errors
/// An address that is not possible, or a system without memfds, sockets or threads to give.
pub fn spawn(config: Config) -> io::Result<Running> {
    Running::start(Server::new(Nic::new(config)?)?)
}

/// Starts two NICs, each as [`spawn`] does, with a cable between them in place of their wires.
///
/// # Errors
/// As of [`spawn`].
pub fn pair(one: Config, other: Config) -> io::Result<(Running, Running)> {
    let (a, b) = Wire::peers(PAIR_FRAMES)?;
    Ok((spawn(one.with_wire(a))?, spawn(other.with_wire(b))?))
}

/// The NIC.
#[derive(Debug)]
pub struct Nic {
    mac: [u8; 6],
    handle: Handle,
    pci: ConfigSpace,
    msix: Box<[u8]>,
    eeprom: Eeprom,
    phy: Phy,
    core: Core,
    rx: Rx,
    tx: Tx,
    /// Of STATUS: the PHY was reset.
    phy_reset: bool,
    semaphore: u32,
    sw_fw_sync: u32,
    round: u32,
}

impl Nic {
    /// A NIC at its initial registers.
    ///
    /// # Errors
    /// An address that is not possible, or no memfd to be had.
    pub fn new(config: Config) -> io::Result<Self> {
        config.check()?;
        let Config { mac, wire, mapped_queues, handle } = config;
        let pci = ConfigSpace::new(IDENTITY)
            .memory_bar32(0, BAR_SIZE as u32)
            .memory_bar32(MSIX_BAR, MSIX_BAR_SIZE as u32)
            .power_management()
            .msi()
            .msix_in(MSIX_BAR, VECTORS, 0, PENDING)
            .express();
        let core = Core {
            registers: Registers::new(),
            area: Area::new(mapped_queues)?,
            interrupts: Interrupts::default(),
            statistics: Statistics::default(),
            counters: Counters::default(),
            port: Port::new(wire, mac, &handle),
            link: false,
        };
        let mut nic = Self {
            mac,
            handle,
            pci,
            msix: vec![0; MSIX_BAR_SIZE as usize].into(),
            eeprom: Eeprom::new(mac),
            phy: Phy::new(),
            core,
            rx: Rx::new(),
            tx: Tx::new(),
            phy_reset: true,
            semaphore: 0,
            sw_fw_sync: 0,
            round: 0,
        };
        nic.reset_all();
        Ok(nic)
    }

    /// Its cable and its counters.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Everything, as after power-on.
    fn reset_all(&mut self) {
        self.pci.reset();
        self.msix.fill(0);
        for entry in self.msix.chunks_exact_mut(16).take(VECTORS.into()) {
            entry[12] = 1;
        }
        self.phy.reset();
        self.phy_reset = true;
        self.reset_mac();
    }

    /// CTRL.RST (section 4.2.1): all but the PHY and configuration space.
    fn reset_mac(&mut self) {
        self.core.registers.reset(self.mac);
        self.core.area.reset();
        self.core.interrupts = Interrupts::default();
        self.core.statistics = Statistics::default();
        self.rx.forget();
        (self.semaphore, self.sw_fw_sync) = (0, 0);
        self.eeprom = Eeprom::new(self.mac);
        self.look();
        self.handle.publish(&self.core.counters);
    }

    /// Whether packets are taken from the wire.
    fn receives(&self) -> bool {
        self.core.link && self.core.registers.get(RCTL) & rctl::EN != 0
    }

    /// Looks at what changes rarely: the link, and which queues there are.
    fn look(&mut self) {
        self.round = 0;
        let link = self.core.port.link(self.handle.link() && self.phy.powered());
        if link != self.core.link {
            tracing::debug!(link, "link");
            self.core.link = link;
            self.phy.set_link(link);
            self.core.interrupts.cause(icr::LSC);
        }
        let pause = self.core.registers.get(CTRL) & ctrl::TFCE != 0;
        self.core.port.listen(self.receives(), pause);
        self.core.statistics.missed(self.core.port.missed());
        self.rx.sync(&mut self.core);
        self.tx.sync(&mut self.core);
    }

    fn status(&self) -> u32 {
        let mut value = status::FD | status::SPEED_1000 | status::PF_RST_DONE;
        for (bit, on) in [
            (status::LU, self.core.link),
            (status::TXOFF, self.tx.paused),
            (status::PHYRA, self.phy_reset),
            (status::GIO_MASTER_ENABLE, self.core.registers.get(CTRL) & ctrl::GIO_MASTER_DISABLE == 0),
        ] {
            value |= if on { bit } else { 0 };
        }
        value
    }

    fn auto_mask(&self) -> bool {
        self.core.registers.get(CTRL_EXT) & ctrl_ext::IAME != 0
    }

    fn register(&mut self, offset: u64) -> u32 {
        if let Some(place) = Area::place(offset) {
            return self.core.area.load(place);
        }
        if let Some(place) = Statistics::place(offset) {
            // What the other end counted for us is due now.
            self.core.statistics.missed(self.core.port.missed());
            return self.core.statistics.read(place);
        }
        let auto_mask = self.auto_mask();
        let interrupts = &mut self.core.interrupts;
        match offset {
            STATUS => self.status(),
            EECD => self.eeprom.eecd(),
            EERD => self.eeprom.eerd,
            MDIC => self.phy.mdic,
            EEMNGCTL => CONFIG_DONE,
            ICR | 0xc0 => interrupts.read_icr(auto_mask),
            IMS | 0xd0 => interrupts.ims,
            IAM | 0xe0 => interrupts.iam,
            GPIE => interrupts.gpie,
            EIMS => interrupts.eims,
            EIAC => interrupts.eiac,
            EIAM => interrupts.eiam,
            EICR => {
                let value = interrupts.eicr;
                interrupts.clear_eicr(value);
                value
            }
            EITR..0x16e4 => interrupts.eitr.get((offset - EITR) as usize / 4).copied().unwrap_or(0),
            IVAR..0x1720 => interrupts.ivar.get((offset - IVAR) as usize / 4).copied().unwrap_or(0),
            IVAR_MISC => interrupts.ivar_misc,
            // Reading it takes it.
            SWSM => {
                let value = self.semaphore;
                self.semaphore |= SMBI;
                value
            }
            SW_FW_SYNC => self.sw_fw_sync,
            FWSM => 0,
            _ => self.core.registers.get(offset),
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        if let Some(place) = Area::place(offset) {
            self.core.area.write(place, value);
            return self.look();
        }
        let auto_mask = self.auto_mask();
        let interrupts = &mut self.core.interrupts;
        match offset {
            CTRL | 0x04 => self.control(value),
            STATUS => self.phy_reset &= value & status::PHYRA != 0,
            EECD => self.eeprom.write_eecd(value),
            EERD => self.eeprom.write_eerd(value),
            MDIC => {
                let causes = self.phy.write_mdic(value);
                self.core.interrupts.cause(causes);
                self.look();
            }
            ICR | 0xc0 => interrupts.write_icr(value, auto_mask),
            ICS | 0xc8 => interrupts.cause(value),
            IMS | 0xd0 => interrupts.set_ims(value),
            IMC | 0xd8 => interrupts.ims &= !value,
            IAM | 0xe0 => interrupts.iam = value,
            GPIE => interrupts.gpie = value,
            EICS => interrupts.raise(value),
            EIMS => interrupts.set_eims(value),
            EIMC => interrupts.eims &= !value,
            EIAC => interrupts.eiac = value,
            EIAM => interrupts.eiam = value,
            EICR => interrupts.clear_eicr(value),
            EITR..0x16e4 => interrupts.set_eitr((offset - EITR) as usize / 4, value),
            IVAR..0x1720 => {
                if let Some(register) = interrupts.ivar.get_mut((offset - IVAR) as usize / 4) {
                    *register = value;
                }
            }
            IVAR_MISC => interrupts.ivar_misc = value,
            SWSM => self.semaphore = value & (SMBI | SWESMBI),
            SW_FW_SYNC => self.sw_fw_sync = value,
            _ if Registers::keeps(offset) => self.keep(offset, value),
            _ => tracing::trace!(offset, value, "a register that is not there or read-only"),
        }
    }

    /// CTRL.
    fn control(&mut self, value: u32) {
        if value & ctrl::RST != 0 {
            tracing::debug!("reset by CTRL");
            return self.reset_mac();
        }
        if value & ctrl::PHY_RST != 0 {
            self.phy.reset();
            self.phy_reset = true;
        }
        self.core.registers.set(CTRL, value & !ctrl::PHY_RST);
        self.look();
    }

    /// A register that keeps what is written to it.
    fn keep(&mut self, offset: u64, value: u32) {
        let old = self.core.registers.get(offset);
        self.core.registers.set(offset, value);
        match offset {
            CTRL_EXT => {
                self.core.registers.set(CTRL_EXT, value & !ctrl_ext::EE_RST);
                if value & ctrl_ext::EE_RST != 0 {
                    self.core.registers.load_address(self.mac);
                    self.rx.forget();
                }
            }
            RCTL if (old ^ value) & rctl::EN != 0 => self.look(),
            TCTL if (old ^ value) & tctl::EN != 0 => self.look(),
            _ if Registers::is_derived_from(offset) => self.rx.forget(),
            _ => {}
        }
    }
}
