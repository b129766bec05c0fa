//! What the runner does: sending, receiving, and the watch over the deadlines.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    os::fd::OwnedFd,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use zerocopy::{FromBytes, IntoBytes};

use super::{Answer, InFlight, Link, Outgoing, Posting, Reply};
use crate::{
    Error, Result,
    dma::WeakAddressSpace,
    reactor::{op, sleep_until},
    transport::user::{
        protocol::{self, Accepted, MAX_FDS_IN, Served},
        wire::{DmaAccess, HEADER_SIZE, Header, command},
    },
};

/// Bytes that are received at once.
const RECEIVE_MAX: usize = 256 << 10;

impl Link {
    // Sending.

    pub(super) async fn send_all(&self) -> Error {
        loop {
            let (bytes, fds) = poll_fn(|_| self.next_message().map_or(Poll::Pending, Poll::Ready)).await;
            if let Err(error) = self.send(bytes, fds).await {
                return error;
            }
            self.sending.set(None);
            if self.replying.take() {
                self.kick();
            }
        }
    }

    /// What goes out next: a reply to the server before commands of ours.
    fn next_message(&self) -> Option<(Vec<u8>, Vec<Arc<OwnedFd>>)> {
        if let Some(reply) = self.reply.take() {
            self.due(&self.sending);
            return Some((reply, Vec::new()));
        }
        while self.in_flight.borrow().len() < self.max_outstanding.get() {
            let Outgoing { mut bytes, fds, expect, answer } = self.queue.borrow_mut().pop_front()?;
            match &answer {
                Answer::Caller(caller) if caller.is_canceled() => continue,
                Answer::Posted(write) => {
                    write.state.set(Posting::InFlight);
                    bytes = write.message();
                }
                Answer::Caller(_) | Answer::Nobody => {}
            }
            let id = self.take_id();
            // A header starts with its message id.
            bytes[..2].copy_from_slice(&id.to_le_bytes());
            let until = self.due(&self.sending) + self.patience(expect.command) - self.deadline;
            self.in_flight.borrow_mut().insert(id, InFlight { expect, answer, until });
            return Some((bytes, fds));
        }
        None
    }

    /// How long a command may take: those that wait for the device's own work get more.
    fn patience(&self, number: u16) -> Duration {
        match number {
            command::DEVICE_RESET | command::DMA_UNMAP => self.deadline * 2,
            _ => self.deadline,
        }
    }

    fn take_id(&self) -> u16 {
        let in_flight = self.in_flight.borrow();
        let mut id = self.next_id.get();
        // Far fewer are in flight than there are ids.
        while in_flight.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        self.next_id.set(id.wrapping_add(1));
        id
    }

    async fn send(&self, mut bytes: Vec<u8>, mut fds: Vec<Arc<OwnedFd>>) -> Result<()> {
        while !bytes.is_empty() {
            let (result, back) = op::send(&self.fd, bytes, fds.clone()).await;
            bytes = back;
            match result {
                Ok(0) => return Err(self.closed("stopped taking messages")),
                Ok(sent) => {
                    fds.clear();
                    bytes.drain(..sent.min(bytes.len()));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.socket_error("sending to", error)),
            }
        }
        Ok(())
    }

    // Receiving.

    pub(super) async fn receive_all(&self) -> Error {
        loop {
            if let Err(error) = self.receive_message().await {
                return error;
            }
            self.receiving.set(None);
        }
    }

    async fn receive_message(&self) -> Result<()> {
        let mut fds = Vec::new();
        let bytes = self.receive(HEADER_SIZE, &mut fds).await?;
        let header = Header::read_from_bytes(&bytes).map_err(|_| Error::fault("a header of the wrong size"))?;
        if header.is_reply() { self.take_reply(header, fds).await } else { self.take_command(header, fds).await }
    }

    async fn take_reply(&self, header: Header, mut fds: Vec<OwnedFd>) -> Result<()> {
        let id = header.msg_id.get();
        let expect = self.in_flight.borrow().get(&id).map(|call| call.expect);
        let expect = expect.ok_or_else(|| {
            let name = command::name(header.command.get());
            Error::fault(format!("a reply ({name}) came for message {id}, which waits for none"))
        })?;
        let result = match protocol::accept_reply(&header, &expect, fds.len())? {
            Accepted::Refused(errno) => Err(protocol::refused(expect.command, errno)),
            Accepted::Payload(len) => {
                let payload = self.receive(len, &mut fds).await?;
                protocol::accept_reply(&header, &expect, fds.len())?;
                Ok(Reply { payload, fds })
            }
        };
        let Some(call) = self.in_flight.borrow_mut().remove(&id) else { return Err(self.gone_error()) };
        self.deliver(call.answer, result)
    }

    fn deliver(&self, answer: Answer, result: Result<Reply>) -> Result<()> {
        match answer {
            // Who has stopped waiting leaves the reply to be dropped, with its descriptors.
            Answer::Caller(caller) => drop(caller.send(result)),
            Answer::Nobody => {
                if let Err(error) = result {
                    tracing::debug!(peer = self.peer, %error, "a command that nobody waits for failed");
                }
            }
            Answer::Posted(write) => {
                match result {
                    Ok(reply) => {
                        protocol::parse_region_access(&reply.payload, &write.access, command::REGION_WRITE)?;
                    }
                    Err(error) => {
                        tracing::warn!(peer = self.peer, %error, "a posted write failed");
                        write.error.replace(Some(error));
                    }
                }
                match write.state.replace(Posting::Idle) {
                    Posting::Stale => self.post_again(write),
                    _ => drop(write),
                }
            }
        }
        Ok(())
    }

    async fn take_command(&self, header: Header, mut fds: Vec<OwnedFd>) -> Result<()> {
        let len = protocol::accept_command(&header)?;
        let payload = self.receive(len, &mut fds).await?;
        if header.no_reply() && header.command.get() == command::DMA_READ {
            return Ok(());
        }
        let reply = self.execute(&header, &payload, fds.len());
        if !header.no_reply() {
            self.replying.set(true);
            self.reply.replace(Some(reply));
            // One at a time: what a peer can make us store is one reply.
            poll_fn(|_| if self.replying.get() { Poll::Pending } else { Poll::Ready(()) }).await;
        }
        Ok(())
    }

    fn execute(&self, header: &Header, payload: &[u8], fds: usize) -> Vec<u8> {
        let refuse = |errno: i32| header.error_reply(errno as u32).as_bytes().to_vec();
        let space = self.space.borrow().as_ref().and_then(WeakAddressSpace::upgrade);
        let echo = &payload[..payload.len().min(size_of::<DmaAccess>())];
        let reply = |data: usize| {
            let mut bytes = Vec::with_capacity(HEADER_SIZE + echo.len() + data);
            bytes.extend_from_slice(header.reply(echo.len() + data).as_bytes());
            bytes.extend_from_slice(echo);
            bytes.resize(HEADER_SIZE + echo.len() + data, 0);
            bytes
        };
        match (protocol::parse_command(header, payload, fds), space) {
            (Served::Refuse(errno), _) => refuse(errno as i32),
            (_, None) => refuse(libc::EFAULT),
            (Served::Read { iova, count }, Some(space)) => {
                let mut bytes = reply(count);
                let data = bytes.len() - count;
                space.read(iova, &mut bytes[data..]).map_or_else(|_| refuse(libc::EFAULT), |()| bytes)
            }
            (Served::Write { iova, data }, Some(space)) => {
                space.write(iova, data).map_or_else(|_| refuse(libc::EFAULT), |()| reply(0))
            }
        }
    }

    /// Receives exactly `len` bytes; descriptors that come with them are added to `fds`.
    async fn receive(&self, len: usize, fds: &mut Vec<OwnedFd>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut first = true;
        while bytes.len() < len {
            let (result, part) = op::recv(&self.fd, vec![0; (len - bytes.len()).min(RECEIVE_MAX)], MAX_FDS_IN).await;
            let received = match result {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.socket_error("receiving from", error)),
            };
            fds.extend(received.fds);
            if received.fds_truncated || fds.len() > MAX_FDS_IN {
                return Err(Error::fault(format!(
                    "descriptors of a message were lost: more than {MAX_FDS_IN} came, or this process may open no more"
                )));
            }
            match (received.bytes, self.receiving.get()) {
                (0, None) => return Err(self.closed("closed the connection")),
                (0, Some(_)) => return Err(self.closed("closed the connection in the middle of a message")),
                // From its first byte on a message has to be through within the deadline.
                (_, None) => drop(self.due(&self.receiving)),
                (_, Some(_)) => {}
            }
            if std::mem::take(&mut first) {
                bytes = part;
                bytes.truncate(received.bytes);
            } else {
                bytes.extend_from_slice(&part[..received.bytes.min(part.len())]);
            }
        }
        Ok(bytes)
    }

    fn closed(&self, how: &str) -> Error {
        Error::Gone { reason: format!("{} {how}", self.peer).into() }
    }

    fn socket_error(&self, what: &str, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.closed("closed the connection"),
            _ => Error::io(format!("{what} {}", self.peer), error),
        }
    }

    // Deadlines.

    /// Starts a deadline.
    fn due(&self, which: &Cell<Option<Instant>>) -> Instant {
        let until = Instant::now() + self.deadline;
        which.set(Some(until));
        if self.watched.get().is_none_or(|watched| until < watched) {
            self.rewatch.set(true);
        }
        until
    }

    /// Sleeps from deadline to deadline, and gives the error of the first that is missed.
    pub(super) async fn watch(&self) -> Error {
        loop {
            self.rewatch.set(false);
            let next = self.earliest();
            self.watched.set(next.as_ref().map(|due| due.0));
            let Some((until, ..)) = next else {
                poll_fn(|_| if self.rewatch.get() { Poll::Ready(()) } else { Poll::Pending }).await;
                continue;
            };
            let mut sleep = pin!(sleep_until(until));
            poll_fn(|cx| if self.rewatch.get() { Poll::Ready(()) } else { sleep.as_mut().poll(cx) }).await;
            if let Some((until, what, after)) = self.earliest()
                && until <= Instant::now()
            {
                return Error::Timeout { what: format!("{what} {}", self.peer), after };
            }
        }
    }

    /// The deadline that comes next, what it is for, and how long that may take.
    fn earliest(&self) -> Option<(Instant, String, Duration)> {
        let in_flight = self.in_flight.borrow();
        let calls = in_flight.values().map(|call| (call.until, Some(call.expect.command)));
        let own = [self.sending.get(), self.receiving.get()].into_iter().flatten().map(|until| (until, None));
        let (until, number) = calls.chain(own).min_by_key(|due| due.0)?;
        Some(match number {
            Some(number) => (until, format!("{} to", command::name(number)), self.patience(number)),
            None => (until, "a message under way with".into(), self.deadline),
        })
    }
}
