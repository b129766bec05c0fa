//! Registers and admin commands.

use vfio_uring_models::{
    device::Device,
    nvme::{Config, Controller, NamespaceConfig},
};

use crate::support::*;

const INVALID_FIELD: u16 = 0x4002;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn identify(client: &mut Client, cns: u32, nsid: u32) -> (u16, Vec<u8>) {
    let cqe = client.admin(sqe(6, nsid, [DATA, 0], [cns, 0, 0, 0, 0, 0]));
    (cqe.status, client.bytes(DATA, 4096))
}

fn feature(client: &mut Client, set: bool, id: u32, value: u32) -> (u16, u32) {
    let cqe = client.admin(sqe(if set { 9 } else { 10 }, 0, [0, 0], [id, value, 0, 0, 0, 0]));
    (cqe.status, cqe.result)
}

fn log(client: &mut Client, id: u32, len: u32, offset: u32) -> u16 {
    client.admin(sqe(2, u32::MAX, [DATA, DATA + 4096], [(len / 4 - 1) << 16 | id, 0, offset, 0, 0, 0])).status
}

#[test]
fn registers_and_regions() {
    let mut client = Client::new(disk());
    assert_eq!(client.get(8), 0x0001_0400);
    let cap = u64::from(client.get(0)) | u64::from(client.get(4)) << 32;
    assert!(cap & 0xffff >= 1023);
    assert!(cap >> 24 & 0xff != 0);
    assert_eq!((cap >> 16 & 1, cap >> 32 & 0xf, cap >> 37 & 1), (1, 0, 1));
    let mut bytes = [0; 8];
    client.controller.read(0, 0, &mut bytes, &mut client.memory).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), cap);
    // Any half alone, no other width or alignment.
    client.set(0x2c, 7);
    client.set(0x28, 0x1234_5678);
    assert_eq!((client.get(0x28), client.get(0x2c)), (0x1234_5000, 7));
    for (offset, len) in [(0x2a, 4), (0x28, 2), (0x28, 1), (0x29, 8), (0x28, 16)] {
        assert!(client.controller.write(0, offset, &vec![0; len], &mut client.memory).is_err(), "{offset:#x} {len}");
    }
    let mut half = [0; 2];
    client.controller.read(0, 10, &mut half, &mut client.memory).unwrap();
    assert_eq!(half, [1, 0]);
    assert!(client.controller.read(0, 11, &mut half, &mut client.memory).is_err());

    let bar = client.controller.region(0);
    let area = bar.mappable.unwrap();
    assert!(bar.size >= 0x4000 && area.offset == 0x1000 && area.size == 0x1000 && area.memory.len() == 0x1000);
    assert_eq!(client.controller.region(7).size, 4096);
    assert_eq!((client.controller.region(1).size, client.controller.region(99).size), (0, 0));
    assert_eq!((client.controller.irq_vectors(2), client.controller.irq_vectors(0)), (65, 0));
    // A message and the mapping are the same doorbell, which the client maps at the area's offset.
    client.set(0x1008, 9);
    assert_eq!(area.memory.load_u32(8), Ok(9));
    let theirs = vfio_uring::dma::SharedMemory::map(&area.fd, area.offset, area.size as usize, true).unwrap();
    theirs.store_u32(8, 11).unwrap();
    assert_eq!(client.get(0x1008), 11);
}

#[test]
fn enabling_with_what_is_impossible_is_fatal() {
    let good = (31 << 16 | 31, ASQ, ACQ, 4 << 20 | 6 << 16 | 1);
    let cases = [
        (0, good.1, good.2, good.3),
        (good.0, good.1, good.2, good.3 | 1 << 4),
        (good.0, good.1, good.2, good.3 | 5 << 7),
        (good.0, good.1, good.2, good.3 | 1 << 7 | 0x8000_0000),
        (good.0, good.1, good.2, good.3 | 1 << 11),
        (good.0, good.1, good.2, 4 << 20 | 7 << 16 | 1),
        (good.0, u64::MAX - 0xfff, good.2, good.3),
    ];
    for (case, (aqa, asq, acq, cc)) in cases.into_iter().enumerate() {
        let mut client = Client::new(disk());
        client.set(0x24, aqa);
        // Not aligned to 8 KiB pages, where the case wants these.
        client.set64(0x28, if case == 3 { asq + 4096 } else { asq });
        client.set64(0x30, acq);
        client.set(0x14, cc);
        assert_eq!(client.get(0x1c), 2, "case {case}");
        assert_eq!(client.service(), 0);
        client.set(0x14, 0);
        assert_eq!(client.get(0x1c), 0);
        client.enable();
        assert_eq!(identify(&mut client, 1, 0).0, 0);
    }
}

#[test]
fn identify_data() {
    let mut client = Client::ready(disk());
    let (status, data) = identify(&mut client, 1, 0);
    assert_eq!(status, 0);
    assert_eq!(&data[0..2], &[0x36, 0x1b]);
    assert!(String::from_utf8_lossy(&data[4..24]).starts_with("VFIOURING1 "));
    assert_eq!((data[77], data[512], data[513], data[516]), (5, 0x66, 0x44, 2));
    assert!(data[768..].starts_with(b"nqn."));
    let (status, data) = identify(&mut client, 0, 2);
    assert_eq!((status, u64_at(&data, 0), data[130]), (0, 1 << 28, 12));
    let (status, data) = identify(&mut client, 2, 0);
    assert_eq!((status, &data[..12]), (0, &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0][..]));
    assert_eq!(identify(&mut client, 2, 1).1[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    let (one, two) = (identify(&mut client, 3, 1), identify(&mut client, 3, 2));
    assert!(one.0 == 0 && matches!(one.1[0], 1..=3) && one.1 != two.1);
    for (cns, nsid, status) in
        [(0, 0, 0x400b), (0, 3, 0x400b), (0, u32::MAX, 0x400b), (2, u32::MAX, 0x400b), (0x10, 1, INVALID_FIELD)]
    {
        assert_eq!(identify(&mut client, cns, nsid).0, status, "cns {cns} nsid {nsid}");
    }
    // Into two pages, to memory that is not there, to an offset that is not possible, by an SGL.
    let cqe = client.admin(sqe(6, 0, [DATA + 4092, DATA + 0x4000], [1, 0, 0, 0, 0, 0]));
    assert_eq!((cqe.status, &client.bytes(DATA + 4092, 2)[..]), (0, &[0x36, 0x1b][..]));
    assert!(client.bytes(DATA + 0x4000, 20).starts_with(b"VFIOURING1 "));
    for (prps, status) in [([1, 0], 0x4013), ([DATA + 2, 0], 0x4013), ([DATA + 4, DATA + 8], 0x4013), ([0, 0], 0x4)] {
        assert_eq!(client.admin(sqe(6, 0, prps, [1, 0, 0, 0, 0, 0])).status, status, "{prps:x?}");
    }
    let mut sgl = sqe(6, 0, [DATA, 4096], [1, 0, 0, 0, 0, 0]);
    sgl.0[0] |= 1 << 14;
    assert_eq!(client.admin(sgl).status, INVALID_FIELD);
    assert_eq!(client.admin(sqe(0x80, 0, [0, 0], [0; 6])).status, 0x4001);
    assert_eq!(client.admin(sqe(0x18, 0, [0, 0], [0; 6])).status, 0x4001);
}

#[test]
fn features() {
    let mut client = Client::ready(disk());
    assert_eq!(feature(&mut client, true, 7, 9 << 16 | 9), (0, 9 << 16 | 9));
    assert_eq!(feature(&mut client, true, 7, 0xffff), (INVALID_FIELD, 0));
    assert_eq!(feature(&mut client, false, 7, 0), (0, 9 << 16 | 9));
    let default = feature(&mut client, false, 1, 0);
    assert_eq!(feature(&mut client, true, 1, 0x0102_0303), (0, 0));
    assert_eq!(feature(&mut client, false, 1, 0), (0, 0x0102_0303));
    assert_eq!(feature(&mut client, false, 4, 0), (0, 343));
    assert_eq!(feature(&mut client, true, 9, 1 << 16 | 64), (0, 0));
    assert_eq!(feature(&mut client, false, 9, 64), (0, 1 << 16 | 64));
    assert_eq!(feature(&mut client, true, 9, 65), (INVALID_FIELD, 0));
    // There is no cache, no power state but 0, nothing that is saved, no such feature.
    for (id, value, status) in
        [(6, 1, INVALID_FIELD), (2, 1, INVALID_FIELD), (1 << 31 | 1, 1, 0x410d), (0xc0, 0, INVALID_FIELD)]
    {
        assert_eq!(feature(&mut client, true, id, value).0, status, "feature {id:#x}");
    }
    client.pair(1, 8);
    assert_eq!(feature(&mut client, true, 7, 0).0, 0x400c);
    // A reset brings the defaults back.
    client.set(0x14, 0);
    client.enable();
    assert_eq!(feature(&mut client, false, 1, 0), default);
}

#[test]
fn log_pages() {
    let mut client = Client::ready(disk());
    client.admin(sqe(0x80, 77, [0, 0], [0; 6]));
    assert_eq!(log(&mut client, 1, 128, 0), 0);
    let errors = client.bytes(DATA, 128);
    assert_eq!((u64_at(&errors, 0), u16::from_le_bytes([errors[12], errors[13]]), errors[24]), (1, 0x4001 << 1, 77));
    assert_eq!(errors[64..], [0; 64]);
    assert_eq!(log(&mut client, 2, 512, 0), 0);
    assert_eq!(client.bytes(DATA + 3, 1), [100]);
    assert_eq!(log(&mut client, 2, 4, 0), 0);
    assert_eq!(log(&mut client, 3, 512, 0), 0);
    assert_eq!(client.bytes(DATA, 12), b"\x01\0\0\0\0\0\0\x001.0 ");
    assert_eq!(log(&mut client, 4, 4096, 0), 0);
    assert_eq!(log(&mut client, 5, 2048, 1024), 0);
    assert_eq!(client.bytes(DATA, 12), [1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
    // More than there is, and offsets.
    assert_eq!(log(&mut client, 5, 8, 4092), 0);
    assert_eq!(
        (log(&mut client, 5, 4, 4097), log(&mut client, 5, 4, 4100), log(&mut client, 2, 4, 2)),
        (INVALID_FIELD, INVALID_FIELD, INVALID_FIELD)
    );
    assert_eq!(log(&mut client, 0x70, 4, 0), 0x4109);
    assert_eq!(client.admin(sqe(2, 1, [DATA, 0], [2, 0, 0, 0, 0, 0])).status, INVALID_FIELD);
}

#[test]
fn events_wait_and_can_be_aborted() {
    let mut client = Client::ready(disk());
    let mut admin = client.admin;
    let cids: Vec<_> = (0..5).map(|_| client.push(&mut admin, sqe(12, 0, [0, 0], [0; 6]))).collect();
    client.ring(&admin);
    client.service();
    let cqe = client.poll(&mut admin).unwrap();
    assert_eq!((cqe.cid, cqe.status), (cids[4], 0x4105));
    assert_eq!(client.poll(&mut admin), None);
    client.consumed(&admin);

    // An abort of the second one: two completions.
    let abort = client.push(&mut admin, sqe(8, 0, [0, 0], [u32::from(cids[1]) << 16, 0, 0, 0, 0, 0]));
    client.ring(&admin);
    client.service();
    let mut both = [client.poll(&mut admin).unwrap(), client.poll(&mut admin).unwrap()];
    both.sort_by_key(|cqe| cqe.cid);
    assert_eq!(both.map(|cqe| (cqe.cid, cqe.status, cqe.result)), [(cids[1], 7, 0), (abort, 0, 0)]);
    client.consumed(&admin);
    client.admin = admin;
    let abort = sqe(8, 0, [0, 0], [u32::from(cids[1]) << 16, 0, 0, 0, 0, 0]);
    assert_eq!(client.admin(abort).result, 1);

    // A doorbell that is out of range completes the first one; the next waits for the log page to be read.
    let pair = client.pair(1, 8);
    let mut admin = client.admin;
    for tail in [8, u32::MAX, 100] {
        client.doorbell(2, tail);
        client.service();
    }
    let cqe = client.poll(&mut admin).unwrap();
    assert_eq!((cqe.cid, cqe.status, cqe.result), (cids[0], 0, 1 << 16 | 1 << 8));
    assert_eq!(client.poll(&mut admin), None);
    client.consumed(&admin);
    client.push(&mut admin, sqe(2, 0, [DATA, 0], [15 << 16 | 1, 0, 0, 0, 0, 0]));
    client.ring(&admin);
    client.service();
    let both = [client.poll(&mut admin).unwrap(), client.poll(&mut admin).unwrap()];
    assert_eq!(both.map(|cqe| cqe.status), [0, 0]);
    assert_eq!(both[1].cid, cids[2]);
    assert_eq!(client.get(0x1c), 1);
    // The queue works on with a valid value.
    client.consumed(&admin);
    client.admin = admin;
    let mut pair = pair;
    assert_eq!(client.run(&mut pair, io(0, 1, 0, 1, [0, 0])).status, 0);
}

#[test]
fn shutdown_and_resets() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(1, 8);
    client.fill(DATA, 512, 1);
    assert_eq!(client.run(&mut pair, io(1, 1, 5, 1, [DATA, 0])).status, 0);
    client.set(0x14, client_cc() | 1 << 14);
    assert_eq!(client.get(0x1c), 1 | 2 << 2);
    client.push(&mut pair, io(2, 1, 5, 1, [DATA, 0]));
    client.ring(&pair);
    assert_eq!(client.service(), 0);
    assert!(!client.controller.is_active());
    client.set(0x14, 0);
    assert_eq!((client.get(0x1c), client.get(0x1000), client.get(0x1008)), (0, 0, 0));
    assert_eq!((client.get(0x24), client.get(0x28)), (31 << 16 | 31, ASQ as u32));
    client.enable();
    let mut pair = client.pair(1, 8);
    assert_eq!(client.run(&mut pair, io(2, 1, 5, 1, [DATA + 4096, 0])).status, 0);
    assert_eq!(client.bytes(DATA, 512), client.bytes(DATA + 4096, 512));

    // A device reset in the middle of work; one by configuration space.
    for flr in [false, true] {
        client.push(&mut pair, io(2, 1, 5, 1, [DATA, 0]));
        client.ring(&pair);
        if flr {
            let mut at = 0x34;
            let mut header = [0; 2];
            while header[0] != 0x10 {
                client.controller.read(7, at, &mut header[..1], &mut client.memory).unwrap();
                at = u64::from(header[0]);
                client.controller.read(7, at, &mut header, &mut client.memory).unwrap();
                at += 1;
            }
            client.controller.write(7, at - 1 + 8, &[0, 0x80], &mut client.memory).unwrap();
        } else {
            client.controller.reset(&mut client.memory);
        }
        assert_eq!((client.get(0x14), client.get(0x1c), client.get(0x24), client.get(0x1008)), (0, 0, 0, 0));
        assert_eq!(client.service(), 0);
        client.enable();
        pair = client.pair(1, 8);
        assert_eq!(client.run(&mut pair, io(2, 1, 5, 1, [DATA, 0])).status, 0);
    }
}

fn client_cc() -> u32 {
    4 << 20 | 6 << 16 | 1
}

#[test]
fn impossible_configurations_are_explained() {
    let with = |namespace| Config { namespaces: vec![namespace], ..Config::default() };
    let cases = [
        (with(NamespaceConfig::memory(0)), "namespace size 0"),
        (with(NamespaceConfig::memory(1000)), "multiple of the block size 512"),
        (with(NamespaceConfig::memory(1 << 20).with_lba_size(520)), "block size 520"),
        (with(NamespaceConfig::memory(1 << 60)), "above the limit"),
        (with(NamespaceConfig::file("/nowhere/at/all", 512)), "/nowhere/at/all"),
        (Config { namespaces: vec![], ..Config::default() }, "0 namespaces"),
        (Config { mdts: 10, ..Config::default() }, "mdts 10"),
        (Config { max_queues: 0, ..Config::default() }, "0 I/O queues"),
        (Config { serial: "x".repeat(21), ..Config::default() }, "serial number"),
    ];
    for (config, expected) in cases {
        let error = Controller::new(config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
