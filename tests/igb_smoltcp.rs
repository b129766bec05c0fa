//! The TCP/IP stack on two software NICs with a cable between them.

use std::{
    thread,
    time::{Duration, Instant},
};

use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, select_biased};
use smoltcp::{
    socket::udp,
    wire::{IpAddress, IpCidr, IpEndpoint, Ipv4Packet, UdpPacket},
};
use vfio_uring::{
    device::{Address, Device},
    reactor::{Reactor, sleep, timeout},
};
use vfio_uring_igb::{
    Nic, Options, TxQueue,
    smoltcp::{NicDevice, Stack},
};
use vfio_uring_models::igb::{self, Config, Handle};

/// How long anything may take: much longer than it does.
const DEADLINE: Duration = Duration::from_secs(60);
const PORT: u16 = 7;

fn v4(last: u8) -> IpAddress {
    IpAddress::v4(192, 0, 2, last)
}

fn v6(last: u16) -> IpAddress {
    IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, last)
}

/// Brings up the NIC at `address` with the stack on it, and runs `body` beside it.
fn with_stack(address: &str, last: u8, options: Options, body: impl AsyncFnOnce(&Nic, &Stack)) {
    let address: Address = address.parse().unwrap();
    Reactor::new().unwrap().block_on(async {
        let work = async {
            let device = Device::open(&address).await.unwrap();
            let (nic, mut seeds) = Nic::new(&device, options.clone()).await.unwrap();
            let (rx, tx) = seeds.remove(0).start().unwrap();
            let addresses = [IpCidr::new(v4(last), 24), IpCidr::new(v6(last.into()), 64)];
            let stack = Stack::new(NicDevice::new(rx, tx, &options), nic.mac(), &addresses).unwrap();
            nic.set_multicast(&stack.groups()).await.unwrap();
            select_biased! {
                () = body(&nic, &stack).fuse() => {}
                error = stack.run().fuse() => panic!("{error}"),
            }
            drop(stack);
            nic.stop().await.unwrap();
        };
        timeout(DEADLINE, work).await.expect("in time");
    });
}

/// Waits for the link.
async fn linked(nic: &Nic) {
    while !nic.link().await.unwrap().up {
        sleep(Duration::from_millis(2)).await;
    }
}

fn byte(at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b9) >> 16) as u8
}

/// Sends `len` bytes and ends; gets as many and the end.
async fn exchange(stream: impl futures::AsyncRead + futures::AsyncWrite, len: usize) {
    let (mut read, mut write) = stream.split();
    let sending = async {
        let data: Vec<u8> = (0..len).map(byte).collect();
        write.write_all(&data).await.unwrap();
        write.close().await.unwrap();
    };
    let receiving = async {
        let (mut got, mut buf) = (0, vec![0; 100_000]);
        loop {
            let read = read.read(&mut buf).await.unwrap();
            if read == 0 {
                break got;
            }
            assert!(buf[..read].iter().enumerate().all(|(at, &value)| value == byte(got + at)), "after {got} bytes");
            got += read;
        }
    };
    let ((), got) = futures::join!(sending, receiving);
    assert_eq!(got, len);
    // The last acknowledgement is on its way, and nobody waits for it.
    sleep(Duration::from_millis(500)).await;
}

/// Transfers `len` bytes both ways at once; what the NICs lost.
fn transfer(options: Options, remote: IpAddress, len: usize) {
    let (one, two) = igb::pair(Config::default(), Config::default()).unwrap();
    let (client, server) = (one.address(), two.address());
    let server_options = options.clone();
    let thread = thread::spawn(move || {
        with_stack(&server, 2, server_options, async |nic, stack| {
            linked(nic).await;
            exchange(stack.accept(PORT).await.unwrap(), len).await;
            assert_eq!(stack.drops(), Default::default());
        });
    });
    with_stack(&client, 1, options, async |nic, stack| {
        linked(nic).await;
        let start = Instant::now();
        let stream = loop {
            match stack.connect(IpEndpoint::new(remote, PORT)).await {
                Ok(stream) => break stream,
                // The other end may not listen yet.
                Err(error) => assert!(start.elapsed() < DEADLINE, "{error}"),
            }
            sleep(Duration::from_millis(5)).await;
        };
        exchange(stream, len).await;
        let statistics = nic.statistics().await.unwrap();
        assert_eq!(stack.drops(), Default::default());
        assert!(statistics.queues.rx_bytes > len as u64 && statistics.queues.tx_bytes > len as u64);
    });
    thread.join().unwrap();
}

#[test]
fn tcp_both_ways() {
    transfer(Options { flow_control: true, ..Options::default() }, v4(2), 4 << 20);
}

#[test]
fn tcp_over_ipv6_with_jumbo_frames_and_interrupts() {
    let interrupt = Some(Duration::from_micros(20));
    let jumbo = Options { max_frame: 9018, buffer_len: 9216, flow_control: true, interrupt, ..Options::default() };
    transfer(jumbo, v6(2), 4 << 20);
}

#[test]
fn tcp_without_the_nics_checks() {
    transfer(Options { checksums: false, flow_control: true, ..Options::default() }, v4(2), 1 << 20);
}

/// A UDP packet to the stack at `v4(1)`.
fn datagram(to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let [total, len] = [28, 8].map(|headers| (headers + payload.len() as u16).to_be_bytes());
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0]].concat();
    frame.extend([0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 9, 192, 0, 2, 1]);
    frame.extend([3, 232, 0, PORT as u8, len[0], len[1], 0, 0]);
    frame.extend(payload);
    Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    UdpPacket::new_unchecked(&mut frame[34..]).fill_checksum(&v4(9), &v4(1));
    frame
}

fn send(tx: &mut TxQueue, frame: &[u8]) {
    let mut packet = tx.buffers().alloc().unwrap();
    packet.copy_from(frame).unwrap();
    tx.send(packet).unwrap();
}

#[test]
fn wrong_checksums_are_dropped_and_counted() {
    for checksums in [true, false] {
        let handles = [Handle::default(), Handle::default()];
        let config = |handle: &Handle| Config { handle: handle.clone(), ..Config::default() };
        let (one, two) = igb::pair(config(&handles[0]), config(&handles[1])).unwrap();
        let sender: Address = two.address().parse().unwrap();
        // Packets come in one buffer, or in two.
        let options = Options { checksums, buffer_len: 1024, ..Options::default() };
        with_stack(&one.address(), 1, options, async |nic, stack| {
            let device = Device::open(&sender).await.unwrap();
            let (other, mut seeds) = Nic::new(&device, Options::default()).await.unwrap();
            let (_rx, mut tx) = seeds.remove(0).start().unwrap();
            linked(nic).await;
            linked(&other).await;
            let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 4096]);
            let mut socket = udp::Socket::new(buffer(), buffer());
            socket.bind(PORT).unwrap();
            let handle = stack.with(|_, sockets| sockets.add(socket));

            let good = datagram(nic.mac(), &(0..1300).map(byte).collect::<Vec<_>>());
            let mut fragment = good.clone();
            fragment[20] = 0x20;
            Ipv4Packet::new_unchecked(&mut fragment[14..]).fill_checksum();
            let wrong = |at: usize| {
                let mut frame = good.clone();
                frame[at] ^= 1;
                frame
            };
            // The header's time to live, the header's own sum, a port, the data.
            for frame in [good.clone(), wrong(22), wrong(25), wrong(35), wrong(1200), fragment, good.clone()] {
                send(&mut tx, &frame);
            }
            let mut received = 0;
            while received < 2 {
                received += usize::from(stack.with(|_, sockets| match sockets.get_mut::<udp::Socket>(handle).recv() {
                    Ok((data, from)) => {
                        assert_eq!((data, from.endpoint), (&good[42..], IpEndpoint::new(v4(9), 1000)));
                        true
                    }
                    Err(_) => false,
                }));
                sleep(Duration::from_millis(1)).await;
            }
            let drops = stack.drops();
            assert_eq!((drops.rx_checksum, drops.rx_fragments, drops.tx), (4, 1, 0), "checked by the NIC: {checksums}");
            drop((tx, _rx));
            other.stop().await.unwrap();
        });
    }
}

#[test]
fn connections_end_with_the_nic() {
    let (one, _two) = igb::pair(Config::default(), Config::default()).unwrap();
    let address: Address = one.address().parse().unwrap();
    Reactor::new().unwrap().block_on(async {
        let device = Device::open(&address).await.unwrap();
        let (nic, mut seeds) = Nic::new(&device, Options::default()).await.unwrap();
        let (rx, tx) = seeds.remove(0).start().unwrap();
        let options = nic.options().clone();
        let stack = Stack::new(NicDevice::new(rx, tx, &options), nic.mac(), &[IpCidr::new(v4(1), 24)]).unwrap();
        let stopping = async {
            sleep(Duration::from_millis(20)).await;
            nic.stop().await
        };
        let all = async { futures::join!(stack.run(), stack.accept(PORT), stack.connect((v4(2), PORT)), stopping) };
        let (ended, accepted, connected, stopped) = timeout(DEADLINE, all).await.expect("in time");
        assert!(ended.to_string().contains("stopped"), "{ended}");
        assert!(accepted.is_err() && connected.is_err() && stopped.is_ok());
        assert!(stack.accept(PORT).await.is_err());
    });
}
