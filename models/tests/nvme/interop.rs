//! The client of the `vfio_user` crate, which nobody here wrote.

use std::{
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use vfio_uring::dma::{HugePages, SharedMemory};
use vfio_uring_models::nvme::{self, Config};
use vfio_user::Client;

use crate::common::LIMIT;

const IOVA: u64 = 0x4000_0000;

#[test]
fn identify_by_the_client_of_the_vfio_user_crate() {
    let server = nvme::spawn(Config::default()).unwrap();
    let mut client = Client::new(server.path()).unwrap();
    let bar = client.region(0).unwrap();
    assert_eq!(bar.sparse_areas.len(), 1);
    assert_eq!((bar.sparse_areas[0].offset, bar.sparse_areas[0].size), (0x1000, 0x1000));
    assert!(bar.file_offset.is_some());
    assert_eq!(client.region(7).unwrap().size, 4096);
    let mut ids = [0; 4];
    client.region_read(7, 0, &mut ids).unwrap();
    assert_eq!(ids, [0x36, 0x1b, 0x10, 0]);
    client.region_write(7, 4, &6u16.to_le_bytes()).unwrap();
    let irqs = client.get_irq_info(2).unwrap();
    assert_eq!(irqs.count, 65);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    client.set_irqs(2, 0x24, 0, 1, &[event.as_raw_fd()]).unwrap();
    client.reset().unwrap();

    let (fd, memory) = SharedMemory::create("client", 0x4000, HugePages::No).unwrap();
    client.dma_map(0, IOVA, 0x4000, fd.as_raw_fd()).unwrap();
    client.region_write(0, 0x24, &0x1f_001fu32.to_le_bytes()).unwrap();
    client.region_write(0, 0x28, &IOVA.to_le_bytes()).unwrap();
    client.region_write(0, 0x30, &(IOVA + 0x1000).to_le_bytes()).unwrap();
    client.region_write(0, 0x14, &0x46_0001u32.to_le_bytes()).unwrap();
    let mut status = [0; 4];
    client.region_read(0, 0x1c, &mut status).unwrap();
    assert_eq!(status, [1, 0, 0, 0]);

    memory.write_obj(0, &[0x42u64 << 16 | 6, 0, 0, IOVA + 0x2000, 0, 1, 0, 0]).unwrap();
    client.region_write(0, 0x1000, &1u32.to_le_bytes()).unwrap();
    let end = Instant::now() + LIMIT;
    while memory.load_u32(0x1000 + 12).unwrap() != 0x1_0042 {
        assert!(Instant::now() < end, "no completion");
        thread::sleep(Duration::from_micros(100));
    }
    let mut serial = [0; 10];
    memory.read(0x2004, &mut serial).unwrap();
    assert_eq!(&serial, b"VFIOURING1");
    let end = Instant::now() + LIMIT;
    while rustix::io::read(&event, &mut [0u8; 8]).is_err() {
        assert!(Instant::now() < end, "no interrupt");
        thread::sleep(Duration::from_micros(100));
    }
    client.dma_unmap(IOVA, 0x4000).unwrap();
    client.shutdown().unwrap();
}
