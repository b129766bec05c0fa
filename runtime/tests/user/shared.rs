//! Servers that share an address space, and memory that they get no descriptor of.

use std::sync::{Arc, Mutex};

use vfio_uring::{
    Error,
    device::{Device, Options},
    dma::{AddressSpace, HugePages, IovaRange, MapRefused, Page, SpaceStats},
    reactor::yield_now,
    transport::user::wire::{self, Capabilities, DmaAccess, DmaMap, Version, command},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    fake::{Fake, Peer},
    open, patient, run,
};

/// What a server has mapped: where, and whether it has a descriptor.
type Mapped = Arc<Mutex<Vec<(u64, bool)>>>;

/// A server that says what it has mapped, and refuses what `refuse` says: a command at an address.
fn server(capabilities: Capabilities, refuse: impl Fn(u16, u64) -> Option<i32> + Send + 'static) -> (Fake, Mapped) {
    let mapped = Mapped::default();
    let theirs = mapped.clone();
    let fake = Fake::run(move |mut peer: Peer| {
        peer.device.version = wire::version_payload(Version::default(), &capabilities);
        while let Some(message) = peer.recv() {
            // DMA_MAP and DMA_UNMAP have the address at different places.
            let address = match message.command() {
                command::DMA_MAP => Some(DmaMap::read_from_bytes(&message.payload).unwrap().address.get()),
                command::DMA_UNMAP => Some(wire::DmaUnmap::read_from_bytes(&message.payload).unwrap().address.get()),
                _ => None,
            };
            match address.and_then(|address| refuse(message.command(), address)) {
                Some(errno) => peer.refuse(&message, errno),
                None => peer.answer(&message),
            }
            let now = peer.device.mapped.iter().map(|(iova, _, fd)| (*iova, fd.is_some()));
            *theirs.lock().unwrap() = now.collect();
        }
    });
    (fake, mapped)
}

fn willing() -> (Fake, Mapped) {
    server(Capabilities::default(), |_, _| None)
}

fn reports(ranges: &[[u64; 2]]) -> (Fake, Mapped) {
    server(Capabilities { iova_ranges: Some(ranges.into()), ..Default::default() }, |_, _| None)
}

async fn join(fake: &Fake, space: &AddressSpace) -> Result<Device, Error> {
    Device::open_with(&fake.address(), Options { space: Some(space.clone()), ..patient() }).await
}

async fn settled(space: &AddressSpace) -> SpaceStats {
    while space.stats().retired != 0 {
        space.reclaim().await;
    }
    space.stats()
}

/// What was sent before has been answered by now, and written down.
async fn seen(device: &Device, mapped: &Mapped) -> Vec<(u64, bool)> {
    let _ = device.bar(0).unwrap().read::<u32>(0).await;
    mapped.lock().unwrap().clone()
}

#[test]
fn mapped_at_all_and_unmapped_at_all() {
    let ((one, at_one), (two, at_two)) = (willing(), willing());
    run(async {
        let first = open(&one).await;
        let space = first.dma();
        let before = space.map(4096, HugePages::No).await.unwrap();
        let second = join(&two, space).await.unwrap();
        assert_eq!((second.dma().id(), seen(&second, &at_two).await), (space.id(), vec![(before.iova(), true)]));
        let after = second.dma().map(4096, HugePages::No).await.unwrap();
        let user = space.map_pages(vec![Page::ZERO; 2]).await.unwrap();
        let all = vec![(before.iova(), true), (after.iova(), true), (user.iova(), false)];
        assert_eq!((seen(&first, &at_one).await, seen(&second, &at_two).await), (all.clone(), all));
        drop((before, user));
        assert_eq!(settled(space).await, SpaceStats { mappings: 1, ..Default::default() });
        let left = vec![(after.iova(), true)];
        assert_eq!((seen(&first, &at_one).await, seen(&second, &at_two).await), (left.clone(), left));
        // The first goes, and the space and the second go on.
        let space = space.clone();
        drop(first);
        drop(after);
        assert_eq!(settled(&space).await, SpaceStats::default());
        assert!(second.is_gone().is_none());
        let _mapping = space.map(4096, HugePages::No).await.unwrap();
        assert_eq!(seen(&second, &at_two).await.len(), 1);
    });
}

#[test]
fn a_refused_map_at_the_second_leaves_nothing_at_the_first() {
    let (one, at_one) = willing();
    let (two, at_two) =
        server(Capabilities::default(), |number, at| (number == command::DMA_MAP && at == 0x2000).then_some(libc::ENOSPC));
    run(async {
        let first = open(&one).await;
        let second = join(&two, first.dma()).await.unwrap();
        let kept = second.dma().map(4096, HugePages::No).await.unwrap();
        let error = first.dma().map(4096, HugePages::No).await.unwrap_err();
        assert!(matches!(&error, Error::Refused { command, .. } if command == "DMA_MAP"), "{error}");
        let only = vec![(kept.iova(), true)];
        assert_eq!((seen(&first, &at_one).await, seen(&second, &at_two).await), (only.clone(), only));
        assert_eq!(first.dma().stats(), SpaceStats { mappings: 1, ..Default::default() });
        // The addresses are free for the next.
        let error = first.dma().map_at(0x2000, 4096, HugePages::No).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    });
}

#[test]
fn what_can_not_be_rolled_back_is_not_used_again() {
    let refuse_unmap = |number, _| (number == command::DMA_UNMAP).then_some(libc::EBUSY);
    let (one, _) = server(Capabilities::default(), refuse_unmap);
    let (two, _) =
        server(Capabilities::default(), |number, at| (number == command::DMA_MAP && at == 0x1000).then_some(libc::EINVAL));
    run(async {
        let first = open(&one).await;
        let _second = join(&two, first.dma()).await.unwrap();
        assert!(matches!(first.dma().map(4096, HugePages::No).await, Err(Error::Refused { .. })));
        assert_eq!((first.dma().stats().mappings, first.dma().stats().quarantined), (1, 1));
        let mapping = first.dma().map(4096, HugePages::No).await.unwrap();
        assert_eq!(mapping.iova(), 0x2000);
        // Confirmed by one of them is not confirmed.
        drop(mapping);
        assert_eq!(settled(first.dma()).await.leaked, 1);
    });
}

#[test]
fn who_does_not_take_all_does_not_join() {
    let (one, at_one) = willing();
    let (refusing, _) =
        server(Capabilities::default(), |number, at| (number == command::DMA_MAP && at == 0x2000).then_some(libc::EINVAL));
    let (small, _) = server(Capabilities { max_dma_maps: Some(1), ..Default::default() }, |_, _| None);
    let (coarse, _) = server(Capabilities { pgsizes: Some(1 << 16), ..Default::default() }, |_, _| None);
    let (silent, _) = (Fake::hooked(|_, message| message.command() == command::DMA_MAP), ());
    run(async {
        let first = open(&one).await;
        let space = first.dma();
        let held = [space.map(4096, HugePages::No).await.unwrap(), space.map(4096, HugePages::No).await.unwrap()];
        assert!(matches!(join(&refusing, space).await, Err(Error::Refused { .. })));
        let error = join(&small, space).await.unwrap_err();
        assert!(matches!(&error, Error::Exhausted { what } if what.contains("takes 1 DMA mappings")), "{error}");
        let error = join(&coarse, space).await.unwrap_err();
        assert!(matches!(&error, Error::Invalid { what } if what.contains("0x1000..=0x1fff")), "{error}");
        let options = Options { space: Some(space.clone()), ..crate::impatient() };
        let error = Device::open_with(&silent.address(), options).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        // The first does not notice.
        assert_eq!((space.granule(), space.stats()), (4096, SpaceStats { mappings: 2, ..Default::default() }));
        assert_eq!(seen(&first, &at_one).await, [(0x1000, true), (0x2000, true)]);
        drop(held);
        assert_eq!(settled(space).await, SpaceStats::default());
    });
}

#[test]
fn the_limits_of_all_hold_while_they_stay() {
    let (one, _) = willing();
    let (small, _) = server(Capabilities { max_dma_maps: Some(1), ..Default::default() }, |_, _| None);
    let (coarse, _) = server(Capabilities { pgsizes: Some(1 << 16), ..Default::default() }, |_, _| None);
    run(async {
        let first = open(&one).await;
        let space = first.dma();
        let second = join(&small, space).await.unwrap();
        let held = space.map(4096, HugePages::No).await.unwrap();
        assert!(matches!(space.map(4096, HugePages::No).await, Err(Error::Exhausted { .. })));
        drop(second);
        drop((space.map(4096, HugePages::No).await.unwrap(), held));
        let third = join(&coarse, space).await.unwrap();
        let held = space.map(4096, HugePages::No).await.unwrap();
        assert_eq!((space.granule(), held.len(), held.iova() % (1 << 16)), (1 << 16, 1 << 16, 0));
        let error = space.map_at(0x1000, 4096, HugePages::No).await.unwrap_err();
        assert!(matches!(error, Error::Map { reason: MapRefused::Misaligned { granule: 0x10000 }, .. }), "{error}");
        assert!(space.map_pages(vec![Page::ZERO]).await.is_err());
        drop(third);
        assert_eq!((space.granule(), space.map_pages(vec![Page::ZERO]).await.unwrap().len()), (4096, 4096));
    });
}

#[test]
fn reported_ranges_narrow_and_widen() {
    let (one, _) = reports(&[[0x10_0000, 0x1f_ffff], [0, 0x7fff], [0x8000, 0xffff]]);
    let (two, _) = reports(&[[0x8000, 0x17_ffff]]);
    let (three, at_three) = reports(&[[0x8000, 0x8fff], [0xa000, 0x1f_ffff]]);
    let range = |start, last| IovaRange { start, last };
    run(async {
        let first = open(&one).await;
        let space = first.dma();
        // With the options, which leave the first page out.
        let alone = [range(0x1000, 0xffff), range(0x10_0000, 0x1f_ffff)];
        assert_eq!(space.allowed(), alone);
        assert_eq!(first.connection().unwrap().limits().iova_ranges.as_ref().unwrap().len(), 2);
        let held = space.map_at(0x8000, 0x2000, HugePages::No).await.unwrap();
        let second = join(&two, space).await.unwrap();
        let both = [range(0x8000, 0xffff), range(0x10_0000, 0x17_ffff)];
        assert_eq!(space.allowed(), both);
        let error = join(&three, space).await.unwrap_err();
        let Error::Conflict { device, mapping, reserved } = &error else { panic!("{error}") };
        assert_eq!((mapping, reserved), (&Some(range(0x8000, 0x9fff)), &Some(range(0x9000, 0x9fff))));
        assert_eq!(device, &three.address().to_string());
        assert!(at_three.lock().unwrap().is_empty(), "nothing is mapped for who does not join");
        assert_eq!((space.allowed(), space.stats().mappings), (both.to_vec(), 1));
        drop(second);
        assert_eq!(space.allowed(), alone);
        drop(held);
        let error = space.map_at(0x1_0000, 4096, HugePages::No).await.unwrap_err();
        assert!(matches!(error, Error::Map { reason: MapRefused::Reserved { .. }, .. }), "{error}");
    });
}

#[test]
fn the_last_device_takes_the_space_with_it() {
    let (one, _) = willing();
    let two = Fake::hooked(|peer, message| {
        let ends = message.command() == command::DEVICE_RESET;
        if ends {
            peer.hang_up();
        }
        ends
    });
    run(async {
        let first = open(&one).await;
        let (space, weak) = (first.dma().clone(), first.dma().downgrade());
        let held = space.map(4096, HugePages::No).await.unwrap();
        // The space keeps its last device, until another one comes.
        drop(first);
        space.map(4096, HugePages::No).await.unwrap();
        let second = join(&two, &space).await.unwrap();
        drop(one);
        assert!(second.reset().await.is_err());
        assert!(matches!(space.map(4096, HugePages::No).await, Err(Error::Gone { .. })));
        drop(held);
        assert_eq!((space.reclaim().await, space.stats().retired, space.stats().leaked), (0, 0, 0));
        let (late, _) = willing();
        assert!(matches!(join(&late, &space).await, Err(Error::Gone { .. })));
        drop((space, second));
        assert!(weak.upgrade().is_none());
    });
}

#[test]
fn user_memory_is_read_and_written_by_messages() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() != command::REGION_WRITE {
            return false;
        }
        let (iova, len, fd) = &peer.device.mapped[0];
        assert!(fd.is_none() && *len == 8192);
        let access = DmaAccess { address: (iova + 4094).into(), count: 4.into() };
        assert_eq!(peer.ask(command::DMA_READ, access.as_bytes()).payload, [access.as_bytes(), &[1, 1, 2, 2]].concat());
        peer.ask(command::DMA_WRITE, &[access.as_bytes(), b"pong"].concat());
        false
    });
    run(async {
        let device = open(&fake).await;
        let mapping = device.dma().map_pages(vec![Page([1; 4096]), Page([2; 4096])]).await.unwrap();
        device.bar(0).unwrap().write::<u32>(0, 1).await.unwrap();
        let mut got = [0; 4];
        mapping.memory().read(4094, &mut got).unwrap();
        assert_eq!(&got, b"pong");
        drop(mapping);
        while device.dma().stats() != SpaceStats::default() {
            yield_now().await;
        }
    });
}
