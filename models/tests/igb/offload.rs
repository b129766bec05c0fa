//! Checksums and segmentation: what is sent is compared byte by byte with what it has to be.

use vfio_uring_models::igb::{Cause, spec::*};

use crate::support::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const TUCMD_TCP: u32 = 1 << tx::TUCMD_L4T_SHIFT;
const TUCMD_SCTP: u32 = 2 << tx::TUCMD_L4T_SHIFT;

/// The plain way to do it.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            total += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
            total = (total & 0xffff) + (total >> 16);
        }
    }
    total as u16
}

#[derive(Debug, Clone)]
struct Packet {
    v6: bool,
    protocol: u8,
    id: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl Packet {
    fn l4_header(&self) -> usize {
        if self.protocol == TCP { 20 } else { 8 }
    }

    fn headers(&self) -> [u32; 3] {
        [14, if self.v6 { 40 } else { 20 }, self.l4_header() as u32]
    }

    fn pseudo(&self, length: usize) -> u16 {
        let (source, destination) = self.addresses();
        sum(&[&source, &destination, &[0, self.protocol], &(length as u16).to_be_bytes()])
    }

    fn addresses(&self) -> (Vec<u8>, Vec<u8>) {
        if self.v6 { (pattern(16, 1), pattern(16, 2)) } else { (vec![10, 0, 0, 1], vec![10, 0, 0, 2]) }
    }

    /// With all checksums (`true`), or with the sum of the pseudo header as `partial` says where a checksum belongs.
    fn bytes(&self, whole: bool, partial: u16) -> Vec<u8> {
        let (source, destination) = self.addresses();
        let length = self.l4_header() + self.payload.len();
        let mut bytes = [&MAC_B[..], &MAC_A[..]].concat();
        if self.v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend((length as u16).to_be_bytes());
            bytes.extend([self.protocol, 64]);
            bytes.extend(source.iter().chain(&destination));
        } else {
            bytes.extend([0x08, 0, 0x45, 0]);
            bytes.extend((20 + length as u16).to_be_bytes());
            bytes.extend(self.id.to_be_bytes());
            bytes.extend([0x40, 0, 64, self.protocol, 0, 0]);
            bytes.extend(source.iter().chain(&destination));
            if whole {
                let value = !sum(&[&bytes[14..34]]);
                bytes[24..26].copy_from_slice(&value.to_be_bytes());
            }
        }
        let l4 = bytes.len();
        bytes.extend([0x12, 0x34, 0, 80]);
        let at = if self.protocol == TCP {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([1, 2, 3, 4, 0x50, self.flags, 0x20, 0, 0, 0, 0, 0]);
            16
        } else {
            bytes.extend((length as u16).to_be_bytes());
            bytes.extend([0, 0]);
            6
        };
        bytes.extend(&self.payload);
        let mut value = partial;
        if whole {
            value = !sum(&[&bytes[l4..], &self.pseudo(length).to_be_bytes()]);
            if value == 0 && self.protocol == UDP {
                value = 0xffff;
            }
        }
        bytes[l4 + at..l4 + at + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    fn kind(&self) -> u32 {
        (if self.v6 { 0 } else { tx::TUCMD_IPV4 }) | if self.protocol == TCP { TUCMD_TCP } else { 0 }
    }
}

fn packets() -> impl Iterator<Item = Packet> {
    [(false, TCP), (false, UDP), (true, TCP), (true, UDP)].into_iter().map(|(v6, protocol)| Packet {
        v6,
        protocol,
        id: 0xfffe,
        sequence: 0xffff_ff00,
        flags: 0x19,
        payload: pattern(5000, 7),
    })
}

const OPTIONS: u32 = tx::IXSM | tx::TXSM;

#[test]
fn checksums_are_inserted_and_verified() {
    let (mut a, mut b) = two();
    for packet in packets() {
        for len in [0, 1, 18, 1000, 1460, 8000] {
            let packet = Packet { payload: pattern(len, 3), ..packet.clone() };
            let partial = packet.pseudo(packet.l4_header() + len);
            a.push_context(0, 0, packet.headers(), packet.kind(), 0);
            a.push_packet(0, &packet.bytes(false, partial), 0, OPTIONS);
            a.ring(0);
            settle(&mut a, &mut b);
            let got = b.receive(0).unwrap();
            let mut expected = packet.bytes(true, 0);
            expected.resize(expected.len().max(60), 0);
            assert_eq!(got.bytes, expected, "{packet:?}");
            let ip = if packet.v6 { 0 } else { rx_status::IPCS };
            let udp = if packet.protocol == UDP { rx_status::UDPCS } else { 0 };
            assert_eq!(got.status, rx_status::DD | rx_status::EOP | rx_status::L4CS | ip | udp);
            let l3 = if packet.v6 { packet_type::IPV6 } else { packet_type::IPV4 };
            assert_eq!(got.info, l3 | if packet.protocol == TCP { packet_type::TCP } else { packet_type::UDP });
        }
    }
}

#[test]
fn only_what_is_asked_for() {
    let (mut a, mut b) = two();
    let packet = Packet { payload: pattern(100, 3), ..packets().next().unwrap() };
    let raw = packet.bytes(false, 0x1111);
    a.push_context(0, 0, packet.headers(), packet.kind(), 0);
    let done = packet.bytes(true, 0);
    for (options, ip, l4) in [(0, false, false), (tx::IXSM, true, false)] {
        a.push_packet(0, &raw, 0, options);
        a.ring(0);
        settle(&mut a, &mut b);
        let got = b.receive(0).unwrap();
        let mut expected = raw.clone();
        if ip {
            expected[24..26].copy_from_slice(&done[24..26]);
        }
        assert_eq!(got.bytes, expected);
        let wrong = |is, bit| if is { 0 } else { bit };
        let errors = rx_status::IPE | rx_status::L4E;
        assert_eq!(got.status & errors, wrong(ip, rx_status::IPE) | wrong(l4, rx_status::L4E));
    }
    // A second context, by its number.
    let other = Packet { v6: true, payload: pattern(100, 3), ..packet.clone() };
    let [mac, ip, l4] = other.headers();
    a.push(
        0,
        u64::from(mac << 9 | ip),
        u64::from(l4 << 8 | 1 << 4) << 32 | u64::from(other.kind() | tx::DTYP_CONTEXT << 20 | tx::DEXT),
    );
    for (packet, index) in [(&packet, 0), (&other, 1), (&packet, 0)] {
        a.push_packet(0, &packet.bytes(false, packet.pseudo(120)), 0, OPTIONS | index << 4);
        a.ring(0);
        settle(&mut a, &mut b);
        assert_eq!(b.receive(0).unwrap().bytes, packet.bytes(true, 0));
    }
}

#[test]
fn checksums_that_are_wrong_or_not_there() {
    let (mut a, mut b) = two();
    let mut status = |bytes: &[u8]| {
        a.send(0, bytes);
        settle(&mut a, &mut b);
        b.receive(0).unwrap().status & (rx_status::IPCS | rx_status::L4CS | rx_status::IPE | rx_status::L4E)
    };
    for packet in packets() {
        let packet = Packet { payload: pattern(101, 9), ..packet };
        let bytes = packet.bytes(true, 0);
        let ip = if packet.v6 { 0 } else { rx_status::IPCS };
        assert_eq!(status(&bytes), ip | rx_status::L4CS);
        let mut wrong = bytes.clone();
        *wrong.last_mut().unwrap() ^= 1;
        assert_eq!(status(&wrong), ip | rx_status::L4CS | rx_status::L4E);
        if packet.v6 {
            continue;
        }
        // Hop count: only the IP header's.
        let mut wrong = bytes.clone();
        wrong[22] ^= 1;
        assert_eq!(status(&wrong), ip | rx_status::L4CS | rx_status::IPE);
        // Of a fragment nothing is known but its header.
        let mut fragment = bytes.clone();
        (fragment[20], fragment[21]) = (0, 3);
        fragment[24..26].fill(0);
        let value = !sum(&[&fragment[14..34]]);
        fragment[24..26].copy_from_slice(&value.to_be_bytes());
        assert_eq!(status(&fragment), ip);
        // A length that the frame does not have.
        let mut cut = bytes.clone();
        cut.truncate(100);
        assert_eq!(status(&cut), ip);
        if packet.protocol == UDP {
            let mut none = bytes.clone();
            none[40..42].fill(0);
            assert_eq!(status(&none), ip, "0 says that there is none");
        }
    }
}

/// What has to come out of a packet that is sent in segments.
fn segments(packet: &Packet, mss: usize) -> Vec<Vec<u8>> {
    let count = packet.payload.len().div_ceil(mss);
    let part = |(i, payload): (usize, &[u8])| {
        let mut flags = packet.flags;
        if count > 1 {
            // FIN and PSH in the last segment only, CWR in the first.
            flags &= if i + 1 == count {
                0x7f
            } else if i == 0 {
                0xf6
            } else {
                0x76
            };
        }
        let sequence = packet.sequence.wrapping_add((i * mss) as u32);
        let id = packet.id.wrapping_add(i as u16);
        let mut bytes = Packet { id, sequence, flags, payload: payload.to_vec(), ..packet.clone() }.bytes(true, 0);
        bytes.resize(bytes.len().max(60), 0);
        bytes
    };
    packet.payload.chunks(mss).enumerate().map(part).collect()
}

#[test]
fn segmentation() {
    let (mut a, mut b) = two();
    for packet in packets() {
        for (payload, mss) in [(5000, 1000), (5000, 1448), (1, 1448), (1448, 1448), (1449, 1448), (20000, 8000), (30, 1)] {
            let packet = Packet { payload: pattern(payload, 5), flags: 0x99, ..packet.clone() };
            let bytes = packet.bytes(false, packet.pseudo(0));
            let [mac, ip, l4] = packet.headers();
            a.push_context(0, 0, packet.headers(), packet.kind(), mss);
            // In three descriptors, cut in the middle of the headers and of the payload.
            a.put(DATA, &bytes);
            let (first, second) = (40, bytes.len() / 2 + 20);
            let header = mac + ip + l4;
            let last = OPTIONS | (bytes.len() as u32 - header) << 14;
            for (from, to) in [(0, first), (first, second), (second, bytes.len())] {
                let end = if to == bytes.len() { tx::EOP | tx::RS } else { 0 };
                let command = (to - from) as u32 | tx::DTYP_DATA << tx::DTYP_SHIFT | tx::DEXT | tx::TSE | end;
                a.push(0, DATA + from as u64, u64::from(last) << 32 | u64::from(command));
            }
            a.ring(0);
            for (i, expected) in segments(&packet, mss.into()).into_iter().enumerate() {
                settle(&mut a, &mut b);
                let got = b.receive(0).unwrap();
                assert_eq!(got.bytes, expected, "segment {i} of {payload} by {mss}");
                assert_eq!(got.status & (rx_status::IPE | rx_status::L4E), 0);
            }
            settle(&mut a, &mut b);
            assert!(b.receive(0).is_none() && a.is_done(0));
        }
    }
    assert_eq!(a.get(0x40f8), 4 * 7, "TSCTC");
    assert_eq!(a.counters().drops, [0; Cause::ALL.len()]);
}

#[test]
fn segmentation_with_tags() {
    let (mut a, mut b) = two();
    b.set(CTRL, ctrl::SLU | ctrl::VME | ctrl::TFCE);
    let packet = packets().next().unwrap();
    a.push_context(0, 0x0fed, packet.headers(), packet.kind(), 1400);
    a.push_packet(0, &packet.bytes(false, packet.pseudo(0)), tx::TSE | tx::VLE, OPTIONS | 5000 << 14);
    a.ring(0);
    settle(&mut a, &mut b);
    for expected in segments(&packet, 1400) {
        let got = b.receive(0).unwrap();
        assert_eq!((got.vlan, got.bytes), (0x0fed, expected));
    }
}

#[test]
fn sctp() {
    let (mut a, mut b) = two();
    let mut bytes = packets().next().unwrap().bytes(true, 0)[..34].to_vec();
    (bytes[16], bytes[17], bytes[23]) = (0, 20 + 12 + 9, 132);
    bytes.extend([0, 1, 0, 2, 0, 0, 0, 3, 0xaa, 0xaa, 0xaa, 0xaa]);
    bytes.extend(b"123456789");
    a.push_context(0, 0, [14, 20, 12], tx::TUCMD_IPV4 | TUCMD_SCTP, 0);
    a.push_packet(0, &bytes, 0, OPTIONS);
    a.ring(0);
    settle(&mut a, &mut b);
    let got = b.receive(0).unwrap();
    assert_eq!(got.info, packet_type::IPV4 | packet_type::SCTP);
    bytes[42..46].fill(0);
    let crc = !bytes[34..].iter().fold(!0u32, |mut crc, &byte| {
        crc ^= u32::from(byte);
        (0..8).for_each(|_| crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 });
        crc
    });
    assert_eq!(got.bytes[42..46], crc.to_le_bytes());
}
