//! Forwards packets from one NIC to another: what the first receives the second sends, in the same buffers. Without arguments it
//! starts two software NICs, one with a packet generator, one with a sink:
//! `cargo run --release --example forward [0000:01:00.0 0000:01:00.1]`. With two addresses it forwards until it is ended.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use futures::{FutureExt, select_biased};
use vfio_uring::{
    device::{Address, Device, Options as DeviceOptions},
    reactor::{Reactor, sleep, yield_now},
};
use vfio_uring_igb::{Nic, Options, RxQueue, TxQueue};
use vfio_uring_models::igb::{self, Config, Wire};

const BATCH: usize = 32;
/// What the generator sends.
const PACKETS: u64 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(60);

type Failure = Box<dyn Error + Send + Sync>;

/// The loop: take a batch, write the addresses, send it.
pub async fn forward(mut rx: RxQueue, mut tx: TxQueue, from: [u8; 6]) -> Result<(), Failure> {
    let mut packets = Vec::with_capacity(BATCH);
    loop {
        rx.ready().await?;
        rx.rx_batch(&mut packets, BATCH)?;
        for packet in &mut packets {
            let (to, rest) = packet.data_mut().split_at_mut(6);
            to.fill(0xff);
            rest[..6].copy_from_slice(&from);
        }
        // What has no room waits for it: nothing is lost here.
        while !packets.is_empty() && tx.tx_batch(&mut packets)? == 0 {
            tx.ready().await?;
        }
        yield_now().await;
    }
}

/// Says how many packets a NIC has been given, every second, until they are `enough`.
async fn watch(nic: &Nic, enough: Option<u64>) -> Result<u64, Failure> {
    let (start, mut said, mut before) = (Instant::now(), Instant::now(), 0);
    loop {
        sleep(Duration::from_millis(20)).await;
        let sent: u64 = nic.queue_statistics().iter().map(|queue| queue.tx_packets).sum();
        if enough.is_some_and(|enough| sent >= enough) {
            return Ok(sent);
        }
        if said.elapsed() >= Duration::from_secs(1) {
            println!("{:.2} million packets per second", (sent - before) as f64 / said.elapsed().as_secs_f64() / 1e6);
            (said, before) = (Instant::now(), sent);
        }
        if enough.is_some() && start.elapsed() > PATIENCE {
            return Err(format!("{sent} packets in {} s", PATIENCE.as_secs()).into());
        }
    }
}

/// Forwards from `first` to `second`, and ends after so many packets.
pub fn run(first: &Address, second: &Address, enough: Option<u64>) -> Result<(), Failure> {
    Reactor::new()?.block_on(async {
        // The sender of a cable that can wait does.
        let options = Options { promiscuous: true, flow_control: true, ..Options::default() };
        let receiver = Device::open(first).await?;
        // Both use the same memory, so that a buffer goes from one to the other as it is.
        let shared = DeviceOptions { space: Some(receiver.dma().clone()), ..DeviceOptions::default() };
        let sender = Device::open_with(second, shared).await?;
        let (receiver, mut its_queues) = Nic::new(&receiver, options.clone()).await?;
        let (sender, mut queues) = Nic::new(&sender, options).await?;
        let (rx, _tx) = its_queues.remove(0).start()?;
        let (_rx, tx) = queues.remove(0).start()?;
        let start = Instant::now();
        let result = select_biased! {
            sent = watch(&sender, enough).fuse() => sent,
            ended = forward(rx, tx, sender.mac()).fuse() => ended.map(|()| 0),
        };
        let time = start.elapsed();
        drop((_rx, _tx));
        let statistics = receiver.statistics().await?;
        receiver.stop().await?;
        sender.stop().await?;
        let (sent, lost) = (result?, statistics.rx_no_buffer + statistics.rx_missed + statistics.rx_queue_dropped);
        let rate = sent as f64 / time.as_secs_f64() / 1e6;
        println!("{sent} packets in {:.2} s: {rate:.2} million per second, {lost} dropped", time.as_secs_f64());
        Ok(())
    })
}

/// On software NICs.
pub fn embedded() -> Result<(), Failure> {
    println!("no addresses: two software NICs in threads of this process, one with a packet generator, one with a sink");
    let config = Config::default().with_wire(Wire::Sink);
    let counted = config.handle.clone();
    let source = igb::spawn(Config::default().with_wire(Wire::generator(60, 16, PACKETS)?))?;
    let sink = igb::spawn(config)?;
    run(&source.address().parse()?, &sink.address().parse()?, Some(PACKETS))?;
    println!("the sink got {}", counted.counters().tx_packets);
    Ok(())
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => embedded(),
        [first, second] => run(&first.parse()?, &second.parse()?, None),
        _ => Err("give two addresses, or none".into()),
    }
}
