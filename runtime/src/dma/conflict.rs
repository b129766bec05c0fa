//! Does what is mapped still lie in the addresses that a device allows?

use super::IovaRange;

/// The first of the `live` mappings that does not lie wholly in the `allowed` ranges, and the hole that it lies in: the whole
/// run of addresses around its first bad one that no range allows. `None` when all of them fit.
///
/// The ranges may be in any order, touch and overlap; one whose start is above its last address holds nothing. It costs
/// O(a log a + n log a) for n mappings and a ranges.
///
/// ```
/// use vfio_uring::dma::{IovaRange, conflicts};
///
/// let range = |start, last| IovaRange { start, last };
/// let allowed = [range(0, 0xfedf_ffff), range(0xfef0_0000, u64::MAX)];
/// assert_eq!(conflicts([range(0x1000, 0x1fff)].into_iter(), &allowed), None);
/// let over = range(0xfedf_f000, 0xfee0_0fff);
/// assert_eq!(conflicts([over].into_iter(), &allowed), Some((over, range(0xfee0_0000, 0xfeef_ffff))));
/// ```
pub fn conflicts(live: impl Iterator<Item = IovaRange>, allowed: &[IovaRange]) -> Option<(IovaRange, IovaRange)> {
    let allowed = joined(allowed);
    live.filter(|mapping| mapping.start <= mapping.last).find_map(|mapping| {
        // The range that holds the mapping's start, if any does: the last one that starts no later.
        let next = allowed.partition_point(|range| range.start <= mapping.start);
        let bad = match next.checked_sub(1).map(|before| allowed[before]) {
            Some(range) if mapping.last <= range.last => return None,
            // Ranges that touch are one by now, so the address behind this one is allowed by none.
            Some(range) if mapping.start <= range.last => range.last + 1,
            _ => mapping.start,
        };
        let start = next.checked_sub(1).map_or(0, |before| allowed[before].last + 1);
        let last = allowed.get(next).map_or(u64::MAX, |range| range.start - 1);
        debug_assert!(start <= bad && bad <= last);
        Some((mapping, IovaRange { start, last }))
    })
}

/// The first of the `live` mappings that overlaps one of the `reserved` regions, and that region: [`conflicts`] by what is
/// forbidden instead of by what is allowed, for a device that is not attached yet.
///
/// ```
/// use vfio_uring::dma::{IovaRange, overlaps};
///
/// let msi = IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff };
/// let mapping = IovaRange { start: 0xfeef_f000, last: 0xff00_0fff };
/// assert_eq!(overlaps([mapping].into_iter(), &[msi]), Some((mapping, msi)));
/// ```
pub fn overlaps(live: impl Iterator<Item = IovaRange>, reserved: &[IovaRange]) -> Option<(IovaRange, IovaRange)> {
    live.filter(|mapping| mapping.start <= mapping.last).find_map(|mapping| {
        let region = reserved
            .iter()
            .find(|region| region.start <= region.last && region.start <= mapping.last && mapping.start <= region.last)?;
        Some((mapping, *region))
    })
}

/// The same addresses as sorted ranges with at least one address between them.
pub(crate) fn joined(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut ranges: Vec<_> = ranges.iter().copied().filter(|range| range.start <= range.last).collect();
    ranges.sort_unstable();
    let mut joined: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(before) if range.start <= before.last.saturating_add(1) => before.last = before.last.max(range.last),
            _ => joined.push(range),
        }
    }
    joined
}

/// The addresses that are in both.
pub(crate) fn intersection(one: &[IovaRange], other: &[IovaRange]) -> Vec<IovaRange> {
    let (one, other) = (joined(one), joined(other));
    let both = |a: &IovaRange, b: &IovaRange| IovaRange { start: a.start.max(b.start), last: a.last.min(b.last) };
    let all = one.iter().flat_map(|a| other.iter().map(move |b| both(a, b)));
    all.filter(|range| range.start <= range.last).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Addresses of the model: a few at each end of the space, nothing between them.
    const LOW: u64 = 48;
    const HIGH: u64 = u64::MAX - 47;

    /// The naive model: looks at every address. What lies between the two ends is allowed when a range spans it: LOW stands for
    /// all of that, since no range and no mapping of the test ends there.
    fn naive(live: &[IovaRange], allowed: &[IovaRange]) -> Option<(IovaRange, IovaRange)> {
        let holds = |range: &IovaRange, at: u64| range.start <= at && at <= range.last;
        let is_allowed = |at: u64| allowed.iter().any(|range| holds(range, at));
        let all = || (0..=LOW).chain(HIGH..=u64::MAX);
        live.iter().find_map(|&mapping| {
            let bad = all().find(|&at| holds(&mapping, at) && !is_allowed(at))?;
            let start = all().rev().skip_while(|&at| at > bad).take_while(|&at| !is_allowed(at)).last()?;
            let last = all().skip_while(|&at| at < bad).take_while(|&at| !is_allowed(at)).last()?;
            // A run that ends at the stand-in goes on to the other end of the middle.
            Some((mapping, IovaRange { start, last: if last == LOW { HIGH - 1 } else { last } }))
        })
    }

    fn address() -> impl Strategy<Value = u64> {
        prop::sample::select((0..LOW).chain(HIGH..=u64::MAX).collect::<Vec<_>>())
    }

    fn range() -> impl Strategy<Value = IovaRange> {
        prop_oneof![
            (address(), address()).prop_map(|(a, b)| IovaRange { start: a.min(b), last: a.max(b) }),
            (address(), 0..9u64).prop_map(|(start, len)| IovaRange {
                start,
                last: start.saturating_add(len).min(if start < LOW { LOW - 1 } else { u64::MAX })
            }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_the_naive_model(
            live in prop::collection::vec(range(), 0..6), allowed in prop::collection::vec(range(), 0..8),
        ) {
            prop_assert_eq!(conflicts(live.iter().copied(), &allowed), naive(&live, &allowed));
        }

        #[test]
        fn what_is_reserved_is_not_allowed(
            live in prop::collection::vec(range(), 0..6), reserved in prop::collection::vec(range(), 0..8),
        ) {
            // The holes between the regions are what is allowed.
            let mut allowed = Vec::new();
            let mut next = Some(0);
            for region in joined(&reserved) {
                if let Some(last) = region.start.checked_sub(1) {
                    allowed.push(IovaRange { start: next.expect("a region starts there"), last });
                }
                next = region.last.checked_add(1);
            }
            allowed.extend(next.map(|start| IovaRange { start, last: u64::MAX }));
            let found = overlaps(live.iter().copied(), &reserved);
            let expected = conflicts(live.iter().copied(), &allowed);
            prop_assert_eq!(found.map(|(mapping, _)| mapping), expected.map(|(mapping, _)| mapping));
            if let Some((mapping, region)) = found {
                prop_assert!(reserved.contains(&region) && region.start <= mapping.last && mapping.start <= region.last);
            }
        }

        #[test]
        fn any_ranges_are_survived(
            live in prop::collection::vec((any::<u64>(), any::<u64>()), 0..6),
            allowed in prop::collection::vec((any::<u64>(), any::<u64>()), 0..8),
        ) {
            let ranges = |of: Vec<(u64, u64)>| of.into_iter().map(|(start, last)| IovaRange { start, last }).collect::<Vec<_>>();
            let (live, allowed) = (ranges(live), ranges(allowed));
            if let Some((mapping, hole)) = conflicts(live.iter().copied(), &allowed) {
                prop_assert!(live.contains(&mapping));
                prop_assert!(hole.start <= mapping.last && mapping.start <= hole.last, "they overlap");
                prop_assert!(allowed.iter().all(|range| range.start > range.last || range.last < hole.start || hole.last < range.start));
            }
        }
    }

    #[test]
    fn nothing_is_allowed() {
        let mapping = IovaRange { start: 0x1000, last: 0x1fff };
        let all = IovaRange { start: 0, last: u64::MAX };
        assert_eq!(conflicts([mapping].into_iter(), &[]), Some((mapping, all)));
        assert_eq!(conflicts([mapping].into_iter(), &[all]), None);
        assert_eq!(conflicts(std::iter::empty(), &[]), None);
    }

    #[test]
    fn a_range_that_holds_nothing_allows_nothing() {
        let mapping = IovaRange { start: 5, last: 5 };
        assert!(conflicts([mapping].into_iter(), &[IovaRange { start: 9, last: 1 }]).is_some());
    }
}
