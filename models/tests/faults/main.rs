//! The fault queue in regions, as the runtime reads it from a software device.

mod common;
mod hostile;
mod negotiation;
mod overflow;
mod pages;

use std::time::Duration;

use common::{FORMS, Rig, config, next, number, polled, run, unrecoverable};
use futures::{FutureExt, StreamExt};
use vfio_uring::{
    Error,
    fault::{FaultQueue, Form as QueueForm, Options, Permissions, Reason},
    reactor::sleep,
};
use vfio_uring_models::faults::{Config, Form};

/// All forms, mapped or not, in both versions, with entries of the series' two sizes.
fn configs() -> Vec<Config> {
    let mut all = Vec::new();
    for form in FORMS {
        for mapped in [true, false] {
            for (version, entry_size) in [(1, 48), (2, 64), (2, 100)] {
                all.push(Config { mapped, version, entry_size, ..config(form) });
            }
        }
    }
    all
}

#[test]
fn an_unmapped_address_is_a_fault() {
    run(async {
        for config in configs() {
            for options in [Options::default(), polled()] {
                let rig =
                    Rig::new(Config { handle: vfio_uring_models::faults::Handle::new().unwrap(), ..config.clone() }).await;
                let mut queue = rig.open(options).await.unwrap();
                let FaultQueue::Region(region) = &queue else { panic!() };
                let form = if config.form == Form::Single { QueueForm::Single } else { QueueForm::TwoRegion };
                assert_eq!((region.form(), region.version()), (form, config.version));
                assert_eq!((region.geometry().entries, region.geometry().entry_size), (64, config.entry_size));
                assert_eq!(region.is_mapped(), config.mapped);
                rig.dma_to(0x5_0010, 16).await;
                let group = next(&mut queue).await;
                let fault = unrecoverable(&group);
                assert_eq!((fault.address, fault.reason), (Some(0x5_0010), Reason::PteFetch));
                assert_eq!((fault.permissions, group.lost, group.id), (Permissions::WRITE, None, None));
                assert_eq!(queue.stats().faults, 1);
                queue.close().await.unwrap();
            }
        }
    });
}

#[test]
fn a_mapped_address_may_fault_as_well() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(config(form)).await;
            let mut queue = rig.open(Options::default()).await.unwrap();
            let pool = vfio_uring::dma::Pool::new(rig.device.dma(), 1 << 16, vfio_uring::dma::HugePages::No).await.unwrap();
            let buf = pool.alloc(4096).unwrap();
            rig.handle.fault_on(buf.iova() + 0x100..=buf.iova() + 0x1ff);
            rig.dma_to(buf.iova(), 16).await;
            rig.dma_to(buf.iova() + 0x180, 16).await;
            let fault = unrecoverable(&next(&mut queue).await);
            assert_eq!((fault.address, fault.reason), (Some(buf.iova() + 0x180), Reason::Permission));
            rig.handle.fault_on_none();
            rig.dma_to(buf.iova() + 0x180, 16).await;
            sleep(Duration::from_millis(20)).await;
            assert!(queue.next().now_or_never().is_none(), "nothing more has faulted");
        }
    });
}

#[test]
fn ten_thousand_faults_wrap_the_queue() {
    run(async {
        for config in configs() {
            let options = if config.mapped { Options::default() } else { polled() };
            let rig = Rig::new(config).await;
            let mut queue = rig.open(options).await.unwrap();
            let mut seen = 0;
            while seen < 10_300 {
                // As many as there is room for.
                rig.handle.storm(50);
                for _ in 0..50 {
                    let group = next(&mut queue).await;
                    assert_eq!(number(&group), seen);
                    seen += 1;
                }
            }
            assert_eq!((rig.handle.counters().stored, rig.handle.counters().lost), (seen, 0));
            assert_eq!((queue.stats().faults, queue.stats().lost), (seen, 0));
        }
    });
}

#[test]
fn the_queue_has_one_reader_at_a_time() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(config(form)).await;
            let mut first = rig.open(Options::default()).await.unwrap();
            let second = rig.open(Options::default()).await;
            assert!(matches!(second, Err(Error::InUse { .. })), "{second:?}");
            rig.handle.storm(1);
            next(&mut first).await;
            first.close().await.unwrap();
            // The next one goes on where the first one was.
            let mut second = rig.open(Options::default()).await.unwrap();
            rig.handle.storm(1);
            loop {
                let group = next(&mut second).await;
                if !group.faults.is_empty() {
                    assert_eq!(number(&group), 1);
                    break;
                }
            }
        }
    });
}

#[test]
fn the_next_client_finds_all_as_new() {
    run(async {
        for form in FORMS {
            let mut config = config(form);
            config.entries = 8;
            let handle = config.handle.clone();
            let server =
                vfio_uring_models::edu::spawn(vfio_uring_models::edu::Config { faults: Some(config), ..Default::default() });
            let server = server.unwrap();
            for round in 0..3 {
                let device = vfio_uring::device::Device::open(&server.address().parse().unwrap()).await.unwrap();
                let mut queue = FaultQueue::open(&device, Options::default()).await.unwrap();
                handle.storm(3);
                for _ in 0..3 {
                    let group = next(&mut queue).await;
                    assert_eq!((number(&group) / 3, group.lost), (round, None));
                }
            }
        }
    });
}

#[test]
fn a_queue_is_dropped_while_faults_arrive() {
    run(async {
        for form in FORMS {
            for options in [Options::default(), polled()] {
                let rig = Rig::new(config(form)).await;
                rig.handle.storm(1_000_000);
                for turn in 0..20 {
                    let mut queue = loop {
                        match rig.open(options.clone()).await {
                            Ok(queue) => break queue,
                            // The one before ends in a task of its own.
                            Err(Error::InUse { .. }) => sleep(Duration::from_millis(1)).await,
                            Err(error) => panic!("{error}"),
                        }
                    };
                    for _ in 0..turn {
                        next(&mut queue).await;
                    }
                    // In the middle of a look.
                    let _ = queue.next().now_or_never();
                    drop(queue);
                }
                // The device is as it was.
                rig.device.region(0).unwrap().read_u32(0).await.unwrap();
            }
        }
    });
}

#[test]
fn a_device_without_a_queue_says_so() {
    run(async {
        let server = vfio_uring_models::edu::spawn(Default::default()).unwrap();
        let device = vfio_uring::device::Device::open(&server.address().parse().unwrap()).await.unwrap();
        let error = FaultQueue::open(&device, Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_eq!((device.info().regions, device.info().irqs), (9, 5));
    });
}

#[test]
fn the_server_ends_and_so_does_the_stream() {
    run(async {
        for options in [Options::default(), polled()] {
            let server = vfio_uring_models::edu::spawn(vfio_uring_models::edu::Config {
                faults: Some(config(Form::Single)),
                ..Default::default()
            });
            let server = server.unwrap();
            let device = vfio_uring::device::Device::open(&server.address().parse().unwrap()).await.unwrap();
            let mut queue = FaultQueue::open(&device, options).await.unwrap();
            server.stop().unwrap();
            assert!(matches!(queue.next().await, Some(Err(Error::Gone { .. }))));
            assert!(queue.next().await.is_none());
        }
    });
}

#[test]
fn a_reset_leaves_the_queue_as_it_is() {
    run(async {
        for form in FORMS {
            for options in [Options::default(), polled()] {
                // There is room for all, should the reader have no turn between two resets.
                let rig = Rig::new(Config { entries: 512, ..config(form) }).await;
                let mut queue = rig.open(options).await.unwrap();
                let (device, handle) = (rig.device.clone(), rig.handle.clone());
                let resets = vfio_uring::reactor::spawn(async move {
                    for _ in 0..50 {
                        handle.storm(5);
                        device.reset().await.unwrap();
                    }
                });
                for expected in 0..250 {
                    assert_eq!(number(&next(&mut queue).await), expected);
                }
                resets.await.unwrap();
                assert_eq!(rig.device.generation(), 50);
            }
        }
    });
}
