//! An ordinary user: who may open a group, and how much memory it may lock.

use std::os::unix::fs::chown;

use rustix::process::getuid;
use vfio_uring::{
    Error,
    dma::{Access, MapRefused},
    transport::group::Container,
};

use super::{
    common::{PAGE, USER, as_user, memory},
    nvme,
};

#[test]
fn an_ordinary_user_needs_the_node_of_the_group() {
    let Some(nvme) = nvme() else { return };
    if !getuid().is_root() {
        eprintln!("skipped: root is needed to become somebody else");
        return;
    }
    let (limit, needed) = (64 << 10, 128 << 10);
    as_user(limit, || {
        // The container's node is everybody's.
        let error = Container::new().unwrap().add_group(nvme.group, false).unwrap_err();
        assert!(matches!(&error, Error::NotReady { what } if what.contains("udev rule")), "{error}");
    });
    let node = format!("/dev/vfio/{}", nvme.group);
    chown(&node, Some(USER), None).unwrap();
    as_user(limit, || {
        let (container, device) = nvme.open();
        assert!(device.info().unwrap().regions >= 9);
        let mut memory = memory(needed / PAGE);
        // SAFETY: no device does DMA here.
        let mut map = |len| unsafe { container.map(memory.as_mut_ptr().cast(), len, PAGE, Access::ReadWrite) };
        match map(needed) {
            Err(Error::Map { reason: MapRefused::Memlock { limit: said, needed: of }, .. }) => {
                assert_eq!((said, of), (limit, needed))
            }
            other => panic!("{other:?}"),
        }
        map(limit).unwrap();
        assert_eq!(container.unmap(PAGE, limit).unwrap(), limit);
    });
    chown(&node, Some(0), None).unwrap();
}
