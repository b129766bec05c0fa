//! The vfio-user server against a raw client, with the oddities of other people's clients, and against the client of the
//! `vfio_user` crate.
#![forbid(unsafe_code)]

mod common;
mod hostile;

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use common::*;
use rustix::io::Errno;
use vfio_uring::{
    dma::SharedMemory,
    transport::user::wire::{self, Capabilities, DmaAccess, Header, MultiWrite, RegionInfo, Version, command, flags},
};
use vfio_uring_models::server::{Running, Server};
use zerocopy::{FromBytes, IntoBytes};

const RW: u32 = flags::DMA_READ | flags::DMA_WRITE;
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const TRIGGER: u32 = 0x20;

fn spawn(device: Toy) -> io::Result<Running> {
    Running::start(Server::new(device)?)
}

#[test]
fn version_settles_the_limits() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::connect(server.path());
        client.refused(command::DEVICE_GET_INFO, &[0; 16], &[], Errno::INVAL);
        let hello = wire::version_payload(Version::default(), &Capabilities::default());
        client.refused(command::VERSION, &hello, &[io::stdout().as_fd()], Errno::INVAL);
        client.refused(command::VERSION, &[1, 0, 0, 0], &[], Errno::INVAL);
        client.refused(command::VERSION, &[0, 0, 0], &[], Errno::INVAL);
        client.refused(command::VERSION, b"\0\0\0\0{}", &[], Errno::INVAL);
        client.refused(command::VERSION, b"\0\0\0\0{]\0", &[], Errno::INVAL);
        let theirs = client.version(&Capabilities { write_multiple: Some(true), ..Default::default() });
        let expected = Capabilities {
            max_msg_fds: Some(16),
            max_data_xfer_size: Some(1 << 20),
            max_dma_maps: Some(32768),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            max_outstanding: None,
            iova_ranges: None,
        };
        assert_eq!(theirs, expected);
        client.refused(command::VERSION, &hello, &[], Errno::INVAL);
        drop(client);
        let mut client = Raw::connect(server.path());
        let theirs = client.version(&Capabilities { max_outstanding: Some(1000), ..Default::default() });
        assert_eq!(theirs.max_outstanding, Some(64));
        assert_eq!(std::fs::metadata(server.path()).unwrap().permissions().mode() & 0o777, 0o600);
    });
}

#[test]
fn odd_clients_are_understood() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        // No JSON, message id 0 always, header and payload apart, and each byte on its own.
        let mut client = Raw::connect(server.path());
        client.next_id = 0;
        client.ok(command::VERSION, &[0, 0, 1, 0], &[]);
        let header = Header::command(0, command::REGION_READ, 16);
        client.send_bytes(header.as_bytes(), &[]);
        thread::sleep(Duration::from_millis(20));
        client.send_bytes(&access(7, 0, 4), &[]);
        assert_eq!(client.receive().unwrap().1[16..], [0xcf; 4]);
        for byte in [header.as_bytes(), &access(7, 8, 2)].concat() {
            client.send_bytes(&[byte], &[]);
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(client.receive().unwrap().1[16..], [0xcf; 2]);
        // A command that wants no reply gets none, not even an error; the next one does.
        let quiet = Header { flags: flags::NO_REPLY.into(), ..Header::command(0, command::REGION_WRITE, 20) };
        client.send(quiet, &[&access(7, 0, 4)[..], &[1, 2, 3, 4]].concat(), &[]);
        client.send(quiet, &[&access(5, 0, 4)[..], &[1, 2, 3, 4]].concat(), &[]);
        assert_eq!(client.read(7, 0, 4), [1, 2, 3, 4]);
        for unknown in [0, 11, 12, 14, 16, 17, 18, 999] {
            client.refused(unknown, &[0; 40], &[], Errno::NOTSUP);
        }
        client.refused(command::DEVICE_GET_REGION_IO_FDS, &[0; 16], &[], Errno::NOTSUP);
        // Many at once, answered in order.
        for id in 0..50 {
            client.send(Header::command(id, command::REGION_READ, 16), &access(7, 0, 4), &[]);
        }
        for id in 0..50 {
            assert_eq!(client.receive().unwrap().0.msg_id.get(), id);
        }
    });
}

#[test]
fn infos() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let ask = |argsz: u32, index: u32| [argsz, 0, index, 0].as_bytes().to_vec();
        let (_, info, _) = client.ok(command::DEVICE_GET_INFO, &ask(16, 0), &[]);
        assert_eq!(info, [16u32, 3, 9, 5].as_bytes());
        client.refused(command::DEVICE_GET_INFO, &ask(15, 0), &[], Errno::INVAL);
        client.refused(command::DEVICE_GET_INFO, &[16], &[], Errno::INVAL);
        let (_, info, _) = client.ok(command::DEVICE_GET_IRQ_INFO, &ask(16, 2), &[]);
        assert_eq!(info, [16u32, 9, 2, 4].as_bytes());
        client.refused(command::DEVICE_GET_IRQ_INFO, &ask(16, 5), &[], Errno::INVAL);

        let region = |argsz: u32, index: u32| {
            RegionInfo { argsz: argsz.into(), index: index.into(), ..Default::default() }.as_bytes().to_vec()
        };
        for index in 0..9 {
            client.ok(command::DEVICE_GET_REGION_INFO, &region(4096, index), &[]);
        }
        client.refused(command::DEVICE_GET_REGION_INFO, &region(4096, 9), &[], Errno::INVAL);
        client.refused(command::DEVICE_GET_REGION_INFO, &region(31, 0), &[], Errno::INVAL);
        let (_, short, fds) = client.ok(command::DEVICE_GET_REGION_INFO, &region(32, 0), &[]);
        let info = RegionInfo::read_from_bytes(&short).unwrap();
        assert_eq!((info.argsz.get(), info.flags.get(), info.cap_offset.get(), fds.len()), (64, 7, 0, 0));
        let (_, full, fds) = client.ok(command::DEVICE_GET_REGION_INFO, &region(64, 0), &[]);
        assert_eq!((full.len(), fds.len()), (64, 1));
        let (info, _) = RegionInfo::read_from_prefix(&full).unwrap();
        let caps = wire::capabilities(&full, 32, info.cap_offset.get()).unwrap();
        assert_eq!((caps.len(), caps[0].0.id.get(), caps[0].0.version.get()), (1, 1, 1));
        let areas = wire::sparse_areas(caps[0].1).unwrap();
        assert_eq!((areas[0].offset.get(), areas[0].size.get()), (0x1000, 0x1000));
        // The area's offset counts from the base offset of the region in the descriptor.
        let mapped = SharedMemory::map(&fds[0], info.offset.get() + 0x1000, 0x1000, true).unwrap();
        mapped.store_u32(0x800, 0x1234).unwrap();
        assert_eq!(client.read_u32(0, 0x1800), 0x1234);
        client.write(0, 0x1804, &[9, 0, 0, 0]);
        assert_eq!(mapped.load_u32(0x804), Ok(9));
        client.ok(command::DEVICE_RESET, &[], &[]);
        assert_eq!(mapped.load_u32(0x804), Ok(0));
    });
}

#[test]
fn region_accesses_stay_inside() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        assert_eq!(client.read(2, 0, 1 << 20), vec![2; 1 << 20]);
        for (region, offset, len) in [
            (7, 253, 4),
            (7, u64::MAX, 4),
            (9, 0, 4),
            (u32::MAX, 0, 4),
            (1, 0, 1),
            (2, 0, (1 << 20) + 1),
            (2, 0, u32::MAX as usize),
        ] {
            client.refused(command::REGION_READ, &access(region, offset, len), &[], Errno::INVAL);
        }
        client.refused(command::REGION_READ, &[0; 15], &[], Errno::INVAL);
        client.refused(command::REGION_WRITE, &access(7, 0, 4), &[], Errno::INVAL);
        client.refused(command::REGION_WRITE, &[&access(2, 0, 1)[..], &[0]].concat(), &[], Errno::INVAL);
        client.refused(command::REGION_WRITE, &[&access(7, 256, 1)[..], &[0]].concat(), &[], Errno::INVAL);
        client.write(7, 252, &[1, 2, 3, 4]);
        assert_eq!(client.read(7, 252, 4), [1, 2, 3, 4]);
        assert!(client.read(7, 256, 0).is_empty());

        let write = |offset: u64, count: u32| MultiWrite {
            offset: offset.into(),
            region: 7.into(),
            count: count.into(),
            data: [8, 7, 6, 5, 4, 3, 2, 1],
        };
        let multi = |count: u64, writes: &[MultiWrite]| [count.as_bytes(), writes.as_bytes()].concat();
        let (_, reply, _) = client.ok(command::REGION_WRITE_MULTI, &multi(2, &[write(0, 8), write(16, 2)]), &[]);
        assert_eq!(reply, 2u64.as_bytes());
        assert_eq!(client.read(7, 14, 6), [0xcf, 0xcf, 8, 7, 0xcf, 0xcf]);
        client.refused(command::REGION_WRITE_MULTI, &multi(1, &[write(0, 9)]), &[], Errno::INVAL);
        client.refused(command::REGION_WRITE_MULTI, &multi(2, &[write(0, 8)]), &[], Errno::INVAL);
        client.refused(command::REGION_WRITE_MULTI, &multi(u64::MAX, &[]), &[], Errno::INVAL);
        client.refused(command::REGION_WRITE_MULTI, &[0; 7], &[], Errno::INVAL);
    });
}

#[test]
fn dma_maps_are_checked() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let (fd, _memory) = memory(0x4000);
        let errno = |errno: Errno| Some(errno.raw_os_error());
        assert_eq!(client.map(0x10000, 0x4000, RW, Some((&fd, 0))), None);
        assert_eq!(client.map(0x13000, 0x1000, RW, Some((&fd, 0))), errno(Errno::EXIST));
        assert_eq!(client.map(0xf000, 0x8000, RW, None), errno(Errno::EXIST));
        for (iova, size, flags, offset) in [
            (0, 0, RW, 0),
            (0, 0x5000, RW, 0),
            (0, 0x1000, RW, 0x4000),
            (0, 0x1000, RW, u64::MAX - 0xfff),
            (0, 0x1000, RW, 8),
            (8, 0x1000, RW, 0),
            (0, 0x1008, RW, 0),
            (0, 0x1000, 0, 0),
            (0, 0x1000, 4, 0),
            (u64::MAX - 0xfff, 0x2000, RW, 0),
            (0x20000, u64::MAX - 0xfffff, RW, 0),
        ] {
            assert_eq!(
                client.map(iova, size, flags, Some((&fd, offset))),
                errno(Errno::INVAL),
                "{iova:#x} {size:#x} {flags} {offset:#x}"
            );
        }
        client.refused(command::DMA_MAP, &dma_map(0, 0x1000, RW, 0), &[fd.as_fd(), fd.as_fd()], Errno::INVAL);
        client.refused(command::DMA_MAP, &[0; 31], &[], Errno::INVAL);
        client.refused(command::DMA_MAP, &[0; 32], &[], Errno::INVAL);
        // The last page of the address space.
        assert_eq!(client.map(u64::MAX - 0xfff, 0x1000, RW, Some((&fd, 0))), None);
        assert_eq!(client.unmap(u64::MAX - 0xfff, 0x1000, 0), None);

        assert_eq!(client.unmap(0x10000, 0x1000, 0), errno(Errno::NOENT));
        assert_eq!(client.unmap(0x11000, 0x1000, 0), errno(Errno::NOENT));
        assert_eq!(client.unmap(0x20000, 0x1000, 0), errno(Errno::NOENT));
        assert_eq!(client.unmap(0x10000, 0x4000, 1), errno(Errno::INVAL));
        assert_eq!(client.unmap(0x10000, 0x4000, 2), errno(Errno::INVAL));
        // With a descriptor, as some clients do.
        client.ok(command::DMA_UNMAP, &dma_unmap(0x10000, 0x4000, 0), &[fd.as_fd()]);
        assert_eq!(client.unmap(0x10000, 0x4000, 0), errno(Errno::NOENT));

        for i in 0..32768 {
            assert_eq!(client.map(i << 20, 0x1000, RW, None), None);
        }
        assert_eq!(client.map(32768 << 20, 0x1000, RW, None), errno(Errno::NOSPC));
        assert_eq!(client.unmap(0, 0, 2), None);
        assert_eq!(client.map(0, 0x1000, RW, Some((&fd, 0))), None);

        // 64 regions of 4 GiB.
        assert_eq!(client.unmap(0, 0, 2), None);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 30).unwrap();
        let file = OwnedFd::from(file);
        for i in 0..64 {
            assert_eq!(client.map(i << 32, 4 << 30, RW, Some((&file, 0))), None);
        }
    });
}

fn increment(client: &mut Raw, iova: u64, len: u32) {
    client.write(0, 0, &iova.to_le_bytes());
    client.write(0, 8, &len.to_le_bytes());
    client.write(0, 0xc, &1u32.to_le_bytes());
}

#[test]
fn device_reaches_mapped_memory() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let (fd, memory) = memory(0x4000);
        // Two regions that adjoin, with the file's pages swapped, and a read-only one.
        assert_eq!(client.map(0x10000, 0x1000, RW, Some((&fd, 0x1000))), None);
        assert_eq!(client.map(0x11000, 0x1000, RW, Some((&fd, 0))), None);
        assert_eq!(client.map(0x12000, 0x1000, flags::DMA_READ, Some((&fd, 0x2000))), None);
        increment(&mut client, 0x10ff0, 0x20);
        assert_eq!((client.read_u32(0, 0x10), client.read_u32(0, 0x14)), (0, 0));
        let mut bytes = [0; 0x10];
        memory.read(0x1ff0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 0x10]);
        memory.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 0x10]);
        increment(&mut client, 0x10000, 0x1000);
        assert_eq!((client.read_u32(0, 0x10), client.read_u32(0, 0x14)), (0, 0x1000));
        for (iova, len) in [(0x12000, 1), (0x11ff0, 0x20), (0x13000, 1), (0xffff, 2), (u64::MAX, 2)] {
            increment(&mut client, iova, len);
            assert_eq!(client.read_u32(0, 0x10), 1, "{iova:#x}");
        }
        assert_eq!(client.unmap(0x10000, 0x1000, 0), None);
        increment(&mut client, 0x10000, 1);
        assert_eq!(client.read_u32(0, 0x10), 1);
    });
}

/// Answers DMA_READ and DMA_WRITE out of `memory`, which is at `base`, until a reply comes.
fn serve(client: &mut Raw, memory: &mut [u8], base: u64, bare: bool) -> (Got, usize) {
    let mut served = 0;
    loop {
        let (header, payload, fds) = client.receive().unwrap();
        if header.is_reply() {
            return ((header, payload, fds), served);
        }
        served += 1;
        let (access, data) = DmaAccess::read_from_prefix(&payload).unwrap();
        let at = (access.address.get() - base) as usize;
        let range = at..at + access.count.get() as usize;
        match header.command.get() {
            command::DMA_READ => {
                let payload = [access.as_bytes(), &memory[range]].concat();
                client.send(header.reply(payload.len()), &payload, &[]);
            }
            command::DMA_WRITE => {
                memory[range].copy_from_slice(data);
                let payload = if bare { &[] } else { access.as_bytes() };
                client.send(header.reply(payload.len()), payload, &[]);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn memory_without_descriptor_is_served_by_messages() {
    bounded(|| {
        let server = Running::start(Server::new(Toy::new()).unwrap().client_deadline(Duration::from_secs(2))).unwrap();
        let mut client = Raw::connect(server.path());
        client.version(&Capabilities { max_data_xfer_size: Some(0x1000), ..Default::default() });
        assert_eq!(client.map(0x10000, 0x10000, RW, None), None);
        let mut memory = vec![0x11; 0x10000];
        client.write(0, 0, &0x10100u64.to_le_bytes());
        client.write(0, 8, &0x2800u32.to_le_bytes());
        let go = [&access(0, 0xc, 4)[..], &1u32.to_le_bytes()].concat();
        client.command(command::REGION_WRITE, &go, &[]);
        // A command that comes meanwhile is carried out afterwards.
        let queued = client.command(command::REGION_READ, &access(0, 0x10, 8), &[]);
        let ((header, ..), served) = serve(&mut client, &mut memory, 0x10000, false);
        assert_eq!((header.error(), header.command.get(), served), (None, command::REGION_WRITE, 6));
        let (header, payload, _) = client.receive().unwrap();
        assert_eq!((header.msg_id, &payload[16..]), (queued.msg_id, &[0; 8][..]));
        assert!(memory[0x100..0x2900].iter().all(|&byte| byte == 0x12) && memory[0xff] == 0x11 && memory[0x2900] == 0x11);
        // A client that answers writes with the bare header.
        client.command(command::REGION_WRITE, &go, &[]);
        serve(&mut client, &mut memory, 0x10000, true);
        assert_eq!(memory[0x100], 0x13);
        // One that refuses.
        client.command(command::REGION_WRITE, &go, &[]);
        let (header, ..) = client.receive().unwrap();
        client.send(header.error_reply(14), &[], &[]);
        assert_eq!(client.receive().unwrap().0.command.get(), command::REGION_WRITE);
        assert_eq!(client.read_u32(0, 0x10), 1);
        // One that lies about the size.
        client.command(command::REGION_WRITE, &go, &[]);
        let (header, payload, _) = client.receive().unwrap();
        client.send(header.reply(16), &payload, &[]);
        assert_eq!(client.receive().unwrap().0.command.get(), command::REGION_WRITE);
        assert_eq!(client.read_u32(0, 0x10), 1);
        // One that answers something else, and then nothing: it is not asked again.
        client.command(command::REGION_WRITE, &go, &[]);
        let (header, payload, _) = client.receive().unwrap();
        let other = Header { msg_id: (header.msg_id.get() + 1).into(), ..header };
        client.send(other.reply(32), &[payload, vec![0; 16]].concat(), &[]);
        assert_eq!(client.receive().unwrap().0.command.get(), command::REGION_WRITE);
        assert_eq!(client.read_u32(0, 0x10), 1);
        client.command(command::REGION_WRITE, &go, &[]);
        assert_eq!(client.receive().unwrap().0.command.get(), command::REGION_WRITE);
        drop(client);
        // One that sends and sends instead of answering.
        let mut client = Raw::open(server.path());
        assert_eq!(client.map(0x10000, 0x10000, RW, None), None);
        client.write(0, 8, &0x10u32.to_le_bytes());
        client.write(0, 0, &0x10000u64.to_le_bytes());
        client.command(command::REGION_WRITE, &go, &[]);
        let flood = [Header::command(0, command::REGION_READ, 16).as_bytes(), &access(7, 0, 4)].concat();
        until("the end of the flood", || client.socket.write_all(&flood).is_err());
        Raw::open(server.path());
    });
}

#[test]
fn interrupts() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let events: Vec<OwnedFd> = (0..4).map(|_| event()).collect();
        let fds: Vec<_> = events.iter().map(|fd| fd.as_fd()).collect();
        let invalid = Some(Errno::INVAL.raw_os_error());
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 0, 4, &[], &fds), None);
        client.write(0, 0x18, &2u32.to_le_bytes());
        assert_eq!(count(&events[2]), 1);
        // Loopback.
        assert_eq!(client.set_irqs(NONE | TRIGGER, 1, 2, &[], &[]), None);
        assert_eq!((count(&events[1]), count(&events[2])), (1, 1));
        assert_eq!(client.set_irqs(BOOL | TRIGGER, 1, 3, &[0, 1, 0], &[]), None);
        assert_eq!(count(&events[2]), 1);
        assert!(!is_signalled(&events[1]) && !is_signalled(&events[3]));
        // Nonsense.
        for (flags, start, number, data) in [
            (EVENTFD, 0, 1, &[][..]),
            (TRIGGER, 0, 1, &[]),
            (EVENTFD | NONE | TRIGGER, 0, 1, &[]),
            (EVENTFD | TRIGGER | 8, 0, 1, &[]),
            (EVENTFD | TRIGGER | 0x40, 0, 1, &[]),
            (EVENTFD | TRIGGER, 4, 1, &[]),
            (EVENTFD | TRIGGER, u32::MAX, 2, &[]),
            (EVENTFD | TRIGGER, 0, u32::MAX, &[]),
            (EVENTFD | TRIGGER, 0, 0, &[]),
            (BOOL | TRIGGER, 0, 2, &[1]),
            (BOOL | TRIGGER, 0, 0, &[]),
        ] {
            assert_eq!(client.set_irqs(flags, start, number, data, &[]), invalid, "{flags:#x} {start} {number}");
        }
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 0, 3, &[], &fds[..2]), invalid);
        assert_eq!(client.set_irqs(NONE | TRIGGER, 0, 1, &[], &fds[..1]), invalid);
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 0, 1, &[], &[io::stdout().as_fd()]), invalid);
        assert_eq!(client.set_irqs(NONE | 8, 0, 1, &[], &[]), Some(Errno::NOTSUP.raw_os_error()));
        client.refused(command::DEVICE_SET_IRQS, &set_irqs(0, EVENTFD | TRIGGER, 0, 1), &fds[..1], Errno::INVAL);
        client.refused(command::DEVICE_SET_IRQS, &set_irqs(5, NONE | TRIGGER, 0, 0), &[], Errno::INVAL);
        client.refused(command::DEVICE_SET_IRQS, &[0; 19], &[], Errno::INVAL);
        // De-assigned, by one and all.
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 1, 1, &[], &[]), None);
        assert_eq!(client.set_irqs(NONE | TRIGGER, 0, 3, &[], &[]), None);
        assert_eq!((count(&events[0]), count(&events[2])), (1, 1));
        assert!(!is_signalled(&events[1]));
        assert_eq!(client.set_irqs(NONE | TRIGGER, 0, 0, &[], &[]), None);
        client.write(0, 0x18, &2u32.to_le_bytes());
        assert!(!is_signalled(&events[2]));
        // An eventfd that is full and blocks.
        rustix::io::write(&events[0], &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 0, 1, &[], &fds[..1]), None);
        client.write(0, 0x18, &0u32.to_le_bytes());
        assert_eq!(client.read_u32(0, 0x18), 0);
    });
}

#[test]
fn doorbell_is_seen_without_a_message() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let (fd, memory) = memory(0x1000);
        assert_eq!(client.map(0x10000, 0x1000, RW, Some((&fd, 0))), None);
        let events: Vec<OwnedFd> = (0..4).map(|_| event()).collect();
        let fds: Vec<_> = events.iter().map(|fd| fd.as_fd()).collect();
        assert_eq!(client.set_irqs(EVENTFD | TRIGGER, 0, 4, &[], &fds), None);
        let info = RegionInfo { argsz: 4096.into(), ..Default::default() };
        let (_, _, bar) = client.ok(command::DEVICE_GET_REGION_INFO, info.as_bytes(), &[]);
        let bar = SharedMemory::map(&bar[0], 0x1000, 0x1000, true).unwrap();
        client.write(0, 0, &0x10000u64.to_le_bytes());
        client.write(0, 8, &8u32.to_le_bytes());
        for round in 0..200u32 {
            let vector = 1 + round % 3;
            bar.store_u32(0, vector).unwrap();
            assert_eq!(count(&events[vector as usize]), 1);
            assert_eq!(memory.load_u32(0).unwrap() & 0xff, (round + 1) & 0xff);
            if round % 50 == 0 {
                // Long enough for the server to sleep.
                thread::sleep(Duration::from_millis(15));
            }
        }
        assert!(server.stats().sleeps() > 0);
    });
}

#[test]
fn second_client_is_told_and_the_next_one_finds_a_fresh_device() {
    bounded(|| {
        let toy = Toy::new();
        let resets = toy.resets.clone();
        let server = spawn(toy).unwrap();
        let mut first = Raw::open(server.path());
        assert_eq!(first.map(0, 0x1000, RW, None), None);
        first.write(0, 0, &[7; 8]);
        let mut second = Raw::connect(server.path());
        second.refused(command::VERSION, &[0, 0, 0, 0], &[], Errno::BUSY);
        assert!(second.is_closed());
        // Many of them, some silent, don't hinder the first.
        let silent: Vec<Raw> = (0..20).map(|_| Raw::connect(server.path())).collect();
        assert_eq!(first.read(0, 0, 8), [7; 8]);
        drop(silent);
        // The first dies in the middle of a message.
        first.send_bytes(&Header::command(1, command::REGION_READ, 16).as_bytes()[..9], &[]);
        drop(first);
        until("the reset", || resets.load(Ordering::Acquire) >= 1);
        let mut next = Raw::open(server.path());
        assert_eq!(next.read(0, 0, 8), [0; 8]);
        assert_eq!(next.map(0, 0x1000, RW, None), None);
        let before = resets.load(Ordering::Acquire);
        assert!(server.stop().is_ok());
        assert!(next.is_closed());
        assert_eq!(resets.load(Ordering::Acquire), before + 1);
    });
}

#[test]
fn a_client_that_comes_back_at_once_is_not_turned_away() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        for _ in 0..300 {
            Raw::open(server.path());
        }
    });
}

#[test]
fn the_client_of_the_vfio_user_crate() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = vfio_user::Client::new(server.path()).unwrap();
        let bar = client.region(0).unwrap();
        assert_eq!((bar.size, bar.flags, bar.sparse_areas.len()), (0x4000, 15, 1));
        assert_eq!((bar.sparse_areas[0].offset, bar.sparse_areas[0].size), (0x1000, 0x1000));
        let file = bar.file_offset.as_ref().unwrap();
        let mapped = SharedMemory::map(file.file(), file.start() + 0x1000, 0x1000, true).unwrap();
        assert_eq!(client.region(7).unwrap().size, 256);
        let (fd, memory) = memory(0x4000);
        client.dma_map(0x1000, 0x10000, 0x2000, fd.as_raw_fd()).unwrap();
        client.region_write(0, 0, &0x10000u64.to_le_bytes()).unwrap();
        client.region_write(0, 8, &0x100u32.to_le_bytes()).unwrap();
        client.region_write(0, 0xc, &1u32.to_le_bytes()).unwrap();
        let mut result = [9; 4];
        client.region_read(0, 0x10, &mut result).unwrap();
        assert_eq!((result, memory.load_u32(0x1000)), ([0; 4], Ok(0x0101_0101)));
        let irq = client.get_irq_info(2).unwrap();
        assert_eq!((irq.index, irq.flags, irq.count), (2, 9, 4));
        let events = [event(), event()];
        client.set_irqs(2, EVENTFD | TRIGGER, 1, 2, &[events[0].as_raw_fd(), events[1].as_raw_fd()]).unwrap();
        mapped.store_u32(0, 2).unwrap();
        assert_eq!(count(&events[1]), 1);
        assert_eq!(memory.load_u32(0x1000), Ok(0x0202_0202));
        client.dma_unmap(0x10000, 0x2000).unwrap();
        client.reset().unwrap();
        assert_eq!(mapped.load_u32(0), Ok(0));
        client.shutdown().unwrap();
        drop(client);
        vfio_user::Client::new(server.path()).unwrap();
    });
}
