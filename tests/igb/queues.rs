//! Several queues, on threads of their own.

use std::{collections::HashMap, sync::mpsc, thread, time::Duration};

use vfio_uring::reactor::{Idle, Reactor, timeout, yield_now};
use vfio_uring_igb::{Error, Nic, Options, QueueSeed};

use crate::{
    offload::udp,
    support::{Pair, Port, run},
};

const QUEUES: u16 = 4;
const FLOWS: u16 = 64;
const EACH: u16 = 20;

/// What a queue's thread saw: of each flow, how many packets.
type Seen = HashMap<u16, u16>;

/// Receives until the NIC is stopped.
fn receive(seed: QueueSeed, idle: Idle, seen: &mpsc::Sender<(u16, u16)>) -> Seen {
    Reactor::builder().idle(idle).build().unwrap().block_on(async {
        let (mut rx, tx) = seed.start().unwrap();
        let mut flows = Seen::new();
        let error = loop {
            let packet = match timeout(Duration::from_secs(100), rx.recv()).await.expect("no hang") {
                Ok(packet) => packet,
                Err(error) => break error,
            };
            let port = u16::from_be_bytes([packet.data()[34], packet.data()[35]]);
            let hash = packet.rss().expect("it is hashed");
            assert_eq!((hash.kind, hash.value as u16 % QUEUES), (7, rx.index()));
            *flows.entry(port).or_default() += 1;
            let _ = seen.send((rx.index(), port));
        };
        assert!(matches!(error, Error::Stopped), "{error}");
        drop(tx);
        flows
    })
}

fn spread(idle: Idle, interrupt: Option<Duration>) {
    run(Idle::Hybrid, async move {
        let pair = Pair::new();
        let mut a = Port::new(&pair.device(0).await, Options::default()).await;
        let options = Options { queues: QUEUES, interrupt, flow_control: true, ..Options::default() };
        let (nic, seeds) = Nic::new(&pair.device(1).await, options).await.unwrap();
        let (seen, arrived) = mpsc::channel();
        let threads: Vec<_> = seeds
            .into_iter()
            .map(|seed| {
                let seen = seen.clone();
                thread::spawn(move || receive(seed, idle, &seen))
            })
            .collect();
        a.linked().await;
        while !nic.link().await.unwrap().up {
            yield_now().await;
        }
        for _ in 0..EACH {
            for flow in 0..FLOWS {
                a.send(&udp(nic.mac(), a.nic.mac(), 1000 + flow, 50)).await;
            }
        }
        let mut count = 0;
        while count < FLOWS * EACH {
            match arrived.try_recv() {
                Ok(_) => count += 1,
                Err(_) => yield_now().await,
            }
        }
        let memory = nic.memory().clone();
        let statistics = nic.queue_statistics();
        assert!(statistics.iter().all(|queue| queue.rx_packets > 0), "{statistics:?}");
        nic.stop().await.unwrap();
        let seen: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let mut all = Seen::new();
        for flows in seen {
            assert!(!flows.is_empty(), "a queue has nothing");
            for (flow, packets) in flows {
                assert_eq!((packets, all.insert(flow, packets)), (EACH, None), "a flow is in one queue");
            }
        }
        assert_eq!(all.len(), usize::from(FLOWS));
        assert_eq!((memory.stats().free, memory.stats().quarantined), (memory.stats().bytes, 0));
        a.nic.stop().await.unwrap();
    });
}

#[test]
fn rss_spreads_flows_over_threads() {
    spread(Idle::Hybrid, None);
}

#[test]
fn rss_spreads_flows_over_threads_that_sleep() {
    spread(Idle::Park, Some(Duration::from_micros(20)));
}

#[test]
fn seeds_that_are_dropped_or_too_late() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let (nic, mut seeds) = Nic::new(&pair.device(0).await, Options { queues: 3, ..Options::default() }).await.unwrap();
        let memory = nic.memory().clone();
        drop(seeds.pop());
        let started = seeds.pop().unwrap().start().unwrap();
        drop(started);
        nic.stop().await.unwrap_err();
        drop(seeds.pop());
        let stats = memory.stats();
        assert_eq!((stats.quarantined, stats.free), (0, stats.bytes));
    });
}

#[test]
fn the_table_is_changed() {
    run(Idle::Hybrid, async {
        let pair = Pair::new();
        let mut a = Port::new(&pair.device(0).await, Options::default()).await;
        let (nic, seeds) = Nic::new(&pair.device(1).await, Options { queues: 2, ..Options::default() }).await.unwrap();
        let mut queues: Vec<_> = seeds.into_iter().map(|seed| seed.start().unwrap()).collect();
        a.linked().await;
        let mut rss = vfio_uring_igb::Rss { table: Some([1; 128]), ..Default::default() };
        nic.set_rss(Some(&rss)).await.unwrap();
        for flow in 0..20 {
            a.send(&udp(nic.mac(), a.nic.mac(), flow, 50)).await;
        }
        for _ in 0..20 {
            queues[1].0.recv().await.unwrap();
        }
        rss.table = Some([2; 128]);
        assert!(nic.set_rss(Some(&rss)).await.unwrap_err().to_string().contains("queue 2"));
        nic.set_rss(None).await.unwrap();
        a.send(&udp(nic.mac(), a.nic.mac(), 1, 50)).await;
        assert_eq!(queues[0].0.recv().await.unwrap().rss(), None);
        nic.stop().await.unwrap();
        a.nic.stop().await.unwrap();
    });
}
