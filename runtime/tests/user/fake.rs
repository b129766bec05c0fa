//! A vfio-user server in a thread, whose answers a script may change, delay or spoil.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, sendmsg,
};
use vfio_uring::{
    device::Address,
    dma::{HugePages, SharedMemory},
    transport::user::wire::{self, Header, command},
};
use zerocopy::{FromBytes, IntoBytes};

/// No test waits longer than this for the other side.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A server and the directory of its socket. Dropping it waits for the script, and fails when that failed.
pub struct Fake {
    dir: tempfile::TempDir,
    thread: Option<thread::JoinHandle<()>>,
}

impl Fake {
    /// Serves one client by `script`.
    pub fn run(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.set_write_timeout(Some(LIMIT)).unwrap();
            script(Peer { stream, left: Vec::new(), spoil: None, device: Model::default() });
        });
        Self { dir, thread: Some(thread) }
    }

    /// Serves one client; `hook` sees each message first, and says whether it has handled it.
    pub fn hooked(mut hook: impl FnMut(&mut Peer, &Message) -> bool + Send + 'static) -> Self {
        Self::run(move |mut peer| {
            while let Some(message) = peer.recv() {
                if !hook(&mut peer, &message) {
                    peer.answer(&message);
                }
            }
        })
    }

    pub fn address(&self) -> Address {
        Address::User(self.dir.path().join("socket"))
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let result = self.thread.take().map(|thread| thread.join());
        if !thread::panicking() {
            assert!(matches!(result, Some(Ok(()))), "the server's script failed");
        }
    }
}

pub struct Message {
    pub header: Header,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn command(&self) -> u16 {
        self.header.command.get()
    }
}

/// The server's end of a connection.
pub struct Peer {
    stream: UnixStream,
    left: Vec<u8>,
    /// Spoils a byte: how many are sent before it, and the bits to turn.
    pub spoil: Option<(usize, u8)>,
    pub device: Model,
}

impl Peer {
    /// The next message, `None` at the end.
    pub fn recv(&mut self) -> Option<Message> {
        let mut bytes = std::mem::take(&mut self.left);
        let mut fds = Vec::new();
        let mut calls = 0;
        loop {
            let size = Header::read_from_prefix(&bytes).map_or(16, |(header, _)| header.size.get() as usize);
            if bytes.len() >= size {
                break;
            }
            let mut part = vec![0; 2 << 20];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let n = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut part)], &mut control, flags) {
                Ok(message) => message.bytes,
                Err(rustix::io::Errno::CONNRESET) => 0,
                Err(error) => panic!("the client went silent: {error}"),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if n == 0 {
                assert!(bytes.is_empty(), "the client ended in the middle of a message");
                return None;
            }
            bytes.extend_from_slice(&part[..n]);
            calls += 1;
        }
        let (header, _) = Header::read_from_prefix(&bytes).unwrap();
        let size = header.size.get() as usize;
        // Header and payload have to come in one piece.
        assert!(calls <= 1 || size > 100_000, "a message came in {calls} parts");
        self.left = bytes.split_off(size);
        Some(Message { header, payload: bytes.split_off(16), fds })
    }

    /// Whether the client has sent more than what was received.
    pub fn more_waits(&self) -> bool {
        let peeked = recv(&self.stream, &mut [0u8; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        !self.left.is_empty() || matches!(peeked, Ok((1, _)))
    }

    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = bytes.to_vec();
        if let Some((before, bits)) = &mut self.spoil {
            match bytes.get_mut(*before) {
                Some(byte) => {
                    *byte ^= *bits;
                    self.spoil = None;
                }
                None => *before -= bytes.len(),
            }
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = match sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => sent,
            // It gave us up.
            Err(_) => return,
        };
        let _ = (&self.stream).write_all(&bytes[sent..]);
    }

    pub fn reply(&mut self, to: &Message, payload: &[u8]) {
        self.send(&[to.header.reply(payload.len()).as_bytes(), payload].concat(), &[]);
    }

    pub fn refuse(&mut self, to: &Message, errno: i32) {
        self.send(to.header.error_reply(errno as u32).as_bytes(), &[]);
    }

    /// Sends, unless the client has given up.
    pub fn try_send(&self, bytes: &[u8]) -> bool {
        (&self.stream).write_all(bytes).is_ok()
    }

    pub fn hang_up(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Answers as a well-behaved device does.
    pub fn answer(&mut self, message: &Message) {
        match self.device.answer(message) {
            Ok(payload) => {
                let bytes = [message.header.reply(payload.len()).as_bytes(), &payload].concat();
                if message.command() == command::DEVICE_GET_REGION_INFO && payload.len() > 32 {
                    let fd = self.device.bar2.as_ref().unwrap().0.try_clone().unwrap();
                    return self.send(&bytes, &[fd.as_fd()]);
                }
                self.send(&bytes, &[]);
            }
            Err(errno) => self.refuse(message, errno),
        }
    }

    /// Sends a command of the server's own, and gives the reply.
    pub fn ask(&mut self, number: u16, payload: &[u8]) -> Message {
        self.send(&[Header::command(0x7777, number, payload.len()).as_bytes(), payload].concat(), &[]);
        let reply = self.recv().expect("a reply");
        assert!(reply.header.is_reply() && reply.header.msg_id.get() == 0x7777 && reply.command() == number);
        reply
    }

    /// Takes nothing, until the client closes.
    pub fn until_hung_up(self) {
        let limit = LIMIT.try_into().unwrap();
        let ready = poll(&mut [PollFd::new(&self.stream, PollFlags::empty())], Some(&limit));
        assert_eq!(ready, Ok(1), "the client stays");
    }

    /// Takes all that comes, until the client closes.
    pub fn until_closed(mut self) {
        while self.recv().is_some() {}
    }
}

/// The device: BAR 0 by messages, BAR 2 with two mapped pages of its four, configuration space; 4 MSI-X vectors.
pub struct Model {
    /// The payload of the reply to VERSION.
    pub version: Vec<u8>,
    pub bar0: Vec<u8>,
    pub bar2: Option<(OwnedFd, SharedMemory)>,
    pub config: Vec<u8>,
    pub eventfds: Vec<Option<File>>,
    pub mapped: Vec<(u64, u64, Option<OwnedFd>)>,
    pub resets: u32,
}

impl Default for Model {
    fn default() -> Self {
        let mut config = vec![0; 4096];
        config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        config[8..12].copy_from_slice(&[7, 2, 8, 1]);
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40] = 0x11;
        config[0x100..0x104].copy_from_slice(&[1, 0, 1, 0]);
        Self {
            version: vec![0; 4],
            bar0: vec![0; 0x1000],
            bar2: Some(SharedMemory::create("bar2", 0x4000, HugePages::No).unwrap()),
            config,
            eventfds: (0..4).map(|_| None).collect(),
            mapped: Vec::new(),
            resets: 0,
        }
    }
}

/// Offset in the descriptor where BAR 2 starts.
pub const BAR2_BASE: u64 = 0x1000;

impl Model {
    fn region(&mut self, index: u32) -> Option<&mut Vec<u8>> {
        match index {
            0 => Some(&mut self.bar0),
            7 => Some(&mut self.config),
            _ => None,
        }
    }

    fn answer(&mut self, message: &Message) -> Result<Vec<u8>, i32> {
        let payload = &message.payload[..];
        match message.command() {
            command::VERSION => Ok(self.version.clone()),
            command::DEVICE_GET_INFO => {
                let info = wire::DeviceInfo { argsz: 16.into(), flags: 3.into(), num_regions: 9.into(), num_irqs: 5.into() };
                Ok(info.as_bytes().to_vec())
            }
            command::DEVICE_GET_REGION_INFO => self.region_info(payload),
            command::DEVICE_GET_IRQ_INFO => {
                let mut info = wire::IrqInfo::read_from_bytes(payload).unwrap();
                info.count = match info.index.get() {
                    2 => 4.into(),
                    3 => return Err(libc::EINVAL),
                    _ => 0.into(),
                };
                Ok(info.as_bytes().to_vec())
            }
            command::DEVICE_SET_IRQS => {
                let set = wire::SetIrqs::read_from_bytes(payload).unwrap();
                let fds = message.fds.iter().map(|fd| Some(File::from(fd.try_clone().unwrap())));
                let mut fds = fds.chain(std::iter::repeat_with(|| None));
                assert_eq!(set.flags.get(), 0x24);
                for i in 0..set.count.get() {
                    *self.eventfds.get_mut((set.start.get() + i) as usize).ok_or(libc::EINVAL)? = fds.next().unwrap();
                }
                Ok(Vec::new())
            }
            command::REGION_READ | command::REGION_WRITE => {
                let (access, data) = wire::RegionAccess::read_from_prefix(payload).unwrap();
                let region = self.region(access.region.get()).ok_or(libc::EINVAL)?;
                let (start, count) = (access.offset.get() as usize, access.count.get() as usize);
                let bytes = region.get_mut(start..start + count).ok_or(libc::EINVAL)?;
                if message.command() == command::REGION_WRITE {
                    bytes.copy_from_slice(data);
                    return Ok(access.as_bytes().to_vec());
                }
                Ok([access.as_bytes(), bytes].concat())
            }
            command::DMA_MAP => {
                let map = wire::DmaMap::read_from_bytes(payload).unwrap();
                let fd = message.fds.first().map(|fd| fd.try_clone().unwrap());
                self.mapped.push((map.address.get(), map.size.get(), fd));
                Ok(Vec::new())
            }
            command::DMA_UNMAP => {
                let unmap = wire::DmaUnmap::read_from_bytes(payload).unwrap();
                let is = |m: &(u64, u64, _)| (m.0, m.1) == (unmap.address.get(), unmap.size.get());
                let at = self.mapped.iter().position(is).ok_or(libc::ENOENT)?;
                self.mapped.remove(at);
                // Some servers echo, some don't.
                Ok(if self.resets == 0 { unmap.as_bytes().to_vec() } else { Vec::new() })
            }
            command::DEVICE_RESET => {
                self.resets += 1;
                Ok(Vec::new())
            }
            _ => Err(libc::ENOSYS),
        }
    }

    fn region_info(&mut self, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let mut info = wire::RegionInfo::read_from_bytes(payload).unwrap();
        let argsz = info.argsz.get();
        info.argsz = 32.into();
        info.flags = 3.into();
        match info.index.get() {
            0 => info.size = (self.bar0.len() as u64).into(),
            2 => {
                let areas = [(0x1000u64, 0x1000u64), (0x2000, 0x1000)];
                let cap = wire::CapHeader { id: 1.into(), version: 1.into(), next: 0.into() };
                let sparse = wire::SparseMmap { nr_areas: 2.into(), reserved: 0.into() };
                let mut caps = [cap.as_bytes(), sparse.as_bytes()].concat();
                for (offset, size) in areas {
                    caps.extend(wire::SparseArea { offset: offset.into(), size: size.into() }.as_bytes());
                }
                info.argsz = (32 + caps.len() as u32).into();
                (info.flags, info.size, info.offset) = (15.into(), 0x3000.into(), BAR2_BASE.into());
                if argsz >= info.argsz.get() {
                    info.cap_offset = 32.into();
                    return Ok([info.as_bytes(), &caps].concat());
                }
            }
            7 => info.size = (self.config.len() as u64).into(),
            8 => return Err(libc::EINVAL),
            _ => info.flags = 0.into(),
        }
        Ok(info.as_bytes().to_vec())
    }
}
