//! What the NIC does of a frame's checksums, and the rest.

use ::smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

use crate::{Checksum, Checksums, L4, TxOffload};

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Extension headers of IPv6 that are looked through.
const MAX_EXTENSIONS: usize = 8;

/// Why a received packet is not for the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Checksum,
    Fragment,
}

/// A frame with IP in it.
struct Ip {
    is_ipv4: bool,
    /// Of IPv4's header.
    header_fits: bool,
    fragment: bool,
    protocol: IpProtocol,
    /// Where the transport's header and data are in the frame.
    start: usize,
    end: usize,
    source: IpAddress,
    destination: IpAddress,
}

impl Ip {
    /// `None`: something else, or cut off, which the stack drops.
    fn of(frame: &[u8]) -> Option<Self> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        match ethernet.ethertype() {
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
                Some(Self {
                    is_ipv4: true,
                    header_fits: ip.verify_checksum(),
                    fragment: ip.more_frags() || ip.frag_offset() != 0,
                    protocol: ip.next_header(),
                    start: ETHERNET + usize::from(ip.header_len()),
                    end: ETHERNET + usize::from(ip.total_len()),
                    source: ip.src_addr().into(),
                    destination: ip.dst_addr().into(),
                })
            }
            EthernetProtocol::Ipv6 => {
                let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
                let (mut protocol, mut start) = (ip.next_header(), ETHERNET + ip.header_len());
                for _ in 0..MAX_EXTENSIONS {
                    if !matches!(protocol, IpProtocol::HopByHop | IpProtocol::Ipv6Route | IpProtocol::Ipv6Opts) {
                        break;
                    }
                    let header = frame.get(start..start + 2)?;
                    protocol = IpProtocol::from(header[0]);
                    start += 8 * (usize::from(header[1]) + 1);
                }
                Some(Self {
                    is_ipv4: false,
                    header_fits: true,
                    fragment: protocol == IpProtocol::Ipv6Frag,
                    protocol,
                    start,
                    end: ETHERNET + ip.total_len(),
                    source: ip.src_addr().into(),
                    destination: ip.dst_addr().into(),
                })
            }
            _ => None,
        }
    }

    /// Whether the checksum of TCP or UDP is right; others are the stack's.
    fn transport_fits(&self, frame: &[u8]) -> bool {
        let Some(data) = frame.get(self.start..self.end) else { return true };
        match self.protocol {
            IpProtocol::Tcp => {
                TcpPacket::new_checked(data).map_or(true, |packet| packet.verify_checksum(&self.source, &self.destination))
            }
            IpProtocol::Udp => {
                UdpPacket::new_checked(data).map_or(true, |packet| packet.verify_checksum(&self.source, &self.destination))
            }
            _ => true,
        }
    }
}

/// Checks a received frame: by what the NIC says, or by itself where that says nothing.
pub(super) fn check(found: &Checksums, frame: &[u8]) -> Result<(), Refused> {
    match found {
        Checksums { ipv4: Checksum::Bad, .. } | Checksums { l4: Checksum::Bad, .. } => return Err(Refused::Checksum),
        Checksums { ipv4: Checksum::Good, l4: Checksum::Good } => return Ok(()),
        _ => {}
    }
    let Some(ip) = Ip::of(frame) else { return Ok(()) };
    if !ip.header_fits {
        return Err(Refused::Checksum);
    }
    if ip.fragment {
        return Err(Refused::Fragment);
    }
    if found.l4 == Checksum::Unchecked && !ip.transport_fits(frame) {
        return Err(Refused::Checksum);
    }
    Ok(())
}

/// What the NIC is to insert into a frame of the stack, whose checksums are 0; it gets the sum of the pseudo header.
pub(super) fn offload(frame: &mut [u8]) -> Option<TxOffload> {
    let ip = Ip::of(frame)?;
    let data = frame.get_mut(ip.start..ip.end)?;
    let sum = pseudo_sum(&ip.source, &ip.destination, ip.protocol, data.len());
    // A fragment of UDP goes without: 0 is none.
    let l4_checksum = match ip.protocol {
        _ if ip.fragment => None,
        IpProtocol::Tcp => TcpPacket::new_checked(data).ok().map(|mut packet| {
            packet.set_checksum(sum);
            L4::Tcp
        }),
        IpProtocol::Udp => UdpPacket::new_checked(data).ok().map(|mut packet| {
            packet.set_checksum(sum);
            L4::Udp
        }),
        _ => None,
    };
    (ip.is_ipv4 || l4_checksum.is_some()).then(|| TxOffload {
        l2_len: ETHERNET as u8,
        l3_len: (ip.start - ETHERNET) as u16,
        is_ipv4: ip.is_ipv4,
        ipv4_checksum: ip.is_ipv4,
        l4_checksum,
        ..TxOffload::default()
    })
}

/// Of the pseudo header (RFC 793, RFC 8200), not complemented.
fn pseudo_sum(source: &IpAddress, destination: &IpAddress, protocol: IpProtocol, len: usize) -> u16 {
    let words = |address: &IpAddress| -> u64 {
        let sum = |bytes: &[u8]| bytes.chunks_exact(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair[1])).sum();
        match address {
            IpAddress::Ipv4(address) => sum(&address.octets()),
            IpAddress::Ipv6(address) => sum(&address.octets()),
        }
    };
    let mut sum = words(source) + words(destination) + u64::from(u8::from(protocol)) + len as u64;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNCHECKED: Checksums = Checksums { ipv4: Checksum::Unchecked, l4: Checksum::Unchecked };

    /// UDP from 10.0.0.1:1000 to 10.0.0.2:7 with 2 bytes, checksums right.
    fn udp() -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        frame.extend([0x45, 0, 0, 30, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([3, 232, 0, 7, 0, 10, 0, 0, 1, 2]);
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        let (from, to) = (IpAddress::v4(10, 0, 0, 1), IpAddress::v4(10, 0, 0, 2));
        UdpPacket::new_unchecked(&mut frame[34..]).fill_checksum(&from, &to);
        frame
    }

    #[test]
    fn what_the_nic_did_not_look_at() {
        assert_eq!(check(&UNCHECKED, &udp()), Ok(()));
        for at in 14..udp().len() {
            let mut frame = udp();
            frame[at] ^= 0x10;
            let checked = check(&UNCHECKED, &frame);
            // What is no IPv4 any more, or is longer than what is there, as UDP says, is for the stack to drop.
            assert!(checked.is_err() || Ip::of(&frame).is_none() || matches!(at, 38 | 39), "byte {at}");
        }
        let mut fragment = udp();
        fragment[20] = 0x20;
        Ipv4Packet::new_unchecked(&mut fragment[14..]).fill_checksum();
        assert_eq!(check(&UNCHECKED, &fragment), Err(Refused::Fragment));
        for len in 0..udp().len() {
            assert_eq!(check(&UNCHECKED, &udp()[..len]), Ok(()), "cut off at {len}");
        }
    }

    #[test]
    fn what_the_nic_found() {
        let good = Checksums { ipv4: Checksum::Good, l4: Checksum::Good };
        assert_eq!(check(&good, &[]), Ok(()));
        for bad in [Checksums { ipv4: Checksum::Bad, ..good }, Checksums { l4: Checksum::Bad, ..good }] {
            assert_eq!(check(&bad, &udp()), Err(Refused::Checksum));
        }
    }

    #[test]
    fn what_the_nic_is_to_do() {
        let mut frame = udp();
        assert_eq!(offload(&mut frame), Some(TxOffload::ipv4(L4::Udp)));
        // 0a00 + 0001 + 0a00 + 0002, 17, and 10 bytes.
        assert_eq!(frame[40..42], [0x14, 0x1e]);
        frame[23] = 1;
        assert_eq!(offload(&mut frame), Some(TxOffload { l4_checksum: None, ..TxOffload::ipv4(L4::Udp) }));
        frame[13] = 6;
        assert_eq!(offload(&mut frame), None);
    }
}
