//! Oddities and malice on the wire.

use std::{
    io::Write,
    net::Shutdown,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use vfio_uring::transport::user::wire::{
    self, DeviceInfo, DmaMap, DmaUnmap, Header, IrqInfo, MultiWrite, RegionAccess, RegionInfo, SetIrqs, Version, command,
    flags,
};
use vfio_uring_models::{
    nvme::{self, Config, Controller, NamespaceConfig},
    server::{Running, Server},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::common::{Client, DATA, Driver, LIMIT, Memory};

const EINVAL: i32 = 22;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENOENT: i32 = 2;

fn server() -> Running {
    nvme::spawn(Config { namespaces: vec![NamespaceConfig::memory(1 << 20)], ..Config::default() }).unwrap()
}

fn client(server: &Running) -> Client {
    Client::connect(server.path())
}

#[test]
fn version_is_negotiated() {
    let server = server();
    let mut one = Client::silent(server.path());
    // Nothing goes before VERSION.
    assert_eq!(one.ask(command::DEVICE_GET_INFO, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(EINVAL));
    assert_eq!(one.ask(command::VERSION, &[0, 0]), Err(EINVAL));
    assert_eq!(one.ask(command::VERSION, &[1, 0, 0, 0]), Err(EINVAL));
    assert_eq!(one.ask(command::VERSION, b"\0\0\0\0{}"), Err(EINVAL));
    let offer =
        b"\0\0\x02\0{\"capabilities\":{\"max_msg_fds\":8,\"max_outstanding\":9,\"twin_socket\":{\"supported\":true}}}\0";
    let reply = one.ok(command::VERSION, offer);
    assert_eq!(reply.last(), Some(&0));
    let (version, capabilities) = wire::parse_version(&reply).unwrap();
    assert_eq!((version.major.get(), version.minor.get()), (0, 0));
    assert_eq!(capabilities.max_outstanding, Some(9));
    assert_eq!(capabilities.write_multiple, None);
    assert!(!String::from_utf8_lossy(&reply).contains("twin_socket"));
    // What QEMU checks.
    assert!(capabilities.max_msg_fds.unwrap() <= 16 && capabilities.max_data_xfer_size.unwrap() <= 64 << 20);
    assert!(capabilities.max_dma_maps.unwrap() <= 65535 && capabilities.pgsizes.unwrap() & 4095 == 0);
    assert_eq!(one.ask(command::VERSION, &[0; 4]), Err(EINVAL), "a second time");
    drop(one);
    let mut two = Client::silent(server.path());
    let reply = two.ok(command::VERSION, &[0; 4]);
    assert_eq!(wire::parse_version(&reply).unwrap().1.max_outstanding, None);
}

#[test]
fn infos() {
    let server = server();
    let mut client = client(&server);
    client.id = 0xfffe;
    let info = DeviceInfo { argsz: 16.into(), ..Default::default() };
    let info = DeviceInfo::read_from_bytes(&client.ok(command::DEVICE_GET_INFO, info.as_bytes())).unwrap();
    assert_eq!((info.flags.get(), info.num_regions.get(), info.num_irqs.get()), (3, 9, 5));
    let ask = |argsz: u32, index: u32| RegionInfo { argsz: argsz.into(), index: index.into(), ..Default::default() };
    // A reply of no more than was asked for, which tells how much there is.
    let reply = client.ask_with(command::DEVICE_GET_REGION_INFO, ask(32, 0).as_bytes(), &[]);
    let small = RegionInfo::read_from_bytes(&reply.payload).unwrap();
    assert_eq!((small.argsz.get(), small.cap_offset.get(), reply.fds.len()), (64, 0, 0));
    let reply = client.ask_with(command::DEVICE_GET_REGION_INFO, ask(4096, 0).as_bytes(), &[]);
    assert_eq!((reply.payload.len(), reply.fds.len()), (64, 1));
    let (info, _) = RegionInfo::read_from_prefix(&reply.payload).unwrap();
    assert_eq!(info.flags.get(), 15);
    let chain = wire::capabilities(&reply.payload, 32, info.cap_offset.get()).unwrap();
    let areas = wire::sparse_areas(chain[0].1).unwrap();
    assert_eq!((areas.len(), areas[0].offset.get(), areas[0].size.get()), (1, 0x1000, 0x1000));
    let doorbells = vfio_uring::dma::SharedMemory::map(&reply.fds[0], 0x1000, 0x1000, true).unwrap();
    doorbells.store_u32(0, 7).unwrap();
    assert_eq!(client.read_u32(0x1000), 7, "the mapping is the region");
    for (index, size) in [(1, 0), (6, 0), (7, 4096), (8, 0)] {
        let info = client.ok(command::DEVICE_GET_REGION_INFO, ask(32, index).as_bytes());
        assert_eq!(RegionInfo::read_from_bytes(&info).unwrap().size.get(), size);
    }
    assert_eq!(client.ask(command::DEVICE_GET_REGION_INFO, ask(32, 9).as_bytes()), Err(EINVAL));
    assert_eq!(client.ask(command::DEVICE_GET_REGION_INFO, ask(31, 0).as_bytes()), Err(EINVAL));
    for (index, count) in [(0, 0), (1, 0), (2, 65), (3, 1), (4, 1)] {
        let info = IrqInfo { argsz: 16.into(), index: u32::into(index), ..Default::default() };
        let info = client.ok(command::DEVICE_GET_IRQ_INFO, info.as_bytes());
        assert_eq!(IrqInfo::read_from_bytes(&info).unwrap().count.get(), count);
    }
    let beyond = IrqInfo { argsz: 16.into(), index: 5.into(), ..Default::default() };
    assert_eq!(client.ask(command::DEVICE_GET_IRQ_INFO, beyond.as_bytes()), Err(EINVAL));
}

#[test]
fn config_space_in_any_width() {
    let server = server();
    let mut client = client(&server);
    let whole = client.read(7, 0, 4096).unwrap();
    assert_eq!(whole[..4], [0x36, 0x1b, 0x10, 0]);
    assert_eq!(whole[9..12], [2, 8, 1]);
    for width in 1..=8 {
        for offset in 0..64 {
            assert_eq!(client.read(7, offset as u64, width).unwrap(), whole[offset..offset + width]);
        }
    }
    client.write(7, 4, &[6]).unwrap();
    assert_eq!(client.read(7, 4, 2), Ok(vec![6, 0]));
    assert_eq!(client.read(7, 4095, 2), Err(EINVAL));
    assert_eq!(client.read(7, u64::MAX, 1), Err(EINVAL));
    assert_eq!(client.read(9, 0, 4), Err(EINVAL));
    assert_eq!(client.read(1, 0, 4), Err(EINVAL));
    // CAP in both widths.
    let cap = client.read(0, 0, 8).unwrap();
    assert_eq!([client.read(0, 0, 4).unwrap(), client.read(0, 4, 4).unwrap()].concat(), cap);
    assert_eq!(client.write(0, 0x14, &[1]), Err(EINVAL));
    assert_eq!(client.read(0, 2, 8), Err(EINVAL));
}

#[test]
fn messages_in_pieces_and_several_in_one() {
    let server = server();
    let mut client = client(&server);
    let access = RegionAccess { offset: 0.into(), region: 7.into(), count: 4.into() };
    let message = [Header::command(5, command::REGION_READ, 16).as_bytes(), access.as_bytes()].concat();
    client.id = 5;
    for byte in &message {
        client.send_raw(&[*byte], &[]);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.recv().payload.len(), 20);
    client.send_raw(&message.repeat(100), &[]);
    for _ in 0..100 {
        let reply = client.recv();
        assert_eq!((reply.payload.len(), reply.header.msg_id.get()), (20, 5));
    }
    // No reply where none is wanted, and one to what nobody knows.
    client.send(command::REGION_READ, flags::NO_REPLY, access.as_bytes(), &[]);
    client.send(99, flags::NO_REPLY, &[1; 1000], &[]);
    assert_eq!(client.ask(99, &[1; 100_000]), Err(95));
    assert_eq!(client.ask(command::DEVICE_GET_REGION_IO_FDS, &[0; 16]), Err(95));
    assert!(client.read(7, 0, 4).is_ok());
    // A reply to nothing is of no interest.
    client.send(command::DMA_READ, flags::REPLY, &[0; 20], &[]);
    assert!(client.read(7, 0, 4).is_ok());
}

#[test]
fn a_broken_header_ends_the_connection() {
    let server = server();
    let good = Header::command(1, command::REGION_READ, 16);
    for bad in [
        Header { size: 15.into(), ..good },
        Header { size: 0.into(), ..good },
        Header { size: u32::MAX.into(), ..good },
        Header { flags: 3.into(), ..good },
        Header { size: 20.into(), flags: 0x21.into(), ..good },
    ] {
        let mut client = client(&server);
        client.send_raw(bad.as_bytes(), &[]);
        assert!(client.into_closed());
    }
    // The next is served.
    client(&server).read(7, 0, 4).unwrap();
}

#[test]
fn dma_maps() {
    let server = server();
    let mut client = client(&server);
    let memory = Memory::new(0x3000);
    let fd = memory.fd.as_fd();
    client.map(0x1_0000, 0x3000, Some(fd)).unwrap();
    for (iova, size) in [(0x1_0000, 0x3000), (0xf000, 0x2000), (0x1_2000, 0x1000), (0xf000, 0x8000), (0x1_1000, 0x1000)] {
        assert_eq!(client.map(iova, size, None), Err(EEXIST), "{iova:#x}");
    }
    client.map(0xf000, 0x1000, Some(fd)).unwrap();
    client.map(0x1_3000, 0x1000, None).unwrap();
    for (iova, size) in [(0x123, 0x1000), (0, 0x10), (0, 0), (u64::MAX - 0xfff, 0x2000)] {
        assert_eq!(client.map(iova, size, None), Err(EINVAL), "{iova:#x} {size:#x}");
    }
    assert_eq!(client.map(0x10_0000, 0x4000, Some(fd)), Err(EINVAL), "beyond the end of the file");
    let map = DmaMap { argsz: 32.into(), flags: 0.into(), offset: 0.into(), address: 0.into(), size: 4096.into() };
    assert_eq!(client.ask(command::DMA_MAP, map.as_bytes()), Err(EINVAL));
    let map = DmaMap { flags: 3.into(), argsz: 8.into(), ..map };
    assert_eq!(client.ask(command::DMA_MAP, map.as_bytes()), Err(EINVAL));
    let map = DmaMap { argsz: 32.into(), ..map };
    assert_eq!(client.ask_with(command::DMA_MAP, map.as_bytes(), &[fd, fd]).header.error(), Some(EINVAL));
    // A pipe can't be mapped.
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(client.map(0x20_0000, 0x1000, Some(pipe.as_fd())).is_err());

    let unmap = |flags: u32, address: u64, size: u64| DmaUnmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    };
    assert_eq!(client.ask(command::DMA_UNMAP, unmap(0, 0x1_0000, 0x1000).as_bytes()), Err(ENOENT));
    assert_eq!(client.ask(command::DMA_UNMAP, unmap(0, 0x1_1000, 0x2000).as_bytes()), Err(ENOENT));
    // With a descriptor, which is closed.
    let exact = unmap(0, 0x1_0000, 0x3000);
    let reply = client.ask_with(command::DMA_UNMAP, exact.as_bytes(), &[fd]);
    assert_eq!((reply.header.error(), &reply.payload[..]), (None, exact.as_bytes()));
    assert_eq!(client.ask(command::DMA_UNMAP, exact.as_bytes()), Err(ENOENT));
    assert_eq!(client.ask(command::DMA_UNMAP, unmap(2, 1, 0).as_bytes()), Err(EINVAL));
    client.ok(command::DMA_UNMAP, unmap(2, 0, 0).as_bytes());
    client.map(0xf000, 0x8000, None).unwrap();
    client.ok(command::DMA_UNMAP, unmap(2, 0, 0).as_bytes());
    // Many, and large.
    let (large, _) = sparse(4 << 30);
    for i in 0..80 {
        client.map(i * (4 << 30), 4 << 30, Some(large.as_fd())).unwrap();
    }
}

fn sparse(len: u64) -> (OwnedFd, u64) {
    let fd = rustix::fs::memfd_create("large", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    (fd, len)
}

fn irqs(flags: u32, start: u32, count: u32) -> SetIrqs {
    let argsz = 20.into();
    SetIrqs { argsz, flags: flags.into(), index: 2.into(), start: start.into(), count: count.into() }
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

#[test]
fn interrupts() {
    let server = server();
    let mut client = client(&server);
    let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let (one, two) = (event(), event());
    let mut set = |set: SetIrqs, data: &[u8], fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        client.ask_with(command::DEVICE_SET_IRQS, &[set.as_bytes(), data].concat(), &fds).header.error()
    };
    const NONE: u32 = 0x21;
    const BOOL: u32 = 0x22;
    const EVENTFD: u32 = 0x24;
    assert_eq!(set(irqs(EVENTFD, 3, 2), &[], &[&one, &two]), None);
    assert_eq!(set(irqs(NONE, 3, 1), &[], &[]), None);
    assert_eq!(set(irqs(BOOL, 3, 2), &[0, 1], &[]), None);
    assert_eq!((count(&one), count(&two)), (1, 1));
    // No descriptor: the vector is not bound any more.
    assert_eq!(set(irqs(EVENTFD, 3, 1), &[], &[]), None);
    assert_eq!(set(irqs(NONE, 0, 65), &[], &[]), None);
    assert_eq!((count(&one), count(&two)), (0, 1));
    assert_eq!(set(irqs(NONE, 0, 0), &[], &[]), None);
    assert_eq!(set(irqs(NONE, 0, 65), &[], &[]), None);
    assert_eq!(count(&two), 0);
    for (bad, data) in [
        (irqs(EVENTFD, 64, 2), &[][..]),
        (irqs(EVENTFD, u32::MAX, 2), &[]),
        (irqs(EVENTFD, 0, 0), &[]),
        (irqs(BOOL, 0, 2), &[1]),
        (irqs(0x20, 0, 1), &[]),
        (irqs(0x27, 0, 1), &[]),
        (irqs(0x31, 0, 1), &[]),
        (SetIrqs { index: 5.into(), ..irqs(NONE, 0, 0) }, &[]),
        (SetIrqs { argsz: 4.into(), ..irqs(NONE, 0, 0) }, &[]),
    ] {
        assert_eq!(set(bad, data, &[]), Some(EINVAL), "{bad:?}");
    }
    assert_eq!(set(irqs(EVENTFD, 0, 3), &[], &[&one, &two]), Some(EINVAL));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(set(irqs(EVENTFD, 0, 1), &[], &[&pipe]), Some(EINVAL), "only eventfds");
    // A counter that is full does not block the server.
    rustix::io::write(&one, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    assert_eq!(set(irqs(EVENTFD, 0, 1), &[], &[&one]), None);
    assert_eq!(set(irqs(NONE, 0, 1), &[], &[]), None);
    // Sixteen descriptors are taken, more are closed.
    assert_eq!(set(irqs(EVENTFD, 0, 16), &[], &[&one; 16]), None);
    assert_eq!(set(irqs(EVENTFD, 0, 17), &[], &[&one; 17]), Some(EINVAL));
}

#[test]
fn several_writes_in_one_message() {
    let server = server();
    let mut client = client(&server);
    let write = |offset: u64, count: u32, data: u64| MultiWrite {
        offset: offset.into(),
        region: 0.into(),
        count: count.into(),
        data: data.to_le_bytes(),
    };
    let writes = [write(0x28, 8, 0x12_3456_7000), write(0x24, 4, 0x1f_001f)];
    let payload = [2u64.as_bytes(), writes.as_bytes()].concat();
    assert_eq!(client.ok(command::REGION_WRITE_MULTI, &payload), 2u64.to_le_bytes());
    assert_eq!(client.read(0, 0x28, 8).unwrap(), 0x12_3456_7000u64.to_le_bytes());
    assert_eq!(client.read_u32(0x24), 0x1f_001f);
    for bad in [&payload[..8], &payload[..7], &payload[..30], &[]] {
        assert_eq!(client.ask(command::REGION_WRITE_MULTI, bad), Err(EINVAL));
    }
    let long = [1u64.as_bytes(), write(0, 9, 0).as_bytes()].concat();
    assert_eq!(client.ask(command::REGION_WRITE_MULTI, &long), Err(EINVAL));
    client.ok(command::DEVICE_RESET, &[]);
    assert_eq!(client.read_u32(0x24), 0);
}

#[test]
fn a_client_that_truncates_its_memory_fails_its_own_commands() {
    const VANISHING: u64 = 0x1000_0000;
    let (server, neighbour) = (server(), server());
    let mut good = Driver::new(client(&neighbour)).with_io_queue();
    let mut driver = Driver::new(client(&server));
    let fd = rustix::fs::memfd_create("client", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let set_len = |len| rustix::fs::ftruncate(&fd, len).unwrap();
    set_len(0x8000);
    driver.client.map(VANISHING, 0x8000, Some(fd.as_fd())).unwrap();
    driver = driver.with_io_queue();
    // Four blocks of data in the last page.
    let mut io = |opcode, first| {
        let cid = driver.submit(1, opcode, 1, [first, 0], [0, 0, 3]);
        let done = driver.complete(1);
        assert_eq!(done.cid, cid);
        good.io(opcode, 0, 16).ok();
        done.status
    };
    const TRANSFER_ERROR: u16 = 4;
    let data = VANISHING + 0x7000;
    assert_eq!((io(1, data), io(2, data)), (0, 0));
    set_len(0x7000);
    assert_eq!((io(1, data), io(2, data)), (TRANSFER_ERROR, TRANSFER_ERROR));
    set_len(0x8000);
    assert_eq!((io(2, data), io(1, data)), (0, 0));
    // While commands run, from another thread.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                set_len(0x7000);
                set_len(0x8000);
            }
        });
        for _ in 0..200 {
            assert!([0, TRANSFER_ERROR].contains(&io(2, data)));
        }
        stop.store(true, Ordering::Relaxed);
    });
    // A list of pages, and then a whole queue, that are gone.
    set_len(0);
    driver.submit(1, 2, 1, [driver.iova(DATA), VANISHING], [0, 0, 31]);
    assert_eq!(driver.complete(1).status, TRANSFER_ERROR);
    set_len(0x8000);
    driver.admin(5, 0, VANISHING, [15 << 16 | 2, 1, 0]).ok();
    driver.admin(1, 0, VANISHING + 0x1000, [15 << 16 | 2, 2 << 16 | 1, 0]).ok();
    set_len(0);
    driver.client.write_u32(0x1010, 1);
    let until = Instant::now() + LIMIT;
    while driver.client.read_u32(0x1c) & 2 == 0 {
        assert!(Instant::now() < until, "the controller does not say that it failed (CSTS.CFS)");
        thread::sleep(Duration::from_millis(1));
    }
    good.io(2, 0, 16).ok();
    drop(driver);
    Driver::new(client(&server)).with_io_queue().io(2, 0, 16).ok();
}

#[test]
fn one_client_at_a_time() {
    let server = server();
    let mut first = client(&server);
    let mut second = Client::silent(server.path());
    second.id = 77;
    assert_eq!(second.ask(command::VERSION, Version::default().as_bytes()), Err(EBUSY));
    assert!(second.into_closed());
    assert!(Client::silent(server.path()).into_closed(), "one that says nothing");
    first.write_u32(0x24, 0x1f_001f);
    // A client that leaves without a word, in the middle of a message even, makes room.
    first.send_raw(&[1, 2, 3], &[]);
    first.stream.shutdown(Shutdown::Both).unwrap();
    let mut next = client(&server);
    assert_eq!(next.read_u32(0x24), 0, "initial registers");
}

#[test]
fn the_next_client_finds_nothing_of_the_last() {
    let server = server();
    for _ in 0..5 {
        let mut driver = Driver::new(client(&server)).with_io_queue();
        driver.io(1, 0, 8).ok();
        // What was submitted last may be under way when the client is gone.
        driver.submit(1, 2, 1, [driver.iova(DATA), 0], [0, 0, 7]);
    }
    let mut last = client(&server);
    assert_eq!((last.read_u32(0x14), last.read_u32(0x1c), last.read_u32(0x1000)), (0, 0, 0));
    last.map(0x10_0000, 0x1000, None).unwrap();
    assert_eq!(server.stats().clients(), 6);
}

/// A client that sends commands and takes no replies.
#[test]
fn a_client_that_does_not_read_is_let_go() {
    let controller = Controller::new(Config::default()).unwrap();
    let server = Running::start(Server::new(controller).unwrap().client_deadline(Duration::from_millis(200))).unwrap();
    let mut bad = client(&server);
    let access = RegionAccess { offset: 0.into(), region: 7.into(), count: 4096.into() };
    let message = [Header::command(5, command::REGION_READ, 16).as_bytes(), access.as_bytes()].concat();
    let end = Instant::now() + LIMIT;
    while bad.stream.write_all(&message).is_ok() {
        assert!(Instant::now() < end, "it is still there");
    }
    client(&server).read(7, 0, 4).unwrap();
}

#[test]
fn stops_at_once_and_tells_its_client() {
    let server = server();
    let path = server.path().to_path_buf();
    let idle = client(&server);
    let begun = Instant::now();
    server.stop().unwrap();
    assert!(begun.elapsed() < LIMIT);
    assert!(idle.into_closed());
    assert!(!path.exists() && !path.parent().unwrap().exists());
}
