//! NICs behind sockets, in threads of their own, with the runtime's client.

use std::time::Duration;

use vfio_uring::{
    device::{Address, Bar, Device, Interrupt, Irq},
    dma::{DmaBuf, HugePages, Pool},
    mmio::Register,
    reactor::{Reactor, timeout, yield_now},
};
use vfio_uring_models::{
    igb::{self, Config, spec::*},
    server::Running,
};

use crate::support::{MAC_A, MAC_B, frame};

const SIZE: usize = 64;
const BUFFER: usize = 2048;

fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(Duration::from_secs(60), future).await.expect("no hang") })
}

/// A queue pair with doorbells that are stores.
struct Port {
    device: Device,
    bar: Bar,
    rings: [DmaBuf; 2],
    buffers: [DmaBuf; 2],
    tails: [Register<u32>; 2],
    next: [usize; 2],
    received: Interrupt,
    other: Interrupt,
    _pool: Pool,
}

impl Port {
    async fn open(server: &Running) -> Self {
        let device = Device::open(&server.address().parse::<Address>().unwrap()).await.unwrap();
        let bar = device.bar(0).unwrap();
        bar.write(CTRL, ctrl::RST).await.unwrap();
        bar.write(CTRL, ctrl::SLU | ctrl::FD | ctrl::RFCE | ctrl::TFCE).await.unwrap();
        let pool = Pool::new(device.dma(), 1 << 20, HugePages::No).await.unwrap();
        let rings = [pool.alloc_aligned(SIZE * 16, 128).unwrap(), pool.alloc_aligned(SIZE * 16, 128).unwrap()];
        let mut buffers = [pool.alloc(SIZE * BUFFER).unwrap(), pool.alloc(SIZE * BUFFER).unwrap()];
        buffers.iter_mut().for_each(|buffer| buffer.fill(0));
        let mut vectors = device.interrupts(Irq::MsiX, 0, 2).await.unwrap();
        bar.write(GPIE, gpie::MULTIPLE_MSIX | gpie::EIAME).await.unwrap();
        bar.write(IVAR, 0x81u32).await.unwrap();
        bar.write(IVAR_MISC, 0x80u32 << 8).await.unwrap();
        bar.write(EIAC, 3u32).await.unwrap();
        bar.write(IMS, icr::LSC).await.unwrap();
        bar.write(EIMS, 3u32).await.unwrap();
        let mut port = Self {
            tails: [RX_QUEUES, TX_QUEUES].map(|at| bar.register(at + queue::TAIL).unwrap()),
            received: vectors.pop().unwrap(),
            other: vectors.pop().unwrap(),
            device,
            bar,
            rings,
            buffers,
            next: [0; 2],
            _pool: pool,
        };
        for (i, at) in [RX_QUEUES, TX_QUEUES].into_iter().enumerate() {
            let base = port.rings[i].iova();
            port.rings[i].fill(0);
            port.bar.write(at + queue::BAL, base as u32).await.unwrap();
            port.bar.write(at + queue::BAH, (base >> 32) as u32).await.unwrap();
            port.bar.write(at + queue::LEN, (SIZE * 16) as u32).await.unwrap();
            port.bar.write(at + queue::DCTL, dctl::ENABLE).await.unwrap();
        }
        port.bar.write(RX_QUEUES + queue::SRRCTL, 2u32 | 1 << srrctl::DESCTYPE_SHIFT).await.unwrap();
        for i in 0..SIZE {
            port.describe(i);
        }
        port.bar.write(RCTL, rctl::EN | rctl::BAM | rctl::SECRC).await.unwrap();
        port.bar.write(TCTL, tctl::EN | tctl::PSP).await.unwrap();
        port.tails[0].write_after_dma(SIZE as u32 - 1);
        port
    }

    fn words(&mut self, ring: usize) -> &mut [u64] {
        self.rings[ring].as_typed_mut::<u64>().unwrap()
    }

    /// Gives a buffer for receiving.
    fn describe(&mut self, i: usize) {
        let address = self.buffers[0].iova() + (i * BUFFER) as u64;
        self.words(0)[2 * i..2 * i + 2].copy_from_slice(&[address, 0]);
    }

    async fn send(&mut self, bytes: &[u8]) {
        let i = self.next[1];
        self.next[1] = (i + 1) % SIZE;
        // The one that is to be written has to be done.
        let next = (i + 1) % SIZE;
        while self.words(1)[2 * next] != 0 && self.words(1)[2 * next + 1] >> 32 & 1 == 0 {
            yield_now().await;
        }
        self.buffers[1][i * BUFFER..i * BUFFER + bytes.len()].copy_from_slice(bytes);
        let address = self.buffers[1].iova() + (i * BUFFER) as u64;
        let command = tx::EOP | tx::RS | tx::DEXT | tx::DTYP_DATA << tx::DTYP_SHIFT | bytes.len() as u32;
        self.words(1)[2 * i..2 * i + 2].copy_from_slice(&[address, command.into()]);
        self.tails[1].write_after_dma(next as u32);
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let i = self.next[0];
        self.tails[0].read_before_dma();
        let status = self.words(0)[2 * i + 1];
        if status & 1 == 0 {
            return None;
        }
        let len = (status >> 32 & 0xffff) as usize;
        let bytes = self.buffers[0][i * BUFFER..i * BUFFER + len].to_vec();
        self.describe(i);
        self.tails[0].write_after_dma(i as u32);
        self.next[0] = (i + 1) % SIZE;
        Some(bytes)
    }
}

fn config(mac: [u8; 6]) -> Config {
    Config { mac, ..Config::default() }
}

#[test]
fn packets_between_two_threads() {
    let (one, two) = igb::pair(config(MAC_A), config(MAC_B)).unwrap();
    run(async {
        let (mut a, mut b) = (Port::open(&one).await, Port::open(&two).await);
        // There and back, more than the rings and the wire have room for; nothing is lost.
        let (mut sent, mut got, mut back) = (0u32, 0u32, 0u32);
        let packet = |to, from, i: u32| frame(to, from, 60 + i as usize * 7 % 1400, i as u8);
        while back < 3000 {
            if sent < 3000 && sent - back < 1500 {
                a.send(&packet(MAC_B, MAC_A, sent)).await;
                sent += 1;
            }
            if let Some(bytes) = b.receive() {
                assert_eq!(bytes, packet(MAC_B, MAC_A, got));
                b.send(&packet(MAC_A, MAC_B, got)).await;
                got += 1;
            }
            match a.receive() {
                Some(bytes) => {
                    assert_eq!(bytes, packet(MAC_A, MAC_B, back));
                    back += 1;
                }
                None => yield_now().await,
            }
        }
        assert_eq!(b.bar.read::<u32>(STATISTICS + 0x74).await.unwrap(), 3000);
    });
}

#[test]
fn interrupts_wake_one_who_sleeps() {
    let (a, b) = (config(MAC_A), config(MAC_B));
    let handle = a.handle.clone();
    let (one, two) = igb::pair(a, b).unwrap();
    run(async {
        let (mut a, mut b) = (Port::open(&one).await, Port::open(&two).await);
        for i in 0..20 {
            // Long enough for the servers to sleep.
            vfio_uring::reactor::sleep(Duration::from_millis(i)).await;
            let sent = frame(MAC_B, MAC_A, 100, i as u8);
            a.send(&sent).await;
            let got = loop {
                if let Some(got) = b.receive() {
                    break got;
                }
                b.received.take_count().await.unwrap();
                b.bar.write(EIMS, 2u32).await.unwrap();
            };
            assert_eq!(got, sent);
        }
        // The cable is pulled.
        while a.bar.read::<u32>(STATUS).await.unwrap() & status::LU == 0 {
            yield_now().await;
        }
        handle.set_link(false);
        loop {
            b.other.take_count().await.unwrap();
            if b.bar.read::<u32>(ICR).await.unwrap() & icr::LSC != 0
                && b.bar.read::<u32>(STATUS).await.unwrap() & status::LU == 0
            {
                break;
            }
            b.bar.write(EIMS, 1u32).await.unwrap();
        }
    });
}

#[test]
fn a_queue_that_is_off_is_left_alone() {
    let (one, two) = igb::pair(config(MAC_A), config(MAC_B)).unwrap();
    run(async {
        let (mut a, mut b) = (Port::open(&one).await, Port::open(&two).await);
        for _ in 0..40 {
            a.send(&frame(MAC_B, MAC_A, 1000, 1)).await;
        }
        // By a message, which takes effect before its reply.
        let region = b.bar.region().clone();
        region.write_u32(RX_QUEUES + queue::DCTL, 0).await.unwrap();
        b.buffers[0].fill(0);
        let ring = b.words(0).to_vec();
        for _ in 0..40 {
            a.send(&frame(MAC_B, MAC_A, 1000, 1)).await;
        }
        vfio_uring::reactor::sleep(Duration::from_millis(20)).await;
        assert!(b.buffers[0].iter().all(|&byte| byte == 0));
        assert_eq!(b.words(0), ring);
        // The same for the transmitter, and by a reset of the device.
        a.device.reset().await.unwrap();
        assert_eq!(a.bar.read::<u32>(TX_QUEUES + queue::LEN).await.unwrap(), 0);
    });
}

#[test]
fn clients_come_and_go() {
    let (one, two) = igb::pair(config(MAC_A), config(MAC_B)).unwrap();
    for round in 0..3 {
        run(async {
            let (mut a, mut b) = (Port::open(&one).await, Port::open(&two).await);
            let sent = frame(MAC_B, MAC_A, 500, round);
            // The other end listens when it has looked at its registers.
            let got = loop {
                a.send(&sent).await;
                vfio_uring::reactor::sleep(Duration::from_millis(2)).await;
                if let Some(got) = b.receive() {
                    break got;
                }
            };
            assert_eq!(got, sent);
        });
    }
    assert!(one.stats().clients() == 3 && one.stats().commands() > 0);
    one.stop().unwrap();
    two.stop().unwrap();
}
