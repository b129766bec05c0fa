//! Statistics registers (section 8.19), which a read clears.

use super::spec::STATISTICS;

const COUNT: usize = 0x180 / 4;

/// Registers by their offsets.
#[derive(Debug)]
pub(super) struct Statistics([u32; COUNT]);

/// Of the registers: offsets from [`STATISTICS`].
mod at {
    pub const MPC: usize = 0x10;
    pub const PRC64: usize = 0x5c;
    pub const GPRC: usize = 0x74;
    pub const BPRC: usize = 0x78;
    pub const MPRC: usize = 0x7c;
    pub const GPTC: usize = 0x80;
    pub const GORC: usize = 0x88;
    pub const GOTC: usize = 0x90;
    pub const RNBC: usize = 0xa0;
    pub const RUC: usize = 0xa4;
    pub const ROC: usize = 0xac;
    pub const TOR: usize = 0xc0;
    pub const TOT: usize = 0xc8;
    pub const TPR: usize = 0xd0;
    pub const TPT: usize = 0xd4;
    pub const PTC64: usize = 0xd8;
    pub const MPTC: usize = 0xf0;
    pub const BPTC: usize = 0xf4;
    pub const TSCTC: usize = 0xf8;
    pub const IAC: usize = 0x100;
    pub const RPTHC: usize = 0x104;
    pub const HGPTC: usize = 0x118;
    pub const HGORC: usize = 0x128;
    pub const HGOTC: usize = 0x130;
}

/// Low halves of counters of 64 bits: they are cleared with their high halves.
const WIDE: [usize; 6] = [at::GORC, at::GOTC, at::TOR, at::TOT, at::HGORC, at::HGOTC];

/// Which of the six registers of sizes counts a packet, of `bytes` with CRC.
fn bin(bytes: u64) -> usize {
    match bytes {
        0..=64 => 0,
        65..=127 => 4,
        128..=255 => 8,
        256..=511 => 12,
        512..=1023 => 16,
        _ => 20,
    }
}

impl Default for Statistics {
    fn default() -> Self {
        Self([0; COUNT])
    }
}

impl Statistics {
    /// Whether an offset of BAR0 is one of them.
    pub fn place(offset: u64) -> Option<usize> {
        let at = offset.checked_sub(STATISTICS)?;
        (at < COUNT as u64 * 4).then_some(at as usize)
    }

    pub fn read(&mut self, at: usize) -> u32 {
        let value = self.0[at / 4];
        if WIDE.contains(&(at & !3)) {
            return value;
        }
        self.0[at / 4] = 0;
        if WIDE.contains(&((at & !3).wrapping_sub(4))) {
            self.0[at / 4 - 1] = 0;
        }
        value
    }

    #[inline]
    fn add(&mut self, at: usize, count: u32) {
        self.0[at / 4] = self.0[at / 4].wrapping_add(count);
    }

    #[inline]
    fn add_wide(&mut self, at: usize, count: u64) {
        let old = u64::from(self.0[at / 4 + 1]) << 32 | u64::from(self.0[at / 4]);
        let new = old.wrapping_add(count);
        (self.0[at / 4], self.0[at / 4 + 1]) = (new as u32, (new >> 32) as u32);
    }

    /// A frame from the wire that was of a proper length, without CRC.
    #[inline]
    pub fn arrived(&mut self, len: usize) {
        self.add(at::TPR, 1);
        self.add_wide(at::TOR, len as u64 + 4);
    }

    /// A frame that passed the filters; its first byte of the destination decides how it counts.
    #[inline]
    pub fn received(&mut self, frame: &[u8]) {
        let bytes = frame.len() as u64 + 4;
        self.add(at::GPRC, 1);
        self.add_wide(at::GORC, bytes);
        self.add(at::PRC64 + bin(bytes), 1);
        match frame {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] => self.add(at::BPRC, 1),
            [first, ..] if first & 1 != 0 => self.add(at::MPRC, 1),
            _ => {}
        }
    }

    /// A frame that was written to client memory.
    #[inline]
    pub fn written(&mut self, len: usize) {
        self.add(at::RPTHC, 1);
        self.add_wide(at::HGORC, len as u64 + 4);
    }

    /// A frame that was sent.
    #[inline]
    pub fn sent(&mut self, frame: &[u8]) {
        let bytes = frame.len() as u64 + 4;
        self.add(at::GPTC, 1);
        self.add(at::TPT, 1);
        self.add(at::HGPTC, 1);
        self.add_wide(at::GOTC, bytes);
        self.add_wide(at::TOT, bytes);
        self.add_wide(at::HGOTC, bytes);
        self.add(at::PTC64 + bin(bytes), 1);
        match frame {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] => self.add(at::BPTC, 1),
            [first, ..] if first & 1 != 0 => self.add(at::MPTC, 1),
            _ => {}
        }
    }

    pub fn segmented(&mut self) {
        self.add(at::TSCTC, 1);
    }

    pub fn no_buffer(&mut self) {
        self.add(at::RNBC, 1);
    }

    pub fn missed(&mut self, count: u64) {
        self.add(at::MPC, count as u32);
    }

    pub fn undersize(&mut self) {
        self.add(at::RUC, 1);
    }

    pub fn oversize(&mut self) {
        self.add(at::ROC, 1);
    }

    pub fn interrupts(&mut self, count: u64) {
        self.add(at::IAC, count as u32);
    }
}
