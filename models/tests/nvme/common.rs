//! A client written by hand: one message at a time, on a plain stream.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use vfio_uring::{
    dma::{HugePages, SharedMemory},
    transport::user::wire::{DmaMap, Header, RegionAccess, Version, command},
};
use zerocopy::{FromBytes, IntoBytes};

/// No test waits longer than this for the other side.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Reply {
    pub header: Header,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

pub struct Client {
    pub stream: UnixStream,
    /// Echoed in every message; not changed by the client itself, since some peers never do.
    pub id: u16,
}

impl Client {
    /// Connects without a word.
    pub fn silent(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Self { stream, id: 0 }
    }

    pub fn connect(path: &Path) -> Self {
        let mut client = Self::silent(path);
        client.ok(command::VERSION, Version { major: 0.into(), minor: 0.into() }.as_bytes());
        client
    }

    pub fn send(&mut self, number: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut header = Header::command(self.id, number, payload.len());
        header.flags = flags.into();
        self.send_raw(&[header.as_bytes(), payload].concat(), fds);
    }

    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        self.stream.write_all(&bytes[sent..]).unwrap();
    }

    pub fn recv(&mut self) -> Reply {
        let mut bytes = [0; 16];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        self.stream.read_exact(&mut bytes[got.bytes..]).unwrap();
        let header = Header::read_from_bytes(&bytes).unwrap();
        let mut payload = vec![0; header.payload_len(2 << 20).unwrap()];
        self.stream.read_exact(&mut payload).unwrap();
        Reply { header, payload, fds }
    }

    /// Sends a command and takes the reply, whatever it says.
    pub fn ask_with(&mut self, number: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        self.send(number, 0, payload, fds);
        let reply = self.recv();
        assert!(reply.header.is_reply());
        assert_eq!((reply.header.msg_id.get(), reply.header.command.get()), (self.id, number));
        reply
    }

    /// The payload of a successful reply, or the errno.
    pub fn ask(&mut self, number: u16, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let reply = self.ask_with(number, payload, &[]);
        reply.header.error().map_or(Ok(reply.payload), Err)
    }

    pub fn ok(&mut self, number: u16, payload: &[u8]) -> Vec<u8> {
        self.ask(number, payload).unwrap_or_else(|errno| panic!("{} gave errno {errno}", command::name(number)))
    }

    pub fn read(&mut self, region: u32, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: (len as u32).into() };
        let reply = self.ask(command::REGION_READ, access.as_bytes())?;
        assert_eq!(reply.len(), 16 + len);
        Ok(reply[16..].to_vec())
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: (data.len() as u32).into() };
        self.ask(command::REGION_WRITE, &[access.as_bytes(), data].concat()).map(|reply| assert_eq!(reply.len(), 16))
    }

    pub fn read_u32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(0, offset, 4).unwrap().try_into().unwrap())
    }

    pub fn write_u32(&mut self, offset: u64, value: u32) {
        self.write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub fn map(&mut self, iova: u64, size: u64, fd: Option<BorrowedFd<'_>>) -> Result<(), i32> {
        let map = DmaMap { argsz: 32.into(), flags: 3.into(), offset: 0.into(), address: iova.into(), size: size.into() };
        let fds: Vec<_> = fd.into_iter().collect();
        self.ask_with(command::DMA_MAP, map.as_bytes(), &fds).header.error().map_or(Ok(()), Err)
    }

    /// Whether the server closes the connection.
    pub fn into_closed(mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

/// Memory of a client.
pub struct Memory {
    pub fd: OwnedFd,
    pub memory: SharedMemory,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        let (fd, memory) = SharedMemory::create("client", len, HugePages::No).unwrap();
        Self { fd, memory }
    }

    pub fn mapped(client: &mut Client, iova: u64, len: usize) -> Self {
        let memory = Self::new(len);
        client.map(iova, len as u64, Some(memory.fd.as_fd())).unwrap();
        memory
    }
}

pub const DATA: u64 = 0x4000;
const BASE: u64 = 0x10_0000;

/// A driver of the crudest kind: admin queue at 0 and 0x1000 of its memory, one I/O queue at 0x2000 and 0x3000, data behind.
pub struct Driver {
    pub client: Client,
    pub memory: Memory,
    tails: [u32; 2],
    heads: [u32; 2],
    phases: [bool; 2],
    cid: u16,
}

pub const ENTRIES: u32 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    pub result: u32,
    pub status: u16,
    pub cid: u16,
}

impl Driver {
    /// Enables the controller.
    pub fn new(mut client: Client) -> Self {
        let memory = Memory::mapped(&mut client, BASE, 1 << 20);
        client.write_u32(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        client.write(0, 0x28, &BASE.to_le_bytes()).unwrap();
        // The other one in halves.
        client.write_u32(0x30, BASE as u32 + 0x1000);
        client.write_u32(0x34, 0);
        client.write_u32(0x14, 6 << 16 | 4 << 20 | 1);
        assert_eq!(client.read_u32(0x1c), 1, "ready");
        Self { client, memory, tails: [0; 2], heads: [0; 2], phases: [true; 2], cid: 0 }
    }

    pub fn iova(&self, offset: u64) -> u64 {
        BASE + offset
    }

    /// Creates queue 1.
    pub fn with_io_queue(mut self) -> Self {
        let size = (ENTRIES - 1) << 16;
        self.admin(5, 0, BASE + 0x3000, [size | 1, 1 << 16 | 3, 0]).ok();
        self.admin(1, 0, BASE + 0x2000, [size | 1, 1 << 16 | 1, 0]).ok();
        self
    }

    /// Puts a command in a queue, and rings.
    pub fn submit(&mut self, queue: usize, dword0: u32, nsid: u32, prps: [u64; 2], dwords: [u32; 3]) -> u16 {
        self.cid = self.cid.wrapping_add(1);
        let at = 0x2000 * queue as u64 + 64 * u64::from(self.tails[queue]);
        let mut sqe = [0u64; 8];
        sqe[0] = u64::from(nsid) << 32 | u64::from(dword0) | u64::from(self.cid) << 16;
        (sqe[3], sqe[4]) = (prps[0], prps[1]);
        (sqe[5], sqe[6]) = (u64::from(dwords[1]) << 32 | u64::from(dwords[0]), dwords[2].into());
        self.memory.memory.write_obj(at, &sqe).unwrap();
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.client.write_u32(0x1000 + 8 * queue as u64, self.tails[queue]);
        self.cid
    }

    /// The next completion of a queue.
    pub fn complete(&mut self, queue: usize) -> Done {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(done) = self.poll(queue) {
                return done;
            }
            assert!(Instant::now() < end, "no completion");
            thread::sleep(Duration::from_micros(50));
        }
    }

    pub fn poll(&mut self, queue: usize) -> Option<Done> {
        let at = 0x1000 + 0x2000 * queue as u64 + 16 * u64::from(self.heads[queue]);
        let last = self.memory.memory.load_u32(at + 12).unwrap();
        if (last >> 16 & 1 != 0) != self.phases[queue] {
            return None;
        }
        let result = self.memory.memory.load_u32(at).unwrap();
        self.heads[queue] = (self.heads[queue] + 1) % ENTRIES;
        self.phases[queue] ^= self.heads[queue] == 0;
        self.client.write_u32(0x1004 + 8 * queue as u64, self.heads[queue]);
        Some(Done { result, status: (last >> 17) as u16 & 0x7ff, cid: last as u16 })
    }

    pub fn admin(&mut self, opcode: u32, nsid: u32, prp1: u64, dwords: [u32; 3]) -> Done {
        let cid = self.submit(0, opcode, nsid, [prp1, 0], dwords);
        let done = self.complete(0);
        assert_eq!(done.cid, cid);
        done
    }

    /// A read or write of blocks at the data's place.
    pub fn io(&mut self, opcode: u32, lba: u64, blocks: u32) -> Done {
        let prps = [BASE + DATA, BASE + DATA + 0x1000];
        let cid = self.submit(1, opcode, 1, prps, [lba as u32, (lba >> 32) as u32, blocks - 1]);
        let done = self.complete(1);
        assert_eq!(done.cid, cid);
        done
    }
}

impl Done {
    pub fn ok(self) -> u32 {
        assert_eq!(self.status, 0, "{self:x?}");
        self.result
    }
}
