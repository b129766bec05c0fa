//! Generator, sink, files, TAP.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use vfio_uring_models::igb::{Cause, Wire, spec::*};

use crate::support::*;

fn driver(wire: Wire) -> Driver {
    let mut driver = Driver::new(config(MAC_A, wire));
    driver.up();
    driver.rx_queue(0, 64);
    driver.tx_queue(0, 64);
    driver
}

#[test]
fn a_generator_gives_what_is_taken() {
    let mut driver = driver(Wire::generator(60, 4, 1000).unwrap());
    let mut count = 0;
    let mut ports = Vec::new();
    loop {
        driver.service();
        let Some(got) = driver.receive(0) else { break };
        assert_eq!(got.bytes[..6], MAC_A);
        let good = rx_status::IPCS | rx_status::L4CS | rx_status::IPE | rx_status::L4E;
        assert_eq!(got.status & good, rx_status::IPCS | rx_status::L4CS);
        ports.push(u16::from_be_bytes([got.bytes[34], got.bytes[35]]));
        count += 1;
    }
    assert_eq!(count, 1000);
    assert!(ports.chunks(4).all(|four| four == [1024, 1025, 1026, 1027]));
    assert_eq!(driver.counters().drops, [0; Cause::ALL.len()], "it waits for descriptors");
    driver.send(0, &frame(MAC_B, MAC_A, 60, 1));
    driver.service();
    assert_eq!(driver.counters().tx_packets, 1);
}

#[test]
fn a_sink_takes_all() {
    let mut driver = driver(Wire::Sink);
    for i in 0..200 {
        driver.send(0, &frame(MAC_B, MAC_A, 60 + i * 40, 1));
        driver.service();
    }
    let counters = driver.counters();
    assert_eq!((counters.tx_packets, counters.rx_packets), (200, 0));
    assert_eq!(counters.tx_bytes, (0..200).map(|i| 60 + i * 40).sum::<u64>());
    assert_ne!(driver.get(STATUS) & status::LU, 0);
}

#[test]
fn no_cable() {
    let mut driver = driver(Wire::Unplugged);
    driver.send(0, &frame(MAC_B, MAC_A, 60, 1));
    driver.service();
    assert_eq!((driver.dropped(Cause::NoReceiver), driver.get(STATUS) & status::LU), (1, 0));
    assert!(driver.is_done(0));
}

#[test]
fn files() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one.pcap"), dir.path().join("two.pcap"));
    let packets: Vec<_> = [60, 1514, 9724, 61].into_iter().map(|len| frame(MAC_A, MAC_B, len, len as u8)).collect();
    let mut sender = driver(Wire::pcap(None, Some(&one)).unwrap());
    for packet in &packets {
        sender.send(0, packet);
        sender.service();
    }
    drop(sender);
    assert_eq!(
        fs::metadata(&one).unwrap().len() as usize,
        24 + packets.iter().map(|packet| 16 + packet.len()).sum::<usize>()
    );
    // What was written is read, and goes on to another file.
    let mut driver = driver(Wire::pcap(Some(&one), Some(&two)).unwrap());
    for packet in &packets {
        driver.service();
        assert_eq!(driver.receive(0).unwrap().bytes, *packet);
        driver.send(0, packet);
    }
    driver.service();
    assert!(driver.receive(0).is_none());
    drop(driver);
    assert_eq!(fs::metadata(&one).unwrap().len(), fs::metadata(&two).unwrap().len());
}

#[test]
fn files_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.pcap");
    // The other byte order, nanoseconds, a short packet, one that is too long, and an end in the middle of a packet.
    let mut bytes: Vec<u8> = [0xa1b2_3c4du32, 2 << 16 | 4, 0, 0, 65535, 1].into_iter().flat_map(u32::to_be_bytes).collect();
    let short = frame(MAC_A, MAC_B, 30, 1);
    let long = frame(MAC_A, MAC_B, 20_000, 1);
    let plain = frame(MAC_A, MAC_B, 100, 1);
    for packet in [&short, &long, &plain] {
        let len = packet.len() as u32;
        bytes.extend([1, 2, len, len].into_iter().flat_map(u32::to_be_bytes));
        bytes.extend(packet);
    }
    let whole = bytes.len();
    bytes.extend([1, 2, 60, 60].into_iter().flat_map(u32::to_be_bytes));
    bytes.extend([0; 59]);
    fs::write(&path, &bytes).unwrap();
    let mut driver = driver(Wire::pcap(Some(&path), None).unwrap());
    driver.service();
    let got = driver.receive(0).unwrap();
    assert_eq!((&got.bytes[..30], got.bytes.len()), (&short[..], 60));
    assert_eq!(driver.receive(0).unwrap().bytes, plain);
    assert_eq!(driver.receive(0), None);
    // A length that is none ends it.
    bytes.truncate(whole);
    bytes.extend([1, 2, u32::MAX, 60].into_iter().flat_map(u32::to_be_bytes));
    fs::write(&path, &bytes).unwrap();
    let mut driver = self::driver(Wire::pcap(Some(&path), None).unwrap());
    driver.service();
    assert_eq!(driver.counters().rx_packets, 2);
    // What is no such file.
    for (bytes, part) in [(vec![], "not a pcap"), (vec![7; 100], "not a pcap"), (bytes[..23].to_vec(), "not a pcap")] {
        fs::write(&path, bytes).unwrap();
        let error = Wire::pcap(Some(&path), None).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("in.pcap"), "{error}");
    }
    bytes[23] = 113;
    fs::write(&path, &bytes).unwrap();
    assert!(Wire::pcap(Some(&path), None).unwrap_err().to_string().contains("link type 113"));
    assert!(Wire::pcap(Some(dir.path()), None).is_err() && Wire::pcap(None, Some(dir.path())).is_err());
}

#[test]
fn numbers_that_are_not_possible() {
    for error in [Wire::peers(0).unwrap_err(), Wire::peers(65537).unwrap_err(), Wire::generator(59, 1, 0).unwrap_err()] {
        assert!(error.to_string().contains("are possible"), "{error}");
    }
    for name in ["", "a/b", "much-too-long-for-one", "a b"] {
        assert!(Wire::tap(name).unwrap_err().to_string().contains("no name"), "{name}");
    }
}

/// Where the system lets us: what is sent arrives at the interface.
#[test]
fn tap() {
    let name = format!("vfu{}", std::process::id() % 100_000);
    let wire = match Wire::tap(&name) {
        Ok(wire) => wire,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let mut driver = driver(wire);
    let received = |name: &str| {
        let path = format!("/sys/class/net/{name}/statistics/rx_packets");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    let Some(before) = received(&name) else { return };
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        driver.send(0, &frame([0xff; 6], MAC_A, 100, 1));
        driver.service();
        if received(&name) > Some(before) {
            break;
        }
        if driver.dropped(Cause::Io) > 0 {
            return eprintln!("skipped: the interface is down");
        }
        assert!(Instant::now() < end, "nothing arrives");
        thread::sleep(Duration::from_millis(1));
    }
    // Whatever the system sends of itself is received without harm.
    while driver.receive(0).is_some() {}
}
