//! A tiny device, and a client that speaks the protocol byte by byte.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use vfio_uring::{
    dma::{HugePages, SharedMemory},
    transport::user::wire::{self, Capabilities, HEADER_SIZE, Header, Version, command},
};
use vfio_uring_models::device::{Device, Host, Mappable, RegionSpec};
use zerocopy::{FromBytes, IntoBytes};

/// What no test takes.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// BAR 0: registers, and a doorbell at 0x1000 that may be mapped. Config space: plain memory. BAR 2: read only.
///
/// Registers: 0x0 IOVA (u64), 0x8 length (u32), 0xc command (u32; 1: add one to each byte at IOVA), 0x10 result (u32; 0 good,
/// 1 unmapped), 0x14 length of the last window (u32), 0x18 signal this vector (write).
/// The doorbell: a new value carries out command 1 and signals the vector of that number.
#[derive(Debug)]
pub struct Toy {
    regs: [u8; 0x20],
    config: [u8; 256],
    mappable: Mappable,
    seen: u32,
    pub resets: Arc<AtomicUsize>,
}

impl Toy {
    pub fn new() -> Self {
        let (fd, memory) = SharedMemory::create("toy", 0x2000, HugePages::No).unwrap();
        drop(memory);
        let memory = SharedMemory::map(&fd, 0x1000, 0x1000, true).unwrap();
        let mappable = Mappable { offset: 0x1000, size: 0x1000, memory: Arc::new(memory), fd: Arc::new(fd) };
        Self { regs: [0; 0x20], config: [0xcf; 256], mappable, seen: 0, resets: Arc::default() }
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.regs[at..at + 4].try_into().unwrap())
    }

    fn set(&mut self, at: usize, value: u32) {
        self.regs[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn increment(&mut self, host: &mut impl Host) {
        let iova = u64::from_le_bytes(self.regs[..8].try_into().unwrap());
        let mut bytes = vec![0; (self.u32(8) as usize).min(4 << 20)];
        let window = host.window(iova, bytes.len()).is_some();
        let good = host.read(iova, &mut bytes).and_then(|()| {
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
            host.write(iova, &bytes)
        });
        self.set(0x10, good.is_err().into());
        self.set(0x14, if window { bytes.len() as u32 } else { 0 });
    }
}

impl Device for Toy {
    fn region(&self, index: u32) -> RegionSpec {
        match index {
            0 => RegionSpec { size: 0x4000, flags: 3, mappable: Some(self.mappable.clone()), kind: None },
            2 => RegionSpec { size: 2 << 20, flags: 1, mappable: None, kind: None },
            7 => RegionSpec { size: 256, flags: 3, mappable: None, kind: None },
            _ => RegionSpec::default(),
        }
    }

    fn irq_vectors(&self, index: u32) -> u32 {
        if index == 2 { 4 } else { 0 }
    }

    fn read(&mut self, region: u32, offset: u64, to: &mut [u8], _host: &mut impl Host) -> Result<(), Errno> {
        let at = offset as usize;
        match region {
            0 if offset >= 0x1000 => self.mappable.memory.read(offset - 0x1000, to).map_err(|_| Errno::INVAL)?,
            0 => to.copy_from_slice(self.regs.get(at..at + to.len()).ok_or(Errno::INVAL)?),
            7 => to.copy_from_slice(&self.config[at..at + to.len()]),
            _ => to.fill(region as u8),
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, from: &[u8], host: &mut impl Host) -> Result<(), Errno> {
        let at = offset as usize;
        match region {
            0 if offset >= 0x1000 => self.mappable.memory.write(offset - 0x1000, from).map_err(|_| Errno::INVAL)?,
            0 => {
                self.regs.get_mut(at..at + from.len()).ok_or(Errno::INVAL)?.copy_from_slice(from);
                match at {
                    0xc => self.increment(host),
                    0x18 => host.signal(self.u32(0x18) as u16),
                    _ => {}
                }
            }
            _ => self.config[at..at + from.len()].copy_from_slice(from),
        }
        Ok(())
    }

    fn reset(&mut self, _host: &mut impl Host) {
        self.regs = [0; 0x20];
        self.seen = 0;
        self.mappable.memory.fill(0, 0x1000, 0).unwrap();
        self.resets.fetch_add(1, Ordering::Release);
    }

    fn service(&mut self, host: &mut impl Host) -> usize {
        let doorbell = self.mappable.memory.load_u32(0).unwrap();
        if doorbell == self.seen {
            return 0;
        }
        self.seen = doorbell;
        self.increment(host);
        host.signal(doorbell as u16);
        1
    }

    fn is_active(&self) -> bool {
        true
    }
}

/// A client without opinions.
pub struct Raw {
    pub socket: UnixStream,
    pub next_id: u16,
}

/// A reply: header, payload, descriptors.
pub type Got = (Header, Vec<u8>, Vec<OwnedFd>);

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        Self { socket, next_id: 1 }
    }

    /// Connected, with VERSION done.
    pub fn open(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.version(&Capabilities::default());
        client
    }

    pub fn version(&mut self, capabilities: &Capabilities) -> Capabilities {
        let payload = wire::version_payload(Version::default(), capabilities);
        let (_, reply, _) = self.ok(command::VERSION, &payload, &[]);
        assert_eq!(reply.last(), Some(&0));
        let (version, theirs) = wire::parse_version(&reply).unwrap();
        assert_eq!((version.major.get(), version.minor.get()), (0, 0));
        theirs
    }

    pub fn send(&mut self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let bytes = [header.as_bytes(), payload].concat();
        self.send_bytes(&bytes, fds);
    }

    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        self.socket.write_all(&bytes[sent..]).unwrap();
    }

    pub fn command(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Header {
        let header = Header::command(self.next_id, command, payload.len());
        self.next_id += 1;
        self.send(header, payload, fds);
        header
    }

    pub fn receive(&mut self) -> io::Result<Got> {
        let mut head = [0; HEADER_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got =
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut head)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.socket.read_exact(&mut head[got.bytes..])?;
        let header = Header::read_from_bytes(&head).unwrap();
        let mut payload = vec![0; header.payload_len(16 << 20).unwrap()];
        self.socket.read_exact(&mut payload)?;
        Ok((header, payload, fds))
    }

    /// Sends a command and receives its reply, which has to match.
    pub fn call(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Got {
        let sent = self.command(command, payload, fds);
        let got = self.receive().unwrap();
        assert!(got.0.is_reply());
        assert_eq!((got.0.msg_id, got.0.command), (sent.msg_id, sent.command));
        got
    }

    pub fn ok(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Got {
        let got = self.call(command, payload, fds);
        assert_eq!(got.0.error(), None, "{}", command::name(command));
        got
    }

    pub fn refused(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>], errno: Errno) {
        let got = self.call(command, payload, fds);
        assert_eq!(got.0.error(), Some(errno.raw_os_error()), "{}", command::name(command));
        assert!(got.1.is_empty());
    }

    pub fn read(&mut self, region: u32, offset: u64, len: usize) -> Vec<u8> {
        let (_, payload, _) = self.ok(command::REGION_READ, &access(region, offset, len), &[]);
        assert_eq!(payload[..16], access(region, offset, len));
        assert_eq!(payload.len(), 16 + len);
        payload[16..].to_vec()
    }

    pub fn read_u32(&mut self, region: u32, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(region, offset, 4).try_into().unwrap())
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let head = access(region, offset, data.len());
        let (_, payload, _) = self.ok(command::REGION_WRITE, &[&head[..], data].concat(), &[]);
        assert_eq!(payload, head);
    }

    pub fn map(&mut self, iova: u64, size: u64, flags: u32, file: Option<(&OwnedFd, u64)>) -> Option<i32> {
        let payload = dma_map(iova, size, flags, file.map_or(0, |(_, offset)| offset));
        let fds: Vec<_> = file.iter().map(|(fd, _)| fd.as_fd()).collect();
        self.call(command::DMA_MAP, &payload, &fds).0.error()
    }

    pub fn unmap(&mut self, iova: u64, size: u64, flags: u32) -> Option<i32> {
        let payload = dma_unmap(iova, size, flags);
        let (header, echo, _) = self.call(command::DMA_UNMAP, &payload, &[]);
        assert!(header.error().is_some() || echo == payload);
        header.error()
    }

    pub fn set_irqs(&mut self, flags: u32, start: u32, count: u32, data: &[u8], fds: &[BorrowedFd<'_>]) -> Option<i32> {
        self.call(command::DEVICE_SET_IRQS, &[&set_irqs(2, flags, start, count), data].concat(), fds).0.error()
    }

    /// Whether the server closed the connection.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.socket.read(&mut byte), Ok(0))
            || self.socket.take_error().is_ok_and(|error| error.is_some())
            || self.socket.write(&[0]).is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }
}

pub fn access(region: u32, offset: u64, len: usize) -> Vec<u8> {
    let access = wire::RegionAccess { offset: offset.into(), region: region.into(), count: (len as u32).into() };
    access.as_bytes().to_vec()
}

pub fn dma_map(iova: u64, size: u64, flags: u32, offset: u64) -> Vec<u8> {
    let map = wire::DmaMap {
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: iova.into(),
        size: size.into(),
    };
    map.as_bytes().to_vec()
}

pub fn dma_unmap(iova: u64, size: u64, flags: u32) -> Vec<u8> {
    let unmap = wire::DmaUnmap { argsz: 24.into(), flags: flags.into(), address: iova.into(), size: size.into() };
    unmap.as_bytes().to_vec()
}

pub fn set_irqs(index: u32, flags: u32, start: u32, count: u32) -> Vec<u8> {
    let set = wire::SetIrqs {
        argsz: 20.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    set.as_bytes().to_vec()
}

pub fn memory(len: usize) -> (OwnedFd, SharedMemory) {
    SharedMemory::create("client", len, HugePages::No).unwrap()
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// The count of an eventfd, once it is signalled.
pub fn count(fd: &OwnedFd) -> u64 {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let time = Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut fds, Some(&time)), Ok(1), "no interrupt");
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

pub fn is_signalled(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}

/// Waits until something is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !so() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a test that must not hang.
pub fn bounded(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match wait.recv_timeout(3 * DEADLINE) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("the test hangs"),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}
