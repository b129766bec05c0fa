//! The server of the `vfio_user` crate with a small device behind it: a check on our reading of the protocol.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
    thread,
};

use futures::StreamExt;
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_uring::{
    Error,
    device::{Address, Device, Irq},
    dma::{HugePages, SharedMemory},
    reactor::yield_now,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

use crate::{patient, run};

/// Registers of BAR 0: a write to the first copies 8 bytes from the IOVA written, adds one to each, writes them back, and fires
/// vector 0.
#[derive(Default)]
struct Adder {
    config: Vec<u8>,
    mapped: Vec<(u64, u64, u64, File)>,
    vectors: Vec<Option<File>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl ServerBackend for Adder {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset as usize + data.len();
        match region {
            7 => data.copy_from_slice(self.config.get(offset as usize..end).ok_or(io::ErrorKind::InvalidInput)?),
            _ => data.fill(region as u8),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match (region, offset) {
            (7, _) => self.config[offset as usize..][..data.len()].copy_from_slice(data),
            (0, 0) => {
                let iova = u64::from_le_bytes(data.try_into().map_err(|_| io::ErrorKind::InvalidInput)?);
                let found = self.mapped.iter().find(|(start, len, ..)| (*start..start + len).contains(&iova));
                let (start, _, offset, file) = found.ok_or(io::ErrorKind::InvalidInput)?;
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, offset + iova - start)?;
                file.write_all_at(&bytes.map(|byte| byte + 1), offset + iova - start)?;
                if let Some(Some(fd)) = self.vectors.first_mut() {
                    fd.write_all(&1u64.to_ne_bytes())?;
                }
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn dma_map(&mut self, flags: DmaMapFlags, offset: u64, iova: u64, len: u64, fd: Option<File>) -> io::Result<()> {
        assert_eq!(flags, DmaMapFlags::READ_WRITE);
        self.mapped.push((iova, len, offset, fd.expect("the memfd")));
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, iova: u64, len: u64) -> io::Result<()> {
        assert!(flags.is_empty());
        let at = self.mapped.iter().position(|m| (m.0, m.1) == (iova, len)).ok_or(io::ErrorKind::NotFound)?;
        self.mapped.remove(at);
        self.log.lock().unwrap().push("unmap".into());
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.log.lock().unwrap().push("reset".into());
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        assert_eq!((index, flags), (2, 0x24));
        self.log.lock().unwrap().push(format!("irqs {start}+{count}: {}", fds.len()));
        let mut fds = fds.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        self.vectors.resize_with(2, || None);
        for vector in start..start + count {
            self.vectors[vector as usize] = fds.next().flatten();
        }
        Ok(())
    }
}

#[test]
fn the_server_of_the_vfio_user_crate() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (fd, memory) = SharedMemory::create("bar1", 0x2000, HugePages::No).unwrap();
    let regions = (0..9u32).map(|index| {
        let (flags, size) = match index {
            0 => (3, 0x1000),
            1 => (7, 0x2000),
            7 => (3, 256),
            _ => (0, 0),
        };
        let region_info = vfio_region_info { argsz: 32, flags, index, size, ..Default::default() };
        let area = vfio_region_sparse_mmap_area { offset: 0x1000, size: 0x1000 };
        let mapped = index == 1;
        ServerRegion {
            region_info,
            sparse_areas: if mapped { vec![SparseArea { area }] } else { Vec::new() },
            mmap_fd: mapped.then(|| fd.as_raw_fd()),
        }
    });
    let irqs = [(0, 0), (1, 0), (2, 2)].map(|(index, count)| IrqInfo { index, flags: 1, count });
    let server = Server::new(&path, true, irqs.to_vec(), regions.collect()).unwrap();
    let log = Arc::<Mutex<Vec<String>>>::default();
    let mut adder = Adder { config: vec![0; 256], log: log.clone(), ..Default::default() };
    adder.config[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
    let thread = thread::spawn(move || server.run(&mut adder).unwrap());

    run(async {
        let device = Device::open_with(&Address::User(path), patient()).await.unwrap();
        let limits = device.connection().unwrap().limits();
        assert_eq!((limits.max_msg_fds, limits.max_outstanding, limits.max_data_xfer), (1, 1, 1 << 20));
        assert!(device.info().pci && device.info().reset);
        assert_eq!((device.info().regions, device.info().irqs, device.irq(Irq::MsiX).count), (9, 3, 2));
        assert_eq!(device.config().ids().await.unwrap().device, 0x11e8);
        assert!(device.config().capabilities().await.unwrap().is_empty());
        device.set_bus_master(true).await.unwrap();

        let bar = device.bar(1).unwrap();
        assert_eq!(bar.read::<u32>(0).await.unwrap(), 0x0101_0101);
        bar.register::<u64>(0x1008).unwrap().write(42);
        assert_eq!(memory.load_u64(0x1008), Ok(42));

        let mapping = device.dma().map(4096, HugePages::No).await.unwrap();
        let mut vectors = device.interrupts(Irq::MsiX, 0, 2).await.unwrap();
        mapping.memory().write(16, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        device.bar(0).unwrap().write(0, mapping.iova() + 16).await.unwrap();
        vectors[0].next().await.unwrap().unwrap();
        assert_eq!(mapping.memory().read_obj::<[u8; 8]>(16), Ok([2, 3, 4, 5, 6, 7, 8, 9]));
        assert_eq!(vectors[0].take_count().await.unwrap(), 1);

        assert!(matches!(device.bar(0).unwrap().write(0, u64::MAX).await, Err(Error::Refused { .. })));
        device.reset().await.unwrap();
        drop((mapping, vectors));
        while device.dma().stats().mappings != 0 {
            yield_now().await;
        }
        assert_eq!(device.dma().stats().leaked, 0);
    });
    thread.join().unwrap();
    let log = log.lock().unwrap().join(", ");
    assert!(log.starts_with("irqs 0+1: 1, irqs 1+1: 1, reset"), "{log}");
    assert!(log.contains("unmap") && log.contains("irqs 0+1: 0") && log.contains("irqs 1+1: 0"), "{log}");
}
