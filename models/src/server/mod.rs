//! A vfio-user server for one [`Device`] and one client at a time, on a blocking thread.
//!
//! [`Session`] is the protocol without a socket; [`Server`] puts a Unix socket in front of it and polls the device in between;
//! [`Running`] has a thread for that.

mod connection;
mod dma;
mod idle;
mod irqs;
mod lobby;
mod running;
mod session;
mod socket;
mod stop;
#[cfg(test)]
mod tests;

use std::{
    io,
    num::NonZero,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    time::Timespec,
};

use self::{
    connection::{Connection, Lost},
    idle::{Idle, Step},
    lobby::Lobby,
};
pub use self::{
    running::Running,
    session::{Channel, MAX_DATA_XFER, MAX_MSG_FDS, MAX_PAYLOAD, NoChannel, Reply, Session, SessionHost},
    socket::Socket,
    stop::Stop,
};
use vfio_uring::dma::IovaRange;

use crate::device::Device;

/// A client that does not take what it is sent, or does not answer what it is asked, is waited for this long.
const CLIENT_DEADLINE: Duration = Duration::from_secs(5);
/// Looks at the device between two looks at the socket, and units of work at most.
const ROUNDS: u32 = 1024;
const UNITS: usize = 4096;
/// Looks at the socket between two looks at who else has come.
const ATTEND: u32 = 64;
/// Messages that are handled before the device is looked at again.
const MESSAGES: usize = 64;
/// A look that gave the core to others counts as this many.
const YIELD_ROUNDS: u32 = 64;
/// Nothing can happen without a message, so the sleep is as long as it is only to be sure.
const QUIET: Duration = Duration::from_secs(10);

/// What a server has done.
#[derive(Debug, Default)]
pub struct Stats {
    clients: AtomicU64,
    messages: AtomicU64,
    commands: AtomicU64,
    spins: AtomicU64,
    sleeps: AtomicU64,
}

impl Stats {
    /// Clients that were served.
    pub fn clients(&self) -> u64 {
        self.clients.load(Ordering::Relaxed)
    }

    /// Messages that were handled.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// Units of work that the device has done: commands, for an NVMe controller.
    pub fn commands(&self) -> u64 {
        self.commands.load(Ordering::Relaxed)
    }

    /// Looks at the device that found nothing.
    pub fn spins(&self) -> u64 {
        self.spins.load(Ordering::Relaxed)
    }

    /// Times that the server slept.
    pub fn sleeps(&self) -> u64 {
        self.sleeps.load(Ordering::Relaxed)
    }
}

/// A server for one device.
#[derive(Debug)]
pub struct Server<D> {
    device: D,
    stop: Stop,
    stats: Arc<Stats>,
    deadline: Duration,
    may_spin: bool,
    iova_ranges: Option<Vec<IovaRange>>,
}

impl<D: Device> Server<D> {
    /// A server that was not started.
    ///
    /// # Errors
    /// When no eventfd is to be had.
    pub fn new(device: D) -> io::Result<Self> {
        let may_spin = thread::available_parallelism().is_ok_and(|cores| cores.get() > 1);
        Ok(Self {
            device,
            stop: Stop::new()?,
            stats: Arc::default(),
            deadline: CLIENT_DEADLINE,
            may_spin,
            iova_ranges: None,
        })
    }

    /// How long a client is waited for that does not take what it is sent or answer what it is asked; 5 s otherwise.
    pub fn client_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Tells clients which I/O virtual addresses the device can use: from 1 to 64 ranges, each with a page at least. Other clients
    /// than ours don't know of it.
    pub fn iova_ranges(self, ranges: impl Into<Vec<IovaRange>>) -> Self {
        Self { iova_ranges: Some(ranges.into()), ..self }
    }

    /// Stops the server, from any thread.
    pub fn stop_handle(&self) -> Stop {
        self.stop.clone()
    }

    /// What the server does, from any thread.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Serves one client after the other, until it is stopped.
    ///
    /// # Errors
    /// When the listening socket fails; what a client does is not an error.
    pub fn run(&mut self, socket: &Socket) -> io::Result<()> {
        socket.listener().set_nonblocking(true)?;
        // Short sleeps are to be as short as they say. Without it they are 50 us longer.
        let _ = rustix::thread::set_current_timer_slack(NonZero::new(1000));
        let mut lobby = Lobby::new(socket.listener());
        while !self.stop.is_set() {
            let Some(client) = lobby.next() else {
                let sleep = lobby.limit(QUIET);
                wait(None, None, &lobby, &self.stop, sleep)?;
                continue;
            };
            self.stats.clients.fetch_add(1, Ordering::Relaxed);
            let lost = self.serve(client, &mut lobby);
            tracing::debug!("the client is gone: {lost}");
            self.device.disconnected();
        }
        Ok(())
    }

    /// Serves a client until it is gone; its maps, descriptors and interrupts go with it.
    fn serve(&mut self, client: OwnedFd, lobby: &mut Lobby<'_>) -> Lost {
        let mut connection = Connection::new(client, self.stop.clone(), self.deadline);
        let mut session = match &self.iova_ranges {
            Some(ranges) => Session::new().iova_ranges(ranges),
            None => Session::new(),
        };
        let mut idle = Idle::new(self.may_spin);
        let mut attend = 0;
        let since = Instant::now();
        loop {
            let mut pause = self.work(&mut session, &mut connection, &mut idle);
            if !session.is_negotiated() {
                // A client that says nothing keeps others out.
                if since.elapsed() >= self.deadline {
                    return Lost::Silent;
                }
                pause = pause.map(|pause| pause.min(self.deadline - since.elapsed().min(self.deadline)));
            }
            if let Some(lost) = connection.take_lost() {
                return lost;
            }
            if let Some(pause) = pause {
                self.stats.sleeps.fetch_add(1, Ordering::Relaxed);
                let rest = self.device.rest();
                let pause = rest.at_most.map_or(pause, |at_most| pause.min(at_most));
                if let Err(error) = wait(Some(&connection), rest.fd, lobby, &self.stop, lobby.limit(pause)) {
                    return Lost::Io(Errno::from_io_error(&error).unwrap_or(Errno::IO));
                }
            }
            if self.stop.is_set() {
                return Lost::Stopped;
            }
            match self.talk(&mut session, &mut connection) {
                Ok(0) => {}
                Ok(_) => idle.heard(),
                Err(lost) => return lost,
            }
            attend += 1;
            if pause.is_some() || attend == ATTEND {
                attend = 0;
                lobby.attend();
            }
        }
    }

    /// Polls the device until it is time to look at the socket; gives how long that may be slept for.
    fn work(&mut self, session: &mut Session, connection: &mut Connection, idle: &mut Idle) -> Option<Duration> {
        if !self.device.is_active() {
            return Some(QUIET);
        }
        let (mut rounds, mut units, mut spins) = (0, 0, 0);
        let mut pause = None;
        let mut host = session.host(connection);
        while rounds < ROUNDS && units < UNITS {
            let work = self.device.service(&mut host);
            rounds += 1;
            units += work;
            if work != 0 {
                idle.busy();
                continue;
            }
            spins += 1;
            match idle.next() {
                Step::Spin => std::hint::spin_loop(),
                Step::Yield => {
                    let start = Instant::now();
                    rustix::thread::sched_yield();
                    idle.yielded(start.elapsed());
                    rounds += YIELD_ROUNDS;
                }
                Step::Sleep(time) => {
                    pause = Some(time);
                    break;
                }
            }
        }
        self.stats.commands.fetch_add(units as u64, Ordering::Relaxed);
        self.stats.spins.fetch_add(spins, Ordering::Relaxed);
        pause
    }

    /// Handles the messages that are there; how many.
    fn talk(&mut self, session: &mut Session, connection: &mut Connection) -> Result<usize, Lost> {
        for handled in 0..MESSAGES {
            let Some(message) = connection.next()? else { return Ok(handled) };
            self.stats.messages.fetch_add(1, Ordering::Relaxed);
            if message.header.is_reply() {
                continue;
            }
            let reply = session.handle(&message.header, &message.payload, message.fds, &mut self.device, connection);
            connection.max_data = session.client_max_data();
            if let Some(reply) = reply {
                connection.reply(&reply)?;
            }
        }
        Ok(MESSAGES)
    }
}

/// Sleeps until the client, the device, the listener or a stop has something to say.
fn wait(
    client: Option<&Connection>,
    device: Option<BorrowedFd<'_>>,
    lobby: &Lobby<'_>,
    stop: &Stop,
    sleep: Duration,
) -> io::Result<()> {
    let time = Timespec { tv_sec: sleep.as_secs() as i64, tv_nsec: sleep.subsec_nanos().into() };
    let stop_fd = stop.wake();
    let mut fds = vec![PollFd::from_borrowed_fd(stop_fd, PollFlags::IN)];
    if let Some(client) = client {
        fds.push(PollFd::from_borrowed_fd(client.socket(), PollFlags::IN));
    }
    if let Some(device) = device {
        fds.push(PollFd::from_borrowed_fd(device, PollFlags::IN));
    }
    if let Some(listener) = lobby.listener() {
        fds.push(PollFd::new(listener, PollFlags::IN));
    }
    match poll(&mut fds, Some(&time)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
