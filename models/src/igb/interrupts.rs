//! Interrupt causes, masks, vectors and moderation (section 7.3).

use std::time::{Duration, Instant};

use super::spec::{IVAR_VALID, VECTORS, gpie, icr};
use crate::device::Host;

/// The bits of EICR that are vectors.
const VECTOR_BITS: u32 = (1 << VECTORS) - 1;

/// The interrupt registers.
#[derive(Debug)]
pub(super) struct Interrupts {
    pub icr: u32,
    pub ims: u32,
    pub iam: u32,
    pub gpie: u32,
    pub eicr: u32,
    pub eims: u32,
    pub eiac: u32,
    pub eiam: u32,
    pub ivar: [u32; 8],
    pub ivar_misc: u32,
    pub eitr: [u32; VECTORS as usize],
    /// Vectors that were signalled for the causes that EICR has.
    signalled: u32,
    /// A message is due, where there are no vectors.
    message: bool,
    /// Before these times the vectors wait.
    not_before: [Option<Instant>; VECTORS as usize],
    /// Some vector waits, until then.
    waits: Option<Instant>,
}

impl Default for Interrupts {
    fn default() -> Self {
        Self {
            icr: 0,
            ims: 0,
            iam: 0,
            gpie: 0,
            eicr: 0,
            eims: 0,
            eiac: 0,
            eiam: 0,
            ivar: [0; 8],
            ivar_misc: 0,
            eitr: [0; VECTORS as usize],
            signalled: 0,
            message: false,
            not_before: [None; VECTORS as usize],
            waits: None,
        }
    }
}

/// The bit of EICR that a byte of IVAR names.
fn bit(entry: u8) -> u32 {
    let vector = u32::from(entry & 0x1f);
    if entry & IVAR_VALID != 0 && vector < VECTORS.into() { 1 << vector } else { 0 }
}

impl Interrupts {
    fn vectors(&self) -> bool {
        self.gpie & gpie::MULTIPLE_MSIX != 0
    }

    /// Whether anything can be signalled.
    pub fn enabled(&self) -> bool {
        self.ims != 0 || self.eims != 0
    }

    /// A queue has written descriptors back. Column 0 is receiving, 1 is sending.
    #[inline]
    pub fn queue(&mut self, index: usize, column: usize) {
        if self.vectors() {
            let shift = 8 * column + if index >= 8 { 16 } else { 0 };
            self.raise(bit((self.ivar[index & 7] >> shift) as u8));
        } else {
            self.cause(if column == 0 { icr::RXDW } else { icr::TXDW });
        }
    }

    /// Causes of ICR.
    pub fn cause(&mut self, causes: u32) {
        self.icr |= causes & !icr::INTA;
        self.other(causes & self.ims);
    }

    /// Causes of ICR that are not masked.
    fn other(&mut self, causes: u32) {
        if causes == 0 {
            return;
        }
        if self.vectors() {
            self.raise(bit((self.ivar_misc >> 8) as u8));
        } else {
            self.icr |= icr::INTA;
            self.message = true;
        }
    }

    /// Causes of EICR.
    #[inline]
    pub fn raise(&mut self, bits: u32) {
        self.eicr |= bits & VECTOR_BITS;
        self.signalled &= !bits;
    }

    pub fn set_ims(&mut self, bits: u32) {
        self.ims |= bits;
        self.other(bits & self.icr & !icr::INTA);
    }

    pub fn set_eims(&mut self, bits: u32) {
        self.eims |= bits;
        self.signalled &= !bits;
    }

    pub fn read_icr(&mut self, auto_mask: bool) -> u32 {
        let value = self.icr;
        if auto_mask && value & icr::INTA != 0 {
            self.ims &= !self.iam;
        }
        if self.gpie & gpie::NSICR != 0 || self.ims == 0 || value & icr::INTA != 0 {
            self.icr = 0;
            self.message = false;
        }
        value
    }

    pub fn write_icr(&mut self, bits: u32, auto_mask: bool) {
        if auto_mask {
            self.ims &= !self.iam;
        }
        self.icr &= !bits;
        if self.icr & self.ims == 0 {
            self.icr &= !icr::INTA;
        }
    }

    pub fn clear_eicr(&mut self, bits: u32) {
        self.eicr &= !bits;
        self.signalled &= !bits;
    }

    pub fn set_eitr(&mut self, vector: usize, value: u32) {
        if let (Some(register), Some(wait)) = (self.eitr.get_mut(vector), self.not_before.get_mut(vector)) {
            // Bit 31 is write-only: leave the running interval as it is.
            *register = value & !(1 << 31);
            if value >> 31 == 0 {
                *wait = None;
            }
        }
    }

    /// Microseconds between two interrupts of a vector: bits 14 to 2 of EITR.
    fn interval(&self, vector: usize) -> Duration {
        Duration::from_micros((self.eitr[vector] >> 2 & 0x1fff).into())
    }

    /// Whether a vector may be signalled now; it may not again until its interval is over.
    fn admit(&mut self, vector: usize, now: &mut Option<Instant>) -> bool {
        let interval = self.interval(vector);
        if interval.is_zero() {
            return true;
        }
        let now = *now.get_or_insert_with(Instant::now);
        if let Some(until) = self.not_before[vector].filter(|&until| now < until) {
            self.waits = Some(self.waits.map_or(until, |other| other.min(until)));
            return false;
        }
        self.not_before[vector] = Some(now + interval);
        true
    }

    /// Signals what is due; how much.
    #[inline]
    pub fn deliver(&mut self, host: &mut impl Host) -> u64 {
        let due = self.eicr & self.eims & !self.signalled;
        if due == 0 && !self.message {
            return 0;
        }
        self.deliver_due(due, host)
    }

    fn deliver_due(&mut self, mut due: u32, host: &mut impl Host) -> u64 {
        let (mut now, mut count) = (None, 0);
        self.waits = None;
        if self.message && self.admit(0, &mut now) {
            self.message = false;
            host.signal_msi();
            count += 1;
        }
        while due != 0 {
            let vector = due.trailing_zeros();
            let bit = 1 << vector;
            due &= !bit;
            if !self.admit(vector as usize, &mut now) {
                continue;
            }
            host.signal(vector as u16);
            count += 1;
            if self.eiac & bit != 0 {
                self.eicr &= !bit;
            } else {
                self.signalled |= bit;
            }
            if self.gpie & gpie::EIAME != 0 {
                self.eims &= !(self.eiam & bit);
            }
        }
        count
    }

    /// How long until a vector that waits is due.
    pub fn waits(&self) -> Option<Duration> {
        self.waits.map(|until| until.saturating_duration_since(Instant::now()))
    }
}
