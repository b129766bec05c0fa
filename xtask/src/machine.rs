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
/// QEMU's device for education.
pub const EDU: &str = "0000:00:04.0";

/// What the guest has to find: address, vendor and device, and what it is.
pub const DEVICES: [(&str, &str, &str); 4] = [
    (NVME, "1b36:0010", "NVMe controller"),
    (NVME2, "1b36:0010", "second NVMe controller"),
    (IGB, "8086:10c9", "igb network card"),
    (EDU, "1234:11e8", "edu device"),
];

/// Bytes of each disk.
pub const DISK: u64 = 256 << 20;
/// The disks' files: the two namespaces of the first controller, and that of the second.
pub const DISKS: [&str; 3] = ["disk0.img", "disk1.img", "disk2.img"];
/// The socket of the software controller, for the machine that has it.
pub const SOCKET: &str = "nvme.sock";
/// The sockets of its two software network cards, which have a cable between them; the guest has them at 0000:00:05.0 and
/// 0000:00:06.0.
pub const NIC_SOCKETS: [&str; 2] = ["nic0.sock", "nic1.sock"];

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
                for port in 1..=3 {
                    let place = format!("chassis={port},slot={port},addr={port}");
                    add("-device", &format!("pcie-root-port,id=port{port},{place},x-speed=2_5,x-width=1"));
                }
                for (disk, file) in DISKS.iter().enumerate() {
                    add("-drive", &format!("if=none,id=disk{disk},file={file},format=raw,cache=unsafe"));
                }
                add("-device", "nvme,id=nvme0,bus=port1,serial=TEST0");
                add("-device", "nvme-ns,bus=nvme0,drive=disk0,nsid=1");
                add("-device", "nvme-ns,bus=nvme0,drive=disk1,nsid=2,logical_block_size=4096,physical_block_size=4096");
                add("-device", "nvme,id=nvme1,bus=port2,drive=disk2,serial=TEST1");
                add("-netdev", "hubport,id=net0,hubid=0");
                add("-device", "igb,bus=port3,netdev=net0");
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
