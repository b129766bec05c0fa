//! Many packets, of all sizes, in every mode.

use std::time::Duration;

use futures::{SinkExt, StreamExt, join};
use vfio_uring::reactor::{Idle, yield_now};
use vfio_uring_igb::{Options, Packet, SendError};

use crate::support::{Pair, Port, bytes_of, frame, run, two};

/// Where the bytes of all packets are cut out of.
fn pattern() -> Vec<u8> {
    frame([0; 6], [0; 6], 64 << 10, 77)
}

/// Length and place of a packet's bytes.
fn cut(i: usize) -> (usize, usize) {
    let mixed = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (60 + mixed as usize % 8941, i * 131 % 50_000)
}

async fn send_all(port: &mut Port, to: [u8; 6], count: usize, pattern: &[u8]) {
    let from = port.nic.mac();
    let mut batch: Vec<Packet> = Vec::new();
    for i in 0..count {
        let (len, at) = cut(i);
        let mut bytes = pattern[at..at + len].to_vec();
        bytes[..6].copy_from_slice(&to);
        bytes[6..12].copy_from_slice(&from);
        bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
        let packet = loop {
            match port.packet(&bytes) {
                Some(packet) => break packet,
                None => {
                    port.tx.tx_batch(&mut batch).unwrap();
                    yield_now().await;
                }
            }
        };
        batch.push(packet);
        while batch.len() >= 16 {
            if port.tx.tx_batch(&mut batch).unwrap() == 0 {
                port.tx.ready().await.unwrap();
            }
        }
    }
    while !batch.is_empty() {
        port.tx.ready().await.unwrap();
        port.tx.tx_batch(&mut batch).unwrap();
    }
    port.tx.drained().await.unwrap();
}

async fn receive_all(port: &mut Port, count: usize, pattern: &[u8]) {
    let mut batch = Vec::new();
    let mut i = 0;
    while i < count {
        port.rx.ready().await.unwrap();
        port.rx.rx_batch(&mut batch, 32).unwrap();
        for packet in batch.drain(..) {
            let (len, at) = cut(i);
            assert_eq!(packet.len(), len, "packet {i}");
            let bytes = bytes_of(&packet);
            assert!(bytes[14..] == pattern[at + 14..at + len], "packet {i} of {len} bytes");
            i += 1;
        }
    }
}

async fn verified(idle_interrupt: Option<Duration>, count: usize) {
    let options = Options { interrupt: idle_interrupt, max_frame: 9728, flow_control: true, ..Options::default() };
    let (mut a, mut b) = two(options).await;
    let pattern = pattern();
    let to = b.nic.mac();
    join!(send_all(&mut a, to, count, &pattern), receive_all(&mut b, count, &pattern));
    let (sent, got) = (a.nic.statistics().await.unwrap(), b.nic.statistics().await.unwrap());
    assert_eq!((sent.queues.tx_packets, got.queues.rx_packets, got.rx_packets), (count as u64, count as u64, count as u64));
    assert_eq!((got.queues.rx_bad_descriptor, got.queues.rx_too_long, got.rx_missed), (0, 0, 0));
    a.nic.stop().await.unwrap();
    b.nic.stop().await.unwrap();
}

#[test]
fn a_hundred_thousand_verified_packets() {
    run(Idle::Hybrid, verified(None, 100_000));
}

#[test]
fn verified_by_interrupts() {
    run(Idle::Park, verified(Some(Duration::from_micros(50)), 20_000));
}

#[test]
fn verified_by_interrupts_without_moderation() {
    run(Idle::Hybrid, verified(Some(Duration::ZERO), 20_000));
}

#[test]
fn one_packet_at_a_time_by_interrupt() {
    run(Idle::Park, async {
        let (mut a, mut b) = two(Options { interrupt: Some(Duration::from_micros(10)), ..Options::default() }).await;
        for seed in 0..500 {
            let sent = frame(b.nic.mac(), a.nic.mac(), 64, seed);
            a.send(&sent).await;
            let back = b.rx.recv().await.unwrap();
            assert_eq!(back.data(), sent);
        }
        a.tx.drained().await.unwrap();
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn stream_and_sink() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options { flow_control: true, ..Options::default() }).await;
        let (from, to) = (a.nic.mac(), b.nic.mac());
        let buffers = a.tx.buffers();
        let send = async {
            for seed in 0..2000 {
                let mut packet = loop {
                    match buffers.alloc() {
                        Some(packet) => break packet,
                        None => yield_now().await,
                    }
                };
                packet.copy_from(&frame(to, from, 100, seed)).unwrap();
                a.tx.feed(packet).await.unwrap();
            }
            a.tx.close().await.unwrap();
        };
        let receive = async {
            for seed in 0..2000 {
                assert_eq!(b.rx.next().await.unwrap().unwrap().data(), frame(to, from, 100, seed));
            }
        };
        join!(send, receive);
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn tokens_and_typed_backpressure() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options { tx_ring: 64, ..Options::default() }).await;
        // A token has room for the longest packet: three of 64 descriptors.
        let one = a.tx.reserve().unwrap();
        let (two, three) = (a.tx.reserve().unwrap(), a.tx.reserve().unwrap());
        assert!(a.tx.reserve().is_none());
        drop((one, two));
        let sent = frame(b.nic.mac(), a.nic.mac(), 80, 5);
        assert_eq!(three.consume(80, |to| to.copy_from_slice(&sent)).unwrap(), ());
        let token = loop {
            match b.rx.try_recv().unwrap() {
                Some(token) => break token,
                None => b.rx.ready().await.unwrap(),
            }
        };
        assert!(token.consume(|bytes| bytes == sent));
        let token = a.tx.reserve().unwrap();
        assert!(matches!(token.consume(4096 * 2, |_| ()), Err(SendError::Invalid { .. })));
        // Without a turn of the reactor nothing is done: 63 have room.
        let mut packets: Vec<_> = (0..70).map(|_| a.packet(&sent).unwrap()).collect();
        assert_eq!((a.tx.tx_batch(&mut packets).unwrap(), packets.len()), (63, 7));
        let packet = packets.pop().unwrap();
        let Err(SendError::Full(packet)) = a.tx.send(packet) else { panic!("there is no room") };
        assert_eq!(packet.data(), sent);
        packets.push(packet);
        while !packets.is_empty() {
            a.tx.ready().await.unwrap();
            a.tx.tx_batch(&mut packets).unwrap();
        }
        a.tx.drained().await.unwrap();
        // What can't be sent is given back with the reason, or counted.
        let mut short = a.packet(&sent).unwrap();
        short.set_len(13).unwrap();
        let Err(SendError::Invalid { packet, why }) = a.tx.send(short) else { panic!("it is too short") };
        assert!(why.contains("14 bytes"));
        assert_eq!(a.tx.tx_batch(&mut vec![packet]).unwrap(), 1);
        assert_eq!(a.nic.queue_statistics()[0].tx_invalid, 1);
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn forwarded_between_two_in_one_address_space() {
    run(Idle::Hybrid, async {
        // Left and right have a cable each to one of ours, which forwards.
        let (left, right) = (Pair::new(), Pair::new());
        if crate::support::is_real() {
            return;
        }
        let options = || Options { promiscuous: true, flow_control: true, ..Options::default() };
        let mut a = Port::new(&left.device(0).await, options()).await;
        let mut b = Port::new(&right.device(0).await, options()).await;
        let one = left.device(1).await;
        let (mut in_left, mut in_right) =
            (Port::new(&one, options()).await, Port::new(&right.joined(1, &one).await, options()).await);
        for port in [&mut a, &mut b, &mut in_left, &mut in_right] {
            port.linked().await;
        }
        let (from, to) = (a.nic.mac(), b.nic.mac());
        let forward = async {
            let (mut batch, mut done) = (Vec::new(), 0);
            while done < 5000 {
                in_left.rx.ready().await.unwrap();
                in_left.rx.rx_batch(&mut batch, 32).unwrap();
                while !batch.is_empty() {
                    done += in_right.tx.tx_batch(&mut batch).unwrap();
                    yield_now().await;
                }
            }
            in_right.tx.drained().await.unwrap();
        };
        let send = async {
            for seed in 0..5000 {
                while a.tx.buffers().available() == 0 {
                    yield_now().await;
                }
                a.send(&frame(to, from, 60 + seed % 1400, seed as u64)).await;
            }
        };
        let receive = async {
            for seed in 0..5000 {
                assert_eq!(b.rx.recv().await.unwrap().data(), frame(to, from, 60 + seed % 1400, seed as u64));
            }
        };
        join!(send, forward, receive);
        // A buffer of another space is refused: the NIC could not read it.
        let foreign = a.packet(&frame(to, from, 60, 0)).unwrap();
        let Err(SendError::Invalid { why, .. }) = b.tx.send(foreign) else { panic!("it is not mapped") };
        assert!(why.contains("address space"));
        for port in [a, b, in_left, in_right] {
            port.nic.stop().await.unwrap();
        }
    });
}
