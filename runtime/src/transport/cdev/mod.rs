//! The kernel's VFIO by a character device of each device (`/dev/vfio/devices/vfioN`, Linux 6.6) and [iommufd](super::iommufd).
//!
//! A device opens as [`Unbound`]: the kernel answers EINVAL to everything but bind then, and so nothing else can be written down
//! here. [`Unbound::bind`] consumes it and gives the [`Bound`] device, whose [`DeviceFd`] does the rest; there is no way back
//! but to drop it.
//!
//! ```no_run
//! use vfio_uring::transport::{cdev::Unbound, iommufd::{Ioas, IommufdFd}};
//!
//! let context = IommufdFd::open()?;
//! let device = Unbound::find("0000:01:00.0")?.bind(&context, None)?;
//! let ioas = Ioas::alloc(&context)?;
//! device.attach(&ioas)?;
//! println!("{:#x?}", ioas.iova_ranges()?);
//! let fd = device.device().clone();
//! # drop(fd);
//! # Ok::<(), vfio_uring::Error>(())
//! ```
//!
//! A device that is not bound can't be read, mapped or reset, since it has no descriptor to do that with:
//!
//! ```compile_fail,E0599
//! # use vfio_uring::transport::{cdev::Unbound, iommufd::{Ioas, IommufdFd}};
//! #
//! # let context = IommufdFd::open()?;
//! let device = Unbound::find("0000:01:00.0")?;
//! let fd = device.device().clone();
//! # drop(fd);
//! # Ok::<(), vfio_uring::Error>(())
//! ```
//!
//! Nor can DMA memory be given to it:
//!
//! ```compile_fail,E0599
//! # use vfio_uring::transport::{cdev::Unbound, iommufd::{Ioas, IommufdFd}};
//! # let context = IommufdFd::open()?;
//! # let ioas = Ioas::alloc(&context)?;
//! Unbound::find("0000:01:00.0")?.attach(&ioas)?;
//! # Ok::<(), vfio_uring::Error>(())
//! ```
//!
//! # Closing
//! A device stays bound until the last reference to its open file is gone: every clone of the [`DeviceFd`], every operation of a
//! ring on it, **every mapping of a BAR**, and each of those in a child that was forked. So the order is: stop the device,
//! unmap the BARs, drop the [`DeviceFd`]s and the [`Bound`], then what was attached ([`Hwpt`], [`Ioas`]); the context goes last,
//! or when it likes. Until then the next bind of the device fails with [`Error::InUse`].
//!
//! Source: `include/uapi/linux/vfio.h`, `drivers/vfio/device_cdev.c`, `drivers/vfio/iommufd.c`.

mod find;
mod refusal;

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use rustix::{fs, io::Errno};
use vfio_bindings::bindings::vfio as abi;

use super::{
    iommufd::{Hwpt, Ioas, IommufdFd},
    vfio::{DeviceFd, VfToken, ioctl},
};
use crate::{
    Error, Result,
    dma::IovaRange,
    pci::{Bdf, sysfs::Pci},
};

const BIND: u32 = ioctl::request(100 + 18);
const ATTACH: u32 = ioctl::request(100 + 19);
const DETACH: u32 = ioctl::request(100 + 20);

// The older forms are the first bytes of the newer ones. They are what is sent where the new fields are not needed.
const _: () = assert!(size_of::<abi::vfio_device_bind_iommufd>() == 24);
const _: () = assert!(size_of::<abi::vfio_device_attach_iommufd_pt>() == 16);
const _: () = assert!(size_of::<abi::vfio_device_detach_iommufd_pt>() == 12);
const BIND_WITHOUT_TOKEN: usize = std::mem::offset_of!(abi::vfio_device_bind_iommufd, token_uuid_ptr);
const ATTACH_WITHOUT_PASID: usize = std::mem::offset_of!(abi::vfio_device_attach_iommufd_pt, pasid);
const DETACH_WITHOUT_PASID: usize = std::mem::offset_of!(abi::vfio_device_detach_iommufd_pt, pasid);
const _: () = assert!(BIND_WITHOUT_TOKEN == 16 && ATTACH_WITHOUT_PASID == 12 && DETACH_WITHOUT_PASID == 8);

/// A process address space of a device (PCI Express PASID): DMA that carries it goes by a page table of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(u32);

impl Pasid {
    /// The PASID with this number, from 1 to 0xfffff. How many bits a device has is in
    /// [`HwInfo::pasid_bits`](super::iommufd::HwInfo::pasid_bits).
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0, which to the kernel is all DMA without a PASID, and above 20 bits.
    pub fn new(number: u32) -> Result<Self> {
        if !(1..1 << 20).contains(&number) {
            return Err(Error::invalid(format!("{number:#x} is no PASID: from 1 to 0xfffff (0 is the DMA without one)")));
        }
        Ok(Self(number))
    }

    /// Its number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A VFIO device that is opened and not bound yet: it can be bound, or dropped.
#[derive(Debug)]
pub struct Unbound {
    fd: OwnedFd,
    name: Arc<str>,
    reserved: Vec<IovaRange>,
}

/// A bind that failed, and the device: to try again.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct BindError {
    /// Why.
    #[source]
    pub error: Error,
    /// The device, as it was.
    pub device: Unbound,
}

impl From<BindError> for Error {
    fn from(failed: BindError) -> Self {
        failed.error
    }
}

impl Unbound {
    /// Opens the character device at `path`, as `/dev/vfio/devices/vfio0`.
    ///
    /// # Errors
    /// [`Error::NotReady`] where it is not there or may not be opened, with the remedy; [`Error::Invalid`] for something else than
    /// a character device; [`Error::Gone`] while the device is being removed; else [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let flags = fs::OFlags::RDWR | fs::OFlags::CLOEXEC | fs::OFlags::NOCTTY;
        let fd = fs::open(path, flags, fs::Mode::empty()).map_err(|errno| refusal::open(errno, &name))?;
        let stat = fs::fstat(&fd).map_err(|errno| Error::io(format!("fstat of {name}"), errno))?;
        if fs::FileType::from_raw_mode(stat.st_mode) != fs::FileType::CharacterDevice {
            return Err(Error::invalid(format!(
                "{name} is not the character device of a VFIO device: see /dev/vfio/devices"
            )));
        }
        Ok(Self { fd, name: name.into(), reserved: Vec::new() })
    }

    /// Opens the device of a PCI function, as `0000:01:00.0`, which must be bound to a driver of VFIO.
    ///
    /// # Errors
    /// [`Error::Address`] for what is no PCI address, [`Error::NotReady`] for what is missing, with the remedy, and those of
    /// [`Pci::device`] and [`Unbound::open`].
    pub fn find(bdf: &str) -> Result<Self> {
        let bdf: Bdf = bdf.parse()?;
        let found = find::find(&Pci::system().device(bdf)?)?;
        let mut device = Self::open(&found.node)?;
        let stat = fs::fstat(&device.fd).map_err(|errno| Error::io(format!("fstat of {}", device.name), errno))?;
        let dev = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
        if dev != found.dev {
            return Err(Error::NotReady {
                what: format!(
                    "{} is device {}:{}, but {bdf} is {}:{}: the node is a leftover; is /dev kept by udev or devtmpfs?",
                    device.name, dev.0, dev.1, found.dev.0, found.dev.1
                ),
            });
        }
        device.name = format!("{bdf} ({})", device.name).into();
        device.reserved = found.reserved;
        Ok(device)
    }

    /// What the device is called in errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Binds the device to the context: from here on this process owns it. `token` is for virtual functions whose physical
    /// function is bound to vfio-pci as well.
    ///
    /// The driver opens the device, which takes a function reset, 100 ms and more, and waits for others that reset one on the same
    /// bus. DMA of the device is blocked until it is attached.
    ///
    /// # Errors
    /// The device comes back with each, and may be bound again: [`Error::InUse`] while somebody else has it or its group,
    /// [`Error::NotReady`] where the machine is not set up for it, [`Error::Gone`], else [`Error::Io`].
    pub fn bind(self, context: &IommufdFd, token: Option<VfToken>) -> Result<Bound, BindError> {
        let mut arg = abi::vfio_device_bind_iommufd {
            argsz: if token.is_some() { size_of::<abi::vfio_device_bind_iommufd>() } else { BIND_WITHOUT_TOKEN } as u32,
            flags: if token.is_some() { abi::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 },
            iommufd: context.as_fd().as_raw_fd(),
            out_devid: 0,
            token_uuid_ptr: token.as_ref().map_or(0, |token| token.as_bytes().as_ptr().expose_provenance() as u64),
        };
        // SAFETY: the struct is that of the request, of at least `argsz` bytes; the pointer, where its flag is set, is to the 16
        // bytes of a token that lives beyond the call.
        match unsafe { ioctl::with_struct(&self.fd, BIND, &mut arg) } {
            Ok(_) => Ok(Bound {
                device: DeviceFd::new(self.fd),
                id: arg.out_devid,
                context: context.clone(),
                name: self.name,
                reserved: self.reserved,
            }),
            Err(errno) => Err(BindError { error: refusal::bind(errno, &self.name, token.is_some()), device: self }),
        }
    }
}

/// The descriptor, to look at: the kernel refuses everything on it.
impl AsFd for Unbound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A VFIO device that is bound to a context of iommufd. Its DMA is blocked until it is attached to an address space.
///
/// See the [module](self#closing) for how it is closed.
#[derive(Debug)]
pub struct Bound {
    device: DeviceFd,
    id: u32,
    context: IommufdFd,
    name: Arc<str>,
    reserved: Vec<IovaRange>,
}

impl Bound {
    /// The device itself: its regions, interrupts, reset.
    pub fn device(&self) -> &DeviceFd {
        &self.device
    }

    /// Its id in the context.
    pub fn device_id(&self) -> u32 {
        self.id
    }

    /// The context that it is bound to.
    pub fn context(&self) -> &IommufdFd {
        &self.context
    }

    /// What the device is called in errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// I/O virtual addresses that no memory may be mapped at while the device is attached, as sysfs tells of its IOMMU group. Not
    /// known, and so empty, for a device that was opened by the path of its node.
    pub fn reserved(&self) -> &[IovaRange] {
        &self.reserved
    }

    /// Lets the device do DMA to what is mapped in `ioas`, now and later; attached to something else already, it is switched over
    /// in one step. The id of the page table that the kernel chose.
    ///
    /// All devices of one IOMMU group share a page table, and each has to be attached. The device's reserved regions are taken out
    /// of the space, so [`Ioas::iova_ranges`] may be narrower afterwards. All that is mapped gets pinned here, if it is the first
    /// device of the space.
    ///
    /// # Errors
    /// On any error what was attached before stays so.
    /// - [`Error::Conflict`]: a reserved region of this device overlaps an address that is mapped or
    ///   [allowed](Ioas::allow_iovas). The kernel does not say which;
    ///   [`overlaps`](crate::dma::overlaps) with [`Bound::reserved`] does.
    /// - [`Error::Io`] with EBUSY: it, or a device of its group, is being reset: try again after it.
    /// - [`Error::Invalid`]: the space is not of the device's context, or the rest of its group is attached elsewhere.
    /// - [`Error::Exhausted`]: the memory that is mapped can't be pinned within RLIMIT_MEMLOCK.
    pub fn attach(&self, ioas: &Ioas) -> Result<u32> {
        self.same_context(ioas)?;
        self.attach_to(ioas.id(), None)
    }

    /// [`Bound::attach`] to a page table with options.
    ///
    /// # Errors
    /// As for [`Bound::attach`], and [`Error::Invalid`] for a table that was made for another IOMMU, or with a fault queue for a
    /// device whose page requests can't be taken.
    pub fn attach_hwpt(&self, hwpt: &Hwpt) -> Result<()> {
        self.same_context(hwpt.ioas())?;
        self.attach_to(hwpt.id(), None).map(drop)
    }

    /// Lets the DMA that carries `pasid` go by a page table of its own, made with
    /// [`HwptFlags::PASID`](super::iommufd::HwptFlags::PASID), as must be the one that the device itself is attached to (Linux 6.15).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the device, its driver or the IOMMU has no PASIDs, else as for [`Bound::attach_hwpt`].
    pub fn attach_pasid(&self, pasid: Pasid, hwpt: &Hwpt) -> Result<()> {
        self.same_context(hwpt.ioas())?;
        self.attach_to(hwpt.id(), Some(pasid)).map(drop)
    }

    /// Blocks the device's DMA. Nothing is attached afterwards; that nothing was before is no error. Read
    /// [`Ioas::iova_ranges`] again: they may be wider.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses, with EBUSY while the device is being reset.
    pub fn detach(&self) -> Result<()> {
        self.detach_from(None)
    }

    /// Blocks the DMA that carries `pasid`.
    ///
    /// # Errors
    /// As for [`Bound::detach`].
    pub fn detach_pasid(&self, pasid: Pasid) -> Result<()> {
        self.detach_from(Some(pasid))
    }

    /// Ids are numbers, the same in every context: another's would be taken for one of ours.
    fn same_context(&self, ioas: &Ioas) -> Result<()> {
        if !ioas.context().is(&self.context) {
            return Err(Error::invalid(format!(
                "{} is bound to another context of iommufd than the address space is of",
                self.name
            )));
        }
        Ok(())
    }

    fn attach_to(&self, id: u32, pasid: Option<Pasid>) -> Result<u32> {
        let mut arg = abi::vfio_device_attach_iommufd_pt {
            argsz: if pasid.is_some() { size_of::<abi::vfio_device_attach_iommufd_pt>() } else { ATTACH_WITHOUT_PASID }
                as u32,
            flags: if pasid.is_some() { abi::VFIO_DEVICE_ATTACH_PASID } else { 0 },
            // The kernel writes the table's id here.
            pt_id: id,
            pasid: pasid.map_or(0, Pasid::get),
        };
        // SAFETY: the struct is that of the request, of at least `argsz` bytes, without pointers.
        match unsafe { ioctl::with_struct(&self.device, ATTACH, &mut arg) } {
            Ok(_) => Ok(arg.pt_id),
            Err(errno) => Err(refusal::attach(errno, &self.name, pasid)),
        }
    }

    fn detach_from(&self, pasid: Option<Pasid>) -> Result<()> {
        let mut arg = abi::vfio_device_detach_iommufd_pt {
            argsz: if pasid.is_some() { size_of::<abi::vfio_device_detach_iommufd_pt>() } else { DETACH_WITHOUT_PASID }
                as u32,
            flags: if pasid.is_some() { abi::VFIO_DEVICE_DETACH_PASID } else { 0 },
            pasid: pasid.map_or(0, Pasid::get),
        };
        // SAFETY: the struct is that of the request, of at least `argsz` bytes, without pointers.
        match unsafe { ioctl::with_struct(&self.device, DETACH, &mut arg) } {
            Ok(_) => Ok(()),
            Err(errno @ Errno::BUSY) => {
                Err(Error::io(format!("detaching {}: it is being reset; try again after it", self.name), errno))
            }
            Err(errno) => Err(Error::io(format!("detaching {}", self.name), errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_those_of_the_header() {
        assert_eq!((BIND, ATTACH, DETACH), (0x3b76, 0x3b77, 0x3b78));
    }

    #[test]
    fn pasids_are_not_0() {
        assert_eq!(Pasid::new(1).unwrap().get(), 1);
        assert_eq!(Pasid::new(0xf_ffff).unwrap().get(), 0xf_ffff);
        assert!(Pasid::new(0).is_err() && Pasid::new(1 << 20).is_err());
    }

    #[test]
    fn only_character_devices_are_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Unbound::open(file.path()), Err(Error::Invalid { .. })));
        assert!(matches!(Unbound::open("/dev/vfio/devices/no-such"), Err(Error::NotReady { .. })));
    }
}
