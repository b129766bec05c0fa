//! Packets that are held, dropped late, dropped elsewhere, and memory that may not be freed.

use std::{thread, time::Duration};

use bytes::Bytes;
use vfio_uring::reactor::{Idle, sleep, timeout, yield_now};
use vfio_uring_igb::Options;

use crate::support::{frame, run, two};

#[test]
fn holding_everything_starves_and_recovers() {
    run(Idle::Hybrid, async {
        let options = Options { rx_ring: 64, buffers: 100, ..Options::default() };
        let (mut a, mut b) = two(options).await;
        let (from, to) = (a.nic.mac(), b.nic.mac());
        let mut held: Vec<Bytes> = Vec::new();
        let sent = 400;
        for seed in 0..sent {
            while a.tx.buffers().available() == 0 {
                yield_now().await;
            }
            a.send(&frame(to, from, 100, seed)).await;
            if seed < 100 {
                held.push(b.rx.recv().await.unwrap().into());
            }
        }
        a.tx.drained().await.unwrap();
        while let Ok(packet) = timeout(Duration::from_millis(100), b.rx.recv()).await {
            held.push(packet.unwrap().into());
        }
        assert_eq!(held.len(), 100, "all but those in the ring");
        for (bytes, seed) in held.iter().zip(0..) {
            assert_eq!(bytes[..], frame(to, from, 100, seed));
        }
        let statistics = b.nic.statistics().await.unwrap();
        assert!(statistics.queues.rx_starved > 0);
        // 63 more wait in the ring; the rest the NIC has dropped, and says so.
        let dropped = statistics.rx_no_buffer.max(statistics.rx_queue_dropped) + statistics.rx_missed;
        assert_eq!(dropped, sent - 100 - 63);
        // Dropped elsewhere while we wait for what is in the ring.
        let dropping = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            drop(held);
        });
        for seed in 100..163 {
            assert_eq!(b.rx.recv().await.unwrap().data(), frame(to, from, 100, seed));
        }
        dropping.join().unwrap();
        for seed in 0..500 {
            a.send(&frame(to, from, 200, seed)).await;
            assert_eq!(b.rx.recv().await.unwrap().data(), frame(to, from, 200, seed));
        }
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
    });
}

#[test]
fn bytes_outlive_the_driver() {
    let held = run(Idle::Hybrid, async {
        let (mut a, mut b) = two(Options { max_frame: 9728, ..Options::default() }).await;
        let (from, to) = (a.nic.mac(), b.nic.mac());
        for seed in 0..10 {
            a.send(&frame(to, from, 1000 + 100 * seed, seed as u64)).await;
        }
        let mut held = Vec::new();
        for seed in 0..10 {
            let packet = b.rx.recv().await.unwrap();
            held.push((Bytes::from(packet), frame(to, from, 1000 + 100 * seed, seed as u64)));
        }
        // One in parts, of which each is the buffer itself.
        a.send(&frame(to, from, 9000, 99)).await;
        let packet = b.rx.recv().await.unwrap();
        let at = packet.data().as_ptr();
        let parts: Vec<Bytes> = packet.into_segments().collect();
        assert_eq!((parts.len(), parts[0].as_ptr()), (5, at));
        assert_eq!(parts.concat(), frame(to, from, 9000, 99));
        let memory = b.nic.memory().clone();
        let packet = a.packet(&frame(to, from, 60, 0)).unwrap();
        a.nic.stop().await.unwrap();
        b.nic.stop().await.unwrap();
        drop((b.rx, b.tx));
        sleep(Duration::from_millis(1)).await;
        assert_eq!(memory.stats().bytes - memory.stats().free, 4096 * 15);
        drop(parts);
        assert_eq!(memory.stats().bytes - memory.stats().free, 4096 * 10);
        drop(packet);
        (held, memory)
    });
    // The reactor is gone, and so is the device.
    let (held, memory) = held;
    let threads: Vec<_> = held.into_iter().map(|(bytes, sent)| thread::spawn(move || assert_eq!(bytes, sent))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let stats = memory.stats();
    assert_eq!((stats.free, stats.quarantined), (stats.bytes, 0));
}

#[test]
fn without_a_stop_memory_is_given_up() {
    run(Idle::Hybrid, async {
        let options = Options { rx_ring: 64, tx_ring: 64, buffers: 10, ..Options::default() };
        let (a, b) = two(options).await;
        let memory = a.nic.memory().clone();
        drop((a.rx, a.tx));
        assert_eq!(memory.stats().quarantined, 0, "it waits for the stop");
        drop(a.nic);
        sleep(Duration::from_millis(1)).await;
        let stats = memory.stats();
        assert_eq!((stats.quarantined, stats.free), ((2 + 64) * 4096, 10 * 4096));
        b.nic.stop().await.unwrap();
    });
}
