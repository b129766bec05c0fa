//! What one job does next, and what it has measured: no I/O in here.

use std::collections::BTreeMap;

use super::{
    report::{Direction, Recorder},
    verify::{Mismatch, Pattern},
};
use crate::args::Rw;

/// Kinds of errors that are told apart.
const MAX_ERROR_KINDS: usize = 16;
/// What the kinds above that are counted under.
const OTHER_ERRORS: &str = "other errors";

/// One I/O.
#[derive(Debug, Clone, Copy, Default)]
pub struct Io {
    pub lba: u64,
    pub write: bool,
    /// With data that is verified: which write to its blocks it is, or whose data it reads.
    generation: Option<u32>,
}

/// A walk over a range of a namespace.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    pub rw: Rw,
    /// Percentage of reads where reads and writes are mixed.
    pub read_percent: u8,
    /// Ends after one I/O for each unit of the range.
    pub once: bool,
}

/// The part of a namespace that a job has to itself, in units of the I/O size.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub first_lba: u64,
    pub unit_blocks: u64,
    pub units: u64,
}

/// Which writes the units of a range hold, so that reads can be checked.
///
/// A unit has one I/O at a time: which of a read and a write under way is first, nobody says.
pub struct Ledger {
    pattern: Pattern,
    /// Per unit, the generation of its last write, and the flags below.
    units: Vec<u32>,
    pub checked: u64,
    pub mismatches: u64,
    pub first_mismatch: Option<Mismatch>,
}

/// An I/O is under way.
const BUSY: u32 = 1 << 31;
/// Nothing was written yet, or a write failed: it may have been done or not.
const UNKNOWN: u32 = 1 << 30;

/// The state of a job.
pub struct Work {
    range: Range,
    walk: Walk,
    rng: fastrand::Rng,
    next: u64,
    left: u64,
    pub ledger: Option<Ledger>,
    pub recorder: Recorder,
    errors: BTreeMap<String, u64>,
    stopped: bool,
}

impl Ledger {
    pub fn new(pattern: Pattern, units: u64) -> Self {
        Self { pattern, units: vec![UNKNOWN; units as usize], checked: 0, mismatches: 0, first_mismatch: None }
    }

    /// The unit itself, or the next one that has no I/O under way.
    fn free_unit(&self, unit: u64) -> u64 {
        let units = self.units.len() as u64;
        // There are at least as many units as I/Os, so that one is free.
        (unit..units).chain(0..unit).find(|&unit| self.units[unit as usize] & BUSY == 0).unwrap_or(unit)
    }

    fn start(&mut self, unit: u64, io: &mut Io, data: &mut [u8]) {
        let held = self.units[unit as usize];
        self.units[unit as usize] = held | BUSY;
        let generation = held & !UNKNOWN;
        if io.write {
            let generation = (generation + 1) & !(UNKNOWN | BUSY);
            self.pattern.fill(data, io.lba, generation);
            io.generation = Some(generation);
        } else {
            io.generation = (held & UNKNOWN == 0).then_some(generation);
        }
    }

    fn finish(&mut self, unit: u64, io: &Io, good: bool, data: &[u8]) {
        let held = self.units[unit as usize] & !BUSY;
        let Some(generation) = io.generation.filter(|_| !io.write) else {
            let flag = if good { 0 } else { UNKNOWN };
            self.units[unit as usize] = io.generation.map_or(held, |written| written | flag);
            return;
        };
        self.units[unit as usize] = held;
        if good {
            let (mismatches, first) = self.pattern.check(data, io.lba, generation);
            self.checked += (data.len() / self.pattern.block_size) as u64;
            self.mismatches += mismatches;
            self.first_mismatch = self.first_mismatch.or(first);
        }
    }
}

impl Work {
    /// Work on `range` that does nothing until it is given a walk.
    pub fn new(range: Range, seed: u64, ledger: Option<Ledger>) -> Self {
        Self {
            range,
            walk: Walk { rw: Rw::Read, read_percent: 100, once: true },
            rng: fastrand::Rng::with_seed(seed),
            next: 0,
            left: 0,
            ledger,
            recorder: Recorder::new(),
            errors: BTreeMap::new(),
            stopped: false,
        }
    }

    /// Begins a walk; the measurements start anew, errors and what was verified add up.
    pub fn begin(&mut self, walk: Walk) {
        self.walk = walk;
        self.next = 0;
        self.left = if walk.once { self.range.units } else { u64::MAX };
        self.stopped = false;
        self.recorder = Recorder::new();
    }

    /// Units of the range.
    pub fn units(&self) -> u64 {
        self.range.units
    }

    /// Nothing more is to be started.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// The next I/O, its data in `data` if it writes; `None` at the end.
    #[inline]
    pub fn start(&mut self, data: &mut [u8]) -> Option<Io> {
        if self.stopped || self.left == 0 {
            return None;
        }
        self.left -= 1;
        let mut unit = if self.walk.rw.random() { self.random_unit() } else { self.next_unit() };
        if let Some(ledger) = &self.ledger {
            unit = ledger.free_unit(unit);
        }
        let write = match self.walk.rw {
            Rw::Read | Rw::Randread => false,
            Rw::Write | Rw::Randwrite => true,
            Rw::Randrw => self.rng.u8(0..100) >= self.walk.read_percent,
        };
        let mut io = Io { lba: self.range.first_lba + unit * self.range.unit_blocks, write, generation: None };
        if let Some(ledger) = &mut self.ledger {
            ledger.start(unit, &mut io, data);
        }
        Some(io)
    }

    #[inline]
    fn random_unit(&mut self) -> u64 {
        // The high half of the product is below the number of units. Its bias does not matter here.
        ((u128::from(self.rng.u64(..)) * u128::from(self.range.units)) >> 64) as u64
    }

    fn next_unit(&mut self) -> u64 {
        let unit = self.next;
        self.next = if unit + 1 == self.range.units { 0 } else { unit + 1 };
        unit
    }

    /// An I/O has ended.
    #[inline]
    pub fn finish(&mut self, io: Io, nanos: u64, result: vfio_uring_nvme::Result<()>, data: &[u8]) {
        if let Some(ledger) = &mut self.ledger {
            let unit = (io.lba - self.range.first_lba) / self.range.unit_blocks;
            ledger.finish(unit, &io, result.is_ok(), data);
        }
        match result {
            Ok(()) => self.recorder.record(if io.write { Direction::Write } else { Direction::Read }, nanos),
            Err(error) => self.count_error(error.to_string()),
        }
    }

    #[cold]
    fn count_error(&mut self, kind: String) {
        let known = self.errors.len() < MAX_ERROR_KINDS || self.errors.contains_key(&kind);
        *self.errors.entry(if known { kind } else { OTHER_ERRORS.into() }).or_default() += 1;
    }

    /// Errors so far, by kind.
    pub fn errors(&self) -> &BTreeMap<String, u64> {
        &self.errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range { first_lba: 100, unit_blocks: 8, units: 16 };

    fn work(rw: Rw, once: bool, verify: bool) -> Work {
        let ledger = verify.then(|| Ledger::new(Pattern { seed: 1, block_size: 512 }, RANGE.units));
        let mut work = Work::new(RANGE, 1, ledger);
        work.begin(Walk { rw, read_percent: 50, once });
        work
    }

    fn errors(work: &Work) -> u64 {
        work.errors().values().sum()
    }

    #[test]
    fn a_walk_that_is_done_once_visits_each_unit() {
        let mut work = work(Rw::Read, true, false);
        let lbas: Vec<_> = std::iter::from_fn(|| work.start(&mut []).map(|io| io.lba)).collect();
        assert_eq!(lbas, (0..16).map(|unit| 100 + unit * 8).collect::<Vec<_>>());
    }

    #[test]
    fn random_units_stay_in_the_range_and_reach_all_of_it() {
        let mut work = work(Rw::Randread, false, false);
        let mut seen = [0; 16];
        for _ in 0..1000 {
            let io = work.start(&mut []).unwrap();
            assert!((io.lba - 100).is_multiple_of(8));
            seen[((io.lba - 100) / 8) as usize] += 1;
        }
        assert!(seen.iter().all(|&times| times > 20), "{seen:?}");
    }

    #[test]
    fn a_unit_has_one_verified_io_at_a_time() {
        let mut work = work(Rw::Randrw, false, true);
        let mut data = [0; 4096];
        let mut lbas: Vec<_> = (0..16).map(|_| work.start(&mut data).unwrap().lba).collect();
        lbas.sort();
        lbas.dedup();
        assert_eq!(lbas.len(), 16);
    }

    #[test]
    fn reads_are_checked_against_the_last_write() {
        let mut work = work(Rw::Write, true, true);
        let mut disk = BTreeMap::new();
        let mut data = vec![0; 4096];
        while let Some(io) = work.start(&mut data) {
            disk.insert(io.lba, data.clone());
            work.finish(io, 1, Ok(()), &data);
        }
        work.begin(Walk { rw: Rw::Randrw, read_percent: 50, once: false });
        for _ in 0..500 {
            let io = work.start(&mut data).unwrap();
            if io.write {
                disk.insert(io.lba, data.clone());
            }
            work.finish(io, 1, Ok(()), &disk[&io.lba]);
        }
        let ledger = work.ledger.as_ref().unwrap();
        assert!(ledger.checked > 8 * 200);
        assert_eq!((ledger.mismatches, errors(&work)), (0, 0));

        // One block of one unit is spoilt.
        disk.get_mut(&140).unwrap()[513] ^= 1;
        work.begin(Walk { rw: Rw::Read, read_percent: 100, once: true });
        while let Some(io) = work.start(&mut data) {
            work.finish(io, 1, Ok(()), &disk[&io.lba]);
        }
        let ledger = work.ledger.as_ref().unwrap();
        assert_eq!((ledger.mismatches, ledger.first_mismatch.unwrap().lba), (1, 141));
    }

    #[test]
    fn what_a_failed_write_left_is_not_judged() {
        let mut work = work(Rw::Write, true, true);
        let mut data = vec![0; 4096];
        while let Some(io) = work.start(&mut data) {
            work.finish(io, 1, Err(vfio_uring_nvme::Error::Full(1)), &data);
        }
        assert_eq!(errors(&work), 16);
        work.begin(Walk { rw: Rw::Read, read_percent: 100, once: true });
        while let Some(io) = work.start(&mut data) {
            work.finish(io, 1, Ok(()), &[0; 4096]);
        }
        let ledger = work.ledger.as_ref().unwrap();
        assert_eq!((ledger.checked, ledger.mismatches), (0, 0));
    }
}
