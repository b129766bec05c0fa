//! VLAN tags, checksums, segmentation.

use vfio_uring::reactor::Idle;
use vfio_uring_igb::{Checksum, Checksums, L4, Options, SendError, Tso, TxOffload};

use crate::support::{Pair, Port, frame, run, two};

const CLIENT: [u8; 4] = [192, 0, 2, 1];
const SERVER: [u8; 4] = [198, 51, 100, 2];
const GOOD: Checksums = Checksums { ipv4: Checksum::Good, l4: Checksum::Good };

fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut total = words.fold(start, |total, word| total + word);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn pseudo(protocol: u8, len: usize) -> u16 {
    sum(&[&CLIENT[..], &SERVER[..], &[0, protocol], &(len as u16).to_be_bytes()[..]].concat(), 0)
}

/// Ethernet and IPv4, with a right header checksum.
fn ipv4(to: [u8; 6], from: [u8; 6], protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut ip =
        [&[0x45, 0], &(20 + body.len() as u16).to_be_bytes()[..], &[0, 7, 0x40, 0, 64, protocol, 0, 0], &CLIENT, &SERVER]
            .concat();
    let check = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    [&to[..], &from, &[8, 0], &ip, body].concat()
}

/// A UDP packet without a checksum, from a port.
pub fn udp(to: [u8; 6], from: [u8; 6], port: u16, len: usize) -> Vec<u8> {
    let body = [&port.to_be_bytes()[..], &[0, 9], &(8 + len as u16).to_be_bytes(), &[0, 0], &vec![1; len]].concat();
    ipv4(to, from, 17, &body)
}

/// TCP without a checksum.
fn tcp(to: [u8; 6], from: [u8; 6], data: &[u8]) -> Vec<u8> {
    let body = [&[0, 80, 4, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0][..], data].concat();
    ipv4(to, from, 6, &body)
}

#[test]
fn vlan_tags() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let mut a = Port::new(&pair.device(0).await, Options::default()).await;
        for strip in [true, false] {
            let mut b = Port::new(&pair.device(1).await, Options { vlan_strip: strip, ..Options::default() }).await;
            a.linked().await;
            b.linked().await;
            let sent = frame(b.nic.mac(), a.nic.mac(), 100, 3);
            for tag in [0x2064, 0x2064, 0x0fff] {
                let mut packet = a.packet(&sent).unwrap();
                packet.set_offload(Some(TxOffload::vlan(tag)));
                a.tx.send(packet).unwrap();
                let got = b.rx.recv().await.unwrap();
                if strip {
                    assert_eq!((got.vlan(), got.data()), (Some(tag), &sent[..]));
                } else {
                    let tagged = [&sent[..12], &[0x81, 0], &tag.to_be_bytes(), &sent[12..]].concat();
                    assert_eq!((got.vlan(), got.data()), (None, &tagged[..]));
                }
            }
            a.send(&sent).await;
            assert_eq!(b.rx.recv().await.unwrap().vlan(), None);
            b.nic.stop().await.unwrap();
        }
        a.nic.stop().await.unwrap();
    });
}

#[test]
fn checksums() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options::default()).await;
        let (to, from) = (b.nic.mac(), a.nic.mac());
        for (protocol, l4, at) in [(17, L4::Udp, 40), (6, L4::Tcp, 50)] {
            let mut bytes = if protocol == 17 { udp(to, from, 5, 333) } else { tcp(to, from, &[9; 100]) };
            // As they are, without checksums of the NIC's.
            a.send(&bytes).await;
            let got = b.rx.recv().await.unwrap();
            assert_eq!(got.checksums().ipv4, Checksum::Good);
            assert_eq!(got.checksums().l4, if protocol == 17 { Checksum::Unchecked } else { Checksum::Bad });
            // The NIC inserts both.
            let start = pseudo(protocol, bytes.len() - 34);
            bytes[at..at + 2].copy_from_slice(&start.to_be_bytes());
            bytes[24..26].fill(0);
            let mut packet = a.packet(&bytes).unwrap();
            packet.set_offload(Some(TxOffload::ipv4(l4)));
            a.tx.send(packet).unwrap();
            let got = b.rx.recv().await.unwrap();
            assert_eq!(got.checksums(), GOOD);
            assert_eq!((sum(&got.data()[14..34], 0), sum(&got.data()[34..], start.into())), (0xffff, 0xffff));
            // One that is wrong.
            let mut wrong = got.data().to_vec();
            wrong[24] ^= 1;
            wrong[60] ^= 1;
            a.send(&wrong).await;
            let got = b.rx.recv().await.unwrap();
            assert_eq!(got.checksums(), Checksums { ipv4: Checksum::Bad, l4: Checksum::Bad });
        }
        a.send(&frame(to, from, 60, 1)).await;
        let got = b.rx.recv().await.unwrap();
        assert_eq!(got.checksums(), Checksums { ipv4: Checksum::Unchecked, l4: Checksum::Unchecked });
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn segmentation() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options { flow_control: true, ..Options::default() }).await;
        let (to, from) = (b.nic.mac(), a.nic.mac());
        let offload = TxOffload { tso: Some(Tso { mss: 1400, l4_len: 20 }), ..TxOffload::ipv4(L4::Tcp) };
        for len in [1, 1400, 1401, 20_000] {
            let data = frame([7; 6], [8; 6], len.max(14), 12)[..len].to_vec();
            let mut bytes = tcp(to, from, &data);
            // Length and header checksum are the NIC's; the pseudo header is summed without a length.
            bytes[16..18].fill(0);
            bytes[24..26].fill(0);
            bytes[50..52].copy_from_slice(&pseudo(6, 0).to_be_bytes());
            let mut packet = a.packet(&bytes).unwrap();
            packet.set_offload(Some(offload));
            a.tx.ready().await.unwrap();
            a.tx.send(packet).unwrap();
            let mut got = Vec::new();
            while got.len() < len {
                let packet = b.rx.recv().await.unwrap();
                assert_eq!(packet.checksums(), GOOD);
                let bytes = packet.data();
                let payload = usize::from(u16::from_be_bytes([bytes[16], bytes[17]])) - 40;
                let sequence = u32::from_be_bytes([bytes[38], bytes[39], bytes[40], bytes[41]]);
                assert_eq!((sequence, payload), (1 + got.len() as u32, 1400.min(len - got.len())));
                got.extend_from_slice(&bytes[54..54 + payload]);
            }
            assert_eq!(got, data);
        }
        assert_eq!(a.nic.statistics().await.unwrap().tx_tso, 4);
        let mut packet = a.packet(&tcp(to, from, &[])).unwrap();
        packet.set_offload(Some(TxOffload { tso: Some(Tso { mss: 0, l4_len: 20 }), ..TxOffload::ipv4(L4::Tcp) }));
        assert!(matches!(a.tx.send(packet), Err(SendError::Invalid { .. })));
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}
