//! From the address of a PCI function to its character device, through sysfs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Where the character device of a function is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) node: PathBuf,
    /// Its major and minor number.
    pub(super) dev: (u32, u32),
}

/// Looks in the `sys` of `root`; the node is told with `root` before it.
pub(super) fn find(root: &Path, bdf: &str) -> Result<Found> {
    if !is_bdf(bdf) {
        return Err(Error::invalid(format!("{bdf:?} is not a PCI address: write it as 0000:01:00.0")));
    }
    let not_ready = |what: String| Err(Error::NotReady { what });
    let device = root.join("sys/bus/pci/devices").join(bdf);
    if !device.try_exists().map_err(|error| Error::io(format!("looking for {}", device.display()), error))? {
        return not_ready(format!("there is no PCI device {bdf}; see vfio-uring list"));
    }
    let dir = device.join("vfio-dev");
    let names = match names(&dir) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return not_ready(format!("{bdf} is not bound to a driver of VFIO: vfio-uring bind {bdf}"));
        }
        Err(error) => return Err(Error::io(format!("listing {}", dir.display()), error)),
    };
    let name = match &names[..] {
        [name] => name,
        names => return not_ready(format!("{} should have one entry in it, and has {}", dir.display(), names.len())),
    };
    if name.starts_with("noiommu-") {
        return not_ready(format!(
            "{bdf} has no IOMMU, so that its DMA reaches all memory: boot with intel_iommu=on (Intel) or amd_iommu=on (AMD)"
        ));
    }
    let number = name.strip_prefix("vfio").filter(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
    if number.is_none() {
        return not_ready(format!("{} has {name:?} in it, where vfioN was expected", dir.display()));
    }
    let file = dir.join(name).join("dev");
    let dev = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return not_ready(format!(
                "this kernel has no character devices for VFIO (Linux 6.6 with CONFIG_VFIO_DEVICE_CDEV): use group:{bdf}"
            ));
        }
        Err(error) => return Err(Error::io(format!("reading {}", file.display()), error)),
    };
    let numbers = dev.trim_end().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    match numbers {
        Some(dev) => Ok(Found { node: root.join("dev/vfio/devices").join(name), dev }),
        None => not_ready(format!("{} is not MAJOR:MINOR: {dev:?}", file.display())),
    }
}

/// Names in a directory, three at most: one is right, and the rest is for an error.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(dir)?.take(3).map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Whether this is the whole form, DDDD:BB:DD.F with 4 to 8 digits of domain: it becomes part of a path.
fn is_bdf(text: &str) -> bool {
    let hex = |text: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let parts = text.split_once(':').and_then(|(domain, rest)| {
        let (bus, slot) = rest.split_once(':')?;
        let (device, function) = slot.split_once('.')?;
        Some((domain, bus, device, function))
    });
    parts.is_some_and(|(domain, bus, device, function)| {
        hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && hex(function, 1..=1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BDF: &str = "0000:01:00.0";

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(machine.at("")).unwrap();
            machine
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join("sys/bus/pci/devices").join(BDF).join(path)
        }

        fn with(self, name: &str, dev: Option<&str>) -> Self {
            fs::create_dir_all(self.at("vfio-dev").join(name)).unwrap();
            if let Some(dev) = dev {
                fs::write(self.at("vfio-dev").join(name).join("dev"), dev).unwrap();
            }
            self
        }

        fn find(&self) -> Result<Found> {
            find(self.0.path(), BDF)
        }
    }

    #[test]
    fn the_node_and_its_numbers() {
        let machine = Machine::new().with("vfio7", Some("511:3\n"));
        let node = machine.0.path().join("dev/vfio/devices/vfio7");
        assert_eq!(machine.find().unwrap(), Found { node, dev: (511, 3) });
    }

    #[test]
    fn what_is_missing_is_said() {
        let says = |machine: &Machine, part: &str| {
            let error = machine.find().unwrap_err();
            assert!(matches!(error, Error::NotReady { .. }) && error.to_string().contains(part), "{error}");
        };
        says(&Machine::new(), "vfio-uring bind 0000:01:00.0");
        says(&Machine::new().with("vfio7", None), "CONFIG_VFIO_DEVICE_CDEV");
        says(&Machine::new().with("noiommu-vfio7", Some("511:3")), "no IOMMU");
        says(&Machine::new().with("vfio7", Some("511")), "MAJOR:MINOR");
        says(&Machine::new().with("vfio7", Some("511:3")).with("vfio8", None), "one entry");
        says(&Machine::new().with("vfio", Some("511:3")), "vfioN was expected");
        let nobody = find(Machine::new().0.path(), "0000:02:00.0").unwrap_err();
        assert!(nobody.to_string().contains("no PCI device"), "{nobody}");
    }

    #[test]
    fn an_address_is_not_a_path() {
        for text in
            ["", "..", "0000:01:00.0/..", "../0000:01:00.0", "01:00.0", "0000:01:00", "0000:01:00.00", "0000:01:00.x"]
        {
            assert!(matches!(find("/".as_ref(), text), Err(Error::Invalid { .. })), "{text}");
        }
        assert!(is_bdf("10000:e1:00.0"));
    }
}
