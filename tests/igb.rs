//! The igb driver on software NICs, over vfio-user: end to end.

mod nic;

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use nic::{Port, frame, run, two};
use vfio_uring::reactor::{Idle, sleep};
use vfio_uring_igb::{Error, LinkState, Options};

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
