//! The client: a connection to a vfio-user server, and the commands of the protocol as async functions.
//!
//! [`Connection::connect`] spawns one runner task on the current reactor; it sends, receives and watches the deadlines, and
//! ends when the last handle to the connection is dropped. A server that breaks a rule, misses a deadline or goes away ends the
//! connection: every pending command gets that error, every later one [`Error::Gone`].
//!
//! The server is not trusted, but it may shrink a file that it gave us to map, and an access beyond its end is then a SIGBUS.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

use super::{
    link::{Link, PostedWrite, Reply, UntilGone},
    protocol::{self, DeviceInfo, Expect, IrqInfo, Limits, MAX_OUTSTANDING, RegionInfo, RegionReply},
    wire::{self, RegionAccess, command, flags},
};
use crate::{
    Error, Result,
    device::{Irq, gate::Gate},
    dma::AddressSpace,
    reactor::{self, JoinHandle, sleep},
};

/// Commands in flight that are proposed where the caller does not say.
const PROPOSED_OUTSTANDING: usize = 64;
/// Between two attempts to connect to a server whose backlog is full.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);

const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_EVENTFD: u32 = 4;
const IRQ_ACTION_UNMASK: u32 = 0x10;
const IRQ_ACTION_TRIGGER: u32 = 0x20;

/// A connection to a vfio-user server; it belongs to the reactor that it was made on. Dropping it closes the socket.
pub struct Connection {
    link: Rc<Link>,
    runner: JoinHandle<()>,
    limits: Limits,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("link", &self.link).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.fail(Error::Gone { reason: "its last handle was dropped".into() });
        self.runner.abort();
    }
}

impl Connection {
    /// Connects to the server that listens at `path` and agrees on a version. Each answer may take `deadline` from the sending
    /// of its command; resets and unmaps twice that.
    ///
    /// `max_outstanding` commands are in flight at most; `None`: as many as the server confirms, which is one for servers that
    /// don't know of our extension.
    ///
    /// # Errors
    /// [`Error::NoReactor`] outside of a reactor, [`Error::Io`] when nothing listens there, and [`Error::DeviceFault`],
    /// [`Error::Refused`], [`Error::Timeout`] or [`Error::Gone`] by what the server does.
    pub async fn connect(path: &Path, deadline: Duration, max_outstanding: Option<usize>) -> Result<Rc<Self>> {
        if !reactor::is_running() {
            return Err(Error::NoReactor { what: "a vfio-user connection" });
        }
        let socket = connect_socket(path, deadline).await?;
        let link = Link::new(socket, format!("the server at {}", path.display()), deadline);
        let runner = reactor::spawn(link.clone().run());
        let mut this = Self { link, runner, limits: Limits::default() };
        let proposed = max_outstanding.unwrap_or(PROPOSED_OUTSTANDING).clamp(1, MAX_OUTSTANDING);
        let version = wire::Version { major: wire::MAJOR.into(), minor: wire::MINOR.into() };
        let payload = wire::version_payload(version, &protocol::proposal(proposed));
        let expect = Expect::between(command::VERSION, size_of::<wire::Version>(), wire::MAX_CONTROL_PAYLOAD, 0);
        let reply = this.request(protocol::message(command::VERSION, &payload[..], &[]), Vec::new(), expect).await?;
        this.limits = this.link.checked(protocol::negotiate(&reply.payload, proposed))?;
        if max_outstanding.is_some() {
            this.limits.max_outstanding = proposed;
        }
        this.link.max_outstanding.set(this.limits.max_outstanding);
        Ok(Rc::new(this))
    }

    /// What was agreed on.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Lets the server's DMA_READ and DMA_WRITE reach `space`, and tells it when the connection ends.
    pub fn serve(&self, space: &AddressSpace) {
        self.link.serve(space.downgrade());
    }

    /// Ends the connection.
    pub(crate) fn close(&self, cause: Error) {
        self.link.fail(cause);
    }

    /// The gate of the device behind it, which is gone with it.
    pub(crate) fn shut_with_it(&self, gate: &Arc<Gate>) {
        self.link.shut_with_it(gate);
    }

    /// Whether the connection has ended.
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.link.is_gone()
    }

    /// Why the connection has ended, if it has.
    pub fn cause(&self) -> Option<Error> {
        self.link.cause()
    }

    /// Waits for the end of the connection.
    pub async fn gone(&self) -> Error {
        self.link.until_gone().await
    }

    pub(crate) fn until_gone(&self) -> UntilGone {
        self.link.until_gone()
    }

    async fn request(&self, bytes: Vec<u8>, fds: Vec<Arc<OwnedFd>>, expect: Expect) -> Result<Reply> {
        self.link.request(bytes, fds, expect).await
    }

    /// DEVICE_GET_INFO.
    ///
    /// # Errors
    /// Like all commands here: [`Error::Refused`] when the server says no, else the error that ended the connection.
    pub async fn device_info(&self) -> Result<DeviceInfo> {
        let size = size_of::<wire::DeviceInfo>();
        let info = wire::DeviceInfo { argsz: (size as u32).into(), ..Default::default() };
        let bytes = protocol::message(command::DEVICE_GET_INFO, &info, &[]);
        let reply = self.request(bytes, Vec::new(), Expect::exactly(command::DEVICE_GET_INFO, size)).await?;
        self.link.checked(protocol::parse_device_info(&reply.payload))
    }

    /// DEVICE_GET_REGION_INFO: the region and, where it may be mapped, the descriptor to map.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>)> {
        let number = command::DEVICE_GET_REGION_INFO;
        let mut argsz = protocol::REGION_INFO_ARGSZ;
        // A server that asks for more room each time is broken.
        for _ in 0..3 {
            let info = wire::RegionInfo { argsz: argsz.into(), index: index.into(), ..Default::default() };
            let expect = Expect::between(number, size_of::<wire::RegionInfo>(), argsz as usize, protocol::MAX_FDS_IN);
            let reply = self.request(protocol::message(number, &info, &[]), Vec::new(), expect).await?;
            let page = rustix::param::page_size() as u64;
            match self.link.checked(protocol::parse_region_info(&reply.payload, index, argsz, page))? {
                RegionReply::Complete(info) => return Ok((info, reply.fds.into_iter().next())),
                RegionReply::Again(needed) => argsz = needed,
            }
        }
        self.link.checked(Err(Error::fault(format!("region {index}: it asks for more room than it asked for before"))))
    }

    /// DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let (number, size) = (command::DEVICE_GET_IRQ_INFO, size_of::<wire::IrqInfo>());
        // Capabilities are asked for only where there may be some: servers may not expect it elsewhere.
        let argsz = if index < Irq::COUNT { size as u32 } else { protocol::IRQ_INFO_ARGSZ };
        let info = wire::IrqInfo { argsz: argsz.into(), index: index.into(), ..Default::default() };
        let bytes = protocol::message(number, &info, &[]);
        let reply = self.request(bytes, Vec::new(), Expect::between(number, size, argsz as usize, 0)).await?;
        self.link.checked(protocol::parse_irq_info(&reply.payload, index))
    }

    /// DEVICE_SET_IRQS: the server signals `eventfds` for the vectors from `start` on. As many messages as the server's limit
    /// of descriptors needs; after an error some vectors may be set.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it takes no descriptors; see [`Connection::device_info`].
    pub async fn set_irqs(&self, index: u32, start: u32, eventfds: &[Arc<OwnedFd>]) -> Result<()> {
        if self.limits.max_msg_fds == 0 {
            return Err(Error::Unsupported { what: "interrupts: its server takes no descriptors".into() });
        }
        let mut at = start;
        for part in eventfds.chunks(self.limits.max_msg_fds) {
            let count = part.len() as u32;
            let bytes = set_irqs(index, IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER, at, count);
            self.request(bytes, part.to_vec(), Expect::exactly(command::DEVICE_SET_IRQS, 0)).await?;
            at = at.saturating_add(count);
        }
        Ok(())
    }

    /// DEVICE_SET_IRQS: the server forgets the eventfds of `count` vectors from `start` on. Queued, not waited for.
    pub fn unset_irqs(&self, index: u32, start: u32, count: u32) {
        // No descriptors with EVENTFD de-assigns; DATA_NONE with a count would fire the vectors.
        let bytes = set_irqs(index, IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER, start, count);
        self.link.request_detached(bytes, Expect::exactly(command::DEVICE_SET_IRQS, 0));
    }

    /// DEVICE_SET_IRQS: unmasks a level interrupt that its server has masked when it fired.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn unmask_irqs(&self, index: u32, start: u32, count: u32) -> Result<()> {
        let bytes = set_irqs(index, IRQ_DATA_NONE | IRQ_ACTION_UNMASK, start, count);
        self.request(bytes, Vec::new(), Expect::exactly(command::DEVICE_SET_IRQS, 0)).await.map(drop)
    }

    /// REGION_READ, in parts of what the server gives at once; up to that, one message of exactly this width.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn region_read(&self, region: u32, offset: u64, to: &mut [u8]) -> Result<()> {
        let mut at = offset;
        for part in to.chunks_mut(self.limits.max_data_xfer) {
            let access = access(region, at, part.len());
            let expect = Expect::exactly(command::REGION_READ, size_of_val(&access) + part.len());
            let bytes = protocol::message(command::REGION_READ, &access, &[]);
            let reply = self.request(bytes, Vec::new(), expect).await?;
            let data = protocol::parse_region_access(&reply.payload, &access, command::REGION_READ);
            part.copy_from_slice(self.link.checked(data)?);
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// REGION_WRITE, in parts of what the server takes at once; up to that, one message of exactly this width.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn region_write(&self, region: u32, offset: u64, from: &[u8]) -> Result<()> {
        let mut at = offset;
        for part in from.chunks(self.limits.max_data_xfer) {
            let access = access(region, at, part.len());
            let bytes = protocol::message(command::REGION_WRITE, &access, part);
            let expect = Expect::exactly(command::REGION_WRITE, size_of_val(&access));
            let reply = self.request(bytes, Vec::new(), expect).await?;
            self.link.checked(protocol::parse_region_access(&reply.payload, &access, command::REGION_WRITE))?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    // Kept out of the doorbells, which are a store where they are mapped.
    #[inline(never)]
    pub(crate) fn post(&self, write: &Rc<PostedWrite>, value: u64) {
        self.link.post(write, value);
    }

    /// DMA_MAP: `len` bytes at `offset` of `fd` at `iova`, for the device to read and write. Without a descriptor, and where the server
    /// takes none, it reads and writes the memory by DMA_READ and DMA_WRITE.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn dma_map(&self, iova: u64, len: u64, fd: Option<&Arc<OwnedFd>>, offset: u64) -> Result<()> {
        let map = wire::DmaMap {
            argsz: (size_of::<wire::DmaMap>() as u32).into(),
            flags: (flags::DMA_READ | flags::DMA_WRITE).into(),
            offset: offset.into(),
            address: iova.into(),
            size: len.into(),
        };
        let fds = fd.filter(|_| self.limits.max_msg_fds != 0).cloned().into_iter().collect();
        let bytes = protocol::message(command::DMA_MAP, &map, &[]);
        self.request(bytes, fds, Expect::exactly(command::DMA_MAP, 0)).await.map(drop)
    }

    /// DMA_UNMAP of exactly one mapping.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn dma_unmap(&self, iova: u64, len: u64) -> Result<()> {
        let size = size_of::<wire::DmaUnmap>();
        let unmap = wire::DmaUnmap { argsz: (size as u32).into(), flags: 0.into(), address: iova.into(), size: len.into() };
        let bytes = protocol::message(command::DMA_UNMAP, &unmap, &[]);
        let expect = Expect { or_empty: true, ..Expect::exactly(command::DMA_UNMAP, size) };
        let reply = self.request(bytes, Vec::new(), expect).await?;
        self.link.checked(protocol::parse_dma_unmap(&reply.payload, iova, len))
    }

    /// DEVICE_RESET.
    ///
    /// # Errors
    /// See [`Connection::device_info`].
    pub async fn reset(&self) -> Result<()> {
        let bytes = protocol::message(command::DEVICE_RESET, &[0u8; 0], &[]);
        self.request(bytes, Vec::new(), Expect::exactly(command::DEVICE_RESET, 0)).await.map(drop)
    }
}

fn access(region: u32, offset: u64, len: usize) -> RegionAccess {
    RegionAccess { offset: offset.into(), region: region.into(), count: (len as u32).into() }
}

fn set_irqs(index: u32, what: u32, start: u32, count: u32) -> Vec<u8> {
    let set = wire::SetIrqs {
        argsz: (size_of::<wire::SetIrqs>() as u32).into(),
        flags: what.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    protocol::message(command::DEVICE_SET_IRQS, &set, &[])
}

async fn connect_socket(path: &Path, deadline: Duration) -> Result<OwnedFd> {
    let fail = |errno: Errno| {
        let hint = match errno {
            Errno::NOENT => ": no such socket; is the server started?",
            Errno::CONNREFUSED if is_socket(path) == Some(false) => ": not a socket",
            Errno::CONNREFUSED => ": nobody listens there; has the server ended?",
            Errno::PROTOTYPE => ": not a stream socket",
            Errno::NAMETOOLONG => ": the path of a socket has at most 107 bytes",
            _ => "",
        };
        Error::io(format!("connecting to {}{hint}", path.display()), io::Error::from(errno))
    };
    let address = SocketAddrUnix::new(path).map_err(fail)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
    let start = Instant::now();
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            // Too many clients wait for its accept.
            Err(Errno::AGAIN) if start.elapsed() < deadline => sleep(CONNECT_PAUSE.min(deadline)).await,
            Err(Errno::AGAIN) => {
                return Err(Error::Timeout { what: format!("connecting to {}", path.display()), after: deadline });
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(fail(errno)),
        }
    }
    // The ring waits for a blocking socket; for another it gives EAGAIN back.
    rustix::io::ioctl_fionbio(socket.as_fd(), false).map_err(fail)?;
    Ok(socket)
}

fn is_socket(path: &Path) -> Option<bool> {
    let mode = rustix::fs::stat(path).ok()?.st_mode;
    Some(rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Socket)
}
