//! Packets: chains of DMA buffers that are moved, never copied.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use vfio_uring::dma::DmaBuf;

use crate::{
    Result,
    pool::{self, Home},
    spec::rx,
};

/// A buffer for its whole life: the box stays the same, also while the NIC has it.
pub(crate) struct Node {
    pub(crate) dma: DmaBuf,
    /// Of `dma`, for speed.
    pub(crate) iova: u64,
    /// Of `dma`, for speed.
    pub(crate) space_id: u64,
    /// Bytes in use.
    pub(crate) len: u32,
    /// What the device wrote of the packet: the descriptor's two halves. Of the first node of a packet.
    pub(crate) info: [u64; 2],
    pub(crate) offload: Option<TxOffload>,
    pub(crate) next: Option<Box<Node>>,
    /// Where it goes back to.
    pub(crate) home: Option<Arc<Home>>,
    /// Address of `home`, for speed; 0: none.
    pub(crate) home_at: usize,
}

impl Node {
    pub(crate) fn new(dma: DmaBuf, home: Option<Arc<Home>>) -> Self {
        let (iova, space_id, len) = (dma.iova(), dma.space_id(), dma.len() as u32);
        let home_at = home.as_ref().map_or(0, Home::address);
        Self { dma, iova, space_id, len, info: [0; 2], offload: None, next: None, home, home_at }
    }

    #[inline]
    fn data(&self) -> &[u8] {
        // Whoever sets the length looks at the buffer's.
        self.dma.get(..self.len as usize).unwrap_or(&[])
    }

    #[inline]
    fn data_mut(&mut self) -> &mut [u8] {
        self.dma.get_mut(..self.len as usize).unwrap_or(&mut [])
    }

    /// Sent as it is, in one descriptor.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.next.is_none() && self.offload.is_none()
    }
}

/// A packet: one DMA buffer, or a chain of them, owned. It is as large as a pointer, so that it is cheap to move.
///
/// Received packets have what the NIC found out about them: [`Packet::rss`], [`Packet::vlan`], [`Packet::checksums`]. Any packet can
/// be sent, with [`Packet::set_offload`] to have the NIC do more. Dropped, its buffers go back to the queue that they came from,
/// from any thread. It may be kept longer than its queue and NIC.
pub struct Packet(pub(crate) Option<Box<Node>>);

const _: () = assert!(size_of::<Packet>() == 8);

impl Drop for Packet {
    #[inline]
    fn drop(&mut self) {
        if self.0.is_some() {
            pool::give_chain(self.0.take());
        }
    }
}

impl From<DmaBuf> for Packet {
    /// A buffer of the caller's, to be sent; all of its length. It has to be of a pool that is mapped for the NIC, else sending
    /// refuses it. Dropped or sent, it returns to its pool.
    fn from(buf: DmaBuf) -> Self {
        Self(Some(Box::new(Node::new(buf, None))))
    }
}

impl From<Packet> for Bytes {
    /// The first buffer's data, without a copy, if there is no other; else a copy of all of it. The buffer goes back when the last
    /// clone or slice is dropped. One small allocation is made for the count of these; to do without, keep the packet.
    fn from(packet: Packet) -> Self {
        match packet.is_contiguous() {
            true => Self::from_owner(packet),
            false => packet.segments().flatten().copied().collect::<Vec<u8>>().into(),
        }
    }
}

impl AsRef<[u8]> for Packet {
    fn as_ref(&self) -> &[u8] {
        self.data()
    }
}

impl Packet {
    #[inline]
    fn node(&self) -> Option<&Node> {
        self.0.as_deref()
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        std::iter::successors(self.node(), |node| node.next.as_deref())
    }

    /// Bytes, of all buffers.
    pub fn len(&self) -> usize {
        self.nodes().map(|node| node.len as usize).sum()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is in one buffer.
    #[inline]
    pub fn is_contiguous(&self) -> bool {
        self.node().is_none_or(|node| node.next.is_none())
    }

    /// The first buffer's bytes: all of the packet, when it [is contiguous](Packet::is_contiguous).
    #[inline]
    pub fn data(&self) -> &[u8] {
        self.node().map_or(&[], Node::data)
    }

    /// [`Packet::data`], to write.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().map_or(&mut [], Node::data_mut)
    }

    /// The bytes, buffer by buffer.
    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        self.nodes().map(Node::data)
    }

    /// Each buffer's bytes by itself, without a copy.
    pub fn into_segments(mut self) -> impl Iterator<Item = Bytes> {
        let mut next = self.0.take();
        std::iter::from_fn(move || {
            let mut node = next.take()?;
            next = node.next.take();
            Some(Bytes::from_owner(Self(Some(node))))
        })
    }

    /// Bytes that the first buffer can have.
    pub fn capacity(&self) -> usize {
        self.node().map_or(0, |node| node.dma.len())
    }

    /// Sets the bytes of the first buffer that are in use. What it gains is whatever the memory was used for before.
    ///
    /// # Errors
    /// [`vfio_uring::Error::Invalid`] above [`Packet::capacity`].
    pub fn set_len(&mut self, len: usize) -> Result<()> {
        let capacity = self.capacity();
        match self.0.as_deref_mut() {
            Some(node) if len <= capacity => node.len = len as u32,
            _ => return Err(crate::Error::invalid(format!("{len} bytes for a packet buffer of {capacity}"))),
        }
        Ok(())
    }

    /// Copies `data` into the first buffer and sets the length to it.
    ///
    /// # Errors
    /// As of [`Packet::set_len`].
    pub fn copy_from(&mut self, data: &[u8]) -> Result<()> {
        self.set_len(data.len())?;
        self.data_mut().copy_from_slice(data);
        Ok(())
    }

    /// Appends the buffers of another packet.
    pub fn append(&mut self, mut other: Self) {
        let mut last = &mut self.0;
        while let Some(node) = last {
            last = &mut node.next;
        }
        *last = other.0.take();
    }

    /// What the NIC is to do when it is sent; `None`: send it as it is.
    #[inline]
    pub fn set_offload(&mut self, offload: Option<TxOffload>) {
        if let Some(node) = self.0.as_deref_mut() {
            node.offload = offload;
        }
    }

    /// What was set by [`Packet::set_offload`].
    pub fn offload(&self) -> Option<TxOffload> {
        self.node().and_then(|node| node.offload)
    }

    fn info(&self) -> [u64; 2] {
        self.node().map_or([0; 2], |node| node.info)
    }

    /// The RSS hash and what was hashed, if the NIC hashed it.
    pub fn rss(&self) -> Option<RssHash> {
        let low = self.info()[0];
        let kind = (low & 0xf) as u8;
        (kind != 0).then_some(RssHash { value: (low >> 32) as u32, kind })
    }

    /// The VLAN tag that was taken out of it.
    pub fn vlan(&self) -> Option<u16> {
        let status = self.info()[1];
        (status & rx::VP != 0).then_some((status >> rx::VLAN_SHIFT) as u16)
    }

    /// What the NIC says of its checksums.
    pub fn checksums(&self) -> Checksums {
        let status = self.info()[1];
        let of = |looked: u64, wrong: u64| match (status & looked != 0, status & wrong != 0) {
            (false, _) => Checksum::Unchecked,
            (true, false) => Checksum::Good,
            (true, true) => Checksum::Bad,
        };
        Checksums { ipv4: of(rx::IPCS, rx::IPE), l4: of(rx::L4I, rx::L4E) }
    }

    /// The packet type bits of the descriptor (section 7.1.5.2): IPv4, with options, IPv6, with extensions, TCP, UDP, SCTP, NFS.
    pub fn packet_type(&self) -> u8 {
        (self.info()[0] >> 4) as u8
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet").field("len", &self.len()).field("buffers", &self.nodes().count()).finish()
    }
}

/// What RSS said of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RssHash {
    /// The Toeplitz hash.
    pub value: u32,
    /// What was hashed (table 7-17): 1 TCP over IPv4, 2 IPv4, 3 TCP over IPv6, 5 IPv6, 7 UDP over IPv4, 8 UDP over IPv6.
    pub kind: u8,
}

/// Whether a checksum is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// The NIC did not look: there is none, or it is turned off.
    Unchecked,
    /// It is.
    Good,
    /// It is not.
    Bad,
}

/// What the NIC says of a received packet's checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksums {
    /// Of the IPv4 header.
    pub ipv4: Checksum,
    /// Of TCP or UDP.
    pub l4: Checksum,
}

/// The protocol whose checksum the NIC is to insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Segmentation of a TCP packet (TSO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tso {
    /// Bytes of TCP payload of each segment.
    pub mss: u16,
    /// Bytes of the TCP header, with its options.
    pub l4_len: u8,
}

/// What the NIC is to do with a packet that is sent.
///
/// For a checksum of TCP or UDP the packet has to have the sum of the pseudo header in its place, not complemented; with TSO that
/// sum is without the length, and IPv4's header checksum and length are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxOffload {
    /// Bytes before the IP header, at most 127: 14 without a VLAN tag in the data.
    pub l2_len: u8,
    /// Bytes of the IP header with its extensions, at most 511.
    pub l3_len: u16,
    /// Whether it is IPv4 and not IPv6.
    pub is_ipv4: bool,
    /// Insert the header checksum of IPv4.
    pub ipv4_checksum: bool,
    /// Insert the checksum of this protocol.
    pub l4_checksum: Option<L4>,
    /// Cut it into segments, each with headers of its own; all checksums are inserted.
    pub tso: Option<Tso>,
    /// Insert a VLAN tag.
    pub vlan: Option<u16>,
}

impl TxOffload {
    /// Only a VLAN tag.
    pub fn vlan(tag: u16) -> Self {
        Self { vlan: Some(tag), l2_len: 14, ..Self::default() }
    }

    /// Checksums of IPv4 and of what is on top of it, behind 14 bytes of Ethernet and 20 of IPv4 without options.
    pub fn ipv4(l4: L4) -> Self {
        Self { l2_len: 14, l3_len: 20, is_ipv4: true, ipv4_checksum: true, l4_checksum: Some(l4), ..Self::default() }
    }

    /// Bytes of all headers, for TSO.
    pub(crate) fn headers(&self) -> usize {
        usize::from(self.l2_len) + usize::from(self.l3_len) + self.tso.map_or(0, |tso| tso.l4_len.into())
    }
}
