//! Clients that are not served yet: one is served at a time, the others are told so.

use std::{
    collections::VecDeque,
    os::{fd::OwnedFd, unix::net::UnixListener},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use vfio_uring::transport::user::wire::{HEADER_SIZE, Header};
use zerocopy::{FromBytes, IntoBytes};

/// A client that comes while the one before it is leaving waits this long for its place.
const GRACE: Duration = Duration::from_millis(250);
/// A refused client may take this long to say what it wants to hear a refusal of.
const PATIENCE: Duration = Duration::from_secs(1);
const MAX_WAITING: usize = 16;
/// When accepting fails (too many open files, most likely), the next try is this much later.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Lobby<'a> {
    listener: &'a UnixListener,
    waiting: VecDeque<(OwnedFd, Instant)>,
    paused_until: Option<Instant>,
}

impl<'a> Lobby<'a> {
    /// Of a listener that does not block.
    pub fn new(listener: &'a UnixListener) -> Self {
        Self { listener, waiting: VecDeque::new(), paused_until: None }
    }

    /// The listener, unless accepting has just failed.
    pub fn listener(&self) -> Option<&'a UnixListener> {
        let paused = self.paused_until.is_some_and(|until| Instant::now() < until);
        (!paused).then_some(self.listener)
    }

    /// The next client.
    pub fn next(&mut self) -> Option<OwnedFd> {
        self.accept();
        self.waiting.pop_front().map(|(socket, _)| socket)
    }

    /// How long a sleep may be without anybody waiting too long.
    pub fn limit(&self, sleep: Duration) -> Duration {
        if self.waiting.is_empty() && self.paused_until.is_none() { sleep } else { sleep.min(GRACE / 4) }
    }

    /// Lets clients in, and refuses those that have waited long enough.
    pub fn attend(&mut self) {
        self.accept();
        let now = Instant::now();
        self.waiting.retain(|(socket, since)| {
            let waited = now - *since;
            waited < GRACE || (!refuse(socket) && waited < PATIENCE)
        });
    }

    fn accept(&mut self) {
        if self.listener().is_none() {
            return;
        }
        self.paused_until = None;
        // Bounded, so that a flood of clients does not keep the server from its own.
        for _ in 0..MAX_WAITING {
            match self.listener.accept() {
                Ok((stream, _)) if self.waiting.len() < MAX_WAITING => {
                    self.waiting.push_back((stream.into(), Instant::now()))
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!("a client can't be let in: {error}");
                    self.paused_until = Some(Instant::now() + PAUSE);
                    return;
                }
            }
        }
    }
}

/// Answers the VERSION of a client with EBUSY; false while it has not come.
fn refuse(socket: &OwnedFd) -> bool {
    let mut bytes = [0u8; 4096];
    match recv(socket, &mut bytes[..], RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN | Errno::INTR) => false,
        Ok((n, _)) if n >= HEADER_SIZE => {
            if let Ok((header, _)) = Header::read_from_prefix(&bytes) {
                let reply = header.error_reply(Errno::BUSY.raw_os_error() as u32);
                let _ = send(socket, reply.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            }
            true
        }
        _ => true,
    }
}
