//! What is missing to use a device, each with its remedy.

use std::{fmt, fs, path::PathBuf};

use rustix::{
    fs::{Access, AtFlags, CWD, accessat},
    io::Errno,
    process::{Resource, geteuid, getrlimit},
    thread::{CapabilitySet, capabilities},
};

use super::{
    Bdf,
    sysfs::{Pci, PciDevice},
};

/// Class and subclass of bridges between PCI buses: their configuration space is of another kind.
pub(super) const PCI_BRIDGE: u32 = 0x0604;
/// Bytes that a driver needs at least: rings, and a few pages of data.
const LEAST_MEMORY: u64 = 1 << 20;

/// Something that has to be put right before a device can be used. [`Display`](fmt::Display) says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// It is a bridge between PCI buses, which VFIO can't serve.
    Bridge {
        /// The bridge.
        bdf: Bdf,
    },
    /// No IOMMU is in front of it.
    NoIommu {
        /// The device.
        bdf: Bdf,
    },
    /// The driver `vfio-pci` is not there.
    NotLoaded,
    /// It has a driver of the kernel, or none.
    NotBound {
        /// The device.
        bdf: Bdf,
        /// Its driver.
        driver: Option<String>,
    },
    /// Another device of its group does DMA for a driver of the kernel.
    GroupShared {
        /// The group.
        group: u32,
        /// The other device.
        other: String,
        /// Its driver.
        driver: String,
    },
    /// A device node is not there.
    NoNode {
        /// The node.
        node: PathBuf,
        /// What would make it.
        remedy: &'static str,
    },
    /// This process may not open a node.
    NoPermission {
        /// The node.
        node: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The effective user of this process.
        uid: u32,
    },
    /// The kernel makes no character device for a VFIO device.
    NoCdevSupport,
    /// Too little memory may be pinned.
    Memlock(Memlock),
}

impl Obstacle {
    /// In a few words, for a table.
    pub fn brief(&self) -> String {
        match self {
            Self::Bridge { .. } => "not for VFIO".into(),
            Self::NoIommu { .. } => "no IOMMU".into(),
            Self::NotLoaded => "vfio-pci not loaded".into(),
            Self::NotBound { driver: Some(driver), .. } => format!("bound to {driver}"),
            Self::NotBound { driver: None, .. } => "not bound to vfio-pci".into(),
            Self::GroupShared { other, driver, .. } => format!("group shared with {other} ({driver})"),
            Self::NoNode { node, .. } => format!("no {}", node.display()),
            Self::NoPermission { node, .. } => format!("no permission for {}", node.display()),
            Self::NoCdevSupport => "kernel without cdev".into(),
            Self::Memlock(_) => "RLIMIT_MEMLOCK too low".into(),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge { bdf } => write!(f, "{bdf} is a PCI bridge: VFIO takes the devices behind it"),
            Self::NoIommu { bdf } => write!(
                f,
                "{bdf} has no IOMMU: boot with intel_iommu=on (Intel) or amd_iommu=on (AMD), and enable VT-d or AMD-Vi in the \
                 firmware, or a virtual IOMMU in the virtual machine"
            ),
            Self::NotLoaded => write!(f, "the driver vfio-pci is not loaded: modprobe vfio-pci"),
            Self::NotBound { bdf, driver: Some(driver) } => {
                write!(f, "{bdf} is bound to the kernel's driver {driver}: vfio-uring bind {bdf}")
            }
            Self::NotBound { bdf, driver: None } => write!(f, "{bdf} has no driver: vfio-uring bind {bdf}"),
            Self::GroupShared { group, other, driver } => write!(
                f,
                "its IOMMU group {group} also has {other}, which is bound to {driver}: vfio-uring bind {other}, or use a slot \
                 with a group of its own"
            ),
            Self::NoNode { node, remedy } => write!(f, "{} is missing: {remedy}", node.display()),
            Self::NoPermission { node, mode, uid } => {
                let node = node.display();
                write!(
                    f,
                    "the user with id {uid} may not read and write {node} (mode {mode:03o}): chown {uid} {node}, have a udev rule do \
                     it, or run as root"
                )
            }
            Self::NoCdevSupport => {
                write!(f, "this kernel has no character device for a VFIO device: it needs Linux 6.6 with VFIO_DEVICE_CDEV")
            }
            Self::Memlock(memlock) => memlock.fmt(f),
        }
    }
}

/// What is missing to use a device in each of the two ways. [`Display`](fmt::Display) says it in a few words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Obstacles {
    /// By its group and a container with type1.
    pub group: Vec<Obstacle>,
    /// By its own character device and iommufd.
    pub cdev: Vec<Obstacle>,
}

impl Obstacles {
    /// Whether the device can be used in one of the ways.
    pub fn ready(&self) -> bool {
        self.group.is_empty() || self.cdev.is_empty()
    }

    /// What is missing in one way or the other, each once.
    pub fn all(&self) -> impl Iterator<Item = &Obstacle> {
        self.group.iter().chain(self.cdev.iter().filter(|obstacle| !self.group.contains(obstacle)))
    }

    /// What is missing in both ways.
    pub fn common(&self) -> impl Iterator<Item = &Obstacle> {
        self.group.iter().filter(|obstacle| self.cdev.contains(obstacle))
    }
}

impl fmt::Display for Obstacles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brief = |obstacle: &Obstacle| obstacle.brief();
        f.write_str(&match (self.group.first(), self.cdev.first()) {
            (None, None) => "ready by group, cdev".into(),
            (None, Some(_)) => "ready by group".into(),
            (Some(_), None) => "ready by cdev".into(),
            (Some(group), Some(cdev)) => match self.common().next() {
                Some(_) => self.common().map(brief).collect::<Vec<_>>().join(", "),
                None => format!("{}; {}", group.brief(), cdev.brief()),
            },
        })
    }
}

/// How much memory this process may pin for DMA: `RLIMIT_MEMLOCK`, and whether it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memlock {
    /// Bytes; `None` without a limit.
    pub limit: Option<u64>,
    /// `CAP_IPC_LOCK`, which lifts the limit.
    pub privileged: bool,
}

impl Memlock {
    /// That of this process.
    pub fn current() -> Self {
        let privileged = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        Self { limit: getrlimit(Resource::Memlock).current, privileged }
    }

    /// Bytes that may be pinned; `None` for as many as there are.
    pub fn allowed(self) -> Option<u64> {
        self.limit.filter(|_| !self.privileged)
    }
}

impl fmt::Display for Memlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.limit, self.privileged) {
            (None, _) => write!(f, "RLIMIT_MEMLOCK is unlimited: any amount of memory can be mapped for DMA"),
            (Some(limit), true) => write!(
                f,
                "RLIMIT_MEMLOCK is {}, but CAP_IPC_LOCK lifts it: any amount of memory can be mapped for DMA",
                bytes(limit)
            ),
            (Some(limit), false) => write!(
                f,
                "RLIMIT_MEMLOCK is {}: no more memory than that can be mapped for DMA; raise it by ulimit -l, limits.conf(5) or \
                 LimitMEMLOCK= of systemd",
                bytes(limit)
            ),
        }
    }
}

fn bytes(count: u64) -> String {
    match count {
        1_048_576.. => format!("{} MiB", count >> 20),
        1024.. => format!("{} KiB", count >> 10),
        _ => format!("{count} B"),
    }
}

impl Pci {
    /// What is missing for this process to use `device`, by its group and by its own character device.
    ///
    /// Nothing is opened, so that nobody else is kept from opening it: whether another program has it is not looked at.
    pub fn obstacles(&self, device: &PciDevice) -> Obstacles {
        self.obstacles_with(device, Memlock::current())
    }

    pub(super) fn obstacles_with(&self, device: &PciDevice, memlock: Memlock) -> Obstacles {
        let bdf = device.bdf;
        let mut common = Vec::new();
        if device.ids.class >> 8 == PCI_BRIDGE {
            let alone = vec![Obstacle::Bridge { bdf }];
            return Obstacles { group: alone.clone(), cdev: alone };
        }
        let Some(group) = device.group.as_ref().filter(|group| !group.no_iommu) else {
            // All else follows from this.
            let alone = vec![Obstacle::NoIommu { bdf }];
            return Obstacles { group: alone.clone(), cdev: alone };
        };
        let vfio = device.vfio.is_some() || device.driver.as_deref() == Some("vfio-pci");
        if !vfio && !self.sys("bus/pci/drivers/vfio-pci").exists() {
            common.push(Obstacle::NotLoaded);
        }
        if !vfio {
            common.push(Obstacle::NotBound { bdf, driver: device.driver.clone() });
        }
        for other in group.others.iter().filter(|other| other.blocks) {
            let (other, driver) = (other.name.clone(), other.driver.clone().unwrap_or_default());
            common.push(Obstacle::GroupShared { group: group.id, other, driver });
        }
        if memlock.allowed().is_some_and(|allowed| allowed < LEAST_MEMORY) {
            common.push(Obstacle::Memlock(memlock));
        }
        let mut by_group = common.clone();
        by_group.extend(self.node(self.dev("vfio/vfio"), "modprobe vfio, on a kernel with VFIO_CONTAINER"));
        let mut by_cdev = common;
        by_cdev.extend(self.node(self.dev("iommu"), "modprobe iommufd, on Linux 6.2 or newer with IOMMUFD"));
        // These are there only after the bind.
        if vfio {
            by_group.extend(self.node(self.group_node(group), "is it a kernel with VFIO_GROUP, and is udev running?"));
            match self.cdev_node(device) {
                Some(node) => by_cdev.extend(self.node(node, "is udev running?")),
                None => by_cdev.push(Obstacle::NoCdevSupport),
            }
        }
        Obstacles { group: by_group, cdev: by_cdev }
    }

    fn node(&self, node: PathBuf, remedy: &'static str) -> Option<Obstacle> {
        use std::os::unix::fs::PermissionsExt;
        match accessat(CWD, &node, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS) {
            Ok(()) => None,
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
                let mode = fs::metadata(&node).map_or(0, |metadata| metadata.permissions().mode() & 0o777);
                Some(Obstacle::NoPermission { node, mode, uid: geteuid().as_raw() })
            }
            Err(_) => Some(Obstacle::NoNode { node, remedy }),
        }
    }
}
