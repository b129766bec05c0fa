//! Writes received packets to a file that tcpdump and Wireshark read. Without an argument a software NIC with a packet generator
//! is started: `cargo run --release --example pcap_dump [FILE.pcap [0000:01:00.0 [COUNT]]]`. It ends after COUNT packets (1000).

use std::{
    error::Error,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use vfio_uring::{
    device::{Address, Device},
    reactor::Reactor,
};
use vfio_uring_igb::{Nic, Options, Packet, RxQueue};
use vfio_uring_models::igb::{self, Config, Wire};

/// The classic format: magic number of times in microseconds, version 2.4, no time zone, link type Ethernet.
const HEADER: [u32; 6] = [0xa1b2_c3d4, 4 << 16 | 2, 0, 0, SNAP, 1];
/// Bytes of a packet at most.
const SNAP: u32 = 65535;

type Failure = Box<dyn Error + Send + Sync>;

/// Writes a record.
fn record(file: &mut impl Write, time: Duration, packet: &Packet) -> std::io::Result<()> {
    let len = packet.len() as u32;
    for field in [time.as_secs() as u32, time.subsec_micros(), len, len] {
        file.write_all(&field.to_le_bytes())?;
    }
    packet.segments().try_for_each(|bytes| file.write_all(bytes))
}

/// Writes `count` packets as they come.
pub async fn dump(rx: &mut RxQueue, file: &mut impl Write, count: usize) -> Result<(), Failure> {
    for field in HEADER {
        file.write_all(&field.to_le_bytes())?;
    }
    let (mut packets, mut left) = (Vec::with_capacity(32), count);
    while left > 0 {
        rx.ready().await?;
        rx.rx_batch(&mut packets, left.min(32))?;
        // Those of a batch were found at the same time.
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        left -= packets.len();
        // Written, their buffers go back to the queue.
        packets.drain(..).try_for_each(|packet| record(file, time, &packet))?;
    }
    Ok(file.flush()?)
}

/// Receives `count` packets, of all addresses, at the NIC at `address`.
pub fn run(path: &Path, address: &Address, count: usize) -> Result<(), Failure> {
    let mut file = BufWriter::new(File::create(path).map_err(|error| format!("{}: {error}", path.display()))?);
    Reactor::new()?.block_on(async {
        let device = Device::open(address).await?;
        let (nic, mut queues) =
            Nic::new(&device, Options { promiscuous: true, flow_control: true, ..Options::default() }).await?;
        let (mut rx, tx) = queues.remove(0).start()?;
        let dumped = dump(&mut rx, &mut file, count).await;
        drop((rx, tx));
        nic.stop().await?;
        dumped
    })?;
    println!("{count} packets are in {0}; tcpdump -r {0} shows them", path.display());
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().map_or_else(|| std::env::temp_dir().join("packets.pcap"), Into::into);
    let (address, count) = (arguments.next(), arguments.next().map_or(Ok(1000), |count| count.parse())?);
    if let Some(address) = address {
        return run(&path, &address.parse()?, count);
    }
    println!("no address: a software NIC in a thread of this process, with a packet generator");
    let server = igb::spawn(Config::default().with_wire(Wire::generator(100, 8, 0)?))?;
    run(&path, &server.address().parse()?, count)
}
