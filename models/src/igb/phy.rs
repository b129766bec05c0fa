//! The PHY behind MDIC: an IGP03 as the 82576 has it built in, whose registers mean what IEEE 802.3 clause 22 says.

use super::spec::icr;

/// Its address.
const ADDRESS: u32 = 1;
const REGISTERS: usize = 32;
const CONTROL: usize = 0;
const STATUS: usize = 1;
/// Page select of this PHY.
const PAGE: usize = 31;

const CONTROL_RESET: u16 = 1 << 15;
const CONTROL_POWER_DOWN: u16 = 1 << 11;
const CONTROL_RESTART: u16 = 1 << 9;
/// 10 and 100 Mb/s in both duplexes, extended status, preamble suppression, negotiation possible, extended registers.
const STATUS_ABLE: u16 = 0x7949;
/// Link, negotiation complete.
const STATUS_UP: u16 = 1 << 2 | 1 << 5;

/// Bits of MDIC.
const READ: u32 = 2 << 26;
const WRITE: u32 = 1 << 26;
const READY: u32 = 1 << 28;
const INTERRUPT: u32 = 1 << 29;
const ERROR: u32 = 1 << 30;

/// The PHY and MDIC.
#[derive(Debug)]
pub(super) struct Phy {
    pub mdic: u32,
    registers: [u16; REGISTERS],
    up: bool,
    /// STATUS says "down" until it was read once after that.
    was_down: bool,
}

impl Phy {
    pub fn new() -> Self {
        Self { mdic: READY, registers: Self::initial(), up: false, was_down: true }
    }

    fn initial() -> [u16; REGISTERS] {
        let mut registers = [0; REGISTERS];
        // Negotiation on, full duplex, 1000 Mb/s.
        registers[CONTROL] = 0x1140;
        registers[2] = 0x02a8;
        registers[3] = 0x0391;
        // What we and the other end are able to: all of 10 and 100 Mb/s, pause in both directions.
        registers[4] = 0x0de1;
        registers[5] = 0x4de1;
        registers[6] = 0x000d;
        registers[7] = 0x2001;
        // 1000 Mb/s, full duplex: ours and the other end's, both receivers fine.
        registers[9] = 0x0200;
        registers[10] = 0x3800;
        registers[15] = 0x3000;
        registers
    }

    /// Back to the initial registers, as by the reset bit of CTRL.
    pub fn reset(&mut self) {
        self.registers = Self::initial();
    }

    /// Whether it is powered.
    pub fn powered(&self) -> bool {
        self.registers[CONTROL] & CONTROL_POWER_DOWN == 0
    }

    pub fn set_link(&mut self, up: bool) {
        self.up = up;
        self.was_down |= !up;
    }

    /// A write of MDIC, done at once; gives interrupt causes.
    pub fn write_mdic(&mut self, value: u32) -> u32 {
        let register = (value >> 16 & 0x1f) as usize;
        let mut mdic = value & !(READY | ERROR);
        if value >> 21 & 0x1f != ADDRESS {
            mdic |= ERROR;
        } else if value & READ == READ {
            mdic = mdic & !0xffff | u32::from(self.read(register));
        } else if value & WRITE == WRITE {
            self.write(register, value as u16);
        } else {
            mdic |= ERROR;
        }
        self.mdic = mdic | READY;
        if value & INTERRUPT != 0 { icr::MDAC } else { 0 }
    }

    fn read(&mut self, register: usize) -> u16 {
        // Registers from 16 on have pages; the whole number of a register selects its page.
        let page = self.registers[PAGE] & !0x1f;
        match register {
            STATUS => {
                let up = self.up && !std::mem::take(&mut self.was_down);
                STATUS_ABLE | if up { STATUS_UP } else { 0 }
            }
            PAGE => self.registers[PAGE],
            // Gain of the four pairs: what the cable's length is looked up with.
            17 if page != 0 => 8 << 9,
            16.. if page != 0 => 0,
            // Port status: 1000 Mb/s, full duplex.
            17 => {
                if self.up {
                    0xc200
                } else {
                    0
                }
            }
            _ => self.registers[register],
        }
    }

    fn write(&mut self, register: usize, value: u16) {
        match register {
            CONTROL if value & CONTROL_RESET != 0 => self.reset(),
            CONTROL => self.registers[CONTROL] = value & !CONTROL_RESTART,
            STATUS | 2 | 3 | 5 | 6 | 10 | 15 => {}
            16..PAGE if self.registers[PAGE] & !0x1f != 0 => {}
            _ => self.registers[register] = value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_link_and_wrong_addresses() {
        let mut phy = Phy::new();
        let read = |phy: &mut Phy, register: u32| {
            assert_eq!(phy.write_mdic(READ | ADDRESS << 21 | register << 16), 0);
            assert_eq!(phy.mdic & (READY | ERROR), READY);
            phy.mdic & 0xffff
        };
        assert_eq!((read(&mut phy, 2), read(&mut phy, 3) & 0xfff0), (0x02a8, 0x0390));
        phy.set_link(true);
        assert_eq!(read(&mut phy, 1) & 4, 0, "the link was down");
        assert_eq!(read(&mut phy, 1) & 4, 4);
        phy.set_link(false);
        phy.set_link(true);
        assert_eq!((read(&mut phy, 1) & 4, read(&mut phy, 1) & 4), (0, 4), "a short loss is seen");
        assert_eq!(phy.write_mdic(WRITE | INTERRUPT | ADDRESS << 21 | 0x0800), icr::MDAC);
        assert!(!phy.powered());
        phy.write_mdic(READ | 2 << 21);
        assert_eq!(phy.mdic & (READY | ERROR), READY | ERROR);
    }
}
