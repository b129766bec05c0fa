//! The stack, driven on the reactor.

use std::{
    cell::{Cell, RefCell},
    collections::hash_map::RandomState,
    future::{Future, pending, poll_fn},
    hash::{BuildHasher, Hasher},
    io,
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use ::smoltcp::{
    iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet},
    socket::{Socket, tcp},
    time::Instant as StackInstant,
    wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint},
};
use vfio_uring::reactor::{sleep, timeout, yield_now};

use super::{Drops, NicDevice, TcpStream};
use crate::{Error, Result};

/// Packets, and rounds of sending, after which others have their turn.
const BURST: usize = 64;
/// Bytes of each of a connection's two buffers.
const BUFFER: usize = 256 << 10;
/// How long a connection's other end may be silent while something is expected of it.
const SILENCE: ::smoltcp::time::Duration = ::smoltcp::time::Duration::from_secs(60);
/// Between looks for a buffer, when there are none but the ring has room: no event tells of them.
const NO_BUFFERS: Duration = Duration::from_millis(1);
/// Between looks at the time while the ring is full.
const NO_ROOM: Duration = Duration::from_millis(100);
/// Ports of connections that this end opens (RFC 6335).
const PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;

/// The TCP/IP stack on a queue pair. Clones are the same one.
///
/// [`Stack::run`] has to be running for anything to happen: spawned as a task, or beside what uses the stack.
#[derive(Clone)]
pub struct Stack(Rc<Shared>);

struct Shared {
    inner: RefCell<Inner>,
    start: Instant,
    /// A socket was used: what it wants is to be looked at.
    used: Cell<bool>,
    runner: Cell<Option<Waker>>,
    port: Cell<u16>,
}

struct Inner {
    device: NicDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
    /// Connections that nobody has any more, until they are closed.
    orphans: Vec<SocketHandle>,
    /// What ended it.
    ended: Option<Error>,
}

/// What comes after a turn.
enum Next {
    /// There is more to do.
    Again,
    /// There is no room to send: nothing is received either.
    Room,
    /// For a packet, or this long.
    Wait(Option<Duration>),
}

impl Stack {
    /// The stack on `device`, with the NIC's MAC address and IP addresses. It answers ARP, neighbour solicitations and pings. For
    /// IPv6 the NIC has to receive the [`Stack::groups`].
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] for more addresses than smoltcp is built for.
    pub fn new(mut device: NicDevice, mac: [u8; 6], addresses: &[IpCidr]) -> Result<Self> {
        let mut config = Config::new(EthernetAddress(mac).into());
        // Of the system's randomness, by way of hash maps' keys.
        let random = RandomState::new().build_hasher().finish();
        config.random_seed = random;
        let mut interface = Interface::new(config, &mut device, StackInstant::ZERO);
        let mut room = true;
        interface.update_ip_addrs(|all| room = addresses.iter().all(|&address| all.push(address).is_ok()));
        if !room {
            return Err(Error::invalid(format!(
                "{} IP addresses: smoltcp takes fewer, see its feature iface-max-addr-count",
                addresses.len()
            )));
        }
        let ports = PORTS.len() as u64;
        Ok(Self(Rc::new(Shared {
            inner: RefCell::new(Inner {
                device,
                interface,
                sockets: SocketSet::new(Vec::new()),
                orphans: Vec::new(),
                ended: None,
            }),
            start: Instant::now(),
            used: Cell::new(false),
            runner: Cell::new(None),
            port: Cell::new(PORTS.start() + (random % ports) as u16),
        })))
    }

    /// Does the stack's work, until the queue ends: then all connections are aborted.
    pub async fn run(&self) -> Error {
        loop {
            let next = self.0.turn();
            let waited = match next {
                Next::Again => {
                    yield_now().await;
                    Ok(())
                }
                Next::Room => self.0.room().await,
                Next::Wait(time) => self.0.wait(time).await,
            };
            if let Err(error) = waited {
                self.0.end(&error);
                return error;
            }
        }
    }

    /// The multicast addresses that neighbours ask for our IPv6 addresses at (RFC 4291, RFC 2464), for
    /// [`Nic::set_multicast`](crate::Nic::set_multicast).
    pub fn groups(&self) -> Vec<[u8; 6]> {
        let inner = self.0.inner.borrow();
        let solicited = inner.interface.ip_addrs().iter().filter_map(|cidr| match cidr.address() {
            IpAddress::Ipv6(address) => {
                let [.., a, b, c] = address.octets();
                Some([0x33, 0x33, 0xff, a, b, c])
            }
            IpAddress::Ipv4(_) => None,
        });
        let mut groups: Vec<_> = solicited.collect();
        if !groups.is_empty() {
            // All nodes.
            groups.push([0x33, 0x33, 0, 0, 0, 1]);
        }
        groups
    }

    /// Lends smoltcp's interface and sockets to `f`, for what is not here: routes, UDP, ICMP. `f` must not use the stack itself.
    pub fn with<R>(&self, f: impl FnOnce(&mut Interface, &mut SocketSet<'static>) -> R) -> R {
        let mut inner = self.0.inner.borrow_mut();
        let Inner { interface, sockets, .. } = &mut *inner;
        let result = f(interface, sockets);
        drop(inner);
        self.0.wake();
        result
    }

    /// What the device dropped.
    pub fn drops(&self) -> Drops {
        self.0.inner.borrow().device.drops()
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// Refused, no way there, no answer within 60 s, or the stack has ended.
    pub async fn connect(&self, remote: impl Into<IpEndpoint>) -> io::Result<TcpStream> {
        let stream = self.socket()?;
        let local = self.0.next_port();
        let remote = remote.into();
        let opened = {
            let mut inner = self.0.inner.borrow_mut();
            let Inner { interface, sockets, .. } = &mut *inner;
            sockets.get_mut::<tcp::Socket>(stream.handle()).connect(interface.context(), remote, local)
        };
        opened.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("connecting to {remote}: {error}")))?;
        self.0.wake();
        stream.established(io::ErrorKind::ConnectionRefused).await?;
        Ok(stream)
    }

    /// Waits for a connection to a port. Those that come while nobody waits are refused.
    ///
    /// # Errors
    /// Port 0, or the stack has ended.
    pub async fn accept(&self, port: u16) -> io::Result<TcpStream> {
        let stream = self.socket()?;
        stream
            .with(|socket| socket.listen(port))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("listening at port {port}: {error}")))?;
        stream.established(io::ErrorKind::ConnectionAborted).await?;
        Ok(stream)
    }

    fn socket(&self) -> io::Result<TcpStream> {
        let mut inner = self.0.inner.borrow_mut();
        if let Some(error) = &inner.ended {
            return Err(io::Error::other(error.clone()));
        }
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_timeout(Some(SILENCE));
        socket.set_nagle_enabled(false);
        let handle = inner.sockets.add(socket);
        drop(inner);
        Ok(TcpStream::new(self.clone(), handle))
    }

    /// Lends a connection's socket to `f`.
    pub(super) fn with_socket<R>(&self, handle: SocketHandle, f: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        let result = f(self.0.inner.borrow_mut().sockets.get_mut::<tcp::Socket>(handle));
        self.0.wake();
        result
    }

    /// A connection that nobody has any more: it is closed in order, and then forgotten.
    pub(super) fn abandon(&self, handle: SocketHandle) {
        let mut inner = self.0.inner.borrow_mut();
        inner.sockets.get_mut::<tcp::Socket>(handle).close();
        inner.orphans.push(handle);
        drop(inner);
        self.0.wake();
    }
}

impl Shared {
    /// Has the stack look at its sockets.
    fn wake(&self) {
        self.used.set(true);
        if let Some(runner) = self.runner.take() {
            runner.wake();
        }
    }

    fn next_port(&self) -> u16 {
        let port = self.port.get();
        self.port.set(if port == *PORTS.end() { *PORTS.start() } else { port + 1 });
        port
    }

    /// Takes what has come and sends what is to be sent, a good deal at most.
    fn turn(&self) -> Next {
        self.used.set(false);
        let now = StackInstant::from_micros(self.start.elapsed().as_micros() as i64);
        let mut inner = self.inner.borrow_mut();
        let Inner { device, interface, sockets, orphans, .. } = &mut *inner;
        let mut more = [true; 2];
        interface.poll_maintenance(now);
        for _ in 0..BURST {
            if matches!(interface.poll_ingress_single(now, device, sockets), PollIngressSingleResult::None) {
                more[0] = false;
                break;
            }
        }
        for _ in 0..BURST {
            if matches!(interface.poll_egress(now, device, sockets), PollResult::None) {
                more[1] = false;
                break;
            }
        }
        orphans.retain(|&handle| {
            let closed = sockets.get::<tcp::Socket>(handle).state() == tcp::State::Closed;
            if closed {
                sockets.remove(handle);
            }
            !closed
        });
        if device.take_blocked() {
            return Next::Room;
        }
        if more.contains(&true) {
            return Next::Again;
        }
        match interface.poll_delay(now, sockets) {
            Some(::smoltcp::time::Duration::ZERO) => Next::Again,
            delay => Next::Wait(delay.map(Into::into)),
        }
    }

    /// Waits for a packet, for the use of a socket, or for the time.
    async fn wait(&self, time: Option<Duration>) -> Result<()> {
        let mut timer = pin!(async {
            match time {
                Some(time) => sleep(time).await,
                None => pending().await,
            }
        });
        poll_fn(|cx| {
            if self.used.get() {
                return Poll::Ready(Ok(()));
            }
            if let Poll::Ready(result) = self.poll_received(cx) {
                return Poll::Ready(result);
            }
            self.runner.set(Some(cx.waker().clone()));
            timer.as_mut().poll(cx).map(Ok)
        })
        .await
    }

    fn poll_received(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        // It keeps nothing between two polls.
        pin!(self.inner.borrow_mut().device.received()).poll(cx)
    }

    /// Waits for room in the ring and a buffer; not for ever, since there is none to come while there is no link.
    async fn room(&self) -> Result<()> {
        let room = poll_fn(|cx| pin!(self.inner.borrow_mut().device.room()).poll(cx));
        timeout(NO_ROOM, room).await.unwrap_or(Ok(()))?;
        if self.inner.borrow().device.is_out_of_buffers() {
            sleep(NO_BUFFERS).await;
        }
        Ok(())
    }

    fn end(&self, error: &Error) {
        let mut inner = self.inner.borrow_mut();
        inner.ended = Some(error.clone());
        for (_, socket) in inner.sockets.iter_mut() {
            if let Socket::Tcp(socket) = socket {
                socket.abort();
            }
        }
    }
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").finish_non_exhaustive()
    }
}
