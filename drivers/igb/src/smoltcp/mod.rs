//! The TCP/IP stack smoltcp on a queue pair.
//!
//! [`NicDevice`] is its device, for those who drive the stack themselves. [`Stack`] drives it on the reactor, which sleeps while
//! there is nothing to do, and has TCP connections that are awaited.

mod checksum;
mod stack;
mod stream;

use std::cell::Cell;

use ::smoltcp::{
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
};

pub use self::{stack::Stack, stream::TcpStream};
use crate::{Options, Packet, Result, RxQueue, TxQueue};

/// Packets that are dropped one after the other before others have their turn.
const MAX_DROPPED: usize = 64;

/// What a [`NicDevice`] dropped, by cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops {
    /// Received packets with a wrong checksum of IPv4, TCP or UDP.
    pub rx_checksum: u64,
    /// Received fragments of IPv4: nobody could check what is put together of them.
    pub rx_fragments: u64,
    /// Packets of the stack that are longer than a buffer, or that came after the queue's end.
    pub tx: u64,
}

/// A queue pair as smoltcp's device.
///
/// A token for sending is a reserved place in the ring with a buffer: using it does not fail. Nothing is received while none is to
/// be had.
///
/// The NIC checks and inserts the checksums of IPv4, TCP and UDP; those of ICMP are smoltcp's. A received packet whose checksum is
/// wrong is dropped and counted. What the NIC did not look at, as with [`Options::checksums`] off, is checked here.
#[derive(Debug)]
pub struct NicDevice {
    rx: RxQueue,
    tx: TxQueue,
    mtu: usize,
    burst: usize,
    /// There was nothing to send with.
    blocked: Cell<bool>,
    drops: Cell<Drops>,
}

impl NicDevice {
    /// The device on these queues of a NIC that was brought up with `options`. Frames have up to [`Options::max_frame`] bytes, or
    /// [`Options::buffer_len`] if that is less.
    pub fn new(rx: RxQueue, tx: TxQueue, options: &Options) -> Self {
        Self {
            rx,
            tx,
            // Without CRC; what is sent is in one buffer.
            mtu: options.max_frame.saturating_sub(4).min(options.buffer_len),
            burst: usize::from(options.rx_ring).saturating_sub(1),
            blocked: Cell::new(false),
            drops: Cell::default(),
        }
    }

    /// What was dropped so far. What the driver and the NIC dropped is in their own statistics.
    pub fn drops(&self) -> Drops {
        self.drops.get()
    }

    /// The queues.
    pub fn into_queues(self) -> (RxQueue, TxQueue) {
        (self.rx, self.tx)
    }

    /// Whether something was to be sent since the last question, and could not be.
    fn take_blocked(&self) -> bool {
        self.blocked.replace(false)
    }

    /// Whether all buffers are in use.
    fn is_out_of_buffers(&self) -> bool {
        self.tx.buffers().available() == 0
    }

    /// Waits until there is something to take.
    async fn received(&mut self) -> Result<()> {
        self.rx.ready().await
    }

    /// Waits until there is room to send.
    async fn room(&mut self) -> Result<()> {
        self.tx.ready().await
    }
}

/// The next packet that is for the stack.
fn next(rx: &mut RxQueue, drops: &Cell<Drops>) -> Option<Received> {
    for _ in 0..MAX_DROPPED {
        // What ended the queue is told to those who wait for it.
        let received = Received::new(rx.try_recv().ok()??.into_packet());
        match checksum::check(&received.packet.checksums(), received.bytes()) {
            Ok(()) => return Some(received),
            Err(checksum::Refused::Checksum) => count(drops, |drops| drops.rx_checksum += 1),
            Err(checksum::Refused::Fragment) => count(drops, |drops| drops.rx_fragments += 1),
        }
    }
    None
}

fn count(drops: &Cell<Drops>, change: impl FnOnce(&mut Drops)) {
    let mut all = drops.get();
    change(&mut all);
    drops.set(all);
}

impl Device for NicDevice {
    type RxToken<'a> = Received;
    type TxToken<'a> = Slot<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received, Slot<'_>)> {
        // First the place for its answer.
        let Self { rx, tx, blocked, drops, .. } = self;
        let slot = Slot::reserve(tx, blocked, drops)?;
        Some((next(rx, drops)?, slot))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Slot<'_>> {
        Slot::reserve(&self.tx, &self.blocked, &self.drops)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.max_burst_size = Some(self.burst);
        capabilities.checksum.ipv4 = Checksum::None;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.udp = Checksum::None;
        capabilities
    }
}

/// A received packet.
#[derive(Debug)]
pub struct Received {
    packet: Packet,
    /// The bytes of one in several buffers.
    whole: Option<Vec<u8>>,
}

impl Received {
    fn new(packet: Packet) -> Self {
        let whole = (!packet.is_contiguous()).then(|| packet.segments().collect::<Vec<_>>().concat());
        Self { packet, whole }
    }

    fn bytes(&self) -> &[u8] {
        self.whole.as_deref().unwrap_or_else(|| self.packet.data())
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.bytes())
    }
}

/// A place in the transmit ring, and a buffer.
#[derive(Debug)]
pub struct Slot<'a> {
    token: crate::TxToken<'a>,
    drops: &'a Cell<Drops>,
}

impl<'a> Slot<'a> {
    fn reserve(tx: &'a TxQueue, blocked: &Cell<bool>, drops: &'a Cell<Drops>) -> Option<Self> {
        let token = tx.reserve();
        blocked.set(token.is_none());
        Some(Self { token: token?, drops })
    }
}

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, f: F) -> R {
        let packet = self.token.packet_mut();
        if packet.set_len(len).is_err() {
            count(self.drops, |drops| drops.tx += 1);
            return f(&mut vec![0; len]);
        }
        let result = f(packet.data_mut());
        let offload = checksum::offload(packet.data_mut());
        packet.set_offload(offload);
        if self.token.commit().is_err() {
            count(self.drops, |drops| drops.tx += 1);
        }
        result
    }
}
