//! Our card is reset, switched off or taken away while packets go to and fro: everything that waits ends in time and with the right
//! error, all memory is free again, and the card comes up again on the same handle.

use std::{
    cell::Cell,
    fs,
    process::Command,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use futures::StreamExt;
use vfio_uring::{
    Error as Runtime,
    device::{Device, State},
    dma::Pool,
    reactor::{Idle, JoinHandle, Reactor, sleep, spawn, timeout, yield_now},
};
use vfio_uring_igb::{Error, Nic, Options, Packet, QueueSeed, RxQueue, SendError, TxQueue};

use crate::{
    linux::Interface,
    rig::{Rig, names},
    support::{Pair, Port, frame, run},
};

/// Within this all that waits has to end.
const SOON: Duration = Duration::from_secs(20);
/// Bytes of each packet.
const LEN: usize = 500;

/// Our card, and somebody who sends to it all the time, and counts what it sends.
struct Wire {
    device: Device,
    peer: Peer,
    end: Arc<AtomicBool>,
    /// Packets of ours that the other end has received, all right.
    counted: Arc<AtomicU64>,
    _pair: Option<Pair>,
}

enum Peer {
    Linux(Interface),
    /// The other software card's address, and the port until it is used.
    Ours([u8; 6], Cell<Option<Port>>),
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.end.store(true, SeqCst);
    }
}

impl Wire {
    async fn open() -> Self {
        let (end, counted) = Default::default();
        if let Some(Rig { device, linux }) = Rig::open().await {
            return Self { device, peer: Peer::Linux(linux), end, counted, _pair: None };
        }
        let pair = Pair::new();
        let device = pair.device(0).await;
        let port = Port::new(&pair.device(1).await, Options::default()).await;
        let peer = Peer::Ours(port.nic.mac(), Cell::new(Some(port)));
        Self { device, peer, end, counted, _pair: Some(pair) }
    }

    fn mac(&self) -> [u8; 6] {
        match &self.peer {
            Peer::Linux(interface) => interface.mac,
            Peer::Ours(mac, _) => *mac,
        }
    }

    /// The other end begins.
    fn begin(&self, us: [u8; 6]) {
        let (sent, expected) = (frame(us, self.mac(), LEN, 1), frame(self.mac(), us, LEN, 2));
        let (end, counted) = (self.end.clone(), self.counted.clone());
        match &self.peer {
            Peer::Linux(interface) => {
                let (socket, stop) = (interface.socket(), end.clone());
                thread::spawn(move || {
                    while !stop.load(SeqCst) {
                        for _ in 0..8 {
                            // What does not go is not missed.
                            let _ = socket.send(&sent);
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                });
                let socket = interface.socket();
                thread::spawn(move || {
                    let mut room = vec![0; 16 << 10];
                    while !end.load(SeqCst) {
                        if let Some(bytes) = socket.recv(&mut room) {
                            assert!(bytes == expected, "a packet of ours at Linux");
                            counted.fetch_add(1, SeqCst);
                        }
                    }
                });
            }
            Peer::Ours(_, port) => {
                let Some(mut port) = port.take() else { return };
                drop(spawn(async move {
                    while !end.load(SeqCst) {
                        for _ in 0..8 {
                            if let Some(packet) = port.packet(&sent) {
                                let _ = port.tx.send(packet);
                            }
                        }
                        while let Some(token) = port.rx.try_recv().unwrap() {
                            assert!(token.into_packet().data() == expected, "a packet of ours at the other end");
                            counted.fetch_add(1, SeqCst);
                        }
                        sleep(Duration::from_micros(200)).await;
                    }
                }));
            }
        }
    }
}

/// What goes on with our card until it fails.
struct Load {
    nic: Nic,
    tasks: Vec<JoinHandle<Error>>,
    threads: Vec<thread::JoinHandle<Error>>,
    received: Rc<Cell<u64>>,
    memory: Pool,
}

impl Load {
    /// Queue 0 sends and receives, queue 1 waits here and queue 2 on a thread of its own for what never comes.
    async fn start(wire: &Wire, interrupt: Option<Duration>) -> Self {
        let (nic, mut seeds) = Nic::new(&wire.device, Options { queues: 3, interrupt, ..Options::default() }).await.unwrap();
        let mut changes = nic.link_changes();
        while !changes.next().await.unwrap().unwrap().up {}
        let received = Rc::new(Cell::new(0));
        let far = seeds.pop().unwrap();
        let (waiting, _waiting) = seeds.pop().unwrap().start().unwrap();
        let (rx, tx) = seeds.pop().unwrap().start().unwrap();
        let (us, them) = (nic.mac(), wire.mac());
        let tasks = vec![
            spawn(receive(rx, frame(us, them, LEN, 1), received.clone())),
            spawn(send(tx, frame(them, us, LEN, 2))),
            spawn(receive(waiting, Vec::new(), Rc::default())),
            spawn(async move {
                loop {
                    if let Err(error) = changes.next().await.unwrap() {
                        return error;
                    }
                }
            }),
        ];
        let idle = if interrupt.is_some() { Idle::Park } else { Idle::Hybrid };
        let threads = vec![thread::spawn(move || wait_far(far, idle))];
        let memory = nic.memory().clone();
        Self { nic, tasks, threads, received, memory }
    }

    /// Waits until packets flow in both directions.
    async fn flow(&self, wire: &Wire) {
        let (counted, received) = (wire.counted.load(SeqCst) + 50, self.received.get() + 50);
        let flows = async {
            while wire.counted.load(SeqCst) < counted || self.received.get() < received {
                yield_now().await;
            }
        };
        let flowing = timeout(SOON, flows).await;
        if flowing.is_err() {
            let (counted, received) = (wire.counted.load(SeqCst), self.received.get());
            panic!("no packets: {counted} sent, {received} received; {:?}", self.nic.statistics().await);
        }
    }

    /// Waits for the end of all, which is for the reason that `right` knows.
    async fn end(&mut self, right: impl Fn(&Error) -> bool) {
        let end = async {
            for task in self.tasks.drain(..) {
                let error = task.await.unwrap();
                assert!(right(&error), "{error}");
            }
            while !self.threads.iter().all(|thread| thread.is_finished()) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, end).await.expect("all that waits ends");
        for thread in self.threads.drain(..) {
            let error = thread.join().unwrap();
            assert!(right(&error), "{error}");
        }
    }
}

async fn receive(mut rx: RxQueue, expected: Vec<u8>, received: Rc<Cell<u64>>) -> Error {
    loop {
        match rx.recv().await {
            // Broadcasts of Linux's may come as well.
            Ok(packet) if packet.data()[12..14] == [0x88, 0xb5] => {
                assert!(packet.data() == expected, "a packet of {} bytes", packet.len());
                received.set(received.get() + 1);
            }
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

async fn send(mut tx: TxQueue, bytes: Vec<u8>) -> Error {
    let buffers = tx.buffers();
    let packet = || -> Option<Packet> {
        let mut packet = buffers.alloc()?;
        packet.copy_from(&bytes).unwrap();
        Some(packet)
    };
    loop {
        if let Err(error) = tx.ready().await {
            return error;
        }
        for packet in std::iter::from_fn(&packet).take(8) {
            if let Err(SendError::Ended { error, .. }) = tx.send(packet) {
                return error;
            }
        }
        // Not faster than the other end takes them.
        if let Err(error) = tx.drained().await {
            return error;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

fn wait_far(seed: QueueSeed, idle: Idle) -> Error {
    Reactor::builder().idle(idle).build().unwrap().block_on(async {
        match seed.start() {
            Ok((rx, _tx)) => receive(rx, Vec::new(), Rc::default()).await,
            Err(error) => error,
        }
    })
}

/// Nothing is left of a NIC but what was there before.
async fn nothing_is_left(device: &Device) {
    while device.dma().stats().retired > 0 {
        device.dma().reclaim().await;
    }
    let stats = device.dma().stats();
    assert_eq!((stats.mappings, stats.leaked, stats.quarantined), (0, 0, 0), "{stats:?}");
}

fn all_is_back(memory: Pool) {
    let stats = memory.stats();
    assert_eq!((stats.free, stats.quarantined), (stats.bytes, 0), "all buffers are back");
}

/// Whether the memory of the registers was not there.
fn is_unavailable(error: &Error) -> bool {
    matches!(error, Error::Runtime(error) if matches!(**error, Runtime::MmioUnavailable { .. } | Runtime::Unavailable { .. }))
}

/// In each mode, twice.
fn each(test: impl AsyncFn(&Wire, Load)) {
    for (idle, interrupt) in [(Idle::Hybrid, None), (Idle::Park, Some(Duration::from_micros(20)))] {
        run(idle, async {
            let wire = Wire::open().await;
            for round in 0..2 {
                let load = Load::start(&wire, interrupt).await;
                if round == 0 {
                    wire.begin(load.nic.mac());
                }
                load.flow(&wire).await;
                test(&wire, load).await;
                nothing_is_left(&wire.device).await;
            }
        });
    }
}

#[test]
fn reset_in_the_midst_of_traffic() {
    each(async |wire, mut load| {
        let generation = wire.device.generation();
        wire.device.reset().await.unwrap();
        assert_eq!((wire.device.state(), wire.device.generation()), (State::Live, generation + 1));
        load.end(|error| matches!(error, Error::Reset)).await;
        // It is proven that the card has forgotten all of it.
        all_is_back(load.memory);
        load.nic.stop().await.expect("nothing is left to do");
    });
}

#[test]
fn memory_off_in_the_midst_of_traffic() {
    each(async |wire, mut load| {
        wire.device.set_memory(false).await.unwrap();
        assert_eq!(wire.device.state(), State::Unavailable);
        load.end(is_unavailable).await;
        assert!(load.nic.clone().stop().await.is_err(), "it can't be reached");
        wire.device.set_memory(true).await.unwrap();
        assert_eq!(wire.device.state(), State::Live);
        // The card has noticed nothing, and has to be told to stop before its memory is free.
        load.nic.stop().await.unwrap();
        all_is_back(load.memory);
    });
}

fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Runtime(error) if matches!(**error, Runtime::Gone { .. }))
}

/// Nobody lets go of anything; the runtime does, when the time of grace is over.
#[test]
fn unbound_in_the_midst_of_traffic() {
    let Some((ours, _)) = names() else { return };
    run(Idle::Park, async {
        let wire = Wire::open().await;
        let mut load = Load::start(&wire, Some(Duration::from_micros(20))).await;
        wire.begin(load.nic.mac());
        load.flow(&wire).await;
        let (name, unbind) = (ours.clone(), format!("/sys/bus/pci/devices/{ours}/driver/unbind"));
        let unbinding = thread::spawn(move || fs::write(unbind, name).unwrap());
        load.end(is_gone).await;
        load.nic.stop().await.expect("a card that is taken away is stopped");
        all_is_back(load.memory);
        nothing_is_left(&wire.device).await;
        while !unbinding.is_finished() {
            sleep(Duration::from_millis(10)).await;
        }
        unbinding.join().unwrap();
        drop(wire);
        // For the tests that follow.
        let bind = format!(". /etc/profile; vfio {ours}");
        assert!(Command::new("/bin/sh").args(["-c", &bind]).status().unwrap().success());
    });
}
