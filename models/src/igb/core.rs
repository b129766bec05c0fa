//! What receiving and sending share: registers, counters, interrupts, the wire.

use super::{
    Counters,
    interrupts::Interrupts,
    ring::Area,
    spec::{
        CTRL, CTRL_EXT, MRQC, MTA, RAL, RAL16, RCTL, RETA, RLPML, RSSRK, RX_QUEUES, RXCSUM, RXPBS, TCTL, TXPBS, VET, VFTA,
        ctrl, rctl, tctl,
    },
    statistics::Statistics,
    wire::Port,
};

const COUNT: usize = (RX_QUEUES / 4) as usize;
/// Receive addresses.
const ADDRESSES: u64 = 24;
const ADDRESS_VALID: u32 = 1 << 31;

/// Registers below those of the queues that keep what is written to them. Offsets from, and up to.
const KEPT: [(u64, u64); 22] = [
    (CTRL_EXT, CTRL_EXT + 4),
    (0x0024, 0x0040),
    (0x00c4, 0x00c8),
    (RCTL, RCTL + 4),
    (0x0170, 0x017c),
    (TCTL, 0x0414),
    (0x0458, 0x045c),
    (0x0c80, 0x0c94),
    (0x0e00, 0x0e18),
    (0x1000, 0x100c),
    (0x1048, 0x1050),
    (0x2160, 0x2174),
    (0x2404, 0x240c),
    (0x2460, 0x2518),
    (0x3404, 0x3434),
    (0x3500, 0x3720),
    (0x4200, 0x422c),
    (RXCSUM, 0x500c),
    (MTA, 0x5b00),
    (0x5b44, 0x5b50),
    (0x5bb8, 0x5f60),
    (0xa000, 0xb700),
];

/// Registers that only keep what is written to them.
#[derive(Debug)]
pub(super) struct Registers(Box<[u32; COUNT]>);

impl Registers {
    pub fn new() -> Self {
        Self(Box::new([0; COUNT]))
    }

    #[inline]
    pub fn get(&self, offset: u64) -> u32 {
        self.0.get((offset / 4) as usize).copied().unwrap_or(0)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        if let Some(register) = self.0.get_mut((offset / 4) as usize) {
            *register = value;
        }
    }

    /// Whether software can write it.
    pub fn keeps(offset: u64) -> bool {
        KEPT.iter().any(|&(from, to)| (from..to).contains(&offset))
    }

    pub fn reset(&mut self, mac: [u8; 6]) {
        self.0.fill(0);
        self.set(CTRL, ctrl::FD | ctrl::SPD_1000 | 1 << 20);
        self.set(VET, 0x8100_8100);
        self.set(RXPBS, 0x40);
        self.set(TXPBS, 0x28);
        self.set(RLPML, 0x2600);
        self.set(TCTL, 0xff << 4 | tctl::PSP);
        self.load_address(mac);
    }

    /// Receive address 0, as it comes from the EEPROM.
    pub fn load_address(&mut self, mac: [u8; 6]) {
        let [a, b, c, d, e, f] = mac;
        self.set(RAL, u32::from_le_bytes([a, b, c, d]));
        self.set(RAL + 4, u32::from_le_bytes([e, f, 0, 0]) | ADDRESS_VALID);
    }

    /// The valid receive addresses, each in the low 48 bits.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        (0..ADDRESSES).filter_map(|i| {
            let at = if i < 16 { RAL + 8 * i } else { RAL16 + 8 * (i - 16) };
            let (low, high) = (self.get(at), self.get(at + 4));
            (high & ADDRESS_VALID != 0).then_some(u64::from(high & 0xffff) << 32 | u64::from(low))
        })
    }

    /// The bit of MTA for an address, as [`Registers::addresses`] has it.
    pub fn multicast_hash_hits(&self, address: u64) -> bool {
        let shift = [36, 35, 34, 32][(self.get(RCTL) >> rctl::MO_SHIFT & 3) as usize];
        let hash = address >> shift & 0xfff;
        self.get(MTA + 4 * (hash >> 5)) >> (hash & 31) & 1 != 0
    }

    /// Whether VFTA has a VLAN.
    pub fn vlan_hits(&self, vlan: u16) -> bool {
        let vlan = u64::from(vlan & 0xfff);
        self.get(VFTA + 4 * (vlan >> 5)) >> (vlan & 31) & 1 != 0
    }

    /// The queue that RETA has for a hash.
    pub fn queue_of(&self, hash: u32) -> usize {
        let entry = u64::from(hash & 0x7f);
        (self.get(RETA + (entry & !3)) >> (8 * (entry & 3)) & 0xf) as usize
    }

    pub fn rss_key(&self) -> [u8; 40] {
        std::array::from_fn(|i| (self.get(RSSRK + (i as u64 & !3)) >> (8 * (i & 3))) as u8)
    }

    /// Whether a register is part of what is derived from registers: addresses, the key.
    pub fn is_derived_from(offset: u64) -> bool {
        (RAL..RAL16 + 0x40).contains(&offset) || (RSSRK..RSSRK + 40).contains(&offset) || offset == MRQC
    }

    /// The Ethernet type of VLAN tags.
    #[inline]
    pub fn vlan_type(&self) -> u16 {
        self.get(VET) as u16
    }
}

/// What receiving and sending share.
#[derive(Debug)]
pub(super) struct Core {
    pub registers: Registers,
    pub area: Area,
    pub interrupts: Interrupts,
    pub statistics: Statistics,
    pub counters: Counters,
    pub port: Port,
    /// Whether the link is up.
    pub link: bool,
}
