//! A queue that is full.

use futures::StreamExt;
use vfio_uring::{
    fault::{Lost, Options},
    reactor::sleep,
};
use vfio_uring_models::faults::{Config, Form};

use crate::common::{FORMS, Rig, config, count, next, number, polled, run};

/// Reads until all of `total` faults are seen or known to be lost: each loss is told of where it was.
async fn all_in_order(rig: &Rig, queue: &mut vfio_uring::fault::FaultQueue, total: u64) {
    let mut expected = 0;
    while expected < total {
        let group = next(queue).await;
        expected += count(group.lost);
        if !group.faults.is_empty() {
            assert_eq!(number(&group), expected);
            expected += 1;
        }
    }
    assert_eq!(expected, total);
    let (stats, counters) = (queue.stats(), rig.handle.counters());
    assert_eq!((stats.faults, stats.lost), (counters.stored, counters.lost));
}

#[test]
fn what_was_lost_is_counted_and_told_in_its_place() {
    run(async {
        for form in FORMS {
            for mapped in [true, false] {
                let rig = Rig::new(Config { entries: 8, mapped, ..config(form) }).await;
                let mut queue = rig.open(Options::default()).await.unwrap();
                rig.handle.storm(100);
                rig.raised(100).await;
                assert_eq!(rig.handle.counters().lost, 93);
                for expected in 0..7 {
                    let group = next(&mut queue).await;
                    assert_eq!((number(&group), group.lost), (expected, None));
                }
                let group = next(&mut queue).await;
                assert_eq!((group.lost, group.faults.is_empty()), (Some(Lost::Count(93)), true));
                // And between two faults.
                rig.handle.storm(20);
                rig.raised(120).await;
                all_from(&mut queue, 100, 107).await;
                assert_eq!(next(&mut queue).await.lost, Some(Lost::Count(13)));
                assert_eq!(queue.stats().lost, 106);
            }
        }
    });
}

async fn all_from(queue: &mut vfio_uring::fault::FaultQueue, first: u64, end: u64) {
    for expected in first..end {
        let group = next(queue).await;
        assert_eq!((number(&group), group.lost), (expected, None));
    }
}

#[test]
fn nothing_is_missing_from_a_storm() {
    run(async {
        for form in FORMS {
            for options in [Options::default(), polled()] {
                let rig = Rig::new(Config { entries: 16, ..config(form) }).await;
                let mut queue = rig.open(options).await.unwrap();
                rig.handle.storm(30_000);
                all_in_order(&rig, &mut queue, 30_000).await;
            }
        }
    });
}

#[test]
fn a_form_without_a_count_says_perhaps() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(Config { entries: 8, version: 1, ..config(form) }).await;
            let mut queue = rig.open(Options::default()).await.unwrap();
            // Not full: nothing can be lost.
            rig.handle.storm(6);
            rig.raised(6).await;
            for expected in 0..6 {
                let group = next(&mut queue).await;
                assert_eq!((number(&group), group.lost), (expected, None));
            }
            rig.handle.storm(10);
            rig.raised(16).await;
            for expected in 6..13 {
                let group = next(&mut queue).await;
                assert_eq!((number(&group), group.lost), (expected, None));
            }
            let group = next(&mut queue).await;
            assert_eq!((group.lost, group.faults.is_empty()), (Some(Lost::Perhaps), true));
            rig.handle.storm(1);
            let group = next(&mut queue).await;
            assert_eq!((number(&group), group.lost), (16, None));
            assert_eq!((queue.stats().perhaps, queue.stats().lost), (1, 0));
        }
    });
}

#[test]
fn every_loss_without_a_count_is_told_of() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(Config { entries: 8, version: 1, ..config(form) }).await;
            let mut queue = rig.open(Options::default()).await.unwrap();
            let (mut expected, mut seen, mut raised, mut suspected) = (0, 0, 0, false);
            while raised < 5000 {
                if seen == rig.handle.counters().stored {
                    // From fewer than there is room for up to more.
                    let burst = 1 + raised % 11;
                    rig.handle.storm(burst);
                    raised += burst;
                    rig.raised(raised).await;
                }
                let group = next(&mut queue).await;
                suspected |= group.lost.is_some();
                if group.faults.is_empty() {
                    continue;
                }
                let number = number(&group);
                assert!(number == expected || suspected, "{expected} to {number} are missing, and nobody said so");
                (expected, suspected, seen) = (number + 1, false, seen + 1);
            }
            assert!(queue.stats().perhaps != 0);
        }
    });
}

#[test]
fn an_endless_producer_does_not_hold_the_reactor() {
    run(async {
        let rig = Rig::new(config(Form::Single)).await;
        let mut queue = rig.open(Options::default()).await.unwrap();
        rig.handle.storm(u64::MAX / 2);
        let reader = vfio_uring::reactor::spawn(async move {
            while let Some(group) = queue.next().await {
                group.unwrap();
            }
        });
        // Others have their turns.
        for _ in 0..50 {
            sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(!reader.is_finished());
        reader.abort();
    });
}
