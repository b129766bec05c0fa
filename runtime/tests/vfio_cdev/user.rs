//! An ordinary user: who may open the nodes, and how much memory it may lock.

use std::{fs, os::unix::fs::chown, path::PathBuf};

use rustix::process::getuid;
use vfio_uring::{
    Error,
    dma::MapRefused,
    transport::{
        cdev::Unbound,
        iommufd::{Access, IommufdFd, Memlock},
    },
};

use super::{
    Devices,
    common::{PAGE, USER, as_user, memory},
    devices,
};

/// Gives the nodes to the user for as long as it lives.
struct Given([PathBuf; 2]);

impl Given {
    fn new(devices: &Devices) -> Self {
        let dir = format!("/sys/bus/pci/devices/{}/vfio-dev", devices.bdf);
        let name = fs::read_dir(dir).unwrap().next().unwrap().unwrap().file_name();
        let nodes = ["/dev/iommu".into(), PathBuf::from("/dev/vfio/devices").join(name)];
        for node in &nodes {
            chown(node, Some(USER), None).unwrap();
        }
        Self(nodes)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        for node in &self.0 {
            chown(node, Some(0), None).unwrap();
        }
    }
}

#[test]
fn an_ordinary_user_needs_the_nodes_and_nothing_else() {
    let Some(devices) = devices() else { return };
    if !getuid().is_root() {
        eprintln!("skipped: root is needed to become somebody else");
        return;
    }
    let (limit, needed) = (64 << 10, 128 << 10);
    as_user(limit, || {
        for error in [IommufdFd::open().unwrap_err(), Unbound::find(&devices.bdf).unwrap_err()] {
            assert!(matches!(&error, Error::NotReady { what } if what.contains("udev rule")), "{error}");
        }
    });
    let _given = Given::new(&devices);
    as_user(limit, || {
        let (device, ioas) = devices.attached();
        let mut memory = memory(needed / PAGE);
        // SAFETY: no device does DMA here.
        let mut map = |len| unsafe { ioas.map(memory.as_mut_ptr().cast(), len, PAGE, Access::ReadWrite) };
        match map(needed) {
            Err(Error::Map { reason: MapRefused::Memlock { limit: said, needed: of }, .. }) => {
                assert_eq!((said, of), (limit, needed))
            }
            other => panic!("{other:?}"),
        }
        map(limit).unwrap();
        assert_eq!(ioas.unmap_all().unwrap(), limit);
        drop(device);
        // Whom it is charged to is not the user's to choose.
        let error = IommufdFd::open().unwrap().set_memlock(Memlock::Process).unwrap_err();
        assert!(error.to_string().contains("CAP_SYS_RESOURCE"), "{error}");
    });
}
