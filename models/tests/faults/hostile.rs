//! A device that lies.

use std::time::Duration;

use futures::{FutureExt, StreamExt};
use vfio_uring::{Error, fault::Options, reactor::sleep};
use vfio_uring_models::faults::{Config, Form, Word};

use crate::common::{FORMS, Rig, config, failure, next, number, run};

/// The words of a header by what they are.
fn word(form: Form, what: &str) -> Word {
    match (what, form) {
        ("entries", Form::TwoRegion) | ("entry size", Form::Single) => Word::Second,
        ("entries", Form::Single) | ("entry size", Form::TwoRegion) => Word::Third,
        ("offset", _) => Word::Offset,
        ("producer", _) => Word::Produced,
        ("lost", _) => Word::Lost,
        ("consumer", Form::Single) => Word::First,
        _ => panic!("{what}"),
    }
}

const WRONG: [(&str, u32, &str); 14] = [
    ("entries", 0, "0 entries"),
    ("entries", 1, "1 entries"),
    ("entries", 65, "beyond its region"),
    ("entries", 1 << 20, "beyond its region"),
    ("entries", u32::MAX, "4294967295 entries"),
    ("entry size", 0, "entries of 0 bytes"),
    ("entry size", 47, "entries of 47 bytes"),
    ("entry size", 65, "beyond its region"),
    ("entry size", u32::MAX, "entries of 4294967295 bytes"),
    ("offset", 0, "inside of its header"),
    ("offset", 4097, "beyond its region"),
    ("offset", u32::MAX, "beyond its region"),
    ("producer", 64, "its producer is 64, of 64 entries"),
    ("producer", u32::MAX, "its producer is 4294967295"),
];

#[test]
fn a_header_that_can_not_be_is_refused_at_the_start() {
    run(async {
        for form in FORMS {
            for (what, value, says) in WRONG {
                let rig = Rig::new(config(form)).await;
                rig.handle.lie(word(form, what), Some(value));
                let error = rig.open(Options::default()).await.expect_err(what);
                assert!(matches!(error, Error::DeviceFault { .. }) && error.to_string().contains(says), "{what}: {error}");
                // Nothing is left behind.
                rig.handle.lie(word(form, what), None);
                let mut queue = rig.open(Options::default()).await.unwrap();
                rig.handle.storm(1);
                while next(&mut queue).await.faults.is_empty() {}
            }
        }
    });
}

#[test]
fn a_header_that_changes_ends_the_stream() {
    run(async {
        let later = [
            ("entries", 32, "it changed while it was read"),
            ("entry size", 48, "it changed while it was read"),
            ("offset", 4095, "it changed while it was read"),
            ("producer", 64, "its producer is 64"),
            ("producer", u32::MAX, "its producer is"),
            ("lost", u32::MAX, "went back"),
        ];
        for form in FORMS {
            for (what, value, says) in later {
                let rig = Rig::new(config(form)).await;
                let mut queue = rig.open(Options::default()).await.unwrap();
                rig.handle.storm(2);
                assert_eq!([number(&next(&mut queue).await), number(&next(&mut queue).await)], [0, 1]);
                rig.handle.lie(word(form, what), Some(value));
                rig.handle.storm(1);
                let error = failure(&mut queue).await;
                assert!(matches!(error, Error::DeviceFault { .. }) && error.to_string().contains(says), "{what}: {error}");
                rig.handle.lie(word(form, what), None);
                drop(queue);
                assert!(rig.open(Options::default()).await.is_ok());
            }
        }
    });
}

#[test]
fn the_consumer_is_where_it_was_written() {
    run(async {
        let rig = Rig::new(config(Form::Single)).await;
        rig.handle.lie(word(Form::Single, "consumer"), Some(64));
        let error = rig.open(Options::default()).await.unwrap_err().to_string();
        assert!(error.contains("its consumer is 64"), "{error}");
        rig.handle.lie(word(Form::Single, "consumer"), None);
        let mut queue = rig.open(Options::default()).await.unwrap();
        rig.handle.lie(word(Form::Single, "consumer"), Some(7));
        rig.handle.storm(1);
        let error = failure(&mut queue).await.to_string();
        assert!(error.contains("its consumer is at 7, where 0 was written"), "{error}");
    });
}

#[test]
fn an_entry_that_is_no_record_comes_after_those_before_it() {
    run(async {
        for form in FORMS {
            for mapped in [true, false] {
                let rig = Rig::new(Config { mapped, ..config(form) }).await;
                let mut queue = rig
                    .open(Options {
                        notify: vfio_uring::fault::Notify::Poll(Duration::from_millis(200)),
                        ..Options::default()
                    })
                    .await
                    .unwrap();
                assert!(queue.next().now_or_never().is_none());
                rig.handle.storm(3);
                rig.raised(3).await;
                rig.handle.rewrite(2, &[0xff; 48]);
                // Until that is done.
                rig.handle.storm(1);
                rig.raised(4).await;
                rig.device.region(0).unwrap().read_u32(0).await.unwrap();
                for expected in 0..2 {
                    match queue.next().await.unwrap() {
                        Ok(group) => assert_eq!(number(&group), expected),
                        Err(error) => panic!("{error}"),
                    }
                }
                let error = failure(&mut queue).await.to_string();
                assert!(error.contains("entry 2: a record of type 4294967295"), "{error}");
            }
        }
    });
}

#[test]
fn a_record_that_counts_wrong_is_refused() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(config(form)).await;
            let mut queue = rig
                .open(Options { notify: vfio_uring::fault::Notify::Poll(Duration::from_millis(200)), ..Options::default() })
                .await
                .unwrap();
            assert!(queue.next().now_or_never().is_none());
            rig.handle.storm(1);
            rig.raised(1).await;
            // Its word of padding: more than were ever lost.
            rig.handle.rewrite(0, &[1, 0, 0, 0, 9, 0, 0, 0]);
            rig.handle.storm(1);
            rig.raised(2).await;
            rig.device.region(0).unwrap().read_u32(0).await.unwrap();
            let error = failure(&mut queue).await.to_string();
            assert!(error.contains("9 faults were lost before it"), "{error}");
        }
    });
}

#[test]
fn entries_that_are_rewritten_while_they_are_read_are_harmless() {
    run(async {
        for form in FORMS {
            let rig = Rig::new(Config { version: 1, ..config(form) }).await;
            let mut queue = rig.open(Options::default()).await.unwrap();
            let (handle, stop) = (rig.handle.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
            let stopped = stop.clone();
            let liar = std::thread::spawn(move || {
                let mut byte = 0u8;
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    byte = byte.wrapping_add(1);
                    // The head stays a record; what it says changes all the time.
                    handle.rewrite(u32::from(byte) % 64, &[&[1, 0, 0, 0, 0, 0, 0, 0][..], &[byte; 40]].concat());
                    handle.storm(1);
                    std::thread::sleep(Duration::from_micros(50));
                }
            });
            for _ in 0..2000 {
                let group = next(&mut queue).await;
                assert!(group.faults.len() <= 1);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            liar.join().unwrap();
            sleep(Duration::from_millis(1)).await;
        }
    });
}
