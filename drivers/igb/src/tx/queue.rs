//! The transmit queue as its user sees it.

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use futures::Sink;

use super::{MAX_DESCRIPTORS, TxRing};
use crate::{
    Buffers, Error, Result, SendError,
    packet::Packet,
    queue::{Owner, Pair},
};

/// A transmit queue: a sink of packets, or [`TxQueue::tx_batch`] for the peak. What was sent in a turn of the reactor the NIC is
/// told of at the turn's end; buffers go home when it has sent them.
pub struct TxQueue {
    pub(crate) pair: Rc<Pair>,
    pub(crate) _owner: Rc<Owner>,
}

impl TxQueue {
    /// Sends packets from the front of `packets`, which are taken out, as far as the ring has room; how many. What can't be sent in its
    /// form is taken out and dropped, and counted as [`tx_invalid`](crate::QueueStatistics::tx_invalid).
    ///
    /// # Errors
    /// What ended the queue; all packets are still there then.
    #[inline]
    pub fn tx_batch(&mut self, packets: &mut Vec<Packet>) -> Result<usize> {
        let gone = self.pair.tx.send_batch(packets);
        if gone == 0 {
            self.pair.alive()?;
        }
        Ok(gone)
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// [`SendError`] with the packet.
    pub fn send(&mut self, packet: Packet) -> Result<(), SendError> {
        match self.pair.alive() {
            Ok(()) => self.pair.tx.send(packet),
            Err(error) => Err(SendError::Ended { packet, error }),
        }
    }

    /// Waits until any packet has room.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn ready(&mut self) -> Result<()> {
        poll_fn(|cx| self.pair.poll_room(MAX_DESCRIPTORS, cx)).await
    }

    /// Waits until the NIC has sent everything. While there is no link, that takes for ever.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn drained(&mut self) -> Result<()> {
        poll_fn(|cx| self.pair.poll_room(self.pair.tx.mask, cx)).await
    }

    /// Reserves room for any packet, and a buffer for one; `None`: there is none now.
    pub fn reserve(&self) -> Option<TxToken<'_>> {
        let ring = &self.pair.tx;
        if self.pair.alive().is_err() {
            return None;
        }
        if ring.available() < MAX_DESCRIPTORS {
            ring.reclaim_home();
        }
        if ring.available() < MAX_DESCRIPTORS {
            return None;
        }
        let packet = self.buffers().alloc()?;
        Some(TxToken { room: Room::new(ring), packet })
    }

    /// Takes back buffers that the NIC is done with, instead of having them go home; up to now. Of a packet in several buffers, each is
    /// a packet.
    pub fn reclaim_into(&mut self, packets: &mut Vec<Packet>) -> usize {
        let before = packets.len();
        self.pair.tx.reclaim(&mut |node| packets.push(Packet(Some(node))));
        packets.len() - before
    }

    /// The queue pair's free buffers.
    pub fn buffers(&self) -> Buffers {
        Buffers(self.pair.local.clone())
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.pair.index
    }
}

impl Pair {
    fn poll_room(&self, wanted: usize, cx: &Context<'_>) -> Poll<Result<()>> {
        match self.alive() {
            Err(error) => Poll::Ready(Err(error)),
            Ok(()) if self.tx.poll_room(wanted, cx) => Poll::Ready(Ok(())),
            Ok(()) => Poll::Pending,
        }
    }
}

impl Sink<Packet> for TxQueue {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.poll_room(MAX_DESCRIPTORS, cx)
    }

    /// A packet that can't be sent in its form is an error, and lost.
    fn start_send(mut self: Pin<&mut Self>, packet: Packet) -> Result<()> {
        self.send(packet).map_err(|error| match error {
            SendError::Ended { error, .. } => error,
            SendError::Full(_) => {
                Error::invalid("the transmit ring is full: a sink has to be ready before a packet is sent")
            }
            SendError::Invalid { why, .. } => Error::invalid(format!("a packet can't be sent: {why}")),
        })
    }

    /// The NIC is told; it need not have sent anything yet.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.tx.ring_doorbell();
        Poll::Ready(self.pair.alive())
    }

    /// Everything is sent.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.pair.poll_room(self.pair.tx.mask, cx)
    }
}

impl std::fmt::Debug for TxQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TxQueue").field("index", &self.pair.index).field("free", &self.pair.tx.free.get()).finish()
    }
}

/// Reserved room in a transmit ring, and a buffer.
pub struct TxToken<'a> {
    room: Room<'a>,
    packet: Packet,
}

/// Room for any packet.
struct Room<'a>(&'a TxRing);

impl<'a> Room<'a> {
    fn new(ring: &'a TxRing) -> Self {
        ring.reserved.set(ring.reserved.get() + MAX_DESCRIPTORS);
        Self(ring)
    }

    fn send(self, packet: Packet) -> Result<(), SendError> {
        let ring = self.0;
        drop(self);
        ring.send(packet)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.0.reserved.set(self.0.reserved.get().saturating_sub(MAX_DESCRIPTORS));
    }
}

impl TxToken<'_> {
    /// Has `f` fill a packet of `len` bytes, and sends it.
    ///
    /// # Errors
    /// [`SendError::Invalid`] for a length that can't be sent; `f` is not called for one beyond the buffer.
    pub fn consume<R>(self, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, SendError> {
        let Self { room, mut packet } = self;
        if packet.set_len(len).is_err() {
            return Err(SendError::Invalid { packet, why: "it is longer than a buffer" });
        }
        let result = f(packet.data_mut());
        room.send(packet)?;
        Ok(result)
    }

    /// [`TxToken::consume`] of a packet of the caller's; the token's buffer is free again.
    ///
    /// # Errors
    /// [`SendError::Invalid`].
    pub fn send(self, packet: Packet) -> Result<(), SendError> {
        self.room.send(packet)
    }

    /// Sends the token's own buffer, as it was left by the user of [`TxToken::packet_mut`].
    ///
    /// # Errors
    /// [`SendError::Invalid`].
    pub fn commit(self) -> Result<(), SendError> {
        self.room.send(self.packet)
    }

    /// The buffer, with a length of 0.
    pub fn packet_mut(&mut self) -> &mut Packet {
        &mut self.packet
    }
}

impl std::fmt::Debug for TxToken<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TxToken").finish_non_exhaustive()
    }
}
