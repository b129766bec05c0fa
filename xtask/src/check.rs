//! What `xtask guest-check` looks at, in the guest: whether it is the machine that the tests expect.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

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
    for (namespace, size) in [("1", "512"), ("2", "4096")] {
        let found = wait_for(|| block_size(Path::new(&blocks), namespace)).unwrap_or_else(|| "not found".into());
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

/// The kernel finds namespaces while the first processes run.
fn wait_for<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match look() {
            None if Instant::now() < until => thread::sleep(Duration::from_millis(50)),
            found => return found,
        }
    }
}

/// Of a namespace of the controller whose folder `nvme` is. The number in a disk's name is not that of the namespace.
fn block_size(nvme: &Path, namespace: &str) -> Option<String> {
    let controller = fs::read_dir(nvme).ok()?.next()?.ok()?.path();
    let mut disks = fs::read_dir(controller).ok()?.filter_map(Result::ok).map(|entry| entry.path());
    let disk = disks.find(|disk| read(&disk.join("nsid")) == namespace)?;
    Some(read(&disk.join("queue/logical_block_size")))
}
