//! The protocol without a socket, as a hostile client speaks it.

use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use vfio_uring::transport::user::wire::{HEADER_SIZE, Header, command, flags};

use super::{MAX_DATA_XFER, NoChannel, Session};
use crate::{
    device::{Device, Host, NoHost, region},
    nvme::{Config, Controller, NamespaceConfig},
};

fn device() -> Controller {
    Controller::new(Config { namespaces: vec![NamespaceConfig::memory(1 << 20)], ..Config::default() }).unwrap()
}

/// Dwords as a client might put them in a message: small numbers, sizes, flags, register offsets, and nonsense.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let dword = prop_oneof![
        4 => 0u32..64,
        2 => (0u32..64).prop_map(|page| page << 12),
        1 => Just(0x46_0001),
        1 => any::<u32>(),
        1 => (0u32..32).prop_map(|bit| 1 << bit),
    ];
    (proptest::collection::vec(dword, 0..16), 0usize..4).prop_map(|(dwords, tail)| {
        let mut bytes: Vec<u8> = dwords.iter().flat_map(|dword| dword.to_le_bytes()).collect();
        bytes.truncate(bytes.len().saturating_sub(tail));
        bytes
    })
}

fn descriptors(kind: u8) -> Vec<OwnedFd> {
    let memory = || {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 64 << 10).unwrap();
        fd
    };
    match kind {
        0..=3 => Vec::new(),
        4..=5 => vec![memory()],
        6 => vec![eventfd(0, EventfdFlags::CLOEXEC).unwrap()],
        _ => vec![eventfd(0, EventfdFlags::CLOEXEC).unwrap(), memory()],
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_messages(
        messages in proptest::collection::vec((0u16..20, payload(), 0u8..8, prop::bool::weighted(0.1)), 1..60),
        version in prop::bool::weighted(0.95),
    ) {
        let mut device = device();
        let mut session = Session::new();
        if version {
            let header = Header::command(0, command::VERSION, 4);
            prop_assert!(session.handle(&header, &[0; 4], Vec::new(), &mut device, &mut NoChannel).is_some());
        }
        for (id, (number, payload, fds, silent)) in messages.into_iter().enumerate() {
            let mut header = Header::command(id as u16, number, payload.len());
            if silent {
                header.flags = flags::NO_REPLY.into();
            }
            let reply = session.handle(&header, &payload, descriptors(fds), &mut device, &mut NoChannel);
            prop_assert_eq!(reply.is_none(), silent);
            if let Some(reply) = reply {
                prop_assert!(reply.header.is_reply());
                prop_assert_eq!(reply.header.msg_id.get(), id as u16);
                prop_assert_eq!(reply.header.size.get() as usize, HEADER_SIZE + reply.payload.len());
                prop_assert!(reply.payload.len() <= 16 + MAX_DATA_XFER);
                if reply.header.error().is_some() {
                    prop_assert!(reply.payload.is_empty() && reply.fd.is_none());
                }
            }
            for _ in 0..4 {
                device.service(&mut session.host(&mut NoChannel));
            }
        }
        device.reset(&mut NoHost);
        let mut status = [0; 4];
        prop_assert!(device.read(region::BAR0, 0x1c, &mut status, &mut NoHost).is_ok());
        prop_assert_eq!(status, [0; 4]);
    }
}

#[test]
fn memory_spans_regions_and_keeps_its_direction() {
    use vfio_uring::{
        dma::{HugePages, SharedMemory},
        transport::user::wire::DmaMap,
    };
    use zerocopy::IntoBytes;

    let mut device = device();
    let mut session = Session::new();
    session.handle(&Header::command(0, command::VERSION, 4), &[0; 4], Vec::new(), &mut device, &mut NoChannel);
    let mut map = |address: u64, access: u32| {
        let (fd, memory) = SharedMemory::create("test", 4096, HugePages::No).unwrap();
        let map =
            DmaMap { argsz: 32.into(), flags: access.into(), offset: 0.into(), address: address.into(), size: 4096.into() };
        let header = Header::command(0, command::DMA_MAP, 32);
        let reply = session.handle(&header, map.as_bytes(), vec![fd], &mut device, &mut NoChannel).unwrap();
        assert_eq!(reply.header.error(), None);
        memory
    };
    let (low, high) = (map(0x1000, 3), map(0x2000, 3));
    map(0x4000, flags::DMA_READ);
    map(0x5000, flags::DMA_WRITE);
    let top = map(u64::MAX - 0x1fff, 3);
    let mut channel = NoChannel;
    let mut host = session.host(&mut channel);
    host.write(0x1ffe, b"span").unwrap();
    let (mut one, mut two, mut back) = ([0; 2], [0; 2], [0; 4]);
    low.read(4094, &mut one).unwrap();
    high.read(0, &mut two).unwrap();
    host.read(0x1ffe, &mut back).unwrap();
    assert_eq!((&one, &two, &back), (b"sp", b"an", b"span"));
    assert!(host.window(0x1ffe, 4).is_none() && host.window(0x1ffc, 4).is_some());
    assert!(host.write(0x2ffe, b"span").is_err() && host.read(0xfff, &mut back).is_err());
    assert!(host.write(0x4000, b"no").is_err() && host.read(0x4000, &mut back).is_ok());
    assert!(host.write(0x5000, b"ok").is_ok() && host.read(0x5000, &mut back).is_err());
    host.write(u64::MAX - 0x1001, b"!").unwrap();
    assert!(host.write(u64::MAX - 1, b"beyond").is_err());
    drop(top);
}
