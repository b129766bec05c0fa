//! A space whose last device is taken away.

use super::*;
use crate::dma::vacate::Presence;

fn gone(result: Result<Arc<Mapping>>) {
    assert!(matches!(result, Err(Error::Gone { .. })), "{result:?}");
}

fn of_kernel() -> (AddressSpace, Rc<Script>) {
    let (space, script) = scripted(16);
    script.kernel.set(true);
    (space, script)
}

#[test]
fn owners_keep_their_memory_and_nothing_is_unmapped_twice() {
    let (space, script) = of_kernel();
    let presence = Presence::new(&space);
    let (owned, dropped) = (map(&space, 1).unwrap(), map(&space, 2).unwrap());
    drop(dropped);
    script.log();
    block_on(space.vacate());
    assert_eq!(script.log(), ["unmap 0x1000", "unmap 0x2000"]);
    gone(map(&space, 1));
    assert!(space.check_alive().is_err());
    owned.memory().write(0, &[1]).unwrap();
    drop(owned);
    assert_eq!(block_on(space.reclaim()), 2);
    assert!(script.log().is_empty());
    let stats = space.stats();
    assert_eq!((stats.mappings, stats.retired, stats.leaked), (0, 0, 0));
    drop(presence);
}

#[test]
fn another_device_keeps_the_space() {
    let (space, script) = of_kernel();
    let (one, two) = (Presence::new(&space), Presence::new(&space));
    let mapping = map(&space, 1).unwrap();
    assert!(!one.is_last());
    block_on(space.vacate());
    drop(one);
    assert!(two.is_last() && space.check_alive().is_ok());
    assert_eq!(script.log(), ["map 0x1000"]);
    drop(mapping);
}

#[test]
fn what_is_not_unmapped_is_leaked_until_the_kernel_has_dropped_all() {
    let (space, script) = of_kernel();
    let _presence = Presence::new(&space);
    let pages = block_on(space.map_pages(vec![Page::ZERO; 2])).unwrap();
    let owned = map(&space, 1).unwrap();
    for _ in 0..3 {
        script.next(Answer::Fail(refused(5)));
    }
    block_on(space.vacate());
    drop(owned);
    assert_eq!(block_on(space.reclaim()), 0);
    assert_eq!(space.stats().leaked, 1);
    space.emptied();
    assert_eq!(space.stats().leaked, 0);
    drop(pages);
    assert_eq!(block_on(space.reclaim()), 1);
    let stats = space.stats();
    assert_eq!((stats.mappings, stats.leaked, stats.forgotten), (0, 0, 0));
}

#[test]
fn a_mapping_that_comes_too_late_is_refused_and_unmapped() {
    let (space, script) = of_kernel();
    let _presence = Presence::new(&space);
    script.next(Answer::Late);
    let mapping = block_on(async {
        let (mapping, ()) = futures::join!(space.map(4096, HugePages::No), space.vacate());
        mapping
    });
    gone(mapping);
    assert_eq!(block_on(space.reclaim()), 1);
    assert_eq!(script.log(), ["map 0x1000", "unmap 0x1000"]);
}
