//! A client's socket: messages in and out, each with its descriptors.

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
        sendmsg,
    },
    time::Timespec,
};
use vfio_uring::transport::user::wire::{DmaAccess, HEADER_SIZE, Header, HeaderError, command};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    session::{Channel, MAX_MSG_FDS, MAX_PAYLOAD, Reply},
    stop::Stop,
};
use crate::device::Unmapped;

/// Commands, and bytes of them, that may come while a DMA_READ or DMA_WRITE waits for its reply.
const MAX_DEFERRED: usize = 256;
const MAX_DEFERRED_BYTES: usize = 8 << 20;

/// Why a client is let go.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("it closed the connection")]
    Closed,
    #[error("it closed the connection in the middle of a message")]
    Torn,
    #[error("its message can't be understood: {0}")]
    Header(#[from] HeaderError),
    #[error("it did not introduce itself")]
    Silent,
    #[error("it does not take what it is sent")]
    Stalled,
    #[error("it sends too much while it owes a reply")]
    Flood,
    #[error("the server stops")]
    Stopped,
    #[error("the connection failed: {0}")]
    Io(Errno),
}

/// A message of the client.
#[derive(Debug)]
pub(super) struct Message {
    pub header: Header,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    stop: Stop,
    deadline: Duration,
    /// The message that is coming in: bytes of it so far, its header once that is whole.
    bytes: [u8; HEADER_SIZE],
    have: usize,
    header: Option<Header>,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    deferred: VecDeque<Message>,
    deferred_bytes: usize,
    next_id: u16,
    pub max_data: usize,
    /// The client does not answer DMA requests: none are sent any more.
    mute: bool,
    lost: Option<Lost>,
}

impl Connection {
    /// `deadline`: how long the client may take to read what it is sent, and to answer what it is asked.
    pub fn new(socket: OwnedFd, stop: Stop, deadline: Duration) -> Self {
        Self {
            socket,
            stop,
            deadline,
            bytes: [0; HEADER_SIZE],
            have: 0,
            header: None,
            payload: Vec::new(),
            fds: Vec::new(),
            deferred: VecDeque::new(),
            deferred_bytes: 0,
            next_id: 0,
            max_data: 0,
            mute: false,
            lost: None,
        }
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Why the connection ended while the device used it.
    pub fn take_lost(&mut self) -> Option<Lost> {
        self.lost.take()
    }

    /// The next message, when one is there.
    pub fn next(&mut self) -> Result<Option<Message>, Lost> {
        if let Some(message) = self.deferred.pop_front() {
            self.deferred_bytes -= message.payload.len();
            return Ok(Some(message));
        }
        self.receive()
    }

    /// Reads as far as the current message goes, so that descriptors belong to the message that they came with.
    fn receive(&mut self) -> Result<Option<Message>, Lost> {
        loop {
            let header = match self.header {
                Some(header) => header,
                None => {
                    let mut bytes = self.bytes;
                    let Some(n) = self.read(&mut bytes[self.have..], self.have == 0)? else { return Ok(None) };
                    self.bytes = bytes;
                    self.have += n;
                    if self.have < HEADER_SIZE {
                        continue;
                    }
                    let header = Header::read_from_bytes(&self.bytes).map_err(|_| Lost::Torn)?;
                    let len = header.payload_len(MAX_PAYLOAD)?;
                    self.payload = vec![0; len];
                    self.have = 0;
                    self.header = Some(header);
                    header
                }
            };
            if self.have < self.payload.len() {
                let mut payload = std::mem::take(&mut self.payload);
                let result = self.read(&mut payload[self.have..], false);
                self.payload = payload;
                let Some(n) = result? else { return Ok(None) };
                self.have += n;
                continue;
            }
            self.header = None;
            self.have = 0;
            let (payload, fds) = (std::mem::take(&mut self.payload), std::mem::take(&mut self.fds));
            return Ok(Some(Message { header, payload, fds }));
        }
    }

    /// Bytes that are there; `None` when none are. Descriptors above the limit are closed.
    fn read(&mut self, to: &mut [u8], between: bool) -> Result<Option<usize>, Lost> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            match recvmsg(&self.socket, &mut [IoSliceMut::new(to)], &mut control, flags) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        let bytes = match received {
            Ok(message) => message.bytes,
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET | Errno::PIPE) => 0,
            Err(error) => return Err(Lost::Io(error)),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                let room = MAX_MSG_FDS - self.fds.len();
                self.fds.extend(rights.take(room));
            }
        }
        match bytes {
            0 if between => Err(Lost::Closed),
            0 => Err(Lost::Torn),
            n => Ok(Some(n)),
        }
    }

    /// Sends a reply.
    pub fn reply(&mut self, reply: &Reply) -> Result<(), Lost> {
        self.send(&reply.header, &[&reply.payload], &reply.fds())
    }

    fn send(&mut self, header: &Header, payload: &[&[u8]], mut fds: &[BorrowedFd<'_>]) -> Result<(), Lost> {
        let parts = [header.as_bytes(), payload.first().copied().unwrap_or(&[]), payload.get(1).copied().unwrap_or(&[])];
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let until = Instant::now() + self.deadline;
        let mut sent = 0;
        while sent < total {
            let mut skip = sent;
            let slices = parts.map(|part| {
                let gone = skip.min(part.len());
                skip -= gone;
                IoSlice::new(&part[gone..])
            });
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Lost::Io(Errno::INVAL));
            }
            match sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => {
                    sent += n;
                    fds = &[];
                }
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, until)? {
                        return Err(Lost::Stalled);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Lost::Closed),
                Err(error) => return Err(Lost::Io(error)),
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready or the time has come; false: it is late.
    fn wait(&self, events: PollFlags, until: Instant) -> Result<bool, Lost> {
        let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return Ok(false);
        };
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.socket, events), PollFd::from_borrowed_fd(self.stop.wake(), PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) if self.stop.is_set() => Err(Lost::Stopped),
            Ok(_) | Err(Errno::INTR) => Ok(true),
            Err(error) => Err(Lost::Io(error)),
        }
    }

    /// Sends a command to the client and gives the payload of its reply; other commands that come meanwhile are kept.
    fn ask(&mut self, number: u16, access: &DmaAccess, data: &[u8]) -> Result<Vec<u8>, Unmapped> {
        if self.mute || self.lost.is_some() {
            return Err(Unmapped);
        }
        self.next_id = self.next_id.wrapping_add(1);
        let header = Header::command(self.next_id, number, size_of::<DmaAccess>() + data.len());
        let until = Instant::now() + self.deadline;
        let result = self.send(&header, &[access.as_bytes(), data], &[]).and_then(|()| self.await_reply(&header, until));
        match result {
            Ok(Some(reply)) if reply.header.error().is_none() => Ok(reply.payload),
            Ok(Some(_)) => Err(Unmapped),
            Ok(None) => {
                tracing::warn!("the client does not answer {}", command::name(number));
                self.mute = true;
                Err(Unmapped)
            }
            Err(lost) => {
                self.lost = Some(lost);
                Err(Unmapped)
            }
        }
    }

    fn await_reply(&mut self, to: &Header, until: Instant) -> Result<Option<Message>, Lost> {
        loop {
            let Some(message) = self.receive()? else {
                if self.wait(PollFlags::IN, until)? {
                    continue;
                }
                return Ok(None);
            };
            if message.header.is_reply() {
                if message.header.msg_id == to.msg_id && message.header.command == to.command {
                    return Ok(Some(message));
                }
                // A late reply to a request that was given up.
                continue;
            }
            self.deferred_bytes += message.payload.len();
            self.deferred.push_back(message);
            if self.deferred.len() > MAX_DEFERRED || self.deferred_bytes > MAX_DEFERRED_BYTES {
                return Err(Lost::Flood);
            }
        }
    }
}

impl Channel for Connection {
    fn dma_read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), Unmapped> {
        let mut at = iova;
        for part in to.chunks_mut(self.max_data.max(8)) {
            let access = DmaAccess { address: at.into(), count: (part.len() as u64).into() };
            let reply = self.ask(command::DMA_READ, &access, &[])?;
            let (echo, data) = DmaAccess::read_from_prefix(&reply).map_err(|_| Unmapped)?;
            if echo.count.get() != part.len() as u64 || data.len() != part.len() {
                return Err(Unmapped);
            }
            part.copy_from_slice(data);
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    fn dma_write(&mut self, iova: u64, from: &[u8]) -> Result<(), Unmapped> {
        let mut at = iova;
        for part in from.chunks(self.max_data.max(8)) {
            let access = DmaAccess { address: at.into(), count: (part.len() as u64).into() };
            // Some clients answer with the header alone.
            self.ask(command::DMA_WRITE, &access, part)?;
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(())
    }
}
