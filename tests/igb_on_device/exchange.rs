//! Packets of all sizes in both directions at once, each of them compared.
//!
//! A sender has a window of packets, and goes back when the receiver gets none for a while: nothing is lost for good, and what was
//! lost on the way is counted. (QEMU's card loses one in some thousand long packets that Linux sends, before it counts them as
//! received.)

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use futures::join;
use vfio_uring::reactor::{Idle, sleep, timeout};
use vfio_uring_igb::{Buffers, Options, Packet, RxQueue, TxQueue};

use crate::{
    linux::{ETHER_TYPE, Socket},
    rig::Rig,
    support::{Port, bytes_of, frame, run},
};

/// Packets under way: as many as Linux's ring has place for, with several descriptors each.
const WINDOW: usize = 48;
/// Without progress for so long, what is under way is sent again.
const STALL: Duration = Duration::from_millis(200);
/// Bytes of a buffer of ours.
const BUFFER: usize = 2048;

/// A destination and a source.
type Ends = ([u8; 6], [u8; 6]);

/// Where the bytes of all packets are cut out of.
fn pattern() -> Vec<u8> {
    frame([0; 6], [0; 6], 64 << 10, 77)
}

/// The bytes of packet `i`: header, number, and a piece of the pattern that depends on the number, as its length does.
fn packet<'a>(i: usize, ends: Ends, pattern: &[u8], room: &'a mut Vec<u8>) -> &'a [u8] {
    let mixed = ((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize;
    let (len, at) = (60 + mixed % 8941, i * 131 % 50_000);
    room.clear();
    room.extend_from_slice(&pattern[at..at + len]);
    room[..6].copy_from_slice(&ends.0);
    room[6..12].copy_from_slice(&ends.1);
    room[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
    room[14..18].copy_from_slice(&(i as u32).to_be_bytes());
    room
}

/// The number that a packet says it has.
fn number(bytes: &[u8]) -> Option<usize> {
    if bytes.get(12..14)? != ETHER_TYPE.to_be_bytes() {
        return None;
    }
    Some(u32::from_be_bytes(bytes.get(14..18)?.try_into().ok()?) as usize)
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// Packets in all.
    count: usize,
    /// Packets that were received in order and are right.
    received: AtomicUsize,
    /// Received when another one was expected.
    others: AtomicUsize,
    /// Sent again.
    again: AtomicUsize,
}

/// The sender's place in a flow.
struct Window<'a> {
    flow: &'a Flow,
    next: usize,
    seen: (usize, Instant),
}

impl<'a> Window<'a> {
    fn new(flow: &'a Flow) -> Self {
        Self { flow, next: 0, seen: (0, Instant::now()) }
    }

    fn is_done(&self) -> bool {
        self.flow.received.load(SeqCst) == self.flow.count
    }

    /// The next packet to send, if there may be one.
    fn next(&mut self) -> Option<usize> {
        let received = self.flow.received.load(SeqCst);
        if received != self.seen.0 {
            self.seen = (received, Instant::now());
        } else if self.seen.1.elapsed() > STALL {
            self.flow.again.fetch_add(self.next - received, SeqCst);
            (self.next, self.seen.1) = (received, Instant::now());
        }
        (self.next < (received + WINDOW).min(self.flow.count)).then_some(self.next)
    }

    fn sent(&mut self) {
        self.next += 1;
    }
}

impl Flow {
    /// Looks at what came: whether it is the packet that is expected, and every byte of it.
    fn check(&self, bytes: &[u8], ends: Ends, pattern: &[u8], room: &mut Vec<u8>) {
        let Some(number) = number(bytes) else { return };
        let expected = self.received.load(SeqCst);
        if number != expected {
            self.others.fetch_add(1, SeqCst);
            return;
        }
        assert!(bytes == packet(number, ends, pattern, room), "packet {number}, of {} bytes", bytes.len());
        self.received.store(expected + 1, SeqCst);
    }

    fn told(&self) -> String {
        let [received, again, others] = [&self.received, &self.again, &self.others].map(|count| count.load(SeqCst));
        format!("{received} received, {again} sent again, {others} out of order")
    }
}

/// A packet with these bytes, in as many buffers as they take; `None`: there are not so many.
fn in_buffers(buffers: &Buffers, bytes: &[u8]) -> Option<Packet> {
    let mut all: Option<Packet> = None;
    for chunk in bytes.chunks(BUFFER) {
        let mut packet = buffers.alloc()?;
        packet.copy_from(chunk).unwrap();
        match &mut all {
            Some(all) => all.append(packet),
            None => all = Some(packet),
        }
    }
    all
}

async fn we_send(tx: &mut TxQueue, ends: Ends, flow: &Flow, pattern: &[u8]) {
    let (buffers, mut room, mut window) = (tx.buffers(), Vec::new(), Window::new(flow));
    while !window.is_done() {
        let packet = window.next().and_then(|i| in_buffers(&buffers, packet(i, ends, pattern, &mut room)));
        match packet {
            Some(packet) => {
                tx.ready().await.unwrap();
                tx.send(packet).unwrap();
                window.sent();
            }
            None => sleep(Duration::from_micros(200)).await,
        }
    }
}

async fn we_receive(rx: &mut RxQueue, ends: Ends, flow: &Flow, pattern: &[u8]) {
    let (mut batch, mut room) = (Vec::new(), Vec::new());
    while flow.received.load(SeqCst) < flow.count {
        rx.ready().await.unwrap();
        rx.rx_batch(&mut batch, 32).unwrap();
        for packet in batch.drain(..) {
            if packet.is_contiguous() {
                flow.check(packet.data(), ends, pattern, &mut room);
            } else {
                flow.check(&bytes_of(&packet), ends, pattern, &mut room);
            }
        }
    }
}

fn linux_sends(socket: &Socket, ends: Ends, flow: &Flow, end: &AtomicBool) {
    let (pattern, mut room, mut window) = (pattern(), Vec::new(), Window::new(flow));
    while !window.is_done() && !end.load(SeqCst) {
        match window.next() {
            Some(i) if socket.send(packet(i, ends, &pattern, &mut room)) => window.sent(),
            _ => thread::sleep(Duration::from_micros(200)),
        }
    }
}

fn linux_receives(socket: &Socket, ends: Ends, flow: &Flow, end: &AtomicBool) {
    let (pattern, mut bytes, mut room) = (pattern(), vec![0; 16 << 10], Vec::new());
    while flow.received.load(SeqCst) < flow.count && !end.load(SeqCst) {
        if let Some(bytes) = socket.recv(&mut bytes) {
            flow.check(bytes, ends, &pattern, &mut room);
        }
    }
}

/// Ends threads when the test does, however it does.
struct Ending(Arc<AtomicBool>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Exchanges `count` packets, half of them in each direction.
async fn verified(count: usize, interrupt: Option<Duration>) {
    let Some(rig) = Rig::open().await else { return };
    let options =
        Options { interrupt, max_frame: 9018, rx_ring: 1024, buffers: 2048, buffer_len: BUFFER, ..Options::default() };
    let Port { nic, mut rx, mut tx, .. } = rig.port(options).await;
    let (to_us, to_linux) = ((nic.mac(), rig.linux.mac), (rig.linux.mac, nic.mac()));
    let flows = [(); 2].map(|()| Arc::new(Flow { count: count / 2, ..Flow::default() }));
    let end = Ending(Arc::default());
    let start = Instant::now();
    let threads = [
        thread::spawn({
            let (socket, flow, end) = (rig.linux.socket(), flows[0].clone(), end.0.clone());
            move || linux_receives(&socket, to_linux, &flow, &end)
        }),
        thread::spawn({
            let (socket, flow, end) = (rig.linux.socket(), flows[1].clone(), end.0.clone());
            move || linux_sends(&socket, to_us, &flow, &end)
        }),
    ];
    let pattern = pattern();
    let both = async {
        join!(we_send(&mut tx, to_linux, &flows[0], &pattern), we_receive(&mut rx, to_us, &flows[1], &pattern));
    };
    let ended = timeout(Duration::from_secs(110), both).await;
    let took = start.elapsed();
    drop(end);
    let statistics = nic.statistics().await.unwrap();
    println!("{} packets in {took:?}; to Linux: {}; from Linux: {}", count, flows[0].told(), flows[1].told());
    println!("{statistics:?}");
    println!("Linux: {}", rig.linux.counters());
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    ended.expect("all packets are there in time");
    let queues = statistics.queues;
    // What the card says that it has received has arrived here.
    assert_eq!(statistics.rx_packets, queues.rx_packets);
    assert_eq!((queues.rx_bad_descriptor, queues.rx_too_long, queues.rx_device_error), (0, 0, 0));
    tx.drained().await.unwrap();
    let memory = nic.memory().clone();
    nic.stop().await.unwrap();
    drop((rx, tx));
    assert_eq!((memory.stats().free, memory.stats().quarantined), (memory.stats().bytes, 0));
}

#[test]
fn verified_packets_polled() {
    run(Idle::Hybrid, verified(60_000, None));
}

#[test]
fn verified_packets_by_interrupt() {
    run(Idle::Park, verified(40_000, Some(Duration::from_micros(50))));
}
