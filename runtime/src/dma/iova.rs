//! I/O virtual addresses: ranges that a device may use, and an allocator over them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    MapRefused,
    conflict::{conflicts, joined},
};
use crate::{Error, Result};

/// A range of I/O virtual addresses, its last address included: so that it may end at the top of the 64-bit space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
}

/// Blocks that are looked at for a tight aligned fit before one is taken that must fit.
const PROBES: usize = 8;

/// Hands out aligned pieces of a list of allowed ranges: best fit, with a cost of O(log n) in the number of free pieces.
///
/// Address 0 is never handed out: too much hardware and software takes it for "none".
///
/// ```
/// use vfio_uring::dma::{IovaAllocator, IovaRange};
///
/// let mut iova = IovaAllocator::new(&[IovaRange { start: 0, last: 0xffff }], 4096);
/// let piece = iova.alloc(10_000, 4096).unwrap();
/// assert_eq!((piece, iova.free_bytes()), (0x1000, 0xf000 - 0x3000));
/// iova.free(piece, 10_000).unwrap();
/// assert!(iova.free(piece, 10_000).is_err(), "it is free already");
/// ```
#[derive(Debug, Clone)]
pub struct IovaAllocator {
    granule: u64,
    /// Free pieces: start to length. Neighbours are always joined.
    free: BTreeMap<u64, u64>,
    /// The same pieces as (length, start).
    by_len: BTreeSet<(u64, u64)>,
    /// Pieces that are handed out: start to length. It is what a free is checked against.
    taken: BTreeMap<u64, u64>,
    free_bytes: u64,
}

impl IovaAllocator {
    /// An allocator over `ranges`, which may touch or overlap, in multiples of `granule` bytes (rounded up to a power of two).
    /// What is cut off of a range by the granule, and the granule at address 0, is not used.
    pub fn new(ranges: &[IovaRange], granule: u64) -> Self {
        let granule = granule.checked_next_power_of_two().unwrap_or(1 << 63);
        let mut this =
            Self { granule, free: BTreeMap::new(), by_len: BTreeSet::new(), taken: BTreeMap::new(), free_bytes: 0 };
        for range in joined(ranges) {
            let Some(start) = range.start.max(1).checked_next_multiple_of(granule) else { continue };
            // One past the last whole granule, in a form that can't overflow: the low bits of `last` are all ones there.
            let last = match range.last & (granule - 1) == granule - 1 {
                true => range.last,
                false => match (range.last & !(granule - 1)).checked_sub(1) {
                    Some(last) => last,
                    None => continue,
                },
            };
            if start <= last {
                this.insert(start, last - start + 1);
            }
        }
        this
    }

    /// Smallest unit of the allocator, in bytes.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Bytes that are free, in pieces of any size.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Free pieces: with nothing handed out, one for each of the ranges that do not touch.
    pub fn free_pieces(&self) -> usize {
        self.free.len()
    }

    /// Bytes of the largest free piece.
    pub fn largest_free(&self) -> u64 {
        self.by_len.last().map_or(0, |&(len, _)| len)
    }

    /// Takes `len` bytes (rounded up to the granule) at a multiple of `align` (rounded up to a power of two and the granule).
    /// `None` when no free piece holds that, or `len` is 0.
    pub fn alloc(&mut self, len: u64, align: u64) -> Option<u64> {
        let len = self.rounded(len)?;
        let align = align.checked_next_power_of_two()?.max(self.granule);
        let fits = |&(block, start): &(u64, u64)| {
            let at = start.checked_next_multiple_of(align)?;
            (at - start <= block - len).then_some((start, block, at))
        };
        // A block this long holds an aligned piece wherever it starts; shorter ones only perhaps, so few of them are tried.
        // Only a request that would fail otherwise has all of them looked at.
        let sure = len.checked_add(align - self.granule);
        let tight = self.by_len.range((len, 0)..).take(PROBES).find_map(fits);
        let (start, block, at) = tight
            .or_else(|| self.by_len.range((sure?, 0)..).next().and_then(fits))
            .or_else(|| self.by_len.range((len, 0)..).find_map(fits))?;
        debug_assert!(start <= at && at - start <= block - len);
        self.carve(at, len);
        self.taken.insert(at, len);
        Some(at)
    }

    /// Gives back what [`IovaAllocator::alloc`] handed out for the same `len`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `iova` is not the start of a piece that is handed out, or its length is another. Nothing changes
    /// then.
    pub fn free(&mut self, iova: u64, len: u64) -> Result<()> {
        match self.taken.get(&iova) {
            Some(&taken) if self.rounded(len) == Some(taken) => {
                self.taken.remove(&iova);
                self.join(iova, taken);
                Ok(())
            }
            Some(&taken) => {
                Err(Error::invalid(format!("freeing {len} bytes at IOVA {iova:#x}, where {taken} bytes were taken")))
            }
            None => Err(Error::invalid(format!("freeing IOVA {iova:#x}, which is not taken"))),
        }
    }

    /// Takes the `len` bytes (rounded up to the granule) at `iova`.
    ///
    /// # Errors
    /// Why not: [`MapRefused::Misaligned`] with the granule, [`MapRefused::Overlap`] with what is handed out, and
    /// [`MapRefused::Reserved`] or [`MapRefused::Aperture`] outside of the ranges `allowed`, which are those of the allocator.
    pub fn alloc_at(&mut self, iova: u64, len: u64, allowed: &[IovaRange]) -> Result<(), MapRefused> {
        let rounded = self.rounded(len).filter(|_| iova.is_multiple_of(self.granule));
        let len = rounded.ok_or(MapRefused::Misaligned { granule: self.granule })?;
        let Some(last) = iova.checked_add(len - 1) else { return Err(MapRefused::Aperture { allowed: None }) };
        if self.taken.range(..=last).next_back().is_some_and(|(&start, &len)| start + (len - 1) >= iova) {
            return Err(MapRefused::Overlap);
        }
        if !self.carve(iova, len) {
            let outside = MapRefused::outside(IovaRange { start: iova, last }, allowed);
            // What is left is address 0, which is not handed out.
            return Err(
                outside.unwrap_or(MapRefused::Reserved { region: Some(IovaRange { start: 0, last: self.granule - 1 }) })
            );
        }
        self.taken.insert(iova, len);
        Ok(())
    }

    /// Replaces the ranges that pieces may come from, if all that are handed out lie in the new ones.
    ///
    /// # Errors
    /// The first piece that does not, and the hole between the new ranges that it lies in. Nothing changes then.
    pub fn set_ranges(&mut self, ranges: &[IovaRange]) -> Result<(), (IovaRange, IovaRange)> {
        if let Some(conflict) = conflicts(self.taken(), ranges) {
            return Err(conflict);
        }
        let mut new = Self::new(ranges, self.granule);
        for (start, len) in std::mem::take(&mut self.taken) {
            new.carve(start, len);
            new.taken.insert(start, len);
        }
        *self = new;
        Ok(())
    }

    /// What is handed out.
    pub fn taken(&self) -> impl Iterator<Item = IovaRange> {
        self.taken.iter().map(|(&start, &len)| IovaRange { start, last: start + (len - 1) })
    }

    fn rounded(&self, len: u64) -> Option<u64> {
        len.checked_next_multiple_of(self.granule).filter(|&len| len != 0)
    }

    /// Takes a part out of the free piece that holds it. False: none holds all of it.
    fn carve(&mut self, start: u64, len: u64) -> bool {
        let Some((&block, &its_len)) = self.free.range(..=start).next_back() else { return false };
        let before = start - block;
        let Some(after) = its_len.checked_sub(before).and_then(|rest| rest.checked_sub(len)) else { return false };
        self.remove(block, its_len);
        if before > 0 {
            self.insert(block, before);
        }
        if after > 0 {
            self.insert(start + len, after);
        }
        true
    }

    /// Adds a free piece, joined with its free neighbours.
    fn join(&mut self, mut start: u64, mut len: u64) {
        if let Some((&before, &its_len)) = self.free.range(..start).next_back()
            && before + its_len == start
        {
            self.remove(before, its_len);
            (start, len) = (before, len + its_len);
        }
        // A piece at the top of the space has no address after it.
        if let Some(after) = start.checked_add(len)
            && let Some(&its_len) = self.free.get(&after)
        {
            self.remove(after, its_len);
            len += its_len;
        }
        self.insert(start, len);
    }

    fn insert(&mut self, start: u64, len: u64) {
        self.free.insert(start, len);
        self.by_len.insert((len, start));
        self.free_bytes += len;
    }

    fn remove(&mut self, start: u64, len: u64) {
        self.free.remove(&start);
        self.by_len.remove(&(len, start));
        self.free_bytes -= len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRANULE: u64 = 4096;

    /// The naive model: a flag for each granule of two ranges, the second at the top of the space.
    struct Model {
        /// (address, taken) of each granule, in order of address.
        cells: Vec<(u64, bool)>,
    }

    impl Model {
        fn new() -> Self {
            let low = (1..40).map(|n| (n * GRANULE, false));
            let high = (1..=40).rev().map(|n| (0u64.wrapping_sub(n * GRANULE), false));
            Self { cells: low.chain(high).collect() }
        }

        /// Maximal free runs as (granules, index of the first).
        fn runs(&self) -> Vec<(usize, usize)> {
            let mut runs: Vec<(usize, usize)> = Vec::new();
            for (i, &(address, taken)) in self.cells.iter().enumerate() {
                let joins = i > 0 && !self.cells[i - 1].1 && self.cells[i - 1].0 + GRANULE == address;
                match runs.last_mut() {
                    _ if taken => {}
                    Some(run) if joins => run.0 += 1,
                    _ => runs.push((1, i)),
                }
            }
            runs.sort_unstable();
            runs
        }

        /// All places where the request would fit, those in the best run first.
        fn places(&self, granules: usize, align: u64) -> Vec<u64> {
            let fits = |&(len, first): &(usize, usize)| {
                (0..len)
                    .find(|&i| self.cells[first + i].0.is_multiple_of(align) && i + granules <= len)
                    .map(|i| self.cells[first + i].0)
            };
            self.runs().iter().filter_map(fits).collect()
        }

        fn mark(&mut self, address: u64, granules: usize, taken: bool) {
            let first = self.cells.iter().position(|cell| cell.0 == address).expect("inside of the ranges");
            for (i, cell) in self.cells[first..first + granules].iter_mut().enumerate() {
                assert_eq!(cell.0, address + i as u64 * GRANULE, "the piece spans a gap");
                assert_ne!(cell.1, taken);
                cell.1 = taken;
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Alloc { len: u64, align: u64 },
        Free { which: prop::sample::Index },
        BadFree { address: u64, len: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..9 * GRANULE, 0..6u32).prop_map(|(len, shift)| Step::Alloc { len, align: GRANULE << shift >> 1 }),
            3 => any::<prop::sample::Index>().prop_map(|which| Step::Free { which }),
            1 => (prop_oneof![(0..41u64).prop_map(|n| n * GRANULE), any::<u64>()], 0..4 * GRANULE)
                .prop_map(|(address, len)| Step::BadFree { address, len }),
        ]
    }

    fn ranges() -> [IovaRange; 3] {
        // Out of order, overlapping, and not on granules: the low one is 1..40 granules, the high one the last 40.
        [
            IovaRange { start: 0u64.wrapping_sub(40 * GRANULE) - 1, last: u64::MAX },
            IovaRange { start: 0, last: 30 * GRANULE },
            IovaRange { start: 20 * GRANULE + 5, last: 41 * GRANULE - 2 },
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_the_naive_model(steps in prop::collection::vec(step(), 1..200)) {
            let mut allocator = IovaAllocator::new(&ranges(), GRANULE);
            let mut model = Model::new();
            let mut live: Vec<(u64, u64)> = Vec::new();
            prop_assert_eq!(allocator.free_bytes(), model.cells.len() as u64 * GRANULE);
            for step in steps {
                match step {
                    Step::Alloc { len, align } => {
                        let granules = len.div_ceil(GRANULE) as usize;
                        let places = model.places(granules, align.max(GRANULE));
                        match allocator.alloc(len, align) {
                            None => prop_assert!(places.is_empty(), "{} would fit at {:x?}", len, places),
                            Some(at) => {
                                prop_assert!(at != 0 && places.contains(&at));
                                if align <= GRANULE {
                                    prop_assert_eq!(at, places[0], "not the best fit");
                                }
                                model.mark(at, granules, true);
                                live.push((at, len));
                            }
                        }
                    }
                    Step::Free { which } if !live.is_empty() => {
                        let (at, len) = live.swap_remove(which.index(live.len()));
                        allocator.free(at, len).unwrap();
                        model.mark(at, len.div_ceil(GRANULE) as usize, false);
                        prop_assert!(allocator.free(at, len).is_err());
                    }
                    Step::Free { .. } => {}
                    Step::BadFree { address, len } => {
                        let good = live.iter().any(|&(at, its)| at == address && its.div_ceil(GRANULE) == len.div_ceil(GRANULE));
                        if !good {
                            prop_assert!(allocator.free(address, len).is_err());
                        }
                    }
                }
                let runs = model.runs();
                prop_assert_eq!(allocator.free.len(), runs.len(), "neighbours are not joined");
                prop_assert_eq!(allocator.largest_free(), runs.last().map_or(0, |run| run.0 as u64 * GRANULE));
                prop_assert_eq!(allocator.free_bytes(), runs.iter().map(|run| run.0 as u64 * GRANULE).sum::<u64>());
            }
        }

        /// New ranges are taken whole, or not at all; what is handed out stays so.
        #[test]
        fn ranges_change_as_a_whole(
            old in prop::collection::vec((0..64u64, 0..64u64), 1..6), new in prop::collection::vec((0..64u64, 0..64u64), 0..6),
            requests in prop::collection::vec(1..6u64, 0..12),
        ) {
            let ranges = |list: Vec<(u64, u64)>| -> Vec<IovaRange> {
                let range = |(start, len)| IovaRange { start: start * GRANULE, last: (start + len + 1) * GRANULE - 1 };
                list.into_iter().map(range).collect()
            };
            let (old, new) = (ranges(old), ranges(new));
            let mut allocator = IovaAllocator::new(&old, GRANULE);
            let live: Vec<_> = requests.iter().filter_map(|n| Some((allocator.alloc(n * GRANULE, GRANULE)?, n * GRANULE))).collect();
            let before = allocator.clone();
            let inside = |at: u64| new.iter().any(|range| range.start <= at && at <= range.last);
            let fits = live.iter().all(|&(at, len)| (at..at + len).step_by(GRANULE as usize).all(inside));
            prop_assert_eq!(allocator.set_ranges(&new).is_ok(), fits);
            if !fits {
                prop_assert_eq!(&allocator.free, &before.free);
                allocator = before;
            }
            let all = IovaAllocator::new(if fits { &new } else { &old }, GRANULE);
            for (at, len) in live {
                prop_assert!(matches!(allocator.alloc_at(at, len, &new), Err(MapRefused::Overlap)));
                allocator.free(at, len).unwrap();
                allocator.alloc_at(at, len, &new).unwrap();
                allocator.free(at, len).unwrap();
            }
            prop_assert_eq!(&allocator.free, &all.free, "not all of it is free again");
            prop_assert_eq!(allocator.by_len, all.by_len);
        }

        #[test]
        fn any_ranges_are_survived(
            ranges in prop::collection::vec((any::<u64>(), any::<u64>()), 0..8), granule in any::<u64>(),
            requests in prop::collection::vec((any::<u64>(), any::<u64>()), 0..16),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, last)| IovaRange { start, last }).collect();
            let mut allocator = IovaAllocator::new(&ranges, granule >> (granule % 64));
            let (free, largest) = (allocator.free_bytes(), allocator.largest_free());
            let mut live = Vec::new();
            for (len, align) in requests {
                let (len, align) = (len >> (align % 64), align >> (len % 64));
                if let Some(at) = allocator.alloc(len, align) {
                    prop_assert!(ranges.iter().any(|range| range.start <= at && at <= range.last) && at != 0);
                    live.push((at, len));
                }
            }
            for (at, len) in live {
                allocator.free(at, len).unwrap();
            }
            prop_assert_eq!((allocator.free_bytes(), allocator.largest_free()), (free, largest));
        }
    }

    #[test]
    fn the_whole_space() {
        let mut all = IovaAllocator::new(&[IovaRange { start: 0, last: u64::MAX }], 1);
        assert_eq!(all.free_bytes(), u64::MAX);
        assert_eq!(all.alloc(u64::MAX, 1), Some(1));
        assert_eq!(all.alloc(1, 1), None);
        all.free(1, u64::MAX).unwrap();
        assert_eq!(all.alloc(1 << 63, 1 << 63), Some(1 << 63));
        assert_eq!(all.largest_free(), (1 << 63) - 1);
    }

    #[test]
    fn adjacent_ranges_are_one() {
        let ranges = [IovaRange { start: 0x2000, last: 0x2fff }, IovaRange { start: 0x1000, last: 0x1fff }];
        assert_eq!(IovaAllocator::new(&ranges, GRANULE).alloc(0x2000, 1), Some(0x1000));
    }
}
