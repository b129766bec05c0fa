//! The edu device's registers, interrupt and DMA, as a driver uses them.

use std::time::Duration;

use futures::StreamExt;
use vfio_uring::{
    device::{Device, Irq, Region},
    dma::{HugePages, Pool},
    reactor::{Reactor, sleep, timeout},
};
use vfio_uring_models::edu::{self, Config, register};

fn run<T>(config: Config, test: impl AsyncFnOnce(Device, Region) -> T) -> T {
    let server = edu::spawn(config).unwrap();
    let address = server.address().parse().unwrap();
    Reactor::new().unwrap().block_on(async {
        let work = async {
            let device = Device::open(&address).await.unwrap();
            let bar = device.region(0).unwrap();
            test(device, bar).await
        };
        timeout(Duration::from_secs(60), work).await.expect("the test took too long")
    })
}

async fn copy(bar: &Region, from: u64, to: u64, len: u64, command: u64) {
    bar.write_u64(register::DMA_SOURCE, from).await.unwrap();
    bar.write_u64(register::DMA_DESTINATION, to).await.unwrap();
    bar.write_u64(register::DMA_COUNT, len).await.unwrap();
    bar.write_u64(register::DMA_COMMAND, edu::DMA_START | command).await.unwrap();
    while bar.read_u64(register::DMA_COMMAND).await.unwrap() & edu::DMA_START != 0 {
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn registers() {
    run(Config::default(), async |device, bar| {
        let ids = device.config().ids().await.unwrap();
        assert_eq!((ids.vendor, ids.device, bar.size()), (0x1234, 0x11e8, 1 << 20));
        assert_eq!(bar.read_u32(register::ID).await.unwrap(), edu::ID);
        bar.write_u32(register::LIVENESS, 0x1234_5678).await.unwrap();
        assert_eq!(bar.read_u32(register::LIVENESS).await.unwrap(), !0x1234_5678);
        // The registers of DMA have 8 bytes and are written in halves, too.
        bar.write_u32(register::DMA_SOURCE, 1).await.unwrap();
        bar.write_u32(register::DMA_SOURCE + 4, 2).await.unwrap();
        assert_eq!(bar.read_u64(register::DMA_SOURCE).await.unwrap(), 2 << 32 | 1);
        assert_eq!(bar.read_u32(register::DMA_SOURCE + 4).await.unwrap(), 2);
        for (width, offset) in [(1, 0), (2, 0), (8, 0), (4, 2), (8, 0x84)] {
            assert!(bar.read(offset, &mut [0; 8][..width]).await.is_err(), "{width} bytes at {offset:#x}");
        }
        assert_eq!(bar.read_u32(0x40000).await.unwrap(), u32::MAX, "the buffer is seen by DMA only");
        device.reset().await.unwrap();
        assert_eq!(bar.read_u64(register::DMA_SOURCE).await.unwrap(), 0);
    });
}

#[test]
fn factorials_with_an_interrupt() {
    run(Config::default(), async |device, bar| {
        let mut interrupt = device.interrupts(Irq::Msi, 0, 1).await.unwrap().remove(0);
        bar.write_u32(register::STATUS, edu::FACTORIAL_INTERRUPT).await.unwrap();
        for (number, factorial) in [(0, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504), (u32::MAX, 0)] {
            bar.write_u32(register::FACTORIAL, number).await.unwrap();
            // An item may tell of an interrupt from before.
            while bar.read_u32(register::INTERRUPT_STATUS).await.unwrap() != edu::FACTORIAL_DONE {
                interrupt.next().await.unwrap().unwrap();
            }
            assert_eq!(bar.read_u32(register::FACTORIAL).await.unwrap(), factorial, "{number}!");
            bar.write_u32(register::ACKNOWLEDGE, u32::MAX).await.unwrap();
        }
        bar.write_u32(register::RAISE, 6).await.unwrap();
        interrupt.next().await.unwrap().unwrap();
        assert_eq!(bar.read_u32(register::INTERRUPT_STATUS).await.unwrap(), 6);
        bar.write_u32(register::ACKNOWLEDGE, 2).await.unwrap();
        assert_eq!(bar.read_u32(register::INTERRUPT_STATUS).await.unwrap(), 4);
    });
}

#[test]
fn memory_goes_through_the_buffer() {
    run(Config::default(), async |device, bar| {
        let pool = Pool::new(device.dma(), 1 << 16, HugePages::No).await.unwrap();
        let (mut from, mut to) = (pool.alloc(8192).unwrap(), pool.alloc(8192).unwrap());
        assert!(device.dma().allowed().iter().all(|range| range.last < 1 << 28), "28 bits");
        for (i, byte) in from.iter_mut().enumerate() {
            *byte = i as u8;
        }
        to.fill(0);
        copy(&bar, from.iova() + 4000, edu::BUFFER, 200, 0).await;
        assert_eq!(bar.read_u32(register::INTERRUPT_STATUS).await.unwrap(), 0);
        copy(&bar, edu::BUFFER, to.iova(), 200, edu::DMA_TO_MEMORY).await;
        assert_eq!(to[..200], [0; 200], "it does not master the bus");
        device.set_bus_master(true).await.unwrap();
        copy(&bar, from.iova() + 4000, edu::BUFFER + 100, 200, 0).await;
        copy(&bar, edu::BUFFER + 100, to.iova() + 4050, 200, edu::DMA_TO_MEMORY | edu::DMA_INTERRUPT).await;
        assert_eq!(to[4050..4250], from[4000..4200]);
        assert!(to[..4050].iter().chain(&to[4250..]).all(|&byte| byte == 0));
        assert_eq!(bar.read_u32(register::INTERRUPT_STATUS).await.unwrap(), edu::DMA_DONE);
        // Beyond the buffer, and without memory: nothing happens.
        copy(&bar, from.iova(), edu::BUFFER + 4000, 200, 0).await;
        copy(&bar, from.iova(), 0, 200, 0).await;
        copy(&bar, edu::BUFFER, to.iova(), u64::MAX, edu::DMA_TO_MEMORY).await;
        copy(&bar, edu::BUFFER, 0x0fff_0000, 200, edu::DMA_TO_MEMORY).await;
        copy(&bar, edu::BUFFER, to.iova() | 1 << 28, 100, edu::DMA_TO_MEMORY).await;
        assert_eq!(to[100..200], [0; 100]);
        assert_eq!(bar.read_u32(register::ID).await.unwrap(), edu::ID);
    });
}

#[test]
fn masks_that_are_none_are_refused() {
    for dma_mask in [0, 1, 0xfff, 0x1_0001, u64::MAX - 1] {
        assert!(edu::Edu::new(Config { dma_mask, faults: None }).is_err(), "{dma_mask:#x}");
    }
    assert!(edu::Edu::new(Config { dma_mask: 0x1fff, faults: None }).is_ok());
}
