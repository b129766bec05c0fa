//! Why memory was not mapped for DMA: the same reasons, whoever maps it.

use std::fmt;

use rustix::{
    process::{Resource, getrlimit},
    thread::{CapabilitySet, capabilities},
};

use super::{IovaRange, conflicts};

/// Why the kernel, or a check before it, did not map memory for a device. Nothing is left mapped then.
///
/// ```
/// use vfio_uring::dma::{IovaRange, MapRefused};
///
/// let msi = IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff };
/// let text = MapRefused::Reserved { region: Some(msi) }.to_string();
/// assert!(text.starts_with("the addresses 0xfee00000..=0xfeefffff are reserved"), "{text}");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapRefused {
    /// Some of the range is mapped already.
    Overlap,
    /// No more mappings fit.
    Limit {
        /// Mappings that fit in all, where it is known.
        max: Option<u32>,
    },
    /// The range is reserved by the platform or a device.
    Reserved {
        /// The hole that it hits, where it is known.
        region: Option<IovaRange>,
    },
    /// The range is beyond what the IOMMU translates.
    Aperture {
        /// What it translates, where it is known.
        allowed: Option<IovaRange>,
    },
    /// RLIMIT_MEMLOCK is too small.
    Memlock {
        /// The limit, in bytes.
        limit: u64,
        /// Bytes of this mapping.
        needed: u64,
    },
    /// The memory is not mapped in this process, or may not be accessed so.
    BadAddress,
    /// Address, IOVA or length is not a multiple of the granule, or the length is 0.
    Misaligned {
        /// The granule, in bytes.
        granule: u64,
    },
}

impl MapRefused {
    /// Which rule of the `allowed` ranges `asked` breaks: the aperture around them, or a hole between them. `None`: neither.
    pub fn outside(asked: IovaRange, allowed: &[IovaRange]) -> Option<Self> {
        let ranges = || allowed.iter().filter(|range| range.start <= range.last);
        let start = ranges().map(|range| range.start).min();
        let aperture = start.zip(ranges().map(|range| range.last).max()).map(|(start, last)| IovaRange { start, last });
        if aperture.is_none_or(|aperture| asked.start < aperture.start || asked.last > aperture.last) {
            return Some(Self::Aperture { allowed: aperture });
        }
        let (_, hole) = conflicts(std::iter::once(asked), allowed)?;
        Some(Self::Reserved { region: Some(hole) })
    }
}

impl fmt::Display for MapRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlap => f.write_str("some of these addresses are mapped already; unmap them first, or take others"),
            Self::Limit { max } => {
                f.write_str("no more mappings fit")?;
                if let Some(max) = max {
                    write!(f, ", {max} are the most")?;
                }
                f.write_str("; map fewer and larger pieces, or load vfio_iommu_type1 with a larger dma_entry_limit")
            }
            Self::Reserved { region: Some(IovaRange { start, last }) } => write!(
                f,
                "the addresses {start:#x}..={last:#x} are reserved by the platform or the device (interrupts, firmware); \
                 take addresses outside of them"
            ),
            Self::Reserved { region: None } => f.write_str(
                "some of these addresses are reserved by the platform or the device (interrupts, firmware); take others",
            ),
            Self::Aperture { allowed: Some(IovaRange { start, last }) } => {
                write!(f, "the IOMMU translates only the addresses {start:#x}..={last:#x}; take addresses inside of them")
            }
            Self::Aperture { allowed: None } => f.write_str("the IOMMU does not translate these addresses; take lower ones"),
            Self::Memlock { limit, needed } => write!(
                f,
                "a device pins its memory, and only {limit} bytes may be locked (RLIMIT_MEMLOCK; this mapping alone needs \
                 {needed}); raise `ulimit -l` (a service: LimitMEMLOCK=), or grant CAP_IPC_LOCK"
            ),
            Self::BadAddress => f.write_str(
                "not all of this memory is mapped in the process, writable where the device is to write, and of a kind that \
                 can be pinned; a device's BAR is not for iommufd, only for type 1: to map one, open the devices by their groups",
            ),
            Self::Misaligned { granule } => {
                write!(f, "memory, IOVA and length must be multiples of {granule} bytes, and the length not 0")
            }
        }
    }
}

/// The limit that this process's locked memory is held to; `None` when there is none, or CAP_IPC_LOCK lifts it.
pub(crate) fn memlock_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Memlock).current?;
    let lifted = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    (!lifted).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange { start, last }
    }

    #[test]
    fn the_rule_that_is_broken() {
        let vtd = [range(0xfef0_0000, 0xffff_ffff_ffff), range(0, 0xfedf_ffff), range(9, 1)];
        let outside = |start, last| MapRefused::outside(range(start, last), &vtd);
        let msi = Some(MapRefused::Reserved { region: Some(range(0xfee0_0000, 0xfeef_ffff)) });
        assert_eq!(outside(0x1000, 0xfedf_ffff), None);
        assert_eq!(outside(0xfee0_0000, 0xfee0_0fff), msi);
        assert_eq!(outside(0xfedf_f000, 0xfef0_0fff), msi);
        let aperture = Some(MapRefused::Aperture { allowed: Some(range(0, 0xffff_ffff_ffff)) });
        assert_eq!(outside(0xffff_ffff_f000, 0x1_0000_0000_0fff), aperture);
        assert_eq!(outside(0, u64::MAX), aperture);
        assert_eq!(MapRefused::outside(range(0, 1), &[]), Some(MapRefused::Aperture { allowed: None }));
    }

    #[test]
    fn every_reason_names_its_remedy() {
        for (reason, part) in [
            (MapRefused::Overlap, "unmap"),
            (MapRefused::Limit { max: Some(65535) }, "65535 are the most; map fewer"),
            (MapRefused::Limit { max: None }, "dma_entry_limit"),
            (MapRefused::Reserved { region: None }, "take others"),
            (MapRefused::Aperture { allowed: Some(range(0, 0xfff)) }, "0x0..=0xfff"),
            (MapRefused::Aperture { allowed: None }, "lower"),
            (MapRefused::Memlock { limit: 65536, needed: 131072 }, "ulimit -l"),
            (MapRefused::BadAddress, "writable"),
            (MapRefused::Misaligned { granule: 4096 }, "4096"),
        ] {
            assert!(reason.to_string().contains(part), "{reason}");
        }
    }
}
