//! Receive side scaling against the vectors that Microsoft publishes for it.

use vfio_uring_models::igb::spec::*;

use crate::support::*;

/// The key of the vectors ("Verifying the RSS Hash Calculation").
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb,
    0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Source, port, destination, port, hash of the addresses, hash of addresses and ports.
type Vector = (&'static str, u16, &'static str, u16, u32, u32);

const V4: [Vector; 5] = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323e_8fc2, 0x51cc_c178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xd718_262a, 0xc626_b0ea),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xd2d0_a5de, 0x5c2b_394a),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x8298_9176, 0xafc7_327f),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5d18_09c5, 0x10e8_28a2),
];

const V6: [Vector; 3] = [
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2cc1_8cd5, 0x4020_7d3d),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0f0c_461c, 0xdde5_1bbf),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x4b61_e985, 0x02d1_feef),
];

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;

fn packet(vector: &Vector, protocol: u8, extension: bool) -> Vec<u8> {
    let &(source, source_port, destination, port, ..) = vector;
    let mut bytes = [&MAC_B[..], &MAC_A[..]].concat();
    let transport = if protocol == TCP { 20 } else { 8 };
    if let (Ok(source), Ok(destination)) = (source.parse::<std::net::Ipv4Addr>(), destination.parse::<std::net::Ipv4Addr>())
    {
        bytes.extend([0x08, 0, 0x45, 0, 0, 20 + transport, 0, 0, 0, 0, 64, protocol, 0, 0]);
        bytes.extend(source.octets().into_iter().chain(destination.octets()));
    } else {
        let parse = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let len = transport + if extension { 16 } else { 0 };
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, len, if extension { 0 } else { protocol }, 64]);
        bytes.extend(parse(source).into_iter().chain(parse(destination)));
        if extension {
            bytes.extend([protocol, 1]);
            bytes.extend([0; 14]);
        }
    }
    bytes.extend(source_port.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0]);
    bytes.resize(bytes.len().max(60) + 20, 0);
    bytes
}

fn scaling(mrqc_fields: u32) -> (Driver, Driver) {
    let (mut a, mut b) = two();
    for queue in 0..QUEUES {
        b.rx_queue(queue, 32);
    }
    for (i, part) in KEY.chunks(4).enumerate() {
        b.set(RSSRK + 4 * i as u64, u32::from_le_bytes(part.try_into().unwrap()));
    }
    // Entry i leads to queue i mod 16.
    for i in 0..32 {
        b.set(RETA + 4 * i, u32::from_le_bytes(std::array::from_fn(|byte| ((4 * i + byte as u64) % 16) as u8)));
    }
    b.set(MRQC, mrqc::ENABLE_RSS | mrqc_fields);
    a.service();
    (a, b)
}

/// Hash, type and queue.
fn hash(a: &mut Driver, b: &mut Driver, bytes: &[u8]) -> (u32, u32, usize) {
    a.send(0, bytes);
    settle(a, b);
    let mut found = None;
    for queue in 0..QUEUES {
        if let Some(got) = b.receive(queue) {
            assert_eq!(got.bytes, bytes);
            assert!(found.replace((got.hash, got.info & 0xf, queue)).is_none());
        }
    }
    found.expect("a packet")
}

const ALL: u32 = mrqc::TCP_IPV4
    | mrqc::IPV4
    | mrqc::TCP_IPV6
    | mrqc::TCP_IPV6_EX
    | mrqc::IPV6
    | mrqc::IPV6_EX
    | mrqc::UDP_IPV4
    | mrqc::UDP_IPV6
    | mrqc::UDP_IPV6_EX;

#[test]
fn published_vectors() {
    let (mut a, mut b) = scaling(ALL);
    b.set(RCTL, rctl::EN | rctl::UPE | rctl::MPE | rctl::SECRC);
    for (vectors, types) in [(&V4[..], [1, 7, 2]), (&V6[..], [3, 8, 5])] {
        for vector in vectors {
            for (protocol, kind) in [TCP, UDP, ICMP].into_iter().zip(types) {
                let expected = if protocol == ICMP { vector.4 } else { vector.5 };
                let queue = (expected & 0x7f) as usize % 16;
                assert_eq!(hash(&mut a, &mut b, &packet(vector, protocol, false)), (expected, kind, queue), "{vector:?}");
            }
        }
    }
    for vector in &V6 {
        for (protocol, kind, expected) in [(TCP, 6, vector.5), (UDP, 9, vector.5), (ICMP, 4, vector.4)] {
            let got = hash(&mut a, &mut b, &packet(vector, protocol, true));
            assert_eq!((got.0, got.1), (expected, kind));
        }
    }
}

#[test]
fn only_the_fields_that_are_on() {
    let (mut a, mut b) = scaling(mrqc::IPV4);
    let vector = &V4[0];
    assert_eq!(hash(&mut a, &mut b, &packet(vector, TCP, false)), (vector.4, 2, (vector.4 & 15) as usize));
    b.set(MRQC, mrqc::ENABLE_RSS | mrqc::TCP_IPV4);
    assert_eq!(hash(&mut a, &mut b, &packet(vector, UDP, false)), (0, 0, 0), "no hash: queue 0");
    let mut fragment = packet(vector, TCP, false);
    fragment[20] = 0x20;
    assert_eq!(hash(&mut a, &mut b, &fragment), (0, 0, 0), "a fragment has no ports");
    b.set(MRQC, ALL);
    assert_eq!(hash(&mut a, &mut b, &packet(vector, TCP, false)), (0, 0, 0), "RSS is off");
    b.set(MRQC, mrqc::ENABLE_RSS | ALL);
    assert_eq!(hash(&mut a, &mut b, &frame(MAC_B, MAC_A, 60, 1)), (0, 0, 0), "not IP");
    // A key of its own.
    b.set(RSSRK, 0);
    assert_ne!(hash(&mut a, &mut b, &packet(vector, TCP, false)).0, vector.5);
}

#[test]
fn flows_spread() {
    let (mut a, mut b) = scaling(ALL);
    let mut counts = [0; QUEUES];
    for flow in 0..320u16 {
        let vector = (V4[0].0, 1000 + flow, V4[0].2, 80, 0, 0);
        let (_, _, queue) = hash(&mut a, &mut b, &packet(&vector, TCP, false));
        assert_eq!(hash(&mut a, &mut b, &packet(&vector, TCP, false)).2, queue, "a flow stays");
        counts[queue] += 1;
    }
    assert!(counts.iter().all(|count| (5..60).contains(count)), "{counts:?}");
}
