//! What a driver does when its device uses an address that is not mapped. It needs no hardware and no root: the device is a software
//! edu in this process, which has QEMU's registers and, besides, a fault queue.
//! `cargo run --example fault_queue [two-region|single-region]`
//!
//! The IOMMU sits between a device and memory. A device that uses an address which nobody has mapped gets nothing there, and its
//! driver would never know why: registers say nothing of it. The IOMMU puts a record into the fault queue.

use std::{error::Error, time::Duration};

use futures::StreamExt;
use vfio_uring::{
    device::{Device, Region},
    dma::HugePages,
    fault::{Answer, Fault, FaultGroup, FaultQueue, Lost, Options, Permissions},
    reactor::{Reactor, sleep, timeout},
};
use vfio_uring_models::{
    edu::{self, register},
    faults::{Config, Form, Handle},
};

/// Entries of the device's fault queue: few, so that it is soon full.
const ENTRIES: u32 = 16;
/// An address that is not mapped at first.
const NOWHERE: u64 = 0x0bad_0000;
/// Nothing here takes so long.
const LIMIT: Duration = Duration::from_secs(30);

/// Has the device copy `len` bytes of its buffer to `iova`.
async fn start(bar: &Region, iova: u64, len: u64) -> vfio_uring::Result<()> {
    bar.write_u64(register::DMA_SOURCE, edu::BUFFER).await?;
    bar.write_u64(register::DMA_DESTINATION, iova).await?;
    bar.write_u64(register::DMA_COUNT, len).await?;
    bar.write_u64(register::DMA_COMMAND, edu::DMA_START | edu::DMA_TO_MEMORY).await
}

/// Waits until the copy has ended, well or not.
async fn ended(bar: &Region) -> vfio_uring::Result<()> {
    while bar.read_u64(register::DMA_COMMAND).await? & edu::DMA_START != 0 {
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn next(faults: &mut FaultQueue) -> Result<FaultGroup, Box<dyn Error>> {
    Ok(faults.next().await.ok_or("the fault queue has ended")??)
}

fn access(permissions: Permissions) -> &'static str {
    if permissions.contains(Permissions::WRITE) { "a write" } else { "a read" }
}

fn show(fault: &Fault) {
    match fault {
        Fault::Unrecoverable(fault) => {
            let address = fault.address.unwrap_or_default();
            println!("    fault: {} at {address:#x}: {}", access(fault.permissions), fault.reason)
        }
        Fault::PageRequest(request) => println!(
            "    page request of group {}: {} at {:#x}",
            request.group_index,
            access(request.permissions),
            request.address
        ),
    }
}

async fn tour(device: &Device, handle: &Handle) -> Result<(), Box<dyn Error>> {
    device.set_bus_master(true).await?;
    let bar = device.region(0)?;
    println!("1. The device is open; its register at 0 says {:#010x}: an edu.", bar.read_u32(register::ID).await?);

    let mut faults = FaultQueue::open(device, Options::default()).await?;
    if let FaultQueue::Region(queue) = &faults {
        let geometry = queue.geometry();
        println!(
            "2. It has a fault queue in the form {:?}. Both sides know version {} of it, so that is used.",
            queue.form(),
            queue.version()
        );
        println!(
            "   It holds up to {} faults in entries of {} bytes; they are read {}.",
            geometry.entries - 1,
            geometry.entry_size,
            if queue.is_mapped() { "from mapped memory" } else { "by messages" }
        );
    }

    println!("3. The device is told to write 8 bytes to {NOWHERE:#x}, where nothing is mapped.");
    start(&bar, NOWHERE, 8).await?;
    ended(&bar).await?;
    println!("   It says that it is done. The fault queue knows better:");
    next(&mut faults).await?.faults.iter().for_each(show);

    let _memory = device.dma().map_at(NOWHERE, 4096, HugePages::No).await?;
    device.dma().write(NOWHERE, &[0xff; 4096])?;
    println!("4. A page of memory is mapped at {NOWHERE:#x}, and the device tries again.");
    start(&bar, NOWHERE, 8).await?;
    ended(&bar).await?;
    let mut bytes = [0x55; 9];
    device.dma().read(NOWHERE, &mut bytes)?;
    assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0xff]);
    println!("   The 8 bytes are there, and there is no fault.");

    println!("5. The device runs wild: 1000 faults while nobody reads the queue, which has room for {}.", ENTRIES - 1);
    handle.storm(1000);
    while handle.counters().stored + handle.counters().lost < 1001 {
        sleep(Duration::from_millis(1)).await;
    }
    let (mut read, mut lost) = (0, 0);
    while read + lost < 1000 {
        let group = next(&mut faults).await?;
        if let Some(Lost::Count(count)) = group.lost {
            println!("   after {read} faults: {count} were lost here, since the queue was full.");
            lost += count;
        }
        read += group.faults.len() as u64;
    }
    println!("   {read} faults were read and {lost} are known to be lost: all 1000 are accounted for.");

    handle.ask_for_pages(true);
    start(&bar, NOWHERE + 4096, 8).await?;
    let group = next(&mut faults).await?;
    if let Some(id) = group.id {
        println!("6. Now the device asks for a page that is missing, and waits:");
        group.faults.iter().for_each(show);
        faults.respond(id, Answer::Invalid).await?;
        ended(&bar).await?;
        println!("   The answer is that it can't be had, and the device gives up.");
    } else {
        println!("6. This form has no way to answer, so the device does not ask for pages:");
        group.faults.iter().for_each(show);
    }
    Ok(faults.close().await?)
}

/// All of it, for a form of the fault queue.
pub fn run(form: Form) -> Result<(), Box<dyn Error>> {
    let config = Config { entries: ENTRIES, ..Config::new(form)? };
    let handle = config.handle.clone();
    let server = edu::spawn(edu::Config { faults: Some(config), ..edu::Config::default() })?;
    let address = server.address().parse()?;
    Reactor::new()?.block_on(async {
        let device = Device::open(&address).await?;
        timeout(LIMIT, tour(&device, &handle)).await?
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None | Some("single-region") => run(Form::Single),
        Some("two-region") => run(Form::TwoRegion),
        Some(other) => Err(format!("{other}: there are two-region and single-region").into()),
    }
}
