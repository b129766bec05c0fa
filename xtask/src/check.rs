//! What `xtask guest-check` looks at, in the guest: whether it is the machine that the tests expect.

use std::{fs, os::unix::fs::FileTypeExt, path::Path};

use crate::machine::{DEVICES, NVME};

/// Prints what is found; whether all is as it should be.
pub fn run() -> bool {
    let mut well = true;
    let mut say = |what: &str, right: bool, found: &str| {
        println!("{} {what}: {found}", if right { "ok  " } else { "BAD " });
        well &= right;
    };
    for path in ["/dev/vfio/vfio", "/dev/iommu"] {
        let there = fs::metadata(path).is_ok_and(|data| data.file_type().is_char_device());
        say(path, there, if there { "a device" } else { "missing" });
    }
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    say("IOMMU groups", groups > 0, &groups.to_string());
    for (address, identity, name) in DEVICES {
        let folder = Path::new("/sys/bus/pci/devices").join(address);
        let number = |file: &str| read(&folder.join(file)).trim_start_matches("0x").to_string();
        let found = format!("{}:{}", number("vendor"), number("device"));
        say(&format!("{name} at {address}"), found == identity, &found);
        let group = folder.join("iommu_group");
        say(&format!("group of {address}"), group.exists(), &group_of(&group));
    }
    let blocks = format!("/sys/bus/pci/devices/{NVME}/nvme");
    for (namespace, size) in [("n1", "512"), ("n2", "4096")] {
        let found = block_size(Path::new(&blocks), namespace);
        say(&format!("block size of namespace {namespace} of {NVME}"), found == size, &found);
    }
    let disabled = read(Path::new("/proc/sys/kernel/io_uring_disabled"));
    say("io_uring_disabled", disabled == "0", &disabled);
    let memlock = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    say("memlock limit", memlock.is_none(), &memlock.map_or("none".into(), |limit| limit.to_string()));
    well
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).map_or_else(|error| error.to_string(), |text| text.trim().to_string())
}

fn group_of(link: &Path) -> String {
    fs::read_link(link).map_or_else(|error| error.to_string(), |path| path.display().to_string())
}

/// Of the namespace of the controller whose folder `nvme` is.
fn block_size(nvme: &Path, namespace: &str) -> String {
    let controller = fs::read_dir(nvme).ok().and_then(|mut entries| entries.next()?.ok());
    let Some(controller) = controller else { return "no controller of the kernel's driver".into() };
    let name = format!("{}{namespace}", controller.file_name().display());
    read(&controller.path().join(name).join("queue/logical_block_size"))
}
