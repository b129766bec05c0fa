//! The one place that issues ioctls of VFIO and iommufd.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The request numbers of VFIO and iommufd: `_IO(';', nr)`, without a size; the size is in the argument.
pub(crate) const fn request(nr: u8) -> u32 {
    (b';' as u32) << 8 | nr as u32
}

/// Issues `request` with a pointer to `argument`. What the kernel returned, 0 or more.
///
/// # Safety
/// `argument` is what the kernel reads and writes for `request`, of at least the size that its in-band size field says; what it
/// points to is valid for the call.
pub(crate) unsafe fn with_struct<T: ?Sized>(fd: impl AsFd, request: u32, argument: &mut T) -> Result<i32, Errno> {
    // SAFETY: by the caller's promise.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), std::ptr::from_mut(argument).cast::<libc::c_void>()) };
    returned(result)
}

/// Issues `request` with a number as its argument. What the kernel returned, 0 or more.
///
/// # Safety
/// `request` takes a number, or nothing, and no pointer.
pub(crate) unsafe fn with_number(fd: impl AsFd, request: u32, argument: usize) -> Result<i32, Errno> {
    // SAFETY: by the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), argument) };
    returned(result)
}

fn returned(result: i32) -> Result<i32, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}
