//! The emulated machine: which devices it has, and where.
//!
//! A q35 board with VT-d. Bus addresses are fixed, so that tests can name devices by them.

use std::path::Path;

use clap::ValueEnum;

/// An NVMe controller with two namespaces: blocks of 512 B in the first, of 4096 B in the second.
pub const NVME: &str = "0000:01:00.0";
/// Another NVMe controller, with one namespace of 512 B blocks.
pub const NVME2: &str = "0000:02:00.0";
/// An Intel 82576 network card.
pub const IGB: &str = "0000:03:00.0";
/// The first two virtual functions of that card, once it has them.
pub const IGB_VFS: &str = "0000:03:10.0,0000:03:10.2";
/// One of two NVMe functions that share a port and a bus reset; with the other it makes an IOMMU group.
pub const PAIR: &str = "0000:04:00.0";
/// The other.
pub const PAIR2: &str = "0000:04:00.1";
/// An NVMe controller that the host can take away and put back: `host device_del plug` and `host device_add plug`.
pub const PLUG: &str = "0000:05:00.0";
/// Another 82576, on the same network as the first: what one sends the other receives.
pub const IGB2: &str = "0000:06:00.0";
/// QEMU's device for education.
pub const EDU: &str = "0000:00:04.0";

/// What the guest has to find: address, vendor and device, and what it is.
pub const DEVICES: [(&str, &str, &str); 8] = [
    (NVME, "1b36:0010", "NVMe controller"),
    (NVME2, "1b36:0010", "second NVMe controller"),
    (IGB, "8086:10c9", "igb network card"),
    (PAIR, "1b36:0010", "first NVMe function of a pair"),
    (PAIR2, "1b36:0010", "second NVMe function of a pair"),
    (PLUG, "1b36:0010", "NVMe controller that can be unplugged"),
    (IGB2, "8086:10c9", "second igb network card"),
    (EDU, "1234:11e8", "edu device"),
];

/// Bytes of each disk.
pub const DISK: u64 = 256 << 20;
/// The disks' files: the two namespaces of the first controller, that of the second, those of the pair, that of the one that can be
/// unplugged.
pub const DISKS: [&str; 6] = ["disk0.img", "disk1.img", "disk2.img", "disk3.img", "disk4.img", "disk5.img"];
/// The socket of the software controller, for the machine that has it.
pub const SOCKET: &str = "nvme.sock";
/// The sockets of its two software network cards, which have a cable between them; the guest has them at 0000:00:05.0 and
/// 0000:00:06.0.
pub const NIC_SOCKETS: [&str; 2] = ["nic0.sock", "nic1.sock"];

/// The socket of QEMU's monitor, for QMP.
pub const MONITOR: &str = "monitor.sock";
/// The socket of the guest's channel to us: `/dev/vport0p1` in the guest.
pub const CHANNEL: &str = "channel.sock";
/// What the guest may have done to (QEMU's names): the device that can be unplugged, and those that links and errors are for.
pub const PLUGGABLE: &str = "plug";
/// The network cards.
pub const CARDS: [&str; 2] = ["card0", "card1"];

/// The device that can be unplugged, as `device_add` has it.
pub fn pluggable() -> serde_json::Value {
    serde_json::json!({ "driver": "nvme", "id": PLUGGABLE, "bus": "port5", "drive": "disk5", "serial": "PLUG" })
}

/// How QEMU runs the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Emulated: works everywhere
    #[default]
    Tcg,
    /// By the host's KVM: needs access to /dev/kvm
    Kvm,
}

/// Which of the machines a step runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// VT-d, two NVMe controllers, igb and edu.
    Devices,
    /// The same without an IOMMU, and with a kernel that lends devices all the same.
    NoIommu,
    /// An NVMe controller and two igb network cards, which the host serves by vfio-user.
    VfioUser,
}

impl Boot {
    /// All, in the order in which they run.
    pub const ALL: [Self; 3] = [Self::Devices, Self::NoIommu, Self::VfioUser];

    /// Its name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::NoIommu => "noiommu",
            Self::VfioUser => "vfio-user",
        }
    }

    /// QEMU's arguments for the machine without its console. Files are named relative to the folder that QEMU is started in.
    pub fn arguments(self, accel: Accel, kernel: &Path, initramfs: &Path, append: &str) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: &str| arguments.extend([option.to_string(), value.to_string()]);
        // Interrupt remapping needs the interrupt controller in QEMU, or half of it.
        let (accelerator, cpu, irqchip) = match accel {
            Accel::Tcg => ("tcg,thread=multi", "max", "kernel-irqchip=off"),
            Accel::Kvm => ("kvm", "host", "kernel-irqchip=split"),
        };
        add("-accel", accelerator);
        add("-cpu", cpu);
        add("-smp", "2");
        add("-display", "none");
        add("-kernel", &kernel.display().to_string());
        add("-initrd", &initramfs.display().to_string());
        add("-qmp", &format!("unix:{MONITOR},server=on,wait=off"));
        add("-chardev", &format!("socket,id=channel,path={CHANNEL},server=on,wait=off"));
        add("-device", "virtio-serial-pci,id=serial,addr=1e.0");
        add("-device", "virtserialport,bus=serial.0,nr=1,chardev=channel,name=host");
        match self {
            Self::Devices | Self::NoIommu => {
                add("-machine", &format!("q35,{irqchip}"));
                add("-m", "2G");
                if self == Self::Devices {
                    add("-append", &format!("{append} intel_iommu=on,sm_off"));
                    add("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on");
                } else {
                    add("-append", &format!("{append} vfio.enable_unsafe_noiommu_mode=1"));
                }
                // A link of the first generation and one lane: with others the bus reset of vfio-pci waits in vain.
                // The slot after that of edu is the fourth port's.
                for (port, addr) in (1..).zip([1, 2, 3, 5, 6, 7]) {
                    let place = format!("chassis={port},slot={port},addr={addr}");
                    add("-device", &format!("pcie-root-port,id=port{port},{place},x-speed=2_5,x-width=1"));
                }
                for (disk, file) in DISKS.iter().enumerate() {
                    // Not by -drive: such a disk ends with its device.
                    let cache = "cache.direct=off,cache.no-flush=on";
                    add("-blockdev", &format!("driver=file,node-name=disk{disk},filename={file},{cache}"));
                }
                add("-device", "nvme,id=nvme0,bus=port1,serial=TEST0");
                add("-device", "nvme-ns,bus=nvme0,drive=disk0,nsid=1");
                add("-device", "nvme-ns,bus=nvme0,drive=disk1,nsid=2,logical_block_size=4096,physical_block_size=4096");
                add("-device", "nvme,id=nvme1,bus=port2,drive=disk2,serial=TEST1");
                add("-device", "nvme,id=pair0,bus=port4,addr=0.0,multifunction=on,drive=disk3,serial=PAIR0");
                add("-device", "nvme,id=pair1,bus=port4,addr=0.1,drive=disk4,serial=PAIR1");
                add("-device", &pluggable().to_string());
                for (card, (id, port)) in CARDS.iter().zip(["port3", "port6"]).enumerate() {
                    add("-netdev", &format!("hubport,id=net{card},hubid=0"));
                    // QEMU's own addresses begin in the same way.
                    let mac = format!("52:54:00:12:34:{:02x}", 0x56 + card);
                    add("-device", &format!("igb,id={id},bus={port},netdev=net{card},mac={mac}"));
                }
                add("-device", "edu,addr=4");
            }
            Self::VfioUser => {
                add("-machine", &format!("q35,{irqchip},memory-backend=memory"));
                // Shared, so that the server maps it in place of asking for each piece.
                add("-object", "memory-backend-memfd,id=memory,size=512M,share=on");
                add("-m", "512M");
                add("-append", append);
                for (addr, path) in [("4", SOCKET), ("5", NIC_SOCKETS[0]), ("6", NIC_SOCKETS[1])] {
                    let socket = serde_json::json!({ "type": "unix", "path": path });
                    let device = serde_json::json!({ "driver": "vfio-user-pci", "addr": addr, "socket": socket });
                    add("-device", &device.to_string());
                }
            }
        }
        arguments
    }
}
