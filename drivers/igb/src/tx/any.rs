//! Sending packets of any form: in several buffers, with offloads, or none that can be sent.

use vfio_uring::dma::DmaRing;

use super::{MAX_LEN, MAX_SEGMENTS, MIN_LEN, REPORT, TxRing};
use crate::{
    Result,
    packet::{L4, Node, Packet, TxOffload},
    pool,
    spec::tx,
};

/// With TSO: what an IP packet can have, and headers in front of it.
const MAX_TSO: usize = 65535 + 127;

impl TxRing {
    /// How many descriptors a packet needs, or what is wrong with it.
    #[cold]
    pub(super) fn needs(&self, node: &Node) -> Result<usize, &'static str> {
        let (mut total, mut segments) = (0usize, 0);
        for node in std::iter::successors(Some(node), |node| node.next.as_deref()) {
            segments += 1;
            total = total.saturating_add(node.len as usize);
            if node.len == 0 || node.len > u16::MAX.into() {
                return Err("one of its buffers has no bytes, or more than 65535");
            }
            if node.space_id != self.space_id {
                return Err("a buffer is not in the NIC's address space: open both devices in the same one");
            }
            if segments > MAX_SEGMENTS {
                return Err("it has more than 16 buffers");
            }
        }
        let tso = node.offload.is_some_and(|offload| offload.tso.is_some());
        if total < MIN_LEN {
            return Err("it has less than 14 bytes");
        }
        if total > if tso { MAX_TSO } else { MAX_LEN } {
            return Err("it is too long: 9724 bytes can be sent, or 65662 in segments");
        }
        let Some(offload) = &node.offload else { return Ok(segments) };
        if offload.l2_len > 127 || offload.l3_len > 511 {
            return Err("its headers are too long: 127 bytes before the IP header, and 511 of it");
        }
        if offload.headers() > total {
            return Err("it is shorter than its headers");
        }
        if offload.tso.is_some_and(|tso| tso.mss == 0 || tso.l4_len < 20 || tso.l4_len > 60) {
            return Err("TSO needs a segment size, and a TCP header of 20 to 60 bytes");
        }
        Ok(segments + usize::from(self.context.get() != context(offload)))
    }

    /// Sends the next packet, of whatever form. How many descriptors that took, 0 if it is dropped, and bytes; `None`: it has no room.
    #[cold]
    pub(super) fn put_aside(
        &self,
        ring: &DmaRing<[u64; 2]>,
        packet: Option<&mut Packet>,
        room: usize,
    ) -> Option<(usize, usize)> {
        let packet = packet?;
        let Some(node) = packet.0.take() else { return Some((0, 0)) };
        match self.needs(&node) {
            Ok(needed) if needed > room => {
                packet.0 = Some(node);
                None
            }
            Ok(_) => Some(self.put(ring, node)),
            Err(why) => {
                tracing::debug!(why, "a packet can't be sent");
                self.counters.invalid();
                pool::give_chain(Some(node));
                Some((0, 0))
            }
        }
    }

    /// Writes any packet; there is room for it. How many descriptors, and bytes.
    #[cold]
    pub(super) fn put(&self, ring: &DmaRing<[u64; 2]>, first: Box<Node>) -> (usize, usize) {
        let (mut at, mut count) = (self.tail.get(), 0);
        let offload = first.offload;
        let mut command = tx::DATA | tx::DEXT | tx::IFCS;
        let total: usize =
            std::iter::successors(Some(&*first), |node| node.next.as_deref()).map(|node| node.len as usize).sum();
        let mut payload = total;
        if let Some(offload) = &offload {
            let context = context(offload);
            if self.context.get() != context {
                self.context.set(context);
                let _ = ring.set(at, &context.map(u64::to_le));
                (at, count) = ((at + 1) & self.mask, 1);
            }
            if offload.vlan.is_some() {
                command |= tx::VLE;
            }
            if offload.ipv4_checksum || (offload.tso.is_some() && offload.is_ipv4) {
                command |= tx::IXSM;
            }
            if offload.l4_checksum.is_some() || offload.tso.is_some() {
                command |= tx::TXSM;
            }
            if offload.tso.is_some() {
                command |= tx::TSE;
                payload = total.saturating_sub(offload.headers());
            }
        }
        let mut next = Some(first);
        while let Some(mut node) = next {
            next = node.next.take();
            let mut word = command | u64::from(node.len);
            // The first says how long all of it is.
            word |= (std::mem::take(&mut payload) as u64) << tx::PAYLEN_SHIFT;
            if next.is_none() {
                word |= tx::EOP;
                if at & (REPORT - 1) == REPORT - 1 {
                    word |= tx::RS;
                    self.report(at);
                }
            }
            let _ = ring.set_words(at, [(0, node.iova.to_le()), (1, word.to_le())]);
            self.last.set(word);
            if let Some(slot) = self.slots.borrow_mut().get_mut(at) {
                *slot = Some(node);
            }
            (at, count) = ((at + 1) & self.mask, count + 1);
        }
        self.tail.set(at);
        (count, total)
    }
}

/// A context descriptor (section 7.2.2.3).
fn context(offload: &TxOffload) -> [u64; 2] {
    let low = u64::from(offload.l3_len)
        | u64::from(offload.l2_len) << tx::MACLEN_SHIFT
        | u64::from(offload.vlan.unwrap_or(0)) << tx::VLAN_SHIFT;
    let mut high = tx::CONTEXT | tx::DEXT;
    if offload.is_ipv4 {
        high |= tx::IPV4;
    }
    match (offload.l4_checksum, offload.tso) {
        (_, Some(tso)) => {
            high |= tx::TCP | u64::from(tso.l4_len) << tx::L4LEN_SHIFT | u64::from(tso.mss) << tx::MSS_SHIFT;
        }
        (Some(L4::Tcp), None) => high |= tx::TCP,
        (Some(L4::Sctp), None) => high |= tx::SCTP,
        (Some(L4::Udp) | None, None) => {}
    }
    [low, high]
}
