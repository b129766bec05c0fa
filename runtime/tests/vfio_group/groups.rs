//! Groups that come and go, and who may have them.

use std::fs;

use vfio_uring::{
    Error,
    device::{Device, Options},
    dma::{Access, HugePages},
    reactor::Reactor,
    transport::{group::Container, vfio::VfToken},
};

use super::{PAGE, Page, group_of, memory, nvme, tested};

const TOKEN: &str = "14d63f20-8445-11ea-8900-1f9ce7d5650d";

fn map(container: &Container, memory: &mut [Page], iova: u64) -> Result<(), Error> {
    // SAFETY: the memory lives as long as the test, and no device does DMA here.
    unsafe { container.map(memory.as_mut_ptr().cast(), size_of_val(memory) as u64, iova, Access::ReadWrite) }
}

#[test]
fn a_group_has_one_user() {
    let Some(nvme) = nvme() else { return };
    let (container, device) = nvme.open();
    container.add_group(nvme.group, false).expect("it is in already");
    let other = Container::new().unwrap();
    let error = other.add_group(nvme.group, false).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    let error = container.remove_group(nvme.group).unwrap_err();
    assert!(matches!(&error, Error::InUse { what } if what.contains("close them")), "{error}");
    assert!(matches!(other.remove_group(nvme.group), Err(Error::Invalid { .. })));

    // An empty container has nothing to say, a container outlives its last group.
    assert!(other.info().unwrap_err().to_string().contains("no group yet"));
    let mut memory = memory(1);
    assert!(map(&other, &mut memory, PAGE).unwrap_err().to_string().contains("no group yet"));
    map(&container, &mut memory, PAGE).unwrap();
    drop(device);
    assert!(container.remove_group(nvme.group).unwrap(), "nothing is mapped any more");
    assert_eq!(container.max_mappings(), None);
    other.add_group(nvme.group, false).unwrap();
    assert_eq!(other.info().unwrap().dma_available, other.max_mappings());
    drop(other);
    container.add_group(nvme.group, false).unwrap();
    map(&container, &mut memory, PAGE).unwrap();

    // The device keeps the group when the container is dropped.
    let device = container.device(&nvme.bdf, None).unwrap();
    drop(container);
    let error = Container::new().unwrap().add_group(nvme.group, false).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(device);
    Container::new().unwrap().add_group(nvme.group, false).unwrap();
}

#[test]
fn devices_are_found_by_name() {
    let Some(nvme) = nvme() else { return };
    let container = nvme.container();
    let error = container.device("0000:7f:1f.7", None).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains(&format!("({})", nvme.group))), "{error}");
    let error = container.device(&nvme.bdf, Some(&TOKEN.parse().unwrap())).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("wants no VF token")), "{error}");
    // A device may be opened more than once.
    let (one, two) = (container.device(&nvme.bdf, None).unwrap(), container.device(&nvme.bdf, None).unwrap());
    assert_eq!(one.info().unwrap(), two.info().unwrap());
}

#[test]
fn noiommu_is_not_had_by_chance() {
    let Some(nvme) = nvme() else { return };
    let container = Container::new().unwrap();
    let error = container.add_group(nvme.group, true).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("has an IOMMU")), "{error}");
    let error = container.add_group(99999, false).unwrap_err();
    assert!(matches!(&error, Error::NotReady { what } if what.contains("vfio-pci")), "{error}");
}

#[test]
fn without_an_iommu_nothing_is_mapped() {
    let Some(device) = tested("VFIO_URING_TEST_NOIOMMU") else { return };
    let container = Container::new().unwrap();
    let error = container.add_group(device.group, false).unwrap_err();
    assert!(matches!(&error, Error::NotReady { what } if what.contains("ask for noiommu by name")), "{error}");
    container.add_group(device.group, true).unwrap();
    let opened = container.device(&device.bdf, None).unwrap();
    assert!(opened.info().unwrap().regions >= 9);
    let mut memory = memory(1);
    for error in [
        container.info().unwrap_err(),
        map(&container, &mut memory, PAGE).unwrap_err(),
        container.unmap(PAGE, PAGE).unwrap_err(),
    ] {
        assert!(matches!(&error, Error::Unsupported { what } if what.contains("does not move")), "{error}");
    }
    let error = container.add_group(device.group + 1, false).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("with and without")), "{error}");

    // The same by an address.
    drop((opened, container));
    Reactor::new().unwrap().block_on(async {
        let address = format!("group:{}", device.bdf).parse().unwrap();
        assert!(Device::open(&address).await.is_err(), "it was not asked for");
        let opened = Device::open_with(&address, Options { no_iommu: true, ..Options::default() }).await.unwrap();
        assert_ne!(opened.config().ids().await.unwrap().vendor, 0xffff);
        let error = opened.dma().map(4096, HugePages::No).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what } if what.contains("can't move")), "{error}");
    });
}

#[test]
fn groups_share_what_is_mapped() {
    let Some(one) = nvme() else { return };
    let Ok(bdf) = std::env::var("VFIO_URING_TEST_BDF2") else { return };
    let two = group_of(&bdf);
    let (container, _device) = one.open();
    let before = container.info().unwrap();
    let mut memory = memory(2);
    map(&container, &mut memory, 0x10_0000).unwrap();
    container.add_group(two, false).unwrap();
    let device = container.device(&bdf, None).unwrap();
    assert_eq!(container.groups().iter().map(|(number, _)| *number).max(), Some(one.group.max(two)));
    let both = container.info().unwrap();
    assert_eq!((before.ranges, before.dma_available.unwrap() - 1), (both.ranges, both.dma_available.unwrap()));
    drop(device);
    assert!(!container.remove_group(one.group.max(two) + one.group.min(two) - one.group).unwrap());
    assert_eq!(container.unmap(0x10_0000, 2 * PAGE).unwrap(), 2 * PAGE);
}

/// Virtual functions for as long as it lives.
struct Virtual<'a>(&'a str);

impl<'a> Virtual<'a> {
    fn new(bdf: &'a str) -> Self {
        fs::write(format!("/sys/bus/pci/devices/{bdf}/sriov_numvfs"), "1").expect("vfio_pci.enable_sriov=1");
        Self(bdf)
    }

    fn first(&self) -> String {
        let link = fs::read_link(format!("/sys/bus/pci/devices/{}/virtfn0", self.0)).unwrap();
        link.file_name().unwrap().to_str().unwrap().to_owned()
    }
}

impl Drop for Virtual<'_> {
    fn drop(&mut self) {
        fs::write(format!("/sys/bus/pci/devices/{}/sriov_numvfs", self.0), "0").unwrap();
    }
}

#[test]
fn a_virtual_function_wants_its_token() {
    let Some(physical) = tested("VFIO_URING_TEST_PF") else { return };
    let (_container, device) = physical.open();
    let token: VfToken = TOKEN.parse().unwrap();
    device.set_vf_token(&token).unwrap();
    let functions = Virtual::new(&physical.bdf);
    let bdf = functions.first();
    let container = Container::new().unwrap();
    container.add_group(group_of(&bdf), false).unwrap();
    let error = |token| container.device(&bdf, token).unwrap_err().to_string();
    assert!(error(None).contains("wants the VF token"), "{}", error(None));
    let wrong = VfToken::new([7; 16]);
    assert!(error(Some(&wrong)).contains("is not the one"), "{}", error(Some(&wrong)));
    assert!(container.device(&bdf, Some(&token)).unwrap().info().unwrap().regions >= 9);
    drop(container);
    drop(functions);
}
