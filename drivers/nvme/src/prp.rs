//! Physical region pages (section 4.3): how a command names its memory.

use vfio_uring::dma::DmaRing;

/// The page size that the controller is set to: the smallest, 4 KiB.
pub(crate) const PAGE: usize = 4096;
const ENTRIES: usize = PAGE / 8;

/// PRP1 and PRP2 for `len` bytes (not 0) at `iova`. From the third page on they are named in the list page of slot `index`;
/// the caller has limited `len` to what one list names.
#[inline]
pub(crate) fn prps(iova: u64, len: usize, index: u16, lists: Option<&DmaRing<u64>>) -> (u64, u64) {
    let offset = iova as usize & (PAGE - 1);
    if offset + len <= PAGE {
        return (iova, 0);
    }
    let first = PAGE - offset;
    let second = iova + first as u64;
    if len - first <= PAGE {
        return (iova, second);
    }
    (iova, lists.map_or(second, |lists| write_list(lists, index, second, len - first)))
}

/// Names the pages from `iova` on, `len` bytes, in a slot's list, and gives the list's address.
#[inline(never)]
fn write_list(lists: &DmaRing<u64>, index: u16, iova: u64, len: usize) -> u64 {
    let base = usize::from(index) * ENTRIES;
    for page in 0..len.div_ceil(PAGE).min(ENTRIES) {
        // Inside of the slot's page by the minimum.
        let _ = lists.set(base + page, &(iova + (page * PAGE) as u64).to_le());
    }
    lists.iova() + (base * 8) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_uring::dma::{AddressSpace, Backend, HugePages, IovaRange, Pool};

    #[test]
    fn pages_are_named_directly_or_in_a_list() {
        let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
        let pool = futures::executor::block_on(Pool::new(&space, 2 * PAGE, HugePages::No)).unwrap();
        let lists = DmaRing::new(pool.alloc(2 * PAGE).unwrap().into_shared()).unwrap();
        let prps = |iova, len| prps(iova, len, 1, Some(&lists));
        assert_eq!(prps(0x1000, 4096), (0x1000, 0));
        assert_eq!(prps(0x1000, 4097), (0x1000, 0x2000));
        assert_eq!(prps(0x1200, 4096), (0x1200, 0x2000));
        assert_eq!(prps(0x1000, 8192), (0x1000, 0x2000));
        assert_eq!(prps(0x1000, 8193), (0x1000, lists.iova() + 4096));
        assert_eq!((lists.get(512), lists.get(513)), (Ok(0x2000), Ok(0x3000)));
        prps(0x10000, 512 * PAGE);
        assert_eq!(lists.get(512 + 510), Ok(0x10000 + 511 * 4096));
    }
}
