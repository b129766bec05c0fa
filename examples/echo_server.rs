//! A TCP echo server on a NIC of its own: no kernel in between, the TCP/IP stack is smoltcp. Without an argument it starts two
//! software NICs with a cable between them and runs the server on one and a client on the other:
//! `cargo run --release --example echo_server [0000:01:00.0 [192.0.2.1/24]]`. With an address it serves until it is ended.

use std::{
    error::Error,
    thread,
    time::{Duration, Instant},
};

use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, future::try_join, select_biased};
use smoltcp::wire::{IpAddress, IpCidr, IpEndpoint};
use vfio_uring::{
    device::{Address, Device},
    reactor::{Reactor, sleep, spawn, timeout},
};
use vfio_uring_igb::{
    Nic, Options,
    smoltcp::{NicDevice, Stack, TcpStream},
};
use vfio_uring_models::igb;

const PORT: u16 = 7;
/// What the client sends, and how long it may wait for all of it.
const BYTES: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

type Failure = Box<dyn Error + Send + Sync>;

/// Brings up the NIC at `address`, and has `body` use the stack on it, on a reactor of this thread.
fn on_nic(
    address: &Address,
    ip: IpCidr,
    body: impl AsyncFnOnce(&Nic, &Stack) -> Result<(), Failure>,
) -> Result<(), Failure> {
    Reactor::new()?.block_on(async {
        let device = Device::open(address).await?;
        // Frames wait instead of being dropped when one end is slower.
        let options = Options { flow_control: true, ..Options::default() };
        let (nic, mut queues) = Nic::new(&device, options.clone()).await?;
        while !nic.link().await?.up {
            sleep(Duration::from_millis(10)).await;
        }
        let (rx, tx) = queues.remove(0).start()?;
        let stack = Stack::new(NicDevice::new(rx, tx, &options), nic.mac(), &[ip])?;
        nic.set_multicast(&stack.groups()).await?;
        // The stack works while the body does; by itself it only ends with the NIC.
        let result = select_biased! {
            result = body(&nic, &stack).fuse() => result,
            error = stack.run().fuse() => Err(error.into()),
        };
        drop(stack);
        nic.stop().await?;
        result
    })
}

/// Sends everything back.
async fn echo(stream: TcpStream) -> std::io::Result<u64> {
    let (reader, mut writer) = stream.split();
    let bytes = futures::io::copy(reader, &mut writer).await?;
    writer.close().await?;
    Ok(bytes)
}

/// Serves one connection after the other, each in a task; with `once` one only.
pub async fn serve(stack: &Stack, once: bool) -> Result<(), Failure> {
    loop {
        let stream = stack.accept(PORT).await?;
        let from = stream.remote().map_or("nobody".into(), |remote| remote.to_string());
        println!("server: {from} is here");
        let task = spawn(async move {
            match echo(stream).await {
                Ok(bytes) => println!("server: {from} got {bytes} bytes back and is gone"),
                Err(error) => println!("server: {from} is lost: {error}"),
            }
        });
        if once {
            return Ok(task.await?);
        }
    }
}

/// Sends bytes that don't repeat and compares what comes back.
async fn ask(stack: &Stack, server: IpEndpoint) -> Result<Duration, Failure> {
    let stream = loop {
        match stack.connect(server).await {
            Ok(stream) => break stream,
            // The other thread may not be there yet.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    };
    println!("client: connected to {server}");
    let (start, data) = (Instant::now(), (0..BYTES as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8));
    let data: Vec<u8> = data.collect();
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        writer.write_all(&data).await?;
        writer.close().await
    };
    let comparing = async {
        let (mut buf, mut same) = (vec![0; 64 << 10], 0);
        loop {
            let read = reader.read(&mut buf).await?;
            if read == 0 {
                return Ok(same);
            }
            if data.get(same..same + read) != Some(&buf[..read]) {
                return Err(std::io::Error::other(format!("after {same} bytes something else came back")));
            }
            same += read;
        }
    };
    let ((), same) = try_join(sending, comparing).await?;
    if same != BYTES {
        return Err(format!("{same} of {BYTES} bytes came back").into());
    }
    Ok(start.elapsed())
}

fn client(address: &Address, ip: IpCidr, server: IpEndpoint) -> Result<(), Failure> {
    on_nic(address, ip, async |_, stack| {
        let time = timeout(PATIENCE, ask(stack, server)).await.map_err(|_| "the server does not answer")??;
        // For the last acknowledgement, which nobody waits for.
        sleep(Duration::from_millis(50)).await;
        let rate = BYTES as f64 * 8.0 / time.as_secs_f64() / 1e6;
        println!("client: {BYTES} bytes went there and came back as they were, {rate:.0} Mbit/s each way");
        Ok(())
    })
}

/// Server and client in this process.
pub fn both() -> Result<(), Failure> {
    println!("no address: two software NICs with a cable between them, server and client are threads of this process");
    let (one, other) = igb::pair(Default::default(), Default::default())?;
    let (server_at, client_at): (Address, Address) = (one.address().parse()?, other.address().parse()?);
    let ip = |last| IpAddress::v4(192, 0, 2, last);
    let serving = thread::spawn(move || {
        on_nic(&server_at, IpCidr::new(ip(1), 24), async |_, stack| {
            timeout(PATIENCE, serve(stack, true)).await.map_err(|_| "no client comes")?
        })
    });
    let asked = client(&client_at, IpCidr::new(ip(2), 24), IpEndpoint::new(ip(1), PORT));
    let served = serving.join().map_err(|_| "the server's thread panicked")?;
    asked.and(served)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let Some(address) = arguments.next() else { return both() };
    let ip = arguments.next().unwrap_or_else(|| "192.0.2.1/24".into());
    let ip: IpCidr = ip.parse().map_err(|()| format!("{ip} is not an IP address with a prefix, as 192.0.2.1/24"))?;
    on_nic(&address.parse()?, ip, async |nic, stack| {
        let mac = nic.mac().map(|byte| format!("{byte:02x}")).join(":");
        println!("server: {} port {PORT}, MAC address {mac}; Ctrl-C ends it", ip.address());
        serve(stack, false).await
    })
}
