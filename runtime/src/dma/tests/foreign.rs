//! Memory of the caller's.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Says when it is dropped.
struct Owner {
    drops: Arc<AtomicUsize>,
    _pages: Vec<Page>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

fn map_owner(space: &AddressSpace, drops: &Arc<AtomicUsize>) -> Result<Arc<Mapping>> {
    let mut pages = vec![Page([3; 4096]); 2];
    let (at, len) = (std::ptr::NonNull::from(pages.as_mut_slice()).cast(), 8192);
    // SAFETY: the owner keeps the pages, and nobody looks at them.
    block_on(unsafe { space.map_foreign(at, len, Owner { drops: drops.clone(), _pages: pages }) })
}

fn on_kernel(pages: u64) -> (AddressSpace, Rc<Script>) {
    let (space, script) = scripted(pages);
    script.kernel.set(true);
    (space, script)
}

#[test]
fn pages_are_seen_by_the_peer_and_freed_after_the_unmap() {
    let (space, script) = scripted(4);
    let mapping = block_on(space.map_pages(vec![Page([1; 4096]), Page([2; 4096])])).unwrap();
    assert_eq!((mapping.len(), mapping.fd().is_none(), space.mappings()[0].fd.is_none()), (8192, true, true));
    let mut seen = [0; 4];
    space.read(mapping.iova() + 4094, &mut seen).unwrap();
    assert_eq!(seen, [1, 1, 2, 2]);
    space.write(mapping.iova() + 4095, &[8, 9]).unwrap();
    mapping.memory().read(4094, &mut seen).unwrap();
    assert_eq!(seen, [1, 8, 9, 2]);
    drop(mapping);
    assert_eq!(block_on(space.reclaim()), 1);
    assert_eq!(script.log(), ["map 0x1000", "unmap 0x1000"]);
    assert_eq!(space.stats(), SpaceStats::default());

    let drops = Arc::default();
    let (space, _script) = on_kernel(2);
    drop(map_owner(&space, &drops).unwrap());
    assert_eq!(drops.load(Ordering::Relaxed), 0, "the device may have it still");
    assert_eq!(block_on(space.reclaim()), 1);
    assert_eq!((drops.load(Ordering::Relaxed), space.stats()), (1, SpaceStats::default()));
}

#[test]
fn a_refused_mapping_gives_the_memory_back() {
    for kernel in [false, true] {
        let (space, script) = scripted(2);
        script.kernel.set(kernel);
        let drops = Arc::default();
        script.next(Answer::Fail(refused(22)));
        assert!(matches!(map_owner(&space, &drops), Err(Error::Refused { .. })));
        assert_eq!((drops.load(Ordering::Relaxed), space.stats()), (1, SpaceStats::default()));
    }
}

#[test]
fn misaligned_memory_is_refused() {
    let space = null(8);
    let misaligned = |result: Result<Arc<Mapping>>| {
        let Err(Error::Map { reason, .. }) = result else { panic!("{result:?}") };
        assert_eq!(reason, MapRefused::Misaligned { granule: PAGE });
    };
    misaligned(block_on(space.map_pages(Vec::new())));
    let mut pages = vec![Page::ZERO; 2];
    let at = std::ptr::NonNull::from(pages.as_mut_slice()).cast::<u8>();
    for (offset, len) in [(8, 4096), (0, 4095), (0, 0)] {
        // SAFETY: within the pages, which outlive it.
        misaligned(block_on(unsafe { space.map_foreign(at.add(offset), len, ()) }));
    }
    assert_eq!(space.stats(), SpaceStats::default());
    let coarse = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 1 << 30, 2);
    assert!(block_on(coarse.map_pages(pages)).is_err());
}

#[test]
fn memory_that_the_kernel_may_have_is_never_freed() {
    let forgotten = |space: &AddressSpace| (space.stats().forgotten, space.stats().forgotten_bytes);

    // Nobody knows whether it was mapped.
    let (drops, (space, script)) = (Arc::default(), on_kernel(16));
    script.next(Answer::Fail(timeout()));
    assert!(map_owner(&space, &drops).is_err());
    assert_eq!((forgotten(&space), space.stats().quarantined), ((1, 8192), 1));

    // Given up midway.
    script.next(Answer::Never);
    let mut pages = vec![Page::ZERO];
    let at = std::ptr::NonNull::from(pages.as_mut_slice()).cast();
    // SAFETY: the owner keeps the pages.
    let mut future = Box::pin(unsafe { space.map_foreign(at, 4096, Owner { drops: drops.clone(), _pages: pages }) });
    assert!(poll_once(future.as_mut()).is_pending());
    drop(future);
    assert_eq!(forgotten(&space), (2, 12288));

    // Its unmap failed: kept with the space, and after it.
    drop(map_owner(&space, &drops).unwrap());
    script.next(Answer::Fail(refused(22)));
    block_on(space.reclaim());
    assert_eq!((forgotten(&space), space.stats().leaked), ((2, 12288), 1));
    // Waiting for its unmap, and with an owner, when the space goes.
    drop(map_owner(&space, &drops).unwrap());
    let held = map_owner(&space, &drops).unwrap();
    let counted = space.forgotten().clone();
    drop(space);
    assert_eq!(counted.mappings.load(Ordering::Relaxed), 4);
    drop(held);
    assert_eq!((counted.mappings.load(Ordering::Relaxed), counted.bytes.load(Ordering::Relaxed)), (5, 12288 + 3 * 8192));
    assert_eq!(drops.load(Ordering::Relaxed), 0);
}

#[test]
fn a_server_never_had_it() {
    // Without the kernel, the memory goes with the connection.
    let (drops, (space, script)) = (Arc::default(), scripted(8));
    let held = map_owner(&space, &drops).unwrap();
    script.next(Answer::Fail(timeout()));
    assert!(map_owner(&space, &drops).is_err());
    assert_eq!(drops.load(Ordering::Relaxed), 1);
    drop(map_owner(&space, &drops).unwrap());
    space.disconnected();
    drop(held);
    assert_eq!((drops.load(Ordering::Relaxed), space.stats().forgotten), (3, 0));
}
