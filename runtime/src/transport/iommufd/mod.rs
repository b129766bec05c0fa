//! iommufd: `/dev/iommu`, whose I/O address spaces and page tables devices are attached to.
//!
//! An [`IommufdFd`] is a context. An [`Ioas`] is an address space in it: memory is mapped there, and every device that a cdev
//! [bound](crate::transport::cdev::Unbound::bind) to the same context may be attached to it. An [`Hwpt`] is a page table with
//! options of its own.
//!
//! Every function here is one or a few system calls, and may block: mapping pins each page, attaching pins all that is mapped.
//!
//! Locked memory is charged to the *user* by default, on the same counter as io_uring's registered buffers: all processes of the
//! user share one RLIMIT_MEMLOCK ([`Memlock`]). A process with CAP_IPC_LOCK is not charged.
//!
//! Source: `include/uapi/linux/iommufd.h`, `drivers/iommu/iommufd/`.

mod fault;
mod hwpt;
mod ioas;
mod refusal;
mod viommu;

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use iommufd_bindings as abi;
use rustix::{fs, io::Errno};

pub(crate) use fault::Closed;
pub use fault::FaultObject;
pub use hwpt::{HwInfo, Hwpt, HwptFlags, IommuKind};
pub use ioas::{Ioas, Ranges};
pub use viommu::{Vdevice, VeventObject, Viommu};

pub use crate::dma::Access;

use super::vfio::ioctl;
use crate::{Error, Result};

/// The node of iommufd.
const NODE: &str = "/dev/iommu";

const _: () = assert!(size_of::<abi::iommu_destroy>() == 8);
const _: () = assert!(size_of::<abi::iommu_option>() == 24);
const _: () = assert!(size_of::<abi::iommu_ioas_map_file>() == 40);

/// A context of iommufd. A handle: clones are the same context.
///
/// What is bound to it holds the context in the kernel too, so that it ends with the last of them.
#[derive(Clone)]
pub struct IommufdFd(Arc<Context>);

struct Context {
    fd: OwnedFd,
    maps_files: bool,
}

/// Whom locked memory is charged to, and so whose RLIMIT_MEMLOCK holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memlock {
    /// All processes of the user together, and with them io_uring's registered buffers: the default.
    User,
    /// The process alone.
    Process,
}

impl IommufdFd {
    /// Opens a context of its own.
    ///
    /// # Errors
    /// [`Error::NotReady`] with the remedy where the kernel has no iommufd, or the caller no permission; else [`Error::Io`].
    pub fn open() -> Result<Self> {
        let flags = fs::OFlags::RDWR | fs::OFlags::CLOEXEC;
        let fd = fs::open(NODE, flags, fs::Mode::empty()).map_err(open_failed)?;
        let maps_files = maps_files(&fd);
        Ok(Self(Arc::new(Context { fd, maps_files })))
    }

    /// Whether the kernel can map a file by its descriptor ([`Ioas::map_file`]; Linux 6.13). Asked once, when it is opened.
    pub fn maps_files(&self) -> bool {
        self.0.maps_files
    }

    /// Whom locked memory is charged to.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses.
    pub fn memlock(&self) -> Result<Memlock> {
        match self.option(Op::Get, abi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE, 0, 0) {
            Ok(0) => Ok(Memlock::User),
            Ok(_) => Ok(Memlock::Process),
            Err(errno) => Err(Error::io("reading whom iommufd charges locked memory to", errno)),
        }
    }

    /// Chooses whom locked memory is charged to. Only in a context that has nothing in it yet, and with CAP_SYS_RESOURCE.
    ///
    /// # Errors
    /// [`Error::Io`]: EPERM without the capability, EBUSY once the context holds anything.
    pub fn set_memlock(&self, mode: Memlock) -> Result<()> {
        let value = match mode {
            Memlock::User => 0,
            Memlock::Process => 1,
        };
        match self.option(Op::Set, abi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE, 0, value) {
            Ok(_) => Ok(()),
            Err(errno) => {
                let why = match errno {
                    Errno::PERM => "; it needs CAP_SYS_RESOURCE, without it stay with the account of the user",
                    Errno::BUSY => "; the context is in use: choose before an address space is made or a device is bound",
                    _ => "",
                };
                Err(Error::io(format!("charging iommufd's locked memory to {mode:?}{why}"), errno))
            }
        }
    }

    /// What the kernel tells of the IOMMU in front of a device. `device_id` is that of a [bound](super::cdev::Bound::device_id)
    /// device of this context.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown id, [`Error::Unsupported`] where the IOMMU's driver tells nothing, else [`Error::Io`].
    pub fn hw_info(&self, device_id: u32) -> Result<HwInfo> {
        hwpt::hw_info(self, device_id)
    }

    /// Whether both are the same context.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn option(&self, op: Op, option: u32, object: u32, value: u64) -> Result<u64, Errno> {
        let mut arg =
            abi::iommu_option { option_id: option, op: op as u16, object_id: object, val64: value, ..Default::default() };
        self.call(abi::IOMMUFD_CMD_OPTION, &mut arg)?;
        Ok(arg.val64)
    }

    /// Issues one command.
    fn call<T: Command>(&self, nr: u32, argument: &mut T) -> Result<(), Errno> {
        *argument.size() = size_of::<T>() as u32;
        // SAFETY: the commands of iommufd read and write as many bytes as the in-band size says, which are those of `T`, and the
        // memory that its pointer fields name, which the callers keep valid.
        unsafe { ioctl::with_struct(self, ioctl::request(nr as u8), argument) }.map(drop)
    }

    fn destroy(&self, id: u32) -> Result<(), Errno> {
        self.call(abi::IOMMUFD_CMD_DESTROY, &mut abi::iommu_destroy { id, ..Default::default() })
    }
}

impl AsFd for IommufdFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for IommufdFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommufdFd").field("fd", &self.0.fd).field("maps_files", &self.0.maps_files).finish()
    }
}

#[derive(Clone, Copy)]
enum Op {
    Set = abi::iommufd_option_ops_IOMMU_OPTION_OP_SET as isize,
    Get = abi::iommufd_option_ops_IOMMU_OPTION_OP_GET as isize,
}

/// An argument of a command: plain old data whose first field is its own size.
trait Command {
    fn size(&mut self) -> &mut u32;
}

macro_rules! commands {
    ($($name:ident)*) => {
        $(impl Command for abi::$name {
            fn size(&mut self) -> &mut u32 {
                &mut self.size
            }
        })*
    };
}

commands! {
    iommu_destroy iommu_option iommu_ioas_alloc iommu_ioas_allow_iovas iommu_ioas_copy iommu_ioas_iova_ranges iommu_ioas_map
    iommu_ioas_map_file iommu_ioas_unmap iommu_hwpt_alloc iommu_hw_info iommu_fault_alloc iommu_viommu_alloc iommu_vdevice_alloc
    iommu_veventq_alloc
}

/// Asks for a mapping that can't be made: of no bytes, in an address space that does not exist. A kernel that knows the command
/// says what is wrong with it; an older one that it does not know it.
fn maps_files(fd: &OwnedFd) -> bool {
    let mut arg = abi::iommu_ioas_map_file {
        size: size_of::<abi::iommu_ioas_map_file>() as u32,
        flags: abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
        fd: -1,
        ..Default::default()
    };
    // SAFETY: `arg` is what the command reads and writes, of its in-band size, and it has no pointers.
    let result = unsafe { ioctl::with_struct(fd, ioctl::request(abi::IOMMUFD_CMD_IOAS_MAP_FILE as u8), &mut arg) };
    !matches!(result, Err(Errno::NOTTY | Errno::OPNOTSUPP))
}

/// An object of a context, which goes with it.
#[derive(Debug)]
struct Object {
    context: IommufdFd,
    id: u32,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ioas,
    Hwpt,
    Fault,
    Viommu,
    Vdevice,
    Vevents,
}

impl Object {
    fn destroy(&self) -> Result<()> {
        self.context.destroy(self.id).map_err(|errno| Error::io(destroy_failed(self.kind, self.id, errno), errno))
    }

    /// It was destroyed. Ids start at 1: 0 stands for none.
    fn forget(mut self) {
        self.id = 0;
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if self.id != 0
            && let Err(error) = self.destroy()
        {
            tracing::warn!(id = self.id, kind = ?self.kind, %error, "an object of iommufd stays until its context ends");
        }
    }
}

/// An object that could not be destroyed, and why: to try again.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct DestroyError<T> {
    /// Why.
    #[source]
    pub error: Error,
    /// The object, as it was.
    pub object: T,
}

impl<T> From<DestroyError<T>> for Error {
    fn from(failed: DestroyError<T>) -> Self {
        failed.error
    }
}

fn open_failed(errno: Errno) -> Error {
    let not_ready = |why: &str| Error::NotReady { what: format!("{NODE} can't be opened: {why}") };
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => not_ready(
            "this kernel has no iommufd (Linux 6.2 with CONFIG_IOMMUFD), or its module is not loaded: modprobe iommufd, or use the \
             device by its group",
        ),
        Errno::ACCESS | Errno::PERM => {
            not_ready("it is root's unless a udev rule says otherwise: run as root or give this user access")
        }
        Errno::MFILE | Errno::NFILE => not_ready("too many files are open: raise `ulimit -n`"),
        errno => Error::io(format!("opening {NODE}"), errno),
    }
}

fn destroy_failed(kind: Kind, id: u32, errno: Errno) -> String {
    let why = match (kind, errno) {
        (_, Errno::NOENT) => "there is no such object any more",
        (Kind::Ioas, Errno::BUSY) => "a device is attached to it or a page table is made of it: detach all devices first",
        (Kind::Hwpt, Errno::BUSY) => {
            "a device is attached to it, or another page table stands on it: detach all devices first"
        }
        (Kind::Fault, Errno::BUSY) => {
            "a page table uses it, or its descriptor is open: detach all devices and destroy the tables first"
        }
        (Kind::Viommu, Errno::BUSY) => "a device, a page table or a queue of it is left: destroy those first",
        (Kind::Vevents, Errno::BUSY) => "its descriptor is open",
        _ => "the kernel refuses",
    };
    let kind = match kind {
        Kind::Ioas => "I/O address space",
        Kind::Hwpt => "page table",
        Kind::Fault => "fault queue",
        Kind::Viommu => "virtual IOMMU",
        Kind::Vdevice => "device of a virtual IOMMU",
        Kind::Vevents => "queue of events",
    };
    format!("destroying the {kind} with id {id} of iommufd: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        for (text, part) in [
            (open_failed(Errno::NOENT).to_string(), "modprobe iommufd"),
            (open_failed(Errno::ACCESS).to_string(), "udev"),
            (open_failed(Errno::MFILE).to_string(), "ulimit -n"),
            (destroy_failed(Kind::Ioas, 1, Errno::BUSY), "detach"),
            (destroy_failed(Kind::Hwpt, 1, Errno::BUSY), "detach"),
            (destroy_failed(Kind::Fault, 1, Errno::BUSY), "descriptor is open"),
            (destroy_failed(Kind::Viommu, 1, Errno::BUSY), "destroy those first"),
            (destroy_failed(Kind::Hwpt, 1, Errno::NOENT), "no such object"),
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn the_requests_are_those_of_the_header() {
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_DESTROY as u8), 0x3b80);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_IOAS_MAP as u8), 0x3b85);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_IOAS_MAP_FILE as u8), 0x3b8f);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_GET_HW_INFO as u8), 0x3b8a);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_FAULT_QUEUE_ALLOC as u8), 0x3b8e);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_VIOMMU_ALLOC as u8), 0x3b90);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_VDEVICE_ALLOC as u8), 0x3b91);
        assert_eq!(ioctl::request(abi::IOMMUFD_CMD_VEVENTQ_ALLOC as u8), 0x3b93);
    }
}
