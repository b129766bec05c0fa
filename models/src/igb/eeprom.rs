//! The EEPROM (section 6): 64 words, of which software reads the address and the checksum.

use super::spec::eecd;

const WORDS: usize = 64;
const CHECKSUM: usize = 0x3f;
/// Words 0 to 0x3f sum up to this.
const SUM: u16 = 0xbaba;
/// Bits of EERD.
const START: u32 = 1;
const DONE: u32 = 2;

/// The EEPROM with its registers.
#[derive(Debug)]
pub(super) struct Eeprom {
    words: [u16; WORDS],
    pub eerd: u32,
    eecd: u32,
}

impl Eeprom {
    pub fn new(mac: [u8; 6]) -> Self {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(mac.chunks_exact(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        // Device and vendor; flow control advertised in both directions; pointers to nothing.
        words[0x0d] = 0x10c9;
        words[0x0e] = 0x8086;
        words[0x0f] = 0x3000;
        words[0x37] = 0xffff;
        words[0x3d] = 0xffff;
        let sum = words.iter().fold(0u16, |sum, &word| sum.wrapping_add(word));
        words[CHECKSUM] = SUM.wrapping_sub(sum);
        Self { words, eerd: DONE, eecd: 0 }
    }

    /// A read of a word, done at once; what is not there reads as erased.
    pub fn write_eerd(&mut self, value: u32) {
        if value & START != 0 {
            let address = (value >> 2 & 0x3fff) as usize;
            let word = self.words.get(address).copied().unwrap_or(0xffff);
            self.eerd = u32::from(word) << 16 | value & 0xfffc | DONE;
        }
    }

    pub fn eecd(&self) -> u32 {
        let granted = if self.eecd & eecd::REQ != 0 { eecd::REQ | eecd::GNT } else { 0 };
        eecd::STATE | granted
    }

    pub fn write_eecd(&mut self, value: u32) {
        self.eecd = value;
    }
}
