//! A device's descriptor: what the device is, its regions and their bytes.

use std::{
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{self, Mode, OFlags},
    io::{DupFlags, Errno, dup3, pread, pwrite, retry_on_intr},
};
use zerocopy::IntoBytes;

use super::{abi, ioctl};
use crate::{
    Error, Result,
    dma::SharedMemory,
    transport::user::{
        protocol::{self, DeviceInfo, IrqInfo, RegionInfo, RegionReply},
        wire,
    },
};

/// A device that the kernel lets us use. Container and device requests share their numbers, so that the type of the descriptor is
/// the only guard (`include/uapi/linux/vfio.h`).
///
/// A handle: clones are the same descriptor, and the device is bound to this process until the last one, and the last mapping of
/// a BAR, is gone.
///
/// All of its functions are system calls. Most return at once; [`reset`](Self::reset) takes 100 ms and more, and while it lasts
/// everything that touches the device waits for it, in this and in all other processes.
#[derive(Debug, Clone)]
pub struct DeviceFd(Arc<OwnedFd>);

impl DeviceFd {
    /// Takes a descriptor that a group or a bound cdev gave.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// The descriptor, for operations of the ring.
    pub fn shared(&self) -> &Arc<OwnedFd> {
        &self.0
    }

    /// Closes the device behind the descriptor, whoever holds clones of it: from now on they refer to nothing, and every request of
    /// theirs fails with EBADF. The number stays taken. What is under way still has the device until it has ended.
    ///
    /// # Errors
    /// [`Error::Io`] when there is nothing to put into its place.
    pub(crate) fn retire(&self) -> Result<()> {
        let failed = |errno| Error::io("closing a device whose handles are still held", errno);
        // A descriptor that is good for nothing: no read, no write, no request, no mapping.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let nothing = fs::open("/", flags, Mode::empty()).map_err(failed)?;
        // SAFETY: the number is open for as long as `self` lives, and is not closed here. Its owners keep owning it: what changes is
        // the file that it stands for.
        let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.0.as_raw_fd()) });
        dup3(&nothing, &mut number, DupFlags::CLOEXEC).map_err(failed)
    }

    /// What the device is, and how much of it there is.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for numbers that make no sense, [`Error::Io`] when the kernel refuses.
    pub fn info(&self) -> Result<DeviceInfo> {
        // SAFETY: GET_INFO takes a `vfio_device_info`, which starts with its `argsz`, and writes at most that.
        let answer = unsafe { ioctl::query(self, abi::device::GET_INFO, wire::DeviceInfo::default().as_bytes()) };
        protocol::parse_device_info(&answer.map_err(|errno| failed("reading what the device is", errno, &[]))?)
    }

    /// A region: its size, where it is in the descriptor, what of it may be mapped. `None`: the device does not have it.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for an answer that breaks the rules, [`Error::Io`] when the kernel refuses.
    pub fn region_info(&self, index: u32) -> Result<Option<RegionInfo>> {
        let head = wire::RegionInfo { index: index.into(), ..Default::default() };
        // SAFETY: GET_REGION_INFO takes a `vfio_region_info`, which starts with its `argsz`, and writes at most that.
        let answer = match unsafe { ioctl::query(self, abi::device::GET_REGION_INFO, head.as_bytes()) } {
            Ok(answer) => answer,
            Err(Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(failed(format!("reading about region {index}"), errno, &[])),
        };
        let page = rustix::param::page_size() as u64;
        match protocol::parse_region_info(&answer, index, answer.len() as u32, page)? {
            RegionReply::Complete(info) if info.size == 0 => Ok(None),
            RegionReply::Complete(info) => Ok(Some(info)),
            RegionReply::Again(needed) => Err(Error::fault(format!(
                "region {index}: its capabilities grew each time they were read, to {needed} bytes"
            ))),
        }
    }

    /// An interrupt index: how many vectors it has, and what can be done with them. One that the device does not have has none.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] when the answer is for another index, [`Error::Io`] when the kernel refuses.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let head = wire::IrqInfo { index: index.into(), ..Default::default() };
        // SAFETY: GET_IRQ_INFO takes a `vfio_irq_info`, which starts with its `argsz`, and writes at most that.
        match unsafe { ioctl::query(self, abi::device::GET_IRQ_INFO, head.as_bytes()) } {
            Ok(answer) => protocol::parse_irq_info(&answer, index),
            // A device without PCI Express says so of its error interrupt.
            Err(Errno::INVAL) => Ok(IrqInfo::default()),
            Err(errno) => Err(failed(format!("reading about interrupt index {index}"), errno, &[])),
        }
    }

    /// Reads the bytes at `offset` of the descriptor, all of them: a region's bytes are at its [`RegionInfo::offset`].
    ///
    /// Of a BAR, an aligned read of 1, 2, 4 or 8 bytes is one access of the bus; any other becomes several. It waits while the
    /// device is being reset.
    ///
    /// # Errors
    /// [`Error::Invalid`] beyond the end of the region, else [`Error::Io`]; some of `to` may be overwritten.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let (len, mut done) = (to.len(), 0);
        while done < len {
            match retry_on_intr(|| pread(self, &mut to[done..], offset + done as u64)) {
                Ok(0) => return Err(ended("reading", len, offset, done)),
                Ok(read) => done += read,
                Err(errno) => return Err(access_failed("reading", len, offset, done, errno)),
            }
        }
        Ok(())
    }

    /// Writes the bytes at `offset` of the descriptor, all of them. See [`DeviceFd::read_at`].
    ///
    /// Some writes of configuration space take long: those that reset the device or change its power state.
    ///
    /// # Errors
    /// As for [`DeviceFd::read_at`]; some of `from` may be written.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<()> {
        let (len, mut done) = (from.len(), 0);
        while done < len {
            match retry_on_intr(|| pwrite(self, &from[done..], offset + done as u64)) {
                Ok(0) => return Err(ended("writing", len, offset, done)),
                Ok(written) => done += written,
                Err(errno) => return Err(access_failed("writing", len, offset, done, errno)),
            }
        }
        Ok(())
    }

    /// Maps `len` bytes at `offset` of the descriptor: an [area](RegionInfo::areas) of a region. The mapping keeps the device
    /// open.
    ///
    /// A load or store of it raises SIGBUS while the device's memory decoding is off or the device sleeps, and waits while the
    /// device is being reset. It works again afterwards.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Invalid`] for no bytes at all.
    pub fn map(&self, offset: u64, len: usize, writable: bool) -> Result<SharedMemory> {
        SharedMemory::map(self, offset, len, writable).map_err(|error| match &error {
            Error::Io { source, .. } => match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(errno) => failed(format!("mapping {len:#x} bytes at {offset:#x} of the device"), errno, &MAP),
                None => error,
            },
            _ => error,
        })
    }
}

impl AsFd for DeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an errno means for a request, and what to do about it.
pub(super) type Meanings = [(Errno, &'static str)];

const MAP: [(Errno, &str); 4] = [
    (Errno::INVAL, "this part of the region can't be mapped; read and write it instead"),
    (Errno::BUSY, "another driver uses the BAR; see /proc/iomem and unload that driver"),
    (Errno::PERM, "the region can't be mapped so; read and write it instead"),
    (Errno::NODEV, GONE),
];

const ACCESS: [(Errno, &str); 6] = [
    (Errno::IO, "the device sleeps (D3), its memory decoding is off, or it does not wake up; set COMMAND.MEM and D0"),
    (Errno::INVAL, "no region is there, it ends before, or it is read-only"),
    (Errno::FAULT, "it is beyond the end of configuration space"),
    (Errno::BUSY, "another driver uses the BAR; see /proc/iomem and unload that driver"),
    (Errno::NOMEM, "the kernel could not map the BAR"),
    (Errno::NODEV, GONE),
];

const GONE: &str = "its BAR can't be used, or it is gone";

/// What holds of every request.
const COMMON: [(Errno, &str); 3] = [
    (Errno::NODEV, GONE),
    (Errno::IO, "the device does not wake up"),
    (Errno::NOTTY, "this kernel does not know the request"),
];

/// The error of a request that the kernel refused, with its meaning where that is known.
pub(super) fn failed(what: impl Into<String>, errno: Errno, meanings: &Meanings) -> Error {
    let what = what.into();
    match meanings.iter().chain(&COMMON).find(|(of, _)| *of == errno) {
        Some((_, meaning)) => Error::io(format!("{what} ({meaning})"), errno),
        None => Error::io(what, errno),
    }
}

pub(super) fn access_failed(doing: &str, len: usize, offset: u64, done: usize, errno: Errno) -> Error {
    let what = format!("{doing} {len} bytes at {offset:#x} of the device, {done} of them done");
    match errno {
        Errno::INVAL | Errno::FAULT => Error::invalid(failed(what, errno, &ACCESS).to_string()),
        errno => failed(what, errno, &ACCESS),
    }
}

pub(super) fn ended(doing: &str, len: usize, offset: u64, done: usize) -> Error {
    Error::invalid(format!("{doing} {len} bytes at {offset:#x} of the device: the region ends after {done} of them"))
}
