//! Answers ARP and pings, by hand: each request becomes its answer in the buffer that it came in. Without an argument it starts
//! two software NICs with a cable between them, and sends itself some pings:
//! `cargo run --release --example ping_responder [0000:01:00.0 [192.0.2.1]]`. With an address it answers until it is ended.

use std::{error::Error, net::Ipv4Addr, time::Duration};

use futures::{FutureExt, select_biased};
use vfio_uring::{
    device::{Address, Device},
    reactor::{Reactor, sleep, timeout},
};
use vfio_uring_igb::{Nic, Options, Packet, RxQueue, TxQueue};
use vfio_uring_models::igb;

const US: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ASKER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const PINGS: u16 = 5;
const PATIENCE: Duration = Duration::from_secs(30);

const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
/// Ethernet and IPv4 in ARP, as a request.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ICMP: u8 = 1;
const ECHO: u8 = 8;

type Failure = Box<dyn Error + Send + Sync>;

/// Makes the answer of a request to `ip`; what was asked, or `None` when it is something else.
pub fn answer(frame: &mut [u8], mac: [u8; 6], ip: Ipv4Addr) -> Option<&'static str> {
    let asked = match (frame.get(12..14)?, frame.get(14..)?) {
        (kind, arp) if kind == ARP && arp.starts_with(&ARP_REQUEST) && arp.get(24..28)? == ip.octets() => {
            let asker: [u8; 10] = arp[8..18].try_into().ok()?;
            frame[21] = 2;
            frame[22..28].copy_from_slice(&mac);
            frame[28..32].copy_from_slice(&ip.octets());
            frame[32..42].copy_from_slice(&asker);
            "ARP"
        }
        // No options, no fragment.
        (kind, packet)
            if kind == IPV4
                && packet.first()? == &0x45
                && packet.get(6)? & 0x3f == 0
                && packet.get(7)? == &0
                && packet.get(9)? == &ICMP
                && packet.get(16..20)? == ip.octets()
                && packet.get(20)? == &ECHO =>
        {
            let (from, to) = packet[12..20].split_at(4);
            let addresses = [to, from].concat();
            // The sum of the addresses stays, so does the header's checksum; that of ICMP is by what the type was less.
            frame[26..34].copy_from_slice(&addresses);
            frame[34] = 0;
            let sum = u32::from(u16::from_be_bytes([*frame.get(36)?, *frame.get(37)?])) + u32::from(ECHO) * 256;
            frame[36..38].copy_from_slice(&((sum + (sum >> 16)) as u16).to_be_bytes());
            "a ping"
        }
        _ => return None,
    };
    let (to, from) = frame.split_at_mut(6);
    to.copy_from_slice(&from[..6]);
    from[..6].copy_from_slice(&mac);
    Some(asked)
}

/// Answers what comes to a queue pair.
pub async fn respond(mut rx: RxQueue, mut tx: TxQueue, mac: [u8; 6], ip: Ipv4Addr) -> Result<(), Failure> {
    loop {
        let mut packet = rx.recv().await?;
        if let Some(asked) = answer(packet.data_mut(), mac, ip) {
            println!("{asked} is answered");
            tx.ready().await?;
            tx.send(packet)?;
        }
    }
}

async fn bring_up(address: &Address) -> Result<(Nic, RxQueue, TxQueue), Failure> {
    let device = Device::open(address).await?;
    let (nic, mut queues) = Nic::new(&device, Options::default()).await?;
    let (rx, tx) = queues.remove(0).start()?;
    while !nic.link().await?.up {
        sleep(Duration::from_millis(10)).await;
    }
    Ok((nic, rx, tx))
}

/// Ones' complement sum (RFC 1071), complemented.
fn checksum(data: &[u8]) -> [u8; 2] {
    let words = data.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Sends a frame and waits for one that `is_answer`.
async fn ask(
    (rx, tx): (&mut RxQueue, &mut TxQueue),
    mut packet: Packet,
    frame: &[u8],
    is_answer: impl Fn(&[u8]) -> bool,
) -> Result<Packet, Failure> {
    packet.copy_from(frame)?;
    tx.send(packet)?;
    loop {
        let packet = rx.recv().await?;
        if is_answer(packet.data()) {
            return Ok(packet);
        }
    }
}

/// Asks for the MAC address, and sends pings to it.
async fn ping(mut rx: RxQueue, mut tx: TxQueue, mac: [u8; 6]) -> Result<(), Failure> {
    let buffers = tx.buffers();
    let buffer = || buffers.alloc().ok_or("all buffers are in use");
    let mut frame = [&[0xff; 6][..], &mac, &ARP, &ARP_REQUEST, &mac, &ASKER.octets(), &[0; 6], &US.octets()].concat();
    let found = ask((&mut rx, &mut tx), buffer()?, &frame, |data| data[12..14] == ARP && data[21] == 2).await?;
    let to = found.data()[22..28].to_vec();
    println!("ping: {US} is at {to:02x?}");
    for number in 0..PINGS {
        let mut echo = [&[ECHO, 0, 0, 0, 0x12, 0x34][..], &number.to_be_bytes(), &[0x5a; 56]].concat();
        let sum = checksum(&echo);
        echo[2..4].copy_from_slice(&sum);
        frame = [&to[..], &mac, &IPV4, &[0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, ICMP, 0, 0]].concat();
        frame.extend([ASKER.octets(), US.octets()].concat());
        let sum = checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum);
        frame.extend(&echo);
        let is_answer =
            |data: &[u8]| data.len() >= 98 && data[12..14] == IPV4 && data[34] == 0 && data[40..42] == echo[6..8];
        let answer = ask((&mut rx, &mut tx), buffer()?, &frame, is_answer).await?;
        let data = answer.data();
        if checksum(&data[14..34]) != [0; 2] || checksum(&data[34..98]) != [0; 2] || data[42..98] != echo[8..] {
            return Err(format!("the answer to ping {number} is wrong").into());
        }
        println!("ping: answer {number}, {} bytes, checksums and data are right", data.len());
    }
    Ok(())
}

/// Responder and asker on one reactor.
pub fn both() -> Result<(), Failure> {
    println!("no address: two software NICs with a cable between them, in threads of this process");
    let (one, other) = igb::pair(Default::default(), Default::default())?;
    let (one, other): (Address, Address) = (one.address().parse()?, other.address().parse()?);
    Reactor::new()?.block_on(async {
        let ((ours, rx, tx), (asker, its_rx, its_tx)) = (bring_up(&one).await?, bring_up(&other).await?);
        let result = select_biased! {
            result = timeout(PATIENCE, ping(its_rx, its_tx, asker.mac())).fuse() => result.map_err(|_| "no answer")?,
            result = respond(rx, tx, ours.mac(), US).fuse() => result,
        };
        asker.stop().await?;
        ours.stop().await?;
        result
    })
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let Some(address) = arguments.next() else { return both() };
    let ip = arguments.next().map_or(Ok(US), |ip| ip.parse())?;
    Reactor::new()?.block_on(async {
        let (nic, rx, tx) = bring_up(&address.parse()?).await?;
        println!("{ip} answers pings; Ctrl-C ends it");
        respond(rx, tx, nic.mac(), ip).await
    })
}
