//! Bring-up, link, filters, statistics, stop.

use std::time::{Duration, Instant};

use futures::{SinkExt, StreamExt};
use vfio_uring::reactor::{Idle, sleep, timeout, yield_now};
use vfio_uring_igb::{Error, LinkState, Nic, Options};
use vfio_uring_models::igb::Config;

use crate::support::{Pair, Port, frame, is_real, run, two};

#[test]
fn bring_up_ping_and_stop() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options::default()).await;
        assert_ne!(a.nic.mac(), b.nic.mac());
        let up = LinkState { up: true, speed: 1000, full_duplex: true };
        assert_eq!((a.nic.link().await.unwrap(), b.nic.link().await.unwrap()), (up, up));
        for len in [60, 61, 1000, 1514] {
            let sent = frame(b.nic.mac(), a.nic.mac(), len, len as u64);
            a.send(&sent).await;
            let got = b.rx.recv().await.unwrap();
            assert_eq!(got.data(), sent);
            // And back, the buffer itself.
            let mut back = got;
            let (to, from) = back.data_mut()[..12].split_at_mut(6);
            to.swap_with_slice(from);
            b.tx.send(back).unwrap();
            let got = a.rx.next().await.unwrap().unwrap();
            assert_eq!((&got.data()[..6], &got.data()[12..]), (&a.nic.mac()[..], &sent[12..]));
        }
        b.tx.drained().await.unwrap();
        let statistics = a.nic.statistics().await.unwrap();
        assert_eq!((statistics.tx_packets, statistics.rx_packets, statistics.queues.rx_packets), (4, 4, 4));
        let memory = a.nic.memory().clone();
        let Port { nic, mut rx, mut tx, .. } = a;
        nic.stop().await.unwrap();
        assert!(matches!(rx.recv().await, Err(Error::Stopped)));
        assert!(matches!(rx.next().await, Some(Err(Error::Stopped))) && rx.next().await.is_none());
        assert!(tx.ready().await.is_err());
        drop((rx, tx));
        sleep(Duration::from_millis(1)).await;
        let stats = memory.stats();
        assert_eq!((stats.free, stats.quarantined), (stats.bytes, 0), "everything comes back");
        b.tx.close().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn wrong_options_are_refused() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let device = pair.device(0).await;
        for (options, word) in [
            (Options { queues: 0, ..Options::default() }, "queues"),
            (Options { queues: 17, ..Options::default() }, "queues"),
            (Options { rx_ring: 100, ..Options::default() }, "rx_ring"),
            (Options { tx_ring: 8192, ..Options::default() }, "tx_ring"),
            (Options { buffer_len: 1500, ..Options::default() }, "buffer length"),
            (Options { max_frame: 10_000, ..Options::default() }, "max_frame"),
            (Options { interrupt: Some(Duration::from_millis(9)), ..Options::default() }, "interrupt interval"),
        ] {
            let error = Nic::new(&device, options).await.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    });
}

#[test]
fn the_link_goes_down_and_up() {
    for interrupt in [None, Some(Duration::from_micros(20))] {
        run(Idle::Hybrid, async {
            if is_real() {
                return;
            }
            let pair = Pair::new();
            let (a, b) = pair.up(Options { interrupt, ..Options::default() }).await;
            let mut changes = b.nic.link_changes();
            assert!(changes.next().await.unwrap().unwrap().up);
            for _ in 0..3 {
                pair.handles[0].set_link(false);
                assert_eq!(changes.next().await.unwrap().unwrap(), LinkState::default());
                while a.nic.link().await.unwrap().to_string() != "down" {
                    yield_now().await;
                }
                pair.handles[0].set_link(true);
                assert_eq!(changes.next().await.unwrap().unwrap().to_string(), "up, 1000 Mb/s, full duplex");
            }
            b.nic.stop().await.unwrap();
            assert!(matches!(changes.next().await, Some(Err(Error::Stopped))) && changes.next().await.is_none());
            a.nic.stop().await.unwrap();
        });
    }
}

/// The seeds of the frames that arrive within a short while.
async fn arrivals(port: &mut Port) -> Vec<u8> {
    let mut seen = Vec::new();
    while let Ok(packet) = timeout(Duration::from_millis(50), port.rx.recv()).await {
        seen.push(packet.unwrap().data()[59]);
    }
    seen
}

#[test]
fn filters() {
    run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options::default()).await;
        let (us, other, group) = (b.nic.mac(), [2, 9, 9, 9, 9, 9], [1, 0, 0x5e, 1, 2, 3]);
        let mut round = 0u8;
        // Which of: us, everybody, another station, a group.
        let mut send_all = async |a: &mut Port| {
            round += 4;
            for (i, to) in [us, [0xff; 6], other, group].into_iter().enumerate() {
                let mut bytes = frame(to, a.nic.mac(), 60, 0);
                bytes[59] = round + i as u8;
                a.send(&bytes).await;
            }
            round
        };
        let first = send_all(&mut a).await;
        assert_eq!(arrivals(&mut b).await, [first, first + 1]);
        b.nic.add_mac(other).await.unwrap();
        let first = send_all(&mut a).await;
        assert_eq!(arrivals(&mut b).await, [first, first + 1, first + 2]);
        b.nic.remove_mac(other).await.unwrap();
        b.nic.set_multicast(&[group]).await.unwrap();
        let first = send_all(&mut a).await;
        assert_eq!(arrivals(&mut b).await, [first, first + 1, first + 3]);
        b.nic.set_multicast(&[]).await.unwrap();
        b.nic.set_promiscuous(true).await.unwrap();
        let first = send_all(&mut a).await;
        assert_eq!(arrivals(&mut b).await, [first, first + 1, first + 2, first + 3]);
        b.nic.set_promiscuous(false).await.unwrap();
        let first = send_all(&mut a).await;
        assert_eq!(arrivals(&mut b).await, [first, first + 1]);
        for i in 0..23 {
            b.nic.add_mac([2, 8, 8, 8, 8, i]).await.unwrap();
        }
        assert!(b.nic.add_mac(other).await.unwrap_err().to_string().contains("set_promiscuous"));
        let statistics = b.nic.statistics().await.unwrap();
        assert_eq!((statistics.rx_broadcast, statistics.rx_multicast), (5, 2));
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn what_is_too_long_is_counted() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let mut a = Port::new(&pair.device(0).await, Options { max_frame: 9728, ..Options::default() }).await;
        let mut b = Port::new(&pair.device(1).await, Options::default()).await;
        a.linked().await;
        b.linked().await;
        for len in [1514, 1600, 9000, 60] {
            a.send(&frame(b.nic.mac(), a.nic.mac(), len, 1)).await;
        }
        assert_eq!((b.rx.recv().await.unwrap().len(), b.rx.recv().await.unwrap().len()), (1514, 60));
        assert_eq!(b.nic.statistics().await.unwrap().rx_oversize, 2);
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn stopped_and_brought_up_again() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let devices = [pair.device(0).await, pair.device(1).await];
        for round in 0..4 {
            let mut a = Port::new(&devices[0], Options::default()).await;
            let mut b = Port::new(&devices[1], Options::default()).await;
            a.linked().await;
            b.linked().await;
            let sent = frame(b.nic.mac(), a.nic.mac(), 500, round);
            for _ in 0..100 {
                a.send(&sent).await;
            }
            assert_eq!(b.rx.recv().await.unwrap().data(), sent);
            // In the midst of packets that come and go.
            let memory = [a.nic.memory().clone(), b.nic.memory().clone()];
            let (one, other) = (a.nic.clone(), b.nic.clone());
            one.stop().await.unwrap();
            other.stop().await.unwrap();
            drop((a, b));
            sleep(Duration::from_millis(1)).await;
            for memory in memory {
                assert_eq!((memory.stats().free, memory.stats().quarantined), (memory.stats().bytes, 0));
            }
        }
    });
}

#[test]
fn a_server_that_dies_ends_everything() {
    run(Idle::Hybrid, async {
        if is_real() {
            return;
        }
        let (mut a, mut b) = two(Options { interrupt: Some(Duration::from_micros(20)), ..Options::default() }).await;
        let (one, _other) = a.servers.take().unwrap();
        for seed in 0..50 {
            a.send(&frame(b.nic.mac(), a.nic.mac(), 500, seed)).await;
        }
        b.rx.recv().await.unwrap();
        let start = Instant::now();
        drop(one);
        let error = a.rx.recv().await.unwrap_err();
        assert!(matches!(error, Error::Runtime(_)), "{error}");
        while a.tx.ready().await.is_ok() {}
        assert!(a.nic.link().await.is_err());
        let changes: Vec<_> = a.nic.link_changes().collect().await;
        assert!(matches!(changes[..], [Err(_)]));
        let memory = a.nic.memory().clone();
        assert!(a.nic.stop().await.is_err());
        drop((a.rx, a.tx));
        assert!(start.elapsed() < Duration::from_secs(30));
        // Nobody has said that it does not write any more.
        assert!(memory.stats().quarantined > 0);
        // The other one has no link any more.
        let mut changes = b.nic.link_changes();
        while changes.next().await.unwrap().unwrap().up {}
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn registers_that_are_not_mapped() {
    run(Idle::Hybrid, async {
        let config = || Config { mapped_queues: false, ..Config::default() };
        let pair = Pair::with(config(), config());
        for interrupt in [None, Some(Duration::ZERO)] {
            let (mut a, mut b) = pair.up(Options { interrupt, ..Options::default() }).await;
            for seed in 0..300 {
                let sent = frame(b.nic.mac(), a.nic.mac(), 60 + seed, seed as u64);
                a.send(&sent).await;
                assert_eq!(b.rx.recv().await.unwrap().data(), sent);
            }
            a.nic.stop().await.unwrap();
            b.nic.stop().await.unwrap();
        }
    });
}
