//! The examples with NICs, as they run without arguments: on software NICs.

use std::{fs, sync::mpsc, thread, time::Duration};

use vfio_uring_models::igb::{self, Config, Wire};

#[path = "../examples/echo_server.rs"]
#[expect(dead_code, reason = "its main function")]
mod echo_server;
#[path = "../examples/forward.rs"]
#[expect(dead_code, reason = "its main function")]
mod forward;
#[path = "../examples/pcap_dump.rs"]
#[expect(dead_code, reason = "its main function")]
mod pcap_dump;
#[path = "../examples/ping_responder.rs"]
#[expect(dead_code, reason = "its main function")]
mod ping_responder;

/// Runs `example` to its end, which is soon.
fn ends<E: ToString>(example: impl FnOnce() -> Result<(), E> + Send + 'static) {
    let (sender, result) = mpsc::channel();
    thread::spawn(move || sender.send(example().map_err(|error| error.to_string())));
    result.recv_timeout(Duration::from_secs(120)).expect("an end").unwrap();
}

#[test]
fn a_client_gets_its_bytes_back() {
    ends(echo_server::both);
}

#[test]
fn pings_are_answered() {
    ends(ping_responder::both);
}

#[test]
fn requests_that_are_cut_off() {
    let (mac, ip) = ([2, 0, 0, 0, 0, 1], "192.0.2.1".parse().unwrap());
    let arp = [&[0xff; 6][..], &[2; 6], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[2; 10], &[0; 6], &[192, 0, 2, 1]].concat();
    let mut echo = [&[2, 0, 0, 0, 0, 1][..], &[2; 6], &[8, 0, 0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 1, 0, 0]].concat();
    echo.extend([192, 0, 2, 2, 192, 0, 2, 1, 8, 0, 0xf7, 0xfe, 0, 0, 0, 1]);
    for (frame, least) in [(arp, 42), (echo, 38)] {
        for len in 0..=frame.len() {
            let answered = ping_responder::answer(&mut frame[..len].to_vec(), mac, ip).is_some();
            assert_eq!(answered, len >= least, "{len} bytes");
        }
        for at in [12, 13, 14, 20, 23, 34, 41] {
            // What is something else is let alone, or it is none of these bytes that says what it is.
            let mut other = frame.clone();
            other[at] ^= 0x11;
            let before = other.clone();
            assert!(ping_responder::answer(&mut other, mac, ip).is_some() || other == before);
        }
    }
}

#[test]
fn packets_are_forwarded() {
    let sink = Config::default().with_wire(Wire::Sink);
    let counted = sink.handle.clone();
    let source = igb::spawn(Config::default().with_wire(Wire::generator(60, 4, 20_000).unwrap())).unwrap();
    let sink = igb::spawn(sink).unwrap();
    let (first, second) = (source.address().parse().unwrap(), sink.address().parse().unwrap());
    ends(move || forward::run(&first, &second, Some(20_000)));
    assert_eq!(counted.counters().tx_packets, 20_000);
}

#[test]
fn a_file_that_can_be_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, again) = (dir.path().join("one.pcap"), dir.path().join("two.pcap"));
    let dump = |wire: Wire, path: &std::path::Path| {
        let server = igb::spawn(Config::default().with_wire(wire)).unwrap();
        let (address, path) = (server.address().parse().unwrap(), path.to_path_buf());
        ends(move || pcap_dump::run(&path, &address, 100));
    };
    dump(Wire::generator(100, 8, 0).unwrap(), &path);
    let written = fs::read(&path).unwrap();
    assert_eq!(written.len(), 24 + 100 * (16 + 100));
    dump(Wire::pcap(Some(&path), None).unwrap(), &again);
    let replayed = fs::read(&again).unwrap();
    let packets = |file: &[u8]| file[24..].chunks(116).map(|record| record[16..].to_vec()).collect::<Vec<_>>();
    assert_eq!(packets(&written), packets(&replayed));
}
