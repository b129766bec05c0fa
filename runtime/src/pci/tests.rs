//! Discovery, bind and unbind on a machine of files, with a kernel that does what it is told.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use super::{
    Bdf,
    fake::{EDU, Fake, NIC, NIC1, NVME},
    sysfs::{GroupMember, Memlock, Obstacle, Outcome, Plan, Sriov},
};
use crate::{Error, Result};

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

/// Carries a plan out with a kernel whose own drivers match as [`Fake::new`] says, and in which `refused` never binds.
fn execute(fake: &Fake, plan: &Plan, refused: &str) -> (Result<Outcome>, Vec<String>) {
    let mut written = Vec::new();
    let result = plan.execute_with(|file, text| {
        written.push(format!("{}={}", file.file_name().unwrap().display(), text.trim()));
        let device = plan.bdf().to_string();
        match file.file_name().unwrap().to_str().unwrap() {
            "driver_override" => fs::write(file, text)?,
            "unbind" => fake.drive(text, None),
            "drivers_probe" => {
                let limited = fs::read_to_string(fake.path(&Fake::under(text, "driver_override"))).unwrap();
                let own = [(NVME, "nvme"), (NIC, "igb"), (NIC1, "igb")].into_iter().find(|(bdf, _)| *bdf == text);
                let driver = match limited.trim() {
                    "" | "(null)" => own.map(|(_, driver)| driver),
                    limited => Some(limited),
                };
                if !fake.path(&Fake::under(text, "driver")).exists() {
                    fake.drive(text, driver.filter(|driver| *driver != refused));
                }
            }
            other => panic!("{other} for {device}"),
        }
        Ok(())
    });
    (result, written)
}

#[test]
fn a_device_is_described() {
    let fake = Fake::new();
    fake.attribute(NVME, "numa_node", "1\n");
    fake.attribute(NIC, "sriov_totalvfs", "7\n");
    fake.attribute(NIC, "sriov_numvfs", "2\n");
    fake.link(&Fake::under(NIC1, "physfn"), &format!("sys/devices/pci0000:00/{NIC}"));
    let all = fake.pci.devices().unwrap();
    assert_eq!(all.iter().map(|device| device.bdf.to_string()).collect::<Vec<_>>(), [EDU, NVME, NIC, NIC1]);
    let (nvme, nic) = (&all[1], &all[2]);
    assert_eq!((nvme.ids.vendor, nvme.ids.device, nvme.ids.class), (0x8086, 0x10c9, 0x010802));
    assert_eq!((nvme.ids.subsystem_vendor, nvme.ids.subsystem, nvme.ids.revision), (0x1af4, 0x1100, 2));
    assert_eq!((nvme.driver.as_deref(), nvme.driver_override.as_deref()), (Some("nvme"), None));
    assert_eq!((nvme.iommu.as_deref(), nvme.numa_node, nic.numa_node), (Some("dmar0"), Some(1), None));
    assert_eq!((nvme.sriov, nic.sriov), (None, Some(Sriov { enabled: 2, total: 7 })));
    assert_eq!((nic.physical_function, all[3].physical_function), (None, Some(bdf(NIC))));
    let group = nvme.group.as_ref().unwrap();
    assert_eq!((group.id, group.others.len(), group.reserved[0].start), (12, 0, 0xfee0_0000));
    assert_eq!((group.reserved[0].last, group.reserved[0].relaxable()), (0xfeef_ffff, false));
    let other = GroupMember { name: NIC1.into(), driver: Some("igb".into()), blocks: true };
    assert_eq!(nic.group.as_ref().unwrap().others, [other]);

    assert_eq!(nvme.vfio, None);
    assert_eq!(fake.pci.group_node(group), fake.path("dev/vfio/12"));
    assert!(!fake.pci.prefers_cdev(nvme));
    fake.drive(NVME, Some("vfio-pci"));
    let nvme = fake.pci.device(bdf(NVME)).unwrap();
    assert_eq!(nvme.vfio.as_ref().unwrap().dev, Some((511, 3)));
    assert_eq!(fake.pci.cdev_node(&nvme), Some(fake.path("dev/vfio/devices/vfio3")));
    assert!(fake.pci.prefers_cdev(&nvme));
    fs::remove_file(fake.path("dev/iommu")).unwrap();
    assert!(!fake.pci.prefers_cdev(&nvme));
}

#[test]
fn what_a_file_should_not_say_is_named() {
    for (name, text) in [
        ("vendor", "8086"),
        ("vendor", ""),
        ("device", "0x12345"),
        ("class", "0xhello"),
        ("class", "0x100000000"),
        ("revision", "0x100"),
        ("numa_node", "-2"),
        ("sriov_totalvfs", "70000"),
        ("vfio-dev/vfio0/dev", "511"),
        ("vfio-dev/vfio0/dev", "511:x"),
    ] {
        let fake = Fake::new();
        fake.attribute(NVME, name, text);
        let error = fake.pci.device(bdf(NVME)).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(&format!("{text:?}")), "{error}");
        assert!(fake.pci.devices().is_err());
    }
    for line in ["0x1000 msi", "0x2000 0x1000 msi", "1000 2000 msi", "0x0 0x10000000000000000 msi", "0x1000 0x1fff"] {
        let fake = Fake::new();
        fake.file("sys/kernel/iommu_groups/12/reserved_regions", line);
        let error = fake.pci.device(bdf(NVME)).unwrap_err().to_string();
        assert!(error.contains("reserved_regions") && error.contains(line), "{error}");
    }
    let fake = Fake::new();
    fake.attribute(NVME, "vendor", &"x".repeat(5000));
    assert!(fake.pci.device(bdf(NVME)).unwrap_err().to_string().contains("more than 4096 bytes"));
    fake.file("sys/bus/pci/devices/odd", "");
    assert!(fake.pci.addresses().unwrap_err().to_string().contains("\"odd\""));
    assert!(fake.pci.device(bdf("09:00.0")).unwrap_err().to_string().contains("no PCI device 0000:09:00.0"));
}

#[test]
fn there_and_back() {
    let fake = Fake::new();
    let plan = fake.pci.bind(bdf(NVME), "vfio-pci").unwrap();
    let root = fake.path("sys/bus/pci").display().to_string();
    let expected = format!(
        "write vfio-pci to {root}/devices/{NVME}/driver_override\nwrite {NVME} to {root}/drivers/nvme/unbind\n\
         write {NVME} to {root}/drivers_probe\ncheck that {root}/devices/{NVME}/driver leads to vfio-pci\n"
    );
    assert_eq!(plan.to_string(), expected);
    assert_eq!(plan.former(), Some("nvme"));
    let (outcome, _) = execute(&fake, &plan, "");
    assert_eq!(outcome.unwrap(), Outcome { former: Some("nvme".into()), driver: Some("vfio-pci".into()) });
    assert!(fake.pci.bind(bdf(NVME), "vfio-pci").unwrap().steps().is_empty());

    let plan = fake.pci.unbind(bdf(NVME)).unwrap();
    let (outcome, written) = execute(&fake, &plan, "");
    assert_eq!(written, ["driver_override=".into(), format!("unbind={NVME}"), format!("drivers_probe={NVME}")]);
    assert_eq!(outcome.unwrap(), Outcome { former: Some("vfio-pci".into()), driver: Some("nvme".into()) });
    fake.attribute(NVME, "driver_override", "(null)\n");
    assert!(fake.pci.unbind(bdf(NVME)).unwrap().steps().is_empty());
}

#[test]
fn a_device_that_no_driver_wants() {
    let fake = Fake::new();
    let plan = fake.pci.bind(bdf(EDU), "vfio-pci").unwrap();
    assert_eq!(plan.steps().len(), 3);
    assert_eq!(execute(&fake, &plan, "").0.unwrap().former, None);
    let outcome = execute(&fake, &fake.pci.unbind(bdf(EDU)).unwrap(), "").0.unwrap();
    assert_eq!(outcome, Outcome { former: Some("vfio-pci".into()), driver: None });
    assert!(fake.pci.modprobe(bdf(EDU)).unwrap().starts_with("modprobe pci:v00008086d000010C9"));
    fake.attribute(EDU, "modalias", "pci:v0;reboot");
    assert_eq!(fake.pci.modprobe(bdf(EDU)), None);
    // A probe may have been missed.
    assert_eq!(fake.pci.unbind(bdf(EDU)).unwrap().steps().len(), 1);
    // An override that has no effect yet is taken away, the driver stays.
    fake.attribute(NVME, "driver_override", "vfio-pci\n");
    let plan = fake.pci.unbind(bdf(NVME)).unwrap();
    assert_eq!(execute(&fake, &plan, "").1, ["driver_override="]);
}

#[test]
fn what_fails_is_undone() {
    let fake = Fake::new();
    fake.attribute(NVME, "driver_override", "nvme\n");
    let plan = fake.pci.bind(bdf(NVME), "vfio-pci").unwrap();
    let (result, written) = execute(&fake, &plan, "vfio-pci");
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::NotReady { what } if what.contains("dmesg")), "{error}");
    assert!(error.to_string().ends_with("undone, it has the driver nvme as before"), "{error}");
    assert_eq!(written[3..], ["driver_override=nvme".into(), format!("drivers_probe={NVME}")]);

    let denied = |at: usize, kind: io::ErrorKind| {
        let mut count = 0;
        let result = plan.execute_with(|_, _| {
            count += 1;
            if count > at { Err(kind.into()) } else { Ok(()) }
        });
        result.unwrap_err().to_string()
    };
    let error = denied(0, io::ErrorKind::PermissionDenied);
    assert!(error.contains("driver_override") && error.contains("as root") && error.contains("nothing was"), "{error}");
    assert!(denied(0, io::ErrorKind::ReadOnlyFilesystem).contains("container"));
    let error = denied(1, io::ErrorKind::ResourceBusy);
    assert!(error.contains("nvme/unbind") && error.contains("undoing failed"), "{error}");

    // On the real files nothing but these is written, and none is made.
    fs::remove_file(fake.path("sys/bus/pci/drivers/nvme/unbind")).unwrap();
    let error = plan.execute().unwrap_err().to_string();
    assert!(error.contains("nvme/unbind") && error.contains("undone, it has the driver nvme as before"), "{error}");
    assert!(!fake.path("sys/bus/pci/drivers/nvme/unbind").exists());
}

/// What `bind` says of a machine that was changed.
fn refusal(change: impl FnOnce(&Fake)) -> String {
    let fake = Fake::new();
    change(&fake);
    let errors = [NVME, NIC, EDU].map(|device| fake.pci.bind(bdf(device), "vfio-pci").err());
    let mut errors = errors.into_iter().flatten();
    let error = errors.next().expect("an error");
    assert!(matches!(error, Error::InUse { .. } | Error::NotReady { .. }), "{error:?}");
    assert!(errors.next().is_none());
    error.to_string()
}

#[track_caller]
fn refuses(parts: &[&str], change: impl FnOnce(&Fake)) {
    let error = refusal(change);
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

const MOUNTINFO: &str = "proc/self/mountinfo";

#[test]
fn a_disk_in_use_is_refused() {
    let mount = |line: &'static str| move |fake: &Fake| fake.file(MOUNTINFO, line);
    refuses(
        &[NVME, "nvme0n1p1 is mounted", "umount /mnt/a b"],
        mount("30 1 259:1 / /mnt/a\\040b rw shared:1 - ext4 /dev/x rw\n"),
    );
    refuses(&["nvme0n1 is mounted on /mnt"], mount("30 1 259:0 / /mnt rw - ext4 /dev/nvme0n1 rw\n"));
    // btrfs, by a link.
    refuses(&["nvme0n1p1 is mounted"], |fake| {
        fake.file(MOUNTINFO, "30 1 0:40 / /mnt rw shared:1 master:2 - btrfs /dev/disk/by-id/a rw\n");
        fake.link("dev/disk/by-id/a", "dev/nvme0n1p1");
    });
    refuses(&["nvme0n1p1 is mounted"], mount("30 1 0:40 / /mnt rw - btrfs /dev/nvme0n1p1 rw\n"));
    // A volume on the partition, and one on that.
    refuses(&["dm-7 is mounted on /home"], |fake| {
        for (below, above, dev) in [("nvme0n1p1", "md0", "9:0"), ("md0", "dm-7", "253:7"), ("dm-7", "md0", "253:7")] {
            fake.block(&format!("sys/devices/virtual/block/{above}"), dev);
            fake.link(&format!("sys/class/block/{below}/holders/{above}"), &format!("sys/devices/virtual/block/{above}"));
        }
        fake.file(MOUNTINFO, "30 1 253:7 / /home rw - xfs /dev/mapper/home rw\n");
    });
    refuses(&["nvme0n1p1 is swap space", "swapoff /dev/nvme0n1p1"], |fake| {
        fake.file(
            "proc/swaps",
            "Filename Type Size Used Priority\n/swap.img file 1 0 -1\n/dev/nvme0n1p1 partition 9 0 -2\n",
        );
    });
    // With multipath the disk is the subsystem's.
    refuses(&["nvme0n9 is mounted"], |fake| {
        let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
        fake.block(&format!("{subsystem}/nvme0n9"), "259:9");
        fake.link(&format!("{subsystem}/nvme0"), &Fake::under(NVME, "nvme/nvme0"));
        fake.link("sys/class/nvme-subsystem/nvme-subsys0", subsystem);
        fake.file(MOUNTINFO, "30 1 259:9 / /srv rw - ext4 /dev/nvme0n9 rw\n");
    });
    refuses(&["loop3 is mounted"], |fake| {
        fake.block("sys/devices/virtual/block/loop3", "7:3");
        fake.file("sys/devices/virtual/block/loop3/loop/backing_file", "/dev/nvme0n1\n");
        fake.file(MOUNTINFO, "30 1 7:3 / /srv rw - ext4 /dev/loop3 rw\n");
    });
    // A disk behind a bus of its own.
    refuses(&[EDU, "sda1 is mounted"], |fake| {
        fake.block(&Fake::under(EDU, "ata1/host0/target0:0:0/0:0:0:0/block/sda"), "8:0");
        fake.block(&Fake::under(EDU, "ata1/host0/target0:0:0/0:0:0:0/block/sda/sda1"), "8:1");
        fake.file(MOUNTINFO, "30 1 8:1 / / rw - ext4 /dev/root rw\n");
    });
    // Other mounts are no concern.
    let fake = Fake::new();
    fake.file(
        MOUNTINFO,
        "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 1 0:40 / /nvme0n1 rw - nfs host:/nvme0n1 rw\nodd\n\n1 2\n",
    );
    assert!(fake.pci.bind(bdf(NVME), "vfio-pci").is_ok());
}

#[test]
fn an_interface_that_is_up_is_refused() {
    for (name, text) in [("flags", "0x1003\n"), ("operstate", "up\n"), ("flags", "")] {
        refuses(&[NIC, "eth0 is up", "ip link set eth0 down"], |fake| {
            fake.file(&format!("sys/class/net/eth0/{name}"), text)
        });
    }
    refuses(&[EDU, "ens5 is up"], |fake| {
        fake.object(EDU, "virtio2/net/ens5", "net");
        fake.file("sys/class/net/ens5/flags", "0x1043\n");
    });
}

#[test]
fn what_vfio_can_not_take_is_refused() {
    refuses(&[EDU, "PCI bridge"], |fake| fake.attribute(EDU, "class", "0x060400\n"));
    refuses(&[NIC, "virtual functions", "sriov_numvfs"], |fake| {
        fake.attribute(NIC, "sriov_totalvfs", "7\n");
        fake.attribute(NIC, "sriov_numvfs", "1\n");
    });
    let no_iommu = |fake: &Fake| fs::remove_file(fake.path(&Fake::under(EDU, "iommu_group"))).unwrap();
    refuses(&[EDU, "no IOMMU", "intel_iommu=on"], no_iommu);
    let fake = Fake::new();
    no_iommu(&fake);
    fake.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    assert!(fake.pci.bind(bdf(EDU), "vfio-pci").is_ok());

    fs::remove_dir_all(fake.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let error = fake.pci.bind(bdf(NVME), "vfio-pci").unwrap_err();
    assert!(matches!(&error, Error::NotReady { what } if what.ends_with("modprobe vfio-pci")), "{error}");
    for name in ["", "..", "../vfio", "vfio/b", "vfio\nb", "nvme", "igb", &"vfio".repeat(17)] {
        assert!(matches!(fake.pci.bind(bdf(NVME), name), Err(Error::Invalid { .. })), "{name}");
    }
}

#[test]
fn a_device_that_a_program_has_open_is_refused() {
    for node in ["dev/vfio/12", "dev/vfio/devices/vfio3"] {
        let fake = Fake::new();
        fake.drive(NVME, Some("vfio-pci"));
        fake.file("proc/4321/comm", "qemu-system-x86\n");
        fake.link("proc/4321/fd/9", node);
        fake.file("sys/bus/pci/drivers/pci-stub/unbind", "");
        for result in [fake.pci.unbind(bdf(NVME)), fake.pci.bind(bdf(NVME), "pci-stub")] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error:?}");
            let part = format!("the process 4321 (qemu-system-x86) has {} open", fake.path(node).display());
            assert!(error.to_string().contains(&part), "{error}");
        }
        fs::remove_dir_all(fake.path("proc/4321")).unwrap();
        assert_eq!(fake.pci.bind(bdf(NVME), "pci-stub").unwrap().steps().len(), 4);
    }
}

const PLENTY: Memlock = Memlock { limit: None, privileged: false };

#[test]
fn obstacles_come_with_a_remedy() {
    let fake = Fake::new();
    let obstacles = |device: &str| fake.pci.obstacles_with(&fake.pci.device(bdf(device)).unwrap(), PLENTY);
    let sentences = |list: &[Obstacle]| list.iter().map(Obstacle::to_string).collect::<Vec<_>>().join("\n");

    let nvme = obstacles(NVME);
    assert_eq!((nvme.to_string().as_str(), nvme.ready()), ("bound to nvme", false));
    assert_eq!(sentences(&nvme.group), format!("{NVME} is bound to the kernel's driver nvme: vfio-uring bind {NVME}"));
    assert!(sentences(&obstacles(EDU).cdev).contains("has no driver: vfio-uring bind"));
    assert_eq!(obstacles(NIC).to_string(), format!("bound to igb, group shared with {NIC1} (igb)"));

    fake.drive(NVME, Some("vfio-pci"));
    assert_eq!((obstacles(NVME).to_string().as_str(), obstacles(NVME).ready()), ("ready by group, cdev", true));
    fake.drive(NIC, Some("vfio-pci"));
    assert!(sentences(&obstacles(NIC).group).contains(&format!("group 13 also has {NIC1}, which is bound to igb")));
    for harmless in ["vfio-pci", "pcieport"] {
        fake.drive(NIC1, Some(harmless));
        assert!(obstacles(NIC).ready(), "{harmless}");
    }

    fake.attribute(NIC1, "class", "0x060400\n");
    assert_eq!(obstacles(NIC1).to_string(), "not for VFIO");
    assert!(sentences(&obstacles(NIC1).cdev).contains("PCI bridge"));

    let low = Memlock { limit: Some(65536), privileged: false };
    let memlock = fake.pci.obstacles_with(&fake.pci.device(bdf(NVME)).unwrap(), low);
    assert!(sentences(&memlock.group).contains("RLIMIT_MEMLOCK is 64 KiB") && !memlock.ready());
    let privileged = Memlock { privileged: true, ..low };
    assert!(fake.pci.obstacles_with(&fake.pci.device(bdf(NVME)).unwrap(), privileged).ready());

    fs::remove_file(fake.path("sys/devices/pci0000:00").join(NVME).join("vfio-dev/vfio3/dev")).unwrap();
    assert_eq!(obstacles(NVME).to_string(), "ready by group");
    assert!(sentences(&obstacles(NVME).cdev).contains("VFIO_DEVICE_CDEV"));
    fs::remove_file(fake.path("dev/vfio/12")).unwrap();
    let brief = format!("no {}; kernel without cdev", fake.path("dev/vfio/12").display());
    assert_eq!(obstacles(NVME).to_string(), brief);
    fake.drive(NVME, Some("vfio-pci"));
    fs::remove_file(fake.path("dev/vfio/vfio")).unwrap();
    assert_eq!(obstacles(NVME).to_string(), "ready by cdev");
    fs::remove_file(fake.path("dev/iommu")).unwrap();
    assert!(sentences(&obstacles(NVME).cdev).contains("modprobe iommufd"));

    fake.drive(NVME, None);
    fs::remove_dir_all(fake.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    assert!(obstacles(NVME).to_string().starts_with("vfio-pci not loaded, not bound to vfio-pci"));
    fake.file("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    assert_eq!(obstacles(NVME).to_string(), "no IOMMU");
    let group = fake.pci.device(bdf(NVME)).unwrap().group.unwrap();
    assert_eq!(fake.pci.group_node(&group), fake.path("dev/vfio/noiommu-12"));
    fs::remove_file(fake.path(&Fake::under(NVME, "iommu_group"))).unwrap();
    assert!(sentences(&obstacles(NVME).group).contains("amd_iommu=on"));
}

#[test]
fn a_node_that_may_not_be_opened() {
    let node = Obstacle::NoPermission { node: "/dev/vfio/12".into(), mode: 0o600, uid: 1000 };
    let sentence = node.to_string();
    assert!(sentence.contains("id 1000 may not") && sentence.contains("(mode 600): chown 1000 /dev/vfio/12"), "{sentence}");
    assert_eq!(node.brief(), "no permission for /dev/vfio/12");
    if rustix::process::geteuid().is_root() {
        return;
    }
    let fake = Fake::new();
    fake.drive(NVME, Some("vfio-pci"));
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(fake.path("dev/vfio/12"), fs::Permissions::from_mode(0o000)).unwrap();
    let obstacles = fake.pci.obstacles_with(&fake.pci.device(bdf(NVME)).unwrap(), PLENTY);
    assert!(matches!(obstacles.group[..], [Obstacle::NoPermission { mode: 0, .. }]), "{obstacles:?}");
    assert_eq!(obstacles.to_string(), "ready by cdev");
}

#[test]
fn pinned_memory() {
    let memlock = |limit, privileged| Memlock { limit, privileged };
    assert_eq!(memlock(Some(8 << 20), false).allowed(), Some(8 << 20));
    assert_eq!((memlock(Some(1), true).allowed(), memlock(None, false).allowed()), (None, None));
    for (memlock, part) in [
        (memlock(None, false), "unlimited"),
        (memlock(Some(65536), true), "CAP_IPC_LOCK lifts it"),
        (memlock(Some(100), false), "is 100 B: no more"),
        (memlock(Some(8 << 20), false), "is 8 MiB: no more memory than that can be mapped for DMA; raise it by ulimit -l"),
    ] {
        assert!(memlock.to_string().contains(part), "{memlock}");
    }
    Memlock::current();
}

#[test]
fn links_that_lead_nowhere_do_no_harm() {
    let fake = Fake::new();
    symlink(Path::new("../../nowhere"), fake.path("sys/class/net/gone")).unwrap();
    symlink(Path::new("../../nowhere"), fake.path("sys/class/block/sdx")).unwrap();
    assert!(fake.pci.bind(bdf(NVME), "vfio-pci").is_ok());
    assert!(fake.pci.bind(bdf(NIC), "vfio-pci").is_ok());
}
