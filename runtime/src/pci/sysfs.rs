//! The PCI devices of this machine as the kernel shows them in `/sys`, and who has them.
//!
//! Everything here is short file operations that block: call it before the reactor starts, or off its thread. What is in the
//! files is not trusted: it is read up to a limit, and an error names the file and what is in it.
//!
//! Sources: `Documentation/ABI/testing/sysfs-bus-pci`, `sysfs-kernel-iommu_groups` and `sysfs-devices-vfio-dev` of the kernel.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::{Bdf, PciIds};
pub use super::{
    obstacle::{Memlock, Obstacle, Obstacles},
    plan::{Outcome, Plan, Step},
};
use crate::{Error, Result};

/// Bytes of an attribute in `/sys`, at most: the kernel gives a page.
const ATTRIBUTE: u64 = 4096;
/// Bytes of a table in `/sys` or `/proc`, at most.
pub(super) const TABLE: u64 = 16 << 20;

/// The PCI devices of a machine.
///
/// ```no_run
/// use vfio_uring::pci::sysfs::Pci;
///
/// let pci = Pci::system();
/// for device in pci.devices()? {
///     println!("{} {:?} {}", device.bdf, device.driver, pci.obstacles(&device));
/// }
/// # Ok::<(), vfio_uring::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pci {
    root: PathBuf,
}

/// A PCI device, as it was when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PciDevice {
    /// Where it is.
    pub bdf: Bdf,
    /// What it is.
    pub ids: PciIds,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// The only driver that it may be bound to, if it was limited to one.
    pub driver_override: Option<String>,
    /// The IOMMU that it is behind, as `dmar0`.
    pub iommu: Option<String>,
    /// The devices that the IOMMU can't tell from this one; without an IOMMU there is none.
    pub group: Option<IommuGroup>,
    /// The VFIO device, while it is bound to a driver of VFIO.
    pub vfio: Option<VfioDev>,
    /// The NUMA node that it is attached to.
    pub numa_node: Option<u32>,
    /// Virtual functions, if it can have some.
    pub sriov: Option<Sriov>,
    /// The physical function, if this is a virtual one.
    pub physical_function: Option<Bdf>,
}

/// An IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number.
    pub id: u32,
    /// It is a stand-in: no IOMMU confines the device (the kernel's unsafe no-IOMMU mode).
    pub no_iommu: bool,
    /// I/O virtual addresses that its devices can't use for DMA, or that mean something else.
    pub reserved: Vec<ReservedRegion>,
    /// The devices in it besides the one that it was read for.
    pub others: Vec<GroupMember>,
}

/// I/O virtual addresses that are not free for DMA memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedRegion {
    /// The first byte.
    pub start: u64,
    /// The last byte.
    pub last: u64,
    /// What it is, in the kernel's word: `direct`, `direct-relaxable`, `reserved` or `msi`.
    pub kind: String,
}

impl ReservedRegion {
    /// Whether VFIO lets memory be mapped there all the same.
    pub fn relaxable(&self) -> bool {
        self.kind == "direct-relaxable"
    }
}

/// A device of an IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMember {
    /// Its name on its bus: for a PCI device its [`Bdf`].
    pub name: String,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Whether it stands in the way of VFIO: its driver uses DMA on its own.
    pub blocks: bool,
}

/// The directory `vfio-dev/vfioN` of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VfioDev {
    /// `vfioN`; neither the number of the group, nor the same after the next bind.
    pub name: String,
    /// Major and minor number of its character device; `None` when the kernel was built without them (VFIO_DEVICE_CDEV).
    pub dev: Option<(u32, u32)>,
}

/// The virtual functions of a physical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sriov {
    /// How many there are.
    pub enabled: u16,
    /// How many there can be.
    pub total: u16,
}

impl Pci {
    /// Those of this machine.
    pub fn system() -> Self {
        Self::at("/")
    }

    /// Those of the machine whose `sys`, `dev` and `proc` are in the folder `root`: a container's view of its host, or a test's
    /// files.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The addresses of all of them, in order.
    ///
    /// # Errors
    /// [`Error::Io`] when they can't be listed, or one has a name that is none.
    pub fn addresses(&self) -> Result<Vec<Bdf>> {
        let dir = self.sys("bus/pci/devices");
        let mut all = Vec::new();
        for name in names(&dir)? {
            all.push(Bdf::read(&name).map_err(|_| malformed(&dir, &name, "a PCI address"))?);
        }
        all.sort_unstable();
        Ok(all)
    }

    /// All of them, in the order of their addresses. One that is unplugged meanwhile is left out.
    ///
    /// # Errors
    /// Those of [`Pci::addresses`] and [`Pci::device`].
    pub fn devices(&self) -> Result<Vec<PciDevice>> {
        let mut all = Vec::new();
        for bdf in self.addresses()? {
            match self.device(bdf) {
                Ok(device) => all.push(device),
                Err(_) if !self.device_dir(bdf).exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// The device at `bdf`.
    ///
    /// # Errors
    /// [`Error::Io`] when there is none, or one of its files can't be read or has in it what it should not have: the error names
    /// the file.
    pub fn device(&self, bdf: Bdf) -> Result<PciDevice> {
        let dir = self.device_dir(bdf);
        if !dir.exists() {
            let what = format!("there is no PCI device {bdf}; vfio-uring list --all shows those that there are");
            return Err(Error::io(what, io::ErrorKind::NotFound));
        }
        let ids = PciIds {
            vendor: hexadecimal(&dir.join("vendor"))?,
            device: hexadecimal(&dir.join("device"))?,
            subsystem_vendor: hexadecimal(&dir.join("subsystem_vendor"))?,
            subsystem: hexadecimal(&dir.join("subsystem_device"))?,
            class: hexadecimal(&dir.join("class"))?,
            // Kernels before 4.10 have no such file.
            revision: if dir.join("revision").exists() { hexadecimal(&dir.join("revision"))? } else { 0 },
        };
        let driver_override = optional(&dir.join("driver_override"))?.filter(|text| !text.is_empty() && text != "(null)");
        let numa_node = match optional(&dir.join("numa_node"))?.as_deref() {
            None | Some("-1") => None,
            Some(text) => Some(decimal(&dir.join("numa_node"), text)?),
        };
        let sriov = match optional(&dir.join("sriov_totalvfs"))? {
            None => None,
            Some(total) => Some(Sriov {
                total: decimal(&dir.join("sriov_totalvfs"), &total)?,
                enabled: decimal(&dir.join("sriov_numvfs"), &text(&dir.join("sriov_numvfs"))?)?,
            }),
        };
        let physical_function = match link(&dir.join("physfn"))? {
            None => None,
            Some(name) => Some(Bdf::read(&name).map_err(|_| malformed(&dir.join("physfn"), &name, "a PCI address"))?),
        };
        Ok(PciDevice {
            bdf,
            ids,
            driver: link(&dir.join("driver"))?,
            driver_override,
            iommu: link(&dir.join("iommu"))?,
            group: self.group_of(bdf)?,
            vfio: vfio_dev(&dir)?,
            numa_node,
            sriov,
            physical_function,
        })
    }

    /// The character device of a group, `/dev/vfio/N`.
    pub fn group_node(&self, group: &IommuGroup) -> PathBuf {
        self.dev(&format!("vfio/{}{}", if group.no_iommu { "noiommu-" } else { "" }, group.id))
    }

    /// The character device of a VFIO device, `/dev/vfio/devices/vfioN`; `None` when it has none.
    pub fn cdev_node(&self, device: &PciDevice) -> Option<PathBuf> {
        let vfio = device.vfio.as_ref().filter(|vfio| vfio.dev.is_some())?;
        Some(self.dev(&format!("vfio/devices/{}", vfio.name)))
    }

    /// Whether `device` is to be opened by its own character device rather than by its group: it has one, and `/dev/iommu` can
    /// be opened.
    pub fn prefers_cdev(&self, device: &PciDevice) -> bool {
        let iommu = fs::OpenOptions::new().read(true).write(true).open(self.dev("iommu"));
        self.cdev_node(device).is_some_and(|node| node.exists()) && iommu.is_ok()
    }

    fn group_of(&self, bdf: Bdf) -> Result<Option<IommuGroup>> {
        let at = self.device_dir(bdf).join("iommu_group");
        let Some(name) = link(&at)? else { return Ok(None) };
        let id = decimal(&at, &name)?;
        let dir = self.sys(&format!("kernel/iommu_groups/{id}"));
        let reserved = match optional_table(&dir.join("reserved_regions"))? {
            Some(table) => reserved_regions(&dir.join("reserved_regions"), &table)?,
            None => Vec::new(),
        };
        let no_iommu = optional(&dir.join("name"))?.as_deref() == Some("vfio-noiommu");
        let mut others = Vec::new();
        for name in names(&dir.join("devices"))? {
            if Bdf::read(&name) != Ok(bdf) {
                let member = dir.join("devices").join(&name);
                let driver = link(&member.join("driver"))?;
                let blocks = driver.as_deref().is_some_and(|driver| !shares(driver)) && vfio_dev(&member)?.is_none();
                others.push(GroupMember { name, driver, blocks });
            }
        }
        others.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(IommuGroup { id, no_iommu, reserved, others }))
    }

    pub(super) fn device_dir(&self, bdf: Bdf) -> PathBuf {
        self.sys(&format!("bus/pci/devices/{bdf}"))
    }

    pub(super) fn sys(&self, path: &str) -> PathBuf {
        self.root.join("sys").join(path)
    }

    pub(super) fn dev(&self, path: &str) -> PathBuf {
        self.root.join("dev").join(path)
    }

    pub(super) fn proc(&self, path: &str) -> PathBuf {
        self.root.join("proc").join(path)
    }
}

/// Whether the driver leaves the DMA of its group to others (`driver_managed_dma` in the kernel).
fn shares(driver: &str) -> bool {
    matches!(driver, "vfio-pci" | "pci-stub" | "pcieport" | "shpchp")
}

fn vfio_dev(device: &Path) -> Result<Option<VfioDev>> {
    let dir = device.join("vfio-dev");
    if !dir.exists() {
        return Ok(None);
    }
    let Some(name) = names(&dir)?.into_iter().next() else { return Ok(None) };
    let file = dir.join(&name).join("dev");
    let dev = match optional(&file)? {
        None => None,
        Some(text) => {
            let numbers = text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            Some(numbers.ok_or_else(|| malformed(&file, &text, "MAJOR:MINOR"))?)
        }
    };
    Ok(Some(VfioDev { name, dev }))
}

fn reserved_regions(file: &Path, table: &str) -> Result<Vec<ReservedRegion>> {
    let lines = table.lines().filter(|line| !line.is_empty());
    let regions = lines.map(|line| {
        let mut words = line.split_ascii_whitespace();
        let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        match (number(), number(), words.next()) {
            (Some(start), Some(last), Some(kind)) if start <= last => Ok(ReservedRegion { start, last, kind: kind.into() }),
            _ => Err(malformed(file, line, "a range of addresses and its type")),
        }
    });
    regions.collect()
}

/// The names in a directory.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(format!("listing {}", dir.display()), error);
    let entries = fs::read_dir(dir).map_err(failed)?;
    entries.map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned())).collect()
}

/// The last name that a symbolic link leads to; `None` when there is no link.
pub(super) fn link(at: &Path) -> Result<Option<String>> {
    match fs::read_link(at) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("reading the link {}", at.display()), error)),
    }
}

/// What a file has in it, without the white space around it.
pub(super) fn text(file: &Path) -> Result<String> {
    read(file, ATTRIBUTE).map(|text| text.trim().into())
}

/// [`text`], or `None` when there is no such file.
pub(super) fn optional(file: &Path) -> Result<Option<String>> {
    if file.exists() { text(file).map(Some) } else { Ok(None) }
}

/// A longer file, or `None` when there is no such file.
pub(super) fn optional_table(file: &Path) -> Result<Option<String>> {
    if file.exists() { read(file, TABLE).map(Some) } else { Ok(None) }
}

fn read(file: &Path, limit: u64) -> Result<String> {
    let failed = |error| Error::io(format!("reading {}", file.display()), error);
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).map_err(failed)?;
    opened.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, format!("it has more than {limit} bytes"))));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn hexadecimal<T: TryFrom<u32>>(file: &Path) -> Result<T> {
    let text = text(file)?;
    let number = text.strip_prefix("0x").and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let bits = size_of::<T>() * 8;
    let number = number.and_then(|number| T::try_from(number).ok());
    number.ok_or_else(|| malformed(file, &text, &format!("a hexadecimal number of {bits} bits at most")))
}

fn decimal<T: std::str::FromStr>(file: &Path, text: &str) -> Result<T> {
    text.parse().map_err(|_| malformed(file, text, "a decimal number in its range"))
}

/// What is in a file (or where a link leads) is not what belongs there.
fn malformed(file: &Path, text: &str, expected: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    let error = io::Error::new(io::ErrorKind::InvalidData, format!("{shown:?} is not {expected}"));
    Error::io(format!("reading {}", file.display()), error)
}
