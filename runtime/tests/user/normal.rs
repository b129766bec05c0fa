//! Servers that keep the rules, each in its own way.

use std::{io::Write, thread, time::Duration};

use futures::{FutureExt, StreamExt, future::join_all};
use vfio_uring::{
    Error,
    device::{Device, Irq, Options, index},
    dma::{HugePages, SharedMemory},
    reactor::{sleep, spawn, yield_now},
    transport::user::wire::{self, Capabilities, DmaAccess, RegionAccess, Version, command},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    fake::{BAR2_BASE, Fake},
    open, patient, run,
};

fn version(capabilities: &Capabilities) -> Vec<u8> {
    wire::version_payload(Version::default(), capabilities)
}

#[test]
fn a_device_from_end_to_end() {
    let fake = Fake::hooked(|peer, _| {
        assert!(!peer.more_waits(), "one command at a time");
        // As slow as a server that polls.
        thread::sleep(Duration::from_millis(1));
        false
    });
    run(async {
        let device = open(&fake).await;
        assert!(device.info().pci && device.info().reset && device.is_gone().is_none());
        assert_eq!((device.info().regions, device.info().irqs), (9, 5));
        assert_eq!((device.irq(Irq::MsiX).count, device.irq(Irq::Error).count), (4, 0));
        assert!(matches!(device.region(index::VGA), Err(Error::Unsupported { .. })));
        assert!(device.region(99).is_err() && device.bar(1).is_err() && device.bar(6).is_err());

        let ids = device.config().ids().await.unwrap();
        assert_eq!((ids.vendor, ids.device, ids.class, ids.revision), (0x1234, 0x5678, 0x010802, 7));
        let capabilities = device.config().capabilities().await.unwrap();
        assert_eq!(capabilities.iter().map(|c| (c.id, c.offset)).collect::<Vec<_>>(), [(0x11, 0x40), (1, 0x100)]);
        device.set_bus_master(true).await.unwrap();
        assert_eq!(device.config().read::<u16>(4).await.unwrap(), 6);
        device.set_bus_master(false).await.unwrap();
        assert_eq!(device.config().read::<u16>(4).await.unwrap(), 2);

        let bar = device.bar(0).unwrap();
        bar.write::<u64>(8, 0x1122_3344_5566_7788).await.unwrap();
        assert_eq!(bar.read::<u32>(12).await.unwrap(), 0x1122_3344);
        assert_eq!(bar.region().read_u16(8).await.unwrap(), 0x7788);
        bar.region().write_u8(8, 0xff).await.unwrap();
        let mut bytes = [0; 3];
        bar.region().read(7, &mut bytes).await.unwrap();
        assert_eq!(bytes, [0, 0xff, 0x77]);
        assert!(matches!(bar.read::<u32>(2).await, Err(Error::Invalid { .. })));
        assert!(matches!(bar.read::<u32>(0x1000).await, Err(Error::Invalid { .. })));
        assert!(matches!(bar.register::<u32>(0), Err(Error::Unsupported { .. })));
        assert!(matches!(bar.region().read(u64::MAX, &mut bytes).await, Err(Error::Invalid { .. })));

        device.reset().await.unwrap();
        device.reset().await.unwrap();
    });
}

#[test]
fn mapped_areas_are_memory_and_the_rest_is_messages() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_READ && message.payload[8] == 2 {
            // By now the client has written the mapped register.
            let memory = &peer.device.bar2.as_ref().unwrap().1;
            assert_eq!(memory.load_u32(BAR2_BASE + 0x1004), Ok(0xabcd));
            peer.reply(message, &[&message.payload[..], &[1, 2, 3, 4]].concat());
            return true;
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(2).unwrap();
        assert_eq!(
            bar.mapped().iter().map(|a| (a.offset, a.size)).collect::<Vec<_>>(),
            [(0x1000, 0x1000), (0x2000, 0x1000)]
        );
        let register = bar.register::<u32>(0x1004).unwrap();
        bar.posted::<u32>(0x1004).unwrap().write(0xabcd);
        assert_eq!((register.read(), bar.read::<u32>(0x1004).await.unwrap()), (0xabcd, 0xabcd));
        assert_eq!(bar.read::<u32>(0xffc).await.unwrap(), 0x0403_0201);
        assert!(bar.register::<u32>(0x2ffc).is_ok() && bar.register::<u32>(0x3000).is_err());
        drop((bar, device));
        // It keeps the mapping.
        register.write(1);
        assert_eq!(register.read(), 1);
    });
}

#[test]
fn a_bar_that_its_server_truncates_answers_again_when_it_is_back() {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("bar2", flags).unwrap();
    let set_len = |len| rustix::fs::ftruncate(&fd, len).unwrap();
    set_len(0x4000);
    let (theirs, memory) = (fd.try_clone().unwrap(), SharedMemory::map(&fd, 0, 0x4000, true).unwrap());
    let fake = Fake::run(move |mut peer| {
        peer.device.bar2 = Some((theirs, memory));
        while let Some(message) = peer.recv() {
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(2).unwrap();
        bar.write::<u32>(0x1004, 0xabcd).await.unwrap();
        let (doorbell, other) = (bar.posted::<u32>(0x1008).unwrap(), bar.posted::<u32>(0x2000).unwrap());
        doorbell.write(1);
        assert!(doorbell.take_error().is_none());
        // The first of the two areas stays.
        set_len(0x3000);
        bar.write::<u32>(0x1004, 1).await.unwrap();
        set_len(0x2000);
        let is_unavailable = |error: Error| matches!(error, Error::MmioUnavailable { bar: 2, offset: 0x1004 });
        assert!(is_unavailable(bar.read::<u32>(0x1004).await.unwrap_err()));
        assert!(is_unavailable(bar.write::<u32>(0x1004, 5).await.unwrap_err()));
        assert_eq!(bar.register::<u32>(0x1004).unwrap().take_faults().map(|faults| faults.count), Some(2));
        doorbell.write(2);
        let lost = doorbell.take_error();
        assert!(matches!(lost, Some(Error::MmioUnavailable { bar: 2, offset: 0x1008 })), "{lost:?}");
        assert!(lost.unwrap().to_string().contains("BAR 2 does not answer at 0x1008"));
        assert!(doorbell.take_error().is_none() && other.take_error().is_none());
        set_len(0x4000);
        assert_eq!(bar.read::<u32>(0x1004).await.unwrap(), 0);
        bar.write::<u32>(0x1004, 7).await.unwrap();
        assert_eq!(bar.read::<u32>(0x1004).await.unwrap(), 7);
        assert!(device.is_gone().is_none());
    });
}

#[test]
fn interrupts_come_as_items_and_as_counts() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::DEVICE_RESET {
            // Fires vector 1 twice, if it is there.
            if let Some(mut fd) = peer.device.eventfds[1].as_ref() {
                fd.write_all(&1u64.to_ne_bytes()).unwrap();
                fd.write_all(&1u64.to_ne_bytes()).unwrap();
            }
            let set = peer.device.eventfds.iter().map(|fd| if fd.is_some() { '1' } else { '0' });
            let set: String = set.collect();
            peer.device.bar0[..4].copy_from_slice(set.as_bytes());
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let mut vectors = device.interrupts(Irq::MsiX, 0, 3).await.unwrap();
        assert!(vectors[1].next().now_or_never().is_none());
        device.reset().await.unwrap();
        vectors[1].next().await.unwrap().unwrap();
        assert_eq!(vectors[1].take_count().await.unwrap(), 2);
        assert!(vectors[1].next().now_or_never().is_none() && vectors[0].next().now_or_never().is_none());
        device.reset().await.unwrap();
        vectors[1].next().await.unwrap().unwrap();
        let taken = device.interrupts(Irq::MsiX, 2, 2).await;
        assert!(matches!(taken, Err(Error::Invalid { .. })), "{taken:?}");
        drop(vectors.remove(0));
        device.reset().await.unwrap();
        assert_eq!(device.bar(0).unwrap().read::<u32>(0).await.unwrap().to_le_bytes(), *b"0110");
        assert!(matches!(device.interrupts(Irq::MsiX, 3, 2).await, Err(Error::Unsupported { .. })));
        assert!(matches!(device.interrupts(Irq::Error, 0, 1).await, Err(Error::Unsupported { .. })));
        drop(vectors);
        drop(device.interrupts(Irq::MsiX, 0, 4).await.unwrap());
    });
}

#[test]
fn dma_memory_is_mapped_served_and_unmapped() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() != command::REGION_WRITE {
            return false;
        }
        // In the middle of a register write the device reads and writes memory.
        let (iova, len, _) = peer.device.mapped[0];
        let access = DmaAccess { address: (iova + 8).into(), count: 4.into() };
        let read = peer.ask(command::DMA_READ, access.as_bytes());
        assert_eq!(read.payload, [access.as_bytes(), b"ping"].concat());
        let wrote = peer.ask(command::DMA_WRITE, &[access.as_bytes(), b"pong"].concat());
        assert_eq!(wrote.payload, access.as_bytes());
        let beyond = DmaAccess { address: (iova + len - 2).into(), count: 4.into() };
        assert_eq!(peer.ask(command::DMA_READ, beyond.as_bytes()).header.error(), Some(libc::EFAULT));
        let large = DmaAccess { address: iova.into(), count: (2 << 20).into() };
        assert_eq!(peer.ask(command::DMA_READ, large.as_bytes()).header.error(), Some(libc::E2BIG));
        assert_eq!(peer.ask(command::DMA_WRITE, access.as_bytes()).header.error(), Some(libc::EINVAL));
        assert_eq!(peer.ask(command::DMA_READ, &[0; 3]).header.error(), Some(libc::EINVAL));
        assert_eq!(peer.ask(99, &[0; 100]).header.error(), Some(libc::ENOSYS));
        // This one is not answered.
        let mut header = wire::Header::command(0, command::DMA_WRITE, 20);
        header.flags = wire::flags::NO_REPLY.into();
        let quiet = DmaAccess { address: iova.into(), count: 4.into() };
        peer.send(&[header.as_bytes(), quiet.as_bytes(), b"last"].concat(), &[]);
        false
    });
    run(async {
        let device = open(&fake).await;
        let mapping = device.dma().map(8192, HugePages::No).await.unwrap();
        assert!(mapping.iova() >= 0x1000 && mapping.iova().is_multiple_of(4096));
        mapping.memory().write(8, b"ping").unwrap();
        device.bar(0).unwrap().write::<u32>(0, 1).await.unwrap();
        let mut got = [0; 12];
        mapping.memory().read(0, &mut got).unwrap();
        assert_eq!((&got[8..], &got[..4]), (&b"pong"[..], &b"last"[..]));
        drop(mapping);
        let reclaimed = async {
            while device.dma().stats().mappings != 0 {
                yield_now().await;
            }
        };
        reclaimed.await;
        assert_eq!(device.dma().stats().leaked, 0);
        // After a reset this server does not echo unmaps.
        device.reset().await.unwrap();
        drop(device.dma().map(4096, HugePages::No).await.unwrap());
        assert!(device.dma().reclaim().await <= 1);
        assert_eq!(device.dma().stats().leaked, 0);
    });
}

#[test]
fn pipelined_replies_may_come_in_any_order() {
    let fake = Fake::run(|mut peer| {
        peer.device.version = version(&Capabilities { max_outstanding: Some(8), ..Default::default() });
        let mut held = Vec::new();
        while let Some(message) = peer.recv() {
            if message.command() != command::REGION_READ {
                peer.answer(&message);
                continue;
            }
            held.push(message);
            if held.len() == 8 {
                assert!(!peer.more_waits(), "at most 8 are in flight");
                for message in held.drain(..).rev() {
                    peer.answer(&message);
                }
            }
        }
        assert!(held.is_empty());
    });
    run(async {
        let device = open(&fake).await;
        assert_eq!(device.connection().unwrap().limits().max_outstanding, 8);
        let bar = device.bar(0).unwrap();
        for i in 0..16u64 {
            bar.write::<u32>(i * 4, i as u32 * 3).await.unwrap();
        }
        let reads = (0..16u64).map(|i| {
            let bar = bar.clone();
            spawn(async move { bar.read::<u32>(i * 4).await.unwrap() })
        });
        let got: Vec<u32> = join_all(reads).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(got, (0..16).map(|i| i * 3).collect::<Vec<u32>>());
    });
}

#[test]
fn commands_wait_in_line_for_a_server_that_takes_one() {
    let fake = Fake::hooked(|peer, message| {
        thread::sleep(Duration::from_millis(1));
        assert!(!peer.more_waits(), "one command at a time");
        if message.command() == command::REGION_WRITE {
            let at = usize::from(peer.device.bar0[0xfff]);
            peer.device.bar0[0x800 + at] = message.payload[16];
            peer.device.bar0[0xfff] += 1;
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(0).unwrap();
        let writes = (0..32u8).map(|i| {
            let bar = bar.clone();
            spawn(async move { bar.write::<u8>(0, i).await })
        });
        join_all(writes).await.into_iter().for_each(|result| result.unwrap().unwrap());
        let mut order = [0; 32];
        bar.region().read(0x800, &mut order).await.unwrap();
        assert_eq!(order, std::array::from_fn(|i| i as u8));
    });
}

#[test]
fn a_dropped_command_leaves_the_connection_in_step() {
    let fake = Fake::hooked(|_, message| {
        if message.command() == command::REGION_READ {
            thread::sleep(Duration::from_millis(5));
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(0).unwrap();
        bar.write::<u32>(0, 77).await.unwrap();
        for round in 0..20 {
            let mut one = Box::pin(bar.read::<u32>(0));
            let mut two = Box::pin(bar.read::<u32>(0));
            assert!(one.as_mut().now_or_never().is_none() && two.as_mut().now_or_never().is_none());
            if round % 2 == 0 {
                sleep(Duration::from_millis(2)).await;
            }
            drop(one);
            drop(two);
        }
        assert_eq!(bar.read::<u32>(0).await.unwrap(), 77);
    });
}

#[test]
fn posted_writes_keep_only_the_newest_value() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_WRITE {
            thread::sleep(Duration::from_millis(2));
            peer.device.bar0[0x100] += 1;
            if message.payload[16..20] == [99, 0, 0, 0] {
                peer.refuse(message, libc::EPERM);
                return true;
            }
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(0).unwrap();
        let doorbell = bar.posted::<u32>(4).unwrap();
        assert!(!doorbell.is_mapped());
        for i in 1..=1000 {
            doorbell.write(i);
            if i % 100 == 0 {
                yield_now().await;
            }
        }
        while bar.read::<u32>(4).await.unwrap() != 1000 {
            sleep(Duration::from_millis(1)).await;
        }
        let writes = bar.read::<u8>(0x100).await.unwrap();
        assert!((1..=11).contains(&writes), "{writes}");
        assert!(doorbell.take_error().is_none());
        doorbell.write(99);
        let error = loop {
            match doorbell.take_error() {
                Some(error) => break error,
                None => sleep(Duration::from_millis(1)).await,
            }
        };
        assert!(matches!(error, Error::Refused { .. }) && doorbell.take_error().is_none());
        doorbell.write(5);
        while bar.read::<u32>(4).await.unwrap() != 5 {
            sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn large_accesses_are_cut_to_what_the_server_takes() {
    let fake = Fake::run(|mut peer| {
        peer.device.version = version(&Capabilities { max_data_xfer_size: Some(100), ..Default::default() });
        while let Some(message) = peer.recv() {
            if matches!(message.command(), command::REGION_READ | command::REGION_WRITE) {
                assert!(RegionAccess::read_from_prefix(&message.payload).unwrap().0.count.get() <= 100);
            }
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        let region = device.region(0).unwrap();
        let data: [u8; 1001] = std::array::from_fn(|i| i as u8);
        region.write(3, &data).await.unwrap();
        let mut back = [0; 1001];
        region.read(3, &mut back).await.unwrap();
        assert_eq!(back, data);
    });
}

#[test]
fn a_megabyte_goes_through_a_socket_that_takes_less_at_once() {
    let fake = Fake::run(|mut peer| {
        peer.device.bar0 = vec![0; 1 << 20];
        while let Some(message) = peer.recv() {
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        let region = device.region(0).unwrap();
        let data: Vec<u8> = (0..1u32 << 20).map(|i| ((i * 7) >> 3) as u8).collect();
        region.write(0, &data).await.unwrap();
        let mut back = vec![0; 1 << 20];
        region.read(0, &mut back).await.unwrap();
        assert!(back == data);
    });
}

#[test]
fn capabilities_in_a_second_reply_and_no_descriptors() {
    // Asks for more room than the first argsz, and takes no descriptors.
    let fake = Fake::run(|mut peer| {
        peer.device.version = version(&Capabilities { max_msg_fds: Some(0), ..Default::default() });
        while let Some(message) = peer.recv() {
            assert!(message.fds.is_empty());
            if message.command() == command::DEVICE_GET_REGION_INFO {
                let mut info = wire::RegionInfo::read_from_bytes(&message.payload[..]).unwrap();
                if info.index.get() == 2 && info.argsz.get() < 5000 {
                    (info.argsz, info.flags, info.size) = (5000.into(), 15.into(), 0x3000.into());
                    info.cap_offset = 32.into();
                    peer.reply(&message, info.as_bytes());
                    continue;
                }
            }
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        assert_eq!(device.region(2).unwrap().areas().len(), 2);
        assert!(matches!(device.interrupts(Irq::MsiX, 0, 1).await, Err(Error::Unsupported { .. })));
        let _mapping = device.dma().map(4096, HugePages::No).await.unwrap();
    });
}

#[test]
fn an_override_of_the_commands_in_flight() {
    let fake = Fake::hooked(|_, _| false);
    run(async {
        let options = Options { max_outstanding: Some(4), ..patient() };
        let device = Device::open_with(&fake.address(), options).await.unwrap();
        assert_eq!(device.connection().unwrap().limits().max_outstanding, 4);
        let bar = device.bar(0).unwrap();
        let reads = (0..40u64).map(|i| bar.read::<u32>(i * 4));
        assert!(join_all(reads).await.iter().all(Result::is_ok));
    });
}
