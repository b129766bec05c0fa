//! The nodes of containers and groups, their requests, and what each errno means.

use std::{
    ffi::CString,
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_GROUP_FLAGS_VIABLE, VFIO_NOIOMMU_IOMMU, VFIO_TYPE1v2_IOMMU, vfio_group_status,
};

use super::owned;
use crate::{
    Error, Result,
    dma::IovaRange,
    transport::vfio::{
        DeviceFd, VfToken,
        abi::{container, group},
        ioctl,
    },
};

/// Devices of a group that an error names at most.
const MAX_NAMED: usize = 16;

/// Who translates the addresses of a container's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Iommu {
    /// An IOMMU, by type 1 version 2: the one whose unmap is all or nothing.
    Type1,
    /// Nobody.
    None,
}

/// Where the nodes are.
#[derive(Debug)]
pub(super) struct Nodes {
    dev: PathBuf,
    sys: PathBuf,
}

/// A container's descriptor, and nothing else: its requests have the numbers of other ones on a device.
#[derive(Debug)]
pub(super) struct ContainerFd(OwnedFd);

/// A group's descriptor. A handle: clones are the same.
#[derive(Debug, Clone)]
pub struct GroupFd {
    fd: Arc<OwnedFd>,
    number: u32,
}

impl Nodes {
    pub(super) fn new(dev: &Path, sys: &Path) -> Self {
        Self { dev: dev.into(), sys: sys.into() }
    }

    pub(super) fn open_container(&self) -> Result<ContainerFd> {
        let path = self.dev.join("vfio");
        let fd = open(&path).map_err(|errno| {
            let not_ready = |why: &str| Error::NotReady { what: format!("{} can't be opened: {why}", path.display()) };
            match errno {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                    not_ready("the kernel has no VFIO containers: modprobe vfio-pci vfio_iommu_type1")
                }
                Errno::ACCESS | Errno::PERM => not_ready("no permission; it is meant for all users: chmod 0666"),
                errno => Error::io(format!("opening {}", path.display()), errno),
            }
        })?;
        // SAFETY: GET_API_VERSION takes nothing.
        match unsafe { ioctl::with_number(&fd, container::GET_API_VERSION, 0) } {
            Ok(version) if version as u32 == VFIO_API_VERSION => Ok(ContainerFd(fd)),
            Ok(version) => Err(Error::Unsupported {
                what: format!("version {version} of VFIO's interface; version {VFIO_API_VERSION} is known here"),
            }),
            Err(errno) => Err(Error::io(format!("{} is not a container of VFIO", path.display()), errno)),
        }
    }

    pub(super) fn open_group(&self, number: u32, noiommu: bool) -> Result<GroupFd> {
        let (with, without) = (self.dev.join(number.to_string()), self.dev.join(format!("noiommu-{number}")));
        let (path, other) = if noiommu { (without, with) } else { (with, without) };
        match open(&path) {
            Ok(fd) => Ok(GroupFd { fd: Arc::new(fd), number }),
            Err(Errno::NOENT) if other.exists() => Err(match noiommu {
                true => Error::invalid(format!("group {number} has an IOMMU: open it without noiommu")),
                false => Error::NotReady {
                    what: format!(
                        "group {number} has no IOMMU, so its device may write to any memory of the machine; ask for noiommu by \
                         name if that is wanted, or enable the IOMMU (firmware: VT-d, AMD-Vi or SMMU; kernel: intel_iommu=on)"
                    ),
                },
            }),
            Err(errno) => Err(group_open_failed(&path.display().to_string(), errno, noiommu)),
        }
    }

    /// Checks that no device of the group is in the hands of a driver that does DMA of its own.
    pub(super) fn check_viable(&self, opened: &GroupFd) -> Result<()> {
        let status = opened.status()?;
        if status & VFIO_GROUP_FLAGS_VIABLE != 0 {
            return Ok(());
        }
        Err(Error::InUse { what: self.not_viable(opened.number) })
    }

    fn not_viable(&self, number: u32) -> String {
        let devices = self.in_the_way(number);
        let named = if devices.is_empty() { "devices that sysfs does not show".into() } else { devices.join(", ") };
        format!(
            "IOMMU group {number} is in use by other drivers than vfio: {named}; the group is given out only as a whole: bind these \
             devices to vfio-pci too, or unbind them"
        )
    }

    /// The devices of a group that a kernel driver uses, as `BDF (driver)`.
    fn in_the_way(&self, number: u32) -> Vec<String> {
        let entries = fs::read_dir(self.sys.join(format!("kernel/iommu_groups/{number}/devices")));
        let mut devices: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let driver = fs::read_link(entry.path().join("driver")).ok()?;
                let driver = driver.file_name()?.to_string_lossy().into_owned();
                // Drivers that leave DMA to others (`driver_managed_dma`).
                let harmless = driver.starts_with("vfio") || matches!(driver.as_str(), "pci-stub" | "pcieport");
                (!harmless).then(|| format!("{} ({driver})", entry.file_name().to_string_lossy()))
            })
            .take(MAX_NAMED)
            .collect();
        devices.sort_unstable();
        devices
    }

    /// The error of a group that the container did not take.
    pub(super) fn set_container_failed(&self, number: u32, errno: Errno, first: bool) -> Error {
        match errno {
            Errno::PERM if !first && self.in_the_way(number).is_empty() => not_isolated(),
            Errno::PERM | Errno::BUSY => Error::InUse { what: self.not_viable(number) },
            // A late group: the IOMMU of the container is set up for what is mapped.
            Errno::INVAL if !first => Error::Conflict { device: format!("group {number}"), mapping: None, reserved: None },
            Errno::INVAL => Error::InUse {
                what: format!("group {number} is in another container: one of another part of this process; share that one"),
            },
            errno => Error::io(format!("taking group {number} into the container"), errno),
        }
    }

    /// The addresses that nothing may be mapped at while the group is in a container.
    pub(super) fn reserved(&self, number: u32) -> Result<Vec<IovaRange>> {
        let path = self.sys.join(format!("kernel/iommu_groups/{number}/reserved_regions"));
        let text = fs::read_to_string(&path).map_err(|error| Error::io(format!("reading {}", path.display()), error))?;
        Ok(text.lines().filter_map(reserved_region).collect())
    }
}

/// A line of `reserved_regions`; `None` for one that memory may be mapped over, or that can't be read.
fn reserved_region(line: &str) -> Option<IovaRange> {
    let mut words = line.split_whitespace();
    let mut address = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let range = IovaRange { start: address()?, last: address()? };
    (words.next()? != "direct-relaxable" && range.start <= range.last).then_some(range)
}

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    use rustix::fs::{Mode, OFlags, open};
    open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// The error of a group that can't be opened.
fn group_open_failed(path: &str, errno: Errno, noiommu: bool) -> Error {
    let not_ready = |why: &str| Error::NotReady { what: format!("{path} can't be opened: {why}") };
    match errno {
        Errno::NOENT if noiommu => not_ready(
            "no device without an IOMMU is bound to vfio-pci; load vfio with enable_unsafe_noiommu_mode=1 and bind the device again",
        ),
        Errno::NOENT => not_ready(
            "none of the group's devices is bound to vfio-pci, or the IOMMU is off (firmware: VT-d, AMD-Vi or SMMU; kernel: \
             intel_iommu=on)",
        ),
        Errno::BUSY => Error::InUse {
            what: format!(
                "{path} can't be opened: a group has one user, and another process has it, or one of its devices by cdev"
            ),
        },
        Errno::PERM => not_ready("a device without an IOMMU needs CAP_SYS_RAWIO"),
        Errno::ACCESS => not_ready("no permission; chown or chmod the node, or add a udev rule for the subsystem vfio"),
        Errno::NODEV | Errno::NXIO => not_ready("its devices are gone"),
        errno => Error::io(format!("opening {path}"), errno),
    }
}

/// The platform can't keep a device from sending interrupts of others.
fn not_isolated() -> Error {
    Error::NotReady {
        what: "the platform does not isolate the interrupts of devices: enable interrupt remapping in the firmware, or accept the \
               risk with vfio_iommu_type1.allow_unsafe_interrupts=1"
            .into(),
    }
}

impl ContainerFd {
    /// Makes the IOMMU of the first group that of the container.
    pub(super) fn set_iommu(&self, iommu: Iommu) -> Result<()> {
        let number = match iommu {
            Iommu::Type1 => VFIO_TYPE1v2_IOMMU,
            Iommu::None => VFIO_NOIOMMU_IOMMU,
        };
        let missing = || Error::NotReady {
            what: "the kernel has no containers for this kind of IOMMU (type 1, version 2): modprobe vfio_iommu_type1"
                .into(),
        };
        // SAFETY: CHECK_EXTENSION takes a number.
        match unsafe { ioctl::with_number(self, container::CHECK_EXTENSION, number as usize) } {
            Ok(0) => return Err(missing()),
            Ok(_) => {}
            Err(errno) => return Err(Error::io("asking for the kinds of IOMMU that a container knows", errno)),
        }
        // SAFETY: SET_IOMMU takes a number.
        unsafe { ioctl::with_number(self, container::SET_IOMMU, number as usize) }.map(drop).map_err(|errno| match errno {
            Errno::NODEV => missing(),
            Errno::PERM => not_isolated(),
            Errno::BUSY => {
                Error::InUse { what: "another driver has given a device of the group page tables of its own".into() }
            }
            Errno::INVAL => Error::Unsupported {
                what: "the IOMMU of the group can't be used: it leaves no addresses free, or does not keep caches coherent"
                    .into(),
            },
            errno => Error::io("setting up the IOMMU", errno),
        })
    }
}

impl AsFd for ContainerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl GroupFd {
    /// The group's number.
    pub fn number(&self) -> u32 {
        self.number
    }

    fn status(&self) -> Result<u32> {
        let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        // SAFETY: GET_STATUS takes a `vfio_group_status`, and writes at most that.
        unsafe { ioctl::with_struct(self, group::GET_STATUS, &mut status) }
            .map_err(|errno| Error::io(format!("group {} is not a group of VFIO", self.number), errno))?;
        Ok(status.flags)
    }

    pub(super) fn set_container(&self, container: &ContainerFd) -> Result<(), Errno> {
        let mut fd: i32 = container.as_fd().as_raw_fd();
        // SAFETY: SET_CONTAINER reads a descriptor.
        unsafe { ioctl::with_struct(self, group::SET_CONTAINER, &mut fd) }.map(drop)
    }

    pub(super) fn unset_container(&self) -> Result<(), Errno> {
        // SAFETY: UNSET_CONTAINER takes nothing.
        unsafe { ioctl::with_number(self, group::UNSET_CONTAINER, 0) }.map(drop)
    }

    /// Opens a device of the group; `None` when it has no such.
    pub(super) fn device(&self, name: &str, token: Option<&VfToken>) -> Result<Option<DeviceFd>> {
        let text = match token {
            Some(token) => format!("{name} vf_token={token}"),
            None => name.into(),
        };
        // What follows a space is options, and the kernel's buffer for both is a page.
        let valid = !name.is_empty() && name.len() < 256 && !name.contains(char::is_whitespace);
        let text = CString::new(text).ok().filter(|_| valid);
        let text = text.ok_or_else(|| Error::invalid(format!("{name:?} is not the name of a device")))?;
        // SAFETY: GET_DEVICE_FD reads a string that ends with a NUL; it outlives the call.
        match unsafe { ioctl::with_number(self, group::GET_DEVICE_FD, text.as_ptr().addr()) } {
            Ok(fd) => Ok(Some(DeviceFd::new(owned(fd)))),
            Err(Errno::NODEV) => Ok(None),
            Err(errno) => Err(device_failed(name, token.is_some(), errno)),
        }
    }
}

fn device_failed(name: &str, token: bool, errno: Errno) -> Error {
    let what = format!("opening device {name}");
    match errno {
        Errno::ACCESS if token => Error::invalid(format!("{what}: the VF token is not the one of its physical function")),
        Errno::ACCESS => Error::invalid(format!(
            "{what}: it is a virtual function, or has some in use, and wants the VF token of its physical function"
        )),
        Errno::INVAL if token => {
            Error::invalid(format!("{what}: it wants no VF token, as its physical function is not bound to vfio-pci"))
        }
        Errno::BUSY => Error::InUse { what: format!("{what}: another driver uses it, see /proc/iomem; unload that driver") },
        errno => {
            let why = match errno {
                Errno::AGAIN => "; somebody else holds the device's lock, try again",
                Errno::IO => "; the device does not answer",
                Errno::MFILE => "; too many open files: raise `ulimit -n`",
                _ => "",
            };
            Error::io(format!("{what}{why}"), errno)
        }
    }
}

impl AsFd for GroupFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_errno_has_its_meaning() {
        let open = |errno, noiommu| group_open_failed("/dev/vfio/1", errno, noiommu);
        for (errno, noiommu, part) in [
            (Errno::NOENT, false, "intel_iommu=on"),
            (Errno::NOENT, true, "enable_unsafe_noiommu_mode=1"),
            (Errno::PERM, true, "CAP_SYS_RAWIO"),
            (Errno::ACCESS, false, "udev"),
            (Errno::NODEV, false, "gone"),
        ] {
            let error = open(errno, noiommu);
            assert!(matches!(&error, Error::NotReady { what } if what.contains(part)), "{error}");
        }
        assert!(matches!(open(Errno::BUSY, false), Error::InUse { .. }));
        assert!(matches!(open(Errno::MFILE, false), Error::Io { .. }));
        for (errno, token, part) in [
            (Errno::ACCESS, false, "wants the VF token"),
            (Errno::ACCESS, true, "is not the one"),
            (Errno::INVAL, true, "wants no VF token"),
            (Errno::AGAIN, false, "try again"),
        ] {
            assert!(device_failed("0000:01:00.0", token, errno).to_string().contains(part), "{errno:?}");
        }
    }
}
