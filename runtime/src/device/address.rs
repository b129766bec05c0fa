//! Where a device is.

use std::{fmt, path::PathBuf, str::FromStr};

use crate::{Error, pci::Bdf};

/// The address of a device, as a user writes it.
///
/// ```
/// use vfio_uring::device::Address;
///
/// let address: Address = "vfio-user:/run/nvme.sock".parse()?;
/// assert_eq!(address, Address::User("/run/nvme.sock".into()));
/// assert_eq!(address.to_string(), "vfio-user:/run/nvme.sock");
/// assert_eq!("01:00.0".parse::<Address>()?.to_string(), "0000:01:00.0");
/// assert!(matches!("group:0000:01:00.0".parse()?, Address::Group(_)));
/// # Ok::<(), vfio_uring::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// `0000:01:00.0`: a PCI device of the kernel's VFIO, by its own character device when there is one and `/dev/iommu` can be
    /// opened, else by its group (see [`Pci::prefers_cdev`](crate::pci::sysfs::Pci::prefers_cdev)).
    Pci(Bdf),
    /// `group:0000:01:00.0`: by its group, with a container.
    Group(Bdf),
    /// `cdev:0000:01:00.0`: by its own character device, with iommufd.
    Cdev(Bdf),
    /// `vfio-user:PATH`: the socket of a vfio-user server.
    User(PathBuf),
}

/// Bytes of `sun_path` without its NUL.
const MAX_PATH: usize = 107;

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let error = |reason| Err(Error::Address { text: text.into(), reason });
        match text.split_once(':') {
            Some(("vfio-user", "")) => error("the path of the socket is missing"),
            Some(("vfio-user", path)) if path.contains('\0') => error("its path has a NUL in it"),
            Some(("vfio-user", path)) if path.len() > MAX_PATH => error("the path of a socket has at most 107 bytes"),
            Some(("vfio-user", path)) => Ok(Self::User(path.into())),
            _ if text.is_empty() => error("it is empty"),
            _ if text.starts_with(['/', '.']) => error("vfio-user: is missing before the path"),
            Some(("group", bdf)) => Bdf::read(bdf).map(Self::Group).or_else(error),
            Some(("cdev", bdf)) => Bdf::read(bdf).map(Self::Cdev).or_else(error),
            Some((head, _)) if !head.is_empty() && head.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Bdf::read(text).map(Self::Pci).or_else(error)
            }
            _ => error("its kind is not known"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(bdf) => bdf.fmt(f),
            Self::Group(bdf) => write!(f, "group:{bdf}"),
            Self::Cdev(bdf) => write!(f, "cdev:{bdf}"),
            Self::User(path) => write!(f, "vfio-user:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_is_wrong() {
        let long = format!("vfio-user:/{}", "x".repeat(107));
        for (text, part) in [
            ("", "empty"),
            ("vfio-user:", "missing"),
            ("/tmp/socket", "vfio-user: is missing"),
            ("./socket", "vfio-user: is missing"),
            ("0000:01:00.8", "0 to 7"),
            ("0000:01", "DOMAIN:BUS"),
            ("group:", "DOMAIN:BUS"),
            ("cdev:vfio0", "DOMAIN:BUS"),
            ("cdev:01:20.0", "00 to 1f"),
            ("pci:0000:01:00.0", "not known"),
            ("vfio-user", "not known"),
            ("tcp:host", "not known"),
            ("vfio-user:a\0b", "NUL"),
            (&long, "107"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!("vfio-user:rel:ative".parse::<Address>().unwrap(), Address::User("rel:ative".into()));
    }

    #[test]
    fn pci_addresses() {
        let bdf = Bdf::new(0, 1, 0, 0).unwrap();
        for (text, address) in [
            ("0000:01:00.0", Address::Pci(bdf)),
            ("group:0000:01:00.0", Address::Group(bdf)),
            ("cdev:0000:01:00.0", Address::Cdev(bdf)),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address);
            assert_eq!(text.replace("0000:", "").parse::<Address>().unwrap(), address);
            assert_eq!(address.to_string(), text);
        }
    }
}
