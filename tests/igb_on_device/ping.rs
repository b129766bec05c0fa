//! Echo, asked and answered.

use std::{
    thread,
    time::{Duration, Instant},
};

use vfio_uring::reactor::{Idle, timeout};
use vfio_uring_igb::{Options, Packet};

use crate::{
    linux::attempt,
    rig::Rig,
    support::{Port, run},
};

const LINUX: [u8; 4] = [192, 0, 2, 1];
const US: [u8; 4] = [192, 0, 2, 2];
const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
const ICMP: u8 = 1;
/// Bytes of our buffers. From longer ones QEMU's card does not send some: it says so by its counter alone (GPTC). It has to map the memory
/// of a descriptor in one piece, and the pages of a buffer need not be neighbours.
const PAGE: usize = 4096;
const COUNT: u16 = 50;

/// What a packet for us is.
enum Came {
    /// It was a question, which is answered.
    Answered,
    /// Linux tells its address.
    Address([u8; 6]),
    /// The answer to an echo of ours: its number and data.
    Echo(u16, Vec<u8>),
    Other,
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut total: u32 = words.sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !total as u16
}

fn swap(bytes: &mut [u8], a: usize, b: usize, len: usize) {
    let (left, right) = bytes.split_at_mut(b);
    left[a..a + len].swap_with_slice(&mut right[..len]);
}

/// Looks at a packet; a question is answered in its own buffer.
async fn take(port: &mut Port, mut packet: Packet) -> Came {
    let us = port.nic.mac();
    let len = packet.len();
    if !packet.is_contiguous() || len < 42 {
        return Came::Other;
    }
    let bytes = packet.data_mut();
    let answered = if bytes[12..14] == ARP && bytes[38..42] == US {
        let sender: [u8; 6] = bytes[22..28].try_into().unwrap();
        if bytes[20..22] == [0, 2] {
            return Came::Address(sender);
        }
        bytes[20..22].copy_from_slice(&[0, 2]);
        swap(bytes, 22, 32, 10);
        bytes[22..28].copy_from_slice(&us);
        bytes[..6].copy_from_slice(&sender);
        true
    } else if bytes[12..14] == IPV4 && bytes[14] == 0x45 && bytes[23] == ICMP && bytes[30..34] == US {
        let end = 14 + usize::from(u16::from_be_bytes([bytes[16], bytes[17]]));
        let Some(icmp) = bytes.get_mut(34..end) else { return Came::Other };
        assert_eq!(sum(icmp), 0, "an ICMP message's checksum");
        if icmp[0] == 0 {
            return Came::Echo(u16::from_be_bytes([icmp[6], icmp[7]]), icmp[8..].to_vec());
        }
        assert_eq!(icmp[0], 8);
        icmp[0] = 0;
        icmp[2..4].fill(0);
        let check = sum(icmp);
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        swap(bytes, 26, 30, 4);
        let sender: [u8; 6] = bytes[6..12].try_into().unwrap();
        bytes[..6].copy_from_slice(&sender);
        true
    } else {
        false
    };
    if !answered {
        return Came::Other;
    }
    packet.data_mut()[6..12].copy_from_slice(&us);
    port.tx.ready().await.unwrap();
    port.tx.send(packet).unwrap();
    Came::Answered
}

fn arp_request(from: [u8; 6]) -> Vec<u8> {
    let what = [0, 1, 8, 0, 6, 4, 0, 1];
    let mut bytes = [&[0xff; 6][..], &from, &ARP, &what, &from, &US, &[0; 6], &LINUX].concat();
    bytes.resize(60, 0);
    bytes
}

fn echo_request(to: [u8; 6], from: [u8; 6], number: u16, data: &[u8]) -> Vec<u8> {
    let len = (28 + data.len() as u16).to_be_bytes();
    let mut ip = [&[0x45, 0][..], &len, &[0, 1, 0, 0, 64, ICMP, 0, 0], &US, &LINUX].concat();
    let check = sum(&ip);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut icmp = [&[8, 0, 0, 0, 0, 7][..], &number.to_be_bytes(), data].concat();
    let check = sum(&icmp);
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    [&to[..], &from, &IPV4, &ip, &icmp].concat()
}

/// Linux asks, we answer: `COUNT` times, of which `may_be_lost` may be lost.
async fn answer_linux(port: &mut Port, size: usize, may_be_lost: usize) {
    let asking = thread::spawn(move || {
        let (count, size) = (COUNT.to_string(), size.to_string());
        attempt("ping", &["-c", &count, "-i", "0.05", "-w", "60", "-s", &size, "192.0.2.2"]).1
    });
    let mut answered = 0;
    while !asking.is_finished() {
        if let Ok(packet) = timeout(Duration::from_millis(50), port.rx.recv()).await
            && let Came::Answered = take(port, packet.unwrap()).await
        {
            answered += 1;
        }
    }
    let said = asking.join().unwrap();
    let end = said.find("---").map_or("", |at| said[at..].trim());
    println!("{answered} answers; {end}");
    let lost: Vec<_> = (0..COUNT).filter(|number| !said.contains(&format!("seq={number} "))).collect();
    if !lost.is_empty() {
        println!("lost: {lost:?}; {:?}", port.nic.statistics().await.unwrap());
    }
    assert!(lost.len() <= may_be_lost, "echoes {lost:?} are lost; {said}");
}

/// We ask, Linux answers.
async fn ask_linux(port: &mut Port) {
    let start = Instant::now();
    let us = port.nic.mac();
    port.send(&arp_request(us)).await;
    let linux = loop {
        let packet = port.rx.recv().await.unwrap();
        if let Came::Address(mac) = take(port, packet).await {
            break mac;
        }
    };
    for number in 0..COUNT {
        let data: Vec<u8> = (0..8 + number * 14).map(|i| (i ^ number) as u8).collect();
        port.send(&echo_request(linux, us, number, &data)).await;
        loop {
            let packet = port.rx.recv().await.unwrap();
            if let Came::Echo(answered, back) = take(port, packet).await {
                assert_eq!(answered, number);
                assert!(back == data, "the data of echo {number}");
                break;
            }
        }
    }
    println!("Linux answers {COUNT} echoes in {:?}", start.elapsed());
}

async fn pings(interrupt: Option<Duration>) {
    let Some(rig) = Rig::open().await else { return };
    let mut port = rig.port(Options { interrupt, max_frame: 9018, buffer_len: PAGE, ..Options::default() }).await;
    rig.linux.ip("add", "192.0.2.1/24");
    // QEMU's card loses a long packet of Linux's now and then, see `exchange.rs`.
    for (size, may_be_lost) in [(56, 0), (1400, 0), (3900, 5)] {
        answer_linux(&mut port, size, may_be_lost).await;
    }
    ask_linux(&mut port).await;
    rig.linux.ip("del", "192.0.2.1/24");
    port.tx.drained().await.unwrap();
    port.nic.stop().await.unwrap();
}

#[test]
fn ping_polled() {
    run(Idle::Hybrid, pings(None));
}

#[test]
fn ping_by_interrupt() {
    run(Idle::Park, pings(Some(Duration::from_micros(20))));
}
