//! Clients that mean no good, or no sense.

use std::{
    io::Write,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use vfio_uring::transport::user::wire::{Header, command};
use vfio_uring_models::server::{NoChannel, Running, Server, Session};
use zerocopy::IntoBytes;

use crate::{RW, common::*, increment, spawn};

#[test]
fn hostile_bytes() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let command = Header::command(0, command::REGION_READ, 16);
        let (a, b) = (event(), event());
        for header in [
            Header { size: 15.into(), ..command },
            Header { size: 0.into(), ..command },
            Header { size: u32::MAX.into(), ..command },
            Header { size: (8192 + (1 << 20)).into(), ..command },
            Header { flags: 2.into(), ..command },
            Header { flags: 15.into(), ..command },
        ] {
            let mut client = Raw::open(server.path());
            client.send_bytes(header.as_bytes(), &[a.as_fd()]);
            assert!(client.is_closed(), "{header:?}");
        }
        // Before VERSION less is allowed.
        let mut client = Raw::connect(server.path());
        client.send_bytes(Header { size: 5000.into(), ..command }.as_bytes(), &[]);
        assert!(client.is_closed());
        // 16 descriptors are too many for the command; further ones, however they come, are closed.
        let mut client = Raw::open(server.path());
        client.refused(command::DMA_MAP, &dma_map(0, 0x1000, RW, 0), &[a.as_fd(); 16], Errno::INVAL);
        client.refused(command::DMA_MAP, &dma_map(0, 0x1000, RW, 0), &[a.as_fd(); 17], Errno::INVAL);
        let map = Header::command(9, command::DMA_MAP, 32);
        client.send_bytes(&map.as_bytes()[..8], &[a.as_fd(); 16]);
        client.send_bytes(&[&map.as_bytes()[8..], &dma_map(0, 0x1000, RW, 0)].concat(), &[b.as_fd()]);
        assert_eq!(client.receive().unwrap().0.error(), Some(Errno::INVAL.raw_os_error()));
    });
}

#[test]
fn a_client_that_says_nothing_does_not_keep_others_out() {
    bounded(|| {
        let server = Running::start(Server::new(Toy::new()).unwrap().client_deadline(Duration::from_secs(1))).unwrap();
        let mut silent = Raw::connect(server.path());
        silent.send_bytes(&[1, 2, 3], &[]);
        assert!(silent.is_closed());
        Raw::open(server.path());
    });
}

/// Memory that is not sealed, so that it can be truncated while the device uses it.
struct Unsealed(OwnedFd);

impl Unsealed {
    fn new(len: u64) -> Self {
        let fd = Self(rustix::fs::memfd_create("client", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        fd.set_len(len);
        fd
    }

    fn set_len(&self, len: u64) {
        rustix::fs::ftruncate(&self.0, len).unwrap();
    }
}

#[test]
fn a_client_that_truncates_its_memory_harms_only_itself() {
    bounded(|| {
        let (server, neighbour) = (spawn(Toy::new()).unwrap(), spawn(Toy::new()).unwrap());
        let mut hostile = Raw::open(server.path());
        let mut good = Raw::open(neighbour.path());
        let (fd, memory) = memory(0x10000);
        assert_eq!(good.map(0, 0x10000, RW, Some((&fd, 0))), None);
        let unsealed = Unsealed::new(0x10000);
        assert_eq!(hostile.map(0, 0x10000, RW, Some((&unsealed.0, 0))), None);
        let run = |client: &mut Raw, iova: u64, len: u32| {
            increment(client, iova, len);
            client.read_u32(0, 0x10)
        };
        // A part is gone, all is gone, all is back.
        unsealed.set_len(0x8000);
        assert_eq!((run(&mut hostile, 0, 0x8000), run(&mut hostile, 0x7ff0, 0x20)), (0, 1));
        unsealed.set_len(0);
        assert_eq!((run(&mut hostile, 0, 1), run(&mut good, 0, 0x10000)), (1, 0));
        unsealed.set_len(0x10000);
        assert_eq!(run(&mut hostile, 0, 0x10000), 0);
        // In the middle of copies.
        let stop = AtomicBool::new(false);
        let (mut failed, mut rounds) = (0, 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    unsealed.set_len(0x4000);
                    unsealed.set_len(0x10000);
                }
            });
            let until = Instant::now() + DEADLINE;
            while rounds < 200 || failed < 20 && Instant::now() < until {
                failed += run(&mut hostile, 0, 0x10000);
                assert_eq!(run(&mut good, 0, 0x10000), 0);
                rounds += 1;
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(failed >= 20, "{failed} of {rounds}");
        let mut byte = [0];
        memory.read(0xffff, &mut byte).unwrap();
        assert_eq!(u32::from(byte[0]), (rounds + 1) & 0xff);
        // Its server, too, goes on: for it, and for the next.
        assert_eq!(run(&mut hostile, 0, 0x10000), 0);
        drop((hostile, unsealed));
        let mut next = Raw::open(server.path());
        assert_eq!(next.map(0, 0x10000, RW, Some((&fd, 0))), None);
        assert_eq!(run(&mut next, 0, 0x10000), 0);
    });
}

#[test]
fn a_client_that_maps_more_than_it_has_is_refused() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut client = Raw::open(server.path());
        let unsealed = Unsealed::new(0x3000);
        let einval = Some(Errno::INVAL.raw_os_error());
        assert_eq!(client.map(0, 0x4000, RW, Some((&unsealed.0, 0))), einval);
        assert_eq!(client.map(0, 0x1000, RW, Some((&unsealed.0, 0x3000))), einval);
        assert_eq!(client.map(0, 0x2000, RW, Some((&unsealed.0, 0x1000))), None);
    });
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn random_messages_to_a_session() {
    bounded(|| {
        let mut random = Random(0x1234_5678_9abc_def1);
        let mut toy = Toy::new();
        let (fd, _memory) = memory(0x4000);
        for _ in 0..200 {
            let mut session = Session::new();
            let version = Header::command(0, command::VERSION, 4);
            assert!(session.handle(&version, &[0; 4], Vec::new(), &mut toy, &mut NoChannel).is_some());
            for _ in 0..100 {
                let len = (random.next() % 60) as usize;
                // Small numbers reach further than random ones.
                let mut payload: Vec<u8> = (0..len)
                    .map(|i| match random.next() {
                        x if i % 4 == 0 && x & 3 != 0 => (x >> 8) as u8 & 0x3f,
                        x if x & 7 == 0 => (x >> 8) as u8,
                        _ => 0,
                    })
                    .collect();
                if random.next() & 1 == 0 && payload.len() >= 4 {
                    payload[0] = len as u8;
                }
                let fds = (0..random.next() % 3).map(|_| fd.try_clone().unwrap()).collect();
                let header = Header::command(1, (random.next() % 20) as u16, payload.len());
                let reply = session.handle(&header, &payload, fds, &mut toy, &mut NoChannel).unwrap();
                assert_eq!(reply.header.payload_len(2 << 20), Ok(reply.payload.len()));
            }
        }
    });
}

#[test]
fn random_bytes_to_a_server() {
    bounded(|| {
        let server = spawn(Toy::new()).unwrap();
        let mut random = Random(0xfeed_5678_9abc_def1);
        for round in 0..100 {
            let mut client = if round % 2 == 0 { Raw::connect(server.path()) } else { Raw::open(server.path()) };
            let bytes: Vec<u8> = (0..random.next() % 300).map(|_| random.next() as u8).collect();
            let _ = client.socket.write_all(&bytes);
        }
        until("a client after them", || {
            let mut client = Raw::connect(server.path());
            client.command(command::VERSION, &[0, 0, 0, 0], &[]);
            client.receive().is_ok_and(|(header, ..)| header.error().is_none())
        });
    });
}
