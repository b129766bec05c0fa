//! The allocator of I/O virtual addresses over a long life.

use vfio_uring::dma::{IovaAllocator, IovaRange};

const PAGE: u64 = 4096;

/// A million pieces of mixed sizes come and go: in the end each allowed range is one free piece again.
#[test]
fn a_million_pieces_leave_one_for_each_range() {
    // What an Intel IOMMU of 39 bits allows: all but the window of message-signalled interrupts.
    let ranges = [IovaRange { start: PAGE, last: 0xfedf_ffff }, IovaRange { start: 0xfef0_0000, last: (1 << 39) - 1 }];
    let mut iova = IovaAllocator::new(&ranges, PAGE);
    let all = iova.free_bytes();
    let mut rng = 1u64;
    let mut next = |bound: u64| {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        rng % bound
    };
    let mut held = Vec::new();
    let mut pairs = 0;
    while pairs < 1_000_000 {
        if held.len() < 200 + next(200) as usize {
            // Mostly pages, now and then a hugepage or a gigabyte, aligned to their size.
            let (len, align) = match next(100) {
                0 => (1 << 30, 1 << 30),
                1..10 => (2 << 20, 2 << 20),
                _ => (1 + next(64 * PAGE), PAGE),
            };
            if let Some(at) = iova.alloc(len, align) {
                assert!(at.is_multiple_of(align) && (at + (len - 1) < 0xfee0_0000 || at >= 0xfef0_0000));
                held.push((at, len));
                continue;
            }
        }
        let (at, len) = held.swap_remove(next(held.len() as u64) as usize);
        iova.free(at, len).unwrap();
        pairs += 1;
    }
    held.drain(..).for_each(|(at, len)| iova.free(at, len).unwrap());
    assert_eq!((iova.free_pieces(), iova.free_bytes()), (2, all));
}
