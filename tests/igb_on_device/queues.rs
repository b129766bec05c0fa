//! Flows of Linux's over four queues of ours, on two threads.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::mpsc,
    thread,
    time::Duration,
};

use futures::future::join_all;
use vfio_uring::reactor::{Idle, Reactor, sleep, timeout};
use vfio_uring_igb::{Error, Options, QueueSeed, RxQueue};

use crate::{linux::Socket, rig::Rig, support::run};

const QUEUES: u16 = 4;
const FLOWS: u16 = 64;
const EACH: u16 = 20;
const UDP: u8 = 17;
const TCP: u8 = 6;

/// A packet that has arrived: on which queue, of which flow.
type Arrival = (u16, (u8, u16));

/// Takes what comes to a queue until the NIC is stopped.
async fn receive(mut rx: RxQueue, arrivals: mpsc::Sender<Arrival>) {
    let error = loop {
        let packet = match timeout(Duration::from_secs(100), rx.recv()).await.expect("no hang") {
            Ok(packet) => packet,
            Err(error) => break error,
        };
        let bytes = packet.data();
        if bytes[12..14] != [8, 0] || bytes[30..34] != [192, 0, 2, 2] {
            continue;
        }
        let hash = packet.rss().expect("it is hashed");
        assert_eq!(hash.value as u16 % QUEUES, rx.index(), "the table's entry");
        let _ = arrivals.send((rx.index(), (bytes[23], u16::from_be_bytes([bytes[34], bytes[35]]))));
    };
    assert!(matches!(error, Error::Stopped), "{error}");
}

/// A thread with two of the queues.
fn owner(seeds: Vec<QueueSeed>, idle: Idle, arrivals: &mpsc::Sender<Arrival>) {
    Reactor::builder().idle(idle).build().unwrap().block_on(async {
        let (receivers, senders): (Vec<_>, Vec<_>) = seeds.into_iter().map(|seed| seed.start().unwrap()).unzip();
        join_all(receivers.into_iter().map(|rx| receive(rx, arrivals.clone()))).await;
        drop(senders);
    });
}

/// A packet of a flow.
fn packet(to: [u8; 6], from: [u8; 6], protocol: u8, port: u16) -> Vec<u8> {
    let l4 = match protocol {
        UDP => [&port.to_be_bytes()[..], &[0, 9, 0, 28, 0, 0], &[1; 20]].concat(),
        _ => [
            &port.to_be_bytes()[..],
            &[0, 80, 4, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        ]
        .concat(),
    };
    let ip = [&[0x45, 0, 0, 48, 0, 7, 0x40, 0, 64, protocol, 0, 0][..], &[192, 0, 2, 1], &[192, 0, 2, 2]].concat();
    [&to[..], &from, &[8, 0], &ip, &l4].concat()
}

fn send(socket: &Socket, packet: &[u8]) {
    while !socket.send(packet) {
        thread::sleep(Duration::from_millis(1));
    }
}

async fn spread(idle: Idle, interrupt: Option<Duration>) {
    let Some(rig) = Rig::open().await else { return };
    let (nic, mut seeds) = rig.up(Options { queues: QUEUES, interrupt, ..Options::default() }).await;
    let (tell, arrivals) = mpsc::channel();
    let second = seeds.split_off(2);
    let threads = [seeds, second].map(|seeds| {
        let tell = tell.clone();
        thread::spawn(move || owner(seeds, idle, &tell))
    });
    let (socket, to, from) = (rig.linux.socket(), nic.mac(), rig.linux.mac);
    let mut seen: BTreeMap<(u8, u16), BTreeSet<u16>> = BTreeMap::new();
    let mut per_queue = [0u32; QUEUES as usize];
    for _ in 0..EACH {
        for flow in 0..FLOWS {
            for protocol in [UDP, TCP] {
                send(&socket, &packet(to, from, protocol, 1000 + flow));
            }
        }
        // All of a round fit into any queue's ring: none is lost.
        let round = async {
            let mut left = 2 * FLOWS;
            while left > 0 {
                match arrivals.try_recv() {
                    Ok((queue, flow)) => {
                        seen.entry(flow).or_default().insert(queue);
                        per_queue[usize::from(queue)] += 1;
                        left -= 1;
                    }
                    Err(_) => sleep(Duration::from_millis(1)).await,
                }
            }
        };
        if timeout(Duration::from_secs(30), round).await.is_err() {
            panic!("packets are missing: {:?}; Linux: {}", nic.statistics().await, rig.linux.counters());
        }
    }
    nic.stop().await.unwrap();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    println!("{} flows, packets of each queue: {per_queue:?}", seen.len());
    assert_eq!(seen.len(), 2 * usize::from(FLOWS));
    assert!(seen.values().all(|queues| queues.len() == 1), "a flow is in one queue: {seen:?}");
    assert!(per_queue.iter().all(|&packets| packets > 0), "{per_queue:?}");
}

#[test]
fn rss_spreads_flows() {
    run(Idle::Hybrid, spread(Idle::Hybrid, None));
}

#[test]
fn rss_spreads_flows_by_interrupts() {
    run(Idle::Park, spread(Idle::Park, Some(Duration::from_micros(20))));
}
