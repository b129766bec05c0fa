//! What both sides agree on before there are faults, and what the software device refuses.

use vfio_uring::{Error, device::Region, fault::Options};
use vfio_uring_models::faults::{Config, Form, Word};

use crate::common::{Rig, config, failure, next, number, run};

/// The regions of the two-region form.
fn regions(rig: &Rig) -> (Region, Region) {
    (rig.device.region(9).unwrap(), rig.device.region(10).unwrap())
}

async fn refused(region: &Region, offset: u64, value: u32) -> bool {
    matches!(region.write_u32(offset, value).await, Err(Error::Refused { .. }))
}

#[test]
fn the_device_refuses_what_is_no_version() {
    run(async {
        let rig = Rig::new(config(Form::TwoRegion)).await;
        let (producer, consumer) = regions(&rig);
        assert_eq!((producer.fault_version(), consumer.fault_version()), (Some(2), None));
        assert_eq!((producer.flags() & 3, consumer.flags() & 3, consumer.size()), (1, 2, 8));
        assert!(matches!(producer.read_u32(0).await, Err(Error::Refused { .. })), "there is no version yet");
        for version in [0, 3, u32::MAX] {
            assert!(refused(&consumer, 0, version).await, "{version}");
        }
        assert!(refused(&consumer, 4, 0).await, "an index before there is a version");
        rig.handle.storm(3);
        rig.raised(3).await;
        assert_eq!(rig.handle.counters().unheard, 3);
        consumer.write_u32(0, 2).await.unwrap();
        assert_eq!(producer.read_u32(0).await.unwrap(), 2);
        assert_eq!(producer.read_u32(16).await.unwrap(), 0, "what came before is not there");
        // It can't be changed any more, only said again.
        assert!(refused(&consumer, 0, 1).await);
        consumer.write_u32(0, 2).await.unwrap();
        rig.handle.storm(3);
        rig.raised(6).await;
        for cons in [4, 63, 64, u32::MAX] {
            assert!(refused(&consumer, 4, cons).await, "the producer is at 3, {cons} is beyond");
        }
        consumer.write_u32(4, 3).await.unwrap();
        assert!(refused(&consumer, 4, 2).await, "and not back");
        assert!(consumer.read_u32(0).await.is_err());
        assert!(producer.write_u32(0, 0).await.is_err());
    });
}

#[test]
fn the_single_region_takes_its_tail_only() {
    run(async {
        let rig = Rig::new(config(Form::Single)).await;
        let (queue, answers) = (rig.device.region(9).unwrap(), rig.device.region(10).unwrap());
        assert_eq!((queue.kind(), queue.fault_version()), (Some((4, 1)), Some(2)));
        assert_eq!((answers.kind(), answers.response_version()), (Some((4, 2)), Some(1)));
        rig.handle.storm(2);
        rig.raised(2).await;
        assert_eq!(queue.read_u32(16).await.unwrap(), 2);
        assert!(refused(&queue, 4, 1).await);
        assert!(matches!(queue.write_u64(0, 1).await, Err(Error::Refused { .. })));
        assert!(refused(&queue, 0, 3).await && refused(&queue, 0, 64).await);
        queue.write_u32(0, 2).await.unwrap();
        assert_eq!(rig.device.irqs()[5].type_, Some((1, 1)));
        assert_eq!(rig.device.irqs()[5].count, 1);
    });
}

#[test]
fn a_version_may_be_asked_for() {
    run(async {
        for form in [Form::TwoRegion, Form::Single] {
            let with = |version| Options { version: Some(version), ..Options::default() };
            let rig = Rig::new(Config { version: 1, ..config(form) }).await;
            assert!(matches!(rig.open(with(0)).await, Err(Error::Invalid { .. })));
            assert!(matches!(rig.open(with(3)).await, Err(Error::Invalid { .. })));
            assert!(matches!(rig.open(with(2)).await, Err(Error::Unsupported { .. })));
            assert!(rig.open(with(1)).await.is_ok());
            let rig = Rig::new(config(form)).await;
            let mut queue = rig.open(with(1)).await.unwrap();
            rig.handle.storm(1);
            assert_eq!(number(&next(&mut queue).await), 0);
        }
    });
}

#[test]
fn another_version_than_was_agreed_on_is_a_fault() {
    run(async {
        let rig = Rig::new(config(Form::TwoRegion)).await;
        rig.handle.lie(Word::First, Some(1));
        let error = rig.open(Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::DeviceFault { .. }) && error.to_string().contains("version 2"), "{error}");
        // The series leave it as it was: that is known, and harmless.
        let rig = Rig::new(config(Form::TwoRegion)).await;
        rig.handle.lie(Word::First, Some(u32::MAX));
        let mut queue = rig.open(Options::default()).await.unwrap();
        rig.handle.storm(1);
        assert_eq!(number(&next(&mut queue).await), 0);
        rig.handle.lie(Word::First, Some(2));
        rig.handle.storm(1);
        let error = failure(&mut queue).await.to_string();
        assert!(error.contains("its version changed from 4294967295 to 2"), "{error}");
    });
}
