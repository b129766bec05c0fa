//! Whether something would break if a device lost its driver.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::sysfs::{Pci, PciDevice, names, optional, optional_table};
use crate::{Error, Result};

/// `IFF_UP` of `linux/if.h`.
const IFF_UP: u32 = 1;
/// Processes whose open files are looked at, at most.
const PROCESSES: usize = 100_000;

/// A block device: a disk, a partition, or what is made of them.
struct Block {
    name: String,
    /// `MAJOR:MINOR`.
    dev: String,
}

impl Pci {
    /// Refuses a device that is in use: a disk of it (also a partition, or a volume on top) is mounted, is swap or is claimed by
    /// someone; an interface of it is up; a program has it open through VFIO.
    ///
    /// What it can't see: interfaces in other network namespaces, and programs that read a disk without claiming it.
    ///
    /// # Errors
    /// [`Error::InUse`], which says by what and what to do, and [`Error::Io`] when that can't be found out.
    pub fn check_idle(&self, device: &PciDevice) -> Result<()> {
        self.check_interfaces(device)?;
        self.check_disks(device)?;
        self.check_vfio(device)
    }

    fn check_interfaces(&self, device: &PciDevice) -> Result<()> {
        for name in self.below(device, "net")? {
            let dir = self.sys(&format!("class/net/{name}"));
            let flags = optional(&dir.join("flags"))?.unwrap_or_default();
            let flags = flags.strip_prefix("0x").and_then(|digits| u32::from_str_radix(digits, 16).ok());
            // Flags that can't be read count as up.
            let up = flags.is_none_or(|flags| flags & IFF_UP != 0);
            if up || optional(&dir.join("operstate"))?.as_deref() == Some("up") {
                let what = format!("{}: its network interface {name} is up; ip link set {name} down first", device.bdf);
                return Err(Error::InUse { what });
            }
        }
        Ok(())
    }

    fn check_disks(&self, device: &PciDevice) -> Result<()> {
        let blocks = self.with_holders(self.disks(device)?)?;
        if blocks.is_empty() {
            return Ok(());
        }
        let in_use = |what: String| Err(Error::InUse { what: format!("{}: {what}", device.bdf) });
        let mounts = optional_table(&self.proc("self/mountinfo"))?.unwrap_or_default();
        for line in mounts.lines() {
            if let Some((block, place)) = self.mounted(line, &blocks) {
                return in_use(format!("{block} is mounted on {place}; umount {place} first"));
            }
        }
        let swaps = optional_table(&self.proc("swaps"))?.unwrap_or_default();
        for line in swaps.lines().skip(1) {
            let file = unescape(line.split_ascii_whitespace().next().unwrap_or_default());
            if let Some(block) = self.named(&file, &blocks) {
                return in_use(format!("{block} is swap space; swapoff {file} first"));
            }
        }
        for block in &blocks {
            let node = self.dev(&block.name);
            if is_claimed(&node, &block.dev) {
                let node = node.display();
                return in_use(format!(
                    "{node} is claimed, by a file system that is mounted elsewhere, a volume on top, or a program; release it first"
                ));
            }
        }
        Ok(())
    }

    fn check_vfio(&self, device: &PciDevice) -> Result<()> {
        if device.vfio.is_none() {
            return Ok(());
        }
        let nodes: Vec<_> = device.group.iter().map(|group| self.group_node(group)).chain(self.cdev_node(device)).collect();
        // The kernel would wait for its user to let go, without an end.
        if let Some((node, user)) = self.user_of(&nodes) {
            let (bdf, node) = (device.bdf, node.display());
            return Err(Error::InUse { what: format!("{bdf}: {user} has {node} open; end it first") });
        }
        // A group opens once: this also sees users that keep but a mapping, and those that /proc does not show.
        for node in nodes.iter().filter(|node| is_character_device(node)) {
            let opened = fs::OpenOptions::new().read(true).write(true).open(node);
            if opened.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
                let (bdf, node) = (device.bdf, node.display());
                return Err(Error::InUse { what: format!("{bdf}: a program uses {node} or a device of it; end it first") });
            }
        }
        Ok(())
    }

    /// The disks and partitions of a device.
    fn disks(&self, device: &PciDevice) -> Result<BTreeSet<String>> {
        let mut disks: BTreeSet<_> = self.below(device, "block")?.into_iter().collect();
        // With NVMe multipath the disks belong to the subsystem, whose controllers are links next to them.
        let controllers: BTreeSet<_> = self.below(device, "nvme")?.into_iter().collect();
        let subsystems = self.sys("class/nvme-subsystem");
        if controllers.is_empty() || !subsystems.exists() {
            return Ok(disks);
        }
        for subsystem in names(&subsystems)? {
            let here = names(&subsystems.join(&subsystem))?;
            if here.iter().any(|name| controllers.contains(name)) {
                let dir = canonical(&subsystems.join(&subsystem))?;
                disks.extend(self.class_under(&dir, "block")?);
            }
        }
        Ok(disks)
    }

    /// The block devices with these names, with all that is stacked on top of them.
    fn with_holders(&self, names_below: BTreeSet<String>) -> Result<Vec<Block>> {
        let loops = self.loops()?;
        let mut seen = names_below.clone();
        let mut todo: Vec<_> = names_below.into_iter().collect();
        let mut blocks = Vec::new();
        while let Some(name) = todo.pop() {
            let dir = self.sys(&format!("class/block/{name}"));
            let holders = dir.join("holders");
            if holders.exists() {
                todo.extend(names(&holders)?.into_iter().filter(|holder| seen.insert(holder.clone())));
            }
            let own = [Block { dev: optional(&dir.join("dev"))?.unwrap_or_default(), name }];
            let on_top = loops.iter().filter(|(_, file)| self.named(file, &own).is_some()).map(|(name, _)| name);
            todo.extend(on_top.filter(|name| seen.insert((*name).clone())).cloned());
            blocks.extend(own);
        }
        blocks.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(blocks)
    }

    /// The loop devices and their files: these are no holders of what they are made of.
    fn loops(&self) -> Result<Vec<(String, String)>> {
        let class = self.sys("class/block");
        let mut loops = Vec::new();
        for name in if class.exists() { names(&class)? } else { Vec::new() } {
            if let Some(file) = optional(&class.join(&name).join("loop/backing_file"))? {
                loops.push((name, file));
            }
        }
        Ok(loops)
    }

    /// The objects of a class that belong to `device`, directly or by a bus of its own (SCSI, USB, virtio).
    fn below(&self, device: &PciDevice, class: &str) -> Result<Vec<String>> {
        self.class_under(&canonical(&self.device_dir(device.bdf))?, class)
    }

    fn class_under(&self, dir: &Path, class: &str) -> Result<Vec<String>> {
        let class = self.sys(&format!("class/{class}"));
        if !class.exists() {
            return Ok(Vec::new());
        }
        let mut found = names(&class)?;
        // Not canonical: removed meanwhile.
        found.retain(|name| fs::canonicalize(class.join(name)).is_ok_and(|at| at.starts_with(dir)));
        found.sort_unstable();
        Ok(found)
    }

    /// Which of the blocks a line of `mountinfo` (proc(5)) is about, and where it is mounted.
    fn mounted<'a>(&self, line: &str, blocks: &'a [Block]) -> Option<(&'a str, String)> {
        let mut words = line.split(' ');
        let (dev, place) = (words.nth(2)?, unescape(words.nth(1)?));
        // Some file systems (btrfs) have a number of their own, and are known by their source.
        let source = words.skip_while(|word| *word != "-").nth(2).map(unescape).unwrap_or_default();
        let by_number = blocks.iter().find(|block| block.dev == dev).map(|block| block.name.as_str());
        Some((by_number.or_else(|| self.named(&source, blocks))?, place))
    }

    /// Which of the blocks the file `/dev/...` is.
    fn named<'a>(&self, file: &str, blocks: &'a [Block]) -> Option<&'a str> {
        let below = file.strip_prefix("/dev/")?;
        // Names under /dev/mapper and /dev/disk are links.
        let node = fs::canonicalize(self.dev(below)).unwrap_or_else(|_| PathBuf::from(below));
        let name = node.file_name()?;
        blocks.iter().map(|block| block.name.as_str()).find(|block| *block == name)
    }

    /// A process that has one of the nodes open, as far as we are shown.
    fn user_of<'a>(&self, nodes: &'a [PathBuf]) -> Option<(&'a PathBuf, String)> {
        let own = std::process::id().to_string();
        let processes = fs::read_dir(self.proc("")).ok()?.flatten().take(PROCESSES);
        for process in processes {
            let pid = process.file_name().to_string_lossy().into_owned();
            if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
            let opened = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
            for target in opened {
                if let Some(node) = nodes.iter().find(|node| **node == target) {
                    let name = optional(&process.path().join("comm")).ok().flatten().unwrap_or_default();
                    return Some((node, format!("the process {pid} ({name})")));
                }
            }
        }
        None
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|error| Error::io(format!("following {}", path.display()), error))
}

/// Whether someone has the exclusive claim to a block device. Unknown (no such node, no permission) is no.
fn is_claimed(node: &Path, dev: &str) -> bool {
    let Ok(metadata) = fs::metadata(node) else { return false };
    let number = metadata.rdev();
    let there = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    if !metadata.file_type().is_block_device() || there != dev {
        return false;
    }
    let flags = rustix::fs::OFlags::EXCL | rustix::fs::OFlags::NONBLOCK;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(node);
    opened.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
}

fn is_character_device(node: &Path) -> bool {
    fs::metadata(node).is_ok_and(|metadata| metadata.file_type().is_char_device())
}

/// Undoes the `\040` of files in `/proc`.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                out.push(value as u8);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
